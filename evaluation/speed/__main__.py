"""`python -m evaluation.speed`."""

import sys

from sparsekv.evaluation.speed import main

if __name__ == "__main__":
    sys.exit(main())
