"""How to make a small EfficientNet larger, and what its gates are worth, on `fashion-mini`.

`scaling` spends about four times the multiply-adds of a small network on depth, on width, on resolution, or on all three; `squeeze` takes
the gates away; three seeds each. The chapter *EfficientNet* reads `benchmarks/results/vision_scaling.json` and `vision_squeeze.json`."""
import argparse, math, time

import torch
from torch import nn

from common import spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision.classics import multiply_adds
from dlfund.vision.efficientnet import SqueezeExcitation, compound, efficientnet_mini

SEEDS, EPOCHS = (0, 1, 2), 4
BASE = dict(width=1.0, depth=1.0, side=14)


class Resized(nn.Module):
    "A network behind a change of the pictures' size."
    def __init__(self, net, side):
        super().__init__()
        self.net, self.side = net, side
    def forward(self, x):
        if x.shape[-1] != self.side:
            x = nn.functional.interpolate(x, size=(self.side, self.side), mode='bilinear', antialias=True)
        return self.net(x)


def without_gates(net):
    "Replace every squeeze and excitation by nothing."
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcitation): setattr(module, name, nn.Identity())
    return net


def make(width, depth, side, gates=True):
    "A network for pictures of `side` pixels."
    net = efficientnet_mini(10, width=width, depth=depth)
    return Resized(net if gates else without_gates(net), side)


def size(**sizes):
    "Multiply-adds and parameters."
    with torch.device('meta'): model = make(**sizes)
    return multiply_adds(model, (1, sizes['side'], sizes['side'])), sum(p.numel() for p in model.parameters())


def nearest(options, target, which):
    "The sizes whose multiply-adds (`which` 0) or parameters (1) are nearest to the target."
    return min(options, key=lambda sizes: abs(math.log(size(**sizes)[which] / target)))


def run(fashion, sizes, seed):
    "Train once; return the last row of the log and the seconds."
    dls = loaders(fashion, fit_preprocess(fashion.train.x), bs=128, augment=True)
    seed_everything(seed, dls)
    config = TrainConfig(epochs=EPOCHS, lr=0.006, seed=seed)
    learn = make_learner(dls, make(**sizes), config, log=EpochLogCallback(lambda line: None))
    begin = time.perf_counter()
    learn.fit_one_cycle(config.epochs, config.lr)
    return learn.epoch_log.history[-1], time.perf_counter() - begin


def compare(fashion, ways):
    "Train every network with every seed; the seeds take turns, so that a busy minute hits all networks alike."
    rows = {name: dict(sizes, accuracy=[], train_loss=[], seconds=[],
                       **dict(zip(('multiply_adds', 'parameters'), size(**sizes)))) for name, sizes in ways.items()}
    for seed in SEEDS:
        for name, sizes in ways.items():
            last, seconds = run(fashion, sizes, seed)
            rows[name]['accuracy'].append(last['accuracy'])
            rows[name]['train_loss'].append(last['train_loss'])
            rows[name]['seconds'].append(seconds)
            print(f"seed {seed}  {name:28} validation accuracy {last['accuracy']:.4f}  {seconds:.1f} s", flush=True)
    for name, row in rows.items():
        print(f"{name:28} {row['multiply_adds']/1e6:6.2f} million multiply-adds, {row['parameters']:7,} parameters  "
              f"validation accuracy {spread(row['accuracy'])}  seconds {spread(row['seconds'])}", flush=True)
    return rows


def scaling(fashion):
    "Spend the multiply-adds that twice the resolution would cost in five ways."
    target = size(**BASE | dict(side=28))[0]
    together = [dict(depth=d, width=w, side=round(r * BASE['side']) + pixel) for d, w, r in
                (compound(phi / 20) for phi in range(20, 80)) for pixel in (-1, 0, 1)] # rounded by hand, as the published sizes
    return compare(fashion, {
        'baseline': BASE, 'depth': nearest([BASE | dict(depth=d / 4) for d in range(4, 33)], target, 0),
        'width': nearest([BASE | dict(width=w / 20) for w in range(20, 80)], target, 0),
        'resolution': BASE | dict(side=28), 'all three': nearest(together, target, 0)})


def squeeze(fashion):
    "Take the gates away, and give what they cost to the width."
    full = BASE | dict(side=28)
    wider = nearest([full | dict(width=w / 50, gates=False) for w in range(50, 100)], size(**full)[1], 1)
    return compare(fashion, {'with gates': full, 'without gates': full | dict(gates=False),
                             'without gates, but wider': wider})


def main(argv=None):
    "Run the experiments, and store each."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', choices=('scaling', 'squeeze'), help='one of the two')
    only, fashion = parser.parse_args(argv).only, load('fashion-mini')
    for part in [only] if only else ('scaling', 'squeeze'):
        print(store(f'vision_{part}', dict(scaling=scaling, squeeze=squeeze)[part](fashion), seeds=SEEDS, epochs=EPOCHS,
                    data=fashion.sha256))


if __name__ == '__main__': main()
