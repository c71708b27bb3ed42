"""The fuzz targets of fuzz.py for each parser of ratrod.py: bytes in, and what must hold for the answer."""

import contextlib
import functools
import ipaddress
import os
import pathlib
import random
import re
import socket
import struct
import sys
import tempfile
from typing import Callable, NamedTuple

from support import legacy_peer, ratrod2_peer as peer
from support.programs import ROOT

sys.path.insert(0, str(ROOT))
GUIDED = "--guided" in sys.argv  # fuzz.py in a process of its own
if GUIDED:
    import atheris
    with atheris.instrument_imports(include=["ratrod"]):
        import ratrod
else:
    import ratrod


class Fuzz(NamedTuple):
    """A target: check(input) returns the kind of answer it got, and raises where the answer may not be. `share`: of about a thousand inputs. `live`:
    over real sockets, True for the library too, "program" for what only a program does."""

    name: str
    share: int
    check: Callable
    seeds: Callable
    words: tuple
    live: object

    @property
    def claim(self):
        return " ".join(self.check.__doc__.split())


FUZZES = {}


def hash_of(data):
    return int.from_bytes(ratrod.sha256(data)[:4], "big")


def target(share, seeds, words=(), live=False):
    """Decorates a check: its name, with hyphens, is the target's."""
    def register(check):
        name = check.__name__.replace("_", "-")
        FUZZES[name] = Fuzz(name, share, check, seeds, words, live)
        return check
    return register


# ---------------------------------------------------------------------------------------------------- what the checks share

SERVER, CLIENT, OTHER = (ratrod.KeyPair.from_seed(seed * 32) for seed in (b"s", b"c", b"o"))
EPHEMERAL = {SERVER: b"\x11" * 32, CLIENT: b"\x22" * 32}  # fixed, so that a recorded message is good a second time
CHALLENGE = {SERVER: b"\x33" * 32, CLIENT: b"\x44" * 32}
KEY = b"k" * 32
SUITES = tuple(suite for suite in (ratrod.chacha20_poly1305(), ratrod.aegis_128l()) if suite)
TCP_TARGET, UDP_TARGET, LISTEN_ADDRESS = b"127.0.0.1:55555", b"127.0.0.1:55556", b"127.0.0.1:55557"  # the ports stand for those of a run
NAMES = (b"localhost", b"db.example:5432", b"[::1]:80", b"[::ffff:127.0.0.1]:80", b"127.1:80", b"0x7f000001:80", b"unix:/run/x.sock", b"a" * 254,
         b"\xef\xbc\x91\xef\xbc\x92\xef\xbc\x97.1:80", b"::", b"%lo", b"\xe2\x80\xae", b"\x1b[2J", b"\xc2\x9b", b"xn--a", b"..", b".", b"\xff")


def harmless(text, most=1000):
    """What may be shown: no control characters, no escapes, nothing that changes the direction of writing, and not without end."""
    assert text.isprintable(), "not printable: %r" % text
    assert len(text) <= most, "%d characters long" % len(text)
    return text


def kind_of(error):
    """The kind of an answer: without what it quotes."""
    return type(error).__name__ + re.sub(r"`[^`]*`|[0-9]+", "", harmless(str(error)))[:100]


def only(*keys):
    """check_key(): AuthenticationError for any other key."""
    def check(key):
        if key not in [pair.public for pair in keys]:
            raise ratrod.AuthenticationError("not known: %s" % ratrod.encode_key(key))
    return check


def split(data, *sizes):
    """The first bytes as numbers of these sizes, and the rest; what is not there is 0."""
    numbers = []
    for size in sizes:
        numbers.append(int.from_bytes(data[:size], "big"))
        data = data[size:]
    return (*numbers, data)


def pieces(data):
    """`data` taken apart at its own lengths: (u16, so many bytes) again and again."""
    while data:
        size, data = split(data, 2)
        yield data[:size]
        data = data[size:]


def joined(*parts):
    """What pieces() takes apart."""
    return b"".join(struct.pack(">H", len(part)) + part for part in parts)


def cuts(seed, size):
    """Places where a stream is cut into reads, from a byte: 0 is nowhere, 1 after each byte."""
    if seed < 2:
        return range(1, size) if seed else ()
    choice = random.Random(seed)
    return sorted(choice.randrange(size + 1) for _ in range(seed % 7 + 1))


def read_all(reader, wire, seed, longest):
    """What a link does with these bytes: (records, where each ends, the error or None)."""
    view, start, records, ends = memoryview(bytearray(wire)), 0, [], []
    try:
        for end in (*cuts(seed, len(wire)), len(wire)):
            while start < end:
                record = reader.next(view, start, end)
                if record is None:
                    assert end - start < reader.wanted <= longest, "it wants %d bytes and has %d" % (reader.wanted, end - start)
                    break
                kind, content, start = record
                assert start <= end
                records.append((kind, bytes(content) if isinstance(content, memoryview) else content))
                ends.append(start)
    except ratrod.RemoteProtocolError as error:
        return records, ends, error
    return records, ends, None


def drive(handshake, data, most):
    """Gives a handshake as much of `data` as it wants: (how many bytes it took, the error or None)."""
    at = 0
    if not handshake.has_started:
        handshake.start()
    try:
        while handshake.wanted and at < len(data):
            assert handshake.wanted <= most, "it wants %d bytes" % handshake.wanted
            chunk = data[at:at + handshake.wanted]
            at += len(chunk)
            handshake.receive_data(chunk)
    except (ratrod.RemoteProtocolError, ratrod.Overloaded) as error:
        assert not handshake.is_done and not handshake.wanted
        return at, error
    return at, None


def answered(handshake, error):
    return kind_of(error) if error else (handshake.is_done, handshake.wanted > 0)


# ---------------------------------------------------------------------------------------------------- messages and records

