"""Every way to make inference faster, side by side: `python benchmarks/serving_inference.py [train|measure|all] [--work FOLDER] [--seeds 0 1 2] [--quick]`.

`train` makes, for each seed, a ResNet-18 on fashion-mini in bfloat16, its pruned and masked versions and a small network with and without a teacher, and exports and quantizes them into
the folder `--work`; what is there already is not made again, so it may be interrupted and run seed by seed. `measure` then lets all variants of one seed take turns on one
thread, weighs each in a process of its own, and reads the test part once. The chapter *Faster inference* reads `benchmarks/results/serving_inference.json`."""
import argparse, os, subprocess, sys, tempfile, time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import ImagePreprocess, fit_preprocess
from dlfund.deployment.bundle import Bundle
from dlfund.deployment.export import export_onnx
from dlfund.deployment.inference import (DistillCallback, EagerRunner, compare_latency, mask_channels, prune_channels,
                                         quantize_onnx, to_bf16)
from dlfund.deployment.runtime import OnnxRunner
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.precision import supported
from dlfund.training.runs import make_learner
from dlfund.vision import build

ARCHITECTURE = dict(name='resnet18', n_classes=10, n_channels=1)
STUDENT = dict(name='resnet-mini', n_classes=10, n_channels=1, width=2.0)
FILES = {'fp32 onnx': 'dense', 'int8 static': 'int8_static', 'int8 dynamic': 'int8_dynamic', 'masked': 'masked', 'pruned': 'pruned',
         'distilled': 'distilled', 'small, alone': 'alone', 'pruned, int8': 'pruned_int8', 'distilled, int8': 'distilled_int8'}
SIDE = 224 # of the pictures of the second measurement
PEAK = "\nprint(int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024)"
WEIGH = { # a process that serves a file, and nothing else
    'onnx': "import sys, numpy as np\nfrom dlfund.deployment.runtime import OnnxRunner\nrun = OnnxRunner(open(sys.argv[1], 'rb').read(), n_threads=1)\n"
            "for _ in range(50): run(np.zeros((1, 28, 28), np.uint8))",
    'eager': "import sys, torch\nfrom safetensors.torch import load_file\nfrom dlfund.data.preprocessing import ImagePreprocess\nfrom dlfund.vision import build\n"
             "weights = load_file(sys.argv[1])\nmodel, dtype = build('resnet18', 10, n_channels=1), weights['fc.weight'].dtype\n"
             "model.to(dtype).load_state_dict(weights)\nmodel.eval()\nprepare = ImagePreprocess()\n"
             "with torch.inference_mode():\n    for _ in range(50): model(prepare(torch.zeros(1, 28, 28, dtype=torch.uint8)).to(dtype))"}


def fit(model, splits, preprocess, epochs, lr, seed, cbs=()):
    "Train, in bfloat16 where the processor has it."
    config = TrainConfig(epochs=epochs, lr=lr, seed=seed, precision='bf16' if 'bf16' in supported('cpu') else 'fp32')
    dls = loaders(splits, preprocess, augment=True)
    seed_everything(seed, dls)
    learn = make_learner(dls, model, config, log=EpochLogCallback(lambda line: print('  ', line, flush=True)), cbs=cbs)
    learn.fit_one_cycle(config.epochs, config.lr)
    return learn.model.eval().to(memory_format=torch.contiguous_format)


def wrap(model, splits, preprocess, architecture=ARCHITECTURE):
    "A model in the record that `export_onnx` takes."
    return Bundle(model=model, architecture=architecture, labels=list(splits.labels), preprocess=preprocess, metrics={},
                  data=dict(name=splits.name, sha256=splits.sha256), training={})


