"What the benchmarks of serving share: the bundle that all serve, and servers started, waited for and ended."
import http.client, json, os, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
SIDE, N_CLASSES = 64, 10 # of the pictures, pixels; of the model
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]


def make_resnet18(
    folder:Path, # where bundle and pictures go
)->tuple[Path, Path]: # the bundle, with float32 and int8 graphs, and a folder of PNG files
    "ResNet-18 with random weights for 64×64 colour pictures: what it says is of no use, what it costs is that of any ResNet-18."
    bundle, pictures = folder/'resnet18', folder/'pictures'
    if bundle.exists(): return bundle, pictures
    import torch
    from PIL import Image
    from dlfund.data.preprocessing import ImagePreprocess
    from dlfund.deployment.bundle import Bundle
    from dlfund.deployment.export import export_onnx
    from dlfund.deployment.files import attach
    from dlfund.deployment.inference import quantize_onnx
    from dlfund.vision import build
    torch.manual_seed(0)
    rng, architecture = np.random.default_rng(0), dict(name='resnet18', n_classes=N_CLASSES, n_channels=3)
    made = Bundle(model=build(**architecture).eval(), architecture=architecture, labels=[f'class {i}' for i in range(N_CLASSES)],
                  preprocess=ImagePreprocess(size=(SIDE, SIDE), n_channels=3, mean=(0.5,)*3, std=(0.3,)*3), metrics={}, training={},
                  data=dict(name='noise', sha256='0'*64, source='none', licence='CC0', n_test_reads=0))
    pictures.mkdir(parents=True)
    small = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8) # smooth, so that a PNG has the size of a photograph's
    large = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in small]
    for i, picture in enumerate(large): picture.save(pictures/f'{i:02}.png')
    graph = export_onnx(made)
    quantized = quantize_onnx(graph, np.stack([np.asarray(p) for p in large]))
    made.save(folder/'part')
    attach(folder/'part', {'model.onnx': graph, 'model.int8.onnx': quantized})
    (folder/'part').rename(bundle)
    return bundle, pictures


def free_port():
    "A port that nobody has."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


OURS = ('import json, sys; from dlfund.deployment.requests import read_config; from dlfund.deployment.server import serve; '
        'serve([sys.argv[1]], read_config(None, **json.loads(sys.argv[2])))')


def words_of(
    kind:str, # `dlfund`, or one of `peers.py`
    bundle:Path, # to serve
    port:int, # to listen at
    *options, # of `peers.py`
    **config, # of our server
)->list[str]: # a command line
    "How to start a server."
    if kind == 'dlfund': return [sys.executable, '-c', OURS, str(bundle), json.dumps(dict(port=port, reload_every=0) | config)]
    return [sys.executable, str(HERE/'peers.py'), kind, str(bundle), str(port), *map(str, options)]


@contextmanager
def running(
    kind:str, # as for `words_of`
    bundle:Path, # to serve
    *options, # of `peers.py`
    **config, # of our server
):
    "A server that is ready, as `(address, seconds it took, process)`; its threads are its own choice, not ours."
    port, kept = free_port(), {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    env = kept | {'PYTHONPATH': str(ROOT), 'DLFUND_OFFLINE': '1', 'LIT_SERVE_ANALYTICS': '0'}
    begin = time.perf_counter()
    process = subprocess.Popen(words_of(kind, bundle, port, *options, **config), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        path = '/readyz' if kind == 'dlfund' else '/health'
        while not is_ready(port, path):
            if process.poll() is not None or time.perf_counter() - begin > 120: raise RuntimeError(f'{kind} did not start: {process.args}')
            time.sleep(0.01)
        yield f'127.0.0.1:{port}', time.perf_counter() - begin, process
    finally:
        process.send_signal(signal.SIGTERM)
        try: process.wait(15)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(process.pid, signal.SIGKILL) # its whole session, which holds only what we started
        except ProcessLookupError: pass
        process.wait()


def is_ready(port, path):
    "Does it say so?"
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=2)
    try:
        connection.request('GET', path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException): return False
    finally: connection.close()


def load(
    address:str, # of a server
    pictures:Path, # a folder of PNG files
    n_clients:int, # at once
    seconds:float, # of measuring
    is_ours:bool, # else a peer
    warm_up:float=1.0, # seconds before
)->dict: # as `clients.py` prints it
    "Run the clients in a process of their own."
    path, field = ('v1/predict', 'files') if is_ours else ('predict', 'file')
    words = [sys.executable, str(HERE/'clients.py'), f'{address}/{path}', '--field', field, '--pictures', str(pictures), '--clients', str(n_clients),
             '--seconds', str(seconds), '--warm-up', str(warm_up)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=seconds + warm_up + 120).stdout)
