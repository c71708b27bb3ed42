"""An independent `ratrod2` peer, client and server: blocking, on plain sockets, for tests.

Written from PROTOCOL.md, Part 2, alone, on the PyPI packages `noiseprotocol`, `cryptography` and PyNaCl. It never imports ratrod, so that a mistake
that both of ratrod's own ends make alike shows here. Its second use is to misbehave: every step is a call of its own, and what a step sends can be
replaced by something wrong.

From the bottom up: encoding, identities, Handshake (bytes in, bytes out), suites and records, Peer (one end of a link; Client and Server), Stream,
handlers.
"""

import contextlib
import hashlib
import hmac
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
OPEN, OPENED, DATA, END, OVER = 0x10, 0x11, 0x12, 0x13, 0x14
DATAGRAMS, SESSION, SESSION_OVER = 0x20, 0x21, 0x22
KEEPALIVE, CLOSE = 0x30, 0x3f

TCP, UDP, LISTEN = 1, 2, 3
INVALID_HOST, INVALID_KEY, REMOTE_FAILED, UNKNOWN = range(4)

BULK_LIMIT = 512 * 1024
SMALL_LIMIT = 1024
BEFORE_OPENED = 64 * 1024
CHUNK = 64 * 1024
# The longest that a blocking call of this peer waits. It bounds a hang and measures nothing.
PATIENCE = 30.0


class ProtocolError(Exception):
    """The other end did something that PROTOCOL.md forbids."""


class PeerError(Exception):
    """The other end sent Error (or this end, where it refuses the other)."""

    def __init__(self, code, text):
        super().__init__("%d: %s" % (code, text))
        self.code = code
        self.text = text


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


def encode_bytes(data):
    return varint(len(data)) + data


def encode_str(text):
    """`text` as str; bytes are taken as they are, so that a test can send what is not UTF-8."""
    return encode_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


