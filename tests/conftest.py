"""What every test file shares: the real program as a subprocess, key folders, targets, and a whole tunnel.

Nothing here imports ratrod: keys and targets are made by other means, so that a mistake in the module cannot hide in the tests' own set-up.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import ctypes
import hashlib
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Another Python may run the programs than the tests: one of musl's, with which not every package that the tests need works.
PYTHON = os.environ.get("RATROD_TEST_PYTHON") or sys.executable
SCRIPT = PYTHON, str(ROOT / "ratrod.py")


def compiled():
    """ratrod.py as that Python's bytecode. A script is compiled at each start, 0.2 s, which was most of what the whole suite cost."""
    folder = tempfile.mkdtemp(prefix="ratrod-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chmod(folder, 0o755)  # also for the programs that run as somebody else
    file = os.path.join(folder, "ratrod.pyc")
    subprocess.run([PYTHON, "-c", "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)", SCRIPT[1], file, file], check=True)
    return file


RATROD = PYTHON, compiled()
CACHE = pathlib.Path(os.environ.get("RATROD_TEST_CACHE") or pathlib.Path.home() / ".cache" / "ratrod-tests")
RUST = CACHE / "rust" / "bin" / "ratrod"
# The longest that any awaited event may take. Generous: it bounds a hang on a busy machine and measures nothing.
PATIENCE = 30.0
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
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


def missing(what):
    """A real peer that is not there: a failure in CI, where all are required, and a visible skip elsewhere."""
    if os.environ.get("RATROD_REQUIRE_PEERS"):
        pytest.fail("%s is required here (RATROD_REQUIRE_PEERS is set) and is missing" % what)
    pytest.skip("%s is not on this machine" % what)


def need(program):
    return shutil.which(program) or missing(program)


# ---------------------------------------------------------------------------------------------------- the program


class Program:
    """A running program whose output (both streams, one list of lines) a test can await and search."""

    def __init__(self, command, **options):
        self.lines = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        **{"stdin": subprocess.DEVNULL, **options})
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

    def wait_for(self, pattern, count=1):
        """The match of the count-th line (from the start of the output) that has `pattern`; fails when the program ends without it."""
        def found():
            matches = [match for match in (re.search(pattern, line) for line in self.lines) if match]
            return matches[count - 1] if len(matches) >= count else None
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, PATIENCE)
            match = found()
        assert match, "no line %r%s in:\n%s" % (pattern, "" if count == 1 else " (%d times)" % count, self.output)
        return match

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


@pytest.fixture
def start():
    """start(command words...) -> Program, ended at the end of the test."""
    with contextlib.ExitStack() as stack:
        def launch(*command, **options):
            program = Program(command, **options)
            launch.programs.append(program)
            stack.callback(lambda: program.process.poll() is None and program.stop())
            return program
        launch.programs = []
        yield launch


@pytest.fixture
def no_traceback(start):
    """For whole files: no program of the test, whatever was done to it, may have shown a mistake of its own when it has ended."""
    yield
    for program in start.programs:
        program.stop()
        assert not re.search("Traceback|internal error", program.output), program.output


@pytest.fixture
def ratrod(start):
    """ratrod(words...) -> Program: ours, from this checkout."""
    def launch(*words, **options):
        return start(*RATROD, *words, **options)
    return launch


@pytest.fixture
def rust(start):
    """rust(words...) -> Program: the original, Rust ratrod 0.6.3, real binary (it prints its log to stdout)."""
    if not RUST.exists():
        missing("Rust ratrod 0.6.3 (RUSTC_BOOTSTRAP=1 cargo install ratrod --version 0.6.3 --root %s)" % (CACHE / "rust"))
    def launch(*words, **options):
        return start(RUST, *words, **options)
    return launch


# ---------------------------------------------------------------------------------------------------- keys


