"""The independent ratrod2 peer against the vectors, and what it notices: the other ratrod2 tests stand on both. What it does right is shown by
them, with the real program at the other end."""

import json
import pathlib
import queue
import socket
import subprocess
import sys
import threading

import pytest

from support import ratrod2_peer as peer
from support.programs import PATIENCE
from support.ratrod2_peer import CHACHA, SUITES, Client, Handshake, Identity, ProtocolError, Server

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


# ---------------------------------------------------------------------------------------------------- attaching


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


@pytest.mark.parametrize("wrong", [{"attempt": 1}, {"attempt": 0}, {"at": 4}, {"taken": 4}, {"target": "b:1"}], ids=str)
def test_what_an_acceptor_refuses_to_attach(wrong):
    """A `taken` beyond what was sent, an `at` beyond what was taken, an attempt that is not higher, another target."""
    streams = {}
    first, second = (Joined(serving(peer.echo), server_options={"streams": streams}) for _ in range(2))
    stream = first.client.handshake().open("a:1")
    stream.send(b"abc")
    assert stream.receive() == b"abc"
    first.outcome()
    stream.attach(second.client.handshake(), **wrong)
    assert isinstance(second.wait(), ProtocolError)


# ---------------------------------------------------------------------------------------------------- refusals


def refused(client_options=None, server_options=None):
    """What the server says to a client that goes as far as message 3."""
    joined = Joined(lambda server: server.begin_handshake(), client_options, server_options)
    joined.client.begin_handshake()
    error = joined.outcome()
    assert isinstance(error, ProtocolError)
    return str(error)


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


def test_it_does_not_import_ratrod():
    program = "import sys; sys.path.insert(0, %r); import support.ratrod2_peer; sys.exit('ratrod' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program % str(VECTORS.parents[1])]).returncode == 0
