"The command line as a user meets it: real processes, in a folder of their own."
import fcntl, json, os, pty, re, shutil, signal, socket, struct, subprocess, sys, termios, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from conftest import DLFUND, environment, one_line, run, start
from dlfund.data.datasets import file_hash, load, names
from dlfund.deployment.bundle import Bundle
from dlfund.training.checkpoints import read_checkpoint
from dlfund.training.configuration import Experiment
from dlfund.training.runs import RunFolder

HEAVY = {'torch', 'numpy', 'fastai', 'fastcore', 'PIL', 'pydantic', 'yaml', 'requests', 'matplotlib', 'safetensors'}


def history(run_folder):
    "The rows of a run, without the seconds."
    rows = json.loads((run_folder/'history.json').read_text())
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def weights(bundle): return file_hash(bundle/'model.safetensors')


# A start costs what it must

@pytest.mark.parametrize('words', [
    ('-c', 'import dlfund'), (DLFUND, '--help'), (DLFUND, 'train', '--help'), (DLFUND, '--version')])
def test_what_a_start_imports(tmp_path, words):
    ran = run(*words, cwd=tmp_path, program=[sys.executable, '-X', 'importtime'])
    imported = {line.rpartition('|')[2].strip().split('.')[0] for line in ran.stderr.splitlines() if '|' in line}
    assert ran.returncode == 0 and 'dlfund' in imported and not imported & HEAVY


# The main job

def test_train_says_one_line_an_epoch_and_the_path_last(trained):
    ran = trained.ran
    assert ran.returncode == 0 and ran.stderr == ''
    assert '\r' not in ran.stdout and '\x1b' not in ran.stdout
    epochs = [line for line in ran.stdout.splitlines() if 'epoch' in line]
    assert [re.match(r'epoch (\d)/2 .*accuracy 0\.\d{4}', line)[1] for line in epochs] == ['1', '2']
    assert ran.stdout.splitlines()[-1] == 'runs/fashion-mini-resnet-mini-1/bundle'


def test_train_leaves_a_run_and_nothing_else(trained, bundle):
    assert os.listdir(trained.cwd) == ['runs']
    assert sorted(os.listdir(bundle.parent)) == ['.lock', '.metrics.lock', 'bundle', 'checkpoints', 'experiment.yaml',
                                                'history.json', 'metrics.sqlite']
    assert sorted(os.listdir(bundle)) == ['README.md', 'bundle.json', 'model.safetensors']
    assert [row['epoch'] for row in history(bundle.parent)] == [1, 2]


def test_the_bundle_says_what_it_is(bundle):
    facts, splits = json.loads((bundle/'bundle.json').read_text()), load('fashion-mini')
    assert facts['task'] == 'image-classification' and facts['labels'] == splits.labels
    assert facts['metrics']['test']['n'] == 2000 and 0.5 < facts['metrics']['test']['accuracy'] < 1
    assert facts['hashes']['model.safetensors'] == weights(bundle)
    assert facts['data']['sha256'] == splits.sha256, 'two processes must get the same parts'
    assert facts['data']['n_test_reads'] == 1 and splits.n_test_reads == 0
    assert facts['training']['train']['epochs'] == 2 and facts['versions'].keys() >= {'dlfund', 'torch', 'python'}


def test_evaluate_agrees_with_the_bundle(bundle, tmp_path):
    known = json.loads((bundle/'bundle.json').read_text())['metrics']['test']
    ran = run('evaluate', bundle, '--json', cwd=tmp_path)
    assert ran.returncode == 0 and ran.stderr == ''
    assert json.loads(ran.stdout) == dict(bundle=str(bundle), data='fashion-mini', part='test', **known)


def test_evaluate_in_words(cli, bundle):
    known = json.loads((bundle/'bundle.json').read_text())['metrics']
    for words, m in ((), known['test']), (('--part', 'valid'), known['valid']):
        said = f"accuracy {m['accuracy']:.4f}, cross-entropy {m['cross_entropy']:.4f}, {m['n']} examples"
        assert said in cli('evaluate', bundle, *words).stdout


