"What leaves the workshop: files that are whole, of the format that was meant, and from whom they say."
import builtins, hashlib, json, os, shutil, signal, subprocess, sys, time, zipfile

import pytest
import torch

from conftest import environment, one_line, run
from dlfund.data.preprocessing import ImagePreprocess
from dlfund.deployment import files
from dlfund.deployment.bundle import Bundle, BundleError, build_model
from dlfund.deployment.files import (
    EXTRAS, FACTS, FORMAT, SIGNATURE, WEIGHTS, attach, inspect_bundle, make_keys, migrate_bundle, read_facts,
    read_file, sign_bundle, verify_bundle)
from dlfund.vision import build
from test_faults import LIMITED, tree, unmeasured

PLACES = 'b', 'b.zip'
FACTS_OF_DATA = dict(name='fashion-mini', sha256='', licence='MIT', source='nowhere', n_test_reads=0)
OTHERS = [('object-detection', name) for name in ('ssd_mini', 'yolo_mini', 'faster_rcnn_mini')]
OTHERS += [('semantic-segmentation', name) for name in ('unet_mini', 'fcn_mini')]


def small_bundle(task='image-classification', name='lenet', size=(28, 28)):
    "An untrained bundle."
    torch.manual_seed(0)
    architecture = dict(name=name, n_classes=10, n_channels=1)
    model = build(**architecture) if task == 'image-classification' else build_model(task, architecture)
    return Bundle(model=model, architecture=architecture, labels=[f'class {i}' for i in range(10)], task=task,
                  preprocess=ImagePreprocess(size=size), metrics={}, data=FACTS_OF_DATA, training={})


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    "A bundle, as a folder and as an archive."
    return small_bundle().save(tmp_path/request.param)


@pytest.fixture(scope='session')
def keys(tmp_path_factory): return make_keys(tmp_path_factory.mktemp('keys'))


def rewrite(place, change):
    "Change the files `{name: bytes}` of a bundle, as somebody with an editor would, and nothing else."
    if place.is_dir(): contents = {f.name: f.read_bytes() for f in place.iterdir()}
    else:
        with zipfile.ZipFile(place) as z: contents = {name: z.read(name) for name in z.namelist()}
    change(contents)
    if place.is_dir():
        shutil.rmtree(place)
        place.mkdir()
        for name, content in contents.items(): (place/name).write_bytes(content)
    else:
        with zipfile.ZipFile(place, 'w') as z:
            for name, content in contents.items(): z.writestr(name, content)


def other_facts(**changes):
    "A change of `bundle.json`; `hashes` are added to those that are there."
    def change(contents):
        facts = json.loads(contents[FACTS])
        facts['hashes'] |= changes.get('hashes', {})
        contents[FACTS] = json.dumps(facts | {k: v for k, v in changes.items() if k != 'hashes'}).encode()
    return change


# Formats

def test_a_bundle_of_format_1_opens_and_migrates(place, cli):
    before = Bundle.load(place)
    rewrite(place, other_facts(format=1))
    assert read_facts(place)['format'] == 1
    assert torch.equal(Bundle.load(place).logits(x := torch.zeros(1, 28, 28, dtype=torch.uint8)), before.logits(x))
    ran = cli('bundle', 'migrate', place, '--json')
    assert json.loads(ran.stdout) == dict(bundle=str(place), changed=True)
    assert read_facts(place)['format'] == FORMAT and migrate_bundle(place) is False
    assert torch.equal(Bundle.load(place).logits(x), before.logits(x))


@pytest.mark.parametrize('number', [FORMAT + 1, 0, -1, '2', None, True, 1.0])
def test_a_format_that_is_none(place, number):
    rewrite(place, other_facts(format=number))
    for read in read_facts, verify_bundle, inspect_bundle, migrate_bundle, Bundle.load:
        with pytest.raises(BundleError, match='format'): read(place)


@pytest.mark.parametrize('task, name', OTHERS)
@pytest.mark.parametrize('suffix', ['', '.zip'])
def test_every_task_comes_back(cli, pictures, tmp_path, task, name, suffix):
    saved = small_bundle(task, name, (64, 64)).save(tmp_path/f'b{suffix}')
    opened, ours = Bundle.load(saved), small_bundle(task, name, (64, 64))
    for key, weight in ours.model.state_dict().items(): assert torch.equal(opened.model.state_dict()[key], weight)
    ran = cli('predict', '--json', saved, *pictures.files[:2])
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0 and ran.stderr == '' and len(rows) == 2
    for row in rows:
        if task == 'object-detection': assert len(row['boxes']) == len(row['scores']) == len(row['labels'])
        else: assert len(row['labels']) == len(row['labels'][0]) == 64 and sum(row['shares'].values()) == pytest.approx(1)
    assert len(cli('predict', saved, *pictures.files[:2]).stdout.splitlines()) == 2
    assert task in one_line(cli('evaluate', saved)) or 'classes' in one_line(cli('evaluate', saved))


