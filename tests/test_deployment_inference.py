"What a page cannot test of faster inference: many architectures, networks that must be left alone, files, and a missing extra."
import copy, importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save as bytes_from_tensors
from torch import nn
from torch.testing import assert_close

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from dlfund.data.datasets import load
from dlfund.data.loading import loaders, seed_everything
from dlfund.data.preprocessing import fit_preprocess
from dlfund.deployment import inference
from dlfund.deployment.bundle import Bundle
from dlfund.deployment.export import export_onnx
from dlfund.deployment.inference import (DistillCallback, EagerRunner, calibrate, channels_to_keep, compare_latency,
                                         count_operations, dequantize, find_chains, fit_grid, fold, integer_linear,
                                         mask_channels, measure_latency, prune_channels, quantize, quantize_onnx, to_bf16)
from dlfund.deployment.runtime import OnnxRunner
from dlfund.training.configuration import TrainConfig
from dlfund.training.learner import EpochLogCallback
from dlfund.training.runs import make_learner
from dlfund.vision import build

NETWORKS = {'resnet-mini': 28, 'lenet': 28, 'vgg-mini': 28, 'efficientnet-mini': 28, 'resnet18': 48, 'resnet50': 48}


def train(model, splits, preprocess, epochs=1, cbs=(), shuffle_labels=False):
    "A short training, always the same."
    dls = loaders(splits, preprocess)
    if shuffle_labels: dls.train.y = dls.train.y[torch.randperm(len(dls.train.y), generator=torch.Generator().manual_seed(1))]
    seed_everything(0, dls)
    learn = make_learner(dls, model, TrainConfig(epochs=epochs), log=EpochLogCallback(lambda line: None), cbs=cbs)
    learn.fit_one_cycle(epochs, 0.006)
    return learn.model.eval()


@pytest.fixture(scope='module')
def fashion():
    splits = load('fashion-mini')
    return replace(splits, train=replace(splits.train, x=splits.train.x[:4000], y=splits.train.y[:4000]))


@pytest.fixture(scope='module')
def preprocess(fashion): return fit_preprocess(fashion.train.x)


@pytest.fixture(scope='module')
def example(fashion, preprocess): return preprocess(torch.from_numpy(fashion.valid.x[:3]))


@pytest.fixture(scope='module')
def net(fashion, preprocess):
    torch.manual_seed(0)
    return train(build('resnet-mini', 10, n_channels=1), fashion, preprocess, epochs=2)


def exported(model, fashion, preprocess):
    "A model's ONNX file."
    return export_onnx(Bundle(model=model, architecture=dict(name='resnet-mini', n_classes=10, n_channels=1), labels=list(fashion.labels),
                              preprocess=preprocess, metrics={}, data=dict(name=fashion.name, sha256=fashion.sha256), training={}))


@pytest.fixture(scope='module')
def content(net, fashion, preprocess): return exported(net, fashion, preprocess)


@pytest.fixture(scope='module')
def static(content, fashion): return quantize_onnx(content, fashion.train.x[:256])


def accuracy(runner, part): return float((runner(part.x).argmax(-1) == part.y).mean())


def random_network(name, n_channels=1):
    "A network whose normalizations have learned something."
    torch.manual_seed(0)
    model = build(name, 10, n_channels=n_channels).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5), m.bias.data.normal_(), m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('name', NETWORKS)
