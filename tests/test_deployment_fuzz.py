"Schemathesis reads the server's own description and tries to prove it wrong; `benchmarks/serving.py fuzz` does it at length."
import re, subprocess, sys

import pytest

from dlfund.deployment.requests import new_key
from serving_tools import Running, arrays, assert_said, assert_well, make_trap, softmax, trap_logits, trap_pictures

pytest.importorskip('schemathesis')


@pytest.fixture(scope='module')
def trap(tmp_path_factory): return make_trap(tmp_path_factory.mktemp('bundles')/'trap', n_slow=10)


def fuzz(server, *words, n_examples=25, seed=1, timeout=300):
    "Run all checks in all phases."
    return subprocess.run([sys.executable, '-m', 'schemathesis.cli', 'run', f'{server.url}/openapi.json', '--checks', 'all', '--phases',
                           'examples,coverage,fuzzing,stateful', '--max-examples', str(n_examples), '--seed', str(seed), '--no-color', '--no-shrink',
                           '--generation-database', 'none', '--continue-on-failure', '--warnings', 'off', '--request-timeout', '20', *words],
                          capture_output=True, text=True, timeout=timeout)


def test_the_document_holds(trap):
    with Running(trap) as server:
        ran = fuzz(server)
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-1000:]
        assert re.search(r'5 (selected|operations)|Operations: +5|5/5|5 tested', ran.stdout), ran.stdout # all of them
        assert not [line for line in server.events('request') if line['status'] >= 500]
        assert len(server.events('request')) > 200
        assert_well(server)


def test_the_document_holds_with_keys(trap):
    key, digest = new_key()
    with Running(trap, keys=dict(ann=dict(sha256=digest, rate=1e6, burst=1e6))) as server:
        ran = fuzz(server, '--header', f'Authorization: Bearer {key}', n_examples=10)
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-1000:]
        lines = server.events('request')
        assert not [line for line in lines if line['status'] >= 500] and any(line['status'] == 401 for line in lines) # it tried without
        picture = trap_pictures(1)
        assert_said(server.arrays(picture, authorization=f'Bearer {key}'), softmax(trap_logits(picture)))
        assert not server.events('failed') and not server.noise
