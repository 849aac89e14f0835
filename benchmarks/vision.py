"""What the book's vision networks cost beside torchvision's own, with the same weights: `python benchmarks/vision.py models`, several parts, or `all`.

Each part is a file of its own, `benchmarks/vision_<part>.py`, whose `main()` measures, prints a table of ratios and stores
`benchmarks/results/vision_<part>.json`. Options after `--` are the part's own, such as `vision.py models -- --quick`."""
from common import dispatch

if __name__ == '__main__': dispatch('vision', __doc__)
