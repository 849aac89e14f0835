"What the tests of the server share: small bundles, a model with traps, a server in a process of its own, and a client."
import base64, http.client, json, os, re, signal, socket, subprocess, sys, threading, time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil

SIZE = (28, 28) # of the trap's pictures, pixels
CALM, SLOW, HANG, POISON = 0, 253, 254, 255 # the first byte of a picture tells the trap what to do,
SIGN = (1, 254, 3) # if these come next: no decoded picture begins so by chance


# Bundles

def make_bundle(
    folder:Path, # where it goes
    architecture:dict, # arguments of `dlfund.vision.build`
    size:tuple[int, int]=SIZE, # of its pictures
    task:str='image-classification', # or `semantic-segmentation`
):
    "A network with random weights and its exported graph; returns the `Bundle`."
    import torch
    from dlfund.data.preprocessing import ImagePreprocess
    from dlfund.deployment.bundle import Bundle, build_model
    from dlfund.deployment.export import export_onnx
    from dlfund.deployment.files import attach
    torch.manual_seed(0)
    n = architecture['n_channels']
    bundle = Bundle(model=build_model(task, architecture).eval(), architecture=architecture, task=task, metrics={}, training={},
                    labels=[f'class {i}' for i in range(architecture['n_classes'])], data=dict(name='noise', sha256='0'*64, source='none', licence='CC0', n_test_reads=0),
                    preprocess=ImagePreprocess(size=size, n_channels=n, mean=(0.3,)*n, std=(0.2,)*n))
    bundle.save(folder)
    attach(folder, {'model.onnx': export_onnx(bundle)})
    return bundle


def trap_weights(
    seed:int, # each gives another model
)->tuple[np.ndarray, np.ndarray]: # weights `(784, 10)` and biases `(10,)`
    "A linear model that tells any two pictures apart."
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.2, (SIZE[0]*SIZE[1], 10)).astype(np.float32), rng.normal(0, 0.2, 10).astype(np.float32)


