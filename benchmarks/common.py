"What every benchmark of the book shares: the machine's description, results with their spread, and a stored record."
import argparse, importlib, json, os, platform, sys, time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent/'results'


def machine()->dict:
    "Describe where a number was measured."
    model = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line),
                 platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    return dict(cpu=model, cores=os.cpu_count(), system=platform.system(), python=platform.python_version(),
                **{name: version(name) for name in ('torch', 'fastai', 'dlfund')})


def spread(
    values:list[float], # one for each seed or repetition
)->str: # `mean ± sd`
    "Write several measurements as mean and standard deviation."
    return f'{mean(values):.4f} ± {stdev(values):.4f}' if len(values) > 1 else f'{values[0]:.4f}'


def stepper(
    model, # to train
    x, # one batch of inputs
    autocast:bool=False, # run the forward pass in bfloat16?
): # a function that takes `n` steps and returns the seconds a step took
    "Train a classifier of ten classes on one batch with the fused AdamW."
    import torch
    from torch.nn import functional as F
    y = torch.randint(0, 10, (len(x),))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    def steps(n):
        begin = time.perf_counter()
        for _ in range(n):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast): pred = model(x)
            F.cross_entropy(pred.float(), y).backward()
            opt.step()
            opt.zero_grad()
        return (time.perf_counter() - begin) / n
    return steps


def store(
    name:str, # of the benchmark
    results, # anything JSON can hold
    **facts, # seeds, hashes and settings that belong to it
)->Path:
    "Keep results together with the machine, the versions and the date."
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS/f'{name}.json'
    record = dict(machine=machine(), date=time.strftime('%Y-%m-%d'), **facts, results=results)
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + '\n')
    return file


def dispatch(
    subject:str, # `training` or another: the parts are the files `benchmarks/<subject>_<part>.py`
    doc:str, # what `--help` says first
)->None:
    "Run the parts of a benchmark that the command line names; what stands after `--` is theirs."
    parts = sorted(file.stem.removeprefix(f'{subject}_') for file in Path(__file__).parent.glob(f'{subject}_*.py'))
    own, rest = (sys.argv[1:sys.argv.index('--')], sys.argv[sys.argv.index('--') + 1:]) if '--' in sys.argv else (sys.argv[1:], [])
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='+', choices=[*parts, 'all'], metavar='PART', help=f'{", ".join(parts)} or all')
    asked = parser.parse_args(own).parts
    for part in parts if 'all' in asked else dict.fromkeys(asked):
        print(f'\n{part}\n{"-"*len(part)}', flush=True)
        sys.argv = [f'{subject}_{part}.py', *rest]
        importlib.import_module(f'{subject}_{part}').main()
