"Fully convolutional ResNets of full size are torchvision's: first weights, both heads, gradients, what training leaves behind; and masks that do not fit."
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from dlfund.data.datasets import Split, load
from dlfund.vision import segmentation as s

NAMES = ['fcn_resnet50', 'fcn_resnet101']


def theirs(name, n_classes=21, use_aux=True):
    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=n_classes, aux_loss=use_aux)


def shake(net):
    "Move what starts at 0 and at 1, where a mistake would not show."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var): nn.init.uniform_(t, 0.5, 1.5)
            for t in (m.bias, m.running_mean): nn.init.normal_(t, 0, 0.2)
    return net


def outcome(outputs, net, x, upstream):
    "Both answers, the gradient of the pictures, and those of all weights."
    x = x.clone().requires_grad_()
    torch.manual_seed(1) # for dropout
    ys = outputs(x)
    net.zero_grad()
    torch.autograd.backward(list(ys.values()), [upstream]*len(ys))
    return dict(ys={k: y.detach() for k, y in ys.items()}, x_grad=x.grad, buffers={n: b.clone() for n, b in net.named_buffers()},
                grads={n: p.grad for n, p in net.named_parameters()})


def twin(name, n_classes=7):
    torch.manual_seed(0)
    reference = shake(theirs(name, n_classes))
    net = getattr(s, name)(n_classes, use_aux=True)
    net.load_state_dict(reference.state_dict(), strict=True)
    return net, reference


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_it_computes_what_torchvision_computes(training):
    net, reference = twin('fcn_resnet50')
    x, upstream = torch.randn(2, 3, 47, 61), torch.randn(2, 7, 47, 61)
    expected = outcome(reference.train(training), reference, x, upstream)
    found = outcome(net.train(training).outputs, net, x, upstream)
    grads = found.pop('grads'), expected.pop('grads')
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[1].items(): # relative to the largest: fifty layers have added up
        assert_close(grads[0][n], g, rtol=1e-3, atol=1e-5 + 1e-4*g.abs().max().item(), msg=lambda m: f'{n}: {m}')


def test_a_stride_that_stays_would_show():
    net, reference = twin('fcn_resnet50')
    for block in net.backbone.layer4: block.conv2.dilation = block.conv2.padding = (2, 2)
    x = torch.randn(1, 3, 47, 61)
    with torch.no_grad(), pytest.raises(AssertionError, match='not close'):
        assert_close(net.eval()(x), reference.eval()(x)['out'], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('use_aux', [True, False], ids=['aux', 'main'])
def test_the_same_first_weights(use_aux):
    torch.manual_seed(0)
    expected = theirs('fcn_resnet50', use_aux=use_aux).state_dict()
    torch.manual_seed(0)
    found = s.fcn_resnet50(use_aux=use_aux).state_dict()
    assert list(found) == list(expected)
    for n in expected: assert torch.equal(found[n], expected[n]), n


@pytest.mark.parametrize('name', NAMES)
def test_names_shapes_and_published_counts(name):
    with torch.device('meta'): net, reference = getattr(s, name)(use_aux=True), theirs(name)
    assert [(n, t.shape) for n, t in net.state_dict().items()] == [(n, t.shape) for n, t in reference.state_dict().items()]
    published = torchvision.models.get_model_weights(name).DEFAULT.meta['num_params'] # with the auxiliary head
    assert sum(p.numel() for p in net.parameters()) == published
    with torch.device('meta'): assert getattr(s, name)(5, n_channels=1)(torch.randn(2, 1, 50, 33)).shape == (2, 5, 50, 33)


@pytest.mark.parametrize('size', [(8, 8), (9, 15), (31, 8), (64, 47)])
@pytest.mark.parametrize('options', [{}, dict(upsample='repeat'), dict(use_skips=False)], ids=['default', 'repeat', 'blind'])
def test_any_size(size, options):
    net = s.UNet(3, widths=(2, 3, 4, 5), **options)
    y = net(torch.randn(2, 1, *size))
    assert y.shape == (2, 3, *size)
    s.segmentation_loss(y, torch.randint(3, (2, *size))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_masks_of_any_whole_numbers(dtype):
    torch.manual_seed(0)
    z, y = torch.randn(2, 5, 7, 11), torch.randint(5, (2, 7, 11))
    y[0, 0] = 5 # to be ignored
    for loss in (s.pixel_cross_entropy, s.dice_loss, s.segmentation_loss):
        assert torch.equal(loss(z, y.to(dtype), ignore_index=5), loss(z, y, ignore_index=5))
    for metric in (s.SegmentationIoU(5, ignore_index=5), s.SegmentationDice(5, ignore_index=5), s.BoundaryIoU(5, ignore_index=5)):
        metric.update(z, y.to(dtype))
        assert 0 < metric.compute() < 1


@pytest.mark.parametrize('masks, said', [
    (torch.zeros(2, 5, 7), 'whole numbers, got torch.float32'), (torch.zeros(2, 5, 7, dtype=torch.bool), 'got torch.bool'),
    (torch.zeros(2, 5, 8, dtype=torch.int64), r'got \(2, 5, 8\)'), (torch.full((2, 5, 7), 3), 'got 3 to 3'),
    (torch.full((2, 5, 7), -1), 'got -1 to -1'), (torch.zeros(2, 1, 5, 7, dtype=torch.int64), r'got \(2, 1, 5, 7\)')])
def test_masks_that_do_not_fit(masks, said):
    for use in (s.segmentation_loss, s.dice_loss, s.pixel_cross_entropy, s.judge_masks, s.SegmentationIoU(3).update, s.BoundaryIoU(3).update):
        with pytest.raises(ValueError, match=said): use(torch.randn(2, 3, 5, 7), masks)


def test_a_perfect_answer_and_half_precision():
    torch.manual_seed(0)
    y = torch.randint(5, (2, 7, 11))
    z = 50.*nn.functional.one_hot(y, 5).movedim(-1, 1)
    for loss in (s.pixel_cross_entropy, s.dice_loss, s.segmentation_loss): assert loss(z, y) < 1e-5
    assert s.judge_masks(z, y) == dict(accuracy=1, mean_iou=1, mean_dice=1, boundary_iou=1)
    assert s.segmentation_loss(torch.randn(2, 5, 7, 11).bfloat16(), y).isfinite()


def test_scenes():
    train = load('fashion-mini').train
    pictures, masks = s.segmentation_scenes(train, 3, seed=5, size=(40, 53), n_channels=3, n_objects=(0, 2))
    assert pictures.shape == (3, 3, 40, 53) and pictures.dtype == torch.uint8 and masks.shape == (3, 40, 53)
    again = s.segmentation_scenes(train, 3, seed=5, size=(40, 53), n_channels=3, n_objects=(0, 2))
    assert all(map(torch.equal, again, (pictures, masks)))
    only = Split(x=train.x[train.y == 7][:5], y=train.y[train.y == 7][:5])
    assert s.segmentation_scenes(only, 4, seed=0, n_objects=(1, 1))[1].unique().tolist() == [0, 8]
