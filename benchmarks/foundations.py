"""The engine of Part I against PyTorch, measured: `python benchmarks/foundations.py`.

Time of one training step, from the naive composition to the finished engine, in turn with PyTorch eager; backward over forward; time by
operation; peak memory of a step, each library in a process of its own; graphs of up to 300,000 nodes; and whole epochs on the same batches,
whose losses must agree. One thread for both libraries."""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1') # before NumPy is imported

import json, subprocess, sys, time, tracemalloc
from collections import defaultdict
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import nn

from common import store
from dlfund.data.datasets import load
from dlfund.foundations.autograd import Tensor
from dlfund.foundations.engine import Linear, ReLU, Tanh, batches, mlp
from dlfund.foundations.losses import cross_entropy
from dlfund.foundations.optimizers import SGD, AdamW

WIDTHS, BS, SEED, REPETITIONS = (784, 256, 128, 10), 64, 0, 300
FINISHED = 'ReLU in place' # the last of the improvements
TARGETS = {'step': 3.0, 'memory': 1.5, 'backward': 3.0, 'graph': 1.5}
torch.set_num_threads(1)


def network(inplace=False):
    "The network, with the same weights in every process; its ReLUs may overwrite their inputs."
    return mlp(WIDTHS, np.random.default_rng(SEED), activation=partial(ReLU, inplace=inplace))


def twin(model, dtype=torch.float32):
    "The same network in PyTorch, with the same weights."
    layers = [nn.Linear(*layer.weight.shape[::-1]) if isinstance(layer, Linear) else
              nn.ReLU(layer.inplace) if isinstance(layer, ReLU) else getattr(nn, type(layer).__name__)() for layer in model]
    theirs = nn.Sequential(*layers)
    theirs.load_state_dict({name: torch.from_numpy(a) for name, a in model.state_dict().items()})
    return theirs.to(dtype)


def data(bs=BS):
    "A random batch."
    rng = np.random.default_rng(SEED)
    return rng.normal(size=(bs, WIDTHS[0])).astype(np.float32), rng.integers(0, WIDTHS[-1], bs)


def composed_linear(x, layer): return x @ layer.weight.T + layer.bias


def composed_cross_entropy(z, y):
    "Softmax and logarithm from the engine's primitive operations."
    p = z.exp() / z.exp().sum(1, keepdims=True)
    return -p[np.arange(len(y)), y].log().mean()


class SlowSGD:
    "Momentum that makes new arrays at every step."
    def __init__(self, params, lr, momentum): self.params, self.lr, self.momentum, self.v = params, lr, momentum, [0.0]*len(params)
    def step(self):
        for i, p in enumerate(self.params):
            self.v[i] = self.momentum*self.v[i] + p.grad
            p.data = p.data - self.lr*self.v[i]
    def zero_grad(self):
        for p in self.params: p.grad = None


class Ours:
    "One training step of the engine, with each improvement on or off; `step` returns the time after forward, backward and step."
    def __init__(self, input_grad=False, fused_linear=True, fused_loss=True, in_place=True, inplace_relu=False, optimizer=None):
        self.model, self.input_grad, self.fused_linear, self.fused_loss = network(inplace_relu), input_grad, fused_linear, fused_loss
        self.opt = optimizer(self.model.parameters()) if optimizer else (SGD if in_place else SlowSGD)(self.model.parameters(), lr=0.01, momentum=0.9)
        self.layers = list(self.model)
    def forward(self, x, y, clock=None):
        h = Tensor(x, self.input_grad)
        for layer in self.layers:
            begin = time.perf_counter()
            h = composed_linear(h, layer) if isinstance(layer, Linear) and not self.fused_linear else layer(h)
            if clock is not None: clock['forward, linear' if isinstance(layer, Linear) else 'forward, rest'] += time.perf_counter() - begin
        begin = time.perf_counter()
        loss = cross_entropy(h, y) if self.fused_loss else composed_cross_entropy(h, y)
        if clock is not None: clock['forward, rest'] += time.perf_counter() - begin
        return loss
    def step(self, x, y):
        times = [time.perf_counter()]
        loss = self.forward(x, y); times.append(time.perf_counter())
        loss.backward(); times.append(time.perf_counter())
        self.opt.step(); self.opt.zero_grad(); times.append(time.perf_counter())
        return np.diff(times)