def trap_graph(
    seed:int=0, # of its weights
    n_slow:int=100_000, # turns of an empty loop for a batch with a slow picture
)->bytes: # an ONNX file
    "A linear model that becomes slow, hangs, or says NaN if a picture asks it to."
    from onnx import TensorProto as T, helper as h, numpy_helper
    weights, biases = trap_weights(seed)
    name = lambda **arrays: [numpy_helper.from_array(np.asarray(a), k) for k, a in arrays.items()]
    constants = name(weights=weights, biases=biases, scale=np.float32(1/255), flat=np.array([0, -1]), from_0=np.array([0]), to_1=np.array([1]),
                     to_4=np.array([4]), axis=np.array([1]), sign=np.float32(SIGN), thousand=np.float32(1000), limit=np.float32(254.5), nothing=np.float32(0), zero=np.float32(0), yes=np.array(True),
                     slow=np.float32(SLOW), hang=np.float32(HANG), one=np.int64(0), few=np.int64(n_slow), many=np.int64(10**15), all_=np.array([0, 1]))
    body = h.make_graph([h.make_node('Identity', ['go'], ['go_on']), h.make_node('Cos', ['v'], ['w'])], 'body',
                        [h.make_tensor_value_info('i', T.INT64, []), h.make_tensor_value_info('go', T.BOOL, []),
                         h.make_tensor_value_info('v', T.FLOAT, [])],
                        [h.make_tensor_value_info('go_on', T.BOOL, []), h.make_tensor_value_info('w', T.FLOAT, [])])
    n = h.make_node
    nodes = [n('Cast', ['pictures'], ['x'], to=T.FLOAT), n('Reshape', ['x', 'flat'], ['rows']), n('Mul', ['rows', 'scale'], ['scaled']),
             n('MatMul', ['scaled', 'weights'], ['mixed']), n('Add', ['mixed', 'biases'], ['said']),
             n('Slice', ['rows', 'from_0', 'to_1', 'axis'], ['byte']), n('Slice', ['rows', 'to_1', 'to_4', 'axis'], ['next']),
             n('Sub', ['next', 'sign'], ['off']), n('Abs', ['off'], ['how_off']), n('ReduceSum', ['how_off', 'axis'], ['unlike'], keepdims=1),
             n('Mul', ['unlike', 'thousand'], ['far']), n('Sub', ['byte', 'far'], ['first']), # (n, 1): what each picture asks for
             n('Sub', ['limit', 'first'], ['room']), n('Sqrt', ['room'], ['root']), n('Mul', ['root', 'nothing'], ['nan_if_poison']),
             n('Equal', ['first', 'slow'], ['is_slow']), n('Where', ['is_slow', 'few', 'one'], ['turns_slow']),
             n('Equal', ['first', 'hang'], ['is_hang']), n('Where', ['is_hang', 'many', 'turns_slow'], ['turns_each']),
             n('ReduceMax', ['turns_each', 'all_'], ['turns'], keepdims=0), n('Loop', ['turns', 'yes', 'zero'], ['spent'], body=body),
             n('Mul', ['spent', 'nothing'], ['spent_0']), n('Add', ['said', 'nan_if_poison'], ['said_1']), n('Add', ['said_1', 'spent_0'], ['logits'])]
    graph = h.make_graph(nodes, 'trap', [h.make_tensor_value_info('pictures', T.UINT8, ['batch', *SIZE])],
                         [h.make_tensor_value_info('logits', T.FLOAT, ['batch', 10])], constants)
    model = h.make_model(graph, opset_imports=[h.make_opsetid('', 18)], ir_version=9)
    facts = dict(labels=json.dumps([f'class {i}' for i in range(10)]), size=json.dumps(SIZE), task='image-classification', n_channels='1')
    for key, value in facts.items(): model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def make_trap(
    folder:Path, # where it goes; a bundle that is there is replaced
    seed:int=0, # of its weights
    n_slow:int=100_000, # as for `trap_graph`
)->Path: # the same
    "A bundle that is nothing but a trap: a server looks at the graph alone, so no network stands behind it."
    from dlfund.deployment.files import WEIGHTS, seal, write_bundle
    return write_bundle(folder, seal(dict(task='image-classification'), {WEIGHTS: b'none', 'model.onnx': trap_graph(seed, n_slow)}))


def trap_logits(
    pictures:np.ndarray, # bytes `(n, 28, 28)`
    seed:int=0, # of the weights
)->np.ndarray: # `(n, 10)`
    "What the trap should say, without ONNX."
    weights, biases = trap_weights(seed)
    return pictures.reshape(len(pictures), -1).astype(np.float64)/255 @ weights + biases


def turns_of(
    seconds:float, # that a slow batch shall take on this machine, about
)->int: # turns of the trap's loop
    "Measure how long a turn takes."
    from dlfund.deployment.runtime import OnnxRunner
    run, slow = OnnxRunner(trap_graph(n_slow=20_000)), trap_pictures(1, SLOW)
    run(slow)
    begin = time.perf_counter()
    run(slow)
    return max(1, int(20_000*seconds/(time.perf_counter() - begin)))


def trap_pictures(
    n:int, # how many
    kind:int=CALM, # what they ask for
    seed:int=0, # of the noise
)->np.ndarray: # bytes `(n, 28, 28)`, all different
    "Noise with an order in its first byte."
    pictures = np.random.default_rng(seed).integers(0, 253, (n, *SIZE), dtype=np.uint8)
    pictures[:, 0, :4] = kind, *SIGN
    return pictures


# A server

SERVE = ('import json, sys; from dlfund.deployment.requests import read_config; from dlfund.deployment.server import serve; '
         'serve(json.loads(sys.argv[1]), read_config(None, **json.loads(sys.argv[2])))')
TESTING = dict(host='127.0.0.1', port=0, workers=2, drain_delay=0.1, reload_every=0)


