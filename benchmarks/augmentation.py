"""What augmentation is worth on `fashion-mini`, with 500 training pictures and with all of them: run without arguments.

One kind of augmentation at a time, and several together, three seeds each, with a small convolutional network and the same number
of updates for all. The chapter *Augmentation* reads `benchmarks/results/augmentation.json`; rows that are in it are not measured
again, so that an interrupted run can go on: delete the file to begin anew."""
import json, time

import numpy as np
import torch
from fastai.data.core import DataLoaders
from torch import nn
from torchvision.transforms import v2

from common import RESULTS, spread, store
from dlfund.data.augment import BatchTransform, MixCallback, cutmix, random_erasing
from dlfund.data.datasets import load, stratified_split
from dlfund.data.loading import ArrayLoader, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.foundations.regularization import mixup
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner

SEEDS, EPOCHS, LR, BS = (0, 1, 2), 4, 0.003, 128


def small_network():
    "Two convolutions and two linear layers: enough to learn 500 garments by heart."
    return nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(32*7*7, 128), nn.ReLU(), nn.Linear(128, 10))


def fade(x, q):
    "Mixup, for tensors."
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    return tuple(map(torch.from_numpy, mixup(x.numpy(), q.numpy(), 0.4, rng)))


def flip(x):
    "Mirror half of the pictures of a batch."
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def flip_and_erase(x):
    "Mirror half of the pictures and cover a part of half of them."
    return random_erasing(flip(x))


shift = v2.RandomCrop(28, padding=2)
crop = v2.RandomResizedCrop(28, scale=(0.6, 1.0), ratio=(0.9, 1.1), antialias=True)
colour = v2.ColorJitter(brightness=0.3, contrast=0.3)
# name: transform of a picture, function of a whole batch, mixture of a batch and its targets
KINDS = {'none': (None, None, None), 'flip': (None, flip, None), 'shift': (shift, None, None), 'crop': (crop, None, None),
         'colour': (colour, None, None), 'RandAugment': (v2.RandAugment(2, 9), None, None), 'erasing': (None, random_erasing, None),
         'mixup': (None, None, fade), 'CutMix': (None, None, cutmix),
         'all': (v2.Compose([crop, colour, v2.RandAugment(2, 9)]), flip_and_erase, cutmix)}


def run(fashion, kind, n_pictures, seed):
    "Train once; return accuracy and loss on the validation part."
    each, whole, mix = KINDS[kind]
    preprocess, x, y = fit_preprocess(fashion.train.x), fashion.train.x, fashion.train.y.astype(np.int64)
    if n_pictures < len(x):
        chosen = stratified_split(y, n_pictures / len(x), seed)[1]
        copies = np.tile(chosen, len(x) // len(chosen)) # so that an epoch has as many updates as with all
        x, y = x[copies], y[copies]
    transform = preprocess
    if whole: transform = BatchTransform(whole, per_picture=False, then=transform)
    if each: transform = BatchTransform(each, then=transform)
    tensors = lambda x, y: (torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)))
    dls = DataLoaders(ArrayLoader(*tensors(x, y), bs=BS, transform=transform, shuffle=True, drop_last=True),
                      ArrayLoader(*tensors(fashion.valid.x, fashion.valid.y), bs=500, transform=preprocess))
    seed_everything(seed, dls)
    learn = make_learner(dls, small_network(), TrainConfig(epochs=EPOCHS, lr=LR, seed=seed),
                         log=EpochLogCallback(lambda line: None), cbs=[MixCallback(mix, 10)] if mix else [])
    learn.fit_one_cycle(EPOCHS, LR)
    return {key: learn.epoch_log.history[-1][key] for key in ('accuracy', 'train_loss', 'valid_loss')}


if __name__ == '__main__':
    fashion, file, begin = load('fashion-mini'), RESULTS/'augmentation.json', time.perf_counter()
    kept = json.loads(file.read_text()) if file.exists() else {}
    rows = kept['results'] if kept.get('data') == fashion.sha256 else []
    done = {(row['kind'], row['n_pictures']) for row in rows}
    for kind in KINDS:
        for n_pictures in (500, len(fashion.train)):
            if (kind, n_pictures) in done: continue
            runs = [run(fashion, kind, n_pictures, seed) for seed in SEEDS]
            rows.append(dict(n_pictures=n_pictures, kind=kind, **{k: [r[k] for r in runs] for k in runs[0]}))
            print(f"{n_pictures:5} pictures, {kind:20} validation accuracy {spread(rows[-1]['accuracy'])}  "
                  f'{time.perf_counter() - begin:.0f} s', flush=True)
            store('augmentation', rows, seeds=SEEDS, data=fashion.sha256, epochs=EPOCHS, lr=LR, bs=BS)
    print(file)
