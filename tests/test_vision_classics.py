"AlexNet and all VGGs at full size: torchvision's weights load strictly, and a training step is the same in both modes."
import gc

import pytest
import torch
import torchvision
from torch.testing import assert_close

from dlfund.vision import classics

NAMES = ['alexnet', *(f'vgg{depth}{bn}' for depth in (11, 13, 16, 19) for bn in ('', '_bn'))]
SIDE = dict(alexnet=(63, 70)) # the smallest pictures keep the tests quick; both sides differ
STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


def own_buffers(
    state:dict, # of a model
)->dict: # the same weights, in the same memory, and copies of the buffers, which training changes in place
    "A state that two models can use side by side without holding the weights twice."
    return {name: t.clone() if name.endswith(STATISTICS) else t for name, t in state.items()}


@pytest.fixture(scope='module', params=NAMES)
def pair(request):
    "The name, our model with torchvision's weights, and torchvision's model, both made from the same seed."
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, request.param)()
    torch.manual_seed(0)
    ours = getattr(classics, request.param)()
    drawn = [(name, torch.equal(p, q)) for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True)]
    ours.load_state_dict(own_buffers(theirs.state_dict()), assign=True)
    yield request.param, ours, theirs, drawn
    for model in (ours, theirs): model.zero_grad()
    del ours, theirs
    gc.collect()


def step(model, x, upstream):
    "Output and input gradient of a training step; dropout draws the same masks each time."
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(upstream)
    return y.detach(), x.grad


def test_the_first_weights_are_drawn_alike(pair):
    assert [name for name, same in pair[3] if not same] == []


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_a_step_is_torchvisions(pair, training):
    name, ours, theirs, _ = pair
    torch.manual_seed(2)
    x, upstream = torch.randn(2, 3, *SIDE.get(name, (32, 37))), torch.randn(2, 1000)
    got, expected = (step(model.train(training), x, upstream) for model in (ours, theirs))
    assert_close(got, expected)
    for (our_name, p), (their_name, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert our_name == their_name
        parts = zip(p.grad.flatten().split(2**24), q.grad.flatten().split(2**24), strict=True) # slices: less memory
        for a, b in parts: assert_close(a, b, msg=lambda said: f'gradient of {our_name}: {said}')
        p.grad = q.grad = None
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert bool(dict(ours.named_buffers())) == name.endswith('_bn')


@pytest.mark.parametrize('name', NAMES)
def test_names_shapes_and_counts(name):
    with torch.device('meta'):
        ours, theirs = (getattr(module, name)() for module in (classics, torchvision.models))
        few = getattr(classics, name)(7, n_channels=5, dropout=0.1)
    assert [(k, t.shape, t.dtype) for k, t in ours.state_dict().items()] == [
        (k, t.shape, t.dtype) for k, t in theirs.state_dict().items()]
    assert [type(m) for m in ours.features] == [type(m) for m in theirs.features]
    assert [type(m) for m in ours.classifier] == [type(m) for m in theirs.classifier]
    assert few(torch.empty(2, 5, 64, 65, device='meta')).shape == (2, 7)
    assert {m.p for m in few.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


@pytest.mark.parametrize('name', NAMES)
def test_bad_input_is_one_clear_error(name):
    make, side = getattr(classics, name), 63 if name == 'alexnet' else 32
    with torch.device('meta'):
        model = make().eval()
        assert model(torch.empty(1, 3, side, side)).shape == (1, 1000)
        for shape, said in {(1, 3, side - 1, 99): f'at least {side} x {side} pixels, got {side - 1} x 99',
                            (1, 3, 99, side - 1): f'at least {side} x {side} pixels, got 99 x {side - 1}',
                            (1, 1, 99, 99): r'\(batch, 3, height, width\), got torch.float32 \(1, 1, 99, 99\)',
                            (3, 99, 99): r'got torch.float32 \(3, 99, 99\)'}.items():
            with pytest.raises(ValueError, match=said): model(torch.empty(shape))
    with pytest.raises(ValueError, match='n_classes must be at least 1, got n_classes=0'): make(0)
    with pytest.raises(ValueError, match='n_channels must be at least 1, got n_channels=0'): make(10, n_channels=0)
