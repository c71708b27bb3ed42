"""Peers that break the protocol, on purpose or by nature: each gives one clear line at the right side, and disturbs nothing else.

The peer is legacy_peer.py, over real sockets, against the real program as server or as client.
"""

import contextlib
import os
import queue
import random
import re
import selectors
import socket
import sys
from typing import Any, Callable, NamedTuple

import pytest

from support import legacy_peer
from support.keys import make_keys
from support.legacy_peer import (
    INVALID_HOST,
    INVALID_KEY,
    LIMIT,
    REMOTE_FAILED,
    UNKNOWN,
    ClientAuthentication,
    ClientPreamble,
    Data,
    Error,
    HandshakeCompletion,
    Refused,
    ServerPreamble,
    Shutdown,
    UdpData,
    encode,
    frame,
)
from support.programs import AUTHENTICATION_FAILED, LISTENING, PATIENCE, READY
from support.sockets import dial, eventually, is_ready, receive_all, receive_exactly

pytestmark = pytest.mark.usefixtures("no_traceback")

COMPLAINT = re.compile(r"\b(WARN|WARNING|ERROR|CRITICAL)\b|❌")
# Stands in the regex of every server here, where it changes nothing: whoever sees it on the wire has seen the regex.
SECRET = "only-the-owner-knows-this"
REGEX = r"127\.0\.0\.1|%s" % SECRET
NOWHERE = "127.0.0.1:9"
# A time that no test reaches: what closes a connection then is the input, not the deadline.
NO_DEADLINE = ("--handshake-timeout=300",)
SHORT_DEADLINE = ("--handshake-timeout=1",)
# What would move a cursor, set a title, overprint or forge a line of the log.
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b1A\x08\r\n2030-01-01T00:00:00.000000Z  INFO forged\u202e\u2028"
LONG = "A" * 5000


def complaints(program):
    return [line for line in program.lines if COMPLAINT.search(line)]


def assert_harmless(program):
    assert "internal error" not in program.output, program.output
    for line in program.lines:
        assert line.isprintable(), ascii(line)
        assert len(line) < 1500, line
        assert not line.startswith("2030-01-01"), line


def one_complaint(program, pattern):
    """The only complaint of the program, once it has ended."""
    program.wait_for(pattern)
    program.stop()
    assert_harmless(program)
    lines = complaints(program)
    assert len(lines) == 1, program.output
    assert re.search(pattern, lines[0]), lines[0]
    return lines[0]


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


# ---------------------------------------------------------------------------------------------------- against our server


class Served:
    """Our running server, and peers for it that hold the client's keys."""

    def __init__(self, program, port, keys, echo_port, stack):
        self.program, self.port, self.keys, self.echo_port = program, port, keys, echo_port
        self.identity = legacy_peer.Identity.load(keys.client.path)
        self.server_identity = legacy_peer.Identity.load(keys.server.path)
        self.peers = []
        self._stack = stack

    def dial(self, source=None):
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE, source_address=source and (source, 0))

    def client(self, remote=NOWHERE, identity=None, **options):
        peer = legacy_peer.Client(self.dial(), identity or self.identity, remote, timeout=PATIENCE, **options)
        self.peers.append(peer)
        return self._stack.enter_context(peer)

    def honest(self, encrypt=True):
        """A tunnel that works. While one is open, its source is no stranger: a server may hold back strangers that come by the dozen."""
        peer = self.client("127.0.0.1:%d" % self.echo_port, encrypt=encrypt).handshake()
        self.ping(peer)
        return peer

    @staticmethod
    def ping(peer, payload=b"honest"):
        peer.send(Data(payload))
        assert peer.expect_data(len(payload)) == payload

    def check(self, pattern):
        """The server lives and serves; its only complaint has `pattern`; the regex never went over the wire."""
        self.honest().socket.close()
        line = one_complaint(self.program, pattern)
        assert not any(SECRET.encode() in peer.received for peer in self.peers)
        return line


@pytest.fixture
def served(serve, keys, tcp_echo):
    """served(flags...) -> Served."""
    with contextlib.ExitStack() as stack:
        def launch(*flags, regex=REGEX):
            return Served(*serve("--legacy", "-r", regex, *(flags or NO_DEADLINE)), keys, tcp_echo.port, stack)
        yield launch


def of(sock):
    """The complaint that names this peer."""
    return re.escape("%s:%d" % sock.getsockname())


GOOD = ClientPreamble(bytes([9]) + bytes(31), NOWHERE, bytes(range(32)), False, False)


def lying(data):
    """A ClientPreamble whose first field's length is `data`."""
    return frame(b"\0" + data + encode(GOOD)[2:])


