"""What accidents cost while people ask: answers lost, seconds until all is as before, and how long health took to answer meanwhile.

A worker is killed, a worker stops, ten times too many ask, 500 slow connections hold on, a new version comes, the server is told to stop. Nothing may be lost: every
request that was accepted gets a right answer. And all of the tests' hostile pictures with many more mutants; `--mutants` says how many of each type."""
import argparse, asyncio, signal, socket, tempfile, threading, time
from pathlib import Path
from statistics import median

from common import store
import hosts # puts tests/ on the path
import hostile
from serving_tools import SLOW, Running, make_trap, trap_pictures, turns_of
from test_deployment_faults import storm

SECONDS = 6.0 # of each storm


def prober(server, stop, found):
    "Ask for the health twenty times a second."
    while not stop.is_set():
        begin = time.perf_counter()
        try: status = server.ask('GET', '/healthz', timeout=10).status
        except OSError: status = 0
        found.append((status, 1000*(time.perf_counter() - begin)))
        stop.wait(0.05)


def under_load(server, n_clients, strike, pictures):
    "A storm, an accident in its middle, and what came of it."
    stop, health, moments = threading.Event(), [], {}
    probe = threading.Thread(target=prober, args=(server, stop, health))
    def later():
        time.sleep(SECONDS/3)
        moments['struck'] = time.monotonic()
        moments['back'] = strike(server) or time.monotonic()
    accident = threading.Thread(target=later)
    probe.start(); accident.start()
    answers = asyncio.run(storm(server.address, pictures, SECONDS, n_clients))
    accident.join(); stop.set(); probe.join()
    statuses = [status for _, status, _, _ in answers]
    waits = sorted(ms for _, ms in health)
    return dict(answers={str(s): statuses.count(s) for s in sorted(set(statuses))}, back_after=round(moments['back'] - moments['struck'], 2),
                health_not_200=sum(status != 200 for status, _ in health), health_p50=round(median(waits), 1), health_worst=round(waits[-1], 1))


def lose(sign):
    "Strike a worker, and wait for another."
    def strike(server):
        victim = server.workers()[0]
        victim.send_signal(sign)
        server.until(lambda: server.events('worker_lost'), 60)
        server.until(lambda: server.metrics()['dlfund_workers', 'trap'] == 2, 60)
    return strike


def renew(server):
    "A new version arrives."
    make_trap(server.bundle, seed=1)
    server.until(lambda: server.events('reloaded'), 60)


def linger(server):
    "500 connections that say a byte now and then."
    slow = [socket.create_connection(server.address, 10) for _ in range(500)]
    end = time.monotonic() + SECONDS/2
    while time.monotonic() < end:
        for s in slow:
            try: s.send(b'G')
            except OSError: pass
        time.sleep(0.2)
    for s in slow: s.close()


def pictures_of(server, n):
    "Every hostile picture: how many answers of each status, and which were not allowed."
    counts, wrong = {}, []
    for name, content, statuses in [*hostile.corpus(), *hostile.mutants(n, seed=1)]:
        status = server.files(content).status
        counts[str(status)] = counts.get(str(status), 0) + 1
        if status not in statuses: wrong.append([name, status])
    return dict(answers=counts, not_allowed=wrong, workers_lost=len(server.events('worker_lost')), failures=len(server.events('failed')))


ACCIDENTS = {'worker killed': (lose(signal.SIGKILL), {}, 8, 0), 'worker stopped': (lose(signal.SIGSTOP), dict(worker_timeout=1.0), 8, 0),
             'new version': (renew, dict(reload_every=0.1), 8, 0), '500 slow connections': (linger, dict(header_timeout=2.0), 8, 0),
             'ten times too many': (lambda server: None, dict(workers=1, max_batch=2, max_queue=16, max_pictures=4), 64, SLOW)}


def main(argv=None):
    "One accident after the other, each with a server of its own."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--mutants', type=int, default=500, help='changed pictures of each of eight types')
    parser.add_argument('--work', type=Path, help='not used here')
    parser.add_argument('--quick', action='store_true', help='20 mutants, nothing is stored')
    args = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_trap(Path(folder)/'trap', n_slow=turns_of(0.1))
        for name, (strike, config, n_clients, kind) in ACCIDENTS.items():
            with Running(path, **config) as server:
                server.bundle = path
                found[name] = under_load(server, n_clients, strike, trap_pictures(64, kind))
                assert not server.events('failed') and not server.noise, (server.events('failed'), server.noise)
            print(f'{name:22} {found[name]}', flush=True)
        with Running(path, max_pixels=hostile.MAX_PIXELS) as server: found['hostile pictures'] = pictures_of(server, 20 if args.quick else args.mutants)
        print(f'hostile pictures       {found["hostile pictures"]}')
    if not args.quick: store('serving_faults', found, mutants=args.mutants, seconds=SECONDS)


if __name__ == '__main__': main()
