"""Schemathesis, all checks and all phases, at length: against an open server and against one with keys; each seed is another run."""
import argparse, re, tempfile
from pathlib import Path

from common import store
import hosts # puts tests/ on the path
from dlfund.deployment.requests import new_key
from serving_tools import Running, make_trap
from test_deployment_fuzz import fuzz


def main(argv=None):
    "Fuzz, count, store."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--examples', type=int, default=300, help='of each operation')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--work', type=Path, help='not used here')
    parser.add_argument('--quick', action='store_true', help='20 examples, one seed, nothing is stored')
    args = parser.parse_args(argv)
    if args.quick: args.examples, args.seeds = 20, [1]
    rows, (key, digest) = [], new_key()
    with tempfile.TemporaryDirectory() as folder:
        path = make_trap(Path(folder)/'trap', n_slow=10)
        for seed in args.seeds:
            for keys in {}, dict(ann=dict(sha256=digest, rate=1e6, burst=1e6)):
                with Running(path, keys=keys) as server:
                    ran = fuzz(server, *(['--header', f'Authorization: Bearer {key}'] if keys else []), n_examples=args.examples, seed=seed, timeout=1800)
                    lines = server.events('request')
                    statuses = {str(s): sum(line['status'] == s for line in lines) for s in sorted({line['status'] for line in lines})}
                    rows.append(dict(seed=seed, has_keys=bool(keys), requests=len(lines), statuses=statuses, passed=ran.returncode == 0,
                                     said=ran.stdout[-3000:] if ran.returncode else re.sub(r'\s+', ' ', ran.stdout[-300:])))
                print({k: v for k, v in rows[-1].items() if k != 'said' or ran.returncode}, flush=True)
    print(f'{sum(row["requests"] for row in rows):,} requests; {sum(not row["passed"] for row in rows)} of {len(rows)} runs failed')
    if not args.quick: store('serving_fuzz', rows, examples=args.examples)


if __name__ == '__main__': main()
