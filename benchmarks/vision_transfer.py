"""What borrowed weights are worth: run with `labels digits near layers forgetting` after `--`, or with none for all.

`labels` trains on 5 to 900 labelled pictures a class of `fashion-mini`, from scratch and in four ways that start from CIFAR-10's weights; `digits` does the same with scikit-learn's
handwritten digits; `near` learns from five classes of CIFAR-10 to tell the other five apart; `layers` keeps only the first so many parts of the weights; `forgetting` asks what is left of CIFAR-10, along the way from the old weights to the new. Three seeds
each, of the draw, the head and the batches; judged on validation parts. The chapter *Transfer learning* reads `benchmarks/results/vision_transfer_*.json`."""
import argparse, copy, hashlib, json, time
from functools import partial

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
import fastai.callback.schedule # adds Learner.fit_one_cycle

from common import RESULTS, spread, store
from vision_pretrain import preprocessing
from dlfund.data.datasets import load
from dlfund.data.loading import ArrayLoader, seed_everything, shift_and_flip
from dlfund.training.learner import QuickLearner
from dlfund.training.precision import Precision
from dlfund.vision.transfer import (adapt_channels, cache_features, few_labels, fit_probe, freeze, interpolate, layers_by_depth, new_head,
                                    pretrained, split_by_depth)
from dlfund.vision import build

SEEDS, BS, STEPS = (0, 1, 2), 64, 150
RATES, DECAYS = (0.001, 0.003, 0.01), (10.0, 1.0, 0.1, 0.01)


def ready_for(preprocess, n_channels):
    "From bytes to inputs, with the mean and standard deviation of the weights, which are the same in every channel."
    def ready(x):
        x = (x[:, None] if x.ndim == 3 else x.movedim(-1, 1)).float() / 255
        return ((x - preprocess.mean[0]) / preprocess.std[0]).expand(-1, n_channels, -1, -1)
    return ready


def lend(n_channels):
    "The weights of the package, for pictures of so many channels."
    return lambda: adapt_channels(pretrained().model, n_channels)


def as_tensors(part): return torch.from_numpy(np.ascontiguousarray(part.x)), torch.from_numpy(part.y.astype(np.int64))


def fashion(n_channels=1):
    "Garments."
    data = load('fashion-mini')
    return dict(train=as_tensors(data.train), valid=as_tensors(data.valid), augment=shift_and_flip, sha256=data.sha256, n_classes=10,
                n_channels=n_channels, ready=ready_for(pretrained().preprocess, n_channels), lend=lend(n_channels))


def digits():
    "scikit-learn's digits of 8 × 8 pixels, enlarged to 20 and framed like MNIST's; digits are not mirrored."
    data = load_digits()
    x = F.interpolate(torch.from_numpy(data.images / 16 * 255)[:, None], size=(20, 20), mode='bilinear')
    x, y = F.pad(x, (4, 4, 4, 4)).round().clamp(0, 255).to(torch.uint8)[:, 0], torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return dict(train=(x[order[:1200]], y[order[:1200]]), valid=(x[order[1200:]], y[order[1200:]]), augment=noop, n_classes=10,
                n_channels=1, ready=ready_for(pretrained().preprocess, 1), lend=lend(1), sha256=hashlib.sha256(data.images.tobytes()).hexdigest())


def photographs(root):
    "CIFAR-10's classes of odd number, with weights that were learned here from those of even number."
    cifar = load('cifar10', root=root)
    def half(part, rest, n):
        x, y = as_tensors(part)
        keep = (y % 2 == rest).nonzero()[:n, 0]
        return x[keep, 2:30, 2:30], y[keep] // 2
    preprocess = preprocessing(cifar.train.x)
    ready, (x, y) = ready_for(preprocess, 3), half(cifar.train, 0, 10**6)
    target = dict(train=half(cifar.train, 1, 10**6), valid=half(cifar.valid, 1, 1500), augment=shift_and_flip, n_classes=5, n_channels=3,
                  ready=ready, sha256=cifar.sha256)
    seed_everything(0)
    source = dict(target, train=(x, y), valid=half(cifar.valid, 0, 1500))
    model = build('resnet-mini', 5, 3)
    print('the source:', tune(model, torch.arange(len(x)), source, 10*len(x)//128, 0.006, bs=128, precision='bf16'), flush=True)
    return target | dict(lend=lambda: copy.deepcopy(model))


def make_learn(model, rows, target, n_steps, bs=BS, precision='fp32'):
    "A learner whose epoch has `n_steps` batches, however few the examples are."
    (x, y), bs = target['train'], min(bs, len(rows))
    times = -(-n_steps * bs // len(rows))
    order = torch.cat([rows[torch.randperm(len(rows))] for _ in range(times)])[:n_steps * bs]
    train = ArrayLoader(x[order], y[order], bs=bs, transform=lambda b: target['ready'](target['augment'](b)))
    dls = DataLoaders(train, ArrayLoader(*target['valid'], bs=500, transform=target['ready']))
    learn = QuickLearner(dls, model.to(memory_format=torch.channels_last), nn.CrossEntropyLoss(), metrics=accuracy, wd=0.05,
                         splitter=split_by_depth, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True),
                         cbs=[Precision(precision)] if precision != 'fp32' else [])
    learn.logger = noop
    learn.remove_cb(ProgressCallback)
    return learn


def score(model, target):
    "Accuracy on the validation part."
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(target['ready'](x)).argmax(-1) == y for x, y in zip(*(t.split(500) for t in target['valid']))]).float().mean().item()


