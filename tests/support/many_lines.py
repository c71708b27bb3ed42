"""Many command lines in the time of one: ratrod is imported once, and each line then gets a fork of that process."""

import json
import os
import subprocess
import sys

from support.programs import PATIENCE, ROOT

RUN_EACH = """
import json, os, sys
import ratrod
outcomes = []
for words in json.load(sys.stdin):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        sys.stdout = sys.stderr = open(writer, "w", buffering=1, encoding="utf-8")
        try:
            code = ratrod.main(words)
        except SystemExit as error:
            code = error.code
        sys.stderr.flush()
        os._exit(code or 0)
    os.close(writer)
    with open(reader, encoding="utf-8") as shown:
        text = shown.read()
    outcomes.append((os.waitpid(child, 0)[1], text))
json.dump(outcomes, sys.stdout)
"""


def run_each(lines):
    """[(exit code, what it shows)] of command lines (lists of words) that end by themselves."""
    done = subprocess.run([sys.executable, "-c", RUN_EACH], input=json.dumps([[str(word) for word in line] for line in lines]).encode(),
                          stdout=subprocess.PIPE, timeout=PATIENCE * 2, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0
    # What wait() gives: the exit code in the high byte, a signal in the low one.
    return [(status >> 8 if not status & 255 else -status, text) for status, text in json.loads(done.stdout.decode())]


def assert_no_tunnels(keys, tunnels, shown):
    """Each of these TUNNEL words is refused before anything else happens: it is named, and `shown` is in what is said about the forms."""
    outcomes = run_each(["-k", keys.client.path, "connect", "127.0.0.1:9", "--", tunnel] for tunnel in tunnels)
    wrong = ["%r: %d %s" % (tunnel, code, text) for tunnel, (code, text) in zip(tunnels, outcomes)
             if code != 2 or "Traceback" in text or shown not in text.replace("`%s`" % tunnel, "")
             or tunnel.isprintable() and "`%s`" % tunnel[:100] not in text.replace(tunnel, tunnel[:100])
             or not all(line.isprintable() for line in text.splitlines())]
    assert not wrong, "\n".join(wrong)
