"The small Faster R-CNN, three seeds: recall of its proposals, and mean average precision against their number."
import argparse, time
from dataclasses import replace

import common


def run(
    seed:int, # of the weights, the order and the samples
    train, # scenes to learn from
    valid, # scenes to judge
    numbers:list[int], # of proposals
    n_epochs:int, # passes over the scenes
)->dict: # what one seed found
    "Train one small detector and judge both of its stages."
    import fastai.callback.schedule # adds Learner.fit_one_cycle
    from fastai.learner import Learner

    from dlfund.data.loading import seed_everything
    from dlfund.vision.detection import DetectionCallback, detect, detection_loaders, evaluate
    from dlfund.vision.faster_rcnn import faster_rcnn_mini, proposal_recall
    seed_everything(seed)
    net, begin = faster_rcnn_mini(len(train.names)), time.perf_counter()
    learn = Learner(detection_loaders(train, valid, 16, seed=seed), net, cbs=DetectionCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epochs, 4e-3)
    seconds, judged, by_number = time.perf_counter() - begin, evaluate(net, valid), []
    proposals = net.eval().propose(valid.pictures.float()/255)
    recall = {t: [proposal_recall(proposals, valid.targets, n, iou_threshold=t) for n in numbers] for t in (0.5, 0.7)}
    for n in numbers:
        net.rpn.config = replace(net.config, n_proposals=(net.config.n_proposals[0], n))
        by_number.append(evaluate(net, valid)['mAP'])
    net.rpn.config = net.config
    found = [{k: v.tolist() for k, v in d.items()} for d in detect(net, valid.pictures[:6])]
    return dict(seed=seed, seconds=seconds, recall=recall, by_number=by_number, found=found if seed == 0 else None,
                **{k: judged[k] for k in ('mAP', 'mAP50', 'mAP75')})


def main():
    "Measure and store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scenes', type=int, default=500, help='to learn from')
    parser.add_argument('--epochs', type=int, default=8, help='passes over the scenes')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()

    from dlfund.data.datasets import load
    from dlfund.vision.detection import scenes
    fashion, numbers = load('fashion-mini'), [1, 2, 4, 8, 16, 32]
    train, valid, results = scenes(fashion.train, args.scenes, seed=0), scenes(fashion.valid, 200, seed=1), []
    for seed in args.seeds:
        results.append(run(seed, train, valid, numbers, args.epochs))
        print({k: round(v, 3) for k, v in results[-1].items() if isinstance(v, float)}, flush=True)
        common.store('vision_faster_rcnn', results, data=fashion.sha256, scenes=args.scenes, epochs=args.epochs, numbers=numbers)


if __name__ == '__main__': main()