def tune(model, rows, target, n_steps, lr, stages=(0,), **args):
    "Train, in as many stages as there are numbers of frozen groups; return the accuracy."
    for n_frozen in stages:
        learn = make_learn(model, rows, target, n_steps // len(stages), **args)
        learn.freeze_to(n_frozen)
        learn.fit_one_cycle(1, lr)
    return score(learn.model, target)


def best_decay(make, n, target):
    "The decay that suits a probe with so many labels a class, on a draw that is not used again."
    def judge(decay):
        seed_everything(100)
        return make(few_labels(target['train'][1], n), decay)
    with torch.random.fork_rng(): return max(DECAYS, key=judge)


def probe_head(model, rows, target, decay=0.1):
    "Give a network the head of a linear probe."
    x, y = (t[rows] for t in target['train'])
    features, y = cache_features(model, [(target['ready'](b), c) for b, c in zip(x.split(500), y.split(500))])
    model.fc = fit_probe(features, y, target['n_classes'], decay)
    return model


def probed(make, target):
    "Accuracy of a linear probe on what `make` makes, its decay chosen for the number of labels."
    judge, chosen = lambda rows, decay: score(probe_head(make(), rows, target, decay), target), {}
    def run(rows, n_steps):
        seed, n = torch.random.initial_seed(), len(rows) // target['n_classes']
        if n not in chosen: chosen[n] = best_decay(judge, n, target)
        seed_everything(seed)
        return judge(rows, chosen[n])
    return run


def flat_net(target):
    "A network whose features are the pixels."
    model = nn.Sequential()
    model.add_module('flat', nn.Flatten())
    model.add_module('fc', nn.Linear(28*28*target['n_channels'], target['n_classes']))
    return model


def ways(lr, target):
    "Every way to train: a function of rows and a number of steps."
    fresh = lambda: build('resnet-mini', target['n_classes'], target['n_channels'])
    lent = lambda: new_head(target['lend'](), target['n_classes'])
    spread_out = lambda: slice(lr['discriminative']/30, lr['discriminative'])
    return {'pixels': probed(lambda: flat_net(target), target), 'random features': probed(fresh, target),
            'scratch': lambda rows, n_steps: tune(fresh(), rows, target, n_steps, lr['scratch']),
            'linear probe': probed(lent, target),
            'one rate': lambda rows, n_steps: tune(lent(), rows, target, n_steps, lr['one rate']),
            'discriminative': lambda rows, n_steps: tune(lent(), rows, target, n_steps, spread_out()),
            'gradual': lambda rows, n_steps: tune(lent(), rows, target, n_steps, spread_out(), stages=(-1, -2, 0))}


def choose(target):
    "The best learning rate of each way, at 20 labels a class, on a draw that is not used again."
    best = {}
    for name in ('scratch', 'one rate', 'discriminative'):
        found = {}
        for rate in RATES:
            seed_everything(100)
            rows = few_labels(target['train'][1], 20)
            found[rate] = ways({name: rate}, target)[name](rows, STEPS)
        best[name] = max(found, key=found.get)
        print(f'{name}: {found}', flush=True)
    return best


def by_labels(name, target, sizes, add=False, only=()):
    "Every way at every number of labels, the main three where labels are many; kept after each number, or added to what is kept."
    if add:
        kept = json.loads((RESULTS/f'vision_transfer_{name}.json').read_text())
        lr, found = kept['lr'], kept['results']
    else: lr, found = choose(target), {}
    every = ways(lr, target)
    for n in sizes:
        for way, f in every.items():
            if (n > 100 and way not in ('scratch', 'one rate', 'discriminative')) or (only and way not in only): continue
            row = found.setdefault(way, {})[str(n)] = dict(accuracy=[], seconds=[])
            for seed in SEEDS:
                seed_everything(seed)
                rows, begin = few_labels(target['train'][1], n), time.perf_counter()
                row['accuracy'].append(f(rows, STEPS if n <= 100 else 4*STEPS))
                row['seconds'].append(time.perf_counter() - begin)
            print(f"{name} {n:4} labels a class, {way:16} {spread(row['accuracy'])}  {np.mean(row['seconds']):.1f} s", flush=True)
        place = store(f'vision_transfer_{name}', found, data=target['sha256'], seeds=SEEDS, lr=lr, steps=STEPS, bs=BS)
    print(place)


def layers():
    "Keep the first k parts of the weights, frozen or not, and draw the rest anew."
    target, found = fashion(), []
    for n_kept in range(6):
        for frozen in ((False, True) if n_kept else (False,)):
            accuracies = []
            for seed in SEEDS:
                seed_everything(seed)
                rows, model, lent = few_labels(target['train'][1], 20), build('resnet-mini', 10, 1), target['lend']()
                for ours, theirs in list(zip(layers_by_depth(model), layers_by_depth(lent)))[:n_kept]:
                    for a, b in zip(ours, theirs): a.load_state_dict(b.state_dict())
                if frozen: freeze(model, n_kept, n_groups=6)
                learn = make_learn(model, rows, target, STEPS)
                learn.fit_one_cycle(1, 0.003)
                accuracies.append(score(learn.model, target))
            found.append(dict(n_kept=n_kept, frozen=frozen, accuracy=accuracies))
            print(f'first {n_kept} parts kept, frozen {frozen}: {spread(accuracies)}', flush=True)
            place = store('vision_transfer_layers', found, data=target['sha256'], seeds=SEEDS, lr=0.003, n_labels=20, steps=STEPS)
    print(place)


def forgetting(root):
    "Accuracy on both tasks, on the straight line from the old weights to the new."
    cifar, target, found, lent = load('cifar10', root=root), fashion(3), [], pretrained()
    x, y = as_tensors(cifar.valid)
    inputs, y = lent.preprocess(x[:2000, 2:30, 2:30]), y[:2000]
    def both(state):
        model = build('resnet-mini', 10, 3)
        model.load_state_dict(state)
        there = score(model, target)
        model.fc = lent.model.fc
        with torch.inference_mode(): here = (model.eval()(inputs).argmax(-1) == y).float().mean().item()
        return dict(fashion=there, cifar=here)
    for way, lr in {'one rate': 0.003, 'discriminative': slice(0.003/30, 0.003)}.items():
        for seed in SEEDS:
            seed_everything(seed)
            rows = few_labels(target['train'][1], 100)
            model = probe_head(copy.deepcopy(lent.model), rows, target)
            start = copy.deepcopy(model.state_dict())
            tune(model, rows, target, STEPS, lr)
            line = [dict(alpha=i/10) | both(interpolate(start, model.state_dict(), i/10)) for i in range(11)]
            found.append(dict(way=way, seed=seed, line=line))
            print(way, seed, *[f"{p['alpha']:.1f}: {p['fashion']:.3f} {p['cifar']:.3f}" for p in line[::5]], flush=True)
            place = store('vision_transfer_forgetting', found, data=[target['sha256'], cifar.sha256], seeds=SEEDS, n_labels=100, steps=STEPS)
    print(place)


def main(argv=None):
    "Run the parts that are asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ('labels', 'digits', 'near', 'layers', 'forgetting')
    parser.add_argument('parts', nargs='*', default=parts, help=', '.join(parts))
    parser.add_argument('--sizes', type=int, nargs='+', default=[5, 10, 20, 50, 100, 900], help='labels a class, for `labels`')
    parser.add_argument('--add', action='store_true', help='add to the stored results, with their learning rates')
    parser.add_argument('--ways', nargs='+', default=(), help='measure only these')
    parser.add_argument('--root', help='data folder; by default $DLFUND_DATA')
    args = parser.parse_args(argv)
    if wrong := set(args.parts) - set(parts): parser.error(f'unknown part: {", ".join(sorted(wrong))}')
    if 'labels' in args.parts: by_labels('labels', fashion(), args.sizes, args.add, args.ways)
    if 'digits' in args.parts: by_labels('digits', digits(), [5, 20, 100], args.add, args.ways)
    if 'near' in args.parts: by_labels('near', photographs(args.root), [5, 20, 100], args.add, args.ways)
    if 'layers' in args.parts: layers()
    if 'forgetting' in args.parts: forgetting(args.root)


if __name__ == '__main__': main()
