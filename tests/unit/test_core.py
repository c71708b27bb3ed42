"""Sections 2 to 6 of ratrod.py, all that does no I/O, against PROTOCOL.md: bytes in, bytes out, in memory; and the legal records of section 8.

That no bytes at all raise anything else is the fuzzer's to show (system/test_fuzz.py). Keys, addresses and policy (sections 3 and 4) are in
test_core_keys.py, the handshake of ratrod2 is in test_core_handshake.py, the legacy wire in test_core_legacy.py.
"""

import functools
import itertools
import os
import struct
import subprocess
import sys
import types
from unittest import mock

import nacl.bindings
import pytest
from hypothesis import given, settings, strategies as st

import ratrod
from ratrod import HEADROOM, TAILROOM, AuthenticationError, LocalProtocolError, RemoteProtocolError
from support import ratrod2_peer as peer
from support.programs import PYTHON, RATROD
from support.rows import assert_each_raises, row

unlimited = settings(deadline=None, max_examples=1000 if os.environ.get("RATROD_LONG") else 50)  # nothing here is about time

# ---------------------------------------------------------------------------------------------------- what the files share


def whole(data):
    return [data]


def byte_at_a_time(data):
    return [data[at:at + 1] for at in range(len(data))]


every_cut = pytest.mark.parametrize("cut", [whole, byte_at_a_time])
# Both ends of a byte: a spare top bit is where decoders and curves are lax.
MASKS = (0x01, 0x80)


def flipped(data):
    """(position, `data` with one bit of that byte turned over) for every byte."""
    for at, mask in itertools.product(range(len(data)), MASKS):
        yield at, data[:at] + bytes((data[at] ^ mask,)) + data[at + 1:]


def read_records(reader, chunks):
    """What a link does: its buffer grows by each chunk, and it takes records as long as there are any.

    Returns the (type, content)s and how many bytes are left over. `wanted` may never be what is there already.
    """
    buffer, at, records = b"", 0, []
    for chunk in chunks:
        buffer += chunk
        view = memoryview(bytearray(buffer))
        while at < len(buffer):
            record = reader.next(view, at, len(buffer))
            if record is None:
                assert reader.wanted > len(buffer) - at
                break
            kind, content, at = record
            records.append((kind, bytes(content) if isinstance(content, memoryview) else content))
    return records, len(buffer) - at


def read_one(reader, wire):
    """The only record of `wire`. Where a length was made longer, the reader gets as many bytes as it likes."""
    view = memoryview(bytearray(wire))
    record = reader.next(view, 0, len(view))
    if record is None:
        assert reader.wanted > len(wire)
        view = memoryview(bytearray(wire.ljust(reader.wanted, b"\0")))
        record = reader.next(view, 0, len(view))
    return record


def in_room(payload):
    """A scratch buffer that holds `payload` where writers want it."""
    room = memoryview(bytearray(HEADROOM + len(payload) + TAILROOM))
    room[HEADROOM:HEADROOM + len(payload)] = payload
    return room


def write_data(writer, payload, **options):
    return bytes(writer.data(in_room(payload), len(payload), **options))


def started(handshake):
    """The handshake after its first step."""
    handshake.start()
    return handshake


def feed(handshake, chunks):
    """Gives it the chunks as far as it wants them; returns what it left."""
    left = b""
    for chunk in chunks:
        n = min(len(chunk), handshake.wanted) if not left else 0
        while n:
            handshake.receive_data(chunk[:n])
            chunk = chunk[n:]
            n = min(len(chunk), handshake.wanted)
        left += chunk
    return left


def turns(client, server):
    """(sender, receiver) of each message of a handshake."""
    return (client, server), (server, client), (client, server)


def shake(client, server, cut=whole):
    """A handshake from end to end: what the server said last."""
    for sender, receiver in turns(client, server):
        assert feed(receiver, cut(sender.data_to_send())) == b""
    return server.data_to_send()


def check_joined(client, server, last, first, stream, cut):
    """`last` is what the server says when the handshake is over: its only record is `first`. Then both read what the other says."""
    assert client.is_done and server.is_done and (client.wanted, server.wanted) == (0, 0)
    assert (client.peer_key, server.peer_key) == (SERVER.public, CLIENT.public)
    assert read_records(client.reader, cut(last)) == ([first], 0)
    for _ in range(3):
        for sender, receiver in turns(client, server)[:2]:
            assert read_records(receiver.reader, cut(write_all(sender.writer, stream))) == (stream, 0)


