"What a script can check of STYLE.md in every notebook."
import ast, json, re, sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
from page_facts import executed

NOTEBOOKS = [p for p in sorted(ROOT.glob('nbs/**/*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)$', re.M)
TITLE = re.compile(r'# [^\n{]+\n\n> [^\n]+(\n\n?- [\w-]+: [^\n]+)*')
EXPORTS = {'export', 'exports', 'exporti'}
HIDDEN = {'hide', 'default_exp', 'export', 'exporti'}
MACHINE = re.compile(r'(?<![\w.:/])/(?:work|opt|root|tmp|home)/[\w.-]+')


def text(o): return ''.join(o) if isinstance(o, list) else o


def directives(cell): return {k: v.strip('"\'') for k, v in DIRECTIVE.findall(text(cell['source']))}


def printed(
    output:dict, # one output of a cell
)->str: # what it shows as text
    "The text of an output."
    shown = [v for k, v in output.get('data', {}).items() if k.startswith('text/')]
    return ''.join(map(text, [output.get('text', ''), *shown]))


def in_code(
    cell:dict, # a code cell
    opts:dict, # its directives
)->list[str]: # what is wrong with it
    "Check the source of a code cell."
    lines = [line for line in text(cell['source']).splitlines() if not line.startswith('#|')]
    found = [f'{len(lines)} lines, at most 30'] if len(lines) > 30 else []
    found += [f'a line of {len(line)} characters, at most 120: {line[:40]}...' for line in lines if len(line) > 120]
    found += [f'star import: {line.strip()}' for line in lines if re.match(r'\s*from\s+\S+\s+import\s+\*', line)]
    if mixed(lines, opts): found.append('an import among other code: nbdev runs such a cell to make the docs')
    return found


def mixed(
    lines:list[str], # source of a code cell
    opts:dict, # its directives
)->bool: # whether nbdev would run the cell for its imports, and with them code that needs the cells before it
    "Find an import beside other code, in a cell that is not exported."
    body = '\n'.join(lines)
    if EXPORTS & opts.keys() or opts.get('eval') == 'false': return False
    if 'nbdev_export()' in body or re.search(r'^\s*[%!]', body, re.M): return False
    tree, imports = ast.parse(body), (ast.Import, ast.ImportFrom)
    return any(isinstance(n, imports) for n in ast.walk(tree)) and not all(isinstance(n, imports) for n in tree.body)


def in_outputs(
    cell:dict, # a code cell
    opts:dict, # its directives
)->list[str]: # what is wrong with it
    "Check what a code cell stored."
    found = []
    for out in cell['outputs']:
        if out['output_type'] == 'error': found.append(f'a saved error: {out["ename"]}')
        if '\r' in printed(out): found.append('residue of a progress bar (\\r)')
        found += [f'a path of this machine: {p}' for p in MACHINE.findall(printed(out))]
        is_figure = 'image/png' in out.get('data', {}) or 'class="explore"' in printed(out)
        if is_figure and not HIDDEN & opts.keys():
            if not opts.get('label', '').startswith('fig-'): found.append('a figure without `#| label: fig-...`')
            if not opts.get('fig-cap'): found.append('a figure without `#| fig-cap`')
            if len(opts.get('fig-alt', '')) < 20: found.append('a figure with `#| fig-alt` under 20 characters')
    return found


def problems(
    nb:dict, # a notebook, as read from JSON
)->list[tuple]: # cell number, reason
    "List what is wrong with a notebook."
    titles = [text(c['source']).strip() for c in nb['cells'] if c['cell_type'] == 'markdown']
    titled = titles and TITLE.fullmatch(titles[0])
    found = [] if titled else [(0, 'first comes `# Title`, blank line, `> promise`, alone')]
    code = [(i, c, directives(c)) for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code']
    if any(EXPORTS & o.keys() for _, _, o in code) and not any('default_exp' in o for _, _, o in code):
        found.append((0, 'exports, but has no `#| default_exp`'))
    found += [(i, why) for i, cell, opts in code for rule in (in_code, in_outputs) for why in rule(cell, opts)]
    if 'Changed' in executed(nb): found.append((0, 'changed since it was executed as a whole: run scripts/execute.py'))
    return found


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_style(path):
    found = problems(json.loads(path.read_text(encoding='utf-8')))
    assert not found, '\n' + '\n'.join(f'{path.relative_to(ROOT)}, cell {i}: {why}' for i, why in found)


PNG = new_output('display_data', data={'image/png': 'iVBO'})
GOOD = '#| label: fig-a\n#| fig-cap: "A line."\n#| fig-alt: "A line that rises to the right."\nplot()'


@pytest.mark.parametrize('cell, why', [
    (new_markdown_cell('# Two\n\nText.'), None), (new_code_cell(GOOD, outputs=[PNG]), None),
    (new_code_cell('#| export\nx = 1'), 'default_exp'), (new_code_cell('plot()', outputs=[PNG]), 'label'),
    (new_code_cell(GOOD.replace('fig-cap', 'cap'), outputs=[PNG]), 'fig-cap'),
    (new_code_cell(GOOD.replace(' that rises to the right', ''), outputs=[PNG]), 'fig-alt'),
    (new_code_cell('f()', outputs=[new_output('display_data', data={'text/html': '<div class="explore">'})]), 'label'),
    (new_code_cell('x', outputs=[new_output('error', ename='NameError')]), 'a saved error: NameError'),
    (new_code_cell('x', outputs=[new_output('stream', text='10%\r20%')]), 'progress'),
    (new_code_cell('x', outputs=[new_output('stream', text='in /work/main/x.py')]), 'path of this machine: /work'),
    (new_code_cell('from math import *'), 'star import'), (new_code_cell('x = 1\n'*31), '31 lines'),
    (new_code_cell('import math\nmath.sqrt(x)'), 'an import among'),
    (new_code_cell('x'*121), '121 characters')])
def test_the_lint_sees(cell, why):
    nb = new_notebook(cells=[new_markdown_cell('# One\n\n> Promise.'), cell])
    found = [w for _, w in problems(nb) if 'execute.py' not in w]
    assert any(why in w for w in found) if why else found == []


@pytest.mark.parametrize('title', [
    '# One', '## One\n\n> Promise.', '# One {#sec-one}\n\n> Promise.', '# One\n\n> Promise.\n\nText is lost here.'])
def test_the_lint_sees_a_bad_title(title): assert problems(new_notebook(cells=[new_markdown_cell(title)]))
