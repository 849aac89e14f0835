"""Forward and backward pass of the book's networks against torchvision's, the same weights, taking turns: seconds and peak memory as ratios."""
import argparse, time
from statistics import median

import torch
import torchvision
from torch.nn import functional as F

from common import store
from dlfund.training.memory import peak_memory
from dlfund.vision import build

CASES = {'resnet18': 112, 'resnet50': 112, 'vgg16': 64, 'alexnet': 112, 'efficientnet_b0': 112, 'convnext_tiny': 112} # side of the pictures


def stepper(model, x, y):
    "A forward and a backward pass, as a function that returns its seconds."
    def step():
        begin = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()
        return time.perf_counter() - begin
    return step


def measure(name, side, bs, repeats):
    "Seconds of both models in turn, which of them goes first alternating, and the peak memory of a step."
    torch.manual_seed(0)
    theirs, x, y = torchvision.models.get_model(name, weights=None), torch.randn(bs, 3, side, side), torch.randint(1000, (bs,))
    ours = build(name)
    ours.load_state_dict(theirs.state_dict())
    steps = dict(ours=stepper(ours.train(), x, y), theirs=stepper(theirs.train(), x, y))
    for step in steps.values(): step()
    rows = {who: [] for who in steps}
    for i in range(repeats):
        for who in (['ours', 'theirs'] if i % 2 else ['theirs', 'ours']): rows[who].append(steps[who]())
    peaks = {who: peak_memory(step) for who, step in steps.items()}
    ratios = sorted(a/b for a, b in zip(rows['ours'], rows['theirs']))
    return dict(model=name, side=side, bs=bs, seconds=rows, ratio=[ratios[len(ratios)//4], median(ratios), ratios[-1 - len(ratios)//4]],
                memory_ratio=peaks['ours']/peaks['theirs'], peak=peaks['ours'])


def main(argv=None):
    "Measure, print, store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--bs', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=12)
    parser.add_argument('--quick', action='store_true', help='three repetitions, and nothing is stored')
    args = parser.parse_args(argv)
    found = []
    for name, side in CASES.items():
        found.append(row := measure(name, side, args.bs, 3 if args.quick else args.repeats))
        low, middle, high = row['ratio']
        print(f"{name:16} {side}×{side}, batch {args.bs}: {1000*median(row['seconds']['ours']):7.0f} ms, {middle:.3f} × torchvision "
              f"({low:.3f} to {high:.3f}); memory {row['memory_ratio']:.3f} ×", flush=True)
    if not args.quick: print(store('vision_models', found, threads=torch.get_num_threads(), repeats=args.repeats, seed=0))


if __name__ == '__main__': main()
