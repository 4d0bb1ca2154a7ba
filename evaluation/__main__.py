"""`python -m evaluation`, or `python -m sparsekv.evaluation` where sparsekv is installed."""

import sys

from sparsekv.evaluation.accuracy.command import main

if __name__ == "__main__":
    sys.exit(main())
