#!/usr/bin/env python
"Fail when a file is larger than git should keep: size_cap.py FILE... Data that travels in the package may be larger."
import sys
from pathlib import Path

LIMIT = 2_000_000 # bytes; a chapter with photographs and scenes has a good megabyte
EMBEDDED = 'dlfund/data/embedded/'


def too_large(
    names:list[str], # paths from the top of the repository
)->list[str]: # one line for each that is too large
    "Find the files over the limit."
    files = [name for name in names if Path(name).is_file() and not name.startswith(EMBEDDED)]
    sizes = {name: Path(name).stat().st_size for name in files}
    return [f'{name}: {size:,} bytes, at most {LIMIT:,}' for name, size in sizes.items() if size > LIMIT]


if __name__ == '__main__': sys.exit('\n'.join(too_large(sys.argv[1:])) or 0)
