"The exercises of the book: their checker, and a proof for every one of them that it can be failed and passed."
import json, re
from pathlib import Path

import pytest

from dlfund import exercises

ROOT = Path(__file__).resolve().parent.parent
NAMES = exercises.names()


def empty(solution):
    "What a stub answers: nothing."
    return (lambda *args, **kwargs: None) if callable(solution) else None


@pytest.mark.parametrize('name', NAMES)
def test_stub_fails_and_solution_passes(name, capsys):
    ex = exercises.find(name)
    assert not exercises.check(name, empty(ex.solution))
    assert 'not yet' in capsys.readouterr().out
    assert exercises.check(name, ex.solution), capsys.readouterr().out


@pytest.mark.parametrize('name', NAMES)
def test_typical_mistakes_fail_with_a_message_that_fits(name, capsys):
    ex = exercises.find(name)
    assert ex.hint, f'{name} has no hint'
    for said, wrong in ex.mistakes.items():
        assert not exercises.check(name, wrong, hint=True), f'{name}: passes though {said}'
        printed = capsys.readouterr().out
        assert said in printed and ex.hint in printed, printed


@pytest.mark.parametrize('name', NAMES)
def test_a_function_has_cases_enough(name):
    ex = exercises.find(name)
    assert not callable(ex.solution) or len(exercises.outcomes(ex, ex.solution)) >= 2


@pytest.mark.parametrize('name', NAMES)
def test_the_page_has_stub_and_solution(name):
    "Each exercise stands in its chapter, with a call of the checker before and after the solution."
    part, chapter, _ = name.split('.')
    [page] = [p for p in ROOT.glob(f'nbs/*_{part}/*_{chapter}.ipynb')]
    calls = [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    calls = [c for c in calls if re.search(rf"^check\('{re.escape(name)}'", c, re.M)]
    assert len(calls) == 2, f'{name}: {len(calls)} cells call check, must be a stub and a solution'
