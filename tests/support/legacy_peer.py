"""The legacy wire a second time, on `cryptography`, sockets and the codec of ratrod2_peer.py, every step callable by itself and open to being done
wrongly. It was written from the protocol's description and is proved against the original (test_rust.py): it must never import ratrod."""

import base64
import contextlib
import os
import socket
from typing import NamedTuple, get_type_hints

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from support import ratrod2_peer
from support.ratrod2_peer import encode_str, varint

# The largest size that a frame may name, tag included.
LIMIT = 128 * 1024 - 256
INVALID_HOST, INVALID_KEY, REMOTE_FAILED, UNKNOWN = range(4)
RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


class WireError(ConnectionError):
    """The other end broke the protocol, or ended where it may not."""


class Refused(WireError):
    """The other end said Error where something else was awaited."""

    def __init__(self, error):
        super().__init__("%s: %s" % error)
        self.error = error


ClientPreamble = NamedTuple("ClientPreamble", [
    ("exchange_public_key", bytes), ("remote", str), ("challenge", bytes), ("should_encrypt", bool), ("is_udp", bool)])
ServerPreamble = NamedTuple("ServerPreamble", [
    ("identity_public_key", str), ("exchange_public_key", bytes), ("signature", bytes), ("challenge", bytes)])
ClientAuthentication = NamedTuple("ClientAuthentication", [("identity_public_key", str), ("signature", bytes)])
HandshakeCompletion = NamedTuple("HandshakeCompletion", [])
Data = NamedTuple("Data", [("data", bytes)])
UdpData = NamedTuple("UdpData", [("data", bytes)])
Error = NamedTuple("Error", [("code", int), ("text", str)])
Shutdown = NamedTuple("Shutdown", [])
# The place in this table is the variant's number on the wire.
MESSAGES = ClientPreamble, ServerPreamble, ClientAuthentication, HandshakeCompletion, Data, UdpData, Error, Shutdown
FIELDS = {int: "varint", bool: 1, str: "str", bytes: "bytes"}


def encode(message):
    """A str field takes bytes too, so that a test can send what is not UTF-8."""
    return varint(MESSAGES.index(type(message))) + b"".join(
        encode_str(value) if isinstance(value, (str, bytes)) else varint(value) for value in message)


def decode(payload):
    if not payload or payload[0] >= len(MESSAGES):
        raise WireError("a message of variant %r" % payload[:1])
    cls = MESSAGES[payload[0]]
    kinds = get_type_hints(cls).values()
    try:
        values = ratrod2_peer.decode(payload[1:], *(FIELDS[kind] for kind in kinds))
    except ratrod2_peer.ProtocolError as error:
        raise WireError("%s: %s" % (cls.__name__, error)) from error
    if any(kind is bool and value > 1 for kind, value in zip(kinds, values)):
        raise WireError("a bool above 1 in %r" % (values,))
    return cls(*(kind(value) for kind, value in zip(kinds, values)))


def frame(payload, key=None, flag=None, size=None):
    """A frame as bytes. Rightly, flag and size follow from the key and the payload; a test may claim others."""
    if flag is None:
        flag = int(key is not None)
    nonce = os.urandom(12) if flag else b""
    if flag and key:
        payload = ChaCha20Poly1305(key).encrypt(nonce, payload, None)
    return bytes([flag]) + nonce + (len(payload) if size is None else size).to_bytes(8, "big") + payload


class Identity:
    """An Ed25519 key pair, made or read from a key folder."""

    def __init__(self, private=None):
        self.private = private or Ed25519PrivateKey.generate()
        self.public = base64.urlsafe_b64encode(self.private.public_key().public_bytes(*RAW)).rstrip(b"=").decode()

    @classmethod
    def load(cls, folder):
        document = base64.urlsafe_b64decode((folder / "key").read_text() + "=")
        return cls(Ed25519PrivateKey.from_private_bytes(document[16:48]))


def check_signature(public, signature, challenge):
    try:
        Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(public + "=")).verify(signature, challenge)
    except (ValueError, InvalidSignature) as error:
        raise WireError("the signature of %r is wrong: %r" % (public, error)) from error


