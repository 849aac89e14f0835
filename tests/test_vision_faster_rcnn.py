"Faster R-CNN on ResNet-50 is torchvision's: first weights, losses, gradients, what training leaves behind, detections."
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import detection as reference
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from dlfund.vision.faster_rcnn import FasterRCNNConfig, FrozenBatchNorm, faster_rcnn_resnet50

N_CLASSES, SIZE = 7, (101, 135)
PLAIN = dict(image_mean=[0.]*3, image_std=[1.]*3, min_size=min(SIZE), max_size=max(SIZE), _skip_resize=True) # as they come
CONFIG = FasterRCNNConfig(n_anchors=64, n_before=(150, 100), n_proposals=(100, 60), n_regions=48, n_detections=50)
SAME = dict(rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=150, rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=60, box_batch_size_per_image=48, box_detections_per_img=50)


def theirs(frozen, **settings):
    "torchvision's detector with random weights; the published weights have frozen normalization."
    if not frozen: return reference.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=N_CLASSES + 1, **settings)
    backbone = resnet_fpn_backbone(backbone_name='resnet50', weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    return reference.FasterRCNN(backbone, N_CLASSES + 1, **settings)


def shake(net):
    "Move what starts at 0 or 1, and make the heads decided, or mistakes do not show."
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            for values in (m.weight, m.running_var): nn.init.uniform_(values, 0.7, 1.3)
            for values in (m.bias, m.running_mean): nn.init.normal_(values, 0, 0.1)
    for m in net.modules(): # the last of each block is damped: 16 of them add up
        if hasattr(m, 'bn3'): m.bn3.weight.data.mul_(0.3)
    nn.init.normal_(net.rpn.head.cls_logits.weight, 0, 0.05)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, 0, 0.02)
    nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, 0, 0.3)
    return net


def twin(frozen):
    "Ours with the memory of theirs for weights, and buffers of its own."
    torch.manual_seed(0)
    expected = shake(theirs(frozen, **PLAIN, **SAME))
    net = faster_rcnn_resnet50(N_CLASSES, frozen=frozen, config=CONFIG)
    buffers = {n: b.clone() for n, b in expected.named_buffers()}
    net.load_state_dict(expected.state_dict() | buffers, strict=True, assign=True)
    return net, expected


def batch():
    "Two pictures of no usual size; the second has no objects."
    x = torch.rand(2, 3, *SIZE)
    boxes = torch.tensor([[5., 9, 61, 80], [70, 20, 130, 99], [30.5, 2, 90, 47]])
    return x, [dict(boxes=boxes, labels=torch.tensor([0, 6, 3])), dict(boxes=boxes[:0], labels=torch.zeros(0, dtype=torch.int64))]


def shifted(targets): return [dict(boxes=t['boxes'], labels=t['labels'] + 1) for t in targets]


@pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'learning'])
def test_losses_and_gradients(frozen):
    net, expected = twin(frozen)
    x, targets = batch()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    a = net.train()(inputs[0], targets)
    torch.manual_seed(1) # both draw the same permutations in the same order
    b = expected.train()(list(inputs[1]), shifted(targets))
    assert set(a) == set(b) and all(loss > 0 for loss in a.values())
    for name in b: assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    names = [n for n, _ in net.named_parameters()]
    assert names == [n for n, _ in expected.named_parameters()]
    found = torch.autograd.grad(sum(a.values()), [inputs[0], *net.parameters()])
    wanted = torch.autograd.grad(sum(b.values()), [inputs[1], *expected.parameters()])
    for name, g, w in zip(['x', *names], found, wanted): # many layers have added up: relative to the largest
        assert_close(g, w, rtol=1e-3, atol=1e-6 + 1e-3*w.abs().max().item(), msg=name)
    assert_close(dict(net.named_buffers()), dict(expected.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'learning'])
def test_detections(frozen):
    net, expected = twin(frozen)
    x, _ = batch()
    with torch.no_grad(): found, wanted = net.eval()(x), expected.eval()(list(x))
    for f, w in zip(found, wanted):
        assert len(f['labels']) > 5
        assert_close(f['labels'] + 1, w['labels'])
        assert_close(f['scores'], w['scores'], rtol=1e-3, atol=1e-4)
        assert_close(f['boxes'], w['boxes'], rtol=1e-3, atol=1e-2) # pixels


def test_a_mistake_would_show():
    net, expected = twin(True)
    net.backbone.body.layer3[2].bn2.running_mean = net.backbone.body.layer3[2].bn2.running_mean + 0.2 # one of 53
    x, _ = batch()
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_close(net.eval()(x)[0]['scores'], expected.eval()(list(x))[0]['scores'], rtol=1e-3, atol=1e-4)


def test_the_same_random_weights():
    torch.manual_seed(0)
    expected = theirs(False).state_dict()
    torch.manual_seed(0)
    found = faster_rcnn_resnet50(N_CLASSES, frozen=False).state_dict()
    assert list(found) == list(expected)
    for n in expected: assert torch.equal(found[n], expected[n]), n


def test_it_has_the_size_of_the_published_weights():
    with torch.device('meta'): net, expected = faster_rcnn_resnet50(), reference.FasterRCNN(
        resnet_fpn_backbone(backbone_name='resnet50', weights=None), 91)
    assert [(n, v.shape) for n, v in net.state_dict().items()] == [(n, v.shape) for n, v in expected.state_dict().items()]
    published = reference.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta['num_params']
    frozen = sum(m.weight.numel() + m.bias.numel() for m in net.modules() if isinstance(m, FrozenBatchNorm))
    assert sum(p.numel() for p in net.parameters()) + frozen in (published, published + frozen)


def test_pixels_can_be_normalised_outside():
    net, _ = twin(True)
    expected = theirs(True, min_size=SIZE[0], max_size=SIZE[1], **SAME)
    expected.load_state_dict(net.state_dict())
    x, _ = batch()
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad(): found, wanted = net.eval()((x - mean)/std), expected.eval()(list(x))
    for f, w in zip(found, wanted): assert_close(f['boxes'], w['boxes'], rtol=1e-3, atol=1e-2)


def test_frozen_normalization_is_torchvisions():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(5)
    for values in (bn.weight, bn.bias, bn.running_mean): nn.init.normal_(values)
    nn.init.uniform_(bn.running_var, 1e-6, 1e-4)
    for eps in (0.0, 1e-5):
        expected, x = FrozenBatchNorm2d(5, eps=eps), torch.randn(2, 5, 7, 3)
        expected.load_state_dict(copy.deepcopy(bn.state_dict()))
        assert_close(FrozenBatchNorm(bn, eps)(x), expected(x))
