"The server's contract, asked of real servers over HTTP; and the batcher's, on a clock of our own."
import asyncio, concurrent.futures, http.client, io, json, os, random, re, signal, threading, time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from conftest import DLFUND
from dlfund.data.datasets import load
from dlfund.data.preprocessing import read_batch
from dlfund.deployment.batching import MicroBatcher, Overloaded, TokenBucket, WorkerLost
from dlfund.deployment.files import attach, read_facts
from dlfund.deployment.requests import new_key
from serving_tools import (HANG, POISON, SIZE, SLOW, Running, arrays, assert_refused, assert_said, assert_well, base64s,
                           make_bundle, make_trap, softmax, trap_graph, trap_logits, trap_pictures, turns_of)

GREY, COLOUR = dict(name='lenet', n_classes=10, n_channels=1), dict(name='resnet-mini', n_classes=7, n_channels=3, width=0.5)
SLOW_SECONDS = 0.3


def encoded(picture, kind='PNG', **options):
    "A picture as a file."
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope='module')
def grey(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundles')/'grey'
    return folder, make_bundle(folder, GREY)


@pytest.fixture(scope='module')
def colour(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundles')/'colour.zip'
    return folder, make_bundle(folder, COLOUR, (23, 19))


@pytest.fixture(scope='module')
def areas(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundles')/'areas'
    return folder, make_bundle(folder, dict(name='unet_mini', n_classes=3, n_channels=3), (32, 48), 'semantic-segmentation')


@pytest.fixture(scope='module')
def n_slow(): return turns_of(SLOW_SECONDS)


@pytest.fixture
def trap(n_slow, tmp_path): return make_trap(tmp_path/'trap', n_slow=n_slow)


@pytest.fixture(scope='module')
def server(grey, colour, areas):
    "One server with three models, which only well-behaved tests use."
    with Running(grey[0], f'rgb={colour[0]}', areas[0]) as running: yield running


@pytest.fixture(scope='module')
def garments(): return load('fashion-mini').valid.x[:8]


def expected(bundle, files):
    "What the bundle itself says, in PyTorch."
    return np.array([list(p.probabilities.values()) for p in bundle.predict(read_batch([io.BytesIO(f) for f in files], bundle.preprocess))])


# Answers

def test_files_get_the_answers_of_the_bundle(server, grey, garments):
    files = [encoded(p) for p in garments]
    said = assert_said(server.files(*files, model='grey'), expected(grey[1], files))
    assert said['model'] == 'grey' and re.fullmatch('[0-9a-f]{12}', said['version']) and len(said['predictions']) == 8


def test_a_prediction_says_what_the_bundle_says(server, grey, garments):
    [said] = server.files(encoded(garments[0]), model='grey').json()['predictions']
    [wanted] = grey[1].predict(torch.from_numpy(garments[:1]))
    assert list(said) == ['label', 'probability', 'probabilities'] and said['label'] == wanted.label
    assert list(said['probabilities']) == grey[1].labels and abs(said['probability'] - wanted.probability) < 1e-5


def test_base64_and_arrays_get_the_same_answers(server, grey, garments):
    files = [encoded(p) for p in garments]
    for asked in base64s(files), arrays(garments): assert_said(server.json(asked | {'model': 'grey'}), expected(grey[1], files))


@pytest.mark.parametrize('kind, options', [
    ('PNG', {}), ('JPEG', dict(quality=60)), ('WEBP', dict(quality=50)), ('GIF', {}), ('BMP', {}), ('TIFF', {}),
    ('TIFF', dict(compression='tiff_deflate')), ('JPEG', dict(progressive=True, subsampling=2))])
def test_every_type_is_decoded_as_the_bundle_decodes_it(server, colour, kind, options):
    pictures = np.random.default_rng(1).integers(0, 256, (3, 41, 67, 3), dtype=np.uint8)
    files = [encoded(p, kind, **options) for p in pictures]
    assert_said(server.files(*files, model='rgb'), expected(colour[1], files))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_turned_photograph_is_turned_back(server, colour, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = np.random.default_rng(2).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    file = encoded(picture, 'JPEG', quality=95, exif=exif)
    assert_said(server.files(file, model='rgb'), expected(colour[1], [file]))


def test_a_segmentation_says_what_is_where(server, areas):
    picture = np.random.default_rng(3).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    [said] = server.files(encoded(picture), model='areas').json()['predictions']
    [wanted] = areas[1].segment(torch.from_numpy(picture[None]))
    assert (np.array(said['classes']) == wanted.classes).mean() > 0.999 # ties within 1e-5 may fall either way
    assert said['shares'] == pytest.approx(wanted.shares, abs=1e-3)


def test_one_broken_picture_fails_alone(server, grey, garments):
    files = [encoded(p) for p in garments[:4]]
    said = server.files(files[0], b'no picture', files[1][:90], files[2], b'', model='grey').json()['predictions']
    assert [p.get('error', {}).get('code') for p in said] == [None, 'not_a_picture', 'broken_picture', None, 'not_a_picture']
    found = np.array([list(said[i]['probabilities'].values()) for i in (0, 3)])
    np.testing.assert_allclose(found, expected(grey[1], [files[0], files[2]]), atol=1e-5)


def test_many_at_once_each_get_their_own(server, grey):
    pictures = np.random.default_rng(4).integers(0, 256, (96, *SIZE), dtype=np.uint8)
    wanted = expected(grey[1], [encoded(p) for p in pictures])
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for answer, row in zip(pool.map(lambda p: server.arrays(p[None], 'grey'), pictures), wanted): assert_said(answer, row[None])
    assert len({str(row.round(6)) for row in wanted}) == 96 # else it proves nothing


def test_a_poisoned_picture_fails_alone_even_among_strangers(trap):
    with Running(trap, workers=1, max_wait=0.2, max_batch=8) as server:
        pictures = np.concatenate([trap_pictures(7, seed=5), trap_pictures(1, POISON)])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda p: server.arrays(p[None]), pictures))
        for answer, row in zip(found[:7], softmax(trap_logits(pictures[:7]))): assert_said(answer, row[None])
        assert found[7].status == 500 and found[7].json()['error']['code'] == 'model_failed' # a model's fault, said as such
        assert server.metrics()['dlfund_batch_size_sum', 'trap'] == 9 # these, and the server's own first question
        assert_well(server)


# Routes

def test_models_are_described(server, grey, colour):
    said = {m['name']: m for m in server.get('/v1/models').json()['models']}
    assert list(said) == ['grey', 'rgb', 'areas']
    assert said['grey']['labels'] == grey[1].labels and said['grey']['size'] == [28, 28] and said['grey']['n_channels'] == 1
    assert said['rgb']['size'] == [23, 19] and said['areas']['task'] == 'semantic-segmentation'
    assert server.files(b'GIF89a', model='rgb').status == 422
    assert server.arrays(trap_pictures(1), 'grey').json()['version'] == said['grey']['version']


def test_health_readiness_and_what_is_not_there(server):
    assert server.get('/healthz').json() == {'status': 'alive'} and server.get('/readyz').json() == {'status': 'ready'}
    for path in ('/', '/v1', '/v1/predict/', '/docs', '/redoc', '/../etc/passwd', '/%2e%2e/x'):
        assert_refused(server.get(path), 404)
    assert server.get('/v1/models?x=1#y').status == 200
    answer = server.get('/v1/predict')
    assert_refused(answer, 405)
    assert answer.headers['allow'] == 'POST'
    assert_refused(server.ask('DELETE', '/v1/models'), 405)


def test_a_model_must_be_named_if_there_are_several(server):
    assert 'one of grey, rgb, areas' in assert_refused(server.arrays(trap_pictures(1)), 422)['message']
    assert assert_refused(server.arrays(trap_pictures(1), 'gray'), 404)['code'] == 'no_such_model'
    assert assert_refused(server.files(b'x', model='gray'), 404)['code'] == 'no_such_model'


def test_the_examples_of_the_document_are_true(server):
    document = server.get('/openapi.json').json()
    route = document['paths']['/v1/predict']['post']
    asked = route['requestBody']['content']['application/json']['example']
    promised = route['responses']['200']['content']['application/json']['example']
    said = server.json(asked).json()
    for key in 'model', 'version': assert said[key] == promised[key]
    [mine], [theirs] = said['predictions'], promised['predictions']
    assert mine['label'] == theirs['label'] and mine['probabilities'] == pytest.approx(theirs['probabilities'], abs=1e-5)
    assert set(document['paths']) == {'/v1/predict', '/v1/models', '/healthz', '/readyz', '/metrics'}


def test_ids_go_through_if_they_are_harmless(server):
    assert server.get('/healthz', **{'x-request-id': 'Order_66.b-1'}).headers['x-request-id'] == 'Order_66.b-1'
    for strange in ('a b', '<script>', 'x'*65, '', 'é'): # é goes as latin-1
        given = server.get('/healthz', **{'x-request-id': strange}).headers['x-request-id']
        assert re.fullmatch('[0-9a-f]{16}', given)


def test_one_connection_carries_many_requests(server, grey):
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.connect()
    socket, body = connection.sock, json.dumps(arrays(trap_pictures(1), 'grey'))
    for path in ['/healthz', '/v1/predict', '/nowhere', '/v1/predict', '/v1/models']:
        connection.request(*(('POST', path, body, {'content-type': 'application/json'}) if 'predict' in path else ('GET', path)))
        answer = connection.getresponse()
        assert answer.read() and answer.status == (404 if path == '/nowhere' else 200) and connection.sock is socket
    connection.close()


def test_metrics_count_and_do_not_grow_with_what_strangers_write(trap):
    with Running(trap) as server:
        before = server.metrics()
        for _ in range(3): assert server.arrays(trap_pictures(2)).status == 200
        for i in range(5): server.get(f'/nowhere-{i}'); server.ask('POST', f'/v1/predict?{i}'); server.arrays(trap_pictures(1), f'model-{i}')
        server.files(b'no picture')
        after = server.metrics()
        count = lambda *key: after.get(key, 0) - before.get(key, 0)
        assert count('dlfund_requests_total', '/v1/predict', '200') == 3
        assert count('dlfund_requests_total', '404', 'none') == 5 and count('dlfund_requests_total', '/v1/predict', '404') == 5
        assert count('dlfund_pictures_total', '200', 'trap') == 6 and count('dlfund_pictures_total', '415', 'trap') == 1
        assert after['dlfund_batch_size_sum', 'trap'] - before.get(('dlfund_batch_size_sum', 'trap'), 0) == 7
        assert after['dlfund_workers', 'trap'] == 2 and after['dlfund_requests_in_progress',] == 1
        assert not [key for key in after if any('nowhere' in part or 'model-' in part for part in key)]
        n_keys = len(after)
        for i in range(20): server.get(f'/x{i}'); server.arrays(trap_pictures(1), f'm{i}')
        assert len(server.metrics()) <= n_keys + 4 # no new label values; a created-at sample at most


def test_neither_the_front_nor_a_worker_has_torch(server):
    for pid in [server.process.pid, *(p.pid for p in server.workers())]:
        maps = open(f'/proc/{pid}/maps').read()
        assert 'libtorch' not in maps and ('onnxruntime' in maps) == (pid != server.process.pid)


# Who may ask

@pytest.fixture
def locked(trap):
    "A server with keys, and the keys."
    (full, a), (metrics, b), (slow, c) = new_key(), new_key(), new_key()
    keys = dict(ann=dict(sha256=a), bob=dict(sha256=b, scopes=['metrics']), cid=dict(sha256=c, rate=0.5, burst=3))
    with Running(trap, keys=keys) as server: yield server, full, metrics, slow


def bearer(key): return {'authorization': f'Bearer {key}'}


def test_keys_and_scopes(locked):
    server, full, metrics, _ = locked
    picture = trap_pictures(1)
    for wrong in ({}, bearer('x'), bearer(''), bearer(full[:-1]), bearer(full.lower()), {'authorization': full}, {'authorization': f'Basic {full}'},
                  bearer('ä'*10), bearer('x'*10_000)):
        answer = server.json(arrays(picture), **wrong)
        assert assert_refused(answer, 401)['code'] == 'no_key' and answer.headers['www-authenticate'] == 'Bearer'
    assert_said(server.json(arrays(picture), **bearer(full)), softmax(trap_logits(picture)))
    assert server.json(arrays(picture), authorization=f'bearer  {full} ').status == 200 # schemes have no case
    assert assert_refused(server.json(arrays(picture), **bearer(metrics)), 403)['code'] == 'out_of_scope'
    assert server.get('/metrics', **bearer(metrics)).status == 200 and server.get('/v1/models', **bearer(metrics)).status == 403
    assert server.get('/metrics').status == 401 and server.get('/healthz').status == 200 and server.get('/readyz').status == 200


def test_a_rate_is_each_keys_own(locked):
    server, full, _, slow = locked
    statuses = [server.get('/v1/models', **bearer(slow)) for _ in range(8)]
    refused = [answer for answer in statuses if answer.status != 200]
    assert [a.status for a in statuses[:3]] == [200]*3 and len(refused) >= 4
    for answer in refused: assert assert_refused(answer, 429)['code'] == 'rate_limited' and 1 <= int(answer.headers['retry-after']) <= 2
    assert server.get('/v1/models', **bearer(full)).status == 200
    time.sleep(int(refused[-1].headers['retry-after']))
    assert server.get('/v1/models', **bearer(slow)).status == 200 # the promise of Retry-After


def test_a_rate_for_addresses(trap):
    with Running(trap, rate=2) as server:
        statuses = [server.get('/v1/models').status for _ in range(12)]
        assert statuses[:4] == [200]*4 and statuses.count(429) >= 3
        assert server.get('/healthz').status == 200 # probes are not counted


def test_no_page_may_ask_unless_it_is_named(trap, server):
    mine, other = {'origin': 'https://mine.example'}, {'origin': 'https://other.example'}
    asked = {'access-control-request-method': 'POST', 'access-control-request-headers': 'content-type'}
    assert 'access-control-allow-origin' not in server.get('/v1/models', **mine).headers
    assert 'access-control-allow-origin' not in server.ask('OPTIONS', '/v1/predict', headers=mine | asked).headers
    with Running(trap, cors=['https://mine.example']) as opened:
        assert opened.get('/v1/models', **mine).headers['access-control-allow-origin'] == 'https://mine.example'
        answer = opened.ask('OPTIONS', '/v1/predict', headers=mine | asked)
        assert answer.status == 200 and answer.headers['access-control-allow-origin'] == 'https://mine.example'
        assert 'POST' in answer.headers['access-control-allow-methods']
        assert 'access-control-allow-origin' not in opened.get('/v1/models', **other).headers
        assert opened.ask('OPTIONS', '/v1/predict', headers=other | asked).status in (400, 403)
        assert 'access-control-allow-credentials' not in opened.get('/v1/models', **mine).headers


# Limits

def test_limits_of_size_number_and_type(trap):
    with Running(trap, max_body=50_000, max_pictures=4, max_queue=8, max_pixels=1000) as server:
        small, large = encoded(np.zeros((20, 50), np.uint8)), encoded(np.zeros((20, 51), np.uint8))
        assert server.files(*[small]*4).status == 200
        assert assert_refused(server.files(*[small]*5), 413)['code'] == 'too_many_pictures'
        assert assert_refused(server.json(base64s([small]*5)), 413)['code'] == 'too_many_pictures'
        assert assert_refused(server.files(large), 413)['code'] == 'too_many_pixels'
        assert server.files(small, large).json()['predictions'][1]['error']['code'] == 'too_many_pixels'
        assert assert_refused(server.files(b'x'*50_000), 413)['code'] == 'too_large'
        chunks = iter([b'x'*1000]*100)
        assert assert_refused(server.ask('POST', '/v1/predict', chunks, {'content-type': 'application/json'}), 413)['code'] == 'too_large'
        for kind in ('text/plain', 'image/png', 'application/x-www-form-urlencoded', '', 'application/jsonp', 'multipart/mixed; boundary=x'):
            assert assert_refused(server.ask('POST', '/v1/predict', b'{}', {'content-type': kind}), 415)['code'] == 'unsupported_type'
        assert_refused(server.json(arrays(trap_pictures(1)), **{'content-encoding': 'gzip'}), 415)
        assert_refused(server.ask('POST', '/v1/predict', b'{}'), 415)
        assert_well(server)


def test_too_late_is_504_and_others_are_answered(trap):
    with Running(trap, timeout=1.0, worker_timeout=4.0) as server:
        assert assert_refused(server.arrays(trap_pictures(1, HANG)), 504)['code'] == 'too_late'
        assert_well(server)


# Logs

def test_logs_are_json_without_payloads(trap, tmp_path):
    key, digest = new_key()
    with open(tmp_path/'log', 'w') as log, Running(trap, log=log, keys=dict(ann=dict(sha256=digest))) as server:
        ours = {'authorization': f'Bearer {key}', 'user-agent': 'marker-agent', 'cookie': 'marker-cookie', 'referer': 'marker-referer'}
        server.files(encoded(np.zeros(SIZE, np.uint8)), b'marker-file', **ours)
        server.json(arrays(trap_pictures(1), 'marker-model'), **ours)
        server.json(dict(pictures=[{'base64': 'bWFya2VyLWZpbGU='}], marker_field='marker-value'), **ours)
        server.ask('POST', '/v1/predict?marker-query=1', b'marker-body', {'content-type': 'application/json'} | ours)
        server.get('/marker-path', **ours)
        server.get('/v1/models', authorization='Bearer marker-key', **{'x-request-id': 'kept-id'})
        server.ask('MARKER', '/healthz')
    text = (tmp_path/'log').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    found = [line for line in lines if line['event'] == 'request' and line['route'] not in ('/readyz', '/healthz')]
    assert [line['status'] for line in found] == [200, 404, 422, 422, 404, 401] and found[0]['owner'] == 'ann'
    assert found[-1]['id'] == 'kept-id' and all(line['ms'] >= 0 for line in found)
    for secret in (key, digest, 'marker-', 'bWFya2Vy', 'secret-name', 'marker_field'): assert secret not in text, secret
    assert {'listening', 'ready', 'draining', 'stopped'} <= {line['event'] for line in lines}


# The end

def test_sigterm_loses_no_accepted_request(trap):
    with Running(trap, drain_delay=1.0, workers=1, max_batch=1) as server:
        pictures, workers = trap_pictures(4, SLOW, seed=9), server.workers()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.arrays, p[None]) for p in pictures]
            server.until(lambda: server.metrics().get(('dlfund_requests_in_progress',), 0) == 5) # four, and this question
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: server.events('draining'))
            assert assert_refused(server.get('/readyz'), 503)['code'] == 'not_ready' and server.get('/healthz').status == 200
            for answer, row in zip([a.result() for a in asked], softmax(trap_logits(pictures))): assert_said(answer, row[None])
        assert server.process.wait(20) == 0
        with pytest.raises(OSError): server.get('/healthz')
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers) and not server.noise


