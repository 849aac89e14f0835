"What the chapter *In production* promises, with other processes: kills, races, and watches on real pictures."
import json, os, subprocess, sys, time
from collections import Counter

import numpy as np
import pytest

from dlfund.data.datasets import load
from dlfund.data.preprocessing import fit_preprocess
from dlfund.deployment.bundle import Bundle
from dlfund.deployment.files import BundleError, make_keys, sign_bundle
from dlfund.deployment.production import (Canary, Cusum, Shadow, bundle_version, chi2_test, cusum_run_length, data_sheet,
                                          evidence, history, judge_canary, ks_test, log_record, mcnemar_test, mmd_test,
                                          picture_features, psi, record_incident, release, replay_incident, rollback,
                                          shift_pictures)
from dlfund.vision import build


@pytest.fixture(scope='module')
def fashion(): return load('fashion-mini')


@pytest.fixture(scope='module')
def bundles(tmp_path_factory, fashion):
    "Three small bundles that differ in their weights."
    folder, preprocess = tmp_path_factory.mktemp('bundles'), fit_preprocess(fashion.train.x)
    return [Bundle(model=build('lenet', n_classes=10, n_channels=1).eval(), preprocess=preprocess, labels=list(fashion.labels),
                   architecture=dict(name='lenet', n_classes=10, n_channels=1), metrics={}, training=dict(seed=seed),
                   data=dict(name=fashion.name, sha256=fashion.sha256, source=fashion.source, licence=fashion.licence,
                             n_test_reads=0)).save(folder/f'v{seed}') for seed in range(3)]


def test_imports_no_torch():
    code = 'import sys, dlfund.deployment.production; print(sorted({"torch", "fastai", "scipy", "matplotlib"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.parametrize('seed', range(5))
def test_ks_equals_scipy(seed):
    from scipy import stats
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 200, 2)
    a, b = np.round(rng.normal(size=n), seed), np.round(rng.normal(size=m) + 0.2, seed) # from heavily tied to hardly
    theirs = stats.ks_2samp(a, b, method='exact')
    assert ks_test(a, b) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)
    assert ks_test(b, a) == pytest.approx(ks_test(a, b), rel=1e-9)


def test_tests_are_symmetric_and_see_a_shift(fashion):
    x, rng = fashion.valid.x, np.random.default_rng(0)
    old, new = picture_features(x[::2]), picture_features(shift_pictures(x[1::2], 'brightness', 0.5))
    assert psi(old[:, 0], new[:, 0]) > 0.25 and ks_test(old[:, 0], new[:, 0])[1] < 1e-6
    assert mmd_test(old[:100], new[:100], 99, rng)[1] <= 0.02
    assert chi2_test([30, 70], [60, 40])[1] == pytest.approx(chi2_test([60, 40], [30, 70])[1])


@pytest.mark.parametrize('kind, amount', [('brightness', 1), ('blur', 0), ('rotation', 0)])
def test_no_shift_changes_nothing(fashion, kind, amount):
    assert (shift_pictures(fashion.valid.x[:20], kind, amount) == fashion.valid.x[:20]).all()


def test_watch_on_pictures(fashion):
    "Within the promised length on what it was made for, and soon on what it was not."
    level, rng = picture_features(fashion.valid.x)[:, 0], np.random.default_rng(0)
    alarms = 0
    for _ in range(40):
        watch = Cusum(mean=level.mean(), sd=level.std()/50**0.5, threshold=4)
        alarms += any([watch.update(rng.choice(level, 50).mean()) for _ in range(20)])
    assert alarms <= 14 # 20 looks of about 168 between alarms: about 4 of 40
    assert cusum_run_length(4, shift=2) < 5 < cusum_run_length(4, shift=0.5) < cusum_run_length(4)


def test_canary_is_the_same_in_another_process():
    code = ('import sys; from dlfund.deployment.production import Canary; c = Canary(share=0.3, trial="t");'
            'print("".join(str(int(c.is_new(f"caller {i}"))) for i in range(200)))')
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                           env=os.environ | dict(PYTHONHASHSEED='7')).stdout.strip()
    here = Canary(share=0.3, trial='t')
    assert there == ''.join(str(int(here.is_new(f'caller {i}'))) for i in range(200))
    assert 30 < there.count('1') < 90


