"""What tracking costs a ResNet-18 on 32×32 pictures: `TrackingCallback` with `LocalTracker`, against no tracking."""
import argparse, tempfile, time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn

from common import store
from dlfund.data.loading import ArrayLoader
from dlfund.training.tracking import LocalTracker, TrackingCallback

WAYS = {'no tracking': None, 'steps=10': dict(steps=10), 'steps=10, no activations': dict(steps=10, activations=False),
        'steps=1': dict(steps=1)}


class ClockCallback(Callback):
    "Note the time after every step."
    order = 2000
    def before_fit(self): self._times = [time.perf_counter()]
    def after_batch(self):
        if self.training: self._times.append(time.perf_counter())


def seconds_a_step(
    net:nn.Module, # to train
    dls:DataLoaders, # batches
    folder:Path, # gets the numbers
    how:dict|None, # arguments of `TrackingCallback`, or `None` for no tracking
)->float: # the mean, without the first ten steps
    "Train an epoch, and time it."
    clock = ClockCallback()
    cbs = [clock] + ([] if how is None else [TrackingCallback([LocalTracker(folder)], **how)])
    learn = Learner(dls, net, nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=cbs)
    learn.logger = noop
    learn.remove_cb(ProgressCallback).fit(1, 1e-4)
    return (clock._times[-1] - clock._times[10]) / (len(clock._times) - 11)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', type=int, default=30, help='timed steps of each training, a multiple of ten')
    parser.add_argument('--bs', type=int, default=128, help='pictures in a batch')
    parser.add_argument('--repetitions', type=int, default=5, help='of each way, in turn')
    args = parser.parse_args(words)
    torch.manual_seed(0)
    n = args.bs * (args.steps + 10)
    x, y = torch.randn(n, 3, 32, 32), torch.randint(10, (n,))
    dls = DataLoaders(ArrayLoader(x, y, bs=args.bs), ArrayLoader(x[:args.bs], y[:args.bs], bs=args.bs))
    net = torchvision.models.resnet18(num_classes=10)
    times = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repetitions):
            order = list(WAYS.items())
            for name, how in order[i % len(order):] + order[:i % len(order)]: # each way comes first once
                times[name].append(seconds_a_step(net, dls, Path(folder)/f'{i}-{name}', how))
    rows = []
    for name, found in times.items():
        shares = sorted(t / t0 - 1 for t, t0 in zip(found, times['no tracking']))
        rows.append(dict(name=name, median=median(found), overhead=median(shares), low=shares[0], high=shares[-1]))
        print(f'{name:26} {1e3*rows[-1]["median"]:8.1f} ms a step, {100*rows[-1]["overhead"]:+6.2f} % '
              f'({100*shares[0]:+.2f} to {100*shares[-1]:+.2f})')
    store('training_tracking', rows, repetitions=args.repetitions, bs=args.bs, n_steps=args.steps, seed=0)


if __name__ == '__main__': main()
