"""Both ends against the original, Rust ratrod 0.6.3, the real binary; and the proof that legacy_peer.py speaks its wire."""

import contextlib
import hashlib
import os
import socket
import subprocess
import time

import pytest

from support import legacy_peer
from support.keys import make_keys
from support.programs import LISTENING, PATIENCE, READY
from support.sockets import dial, eventually, free_port, receive_all, receive_exactly
from support.targets import echo

pytestmark = pytest.mark.usefixtures("no_traceback")

BULK = 50 * 1000 * 1000
# The original names an error to its user only where it stands in place of HandshakeCompletion.
every_encryption = pytest.mark.parametrize("flags", [(), ("-e",)], ids=["plain", "encrypted"])


@pytest.fixture
def rust_serve(rust, keys):
    """rust_serve(flags...) -> (Program, port): the original's server, listening."""
    def launch(*flags, folder=None):
        port = free_port()
        server = rust("-k", folder or keys.server.path, "serve", *flags, "127.0.0.1:%d" % port)
        deadline = time.monotonic() + PATIENCE
        while True:
            # It logs its start before it binds, so nothing but a connection tells that it listens.
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
                return server, port
            assert server.process.poll() is None and time.monotonic() < deadline, server.output
            time.sleep(0.01)
    return launch


@pytest.fixture
def rust_connect(rust, keys):
    """rust_connect(server_port, remote, flags...) -> (Program, its local port), both of its listeners up."""
    def launch(server_port, remote, *flags, folder=None):
        port = free_port()
        client = rust("-k", folder or keys.client.path, "connect", *flags, "127.0.0.1:%d" % server_port, "%d:%s" % (port, remote))
        client.wait_for(r"\[TCP\] Listening on")
        client.wait_for(r"\[UDP\] Listening on")
        return client, port
    return launch


@pytest.fixture
def our_connect(connect):
    """our_connect(server_port, remote, flags...) -> (Program, its local port), its test connection made."""
    def launch(server_port, remote, *flags):
        client = connect(server_port, "--legacy", *flags, "0:%s" % remote)
        client.wait_for(READY)
        return client, int(client.wait_for(LISTENING).group(1))
    return launch


@pytest.fixture(params=["our client, rust server", "rust client, our server"])
def mixed(request, serve):
    """mixed(remote_port, flags) -> the local port of a tunnel with one end of each kind."""
    def launch(remote_port, flags=()):
        remote = "127.0.0.1:%d" % remote_port
        if request.param.startswith("our"):
            _, server_port = request.getfixturevalue("rust_serve")()
            return request.getfixturevalue("our_connect")(server_port, remote, *flags)[1]
        _, server_port = serve("--legacy")
        client, port = request.getfixturevalue("rust_connect")(server_port, remote, *flags)
        # Good or not: its test is a TCP connection, which a remote that has only UDP refuses. Once it is made the server knows where an
        # authorized client lives, and takes a hundred connections at once from there; of a stranger it takes eight.
        client.wait_for(r"Test connection (successful|failed)")
        return port
    return launch


@contextlib.contextmanager
def udp_socket(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(PATIENCE)
        made.connect(("127.0.0.1", port))
        yield made


def stream(n):
    """n bytes in pieces, none like the one before, so that a lost, doubled or displaced piece changes the hash."""
    seed = os.urandom(1 << 16)
    for i in range(0, n, len(seed)):
        piece = i.to_bytes(8, "big") + seed[8:]
        yield piece[:n - i]


def send_stream(connection, n):
    digest = hashlib.sha256()
    for piece in stream(n):
        digest.update(piece)
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)
    return digest.digest()


def receive_hash(connection):
    digest, total = hashlib.sha256(), 0
    while True:
        chunk = connection.recv(1 << 20)
        if not chunk:
            return digest.digest(), total
        digest.update(chunk)
        total += len(chunk)


# ---------------------------------------------------------------------------------------------------- the second implementation


