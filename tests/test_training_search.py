"A search that is killed goes on as if nothing had happened, and one that cannot begin says why in one line."
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest

optuna = pytest.importorskip('optuna')
from dlfund.training.search import make_search, read_search, search

ROOT = Path(__file__).resolve().parent.parent
SEARCH = '''
base: {train: {epochs: 4}}
space:
  train.lr: {low: 1e-3, high: 1, log: true}
  train.weight_decay: {low: 0, high: 0.1}
  data.augment: {choices: [true, false]}
trials: 12
pruner: PRUNER
'''
PROGRAM = '''
import os, sys, time
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn
from dlfund.data.loading import ArrayLoader, seed_everything
from dlfund.training.search import run_search

generator = torch.Generator().manual_seed(0)
x = torch.randn(240, 7, generator=generator)
y = (x[:, 0] + x[:, 1]**2 > 1).long()
calls, dies_at = 0, int(sys.argv[3])

def train(experiment, cbs):
    global calls
    calls += 1
    dls = DataLoaders(ArrayLoader(x[:160], y[:160], bs=20, shuffle=True), ArrayLoader(x[160:], y[160:], bs=80))
    seed_everything(experiment.train.seed, dls)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), lr=experiment.train.lr, wd=experiment.train.weight_decay,
                    metrics=accuracy, cbs=cbs)
    if experiment.train.lr > 0.5: raise RuntimeError('the training loss must stay finite, got nan')
    with learn.no_logging():
        if calls == dies_at:
            learn.fit(2)
            print('now', flush=True)
            time.sleep(60) # to be killed here, with two epochs reported
        learn.fit(experiment.train.epochs)
    return {'accuracy': float(learn.recorder.final_record[-1])}

run_search(sys.argv[1], train, sys.argv[2])
'''


def program(tmp_path, pruner):
    "Write the search and the program; return how to start it."
    (tmp_path/'search.yaml').write_text(SEARCH.replace('PRUNER', pruner))
    (tmp_path/'program.py').write_text(PROGRAM)
    return lambda folder, dies_at=0: subprocess.Popen(
        [sys.executable, '-u', tmp_path/'program.py', tmp_path/'search.yaml', tmp_path/folder, str(dies_at)], cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(folder):
    "What the search kept, without times."
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in json.loads((folder/'trials.json').read_text())]


@pytest.mark.parametrize('pruner', ['halving', 'median'])
def test_killed_and_resumed(tmp_path, pruner):
    "SIGKILL in the middle of a trial: the rest is what it would have been, to the last bit."
    start = program(tmp_path, pruner)
    whole, killed = start('whole'), start('parts', dies_at=6)
    assert killed.stdout.readline().startswith('trial 1/12')
    for line in killed.stdout:
        if line == 'now\n': break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    said, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    storage = f"sqlite:///{tmp_path/'parts'/'search.sqlite'}"
    states = [t.state.name for t in optuna.load_study(study_name='search', storage=storage).get_trials(deepcopy=False)]
    assert states[-1] == 'RUNNING' and len(states) == 6
    resumed = start('parts')
    lines, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert lines.startswith('trial 6/12'), lines # five were finished, the sixth is done again
    states = [t.state.name for t in optuna.load_study(study_name='search', storage=storage).get_trials(deepcopy=False)]
    assert len(states) == 13 and states[5] == 'FAIL' and 'RUNNING' not in states
    assert rows(tmp_path/'parts') == rows(tmp_path/'whole')
    assert (tmp_path/'parts'/'best.yaml').read_text() == (tmp_path/'whole'/'best.yaml').read_text()
    assert said.splitlines()[-1].replace('whole', 'parts') == lines.splitlines()[-1]


def test_two_at_once(tmp_path):
    "A second process cannot disturb the first, and can have the storage when the first is dead."
    start = program(tmp_path, 'none')
    first = start('one', dies_at=1)
    assert first.stdout.readline() == 'now\n'
    second = start('one')
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1 and 'one search at a time may use a storage' in errors.splitlines()[-1]
    first.kill(); first.wait()
    assert search(read_search(tmp_path/'search.yaml'), lambda experiment, cbs: 0.5, tmp_path/'one', write=lambda line: None).value == 0.5


def test_failures(tmp_path):
    "Diverged trials are kept and lost ones told; a search of failures ends."
    space = make_search(dict(space={'train.lr': dict(low=0.001, high=0.1, log=True)}, trials=9))
    def train(experiment, cbs):
        if experiment.train.lr > 0.03: raise RuntimeError('diverged')
        return float('nan') if experiment.train.lr > 0.01 else 1 - experiment.train.lr
    result = search(space, train, tmp_path, write=lambda line: None)
    assert len(result.rows) == 9 and {row['state'] for row in result.rows} == {'complete', 'failed'}
    for row in result.rows:
        lr = row['values']['train.lr']
        assert row['error'] == ('diverged' if lr > 0.03 else 'accuracy must be finite, got nan' if lr > 0.01 else None)
    assert result.value == max(row['value'] for row in result.rows if row['state'] == 'complete')
    assert result.best.train.lr == result.rows[result.number]['values']['train.lr']
    def always(experiment, cbs): raise RuntimeError('no memory')
    with pytest.raises(ValueError, match='five failures, the last: no memory'): search(space, always, tmp_path/'never')
    def wrong(experiment, cbs): raise NameError('a mistake in the code')
    with pytest.raises(NameError): search(space, wrong, tmp_path/'wrong')


def test_without_optuna(tmp_path, monkeypatch):
    "The extra is named."
    monkeypatch.setitem(sys.modules, 'optuna', None)
    space = make_search(dict(space={'train.lr': dict(low=0.001, high=1.0)}))
    with pytest.raises(ValueError, match=r"^search needs optuna: pip install 'dlfund\[search\]'$"):
        search(space, lambda experiment, cbs: 1.0, tmp_path)


def test_example_file():
    "The file that the documentation shows is valid."
    space = read_search(ROOT/'configs'/'search.yaml')
    assert set(space.space) == {'train.lr', 'train.weight_decay', 'data.augment', 'model.width'}
    assert space.base.train.epochs == 12
