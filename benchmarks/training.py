"""What training costs, measured part by part: `python benchmarks/training.py loop`, or several parts, or `all`.

Each part is a file of its own, `benchmarks/training_<part>.py`, whose `main()` measures, prints a table of ratios and stores
`benchmarks/results/training_<part>.json`. Options after `--` are the part's own, such as `training.py loop -- --quick`."""
import argparse, importlib, sys
from pathlib import Path

PARTS = sorted(file.stem.removeprefix('training_') for file in Path(__file__).parent.glob('training_*.py'))


def main()->None:
    "Run the parts that were named."
    own, rest = (sys.argv[1:sys.argv.index('--')], sys.argv[sys.argv.index('--') + 1:]) if '--' in sys.argv else (sys.argv[1:], [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='+', choices=[*PARTS, 'all'], metavar='PART', help=f'{", ".join(PARTS)} or all')
    parts = parser.parse_args(own).parts
    for part in PARTS if 'all' in parts else dict.fromkeys(parts):
        print(f'\n{part}\n{"-"*len(part)}', flush=True)
        sys.argv = [f'training_{part}.py', *rest]
        importlib.import_module(f'training_{part}').main()


if __name__ == '__main__': main()
