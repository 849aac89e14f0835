"""How many requests until drift is noticed: `python benchmarks/serving_drift.py [--seeds 0 1 2] [--trials 60] [--work FOLDER] [--quick]`.

Five detectors against five kinds of trouble, four amounts each, on the validation garments. For each seed a LeNet-5 learns nine of the ten classes; each trial
splits the validation part anew into a reference and live traffic, so that nothing but the trouble tells them apart. The chapter *In production* reads
`benchmarks/results/serving_drift.json`."""
import argparse, json, math, time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import store
from dlfund.data.datasets import Split, load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.deployment.production import _stray, chi2_test, ks_statistic, mmd_test, picture_features, shift_pictures
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision import build

ALPHA, SIZES, N_REFERENCE = 0.01, (10, 20, 50, 100, 200, 400), 400
DETECTORS = ('features', 'confidence', 'classes', 'softmax', 'MMD')
TROUBLE = {'brightness': (0.95, 0.8, 0.6, 0.4), 'blur': (1, 2, 4, 8), 'rotation': (5, 10, 20, 40),
           'new mix': (1.5, 2, 4, 8), 'new class': (0.05, 0.1, 0.2, 0.4)}


def without(part, c):
    "A part of the data without class `c`, the classes renumbered."
    kept = part.y != c
    return Split(x=part.x[kept], y=part.y[kept] - (part.y[kept] > c))


def train(splits, preprocess, seed):
    "The model of the chapter."
    config = TrainConfig(epochs=4, lr=0.004, seed=seed)
    dls = loaders(splits, preprocess)
    seed_everything(seed, dls)
    learn = make_learner(dls, build('lenet', n_classes=9, n_channels=1), config, log=EpochLogCallback(lambda line: None))
    learn.fit_one_cycle(config.epochs, config.lr)
    return learn.model.eval()


def seen(model, preprocess, pictures):
    "All that a monitor may look at: features, softmax and logits of each picture."
    with torch.no_grad(): z = model(preprocess(torch.from_numpy(pictures)))
    return picture_features(pictures), z.softmax(-1).double().numpy(), z.double().numpy()


@lru_cache(maxsize=None)
def critical(n, m, alpha):
    "The smallest whole distance whose p-value is below `alpha`; above `n*m` if there is none."
    low, high = 0, n*m + 1
    while high - low > 1:
        middle = (low + high)//2
        low, high = (low, middle) if _stray(n, m, middle) < alpha else (middle, high)
    return high


def is_noticed(detector, old, new, rng):
    "Whether a detector raises the alarm about two samples of what `seen` gives."
    ks = lambda a, b: any(ks_statistic(a[:, i], b[:, i]) >= critical(len(a), len(b), ALPHA/a.shape[1]) for i in range(a.shape[1]))
    if detector == 'features': return ks(old[0], new[0])
    if detector == 'confidence': return ks(old[1].max(-1, keepdims=True), new[1].max(-1, keepdims=True))
    if detector == 'softmax': return ks(old[1], new[1])
    count = lambda p: np.bincount(p.argmax(-1), minlength=9)
    if detector == 'classes': return chi2_test(count(old[1]), count(new[1]))[1] < ALPHA
    return mmd_test(old[2], new[2], 199, rng)[1] <= ALPHA


def trial(old_all, live_all, y, kind, amount, rng):
    "One random split: which detectors notice, at each number of requests."
    n = len(y)
    order = rng.permutation(n)
    reference, rest = order[:N_REFERENCE], order[N_REFERENCE:]
    if kind == 'new mix':
        kept = (y[rest] < 3) | (rng.random(len(rest)) < 1/amount) # thinned, not drawn again: no picture comes twice
        live = rng.permutation(rest[kept])[:max(SIZES)] # fewer than the largest size, for large amounts
    else: live = rng.permutation(rest)[:max(SIZES)]
    if kind == 'new class': # the bags lie behind the others
        is_new = rng.random(len(live)) < amount
        live = np.where(is_new, rng.integers(n, len(live_all[0]), len(live)), live)
    old = [part[reference] for part in old_all]
    return [[is_noticed(d, old, [part[live[:m]] for part in live_all], rng) for m in SIZES] for d in DETECTORS]


