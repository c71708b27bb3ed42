"""docopt 0.6.2, the version in Debian's python3-docopt: installed once from PyPI, and kept."""

import os
import shutil
import subprocess
import sys
import tempfile

from support.programs import CACHE, missing


def old_docopt():
    """The folder that has its docopt.py."""
    place = CACHE / "docopt-0.6.2"
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(CACHE)) as scratch:
            new = os.path.join(scratch, "new")
            done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", new, "docopt==0.6.2"],
                                  stdin=subprocess.DEVNULL)
            if done.returncode:
                missing("docopt 0.6.2 from PyPI")
            if not place.exists():  # another run may have been faster
                shutil.move(new, str(place))
    return place
