"""Time and peak memory of a training step of ResNet-18 on 32×32 pictures: plain, channels last, recomputed, in micro-batches."""
import argparse, copy, time
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from common import store
from dlfund.training.memory import checkpoint_blocks, peak_memory


def variants(
    bs:int, # pictures in the batch
)->dict: # name: function that runs one step
    "Make the steps that are compared, on the same weights."
    torch.manual_seed(0)
    plain = resnet18(num_classes=10)
    x, y = torch.randn(bs, 3, 32, 32), torch.randint(10, (bs,))
    def stepper(model, parts=1):
        opt = torch.optim.AdamW(model.parameters(), fused=True)
        pictures = x.contiguous(memory_format=torch.channels_last) if model is not plain else x
        def step():
            for part_x, part_y in zip(pictures.chunk(parts), y.chunk(parts)):
                (F.cross_entropy(model(part_x), part_y) / parts).backward()
            opt.step()
            opt.zero_grad()
        step()
        return step
    last = lambda: copy.deepcopy(plain).to(memory_format=torch.channels_last)
    recomputed = last()
    checkpoint_blocks(recomputed, BasicBlock)
    return {'usual order': stepper(plain), 'channels last': stepper(last()), 'recomputed blocks': stepper(recomputed),
            'four micro-batches': stepper(last(), parts=4)}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--bs', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=7, help='steps of each, interleaved')
    args = parser.parse_args(words)
    steps = variants(args.bs)
    seconds = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    rows = {name: dict(seconds=median(seconds[name]), spread=[min(seconds[name]), max(seconds[name])], peak=peaks[name],
                       time_ratio=median(seconds[name]) / median(seconds['usual order']),
                       memory_ratio=peaks[name] / peaks['usual order']) for name in steps}
    for name, row in rows.items():
        print(f"{name:20} {row['seconds']*1000:7.0f} ms ({row['time_ratio']:.2f})  peak {row['peak']/2**20:7.1f} MiB "
              f"({row['memory_ratio']:.2f})")
    store('training_memory', rows, bs=args.bs, rounds=args.rounds, seed=0, threads=torch.get_num_threads())


if __name__ == '__main__': main()
