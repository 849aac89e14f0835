"Bad input, one fault at a time: one clear line, a status that is not 0, and nothing lost."
import copy, http.server, io, json, os, pickle, re, shutil, struct, subprocess, sys, tarfile, threading, zipfile, zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import DLFUND, MAKERS, environment, make_imdb, one_line, published, run, write_idx, write_tar
from dlfund.data import datasets
from dlfund.data.datasets import REGISTER, DataError, fetch, file_hash, load, read_idx, read_members
from dlfund.deployment import files
from dlfund.deployment.bundle import Bundle, BundleError
from dlfund.training.checkpoints import checkpoint_files, read_checkpoint


def tree(folder):
    "The content of every file below a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# A server that can fail

class Mirror(http.server.BaseHTTPRequestHandler):
    "Serves `server.files`; how it answers the next request is the next word of `server.plan`."
    def log_message(self, *args): pass
    def do_GET(self):
        plan, content = self.server.plan, self.server.files[self.path]
        how, asked = plan.pop(0) if plan else 'right', self.headers.get('Range')
        self.server.asked.append(asked)
        self.server.encodings.add(self.headers.get('Accept-Encoding'))
        if how == 'html': return self.answer(404, b'<html>Not found</html>')
        if how == 'page': return self.answer(200, b'<html>Please log in</html>')
        if how == 'wrong': return self.answer(200, content[:-1] + b'?')
        if how == 'long': return self.answer(200, content + bytes(5 << 20))
        if how == 'cut': return self.answer(200, content, len(content)//2)
        begin = int(re.fullmatch(r'bytes=(\d+)-', asked)[1]) if asked and how != 'no ranges' else 0
        self.answer(206 if begin else 200, content[begin:])
    def answer(self, status, content, n_sent=None):
        self.send_response(status)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.server.n_bytes += len(content[:n_sent])
        try: self.wfile.write(content[:n_sent])
        except ConnectionError: pass # it was asked for less than `content`


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    "The small archive of `imdb` on a server of this machine, which is its only address."
    (tmp_path/'origin').mkdir()
    make_imdb(tmp_path/'origin', padding=3 << 20)
    monkeypatch.delenv('DLFUND_OFFLINE')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.plan, server.asked, server.n_bytes, server.encodings = [], [], 0, set()
        server.address, server.folder = f'http://127.0.0.1:{server.server_port}/', tmp_path/'origin'
        server.files = {'/' + name: content for name, content in tree(tmp_path/'origin').items()}
        server.good = server.files['/aclImdb_v1.tar.gz']
        monkeypatch.setitem(REGISTER, 'imdb', published('imdb', server.folder, server.address))
        yield server
        server.shutdown()


ARCHIVE = 'aclImdb_v1.tar.gz'
DAMAGES = dict(truncated=lambda raw: raw[:len(raw)//2], altered=lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:],
               empty=lambda raw: b'', other=lambda raw: b'<html>Not found</html>')


def test_an_absent_dataset_is_fetched_and_kept(mirror, tmp_path):
    assert len(load('imdb', say=lambda line: None).test) == 8 and len(load('imdb', say=lambda line: None).test) == 8
    assert mirror.asked == [None] and tree(tmp_path/'cache') == {ARCHIVE: mirror.good}
    assert mirror.encodings == {'identity'}, 'what a server compresses on the way fits neither ranges nor hashes'


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_archive_in_the_cache_is_fetched_again(mirror, cli, tmp_path, damage):
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache'/ARCHIVE).write_bytes(DAMAGES[damage](mirror.good))
    ran = cli('data', 'get', 'imdb')
    assert ran.returncode == 0 and ran.stdout.strip() == str(tmp_path/'cache'/ARCHIVE)
    assert f'{ARCHIVE} is not the published file (wrong hash); deleted' in ran.stderr
    assert mirror.asked == [None] and tree(tmp_path/'cache') == {ARCHIVE: mirror.good}


def test_a_damaged_archive_in_the_cache_without_a_network(mirror, cli, tmp_path, monkeypatch):
    monkeypatch.setenv('DLFUND_OFFLINE', '1')
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache'/ARCHIVE).write_bytes(mirror.good[:-9])
    ran = cli('data', 'get', 'imdb')
    assert ran.returncode == 1 and mirror.asked == [] and tree(tmp_path/'cache') == {}
    assert 'deleted' in ran.stderr and 'DLFUND_DATA' in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_archive_of_the_user_stays(mirror, cli, tmp_path, monkeypatch, damage):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/ARCHIVE).write_bytes(DAMAGES[damage](mirror.good))
    monkeypatch.setenv('DLFUND_DATA', str(tmp_path/'mine'))
    line = one_line(cli('data', 'get', 'imdb'))
    assert 'wrong hash' in line and str(tmp_path/'mine'/ARCHIVE) in line and mirror.asked == []
    assert tree(tmp_path/'mine') == {ARCHIVE: DAMAGES[damage](mirror.good)}


@pytest.mark.parametrize('plan, n_asked, why', [
    (['wrong', 'wrong'], 2, 'not the published file'), (['page', 'page'], 2, 'not the published file'),
    (['html'], 1, '404'), (['long'], 1, 'more than')])
def test_a_server_that_sends_something_else(mirror, cli, tmp_path, plan, n_asked, why):
    mirror.plan = plan.copy()
    ran = cli('data', 'get', 'imdb')
    assert ran.returncode == 1 and why in ran.stderr and mirror.address in ran.stderr and 'Traceback' not in ran.stderr
    assert 'DLFUND_DATA' in ran.stderr.splitlines()[-1] and ran.stdout == ''
    assert len(mirror.asked) == n_asked and tree(tmp_path/'cache') == {}


def test_wrong_once_then_right(mirror, cli, tmp_path):
    mirror.plan = ['wrong']
    ran = cli('data', 'get', 'imdb')
    assert ran.returncode == 0 and 'wrong hash); deleted' in ran.stderr
    assert mirror.asked == [None, None] and tree(tmp_path/'cache') == {ARCHIVE: mirror.good}


def fetched(cli, tries=2):
    "Ask until it is here, as a user would after a cut connection."
    return next(ran for ran in (cli('data', 'get', 'imdb') for _ in range(tries)) if ran.returncode == 0)


def only_the_rest_was_sent(mirror):
    "Whether the second request asked for what was missing, give or take the block in which the first answer was cut."
    begin, half = int(re.fullmatch(r'bytes=(\d+)-', mirror.asked[1])[1]), len(mirror.good)//2
    return half - (1 << 20) <= begin <= half and mirror.n_bytes == half + len(mirror.good) - begin


def test_a_cut_connection_is_resumed(mirror, cli, tmp_path):
    mirror.plan = ['cut']
    fetched(cli)
    assert len(mirror.asked) == 2 and only_the_rest_was_sent(mirror)
    assert tree(tmp_path/'cache') == {ARCHIVE: mirror.good}


def test_a_cut_connection_to_a_server_without_ranges(mirror, cli, tmp_path):
    mirror.plan = ['cut', 'no ranges']
    fetched(cli)
    assert tree(tmp_path/'cache') == {ARCHIVE: mirror.good}


def test_a_mirror_goes_on_where_the_official_address_stopped(mirror, tmp_path):
    mirror.plan = ['cut']
    file = published('imdb', mirror.folder, mirror.address, mirror.address).layouts[0].files[0]
    assert fetch(file, tmp_path/'cache').read_bytes() == mirror.good
    assert len(mirror.asked) == 2 and only_the_rest_was_sent(mirror)


def test_a_mirror_answers_when_the_official_address_is_dead(mirror, tmp_path):
    file = published('imdb', mirror.folder, 'http://127.0.0.1:1/', mirror.address).layouts[0].files[0]
    assert fetch(file, tmp_path/'cache').read_bytes() == mirror.good


def test_what_is_here_already_is_not_fetched_again(mirror, tmp_path, monkeypatch):
    MAKERS['sst2', 0](mirror.folder)
    mirror.files |= {f'/{name}': content for name, content in tree(mirror.folder).items()}
    monkeypatch.setitem(REGISTER, 'sst2', published('sst2', mirror.folder, mirror.address))
    (tmp_path/'cache'/'sst2').mkdir(parents=True)
    shutil.copy(mirror.folder/'sst2'/'train.tsv', tmp_path/'cache'/'sst2')
    load('sst2', say=lambda line: None)
    assert len(mirror.asked) == 2, 'two of the three files were missing'


def test_offline_and_absent(cli, tmp_path):
    line = one_line(cli('data', 'get', 'cifar10'))
    for part in ("'cifar10'", str(tmp_path/'cache'), '/usr/share/datasets', 'DLFUND_OFFLINE',
                 '`dlfund data get cifar10`', 'cifar-10-binary.tar.gz', 'DLFUND_DATA', 'root'):
        assert part in line


def test_training_without_its_data_leaves_nothing(cli, tmp_path):
    assert "'mnist'" in one_line(cli('train', 'data.name=mnist')) and tree(tmp_path) == {}


@pytest.mark.parametrize('wrong, near', [
    ('mnits', 'mnist'), ('Fashion-Mini', 'fashion-mini'), ('sst-2', 'sst2'), ('', 'mnist')])
def test_an_unknown_dataset(cli, wrong, near):
    line = one_line(cli('data', 'get', wrong))
    assert repr(wrong) in line and near in line.rpartition('nearest')[2]


# Archives that reach out of their folder, and files that are not what they say

def member(name, kind=tarfile.REGTYPE, link=''):
    "One entry of an archive."
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


EVIL = dict(above=member('../../x'), deep=member('aclImdb/../../../x'), absolute=member('/tmp/dlfund-canary'),
            symlink=member('aclImdb/train/x.txt', tarfile.SYMTYPE, '/etc/passwd'),
            hardlink=member('aclImdb/train/x.txt', tarfile.LNKTYPE, '../../etc/passwd'),
            device=member('aclImdb/null', tarfile.CHRTYPE), block=member('aclImdb/disk', tarfile.BLKTYPE),
            pipe=member('aclImdb/pipe', tarfile.FIFOTYPE))


@pytest.mark.parametrize('kind', EVIL)
def test_an_archive_that_reaches_out(cli, small, tmp_path, monkeypatch, kind):
    folder = small('imdb')
    with tarfile.open(folder/ARCHIVE, 'w:gz') as tar: tar.addfile(EVIL[kind], io.BytesIO(b'evil'))
    monkeypatch.setitem(REGISTER, 'imdb', published('imdb', folder))
    before = tree(tmp_path)
    with pytest.raises(DataError, match=re.escape(f'{EVIL[kind].name!r} in {folder/ARCHIVE}')): load('imdb')
    assert tree(tmp_path) == before and not os.path.exists('/tmp/dlfund-canary')


def test_a_damaged_archive_is_one_kind_of_error(tmp_path):
    write_tar(tmp_path/'a.tar.gz', [(f'{i}.txt', bytes(range(256))*2) for i in range(20)])
    good = (tmp_path/'a.tar.gz').read_bytes()
    places = range(0, len(good), 3)
    damaged = [good[:n] for n in places] + [good[:n] + bytes([good[n] ^ 255]) + good[n + 1:] for n in places]
    for raw in damaged:
        (tmp_path/'a.tar.gz').write_bytes(raw)
        try: list(read_members(tmp_path/'a.tar.gz')) # tarfile does not see every damage; the hash does
        except DataError as e: assert 'a.tar.gz' in str(e)


def test_a_damaged_idx_file_is_one_kind_of_error(tmp_path):
    file = tmp_path/'a-ubyte.gz'
    write_idx(file, np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    good = file.read_bytes()
    plain = [b'', b'\0\0\x08', b'\0\0\x08\x01', b'\0\0\x0d\x01\0\0\0\x01\0\0\0\0',
             b'\0\0\x08\x01\0\0\0\x09\x01', b'\0\0\x08\x02' + b'\xff'*8]
    for raw in [good[:n] for n in range(len(good))] + [zlib.compress(good), *map(gzipped, plain)]:
        file.write_bytes(raw)
        with pytest.raises(DataError, match='a-ubyte.gz'): read_idx(file)


def gzipped(raw):
    "A gzip file, in memory."
    packer = zlib.compressobj(wbits=31)
    return packer.compress(raw) + packer.flush()


def test_an_embedded_file_that_was_altered(cli, tmp_path, monkeypatch):
    facts = datasets._embedded()
    facts['stocks']['sha256'] = '0'*64
    monkeypatch.setattr(datasets, '_embedded', lambda: facts)
    assert 'stocks.npz' in one_line(cli('data', 'get', 'stocks'))


# A full disk

LIMITED = '''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN) # a write beyond the limit now fails in the kernel, as on a full disk
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
'''
SAVE = LIMITED + '''
from dlfund.deployment.bundle import Bundle
bundle, path, size = Bundle.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for n in 0, 1000, size//2, size - 1:
    limit(n)
    try: bundle.save(path)
    except OSError as e: error = e
    else: sys.exit('saved in spite of the limit')
    limit(resource.RLIM_INFINITY)
    print(error)
'''


def unmeasured():
    "Variables that keep coverage, which writes files, out of a process that must not write."
    return {name: '' for name in os.environ if name.startswith('COVERAGE_PROCESS')}


@pytest.mark.parametrize('name', ['bundle', 'bundle.zip'])
def test_a_full_disk_leaves_the_old_bundle_whole(bundle, tmp_path, name):
    Bundle.load(bundle).save(tmp_path/name)
    before, size = tree(tmp_path), (bundle/'model.safetensors').stat().st_size
    ran = run(bundle, name, size, cwd=tmp_path, program=[sys.executable, '-c', SAVE], **unmeasured())
    assert ran.returncode == 0 and ran.stdout.count('File too large') == 4, ran.stderr
    assert tree(tmp_path) == before and os.listdir(tmp_path) == [name]
    assert Bundle.load(tmp_path/name).labels == Bundle.load(bundle).labels


def test_a_full_disk_leaves_the_old_checkpoint_whole(tiny, tmp_path):
    limited = [*tiny[:2], f'{LIMITED}limit(2_000_000) # the first checkpoint fits, the second does not\n{tiny[2]}']
    ran = run('train', 'data.name=mnist', 'train.epochs=2', cwd=tmp_path, program=limited, **unmeasured())
    run_folder = tmp_path/'runs'/'mnist-resnet-mini-1'
    assert 'checkpoints/step-' in one_line(ran) and 'File too large' in ran.stderr and 'dlfund train --resume' in ran.stderr
    assert len(os.listdir(run_folder/'checkpoints')) == 1 and not (run_folder/'bundle').exists()
    assert read_checkpoint(run_folder/'checkpoints')['epochs_done'] == 0
    assert run('train', '--resume', run_folder, cwd=tmp_path, program=tiny).returncode == 0


def test_a_disk_that_is_full_from_the_start_is_told_before_the_first_epoch(tiny, tmp_path):
    limited = [*tiny[:2], f'{LIMITED}limit(50_000) # no checkpoint fits\n{tiny[2]}']
    ran = run('train', 'data.name=mnist', 'train.epochs=2', cwd=tmp_path, program=limited, **unmeasured())
    assert 'checkpoints/step-' in one_line(ran) and 'File too large' in ran.stderr
    assert 'epoch' not in ran.stdout and not os.listdir(tmp_path/'runs'/'mnist-resnet-mini-1'/'checkpoints')


@pytest.mark.parametrize('name', ['notes', 'notes.zip'])
def test_a_bundle_does_not_replace_what_is_not_one(bundle, tmp_path, name):
    (tmp_path/name).mkdir()
    (tmp_path/name/'thesis.txt').write_text('years of work')
    with pytest.raises(BundleError, match=name): Bundle.load(bundle).save(tmp_path/name)
    assert tree(tmp_path) == {f'{name}/thesis.txt': b'years of work'}


@pytest.mark.parametrize('name', ['notes.zip', 'notes.txt'])
def test_a_bundle_does_not_replace_another_file(bundle, tmp_path, name):
    with zipfile.ZipFile(tmp_path/name, 'w') as z: z.writestr('thesis.txt', 'years of work')
    before = tree(tmp_path)
    with pytest.raises(BundleError, match=name): Bundle.load(bundle).save(tmp_path/name)
    assert tree(tmp_path) == before


def test_a_link_to_a_bundle_is_replaced_not_followed(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    (tmp_path/'link').symlink_to('b')
    before = tree(tmp_path/'b')
    Bundle.load(bundle).save(tmp_path/'link')
    assert tree(tmp_path/'b') == before == tree(tmp_path/'link') and sorted(os.listdir(tmp_path)) == ['b', 'link']


# Configurations

CONFIGS = {
    'train.epoch=1': "'train.epochs'", 'epochs=1': "'train.epochs'", 'trian.lr=1': "'train.lr'", 'no.such.key=1': 'no',
    'train.lr=fast': 'train.lr', 'train.lr=': 'train.lr', 'train.lr=[1]': 'train.lr', 'train.lr=[': 'train.lr',
    'train.lr=nan': 'train.lr', 'train.lr=.nan': 'train.lr', 'train.lr=.inf': 'train.lr', 'train.lr=0': 'train.lr',
    'train.lr=-1': 'train.lr', 'train.lr={a: &x [*x]}': '', 'train.epochs=0': 'train.epochs',
    'train.epochs=1.5': 'train.epochs', 'train.epochs=true': 'train.epochs', 'train.epochs="3"': 'train.epochs',
    'train.seed=-1': 'train.seed', 'train.seed=4294967296': 'train.seed', 'train.precision=fp8': "'fp32' or 'bf16'",
    'train.label_smoothing=1': 'train.label_smoothing', 'train.weight_decay=-1': 'train.weight_decay',
    'data.bs=1': 'data.bs', 'data.bs=9001': '9001', 'data.augment=yes please': 'data.augment',
    'data.name=mnits': 'mnist', 'data.name=reviews': 'text-classification', 'model.name=resnet-mimi': "'resnet-mini'",
    'data=5': 'data', 'out=3': 'out', '=1': '=1'}


@pytest.mark.parametrize('word', CONFIGS)
def test_a_wrong_setting(cli, tmp_path, word):
    assert CONFIGS[word] in one_line(cli('train', word), 2) and tree(tmp_path) == {}


FILES = {'train: [': 'line 1', 'train:\n\tlr: 1': 'line 2', 'train: {lr: 1': 'line 1',
         '- 1\n- 2': 'mapping', '5': 'mapping', 'train: {lrr: 1}': "'train.lr'", 'train: {lr: 2020-01-01}': 'train.lr',
         'Train: {}': 'Train', '1: 2': '1',
         'a: &a [*a]': '', '2020-01-01: 1': '', '!!python/object/apply:os.system [echo]': 'a.yaml', '\x00': 'a.yaml'}


@pytest.mark.parametrize('text', FILES)
def test_a_wrong_file(cli, tmp_path, text):
    (tmp_path/'a.yaml').write_text(text)
    assert FILES[text] in one_line(cli('train', 'a.yaml'), 2) and list(tree(tmp_path)) == ['a.yaml']


def test_files_that_are_no_configuration(cli, tmp_path):
    (tmp_path/'a.yaml').write_bytes(b'\xff\xfe\x00bad')
    (tmp_path/'folder').mkdir()
    for words in ['a.yaml'], ['folder'], ['none.yaml'], ['a.yaml', 'b.yaml']:
        assert words[-1] in one_line(cli('train', *words), 2)
    assert list(tree(tmp_path)) == ['a.yaml']


@pytest.mark.parametrize('place', ['a file', '/proc/x'])
def test_a_place_where_nothing_can_be_written(cli, tmp_path, place):
    (tmp_path/'a file').write_text('mine')
    assert place in one_line(cli('train', 'train.epochs=1', f'out={place}')) and tree(tmp_path) == {'a file': b'mine'}


def test_a_link_to_nowhere_ends(tmp_path):
    (tmp_path/'link').symlink_to('nowhere')
    assert 'link' in one_line(run('train', 'train.epochs=1', 'out=link', cwd=tmp_path, timeout=60))


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'just words'])
def test_a_checkpoint_that_cannot_be_used(cli, bundle, tmp_path, content):
    shutil.copytree(bundle.parent, tmp_path/'run')
    for file in checkpoint_files(tmp_path/'run'/'checkpoints'): file.write_bytes(content)
    assert 'got only damaged ones in' in one_line(cli('train', '--resume', tmp_path/'run'))


def test_a_loss_that_is_no_number(cli, tmp_path):
    line = one_line(cli('train', 'train.lr=1e9'))
    assert re.match(r'the training loss must stay finite, got nan in epoch 1, batch \d+ .*train\.lr', line)
    assert not list(tmp_path.rglob('bundle*'))


# Pictures from strangers

def grey_png(width, height, bits, file):
    "Write a black PNG without ever holding it in memory."
    number = lambda n: struct.pack('>I', n)
    chunk = lambda kind, content: number(len(content)) + kind + content + number(zlib.crc32(kind + content))
    packer, row = zlib.compressobj(9), bytes(1 + width*bits//8)
    pixels = b''.join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
    file.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b''))


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n%%EOF\n'