def test_a_task_gets_only_its_own_networks(place):
    rewrite(place, other_facts(task='object-detection'))
    with pytest.raises(BundleError, match='lenet'): Bundle.load(place)


# Files that are not what was saved

def flip(name):
    "A change: one bit of one file."
    def change(contents): contents[name] = contents[name][:-9] + bytes([contents[name][-9] ^ 1]) + contents[name][-8:]
    return change


DAMAGES = {'altered weights': (flip(WEIGHTS), 'hash mismatch'), 'altered card': (flip('README.md'), 'hash mismatch'),
           'altered graph': (flip('model.onnx'), 'hash mismatch'),
           'lost graph': (lambda c: c.pop('model.onnx'), 'must have model.onnx'),
           'a program that is listed': (other_facts(hashes={'run.py': '0'*64}), "'run.py'"),
           'a path that is listed': (other_facts(hashes={'../../x': '0'*64}), '../../x'),
           'no facts': (lambda c: c.pop(FACTS), FACTS)}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_bundle_is_refused_by_all(place, cli, keys, damage):
    attach(place, {'model.onnx': b'graph '*99})
    rewrite(place, DAMAGES[damage][0])
    for read in read_facts, verify_bundle, inspect_bundle, migrate_bundle, Bundle.load:
        with pytest.raises(BundleError, match=DAMAGES[damage][1]): read(place)
    with pytest.raises(BundleError): attach(place, {'data_sheet.md': b'x'})
    with pytest.raises(BundleError): sign_bundle(place, keys[0])
    for action in 'verify', 'inspect', 'migrate': assert DAMAGES[damage][1] in one_line(cli('bundle', action, place))


def test_one_file_is_read_and_checked_alone(place):
    attach(place, {'model.onnx': b'graph', 'data_sheet.md': b'sheet'})
    assert read_file(place, 'model.onnx') == b'graph'
    rewrite(place, flip(WEIGHTS))
    assert read_file(place, 'model.onnx') == b'graph', 'the weights were not asked for'
    with pytest.raises(BundleError, match='must have model.pt2, got only'): read_file(place, 'model.pt2')
    with pytest.raises(BundleError, match='hash mismatch'): read_file(place, WEIGHTS)


def test_extra_files_are_not_looked_at(place, keys):
    "What is on no list is neither read nor kept."
    rewrite(place, lambda contents: contents.update({'run.py': b'import os', 'model.pt2': b'stray'}))
    assert verify_bundle(place)['files'] == ['README.md', WEIGHTS] and Bundle.load(place).task
    with pytest.raises(BundleError, match='must have model.pt2'): read_file(place, 'model.pt2')
    sign_bundle(place, keys[0])
    names = os.listdir(place) if place.is_dir() else zipfile.ZipFile(place).namelist()
    assert sorted(names) == sorted(['README.md', FACTS, WEIGHTS, SIGNATURE])


@pytest.mark.parametrize('name', ['run.py', '../x', FACTS, SIGNATURE, WEIGHTS, ''])
def test_only_known_files_are_attached(place, tmp_path, name):
    before = tree(tmp_path)
    with pytest.raises(BundleError): attach(place, {name: b'x'})
    assert tree(tmp_path) == before


def test_attached_files_come_back_and_can_be_changed(place):
    attach(place, {name: name.encode() for name in EXTRAS})
    attach(place, {'model.onnx': b'better'})
    assert {n: read_file(place, n) for n in EXTRAS} == {n: n.encode() for n in EXTRAS} | {'model.onnx': b'better'}
    assert read_facts(place)['hashes']['model.onnx'] == hashlib.sha256(b'better').hexdigest()
    assert inspect_bundle(place)['files']['model.onnx'] == 6 and Bundle.load(place).labels


# Signatures

def test_signed_and_verified(place, cli, keys):
    assert one_line(cli('bundle', 'verify', place, '--key', keys[1])).endswith(f'no signature in {place}')
    assert cli('bundle', 'sign', place, '--key', keys[0]).stdout == f'bundle: {place}\n'
    found = json.loads(cli('bundle', 'verify', place, '--key', keys[1], '--json').stdout)
    assert found['signed_by'] == keys[1].read_text().strip() == inspect_bundle(place)['claims_to_be_signed_by']
    assert found['files'] == ['README.md', WEIGHTS] and Bundle.load(place).labels
    assert verify_bundle(place)['signed_by'] is None, 'nobody was asked for'


