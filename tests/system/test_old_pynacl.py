"""Older PyNaCl: the vectors (with RATROD_LONG=1 all that ciphers and keys have a part in) and the demo on each."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

from support.programs import CACHE, PATIENCE, ROOT, SCRIPT, missing

OLD = ("1.4.0", "1.5.0")  # neither has AEGIS
CORE = ("test_core.py", "test_core_handshake.py")
# What ciphers and keys have a part in.
WHOLE = "vector or flipped or bindings or small_order or joined or private_names or noiseprotocol or libsodium"
PART = WHOLE if os.environ.get("RATROD_LONG") else "vector"


def python(*words, packages=None):
    """(exit code, output) of a Python program, which finds `packages` before what is installed."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if packages:
        environment["PYTHONPATH"] = str(packages)
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(ROOT), env=environment,
                          timeout=4 * PATIENCE)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def install(version, place):
    code, output = python("-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", "pynacl", "--target", str(place),
                          "pynacl==" + version)
    # Not for want of anything that CI could install: where only other versions have a build for this Python, there is nothing to test.
    if "No matching distribution" in output and "from versions: none" not in output or not code and python("-c", LOAD, packages=place)[0]:
        pytest.skip("PyNaCl %s has no build for this Python" % version)
    if code:
        missing("PyNaCl %s (%s)" % (version, output.strip()[-300:]))


def old_pynacl(version):
    """The folder of an older PyNaCl, installed once and kept."""
    place = CACHE / ("pynacl-%s-%s" % (version, sys.implementation.cache_tag))
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(CACHE)) as scratch:
            fresh = pathlib.Path(scratch, "packages")
            install(version, fresh)
            if not place.exists():  # another run may have been faster
                shutil.move(str(fresh), str(place))
    return place


LOAD = "import nacl, ratrod; print(nacl.__version__, [suite.id for suite in ratrod.offered_suites()])"


@pytest.mark.parametrize("version", OLD)
def test_older_pynacl_passes(version):
    packages = old_pynacl(version)
    assert python("-c", LOAD, packages=packages) == (0, version + " [2]\n")
    files = [str(ROOT / "tests" / "unit" / name) for name in CORE]
    code, output = python("-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *files, "-k", PART, packages=packages)
    assert code == 0 and re.search(r"\d+ passed", output), output


def run_demo(*words, packages=None):
    """The output of a whole demo that went well."""
    code, output = python(*words, packages=packages)
    assert code == 0 and "Every byte arrived" in output, output
    return output


@pytest.mark.parametrize("version", OLD)
def test_older_pynacl_runs_the_demo(version):
    assert "AEGIS" not in run_demo(SCRIPT[1], "-v", "demo", packages=old_pynacl(version))