def test_evaluate_on_other_data(cli, small, bundle):
    small('fashion-mnist')
    ran = cli('evaluate', bundle, '--data', 'fashion-mnist', '--json')
    found = json.loads(ran.stdout)
    assert ran.returncode == 0 and (found['data'], found['n']) == ('fashion-mnist', 200)


def test_predict_answers_the_good_and_names_the_bad(bundle, pictures, tmp_path):
    (tmp_path/'bad.png').write_text('not a picture')
    files = [*pictures.files[:3], tmp_path/'bad.png', tmp_path/'none.png', *pictures.files[3:]]
    ran = run('predict', bundle, *files, cwd=tmp_path)
    rows = [line.split('\t') for line in ran.stdout.splitlines()]
    answers = Bundle.load(bundle).predict(pictures.x)
    expected = [[str(f), a.label] for f, a in zip(pictures.files, answers)]
    assert ran.returncode == 1 and [row[:2] for row in rows] == expected
    assert [float(row[2]) for row in rows] == pytest.approx([a.probability for a in answers], abs=1e-4)
    bad, none, closing = ran.stderr.splitlines()
    assert 'bad.png' in bad and 'none.png' in none and '2 of 10' in closing


def test_predict_in_json(cli, bundle, pictures):
    ran = cli('predict', '--json', bundle, *pictures.files)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0 and ran.stderr == ''
    assert [row['file'] for row in found] == [str(f) for f in pictures.files]
    for row, answer in zip(found, Bundle.load(bundle).predict(pictures.x)):
        assert row['label'] == answer.label and row['probability'] == row['probabilities'][answer.label]
        assert row['probabilities'] == pytest.approx(answer.probabilities, abs=1e-6), 'one at a time, as all at once'
        assert sum(row['probabilities'].values()) == pytest.approx(1)


def test_a_bundle_in_an_archive_answers_alike(cli, bundle, pictures, tmp_path):
    Bundle.load(bundle).save(tmp_path/'b.zip')
    assert cli('predict', tmp_path/'b.zip', *pictures.files).stdout == cli('predict', bundle, *pictures.files).stdout


def test_data_list(tmp_path):
    lines, rows = (run('data', 'list', *json_, cwd=tmp_path).stdout.splitlines() for json_ in ((), ('--json',)))
    rows = [json.loads(row) for row in rows]
    assert [line.split()[0] for line in lines] == [row['name'] for row in rows] == names()
    where = {row['name']: row['where'] for row in rows}
    assert where['fashion-mini'] == 'in the package' and where['mnist'] == 'not here yet'
    assert all(row['task'] and row['licence'] and row['source'] for row in rows)


@pytest.mark.parametrize('action', ['get', 'where'])
def test_data_get_and_where(cli, small, action):
    folder = small('etth1')
    assert cli('data', action, 'etth1').stdout.splitlines() == [str(folder/'ETTh1.csv')]
    assert json.loads(cli('data', action, 'reviews', '--json').stdout)['path'].endswith('embedded/reviews.npz')


# How it ends

WRONG_USE = [(), ('fly',), ('train', '--fast'), ('predict', 'b'), ('evaluate',), ('evaluate', 'b', '--part', 'all'),
             ('data', 'eat'), ('data', 'get'), ('data', 'where'), ('train', '--resume', 'nowhere'),
             ('train', '--resume', 'runs', 'train.lr=1'), ('train', '--nproc', '0'), ('train', '--strategy', 'fsdp'),
             ('search', 'x.yaml', '--trials', '0')]


@pytest.mark.parametrize('words', WRONG_USE, ids=' '.join)
def test_wrong_use(cli, words): one_line(cli(*words), 2)