# name: (bytes, whether the end of the stream follows)
STRANGERS = {
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
    "a TLS hello": (bytes.fromhex("16030100c8010000c40303") + bytes(64), False),
    "an SSH banner": (b"SSH-2.0-OpenSSH_9.6\r\n", False),
    "flag 2": (frame(encode(GOOD), flag=2), False),
    "flag 255": (b"\xff", False),
    "an encrypted frame before there is a key": (frame(encode(GOOD), flag=1), False),
    "size 130817": (frame(b"", size=LIMIT + 1), False),
    "size 2^31": (frame(b"", size=1 << 31), False),
    "size 2^63": (frame(b"", size=1 << 63), False),
    "size 2^64-1": (frame(b"", size=(1 << 64) - 1), False),
    "a size that is not kept": (frame(encode(GOOD), size=len(encode(GOOD)) + 1), True),
    "the end inside the size": (frame(encode(GOOD))[:5], True),
    "the end after the size": (frame(encode(GOOD))[:9], True),
    "size 0": (frame(b""), False),
    "leftover bytes": (frame(encode(GOOD) + b"\0"), False),
    "a message cut short": (frame(encode(GOOD)[:-1]), False),
    "a variant alone": (frame(b"\0"), False),
    "an unknown variant": (frame(b"\x08" + encode(GOOD)[1:]), False),
    "a variant of 64 bits": (frame(b"\xfd" + b"\xff" * 8 + encode(GOOD)[1:]), False),
    "a length of one byte too many": (lying(b"\xfa"), False),
    "a length of 16 bits too many": (lying(b"\xfb\xff\xff"), False),
    "a length of 32 bits too many": (lying(b"\xfc\xff\xff\xff\xff"), False),
    "a length of 64 bits too many": (lying(b"\xfd" + b"\xff" * 8), False),
    "a length of 2^63": (lying(b"\xfd\x80" + bytes(7)), False),
    "a length that is cut": (frame(b"\0\xfd\0\0"), False),
    "a longer form than a length needs, and nothing after it": (frame(b"\0\xfd" + bytes(7) + b"\x20"), False),
    "marker 254": (lying(b"\xfe" + bytes(16)), False),
    "marker 255": (lying(b"\xff" + bytes(16)), False),
    "an exchange key of 31 bytes": (frame(encode(GOOD._replace(exchange_public_key=bytes(31)))), False),
    "an exchange key of 33 bytes": (frame(encode(GOOD._replace(exchange_public_key=bytes(33)))), False),
    "no challenge": (frame(encode(GOOD._replace(challenge=b""))), False),
    "a challenge of 31 bytes": (frame(encode(GOOD._replace(challenge=bytes(31)))), False),
    # Signing whatever is asked would sign documents of other protocols too.
    "a challenge of 64 bytes": (frame(encode(GOOD._replace(challenge=bytes(64)))), False),
    "a bool of 2": (frame(encode(GOOD)[:-1] + b"\2"), False),
    "a remote that is not UTF-8": (frame(encode(GOOD._replace(remote=b"\xff\xfe:80"))), False),
    "another message": (frame(encode(Data(b"x"))), False),
    "a server's message": (frame(encode(ServerPreamble("x" * 43, bytes(32), bytes(64), bytes(32)))), False),
    "authentication without a preamble": (frame(encode(ClientAuthentication("x" * 43, bytes(64)))), False),
    "an error": (frame(encode(Error(UNKNOWN, ESCAPES))), False),
    "shutdown": (frame(encode(Shutdown())), False),
}


@pytest.mark.parametrize("sent, ends", STRANGERS.values(), ids=STRANGERS)
def test_instead_of_a_preamble(served, sent, ends):
    server = served()
    with legacy_peer.Peer(server.dial(), None, PATIENCE) as stranger:
        server.peers.append(stranger)
        stranger.send_raw(sent)
        if ends:
            stranger.end()
        # The server closes: at most an Error comes, and nothing that only a client may see.
        assert server.server_identity.public.encode() not in stranger.drain()
        peer = of(stranger.socket)
    server.check(peer)


def test_a_port_scan_is_no_event(served):
    # Health checks connect and close all day: no more than a line each, and nothing is left of them.
    server = served()
    for _ in range(5):
        server.dial().close()
    server.honest()
    server.program.stop()
    assert len(complaints(server.program)) <= 5, server.program.output


def authentication_by(identity):
    """Everything right, under another key than the one that is authorized."""
    def make(peer):
        return ClientAuthentication(identity.public, identity.private.sign(peer.server.challenge))
    return make


OTHER = legacy_peer.Identity()


