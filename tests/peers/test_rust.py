"""Both ends against the original, Rust ratrod 0.6.3, the real binary; and the proof that legacy_peer.py speaks its wire."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess

import pytest

from support import legacy_peer
from support.programs import READY, tcp_port, udp_originator
from support.rows import row
from support.sockets import ask, ask_udp, dial, dial_udp, eventually, free_port, ping, receive_all, receive_exactly, refused, say

pytestmark = pytest.mark.usefixtures("no_traceback")

every_encryption = pytest.mark.parametrize("flags", [(), ("-e",)], ids=["plain", "encrypted"])
# Random, and of a length that divides nothing: a lost, doubled or misplaced piece changes the hash.
BULK = os.urandom(5_000_003)


@pytest.fixture
def rust_serve(rust, keys):
    """rust_serve(flags...) -> (Program, port): the original's server, listening."""
    def launch(*flags):
        port = free_port()
        server = rust("-k", keys.server.path, "serve", *flags, "127.0.0.1:%d" % port)
        # It logs its start before it binds, so nothing but a connection tells that it listens.
        eventually(lambda: not refused(port), lambda: server.output)
        return server, port
    return launch


@pytest.fixture
def rust_connect(rust, keys):
    """rust_connect(server_port, remotes, flags...) -> (Program, the first of its local ports in a row), all of its listeners up."""
    def launch(server_port, remotes, *flags, folder=None):
        first = free_port(len(remotes))
        client = rust("-k", folder or keys.client.path, "connect", *flags, "127.0.0.1:%d" % server_port,
                      *["%d:%s" % (port, remote) for port, remote in enumerate(remotes, first)])
        client.wait_for(r"\[TCP\] Listening on", len(remotes))
        client.wait_for(r"\[UDP\] Listening on", len(remotes))
        return client, first
    return launch


@pytest.fixture
def our_connect(ratrod, keys):
    """our_connect(server_port, remotes, flags...) -> Program, not yet awaited."""
    def launch(server_port, remotes, *flags, folder=None):
        return ratrod("-k", folder or keys.client.path, "connect", "--legacy", *flags, "127.0.0.1:%d" % server_port, *["0:" + one for one in remotes])
    return launch


@pytest.fixture(params=["our client, rust server", "rust client, our server"])
def mixed(request, serve):
    """mixed(remote ports, flags) -> the local ports of tunnels with one end of each kind; `mixed.ours` is which of them is ours."""
    def launch(remote_ports, flags=()):
        remotes = ["127.0.0.1:%d" % port for port in remote_ports]
        if launch.ours == "client":
            _, server_port = request.getfixturevalue("rust_serve")()
            client = request.getfixturevalue("our_connect")(server_port, remotes, *flags)
            client.wait_for(READY)
            return [tcp_port(client, n) for n in range(1, len(remotes) + 1)]
        _, server_port = serve("--legacy")
        client, port = request.getfixturevalue("rust_connect")(server_port, remotes, *flags)
        # Once its test connection is made the server knows where an authorized client lives, and takes a hundred connections at once from
        # there; of a stranger it takes eight.
        client.wait_for(READY)
        return list(range(port, port + len(remotes)))
    launch.ours = request.param.partition(" ")[2].partition(",")[0] if request.param.startswith("our") else "server"
    return launch


@pytest.fixture
def udp_socket(stack):
    def launch(port):
        return stack.enter_context(dial_udp(port))
    return launch


def assert_gets_nothing(port):
    """A connection to `port` ends or is reset; a reset may be there before connect() returns."""
    with contextlib.suppress(ConnectionResetError), dial(port) as local:
        assert receive_all(local) == b""


def test_legacy_peer_as_client(rust_serve, keys, tcp_echo, udp_echo):
    # test_bad_input.py judges by legacy_peer.py: this, and the next, are what make it a judge.
    _, port = rust_serve()
    for encrypt in (False, True):
        for cls, target in ((legacy_peer.Data, tcp_echo), (legacy_peer.UdpData, udp_echo)):
            with row((encrypt, cls.__name__)):
                identity, udp = legacy_peer.Identity.load(keys.client.path), cls is legacy_peer.UdpData
                with legacy_peer.Client(dial(port), identity, "127.0.0.1:%d" % target.port, encrypt=encrypt, udp=udp) as peer:
                    peer.handshake()
                    for payload in (b"small", os.urandom(300), os.urandom(60000)):
                        peer.send(cls(payload))
                        assert peer.expect_data(len(payload), cls) == payload
                    peer.end()
                    assert udp or peer.receive() is None


