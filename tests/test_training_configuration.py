"What a cell cannot test of configurations: composed files on the real command line, and what a start imports."
import subprocess, sys

import pytest
import yaml
from conftest import ROOT, environment, one_line, run

from dlfund.training.configuration import Experiment, differences, fingerprint, read_experiment

BASE = 'train:\n  epochs: 1\n  lr: 0.002\n'
WRONG = {
    'base: base.yaml\ntrain:\n  weight-decay: 0.1\n': ('child.yaml, line 3', "'train.weight_decay'"),
    'base: base.yaml\ntrain: {epochs: ten}\n': ('child.yaml, line 2', 'train.epochs'),
    'base: [base.yaml, wrong.yaml]\n': ('wrong.yaml, line 2', 'train.schedule'),
    'base: gone.yaml\n': ('gone.yaml', 'base of child.yaml'), 'base: 3\n': ('child.yaml', 'base'),
    'base: child.yaml\n': ('child.yaml on child.yaml',), 'base: loop.yaml\n': ('child.yaml on loop.yaml on child.yaml',),
    'train:\n  lr: 1\n  lr: 2\n': ("'lr' stands in line 2", 'line 3'), 'base: .\n': ('directory',),
    'train:\n': ('child.yaml, line 1', 'train'), 'callbacks: {ema: 3}\n': ('child.yaml, line 1', 'callbacks.ema'),
    'callbacks: {a.b: {}}\n': ("'a.b'",), 'train.lr: 1\n': ("'train.lr'",), 'data: {augment: no}\n': ('data.augment',),
    'a: &a [1, &b [*a, *b]]\n': ('',), '[' * 2000: ('child.yaml',), f'train: {{seed: {"9"*5000}}}\n': ('child.yaml',),
    '&a {*a : 1}\n': ('',), '? [a]\n: 1\n': ('child.yaml',), 'out: !!binary aGk=\n': ('out',)}


@pytest.fixture
def files(tmp_path):
    "A base, one that is wrong, and one that is built on the file of the test."
    for name, text in {'base': BASE, 'wrong': 'train:\n  schedule: cosin\n', 'loop': 'base: child.yaml\n'}.items():
        (tmp_path/f'{name}.yaml').write_text(text)
    return tmp_path


@pytest.mark.parametrize('text', WRONG, ids=range(len(WRONG)))
def test_a_wrong_composed_file(cli, files, text):
    (files/'child.yaml').write_text(text)
    line = one_line(cli('train', 'child.yaml'), 2)
    for part in WRONG[text]: assert part in line
    assert len(line) < 500
    assert sorted(p.name for p in files.iterdir()) == ['base.yaml', 'child.yaml', 'loop.yaml', 'wrong.yaml']


def test_a_real_process_says_where(files):
    (files/'sub').mkdir()
    (files/'sub'/'child.yaml').write_text('base: ../base.yaml\ntrain:\n  epoch: 3\n')
    line = one_line(run('train', 'sub/child.yaml', cwd=files, timeout=60), 2)
    assert line.startswith("unknown key 'train.epoch': the nearest valid one is 'train.epochs'")
    assert 'sub/child.yaml, line 3' in line


def test_a_composed_run_keeps_what_was_resolved(files, tiny):
    (files/'child.yaml').write_text('base: base.yaml\ndata: {name: mnist, bs: 90}\nmodel: {width: 0.5}\n')
    ran = run('train', 'child.yaml', 'train.seed=5', cwd=files, program=tiny, timeout=300)
    assert ran.returncode == 0, ran.stderr
    kept, = files.glob('runs/*/experiment.yaml')
    (files/'base.yaml').unlink() # the record stands alone
    written = read_experiment(kept)
    asked = {'data.name': 'mnist', 'data.bs': 90, 'model.width': 0.5, 'train.epochs': 1, 'train.lr': 0.002, 'train.seed': 5}
    assert {key: theirs for key, (_, theirs) in differences(Experiment(), written).items()} == asked
    assert yaml.safe_load(kept.read_text())['train']['schedule'] == '1cycle'


def test_the_configurations_of_the_repository():
    main = read_experiment(ROOT/'configs'/'image_classification.yaml')
    assert main == Experiment()
    kept = [read_experiment(file) for file in sorted((ROOT/'configs'/'cnn').glob('*.yaml'))]
    assert len({fingerprint(e) for e in [main, *kept]}) == len(kept) + 1


def test_reading_needs_neither_torch_nor_fastai(tmp_path):
    code = ('import sys; from dlfund.training.configuration import read_experiment; read_experiment(None, ["train.lr=1"]);'
            'assert not {"torch", "fastai", "pandas"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment(), check=True, timeout=60)


def test_the_fingerprint_is_the_same_in_another_process(tmp_path):
    code = 'from dlfund.training.configuration import *; print(fingerprint(read_experiment(None, ["callbacks.a.b=1e-3"])))'
    prints = {subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment(PYTHONHASHSEED=str(seed)),
                             check=True, capture_output=True, text=True).stdout.strip() for seed in (1, 2)}
    assert prints == {fingerprint(read_experiment(None, ['callbacks.a={b: 0.001}']))}