@every_encryption
@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
def test_legacy_peer_as_client(rust_serve, keys, tcp_echo, udp_echo, flags, udp):
    # test_bad_input.py judges by legacy_peer.py: this, and the next, are what make it a judge.
    _, port = rust_serve()
    remote = "127.0.0.1:%d" % (udp_echo.port if udp else tcp_echo.port)
    cls = legacy_peer.UdpData if udp else legacy_peer.Data
    with legacy_peer.Client(dial(port), legacy_peer.Identity.load(keys.client.path), remote, encrypt=bool(flags), udp=udp) as peer:
        peer.handshake()
        for payload in (b"small", os.urandom(300), os.urandom(60000)):
            peer.send(cls(payload))
            assert peer.expect_data(len(payload), cls) == payload
        peer.end()
        assert udp or peer.receive() is None


@every_encryption
def test_legacy_peer_as_server(rust_connect, keys, target, flags):
    identity = legacy_peer.Identity.load(keys.server.path)

    def play(connection):
        peer = legacy_peer.Server(connection, identity)
        peer.handshake()
        while True:
            message = peer.receive()
            if message is None:
                return
            peer.send(message)

    client, port = rust_connect(target(play).port, "127.0.0.1:9", *flags)
    client.wait_for(READY)
    with dial(port) as local:
        payload = os.urandom(60000)
        local.sendall(payload)
        assert receive_exactly(local, len(payload)) == payload
    with udp_socket(port) as local:
        local.send(b"datagram")
        assert local.recv(100) == b"datagram"


# ---------------------------------------------------------------------------------------------------- TCP


@every_encryption
def test_echo_and_half_close(mixed, tcp_echo, flags):
    port = mixed(tcp_echo.port, flags)
    for payload in (b"x", os.urandom(1000), os.urandom(100000)):
        with dial(port) as local:
            local.sendall(payload)
            assert receive_exactly(local, len(payload)) == payload
            local.shutdown(socket.SHUT_WR)
            assert receive_all(local) == b""


@every_encryption
def test_client_ends_first_and_still_receives(mixed, target, flags):
    def answer_after_the_end(connection):
        connection.sendall(b"answer to " + receive_all(connection))

    with dial(mixed(target(answer_after_the_end).port, flags)) as local:
        local.sendall(b"question")
        local.shutdown(socket.SHUT_WR)
        assert receive_all(local) == b"answer to question"


@every_encryption
def test_remote_ends_first_and_still_receives(mixed, target, flags):
    got = []

    def end_at_once(connection):
        connection.sendall(b"greeting")
        connection.shutdown(socket.SHUT_WR)
        got.append(receive_all(connection))
        connection.close()

    with dial(mixed(target(end_at_once).port, flags)) as local:
        assert receive_all(local) == b"greeting"
        local.sendall(b"thanks")
        local.shutdown(socket.SHUT_WR)
        # Nothing more can come back through the tunnel, so only the target can tell that it arrived (and the connection test may have come before).
        eventually(lambda: b"thanks" in got, got)


@every_encryption
def test_bulk_from_our_client_through_the_rust_server(rust_serve, our_connect, target, flags):
    # Only where our end reads the local socket: a Rust end whose read fills its buffer makes a message that its own frame cannot hold.
    def hash_it(connection):
        digest, total = receive_hash(connection)
        connection.sendall(digest + b"%d" % total)

    _, server_port = rust_serve()
    _, port = our_connect(server_port, "127.0.0.1:%d" % target(hash_it).port, *flags)
    with dial(port) as local:
        digest = send_stream(local, BULK)
        assert receive_all(local) == digest + b"%d" % BULK


@every_encryption
def test_bulk_from_our_server_to_the_rust_client(serve, rust_connect, target, flags):
    sent = []
    _, server_port = serve("--legacy")
    _, port = rust_connect(server_port, "127.0.0.1:%d" % target(lambda connection: sent.append(send_stream(connection, BULK))).port, *flags)
    with dial(port) as local:
        digest, total = receive_hash(local)
        assert total == BULK
        assert [digest] == sent


def test_many_connections_at_once(mixed, tcp_echo):
    with contextlib.ExitStack() as stack:
        port = mixed(tcp_echo.port)
        locals_ = [stack.enter_context(dial(port)) for _ in range(100)]
        for i, local in enumerate(locals_):
            local.sendall(b"connection %d" % i)
        for i, local in enumerate(locals_):
            assert receive_exactly(local, len(b"connection %d" % i)) == b"connection %d" % i


