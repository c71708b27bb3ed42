"""Many command lines in the time of one: ratrod is imported once, and each line then gets a fork of that process."""

import json
import os
import subprocess
from typing import NamedTuple

from support.programs import PATIENCE, PYTHON, ROOT

RUN_EACH = """
import json, os, signal, sys, tempfile
import ratrod
order = json.load(sys.stdin)
exec(order["preload"])
outcomes = []
for number, words in enumerate(order["lines"]):
    streams = [tempfile.TemporaryFile() for _ in range(3)]
    streams[0].write(order["typed"].encode())
    streams[0].seek(0)
    child = os.fork()
    if not child:
        signal.alarm(int(order["patience"]))  # no line shall hang the others: this signal shows in the outcome
        for stream, file in enumerate(streams):
            os.dup2(file.fileno(), stream)
            file.close()
        sys.stdin = open(0, closefd=False)
        exec(order["prepare"])
        code = ratrod.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    for file in streams:
        file.seek(0)
    outcomes.append((status, *(file.read().decode() for file in streams[1:])))
json.dump(outcomes, sys.stdout)
"""


class Outcome(NamedTuple):
    """How a command line ended: its exit code (below 0: a signal), and what it said on each stream."""

    code: int
    out: str
    err: str


def run_lines(lines, typed="", preload="", prepare="", program=(PYTHON,), env=None, **options):
    """[Outcome] of command lines that end by themselves. `preload` is Python that runs once, `prepare` in each line's process with its `number`."""
    order = {"lines": [[str(word) for word in line] for line in lines], "typed": typed, "preload": preload, "prepare": prepare, "patience": PATIENCE}
    env = dict(os.environ if env is None else env)
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), str(ROOT)])
    done = subprocess.run([*program, "-W", "ignore", "-c", RUN_EACH], input=json.dumps(order).encode(), stdout=subprocess.PIPE,
                          timeout=PATIENCE * 4, env=env, **options)
    assert done.returncode == 0
    outcomes = [Outcome(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), out, err)
                for status, out, err in json.loads(done.stdout.decode())]
    for line, outcome in zip(lines, outcomes):
        assert "Traceback" not in outcome.err and "internal error" not in outcome.err, (line, outcome)
    return outcomes


def run_each(lines):
    """[(exit code, what it shows)] of command lines (lists of words) that end by themselves."""
    return [(outcome.code, outcome.out + outcome.err) for outcome in run_lines(list(lines))]
