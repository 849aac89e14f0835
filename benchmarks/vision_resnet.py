"""What each part of the residual network and of its recipe is worth, on `fashion-mini`.

`depth` stacks more and more blocks, with and without shortcuts; `ablation` takes one thing at a time away from the main job; `preact` trains the
deepest of `depth` with pre-activation blocks, and with the last gamma of every block at zero; three seeds each. The chapter *Residual
networks* reads `benchmarks/results/vision_resnet_<part>.json`."""
import argparse
from dataclasses import replace

import torch
from torch import nn

from common import spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision.resnet import BasicBlock, PreActResNet, ResNet, resnet_mini, zero_last_gamma

SEEDS = (0, 1, 2)


class PlainBlock(BasicBlock):
    "The same two convolutions, without the shortcut."
    def forward(self, x): return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def without_shortcuts(model):
    "Turn every residual block into a plain one that keeps its weights."
    for module in model.modules():
        if isinstance(module, BasicBlock): module.__class__, module.downsample = PlainBlock, None
    return model


def without_batchnorm(model):
    "Replace every batch normalization by nothing."
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d): setattr(module, name, nn.Identity())
    return model


def run(fashion, make_model, config, augment=True, one_cycle=True):
    "Train once; return the rows of the log, and the accuracy on the validation part."
    preprocess = fit_preprocess(fashion.train.x)
    dls = loaders(fashion, preprocess, bs=128, augment=augment)
    seed_everything(config.seed, dls)
    learn = make_learner(dls, make_model(), config, log=EpochLogCallback(lambda line: None))
    fit = learn.fit_one_cycle if one_cycle else learn.fit
    fit(config.epochs, config.lr)
    return learn.epoch_log.history


def gradient_at_stem(fashion, make_model):
    "Norm of the loss's gradient at the first convolution, at initialization."
    torch.manual_seed(0)
    model, x = make_model(), fit_preprocess(fashion.train.x)(torch.from_numpy(fashion.train.x[:256]))
    nn.functional.cross_entropy(model(x), torch.from_numpy(fashion.train.y[:256].astype('int64'))).backward()
    return model.conv1.weight.grad.norm().item()


def ablation(fashion):
    "Take one thing away at a time."
    config = TrainConfig()
    changes = {
        'the main job': {}, 'no shortcuts': dict(model=lambda: without_shortcuts(resnet_mini(10))),
        'no batch normalization': dict(model=lambda: without_batchnorm(resnet_mini(10)), config=replace(config, lr=0.001)),
        'no augmentation': dict(augment=False), 'no label smoothing': dict(config=replace(config, label_smoothing=0.0)),
        'constant learning rate': dict(one_cycle=False, config=replace(config, lr=0.001))}
    rows = {}
    for name, change in changes.items():
        settings = {'model': lambda: resnet_mini(10), 'config': config, **change}
        make_model, base = settings.pop('model'), settings.pop('config')
        histories = [run(fashion, make_model, replace(base, seed=seed), **settings) for seed in SEEDS]
        rows[name] = dict(accuracy=[h[-1]['accuracy'] for h in histories], train_loss=[h[-1]['train_loss'] for h in histories])
        print(f"{name:24} validation accuracy {spread(rows[name]['accuracy'])}", flush=True)
    return rows


def depth(fashion):
    "Stack more blocks, with and without shortcuts, at the same width and for the same few epochs."
    rows = []
    for n in (1, 2, 4, 8):
        for shortcuts in (True, False):
            def make_model():
                net = ResNet(10, n_channels=1, widths=(8, 16, 32, 64), n_blocks=(n, n, n, n))
                return net if shortcuts else without_shortcuts(net)
            histories = [run(fashion, make_model, TrainConfig(epochs=3, lr=0.003, seed=seed)) for seed in SEEDS]
            rows.append(dict(layers=2 + 8*n, shortcuts=shortcuts, accuracy=[h[-1]['accuracy'] for h in histories],
                             train_loss=[h[-1]['train_loss'] for h in histories], gradient=gradient_at_stem(fashion, make_model)))
            print(f"{2 + 8*n:3} layers, shortcuts {shortcuts!s:5}  training loss {spread(rows[-1]['train_loss'])}  "
                  f"validation accuracy {spread(rows[-1]['accuracy'])}  first gradient {rows[-1]['gradient']:.3g}", flush=True)
    return rows


def preact(fashion):
    "The deep networks of `depth` with two changes to their blocks."
    rows = []
    for n in (4, 8):
        sizes = dict(n_channels=1, widths=(8, 16, 32, 64), n_blocks=(n, n, n, n))
        kinds = {'last gamma 0': lambda: zero_last_gamma(ResNet(10, **sizes)), 'PreActBlock': lambda: PreActResNet(10, **sizes)}
        for kind, make_model in kinds.items():
            histories = [run(fashion, make_model, TrainConfig(epochs=3, lr=0.003, seed=seed)) for seed in SEEDS]
            rows.append(dict(layers=2 + 8*n, kind=kind, accuracy=[h[-1]['accuracy'] for h in histories],
                             train_loss=[h[-1]['train_loss'] for h in histories]))
            print(f"{2 + 8*n:3} layers, {kind:14}  training loss {spread(rows[-1]['train_loss'])}  "
                  f"validation accuracy {spread(rows[-1]['accuracy'])}", flush=True)
    return rows


PARTS = dict(depth=depth, ablation=ablation, preact=preact)


def main():
    "Run the parts, and store each when it is done."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=PARTS, help='one part; by default all')
    only, fashion = parser.parse_args().only, load('fashion-mini')
    for part in [only] if only else PARTS: print(store(f'vision_resnet_{part}', PARTS[part](fashion), seeds=SEEDS, data=fashion.sha256))


if __name__ == '__main__': main()
