#!/usr/bin/env python
"""Put the page's facts under its title: a Colab link, and what the notebook was last executed with.

Quarto and scripts/preview.py run this as `project.pre-render`, in the folder that holds the processed notebooks. It
needs the standard library only. `scripts/execute.py` writes the stamp that is read here.
"""
import configparser, hashlib, json, os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = '::: {.page-facts}'


def digest(
    nb:dict, # a notebook, as read from JSON
)->str: # a short hash of its code and stored outputs; cell ids, metadata and execution counts do not count
    "Tell whether a notebook is still the one that was executed."
    def text(o): return ''.join(o) if isinstance(o, list) else o
    def data(out): return {k: text(v) if isinstance(v, (str, list)) else v for k, v in out.get('data', {}).items()}
    cells = [(text(c['source']), [(o['output_type'], text(o.get('text', '')), data(o)) for o in c['outputs']])
             for c in nb['cells'] if c['cell_type'] == 'code']
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:16]


def executed(
    nb:dict, # a notebook, as read from JSON
)->str: # what to say about its last execution; empty when it has no code
    "Say what a notebook was executed with, or that it was changed since."
    stamp = nb['metadata'].get('executed')
    if not any(c.get('outputs') for c in nb['cells']): return ''
    if not stamp or stamp['digest'] != digest(nb): return 'Changed since it was last executed as a whole'
    with_what = ', '.join(f'{k} {stamp["versions"][k]}' for k in ('python', 'torch', 'dlfund'))
    return f'Last executed with {with_what}, in {stamp["seconds"]} s and {stamp["peak_mib"]} MiB of memory'


def facts(
    source:Path, # the notebook, relative to the repository's top
)->str: # Markdown of the line under the title
    "Write the facts of one page."
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    repo = cfg['DEFAULT']['git_url'].removeprefix('https://github.com/')
    colab = f"https://colab.research.google.com/github/{repo}/blob/{cfg['DEFAULT']['branch']}/{source.as_posix()}"
    parts = [f'[Open in Colab]({colab}){{.colab}}', executed(json.loads((ROOT/source).read_text(encoding='utf-8')))]
    return f'::: {{.content-visible when-format="html"}}\n{MARK}\n' + ' · '.join(filter(None, parts)) + '\n:::\n:::'


def add_facts(
    path:Path, # a processed notebook
    source:Path, # the notebook it was made from, relative to the repository's top
):
    "Put the facts in a notebook, after its front matter, or replace those of an earlier run."
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = [c for c in nb['cells'] if MARK not in ''.join(c['source'])]
    cells.insert(int(cells[0]['cell_type'] == 'raw'),
                 dict(cell_type='markdown', id='page-facts', metadata={}, source=facts(source)))
    path.write_text(json.dumps(nb | dict(cells=cells), ensure_ascii=False, indent=1), encoding='utf-8')


if __name__ == '__main__':
    folder = Path(os.environ.get('QUARTO_PROJECT_DIR', '.')).resolve()
    for path in folder.rglob('*.ipynb'):
        source = Path('nbs')/path.relative_to(folder)
        if (ROOT/source).exists(): add_facts(path, source)