class Keys(NamedTuple):
    """A key folder: its path, and the public key as its 43 characters."""

    path: pathlib.Path
    public: str

    def trust(self, other, file):
        with open(self.path / file, "a") as lines:
            lines.write(other.public + "\n")

    def write(self, file, text, encoding=None):
        """What the file says from now on. By renaming: a program that runs sees it neither empty, half written nor unchanged."""
        new = self.path / "new"
        with open(new, "w", encoding=encoding, newline="") as lines:
            lines.write(text)
        os.replace(new, self.path / file)


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_keys(path, seed=None):
    """A key folder in the original's format, written by the `cryptography` package: not by the code under test."""
    private = Ed25519PrivateKey.from_private_bytes(seed) if seed else Ed25519PrivateKey.generate()
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    public = private.public_key().public_bytes(*raw)
    seed = private.private_bytes(serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
    path.mkdir(mode=0o700, parents=True)
    (path / "key").touch(mode=0o600)
    (path / "key").write_text(base64url(bytes.fromhex("3051020101300506032b657004220420") + seed + bytes.fromhex("812100") + public))
    (path / "key.pub").write_text(base64url(public))
    (path / "known_hosts").touch(mode=0o600)
    (path / "authorized_keys").touch(mode=0o600)
    return Keys(path, base64url(public))


def seed_of(keys):
    """The 32 private bytes in a key folder, from the known place in its file."""
    text = (keys.path / "key").read_text()
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[16:48]


class KeyPairs(NamedTuple):
    server: Keys
    client: Keys


@pytest.fixture
def keys(tmp_path):
    """A server's and a client's key folder that trust each other."""
    pair = KeyPairs(make_keys(tmp_path / "server"), make_keys(tmp_path / "client"))
    pair.server.trust(pair.client, "authorized_keys")
    pair.client.trust(pair.server, "known_hosts")
    return pair


@pytest.fixture
def second(keys, tmp_path):
    """Another client that the server knows."""
    made = make_keys(tmp_path / "second")
    made.trust(keys.server, "known_hosts")
    keys.server.trust(made, "authorized_keys")
    return made


# ---------------------------------------------------------------------------------------------------- targets


class Target:
    """A TCP server on a free port: handle(connection) runs on a thread for each connection, which is closed after it."""

    def __init__(self, handle, host="127.0.0.1"):
        self._start(handle, socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1000))
        self.port = port_of(self._listener)

    def _start(self, handle, listener):
        self._handle, self._listener = handle, listener
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            self._handle(connection)

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class UnixTarget(Target):
    """The same on a Unix socket."""

    def __init__(self, handle, path):
        self.path = str(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(100)
        self._start(handle, listener)


@pytest.fixture
def target():
    """target(handle, host="127.0.0.1") -> Target, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        def launch(handle, host="127.0.0.1"):
            made = Target(handle, host)
            stack.callback(made.close)
            return made
        yield launch


def echo(connection):
    """Sends back what comes until the peer's end of file; then ends too."""
    while True:
        data = connection.recv(65536)
        if not data:
            return
        connection.sendall(data)


@pytest.fixture
def tmux(tmp_path):
    """tmux(words...) -> what that command of a tmux of this test's own prints; it ends with the test, and leaves nothing."""
    name = "ratrod-%d-%s" % (os.getpid(), tmp_path.name[-20:])
    program = need("tmux")

    def run(*words):
        return subprocess.run([program, "-L", name, "-f", "/dev/null", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
                              env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}).stdout.decode()
    yield run
    run("kill-server")
    with contextlib.suppress(FileNotFoundError):
        (pathlib.Path(os.environ.get("TMUX_TMPDIR") or "/tmp") / ("tmux-%d" % os.getuid()) / name).unlink()


@pytest.fixture
def closed():
    """A port of 127.0.0.1 where nobody listens, and that nobody else gets."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield port_of(made)


@pytest.fixture
def tcp_echo(target):
    return target(echo)


@pytest.fixture
def listener():
    """A bare target: connections to it wait for the test to accept them."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as made:
        made.settimeout(PATIENCE)
        yield made


class UdpEcho:
    """A UDP echo on a free port of `host`; `seen` counts the datagrams."""

    def __init__(self, host="127.0.0.1"):
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.port = self.socket.getsockname()[1]
        self.seen = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                data, address = self.socket.recvfrom(65536)
                if address[1] == self.port:
                    return
                self.seen += 1
                self.socket.sendto(data, address)
            except OSError:
                return

    def close(self):
        # A datagram to itself ends the thread: closing alone does not wake a blocked recvfrom.
        with contextlib.suppress(OSError):
            self.socket.sendto(b"", self.socket.getsockname())
        self.socket.close()


@pytest.fixture
def udp_echo():
    made = UdpEcho()
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------- a whole tunnel


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


@pytest.fixture
def serve(ratrod, keys):
    """serve(flags...) -> (Program, port): our server on a free loopback port."""
    def launch(*flags, bind="127.0.0.1:0", **options):
        server = ratrod("-k", keys.server.path, "serve", *flags, bind, **options)
        return server, int(server.wait_for(STARTED).group(1))
    return launch


@pytest.fixture
def connect(ratrod, keys):
    """connect(server_port, words...) -> Program: our client, not yet awaited."""
    def launch(server_port, *words, **options):
        return ratrod("-k", keys.client.path, "connect", *words[:-1], "127.0.0.1:%d" % server_port, *words[-1:], **options) if words else \
            ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % server_port, **options)
    return launch