# ---------------------------------------------------------------------------------------------------- UDP


@every_encryption
@pytest.mark.parametrize("size", [0, 1, 1200, 65507])
def test_udp(mixed, udp_echo, flags, size):
    payload = os.urandom(size)
    with udp_socket(mixed(udp_echo.port, flags)) as local:
        for _ in range(3):
            local.send(payload)
            assert local.recv(65536) == payload


def test_udp_originators_are_kept_apart(mixed, udp_echo):
    port = mixed(udp_echo.port)
    with udp_socket(port) as one, udp_socket(port) as two:
        one.send(b"one")
        two.send(b"two")
        assert (one.recv(100), two.recv(100)) == (b"one", b"two")


def test_udp_comes_back_when_the_remote_does(rust_serve, our_connect):
    # The Rust server ends the link on an ICMP refusal; a later datagram of the same originator must get a new one.
    remote = ("127.0.0.1", free_port())
    _, server_port = rust_serve()
    _, port = our_connect(server_port, "%s:%d" % remote)

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

    with udp_socket(port) as local:
        echoes(local, b"before")
        local.send(b"refused")
        local.send(b"refused")
        echoes(local, b"after")


# ---------------------------------------------------------------------------------------------------- keys


def generated_by_rust(rust, folder):
    """Keys made as the original's user makes them: y to the question of the first run."""
    program = rust("-k", folder, "serve", "127.0.0.1:0", stdin=subprocess.PIPE)
    program.process.stdin.write(b"y\n")
    program.process.stdin.close()
    program.wait_for("Security files written")
    program.wait_for("Starting server")
    program.stop()


def generated_by_us(ratrod, folder):
    program = ratrod("-k", folder, "keygen")
    assert program.wait() == 0, program.output
    assert (folder / "key.pub").read_text() in program.output


@pytest.mark.parametrize("maker", ["rust", "ratrod"])
def test_keys_of_one_serve_the_other(request, maker, tmp_path, tcp_echo, mixed):
    make = {"rust": generated_by_rust, "ratrod": generated_by_us}[maker]
    public = {}
    for name in ("server", "client"):
        # The folders of the `keys` fixture, which the tunnels use, filled by another hand.
        folder = tmp_path / name
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        make(request.getfixturevalue(maker), folder)
        assert sorted(file.name for file in folder.iterdir()) == ["authorized_keys", "key", "key.pub", "known_hosts"]
        public[name] = (folder / "key.pub").read_text()
        assert len(public[name]) == 43 and len((folder / "key").read_text()) == 111
        assert legacy_peer.Identity.load(folder).public == public[name]
    (tmp_path / "server" / "authorized_keys").write_text(public["client"] + "\n")
    (tmp_path / "client" / "known_hosts").write_text(public["server"] + "\n")
    with dial(mixed(tcp_echo.port, ("-e",))) as local:
        local.sendall(b"both know each other")
        assert receive_exactly(local, 20) == b"both know each other"


@pytest.fixture
def stranger(tmp_path):
    """Keys that nobody trusts."""
    return make_keys(tmp_path / "stranger")


def test_rust_client_that_we_do_not_know(serve, rust_connect, keys, stranger):
    stranger.trust(keys.server, "known_hosts")
    server, server_port = serve("--legacy")
    client, _ = rust_connect(server_port, "127.0.0.1:9", folder=stranger.path)
    assert stranger.public in client.wait_for("Test connection failed: Invalid key: .*").group()
    server.wait_for(stranger.public)