class Theirs:
    "The same step in PyTorch eager."
    def __init__(self, optimizer=None, inplace_relu=False):
        self.model = twin(network(inplace_relu))
        self.opt = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)))(self.model.parameters())
    def step(self, x, y):
        times = [time.perf_counter()]
        loss = nn.functional.cross_entropy(self.model(x), y); times.append(time.perf_counter())
        loss.backward(); times.append(time.perf_counter())
        self.opt.step(); self.opt.zero_grad(); times.append(time.perf_counter())
        return np.diff(times)


def in_turn(rivals, n=REPETITIONS, block=10, warm_up=3):
    "Blocks of steps of each rival in turn, without the first steps of a block, which find cold caches; seconds (n, 3): forward, backward, optimizer."
    x, y = data()
    theirs, found = (torch.from_numpy(x), torch.from_numpy(y)), defaultdict(list)
    for i in range(1 + n // block):
        for name, rival in rivals.items():
            times = [rival.step(*(theirs if isinstance(rival, Theirs) else (x, y))) for _ in range(warm_up + block)]
            if i: found[name] += times[warm_up:] # the first round warms up
    return {name: np.array(times) for name, times in found.items()}


def measure_steps():
    "The ladder of improvements, and AdamW."
    naive = dict(input_grad=True, fused_linear=False, fused_loss=False, in_place=False, inplace_relu=False)
    ladder = {'naive composition': {}, 'no gradient for the input': dict(input_grad=False), 'fused linear': dict(fused_linear=True),
              'fused cross-entropy': dict(fused_loss=True), 'optimizer in place': dict(in_place=True), 'ReLU in place': dict(inplace_relu=True)}
    rivals, options = {}, naive
    for name, change in ladder.items():
        options = options | change
        rivals[name] = Ours(**options)
    found = in_turn(rivals | {'PyTorch': Theirs()})
    adam = in_turn({'ours': Ours(optimizer=lambda p: AdamW(p, lr=0.001)), 'PyTorch': Theirs(lambda p: torch.optim.AdamW(p, lr=0.001))})
    def row(times, base): # the ratio is taken step by step, between neighbours in time
        return dict(us=float(np.median(times.sum(1)) * 1e6), ratio=float(np.median(times.sum(1) / base.sum(1))))
    steps = {name: row(times, found['PyTorch']) for name, times in found.items()}
    backward = {key: float(np.median(found[name][:, 1] / found[name][:, 0])) for key, name in (('ours', FINISHED), ('torch', 'PyTorch'))}
    parts = np.median(found['PyTorch'], axis=0) * 1e6
    return steps, {name: row(times, adam['PyTorch']) for name, times in adam.items()}, backward, parts


def timed(vjp, clock, part):
    "Add the time that a vjp takes to a clock."
    def run(g):
        begin = time.perf_counter()
        out = vjp(g)
        clock[part] += time.perf_counter() - begin
        return out
    return run


def profile(rival, n=100):
    "Time by operation: the layers one by one, and every vjp of the graph."
    x, y = data()
    rows = []
    for _ in range(n + 10):
        clock = dict.fromkeys(('forward, linear', 'forward, rest', 'backward, linear', 'backward, rest', 'optimizer'), 0.0)
        loss = rival.forward(x, y, clock)
        todo, seen = [loss], set()
        while todo:
            t = todo.pop()
            if t in seen: continue
            seen.add(t)
            part = 'backward, linear' if t._op in ('linear', 'matmul', 'add', 'permute') else 'backward, rest'
            t._edges = tuple((parent, timed(vjp, clock, part), kept) for parent, vjp, kept in t._edges)
            todo += [parent for parent, _, _ in t._edges]
        begin = time.perf_counter()
        loss.backward()
        clock['backward, rest'] += time.perf_counter() - begin - clock['backward, linear'] - clock['backward, rest'] # bookkeeping
        begin = time.perf_counter()
        rival.opt.step(); rival.opt.zero_grad()
        clock['optimizer'] = time.perf_counter() - begin
        rows.append(clock)
    return {part: median(row[part] for row in rows[10:]) * 1e6 for part in rows[0]}


def torch_profile(n=100):
    "The same of PyTorch: forward layers by the clock, backward and optimizer as a whole."
    rival, (x, y) = Theirs(), map(torch.from_numpy, data())
    rows = []
    for _ in range(n + 10):
        clock, h = dict.fromkeys(('forward, linear', 'forward, rest', 'backward', 'optimizer'), 0.0), x
        for layer in [*rival.model, lambda z: nn.functional.cross_entropy(z, y)]:
            begin = time.perf_counter()
            h = layer(h)
            clock['forward, linear' if isinstance(layer, nn.Linear) else 'forward, rest'] += time.perf_counter() - begin
        begin = time.perf_counter(); h.backward(); clock['backward'] = time.perf_counter() - begin
        begin = time.perf_counter(); rival.opt.step(); rival.opt.zero_grad(); clock['optimizer'] = time.perf_counter() - begin
        rows.append(clock)
    return {part: median(row[part] for row in rows[10:]) * 1e6 for part in rows[0]}


def resident(field):
    "A line of /proc/self/status, in bytes."
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(field))


