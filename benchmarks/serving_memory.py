"""Resident memory of front and workers while 20,000 requests arrive, good and bad mixed: does it grow?

A third of the requests are good pictures, a third hostile ones of `tests/hostile.py`, a third malformed forms, JSON and connections that break off. After a
warm-up the slope is fitted by least squares, and, as a check against a single jump, by the median over pairs of samples (Theil-Sen); in MiB per 1,000 requests."""
import argparse, concurrent.futures, json, random, socket, tempfile, time
from pathlib import Path

import numpy as np
import psutil

from common import store
from hosts import make_resnet18, running # puts tests/ on the path
import hostile
from serving_tools import ask, base64s, form


def requests_of(pictures):
    "Functions of an address that ask once, by kind."
    files = [f.read_bytes() for f in sorted(pictures.glob('*.png'))]
    send = lambda body, kind: lambda a: ask(a, 'POST', '/v1/predict', body, {'content-type': kind}).status
    good = [send(*form(f)) for f in files] + [send(*form(*files[:4]))] + [send(json.dumps(base64s(files[:2])).encode(), 'application/json')]
    small = [(content, statuses) for _, content, statuses in hostile.corpus() if len(content) < 300_000]
    bad = [send(*form(content)) for content, _ in small] + [send(*form(content)) for _, content, _ in hostile.mutants(20)]
    wrong = [send(body, kind) for _, kind, body in hostile.forms() if len(body) < 300_000]
    wrong += [send(body, 'application/json') for _, body in hostile.jsons() if len(body) < 300_000] + [leaver(files[0])]*10
    return dict(good=good, hostile=bad, malformed=wrong)


def leaver(content):
    "A client that leaves in the middle of its body."
    body, kind = form(content)
    head = f'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n'.encode()
    def leave(address):
        with socket.create_connection(address, 10) as s: s.sendall(head + body[:len(body)//2])
        return 'left'
    return leave


def sample(process):
    "MiB of the front and of all its workers."
    mib = lambda p: p.memory_info().rss/2**20
    children = [p for p in process.children() if p.is_running()]
    return dict(front=mib(process), workers=sum(map(mib, children)), pids=sorted(p.pid for p in children))


def slopes(n, mib):
    "Least squares and Theil-Sen, MiB per 1,000 requests."
    n, mib = np.array(n)/1000, np.array(mib)
    i, j = np.triu_indices(len(n), 1)
    return dict(least_squares=round(float(np.polyfit(n, mib, 1)[0]), 4), theil_sen=round(float(np.median((mib[j] - mib[i])/(n[j] - n[i]))), 4),
                first=round(float(mib[0]), 1), last=round(float(mib[-1]), 1))


def main(argv=None):
    "Ask, sample, fit, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work', type=Path, help='keep bundle and pictures here')
    parser.add_argument('--requests', type=int, default=20_000)
    parser.add_argument('--warm-up', type=int, default=5_000, help='requests before the slope is fitted; of --requests')
    parser.add_argument('--quick', action='store_true', help='600 requests, nothing is stored')
    args = parser.parse_args(argv)
    if args.quick: args.requests, args.warm_up = 600, 200
    rng, counts, samples, step = random.Random(0), {}, [], max(50, args.requests//80)
    with tempfile.TemporaryDirectory() as folder:
        bundle, pictures = make_resnet18(args.work or Path(folder))
        with running('dlfund', bundle, precision='int8', max_pixels=hostile.MAX_PIXELS) as (address, _, process):
            host, port = address.split(':')
            kinds, front, begin = requests_of(pictures), psutil.Process(process.pid), time.perf_counter()
            def one(seed):
                kind = rng.choice(list(kinds))
                return kind, rng.choice(kinds[kind])((host, int(port)))
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                for done in range(0, args.requests, step):
                    for kind, status in pool.map(one, range(step)): counts[f'{kind} {status}'] = counts.get(f'{kind} {status}', 0) + 1
                    samples.append(dict(n=done + step) | sample(front))
            seconds = time.perf_counter() - begin
    late = [s for s in samples if s['n'] > args.warm_up]
    found = {part: slopes([s['n'] for s in late], [s[part] if part != 'all' else s['front'] + s['workers'] for s in late]) for part in ('front', 'workers', 'all')}
    wrong = {k: n for k, n in counts.items() if not k.split()[1] in ('200', '413', '415', '422', 'left')}
    for part, one in found.items(): print(f'{part:8} {one["least_squares"]:+.3f} MiB per 1,000 requests ({one["theil_sen"]:+.3f} by Theil-Sen), {one["first"]} to {one["last"]} MiB')
    print(f'{args.requests:,} requests in {seconds:.0f} s: {dict(sorted(counts.items()))}; unexpected: {wrong or "none"}; '
          f'{"the same workers all the time" if len({tuple(s["pids"]) for s in samples}) == 1 else "workers were lost"}')
    if not args.quick: store('serving_memory', dict(slopes=found, counts=counts, unexpected=wrong, samples=samples), requests=args.requests, warm_up=args.warm_up,
                             seconds=round(seconds), model='resnet18 int8, 64×64×3')


if __name__ == '__main__': main()
