"The API on Ray Serve: two replicas answer as the bundle does, and one that is shot is replaced."
import io, json, os, signal, socket, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dlfund.deployment.files import BundleError
from dlfund.deployment.requests import ServerConfig, new_key
from dlfund.deployment.scaling import AutoscaleConfig, ray_app, ray_autoscaling
from serving_tools import make_bundle

ray = pytest.importorskip('ray')
from ray import serve
from ray.serve.config import AutoscalingConfig

pytestmark = pytest.mark.filterwarnings('ignore::pydantic.PydanticDeprecatedSince20') # of Ray
GREY, COLOUR = dict(name='lenet', n_classes=10, n_channels=1), dict(name='resnet-mini', n_classes=7, n_channels=3, width=0.5)
KEY, DIGEST = new_key()
TWO = AutoscaleConfig(min_replicas=2, max_replicas=2, target=4.0)
PICTURES = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def free_port():
    with socket.socket() as door:
        door.bind(('127.0.0.1', 0))
        return door.getsockname()[1]


class Client:
    "Asks the application."
    def __init__(self, port): self.url = f'http://127.0.0.1:{port}'
    def ask(self, path, body=None, key=KEY, content_type='application/json'):
        request = urllib.request.Request(self.url + path, body, {'Content-Type': content_type, 'Authorization': f'Bearer {key}'})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer: return answer.status, answer.read()
        except urllib.error.HTTPError as e: return e.code, e.read()
    def predict(self, pictures, model='grey'):
        return self.ask('/v1/predict', json.dumps({'model': model, 'pictures': [{'array': p.tolist()} for p in pictures]}).encode())


def probabilities(body): return torch.tensor([list(p['probabilities'].values()) for p in json.loads(body)['predictions']])


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f'not within {seconds} s'
        time.sleep(0.2)
    return found


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundles')
    return {'grey': (folder/'grey', make_bundle(folder/'grey', GREY)), 'rgb': (folder/'rgb', make_bundle(folder/'rgb', COLOUR, (23, 19)))}


@pytest.fixture(scope='module')
def client(bundles):
    "One application with two models of two replicas each, on a Ray of its own."
    from dlfund.deployment.requests import ApiKey
    port = free_port()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=100*2**20)
    try:
        serve.start(http_options=dict(host='127.0.0.1', port=port))
        config = ServerConfig(keys={'tester': ApiKey(sha256=DIGEST)}, max_batch=8, max_body=2**20)
        serve.run(ray_app([f'{name}={path}' for name, (path, _) in bundles.items()], config, TWO), name='dlfund')
        asker = Client(port)
        until(lambda: asker.ask('/readyz')[0] == 200, 60)
        yield asker
    finally:
        serve.shutdown()
        ray.shutdown()


def counted():
    "Pictures that each replica of the grey model has answered, by process."
    handle = serve.get_deployment_handle('model-grey', 'dlfund')
    return dict(handle.counted.remote().result(timeout_s=10) for _ in range(12))


def test_answers_are_those_of_the_bundle(client, bundles):
    status, body = client.predict(PICTURES)
    assert status == 200
    torch.testing.assert_close(probabilities(body), bundles['grey'][1].logits(torch.from_numpy(PICTURES)).softmax(-1), rtol=1e-5, atol=1e-5)
    colour = np.random.default_rng(1).integers(0, 256, (3, 23, 19, 3), dtype=np.uint8)
    status, body = client.predict(colour, 'rgb')
    torch.testing.assert_close(probabilities(body), bundles['rgb'][1].logits(torch.from_numpy(colour)).softmax(-1), rtol=1e-5, atol=1e-5)


def test_a_file_is_answered_and_a_broken_one_refused_alone(client, bundles):
    import base64
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, 'PNG')
    asked = [{'base64': base64.b64encode(f).decode()} for f in (file.getvalue(), file.getvalue()[:60])]
    status, body = client.ask('/v1/predict', json.dumps({'model': 'grey', 'pictures': asked}).encode())
    good, bad = json.loads(body)['predictions']
    [wanted] = bundles['grey'][1].predict(PICTURES[:1])
    assert status == 200 and abs(good['probability'] - wanted.probability) < 1e-5 and bad['error']['code'] == 'broken_picture'


def test_the_limits_are_those_of_the_server(client):
    assert client.ask('/v1/predict', b'{}', key='wrong')[0] == 401
    assert client.ask('/v1/predict', b'{')[0] == 422
    assert client.ask('/v1/predict', b'x', content_type='text/plain')[0] == 415
    assert client.ask('/v1/predict', b' '*(2**20 + 1))[0] == 413
    assert client.predict(PICTURES[:1], 'nobody')[0] == 404
    models = json.loads(client.ask('/v1/models')[1])['models']
    assert [m['name'] for m in models] == ['grey', 'rgb'] and models[0]['size'] == [28, 28]
    assert b'dlfund_requests_total' in client.ask('/metrics')[1] and client.ask('/healthz')[0] == 200


def test_two_replicas_answer_and_one_that_is_shot_is_replaced(client, bundles):
    with ThreadPoolExecutor(16) as pool: assert {s for s, _ in pool.map(lambda i: client.predict(PICTURES), range(60))} == {200}
    before = until(lambda: len(found := counted()) == 2 and found, 20)
    assert min(before.values()) > 0
    wanted, victim = bundles['grey'][1].logits(torch.from_numpy(PICTURES)).softmax(-1), min(before)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.predict, PICTURES) for _ in range(30)]
        os.kill(victim, signal.SIGKILL)
        answers += [pool.submit(client.predict, PICTURES) for _ in range(60)]
        for status, body in (answer.result() for answer in answers):
            assert status == 200, body
            torch.testing.assert_close(probabilities(body), wanted, rtol=1e-5, atol=1e-5)
    def replaced():
        try: after = counted()
        except Exception: return None # the handle has not learnt of the death yet
        return len(after) == 2 and victim not in after and after
    [new] = set(until(replaced, 40)) - set(before)
    with ThreadPoolExecutor(16) as pool: list(pool.map(lambda i: client.predict(PICTURES), range(60)))
    assert until(lambda: counted().get(new), 20) > 0


# Without a cluster

def test_the_control_loop_is_what_ray_understands():
    made = AutoscalingConfig(**ray_autoscaling(AutoscaleConfig(min_replicas=2, max_replicas=9, target=3.0, window=20.0, down_delay=60.0)))
    assert (made.min_replicas, made.max_replicas, made.target_ongoing_requests) == (2, 9, 3.0)
    assert (made.look_back_period_s, made.downscale_delay_s, made.upscale_delay_s) == (20.0, 60.0, 0.0)


def test_a_bundle_without_a_graph_is_an_error_before_anything_starts(bundles, tmp_path):
    path = bundles['grey'][1].save(tmp_path/'bare')
    with pytest.raises(BundleError, match='dlfund export'): ray_app([path])
    with pytest.raises(ValueError, match='must exist'): ray_app([tmp_path/'nothing'])


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r"pip install 'dlfund\[deploy\]' 'ray\[serve\]'"): ray_app(['x'])
