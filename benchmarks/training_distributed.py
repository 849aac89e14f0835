"""Several processes on one machine: speed against threads, traffic with and without `no_sync`, a timeline with a straggler.

`python benchmarks/training_distributed.py [repetitions]` prints ratios and stores results/training_distributed.json.
"""
import json, os, subprocess, sys, tempfile, time, warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from common import store

SETUPS = {'1 process, 1 thread': (1, 1), '1 process, 2 threads': (1, 2), '2 processes, 1 thread each': (2, 1)}


def work_speed(bs, n_steps):
    "Pictures per second of the training of resnet-mini, after one epoch to warm up."
    from types import SimpleNamespace
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fastcore.basics import noop
    from dlfund.data.datasets import load
    from dlfund.data.loading import loaders, seed_everything
    from dlfund.data.preprocessing import fit_preprocess
    from dlfund.training.distributed import DistributedCallback, shard
    from dlfund.vision import build
    data = load('fashion-mini')
    part = lambda p, n: SimpleNamespace(x=p.x[:n], y=p.y[:n])
    splits = SimpleNamespace(name=data.name, task=data.task, train=part(data.train, bs*n_steps), valid=part(data.valid, 2))
    dls = loaders(splits, fit_preprocess(data.train.x), bs=bs)
    seed_everything(0, dls)
    class Clock(Callback):
        order = 2000
        def before_fit(self): self._seconds = []
        def before_train(self): self._begin = time.perf_counter()
        def after_train(self): self._seconds.append(time.perf_counter() - self._begin)
    model = build('resnet-mini', n_classes=10, n_channels=1).to(memory_format=torch.channels_last)
    learn = Learner(shard(dls), model, torch.nn.functional.cross_entropy,
                    opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=[Clock(), DistributedCallback()])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(2, 1e-3)
    return bs*n_steps/learn.clock._seconds[-1]


def work_sync(n_micro=4, n_steps=8, width=1024):
    "Seconds and megabytes of a step of `n_micro` backward passes, with a sum after each and with one sum."
    from contextlib import nullcontext
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width) for _ in range(4)]
    model, sent = DistributedDataParallel(torch.nn.Sequential(*layers)), []
    def hook(group, bucket):
        sent.append(bucket.buffer().numel()*4)
        return allreduce_hook(group, bucket)
    model.register_comm_hook(None, hook)
    x, found = torch.randn(32, width), {}
    for is_lazy in (False, True):
        seconds = []
        for _ in range(n_steps):
            sent.clear()
            dist.barrier()
            begin = time.perf_counter()
            model.zero_grad()
            for i in range(n_micro):
                with model.no_sync() if is_lazy and i < n_micro - 1 else nullcontext(): model(x).square().mean().backward()
            seconds.append(time.perf_counter() - begin)
        found['one sum' if is_lazy else 'a sum each'] = dict(seconds=median(seconds), megabytes=sum(sent)/1e6)
    return found


def work_timeline(width=768, n_steps=4):
    "What each process does when, in seconds; rank 1 needs longer to read its data."
    from torch.nn.parallel import DistributedDataParallel
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)]))
    opt, x, spans = torch.optim.AdamW(model.parameters()), torch.randn(128, width), []
    for step in range(n_steps + 1): # the first is to warm up
        dist.barrier()
        times = [time.perf_counter()]
        time.sleep(0.005 + 0.04*(dist.get_rank() == 1 and step % 2 == 0))
        times.append(time.perf_counter())
        loss = model(x).square().mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        opt.step()
        opt.zero_grad()
        times.append(time.perf_counter())
        if step: spans.append(times)
    everyones = [None]*2
    dist.all_gather_object(everyones, spans) # our own processes: pickle is fine here
    zero = min(times[0] for spans in everyones for times in spans)
    return [[[t - zero for t in times] for times in spans] for spans in everyones]


def start(what, n_ranks=1, n_threads=1, **settings):
    "Run one measurement in processes of its own."
    from dlfund.training.distributed import launch
    os.environ['OMP_NUM_THREADS'] = str(n_threads)
    with tempfile.TemporaryFile('w+') as out:
        if launch(n_ranks, [__file__, 'work', what, json.dumps(settings)], program=(sys.executable, '-W', 'ignore'), out=out):
            sys.exit('a process failed')
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])


def main(repetitions=3, bs=128, n_steps=20):
    "Measure, print, store."
    speed = {name: [] for name in SETUPS}
    for _ in range(repetitions):
        for name, (n_ranks, n_threads) in SETUPS.items(): speed[name].append(start('speed', n_ranks, n_threads, bs=bs, n_steps=n_steps))
    base = median(speed['1 process, 1 thread'])
    for name, values in speed.items(): print(f'{name:27} {median(values):7.0f} pictures/s, {median(values)/base:.2f} times')
    sync = start('sync', 2)
    for name, row in sync.items(): print(f"{name:12} {1000*row['seconds']:6.1f} ms, {row['megabytes']:6.1f} MB")
    print(store('training_distributed', dict(speed=speed, sync=sync, timeline=start('timeline', 2)), repetitions=repetitions, bs=bs,
                n_steps=n_steps, model='resnet-mini'))


if __name__ == '__main__':
    if sys.argv[1:2] != ['work']: main(*map(int, sys.argv[1:2]))
    else:
        warnings.simplefilter('ignore')
        from dlfund.training.distributed import rank, start_process_group, stop_process_group
        start_process_group(timeout=60)
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
        found = globals()[f'work_{sys.argv[2]}'](**json.loads(sys.argv[3]))
        if rank() == 0: print(json.dumps(found))
        stop_process_group()