@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_with_0(trap, sign):
    with Running(trap) as server: assert server.stop(sign) == 0 and server.events('stopped') and not server.noise


# Another version

def test_hot_reload_loses_no_request(trap):
    with Running(trap, reload_every=0.1) as server:
        versions, stop, found = {server.get('/v1/models').json()['models'][0]['version']: 0}, threading.Event(), []
        pictures = trap_pictures(40, seed=11)
        def client(i):
            mine = []
            while not stop.is_set():
                k = (len(mine)*5 + i) % 40
                mine.append((k, server.arrays(pictures[k:k + 1])))
            return mine
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, i) for i in range(4)]
            for seed in 1, 2:
                attach(trap, {'model.onnx': trap_graph(seed)})
                server.until(lambda: len(server.events('reloaded')) == seed)
                versions[server.events('reloaded')[-1]['now']] = seed
            time.sleep(0.3)
            stop.set()
            by_client = [c.result() for c in clients]
        wanted = {version: softmax(trap_logits(pictures, seed)) for version, seed in versions.items()}
        for answers in by_client:
            seen = []
            for k, answer in answers:
                said = assert_said(answer, wanted[answer.json()['version']][k:k + 1])
                seen.append(list(versions).index(said['version']))
            assert seen == sorted(seen) and len(seen) > 5 # never back to an old version
            found += seen
        assert set(found) == {0, 1, 2}
        server.until(lambda: len(server.workers()) == 2) # the old ones have ended
        assert server.get('/v1/models').json()['models'][0]['version'] == list(versions)[-1]


