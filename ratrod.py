#!/usr/bin/env python3
"""Key-authenticated, encrypted TCP and UDP tunnels in one file: ssh -L where there is no SSH.

Usage:
  ratrod [-k KEY_PATH] [-v] serve [-r REGEX] [--allow-listen] [--legacy]
         [--drain SECS] [--reuse-port] [--proxy-protocol SOURCES] [--workers N]
         [--log-format FORMAT] [--metrics ADDRESS]
         [--max-links N] [--max-links-per-key N] [--max-streams N]
         [--max-streams-per-key N] [--max-handshakes N]
         [--max-handshakes-per-source N] [--handshake-rate N]
         [--max-connects-per-key N] [--handshake-timeout SECS]
         [--connect-timeout SECS] [--link-age SECS] [--udp-timeout SECS]
         [--max-udp-sessions N] [--max-udp-sessions-per-link N]
         [--udp-backlog BYTES] [--] BIND
  ratrod [-k KEY_PATH] [-v] connect [-a] [--accept-new] [-e] [--legacy]
         [--proxy URL] [--ssh-command CMD] [--socks-user AUTH]
         [--max-retry-count N] [--max-retry-interval SECS]
         [--drain SECS] [--workers N] [--log-format FORMAT] [--metrics ADDRESS]
         [--no-status] [--check] [--idle-links N]
         [--handshake-timeout SECS] [--connect-timeout SECS] [--link-age SECS]
         [--udp-timeout SECS] [--max-udp-sessions-per-link N]
         [--udp-backlog BYTES] [--] SERVER [--] [TUNNEL]...
  ratrod [-k KEY_PATH] [-v] keygen
  ratrod [-v] demo
  ratrod help [COMMAND]
  ratrod -h | --help
  ratrod -V | --version

Commands:
  serve    start a server here: it takes clients' connections and forwards them to the remotes they name
  connect  connect to a server and forward local ports through it to remotes; without TUNNEL only test the connection
  keygen   write the security files without asking, and print the public key
  demo     show the whole thing on this machine in a few seconds, with keys that are thrown away
  help     explain a command

Arguments:
  BIND     the address to listen on, `host:port`, as 0.0.0.0:19000 or [::]:19000
  SERVER   the server's address, `host:port`; several, `a:1,b:2`, are tried in turn;
           or ssh://[user@]host[:port]: a machine with sshd and Python, where ratrod need not be installed
  TUNNEL   [local_host:[local_port:[remote_host:]]]remote_port, for TCP and UDP alike: 2000:db:5432, 2000:80, 80;
           IPv6 addresses in brackets: [::1]:2000:[2001:db8::7]:80; local port 0 takes a free one;
           ranges: 8000-8010:host:9000-9010
           [host:]port:socks          a SOCKS5 proxy here, for TCP and UDP; names are looked up at the server
           stdio:host:port            standard input and output, as in ssh -o ProxyCommand='... stdio:%h:%p'
           unix:/path                 a Unix socket, in place of the local [host:]port or of the remote host:port
           R:[host:]port:host:port    reverse: the server listens (serve --allow-listen), this side connects

Options:
  -k, --key-path KEY_PATH         the folder of `key`, `key.pub`, `authorized_keys` and `known_hosts`,
                                  or the key file itself (default: ~/.ratrod)
  -v, --verbose                   say more: every connection with its addresses, bytes and time
  -r, --remote-regex REGEX        allow only remotes whose whole `host` or `host:port` matches (default: .*)
  -a, --accept-all-hosts          accept any server's key: no protection from a server that only pretends
  --accept-new                    add an unknown server's key to `known_hosts`; never accept a changed one
  --allow-listen                  let clients listen on addresses of this machine (R: tunnels)
  --socks-user AUTH               name:password that clients of socks tunnels must give
  --proxy URL                     reach the server through a proxy: http://[user:password@]host[:port] (CONNECT)
                                  or socks5://..., each with port 1080 where none is named
  --ssh-command CMD               for ssh:// servers: what is run as ssh, as 'ssh -F config' (default: ssh)
  -e, --encrypt                   with --legacy: encrypt the traffic; otherwise it always is
  --legacy                        connect: speak the wire of the original, Rust ratrod 0.6.3; serve: also
  --max-retry-count N             give up after so many failed tries (default: the first must succeed, then never)
  --max-retry-interval SECS       the longest pause between two tries to reach a server that went away (default: 30)
  --drain SECS                    let open connections go on for so long at the end (default: serve 10, connect 0)
  --reuse-port                    share the port: a new server takes over while the old one drains
  --proxy-protocol SOURCES        load balancers that send a PROXY header, as 10.0.0.7,10.1.0.0/16
  --workers N                     share the work among so many processes, each with these limits (default: 1)
  --log-format FORMAT             text, or json: one object a line (default: text)
  --metrics ADDRESS               answer Prometheus on `host:port`, as 127.0.0.1:9100: GET /metrics
  --no-status                     no status line at a terminal
  --check                         only test the connection, for health probes: exit 0 where it is good
  --max-links N                   connections of clients in all (default: as many as the descriptor limit bears)
  --max-links-per-key N           ... and of one client's key (default: the same)
  --max-streams N                 TCP streams in all (default: as many as there are links)
  --max-streams-per-key N         ... and of one client's key (default: the same)
  --max-handshakes N              unauthenticated connections; the oldest makes room (default: 64)
  --max-handshakes-per-source N   ... from one address, or IPv6 /64 (default: 8)
  --handshake-rate N              new ones a second from a stranger's address, at once twice as many (default: 20)
  --max-connects-per-key N        remotes that one client connects to at once; others wait (default: 32)
  --idle-links N                  links that are kept for the next connections (default: 8)
  --handshake-timeout SECS        time for a connection to authenticate itself (default: 10)
  --connect-timeout SECS          time to look up and connect to a remote or a server (default: 10)
  --link-age SECS                 a link older than this takes no new stream (default: 3600)
  --udp-timeout SECS              forget a UDP session that has been idle for so long (default: 120)
  --max-udp-sessions N            UDP sessions in all (default: 4096)
  --max-udp-sessions-per-link N   ... and of one link; the least recently used one makes room (default: 256)
  --udp-backlog BYTES             datagrams that may wait for a link; the oldest are dropped (default: 262144)
  -h, --help                      show this help, or a command's after the command
  -V, --version                   show the version
"""

from __future__ import annotations  # unread at run time: they cost the start 10 ms, and each connection 4 µs

import atexit
import base64
import builtins
import collections
import contextlib
import errno
import functools
import heapq
import logging
import os
import queue
import re
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, Generator, Iterable, Iterator, Mapping, NamedTuple, NoReturn, Sequence, Tuple, TypeVar, Union

if TYPE_CHECKING:
    import subprocess

__version__ = "0.7.0"
__all__ = ["AuthenticationError", "ConfigError", "ConnectError", "Limits", "LocalProtocolError", "PeerError", "PolicyError",
           "ProtocolError", "RatrodError", "RemoteProtocolError", "Service", "Tunnel", "UnknownHost", "UsageError", "main", "serve", "tunnel"]

# ======================================================================================================================
# 1. Limits and errors
# ======================================================================================================================


class Limits(NamedTuple):
    """Every limit and time of an endpoint in one place, so that a test can scale them. Times are in seconds, sizes in bytes."""

    handshake_timeout: float = 10.0  # from accept to the peer authenticated; the peer has the same
    connect_timeout: float = 10.0  # look-up and connect of a remote
    handshakes: int = 64  # unauthenticated connections in all; also the threads that serve them
    handshakes_per_source: int = 8  # ... and from one address (IPv6: one /64): the oldest makes room
    handshake_rate: float = 20.0  # new ones a second from one source that has no authorized link ...
    handshake_burst: int = 40  # ... and so many at once
    links: int = 0  # authenticated links in all; 0: half of what the descriptor limit leaves after 64 and the UDP sessions
    links_per_key: int = 0  # ... of one client's key; 0: as many as in all
    streams: int = 0  # TCP streams in all; 0: as many as links
    streams_per_key: int = 0  # ... of one client's key; 0: as many as in all
    lookup_threads: int = 16  # a name server that hangs holds up these, never a handshake
    connects_per_key: int = 32  # remotes of one client being looked up or connected to
    listeners_per_key: int = 4  # reverse tunnels of one client ...
    waiting_links: int = 8  # ... and links of each that wait for a connection
    reverse_queue: int = 1024  # connections of one that wait for a link
    ssh_links: int = 16  # over ssh://: each is a process at either end; further connections wait for one of them ...
    ssh_patience: float = 60.0  # ... for so long
    links_at_once: int = 16  # that a client makes; further ones wait for these, so that a burst does not look like an attack
    idle_links: int = 8  # that a client keeps, or as many as it lately needed at once
    idle_time: float = 60.0  # after which surplus ones are let go
    link_age: float = 3600.0  # forward secrecy is per link: an older one takes no new stream
    keepalive: float = 20.0  # whoever has sent nothing for so long says that it lives
    silence: float = 45.0  # whoever reads and hears nothing for so long gives the link up
    trusted: float = 30.0  # a link that was not heard from for so long is not handed out
    retry_interval: float = 30.0  # the longest pause between two tries to reach a server that went away
    drain_timeout: float = 5.0  # after our Error: discard what the peer still sends for so long
    udp_timeout: float = 120.0  # a UDP session without a datagram in either direction; the server waits a quarter longer
    udp_sessions: int = 256  # of one link; at the cap the least recently used makes room
    udp_sessions_in_all: int = 4096  # ... of a server; the key that has most gives way
    udp_backlog: int = 256 * 1024  # bytes that wait for a link; the oldest on top of it are dropped: UDP may lose, it must not lag
    udp_lag: float = 0.2  # ... and those that waited so long for an open link
    accept_pause: float = 1.0  # after EMFILE: accepting again at once would spin
    sweep_interval: float = 1.0  # how often ages are looked at


DEFAULT_LIMITS = Limits()
MAX_CONTENT = 512 * 1024  # of a Data or Datagrams record
MAX_SMALL_CONTENT = 1024  # of any other
LAST_NONCE = 1 << 63  # records of one direction of a link; nobody gets there by counting
KEPT_DATA = 64 * 1024  # what an opener may send before Opened, and keeps until then
MAX_NOISE_MESSAGE = 1024
LEGACY_MAX_FRAME = 128 * 1024 - 256  # the original's BUFFER_SIZE, tag included
MAX_HANDSHAKE_FRAME = 16 * 1024  # legacy: the longest honest one is an Error that quotes a regex
MAX_DATAGRAM = 65507
TRICKLE = 1024  # bytes inside a record that count as heard
DATAGRAMS_AT_ONCE = 64 * 1024  # bytes of them in one record
UNSENT_DATAGRAMS = 64 * 1024  # bytes of them that the kernel may hold back
HEADROOM = 32  # in front of payload in a scratch buffer: frame header (21) and message head (6) are written there
TAILROOM = 64  # behind it: the tag
SCRATCH_IN = MAX_CONTENT + 64 * 1024  # one read of a link: a whole record, and what came with it
SHORT_TURN, SHORT_READ, HURRY = 64 * 1024, 4096, 0.1  # bytes of a turn for so many seconds after a read of less than so many
LENT_AT_ONCE = 128  # such buffers that links hold while a long record is on its way: with 8, 1,000 streams of bulk are a third slower
SPARE_BUFFERS = 8  # ... and that are kept when they are not needed
LOG_RATE, LOG_BURST = 1, 5  # failure lines of one source a second, and at once; the rest is counted
LOG_RATE_IN_ALL, LOG_BURST_IN_ALL = 10, 200  # ... of all of them together, for ten thousand sources fill a disk too; and of one key
EMPTY_FOR = 1.0  # seconds: a list of keys that has been for less is being written
SOURCES = 4096  # that a server remembers, 1 KB each; those that hold nothing make room
RECORDS_IN_TURN = 128  # of one link, some 10 µs each: 512 KiB may hold 23,000
DATAGRAMS_IN_TURN = 256  # of one record, 20 µs each: a record of 512 KiB may hold 87,000
BACKLOG = 1024  # connections that the system takes for a listener before it accepts them
BATCH = 64  # datagrams or accepts that one event may take before others get their turn
TRIES = 3  # of one Open ...
CLOSES = 10  # ... and where each was answered by Close: several servers may be draining
UDP_REST = 5.0  # seconds for which a UDP session whose remote could not be reached is not tried again
GRACE = 1.0  # seconds that a reverse tunnel's listener outlives the last link of its client
CLOCK = getattr(time, "CLOCK_BOOTTIME", None)  # counts while the machine sleeps, as macOS's monotonic clock does
NO_SUCH_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class RatrodError(Exception):
    """Anything that ratrod reports to its user: the thing, the reason and the next step in one line."""

    exit_code = 1


class ConfigError(RatrodError):
    """A wrong argument, key file or setting: nothing was started."""

    exit_code = 2


class UsageError(ConfigError):
    """A command line that cannot be understood."""


class ConnectError(RatrodError):
    """A TCP connection or a name look-up that failed."""


class Overloaded(RatrodError):
    """A client that is known, and one too many for now."""


class PolicyError(RatrodError):
    """A target that this server does not open. The peer is told `REFUSED` and nothing else; this text is for the own log."""


class ProtocolError(RatrodError):
    """The wire protocol was broken."""


class LocalProtocolError(ProtocolError):
    """... by a wrong call of ours."""


class RemoteProtocolError(ProtocolError):
    """... by what the peer sent."""


class AuthenticationError(RemoteProtocolError):
    """A key or signature that is not accepted, ours or the peer's."""

    exit_code = 3


class Revoked(AuthenticationError):
    """A key that was authorized is not any more; said once, for all of its links."""


class PeerError(RemoteProtocolError):
    """The peer ended it with an Error message."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code
        if code == INVALID_KEY:
            self.exit_code = AuthenticationError.exit_code


INVALID_HOST, INVALID_KEY, REMOTE_FAILED, UNKNOWN = range(4)  # codes of Error
SAME_KEY = "server and client use the same key; give one of them another -k (it is `%s`)"
REFUSED = "not allowed by this server"  # one text for every refusal by policy: it teaches a prober nothing


def printable(text: str, limit: int = 200) -> str:
    """What may be shown of a text that came from a peer: no control or escape characters, `limit` characters at most."""
    if text.isprintable() and len(text) <= limit:
        return text
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit]) + ("..." if len(text) > limit else "")


def reason(error: BaseException) -> str:
    """An exception as a user reads it: `Connection refused`, not `[Errno 111] Connection refused`."""
    if isinstance(error, socket.timeout):  # before OSError, which it is too, with no strerror
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


# ======================================================================================================================
# 2. Messages: one tuple a message, one encoder and decoder for all
# ======================================================================================================================
# bincode 2, standard() but big-endian: PROTOCOL.md, part 1. A layout is one letter a field: b bytes, s str, ? bool, v varint.


class ClientPreamble(NamedTuple):
    exchange_public_key: bytes
    remote: str
    challenge: bytes
    should_encrypt: bool
    is_udp: bool


class ServerPreamble(NamedTuple):
    identity_public_key: str
    exchange_public_key: bytes
    signature: bytes
    challenge: bytes


class ClientAuthentication(NamedTuple):
    identity_public_key: str
    signature: bytes


class HandshakeCompletion(NamedTuple):
    pass


class Data(NamedTuple):
    data: bytes


class UdpData(NamedTuple):
    data: bytes


class Error(NamedTuple):
    code: int
    text: str


class Shutdown(NamedTuple):
    pass


class Open(NamedTuple):
    kind: int
    target: str
    instance: bytes = b""


class Session(NamedTuple):
    number: int
    target: str


class SessionOver(NamedTuple):
    number: int
    code: int
    text: str


LEGACY_MESSAGES: tuple[tuple[type[Any], str], ...] = (  # the position is the variant
    (ClientPreamble, "bsb??"), (ServerPreamble, "sbbb"), (ClientAuthentication, "sb"), (HandshakeCompletion, ""),
    (Data, "b"), (UdpData, "b"), (Error, "vs"), (Shutdown, ""),
)
_VARIANTS = {kind: (variant, layout) for variant, (kind, layout) in enumerate(LEGACY_MESSAGES)}
DATA_VARIANT, UDP_DATA_VARIANT = _VARIANTS[Data][0], _VARIANTS[UdpData][0]
_WIDE = {251: 2, 252: 4, 253: 8}  # marker -> bytes of the integer that follows


def encode_varint(n: int) -> bytes:
    """An unsigned integer: 0-250 in one byte, else a marker and 2, 4 or 8 bytes."""
    if n < 251:
        return bytes((n,))
    marker = 251 if n < 1 << 16 else 252 if n < 1 << 32 else 253
    return bytes((marker,)) + n.to_bytes(_WIDE[marker], "big")


class Decoder:
    """Reads the fields of one message from `data`, which must hold it whole: whatever does not fit is RemoteProtocolError."""

    def __init__(self, data: bytes | memoryview):
        self._data = data
        self._at = 0

    def take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            raise RemoteProtocolError("a message ends %d bytes too early" % (n - len(self._data) + self._at))
        self._at += n
        return bytes(self._data[self._at - n:self._at])

    def varint(self) -> int:
        first = self.take(1)[0]
        if first < 251:
            return first
        width = _WIDE.get(first)
        if width is None:
            raise RemoteProtocolError("an integer with the unknown marker %d" % first)
        n = int.from_bytes(self.take(width), "big")
        # bincode never writes a longer form than needed; one encoding for each value leaves nothing to tell apart.
        if len(encode_varint(n)) != width + 1:
            raise RemoteProtocolError("an integer in a longer form than it needs")
        return n

    def bytes(self) -> bytes:
        return self.take(self.varint())

    def str(self) -> str:
        try:
            return self.bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("a text that is not UTF-8") from None

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def instance(self) -> builtins.bytes:
        return self.take(8) if self._at < len(self._data) else b""

    def bool(self) -> bool:
        value = self.take(1)[0]
        if value > 1:
            raise RemoteProtocolError("a truth value of %d" % value)
        return bool(value)

    def rest(self) -> builtins.bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            raise RemoteProtocolError("%d bytes left over after a message" % (len(self._data) - self._at))


_READ: dict[str, Callable[[Decoder], Any]] = {"b": Decoder.bytes, "s": Decoder.str, "?": Decoder.bool, "v": Decoder.varint,
                                              "1": Decoder.u8, "4": Decoder.u32, "i": Decoder.instance}
_WRITE: dict[str, Callable[[Any], bytes]] = {
    "b": lambda data: encode_varint(len(data)) + data,
    "s": lambda text: _WRITE["b"](text.encode("utf-8")),
    "?": lambda value: bytes((value,)),
    "v": encode_varint,
    "1": lambda n: bytes((n,)),
    "4": lambda n: n.to_bytes(4, "big"),
    "i": lambda data: data,
}

# ratrod2's record types; the legacy messages are mapped to them, so that a link need not know its wire.
(COMPLETED, ERROR, OPEN, OPENED, DATA, END, OVER, DATAGRAMS, SESSION, SESSION_OVER, KEEPALIVE, CLOSE) = (
    0x00, 0x01, 0x10, 0x11, 0x12, 0x13, 0x14, 0x20, 0x21, 0x22, 0x30, 0x3f)
UDP_DATA = 0x120  # legacy only: one bare datagram
TCP, UDP, LISTEN = 1, 2, 3  # kinds of Open
_RECORDS: dict[int, tuple[type[Any] | None, str]] = {  # what the content of each type is; None: the only field itself
    COMPLETED: (None, "s"), ERROR: (Error, "vs"), OPEN: (Open, "1si"), OPENED: (None, "s"), END: (None, ""), OVER: (None, ""),
    SESSION: (Session, "4s"), SESSION_OVER: (SessionOver, "4vs"), KEEPALIVE: (None, ""), CLOSE: (None, ""),
}


# Both remember: nearly all of these records are the same few, as the Open of one target, and cost 3 µs each otherwise.


@functools.lru_cache(maxsize=256)
def encode_content(kind: int, *fields: Any) -> bytes:
    """The content of a record of any type but Data and Datagrams."""
    return b"".join(_WRITE[letter](field) for letter, field in zip(_RECORDS[kind][1], fields))


@functools.lru_cache(maxsize=256)
def decode_content(kind: int, content: bytes) -> Any:
    """The message in it; RemoteProtocolError for an unknown type, or for content that is not exactly one."""
    if kind not in _RECORDS:
        raise RemoteProtocolError("a record of the unknown type 0x%02x" % kind)
    make, layout = _RECORDS[kind]
    decoder = Decoder(content)
    fields = [_READ[letter](decoder) for letter in layout]
    decoder.end()
    return make(*fields) if make else fields[0] if fields else None


def encode_message(message: Any) -> bytes:
    variant, layout = _VARIANTS[type(message)]
    return encode_varint(variant) + b"".join(_WRITE[kind](field) for kind, field in zip(layout, message))


def decode_message(data: bytes | memoryview) -> Any:
    """One of LEGACY_MESSAGES from its whole encoding; RemoteProtocolError for anything else."""
    decoder = Decoder(data)
    variant = decoder.varint()
    if variant >= len(LEGACY_MESSAGES):
        raise RemoteProtocolError("a message of the unknown kind %d" % variant)
    kind, layout = LEGACY_MESSAGES[variant]
    message = kind(*[_READ[letter](decoder) for letter in layout])
    decoder.end()
    return message


# ======================================================================================================================
# 3. Keys, key files and policy
# ======================================================================================================================

_PKCS8_HEAD = bytes.fromhex("3051020101300506032b657004220420")  # RFC 8410, as the original writes it: then the seed,
_PKCS8_MIDDLE = bytes.fromhex("812100")  # then this, then the public key
KEY_FILES = ("key", "key.pub", "known_hosts", "authorized_keys")


@functools.lru_cache(maxsize=None)
def sodium() -> Any:
    """nacl.bindings, imported on first use: help and usage errors need no PyNaCl."""
    try:
        import nacl.bindings
    except ImportError as error:
        raise ConfigError("PyNaCl is missing (%s): install it with `pip install pynacl`, on Debian with `apt install python3-nacl`"
                          % printable(str(error))) from None
    return nacl.bindings


def encode_key(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def decode_key(text: str, size: int = 32) -> bytes:
    """`size` raw bytes from unpadded base64url; ValueError unless it encodes back to exactly `text`.

    Python's decoder skips characters it does not know and ignores spare bits: two texts for one key would make "the same key" mean two things.
    (From 3.15 on it warns of some of them.)
    """
    length = (size * 4 + 2) // 3
    if len(text) == 2 * length:  # `cat key.pub >> authorized_keys`, twice: key.pub has no newline
        raise ValueError("it looks like two keys in one line; each needs a line of its own")
    if len(text) != length:
        raise ValueError("it has %d characters instead of %d" % (len(text), length))
    is_known = re.fullmatch("[A-Za-z0-9_-]*", text)
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if is_known else b""
    if encode_key(raw) != text:
        raise ValueError("it is not unpadded base64url")
    return raw


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is the Ed25519 signature of `message` under `public` (32 bytes)."""
    import nacl.exceptions

    if len(public) != 32 or len(signature) != 64:
        return False
    try:
        sodium().crypto_sign_open(signature + message, public)
    except (nacl.exceptions.BadSignatureError, ValueError):
        return False
    return True


class KeyPair(NamedTuple):
    """An Ed25519 identity: 32 bytes of seed, and the public key that follows from it."""

    seed: bytes
    public: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        return cls(seed, sodium().crypto_sign_seed_keypair(seed)[0])

    @classmethod
    def decode(cls, text: str) -> KeyPair:
        """From the text of a `key` file: base64url of 83 bytes (PKCS#8 version 2). ValueError says what is wrong."""
        raw = decode_key(text, 83)
        seed, public = raw[16:48], raw[51:]
        if raw != _PKCS8_HEAD + seed + _PKCS8_MIDDLE + public:
            raise ValueError("it is not an Ed25519 key in PKCS#8")
        pair = cls.from_seed(seed)
        if pair.public != public:
            raise ValueError("its public half does not belong to its private half")
        return pair

    def encode(self) -> str:
        return encode_key(_PKCS8_HEAD + self.seed + _PKCS8_MIDDLE + self.public)

    def sign(self, message: bytes) -> bytes:
        return sodium().crypto_sign(message, self.seed + self.public)[:64]

    def exchange_key(self) -> bytes:
        """The private X25519 form of this identity."""
        return sodium().crypto_sign_ed25519_sk_to_curve25519(self.seed + self.public)

    def __repr__(self) -> str:  # never the seed: a repr ends in logs
        return "KeyPair(%s)" % encode_key(self.public)


class Pattern(NamedTuple):
    """A target as permitopen and permitlisten write it: port 0 is any, host `*` any, `*.example.com` any below it; or one Unix socket."""

    host: str
    port: int

    def matches(self, target: Address) -> bool:
        if target.is_unix or self.host.startswith("/"):
            return self.host == target.host
        below = self.host.startswith("*.") and not is_address(target.host) and target.host.endswith(self.host[1:])
        return self.port in (0, target.port) and (below or self.host in ("*", target.host))


def parse_pattern(text: str) -> Pattern:
    """ValueError says what is wrong."""
    if text.startswith("unix:"):
        return Pattern(parse_path(text[5:]), 0)
    host, port = split_pair(text)
    star = "*." if host.startswith("*.") else ""
    return Pattern("*" if host == "*" else star + parse_host(host[len(star):]), 0 if port == "*" else parse_port(port))


class Grant(NamedTuple):
    """What one line of authorized_keys allows its key. `expires`: seconds since the epoch; no pattern: everything."""

    permitopen: tuple[Pattern, ...] = ()
    permitlisten: tuple[Pattern, ...] = ()
    no_udp: bool = False
    no_legacy: bool = False
    expires: float = float("inf")
    comment: str = ""

    def opens(self, target: Address) -> bool:
        return not self.permitopen or any(pattern.matches(target) for pattern in self.permitopen)

    def listens(self, address: Address) -> bool:
        plain = address._replace(host="127.0.0.1" if address.host == "localhost" else address.host)
        return not self.permitlisten or any(pattern.matches(plain) or pattern.matches(address) for pattern in self.permitlisten)


def parse_grant(words: list[str]) -> Grant:
    """`[option ...] [comment]` behind a key. ValueError for what may have been meant as an option: it must not pass for a comment."""
    grant = Grant()
    fields: dict[str, Any]
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        quoted = re.fullmatch(r'"([^"]*)"', value)
        if name in ("permitopen", "permitlisten") and quoted:
            text = quoted.group(1)
            bare = name == "permitlisten" and re.fullmatch(r"[0-9]+|\*", text, re.ASCII)
            fields = {name: getattr(grant, name) + (parse_pattern("127.0.0.1:" + text if bare else text),)}
            grant = grant._replace(**fields)
        elif name == "expires" and quoted:
            grant = grant._replace(expires=min(grant.expires, parse_date(quoted.group(1))))
        elif word in ("no-udp", "no-legacy"):
            fields = {word.replace("-", "_"): True}
            grant = grant._replace(**fields)
        else:
            meant = next((later for later in words[number:] if "=" in later or re.match("permit|no-|expire", later)), None)
            if meant is not None:
                raise ValueError("`%s` is no option, or stands behind the comment" % printable(meant))
            return grant._replace(comment=printable(" ".join(words[number:]), 60))
    return grant


def parse_date(text: str) -> float:
    """The first second (UTC) of a day written 2027-01-31; ValueError where there is no such day."""
    import datetime

    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
        raise ValueError("`%s` is not a date (as 2027-01-31)" % printable(text))
    return datetime.datetime.strptime(text + " +0000", "%Y-%m-%d %z").timestamp()


def parse_where(words: list[str]) -> str | None:
    """The `host:port` that a line of known_hosts is bound to."""
    return words[0] if words else None


Line = Tuple[int, Any]  # its number, and what stands behind the key


class KeyLines:
    """The lines `KEY [word]...` of authorized_keys or known_hosts, `parse` making something of the words; read again whenever the file
    has changed. `problems` says which lines mean nothing. Safe from any thread."""

    USELESS = "authorizes nobody"

    def __init__(self, path: str, parse: Callable[[list[str]], Any]):
        self.path, self._parse_words = path, parse
        self.problems: list[str] = []
        self._cache: tuple[Any, dict[bytes, tuple[Line, ...]]] = (None, {})
        self._round: float | None = None
        self._is_stale = False

    def read(self, now: float | None = None) -> dict[bytes, tuple[Line, ...]]:
        """The lines of each key. A file that cannot be read, or a line that cannot, lists nobody. `now`: of the loop's round; the file
        is looked at once in each."""
        if now is None or now != self._round:
            self._cache = self._read()
            self._round = now
        return self._cache[1]

    def forget(self) -> None:
        """The next read() looks into the file, whatever its times say."""
        self._is_stale, self._round = True, None

    def _read(self) -> tuple[Any, dict[bytes, tuple[Line, ...]]]:
        signature: Any = None
        try:
            status = os.stat(self.path)
            signature = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            if not self._is_stale and self._holds(status, signature):
                return self._cache
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines, problems = self._parse(file)
        except OSError as error:
            # Out of descriptors is no reason to throw everybody out, as long as the file is the one that was read.
            if error.errno in NO_SUCH_DESCRIPTORS and signature == self._cache[0]:
                return self._cache
            signature = None  # this is not what the file says: it is looked at again the next time
            lines, problems = {}, ["`%s` cannot be read, which counts as empty: %s" % (self.path, reason(error))]
        self.problems, self._is_stale = problems, False
        # The same object where nothing is new: whoever looks for changes sees none.
        return signature, self._cache[1] if lines == self._cache[1] else lines

    def _holds(self, status: os.stat_result, signature: Any) -> bool:
        """Whether what was read before still is what the file says, or is meant to."""
        before, now = self._cache[0], time.time()
        # A file changed twice within one tick of its clock keeps its time: one that is younger than 2 s is not trusted to a cache.
        if signature == before:
            return now - max(status.st_mtime, status.st_ctime) > 2
        # Some editors empty a file before they write it anew. To look just then would throw everybody out, and clients for good; one that is
        # meant to be empty still is so a second later.
        return bool(before and before[2] and not status.st_size and status.st_ino == before[3] and 0 <= now - status.st_mtime < EMPTY_FOR)

    def _parse(self, lines: Iterable[str]) -> tuple[dict[bytes, tuple[Line, ...]], list[str]]:
        keys: dict[bytes, tuple[Line, ...]] = {}
        problems = []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                key = decode_key(words[0])
                keys[key] = keys.get(key, ()) + ((number, self._parse_words(words[1:])),)
            except ValueError as error:
                problems.append("line %d of `%s` %s: %s" % (number, self.path, self.USELESS, error))
        return keys, problems


class UnknownHost(AuthenticationError):
    """The server's key is not in known_hosts."""

    def __init__(self, key: bytes, address: str, path: str):
        super().__init__("Server's public key `%s` is not in the known hosts file. If it is the right one (`ratrod keygen` and the server's"
                         " key.pub show it), add this line to `%s`: %s %s" % (encode_key(key), path, encode_key(key), address))
        self.key, self.address = key, address


class KnownHosts(KeyLines):
    """Which key each server has. Lines bound to an address count alone for it; a bare KEY counts for any other."""

    USELESS = "is not understood"

    def __init__(self, path: str):
        super().__init__(path, parse_where)
        self._accepted: dict[str, bytes] = {}  # holds for this run, also where the file could not be written

    def check(self, key: bytes, address: str) -> None:
        """UnknownHost where no line speaks of this server, AuthenticationError where one knows another key for it."""
        lines = [(listed, *line) for listed, all_lines in self.read().items() for line in all_lines]
        bound = [(listed, "line %d of `%s`" % (number, self.path)) for listed, number, where in lines if where == address]
        if address in self._accepted and not bound:
            bound = [(self._accepted[address], "what was accepted before")]
        if bound and key not in [listed for listed, _ in bound]:
            listed, place = bound[0]
            raise AuthenticationError(
                "THE KEY OF THE SERVER `%s` HAS CHANGED: it shows `%s`, and %s says `%s`. Somebody may stand in between and pretend to be it."
                " Only if you know why it has another key now, replace that line by: %s %s"
                % (address, encode_key(key), place, encode_key(listed), encode_key(key), address))
        if not bound and key not in [listed for listed, _, where in lines if where is None]:
            raise UnknownHost(key, address, self.path)

    def add(self, key: bytes, address: str) -> str:
        """Trusts `key` for `address` from now on: "", or why it could not be written down and so holds for this run only."""
        self._accepted[address] = key
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(size - 1)
                newline = b"\n" if size and file.read(1) != b"\n" else b""
                file.write(newline + ("%s %s\n" % (encode_key(key), address)).encode())
        except OSError as error:
            return "cannot write to `%s`: %s" % (self.path, reason(error))
        return ""


def link_file(existing: str, path: str) -> None:
    """The file under a second name; FileExistsError where there is one: of two that generate keys at once, one wins."""
    try:
        os.link(existing, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "a file is there already") from None
        os.rename(existing, path)


class KeyFolder:
    """The four security files. `warnings` holds what a user should be told once."""

    def __init__(self, key_path: str | None = None):
        path = os.path.expanduser(key_path or os.path.join("~", ".ratrod"))
        self.key_file = path if os.path.isfile(path) else os.path.join(path, "key")
        self.path = os.path.dirname(self.key_file) or "."
        self.authorized_keys = KeyLines(os.path.join(self.path, "authorized_keys"), parse_grant)
        self.known_hosts = KnownHosts(os.path.join(self.path, "known_hosts"))
        self.warnings: list[str] = []

    def exists(self) -> bool:
        try:
            os.lstat(self.key_file)
        except FileNotFoundError:
            return False
        except OSError:  # there or not, it cannot be told: load() says why, and nothing is generated over it
            pass
        return True

    def load(self) -> KeyPair:
        """The identity in the key file. ConfigError names the file, what is wrong with it and what to do."""
        pair = self._read(self.key_file, KeyPair.decode)
        status = os.stat(self.key_file)
        mode = status.st_mode
        # As ssh has it: only the owner can do something about it. A Kubernetes secret belongs to root, and is read through its group.
        if os.name == "posix" and mode & 0o077 and status.st_uid == os.getuid():
            self.warnings.append("The private key `%s` can be read by others (mode %04o); make it yours alone: chmod 600 %s"
                                 % (self.key_file, stat.S_IMODE(mode), self.key_file))
        if self._check_writers(self.path):
            for keys in self.authorized_keys, self.known_hosts:
                self._check_writers(keys.path)
        public_file = self.key_file + ".pub"
        try:
            if self._read(public_file, decode_key) != pair.public:
                raise ConfigError("it belongs to another key")
        except ConfigError as error:
            # Only people read key.pub; ratrod derives the public key from the private one.
            self.warnings.append("`%s` does not show this key (%s); the right line is: %s" % (public_file, error, encode_key(pair.public)))
        return pair

    def _check_writers(self, path: str) -> bool:
        """Whoever can write to the lists decides who comes in, and which server is the right one. Whether others come that far."""
        mode = 0
        with contextlib.suppress(OSError):
            status = os.stat(path)
            mode = stat.S_IMODE(status.st_mode)
            # In a folder as /tmp (sticky) nobody replaces what is another's.
            sticky = mode & stat.S_ISVTX and stat.S_ISDIR(status.st_mode)
            if os.name == "posix" and mode & 0o022 and not sticky and status.st_uid == os.getuid():
                self.warnings.append("`%s` can be changed by others (mode %04o), who could let themselves in; make it yours alone: chmod go-w %s"
                                     % (path, mode, path))
        return bool(mode & 0o011)

    @staticmethod
    def _read(path: str, decode: Callable[[str], Any]) -> Any:
        try:
            with open(path, encoding="utf-8") as file:
                return decode(file.read(1000).strip())
        except OSError as error:
            raise ConfigError("cannot read the key file `%s`: %s" % (path, reason(error))) from None
        except ValueError as error:
            raise ConfigError("the key file `%s` is damaged: %s. Move it away and make another with `ratrod keygen`" % (path, error)) from None

    def generate(self) -> KeyPair:
        """Writes a new identity and empty lists into the folder; never over a file that is there. ConfigError says what failed."""
        pair = KeyPair.from_seed(os.urandom(32))
        contents = (pair.encode(), encode_key(pair.public), "", "")
        try:
            for name in KEY_FILES[:2]:
                if os.path.lexists(os.path.join(self.path, name)):
                    raise FileExistsError(errno.EEXIST, "there is a `%s` already" % name)
            if not os.path.isdir(self.path):
                os.makedirs(self.path, mode=0o700)
            # The private key last: only its presence says that the folder is complete.
            for name, text in reversed(tuple(zip(KEY_FILES, contents))):
                path = os.path.join(self.path, name)
                if name.startswith("key") or not os.path.lexists(path):
                    self._write(path, text, fresh=name == "key")
        except OSError as error:
            raise ConfigError("cannot write the security files to `%s`: %s" % (self.path, reason(error))) from None
        return pair

    @staticmethod
    def _write(path: str, text: str, fresh: bool) -> None:
        """Under a temporary name first: whoever looks sees the whole file or none. `fresh`: fail where the file is there already."""
        temporary = "%s.%d.tmp" % (path, os.getpid())
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            if fresh:
                link_file(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


class NoKeys(KeyFolder):
    """In place of a key folder where ssh has done all that keys are for. The pair in it can do nothing."""

    def load(self) -> KeyPair:
        return KeyPair(b"", b"")


class Address(NamedTuple):
    """A host (a name, an IPv4 or an IPv6 address without brackets) and a port; shown with brackets where it needs them. Or the path of a
    Unix socket, and port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        if self.is_unix:
            return "unix:" + self.host
        return ("[%s]:%d" if ":" in self.host else "%s:%d") % (self.host, self.port)

    @property
    def is_unix(self) -> bool:
        return self.host.startswith("/")


def is_address(host: str) -> bool:
    return ":" in host or host.rsplit(".", 1)[-1].isdigit()  # parse_host() has made sure of the rest


def unmapped(host: str) -> str:
    """An address as people know it: ::ffff:10.0.0.1 is 10.0.0.1."""
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def show_address(address: Any) -> str:
    """A socket address as people write it; that of a Unix socket's other end says nothing."""
    return str(Address(unmapped(address[0]), address[1])) if isinstance(address, tuple) else "unix"


def parse_networks(text: str) -> tuple[Any, ...]:
    """`10.0.0.7,10.1.0.0/16,::1` as networks; ConfigError names what is none."""
    import ipaddress

    try:
        if "%" in text:
            raise ValueError("a zone says nothing there")
        return tuple(ipaddress.ip_network(word.strip()) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError("--proxy-protocol takes addresses and networks, as 10.0.0.7,10.1.0.0/16: %s" % error) from None


def is_within(host: str, networks: tuple[Any, ...]) -> bool:
    import ipaddress

    address = ipaddress.ip_address(unmapped(host.split("%")[0]))
    return any(address in network for network in networks)


_PIECE = r"(?:\[([^\[\]:]*:[^\[\]]*)\]|([^:\[\]]*))"


def split_host_port(text: str) -> list[str]:
    """`a:b:c` at its colons, brackets around IPv6 addresses taken off: `[::1]:80` is ::1 and 80. ValueError where brackets do not fit."""
    if not re.fullmatch("%s(?::%s)*" % (_PIECE, _PIECE), text):
        raise ValueError("its brackets do not fit; an IPv6 address is written [::1]")
    return [bracketed or plain for bracketed, plain in re.findall("(?:^|:)" + _PIECE, text)]


def split_pair(text: str) -> list[str]:
    pieces = split_host_port(text)
    if len(pieces) != 2:
        raise ValueError("`%s` is not host:port" % printable(text))
    return pieces


def parse_port(text: str, lowest: int = 1) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,4}", text, re.ASCII) or not lowest <= int(text) <= 65535:
        raise ValueError("`%s` is not a port (%d-65535)" % (printable(text), lowest))
    return int(text)


def parse_host(text: str) -> str:
    """A strict host in canonical form: a lower-case name, a dotted quad or an IPv6 address, a mapped IPv4 address unwrapped.

    What only some resolvers take for an address (127.1, 0x7f000001, 017700000001, full-width digits) is refused: it would reach
    loopback past a rule that compares text. So is an empty host, which connect() takes for loopback too. ValueError says why.
    """
    import ipaddress

    if ":" in text:
        if "%" in text:
            raise ValueError("an IPv6 address with a zone")
        try:
            v6 = ipaddress.IPv6Address(text)
        except ValueError:  # which quotes all of it
            raise ValueError("`%s` is not an IPv6 address" % printable(text)) from None
        return str(v6.ipv4_mapped or v6)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text, re.ASCII):
        raise ValueError("`%s` is not a host name or address" % printable(text))
    host = text.lower()
    host = host[:-1] if host.endswith(".") else host
    last = host.rsplit(".", 1)[-1]
    if not last or host.startswith(".") or ".." in host:
        raise ValueError("`%s` has an empty label" % printable(text))
    if last.isdigit() or last.startswith("0x"):
        octet = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
        if not re.fullmatch(r"%s(?:\.%s){3}" % (octet, octet), host):
            raise ValueError("`%s` is not a dotted quad (as 127.0.0.1)" % printable(text))
    return host


def parse_target(text: str) -> Address:
    """`host:port`, `[v6]:port` or `unix:/path` as a strict Address; ValueError says what is wrong."""
    if text.startswith("unix:/"):
        return Address(parse_path(text[5:]), 0)
    host, port = split_pair(text)
    return Address(parse_host(host), parse_port(port))


def parse_path(text: str) -> str:
    """The path of a Unix socket, in the one form that a rule can be compared with; ValueError says what is wrong."""
    if not text.startswith("/") or text == "/" or text.startswith("//") or os.path.normpath(text) != text or ":" in text or not text.isprintable():
        raise ValueError("`%s` is not the plain absolute path of a Unix socket, without a colon" % printable(text))
    if len(os.fsencode(text)) > 100:
        raise ValueError("the path of a Unix socket has at most 100 bytes")
    return text


class Policy:
    """What a server opens for its clients: targets whose whole `host` or whole `host:port` matches a regular expression, and that the
    client's grants allow. A Unix socket has to be named by one of the two."""

    def __init__(self, regex: str = ".*"):
        import warnings

        self._restricted = regex != ".*"
        try:
            with warnings.catch_warnings():
                # `[[:alpha:]]` compiles with a FutureWarning and then means something else: a rule that is misread lets strangers in.
                warnings.simplefilter("error")
                self._regex, self._exact = re.compile(regex, re.IGNORECASE), re.compile(regex)
        except (re.error, Warning, RuntimeError, OverflowError) as error:  # 3.8 has an "invalid SRE code" for `(?(2))|`
            raise ConfigError("cannot use the remote regex `%s`: %s" % (regex, error)) from None

    def _matches(self, target: Address) -> bool:
        if target.is_unix and self._restricted:
            # `.*db.*` means machines: what shall reach a docker.sock has to say that it means Unix sockets.
            return "unix:" in self._regex.pattern and bool(self._exact.fullmatch(str(target)))
        return any(self._regex.fullmatch(text) for text in (target.host, str(target)))

    def _granted(self, target: Address, grants: tuple[Grant, ...]) -> bool:
        return any(grant.opens(target) and (self._restricted or bool(grant.permitopen) or not target.is_unix) for grant in grants)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a policy lives as long as its server; 10 µs for each connection otherwise
    def check(self, text: str, grants: tuple[Grant, ...] = (Grant(),)) -> Address:
        """The target that a client named, before anything is looked up. PolicyError where it may not be opened."""
        try:
            target = parse_target(text)
        except ValueError as error:
            raise PolicyError("not a target: %s" % printable(str(error))) from None
        if not self._matches(target):
            raise PolicyError("`%s` does not match the remote regex" % str(target))
        if not self._granted(target, grants):
            raise PolicyError("`%s` is not what authorized_keys permits this key to open" % str(target))
        return target

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - the same
    def check_addresses(self, target: Address, found: tuple[str, ...], grants: tuple[Grant, ...] = (Grant(),)) -> list[str]:
        """Those of the addresses that a look-up of target.host `found` which may be connected to; PolicyError where none is left.

        A name under somebody else's control can resolve to loopback or link-local: where targets are restricted at all, such an
        address has to be allowed by itself, unless the name is localhost.
        """
        import ipaddress

        allowed = []
        for text in found:
            found_address = ipaddress.ip_address(text.split("%")[0])
            address = getattr(found_address, "ipv4_mapped", None) or found_address
            inside = address.is_loopback or address.is_link_local
            named = target.host in ("localhost", str(address))
            plain = Address(str(address), target.port)
            if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
                continue
            if inside and not named and not (self._matches(plain) and self._granted(plain, grants)):
                continue
            allowed.append(str(address))
        if not allowed:
            raise PolicyError("`%s` resolves to addresses that may not be opened" % str(target))
        return allowed


FORWARD, SOCKS, STDIO, REVERSE = "forward", "socks", "stdio", "reverse"  # kinds of tunnels
NOWHERE = Address("", 0)


class TunnelSpec(NamedTuple):
    """One TUNNEL of the command line: listen on `local` (port 0: a free one), for `remote` as the server sees it. REVERSE: the server
    listens, and `remote` is what the client sees; without a host it is the server's loopback."""

    local: Address
    remote: Address
    kind: str = FORWARD


def parse_tunnels(text: str) -> list[TunnelSpec]:
    """parse_tunnel() for each port of a range: `8000-8010:host:9000-9010`."""
    reverse = "R:" if text.startswith("R:") else ""
    pieces = re.split(r":(?![^\[]*\])", text[len(reverse):])
    places = {1: (0,), 2: (0, 1), 3: (0, 2), 4: (1, 3)}.get(len(pieces), ())
    spans = [re.fullmatch("([1-9][0-9]{0,4})-([1-9][0-9]{0,4})", pieces[place], re.ASCII) for place in places]
    if not any(spans):
        return [parse_tunnel(text)]
    ranges = [range(int(span.group(1)), int(span.group(2)) + 1) for span in spans if span]
    if not all(spans) or len({len(ports) for ports in ranges}) > 1 or not 1 <= len(ranges[0]) <= 1000 or max(map(max, ranges)) > 65535:
        raise ConfigError("cannot understand the tunnel `%s`: its ranges of ports must be equally long, upwards, and of at most 1000 ports,"
                          " as 8000-8010:host:9000-9010" % printable(text))
    found = []
    for ports in zip(*ranges):
        for place, port in zip(places, ports):
            pieces[place] = str(port)
        found.append(parse_tunnel(reverse + ":".join(pieces), typed=text))
    return found


def parse_tunnel(text: str, typed: str | None = None) -> TunnelSpec:
    """One tunnel in any of its forms; ConfigError says what is wrong with it, or with the range that was typed, and shows them."""
    try:
        if text.startswith("R:"):
            return _parse_reverse(text[2:])
        if text.startswith("stdio:"):
            return TunnelSpec(NOWHERE, parse_target(text[6:]), STDIO)
        special = re.fullmatch(r"(unix:/[^:]*|.*?):(socks|unix:/.*)", text)
        if special:
            socks = special.group(2) == "socks"
            return TunnelSpec(_parse_local(special.group(1)), NOWHERE if socks else parse_target(special.group(2)), SOCKS if socks else FORWARD)
        if text.startswith("unix:/"):
            path, _, target = text[5:].partition(":")
            return TunnelSpec(Address(parse_path(path), 0), parse_target(target))
        return _parse_classic(text, "127.0.0.1")
    except ValueError as error:
        raise ConfigError("cannot understand the tunnel `%s`: %s. The forms are [local_host:[local_port:[remote_host:]]]remote_port, as"
                          " 2000:db:5432; [host:]port:socks; stdio:host:port; unix:/path in place of host:port; and R:[host:]port:host:port"
                          % (printable(typed or text), error)) from None


def _parse_classic(text: str, local_host: str) -> TunnelSpec:
    """[local_host:[local_port:[remote_host:]]]remote_port"""
    pieces = split_host_port(text)
    if not 1 <= len(pieces) <= 4:
        raise ValueError("it has %d parts" % len(pieces))
    remote_port = parse_port(pieces[-1])
    local_port = parse_port(pieces[-3 if len(pieces) > 2 else 0], lowest=0 if len(pieces) > 1 else 1)
    remote_host = parse_host(pieces[-2]) if len(pieces) > 2 else "127.0.0.1"
    if len(pieces) == 4:
        local_host = pieces[0]
        if not local_host or local_host.startswith("/"):  # a path is written unix:/path
            raise ValueError("its local host is %s" % ("a path" if local_host else "empty"))
    return TunnelSpec(Address(local_host, local_port), Address(remote_host, remote_port))


def _parse_local(text: str, host: str = "127.0.0.1") -> Address:
    """`[host:]port` or `unix:/path`"""
    if text.startswith("unix:/"):
        return Address(parse_path(text[5:]), 0)
    pieces = split_host_port(text)
    if len(pieces) > 2 or not pieces[0] or pieces[0].startswith("/"):
        raise ValueError("`%s` is not [host:]port" % printable(text))
    return Address(pieces[0] if len(pieces) == 2 else host, parse_port(pieces[-1], lowest=0))


def _parse_reverse(text: str) -> TunnelSpec:
    special = re.fullmatch(r"(.*?):(unix:/.*)", text)
    if special and not special.group(1).startswith("unix"):
        return TunnelSpec(_parse_local(special.group(1), ""), parse_target(special.group(2)), REVERSE)
    return _parse_classic(text, "")._replace(kind=REVERSE)


def parse_bind(text: str) -> Address:
    """What a client asks a server to listen on, `[address:]port`; a bare port is loopback. ValueError says what is wrong."""
    address = _parse_local(text)
    host = parse_host(address.host)
    if not (is_address(host) or host == "localhost"):
        raise ValueError("`%s` is not an address" % printable(text))
    return address._replace(host=host)


class SshHost(NamedTuple):
    """Where the system's ssh goes; user "" and port 0 are what its configuration says."""

    user: str
    host: str
    port: int

    def __str__(self) -> str:
        user, host = self.user and self.user + "@", "[%s]" % self.host if ":" in self.host else self.host
        return "ssh://%s%s%s" % (user, host, ":%d" % self.port if self.port else "")


Place = Union[Address, SshHost]


def parse_servers(text: str) -> list[Place]:
    """`a:1,b:2` or `ssh://a,ssh://b`; ConfigError says what is wrong."""
    words = [word.strip() for word in text.split(",")]
    over_ssh = [word.startswith("ssh://") for word in words]
    if any(over_ssh) and not all(over_ssh):
        raise ConfigError("the servers `%s` are of two kinds: take either host:port for all, or ssh://host" % printable(text))
    return list(dict.fromkeys(parse_ssh(word) if over_ssh[0] else parse_endpoint(word, "server") for word in words))


def parse_ssh(text: str) -> SshHost:
    """`ssh://[user@]host[:port]`, the host as ssh's configuration knows it. Nothing that ssh or a shell could take for more than a name."""
    match = re.fullmatch(r"ssh://(?:([\w.+][\w.+-]*)@)?(?:([\w.][\w.-]*)|\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\])(?::([^/]*))?/?", text, re.ASCII)
    try:
        if not match:
            raise ValueError("it is not ssh://[user@]host[:port], with names of letters, digits and ._- that do not begin with -")
        user, name, v6, port = match.groups()
        return SshHost(user or "", name or v6, parse_port(port) if port is not None else 0)
    except ValueError as error:
        raise ConfigError("cannot understand the server `%s`: %s" % (printable(text), error)) from None


def parse_endpoint(text: str, what: str, lowest: int = 1) -> Address:
    """BIND or SERVER: `host:port`, the host as the system's resolver understands it. ConfigError says what is wrong."""
    try:
        host, port = split_host_port(text)
        if not host or host.startswith("/"):
            raise ValueError("its host is %s" % ("a path" if host else "empty"))
        return Address(host, parse_port(port, lowest))
    except ValueError as error:
        why = "it is not host:port" if "unpack" in str(error) else str(error)
        raise ConfigError("cannot understand the %s `%s`: %s. It is written host:port, as 0.0.0.0:19000 or [::1]:19000"
                          % (what, printable(text), why)) from None


class Proxy(NamedTuple):
    """A proxy on the way to the server; shown without its password."""

    scheme: str
    address: Address
    user: bytes | None
    password: bytes

    def __str__(self) -> str:
        return "%s://%s" % (self.scheme, self.address)

    def __repr__(self) -> str:
        return str(self)


def parse_proxy(url: str | None, servers: Iterable[Place]) -> Proxy | None:
    """`http://[user:password@]host[:port]` or `socks5://...`, to be asked for `servers`; ConfigError says what is wrong."""
    if url is None:
        return None
    from urllib.parse import unquote_to_bytes

    match = re.fullmatch(r"(http(?=:)|socks5)h?://(?:([^:]*)(?::(.*))?@)?([^@/]+?)/?", url, re.DOTALL)
    try:
        if not match:
            raise ValueError("it is not http://[user:password@]host[:port] or socks5://[user:password@]host[:port]")
        user, password = (None if part is None else unquote_to_bytes(part) for part in match.group(2, 3))
        if user is not None and match.group(1) == "http" and b":" in user:
            raise ValueError("HTTP has no user with a colon")
        if max(len(user or b""), len(password or b"")) > 255:
            raise ValueError("a user or password of more than 255 bytes")
        pieces = split_host_port(match.group(4))
        address = Address(pieces[0], parse_port(":".join(pieces[1:])) if pieces[1:] else 1080)
        if not pieces[0]:
            raise ValueError("its host is empty")
    except ValueError as error:
        raise ConfigError("cannot understand the --proxy: %s. It is written as http://user:password@proxy:3128 or socks5://[::1]:1080, with what is"
                          " neither letter nor digit in a name or password written as %%40" % error) from None
    for server in servers:
        try:
            parse_host(server.host)
        except ValueError as error:
            raise ConfigError("no proxy can be asked for the server `%s`: %s" % (printable(str(server)), error)) from None
    return Proxy(match.group(1), address, user, password or b"")


# ======================================================================================================================
# 4. Ciphers
# ======================================================================================================================


FORGED = "a record failed its authentication: it was damaged or forged on the way"


class Aead:
    """One cipher of libsodium, sealing and opening in place: no copy, no allocation.

    `nacl._sodium` is a private name of PyNaCl and several times as fast as its public functions, which copy; where it is missing
    or shaped otherwise, those do the same work. Both are closures: a record of a few bytes costs more calls than cipher.

    seal(view, nonce, key, aad=b"") encrypts view[:-tag] in place and writes the tag behind it.
    open(view, nonce, key, aad=b"") decrypts `view`, tag included, in place: the plaintext. RemoteProtocolError where it was not
    sealed with these.
    """

    __slots__ = ("name", "tag", "fast", "seal", "open")

    def __init__(self, name: str, tag: int, fast: bool = True):
        self.name, self.tag = name, tag
        pair = self._private() if fast else None
        self.fast = pair is not None
        self.seal, self.open = pair or self._public()

    def _public(self) -> tuple[Callable[..., None], Callable[..., memoryview]]:
        encrypt = getattr(sodium(), "crypto_aead_%s_encrypt" % self.name)
        decrypt = getattr(sodium(), "crypto_aead_%s_decrypt" % self.name)
        tag = self.tag
        import nacl.exceptions

        def seal(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            view[:] = encrypt(bytes(view[:-tag]), aad, nonce, key)

        def open_(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> memoryview:
            try:
                view[:-tag] = decrypt(bytes(view), aad, nonce, key)
            except (nacl.exceptions.CryptoError, ValueError):
                raise RemoteProtocolError(FORGED) from None
            return view[:-tag]
        return seal, open_

    def _private(self) -> tuple[Callable[..., None], Callable[..., memoryview]] | None:
        sodium()  # sodium_init(): without it libsodium uses its slow portable code
        try:
            from nacl._sodium import ffi, lib
            encrypt = getattr(lib, "crypto_aead_%s_encrypt" % self.name)
            decrypt = getattr(lib, "crypto_aead_%s_decrypt" % self.name)
        except (ImportError, AttributeError):
            return None
        null, tag, from_buffer = ffi.NULL, self.tag, ffi.from_buffer

        def seal(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            at = from_buffer(view)
            encrypt(at, null, at, len(view) - tag, aad, len(aad), null, nonce, key)

        def open_(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> memoryview:
            at = from_buffer(view)
            # Its own check of the length: libsodium's says nothing of where a shorter one would be written.
            wrong = len(view) < tag or decrypt(at, null, null, at, len(view), aad, len(aad), nonce, key)
            del at  # an error's traceback must not keep it: CPython's collector crashes on a view that is exported so (found by fuzzing)
            if wrong:
                raise RemoteProtocolError(FORGED)
            return view[:-tag]
        return seal, open_


class Suite(NamedTuple):
    """A cipher suite of ratrod2. Sizes in bytes; `nonce` makes one of a record's number."""

    id: int
    name: str
    key_size: int
    aead: Aead
    nonce: Callable[[int], bytes]


@functools.lru_cache(maxsize=None)
def chacha20_poly1305() -> Suite:
    return Suite(2, "ChaCha20-Poly1305", 32, Aead("chacha20poly1305_ietf", 16), struct.Struct("<4xQ").pack)


@functools.lru_cache(maxsize=None)
def aegis_128l() -> Suite | None:
    """AEGIS-128L, or None where this libsodium lacks it, has another tag, or would compute it in software (25 MB/s: measured)."""
    if getattr(sodium(), "crypto_aead_aegis128l_ABYTES", None) != 32:
        return None
    suite = Suite(1, "AEGIS-128L", 16, Aead("aegis128l", 32), struct.Struct("<Q8x").pack)
    return suite if _aes_in_hardware(suite) else None


def _aes_in_hardware(suite: Suite) -> bool:
    try:
        from nacl._sodium import lib
        return bool(lib.crypto_aead_aes256gcm_is_available())
    except (ImportError, AttributeError):
        pass
    # The public functions do not say: 64 KiB take 0.1 ms in hardware and 2.5 ms in software. The best of five, so that a busy
    # machine does not look like a slow one.
    view, times = memoryview(bytearray(64 * 1024 + suite.aead.tag)), []
    for number in range(5):
        started = time.perf_counter()
        suite.aead.seal(view, suite.nonce(number), bytes(suite.key_size))
        times.append(time.perf_counter() - started)
    return min(times) < 0.0008


def offered_suites() -> list[Suite]:
    """Best first; ChaCha20-Poly1305 always."""
    return [suite for suite in (aegis_128l(), chacha20_poly1305()) if suite]


class CipherState:
    """One direction of a link: a key and the number of its next record (the Noise specification's k and n)."""

    __slots__ = ("_seal", "_open", "_nonce", "_key", "_n", "tag")

    def __init__(self, suite: Suite, key: bytes):
        if len(key) != suite.key_size:
            raise LocalProtocolError("a key of %d bytes for %s" % (len(key), suite.name))
        self._seal, self._open, self._nonce = suite.aead.seal, suite.aead.open, suite.nonce
        self._key, self._n, self.tag = key, 0, suite.aead.tag

    def seal(self, view: memoryview, aad: bytes) -> None:
        """Encrypts view[:-tag] in place and writes the tag behind it."""
        n = self._n  # the same lines as in open(): a function for them is one more call for each record
        self._n = n + 1
        if n >= LAST_NONCE:
            raise LocalProtocolError("the link has used up its record numbers")
        self._seal(view, self._nonce(n), self._key, aad)

    def open(self, view: memoryview, aad: bytes) -> memoryview:
        """Decrypts `view` in place; RemoteProtocolError where it is not the record that must come next."""
        n = self._n
        self._n = n + 1
        if n >= LAST_NONCE:
            raise LocalProtocolError("the link has used up its record numbers")
        return self._open(view, self._nonce(n), self._key, aad)

    def encrypt_with_ad(self, ad: bytes, plaintext: bytes) -> bytes:
        view = memoryview(bytearray(plaintext + bytes(self.tag)))
        self.seal(view, ad)
        return bytes(view)

    def decrypt_with_ad(self, ad: bytes, ciphertext: bytes) -> bytes:
        return bytes(self.open(memoryview(bytearray(ciphertext)), ad))


class NoCipher:
    """In place of a CipherState on a pipe that ssh has sealed; see Link, which lets no other connection have it."""

    __slots__ = ()
    tag = 0

    def seal(self, view: memoryview, aad: bytes) -> None:
        pass

    def open(self, view: memoryview, aad: bytes) -> memoryview:
        return view


# Imported where they are used: OpenSSL's half of these takes as long to load as everything else that --help needs.


def sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    import hmac

    return hmac.new(key, data, "sha256").digest()


def hkdf_sha256(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of RFC 5869's HKDF: one block, so extract and the first round of expand."""
    return hmac_sha256(hmac_sha256(salt, secret), info + b"\x01")


# ======================================================================================================================
# 5. Framing: bytes of a link to records and back
# ======================================================================================================================
# A reader gives records one at a time out of a buffer that the link owns, a writer gives the bytes to send. What a record means is the
# same on every wire.

_HEADER_CLEAR, _HEADER_SEALED = struct.Struct(">BQ"), struct.Struct(">B12sQ")
Record = Tuple[int, Any, int]


class LegacyReader:
    """Frames of the legacy wire. `key`: encryption is on, and a frame in the clear ends the link, but for HandshakeCompletion or an
    Error in its place where that is still `awaited`."""

    __slots__ = ("_key", "_awaited", "wanted")
    eof_is_end = True  # FIN is how a stream ends here

    def __init__(self, key: bytes | None = None, awaited: bool = False):
        self._key = key
        self._awaited = awaited
        self.wanted = 0

    def next(self, view: memoryview, start: int, end: int) -> Record | None:
        """The record that begins at view[start]: (type, content, where it ends). Content of Data is a piece of `view`.

        None where it is not whole yet: then `wanted` is how many bytes it has, as far as its header is here. RemoteProtocolError as
        soon as it cannot become a legal frame.
        """
        sealed = view[start]
        if sealed > 1:
            raise RemoteProtocolError("a frame with the flag %d" % sealed)
        if bool(sealed) != (self._key is not None and not self._awaited):
            raise RemoteProtocolError("a frame that is not encrypted on an encrypted link" if not sealed else "an encrypted frame too early")
        body = start + (_HEADER_SEALED.size if sealed else _HEADER_CLEAR.size)
        if end < body:
            self.wanted = body - start
            return None
        size = int.from_bytes(view[body - 8:body], "big")
        if size > LEGACY_MAX_FRAME:
            raise RemoteProtocolError("a frame of %d bytes, over the limit of %d" % (size, LEGACY_MAX_FRAME))
        if sealed and size < chacha20_poly1305().aead.tag:
            raise RemoteProtocolError("a frame of %d bytes, shorter than its tag" % size)
        if end < body + size:
            self.wanted = body + size - start
            return None
        content = view[body:body + size]
        if sealed:
            assert self._key is not None
            content = chacha20_poly1305().aead.open(content, bytes(view[start + 1:start + 13]), self._key)
        kind, what = self._decode(content)
        return kind, what, body + size

    def _decode(self, content: memoryview) -> tuple[int, Any]:
        # Data first and by hand: it is what nearly every frame is, and its bytes need no copy.
        if content and content[0] in (DATA_VARIANT, UDP_DATA_VARIANT) and not self._awaited:
            data = self._payload(content)
            if content[0] == UDP_DATA_VARIANT:
                return UDP_DATA, data
            if data:
                return DATA, data
            return self._end("an empty Data")
        message = decode_message(content) if content else Shutdown()
        if isinstance(message, Error):
            return ERROR, message
        if isinstance(message, HandshakeCompletion) and self._awaited:
            self._awaited = False
            return OPENED, ""
        if isinstance(message, Shutdown) and not self._awaited:
            return self._end("a Shutdown")
        raise RemoteProtocolError("a %s where none belongs" % type(message).__name__)

    @staticmethod
    def _payload(content: memoryview) -> memoryview:
        marker = content[1] if len(content) > 1 else 255
        width = 0 if marker < 251 else _WIDE.get(marker, 0)
        size = marker if marker < 251 else int.from_bytes(content[2:2 + width], "big")
        if marker > 253 or len(content) != 2 + width + size or (width and len(encode_varint(size)) != width + 1):
            raise RemoteProtocolError("a Data whose length does not fit its frame")
        return content[2 + width:]

    def _end(self, what: str) -> tuple[int, Any]:
        # Frames of an encrypted link can be replayed, and Rust sends none of these on purpose: with encryption on only FIN is an end.
        if self._key is not None:
            raise RemoteProtocolError("%s on an encrypted link" % what)
        return END, None


class LegacyWriter:
    """Frames of the legacy wire. With a `key` all are sealed, but for those that `clear_message` makes."""

    __slots__ = ("_key",)
    max_data = LEGACY_MAX_FRAME - 64  # variant, length and tag must fit into the same frame
    pools = False

    def __init__(self, key: bytes | None = None):
        self._key = key

    @staticmethod
    def clear_message(message: Any) -> bytes:
        """A whole frame in the clear, as the handshake uses."""
        body = encode_message(message)
        return _HEADER_CLEAR.pack(0, len(body)) + body

    def record(self, kind: int, *fields: Any) -> bytes:
        """Opened, or an Error in its place, the only place where a Rust client shows one; this wire has none of the others."""
        return self.clear_message(Error(*fields)) if kind == ERROR else self.clear_message(HandshakeCompletion()) if kind == OPENED else b""

    def data(self, scratch: memoryview, n: int, at: int = HEADROOM, variant: int = DATA_VARIANT) -> memoryview:
        """The frame around the n bytes at scratch[at:], made in place."""
        head = bytes((variant,)) + encode_varint(n)
        start, end = at - len(head), at + n
        scratch[start:at] = head
        if self._key is None:
            header = _HEADER_CLEAR.pack(0, end - start)
        else:
            cipher, nonce = chacha20_poly1305().aead, os.urandom(12)
            end += cipher.tag
            cipher.seal(scratch[start:end], nonce, self._key)
            header = _HEADER_SEALED.pack(1, nonce, end - start)
        scratch[start - len(header):start] = header
        return scratch[start - len(header):end]

    def datagrams(self, scratch: memoryview, end: int) -> bytes:
        """A frame for each datagram of the run (session u32, length u16, bytes) at scratch[HEADROOM:end]."""
        return b"".join(self._datagram(data) for _, data in split_datagrams(scratch[HEADROOM:end]))

    def _datagram(self, data: memoryview) -> memoryview:
        room = memoryview(bytearray(HEADROOM + len(data) + TAILROOM))
        room[HEADROOM:HEADROOM + len(data)] = data
        return self.data(room, len(data), variant=UDP_DATA_VARIANT)


DATAGRAM_HEADER = struct.Struct(">IH")
_LENGTH = struct.Struct(">I")


def split_datagrams(run: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(session, bytes) of each datagram in the content of a Datagrams record; RemoteProtocolError where a length passes its end."""
    at, size, header = 0, len(run), DATAGRAM_HEADER.size
    while at < size:
        if size - at < header:
            raise RemoteProtocolError("a datagram's header passes the end of its record")
        number, length = DATAGRAM_HEADER.unpack_from(run, at)
        at += header + length
        if at > size:
            raise RemoteProtocolError("a datagram passes the end of its record")
        yield number, run[at - length:at]


class RecordReader:
    """Records of ratrod2, sealed under `cipher`. `awaited`: the first must be HandshakeCompletion, or Error in its place."""

    __slots__ = ("_cipher", "_awaited", "wanted")
    eof_is_end = False  # a stream ends with End; FIN before it is an abort

    def __init__(self, cipher: CipherState | NoCipher, awaited: bool = False):
        self._cipher, self._awaited = cipher, awaited
        self.wanted = 0

    def next(self, view: memoryview, start: int, end: int) -> Record | None:
        """As LegacyReader's: (type, content, where it ends), or None and `wanted`."""
        body = start + 4
        if end < body:
            self.wanted = 4
            return None
        tag = self._cipher.tag
        size = int.from_bytes(view[start:body], "big")
        # Which type it is, and so its own limit, is known only after the tag has been verified.
        if not tag < size <= tag + 1 + MAX_CONTENT:
            raise RemoteProtocolError("a record of %d bytes" % size)
        if end < body + size:
            self.wanted = 4 + size
            return None
        plain = self._cipher.open(view[body:body + size], bytes(view[start:body]))
        kind = plain[0]
        if self._awaited:
            if kind not in (COMPLETED, ERROR):
                raise RemoteProtocolError("a record before HandshakeCompletion")
            self._awaited = False
        elif kind == COMPLETED:
            raise RemoteProtocolError("a second HandshakeCompletion")
        if kind == DATA and size > tag + 1 or kind == DATAGRAMS:
            return kind, plain[1:], body + size
        if kind == DATA or len(plain) > 1 + MAX_SMALL_CONTENT:
            raise RemoteProtocolError("a record with %d bytes of content" % (len(plain) - 1))
        return kind, decode_content(kind, bytes(plain[1:])), body + size


class RecordWriter:
    """Records of ratrod2, sealed under `cipher`."""

    __slots__ = ("_cipher",)
    max_data = MAX_CONTENT
    pools = True

    def __init__(self, cipher: CipherState | NoCipher):
        self._cipher = cipher

    def record(self, kind: int, *fields: Any) -> bytes:
        """A whole record of any type but Data and Datagrams."""
        content, cipher = encode_content(kind, *fields), self._cipher
        length = _LENGTH.pack(1 + len(content) + cipher.tag)
        whole = bytearray(b"%b%c%b%b" % (length, kind, content, bytes(cipher.tag)))
        cipher.seal(memoryview(whole)[4:], length)
        return bytes(whole)

    def data(self, scratch: memoryview, n: int, kind: int = DATA) -> memoryview:
        """The record around the n bytes at scratch[HEADROOM:], made in place: header and body leave in one send."""
        cipher = self._cipher
        scratch[HEADROOM - 1] = kind
        length = _LENGTH.pack(n + 1 + cipher.tag)
        scratch[HEADROOM - 5:HEADROOM - 1] = length
        end = HEADROOM + n + cipher.tag
        cipher.seal(scratch[HEADROOM - 1:end], length)
        return scratch[HEADROOM - 5:end]

    def datagrams(self, scratch: memoryview, end: int) -> memoryview:
        """One record of the run at scratch[HEADROOM:end]."""
        return self.data(scratch, end - HEADROOM, DATAGRAMS)


Reader = Union[LegacyReader, RecordReader]
Writer = Union[LegacyWriter, RecordWriter]


# ======================================================================================================================
# 6. Handshake: bytes in, bytes out
# ======================================================================================================================

def diffie_hellman(private: bytes, public: bytes) -> bytes:
    """X25519 of two times 32 bytes; RemoteProtocolError where the peer's is no point that leads to a secret."""
    if len(public) != 32:  # crypto_scalarmult() itself does not look
        raise RemoteProtocolError("an exchange key of %d bytes" % len(public))
    try:
        return sodium().crypto_scalarmult(private, public)
    except Exception:  # PyNaCl's RuntimeError for a zero secret; its type is no promise
        raise RemoteProtocolError("an exchange key of small order") from None


def refusal(error: RatrodError) -> Error:
    """What a client that has authenticated itself is told when it may not come in."""
    return Error(INVALID_KEY if isinstance(error, AuthenticationError) else UNKNOWN, str(error))


Script = Generator[int, bytes, None]
Report = Callable[..., None]


class Handshake:
    """One side of a handshake, without a socket: feed what arrives to receive_data(), send what data_to_send() gives.

    `wanted` is how many more bytes it can use now, 0 once it is done: whoever reads no more than that leaves what follows the
    handshake where it is. After it: `peer_key`, `reader` and `writer`. Any error it raises is final; data_to_send() may hold a last word.
    """

    bare = False  # whether its records go in the clear, for a pipe that ssh has sealed

    def __init__(self) -> None:
        self._received = bytearray()
        self._to_send = bytearray()
        self._script = self._run()
        self.steps = 0  # messages of the other side that it has answered
        self.peer_key = b""
        self.suite = "none, in the clear"
        self.reader: Reader
        self.writer: Writer
        self._needed = next(self._script)

    @property
    def wanted(self) -> int:
        return max(0, self._needed - len(self._received))

    @property
    def done(self) -> bool:
        return self._needed == 0

    def data_to_send(self) -> bytes:
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def receive_data(self, data: bytes) -> None:
        """Takes the next bytes of the peer, in pieces of any size but no more than `wanted`. RemoteProtocolError where they are wrong."""
        if len(data) > self.wanted:
            raise LocalProtocolError("%d bytes for a handshake that wants %d" % (len(data), self.wanted))
        self._received += data
        if not self.done and len(self._received) == self._needed:
            chunk = bytes(self._received)
            self._received.clear()
            try:
                self._needed = self._script.send(chunk)
                self.steps += bool(self._to_send)
            except StopIteration:
                self._needed = 0
            except BaseException:
                self._needed = -1  # neither done nor wanting more
                raise

    def receive_eof(self, why: str = "the other side closed the connection") -> NoReturn:
        """There is no more: `why` says how it ended."""
        raise RemoteProtocolError("%s during the handshake" % why)

    def _run(self) -> Script:
        """Yields the number of bytes it needs next and gets exactly those."""
        raise NotImplementedError


class LegacyHandshake(Handshake):
    """What both sides of the legacy handshake share."""

    def __init__(self, keys: KeyPair, ephemeral: bytes | None = None, challenge: bytes | None = None):
        self._keys = keys
        self._ephemeral = ephemeral or os.urandom(32)
        self._challenge = challenge or os.urandom(32)
        super().__init__()

    def _send(self, message: Any) -> None:
        self._to_send += LegacyWriter.clear_message(message)

    def _receive(self, expected: type[Any]) -> Generator[int, bytes, Any]:
        """One message in the clear; RemoteProtocolError unless it is an `expected` one, PeerError for an Error."""
        if (yield 1) != b"\0":
            raise RemoteProtocolError("the other side does not speak ratrod's legacy protocol")
        size = int.from_bytes((yield 8), "big")
        if not 0 < size <= MAX_HANDSHAKE_FRAME:
            raise RemoteProtocolError("a handshake message of %d bytes" % size)
        message = decode_message((yield size))
        if isinstance(message, Error):
            raise PeerError(message.code, printable(message.text))
        if not isinstance(message, expected):
            raise RemoteProtocolError("a %s in place of %s" % (type(message).__name__, expected.__name__))
        return message

    def _public_ephemeral(self) -> bytes:
        return sodium().crypto_scalarmult_base(self._ephemeral)

    def _authenticate(self, identity: str, signature: bytes, whose: str) -> None:
        """Takes the peer's identity where it signed our challenge."""
        try:
            key = decode_key(identity)
        except ValueError:
            raise RemoteProtocolError("the %s's public key is not a key" % whose) from None
        if not verify(key, self._challenge, signature):
            raise AuthenticationError("the %s's signature is wrong: it does not own the key `%s`" % (whose, identity))
        self.peer_key = key

    def _shared_key(self, peer_ephemeral: bytes, salt: bytes) -> bytes:
        """The key of both directions; `salt` is the server's challenge, then the client's."""
        return hkdf_sha256(diffie_hellman(self._ephemeral, peer_ephemeral), salt, salt)

    @staticmethod
    def _challenge_of(message: Any) -> bytes:
        """The challenge of a preamble whose sizes are right, seen to before anything is answered."""
        for name in ("challenge", "exchange_public_key"):
            if len(getattr(message, name)) != 32:
                raise RemoteProtocolError("a preamble with a %s of %d bytes" % (name, len(getattr(message, name))))
        return message.challenge


class LegacyClientHandshake(LegacyHandshake):
    """The client's side up to ClientAuthentication. HandshakeCompletion is left to the link, as Opened: data may follow at once.

    `check_server(key)` raises AuthenticationError for a key that is not known; `report(text, ...)` is told of each step.
    """

    def __init__(self, keys: KeyPair, remote: str, *, is_udp: bool = False, should_encrypt: bool = False,
                 check_server: Callable[[bytes], None], report: Report, **fixed: bytes):
        self._preamble = (remote, is_udp, should_encrypt)
        self._check_server, self._report = check_server, report
        super().__init__(keys, **fixed)

    def _run(self) -> Script:
        remote, is_udp, should_encrypt = self._preamble
        self._send(ClientPreamble(self._public_ephemeral(), remote, self._challenge, should_encrypt, is_udp))
        self._report("✅ Sent preamble to server ...")
        server = yield from self._receive(ServerPreamble)
        challenge = self._challenge_of(server)
        self._authenticate(server.identity_public_key, server.signature, "server")
        self._report("✅ Server's signature validated with public key `%s` ...", server.identity_public_key)
        if self.peer_key == self._keys.public:
            raise AuthenticationError(SAME_KEY % encode_key(self._keys.public))
        self._check_server(self.peer_key)
        self._report("🚧 Signing server challenge ...")
        self._send(ClientAuthentication(encode_key(self._keys.public), self._keys.sign(challenge)))
        self._report("⏳ Awaiting challenge validation ...")
        key = self._shared_key(server.exchange_public_key, challenge + self._challenge) if should_encrypt else None
        self.reader, self.writer = LegacyReader(key, awaited=True), LegacyWriter(key)


class LegacyServerHandshake(LegacyHandshake):
    """The server's side up to ClientAuthentication; the link says HandshakeCompletion, or Error in its place, once it knows which.

    `authorize(key)` raises AuthenticationError for a client that may not come in. After it: `remote` and `is_udp`.
    """

    def __init__(self, keys: KeyPair, *, authorize: Callable[[bytes], None], **fixed: bytes):
        self._authorize = authorize
        self.remote, self.is_udp = "", False
        super().__init__(keys, **fixed)

    def _run(self) -> Script:
        client = yield from self._receive(ClientPreamble)
        theirs = self._challenge_of(client)
        self._send(ServerPreamble(encode_key(self._keys.public), self._public_ephemeral(), self._keys.sign(theirs), self._challenge))
        answer = yield from self._receive(ClientAuthentication)
        try:
            self._authenticate(answer.identity_public_key, answer.signature, "client")
            # Whoever reaches a legacy server can have it sign anything: its own key proves nothing, wherever it is listed.
            if self.peer_key == self._keys.public:
                raise AuthenticationError(SAME_KEY % encode_key(self._keys.public))
            self._authorize(self.peer_key)
        except (AuthenticationError, Overloaded) as error:
            self._send(refusal(error))
            raise
        key = self._shared_key(client.exchange_public_key, self._challenge + theirs) if client.should_encrypt else None
        self.remote, self.is_udp = client.remote, client.is_udp
        self.reader, self.writer = LegacyReader(key), LegacyWriter(key)


# ---------------------------------------------------------------------------------------------------- ratrod2: Noise XX

OPENING = b"ratrod2\n"  # the first bytes of a link, and the prologue
NOISE_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"  # revision 34 of the specification, whose names these classes use
NAME_LEGACY = "this may be an original ratrod, or one that serves its wire: if you trust it, connect with --legacy"


class SymmetricState:
    """ck, h and the CipherState of a handshake under way: section 5.2."""

    def __init__(self) -> None:
        self.h = self.ck = NOISE_NAME  # exactly 32 bytes: no hash needed
        self._cipher: CipherState | None = None

    def mix_key(self, input_key_material: bytes) -> None:
        self.ck, k = self._hkdf(input_key_material)
        self._cipher = CipherState(chacha20_poly1305(), k)

    def mix_hash(self, data: bytes) -> None:
        self.h = sha256(self.h + data)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = self._cipher.encrypt_with_ad(self.h, plaintext) if self._cipher else plaintext
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = self._cipher.decrypt_with_ad(self.h, ciphertext) if self._cipher else ciphertext
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """k1, of the initiator's records, and k2, of the responder's."""
        return self._hkdf(b"")

    def _hkdf(self, input_key_material: bytes) -> tuple[bytes, bytes]:
        temporary = hmac_sha256(self.ck, input_key_material)
        first = hmac_sha256(temporary, b"\x01")
        return first, hmac_sha256(temporary, first + b"\x02")


class HandshakeState:
    """The XX pattern: section 5.3. `s` and `e` are private X25519 keys; `rs` and `re` the peer's public ones."""

    _PATTERN = (("e",), ("e", "ee", "s", "es"), ("s", "se"))

    def __init__(self, initiator: bool, prologue: bytes, s: bytes, e: bytes):
        self._initiator, self._s, self._e = initiator, s, e
        self.rs = self.re = b""
        self._symmetric = SymmetricState()
        self._symmetric.mix_hash(prologue)
        self._messages = iter(self._PATTERN)

    def write_message(self, payload: bytes) -> bytes:
        buffer = b""
        for token in next(self._messages):
            if token == "e":
                public = sodium().crypto_scalarmult_base(self._e)
                self._symmetric.mix_hash(public)
                buffer += public
            elif token == "s":
                buffer += self._symmetric.encrypt_and_hash(sodium().crypto_scalarmult_base(self._s))
            else:
                self._mix_dh(token)
        return buffer + self._symmetric.encrypt_and_hash(payload)

    def read_message(self, message: bytes) -> bytes:
        """Its payload. RemoteProtocolError where it was not made for this handshake."""
        decoder = Decoder(message)
        for token in next(self._messages):
            if token == "e":
                self.re = decoder.take(32)
                self._symmetric.mix_hash(self.re)
            elif token == "s":
                self.rs = self._symmetric.decrypt_and_hash(decoder.take(48))
            else:
                self._mix_dh(token)
        return self._symmetric.decrypt_and_hash(decoder.rest())

    def _mix_dh(self, token: str) -> None:
        """The first letter names the initiator's key of the two, the second the responder's."""
        mine, theirs = (token[0], token[1]) if self._initiator else (token[1], token[0])
        self._symmetric.mix_key(diffie_hellman({"e": self._e, "s": self._s}[mine], {"e": self.re, "s": self.rs}[theirs]))

    def split(self) -> tuple[bytes, bytes, bytes]:
        """k1, k2 and the handshake hash."""
        return (*self._symmetric.split(), self._symmetric.h)


def record_cipher(suite: Suite, k: bytes, h: bytes) -> CipherState:
    """The CipherState of one direction's records, from one of Split()'s keys and the handshake hash."""
    label = b"ratrod2 " + bytes((suite.id,)) + h + b"\x01"
    return CipherState(suite, hmac_sha256(k, label)[:suite.key_size])


class NoiseHandshake(Handshake):
    """What both sides of ratrod2's handshake share."""

    _EMPTY = "a handshake message of 0 bytes"

    def __init__(self, keys: KeyPair, ephemeral: bytes | None, initiator: bool):
        self._keys = keys
        self._noise = HandshakeState(initiator, OPENING, keys.exchange_key(), ephemeral or os.urandom(32))
        super().__init__()

    def _send(self, payload: bytes) -> None:
        message = self._noise.write_message(payload)
        self._to_send += len(message).to_bytes(2, "big") + message

    def _receive(self) -> Generator[int, bytes, bytes]:
        size = int.from_bytes((yield 2), "big")
        if not size:
            raise RemoteProtocolError(self._EMPTY)
        if size > MAX_NOISE_MESSAGE:
            raise RemoteProtocolError(self._not_noise(size.to_bytes(2, "big")))
        return self._noise.read_message((yield size))

    @staticmethod
    def _not_noise(head: bytes) -> str:
        """What the other side is, that begins so."""
        who = {b"SS": "sshd (with ssh://host, ratrod goes through it)", b"HT": "a web server", b"\x15\x03": "a TLS server",
               b"22": "a mail or FTP server"}.get(head)
        return "the other side does not speak ratrod2; what it says begins with %s%s" % (ascii(head)[1:], ", as from " + who if who else "")

    def _identify(self, identity: bytes) -> None:
        """Takes the peer's Ed25519 identity where it is the one whose X25519 form this handshake has authenticated."""
        try:
            converted = sodium().crypto_sign_ed25519_pk_to_curve25519(identity) if len(identity) == 32 else b""
        except Exception:  # not a point; the type that PyNaCl raises is no promise
            converted = b""
        if converted != self._noise.rs:  # both are public
            raise AuthenticationError("the other side's key does not belong to its handshake")
        self.peer_key = identity
        if identity == self._keys.public:
            raise AuthenticationError(SAME_KEY % encode_key(self._keys.public))

    def _finish(self, suite: Suite, initiator: bool) -> None:
        k1, k2, h = self._noise.split()
        mine, theirs = (k1, k2) if initiator else (k2, k1)
        self.suite = suite.name + (" through nacl._sodium" if suite.aead.fast else " through nacl.bindings")
        self.reader = RecordReader(record_cipher(suite, theirs, h), awaited=initiator)
        self.writer = RecordWriter(record_cipher(suite, mine, h))


class NoiseClientHandshake(NoiseHandshake):
    """The client's side up to ClientAuthentication; records may follow it at once. Arguments as LegacyClientHandshake's."""

    _EMPTY = "the server does not answer in ratrod2; " + NAME_LEGACY  # a legacy frame begins with zeros

    def __init__(self, keys: KeyPair, *, check_server: Callable[[bytes], None], report: Report, ephemeral: bytes | None = None,
                 suites: list[Suite] | None = None):
        self._check_server, self._report, self._suites = check_server, report, suites or offered_suites()
        super().__init__(keys, ephemeral, initiator=True)

    def _run(self) -> Script:
        self._to_send += OPENING
        self._send(bytes((len(self._suites), *(suite.id for suite in self._suites))))
        self._report("✅ Sent preamble to server ...")
        payload = yield from self._receive()
        if len(payload) < 33:
            raise RemoteProtocolError("a ServerPreamble of %d bytes" % len(payload))
        self._identify(payload[:32])
        self._report("✅ Server's signature validated with public key `%s` ...", encode_key(self.peer_key))
        suite = next((suite for suite in self._suites if suite.id == payload[32]), None)
        if suite is None:
            raise RemoteProtocolError("the server chose the cipher suite %d, which was not offered" % payload[32])
        self._check_server(self.peer_key)
        self._report("🚧 Signing server challenge ...")
        self._send(self._keys.public)
        self._report("⏳ Awaiting challenge validation ...")
        self._finish(suite, initiator=True)

    def receive_eof(self, why: str = "the server closed the connection") -> NoReturn:
        if self._noise.re:
            super().receive_eof(why)
        raise RemoteProtocolError("%s before it said anything; %s" % (why, NAME_LEGACY))


class NoiseServerHandshake(NoiseHandshake):
    """The server's side, up to and with HandshakeCompletion, or an Error in its place. Arguments as LegacyServerHandshake's."""

    def __init__(self, keys: KeyPair, *, authorize: Callable[[bytes], None], ephemeral: bytes | None = None,
                 suites: list[Suite] | None = None):
        self._authorize, self._suites = authorize, suites or offered_suites()
        super().__init__(keys, ephemeral, initiator=False)

    def receive_eof(self, why: str = "the other side closed the connection") -> NoReturn:
        raise RemoteProtocolError("%s during the handshake%s" % (why, "; it may not know this server's key" if self.steps else ""))

    def _run(self) -> Script:
        if (yield len(OPENING)) != OPENING:
            raise RemoteProtocolError("it does not speak ratrod2")
        payload = yield from self._receive()
        decoder = Decoder(payload)
        theirs = decoder.take(decoder.u8())
        if chacha20_poly1305().id not in theirs:
            raise RemoteProtocolError("a client that does not offer ChaCha20-Poly1305")
        suite = next(suite for number in theirs for suite in self._suites if suite.id == number)
        self._send(self._keys.public + bytes((suite.id,)))
        payload = yield from self._receive()
        if len(payload) < 32:
            raise RemoteProtocolError("a ClientAuthentication of %d bytes" % len(payload))
        try:
            identity = payload[:32]
            self._identify(identity)
            self._authorize(identity)
        except (AuthenticationError, Overloaded) as error:
            if self.peer_key:
                self._finish(suite, initiator=False)
                self._to_send += self.writer.record(ERROR, *refusal(error))
            raise
        self._finish(suite, initiator=False)
        self._to_send += self.writer.record(COMPLETED, __version__)


class PipeHandshake(Handshake):
    """Over a pipe that ssh has authenticated and sealed: the client sends `program`, the far side answers with `marker`, which nobody can
    guess, and both go on with bare records. What a login shell prints before it is skipped. The far side has no program, and no marker to
    wait for."""

    bare = True
    MAX_CHATTER = 64 * 1024

    def __init__(self, program: bytes = b"", marker: bytes = b""):
        self._program, self._marker, self.seen = program, marker, b""
        super().__init__()
        self.suite = "ssh's own"
        self.reader = RecordReader(NoCipher(), awaited=bool(marker))
        self.writer = RecordWriter(NoCipher())

    def _run(self) -> Script:
        self._to_send += self._program
        size = len(self._marker)
        while not self.seen.endswith(self._marker):
            if len(self.seen) > self.MAX_CHATTER:
                raise RemoteProtocolError("its login shell prints more than %d bytes" % self.MAX_CHATTER)
            # As much as is certainly missing: what follows the marker is for others to read.
            self.seen += yield next(n for n in range(1, size + 1) if self.seen.endswith(self._marker[:size - n]))
        yield 0


class Socks5Handshake(Handshake):
    """The server's side of SOCKS5 (RFC 1928; RFC 1929 where `user`, as `name:password`, is asked for), up to the request: `command` and
    `target`. What answers the request is left to whoever carries it out."""

    CONNECT, BIND, ASSOCIATE = 1, 2, 3

    def __init__(self, user: str | None = None):
        self._user = (user or "").encode("utf-8", "surrogateescape")
        self.command, self.target = 0, ""
        super().__init__()

    def _run(self) -> Script:
        version, count = yield 2
        if version != 5 or not count:
            raise RemoteProtocolError("it does not speak SOCKS5")
        method = 2 if self._user else 0
        if method not in (yield count):
            self._to_send += b"\x05\xff"
            raise RemoteProtocolError("it does not offer %s" % ("a user name and a password" if self._user else "to go without a password"))
        self._to_send += bytes((5, method))
        if self._user:
            yield from self._authenticate()
        version, self.command, _, kind = yield 4
        size = {1: 4, 4: 16}.get(kind) or (kind == 3 and (yield 1)[0])
        if version != 5 or not size:
            self._to_send += socks_reply(8 if version == 5 else 1)
            raise RemoteProtocolError("a SOCKS5 request that cannot be")
        host = yield size
        self.target = socks_target(kind, host, (yield 2))

    def _authenticate(self) -> Generator[int, bytes, None]:
        import hmac

        given = []
        version = (yield 1)[0]
        for _ in range(2):
            size = (yield 1)[0]
            given.append((yield size) if size else b"")
        good = version == 1 and hmac.compare_digest(b":".join(given), self._user)
        self._to_send += bytes((1, not good))
        if not good:
            raise AuthenticationError("wrong user name or password")


def socks_target(kind: int, host: bytes, port: bytes) -> str:
    """`host:port` of an address as SOCKS5 writes it; what is no host is left for others to refuse."""
    import ipaddress

    shown = host.decode("latin-1") if kind == 3 else str(ipaddress.ip_address(host))
    # Not an Address: a name that looks like a path must stay a name, not become a Unix socket.
    return ("[%s]:%d" if ":" in shown else "%s:%d") % (shown, int.from_bytes(port, "big"))


def socks_address(target: Address) -> bytes:
    """An address as SOCKS5 writes it."""
    import ipaddress

    port = target.port.to_bytes(2, "big")
    if is_address(target.host):
        packed = ipaddress.ip_address(target.host).packed
        return (b"\x04" if len(packed) == 16 else b"\x01") + packed + port
    name = target.host.encode("ascii")
    return b"\x03" + bytes((len(name),)) + name + port


def socks_reply(code: int, bound: Address = Address("0.0.0.0", 0)) -> bytes:  # noqa: B008 - a constant
    return bytes((5, code, 0)) + socks_address(bound)


class ProxyHandshake(Handshake):
    """What a proxy is asked before the server can be talked to: to connect to `target`. Nothing after its answer is read."""

    def __init__(self, target: Address, user: bytes | None, password: bytes):
        self._target, self._user, self._password = target, user, password
        super().__init__()

    def receive_eof(self, why: str = "it closed the connection") -> NoReturn:
        raise RemoteProtocolError(why + " before it had answered")

    def _refuse_user(self, scheme: str, said: str = "") -> NoReturn:
        wants = "it wants a user and a password: %s://user:password@..." % scheme if self._user is None else "it takes another user and password"
        raise AuthenticationError(said + wants)


class HttpProxyHandshake(ProxyHandshake):
    """The client's side of HTTP's CONNECT (RFC 9110, 9.3.6), with Basic authentication (RFC 7617)."""

    MAX_ANSWER = 16 * 1024

    def _run(self) -> Script:
        lines = ["CONNECT {0} HTTP/1.1", "Host: {0}"]
        if self._user is not None:
            lines.append("Proxy-Authorization: Basic " + base64.b64encode(self._user + b":" + self._password).decode("ascii"))
        self._to_send += ("\r\n".join(lines).format(self._target) + "\r\n\r\n").encode("ascii")
        answer = bytearray()
        while not answer.endswith((b"\r\n\r\n", b"\n\n")):
            if len(answer) >= self.MAX_ANSWER:
                raise RemoteProtocolError("its answer has more than %d bytes" % self.MAX_ANSWER)
            answer += yield 1  # a server that speaks first may do so right behind the blank line
            if len(answer) == 5 and answer != b"HTTP/":
                raise RemoteProtocolError("it does not speak HTTP")
        status = answer.split(b"\n")[0].strip().decode("latin-1")
        code = re.match(r"HTTP/[0-9.]+ ([0-9]{3})\b", status, re.ASCII)
        if code and code.group(1) in ("401", "407"):
            self._refuse_user("http", "it answered `%s`; " % printable(status))
        if not code or code.group(1)[0] != "2":
            raise RemoteProtocolError("it answered `%s`" % printable(status))


class Socks5ProxyHandshake(ProxyHandshake):
    """The client's side of SOCKS5 (RFC 1928, and RFC 1929 where there is a user). Names are looked up at the proxy."""

    FAILURES = ("", "it failed, and does not say why", "its rules do not allow that", "the network is unreachable", "the host is unreachable",
                "the connection was refused", "the time to live has expired", "it cannot connect at all", "it cannot take such an address")

    def _run(self) -> Script:
        methods = b"\0" if self._user is None else b"\0\2"
        self._to_send += bytes((5, len(methods))) + methods
        version, method = yield 2
        if version != 5:
            raise RemoteProtocolError("it does not speak SOCKS5" + ", but HTTP: write http:// for socks5://" * (version == 72))
        if method not in methods:
            self._refuse_user("socks5")
        if method == 2:
            assert self._user is not None
            self._to_send += b"".join((b"\1", *(bytes((len(part),)) + part for part in (self._user, self._password))))
            if (yield 2)[1]:
                self._refuse_user("socks5")
        self._to_send += b"\5\1\0" + socks_address(self._target)
        version, code, _, kind = yield 4
        if version != 5 or code:
            raise RemoteProtocolError(self.FAILURES[code] if version == 5 and code < len(self.FAILURES) else "it answered %d" % code)
        size = {1: 4, 4: 16}.get(kind) or (kind == 3 and (yield 1)[0])
        if not size:
            raise RemoteProtocolError("it answered with an address that cannot be")
        yield size + 2


def ask_proxy(proxy: Proxy, server: Address) -> ProxyHandshake:
    kind = HttpProxyHandshake if proxy.scheme == "http" else Socks5ProxyHandshake
    return kind(server, proxy.user, proxy.password)


def split_socks_datagram(data: memoryview) -> tuple[str, int]:
    """(target, where the payload begins) of a datagram of a SOCKS5 client; ValueError where it is none, or a fragment."""
    kind = data[3] if len(data) > 4 else 0
    start, size = (5, data[4]) if kind == 3 else (4, {1: 4, 4: 16}.get(kind, 0))
    end = start + size
    if not size or len(data) < end + 2 or data[2]:
        raise ValueError("not a whole SOCKS5 datagram")
    return socks_target(kind, bytes(data[start:end]), bytes(data[end:end + 2])), end + 2


PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


class ProxyHeader(Handshake):
    """The header that a load balancer puts before a connection (HAProxy's proxy-protocol.txt, versions 1 and 2): `source`, the address and
    port that it came from, None where the header does not say; `is_local`: the balancer's own, as a health check."""

    def __init__(self) -> None:
        self.source: tuple[str, int] | None = None
        self.is_local = False
        super().__init__()

    def _run(self) -> Script:
        head = yield len(PROXY_SIGNATURE)  # the shortest of version 1 is longer
        if head == PROXY_SIGNATURE:
            yield from self._version_2()
        elif head.startswith(b"PROXY "):
            while not head.endswith(b"\r\n"):
                if len(head) >= 107:
                    raise RemoteProtocolError("a PROXY header without an end")
                head += yield 1
            self._version_1(head[:-2])
        else:
            raise RemoteProtocolError("no PROXY header, which --proxy-protocol asks for from there")

    def _version_2(self) -> Script:
        import ipaddress

        command, family, *size = yield 4
        length = int.from_bytes(bytes(size), "big")
        self.is_local = command == 0x20  # then nothing that follows means anything
        address_size = 0 if self.is_local else {0x11: 4, 0x21: 16}.get(family, 0)  # TCP over IPv4, over IPv6
        wrong = not self.is_local and (command != 0x21 or family & 15 > 2 or family >> 4 > 3)
        if wrong or not 2 * address_size + 4 * bool(address_size) <= length <= 2048:
            raise RemoteProtocolError("a PROXY header that cannot be")
        body = (yield length) if length else b""
        if address_size:
            port = body[2 * address_size:2 * address_size + 2]
            self.source = self._show(ipaddress.ip_address(body[:address_size])), int.from_bytes(port, "big")

    @staticmethod
    def _show(address: Any) -> str:
        return str(getattr(address, "ipv4_mapped", None) or address)

    def _version_1(self, line: bytes) -> None:
        import ipaddress

        words = line.decode("latin-1").split(" ")
        if words[1] == "UNKNOWN":
            return
        try:
            _, protocol, source, destination, port, _port = words
            addresses = [ipaddress.ip_address(word) for word in (source, destination)]
            if "%" in source + destination:  # a zone may be any text
                raise ValueError
            if any(address.version != {"TCP4": 4, "TCP6": 6}.get(protocol) for address in addresses):
                raise ValueError
            self.source = self._show(addresses[0]), parse_port(port, lowest=0)
        except ValueError:
            raise RemoteProtocolError("a PROXY header that cannot be") from None


# ======================================================================================================================
# 6b. Stream states: the table of PROTOCOL.md
# ======================================================================================================================

IDLE, CONNECTING, ASKED, ASKED_END, BOTH, SENT, GOT, DONE, UDP_ASKED, UDP_OPEN, LISTEN_ASKED, BYE, CLOSED = (
    "Idle", "Connecting", "Asked", "AskedEnd", "Both", "Sent", "Got", "Done", "UdpAsked", "UdpOpen", "ListenAsked", "Bye", "Closed")
ASKING = {TCP: ASKED, UDP: UDP_ASKED, LISTEN: LISTEN_ASKED}  # the state after an Open of each kind
OPENER, ACCEPTOR = "opener", "acceptor"
LOCAL_EOF, LOCAL_FAILS, LOST = "local EOF", "local fails", "lost"

# A row for each state, for the role behind its name or for both; in each cell what is done, and `>` where it leads. `!` is illegal and
# ends the link like an Error; an empty cell does nothing. Local bytes are read in Asked (64 KiB of them), Both and Got. A legacy link
# begins in Asked or Connecting and is never Idle again: FIN is its End, and it has none of Over and Close. A link that Opened has made
# a Listen link changes roles: the server is its opener from then on.
_TABLE = """
 state         | local EOF     | local fails | Open             | Opened        | Data  | End         | Over         | Close | Error | lost
 Idle opener   |               |             | !                | !             | !     | !           | !            | close | close | close
 Idle acceptor |               |             | open >Connecting | !             | !     | !           | !            | !     | close | close
 Connecting    |               | fail        | !                | !             | !     | !           | !            | !     | die   | die
 Asked         | end >AskedEnd | fail        | !                | opened >Both  | !     | !           | !            | retry | die   | retry
 AskedEnd      |               | fail        | !                | opened >Sent  | !     | !           | !            | retry | die   | retry
 Both          | end >Sent     | fail        | !                | !             | write | shut >Got   | !            | !     | die   | die
 Sent          |               | fail        | !                | !             | write | shut >Done  | !            | !     | die   | die
 Got           | end >Done     | fail        | !                | !             | !     | !           | !            | !     | die   | die
 Done opener   |               | fail        | !                | !             | !     | !           | reuse >Idle  | leave | die   | die
 Done acceptor |               | fail        | !                | !             | !     | !           | !            | !     | die   | die
 Bye           |               |             |                  |               |       |             |              |       |       | close
 Closed        |               |             |                  |               |       |             |              |       |       |
"""
_UDP_TABLE = """
 state            | Opened          | Datagrams | UdpData  | Session | SessionOver | Close | Error | lost
 UdpAsked         | opened >UdpOpen | !         | !        | !       | !           | die   | die   | die
 ListenAsked      | listening >Idle | !         | !        | !       | !           | die   | die   | die
 UdpOpen opener   | !               | datagrams | datagram | !       | forget      | die   | die   | die
 UdpOpen acceptor | !               | datagrams | datagram | session | forget      | !     | die   | die
"""
_EVENTS: dict[str, Any] = {"Open": OPEN, "Opened": OPENED, "Data": DATA, "End": END, "Over": OVER, "Close": CLOSE, "Error": ERROR,
                           "Datagrams": DATAGRAMS, "UdpData": UDP_DATA, "Session": SESSION, "SessionOver": SESSION_OVER}
Table = Dict[str, Dict[Any, Tuple[str, str]]]


def _read_table(text: str, role: str) -> Table:
    """For each state the legal events: (what is done, the following state)."""
    header, *rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    table: Table = {}
    for name, *cells in rows:
        state, _, whose = name.partition(" ")
        if whose in ("", role):
            parts = [cell.partition(" >") for cell in cells]
            table[state] = {_EVENTS.get(event, event): (action, following or state)
                            for event, (action, _, following) in zip(header[1:], parts) if action != "!"}
    return table


STREAM_TABLES = {role: {**_read_table(_TABLE, role), **_read_table(_UDP_TABLE, role)} for role in (OPENER, ACCEPTOR)}
READS_LOCAL = frozenset((ASKED, BOTH, GOT))


# ======================================================================================================================
# 7. Event loop
# ======================================================================================================================

log = logging.getLogger("ratrod")
log.addHandler(logging.NullHandler())  # as a library it is silent unless its user wants to hear
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def boot_time() -> float:
    """Seconds on a clock that counts sleep, where there is one: a machine that slept has not been listening."""
    return time.clock_gettime(CLOCK) if CLOCK is not None else time.monotonic()


class Timer:
    """A pending call; cancel() forgets it."""

    __slots__ = ("when", "call")

    def __init__(self, when: float, call: Callable[[], None] | None):
        self.when, self.call = when, call

    def cancel(self) -> None:
        self.call = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """select() gives (callback, mask): what was registered as data, without the key around it."""

    def select(self, timeout: float | None = None) -> Any:
        return [(key.data, mask) for key, mask in super().select(timeout)]


class EpollSelector:
    """The same over epoll itself: 0.6 µs less for an event and 2 µs for a socket, a twelfth of what a short connection takes."""

    _TO_EPOLL = {READ: 1, WRITE: 4, READ | WRITE: 5}
    _FROM_EPOLL = {events: mask for mask, events in _TO_EPOLL.items()}

    def __init__(self) -> None:
        import select

        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}

    def register(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        fd = sock.fileno()
        self._epoll.register(fd, self._TO_EPOLL[events])
        self._callbacks[fd] = callback

    def modify(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        fd = sock.fileno()
        self._epoll.modify(fd, self._TO_EPOLL[events])
        self._callbacks[fd] = callback

    def unregister(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def select(self, timeout: float | None = None) -> Any:
        # What is none of these is an error or a hang-up: reading tells which.
        callbacks, mask_of = self._callbacks, self._FROM_EPOLL.get
        return [(callbacks[fd], mask_of(events, READ | WRITE)) for fd, events in self._epoll.poll(timeout)]

    def close(self) -> None:
        self._epoll.close()


def new_scratch() -> memoryview:
    """SCRATCH_IN bytes of their own pages, which go back to the system with them: malloc would keep them, 70 MB after a burst of 128 links."""
    import mmap

    private: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}  # by default a forked process shares it
    return memoryview(mmap.mmap(-1, SCRATCH_IN, **private))


class EventLoop:
    """The one thread that owns every socket after its handshake. Only call_soon_threadsafe() may be called from another."""

    def __init__(self) -> None:
        self.starved_at = -1e9
        self._selector = EpollSelector() if hasattr(selectors, "EpollSelector") else Selector()
        self._timers: list[Timer] = []
        self._calls: collections.deque[tuple[Callable[[], None], Callable[[], None]]] = collections.deque()
        self._wake_receiver, self._waker = socket.socketpair()
        for end in (self._wake_receiver, self._waker):
            end.setblocking(False)
        self._selector.register(self._wake_receiver, READ, self._on_wake)
        self._stopped = self._closed = False
        self.now, self.awake = time.monotonic(), boot_time()  # as of this round: good enough for everything that counts in seconds
        # Shared by all: what one callback reads or seals here it has sent or kept elsewhere when it returns. A buffer of its own for
        # every connection would cost 256 KB each.
        self.scratch_out = memoryview(bytearray(HEADROOM + MAX_CONTENT + TAILROOM))
        self.payload = self.scratch_out[HEADROOM:HEADROOM + MAX_CONTENT]
        self.scratch_in = new_scratch()
        self.portion, self._hurry_until = MAX_CONTENT, self.now  # bytes that one callback takes at most
        self._spare: list[memoryview] = []
        self._lent = 0
        self.batch: Any = None  # the DatagramBatch of what has been received in scratch_out

    def hurry(self) -> None:
        """Somebody waits for short answers: for a moment bulk takes short turns. Otherwise each of its callbacks, 0.4 ms for 512 KiB,
        stands in the way four times of a round trip, and the p99 of 64 bytes beside it is 25 times what it is alone."""
        self.portion, self._hurry_until = SHORT_TURN, self.now + HURRY

    def lend_scratch(self) -> memoryview | None:
        """scratch_in, whose bytes the caller keeps until give_back(), while another takes its place; None where too many are lent."""
        if self._lent >= LENT_AT_ONCE:
            return None
        self._lent += 1
        lent, self.scratch_in = self.scratch_in, self._spare.pop() if self._spare else new_scratch()
        return lent

    def give_back(self, lent: memoryview) -> None:
        self._lent -= 1
        self._spare.append(lent)

    def trim(self) -> None:
        """Gives memory back that a burst of bulk has left."""
        del self._spare[SPARE_BUFFERS:]

    def fileno(self) -> int:
        """The descriptor that signals write to, so that they wake select() on every system."""
        return self._waker.fileno()

    def watch(self, sock: socket.socket, before: int, events: int, callback: Callable[[int], Any]) -> None:
        """From now on callback(mask) whenever one of `events` is ready; 0 is none. `before` is what was watched until now."""
        if not events:
            self._selector.unregister(sock)
        elif before:
            self._selector.modify(sock, events, callback)
        else:
            self._selector.register(sock, events, callback)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.call_at(time.monotonic() + seconds, call)

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        timer = Timer(when, call)
        heapq.heappush(self._timers, timer)
        return timer

    def call_soon(self, call: Callable[[], None]) -> None:
        """call() after what is ready in this round, and once in a round: what calls it again lets the others have their turn."""
        self._calls.append((call, lambda: None))

    def call_soon_threadsafe(self, call: Callable[[], None], discard: Callable[[], None] = lambda: None) -> None:
        """call() in the loop's next round; discard() in its place where there will be none."""
        self._calls.append((call, discard))
        with contextlib.suppress(OSError):  # full: it will wake anyway
            self._waker.send(b"\0")
        if self._closed:  # this thread has outlived the loop
            self._discard_calls()

    def _discard_calls(self) -> None:
        with contextlib.suppress(IndexError):  # another thread does the same
            while self._calls:
                self._calls.popleft()[1]()

    def _on_wake(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)

    def run(self) -> None:
        """Until stop(). An exception of a callback is a bug: it ends what the callback belongs to, never the loop."""
        while not self._stopped:
            ready = self._selector.select(self._time_to_next_timer())
            self.now, self.awake = time.monotonic(), boot_time()
            if self.now > self._hurry_until:
                self.portion = MAX_CONTENT
            for callback, mask in ready:
                try:  # here, not in a function: 0.2 µs an event
                    callback(mask)
                except Exception as error:
                    self._bug(callback, error)
            while self._timers and self._timers[0].when <= self.now:
                call = heapq.heappop(self._timers).call
                if call:
                    self._run(call)
            for _ in range(len(self._calls)):
                self._run(self._calls.popleft()[0])

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._closed = True
        self._discard_calls()
        self._selector.close()
        self._wake_receiver.close()
        self._waker.close()

    def _time_to_next_timer(self) -> float | None:
        if self._calls:
            return 0
        return max(0.0, self._timers[0].when - time.monotonic()) if self._timers else None

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._bug(call, error)

    @staticmethod
    def _bug(call: Callable[..., None], error: Exception) -> None:
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == __file__ else line
            trace = trace.tb_next
        log.error("❌ internal error in line %d, please report it: %r", line, error)
        end = getattr(getattr(call, "__self__", None), "die", None)
        if end:
            end(error)


def close_sockets(result: Any) -> None:
    """What a task of a WorkerPool has made, where nobody takes it any more."""
    for part in result if isinstance(result, tuple) else ():
        if isinstance(part, socket.socket):
            part.close()


class WorkerPool:
    """At most `size` daemon threads, made as they are needed and let go after ten idle seconds.

    Not a ThreadPoolExecutor: that one joins its threads at exit, and a look-up that hangs would hold the process up.
    """

    def __init__(self, loop: EventLoop, size: int):
        self._loop, self._size = loop, size
        self._tasks: queue.Queue[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]] | None] = queue.Queue()  # None: go
        self._lock = threading.Lock()
        self._threads = self._unfinished = 0

    def submit(self, task: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """task() on a thread, then done(result, None) or done(None, error) on the loop."""
        with self._lock:
            self._tasks.put((task, done))
            self._unfinished += 1
            if self._threads < min(self._unfinished, self._size):
                try:
                    threading.Thread(target=self._work, daemon=True, name="ratrod worker").start()
                    self._threads += 1
                except RuntimeError as error:  # no more for now (ulimit -u, pids.max): those that are there do it, or it fails
                    if not self._threads:
                        self._tasks.get_nowait()
                        self._unfinished -= 1
                        failure = ConnectError("this system lets it start no thread for now (%s)" % error)
                        self._loop.call_soon_threadsafe(functools.partial(done, None, failure))

    def close(self) -> None:
        """Lets the idle threads go now; those that are at work go when they are done."""
        with self._lock:
            for _ in range(self._threads):
                self._tasks.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the threads, for so long at most: one that is inside libsodium when the interpreter ends crashes it."""
        until = time.monotonic() + seconds
        while self._threads and time.monotonic() < until:
            time.sleep(0.005)

    def _work(self) -> None:
        while True:
            try:
                item = self._tasks.get(timeout=10)
            except queue.Empty:
                with self._lock:
                    # Between the time-out and this lock a task may have come that counted on this thread.
                    if self._tasks.empty():
                        self._threads -= 1
                        return
                continue
            if item is None:
                with self._lock:
                    self._threads -= 1
                return
            task, done = item
            result, error = None, None
            try:
                result = task()
            except Exception as raised:
                error = raised
            with self._lock:
                self._unfinished -= 1
            self._loop.call_soon_threadsafe(functools.partial(done, result, error), functools.partial(close_sockets, result))
            del item, task, done, result, error  # an idle thread must not keep a socket alive


# ======================================================================================================================
# 8. Links and streams
# ======================================================================================================================


def tune(sock: socket.socket) -> None:
    """What every TCP socket gets that is connected or listens: accepted ones inherit it from that."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent is complete: Nagle only adds delay
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except OSError:  # already reset: the first read tells
        pass


TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform.startswith("linux") else None)  # named only in newer Pythons
TCP_RTO_MAX_MS = 44  # linux/tcp.h, in no Python yet


class TcpInfo(NamedTuple):
    """Some of Linux' struct tcp_info (linux/tcp.h)."""

    retransmits: int  # of what is sent again and again now
    probes: int  # of a shut window, that nobody has answered
    unacked: int  # segments on their way
    last_data_recv: int  # ms since data came
    last_ack_recv: int  # ms since the other side's TCP said anything
    rtt: int  # µs, smoothed

    @property
    def stuck(self) -> bool:
        """Its next try is 1.6 s away or more (after 0.2, 0.4 and 0.8): when the path is there again, a new connection is faster."""
        return self.retransmits > 2

    @property
    def unanswered(self) -> float:
        """Seconds for which the other machine has answered nothing though it was asked. A window that is shut is answered for by probes,
        two of which may get lost."""
        return self.last_ack_recv / 1000 if self.unacked or self.probes > 2 else 0.0


_TCP_INFO = struct.Struct("=24xI24xII8xI")
_LINGER = [struct.pack("HH" if os.name == "nt" else "ii", on, 0) for on in (0, 1)]


class Transport:
    """A connected socket on the loop; what a link and the local end of a stream both run on."""

    __slots__ = ("sock", "events", "_loop", "_callback")

    def __init__(self, loop: EventLoop, sock: socket.socket, callback: Callable[[int], None]):
        sock.setblocking(False)
        self.sock, self._loop, self._callback = sock, loop, callback
        # What is waited for. An earlier callback of the same round may have closed this or changed its mind, and epoll reports errors
        # as everything: a callback holds its mask against these.
        self.events = 0

    def want(self, events: int) -> None:
        """From now on callback(mask) for these events; the only place that changes them."""
        if events != self.events:
            self._loop.watch(self.sock, self.events, events, self._callback)
            self.events = events

    def recv_into(self, view: memoryview) -> int | None:
        """Bytes read; 0 is the end, None where nothing is there yet. OSError where the connection is broken."""
        try:
            return self.sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Bytes taken, possibly none. OSError where the connection is broken."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def limit_unsent(self, n: int) -> None:
        """Where the system can: no more than n bytes wait in its buffer before they are sent, so that what is to leave late can be
        dropped before."""
        if TCP_NOTSENT_LOWAT is not None:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, n)

    def wake_at(self, n: int) -> None:
        """Where the system can: not readable before n bytes are there, or its end. Being woken for every piece of a long record costs
        bulk a tenth. Linux lowers n to what the socket's buffer can hold."""
        if sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)

    def retry_within(self, seconds: float) -> None:
        """Where the system can (Linux 6.15): what nobody acknowledges is sent again at least so often, so that a link goes on soon after its
        path is there again. Otherwise the pauses double: after an outage of 30 s the next try is 20 s away. With these the system gives up
        after 6 s and 11 such pauses."""
        if sys.platform.startswith("linux"):
            with contextlib.suppress(OSError, AttributeError):
                self.sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, round(1000 * seconds))

    def tcp_info(self) -> TcpInfo:
        """What Linux knows of the path; nothing on other systems and other sockets."""
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72)
            return TcpInfo(info[2], info[3], *_TCP_INFO.unpack_from(info))
        except (OSError, AttributeError, struct.error):
            return TcpInfo(0, 0, 0, 0, 0, 0)

    def half_close(self) -> None:
        """No more bytes from this side; OSError where the connection is broken."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.want(0)
        self._callback = _closed  # its owner and it point to each other: let go at once, not by the garbage collector
        self.sock.close()

    def guard(self, on: bool) -> None:
        """Whether closing is a reset, also that of the system when this process is killed: what was cut must not look like an end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER[on])

    def abort(self) -> None:
        """Closes with a reset, so that the other side cannot take it for an end."""
        self.guard(True)
        self.close()


def _closed(_mask: int) -> None:
    """The callback of what is closed."""


class LocalFailed(RatrodError):
    """The local socket of a stream broke: everyday life, only shown with -v."""


class LinkUser:
    """What a link carries: a Stream, the UDP sessions, or the test at the start. These are called by its Link."""

    __slots__ = ()

    def first_data(self, writer: Writer) -> bytes:
        """Records that are to leave together with Open."""
        return b""

    def opened(self) -> None:
        """The other side is connected to its remote."""

    def listening(self, link: Link, bound: str) -> None:
        """The server listens on `bound`; the link is an idle one that waits for a connection."""

    def write(self, data: memoryview) -> None:
        """Data came; the view is valid during this call only."""

    def shut(self) -> None:
        """The other side has ended its direction."""

    def check(self) -> None:
        """Called every second or so."""

    def finished(self) -> None:
        """Both directions have ended, and everything is delivered."""

    def update(self) -> None:
        """The link's state changed, or all that waited for it was sent."""

    def retry(self, error: Exception, untouched: bool) -> bool:
        """The link ended before Opened; `untouched`: the other side says that it looked at nothing. True where another link will do."""
        return False

    def lost(self, error: Exception) -> None:
        """The link has ended, with everything on it."""

    def datagrams(self, run: memoryview) -> None:
        """The content of a Datagrams record came."""

    def datagram(self, data: memoryview) -> None:
        """Legacy: one datagram came."""

    def session(self, message: Session) -> None:
        """The other side names the target of a new session."""

    def forget(self, message: SessionOver) -> None:
        """The other side has ended a session."""


NOBODY = LinkUser()


class LinkClosed(RemoteProtocolError):
    """The other side ended a connection that was still in use."""


class Link:
    """One authenticated connection between client and server, and the state of the stream on it.

    Memory stays bounded from both sides: while bytes wait in `_out` the local socket is not read, and while bytes wait for the local
    socket (`held`) no record is processed and the link is not read.
    """

    __slots__ = ("owner", "loop", "transport", "reader", "writer", "peer_key", "role", "state", "user", "held", "completed", "born",
                 "sent_at", "heard_at", "name", "_table", "_out", "_fin", "_eof", "_in", "_in_start", "_in_end", "_lent", "_paused",
                 "_timer", "_deadline", "_overdue", "_trickle")

    def __init__(self, owner: Endpoint, sock: socket.socket | None, handshake: Handshake, role: str, state: str, name: str = ""):
        # No socket: over standard input and output. What is not sealed never gets onto a network.
        if handshake.bare and sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            raise LocalProtocolError("bare records are for ssh's pipes alone")
        self.owner, self.loop, self.role, self.state, self.name = owner, owner.loop, role, state, name
        self._table = STREAM_TABLES[role]
        self.transport = Transport(owner.loop, sock, self._on_event) if sock else StdioTransport(owner.loop, self._on_event)
        self.reader, self.writer, self.peer_key = handshake.reader, handshake.writer, handshake.peer_key
        self.user = NOBODY
        self.held = state == CONNECTING  # the acceptor reads nothing more before its remote is connected
        self.completed = role == ACCEPTOR
        self.born = self.sent_at = owner.loop.now
        self.heard_at = owner.loop.awake
        self._out = bytearray()
        self._fin = self._eof = False  # we end after `_out`; the peer has ended
        self._in: memoryview | None = None  # what has come of an incomplete record, or waits while held: [_in_start:_in_end]
        self._in_start = self._in_end = self._trickle = 0
        self._lent: memoryview | None = None  # the loop's buffer, where `_in` is a piece of one
        self._paused = False  # in the middle of `_in`, for the others' turn
        self._timer: Timer | None = None
        self._deadline: float | None = None
        self._overdue: Callable[[], None] | None = None
        if self.writer.pools:  # a ninth: not before our own limit does the system give up. Legacy has no such limit
            self.transport.retry_within(max(1.0, owner.limits.silence / 9))
        owner.links.add(self)

    # ---- events

    def event(self, event: Any, content: Any = None) -> None:
        """What the table of stream states says happens now."""
        cell = self._table[self.state].get(event)
        if cell is None:
            raise RemoteProtocolError("a record that does not belong there (type 0x%02x while %s)" % (event, self.state))
        before = self.state
        action, self.state = cell
        if action:
            self._ACTIONS[action](self, content)
        if self.state is not before:
            self.update()

    def _on_open(self, message: Open) -> None:
        self.held = True
        self.owner.open_asked(self, message)

    def _on_opened(self, _bound: str) -> None:
        self.set_deadline(None)
        self.completed = True  # legacy: HandshakeCompletion is what came
        self.user.opened()

    def turn(self, role: str) -> None:
        """A Listen link, idle from here on: from now on the server is its opener."""
        self.set_deadline(None)
        self.role, self._table, self.state = role, STREAM_TABLES[role], IDLE

    def _on_listening(self, bound: str) -> None:
        user, self.user = self.user, NOBODY
        self.turn(ACCEPTOR)
        user.listening(self, bound)

    def _on_end(self, _content: None) -> None:
        if self.reader.eof_is_end:
            self._finish_sending()
        elif self.state == DONE and self.role == ACCEPTOR and not self.held:
            self._recycle(self.writer.record(END))
        else:
            self.send(self.writer.record(END))

    def _recycle(self, end: bytes = b"") -> None:
        """Acceptor: the stream is over on both sides, and the next may come; one packet with the End before it saves each side 10 µs."""
        self._finish_user()
        self.state = IDLE
        self.owner.link_idle(self, end)

    def _on_shut(self, _content: None) -> None:
        self.user.shut()

    def _on_reuse(self, _content: None) -> None:
        self._finish_user()
        self.owner.link_idle(self)

    def _on_leave(self, _content: None) -> None:
        self._finish_user()
        self.close()

    def _on_retry(self, error: Exception | None) -> None:
        user, self.user = self.user, NOBODY
        untouched = error is None  # Close says so
        error = error or LinkClosed("the server takes no more streams on this connection")
        if not user.retry(error, untouched):
            self.user = user
            return self.die(error)
        self.close()

    def _finish_user(self) -> None:
        user, self.user = self.user, NOBODY
        user.finished()

    def fail(self, error: Exception) -> None:
        """What the link carried broke on this side: its end there is a reset, and Error tells the other side, as our last record."""
        user, self.user = self.user, NOBODY
        user.lost(error)
        if not self.writer.pools:  # legacy: a reset of the link is the only sign
            return self.die(error)
        self.refuse(Error(REMOTE_FAILED, reason(error)))

    _ACTIONS: dict[str, Callable[..., None]] = {
        "open": _on_open, "opened": _on_opened, "end": _on_end, "shut": _on_shut, "reuse": _on_reuse, "leave": _on_leave,
        "retry": _on_retry, "fail": fail, "listening": _on_listening,
        "write": lambda self, data: self.user.write(data),
        "die": lambda self, error: self.die(PeerError(error.code, printable(error.text)) if isinstance(error, Error) else
                                            error or LinkClosed("the other side takes no more")),
        "close": lambda self, _content: self.close(),
        "datagrams": lambda self, run: self.user.datagrams(run),
        "datagram": lambda self, data: self.user.datagram(data),
        "session": lambda self, message: self.user.session(message),
        "forget": lambda self, message: self.user.forget(message),
    }

    # ---- in

    def _on_event(self, mask: int) -> None:
        if mask & self.transport.events & WRITE:
            self._flush()
        if mask & self.transport.events & READ:
            self._read()

    def _read(self) -> bool:
        """Whether anything came."""
        if self._paused:
            return False
        # An incomplete record has a buffer of its own, and only its rest is read next: then a read begins at a record again.
        view, end = (self.loop.scratch_in, 0) if self._in is None else (self._in, self._in_end)
        try:
            n = self.transport.recv_into(view[end:end + self.loop.portion + HEADROOM + TAILROOM])
        except OSError as error:
            self._lost(broken(error))
            return False
        if n:
            self._in = None
            if self.state != BYE:  # what comes then is discarded
                self._process(view, 0, end + n)
            # What comes inside a record is a sign of life only in an amount: where a length was falsified on the way, or bytes are
            # missing, all Keepalives that follow are taken for the rest of that record.
            inside = end and self._incomplete() == end + n
            self._trickle = self._trickle + n if inside else 0
            if not inside or self._trickle >= TRICKLE:
                self.heard_at, self._trickle = self.loop.awake, 0
        elif n == 0:
            self._on_eof()
        return bool(n)

    def _incomplete(self) -> int:
        """Bytes that are kept of a record."""
        return self._in_end - self._in_start if self._in is not None else 0

    def hears(self) -> bool:
        """Whether bytes are there that it was not woken for: the beginning of a long record on a slow path."""
        before = self.heard_at
        self._read()
        if self.heard_at != before and self.state != CLOSED:  # it may have lain there since before the path died
            self.heard_at = max(before, self.loop.awake - self.transport.tcp_info().last_data_recv / 1000)
        return self.state == CLOSED or self.loop.awake - self.heard_at < self.owner.limits.silence

    def poll(self) -> None:
        """Processes what has come meanwhile, and sees the FIN that may stand behind it."""
        for _ in range(BATCH):
            if self.state != IDLE or not self._read():
                return

    def _process(self, view: memoryview, start: int, end: int) -> None:
        try:
            for _ in range(RECORDS_IN_TURN):
                if start == end or self.held:
                    break
                record = self.reader.next(view, start, end)
                if record is None:
                    break
                kind, content, start = record
                if kind == DATA or self.completed and kind not in (KEEPALIVE, COMPLETED):
                    self.event(kind, content)
                else:
                    self._process_other(kind, content)
                if self.state in (BYE, CLOSED):
                    return
            else:
                self._paused = True
                self.loop.call_soon(self._resume)
        except RemoteProtocolError as error:
            return self.die(error)
        if start < end:
            self._keep(view, start, end)
        elif self._lent is not None:
            self._forget_input()
        if self.held or self._paused:
            self.update()

    def _process_other(self, kind: int, content: Any) -> None:
        """Keepalive, and what answers the client's authentication: HandshakeCompletion, or an Error that refuses the client."""
        if kind == COMPLETED:
            self.completed = True
            if self.state == IDLE:  # otherwise the deadline is that of Opened
                self.set_deadline(None)
            self.owner.link_completed(self)
        elif kind == ERROR:
            error = PeerError(content.code, printable(content.text))
            self.die(error)
            self.owner.client_refused(error)
        elif kind != KEEPALIVE:
            self.event(kind, content)

    def _keep(self, view: memoryview, start: int, end: int) -> None:
        """Keeps view[start:end], what could not be processed yet, in a buffer of its own that has room for the rest of its record."""
        have = end - start
        wanted = have if self.held or self._paused else self.reader.wanted
        if view is self.loop.scratch_in or not self._paused and (start or len(view) < wanted):
            view, start, end = self._room_for(view, start, end, wanted), 0, have
        self._in, self._in_start, self._in_end = view, start, end
        if self._lent is not None:
            self.transport.wake_at(wanted - (end - start))

    def _room_for(self, view: memoryview, start: int, end: int, wanted: int) -> memoryview:
        """A buffer of `wanted` bytes that begins with view[start:end].

        For a long record it is the loop's: memory that is new each time costs a page fault for every 4 KiB, half of all the CPU time of
        bulk; and mostly the bytes are in their place already. Where those are out, or for what waits its turn, it is the link's own,
        and grows with what arrives, not with what a header promises.
        """
        have = end - start
        if wanted > max(have, 64 * 1024) and self._lent is None:
            self._lent = self.loop.lend_scratch()
            if self._lent is not None:
                if start or view is not self._lent:
                    self._lent[:have] = view[start:end]
                return self._lent[:wanted]
        fresh = memoryview(bytearray(min(wanted, max(8 * have, 64 * 1024))))
        fresh[:have] = view[start:end]
        return fresh

    def _forget_input(self) -> None:
        self._in = None
        if self._lent is not None:
            self.loop.give_back(self._lent)
            self._lent = None
            self.transport.wake_at(1)

    def release(self) -> None:
        """The local socket took everything: goes on with what waits here, then with reading."""
        self.held = False
        self.heard_at = self.loop.awake  # the other side's silence counts from now
        if self._in is not None and not self._paused:  # not where the very record that is being processed asked for it: its loop goes on
            self._go_on()
        self.update()

    def _go_on(self) -> None:
        view, self._in = self._in, None
        if view is not None:
            self._process(view, self._in_start, self._in_end)

    def _resume(self) -> None:
        """After the others had their turn."""
        self._paused = False
        self.heard_at = self.loop.awake  # what comes meanwhile was not looked at
        if not self.held:
            self._go_on()
        self.update()

    def _on_eof(self) -> None:
        self._eof = True
        if self._in is not None:
            self._lost(RemoteProtocolError("the connection ended inside a record"))
        elif self.reader.eof_is_end and self.state in (BOTH, SENT):
            self.event(END)
        else:
            self._lost(LinkClosed("the other side closed the connection"))

    def _lost(self, error: Exception) -> None:
        """The connection is no more: what that means depends on the state."""
        self.event(LOST, error)

    # ---- out

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def send(self, data: bytes | memoryview) -> None:
        """Sends now what the connection takes and keeps the rest."""
        if self.state == CLOSED:
            return None
        self.sent_at = self.loop.now
        if self._out:
            self._out += data
            return
        try:
            sent = self.transport.send(data)
        except OSError as error:
            return self._lost(broken(error))
        if sent < len(data):
            self._out += data[sent:]
            self.update()

    def _flush(self) -> None:
        try:
            del self._out[:self.transport.send(self._out)]
        except OSError as error:
            return self._lost(broken(error))
        if not self._out:
            if self._fin:
                self._finish_sending()
            self.update()

    def _finish_sending(self) -> None:
        """FIN, after all that waits."""
        self._fin = True
        if not self._out:
            try:
                self.transport.half_close()
            except OSError as error:
                self._lost(broken(error))

    # ---- life

    def ask(self, user: LinkUser, kind: int, target: str, deadline: float, instance: bytes = b"") -> None:
        """Opener: `user` is what this link carries from now on. The other side has `deadline` seconds to say Opened. Where the wire
        named the target in its handshake already, nothing is sent."""
        self.user = user
        if self.state == IDLE:
            self.state = ASKING[kind]
            self.send(self.writer.record(OPEN, kind, target, instance) + user.first_data(self.writer))
        if self.state != CLOSED:
            self.set_deadline(deadline, lambda: self._lost(RemoteProtocolError("no answer within %g s" % deadline)))
        self.update()

    def accept(self, user: LinkUser, state: str = BOTH) -> None:
        """Acceptor: the remote is connected."""
        self.set_deadline(None)
        self.state, self.user = state, user
        self.send(self.writer.record(OPENED, ""))
        self.release()

    def refuse(self, error: Error) -> None:
        """Says why, and ends without destroying the answer on its way: FIN, then discard until the peer has seen it."""
        self.leave(self.writer.record(ERROR, *error), self.owner.limits.drain_timeout)

    def leave(self, last_word: bytes, drain: float | None = None) -> None:
        """Sends `last_word` and FIN, then discards until the peer's FIN, for at most `drain` seconds where given."""
        self.state, self.held = BYE, False
        self._forget_input()
        self.set_deadline(drain, lambda: self.die(RemoteProtocolError("it did not close its side")))
        self.send(last_word)
        if self.state == BYE:
            self._finish_sending()
            self.update()

    def set_deadline(self, seconds: float | None, call: Callable[[], None] | None = None) -> None:
        """call() after so many seconds; None takes the last one back.

        A timer that is no longer needed stays where it is and looks at the deadline when it is due: a link that carries 1,000 streams
        a second would otherwise leave 1,000 cancelled timers a second on the loop's heap.
        """
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if call:
            self._overdue = call
        if self._deadline is not None and not (self._timer and self._timer.when <= self._deadline):
            self._arm(self._deadline)

    def _arm(self, when: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.now < self._deadline:
            return self._arm(self._deadline)
        call, self._deadline, self._overdue = self._overdue, None, None
        if call:
            call()

    def update(self) -> None:
        """The one place that works out what to wait for, and whether a stream is over."""
        if self.state == DONE and not self.held:
            if self.reader.eof_is_end:
                if not self._out:
                    return self._on_leave(None)
            elif self.role == ACCEPTOR:
                self._recycle()
        if self.state != CLOSED:
            self.transport.want((WRITE if self._out else 0) | (0 if self.held or self._paused or self._eof else READ))
            self.user.update()

    def die(self, error: Exception) -> None:
        """Ends the link and what it carries, visibly: resets on both sides. May be called twice."""
        # After the other side's Error it only waits for our FIN.
        self._stop(self.transport.close if isinstance(error, PeerError) else self.transport.abort, error)

    def close(self) -> None:
        """Ends the link where nothing is left to be said."""
        self._stop(self.transport.close, None)

    def _stop(self, how: Callable[[], None], error: Exception | None) -> None:
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self._forget_input()
        self._deadline = self._overdue = None  # it may point back to this link
        if self._timer:
            self._timer.cancel()
        how()
        user, self.user = self.user, NOBODY
        if user is NOBODY and error is not None:
            log_link_loss(self.owner.counters, self.peer_key, "idle link with `%s`" % self.name, error)
        elif error is not None:
            user.lost(error)
        self.owner.link_ended(self, error)


def log_link_loss(counters: Counters, key: bytes, what: str, error: Exception) -> None:
    """The end of a link that no stream reports: everyday life, unless the other side broke the protocol."""
    if isinstance(error, (LinkClosed, PeerError, Revoked)) or not isinstance(error, RemoteProtocolError):
        log.debug("%s ended: %s", what, reason(error))
    else:
        counters.fail(key, "%s ended: %s" % (what, reason(error)))


def broken(error: OSError) -> LinkClosed:
    return LinkClosed("the connection between client and server broke: %s" % reason(error))



class Label(NamedTuple):
    """What a connection is called in the log."""

    id: str
    origin: str
    target: str

    def __str__(self) -> str:
        return "[%s] `%s` -> `%s`" % (self.id, self.origin, printable(self.target))


def new_label(origin: str, target: str) -> Label:
    return Label(os.urandom(3).hex(), origin, target)


def plural(n: int, word: str) -> str:
    return "%d %s%s" % (n, word, "" if n == 1 else "s")


def show_time(seconds: float) -> str:
    """`0.3 ms`, `12.5 s`, `2 h 5 min`"""
    if seconds < 1:
        return ("%.0f ms" if seconds >= 0.01 else "%.1f ms") % (seconds * 1000)
    if seconds < 60:
        return "%.1f s" % seconds
    size, big, small = next(step for step in ((60, "min", "s"), (3600, "h", "min"), (86400, "d", "h")) if seconds < step[0] * 60 or step[0] == 86400)
    return "%d %s %d %s" % (seconds // size, big, seconds % size // {60: 1, 3600: 60, 86400: 3600}[size], small)


def show_size(n: float) -> str:
    """`950 B`, `1.2 kB`, `34 MB`"""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if n < 999.5:
            break
        n, unit = n / 1000, larger
    return ("%.1f %s" if n < 9.95 and unit != "B" else "%.0f %s") % (n, unit)


class TokenBucket:
    """`rate` a second, and up to `burst` at once."""

    __slots__ = ("_rate", "_burst", "_tokens", "_filled_at")

    def __init__(self, rate: float, burst: int, now: float):
        self._rate, self._burst, self._tokens, self._filled_at = rate, burst, float(burst), now

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now

    def is_full(self, now: float) -> bool:
        self._refill(now)
        return self._tokens >= self._burst

    def take(self, now: float) -> bool:
        self._refill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class FailureLog:
    """Lines about failures, bounded so that nobody fills the disk with them: of each cause `burst` at once and then `rate` a second, and of all
    causes no more than `in_all` allows. The rest is counted, and said when a line is due again; `others` is said of causes that made room."""

    def __init__(self, rate: float, burst: int, others: str, in_all: TokenBucket | None = None):
        self._rate, self._burst, self._in_all = rate, burst, in_all
        self._lines: dict[str, TokenBucket] = {}  # of each cause; a cause is the format of what counts its rest
        self._muted: collections.Counter[str] = collections.Counter()
        self._others = others

    def write(self, now: float, cause: str, line: str) -> None:
        """`line`, or one more for `cause`, a text with a %d."""
        if self._due(now, cause):
            log.error("%s", line)
        else:
            self._muted[cause] += 1

    def _due(self, now: float, cause: str) -> bool:
        if cause not in self._lines:
            if len(self._lines) >= SOURCES:
                self._lines.clear()
                self._muted = collections.Counter({self._others: sum(self._muted.values())})
            self._lines[cause] = TokenBucket(self._rate, self._burst, now)
        return self._lines[cause].take(now) and (self._in_all is None or self._in_all.take(now))

    def confess(self, now: float) -> None:
        """Called every second or so."""
        for cause, n in list(self._muted.items()):
            if self._due(now, cause):
                log.error("%s", cause % n)
                del self._muted[cause]
        for cause in [cause for cause, lines in self._lines.items() if cause not in self._muted and lines.is_full(now)]:
            del self._lines[cause]


class Counters:
    """What an endpoint carries, and has carried since it began: for metrics, status table and status line alike.

    No byte costs anything here: each stream and session counts its own, which are added up at its end, and of those that live when
    somebody asks. By peer key: as many as authorized_keys lists.
    """

    RESULTS = ("closed", "reset", "refused", "failed")

    def __init__(self) -> None:
        self.began_at = time.time()
        self.streams: set[Stream] = set()
        self.sessions: set[UdpSession] = set()
        self.results = dict.fromkeys(self.RESULTS, 0)  # of streams that are over
        self.links = self.handshakes_failed = self.reconnects = 0
        self._bytes: dict[bytes, list[int]] = {}  # of what is over: peer key -> sent, received
        self.failures = FailureLog(LOG_RATE_IN_ALL, LOG_BURST_IN_ALL, "❌ %d more failures with other keys")

    def count(self, error: Exception | None) -> None:
        """A stream is over, or was refused before it was one."""
        refused = isinstance(error, (PolicyError, Overloaded)) or isinstance(error, PeerError) and error.code == INVALID_HOST
        self.results["closed" if error is None else "refused" if refused else "reset" if isinstance(error, LocalFailed) else "failed"] += 1

    def over(self, carried: Stream | UdpSession, error: Exception | None = None) -> None:
        """And the line that everything ends with: shown with -v, or always where somebody should know."""
        self.streams.discard(carried)  # type: ignore[arg-type]
        self.sessions.discard(carried)  # type: ignore[arg-type]
        total = self._bytes.setdefault(carried.peer_key, [0, 0])
        total[0] += carried.sent
        total[1] += carried.received
        failed = isinstance(error, RatrodError) and not isinstance(error, LocalFailed)
        if failed:
            self.fail(carried.peer_key, "❌ %s: %s%s" % (carried.label, "refused: " if isinstance(error, PolicyError) else "", error))
        if log.isEnabledFor(logging.DEBUG):
            how = "" if failed else " closed" if error is None else " reset (%s)" % reason(error)
            log.debug("%s%s%s: %d bytes sent to the link, %d received, lived %.1f s", "" if failed else "✅ ", carried.label, how, carried.sent,
                      carried.received, time.monotonic() - carried.started)

    def fail(self, key: bytes, line: str) -> None:
        """A line about a failure that has to do with the other side of this key; with -v none of them is left out."""
        if log.isEnabledFor(logging.DEBUG):
            return log.error("%s", line)
        return self.failures.write(time.monotonic(), "❌ %%d more failures%s" % (" with the key `%s`" % encode_key(key) if key else ""), line)

    def tally(self, links: Iterable[Link]) -> dict[bytes, collections.Counter[str]]:
        """For each peer key: its links (idle, busy, closing), streams, sessions, and bytes of payload (sent to the link, received)."""
        keys: dict[bytes, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for key, (sent, received) in self._bytes.items():
            keys[key].update(sent=sent, received=received)
        for link in links:
            keys[link.peer_key][{IDLE: "idle", BYE: "closing"}.get(link.state, "busy")] += 1
        alive: Iterable[Any]
        for name, alive in (("streams", self.streams), ("sessions", self.sessions)):
            for carried in alive:
                tally = keys[carried.peer_key]
                tally[name] += 1
                tally["sent"] += carried.sent
                tally["received"] += carried.received
        return keys


class Stream(LinkUser):
    """One local TCP socket joined to one link; `again(stream, error)` asks for another link where the first one failed untouched."""

    __slots__ = ("loop", "counters", "link", "local", "label", "target", "sent", "received", "tries", "started", "_again", "_pending", "_kept",
                 "_ended", "_broken")

    def __init__(self, owner: Endpoint, sock: Any, label: Label, again: Callable[[Stream], None] | None = None, target: str | None = None):
        self.loop, self.counters, self.label, self._again = owner.loop, owner.counters, label, again
        self.target = label.target if target is None else target  # as Open names it
        self.link: Link | None = None
        self.local = self._transport(sock)
        self.local.guard(True)
        self._pending = b""  # what the local socket did not take yet
        self._kept: bytearray | None = bytearray() if again else None  # sent before Opened: another link may need it again
        self._ended = False
        self._broken: OSError | None = None
        self.tries = self.sent = self.received = 0
        self.started = self.loop.now
        self.counters.streams.add(self)
        log.debug("⛽ %s", label)

    @property
    def peer_key(self) -> bytes:
        return self.link.peer_key if self.link else b""

    def _transport(self, sock: Any) -> Transport:
        return Transport(self.loop, sock, self._on_event)

    def begin(self, link: Link, deadline: float) -> None:
        """Opener: carried by `link` from now on."""
        self.link = link
        self.tries += 1
        link.ask(self, TCP, self.target, deadline)
        if self._broken:
            self._failed(self._broken)
        elif self._ended:
            link.event(LOCAL_EOF)

    def first_data(self, writer: Writer) -> bytes:
        """What another link had of it, or else what has come meanwhile: one packet in place of two for whoever speaks first."""
        if self._kept is None:
            return b""
        n = len(self._kept)
        if n:
            self.loop.payload[:n] = self._kept
        elif not self._ended:
            try:
                n = self.local.recv_into(self.loop.payload[:KEPT_DATA]) or 0
            except OSError as error:  # said once: the next read would find a clean end
                self._broken = error
            self._kept += self.loop.payload[:n]
            self.sent += n
        return bytes(writer.data(self.loop.scratch_out, n)) if n else b""

    def _on_event(self, mask: int) -> None:
        if mask & self.local.events & WRITE:
            self._flush()
        if mask & self.local.events & READ:
            self._read()

    def _read(self) -> None:
        link = self.link
        assert link is not None
        try:
            n = self.local.recv_into(self.loop.payload[:self._room(link)])
        except OSError as error:
            return self._failed(error)
        if n:
            self.sent += n
            if n < SHORT_READ:
                self.loop.hurry()
            if self._kept is not None:
                self._kept += self.loop.payload[:n]
            link.send(link.writer.data(self.loop.scratch_out, n))
            if self._kept is not None and self.link:
                self.update()
        elif n == 0:
            self._ended = True
            link.event(LOCAL_EOF)

    def _room(self, link: Link) -> int:
        """How many bytes may be read now."""
        return min(link.writer.max_data, self.loop.portion) if self._kept is None else KEPT_DATA - len(self._kept)

    def opened(self) -> None:
        self._kept = None

    def write(self, data: memoryview) -> None:
        self.received += len(data)
        try:
            sent = self.local.send(data)
        except OSError as error:
            return self._failed(error)
        if sent < len(data) and self.link:
            self._pending = bytes(data[sent:])
            self.link.held = True

    def _flush(self) -> None:
        try:
            self._pending = self._pending[self.local.send(self._pending):]
        except OSError as error:
            return self._failed(error)
        if not self._pending and self.link:
            self.link.release()

    def shut(self) -> None:
        # Everything before the End has been written: no record is processed while bytes wait for the local socket. Where its own end
        # was read, closing says the same in one call less (15 µs): nothing unread is there that would make it a reset.
        if self._ended:
            return self._close()
        try:
            self.local.half_close()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self.link:
            self.link.event(LOCAL_FAILS, LocalFailed("its local connection broke: %s" % reason(error)))

    def update(self) -> None:
        link = self.link
        assert link is not None
        reads = link.state in READS_LOCAL and not link.backlog and self._room(link)
        self.local.want((WRITE if self._pending else 0) | (READ if reads else 0))

    def retry(self, error: Exception, untouched: bool) -> bool:
        if self._again is None or self.tries >= (CLOSES if untouched else TRIES) or not untouched and self._kept:
            return False
        log.debug("%s: %s; trying another link", self.label, error)
        self.link = None
        self.local.want(0)
        self._again(self)
        return True

    def check(self) -> None:
        # After its end of file, or while the other side takes nothing, nobody reads this socket: a reset that follows would wait for the next
        # write, perhaps for ever.
        if self.link and self.link.state != DONE and not self.local.events & READ:
            code = self.local.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._failed(OSError(code, os.strerror(code)))

    def _close(self) -> None:
        """The clean end of the local socket."""
        if self.local.sock is None or self.local.sock.fileno() >= 0:
            self.local.guard(False)
            self.local.close()

    def finished(self) -> None:
        self._close()
        self._report()

    def lost(self, error: Exception) -> None:
        self._report(error)
        self.link = None
        self.local.abort()

    def _report(self, error: Exception | None = None) -> None:
        self.counters.count(error)
        self.counters.over(self, error)

    def die(self, error: Exception) -> None:
        if self.link:
            self.link.die(error)
        else:
            self.lost(error)


class SocksStream(Stream):
    """One that a SOCKS5 client asked for: it learns how that went."""

    __slots__ = ("_answered",)

    def __init__(self, *arguments: Any):
        self._answered = False
        super().__init__(*arguments)

    def opened(self) -> None:
        super().opened()
        self._answered = True
        self.write(memoryview(socks_reply(0)))
        self.received -= len(socks_reply(0))

    def lost(self, error: Exception) -> None:
        if self._answered:
            return super().lost(error)
        self._report(error)
        self.link = None
        self.local.want(0)
        self.local.guard(False)
        LastWord(self.loop, self.local.sock, socks_reply(self._code(error)))
        return None

    @staticmethod
    def _code(error: Exception) -> int:
        if isinstance(error, PeerError) and error.code == INVALID_HOST:
            return 2  # not allowed
        if isinstance(error, PeerError) and error.code == REMOTE_FAILED:
            return 4 if "cannot resolve" in str(error) else 5  # unreachable, refused
        return 1


class StdioTransport(Transport):
    """Standard input and output in place of a socket. epoll refuses regular files and /dev/null: those are always ready."""

    __slots__ = ("_blocking", "_ready", "_scheduled")

    class _Descriptor(NamedTuple):
        number: int

        def fileno(self) -> int:
            return self.number

    _ENDS: Any = ((READ, _Descriptor(0)), (WRITE, _Descriptor(1)))

    def __init__(self, loop: EventLoop, callback: Callable[[int], None]):
        self.sock: Any = None
        self._loop, self._callback, self.events = loop, callback, 0
        self._ready = self._scheduled = 0
        self._blocking: dict[int, bool] = {}
        for _, end in self._ENDS:
            # A terminal belongs to the shell too, which would find it non-blocking if this were killed: it gets small writes instead.
            if not os.isatty(end.number):
                self._blocking[end.number] = os.get_blocking(end.number)
                os.set_blocking(end.number, False)

    def want(self, events: int) -> None:
        for event, end in self._ENDS:
            before, after = self.events & event, events & event
            if before != after and not self._ready & event:
                try:
                    self._loop.watch(end, before, after, self._callback)
                except PermissionError:
                    self._ready |= event
        self.events = events
        if events & self._ready and not self._scheduled:
            self._scheduled = 1
            self._loop.call_soon_threadsafe(self._always_ready)

    def _always_ready(self) -> None:
        self._scheduled = 0
        events = self.events & self._ready
        if events:
            self._callback(events)
            self.want(self.events)

    def recv_into(self, view: memoryview) -> int | None:
        import select

        try:
            if 0 not in self._blocking and not select.select([0], [], [], 0)[0]:
                return None  # a terminal where nothing has been typed
            return os.readv(0, [view])
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return os.write(1, data if 1 in self._blocking else data[:4096])
        except (BlockingIOError, InterruptedError):
            return 0

    def guard(self, on: bool) -> None:
        """Pipes know no reset."""

    def limit_unsent(self, n: int) -> None:
        pass

    def wake_at(self, n: int) -> None:
        pass

    def half_close(self) -> None:
        self.want(self.events & READ)
        self._restore(1)
        if stat.S_ISSOCK(os.fstat(1).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(1)) as sock:
                sock.shutdown(socket.SHUT_WR)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.close(devnull)

    def _restore(self, number: int) -> None:
        blocking = self._blocking.pop(number, None)
        if blocking is not None:
            with contextlib.suppress(OSError):
                os.set_blocking(number, blocking)

    def close(self) -> None:
        self.want(0)
        self._callback = _closed
        self.half_close()
        self._restore(0)

    def abort(self) -> None:
        self.close()


class StdioStream(Stream):
    """The one stream of a `stdio:` tunnel; ended(error) once it is over."""

    __slots__ = ("_over",)

    def __init__(self, owner: Endpoint, label: Label, again: Callable[[Stream], None] | None, over: Callable[[Exception | None], None]):
        self._over = over
        super().__init__(owner, None, label, again)

    def _transport(self, sock: Any) -> Transport:
        return StdioTransport(self.loop, self._on_event)

    def check(self) -> None:
        """Nothing: what it writes to says when it breaks."""

    def _failed(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:  # a reader that went away knows by itself
            log.error("❌ %s: standard input or output: %s", self.label, reason(error))
        super()._failed(error)

    def finished(self) -> None:
        super().finished()
        self._over(None)

    def lost(self, error: Exception) -> None:
        super().lost(error)
        self._over(error)


class LastWord:
    """Sends a few bytes and FIN, then discards what comes until the other side's FIN, for 2 s at most: closing on unread bytes would be a
    reset, which destroys them. ended(self) when that is over, if it has not been over at once."""

    def __init__(self, loop: EventLoop, sock: socket.socket, data: bytes, ended: Callable[[LastWord], None] = lambda _self: None):
        self._transport = Transport(loop, sock, self._on_event)
        self._room = memoryview(bytearray(4096))
        self._timer = loop.call_later(2, self.close)
        self._ended, self.is_over = lambda _self: None, False
        try:
            self._transport.send(data)
            self._transport.half_close()
            self._transport.want(READ)
        except OSError:
            self.close()
        self._ended = ended

    def _on_event(self, _mask: int) -> None:
        try:
            if self._transport.recv_into(self._room) == 0:
                self.close()
        except OSError:
            self.close()

    def close(self) -> None:
        self._timer.cancel()
        self._transport.close()
        if not self.is_over:
            self.is_over = True
            self._ended(self)


CONNECTING_CODES = (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK)


class Connector:
    """Connects to the first of `addresses` that answers, without blocking: done(socket, None) or done(None, error) on the loop."""

    def __init__(self, loop: EventLoop, addresses: list[str], port: int, timeout: float,
                 done: Callable[[socket.socket | None, Exception | None], None]):
        self._loop, self._addresses, self._port, self._done = loop, list(addresses), port, done
        self._until = time.monotonic() + timeout
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self._error: Exception = ConnectError("it has no address")
        self._try_next()

    def _try_next(self) -> None:
        while self._addresses:
            host = self._addresses.pop(0)
            left = self._until - time.monotonic()
            unix = host.startswith("/")
            where: Any = host if unix else (host, self._port)
            try:
                family = getattr(socket, "AF_UNIX", -1) if unix else socket.AF_INET6 if ":" in host else socket.AF_INET
                self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                self._error = error  # no such family here, or no descriptor left
                continue
            sock.setblocking(False)
            tune(sock)
            code = sock.connect_ex(where)
            if code == errno.EINPROGRESS:  # near by it is through by now: asking saves waiting for the selector to say so
                code = sock.connect_ex(where)
            if code in (0, errno.EISCONN) and left > 0:
                return self._done(sock, None)
            if code in CONNECTING_CODES and left > 0 and not unix:  # a Unix socket whose queue is full stays as it is
                # Each address gets its share of the time: one that swallows packets must not use up the others'.
                self._timer = self._loop.call_later(left / (len(self._addresses) + 1), lambda: self._failed(socket.timeout("timed out")))
                return self._loop.watch(sock, 0, WRITE, self._on_event)
            self._error = OSError(code, os.strerror(code)) if left > 0 else socket.timeout("timed out")
            sock.close()
        self._done(None, self._error)

    def _on_event(self, _mask: int) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self._failed(OSError(code, os.strerror(code)))
        self._stop_waiting()
        self._done(self._sock, None)

    def _failed(self, error: Exception) -> None:
        self._error = error
        self._stop_waiting()
        assert self._sock is not None
        self._sock.close()
        self._try_next()

    def _stop_waiting(self) -> None:
        assert self._sock is not None and self._timer is not None
        self._timer.cancel()
        self._loop.watch(self._sock, WRITE, 0, self._on_event)


# ======================================================================================================================
# 9. UDP
# ======================================================================================================================
# One session for each originator address. ratrod2: the sessions of all tunnels of a client share one link. Legacy: each has its own,
# where its number is 0 and goes without saying.

IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8 if sys.platform.startswith("linux") else None)  # named only in newer Pythons
Originator = Tuple[Any, Any]  # its address, and the control message that makes an answer leave from the address it asked


class UdpSession:
    """One originator's datagrams; the two ends differ in deliver() and in what they hold. `carrier` is the link they travel on."""

    __slots__ = ("table", "key", "carrier", "number", "label", "last_used", "sent", "received", "started")

    def __init__(self, table: UdpSessionTable, key: Any, label: Label, now: float):
        self.table, self.key, self.label = table, key, label
        self.carrier: UdpLink | None = None
        self.number = 0
        self.last_used = self.started = now
        self.sent = self.received = 0
        table.add(self)

    def arrived(self, data: memoryview, now: float) -> None:
        """A datagram came over the link."""
        self.table.touch(self, now)
        self.received += len(data)
        # What its socket does not take is lost; an ICMP error that shows here belongs to an earlier datagram and ends nothing.
        with contextlib.suppress(OSError):
            self.deliver(data)

    def deliver(self, data: memoryview) -> None:
        raise NotImplementedError

    def closed(self) -> None:
        """Lets go of what this end holds."""

    def end(self, error: Exception | None = None, tell: tuple[int, str] | None = (UNKNOWN, "")) -> None:
        """Forgets the session, and tells the other side why unless that was what told us. May be called twice."""
        if not self.table.remove(self):
            return
        self.closed()
        if self.carrier:
            self.carrier.drop(self, tell)
        self.table.counters.over(self, error)

    @property
    def peer_key(self) -> bytes:
        return self.table.peer_key


class UdpSessionTable:
    """Sessions by key, the least recently used first: that order serves both the cap and the idle expiry. All are of one `peer_key`."""

    __slots__ = ("counters", "peer_key", "_cap", "_timeout", "_sessions")

    def __init__(self, cap: int, timeout: float, counters: Counters, peer_key: bytes = b""):
        self._cap, self._timeout, self.counters, self.peer_key = cap, timeout, counters, peer_key
        self._sessions: collections.OrderedDict[Any, UdpSession] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: Any) -> UdpSession | None:
        return self._sessions.get(key)

    def oldest(self) -> UdpSession:
        return next(iter(self._sessions.values()))

    def add(self, session: UdpSession) -> None:
        while len(self._sessions) >= self._cap:
            self.oldest().end()
        self._sessions[session.key] = session
        self.counters.sessions.add(session)

    def touch(self, session: UdpSession, now: float) -> None:
        session.last_used = now
        self._sessions.move_to_end(session.key)

    def remove(self, session: UdpSession) -> bool:
        if self._sessions.get(session.key) is not session:
            return False
        del self._sessions[session.key]
        return True

    def expire(self, now: float) -> None:
        """Ends the sessions that have been idle too long."""
        while self._sessions and self.oldest().last_used <= now - self._timeout:
            self.oldest().end()

    def clear(self, error: Exception | None = None) -> None:
        for session in list(self._sessions.values()):
            session.end(error, tell=None)

    def end_of(self, port: Any) -> None:
        """Ends the sessions of one UdpPort."""
        for session in [session for key, session in self._sessions.items() if key[0] is port]:
            session.end()  # where telling the other side finds the link dead, others of them end by that already


class UdpLink(LinkUser):
    """What a link with UDP sessions carries, and the runs of datagrams that wait for it: bounded in bytes and in time."""

    __slots__ = ("loop", "limits", "link", "sessions", "dropped", "_queue", "_queued")

    def __init__(self, loop: EventLoop, limits: Limits):
        self.loop, self.limits = loop, limits
        self.link: Link | None = None
        self.sessions: dict[int, UdpSession] = {}
        self.dropped = 0
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._queued = 0

    def send_run(self, end: int) -> None:
        """Sends the run of datagrams at scratch_out[HEADROOM:end], or keeps it where the link is not there or has a backlog."""
        if self.link is not None and not self.link.backlog and not self._queue:
            return self.link.send(self.link.writer.datagrams(self.loop.scratch_out, end))
        run = bytes(self.loop.scratch_out[HEADROOM:end])
        self._queue.append((self.loop.now, run))
        self._queued += len(run)
        while self._queued > self.limits.udp_backlog:
            self._drop_oldest(self._queued - self.limits.udp_backlog)
        return None

    def _drop_oldest(self, n: int) -> None:
        """n bytes of datagrams, or a little more, of the oldest run."""
        when, run = self._queue[0]
        at = 0
        while at < min(n, len(run)):
            at += DATAGRAM_HEADER.size + DATAGRAM_HEADER.unpack_from(run, at)[1]
            self.dropped += 1
        self._queued -= at
        if at < len(run):
            self._queue[0] = when, run[at:]
        else:
            self._queue.popleft()

    def _pop(self, dropped: bool) -> bytes:
        _, run = self._queue.popleft()
        self._queued -= len(run)
        self.dropped += dropped
        return run

    def _send_queue(self) -> None:
        while self._queue and self.link and not self.link.backlog:
            run = self._pop(dropped=False)
            self.loop.payload[:len(run)] = run
            self.link.send(self.link.writer.datagrams(self.loop.scratch_out, HEADROOM + len(run)))

    def update(self) -> None:
        # While the link was open these waited for nothing but it; what it made wait too long is stale.
        if self.link is not None and self.link.state == UDP_OPEN:
            while self._queue and self._queue[0][0] < self.loop.now - self.limits.udp_lag:
                self._pop(dropped=True)
        self._send_queue()

    def datagrams(self, run: memoryview) -> None:
        at = 0
        for n, (number, data) in enumerate(split_datagrams(run)):
            if n == DATAGRAMS_IN_TURN and self.link:
                self.link.held = True
                self.loop.call_soon(functools.partial(self._go_on_with, bytes(run[at:])))
                return
            at += DATAGRAM_HEADER.size + len(data)
            session = self.sessions.get(number)
            if session:  # else it is one that this side has forgotten
                session.arrived(data, self.loop.now)

    def _go_on_with(self, rest: bytes) -> None:
        """After the others had their turn."""
        if not self.link or self.link.state != UDP_OPEN:
            return
        self.link.held = False
        try:
            self.datagrams(memoryview(rest))
        except RemoteProtocolError as error:
            return self.link.die(error)
        if self.link and not self.link.held:
            self.link.release()

    def datagram(self, data: memoryview) -> None:
        for session in self.sessions.values():
            session.arrived(data, self.loop.now)

    def forget(self, message: SessionOver) -> None:
        session = self.sessions.get(message.number)
        if session:
            session.end(tell=None)

    def drop(self, session: UdpSession, tell: tuple[int, str] | None) -> None:
        """A session has ended on this side. On the legacy wire its link ends with it."""
        self.sessions.pop(session.number, None)
        if self.link and not self.link.writer.pools:
            self.link.close()
        elif self.link and tell:
            self.link.send(self.link.writer.record(SESSION_OVER, session.number, *tell))

    def die(self, error: Exception) -> None:
        if self.link:
            self.link.die(error)


class DatagramBatch:
    """Gathers the datagrams of one callback into as few records as possible, in the loop's scratch buffer: each is received right where
    it is sealed."""

    def __init__(self, loop: EventLoop):
        self._scratch = loop.scratch_out
        self._at = HEADROOM
        self._carrier: UdpLink | None = None

    def room(self) -> memoryview:
        """Where the next datagram is to be received."""
        start = self._at + DATAGRAM_HEADER.size
        return self._scratch[start:start + MAX_DATAGRAM + 1]

    def add(self, session: UdpSession, n: int, now: float) -> None:
        """The n bytes in room() belong to `session`."""
        carrier = session.carrier
        assert carrier is not None
        if n > MAX_DATAGRAM:  # IPv6 allows a little more; room() has cut it off
            return
        session.table.touch(session, now)
        session.sent += n
        if carrier is not self._carrier or self._at + DATAGRAM_HEADER.size + n > HEADROOM + DATAGRAMS_AT_ONCE:
            data = bytes(self.room()[:n]) if self._carrier else None  # sealing the run writes its tag over what follows it
            self.flush()
            if data is not None:
                self.room()[:n] = data
            self._carrier = carrier
        DATAGRAM_HEADER.pack_into(self._scratch, self._at, session.number, n)
        self._at += DATAGRAM_HEADER.size + n

    def flush(self) -> None:
        carrier, end = self._carrier, self._at
        self._carrier, self._at = None, HEADROOM
        if carrier is not None:
            carrier.send_run(end)


class RemoteUdpSession(UdpSession):
    """The server's end: a socket connected to the target once that has been looked up; a few datagrams wait for it."""

    __slots__ = ("_sock", "_waiting")

    def __init__(self, relay: UdpRelay, number: int, label: Label):
        super().__init__(relay.table, number, label, relay.loop.now)
        self.carrier, self.number = relay, number
        relay.sessions[number] = self
        self._sock: socket.socket | None = None
        self._waiting: list[bytes] = []

    def connected(self, sock: socket.socket) -> None:
        if self.table.get(self.key) is not self:
            return sock.close()
        assert self.carrier is not None
        self._sock = sock
        self.carrier.loop.watch(sock, 0, READ, self._on_event)
        for data in self._waiting:
            with contextlib.suppress(OSError):
                sock.send(data)
        self._waiting.clear()
        return None

    def _on_event(self, _mask: int) -> None:
        carrier = self.carrier
        assert carrier is not None and self._sock is not None
        batch = carrier.loop.batch
        for _ in range(BATCH):
            try:
                n = self._sock.recv_into(batch.room())
            except OSError:  # nothing more is there, or an ICMP error of an earlier datagram
                break
            batch.add(self, n, carrier.loop.now)
        batch.flush()

    def deliver(self, data: memoryview) -> None:
        if self._sock:
            self._sock.send(data)
        elif len(self._waiting) < BATCH and sum(map(len, self._waiting)) + len(data) <= MAX_DATAGRAM:
            self._waiting.append(bytes(data))

    def closed(self) -> None:
        if self._sock and self.carrier:
            self.carrier.loop.watch(self._sock, READ, 0, self._on_event)
            self._sock.close()


class UdpRelay(UdpLink):
    """The server's end of a link with UDP sessions; `open_session(session, target)` connects a new one or ends it."""

    __slots__ = ("table", "key", "_origin", "_open_session", "_lost", "_highest", "_new")

    def __init__(self, loop: EventLoop, limits: Limits, link: Link, origin: str,
                 open_session: Callable[[UdpRelay, RemoteUdpSession, str], None], lost: Callable[[UdpRelay], None]):
        super().__init__(loop, limits)
        # A little more patient than the client, which then is the one to say SessionOver; the legacy one has no timer.
        self.table = UdpSessionTable(limits.udp_sessions, limits.udp_timeout * (1.25 if link.writer.pools else 1), link.owner.counters, link.peer_key)
        self.link, self.key, self._origin, self._open_session, self._lost = link, link.peer_key, origin, open_session, lost
        self._highest, self._new = -1, 0
        link.transport.limit_unsent(UNSENT_DATAGRAMS)

    def session(self, message: Session) -> None:
        if message.number <= self._highest:
            raise RemoteProtocolError("a UDP session with the number %d, which is not a new one" % message.number)
        self._highest = message.number
        session = RemoteUdpSession(self, message.number, new_label(self._origin, "udp " + message.target))
        if self.link is None:  # it ended while the new session pushed out an old one
            return session.end(tell=None)
        self._open_session(self, session, message.target)
        self._new += 1
        if self.link and (self._new >= BATCH or self.link.backlog > self.limits.udp_backlog):
            self._new, self.link.held = 0, True
            self.loop.call_later(0.01, self._go_on)
        return None

    def _go_on(self) -> None:
        """After a pause for the others; and as long as the client does not read what it is told, nothing more is done for it."""
        if self.link and self.link.backlog > self.limits.udp_backlog:
            self.loop.call_later(0.1, self._go_on)
        elif self.link:
            self.link.release()

    def recheck(self, permitted: Callable[[Link, str], Any]) -> None:
        """Ends the sessions whose target permitted(link, target) refuses with PolicyError."""
        for session in list(self.sessions.values()):
            try:
                if self.link:
                    permitted(self.link, session.label.target.split(" ")[-1])
            except PolicyError as error:
                session.end(error, tell=(INVALID_HOST, REFUSED))

    def drop(self, session: UdpSession, tell: tuple[int, str] | None) -> None:
        super().drop(session, tell)
        if self.link and self.link.state == CLOSED:  # legacy: it ended with its only session, without lost()
            self.link = None
            self._lost(self)

    def lost(self, error: Exception) -> None:
        self.link = None
        self.table.clear()
        self._lost(self)
        log_link_loss(self.table.counters, self.key, "UDP link of `%s`" % self._origin, error)


class LocalUdpSession(UdpSession):
    """The client's end: an originator that a UdpPort hears."""

    __slots__ = ("port", "originator", "target", "deaf_until")

    def __init__(self, table: UdpSessionTable, port: UdpPort, originator: Originator, target: str, now: float):
        self.port, self.originator, self.target = port, originator, target
        self.deaf_until = 0.0  # after a failure what comes is dropped for a second; after a refusal until the originator has been quiet
        super().__init__(table, (port, originator, target), new_label(show_address(originator[0]), "udp " + target), now)

    def deliver(self, data: memoryview) -> None:
        self.port.send(data, self.originator, self.target)

    def failed(self, error: Exception, now: float) -> None:
        """Its link failed, or the server refused it: said once, not for every datagram."""
        log.log(logging.DEBUG if self.deaf_until else logging.ERROR, "❌ %s: %s", self.label, reason(error))
        forbidden = isinstance(error, PeerError) and error.code == INVALID_HOST
        # A remote that could not be looked up or reached may be there later: whoever goes on asking, as WireGuard does, is to be heard again.
        self.deaf_until = float("inf") if forbidden else now + (UDP_REST if isinstance(error, PeerError) else 1)
        self.carrier = None


class UdpCarrier(UdpLink):
    """The client's end of a link with UDP sessions. Until it is there, and from Opened on, datagrams wait as UdpLink has it."""

    __slots__ = ("began_at", "_lost", "_next")

    def __init__(self, loop: EventLoop, limits: Limits, lost: Callable[[UdpCarrier, Exception], None]):
        super().__init__(loop, limits)
        self._lost = lost
        self._next = 1
        self.began_at: float | None = None

    def take(self, session: LocalUdpSession) -> None:
        """Carries `session` from now on, under a number of its own."""
        session.carrier, session.number = self, self._next
        self._next += 1
        self.sessions[session.number] = session
        if self.link:
            self._announce(session)

    def _announce(self, session: UdpSession) -> None:
        assert isinstance(session, LocalUdpSession)
        if self.link and self.link.writer.pools:
            self.link.send(self.link.writer.record(SESSION, session.number, session.target))

    def begin(self, link: Link, deadline: float) -> None:
        self.began_at = self.loop.now
        link.transport.limit_unsent(UNSENT_DATAGRAMS)
        link.ask(self, UDP, "", deadline)
        self.link = link  # only now: a datagram must not pass the Open and the Session it belongs to
        for session in list(self.sessions.values()):
            self._announce(session)
        self._send_queue()

    def forget(self, message: SessionOver) -> None:
        session = self.sessions.get(message.number)
        if message.code == UNKNOWN or not isinstance(session, LocalUdpSession):
            return super().forget(message)  # forgotten there: the next datagram makes a new session
        del self.sessions[message.number]
        return session.failed(PeerError(message.code, printable(message.text)), self.loop.now)

    def lost(self, error: Exception) -> None:
        self.link = None
        self._lost(self, error)


class UdpPort:
    """One UDP socket that a tunnel listens on: receive(port, originator, remote) gives the session that a datagram belongs to, or None."""

    def __init__(self, loop: EventLoop, sock: socket.socket, receive: Callable[[UdpPort, Originator, str], UdpSession | None], remote: str):
        self.loop, self.sock, self._receive, self._remote = loop, sock, receive, remote
        sock.setblocking(False)
        self._pktinfo = self._ask_for_destinations()

    def _ask_for_destinations(self) -> bool:
        """A socket on a wildcard address answers from the address that was asked; otherwise the kernel picks, and the originator
        does not know the answer for its own."""
        if self.sock.getsockname()[0] not in ("0.0.0.0", "::") or not hasattr(self.sock, "recvmsg_into"):
            return False
        v6 = self.sock.family == socket.AF_INET6
        level, option = (socket.IPPROTO_IPV6, getattr(socket, "IPV6_RECVPKTINFO", None)) if v6 else (socket.IPPROTO_IP, IP_PKTINFO)
        if option is None:
            return False
        self.sock.setsockopt(level, option, 1)
        return True

    def start(self) -> None:
        self.loop.watch(self.sock, 0, READ, self._on_event)

    def drain(self) -> None:
        """What waits is not taken: UDP may lose."""
        self.close()

    def _on_event(self, _mask: int) -> None:
        batch = self.loop.batch
        for _ in range(BATCH):
            try:
                if self._pktinfo:
                    n, control, _flags, address = self.sock.recvmsg_into([batch.room()], 256)
                    originator = address, self._answer_from(control)
                else:
                    n, address = self.sock.recvfrom_into(batch.room())
                    originator = address, None
            except OSError:  # nothing more is there, or an ICMP error of an earlier answer
                break
            session, skip = self._find(originator, batch.room()[:n])
            if session:
                if skip:
                    batch.room()[:n - skip] = batch.room()[skip:n]
                batch.add(session, n - skip, self.loop.now)
        batch.flush()

    def _find(self, originator: Originator, _data: memoryview) -> tuple[UdpSession | None, int]:
        """The session of a datagram, and how many of its bytes are not payload."""
        return self._receive(self, originator, self._remote), 0

    @staticmethod
    def _answer_from(control: list[tuple[int, int, bytes]]) -> Any:
        for level, kind, data in control:
            if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
                _interface, asked, _destination = struct.unpack("=I4s4s", data[:12])
                return level, kind, struct.pack("=I4s4s", 0, asked, bytes(4))
            if level == socket.IPPROTO_IPV6 and kind == getattr(socket, "IPV6_PKTINFO", None):
                return level, kind, data
        return None

    def send(self, data: bytes | memoryview, originator: Originator, _remote: str) -> None:
        address, control = originator
        if control:
            self.sock.sendmsg([data], [control], 0, address)
        else:
            self.sock.sendto(data, address)

    def close(self) -> None:
        with contextlib.suppress(KeyError, ValueError):  # never started
            self.loop.watch(self.sock, READ, 0, self._on_event)
        self.sock.close()


class SocksUdpPort(UdpPort):
    """The UDP socket of one SOCKS5 association: each datagram names its own remote. Only the machine that asked for it is heard."""

    def __init__(self, loop: EventLoop, sock: socket.socket, receive: Callable[[UdpPort, Originator, str], UdpSession | None], host: str):
        super().__init__(loop, sock, receive, "")
        self._host = host

    def _find(self, originator: Originator, data: memoryview) -> tuple[UdpSession | None, int]:
        try:
            target, skip = split_socks_datagram(data)
            if originator[0][0] != self._host:
                return None, 0
            return self._receive(self, originator, str(parse_target(target))), skip
        except ValueError:
            return None, 0

    def send(self, data: bytes | memoryview, originator: Originator, remote: str) -> None:
        super().send(b"\0\0\0" + socks_address(parse_target(remote)) + bytes(data), originator, remote)


class SocksAssociation:
    """A UDP ASSOCIATE: lives as long as the TCP connection that asked for it. ended(port) when that is over."""

    def __init__(self, loop: EventLoop, sock: socket.socket, receive: Callable[[UdpPort, Originator, str], UdpSession | None],
                 ended: Callable[[SocksAssociation], None]):
        self._ended = ended
        self._transport = Transport(loop, sock, self._on_event)
        udp = socket.socket(sock.family, socket.SOCK_DGRAM)
        try:
            udp.bind((sock.getsockname()[0], 0))
            self.port = SocksUdpPort(loop, udp, receive, sock.getpeername()[0])
            host, port = udp.getsockname()[:2]
            self._transport.send(socks_reply(0, Address(unmapped(host), port)))
        except OSError:
            udp.close()
            raise
        self.port.start()
        self._transport.want(READ)

    def _on_event(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            if self._transport.recv_into(memoryview(bytearray(4096))) != 0:
                return
        self.close()

    def close(self) -> None:
        self._transport.close()
        self.port.close()
        self._ended(self)


class Negotiation:
    """Somebody who has not said yet what he wants: a client of a SOCKS tunnel, or a proxy. done(self, handshake, "") when he has, or
    done(self, None, why not)."""

    def __init__(self, loop: EventLoop, sock: socket.socket, address: Any, handshake: Handshake, timeout: float,
                 done: Callable[[Negotiation, Any, str], None]):
        self.sock, self.address, self.untouched = sock, address, True
        self._loop, self._done, self._handshake = loop, done, handshake
        self._transport = Transport(loop, sock, self._on_event)
        self._timer = loop.call_later(timeout, lambda: self._refuse("it did not say what it wants within %g s" % timeout))
        self._transport.want(READ)

    def _on_event(self, mask: int) -> None:
        if not mask & self._transport.events:  # closed in this very round, to make room
            return None
        try:
            while not self._handshake.done:
                data = self._transport.sock.recv(self._handshake.wanted)
                if not data:
                    return self._refuse("it left")
                self.untouched = False
                self._handshake.receive_data(data)
                answer = self._handshake.data_to_send()
                if answer:
                    self._transport.send(answer)
        except (BlockingIOError, InterruptedError):
            return None
        except (RatrodError, OSError) as error:
            return self._refuse(reason(error))
        self._leave()
        return self._done(self, self._handshake, "")

    def _leave(self) -> None:
        self._timer.cancel()
        self._transport.want(0)

    def _refuse(self, why: str) -> None:
        self._leave()
        LastWord(self._loop, self.sock, self._handshake.data_to_send())
        self._done(self, None, why)

    def close(self) -> None:
        self._leave()
        self.sock.close()
        self._done(self, None, "others needed its place")


# ======================================================================================================================
# 10. Endpoints
# ======================================================================================================================


def descriptor_limit() -> int:
    """How many descriptors this process may have open."""
    try:
        import resource

        return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)
    except (ImportError, ValueError, OSError):
        return 512  # what select() takes on Windows


TUNNEL_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)  # what each tunnel listens on


def look_up(address: Address, kind: int = socket.SOCK_STREAM, flags: int = 0) -> list[tuple[int, Any]]:
    """(family, socket address) of each address of a host, blocking. ConnectError says why there is none."""
    try:
        found = socket.getaddrinfo(address.host, address.port, 0, kind, 0, flags)
    except (OSError, UnicodeError) as error:
        raise ConnectError("cannot resolve `%s`: %s" % (printable(address.host), reason(error))) from None
    return list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in found))


def bind_socket(family: int, kind: int, sockaddr: Any, share: bool) -> socket.socket:
    """A bound socket, listening where it is TCP; `share`: the processes of this user may bind the port once more."""
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM and os.name == "posix":  # elsewhere it would take over a port in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # [::] takes IPv4 too
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, sockaddr[0] != "::")
        sock.bind(sockaddr)
        if kind == socket.SOCK_STREAM:
            tune(sock)
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def bind_all(address: Address, kinds: tuple[int, ...], share: bool = False) -> list[socket.socket]:
    """One socket for each of `kinds` on every address of the host, all on its port, or for 0 on the one that the first is given."""
    port = address.port
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for kind in kinds:
            # Not every hosts file gives localhost both its addresses.
            hosts = ("127.0.0.1", "::1") if address.host == "localhost" else (address.host,)
            for family, sockaddr in [found for host in hosts for found in look_up(address._replace(host=host), kind, socket.AI_PASSIVE)]:
                try:
                    sock = bind_socket(family, kind, (sockaddr[0], port) + tuple(sockaddr[2:]), share)
                except OSError as error:
                    # IPv6 may be switched off.
                    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and address.host == "localhost":
                        continue
                    raise
                stack.callback(sock.close)
                sockets.append(sock)
                port = sock.getsockname()[1]
        stack.pop_all()
        return sockets


def listen(address: Address, kinds: tuple[int, ...] = (socket.SOCK_STREAM,), share: bool = False) -> list[socket.socket]:
    """Sockets on every address of the host, for each of `kinds`, all with one port: the one asked for, or for 0 any that is free in all.

    `share`: others that share it too may listen there (SO_REUSEPORT). RatrodError names the address and the reason.
    """
    tries = 20 if address.port == 0 else 1  # TCP may be given a free number that UDP, or the other family, does not have
    while True:
        tries -= 1
        try:
            return bind_all(address, kinds, share)
        except (OSError, ConnectError) as error:
            busy = getattr(error, "errno", None) == errno.EADDRINUSE
            if busy and tries:
                continue
            hint = ". Is another program, or another ratrod, on that port?" if busy else ""
            raise RatrodError("cannot listen on `%s`: %s%s" % (address, reason(error), hint)) from None


def listen_for(workers: int, address: Address, kinds: tuple[int, ...] = (socket.SOCK_STREAM,), share: bool = False) -> list[list[socket.socket]]:
    """listen() for each of several processes that are still to be forked, on the same port: with SO_REUSEPORT sockets of its own, among
    which the kernel spreads the connections; where there is none, the same ones."""
    if share and not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("--reuse-port needs a system where processes can share a port (SO_REUSEPORT), and this one cannot; leave it out")
    sockets = listen(address, kinds, share)
    if workers == 1 or not hasattr(socket, "SO_REUSEPORT"):
        return [sockets] * workers
    # Bound without sharing first: a port that another program has, though willing to share it, is a port that is taken.
    address = address._replace(port=sockets[0].getsockname()[1])
    close_all(sockets)
    try:
        return [bind_all(address, kinds, share=True) for _ in range(workers)]
    except OSError as error:
        raise RatrodError("cannot listen on `%s`: %s" % (address, reason(error))) from None


class Listener:
    """A listening TCP socket: accepted(socket, address) for each connection. Pauses when descriptors run out, and before: each connection
    needs one more to go on with, and who is in already must not be refused for those that come. On POSIX the lowest free one is taken."""

    def __init__(self, loop: EventLoop, sock: socket.socket, accepted: Callable[[socket.socket, Any], None], pause: float):
        self._loop, self.sock, self._accepted, self._pause = loop, sock, accepted, pause
        limit = descriptor_limit()
        self._most = limit - min(64, limit // 8) if os.name == "posix" else sys.maxsize
        sock.setblocking(False)
        self._watched = self._rests = False

    def start(self) -> None:
        self._rests = False
        if self.sock.fileno() >= 0 and not self._watched:
            self._loop.watch(self.sock, 0, READ, self._on_event)
            self._watched = True

    def _on_event(self, _mask: int) -> bool:
        """Whether there may be more."""
        for n in range(BATCH):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno not in NO_SUCH_DESCRIPTORS and n < BATCH - 1:
                    continue  # this one was gone before it was accepted; or all of them are, for a socket that is no more fails each time
                self._starve(reason(error))
                return False
            number = sock.fileno()
            self._accepted(sock, address)
            if number >= self._most:
                self._starve("nearly all of the %d descriptors are taken (ulimit -n)" % descriptor_limit())
                return False
        return True

    def _starve(self, why: str) -> None:
        """Lets the connections wait in the system's queue for a moment, and says so once a minute."""
        if self._loop.now - self._loop.starved_at > 60:  # one line for all listeners
            log.warning("cannot accept connections for now: %s", why)
            self._loop.starved_at = self._loop.now
        self._unwatch()
        self._rests = True
        self._loop.call_later(self._pause, self.start)

    def drain(self) -> None:
        """Takes those that wait in the system's queue, which closing would reset, and closes. None come after them, so no descriptor is spared."""
        self._most = sys.maxsize
        for _ in range(BACKLOG // BATCH + 1):  # not for as long as others come: a flood must not hold up the end
            if not (self._watched or self._rests) or not self._on_event(0):
                break
        self.close()

    def _unwatch(self) -> None:
        if self._watched:
            self._loop.watch(self.sock, READ, 0, self._on_event)
            self._watched = False

    def close(self) -> None:
        self._unwatch()
        self.sock.close()


def listen_for_tunnel(workers: int, spec: TunnelSpec) -> list[list[socket.socket]]:
    """What a tunnel listens on here, for each of several processes; nothing for those that do not."""
    if spec.kind in (STDIO, REVERSE):
        return [[]] * workers
    if spec.local.is_unix:
        return [[listen_unix(spec.local.host)]] * workers
    return listen_for(workers, spec.local, TUNNEL_KINDS if spec.kind == FORWARD and not spec.remote.is_unix else TUNNEL_KINDS[:1])


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path` that its owner alone can connect to. One that nobody listens on any more is replaced; RatrodError
    names what else is there."""
    if not hasattr(socket, "AF_UNIX"):
        raise RatrodError("cannot listen on `unix:%s`: this system has no Unix sockets here" % path)
    sock = UnixListener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_path(path)
        sock.bind_privately(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise RatrodError("cannot listen on `unix:%s`: %s" % (path, reason(error))) from None
    return sock


class UnixListener(socket.socket):
    """A Unix socket that takes its file with it when it is closed, unless another has that path by then."""

    _file: tuple[str, int, int] | None = None

    def bind_privately(self, path: str) -> None:
        with contextlib.suppress(OSError):  # Linux: the file gets this mode from its first moment on, and no umask of other threads changes
            os.fchmod(self.fileno(), 0o600)
        self.bind(path)
        status = os.lstat(path)
        self._file = path, status.st_dev, status.st_ino
        os.chmod(path, 0o600)

    def close(self) -> None:
        if self._file and self.fileno() >= 0:
            path, *file = self._file
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if [status.st_dev, status.st_ino] == file:
                    os.unlink(path)
        super().close()


def _clear_path(path: str) -> None:
    """Removes a Unix socket whose listener is gone; FileExistsError where something else is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is there")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
        raise FileExistsError(errno.EADDRINUSE, "another program listens there")
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        os.unlink(path)


def drive(sock: socket.socket, handshake: Handshake, timeout: float) -> None:
    """Runs a handshake over a blocking socket, on a thread. RatrodError says what went wrong; data_to_send() may hold a last word then."""
    until = time.monotonic() + timeout
    try:
        while True:
            sock.settimeout(max(0.001, until - time.monotonic()))
            sock.sendall(handshake.data_to_send())
            if handshake.done:
                return
            data = sock.recv(handshake.wanted)
            if time.monotonic() > until:  # each byte of a drip would start the socket's own time anew
                raise socket.timeout()
            if data:
                handshake.receive_data(data)
            else:
                handshake.receive_eof()
    except socket.timeout:
        raise RemoteProtocolError("the handshake was not done within %g s" % timeout) from None
    except OSError as error:
        handshake.receive_eof("the connection broke (%s)" % reason(error))


class Endpoint:
    """What server and client share: the loop, the identity, the limits, the links, what ages and the threads."""

    def __init__(self, loop: EventLoop, folder: KeyFolder, limits: Limits, legacy: bool, threads: int):
        self.loop, self.folder, self.limits, self.legacy = loop, folder, limits, legacy
        self.keys = folder.load()
        for warning in folder.warnings:
            log.warning(warning)
        self.counters = Counters()
        self.links: set[Link] = set()
        self.listeners: list[Listener | UdpPort] = []
        loop.batch = loop.batch or DatagramBatch(loop)
        self.workers = WorkerPool(loop, threads)
        self.draining = False
        self._swept_at = boot_time()
        self._sweeper = loop.call_later(limits.sweep_interval, self._sweep)

    def start(self) -> None:
        raise NotImplementedError

    # ---- what a link tells its owner

    def open_asked(self, link: Link, message: Open) -> None:
        """Acceptor: the other side wants a stream, or the UDP sessions, on this link."""

    def link_idle(self, link: Link, end: bytes = b"") -> None:
        """The stream on it is over on both sides; acceptor: `end` is to leave before whatever it says to that."""

    def link_completed(self, link: Link) -> None:
        """Opener: HandshakeCompletion came."""

    def client_refused(self, error: PeerError) -> None:
        """Opener: the server does not let this client in."""

    def link_ended(self, link: Link, error: Exception | None) -> None:
        self.links.discard(link)

    # ---- what ages: one timer for all, not one for each

    def _sweep(self) -> None:
        self._sweeper = self.loop.call_later(self.limits.sweep_interval, self._sweep)
        now = self.loop.awake
        # A machine that slept, or a process that was stopped, has not been listening: the others get time to be heard.
        late = now - self._swept_at - self.limits.sweep_interval > 10
        self._swept_at = now
        # 9,000 idle links: what needs nothing is passed by without a call, 3 ms each second in place of 20.
        quiet, silent = self.loop.now - self.limits.keepalive, now - self.limits.silence
        for link in list(self.links):
            if link.user is not NOBODY:
                link.user.check()
            if link.sent_at <= quiet or link.heard_at <= silent or late:
                self._keep_alive(link, now, late)
        self.sweep(self.loop.now)
        self.counters.failures.confess(self.loop.now)
        self.loop.trim()

    def _keep_alive(self, link: Link, now: float, late: bool) -> None:
        if not link.writer.pools or link.state == CLOSED:
            return
        if late:
            link.heard_at = max(link.heard_at, now - self.limits.silence + 15) if link.state != IDLE else link.heard_at
        if (late or self.loop.now - link.sent_at >= self.limits.keepalive) and not link.backlog and link.state != BYE:
            link.send(link.writer.record(KEEPALIVE))
        if now - link.heard_at < self.limits.silence or link.state == CLOSED:
            return
        # A side that holds back does not hear: what has been sent, Keepalives among it, and was not acknowledged tells instead.
        if link.transport.tcp_info().unanswered >= self.limits.silence if link.held else not link.hears():
            link.die(LinkClosed("nothing was heard from the other side for %g s: the path or the machine is dead" % self.limits.silence))

    def sweep(self, now: float) -> None:
        """Whatever else ages."""

    # ---- a remote for a link

    @property
    def patience(self) -> float:
        """How long the acceptor of a link may take to say Opened: its look-up and connect, and the rest of the handshake."""
        return self.limits.connect_timeout + self.limits.handshake_timeout

    def join(self, link: Link, sock: socket.socket | None, label: Label, failed: Callable[[], None]) -> None:
        """Acceptor: the remote is connected, and the stream begins; or it is not: failed()."""
        if link.state != CONNECTING:  # it was told already, or is gone
            if sock:
                sock.close()
        elif sock is None:
            failed()
        else:
            stream = Stream(self, sock, label)
            stream.link = link
            link.accept(stream)

    # ---- what it tells, and is told

    @property
    def handshakes(self) -> int:
        """How many are under way."""
        raise NotImplementedError

    def describe(self) -> Iterator[str]:
        """What it is and how it is, in a line, and a line for each thing that only this kind of endpoint has."""
        raise NotImplementedError

    def show_key(self, key: bytes) -> str:
        return "`%s`" % encode_key(key)

    def reload(self) -> None:
        """Reads everything again. Where that fails for the own key, the one that was read before stays."""
        self.folder.authorized_keys.forget()
        self.folder.known_hosts.forget()
        self.folder.warnings.clear()
        before = self.keys
        try:
            self.keys = self.folder.load()
        except ConfigError as error:
            log.error("❌ %s; the key that was read before stays in use", error)
        for warning in self.folder.warnings:
            log.warning(warning)
        self.reloaded(self.keys != before)
        log.info("🔄 Read again: `%s`, key `%s`", self.folder.path, encode_key(self.keys.public))

    def reloaded(self, new_key: bool) -> None:
        """What follows from that."""

    # ---- the end

    def drain(self, seconds: float, drained: Callable[[], None]) -> None:
        """Takes nothing new; drained() when all that is open has ended, or after so many seconds."""
        self.draining = True
        for listener in self.listeners:
            listener.drain()
        self.listeners.clear()
        self.let_go()
        now = time.monotonic()
        # Those that were told Close get a moment to see it; those that never look do not hold anybody up.
        until, told = now + seconds, now + min(1.0, seconds)
        left = sum(link.state not in (BYE, IDLE) for link in self.links)
        if left and seconds:
            log.info("🛑 Ending: %d connection%s may go on for %g s; a second signal ends at once", left, "s" * (left > 1), seconds)

        def look() -> None:
            now = time.monotonic()
            if now >= until or not self.busy() and (now >= told or not self.links):
                return drained()
            self.loop.call_later(0.02, look)
            return None
        look()

    def busy(self) -> bool:
        """Whether anything is open that an end would cut."""
        return any(link.state != BYE for link in self.links)

    def let_go(self) -> None:
        """What waits for something new ends: it will not come."""

    def close(self) -> None:
        """Ends everything at once."""
        self.workers.close()
        self._sweeper.cancel()
        for listener in self.listeners:
            listener.close()
        for link in list(self.links):
            if link.state == BYE:  # a reset would destroy the last word
                link.close()
            else:
                link.die(LocalFailed("ratrod is ending"))


class Source:
    """One address (IPv6: one /64) that connections come from: how fast, and how many. `network` is its /24 (IPv6: its /48)."""

    __slots__ = ("strangers", "links", "waiting", "seen_at", "network", "_tries", "_authorized_at")

    def __init__(self, name: str, now: float, limits: Limits):
        self.strangers = self.links = 0
        self.network = name.rpartition(".")[0] or self._within(name.partition("/")[0], 48)
        self.waiting: collections.deque[tuple[socket.socket, str]] = collections.deque()  # a burst's connections, not begun yet
        self.seen_at = now
        self._authorized_at = now - 3600
        self._tries = TokenBucket(limits.handshake_rate, limits.handshake_burst, now)

    def authorized(self, now: float) -> None:
        self._authorized_at = now

    def trusted(self, now: float) -> bool:
        """It has an authorized link, or had one a minute ago: legacy links come and go with each connection."""
        return self.links > 0 or now - self._authorized_at < 60

    def holds_nothing(self, now: float) -> bool:
        """Whether forgetting it gives nobody more than a new burst."""
        return not (self.strangers or self.waiting or self.trusted(now))

    def may_try(self, now: float) -> bool:
        """Whether one more handshake is within its rate; whoever is authorized has no such bound."""
        self.seen_at = now
        return self._tries.take(now) or self.trusted(now)

    @classmethod
    def name(cls, host: str) -> str:
        return cls._within(unmapped(host.split("%")[0]), 64)

    @staticmethod
    def _within(host: str, bits: int) -> str:
        """The network that an IPv6 address is in; any other host as it is."""
        import ipaddress

        return str(ipaddress.ip_network("%s/%d" % (host, bits), strict=False)) if ":" in host else host

    @classmethod
    def of(cls, shown: str) -> str:
        """The name of the source of a connection that is shown as `shown`."""
        return cls.name(split_host_port(shown)[0])


class Stranger:
    """A connection that is not authenticated yet; `admitted` once its thread has found that it is."""

    __slots__ = ("sock", "address", "source", "since", "admitted", "handshake", "left", "last_word")

    def __init__(self, sock: socket.socket, address: str, source: Source, since: float):
        self.sock, self.address, self.source, self.since, self.admitted = sock, address, source, since, b""
        self.handshake: Handshake | None = None
        self.left = False  # it had gone by itself when others needed its place
        self.last_word = b""  # what it is told when it is refused

    @property
    def has_begun(self) -> bool:
        """Whether it has said something that could be answered."""
        return self.handshake is not None and self.handshake.steps > 0


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side has ended its direction, where the system tells that without reading."""
    import select

    try:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


class Speechless(RemoteProtocolError):
    """It left without having said anything, as the probes of load balancers and of Kubernetes do: only shown with -v."""


class FairQueue:
    """Begins at most `most` things for one key at a time; the others of that key wait for their turn, and hold up no other key's."""

    def __init__(self, most: int):
        self._most = most
        self._running: dict[bytes, int] = {}  # none is 0
        self._waiting: dict[bytes, collections.deque[Callable[[], None]]] = {}
        self._beginning: set[bytes] = set()

    def begin(self, key: bytes, call: Callable[[], None]) -> None:
        """call() now or later; whatever it begins says done() once."""
        if key in self._waiting or self._running.get(key, 0) >= self._most:
            self._waiting.setdefault(key, collections.deque()).append(call)
            return self._go_on(key)
        self._running[key] = self._running.get(key, 0) + 1
        return call()

    def waiting(self, key: bytes) -> int:
        return len(self._waiting.get(key, ()))

    def done(self, key: bytes) -> None:
        left = self._running.pop(key) - 1
        if left:
            self._running[key] = left
        if key in self._waiting:
            self._go_on(key)

    def _go_on(self, key: bytes) -> None:
        if key in self._beginning:  # what is done as soon as it is begun: the loop below goes on with the next, not one call deeper
            return
        self._beginning.add(key)
        try:
            while self._running.get(key, 0) < self._most and self._waiting.get(key):
                self._running[key] = self._running.get(key, 0) + 1
                self._waiting[key].popleft()()
        finally:
            self._beginning.discard(key)
            if not self._waiting.get(key):
                self._waiting.pop(key, None)


class LookUps:
    """Name look-ups on threads of their own, so that a name server that hangs holds up no handshake; one client's hold up no other's."""

    def __init__(self, loop: EventLoop, limits: Limits):
        self._loop, self._limits = loop, limits
        self._pool = WorkerPool(loop, limits.lookup_threads)
        self._queue = FairQueue(limits.lookup_threads // 2)

    def close(self) -> None:
        self._pool.close()

    def submit(self, key: bytes, task: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """task() on a thread, at most half of them for one `key`; done(result, None) or done(None, error) within connect_timeout."""
        answered: list[bool] = []

        def answer(result: Any, error: Exception | None) -> None:
            if not answered:
                answered.append(True)
                timer.cancel()
                done(result, error)

        def finished(result: Any, error: Exception | None) -> None:
            self._queue.done(key)
            answer(result, error)
        timer = self._loop.call_later(self._limits.connect_timeout, lambda: answer(None, ConnectError("the name look-up took too long")))
        if self._queue.waiting(key) >= 256:
            return answer(None, ConnectError("too many name look-ups of this client wait already"))
        self._queue.begin(key, lambda: self._pool.submit((lambda: None) if answered else task, finished))


class ReverseStream(Stream):
    """One that came in at the server; it counts as its client's stream while it waits for a link, too."""

    __slots__ = ("_server",)

    def __init__(self, server: Server, *arguments: Any, **named: Any):
        self._server = server
        super().__init__(server, *arguments, **named)

    def _report(self, error: Exception | None = None) -> None:
        super()._report(error)
        self._server.stream_over(self)


class ReverseListener:
    """What a client's `R:` tunnel listens on at the server: its sockets, the links that wait for a connection, and the connections that wait
    for a link. It lives as long as any of its links, waiting or busy."""

    def __init__(self, server: Server, key: bytes, instance: bytes, asked: str, sockets: list[socket.socket]):
        self._server, self.key, self.instance, self.asked = server, key, instance, asked
        self.address = parse_bind(asked)._replace(port=sockets[0].getsockname()[1])
        self._retired: set[bytes] = set()
        self._links: dict[Link, bytes] = {}  # each with the instance that it came from
        self._waiting: list[Link] = []
        self._queue: collections.deque[Stream] = collections.deque()
        self._closed = False
        self._listeners = [Listener(server.loop, sock, self._accepted, server.limits.accept_pause) for sock in sockets]
        for listener in self._listeners:
            listener.start()

    def __str__(self) -> str:
        return "reverse tunnel on `%s`" % str(self.address)

    def join(self, link: Link, instance: bytes) -> None:
        """One more link; those of an older run of the same client wait no more."""
        self._links[link] = instance
        if instance != self.instance:
            log.debug("%s: taken over by a new run of its client", self)
            self._retired.add(self.instance)
            self.instance = instance
            for old in self._waiting[:]:
                old.close()
        link.turn(OPENER)
        link.send(link.writer.record(OPENED, str(self.address)))
        link.release()
        self.put(link)

    @property
    def abandoned(self) -> bool:
        """Only its grace keeps it."""
        return not self._links

    def is_retired(self, instance: bytes) -> bool:
        """Whether a later run than this one listens here: two that live must not take the address from each other for ever."""
        return instance in self._retired and self.instance in self._links.values()

    def put(self, link: Link) -> None:
        """A link that is idle now."""
        if link.state != IDLE:
            return
        if self._links[link] != self.instance or len(self._waiting) >= self._server.limits.waiting_links and not self._queue:
            return link.close()
        if self._queue:
            return self._queue.popleft().begin(link, self._server.patience)
        if self._server.draining:
            return link.close()
        return self._waiting.append(link)

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        label = new_label(show_address(address), "back through %s" % str(self.address))
        stream = ReverseStream(self._server, sock, label, self._carry, target=show_address(address))
        try:
            self._server.begin_stream(stream, self.key)
        except Overloaded as error:
            return stream.lost(error)
        return self._carry(stream)

    def _carry(self, stream: Stream) -> None:
        while self._waiting:
            link = self._waiting.pop()
            link.poll()
            heard = self._server.loop.awake - link.heard_at < self._server.limits.trusted
            if link.state == IDLE and heard and not link.transport.tcp_info().retransmits:
                return stream.begin(link, self._server.patience)
            link.die(LinkClosed("nothing passes on it any more"))  # a reset leaves at once, a FIN would wait for its turn
        if len(self._queue) >= self._server.limits.reverse_queue:
            return stream.lost(ConnectError("too many connections wait for a link of the client"))
        self._queue.append(stream)
        self._server.loop.call_later(self._server.limits.connect_timeout, lambda: self._give_up(stream))
        return None

    def _give_up(self, stream: Stream) -> None:
        if stream in self._queue:
            self._queue.remove(stream)
            stream.lost(ConnectError("the client has no link for it"))

    def gone(self, link: Link) -> None:
        """A link has ended."""
        self._links.pop(link, None)
        if link in self._waiting:
            self._waiting.remove(link)
        # Not at once: where the client refuses a connection its link ends, and the next one may be on its way.
        if not self._links and not self._closed:
            self._server.loop.call_later(GRACE, lambda: None if self._links else self.close())

    def drain(self) -> None:
        """Its connections go on; nothing new comes."""
        for listener in self._listeners:
            listener.drain()
        for link in self._waiting[:]:
            link.close()

    def close(self) -> None:
        """Ends it with all that it carries."""
        self._closed = True
        self._server.forget_reverse(self)
        for listener in self._listeners:
            listener.close()
        for link in list(self._links):
            link.die(LinkClosed("the reverse tunnel has ended"))
        while self._queue:
            self._queue.popleft().lost(LinkClosed("the reverse tunnel has ended"))


Authorizer = Callable[[str, str], bool]


class Server(Endpoint):
    """Listens for clients and connects them to the remotes they name, as far as `policy` allows."""

    def __init__(self, loop: EventLoop, folder: KeyFolder, bind: Address, policy: Policy, limits: Limits = DEFAULT_LIMITS, *,
                 legacy: bool = False, allow_listen: bool = False, authorize: Authorizer | None = None,
                 proxies: tuple[Any, ...] = (), sockets: list[socket.socket] | None = None, report: Report = log.info,
                 started: Callable[[], None] = lambda: None):
        super().__init__(loop, folder, limits, legacy, limits.handshakes)
        self._report, self._ready, self._authorizer, self.allow_listen = report, started, authorize, allow_listen
        self.policy, self._proxies = policy, proxies
        self._proxied: collections.OrderedDict[Negotiation, None] = collections.OrderedDict()  # whose PROXY header is still to come
        self.lookups = LookUps(loop, limits)
        self._sources: dict[str, Source] = {}
        self._most_sources = SOURCES
        self._complaints = FailureLog(LOG_RATE, LOG_BURST, "❌ Refused %d more connections from other addresses",
                                      TokenBucket(LOG_RATE_IN_ALL, LOG_BURST_IN_ALL, loop.now))
        self._strangers: collections.OrderedDict[socket.socket, Stranger] = collections.OrderedDict()  # the oldest first
        self._queued = 0  # connections that wait to become one of those
        self._dismissed: dict[LastWord, None] = {}  # who is told why not; the oldest first
        self._links_of: collections.Counter[bytes] = collections.Counter()
        self._streaming: dict[Any, bytes] = {}  # links that carry a stream or connect to its remote, and ReverseStreams: of which key
        self._streams_of: collections.Counter[bytes] = collections.Counter()
        self._connecting = FairQueue(limits.connects_per_key)
        self._relays: dict[bytes, set[UdpRelay]] = {}
        self._listed: Any = None  # authorized_keys as the links were last held against it, and what is wrong with it ...
        self._problems: list[str] = []
        self._expiry = float("inf")  # ... and when, by time.time(), the next of its lines expires
        self._reverse: set[ReverseListener] = set()
        self._listening: dict[Link, ReverseListener] = {}
        self._set_caps()
        self._admitting = threading.Lock()
        self.address = bind
        for sock in listen(bind) if sockets is None else sockets:
            self.listeners.append(Listener(loop, sock, self._accepted, limits.accept_pause))
            self.address = bind._replace(port=sock.getsockname()[1])

    def _set_caps(self) -> None:
        """Each stream needs a descriptor for its link and one for its remote, each UDP session one."""
        descriptors = descriptor_limit()
        self._udp_cap = min(self.limits.udp_sessions_in_all, descriptors // 4)
        self._link_cap = self.limits.links or max(min(16, descriptors // 8), (descriptors - 64 - self._udp_cap) // 2)
        self._link_cap_of_key = self.limits.links_per_key or self._link_cap
        self._stream_cap = self.limits.streams or self._link_cap
        self._stream_cap_of_key = self.limits.streams_per_key or self._stream_cap

    def start(self) -> None:
        self._hold_against_lists()
        for listener in self.listeners:
            listener.start()
        self._report("🔑 The server's key, which clients are asked about: `%s`", encode_key(self.keys.public))
        self._report("🚀 Starting server on `%s` ...", self.address)
        self._ready()

    @property
    def handshakes(self) -> int:
        return len(self._strangers) + len(self._proxied)

    def describe(self) -> Iterator[str]:
        yield "Server on `%s`" % str(self.address)
        for listener in self._reverse:
            yield "%s for the client with key %s" % (listener, self.show_key(listener.key))

    def reloaded(self, new_key: bool) -> None:
        self._hold_against_lists()

    def _complain(self, shown: str, what: Any) -> None:
        """A line in the log, or one more that is only counted."""
        self.counters.handshakes_failed += 1
        self._complaints.write(self.loop.now, "❌ Refused %%d more connections from `%s`" % Source.of(shown), "❌ Refused `%s`: %s" % (shown, what))

    # ---- who may do what

    def _grants(self, key: bytes, now: float | None = None) -> tuple[Grant, ...]:
        """What a key may do; none where it may not come in. `now` is the round of the loop; None on a thread."""
        if self._authorizer:  # it is asked when the client comes in, and then for each target
            return (Grant(),) if now is not None or self._permits(key, "") else ()
        lines = self.folder.authorized_keys.read(now).get(key, ())
        return tuple(grant for _, grant in lines if grant.expires == float("inf") or time.time() < grant.expires)

    def _permits(self, key: bytes, target: str) -> bool:
        """What the caller of serve(authorize=...) says to it."""
        try:
            return self._authorizer is None or bool(self._authorizer(encode_key(key), target))
        except Exception as error:
            log.error("❌ authorize() raised for `%s`: %r", printable(target), error)
            return False

    def _authorize(self, key: bytes, legacy: bool = False, now: float | None = None) -> tuple[Grant, ...]:
        """What a key may do over this wire; AuthenticationError for one that may not come in."""
        grants = self._grants(key, now)
        if not grants:
            raise AuthenticationError(self._why_not(key))
        if legacy:
            grants = tuple(grant for grant in grants if not grant.no_legacy)
        if not grants:
            raise AuthenticationError("the key `%s` may not come in over the original's protocol (no-legacy); connect without --legacy"
                                      % encode_key(key))
        return grants

    def _why_not(self, key: bytes) -> str:
        """Why a key may not come in, and what would help."""
        if self._authorizer:
            return "authorize() does not permit the key `%s`" % encode_key(key)
        lines = self.folder.authorized_keys.read().get(key)
        if lines:
            return "line %d of the server's authorized_keys is this client's, and has expired: %s" % (lines[-1][0], encode_key(key))
        return "the server does not know this client's key. Add this line to authorized_keys on the server: %s" % encode_key(key)

    def _permitted(self, link: Link, remote: str, kind: int) -> tuple[Address, tuple[Grant, ...]]:
        """The target that a client names, and what it was granted; PolicyError where it may not have it."""
        try:
            grants = self._authorize(link.peer_key, not link.writer.pools, self.loop.now)
        except AuthenticationError as error:
            raise PolicyError(str(error)) from None
        udp = kind == socket.SOCK_DGRAM
        if udp:
            grants = tuple(grant for grant in grants if not grant.no_udp)
        if not grants:
            raise PolicyError("no-udp: authorized_keys permits this key no UDP")
        target = self.policy.check(remote, grants)
        if udp and target.is_unix:
            raise PolicyError("a Unix socket takes no datagrams here")
        return target, grants

    def _ask_authorizer(self, key: bytes, target: str, then: Callable[[Exception | None], None]) -> None:
        """then(None), or then(the reason why not); on a thread meanwhile: it may take its time."""
        if not self._authorizer:
            return then(None)
        return self.lookups.submit(key, functools.partial(self._permits, key, target), lambda permitted, error: then(
            None if permitted else error or PolicyError("authorize() does not permit it")))

    def show_key(self, key: bytes) -> str:
        """A key with the comments of its lines."""
        comments = {grant.comment for grant in self._grants(key, self.loop.now) if grant.comment}
        return "`%s`%s" % (encode_key(key), " (%s)" % ", ".join(sorted(comments)) if comments else "")

    def _hold_against_lists(self) -> None:
        """What the lists do not allow any more ends: after a change, and when a line expires."""
        listed, problems = self.folder.authorized_keys.read(), self.folder.authorized_keys.problems
        if problems != self._problems and not self._authorizer:
            for problem in problems:
                log.warning("%s", problem)
        self._problems = problems
        if listed is self._listed and time.time() < self._expiry:
            return
        if not listed and not problems and not self._authorizer:
            log.warning("`%s` lists nobody, so nobody can connect: it takes a line with the public key of each client",
                        self.folder.authorized_keys.path)
        self._listed = listed
        self._expiry = min((grant.expires for lines in listed.values() for _, grant in lines if grant.expires > time.time()), default=float("inf"))
        gone = [link for link in self.links if not self._grants(link.peer_key, self.loop.now)]
        fate = lambda key: "has expired" if key in listed else "is not in authorized_keys any more"  # noqa: E731
        for key, n in collections.Counter(link.peer_key for link in gone).items():
            log.warning("The client's key `%s` %s: %s of it ended", encode_key(key), fate(key), plural(n, "link"))
        for link in gone:
            link.die(Revoked("the client's key `%s` %s" % (encode_key(link.peer_key), fate(link.peer_key))))
        for relay in [relay for relays in self._relays.values() for relay in relays]:
            relay.recheck(lambda link, target: self._permitted(link, target, socket.SOCK_DGRAM))
        for listener in list(self._reverse):
            try:
                self._may_listen(listener.key, listener.asked)
            except PolicyError as error:
                log.error("❌ %s: %s", listener, error)
                listener.close()

    # ---- strangers

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        if not self._proxies or not is_within(address[0], self._proxies):
            return self._welcome(sock, address)
        # HAProxy sends its header as soon as it connects: whoever lets so many wait is not one.
        while len(self._proxied) >= 4 * self.limits.handshakes:
            next(iter(self._proxied)).close()
        self._proxied[Negotiation(self.loop, sock, address, ProxyHeader(), self.limits.handshake_timeout, self._introduced)] = None
        return None

    def _introduced(self, negotiation: Negotiation, header: Any, error: str) -> None:
        """A proxy has said whose connection this is."""
        del self._proxied[negotiation]
        if header is not None and not header.is_local:
            return self._welcome(negotiation.sock, header.source or negotiation.address)
        shown = show_address(negotiation.address)
        if header is not None or negotiation.untouched:  # what a health check does is no complaint
            log.debug("health check of `%s`", shown)
        else:
            self._complain(shown, error)
        if header is not None:
            LastWord(self.loop, negotiation.sock, b"")
        return None

    def _source(self, host: str) -> Source:
        name = Source.name(host)
        if name not in self._sources:
            if len(self._sources) >= self._most_sources:
                self._forget_sources(0)
                self._most_sources = max(SOURCES, 2 * len(self._sources))  # so that looking through them is paid for by as many new ones
            self._sources[name] = Source(name, self.loop.now, self.limits)
        return self._sources[name]

    def _forget_sources(self, age: float) -> None:
        """Those that hold nothing and have not been seen for so many seconds."""
        now = self.loop.now
        for name, source in list(self._sources.items()):
            if now - source.seen_at >= age and source.holds_nothing(now):
                del self._sources[name]

    def _welcome(self, sock: socket.socket, address: Any) -> None:
        source, shown = self._source(address[0]), show_address(address)
        if not source.may_try(self.loop.now):
            sock.close()
            return self._complain(shown, "more than %g new connections a second from there" % self.limits.handshake_rate)
        if source.strangers < self._places(source):
            return self._begin(source, sock, shown)
        return self._wait(source, sock, shown)

    def _places(self, source: Source) -> int:
        """How many of one source may authenticate themselves at once; the last places are for everybody else, whoever it is."""
        if not source.trusted(self.loop.now):
            return self.limits.handshakes_per_source
        return max(self.limits.handshakes // 2, self.limits.handshakes - self.limits.handshakes_per_source)

    def _wait(self, source: Source, sock: socket.socket, shown: str) -> None:
        """A burst from one machine, as a browser makes, or a client that a restart has thrown out, waits for its turn: nobody in the middle
        of his handshake goes for it. Where too many wait, a source that is not known makes room out of its own."""
        many = len(source.waiting) >= 4 * self._places(source)
        trusted = source.trusted(self.loop.now)
        if many and trusted:
            sock.close()
            return self._complain(shown, "too many connections from there wait to authenticate themselves")
        source.waiting.append((sock, shown))
        self._queued += 1
        if not trusted and (many or self._queued > 4 * self.limits.handshakes):
            self._evict([stranger for stranger in self._strangers.values() if stranger.source is source])
            return self._begin_waiting(source)
        return self._serve_waiting(source)

    def _begin_waiting(self, source: Source) -> None:
        self._queued -= 1
        self._begin(source, *source.waiting.popleft())

    def _begin(self, source: Source, sock: socket.socket, shown: str) -> None:
        strangers = list(self._strangers.values())
        if len(strangers) >= self.limits.handshakes:
            any(map(self._evict, self._crowds(strangers)))
        stranger = self._strangers[sock] = Stranger(sock, shown, source, self.loop.now)
        source.strangers += 1
        self.workers.submit(functools.partial(self._handshake, stranger), functools.partial(self._authenticated, stranger))

    def _crowds(self, strangers: list[Stranger]) -> Iterator[list[Stranger]]:
        """Out of whom one makes room, the first where there is one: those whose source has more than its share; those whose network holds more
        than a quarter of all places, for who has a network to himself, as anybody can have an IPv6 /48, is to push out his own; all."""
        yield [stranger for stranger in strangers if stranger.source.strangers > self.limits.handshakes_per_source]
        # Silent ones go before, whatever their networks: a network whose clients all come back at once must not go for them.
        if 4 * sum(not stranger.has_begun for stranger in strangers) <= len(strangers):
            untrusted = [stranger for stranger in strangers if not stranger.source.trusted(self.loop.now)]
            of_network = collections.Counter(stranger.source.network for stranger in untrusted)
            yield [stranger for stranger in untrusted if 4 * of_network[stranger.source.network] > self.limits.handshakes]
        yield strangers

    def _evict(self, strangers: list[Stranger]) -> bool:
        """Ends the oldest of those that have said nothing, or of the others where those have no more than a quarter of the places: a thousand
        who are silent, or say a byte a second, must not push out the one that is in the middle of it, nor a thousand who stop in the middle
        the one that has just come. Shutting it down wakes its thread."""
        silent = [stranger for stranger in strangers if not stranger.has_begun]
        begun = [stranger for stranger in strangers if stranger.has_begun and not stranger.admitted]
        victim = min(silent if len(silent) > len(strangers) // 4 or not begun else begun, key=lambda other: other.since, default=None)
        if victim is None or not self._forget(victim):
            return False
        victim.left = hung_up(victim.sock)
        with contextlib.suppress(OSError):
            victim.sock.shutdown(socket.SHUT_RDWR)
        return True

    def _serve_waiting(self, source: Source) -> None:
        """Whoever waits takes the place of those who have said nothing for a second, or did not come to an end within three: a handshake has
        two round trips, of 0.6 s by satellite."""
        now = self.loop.now
        while source.waiting and self._evict([other for other in self._strangers.values()
                                              if other.source is source and now - other.since > (3 if other.has_begun else 1)]):
            self._begin_waiting(source)

    def _forget(self, stranger: Stranger) -> bool:
        """False where it had to make room before."""
        if not self._strangers.pop(stranger.sock, None):
            return False
        stranger.source.strangers -= 1
        return True

    def _handshake(self, stranger: Stranger) -> Handshake:
        """On a thread. The first byte tells the wire."""
        sock = stranger.sock
        sock.settimeout(self.limits.handshake_timeout)
        started = time.monotonic()
        try:
            first = sock.recv(1)
        except OSError as error:
            raise (RemoteProtocolError if isinstance(error, socket.timeout) else Speechless)("it said nothing: %s" % reason(error)) from None
        if not first:
            raise Speechless("it closed the connection without a word")
        handshake = stranger.handshake = self._handshake_for(stranger, first)
        handshake.receive_data(first)
        try:
            drive(sock, handshake, self.limits.handshake_timeout - (time.monotonic() - started))
        except RatrodError:
            stranger.last_word = handshake.data_to_send()
            raise
        return handshake

    def _handshake_for(self, stranger: Stranger, first: bytes) -> Handshake:
        authorize = functools.partial(self._admit, stranger, first != OPENING[:1])
        if first == OPENING[:1]:
            return NoiseServerHandshake(self.keys, authorize=authorize)
        if first in b"\0\1" and self.legacy:
            return LegacyServerHandshake(self.keys, authorize=authorize)
        if first in b"\0\1":
            stranger.last_word = LegacyWriter.clear_message(Error(UNKNOWN, "this server speaks ratrod2; start it with --legacy to serve the"
                                                                  " original's protocol, or connect with a client that speaks ratrod2"))
            raise RemoteProtocolError("a client of the original's wire; serve it with --legacy, if you know what that gives up")
        raise RemoteProtocolError("it does not speak ratrod")

    def _admit(self, stranger: Stranger, legacy: bool, key: bytes) -> None:
        """On a thread. AuthenticationError for a client that is not known, Overloaded for one too many."""
        self._authorize(key, legacy)
        # Here, not when the loop hears of it: the client's next connections may come before that.
        stranger.source.authorized(self.loop.now)
        with self._admitting:  # two at once must not both take the last place
            for whose, most, have in (("in all", self._link_cap, sum(self._links_of.values())),
                                      ("of this client", self._link_cap_of_key, self._links_of[key])):
                if have >= most:
                    raise Overloaded("the server has as many connections %s as it takes (%d); try again later" % (whose, most))
            self._links_of[key] += 1
            stranger.admitted = key

    def _count_out(self, key: bytes) -> None:
        with self._admitting:
            self._links_of[key] -= 1
            if not self._links_of[key]:
                del self._links_of[key]

    def _authenticated(self, stranger: Stranger, handshake: Handshake | None, error: Exception | None) -> None:
        stayed = self._forget(stranger)
        source = stranger.source
        while source.waiting and source.strangers < self._places(source):
            self._begin_waiting(source)
            if len(self._strangers) >= self.limits.handshakes:  # more of them would push out each other
                break
        if not stayed and not stranger.left:
            error = RemoteProtocolError("it had not authenticated itself when others needed its place")
        elif handshake and not self._grants(handshake.peer_key, self.loop.now):
            error, handshake = AuthenticationError("its key was removed from authorized_keys"), None
        if handshake is None:
            if stranger.admitted:
                self._count_out(stranger.admitted)
            self._dismiss(stranger)
            if isinstance(error, Speechless):
                return log.debug("`%s`: %s (a health check?)", stranger.address, error)
            return self._complain(stranger.address, error)
        log.debug("✅ Accepted `%s` with key %s, cipher: %s", stranger.address, self.show_key(handshake.peer_key), handshake.suite)
        self._sources.setdefault(Source.of(stranger.address), source).links += 1  # where it had to make room, it may have been forgotten too
        self.counters.links += 1
        legacy = isinstance(handshake, LegacyServerHandshake)
        link = Link(self, stranger.sock, handshake, ACCEPTOR, CONNECTING if legacy else IDLE, stranger.address)
        if isinstance(handshake, LegacyServerHandshake):
            return self._open_legacy(link, handshake.remote, handshake.is_udp)
        if self.draining:  # it came through the system's queue, and its client tries another
            return link.leave(link.writer.record(CLOSE))
        return link.update()

    def _dismiss(self, stranger: Stranger) -> None:
        """It is told why where there is something to say, which takes none of the places where others authenticate themselves."""
        if not stranger.last_word:
            return stranger.sock.close()
        while len(self._dismissed) >= self.limits.handshakes:
            next(iter(self._dismissed)).close()
        last_word = LastWord(self.loop, stranger.sock, stranger.last_word, self._dismissed.pop)
        if not last_word.is_over:
            self._dismissed[last_word] = None
        return None

    # ---- links

    def link_ended(self, link: Link, error: Exception | None) -> None:
        super().link_ended(link, error)
        self._count_out(link.peer_key)
        self.stream_over(link)
        source = self._sources.get(Source.of(link.name))
        if source:
            source.links -= 1
            source.authorized(self.loop.now)
        listener = self._listening.pop(link, None)
        if listener:
            listener.gone(link)

    def link_idle(self, link: Link, end: bytes = b"") -> None:
        if link.role == OPENER:
            return self._listening[link].put(link)
        self.stream_over(link)
        if self.draining:
            return link.leave(end + link.writer.record(CLOSE))
        return link.send(end + link.writer.record(OVER))

    def stream_over(self, carried: Link | ReverseStream) -> None:
        key = self._streaming.pop(carried, None)
        if key is not None:
            self._streams_of[key] -= 1
            if not self._streams_of[key]:
                del self._streams_of[key]

    def let_go(self) -> None:
        for listener in list(self._reverse):
            listener.drain()
        for link in list(self.links):
            if link.state == UDP_OPEN:  # its client makes another, elsewhere
                link.user.lost(LinkClosed("ratrod is ending"))
                link.user = NOBODY
                link.leave(b"")
            elif link.state == IDLE and link.role == ACCEPTOR:
                link.leave(link.writer.record(CLOSE))

    def busy(self) -> bool:
        # Whoever was in the middle of a handshake gets its answer; whoever has said nothing for 2 s holds up nobody.
        recent = self.loop.now - 2
        return super().busy() or self._queued > 0 or any(stranger.since > recent for stranger in self._strangers.values())

    # ---- reverse tunnels

    def _may_listen(self, key: bytes, asked: str) -> Address:
        """The address that a client may have listened on; PolicyError where it may not."""
        if not self.allow_listen:
            raise PolicyError("this server does not listen for clients; serve --allow-listen lets it")
        try:
            address = parse_bind(asked)
            grants = self._authorize(key, now=self.loop.now)
        except (ValueError, AuthenticationError) as error:
            raise PolicyError(printable(str(error))) from None
        if not any(grant.listens(address) for grant in grants):
            raise PolicyError("`%s` is not what authorized_keys permits this key to listen on" % str(address))
        return address

    def _listen_for(self, link: Link, asked: str, instance: bytes) -> None:
        label = new_label(link.name, "listen " + asked)
        try:
            address = self._may_listen(link.peer_key, asked)
        except PolicyError as error:
            return self._refuse(link, label, error)

        def permitted(error: Exception | None) -> None:
            if error or link.state != CONNECTING:
                return self._refuse(link, label, error or ConnectError("the client is gone"))
            try:
                listener = self._reverse_listener(link.peer_key, address, asked, instance)
            except RatrodError as failure:
                self.counters.fail(link.peer_key, "❌ %s: %s" % (label, failure))
                return link.refuse(Error(REMOTE_FAILED, str(failure)))
            self._listening[link] = listener
            return listener.join(link, instance)
        return self._ask_authorizer(link.peer_key, "listen " + str(address), permitted)

    def _reverse_listener(self, key: bytes, address: Address, asked: str, instance: bytes) -> ReverseListener:
        """The one that is there, or a new one; RatrodError where it cannot be."""
        there = next((listener for listener in self._reverse if listener.address == address), None)
        if there and there.key == key:
            if there.is_retired(instance):
                raise RatrodError("cannot listen on `%s`: a later run of this client does" % str(address))
            return there
        if there:
            raise RatrodError("cannot listen on `%s`: it is in use by another client" % str(address))
        for listener in [listener for listener in self._reverse if listener.abandoned]:
            listener.close()
        if sum(listener.key == key for listener in self._reverse) >= self.limits.listeners_per_key:
            raise RatrodError("this client listens on as many addresses as one may have (%d)" % self.limits.listeners_per_key)
        listener = ReverseListener(self, key, instance, asked, listen(address))
        self._reverse.add(listener)
        log.info("📻 [TCP] Listening on `%s` for the client with key %s", listener.address, self.show_key(key))
        return listener

    def close(self) -> None:
        self.lookups.close()
        for source in self._sources.values():
            close_all(sock for sock, _ in source.waiting)
        for sock in self._strangers:
            with contextlib.suppress(OSError):  # it wakes its thread
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for listener in list(self._reverse):
            listener.close()
        for negotiation in list(self._proxied):
            negotiation.close()
        for last_word in list(self._dismissed):
            last_word.close()
        super().close()

    def forget_reverse(self, listener: ReverseListener) -> None:
        if listener in self._reverse:
            self._reverse.discard(listener)
            log.info("%s closed", listener)

    def sweep(self, now: float) -> None:
        self._hold_against_lists()
        for relays in list(self._relays.values()):
            for relay in list(relays):
                relay.table.expire(now)
        for source in self._sources.values():
            self._serve_waiting(source)
        self._forget_sources(60)
        self._complaints.confess(now)

    # ---- opening a remote: policy, look-up, policy for the addresses, connect

    def open_asked(self, link: Link, message: Open) -> None:
        if message.kind not in (TCP, UDP, LISTEN) or bool(message.instance) != (message.kind == LISTEN) or message.kind == UDP and message.target:
            raise RemoteProtocolError("an Open that cannot be (kind %d)" % message.kind)
        try:
            self._authorize(link.peer_key, now=self.loop.now)
        except AuthenticationError as error:
            return link.refuse(Error(INVALID_KEY, str(error)))
        if self.loop.now - link.born > self.limits.link_age or self.draining:
            return link.leave(link.writer.record(CLOSE))
        if message.kind == UDP:
            return link.accept(self._relay(link), UDP_OPEN)
        if message.kind == LISTEN:
            return self._listen_for(link, message.target, message.instance)
        return self._open(link, new_label(link.name, message.target), message.target)

    def _open_legacy(self, link: Link, remote: str, is_udp: bool) -> None:
        if not remote:  # the client only wanted to know whether it may come in
            return link.leave(link.writer.record(OPENED, ""), self.limits.drain_timeout)
        label = new_label(link.name, remote)
        if not is_udp:
            return self._open(link, label, remote)

        def connected(sock: socket.socket | None, error: Exception | None) -> None:
            if sock is None or link.state == CLOSED:
                return self._refuse(link, label, error or ConnectError("the client is gone"))
            relay = self._relay(link)
            link.accept(relay, UDP_OPEN)
            if relay.link is None:  # the client was gone already
                return sock.close()
            return RemoteUdpSession(relay, 0, label).connected(sock)
        return self._connect_udp(link, remote, connected)

    def begin_stream(self, carried: Link | ReverseStream, key: bytes) -> None:
        """Overloaded where the client of this key, or all together, have as many as they may."""
        for whose, most, have in (("of this client", self._stream_cap_of_key, self._streams_of[key]),
                                  ("in all", self._stream_cap, len(self._streaming))):
            if have >= most:
                raise Overloaded("the server carries as many streams %s as it takes (%d); try again later" % (whose, most))
        self._streaming[carried] = key
        self._streams_of[key] += 1

    def _open(self, link: Link, label: Label, remote: str) -> None:
        key, until = link.peer_key, time.monotonic() + self.limits.connect_timeout
        try:
            self.begin_stream(link, key)
        except Overloaded as error:
            return self._refuse(link, label, error)
        link.set_deadline(self.limits.connect_timeout, lambda: self._refuse(link, label, socket.timeout("timed out")))

        def connected(sock: socket.socket | None, error: Exception | None) -> None:
            self._connecting.done(key)
            self.join(link, sock, label, lambda: self._refuse(link, label, error or ConnectError("unknown reason")))

        def resolved(addresses: list[str], port: int, error: Exception | None) -> None:
            if error or link.state != CONNECTING:
                return connected(None, error)
            Connector(self.loop, addresses, port, until - time.monotonic(), connected)
            return None

        def begin() -> None:
            if link.state != CONNECTING:  # it waited too long, or left
                return connected(None, None)
            return self._resolve(link, remote, socket.SOCK_STREAM, resolved)
        return self._connecting.begin(key, begin)

    def _resolve(self, link: Link, remote: str, kind: int, done: Callable[[list[str], int, Exception | None], None]) -> None:
        """done(addresses, or the path, that may be connected to, port, None), or done([], 0, error). An address needs no thread."""
        try:
            target, grants = self._permitted(link, remote, kind)
            literal = [target.host] if target.is_unix else None
            if is_address(target.host):
                literal = self.policy.check_addresses(target, (target.host,), grants)
        except PolicyError as error:
            return done([], 0, error)

        def looked_up(found: list[tuple[int, Any]] | None, error: Exception | None) -> None:
            try:
                addresses = self.policy.check_addresses(target, tuple(sockaddr[0] for _, sockaddr in found), grants) if found else []
            except PolicyError as refusal:
                addresses, error = [], refusal
            done(addresses, target.port, error)

        def permitted(error: Exception | None) -> None:
            if error or literal:
                return done(literal if literal and not error else [], target.port, error)
            return self.lookups.submit(link.peer_key, functools.partial(look_up, target, kind), looked_up)
        return self._ask_authorizer(link.peer_key, ("udp " if kind == socket.SOCK_DGRAM else "") + str(target), permitted)

    def _refuse(self, link: Link, label: Label, error: Exception) -> None:
        if link.state != CONNECTING:
            return
        self.counters.count(error)
        answer = self._answer(label.target, error)
        self.counters.fail(link.peer_key, "❌ %s: %s" % (label, "refused: %s" % error if answer.code == INVALID_HOST else answer.text))
        link.refuse(answer)

    @staticmethod
    def _answer(target: str, error: Exception) -> Error:
        """What the client is told: of a refusal by policy nothing but that it is one."""
        if isinstance(error, PolicyError):
            return Error(INVALID_HOST, REFUSED)
        if isinstance(error, Overloaded):
            return Error(REMOTE_FAILED, str(error))
        return Error(REMOTE_FAILED, "cannot connect to the remote `%s`: %s" % (printable(target), reason(error)))

    # ---- UDP

    def _relay(self, link: Link) -> UdpRelay:
        def lost(relay: UdpRelay) -> None:
            relays = self._relays.get(link.peer_key, set())
            relays.discard(relay)
            if not relays:
                self._relays.pop(link.peer_key, None)
        relay = UdpRelay(self.loop, self.limits, link, link.name, self._open_session, lost)
        self._relays.setdefault(link.peer_key, set()).add(relay)
        return relay

    def _open_session(self, relay: UdpRelay, session: RemoteUdpSession, target: str) -> None:
        link = relay.link
        assert link is not None
        self._make_room_for_sessions()

        def connected(sock: socket.socket | None, error: Exception | None) -> None:
            if sock:
                return session.connected(sock)
            answer = self._answer(target, error or ConnectError("unknown reason"))
            return session.end(error, tell=(answer.code, answer.text))
        self._connect_udp(link, target, connected)

    def _make_room_for_sessions(self) -> None:
        """At the cap the key that has most sessions loses its least recently used one: nobody else's."""
        if sum(len(relay.table) for relays in self._relays.values() for relay in relays) > self._udp_cap:
            greedy = max(self._relays.values(), key=lambda relays: sum(len(relay.table) for relay in relays))
            min((relay.table.oldest() for relay in greedy if len(relay.table)), key=lambda session: session.last_used).end()

    def _connect_udp(self, link: Link, remote: str, done: Callable[[socket.socket | None, Exception | None], None]) -> None:
        """done(a socket connected to the remote, so that the kernel drops what others send to it, None) or done(None, error)."""
        def resolved(addresses: list[str], port: int, error: Exception | None) -> None:
            for host in addresses:
                with contextlib.ExitStack() as stack:
                    try:
                        sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM))
                        sock.setblocking(False)
                        sock.connect((host, port))
                    except OSError as failure:
                        error = failure
                        continue
                    stack.pop_all()
                    return done(sock, None)
            return done(None, error)
        self._resolve(link, remote, socket.SOCK_DGRAM, resolved)


class PipeServer(Server):
    """The far side of one ssh:// link: it listens to nobody, has no keys, and opens whatever the user who came in over ssh could open by
    himself. It ends with its link."""

    def __init__(self, loop: EventLoop, limits: Limits):
        super().__init__(loop, NoKeys(), NOWHERE, Policy(".*|unix:.*"), limits, sockets=[])

    def start(self) -> None:
        link = Link(self, None, PipeHandshake(), ACCEPTOR, IDLE, "ssh")
        link.send(link.writer.record(COMPLETED, __version__))
        link.update()

    def _grants(self, key: bytes, now: float | None = None) -> tuple[Grant, ...]:
        return (Grant(),)

    def _hold_against_lists(self) -> None:
        pass

    def link_ended(self, link: Link, error: Exception | None) -> None:
        super().link_ended(link, error)
        self.loop.stop()


def give_back_heap() -> None:
    """Of what compiling this source took glibc keeps 20 MB of 39 for nobody: at the far side of ssh:// that is so for each link. 5 ms."""
    with contextlib.suppress(Exception):  # no such library, or no such call: then there may be no such need
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def serve_pipe(marker: bytes, limits: dict[str, Any]) -> None:
    """What the program that a client sends over ssh ends with."""
    set_up_logging(logging.WARNING)
    os.write(1, marker)
    loop = EventLoop()
    server = PipeServer(loop, Limits(**limits))
    server.start()
    loop.call_later(1.0, give_back_heap)  # by then nobody waits for it
    loop.run()
    server.close()


class Probe(LinkUser):
    """Legacy's connection test: done(None) once the server has accepted this client, done(error) where it has not."""

    __slots__ = ("_link", "_done")

    def __init__(self, link: Link, done: Callable[[Exception | None], None]):
        self._link, self._done = link, done

    def opened(self) -> None:
        self._link.close()
        self._done(None)

    def lost(self, error: Exception) -> None:
        self._done(error)


def tries(n: int) -> str:
    return "1 try" if n == 1 else "%d tries" % n


class Retry:
    """When to try again what went away, and what the log says of it: the first failure, and how it ended.

    The pauses double from 0.25 s to Limits.retry_interval, each drawn from its upper half, so that all the clients of a server that was
    started anew do not come at the same moment. `again()` is the next try; `give_up(error)` ends it after `most` of them, None is never.
    """

    FIRST, HURRY, STEADY = 0.25, 1.0, 10.0  # seconds: the first pause; the longest while somebody waits; after which all was well

    def __init__(self, loop: EventLoop, longest: float, most: int | None, again: Callable[[], None], give_up: Callable[[RatrodError], None]):
        self._loop, self._longest, self._most, self._again, self._give_up = loop, longest, most, again, give_up
        self.error: Exception | None = None  # the last one; None: all is well
        self._tries = self._begun = self._level = 0
        self._said = False
        self._since = self._tried_at = self._well_at = loop.now
        self._timer: Timer | None = None

    def failed(self, error: Exception, lost: str = "", tried: bool = False, first: bool = False) -> None:
        """One more failure. The first one counts as a try only where it was one to come back (`tried`). Where `lost` is not empty it is
        logged, once, when the next try has failed too, or at once where it is the `first` connection of all: a server that was started anew
        is no news."""
        again = first or self.error is not None
        if self.error is None:
            self._since, self._tries, self._begun, self._said = self._loop.now, int(tried), int(tried), False
            if self._loop.now - self._well_at > self.STEADY:
                self._level = 0
        else:
            self._tries = min(self._tries + 1, self._begun)  # ten links that fail in one moment are one try
        self.error = error.with_traceback(None)  # whose frames would keep a link and its buffers
        if self._most is not None and self._tries >= self._most:
            return self._give_up(RatrodError("Giving up after %s in %.1f s: %s" % (
                tries(self._tries), self._loop.now - self._since, reason(error))))
        say = bool(lost) and again and not self._said
        log.log(logging.ERROR if say else logging.DEBUG, "%s%s: %s; trying again", "❌ " * say, lost or "no new link", reason(error))
        self._said = self._said or say
        if self._timer is None:
            pause = min(self._longest, self.FIRST * 2 ** min(self._level, 30))
            self._level += 1
            self._set(self._loop.now + pause * (0.5 + os.urandom(1)[0] / 510))
        return None

    def hurry(self) -> None:
        """Somebody waits: the next try is not far."""
        when = self._tried_at + min(self.HURRY, self._longest)
        if self._timer is None or self._timer.when > when:
            self._set(when)

    def now(self) -> None:
        """The next try is not to wait."""
        if self._timer:
            self._set(self._loop.now)

    def _set(self, when: float) -> None:
        self.stop()
        self._timer = self._loop.call_at(when, self._due)

    def _due(self) -> None:
        self._timer, self._tried_at = None, self._loop.now
        self._begun += 1
        self._again()

    def succeeded(self, found: str) -> None:
        if self.error is not None and self._said:
            log.info("✅ %s after %s in %.1f s", found, tries(self._tries + 1), self._loop.now - self._since)
        self.error = None
        self._well_at = self._loop.now
        self.stop()

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None


def is_final(error: Exception) -> bool:
    """Whether it is about keys: another try would end the same."""
    return getattr(error, "exit_code", 1) == AuthenticationError.exit_code


class Waiter(NamedTuple):
    """Who needs a link: use(link), or failed(error) where there is none in time. `target` and `kind` are what legacy links are made for."""

    target: str
    kind: int
    use: Callable[[Link], None]
    failed: Callable[[Exception], None]
    since: float


SSH_PERSIST = 60  # seconds that a connection of ssh's waits for another link, also where its client was killed
LINKS_OF_A_MASTER = 8  # sshd takes 10 sessions on one connection by default (MaxSessions)
BOOTSTRAP = b"""\
import os,sys
if sys.version_info<(3,8):sys.exit("ratrod needs Python 3.8 or later there, and its python3 is %d.%d"%sys.version_info[:2])
import types,zlib
n=int(sys.argv[1]);b=b""
while len(b)<n:
 c=os.read(0,n-len(b))
 if not c:sys.exit(1)
 b+=c
m=sys.modules["ratrod"]=types.ModuleType("ratrod")
m.__file__="ratrod.py"
exec(compile(zlib.decompress(b),"ratrod.py","exec"),m.__dict__)
"""


def own_source() -> str:
    """The text of this very module, out of a file or a .pyz; ConfigError where it is not to be had."""
    try:
        source = globals()["__loader__"].get_source(__name__)
    except (KeyError, AttributeError, ImportError, OSError):
        source = None
    if not source:
        raise ConfigError("ssh:// sends ratrod's own source to the far side, and cannot read it: run ratrod.py, or ratrod.pyz")
    return str(source)


class SshLink:
    """A link's ssh process; `sock` is our end of its standard input and output. `settled`: the far side has answered; until then the thread
    that made it reads and closes `errors`, its standard error."""

    __slots__ = ("process", "sock", "errors", "master", "settled", "closed_at")

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, errors: Any, master: SshMaster):
        self.process, self.sock, self.errors, self.master = process, sock, errors, master
        self.settled = False
        self.closed_at: float | None = None


class SshMaster:
    """A connection of ssh's in the background, for up to `room` links; ssh finds it by the socket at `path`."""

    __slots__ = ("path", "room", "links")

    def __init__(self, path: str, room: int):
        self.path, self.room, self.links = path, room, 0


class SshLinks:
    """Links to one machine through the system's ssh, where nothing is installed but Python: each is an ssh process that starts `python3`
    there and sends it this source. They share a few connections (ssh's ControlMaster), which alone authenticate themselves.

    link() is called on threads, reap() and close() on the loop. What is made here ends by itself where its client is killed: the far sides
    when their standard input ends, the connections after SSH_PERSIST.
    """

    LINGER = 5.0  # seconds that a link's process may take to end
    REST = 600.0  # ... until another connection is tried where it had needed a password

    def __init__(self, command: Sequence[str], server: SshHost, limits: Limits):
        import shutil
        import zlib

        self._server, self._command = server, list(command)
        if not hasattr(os, "fork"):
            raise ConfigError("ssh:// needs a POSIX system, whose ssh shares connections")
        if not self._command or not shutil.which(self._command[0]):
            raise ConfigError("ssh:// needs `%s`, which is not installed here: install OpenSSH's client, or name it with --ssh-command"
                              % printable(" ".join(self._command)))
        self._connect_timeout, self._patience = limits.connect_timeout, limits.connect_timeout + limits.handshake_timeout
        self._marker = b"\nratrod %s\n" % os.urandom(16).hex().encode("ascii")
        self._program = zlib.compress(b"%s\nserve_pipe(%r, %r)\n" % (own_source().encode("utf-8"), self._marker, limits._asdict()))
        self._lock = threading.Lock()  # of all that follows
        self._making = threading.Lock()  # held for as long as a new connection takes: one is made at a time
        self._links: list[SshLink] = []
        self._masters: list[SshMaster] = []
        self._made, self._room = 0, LINKS_OF_A_MASTER
        self._folder = ""
        self._dialing: tuple[subprocess.Popen[bytes], SshMaster] | None = None
        self._failed: tuple[float, Exception] = (float("-inf"), ConnectError("unknown reason"))
        self._alone_until = float("-inf")  # no further connection can be had beside those that are there
        self._closed = self._is_ending = False

    # ---- a link

    def link(self, may_ask: bool) -> tuple[socket.socket, Handshake]:
        """On a thread. ConnectError or AuthenticationError says what ssh says, Overloaded that the links that are there are all."""
        for tries_left in reversed(range(TRIES)):
            master, fresh = self._reserve(may_ask)
            link = self._start(master)
            handshake = PipeHandshake(self._program, self._marker)
            try:
                drive(link.sock, handshake, self._patience)
                link.settled = True
                return link.sock, handshake
            except RatrodError as error:
                code, said = self._end(link)
                log.debug("ssh to `%s` came to nothing (%s, exit code %d): %s", self._server, error, code, printable(said))
                if "refused by peer" in said and master.links:  # sshd's MaxSessions
                    master.room = self._room = master.links
                elif "kex_exchange" in said and tries_left:  # ProxyCommand=false's: a new connection in the background may not take links yet
                    time.sleep(0.1)
                elif fresh or not tries_left:
                    raise self._error(code, said or handshake.seen.decode("utf-8", "replace"), str(error)) from None
                else:  # it is gone, or does not answer any more
                    master.room = 0
        raise Overloaded("sshd on `%s` lets in no further session" % str(self._server))

    def _start(self, master: SshMaster) -> SshLink:
        import tempfile

        boot = 'python3 -IS -c "exec(bytes.fromhex(\'%s\'))" %d' % (BOOTSTRAP.hex(), len(self._program))
        ours, theirs = socket.socketpair()
        with theirs:
            errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - reap() closes it
            # ProxyCommand: where the connection is gone, it must not make one of its own.
            process = self._run(["-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes"], master.path, boot,
                                stdin=theirs, stdout=theirs, stderr=errors, start_new_session=True)
            link = SshLink(process, ours, errors, master)
        with self._lock:
            self._links.append(link)
            if self._closed:
                process.kill()
        return link

    def _end(self, link: SshLink) -> tuple[int, str]:
        """Of a link that came to nothing: ssh's exit code and its last words."""
        import subprocess

        link.sock.close()
        try:
            code = link.process.wait(2)
        except subprocess.TimeoutExpired:
            link.process.kill()
            code = link.process.wait()
        with link.errors as errors:
            said = last_lines(errors)
        self.reap()
        return code, said

    def _run(self, options: list[str], path: str, *command: str, **streams: Any) -> subprocess.Popen[bytes]:
        """An ssh process that uses the connection at `path`, with no surprises of its user's configuration."""
        import subprocess

        server = self._server
        words = [*self._command, *options, "-T", "-a", "-x", "-o", "ControlPath=" + path, "-o", "ControlPersist=%d" % SSH_PERSIST,
                 "-o", "LogLevel=ERROR", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no",
                 "-o", "ConnectTimeout=%d" % max(1, self._connect_timeout), "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3",
                 *(["-l", server.user] if server.user else []), *(["-p", str(server.port)] if server.port else []), "--", server.host, *command]
        try:
            return subprocess.Popen(words, **streams)
        except OSError as error:
            raise ConnectError("cannot run `%s`: %s" % (self._command[0], reason(error))) from None

    def _error(self, code: int, said: str, why: str, asked: bool = True) -> RatrodError:
        lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
        text = printable("; ".join(lines[-3:]) or why, 400)
        if code == 127 or re.search("python3.*(not found|No such file)|Unknown command.*python3", said, re.IGNORECASE):
            text = "there is no `python3` (%s); it needs Python 3.8 or later there, and nothing else" % text
        refused = code == 255 and re.search("Permission denied|Host key verification failed|Too many authentication failures", said)
        hint = ("" if not refused else "; see that `ssh` lets you in there" if asked else
                "; nothing can be asked here: see that `ssh` to there needs no answer")
        message = "ssh to `%s`: %s%s" % (self._server, text, hint)
        return AuthenticationError(message) if refused else ConnectError(message)

    # ---- the connections that links share

    def _reserve(self, may_ask: bool) -> tuple[SshMaster, bool]:
        """A connection with room for a link, which is counted; and whether it was made for it."""
        began = time.monotonic()
        with self._making:
            while True:
                self.reap()
                with self._lock:
                    found = next((master for master in self._masters if master.links < master.room and os.path.exists(master.path)), None)
                    if found:
                        found.links += 1
                        return found, False
                    ending = any(link.sock.fileno() < 0 for link in self._links)
                if not ending or time.monotonic() - began > 1:
                    break
                time.sleep(0.02)
            if self._failed[0] > began:  # meanwhile, for somebody who waited here too
                raise self._failed[1]
            try:
                return self._new_master(may_ask), True
            except RatrodError as error:
                self._failed = time.monotonic(), error
                raise

    def _new_master(self, may_ask: bool) -> SshMaster:
        import subprocess
        import tempfile

        if time.monotonic() < self._alone_until and self._masters:
            raise Overloaded("ssh to `%s`: no further connection for now" % str(self._server))
        with self._lock:
            if self._is_ending:
                raise ConnectError("ratrod is ending")
            self._folder = self._folder or private_folder()
            self._made += 1
            master = SshMaster(os.path.join(self._folder, "m%d" % self._made), self._room)
            with tempfile.TemporaryFile("a+b") as errors:
                # In the background as soon as it is authenticated: until then it is at the terminal, where it may ask.
                options = ["-f", "-N", "-o", "ControlMaster=yes", *([] if may_ask else ["-o", "BatchMode=yes"])]
                process = self._run(options, master.path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                                    start_new_session=not may_ask)
                self._dialing = process, master
                said = os.dup(errors.fileno())
        why = "it ended without a word"
        try:
            code = process.wait(None if may_ask else self._patience)
        except subprocess.TimeoutExpired:
            why = "no connection within %g s" % self._patience
            process.kill()
            code = process.wait()
        with self._lock, open(said, "rb") as errors:
            self._dialing = None
            if code == 0 and not self._closed:
                master.links = 1
                self._masters.append(master)
                return master
            error = self._error(code, last_lines(errors), why, may_ask)
            if isinstance(error, AuthenticationError) and any(other.links for other in self._masters):
                self._alone_until = time.monotonic() + self.REST
                error = Overloaded(str(error))
            raise error

    def _leave(self, master: SshMaster) -> None:
        """Ends a connection, with all that is on it."""
        import subprocess

        with contextlib.suppress(RatrodError, subprocess.TimeoutExpired):
            self._run(["-O", "exit"], master.path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(2)

    def reap(self) -> None:
        """Takes note of what has ended."""
        now = time.monotonic()
        with self._lock:
            for link in list(self._links):
                if link.process.poll() is not None:
                    self._links.remove(link)
                    link.master.links -= 1
                    if link.settled:
                        link.errors.close()
                elif link.sock.fileno() < 0:
                    link.closed_at = link.closed_at or now
                    if now - link.closed_at > self.LINGER:
                        link.process.kill()
                elif link.settled and os.fstat(link.errors.fileno()).st_size > 1 << 20:  # the far side's log is not to fill this disk
                    link.errors.truncate(0)
            self._masters = [master for master in self._masters if master.links or os.path.exists(master.path)]

    def drain(self) -> None:
        """What is open goes on, no further connection is made."""
        self._is_ending = True

    def close(self) -> None:
        """Ends all of it."""
        import shutil

        self.drain()
        with self._lock:
            self._closed = True
            if self._dialing:
                stop_process(self._dialing[0])  # not killed: a terminal that asks for a password shows nothing until that is undone
                self._masters.append(self._dialing[1])  # it may have gone to the background just now
            for master in self._masters:
                if os.path.exists(master.path):
                    self._leave(master)
            for link in self._links:
                link.process.kill()
                link.process.wait()
                if link.settled:
                    link.errors.close()
            self._links.clear()
            self._masters.clear()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    import subprocess

    process.terminate()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def private_folder() -> str:
    """A new one of this user alone, whose path fits into the address of a Unix socket, and into ssh's configuration."""
    import tempfile

    short = re.fullmatch(r"[\w./-]{1,50}", tempfile.gettempdir(), re.ASCII)
    return tempfile.mkdtemp(prefix="ratrod-", dir=None if short else "/tmp")


def last_lines(file: Any) -> str:
    """The end of what an ssh process wrote to its standard error."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return str(file.read().decode("utf-8", "replace"))


class LinkPool:
    """A client's idle links: taken for a stream, put back after it, made ahead in the background, let go when nobody needs them. While the
    server is away whoever needs one waits, for as long as a connect may take.

    On the legacy wire, where a link carries one stream, each waiter has a link made for it.
    """

    READY = 2  # so many wait at any time: the next connection needs no handshake, and a burst of two neither
    HANGING = 8  # tries that may be under way while the server is away: a path that drops packets holds each up for 10 s

    def __init__(self, client: Client, ready: int):
        self._client, self._loop, self._limits, self._ready = client, client.loop, client.limits, min(ready, client.limits.idle_links)
        self._links: set[Link] = set()  # all that it has made and not let go
        self._idle: list[tuple[float, Link]] = []  # since when; the last one used is the first one taken
        self._waiting: collections.deque[Waiter] = collections.deque()
        self._begun: set[Waiter] = set()  # legacy: whose links are being made
        self._taken: set[Link] = set()
        self._soon = False  # more are made in a moment
        self._making = 0
        self._peaks = [0, 0]  # most links wanted at once, in this minute and in the one before
        self._minute = self._loop.now
        self._closed = False

    def take(self, target: str, kind: int, use: Callable[[Link], None], failed: Callable[[Exception], None]) -> None:
        """use(link) with an idle link, at once or when there is one; failed(error) where none can be made."""
        self._peaks[0] = max(self._peaks[0], len(self._taken) + len(self._waiting) + 1)
        link = self._pop()
        if link:
            self._hand_out(link, use)
        else:
            self._waiting.append(Waiter(target, kind, use, failed, self._loop.now))
        self.make_more()

    def _hand_out(self, link: Link, use: Callable[[Link], None]) -> None:
        self._taken.add(link)
        use(link)

    def _pop(self) -> Link | None:
        while self._idle:
            # The last used of those that the server has let in: one that it may still refuse takes along what was sent on it.
            _, link = self._idle.pop(next((n for n in reversed(range(len(self._idle))) if self._idle[n][1].completed), -1))
            link.poll()  # what is pending on it: a Close, a FIN, or the sign of life that makes it trusted
            if link.state == IDLE and self._trusts(link) and self._loop.now - link.born < self._limits.link_age:
                return link
            self._drop(link)
        return None

    def _drop(self, link: Link) -> None:
        """Lets go of a link: that it ends says nothing of the server."""
        self._links.discard(link)
        link.close()

    def _trusts(self, link: Link) -> bool:
        """Whether it was heard from lately, and nothing on it is sent again and again: its next try may be seconds away, although the path
        is there again."""
        return self._loop.awake - link.heard_at < self._limits.trusted and not link.transport.tcp_info().retransmits

    def put(self, link: Link) -> None:
        """A link that is idle now."""
        self._links.add(link)
        self._taken.discard(link)
        if self._waiting:
            self._hand_out(link, self._waiting.popleft().use)
        elif len(self._idle) < max(self._limits.idle_links, self._ready + max(self._peaks)) and not self._closed and not self._client.draining:
            self._idle.append((self._loop.now, link))
        else:
            self._drop(link)

    def ended(self, link: Link, error: Exception | None) -> None:
        """A link is no more."""
        used = link in self._taken
        self._taken.discard(link)
        self._idle = [entry for entry in self._idle if entry[1] is not link]
        if link not in self._links:
            return
        self._links.discard(link)
        if not link.completed and isinstance(error, PeerError):
            self.failed(error)
        # Another in place of one that ended at once could go round and round: that waits until somebody needs it, or for sweep().
        elif link.completed and (used or self._loop.now - link.born > 0.5):
            self.make_more()

    def failed(self, error: Exception) -> None:
        """No link could be made."""
        lost = "" if self._taken or self._idle else "Lost the server `%s`" % self._client.server_names
        with self._client.noticing():
            self._client.retry.failed(error, lost, tried=not self._client.legacy)  # a legacy client notices by a try that there was a loss
        if self._waiting:
            self.make_more()

    def make_more(self) -> None:
        if self._closed:
            return
        if self._client.retry.error is not None:
            if self._waiting:
                self._client.retry.hurry()
        elif self._client.legacy:
            for waiter in [waiter for waiter in self._waiting if waiter not in self._begun]:
                self._make(waiter)
        else:
            # Where nothing has been carried yet one is enough to see whether the server is there.
            ready = 0 if self._client.draining else self._ready if any(self._peaks) else min(1, self._ready)
            wanted = len(self._waiting) + ready - len(self._idle) - self._making
            # After the last one was lost, one to see whether the server is there.
            most = self._client.most_links - len(self._links) - self._making if self._links else 1 - self._making
            for _ in range(min(wanted, most)):
                self._make(None)

    def try_again(self) -> None:
        """While the server is away: one link at a time."""
        if self._making < self.HANGING and (self._waiting or not self._client.legacy):
            self._make(self._waiting[0] if self._client.legacy else None)

    def _make(self, waiter: Waiter | None) -> None:
        self._making += 1
        if waiter:
            self._begun.add(waiter)
        self._client.make_link(waiter.target if waiter else "", waiter.kind if waiter else TCP, functools.partial(self._made, waiter))

    def _made(self, waiter: Waiter | None, link: Link | None, error: Exception | None) -> None:
        self._making -= 1
        if waiter:
            self._begun.discard(waiter)
        if link is None:
            return self._refused(waiter, error or ConnectError("unknown reason"))
        if waiter is None:
            return self.adopt(link)
        wanted = waiter in self._waiting  # or it has given up
        if wanted:
            self._waiting.remove(waiter)
        self.completed(link)
        # A legacy target has been connected already: a clean end would tell it that somebody came and had nothing to say.
        return waiter.use(link) if wanted else link.die(LinkClosed("nobody waits for it any more"))

    def adopt(self, link: Link) -> None:
        """A new link, on which nothing has been asked yet."""
        self._links.add(link)
        link.poll()  # made by a thread some time ago: it may have ended since
        if link.state == IDLE:
            return self.put(link)
        return self._make_more_soon()

    def _make_more_soon(self) -> None:
        """Not at once: a server that ends each link as it is made had 300 a second of them."""
        def now() -> None:
            self._soon = False
            self.make_more()
        if not self._soon:
            self._soon = True
            self._loop.call_later(0.25, now)

    def _refused(self, waiter: Waiter | None, error: Exception) -> None:
        if is_final(error):
            self.close(error)
            return self._client.give_up(error)
        if waiter and isinstance(error, PeerError):  # legacy: the server is there, and does not open this remote
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                waiter.failed(error)
            return None
        if isinstance(error, Overloaded) and self._links:  # others are there, and will be free
            return None
        return self.failed(error)

    def completed(self, link: Link) -> None:
        """The server has let it in."""
        with self._client.noticing():
            self._client.retry.succeeded("Connected to server `%s` again," % link.name)
        if self._waiting:
            self.make_more()
        else:
            self._make_more_soon()

    def clear(self) -> None:
        """Lets go of all idle links."""
        while self._idle:
            self._drop(self._idle.pop()[1])

    @property
    def has_links(self) -> bool:
        return bool(self._links)

    @property
    def waiting(self) -> int:
        """How many need a link."""
        return len(self._waiting)

    def close(self, error: Exception) -> None:
        """Whoever waits for a link gets none."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft().failed(error)

    def sweep(self, now: float) -> None:
        if now - self._minute >= 60:
            self._minute, self._peaks = now, [len(self._taken), self._peaks[0]]
        # The least recently used stand first.
        while len(self._idle) > self._ready and now - self._idle[0][0] > self._limits.idle_time:
            self._drop(self._idle.pop(0)[1])
        away = self._client.retry.error
        queues = self._client.most_links < sys.maxsize and self._links and not away
        patience = self._limits.connect_timeout if away else self._limits.ssh_patience if queues else self._client.patience
        while self._waiting and now - self._waiting[0].since > patience:
            busy = "; all %d links over ssh are busy" % len(self._links) if queues else ""
            self._waiting.popleft().failed(away or ConnectError("no link to the server within %g s%s" % (patience, busy)))
        if self._client.started and (self._waiting or not self._client.legacy):
            self.make_more()


class ReverseTunnel(LinkUser):
    """The client's end of one `R:` tunnel: keeps links waiting at the server, and connects what comes on them to its own remote."""

    READY = 2  # links that wait; more while connections are busy, for a burst asks for one link after the other

    def __init__(self, client: Client, spec: TunnelSpec, number: int, bound: Callable[[ReverseTunnel], None],
                 refused: Callable[[ReverseTunnel, Exception], None]):
        self._client, self.spec, self.number = client, spec, number
        self._bound, self._refused = bound, refused
        self.instance = os.urandom(8)
        self.address: Address | None = None  # what the server listens on, once it has said so
        self.asked = str(spec.local) if spec.local.host else str(spec.local.port)
        self._asking = 0
        self.waiting: set[Link] = set()
        self.busy: set[Link] = set()
        self.tries = Retry(client.loop, client.limits.retry_interval, client.retries, self.start, client.give_up)

    def start(self) -> None:
        self._asking += 1
        self._client.make_link("", TCP, self._made)

    def more(self) -> None:
        """As many waiting links as it takes. The first one goes alone: for port 0 it says which port the others ask for."""
        wanted = min(self._client.limits.waiting_links, self.READY + len(self.busy)) if self.address and self.tries.error is None else 0
        while len(self.waiting) + self._asking < wanted and not self._client.draining and self._client.may_ask_for(self._asking + 1):
            self.start()

    def _made(self, link: Link | None, error: Exception | None) -> None:
        if link is None:
            return self.lost(error or ConnectError("unknown reason"))
        if self._client.draining:
            return link.close()
        return link.ask(self, LISTEN, self.asked, self._client.patience, self.instance)

    def listening(self, link: Link, bound: str) -> None:
        try:
            address = parse_bind(bound)
            if not address.port:
                raise ValueError("it is no address with a port")
        except ValueError:
            error = RemoteProtocolError("the server says that it listens on `%s`, which is no address" % printable(bound))
            self.lost(error)
            return link.die(error)
        self._asking -= 1
        with self._client.noticing():
            self.tries.succeeded("reverse tunnel on `%s` again," % str(address))
        first, self.address = self.address is None, address
        self.asked = str(self.address)
        self.waiting.add(link)
        self._client.reverse_links[link] = self
        if first:
            self._bound(self)
        return self.more()

    def lost(self, error: Exception) -> None:
        """A link could not be made, or was refused: asking again at once would not help, whether or not others wait. Those may go meanwhile,
        and none of them would see to it."""
        self._asking -= 1
        if self.address is None:
            return self._refused(self, error)
        if is_final(error):
            return self._client.give_up(error)
        if self.waiting and isinstance(error, PeerError):  # a server that answers, and finds that there are enough of them
            self.tries.succeeded("reverse tunnel on `%s` again," % str(self.address))
        elif not self._asking:
            self._rest(error)
        return None

    def _rest(self, error: Exception) -> None:
        with self._client.noticing():
            self.tries.failed(error, "" if self.waiting else "reverse tunnel on `%s`" % str(self.address))

    def taken(self, link: Link) -> None:
        """A connection came on it."""
        self.waiting.discard(link)
        self.busy.add(link)
        self.more()

    def put(self, link: Link, end: bytes) -> None:
        """Its connection is over."""
        self.busy.discard(link)
        if len(self.waiting) >= self._client.limits.waiting_links or self._client.draining:
            return link.leave(end + link.writer.record(CLOSE))
        self.waiting.add(link)
        return link.send(end + link.writer.record(OVER))

    def renew(self, links: Iterable[Link]) -> None:
        """These of those that wait make place for others."""
        for link in links:
            self.waiting.discard(link)
            link.leave(link.writer.record(CLOSE))
        self.more()

    def gone(self, link: Link, error: Exception | None) -> None:
        waited = link in self.waiting
        self.busy.discard(link)
        self.waiting.discard(link)
        if self._client.draining:
            return
        if waited and not self.waiting and not self._asking and self.tries.error is None:
            self._rest(error or LinkClosed("the server closed the connection"))
        elif not waited or self._client.loop.now - link.born > 0.5:  # what ends at once could go round and round: the sweep sees to it
            self.more()


class Client(Endpoint):
    """Tunnels through the first of some servers that answers, and after it went away through whichever does. `finished(error)` is called
    once: with None where all that it had to do is done.

    `ssh`: what `ssh://` servers are reached with; `may_ask`: whether it may ask for passwords at the terminal at first.
    `retries`: tries in a row that may fail before it gives up; None: the very first one must succeed, and from then on it never does.
    `ask_host(error)` is asked whether to trust a server's key that is not known. `started()`: all tunnels take connections.
    """

    LEAST_HANDSHAKE = 3.0  # seconds of one of many servers

    def __init__(self, loop: EventLoop, folder: KeyFolder, servers: list[Place], tunnels: list[TunnelSpec], limits: Limits = DEFAULT_LIMITS, *,
                 sockets: list[list[socket.socket]] | None = None, report: Report = log.info,
                 legacy: bool = False, accept_all_hosts: bool = False, accept_new: bool = False, should_encrypt: bool = False,
                 socks_user: str | None = None, proxy: Proxy | None = None, ssh: Sequence[str] = ("ssh",), may_ask: bool = False,
                 retries: int | None = None, ask_host: Callable[[UnknownHost], bool] = lambda _error: False, only_test: bool = False,
                 started: Callable[[], None] = lambda: None, finished: Callable[[Exception | None], None]):
        super().__init__(loop, folder, limits, legacy, limits.links_at_once)
        self._servers, self._current = servers, 0  # the one that answered last is tried first
        self.server_names = ",".join(map(str, servers))
        self.accept_all_hosts, self.should_encrypt, self.retries = accept_all_hosts, should_encrypt, retries
        self._accept_new, self._ask_host, self._socks_user, self._proxy = accept_new, ask_host, socks_user, proxy
        self._ready, self._finished, self._report, self._only_test = started, finished, report, only_test
        self._ssh = {server: SshLinks(ssh, server, limits) for server in servers if isinstance(server, SshHost)}
        self._may_ask = may_ask
        self.most_links = limits.ssh_links if self._ssh else sys.maxsize
        self.retry = Retry(loop, limits.retry_interval, retries, self._try_again, self.give_up)
        self.reverse_links: dict[Link, ReverseTunnel] = {}
        self.reverse: list[ReverseTunnel] = []
        self._unbound = 0
        self._associations: set[SocksAssociation] = set()
        self._socks: set[Negotiation] = set()
        self._test_link: Link | None = None
        self.started = False
        self.since = loop.now  # when it was connected, or lost the server
        self._dialling = self._looking = self._passed_by = 0
        listens = not only_test and any(spec.kind in (FORWARD, SOCKS) for spec in tunnels)
        self._pool = LinkPool(self, LinkPool.READY if listens and not legacy else 0)
        self._sessions = UdpSessionTable(limits.udp_sessions, limits.udp_timeout, self.counters)
        self._carrier: UdpCarrier | None = None
        self._udp_tries, self._udp_not_before = 0, 0.0
        self.tunnels: list[TunnelSpec] = []
        try:
            for number, spec in enumerate(tunnels):
                self._listen(spec, sockets[number] if sockets else listen_for_tunnel(1, spec)[0])
        except BaseException:
            self.close()  # what listens already
            raise

    def _listen(self, spec: TunnelSpec, sockets: list[socket.socket]) -> None:
        if sockets and not spec.local.is_unix:
            spec = spec._replace(local=spec.local._replace(port=sockets[0].getsockname()[1]))
        self.tunnels.append(spec)
        if spec.kind == REVERSE:
            self.reverse.append(ReverseTunnel(self, spec, len(self.tunnels) - 1, self._reverse_bound, self._reverse_refused))
        accepted = self._socks_accepted if spec.kind == SOCKS else functools.partial(self._accepted, str(spec.remote))
        for sock in sockets:
            if sock.type == socket.SOCK_STREAM:
                self.listeners.append(Listener(self.loop, sock, accepted, self.limits.accept_pause))
            else:
                self.listeners.append(UdpPort(self.loop, sock, self._session, str(spec.remote)))

    # ---- start

    def start(self) -> None:
        """Tests the connection; the tunnels take connections once it has been good. Until then those wait in the system's queue."""
        self._report("⏳ Testing server connection ...")
        for spec in [] if self._only_test else self.tunnels:
            self._announce(spec)
        if self.accept_all_hosts:
            log.warning("Any server's key is accepted (-a): whoever stands in between can pretend to be `%s`", self.server_names)
        else:
            self._check_known_hosts()
        if self.legacy and not self.should_encrypt:
            log.warning("The traffic between client and server is in the clear: -e encrypts it, and so does ratrod2, without --legacy")
        self._test("")

    def _check_known_hosts(self) -> None:
        """Says which of its lines mean nothing; where ssh knows the hosts, nobody reads it."""
        known_hosts = self.folder.known_hosts
        if not self._ssh and os.path.lexists(known_hosts.path):
            known_hosts.read()
            for problem in known_hosts.problems:
                log.warning("%s", problem)

    def _announce(self, spec: TunnelSpec) -> None:
        if spec.kind == SOCKS:
            self._report("📻 [SOCKS] Listening on `%s`, and routing through `%s` ...", spec.local, self.server_names)
        elif spec.kind == FORWARD:
            for protocol in ("UNIX",) if spec.local.is_unix else ("TCP",) if spec.remote.is_unix else ("TCP", "UDP"):
                self._report("📻 [%s] Listening on `%s`, and routing through `%s` to `%s` ...", protocol, spec.local, self.server_names, spec.remote)

    def _test(self, remote: str) -> None:
        self.make_link(remote, TCP, functools.partial(self._test_linked, remote), self._report)

    def _test_linked(self, remote: str, link: Link | None, error: Exception | None) -> None:
        if link and self.legacy:
            return link.ask(Probe(link, self._tested), TCP, "", self.patience)
        if link:
            self._test_link = link  # link_completed() or link_ended() will tell
            return None
        # A Rust server with a regex refuses the empty remote that asks for nothing; it may allow what the tunnel is for.
        remotes = [str(spec.remote) for spec in self.tunnels if spec.kind in (FORWARD, STDIO)]
        if isinstance(error, PeerError) and error.code == INVALID_HOST and not remote and remotes:
            return self._test(remotes[0])
        # Its connection is closed: whoever answers takes as long as it takes.
        if isinstance(error, UnknownHost) and self._ask_host(error):
            self._trust(error)
            return self._test(remote)
        return self._tested(error)

    def _try_again(self) -> None:
        if self.started:
            self._pool.try_again()
        else:
            self._test("")

    def give_up(self, error: Exception) -> None:
        """Nothing that it does would help."""
        self.retry.stop()
        log.error("❌ %s", reason(error))
        self._finished(error)

    def _tested(self, error: Exception | None) -> None:
        self._passed_by = 0
        if error:
            if self.draining:  # Ctrl-C while ssh asks: no news
                return self._finished(error)
            if self.retries and not is_final(error):
                return self.retry.failed(error, "Test connection failed", first=True)
            log.error("❌ Test connection failed: %s", reason(error))
            return self._finished(error)
        self._report("✅ Challenge accepted!")
        self._report("✅ Test connection successful!")
        self.retry.succeeded("Connected")
        self.since = self.loop.now
        if self._only_test:
            return self._finished(None)
        for listener in self.listeners:
            listener.start()
        self.started = True
        for spec in self.tunnels:
            if spec.kind == STDIO:
                self._carry(StdioStream(self, new_label("stdio", str(spec.remote)), None if self.legacy else self._carry, self._finished))
        self._unbound = len(self.reverse)
        for tunnel in self.reverse:
            tunnel.start()
        if not self._unbound:
            self._ready()
        if not self.tunnels:
            self._finished(None)
        return None

    # ---- reverse tunnels

    def _reverse_bound(self, tunnel: ReverseTunnel) -> None:
        assert tunnel.address is not None
        self._report("📻 [TCP] `%s` listens on `%s`, and routing back to `%s` ...", self.server_names, tunnel.address, tunnel.spec.remote)
        self.tunnels[tunnel.number] = tunnel.spec._replace(local=tunnel.address)
        self._unbound -= 1
        if not self._unbound:
            self._ready()

    def _reverse_refused(self, tunnel: ReverseTunnel, error: Exception) -> None:
        log.error("❌ reverse tunnel `R:%s` to `%s`: %s", tunnel.asked, tunnel.spec.remote, reason(error))
        self._finished(PolicyError(str(error)) if isinstance(error, PeerError) and error.code == INVALID_HOST else error)

    def may_ask_for(self, more: int) -> bool:
        """So many more links for reverse tunnels. Each needs a descriptor for itself and one for its remote: a server that opens them all
        must not take those of the other tunnels. More connections wait at the server."""
        return 2 * (len(self.reverse_links) + more) <= descriptor_limit() // 2

    def open_asked(self, link: Link, message: Open) -> None:
        """A connection came in at the server. What it says of it is for the log: this client connects to what its own command line names."""
        tunnel = self.reverse_links[link]
        if message.kind != TCP or message.instance:
            raise RemoteProtocolError("an Open of kind %d on a Listen link" % message.kind)
        if self.loop.now - link.born > self.limits.link_age or self.draining:
            return link.leave(link.writer.record(CLOSE))
        tunnel.taken(link)
        remote = tunnel.spec.remote
        label = new_label("%s back from %s" % (printable(message.target), tunnel.address), str(remote))
        until = time.monotonic() + self.limits.connect_timeout

        def connected(sock: socket.socket | None, error: Exception | None) -> None:
            def failed() -> None:
                log.error("❌ %s: cannot connect to `%s`: %s", label, remote, reason(error or ConnectError("unknown reason")))
                link.refuse(Error(REMOTE_FAILED, "the client cannot connect to its remote"))
            self.join(link, sock, label, failed)

        def found(addresses: list[tuple[int, Any]] | None, error: Exception | None) -> None:
            if not addresses:
                return connected(None, error)
            Connector(self.loop, [address[0] for _, address in addresses], remote.port, until - time.monotonic(), connected)
            return None
        link.set_deadline(self.limits.connect_timeout, lambda: connected(None, socket.timeout("timed out")))
        if remote.is_unix or is_address(remote.host):
            return found([(0, (remote.host,))], None)
        return self.workers.submit(functools.partial(look_up, remote), found)

    # ---- SOCKS

    def _socks_accepted(self, sock: socket.socket, address: Any) -> None:
        self._socks.add(Negotiation(self.loop, sock, address, Socks5Handshake(self._socks_user), self.limits.handshake_timeout,
                                    self._socks_asked))

    def _socks_asked(self, connection: Negotiation, request: Any, error: str) -> None:
        self._socks.discard(connection)
        sock, address = connection.sock, connection.address
        if request is None:
            return log.debug("SOCKS client `%s`: %s", show_address(address), error)
        try:
            if request.command == request.ASSOCIATE and isinstance(address, tuple):  # over a Unix socket there is no address to answer to
                self._associations.add(SocksAssociation(self.loop, sock, self._session, self._association_ended))
            elif request.command == request.CONNECT:
                label = new_label(show_address(address), str(parse_target(request.target)))
                self._carry(SocksStream(self, sock, label, None if self.legacy else self._carry))
            else:
                LastWord(self.loop, sock, socks_reply(7))
        except (ValueError, OSError) as error:
            log.debug("SOCKS client `%s`: %s", show_address(address), reason(error))
            LastWord(self.loop, sock, socks_reply(1))
        return None

    def _association_ended(self, association: SocksAssociation) -> None:
        self._associations.discard(association)
        self._sessions.end_of(association.port)

    # ---- links

    def make_link(self, remote: str, kind: int, done: Callable[[Link | None, Exception | None], None], report: Report = log.debug) -> None:
        """A new link, made on a thread: done(link, None) or done(None, error). Legacy names in its handshake what the link is for, and
        the link waits for Opened; on ratrod2 it is idle, and usable at once, though HandshakeCompletion is still to come."""
        def linked(result: tuple[socket.socket, Handshake, str] | None, error: Exception | None) -> None:
            self._dialling -= 1
            if result is None:
                self.counters.handshakes_failed += 1
                return done(None, error)
            self.counters.links += 1
            sock, handshake, name = result
            state = IDLE if not self.legacy else UDP_ASKED if kind == UDP else ASKED
            link = Link(self, sock, handshake, OPENER, state, name)
            if not self.legacy:
                link.set_deadline(self.limits.handshake_timeout, lambda: link.die(LinkClosed("the server did not complete the handshake")))
                link.update()
            self._path_is_back()
            return done(link, None)
        self._dialling += 1
        self.workers.submit(functools.partial(self._dial, remote, kind, report), linked)

    def _dial(self, remote: str, kind: int, report: Report) -> tuple[socket.socket, Handshake, str]:
        """On a thread: through the first of the servers that answers. One that may be the wrong one, or refuses, ends the search."""
        until = time.monotonic() + self.limits.connect_timeout
        first, failures = self._current, []
        for n in range(len(self._servers)):
            number = (first + n) % len(self._servers)
            server = self._servers[number]
            try:
                # Each gets its share of the time, as each of its addresses does; what one before it has used up of the handshake's is not its.
                share = max((until - time.monotonic()) / (len(self._servers) - n), self.limits.connect_timeout / len(self._servers))
                sock, handshake = self._come_in(server, share, remote, kind, report)
            except (AuthenticationError, PeerError, Overloaded):
                raise
            except RatrodError as error:
                failures.append((server, error))
                continue
            self._current = number
            log.debug("link to `%s`, cipher: %s", server, handshake.suite)
            return sock, handshake, str(server)
        raise failures[0][1] if len(failures) == 1 else ConnectError(
            "none of the servers answers: " + "; ".join("`%s`: %s" % failure for failure in failures))

    def _come_in(self, server: Place, timeout: float, remote: str, kind: int, report: Report) -> tuple[socket.socket, Handshake]:
        if isinstance(server, SshHost):
            linked = self._ssh[server].link(self._may_ask and not self.started)
            report("✅ Connected to server `%s` ...", server)
            return linked
        sock = self._connect(server, timeout)
        try:
            report("✅ Connected to server `%s`%s ...", server, " through `%s`" % str(self._proxy) if self._proxy else "")
            handshake = self._handshake(server, remote, kind, report)
            # One that takes connections and says nothing must not use up the time of who waits, where there are others.
            whole = self.limits.handshake_timeout
            drive(sock, handshake, max(whole / len(self._servers), min(whole, self.LEAST_HANDSHAKE)))
        except BaseException:
            sock.close()
            raise
        return sock, handshake

    def _handshake(self, server: Address, remote: str, kind: int, report: Report) -> Handshake:
        check = functools.partial(self._check_server, server)
        if self.legacy:
            return LegacyClientHandshake(self.keys, remote, is_udp=kind == UDP, should_encrypt=self.should_encrypt,
                                         check_server=check, report=report)
        return NoiseClientHandshake(self.keys, check_server=check, report=report)

    def _connect(self, server: Address, timeout: float) -> socket.socket:
        if not self._proxy:
            return self._reach(server, timeout, "server `%s`" % str(server), "is `ratrod serve` running there, and the port open?")
        until = time.monotonic() + timeout
        sock = self._reach(self._proxy.address, timeout, "proxy `%s`" % str(self._proxy), "is it running there?")
        try:
            drive(sock, ask_proxy(self._proxy, server), max(0.1, round(until - time.monotonic(), 1)))
        except BaseException as error:
            sock.close()
            if isinstance(error, RatrodError):
                # Once all was well it is worth another try: the directory that a proxy asks about its users may be away for a moment.
                kind = AuthenticationError if isinstance(error, AuthenticationError) and not self.started else ConnectError
                raise kind("the proxy `%s` does not connect to the server `%s`: %s" % (self._proxy, server, error)) from None
            raise
        return sock

    @staticmethod
    def _reach(where: Address, timeout: float, name: str, hint: str) -> socket.socket:
        until = time.monotonic() + timeout
        failure = "it has no address"
        try:
            found = look_up(where)
        except ConnectError as error:
            raise ConnectError("there is no %s: %s" % (name, error)) from None
        until = max(until, time.monotonic() + timeout / 2)  # a slow look-up must not leave a millisecond
        for n, (family, sockaddr) in enumerate(found):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # no IPv6 here, or no descriptor left
                failure = reason(error)
                continue
            try:
                # Each address gets its share of the time, as in Connector.
                sock.settimeout(max(0.001, (until - time.monotonic()) / (len(found) - n)))
                sock.connect(sockaddr)
                tune(sock)
                return sock
            except OSError as error:
                sock.close()
                failure = reason(error)
        raise ConnectError("cannot connect to the %s: %s (%s)" % (name, failure, hint))

    def _check_server(self, server: Address, key: bytes) -> None:
        """On a thread."""
        if self.accept_all_hosts:
            return
        try:
            self.folder.known_hosts.check(key, str(server))
        except UnknownHost as error:
            if not self._accept_new:
                raise
            self._trust(error)

    def _trust(self, host: UnknownHost) -> None:
        failure = self.folder.known_hosts.add(host.key, host.address)
        log.warning("Server's public key `%s` is trusted for `%s` from now on%s", encode_key(host.key), host.address,
                    "; only for this run: " + failure if failure else ", and stands in `%s`" % self.folder.known_hosts.path)

    def link_completed(self, link: Link) -> None:
        if link is self._test_link:
            self._test_link = None
            self._tested(None)
            self._pool.put(link)
        self._pool.completed(link)

    def link_idle(self, link: Link, end: bytes = b"") -> None:
        if link.role == ACCEPTOR:
            self.reverse_links[link].put(link, end)
        else:
            self._pool.put(link)

    def link_ended(self, link: Link, error: Exception | None) -> None:
        super().link_ended(link, error)
        self.counters.handshakes_failed += not link.completed and not self.legacy
        tunnel = self.reverse_links.pop(link, None)
        if tunnel:
            return tunnel.gone(link, error)
        passed = not link.completed and isinstance(error, PeerError) and not is_final(error) and self._pass_by(link.name)
        if link is self._test_link:
            self._test_link = None
            if passed and self._passed_by < len(self._servers):
                return self._test("")
            return self._tested(error or LinkClosed("the server closed the connection"))
        return self._pool.ended(link, error)

    def _pass_by(self, name: str) -> bool:
        """A server that is there takes no more of this client, as one that is full: whether another one may."""
        self._passed_by += 1
        if str(self._servers[self._current]) == name:
            self._current = (self._current + 1) % len(self._servers)
        return len(self._servers) > 1

    def client_refused(self, error: PeerError) -> None:
        """The server does not let this client in (any more): nothing that it does will change that."""
        if error.code == INVALID_KEY and self.started:
            self.give_up(error)

    # ---- what the tunnels carry

    def _accepted(self, remote: str, sock: socket.socket, address: Any) -> None:
        label = new_label(show_address(address), remote)
        self._carry(Stream(self, sock, label, None if self.legacy else self._carry))

    def _carry(self, stream: Stream) -> None:
        """Gets a link for it: an idle one at once, or one that is made for it. After a link that was dead the other idle ones are not
        trusted either: what took one of them, a NAT that forgot or a server that was started anew, took all."""
        if stream.tries:
            self._pool.clear()
        self._pool.take(stream.target, TCP, lambda link: stream.begin(link, self.patience), stream.lost)

    def _session(self, port: UdpPort, originator: Originator, remote: str) -> UdpSession | None:
        session = self._sessions.get((port, originator, remote))
        if session is None:
            if self.loop.now < self._udp_not_before:
                return None
            session = LocalUdpSession(self._sessions, port, originator, remote, self.loop.now)
        assert isinstance(session, LocalUdpSession)
        if self.loop.now < session.deaf_until:
            self._sessions.touch(session, self.loop.now)
            return None
        if session.carrier is None:
            self._carry_session(session)
        # Its link may have been lost as it was announced on it.
        return session if session.carrier and self._sessions.get(session.key) is session else None

    def _carry_session(self, session: LocalUdpSession) -> None:
        """On the link of all UDP sessions; legacy: on one of its own."""
        if self._carrier and not self.legacy:
            return self._carrier.take(session)
        carrier = self._carrier = UdpCarrier(self.loop, self.limits, self._carrier_lost)
        carrier.take(session)

        def use(link: Link) -> None:
            if carrier.sessions:
                self._sessions.peer_key = link.peer_key
                carrier.begin(link, self.patience)
            else:  # they ended meanwhile
                link.close()
        return self._pool.take(session.target, UDP, use, carrier.lost)

    def _carrier_lost(self, carrier: UdpCarrier, error: Exception) -> None:
        """Its sessions go on at once over another link, unless that failed too soon to be worth another try."""
        if carrier is self._carrier:
            self._carrier = None
        sessions = [session for session in carrier.sessions.values() if isinstance(session, LocalUdpSession)]
        self._udp_tries = 0 if carrier.began_at and self.loop.now - carrier.began_at > 1 else self._udp_tries + 1
        again = not self.legacy and carrier.began_at is not None and self._udp_tries < TRIES
        if not (again or self.legacy):  # one line for all of them, and a moment's rest
            self._udp_not_before = self.loop.now + 1
            log.log(logging.DEBUG if self.retry.error else logging.ERROR, "❌ UDP through `%s`: %s", self.server_names, reason(error))
        if again:  # as in _carry: on a busy machine three idle links of a server that ends were three tries
            self._pool.clear()
        for session in sessions:
            if again:
                self._carry_session(session)
            elif self.legacy and not isinstance(error, LinkClosed):
                session.failed(error, self.loop.now)
            else:
                session.end(tell=None)

    # ---- what it tells, and is told

    @property
    def connected(self) -> bool:
        """Whether the server is there, as far as is known: who has nothing but reverse tunnels knows it by them."""
        lost = bool(self.reverse) and all(tunnel.tries.error for tunnel in self.reverse) and not self._pool.has_links
        return self.started and self.retry.error is None and not lost

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Around what may be how the server went away or came back."""
        before = self.connected
        yield
        if self.connected != before:
            self.since = self.loop.now
            self.counters.reconnects += self.connected

    @property
    def handshakes(self) -> int:
        return self._dialling

    def state(self) -> str:
        return "%s for %s" % ("connected" if self.connected else "away" if self.started else "connecting", show_time(self.loop.now - self.since))

    def round_trip(self) -> float:
        """Seconds to the server and back, as the system measures them on the link that was heard from last; 0 where it does not."""
        link = max(self.links, key=lambda link: link.heard_at, default=None)
        return link.transport.tcp_info().rtt / 1e6 if link else 0.0

    @property
    def server(self) -> Place:
        """The one that answered last."""
        return self._servers[self._current]

    def describe(self) -> Iterator[str]:
        error, round_trip = self.retry.error, self.round_trip()
        yield "Client of `%s`, %s%s%s; %d waiting for a link" % (
            self.server if self.started else self.server_names, self.state(), " (%s)" % reason(error) if error else "",
            ", round trip " + show_time(round_trip) if round_trip else "", self._pool.waiting)
        for spec in self.tunnels:
            yield "tunnel (%s) `%s`" % (spec.kind, spec.local) + (" -> `%s`" % str(spec.remote) if spec.kind != SOCKS else "")
        for tunnel in self.reverse:
            yield "reverse tunnel on `%s`: %d links wait, %d are busy" % (tunnel.asked, len(tunnel.waiting), len(tunnel.busy))

    def reloaded(self, new_key: bool) -> None:
        if new_key:  # whoever needs a link comes as who this is now
            self._pool.clear()
        if not self.draining:
            for retry in (self.retry, *(tunnel.tries for tunnel in self.reverse)):
                retry.now()

    def sweep(self, now: float) -> None:
        self._sessions.expire(now)
        self._pool.sweep(now)
        for tunnel in self.reverse:
            tunnel.renew([link for link in tunnel.waiting if now - link.born > self.limits.link_age])
        for ssh in self._ssh.values():
            ssh.reap()
        carrier = self._carrier
        if carrier and carrier.link and (not carrier.sessions or now - carrier.link.born > self.limits.link_age):
            carrier.link.die(LinkClosed("it is too old, or carries nothing"))
        self._look_for_path()

    # ---- a path that is away: UDP and reverse tunnels are to go on as soon as it is back, and not at TCP's next try

    def _look_for_path(self) -> None:
        """While what waits on links is sent again and again, a new connection each second is the first to get through."""
        if self._stuck() and self._looking < LinkPool.HANGING and not self.draining:
            self._looking += 1
            self.make_link("", TCP, self._looked)

    def _looked(self, link: Link | None, error: Exception | None) -> None:
        self._looking -= 1
        if link:
            self._pool.adopt(link)
        else:
            log.debug("the path is not back: %s", error)

    def _stuck(self) -> list[Callable[[], None]]:
        """What moves away from the links that are stuck: the one of the UDP sessions, and the waiting ones of reverse tunnels."""
        moves: list[Callable[[], None]] = []
        carrier = self._carrier if not self.legacy else None
        if carrier and carrier.link and carrier.link.transport.tcp_info().stuck:
            moves.append(functools.partial(carrier.die, LinkClosed("nothing passes on it, and others pass")))
        for tunnel in self.reverse:
            stuck = [link for link in tunnel.waiting if link.transport.tcp_info().stuck]
            if stuck:
                moves.append(functools.partial(tunnel.renew, stuck))
        return moves

    def _path_is_back(self) -> None:
        """A new link has come through: it is the first that what moves now can take."""
        for move in self._stuck():
            move()

    def let_go(self) -> None:
        self._sessions.clear()
        if self._carrier and self._carrier.link:
            self._carrier.link.close()
        for association in list(self._associations):
            association.close()
        for connection in list(self._socks):
            connection.close()
        self._pool.clear()
        for ssh in self._ssh.values():
            ssh.drain()
        for tunnel in self.reverse:
            tunnel.tries.stop()
        for link in list(self.links):
            if link.state == IDLE or isinstance(link.user, ReverseTunnel):  # waits for a connection, or asks to
                link.close()

    def busy(self) -> bool:
        return super().busy() or bool(self._pool.waiting)

    def close(self) -> None:
        self.draining = True
        self.retry.stop()
        self._pool.close(LocalFailed("ratrod is ending"))
        self.let_go()
        super().close()
        for ssh in self._ssh.values():
            ssh.close()


# ======================================================================================================================
# 10b. What an endpoint tells: status table, metrics
# ======================================================================================================================

LISTED = 50  # keys, streams and sessions of each that a status table names


def status_table(endpoint: Endpoint) -> Iterator[str]:
    """Its lines, bounded: an endpoint may carry 10,000 streams."""
    counters, now = endpoint.counters, endpoint.loop.now
    keys = counters.tally(endpoint.links)
    described = endpoint.describe()
    yield "%s; up %s; %s; handshakes: %d under way, %d failed" % (next(described), show_time(time.time() - counters.began_at),
                                                                 show_tally(sum(keys.values(), collections.Counter())), endpoint.handshakes,
                                                                 counters.handshakes_failed)
    yield from first_of(described)
    yield from first_of("key %s: %s" % (endpoint.show_key(key), show_tally(tally)) for key, tally in keys.items() if key)
    alive: tuple[set[Any], ...] = counters.streams, counters.sessions
    for carried in alive:
        yield from first_of("%s: %d bytes sent to the link, %d received, for %s" % (one.label, one.sent, one.received, show_time(now - one.started))
                            for one in sorted(carried, key=lambda one: one.started))


def show_tally(tally: collections.Counter[str]) -> str:
    return "%s (%d idle, %d busy, %d closing), %s, %s, %d bytes sent to links, %d received" % (
        plural(tally["idle"] + tally["busy"] + tally["closing"], "link"), tally["idle"], tally["busy"], tally["closing"],
        plural(tally["streams"], "stream"), plural(tally["sessions"], "UDP session"), tally["sent"], tally["received"])


def first_of(lines: Iterable[str]) -> Iterator[str]:
    more = 0
    for number, line in enumerate(lines):
        if number < LISTED:
            yield line
        else:
            more += 1
    if more:
        yield "... and %d more" % more


def metrics(endpoint: Endpoint) -> str:
    """Prometheus' text format 0.0.4. No label has a character that would have to be escaped: keys are base64url."""
    lines: list[str] = []

    def add(name: str, kind: str, what: str, *samples: tuple[str, float]) -> None:
        lines.extend(("# HELP %s %s" % (name, what), "# TYPE %s %s" % (name, kind)))
        lines.extend("%s%s %s" % (name, "{%s}" % labels if labels else "", repr(value)) for labels, value in samples)

    def by(label: str, values: Iterable[str], tally: Any) -> Iterator[tuple[str, float]]:
        return (('%s="%s"' % (label, value), tally[value]) for value in values)
    counters = endpoint.counters
    keys = counters.tally(endpoint.links)
    total = sum(keys.values(), collections.Counter())
    known = [('key="%s"' % encode_key(key), tally) for key, tally in keys.items() if key]
    add("ratrod_info", "gauge", "The version that runs.", ('version="%s"' % __version__, 1))
    add("ratrod_links", "gauge", "Links: authenticated connections between client and server.", *by("state", ("idle", "busy", "closing"), total))
    add("ratrod_links_total", "counter", "Links that were made.", ("", counters.links))
    add("ratrod_streams", "gauge", "TCP connections through the tunnels.", ("", total["streams"]))
    add("ratrod_streams_total", "counter", "... that are over, and how; refused: by the server's policy or its limits.",
        *by("result", Counters.RESULTS, counters.results))
    add("ratrod_udp_sessions", "gauge", "UDP sessions.", ("", total["sessions"]))
    add("ratrod_bytes_total", "counter", "Payload, sent to links and received from them.", *by("direction", ("sent", "received"), total))
    add("ratrod_handshakes_under_way", "gauge", "Connections that are being authenticated.", ("", endpoint.handshakes))
    add("ratrod_handshakes_failed_total", "counter", "Connections that were refused, or could not be made.", ("", counters.handshakes_failed))
    if isinstance(endpoint, Client):
        add("ratrod_connected", "gauge", "Whether the server is there.", ("", int(endpoint.connected)))
        add("ratrod_reconnects_total", "counter", "How often the server was found again.", ("", counters.reconnects))
    add("ratrod_key_links", "gauge", "Links of each key of the other side.", *(
        (key, tally["idle"] + tally["busy"] + tally["closing"]) for key, tally in known))
    add("ratrod_key_streams", "gauge", "TCP connections of each key.", *((key, tally["streams"]) for key, tally in known))
    add("ratrod_key_bytes_total", "counter", "Payload of each key.", *(('%s,%s' % (key, direction), n) for key, tally in known
                                                                      for direction, n in by("direction", ("sent", "received"), tally)))
    with contextlib.suppress(OSError):
        add("process_open_fds", "gauge", "Open descriptors.", ("", len(os.listdir("/proc/self/fd")) - 1))
        with open("/proc/self/statm") as file:
            add("process_resident_memory_bytes", "gauge", "Memory.", ("", int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
    add("process_start_time_seconds", "gauge", "When it began, in seconds since the epoch.", ("", counters.began_at))
    return "\n".join(lines) + "\n"


class Scrape:
    """One HTTP request for the metrics, and the answer: ended(self) when that is over, after 10 s at most."""

    LONGEST, TIME, AT_ONCE = 8192, 10.0, 16

    def __init__(self, loop: EventLoop, sock: socket.socket, text: Callable[[], str], ended: Callable[[Scrape], None]):
        self._text, self._ended = text, ended
        self._request, self._answer = b"", b""
        self._transport = Transport(loop, sock, self._on_event)
        self._timer = loop.call_later(self.TIME, self.close)
        self._transport.want(READ)

    def _on_event(self, mask: int) -> None:
        try:
            if mask & self._transport.events & READ:
                self._read()
            elif mask & self._transport.events & WRITE:
                self._send()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _read(self) -> None:
        data = self._transport.sock.recv(4096)
        if not data:
            return self.close()
        if self._answer:  # closing on what is not read would be a reset, which destroys the answer
            return None
        self._request += data
        if re.search(b"\r?\n\r?\n", self._request) or len(self._request) > self.LONGEST:
            self._answer = self._respond()
            self._send()
        return None

    def _send(self) -> None:
        self._answer = self._answer[self._transport.send(self._answer):]
        if not self._answer:
            self._answer = b"sent"
            self._transport.half_close()
        self._transport.want(READ if self._answer == b"sent" else WRITE)

    def _respond(self) -> bytes:
        found = re.match(rb"([A-Z]+) (/[^ ?]*)[^ ]* HTTP/1\.[01]\r?\n", self._request)
        method, path = found.groups() if found else (b"", b"")
        kind = "text/plain; charset=utf-8"
        if len(self._request) > self.LONGEST:
            status, text = "431 Request Header Fields Too Large", "too long\n"
        elif not found:
            status, text = "400 Bad Request", "this speaks HTTP/1.1\n"
        elif method != b"GET":
            status, text = "405 Method Not Allowed\r\nAllow: GET", "only GET\n"
        elif path == b"/metrics":
            status, text, kind = "200 OK", self._text(), "text/plain; version=0.0.4; charset=utf-8"
        elif path == b"/":
            status, text = "200 OK", "ratrod %s: see /metrics\n" % __version__
        else:
            status, text = "404 Not Found", "see /metrics\n"
        body = text.encode()
        return ("HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, kind, len(body))).encode() + body

    def die(self, _error: Exception) -> None:
        self.close()

    def close(self) -> None:
        self._timer.cancel()
        self._transport.close()
        self._ended(self)


def serve_metrics(endpoint: Endpoint, address: Address, share: bool) -> None:
    """Answers scrapes at `address` until the endpoint ends; RatrodError where it cannot listen there."""
    scrapes: dict[Scrape, None] = {}  # the oldest first

    def accepted(sock: socket.socket, _address: Any) -> None:
        if len(scrapes) >= Scrape.AT_ONCE:
            next(iter(scrapes)).close()
        scrapes[Scrape(endpoint.loop, sock, lambda: metrics(endpoint), lambda scrape: scrapes.pop(scrape, None))] = None
    for sock in listen(address, share=share):
        endpoint.listeners.append(Listener(endpoint.loop, sock, accepted, endpoint.limits.accept_pause))
        endpoint.listeners[-1].start()
    log.info("📈 Metrics on `http://%s/metrics`", address._replace(port=sock.getsockname()[1]))


# ======================================================================================================================
# 11. As a library: an endpoint on a thread of its own
# ======================================================================================================================


class Background:
    """What tunnel() and serve() give: it runs until close(), the end of its with-block, or the end of the interpreter.

    No signal handlers, and no logging but to the logger "ratrod". `error` is what ended it meanwhile, or None.
    """

    def __init__(self, make: Callable[[EventLoop, Callable[[], None], Callable[[Exception | None], None]], Endpoint], timeout: float):
        self.error: RatrodError | None = None
        self._ready: queue.Queue[RatrodError | None] = queue.Queue()
        self._lock = threading.Lock()
        self._loop = EventLoop()
        try:
            self._endpoint = make(self._loop, lambda: self._ready.put(None), self._finished)
        except BaseException:
            self._loop.close()
            raise
        self._thread = threading.Thread(target=self._run, daemon=True, name="ratrod")
        try:
            self._thread.start()
        except RuntimeError as failure:
            self._endpoint.close()
            self._loop.close()
            raise RatrodError("this system lets it start no thread for now (%s)" % failure) from None
        atexit.register(self.close)
        error: RatrodError | None
        try:
            error = self._ready.get(timeout=timeout)
        except queue.Empty:
            error = ConnectError("not ready within %g s" % timeout)
        except BaseException:
            self.close()
            raise
        if error:
            self.close()
            raise error

    def _run(self) -> None:
        try:
            self._endpoint.start()
            self._loop.run()
        except Exception as error:
            self._finished(error)
        finally:
            self._endpoint.close()
            self._loop.close()

    def _finished(self, error: Exception | None) -> None:
        if isinstance(error, PeerError) and error.code == INVALID_KEY:
            error = AuthenticationError(str(error))
        if error:
            self.error = error if isinstance(error, RatrodError) else RatrodError(reason(error))
            self._loop.stop()
        self._ready.put(self.error)

    def close(self) -> None:
        """Ends it with all that it carries. Any thread may call it, more than once."""
        atexit.unregister(self.close)
        if self._thread is not threading.current_thread():
            with self._lock:
                if self._thread.is_alive():
                    self._loop.call_soon_threadsafe(self._loop.stop)
                    self._thread.join(2)  # an authorize() that hangs must not hang its caller too

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()


Self = TypeVar("Self", bound=Background)

class Tunnel(Background):
    """A client with its tunnels, all of them ready."""

    _endpoint: Client

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) that each tunnel listens on, in their order; of a reverse tunnel at the server; (path, 0) of a Unix socket."""
        return [(spec.local.host, spec.local.port) for spec in self._endpoint.tunnels]

    @property
    def address(self) -> tuple[str, int]:
        """The first of `addresses`: what socket.create_connection() takes."""
        return self.addresses[0]


class Service(Background):
    """A server that takes clients."""

    _endpoint: Server

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) that it listens on."""
        return self._endpoint.address.host, self._endpoint.address.port


def tunnel(server: str, *tunnels: str, key_path: str | None = None, accept_new: bool = False, accept_all_hosts: bool = False,
           legacy: bool = False, encrypt: bool = False, socks_user: str | None = None, proxy: str | None = None, ssh_command: str | None = None,
           retries: int | None = None, limits: Limits = DEFAULT_LIMITS, timeout: float = 30.0) -> Tunnel:
    """Connects to a server (`host:port`, or several as `a:1,b:2`) and opens tunnels, each as on the command line:
    `with tunnel("server:19000", "0:db:5432") as t`. `retries` is --max-retry-count, `proxy` and
    `ssh_command` are what the options of these names take; ssh is to need no password.

    Returns when all of them take connections. The keys are those of `key_path` (default: ~/.ratrod); nothing is asked and nothing
    generated. ConfigError: a key file or an argument is wrong. ConnectError: the server is not there, or not ready within `timeout`
    seconds. AuthenticationError: one of the two does not know the other. PolicyError: it refuses a reverse tunnel. RatrodError: anything
    else, as a port that is in use.
    """
    servers = parse_servers(server)
    way = parse_proxy(proxy, servers)
    specs = check_tunnels(tunnels, legacy=legacy, socks_user=socks_user)
    if any(spec.kind == STDIO for spec in specs):
        raise ConfigError("stdio: is for the command line; connect to a tunnel's address instead")
    ssh = check_ssh(servers, ssh_command, {"key_path": key_path, "accept_new": accept_new, "accept_all_hosts": accept_all_hosts, "legacy": legacy,
                                           "proxy": proxy}, specs)
    folder = NoKeys() if ssh else KeyFolder(key_path)
    ensure_keys(folder, may_ask=False)
    return Tunnel(lambda loop, started, finished: Client(
        loop, folder, servers, specs, limits, legacy=legacy, accept_all_hosts=accept_all_hosts, accept_new=accept_new,
        should_encrypt=encrypt, socks_user=socks_user, proxy=way, ssh=ssh, retries=retries, started=started, finished=finished), timeout)


def serve(bind: str = "127.0.0.1:0", *, key_path: str | None = None, remote_regex: str = ".*", authorize: Authorizer | None = None,
          allow_listen: bool = False, legacy: bool = False, limits: Limits = DEFAULT_LIMITS) -> Service:
    """Takes clients on `bind`: `with serve("0.0.0.0:19000") as s`.

    `authorize(key, target)` decides in place of authorized_keys: with target "" whether a client with this public key may come in, then
    for each target whether it may have it: `db:5432`, `udp db:53`, `listen 127.0.0.1:9000`. It is called on threads of the server, must
    not block for long, and refuses where it raises. ConfigError: a key file or an argument is wrong. RatrodError: the address is in use.
    """
    address = parse_endpoint(bind, "address to bind", lowest=0)
    policy = Policy(remote_regex)
    folder = KeyFolder(key_path)
    ensure_keys(folder, may_ask=False)

    return Service(lambda loop, started, _finished: Server(
        loop, folder, address, policy, limits, legacy=legacy, allow_listen=allow_listen, authorize=authorize, started=started), timeout=30.0)


# ======================================================================================================================
# 12. Command line
# ======================================================================================================================


class Options(NamedTuple):
    """A command line that was understood."""

    command: str = "help"
    key_path: str | None = None
    verbose: bool = False
    bind: str = ""
    remote_regex: str = ".*"
    server: str = ""
    tunnels: tuple[str, ...] = ()
    accept_all_hosts: bool = False
    accept_new: bool = False
    allow_listen: bool = False
    socks_user: str | None = None
    proxy: str | None = None
    ssh_command: str | None = None
    encrypt: bool = False
    legacy: bool = False
    max_retry_count: int | None = None
    drain: float | None = None
    reuse_port: bool = False
    proxy_protocol: str = ""
    workers: int = 1
    log_format: str = "text"
    metrics: str = ""
    no_status: bool = False
    check: bool = False
    topic: str | None = None
    limits: Limits = DEFAULT_LIMITS
    environment: Mapping[str, str] = MappingProxyType({})  # {option: its value}, of those that come from there


LIMIT_OPTIONS = {  # option -> the field of Limits that it sets
    "--max-links": "links", "--max-links-per-key": "links_per_key", "--max-streams": "streams", "--max-streams-per-key": "streams_per_key",
    "--max-handshakes": "handshakes", "--max-handshakes-per-source": "handshakes_per_source", "--handshake-rate": "handshake_rate",
    "--max-connects-per-key": "connects_per_key", "--idle-links": "idle_links", "--handshake-timeout": "handshake_timeout",
    "--connect-timeout": "connect_timeout", "--link-age": "link_age", "--udp-timeout": "udp_timeout",
    "--max-udp-sessions": "udp_sessions_in_all", "--max-udp-sessions-per-link": "udp_sessions", "--udp-backlog": "udp_backlog",
    "--max-retry-interval": "retry_interval"}
MAY_BE_ZERO = ("--drain", "--max-retry-count")

USAGE = re.search(r"Usage:\n(?:  .*\n)+", __doc__).group()  # type: ignore[union-attr,arg-type]
COMMANDS = dict(re.findall(r"^  (\w+)  +(\S.*)$", __doc__.split("Commands:\n")[1].split("\n\n")[0], re.M))


class _Pattern(NamedTuple):
    """One command of the usage text: its options by long name, and its arguments: (name, optional, repeated)."""

    options: set[str]
    arguments: list[tuple[str, bool, bool]]


class UsageReader:
    """Reads a command line by the usage text alone: in place of docopt where that is missing, and to say what is wrong with a line."""

    def __init__(self, text: str):
        options = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z_]+))?  ", text.split("Options:\n")[1], re.M)
        self.takes_value = {long: value for _, long, value in options}  # what its value is called, "" where it has none
        self._long = {short: long for short, long, _ in options if short}
        self.patterns: dict[str, _Pattern] = {}
        for usage in re.split(r"^  ratrod ", USAGE, flags=re.M)[1:]:
            command = re.search(r"(?<![\w-])([a-z]+)(?![\w-])", usage)
            if command and not usage.startswith("-"):
                named = {self._long.get(name, name) for name in re.findall(r"\[(-[-\w]+)[ \]]", usage)} - {"--"}
                arguments = re.findall(r"(\[)?(?<![-\w] )(?<![\w-])([A-Z]+)\]?(\.\.\.)?", usage)
                self.patterns[command.group(1)] = _Pattern(named, [(name, bool(optional), bool(more)) for optional, name, more in arguments])

    def read(self, argv: list[str]) -> dict[str, Any]:
        """What docopt would give: {"serve": True, "--key-path": [...], "BIND": ...}. UsageError says what is wrong."""
        given, words = self._split(argv)
        if not words:
            raise UsageError("no command")
        command, arguments = words[0], words[1:]
        if command not in self.patterns:
            raise UsageError("there is no command `%s`" % printable(command))
        pattern = self.patterns[command]
        for option in given:
            if option not in pattern.options:
                raise UsageError("`%s` does not belong to `%s`" % (option, command))
        result: dict[str, Any] = {command: True, **given}
        for name, optional, repeated in pattern.arguments:
            if not arguments and not optional:
                raise UsageError("`%s` needs %s" % (command, name))
            result[name] = arguments if repeated else arguments[0] if arguments else None
            arguments = [] if repeated else arguments[1:]
        if arguments:
            raise UsageError("`%s` takes no further argument: `%s`" % (command, printable(arguments[0])))
        return result

    def _split(self, argv: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
        given: dict[str, list[Any]] = {}
        words: list[str] = []
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--":
                return given, words + rest
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                self._take(given, self._complete(name), [value] if equals else None, rest)
            elif word.startswith("-") and word != "-":
                self._take_short(given, word[1:], rest)
            else:
                words.append(word)
        return given, words

    def means(self, word: str, option: str) -> bool:
        return word.startswith("--") and [long for long in self.takes_value if long.startswith(word)] == [option]

    def _complete(self, name: str) -> str:
        found = [name] if name in self.takes_value else [long for long in self.takes_value if long.startswith(name)]
        if len(found) != 1:
            raise UsageError("there is no option `%s`" % printable(name) if not found else "`%s` may be %s" % (name, " or ".join(found)))
        return found[0]

    def _take_short(self, given: dict[str, list[Any]], letters: str, rest: list[str]) -> None:
        while letters:
            long, letters = self._long.get("-" + letters[0]), letters[1:] if "-" + letters[0] in self._long else letters
            if long is None:
                raise UsageError("there is no option `-%s`" % printable(letters[0]))
            if self.takes_value[long] and letters:
                return self._take(given, long, [letters], rest)
            self._take(given, long, None, rest)

    def _take(self, given: dict[str, list[Any]], name: str, value: list[str] | None, rest: list[str]) -> None:
        if not self.takes_value[name]:
            if value:
                raise UsageError("`%s` takes no value" % name)
            value = [True]  # type: ignore[list-item]
        elif value is None:
            if not rest or rest[0] == "--":
                raise UsageError("`%s` needs a value" % name)
            value = [rest.pop(0)]
        given.setdefault(name, []).extend(value)


MOST_WORDS = 1 << 20  # characters of a file of arguments


def expand_arguments(words: Iterable[str], inside: tuple[str, ...] = ()) -> Iterator[str]:
    """Each `@file` replaced by the words of that file, and `@@x` by `@x`; `inside` are the files that these words stand in. UsageError names
    the file, and the line where it can."""
    for word in words:
        if word.startswith("@@"):
            yield word[1:]
        elif word.startswith("@"):
            path = os.path.expanduser(word[1:])
            if os.path.realpath(path) in inside:
                raise UsageError("the arguments in `%s` name that file again" % printable(path))
            if len(inside) >= 10:
                raise UsageError("`%s` is the eleventh file of arguments inside each other" % printable(path))
            yield from expand_arguments(_read_arguments(path), (*inside, os.path.realpath(path)))
        else:
            yield word


def _read_arguments(path: str) -> list[str]:
    import io
    import shlex

    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read(MOST_WORDS + 1)
    except OSError as error:
        raise UsageError("cannot read the arguments in `%s`: %s" % (printable(path), reason(error))) from None
    if "\0" in text or len(text) > MOST_WORDS:
        where, what = (text.index("\0"), "a NUL character") if "\0" in text else (0, "more than a file of arguments may be")
        raise UsageError("line %d of the arguments in `%s`: %s" % (text.count("\n", 0, where) + 1, printable(path), what))
    # As shlex.split(text, comments=True), which does not say where it failed.
    stream = io.StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split = True
    words, start = [], 0
    try:
        for word in lexer:
            words.append(word)
            start = stream.tell()
    except ValueError as error:
        start += len(re.match(r"(?:\s+|#.*)*", text[start:]).group())  # type: ignore[union-attr]
        raise UsageError("line %d of the arguments in `%s`: %s" % (text.count("\n", 0, start) + 1, printable(path), str(error).lower())) from None
    return words


def parse_command_line(argv: list[str], environ: Mapping[str, str] = MappingProxyType({})) -> Options:
    """The Options in `argv` (without the program's name), and for what that leaves open in `environ`; UsageError says in one line what is
    wrong."""
    reader = UsageReader(__doc__)
    flags = argv[:argv.index("--")] if "--" in argv else argv
    for wanted, command in (("h", "help"), ("V", "version")):
        if any(re.fullmatch("-[aev]*%s[aevhV]*" % wanted, word) or reader.means(word, "--" + command) for word in flags):
            return Options(command, topic=next((word for word in flags if word in COMMANDS), None))
    given = _docopt(reader, argv)
    found = _from_environment(reader, given, environ)
    options = _to_options({**given, **found}, reader.takes_value)
    return options._replace(environment={option: value[0] if isinstance(value, list) else "" for option, value in found.items()})


def variable_of(option: str) -> str:
    return "RATROD_" + option[2:].upper().replace("-", "_")


def name_variables(error: ConfigError, environment: Mapping[str, str]) -> ConfigError:
    """The error, with the variables that it is about: nobody typed what it complains of."""
    text = str(error)
    about = [variable_of(option) for option, value in environment.items() if re.search(option + r"(?![\w-])", text) or value and "`" + value in text]
    return ConfigError("%s (see %s in the environment)" % (text, ", ".join(about))) if about else error


def _from_environment(reader: UsageReader, given: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What RATROD_MAX_LINKS and the like say of those options of the command that were not given; an empty one says nothing."""
    command = next(command for command in COMMANDS if given.get(command))
    found: dict[str, Any] = {}
    for option in sorted(reader.patterns[command].options):
        name = variable_of(option)
        word = environ.get(name, "")
        if given.get(option) or not word:
            continue
        try:
            if reader.takes_value[option]:
                _convert(option, word, reader.takes_value[option])
                found[option] = [word]
            elif word.lower() in ("1", "true", "yes"):
                found[option] = True
            elif word.lower() not in ("0", "false", "no"):
                raise UsageError("it is 1 or 0, true or false, yes or no, not `%s`" % printable(word))
        except UsageError as error:
            raise UsageError("%s in the environment: %s" % (name, error)) from None
    return found


def _docopt(reader: UsageReader, argv: list[str]) -> dict[str, Any]:
    try:
        from docopt import DocoptExit, docopt
    except ImportError:
        return reader.read(argv)
    # Every option may be repeated, the last one counts; a reader of the usage text does not need to see that at each.
    text = __doc__.replace(USAGE, re.sub(r"(\[-(?!-\])[^\]]*\])", r"\1...", USAGE))
    try:
        # By position: docopt-ng and docopt 0.6.2 name these differently. Help and version are not docopt's to print.
        return docopt(text, argv, False, None, False)
    except DocoptExit:
        reader.read(argv)  # knows better what to say
        raise UsageError("these words do not go together") from None


def _to_options(given: dict[str, Any], takes_value: dict[str, str]) -> Options:
    """From docopt's dictionary: the last of each repeated option, converted to what its value is called in the usage text."""
    fields: dict[str, Any] = {"command": next(command for command in COMMANDS if given.get(command))}
    limits: dict[str, Any] = {}
    for name, value in given.items():
        field = {"TUNNEL": "tunnels", "COMMAND": "topic"}.get(name) or name.lstrip("-").replace("-", "_").lower()
        if value in (None, [], False, 0) or name == "--":
            continue
        if name.startswith("-"):
            word = _convert(name, value[-1] if isinstance(value, list) else value, takes_value[name])
        else:
            word = tuple(value) if isinstance(value, list) else value
        if name in LIMIT_OPTIONS:
            limits[LIMIT_OPTIONS[name]] = word
            if name == "--handshake-rate":
                limits["handshake_burst"] = 2 * word
        elif field in Options._fields:
            fields[field] = word
    return Options(limits=DEFAULT_LIMITS._replace(**limits), **fields)


def _convert(name: str, word: Any, kind: str) -> Any:
    """The value of an option that the usage text calls `kind`."""
    if kind == "FORMAT" and word not in ("text", "json"):
        raise UsageError("`%s` takes text or json, not `%s`" % (name, printable(word)))
    if kind not in ("SECS", "N", "BYTES"):
        return word if kind else True
    convert, what, form = (float, "seconds, a number", r"[0-9]{1,6}(?:\.[0-9]+)?") if kind == "SECS" else (int, "a whole number", "[0-9]{1,9}")
    lowest = "from 0 on" if name in MAY_BE_ZERO else "above 0"
    if not re.fullmatch(form, word, re.ASCII) or float(word) <= 0 and name not in MAY_BE_ZERO:
        raise UsageError("`%s` takes %s %s, not `%s`" % (name, what, lowest, printable(word)))
    return convert(word)


def usage_of(command: str) -> str:
    """Its lines of the usage text."""
    return next(text for text in re.findall(r"^  ratrod .*\n(?:   .*\n)*", USAGE, re.M) if re.search(r"(?<![-\w])%s(?![-\w])" % command, text))


def usage_hint(argv: Sequence[str]) -> str:
    """What goes with an error in `argv`: no more than a terminal shows along with the error."""
    command = next((word for word in argv if word in COMMANDS), None)
    if command:
        return "Usage:\n%s\n`ratrod help %s` says more." % (usage_of(command), command)
    return "Usage: ratrod COMMAND ...\n\nCommands:\n%s\n\n`ratrod help` says more." % __doc__.split("Commands:\n")[1].split("\n\n")[0]


def help_text(topic: str | None = None) -> str:
    """The whole help, or what concerns one command: its usage, its arguments and its options."""
    if topic is None:
        return __doc__
    if topic not in COMMANDS:
        raise UsageError("there is no command `%s` to explain" % printable(topic))
    pattern = UsageReader(__doc__).patterns.get(topic, _Pattern(set(), []))
    names = {name for name, _, _ in pattern.arguments}
    sections = [COMMANDS[topic][0].upper() + COMMANDS[topic][1:] + ".\n", "Usage:\n" + usage_of(topic)]
    for title, wanted in (("Arguments", names), ("Options", pattern.options | {"--help"})):
        block = __doc__.split(title + ":\n")[1].split("\n\n")[0]
        entries = [entry for entry in re.findall(r"^  \S.*(?:\n    .*)*", block, re.M)
                   if wanted & set(re.findall(r"--[\w-]+|[A-Z]+\b", re.split("   *", entry[2:])[0]))]
        if entries:
            sections.append(title + ":\n" + "\n".join(entries) + "\n")
    return "\n".join(sections)


class LogFormatter(logging.Formatter):
    """`2025-03-12T22:56:13.939034Z  INFO text`, as the original; coloured only on a terminal."""

    _COLOURS = {"ERROR": "31", "WARN": "33", "INFO": "32", "DEBUG": "34"}

    def __init__(self, colour: bool):
        super().__init__()
        self._colour = colour

    @staticmethod
    def parts(record: logging.LogRecord) -> tuple[str, str, str]:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + ".%06dZ" % (record.created % 1 * 1e6)
        return moment, {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname), record.getMessage()

    def format(self, record: logging.LogRecord) -> str:
        moment, level, message = self.parts(record)
        shown = "%5s" % level
        if self._colour:
            moment, shown = "\x1b[2m%s\x1b[0m" % moment, "\x1b[%sm%s\x1b[0m" % (self._COLOURS.get(level, "0"), shown)
        return "%s %s %s" % (moment, shown, message)


class JsonFormatter(LogFormatter):
    """One object a line: {"time": ..., "level": ..., "message": ...}."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        return json.dumps(dict(zip(("time", "level", "message"), self.parts(record))), ensure_ascii=False)


class StatusLine(logging.StreamHandler):  # type: ignore[type-arg]
    """A log on a terminal with a line below it that says how a client is, drawn again once a second where it changed.

    The cursor stays at the line's beginning, so that what follows it on the screen is the line and nothing else, also where a terminal that
    became narrower has broken it in two.
    """

    ERASE = "\x1b[J"

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._shown = ""
        self._last = time.monotonic(), 0, 0

    def run(self, client: Client) -> None:
        """Begins to show it; the client's loop draws it."""
        def tick() -> None:
            elapsed = client.loop.now - self._last[0]
            if elapsed > 3:  # it was stopped (Ctrl-Z): whatever stands there now is not the line
                self._shown = ""
            self._last, text = self._describe(client, max(elapsed, 0.001))
            self.show(text)
            client.loop.call_later(1.0, tick)
        tick()

    def _describe(self, client: Client, elapsed: float) -> tuple[tuple[float, int, int], str]:
        total = sum(client.counters.tally(client.links).values(), collections.Counter())
        if not client.started:  # a question may be asked
            return (client.loop.now, 0, 0), ""
        _, sent, received = self._last
        parts = ["%s/s %s" % (show_size((now - before) / elapsed), way) for now, before, way in (
            (total["sent"], sent, "up"), (total["received"], received, "down"))]
        parts += [plural(total["streams"], "stream"), plural(total["sessions"], "UDP session")]
        round_trip = client.round_trip()
        parts += ["round trip " + show_time(round_trip)] if round_trip and client.connected else []
        parts = parts if client.connected else ["server " + client.state(), *parts]
        return (client.loop.now, total["sent"], total["received"]), "ratrod: " + ", ".join(parts)

    def show(self, text: str) -> None:
        """In place of what is shown; "" is nothing."""
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, or no terminal at all any more
            self.acquire()
            try:
                if os.tcgetpgrp(self.stream.fileno()) != os.getpgrp():  # in the background: the line would stand in the middle of others' work
                    self._shown = ""
                    return
                text = text[:(os.get_terminal_size(self.stream.fileno()).columns or 80) - 1]
                if text != self._shown:
                    self.stream.write("\r" + self.ERASE + (text + "\r" if text else ""))
                    self.stream.flush()
                    self._shown = text
            finally:
                self.release()

    def emit(self, record: logging.LogRecord) -> None:
        shown = self._shown
        self.show("")
        super().emit(record)
        self.show(shown)


def set_up_logging(level: int, as_json: bool = False, status: bool = False) -> None:
    if hasattr(sys.stderr, "reconfigure"):  # an ASCII locale must not lose a line for its emoji
        sys.stderr.reconfigure(errors="replace")
    if sys.stderr:
        handler: logging.Handler = (StatusLine if status else logging.StreamHandler)(sys.stderr)
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        handler.setFormatter(JsonFormatter(False) if as_json else LogFormatter(colour))
    else:  # closed by whoever started this
        handler = logging.NullHandler()
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)


QUESTION = "Would you like to have the security files (public / private key pair, known hosts, and authorized keys) generated (y/n)? "


def ensure_keys(folder: KeyFolder, may_ask: bool = True) -> None:
    """The first run: asks as the original does. ConfigError where the answer is no, or there is nobody to answer."""
    if isinstance(folder, NoKeys) or folder.exists():
        return
    if not may_ask:
        raise ConfigError("no security files in `%s`: run `ratrod keygen` first" % folder.path)
    sodium()  # without it nothing could be generated: say so before asking
    log.info("No security files present in `%s` ...", folder.path)
    print(QUESTION, end="", flush=True)
    answer = sys.stdin.readline() if sys.stdin else ""
    if not answer.endswith("\n"):
        print(flush=True)
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("no security files in `%s`, and nothing was written. Answer y next time, or run `ratrod keygen`" % folder.path)
    generate_keys(folder)


def generate_keys(folder: KeyFolder) -> KeyPair:
    sodium()
    log.info("Generating security files ...")
    keys = folder.generate()
    log.info("📦 Security files written to `%s`", folder.key_file)
    return keys


def ask_host(error: UnknownHost) -> bool:
    """At a terminal: whether to trust a server's key that is not known, as ssh asks."""
    import hashlib

    key = encode_key(error.key)
    fingerprint = "SHA256:" + base64.b64encode(hashlib.sha256(error.key).digest()).decode("ascii").rstrip("=")
    # A signal shall end the question, not wait behind it.
    handlers = [(number, signal.signal(number, handler)) for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))]
    try:
        print("The key of the server `%s` is not known yet.\nIt is %s, fingerprint %s.\n"
              "Are you sure you want to continue connecting (yes/no/[fingerprint])? " % (error.address, key, fingerprint),
              end="", file=sys.stderr, flush=True)
        while True:
            answer = sys.stdin.readline()
            if not answer or answer.strip().lower() in ("no", "n"):
                return False
            if answer.strip().lower() == "yes" or answer.strip() in (key, fingerprint):
                return True
            print("Please type 'yes', 'no' or the fingerprint: ", end="", file=sys.stderr, flush=True)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def at_terminal() -> bool:
    return bool(sys.stdin and sys.stderr and sys.stdin.isatty() and sys.stderr.isatty())


def notify_systemd(*lines: str) -> None:
    """Tells systemd, where that started this and waits to hear (sd_notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@") or not path or not hasattr(socket, "AF_UNIX"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.sendto("\n".join(lines).encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        log.debug("systemd was not told %s: %s", lines[0], reason(error))


def reloading() -> tuple[str, str]:
    return "RELOADING=1", "MONOTONIC_USEC=%d" % (time.monotonic() * 1e6)


def report_status(endpoint: Endpoint) -> None:
    for line in status_table(endpoint):
        log.info("📊 %s", line)


STATUS_INTERVAL = 5.0  # seconds between two lines that `systemctl status` shows
Notify = Callable[..., Any]
Make = Callable[[EventLoop, Callable[[], None], Callable[[Union[Exception, None]], None]], Endpoint]


def closed_window() -> Callable[[], bool]:
    """Whether the terminal that this was started at has been closed, which is a SIGHUP as well. Who was started with nohup does not mind."""
    hang_up = getattr(signal, "SIGHUP", None)
    terminal = None if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN else next(filter(os.isatty, range(3)), None)
    return lambda: terminal is not None and not os.isatty(terminal)


class EndpointRun:
    """What the process hears while its endpoint runs, and what it tells systemd. A first SIGINT or SIGTERM ends it once what is open then has
    ended, or `drain` seconds have passed; a second one at once."""

    endpoint: Endpoint

    def __init__(self, loop: EventLoop, drain: float, notify: Notify):
        self._loop, self._drain, self._notify = loop, drain, notify
        self.outcome: list[int | Exception | None] = []  # the first of it counts
        self._signals = 0
        self._ready = False
        self._is_closed = closed_window()

    # ---- what the endpoint calls

    def started(self) -> None:
        self._ready = True
        self._notify("READY=1", self._status())

    def finished(self, error: int | Exception | None) -> None:
        self.outcome.append(error)
        self._loop.stop()

    # ---- signals

    def listen(self) -> None:
        for name, handler in (("SIGINT", self._on_end), ("SIGTERM", self._on_end), ("SIGHUP", self._on_hang_up),
                              ("SIGUSR1", lambda *_: self._loop.call_soon_threadsafe(lambda: report_status(self.endpoint)))):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), handler)
        signal.set_wakeup_fd(self._loop.fileno(), warn_on_full_buffer=False)

    def _on_end(self, number: int, _frame: Any) -> None:
        self._signals += 1
        if not self.outcome:
            self.outcome.append(130 if number == signal.SIGINT else 0)
            return self._loop.call_soon_threadsafe(self._end)
        # It is ending: at once, with resets; and where the loop is stuck, without.
        if self._signals > 1:
            self.outcome[0] = 128 + number
        impatient = threading.Timer(1, os._exit, (128 + number,))
        impatient.daemon = True
        with contextlib.suppress(RuntimeError):  # as the interpreter shuts down there are no more threads
            impatient.start()
        return self._loop.call_soon_threadsafe(self._loop.stop)

    def _end(self) -> None:
        self._notify("STOPPING=1")
        self.endpoint.drain(self._drain, self._loop.stop)

    def _on_hang_up(self, number: int, frame: Any) -> None:
        if self._is_closed():
            return self._on_end(number, frame)
        return self._loop.call_soon_threadsafe(self._reload)

    def _reload(self) -> None:
        if self._ready:  # otherwise it has not said so before, and does not now
            self._notify(*reloading())
        self.endpoint.reload()
        if self._ready:
            self._notify("READY=1")

    # ---- systemd

    def _status(self) -> str:
        return "STATUS=" + next(self.endpoint.describe())

    def tell(self) -> None:
        """What `systemctl status` shows, from time to time."""
        self._notify(self._status())
        self._loop.call_later(STATUS_INTERVAL, self.tell)


def run_endpoint(make: Make, drain: float, notify: Notify = notify_systemd, metrics_at: Address | None = None, share: bool = False) -> int:
    """Runs what make(loop, started, finished) gives until it has finished, or a signal ends it: the exit code. It is a process by itself then,
    with its limit of descriptors and its garbage collector."""
    import gc

    raise_descriptor_limit()
    loop = EventLoop()
    run = EndpointRun(loop, drain, notify)
    endpoint = run.endpoint = make(loop, run.started, run.finished)
    status_line = next((handler for handler in log.handlers if isinstance(handler, StatusLine)), None)
    if metrics_at:
        serve_metrics(endpoint, metrics_at, share)
    run.listen()
    endpoint.start()
    loop.call_later(STATUS_INTERVAL, run.tell)
    if status_line and isinstance(endpoint, Client):
        status_line.run(endpoint)
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look at it
    loop.run()
    endpoint.close()
    endpoint.workers.join(0.5)
    if status_line:
        status_line.show("")
    signal.set_wakeup_fd(-1)
    loop.close()
    result = run.outcome[0]
    return getattr(result, "exit_code", 1) if isinstance(result, Exception) else result or 0


# The parent of workers waits for these, so that none is missed between two of its acts.
HEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGCHLD") if hasattr(signal, name))


def run_workers(sockets: list[list[socket.socket]], run: Callable[[int, Notify], int]) -> int:
    """run(number, notify) in a process for each group of listening sockets, or here where it is one: the exit code. What ends one ends all.

    systemd hears the parent alone: that they are ready (again) once all of them have said so to it.
    """
    if len(sockets) == 1:
        return run(0, notify_systemd)
    is_closed = closed_window()
    for number in HEARD:  # what is ignored could not be waited for everywhere
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    parent_lives, parent_dies = os.pipe()
    readiness, ready = os.pipe()
    children: set[int] = set()
    for number, own in enumerate(sockets):
        pid = os.fork()
        if pid == 0:
            os.close(parent_dies)
            close_all(sock for others in sockets for sock in others if sock not in own)
            os._exit(_be_worker(functools.partial(run, number), parent_lives, ready))
        children.add(pid)
    # A socket that somebody holds open is served by nobody once its own process is gone: connections to it would hang. Not close(),
    # with which the file of a Unix socket would go.
    for sock in {sock for group in sockets for sock in group}:
        os.close(sock.detach())

    def hear() -> None:
        while all(os.read(readiness, 1) for _ in sockets):
            notify_systemd("READY=1", "STATUS=%d workers" % len(sockets))
    threading.Thread(target=hear, daemon=True).start()
    return _supervise(children, is_closed)


def _be_worker(run: Callable[[Notify], int], parent_lives: int, ready: int) -> int:
    """In the new process: its exit code."""
    def tell_parent(*lines: str) -> None:
        if lines[0] == "READY=1":
            os.write(ready, b".")
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on: a second one means "at once"
    for name in ("SIGHUP", "SIGUSR1"):  # as long as nobody minds them they end nobody
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    threading.Thread(target=_die_with_parent, args=(parent_lives,), daemon=True).start()
    code = 0  # ended before it began
    with contextlib.suppress(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        code = _guarded(lambda: run(tell_parent))
    return code


def _supervise(children: set[int], is_closed: Callable[[], bool]) -> int:
    """Passes on what the parent hears until all of them have ended: the exit code."""
    codes: list[int] = []
    ending = False
    while children:
        number = signal.sigwait(HEARD)
        if number == signal.SIGCHLD:
            codes += _reap(children)
            if ending or not codes:
                continue
        if number == signal.SIGCHLD or number == signal.SIGHUP and is_closed():
            number = signal.SIGTERM
        if number == signal.SIGHUP:
            notify_systemd(*reloading())
        elif number != signal.SIGUSR1 and not ending:
            ending = True
            notify_systemd("STOPPING=1")
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    return next((code for code in codes if code), 0)


def _reap(children: set[int]) -> Iterator[int]:
    """The exit code of each that has ended; one SIGCHLD may stand for several."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        children.discard(pid)
        yield os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


def close_all(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _die_with_parent(parent_lives: int) -> None:
    os.read(parent_lives, 1)  # the parent never writes: this is its end
    os.kill(os.getpid(), signal.SIGTERM)


def raise_descriptor_limit() -> None:
    """As many descriptors as this user may have: each tunnel connection needs two."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve_command(options: Options) -> int:
    bind = parse_endpoint(options.bind, "address to bind", lowest=0)
    policy = Policy(options.remote_regex)
    proxies = parse_networks(options.proxy_protocol)
    folder = KeyFolder(options.key_path)
    if options.allow_listen and options.workers > 1:
        raise ConfigError("--allow-listen and --workers do not go together: a reverse tunnel is one process's")
    check_workers(options.workers)
    metrics_at = check_metrics(options)
    ensure_keys(folder)
    sockets = listen_for(options.workers, bind, share=options.reuse_port)
    return run_workers(sockets, lambda number, notify: run_endpoint(
        lambda loop, started, _finished: Server(
            loop, folder, bind, policy, options.limits, legacy=options.legacy, allow_listen=options.allow_listen, proxies=proxies,
            sockets=sockets[number], started=started, report=log.debug if number else log.info),
        10.0 if options.drain is None else options.drain, notify, metrics_at(number), options.reuse_port))


def check_metrics(options: Options) -> Callable[[int], Address | None]:
    """Where each worker answers scrapes: on ports one after the other, or for port 0 on any that is free."""
    if not options.metrics:
        return lambda _number: None
    address = parse_endpoint(options.metrics, "address for metrics", lowest=0)
    if address.port + options.workers - 1 > 65535:
        raise ConfigError("--metrics: there are no ports from %d on for %d workers" % (address.port, options.workers))
    return lambda number: address._replace(port=address.port and address.port + number)


def connect_command(options: Options) -> int:
    servers = parse_servers(options.server)
    options = forget_useless(options, servers)
    proxy = parse_proxy(options.proxy, servers)
    tunnels = check_tunnels(options.tunnels, legacy=options.legacy, workers=options.workers, socks_user=options.socks_user)
    metrics_at = check_metrics(options)
    ssh = check_ssh(servers, options.ssh_command, {
        "-k": options.key_path, "-a": options.accept_all_hosts, "--accept-new": options.accept_new, "--legacy": options.legacy,
        "--proxy": options.proxy, "--workers": options.workers > 1}, tunnels)
    folder = NoKeys() if ssh else KeyFolder(options.key_path)
    quiet = options.check or any(spec.kind == STDIO for spec in tunnels)
    ensure_keys(folder, may_ask=not quiet)
    if options.check:
        return check_command(options, folder, servers, tunnels, proxy=proxy, ssh=ssh)
    may_ask = at_terminal() and not quiet and options.workers == 1
    sockets: list[list[list[socket.socket]]] = []
    with contextlib.ExitStack() as stack:  # however it ends: the file of a Unix socket goes with it
        for spec in tunnels:
            sockets.append(listen_for_tunnel(options.workers, spec))
            stack.callback(close_all, [sock for group in sockets[-1] for sock in group])
        groups = [[ours[number] for ours in sockets] for number in range(options.workers)]
        return run_workers([sum(group, []) for group in groups], lambda number, notify: run_endpoint(
            lambda loop, started, finished: make_client(
                options, loop, folder, servers, tunnels, proxy=proxy, ssh=ssh, may_ask=may_ask, sockets=groups[number],
                report=log.debug if number else log.info, ask_host=lambda error: may_ask and ask_host(error), started=started, finished=finished),
            options.drain or 0.0, notify, metrics_at(number)))


def forget_useless(options: Options, servers: list[Place]) -> Options:
    """Without those of one's usual options in the environment that mean nothing for these servers. On a command line they are a mistake."""
    useless = ("key_path", "accept_all_hosts", "accept_new") if isinstance(servers[0], SshHost) else ("ssh_command",)
    return options._replace(**{field: Options._field_defaults[field] for field in useless
                               if "--" + field.replace("_", "-") in options.environment})


def make_client(options: Options, loop: EventLoop, folder: KeyFolder, servers: list[Place], tunnels: list[TunnelSpec], **more: Any) -> Client:
    return Client(loop, folder, servers, tunnels, options.limits, legacy=options.legacy, accept_all_hosts=options.accept_all_hosts,
                  accept_new=options.accept_new, should_encrypt=options.encrypt, socks_user=options.socks_user,
                  retries=options.max_retry_count, **more)


def check_command(options: Options, folder: KeyFolder, servers: list[Place], tunnels: list[TunnelSpec], **way: Any) -> int:
    """connect --check: the test connection alone. Whatever started this and waits for systemd to hear is not told."""
    made: list[Client] = []

    def make(loop: EventLoop, _started: Any, finished: Callable[[Exception | None], None]) -> Client:
        made.append(make_client(options, loop, folder, servers, tunnels, sockets=[[] for _ in tunnels], report=log.debug, only_test=True,
                                finished=finished, **way))
        return made[0]
    code = run_endpoint(make, 0.0, notify=lambda *_lines: None)
    if not code:
        said = "The server `%s` lets this client in." % str(made[0].server)
        as_json = options.log_format == "json"
        print(JsonFormatter(False).format(log.makeRecord(log.name, logging.INFO, "", 0, said, (), None)) if as_json else said)
    return code


def check_tunnels(texts: Iterable[str], *, legacy: bool, workers: int = 1, socks_user: str | None = None) -> list[TunnelSpec]:
    """The tunnels of a command line; ConfigError also for what does not go together."""
    tunnels = [spec for text in texts for spec in parse_tunnels(text)]
    kinds = [spec.kind for spec in tunnels]
    if socks_user is not None and not re.fullmatch("[^:]+:.+", socks_user, re.DOTALL):
        raise ConfigError("--socks-user takes name:password")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in (socks_user or "").split(":", 1)):
        raise ConfigError("--socks-user: SOCKS5 has room for 255 bytes of name and of password")
    if legacy and REVERSE in kinds:
        raise ConfigError("the original's protocol (--legacy) has no reverse tunnels (R:)")
    if kinds.count(STDIO) > 1:
        raise ConfigError("standard input and output can be one tunnel's only (stdio:)")
    if STDIO in kinds and not hasattr(os, "get_blocking"):
        raise ConfigError("stdio: needs a POSIX system")
    if STDIO in kinds and not (sys.stdin and sys.stdout):
        raise ConfigError("stdio: needs standard input and output, and whoever started this has closed one of them")
    if workers > 1 and {STDIO, REVERSE} & set(kinds):
        raise ConfigError("--workers does not go together with stdio: and R: tunnels, which are one process's")
    check_workers(workers)
    return tunnels


def check_ssh(servers: list[Place], command: str | None, given: dict[str, Any], tunnels: list[TunnelSpec]) -> list[str]:
    """The words of the ssh command where the servers are ssh://, else none; ConfigError for what does not go together. `given`: what ssh has
    other means for, by the name it was given under."""
    if not isinstance(servers[0], SshHost):
        if command is not None:
            raise ConfigError("--ssh-command is for servers that are written ssh://host")
        return []
    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise ConfigError("%s does not go together with ssh://, where ssh brings the keys and the way: see ~/.ssh/config" % ", ".join(wrong))
    if any(spec.kind == REVERSE for spec in tunnels):
        raise ConfigError("ssh:// has no reverse tunnels (R:); `ssh -R` makes them")
    import shlex

    try:
        words = shlex.split("ssh" if command is None else command)
        if not words:
            raise ValueError("there is no command in it")
        return words
    except ValueError as error:
        raise ConfigError("cannot understand the --ssh-command `%s`: %s" % (printable(str(command)), error)) from None


def check_workers(workers: int) -> None:
    if workers > 1024:
        raise ConfigError("--workers takes at most 1024, not %d; as many as there are processors serve best" % workers)
    if workers > 1 and not hasattr(os, "fork"):
        raise ConfigError("--workers needs a system that can fork processes, and this one cannot; leave it out")


def keygen_command(options: Options) -> int:
    folder = KeyFolder(options.key_path)
    if folder.exists():
        raise ConfigError("there is a key in `%s` already, and it stays: whoever knows it would no longer let you in."
                          " Its public half: %s" % (folder.path, encode_key(folder.load().public)))
    print(encode_key(generate_keys(folder).public))
    return 0


def help_command(options: Options) -> int:
    print(help_text(options.topic), end="")
    return 0


def version_command(_options: Options) -> int:
    print("ratrod %s" % __version__)
    return 0


# ---------------------------------------------------------------------------------------------------- demo

DEMO_BYTES = 256 << 20
_DEMO_BLOCK = 1 << 20


def demo_payload() -> Iterator[bytes]:
    """DEMO_BYTES of reproducible bytes in blocks that all differ."""
    import hashlib

    block = hashlib.sha512(b"ratrod demo").digest() * (_DEMO_BLOCK // 64)
    for number in range(DEMO_BYTES // _DEMO_BLOCK):
        yield number.to_bytes(8, "big") + block[8:]


@contextlib.contextmanager
def demo_targets() -> Iterator[tuple[int, int]]:
    """A small HTTP server that serves the payload, and a UDP echo; gives the ports of both."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(DEMO_BYTES))
            self.end_headers()
            for block in demo_payload():
                self.wfile.write(block)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("127.0.0.1", 0))

    def echo_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, origin = echo.recvfrom(65536)
                if not data:
                    return
                echo.sendto(data, origin)

    for run in (web.serve_forever, echo_all):
        threading.Thread(target=run, daemon=True).start()
    try:
        yield web.server_address[1], echo.getsockname()[1]
    finally:
        web.shutdown()
        web.server_close()
        echo.sendto(b"", echo.getsockname())
        echo.close()


def demo_download(port: int) -> float:
    """Fetches the payload through the tunnel, shows progress, checks every byte: seconds it took."""
    import hashlib
    import http.client

    expected = hashlib.sha256()
    for block in demo_payload():
        expected.update(block)
    received, done, started = hashlib.sha256(), 0, time.monotonic()
    response = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    response.request("GET", "/")
    body = response.getresponse()
    shown = -1
    while True:
        block = body.read(_DEMO_BLOCK)
        if not block:
            break
        received.update(block)
        done += len(block)
        percent = done * 100 // DEMO_BYTES
        if sys.stdout.isatty() and percent != shown or percent // 25 != shown // 25:
            print("\r" * sys.stdout.isatty() + "  %3d%%  %d of %d MB" % (percent, done >> 20, DEMO_BYTES >> 20),
                  end="" if sys.stdout.isatty() else "\n", flush=True)
            shown = percent
    seconds = time.monotonic() - started
    if sys.stdout.isatty():
        print()
    response.close()
    if received.digest() != expected.digest():
        raise RatrodError("the bytes that came are not those that were sent; please report this")
    return seconds


def demo_udp(port: int) -> None:
    """A datagram there and back through the tunnel."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.sendto(b"ratrod", ("127.0.0.1", port))
        if sock.recv(100) != b"ratrod":
            raise RatrodError("the datagram that came back is not the one that was sent; please report this")


def demo_command(options: Options) -> int:
    """A target, a server and a client in this process, with keys that are thrown away."""
    import tempfile

    def interrupt(_number: int, _frame: Any) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, interrupt)  # so that the folder goes too
    with tempfile.TemporaryDirectory(prefix="ratrod-demo-") as path, demo_targets() as (web_port, echo_port):
        folders = [KeyFolder(os.path.join(path, name)) for name in ("server", "client")]
        server_key, client_key = (encode_key(folder.generate().public) for folder in folders)
        for folder, name, key in ((folders[0], "authorized_keys", client_key), (folders[1], "known_hosts", server_key)):
            with open(os.path.join(folder.path, name), "w") as file:
                file.write(key + "\n")
        try:
            with serve(key_path=folders[0].path) as server, tunnel(str(Address(*server.address)), *(
                    "0:127.0.0.1:%d" % port for port in (web_port, echo_port)), key_path=folders[1].path) as made:
                print("A tunnel from %s through %s to a web server on port %d, encrypted:"
                      % (Address(*made.address), Address(*server.address), web_port))
                seconds = demo_download(made.address[1])
                demo_udp(made.addresses[1][1])
        except OSError as failure:
            raise RatrodError("the demo failed: %s" % reason(failure)) from None
    print("Every byte arrived: %d MB in %.1f s, %.2f GB/s, and a UDP datagram there and back.\n"
          % (DEMO_BYTES >> 20, seconds, DEMO_BYTES / seconds / 1e9))
    print("For real, on the machine that reaches your database:\n\n    ratrod serve 0.0.0.0:19000\n\n"
          "and at home, once each side has the other's public key (`ratrod keygen`, then authorized_keys there, known_hosts here):\n\n"
          "    ratrod connect server:19000 2000:db:5432\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The program: its exit code (0 done, 1 failed, 2 usage or configuration, 3 authentication, 130 interrupted)."""
    words = sys.argv[1:] if argv is None else argv
    return _guarded(lambda: _run_command(words), words)


def _run_command(argv: list[str]) -> int:
    options = parse_command_line(list(expand_arguments(argv)), os.environ)
    # With stdio: this runs inside something else, as ssh, whose user wants to hear of failures alone.
    quiet = options.check or any(tunnel.startswith("stdio:") for tunnel in options.tunnels)
    set_up_logging(logging.DEBUG if options.verbose else logging.WARNING if quiet else logging.INFO, options.log_format == "json",
                   status=shows_status(options) and not quiet)
    commands: dict[str, Callable[[Options], int]] = {
        "serve": serve_command, "connect": connect_command, "keygen": keygen_command, "demo": demo_command,
        "help": help_command, "version": version_command}
    try:
        code = commands[options.command](options)
    except ConfigError as error:
        raise name_variables(error, options.environment) from None
    if sys.stdout:
        sys.stdout.flush()  # here, where a failure is still ours to report
    return code


def shows_status(options: Options) -> bool:
    """Whether a status line has a place: the log of one process on a terminal that moves its cursor, and somebody who looks at it."""
    plain = options.verbose or options.no_status or options.log_format != "text" or options.workers > 1
    return (options.command == "connect" and bool(options.tunnels) and not plain and os.environ.get("TERM", "dumb") not in ("", "dumb")
            and hasattr(os, "tcgetpgrp") and bool(sys.stderr) and sys.stderr.isatty())


def _guarded(run: Callable[[], int], argv: Sequence[str] = ()) -> int:
    """run(), and what each kind of failure is to its user: a line and an exit code, never a traceback."""
    try:
        return run()
    except UsageError as error:
        with contextlib.suppress(OSError):
            if sys.stderr:
                print("ratrod: %s\n\n%s" % (error, usage_hint(argv)), file=sys.stderr)
        return error.exit_code
    except RatrodError as error:
        log.error("❌ %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # no descriptors left, a full disk; a reader that went away, as in `ratrod help | head`, needs no word
        if not isinstance(error, BrokenPipeError):
            log.error("❌ %s", reason(error))
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # a bug; a traceback would tell a user less
        log.error("❌ internal error, please report it: %r", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