def test_shadow_never_reaches_the_caller():
    def broken(x): raise RuntimeError('no')
    shadow = Shadow(old=lambda x: x + 1, new=broken)
    assert [shadow(i) for i in range(5)] == [1, 2, 3, 4, 5] and shadow.failures == Counter(RuntimeError=5)
    assert np.isnan(shadow.agreement())


def test_verdicts():
    assert mcnemar_test(0, 0) == 1 and evidence(0, 0) == 1
    assert evidence(0, 5000) > 1e300 / 1e10 and judge_canary(5000, 0) == 'roll back' # no overflow
    assert judge_canary(2500, 2510) == 'wait'


def test_release_and_rollback(tmp_path, bundles):
    home, (v0, v1, v2) = tmp_path/'home', map(bundle_version, bundles)
    with pytest.raises(ValueError, match='go back to'): rollback(home)
    for bundle in bundles[:2]: served = release(home, bundle)
    assert bundle_version(served) == v1 and history(home) == [v1, v0]
    rollback(home)
    release(home, bundles[2])
    assert history(home) == [v2, v0] and Bundle.load(served).training == dict(seed=2)
    release(home, bundles[1]) # the same version again: no second copy
    assert history(home) == [v1, v2, v0] and len(list((home/'versions').iterdir())) == 3


def test_a_broken_bundle_is_not_released(tmp_path, bundles):
    import shutil
    home, broken = tmp_path/'home', shutil.copytree(bundles[0], tmp_path/'broken')
    release(home, bundles[1])
    weights = bytearray((broken/'model.safetensors').read_bytes())
    weights[-1] ^= 1
    (broken/'model.safetensors').write_bytes(weights)
    with pytest.raises(BundleError, match='hash mismatch'): release(home, broken)
    assert history(home) == [bundle_version(bundles[1])]


def test_only_signed_bundles_if_asked(tmp_path, bundles):
    import shutil
    pytest.importorskip('cryptography')
    secret, public = make_keys(tmp_path/'keys')
    signed = shutil.copytree(bundles[0], tmp_path/'signed')
    sign_bundle(signed, secret)
    release(tmp_path/'home', signed, public)
    with pytest.raises(BundleError): release(tmp_path/'home', bundles[1], public)
    assert history(tmp_path/'home')[0] == bundle_version(signed)


RESTLESS = '''
import sys
from dlfund.deployment.production import release, rollback
print('go', flush=True)
while True:
    for bundle in sys.argv[2:]: release(sys.argv[1], bundle)
    rollback(sys.argv[1])
'''


def test_killed_at_any_moment(tmp_path, bundles):
    "SIGKILL at random moments: `current` is always one whole version, and the next release works."
    home, versions = tmp_path/'home', {bundle_version(b) for b in bundles}
    release(home, bundles[0])
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(15):
        process = subprocess.Popen([sys.executable, '-c', RESTLESS, str(home), *map(str, bundles)], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            until = time.monotonic() + rng.uniform(0, 0.1)
            while time.monotonic() < until: seen[bundle_version((home/'current'/'bundle').resolve())] += 1
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        seen[bundle_version(home/'current'/'bundle')] += 1
        assert set(history(home)) <= versions
    assert set(seen) <= versions and sum(seen.values()) >= 15
    release(home, bundles[1])
    assert history(home)[0] == bundle_version(bundles[1])


def test_sheet_does_not_read_the_test_part(fashion):
    reads = fashion.n_test_reads
    sheet = data_sheet(fashion)
    assert fashion.n_test_reads == reads and fashion.sha256 in sheet and 'Nobody has answered' in sheet
    assert all(label in sheet for label in fashion.labels)


@pytest.mark.parametrize('record', [dict(picture='x'), dict(ip='127.0.0.1'), dict(status='200'), dict(status=True), dict(label='a'*101)])
def test_what_a_log_refuses(record):
    with pytest.raises(ValueError): log_record(record)


def test_an_incident_survives_json(bundles):
    run = lambda bundle, content: np.frombuffer(content, np.uint8) / 7
    kept = json.loads(json.dumps(record_incident(bundles[0], b'abc', run(None, b'abc'))))
    assert replay_incident(kept, bundles[0], run) < 1e-5
    with pytest.raises(ValueError, match='must be version'): replay_incident(kept, bundles[1], run)