def last_character_changed(text):
    """The same 32 bytes for a decoder that does not look at the spare bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]


# name: (message in place of the right ClientAuthentication, whether the answer must be an Error that says InvalidKey)
AUTHENTICATIONS = {
    "a signature of zeros": (lambda peer: peer.authentication(signature=bytes(64)), True),
    "a signature by another key": (lambda peer: peer.authentication(signature=OTHER.private.sign(peer.server.challenge)), True),
    "a signature of another challenge": (lambda peer: peer.authentication(signature=peer.sign(peer.challenge)), True),
    "a signature of 63 bytes": (lambda peer: peer.authentication(signature=bytes(63)), False),
    "no signature": (lambda peer: peer.authentication(signature=b""), False),
    "a signature with a byte more": (lambda peer: peer.authentication(signature=peer.authentication().signature + b"\0"), False),
    "the server's own signature": (lambda peer: peer.authentication(signature=peer.server.signature), True),
    "a key that is not authorized": (authentication_by(OTHER), True),
    "a key spelled otherwise": (lambda peer: peer.authentication(identity_public_key=last_character_changed(peer.identity.public)), False),
    "a padded key": (lambda peer: peer.authentication(identity_public_key=peer.identity.public + "="), False),
    "a key and a newline": (lambda peer: peer.authentication(identity_public_key=peer.identity.public + "\n"), False),
    "a key of 31 bytes": (lambda peer: peer.authentication(identity_public_key=peer.identity.public[:-1]), False),
    "no key": (lambda peer: peer.authentication(identity_public_key=""), False),
    "a key of escape codes": (lambda peer: peer.authentication(identity_public_key=ESCAPES), False),
    "a key of 5000 characters": (lambda peer: peer.authentication(identity_public_key=LONG), False),
    "a key that is not UTF-8": (lambda peer: peer.authentication(identity_public_key=b"\xff" * 43), False),
    # A verifier that does not refuse points of small order takes this signature for any message.
    "a key of small order": (lambda peer: ClientAuthentication("AQ" + "A" * 41, b"\1" + bytes(63)), False),
    "a second preamble": (lambda peer: peer.preamble(), False),
    "data": (lambda peer: Data(b"no key"), False),
    "an error": (lambda peer: Error(UNKNOWN, ESCAPES), False),
    "completion": (lambda peer: HandshakeCompletion(), False),
}


@pytest.mark.parametrize("message, answered", AUTHENTICATIONS.values(), ids=AUTHENTICATIONS)
def test_instead_of_authentication(served, target, message, answered):
    server = served()
    forbidden = target(receive_all)
    peer = server.client("127.0.0.1:%d" % forbidden.port)
    peer.send_preamble()
    peer.receive_preamble()
    peer.send(message(peer))
    # What is sent in advance must not be looked at.
    with contextlib.suppress(ConnectionError):
        peer.send(Data(b"in advance"))
    with contextlib.suppress(ConnectionError):
        answer = peer.receive()
        assert answer is None or isinstance(answer, Error)
        assert not answered or answer.code == INVALID_KEY
    leave(peer)
    server.check(of(peer.socket))
    assert forbidden.accepted == 0


def test_the_end_instead_of_authentication(served):
    # As of a client that does not know this server: it may be worth a line, but no more than one.
    server = served()
    peer = server.client()
    peer.send_preamble()
    peer.receive_preamble()
    peer.end()
    assert peer.drain() == b""
    server.honest()
    server.program.stop()
    assert len(complaints(server.program)) <= 1, server.program.output


def test_the_servers_own_key_is_no_clients(served, keys):
    # A legacy server signs any stranger's 32 bytes: here the stranger has it sign the challenge that it must answer itself, and needs no private key.
    keys.server.trust(keys.server, "authorized_keys")
    server = served()
    oracle, peer = server.client(), server.client()
    peer.send_preamble()
    peer.receive_preamble()
    oracle.challenge = peer.server.challenge
    oracle.send_preamble()
    signature = oracle.receive_preamble().signature
    peer.send_authentication(identity_public_key=keys.server.public, signature=signature)
    with pytest.raises(Refused):
        peer.receive_completion()
    leave(peer)
    server.honest()
    server.program.wait_for(of(peer.socket) + ".*(own|same) key|(own|same) key.*" + of(peer.socket))


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31), bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")],
                         ids=["zero", "one", "order 8"])
def test_exchange_key_of_small_order(served, point):
    # The shared secret would be zero, which anybody on the path knows.
    server = served()
    peer = server.client("127.0.0.1:%d" % server.echo_port, encrypt=True)
    peer.send_preamble(exchange_public_key=point)
    with contextlib.suppress(ConnectionError):
        peer.receive_preamble()
        peer.send_authentication()
        assert not isinstance(peer.receive(), HandshakeCompletion)
    peer.drain()
    server.check(of(peer.socket))


# ---------------------------------------------------------------------------------------------------- policy


def refusal(server, remote, identity=None, **options):
    """What a client learns that asks for `remote`: the Error in place of HandshakeCompletion."""
    peer = server.client(remote, identity, **options)
    with pytest.raises(Refused) as refused:
        peer.handshake()
    assert leave(peer) == b""
    return refused.value.error


# {} is the port of a target that must not be reached.
TARGETS = [
    "127.0.0.1:{}\n", "127.0.0.1:\n{}", "127.1:{}", "127.0.1:{}", "2130706433:{}", "0x7f000001:{}", "0x7f.0.0.1:{}", "0177.0.0.1:{}",
    "127.0.0.01:{}", "１２７.0.0.1:{}", "127。0。0。1:{}", "①27.0.0.1:{}", ":{}", "*:{}", "127.0.0.1:0{}", "127.0.0.1:+{}", "127.0.0.1: {}",
    " 127.0.0.1:{}", "127.0.0.1:{} ", "127.0.0.1\0:{}", "127.0.0.1:{}\0", "127.0.0.1:{}.0", "127.0.0.1:{}:{}", "127.0.0.1 {}",
    "user@127.0.0.1:{}", "127.0.0.1/:{}", "[127.0.0.1]:{}", "127.0.0.1", "localhost", "{}", ":", "127.0.0.1:", "127.0.0.1:0",
    "127.0.0.1:70000", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:http", "host:080", "host:0", "host:70000", "a:80\n", "localhost\n:{}",
    "[::1:{}", "::1]:{}", "[]:{}", "[::1%lo]:{}", "[::ffff:127.1]:{}", "0.0.0.0:{}", "[::]:{}", "[::ffff:0.0.0.0]:{}", "224.0.0.1:{}",
    "255.255.255.255:{}", "unix:/tmp/socket", "a" * 254 + ":{}", ".:{}", "..:{}", "%s:{}" % ESCAPES, LONG, "-:{}:", "127.0.0.1:１{}",
]


def full_width(text):
    return "".join(chr(ord(c) - ord("0") + ord("０")) for c in text)


def test_targets_are_taken_strictly(served, target):
    # What a resolver takes for loopback although it does not look like it passes a rule that compares text; an empty host is loopback too.
    server = served("-v", *NO_DEADLINE, regex=".*")
    forbidden = target(receive_all)
    tunnel = server.honest()
    remotes = [text.replace("{}", str(forbidden.port)) for text in TARGETS] + ["127.0.0.1:" + full_width(str(forbidden.port))]
    for remote in remotes:
        for udp in (False, True):
            error = refusal(server, remote, udp=udp)
            assert error.code in (INVALID_HOST, REMOTE_FAILED), (remote, error)
    assert forbidden.accepted == 0
    server.ping(tunnel)
    server.honest()
    server.program.stop()
    assert_harmless(server.program)


@pytest.mark.parametrize("regex, remotes", [
    (r"127\.0\.0", ["127.0.0.1:{}"]),
    (r"127\.0\.0\.1:1", ["127.0.0.1:{}"]),
    (r"127\.0\.0\.1$\n?|(?!x)y", ["127.0.0.1:{}\n"]),
    (r"10\..*|(?!127\.).*", ["[::ffff:127.0.0.1]:{}", "[::FFFF:7f00:1]:{}"]),
    (r"[a-z.]+", ["127.0.0.1:{}"]),
], ids=["part of the host", "part of the port", "newline", "mapped IPv4", "only names"])
def test_forbidden_remotes(served, target, regex, remotes):
    forbidden = target(receive_all)
    server = served(regex=regex)
    for remote in remotes:
        for udp in (False, True):
            assert regex not in refusal(server, remote.replace("{}", str(forbidden.port)), udp=udp).text
    assert forbidden.accepted == 0
    server.program.stop()
    assert len(complaints(server.program)) == 2 * len(remotes), server.program.output


@pytest.mark.parametrize("regex", [r"127\.0\.0\.1", r"127\.0\.0\.1:{}", r"10\..*|127\..*", ".*"])
def test_allowed_remotes(served, tcp_echo, regex):
    # The counterpart: the refusals above are not for want of a rule that lets anything through.
    server = served(regex=regex.replace("{}", str(tcp_echo.port)))
    server.honest()


def test_the_refusal_says_no_more_than_that(served):
    server = served()
    error = refusal(server, "10.1.2.3:80")
    assert error.code == INVALID_HOST and "not allowed by this server" in error.text
    # A prober learns nothing from comparing two refusals.
    assert refusal(server, "no-such-host.invalid:81").text.replace("no-such-host.invalid:81", "10.1.2.3:80") == error.text
    server.program.wait_for(r"10\.1\.2\.3:80")
    assert not any(SECRET.encode() in peer.received for peer in server.peers)


def test_policy_is_nothing_for_strangers(served, target):
    # Whoever is not authorized gets the same answer whatever the remote: no way to map the policy, or the network behind it.
    server = served()
    allowed = target(receive_all)
    remotes = ["127.0.0.1:%d" % allowed.port, "10.1.2.3:80", "127.1:80", "no-such-host.invalid:80", "", "nonsense", ESCAPES]
    errors = {refusal(server, remote, OTHER, udp=udp, encrypt=encrypt) for remote in remotes for udp in (False, True) for encrypt in (False, True)}
    assert len(errors) == 1
    error = errors.pop()
    assert error.code == INVALID_KEY and OTHER.public in error.text
    assert allowed.accepted == 0
    assert not any(SECRET.encode() in peer.received for peer in server.peers)


def test_empty_remote_is_a_test_of_the_connection(served, tcp_echo):
    server = served()
    for options in ({}, {"encrypt": True}, {"udp": True}):
        peer = server.client("", **options).handshake()
        peer.end()
        assert peer.drain() == b""
    assert tcp_echo.accepted == 0
    server.honest()
    server.program.stop()
    assert complaints(server.program) == []


def test_data_after_an_empty_remote_goes_nowhere(served, tcp_echo):
    server = served()
    peer = server.client("").handshake()
    with contextlib.suppress(ConnectionError):
        peer.send(Data(b"where to?"))
    assert peer.drain() == b""
    assert tcp_echo.accepted == 0
    server.honest()


# ---------------------------------------------------------------------------------------------------- unusual, and right


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_data_may_follow_authentication_at_once(served, encrypt):
    server = served()
    peer = server.client("127.0.0.1:%d" % server.echo_port, encrypt=encrypt)
    peer.send_preamble()
    peer.receive_preamble()
    authentication = frame(encode(peer.authentication()))
    peer.start_encryption()
    key, peer.key = peer.key, None
    peer.send_raw(authentication + frame(encode(Data(b"in ad")), key) + frame(encode(Data(b"vance")), key))
    peer.receive_completion()
    assert peer.expect_data(10) == b"in advance"
    peer.end()
    assert peer.receive() is None


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
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


class ByteByByte:
    """A socket that sends each byte by itself."""

    def __init__(self, sock):
        self._socket = sock

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def sendall(self, data):
        for i in range(len(data)):
            self._socket.sendall(data[i:i + 1])


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_bytes_come_one_by_one(served, encrypt):
    server = served()
    peer = server.client("127.0.0.1:%d" % server.echo_port, encrypt=encrypt)
    peer.socket = ByteByByte(peer.socket)
    peer.handshake()
    for n in range(1, 20):
        server.ping(peer, os.urandom(n))
    peer.end()
    assert peer.receive() is None
    server.program.stop()
    assert complaints(server.program) == []


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_the_largest_frame_is_taken(served, encrypt):
    # Variant, a length in 5 bytes, and where there is one the tag: the frame is exactly at the limit.
    server = served()
    peer = server.client("127.0.0.1:%d" % server.echo_port, encrypt=encrypt).handshake()
    server.ping(peer, os.urandom(LIMIT - 6 - 16 * encrypt))


@pytest.mark.parametrize("last", [frame(b""), frame(encode(Shutdown())), frame(encode(Data(b"")))], ids=["size 0", "shutdown", "empty data"])
def test_other_ends_of_a_direction_in_the_clear(served, target, last):
    # The original's reader takes these for the end of a direction, though its writer never makes them.
    got = queue.Queue()

    def remote(connection):
        got.put(ending(connection))
        connection.sendall(b"answer")

    server = served()
    peer = server.client("127.0.0.1:%d" % target(remote).port).handshake()
    peer.send(Data(b"question"))
    peer.send_raw(last)
    assert got.get(timeout=PATIENCE) == (b"question", "end")
    assert peer.expect_data(6) == b"answer"
    assert peer.receive() is None


# ---------------------------------------------------------------------------------------------------- bad data, at both ends


class Bad(NamedTuple):
    """What breaks a running stream. `wire(key)` makes the bytes; key is None in the clear."""

    name: str
    wire: Callable[[Any], bytes]
    ends: bool = False
    plain: bool = True
    encrypted: bool = True


def flipped(at):
    """A good frame in which one byte was changed on its way."""
    def wire(key):
        data = bytearray(frame(encode(Data(b"x" * 100)), key))
        data[at] ^= 1
        return bytes(data)
    return wire


def payload(data):
    return lambda key: frame(data, key)


BAD_DATA = [
    Bad("the end after the flag", lambda key: frame(encode(Data(b"x")), key)[:1], ends=True),
    Bad("the end inside the size", lambda key: frame(encode(Data(b"x")), key)[:8], ends=True),
    Bad("the end after the size", lambda key: frame(b"x" * 100, key)[:21 if key else 9], ends=True),
    Bad("the end inside the payload", lambda key: frame(encode(Data(b"x" * 100)), key)[:-1], ends=True),
    Bad("the end inside a large payload", lambda key: frame(encode(Data(b"x" * 100000)), key)[:-1], ends=True),
    Bad("size 130817", lambda key: frame(b"", key, size=LIMIT + 1)),
    Bad("size 2^63", lambda key: frame(b"", key, size=1 << 63)),
    Bad("size 2^64-1", lambda key: frame(b"", key, size=(1 << 64) - 1)),
    Bad("flag 2", lambda key: b"\2" + frame(encode(Data(b"x")), key)[1:]),
    Bad("flag 1 without a key", lambda key: frame(encode(Data(b"x")), flag=1), encrypted=False),
    Bad("flag 0 once encryption is on", lambda key: frame(encode(Data(b"x"))), plain=False),
    Bad("an error in the clear once encryption is on", lambda key: frame(encode(Error(UNKNOWN, "forged"))), plain=False),
    Bad("a bad tag", flipped(-1), plain=False),
    Bad("a bad ciphertext", flipped(30), plain=False),
    Bad("a bad nonce", flipped(1), plain=False),
    Bad("another key", lambda key: frame(encode(Data(b"x")), bytes(32)), plain=False),
    Bad("shorter than a tag", lambda key: frame(bytes(15), None, flag=1), plain=False),
    Bad("one byte under flag 1", lambda key: frame(b"\4", None, flag=1), plain=False),
    Bad("nothing but a tag", payload(b""), plain=False),
    # FIN is all that ends a direction there: these, unlike FIN, an attacker could make without the path.
    Bad("size 0, flag 0", lambda key: frame(b""), plain=False),
    Bad("size 0, flag 1", lambda key: frame(b"", None, flag=1), plain=False),
    Bad("shutdown", payload(encode(Shutdown())), plain=False),
    Bad("empty data", payload(encode(Data(b""))), plain=False),
    Bad("leftover bytes", payload(encode(Data(b"x")) + b"\0")),
    Bad("leftover bytes after many", payload(encode(Data(b"x" * 70000)) + b"\0")),
    Bad("data cut short", payload(encode(Data(b"x" * 100))[:-1])),
    Bad("a variant alone", payload(b"\4")),
    Bad("a length that is cut", payload(b"\4\xfc\0")),
    Bad("a length of 16 bits too many", payload(b"\4\xfb\xff\xffxxxx")),
    Bad("a length of 32 bits too many", payload(b"\4\xfc\xff\xff\xff\xffxxxx")),
    Bad("a length of 64 bits too many", payload(b"\4\xfd" + b"\xff" * 8 + b"xxxx")),
    Bad("marker 254", payload(b"\4\xfe" + bytes(20))),
    Bad("an unknown variant", payload(b"\x08")),
    Bad("marker 255 as variant", payload(b"\xff" + bytes(20))),
    Bad("a datagram on a stream", payload(encode(UdpData(b"x")))),
    Bad("a second completion", payload(encode(HandshakeCompletion()))),
    Bad("a preamble", payload(encode(GOOD))),
]
every_bad_data = pytest.mark.parametrize("bad, encrypt", [
    pytest.param(bad, encrypt, id="%s-%s" % (bad.name, "encrypted" if encrypt else "plain"))
    for bad in BAD_DATA for encrypt in (False, True) if (bad.encrypted if encrypt else bad.plain)])


def send_bad(peer, bad):
    # The other end may close while it is still being sent.
    with contextlib.suppress(ConnectionError):
        peer.send_raw(bad.wire(peer.key))
        if bad.ends:
            peer.end()


@every_bad_data
def test_bad_data_from_the_client(served, target, bad, encrypt):
    endings = queue.Queue()

    def remote(connection):
        connection.sendall(receive_exactly(connection, 4))
        endings.put(ending(connection))

    server = served()
    peer = server.client("127.0.0.1:%d" % target(remote).port, encrypt=encrypt).handshake()
    other = server.honest(encrypt)
    server.ping(peer, b"ping")
    send_bad(peer, bad)
    # Never a clean end: the remote would take what has come so far for the whole.
    assert endings.get(timeout=PATIENCE) == (b"", "reset")
    peer.drain()
    server.ping(other)
    other.socket.close()
    server.check(of(peer.socket))


def is_silent(sock):
    return not is_ready(sock, selectors.EVENT_READ, 0)


@pytest.fixture
def against(target, connect, keys):
    """against(play, flags...) -> our client, connected to a server that does play(peer) for every connection."""
    identity = legacy_peer.Identity.load(keys.server.path)

    def launch(play, *flags, tunnels=("0:127.0.0.1:9",), identity=identity):
        def handle(connection):
            play(legacy_peer.Server(connection, identity, PATIENCE))
        return connect(target(handle).port, "--legacy", *flags, *tunnels)
    return launch


def running(client):
    """The local port of a client whose test connection was taken, which the fixture `against` leaves to the test."""
    client.wait_for(READY)
    return int(client.wait_for(LISTENING).group(1))


def echoing(peer, n=None):
    """A server's rightful part: handshake, then whatever comes, back; at most n messages. Returns whether there were any."""
    peer.handshake()
    message = None
    while n != 0:
        got = peer.receive()
        if got is None:
            return message is not None
        message = got
        peer.send(message)
        n = n and n - 1
    return True


