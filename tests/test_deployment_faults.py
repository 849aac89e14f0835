"What strangers and accidents do to a server: whatever it was, afterwards it is healthy and right, and it never said 500."
import asyncio, concurrent.futures, io, json, os, re, resource, signal, socket, threading, time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

import hostile
from dlfund.data.preprocessing import fit_picture
from serving_tools import (HANG, SIZE, SLOW, Running, arrays, assert_refused, assert_said, assert_well, make_trap, raw, softmax, trap_logits,
                           trap_pictures, turns_of)

SLOW_SECONDS = 0.1 # of a batch that holds a slow picture


@pytest.fixture(scope='module')
def trap(tmp_path_factory):
    return make_trap(tmp_path_factory.mktemp('bundles')/'trap', n_slow=turns_of(SLOW_SECONDS))


@pytest.fixture(scope='module')
def server(trap):
    "One server for all that is only bad input; what it lost, it lost to that."
    with Running(trap, max_pixels=hostile.MAX_PIXELS, body_timeout=3) as running: yield running


@pytest.fixture
def unharmed(server):
    "The same workers, alive, well, and not grown beyond all measure."
    before = {p.pid for p in server.workers()}
    yield
    assert_well(server)
    assert {p.pid for p in server.workers()} == before and not server.events('worker_lost')


@contextmanager
def watched(server):
    "Ask for the health every 50 ms; every answer must be 200."
    found, stop = [], threading.Event()
    def watch():
        while not stop.is_set():
            begin = time.monotonic()
            try: found.append((server.ask('GET', '/healthz', timeout=10).status, time.monotonic() - begin))
            except OSError as e: found.append((type(e).__name__, time.monotonic() - begin))
            stop.wait(0.05)
    thread = threading.Thread(target=watch)
    thread.start()
    try: yield found
    finally: stop.set(); thread.join()
    assert found and {status for status, _ in found} == {200}, found


def peak(pid):
    "The most memory that a process ever had, MiB."
    return int(re.search(r'VmHWM:\s+(\d+)', open(f'/proc/{pid}/status').read())[1])/1024


def status_of(came):
    "The status in what a socket gave; `None` for a closed door."
    found = re.match(rb'HTTP/1\.[01] (\d{3})', came)
    return int(found[1]) if found else None


# Bad pictures

def judge(answer, content, statuses, name):
    "Is it a right answer to this picture?"
    assert answer.status in statuses, (name, answer)
    if answer.status != 200: return assert_refused(answer, *statuses)
    assert_said(answer, softmax(trap_logits(fit_picture(io.BytesIO(content), SIZE, 1)[None])))


@pytest.mark.parametrize('part', [hostile.bombs, hostile.texts, hostile.wrong, hostile.damaged, hostile.unusual])
@pytest.mark.filterwarnings('ignore')
def test_hostile_pictures(server, unharmed, part):
    n = 0
    for name, content, statuses in part():
        judge(server.files(content), content, statuses if isinstance(statuses, tuple) else (statuses,), name)
        n += 1
    assert n >= 15
    for process in server.workers(): assert peak(process.pid) < 400, 'a bomb went off'
    assert peak(server.process.pid) < 400


@pytest.mark.filterwarnings('ignore')
def test_mutants(server, unharmed):
    for name, content, statuses in hostile.mutants(25): judge(server.files(content), content, statuses, name)


def test_hostile_pictures_beside_good_ones(server, unharmed):
    good = trap_pictures(1, seed=3)
    wanted = softmax(trap_logits(good))[0]
    bad = [content for _, content, statuses in hostile.corpus() if 200 not in statuses and len(content) < 100_000]
    for i in range(0, len(bad), 10):
        answer = server.files(*bad[i:i + 10], hostile.saved(good[0]), *bad[i:i + 10])
        predictions = answer.json()['predictions']
        assert answer.status == 200 and [sorted(p) for p in predictions].count(['error']) == len(predictions) - 1
        np.testing.assert_allclose(list(predictions[len(bad[i:i + 10])]['probabilities'].values()), wanted, atol=1e-5)