LEGACY_TRAFFIC = (
    ratrod.ClientPreamble(b"e" * 32, "db:5432", b"c" * 32, True, False), ratrod.ClientPreamble(b"e" * 32, "", b"c" * 32, False, True),
    ratrod.ServerPreamble(ratrod.encode_key(SERVER.public), b"e" * 32, b"s" * 64, b"c" * 32),
    ratrod.ClientAuthentication(ratrod.encode_key(CLIENT.public), b"s" * 64), ratrod.HandshakeCompletion(),
    ratrod.Data(b"hello"), ratrod.Data(b"x" * 300), ratrod.Data(b""), ratrod.UdpData(b"hello"), ratrod.UdpData(b""),
    ratrod.Error(2, "connection refused"), ratrod.Error(1000, "\u202e"), ratrod.Shutdown(),
)
CONTENTS = (
    (ratrod.COMPLETED, ("0.8.0",)), (ratrod.ERROR, (1, "no")), (ratrod.OPEN, (1, "db:5432", b"s" * 16, 1, 0, 0)),
    (ratrod.OPEN, (1, "db:5432", b"s" * 16, 2, 1 << 40, 5)), (ratrod.OPEN, (2, "")),
    (ratrod.OPEN, (3, "127.0.0.1:9000", bytes(16), 0, 0, 0, b"instance")), (ratrod.OPENED, ("127.0.0.1:9000", 0)), (ratrod.OPENED, ("", -1)),
    (ratrod.END, ()), (ratrod.OVER, ()), (ratrod.ACK, (5,)), (ratrod.ACK, (1 << 63,)), (ratrod.ABANDON, (b"s" * 16,)),
    (ratrod.SESSION, (1, "db:53", 0)), (ratrod.SESSION, (0xffffffff, "", 7)), (ratrod.SESSION_OVER, (1, 3, "")),
    (ratrod.SESSION_OVER, (7, 0, "not allowed")), (ratrod.SESSION_ADDRESS, (1, "192.0.2.1:53")), (ratrod.KEEPALIVE, ()), (ratrod.CLOSE, ()),
)


def encoded(kind, fields):
    """A record before it is sealed."""
    return bytes([kind]) + (ratrod.encode_open(ratrod.Open(*fields)) if kind == ratrod.OPEN else ratrod.encode_content(kind, *fields))


VARINTS = (b"\xfb\x01\x00", b"\xfc\x00\x01\x00\x00", b"\xfd" + b"\xff" * 8, b"\xfb\x00\x01", b"\xfe", b"\xff")


@target(60, lambda: [ratrod.encode_message(message) for message in LEGACY_TRAFFIC], VARINTS + NAMES)
def message(data):
    """decode_message: RemoteProtocolError, or a message that encodes to the same bytes and is the one that the independent peer reads."""
    try:
        found = ratrod.decode_message(data)
    except ratrod.RemoteProtocolError as error:
        return kind_of(error)
    assert ratrod.encode_message(found) == data
    other = legacy_peer.decode(data)
    assert type(found).__name__ == type(other).__name__ and tuple(found) == tuple(other)
    return type(found)


PEER_READS = {
    ratrod.COMPLETED: peer.decode_str, ratrod.ACK: peer.decode_ack, ratrod.ABANDON: peer.decode_abandon, ratrod.ERROR: peer.decode_error,
    ratrod.SESSION: peer.decode_session, ratrod.SESSION_ADDRESS: peer.decode_session_address, ratrod.SESSION_OVER: peer.decode_session_over,
}


def peer_content(kind, content):
    """What the independent peer reads in a record's content."""
    if kind in PEER_READS:
        return PEER_READS[kind](content)
    if kind == ratrod.OPENED:
        with contextlib.suppress(peer.ProtocolError):
            return peer.decode_opened(content)
        return peer.decode_str(content), -1
    if kind == ratrod.OPEN:
        found = peer.decode_open(content)
        return ratrod.Open(found.kind, found.target, found.stream or bytes(16), *found[4:], found.instance)
    assert not content
    return None


@target(60, lambda: [encoded(kind, fields) for kind, fields in CONTENTS], VARINTS + NAMES)
def content(data):
    """decode_content and decode_open: RemoteProtocolError, or fields that encode to the same bytes and are those that the independent peer reads."""
    kind, rest = split(data, 1)
    try:
        found = ratrod.decode_open(rest) if kind == ratrod.OPEN else ratrod.decode_content(kind, rest)
    except ratrod.RemoteProtocolError as error:
        return kind_of(error)
    assert encoded(kind, fields_of(found)) == data[:1] + rest
    # Codes and kinds that are none are refused further up, by what an Open or an Error means.
    with contextlib.suppress(peer.ProtocolError):
        other = peer_content(kind, rest)
        assert (tuple(found) if isinstance(found, tuple) else found) == other
    return kind


def fields_of(found):
    return () if found is None else tuple(found) if isinstance(found, tuple) else (found,)


@target(40, lambda: [peer.encode_datagrams([(1, b"hello"), (2, b""), (0xffffffff, b"x" * 300)]), peer.encode_datagrams([(0, b"\0" * 2000)]), b""])
def datagrams(data):
    """split_datagrams: RemoteProtocolError, or datagrams that make up the same run."""
    try:
        found = [(number, bytes(part)) for number, part in ratrod.split_datagrams(memoryview(data))]
    except ratrod.RemoteProtocolError as error:
        return kind_of(error)
    assert peer.encode_datagrams(found) == data
    return min(len(found), 5)


LEGACY_MESSAGE = {ratrod.DATA: ratrod.Data, ratrod.UDP_DATA: ratrod.UdpData, ratrod.ERROR: lambda error: error,
                  ratrod.OPENED: lambda _: ratrod.HandshakeCompletion()}


def clear_frames():
    frames = [legacy_peer.frame(ratrod.encode_message(message)) for message in LEGACY_TRAFFIC]
    stream = b"".join(frames[4:])
    return [bytes([mode, cut]) + wire for mode, cut in ((0, 0), (1, 1), (1, 5)) for wire in (stream, *frames)] + [b"\0\0" + bytes(9)]


@target(60, clear_frames, VARINTS + (bytes(9), b"\1" + bytes(20)))
def legacy_frames(data):
    """LegacyReader in the clear: RemoteProtocolError; the same records however the stream is cut; each frame is what LegacyWriter makes of it."""
    mode, cut, wire = split(data, 1, 1)
    awaited = bool(mode & 1)
    whole = read_all(ratrod.LegacyReader(None, awaited), wire, 0, ratrod.LEGACY_MAX_FRAME + 9)
    found, ends, error = read_all(ratrod.LegacyReader(None, awaited), wire, cut, ratrod.LEGACY_MAX_FRAME + 9)
    assert (found, ends, str(error)) == (whole[0], whole[1], str(whole[2])), "it depends on how the stream is cut"
    for (kind, what), start, end in zip(found, [0, *ends], ends):
        assert kind == ratrod.END or ratrod.LegacyWriter.clear_message(LEGACY_MESSAGE[kind](what)) == wire[start:end]
    return (tuple(kind for kind, _ in found[:4]), kind_of(error) if error else None)