@every_encryption
def test_legacy_peer_as_server(rust_connect, keys, target, udp_socket, flags):
    identity = legacy_peer.Identity.load(keys.server.path)
    server = target(lambda connection: legacy_peer.Server(connection, identity).echo())
    client, port = rust_connect(server.port, ["127.0.0.1:9"], *flags)
    client.wait_for(READY)
    with dial(port) as local:
        payload = os.urandom(60000)
        ping(local, word=payload)
    local = udp_socket(port)
    ask_udp(local, b"datagram")


@every_encryption
def test_traffic(mixed, tcp_echo, target, udp_echo, udp_socket, stack, flags):
    def answer_after_the_end(connection):
        connection.sendall(b"answer to " + receive_all(connection))
    got = []
    def end_at_once(connection):
        say(connection, b"greeting")
        got.append(receive_all(connection))
    def bulk(connection):
        connection.sendall(hashlib.sha256(receive_all(connection)).digest() if mixed.ours == "client" else BULK)
    echoing, answering, ending, bulky, udp = mixed([tcp_echo.port, *(target(handle).port for handle in (answer_after_the_end, end_at_once, bulk)),
                                                    udp_echo.port], flags)
    for size in (1, 1000, 100000):
        with dial(echoing) as local:
            payload = os.urandom(size)
            ping(local, word=payload)
            local.shutdown(socket.SHUT_WR)
            assert receive_all(local) == b""
    with row("the client ends first and still receives"), dial(answering) as local:
        say(local, b"question")
        assert receive_all(local) == b"answer to question"
    with row("the remote ends first and still receives"), dial(ending) as local:
        assert receive_all(local) == b"greeting"
        say(local, b"thanks")
        # Nothing more can come back through the tunnel, so only the target can tell that it arrived (and the connection test may have come before).
        eventually(lambda: b"thanks" in got, got)
    # Only where our end reads the local socket: a Rust end whose read fills its buffer makes a message that its own frame cannot hold.
    with row("bulk"), dial(bulky) as local:
        if mixed.ours == "client":
            say(local, BULK)
            assert receive_all(local) == hashlib.sha256(BULK).digest()
        else:
            assert hashlib.sha256(receive_all(local)).digest() == hashlib.sha256(BULK).digest()
    for size in (0, 1, 1200, 65507):
        with row("datagrams of %d bytes" % size):
            local, payload = udp_socket(udp), os.urandom(size)
            for _ in range(3):
                ask_udp(local, payload)
    with row("originators are kept apart"):
        one, two = udp_socket(udp), udp_socket(udp)
        one.send(b"one")
        two.send(b"two")
        assert (one.recv(100), two.recv(100)) == (b"one", b"two")
    with row("100 connections at once"):
        many = [stack.enter_context(dial(echoing)) for _ in range(100)]
        for n, local in enumerate(many):
            local.sendall(b"connection %03d" % n)
        for n, local in enumerate(many):
            assert receive_exactly(local, 14) == b"connection %03d" % n


def test_udp_comes_back_when_the_remote_does(rust_serve, our_connect, udp_socket):
    # The Rust server ends the link on an ICMP refusal; a later datagram of the same originator must get a new one.
    remote = ("127.0.0.1", free_port())
    _, server_port = rust_serve()
    client = our_connect(server_port, ["%s:%d" % remote]).ready()
    def echoes(local, tag):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
            bound.bind(remote)
            for each in (bound, local):
                each.settimeout(0.1)
            def comes_back():
                # Tried again until it does: a Rust link whose end is under way still takes datagrams out, and none back.
                local.send(b"datagram")
                with contextlib.suppress(socket.timeout):
                    bound.sendto(tag, bound.recvfrom(100)[1])
                    return local.recv(100) == tag
            eventually(comes_back, "a datagram comes back")
    local = udp_socket(tcp_port(client))
    echoes(local, b"before")
    local.send(b"refused")
    local.send(b"refused")
    echoes(local, b"after")