# Bad requests

@pytest.mark.parametrize('name, kind, body', list(hostile.forms()), ids=lambda x: x if isinstance(x, str) and 'form-data' not in x else '')
def test_malformed_forms(server, unharmed, name, kind, body):
    assert_refused(server.ask('POST', '/v1/predict', body, {'content-type': kind}), 413, 415, 422)


def test_malformed_json(server, unharmed):
    for name, body in hostile.jsons():
        answer = server.json(body)
        assert answer.status in (413, 422) or (name == 'a pixel of 1e1' and answer.status == 200), (name, answer)
        if answer.status != 200: assert_refused(answer, 413, 422)


@pytest.mark.parametrize('name, head', list(hostile.heads()), ids=lambda x: x if isinstance(x, str) else '')
def test_malformed_http(server, unharmed, name, head):
    came = raw(server.address, head)
    assert status_of(came) in (None, *range(400, 500)), came[:300]
    assert not re.search(rb'Traceback|site-packages', came)


def test_a_smuggled_request_is_not_answered(server, unharmed):
    came = raw(server.address, b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4\r\n'
               b'Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n')
    assert b'"models"' not in came


def test_random_bytes_on_many_connections(server, unharmed):
    rng, statuses = np.random.default_rng(0), []
    for i in range(100):
        content = rng.bytes(int(rng.integers(1, 3000)))
        statuses.append(status_of(raw(server.address, [b'', b'GET ', b'POST /v1/predict HTTP/1.1\r\n'][i % 3] + content + b'\r\n\r\n', timeout=0.5)))
    assert set(statuses) <= {None, *range(400, 500)}


# Slow and absent clients

def test_slow_heads_and_bodies(trap):
    with Running(trap, header_timeout=1, body_timeout=1) as server, watched(server):
        head = b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n'
        begin, heads = time.monotonic(), [socket.create_connection(server.address, 10) for _ in range(100)]
        bodies = [socket.create_connection(server.address, 10) for _ in range(100)]
        for s in heads: s.sendall(b'GET /healthz HTTP/1.1\r\nX-')
        for s in bodies: s.sendall(head + b'\r\n')
        left, closed = {*heads, *bodies}, {}
        for s in left: s.setblocking(False)
        while left and time.monotonic() < begin + 20: # a byte now and then from each
            for s in list(left):
                try: s.send(b'a')
                except BlockingIOError: pass
                except OSError: pass # closed: what it said is read below
                try: said = s.recv(4096)
                except BlockingIOError: continue
                except OSError: said = b''
                closed[s] = closed.get(s, b'') + said
                if not said: left.discard(s)
            assert server.get('/readyz').status == 200
            time.sleep(0.1)
        assert not left, f'{len(left)} of 200 still hold on'
        assert {status_of(closed[s]) for s in bodies} == {408} and {status_of(closed[s]) for s in heads} <= {None, 400, 408}
        for s in heads + bodies: s.close()
        assert_well(server)


def test_silent_connections_are_closed(trap):
    with Running(trap, header_timeout=1) as server:
        silent = [socket.create_connection(server.address, 10) for _ in range(200)]
        assert_well(server)
        for s in silent: assert s.recv(100) == b'' # the server hung up
        assert_well(server)


def test_clients_that_leave(trap):
    with Running(trap, workers=1, max_batch=4) as server, watched(server):
        head = b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n'
        body = json.dumps(arrays(trap_pictures(1, SLOW))).encode()
        for i in range(60):
            s = socket.create_connection(server.address, 10)
            s.sendall((head % len(body) + body)[:[20, 100, 2000, None][i % 4]])
            if i % 3 == 0: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0') # a reset, not a farewell
            s.close()
        server.until(lambda: (m := server.metrics())['dlfund_requests_in_progress',] == 1 and m.get(('dlfund_queue_pictures', 'trap')) == 0)
        assert_well(server)
        lines = [line for line in server.events('request') if line['route'] == '/v1/predict']
        assert {line['status'] for line in lines} <= {200, 499, 400, 0} and any(line['status'] == 499 for line in lines)


