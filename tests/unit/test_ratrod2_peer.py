"""The independent ratrod2 peer against the vectors, and against itself: what the other ratrod2 tests stand on."""

import json
import pathlib
import queue
import re
import socket
import subprocess
import sys
import threading

import pytest

from support import ratrod2_peer as peer
from support.programs import PATIENCE
from support.ratrod2_peer import CHACHA, SUITES, Client, Handshake, Identity, PeerError, ProtocolError, Server

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "support" / "vectors"
NOISE = json.loads((VECTORS / "noise_xx_25519_chachapoly_sha256.json").read_text())
RATROD2 = json.loads((VECTORS / "ratrod2.json").read_text())
CLIENT_SEED, SERVER_SEED = b"c" * 32, b"s" * 32
NUMBER = bytes(range(16))
every_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
every_vector = pytest.mark.parametrize("vector", RATROD2, ids=lambda vector: "suite %d" % vector["suite"])


def unhex(vector, *names):
    return [bytes.fromhex(vector[name]) for name in names]


def need_suite(vector):
    if vector["suite"] not in SUITES:
        pytest.skip("this PyNaCl has no AEGIS-128L")
    return SUITES[vector["suite"]]


class Wire:
    """A socket for vectors: gives prepared bytes, keeps what is sent."""

    def __init__(self, incoming):
        self.incoming = bytearray(incoming)
        self.sent = bytearray()

    def sendall(self, data):
        self.sent += data

    def recv(self, n):
        data = bytes(self.incoming[:n])
        del self.incoming[:n]
        return data


def framed(message):
    return len(message).to_bytes(2, "big") + message