@every_bad_data
def test_bad_data_from_the_server(against, bad, encrypt):
    todo = [bad]

    def play(peer):
        peer.handshake()
        # The connection that tests brings nothing; the first that brings something meets the bad data, later ones an honest echo.
        message = peer.receive()
        while message is not None:
            peer.send(message)
            if todo:
                send_bad(peer, todo.pop())
                peer.drain()
                return
            message = peer.receive()

    client = against(play, *(["-e"] if encrypt else []))
    port = running(client)
    before = len(complaints(client))
    with dial(port) as local:
        local.sendall(b"ping")
        assert receive_exactly(local, 4) == b"ping"
        assert ending(local) == (b"", "reset")
    with dial(port) as local:
        local.sendall(b"alive")
        assert receive_exactly(local, 5) == b"alive"
    client.stop()
    assert_harmless(client)
    assert len(complaints(client)) == before + 1, client.output


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("text, shown", [("no route to host", "no route to host"), (ESCAPES, "title"), (LONG, "A" * 100), ("", "")],
                         ids=["words", "escapes", "long", "empty"])
def test_error_after_the_handshake(against, text, shown, encrypt):
    # The original answers so where it cannot reach the remote: after HandshakeCompletion.
    def play(peer):
        peer.handshake()
        if peer.receive() is not None:
            peer.send(Error(REMOTE_FAILED, text))
            peer.end()
            peer.drain()

    client = against(play, *(["-e"] if encrypt else []))
    port = running(client)
    before = len(complaints(client))
    with dial(port) as local:
        local.sendall(b"ping")
        assert ending(local) == (b"", "reset")
    client.wait_for("(?s)❌.*%s|%s" % (shown, shown))
    client.stop()
    assert_harmless(client)
    assert len(complaints(client)) == before + 1, client.output