# Overload

async def storm(address, pictures, seconds, n_clients):
    "Clients that never wait: as soon as one has an answer it asks again. Returns (picture, status, headers, body) of each."
    found, end = [], time.monotonic() + seconds
    bodies = [json.dumps(arrays(p[None])).encode() for p in pictures]
    async def client(i):
        reader, writer = await asyncio.open_connection(*address)
        k = i
        while time.monotonic() < end:
            body = bodies[k % len(bodies)]
            writer.write(b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
            head = await asyncio.wait_for(reader.readuntil(b'\r\n\r\n'), 30)
            said = await reader.readexactly(int(re.search(rb'content-length: (\d+)', head)[1]))
            found.append((k % len(pictures), status_of(head), head, said))
            k += n_clients
            if found[-1][1] == 429: await asyncio.sleep(0.02)
        writer.close()
    await asyncio.gather(*(client(i) for i in range(n_clients)))
    return found


def test_ten_times_too_many(trap):
    with Running(trap, workers=1, max_batch=2, max_queue=16, max_pictures=4) as server:
        pictures = trap_pictures(64, SLOW, seed=21) # two in 0.1 s: twenty a second
        wanted = softmax(trap_logits(pictures))
        with watched(server): found = asyncio.run(storm(server.address, pictures, 4, 64))
        answered = [f for f in found if f[1] == 200]
        assert {f[1] for f in found} == {200, 429} and len(found) > 10*len(answered) > 100
        for k, _, _, said in answered:
            [p] = json.loads(said)['predictions']
            np.testing.assert_allclose(list(p['probabilities'].values()), wanted[k], atol=1e-5)
        for _, status, head, said in found:
            if status == 429: assert 1 <= int(re.search(rb'retry-after: (\d+)', head)[1]) <= 60 and json.loads(said)['error']['code'] == 'overloaded'
        assert server.metrics()['dlfund_requests_total', '/v1/predict', '200'] == len(answered) # none accepted and lost
        assert_well(server)


def test_more_bytes_than_the_server_may_hold(trap):
    with Running(trap, max_body=1_000_000, max_held=3_000_000, body_timeout=2) as server, watched(server):
        head = b'POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n\r\n' + b' '*800_000
        with concurrent.futures.ThreadPoolExecutor(20) as pool: statuses = list(pool.map(lambda _: status_of(raw(server.address, head)), range(20)))
        assert statuses.count(429) >= 10 and set(statuses) <= {408, 429}
        assert_well(server)
        assert peak(server.process.pid) < 400


# Workers that hang, die, or are gone

def test_a_model_that_hangs_takes_no_one_with_it(trap):
    with Running(trap, workers=2, worker_timeout=1.0, max_batch=4, max_wait=0.1) as server, watched(server):
        pictures = np.concatenate([trap_pictures(1, HANG), trap_pictures(3, seed=31)])
        with concurrent.futures.ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda p: server.arrays(p[None]), pictures))
        assert assert_refused(found[0], 503)['code'] == 'worker_lost'
        for answer, row in zip(found[1:], softmax(trap_logits(pictures[1:]))): assert_said(answer, row[None])
        assert {line['reason'] for line in server.events('worker_lost')} == {'hung'}
        server.settled()
        assert_well(server)


def test_nobody_waits_longer_than_the_timeout_for_a_model_that_hangs(trap):
    with Running(trap, workers=2, worker_timeout=2.0, timeout=0.5) as server, watched(server):
        assert assert_refused(server.arrays(trap_pictures(1, HANG)), 504)['code'] == 'too_late'
        assert_well(server) # the other worker
        server.until(lambda: server.events('worker_lost'))
        server.settled()
        assert_well(server)


def test_all_workers_hang(trap):
    with Running(trap, workers=2, worker_timeout=1.0) as server, watched(server):
        with concurrent.futures.ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda p: server.arrays(p[None]), trap_pictures(4, HANG)))
        for answer in found: assert_refused(answer, 503)
        server.settled()
        assert_well(server)


