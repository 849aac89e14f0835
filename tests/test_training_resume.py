"A real `dlfund train` that is killed at random moments and resumed ends with the same bits as one that was not."
import json, random, re, shutil, signal, sqlite3, time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from conftest import one_line, run, start
from dlfund.training.checkpoints import checkpoint_files, read_checkpoint, state_from_bytes

N_KILLS = 20
TRAIN = ('train', 'data.name=mnist', 'data.bs=32', 'train.epochs=8', 'checkpoint.steps=3', 'track.steps=1',
         'callbacks={ema: {decay: 0.9}, clip: {norm: 1.0}, keep-best: {}, reduce-lr: {patience: 1}, '
         'early-stopping: {patience: 9}}')


def bits(
    folder, # of a run that is done
)->dict: # all that must not depend on when it was killed
    "Weights, history and tracked numbers of a run, without times and what the machine was doing."
    history = [{k: v for k, v in row.items() if k != 'seconds'} for row in json.loads((folder/'history.json').read_text())]
    state, bundle = read_checkpoint(folder/'checkpoints'), json.loads((folder/'bundle'/'bundle.json').read_text())
    db = sqlite3.connect(folder/'metrics.sqlite')
    rows = db.execute('select name, step, value from scalars order by name, step').fetchall()
    db.close()
    return dict(history=history, metrics=bundle['metrics'], hashes=bundle['hashes']['model.safetensors'],
                step=state['step'], opt={k: v.tolist() for k, v in state['opt']['state'][0].items()},
                tracked=[row for row in rows if not re.match('system|seconds|time', row[0])])


def folder_of(process, cwd):
    "Wait for the line that names the folder of the run."
    for line in process.stdout:
        if 'run in ' in line: return cwd/line.strip().rpartition('run in ')[2]
    raise AssertionError(process.communicate())


def wait_for(condition, process):
    "Wait until something is so, while a process runs."
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope='module')
def undisturbed(tiny, tmp_path_factory):
    "The run that nobody killed: its bits, and the seconds from its first line to its end."
    cwd = tmp_path_factory.mktemp('undisturbed')
    process = start(*TRAIN, cwd=cwd, program=tiny)
    folder, begin = folder_of(process, cwd), time.monotonic()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return SimpleNamespace(bits=bits(folder), seconds=time.monotonic() - begin)


def killed_often(
    cwd, # where the run is
    tiny, # the program
    moments, # seconds after the first line at which to kill, one after the other
)->tuple: # folder of the run, once it is done, and the moments that found it alive
    "Start a run, kill it, resume it, kill it, …, and let the last process end."
    words, alive, folder = TRAIN, [], None
    for moment in [*moments, None]:
        process = start(*words, cwd=cwd, program=tiny)
        folder = folder_of(process, cwd)
        if moment is not None:
            time.sleep(moment)
            process.kill()
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL) and 'Traceback' not in err, err
        if process.returncode == 0: break
        alive.append(moment)
        words = ('train', '--resume', folder)
    assert process.returncode == 0, err
    return folder, alive


def test_killed_at_random_moments(undisturbed, tiny, tmp_path):
    rng, n_killed, chain = random.Random(), 0, 0
    def one(number):
        cwd = tmp_path/str(number)
        cwd.mkdir()
        return killed_often(cwd, tiny, [rng.uniform(0, undisturbed.seconds/2) for _ in range(5)])
    while n_killed < N_KILLS:
        with ThreadPoolExecutor(2) as pool: ends = list(pool.map(one, (chain, chain + 1)))
        chain += 2
        for folder, alive in ends:
            n_killed += len(alive)
            assert bits(folder) == undisturbed.bits, f'differs after kills at {alive} s'
            assert not list((folder/'checkpoints').glob('.*part')), 'a half-written checkpoint was left'


