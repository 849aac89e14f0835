"Loaders with real worker processes: one that dies, is killed, hangs, raises, or does its work. Nothing may hang, no process may be left."
import gc, multiprocessing, os, re, signal, time

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
import fastai.callback.progress # adds Learner.no_bar

from dlfund.data.loading import seed_everything
from dlfund.training.debugging import LoaderError, diagnose, n_workers, watched


class Faulty:
    "Two hundred examples; at number 57 something happens."
    def __init__(self, fault=None): self.fault = fault
    def __len__(self): return 200
    def __getitem__(self, i):
        if i == 57 and self.fault == 'exits': os._exit(3)
        if i == 57 and self.fault == 'is killed': os.kill(os.getpid(), signal.SIGKILL)
        if i == 57 and self.fault == 'hangs': time.sleep(600)
        if i == 57 and self.fault == 'raises': raise KeyError('example 57 has no picture')
        return torch.full((3,), float(i)), i % 2


def faulty_loader(fault, kind):
    "A loader of fastai's or PyTorch's, with two workers."
    if kind == 'fastai': return DataLoader(Faulty(fault), bs=10, num_workers=2)
    return torch.utils.data.DataLoader(Faulty(fault), batch_size=10, num_workers=2)


def read(dl, timeout=20.0):
    "Read an epoch under watch."
    with watched(dl, timeout=timeout): return list(dl)


def nobody_left():
    "Whether all workers have ended."
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        gc.collect() # an iterator in a reference cycle keeps its workers until then
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize('kind', ['fastai', 'torch'])
@pytest.mark.parametrize('fault', ['exits', 'is killed'])
def test_a_worker_that_dies_is_one_clear_error(fault, kind):
    for _ in range(8): # the death arrives as a signal, as a broken connection or at the next look: every way must do
        dl, before = faulty_loader(fault, kind), signal.getsignal(signal.SIGCHLD)
        with pytest.raises(LoaderError, match='a loader must keep its workers alive, got: ') as caught: read(dl)
        if kind == 'fastai': assert re.search(r'worker 1 began example 57 \d', str(caught.value))
        assert nobody_left()
    assert 'create_item' not in vars(dl) and signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_a_worker_that_hangs_is_one_clear_error(kind):
    dl, begin = faulty_loader('hangs', kind), time.monotonic()
    with pytest.raises(LoaderError, match='must give a batch within 1 s, got none') as caught: read(dl, timeout=1.0)
    if kind == 'fastai': assert 'worker 1 began example 57' in str(caught.value)
    del caught
    assert time.monotonic() - begin < 15 and nobody_left()


def test_an_error_of_the_data_keeps_its_own_type():
    with pytest.raises(KeyError, match='example 57 has no picture'): read(faulty_loader('raises', 'fastai'))
    with pytest.raises(OSError, match='of the user'):
        with watched(faulty_loader(None, 'fastai')): raise OSError('of the user')


def test_workers_that_work_give_the_same_batches():
    dl = faulty_loader(None, 'fastai')
    assert n_workers(dl) == 2 and dl.fake_l.timeout == 0
    with_workers, without = read(dl), list(DataLoader(Faulty(), bs=10))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(with_workers, without, strict=True))
    assert dl.fake_l.timeout == 0 and nobody_left()


def test_a_death_in_the_midst_of_a_fit():
    dls = DataLoaders(faulty_loader('exits', 'fastai'), DataLoader(Faulty(), bs=50))
    learn = Learner(dls, nn.Linear(3, 2), nn.CrossEntropyLoss())
    with pytest.raises(LoaderError, match='example 57'):
        with watched(*dls.loaders, timeout=20), learn.no_bar(), learn.no_logging(): learn.fit(1)


def test_diagnosis_with_workers_leaves_the_next_epoch_as_it_was():
    def epochs(look):
        dls = DataLoaders(*(DataLoader(Faulty(), bs=20, shuffle=True, num_workers=2) for _ in range(2)))
        seed_everything(3, dls)
        torch.manual_seed(3)
        learn = Learner(dls, nn.Linear(3, 2), nn.CrossEntropyLoss())
        if look: diagnose(learn, n_steps=3)
        return [y.tolist() + x[:, 0].tolist() for x, y in dls.train], learn.model.weight.tolist()
    assert epochs(True) == epochs(False)
