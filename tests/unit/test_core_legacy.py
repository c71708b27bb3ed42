"""The legacy wire in sections 2, 5 and 6 of ratrod.py, against PROTOCOL.md and legacy_peer.py: bytes in, bytes out, in memory.

What its handshake has in common with that of ratrod2 is in test_core_handshake.py.
"""

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, strategies as st

import ratrod
import test_core as core
from ratrod import AuthenticationError, RemoteProtocolError
from support import legacy_peer
from support.legacy_peer import LIMIT, frame as framed
from support.ratrod2_peer import SMALL_ORDER_POINTS, encode_datagrams
from support.rows import assert_each_raises, assert_raises, row
from test_core import CLIENT, KEY, SERVER, accept, every_cut, feed, read_one, read_records, refuse, started, unlimited, write_data

# ---------------------------------------------------------------------------------------------------- 2. messages

texts, codes, blobs = core.texts, core.codes, st.binary(max_size=300)
MESSAGES = st.one_of(
    st.builds(ratrod.ClientPreamble, blobs, texts, blobs, st.booleans(), st.booleans()), st.builds(ratrod.ServerPreamble, texts, blobs, blobs, blobs),
    st.builds(ratrod.ClientAuthentication, texts, blobs), st.builds(ratrod.HandshakeCompletion), st.builds(ratrod.Data, blobs),
    st.builds(ratrod.UdpData, blobs), st.builds(ratrod.Error, codes, texts), st.builds(ratrod.Shutdown),
)
B32, B64 = bytes(range(32)), bytes(range(64))
EXACT = [
    (ratrod.ClientPreamble(B32, "db:5432", B32[::-1], True, False), "0020%s07%s20%s0100" % (B32.hex(), b"db:5432".hex(), B32[::-1].hex())),
    (ratrod.ClientPreamble(b"", "", b"", False, True), "000000000001"),
    (ratrod.ServerPreamble("K", B32, B64, B32), "01014b20%s40%s20%s" % (B32.hex(), B64.hex(), B32.hex())),
    (ratrod.ClientAuthentication("K" * 43, B64), "022b%s40%s" % ("4b" * 43, B64.hex())),
    (ratrod.HandshakeCompletion(), "03"), (ratrod.Shutdown(), "07"),
    (ratrod.Data(b"hi"), "04026869"), (ratrod.Data(b""), "0400"), (ratrod.UdpData(b"?"), "05013f"),
    *((ratrod.Data(b"x" * n), "04" + length + "78" * n) for n, length in ((250, "fa"), (251, "fb00fb"), (65536, "fc00010000"))),
    (ratrod.Error(0, "\u00e9"), "060002c3a9"), (ratrod.Error(3, ""), "060300"),
]


def test_exact_bytes_of_messages():
    bad = [
        "", "08", "fa", "fb0004", "fb00fb", "fe", "ff",  # no variant, or one in a longer form
        "00000000%02x00" % 2, "0000000000ff",  # truth values
        "0601" + "01ff", "0601" + "02c328", "0601" + "03eda080", "0601" + "04f4908080", "0201ff00", "000002c0af000000",  # texts that are not UTF-8
        "04fb000161", "04fc0000000161", "04fd000000000000000161", "04fe", "04ff",  # lengths in no or another form
        "0402", "04fcffffffff", "04fd" + "ff" * 8, "06fb00", "0601fd" + "7f" * 8,  # lengths that promise more
        "0300", "0700", "0400ff", "060000ff",  # bytes left over
    ]
    for message, wire in EXACT:
        assert ratrod.encode_message(message).hex() == wire
        assert ratrod.decode_message(bytes.fromhex(wire)) == message
    assert_each_raises(RemoteProtocolError, None, ratrod.decode_message, list(map(bytes.fromhex, bad)))


@unlimited
@given(MESSAGES)
def test_messages_there_and_back(message):
    wire = ratrod.encode_message(message)
    assert wire == legacy_peer.encode(getattr(legacy_peer, type(message).__name__)(*message))
    for data in (wire, memoryview(wire)):
        decoded = ratrod.decode_message(data)
        assert (type(decoded), decoded) == (type(message), message)
    for wrong in (wire + b"\0", *(wire[:end] for end in range(len(wire)))):
        pytest.raises(RemoteProtocolError, ratrod.decode_message, wrong)