def test_bad_datagrams_end_their_link_alone(served, udp_echo):
    server = served()
    other = server.client("127.0.0.1:%d" % udp_echo.port, udp=True).handshake()
    peer = server.client("127.0.0.1:%d" % udp_echo.port, udp=True).handshake()
    for each in (peer, other):
        each.send(UdpData(b"ping"))
        assert each.expect_data(4, UdpData) == b"ping"
    peer.send(Data(b"a stream's message"))
    peer.drain()
    other.send(UdpData(b"pong"))
    assert other.expect_data(4, UdpData) == b"pong"
    server.check(of(peer.socket))


def test_datagram_that_no_socket_takes(served, udp_echo):
    # 65508 bytes fit into a frame, not into a datagram: whatever becomes of the link, nobody else notices.
    server = served()
    other = server.client("127.0.0.1:%d" % udp_echo.port, udp=True).handshake()
    peer = server.client("127.0.0.1:%d" % udp_echo.port, udp=True).handshake()
    for size in (65508, 100000):
        with contextlib.suppress(ConnectionError):
            peer.send(UdpData(bytes(size)))
    with contextlib.suppress(ConnectionError):
        peer.send(UdpData(b"after"))
        assert peer.expect_data(5, UdpData) == b"after"
    other.send(UdpData(b"pong"))
    assert other.expect_data(4, UdpData) == b"pong"
    server.honest()


