"Metrics across real processes: the states of two uneven shards merge to the value of all examples."
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dlfund.training.metrics import AUC, Accuracy, CalibrationError, ClassScore, Perplexity, sync

CUT, N, N_CLASSES = 23, 131, 5


def examples():
    "The same logits and labels in every process."
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, N_CLASSES, generator=generator), torch.randint(N_CLASSES, (N,), generator=generator)


def metrics(): return [Accuracy(), ClassScore('f1', N_CLASSES), CalibrationError(), Perplexity(), AUC(positive=1)]


def gather(value):
    "Tensors of all processes, of different lengths."
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def work(rank, folder):
    "One process: see a share of the examples, synchronize, and write down the values."
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    z, y = examples()
    mine, values = slice(CUT) if rank == 0 else slice(CUT, None), []
    for metric in metrics():
        metric.update(z[mine], y[mine])
        for _ in range(2): whole = sync(metric, dist.all_reduce, gather) # a second call counts nobody twice
        values.append(whole.compute().item())
    torch.save(values, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    z, y = examples()
    for metric, *values in zip(metrics(), *(torch.load(tmp_path/f'{rank}.pt') for rank in range(2))):
        metric.update(z, y)
        assert values == [pytest.approx(metric.compute().item(), rel=1e-12)] * 2, metric.name


def test_a_process_without_examples():
    "A share may be empty."
    z, y = examples()
    for metric in metrics():
        metric.update(z, y)
        expected = metric.compute()
        metric.update(z[:0], y[:0])
        assert math.isclose(metric.compute(), expected)