def test_a_bad_version_is_refused_and_the_old_one_goes_on(trap):
    with Running(trap, reload_every=0.1) as server:
        good = (trap/'model.onnx').read_bytes()
        (trap/'model.onnx').write_bytes(good[:-100])
        os.utime(trap/'bundle.json')
        server.until(lambda: len(server.events('reload_refused')) == 1)
        assert_well(server)
        (trap/'model.onnx').write_bytes(good)
        attach(trap, {'model.onnx': b'no graph at all'})
        server.until(lambda: len(server.events('reload_refused')) == 2)
        assert_well(server)
        attach(trap, {'model.onnx': good})
        time.sleep(0.5)
        assert_well(server)
        assert server.metrics()['dlfund_reloads_total', 'refused', 'trap'] == 2


def test_sighup_reloads(trap):
    with Running(trap) as server:
        before = server.get('/v1/models').json()['models'][0]['version']
        attach(trap, {'model.onnx': trap_graph(3)})
        time.sleep(0.3)
        assert server.get('/v1/models').json()['models'][0]['version'] == before # nobody looks by himself
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda: server.events('reloaded'))
        picture = trap_pictures(1)
        assert_said(server.arrays(picture), softmax(trap_logits(picture, 3)))


# Starting

@pytest.mark.parametrize('break_it, says', [
    (lambda trap: (trap/'bundle.json').unlink(), 'bundle.json'), (lambda trap: (trap/'model.onnx').write_bytes(b'other'), 'model.onnx'),
    (lambda trap: attach(trap, {'model.onnx': b'no graph'}), 'died'), (lambda trap: attach(trap, {'model.onnx': trap_graph(n_slow=10)[:-5000]}), 'died')])
