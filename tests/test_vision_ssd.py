"SSD300 of its true size is torchvision's: names, losses, every gradient, detections."
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from dlfund.vision import ssd

N_CLASSES = 7


@torch.no_grad()
def shake(net, x):
    "Move what starts at 0 or at 20, and bring the answers to the size of a trained network's, so that no score is exactly 1."
    for m in net.modules():
        if isinstance(m, nn.Conv2d): nn.init.normal_(m.bias, 0, 0.1)
    nn.init.uniform_(net.backbone.scale_weight, 10, 20)
    maps = net.backbone(x)
    for head in (net.head.classification_head, net.head.regression_head):
        for conv, m in zip(head.module_list, maps.values()): conv.weight /= conv(m).std()


@pytest.fixture(scope='module')
def pair():
    "Our network and theirs with the same shaken weights, and pictures with two, no and eleven objects."
    torch.manual_seed(0)
    theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=N_CLASSES + 1)
    x = torch.rand(3, 3, 300, 300)
    shake(theirs, ssd.vgg_pixels(x))
    ours = ssd.ssd300_vgg16(N_CLASSES)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    boxes = [(300*torch.rand(n, 2, 2)).sort(1).values.flatten(1) for n in (2, 0, 11)]
    boxes[0][0] = torch.tensor([12., 7, 281, 290]) # for the coarsest map, which learns from large objects only
    return ours, theirs, x, [dict(boxes=b, labels=torch.randint(N_CLASSES, (len(b),))) for b in boxes]


def inside(targets): return [dict(boxes=t['boxes'], labels=t['labels'] + 1) for t in targets]


def gradients(net, losses, x):
    names, weights = zip(*net.named_parameters())
    return dict(zip(('x', *names), torch.autograd.grad(sum(losses.values()), (x, *weights))))


def test_a_training_step_is_torchvisions(pair):
    ours, theirs, x, targets = pair
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs.train()(list(x2), inside(targets))
    expected_grads = gradients(theirs, expected, x2)
    for training in (True, False): # ours gives losses in both modes
        found = ours.train(training)(ssd.vgg_pixels(x1), targets)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if not training: continue
        grads = gradients(ours, found, x1)
        assert list(grads) == list(expected_grads)
        for name, grad in expected_grads.items(): # two dozen layers have added up: relative to the largest
            assert grad.abs().max() > 0, name
            assert_close(grads[name], grad, rtol=1e-3, atol=1e-4*grad.abs().max().item(), msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_the_detections_are_torchvisions(pair, training):
    ours, theirs, x, _ = pair
    with torch.no_grad(): found, expected = ours.train(training)(ssd.vgg_pixels(x)), theirs.eval()(list(x))
    for one, other in zip(found, expected, strict=True):
        assert len(one['boxes']) == 200
        assert_close(one['labels'] + 1, other['labels'], rtol=0, atol=0)
        assert_close(one['scores'], other['scores'], rtol=1e-4, atol=1e-6)
        assert_close(one['boxes'], other['boxes'], rtol=1e-4, atol=1e-2) # pixels


def test_mistakes_would_show(pair):
    ours, theirs, x, targets = pair
    with torch.no_grad():
        expected = theirs.train()(list(x), inside(targets))
        for wrong in (x, ssd.vgg_pixels(x).flip(1)): # pixels of the wrong range; blue for red
            with pytest.raises(AssertionError, match='not close'): assert_close(ours(wrong, targets), expected)
        with pytest.raises(AssertionError, match='not close'): assert_close(ours(ssd.vgg_pixels(x), targets[::-1]), expected)


def test_names_and_counts():
    with torch.device('meta'):
        ours, theirs = ssd.ssd300_vgg16(), torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    assert [(n, w.shape) for n, w in ours.state_dict().items()] == [(n, w.shape) for n, w in theirs.state_dict().items()]
    published = torchvision.models.detection.SSD300_VGG16_Weights.DEFAULT.meta['num_params']
    assert sum(w.numel() for w in ours.parameters()) == published


def test_other_sizes_and_channels():
    torch.manual_seed(0)
    net, x = ssd.ssd300_vgg16(2, n_channels=1), torch.randn(2, 1, 301, 333)
    target = dict(boxes=torch.tensor([[5., 7, 311, 290]]), labels=torch.tensor([1]))
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert all(loss.isfinite() for loss in net(x, [target, none]).values())
    with torch.no_grad():
        for found in net(x):
            assert (found['boxes'] >= 0).all() and (found['boxes'] <= torch.tensor([333, 301, 333, 301])).all()
        assert all(len(d['boxes']) for d in net(torch.randn(1, 1, 268, 268)))
    with pytest.raises(ValueError, match='at least 268'): net(torch.randn(1, 1, 300, 267))


def test_no_gradient_is_lost_where_all_boxes_are_matched():
    codes, logits = torch.zeros(1, 3, 4), torch.randn(1, 3, 5, requires_grad=True)
    losses = ssd.ssd_loss(codes, logits, codes, torch.tensor([[1, 2, 4]]))
    losses['classification'].backward()
    assert logits.grad.isfinite().all() and losses['bbox_regression'] == 0


@pytest.mark.parametrize('n_classes', [1, 90])
@pytest.mark.parametrize('scale', [0.0, 0.3, 3.0])
def test_the_block_does_not_matter(n_classes, scale):
    torch.manual_seed(0)
    boxes = (100*torch.rand(500, 2, 2)).sort(1).values.flatten(1)
    scores = (scale*torch.randn(500, n_classes + 1)).softmax(-1)[:, 1:] # scale 0: all are tied
    answers = [ssd.keep_best_by_class(boxes, scores, block=block) for block in (512, 13, 100_000)]
    for other in answers[1:]: assert_close(answers[0], other, rtol=0, atol=0)
    assert all(len(v) == 0 for v in ssd.keep_best_by_class(boxes, 0*scores).values())
