"""Packaging: one module, two dependencies, one console script."""

import pathlib
import re

from setuptools import setup

here = pathlib.Path(__file__).resolve().parent
source = (here / "ratrod.py").read_text(encoding="utf-8")

setup(
    name="ratrod",
    version=re.search(r'^__version__ = "(.+?)"$', source, re.M).group(1),
    description="Key-authenticated, encrypted TCP and UDP tunnels in one Python file: ssh -L where there is no SSH",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["ratrod"],
    python_requires=">=3.8",
    install_requires=["docopt-ng", "PyNaCl>=1.4"],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "noiseprotocol", "cryptography"],
        "lint": ["ruff", "mypy", "vermin"],
    },
    entry_points={"console_scripts": ["ratrod = ratrod:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Security :: Cryptography", "Topic :: System :: Networking"],
)