def test_rust_client_that_does_not_know_us(serve, rust_connect, keys, stranger, tcp_echo):
    server, server_port = serve("--legacy")
    client, _ = rust_connect(server_port, "127.0.0.1:%d" % tcp_echo.port, folder=stranger.path)
    client.wait_for("Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public)
    # It goes away in the middle of the handshake: nothing that the server may be troubled by.
    _, port = rust_connect(server_port, "127.0.0.1:%d" % tcp_echo.port)
    with dial(port) as local:
        local.sendall(b"alive")
        assert receive_exactly(local, 5) == b"alive"
    assert tcp_echo.accepted >= 1


def test_rust_server_that_does_not_know_us(rust_serve, connect, keys):
    keys.server.write("authorized_keys", "")
    server, port = rust_serve()
    client = connect(port, "--legacy", "0:127.0.0.1:9")
    assert client.wait() == 3, client.output
    client.wait_for("Test connection failed.*Unauthorized key from client")
    server.wait_for("Unauthorized key from client")


def test_rust_server_that_we_do_not_know(rust_serve, connect, keys):
    keys.client.write("known_hosts", "")
    _, port = rust_serve()
    client = connect(port, "--legacy", "0:127.0.0.1:9")
    assert client.wait() == 3, client.output
    client.wait_for("❌ Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public)


def test_all_hosts_accepted(rust_serve, connect, keys):
    keys.client.write("known_hosts", "")
    _, port = rust_serve()
    connect(port, "--legacy", "-a", "0:127.0.0.1:9").wait_for(READY)


# ---------------------------------------------------------------------------------------------------- policy and failure


def test_rust_server_forbids_the_remote(rust_serve, connect):
    _, port = rust_serve("-r", "^only-this-host:")
    client = connect(port, "--legacy", "0:127.0.0.1:9")
    assert client.wait() == 1, client.output
    client.wait_for(r"Test connection failed.*Invalid host.*`127\.0\.0\.1:9`.*only-this-host")


def test_start_test_names_the_tunnels_remote(rust_serve, our_connect, tcp_echo):
    # With any other remote in the test connection, a server that allows nothing else would refuse it.
    _, server_port = rust_serve("-r", r"^127\.0\.0\.1:%d$" % tcp_echo.port)
    _, port = our_connect(server_port, "127.0.0.1:%d" % tcp_echo.port)
    with dial(port) as local:
        local.sendall(b"allowed")
        assert receive_exactly(local, 7) == b"allowed"


def test_we_forbid_the_remote(serve, rust_connect):
    server, port = serve("--legacy", "-r", "only-this-host")
    client, _ = rust_connect(port, "127.0.0.1:9")
    line = client.wait_for("Test connection failed: Invalid host: .*").group()
    assert "not allowed by this server" in line and "only-this-host" not in line
    server.wait_for(r"❌.*127\.0\.0\.1:9")


@every_encryption
def test_rust_server_cannot_reach_the_remote(rust_serve, connect, flags):
    # Its HandshakeCompletion comes before its own connect, and Error after it, encrypted where all is.
    _, server_port = rust_serve()
    remote = "127.0.0.1:%d" % free_port()
    client = connect(server_port, "--legacy", *flags, "0:" + remote)
    client.wait_for(READY)
    with contextlib.suppress(ConnectionResetError):
        with dial(int(client.wait_for(LISTENING).group(1))) as local:
            assert receive_all(local) == b""
    client.wait_for("Failed to connect to remote `%s`" % remote)


def test_our_server_cannot_reach_the_remote(serve, rust_connect):
    server, server_port = serve("--legacy")
    remote = "127.0.0.1:%d" % free_port()
    client, port = rust_connect(server_port, remote)
    # The reset may be there before connect() returns.
    with contextlib.suppress(ConnectionResetError):
        with dial(port) as local:
            assert receive_all(local) == b""
    client.wait_for("Remote failed: .*" + remote)
    server.wait_for(remote)


def test_the_rust_server_goes_away(rust_serve, our_connect, target):
    # Its kernel ends or resets the link: our local socket ends, and the client goes on and says why the next connection fails.
    server, server_port = rust_serve()
    client, port = our_connect(server_port, "127.0.0.1:%d" % target(echo).port)
    with dial(port) as local:
        local.sendall(b"x")
        assert receive_exactly(local, 1) == b"x"
        server.process.kill()
        with contextlib.suppress(ConnectionResetError):
            assert receive_all(local) == b""
    server.wait()
    # The reset may be there before connect() returns.
    with contextlib.suppress(ConnectionResetError):
        with dial(port) as local:
            assert receive_all(local) == b""
    client.wait_for("❌.*127.0.0.1:%d" % server_port)
    assert client.process.poll() is None