def test_a_server_that_cannot_start_says_why_and_ends(trap, break_it, says):
    break_it(trap)
    server = Running(trap, is_awaited=False)
    assert server.stop(signal.SIGCONT, 60) != 0
    assert not server.said and re.search(r'ValueError: .*must', ''.join(server.noise)), server.noise
    assert any(says in str(line) for line in [*server.noise, *server.log]), (server.noise, server.log)


def test_a_bundle_without_a_graph_is_exported_on_the_way(grey, tmp_path, garments):
    path = grey[1].save(tmp_path/'plain')
    with Running(path, workers=1) as server:
        files = [encoded(p) for p in garments[:2]]
        assert_said(server.files(*files), expected(grey[1], files))
        assert server.events('exported')


def test_the_version_changes_with_the_content_alone(trap, tmp_path):
    from dlfund.deployment.server import version_of
    first = version_of(read_facts(trap))
    attach(trap, {'model.onnx': (trap/'model.onnx').read_bytes()})
    assert version_of(read_facts(trap)) == first
    attach(trap, {'model.onnx': trap_graph(1)})
    assert version_of(read_facts(trap)) != first


# The batcher, on a clock of our own

class Clock(asyncio.SelectorEventLoop):
    "An event loop whose time is the time of the next event: hours pass in no time, and runs are repeatable."
    now = 0.0
    def time(self): return self.now
    def _run_once(self):
        if not self._ready and self._scheduled: self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


