"""The fixtures that every test file shares: programs, key folders, targets, whole tunnels, and another machine."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile

import pytest

from support import ratrod2_peer as peer
from support.keys import KeyPairs, identity_of, make_keys, seed_of
from support.namespaces import Namespace
from support.programs import CACHE, PATIENCE, RATROD, RUST, STARTED, Program, Tunnel, missing, need, tcp_port
from support.resolver import Resolver
from support.sockets import free_port, port_of
from support.sshd import Sshd
from support.targets import Target, UdpEcho, UdpRemote, UnixTarget, echo

# A shell without job control (`.ci/run &`) has its children ignore Ctrl-C, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config):
    """Most tests wait for processes, not for a processor. Those of unit/ wait for nothing, and each worker imports everything anew."""
    are_unit = all("unit" in pathlib.Path(word.split("::")[0]).parts for word in config.args)
    return min(8, os.cpu_count() or 1) if are_unit else 8


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
def on_free_port(start):
    """on_free_port(command(port), pattern) -> port: for programs that take no port 0."""
    def launch(command, pattern):
        port = free_port()
        start(*command(port)).wait_for(pattern)
        return port
    return launch


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
    return lambda *words, **options: start(*RATROD, *words, **options)


@pytest.fixture
def rust(start):
    """rust(words...) -> Program: the original, Rust ratrod 0.6.3, real binary (it prints its log to stdout)."""
    if not RUST.exists():
        missing("Rust ratrod 0.6.3 (RUSTC_BOOTSTRAP=1 cargo install ratrod --version 0.6.3 --root %s)" % (CACHE / "rust"))
    return lambda *words, **options: start(RUST, *words, **options)


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


@pytest.fixture
def stranger(tmp_path):
    """Keys that nobody trusts, and which trust nobody."""
    return make_keys(tmp_path / "stranger")


@pytest.fixture
def target():
    """target(handle, host="127.0.0.1") -> Target, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        def launch(handle, host="127.0.0.1"):
            made = Target(handle, host)
            stack.callback(made.close)
            return made
        yield launch


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


@pytest.fixture
def stack():
    """Whatever a test opens, closed after it."""
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def short():
    """A folder whose path is short: a socket's may have 100 bytes, which pytest's own folders nearly use up."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:
        yield pathlib.Path(folder)


@pytest.fixture
def unix_echo(short, stack):
    return stack.enter_context(contextlib.closing(UnixTarget(echo, short / "echo.sock")))


@pytest.fixture
def remote(stack):
    """A UDP target in the hands of the test."""
    return stack.enter_context(contextlib.closing(UdpRemote()))


@pytest.fixture
def udp_echo(stack):
    return stack.enter_context(contextlib.closing(UdpEcho()))


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
        return ratrod("-k", keys.client.path, "connect", *words[:-1], "127.0.0.1:%d" % server_port, *words[-1:], **options)
    return launch


@pytest.fixture
def client(ratrod, keys):
    """client(server_port, TUNNEL words..., who=Keys, flags=()) -> Program: our client with any number of tunnels, not yet awaited."""
    def launch(server_port, *tunnels, who=None, flags=()):
        return ratrod("-k", (who or keys.client).path, "connect", *flags, "127.0.0.1:%d" % server_port, *tunnels)
    return launch


@pytest.fixture
def tunnel(forward):
    """tunnel(target_port, mode, serve=(), connect=()) -> Tunnel to 127.0.0.1:target_port, its test connection made."""
    def launch(target_port, mode, serve_flags=(), connect_flags=(), host="127.0.0.1"):
        server, client = forward(mode, "0:%s:%d" % (host, target_port), serve_flags=serve_flags, connect_flags=connect_flags)
        return Tunnel(server, client, int(server.wait_for(STARTED).group(1)), tcp_port(client))
    return launch


@pytest.fixture
def forward(serve, client):
    """forward(mode, TUNNEL words..., serve_flags=(), connect_flags=()) -> (server, client): any tunnels, the test connection made."""
    def launch(mode, *tunnels, serve_flags=(), connect_flags=()):
        server, port = serve(*mode.serve, *serve_flags)
        return server, client(port, *tunnels, flags=(*mode.connect, *connect_flags)).ready()
    return launch


@pytest.fixture
def link(serve, keys, stack):
    """link(who=Keys, flags=()) -> a link of the independent client to our server (`link.server`, at `link.port`), which the first call starts."""
    def make(who=None, flags=(), **options):
        if not hasattr(make, "port"):
            make.server, make.port = serve("-v", *flags)
        made = peer.Client.connect(make.port, seed_of(who or keys.client), server=identity_of(keys.server), **options)
        return stack.enter_context(made).handshake()
    return make


@pytest.fixture
def resolver(tmp_path):
    """resolver(db_example=["127.0.0.1"]) -> Resolver, whose `environment` makes a program look these names up."""
    made = []
    def launch(**names):
        made.append(Resolver(tmp_path / ("resolver%d" % len(made)), {name.replace("_", "."): addresses for name, addresses in names.items()}))
        return made[-1]
    yield launch
    for resolver in made:
        resolver.release()


@pytest.fixture
def sshd(start, tmp_path):
    """sshd(lines of its configuration..., programs=PATH) -> Sshd"""
    if os.geteuid() or not Sshd.PROGRAM:
        missing("sshd, and root, who can run one")
    made = []
    def launch(*options, **more):
        made.append(Sshd(start, tmp_path / ("sshd%d" % len(made)), *options, **more))
        return made[-1]
    yield launch
    # The clients first: a session that one holds open outlives its sshd, and goes on writing to the same pipe.
    for program in start.programs:
        if program not in [far.program for far in made]:
            program.stop()
    for far in made:
        far.kill()


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
