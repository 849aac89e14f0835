#!/usr/bin/env python
"""Write the pages whose networks run in the reader's browser into the site: `demo/digits` and `demo/garments`.

Quarto and scripts/preview.py run this as `project.pre-render`, in the folder that holds the processed notebooks;
`project.resources` then copies `demo/` to the site. The engine, 14 MB, comes from npm or from the cache. Without it, or
with DLFUND_OFFLINE set, the pages are made all the same and show stored answers.
"""
import os, shutil
from pathlib import Path

from dlfund.deployment import pages

TITLES = {'digits': 'Draw a digit', 'garments': 'Draw a garment'}


def engine(
    demo:Path, # folder of the pages
)->str|None: # address of the engine, seen from a page; `None` if it cannot be had
    "Put one copy of the engine beside the pages."
    try: found = pages.fetch_runtime()
    except pages.PageError as e: return print(f'demo pages without an engine: {e}')
    (demo/'runtime').mkdir(parents=True, exist_ok=True)
    for name in pages.RUNTIME_FILES: shutil.copyfile(found/name, demo/'runtime'/name)
    return '../runtime/'


def write(
    folder:Path, # of the processed notebooks
):
    "Write both pages."
    url, home = engine(folder/'demo'), Path(pages.__file__).parent/'pretrained'
    for name, title in TITLES.items():
        pages.static_page(home/f'{name}-drawing', folder/'demo'/name, runtime=False, runtime_url=url, title=title)


if __name__ == '__main__': write(Path(os.environ.get('QUARTO_PROJECT_DIR', '.')).resolve())