def test_a_link_reset_by_its_client(served, target):
    endings = queue.Queue()
    server = served()
    peer = server.client("127.0.0.1:%d" % target(lambda connection: endings.put(ending(connection))).port).handshake()
    # SO_LINGER 0 makes close() a reset.
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.socket.close()
    assert endings.get(timeout=PATIENCE)[1] == "reset"
    server.honest()


# ---------------------------------------------------------------------------------------------------- against our client


def failed(client, pattern, code):
    """The client has ended with this code (None: any but 0) and one complaint, which has the pattern."""
    assert client.wait() == code if code is not None else client.wait() != 0, client.output
    assert_harmless(client)
    # Without -e it may warn that it does not encrypt.
    lines = [line for line in client.lines if "❌" in line]
    assert len(lines) == 1 and len(complaints(client)) <= 2, client.output
    assert re.search(pattern, lines[0]), lines[0]


OWN_WORDS = "words of the server"


def answer(message_or_bytes, ends=False):
    """A server that answers the client's preamble with this."""
    def play(peer):
        peer.receive_preamble()
        peer.send_raw(message_or_bytes) if isinstance(message_or_bytes, bytes) else peer.send(message_or_bytes)
        if ends:
            peer.end()
    return play


def preamble(**fields):
    """A server whose preamble is right except for these."""
    def play(peer):
        peer.receive_preamble()
        peer.send_preamble(**{name: value(peer) if callable(value) else value for name, value in fields.items()})
    return play


def by(identity):
    """A server with another key than the one that the client knows."""
    def play(peer):
        peer.identity = identity
        peer.receive_preamble()
        peer.send_preamble()
    return play