@torch.inference_mode()
def test_folding_changes_nothing(name):
    model, x = random_network(name), torch.randn(2, 1, NETWORKS[name], NETWORKS[name])
    before, folded = copy.deepcopy(model.state_dict()), fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded.double()(x.double()), model.double()(x.double()), rtol=1e-3, atol=1e-4)
    assert_close(model.float().state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('name', NETWORKS)
@torch.inference_mode()
def test_pruned_equals_masked_and_is_smaller(name):
    model, x = random_network(name), torch.randn(2, 1, NETWORKS[name], NETWORKS[name])
    masked, pruned = mask_channels(model, 0.4, x), prune_channels(model, 0.4, x)
    size = lambda m: len(bytes_from_tensors({k: v.contiguous() for k, v in m.state_dict().items()}))
    assert size(masked) == size(model) and size(pruned) < 0.97*size(model)
    assert_close(pruned.double()(x.double()), masked.double()(x.double()), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError): assert_close(pruned(x.double()), model.double()(x.double()), rtol=1e-4, atol=1e-5)


def test_pruned_can_be_trained_and_exported(net, example, content, fashion, preprocess):
    pruned = train(prune_channels(net, 0.5, example), fashion, preprocess)
    smaller = exported(pruned, fashion, preprocess)
    assert len(smaller) < 0.7*len(content)
    assert_close(OnnxRunner(smaller)(fashion.valid.x[:7]), EagerRunner(pruned, preprocess)(fashion.valid.x[:7]), rtol=1e-3, atol=1e-4)
    assert accuracy(OnnxRunner(smaller), fashion.valid) > accuracy(OnnxRunner(content), fashion.valid) - 0.08
    masked = exported(mask_channels(net, 0.5, example), fashion, preprocess)
    assert abs(len(masked)/len(content) - 1) < 0.01


class Odd(nn.Module):
    "Convolutions whose channels must be left alone, each for another reason."
    def __init__(self):
        super().__init__()
        self.fork, self.shared, self.sigmoid = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)
        self.grouped, self.depth, self.free = nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 7, 3)
        self.plain, self.last = nn.BatchNorm2d(7, affine=False), nn.Linear(7*25, 2)
    def forward(self, x):
        x = self.fork(x)
        x = self.shared(self.shared(x + x.relu()))
        x = self.free(self.depth(self.grouped(self.sigmoid(x).sigmoid())).relu())
        return self.last(x.flatten(1))


def test_channels_with_several_readers_are_left_alone():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 3, 7, 7)
    readers = {c.conv: c.reader for c in find_chains(model, x)}
    assert readers == dict(fork=None, sigmoid=None, grouped=None, depth='free', free='last')
    with torch.inference_mode(): assert_close(prune_channels(model, 0.5, x)(x), mask_channels(model, 0.5, x)(x))
    assert {c.conv for c, _ in channels_to_keep(model, find_chains(model, x), 0.5)} == {'depth', 'free'}


def test_quantized_files_are_small_and_right(content, static, fashion):
    dense, dynamic = accuracy(OnnxRunner(content), fashion.valid), quantize_onnx(content, method='dynamic')
    for made in (static, dynamic):
        assert len(made) <= 0.35*len(content)
        assert accuracy(OnnxRunner(made), fashion.valid) > dense - 0.02
    assert count_operations(static, 'all')['QLinearConv'] == 12 and count_operations(dynamic, 'all')['ConvInteger'] == 12


