"""stdio: one stream on the program's own stdin and stdout, as ssh's ProxyCommand wants it; and whatever those two may be."""

import concurrent.futures
import contextlib
import fcntl
import getpass
import hashlib
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import tempfile

import pytest

from support.keys import make_keys
from support.many_lines import run_each
from support.pressure import memory_before, peak_growth
from support.programs import LEGACY, LEGACY_E, LISTENING, MODES, PATIENCE, RATROD, RATROD2, every_mode, need
from support.sockets import eventually, free_port, port_of, receive_all, receive_exactly, reset

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = MODES[0]
BLOCK = os.urandom((1 << 20) - 3)
DIGEST_64 = hashlib.sha256(BLOCK * 64).hexdigest()
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


def without_legacys_warning(text):
    """The one that it always has without -e: a right one, and no test's subject."""
    return re.sub(r"\x1b\[[0-9;]*m|\S+Z +WARN The traffic between client and server is in the clear.*\n", "", text)


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
        return without_legacys_warning(self.log.read_text(encoding="utf-8"))

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
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout):
            if stream:
                stream.close()


@pytest.fixture
def launch(tmp_path, keys):
    """launch(words of the command line...) -> Stdio, as the client whose keys are known."""
    with contextlib.ExitStack() as stack:
        def run(*words, folder=None, **options):
            made = Stdio(tmp_path / ("stderr%d" % len(runs)), ("-k", folder or keys.client.path, "connect", *words), **options)
            stack.callback(made.close)
            runs.append(made)
            return made
        runs = []
        yield run


@pytest.fixture
def stdio(serve, launch):
    """stdio(mode, target's port, serve_flags, connect_flags, stdin=..., stdout=...) -> Stdio of a client whose server is there."""
    def run(mode, port, serve_flags=(), connect_flags=(), **options):
        server, server_port = serve(*mode.serve, *serve_flags)
        made = launch(*mode.connect, *connect_flags, "127.0.0.1:%d" % server_port, "stdio:127.0.0.1:%d" % port, **options)
        made.server = server
        return made
    return run


def accept(listener):
    connection, _ = listener.accept()
    connection.settimeout(PATIENCE)
    return connection


def answer_with_digest(connection):
    """A target: takes all, and answers with its hash."""
    digest = hashlib.sha256()
    for chunk in iter(lambda: connection.recv(1 << 20), b""):
        digest.update(chunk)
    connection.sendall(digest.hexdigest().encode())


def digest_of(data):
    return hashlib.sha256(data).hexdigest().encode()


def read_digest(read):
    digest = hashlib.sha256()
    for chunk in iter(lambda: read(1 << 20), b""):
        digest.update(chunk)
    return digest.hexdigest()


