"What the tests share: real `dlfund` processes, a bundle trained once, small datasets in every published format."
import gzip, io, os, signal, subprocess, sys, tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # before torch: on two cores, threads that spin stall each other
from dlfund.data.datasets import CIFAR10_LABELS, REGISTER, Layout, file_hash, load

ROOT = Path(__file__).resolve().parent.parent
DLFUND = str(Path(sys.executable).with_name('dlfund'))


# Processes

def environment(
    **changes, # variables to set
)->dict: # what a child process gets
    "The environment of a user: no network, nothing in the cache, output buffered as Python does by default."
    ours = {'DLFUND_DATA', 'DLFUND_CACHE', 'DLFUND_OFFLINE', 'PYTHONUNBUFFERED'}
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    path = f'{Path(DLFUND).parent}{os.pathsep}{kept["PATH"]}'
    return kept | {'PATH': path, 'DLFUND_OFFLINE': '1', 'DLFUND_CACHE': '/nowhere'} | changes


def run(
    *words, # of the command line
    cwd, # where it runs
    program=(DLFUND,), # what is started
    timeout:float=900, # seconds; a process that takes longer hangs
    **env, # variables to set
)->subprocess.CompletedProcess:
    "Run `dlfund` as a real process."
    return subprocess.run([*program, *map(str, words)], cwd=cwd, env=environment(**env), capture_output=True, text=True,
                          timeout=timeout)


def start(
    *words, # of the command line
    cwd, # where it runs
    program=(DLFUND,), # what is started
)->subprocess.Popen: # with pipes; it can be interrupted even if the tests run in the background
    "Start `dlfund` as a real process, and go on."
    return subprocess.Popen([*program, *map(str, words)], cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def one_line(
    ran, # a finished process, or what `cli` returned
    status:int=1, # expected
)->str: # what it said
    "Expect exactly one line on standard error and this status."
    assert ran.returncode == status, ran
    assert ran.stderr.startswith('dlfund: ') and ran.stderr.endswith('\n'), ran.stderr
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    return ran.stderr.removeprefix('dlfund: ').strip()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No test sees the user's data, progress or the network beyond this machine."
    for name in ('DLFUND_DATA', 'IN_TEST'): monkeypatch.delenv(name, raising=False)
    for name, value in dict(DLFUND_CACHE=str(tmp_path/'cache'), DLFUND_PROGRESS=str(tmp_path/'progress.json'),
                            DLFUND_OFFLINE='1', NO_PROXY='127.0.0.1').items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cli(capfd, tmp_path, monkeypatch):
    "`dlfund`, called in this process to save the time of a start: status, stdout, stderr. It runs in `tmp_path`."
    from dlfund.cli import main
    monkeypatch.chdir(tmp_path)
    def call(*words):
        capfd.readouterr()
        status = main([str(w) for w in words])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)
    return call


# The main job

@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    "The main job, cut to two epochs: the process as it ended, and where it ran."
    cwd = tmp_path_factory.mktemp('main')
    return SimpleNamespace(cwd=cwd, ran=run('train', 'train.epochs=2', cwd=cwd))


@pytest.fixture(scope='session')
def bundle(trained):
    "The folder of its bundle."
    assert trained.ran.returncode == 0, trained.ran.stderr
    return trained.cwd/trained.ran.stdout.splitlines()[-1]


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "Eight pictures of the test part as PNG files, and their bytes `(8, 28, 28)`."
    folder, x = tmp_path_factory.mktemp('pictures'), load('fashion-mini').test.x[:8]
    files = [folder/f'{i}.png' for i in range(len(x))]
    for file, picture in zip(files, x): Image.fromarray(picture).save(file)
    return SimpleNamespace(files=files, x=x)


# Small datasets in the published formats

