"""An independent `ratrod2` peer, client and server: blocking, on plain sockets. It is written from PROTOCOL.md alone, on noiseprotocol, cryptography
and PyNaCl, and never imports ratrod: a mistake that both of ratrod's own ends make alike shows here. Every step is a call of its own, and a test can
replace what a step sends by something wrong.
"""

import collections
import contextlib
import hashlib
import hmac
import os
import queue
import re
import socket
import struct
import threading
from typing import NamedTuple

import nacl.bindings
import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from noise.backends.default.keypairs import KeyPair25519
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseInvalidMessage, NoiseValueError

OPENING = b"ratrod2\n"
NOISE_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
HANDSHAKE_LIMIT = 1024

HANDSHAKE_COMPLETION, ERROR = 0x00, 0x01
OPEN, OPENED, DATA, END, OVER, ACK, ABANDON = range(0x10, 0x17)
DATAGRAMS, SESSION, SESSION_OVER, SESSION_ADDRESS = range(0x20, 0x24)
KEEPALIVE, CLOSE = 0x30, 0x3f

TCP, UDP, LISTEN = 1, 2, 3
INVALID_HOST, INVALID_KEY, REMOTE_FAILED, UNKNOWN = range(4)

BULK_LIMIT = 512 * 1024
SMALL_LIMIT = 1024
BEFORE_OPENED = 64 * 1024
CHUNK = 64 * 1024
# An Ack is due when so many bytes have been taken since the last one.
ACK_DUE = 32 * 1024
# What a Server shows, so that all links of a test lead to one run: 6 random bytes, 1 worker, number 0.
INSTANCE = os.urandom(6) + b"\x01\x00"
# The longest that a blocking call of this peer waits. It bounds a hang and measures nothing.
PATIENCE = 30.0


class ProtocolError(Exception):
    """The other end did something that PROTOCOL.md forbids."""


class PeerError(Exception):
    """The other end sent Error (or this end, where it refuses the other)."""

    def __init__(self, code, text):
        super().__init__("%d: %s" % (code, text))
        self.code, self.text = code, text


class LinkEnded(ConnectionError):
    """FIN where a record (or a handshake message) would begin."""


class LinkBroken(LinkEnded):
    """FIN inside a record, or a reset."""


class LinkClosed(LinkEnded):
    """The acceptor sent Close."""


# ---------------------------------------------------------------------------------------------------- encoding
def varint(n):
    """bincode 2's variable-length unsigned integer, big-endian."""
    if n <= 250:
        return bytes([n])
    for mark, size in ((251, 2), (252, 4), (253, 8)):
        if n < 1 << (8 * size):
            return bytes([mark]) + n.to_bytes(size, "big")
    raise ValueError("too large for a varint: %d" % n)


def encode_str(text):
    """`text` as str; bytes are taken as they are, so that a test can send what is not UTF-8."""
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    return varint(len(data)) + data


def decode(content, *fields):
    """The values of a whole content. A field is "str", "bytes" (which come as a str does), "varint", the size of an unsigned integer, or for so many
    bytes a negative number."""
    values, at = [], 0
    def raw(n):
        nonlocal at
        if n > len(content) - at:
            raise ProtocolError("a content of %d bytes ends inside a field" % len(content))
        at += n
        return content[at - n:at]
    def read_varint():
        first = raw(1)[0]
        if first > 253:
            raise ProtocolError("a varint that begins with %d" % first)
        return first if first <= 250 else int.from_bytes(raw(2 << (first - 251)), "big")
    for field in fields:
        if field in ("str", "bytes"):
            values.append(raw(read_varint()))
        else:
            values.append(read_varint() if field == "varint" else raw(-field) if field < 0 else int.from_bytes(raw(field), "big"))
        if field == "str":
            try:
                values[-1] = values[-1].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ProtocolError("a str that is not UTF-8") from error
    if at < len(content):
        raise ProtocolError("%d bytes left over in a content" % (len(content) - at))
    return tuple(values)


def decode_str(content):
    return decode(content, "str")[0]


def encode_error(code, text):
    return varint(code) + encode_str(text)


def decode_error(content):
    code, text = decode(content, "varint", "str")
    if code > UNKNOWN:
        raise ProtocolError("Error of code %d" % code)
    return code, text


class Open(NamedTuple):
    """What an Open says. `instance` is there for kind 3 alone, the fields from `stream` on for kind 1 alone."""

    kind: int
    target: str
    instance: bytes = b""
    stream: bytes = b""
    attempt: int = 0
    at: int = 0
    taken: int = 0


def encode_open(kind, target="", instance=b"", stream=None, attempt=1, at=0, taken=0):
    """By default the first Open of a new stream, whose number is drawn here."""
    content = bytes([kind]) + encode_str(target) + instance
    if kind != TCP:
        return content
    return content + (os.urandom(16) if stream is None else stream) + struct.pack(">IQQ", attempt, at, taken)


def decode_open(content):
    kind, *_ = content or b"\0"
    if kind == LISTEN:
        return Open(*decode(content, 1, "str", -8))
    if kind == UDP:
        return Open(*decode(content, 1, "str"))
    if kind != TCP:
        raise ProtocolError("Open of kind %d" % kind)
    kind, target, *rest = decode(content, 1, "str", -16, 4, 8, 8)
    return Open(kind, target, b"", *rest)


