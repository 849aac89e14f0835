"""Make the two networks that the page of *Pages for strangers* runs in a reader's browser: one for digits, one for garments.

The digits are scikit-learn's 1,797 of 8×8 pixels, parted here 1,197 / 300 / 300. The garments are fashion-mini, half of them turned into drawings by `dlfund.deployment.pages.sketches`,
anew every epoch. What comes out is two bundles in `dlfund/deployment/pretrained/`, float16. Each test part is read once. About a minute on one core."""
import argparse, copy, hashlib, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders
from sklearn.datasets import load_digits
import fastai.callback.schedule # adds Learner.fit_one_cycle

from common import store
from dlfund.data.augment import affine_matrix, warp
from dlfund.data.datasets import Split, load, stratified_split
from dlfund.data.loading import ArrayLoader, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.deployment.bundle import Bundle
from dlfund.deployment.pages import Drawing, draw_strokes, sketches, stored_strokes
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision import build

DIGITS = Drawing(size=(8, 8), cells=4, box=(32, 24), pens=tuple(float(p) for p in np.arange(2, 9.5, 0.5)), ink=300)
GARMENTS = Drawing(size=(28, 28), cells=8, box=(224, 224), pens=(14.0,), inside=160)


def digits():
    "Parts of scikit-learn's digits as bytes, and where they are from."
    found = load_digits()
    x, y = np.floor(found.images * 255 / 16 + 0.5).astype(np.uint8), found.target.astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(x))
    parts = {name: Split(x=x[rows], y=y[rows]) for name, rows in zip(('train', 'valid', 'test'), np.split(order, [1197, 1497]))}
    data = dict(name='digits', sha256=hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest(), licence='CC BY 4.0',
                source='Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak 1998, as in scikit-learn', n_test_reads=1)
    return parts, [str(i) for i in range(10)], data


def garments():
    "Parts of fashion-mini, and where they are from."
    found = load('fashion-mini')
    data = dict(name=found.name, sha256=found.sha256, licence=found.licence, source=found.source, n_test_reads=1)
    return dict(train=found.train, valid=found.valid, test=found.test), found.labels, data


def wobble(x, angle, shear, scale, shift):
    "Turn, slant, stretch and move each picture of a batch at random, up to these limits."
    between = lambda limit, *shape: (2*torch.rand(len(x), *shape) - 1) * limit
    matrix = affine_matrix(x.shape[1:], angle=between(angle), shear=torch.stack([between(shear), 0*between(shear)], -1),
                           scale=1 - scale*torch.rand(len(x)), translate=between(shift, 2))
    return warp(x[:, None], matrix)[:, 0]


def half_drawn(x):
    "Half of a batch as drawings, mirrored or not, wobbled."
    drawn = torch.from_numpy(sketches(x.numpy()))
    x = torch.where(torch.rand(len(x), 1, 1) < 0.6, drawn, x)
    x = torch.where(torch.rand(len(x), 1, 1) < 0.5, x.flip(2), x)
    return wobble(x, angle=8, shear=6, scale=0.12, shift=1.5)


def train(parts, architecture, config, augment, bs):
    "Train a network; what comes back is what will be stored: float16, as float32."
    preprocess = fit_preprocess(parts['train'].x)
    tensors = lambda part: (torch.from_numpy(np.ascontiguousarray(part.x)), torch.from_numpy(part.y.astype(np.int64)))
    dls = DataLoaders(ArrayLoader(*tensors(parts['train']), bs=bs, transform=lambda x: preprocess(augment(x)), shuffle=True, drop_last=True),
                      ArrayLoader(*tensors(parts['valid']), bs=500, transform=preprocess))
    seed_everything(config.seed, dls)
    learn = make_learner(dls, build(**architecture), config, log=EpochLogCallback(lambda line: print(line, flush=True)))
    learn.fit_one_cycle(config.epochs, config.lr)
    return copy.deepcopy(learn.model).eval().half().float(), preprocess


def make(name, source, drawing, architecture, config, augment, out, quick, bs=128):
    "Train, measure and save one of the two."
    (parts, labels, data), begin = source(), time.perf_counter()
    model, preprocess = train(parts, architecture, config, augment, bs)
    bundle = Bundle(model=model, architecture=architecture, labels=labels, preprocess=preprocess, metrics={}, data=data,
                    training=asdict(config) | dict(drawing=asdict(drawing), seconds=round(time.perf_counter() - begin, 1)))
    measured = dict(valid=parts['valid']) if quick else dict(valid=parts['valid'], test=parts['test'])
    if source is garments:
        drawn = lambda part, seed: Split(x=sketches(part.x, generator=torch.Generator().manual_seed(seed)), y=part.y)
        measured |= {f'{part}, as drawings': drawn(measured[part], 1) for part in [*measured]}
    measured['our ten drawings'] = Split(x=np.stack([draw_strokes(stored_strokes(l), drawing) for l in labels]), y=np.arange(10, dtype=np.uint8))
    bundle.metrics = {part: bundle.evaluate(split) for part, split in measured.items()}
    for part, found in bundle.metrics.items():
        print(f"{name:18} {part:20} accuracy {found['accuracy']:.4f}, cross-entropy {found['cross_entropy']:.4f}, n {found['n']}", flush=True)
    print(*(f'{l}: {p.label} {p.probability:.2f}' for l, p in zip(labels, bundle.predict(measured['our ten drawings'].x))), sep='\n')
    if quick: return bundle.metrics
    bundle.model.half()
    place = bundle.save(out/name)
    print(place, f'{sum(f.stat().st_size for f in place.iterdir()):,} bytes')
    return bundle.metrics | dict(seconds=bundle.training['seconds'], sha256=data['sha256'])


def main(argv=None):
    "Make both."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, nargs=2, default=(40, 12), metavar=('DIGITS', 'GARMENTS'))
    parser.add_argument('--only', choices=('digits', 'garments'))
    parser.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'dlfund'/'deployment'/'pretrained')
    parser.add_argument('--quick', action='store_true', help='one epoch, and nothing is kept')
    args = parser.parse_args(argv)
    n_epochs = (1, 1) if args.quick else args.epochs
    small = lambda width: dict(name='resnet-mini', n_classes=10, n_channels=1, width=width)
    config = lambda n, lr: TrainConfig(epochs=n, lr=lr, seed=args.seed, label_smoothing=0.0)
    results = {}
    if args.only != 'garments':
        results['digits'] = make('digits-drawing', digits, DIGITS, small(0.5), config(n_epochs[0], 0.01),
                                 lambda x: wobble(x, angle=8, shear=15, scale=0.1, shift=0.6), args.out, args.quick, bs=48)
    if args.only != 'digits':
        results['garments'] = make('garments-drawing', garments, GARMENTS, small(0.5), config(n_epochs[1], 0.01), half_drawn, args.out, args.quick)
    if not args.quick and not args.only: print(store('deploy_drawing', results, seed=args.seed))


if __name__ == '__main__': main()