class Decoder:
    """Reads a content from front to back; end() insists that nothing is left over."""

    def __init__(self, data):
        self._data = data
        self._at = 0

    def raw(self, n):
        if n > len(self._data) - self._at:
            raise ProtocolError("a content of %d bytes ends inside a field" % len(self._data))
        self._at += n
        return self._data[self._at - n:self._at]

    def unsigned(self, size):
        return int.from_bytes(self.raw(size), "big")

    def varint(self):
        first = self.unsigned(1)
        if first > 253:
            raise ProtocolError("a varint that begins with %d" % first)
        return first if first <= 250 else self.unsigned(2 << (first - 251))

    def str(self):
        try:
            return self.raw(self.varint()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ProtocolError("a str that is not UTF-8") from error

    @property
    def left(self):
        return len(self._data) - self._at

    def end(self):
        if self.left:
            raise ProtocolError("%d bytes left over in a content" % self.left)


def encode_error(code, text):
    return varint(code) + encode_str(text)


def decode_error(content):
    decoder = Decoder(content)
    code, text = decoder.varint(), decoder.str()
    decoder.end()
    if code > UNKNOWN:
        raise ProtocolError("Error of code %d" % code)
    return code, text


def encode_open(kind, target="", instance=b""):
    return bytes([kind]) + encode_str(target) + instance


def decode_open(content):
    """(kind, target, instance); instance is empty but for kind 3."""
    decoder = Decoder(content)
    kind, target = decoder.unsigned(1), decoder.str()
    if kind not in (TCP, UDP, LISTEN):
        raise ProtocolError("Open of kind %d" % kind)
    instance = decoder.raw(8) if kind == LISTEN else b""
    decoder.end()
    return kind, target, instance


def decode_str(content):
    decoder = Decoder(content)
    text = decoder.str()
    decoder.end()
    return text


def encode_session(number, target):
    return struct.pack(">I", number) + encode_str(target)


def decode_session(content):
    decoder = Decoder(content)
    number, target = decoder.unsigned(4), decoder.str()
    decoder.end()
    return number, target


def encode_session_over(number, code=UNKNOWN, text=""):
    return struct.pack(">I", number) + encode_error(code, text)


def decode_session_over(content):
    decoder = Decoder(content)
    return (decoder.unsigned(4), *decode_error(decoder.raw(decoder.left)))


def encode_datagrams(datagrams):
    """`datagrams`: pairs of a session's number and the bytes."""
    return b"".join(struct.pack(">IH", number, len(data)) + data for number, data in datagrams)


def decode_datagrams(content):
    decoder = Decoder(content)
    datagrams = []
    while decoder.left:
        number = decoder.unsigned(4)
        datagrams.append((number, decoder.raw(decoder.unsigned(2))))
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


def keypair(private):
    return KeyPair25519.from_private_bytes(private)


def odd_keypair(public_bytes, private=None):
    """A key pair whose public bytes are not what the private key gives. Without one they are a point of small order: all secrets are zero."""
    honest = keypair(private) if private else KeyPair25519()
    return KeyPair25519(honest.private, honest.public, public_bytes)


# u-coordinates whose order divides 8, as bytes: two of them in a second, not reduced, form.
SMALL_ORDER_POINTS = tuple(bytes.fromhex(point) for point in (
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
))
# Ed25519's neutral element. The formula of the conversion gives u = 0 for it; libsodium refuses it.
SMALL_ORDER_IDENTITY = b"\x01" + bytes(31)


# ---------------------------------------------------------------------------------------------------- handshake


def _dh_of_an_attacker(private, public):
    """DH that goes on with a zero shared secret, so that only the other end's own check can stop it."""
    if private is None:
        return bytes(32)
    try:
        return private.exchange(public)
    except ValueError:
        return bytes(32)


class Handshake:
    """One side of the Noise handshake: bytes in, bytes out. A key is 32 private bytes or a noiseprotocol key pair."""

    def __init__(self, static, initiator, ephemeral=None, prologue=OPENING, attacker=False):
        self.initiator = initiator
        self._connection = NoiseConnection.from_name(NOISE_NAME)
        self._connection.set_prologue(prologue)
        (self._connection.set_as_initiator if initiator else self._connection.set_as_responder)()
        # Any static key satisfies start_handshake(). The real ones are put in after it: noiseprotocol warns of a given ephemeral key, and would
        # derive the public keys itself.
        self._connection.set_keypair_from_private_bytes(Keypair.STATIC, b"\x01" * 32)
        self._connection.start_handshake()
        # noiseprotocol drops its reference when the handshake is done; the remote static key is read from this one.
        self._state = self._connection.noise_protocol.handshake_state
        self._state.s = static if isinstance(static, KeyPair25519) else keypair(static)
        if ephemeral is not None:
            self._state.e = ephemeral if isinstance(ephemeral, KeyPair25519) else keypair(ephemeral)
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

    @property
    def handshake_hash(self):
        return self._connection.get_handshake_hash()

    @property
    def split_keys(self):
        """k1 (client to server) and k2 (server to client) of Noise's Split()."""
        ours, theirs = self._connection.noise_protocol.cipher_state_encrypt.k, self._connection.noise_protocol.cipher_state_decrypt.k
        return (ours, theirs) if self.initiator else (theirs, ours)

    def record_keys(self, suite):
        """The keys of the records: client to server, server to client."""
        label = b"ratrod2 " + bytes([suite.id]) + self.handshake_hash + b"\x01"
        return tuple(hmac.new(k, label, hashlib.sha256).digest()[:suite.key_length] for k in self.split_keys)


# ---------------------------------------------------------------------------------------------------- suites and records


class _Aegis128L:
    """libsodium's AEGIS-128L with the methods of `cryptography`'s ciphers."""

    def __init__(self, key):
        self._key = key

    def encrypt(self, nonce, data, aad):
        return nacl.bindings.crypto_aead_aegis128l_encrypt(data, aad, nonce, self._key)

    def decrypt(self, nonce, data, aad):
        return nacl.bindings.crypto_aead_aegis128l_decrypt(data, aad, nonce, self._key)


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
    wire: bytes


class RecordWriter:
    """Seals the records of one direction. `number` is the next record's; to give it changes the order, and counts nothing."""

    def __init__(self, suite, key):
        self.suite = suite
        self.number = 0
        self._cipher = suite.cipher(key)

    def seal(self, record_type, content=b"", number=None, length=None):
        """The record as it goes over the wire. `length` replaces the true length, in the header and so in the AAD."""
        plaintext = bytes([record_type]) + content
        header = struct.pack(">I", len(plaintext) + self.suite.tag_length if length is None else length)
        if number is None:
            number = self.number
            self.number += 1
        return header + self._cipher.encrypt(self.suite.nonce(number), plaintext, header)


class RecordReader:
    """Opens the records of one direction, in order."""

    def __init__(self, suite, key):
        self.suite = suite
        self.number = 0
        self._cipher = suite.cipher(key)

    def check_length(self, length):
        if not 1 + self.suite.tag_length <= length <= 1 + BULK_LIMIT + self.suite.tag_length:
            raise ProtocolError("a record of %d bytes" % length)

    def open(self, wire):
        """The record that `wire` (its length, and the sealed bytes) holds."""
        try:
            plaintext = self._cipher.decrypt(self.suite.nonce(self.number), wire[4:], wire[:4])
        except (InvalidTag, ValueError, nacl.exceptions.CryptoError) as error:
            raise ProtocolError("record %d does not verify" % self.number) from error
        self.number += 1
        record = Record(plaintext[0], plaintext[1:], wire)
        if record.type not in (DATA, DATAGRAMS) and len(record.content) > SMALL_LIMIT:
            raise ProtocolError("a record of type 0x%02x with %d bytes" % (record.type, len(record.content)))
        return record

    def read(self, sock):
        header = receive_exactly(sock, 4)
        length = int.from_bytes(header, "big")
        self.check_length(length)
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
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        for chunk in iter(lambda: sock.recv(1 << 20), b""):
            data += chunk
    return bytes(data)


def reset(sock):
    """Closes with a reset. A Unix socket (a socketpair) knows none and just closes."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Recorder:
    """A socket whose traffic is kept, so that a test can replay it."""

    def __init__(self, sock):
        self._sock = sock
        self.sent = bytearray()
        self.received = bytearray()

    def sendall(self, data):
        self.sent += data
        self._sock.sendall(data)

    def recv(self, n):
        data = self._sock.recv(n)
        self.received += data
        return data

    def __getattr__(self, name):
        return getattr(self._sock, name)


# ---------------------------------------------------------------------------------------------------- one end of a link

# The table of PROTOCOL.md, as (state, record) -> the next state. Opener and acceptor differ in the states they can reach, and in Idle and Done.
_RECEIVED = {
    ("Asked", OPENED): "Both", ("AskedEnd", OPENED): "Sent",
    ("Both", DATA): "Both", ("Sent", DATA): "Sent",
    ("Both", END): "Got", ("Sent", END): "Done",
    ("UdpAsked", OPENED): "Udp",
    **{(state, record): state for state in ("UdpAsked", "Udp") for record in (DATAGRAMS, SESSION_OVER)},
}
_RECEIVED_BY_OPENER = {**_RECEIVED, ("Done", OVER): "Idle"}
_RECEIVED_BY_ACCEPTOR = {**_RECEIVED, ("Idle", OPEN): "Connecting", ("Udp", SESSION): "Udp"}
_CLOSE_ALLOWED = ("Idle", "Asked", "AskedEnd", "Done")
_SENT = {
    ("Asked", DATA): "Asked", ("Both", DATA): "Both", ("Got", DATA): "Got",
    ("Asked", END): "AskedEnd", ("Both", END): "Sent", ("Got", END): "Done",
    ("Connecting", OPENED): "Both", ("Idle", OPEN): "Asked", ("Done", OVER): "Idle",
    **{(state, record): state for state in ("UdpAsked", "Udp") for record in (DATAGRAMS, SESSION, SESSION_OVER)},
}


class Peer:
    """One end of a link. `opener` says who begins streams: the client, but for a Listen link.

    Misbehaviour, for both ends: `static` and `ephemeral` (32 private bytes or a key pair) and `claimed` (the identity in message 2 or 3) replace what
    the seed gives; `attacker` goes on with zero shared secrets; `suites` is the offer, best first. send() and send_record() check nothing and change
    no state.
    """

    initiator = False

    def __init__(self, sock, seed, suites=None, ephemeral=None, static=None, claimed=None, attacker=False, opener=None):
        self.sock = sock
        self.identity = Identity.from_seed(seed)
        self.claimed = self.identity.public if claimed is None else claimed
        self.suites = tuple(SUITES if suites is None else suites)
        self.opener = self.initiator if opener is None else opener
        self.handshaker = Handshake(self.identity.static_private if static is None else static, self.initiator, ephemeral, attacker=attacker)
        self.remote_identity = None
        self.suite = None
        self.writer = None
        self.reader = None
        self.state = "Idle"
        # Two locks: a reader must be able to note what it read while a sender is blocked in sendall().
        self._sending = threading.Lock()
        self._changing = threading.Lock()

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

    def start_records(self, suite_id=None):
        """Derives the keys; called once message 3 has been written or read. `suite_id` replaces the chosen one."""
        suite = self.suite if suite_id is None else SUITES[suite_id]
        to_server, to_client = self.handshaker.record_keys(suite)
        self.suite = suite
        self.writer = RecordWriter(suite, to_server if self.initiator else to_client)
        self.reader = RecordReader(suite, to_client if self.initiator else to_server)

    # ------------------------------------------------------------------ records, unchecked

    def send_record(self, record_type, content=b"", number=None, length=None):
        """Seals and sends, whatever the state; returns the bytes sent."""
        with self._sending:
            wire = self.writer.seal(record_type, content, number, length)
            self.sock.sendall(wire)
            return wire

    def read_any_record(self):
        """The next record, whatever the state; Keepalive too."""
        return self.reader.read(self.sock)

    def send_error(self, code, text):
        return self.send_record(ERROR, encode_error(code, text))

    def send_open(self, kind, target="", instance=b""):
        return self.send_record(OPEN, encode_open(kind, target, instance))

    def send_keepalive(self):
        return self.send_record(KEEPALIVE)

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
            self.send_error(code, text)
        self.finish()

    @contextlib.contextmanager
    def keeping_alive(self, interval=20.0):
        """Sends Keepalive from a thread while the block runs."""
        done = threading.Event()

        def run():
            with contextlib.suppress(OSError):
                while not done.wait(interval):
                    self.send_keepalive()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(PATIENCE)

    # ------------------------------------------------------------------ records, by the state table

    def write(self, record_type, content=b""):
        """Sends a record that the state allows."""
        with self._changing:
            if (self.state, record_type) not in _SENT:
                raise RuntimeError("a mistake of the test: record 0x%02x in state %s" % (record_type, self.state))
            self.state = _SENT[self.state, record_type]
            if record_type == OPEN and content[0] == UDP:
                self.state = "UdpAsked"
        self.send_record(record_type, content)

    def read_record(self):
        """The next record but Keepalive; one that the state does not allow is a ProtocolError, Error a PeerError, Close LinkClosed."""
        while True:
            record = self.read_any_record()
            if record.type == KEEPALIVE:
                if record.content:
                    raise ProtocolError("Keepalive with content")
                continue
            self._received(record)
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
            if (self.state, record.type) not in allowed:
                raise ProtocolError("record 0x%02x in state %s" % (record.type, self.state))
            self.state = allowed[self.state, record.type]
            if record.type == OPEN and record.content[:1] == bytes([UDP]):
                self.state = "Udp"

    # ------------------------------------------------------------------ streams

    def open(self, target, kind=TCP, instance=b""):
        """Starts a stream, without waiting for Opened."""
        self.write(OPEN, encode_open(kind, target, instance))
        return Stream(self, kind, target, instance)

    def accept(self):
        """The next stream that the other end opens; None after its FIN."""
        try:
            record = self.read_record()
        except LinkBroken:
            raise
        except LinkEnded:
            return None
        return Stream(self, *decode_open(record.content))

    def listen(self, address, instance):
        """A client's: makes this a Listen link, on which the server is the opener; returns the bound address."""
        bound = self.open(address, LISTEN, instance).wait_opened()
        self.opener, self.state = False, "Idle"
        return bound

    def grant_listen(self, bound):
        """A server's: answers Open kind 3 with the bound address, and is the opener from then on."""
        self.write(OPENED, encode_str(bound))
        self.opener, self.state = True, "Idle"

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
        self.write(OPEN, encode_open(UDP, ""))
        return self

    def session(self, number, target):
        self.write(SESSION, encode_session(number, target))

    def datagrams(self, *datagrams):
        """Sends (session number, bytes) pairs, together in one record."""
        self.write(DATAGRAMS, encode_datagrams(datagrams))

    def session_over(self, number, code=UNKNOWN, text=""):
        self.write(SESSION_OVER, encode_session_over(number, code, text))

    def read_udp(self):
        """What came next on a UDP link: (DATAGRAMS, pairs), (SESSION, (number, target)) or (SESSION_OVER, (number, code, text)). Not Opened."""
        while True:
            record = self.read_record()
            if record.type == DATAGRAMS:
                return record.type, decode_datagrams(record.content)
            if record.type == SESSION:
                return record.type, decode_session(record.content)
            if record.type == SESSION_OVER:
                return record.type, decode_session_over(record.content)
            decode_str(record.content)


class ServerPreamble(NamedTuple):
    identity: bytes
    suite: int


class Client(Peer):
    """The client of a link. `server` (32 bytes), where given, is the only identity it takes. handshake() is made of steps to be called alone."""

    initiator = True

    def __init__(self, sock, seed, server=None, **options):
        super().__init__(sock, seed, **options)
        self.server = server
        self.version = None

    @classmethod
    def connect(cls, port, seed, host="127.0.0.1", wrap=lambda sock: sock, **options):
        sock = socket.create_connection((host, port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(wrap(sock), seed, **options)

    def handshake(self):
        self.begin_handshake()
        self.version = self.read_completion()
        return self

    def begin_handshake(self):
        """Everything that does not wait for HandshakeCompletion: records may be sent after it."""
        self.send_client_preamble()
        self.read_server_preamble()
        self.send_message(self.client_authentication())
        return self

    def send_client_preamble(self):
        """What the server hears first: the opening bytes and message 1."""
        message = self.client_preamble()
        self.send(OPENING + struct.pack(">H", len(message)) + message)

    def client_preamble(self, payload=None):
        """Message 1, without its length."""
        return self.handshaker.write_message(bytes([len(self.suites), *self.suites]) if payload is None else payload)

    def read_server_preamble(self, message=None):
        """Reads (or takes) message 2 and checks it as a client must, but for what `server` leaves open."""
        payload = self.handshaker.read_message(self.read_message() if message is None else message)
        if len(payload) < 33:
            raise ProtocolError("a ServerPreamble of %d bytes" % len(payload))
        preamble = ServerPreamble(payload[:32], payload[32])
        self._check_identity(preamble.identity)
        if preamble.suite not in self.suites:
            raise ProtocolError("suite %d was not offered" % preamble.suite)
        if self.server not in (None, preamble.identity):
            raise ProtocolError("not the expected server")
        self.suite = SUITES[preamble.suite]
        return preamble

    def client_authentication(self, payload=None):
        """Message 3, without its length. The record keys are there after it."""
        message = self.handshaker.write_message(self.claimed if payload is None else payload)
        self.start_records()
        return message

    def read_completion(self):
        """The server's version; an Error in its place is a PeerError."""
        record = self.read_any_record()
        if record.type == ERROR:
            raise PeerError(*decode_error(record.content))
        if record.type != HANDSHAKE_COMPLETION:
            raise ProtocolError("record 0x%02x in place of HandshakeCompletion" % record.type)
        return decode_str(record.content)


class Server(Peer):
    """The server of a link. `authorized`: the clients' identities, or None for anybody. handshake() is made of steps that can be called alone."""

    def __init__(self, sock, seed, authorized=None, version="peer", **options):
        super().__init__(sock, seed, **options)
        self.authorized = authorized
        self.version = version
        self.offered = ()

    def handshake(self):
        """Raises PeerError for a client that it refused (and told so)."""
        self.begin_handshake()
        if self.authorized is not None and self.remote_identity not in self.authorized or self.remote_identity == self.identity.public:
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

    def read_client_preamble(self, message=None):
        """Reads (or takes) message 1 and chooses the suite."""
        payload = self.handshaker.read_message(self.read_message() if message is None else message)
        self.offered = tuple(payload[1:1 + payload[0]]) if payload else ()
        if not payload or len(self.offered) != payload[0] or CHACHA.id not in self.offered:
            raise ProtocolError("an offer of suites %r" % payload)
        self.suite = SUITES[next(suite for suite in self.offered if suite in self.suites)]
        return self.offered

    def server_preamble(self, payload=None):
        """Message 2, without its length."""
        return self.handshaker.write_message(self.claimed + bytes([self.suite.id]) if payload is None else payload)

    def read_client_authentication(self, message=None):
        """Reads (or takes) message 3. The record keys are there after it."""
        payload = self.handshaker.read_message(self.read_message() if message is None else message)
        if len(payload) < 32:
            raise ProtocolError("a ClientAuthentication of %d bytes" % len(payload))
        self._check_identity(payload[:32])
        self.start_records()
        return payload[:32]

    def send_completion(self, version=None):
        return self.send_record(HANDSHAKE_COMPLETION, encode_str(self.version if version is None else version))

    def serve_streams(self, handler):
        """Each stream to handler(stream), one after the other, until the client's FIN. What a handler left of a TCP stream is passed over."""
        while True:
            stream = self.accept()
            if stream is None:
                return
            handler(stream)
            if stream.kind != TCP:
                return
            stream.finish()


# ---------------------------------------------------------------------------------------------------- streams and their handlers


class Stream:
    """One stream on a link, for its opener or its acceptor. One thread may send while another receives."""

    def __init__(self, link, kind, target, instance=b""):
        self.link = link
        self.kind = kind
        self.target = target
        self.instance = instance
        self.bound = None

    # An acceptor's.

    def opened(self, address=""):
        self.link.write(OPENED, encode_str(address))

    def refuse(self, code, text):
        self.link.fail(code, text)

    # An opener's.

    def wait_opened(self):
        """Reads up to Opened; returns the bound address that it carries."""
        while self.bound is None:
            self._take(self.link.read_record())
        return self.bound

    # Both.

    def send(self, data):
        """Sends Data; returns how many bytes."""
        if self.link.state == "Asked" and len(data) > BEFORE_OPENED:
            raise RuntimeError("a mistake of the test: more than 64 KiB before Opened")
        for start in range(0, len(data), CHUNK):
            self.link.write(DATA, data[start:start + CHUNK])
        return len(data)

    def end(self):
        self.link.write(END)

    def receive(self):
        """The next Data, or b"" for End."""
        while True:
            record = self.link.read_record()
            if record.type != OPENED:
                return record.content
            self._take(record)

    def receive_all(self):
        return b"".join(iter(self.receive, b""))

    def over(self):
        """Awaits Over (opener) or sends it (acceptor)."""
        if not self.link.opener:
            self.link.write(OVER)
        else:
            self.link.read_record()

    def finish(self):
        """Brings what is left of the stream to its regular end."""
        if self.link.state in ("Both", "Got", "Asked"):
            self.end()
        if self.link.state in ("Asked", "AskedEnd", "Sent"):
            self.receive_all()
        if self.link.state == "Done":
            self.over()

    def fail(self, code, text):
        self.link.fail(code, text)

    def _take(self, record):
        if record.type != OPENED:
            raise ProtocolError("record 0x%02x before Opened" % record.type)
        self.bound = decode_str(record.content)


def echo(stream):
    """Handler: sends everything back."""
    stream.opened()
    for data in iter(stream.receive, b""):
        stream.send(data)
    stream.end()


def dial(stream):
    """Handler: connects to the target and carries bytes both ways."""
    host, _, port = stream.target.rpartition(":")
    try:
        local = socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)
    except OSError as error:
        stream.refuse(REMOTE_FAILED, str(error))
        raise LinkEnded("the stream was refused") from error
    with local:
        stream.opened()
        backward = threading.Thread(target=_carry_back, args=(local, stream), daemon=True)
        backward.start()
        try:
            for data in iter(stream.receive, b""):
                local.sendall(data)
        except (PeerError, LinkEnded):
            # Closing alone would wait for the other thread's recv(), and the reset with it.
            local.shutdown(socket.SHUT_RD)
            backward.join()
            reset(local)
            raise
        local.shutdown(socket.SHUT_WR)
        backward.join()


def _carry_back(local, stream):
    try:
        for data in iter(lambda: local.recv(CHUNK), b""):
            stream.send(data)
        stream.end()
    except OSError as error:
        with contextlib.suppress(OSError):
            stream.link.send_error(REMOTE_FAILED, str(error))
            stream.link.sock.shutdown(socket.SHUT_WR)


def serve_udp(stream, answer=lambda target, data: data):
    """Handler of a UDP link, until its end: answer(target, data) gives the datagram that goes back, or None. The default echoes."""
    link, sessions = stream.link, {}
    stream.link.send_record(OPENED, encode_str(""))
    with contextlib.suppress(LinkEnded):
        while True:
            kind, value = link.read_udp()
            if kind == SESSION:
                if value[0] in sessions or value[0] < max(sessions, default=0):
                    raise ProtocolError("session number %d again or downwards" % value[0])
                sessions[value[0]] = value[1]
            elif kind == SESSION_OVER:
                sessions[value[0]] = None
            else:
                answers = [(number, answer(sessions[number], data)) for number, data in value if sessions.get(number) is not None]
                for pair in answers:
                    if pair[1] is not None:
                        link.datagrams(pair)


def serve(stream):
    """Handler: TCP echoes, UDP echoes."""
    (serve_udp if stream.kind == UDP else echo)(stream)