def resealed(contents):
    "A change: a careful forger alters the card and puts its hash right."
    contents['README.md'] = b'# 99.9 % accurate'
    other_facts(hashes={'README.md': hashlib.sha256(contents['README.md']).hexdigest()})(contents)


FORGERIES = {
    'resealed': resealed, 'altered facts': other_facts(labels=['x']*10),
    'no signature': lambda c: c.pop(SIGNATURE), 'empty signature': lambda c: c.update({SIGNATURE: b''}),
    'no JSON': lambda c: c.update({SIGNATURE: b'\xff'}), 'a list': lambda c: c.update({SIGNATURE: b'[]'}),
    'deep': lambda c: c.update({SIGNATURE: b'['*100_000}),
    'a number': lambda c: c.update({SIGNATURE: b'{"signature": 5}'}),
    'short': lambda c: c.update({SIGNATURE: b'{"signature": "ab"}'}),
    'zeros': lambda c: c.update({SIGNATURE: json.dumps(dict(signature='00'*64)).encode()}), 'altered weights': flip(WEIGHTS)}


@pytest.mark.parametrize('forgery', FORGERIES)
def test_a_forged_bundle_is_refused(place, cli, keys, forgery):
    sign_bundle(place, keys[0])
    rewrite(place, FORGERIES[forgery])
    with pytest.raises(BundleError): verify_bundle(place, keys[1])
    one_line(cli('bundle', 'verify', place, '--key', keys[1]))


def test_another_key_is_another_author(place, keys, tmp_path):
    forger = make_keys(tmp_path/'forger')
    sign_bundle(place, forger[0])
    with pytest.raises(BundleError, match='another signature'): verify_bundle(place, keys[1])
    assert verify_bundle(place, forger[1])['signed_by'] == forger[1].read_text().strip()


def test_the_signature_of_another_bundle_does_not_fit(place, keys, tmp_path):
    other = small_bundle()
    other.metrics = dict(test=dict(accuracy=1.0))
    other = sign_bundle(other.save(tmp_path/'other'), keys[0])
    rewrite(place, lambda contents: contents.update({SIGNATURE: (other/SIGNATURE).read_bytes()}))
    with pytest.raises(BundleError, match='another content'): verify_bundle(place, keys[1])


@pytest.mark.parametrize('change', [lambda place: attach(place, {'model.onnx': b'x'}),
                                    lambda place: Bundle.load(place).save(place)], ids=['attach', 'save'])
def test_what_changes_a_bundle_takes_its_signature(place, keys, change):
    sign_bundle(place, keys[0])
    change(place)
    with pytest.raises(BundleError, match='no signature'): verify_bundle(place, keys[1])


def test_keys(cli, tmp_path):
    secret, public = make_keys(tmp_path/'k')
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_text().strip()) == 64
    assert 'must not replace another' in one_line(cli('bundle', 'keys', tmp_path/'k'))
    assert cli('bundle', 'keys', tmp_path/'more').stdout.splitlines()[0] == f'secret: {tmp_path}/more/bundle.key'


@pytest.mark.parametrize('content', [b'', b'ab', b'\xff', b'zz'*32, b'ab'*33])
def test_a_key_that_is_none(place, cli, tmp_path, content):
    (tmp_path/'key').write_bytes(content)
    assert '64 hexadecimal digits' in one_line(cli('bundle', 'sign', place, '--key', tmp_path/'key'))
    assert '64 hexadecimal digits' in one_line(cli('bundle', 'verify', place, '--key', tmp_path/'key'))


@pytest.mark.parametrize('words, status', [
    ('bundle', 2), ('bundle eat b', 2), ('bundle verify', 2), ('bundle sign b', 2), ('bundle inspect b --key k', 2),
    ('bundle verify nowhere', 1), ('bundle verify b --key nowhere', 1), ('bundle inspect empty', 1)])
def test_wrong_use(cli, tmp_path, words, status):
    small_bundle().save(tmp_path/'b')
    (tmp_path/'empty').mkdir()
    one_line(cli(*words.split()), status)


