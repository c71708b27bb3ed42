"""Peers that break the legacy protocol: each gives one clear line at the right side, and disturbs nothing else.
Which bytes are wrong is shown in memory by unit/test_core_legacy.py; here is a row for each way in which a program can meet them."""

import contextlib
import queue
import re
import selectors
import socket
from typing import Any, Callable, NamedTuple

import pytest

from support import legacy_peer
from support.keys import make_keys
from support.legacy_peer import INVALID_HOST, INVALID_KEY, LIMIT, REMOTE_FAILED, UNKNOWN, Data, Error, HandshakeCompletion, UdpData, encode, frame
from support.many_lines import run_each
from support.programs import LISTENING, PATIENCE, READY, linux
from support.rows import row
from support.sockets import dial, eventually, is_ready, ping, receive_all, receive_exactly, reset

pytestmark = pytest.mark.usefixtures("no_traceback")
plain_and_encrypted = pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])

COMPLAINT = re.compile(r"\b(WARN|WARNING|ERROR|CRITICAL)\b|❌")
# Stands in the regex of every server here, where it changes nothing: whoever sees it on the wire has seen the regex.
SECRET = "only-the-owner-knows-this"
REGEX = r"127\.0\.0\.1|%s" % SECRET
NOWHERE = "127.0.0.1:9"
# A time that no test reaches: what closes a connection then is the input, not the deadline.
NO_DEADLINE = "--handshake-timeout=300"


# What would move a cursor, set a title, overprint or forge a line of the log.
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b1A\x08\r\n2030-01-01T00:00:00.000000Z  INFO forged\u202e\u2028"
LONG = "A" * 5000


def complaints(lines):
    return [line for line in lines if COMPLAINT.search(line)]


def assert_harmless(lines):
    assert "internal error" not in "\n".join(lines), lines
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert len(line) < 1500, line
        assert not line.startswith("2030-01-01"), line


