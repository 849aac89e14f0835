"The anchor-free detector, harder than on its page: many assignments, empty batches, odd sizes, wrong input."
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dlfund.vision.detection import Trunk
from dlfund.vision.yolo import (YOLO, assign_points, boxes_to_sides, distribution_focal_loss, expected_sides, find_inside,
                                make_points, sides_to_boxes, yolo_mini)


def area(box): return max(box[2] - box[0], 0)*max(box[3] - box[1], 0)


def overlap(a, b):
    "Intersection over union of two lists."
    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return both/(area(a) + area(b) - both) if area(a) + area(b) > both else 0.0


def by_hand(scores, boxes, points, objects, labels, top_k, alpha, beta):
    "Owner and target of each point: object by object, then dispute by dispute."
    scores, boxes, points, objects = (x.tolist() for x in (scores, boxes, points, objects))
    n, iou = len(points), [[overlap(o, b) for b in boxes] for o in objects]
    aligned = [[scores[p][c]**alpha * iou[o][p]**beta for p in range(n)] for o, c in enumerate(labels.tolist())]
    wants = []
    for o, (x1, y1, x2, y2) in enumerate(objects):
        inside = [(-aligned[o][p], p) for p, (x, y) in enumerate(points) if x1 < x < x2 and y1 < y < y2]
        wants.append({p for _, p in sorted(inside)[:top_k]})
    owner, target = [-1]*n, [0.0]*n
    for p in range(n):
        for o in range(len(objects)):
            if p in wants[o] and (owner[p] < 0 or iou[o][p] > iou[owner[p]][p]): owner[p] = o
    for o in range(len(objects)):
        mine = [p for p in range(n) if owner[p] == o]
        most, best = max((aligned[o][p] for p in mine), default=0), max((iou[o][p] for p in mine), default=0)
        for p in mine: target[p] = aligned[o][p]/most*best if most else 0.0
    return owner, target


def scene(generator, n_objects, whole):
    "Predictions at 101 points, and objects of which some contain no point and some are repeated."
    def rand(*shape): return torch.rand(*shape, generator=generator, dtype=torch.float64)
    points, strides = (p.double() for p in make_points([(7, 11), (4, 6)], (8, 16)))
    corners = 88*rand(n_objects, 2, 2)
    if whole: corners = (corners/8).round()*8
    objects = torch.cat([corners.amin(1), corners.amax(1) + (8 if whole else 0.5)], dim=1)
    if n_objects > 2: objects[-1] = objects[0]
    sides, scores = 4*rand(len(points), 4), rand(len(points), 3)
    if whole: sides, scores = sides.ceil(), (4*scores).ceil()/4
    return scores, sides_to_boxes(sides, points, strides), points, objects, torch.randint(3, (n_objects,), generator=generator)


@pytest.mark.parametrize('whole', [False, True])
def test_500_assignments(whole):
    generator, seen = torch.Generator().manual_seed(0), set()
    for i in range(250):
        parts = scene(generator, i % 8, whole)
        top_k, alpha, beta = (1, 3, 10, 200)[i % 4], (0.5, 1.0)[i % 2], 2.0 if whole else 6.0
        matched, soft = assign_points(*parts, top_k=top_k, alpha=alpha, beta=beta)
        owner, target = by_hand(*parts, top_k, alpha, beta)
        assert matched.tolist() == owner
        assert_close(soft, torch.tensor(target, dtype=torch.float64))
        inside = find_inside(parts[2], parts[3])
        seen |= {'empty box'} if (~inside.any(1)).any() else set()
        seen |= {'dispute'} if (inside.sum(0) > 1).any() else set()
    assert seen == {'dispute', 'empty box'} if not whole else 'dispute' in seen


def test_an_object_does_not_mind_the_order_of_the_others():
    parts = scene(torch.Generator().manual_seed(1), 2, False)
    order = torch.tensor([1, 0])
    matched, soft = assign_points(*parts)
    again, soft_again = assign_points(*parts[:3], parts[3][order], parts[4][order])
    assert_close(torch.where(again >= 0, 1 - again, -1), matched)
    assert_close(soft, soft_again)


def test_gradients_of_the_sides():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 7, dtype=torch.float64), 6*torch.rand(5, dtype=torch.float64)
    target = target.floor().clamp(max=5) + 0.1 + 0.8*torch.rand(5, dtype=torch.float64) # away from the kinks
    assert torch.autograd.gradcheck(distribution_focal_loss, (logits.requires_grad_(), target.requires_grad_()))
    assert torch.autograd.gradcheck(expected_sides, (logits,))
    assert distribution_focal_loss(torch.zeros(0, 4, 7), torch.zeros(0, 4)).shape == (0, 4)
    assert_close(distribution_focal_loss(logits, torch.full((5,), 6.0)), F.cross_entropy(logits, torch.full((5,), 6), reduction='none'))


