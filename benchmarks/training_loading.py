"""What worker processes are worth: batches a second from arrays in memory and from picture files, with 0, 1 and 2 workers.

Reads pictures of `fashion-mini`, enlarged as files of 128 pixels, since decoding 28 pixels costs nothing. The chapter *Reproducibility and
debugging* reads `benchmarks/results/training_loading.json`. With `--quick` it takes a few seconds."""
import argparse, sys, tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.data.load import DataLoader
from PIL import Image

from common import store
from dlfund.data.datasets import load
from dlfund.data.loading import ArrayLoader
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.debugging import loading_speed, watched

SIZE, WORKERS = 128, (0, 1, 2)


class Files:
    "Pictures in files, decoded one by one."
    def __init__(self, files, labels): self.files, self.labels = files, labels
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        with Image.open(self.files[i]) as picture: pixels = np.asarray(picture, dtype=np.float32)
        return torch.from_numpy(pixels / 255)[None], int(self.labels[i])


class Arrays(ArrayLoader):
    "The same pictures, decoded already, in a loader that can be given workers to see what they cost."
    def __init__(self, x, y, bs, transform, workers):
        super().__init__(x, y, bs=bs, transform=transform, shuffle=True)
        self.fake_l.num_workers = workers


def write_files(folder, pictures, suffix):
    "Enlarge pictures and write them as files."
    files = [Path(folder)/f'{i}.{suffix}' for i in range(len(pictures))]
    for file, picture in zip(files, pictures): Image.fromarray(picture).resize((SIZE, SIZE)).save(file)
    return files


def main(words=None):
    "Time every source with every number of workers, interleaved, and store the result."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='few batches, two repetitions')
    quick = parser.parse_args(words).quick
    n, repetitions, bs = (1000, 2, 50) if quick else (4000, 5, 50)
    fashion = load('fashion-mini')
    pictures, labels = fashion.train.x[:n], fashion.train.y[:n].astype(np.int64)
    enlarged = torch.from_numpy(np.stack([np.asarray(Image.fromarray(p).resize((SIZE, SIZE))) for p in pictures]))
    preprocess, found = fit_preprocess(fashion.train.x), {}
    preprocess = type(preprocess)(size=(SIZE, SIZE), n_channels=1, mean=preprocess.mean, std=preprocess.std)
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: write_files(folder, pictures, suffix) for suffix in ('png', 'jpg')}
        make = {'arrays': lambda w: Arrays(enlarged, torch.from_numpy(labels), bs, preprocess, w),
                'PNG': lambda w: DataLoader(Files(files['png'], labels), bs=bs, shuffle=True, num_workers=w),
                'JPEG': lambda w: DataLoader(Files(files['jpg'], labels), bs=bs, shuffle=True, num_workers=w)}
        for _ in range(repetitions):
            for source, made in make.items():
                for workers in WORKERS:
                    dl = made(workers)
                    with watched(dl): speed = loading_speed(dl, n // bs)
                    row = found.setdefault((source, workers), dict(source=source, workers=workers, per_second=[], first=[]))
                    for key in ('per_second', 'first'): row[key].append(speed[key])
    for row in found.values():
        base = median(found[row['source'], 0]['per_second'])
        print(f"{row['source']:7} {row['workers']} workers {median(row['per_second']):9.1f} batches a second, "
              f"{median(row['per_second']) / base:5.2f} times none; first batch after {1e3*median(row['first']):.0f} ms")
    store('training_loading', list(found.values()), data=fashion.sha256, bs=bs, pixels=SIZE, repetitions=repetitions)


if __name__ == '__main__': main(sys.argv[1:])
