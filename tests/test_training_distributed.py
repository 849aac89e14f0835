"Training by several real processes: equal to one process, dead processes, resuming, two machines."
import io, json, re, subprocess, sys, time
from contextlib import redirect_stderr
from pathlib import Path

import psutil
import pytest
from conftest import environment, run, start

from dlfund.training.distributed import launch

PYTHON = (sys.executable, '-W', 'ignore')
WORK = '''
import json, sys, warnings
from functools import partial
from types import SimpleNamespace
import numpy as np, torch
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import OptimWrapper
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastcore.basics import noop
from torch import nn
from dlfund.data.loading import loaders, seed_everything
from dlfund.training.checkpoints import KeepBestCallback
from dlfund.training.distributed import (DistributedCallback, DistributedCheckpointCallback, gather_states, rank, shard,
                                         start_process_group, stop_process_group, tell_launcher, world_size)
from dlfund.training.metrics import AUC, as_fastai
from dlfund.training.learner import (ClipCallback, DivergedError, EMACallback, EpochLogCallback, GradNormCallback,
                                     QuickLearner, StopOnNaN)

def data(n_train, n_valid):
    rng = np.random.default_rng(0)
    def part(n):
        y = rng.integers(0, 3, n)
        x = rng.integers(0, 200, (n, 8, 8), dtype=np.uint8)
        x[np.arange(n), 2*y] = 255
        return SimpleNamespace(x=x, y=y)
    return SimpleNamespace(name='bars', task='image-classification', train=part(n_train), valid=part(n_valid))

def learner(n_train=58, n_valid=29, bs=7, strategy='ddp', cbs=(), augment=False, loss_func=None):
    dls = loaders(data(n_train, n_valid), lambda x: x[:, None].double()/255, bs=bs, augment=augment)
    dls.train.drop_last = False
    seed_everything(0, dls)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(108, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    if rank():
        with torch.no_grad():
            for p in model.parameters(): p.fill_(7.) # rank 0's weights must win
    metrics = [accuracy, F1Score(average='macro'), as_fastai(AUC(positive=1))]
    learn = QuickLearner(shard(dls), model, loss_func or nn.CrossEntropyLoss(label_smoothing=0.1), metrics=metrics,
                         opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                         cbs=[EpochLogCallback(noop), DistributedCallback(strategy), *cbs])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def outcome(learn):
    rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in learn.epoch_log.history]
    weights = {k: v.tolist() for k, v in learn.model.state_dict().items()}
    moments = [v.tolist() for s in learn.opt.opt.state_dict()['state'].values() for v in s.values()]
    return dict(rows=rows, weights=weights, moments=moments, kind=type(learn.model).__name__,
                norms=[float(n) for n in learn.grad_norm.norms], modules=[type(m).__name__ for m in learn.model])

def everything(strategy):
    cbs = [ClipCallback(norm=1.), GradNormCallback(), EMACallback(0.5), KeepBestCallback(),
           EarlyStoppingCallback(patience=2, min_delta=10.)] # stops after three epochs
    learn = learner(strategy=strategy, cbs=cbs)
    learn.fit(5, 0.01)
    learn.fit(1, 0.01) # weights and moments are carried on
    return outcome(learn)
'''


def work(
    folder:Path, # gets the program
    code:str, # after `WORK`
    n:int=2, # processes
    advice=None, # as for `launch`
    timeout:float=60, # seconds in which it must end
)->tuple[int, str, str]: # status, what rank 0 printed, what was said on standard error
    "Run processes of a program."
    (folder/'work.py').write_text(WORK)
    (folder/'main.py').write_text(f'from work import *\nstart_process_group(timeout=30)\n'
                                  f'{code}\nstop_process_group()\n')
    begin, err = time.monotonic(), io.StringIO()
    with open(folder/'out', 'w+') as out, redirect_stderr(err):
        status = launch(n, [folder/'main.py', folder], program=PYTHON, out=out, advice=advice)
        out.seek(0)
        printed = out.read()
    assert time.monotonic() - begin < timeout
    assert not psutil.Process().children(recursive=True), 'a process is left'
    return status, printed, err.getvalue()


def close(a, b, where=''):
    "Compare trees of numbers."
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: close(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): close(x, y, f'{where}[{i}]')
    elif isinstance(a, float): assert abs(a - b) <= 1e-6*max(1, abs(a)), (where, a, b)
    else: assert a == b, where


def test_several_processes_are_one(tmp_path):
    "Weights, moments, losses, metrics, gradient norms, early stopping; uneven and empty parts; two strategies."
    code = '''
found = {s: everything(s) for s in ('ddp', 'fsdp')}
same = [json.dumps(s, sort_keys=True) for s in gather_states(found)]
assert len(set(same)) == 1 # every process has the same bits
if rank() == 0: print(json.dumps(found))'''
    results = {}
    for n in 1, 3:
        status, printed, err = work(tmp_path, code, n)
        assert (status, err) == (0, '')
        results[n] = json.loads(printed.splitlines()[-1]) # before it, fastai says that it stops early
    one, three = results[1]['ddp'], results[3]
    assert [row['epoch'] for row in one['rows']] == [1, 2, 3, 1] and one['kind'] == 'Sequential'
    assert 'BatchNorm2d' in one['modules']
    for strategy in ('ddp', 'fsdp'): close(three[strategy], one, strategy)