def tampered(wire, how, at, mask):
    """(`wire` with some damage, how many of its first bytes are still the same). `how` 0 is none."""
    at, how, times = at % (len(wire) + 1), how % 8, how // 8 + 1
    changed = {
        1: lambda: wire[:at] + bytes(byte ^ (mask or 1) for byte in wire[at:at + 1]) + wire[at + 1:],
        2: lambda: wire[:at],
        3: lambda: wire[:at] + bytes([mask]) * times + wire[at:],
        4: lambda: wire[:at] + wire[at + mask + 1:],
        5: lambda: wire[:at] + wire,  # replayed from there
    }.get(how, lambda: wire)()
    return changed, len(os.path.commonprefix([wire, changed]))


def sealed_seeds():
    contents = [encoded(kind, fields) for kind, fields in CONTENTS]
    contents += [bytes([ratrod.DATA]) + b"hello" * 20, bytes([ratrod.DATAGRAMS]) + peer.encode_datagrams([(1, b"hello")])]
    return [bytes([mode, cut, how, 0, at, 7]) + joined(*contents) for mode in range(4) for cut, how, at in ((0, 0, 0), (3, 1, 40), (1, 5, 90))] + [
        bytes([mode, 0, 0, 0, 0, 0]) + joined(content) for mode in range(4) for content in contents]


@target(80, sealed_seeds, VARINTS + tuple(bytes([kind]) for kind, _ in CONTENTS))
def records(data):
    """RecordReader under a known key: plaintext of every kind, sealed; then damage. RemoteProtocolError; what stands before the damage is read as it
    was written, nothing after it is; the same however the stream is cut; what is read and written again is the same wire."""
    mode, cut, how, at, mask, rest = split(data, 1, 1, 1, 2, 1)
    suite = SUITES[mode % len(SUITES)]
    cipher, wire, sound = ratrod.CipherState(suite, KEY[:suite.key_size]), b"", []
    for plain in pieces(rest):
        header = struct.pack(">I", len(plain) + suite.aead.tag)
        wire += header + cipher.encrypt_with_ad(header, plain)
        sound.append(len(wire))
    wire, same = tampered(wire, how, at, mask)

    def reader():
        return ratrod.RecordReader(suite, KEY[:suite.key_size])
    longest = 4 + suite.aead.tag + 1 + ratrod.MAX_CONTENT
    found, ends, error = read_all(reader(), wire, 0, longest)
    again = read_all(reader(), wire, cut, longest)
    assert (found, ends, str(error)) == (again[0], again[1], str(again[2])), "it depends on how the stream is cut"
    assert ends == sound[:len(ends)] and all(end <= same for end in ends), "a record that was damaged was taken"
    writer = ratrod.RecordWriter(suite, KEY[:suite.key_size])
    written = b""
    for kind, what in found:
        if kind in (ratrod.DATA, ratrod.DATAGRAMS):
            room = memoryview(bytearray(ratrod.HEADROOM) + what + bytes(ratrod.TAILROOM))
            written += bytes(writer.data(room, len(what), kind))
        else:
            written += writer.record(kind, *([what] if kind == ratrod.OPEN else fields_of(what)))
    assert wire.startswith(written) and len(written) == (ends[-1] if ends else 0)
    return (tuple(kind for kind, _ in found[:3]), kind_of(error) if error else None)


def legacy_sealed_seeds():
    plains = [ratrod.encode_message(message) for message in LEGACY_TRAFFIC if isinstance(message, (ratrod.Data, ratrod.UdpData, ratrod.Error))]
    return [bytes([cut, how, 0, at, 7]) + joined(*plains) for cut, how, at in ((0, 0, 0), (3, 1, 40), (1, 5, 90))] + [
        bytes(5) + joined(plain) for plain in (*plains, b"", b"\7")]


@target(40, legacy_sealed_seeds, VARINTS)
def legacy_sealed(data):
    """LegacyReader under a known key: as `records`, but that what was sent once may come again, which this wire cannot tell."""
    cut, how, at, mask, rest = split(data, 1, 1, 2, 1)
    wire, sound, aead = b"", [], ratrod.chacha20_poly1305().aead
    for number, plain in enumerate(pieces(rest)):
        body = memoryview(bytearray(plain + bytes(aead.tag)))
        nonce = struct.pack(">4xQ", number)
        aead.seal(memoryview(plain), body, nonce, KEY)
        wire += b"\1" + nonce + struct.pack(">Q", len(body)) + bytes(body)
        sound.append(len(wire))
    wire, same = tampered(wire, how, at, mask)
    longest = ratrod.LEGACY_MAX_FRAME + 21
    found, ends, error = read_all(ratrod.LegacyReader(KEY), wire, 0, longest)
    again = read_all(ratrod.LegacyReader(KEY), wire, cut, longest)
    assert (found, ends, str(error)) == (again[0], again[1], str(again[2])), "it depends on how the stream is cut"
    plains = [legacy_peer.decode(plain) for plain in (piece for piece in pieces(rest)) if readable(plain)]
    for kind, what in found:
        assert kind in (ratrod.DATA, ratrod.UDP_DATA, ratrod.ERROR)
        sent = {ratrod.DATA: legacy_peer.Data(what), ratrod.UDP_DATA: legacy_peer.UdpData(what)}.get(kind) or legacy_peer.Error(*what)
        assert sent in plains, "nobody sent %r" % (sent,)
    return (tuple(kind for kind, _ in found[:3]), kind_of(error) if error else None)


