"Every dataset that `load` knows: embedded ones, small ones in each published format, and the real ones where they are."
import json, os
from pathlib import Path

import numpy as np
import pytest

from conftest import MAKERS, ROOT
from dlfund.data.datasets import CIFAR10_LABELS, EMBEDDED_TASKS, REGISTER, describe, file_hash, find, load, names
from dlfund.data.datasets import stratified_split

EMBEDDED = ROOT/'dlfund'/'data'/'embedded'
SOURCES = json.loads((EMBEDDED/'sources.json').read_text(encoding='utf-8'))
REAL = Path(os.environ.get('DLFUND_DATA') or ROOT.parent/'shared'/'data')
PARTS = 'train', 'valid', 'test'


def quietly(name): return load(name, say=lambda line: None)


def parts(splits):
    "The three parts by name, without counting a reading."
    return dict(train=splits.train, valid=splits.valid, test=splits._test)


def inputs(part): return [v.tobytes() if isinstance(v, np.ndarray) else v for v in part.x]


def check(splits):
    "What must hold of any dataset."
    seen = set()
    for name, part in parts(splits).items():
        assert len(part) > 0
        if 'classification' not in splits.task: continue
        assert len(part.y) == len(part.x) and part.y.dtype == np.uint8, name
        assert set(part.y) == set(range(len(splits.labels))), name
        found = set(inputs(part))
        assert len(found) == len(part) or name == 'test', f'{name} holds copies'
        assert not found & seen, f'{name} shares inputs with another part'
        seen |= found


# Embedded

@pytest.mark.parametrize('name', EMBEDDED_TASKS)
def test_embedded_files_are_those_recorded(name):
    file = EMBEDDED/SOURCES[name]['file']
    assert file_hash(file) == SOURCES[name]['sha256'] and file.stat().st_size == SOURCES[name]['bytes']
    assert SOURCES[name]['licence'] and SOURCES[name]['source']['files']
    assert f'`{file.name}`' in (EMBEDDED/'LICENSES.md').read_text(encoding='utf-8')


def test_embedded_files_are_small():
    assert SOURCES.keys() == EMBEDDED_TASKS.keys()
    recorded = {entry['file'] for entry in SOURCES.values()}
    assert {p.name for p in EMBEDDED.iterdir()} == recorded | {'sources.json', 'LICENSES.md'}
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) <= 6_000_000


@pytest.mark.parametrize('name', EMBEDDED_TASKS)
def test_embedded_datasets(name):
    splits, again = load(name), load(name)
    check(splits)
    assert splits.name == name and splits.task == EMBEDDED_TASKS[name] and splits.removed == {}
    assert splits.sha256 == again.sha256
    if splits.task != 'text': assert {n: len(p) for n, p in parts(splits).items()} == SOURCES[name]['counts']


def test_fashion_mini():
    splits = load('fashion-mini')
    assert splits.train.x.shape == (9000, 28, 28) and splits.train.x.dtype == np.uint8 and len(splits.labels) == 10
    for part, n in zip(parts(splits).values(), (900, 100, 200)): assert np.bincount(part.y).tolist() == [n]*10


def test_reviews():
    splits = load('reviews')
    shares = [part.y.mean() for part in parts(splits).values()]
    assert splits.labels == ['negative', 'positive'] and max(shares) - min(shares) < 0.002
    assert all(isinstance(text, str) and '\n' not in text for text in splits.train.x)


@pytest.mark.parametrize('name, unit, n_columns', [('seattle-temps', 'h', 1), ('stocks', 'D', 8)])
def test_series_go_on_in_time(name, unit, n_columns):
    splits = load(name)
    times = np.concatenate([part.index for part in parts(splits).values()])
    assert times.dtype == f'datetime64[{unit}]' and (np.diff(times) > np.timedelta64(0)).all()
    assert splits.train.x.dtype == np.float32 and splits.train.x.shape[1] == n_columns == len(splits.labels)


def test_shakespeare():
    splits = load('shakespeare')
    assert [len(part) for part in parts(splits).values()] == [9, 1, 1] and splits.test.x[0].startswith('ACT')
    assert set(splits.valid.x[0] + splits.test.x[0]) <= set(''.join(splits.train.x))


def test_reading_the_test_part_is_counted():
    splits = load('reviews')
    assert len(splits.train) > 0 and '_test=' not in repr(splits) and splits.n_test_reads == 0
    assert splits.test is splits.test and splits.n_test_reads == 2


@pytest.mark.parametrize('seed', [0, 1])
def test_a_stratified_split(seed):
    y = np.random.default_rng(seed).integers(0, 7, 1000)
    stay, held = stratified_split(y, 0.2, seed)
    assert sorted([*stay, *held]) == list(range(1000))
    for c in range(7): assert np.sum(y[held] == c) == round(0.2*np.sum(y == c))