class Running:
    "A server in a process of its own, ready; use it in a `with`."
    def __init__(self,
        *bundles, # paths, each perhaps as NAME=PATH
        program=None, # the words that start it, if not `serve`
        log=None, # an open file for its standard error; collected if not given
        before=None, # runs in the child before the program
        is_awaited:bool=True, # wait until it is ready?
        **config, # fields of `ServerConfig`
    ):
        words = program or [sys.executable, '-c', SERVE, json.dumps([str(b) for b in bundles]), json.dumps(TESTING | config)]
        self.log, self.noise, self.said, self.url = [], [], [], None
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log or subprocess.PIPE, text=True, preexec_fn=before,
                                        env=os.environ | {'DLFUND_OFFLINE': '1'})
        self.threads = [threading.Thread(target=self.listen, daemon=True)] + [threading.Thread(target=self.collect, daemon=True)]*(log is None)
        for thread in self.threads: thread.start()
        try:
            if is_awaited: self.until(lambda: self.url, 60)
        except BaseException: self.process.kill(); raise
    def collect(self):
        for line in self.process.stderr:
            try: self.log.append(json.loads(line))
            except ValueError: self.noise.append(line)
    def listen(self):
        for line in self.process.stdout:
            self.said.append(line)
            found = re.search(r'http://([\d.]+):(\d+)', line)
            if found: self.address, self.url = (found[1], int(found[2])), found[0]
    def until(self, condition, seconds=20.0):
        "Wait until something is so; fail with what the server said."
        end = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None and not self.url: raise AssertionError(f'ended: {self.noise} {self.log}')
            if time.monotonic() > end: raise AssertionError(f'not within {seconds} s: {self.log[-20:]} {self.noise}')
            time.sleep(0.02)
        return found
    def events(self, name): return [line for line in list(self.log) if line['event'] == name]
    def settled(self, model='trap', n=2):
        "Wait until as many workers are there, and stay."
        def is_full(): return self.metrics().get(('dlfund_workers', model)) == n
        self.until(lambda: all(is_full() and (time.sleep(0.15) or True) for _ in range(3)), 60)
    def workers(self):
        "The processes that hold models."
        return [p for p in psutil.Process(self.process.pid).children() if 'batching import work' in ' '.join(p.cmdline())]
    def stop(self, sign=signal.SIGTERM, seconds=30):
        "Tell it to stop, and wait for its end."
        if self.process.poll() is None: self.process.send_signal(sign)
        try: return self.process.wait(seconds)
        finally:
            if self.process.poll() is None: self.process.kill(); self.process.wait()
            for thread in self.threads: thread.join(5)
    def __enter__(self): return self
    def __exit__(self, *failure): self.stop()

    # Questions
    def ask(self, method, path, body=None, headers=None, timeout=30): return ask(self.address, method, path, body, headers, timeout)
    def get(self, path, **headers): return self.ask('GET', path, headers=headers)
    def files(self, *contents, model=None, timeout=30, **headers):
        "Send pictures as a form."
        body, kind = form(*contents, model=model)
        return self.ask('POST', '/v1/predict', body, {'content-type': kind} | headers, timeout)
    def json(self, asked, timeout=30, **headers):
        "Send JSON, or the bytes that shall pass for it."
        body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        return self.ask('POST', '/v1/predict', body, {'content-type': 'application/json'} | headers, timeout)
    def arrays(self, pictures, model=None, **more):
        "Send bytes of the model's own size."
        return self.json(arrays(pictures, model), **more)
    def metrics(self):
        "Values by name and labels."
        from prometheus_client.parser import text_string_to_metric_families
        families = text_string_to_metric_families(self.get('/metrics').body.decode())
        return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


class Answer:
    "Of a server: status, headers with small letters, body."
    def __init__(self, status, headers, body): self.status, self.headers, self.body = status, {k.lower(): v for k, v in headers}, body
    def json(self): return json.loads(self.body, parse_constant=lambda name: 1/0) # NaN is no JSON
    def __repr__(self): return f'{self.status} {self.body[:300]!r}'