def bad_pictures(folder):
    "Files that must be refused, by name."
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    def saved(kind, **kw): picture.save(f := io.BytesIO(), kind, **kw); return f.getvalue()
    png, tiff = saved('PNG'), bytearray(saved('TIFF', compression='tiff_lzw'))
    tiff[40:4000:7] = bytes(len(tiff[40:4000:7]))
    found = dict(empty=b'', text=b'just words', html=b'<html></html>', svg=b'<svg xmlns="http://www.w3.org/2000/svg"/>',
                 eps=EPS, tiff=bytes(tiff), truncated=png[:999], header=png[:20], crc=png[:60] + b'????' + png[64:],
                 jpeg=saved('JPEG')[:900], gif=saved('GIF')[:300], webp=saved('WEBP')[:300], **{'new\nline': b'x'})
    for name, content in found.items(): (folder/name).write_bytes(content)
    grey_png(20_000, 20_000, 1, folder/'huge')
    (folder/'folder').mkdir()
    return [*found, 'huge', 'folder', 'absent']


def test_bad_pictures_are_named_one_by_one(bundle, pictures, tmp_path):
    bad = bad_pictures(tmp_path)
    ran = run('predict', bundle, *bad, pictures.files[0], cwd=tmp_path)
    lines = ran.stderr.splitlines()
    assert ran.returncode == 1 and ran.stdout.startswith(str(pictures.files[0])) and ran.stdout.count('\n') == 1
    assert len(lines) == len(bad) + 1 and all(line.startswith('dlfund: ') for line in lines), ran.stderr
    for name, line in zip(bad, lines): assert name.replace('\n', ' ') in line
    assert '400,000,000' in lines[bad.index('huge')] and 'must be a picture' in lines[bad.index('eps')]