def test_nan_on_one_process_stops_all_with_one_line(tmp_path):
    code = '''
class Spoil(nn.CrossEntropyLoss):
    def forward(self, pred, y):
        loss = super().forward(pred, y)
        return loss*float('nan') if rank() == 1 else loss
try: learner(loss_func=Spoil(), cbs=[StopOnNaN(), GradNormCallback()]).fit(1, 0.01)
except DivergedError as e: sys.exit('dlfund: ' + str(e).splitlines()[-1].strip())'''
    status, _, err = work(tmp_path, code)
    assert status == 1 and len(err.splitlines()) == 1, err
    assert 'the training loss must stay finite, got nan in epoch 1, batch 1' in err


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_killed_and_resumed_run_has_the_same_bits(tmp_path, strategy):
    code = f'''
import os, signal, time
class Die(Callback):
    order = 2000
    def after_batch(self):
        if rank() == 1 and self.train_iter == 13:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
def go(name, resume=False, cbs=()):
    extra = [ClipCallback(norm=1.), GradNormCallback(), EMACallback(0.5),
             DistributedCheckpointCallback(f'{{sys.argv[1]}}/{{name}}', resume, steps=2)]
    learn = learner(strategy={strategy!r}, augment=True, cbs=[*extra, *cbs])
    learn.fit(3, 0.01)
    return outcome(learn)
if os.path.exists(f'{{sys.argv[1]}}/killed'): found = go('killed', True)
else:
    found = go('whole')
    if rank() == 0: print(json.dumps(found), flush=True)
    go('killed', cbs=[Die()])
if rank() == 0: print(json.dumps(found))'''
    from dlfund.training.checkpoints import read_checkpoint
    begin = time.monotonic()
    status, printed, err = work(tmp_path, f"tell_launcher(sys.argv[1] + '/killed')\n{code}", advice=lambda run:
                                f"{read_checkpoint(run)['step']} steps")
    assert status == 1 and err == 'dlfund: process 1 of 2 died (SIGKILL); 12 steps\n', err
    whole = json.loads(printed)
    status, printed, err = work(tmp_path, code)
    assert (status, err) == (0, '')
    assert json.loads(printed) == whole
    assert len(list((tmp_path/'killed').iterdir())) == 2


def test_one_process_cannot_resume_two(tmp_path):
    code = '''
learn = learner(cbs=[GradNormCallback(), DistributedCheckpointCallback(f'{sys.argv[1]}/run', world_size() == 1)])
try: learn.fit(1, 0.01)
except ValueError as e: print(str(e).splitlines()[-1].strip())'''
    assert work(tmp_path, code, 2)[0] == 0
    status, printed, _ = work(tmp_path, code, 1)
    assert printed.strip() == 'a resumed run must have as many processes as before, got 1, saved 2: use --nproc 2'


def test_failure_of_one_process_ends_all_and_is_said_once(tmp_path):
    code = '''
if rank() == 1: sys.exit('dlfund: the disk is on fire')
import torch.distributed as dist
dist.all_reduce(torch.ones(3))'''
    status, _, err = work(tmp_path, code, timeout=20)
    assert status == 1 and err == 'dlfund: the disk is on fire\n', err
    status, _, err = work(tmp_path, "sys.exit('dlfund: train.lr must be positive')")
    assert status == 1 and err == 'dlfund: train.lr must be positive\n', err


def test_two_agents_on_one_machine(tmp_path):
    "`torchrun --nnodes 2`, both nodes here."
    (tmp_path/'sum.py').write_text("""
import torch, torch.distributed as dist
from dlfund.training.distributed import rank, start_process_group, stop_process_group
start_process_group(timeout=30)
x = torch.ones(1)
dist.all_reduce(x)
if rank() == 0: print('sum', int(x), dist.get_world_size())
stop_process_group()
""")
    from dlfund.training.distributed import _free_port
    words = [*PYTHON, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d',
             '--rdzv-endpoint', f'127.0.0.1:{_free_port()}', '--rdzv-id', '7', str(tmp_path/'sum.py')]
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    agents = [subprocess.Popen(words, cwd=tmp_path, env=environment(), **pipes) for _ in range(2)]
    said = [agent.communicate(timeout=60)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert any('sum 2 2' in text for text in said)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_train_with_a_killed_process(tmp_path, strategy):
    "The command: one process is killed, the other ends, one line says how to go on, and that works."
    words = ['train', '--nproc', '2', '--strategy', strategy, 'train.epochs=2', 'data.bs=250', 'checkpoint.steps=3', 'checkpoint.seconds=0']
    process = start(*words, cwd=tmp_path)
    try:
        until = time.monotonic() + 60
        saved = lambda: len(list(tmp_path.glob('runs/*/checkpoints/*.safetensors')))
        while saved() < 2 and time.monotonic() < until: time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        next(p for p in children if p.environ()['RANK'] == '1').kill()
        begin = time.monotonic()
        _, err = process.communicate(timeout=30)
    finally: process.kill()
    assert time.monotonic() - begin < 15 and process.returncode == 1
    more = ['--nproc', '2', *(['--strategy', strategy] if strategy == 'fsdp' else [])]
    found = re.fullmatch(r'dlfund: process 1 of 2 died \(SIGKILL\); .* go on with '
                         rf'`dlfund train --resume (\S+) {" ".join(more)}`\n', err)
    assert found, err
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)
    ran = run('train', '--resume', found[1], *more, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count('epoch 2/2') == 1 and (tmp_path/ran.stdout.splitlines()[-1]).is_dir()
    assert len(list((tmp_path/'runs').iterdir())) == 1
