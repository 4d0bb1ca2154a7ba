"""`python -m sparsekv` is the `sparsekv` command, as torchrun and accelerate launch it."""

import sys

from sparsekv.cli import main

if __name__ == "__main__":
    sys.exit(main())
