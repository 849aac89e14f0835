"Tracking with real processes, a disk that is really full, and a server that does not answer."
import os, pickle, signal, sqlite3, subprocess, sys, time, warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn

from conftest import environment
from dlfund.data.loading import ArrayLoader
from dlfund.training import tracking
from dlfund.training.tracking import (LocalTracker, MLflowTracker, SafeTracker, Tracker, TrackingCallback, find_runs,
                                      format_table, list_runs, make_tracker, read_histograms, read_record, read_run, show_run)


def learner(cbs=(), model=None, y=None, loss=None, n=96):
    "A `Learner` on random numbers."
    torch.manual_seed(0)
    x, labels = torch.randn(n, 7), torch.randint(3, (n,))
    dl = lambda: ArrayLoader(x, labels if y is None else y(x), bs=8)
    net = model or nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Dropout(0.2), nn.Linear(11, 3))
    learn = Learner(DataLoaders(dl(), dl()), net, loss or nn.CrossEntropyLoss(),
                    opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=cbs)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


def weights(learn): return {name: p.detach() for name, p in learn.model.named_parameters()}


def fit_tracked(*trackers, **kwargs):
    "An epoch that is tracked: its weights, and what was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = learner(TrackingCallback(trackers, steps=1, **kwargs))
        learn.fit(1)
    return weights(learn), [str(w.message) for w in said if 'the training goes on' in str(w.message)]


@pytest.fixture(scope='module')
def untracked():
    learn = learner()
    learn.fit(1)
    return weights(learn)


def same(one, other): torch.testing.assert_close(one, other, rtol=0, atol=0)


# Killed

ENDLESS = '''if True:
    import sys
    from test_training_tracking import LocalTracker, TrackingCallback, learner
    learn = learner(TrackingCallback([LocalTracker(sys.argv[1], seconds=0.05)], steps=1, run=dict(name='doomed')))
    print('ready', flush=True)
    learn.fit(10**6)'''


@pytest.mark.parametrize('seconds', [1.1, 2.3])
def test_a_killed_training_leaves_a_whole_file(tmp_path, seconds):
    process = subprocess.Popen([sys.executable, '-c', ENDLESS, str(tmp_path/'run')], cwd=os.path.dirname(__file__),
                               env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    while not (tmp_path/'run'/'metrics.sqlite').exists(): time.sleep(0.01)
    time.sleep(seconds)
    assert read_record(tmp_path/'run').status == 'running'
    process.send_signal(signal.SIGKILL)
    process.wait()
    db = sqlite3.connect(tmp_path/'run'/'metrics.sqlite')
    assert db.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    db.close()
    rows = read_run(tmp_path/'run')
    steps, _ = rows['train/loss']
    assert len(steps) > 5 and (steps == np.arange(1, len(steps) + 1)).all()
    [record] = find_runs(tmp_path)
    assert (record.name, record.status, record.steps) == ('doomed', 'killed', steps[-1])
    assert 'doomed' in format_table(list_runs([record])) and 'train/loss' in format_table(show_run(record))
    again = LocalTracker(tmp_path/'run') # and the run can go on
    again.start(dict(name='doomed', resumed_from=int(steps[3])))
    again.finish()
    assert read_run(tmp_path/'run')['train/loss'][0].tolist() == [1, 2, 3, 4]
    assert read_record(tmp_path/'run').status == 'finished'


def test_an_exception_that_nobody_catches_is_a_failure(tmp_path):
    code = ENDLESS.replace('learn.fit(10**6)', 'learn.fit(1, cbs=Stop())').replace("print('ready', flush=True)", '''
    from fastai.callback.core import Callback
    class Stop(Callback):
        def after_epoch(self): raise RuntimeError('boom')''')
    ran = subprocess.run([sys.executable, '-c', code, str(tmp_path/'run')], cwd=os.path.dirname(__file__),
                         env=environment(), capture_output=True, text=True)
    assert 'boom' in ran.stderr
    assert read_record(tmp_path/'run').status == 'failed'
    assert len(read_run(tmp_path/'run')['train/loss'][0]) == 12 # nothing is lost


# Broken, full, absent

@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() != 0, reason='only root can mount')
def test_a_disk_that_is_really_full(tmp_path, untracked):
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        found, said = fit_tracked(LocalTracker(disk/'run', seconds=0), histograms=1, images=1)
        same(found, untracked)
        assert len(said) == 1 and 'full' in said[0], said
    finally: subprocess.run(['umount', '-l', str(disk)], check=True)


