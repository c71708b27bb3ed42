"""Older PyNaCl: the vectors (with RATROD_LONG=1 all that ciphers and keys have a part in) and a short demo on each."""

import os
import re
import subprocess
import sys

import pytest

from support.programs import PATIENCE, ROOT, install, kept

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


def old_pynacl(version):
    """The folder of an older PyNaCl, installed once and kept."""
    def make(folder):
        install(folder, "pynacl==" + version, "--only-binary", "pynacl")
        if python("-c", LOAD, packages=folder)[0]:
            pytest.skip("PyNaCl %s has no build for this Python" % version)
    return kept("pynacl-%s-%s" % (version, sys.implementation.cache_tag), make)


LOAD = "import nacl, ratrod; print(nacl.__version__, [suite.id for suite in ratrod.offered_suites()])"
DEMO = "import sys, ratrod; ratrod.DEMO_MB = 16; sys.exit(ratrod.main(['-v', 'demo']))"


@pytest.mark.parametrize("version", OLD)
def test_older_pynacl_passes(version):
    packages = old_pynacl(version)
    assert python("-c", LOAD, packages=packages) == (0, version + " [2]\n")
    files = [str(ROOT / "tests" / "unit" / name) for name in CORE]
    code, output = python("-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *files, "-k", PART, packages=packages)
    assert code == 0 and re.search(r"\d+ passed", output), output
    code, output = python("-c", DEMO, packages=packages)
    assert code == 0 and "Every byte arrived" in output and "AEGIS" not in output, output