# ---------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("vector", NOISE, ids=lambda vector: vector["protocol_name"])
def test_noise_vector(vector):
    assert vector["protocol_name"].encode() == peer.NOISE_NAME
    sides = []
    for side in ("init", "resp"):
        static, ephemeral, prologue = unhex(vector, side + "_static", side + "_ephemeral", side + "_prologue")
        sides.append(Handshake(static, side == "init", ephemeral, prologue))
    for message in vector["messages"][:3]:
        payload, ciphertext = unhex(message, "payload", "ciphertext")
        assert sides[0].write_message(payload) == ciphertext
        assert sides[1].read_message(ciphertext) == payload
        sides.reverse()
    assert sides[0].handshake_hash == sides[1].handshake_hash == bytes.fromhex(vector["handshake_hash"])
    assert sides[0].split_keys == sides[1].split_keys
    # The transport messages of the vector are Noise's own, not ratrod2's records. They prove k1 and k2. The responder
    # speaks first.
    for number, message in enumerate(vector["messages"][3:]):
        payload, ciphertext = unhex(message, "payload", "ciphertext")
        cipher = CHACHA.cipher(sides[0].split_keys[1 - number % 2])
        assert cipher.encrypt(CHACHA.nonce(number // 2), payload, b"") == ciphertext


@every_vector
def test_handshake_vector(vector):
    assert bytes.fromhex(vector["prologue"]) == peer.OPENING
    sides = []
    for side in ("client", "server"):
        identity = Identity.from_seed(*unhex(vector, side + "_seed"))
        assert identity.public == bytes.fromhex(vector[side + "_identity"])
        assert peer.keypair(identity.static_private).public_bytes == identity.static_public
        assert peer.convert(identity.public) == peer.convert(peer.negative(identity.public)) == identity.static_public
        sides.append(Handshake(identity.static_private, side == "client", *unhex(vector, side + "_ephemeral")))
    client, server = sides
    messages, payloads = ([bytes.fromhex(text) for text in vector[name]] for name in ("messages", "payloads"))
    for writer, reader, payload, message in zip((client, server, client), (server, client, server), payloads, messages):
        assert writer.write_message(payload) == message
        assert reader.read_message(message) == payload
    h, k1, k2, *keys = unhex(vector, "handshake_hash", "k1", "k2", "client_to_server_key", "server_to_client_key")
    for side in (client, server):
        assert (side.handshake_hash, side.split_keys) == (h, (k1, k2))
        assert side.record_keys(peer.AEGIS if vector["suite"] == 1 else CHACHA) == tuple(keys)


@every_vector
def test_records_of_the_vector(vector):
    suite = need_suite(vector)
    for side, key in (("client_records", "client_to_server_key"), ("server_records", "server_to_client_key")):
        writer, reader = (make(suite, *unhex(vector, key)) for make in (peer.RecordWriter, peer.RecordReader))
        for record in vector[side]:
            content, wire = unhex(record, "content", "wire")
            assert writer.number == reader.number == record["number"]
            assert writer.seal(record["type"], content) == wire
            assert reader.open(wire) == (record["type"], content, wire)


def wires(vector, side):
    return b"".join(bytes.fromhex(record["wire"]) for record in vector[side + "_records"])


@every_vector
def test_the_whole_client_makes_the_vectors_bytes(vector):
    suite, (_, second, third) = need_suite(vector), (bytes.fromhex(text) for text in vector["messages"])
    seed, server, ephemeral = unhex(vector, "client_seed", "server_identity", "client_ephemeral")
    wire = Wire(framed(second) + wires(vector, "server"))
    client = Client(wire, seed, server=server, ephemeral=ephemeral, suites=(1, 2)).handshake()
    assert (client.suite, client.version, client.instance) == (suite, "2.1.0", b"instan\x01\x00")
    stream = client.open("db.example:5432", number=NUMBER)
    stream.send(b"hello")
    stream.end()
    assert stream.receive_all() == b"world"
    assert (stream.bound, stream.acknowledged) == ("", 0)
    stream.over()  # which sends Ack
    assert (client.state, stream.acknowledged, stream.taken) == ("Idle", 6, 6)
    client.send_open(peer.TCP, "db.example:5432", stream=NUMBER, attempt=2, at=5, taken=300)
    client.send_abandon(NUMBER)
    client.send_record(peer.SESSION, peer.encode_session(7, "db.example:5432", 3))
    first, = unhex(vector, "first_bytes_of_client")
    assert bytes(wire.sent) == first + framed(third) + wires(vector, "client")
    ack, address = client.read_to_end()
    assert peer.decode_ack(ack.content) == 256 * 1024
    assert peer.decode_session_address(address.content) == (7, "192.0.2.10:5432")


@every_vector
def test_the_whole_server_makes_the_vectors_bytes(vector):
    suite, (_, second, third) = need_suite(vector), (bytes.fromhex(text) for text in vector["messages"])
    seed, client, ephemeral = unhex(vector, "server_seed", "client_identity", "server_ephemeral")
    wire = Wire(*unhex(vector, "first_bytes_of_client"))
    wire.incoming += framed(third) + wires(vector, "client")
    # A server takes the client's first suite that it offers itself: to come to suite 2 it must offer nothing else.
    server = Server(wire, seed, [client], "2.1.0", b"instan\x01\x00", ephemeral=ephemeral, suites=[suite.id])
    server.handshake()
    assert (server.suite, server.offered) == (suite, (1, 2))
    stream = server.accept()
    assert (stream.kind, stream.target, stream.number, stream.attempt) == (peer.TCP, "db.example:5432", NUMBER, 1)
    stream.opened()
    assert stream.receive_all() == b"hello"
    stream.send(b"world")
    stream.end()
    stream.over()
    assert server.read_open() == (peer.TCP, "db.example:5432", b"", NUMBER, 2, 5, 300)
    assert stream.acknowledged == 6
    abandon, session = server.read_to_end()
    assert peer.decode_abandon(abandon.content) == NUMBER
    assert peer.decode_session(session.content) == (7, "db.example:5432", 3)
    server.send_ack(256 * 1024)
    server.send_record(peer.SESSION_ADDRESS, peer.encode_session_address(7, "192.0.2.10:5432"))
    assert bytes(wire.sent) == framed(second) + wires(vector, "server")


# ---------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("n, size", [(0, 1), (250, 1), (251, 3), (65535, 3), (65536, 5), (2**32, 9), (2**64 - 1, 9)])
def test_varint(n, size):
    decoder = peer.Decoder(peer.varint(n))
    assert (decoder.left, decoder.varint(), decoder.left) == (size, n, 0)


@pytest.mark.parametrize("decode, contents", [
    (peer.decode_str, [b"", b"\x02a", b"\x01ab", b"\x01\xff", b"\xff", b"\xfb\x00"]),
    (peer.decode_error, [b"\x04\x00", b"\x03\x00x", b"\x03"]),
    (peer.decode_open, [b"", b"\x00\x00", b"\x04\x00", b"\x03\x00instan", b"\x03\x00instancex", b"\x02\x00x",
                        b"\x01\x00", peer.encode_open(peer.TCP)[:-1], peer.encode_open(peer.TCP) + b"x"]),
    (peer.decode_opened, [b"", b"\x00", b"\x00" + bytes(7), b"\x00" + bytes(9)]),
    (lambda content: peer.decode_opened(content, peer.UDP), [b"", b"\x00" + bytes(8)]),
    (peer.decode_ack, [bytes(7), bytes(9)]),
    (peer.decode_abandon, [bytes(15), bytes(17)]),
    (peer.decode_datagrams, [b"\x00\x00\x00", b"\x00\x00\x00\x01\x00\x02x"]),
    (peer.decode_session, [b"\x00\x00\x00\x01\x00", b"\x00\x00\x00\x01\x00" + bytes(5)]),
    (peer.decode_session_address, [b"\x00\x00\x00\x01", b"\x00\x00\x00\x01\x00x"]),
    (peer.decode_session_over, [b"\x00\x00\x00\x01\x03\x00x"]),
])
def test_contents_that_are_refused(decode, contents):
    for content in contents:
        with pytest.raises(ProtocolError):
            decode(content)


@pytest.mark.parametrize("encode, decode, values", [
    (peer.encode_open, peer.decode_open, (peer.TCP, "a:1", b"", NUMBER, 2**32 - 1, 2**64 - 1, 2**64 - 2)),
    (peer.encode_open, peer.decode_open, (peer.UDP, "", b"", b"", 0, 0, 0)),
    (peer.encode_open, peer.decode_open, (peer.LISTEN, "127.0.0.1:0", b"instance", b"", 0, 0, 0)),
    (peer.encode_opened, peer.decode_opened, ("127.0.0.1:9", 2**64 - 1)),
    (peer.encode_session, peer.decode_session, (2**32 - 1, "a:1", 2**32 - 2)),
    (peer.encode_session_address, peer.decode_session_address, (2**32 - 1, "[::1]:53")),
    (peer.encode_session_over, peer.decode_session_over, (7, peer.INVALID_HOST, "no")),
    (lambda *pairs: peer.encode_datagrams(pairs), lambda content: tuple(peer.decode_datagrams(content)),
     ((1, b""), (2, b"x" * 65507))),
])
def test_contents_that_are_taken(encode, decode, values):
    assert decode(encode(*values)) == values


def test_the_first_open_of_a_stream_draws_its_number():
    first, second = (peer.decode_open(peer.encode_open(peer.TCP, "a:1")) for _ in range(2))
    assert first.stream != second.stream and first[4:] == second[4:] == (1, 0, 0)


# ---------------------------------------------------------------------------------------------------- two ends joined


class Joined:
    """A client and a server of this peer over a socketpair. The server runs serve(server) on a thread."""

    def __init__(self, serve, client_options=None, server_options=None, wrap=lambda sock: sock):
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.settimeout(PATIENCE)
        self.client = Client(wrap(ours), CLIENT_SEED, **(client_options or {}))
        self.server = Server(theirs, SERVER_SEED, **(server_options or {}))
        self._outcome = queue.Queue()
        threading.Thread(target=self._run, args=(serve,), daemon=True).start()

    def _run(self, serve):
        with self.server:
            try:
                self._outcome.put(serve(self.server))
            except Exception as error:
                self._outcome.put(error)

    def outcome(self):
        """What serve() returned or raised, after the client's FIN."""
        self.client.sock.close()
        return self.wait()

    def wait(self):
        return self._outcome.get(timeout=PATIENCE)


def serving(handler):
    return lambda server: server.handshake().serve_streams(handler)


@every_suite
def test_streams_follow_each_other_on_one_link(suite):
    """3 MB are more than the buffers between the two ends, and far more than what wants an Ack."""
    joined = Joined(serving(peer.echo), {"suites": [suite.id] if suite is CHACHA else [suite.id, CHACHA.id]})
    client = joined.client.handshake()
    assert client.suite is joined.server.suite is suite
    assert client.remote_identity == Identity.from_seed(SERVER_SEED).public
    assert client.instance == peer.INSTANCE
    with client.keeping_alive(interval=0.001):
        for data in (b"first", b"", b"x" * 3_000_000, b"last"):
            assert client.exchange("a:1", data) == data
            assert client.state == "Idle"
    joined.server.send_keepalive()
    assert client.exchange("a:1", b"again") == b"again"
    assert joined.outcome() is None


def test_both_half_closes():
    def handler(stream):
        stream.opened()
        if stream.target == "server-first:1":
            stream.send(b"bye")
            stream.end()
            received.append(stream.receive_all())
        else:
            received.append(stream.receive_all())
            stream.send(b"bye")
    received = []
    joined = Joined(serving(handler))
    client = joined.client.handshake()
    stream = client.open("server-first:1")
    assert stream.receive_all() == b"bye"
    assert client.state == "Got"
    stream.send(b"late")
    stream.finish()
    stream = client.open("client-first:1")
    stream.send(b"early")
    stream.end()
    assert client.state == "AskedEnd"
    assert stream.receive_all() == b"bye"
    stream.over()
    assert joined.outcome() is None
    assert received == [b"late", b"early"]


def test_error_ends_the_link():
    joined = Joined(serving(lambda stream: stream.refuse(peer.REMOTE_FAILED, "no such remote")))
    stream = joined.client.handshake().open("a:1")
    with pytest.raises(PeerError) as caught:
        stream.wait_opened()
    assert (caught.value.code, caught.value.text) == (peer.REMOTE_FAILED, "no such remote")
    assert joined.client.read_to_end() == []
    joined = Joined(serving(peer.echo))
    stream = joined.client.handshake().open("a:1")
    stream.wait_opened()
    threading.Thread(target=stream.fail, args=(peer.UNKNOWN, "my originator vanished"), daemon=True).start()
    outcome = joined.wait()
    assert isinstance(outcome, PeerError) and outcome.text == "my originator vanished"


def test_fin_during_a_stream_and_inside_a_record():
    joined = Joined(serving(peer.echo))
    joined.client.handshake().open("a:1").wait_opened()
    assert isinstance(joined.outcome(), peer.LinkEnded)
    joined = Joined(serving(peer.echo))
    client = joined.client.handshake()
    client.send(client.writer.seal(peer.KEEPALIVE)[:-1])
    assert isinstance(joined.outcome(), peer.LinkBroken)


def test_udp_sessions():
    def answer(target, data):
        return None if data == b"silence" else target.encode() + b"/" + data
    joined = Joined(serving(lambda stream: peer.serve_udp(stream, answer)))
    client = joined.client.handshake().open_udp()
    client.session(1, "192.0.2.7:53")
    client.session(2, "b:53", outer=9)
    client.datagrams((1, b"one"), (2, b""), (1, b"silence"), (9, b"never opened"))
    assert client.read_udp() == (peer.DATAGRAMS, [(1, b"192.0.2.7:53/one")])
    assert client.read_udp() == (peer.SESSION_ADDRESS, (2, "192.0.2.1:53"))
    assert client.read_udp() == (peer.DATAGRAMS, [(2, b"b:53/")])
    client.session_over(1)
    client.datagrams((1, b"lost"), (2, b"x" * 65000))
    assert client.read_udp() == (peer.DATAGRAMS, [(2, b"b:53/" + b"x" * 65000)])
    joined.server.session_address(2, "[2001:db8::1]:53")
    assert client.read_udp() == (peer.SESSION_ADDRESS, (2, "[2001:db8::1]:53"))
    joined.server.session_over(2, peer.REMOTE_FAILED, "gone")
    assert client.read_udp() == (peer.SESSION_OVER, (2, peer.REMOTE_FAILED, "gone"))
    assert joined.outcome() is None


def test_a_listen_link_turns_the_roles():
    def serve(server):
        stream = server.handshake().accept()
        assert (stream.kind, stream.target, stream.instance) == (peer.LISTEN, "127.0.0.1:0", b"instance")
        server.grant_listen("127.0.0.1:4711")
        return [server.exchange("127.0.0.1:9", data) for data in (b"one", b"two")]
    joined = Joined(serve)
    client = joined.client.handshake()
    assert client.listen("127.0.0.1:0", b"instance") == "127.0.0.1:4711"
    for _ in range(2):
        stream = client.accept()
        assert stream.target == "127.0.0.1:9"
        peer.echo(stream)
        stream.over()
    assert joined.outcome() == [b"one", b"two"]


# ---------------------------------------------------------------------------------------------------- attaching


class Links:
    """Links of one client to one server, which knows its streams on all of them."""

    def __init__(self, serve=None):
        self.streams = {}
        self.serve = serve or serving(peer.echo)

    def link(self):
        """(the client's end, the Joined)"""
        joined = Joined(self.serve, server_options={"streams": self.streams})
        return joined.client.handshake(), joined


def test_a_stream_goes_on_over_another_link():
    """The client's Data was lost with the first link, and so was half of the answer, with the Ack that was due."""
    links = Links()
    first, joined = links.link()
    stream = first.open("a:1")
    stream.send(b"abcdef")
    assert stream.receive() == b"abcdef"
    first.sock.shutdown(socket.SHUT_RD)  # what the server answers from here on is lost
    stream.send(b"ghi")
    assert isinstance(joined.outcome(), (peer.LinkEnded, OSError))
    with pytest.raises(OSError):
        stream.send(b"jkl")  # kept
    second, joined = links.link()
    stream.attach(second)
    assert stream.attempt == 2 and stream.link is second
    assert stream.wait_opened() == ""
    assert stream.acknowledged == 9  # what the server had taken
    stream.end()
    assert stream.receive_all() == b"ghijkl"
    stream.over()
    assert (stream.taken, stream.acknowledged, second.state) == (13, 13, "Idle")
    assert second.exchange("a:1", b"another stream") == b"another stream"
    assert joined.outcome() is None
    server_side = links.streams[stream.number]
    assert (server_side.attempt, server_side.taken, server_side.acknowledged) == (2, 13, 13)


@pytest.mark.parametrize("at, taken", [(0, 0), (3, 0), (0, 3), (9, 9), (10, 9), (9, 10), (10, 10), (4, 10)])
def test_both_sides_skip_what_they_have_taken(at, taken):
    """Both Ends had passed on the first link, and only Over was lost. The client claims to know less than it does."""
    links = Links(lambda server: (peer.echo(server.handshake().accept()), server.read_to_end()))
    first, joined = links.link()
    stream = first.open("a:1")
    stream.send(b"123456789")
    stream.end()
    assert stream.receive_all() == b"123456789"
    joined.outcome()
    links.serve = serving(peer.echo)
    second, joined = links.link()
    stream.attach(second, at=at, taken=taken)
    assert second.state == ("AskedEnd" if at == 10 else "Asked")
    stream.resend(2)
    stream.wait_opened()
    assert second.state == {(False, False): "Both", (True, False): "Sent", (False, True): "Got", (True, True): "Done"}[
        at == 10, taken == 10]
    stream.resend()
    assert stream.receive_all() == b""
    stream.over()
    assert joined.outcome() is None
    assert links.streams[stream.number].taken == stream.taken == stream.acknowledged == 10


def test_acks_are_said_and_awaited():
    def serve(server):
        stream = server.handshake().accept()
        stream.opened()
        assert stream.receive() == b"abc"
        stream.ack()
        stream.send(b"!")
        stream.ack(1)  # goes back
        return server.read_to_end()
    joined = Joined(serve)
    stream = joined.client.handshake().open("a:1")
    stream.send(b"abc")
    stream.wait_acknowledged()
    assert stream.acknowledged == 3
    with pytest.raises(ProtocolError, match="1 taken, of 3 sent and 3 acknowledged"):
        stream.wait_acknowledged(4)
    assert stream._pending[0].content == b"!"
    assert joined.outcome() == []


def test_acks_leave_while_a_direction_is_read_to_its_end():
    """And the opener's next Open acknowledges what no Ack has."""
    def serve(server):
        stream = server.handshake().accept()
        stream.opened()
        stream.send(b"x" * 100_000)
        stream.wait_acknowledged(peer.ACK_DUE)
        before = stream.acknowledged
        stream.finish()
        server.accept()
        return before, stream.acknowledged
    joined = Joined(serve)
    client = joined.client.handshake()
    stream = client.open("a:1")
    assert stream.receive_all() == b"x" * 100_000
    stream.end()
    stream.over(ack=False)
    client.open("b:1")
    before, after = joined.outcome()
    assert peer.ACK_DUE <= before <= 100_000 and after == 100_001


def test_the_last_ack_belongs_to_the_stream_before():
    def serve(server):
        peer.echo(server.handshake().accept())
        server.stream.over()
        assert server.stream.acknowledged == 0
        assert server.accept() is None
        return server.stream.acknowledged
    joined = Joined(serve)
    stream = joined.client.handshake().open("a:1")
    stream.send(b"hello")
    stream.finish()
    assert joined.outcome() == 6
    fresh = Joined(lambda server: server.handshake().accept())
    fresh.client.handshake().send_ack(0)
    assert isinstance(fresh.wait(), ProtocolError)


@pytest.mark.parametrize("before", [False, True], ids=["in place of Opened", "in place of Over"])
def test_close_instead(before):
    """In place of Over the stream is over all the same, and its opener still says Ack."""
    def serve(server):
        stream = server.handshake().accept()
        if before:
            peer.echo(stream)
        server.send_record(peer.CLOSE)
        return [record.type for record in server.read_to_end()]
    joined = Joined(serve)
    stream = joined.client.handshake().open("a:1")
    with pytest.raises(peer.LinkClosed):
        stream.finish() if before else stream.wait_opened()
    assert joined.outcome() == ([peer.ACK] if before else [])


def test_abandon_and_what_is_not_known():
    links = Links()
    first, joined = links.link()
    stream = first.open("a:1")
    stream.wait_opened()
    joined.outcome()
    second, joined = links.link()
    second.send_abandon(stream.number)
    stream.attach(second)
    with pytest.raises(PeerError):
        stream.wait_opened()
    assert second.read_to_end() == []
    second.sock.close()
    assert isinstance(joined.wait(), PeerError) and joined.server.abandoned == [stream.number]
    for fields in ({"at": 1}, {"taken": 1, "attempt": 2}):
        link, _ = links.link()
        link.send_open(peer.TCP, "a:1", **fields)
        with pytest.raises(PeerError):
            link.state = "Asked"
            link.read_record()


@pytest.mark.parametrize("wrong", [{"attempt": 1}, {"attempt": 0}, {"at": 4}, {"taken": 4}, {"target": "b:1"}], ids=str)
def test_what_an_acceptor_refuses_to_attach(wrong):
    """A `taken` beyond what was sent, an `at` beyond what was taken, an attempt that is not higher, another target."""
    links = Links()
    first, joined = links.link()
    stream = first.open("a:1")
    stream.send(b"abc")
    assert stream.receive() == b"abc"
    joined.outcome()
    second, joined = links.link()
    stream.attach(second, **wrong)
    assert isinstance(joined.wait(), ProtocolError)


def test_over_in_place_of_opened():
    joined = Joined(lambda server: (server.handshake().accept(), server.send_record(peer.OVER), server.accept()))
    client = joined.client.handshake()
    stream = client.open("a:1")
    assert stream.wait_opened() is None
    assert (stream.is_over, client.state) == (True, "Idle")
    joined.outcome()


# ---------------------------------------------------------------------------------------------------- refusals


def test_an_unauthorized_client_is_told_its_key():
    joined = Joined(serving(peer.echo), server_options={"authorized": [Identity.from_seed(b"x" * 32).public]})
    with pytest.raises(PeerError) as caught:
        joined.client.handshake()
    assert caught.value.code == peer.INVALID_KEY and joined.client.identity.public.hex() in caught.value.text
    assert isinstance(joined.outcome(), PeerError)


def refused(client_options=None, server_options=None):
    """What the server says to a client that goes as far as message 3."""
    joined = Joined(lambda server: server.begin_handshake(), client_options, server_options)
    joined.client.begin_handshake()
    error = joined.outcome()
    assert isinstance(error, ProtocolError)
    return str(error)


@pytest.mark.parametrize("options, reason", [
    ({"claimed": bytes(range(32))}, "static key|no usable"),
    ({"static": b"y" * 32}, "static key"),
    ({"claimed": Identity.from_seed(b"y" * 32).public}, "static key"),
    ({"claimed": peer.SMALL_ORDER_IDENTITY}, "no usable"),
    ({"claimed": b"short"}, "Preamble of 14 bytes|Authentication of 5 bytes"),
])
def test_identities_that_are_refused_by_both_ends(options, reason):
    assert re.search(reason, refused(options))
    with pytest.raises(ProtocolError, match=reason):
        Joined(lambda server: server.begin_handshake(), server_options=options).client.begin_handshake()


@pytest.mark.parametrize("point", peer.SMALL_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_small_order_points_really_are(point):
    """An attacker who computes with zero secrets passes where neither end checks, and is stopped where one does."""
    options = {"ephemeral": peer.odd_keypair(point), "attacker": True}
    unchecked = Joined(serving(peer.echo), options, {"attacker": True})
    assert unchecked.client.handshake().exchange("a:1", b"hello") == b"hello"
    checked = Joined(lambda server: server.begin_handshake(), options)
    with pytest.raises((peer.LinkEnded, ProtocolError)):
        checked.client.begin_handshake()
    assert isinstance(checked.outcome(), ProtocolError)


def test_odd_static_keys_get_as_far_as_the_identity():
    """What must refuse them is the comparison with the identity, and nothing before."""
    identity = Identity.from_seed(CLIENT_SEED)
    small = {"static": peer.odd_keypair(bytes(32)), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}
    assert "no usable" in refused(small, {"attacker": True})
    top_bit_set = identity.static_public[:31] + bytes([identity.static_public[31] | 0x80])
    assert "static key" in refused({"static": peer.odd_keypair(top_bit_set, identity.static_private)})


@pytest.mark.parametrize("message, length", [(b"x", 0), (b"x", 1025), (b"x", 65535)] + [
    (payload, None) for payload in (b"", b"\x00", b"\x01\x01", b"\x02\x02", b"\x03\x01\x03\x04")], ids=str)
def test_first_messages_that_are_refused(message, length):
    joined = Joined(lambda server: (server.read_opening(), server.read_client_preamble()))
    joined.client.send(peer.OPENING)
    joined.client.send_message(message if length is not None else joined.client.client_preamble(message), length)
    error = joined.outcome()
    assert isinstance(error, ProtocolError) and (length is None or "of %d bytes" % length in str(error))


def test_what_follows_a_handshake_payload_is_ignored():
    def serve(server):
        server.read_opening()
        server.read_client_preamble()
        server.send_message(server.server_preamble(server.identity.public + b"\x02instance" + b"later"))
        server.read_client_authentication()
        server.send_completion()
        server.serve_streams(peer.echo)
    client = Joined(serve, {"suites": [CHACHA.id]}).client
    client.send(peer.OPENING)
    client.send_message(client.client_preamble(b"\x01\x02later"))
    assert client.read_server_preamble().instance == client.instance == b"instance"
    client.send_message(client.client_authentication(client.identity.public + b"later"))
    client.read_completion()
    assert client.exchange("a:1", b"hello") == b"hello"


@pytest.mark.parametrize("rest, reason", [(b"\x01" + bytes(8), "not offered"), (b"\x03" + bytes(8), "not offered"),
                                          (b"\x02" + bytes(7), "of 40 bytes"), (b"", "of 32 bytes")])
def test_server_preambles_that_are_refused(rest, reason):
    joined = Joined(lambda server: (server.read_opening(), server.read_client_preamble(),
                                    server.send_message(server.server_preamble(server.identity.public + rest))),
                    {"suites": [CHACHA.id]})
    with pytest.raises(ProtocolError, match=reason):
        joined.client.begin_handshake()


@every_suite
def test_bad_records_are_refused(suite):
    """And so the explicit counters and lengths of the writer really make something wrong."""
    key = bytes(suite.key_length)
    too_long = suite.tag_length + 2 + peer.BULK_LIMIT
    for content, *wrong in ((b"", 1), (b"", None, suite.tag_length), (b"", None, too_long), (b"x" * 1025,)):
        with pytest.raises(ProtocolError):
            peer.RecordReader(suite, key).read(Wire(peer.RecordWriter(suite, key).seal(peer.END, content, *wrong)))
    writer, reader = peer.RecordWriter(suite, key), peer.RecordReader(suite, key)
    first, second = writer.seal(peer.DATA, b"1"), writer.seal(peer.DATA, b"2")
    for wire in (second, first[:-1] + bytes([first[-1] ^ 1]), bytes([first[0] ^ 1]) + first[1:]):
        with pytest.raises(ProtocolError):
            reader.open(wire)
    assert reader.open(first).content == b"1"
    with pytest.raises(ProtocolError):
        reader.open(first)
    assert reader.open(second).content == b"2"


AN_OPENED, SOME_DATA, AN_END = (peer.OPENED, peer.encode_opened()), (peer.DATA, b"x"), (peer.END, b"")
AN_ACK, AN_OPEN = (peer.ACK, peer.encode_ack(0)), (peer.OPEN, peer.encode_open(peer.TCP, "a:1"))


@pytest.mark.parametrize("steps", [
    [SOME_DATA], [AN_END], [AN_ACK], [AN_OPEN], [(peer.HANDSHAKE_COMPLETION, b"\x00")], [(peer.ABANDON, NUMBER)],
    [(peer.SESSION, peer.encode_session(1, "a:1"))], [(0x7f, b"")], [AN_OPENED], [AN_OPENED, AN_OPENED],
    [AN_OPENED, (peer.OVER, b"")], [(peer.OPENED, b"\x00")], [(peer.OPENED, peer.encode_opened("", 1))],
    [AN_OPENED, (peer.DATA, b"")], [AN_OPENED, (peer.END, b"x")], [AN_OPENED, (peer.CLOSE, b"")],
    [AN_OPENED, AN_END, SOME_DATA], [AN_OPENED, AN_END, AN_END], [AN_OPENED, AN_ACK, (peer.ACK, peer.encode_ack(1))],
], ids=lambda steps: "-".join("%02x" % record for record, _ in steps))
def test_what_the_table_forbids_an_acceptor(steps):
    """Only the last step is wrong. (Opened alone is allowed: nothing but the end of the link follows.)"""
    def serve(server):
        server.handshake().accept()
        for step in steps:
            server.send_record(*step)
    joined = Joined(serve)
    stream = joined.client.handshake().open("a:1")
    with pytest.raises(peer.LinkEnded if steps == [AN_OPENED] else ProtocolError):
        while True:
            stream.receive()


def test_a_recorder_keeps_both_directions():
    joined = Joined(serving(peer.echo), wrap=peer.Recorder)
    joined.client.handshake().exchange("a:1", b"hello")
    assert joined.client.sock.sent.startswith(peer.OPENING)
    replayed = Client(Wire(joined.client.sock.received), CLIENT_SEED)
    with pytest.raises(ProtocolError):
        replayed.begin_handshake()


def test_it_does_not_import_ratrod():
    program = "import sys; sys.path.insert(0, %r); import support.ratrod2_peer; sys.exit('ratrod' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program % str(VECTORS.parents[1])]).returncode == 0