SERVER_PREAMBLE = ServerPreamble("x" * 43, bytes(32), bytes(64), bytes(32))
# name: (what the server does in place of a right ServerPreamble, what the client says, its exit code)
SERVERS = {
    "closes": (lambda peer: peer.receive_preamble() and peer.end(), "clos|end", 1),
    "closes at once": (lambda peer: peer.socket.close(), "clos|end|reset", 1),
    "is HTTP": (answer(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "", 1),
    "is SSH": (answer(b"SSH-2.0-OpenSSH_9.6\r\n"), "", 1),
    "size 130817": (answer(frame(b"", size=LIMIT + 1)), "130817|130,817", 1),
    "size 2^64-1": (answer(frame(b"", size=(1 << 64) - 1)), "", 1),
    "the end inside a frame": (answer(frame(encode(SERVER_PREAMBLE))[:-1], ends=True), "", 1),
    "leftover bytes": (answer(encode(SERVER_PREAMBLE) + b"\0"), "", 1),
    "a length of 64 bits too many": (answer(b"\1\xfd" + b"\xff" * 8), "", 1),
    "size 0": (answer(frame(b"")), "", 1),
    "shutdown": (answer(Shutdown()), "", 1),
    "encrypted before there is a key": (answer(frame(encode(SERVER_PREAMBLE), flag=1)), "", 1),
    # It would do without any key.
    "completion at once": (answer(HandshakeCompletion()), "", 1),
    "data at once": (answer(Data(b"x")), "", 1),
    "the client's own message": (lambda peer: peer.send(peer.receive_preamble()), "", 1),
    "a signature of zeros": (preamble(signature=bytes(64)), "signature", None),
    "a signature by another key": (preamble(signature=lambda peer: OTHER.private.sign(peer.client.challenge)), "signature", None),
    "a signature of its own challenge": (preamble(signature=lambda peer: peer.sign(peer.challenge)), "signature", None),
    "a signature of 63 bytes": (preamble(signature=bytes(63)), "", None),
    "another key, rightly": (by(OTHER), "Test connection failed: Server's public key `%s` is not in the known hosts file" % OTHER.public, 3),
    "a key spelled otherwise": (preamble(identity_public_key=lambda peer: last_character_changed(peer.identity.public)), "", None),
    "a key of escape codes": (preamble(identity_public_key=ESCAPES), "", None),
    "a key of 5000 characters": (preamble(identity_public_key=LONG), "", None),
    "a challenge of 31 bytes": (preamble(challenge=bytes(31)), "", 1),
    # Whoever signs all lengths signs other protocols' documents.
    "a challenge of 64 bytes": (preamble(challenge=bytes(64)), "", 1),
    "an exchange key of 31 bytes": (preamble(exchange_public_key=bytes(31)), "", 1),
    "invalid host": (answer(Error(INVALID_HOST, OWN_WORDS)), OWN_WORDS, 1),
    "invalid key": (answer(Error(INVALID_KEY, OWN_WORDS)), OWN_WORDS, 3),
    "unknown": (answer(Error(UNKNOWN, OWN_WORDS)), OWN_WORDS, 1),
    "an unknown code": (answer(Error(77, OWN_WORDS)), "", 1),
    "escape codes": (answer(Error(INVALID_HOST, ESCAPES)), "title", 1),
    "a long text": (answer(Error(INVALID_HOST, LONG)), "A" * 100, 1),
}


@pytest.mark.parametrize("play, says, code", SERVERS.values(), ids=SERVERS)
def test_instead_of_a_server_preamble(against, play, says, code):
    rest = []

    def whole(peer):
        with contextlib.suppress(OSError):
            play(peer)
            rest.append(peer.drain())

    failed(against(whole, "-e", *NO_DEADLINE), says, code)
    # Nothing signed, not even the client's name, for a server that has not proved who it is.
    assert set(rest) <= {b""}


def authenticated(message_or_bytes, ends=False):
    """A server that does everything right until HandshakeCompletion, in place of which it sends this."""
    def play(peer):
        peer.receive_preamble()
        peer.send_preamble()
        peer.receive_authentication()
        peer.send_raw(message_or_bytes) if isinstance(message_or_bytes, bytes) else peer.send(message_or_bytes)
        if ends:
            peer.end()
    return play


COMPLETIONS = {
    "the end": (authenticated(b"", ends=True), "clos|end", 1),
    "invalid key": (authenticated(Error(INVALID_KEY, OWN_WORDS)), OWN_WORDS, 3),
    "invalid host": (authenticated(Error(INVALID_HOST, OWN_WORDS)), OWN_WORDS, 1),
    "remote failed": (authenticated(Error(REMOTE_FAILED, OWN_WORDS)), OWN_WORDS, 1),
    "escape codes": (authenticated(Error(UNKNOWN, ESCAPES)), "title", 1),
    "data": (authenticated(Data(b"x")), "", 1),
    "a second preamble": (authenticated(SERVER_PREAMBLE), "", 1),
    "leftover bytes": (authenticated(frame(encode(HandshakeCompletion()) + b"\0")), "", 1),
    "size 130817": (authenticated(frame(b"", size=LIMIT + 1)), "", 1),
    "the end inside a frame": (authenticated(frame(encode(HandshakeCompletion()))[:-1], ends=True), "", 1),
}


@pytest.mark.parametrize("play, says, code", COMPLETIONS.values(), ids=COMPLETIONS)
def test_instead_of_completion(against, play, says, code):
    def whole(peer):
        play(peer)
        peer.drain()

    failed(against(whole, "-e", *NO_DEADLINE), says, code)


def test_exchange_key_of_small_order_from_the_server(against):
    def play(peer):
        peer.receive_preamble()
        peer.send_preamble(exchange_public_key=bytes(32))
        peer.receive_authentication()
        peer.send(HandshakeCompletion())
        peer.drain()

    failed(against(play, "-e", *NO_DEADLINE), "", None)


def test_server_bytes_come_one_by_one(against):
    def play(peer):
        peer.socket = ByteByByte(peer.socket)
        echoing(peer)

    client = against(play, "-e")
    with dial(running(client)) as local:
        local.sendall(b"slowly")
        assert receive_exactly(local, 6) == b"slowly"


@pytest.mark.parametrize("tunnels", [(), ("0:127.0.0.1:9",)], ids=["test only", "tunnel"])
def test_a_server_that_accepts_and_never_answers(against, tunnels):
    def play(peer):
        peer.drain()

    client = against(play, *SHORT_DEADLINE, tunnels=tunnels)
    failed(client, "(?i)time|deadline|answer|within 1 s", 1)


def test_a_server_that_never_ends_its_answer(against):
    # One byte at a time keeps a deadline for each read from ever passing.
    def play(peer):
        peer.receive_preamble()
        drip(peer.socket, frame(encode(Error(UNKNOWN, LONG))))

    failed(against(play, *SHORT_DEADLINE), "(?i)time|deadline|answer|within 1 s", 1)


# ---------------------------------------------------------------------------------------------------- keys that do not fit


@pytest.mark.parametrize(("greeting", "says"), [
    (b"SSH-2.0-OpenSSH_9.2p1\r\n", "begins with 'SS', as from sshd \\(with ssh://host"), (b"\x1b[31m", r"'\\x1b\["), (b"\0\0\0", "--legacy"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "'HT', as from a web server"), (b"220 mail ESMTP\r\n", "'22', as from a mail"),
    (b"\x15\x03\x01\x00\x02\x02\x46", r"'\\x15\\x03', as from a TLS server")])
def test_a_port_where_something_else_answers(target, connect, greeting, says):
    def greet(connection):
        connection.sendall(greeting)
        receive_all(connection)
    client = connect(target(greet).port, "0:127.0.0.1:1")
    client.wait_for("❌ Test connection failed: .*ratrod2; .*" + says)
    assert client.wait() == 1


def test_an_unauthorized_client(serve, connect, keys):
    keys.server.write("authorized_keys", make_keys(keys.server.path / "other").public + "\n")
    server, port = serve("--legacy")
    client = connect(port, "--legacy", "0:127.0.0.1:9")
    failed(client, "Test connection failed.*%s" % keys.client.public, 3)
    line = one_complaint(server, keys.client.public)
    assert re.search(r"127\.0\.0\.1:\d+", line)


def test_an_unknown_server(serve, connect, keys):
    keys.client.write("known_hosts", make_keys(keys.client.path / "other").public + "\n")
    _, port = serve("--legacy")
    client = connect(port, "--legacy", "0:127.0.0.1:9")
    failed(client, "❌ Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public, 3)


@pytest.mark.parametrize("tunnels", [(), ("0:127.0.0.1:9",)], ids=["test only", "tunnel"])
def test_the_same_key_at_both_ends(serve, ratrod, keys, tunnels):
    # What a newcomer runs into who tries both ends on one machine.
    keys.server.trust(keys.server, "known_hosts")
    keys.server.trust(keys.server, "authorized_keys")
    _, port = serve("--legacy")
    client = ratrod("-k", keys.server.path, "connect", "--legacy", "127.0.0.1:%d" % port, *tunnels)
    failed(client, "server and client use the same key.*another -k", None)


def test_a_key_that_is_authorized_while_the_server_runs(serve, connect, keys, tcp_echo):
    keys.server.write("authorized_keys", "")
    _, port = serve("--legacy")
    assert connect(port, "--legacy").wait() == 3
    keys.server.trust(keys.client, "authorized_keys")
    client = connect(port, "--legacy")
    assert client.wait() == 0, client.output


# ---------------------------------------------------------------------------------------------------- strangers that stay


def drip(sock, data):
    """Sends a byte every tenth of a second until the other end closes, which is returned; far longer than any deadline here."""
    for i in range(len(data)):
        try:
            sock.sendall(data[i:i + 1])
            if is_ready(sock, selectors.EVENT_READ, 0.1):
                return sock.recv(1) == b""
        except ConnectionError:
            return True
    return False


def test_a_silent_stranger_is_cut_at_the_deadline(served):
    server = served(*SHORT_DEADLINE)
    tunnel = server.honest()
    with server.dial() as stranger:
        # Meanwhile everybody else is served.
        while is_silent(stranger):
            server.ping(tunnel)
            server.honest().socket.close()
        assert ending(stranger)[0] == b""
        peer = of(stranger)
    server.check(peer)


def test_silence_instead_of_authentication_is_cut_at_the_deadline(served):
    server = served(*SHORT_DEADLINE)
    tunnel = server.honest()
    peer = server.client()
    peer.send_preamble()
    peer.receive_preamble()
    while is_silent(peer.socket):
        server.ping(tunnel)
        server.honest().socket.close()
    peer.drain()
    server.check(of(peer.socket))


def test_a_dripping_preamble_is_cut_at_the_deadline(served):
    server = served(*SHORT_DEADLINE)
    with server.dial() as stranger:
        assert drip(stranger, frame(encode(GOOD)))
        peer = of(stranger)
    server.check(peer)


def test_dripping_authentication_is_cut_at_the_same_deadline(served):
    # One deadline for the whole handshake: a message that was right buys no more time.
    server = served(*SHORT_DEADLINE)
    peer = server.client()
    peer.send_preamble()
    peer.receive_preamble()
    assert drip(peer.socket, frame(encode(peer.authentication())))
    server.check(of(peer.socket))


def test_the_deadline_is_not_for_tunnels(served, target):
    # An authenticated stream may be silent for as long as it likes, and so may a client that only tests.
    gate = queue.Queue()

    def remote(connection):
        gate.get(timeout=PATIENCE)
        connection.sendall(b"late")

    server = served(*SHORT_DEADLINE)
    peer = server.client("127.0.0.1:%d" % target(remote).port).handshake()
    with server.dial() as stranger:
        assert ending(stranger)[0] == b""
    gate.put(None)
    assert peer.expect_data(4) == b"late"


MANY = ["127.0.%d.%d" % (i // 50 + 1, i % 50 + 1) for i in range(100)]


@pytest.mark.parametrize("sources", [["127.0.0.1"], MANY], ids=["one source", "many sources"])
def test_silent_strangers_do_not_keep_others_out(served, sources):
    if not sys.platform.startswith("linux") and len(sources) > 1:
        pytest.skip("only Linux has all of 127.0.0.0/8")
    server = served()
    tunnel = server.honest()
    with contextlib.ExitStack() as stack:
        for i in range(100):
            stack.enter_context(server.dial(sources[i % len(sources)]))
        for _ in range(3):
            server.honest().socket.close()
        server.ping(tunnel)
    server.honest()
    eventually(lambda: server.program.process.poll() is None, "the server lives")


def test_strangers_that_never_read(served):
    # The server's answers to them wait in its sockets, not in its threads.
    server = served()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stranger = stack.enter_context(server.dial())
            stranger.sendall(frame(encode(GOOD)))
        server.honest()


# ---------------------------------------------------------------------------------------------------- anything at all


class Mutating:
    """A socket on which the n-th thing that is sent is damaged; what would follow it is the end."""

    def __init__(self, sock, n, choice):
        self._socket, self._left, self._choice = sock, n, choice

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def sendall(self, data):
        if self._left > 0:
            self._left -= 1
            return self._socket.sendall(data)
        data, at = bytearray(data), self._choice.randrange(len(data))
        kind = self._choice.randrange(5)
        if kind == 0:
            data[at] ^= 1 << self._choice.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = bytes(self._choice.randrange(256) for _ in range(self._choice.randrange(1, 10)))
        elif kind == 3:
            del data[at:at + self._choice.randrange(1, 10)]
        else:
            data[at] = self._choice.choice((0, 1, 0x7f, 0x80, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff))
        self._socket.sendall(data)
        self._socket.shutdown(socket.SHUT_WR)
        return None


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_clients_that_send_anything(served, target, encrypt):
    # One damage each, at any byte of any message, the same ones in every run.
    got = queue.Queue()

    def remote(connection):
        data, how = ending(connection)
        got.put(data)
        connection.sendall(data)

    server = served(*SHORT_DEADLINE)
    tunnel = server.honest()
    remote_address = "127.0.0.1:%d" % target(remote).port
    for seed in range(150):
        with legacy_peer.Client(server.dial(), server.identity, remote_address, encrypt, timeout=PATIENCE) as peer:
            peer.socket = Mutating(peer.socket, seed % 3, random.Random(seed))
            with contextlib.suppress(OSError, ValueError):
                peer.handshake()
                peer.send(Data(b"question"))
            peer.drain()
    while encrypt and not got.empty():
        assert b"question".startswith(got.get())
    server.ping(tunnel)
    server.honest()
    server.program.stop()
    assert_harmless(server.program)


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_servers_that_send_anything(against, encrypt):
    seeds = iter(range(-1, 150))

    def play(peer):
        seed = next(seeds)
        if seed >= 0:
            peer.socket = Mutating(peer.socket, seed % 3, random.Random(seed))
        with contextlib.suppress(OSError, ValueError):
            echoing(peer)
        peer.drain()

    client = against(play, *SHORT_DEADLINE, *(["-e"] if encrypt else []))
    port = running(client)
    for _ in range(150):
        # A reset may be there before connect() returns, or sendall().
        with contextlib.suppress(ConnectionError):
            with dial(port) as local:
                with contextlib.suppress(OSError):
                    local.sendall(b"question")
                    local.shutdown(socket.SHUT_WR)
                data, _ = ending(local)
                assert not encrypt or b"question".startswith(data)
    if client.process.poll() is None:
        client.stop()
    else:  # what was changed was the server's key or its signature: to go on after that would be wrong
        assert client.wait() == AUTHENTICATION_FAILED and re.search("❌ .*(key|signature)", client.lines[-1]), client.output
    assert_harmless(client)