def bars(
    n:int, # pictures
    seed:int=0, # of the noise
    size:int=28, # pixels
)->tuple[np.ndarray, np.ndarray]: # pictures `(n, size, size)` and classes `(n,)`, both bytes
    "Ten classes that a network learns in a few steps: a bright bar at a height of its own, in noise."
    x = np.random.default_rng(seed).integers(0, 100, (n, size, size), dtype=np.uint8)
    y = (np.arange(n) % 10).astype(np.uint8)
    for picture, c in zip(x, y): picture[size*c//10:size*c//10 + 2] = 255
    return x, y


def write_idx(file, array):
    "Write a gzipped idx file."
    header = b'\0\0\x08' + bytes([array.ndim]) + np.array(array.shape, '>u4').tobytes()
    file.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def write_tar(file, members):
    "Write `(name, content)` pairs as a gzipped tar archive."
    with tarfile.open(file, 'w:gz') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_idx(folder, name='mnist', n=600):
    "The four files of MNIST's family. Training has two copies: of a test picture, and of one of its own."
    (folder/name).mkdir(parents=True)
    (train_x, train_y), (test_x, test_y) = bars(n, 1), bars(200, 2)
    train_x[0], train_x[20] = test_x[10], train_x[10]
    for part, x, y in ('train', train_x, train_y), ('t10k', test_x, test_y):
        write_idx(folder/name/f'{part}-images-idx3-ubyte.gz', x)
        write_idx(folder/name/f'{part}-labels-idx1-ubyte.gz', y)


def make_cifar_binary(folder):
    "CIFAR-10's binary archive: the first pixel of a picture is (class, 50, 100)."
    members = [('cifar-10-batches-bin/batches.meta.txt', b'airplane\n')]
    for i, name in enumerate([*(f'data_batch_{j}' for j in range(1, 6)), 'test_batch']):
        x = np.random.default_rng(i).integers(0, 255, (20, 3, 32, 32), dtype=np.uint8)
        y = (np.arange(20) % 10).astype(np.uint8)
        x[:, 0, 0, 0], x[:, 1, 0, 0], x[:, 2, 0, 0] = y, 50, 100
        members.append((f'cifar-10-batches-bin/{name}.bin', np.column_stack([y, x.reshape(20, -1)]).tobytes()))
    write_tar(folder/'cifar-10-binary.tar.gz', members)


def make_cifar_jpeg(folder):
    "The JPEG copy of CIFAR-10."
    members, rng = [], np.random.default_rng(0)
    for part, n in ('train', 10), ('test', 2):
        for label in CIFAR10_LABELS:
            for i in range(n):
                jpeg = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(jpeg, 'JPEG')
                members.append((f'{part}/{label}/{i}.jpg', jpeg.getvalue()))
    write_tar(folder/'cifar10-jpeg.tar.gz', members)


def make_imdb(folder, padding=0):
    "The archive of film reviews, with an unlabelled part to be left out, and `padding` bytes that do not compress."
    noise = np.random.default_rng(0).bytes(padding)
    members = [('aclImdb/README', noise), ('aclImdb/train/unsup/0_0.txt', b'no label')]
    for part, n in ('train', 20), ('test', 4):
        for label in 'neg', 'pos':
            for i in range(n): members.append((f'aclImdb/{part}/{label}/{i}_5.txt', f'{part} {label} {i} é'.encode()))
    write_tar(folder/'aclImdb_v1.tar.gz', members)


def make_sst2(folder):
    "Three files of `sentence<TAB>label`."
    (folder/'sst2').mkdir(parents=True)
    for part, n in ('train', 20), ('dev', 4), ('test', 6):
        lines = [f'{part} sentence {i}\t{i % 2}' for i in range(n)]
        (folder/'sst2'/f'{part}.tsv').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def make_ag_news(folder):
    "Two files of `class,title,description`."
    (folder/'ag-news').mkdir(parents=True)
    for part, n in ('train', 80), ('test', 8):
        lines = [f'"{i % 4 + 1}","Title, {i}","{part} says ""{i}"""' for i in range(n)]
        (folder/'ag-news'/f'{part}.csv').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def make_ett(folder, name='ETTh1'):
    "Two years of hours; column `c` of row `t` holds `t + c`."
    times = np.datetime64('2016-07-01T00') + np.arange(17_420)
    rows = [f'{str(t).replace("T", " ")}:00:00,' + ','.join(str(i + c) for c in range(7)) for i, t in enumerate(times)]
    (folder/f'{name}.csv').write_text('date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT\n' + '\n'.join(rows) + '\n')


def make_tinyshakespeare(folder):
    "One text."
    (folder/'tinyshakespeare.txt').write_text(''.join(f'Line {i:4}\n' for i in range(1000)))


MAKERS = {('mnist', 0): make_idx, ('fashion-mnist', 0): lambda folder: make_idx(folder, 'fashion-mnist'),
          ('cifar10', 0): make_cifar_binary, ('cifar10', 1): make_cifar_jpeg, ('imdb', 0): make_imdb,
          ('sst2', 0): make_sst2, ('ag-news', 0): make_ag_news,
          ('etth1', 0): make_ett, ('etth2', 0): lambda folder: make_ett(folder, 'ETTh2'),
          ('tinyshakespeare', 0): make_tinyshakespeare}


def published(
    name:str, # of a dataset
    folder:Path, # holds its files
    *addresses, # folders on the network that hold them too
    layout:int=0, # which of its layouts
): # an entry for `REGISTER`
    "The register's entry, with the files in `folder` as if they were the published ones."
    entry = REGISTER[name]
    files = [replace(f, hashes=(f'sha256:{file_hash(folder/f.path)}',), size=(folder/f.path).stat().st_size,
                     urls=tuple(a + f.path for a in addresses)) for f in entry.layouts[layout].files]
    return replace(entry, layouts=(Layout(files=tuple(files), read=entry.layouts[layout].read),))


@pytest.fixture
def small(monkeypatch, tmp_path):
    "Make `small(name)`: a folder with a small dataset that passes for the published one, and is where dlfund looks."
    def make(name, layout=0):
        folder = tmp_path/'data'
        folder.mkdir(exist_ok=True)
        MAKERS[name, layout](folder)
        monkeypatch.setitem(REGISTER, name, published(name, folder, layout=layout))
        monkeypatch.setenv('DLFUND_DATA', str(folder))
        return folder
    return make


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A program: `dlfund` in a real process, with 540 pictures under the name of mnist."
    folder = tmp_path_factory.mktemp('tiny')
    make_idx(folder)
    code = f'''if True:
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import REGISTER, Path, published
        os.environ['DLFUND_DATA'] = {str(folder)!r}
        REGISTER['mnist'] = published('mnist', Path({str(folder)!r}))
        from dlfund.cli import main
        sys.exit(main(sys.argv[1:]))'''
    return sys.executable, '-c', code
