"""The book's small detectors on the same scenes of real garments, same trunk, same epochs: mAP, seconds, errors; and post-processing beside torchvision's."""
import argparse, importlib, json, time
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace

import torch
import torchvision
from fastai.learner import Learner
import fastai.callback.schedule # adds Learner.fit_one_cycle
from torch import nn

from common import RESULTS, spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import seed_everything
from dlfund.vision.detection import DetectionCallback, detect, detection_errors, detection_loaders, judge, precision_curves, scenes
from dlfund.vision.faster_rcnn import detect_regions
from dlfund.vision.ssd import SSD300, ssd_answers

NAME = 'vision_detection'
BUILDERS = dict(center='detection.center_mini', ssd='ssd.ssd_mini', yolo='yolo.yolo_mini', faster_rcnn='faster_rcnn.faster_rcnn_mini')
LEARNING_RATES = dict(center=5e-3, ssd=1e-2, yolo=1e-2, faster_rcnn=4e-3) # each from a few short trainings on seed 0; `--lr` overrides


def build(name, n_classes):
    "A new small detector."
    module, function = BUILDERS[name].split('.')
    return getattr(importlib.import_module(f'dlfund.vision.{module}'), function)(n_classes)


def stored():
    "What earlier runs found."
    file = RESULTS/f'{NAME}.json'
    return json.loads(file.read_text())['results'] if file.exists() else dict(detectors={}, post_processing=[])


def seconds(f, repeats=20):
    "Best time of a call."
    times = []
    for _ in range(repeats):
        begin = time.perf_counter(); f(); times.append(time.perf_counter() - begin)
    return min(times)


def pr(found, valid):
    "Precision at 101 recalls, mean over classes, at an overlap of 0.5 and of 0.75."
    return {f'{0.5 + 0.05*i:g}': [round(v, 4) for v in precision_curves(found, valid.targets, len(valid.names), i).nanmean(0).tolist()]
            for i in (0, 5)}


def rounded(one):
    "Detections of one picture, for JSON."
    return dict(boxes=[[round(v, 1) for v in box] for box in one['boxes'].tolist()], scores=[round(v, 3) for v in one['scores'].tolist()],
                labels=one['labels'].tolist())


def forward_only(model, x):
    "Milliseconds a picture of detecting, one at a time and in batches of 32."
    model.eval()
    with torch.no_grad():
        return dict(one=1000*seconds(lambda: model(x[:1])), batch=1000*seconds(lambda: model(x[:32]), 5)/32)


def multiply_adds(model, x):
    "Of the convolutions and linear layers, for one picture, counted while it is looked at (suppression needs real numbers)."
    counts = []
    def count(layer, inputs, y):
        counts.append(y.numel() * (layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features))
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(): model.eval()(x)
    for hook in hooks: hook.remove()
    return sum(counts)


def train(name, args, parts):
    "Train with each seed in turn; after each the record of the detector so far."
    runs, shown, x = [], None, parts[1].pictures[:32].float()/255
    for seed in range(args.seeds):
        dls = detection_loaders(*parts, args.bs, seed=seed)
        seed_everything(seed, dls)
        model = build(name, len(parts[0].names))
        learn = Learner(dls, model, cbs=DetectionCallback())
        begin = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, args.lr or LEARNING_RATES[name])
        took, valid = time.perf_counter() - begin, parts[1]
        found = detect(model, valid.pictures)
        report = judge(found, valid.targets, valid.names)
        runs.append(report | dict(seed=seed, seconds=took, losses=[v.item() for v in learn.detection.parts[-1].values()],
                                  errors=detection_errors(found, valid.targets, len(valid.names))))
        print(f"{name:12} seed {seed}: mAP {report['mAP']:.4f}, at 0.5 {report['mAP50']:.4f}, at 0.75 {report['mAP75']:.4f}, "
              f"{took:.0f} s, {sum(len(f['boxes']) for f in found)/len(found):.1f} boxes a picture", flush=True)
        if shown is None: shown = dict(curves=pr(found, valid), pictures=[rounded(f) for f in found[:args.shown]])
        if seed == 0: shown |= dict(parameters=sum(p.numel() for p in model.parameters()), multiply_adds=multiply_adds(model, x[:1]),
                                    milliseconds=forward_only(model, x))
        yield dict(epochs=args.epochs, bs=args.bs, lr=args.lr or LEARNING_RATES[name], threads=torch.get_num_threads(), runs=runs, **shown)