@pytest.mark.parametrize('words', ['exercises check --hint training.search.enough 20',
                                   'exercises --hint check training.search.enough 20',
                                   'exercises check training.search.enough --hint 20'])
def test_an_option_may_stand_anywhere(cli, words):
    ran = cli(*words.split())
    assert ran.returncode == 1 and 'hint: ' in ran.stdout and not ran.stderr


@pytest.mark.parametrize('words, status, part', [
    ('train none.yaml', 2, 'none.yaml'), ('evaluate nowhere', 1, 'nowhere'), ('data get mnits', 1, 'mnist'),
    ('data where mnist', 1, 'dlfund data get mnist')])
def test_one_line_from_a_real_process(tmp_path, words, status, part):
    ran = run(*words.split(), cwd=tmp_path)
    assert part in one_line(ran, status) and ran.stdout == '' and os.listdir(tmp_path) == []


def test_debug_shows_where(tmp_path):
    ran = run('train', 'none.yaml', '--debug', cwd=tmp_path)
    assert ran.returncode != 0 and 'Traceback' in ran.stderr and 'none.yaml' in ran.stderr.splitlines()[-1]


def list_to(stdout, cwd):
    "`dlfund data list`, as a real process that writes to a file."
    return subprocess.run([DLFUND, 'data', 'list'], env=environment(), cwd=cwd, stdout=stdout, stderr=subprocess.PIPE,
                          text=True)


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    ran = list_to(write, tmp_path)
    os.close(write)
    assert ran.stderr == '' and ran.returncode == 1


def test_output_that_cannot_be_written(tmp_path):
    with open('/dev/full', 'w') as full: assert 'No space left' in one_line(list_to(full, tmp_path))


# A terminal

def on_a_terminal(command, cwd):
    "Run a command on a pseudo-terminal of 100 columns: status and all it showed."
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    process, shown = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=slave, stderr=slave), b''
    os.close(slave)
    while True:
        try: block = os.read(master, 1 << 16)
        except OSError: break # Linux: the other side has gone
        if not block: break
        shown += block
    os.close(master)
    return process.wait(), shown.decode()


def test_a_bar_on_a_terminal(tiny, tmp_path):
    status, shown = on_a_terminal([*tiny, 'train', 'data.name=mnist', 'train.epochs=2'], tmp_path)
    assert status == 0 and shown.replace('\r\n', '\n').count('\r') > 4
    assert len(re.findall(r'epoch [12]/2  train_loss', shown)) == 2
    assert shown.splitlines()[-1] == 'runs/mnist-resnet-mini-1/bundle'


# Stopped, and gone on with

def begun(cwd, *words):
    "A real training that is in its second epoch: the process and the folder of the run."
    process = start('train', 'train.epochs=2', *words, cwd=cwd)
    run_folder = cwd/process.stdout.readline().strip().rpartition('run in ')[2]
    assert process.stdout.readline().startswith('epoch 1/2 ')
    while (done := read_checkpoint(run_folder/'checkpoints')['epochs_done']) < 1: time.sleep(0.05)
    assert done == 1, 'an epoch must be reported when it ends, not when the run does'
    return process, run_folder


def same_result(run_folder, bundle):
    assert weights(run_folder/'bundle') == weights(bundle) and history(run_folder) == history(bundle.parent)


def test_interrupted_then_resumed(bundle, tmp_path):
    process, run_folder = begun(tmp_path, 'out=my runs')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    line = one_line(SimpleNamespace(returncode=process.returncode, stderr=err))
    assert '1 of 2 epochs' in line and not (run_folder/'bundle').exists()
    command = re.search(r'`(dlfund train --resume .+)`', line)[1]
    again = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr == '' and 'epoch 1/2' not in again.stdout
    same_result(run_folder, bundle)