def encode_opened(bound="", taken=0):
    """Without `taken` (None) for the kinds 2 and 3."""
    return encode_str(bound) + (b"" if taken is None else encode_ack(taken))


def decode_opened(content, kind=TCP):
    """(bound address, taken); taken is None for the kinds 2 and 3."""
    return decode(content, "str", 8) if kind == TCP else (decode_str(content), None)


def encode_ack(taken):
    return struct.pack(">Q", taken)


def decode_ack(content):
    return decode(content, 8)[0]


def decode_abandon(content):
    return decode(content, -16)[0]


def encode_session(number, target, outer=0):
    return struct.pack(">I", number) + encode_str(target) + struct.pack(">I", outer)


def decode_session(content):
    """(number, target, outer)"""
    return decode(content, 4, "str", 4)


def encode_session_address(number, address):
    return struct.pack(">I", number) + encode_str(address)


def decode_session_address(content):
    return decode(content, 4, "str")


def encode_session_over(number, code=UNKNOWN, text=""):
    return struct.pack(">I", number) + encode_error(code, text)


def decode_session_over(content):
    return (*decode(content[:4], 4), *decode_error(content[4:]))


def encode_datagrams(datagrams):
    """`datagrams`: pairs of a session's number and the bytes."""
    return b"".join(struct.pack(">IH", number, len(data)) + data for number, data in datagrams)


def decode_datagrams(content):
    datagrams = []
    while content:
        number, size = decode(content[:6], 4, 2)
        datagrams.append((number, content[6:6 + size]))
        if len(datagrams[-1][1]) < size:
            raise ProtocolError("a datagram of %d bytes ends early" % size)
        content = content[6 + size:]
    return datagrams


# ---------------------------------------------------------------------------------------------------- identity
def convert(identity_public_key):
    """The X25519 form of an Ed25519 public key."""
    if len(identity_public_key) != 32:
        raise ProtocolError("an identity of %d bytes" % len(identity_public_key))
    try:
        return nacl.bindings.crypto_sign_ed25519_pk_to_curve25519(identity_public_key)
    except (RuntimeError, nacl.exceptions.CryptoError) as error:
        raise ProtocolError("an identity that is no usable Ed25519 key") from error


class Identity(NamedTuple):
    """An Ed25519 identity, and its X25519 form as Noise's static key."""

    seed: bytes
    public: bytes
    static_private: bytes
    static_public: bytes

    @classmethod
    def from_seed(cls, seed):
        public, secret = nacl.bindings.crypto_sign_seed_keypair(seed)
        return cls(seed, public, nacl.bindings.crypto_sign_ed25519_sk_to_curve25519(secret), convert(public))


def negative(identity_public_key):
    """-P for P: another Ed25519 key of the same X25519 form (the sign of x is the top bit)."""
    return identity_public_key[:31] + bytes([identity_public_key[31] ^ 0x80])


def odd_keypair(public_bytes, private=None):
    """A key pair whose public bytes are not what the private key gives; without one they are meant to be a point of small order."""
    honest = KeyPair25519.from_private_bytes(private) if private else KeyPair25519()
    return KeyPair25519(honest.private, honest.public, public_bytes)


# u-coordinates whose order divides 8, as bytes: two of them in a second, not reduced, form.
SMALL_ORDER_POINTS = tuple(bytes.fromhex(point) for point in (
    "00" * 32, "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f", "ed" + "ff" * 30 + "7f", "ee" + "ff" * 30 + "7f",
))
# Ed25519's neutral element. The formula of the conversion gives u = 0 for it; libsodium refuses it.
SMALL_ORDER_IDENTITY = b"\x01" + bytes(31)


# ---------------------------------------------------------------------------------------------------- handshake
def _dh_of_an_attacker(private, public):
    """DH that goes on with a zero shared secret, so that only the other end's own check can stop it."""
    try:
        return private.exchange(public)
    except (AttributeError, ValueError):  # no private key, or a zero secret
        return bytes(32)


class Handshake:
    """One side of the Noise handshake: bytes in, bytes out. A key is 32 private bytes or a noiseprotocol key pair."""

    def __init__(self, static, initiator, ephemeral=None, attacker=False):
        self.initiator, self._connection = initiator, NoiseConnection.from_name(NOISE_NAME)
        self._connection.set_prologue(OPENING)
        (self._connection.set_as_initiator if initiator else self._connection.set_as_responder)()
        # Any static key satisfies start_handshake(). The real keys are put in after it: noiseprotocol warns of a given
        # ephemeral key, and would derive the public keys itself.
        self._connection.set_keypair_from_private_bytes(Keypair.STATIC, b"\x01" * 32)
        self._connection.start_handshake()
        # noiseprotocol drops its reference when the handshake is done; the remote static key is read from this one.
        self._state = self._connection.noise_protocol.handshake_state
        for name, key in (("s", static), ("e", ephemeral)):
            if key is not None:
                setattr(self._state, name, key if isinstance(key, KeyPair25519) else KeyPair25519.from_private_bytes(key))
        if attacker:
            self._connection.noise_protocol.dh_fn.dh = _dh_of_an_attacker

    def write_message(self, payload):
        # Writing computes shared secrets too; `cryptography` raises ValueError for a zero one.
        try:
            return bytes(self._connection.write_message(payload))
        except ValueError as error:
            raise ProtocolError("the other end's key gives no shared secret") from error

    def read_message(self, message):
        try:
            return bytes(self._connection.read_message(message))
        except (InvalidTag, ValueError, NoiseInvalidMessage, NoiseValueError) as error:
            raise ProtocolError("a handshake message that does not verify: %r" % error) from error

    @property
    def remote_static(self):
        return self._state.rs.public_bytes

    def record_keys(self, suite):
        """The keys of the records: client to server (from k1 of Noise's Split()), server to client (from k2)."""
        protocol = self._connection.noise_protocol
        ours, theirs = protocol.cipher_state_encrypt.k, protocol.cipher_state_decrypt.k
        label = b"ratrod2 " + bytes([suite.id]) + self._connection.get_handshake_hash() + b"\x01"
        return tuple(hmac.new(k, label, hashlib.sha256).digest()[:suite.key_length] for k in ((ours, theirs) if self.initiator else (theirs, ours)))


