"What a reader does with the installed book: unpack it, see what is solved, have answers checked. Real processes."
import json, re

import pytest

from conftest import one_line, run
from dlfund import exercises
from dlfund.book import find_chapters, worksheet

NAME = 'foundations.autograd.kept'


def test_a_right_answer_is_remembered(tmp_path):
    (tmp_path/'mine.py').write_text('def kept(n, k): return n // k + k\n')
    ran = run('exercises', 'check', NAME, 'mine.py', cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f'{NAME}: right!\n', '')
    listed = run('exercises', 'list', 'foundations.autograd', '--json', cwd=tmp_path)
    rows = {row['name']: row for row in map(json.loads, listed.stdout.splitlines())}
    assert rows[NAME]['tries'] == 1 and re.fullmatch(r'\d{4}-\d\d-\d\d', rows[NAME]['solved'])
    assert [row for name, row in rows.items() if name != NAME and row['solved']] == []
    shown = run('exercises', 'list', cwd=tmp_path).stdout
    assert '1 of 7' in shown and len(shown.splitlines()) == len({n.rpartition('.')[0] for n in exercises.names()})


def test_a_wrong_answer_has_a_status_and_a_hint(tmp_path):
    (tmp_path/'mine.py').write_text('def kept(n, k): return n // k\n')
    ran = run('exercises', 'check', NAME, 'mine.py', '--hint', cwd=tmp_path)
    assert ran.returncode == 1 and ran.stderr == ''
    assert 'expected: 16' in ran.stdout and 'got:      8' in ran.stdout and 'its k layers are in memory too' in ran.stdout
    assert exercises.find(NAME).hint in ran.stdout


def test_a_value_on_the_command_line(cli):
    assert cli('exercises', 'check', 'foundations.autograd.diamond', '[3, 16]').returncode == 0
    assert cli('exercises', 'check', 'foundations.autograd.order', 'chain').returncode == 1


@pytest.mark.parametrize('words, why', [
    (('check', 'foundations.autograd.kep', '3'), "did you mean 'foundations.autograd.kept'"),
    (('check',), 'needs the name of an exercise'), (('check', NAME), 'needs an answer'),
    (('check', NAME, 'nowhere.py'), 'got nowhere.py'), (('list', 'nowhere'), "got 'nowhere'"),
    (('show', 'x'), "no exercise 'x'"), (('praise',), 'invalid choice')])
def test_what_cannot_be_done_is_one_line(cli, words, why): assert why in one_line(cli('exercises', *words), 2)


def test_a_stub_can_be_begun_from(cli):
    for name in exercises.names('foundations'):
        shown = cli('exercises', 'show', name)
        compile(shown.stdout, name, 'exec')
        assert name.rpartition('.')[2] in shown.stdout


@pytest.mark.parametrize('blank', [False, True])
def test_the_book_is_unpacked(cli, tmp_path, blank):
    ran = cli('book', 'here', *(['--blank'] if blank else []))
    assert (ran.returncode, ran.stdout) == (0, 'here\n')
    pages, originals = (sorted(p.relative_to(root).as_posix() for p in root.glob('nbs/**/*.ipynb') if 'checkpoint' not in p.name)
                        for root in (tmp_path/'here', find_chapters()))
    assert pages == originals and (tmp_path/'here'/'benchmarks'/'results'/'main_job.json').exists()
    text = (tmp_path/'here'/'nbs'/'01_foundations'/'02_autograd.ipynb').read_text()
    assert ('#### Solution' in text) != blank and "check('foundations.autograd.kept', kept)" in text


def test_a_readers_work_is_never_overwritten(cli, tmp_path):
    (tmp_path/'here'/'nbs').mkdir(parents=True)
    (tmp_path/'here'/'nbs'/'mine.ipynb').write_text('mine')
    assert 'nothing was written' in one_line(cli('book', 'here'))
    assert [p.name for p in (tmp_path/'here').rglob('*') if p.is_file()] == ['mine.ipynb']


def cell(kind, source): return dict(cell_type=kind, source=source, outputs=[dict(output_type='stream', text='x')])


def test_only_what_belongs_to_a_solution_is_left_out():
    cells = [cell('markdown', 'Text.\n\n::: {#exr-a}\nDo a.\n:::'), cell('code', "a = ...\ncheck('p.c.a', a)"),
             cell('markdown', '::: {.callout-tip collapse="true"}\n## Solution\n\nBecause.'), cell('code', 'a = 1'),
             cell('markdown', 'More of it.'), cell('code', 'a = 2'), cell('markdown', ':::\n\n::: {#exr-b}\nDo b.\n:::'),
             cell('code', 'b = ...'), cell('markdown', '::: {.callout-tip collapse="true"}\n## Solution'), cell('code', 'b = 1'),
             cell('markdown', ':::\n\n## Further reading {#sec-reading}')]
    left = worksheet(dict(cells=cells, metadata={}), {}, blank=True)['cells']
    assert [c['source'] for c in left] == [
        'Text.\n\n#### Exercise: a\n\nDo a.', "a = ...\ncheck('p.c.a', a)", '#### Exercise: b\n\nDo b.', 'b = ...', '## Further reading']
    assert left[1]['outputs'] == [] and left[3]['outputs'] != []