def odd_pictures(picture, folder):
    "One picture in many forms, by name; the network must see the same in each."
    grey, wide = Image.fromarray(picture), Image.fromarray(picture.astype(np.uint16)*257)
    clear = Image.merge('LA', (grey, Image.fromarray(np.where(picture > 0, 255, 0).astype(np.uint8))))
    palette = Image.fromarray(picture).convert('P') # the palette of greys, whose entry 0 becomes see-through red
    palette.putpalette([255, 0, 0] + [v for i in range(1, 256) for v in (i, i, i)])
    exif = Image.Exif()
    exif[0x0112] = 6 # turn by 90 degrees clockwise to see it upright
    film = dict(save_all=True, append_images=[grey.transpose(Image.Transpose.ROTATE_180)])
    kinds = {'16bit.png': (wide, {}), 'rgb.png': (grey.convert('RGB'), {}), 'rgba.png': (grey.convert('RGBA'), {}),
             'clear.png': (clear, {}), 'palette.png': (palette, dict(transparency=0)), 'plain.bmp': (grey, {}),
             '16bit.tiff': (wide, {}), 'lzw.tiff': (grey, dict(compression='tiff_lzw')), 'film.gif': (grey, film),
             'film.png': (grey, film), 'film.webp': (grey.convert('RGB'), film | dict(lossless=True)),
             'turned.png': (grey.transpose(Image.Transpose.ROTATE_90), dict(exif=exif))}
    for name, (image, options) in kinds.items(): image.save(folder/name, **options)
    return list(kinds)


