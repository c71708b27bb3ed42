"""Packaging: one module, two dependencies, one console script; and `python setup.py pyz`, which makes one file that runs."""

import hashlib
import importlib.metadata
import io
import pathlib
import re
import sys
import zipfile

try:
    from setuptools import Command, setup
except ImportError:
    sys.exit("setuptools is missing: install it with `%s -m pip install setuptools`" % sys.executable)

here = pathlib.Path(__file__).resolve().parent
source = (here / "ratrod.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+?)"$', source, re.M).group(1)

# For any Python: one that is too old could not even read ratrod.py.
MAIN = b"""\
import sys

if sys.version_info < (3, 8):
    sys.stderr.write("ratrod needs Python 3.8 or later, and this is %d.%d\\n" % sys.version_info[:2])
    sys.exit(2)

from ratrod import program

program()
"""


def docopt_ng():
    """(version, {name: bytes}): the source and the licence of the docopt-ng that this Python has."""
    try:
        found = importlib.metadata.distribution("docopt-ng")
    except importlib.metadata.PackageNotFoundError:
        return None, {}
    files = {}
    for path in found.files or []:
        if re.fullmatch(r"docopt/\w+\.py", str(path)):
            files[str(path)] = path.locate().read_bytes()
        elif re.match(r"LICEN[CS]E", path.name):
            files["LICENSE.docopt-ng"] = path.locate().read_bytes()
    return found.version, files


def archive(files):
    """The bytes of a zip file that Python runs; the same for the same {name: bytes}, whoever makes it, where and when.

    Not compressed, because each zlib packs in its own way: some 300 kB instead of 80.
    """
    packed = io.BytesIO()
    packed.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(packed, "w") as into:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_STORED
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # as on Unix, also where it is made on Windows
            into.writestr(entry, files[name])
    return packed.getvalue()


class Pyz(Command):
    """ratrod and docopt-ng in one file. PyNaCl stays outside: it is made for one system and one Python, so it is the machine's own."""

    description = "build ratrod.pyz, one file that runs wherever there is PyNaCl"
    user_options = [("output=", "o", "the file to write (default: ratrod.pyz in the current folder)")]

    def initialize_options(self):
        self.output = "ratrod.pyz"

    def finalize_options(self):
        self.output = pathlib.Path(self.output).absolute()

    def run(self):
        docopt_version, files = docopt_ng()
        if not {"docopt/__init__.py", "LICENSE.docopt-ng"} <= set(files):
            sys.exit("docopt-ng is missing, which goes into ratrod.pyz: install it with `%s -m pip install -U docopt-ng`" % sys.executable)
        files.update({"__main__.py": MAIN, "ratrod.py": source.encode(), "LICENSE": (here / "LICENSE").read_text(encoding="utf-8").encode()})
        data = archive(files)
        self.output.write_bytes(data)
        self.output.chmod(0o755)
        print("ratrod %s with docopt-ng %s: %s\n%d bytes, sha256 %s"
              % (version, docopt_version, self.output, len(data), hashlib.sha256(data).hexdigest()))


setup(
    name="ratrod",
    version=version,
    description="Key-authenticated, encrypted TCP and UDP tunnels in one Python file: ssh -L where there is no SSH",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["ratrod"],
    python_requires=">=3.8",
    install_requires=["docopt-ng", "PyNaCl>=1.4"],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "noiseprotocol", "cryptography", "PySocks", "setuptools",
                 "kubernetes-validate", "prometheus-client"],
        "lint": ["ruff", "mypy", "vermin"],
    },
    entry_points={"console_scripts": ["ratrod = ratrod:program"]},
    cmdclass={"pyz": Pyz},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Security :: Cryptography", "Topic :: System :: Networking"],
)