def test_killed_while_a_checkpoint_is_written(undisturbed, tiny, tmp_path):
    slow = [*tiny[:2], 'import os, time\nfsync = os.fsync\n'
            'def slow(f):\n fsync(f)\n time.sleep(0.4)\nos.fsync = slow\n' + tiny[2]]
    process = start(*TRAIN, cwd=tmp_path, program=slow)
    folder = folder_of(process, tmp_path)
    wait_for(lambda: list((folder/'checkpoints').glob('.step-*[1-9]*-epoch-*part')), process) # not the first
    process.kill()
    process.communicate()
    assert list((folder/'checkpoints').glob('.*part'))
    assert run('train', '--resume', folder, cwd=tmp_path, program=tiny).returncode == 0
    assert bits(folder) == undisturbed.bits


def test_an_altered_checkpoint_is_passed_over(undisturbed, tiny, tmp_path):
    process = start(*TRAIN, cwd=tmp_path, program=tiny)
    folder = folder_of(process, tmp_path)
    wait_for(lambda: len(checkpoint_files(folder/'checkpoints')) == 2, process)
    process.kill()
    process.communicate()
    newest = checkpoint_files(folder/'checkpoints')[0]
    data = bytearray(newest.read_bytes())
    data[len(data)//2] ^= 4
    newest.write_bytes(data)
    assert state_from_bytes(bytes(data)), 'only the hash can tell'
    again = run('train', '--resume', folder, cwd=tmp_path, program=tiny)
    assert again.returncode == 0 and f'{newest.name} damaged' in again.stderr, again.stderr
    assert bits(folder) == undisturbed.bits


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_before_it_stops(undisturbed, tiny, tmp_path, number):
    process = start(*TRAIN[:-3], 'checkpoint.steps=0', *TRAIN[-2:], cwd=tmp_path, program=tiny)
    folder = folder_of(process, tmp_path)
    assert process.stdout.readline().startswith('epoch 1/8')
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert re.search(r'stopped; [1-8] of 8 epochs( and \d+ batches)? are saved', err), err
    assert run('train', '--resume', folder, cwd=tmp_path, program=tiny).returncode == 0
    assert bits(folder)['hashes'] == undisturbed.bits['hashes']


def test_two_processes_in_one_folder(tiny, tmp_path):
    process = start(*TRAIN, 'train.epochs=60', cwd=tmp_path, program=tiny)
    folder = folder_of(process, tmp_path)
    wait_for(lambda: checkpoint_files(folder/'checkpoints'), process)
    second = run('train', '--resume', folder, cwd=tmp_path, program=tiny)
    process.kill()
    process.communicate()
    assert 'must be alone in its folder' in one_line(second)


def test_a_run_that_had_no_time_for_a_checkpoint(undisturbed, tiny, tmp_path):
    folder, _ = killed_often(tmp_path, tiny, [0])
    assert bits(folder) == undisturbed.bits
    shutil.rmtree(folder/'checkpoints')
    again = run('train', '--resume', folder, cwd=tmp_path, program=tiny)
    assert again.returncode == 0 and 'the run begins anew' in again.stderr
    assert bits(folder) == undisturbed.bits


@pytest.mark.parametrize('change, said', [(('lr: 0.006', 'lr: 0.007'), 'train.lr was 0.006, got 0.007'),
                                          (('width: 1.0', 'width: 0.5'), 'model.width was 1.0, got 0.5'),
                                          (('epochs: 1', 'epochs: 3'), 'number of epochs was 1, got 3')])
def test_a_run_goes_on_as_it_was_configured(tiny, tmp_path, change, said):
    assert run('train', 'data.name=mnist', 'train.epochs=1', cwd=tmp_path, program=tiny).returncode == 0
    file = tmp_path/'runs'/'mnist-resnet-mini-1'/'experiment.yaml'
    file.write_text(file.read_text().replace(*change))
    assert said in one_line(run('train', '--resume', file.parent, cwd=tmp_path, program=tiny))