class Life:
    "A batcher, random askers, and a record of all that happened."
    def __init__(self, seed, cls=MicroBatcher, is_calm=False):
        r = self.random = random.Random(seed)
        self.settings = dict(max_size=r.randint(1, 9), max_wait=r.choice([0, 0.001, 0.01, 0.3]), max_queue=r.randint(9, 40), n_runners=r.randint(1, 4))
        self.cls, self.is_calm = cls, is_calm
        self.poison, self.fatal, self.runs, self.jobs, self.refused = set(), set(), [], {}, 0
        self.pace = r.choice([0.001, 0.02])
    async def run(self, payloads):
        assert 1 <= len(payloads) <= self.settings['max_size']
        begin = asyncio.get_running_loop().time()
        record = dict(begin=begin, payloads=list(payloads), end=None)
        self.runs.append(record)
        assert sum(r['end'] is None for r in self.runs) <= self.settings['n_runners']
        try: await asyncio.sleep(self.random.choice([0, 1, 1, 5])*self.pace)
        finally: record['end'] = asyncio.get_running_loop().time()
        if self.fatal & set(payloads): raise WorkerLost('it died')
        return [ArithmeticError(p) if p in self.poison else ('answer to', p) for p in payloads]
    async def asker(self, batcher, ids):
        r, loop = self.random, asyncio.get_running_loop()
        waiting = len([job for job in batcher.queue if job.is_live()])
        try: futures = batcher.submit(ids)
        except Overloaded as e:
            assert waiting + len(ids) > self.settings['max_queue'] and e.seconds >= 0
            self.refused += 1
            return
        for i, future in zip(ids, futures): self.jobs[i] = dict(arrived=loop.time(), future=future, is_cancelled=False)
        if not self.is_calm and r.random() < 0.15:
            await asyncio.sleep(r.random()*0.02)
            for i, future in zip(ids, futures): self.jobs[i]['is_cancelled'] = future.cancel() or self.jobs[i]['is_cancelled']
        await asyncio.gather(*futures, return_exceptions=True)
        for i in ids: self.jobs[i]['done'] = loop.time()
    async def live(self):
        r, batcher, n, askers = self.random, self.cls(self.run, **self.settings), 0, []
        for _ in range(r.randint(5, 60)):
            ids = list(range(n, n + r.choice([1, 1, 1, 2, 5])))
            n += len(ids)
            if not self.is_calm: self.poison |= {i for i in ids if r.random() < 0.05}; self.fatal |= {i for i in ids if r.random() < 0.04}
            askers.append(asyncio.create_task(self.asker(batcher, ids)))
            if r.random() < 0.7: await asyncio.sleep(r.choice([0, 0.0003, 0.004, 0.05, 1.0]))
        await asyncio.sleep(0) # the last one asks
        await batcher.drain()
        await asyncio.wait_for(asyncio.gather(*askers), 1000)
        assert not batcher.queue and not batcher.alone and not batcher.running