def test_keys_of_one_serve_the_other(rust, ratrod, tmp_path, tcp_echo, mixed):
    public = {}
    for name in ("server", "client"):
        # The folders of the `keys` fixture, which the tunnels use, filled by the other one's program.
        folder = tmp_path / name
        shutil.rmtree(folder)
        if name == mixed.ours:
            # As the original's user makes them: y to the question of the first run.
            program = rust("-k", folder, "serve", "127.0.0.1:0", stdin=subprocess.PIPE)
            program.process.stdin.write(b"y\n")
            program.process.stdin.close()
            program.wait_for("Security files written")
            program.wait_for("Starting server")
            program.stop()
        else:
            program = ratrod("-k", folder, "keygen")
            assert program.wait() == 0 and (folder / "key.pub").read_text() in program.output
        assert sorted(file.name for file in folder.iterdir()) == ["authorized_keys", "key", "key.pub", "known_hosts"]
        public[name] = (folder / "key.pub").read_text()
        assert len(public[name]) == 43 and len((folder / "key").read_text()) == 111
        assert legacy_peer.Identity.load(folder).public == public[name]
    (tmp_path / "server" / "authorized_keys").write_text(public["client"] + "\n")
    (tmp_path / "client" / "known_hosts").write_text(public["server"] + "\n")
    ask(mixed([tcp_echo.port], ("-e",))[0])


def test_rust_clients_that_fail(serve, rust_connect, keys, stranger, tcp_echo, closed):
    server, port = serve("--legacy", "-r", r"127\.0\.0\.1:(%d|%d)" % (tcp_echo.port, closed))
    remote, refusing = ("127.0.0.1:%d" % number for number in (tcp_echo.port, closed))
    # The client goes away in the middle of the handshake: nothing that the server may be troubled by.
    client, _ = rust_connect(port, [remote], folder=stranger.path)
    client.wait_for("Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public)
    stranger.trust(keys.server, "known_hosts")
    client, _ = rust_connect(port, [remote], folder=stranger.path)
    assert stranger.public in client.wait_for("Test connection failed: Invalid key: .*").group()
    server.wait_for(stranger.public)
    client, _ = rust_connect(port, ["127.0.0.1:9"])
    line = client.wait_for("Test connection failed: Invalid host: .*").group()
    assert "not allowed by this server" in line and str(closed) not in line, "a client is never told the regex"
    server.wait_for(r"❌.*127\.0\.0\.1:9\b")
    client, local = rust_connect(port, [refusing])
    assert_gets_nothing(local)
    client.wait_for("Remote failed: .*" + refusing)
    server.wait_for(refusing)
    _, local = rust_connect(port, [remote])
    ask(local)


def test_our_clients_that_fail_at_a_rust_server(rust_serve, our_connect, keys, stranger, tcp_echo, closed):
    remote, refusing = ("127.0.0.1:%d" % number for number in (tcp_echo.port, closed))
    server, port = rust_serve("-r", "^(%s|%s)$" % (remote, refusing))
    def failed(code, text, *words, **options):
        client = our_connect(port, *words, **options)
        assert client.wait() == code, client.output
        client.wait_for("❌ Test connection failed.*" + text)
    keys.client.write("known_hosts", "")
    failed(3, ": Server's public key `%s` is not in the known hosts file" % keys.server.public, [remote])
    our_connect(port, [remote], "-a").wait_for(READY)
    keys.client.trust(keys.server, "known_hosts")
    stranger.trust(keys.server, "known_hosts")
    failed(3, "Unauthorized key from client", [remote], folder=stranger.path)
    server.wait_for("Unauthorized key from client")
    # The original names an error to its user only where it stands in place of HandshakeCompletion: here with its regex.
    failed(1, r"Invalid host.*`127\.0\.0\.1:9`.*%d" % closed, ["127.0.0.1:9"])
    for flags in ((), ("-e",)):
        with row(("a remote that cannot be reached", flags)):
            # HandshakeCompletion comes before the Rust server's own connect, and Error after it, encrypted where all is.
            client = our_connect(port, [refusing], *flags).ready()
            assert_gets_nothing(tcp_port(client))
            client.wait_for("Failed to connect to remote `%s`" % refusing)
    with row("a remote that the regex forbids, beside one that it allows: InvalidHost comes in place of ServerPreamble"):
        client = our_connect(port, [remote, "127.0.0.1:9"]).ready()
        assert_gets_nothing(tcp_port(client, 2))
        with contextlib.closing(udp_originator(client, 2)) as asking:
            asking.send(b"anybody there?")
            client.wait_for(r"❌ .*udp 127\.0\.0\.1:9.*Invalid host")
        ask(tcp_port(client))
        assert "Lost the server" not in client.output
    # Its kernel ends or resets the link: our local socket ends, and the client goes on and says why the next connection fails.
    client = our_connect(port, [remote], "--connect-timeout=0.3").ready()
    with dial(tcp_port(client)) as local:
        ping(local, word=b"x")
        server.process.kill()
        with contextlib.suppress(ConnectionResetError):
            assert receive_all(local) == b""
    server.wait()
    assert_gets_nothing(tcp_port(client))
    client.wait_for("❌.*127.0.0.1:%d" % port)
    assert client.process.poll() is None
