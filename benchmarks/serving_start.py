"""From the command to the first "ready", for our server and for its peers serving the same ResNet-18, taking turns."""
import argparse, tempfile
from pathlib import Path
from statistics import median

from common import spread, store
from hosts import make_resnet18, running

SERVERS = {'dlfund float32': ('dlfund', (), {}), 'dlfund int8': ('dlfund', (), dict(precision='int8')), 'plain eager': ('plain', (), {}),
           'litserve eager': ('litserve', ('--workers', 2, '--threads', 1, '--batch', 32), {})}


def main(argv=None):
    "Start everything a few times."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work', type=Path, help='keep bundle and pictures here')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--quick', action='store_true', help='two repeats, nothing is stored')
    args = parser.parse_args(argv)
    repeats, rows = 2 if args.quick else args.repeats, {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory() as folder:
        bundle, _ = make_resnet18(args.work or Path(folder))
        for i in range(repeats + 1): # the first fills the disk's cache
            for name, (kind, options, config) in SERVERS.items():
                with running(kind, bundle, *options, **config) as (_, seconds, _):
                    if i: rows[name].append(round(seconds, 3))
    for name, seconds in rows.items(): print(f'{name:20} {spread(seconds)} s, at most {max(seconds):.2f} s')
    if not args.quick: store('serving_start', {name: dict(median=median(s), worst=max(s), seconds=s) for name, s in rows.items()}, model='resnet18, 64×64×3')


if __name__ == '__main__': main()