def ending(connection):
    """How a stream ends for whoever reads it: what still came, and "end" or "reset"."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while True:
            chunk = connection.recv(65536)
            if not chunk:
                return data, "end"
            data += chunk
    return data, "reset"


def leave(peer):
    """Ends this direction, and returns what still comes: a server leaves a client time to read its refusal, but closes once the client does."""
    with contextlib.suppress(OSError):
        peer.end()
    return peer.drain()


class Served:
    """Our running server, and peers for it that hold the client's keys."""

    def __init__(self, program, port, keys, echo_port, stack):
        self.program, self.port, self.keys, self.echo_port = program, port, keys, echo_port
        self.identity = legacy_peer.Identity.load(keys.client.path)
        self.server_identity, self.peers, self._stack = legacy_peer.Identity.load(keys.server.path), [], stack

    def dial(self, source=None):
        """Stays open until the test ends, so that no two peers have the same port."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE, source_address=source and (source, 0))
        return self._stack.enter_context(made)

    def peer(self, source=None):
        """Somebody who connects, and has no keys."""
        self.peers.append(legacy_peer.Peer(self.dial(source), None, PATIENCE))
        return self.peers[-1]

    def client(self, remote=NOWHERE, identity=None, source=None, **options):
        self.peers.append(legacy_peer.Client(self.dial(source), identity or self.identity, remote, timeout=PATIENCE, **options))
        return self.peers[-1]

    def honest(self, encrypt=True):
        """A tunnel that works. While one is open, its source is no stranger: a server may hold back strangers that come by the dozen."""
        peer = self.client("127.0.0.1:%d" % self.echo_port, encrypt=encrypt).handshake()
        self.ping(peer)
        return peer

    @staticmethod
    def ping(peer, payload=b"honest"):
        peer.send(Data(payload))
        assert peer.expect_data(len(payload)) == payload

    def check(self, guilty, most=None):
        """The server lives and serves, has one complaint about each of the guilty and at most so many others, and never told the regex."""
        self.honest()
        for sock in guilty.values():
            self.program.wait_for(of(sock))
        self.program.stop()
        assert_harmless(self.program.lines)
        lines = complaints(self.program.lines)
        about = {name: [line for line in lines if re.search(of(sock), line)] for name, sock in guilty.items()}
        assert {name: found for name, found in about.items() if len(found) != 1} == {}
        assert len(lines) <= (len(guilty) if most is None else most), self.program.output
        assert not any(SECRET.encode() in peer.received for peer in self.peers)


@pytest.fixture
def served(serve, keys, tcp_echo, stack):
    """served(flags...) -> Served. It does not wait for open tunnels when it ends."""
    return lambda *flags, regex=REGEX: Served(*serve("--legacy", "--drain=0", "-r", regex, *(flags or [NO_DEADLINE])), keys, tcp_echo.port, stack)


SOURCES = ["127.0.%d.%d" % (n // 50 + 1, n % 50 + 1) for n in range(100)]


def of(sock):
    """The pattern of what names this peer."""
    return re.escape("%s:%d" % sock.getsockname()) + r"\b"


GOOD = legacy_peer.ClientPreamble(bytes([9]) + bytes(31), NOWHERE, bytes(range(32)), False, False)


# Bytes in place of a preamble.
# Bytes in place of a preamble, and whether the stream ends after them.
STRANGERS = {
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
    "size 130817": (frame(b"", size=LIMIT + 1), False),
    "an error": (frame(encode(Error(UNKNOWN, ESCAPES))), False),
    "a size that is not kept": (frame(encode(GOOD), size=len(encode(GOOD)) + 1), True),
}


@linux
def test_instead_of_a_preamble(served):
    server = served()
    guilty = {}
    for source, (name, (sent, ends)) in zip(SOURCES, STRANGERS.items()):
        with row(name):
            stranger = server.peer(source)
            stranger.send_raw(sent)
            if ends:
                stranger.end()
            # The server closes: at most an Error comes, and nothing that only a client may see.
            assert server.server_identity.public.encode() not in stranger.drain()
            guilty[name] = stranger.socket
    server.check(guilty)


OTHER = legacy_peer.Identity()


# What is sent in place of the right ClientAuthentication; the first ones must be answered by an Error that says InvalidKey.
AUTHENTICATIONS = {
    "a signature of another challenge": lambda peer: peer.authentication(signature=peer.sign(peer.challenge)),
    "a key that is not authorized": lambda peer: legacy_peer.ClientAuthentication(OTHER.public, OTHER.private.sign(peer.server.challenge)),
    "a key of 5000 characters": lambda peer: peer.authentication(identity_public_key=LONG),
    "data": lambda peer: Data(b"no key"),
    "an error": lambda peer: Error(UNKNOWN, ESCAPES),
}


@linux
def test_instead_of_authentication(served, target):
    server = served()
    forbidden = target(receive_all)
    guilty = {}
    for n, (source, (name, message)) in enumerate(zip(SOURCES, AUTHENTICATIONS.items())):
        with row(name):
            peer = server.client("127.0.0.1:%d" % forbidden.port, source=source)
            peer.send_preamble()
            peer.receive_preamble()
            peer.send(message(peer))
            # What is sent in advance must not be looked at.
            with contextlib.suppress(ConnectionError):
                peer.send(Data(b"in advance"))
            with contextlib.suppress(ConnectionError):
                answer = peer.receive()
                assert answer is None or isinstance(answer, Error)
                assert n > 1 or answer.code == INVALID_KEY
            leave(peer)
            guilty[name] = peer.socket
    server.check(guilty)
    assert forbidden.accepted == 0


def refusal(server, remote, identity=None, **options):
    """What a client learns that asks for `remote`: the Error in place of HandshakeCompletion."""
    peer = server.client(remote, identity, **options)
    with pytest.raises(legacy_peer.Refused) as refused:
        peer.handshake()
    assert leave(peer) == b""
    return refused.value.error


# {} is the port of a target that must not be reached. The whole list of spellings is in tests/unit/test_core_keys.py.
TARGETS = ["127.0.0.1:{}\n", "127.1:{}", "127。0。0。1:{}", ":{}", "user@127.0.0.1:{}", "127.0.0.1", "[::1%lo]:{}", "[::ffff:0.0.0.0]:{}",
           "224.0.0.1:{}", "unix:/tmp/socket", "%s:{}" % ESCAPES, LONG]


def test_targets_are_taken_strictly(served, target):
    # What a resolver takes for loopback although it does not look like it passes a rule that compares text; an empty host is loopback too.
    server = served("-v", NO_DEADLINE, regex=".*")
    forbidden = target(receive_all)
    tunnel = server.honest()
    for text in TARGETS:
        for udp in (False, True):
            error = refusal(server, text.replace("{}", str(forbidden.port)), udp=udp)
            assert error.code in (INVALID_HOST, REMOTE_FAILED), (text, error)
    assert forbidden.accepted == 0
    server.ping(tunnel)
    server.check({}, most=2 * len(TARGETS))


def test_policy_is_nothing_for_strangers(served, target):
    # Whoever is not authorized gets the same answer whatever the remote: no way to map the policy, or the network behind it.
    server = served()
    server.honest()
    allowed = target(receive_all)
    remotes = ["127.0.0.1:%d" % allowed.port, "10.1.2.3:80", "127.1:80", "no-such-host.invalid:80", "", "nonsense", ESCAPES]
    errors = {refusal(server, remote, OTHER, udp=udp, encrypt=encrypt) for remote in remotes for udp in (False, True) for encrypt in (False, True)}
    assert len(errors) == 1
    error = errors.pop()
    assert error.code == INVALID_KEY and OTHER.public in error.text
    assert allowed.accepted == 0
    server.check({}, most=4 * len(remotes))


def test_data_after_an_empty_remote_goes_nowhere(served, tcp_echo):
    server = served()
    peer = server.client("").handshake()
    with contextlib.suppress(ConnectionError):
        peer.send(Data(b"where to?"))
    assert peer.drain() == b""
    assert tcp_echo.accepted == 0
    server.honest()


class Bad(NamedTuple):
    """What breaks a running stream. `wire(key)` makes the bytes; key is None in the clear."""

    name: str
    wire: Callable[[Any], bytes]
    ends: bool = False
    plain: bool = True


def bad_tag(key):
    """A good frame whose last byte was changed on its way."""
    data = frame(encode(Data(b"x" * 100)), key)
    return data[:-1] + bytes([data[-1] ^ 1])


BAD_DATA = [
    Bad("the end inside the payload", lambda key: frame(encode(Data(b"x" * 100)), key)[:-1], ends=True),
    Bad("size 130817", lambda key: frame(b"", key, size=LIMIT + 1)),
    Bad("an error in the clear once encryption is on", lambda key: frame(encode(Error(UNKNOWN, "forged"))), plain=False),
    Bad("a bad tag", bad_tag, plain=False),
    Bad("a datagram on a stream", lambda key: frame(encode(UdpData(b"x")), key)),
]


def send_bad(peer, bad):
    # The other end may close while it is still being sent.
    with contextlib.suppress(ConnectionError):
        peer.send_raw(bad.wire(peer.key))
        if bad.ends:
            peer.end()


@plain_and_encrypted
def test_bad_data_from_the_client(served, target, encrypt):
    endings = queue.Queue()
    def remote(connection):
        connection.sendall(receive_exactly(connection, 4))
        endings.put(ending(connection))
    server = served()
    address = "127.0.0.1:%d" % target(remote).port
    other = server.honest(encrypt)
    guilty = {}
    for bad in [bad for bad in BAD_DATA if encrypt or bad.plain]:
        with row(bad.name):
            peer = server.client(address, encrypt=encrypt).handshake()
            server.ping(peer, b"ping")
            send_bad(peer, bad)
            # Never a clean end: the remote would take what has come so far for the whole.
            assert endings.get(timeout=PATIENCE) == (b"", "reset")
            peer.drain()
            server.ping(other)
            guilty[bad.name] = peer.socket
    server.check(guilty)


def test_links_that_end_alone(served, target, udp_echo):
    server = served()
    remote = "127.0.0.1:%d" % udp_echo.port
    other, peer = (server.client(remote, udp=True).handshake() for _ in range(2))
    for each in (peer, other):
        each.send(UdpData(b"ping"))
        assert each.expect_data(4, UdpData) == b"ping"
    peer.send(Data(b"a stream's message"))
    peer.drain()
    # 65508 bytes fit into a frame, not into a datagram: whatever becomes of the link, nobody else notices.
    large = server.client(remote, udp=True).handshake()
    for size in (65508, 100000):
        with contextlib.suppress(ConnectionError):
            large.send(UdpData(bytes(size)))
    with contextlib.suppress(ConnectionError):
        large.send(UdpData(b"after"))
        assert large.expect_data(5, UdpData) == b"after"
    # A link that its client resets is reset at its remote.
    endings = queue.Queue()
    leaving = server.client("127.0.0.1:%d" % target(lambda connection: endings.put(ending(connection))).port).handshake()
    reset(leaving.socket)
    assert endings.get(timeout=PATIENCE)[1] == "reset"
    other.send(UdpData(b"pong"))
    assert other.expect_data(4, UdpData) == b"pong"
    server.check({"data on a link of datagrams": peer.socket}, most=3)


@pytest.fixture
def against(target, connect, keys):
    """against(play, flags...) -> our client, connected to a server that does play(peer) for every connection."""
    identity = legacy_peer.Identity.load(keys.server.path)
    def launch(play, *flags):
        return connect(target(lambda connection: play(legacy_peer.Server(connection, identity, PATIENCE))).port, "--legacy", *flags, "0:" + NOWHERE)
    return launch


def running(client):
    """The local port of a client whose test connection was taken, which the fixture `against` leaves to the test."""
    client.wait_for(READY)
    return int(client.wait_for(LISTENING).group(1))


@plain_and_encrypted
def test_bad_data_from_the_server(against, encrypt):
    todo = []
    def play(peer):
        peer.handshake()
        # The connection that tests brings nothing; the first that brings something meets the bad data, later ones an honest echo.
        for message in iter(peer.receive, None):
            bad = todo.pop() if todo else None
            # The original answers so where it cannot reach the remote: after HandshakeCompletion, and before any data.
            if isinstance(bad, str):
                peer.send(Error(REMOTE_FAILED, bad))
                peer.end()
                return peer.drain()
            peer.send(message)
            if bad:
                send_bad(peer, bad)
                return peer.drain()
    client = against(play, *(["-e"] if encrypt else []))
    port = running(client)
    errors = {"no route to host": "no route to host", ESCAPES: "title", LONG: "A" * 100, "": ""}
    expected = len(complaints(client.lines))
    for bad in (*[bad for bad in BAD_DATA if encrypt or bad.plain], *errors):
        with row(getattr(bad, "name", bad)):
            todo.append(bad)
            with dial(port) as local:
                local.sendall(b"ping")
                assert bad in errors or receive_exactly(local, 4) == b"ping"
                assert ending(local) == (b"", "reset")
            with dial(port) as local:
                ping(local, b"alive")
            expected += 1
            eventually(lambda expected=expected: len(complaints(client.lines)) >= expected, lambda: client.output)
            assert errors.get(bad, "") in complaints(client.lines)[-1]
    client.stop()
    assert_harmless(client.lines)
    assert len(complaints(client.lines)) == expected, client.output


OWN_WORDS = "words of the server"


def answer(message_or_bytes, authenticated=False, ends=False, **fields):
    """A server that answers the client's preamble with this; or where it is `authenticated` all but HandshakeCompletion, in whose place it is said.
    `fields` are what its own preamble has wrong."""
    def play(peer):
        peer.receive_preamble()
        if authenticated or fields:
            peer.send_preamble(**{name: value(peer) if callable(value) else value for name, value in fields.items()})
        if authenticated:
            peer.receive_authentication()
        if message_or_bytes is not None:
            peer.send_raw(message_or_bytes) if isinstance(message_or_bytes, bytes) else peer.send(message_or_bytes)
        if ends:
            peer.end()
    return play


# name: (what the server does in place of a right ServerPreamble, what the client says, its exit code: None is any but 0)
# name: (what the server does in place of a right ServerPreamble, what the client says, its exit code: None is any but 0)
SERVERS = {
    "closes": (answer(b"", ends=True), "clos|end", 1),
    "completion at once": (answer(HandshakeCompletion()), "", 1),  # it would do without any key
    "a signature of its own challenge": (answer(None, signature=lambda peer: peer.sign(peer.challenge)), "signature", None),
    "another key, rightly": (
        answer(None, identity_public_key=OTHER.public, signature=lambda peer: OTHER.private.sign(peer.client.challenge)),
        "Test connection failed: Server's public key `%s` is not in the known hosts file" % OTHER.public, 3),
    "invalid key": (answer(Error(INVALID_KEY, OWN_WORDS)), OWN_WORDS, 3),
    "a long text": (answer(Error(INVALID_HOST, LONG)), "A" * 100, 1),
}


COMPLETIONS = {
    "the end": (answer(b"", True, ends=True), "clos|end", 1),
    "invalid key": (answer(Error(INVALID_KEY, OWN_WORDS), True), OWN_WORDS, 3),
    "invalid host": (answer(Error(INVALID_HOST, OWN_WORDS), True), OWN_WORDS, 1),
    "escape codes": (answer(Error(UNKNOWN, ESCAPES), True), "title", 1),
    "leftover bytes": (answer(frame(encode(HandshakeCompletion()) + b"\0"), True), "", 1),
    "completion, with an exchange key of small order": (answer(HandshakeCompletion(), True, exchange_public_key=bytes(32)), "", None),
}


def drip(peer):
    """One byte at a time keeps a deadline for each read from ever passing."""
    peer.receive_preamble()
    for byte in frame(encode(Error(UNKNOWN, LONG))):
        peer.send_raw(bytes([byte]))
        if is_ready(peer.socket, selectors.EVENT_READ, 0.05):
            break


DEADLINES = {
    "never answers": (answer(None), "(?i)time|deadline|answer|within 0.3 s", 1),
    "never ends its answer": (drip, "(?i)time|deadline|answer|within 0.3 s", 1),
}


@pytest.mark.parametrize("servers, flags", [(SERVERS, ["-e", NO_DEADLINE]), (COMPLETIONS, ["-e", NO_DEADLINE]),
                                            (DEADLINES, ["--handshake-timeout=0.3"])], ids=["preamble", "completion", "deadline"])
def test_servers_that_are_wrong(target, keys, servers, flags):
    identity, rest = legacy_peer.Identity.load(keys.server.path), []
    def launch(play):
        def handle(connection):
            peer = legacy_peer.Server(connection, identity, PATIENCE)
            with contextlib.suppress(OSError):
                play(peer)
                rest.append(peer.drain())
        return target(handle).port
    # With a tunnel, and where the connection is only tested.
    tunnels = [["0:" + NOWHERE], []] if servers is DEADLINES else [["0:" + NOWHERE]]
    lines = [(name, ["-k", keys.client.path, "connect", "--legacy", *flags, "127.0.0.1:%d" % launch(play), *words])
             for name, (play, _, _) in servers.items() for words in tunnels]
    for (name, _), (code, text) in zip(lines, run_each(words for _, words in lines)):
        _, says, expected = servers[name]
        with row(name):
            assert code == expected if expected is not None else code, text
            assert_harmless(text.splitlines())
            shown = [line for line in text.splitlines() if "❌" in line]
            # Without -e it may warn that it does not encrypt.
            assert len(shown) == 1 and len(complaints(text.splitlines())) <= 2, text
            assert re.search(says, shown[0]), text
    # Nothing is signed, not even the client's name, for a server that has not proved who it is.
    assert set(rest) <= {b""}


@plain_and_encrypted
def test_data_and_the_end_may_follow_completion_at_once(against, encrypt):
    # As of a remote that speaks first and ends. The connection test meets them too, and has no use for them.
    def play(peer):
        peer.receive_preamble()
        peer.send_preamble()
        peer.receive_authentication()
        peer.start_encryption()
        peer.send_raw(frame(encode(HandshakeCompletion())) + frame(encode(Data(b"220 ")), peer.key) + frame(encode(Data(b"ready")), peer.key))
        peer.end()
        peer.drain()
    client = against(play, *(["-e"] if encrypt else []))
    with dial(running(client)) as local:
        assert ending(local) == (b"220 ready", "end")


GREETINGS = {
    b"SSH-2.0-OpenSSH_9.2p1\r\n": "begins with 'SS', as from sshd \\(with ssh://host", b"\x1b[31m": r"'\\x1b\[", b"\0\0\0": "--legacy",
    b"HTTP/1.1 400 Bad Request\r\n\r\n": "'HT', as from a web server", b"220 mail ESMTP\r\n": "'22', as from a mail",
    b"\x15\x03\x01\x00\x02\x02\x46": r"'\\x15\\x03', as from a TLS server",
}


def test_a_port_where_something_else_answers(target, keys):
    def greets(greeting):
        def handle(connection):
            connection.sendall(greeting)
            receive_all(connection)
        return target(handle).port
    outcomes = run_each(["-k", keys.client.path, "connect", "127.0.0.1:%d" % greets(greeting), "0:127.0.0.1:1"] for greeting in GREETINGS)
    for (greeting, says), (code, text) in zip(GREETINGS.items(), outcomes):
        assert code == 1 and re.search("❌ Test connection failed: .*ratrod2; .*" + says, text), (greeting, text)


def test_keys_that_do_not_fit(serve, keys, tmp_path):
    server, port = serve("--legacy")
    stranger, ignorant = make_keys(tmp_path / "stranger"), make_keys(tmp_path / "ignorant")
    stranger.trust(keys.server, "known_hosts")
    ignorant.trust(stranger, "known_hosts")
    # What a newcomer runs into who tries both ends on one machine.
    keys.server.trust(keys.server, "known_hosts")
    keys.server.trust(keys.server, "authorized_keys")
    same = "server and client use the same key.*another -k"
    cases = [
        (stranger, ["0:" + NOWHERE], "Test connection failed.*%s" % stranger.public, 3),
        (ignorant, ["0:" + NOWHERE], "❌ Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public, 3),
        (keys.server, ["0:" + NOWHERE], same, None),
        (keys.server, [], same, None),
    ]
    outcomes = run_each(["-k", folder.path, "connect", "--legacy", "127.0.0.1:%d" % port, *words] for folder, words, _, _ in cases)
    for (_, _, says, expected), (code, text) in zip(cases, outcomes):
        assert (code == expected if expected is not None else code) and re.search(says, text), text
        assert text.count("❌") == 1, text
    server.wait_for(stranger.public)
    server.stop()
    found = [line for line in complaints(server.lines) if stranger.public in line]
    assert len(found) == 1 and re.search(r"127\.0\.0\.1:\d+", found[0]), server.output