def counted_ours(rival, x, y):
    "Peak of the bytes that NumPy and Python allocate in a step, above what is there before it."
    tracemalloc.start()
    rival.step(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def counted_theirs(rival, x, y):
    "Peak of the bytes that PyTorch allocates in a step, from the profiler's records."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: rival.step(x, y)
    sizes = [e.nbytes() for e in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()) if e.name() == '[memory]']
    return int(np.cumsum(sizes).max())


def memory_child(library, method, inplace):
    "In a process of its own: bytes at the peak of a step, for each batch size."
    rival, sizes = (Ours if library == 'ours' else Theirs)(inplace_relu=inplace), {'counted': (64, 4096), 'resident': (4096,)}[method]
    def batch(bs): return data(bs) if library == 'ours' else tuple(map(torch.from_numpy, data(bs)))
    for _ in range(3): rival.step(*batch(8))
    found = {}
    for bs in sizes:
        large = batch(bs)
        if method == 'counted':
            rival.step(*large)
            found[bs] = (counted_ours if library == 'ours' else counted_theirs)(rival, *large)
        else:
            open('/proc/self/clear_refs', 'w').write('5') # the high-water mark begins anew
            before = resident('VmRSS')
            for _ in range(5): rival.step(*large)
            found[bs] = resident('VmHWM') - before
    print(json.dumps(found))


def measure_memory():
    "Each library and method in processes of their own: bytes are counted once, the resident peak is the median of three."
    def child(*words):
        run = subprocess.run([sys.executable, __file__, 'memory', *map(str, words)], check=True, capture_output=True, text=True)
        return json.loads(run.stdout)
    rows = {}
    def row(title, bs, ours, theirs):
        a, b = (median(found[bs] for found in many) for many in (ours, theirs))
        rows[title] = dict(ours_mib=a / 2**20, torch_mib=b / 2**20, ratio=a / b)
    for inplace, relu in ((0, 'ReLU'), (1, 'ReLU in place')):
        counted = [[child(library, 'counted', inplace)] for library in ('ours', 'torch')]
        for bs in ('64', '4096'): row(f'bytes counted, batch {int(bs):,}, {relu}', bs, *counted)
    row('resident peak, batch 4,096, ReLU in place', '4096', *([child(library, 'resident', 1) for _ in range(3)] for library in ('ours', 'torch')))
    return rows


def chain(make, n):
    "Seconds for a node: build a chain of `n` additions and go back through it."
    x = make()
    begin = time.perf_counter()
    h = x
    for _ in range(n): h = h + x
    h.backward()
    return (time.perf_counter() - begin) / n


def measure_graph():
    "Seconds per node at several depths, in turn."
    makers = {'ours': lambda: Tensor(np.ones(1, np.float32), True), 'torch': lambda: torch.ones(1, requires_grad=True)}
    for make in makers.values(): chain(make, 1000)
    return [dict(nodes=n, **{name: median(chain(make, n) for _ in range(3)) for name, make in makers.items()})
            for n in (10_000, 30_000, 100_000, 300_000)]