def lived(seed, **kwargs):
    "A whole life."
    loop, life = Clock(), Life(seed, **kwargs)
    try: loop.run_until_complete(life.live())
    finally: loop.close()
    return life


def check_answers(life):
    "Identity: each gets the answer to its own question; the poisoned and the fatal fail, and they alone."
    for i, job in life.jobs.items():
        if job['is_cancelled']: continue
        assert job['future'].done()
        error = job['future'].exception()
        if i in life.fatal: assert isinstance(error, WorkerLost)
        elif i in life.poison: assert isinstance(error, ArithmeticError) and error.args == (i,)
        else: assert error is None and job['future'].result() == ('answer to', i)
    tries = [i for r in life.runs for i in r['payloads']]
    assert all(tries.count(i) <= 2 for i in set(tries)) # a lost job gets one more chance


def first_runs(life):
    "Runs of jobs that were not tried before, in the order in which they began."
    seen = set()
    for r in life.runs:
        if not seen & set(r['payloads']): yield r
        seen |= set(r['payloads'])


def check_order(life):
    "Jobs leave in the order in which they came."
    order = [i for r in first_runs(life) for i in r['payloads']]
    assert order == sorted(order)


def check_wait(life):
    "Whoever waited longer than `max_wait` found all runners busy all that time."
    limit, eps = life.settings['max_wait'], 1e-9
    for r in first_runs(life):
        late = life.jobs[r['payloads'][0]]['arrived'] + limit
        if r['begin'] <= late: continue
        moments = sorted({late, r['begin'], *(t for x in life.runs for t in (x['begin'], x['end']) if late < t < r['begin'])})
        for a, b in zip(moments, moments[1:]):
            n_busy = sum(x['begin'] <= a + eps and x['end'] >= b - eps for x in life.runs)
            assert b - a <= eps or n_busy == life.settings['n_runners'], (late, r)