@pytest.mark.parametrize('sign', [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_is_lost_under_load(trap, sign):
    with Running(trap, workers=2, worker_timeout=1.0, max_queue=64) as server:
        pictures = trap_pictures(64, seed=41)
        wanted, victims = softmax(trap_logits(pictures)), server.workers()
        def strike():
            for n, victim in enumerate(victims): # the second when the first has been replaced
                time.sleep(0.5)
                victim.send_signal(sign)
                server.until(lambda: len(server.events('worker_lost')) == n + 1)
                server.settled()
        with concurrent.futures.ThreadPoolExecutor(1) as pool, watched(server):
            struck = pool.submit(strike)
            found = asyncio.run(storm(server.address, pictures, 5, 8))
            struck.result()
        assert {f[1] for f in found} == {200}, {f[1] for f in found}
        for k, _, _, said in found: np.testing.assert_allclose(list(json.loads(said)['predictions'][0]['probabilities'].values()), wanted[k], atol=1e-5)
        assert len(server.events('worker_lost')) == 2
        server.settled()
        assert not {p.pid for p in server.workers()} & {v.pid for v in victims}
        assert_well(server)


def test_idle_workers_die(trap):
    with Running(trap) as server:
        for victim in server.workers(): victim.kill()
        server.until(lambda: len(server.events('worker_lost')) == 2)
        picture = trap_pictures(1)
        assert_said(server.arrays(picture), softmax(trap_logits(picture))) # it waits for the next worker
        server.settled()
        assert_well(server)


def test_workers_end_with_the_front(trap):
    server = Running(trap)
    workers = server.workers()
    assert len(workers) == 2
    assert server.stop(signal.SIGKILL) == -9
    _, alive = psutil.wait_procs(workers, 10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


# The machine

@contextmanager
def full_disk(tmp_path, way):
    "Somewhere to log to that is full from the start, or soon; and what the process needs for that."
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with open('/dev/full' if way == 'full' else tmp_path/'log', 'w') as log: yield log, limit if way == 'soon' else None


@pytest.mark.parametrize('way', ['full', 'soon'])
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux only')
def test_a_full_disk_costs_log_lines_only(trap, tmp_path, way):
    with full_disk(tmp_path, way) as (log, limit), Running(trap, log=log, before=limit) as server:
        for _ in range(40): assert_well(server)
        server.until(lambda: server.metrics()['dlfund_log_lines_dropped',] >= (40 if way == 'full' else 1))
        assert server.stop() == 0


def test_nobody_reads_the_log(trap):
    "A pipe that nobody empties is full after 64 KiB, and a writer that waits for it would wait for ever."
    reader, writer = os.pipe()
    with open(reader, 'rb'), open(writer, 'w') as log, Running(trap, log=log) as server:
        for _ in range(900): assert server.get('/healthz', **{'x-request-id': 'x'*64}).status == 200
        assert_well(server)
        assert server.stop() == 0


def test_two_servers_on_one_port(trap):
    with Running(trap) as server:
        second = Running(trap, port=server.address[1], is_awaited=False)
        assert second.stop(signal.SIGCONT, 30) != 0
        assert f'must be free to listen at, got 127.0.0.1:{server.address[1]}' in ''.join(second.noise) and not second.said
        assert_well(server)


def test_no_more_files(trap):
    "A server that may open few files closes what it cannot serve, and is well again when the crowd has gone."
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with Running(trap, before=few, header_timeout=2) as server:
        crowd = [socket.create_connection(server.address, 5) for _ in range(200)]
        time.sleep(1)
        for s in crowd: s.close()
        def is_well():
            try: return server.ask('GET', '/readyz', timeout=2).status == 200
            except OSError: return False
        server.until(is_well)
        pictures = trap_pictures(3, seed=7)
        assert_said(server.arrays(pictures), softmax(trap_logits(pictures)))
        assert not server.events('failed') and not server.noise
