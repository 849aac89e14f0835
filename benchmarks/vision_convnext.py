"""From a bottleneck ResNet to a ConvNeXt on `fashion-mini`, one change at a time; `--only steps`, `mini` or `times` runs one part.

`steps` trains the twelve networks of the road, `mini` the book's two small networks for longer, with three seeds each; `times` times a
training step of all of them, taking turns. The chapter *ConvNeXt* reads `benchmarks/results/vision_convnext.json`, into which all parts write."""
import argparse, json

import torch

from common import RESULTS, spread, stepper, store
from dlfund.data.datasets import load
from dlfund.training.configuration import TrainConfig
from dlfund.vision.convnext import STEPS, StepNet, convnext_mini, step_to
from dlfund.vision.classics import multiply_adds
from dlfund.vision.resnet import resnet_mini
from vision_resnet import SEEDS, run

PARTS = dict(steps={name: lambda name=name: StepNet(step_to(name), 10, dim=8) for name in STEPS},
             mini={make.__name__: lambda make=make: make(10) for make in (resnet_mini, convnext_mini)})
EPOCHS = dict(steps=3, mini=4)


def train(fashion, make_model, epochs):
    "Count, and train with every seed."
    net, x = make_model(), torch.randn(1, 1, 28, 28)
    histories = [run(fashion, make_model, TrainConfig(epochs=epochs, lr=0.004, seed=seed)) for seed in SEEDS]
    return dict(parameters=sum(p.numel() for p in net.parameters()), multiplications=multiply_adds(net, x.shape[1:]),
                accuracy=[h[-1]['accuracy'] for h in histories], train_loss=[h[-1]['train_loss'] for h in histories])


def times(results, rounds=25):
    "Least seconds of a training step of 128 pictures with channels last, as the learner has them; what else runs only adds."
    torch.manual_seed(0)
    x = torch.randn(128, 1, 28, 28)
    steps = {(part, name): stepper(make().to(memory_format=torch.channels_last), x) for part, made in PARTS.items() for name, make in made.items()}
    measured = {key: [step(1)] for key, step in steps.items()}
    for _ in range(rounds):
        for key, step in steps.items(): measured[key].append(step(1))
    for (part, name), seconds in measured.items():
        results[part][name]['seconds'] = min(seconds)
        print(f'{name:22} {1e3*min(seconds):5.1f} ms', flush=True)


def main(argv=None):
    "Run the parts, and store what is known so far after each."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', choices=(*PARTS, 'times'), help='one part; by default all')
    only, file = parser.parse_args(argv).only, RESULTS/'vision_convnext.json'
    fashion, results = load('fashion-mini'), json.loads(file.read_text())['results'] if file.exists() else {}
    for part in [only] if only else (*PARTS, 'times'):
        if part == 'times': times(results)
        else: results[part] = {}
        for name, make_model in PARTS.get(part, {}).items():
            results[part][name] = row = train(fashion, make_model, EPOCHS[part])
            print(f"{name:22} validation accuracy {spread(row['accuracy'])}  {row['parameters']:7,} parameters  "
                  f"{row['multiplications']/1e6:5.2f} million multiplications", flush=True)
        print(store('vision_convnext', results, seeds=SEEDS, data=fashion.sha256))


if __name__ == '__main__': main()