# ---------------------------------------------------------------------------------------------------- records
class _Aegis128L:
    """libsodium's AEGIS-128L with the methods of `cryptography`'s ciphers."""

    def __init__(self, key):
        self.encrypt = lambda nonce, data, aad: nacl.bindings.crypto_aead_aegis128l_encrypt(data, aad, nonce, key)
        self.decrypt = lambda nonce, data, aad: nacl.bindings.crypto_aead_aegis128l_decrypt(data, aad, nonce, key)


class Suite(NamedTuple):
    id: int
    name: str
    key_length: int
    tag_length: int
    zeros_before: int
    zeros_after: int
    cipher: type

    def nonce(self, number):
        return bytes(self.zeros_before) + struct.pack("<Q", number) + bytes(self.zeros_after)


AEGIS = Suite(1, "AEGIS-128L", 16, 32, 0, 8, _Aegis128L)
CHACHA = Suite(2, "ChaCha20-Poly1305-IETF", 32, 16, 4, 0, ChaCha20Poly1305)
HAS_AEGIS = getattr(nacl.bindings, "crypto_aead_aegis128l_ABYTES", None) == AEGIS.tag_length
# What this peer offers. It is no tunnel, so software AEGIS is fast enough for it.
SUITES = {suite.id: suite for suite in ((AEGIS, CHACHA) if HAS_AEGIS else (CHACHA,))}


class Record(NamedTuple):
    type: int
    content: bytes


class RecordWriter:
    """Seals the records of one direction. `number` is the next record's."""

    def __init__(self, suite, key):
        self.suite, self.number, self._cipher = suite, 0, suite.cipher(key)

    def seal(self, record_type, content=b"", number=None, length=None):
        """A record for the wire. A `number` changes the order, and counts nothing; `length` replaces the true one, in the header and the AAD."""
        plaintext = bytes([record_type]) + content
        header = struct.pack(">I", len(plaintext) + self.suite.tag_length if length is None else length)
        if number is None:
            number = self.number
            self.number += 1
        return header + self._cipher.encrypt(self.suite.nonce(number), plaintext, header)


class RecordReader:
    """Opens the records of one direction, in order."""

    def __init__(self, suite, key):
        self.suite, self.number, self._cipher = suite, 0, suite.cipher(key)

    def open(self, wire):
        """The record that `wire` (its length, and the sealed bytes) holds."""
        try:
            plaintext = self._cipher.decrypt(self.suite.nonce(self.number), wire[4:], wire[:4])
        except (InvalidTag, ValueError, nacl.exceptions.CryptoError) as error:
            raise ProtocolError("record %d does not verify" % self.number) from error
        self.number += 1
        record = Record(plaintext[0], plaintext[1:])
        if record.type not in (DATA, DATAGRAMS) and len(record.content) > SMALL_LIMIT:
            raise ProtocolError("a record of type 0x%02x with %d bytes" % (record.type, len(record.content)))
        return record

    def read(self, sock):
        header = receive_exactly(sock, 4)
        length = int.from_bytes(header, "big")
        if not 1 + self.suite.tag_length <= length <= 1 + BULK_LIMIT + self.suite.tag_length:
            raise ProtocolError("a record of %d bytes" % length)
        return self.open(header + receive_exactly(sock, length, inside=True))


def receive_exactly(sock, n, inside=False):
    """n bytes. A FIN before the first of them is LinkEnded, later (or `inside` something that has begun) LinkBroken."""
    data = bytearray()
    while len(data) < n:
        try:
            chunk = sock.recv(min(n - len(data), 1 << 20))
        except ConnectionError as error:
            raise LinkBroken(repr(error)) from error
        if not chunk:
            if data or inside:
                raise LinkBroken("FIN after %d of %d bytes" % (len(data), n))
            raise LinkEnded("FIN")
        data += chunk
    return bytes(data)


def receive_to_end(sock):
    """Everything up to the FIN (or a reset, which counts as one here)."""
    data = b""
    with contextlib.suppress(ConnectionError):
        for chunk in iter(lambda: sock.recv(1 << 20), b""):
            data += chunk
    return data


