#!/usr/bin/env python
"""Make README.md and its pictures, README_files/, from nbs/index.ipynb: readme.py [--check]

The same notebook makes the same bytes on every machine: only the standard library is used, nothing is run, and Quarto
is not needed. What GitHub cannot show, and a link that leads nowhere, is an error that names it.
"""
import argparse, base64, json, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = 'nbs/index.ipynb'
NOTICE = f'<!-- Made from {NOTEBOOK} by scripts/readme.py: edit the notebook, not this file. -->'
OPTION = re.compile(r'^#\| *([\w-]+):? *(.*)\n?', re.M)
UNSEEN = {'hide', 'default_exp', 'export', 'exporti'}
FENCED = re.compile(r'^(`{3,}|~{3,}).*?^\1`* *$', re.M|re.S)
FRONT = re.compile(r'(?<=\n)(?:- [\w-]+: .*\n?)+\Z') # nbdev's settings for the page, at the end of the title's cell
LINK = re.compile(r'(\]\(|\bsrc=")(?![a-z]+:|//|#)([^)"\s]+)')
REFERENCE = re.compile(r'(?<![\w.`])@(?:fig|tbl|eq|sec|exr)-[\w-]+|\[@\w+')
QUARTO = [(re.compile(r'^ *:{3,}.*\n?', re.M), ''), # the fences of a div
          (re.compile(r'^: (.+?)(?: *\{#[^}]*\})?$', re.M), r'_\1_'), # the caption of a table
          (re.compile(r'(?<=[\w)\]]) *\{(?:[#.]|[\w-]+=)[^}\n]*\}', re.M), '')] # attributes of a heading or link


def text(
    source:str|list, # a string, or its lines as Jupyter stores them
)->str: # in one piece
    "Join what a notebook stores in lines."
    return ''.join(source)


def options(
    source:str, # of a code cell
)->dict[str, str]: # its `#| key: value` lines
    "Read the directives of a cell."
    return {k: json.loads(v) if v.startswith('"') else v.strip("'") for k, v in OPTION.findall(source)}


def link(
    m:re.Match, # of `LINK`: what stands before a relative target, and the target, as seen from nbs/
)->str: # the same, as seen from the top of the repository
    "Move a relative link, which must lead to a file."
    path, mark, anchor = m[2].partition('#')
    path = os.path.normpath(os.path.join(os.path.dirname(NOTEBOOK), path)).replace(os.sep, '/')
    if not (ROOT/path).exists(): raise ValueError(f'the link {m[2]} leads to no file: there is no {path}')
    return m[1] + path + mark + anchor


def prose(
    source:str, # Markdown without code blocks
)->str: # the same for GitHub
    "Take Quarto's own syntax out of Markdown, and move its links."
    if m := REFERENCE.search(source): raise ValueError(f'README.md cannot resolve {m[0]}: say it in words')
    for pattern, new in QUARTO: source = pattern.sub(new, source)
    return LINK.sub(link, source)


def markdown(
    source:str, # a Markdown cell
)->str: # the same for GitHub; code blocks as they are
    "Convert a Markdown cell."
    out, end = [], 0
    for code in FENCED.finditer(source):
        out += [prose(source[end:code.start()]), code[0]]
        end = code.end()
    return ''.join(out) + prose(source[end:])


def picture(
    png:str, # base64
    opts:dict, # directives of the cell
    files:dict, # path: bytes; gets the picture
)->str: # Markdown
    "Store a figure, and show it with its description and caption."
    if 'label' not in opts or 'fig-alt' not in opts: raise ValueError('a figure needs `#| label` and `#| fig-alt`')
    path = f'README_files/{opts["label"]}.png'
    if path in files: raise ValueError(f'the label {opts["label"]} stands on two figures')
    files[path] = base64.b64decode(png)
    alt = re.sub(r'([\[\]])', r'\\\1', opts['fig-alt'])
    return f'![{alt}]({path})' + (f"\n\n_{prose(opts['fig-cap'])}_" if 'fig-cap' in opts else '')


def output(
    out:dict, # one output of a code cell
    opts:dict, # directives of the cell
    files:dict, # path: bytes; gets the pictures
)->str: # Markdown
    "Show what a cell printed, drew or returned."
    if out['output_type'] == 'error': raise ValueError(f'a cell stored an error: {out["ename"]}')
    data = out.get('data', {'text/plain': out.get('text', '')})
    if 'image/png' in data: return picture(text(data['image/png']), opts, files)
    if 'text/markdown' in data: return markdown(text(data['text/markdown'])).strip()
    return f'```text\n{text(data["text/plain"]).rstrip()}\n```'


def code(
    cell:dict, # a code cell
    files:dict, # path: bytes; gets the pictures
)->list[str]: # Markdown, one piece for the source and one for each output
    "Show a code cell as its directives say."
    source = text(cell['source'])
    opts = options(source)
    if UNSEEN & opts.keys() or opts.get('include') == 'false': return []
    shown = [] if opts.get('echo') == 'false' else [f'```python\n{OPTION.sub("", source).strip()}\n```']
    return shown + [output(o, opts, files) for o in cell['outputs'] if opts.get('output') != 'false']


def convert(
    nb:dict, # a notebook, as read from JSON
)->dict[str, bytes]: # what to write: path from the top of the repository, and content
    "Make README.md and its pictures."
    parts, files = [NOTICE], {}
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': parts.append(markdown(text(cell['source'])).strip())
        if cell['cell_type'] == 'code': parts += code(cell, files)
    parts[1] = FRONT.sub('', parts[1]).strip()
    readme = re.sub(r'\n{3,}', '\n\n', '\n\n'.join(filter(None, parts))) + '\n'
    return {'README.md': readme.encode(), **files}


def present()->dict[str, bytes]: # path from the top of the repository, and content
    "Read what is there now."
    paths = [ROOT/'README.md', *ROOT.glob('README_files/*')]
    return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in paths if p.is_file()}


def write(
    wanted:dict[str, bytes], # path from the top of the repository, and content
    old:list[str], # paths that are there and are not wanted
):
    "Write the files, and remove what an earlier version of the notebook left."
    (ROOT/'README_files').mkdir(exist_ok=True)
    for path, content in wanted.items(): (ROOT/path).write_bytes(content)
    for path in old: (ROOT/path).unlink()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail when a file is not what it should be')
    args = parser.parse_args()
    try: wanted = convert(json.loads((ROOT/NOTEBOOK).read_text(encoding='utf-8')))
    except ValueError as e: sys.exit(f'{NOTEBOOK}: {e}')
    there = present()
    stale = sorted(p for p in wanted.keys() | there.keys() if wanted.get(p) != there.get(p))
    if args.check and stale: sys.exit(f'{", ".join(stale)} differ from {NOTEBOOK}: run python scripts/readme.py')
    if not args.check: write(wanted, there.keys() - wanted.keys())
