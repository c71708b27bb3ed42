"""stdio: one stream on the program's own stdin and stdout, and whatever those two may be. As ssh's ProxyCommand: peers/test_proxy_command.py."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import re
import signal
import socket
import subprocess
import tempfile

import pytest

from support.pressure import memory_before, peak_growth
from support.programs import LEGACY, LEGACY_E, PATIENCE, RATROD, RATROD2, either_wire, every_mode, handshakes, two_wires
from support.rows import row
from support.sockets import BLOCK, accept, ask, free_port, ping, port_of, push_until_stuck, receive_all, receive_exactly, reset, say

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = RATROD2

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


class Stdio:
    """A running client with a stdio: tunnel. Its stderr goes to a file, so that nothing has to read it."""

    def __init__(self, log, words, **options):
        self.log = log
        with open(str(log), "wb") as stderr:
            options = {"stdin": PIPE, "stdout": PIPE, "stderr": stderr, "bufsize": 0, **options}
            self.process = subprocess.Popen([str(word) for word in (*RATROD, *words)], **options)
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def wait(self):
        """(exit code, stderr), once it has ended by itself."""
        code = self.process.wait(PATIENCE)
        assert "Traceback" not in self.stderr and "Exception" not in self.stderr, self.stderr
        return code, self.stderr

    @property
    def stderr(self):
        """But for the warning that legacy always has without -e: a right one, and no test's subject."""
        text = self.log.read_text(encoding="utf-8")
        return re.sub(r"\x1b\[[0-9;]*m|\S+Z +WARN The traffic between client and server is in the clear.*\n", "", text)

    def read(self, n):
        pieces = []
        while n:
            pieces.append(self.stdout.read(min(n, 1 << 20)))
            assert pieces[-1], "stdout ended %d bytes too early; stderr: %s" % (n, self.stderr)
            n -= len(pieces[-1])
        return b"".join(pieces)

    def write(self, data):
        """A pipe without a buffer may take a part only."""
        view = memoryview(data)
        while view:
            view = view[self.stdin.write(view):]

    def close(self):
        with self.process:  # which closes its pipes and waits
            self.process.kill()


@pytest.fixture
def launch(tmp_path, keys, stack):
    """launch(words of the command line...) -> Stdio, as the client whose keys are known."""
    def run(*words, folder=None, **options):
        made = Stdio(tmp_path / ("stderr%d" % len(runs)), ("-k", folder or keys.client.path, "connect", *words), **options)
        stack.callback(made.close)
        runs.append(made)
        return made
    runs = []
    return run


AT_ONCE = "--resume", "0"  # a lost link resets its stream


@pytest.fixture
def stdio(serve, launch):
    """stdio(mode, target's port or all of it, serve_flags, connect_flags, **of Stdio) -> Stdio, at a server that there is one of for each mode."""
    servers = {}
    def run(mode, target, serve_flags=(), connect_flags=(), **options):
        place = mode, serve_flags
        if place not in servers or servers[place][0].process.poll() is not None:
            servers[place] = serve(*mode.serve, *serve_flags)
        target = target if isinstance(target, str) else "127.0.0.1:%d" % target
        made = launch(*mode.connect, *connect_flags, "127.0.0.1:%d" % servers[place][1], "stdio:" + target, **options)
        made.server = servers[place][0]
        return made
    return run


@pytest.fixture
def stdio_to(stdio, listener, stack):
    """stdio_to(mode, what the target says at first, more for stdio...) -> (Stdio, the target's end)"""
    def run(mode, first=b"!", *flags, **options):
        made = stdio(mode, port_of(listener), *flags, **options)
        target = stack.enter_context(accept(listener))
        target.sendall(first)
        assert made.read(len(first)) == first
        return made, target
    return run


@two_wires
def test_conversation(mode, stdio, tcp_echo):
    made = stdio(mode, tcp_echo.port)
    for size in (1, 2, 1000, 100000):
        with row(size), concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(made.write, BLOCK[:size])
            assert made.read(size) == BLOCK[:size]
            sent.result()
    made.stdin.close()
    assert made.stdout.read(1) == b""
    # Nothing but data on stdout, and nothing at all on stderr: ssh shows that to its user.
    assert made.wait() == (0, "")


def test_the_test_connection_carries_it(serve, launch, tcp_echo):
    server, port = serve("-v")
    assert launch("127.0.0.1:%d" % port, "stdio:127.0.0.1:%d" % tcp_echo.port, stdin=DEVNULL).wait() == (0, "")
    server.stop()
    assert handshakes(server) == 1 and "during the handshake" not in server.output