# ---------------------------------------------------------------------------------------------------- 5. frames

every_key = pytest.mark.parametrize("key", [None, KEY], ids=["clear", "sealed"])
TAG, HEADER = 16, {None: 9, KEY: 21}
# The three ways to say that a direction ends; Rust means none of them.
ENDS = [b"", legacy_peer.encode(legacy_peer.Shutdown()), legacy_peer.encode(legacy_peer.Data(b""))]


@every_key
def test_frames_are_those_of_the_independent_peer(key):
    for kind, content in core.LEGACY_STREAM:
        message = (legacy_peer.Data if kind == ratrod.DATA else legacy_peer.UdpData)(content)
        assert read_records(ratrod.LegacyReader(key), [framed(legacy_peer.encode(message), key)]) == ([(kind, content)], 0)
        wire = core.write(ratrod.LegacyWriter(key), kind, content)
        payload = wire[HEADER[key]:]
        assert wire[0] == (key is not None) and int.from_bytes(wire[HEADER[key] - 8:HEADER[key]], "big") == len(payload)
        assert legacy_peer.decode(ChaCha20Poly1305(key).decrypt(wire[1:13], payload, None) if key else payload) == message


@every_key
def test_a_size_that_cannot_be_is_refused_before_more_is_read(key):
    head = framed(b"", flag=int(key is not None))[:-8]
    for size in (LIMIT + 1, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - 1):
        pytest.raises(RemoteProtocolError, read_records, ratrod.LegacyReader(key), [head + size.to_bytes(8, "big")])
    reader = ratrod.LegacyReader(key)
    assert read_records(reader, [head + LIMIT.to_bytes(8, "big")]) == ([], HEADER[key])
    assert reader.wanted == HEADER[key] + LIMIT
    for size in range(TAG if key else 0):  # shorter than its tag
        pytest.raises(RemoteProtocolError, read_records, ratrod.LegacyReader(KEY), [head + size.to_bytes(8, "big")])


@every_key
def test_the_largest_frames(key):
    # What ours send at most, and what a peer may send at most.
    writer, reader = ratrod.LegacyWriter(key), ratrod.LegacyReader(key)
    for n in (writer.max_data, LIMIT - 6 - (TAG if key else 0)):
        payload = bytes(n)
        assert read_records(reader, [write_data(writer, payload)]) == ([(ratrod.DATA, payload)], 0)
    pytest.raises(RemoteProtocolError, read_one, reader, write_data(writer, payload + b"x"))


def test_the_flag_alone_is_judged():
    # A frame in the clear after encryption is on, one that is sealed before it, and what is no flag: nothing more is read.
    for flag in range(256):
        for key in (None, KEY):
            reader, view = ratrod.LegacyReader(key), memoryview(bytearray((flag,)))
            if flag == (key is not None):
                assert reader.next(view, 0, 1) is None
            else:
                pytest.raises(RemoteProtocolError, reader.next, view, 0, 1)


def test_ends_of_a_direction():
    for payload in ENDS:
        assert read_records(ratrod.LegacyReader(), [framed(payload) + framed(b"\4\1x")]) == ([(ratrod.END, None), (ratrod.DATA, b"x")], 0)
        # Sealed frames can be replayed, and so could these.
        pytest.raises(RemoteProtocolError, read_one, ratrod.LegacyReader(KEY), framed(payload, KEY))
    for key in (None, KEY):  # an empty datagram is no end
        assert read_records(ratrod.LegacyReader(key), [framed(b"\5\0", key)]) == ([(ratrod.UDP_DATA, b"")], 0)
        assert read_records(ratrod.LegacyReader(key), [framed(b"\6\2\2no", key)]) == ([(ratrod.ERROR, ratrod.Error(2, "no"))], 0)


@every_key
def test_payloads_that_cannot_be(key):
    for payload in ("03", "0400ff", "0402ff", "04", "05", "04fb", "04fb00", "04fb000178", "04fc0000000178", "04fd00", "04fe", "05ff", "050278", "08",
                    "ff", "00", "0201", "0700", "fb000400", *(ratrod.encode_message(message).hex() for message, _ in EXACT[:5])):
        with row(payload):
            pytest.raises(RemoteProtocolError, read_one, ratrod.LegacyReader(key), framed(bytes.fromhex(payload), key))