def raw_answers(n, n_classes, generator):
    "Anchors, codes and logits of an untrained detector that is sure of a little: for each box one class stands out."
    corners = 250*torch.rand(n, 2, generator=generator)
    anchors = torch.cat([corners, corners + 10 + 60*torch.rand(n, 2, generator=generator)], dim=1)
    logits = torch.randn(n, n_classes + 1, generator=generator)
    logits[:, 0] += 6
    logits[torch.arange(n), 1 + torch.randint(n_classes, (n,), generator=generator)] += 4*torch.rand(n, generator=generator)
    return anchors, torch.randn(n, 4, generator=generator), logits


def post_processing(args):
    "Milliseconds of what SSD and Faster R-CNN do after the network, beside torchvision's, on the same random answers; they must agree."
    from torchvision.models.detection import _utils as box_utils
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.models.detection.ssd import SSD
    settings = SimpleNamespace(box_coder=box_utils.BoxCoder((10., 10., 5., 5.)), score_thresh=0.05, nms_thresh=0.5, topk_candidates=400,
                               detections_per_img=200)
    rows = []
    for kind, n, n_classes in (('ssd', 1000, 10), ('ssd', 8732, 90), ('faster_rcnn', 1000, 90)):
        anchors, codes, logits = raw_answers(n, n_classes, torch.Generator().manual_seed(0))
        size = 300, 300
        if kind == 'ssd':
            config = replace(SSD300, score_threshold=0.05, iou_threshold=0.5, n_before=400, n_after=200)
            mine = lambda: ssd_answers(codes[None], logits[None], anchors, size, config)[0]
            theirs = lambda: SSD.postprocess_detections(settings, dict(bbox_regression=codes[None], cls_logits=logits[None]), [anchors], [size])[0]
        else:
            repeated = codes.repeat(1, n_classes + 1) # class-wise codes, here all equal
            mine = lambda: detect_regions(logits, repeated.unflatten(1, (-1, 4)), [anchors], size, n_after=200)[0]
            theirs = lambda: dict(zip(('boxes', 'scores', 'labels'), (v[0] for v in RoIHeads.postprocess_detections(
                settings, logits, repeated, [anchors], [size]))))
        a, b = mine(), theirs()
        torch.testing.assert_close(a['boxes'], b['boxes']); torch.testing.assert_close(a['labels'] + 1, b['labels'])
        row = dict(kind=kind, boxes=n, classes=n_classes, kept=len(a['boxes']), ours=1000*seconds(mine, args.repeats),
                   theirs=1000*seconds(theirs, args.repeats))
        rows.append(row)
        print(f"post-processing of {kind:12} {n} boxes, {n_classes} classes: {row['ours']:.1f} ms, torchvision {row['theirs']:.1f} ms", flush=True)
    return rows


def main(argv=None):
    "Train, judge, print, store; what this run does not measure again stays as it was."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', choices=[*BUILDERS, 'post'], help='some of the detectors, or the post-processing; by default all')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--bs', type=int, default=16)
    parser.add_argument('--lr', type=float, help='by default the one of the detector')
    parser.add_argument('--train', type=int, default=2000, help='scenes to train on')
    parser.add_argument('--valid', type=int, default=200, help='scenes to judge on')
    parser.add_argument('--shown', type=int, default=12, help='pictures of the first seed whose detections are stored')
    parser.add_argument('--threads', type=int, help='of the processor; by default what torch takes')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--dry', action='store_true', help='nothing is stored')
    args = parser.parse_args(argv)
    if args.threads: torch.set_num_threads(args.threads)
    asked, fashion = args.only or [*BUILDERS, 'post'], load('fashion-mini')
    parts = scenes(fashion.train, args.train, seed=0), scenes(fashion.valid, args.valid, seed=1)
    facts = dict(data=fashion.sha256, scenes=[args.train, args.valid], seeds=args.seeds, torchvision=torchvision.__version__.split('+')[0])
    def keep(put):
        "Put something into what is stored; other runs may have stored since."
        results = stored()
        put(results)
        if not args.dry: print(store(NAME, results, **facts).name, 'stored', flush=True)
    for name in asked:
        if name == 'post': found = post_processing(args); keep(lambda results: results.update(post_processing=found)); continue
        for found in train(name, args, parts): keep(lambda results: results['detectors'].update({name: found}))
        print(f"{name:12} mAP {spread([r['mAP'] for r in found['runs']])}, {mean(r['seconds'] for r in found['runs']):.0f} s a training, "
              f"{found['parameters']} parameters, {found['milliseconds']['one']:.1f} ms a picture", flush=True)


if __name__ == '__main__': main()