@every_mode
def test_ends(mode, stdio, stdio_to, listener):
    # The remote ends first, having spoken first as a mail server does. stdin is held open, as by a terminal: what reads stdout sees its end, and
    # what is still typed arrives.
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        say(target, b"goodbye")
        assert made.read(7) == b"goodbye" and made.stdout.read(1) == b""
        assert made.process.poll() is None
        for size in (1, 50000):
            made.write(BLOCK[:size])
            assert receive_exactly(target, size) == BLOCK[:size]
        made.stdin.close()
        assert target.recv(1) == b""
    assert made.wait() == (0, "")
    # stdin ends first, after a question or without a byte.
    for question in (b"a question", b""):
        made, target = stdio_to(mode, b"")
        made.write(question)
        made.stdin.close()
        assert receive_all(target) == question
        for size in (1, 50000):
            target.sendall(BLOCK[:size])
            assert made.read(size) == BLOCK[:size]
        assert made.process.poll() is None
        target.shutdown(socket.SHUT_WR)
        assert made.stdout.read(1) == b""
        assert made.wait() == (0, "")


@every_mode
def test_what_is_cut(mode, stdio_to):
    """By the target's reset, or a killed server, while stdin is held open. A clean end would pass for a complete transfer."""
    made, target = stdio_to(mode, b"half of")
    reset(target)
    assert made.stdout.read(1) == b""
    code, stderr = made.wait()
    assert code == 1 and len(stderr.splitlines()) == 1, stderr
    made, _ = stdio_to(mode, b"half of", AT_ONCE, AT_ONCE)
    made.server.stop(signal.SIGKILL)
    assert made.stdout.read(1) == b""
    if mode is not RATROD2:
        # There a FIN is the end of a direction, also the one that the kernel sends for a killed server: only writing tells.
        with pytest.raises(BrokenPipeError):
            while True:
                made.write(b"and the other half")
    code, stderr = made.wait()
    assert code == 1 and stderr, stderr


def as_file(content):
    file = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


def as_ended_pipe(content):
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return os.fdopen(reader, "rb")


def test_kinds_of_stdin(stdio, target):
    """A file and /dev/null are never "ready" for epoll, which does not even take the first; a pipe may be at its end before it is looked at."""
    port = target(lambda connection: connection.sendall(hashlib.sha256(receive_all(connection)).hexdigest().encode())).port
    for make, content in ((as_file, BLOCK * 3), (as_file, b"x"), (as_file, b""), (lambda _: open(os.devnull, "rb"), b""), (as_ended_pipe, b""),
                          (as_ended_pipe, b"all of it"), (as_ended_pipe, BLOCK[:65536])):
        with row((getattr(make, "__name__", ""), len(content))), make(content) as source:
            made = stdio(ANY, port, stdin=source)
            assert made.stdout.read() == hashlib.sha256(content).hexdigest().encode()
            assert made.wait() == (0, "")


def test_kinds_of_stdout(stdio, target, tcp_echo):
    """All of it is in the file when the program has ended. stdin is at its end from the beginning."""
    for size in (0, 1, 3 << 20):
        content = (BLOCK * 4)[:size]
        port = target(lambda connection, content=content: connection.sendall(content)).port
        with row(size), tempfile.TemporaryFile() as out:
            out.write(b"what was there before. ")
            out.flush()
            assert stdio(ANY, port, stdin=DEVNULL, stdout=out).wait() == (0, "")
            out.seek(0)
            assert out.read() == b"what was there before. " + content
    assert stdio(ANY, port, stdin=DEVNULL, stdout=DEVNULL).wait() == (0, "")
    with as_file(BLOCK * 8) as source, tempfile.TemporaryFile() as out:  # from a file into a file
        assert stdio(ANY, tcp_echo.port, stdin=source, stdout=out).wait() == (0, "")
        out.seek(0)
        assert out.read() == BLOCK * 8
    # A disk that is full.
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb", buffering=0) as full:
            code, stderr = stdio(ANY, port, stdin=DEVNULL, stdout=full).wait()
        assert code == 1 and len(stderr.splitlines()) == 1, stderr