def reset(sock):
    """Closes with a reset. A Unix socket (a socketpair) knows none and just closes."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# ---------------------------------------------------------------------------------------------------- positions
class Outgoing:
    """The direction of a stream that this end sends. A position counts bytes of Data, and one more for End."""

    def __init__(self):
        self.position = self.sent = self.acknowledged = 0  # of all that is to be sent, that any link has carried, and that was taken
        self.next = 0  # where the current link goes on
        self.ended, self._kept = False, bytearray()

    @property
    def is_done(self):
        """End has been sent, and the current link need not carry it again."""
        return self.ended and self.next >= self.position

    def keep(self, data):
        self._kept += data
        self.position += len(data)

    def count(self, record_type, content):
        """Counts a record that is about to leave. What an earlier link has carried is not new."""
        self.next += len(content) if record_type == DATA else 1
        new = max(self.next - self.position, 0)
        if record_type == DATA:
            self.keep(content[len(content) - new:])
        else:
            self.position += new
            self.ended = True
        self.sent = max(self.sent, self.next)

    def missing(self):
        """The Data that the current link still has to carry."""
        return bytes(self._kept[self.next:])

    def acknowledge(self, taken):
        if not self.acknowledged <= taken <= self.sent:
            raise ProtocolError("%d taken, of %d sent and %d acknowledged" % (taken, self.sent, self.acknowledged))
        self.acknowledged = taken


class Incoming:
    """The direction of a stream that this end receives."""

    def __init__(self):
        self.taken = self.next = 0  # the latter is the position of what the current link brings next
        self.ended = False

    @property
    def is_done(self):
        """End has been taken, and the current link does not bring it again."""
        return self.ended and self.next >= self.taken

    def take(self, record_type, content):
        """The part of a Data that had not been taken before. An End gives nothing."""
        self.next += len(content) if record_type == DATA else 1
        new = self.next - self.taken
        if record_type == END and new != (0 if self.ended else 1):
            raise ProtocolError("End at %d, where %d were taken" % (self.next, self.taken))
        if record_type == DATA and self.ended and new >= 0:
            raise ProtocolError("Data behind the End that an earlier link brought")
        self.ended = self.ended or record_type == END
        self.taken = max(self.taken, self.next)
        return content[-new:] if record_type == DATA and new > 0 else b""


# ---------------------------------------------------------------------------------------------------- one end of a link
# The table of PROTOCOL.md, as (state, record) -> the next state. Where both ends have the same states: Both (Data may
# pass either way), Sent (this end has sent End), Got (it has got End), Done (both).
_BUSY = ("Both", "Sent", "Got", "Done")
_RECEIVED = {
    ("Both", DATA): "Both", ("Sent", DATA): "Sent",
    ("Both", END): "Got", ("Sent", END): "Done",
    **{(state, ACK): state for state in _BUSY},
    **{("Udp", record): "Udp" for record in (DATAGRAMS, SESSION_OVER)},
}
_RECEIVED_BY_OPENER = {
    **_RECEIVED, ("Asked", OPENED): "Both", ("AskedEnd", OPENED): "Sent", ("UdpAsked", OPENED): "Udp",
    **{(state, OVER): "Idle" for state in ("Done", "Asked", "AskedEnd")}, ("Udp", SESSION_ADDRESS): "Udp",
}
_RECEIVED_BY_ACCEPTOR = {**_RECEIVED, ("Idle", OPEN): "Connecting", ("Idle", ACK): "Idle", ("Idle", ABANDON): "Idle", ("Udp", SESSION): "Udp"}
_CLOSE_ALLOWED = ("Idle", "Asked", "AskedEnd", "UdpAsked", "Done")
_SENT = {
    ("Asked", DATA): "Asked", ("Both", DATA): "Both", ("Got", DATA): "Got",
    ("Asked", END): "AskedEnd", ("Both", END): "Sent", ("Got", END): "Done",
    ("Connecting", OPENED): "Both", ("Idle", OPEN): "Asked", ("Done", OVER): "Idle",
    **{(state, ACK): state for state in (*_BUSY, "Idle")}, ("Idle", ABANDON): "Idle",
    **{(state, record): state for state in ("UdpAsked", "Udp") for record in (DATAGRAMS, SESSION, SESSION_OVER)},
    ("Udp", SESSION_ADDRESS): "Udp",
}
# What a record makes of the state where this end's End, or the other's, has passed on an earlier link.
_END_SENT = {"Asked": "AskedEnd", "Both": "Sent"}
_END_GOT = {"Both": "Got", "Sent": "Done"}


class Peer:
    """One end of a link. `opener` begins streams: the client, but for a Listen link. `stream` is what the link carries, or carried last; `streams`
    (number -> Stream, or None once given up) may be shared by the links of an acceptor; `abandoned` are numbers that this link was told to give up.

    Misbehaviour: `static`, `ephemeral` and `claimed` replace what the seed gives; `attacker` goes on with zero shared secrets; `suites` is the offer.
    send() and send_record() check nothing and change no state.
    """

    initiator = False

    def __init__(self, sock, seed, suites=None, ephemeral=None, static=None, claimed=None, attacker=False, streams=None):
        self.sock, self.identity = sock, Identity.from_seed(seed)
        self.claimed = self.identity.public if claimed is None else claimed
        self.suites = tuple(SUITES if suites is None else suites)
        self.opener = self.initiator
        static = self.identity.static_private if static is None else static
        self.handshaker = Handshake(static, self.initiator, ephemeral, attacker=attacker)
        self.remote_identity = self.suite = self.writer = self.reader = self.stream = None
        self.state = "Idle"
        self.streams = {} if streams is None else streams
        self.abandoned = []
        # Two locks: a reader must be able to note what it read while a sender is blocked in sendall().
        self._sending, self._changing = threading.Lock(), threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    # ------------------------------------------------------------------ handshake messages
    def send(self, data):
        """Raw bytes."""
        self.sock.sendall(data)

    def send_message(self, message, length=None):
        """A Noise message after its two length bytes; `length` replaces the true one."""
        self.send(struct.pack(">H", len(message) if length is None else length) + message)

    def read_message(self):
        length = int.from_bytes(receive_exactly(self.sock, 2), "big")
        if not 0 < length <= HANDSHAKE_LIMIT:
            raise ProtocolError("a handshake message of %d bytes" % length)
        return receive_exactly(self.sock, length, inside=True)

    def _check_identity(self, identity_public_key):
        if convert(identity_public_key) != self.handshaker.remote_static:
            raise ProtocolError("the static key is not the X25519 form of the identity")
        self.remote_identity = identity_public_key

    def _start_records(self):
        """Derives the keys; called once message 3 has been written or read."""
        to_server, to_client = self.handshaker.record_keys(self.suite)
        self.writer = RecordWriter(self.suite, to_server if self.initiator else to_client)
        self.reader = RecordReader(self.suite, to_client if self.initiator else to_server)

    # ------------------------------------------------------------------ records, unchecked
    def send_record(self, record_type, content=b"", number=None, length=None):
        """Seals and sends, whatever the state; returns the bytes sent. Data and End count in the stream's position."""
        if self.stream and record_type in (DATA, END):
            self.stream.outgoing.count(record_type, content)
        with self._sending:
            wire = self.writer.seal(record_type, content, number, length)
            self.sock.sendall(wire)
            return wire

    def read_any_record(self):
        """The next record, whatever the state; Keepalive too."""
        return self.reader.read(self.sock)

    def send_open(self, kind, target="", instance=b"", **fields):
        return self.send_record(OPEN, encode_open(kind, target, instance, **fields))

    def read_to_end(self):
        """All records up to the end of the link, however it ends. What does not verify is an error even here."""
        records = []
        with contextlib.suppress(LinkEnded):
            while True:
                records.append(self.read_any_record())
        return records

    def finish(self):
        """FIN, then discards until the peer's FIN, then closes."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        receive_to_end(self.sock)
        self.sock.close()

    def fail(self, code, text):
        """Error as the last record, then as finish()."""
        with contextlib.suppress(OSError):
            self.send_record(ERROR, encode_error(code, text))
        self.finish()

    # ------------------------------------------------------------------ records, by the state table
    def write(self, record_type, content=b""):
        """Sends a record that the state allows."""
        with self._changing:
            openers_alone = self.state == "Idle" and record_type in (OPEN, ACK, ABANDON)
            if (self.state, record_type) not in _SENT or openers_alone and not self.opener:
                raise RuntimeError("a mistake of the test: record 0x%02x in state %s" % (record_type, self.state))
            self.state = _SENT[self.state, record_type]
            if record_type in (OPEN, OPENED) and self.stream:
                self.state = self._with_earlier_ends(self.state)
            if record_type == OPEN and content[0] == UDP:
                self.state = "UdpAsked"
        self.send_record(record_type, content)

    def _with_earlier_ends(self, state):
        """`state` is the one of a new stream on this link."""
        if self.stream.outgoing.is_done:
            state = _END_SENT.get(state, state)
        return _END_GOT.get(state, state) if self.stream.incoming.is_done else state

    def read_record(self, acks=False):
        """The next record but Keepalive (and Ack, which is noted, unless `acks`); PeerError for Error, LinkClosed for Close."""
        while True:
            record = self.read_any_record()
            if record.type == KEEPALIVE:
                if record.content:
                    raise ProtocolError("Keepalive with content")
                continue
            self._received(record)
            if record.type != ACK or acks:
                return record

    def _received(self, record):
        if record.type == ERROR:
            raise PeerError(*decode_error(record.content))
        if record.type in (END, OVER, CLOSE) and record.content or record.type == DATA and not record.content:
            raise ProtocolError("record 0x%02x with %d bytes" % (record.type, len(record.content)))
        with self._changing:
            if record.type == CLOSE and self.opener and self.state in _CLOSE_ALLOWED:
                raise LinkClosed(self.state)
            allowed = _RECEIVED_BY_OPENER if self.opener else _RECEIVED_BY_ACCEPTOR
            # On an idle link Ack belongs to the stream before; a fresh link has none.
            if (self.state, record.type) not in allowed or record.type == ACK and not self.stream:
                raise ProtocolError("record 0x%02x in state %s" % (record.type, self.state))
            self.state = allowed[self.state, record.type]
            if record.type == OPENED and self.stream and self.stream.incoming.is_done:
                self.state = _END_GOT.get(self.state, self.state)
            if record.type == OPEN and record.content[:1] == bytes([UDP]):
                self.state = "Udp"
        if record.type == ACK:
            self.stream.outgoing.acknowledge(decode_ack(record.content))
        # Over acknowledges all of the opener's direction, the next Open all of the acceptor's.
        elif record.type in (OVER, OPEN) and self.stream:
            self.stream.outgoing.acknowledge(self.stream.outgoing.sent)

    # ------------------------------------------------------------------ streams
    def open(self, target, kind=TCP, instance=b""):
        """Starts a stream, without waiting for Opened."""
        return Stream(Open(kind, target, instance, os.urandom(16))).attach(self)

    def connect_to(self, target):
        """A stream to there, once Opened has come."""
        stream = self.open(target)
        stream.wait_opened()
        return stream

    def accept(self):
        """The next stream that the other end opens, or attaches; None after its FIN. One that cannot be is refused: PeerError."""
        try:
            record = self.read_record()
            while record.type != OPEN:
                self.abandoned.append(decode_abandon(record.content))
                self.streams[self.abandoned[-1]] = None
                record = self.read_record()
        except LinkBroken:
            raise
        except LinkEnded:
            return None
        opening = decode_open(record.content)
        known = self.streams.get(opening.stream)
        if known:
            return known.attached(self, opening)
        if opening.stream in self.streams or opening.at or opening.taken:
            self.fail(UNKNOWN, "no stream of that number")
            raise PeerError(UNKNOWN, "refused a stream that is not known")
        stream = Stream(opening)
        if opening.kind == TCP:
            self.streams[opening.stream] = stream
        return stream.move(self, 0, 0)

    def listen(self, address, instance):
        """A client's: makes this a Listen link, on which the server is the opener; returns the bound address."""
        bound = self.open(address, LISTEN, instance).wait_opened()
        self.opener, self.state, self.stream = False, "Idle", None
        return bound

    def grant_listen(self, bound):
        """A server's: answers Open kind 3 with the bound address, and is the opener from then on."""
        self.write(OPENED, encode_opened(bound, None))
        self.opener, self.state, self.stream = True, "Idle", None

    def exchange(self, target, data):
        """A whole stream that sends `data`, ends, and returns what came back."""
        stream = self.open(target)
        first = stream.send(data[:BEFORE_OPENED])
        stream.wait_opened()
        sender = threading.Thread(target=lambda: (stream.send(data[first:]), stream.end()), daemon=True)
        sender.start()
        answer = stream.receive_all()
        sender.join(PATIENCE)
        stream.over()
        return answer

    # ------------------------------------------------------------------ UDP
    def open_udp(self):
        """Makes this the UDP link; sessions and datagrams may follow at once."""
        self.open("", UDP)
        return self

    def session(self, number, target, outer=0):
        self.write(SESSION, encode_session(number, target, outer))

    def datagrams(self, *datagrams):
        """Sends (session number, bytes) pairs, together in one record."""
        self.write(DATAGRAMS, encode_datagrams(datagrams))

    def session_over(self, number, code=UNKNOWN, text=""):
        self.write(SESSION_OVER, encode_session_over(number, code, text))

    def read_udp(self):
        """What came next on a UDP link but Opened: (DATAGRAMS, pairs), or the type and the fields of what is about a session."""
        while True:
            record = self.read_record()
            if record.type != OPENED:
                return record.type, _UDP_CONTENTS[record.type](record.content)
            decode_opened(record.content, UDP)


