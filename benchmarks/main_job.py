"""The main job, measured: `python benchmarks/main_job.py`.

Time and memory of `dlfund train` as a user runs it, its test accuracy over three seeds, the time of one prediction with the start of the
process, and fastai's `Learner` with our callbacks against the same loop written by hand, in turn in one process."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image
from torch import nn

from common import spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.configuration import read_experiment
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision import build

SEEDS = (0, 1, 2)
COMMAND = Path(sys.executable).with_name('dlfund')
CONFIG = Path(__file__).parent.parent/'configs'/'image_classification.yaml'


def run(*words, cwd):
    "Run `dlfund` as a process; return its lines, its seconds and its peak memory in MiB."
    begin = time.perf_counter()
    process = subprocess.Popen([COMMAND, *words], cwd=cwd, stdout=subprocess.PIPE, text=True)
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'dlfund {" ".join(words)} failed')
    return lines, time.perf_counter() - begin, usage.ru_maxrss / 1024


def main_job(folder):
    "Train with each seed in a process of its own."
    rows = []
    for seed in SEEDS:
        lines, seconds, memory = run('train', str(CONFIG), f'train.seed={seed}', cwd=folder)
        bundle = Path(folder)/lines[-1]
        facts = json.loads((bundle/'bundle.json').read_text())
        rows.append(dict(seed=seed, seconds=seconds, peak_mib=memory, data=facts['data']['sha256'],
                         **{f'{part}_{name}': facts['metrics'][part][name] for part in ('valid', 'test') for name in ('accuracy', 'cross_entropy')}))
        print(f"seed {seed}: test accuracy {rows[-1]['test_accuracy']:.4f}, {seconds:.1f} s from start of process to saved bundle, {memory:.0f} MiB")
    return rows, bundle


def predict_once(folder, bundle, fashion):
    "Seconds of one prediction from the command line, start of the process included; the first warms the disk cache."
    Image.fromarray(fashion.valid.x[0]).save(Path(folder)/'picture.png')
    return [run('predict', str(bundle), 'picture.png', cwd=folder)[1] for _ in range(6)][1:]


def by_hand(model, dls, config, n_epochs):
    "The same training without fastai: yields the seconds of each epoch."
    loss_func = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    opt = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, config.lr, total_steps=n_epochs * len(dls.train), pct_start=0.25)
    for _ in range(n_epochs):
        begin = time.perf_counter()
        model.train()
        for x, y in dls.train:
            loss = loss_func(model(x), y)
            loss.backward(); opt.step(); opt.zero_grad(); schedule.step()
        model.eval()
        with torch.no_grad(): right = sum((model(x).argmax(-1) == y).sum().item() for x, y in dls.valid)
        yield time.perf_counter() - begin


def by_learner(learn, config, n_epochs):
    "Seconds of each epoch of `Learner`, as its log says."
    learn.fit_one_cycle(n_epochs, config.lr)
    return [row['seconds'] for row in learn.epoch_log.history]


def ratio(fashion, n_rounds=5):
    "Alternate two epochs of `Learner` with two by hand; return the ratio of the times of each epoch."
    config, preprocess = read_experiment(CONFIG).train, fit_preprocess(fashion.train.x)
    dls = loaders(fashion, preprocess, bs=128, augment=True)
    make = lambda: build('resnet-mini', n_classes=10, n_channels=1)
    ratios = []
    for i in range(n_rounds + 1):
        seed_everything(i, dls)
        learn = make_learner(dls, make(), config, log=EpochLogCallback(lambda line: None))
        hand = make().to(memory_format=torch.channels_last)
        ratios += [a / b for a, b in zip(by_learner(learn, config, 2), by_hand(hand, dls, config, 2))]
    return ratios[2:] # the first round warms up


if __name__ == '__main__':
    fashion = load('fashion-mini')
    with tempfile.TemporaryDirectory() as folder:
        rows, bundle = main_job(folder)
        predictions = predict_once(folder, bundle, fashion)
    ratios = ratio(fashion)
    column = lambda name: [row[name] for row in rows]
    print(f"""
measure                                    result                target
test accuracy, three seeds                 {spread(column('test_accuracy'))}       at least 0.885
start of process to saved bundle           {mean(column('seconds')):.1f} s (worst {max(column('seconds')):.1f})       at most 90 s
peak memory                                {max(column('peak_mib')):.0f} MiB              at most 1536 MiB
`Learner` / loop by hand, time             {median(ratios):.3f} (median of {len(ratios)})  at most 1.10
one prediction, process start included     {median(predictions):.2f} s                at most 3 s
""")
    print(store('main_job', dict(runs=rows, predict_seconds=predictions, learner_over_hand=ratios), seeds=SEEDS, data=fashion.sha256))
