"EfficientNets at full size against torchvision's: what is drawn, what is loaded, outputs, gradients and buffers."
import gc

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from dlfund.vision import efficientnet
from dlfund.vision.classics import multiply_adds

NAMES = [f'efficientnet_{size}' for size in (*(f'b{i}' for i in range(8)), 'v2_s', 'v2_m', 'v2_l')]


def ours(name, **options): return getattr(efficientnet, name)(**options)


def theirs(name, n_classes=1000, **options): return torchvision.models.get_model(name, num_classes=n_classes, **options)


def wake(model, x):
    "Give the normalizations scales, shifts and statistics with which a signal gets through in evaluation mode too."
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m.momentum for m in norms]
    for m in norms:
        nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias, 0, 0.1)
        m.momentum = 1.0
    with torch.no_grad(): model.train()(x)
    for m, momentum in zip(norms, kept): m.momentum = momentum


def outcome(model, x, upstream):
    "Everything a training step can see of a model, with the same random numbers for whoever is asked."
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.backward(upstream)
    return dict(y=y.detach(), x_grad=x.grad, grads={n: p.grad for n, p in model.named_parameters()},
                buffers=dict(model.named_buffers()))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', NAMES)
def test_equal_to_torchvision(name, training):
    torch.manual_seed(0)
    model, x, upstream = theirs(name, n_classes=7), torch.randn(2, 3, 64, 64), torch.randn(2, 7)
    wake(model, x)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    expected = outcome(model.train(training), x, upstream)
    del model
    gc.collect() # the largest is half a gigabyte
    model = ours(name, n_classes=7)
    model.load_state_dict(state, strict=True)
    found = outcome(model.train(training), x, upstream)
    assert expected['y'].std() > 0.01 and expected['x_grad'].std() > 0, 'a signal that has died proves nothing'
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['efficientnet_b0', 'efficientnet_b5', 'efficientnet_v2_s'])
def test_draws_the_same_weights(name):
    torch.manual_seed(0)
    expected = theirs(name, n_classes=7).state_dict()
    torch.manual_seed(0)
    found = ours(name, n_classes=7).state_dict()
    assert list(found) == list(expected)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('name', NAMES)
def test_names_shapes_counts_and_settings(name):
    with torch.device('meta'): mine, its = ours(name), theirs(name)
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    assert [(n, t.shape) for n, t in mine.state_dict().items()] == [(n, t.shape) for n, t in its.state_dict().items()]
    assert sum(p.numel() for p in mine.parameters()) == weights.meta['num_params']
    side = weights.transforms.keywords['crop_size']
    assert abs(multiply_adds(mine, (3, side, side)) / 1e9 - weights.meta['_ops']) <= 0.001
    norms = [[(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (mine, its)]
    assert norms[0] == norms[1]
    rates = [[getattr(m, 'p', getattr(m, 'rate', None)) for m in model.modules() if hasattr(m, 'p') or hasattr(m, 'rate')]
             for model in (mine, its)] # torchvision's StochasticDepth calls its rate `p`
    assert rates[0] == rates[1] # dropout, and the stochastic depth of every block


@pytest.mark.parametrize('options, said', [
    (dict(n_classes=0), 'n_classes=0'), (dict(n_channels=0), 'n_channels=0'), (dict(dropout=1.5), 'dropout=1.5'),
    (dict(stochastic_depth=-0.1), 'stochastic_depth=-0.1')])
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said): ours('efficientnet_b0', **options)


def test_other_channels_and_classes():
    model = ours('efficientnet_b0', n_classes=5, n_channels=1).eval()
    assert model(torch.randn(1, 1, 33, 47)).shape == (1, 5)
    with pytest.raises(ValueError, match='got .1, 3, 32, 32'): model(torch.randn(1, 3, 32, 32))