def test_one_picture_in_many_forms(cli, bundle, pictures, tmp_path):
    names = odd_pictures(pictures.x[0], tmp_path)
    ran = cli('predict', '--json', bundle, *names)
    expected = Bundle.load(bundle).predict(pictures.x[:1])[0].probabilities
    assert ran.returncode == 0 and ran.stderr == '' and len(ran.stdout.splitlines()) == len(names)
    for row in map(json.loads, ran.stdout.splitlines()):
        assert row['probabilities'] == pytest.approx(expected, abs=1e-5), row['file']


def test_pictures_of_any_size_and_mode_are_answered(cli, bundle, tmp_path):
    rng = np.random.default_rng(0)
    for size in (1, 1), (1, 500), (500, 1), (640, 480):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path/f'{size[0]}x{size[1]}.png')
    colour = Image.fromarray(rng.integers(0, 255, (40, 40, 4), dtype=np.uint8))
    for mode in 'CMYK', 'YCbCr', '1', 'L', 'RGB': # deflated, for Pillow 12 cannot read the YCbCr that it writes plain
        colour.convert('RGB').convert(mode).save(tmp_path/f'{mode}.tiff', compression='tiff_deflate')
    colour.convert('CMYK').save(tmp_path/'cmyk.jpg')
    Image.fromarray(rng.random((40, 40), dtype=np.float32)).save(tmp_path/'float.tiff')
    files = sorted(tmp_path.glob('*.*'))
    ran = cli('predict', bundle, *files)
    assert ran.returncode == 0 and ran.stderr == '' and len(ran.stdout.splitlines()) == len(files) == 11


