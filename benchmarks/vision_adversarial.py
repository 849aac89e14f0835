"""Accuracy on clean pictures and under attack after standard training, training under FGSM and training under PGD, on `fashion-mini`.

The chapter *Looking inside* reads `benchmarks/results/vision_adversarial.json`. One seed takes a few minutes on two CPU cores; with `--seeds`
a part of them can be run at a time, and what is stored for other seeds stays."""
import argparse, json, time
from functools import partial

import torch

from common import RESULTS, spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import ImagePreprocess, fit_preprocess
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision import build
from dlfund.vision.interpretation import AdversarialCallback, PixelModel, pgd, robust_accuracy

EPSILON = 0.1 # what is trained against, where 1 is from black to white
EPSILONS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
ATTACKS = {'standard': None, 'FGSM': dict(step=1.25*EPSILON, n_steps=1), 'PGD': dict(step=EPSILON/2, n_steps=5)}


def train(fashion, attack, seed, epochs):
    "Train the small ResNet at half its width; return the model and the seconds it took."
    dls, stats = loaders(fashion, ImagePreprocess(), bs=128, augment=True), fit_preprocess(fashion.train.x)
    seed_everything(seed, dls)
    model, config = PixelModel(build('resnet-mini', 10, 1, 0.5), stats.mean, stats.std), TrainConfig(epochs=epochs, label_smoothing=0.0, seed=seed)
    cbs = [AdversarialCallback(partial(pgd, epsilon=EPSILON, **attack))] if attack else []
    learn, begin = make_learner(dls, model, config, log=EpochLogCallback(lambda line: None), cbs=cbs), time.perf_counter()
    learn.fit_one_cycle(config.epochs, config.lr)
    return model.eval(), time.perf_counter() - begin


def judge(model, x, y, seed):
    "Accuracy for every epsilon: PGD of twenty steps, two restarts."
    torch.manual_seed(seed)
    attack = lambda e: (lambda m, x, y: x) if not e else partial(pgd, epsilon=e, step=e/5, n_steps=20)
    return [robust_accuracy(model, x, y, attack(e), n_restarts=2 if e else 1) for e in EPSILONS]


def main(argv=None):
    "Train, judge, print, store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--quick', action='store_true', help='one epoch, few pictures, and nothing is stored')
    args = parser.parse_args(argv)
    fashion, file = load('fashion-mini'), RESULTS/'vision_adversarial.json'
    n = 100 if args.quick else 500
    x, y = torch.from_numpy(fashion.valid.x[:n])[:, None]/255, torch.from_numpy(fashion.valid.y[:n].astype('int64'))
    kept = json.loads(file.read_text())['results'] if file.exists() else {}
    found = {name: [row for row in kept.get(name, []) if row['seed'] not in args.seeds] for name in ATTACKS}
    for seed in args.seeds:
        for name, attack in ATTACKS.items():
            model, seconds = train(fashion, attack, seed, 1 if args.quick else args.epochs)
            row = dict(seed=seed, seconds=round(seconds, 1), accuracy=judge(model, x, y, seed))
            found[name] = sorted([*found[name], row], key=lambda row: row['seed'])
            print(f"{name:9} seed {seed}: {seconds:4.0f} s, accuracy", '  '.join(f'{e}: {a:.3f}' for e, a in zip(EPSILONS, row['accuracy'])), flush=True)
    if args.quick: return
    for name, rows in found.items(): print(f"{name:9} clean {spread([r['accuracy'][0] for r in rows])}, "
                                           f"epsilon {EPSILON} {spread([r['accuracy'][EPSILONS.index(EPSILON)] for r in rows])}")
    print(store('vision_adversarial', found, seeds=[r['seed'] for r in found['PGD']], data=fashion.sha256, epsilons=EPSILONS, trained_epsilon=EPSILON,
                epochs=args.epochs, pictures=n, threads=torch.get_num_threads()))


if __name__ == '__main__': main()
