"""bfloat16 against float32: `python benchmarks/training_precision.py [--bs 128] [--steps 5] [--repeats 7] [--epochs 6] [--model resnet18] [--stem small] [--seeds 0 1 2]`.

Speed: one training step of ResNet-18 on 32×32 colour images (with the 3×3 stem for small images; `--stem imagenet` takes the other), channels-last and
AdamW for both, the two precisions taking turns. Accuracy: `resnet-mini` on
fashion-mini, the same seeds for both, judged on the validation part. The chapter *Mixed precision* reads `benchmarks/results/training_precision.json`."""
import argparse, time
from functools import partial
from statistics import median

import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from torch import nn
from torchvision.models import get_model
import fastai.callback.all # adds no_bar and fit_one_cycle

from common import spread, stepper, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.precision import Precision, supported
from dlfund.vision import build


def resnet(name, stem):
    "A torchvision ResNet for ten classes; for small images its first layer must not throw away fifteen of sixteen pixels."
    model = get_model(name, weights=None, num_classes=10)
    if stem == 'small': model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model.to(memory_format=torch.channels_last)


def speed(name, stem, bs, steps, repeats, size=32):
    "Milliseconds a step for each precision, repetition by repetition, taking turns."
    runs = {}
    for mode in ('fp32', 'bf16'):
        torch.manual_seed(0)
        x = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last)
        runs[mode] = stepper(resnet(name, stem), x, autocast=mode == 'bf16')
    for run in runs.values(): run(1)
    rows = {mode: [] for mode in runs}
    for _ in range(repeats):
        for mode, run in runs.items(): rows[mode].append(1e3*run(steps))
    ratios = [a/b for a, b in zip(rows['fp32'], rows['bf16'])]
    return dict(model=name, stem=stem, bs=bs, threads=torch.get_num_threads(), milliseconds=rows, ratios=ratios)


def train(fashion, mode, seed, epochs, lr=0.004):
    "Accuracy on the validation part, loss, and seconds, of one training."
    dls = loaders(fashion, fit_preprocess(fashion.train.x), bs=128)
    seed_everything(seed, dls)
    model = build('resnet-mini', len(fashion.labels), 1).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True), wd=0.01,
                    metrics=accuracy, cbs=Precision(mode))
    begin = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return dict(zip(('train_loss', 'valid_loss', 'accuracy'), learn.recorder.values[-1])) | dict(seconds=time.perf_counter() - begin)


def main(argv=None):
    "Measure, print, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(bs=128, steps=5, repeats=7, epochs=6).items(): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--model', default='resnet18', help='whose step is timed')
    parser.add_argument('--stem', default='small', choices=['small', 'imagenet'], help='its first layers')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--no-store', action='store_true', help='only print')
    args = parser.parse_args(argv)
    if 'bf16' not in supported('cpu'): parser.error('this CPU has no bfloat16: there is nothing to measure')
    timed = speed(args.model, args.stem, args.bs, args.steps, args.repeats)
    print(f"{args.model}, {args.stem} stem, batch {args.bs}, {timed['threads']} threads: fp32 {median(timed['milliseconds']['fp32']):.0f} ms a step, "
          f"bf16 {median(timed['milliseconds']['bf16']):.0f} ms; fp32/bf16 = {median(timed['ratios']):.2f} "
          f"({min(timed['ratios']):.2f} to {max(timed['ratios']):.2f} in {args.repeats} repetitions)")
    fashion = load('fashion-mini')
    runs = {mode: [train(fashion, mode, seed, args.epochs) for seed in args.seeds] for mode in ('fp32', 'bf16')}
    for mode, rows in runs.items():
        print(f"{mode}: accuracy {spread([r['accuracy'] for r in rows])}, loss {spread([r['valid_loss'] for r in rows])}, "
              f"{median(r['seconds'] for r in rows):.1f} s a run")
    if not args.no_store:
        print(store('training_precision', dict(speed=timed, runs=runs), seeds=args.seeds, epochs=args.epochs, data=fashion.sha256))


if __name__ == '__main__': main()
