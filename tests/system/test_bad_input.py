"""Peers that break the legacy protocol: each gives one clear line at the right side, and disturbs nothing else.
Which bytes are wrong is shown in memory by unit/test_core_legacy.py; here is a row for each way in which a program can meet them."""

import contextlib
import queue
import re
import selectors
from typing import Any, Callable, NamedTuple

import pytest

from support import legacy_peer
from support.legacy_peer import INVALID_HOST, INVALID_KEY, LIMIT, REMOTE_FAILED, UNKNOWN, Data, Error, HandshakeCompletion, UdpData, encode, frame
from support.many_lines import run_each
from support.programs import PATIENCE, tcp_port
from support.rows import row
from support.sockets import dial, eventually, is_ready, ping, receive_all, receive_exactly, reset

pytestmark = pytest.mark.usefixtures("no_traceback")

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

    def client(self, remote=NOWHERE, identity=None, **options):
        """Has said nothing yet, and stays open until the test ends, so that no two have the same port."""
        sock = self._stack.enter_context(dial(self.port))
        self.peers.append(legacy_peer.Client(sock, identity or self.identity, remote, timeout=PATIENCE, **options))
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


def of(sock):
    """The pattern of what names this peer."""
    return re.escape("%s:%d" % sock.getsockname()) + r"\b"


OTHER = legacy_peer.Identity()
GOOD = legacy_peer.ClientPreamble(bytes([9]) + bytes(31), NOWHERE, bytes(range(32)), False, False)
# Bytes in place of a preamble, and whether the stream ends after them.
STRANGERS = {
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
    "size 130817": (frame(b"", size=LIMIT + 1), False),
    "an error": (frame(encode(Error(UNKNOWN, ESCAPES))), False),
    "a size that is not kept": (frame(encode(GOOD), size=len(encode(GOOD)) + 1), True),
}
# What is sent in place of the right ClientAuthentication; the first ones must be answered by an Error that says InvalidKey.
AUTHENTICATIONS = {
    "a signature of another challenge": lambda peer: peer.authentication(signature=peer.sign(peer.challenge)),
    "a key that is not authorized": lambda peer: legacy_peer.ClientAuthentication(OTHER.public, OTHER.private.sign(peer.server.challenge)),
    "a key of 5000 characters": lambda peer: peer.authentication(identity_public_key=LONG),
    "data": lambda peer: Data(b"no key"),
    "an error": lambda peer: Error(UNKNOWN, ESCAPES),
}


def refusal(server, remote, identity=None, **options):
    """What a client learns that asks for `remote`: the Error in place of HandshakeCompletion."""
    peer = server.client(remote, identity, **options)
    refused = pytest.raises(legacy_peer.Refused, peer.handshake)
    assert leave(peer) == b""
    return refused.value.error


def test_clients_that_are_not_let_in(served, target):
    # Without -v the server would log some of what one source causes, and count the rest.
    server = served("-v", NO_DEADLINE)
    server.honest()
    forbidden, guilty = target(receive_all), {}
    remote = "127.0.0.1:%d" % forbidden.port
    for name, (sent, ends) in STRANGERS.items():
        with row(name):
            stranger = server.client()
            stranger.send_raw(sent)
            if ends:
                stranger.end()
            # The server closes: at most an Error comes, and nothing that only a client may see.
            assert server.server_identity.public.encode() not in stranger.drain()
            guilty["in place of a preamble", name] = stranger.socket
    for n, (name, message) in enumerate(AUTHENTICATIONS.items()):
        with row(name):
            peer = server.client(remote)
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
            guilty["in place of authentication", name] = peer.socket
    # A stranger gets the same answer whatever the remote: no way to map the policy, or the network behind it.
    remotes = [remote, "10.1.2.3:80", "127.1:80", "no-such-host.invalid:80", "", "nonsense", ESCAPES]
    errors = {refusal(server, remote, OTHER, udp=udp, encrypt=encrypt) for remote in remotes for udp in (False, True) for encrypt in (False, True)}
    assert len(errors) == 1
    error = errors.pop()
    assert error.code == INVALID_KEY and OTHER.public in error.text
    assert forbidden.accepted == 0
    server.check(guilty, most=len(guilty) + 4 * len(remotes))


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


def test_bad_data_from_the_client(served, target):
    endings = queue.Queue()
    def remote(connection):
        connection.sendall(receive_exactly(connection, 4))
        endings.put(ending(connection))
    server = served("-v", NO_DEADLINE)
    address = "127.0.0.1:%d" % target(remote).port
    other = server.honest()
    guilty = {}
    for encrypt, bad in ((encrypt, bad) for encrypt in (False, True) for bad in BAD_DATA if encrypt or bad.plain):
        with row((bad.name, encrypt)):
            peer = server.client(address, encrypt=encrypt).handshake()
            server.ping(peer, b"ping")
            send_bad(peer, bad)
            # Never a clean end: the remote would take what has come so far for the whole.
            assert endings.get(timeout=PATIENCE) == (b"", "reset")
            peer.drain()
            server.ping(other)
            guilty[bad.name, encrypt] = peer.socket
    server.check(guilty)


def test_links_that_end_alone(served, target, tcp_echo, udp_echo):
    server = served()
    # Data after an empty remote goes nowhere.
    peer = server.client("").handshake()
    with contextlib.suppress(ConnectionError):
        peer.send(Data(b"where to?"))
    assert peer.drain() == b""
    assert tcp_echo.accepted == 0
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


