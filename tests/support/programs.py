"""The real programs as subprocesses, and what their output says. Nothing here imports ratrod: a mistake in it cannot hide in the tests."""

import atexit
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Another Python may run the programs than the tests: one of musl's, with which not every package that the tests need works.
PYTHON = os.environ.get("RATROD_TEST_PYTHON") or sys.executable
SCRIPT = PYTHON, str(ROOT / "ratrod.py")


def compiled():
    """ratrod.py as that Python's bytecode. A script is compiled at each start, 0.2 s, which was most of what the whole suite cost.
    The process that starts the tests makes it; its workers find it in their environment."""
    if "RATROD_TEST_COMPILED" in os.environ:
        return os.environ["RATROD_TEST_COMPILED"]
    folder = tempfile.mkdtemp(prefix="ratrod-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chmod(folder, 0o755)  # also for the programs that run as somebody else
    file = os.path.join(folder, "program.pyc")  # another base name: coverage otherwise looks for the source beside this file
    # Under its own name, so that a traceback shows its lines and coverage finds them.
    subprocess.run([PYTHON, "-c", "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)", SCRIPT[1], file, SCRIPT[1]], check=True)
    os.environ["RATROD_TEST_COMPILED"] = file
    return file


RATROD = PYTHON, compiled()
CACHE = pathlib.Path(os.environ.get("RATROD_TEST_CACHE") or pathlib.Path.home() / ".cache" / "ratrod-tests")
RUST = CACHE / "rust" / "bin" / "ratrod"
# The longest that any awaited event may take. Generous: it bounds a hang on a busy machine and measures nothing.
PATIENCE = 60.0
# The exit code of a client that the server does not accept, or that does not accept the server.
AUTHENTICATION_FAILED = 3


class Mode(NamedTuple):
    """One way of running both ends: the flags of each."""

    name: str
    serve: tuple = ()
    connect: tuple = ()


LEGACY = Mode("legacy", ("--legacy",), ("--legacy",))
LEGACY_E = Mode("legacy-e", ("--legacy",), ("--legacy", "-e"))
RATROD2 = Mode("ratrod2")
MODES = (RATROD2, LEGACY, LEGACY_E)
every_mode, either_wire, two_wires = (pytest.mark.parametrize("mode", modes, ids=lambda mode: mode.name) for modes in (
    MODES, (RATROD2, LEGACY), (RATROD2, LEGACY_E)))  # the last two are for what encryption does not change, or the clear
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, all of 127.0.0.0/8, or what a full queue does")


def missing(what):
    """A real peer that is not there: a failure in CI, where all are required, and a visible skip elsewhere."""
    if os.environ.get("RATROD_REQUIRE_PEERS"):
        pytest.fail("%s is required here (RATROD_REQUIRE_PEERS is set) and is missing" % what)
    pytest.skip("%s is not on this machine" % what)


def need(program):
    return shutil.which(program) or missing(program)


def kept(name, make):
    """A folder of the cache that make(folder) fills, once for all runs."""
    place = CACHE / name
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(CACHE)) as scratch:
            make(pathlib.Path(scratch, "new"))
            if not place.exists():  # another run may have been faster
                shutil.move(os.path.join(scratch, "new"), str(place))
    return place


def install(folder, what, *options):
    """What PyPI has; where it has no build for this Python there is nothing to test."""
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *options, "--target", str(folder), what],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode("utf-8", "replace").strip()
    if "No matching distribution" in output and "from versions: none" not in output:
        pytest.skip("%s has no build for this Python" % what)
    if done.returncode:
        missing("%s from PyPI (%s)" % (what, output[-300:]))


def readme(name):
    """The fenced block of the README under <!-- ci: NAME -->."""
    found = re.search(r"^<!-- ci: %s -->\n```\w*\n(.*?)^```$" % re.escape(name), (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found, "README.md has no block %s" % name
    return found.group(1)


class Program:
    """A running program whose output (both streams, one list of lines) a test can await and search."""

    def __init__(self, command, **options):
        self.lines, self._changed, self._ended = [], threading.Condition(), False
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([str(word) for word in command], **{**streams, **options})
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(re.sub(r"\x1b\[[0-9;]*m", "", line.decode("utf-8", "replace").rstrip("\n")))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, count=1, patience=PATIENCE):
        """The match of the count-th line (from the start of the output) that has `pattern`; fails when the program ends without it."""
        matches, looked_at = {}, 0
        def found():
            nonlocal looked_at
            for number in range(looked_at, len(self.lines)):
                match = re.search(pattern, self.lines[number])
                if match:
                    matches[number] = match
            looked_at = max(0, len(self.lines) - 1)  # the last one may grow: at a terminal
            return list(matches.values())[count - 1] if len(matches) >= count else None
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, patience)
            match = found()
        assert match, "no line %r%s in:\n%s" % (pattern, "" if count == 1 else " (%d times)" % count, self.output)
        return match

    def ready(self):
        """The client itself, once its test connection was made."""
        self.wait_for(READY)
        return self

    def kill(self):
        """As a crash: it can say and close nothing."""
        self.process.kill()
        return self.wait()

    def wait(self):
        """The exit code, once it has ended by itself and all its output is here."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self, sign=signal.SIGTERM):
        """Ends it as a user would, and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait()
            raise AssertionError("did not end on %s:\n%s" % (sign, self.output))


class Tunnel(NamedTuple):
    """A running server and client of ours: `port` is the client's first listening port, `server_port` the server's."""

    server: Program
    client: Program
    server_port: int
    port: int

    def connect(self, timeout=PATIENCE):
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)


LISTENING = r"\[TCP\] Listening on `.*?:(\d+)`"
UDP_LISTENING = r"\[UDP\] Listening on `.*?:(\d+)`"
STARTED = r"Starting server on `.*:(\d+)`"
READY = r"Test connection successful!"


def tcp_port(client, n=1):
    """The port of the client's n-th TCP listener."""
    return int(client.wait_for(LISTENING, n).group(1))


def udp_port(client, n=1):
    """The port of the client's n-th UDP listener."""
    return int(client.wait_for(UDP_LISTENING, n).group(1))


def udp_originator(client, n=1):
    """A socket that is connected to the client's n-th UDP listener."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(PATIENCE)
    made.connect(("127.0.0.1", udp_port(client, n)))
    return made


def bound(client, remote="", host="(?:localhost|127\\.0\\.0\\.1)"):
    """The port at which the server listens for the R: tunnel to `remote`."""
    return int(client.wait_for(r"\[TCP\] `.*?` listens on `%s:(\d+)`, and routing back to `.*?%s` \.\.\." % (host, re.escape(remote))).group(1))


def handshakes(server):
    """How many handshakes `serve -v` has completed."""
    return sum("Accepted" in line for line in server.lines)


def assert_start_fails(program, *patterns):
    """It ends with code 1, and one line of its output has all of these."""
    assert program.wait() == 1, program.output
    assert any(all(re.search(pattern, line) for pattern in patterns) for line in program.lines), program.output


def descriptors(program):
    """How many file descriptors the program has open."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc on this system")
    return len(os.listdir("/proc/%d/fd" % program.process.pid))