def kept(file, model, train):
    "The trained model, from its file if an earlier run got so far."
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    model = train(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return model


def make(seed, splits, preprocess, folder, epochs):
    "All files of one seed."
    folder.mkdir(parents=True, exist_ok=True)
    example, shown = preprocess(torch.from_numpy(splits.train.x[:2])), splits.train.x[:512]
    torch.manual_seed(seed)
    dense = kept(folder/'dense.safetensors', build(**ARCHITECTURE), lambda m: fit(m, splits, preprocess, epochs, 0.002, seed))
    pruned = kept(folder/'pruned.safetensors', prune_channels(dense, 0.5, example),
                  lambda m: fit(m, splits, preprocess, max(1, epochs//2), 0.001, seed))
    torch.manual_seed(seed)
    student = kept(folder/'student.safetensors', build(**STUDENT),
                   lambda m: fit(m, splits, preprocess, epochs, 0.004, seed, [DistillCallback(dense)]))
    torch.manual_seed(seed)
    alone = kept(folder/'alone.safetensors', build(**STUDENT), lambda m: fit(m, splits, preprocess, epochs, 0.004, seed))
    save_file({k: v.contiguous().bfloat16() if v.is_floating_point() else v for k, v in dense.state_dict().items()}, folder/'bf16.safetensors')
    export = lambda model, architecture=ARCHITECTURE: export_onnx(wrap(model, splits, preprocess, architecture))
    made = dict(dense=export(dense), masked=export(mask_channels(dense, 0.5, example)), pruned=export(pruned), distilled=export(student, STUDENT), alone=export(alone, STUDENT))
    made['int8_static'], made['int8_dynamic'] = quantize_onnx(made['dense'], shown), quantize_onnx(made['dense'], method='dynamic')
    for name in ('pruned', 'distilled'): made[f'{name}_int8'] = quantize_onnx(made[name], shown)
    for name, content in made.items(): (folder/f'{name}.onnx').write_bytes(content)
    (folder/'done').touch()


def open_runners(folder, preprocess):
    "Every variant of one seed, each on one thread."
    dense = build(**ARCHITECTURE)
    dense.load_state_dict(load_file(folder/'dense.safetensors'))
    example = preprocess(torch.zeros(2, 28, 28, dtype=torch.uint8))
    return {'fp32 eager': EagerRunner(dense, preprocess), 'bf16 eager': EagerRunner(to_bf16(dense.eval(), example), preprocess),
            **{name: OnnxRunner((folder/f'{file}.onnx').read_bytes(), n_threads=1) for name, file in FILES.items()}}


def file_of(name, folder):
    "The file that a variant is shipped as."
    return folder/({'fp32 eager': 'dense.safetensors', 'bf16 eager': 'bf16.safetensors'}.get(name) or f'{FILES[name]}.onnx')


def weigh(name, folder):
    "Peak MiB of a process that loads a variant and answers fifty pictures."
    program = WEIGH['eager' if 'eager' in name else 'onnx'] + PEAK
    return float(subprocess.run([sys.executable, '-c', program, file_of(name, folder)], check=True, capture_output=True, text=True).stdout)


def accuracy(runner, part):
    "Share of a part that is classified rightly."
    found = np.concatenate([runner(part.x[i:i + 100]).argmax(-1) for i in range(0, len(part.x), 100)])
    return float((found == part.y).mean())


def large(splits, turns):
    "The same at the size that ResNet-18 was made for: random weights, colour pictures."
    torch.manual_seed(0)
    architecture = dict(name='resnet18', n_classes=10, n_channels=3)
    preprocess, model = ImagePreprocess(size=(SIDE, SIDE), n_channels=3, mean=(0.5,)*3, std=(0.3,)*3), build(**architecture).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    content = export_onnx(wrap(model, splits, preprocess, architecture))
    runners = {'fp32 eager': EagerRunner(model, preprocess), 'fp32 onnx': OnnxRunner(content, n_threads=1),
               'int8 static': OnnxRunner(quantize_onnx(content, pictures), n_threads=1),
               'bf16 eager': EagerRunner(to_bf16(model, preprocess(torch.from_numpy(pictures[:2]))), preprocess)}
    return {name: asdict(one) for name, one in compare_latency(runners, pictures[:1], n_turns=turns, n_calls=5).items()}


def measure(splits, preprocess, work, seeds, turns):
    "One row for each variant."
    runners = {seed: open_runners(work/f'seed{seed}', preprocess) for seed in seeds}
    first, x = work/f'seed{seeds[0]}', splits.valid.x
    single = compare_latency(runners[seeds[0]], x[:1], n_turns=turns)
    bulk = compare_latency(runners[seeds[0]], x[:32], n_turns=max(4, turns//5), n_calls=5)
    rows = {}
    for name, one in single.items():
        rows[name] = dict(p50=one.p50, p95=one.p95, throughput=bulk[name].throughput, bytes=file_of(name, first).stat().st_size,
                          mib=weigh(name, first), accuracy=[accuracy(runners[seed][name], splits.test) for seed in seeds],
                          valid=[accuracy(runners[seed][name], splits.valid) for seed in seeds])
    return rows


def main(argv=None):
    "Train, measure, print, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', default='all', choices=('train', 'measure', 'all'))
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir())/'dlfund_serving_inference')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=6, help='of the ResNet-18 and of the student; half as many after pruning')
    parser.add_argument('--turns', type=int, default=30, help='of ten calls, for each variant')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='of the training; all measurements use one')
    parser.add_argument('--quick', action='store_true', help='one epoch, one seed, few turns, and nothing is stored')
    args = parser.parse_args(argv)
    if args.quick: args.seeds, args.epochs, args.turns, args.work = args.seeds[:1], 1, 3, args.work.with_name(args.work.name + '_quick')
    work = args.work/f'epochs{args.epochs}'
    splits = load('fashion-mini')
    preprocess = fit_preprocess(splits.train.x)
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        folder = work/f'seed{seed}'
        if args.part == 'measure' or (folder/'done').exists(): continue
        begin = time.perf_counter()
        make(seed, splits, preprocess, folder, args.epochs)
        print(f'seed {seed}: {time.perf_counter() - begin:.0f} s', flush=True)
    if args.part == 'train': return
    torch.set_num_threads(1)
    rows, big = measure(splits, preprocess, work, args.seeds, args.turns), large(splits, max(4, args.turns//3))
    dense = rows['fp32 eager']
    print(f'{"":16} {"p50 ms":>8} {"p95 ms":>8} {"faster":>7} {"pictures/s":>11} {"MB":>6} {"MiB held":>9}  test accuracy')
    for name, row in rows.items():
        print(f"{name:16} {row['p50']:8.2f} {row['p95']:8.2f} {dense['p50']/row['p50']:6.1f}× {row['throughput']:11,.0f} {row['bytes']/1e6:6.1f} "
              f"{row['mib']:9.0f}  {spread(row['accuracy'])} ({100*(mean(row['accuracy']) - mean(dense['accuracy'])):+.2f} points)")
    print(f'at {SIDE}×{SIDE}: ' + ', '.join(f"{name} {one['p50']:.1f} ms" for name, one in big.items()))
    if not args.quick:
        print(store('serving_inference', rows, large=big, side=SIDE, seeds=args.seeds, epochs=args.epochs, threads=1, turns=args.turns,
                    onnxruntime=version('onnxruntime'), data=splits.sha256))


if __name__ == '__main__': main()