_UDP_CONTENTS = {DATAGRAMS: decode_datagrams, SESSION: decode_session, SESSION_ADDRESS: decode_session_address, SESSION_OVER: decode_session_over}


class Client(Peer):
    """The client of a link; handshake() is made of steps. `server` (32 bytes), where given, is the only identity that it takes."""

    initiator = True

    def __init__(self, sock, seed, server=None, **options):
        super().__init__(sock, seed, **options)
        self.server = server

    @classmethod
    def connect(cls, port, seed, host="127.0.0.1", **options):
        sock = socket.create_connection((host, port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, seed, **options)

    def handshake(self):
        self.begin_handshake()
        self.read_completion()
        return self

    def begin_handshake(self):
        """Everything that does not wait for HandshakeCompletion: records may be sent after it."""
        self.send_client_preamble()
        self.authenticate()
        return self

    def send_client_preamble(self):
        """What the server hears first: the opening bytes and message 1."""
        message = self.client_preamble()
        self.send(OPENING + struct.pack(">H", len(message)) + message)

    def client_preamble(self):
        """Message 1, without its length."""
        return self.handshaker.write_message(bytes([len(self.suites), *self.suites]))

    def read_server_preamble(self):
        """Reads message 2 and checks it as a client must, but for what `server` leaves open."""
        payload = self.handshaker.read_message(self.read_message())
        if len(payload) < 41:
            raise ProtocolError("a ServerPreamble of %d bytes" % len(payload))
        self._check_identity(payload[:32])
        if payload[32] not in self.suites:
            raise ProtocolError("suite %d was not offered" % payload[32])
        if self.server not in (None, payload[:32]):
            raise ProtocolError("not the expected server")
        self.suite = SUITES[payload[32]]

    def authenticate(self):
        """Reads message 2 and answers it."""
        self.read_server_preamble()
        self.send_message(self.client_authentication())

    def client_authentication(self):
        """Message 3, without its length. The record keys are there after it."""
        message = self.handshaker.write_message(self.claimed)
        self._start_records()
        return message

    def read_completion(self):
        """An Error in its place is a PeerError."""
        record = self.read_any_record()
        if record.type == ERROR:
            raise PeerError(*decode_error(record.content))
        if record.type != HANDSHAKE_COMPLETION:
            raise ProtocolError("record 0x%02x in place of HandshakeCompletion" % record.type)
        decode_str(record.content)


class Server(Peer):
    """The server of a link; handshake() is made of steps. `authorized`: the clients' identities, or None for anybody."""

    def __init__(self, sock, seed, authorized=None, **options):
        super().__init__(sock, seed, **options)
        self.authorized = authorized

    def handshake(self):
        """Raises PeerError for a client that it refused (and told so)."""
        self.begin_handshake()
        if self.remote_identity == self.identity.public or self.authorized is not None and self.remote_identity not in self.authorized:
            self.fail(INVALID_KEY, "not authorized: %s" % self.remote_identity.hex())
            raise PeerError(INVALID_KEY, "refused a client")
        self.send_completion()
        return self

    def begin_handshake(self):
        """Up to message 3."""
        self.read_opening()
        self.read_client_preamble()
        self.send_message(self.server_preamble())
        self.read_client_authentication()
        return self

    def read_opening(self):
        opening = receive_exactly(self.sock, len(OPENING))
        if opening != OPENING:
            raise ProtocolError("opening bytes %r" % opening)

    def read_client_preamble(self):
        """Reads message 1 and chooses the suite."""
        payload = self.handshaker.read_message(self.read_message())
        offered = payload[1:1 + payload[0]] if payload else b""
        if not payload or len(offered) != payload[0] or CHACHA.id not in offered:
            raise ProtocolError("an offer of suites %r" % payload)
        self.suite = SUITES[next(suite for suite in offered if suite in self.suites)]

    def server_preamble(self):
        """Message 2, without its length."""
        return self.handshaker.write_message(self.claimed + bytes([self.suite.id]) + INSTANCE)

    def read_client_authentication(self):
        """Reads message 3. The record keys are there after it."""
        payload = self.handshaker.read_message(self.read_message())
        if len(payload) < 32:
            raise ProtocolError("a ClientAuthentication of %d bytes" % len(payload))
        self._check_identity(payload[:32])
        self._start_records()

    def send_completion(self):
        self.send_record(HANDSHAKE_COMPLETION, encode_str("peer"))

    def serve_streams(self, handler):
        """Each stream to handler(stream), until the client's FIN. What a handler left of a TCP stream is passed over."""
        for stream in iter(self.accept, None):
            handler(stream)
            if stream.kind != TCP:
                return
            stream.finish()


# ---------------------------------------------------------------------------------------------------- streams
class Stream:
    """One stream, for its opener or its acceptor, which `link` carries now. Only chunks(), over() and what stands on them send due Acks."""

    def __init__(self, opening):
        self.kind, self.target, self.instance = opening.kind, opening.target, opening.instance
        self.number, self.attempt = opening.stream, opening.attempt
        self.outgoing, self.incoming = Outgoing(), Incoming()
        self.link = self.bound = self._acker = None
        self.is_over = False
        self.said = 0  # the last `taken` that this end has told
        self._pending = collections.deque()

    @property
    def taken(self):
        return self.incoming.taken

    @property
    def acknowledged(self):
        return self.outgoing.acknowledged

    def move(self, link, at, theirs):
        """From now on `link` carries it: this end's Data begins at the position `at`, the other end's at `theirs`."""
        self.link = link
        self.outgoing.next, self.incoming.next, self.bound = at, theirs, None
        self._pending.clear()
        link.stream = self
        return self

    # An opener's.
    def attach(self, link, **wrong):
        """Sends Open on `link`, with what is `wrong` in place of what it should say. After Opened comes resend(), which begins at `at`."""
        self.attempt += 1
        fields = {"target": self.target, "attempt": self.attempt, "at": self.acknowledged, "taken": self.taken, **wrong}
        self.move(link, fields["at"], fields["taken"])
        self.attempt, self.said = fields["attempt"], fields["taken"]
        link.write(OPEN, encode_open(self.kind, instance=self.instance, **{"stream": self.number, **fields}))
        return self

    def wait_opened(self):
        """Reads up to Opened; returns the bound address. None where the answer is Over: the stream had been over."""
        while self.bound is None and not self.is_over:
            self._take_answer(self._read())
        return self.bound

    # An acceptor's.
    def attached(self, link, opening):
        """Takes an Open of this stream that came on `link`, which carries it from now on. opened(), resend() follow."""
        if opening.target != self.target or opening.attempt <= self.attempt or opening.at > self.taken:
            raise ProtocolError("%r for a stream of attempt %d, target %s, with %d taken" % (
                opening, self.attempt, self.target, self.taken))
        self.outgoing.acknowledge(opening.taken)
        if self.link is not link:
            with contextlib.suppress(OSError):
                self.link.sock.shutdown(socket.SHUT_RDWR)
        self.attempt = opening.attempt
        return self.move(link, opening.taken, opening.at)

    def opened(self, address="", taken=None):
        """`taken` replaces what this end has taken."""
        self.said = self.taken if taken is None else taken
        self.link.write(OPENED, encode_opened(address, self.said if self.kind == TCP else None))
        return self

    def fail(self, code, text):
        """Also in place of Opened: a refusal."""
        self.link.fail(code, text)

    # Both.
    def send(self, data):
        """Sends what is missing on this link, then `data`; returns its length. Where the link fails, all is kept."""
        self.outgoing.keep(data)
        self._send(self.outgoing.missing())
        return len(data)

    def end(self):
        """Sends what is missing on this link, then End."""
        self._send(self.outgoing.missing())
        self.link.write(END)

    def resend(self):
        """Sends what an earlier link has carried and this one has not, End too."""
        self._send(self.outgoing.missing())
        if self.outgoing.ended and not self.outgoing.is_done:
            self.link.write(END)

    def _send(self, data):
        if self.link.state == "Asked" and len(data) > BEFORE_OPENED:
            raise RuntimeError("a mistake of the test: more than 64 KiB before Opened")
        for start in range(0, len(data), CHUNK):
            self.link.write(DATA, data[start:start + CHUNK])

    def receive(self):
        """The next Data, without what had been taken before; b"" for End."""
        while True:
            record = self._read()
            if record.type in (DATA, END):
                data = self.incoming.take(*record)
                if data or record.type == END:
                    return data
            elif self.bound is None:
                self._take_answer(record)
            if record.type == OVER:
                return b""

    def ack(self, taken=None):
        """Ack of what this end has taken, or of something else."""
        self.said = self.taken if taken is None else taken
        self.link.write(ACK, encode_ack(self.said))

    def wait_acknowledged(self, position=None):
        """Reads until the other end has acknowledged `position`, or all. What else comes waits for receive()."""
        while self.acknowledged < (self.outgoing.position if position is None else position):
            record = self.link.read_record(acks=True)
            if record.type == OPENED:
                self._take_answer(record)
            elif record.type != ACK:
                self._pending.append(record)

    def over(self, ack=True):
        """The acceptor sends Over. The opener awaits it, or Close (LinkClosed), and sends the Ack that is due."""
        if self._acker:
            self._acker.join(PATIENCE)
        if not self.link.opener:
            self.link.write(OVER)
            return
        try:
            self._read()
        except LinkClosed:
            if ack:
                self.ack()
            raise
        if ack and self.said < self.taken:
            # The acceptor may have closed the link right after its Over.
            with contextlib.suppress(OSError):
                self.ack()

    def chunks(self):
        """Each Data up to End, acknowledged whenever 32 KiB are, by a thread of their own: the other end may read nothing before this one reads."""
        acks, self._acker = queue.Queue(), None
        try:
            while not self.incoming.is_done and not self.is_over:
                data = self.receive()
                if data:
                    yield data
                if self.taken - self.said >= ACK_DUE and not self.incoming.is_done:
                    if not self._acker:
                        self._acker = threading.Thread(target=self._send_acks, args=(self.link, acks), daemon=True)
                        self._acker.start()
                    self.said = self.taken
                    acks.put(self.said)
        finally:
            acks.put(None)

    @staticmethod
    def _send_acks(link, acks):
        with contextlib.suppress(OSError):
            for taken in iter(acks.get, None):
                link.write(ACK, encode_ack(taken))

    def receive_all(self):
        return b"".join(self.chunks())

    def finish(self):
        """Brings what is left of the stream to its regular end."""
        if self.link.state in ("Both", "Got", "Asked"):
            self.end()
        if self.link.state == "AskedEnd":
            self.wait_opened()
        if self.link.state == "Sent":
            self.receive_all()
        if self.link.state == "Done":
            self.over()

    def _read(self):
        return self._pending.popleft() if self._pending else self.link.read_record()

    def _take_answer(self, record):
        if record.type == OVER and self.kind == TCP:
            self.is_over = True
            return
        if record.type != OPENED:
            raise ProtocolError("record 0x%02x before Opened" % record.type)
        bound, taken = decode_opened(record.content, self.kind)
        if taken is not None:
            self.outgoing.acknowledge(taken)
        self.bound = bound


# ---------------------------------------------------------------------------------------------------- handlers
def echo(stream):
    """Handler: sends everything back. It can go on with a stream that was attached to another link."""
    stream.opened()
    stream.resend()
    for data in stream.chunks():
        stream.send(data)
    if not stream.outgoing.ended:
        stream.end()


def serve_udp(stream, answer=lambda target, data: data):
    """Handler of a UDP link, until its end: answer(target, data) gives the datagram that goes back, or None. An address answers for a name."""
    link, sessions, unnamed = stream.link, {}, set()
    link.send_record(OPENED, encode_opened("", None))
    with contextlib.suppress(LinkEnded):
        while True:
            kind, value = link.read_udp()
            if kind == SESSION:
                if value[0] <= max(sessions, default=-1):
                    raise ProtocolError("session number %d again or downwards" % value[0])
                sessions[value[0]] = value[1]
                if re.match("[^[]*[a-z]", value[1]):  # a name, not an address
                    unnamed.add(value[0])
            elif kind == SESSION_OVER:
                sessions[value[0]] = None
            else:
                answers = [(number, answer(sessions[number], data)) for number, data in value if sessions.get(number)]
                for number, data in answers:
                    if data is not None:
                        if number in unnamed:
                            unnamed.remove(number)
                            link.write(SESSION_ADDRESS, encode_session_address(number, "192.0.2.1:53"))
                        link.datagrams((number, data))


def serve(stream):
    """Handler: TCP echoes, UDP echoes."""
    (serve_udp if stream.kind == UDP else echo)(stream)
