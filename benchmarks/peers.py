"""The same ResNet-18 behind other servers: `python benchmarks/peers.py plain BUNDLE PORT [--engine eager|onnx|int8] [--workers N] [--batch N]`.

`plain` is FastAPI around PyTorch as most tutorials write it: one asynchronous handler, one picture at a time, PyTorch's own threads. `threads` is the same in a
plain function, so that FastAPI runs it in its pool of threads, one PyTorch thread each. `litserve` is LitServe, batched, with as many workers as asked for. `echo`
reads the form and answers at once: what HTTP alone costs, and how fast the clients can ask. All decode the upload with Pillow and answer the same JSON."""
import argparse, io, sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))


class Engine:
    "A bundle's model: from pictures `(n, h, w, 3)`, bytes, to probabilities."
    def __init__(self, path, engine, n_threads=None):
        self.engine = engine
        if engine == 'eager':
            import torch
            from dlfund.deployment.bundle import Bundle
            if n_threads: torch.set_num_threads(n_threads)
            self.bundle = Bundle.load(path)
            self.labels = self.bundle.labels
        else:
            from dlfund.deployment.runtime import load_runner
            self.runner = load_runner(path, precision='int8' if engine == 'int8' else 'float32', n_threads=n_threads or 1)
            self.labels = self.runner.labels
    def __call__(self, pictures):
        if self.engine == 'eager':
            import torch
            with torch.inference_mode(): # what people write: normalise, forward, softmax
                x = self.bundle.preprocess(torch.from_numpy(pictures))
                return self.bundle.model(x).softmax(1).numpy()
        from dlfund.deployment.runtime import softmax
        return softmax(self.runner(pictures))
    def say(self, row): return dict(label=self.labels[int(row.argmax())], probability=float(row.max()), probabilities=dict(zip(self.labels, row.tolist())))


def decode(content, size=(64, 64)):
    "An upload as bytes `(h, w, 3)`."
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB').resize(size))


def plain(args, is_async):
    "FastAPI, one picture a call."
    import uvicorn
    from fastapi import FastAPI, UploadFile
    app, engine = FastAPI(), None if args.kind == 'echo' else Engine(args.bundle, args.engine, args.threads)
    def answer(content): return engine.say(engine(decode(content)[None])[0])
    if args.kind == 'echo':
        @app.post('/predict')
        async def predict(file: UploadFile): return {'n': len(await file.read())}
    elif is_async:
        @app.post('/predict')
        async def predict(file: UploadFile): return answer(await file.read())
    else:
        @app.post('/predict')
        def predict(file: UploadFile): return answer(file.file.read())
    @app.get('/health')
    async def health(): return 'ok'
    uvicorn.run(app, host='127.0.0.1', port=args.port, log_level='warning', access_log=False)


def litserve(args):
    "LitServe with its batching."
    import litserve as ls
    class Api(ls.LitAPI):
        def setup(self, device): self.run = Engine(args.bundle, args.engine, args.threads)
        def decode_request(self, request): return decode(request['file'].file.read())
        def batch(self, inputs): return np.stack(inputs)
        def predict(self, x): return self.run(x if args.batch > 1 else x[None])
        def unbatch(self, output): return list(output)
        def encode_response(self, output): return self.run.say(output if args.batch > 1 else output[0])
    api = Api(max_batch_size=args.batch, batch_timeout=args.wait if args.batch > 1 else 0.0)
    server = ls.LitServer(api, accelerator='cpu', workers_per_device=args.workers, timeout=60, fast_queue=args.fast)
    server.run(host='127.0.0.1', port=args.port, num_api_servers=1, log_level='warning', generate_client_file=False, access_log=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kind', choices=('plain', 'threads', 'litserve', 'echo'))
    parser.add_argument('bundle')
    parser.add_argument('port', type=int)
    parser.add_argument('--engine', choices=('eager', 'onnx', 'int8'), default='eager')
    parser.add_argument('--threads', type=int, help="of the engine; the library's own choice if not given")
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--wait', type=float, default=0.01, help='seconds for a batch to fill')
    parser.add_argument('--fast', action='store_true', help="LitServe's ZeroMQ queues")
    args = parser.parse_args()
    litserve(args) if args.kind == 'litserve' else plain(args, args.kind != 'threads')
