"""Make a virtual environment that sees the packages of the Python that runs this script.

    python .ci/layered_venv.py DIRECTORY

What is installed into it lies above those packages, and they stay as they are. `venv --system-site-packages` is not
this: run by the Python of a virtual environment, it shows the packages of the base Python instead. The layer below's
.pth files are not read, so an editable install there stays out of sight.
"""

import importlib.util
import sys
import sysconfig
import venv
from pathlib import Path


def create(directory: Path) -> None:
    """Make the environment; pip is the one below where there is one."""
    has_pip = importlib.util.find_spec("pip") is not None
    venv.create(directory, clear=True, symlinks=True, with_pip=not has_pip)
    below = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = sysconfig.get_path("purelib", "posix_prefix", {"base": str(directory), "platbase": str(directory)})
    Path(own, "layer_below.pth").write_text("\n".join(below) + "\n")


if __name__ == "__main__":
    create(Path(sys.argv[1]).resolve())