def test_a_folder_that_cannot_be_made(tmp_path, untracked):
    (tmp_path/'file').write_text('not a folder')
    found, said = fit_tracked(LocalTracker(tmp_path/'file'))
    same(found, untracked)
    assert len(said) == 1 and 'failed in start' in said[0], said


def test_a_file_that_is_no_database(tmp_path, untracked):
    (tmp_path/'metrics.sqlite').write_bytes(b'no database at all ' * 99)
    found, said = fit_tracked(LocalTracker(tmp_path))
    same(found, untracked)
    assert len(said) == 1 and 'not a database' in said[0], said


def test_a_server_that_is_not_there(tmp_path, untracked):
    pytest.importorskip('mlflow')
    begin = time.monotonic()
    found, said = fit_tracked(SafeTracker(MLflowTracker(tmp_path, uri='http://127.0.0.1:9'), patience=1))
    same(found, untracked)
    assert len(said) == 1 and 'MLflowTracker' in said[0], said
    assert time.monotonic() - begin < 30


def test_warnings_that_are_errors_do_not_end_the_run(tmp_path, untracked):
    class Broken(Tracker):
        def scalars(self, step, values): raise OSError('broken')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn = learner(TrackingCallback([Broken()], steps=1))
        learn.fit(1)
    same(weights(learn), untracked)


def test_a_distribution_is_that_of_the_moment_it_was_told(tmp_path):
    safe, values = SafeTracker(LocalTracker(tmp_path)), torch.zeros(101)
    safe.start(dict(name='copy'))
    safe.histogram(1, 'weight', values)
    values.fill_(7.0)
    safe.finish()
    [(_, _, edges)] = read_histograms(tmp_path, 'weight')
    assert edges[0] <= 0 <= edges[-1] < 7


def test_heavy_notes_do_not_fill_the_memory():
    class Slow(Tracker):
        def histogram(self, step, name, values): time.sleep(60)
    safe = SafeTracker(Slow(), patience=0.2, max_bytes=10_000)
    safe.start(dict(name='slow'))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for step in range(50): safe.histogram(step, 'weight', torch.zeros(1000))
        safe.finish()
    assert safe.lost >= 46 and len(said) == 1


# Other learners

def test_only_the_first_process_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, 'get_rank', lambda: rank)
        learn = learner(TrackingCallback([LocalTracker(tmp_path)], steps=1))
        learn.fit(1)
        assert learn.tracking.step == 12 # counted in every process, so that checkpoints agree
        assert (tmp_path/'metrics.sqlite').exists() == (rank == 0)


class Two(nn.Module):
    "A layer that returns two things, and is called twice."
    def __init__(self):
        super().__init__()
        self.lin, self.relu, self.out = nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 1)
    def forward(self, x): return self.out(self.relu(self.lin(self.relu(self.lin(x)))))


def test_regression_without_pictures(tmp_path):
    learn = learner(TrackingCallback([LocalTracker(tmp_path)], steps=2, histograms=1, images=1), Two(),
                    lambda x: x[:, :1].contiguous(), nn.MSELoss())
    learn.fit(2)
    rows = read_run(tmp_path)
    assert {'dead/relu', 'dead/relu#2', 'train/grad_norm', 'valid/loss', 'lr'} <= rows.keys()
    assert rows['train/loss'][0].tolist() == list(range(2, 25, 2))
    assert len(read_histograms(tmp_path, 'grad/lin.weight')) == len(read_histograms(tmp_path, 'weight/lin.weight')) == 2
    assert read_record(tmp_path).status == 'finished'


def test_two_fits_are_one_run(tmp_path):
    learn = learner(TrackingCallback([LocalTracker(tmp_path)], steps=1))
    learn.fit(1)
    learn.fit(1)
    assert read_run(tmp_path)['train/loss'][0].tolist() == list(range(1, 25))


def test_a_finished_callback_can_be_pickled(tmp_path):
    learn = learner(TrackingCallback([LocalTracker(tmp_path)], steps=1))
    learn.fit(1)
    callback = learn.tracking
    learn.remove_cb(callback)
    assert pickle.loads(pickle.dumps(callback)).step == 12


@pytest.mark.parametrize('name, package', [('tensorboard', 'tensorboard'), ('mlflow', 'mlflow'), ('wandb', 'wandb'),
                                           ('neptune', 'neptune')])
def test_a_missing_package_names_the_extra(name, package, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=rf"{package}, got none: pip install 'dlfund\[track\]'"): make_tracker(name, tmp_path)