OPENED = ratrod.OPENED, ratrod.Opened("", 0)


@every_key
def test_a_client_awaits_completion_in_the_clear(key):
    # Once only; sealed is what comes after it.
    reader = ratrod.LegacyReader(key, awaited=True)
    completion = ratrod.LegacyWriter(key).record(ratrod.OPENED, "", 0)
    assert completion == framed(legacy_peer.encode(legacy_peer.HandshakeCompletion()))
    assert read_records(reader, [completion, framed(b"\4\1x", key)]) == ([OPENED, (ratrod.DATA, b"x")], 0)
    pytest.raises(RemoteProtocolError, read_one, reader, completion)
    pytest.raises(RemoteProtocolError, read_one, reader, framed(b"\3", key))
    # It may be refused in its place, and nothing else.
    refusal = ratrod.LegacyWriter(key).record(ratrod.ERROR, 2, "no")
    assert refusal == framed(legacy_peer.encode(legacy_peer.Error(2, "no")))
    assert read_records(ratrod.LegacyReader(key, awaited=True), [refusal]) == ([(ratrod.ERROR, ratrod.Error(2, "no"))], 0)
    for payload, flag_key in itertools.product((*ENDS, b"\4\1x", b"\5\1x", b"\5\0"), (None, KEY)):
        pytest.raises(RemoteProtocolError, read_one, ratrod.LegacyReader(key, awaited=True), framed(payload, flag_key))


@every_key
def test_each_datagram_of_a_run_is_a_frame(key):
    datagrams = [b"", b"x", b"y" * ratrod.MAX_DATAGRAM, b"", b"z" * 300]
    run = encode_datagrams(list(enumerate(datagrams)))
    wire = bytes(ratrod.LegacyWriter(key).datagrams(core.in_room(run), ratrod.HEADROOM + len(run)))
    assert read_records(ratrod.LegacyReader(key), [wire]) == ([(ratrod.UDP_DATA, data) for data in datagrams], 0)
    for kind in (ratrod.END, ratrod.OVER, ratrod.CLOSE, ratrod.KEEPALIVE):  # which do not exist on this wire
        assert ratrod.LegacyWriter(key).record(kind) == b""


# ---------------------------------------------------------------------------------------------------- 6. the handshake


def client_end(keys=CLIENT, remote="db:5432", is_udp=False, **options):
    fixed = {"ephemeral": core.E_CLIENT, "challenge": b"c" * 32}
    open_ = ratrod.Open(ratrod.UDP if is_udp else ratrod.TCP, remote)
    return started(ratrod.LegacyClientHandshake(keys, open_, **{"check_key": accept, **fixed, **options}))


def server_end(keys=SERVER, **options):
    return started(ratrod.LegacyServerHandshake(keys, **{"check_key": accept, "ephemeral": core.E_SERVER, "challenge": b"s" * 32, **options}))


encrypted_or_not = pytest.mark.parametrize("should_encrypt", [False, True], ids=["plain", "encrypted"])


@encrypted_or_not
@pytest.mark.parametrize(("remote", "is_udp"), [("db:5432", False), ("", False), ("[2001:db8::7]:53", True)])
@every_cut
def test_joined_in_memory(should_encrypt, remote, is_udp, cut):
    client, server = client_end(remote=remote, is_udp=is_udp, should_encrypt=should_encrypt), server_end()
    assert core.shake(client, server, cut) == b""  # HandshakeCompletion is the link's to say, once the remote is connected
    assert (server.remote, server.is_udp) == (remote, is_udp)
    core.check_joined(client, server, server.writer.record(ratrod.OPENED, "", 0), OPENED, core.LEGACY_STREAM, cut)
    assert (write_data(client.writer, b"x")[0], write_data(server.writer, b"x")[0]) == (should_encrypt, should_encrypt)


def test_nonces_challenges_and_ephemeral_keys_are_drawn_anew():
    writer = ratrod.LegacyWriter(KEY)
    assert len({write_data(writer, b"the same")[1:13] for _ in range(200)}) == 200
    made = [ratrod.decode_message(client_end(ephemeral=None, challenge=None).data_to_send()[9:]) for _ in range(5)]
    assert len({message.challenge for message in made}) == len({message.exchange_public_key for message in made}) == 5


