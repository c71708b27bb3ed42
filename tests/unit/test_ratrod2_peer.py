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
from support.ratrod2_peer import CHACHA, SUITES, Client, Handshake, Identity, LinkBroken, LinkClosed, LinkEnded, PeerError, ProtocolError, Server
from support.sockets import receive_all
from support.targets import echo

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "support" / "vectors"
NOISE = json.loads((VECTORS / "noise_xx_25519_chachapoly_sha256.json").read_text())
RATROD2 = json.loads((VECTORS / "ratrod2.json").read_text())
CLIENT_SEED, SERVER_SEED = b"c" * 32, b"s" * 32
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
    # The transport messages of the vector are Noise's own, not ratrod2's records: they prove k1 and k2. The responder speaks first.
    for number, message in enumerate(vector["messages"][3:]):
        payload, ciphertext = unhex(message, "payload", "ciphertext")
        cipher = CHACHA.cipher(sides[0].split_keys[1 - number % 2])
        assert cipher.encrypt(CHACHA.nonce(number // 2), payload, b"") == ciphertext


@every_vector
def test_identities_of_the_vector(vector):
    for side in ("client", "server"):
        seed, identity = unhex(vector, side + "_seed", side + "_identity")
        assert Identity.from_seed(seed).public == identity
        assert peer.keypair(Identity.from_seed(seed).static_private).public_bytes == Identity.from_seed(seed).static_public == peer.convert(identity)
        assert peer.convert(peer.negative(identity)) == peer.convert(identity)


@every_vector
def test_handshake_vector(vector):
    assert bytes.fromhex(vector["prologue"]) == peer.OPENING
    messages, payloads = ([bytes.fromhex(text) for text in vector[name]] for name in ("messages", "payloads"))
    client_seed, server_seed, client_ephemeral, server_ephemeral = unhex(vector, "client_seed", "server_seed", "client_ephemeral", "server_ephemeral")
    client = Handshake(Identity.from_seed(client_seed).static_private, True, client_ephemeral)
    server = Handshake(Identity.from_seed(server_seed).static_private, False, server_ephemeral)
    for writer, reader, payload, message in zip((client, server, client), (server, client, server), payloads, messages):
        assert writer.write_message(payload) == message
        assert reader.read_message(message) == payload
    h, k1, k2, to_server, to_client = unhex(vector, "handshake_hash", "k1", "k2", "client_to_server_key", "server_to_client_key")
    for side in (client, server):
        assert side.handshake_hash == h
        assert side.split_keys == (k1, k2)
        suite = peer.AEGIS if vector["suite"] == 1 else CHACHA
        assert side.record_keys(suite) == (to_server, to_client)


@every_vector
def test_records_of_the_vector(vector):
    suite = need_suite(vector)
    for side, key in zip(("client_records", "server_records"), unhex(vector, "client_to_server_key", "server_to_client_key")):
        writer, reader = peer.RecordWriter(suite, key), peer.RecordReader(suite, key)
        for record in vector[side]:
            content, wire = unhex(record, "content", "wire")
            assert writer.number == reader.number == record["number"]
            assert writer.seal(record["type"], content) == wire
            assert reader.open(wire) == (record["type"], content, wire)


@every_vector
def test_the_whole_client_makes_the_vectors_bytes(vector):
    suite = need_suite(vector)
    messages = [bytes.fromhex(text) for text in vector["messages"]]
    records = [bytes.fromhex(record["wire"]) for record in vector["server_records"]]
    seed, server, ephemeral, first = unhex(vector, "client_seed", "server_identity", "client_ephemeral", "first_bytes_of_client")
    wire = Wire(framed(messages[1]) + b"".join(records))
    client = Client(wire, seed, server=server, ephemeral=ephemeral, suites=(1, 2))
    client.handshake()
    assert (client.suite, client.version) == (suite, "2.0.0")
    stream = client.open("db.example:5432")
    stream.send(b"hello")
    stream.end()
    assert stream.receive_all() == b"world"
    assert stream.bound == ""
    stream.over()
    assert client.state == "Idle"
    assert bytes(wire.sent) == first + framed(messages[2]) + b"".join(bytes.fromhex(record["wire"]) for record in vector["client_records"])


@every_vector
def test_the_whole_server_makes_the_vectors_bytes(vector):
    suite = need_suite(vector)
    messages = [bytes.fromhex(text) for text in vector["messages"]]
    seed, client, ephemeral, first = unhex(vector, "server_seed", "client_identity", "server_ephemeral", "first_bytes_of_client")
    wire = Wire(first + framed(messages[2]) + b"".join(bytes.fromhex(record["wire"]) for record in vector["client_records"]))
    # A server takes the client's first suite that it offers itself: to come to suite 2 it must offer nothing else.
    server = Server(wire, seed, authorized=[client], ephemeral=ephemeral, suites=(vector["suite"],), version="2.0.0")
    server.handshake()
    assert (server.suite, server.offered) == (suite, (1, 2))
    stream = server.accept()
    assert (stream.kind, stream.target) == (peer.TCP, "db.example:5432")
    stream.opened()
    assert stream.receive_all() == b"hello"
    stream.send(b"world")
    stream.end()
    stream.over()
    assert bytes(wire.sent) == framed(messages[1]) + b"".join(bytes.fromhex(record["wire"]) for record in vector["server_records"])
    assert server.accept() is None


# ---------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("n, size", [(0, 1), (250, 1), (251, 3), (65535, 3), (65536, 5), (2**32 - 1, 5), (2**32, 9), (2**64 - 1, 9)])
def test_varint(n, size):
    decoder = peer.Decoder(peer.varint(n))
    assert (decoder.left, decoder.varint(), decoder.left) == (size, n, 0)


@pytest.mark.parametrize("decode, contents", [
    (peer.decode_str, [b"", b"\x02a", b"\x01ab", b"\x01\xff", b"\xff", b"\xfb\x00"]),
    (peer.decode_error, [b"\x04\x00", b"\x03\x00x", b"\x03"]),
    (peer.decode_open, [b"", b"\x00\x00", b"\x04\x00", b"\x01\x00x", b"\x03\x00instan"]),
    (peer.decode_datagrams, [b"\x00\x00\x00", b"\x00\x00\x00\x01\x00\x02x"]),
    (peer.decode_session, [b"\x00\x00\x00\x01", b"\x00\x00\x00\x01\x00x"]),
    (peer.decode_session_over, [b"\x00\x00\x00\x01\x03\x00x"]),
])
def test_contents_that_are_refused(decode, contents):
    for content in contents:
        with pytest.raises(ProtocolError):
            decode(content)


def test_contents_that_are_taken():
    assert peer.decode_open(peer.encode_open(peer.LISTEN, "127.0.0.1:0", b"instance")) == (peer.LISTEN, "127.0.0.1:0", b"instance")
    assert peer.decode_session(peer.encode_session(2**32 - 1, "a:1")) == (2**32 - 1, "a:1")
    assert peer.decode_session_over(peer.encode_session_over(7, peer.INVALID_HOST, "no")) == (7, peer.INVALID_HOST, "no")
    assert peer.decode_datagrams(peer.encode_datagrams([(1, b""), (2, b"x" * 65507)])) == [(1, b""), (2, b"x" * 65507)]


# ---------------------------------------------------------------------------------------------------- two ends joined


class Joined:
    """A client and a server of this peer over a socketpair; the server runs serve(server) on a thread, and its outcome is awaited."""

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
        return self._outcome.get(timeout=PATIENCE)


def serving(handler):
    return lambda server: server.handshake().serve_streams(handler)


@every_suite
def test_streams_follow_each_other_on_one_link(suite):
    joined = Joined(serving(peer.echo), {"suites": [suite.id] if suite is CHACHA else [suite.id, CHACHA.id]})
    client = joined.client.handshake()
    assert client.suite is joined.server.suite is suite
    assert client.remote_identity == Identity.from_seed(SERVER_SEED).public
    for data in (b"first", b"", b"x" * 3_000_000, b"last"):
        assert client.exchange("a:1", data) == data
        assert client.state == "Idle"
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


def test_error_of_the_client_reaches_the_handler():
    joined = Joined(serving(peer.echo))
    stream = joined.client.handshake().open("a:1")
    stream.wait_opened()
    threading.Thread(target=stream.fail, args=(peer.UNKNOWN, "my originator vanished"), daemon=True).start()
    outcome = joined._outcome.get(timeout=PATIENCE)
    assert isinstance(outcome, PeerError) and outcome.text == "my originator vanished"


def test_close_in_place_of_opened():
    joined = Joined(lambda server: (server.handshake().accept(), server.send_record(peer.CLOSE)))
    stream = joined.client.handshake().open("a:1")
    with pytest.raises(LinkClosed):
        stream.wait_opened()


def test_fin_during_a_stream_is_not_an_end():
    joined = Joined(serving(peer.echo))
    joined.client.handshake().open("a:1").wait_opened()
    assert isinstance(joined.outcome(), LinkEnded)


def test_fin_inside_a_record():
    joined = Joined(serving(peer.echo))
    client = joined.client.handshake()
    client.send(client.writer.seal(peer.KEEPALIVE)[:-1])
    assert isinstance(joined.outcome(), LinkBroken)


def test_keepalive_passes_between_records():
    joined = Joined(serving(peer.echo))
    client = joined.client.handshake()
    with client.keeping_alive(interval=0.001):
        assert client.exchange("a:1", b"x" * 1_000_000) == b"x" * 1_000_000
    joined.server.send_keepalive()
    assert client.exchange("a:1", b"again") == b"again"
    assert joined.outcome() is None


def test_udp_sessions():
    def answer(target, data):
        return None if data == b"silence" else target.encode() + b"/" + data
    joined = Joined(serving(lambda stream: peer.serve_udp(stream, answer)))
    client = joined.client.handshake().open_udp()
    client.session(1, "a:53")
    client.session(2, "b:53")
    client.datagrams((1, b"one"), (2, b""), (1, b"silence"), (9, b"never opened"))
    assert client.read_udp() == (peer.DATAGRAMS, [(1, b"a:53/one")])
    assert client.read_udp() == (peer.DATAGRAMS, [(2, b"b:53/")])
    client.session_over(1)
    client.datagrams((1, b"lost"), (2, b"x" * 65000))
    assert client.read_udp() == (peer.DATAGRAMS, [(2, b"b:53/" + b"x" * 65000)])
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


@pytest.mark.parametrize("size", [0, 5, 1_000_000])
def test_dial_carries_to_a_real_target(target, size):
    joined = Joined(serving(peer.dial))
    data = b"d" * size
    assert joined.client.handshake().exchange("127.0.0.1:%d" % target(echo).port, data) == data
    assert joined.outcome() is None


def test_dial_resets_its_target_when_the_link_breaks(target):
    ends = queue.Queue()

    def handle(connection):
        try:
            ends.put(receive_all(connection))
        except ConnectionResetError as error:
            ends.put(error)
    joined = Joined(serving(peer.dial))
    joined.client.handshake().open("127.0.0.1:%d" % target(handle).port).wait_opened()
    joined.client.sock.close()
    assert isinstance(ends.get(timeout=PATIENCE), ConnectionResetError)


# ---------------------------------------------------------------------------------------------------- refusals of this peer itself


def test_an_unauthorized_client_is_told_its_key():
    joined = Joined(serving(peer.echo), server_options={"authorized": [Identity.from_seed(b"x" * 32).public]})
    with pytest.raises(PeerError) as caught:
        joined.client.handshake()
    assert caught.value.code == peer.INVALID_KEY and joined.client.identity.public.hex() in caught.value.text
    assert isinstance(joined.outcome(), PeerError)


@pytest.mark.parametrize("options, reason", [
    ({"claimed": bytes(range(32))}, "static key|no usable"),
    ({"static": b"y" * 32}, "static key"),
    ({"claimed": Identity.from_seed(b"y" * 32).public}, "static key"),
    ({"claimed": peer.SMALL_ORDER_IDENTITY}, "no usable"),
    ({"claimed": b"short"}, "Preamble of 6 bytes|Authentication of 5 bytes"),
])
def test_identities_that_are_refused_by_both_ends(options, reason):
    joined = Joined(lambda server: server.begin_handshake(), client_options=options)
    joined.client.begin_handshake()
    error = joined.outcome()
    assert isinstance(error, ProtocolError) and re.search(reason, str(error))
    with pytest.raises(ProtocolError, match=reason):
        Joined(lambda server: server.begin_handshake(), server_options=options).client.begin_handshake()


@pytest.mark.parametrize("point", peer.SMALL_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_small_order_points_really_are(point):
    """An attacker who computes with zero secrets comes through with this peer where neither end checks, and is stopped where one does."""
    options = {"ephemeral": peer.odd_keypair(point), "attacker": True}
    unchecked = Joined(lambda server: server.handshake().serve_streams(peer.echo), options, {"attacker": True})
    assert unchecked.client.handshake().exchange("a:1", b"hello") == b"hello"
    checked = Joined(lambda server: server.begin_handshake(), options)
    with pytest.raises((LinkEnded, ProtocolError)):
        checked.client.begin_handshake()
    assert isinstance(checked.outcome(), ProtocolError)


def test_a_static_key_of_small_order_gets_as_far_as_the_identity():
    options = {"static": peer.odd_keypair(bytes(32)), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}
    joined = Joined(lambda server: server.begin_handshake(), options, {"attacker": True})
    joined.client.begin_handshake()
    assert "no usable" in str(joined.outcome())


def test_a_static_key_with_its_top_bit_set_keeps_the_handshake_valid():
    """So that what must refuse it is the comparison with the identity, and nothing before."""
    identity = Identity.from_seed(CLIENT_SEED)
    static = peer.odd_keypair(identity.static_public[:31] + bytes([identity.static_public[31] | 0x80]), identity.static_private)
    joined = Joined(lambda server: server.begin_handshake(), {"static": static})
    joined.client.begin_handshake()
    assert "static key" in str(joined.outcome())


@pytest.mark.parametrize("length", [0, 1025, 65535])
def test_handshake_lengths_that_are_refused(length):
    joined = Joined(lambda server: (server.read_opening(), server.read_client_preamble()))
    joined.client.send(peer.OPENING)
    joined.client.send_message(b"x", length=length)
    assert "of %d bytes" % length in str(joined.outcome())


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x01\x01", b"\x02\x02", b"\x03\x01\x03\x04"], ids=bytes.hex)
def test_offers_that_are_refused(payload):
    joined = Joined(lambda server: (server.read_opening(), server.read_client_preamble()))
    joined.client.send(peer.OPENING)
    joined.client.send_message(joined.client.client_preamble(payload))
    assert isinstance(joined.outcome(), ProtocolError)


def test_what_follows_a_handshake_payload_is_ignored():
    joined = Joined(serving(peer.echo), {"suites": [CHACHA.id]})
    client = joined.client
    client.send(peer.OPENING)
    client.send_message(client.client_preamble(b"\x01\x02later"))
    client.read_server_preamble()
    client.send_message(client.client_authentication(client.identity.public + b"later"))
    client.read_completion()
    assert client.exchange("a:1", b"hello") == b"hello"


@pytest.mark.parametrize("suite_id", [0, 1, 3, 255])
def test_a_suite_that_was_not_offered(suite_id):
    joined = Joined(lambda server: (server.read_opening(), server.read_client_preamble(),
                                    server.send_message(server.server_preamble(server.identity.public + bytes([suite_id])))), {"suites": [CHACHA.id]})
    with pytest.raises(ProtocolError, match="not offered"):
        joined.client.begin_handshake()


@every_suite
def test_bad_records_are_refused(suite):
    """And so the explicit counters and lengths of the writer really make something wrong."""
    key = bytes(suite.key_length)
    too_long = suite.tag_length + 2 + peer.BULK_LIMIT
    for content, wrong in ((b"", {"number": 1}), (b"", {"length": suite.tag_length}), (b"", {"length": too_long}), (b"x" * 1025, {})):
        with pytest.raises(ProtocolError):
            peer.RecordReader(suite, key).read(Wire(peer.RecordWriter(suite, key).seal(peer.END, content, **wrong)))
    writer, reader = peer.RecordWriter(suite, key), peer.RecordReader(suite, key)
    first, second = writer.seal(peer.DATA, b"1"), writer.seal(peer.DATA, b"2")
    for wire in (second, first[:-1] + bytes([first[-1] ^ 1]), bytes([first[0] ^ 1]) + first[1:]):
        with pytest.raises(ProtocolError):
            reader.open(wire)
    assert reader.open(first).content == b"1"
    with pytest.raises(ProtocolError):
        reader.open(first)
    assert reader.open(second).content == b"2"


AN_OPENED, SOME_DATA, AN_END = (peer.OPENED, b"\x00"), (peer.DATA, b"x"), (peer.END, b"")


@pytest.mark.parametrize("steps", [
    [SOME_DATA], [AN_END], [(peer.OVER, b"")], [(peer.OPEN, peer.encode_open(peer.TCP, "a:1"))], [(peer.HANDSHAKE_COMPLETION, b"\x00")],
    [(peer.SESSION, peer.encode_session(1, "a:1"))], [(0x7f, b"")], [AN_OPENED], [AN_OPENED, AN_OPENED], [AN_OPENED, (peer.OVER, b"")],
    [AN_OPENED, (peer.DATA, b"")], [AN_OPENED, (peer.END, b"x")], [AN_OPENED, (peer.CLOSE, b"")],
    [AN_OPENED, AN_END, SOME_DATA], [AN_OPENED, AN_END, AN_END],
], ids=lambda steps: "-".join("%02x" % record for record, _ in steps))
def test_what_the_table_forbids_an_acceptor(steps):
    """Only the last step is wrong. (Opened alone is allowed: nothing but the end of the link follows.)"""
    def serve(server):
        server.handshake().accept()
        for step in steps:
            server.send_record(*step)
    joined = Joined(serve)
    stream = joined.client.handshake().open("a:1")
    error = LinkEnded if steps == [AN_OPENED] else ProtocolError
    with pytest.raises(error):
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
    program = "import sys; sys.path.insert(0, %r); import support.ratrod2_peer; sys.exit('ratrod' in sys.modules)" % str(VECTORS.parents[1])
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