@pytest.fixture
def closed():
    """A port of 127.0.0.1 that is taken, and where nobody listens."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield port_of(made)


# ---------------------------------------------------------------------------------------------------- a conversation, and its end


@every_mode
def test_conversation(mode, stdio, tcp_echo):
    made = stdio(mode, tcp_echo.port)
    for size in (1, 2, 1000, 100000):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(made.write, BLOCK[:size])
            assert made.read(size) == BLOCK[:size]
            sent.result()
    made.stdin.close()
    assert made.stdout.read(1) == b""
    # Nothing but data on stdout, and nothing at all on stderr: ssh shows that to its user.
    assert made.wait() == (0, "")


def test_target_speaks_first(stdio, listener):
    """As sshd, a mail server or a database does: before stdin has had a byte."""
    made = stdio(ANY, port_of(listener))
    with accept(listener) as target:
        target.sendall(b"220 ready\r\n")
        assert made.read(11) == b"220 ready\r\n"
    made.stdin.close()
    assert made.wait()[0] == 0


@every_mode
def test_remote_that_ends_first(mode, stdio, listener):
    """stdin is held open, as by a terminal: what reads stdout sees its end, and what is still typed arrives."""
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        target.sendall(b"goodbye")
        target.shutdown(socket.SHUT_WR)
        assert made.read(7) == b"goodbye"
        assert made.stdout.read(1) == b""
        assert made.process.poll() is None
        for size in (1, 1000, 50000):
            made.write(BLOCK[:size])
            assert receive_exactly(target, size) == BLOCK[:size]
        made.stdin.close()
        assert target.recv(1) == b""
    assert made.wait() == (0, "")


@every_mode
def test_stdin_that_ends_first(mode, stdio, listener):
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        made.write(b"a question")
        made.stdin.close()
        assert receive_all(target) == b"a question"
        for size in (1, 1000, 50000):
            target.sendall(BLOCK[:size])
            assert made.read(size) == BLOCK[:size]
        assert made.process.poll() is None
        target.shutdown(socket.SHUT_WR)
        assert made.stdout.read(1) == b""
    assert made.wait() == (0, "")


def test_end_without_a_byte(stdio, listener):
    made = stdio(ANY, port_of(listener))
    with accept(listener) as target:
        made.stdin.close()
        assert target.recv(1) == b""
    assert made.stdout.read(1) == b""
    assert made.wait() == (0, "")


@every_mode
def test_reset_by_the_target(mode, stdio, listener):
    """stdin is held open. A clean end would pass for a complete transfer."""
    made = stdio(mode, port_of(listener))
    target = accept(listener)
    target.sendall(b"half of")
    assert made.read(7) == b"half of"
    reset(target)
    assert made.stdout.read(1) == b""
    code, stderr = made.wait()
    assert code == 1 and len(stderr.splitlines()) == 1, stderr


@every_mode
def test_killed_server(mode, stdio, listener):
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        target.sendall(b"half of")
        assert made.read(7) == b"half of"
        made.server.stop(signal.SIGKILL)
        assert made.stdout.read(1) == b""
        if mode is not RATROD2:
            # There a FIN is the end of a direction, also the one that the kernel sends for a killed server: only writing tells.
            with pytest.raises(BrokenPipeError):
                while True:
                    made.write(b"and the other half")
        code, stderr = made.wait()
    assert code == 1 and stderr, stderr


def test_killed_client(stdio, listener):
    """Its target does not take it for the end of what it was to get, or at least learns that nobody is there."""
    made = stdio(ANY, port_of(listener))
    with accept(listener) as target:
        made.write(b"half of")
        assert receive_exactly(target, 7) == b"half of"
        made.process.kill()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            target.recv(1)
            while True:
                target.sendall(BLOCK)


# ---------------------------------------------------------------------------------------------------- what stdin and stdout may be


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


@pytest.mark.parametrize("kind, content", [
    ("file", BLOCK * 3), ("file", b"x"), ("file", b""), ("null", b""), ("pipe", b""), ("pipe", b"all of it"), ("pipe", BLOCK[:65536]),
], ids=lambda value: value if isinstance(value, str) else str(len(value)))
def test_kinds_of_stdin(kind, content, stdio, target):
    """A file and /dev/null are never "ready" for epoll, which does not even take the first; a pipe may be at its end before it is looked at."""
    source = {"file": as_file, "pipe": as_ended_pipe, "null": lambda _: open(os.devnull, "rb")}[kind](content)
    with source:
        made = stdio(ANY, target(answer_with_digest).port, stdin=source)
        assert made.stdout.read() == digest_of(content)
        assert made.wait() == (0, "")


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_stdout_into_a_file(size, stdio, target):
    """All of it is in the file when the program has ended. stdin is at its end from the beginning."""
    content = (BLOCK * 4)[:size]
    with tempfile.TemporaryFile() as out:
        out.write(b"what was there before. ")
        out.flush()
        made = stdio(ANY, target(lambda connection: connection.sendall(content)).port, stdin=DEVNULL, stdout=out)
        assert made.wait() == (0, "")
        out.seek(0)
        assert out.read() == b"what was there before. " + content


def test_file_to_file(stdio, tcp_echo):
    with as_file(BLOCK * 8) as source, tempfile.TemporaryFile() as out:
        made = stdio(ANY, tcp_echo.port, stdin=source, stdout=out)
        assert made.wait() == (0, "")
        out.seek(0)
        assert read_digest(out.read) == hashlib.sha256(BLOCK * 8).hexdigest()


def test_stdout_into_null(stdio, target):
    made = stdio(ANY, target(lambda connection: connection.sendall(BLOCK * 3)).port, stdin=DEVNULL, stdout=DEVNULL)
    assert made.wait() == (0, "")


def test_one_socket_as_both(stdio, tcp_echo):
    """As inetd and ssh's ProxyUseFdpass start programs."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(PATIENCE)
        with theirs:
            made = stdio(ANY, tcp_echo.port, stdin=theirs, stdout=theirs)
        ours.sendall(b"hello")
        assert receive_exactly(ours, 5) == b"hello"
        ours.shutdown(socket.SHUT_WR)
        assert receive_all(ours) == b""
    assert made.wait() == (0, "")