def uncovered(frame):
    """Where in this frame of a handshake the fields lie that no signature covers, the weakness that ratrod2 exists for."""
    message = ratrod.decode_message(frame[9:])
    # Another value of the same size for each.
    others = {"exchange_public_key": b"\xff" * 32, "remote": "x" * 7, "should_encrypt": not getattr(message, "should_encrypt", None), "is_udp": True}
    other = ratrod.LegacyWriter.clear_message(message._replace(**{name: others[name] for name in message._fields if name in others}))
    return {at for at, (byte, changed) in enumerate(zip(frame, other)) if byte != changed}


class Near:
    """Stands for the independent peer's socket: our handshake is at its other end. `left` is what came after the handshake."""

    def __init__(self, handshake):
        self.handshake, self.sent, self.left = handshake, b"", b""

    def sendall(self, data):
        self.left += feed(self.handshake, [data])

    def recv(self, n):
        self.sent += self.handshake.data_to_send()
        data, self.sent = self.sent[:n], self.sent[n:]
        return data

    def answer(self, data):
        """What our link would send after the handshake."""
        self.sent += data

    settimeout = setsockopt = close = lambda self, *_: None


def peer_client(server, keys=CLIENT, **options):
    return legacy_peer.Client(Near(server), legacy_peer.Identity(Ed25519PrivateKey.from_private_bytes(keys.seed)), **options)


def peer_server(client, keys=SERVER):
    return legacy_peer.Server(Near(client), legacy_peer.Identity(Ed25519PrivateKey.from_private_bytes(keys.seed)))


@encrypted_or_not
def test_an_independent_client(should_encrypt):
    server = server_end()
    client = peer_client(server, remote="db:1", encrypt=should_encrypt, udp=True)
    client.send_preamble()
    client.receive_preamble()
    client.send_authentication()
    client.socket.answer(server.writer.record(ratrod.OPENED, "", 0))
    client.receive_completion()
    assert (server.is_done, server.remote, server.is_udp, server.peer_key) == (True, "db:1", True, CLIENT.public)
    client.socket.answer(write_data(server.writer, b"to them"))
    assert client.receive() == legacy_peer.Data(b"to them")
    client.send(legacy_peer.Data(b"to us"))
    assert read_records(server.reader, [client.socket.left]) == ([(ratrod.DATA, b"to us")], 0)


@encrypted_or_not
def test_an_independent_server(should_encrypt):
    client = client_end(should_encrypt=should_encrypt)
    server = peer_server(client).handshake()
    assert server.client[1:] == ("db:5432", b"c" * 32, should_encrypt, False)
    assert server.authentication.identity_public_key == ratrod.encode_key(CLIENT.public)
    server.send(legacy_peer.Data(b"to us"))
    assert read_records(client.reader, [server.socket.left]) == ([OPENED, (ratrod.DATA, b"to us")], 0)
    server.socket.answer(write_data(client.writer, b"to them"))
    assert server.receive() == legacy_peer.Data(b"to them")


def refused_with(server, error=AuthenticationError, keys=CLIENT, **fields):
    """(what a client is told whose authentication our server does not take, what our server says)."""
    client = peer_client(server, keys)
    client.send_preamble()
    client.receive_preamble()
    caught = pytest.raises(error, client.send_authentication, **fields)
    assert not server.is_done
    return [tuple(message) for message in iter(client.receive, None)], str(caught.value)


OTHER = ratrod.KeyPair.from_seed(b"o" * 32)


def wrong_signatures(keys, challenge):
    """Fields that do not prove that `keys` signed `challenge`."""
    right = keys.sign(challenge)
    for signature in (bytes(64), keys.sign(b"another"), OTHER.sign(challenge), b"", right[:63], right + b"\0", right[::-1]):
        yield {"signature": signature}
    yield {"identity_public_key": ratrod.encode_key(OTHER.public)}


def test_a_signature_that_is_wrong():
    # Nobody's list is asked.
    asked = []
    for fields in wrong_signatures(CLIENT, b"s" * 32):
        told, text = refused_with(server_end(check_key=asked.append), **fields)
        assert told == [(legacy_peer.INVALID_KEY, text)], fields
    for fields in wrong_signatures(SERVER, b"c" * 32):
        answer_with(client_end(check_key=asked.append), AuthenticationError, **fields)
    assert not asked


