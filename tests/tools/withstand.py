#!/usr/bin/env python3
"""What the README's table "What it withstands" is made of: one measure a word, each of which can be taken alone.

    python tests/tools/withstand.py                    all of them, in the form that CI has: some minutes
    python tests/tools/withstand.py kill suspend       some of them
    python tests/tools/withstand.py --whole            the long forms: some hours

The measures are tests and scripts that print lines `figure: NAME = VALUE`; what they say becomes a table in Markdown. The exit code is 1
where one of them failed.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Measure(NamedTuple):
    """What is done, and by what: a test file and which of its tests (a word for -k), or a script with its arguments in short and whole."""

    done: str
    file: str
    which: str = ""
    short: tuple = ()
    whole: tuple = ()


MEASURES = {
    "strangers": Measure("thousands of strangers that say nothing, or a byte a second", "system/test_limits.py", "thousands_of_strangers"),
    "harm": Measure("one key that does all it can: processor, memory, links, log", "system/test_harm.py"),
    "descriptors": Measure("connections of every kind, then what is left of them; and no descriptors", "system/test_descriptors.py",
                           "left_behind or without_descriptors"),
    "dead-path": Measure("a path that drops everything, and a path that returns", "system/test_dead_paths.py", "dead_path or slow_reader or outage"),
    "kill": Measure("`kill -9` of either end, again and again", "system/test_reconnect.py", "killed"),
    "suspend": Measure("an end that is suspended (SIGSTOP)", "system/test_dead_paths.py", "suspended"),
    "soak": Measure("streams through a relay that cuts, corrupts and drops", "tools/soak.py", short=("--seconds", "10"), whole=("--seconds", "3600")),
    "fuzz": Measure("hostile bytes for every parser and over sockets", "tools/fuzz.py", short=("--inputs", "20000"), whole=("--inputs", "1000000")),
    "restart": Measure("restarts under load", "system/test_restart.py", "under_load or kernel_has_taken"),
    "machines": Measure("several servers behind HAProxy: one killed, each restarted in turn", "peers/test_machines.py",
                        "killed_under_load or in_turn"),
}


def command_of(measure, whole):
    """The words of its command, after those for the environment."""
    if not measure.short:
        words = [sys.executable, "-m", "pytest", "-n0", "-s", "-q", "--timeout=7200", "tests/" + measure.file]
        return words + (["-k", measure.which] if measure.which else [])
    return [sys.executable, "tests/" + measure.file, *(measure.whole if whole else measure.short)]


def figures_in(output):
    """[(name, value)] of the lines that say a figure; pytest may have put a dot or a letter of its own before one."""
    return re.findall(r"^[.FEsx]*figure: (.*?) = (.*)$", output, re.M)


def row(name, measure, figures, code, whole):
    """A line of the table: what was done, what was found, how to find it again."""
    found = ["%s: %s" % figure for figure in figures] or ["no figures"]
    if code:
        found.insert(0, "**failed**")
    cells = measure.done, "<br>".join(found), "`python tests/tools/withstand.py %s%s`" % (name, " --whole" * whole)
    return "| %s |" % " | ".join(cell.replace("|", "\\|") for cell in cells)


def take(measure, whole):
    """(figures, exit code); the output passes through as it comes."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1", **({"RATROD_LONG": "1"} if whole else {}))
    command = command_of(measure, whole)
    print("\n$ %s%s" % ("RATROD_LONG=1 " * whole, " ".join(repr(word) if " " in word else word for word in command)), file=sys.stderr, flush=True)
    lines = []
    with subprocess.Popen(command, cwd=str(ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line.decode("utf-8", "replace"))
            sys.stderr.write(lines[-1])
            sys.stderr.flush()
    return figures_in("".join(lines)), process.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help="default: all of %s" % ", ".join(MEASURES))
    parser.add_argument("--whole", action="store_true", help="the long form of each")
    arguments = parser.parse_args()
    unknown = set(arguments.measures) - set(MEASURES)
    if unknown:
        parser.error("no such measure: %s; there are %s" % (", ".join(sorted(unknown)), ", ".join(MEASURES)))
    rows, failed = [], False
    for name in arguments.measures or MEASURES:
        figures, code = take(MEASURES[name], arguments.whole)
        failed |= bool(code)
        rows.append(row(name, MEASURES[name], figures, code, arguments.whole))
    print("\n".join(["| what was done | what was found | command |", "| --- | --- | --- |", *rows]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
