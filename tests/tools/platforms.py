#!/usr/bin/env python3
"""The suite on every CPython and PyNaCl that this machine has.

    python tests/tools/platforms.py            the core, the command line and real tunnels on each: a few minutes an interpreter
    python tests/tools/platforms.py --whole    the whole suite on each
    python tests/tools/platforms.py --list     which ones there are
    python tests/tools/platforms.py 3.8 3.13   these alone; 3.8/1.4.0 is one with that PyNaCl alone

An interpreter is any python3.N from 3.8 on that stands in the PATH or in ~/.pyenv; each gets a venv of its own in the tests' cache, with the
current PyNaCl, and the oldest one that has a wheel for it with PyNaCl 1.4.0 and 1.5.0 too. Prints a line `figure: ...` for each.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path.home() / ".cache" / "ratrod-tests" / "platforms"
SOME = ["tests/unit", *("tests/system/test_%s.py" % name for name in "command_line tcp udp reconnect ranges".split())]
PYNACLS = ("1.4.0", "1.5.0", "")  # "" is the current one


def run(words, **options):
    return subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def version_of(python):
    """(3, 8, 18), or None where it does not run or is something else than CPython from 3.8 on."""
    try:
        done = run([python, "-c", "import sys, platform; print(platform.python_implementation(), *sys.version_info[:3])"])
    except OSError:
        return None
    words = done.stdout.split()
    version = tuple(map(int, words[1:])) if done.returncode == 0 and words[:1] == ["CPython"] else None
    return version if version and version >= (3, 8) else None


def interpreters():
    """{(3, 8): its path}, the newest patch level of each."""
    found = [shutil.which("python3.%d" % minor) for minor in range(8, 20)] + [shutil.which("python3")]
    found += sorted((pathlib.Path.home() / ".pyenv" / "versions").glob("*/bin/python3"))
    versions = sorted((version, str(path)) for path in found if path for version in [version_of(path)] if version)
    return {version[:2]: path for version, path in versions}


def environment(python, version, pynacl):
    """A venv with what the tests need; None, and why, where that cannot be had."""
    folder = CACHE / ("%d.%d-pynacl-%s" % (*version, pynacl or "current"))
    needs = (ROOT / "setup.py").read_text()
    if not (folder / "ready").exists() or (folder / "ready").read_text() != needs:
        shutil.rmtree(str(folder), ignore_errors=True)
        steps = [[python, "-m", "venv", folder], [folder / "bin" / "pip", "install", "-q", "%s[test]" % ROOT]]
        steps += [[folder / "bin" / "pip", "install", "-q", "--only-binary", ":all:", "pynacl==" + pynacl]] if pynacl else []
        for step in steps:
            done = run(step)
            if done.returncode:
                return None, (done.stdout.strip().splitlines() or ["no reason given"])[-1]
        (folder / "ready").write_text(needs)
    return folder / "bin" / "python", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="the whole suite")
    parser.add_argument("--list", action="store_true", help="only show the interpreters")
    parser.add_argument("only", nargs="*", metavar="3.N[/PYNACL]", help="these alone")
    options = parser.parse_args()
    failed, oldest = 0, None
    for version, path in sorted(interpreters().items()):
        oldest = oldest or version
        if options.list:
            print("%d.%d %s" % (*version, path))
            continue
        for pynacl in PYNACLS if version == oldest else PYNACLS[-1:]:
            number = "%d.%d" % version
            if options.only and not {number, number + "/" + (pynacl or "current")} & set(options.only):
                continue
            name = "CPython %s, PyNaCl %s" % (number, pynacl or "current")
            python, why = environment(path, version, pynacl)
            if not python:
                print("figure: %s = cannot be had here: %s" % (name, why), flush=True)
                continue
            # Cryptography warns that it will not run on an old one for long; in what a program prints that is one line too many.
            done = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *([] if options.whole else SOME)], cwd=str(ROOT),
                       env={**os.environ, "PYTHONWARNINGS": "ignore:Python 3"})
            last = re.sub("=+", "", (done.stdout.strip().splitlines() or ["nothing"])[-1]).strip()
            print("figure: %s = %s" % (name, last), flush=True)
            if done.returncode:
                failed += 1
                print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("____", "E  "))), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