def test_a_peer_that_is_not_listed_or_has_the_server_s_own_key():
    # A client is told so. Whoever reaches a legacy server can have it sign anything, so its own key is never a client's.
    assert refused_with(server_end(check_key=refuse)) == ([(legacy_peer.INVALID_KEY, "it is not listed")], "it is not listed")
    assert "not listed" in str(answer_with(client_end(check_key=refuse), AuthenticationError))
    told, text = refused_with(server_end(), keys=SERVER)
    assert told == [(legacy_peer.INVALID_KEY, text)] and "same key" in text
    client = client_end(keys=SERVER)
    assert_raises(AuthenticationError, "same key", peer_server(client).handshake)


def test_identities_that_are_no_key():
    for text in ("", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 43 + "=", "A" * 43 + "\n", "\u00e9" * 43, "+" * 43):
        with row(text):
            assert refused_with(server_end(), RemoteProtocolError, identity_public_key=text)[0] == []
            answer_with(client_end(), RemoteProtocolError, identity_public_key=text)


def answer_with(client, error, **fields):
    """Our client refuses a ServerPreamble with these fields, and says nothing more."""
    server = peer_server(client)
    server.receive_preamble()
    caught = pytest.raises(error, server.send_preamble, **fields)
    assert not client.is_done and client.data_to_send() == b""
    return caught.value


def test_sizes_of_a_preamble():
    # crypto_scalarmult() reads 32 bytes whatever it is given.
    for field, size in itertools.product(("exchange_public_key", "challenge"), (0, 1, 31, 33, 64, 300)):
        with row((field, size)):
            answer_with(client_end(), RemoteProtocolError, **{field: bytes(size)})
            server = server_end()
            pytest.raises(RemoteProtocolError, peer_client(server).send_preamble, **{field: bytes(size)})
            assert server.data_to_send() == b""


@pytest.mark.parametrize("point", SMALL_ORDER_POINTS, ids=bytes.hex)
def test_exchange_keys_of_small_order(point):
    asked = []
    server = server_end(check_key=asked.append)
    client = peer_client(server, encrypt=True)
    client.send_preamble(exchange_public_key=point)
    client.receive_preamble()
    pytest.raises(RemoteProtocolError, client.send_authentication)
    assert not server.is_done and not asked  # it was given no place, which nobody would give back
    # The client says nothing more: its authentication would have the remote connected, only to see a clean end.
    answer_with(client_end(should_encrypt=True), RemoteProtocolError, exchange_public_key=point)


@pytest.mark.parametrize("message", [message for message, _ in EXACT], ids=lambda message: type(message).__name__)
def test_messages_out_of_place(message):
    frame = ratrod.LegacyWriter.clear_message(message)
    late = server_end()
    peer_client(late).send_preamble()
    for end, awaited in ((client_end(), ratrod.ServerPreamble), (server_end(), ratrod.ClientPreamble), (late, ratrod.ClientAuthentication)):
        end.data_to_send()
        if not isinstance(message, awaited):
            pytest.raises(ratrod.PeerError if isinstance(message, ratrod.Error) else RemoteProtocolError, feed, end, [frame])
            assert not end.is_done and end.data_to_send() == b""


def test_an_error_in_place_of_server_preamble_is_shown_harmlessly():
    # A Rust server that forbids a remote says so there, its regex in it.
    client = client_end()
    error = legacy_peer.Error(legacy_peer.INVALID_HOST, "\x1b[2Jno\r\n" + "A" * 5000)
    caught = pytest.raises(ratrod.PeerError, feed, client, [framed(legacy_peer.encode(error))])
    assert caught.value.code == ratrod.INVALID_HOST
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 203 and "no" in str(caught.value)


def test_another_first_byte_and_sizes_that_cannot_be():
    sizes = (b"\0" + size.to_bytes(8, "big") for size in (0, 16 * 1024 + 1, LIMIT, 1 << 32, (1 << 64) - 1))
    for data, make in itertools.product((b"\1", b"\2", b"r", b"S", b"\xff", *sizes), (client_end, server_end)):
        with row((data, make.__name__)):
            end = make()
            end.data_to_send()
            pytest.raises(RemoteProtocolError, feed, end, [data])
            assert end.data_to_send() == b"" and not end.is_done
