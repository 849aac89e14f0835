"The house's own tools: the README, what is counted as covered, the limits, and facts that stand in two places."
import configparser, re, sys
from pathlib import Path

import pytest
import yaml
from execnb.nbio import read_nb
from nbdev.process import extract_directives
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import notebook_coverage, oldest, readme, size_cap

CONFIG = configparser.ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = CONFIG['DEFAULT']
TITLE = new_markdown_cell('# One\n\n> Promise.\n\n- number-sections: false')
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=='
FIGURE = '#| label: fig-a\n#| echo: false\n#| fig-cap: "What it *says*."\n#| fig-alt: "A line [that rises]."\nplot()'


# README.md

def converted(*cells):
    "README.md without its notice, and the other files, made from a title and these cells."
    files = readme.convert(new_notebook(cells=[TITLE, *cells]))
    return files.pop('README.md').decode().removeprefix(readme.NOTICE).strip(), files


@pytest.mark.parametrize('source, shown', [
    ('See [data](02_data/01_datasets.ipynb#sec-x).', 'See [data](nbs/02_data/01_datasets.ipynb#sec-x).'),
    ('See [a](../configs/image_classification.yaml){.btn}.', 'See [a](configs/image_classification.yaml).'),
    ('See [a](https://example.org/x), [b](#two).', 'See [a](https://example.org/x), [b](#two).'),
    ('## Two {#sec-two}\n\n::: {.callout-note}\nText.\n:::', '## Two\n\nText.'),
    ('| a |\n|---|\n| 1 |\n\n: Parts {#tbl-parts}', '| a |\n|---|\n| 1 |\n\n_Parts_'),
    (r'$\mathbf{x} + \frac{a}{b} $', r'$\mathbf{x} + \frac{a}{b} $'),
    ('```sh\n[a](nowhere) {.x} @fig-a\n```', '```sh\n[a](nowhere) {.x} @fig-a\n```')])
def test_markdown_for_github(source, shown):
    assert converted(new_markdown_cell(source))[0] == f'# One\n\n> Promise.\n\n{shown}'


def test_a_figure_becomes_a_file():
    text, files = converted(new_code_cell(FIGURE, outputs=[new_output('display_data', data={'image/png': PNG})]))
    assert text.endswith('![A line \\[that rises\\].](README_files/fig-a.png)\n\n_What it *says*._')
    assert list(files) == ['README_files/fig-a.png'] and files['README_files/fig-a.png'].startswith(b'\x89PNG')


@pytest.mark.parametrize('directives, source, printed', [
    ('', 1, 1), ('#| hide\n', 0, 0), ('#| export\n', 0, 0), ('#| include: false\n', 0, 0), ('#| echo: false\n', 0, 1),
    ('#| output: false\n', 1, 0)])
def test_cells_are_shown_as_they_ask(directives, source, printed):
    text, _ = converted(new_code_cell(directives + 'f(1)', outputs=[new_output('stream', text='two\n')]))
    assert ('```python\nf(1)\n```' in text, '```text\ntwo\n```' in text) == (source, printed)


@pytest.mark.parametrize('cell, why', [
    (new_markdown_cell('[a](nowhere.ipynb)'), 'nowhere.ipynb leads to no file'),
    (new_markdown_cell('See @fig-a.'), 'cannot resolve @fig-a'), (new_markdown_cell('By [@knuth].'), 'cannot resolve'),
    (new_code_cell('plot()', outputs=[new_output('display_data', data={'image/png': PNG})]), 'a figure needs'),
    (new_code_cell('f()', outputs=[new_output('error', ename='NameError')]), 'an error: NameError')])
def test_what_github_cannot_show_is_an_error(cell, why):
    with pytest.raises(ValueError, match=why): converted(cell)


def test_the_readme_has_one_line_that_tests():
    blocks = re.findall(r'^```sh\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M|re.S)
    [line] = [b.strip() for b in blocks if 'nbdev_test' in b]
    programs = [re.match(r'(?:\w+=\S+ )*(\S+)', command)[1] for command in line.split(' && ')]
    assert programs == ['pip', 'nbdev_test', 'pytest']


# Coverage of notebooks

PLACES = notebook_coverage.find_places(ROOT/'dlfund')


@pytest.mark.parametrize('path', sorted(ROOT.glob('nbs/[0-9]*/*.ipynb')), ids=lambda p: p.stem)
def test_an_exported_cell_has_the_lines_of_its_module(path):
    for cell in read_nb(path).cells:
        if cell.cell_type != 'code' or not (place := PLACES.get(cell.id)): continue
        extract_directives(cell, remove=True)
        module, above = place
        cells, lines = cell.source.splitlines(), Path(module).read_text(encoding='utf-8').splitlines()[above:]
        for ours, theirs in zip(cells, lines):
            if ours.lstrip().startswith('from dlfund'): ours, theirs = ours.split('import')[1], theirs.split('import')[1]
            assert ours == theirs, f'{module}, below line {above}'


# Limits and versions

def test_size_cap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('dlfund/data/embedded').mkdir(parents=True)
    names = ['small', 'large', 'dlfund/data/embedded/large', 'absent']
    for name, size in zip(names, [size_cap.LIMIT, size_cap.LIMIT + 1, size_cap.LIMIT + 1]):
        Path(name).write_bytes(bytes(size))
    assert size_cap.too_large(names) == [f'large: {size_cap.LIMIT + 1:,} bytes, at most {size_cap.LIMIT:,}']


def test_oldest():
    assert oldest.oldest('torch>=2.6,<3 scikit-learn>=1.5.1 jupyter') == ['torch==2.6', 'scikit-learn==1.5.1']
    bounded = SETTINGS['requirements'].split()
    assert len(oldest.oldest(SETTINGS['requirements'])) == len(bounded), 'a requirement has no lower bound'


def test_the_hooks_have_the_versions_of_the_settings():
    hooks = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    asked = {d for hook in hooks for d in hook.get('additional_dependencies', [])}
    assert asked and asked <= set(SETTINGS['dev_requirements'].split())


def test_the_citation_has_the_version_of_the_settings():
    cited = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert cited['version'] == SETTINGS['version'] and SETTINGS['version'] in (ROOT/'CHANGELOG.md').read_text()
