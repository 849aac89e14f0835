"""What serving costs and withstands, measured part by part: `python benchmarks/serving.py throughput`, or several parts, or `all`.

Each part is a file of its own, `benchmarks/serving_<part>.py`, whose `main()` measures, prints a table and stores
`benchmarks/results/serving_<part>.json`. Options after `--` are the parts' own, such as `serving.py throughput -- --quick`."""
from common import dispatch

if __name__ == '__main__': dispatch('serving', __doc__)