def accept(_key):
    pass


def refuse(_key):
    raise AuthenticationError("it is not listed")


CLIENT, SERVER = (ratrod.KeyPair.from_seed(seed) for seed in (b"c" * 32, b"s" * 32))
E_CLIENT, E_SERVER = b"\x11" * 32, b"\x22" * 32


# ---------------------------------------------------------------------------------------------------- 2. messages


def test_varint_of_every_width():
    bad_varints = ["fb0000", "fb00fa", "fc00000000", "fc0000ffff", "fd" + "00" * 8, "fd00000000ffffffff", "fe", "ff", "fe" + "00" * 16]
    varints = [(0, "00"), (1, "01"), (250, "fa"), (251, "fb00fb"), (0xffff, "fbffff"), (1 << 16, "fc00010000"), (0xffffffff, "fcffffffff"),
               (1 << 32, "fd0000000100000000"), ((1 << 64) - 1, "fd" + "ff" * 8)]
    wrong = [bytes.fromhex(wire) for wire in bad_varints]
    for n, text in varints:
        wire = bytes.fromhex(text)
        assert ratrod.encode_varint(n) == wire and ratrod._decode(None, "v", wire) == n
        wrong += [wire + b"\0", *(wire[:end] for end in range(len(wire)))]
    assert_each_raises(RemoteProtocolError, None, functools.partial(ratrod._decode, None, "v"), wrong)


texts = st.text(max_size=60)
u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (32, 64))
codes = st.integers(ratrod.INVALID_HOST, ratrod.UNKNOWN)
OPENS = st.one_of(
    st.tuples(st.just(ratrod.TCP), texts, st.binary(min_size=16, max_size=16), u32, u64, u64).map(lambda fields: ratrod.Open(*fields)),
    st.just(ratrod.Open(ratrod.UDP, "")),
    st.tuples(texts, st.binary(min_size=8, max_size=8)).map(lambda fields: ratrod.Open(ratrod.LISTEN, fields[0], instance=fields[1])))


def encode_open(kind, target, stream, attempt, at, taken, instance):
    return peer.encode_open(kind, target, instance, stream, attempt, at, taken)


# For each record type with a layout: its fields, and how the independent peer encodes them.
CONTENTS = {
    **dict.fromkeys((ratrod.END, ratrod.OVER, ratrod.KEEPALIVE, ratrod.CLOSE), (st.just(()), bytes)), ratrod.OPEN: (OPENS, encode_open),
    ratrod.COMPLETED: (st.tuples(texts), peer.encode_str), ratrod.ERROR: (st.tuples(codes, texts), peer.encode_error),
    ratrod.OPENED: (st.tuples(texts, st.one_of(st.just(-1), u64)), lambda address, taken: peer.encode_opened(address, None if taken < 0 else taken)),
    ratrod.ACK: (st.tuples(u64), peer.encode_ack), ratrod.ABANDON: (st.tuples(st.binary(min_size=16, max_size=16)), bytes),
    ratrod.SESSION: (st.tuples(u32, texts, u32), peer.encode_session), ratrod.SESSION_ADDRESS: (st.tuples(u32, texts), peer.encode_session_address),
    ratrod.SESSION_OVER: (st.tuples(u32, codes, texts), peer.encode_session_over),
}


def values(message):
    """The fields of a decoded content."""
    return () if message is None else tuple(message) if isinstance(message, tuple) else (message,)


