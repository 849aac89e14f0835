"""How long a training pauses for a checkpoint of 100 MB: saved by `CheckpointCallback`, against pickling it where we stand."""
import argparse, os, tempfile, time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn

from common import store
from dlfund.data.loading import ArrayLoader
from dlfund.training.checkpoints import CheckpointCallback, checkpoint_files

EVERY = 8 # steps from one checkpoint to the next


class NaiveCallback(Callback):
    "What one writes first: pickle everything, in place, and wait for the disk."
    order = 1000
    def __init__(self, folder): self._file = Path(folder)/'naive.pt'
    def after_batch(self):
        if not self.training or self.train_iter % EVERY: return
        with open(self._file, 'wb') as f:
            torch.save(dict(model=self.model.state_dict(), opt=self.opt.state_dict()), f)
            f.flush()
            os.fsync(f.fileno())


class ClockCallback(Callback):
    "Note the time after every step."
    order = 2000
    def before_fit(self): self._times = [time.perf_counter()]
    def after_batch(self):
        if self.training: self._times.append(time.perf_counter())


def seconds_of_steps(
    how:str, # `none`, `naive` or `callback`
    folder:Path, # gets the checkpoints
    n_steps:int, # to train
)->list[float]:
    "Train a network of 8.7 million weights, and time every step."
    torch.manual_seed(0)
    width = 1024
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, 10))
    x, y = torch.randn(64 * n_steps, width), torch.randint(10, (64 * n_steps,))
    dls = DataLoaders(ArrayLoader(x, y, bs=64), ArrayLoader(x[:64], y[:64], bs=64))
    clock = ClockCallback()
    cbs = dict(none=[], naive=[NaiveCallback(folder)], callback=[CheckpointCallback(folder, seconds=0, steps=EVERY)])[how]
    learn = Learner(dls, net, nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True),
                    cbs=[clock, *cbs]).remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(1, 1e-4)
    return [b - a for a, b in zip(clock._times, clock._times[1:])]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', type=int, default=80, help='steps of each training')
    args = parser.parse_args(words)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for how in ('none', 'naive', 'callback'):
            (Path(folder)/how).mkdir()
            seconds = seconds_of_steps(how, Path(folder)/how, args.steps)
            saved = [s for i, s in enumerate(seconds, 1) if i % EVERY == 0][1:]
            others = [s for i, s in enumerate(seconds, 1) if i % EVERY][EVERY:]
            rows[how] = dict(step=median(others), with_save=median(saved), longest_pause=max(saved) - median(others),
                             median_pause=median(saved) - median(others), all_steps=sum(seconds))
        size = checkpoint_files(Path(folder)/'callback')[0].stat().st_size
    print(f'checkpoint of {size / 1e6:.0f} MB')
    for how, row in rows.items():
        print(f"{how:9} step {row['step']:.4f} s, pause {row['median_pause']:.3f} s (longest {row['longest_pause']:.3f}), "
              f"all {args.steps} steps {row['all_steps']:.2f} s, {row['all_steps'] / rows['none']['all_steps']:.2f} x")
    store('training_checkpoint', rows, checkpoint_bytes=size, n_steps=args.steps, every=EVERY, seed=0)


if __name__ == '__main__': main()