def test_without_the_extra(place, cli, keys, monkeypatch):
    real = builtins.__import__
    def absent(name, *args, **kw):
        if name.startswith('cryptography'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', absent)
    assert "pip install 'dlfund[deploy]'" in one_line(cli('bundle', 'sign', place, '--key', keys[0]))
    assert cli('bundle', 'verify', place).returncode == 0, 'hashes need nothing'


# Nothing is half done

ATTACH = LIMITED + '''
from dlfund.deployment.files import attach
path, size = sys.argv[1], int(sys.argv[2])
for n in 0, 1000, size//2, size - 1:
    limit(n)
    try: attach(path, {'model.onnx': bytes(size)})
    except OSError as e: error = e
    else: sys.exit('attached in spite of the limit')
    limit(resource.RLIM_INFINITY)
    print(error)
assert 'torch' not in sys.modules
'''


def test_a_full_disk_leaves_the_old_bundle_whole(place, tmp_path):
    attach(place, {'model.onnx': b'older'})
    before = tree(tmp_path)
    ran = run(place, 2 << 20, cwd=tmp_path, program=[sys.executable, '-c', ATTACH], **unmeasured())
    assert ran.returncode == 0 and ran.stdout.count('File too large') == 4, ran.stderr
    assert tree(tmp_path) == before and os.listdir(tmp_path) == [place.name]


FOREVER = '''
import sys
from dlfund.deployment.files import attach
print('begun', flush=True)
for i in range(10**9): attach(sys.argv[1], {'model.onnx': bytes([i % 256])*3_000_000})
'''


def test_killed_while_attaching_the_bundle_is_the_old_or_the_new_one(place, tmp_path):
    "Of a folder there is one moment, between two renames, when the old one lies beside its place."
    for wait in range(1, 9):
        process = subprocess.Popen([sys.executable, '-c', FOREVER, str(place)], env=environment(), stdout=subprocess.PIPE)
        assert process.stdout.readline() == b'begun\n'
        time.sleep(wait*0.037)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not place.exists(): (tmp_path/f'.{place.name}.{process.pid}.old').rename(place)
        assert verify_bundle(place)['files'][0] == 'README.md' and Bundle.load(place).labels
        if 'model.onnx' in read_facts(place)['hashes']: assert len(set(read_file(place, 'model.onnx'))) == 1


def test_the_light_part_is_light(place, tmp_path):
    code = ('import sys; from dlfund.deployment.files import read_facts, verify_bundle; read_facts(sys.argv[1]); '
            'print(sorted({"torch", "fastai", "PIL", "safetensors"} & set(sys.modules)))')
    ran = run(place, cwd=tmp_path, program=[sys.executable, '-c', code])
    assert ran.stdout == '[]\n', ran.stderr


def test_an_archive_that_would_fill_the_memory(place, monkeypatch):
    monkeypatch.setattr(files, 'MAX_BYTES', 1000)
    if place.is_dir(): return # the limit is for what unpacks to more than it takes
    for read in read_facts, verify_bundle, inspect_bundle: pytest.raises(BundleError, read, place)


# The way on

def test_exported_by_the_command(cli, pictures, tmp_path):
    from dlfund.deployment.runtime import load_runner
    saved = small_bundle().save(tmp_path/'b.zip')
    for name, kind in (('model.onnx', 'onnx'), ('model.pt2', 'pt2')):
        found = json.loads(cli('export', saved, '--format', kind, '--json').stdout.splitlines()[-1])
        assert found == dict(bundle=str(saved), file=name, bytes=len(read_file(saved, name)))
    want = Bundle.load(saved).logits(torch.from_numpy(pictures.x)).numpy()
    assert load_runner(saved)(pictures.x) == pytest.approx(want, abs=1e-5)
    assert one_line(cli('export', saved, '--format', 'gif'), 2)


def test_what_cannot_be_exported_is_one_line(cli, tmp_path):
    saved = small_bundle('object-detection', 'ssd_mini', (64, 64)).save(tmp_path/'b')
    before = tree(tmp_path)
    assert 'ssd_mini' in one_line(cli('export', saved)) and tree(tmp_path) == before


@pytest.mark.parametrize('words, status', [
    ('serve', 2), ('serve b --port x', 2), ('serve b --port 65536', 2), ('serve b --workers 0', 2),
    ('serve b --config none.yaml', 2), ('serve b --config bad.yaml', 2), ('serve b --config wrong.yaml', 2),
    ('ui', 2), ('ui nowhere', 1), ('page b', 2), ('page nowhere here', 1), ('export nowhere', 1)])
def test_doors_that_do_not_open(cli, tmp_path, words, status):
    (tmp_path/'bad.yaml').write_text('port: [')
    (tmp_path/'wrong.yaml').write_text('prot: 80')
    line = one_line(cli(*words.split()), status)
    assert words.rpartition(' ')[2] in line or 'help' in line
