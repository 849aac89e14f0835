"""Clients that ask again as soon as they have their answer, in a process of their own: `python benchmarks/clients.py HOST:PORT/PATH --clients 64`.

Requests are ready-made bytes on connections that stay open, answers are only cut, not read; so one core asks about ten times as often as any of the
servers measured here can answer. Prints one JSON object: answers by status, seconds, answers a second, and p50, p95, p99 in milliseconds of those with 200."""
import argparse, asyncio, json, time
from collections import Counter
from pathlib import Path


def request_of(
    host:str, # and port
    path:str, # of the route
    field:str, # name of the part that holds the picture
    content:bytes, # a PNG file
)->bytes: # a whole request
    "One picture as a form, as browsers and `curl -F` send it."
    body = (b'--frontier\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' % field.encode()
            + content + b'\r\n--frontier--\r\n')
    return (f'POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=frontier\r\n'
            f'Content-Length: {len(body)}\r\n\r\n').encode() + body


class Client(asyncio.Protocol):
    "One connection: ask, wait for the whole answer, ask again."
    def __init__(self, requests, record, end, done):
        self.requests, self.record, self.end, self.done, self.k, self.came, self.need = requests, record, end, done, 0, b'', None
    def connection_made(self, transport):
        self.transport = transport
        self.ask()
    def ask(self):
        self.begin, self.came, self.need = time.perf_counter(), b'', None
        self.transport.write(self.requests[self.k % len(self.requests)])
        self.k += 1
    def data_received(self, data):
        self.came += data
        if self.need is None:
            head = self.came.find(b'\r\n\r\n')
            if head < 0: return
            at = self.came[:head].lower().find(b'content-length:')
            self.need = head + 4 + int(self.came[at + 15:self.came.find(b'\r', at)])
        if len(self.came) < self.need: return
        now = time.perf_counter()
        self.record.append((now, now - self.begin, int(self.came[9:12])))
        if now >= self.end(): self.transport.close()
        else: self.ask()
    def connection_lost(self, error):
        if self.need is None or len(self.came) < self.need: self.record.append((time.perf_counter(), 0.0, 0)) # an answer that never came
        if not self.done.done(): self.done.set_result(None)


async def measure(host, port, requests, n_clients, warm_up, seconds):
    "All clients at once; only answers after the warm-up and before the end count."
    loop, record, begin = asyncio.get_running_loop(), [], time.perf_counter()
    start, stop = begin + warm_up, begin + warm_up + seconds
    ends = [loop.create_future() for _ in range(n_clients)]
    for i, end in enumerate(ends): # each begins with another picture
        await loop.create_connection(lambda: Client(requests[i % len(requests):] + requests[:i % len(requests)], record, lambda: stop, end), host, port)
    await asyncio.wait_for(asyncio.gather(*ends), warm_up + seconds + 60)
    return [(latency, status) for now, latency, status in record if start <= now < stop]


def summary(found, seconds):
    "What a run says."
    good = sorted(latency for latency, status in found if status == 200)
    at = lambda share: round(1000*good[min(len(good) - 1, int(share*len(good)))], 2) if good else None
    return dict(throughput=round(len(good)/seconds, 2), p50=at(0.5), p95=at(0.95), p99=at(0.99), n=len(good),
                statuses={str(k): n for k, n in Counter(status for _, status in found).items()})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('url', help='HOST:PORT/PATH')
    parser.add_argument('--pictures', type=Path, required=True, help='a folder of PNG files')
    parser.add_argument('--field', default='file')
    parser.add_argument('--clients', type=int, default=8)
    parser.add_argument('--warm-up', type=float, default=1.0, help='seconds')
    parser.add_argument('--seconds', type=float, default=4.0)
    args = parser.parse_args()
    host, path = args.url.split('/', 1)
    requests = [request_of(host, path, args.field, f.read_bytes()) for f in sorted(args.pictures.glob('*.png'))]
    import uvloop
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(*host.split(':'), requests, args.clients, args.warm_up, args.seconds))
    print(json.dumps(summary(found, args.seconds)))
