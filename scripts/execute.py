#!/usr/bin/env python
"""Run notebooks top to bottom, keep their outputs, clean them, and stamp what they ran with: execute.py NOTEBOOK..."""
import argparse, json, os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from execnb.nbio import read_nb, write_nb

from page_facts import digest

VERSIONS = """import json, platform
from importlib.metadata import version
versions = dict(python=platform.python_version(), torch=version('torch').split('+')[0], dlfund=version('dlfund'))
print(json.dumps(versions))"""


def execute(
    path:Path, # a notebook; it is overwritten
    timeout:int, # seconds that one cell may take
):
    "Run a notebook in its own folder, as `nbdev_test` does, and store outputs and versions in it."
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell(VERSIONS))
    folder = dict(metadata=dict(path=path.parent))
    NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=folder).execute()
    versions = json.loads(nb.cells.pop().outputs[0]['text'])
    nbformat.write(nb, path)
    clean, cfg = read_nb(path), get_config()
    clean_nb(clean, allowed_metadata_keys=cfg.allowed_metadata_keys.split(), clean_ids=cfg.clean_ids)
    clean.metadata['executed'] = dict(versions=versions, digest=digest(clean))
    write_nb(clean, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebook', type=Path, nargs='+')
    parser.add_argument('--timeout', type=int, default=1800, help='seconds a cell may take')
    args = parser.parse_args()
    os.environ['PYTHONWARNINGS'] = 'ignore::FutureWarning,ignore::DeprecationWarning' # other libraries' plans, with their paths
    for path in args.notebook:
        print(path, flush=True)
        execute(path.resolve(), args.timeout)