@pytest.mark.parametrize('block', range(8))
def test_batches_keep_every_promise(block):
    sizes, refused = [], 0
    for seed in range(40*block, 40*block + 40):
        life = lived(seed)
        check_answers(life)
        check_order(life)
        check_wait(life)
        sizes += [len(r['payloads']) for r in life.runs]
        refused += life.refused
    assert refused and max(sizes) > 5 and len(set(sizes)) > 4 # else the lives were too quiet to prove anything


def test_company_is_waited_for_but_not_longer():
    for seed in range(60):
        life = lived(seed, is_calm=True)
        for r in first_runs(life):
            is_full = len(r['payloads']) == life.settings['max_size']
            assert is_full or r['begin'] >= life.jobs[r['payloads'][0]]['arrived'] + life.settings['max_wait'] - 1e-9


class Hasty(MicroBatcher):
    "A mistake: the newest goes first."
    def take(self):
        self.queue.reverse()
        try: return super().take()
        finally: self.queue.reverse()


class Sleepy(MicroBatcher):
    "A mistake: nobody looks when a runner becomes free."
    def dispatch(self):
        if not self.running: super().dispatch()


class Mixed(MicroBatcher):
    "A mistake: answers in another order."
    def __init__(self, run, **settings):
        async def other(payloads): return (await run(payloads))[::-1]
        super().__init__(other, **settings)


