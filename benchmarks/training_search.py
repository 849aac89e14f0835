"""A search over the main job: `python benchmarks/training_search.py [--trials 24] [--epochs 12] [--folder FOLDER]`.

Learning rate, weight decay, augmentation and width of `configs/search.yaml`, Optuna's estimator with pruning, in one storage: started again with the
same folder it goes on. Afterwards the default and the best are trained with three new seeds and judged on the test part, each once. The chapter
*Hyperparameter search* reads `benchmarks/results/training_search.json`."""
import argparse, time
from dataclasses import replace
from pathlib import Path

import torch

from common import spread, store
from dlfund.data.datasets import load
from dlfund.data.loading import ArrayLoader
from dlfund.data.preprocessing import fit_preprocess
from dlfund.training.learner import predict_all
from dlfund.training.runs import train_experiment
from dlfund.training.search import read_search, search
from dlfund.vision import build

CONFIG = Path(__file__).parent.parent/'configs'/'search.yaml'
SEEDS = (101, 102, 103) # none of them is the search's


def train(fashion, experiment, cbs=()):
    "Train as an experiment says; return the learner."
    return train_experiment(experiment, fashion, fit_preprocess(fashion.train.x), build, cbs)


def judge(fashion, experiment):
    "Accuracy on validation and, at the very end, on the test part, with each new seed."
    rows, test = dict(valid=[], test=[]), fashion.test
    begin = time.perf_counter()
    for seed in SEEDS:
        learn = train(fashion, replace(experiment, train=replace(experiment.train, seed=seed)))
        rows['valid'].append(learn.epoch_log.history[-1]['accuracy'])
        batches = ArrayLoader(torch.from_numpy(test.x), torch.from_numpy(test.y.astype('int64')), bs=500, transform=fit_preprocess(fashion.train.x))
        logits, y = predict_all(learn.model, batches)
        rows['test'].append((logits.argmax(-1) == y).float().mean().item())
    return rows | dict(seconds=(time.perf_counter() - begin)/len(SEEDS))


def main(argv=None):
    "Search, judge, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, help='in place of the number in configs/search.yaml')
    parser.add_argument('--epochs', type=int, help='of each training, in place of the number of the base experiment')
    parser.add_argument('--folder', default='runs/training_search', help='holds the storage; delete it to begin anew')
    args = parser.parse_args(argv)
    fashion, space = load('fashion-mini'), read_search(CONFIG)
    if args.epochs: space = replace(space, base=replace(space.base, train=replace(space.base.train, epochs=args.epochs)))
    if args.trials: space = replace(space, trials=args.trials)
    result = search(space, lambda experiment, cbs: train(fashion, experiment, cbs).epoch_log.history[-1], args.folder)
    judged = {name: judge(fashion, e) for name, e in [('default', space.base), ('best', result.best)]}
    for name, row in judged.items(): print(f"{name:8} validation {spread(row['valid'])}  test {spread(row['test'])}")
    found = dict(search=space.tree(), rows=result.rows, value=result.value, number=result.number,
                 values=result.rows[result.number]['values'], seconds=sum(row['seconds'] for row in result.rows), judged=judged)
    print(store('training_search', found, seeds=SEEDS, data=fashion.sha256))


if __name__ == '__main__': main()