# Every published format

SHAPES = {'mnist': (28, 28), 'fashion-mnist': (28, 28), 'cifar10': (32, 32, 3)}
SIZES = {'mnist': (598, 200), 'fashion-mnist': (598, 200), 'cifar10': (100, 20), 'imdb': (40, 8), 'sst2': (24, 6),
         'ag-news': (80, 8), 'etth1': (11_520, 2880), 'etth2': (11_520, 2880), 'tinyshakespeare': (2, 1)}


def test_every_dataset_has_a_small_one():
    assert {name for name, _ in MAKERS} == set(REGISTER) == set(names()) - set(EMBEDDED_TASKS)


@pytest.mark.parametrize('name, layout', MAKERS, ids=lambda v: str(v))
def test_small_datasets(small, name, layout):
    small(name, layout)
    splits, again = quietly(name), quietly(name)
    check(splits)
    assert splits.sha256 == again.sha256 and splits.labels == list(describe(name).labels)
    assert (len(splits.train) + len(splits.valid), len(splits.test)) == SIZES[name]
    if name in SHAPES: assert splits.train.x.shape[1:] == SHAPES[name] and splits.train.x.dtype == np.uint8


def test_copies_are_removed_from_training_never_from_test(small):
    small('mnist')
    said = []
    splits = load('mnist', say=said.append)
    assert sum(splits.removed.values()) == 2 and 'test' not in splits.removed and len(splits.test) == 200
    assert len(said) == 1 and 'copies removed' in said[0]


def test_cifar_planes_become_channels(small):
    small('cifar10')
    splits = quietly('cifar10')
    for part in parts(splits).values():
        assert (part.x[:, 0, 0, 0] == part.y).all() and (part.x[:, 0, 0, 1:] == [50, 100]).all()


def test_cifar_folders_become_classes(small):
    small('cifar10', 1)
    splits = quietly('cifar10')
    assert [np.bincount(part.y).tolist() for part in parts(splits).values()] == [[9]*10, [1]*10, [2]*10]
    assert splits.labels == list(CIFAR10_LABELS)


def test_texts_keep_their_class(small):
    for name in 'imdb', 'sst2', 'ag-news': small(name)
    imdb, news = quietly('imdb'), quietly('ag-news')
    for part in parts(imdb).values():
        assert all(label == ('pos' in text) and text.endswith('é') for text, label in zip(part.x, part.y))
    assert news.test.x == [f'Title, {i}. test says "{i}"' for i in range(8)] and news.test.y.tolist() == [0, 1, 2, 3]*2


def test_ett_months(small):
    small('etth1')
    splits, month = quietly('etth1'), 30*24
    for part, first in zip(parts(splits).values(), (0, 12*month, 16*month)):
        assert part.x[0].tolist() == [first + c for c in range(7)] and part.x.dtype == np.float32
        assert part.index[0] == np.datetime64('2016-07-01T00') + first


def test_tinyshakespeare_is_cut_in_order(small):
    folder = small('tinyshakespeare')
    text = ''.join(part.x[0] for part in parts(quietly('tinyshakespeare')).values())
    assert text == (folder/'tinyshakespeare.txt').read_text()


def test_a_folder_given_as_root_wins(small, tmp_path, monkeypatch):
    folder = small('sst2')
    monkeypatch.setenv('DLFUND_DATA', str(tmp_path/'elsewhere'))
    assert len(load('sst2', root=folder, say=lambda line: None).test) == 6


# The real ones, where they are

COUNTS = {'mnist': (60_000, 10_000), 'fashion-mnist': (60_000, 10_000), 'cifar10': (50_000, 10_000),
          'imdb': (25_000, 25_000), 'sst2': (6920 + 872, 1821), 'ag-news': (120_000, 7600),
          'etth1': (11_520, 2880), 'etth2': (11_520, 2880), 'tinyshakespeare': (2, 1)}


@pytest.mark.parametrize('name', REGISTER)
def test_real_datasets(name, monkeypatch):
    monkeypatch.setenv('DLFUND_DATA', str(REAL))
    if find(describe(name)) is None: pytest.skip(f'{name} is neither in {REAL} nor in /usr/share/datasets')
    splits = quietly(name)
    check(splits)
    n_removed = sum(splits.removed.values())
    assert (len(splits.train) + len(splits.valid) + n_removed, len(splits.test)) == COUNTS[name]
    assert 'test' not in splits.removed and n_removed < 0.01*sum(COUNTS[name])
    if name != 'cifar10': assert quietly(name).sha256 == splits.sha256