def readable(plain):
    try:
        legacy_peer.decode(plain)
    except (legacy_peer.WireError, ValueError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------- handshakes


def noise_pair():
    client = ratrod.NoiseClientHandshake(CLIENT, SUITES, check_key=only(SERVER), ephemeral=EPHEMERAL[CLIENT])
    return started(client, ratrod.NoiseServerHandshake(SERVER, SUITES, check_key=only(CLIENT), ephemeral=EPHEMERAL[SERVER], instance=b"instance"))


def started(*handshakes):
    for handshake in handshakes:
        handshake.start()
    return handshakes


def legacy_pair(remote="db:5432", encrypt=True):
    client = ratrod.LegacyClientHandshake(CLIENT, ratrod.Open(ratrod.TCP, remote), should_encrypt=encrypt, check_key=only(SERVER),
                                          ephemeral=EPHEMERAL[CLIENT], challenge=CHALLENGE[CLIENT])
    return started(client, ratrod.LegacyServerHandshake(SERVER, check_key=only(CLIENT), ephemeral=EPHEMERAL[SERVER], challenge=CHALLENGE[SERVER]))


@functools.lru_cache(maxsize=None)
def recorded(pair):
    """What (client, server) of a handshake say when all goes well."""
    ends, said = pair(), (bytearray(), bytearray())
    while True:
        moved = False
        for mine, other, mouth in ((*ends, said[0]), (*reversed(ends), said[1])):
            data = mine.data_to_send()
            mouth += data
            while data and other.wanted:
                n = other.wanted
                other.receive_data(data[:n])
                data, moved = data[n:], True
        if not moved:
            return bytes(said[0]), bytes(said[1])


def noise_words():
    return ratrod.OPENING, b"\x00\x60", b"\x00\x00", b"\x04\x01", b"\xff\xff", SERVER.public, CLIENT.public, *peer.SMALL_ORDER_POINTS


@target(15, lambda: [recorded(noise_pair)[0], recorded(noise_pair)[0][:45], b"\0" * 9, b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"], noise_words())
def noise_server(data):
    """NoiseServerHandshake: RemoteProtocolError; done only with the very bytes of a client that owns its key."""
    _, server = noise_pair()
    taken, error = drive(server, data, ratrod.MAX_NOISE_MESSAGE)
    assert not server.is_done or data[:taken] == recorded(noise_pair)[0] and server.peer_key == CLIENT.public
    return answered(server, error)


@target(15, lambda: [recorded(noise_pair)[1], recorded(noise_pair)[1][:40], b"\0" * 9, b"SSH-2.0-x\r\n"], noise_words())
def noise_client(data):
    """NoiseClientHandshake: RemoteProtocolError; done, and message 3 sent, only with the very message 2 of a server that owns its key."""
    client, _ = noise_pair()
    client.data_to_send()
    taken, error = drive(client, data, ratrod.MAX_NOISE_MESSAGE)
    assert client.is_done == bool(client.data_to_send())
    assert not client.is_done or data[:taken] == recorded(noise_pair)[1][:taken] and client.peer_key == SERVER.public
    return answered(client, error)


def payload_seeds():
    offers = [bytes([len(offer), *offer]) for offer in ((1, 2), (2,), (2, 1), (1,), (1, 2, 3, 4))]
    offers += [b"", b"\2\2", b"\1\2 more", b"\xff" + b"\2" * 255]
    first = [b"\0" + joined(offer, identity) for offer in offers for identity in (CLIENT.public, CLIENT.public + b"more", SERVER.public)]
    return first + [b"\1" + joined(identity + suite + instance) for instance in (b"", b"instance")
                    for identity in (SERVER.public, CLIENT.public, peer.negative(SERVER.public), b"")
                    for suite in (b"\1", b"\2", b"\3", b"", b"\2more")]


@target(15, payload_seeds, (CLIENT.public, SERVER.public, OTHER.public, peer.negative(CLIENT.public), b"\2\1\2"))
def noise_payloads(data):
    """Payloads of every kind in messages that are sound otherwise: done exactly where PROTOCOL.md says so, RemoteProtocolError otherwise."""
    role, rest = split(data, 1)
    parts = [*pieces(rest), b"", b""]
    state = ratrod.HandshakeState(not role & 1, ratrod.OPENING, (SERVER if role & 1 else CLIENT).exchange_key(),
                                  EPHEMERAL[SERVER if role & 1 else CLIENT])
    client, server = noise_pair()
    under_test = client if role & 1 else server
    try:
        if role & 1:
            opening = client.data_to_send()
            state.read_message(opening[10:])
            message = state.write_message(parts[0])
            under_test.receive_data(struct.pack(">H", len(message) % 65536))
            under_test.receive_data(message[:under_test.wanted])
        else:
            message = state.write_message(parts[0])
            under_test.receive_data(ratrod.OPENING)
            under_test.receive_data(struct.pack(">H", len(message) % 65536))
            under_test.receive_data(message[:under_test.wanted])
            state.read_message(under_test.data_to_send()[2:])
            message = state.write_message(parts[1])
            under_test.receive_data(struct.pack(">H", len(message) % 65536))
            under_test.receive_data(message[:under_test.wanted])
        error = None
    except ratrod.RemoteProtocolError as raised:
        error = raised
    offer, identity = parts[0], parts[1][:32] if not role & 1 else parts[0][:32]
    if role & 1:
        good = identity == SERVER.public and parts[0][32:33] in [bytes([suite.id]) for suite in SUITES] and len(parts[0]) >= 41 and (
            len(message) <= 1024)
    else:
        good = (len(offer) > 0 and len(offer) > offer[0] and 2 in offer[1:1 + offer[0]] and len(offer) + 32 <= 1024
                and identity == CLIENT.public and len(message) <= 1024)
    assert under_test.is_done == good, "done: %s, where PROTOCOL.md says %s (%r)" % (under_test.is_done, good, error)
    return answered(under_test, error)


def signed(public, signature, challenge):
    """Whether the `cryptography` package takes it for this key's signature."""
    try:
        legacy_peer.check_signature(public, signature, challenge)
    except legacy_peer.WireError:
        return False
    return True


def frames_of(data):
    """The messages in frames in the clear."""
    while data:
        size = int.from_bytes(data[1:9], "big")
        yield legacy_peer.decode(data[9:9 + size])
        data = data[9 + size:]


def legacy_seeds(side):
    messages = (*LEGACY_TRAFFIC, ratrod.Error(0, "a regex \x1b"))
    return lambda: [recorded(legacy_pair)[side], recorded(legacy_pair)[side][:9],
                    *(legacy_peer.frame(ratrod.encode_message(message)) for message in messages)]


@target(15, legacy_seeds(0), VARINTS + NAMES)
def legacy_server(data):
    """LegacyServerHandshake: RemoteProtocolError; done only with a right signature of an authorized key."""
    _, server = legacy_pair()
    taken, error = drive(server, data, ratrod.MAX_HANDSHAKE_FRAME)
    if server.is_done:
        preamble, authentication = frames_of(data[:taken])
        assert authentication.identity_public_key == ratrod.encode_key(CLIENT.public)
        assert (server.remote, server.is_udp) == (preamble.remote, preamble.is_udp)
        assert signed(*authentication, CHALLENGE[SERVER])
    return answered(server, error)


@target(15, legacy_seeds(1), VARINTS + NAMES)
def legacy_client(data):
    """LegacyClientHandshake: RemoteProtocolError; done, and its authentication sent, only with a right signature of a known server."""
    client, _ = legacy_pair()
    client.data_to_send()
    taken, error = drive(client, data, ratrod.MAX_HANDSHAKE_FRAME)
    assert client.is_done == bool(client.data_to_send())
    if client.is_done:
        preamble, = frames_of(data[:taken])
        assert preamble.identity_public_key == ratrod.encode_key(SERVER.public)
        assert signed(preamble.identity_public_key, preamble.signature, CHALLENGE[CLIENT])
    return answered(client, error)


# ---------------------------------------------------------------------------------------------------- SOCKS5


def socks_request(host, port=80, command=1):
    """host: bytes are a name, text is an address."""
    address = b"\3" + bytes([len(host)]) + host if isinstance(host, bytes) else {4: b"\1", 16: b"\4"}[len(ipaddress.ip_address(host).packed)] + (
        ipaddress.ip_address(host).packed)
    return bytes([5, command, 0]) + address + struct.pack(">H", port)


SOCKS_HOSTS = (b"localhost", b"db.example", b"127.1", b"::1", b"[::1]", b"/run/x", b"unix:/run/x", b"a:b", b"\0", b"a" * 255, "127.0.0.1", "::1",
               "::ffff:127.0.0.1")


def socks_seeds():
    hello, login = b"\5\1\0", b"\5\2\0\2\1\5alice\4wine"
    return [mode + words + socks_request(host, 80, command) for mode, words in ((b"\0", hello), (b"\1", login))
            for host in SOCKS_HOSTS for command in (1, 2, 3)] + [
                b"\0\4\1\0\x50\x7f\0\0\1\0", b"\0\4\1\0\x50\0\0\0\1me\0db.example\0", b"\0GET / HTTP/1.1\r\n\r\n", b"\1\5\1\0"]


@target(50, socks_seeds, NAMES + (b"\5\1\0\1", b"\5\1\0\3", b"\5\1\0\4"))
def socks(data):
    """SocksHandshake: RemoteProtocolError; a request's address written again is the same; no password, no request; a name is never a path."""
    mode, rest = split(data, 1)
    user = "alice:wine" if mode & 1 else None
    handshake = ratrod.SocksHandshake(user)
    taken, error = drive(handshake, rest, 255)
    said = handshake.data_to_send()
    assert len(said) <= 32 or said.startswith(b"HTTP/1.1 400 ") and len(said) < 300
    if not handshake.is_done:
        return answered(handshake, error)
    methods = rest[1]
    assert rest[0] == 5 and (2 if user else 0) in rest[2:2 + methods] or rest[0] == 4 and methods == 1 and not user
    assert not user or rest[2 + methods:].startswith(b"\1\5alice\4wine")
    try:
        found = ratrod.parse_target(handshake.target)
    except ValueError as refused:
        return kind_of(refused)
    assert not found.is_unix
    check_host(found.host)
    again = ratrod.socks_address(found)
    # The same but for what parse_host() makes canonical, and for an address that came as a name.
    changed = found.host != handshake.target.rpartition(":")[0].strip("[]") or again[0] != 3 or handshake.version == 4
    assert rest[:taken].endswith(again) or changed
    return handshake.command, again[0]


def socks_datagram_seeds():
    return [b"\0\0\0" + socks_request(host)[3:] + b"payload" for host in SOCKS_HOSTS] + [b"\0\0\1" + socks_request("127.0.0.1")[3:], b"\0\0\0\3\0"]


@target(40, socks_datagram_seeds, NAMES)
def socks_datagram(data):
    """split_socks_datagram: ValueError, or a payload that is the end of the datagram, after an address that is the same when written again."""
    try:
        named, start = ratrod.split_socks_datagram(memoryview(data))
    except ValueError as error:
        return kind_of(error)
    assert 4 < start <= len(data)
    try:
        found = ratrod.parse_target(named)
    except ValueError as error:
        return kind_of(error)
    assert not found.is_unix
    again = b"\0\0\0" + ratrod.socks_address(found)
    other, after = ratrod.split_socks_datagram(memoryview(again + data[start:]))
    assert ratrod.parse_target(other) == found and after == len(again)
    return data[3], found.is_unix


# ---------------------------------------------------------------------------------------------------- PROXY protocol


def proxy_2(family, addresses, command=0x21, more=b""):
    return ratrod.PROXY_SIGNATURE + struct.pack(">BBH", command, family, len(addresses) + len(more)) + addresses + more


PROXY_HEADERS = (
    b"PROXY TCP4 192.0.2.7 192.0.2.1 56324 443\r\n", b"PROXY TCP6 2001:db8::7 2001:db8::1 1 65535\r\n", b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN ffff::1 x 1 2\r\n", b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n",
    b"PROXY TCP4 127.1 1 1 1\r\n",
    proxy_2(0x11, b"\xc0\0\2\7\xc0\0\2\1\xdc\x04\1\xbb"), proxy_2(0x21, bytes(15) + b"\7" + bytes(15) + b"\1\0\1\0\2"),
    proxy_2(0x11, b"\xc0\0\2\7\xc0\0\2\1\xdc\x04\1\xbb", more=b"\3\0\4abcd\4\0\x05hello"), proxy_2(0, b"", 0x20),
    proxy_2(0, b""), proxy_2(0x31, b"/run/x".ljust(216, b"\0")),
    proxy_2(0x12, bytes(12)), proxy_2(0x11, bytes(11)), proxy_2(0x11, bytes(12), 0x20), proxy_2(0x41, bytes(12)))


def proxy_says(header):
    """The (address, port) that a whole header names by the specification (HAProxy's proxy-protocol.txt), or None where it names none."""
    if header.startswith(b"PROXY "):
        words = header[:-2].decode("latin-1").split(" ")
        return None if words[1] == "UNKNOWN" else (ipaddress.ip_address(words[2]), int(words[4]))
    command, family, _, body = split(header[12:], 1, 1, 2)
    size = {0x11: 4, 0x21: 16}.get(family)
    if command == 0x20 or size is None:
        return None
    return ipaddress.ip_address(body[:size]), int.from_bytes(body[2 * size:2 * size + 2], "big")


@target(50, lambda: [header + b"ratrod2\n" for header in PROXY_HEADERS], (b"\r\n", b" ", b"TCP6", b"%", b"\0\xff", b"\x1b[2J", b"]", *NAMES))
def proxy_header(data):
    """ProxyHeader: RemoteProtocolError, or the very header and nothing behind it, with the address that it names: a plain one, without a zone."""
    header = ratrod.ProxyHeader()
    taken, error = drive(header, data, 2048)
    if not header.is_done:
        return answered(header, error)
    read, said = data[:taken], header.source
    assert read.endswith(b"\r\n") or read.startswith(ratrod.PROXY_SIGNATURE) and len(read) == 16 + int.from_bytes(read[14:16], "big")
    expected = proxy_says(read)
    assert (said is None) == (expected is None)
    if said:
        host, port = said
        assert re.fullmatch(r"[0-9a-f.:]+", host), "an address that is none: %r" % host
        address = expected[0]
        assert (host, port) == (str(getattr(address, "ipv4_mapped", None) or address), expected[1]) and 0 <= port <= 65535
    assert not header.is_local or said is None
    return header.is_local, said is None, read[:1]


NETWORKS = b"10.0.0.7", b"10.0.0.7,10.1.0.0/16, ::1", b"", b"fe80::/10", b"::ffff:10.0.0.7", b"10.1.2.3/8", b"1.2.3.4/33", b"fe80::1%lo", b","


@target(15, lambda: list(NETWORKS), (b",", b"/", b"/0", b"/8", b"%", b"::", *NAMES))
def networks(data):
    """parse_networks: ConfigError in one printable line, or networks that are the same when written and read again."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = ratrod.parse_networks(text)
    except ratrod.ConfigError as error:
        return re.sub(r"[`'].*[`']|[0-9]+", "", harmless(str(error), 4000))[:60]
    assert ratrod.parse_networks(",".join(map(str, found))) == found
    for host in ("127.0.0.1", "::1", "::ffff:10.0.0.7", "fe80::1%lo"):
        any(ratrod.parse_ip(host) in network for network in found)
    return len(found)


# ---------------------------------------------------------------------------------------------------- files


@functools.lru_cache(maxsize=None)
def scratch():
    """A folder of this process, in memory where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="ratrod-fuzz-", dir=place)
    return folder, pathlib.Path(folder.name)


def put(name, data):
    path = scratch()[1] / name
    path.write_bytes(data)
    return str(path)


@target(30, lambda: [pair.encode().encode() for pair in (SERVER, CLIENT)] + [b"", b"\n" + CLIENT.encode().encode() + b"\n", b"\xff" * 111])
def key_file(data):
    """KeyPair.decode: ValueError, or a pair that encodes to the same text; KeyFolder.load: ConfigError, or that pair."""
    text = data.decode("utf-8", "replace")
    pair = None
    try:
        pair = ratrod.KeyPair.decode(text)
        assert pair.encode() == text and ratrod.KeyPair.from_seed(pair.seed) == pair
    except ValueError as error:
        kind_of(error)
    path = put("key", data)
    os.chmod(path, 0o600)
    put("key.pub", data[:43])
    folder = ratrod.KeyFolder(path)
    try:
        loaded = folder.load()
    except ratrod.ConfigError as error:
        assert pair is None or data != data.strip()
        return kind_of(error)
    assert pair in (None, loaded)
    for warning in folder.warnings:
        harmless(warning)
    return "taken"


OPTIONS = ("", " alice@laptop", ' permitopen="db:5432"', ' permitopen="*.example.com:*" no-udp', ' permitopen="[2001:db8::1]:80" bob',
           ' permitopen="unix:/run/x.sock"', ' permitlisten="9000"', ' permitlisten="127.0.0.1:9000" expires="2030-01-31" no-legacy carol',
           ' permitopen="127.1:80"', ' expires="2030-02-31"', ' permitopen=db:80', ' alice permitopen="db:80"', ' permitopen="[::ffff:127.0.0.1]:80"')
LINE_WORDS = (b"permitopen=", b'permitopen="', b'permitlisten="', b'expires="', b"no-udp", b"NO_UDP", b"no-legacy", b'"', b"'", b" ", b"\n", b"\r",
              b"\0", b"\xef\xbb\xbf", b"\x0b", b"\x85", b"\xe2\x80\xa8", b"\xc2\xa0", b"#", b"*", b"*.", b":*", b"restrict", b",", *NAMES)


def lines_of(data):
    """The words of each line, and those of a line that a byte order mark begins."""
    return [line.lstrip("\ufeff").split() for line in re.split("\r\0?\n\0?|[\r\n]\0?", data.decode("utf-8", "replace"))]


def file_seeds():
    key, other = ratrod.encode_key(CLIENT.public), ratrod.encode_key(OTHER.public)
    return [("%s%s\n" % (key, options)).encode() for options in OPTIONS] + [
        ("# comment\n\n%s%s\n%s%s" % (key, one, other, two)).encode() for one, two in zip(OPTIONS, OPTIONS[3:])] + [b"", b"\xff\xfe\n"]


OPTION = re.compile(r'permitopen="[^"]*"|permitlisten="[^"]*"|expires="[^"]*"|noudp|nolegacy')


@target(60, file_seeds, LINE_WORDS)
def authorized_keys(data):
    """KeyLines over authorized_keys raises nothing; every key it lists stands first in a line of its own; what a line grants is what its options say,
    and a line that may have meant a restriction never grants without it."""
    lines = ratrod.KeyLines(put("authorized_keys", data), ratrod.parse_grant)
    found = lines.read()
    for problem in lines.problems:
        harmless(problem, 4000)
    texts = lines_of(data)
    for key, granted in found.items():
        for number, grant in granted:
            key_text, *words = texts[number - 1]
            assert key_text == ratrod.encode_key(key)
            words = [re.sub("^[^=]*", lambda name: re.sub("[-_]", "", name[0].lower()), word) for word in words]
            n = next((n for n, word in enumerate(words) if not OPTION.fullmatch(word)), len(words))
            options, comment = words[:n], words[n:]
            assert not any("=" in word or word == "restrict" or word.startswith(("permit", "noudp", "nolegacy", "expire")) and "@" not in word
                           for word in comment), "an option taken for a comment"
            for field, name in ((grant.permitopen, "permitopen="), (grant.permitlisten, "permitlisten=")):
                assert len(field) == sum(word.startswith(name) for word in options)
            assert (grant.no_udp, grant.no_legacy) == ("noudp" in options, "nolegacy" in options)
            assert (grant.expires < float("inf")) == any(word.startswith("expires=") for word in options)
            harmless(grant.comment, 63)
            for pattern in grant.permitopen:
                if pattern.host != "*" and not pattern.host.startswith("/"):
                    check_host(pattern.host[2:] if pattern.host.startswith("*.") else pattern.host)
    return len(found), re.sub(r"`.*`|[0-9]+", "", "".join(lines.problems))[:100]


@target(30, lambda: [line.replace(b" alice@laptop", b" server:19000") for line in file_seeds()]
        + [("%s\n%s [::1]:19000\n" % (ratrod.encode_key(SERVER.public), ratrod.encode_key(OTHER.public))).encode()], LINE_WORDS)
def known_hosts(data):
    """KnownHosts: UnknownHost or AuthenticationError, or a key that stands in a line for that address or in one for any; what was added is known,
    and only where no other key was."""
    path = put("known_hosts", data)
    hosts = ratrod.KnownHosts(path)
    texts = [[words[0], *(word.lower().replace("[", "").replace("]", "") for word in words[1:2])] for words in lines_of(data) if words]
    ours, answers = ([], ["server"], ["server:19000"]), []
    for key in (SERVER.public, OTHER.public):
        bound = [words[1:] for words in texts if words[0] == ratrod.encode_key(key)]
        try:
            hosts.check(key, "server:19000")
            assert any(words in ours for words in bound)
            answers.append("known")
        except ratrod.UnknownHost as error:
            harmless(str(error))
            assert not any(words in ours for words in bound)
            answers.append("unknown")
        except ratrod.AuthenticationError as error:
            answers.append(kind_of(error))
    for problem in hosts.problems:
        harmless(problem, 4000)
    if answers[0] == "unknown":
        assert hosts.add(SERVER.public, "server:19000") == ""
        for again in (hosts, ratrod.KnownHosts(path)):
            again.check(SERVER.public, "server:19000")
    return tuple(answers)


# ---------------------------------------------------------------------------------------------------- names and command lines


def check_host(host):
    """A host that was accepted is what it looks like: no resolver that takes numbers in another form can make an address of a name."""
    assert host and harmless(host, 253) and host == host.lower() and not re.search(r"[\s%\0\[\]]", host)
    if ratrod.is_address(host):
        address = ipaddress.ip_address(host)
        assert str(address) == host and getattr(address, "ipv4_mapped", None) is None
        return
    assert re.fullmatch(r"[a-z0-9._-]+", host), host
    for understand in (socket.inet_aton, functools.partial(socket.getaddrinfo, port=80, flags=socket.AI_NUMERICHOST)):
        try:
            understand(host)
        except (OSError, UnicodeError):  # labels that are too long for its IDNA
            continue
        raise AssertionError("%r is a name here and an address to the resolver" % host)


@functools.lru_cache(maxsize=None)
def policies():
    grants = (ratrod.parse_grant(['permitopen="db.example:80"', 'permitopen="10.0.0.1:*"', 'permitopen="*.internal:*"']),)
    return ((ratrod.Policy(r"(?!127\.|localhost|::1|\[::1).*"), (ratrod.Grant(),)), (ratrod.Policy(), grants))


FOUND = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1%2", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "::ffff:0.0.0.0")
TARGETS = (b"db:5432", b"DB.Example.:80", b"127.0.0.1:80", b"[::1]:80", b"[::ffff:127.0.0.1]:80", b"[::ffff:7f00:1]:80", b"unix:/run/x.sock",
           b"10.0.0.1:80", b"127.1:80", b"0x7f.1:80", b"2130706433:80", b"017700000001:80", b"[fe80::1%lo]:80", b"a_b-c.d:65535", b"localhost:1",
           b"*.internal:80", b"x.internal:80")


NAME_WORDS = (*NAMES, b"0x", b"0", b"1.", b":", b"[", b"]", b"%", b"\n", b"\0", b"xn--", "\u2488".encode(), "\uff0e".encode(), "\u3002".encode())


@target(90, lambda: list(TARGETS), NAME_WORDS)
def names(data):
    """parse_target, parse_host, parse_path, parse_bind, parse_pattern: ValueError, or what is the same when read again, and what no resolver takes
    for something else. Policy: PolicyError; past a rule against loopback nothing gets that leads there, whatever the name resolves to."""
    text = data.decode("utf-8", "replace")
    for parse in (ratrod.parse_path, ratrod.parse_bind, ratrod.parse_pattern):
        with contextlib.suppress(ValueError):
            found = parse(text)
            assert parse is not ratrod.parse_bind or ratrod.parse_bind(str(found)) == found
            assert parse is not ratrod.parse_path or found == text
    try:
        found = ratrod.parse_target(text)
    except ValueError as error:
        for policy, grants in policies():
            try:
                policy.check(text, grants)
            except ratrod.PolicyError as refused:
                harmless(str(refused), 300)
            else:
                raise AssertionError("a target that is none was permitted")
        return re.sub(r"[`'].*[`']|[0-9]+", "", str(error))[:60]
    assert ratrod.parse_target(str(found)) == found
    if found.is_unix:
        assert found.host == ratrod.parse_path(found.host)
        return "unix"
    assert 1 <= found.port <= 65535
    check_host(found.host)
    allowed = []
    for policy, grants in policies():
        try:
            permitted = policy.check(text, grants)
            resolved = policy.check_addresses(permitted, (permitted.host,) if ratrod.is_address(permitted.host) else FOUND, grants)
        except ratrod.PolicyError as refused:
            harmless(str(refused), 500)
            allowed.append(None)
            continue
        for text in resolved:
            address = ratrod.parse_ip(text)
            assert not (address.is_loopback or address.is_unspecified or address.is_multicast)
            assert not address.is_link_local or not grants[0].permitopen
        allowed.append(len(resolved))
    return tuple(allowed)


TUNNELS = (b"80", b"2000:80", b"2000:db:5432", b"127.0.0.1:2000:db:5432", b"[::1]:2000:[2001:db8::7]:80", b"0:80", b"8000-8010:host:9000-9010",
           b"8000-8003", b"[::1]:8000-8003:[::2]:9000-9003", b"1080:socks", b"127.0.0.1:1080:socks", b"unix:/tmp/p:socks", b"stdio:db:5432",
           b"stdio:unix:/run/x", b"unix:/tmp/p:db:80", b"2000:unix:/run/x", b"unix:/tmp/p:unix:/run/x", b"R:9000:db:80", b"R:0.0.0.0:9000:db:80",
           b"R:[::]:0:[::1]:80", b"R:80", b"R:9000-9003:db:80-83", b"R:9000:unix:/run/x")
TUNNEL_WORDS = (b"unix:/", b":socks", b"stdio:", b"R:", b"tcp:", b"udp:", b"*:", b"%eth0]",
                b"[::1]", b":", b"-", b"0-", b"1-65535", b"65535-1", b"99999", b"-0", *NAMES)


def written(spec):
    """The tunnel that a TunnelSpec is, as a user writes it."""
    if spec.kind == ratrod.STDIO:
        return "stdio:%s" % (spec.remote,)
    local = str(spec.local) if spec.local.host else str(spec.local.port)
    if spec.kind == ratrod.FORWARD and len(spec.protocols) == 1:
        local = "%s:%s" % (spec.protocols[0].lower(), local)
    return {ratrod.SOCKS: "%s:socks" % local, ratrod.REVERSE: "R:%s:%s" % (local, spec.remote)}.get(spec.kind, "%s:%s" % (local, spec.remote))


@target(80, lambda: list(TUNNELS), TUNNEL_WORDS)
def tunnel(data):
    """parse_tunnels: ConfigError in one printable line, or tunnels that are the same when written and read again, at most 1000."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = ratrod.parse_tunnels(text)
    except ratrod.ConfigError as error:
        return re.sub(r"[`'].*[`']|[0-9]+", "", harmless(str(error), 4000))[:100]
    assert 1 <= len(found) <= 1000
    for spec in found:
        assert spec.kind == ratrod.SOCKS or spec.remote.is_unix or 1 <= spec.remote.port <= 65535
        if spec.kind != ratrod.SOCKS and not spec.remote.is_unix:
            check_host(spec.remote.host.partition("%")[0] if spec.kind == ratrod.REVERSE else spec.remote.host)
        assert ratrod.parse_tunnels(written(spec)) == [spec], "%r is written %r" % (spec, written(spec))
    return len(found) > 1, found[0].kind, found[0].local.is_unix, found[0].remote.is_unix


@target(30, lambda: [b"0.0.0.0:19000", b"[::]:19000", b"server:19000", b"[::1]:0", b":1", b"a:b:c", b"host"], NAME_WORDS)
def endpoint(data):
    """parse_endpoint: ConfigError in one printable line, or an address that is the same when written and read again."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = ratrod.parse_endpoint(text, "server", lowest=0)
    except ratrod.ConfigError as error:
        return re.sub(r"[`'].*[`']|[0-9]+", "", harmless(str(error), 4000))[:100]
    assert ratrod.parse_endpoint(str(found), "server", lowest=0) == found
    return bool(found.port), ":" in found.host


REGEXES = (b".*", br"db\.example(:80)?", br"(?!127\.).*", b"[[:alpha:]]", b"(a|b", b"(?i)x", b"x{2,1}", b"(?P<n>a)(?P=n)", br"\d+\Z", b"unix:/run/.*",
           b"(?<=a)b", b"(?u)a", b"a**", b"[a-", b"\\")


@target(20, lambda: list(REGEXES), (b"(?", b"(?a)", b"(?L)", b"(?-i:", b"{1,99999}", b"\\N{", b"\\x", b"[^", b")", b"(?P<"))
def regex(data):
    """Policy(regex): ConfigError, or one that judges."""
    if re.search(rb"[0-9]{4}", data) or len(data) > 200:
        return "too dear"  # an operator may write what takes for ever; this is about what it raises
    try:
        policy = ratrod.Policy(data.decode("utf-8", "replace"))
    except ratrod.ConfigError as error:
        return type(error), re.sub(r"`.*`|[0-9]+", "", str(error), flags=re.S)[:60]
    try:
        policy.check("db:80")
    except ratrod.PolicyError:
        return False
    return True


COMMAND_LINES = (
    "serve 0.0.0.0:19000", "-v -k /k serve -r db:.* --allow-listen [::]:1", "serve --legacy --udp-timeout 5 --max-links=7 a:1",
    "connect server:1", "connect -a -e --legacy server:1 2000:db:80 80", "connect --accept-new server:1 -- R:1:db:2", "-k k connect s:1 stdio:db:1",
    "connect s:1 1080:socks --socks-user a:b", "keygen", "-k x keygen", "demo -v", "help serve", "-h", "serve --help", "-V", "--version", "help",
    "serve --workers 4 a:1", "connect --workers=2 s:1 80", "serve", "connect", "nothing", "", "serve a:1 b:2", "-k", "--max-links x serve a:1")


FLAGS = tuple(("\0" + word).encode() for word in sorted(set(re.findall(r"--[\w-]+|(?<= )-\w\b", ratrod.__doc__))))


@target(5, lambda: [line.replace(" ", "\0").encode() for line in COMMAND_LINES], (*FLAGS, b"\0--", b"\0-", b"=", b"\0-kv", b"\0"))
def command_line(data):
    """parse_command_line: UsageError in one printable line, or options; the fall-back for docopt reads the same line in the same way; what the words
    mean further on is ConfigError or understood."""
    argv = data.decode("utf-8", "surrogateescape").split("\0") if data else []
    try:
        found = ratrod.parse_command_line(argv)
    except ratrod.UsageError as error:
        harmless(str(error), 4000)
        return re.sub(r"`[^`]*`|[0-9]+", "", str(error))[:60]
    check_fall_back(argv, found)
    assert found.limits
    with contextlib.suppress(ratrod.ConfigError):
        ratrod.parse_endpoint(found.bind or found.server, "server")
        ratrod.check_tunnels(found.tunnels, legacy=found.legacy, workers=found.workers, socks_user=found.socks_user)
    return found.command, len(found.tunnels)


def check_fall_back(argv, found):
    """ratrod's own reader of the usage text stands in for docopt: what both take they understand alike."""
    docopt = sys.modules.pop("docopt", None)
    sys.modules["docopt"] = None  # what an import of it finds is that it is missing
    try:
        other = ratrod.parse_command_line(argv)
    except ratrod.UsageError:
        return
    finally:
        del sys.modules["docopt"]
        if docopt:
            sys.modules["docopt"] = docopt
    # A second "--" may be left among the tunnels, where it is none and refused as such.
    one, two = ({**vars(options), "tunnels": [word for word in options.tunnels if word != "--"]} for options in (found, other))
    assert one == two, "the fall-back understands another thing: %r" % (other,)


