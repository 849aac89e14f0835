"""What the engine adds to a loop: `python benchmarks/training.py loop`.

The same AdamW (fused), the same preloaded batches, a tiny MLP and ResNet-18 on 32×32: a hand-written loop, fastai's `Learner` alone and with our
default callbacks, `QuickLearner` with them, and PyTorch Lightning if it can be imported. One process, in turn, many repetitions, in CPU time on one thread
(nothing waits here, so on an idle machine it is the time on the clock); medians of the ratio of each engine to the loop in the same turn. `--quick` makes three short turns."""
import argparse, logging, time, warnings
from functools import partial

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn
from torchvision.models import resnet18

from common import store
from dlfund.training.learner import EpochLogCallback, QuickLearner, StopOnNaN

LOSS = nn.CrossEntropyLoss()
ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def mlp(): return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def by_hand(model, batches):
    "Seconds of an epoch of the loop; nothing is recorded."
    opt, begin = ADAMW(model.parameters()), time.process_time()
    for x, y in batches:
        LOSS(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return time.process_time() - begin


def fastai(model, batches, engine=Learner, ours=False):
    "Seconds of an epoch of a `Learner` with the 1cycle schedule."
    cbs = [StopOnNaN(), EpochLogCallback(noop)] if ours else []
    (x, y), = batches[:1]
    dls = DataLoaders(batches, [(x[:2], y[:2])], device='cpu') # two examples: the loop does not validate at all
    learn = engine(dls, model, LOSS, opt_func=partial(OptimWrapper, opt=ADAMW), cbs=cbs)
    learn.logger = noop
    learn.remove_cb(ProgressCallback)
    begin = time.process_time()
    learn.fit_one_cycle(1, 1e-3)
    return time.process_time() - begin


def lightning():
    "A function that measures Lightning, or `None` if it is not installed."
    try: import pytorch_lightning as pl
    except ImportError: return None
    logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='pytorch_lightning')
    class Module(pl.LightningModule):
        def __init__(self, model): super().__init__(); self.model = model
        def training_step(self, batch, i): return LOSS(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return ADAMW(self.parameters())
        def on_train_start(self): self.begin = time.process_time()
        def on_train_end(self): self.seconds = time.process_time() - self.begin
    def measure(model, batches):
        module = Module(model)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                   accelerator='cpu', barebones=False).fit(module, loader)
        return module.seconds
    return measure


def main()->None:
    "Measure, print and store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='three short turns')
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    engines = {'loop by hand': by_hand, 'fastai Learner': fastai, 'Learner + our callbacks': partial(fastai, ours=True),
               'QuickLearner + our callbacks': partial(fastai, engine=QuickLearner, ours=True), 'Lightning': lightning()}
    if engines['Lightning'] is None: print('pytorch_lightning cannot be imported: left out'); del engines['Lightning']
    settings = {'MLP': (mlp, (64, 32), 100 if quick else 400), 'ResNet-18': (lambda: resnet18(num_classes=10), (32, 3, 32, 32), 2 if quick else 4)}
    repetitions, results = 3 if quick else 9, []
    for name, (make, shape, n) in settings.items():
        torch.manual_seed(0)
        batches = [(torch.randn(shape), torch.randint(0, 10, shape[:1])) for _ in range(n)]
        for engine in engines.values(): engine(make(), batches[:2]) # the first time of anything is slow
        turns = [{engine: measure(make(), batches) for engine, measure in engines.items()} for _ in range(repetitions)]
        for engine in engines:
            ratio = np.quantile([turn[engine] / turn['loop by hand'] for turn in turns], (0.25, 0.5, 0.75)).tolist()
            us = 1e6 * float(np.median([turn[engine] for turn in turns])) / n
            print(f'{name:10} {engine:30} {us:9.0f} µs a batch  {ratio[1]:5.2f} × the loop by hand ({ratio[0]:.2f} to {ratio[2]:.2f})', flush=True)
            results.append(dict(model=name, engine=engine, us=us, ratio=ratio))
    print(store('training_loop', results, repetitions=repetitions, threads=torch.get_num_threads(), seeds=[0], quick=quick))


if __name__ == '__main__': main()