def test_exact_bytes_of_contents():
    bad_contents = [
        (ratrod.COMPLETED, "01ff"), (ratrod.OPENED, "02c328"), (ratrod.ERROR, "0002edb0"), (ratrod.SESSION, "0000000101ff00000000"),  # not UTF-8
        (ratrod.COMPLETED, "fb000161"), (ratrod.ERROR, "fe00"), (ratrod.ERROR, "fb000300"),  # integers in no or another form
        (ratrod.COMPLETED, "fd" + "ff" * 8), (ratrod.OPENED, "fcffffffff"),  # a length that promises more than any content can hold
        (ratrod.ACK, "00" * 7), (ratrod.ACK, "00" * 9), (ratrod.ABANDON, "00" * 15), (ratrod.ABANDON, "00" * 17),
        (ratrod.OPENED, "00" + "00" * 7), (ratrod.OPENED, "00" + "00" * 9), (ratrod.SESSION, "0000000101ff"),
        (ratrod.END, "00"), (ratrod.OVER, "00"), (ratrod.KEEPALIVE, "00"), (ratrod.CLOSE, "00"),
    ]
    exact_contents = [
        (ratrod.COMPLETED, ("2.0.0",), "05" + b"2.0.0".hex()), (ratrod.COMPLETED, ("x" * 300,), "fb012c" + "78" * 300),
        (ratrod.ERROR, (3, "no"), "03026e6f"), (ratrod.OPENED, ("", 0), "00" + 8 * "00"),
        (ratrod.OPENED, ("", -1), "00"),  # an answer to an Open of another kind than TCP
        (ratrod.ACK, (258,), "0000000000000102"), (ratrod.SESSION, (258, "a:1", 7), "0000010203613a3100000007"),
        (ratrod.SESSION_ADDRESS, (258, "a:1"), "0000010203613a31"), (ratrod.SESSION_OVER, (1, 2, "\u00e9"), "000000010202c3a9"),
        (ratrod.CLOSE, (), ""),
    ]
    for kind, fields, wire in exact_contents:
        assert ratrod.encode_content(kind, *fields).hex() == wire
        assert values(ratrod.decode_content(kind, bytes.fromhex(wire))) == fields
    for open_, wire in (
            (ratrod.Open(1, "db:5432", bytes(range(16)), 2, 5, 300),
             "0107" + b"db:5432".hex() + bytes(range(16)).hex() + "00000002" + "0000000000000005" + "000000000000012c"),
            (ratrod.Open(2, ""), "0200"), (ratrod.Open(3, "", instance=bytes(range(8))), "03000001020304050607")):
        assert ratrod.encode_open(open_).hex() == wire
    # Open, Data and Datagrams have decoders of their own; other types are not in the protocol.
    for kind, wire in (*bad_contents, *((kind, "") for kind in set(range(256)) - (set(CONTENTS) - {ratrod.OPEN}))):
        with row((kind, wire)):
            pytest.raises(RemoteProtocolError, ratrod.decode_content, kind, bytes.fromhex(wire))


@unlimited
@given(st.sampled_from(sorted(CONTENTS)), st.data())
def test_contents_there_and_back(kind, data):
    strategy, encode = CONTENTS[kind]
    fields = data.draw(strategy)
    content = ratrod.encode_open(fields) if kind == ratrod.OPEN else ratrod.encode_content(kind, *fields)
    decoded = ratrod.decode_open if kind == ratrod.OPEN else functools.partial(ratrod.decode_content, kind)
    assert content == encode(*fields) and values(decoded(content)) == fields
    pytest.raises(RemoteProtocolError, decoded, content + b"\0")
    # An Opened without its position is a whole one; the stream judges that.
    for end in set(range(len(content))) - {len(content) - 8 if kind == ratrod.OPENED and fields[1] >= 0 else -1}:
        pytest.raises(RemoteProtocolError, decoded, content[:end])


@unlimited
@given(st.lists(st.tuples(u32, st.binary(max_size=40)), max_size=8))
def test_datagrams_there_and_back(datagrams):
    run = peer.encode_datagrams(datagrams)
    ends = {len(peer.encode_datagrams(datagrams[:n])): n for n in range(len(datagrams) + 1)}
    for end in range(len(run) + 1):
        split = ratrod.split_datagrams(memoryview(run)[:end])
        if end in ends:
            assert [(number, bytes(data)) for number, data in split] == datagrams[:ends[end]]
        else:
            pytest.raises(RemoteProtocolError, list, split)


# ---------------------------------------------------------------------------------------------------- 5. ciphers


def make_suite(suite, fast):
    return suite._replace(aead=ratrod.Aead(getattr(suite.aead, "name", "aegis128l"), 32 if suite.id == 1 else 16, fast=fast))


CHACHA = ratrod.chacha20_poly1305()
# The suite itself is tested wherever the binding has it; that it is offered on fast machines only is another matter.
AEGIS = ratrod.aegis_128l() or ratrod.Suite(1, "AEGIS-128L", 16, None, struct.Struct("<Q8x").pack)
HAS_AEGIS = getattr(nacl.bindings, "crypto_aead_aegis128l_ABYTES", None) == 32
SUITES = [make_suite(suite, fast) for suite in ([AEGIS, CHACHA] if HAS_AEGIS else [CHACHA]) for fast in (True, False)]


