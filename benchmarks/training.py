"""What training costs, measured part by part: `python benchmarks/training.py loop`, or several parts, or `all`.

Each part is a file of its own, `benchmarks/training_<part>.py`, whose `main()` measures, prints a table of ratios and stores
`benchmarks/results/training_<part>.json`. Options after `--` are the part's own, such as `training.py loop -- --quick`."""
from common import dispatch

if __name__ == '__main__': dispatch('training', __doc__)