@pytest.fixture
def tunnel(serve, connect):
    """tunnel(target_port, mode, serve=(), connect=()) -> Tunnel to 127.0.0.1:target_port, its test connection made."""
    def launch(target_port, mode, serve_flags=(), connect_flags=(), host="127.0.0.1"):
        server, server_port = serve(*mode.serve, *serve_flags)
        client = connect(server_port, *mode.connect, *connect_flags, "0:%s:%d" % (host, target_port))
        client.wait_for(READY)
        return Tunnel(server, client, server_port, int(client.wait_for(LISTENING).group(1)))
    return launch


def receive_all(connection):
    """What comes until the end of file, as bytes."""
    chunks = []
    while True:
        chunk = connection.recv(1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def receive_exactly(connection, n):
    chunks = []
    while n:
        chunk = connection.recv(min(n, 1 << 20))
        assert chunk, "the connection ended %d bytes too early" % n
        chunks.append(chunk)
        n -= len(chunk)
    return b"".join(chunks)


@pytest.fixture
def forward(serve, ratrod, keys):
    """forward(mode, TUNNEL words..., serve_flags=(), connect_flags=()) -> (server, client): any tunnels, the test connection made."""
    def launch(mode, *tunnels, serve_flags=(), connect_flags=()):
        server, port = serve(*mode.serve, *serve_flags)
        client = ratrod("-k", keys.client.path, "connect", *mode.connect, *connect_flags, "127.0.0.1:%d" % port, *tunnels)
        client.wait_for(READY)
        return server, client
    return launch


def tcp_port(client, n=1):
    """The port of the client's n-th TCP listener."""
    return int(client.wait_for(LISTENING, n).group(1))


def udp_port(client, n=1):
    """The port of the client's n-th UDP listener."""
    return int(client.wait_for(UDP_LISTENING, n).group(1))


def udp_originator(client, n=1):
    """A socket that is connected to the client's n-th UDP listener."""
    port = udp_port(client, n)
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(PATIENCE)
    made.connect(("127.0.0.1", port))
    return made


def port_of(sock):
    return sock.getsockname()[1]


def free_port(n=1):
    """The first of `n` ports in a row that are free for TCP and UDP: for what cannot say which one it got for port 0, and for where nobody
    is to be. None of those that the system gives out by itself, 32768 and up: one of these soon belongs to another worker's test."""
    for _ in range(1000):
        first = random.SystemRandom().randrange(10000, 32000)  # hypothesis seeds the common one
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + n):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    stack.enter_context(socket.socket(socket.AF_INET, kind)).bind(("", port))
            return first
    raise AssertionError("no %d free ports in a row" % n)


def dial(port, host="127.0.0.1"):
    return socket.create_connection((host, port), timeout=PATIENCE)