def name_of(suite):
    return "%s %s" % (suite.name, "fast" if suite.aead.fast else "public")


every_suite = pytest.mark.parametrize("suite", SUITES, ids=name_of)
both_suites = pytest.mark.parametrize("suite", SUITES[::2], ids=lambda suite: suite.name)
KEY = bytes(range(32))


def seal(suite, plaintext, number=0, aad=b"", key=KEY):
    view = memoryview(bytearray(plaintext + bytes(suite.aead.tag)))
    suite.aead.seal(memoryview(plaintext), view, suite.nonce(number), key[:suite.key_size], aad)
    in_place = memoryview(bytearray(plaintext + bytes(suite.aead.tag)))
    suite.aead.seal(in_place[:len(plaintext)], in_place, suite.nonce(number), key[:suite.key_size], aad)
    assert in_place == view
    return bytes(view)


def unseal(suite, sealed, number=0, aad=b"", key=KEY):
    view = memoryview(bytearray(sealed))
    suite.aead.open(view, suite.nonce(number), key[:suite.key_size], aad)
    return bytes(view[:-suite.aead.tag])


def test_both_bindings_are_under_test():
    assert [suite.aead.fast for suite in SUITES] == [True, False] * (len(SUITES) // 2)
    assert ratrod.offered_suites()[-1] is CHACHA
    assert {suite.id for suite in ratrod.offered_suites()} <= {1, 2}


@unlimited
@given(st.sampled_from(SUITES), st.binary(max_size=200), st.binary(max_size=40), st.integers(0, (1 << 63) - 1))
def test_both_bindings_give_the_bytes_of_the_independent_peer(suite, plaintext, aad, number):
    # `other`: the same suite through the other binding.
    sealed, theirs, other = seal(suite, plaintext, number, aad), peer.SUITES[suite.id], make_suite(suite, not suite.aead.fast)
    assert sealed == seal(other, plaintext, number, aad)
    assert sealed == theirs.cipher(KEY[:suite.key_size]).encrypt(theirs.nonce(number), plaintext, aad)
    assert unseal(other, sealed, number, aad) == plaintext
    assert len(sealed) == len(plaintext) + (32 if suite.id == 1 else 16)


@every_suite
def test_every_flipped_byte_of_a_sealed_text_is_refused(suite):
    sealed = seal(suite, b"some plaintext", 5, b"header")
    for _, wrong in flipped(sealed):
        pytest.raises(RemoteProtocolError, unseal, suite, wrong, 5, b"header")
    for _, aad in flipped(b"header"):
        pytest.raises(RemoteProtocolError, unseal, suite, sealed, 5, aad)
    for _, key in flipped(KEY[:suite.key_size]):
        pytest.raises(RemoteProtocolError, unseal, suite, sealed, 5, b"header", key)
    for wrong in (sealed + b"\0", *(sealed[:end] for end in range(len(sealed)))):
        pytest.raises(RemoteProtocolError, unseal, suite, wrong, 5, b"header")
    for _, nonce in flipped(suite.nonce(5)):
        pytest.raises(RemoteProtocolError, suite.aead.open, memoryview(bytearray(sealed)), nonce, KEY[:suite.key_size], b"header")


@both_suites
def test_a_counter_never_wraps_and_a_key_has_one_size(suite):
    for size in {0, 15, 16, 17, 31, 32, 33} - {suite.key_size}:
        pytest.raises(LocalProtocolError, ratrod.CipherState, suite, bytes(size))
    ours, theirs = (ratrod.CipherState(suite, KEY[:suite.key_size]) for _ in range(2))
    for end in (ours, theirs):  # nobody gets there by counting
        end._next_nonce = map(suite.nonce, itertools.count((1 << 63) - 1)).__next__
    sealed = ours.encrypt_with_ad(b"", b"the last one")
    assert theirs.decrypt_with_ad(b"", sealed) == b"the last one"
    for _ in range(2):
        pytest.raises(struct.error, ours.encrypt_with_ad, b"", b"one more")
        pytest.raises(struct.error, theirs.decrypt_with_ad, b"", sealed)


def test_where_private_names_are_missing_the_public_functions_do(monkeypatch):
    for hide in (lambda patch: patch.setitem(sys.modules, "nacl._sodium", None),
                 lambda patch: patch.setattr("nacl._sodium.lib", types.SimpleNamespace()),
                 lambda patch: patch.delattr("nacl._sodium.ffi")):
        with monkeypatch.context() as patch:
            hide(patch)
            for suite in SUITES[::2]:
                public = make_suite(suite, fast=True)
                assert not public.aead.fast
                assert seal(public, b"text") == seal(suite, b"text")
                assert unseal(public, seal(suite, b"text")) == b"text"


# ---------------------------------------------------------------------------------------------------- 5. framing of ratrod2


def record_ends(suite):
    """A writer and the reader of what it writes."""
    return [make(suite, KEY[:suite.key_size]) for make in (ratrod.RecordWriter, ratrod.RecordReader)]


STREAM = [(ratrod.COMPLETED, "2.0.0"), (ratrod.OPENED, ratrod.Opened("127.0.0.1:80", 7)), (ratrod.DATA, b"x"), (ratrod.DATA, b"hello" * 60),
          (ratrod.KEEPALIVE, None), (ratrod.END, None), (ratrod.OVER, None), (ratrod.OPEN, ratrod.Open(1, "db:5432", b"s" * 16, 1)),
          (ratrod.ACK, 1 << 40), (ratrod.ABANDON, b"s" * 16), (ratrod.SESSION, ratrod.Session(1, "a:53", 4)),
          (ratrod.SESSION_ADDRESS, ratrod.SessionAddress(1, "192.0.2.1:53")),
          (ratrod.DATAGRAMS, peer.encode_datagrams([(1, b""), (2, b"question")])), (ratrod.DATAGRAMS, b""),
          (ratrod.SESSION_OVER, ratrod.SessionOver(1, 2, "why")), (ratrod.CLOSE, None), (ratrod.ERROR, ratrod.Error(2, "\u26a0"))]


LEGACY_STREAM = [(ratrod.DATA, b"x"), (ratrod.DATA, b"hello" * 49), (ratrod.UDP_DATA, b""), (ratrod.DATA, b"hello" * 60),
                 (ratrod.UDP_DATA, b"question"), (ratrod.UDP_DATA, b"x" * 300)]


def write(writer, kind, content):
    if kind in (ratrod.DATA, ratrod.DATAGRAMS, ratrod.UDP_DATA):
        return write_data(writer, content, kind=kind)
    return writer.record(kind, *([content] if kind == ratrod.OPEN else values(content)))


def write_all(writer, records):
    return b"".join(write(writer, *record) for record in records)


# Every form of a record: what makes a writer and a reader of it, what they can say, and how much of it tells its length.
WIRES = {**{name_of(suite): (functools.partial(record_ends, suite), STREAM[1:], 4) for suite in SUITES},
         "legacy": (lambda: (ratrod.LegacyWriter(), ratrod.LegacyReader()), LEGACY_STREAM, 9),
         "legacy, sealed": (lambda: (ratrod.LegacyWriter(KEY), ratrod.LegacyReader(KEY)), LEGACY_STREAM, 21)}
every_wire = pytest.mark.parametrize("ends, stream, header", WIRES.values(), ids=WIRES)


@every_wire
@every_cut
def test_records_in_pieces(ends, stream, header, cut):
    writer, reader = ends()
    assert read_records(reader, cut(write_all(writer, stream))) == (stream, 0)


@unlimited
@given(st.sampled_from(list(WIRES.values())), st.lists(st.integers(1, 400), min_size=1, max_size=8), st.data())
def test_any_records_in_any_pieces(wire, sizes, data):
    ends, stream, _ = wire
    some = data.draw(st.lists(st.sampled_from(stream) | st.tuples(st.just(ratrod.DATA), st.binary(min_size=1, max_size=3000)), max_size=10))
    writer, reader = ends()
    sealed, chunks = write_all(writer, some), []
    for size in itertools.cycle(sizes):
        if not sealed:
            break
        chunks.append(sealed[:size])
        sealed = sealed[size:]
    assert read_records(reader, chunks) == (some, 0)


@both_suites
def test_records_are_those_of_the_independent_peer(suite):
    writer, reader = record_ends(suite)
    theirs = peer.SUITES[suite.id]
    their_writer, their_reader = (make(theirs, KEY[:suite.key_size]) for make in (peer.RecordWriter, peer.RecordReader))
    for kind, content in STREAM:
        wire = write(writer, kind, content)
        plaintext = content if kind in (ratrod.DATA, ratrod.DATAGRAMS) else (
            encode_open(*content) if kind == ratrod.OPEN else ratrod.encode_content(kind, *values(content)))
        assert wire == their_writer.seal(kind, plaintext)
        assert their_reader.open(wire)[:2] == (kind, plaintext)
        assert read_records(reader, [wire]) == ([(kind, content)], 0)


@every_wire
def test_wanted_at_every_prefix_of_a_record(ends, stream, header):
    # The record may stand anywhere in the link's buffer, and what follows it is not its own.
    writer, reader = ends()
    sealed = write_data(writer, b"hello" * 20)
    for before in (0, 7):
        view = memoryview(bytearray(bytes(before) + sealed + bytes(9)))
        for n in range(1, len(sealed)):
            assert reader.next(view, before, before + n) is None
            assert reader.wanted == (header if n < header else len(sealed))
    kind, content, end = reader.next(view, before, len(view))
    assert (kind, bytes(content), end) == (ratrod.DATA, b"hello" * 20, before + len(sealed))


@both_suites
def test_a_length_that_cannot_be_is_refused_before_more_is_read(suite):
    tag = suite.aead.tag
    for length in (*range(tag + 1), tag + 2 + ratrod.MAX_CONTENT, 1 << 24, (1 << 31) - 1, (1 << 32) - 1):
        pytest.raises(RemoteProtocolError, read_records, record_ends(suite)[1], byte_at_a_time(length.to_bytes(4, "big")))
    for length in (tag + 1, tag + 1 + ratrod.MAX_CONTENT):
        reader = record_ends(suite)[1]
        assert read_records(reader, [length.to_bytes(4, "big")]) == ([], 4)
        assert reader.wanted == 4 + length


@every_suite
@pytest.mark.parametrize("kind", [ratrod.DATA, ratrod.DATAGRAMS])
def test_the_largest_data(suite, kind):
    writer, reader = record_ends(suite)
    assert writer.max_data == 512 * 1024
    payload = os.urandom(1024) * 512
    assert read_records(reader, [write_data(writer, payload, kind=kind)]) == ([(kind, payload)], 0)
    pytest.raises(RemoteProtocolError, read_one, reader, write_data(writer, payload + b"x", kind=kind))


def sealed_record(suite, kind, content):
    """Any record that an authenticated peer could make, right or not."""
    return write_data(record_ends(suite)[0], content, kind=kind)


@both_suites
def test_other_content_is_at_most_1_kib(suite):
    for kind, head in ((ratrod.OPENED, b""), (ratrod.ERROR, b"\1"), (ratrod.SESSION_ADDRESS, bytes(4)), (ratrod.COMPLETED, b"")):
        fits = ratrod.MAX_SMALL_CONTENT - len(head) - 3
        for n in (fits, fits + 1):
            wire = sealed_record(suite, kind, head + peer.encode_str("x" * n))
            reader = record_ends(suite)[1]
            if n == fits:
                assert read_one(reader, wire)[0] == kind
            else:
                pytest.raises(RemoteProtocolError, read_one, reader, wire)


@both_suites
def test_authentic_records_that_cannot_be(suite):
    for kind, content in (
            (ratrod.DATA, b""), (ratrod.END, b"\0"), (ratrod.OPEN, b""), (ratrod.OPENED, b"\2a"), (ratrod.ERROR, b"\0\1\xff"), (0x02, b""),
            (0x15, b""), (0x17, b""), (0x3e, b""), (0xff, b"x"), (ratrod.CLOSE, b"x"), (ratrod.COMPLETED, b"")):
        with row((kind, content)):
            pytest.raises(RemoteProtocolError, read_one, record_ends(suite)[1], sealed_record(suite, kind, content))


CYCLE = """
import gc, program as ratrod
for suite in ratrod.offered_suites():
    for _ in range(10):
        try:
            suite.aead.open(memoryview(bytearray(100)), suite.nonce(0), bytes(suite.key_size))
        except ratrod.RemoteProtocolError as error:
            error.itself = error  # as somebody's mistake, or a debugger's: it keeps its traceback, and the frames in it
        gc.collect()
"""


def test_the_collector_survives_a_forged_record():
    """Found by fuzzing: a buffer that the binding still held in a traceback crashed the interpreter; a flipped byte could bring it about."""
    done = subprocess.run([PYTHON, "-c", CYCLE], cwd=os.path.dirname(RATROD[1]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")


@every_suite
def test_records_replayed_reordered_or_dropped(suite):
    writer, _ = record_ends(suite)
    wires = [write_data(writer, b"record %d" % n) for n in range(3)]
    for before, wrong in (([0], 0), ([], 1), ([0], 2), ([0, 1, 2], 1), ([], 2)):  # those that come as they should, and the one that does not
        reader = record_ends(suite)[1]
        for n in before:
            assert read_one(reader, wires[n])
        with row((before, wrong)):
            pytest.raises(RemoteProtocolError, read_one, reader, wires[wrong])


@every_wire
def test_a_record_that_is_cut_or_flipped_anywhere_is_never_a_record(ends, stream, header):
    sealed = write_data(ends()[0], b"some data")
    for end in range(len(sealed)):
        assert read_records(ends()[1], [sealed[:end]]) == ([], end)
    for _, wrong in flipped(sealed) if header != 9 else ():  # what is in the clear has no seal
        pytest.raises(RemoteProtocolError, read_one, ends()[1], wrong)


# ---------------------------------------------------------------------------------------------------- 8. states of a link

# PROTOCOL.md's table; and of a link for UDP, where Session is the client's word alone and SessionAddress the server's. Nothing else is legal.
OF_UDP = {ratrod.DATAGRAMS, ratrod.UDP_DATA, ratrod.SESSION_OVER, ratrod.ERROR}
SPECIFIED = {
    (ratrod.IDLE, ratrod.OPENER): {ratrod.CLOSE, ratrod.ERROR},
    (ratrod.IDLE, ratrod.ACCEPTOR): {ratrod.OPEN, ratrod.ACK, ratrod.ABANDON, ratrod.ERROR},
    **{(asked, ratrod.OPENER): {ratrod.OPENED, ratrod.CLOSE, ratrod.ERROR} for asked in (ratrod.UDP_ASKED, ratrod.LISTEN_ASKED)},
    (ratrod.ASKED, ratrod.OPENER): {ratrod.OPENED, ratrod.OVER, ratrod.CLOSE, ratrod.ERROR},
    (ratrod.BUSY, ratrod.OPENER): {ratrod.DATA, ratrod.END, ratrod.ACK, ratrod.ERROR, ratrod.OVER, ratrod.CLOSE},
    (ratrod.BUSY, ratrod.ACCEPTOR): {ratrod.DATA, ratrod.END, ratrod.ACK, ratrod.ERROR},
    (ratrod.UDP_OPEN, ratrod.OPENER): OF_UDP | {ratrod.SESSION_ADDRESS, ratrod.CLOSE}, (ratrod.UDP_OPEN, ratrod.ACCEPTOR): OF_UDP | {ratrod.SESSION},
    (ratrod.BYE, ratrod.ACCEPTOR): {ratrod.ACK},
}


def test_the_legal_records_are_the_specified_ones():
    assert {key: legal for key, legal in ratrod.LEGAL.items() if legal} == SPECIFIED


class NewLink(ratrod.Link):
    """A client's, as it is after the handshake's last message; nothing but records comes here."""

    def __init__(self):
        self.owner, self.state, self.role, self.is_completed = mock.Mock(), ratrod.IDLE, ratrod.OPENER, False
        self.ended_by = []

    def abort(self, error):
        self.ended_by.append(error)


def test_the_first_record_for_a_client():
    # HandshakeCompletion or an Error in its place; and once only.
    for kind, content in STREAM:
        link = NewLink()
        if kind not in (ratrod.COMPLETED, ratrod.ERROR):
            pytest.raises(RemoteProtocolError, link._on_record, kind, content)
            continue
        link._on_record(kind, content)
        assert [link.is_completed, len(link.ended_by)] == ([True, 0] if kind == ratrod.COMPLETED else [False, 1])
        if link.is_completed:
            pytest.raises(RemoteProtocolError, link._on_record, ratrod.COMPLETED, "2.0.0")
