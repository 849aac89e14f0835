#!/usr/bin/env python
"""Run `nbdev_test`, with its own arguments, so that coverage.py sees an exported cell as the lines of its module.

A notebook runs its own cells and imports only the chapters before it. nbdev copied those cells, line by line, into
`dlfund/`; here they are compiled under the address they have there, so a line that a proof reaches counts as reached.
"""
import ast, re
from pathlib import Path

from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler
from nbdev.config import get_config
from nbdev.test import nbdev_test

HEADER = re.compile(r'^# %% .*\.ipynb #(\w+)$')


def find_places(
    lib:Path, # folder of the library
)->dict[str, tuple[str, int]]: # id of an exported cell: its module, and the number of the line above its code there
    "Find where nbdev put each exported cell."
    return {m[1]: (str(path), n) for path in lib.rglob('*.py')
            for n, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1) if (m := HEADER.match(line))}


class ModuleCompiler(CachingCompiler):
    "Compile a cell under the name and line numbers of its place in a module."
    place = None # of the cell that runs now, if it was exported

    def ast_parse(self,
        source:str, # code of a cell
        *args, # as of the parent
        **kwargs, # as of the parent
    )->ast.AST: # with the line numbers of the module
        "Parse a cell."
        tree = super().ast_parse(source, *args, **kwargs)
        return ast.increment_lineno(tree, self.place[1]) if self.place else tree

    def cache(self,
        *args, # as of the parent
        **kwargs, # as of the parent
    )->str: # what code objects have as their file
        "Name a cell; tracebacks then show the module's own lines."
        return self.place[0] if self.place else super().cache(*args, **kwargs)


def count_cells(
    places:dict[str, tuple[str, int]], # as found by `find_places`
):
    "Make the shell of `nbdev_test` compile each exported cell at its place."
    run = CaptureShell.cell
    def cell(self, cell, *args, **kwargs):
        self.compile.place = places.get(cell.get('id'))
        return run(self, cell, *args, **kwargs)
    CaptureShell.compiler_class, CaptureShell.cell = ModuleCompiler, cell


if __name__ == '__main__':
    count_cells(find_places(get_config().lib_path))
    nbdev_test()
