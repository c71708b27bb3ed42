"""What the independent ratrod2 peer notices. What it does right is shown by the tests with ratrod at its other end: by test_core*.py to the byte,
and so by the vectors, which those hold ratrod against."""

import concurrent.futures
import io
import pathlib
import re
import socket
import types

import pytest

from support import ratrod2_peer as peer
from support.programs import PATIENCE
from support.ratrod2_peer import SUITES, Client, Identity, ProtocolError, Server
from support.rows import assert_raises

CLIENT_SEED, SERVER_SEED = b"c" * 32, b"s" * 32


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
        pytest.raises(ProtocolError, decode, content)


class Joined:
    """A client and a server of this peer over a socketpair. The server runs serve(server) on a thread."""

    def __init__(self, serve, client_options=None, server_options=None):
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.settimeout(PATIENCE)
        self.client = Client(ours, CLIENT_SEED, **(client_options or {}))
        self.server = Server(theirs, SERVER_SEED, **(server_options or {}))
        self._served = concurrent.futures.ThreadPoolExecutor(1).submit(self._run, serve)

    def _run(self, serve):
        with self.server:
            serve(self.server)

    def outcome(self):
        """What serve() raised, or None, after the client's FIN."""
        self.client.sock.close()
        return self.wait()

    def wait(self):
        return self._served.exception(PATIENCE)


def serving(handler):
    return lambda server: server.handshake().serve_streams(handler)


def test_an_ack_that_goes_back():
    def serve(server):
        stream = server.handshake().accept().opened()
        assert stream.receive() == b"abc"
        stream.ack()
        stream.ack(1)
    stream = Joined(serve).client.handshake().open("a:1")
    stream.send(b"abc")
    assert_raises(ProtocolError, "1 taken, of 3 sent and 3 acknowledged", stream.wait_acknowledged, 4)


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
    pytest.raises((peer.LinkEnded, ProtocolError), checked.client.begin_handshake)
    assert isinstance(checked.outcome(), ProtocolError)


def test_odd_static_keys_get_as_far_as_the_identity():
    """What must refuse them is the comparison with the identity, and nothing before."""
    identity = Identity.from_seed(CLIENT_SEED)
    small = {"static": peer.odd_keypair(bytes(32)), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}
    assert "no usable" in refused(small, {"attacker": True})
    top_bit_set = identity.static_public[:31] + bytes([identity.static_public[31] | 0x80])
    assert "static key" in refused({"static": peer.odd_keypair(top_bit_set, identity.static_private)})


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_bad_records_are_refused(suite):
    """And so the explicit counters and lengths of the writer really make something wrong."""
    key = bytes(suite.key_length)
    too_long = suite.tag_length + 2 + peer.BULK_LIMIT
    for content, *wrong in ((b"", 1), (b"", None, suite.tag_length), (b"", None, too_long), (b"x" * 1025,)):
        with pytest.raises(ProtocolError):
            wire = io.BytesIO(peer.RecordWriter(suite, key).seal(peer.END, content, *wrong))
            peer.RecordReader(suite, key).read(types.SimpleNamespace(recv=wire.read))
    writer, reader = peer.RecordWriter(suite, key), peer.RecordReader(suite, key)
    first, second = writer.seal(peer.DATA, b"1"), writer.seal(peer.DATA, b"2")
    for wire in (second, first[:-1] + bytes([first[-1] ^ 1]), bytes([first[0] ^ 1]) + first[1:]):
        pytest.raises(ProtocolError, reader.open, wire)
    assert reader.open(first).content == b"1"
    pytest.raises(ProtocolError, reader.open, first)
    assert reader.open(second).content == b"2"


AN_OPENED, SOME_DATA, AN_END = (peer.OPENED, peer.encode_opened()), (peer.DATA, b"x"), (peer.END, b"")
AN_ACK, AN_OPEN = (peer.ACK, peer.encode_ack(0)), (peer.OPEN, peer.encode_open(peer.TCP, "a:1"))


@pytest.mark.parametrize("steps", [
    [SOME_DATA], [AN_END], [AN_ACK], [AN_OPEN], [(peer.HANDSHAKE_COMPLETION, b"\x00")], [(peer.ABANDON, bytes(16))],
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
    imports = re.findall(r"^ *(?:import|from) (\w+)", pathlib.Path(peer.__file__).read_text(encoding="utf-8"), re.M)
    assert "nacl" in imports and not {"ratrod", "support"} & set(imports)