def greet(peer):
    """As of a remote that speaks first and ends: data and the end may follow HandshakeCompletion at once."""
    peer.receive_preamble()
    peer.send_preamble()
    peer.receive_authentication()
    peer.start_encryption()
    peer.send_raw(frame(encode(HandshakeCompletion())) + frame(encode(Data(b"220 ")), peer.key) + frame(encode(Data(b"ready")), peer.key))
    peer.end()
    peer.drain()


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_bad_data_from_the_server(target, connect, keys, encrypt):
    identity = legacy_peer.Identity.load(keys.server.path)
    greets, todo = [True], []
    def play(connection):
        peer = legacy_peer.Server(connection, identity, PATIENCE)
        if greets:
            return greet(peer)
        peer.handshake()
        # The first connection that brings something meets the bad data, later ones an honest echo.
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
    # The connection test meets the greeting too, and has no use for it.
    client = connect(target(play).port, "--legacy", *(["-e"] if encrypt else []), "0:" + NOWHERE).ready()
    port = tcp_port(client)
    with dial(port) as local:
        assert ending(local) == (b"220 ready", "end")
    greets.clear()
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
                ping(local, word=b"alive")
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


def drip(peer):
    """One byte at a time keeps a deadline for each read from ever passing."""
    peer.receive_preamble()
    for byte in frame(encode(Error(UNKNOWN, LONG))):
        peer.send_raw(bytes([byte]))
        if is_ready(peer.socket, selectors.EVENT_READ, 0.05):
            break


def greeting(words):
    """A port where something else answers. What a ratrod2 client has said to it is no matter."""
    def play(peer):
        peer.send_raw(words)
        peer.drain()
    return play


PATIENT, IMPATIENT, RATROD2 = ("--legacy", "-e", NO_DEADLINE), ("--legacy", "--handshake-timeout=0.3"), ()
TOO_LATE = "(?i)time|deadline|answer|within 0.3 s"
ANOTHER_PROTOCOL = "❌ Test connection failed: .*ratrod2; .*"
# name: (what the server does, the client's flags, what the client says, its exit code: None is any but 0)
SERVERS = {
    # In place of a right ServerPreamble.
    "closes": (answer(b"", ends=True), PATIENT, "clos|end", 1),
    "completion at once": (answer(HandshakeCompletion()), PATIENT, "", 1),  # it would do without any key
    "a signature of its own challenge": (answer(None, signature=lambda peer: peer.sign(peer.challenge)), PATIENT, "signature", None),
    "another key, rightly": (
        answer(None, identity_public_key=OTHER.public, signature=lambda peer: OTHER.private.sign(peer.client.challenge)), PATIENT,
        "Test connection failed: Server's public key `%s` is not in the known hosts file" % OTHER.public, 3),
    "invalid key": (answer(Error(INVALID_KEY, OWN_WORDS)), PATIENT, OWN_WORDS, 3),
    "a long text": (answer(Error(INVALID_HOST, LONG)), PATIENT, "A" * 100, 1),
    # In place of HandshakeCompletion.
    "the end": (answer(b"", True, ends=True), PATIENT, "clos|end", 1),
    "invalid key, then": (answer(Error(INVALID_KEY, OWN_WORDS), True), PATIENT, OWN_WORDS, 3),
    "invalid host": (answer(Error(INVALID_HOST, OWN_WORDS), True), PATIENT, OWN_WORDS, 1),
    "escape codes": (answer(Error(UNKNOWN, ESCAPES), True), PATIENT, "title", 1),
    "leftover bytes": (answer(frame(encode(HandshakeCompletion()) + b"\0"), True), PATIENT, "", 1),
    "completion, with an exchange key of small order": (answer(HandshakeCompletion(), True, exchange_public_key=bytes(32)), PATIENT, "", None),
    "never answers": (answer(None), IMPATIENT, TOO_LATE, 1),
    "never ends its answer": (drip, IMPATIENT, TOO_LATE, 1),
    **{says: (greeting(words), RATROD2, ANOTHER_PROTOCOL + says, 1) for words, says in {
        b"SSH-2.0-OpenSSH_9.2p1\r\n": "begins with 'SS', as from sshd \\(with ssh://host", b"\x1b[31m": r"'\\x1b\[", b"\0\0\0": "--legacy",
        b"HTTP/1.1 400 Bad Request\r\n\r\n": "'HT', as from a web server", b"220 mail ESMTP\r\n": "'22', as from a mail",
        b"\x15\x03\x01\x00\x02\x02\x46": r"'\\x15\\x03', as from a TLS server",
    }.items()},
}


def test_servers_that_are_wrong(target, keys):
    identity, rest = legacy_peer.Identity.load(keys.server.path), []
    def launch(play):
        def handle(connection):
            peer = legacy_peer.Server(connection, identity, PATIENCE)
            with contextlib.suppress(OSError):
                play(peer)
                rest.append(peer.drain())
        return target(handle).port
    # A deadline counts with a tunnel, and where the connection is only tested.
    lines = [(name, ["-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % launch(play), *words])
             for name, (play, flags, _, _) in SERVERS.items() for words in ([["0:" + NOWHERE], []] if flags is IMPATIENT else [["0:" + NOWHERE]])]
    for (name, _), (code, text) in zip(lines, run_each(words for _, words in lines)):
        _, _, says, expected = SERVERS[name]
        with row(name):
            assert code == expected if expected is not None else code, text
            assert_harmless(text.splitlines())
            shown = [line for line in text.splitlines() if "❌" in line]
            # Without -e it may warn that it does not encrypt.
            assert len(shown) == 1 and len(complaints(text.splitlines())) <= 2, text
            assert re.search(says, shown[0]), text
    # Nothing is signed, not even the client's name, for a server that has not proved who it is.
    assert set(rest) <= {b""}
