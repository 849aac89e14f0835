"""Make the weights that the chapter *Transfer learning* lends out: the book's small ResNet, trained on CIFAR-10 in colour.

Half of the training pictures lose their colour, so that the network is at home with grey pictures too; all are cropped to 28 pixels. What comes out is a bundle in
`dlfund/vision/pretrained/`, float16, which `dlfund.vision.transfer.pretrained` and `dlfund.deployment.bundle.Bundle.load` both open. The test part is read once.
Needs CIFAR-10 (`dlfund data get cifar10`, or a copy below `$DLFUND_DATA`) and about eight minutes on one core."""
import argparse, copy, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders
import fastai.callback.schedule # adds Learner.fit_one_cycle

from common import store
from dlfund.data.datasets import load
from dlfund.data.loading import ArrayLoader, seed_everything
from dlfund.data.preprocessing import ImagePreprocess
from dlfund.deployment.bundle import Bundle
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import predict_all
from dlfund.training.runs import make_learner
from dlfund.vision import build

SIDE, NAME = 28, 'resnet-mini-cifar10'
LUMA = torch.tensor([0.299, 0.587, 0.114]) # of red, green and blue: ITU-R BT.601, as Pillow's mode L


def to_grey(x):
    "Three equal channels in place of the colours."
    return (x.float() @ LUMA).round().to(torch.uint8)[..., None].expand_as(x)


def crop(x, rows, columns):
    "Cut a window out of each picture; it is mirrored where the columns fall."
    at = torch.arange(len(x))[:, None, None]
    return x[at, (rows + torch.arange(SIDE))[:, :, None], columns[:, None, :]]


def middle(x):
    "The centre of each picture."
    a = (x.shape[1] - SIDE) // 2
    return x[:, a:a + SIDE, a:a + SIDE]


def augment(x):
    "A random window, mirrored or not, with or without its colours."
    b, slack = len(x), x.shape[1] - SIDE + 1
    columns = torch.randint(slack, (b, 1)) + torch.arange(SIDE)
    columns = torch.where(torch.rand(b, 1) < 0.5, columns.flip(1), columns)
    x = crop(x, torch.randint(slack, (b, 1)), columns)
    return torch.where(torch.rand(b, 1, 1, 1) < 0.5, to_grey(x), x)


def preprocessing(pictures):
    "One mean and one standard deviation for all channels, so that grey stays grey."
    counts = np.bincount(pictures.reshape(-1), minlength=256)
    levels = np.arange(256) / 255
    mean = float(np.average(levels, weights=counts))
    std = float(np.average((levels - mean)**2, weights=counts) ** 0.5)
    return ImagePreprocess(size=(SIDE, SIDE), n_channels=3, mean=[mean]*3, std=[std]*3)


def tensors(part): return torch.from_numpy(np.ascontiguousarray(part.x)), torch.from_numpy(part.y.astype(np.int64))


def measure(model, part, prepare):
    "Accuracy and cross-entropy on a part."
    with torch.inference_mode(): logits, y = predict_all(model, ArrayLoader(*tensors(part), bs=500, transform=prepare))
    return dict(accuracy=(logits.argmax(-1) == y).double().mean().item(),
                cross_entropy=torch.nn.functional.cross_entropy(logits, y).item(), n=len(y))


def main(argv=None):
    "Train, measure, save."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=26)
    parser.add_argument('--lr', type=float, default=0.006)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--root', help='data folder; by default $DLFUND_DATA')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'dlfund'/'vision'/'pretrained')
    parser.add_argument('--quick', action='store_true', help='one epoch, and nothing is kept')
    args = parser.parse_args(argv)
    begin, cifar = time.perf_counter(), load('cifar10', root=args.root)
    preprocess = preprocessing(cifar.train.x)
    dls = DataLoaders(ArrayLoader(*tensors(cifar.train), bs=128, transform=lambda x: preprocess(augment(x)), shuffle=True, drop_last=True),
                      ArrayLoader(*tensors(cifar.valid), bs=500, transform=lambda x: preprocess(middle(x))))
    seed_everything(args.seed, dls)
    config = TrainConfig(epochs=1 if args.quick else args.epochs, lr=args.lr, seed=args.seed, precision='bf16', label_smoothing=0.0)
    architecture = dict(name='resnet-mini', n_classes=10, n_channels=3)
    learn = make_learner(dls, build(**architecture), config)
    learn.fit_one_cycle(config.epochs, config.lr)
    half = copy.deepcopy(learn.model).eval().half()
    kept = copy.deepcopy(half).float() # what is stored is what is measured
    parts = dict(valid=cifar.valid) if args.quick else dict(valid=cifar.valid, test=cifar.test)
    metrics = {name: measure(kept, part, lambda x: preprocess(middle(x))) for name, part in parts.items()}
    metrics['valid, grey'] = measure(kept, cifar.valid, lambda x: preprocess(to_grey(middle(x))))
    for name, found in metrics.items(): print(f"{name:12} accuracy {found['accuracy']:.4f}, cross-entropy {found['cross_entropy']:.4f}", flush=True)
    if args.quick: return
    data = dict(name=cifar.name, sha256=cifar.sha256, licence=cifar.licence, source=cifar.source, n_test_reads=cifar.n_test_reads)
    bundle = Bundle(model=half, architecture=architecture, labels=cifar.labels, preprocess=preprocess, metrics=metrics, data=data,
                    training=asdict(config) | dict(augmentation='window of 28 of 32 pixels, mirrored; half of the pictures without colour'))
    place = bundle.save(args.out/NAME)
    print(place, f'{sum(f.stat().st_size for f in place.iterdir()):,} bytes')
    print(store('vision_pretrain', metrics, data=cifar.sha256, seed=args.seed, epochs=args.epochs, lr=args.lr,
                seconds=time.perf_counter() - begin, history=learn.epoch_log.history))


if __name__ == '__main__': main()
