"""Segmentation of rendered scenes: a U-Net with and without skips, trained with cross-entropy, with Dice and with both, an FCN, and fastai's DynamicUnet
in the seconds of the U-Net; three seeds each. `--only U-Net --merge` runs a part and keeps what is stored of the others."""
import argparse, json, math, time
from statistics import mean

import torch
import torchvision

from common import RESULTS, spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import seed_everything
from dlfund.training.learner import predict_all
from dlfund.vision.segmentation import (SegmentationIoU, UNet, border_distance, dice_loss, fcn_mini, judge_masks, pixel_cross_entropy, segmentation_loaders,
                                        segmentation_loss, segmentation_scenes, unet_mini)

LOSSES = {'cross-entropy': pixel_cross_entropy, 'Dice': dice_loss, 'both': segmentation_loss}
MODELS = {'U-Net': lambda: unet_mini(11, 3), 'U-Net, no skips': lambda: UNet(11, n_channels=3, widths=(8, 16, 32, 64), use_skips=False),
          'FCN': lambda: fcn_mini(11, 3)}
CASES = [(model, loss) for model in ('U-Net', 'U-Net, no skips') for loss in LOSSES] + [('FCN', 'both'), ('fastai DynamicUnet', 'both')]


def dynamic_unet():
    "fastai's U-Net on ResNet-18, from random weights."
    from fastai.vision.learner import create_unet_model
    return create_unet_model(torchvision.models.resnet18, 11, (48, 48), pretrained=False, n_in=3)


def seconds_per_step(model, batch, loss, repeats=2):
    "Time of a training step, after one to warm up."
    for i in range(repeats + 1):
        if i == 1: begin = time.perf_counter()
        loss(model(batch[0]), batch[1]).backward()
        model.zero_grad()
    return (time.perf_counter() - begin)/repeats


def run(model, loss, train, valid, seed, epochs, lr=0.01, bs=8, budget=None):
    "Train once, judge on the validation scenes; with a `budget` in seconds, as many steps as fit into it."
    from fastai.learner import Learner
    import fastai.callback.schedule # adds Learner.fit_one_cycle
    if budget:
        steps = max(2, int(budget/seconds_per_step(model, segmentation_loaders(train, valid, bs).one_batch(), loss)))
        epochs, rows = 1, torch.arange(steps*bs) % len(train[0])
        train = train[0][rows], train[1][rows]
    dls = segmentation_loaders(train, valid, bs)
    seed_everything(seed, dls)
    learn, begin = Learner(dls, model.to(memory_format=torch.channels_last), loss_func=loss), time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    seconds = time.perf_counter() - begin
    logits, masks = predict_all(model, dls.valid)
    each = SegmentationIoU(11, average=False)
    each.update(logits, masks)
    return judge_masks(logits, masks) | dict(seconds=seconds, steps=len(dls.train)*epochs, iou=each.compute().tolist()) | look(logits, masks)


def look(logits, masks, n=4):
    "Where it is right, and the first answers as characters: a digit to the base 11 a label, one of 61 characters an entropy."
    said, distance, p = logits.argmax(1), border_distance(masks), logits.softmax(1)
    right, entropy = said == masks, -torch.special.xlogy(p, p).sum(1)
    wrong, order = (~right).flatten(), entropy.flatten().argsort(descending=True)
    lines = lambda values, letters: [[''.join(letters[k] for k in line) for line in scene] for scene in values.tolist()]
    return dict(by_distance=[right[distance == d].double().mean().item() for d in range(1, 11)],
                near_border=(distance[~right] <= 2).double().mean().item(),
                unsure_tenth=(wrong[order[:len(order)//10]].sum()/wrong.sum()).item(), answers=lines(said[:n], '0123456789a'),
                entropy=lines((60*entropy[:n]/math.log(11)).round().long(), [chr(48 + k) for k in range(61)]))


def case(model_name, loss_name, train, valid, seeds, epochs, budget):
    "All seeds of a network and a loss."
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        is_ours = model_name in MODELS
        model = MODELS[model_name]() if is_ours else dynamic_unet()
        runs.append(run(model, LOSSES[loss_name], train, valid, seed, epochs, lr=0.01 if is_ours else 0.002, budget=None if is_ours else budget))
    row = dict(model=model_name, loss=loss_name, n_parameters=sum(p.numel() for p in model.parameters()), **{k: runs[0][k] if k in ('answers', 'entropy') else [r[k] for r in runs] for k in runs[0]})
    print(f"{model_name + ', ' + loss_name:34} mean IoU {spread(row['mean_iou'])}  boundary IoU {spread(row['boundary_iou'])}  "
          f"accuracy {spread(row['accuracy'])}  {mean(row['seconds']):.0f} s, {row['steps'][0]} steps", flush=True)
    return row


def main(argv=None):
    "Train, print, store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--scenes', type=int, default=1200, help='to train on')
    parser.add_argument('--valid', type=int, default=200, help='scenes to judge on; at least 4')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--only', choices=[*MODELS, 'fastai DynamicUnet'], help='run one network only')
    parser.add_argument('--loss', choices=LOSSES, help='run one loss only')
    parser.add_argument('--merge', action='store_true', help='keep the stored rows of what is not run')
    parser.add_argument('--budget', type=float, help="seconds for fastai's network; those of the stored or measured U-Net with both losses by default")
    parser.add_argument('--quick', action='store_true', help='two epochs of 100 scenes, one seed, and nothing is stored')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.quick: args.epochs, args.scenes, args.seeds = 2, 100, 1
    fashion, seeds = load('fashion-mini'), list(range(args.seeds))
    train, valid = segmentation_scenes(fashion.train, args.scenes, seed=0), segmentation_scenes(fashion.valid, args.valid, seed=1)
    file = RESULTS/'vision_segmentation.json'
    old = json.loads(file.read_text()) if args.merge and file.exists() else dict(results=[])
    rows = {(r['model'], r['loss']): r for r in old['results']}
    facts = dict(seeds=seeds, n_train=args.scenes, n_valid=args.valid, epochs=args.epochs, data=fashion.sha256)
    if rows and any(old[k] != v for k, v in facts.items()): parser.error('--merge needs the settings of the stored rows')
    for model_name, loss_name in CASES:
        if args.only not in (None, model_name) or args.loss not in (None, loss_name): continue
        budget = args.budget or (mean(rows['U-Net', 'both']['seconds']) if ('U-Net', 'both') in rows else 30)
        rows[model_name, loss_name] = case(model_name, loss_name, train, valid, seeds, args.epochs, budget)
        if not args.quick: store('vision_segmentation', [rows[c] for c in CASES if c in rows], **facts)


if __name__ == '__main__': main()