@pytest.mark.parametrize('cls, check', [(Hasty, check_order), (Sleepy, check_wait), (Mixed, check_answers)])
def test_a_broken_batcher_is_caught(cls, check):
    with pytest.raises(AssertionError):
        for seed in range(60): check(lived(seed, cls=cls, is_calm=True))


def test_a_run_that_gives_too_few_answers_fails_its_batch_and_no_other():
    async def main():
        async def run(payloads): return payloads[:-1] if 'bad' in payloads else payloads
        batcher = MicroBatcher(run, max_size=2, max_wait=0)
        first, second = batcher.submit(['bad', 'x']), batcher.submit(['good', 'y'])
        found = await asyncio.gather(*first, *second, return_exceptions=True)
        assert [type(f) for f in found[:2]] == [RuntimeError]*2 and found[2:] == ['good', 'y']
    asyncio.run(main())


@pytest.mark.parametrize('seed', range(20))
def test_a_bucket_never_gives_more_than_it_promises(seed):
    r = random.Random(seed)
    rate, burst, now, taken = r.uniform(0.5, 50), r.randint(1, 20), 0.0, []
    bucket = TokenBucket(rate, burst, 0.0)
    for _ in range(400):
        now += r.choice([0, 0.001, 0.02, 1.5])*r.random()
        wait = bucket.take(now)
        if not wait: taken.append(now)
        elif r.random() < 0.3: # the promise of the wait
            now += wait + 1e-9
            assert bucket.take(now) == 0
            taken.append(now)
    for i, begin in enumerate(taken):
        for j in range(i, len(taken)): assert j - i + 1 <= burst + rate*(taken[j] - begin) + 1e-6


# The command

def test_the_command_serves(trap, tmp_path):
    (tmp_path/'server.yaml').write_text('workers: 1\nmax_pictures: 3\nreload_every: 0\n')
    with Running(program=[DLFUND, 'serve', f'mine={trap}', '--port', '0', '--config', str(tmp_path/'server.yaml')]) as server:
        assert len(server.workers()) == 1 and server.get('/v1/models').json()['models'][0]['name'] == 'mine'
        assert_well(server)
        assert_refused(server.arrays(trap_pictures(4)), 413)
        assert server.stop() == 0