def dial_with(data, client, port):
    """A connection to `client`, whose `data` is there when it accepts: on a busy machine it could come so late that Open leaves without it."""
    client.process.send_signal(signal.SIGSTOP)
    try:
        connection = dial(port)
        connection.sendall(data)
    finally:
        client.process.send_signal(signal.SIGCONT)
    return connection


def ask_over(connection, question=b"anybody there?"):
    """A whole exchange with an echo: question, end, answer, end."""
    with connection:
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == question


def ask(port, question=b"anybody there?", host="127.0.0.1"):
    """A whole connection to an echo."""
    ask_over(dial(port, host), question)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_refused(port):
    """A connection to `port` is taken and reset at once, nothing having been sent."""
    with pytest.raises(ConnectionResetError):
        with dial(port) as connection:
            connection.recv(1)


def check_half_close(ended, other):
    """`ended` ends its direction. It still receives, for as long as the other side of the connection has something to say."""
    ended.sendall(b"that is all")
    ended.shutdown(socket.SHUT_WR)
    assert receive_all(other) == b"that is all"
    for size in (1, 1000, 50000):
        block = os.urandom(size)
        other.sendall(block)
        assert receive_exactly(ended, size) == block
    other.close()
    assert ended.recv(1) == b""


def check_bulk_each_way(ends):
    """24 MB in each direction of a connection, at the same time; both arrive whole, and end."""
    # Random, and of a length that divides nothing: a lost, doubled or misplaced piece changes the hash.
    block = os.urandom((1 << 20) - 3)

    def send(connection):
        for _ in range(24):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)

    def receive(connection):
        digest = hashlib.sha256()
        for chunk in iter(lambda: connection.recv(1 << 20), b""):
            digest.update(chunk)
        return digest.hexdigest()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        senders, receivers = [pool.submit(send, end) for end in ends], [pool.submit(receive, end) for end in ends]
        assert {receiver.result() for receiver in receivers} == {hashlib.sha256(block * 24).hexdigest()}
        for sender in senders:
            sender.result()


def is_ready(sock, event, timeout):
    """Whether `event` (selectors.EVENT_READ or EVENT_WRITE) comes on `sock` within so many seconds. select() takes descriptors up to 1023."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        return bool(selector.select(timeout))


def eventually(condition, what):
    """Polls for a state that announces itself by no event."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "never came true: %s" % (what() if callable(what) else what,)
        time.sleep(0.02)


def descriptors(program):
    """How many file descriptors the program has open."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc on this system")
    return len(os.listdir("/proc/%d/fd" % program.process.pid))


# ---------------------------------------------------------------------------------------------------- another machine


class Namespace(NamedTuple):
    """A network namespace behind a pair of virtual cables: as good as another machine. `address` is its own on that cable."""

    name: str
    address: str

    @property
    def command(self):
        """What to put before a command so that it runs inside."""
        return "ip", "netns", "exec", self.name

    def make(self, function, *args):
        """The result of function(*args), called inside: a socket made there stays there."""
        def inside():
            with open("/run/netns/" + self.name) as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "setns")
            return function(*args)
        # On a thread of its own, which ends: setns moves one thread for good.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result()


@pytest.fixture
def namespace():
    """A Namespace of this test's own, removed after it."""
    need("ip")
    name, cable = "rt%d" % os.getpid(), "rt%dv" % os.getpid()
    # A /30 from 198.18.0.0/16, which is set aside for test benches.
    network = "198.18.%d.%d" % (os.getpid() // 64 % 256, os.getpid() % 64 * 4)
    outer, inner = ("%s.%d" % (network.rpartition(".")[0], int(network.rpartition(".")[2]) + n) for n in (1, 2))

    def ip(*words, check=True):
        return subprocess.run(["ip", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=check).returncode == 0

    if not ip("netns", "add", name, check=False):
        missing("permission to make a network namespace")
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", outer + "/30", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "addr", "add", inner + "/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield Namespace(name, inner)
    finally:
        ip("link", "del", cable, check=False)
        ip("netns", "del", name, check=False)
