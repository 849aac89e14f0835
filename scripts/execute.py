#!/usr/bin/env python
"""Run notebooks top to bottom, keep their outputs, clean them, and stamp what they ran with and took: execute.py NOTEBOOK..."""
import argparse, json, os, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from execnb.nbio import read_nb, write_nb

from page_facts import digest

FACTS = """import json, platform, resource
from importlib.metadata import version
versions = dict(python=platform.python_version(), torch=version('torch').split('+')[0], dlfund=version('dlfund'))
print(json.dumps(dict(versions=versions, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)))"""


def execute(
    path:Path, # a notebook; it is overwritten
    timeout:int, # seconds that one cell may take
):
    "Run a notebook in its own folder, as `nbdev_test` does, and store outputs, versions, seconds and peak memory in it."
    nb, begin = nbformat.read(path, as_version=4), time.perf_counter()
    nb.cells.append(nbformat.v4.new_code_cell(FACTS))
    folder = dict(metadata=dict(path=path.parent))
    NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=folder).execute()
    facts = json.loads(nb.cells.pop().outputs[0]['text']) | dict(seconds=round(time.perf_counter() - begin))
    nbformat.write(nb, path)
    clean, cfg = read_nb(path), get_config()
    clean_nb(clean, allowed_metadata_keys=cfg.allowed_metadata_keys.split(), clean_ids=cfg.clean_ids)
    clean.metadata['executed'] = facts | dict(digest=digest(clean))
    write_nb(clean, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebook', type=Path, nargs='+')
    parser.add_argument('--timeout', type=int, default=1800, help='seconds a cell may take')
    args = parser.parse_args()
    os.environ['DLFUND_PROGRESS'] = os.path.join(tempfile.mkdtemp(), 'progress.json') # the book's own answers are not the reader's
    os.environ['PYTHONWARNINGS'] = 'ignore::FutureWarning,ignore::DeprecationWarning' # other libraries' plans, with their paths
    for path in args.notebook:
        print(path, flush=True)
        execute(path.resolve(), args.timeout)