def measure_epochs(fashion, activation, dtype, ours_opt, theirs_opt, n_epochs=2):
    "Same weights, same batches: largest difference of the losses, and seconds of each library."
    rng = np.random.default_rng(SEED)
    model = mlp(WIDTHS, rng, activation=activation)
    theirs = twin(model, dtype)
    for p, q in zip(model.parameters(), theirs.parameters()): p._array = q.detach().numpy().copy() # takes over the dtype
    opts, x_all = (ours_opt(model.parameters()), theirs_opt(theirs.parameters())), (fashion.train.x / 255 - 0.286).astype(model.parameters()[0].dtype)
    gap, spent = 0.0, [0.0, 0.0]
    for _ in range(n_epochs):
        for x, y in batches(x_all, fashion.train.y.astype(np.int64), BS, rng):
            losses = []
            for i, (net, opt, loss_func, a, b) in enumerate(((model, opts[0], cross_entropy, x, y),
                                                             (theirs, opts[1], nn.functional.cross_entropy, torch.from_numpy(x.data), torch.from_numpy(y)))):
                begin = time.perf_counter()
                loss = loss_func(net(a), b)
                loss.backward(); opt.step(); opt.zero_grad()
                losses.append(loss.item())
                spent[i] += time.perf_counter() - begin
            gap = max(gap, abs(losses[0] - losses[1]))
    return dict(largest_difference=gap, ours_seconds=spent[0], torch_seconds=spent[1])


def measure_training(fashion):
    "Whole epochs: smooth network in float32, ReLU in float64, with two optimizers."
    opts = {'SGD with momentum': (lambda p: SGD(p, lr=0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
            'AdamW': (lambda p: AdamW(p, lr=0.0005), lambda p: torch.optim.AdamW(p, lr=0.0005))}
    return {f'{opt}, {activation.__name__}, {str(dtype)[6:]}': measure_epochs(fashion, activation, dtype, *pair)
            for opt, pair in opts.items() for activation, dtype in ((Tanh, torch.float32), (ReLU, torch.float64))}


if __name__ == '__main__':
    if sys.argv[1:2] == ['memory']: memory_child(sys.argv[2], sys.argv[3], sys.argv[4] == '1'); raise SystemExit
    begin, fashion = time.perf_counter(), load('fashion-mini')
    steps, adam, backward, parts = measure_steps()
    profiles = {'naive composition': profile(Ours(True, False, False, False)), 'finished engine': profile(Ours(inplace_relu=True)), 'PyTorch': torch_profile()}
    memory, graph, training = measure_memory(), measure_graph(), measure_training(fashion)
    for name, row in steps.items(): print(f"{name:28} {row['us']:8.0f} µs {row['ratio']:6.2f} × PyTorch")
    for name, row in adam.items(): print(f"AdamW, {name:21} {row['us']:8.0f} µs {row['ratio']:6.2f} × PyTorch")
    for name, row in profiles.items(): print(f'{name:20}', ', '.join(f'{part} {us:.0f} µs' for part, us in row.items()))
    for row in graph: print(f"{row['nodes']:8,} nodes: {row['ours']*1e6:.2f} µs each, PyTorch {row['torch']*1e6:.2f}")
    for name, row in training.items():
        print(f"{name:32} losses differ by at most {row['largest_difference']:.1e}, time {row['ours_seconds']/row['torch_seconds']:.2f} × PyTorch")
    growth = graph[-1]['ours'] / graph[0]['ours']
    print(f"\n{'measure':66}result   target")
    print(f"{'time of a step / PyTorch eager':66}{steps[FINISHED]['ratio']:6.2f}   at most {TARGETS['step']}")
    print(f"{'time of a step with AdamW / PyTorch eager':66}{adam['ours']['ratio']:6.2f}   at most {TARGETS['step']}")
    for name, row in memory.items(): print(f"{'peak memory / PyTorch, ' + name:66}{row['ratio']:6.2f}   at most {TARGETS['memory']}")
    words = f"backward / forward (PyTorch: {backward['torch']:.2f})"
    print(f"{words:66}{backward['ours']:6.2f}   at most {TARGETS['backward']}")
    print(f"{'time per node, 300,000 / 10,000 nodes':66}{growth:6.2f}   at most {TARGETS['graph']}")
    print(f'\n{time.perf_counter() - begin:.0f} s')
    results = dict(step=steps, adamw=adam, backward_over_forward=backward, profile=profiles, memory=memory, graph=graph, training=training)
    print(store('foundations', results, seeds=[SEED], data=fashion.sha256, repetitions=REPETITIONS, numpy=np.__version__, threads=1,
                network=WIDTHS, bs=BS))