def test_one_socket_as_both(stdio, tcp_echo):
    """As inetd and ssh's ProxyUseFdpass start programs."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(PATIENCE)
        with theirs:
            made = stdio(ANY, tcp_echo.port, stdin=theirs, stdout=theirs)
        ping(ours, word=b"hello")
        ours.shutdown(socket.SHUT_WR)
        assert receive_all(ours) == b""
    assert made.wait() == (0, "")


@pytest.mark.parametrize("mode, held", [(RATROD2, True), (RATROD2, False), (LEGACY, True), (LEGACY_E, False)],
                         ids=lambda value: getattr(value, "name", "stdin-open" if value else "stdin-ended"))
def test_reader_that_goes_away(mode, held, stdio_to):
    """`ratrod ... | head -1`: no bug of ours, and no reason to run on or to leave the target sending."""
    made, target = stdio_to(mode, b"the first line\n", stdin=PIPE if held else DEVNULL)
    made.stdout.close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            target.sendall(BLOCK)
    code, stderr = made.wait()
    assert code in (1, 141, -signal.SIGPIPE) and len(stderr.splitlines()) <= 1, (code, stderr)


def test_streams_that_are_closed(serve, keys, target):
    """The next thing that is opened gets the free number. It must not be taken for stdin or stdout: then keys or logs would travel."""
    seen = []
    reads = target(lambda connection: (seen.append(receive_all(connection)), connection.sendall(b"answer")))
    _, port = serve()
    for streams, codes in (("<&-", (0, 1, 2)), (">&-", (1, 2)), ("<&- >&-", (1, 2)), ("<&- >&- 2>&-", (1, 2))):
        with row(streams):
            done = subprocess.run(["sh", "-c", 'exec "$@" ' + streams, "sh", *RATROD, "-k", str(keys.client.path), "connect", "127.0.0.1:%d" % port,
                                   "stdio:127.0.0.1:%d" % reads.port], stdin=DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
            assert done.returncode in codes and b"Traceback" not in done.stderr, done
            assert done.stdout == (b"" if ">&-" in streams or done.returncode else b"answer")
            assert b"".join(seen) == b""


@two_wires
def test_who_does_not_read(mode, stdio_to):
    """What nobody takes waits in the sockets' own buffers, and then the sender waits. The other direction is not held up."""
    made, target = stdio_to(mode)
    with target:
        before = memory_before(made)
        # Nobody reads stdout.
        sent, digest = push_until_stuck(target)
        assert sent > 65536 and peak_growth(made, before) < 8 << 20
        made.write(b"still here")
        assert receive_exactly(target, 10) == b"still here"
        whole = hashlib.sha256(made.read(sent)).hexdigest()
        assert whole == digest
        # The target does not read.
        before = memory_before(made)
        _, digest = push_until_stuck(made.stdin, lambda piece: os.write(made.stdin.fileno(), piece))
        assert peak_growth(made, before) < 8 << 20
        target.sendall(b"still here")
        assert made.read(10) == b"still here"
        made.stdin.close()
        assert hashlib.sha256(receive_all(target)).hexdigest() == digest
    assert made.wait() == (0, "")


def one_error(made, code=1):
    """It has failed with this code: one line on stderr, nothing on stdout."""
    assert made.stdout.read() == b""
    ended, stderr = made.wait()
    assert ended == code and len(stderr.splitlines()) == 1, (ended, stderr)
    return stderr


@either_wire
def test_remotes_that_fail(mode, stdio, launch, closed, tcp_echo):
    for stdin in (PIPE, DEVNULL):
        assert re.search("127.0.0.1:%d.*(?i:refused)" % closed, one_error(stdio(mode, closed, stdin=stdin)))
    if mode is ANY:
        assert "not allowed by this server" in one_error(stdio(mode, tcp_echo.port, ("-r", "elsewhere")))
        assert tcp_echo.accepted == 0
        assert "nobody.invalid" in one_error(stdio(mode, "nobody.invalid:80"))
        assert "127.0.0.1:%d" % closed in one_error(launch("127.0.0.1:%d" % closed, "stdio:db:80"))