def lost(live_all, old_all, y, kind, amount):
    "Share of right answers that the trouble costs, on the whole validation part."
    right, n = old_all[1].argmax(-1) == y, len(y)
    if kind == 'new mix':
        w = np.where(y < 3, amount, 1.0)
        return right.mean() - (right*w).sum()/w.sum()
    if kind == 'new class': return amount*right.mean()
    return right.mean() - (live_all[1][:n].argmax(-1) == y).mean()


def needed(power, wanted=0.9):
    "Requests at which the power first reaches what is wanted, interpolated on a logarithmic axis; None if never."
    at = next((i for i, p in enumerate(power) if p >= wanted), None)
    if not at: return None if at is None else SIZES[0]
    share = (wanted - power[at - 1]) / (power[at] - power[at - 1])
    return round(math.exp(math.log(SIZES[at - 1]) + share*math.log(SIZES[at]/SIZES[at - 1])), 1)


def measure(seed, trials, fashion, kept=None):
    "All cases of one seed: `[kind, amount, lost, power (detectors, sizes)]`; those in the file `kept` are not measured again."
    wanted = [(kind, amount) for kind, amounts in {'none': (0,), **TROUBLE}.items() for amount in amounts]
    cases, bag = json.loads(kept.read_text()) if kept and kept.exists() else [], fashion.labels.index('Bag')
    if len(cases) == len(wanted): return cases
    splits = replace(fashion, train=without(fashion.train, bag), valid=without(fashion.valid, bag),
                     labels=[v for v in fashion.labels if v != 'Bag'])
    x, y, bags = splits.valid.x, splits.valid.y.astype(int), fashion.valid.x[fashion.valid.y == bag]
    preprocess = fit_preprocess(splits.train.x)
    model = train(splits, preprocess, seed)
    old_all = seen(model, preprocess, x)
    for i, (kind, amount) in list(enumerate(wanted))[len(cases):]:
        pictures, rng = shift_pictures(x, kind, amount) if kind in ('brightness', 'blur', 'rotation') else x, np.random.default_rng([seed, i])
        live_all = seen(model, preprocess, np.concatenate([pictures, bags]))
        found = [trial(old_all, live_all, y, kind, amount, rng) for _ in range(trials)]
        cases.append([kind, amount, float(lost(live_all, old_all, y, kind, amount)), np.mean(found, 0).round(4).tolist()])
        if kept: kept.write_text(json.dumps(cases))
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--trials', type=int, default=60)
    parser.add_argument('--work', type=Path, help='folder in which finished cases are kept, so that a run may be continued')
    parser.add_argument('--quick', action='store_true', help='one seed, three trials; fewer than three seeds store nothing')
    args = parser.parse_args()
    if args.quick: args.seeds, args.trials = [0], 3
    begin, fashion, by_seed = time.perf_counter(), load('fashion-mini'), []
    if args.work: args.work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        cases = measure(seed, args.trials, fashion, args.work and args.work/f'drift_{seed}_{args.trials}.json')
        by_seed.append(cases)
        print(f'seed {seed}: {time.perf_counter() - begin:.0f} s', flush=True)
    results = []
    for cases in zip(*by_seed): # one case, all seeds
        kind, amount = cases[0][:2]
        power = np.mean([case[3] for case in cases], 0) # (detectors, sizes)
        results.append(dict(
            kind=kind, amount=amount, lost=[case[2] for case in cases], power={d: p.round(4).tolist() for d, p in zip(DETECTORS, power)},
            power_by_seed={d: [case[3][i] for case in cases] for i, d in enumerate(DETECTORS)},
            requests={d: needed(p) for d, p in zip(DETECTORS, power)}))
        print(f"{kind:>10} {amount:5} lost {100*np.mean(results[-1]['lost']):5.1f} " + ' '.join(f'{d} {n}' for d, n in results[-1]['requests'].items()))
    print('false alarms', results[0]['power'])
    if len(args.seeds) >= 3: # fewer show no spread
        store('serving_drift', results[1:], sha256=fashion.sha256, seeds=args.seeds, trials=args.trials, alpha=ALPHA, sizes=SIZES,
              n_reference=N_REFERENCE, detectors=DETECTORS, false_alarms=results[0]['power'])


if __name__ == '__main__': main()