def ask(address, method, path, body=None, headers=None, timeout=30):
    "One request on a connection of its own."
    with closing(http.client.HTTPConnection(*address, timeout=timeout)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.getheaders(), response.read())


def form(
    *contents:bytes, # pictures
    model:str|None=None, # its name
)->tuple[bytes, str]: # body and content type
    "A form as browsers write it."
    head = b'--frontier\r\nContent-Disposition: form-data; name="files"; filename="secret-name.png"\r\nContent-Type: image/png\r\n\r\n'
    parts = [head + content for content in contents]
    if model is not None: parts.append(b'--frontier\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model.encode())
    return b'\r\n'.join([*parts, b'--frontier--\r\n']), 'multipart/form-data; boundary=frontier'


def arrays(pictures, model=None): return dict(pictures=[{'array': p.tolist()} for p in pictures]) | ({'model': model} if model else {})
def base64s(contents): return dict(pictures=[{'base64': base64.b64encode(c).decode()} for c in contents])


def raw(
    address:tuple, # of a server
    *pieces:bytes, # of a request
    pause:float=0.0, # seconds between them
    timeout:float=15.0, # seconds to wait for anything
)->bytes: # all that came back, until the server closed or fell silent
    "Speak to a socket without knowing HTTP."
    with socket.create_connection(address, timeout) as s:
        try:
            for piece in pieces: s.sendall(piece); time.sleep(pause)
        except OSError: pass # it closed while we were speaking
        came = b''
        try:
            while piece := s.recv(65536):
                came += piece
                if is_whole(came): break
        except OSError: pass
        return came


def is_whole(
    came:bytes, # from a server
)->bool: # whether the first answer in it is complete
    "Has the answer arrived?"
    head, blank, body = came.partition(b'\r\n\r\n')
    length = re.search(rb'content-length: (\d+)', head, re.I)
    return bool(blank and length and len(body) >= int(length[1]) and not head.startswith(b'HTTP/1.1 100'))


# Judgements

FORBIDDEN = re.compile(rb'Traceback|File "|\.py\b|site-packages|/usr/|/tmp/|Errno|Exception|0x[0-9a-f]{6}')


def assert_refused(
    answer:Answer, # of the server
    *statuses:int, # that are right
)->dict: # code, message, request_id
    "An error has one of these statuses and the one form, and tells nothing of the inside."
    assert answer.status in statuses and answer.status != 500, answer
    assert not FORBIDDEN.search(answer.body), answer
    assert answer.headers['content-type'] == 'application/json', answer.headers
    said = answer.json()
    assert list(said) == ['error'] and sorted(said['error']) == ['code', 'message', 'request_id'], said
    assert said['error']['request_id'] == answer.headers['x-request-id'] and len(answer.body) < 2000
    if answer.status in (429, 503, 504): assert 1 <= int(answer.headers['retry-after']) <= 60
    return said['error']


def softmax(z): return np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


def assert_said(
    answer:Answer, # of the server
    expected:np.ndarray, # probabilities `(n, n_classes)`
    atol:float=1e-5, # of each
)->dict: # the whole answer
    "A prediction for each picture, in order, as expected."
    assert answer.status == 200, answer
    said = answer.json()
    found = np.array([list(p['probabilities'].values()) for p in said['predictions']])
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert [p['label'] for p in said['predictions']] == [f'class {i}' for i in found.argmax(1)]
    return said


def assert_well(
    server:Running, # that has been through something
    model:str|None=None, # to ask
)->None:
    "It lives, is ready, answers the trap's pictures rightly, and made no mistake of its own."
    assert (server.get('/healthz').status, server.get('/readyz').status) == (200, 200)
    pictures = trap_pictures(3, seed=7)
    assert_said(server.arrays(pictures, model), softmax(trap_logits(pictures)))
    assert not server.events('failed') and not server.noise, (server.events('failed'), server.noise)
    said = [line for line in server.events('library') if 'error' in line] # others are warnings of what clients did
    assert not said, said