def peak(cwd, *words):
    "Largest resident memory of a process that runs `dlfund`, bytes."
    process = subprocess.Popen([DLFUND, *map(str, words)], cwd=cwd, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss*1024


def test_a_bomb_is_refused_before_it_is_decoded(bundle, pictures, tmp_path):
    grey_png(20_000, 20_000, 1, tmp_path/'bomb1.png') # Pillow itself refuses it
    grey_png(12_000, 12_000, 8, tmp_path/'bomb2.png') # Pillow would only warn, and take 144 MB
    grey_png(12_000, 12_000, 1, tmp_path/'bomb3.png')
    normal = peak(tmp_path, 'predict', bundle, pictures.files[0])
    bombs = peak(tmp_path, 'predict', bundle, *tmp_path.glob('bomb*'))
    assert (normal[0], bombs[0]) == (0, 1) and bombs[1] - normal[1] < 64 << 20


# Bundles from strangers

class Canary:
    "A pickle that shows if it was opened."
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


def edit(folder, change, hashes=True):
    "Change `bundle.json`, and by default let the hashes agree again."
    facts = json.loads((folder/'bundle.json').read_text())
    change(facts)
    if hashes and isinstance(facts.get('hashes'), dict):
        facts['hashes'] |= {name: file_hash(folder/name) for name in facts['hashes'] if (folder/name).is_file()}
    (folder/'bundle.json').write_text(json.dumps(facts))


def other_weights(change):
    "A fault: well-formed weights, of the right hash, of another network."
    def fault(folder):
        tensors = load_file(folder/'model.safetensors')
        change(tensors)
        save_file(tensors, folder/'model.safetensors')
        edit(folder, lambda facts: None)
    return fault


def pickled(folder):
    "A fault: a pickle under the name of the weights, with the right hash."
    (folder/'model.safetensors').write_bytes(pickle.dumps(Canary(folder/'canary')))
    edit(folder, lambda facts: None)


def torch_pickled(folder):
    "A fault: the same, as `torch.save` writes it."
    torch.save(dict(weights=Canary(folder/'canary')), folder/'model.safetensors')
    edit(folder, lambda facts: None)


def flipped(folder):
    "A fault: one bit of one weight."
    raw = bytearray((folder/'model.safetensors').read_bytes())
    raw[-100] ^= 1
    (folder/'model.safetensors').write_bytes(raw)


def set_to(*path):
    "A fault: one value of `bundle.json`; the last of `path` is the value."
    def fault(folder):
        def change(facts):
            for key in path[:-2]: facts = facts[key]
            facts[path[-2]] = path[-1]
        edit(folder, change)
    return fault


SABOTAGE = {
    'no facts': (lambda b: (b/'bundle.json').unlink(), 'bundle.json'),
    'no weights': (lambda b: (b/'model.safetensors').unlink(), 'model.safetensors'),
    'no card': (lambda b: (b/'README.md').unlink(), 'README.md'),
    'not JSON': (lambda b: (b/'bundle.json').write_text('{"format": 1'), 'JSON'),
    'not UTF-8': (lambda b: (b/'bundle.json').write_bytes(b'{"\xff": 1}'), 'JSON'),
    'no facts in JSON': (lambda b: (b/'bundle.json').write_text('[]'), 'format'),
    'deep JSON': (lambda b: (b/'bundle.json').write_text('['*100_000), 'JSON'),
    'altered weights': (flipped, 'hash mismatch'),
    'altered card': (lambda b: (b/'README.md').write_text('Best model.'), 'hash mismatch'),
    'truncated weights': (lambda b: os.truncate(b/'model.safetensors', 1000), 'hash mismatch'),
    'future': (set_to('format', files.FORMAT + 1), 'update dlfund'),
    'pickle': (pickled, 'safetensors'), 'torch pickle': (torch_pickled, 'safetensors'),
    'other layers': (other_weights(lambda t: t.pop('fc.weight')), 'weights'),
    'more layers': (other_weights(lambda t: t.update(x=t['fc.bias'].clone())), 'weights'),
    'other shape': (other_weights(lambda t: t.update({'fc.bias': torch.zeros(11)})), 'weights'),
    'other name': (set_to('architecture', 'name', 'os.system'), 'os.system'),
    'other arguments': (set_to('architecture', 'path', '/etc/passwd'), 'path'),
    'too few labels': (set_to('labels', ['a', 'b']), '2 labels'),
    'a label twice': (set_to('labels', 1, 'Coat'), 'labels'),
    'no size': (set_to('preprocessing', 'size', [0, 28]), 'size'),
    'vast size': (set_to('preprocessing', 'size', [10**9, 10**9]), 'size'),
    'other channels': (set_to('preprocessing', dict(size=[28, 28], n_channels=3, mean=[0]*3, std=[1]*3)), 'channels'),
    'hash of another file': (set_to('hashes', '../../etc/passwd', '0'), '../../etc/passwd'),
    'no hashes': (set_to('hashes', {}), 'hash')}


@pytest.mark.parametrize('fault', SABOTAGE)
def test_a_bundle_with_a_fault(cli, bundle, pictures, tmp_path, fault):
    shutil.copytree(bundle, tmp_path/'b')
    SABOTAGE[fault][0](tmp_path/'b')
    line = one_line(cli('predict', tmp_path/'b', pictures.files[0]))
    assert SABOTAGE[fault][1] in line and not (tmp_path/'b'/'canary').exists()
    with pytest.raises(BundleError): Bundle.load(tmp_path/'b')


def test_a_pickle_is_not_opened_by_the_real_command(bundle, pictures, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    pickled(tmp_path/'b')
    assert 'do not use it' in one_line(run('predict', 'b', pictures.files[0], cwd=tmp_path))
    assert not (tmp_path/'b'/'canary').exists()
    pickle.loads((tmp_path/'b'/'model.safetensors').read_bytes()).close()
    assert (tmp_path/'b'/'canary').exists(), 'the canary must sing when it is opened'


def repacked(source, change, **options):
    "A bundle as an archive, with each `(name, content)` passed through `change`."
    with zipfile.ZipFile(packed := io.BytesIO(), 'w', **options) as z:
        for file in source.iterdir(): z.writestr(*change(file.name, file.read_bytes()))
    return packed.getvalue()


def encrypted(raw):
    "The archive with the flag of encryption set on every member."
    raw = bytearray(raw)
    for signature, offset in (b'PK\x03\x04', 6), (b'PK\x01\x02', 8):
        for found in re.finditer(re.escape(signature), bytes(raw)): raw[found.start() + offset] |= 1
    return bytes(raw)


ZIPS = {'text': lambda b: b'just words', 'empty': lambda b: b'', 'no members': lambda b: b'PK\x05\x06' + bytes(18),
        'truncated': lambda b: repacked(b, lambda *m: m)[:-500],
        'altered': lambda b: repacked(b, lambda name, content: (name, content[:-9] + b'\0'*9)),
        'encrypted': lambda b: encrypted(repacked(b, lambda *m: m)),
        'elsewhere': lambda b: repacked(b, lambda name, content: (f'../../{name}', content))}


@pytest.mark.parametrize('fault', ZIPS)
def test_an_archive_that_is_no_bundle(cli, bundle, pictures, tmp_path, fault):
    (tmp_path/'b.zip').write_bytes(ZIPS[fault](bundle))
    assert 'b.zip' in one_line(cli('predict', tmp_path/'b.zip', pictures.files[0]))
    assert list(tree(tmp_path)) == ['b.zip']
    with pytest.raises(BundleError): Bundle.load(tmp_path/'b.zip')


@pytest.mark.parametrize('method', ['ZIP_DEFLATED', 'ZIP_BZIP2', 'ZIP_LZMA'])
def test_a_damaged_compressed_archive_is_one_kind_of_error(bundle, tmp_path, method):
    shutil.copytree(bundle, tmp_path/'b', ignore=shutil.ignore_patterns('*.safetensors'))
    good = repacked(tmp_path/'b', lambda *m: m, compression=getattr(zipfile, method))
    for n in [*range(30, len(good) - 250, 23), *range(len(good) - 250, len(good))]:
        (tmp_path/'b.zip').write_bytes(good[:n] + bytes([good[n] ^ 255]) + good[n + 1:])
        with pytest.raises(BundleError): Bundle.load(tmp_path/'b.zip')


def test_an_archive_that_would_fill_the_memory(bundle, tmp_path, monkeypatch):
    (tmp_path/'b.zip').write_bytes(repacked(bundle, lambda *m: m))
    monkeypatch.setattr(files, 'MAX_BYTES', 100_000)
    with pytest.raises(BundleError, match='100,000 bytes'): Bundle.load(tmp_path/'b.zip')


def leaves(value, path=()):
    "The path of every value in a tree, whole branches too."
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs: yield from leaves(inner, (*path, key))


@pytest.mark.parametrize('value', [None, [], {}, -1, 0.5, True, 'x', float('nan')], ids=repr)
def test_any_value_replaced_is_refused_or_harmless(bundle, pictures, tmp_path, value):
    shutil.copytree(bundle, tmp_path/'b')
    facts = json.loads((bundle/'bundle.json').read_text())
    for path in list(leaves(facts))[1:]:
        changed = inner = copy.deepcopy(facts)
        for key in path[:-1]: inner = inner[key]
        inner[path[-1]] = value
        (tmp_path/'b'/'bundle.json').write_text(json.dumps(changed))
        try: found = Bundle.load(tmp_path/'b')
        except BundleError: continue
        for answer in found.predict(pictures.files[:1]) + found.predict(pictures.x[:1]):
            assert isinstance(answer.label, str) and 0 <= answer.probability <= 1, path
        assert found.data['name'] + found.data['sha256'], path