def test_quantized_takes_and_gives_the_same(content, static, fashion):
    onnx = importlib.import_module('onnx')
    describe = lambda c: [(v.name, v.type.tensor_type.elem_type) for g in [onnx.load_from_string(c).graph] for v in (*g.input, *g.output)]
    facts = lambda c: {p.key: p.value for p in onnx.load_from_string(c).metadata_props}
    assert describe(static) == describe(content) and facts(static) == facts(content) and facts(content)
    onnx.checker.check_model(onnx.load_from_string(static))
    run = OnnxRunner(static)
    together = run(fashion.valid.x[:7])
    assert_close(np.concatenate([run(fashion.valid.x[i:i + 1]) for i in range(7)]), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('calibration', ['percentile', 'entropy'])
def test_other_calibrations(content, fashion, calibration):
    made = quantize_onnx(content, fashion.train.x[:64], calibration=calibration, per_channel=False, reduce_range=True)
    assert accuracy(OnnxRunner(made), fashion.valid) > accuracy(OnnxRunner(content), fashion.valid) - 0.05


def test_bf16_loses_little(net, example, fashion, preprocess):
    half, full = EagerRunner(to_bf16(net, example), preprocess), EagerRunner(net, preprocess)
    assert half(fashion.valid.x[:3]).dtype == np.float32
    assert abs(accuracy(half, fashion.valid) - accuracy(full, fashion.valid)) <= 0.02


@pytest.mark.parametrize('seed', range(5))
def test_integer_products_are_exact_and_bounded(seed):
    torch.manual_seed(seed)
    n, d, outputs = (int(torch.randint(1, 90, ())) for _ in range(3))
    x, w = torch.randn(n, d).double(), torch.randn(outputs, d).double()
    x_grid, w_grid = fit_grid(x.min() - 1, x.max() + 1), fit_grid(w.amin(1, keepdim=True), w.amax(1, keepdim=True), symmetric=True)
    q_x, q_w = quantize(x, x_grid), quantize(w, w_grid)
    y, s_x, s_w = integer_linear(q_x, x_grid, q_w, w_grid), x_grid.scale, w_grid.scale.view(-1)
    assert_close(y, dequantize(q_x, x_grid) @ dequantize(q_w, w_grid).T)
    assert ((y - x @ w.T).abs() <= s_x/2*w.abs().sum(1) + s_w/2*x.abs().sum(1, keepdim=True) + d*s_x*s_w/4 + 1e-9).all()


def test_grids_hold_zero_and_survive_nothing():
    for low, high in ((1., 3.), (-3., -1.), (0., 0.), (-2., 5.)):
        grid = fit_grid(torch.tensor(low), torch.tensor(high))
        assert dequantize(quantize(torch.zeros(1), grid), grid).item() == 0
        assert dequantize(quantize(torch.tensor([low, high]), grid), grid).isfinite().all()


def test_a_full_share_of_the_teacher_ignores_labels(net, fashion, preprocess):
    small = lambda: (torch.manual_seed(0), build('resnet-mini', 10, n_channels=1, width=0.25))[1]
    one, other = (train(small(), fashion, preprocess, cbs=[DistillCallback(net, share=1.0)], shuffle_labels=s) for s in (False, True))
    assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    alone, unheard = train(small(), fashion, preprocess), train(small(), fashion, preprocess, cbs=[DistillCallback(net, share=0.0)])
    assert_close(alone.state_dict(), unheard.state_dict(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError): assert_close(one.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)


def test_turns_are_fair():
    calls = []
    runners = {name: lambda pictures, name=name: calls.append(name) for name in 'abc'}
    found = compare_latency(runners, np.zeros((5, 2, 2), np.uint8), n_turns=6, n_calls=4)
    assert [calls.count(name) for name in 'abc'] == [7*5]*3 and [calls[i*15] for i in range(7)] == list('abcabca')
    assert all(one.bs == 5 and 0 < one.p50 <= one.p95 and one.throughput > 0 for one in found.values())


@pytest.mark.parametrize('call, message', [
    (lambda c, x: quantize_onnx(c), 'got pictures=None'), (lambda c, x: quantize_onnx(c, x[:0]), 'to calibrate on'),
    (lambda c, x: quantize_onnx(c, x, method='int4'), "got 'int4'"), (lambda c, x: quantize_onnx(c, x, calibration='max'), "got 'max'"),
    (lambda c, x: count_operations(c, 'most'), "got 'most'"), (lambda c, x: measure_latency(OnnxRunner(c), x, n_turns=1, n_calls=19), 'at least 20'),
    (lambda c, x: calibrate(torch.zeros(3), 101), 'got 101'), (lambda c, x: fit_grid(torch.ones(1), torch.zeros(1)), 'low must be at most high'),
    (lambda c, x: fit_grid(torch.tensor(float('nan')), torch.ones(())), 'low must be at most high'),
    (lambda c, x: prune_channels(nn.Conv2d(1, 2, 3), 0.5, torch.zeros(1, 1, 5, 5)), 'one reader'),
    (lambda c, x: prune_channels(build('lenet', 10, n_channels=1), -0.1, torch.zeros(1, 1, 28, 28)), 'got -0.1'),
    (lambda c, x: DistillCallback(nn.Identity(), share=-1), 'got -1'), (lambda c, x: DistillCallback(nn.Identity(), temperature=0), 'got 0')])
def test_errors_say_what_must_hold(call, message, content, fashion):
    with pytest.raises(ValueError, match=message): call(content, fashion.train.x[:8])


def test_a_missing_extra_is_named(monkeypatch, content):
    def absent(name): raise ImportError(name)
    monkeypatch.setattr(inference.importlib, 'import_module', absent)
    with pytest.raises(ImportError, match=r"pip install 'dlfund\[deploy\]'"): quantize_onnx(content, method='dynamic')