def test_killed_then_resumed(bundle, tmp_path):
    process, run_folder = begun(tmp_path)
    process.kill()
    process.communicate()
    again = run('train', '--resume', run_folder, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == str(run_folder/'bundle')
    same_result(run_folder, bundle)


def test_resuming_what_is_done_changes_nothing(cli, bundle, tmp_path):
    shutil.copytree(bundle.parent, tmp_path/'run')
    ran = cli('train', '--resume', tmp_path/'run')
    assert ran.returncode == 0 and 'epoch' not in ran.stdout
    assert ran.stdout.splitlines()[-1] == str(tmp_path/'run'/'bundle')
    same_result(tmp_path/'run', bundle)


def test_two_at_once_with_one_seed(tiny, tmp_path):
    pair = [start('train', 'data.name=mnist', 'train.epochs=1', cwd=tmp_path, program=tiny) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    bundles = {tmp_path/out.splitlines()[-1] for out, _ in ends}
    assert len(bundles) == 2 and len({weights(b) for b in bundles}) == 1


def test_another_seed_gives_other_weights(cli, small):
    small('mnist')
    said = [cli('train', 'data.name=mnist', 'train.epochs=1', f'train.seed={seed}').stdout for seed in (0, 0, 1)]
    first, again, other = (file_hash(f'{out.splitlines()[-1]}/model.safetensors') for out in said)
    assert first == again != other


def test_many_runs_begin_together(tmp_path):
    experiment = Experiment(out=str(tmp_path/'runs'))
    with ThreadPoolExecutor(8) as pool: folders = [run.path for run in pool.map(RunFolder.create, [experiment]*32)]
    assert len(set(folders)) == 32


# Prediction needs little

FORBID = '''
import json, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in FORBIDDEN: raise ImportError(f'{name} is not installed')
FORBIDDEN = {'fastai', 'fastprogress', 'spacy', 'matplotlib', 'sklearn', 'scipy', 'pandas', 'torchvision', 'pydantic'}
sys.meta_path.insert(0, Forbid())
from dlfund.deployment.bundle import Bundle
for answer in Bundle.load(sys.argv[1]).predict(sys.argv[2:]): print(json.dumps(answer.probabilities))
assert not FORBIDDEN & {m.split('.')[0] for m in sys.modules}
'''


def test_a_bundle_works_without_the_libraries_of_training(bundle, pictures, tmp_path):
    ran = run(bundle, *pictures.files, cwd=tmp_path, program=[sys.executable, '-c', FORBID])
    assert ran.returncode == 0, ran.stderr
    expected = [answer.probabilities for answer in Bundle.load(bundle).predict(pictures.x)]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected


# Doors

def answers(url):
    "Whether something answers at an address within half a minute."
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer: return answer.status == 200
        except OSError: time.sleep(0.1)
    return False


def test_a_server_for_programs(bundle, pictures, tmp_path):
    shutil.copytree(bundle, tmp_path/'b')
    assert run('export', 'b', cwd=tmp_path).returncode == 0
    process = start('serve', 'clothes=b', '--port', 0, '--workers', 1, cwd=tmp_path)
    try:
        url = process.stdout.readline().split()[-1]
        request = urllib.request.Request(f'{url}/v1/predict', json.dumps(dict(pictures=[pictures.x[0].tolist()])).encode(),
                                         {'content-type': 'application/json'})
        with urllib.request.urlopen(request, timeout=30) as answer: said = answer.read().decode()
        assert Bundle.load(bundle).predict(pictures.x[:1])[0].label in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally: process.kill(); process.communicate()


def test_a_page_for_people(bundle, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    process = start('ui', bundle, '--port', port, cwd=tmp_path)
    try:
        line = process.stdout.readline()
        assert line.startswith(f'{bundle} on http://127.0.0.1:{port}') and answers(line.split()[-1])
    finally: process.kill(); process.communicate()


def test_a_page_without_a_server(cli, bundle, tmp_path):
    ran = cli('page', bundle, 'site')
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == 'site/index.html'
    assert 'DLFUND_OFFLINE' in ran.stderr and (tmp_path/'site'/'model.onnx').stat().st_size > 10_000