@contextlib.contextmanager
def terminal():
    """(the user's end, the program's end) of a terminal."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


QUESTION = re.compile(r"yes/no|y/n|\(y|\?\s*$|fingerprint\]", re.I)


def test_missing_keys_are_never_asked_about(launch, tmp_path, closed):
    """Not even at a terminal: stdin is data. An unknown server is in test_host_keys.py."""
    with terminal() as (ours, theirs):
        for options in ({}, {"stdin": theirs}, {"stdin": theirs, "stdout": theirs}):
            made = launch("127.0.0.1:%d" % closed, "stdio:127.0.0.1:80", folder=tmp_path / "none", **options)
            code, stderr = made.wait()
            assert code == 2 and str(tmp_path / "none") in stderr and not QUESTION.search(stderr), stderr
    assert not (tmp_path / "none").exists()


def test_verbose_goes_to_stderr_only(stdio, tcp_echo):
    made = stdio(ANY, tcp_echo.port, connect_flags=("-v",))
    made.write(b"hello")
    assert made.read(5) == b"hello"
    made.stdin.close()
    assert made.stdout.read() == b""
    code, stderr = made.wait()
    assert code == 0 and "INFO" in stderr and "Challenge accepted!" in stderr and "hello" not in stderr


def test_other_tunnels_beside_it(serve, launch, tcp_echo, listener):
    """They run for as long as stdio does, and are as silent."""
    local = free_port()
    _, port = serve()
    made = launch("127.0.0.1:%d" % port, "%d:127.0.0.1:%d" % (local, tcp_echo.port), "stdio:127.0.0.1:%d" % port_of(listener))
    with accept(listener) as target:
        made.write(b"and this")
        assert receive_exactly(target, 8) == b"and this"
        ask(local)
        made.stdin.close()
        assert target.recv(1) == b""
    assert made.stdout.read() == b""
    assert made.wait() == (0, "")


def test_signals(stdio_to, launch, listener):
    """While both directions wait, in whatever call it waits."""
    for sign, codes in ((signal.SIGINT, (130,)), (signal.SIGTERM, (0, 143))):
        with row(sign):
            made, _ = stdio_to(ANY)
            made.process.send_signal(sign)
            code, stderr = made.wait()
            assert code in codes and stderr == "", (code, stderr)
            assert made.stdout.read() == b""
    # Nobody reads stdout: a write that blocks must not keep the program from ending.
    made, target = stdio_to(ANY)
    push_until_stuck(target)
    made.process.send_signal(signal.SIGINT)
    assert made.wait()[0] == 130
    # While it connects, to a server that says nothing.
    made = launch("127.0.0.1:%d" % port_of(listener), "stdio:db:80")
    with accept(listener) as connection:
        assert connection.recv(1)
        made.process.send_signal(signal.SIGINT)
        assert made.wait()[0] == 130


def make_controlling():
    """In the child: stdin's terminal becomes the one whose Ctrl-C it gets."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_terminal(ours, wanted):
    seen = b""
    while wanted not in seen:
        seen += os.read(ours, 65536)
    return seen


def test_at_a_terminal(stdio, tcp_echo, listener):
    with terminal() as (ours, theirs):
        before = termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)
        # Typed by hand, as `nc` is used: lines go and come, and Ctrl-D is the end, or Ctrl-C.
        for end, code in ((b"\x04", 0), (b"\x03", 130)):
            made = stdio(ANY, tcp_echo.port, stdin=theirs, stdout=theirs, preexec_fn=make_controlling)
            os.write(ours, b"hello\n")
            # Once by the terminal itself, once by the target.
            assert read_terminal(ours, b"hello\r\nhello\r\n").endswith(b"hello\r\nhello\r\n")
            os.write(ours, end)
            assert made.wait() == (code, "")
            assert (termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)) == before
    with terminal() as (ours, theirs):
        # A target that speaks first. Nothing has been typed: whoever waits for that hears nothing. And Ctrl-C works all the while.
        made = stdio(ANY, port_of(listener), stdin=theirs, stdout=theirs, preexec_fn=make_controlling)
        with accept(listener) as target:
            target.sendall(b"220 ready\n")
            read_terminal(ours, b"220 ready\r\n")
            os.write(ours, b"\x03")
            assert made.wait()[0] == 130
        assert (termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)) == before


def as_pipes():
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    return [read_in, write_out], [write_in, read_out]


def as_sockets():
    pairs = [tuple(end.detach() for end in socket.socketpair()) for _ in range(2)]
    return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


def as_terminals():
    ours, theirs = pty.openpty()
    return [theirs, os.dup(theirs)], [ours]


def test_no_flag_is_left_behind(stdio, listener, closed):
    """O_NONBLOCK belongs to the open file, which a shell and every other program on the same terminal or pipe share."""
    for kind, end in ((as_pipes, "refused"), (as_pipes, "reset"), (as_pipes, "SIGINT"), (as_pipes, "SIGTERM"), (as_sockets, "reset"),
                      (as_sockets, "SIGINT"), (as_terminals, "refused"), (as_terminals, "reset"), (as_terminals, "SIGTERM")):
        theirs, ours = kind()
        with row((kind.__name__, end)), contextlib.ExitStack() as stack:
            for fd in theirs + ours:
                stack.callback(os.close, fd)
            before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in theirs]
            made = stdio(ANY, closed if end == "refused" else port_of(listener), stdin=theirs[0], stdout=theirs[1])
            if end != "refused":
                target = stack.enter_context(accept(listener))
                target.sendall(b"!")
                assert os.read(ours[-1], 1) == b"!"
                if end == "reset":
                    reset(target)
                else:
                    made.process.send_signal(getattr(signal, end))
            made.process.wait(PATIENCE)
            assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in theirs] == before
