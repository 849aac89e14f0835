"""Does `torch.compile` pay? `python benchmarks/training_compile.py [--bs 512] [--width 1024] [--steps 5] [--repeats 7] [--cases resnet18 pointwise mlp]`.

For each case a training step is compiled from a cold cache and its first step timed; then the eager and the compiled step take turns. What compiling cost, divided
by what a step saves, is the number of steps after which it has paid. The chapter *Mixed precision* reads `benchmarks/results/training_compile.json`."""
import argparse, math
from statistics import median

import torch
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F
from torchvision.models import get_model

from common import stepper, store
from dlfund.training.precision import break_even


class Odd(nn.Module):
    "An activation that no library has as one kernel: eight pointwise operations in a row."
    def forward(self, x): return x*torch.tanh(F.softplus(x)) + 0.1*torch.sin(x)**2 - 0.01*x.abs()


def case(name, bs, width):
    "A model and a batch of inputs for it; images come in batches a quarter as large."
    torch.manual_seed(0)
    if name == 'pointwise': return nn.Sequential(*[Odd() for _ in range(4)], nn.Linear(width, 10)), torch.randn(bs, width)
    if name == 'mlp':
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), Odd())]
        return nn.Sequential(*layers, nn.Linear(width, 10)), torch.randn(bs, width)
    model = get_model(name, weights=None, num_classes=10).to(memory_format=torch.channels_last)
    return model, torch.randn(bs//4, 3, 32, 32).to(memory_format=torch.channels_last)


def measure(name, bs, width, steps, repeats):
    "Cold compile seconds, then milliseconds a step, eager and compiled in turns."
    torch._dynamo.reset()
    with fresh_cache():
        eager, compiled = stepper(*case(name, bs, width)), stepper(*(lambda m, x: (torch.compile(m), x))(*case(name, bs, width)))
        eager(1)
        cold = compiled(1)
        eager(2), compiled(2)
        rows = dict(eager=[], compiled=[])
        for _ in range(repeats):
            rows['eager'].append(1e3*eager(steps))
            rows['compiled'].append(1e3*compiled(steps))
    cost = cold - median(rows['compiled'])/1e3
    pays = break_even(cost, median(rows['eager']), median(rows['compiled']))
    ratios = [a/b for a, b in zip(rows['eager'], rows['compiled'])]
    return dict(case=name, bs=bs, width=width, compile_seconds=cost, milliseconds=rows, ratios=ratios,
                break_even=None if math.isinf(pays) else pays)


def main(argv=None):
    "Measure, print, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(bs=512, width=1024, steps=5, repeats=7).items(): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--cases', nargs='+', default=['resnet18', 'mlp', 'pointwise'])
    parser.add_argument('--no-store', action='store_true', help='only print')
    args = parser.parse_args(argv)
    found = []
    for name in args.cases:
        found.append(row := measure(name, args.bs, args.width, args.steps, args.repeats))
        pays = 'never pays' if row['break_even'] is None else f"pays after {row['break_even']} steps"
        print(f"{name:10} eager {median(row['milliseconds']['eager']):8.2f} ms a step, compiled {median(row['milliseconds']['compiled']):8.2f} ms, "
              f"eager/compiled {median(row['ratios']):.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}); "
              f"compiling took {row['compile_seconds']:.1f} s: {pays}")
    if not args.no_store: print(store('training_compile', found, threads=torch.get_num_threads()))


if __name__ == '__main__': main()
