"""What tracking costs a ResNet-18 on 32×32 pictures: `TrackingCallback` with `LocalTracker`, against no tracking.

Wall-clock time needs a quiet machine; so the share of processor time that is spent in the
callback's own events and in the tracker's thread is told beside it: it hardly depends on what else the machine does."""
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


class TimedCallback(TrackingCallback):
    "Count the processor seconds spent in the events of `TrackingCallback`."
    spent = 0.0


def timed(name):
    "An event that is timed."
    def event(self, *args):
        begin = time.thread_time()
        try: return getattr(TrackingCallback, name)(self, *args)
        finally: TimedCallback.spent += time.thread_time() - begin
    return event


for name in ('before_batch', '_watch', 'after_pred', 'before_step', 'after_batch'): setattr(TimedCallback, name, timed(name))


class ClockCallback(Callback):
    "Note after every step: the time, this thread's and the process's processor time, and the seconds spent in tracking."
    order = 2000
    def before_fit(self): self._times = [self.now()]
    def now(self): return time.perf_counter(), time.thread_time(), time.process_time(), TimedCallback.spent
    def after_batch(self):
        if self.training: self._times.append(self.now())


def seconds_a_step(
    net:nn.Module, # to train
    dls:DataLoaders, # batches
    folder:Path, # gets the numbers
    how:dict|None, # arguments of `TrackingCallback`, or `None` for no tracking
)->tuple[float, float]: # mean wall-clock seconds, and the share of processor time that is tracking, after ten steps
    "Train an epoch, and time it."
    clock = ClockCallback()
    cbs = [clock] + ([] if how is None else [TimedCallback([LocalTracker(folder)], **how)])
    learn = Learner(dls, net, nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=cbs)
    learn.logger = noop
    learn.remove_cb(ProgressCallback).fit(1, 1e-4)
    wall, thread, process, spent = (end - begin for begin, end in zip(clock._times[10], clock._times[-1]))
    return wall / (len(clock._times) - 11), (spent + process - thread) / (thread - spent)


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
        wall, share = sorted(t / t0 - 1 for (t, _), (t0, _) in zip(found, times['no tracking'])), sorted(s for _, s in found)
        rows.append(dict(name=name, median=median(t for t, _ in found), overhead=median(wall), low=wall[0], high=wall[-1],
                         share=median(share), share_low=share[0], share_high=share[-1]))
        print('{name:26} {0:8.1f} ms a step, wall {1:+6.2f} % ({2:+.2f} to {3:+.2f}), tracking {4:5.2f} % ({5:.2f} to {6:.2f})'
              .format(1e3*rows[-1]['median'], *(100*v for v in list(rows[-1].values())[2:]), name=name))
    store('training_tracking', rows, repetitions=args.repetitions, bs=args.bs, n_steps=args.steps, seed=0)


if __name__ == '__main__': main()
