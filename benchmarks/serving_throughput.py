"""The same ResNet-18 (64×64 pictures, PNG uploads) behind our server, a plain FastAPI handler and LitServe, on loopback, taking turns.

`main` first tries a few settings of LitServe for a short time at 64 clients and keeps the best for each engine; then all servers take turns, `--repeats` times, each
started afresh and asked by 1, 8 and 64 clients. Ratios are of the medians over the repeats. Servers that run the same engine are compared with each other, and ours
as it is served by default (float32 graph) and quantized with the peers as people run them (PyTorch); which is which stands in every row."""
import argparse, tempfile
from pathlib import Path
from statistics import median

from common import spread, store
from hosts import load, make_resnet18, running

CLIENTS = (1, 8, 64)
LITSERVE = [('--workers', w, '--threads', t, '--batch', b, '--wait', s, *fast) for w, t in ((2, 1), (1, 2)) for b, s in ((32, 0.01), (8, 0.002), (1, 0))
            for fast in ((), ('--fast',))]
OURS = {'dlfund float32': dict(precision='float32'), 'dlfund int8': dict(precision='int8')}
PEERS = {'plain eager': ('plain',), 'threads eager': ('threads', '--threads', 1), 'plain int8': ('plain', '--engine', 'int8', '--threads', 1)}


def measure(name, bundle, pictures, settings, seconds, clients=CLIENTS):
    "Start one server, ask it, end it."
    is_ours = name in OURS
    kind, *options = ('dlfund',) if is_ours else settings
    with running(kind, bundle, *options, **settings if is_ours else {}) as (address, _, _):
        return {n: load(address, pictures, n, seconds, is_ours) for n in clients}


def tune(bundle, pictures, engine, seconds):
    "The settings with which LitServe answers most often at 64 clients."
    found = {}
    for options in LITSERVE:
        try: found[options] = measure('litserve', bundle, pictures, ('litserve', '--engine', engine, *options), seconds, (64,))[64]
        except Exception as e: found[options] = dict(throughput=0.0, error=f'{type(e).__name__}: {e}'[:200]) # a peer's failure is a result
        print(f'  litserve {engine} {" ".join(map(str, options))}: {found[options]["throughput"]:.0f}/s', flush=True)
    best = max(found, key=lambda options: found[options]['throughput'])
    return ('litserve', '--engine', engine, *best), {' '.join(map(str, options)): one for options, one in found.items()}


def ratios(rows):
    "Of the medians: throughput at 64 clients, and p99, of ours over each peer's."
    mid = lambda name, key: median(one[64][key] for one in rows[name])
    return {f'{ours} / {peer}': dict(throughput=round(mid(ours, 'throughput')/mid(peer, 'throughput'), 2), p99=round(mid(ours, 'p99')/mid(peer, 'p99'), 2))
            for ours in OURS for peer in rows if peer not in OURS and peer != 'echo'}


def show(rows, found):
    "Ratios first."
    for name, one in found.items(): print(f'{name:38} throughput ×{one["throughput"]:<6} p99 ×{one["p99"]}')
    print(f'\n{"server":20} clients  {"answers/s":22} p50 ms   p95 ms   p99 ms')
    for name, runs in rows.items():
        for n in CLIENTS:
            mid = {key: median(run[n][key] or 0 for run in runs) for key in ('p50', 'p95', 'p99')}
            print(f'{name:20} {n:7}  {spread([run[n]["throughput"] for run in runs]):22} {mid["p50"]:<8.1f} {mid["p95"]:<8.1f} {mid["p99"]:<8.1f}')


def main(argv=None):
    "Tune, measure, print, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, help='keep bundle and pictures here')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=5.0, help='of each measurement')
    parser.add_argument('--quick', action='store_true', help='one repeat, one second, no tuning, nothing is stored')
    args = parser.parse_args(argv)
    if args.quick: args.repeats, args.seconds = 1, 1.0
    with tempfile.TemporaryDirectory() as folder:
        bundle, pictures = make_resnet18(args.work or Path(folder))
        tuned, tried = {}, {}
        for engine in 'eager', 'int8':
            if args.quick: tuned[engine] = ('litserve', '--engine', engine, *LITSERVE[0])
            else: tuned[engine], tried[engine] = tune(bundle, pictures, engine, min(3.0, args.seconds))
        settings = OURS | PEERS | {f'litserve {engine}': words for engine, words in tuned.items()} | {'echo': ('echo',)}
        rows = {name: [] for name in settings}
        for _ in range(args.repeats):
            for name, one in settings.items(): rows[name].append(measure(name, bundle, pictures, one, args.seconds))
    found = ratios(rows)
    show(rows, found)
    if not args.quick: store('serving_throughput', dict(ratios=found, servers=rows), litserve={k: ' '.join(map(str, v)) for k, v in tuned.items()}, tried=tried,
                             seconds=args.seconds, repeats=args.repeats, clients=CLIENTS, model='resnet18, 64×64×3, random weights')


if __name__ == '__main__': main()