def test_half_precision_points_and_sides():
    points, strides = make_points([(3, 5)], (8,))
    boxes = torch.rand(15, 4).half()
    assert boxes_to_sides(boxes, points, strides).dtype == torch.float32


def target(*boxes, label=3): return dict(boxes=torch.tensor(boxes).float().reshape(-1, 4), labels=torch.full((len(boxes),), label))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(96, 96), (61, 83), (33, 130), (40, 47), (97, 31)])
def test_any_size_learns_and_detects(size, training):
    torch.manual_seed(0)
    model, x = yolo_mini(5).train(training), torch.rand(3, 1, *size)
    losses = model(x, [target((3, 4, 28, 27), (1, 1, 30, 30)), target(), target((0, 0, 31, 31))])
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.score_threshold = 0.0
    for found in model.eval()(x):
        assert len(found['boxes']) and (found['scores'].diff() <= 0).all()
        assert (found['boxes'] >= 0).all() and (found['boxes'] <= torch.tensor([size[1], size[0]]*2)).all()


def test_a_batch_without_objects_learns_that_nothing_is_there():
    torch.manual_seed(0)
    model, x = yolo_mini(5), torch.rand(4, 1, 64, 64)
    opt, seen = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(5):
        losses = model(x, [target()]*4)
        opt.zero_grad(); sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert losses['boxes'] == 0 and losses['sides'] == 0
        opt.step(); seen.append(losses['classes'].item())
    assert seen[-1] < seen[0]


def test_an_object_without_points_is_harmless():
    model = yolo_mini(5)
    losses = model(torch.rand(2, 1, 64, 64), [target((5, 5, 7, 7)), target((9, 3, 11, 60))]) # between the points
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_side_longer_than_the_bins_is_harmless():
    model = YOLO(5, trunk=Trunk(width=8), dim=8, n_bins=2)
    losses = model(torch.rand(2, 1, 200, 200), [target((0, 0, 200, 200)), target()])
    assert all(loss.isfinite() for loss in losses.values())


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model = YOLO(3, trunk=Trunk(width=8), dim=16)
    x = torch.zeros(2, 1, 64, 64)
    x[0, 0, 10:40, 20:50], x[1, 0, 30:60, 5:30] = 1, 0.5
    wanted = [target((20, 10, 50, 40), label=0), target((5, 30, 30, 60), label=2)]
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        opt.zero_grad(); sum(model(x, wanted).values()).backward(); opt.step()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)): norm.momentum = None; norm.reset_running_stats()
    with torch.no_grad(): model(x, wanted)
    for found, true in zip(model.eval()(x), wanted):
        assert found['labels'][0] == true['labels'][0]
        assert overlap(found['boxes'][0].tolist(), true['boxes'][0].tolist()) > 0.7


@pytest.mark.parametrize('x, targets, says', [
    (torch.rand(1, 1, 64, 64), [target((5, 5, math.nan, 31))], 'finite'),
    (torch.rand(1, 1, 64, 64), [target((5, 5, 65, 31))], 'inside'),
    (torch.rand(1, 1, 64, 64), [target((30, 5, 5, 31))], 'left < right'),
    (torch.rand(1, 1, 64, 64), [target((5, 5, 5, 31))], 'left < right'),
    (torch.rand(1, 1, 64, 64), [target((5, 5, 9, 31), label=5)], 'labels from 0 to 4'),
    (torch.rand(2, 1, 64, 64), [target()], 'each of 2'), (torch.rand(1, 1, 64, 64), target(), 'list'),
    (torch.rand(1, 3, 64, 64), None, 'batch, 1, height, width'), (torch.rand(0, 1, 64, 64), None, 'at least one picture'),
    (torch.rand(1, 1, 64, 64), [dict(boxes=torch.zeros(0, 4))], 'boxes and labels')])
def test_wrong_input_is_refused(x, targets, says):
    with pytest.raises(ValueError, match=says): yolo_mini(5)(x, targets)


def test_weights_travel():
    torch.manual_seed(0)
    one, other = yolo_mini(5, 3), yolo_mini(5, 3)
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 3, 50, 70)
    assert_close(one.eval().answer(x), other.eval().answer(x), rtol=0, atol=0)