class Peer:
    """What both ends share. `received` keeps every byte that came, for tests that look for what must not be there."""

    def __init__(self, sock, identity, timeout=30.0):
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.identity, self.received, self.key = sock, identity, bytearray(), None
        self.challenge, self._exchange = os.urandom(32), X25519PrivateKey.generate()
        self.exchange_public_key = self._exchange.public_key().public_bytes(*RAW)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send_raw(self, data):
        self.socket.sendall(data)

    def send(self, message, **claims):
        """A message, or a payload as bytes, in a frame; `claims` may set another flag or size, or key=None."""
        payload = message if isinstance(message, bytes) else encode(message)
        self.send_raw(frame(payload, **{"key": self.key, **claims}))

    def end(self):
        """The end of this direction."""
        self.socket.shutdown(socket.SHUT_WR)

    def _receive_exactly(self, n, may_end=False):
        data = b""
        while len(data) < n:
            chunk = self.socket.recv(n - len(data))
            if not chunk:
                if may_end and not data:
                    return b""
                raise WireError("the end inside a frame, %d of %d bytes" % (len(data), n))
            self.received += chunk
            data += chunk
        return data

    def receive_frame(self):
        """(flag, payload), decrypted where it has to be; None at the end of the stream."""
        flag = self._receive_exactly(1, may_end=True)
        if not flag:
            return None
        if flag[0] > 1:
            raise WireError("a flag of %d" % flag[0])
        nonce = self._receive_exactly(12 * flag[0])
        size = int.from_bytes(self._receive_exactly(8), "big")
        if size > LIMIT:
            raise WireError("a frame of %d bytes" % size)
        payload = self._receive_exactly(size)
        if flag[0]:
            if self.key is None:
                raise WireError("an encrypted frame before there is a key")
            try:
                payload = ChaCha20Poly1305(self.key).decrypt(nonce, payload, None)
            except InvalidTag:
                raise WireError("a frame with a wrong tag") from None
        return flag[0], payload

    def receive(self):
        """The next message; None at the end of the stream."""
        got = self.receive_frame()
        if got is None:
            return None
        flag, payload = got
        if self.key and not flag:
            raise WireError("a frame in the clear once encryption is on")
        return decode(payload) if payload else Shutdown()

    def expect(self, cls):
        message = self.receive()
        if isinstance(message, Error):
            raise Refused(message)
        if not isinstance(message, cls):
            raise WireError("%s in place of %s" % (message, cls.__name__))
        return message

    def expect_data(self, n, cls=Data):
        """n bytes of data, however many frames they take."""
        data = b""
        while len(data) < n:
            data += self.expect(cls).data
        return data

    def drain(self):
        """Reads until the other end closes or resets; returns what came."""
        before = len(self.received)
        with contextlib.suppress(ConnectionError):
            for chunk in iter(lambda: self.socket.recv(65536), b""):
                self.received += chunk
        return bytes(self.received[before:])

    def sign(self, challenge):
        return self.identity.private.sign(challenge)

    def _derive(self, peer_exchange_key, server_challenge, client_challenge):
        salt = server_challenge + client_challenge
        shared = self._exchange.exchange(X25519PublicKey.from_public_bytes(peer_exchange_key))
        self.key = HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=salt).derive(shared)


class Client(Peer):
    """The client's steps, in their order; `handshake()` does them all. Any field can be given another value."""

    def __init__(self, sock, identity, remote="", encrypt=False, udp=False, timeout=30.0):
        super().__init__(sock, identity, timeout)
        self.remote, self.encrypt, self.udp = remote, encrypt, udp

    def preamble(self, **fields):
        return ClientPreamble(self.exchange_public_key, self.remote, self.challenge, self.encrypt, self.udp)._replace(**fields)

    def send_preamble(self, **fields):
        self.send(self.preamble(**fields))

    def receive_preamble(self):
        self.server = self.expect(ServerPreamble)
        check_signature(self.server.identity_public_key, self.server.signature, self.challenge)
        return self.server

    def authentication(self, **fields):
        return ClientAuthentication(self.identity.public, self.sign(self.server.challenge))._replace(**fields)

    def send_authentication(self, **fields):
        self.send(self.authentication(**fields))

    def start_encryption(self):
        if self.encrypt:
            self._derive(self.server.exchange_public_key, self.server.challenge, self.challenge)

    def receive_completion(self):
        self.expect(HandshakeCompletion)
        self.start_encryption()

    def handshake(self):
        self.send_preamble()
        self.receive_preamble()
        self.send_authentication()
        self.receive_completion()
        return self


class Server(Peer):
    """The server's steps, in their order; `handshake()` does them all. Any field can be given another value."""

    def receive_preamble(self):
        self.client = self.expect(ClientPreamble)
        return self.client

    def preamble(self, **fields):
        return ServerPreamble(self.identity.public, self.exchange_public_key, self.sign(self.client.challenge), self.challenge)._replace(**fields)

    def send_preamble(self, **fields):
        self.send(self.preamble(**fields))

    def receive_authentication(self):
        self.authentication = self.expect(ClientAuthentication)
        check_signature(self.authentication.identity_public_key, self.authentication.signature, self.challenge)
        return self.authentication

    def start_encryption(self):
        if self.client.should_encrypt:
            self._derive(self.client.exchange_public_key, self.challenge, self.client.challenge)

    def send_completion(self):
        self.send(HandshakeCompletion())
        self.start_encryption()

    def handshake(self):
        self.receive_preamble()
        self.send_preamble()
        self.receive_authentication()
        self.send_completion()
        return self

    def echo(self):
        """The handshake, then whatever comes, back."""
        self.handshake()
        for message in iter(self.receive, None):
            self.send(message)
