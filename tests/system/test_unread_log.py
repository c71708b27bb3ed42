"""A log that nobody reads: a pipe that is full, a terminal that Ctrl-S holds. Nothing but the log waits for its reader."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess

import pytest

from support.programs import PATIENCE, PYTHON, ROOT
from support.sockets import ask, eventually

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))

# A program that remembers few lines, so that few have to be logged until some are lost.
FORGETFUL = [PYTHON, "-c", "import sys; sys.path.insert(0, %r); import ratrod; ratrod.LogWriter.WAITING = 20; sys.exit(ratrod.main())" % str(ROOT)]


class Pipe:
    """Where the log of a program goes; hold() as if its reader had stopped, release() as if it read again."""

    def __init__(self):
        self.text = ""
        self.reader, self.writer = self.open()
        os.set_blocking(self.reader, False)

    def open(self):
        return os.pipe()

    def own(self):
        """Called in the program's process."""

    def read(self):
        with contextlib.suppress(BlockingIOError):
            for data in iter(lambda: os.read(self.reader, 65536), b""):
                self.text += data.decode("utf-8", "replace")

    def wait_for(self, pattern):
        """The match, once the log has it; it is read only here."""
        def found():
            self.read()
            return re.search(pattern, self.text)
        eventually(found, lambda: self.text)
        return found()

    def hold(self):
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"\n" * 1024)
        os.set_blocking(self.writer, True)
        assert not select.select([], [self.writer], [], 0)[1]

    def release(self):
        self.read()

    def close(self):
        os.close(self.reader)
        os.close(self.writer)


class Terminal(Pipe):
    def open(self):
        return pty.openpty()

    def own(self):
        os.setsid()
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)

    def hold(self):
        termios.tcflow(self.writer, termios.TCOOFF)

    def release(self):
        termios.tcflow(self.writer, termios.TCOON)


@pytest.fixture
def logging_to(stack):
    """logging_to(Pipe or Terminal, words...) -> (process, where its log goes)"""
    def launch(kind, *words):
        log = kind()
        stack.callback(log.close)
        process = subprocess.Popen([*FORGETFUL, *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log.writer,
                                   preexec_fn=log.own, env={**os.environ, "TERM": "xterm"})
        stack.callback(process.wait, PATIENCE)
        stack.callback(process.kill)
        return process, log
    return launch


@pytest.mark.parametrize("kind, flags", [
    (Pipe, ["-v"]), (Pipe, ["-v", "--log-format", "json"]), (Pipe, ["-v", "--workers", "2"]), (Terminal, ["-v"]), (Terminal, []),
], ids=["pipe", "json", "workers", "terminal", "status line"])
def test_nothing_waits_for_its_reader(kind, flags, logging_to, serve, keys, tcp_echo):
    server_port = serve()[1]
    client, log = logging_to(kind, "-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % server_port, "0:%d" % tcp_echo.port)
    port = int(log.wait_for(r"\[TCP\] Listening on `127.0.0.1:(\d+)`")[1])
    log.wait_for("ratrod: 0 B/s up" if kind is Terminal and not flags else "Test connection successful")
    log.hold()
    for _ in range(60):
        ask(port)
    if "-v" in flags:
        log.release()
        lost = log.wait_for(r"WARN.*\b(\d+) lines of this log could not be written: nobody read it")
        assert int(lost[1]) >= 20 and all(line.startswith("{") for line in log.text.splitlines()[-3:]) == ("json" in flags)
        ask(port)
        log.wait_for(re.escape(lost[0]) + "(?s:.*)lived")  # it is written again, line by line
        log.hold()
        for _ in range(20):
            ask(port)
    client.send_signal(signal.SIGTERM)
    assert client.wait(PATIENCE) == 0


@pytest.mark.parametrize("kind", [Pipe, Terminal])
def test_what_is_said_at_the_end_comes_out(kind, logging_to, keys, closed):
    """A line that was logged just before the end is written before the end, behind whatever the reader has not read yet."""
    client, log = logging_to(kind, "-v", "-k", keys.client.path, "connect", "127.0.0.1:%d" % closed)
    assert client.wait(PATIENCE) == 1
    log.wait_for("Test connection failed")


def test_a_descriptor_that_does_not_wait(logging_to, keys):
    """Another program that shares the descriptor may have made it non-blocking: every line is written all the same."""
    server, log = logging_to(Pipe, "-k", keys.server.path, "serve", "127.0.0.1:0")
    port = int(log.wait_for(r"Starting server on `.*:(\d+)`")[1])
    log.hold()
    os.set_blocking(log.writer, False)
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as stranger, contextlib.suppress(ConnectionError):
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stranger.recv(1000):  # until it is refused, and that logged
            pass
    log.wait_for("Refused `127.0.0.1:")
    server.terminate()
    assert server.wait(PATIENCE) == 0 and "lines of this log" not in log.text
