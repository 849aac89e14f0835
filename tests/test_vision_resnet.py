"ResNets and ConvNeXts of their true size are torchvision's: first weights, outputs, gradients, what training leaves behind."
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from dlfund.vision import convnext, resnet
from dlfund.vision.classics import multiply_adds

RESNETS = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x8d', 'resnext101_64x4d',
           'wide_resnet50_2', 'wide_resnet101_2']
CONVNEXTS = ['convnext_tiny', 'convnext_small', 'convnext_base', 'convnext_large']
NAMES = RESNETS + CONVNEXTS


def ours(name): return getattr(resnet if name in RESNETS else convnext, name)
def theirs(name): return getattr(torchvision.models, name)


def shake(net):
    "Move what starts at 0, at 1 or at a millionth, where a mistake would not show."
    for m in net.modules():
        for weight in (getattr(m, 'running_var', None), getattr(m, 'layer_scale', None),
                       m.weight if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) else None):
            if weight is not None: nn.init.uniform_(weight, 0.5, 1.5)
        for shift in (getattr(m, 'running_mean', None), getattr(m, 'bias', None)):
            if shift is not None: nn.init.normal_(shift, 0, 0.2)
    return net


def twin(name):
    "Our network with the memory of theirs for weights, and buffers of its own."
    reference = shake(theirs(name)())
    with torch.device('meta'): net = ours(name)()
    state = reference.state_dict()
    buffers = {n: b.clone() for n, b in reference.named_buffers()}
    net.load_state_dict(state | buffers, strict=True, assign=True)
    return net, reference


def run(net, x):
    "A forward pass, with the same random numbers for every net."
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    return x, net(x)


def close_to(expected, wrong, n):
    "Compare a weight's gradient as soon as it is there, and drop both: two nets' gradients need more memory than the nets."
    def compare(weight):
        grad = expected.pop(n)
        atol = 1e-5 + 1e-4*grad.abs().max().item() # a hundred layers have added up: relative to the largest
        if not torch.allclose(weight.grad, grad, rtol=1e-3, atol=atol): wrong.append(n)
        weight.grad = None
    return compare


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', NAMES)
def test_it_computes_what_torchvision_computes(name, training):
    torch.manual_seed(0)
    net, reference = twin(name)
    pictures, upstream, wrong = torch.randn(2, 3, 64, 64), torch.randn(2, 1000), []
    x, y = run(reference.train(training), pictures)
    weights = dict(reference.named_parameters())
    x_grad, *grads = torch.autograd.grad(y, [x, *weights.values()], upstream)
    grads = dict(zip(weights, grads))
    for n, weight in net.named_parameters(): weight.register_post_accumulate_grad_hook(close_to(grads, wrong, n))
    ours_x, ours_y = run(net.train(training), pictures)
    ours_y.backward(upstream)
    for found, expected in ((ours_y, y), (ours_x.grad, x_grad), (dict(net.named_buffers()), dict(reference.named_buffers()))):
        assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not wrong, wrong
    assert not grads, f'without a gradient: {list(grads)}'


@pytest.mark.parametrize('name', NAMES)
def test_it_starts_with_the_same_random_weights(name):
    torch.manual_seed(0)
    expected = theirs(name)().state_dict()
    torch.manual_seed(0)
    found = ours(name)().state_dict()
    assert list(found) == list(expected)
    for n in expected: assert torch.equal(found[n], expected[n]), n


@pytest.mark.parametrize('name', NAMES)
def test_other_classes_and_channels(name):
    with torch.device('meta'):
        net, reference = ours(name)(7, n_channels=5), theirs(name)(num_classes=7)
        assert net(torch.randn(2, 5, 64, 64)).shape == (2, 7)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (net, reference)]
    first = 'conv1.weight' if name in RESNETS else 'features.0.0.weight'
    assert shapes[0].pop(first)[1] == 5 and shapes[1].pop(first)[1] == 3
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('name', NAMES)
def test_the_published_counts(name):
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    with torch.device('meta'):
        net = ours(name)()
        counted = multiply_adds(net, (3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == published['num_params']
    assert abs(counted/1e9 - published['_ops']) < 0.01


def test_a_mistake_would_show():
    torch.manual_seed(0)
    net, reference = twin('convnext_tiny')
    net.features[5][4].block[4] = nn.ReLU() # one GELU of eighteen
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(AssertionError, match='not close'):
        assert_close(net.eval()(x), reference.eval()(x), rtol=1e-3, atol=1e-4)
