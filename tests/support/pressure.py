"""What the tests of limits and of descriptors share: strangers in great number, a remote that never answers, and what a program uses.

`pressure.py PORT SILENT DRIPPING RATE [AGAIN [BEGUN [ADDRESS...]]]` opens so many connections, RATE a second, each from an address of its own or one
of those given. The second kind sends a byte a second, the third a whole first message; with AGAIN those that were closed come back, so many a second.
It says when the first and when all have connected once and when all have been closed, and ends with its parent.
"""

import collections
import contextlib
import errno
import os
import pathlib
import re
import selectors
import socket
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LONG = bool(os.environ.get("RATROD_LONG"))
AT_ONCE = 100  # connections that are being made: fewer than a listener's queue holds
# What a ratrod2 client begins with, and a length that is waited for until the deadline.
DRIP = b"ratrod2\n\x01\x00" + bytes(256)
OVERLOADED = b"\0\0"  # what a server says to those that it turns away


def memory(program, field="VmRSS"):
    """Resident bytes, of /proc/PID/status; VmHWM is the most that it ever was, or since memory_before()."""
    path = pathlib.Path("/proc/%d/status" % program.process.pid)
    if not path.exists():
        import pytest
        pytest.skip("no /proc on this system")
    return int(re.search(field + r":\s*(\d+) kB", path.read_text()).group(1)) << 10


def memory_before(program):
    """What a growth is measured from. The peak until now is forgotten: it was the start, which compiles the program, and would hide 20 MB."""
    before = memory(program)
    pathlib.Path("/proc/%d/clear_refs" % program.process.pid).write_text("5")
    return before


def peak_growth(program, before):
    return memory(program, "VmHWM") - before


def figure(name, value):
    """A measured value in the output of the test run (pytest -s)."""
    print("figure: %s = %s" % (name, value))


def is_closed(sock):
    """Whether the other side has closed a connection on which all that it may say is that it is overloaded."""
    from support.sockets import is_ready

    if not is_ready(sock, selectors.EVENT_READ, 0):
        return False
    try:
        return sock.recv(2, socket.MSG_PEEK) in (b"", OVERLOADED)
    except ConnectionResetError:
        return True


def megabytes(n):
    return "%.1f MB" % (n / (1 << 20))


def scaled(**limits):
    """The command of a ratrod whose default limits have been changed: for times that no test can wait for."""
    return sys.executable, "-c", ("import sys; sys.path.insert(0, %r); import ratrod; ratrod.DEFAULT_LIMITS = ratrod.DEFAULT_LIMITS._replace(**%r);"
                                  " sys.exit(ratrod.main())" % (str(ROOT), limits))


class BlackHole:
    """A port of 127.0.0.1 that neither takes nor refuses connections: nobody accepts, and its queue is full (Linux drops the SYN then)."""

    def __init__(self):
        self._sockets = [socket.create_server(("127.0.0.1", 0), backlog=0)]
        self.port = self._sockets[0].getsockname()[1]
        with contextlib.suppress(socket.timeout):
            while True:
                self._sockets.append(socket.socket())
                self._sockets[-1].settimeout(0.3)
                self._sockets[-1].connect(("127.0.0.1", self.port))

    def close(self):
        for sock in self._sockets:
            sock.close()


def from_address(n):
    """The n-th of the addresses of 127.0.0.0/8 that nobody else here connects from."""
    return "127.%d.%d.%d" % (64 + n // 62500, n // 250 % 250, n % 250 + 1)


class Stranger:
    """One source that connects, and says nothing or little: `begins` at once."""

    def __init__(self, address, drips, begins=b""):
        self.address, self.drips, self.begins = address, drips, begins
        self.sock, self.connected, self.said = None, False, 0

    def connect(self, port):
        self.sock, self.connected, self.said = socket.socket(), False, 0
        self.sock.setblocking(False)
        self.sock.bind((self.address, 0))
        code = self.sock.connect_ex(("127.0.0.1", port))
        assert code in (0, errno.EINPROGRESS), os.strerror(code)

    def drip(self):
        if self.sock and self.connected and self.drips:
            with contextlib.suppress(OSError):
                self.said += self.sock.send(DRIP[self.said:self.said + 1])


class Crowd:
    """All strangers of one process."""

    def __init__(self, port, silent, dripping, rate, again, begun, addresses):
        self._port, self._rate, self._again = port, rate, again
        self._selector = selectors.DefaultSelector()
        message = first_message() if begun else b""
        self._absent = collections.deque(
            Stranger(addresses[n % len(addresses)] if addresses else from_address(n), silent <= n < silent + dripping,
                     message if n >= silent + dripping else b"") for n in range(silent + dripping + begun))
        self._everybody = list(self._absent)
        self._connecting, self._first_time, self._met = 0, len(self._absent), 0
        self._credit = 0.0

    def run(self):
        last = dripped = self._started = time.monotonic()
        parent = os.getppid()
        while os.getppid() == parent:
            self._credit = min(AT_ONCE, self._credit + (time.monotonic() - last) * (self._rate if self._first_time else self._again))
            last = time.monotonic()
            self._enter()
            for key, _ in self._selector.select(0.01):
                self._on_event(key.data)
            if time.monotonic() - dripped >= 1:
                dripped = time.monotonic()
                for stranger in self._everybody:
                    stranger.drip()
            if not self._first_time and not self._again and not self._selector.get_map():
                print("all gone after %.2f s" % (time.monotonic() - self._started), flush=True)
                return

    def _enter(self):
        while self._absent and self._connecting < AT_ONCE and self._credit >= 1:
            self._credit -= 1
            self._first_time -= self._first_time > 0
            stranger = self._absent.popleft()
            stranger.connect(self._port)
            self._selector.register(stranger.sock, selectors.EVENT_WRITE, stranger)
            self._connecting += 1

    def _on_event(self, stranger):
        code = stranger.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not stranger.connected:
            self._connecting -= 1
            stranger.connected = not code
            if not code:
                self._met += 1
                if self._met in (1, len(self._everybody)):
                    which = "all" if self._met > 1 else "the first one is"
                    print("%s connected after %.2f s" % (which, time.monotonic() - self._started), flush=True)
                self._selector.modify(stranger.sock, selectors.EVENT_READ, stranger)
                with contextlib.suppress(OSError):
                    stranger.sock.sendall(stranger.begins)
                return
        with contextlib.suppress(OSError):
            said = stranger.sock.recv(4096)
            if said:
                assert stranger.begins or said == OVERLOADED, "the server said something"
                return
        self._selector.unregister(stranger.sock)
        stranger.sock.close()
        stranger.sock = None
        if self._again:
            self._absent.append(stranger)


def first_message():
    """What a client that begins says first."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import ratrod2_peer
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ratrod2_peer.Client(ours, bytes(32)).send_client_preamble()
        return theirs.recv(4096)


def main(port, silent, dripping, rate, again=0, begun=0, *addresses):
    import resource
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Crowd(port, silent, dripping, rate, again, begun, addresses).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:7]), *sys.argv[7:])