def test_full_disk(stdio, target):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "wb", buffering=0) as full:
        made = stdio(ANY, target(lambda connection: connection.sendall(b"x")).port, stdin=DEVNULL, stdout=full)
        code, stderr = made.wait()
    assert code == 1 and len(stderr.splitlines()) == 1, stderr


@pytest.mark.parametrize("mode, held", [(RATROD2, True), (RATROD2, False), (LEGACY, True), (LEGACY_E, False)],
                         ids=lambda value: getattr(value, "name", "stdin-open" if value else "stdin-ended"))
def test_reader_that_goes_away(mode, held, stdio, listener):
    """`ratrod ... | head -1`: no bug of ours, and no reason to run on or to leave the target sending."""
    made = stdio(mode, port_of(listener), stdin=PIPE if held else DEVNULL)
    with accept(listener) as target:
        target.sendall(b"the first line\n")
        assert made.read(15) == b"the first line\n"
        made.stdout.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                target.sendall(BLOCK)
    code, stderr = made.wait()
    assert code in (1, 141, -signal.SIGPIPE) and len(stderr.splitlines()) <= 1, (code, stderr)


@pytest.mark.parametrize("closed_streams, codes", [("<&-", (0, 1, 2)), (">&-", (1, 2)), ("<&- >&-", (1, 2)), ("<&- >&- 2>&-", (1, 2))])
def test_streams_that_are_closed(closed_streams, codes, serve, keys, target, tmp_path):
    """The next thing that is opened gets the free number. It must not be taken for stdin or stdout: then keys or logs would travel."""
    seen = []
    reads = target(lambda connection: (seen.append(receive_all(connection)), connection.sendall(b"answer")))
    _, port = serve()
    done = subprocess.run(["sh", "-c", 'exec "$@" ' + closed_streams, "sh", *RATROD, "-k", str(keys.client.path), "connect", "127.0.0.1:%d" % port,
                           "stdio:127.0.0.1:%d" % reads.port], stdin=DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert done.returncode in codes and b"Traceback" not in done.stderr, done
    assert done.stdout == (b"" if ">&-" in closed_streams or done.returncode else b"answer")
    assert b"".join(seen) == b""


# ---------------------------------------------------------------------------------------------------- bulk and memory


@every_mode
def test_64_mb_each_way(mode, stdio, listener):
    """At the same time, whole, and in little memory."""
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        made.write(b"!")
        assert receive_exactly(target, 1) == b"!"
        before = memory_before(made)

        def send(write, end):
            for _ in range(64):
                write(BLOCK)
            end()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            senders = [pool.submit(send, made.write, made.stdin.close), pool.submit(send, target.sendall, lambda: None)]
            receivers = [pool.submit(read_digest, target.recv), pool.submit(made.read, 64 * len(BLOCK))]
            for sender in senders:
                sender.result()
            # Before the last end, while the process is still there to be asked.
            grown = peak_growth(made, before)
            target.shutdown(socket.SHUT_WR)
            assert receivers[0].result() == DIGEST_64
            assert hashlib.sha256(receivers[1].result()).hexdigest() == DIGEST_64
        assert made.wait() == (0, "")
    assert grown < 16 << 20, grown


def push_until_stuck(write):
    """Writes to a descriptor that does not block, until for half a second nothing more was taken; (bytes taken, their hash)."""
    digest, sent, last = hashlib.sha256(), 0, None

    def stuck():
        nonlocal sent, last
        before = sent
        with contextlib.suppress(BlockingIOError):
            while sent < 256 << 20:
                piece = memoryview(BLOCK)[sent % len(BLOCK):]
                n = write(piece)
                digest.update(piece[:n])
                sent += n
        # Nothing announces that no room will come any more. Where this is too short, the test is weaker, not wrong.
        last = (last or 0) + 1 if sent == before else 0
        return last >= 25
    eventually(stuck, "it was held up")
    assert sent < 256 << 20, "nothing ever held up the sender"
    return sent, digest.hexdigest()


@every_mode
def test_stdout_that_nobody_reads(mode, stdio, listener):
    """What nobody takes waits in the sockets' own buffers, and then the sender waits."""
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        target.sendall(b"!")
        assert made.read(1) == b"!"
        before = memory_before(made)
        target.setblocking(False)
        sent, digest = push_until_stuck(target.send)
        assert peak_growth(made, before) < 8 << 20
        # And the other direction is not held up.
        target.settimeout(PATIENCE)
        made.write(b"still here")
        assert receive_exactly(target, 10) == b"still here"
        target.shutdown(socket.SHUT_WR)
        made.stdin.close()
        assert read_digest(made.stdout.read) == digest
        assert receive_all(target) == b""
    assert made.wait() == (0, "")
    assert sent > 65536


@every_mode
def test_target_that_does_not_read(mode, stdio, listener):
    made = stdio(mode, port_of(listener))
    with accept(listener) as target:
        made.write(b"!")
        assert receive_exactly(target, 1) == b"!"
        before = memory_before(made)
        os.set_blocking(made.stdin.fileno(), False)
        _, digest = push_until_stuck(lambda piece: os.write(made.stdin.fileno(), piece))
        assert peak_growth(made, before) < 8 << 20
        target.sendall(b"still here")
        assert made.read(10) == b"still here"
        made.stdin.close()
        assert read_digest(target.recv) == digest
    assert made.wait() == (0, "")


# ---------------------------------------------------------------------------------------------------- what fails


def one_error(made, code=1):
    """It has failed with this code: one line on stderr, nothing on stdout."""
    assert made.stdout.read() == b""
    ended, stderr = made.wait()
    assert ended == code and len(stderr.splitlines()) == 1, (ended, stderr)
    return stderr


@pytest.mark.parametrize("mode, held", [(RATROD2, True), (RATROD2, False), (LEGACY, True), (LEGACY_E, False)],
                         ids=lambda value: getattr(value, "name", "stdin-open" if value else "stdin-ended"))
def test_remote_that_refuses(mode, held, stdio, closed):
    made = stdio(mode, closed, stdin=PIPE if held else DEVNULL)
    assert re.search("127.0.0.1:%d.*(?i:refused)" % closed, one_error(made))


def test_remote_that_is_not_allowed(stdio, tcp_echo):
    assert "not allowed by this server" in one_error(stdio(ANY, tcp_echo.port, ("-r", "elsewhere")))
    assert tcp_echo.accepted == 0


def test_remote_that_has_no_address(serve, launch):
    _, port = serve(*ANY.serve)
    assert "nobody.invalid" in one_error(launch(*ANY.connect, "127.0.0.1:%d" % port, "stdio:nobody.invalid:80"))


def test_server_that_is_not_there(launch, closed):
    assert "127.0.0.1:%d" % closed in one_error(launch(*ANY.connect, "127.0.0.1:%d" % closed, "stdio:db:80"))


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


def test_unknown_server_is_never_asked_about(serve, launch, keys):
    """Not even at a terminal: stdin is data."""
    keys.client.write("known_hosts", "")
    _, port = serve(*ANY.serve)
    words = *ANY.connect, "127.0.0.1:%d" % port, "stdio:127.0.0.1:80"
    with terminal() as (ours, theirs):
        # Both without and with a terminal; in the end where all three are one.
        for options in ({}, {"stdin": theirs}, {"stdin": theirs, "stdout": theirs}):
            made = launch(*words, **options)
            code, stderr = made.wait()
            assert code == 3 and len(stderr.splitlines()) == 1 and not QUESTION.search(stderr), stderr
            assert "is not in the known hosts file" in stderr and str(keys.client.path / "known_hosts") in stderr
            assert "%s 127.0.0.1:%d" % (keys.server.public, port) in stderr
        made = launch(*words, stdin=theirs, stdout=theirs, stderr=theirs)
        assert made.process.wait(PATIENCE) == 3
        shown = os.read(ours, 65536).decode()
        assert "is not in the known hosts file" in shown and not QUESTION.search(shown), shown
    assert (keys.client.path / "known_hosts").read_text() == ""


def test_changed_server(serve, launch, keys, tmp_path):
    _, port = serve()
    other = make_keys(tmp_path / "other")
    keys.client.write("known_hosts", "%s 127.0.0.1:%d\n" % (other.public, port))
    assert "HAS CHANGED" in one_error(launch("127.0.0.1:%d" % port, "stdio:127.0.0.1:80"), 3)


def test_client_that_is_not_authorized(serve, launch, keys):
    keys.server.write("authorized_keys", "")
    _, port = serve()
    assert keys.client.public in one_error(launch("127.0.0.1:%d" % port, "stdio:127.0.0.1:80"), 3)


def test_missing_keys_are_never_asked_about(launch, tmp_path, closed):
    with terminal() as (ours, theirs):
        for options in ({}, {"stdin": theirs}, {"stdin": theirs, "stdout": theirs}):
            made = launch("127.0.0.1:%d" % closed, "stdio:127.0.0.1:80", folder=tmp_path / "none", **options)
            code, stderr = made.wait()
            assert code == 2 and str(tmp_path / "none") in stderr and not QUESTION.search(stderr), stderr
        made = launch("127.0.0.1:%d" % closed, "stdio:127.0.0.1:80", folder=tmp_path / "none", stdin=theirs, stdout=theirs, stderr=theirs)
        assert made.process.wait(PATIENCE) == 2
        assert not QUESTION.search(os.read(ours, 65536).decode())
    assert not (tmp_path / "none").exists()


WRONG_LINES = [
    "stdio:", "stdio:80", "stdio:db", "stdio:db:0", "stdio:db:70000", "stdio:db:http", "stdio::80", "stdio:db:80:90", "stdio:socks", "stdio:unix:",
    "stdio:unix:a", "stdio:unix:/a/../b", "stdio:unix:/a:80", "stdio:db:80-82",
    "stdio:db:80 stdio:db:81", "stdio:db:80 stdio:db:80", "0:db:80 stdio:db:80 stdio:unix:/a", "--workers 2 stdio:db:80",
]


def test_command_lines_that_are_wrong(keys):
    outcomes = run_each(["-k", keys.client.path, "connect", "127.0.0.1:9", *line.split()] for line in WRONG_LINES)
    wrong = [(line, outcome) for line, outcome in zip(WRONG_LINES, outcomes) if outcome[0] != 2 or "stdio" not in outcome[1]]
    assert not wrong, wrong


# ---------------------------------------------------------------------------------------------------- beside the data


def test_verbose_goes_to_stderr_only(stdio, tcp_echo):
    made = stdio(ANY, tcp_echo.port, connect_flags=("-v",))
    made.write(b"hello")
    assert made.read(5) == b"hello"
    made.stdin.close()
    assert made.stdout.read() == b""
    code, stderr = made.wait()
    assert code == 0 and "INFO" in stderr and "Challenge accepted!" in stderr and "hello" not in stderr


@every_mode
def test_other_tunnels_beside_it(mode, serve, launch, tcp_echo, listener):
    """They run for as long as stdio does."""
    _, port = serve(*mode.serve)
    made = launch(*mode.connect, "-v", "127.0.0.1:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port, "stdio:127.0.0.1:%d" % port_of(listener))
    with accept(listener) as target:
        eventually(lambda: re.search(LISTENING, made.stderr), lambda: made.stderr)
        local = int(re.search(LISTENING, made.stderr).group(1))
        with socket.create_connection(("127.0.0.1", local), PATIENCE) as connection:
            connection.sendall(b"hello")
            assert receive_exactly(connection, 5) == b"hello"
        made.write(b"and this")
        assert receive_exactly(target, 8) == b"and this"
        made.stdin.close()
        assert target.recv(1) == b""
    assert made.stdout.read() == b""
    assert made.wait()[0] == 0


def test_other_tunnels_are_as_silent(serve, launch, tcp_echo):
    """No line where nothing is wrong, and still the other one's port is served."""
    local = free_port()
    _, port = serve()
    made = launch("127.0.0.1:%d" % port, "%d:127.0.0.1:%d" % (local, tcp_echo.port), "stdio:127.0.0.1:%d" % tcp_echo.port)
    made.write(b"hello")
    assert made.read(5) == b"hello"
    with socket.create_connection(("127.0.0.1", local), PATIENCE) as connection:
        connection.sendall(b"hello")
        assert receive_exactly(connection, 5) == b"hello"
    made.stdin.close()
    assert made.wait() == (0, "")


@every_mode
def test_unix_socket_at_the_server(mode, serve, launch, tmp_path):
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        path = pathlib.Path(short) / "target.sock"
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(PATIENCE)
        _, port = serve(*mode.serve, "-r", "unix:%s" % path)
        made = launch(*mode.connect, "127.0.0.1:%d" % port, "stdio:unix:%s" % path)
        with accept(listener) as target:
            made.write(b"hello")
            assert receive_exactly(target, 5) == b"hello"
            target.sendall(b"and back")
            assert made.read(8) == b"and back"
        made.stdin.close()
        assert made.wait() == (0, "")


@pytest.mark.parametrize("sign, codes", [(signal.SIGINT, (130,)), (signal.SIGTERM, (0, 143))], ids=["SIGINT", "SIGTERM"])
def test_signals(sign, codes, stdio, listener):
    """While both directions wait, in whatever call it waits."""
    made = stdio(ANY, port_of(listener))
    with accept(listener) as target:
        target.sendall(b"!")
        assert made.read(1) == b"!"
        made.process.send_signal(sign)
        code, stderr = made.wait()
        assert code in codes and stderr == "", (code, stderr)
        assert made.stdout.read() == b""


def test_signal_while_stdout_is_stuck(stdio, listener):
    """Nobody reads stdout: a write that blocks must not keep the program from ending."""
    made = stdio(ANY, port_of(listener))
    with accept(listener) as target:
        target.setblocking(False)
        push_until_stuck(target.send)
        made.process.send_signal(signal.SIGINT)
        assert made.wait()[0] == 130


def test_interrupted_while_connecting(launch):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(PATIENCE)
        made = launch("127.0.0.1:%d" % port_of(mute), "stdio:db:80")
        with accept(mute) as connection:
            assert connection.recv(1)
            made.process.send_signal(signal.SIGINT)
            assert made.wait()[0] == 130


# ---------------------------------------------------------------------------------------------------- terminals, and what is shared


def make_controlling():
    """In the child: stdin's terminal becomes the one whose Ctrl-C it gets."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_terminal(ours, wanted):
    seen = b""
    while wanted not in seen:
        seen += os.read(ours, 65536)
    return seen


def test_at_a_terminal(stdio, tcp_echo):
    """Typed by hand, as `nc` is used: lines go and come, and Ctrl-D is the end."""
    with terminal() as (ours, theirs):
        before = termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)
        made = stdio(ANY, tcp_echo.port, stdin=theirs, stdout=theirs, preexec_fn=make_controlling)
        os.write(ours, b"hello\n")
        # Once by the terminal itself, once by the target.
        assert read_terminal(ours, b"hello\r\nhello\r\n") == b"hello\r\nhello\r\n"
        os.write(ours, b"\x04")
        assert made.wait() == (0, "")
        assert (termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)) == before


def test_target_that_speaks_first_at_a_terminal(stdio, listener):
    """Nothing has been typed: whoever waits for that hears nothing. And Ctrl-C works all the while."""
    with terminal() as (ours, theirs):
        before = termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)
        made = stdio(ANY, port_of(listener), stdin=theirs, stdout=theirs, preexec_fn=make_controlling)
        with accept(listener) as target:
            target.sendall(b"220 ready\n")
            read_terminal(ours, b"220 ready\r\n")
            os.write(ours, b"\x03")
            assert made.wait()[0] == 130
        assert (termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)) == before


def test_ctrl_c_at_a_terminal(stdio, tcp_echo):
    with terminal() as (ours, theirs):
        before = termios.tcgetattr(theirs), fcntl.fcntl(theirs, fcntl.F_GETFL)
        made = stdio(ANY, tcp_echo.port, stdin=theirs, stdout=theirs, preexec_fn=make_controlling)
        os.write(ours, b"hello\n")
        read_terminal(ours, b"hello\r\nhello\r\n")
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


@pytest.mark.parametrize("kind, end", [
    (as_pipes, "refused"), (as_pipes, "reset"), (as_pipes, "SIGINT"), (as_pipes, "SIGTERM"),
    (as_sockets, "reset"), (as_sockets, "SIGINT"), (as_terminals, "refused"), (as_terminals, "reset"), (as_terminals, "SIGTERM"),
], ids=lambda value: getattr(value, "__name__", value))
def test_no_flag_is_left_behind(kind, end, stdio, listener, closed):
    """O_NONBLOCK belongs to the open file, which a shell and every other program on the same terminal or pipe share."""
    theirs, ours = kind()
    try:
        before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in theirs]
        made = stdio(ANY, closed if end == "refused" else port_of(listener), stdin=theirs[0], stdout=theirs[1])
        if end != "refused":
            target = accept(listener)
            target.sendall(b"!")
            assert os.read(ours[-1], 1) == b"!"
            if end == "reset":
                reset(target)
            else:
                made.process.send_signal(getattr(signal, end))
        made.process.wait(PATIENCE)
        if end in ("SIGINT", "SIGTERM"):
            target.close()
        assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in theirs] == before
    finally:
        for fd in theirs + ours:
            os.close(fd)


# ---------------------------------------------------------------------------------------------------- through ssh


class Ssh:
    """A real sshd on a port of loopback, and the ssh command that reaches it through a ProxyCommand."""

    def __init__(self, port, folder):
        self._words = [need("ssh"), "-F", "none", "-p", str(port)]
        for option in ("BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none", "HostKeyAlias=test", "LogLevel=ERROR", "ControlPath=none",
                       "UserKnownHostsFile=%s" % (folder / "known"), "IdentityFile=%s" % (folder / "user"), "ConnectTimeout=30"):
            self._words += ["-o", option]

    def run(self, proxy, *words, **options):
        """ssh with this ProxyCommand (words, of which the last may hold %h and %p)."""
        command = " ".join(shlex.quote(str(word)) for word in proxy)
        return subprocess.Popen([*self._words, "-o", "ProxyCommand=" + command, "%s@127.0.0.1" % getpass.getuser(), *words], stdout=PIPE, stderr=PIPE,
                                **{"stdin": DEVNULL, **options})


@pytest.fixture
def ssh(start, tmp_path):
    sshd, keygen = need("sshd"), need("ssh-keygen")
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "known").write_text("test %s" % (folder / "host.pub").read_text())
    if not os.geteuid():
        # What Debian makes when its own sshd starts, and without which none starts as root. It stays: another test may need it just now.
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    port = free_port()
    (folder / "config").write_text("\n".join((
        "Port %d" % port, "ListenAddress 127.0.0.1", "HostKey %s" % (folder / "host"), "AuthorizedKeysFile %s" % (folder / "user.pub"),
        "PidFile none", "UsePAM no", "StrictModes no", "UseDNS no", "PermitRootLogin yes", "PasswordAuthentication no")) + "\n")
    start(sshd, "-D", "-e", "-f", folder / "config").wait_for("Server listening on")
    return Ssh(port, folder)


@pytest.fixture
def proxy(serve, keys):
    """proxy(mode, connect flags...) -> the words of a ProxyCommand, its server running."""
    def launch(mode, *flags):
        _, port = serve(*mode.serve)
        return (*RATROD, "-k", keys.client.path, "connect", *mode.connect, *flags, "127.0.0.1:%d" % port, "stdio:%h:%p")
    return launch


@every_mode
def test_ssh(mode, ssh, proxy):
    words = proxy(mode)
    for command, code, shown in (("true", 0, b""), ("echo hello", 0, b"hello\n"), ("exit 7", 7, b"")):
        with ssh.run(words, command) as process:
            out, err = process.communicate(timeout=PATIENCE)
        # ssh hands its stderr to the ProxyCommand: what that says, a user sees.
        assert (process.returncode, out, without_legacys_warning(err.decode())) == (code, shown, "")


@every_mode
def test_ssh_bulk(mode, ssh, proxy, tmp_path):
    """50 MB up, then 50 MB down, then both ways at once."""
    words, file = proxy(mode), tmp_path / "file"
    with open(str(file), "wb") as out:
        for _ in range(50):
            out.write(BLOCK)
    digest = hashlib.sha256(BLOCK * 50).hexdigest()
    with open(str(file), "rb") as source, ssh.run(words, "sha256sum", stdin=source) as up:
        assert up.communicate(timeout=PATIENCE * 2)[0].split()[0].decode() == digest
    with ssh.run(words, "cat %s" % shlex.quote(str(file))) as down:
        assert read_digest(down.stdout.read) == digest
        assert down.wait(PATIENCE) == 0
    with open(str(file), "rb") as source, ssh.run(words, "cat", stdin=source) as both:
        assert read_digest(both.stdout.read) == digest
        assert both.wait(PATIENCE) == 0 and without_legacys_warning(both.stderr.read().decode()) == ""


def test_ssh_shows_why_it_cannot_connect(ssh, proxy, keys):
    words = proxy(ANY)
    keys.client.write("known_hosts", "")
    with ssh.run(words, "true") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 255 and out == b"" and b"is not in the known hosts file" in err, err


def test_five_ssh_at_once(ssh, proxy):
    """Each has a client of its own, and all of them the same key."""
    words = proxy(ANY)
    running = [ssh.run(words, "echo %d; cat" % n, stdin=PIPE) for n in range(5)]
    try:
        for n, process in enumerate(running):
            assert process.stdout.readline() == b"%d\n" % n
        for process in running:
            assert process.communicate(b"bye", timeout=PATIENCE) == (b"bye", b"")
            assert process.returncode == 0
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()
