#!/usr/bin/env python3
from __future__ import annotations  # evaluating annotations would cost 10 ms at the start and 4 µs a connection

# An assignment and no docstring: `python -OO` strips docstrings, and the command line is read by this text.
__doc__ = """Key-authenticated, encrypted TCP and UDP tunnels in one file: ssh -L where there is no SSH.

Usage:
  ratrod [-k KEY_PATH] [-v] serve [-r REGEX] [--allow-listen] [--legacy]
         [--drain SECS] [--reuse-port] [--proxy-protocol SOURCES] [--workers N]
         [--log-format FORMAT] [--metrics ADDRESS]
         [--max-links N] [--max-links-per-key N] [--max-streams N]
         [--max-streams-per-key N] [--max-handshakes N]
         [--max-handshakes-per-source N] [--handshake-rate N]
         [--max-connects-per-key N] [--max-listeners-per-key N]
         [--handshake-timeout SECS] [--connect-timeout SECS] [--link-age SECS]
         [--resume SECS] [--udp-timeout SECS] [--max-udp-sessions N]
         [--max-udp-sessions-per-link N] [--udp-backlog BYTES]
         [--max-memory BYTES] [--] BIND
  ratrod [-k KEY_PATH] [-v] connect [-a] [--accept-new] [-e] [--legacy]
         [--proxy URL] [--ssh-command CMD] [--remote-python PATH]
         [--socks-user AUTH] [--send-proxy]
         [--max-retry-count N] [--max-retry-interval SECS]
         [--drain SECS] [--workers N] [--log-format FORMAT] [--metrics ADDRESS]
         [--no-status] [--check] [--idle-links N]
         [--handshake-timeout SECS] [--connect-timeout SECS] [--link-age SECS]
         [--resume SECS] [--udp-timeout SECS] [--max-udp-sessions-per-link N]
         [--udp-backlog BYTES] [--max-memory BYTES] [--] SERVER [--] [TUNNEL]...
  ratrod [-k KEY_PATH] [-v] keygen
  ratrod [-v] demo
  ratrod help [COMMAND]
  ratrod -h | --help
  ratrod -V | --version

Commands:
  serve    start a server here: it takes clients' connections and forwards them to the remotes that the clients name
  connect  connect to a server and forward local ports through it to remotes; without TUNNEL only test the connection
  keygen   write the security files without asking, and print the public key
  demo     show everything on this machine in a few seconds, with keys that are thrown away
  help     explain a command

Arguments:
  BIND     the address to listen on, `host:port`, as 127.0.0.1:19000, or *:19000 for every address of both families
  SERVER   the server's address, `host:port`; several, `a:1,b:2`, are tried in turn;
           or ssh://[user@]host[:port]: a machine with sshd and Python, where ratrod need not be installed
  TUNNEL   [local_host:[local_port:[remote_host:]]]remote_port, for TCP and UDP alike: 2000:db:5432, 2000:80, 80;
           IPv6 addresses in brackets: [::1]:2000:[2001:db8::7]:80; local port 0 takes a free one, local host *
           every address; ranges: 8000-8010:host:9000-9010; tcp: or udp: in front for one of the two alone
           [host:]port:socks          a SOCKS5 proxy here, for TCP and UDP; the server looks up the names
           stdio:host:port            standard input and output, as in ssh -o ProxyCommand='... stdio:%h:%p'
           unix:/path                 a Unix socket, in place of the local [host:]port or of the remote host:port
           R:[host:]port:host:port    reverse: the server listens (serve --allow-listen), this side connects

Options:
  -k, --key-path KEY_PATH         the folder of `key`, `key.pub`, `authorized_keys` and `known_hosts`,
                                  or the key file itself (default: ~/.ratrod)
  -v, --verbose                   say more: every connection with its addresses, bytes and time
  -r, --remote-regex REGEX        allow only remotes whose whole `host` or `host:port` matches (default: .*), with IPv6
                                  in brackets; may be repeated; one that begins with unix: is for Unix sockets alone
  -a, --accept-all-hosts          accept any server's key: no protection from a server that only pretends
  --accept-new                    add an unknown server's key to `known_hosts`; never accept a changed one
  --allow-listen                  let clients listen on addresses of this machine (R: tunnels)
  --socks-user AUTH               name:password that clients of socks tunnels must give
  --proxy URL                     reach the server through a proxy: http://[user:password@]host[:port] (CONNECT)
                                  or socks5://..., each with port 1080 unless one is named
  --ssh-command CMD               for ssh:// servers: the command to run as ssh, as 'ssh -F config' (default: ssh)
  --remote-python PATH            for ssh:// servers: the Python to run there (default: python3)
  --send-proxy                    R: tunnels tell their targets each visitor's address, in a PROXY header (version 2)
  -e, --encrypt                   with --legacy: encrypt the traffic; without --legacy it always is encrypted
  --legacy                        connect: speak the wire of the original, Rust ratrod 0.6.3; serve: speak both wires
  --max-retry-count N             give up after so many failed retries (default: the first try must succeed, then never)
  --max-retry-interval SECS       the longest pause between two tries to reach a server that went away (default: 30)
  --drain SECS                    at the end, let open connections go on for so long (default: serve 8, connect 0)
  --reuse-port                    share the port: a new server takes over while the old one drains
  --proxy-protocol SOURCES        load balancers that send a PROXY header, as 10.0.0.7,10.1.0.0/16
  --workers N                     share the work among so many processes, each with these limits (default: 1)
  --log-format FORMAT             text, or json: one object a line (default: text)
  --metrics ADDRESS               answer Prometheus on `host:port`, as 127.0.0.1:9100: GET /metrics
  --no-status                     no status line at a terminal
  --check                         only test the connection, for health probes: exit 0 if it is good
  --max-links N                   connections of clients in all (default: as many as the descriptor limit allows)
  --max-links-per-key N           connections of one client's key (default: half of those in all)
  --max-streams N                 TCP streams in all (default: as many as there may be links)
  --max-streams-per-key N         TCP streams of one client's key (default: half of those in all)
  --max-handshakes N              unauthenticated connections; the oldest makes room (default: 4096,
                                  or an eighth of the descriptor limit)
  --max-handshakes-per-source N   unauthenticated connections from one address, or one IPv6 /64; the oldest makes
                                  room (default: a quarter of --max-handshakes)
  --handshake-rate N              sources under so many new handshakes a second go before others (default: 20)
  --max-connects-per-key N        remotes that one client connects to at once; others wait (default: 32)
  --max-listeners-per-key N       addresses that one client's R: tunnels listen on (default: 64)
  --idle-links N                  links that are kept for the next connections (default: 8)
  --handshake-timeout SECS        time for a connection to authenticate itself (default: 10)
  --connect-timeout SECS          time to look up and connect to a remote or a server (default: 10)
  --link-age SECS                 a link older than this takes no new stream (default: 3600)
  --resume SECS                   how long a connection waits for another link when its link was lost (default: 600);
                                  0: it is reset at once
  --udp-timeout SECS              forget a UDP session that has been idle for so long (default: 120)
  --max-udp-sessions N            UDP sessions in all (default: 16384)
  --max-udp-sessions-per-link N   UDP sessions of one link; the least recently used makes room (default: 4096)
  --udp-backlog BYTES             datagrams that may wait for a link; the oldest are dropped (default: 262144)
  --max-memory BYTES              kept of connections until it is acknowledged, received or taken, in all; half of it
                                  for one key (default: serve 268435456, connect 134217728)
  -h, --help                      show this help, or after a command the help of that command
  -V, --version                   show the version
"""

# ---- Contents: the sections, each under a banner; search for "# 8." to be at links
#
#  1 limits and errors                    7 event loop, threads, sockets      13 server and client: the wiring
#  2 messages of both wires               8 links: a cipher, one user         14 reports: one snapshot, the texts of it
#  3 keys and lists of keys               9 streams and their ends            15 as a library
#  4 addresses, grants, what is allowed  10 UDP sessions and ports            16 command line, workers, signals, demo
#  5 ciphers and framing                 11 ssh:// servers
#  6 handshakes: bytes in, bytes out     12 who opens, accepts and dials
#
# Sections 2 to 6 touch no socket, thread, selector or log, and use only what stands above them. Tests guard that.
#
# ---- The life of a connection
#
# `connect` listens on a local port. `Listener` accepts a connection, `Client._on_accept` makes a `Stream` of it, and
# `Opener.take` looks for an idle link. Where there is none, `Pool.want_links` has `Reach.dial` make one: a `Dial`
# connects (`Connector`), a `Negotiation` carries the bytes of a `NoiseClientHandshake`, threads do its public-key
# steps, and `Dial._make_link` has the `Link`. `OpenerStream.open` sends Open, with the first bytes behind it.
#
# At the server, `Admission.accept` starts a `Negotiation` for each stranger; `Server.admit` looks the key up, on a
# thread; `Server._welcome` makes the `Link`. An Open comes to `Server.on_open`, and `Acceptor.open` gives it a
# `Stream`. `Server._connect` asks the rules (`Rules.find`) and connects to the remote (`Connector`), and
# `AcceptorStream.accept` answers Opened.
#
# From then on both sides do the same. `Stream._read` reads what the local socket has. `Outgoing` keeps it until the
# other side has acknowledged it, `RecordWriter` makes a sealed record of it, and `Channel.send` sends that. At the
# other side `Channel._read` receives it, `Channel._process` opens its record (`RecordReader`), and `Stream.on_data`
# writes it to its local socket; `Stream.on_read` acknowledges. After an End from each side comes Over, and the link is
# idle again (`Link.become_idle`, `Opener.put`).
#
# Where the path of a link breaks (`Link.lose`), `Stream.on_close` lets go of it and the stream waits, detached, at its
# keeper: an `Opener`, which opens it again on the next link with the number of bytes it has, or an `Acceptor`
# (`Acceptor._attach`). Over ssh's pipes and on the original's wire it is reset. A stream ends in `Stream._finish`.
#
# A datagram goes by `TunnelPort`, `UdpSession` and `UdpLink` to the server's `RemotePort`. All sessions of a client
# share one link; on the original's wire each has its own.
#
# ---- Where to look
#
# a half-close is forwarded              `Stream._send_end`, `Stream._on_end`
# a slow reader costs no more memory     `Stream.on_data` has its link hold, so that TCP slows the sender down;
#                                        `Outgoing.room` bounds what is kept
# thousands of them do not either        `Memory`, the sum; `Channel._read` and `Unread.may_read_on` keep to it
# one key holds up no other              `Turns`, `FairQueue`; what it keeps `Memory` bounds, and what it has `Quota`
# a removed key is cut off               `Server._look`, once a second, `Server._check_rules`, `Server._end_key`
# a dead path is noticed and left        `Endpoint.doubt_paths`, `Link.doubt`, `Endpoint.leave_dead_paths`, `Pool.seek`
# a UDP session expires                  `UdpSessions.sweep`
# signals, and what they drain           `EndpointRun._on_end`, `Endpoint.drain`, `end_waiting`, `is_busy`
# exit codes                             `exit_code_of`, `EndpointRun._on_end`, and the error types of section 1
#
# ---- What always holds
#
# (1) Only the loop's thread touches the sockets of links, streams and sessions. Threads do what blocks or takes long:
#     look-ups, public-key steps, `authorize()`, reading lists of keys, starting ssh, writing the log (`LogWriter`).
# (2) What a state of a link allows is a table, `LEGAL`. A record that is not in it ends the link, but for what comes
#     after the last word (Bye).
# (3) A link carries one user. When the link is lost, its user hears of that once; a stream is then over or detached.
# (4) While a user holds, nothing of its link is read; while a link has a backlog, its stream's socket is not read.
# (5) The loop's shared buffers are valid during one callback, but for those that it lends (`EventLoop.lend_scratch`).
# (6) What counts in a quota is given back where its link or stream ends, whatever ended it.
# (7) Only `Reach` dials.
# (8) Nothing on the loop's thread waits for a peer, a remote, a name, a list of keys or a reader of the log.

import os
import sys

if __name__ == "__main__" and sys.argv[1:] in (["-h"], ["--help"]) and sys.stdout:
    try:
        sys.stdout.write(__doc__)  # 40 ms before main() could
        sys.stdout.flush()
        os._exit(0)  # everything is written; taking the syntax tree of this file apart would cost 10 ms
    except OSError:  # a full disk, a reader that is gone: main() reports it
        pass

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import atexit
import base64
import collections
import contextlib
import errno
import functools
import gc
import heapq
import itertools
import logging
import posixpath
import queue
import re
import select
import selectors
import socket
import stat
import struct
import threading
import time
import traceback
import types
from typing import TYPE_CHECKING, Any, Callable, Dict, Generator, NamedTuple, Tuple, TypeVar, Union

if TYPE_CHECKING:
    import subprocess
    from typing import Iterable, Iterator, Mapping, NoReturn, Sequence

__version__ = "0.8.0"
__all__ = ["AuthenticationError", "ConfigError", "ConnectError", "Limits", "LocalProtocolError", "PeerError",
           "PolicyError", "ProtocolError", "RatrodError", "RemoteProtocolError", "Service", "Tunnel", "UnknownHost",
           "UsageError", "main", "serve", "tunnel"]

# ======================================================================================================================
# 1. Limits and errors
# ======================================================================================================================


class Limits(NamedTuple):
    """Every limit and time of an endpoint, so that a test can scale them. Times in seconds, sizes in bytes."""

    handshake_timeout: float = 10.0  # from accept to the peer's authentication; the peer has the same limit
    connect_timeout: float = 10.0  # look-up and connect of a remote or a server
    handshakes: int = 0  # unauthenticated connections in all; 0: 4,096, or an eighth of the descriptors
    handshakes_per_source: int = 0  # unauthenticated connections of one source; 0: a quarter of those in all
    handshake_rate: float = 20.0  # sources with fewer new handshakes a second are served before the others
    links: int = 0  # authenticated links in all; 0: half of the descriptors that 64, strangers and UDP sessions leave
    links_per_key: int = 0  # links of one client's key; 0: half of those in all
    streams: int = 0  # TCP streams in all; 0: as many as links
    streams_per_key: int = 0  # streams of one client's key; 0: half of those in all
    lookup_threads: int = 16  # a name server that hangs holds up these threads, never a handshake
    connects_per_key: int = 32  # remotes of one client that are connected to at once
    listeners_per_key: int = 64  # reverse tunnels of one client
    waiting_links: int = 8  # links of a reverse tunnel that wait for a connection
    reverse_queue: int = 1024  # connections of a reverse tunnel that wait for a link
    ssh_links: int = 16  # over ssh:// each link is a process at either end; further connections wait for a link
    ssh_patience: float = 60.0  # how long a connection waits for a link over ssh://
    links_at_once: int = 16  # links that a client makes at once, so that a burst does not look like an attack
    idle_links: int = 8  # links that a client keeps, or as many as it lately needed at once
    idle_time: float = 60.0  # after which surplus links are closed
    link_age: float = 3600.0  # forward secrecy is per link: an older link takes no new stream
    keepalive: float = 20.0  # a side that has sent nothing for so long sends Keepalive
    silence: float = 45.0  # a side that reads and hears nothing for so long gives the link up
    doubt: float = 25.0  # a busy link that was not heard from for so long is doubted: its path may be dead
    trusted: float = 30.0  # a link that was not heard from for so long is not handed out
    resume: float = 600.0  # how long a stream waits for another link
    resume_after_close: float = 60.0  # how long a stream waits where the peer's system ended the link
    memory: int = 0  # bytes kept for streams and of half records; 0: 256 MiB at a server, 128 MiB at a client
    retry_interval: float = 30.0  # the longest pause between two tries to reach a server
    drain_timeout: float = 5.0  # after our Error: how long we discard what the peer still sends
    udp_timeout: float = 120.0  # a UDP session without a datagram either way; the server waits a quarter longer
    udp_sessions: int = 4096  # UDP sessions of one link; at the limit the least recently used session makes room
    udp_sessions_in_all: int = 16384  # UDP sessions of a server; the key that has most makes room
    udp_backlog: int = 256 * 1024  # bytes of datagrams that wait for a link; the oldest are dropped: UDP must not lag
    udp_lag: float = 0.2  # how long a datagram may wait for an open link
    accept_pause: float = 1.0  # after EMFILE: accepting again at once would spin
    sweep_interval: float = 1.0  # how often ages are looked at


DEFAULT_LIMITS = Limits()
MAX_CONTENT = 512 * 1024  # bytes in a Data or Datagrams record
MAX_SMALL_CONTENT = 1024  # bytes in any other record
NEVER = float("inf")  # a time that does not come
EARLY_DATA = 64 * 1024  # bytes of Data that an opener sends before Opened
WINDOW, LARGEST_WINDOW = 1 << 20, 16 << 20  # bytes that a side sends before they are acknowledged: at first, at most
GROWS_AFTER, GROWS_WITHIN = 0.01, 1.0  # a window grows if its Ack takes so many seconds: 1 MiB in 10 ms is 1 Gbit/s
POOR_WINDOW = 64 * 1024  # the window of a stream where memory is short
ACK_AFTER = 32 * 1024  # bytes taken that are acknowledged after a read; fewer are acknowledged a second later
MAX_NOISE_MESSAGE = 1024
LEGACY_MAX_FRAME = 128 * 1024 - 256  # the original's BUFFER_SIZE, tag included
MAX_HANDSHAKE_FRAME = 16 * 1024  # legacy: the longest honest handshake message is an Error that quotes a regex
MAX_DATAGRAM = 65507
TRICKLE = 1024  # bytes inside a record that count as heard
DATAGRAMS_AT_ONCE = 64 * 1024  # bytes of datagrams in one record
UNSENT_DATAGRAMS = 64 * 1024  # bytes of datagrams that the kernel may hold back
HEADROOM = 32  # in front of payload in a scratch buffer: frame header (21) and message head (6) are written there
TAILROOM = 64  # behind payload in a scratch buffer: the tag
SCRATCH_IN = MAX_CONTENT + 64 * 1024  # one read of a link: a whole record, and what came with it
BULK_READ = 64 * 1024  # a read of so many bytes means bulk: from then on bytes are read straight into the window
SHORT_TURN, SHORT_READ, HURRY = 64 * 1024, 4096, 0.1  # bytes of a turn after a read of so few, for so many seconds
LENT_AT_ONCE = 128  # scratch buffers that links hold for long records: with 8, 1,000 streams of bulk are a third slower
SPARE_BUFFERS = 8  # scratch buffers that are kept when nobody needs them
LOG_RATE, LOG_BURST = 1, 5  # failure lines of one cause a second, and at once; the rest is counted
LOG_RATE_IN_ALL, LOG_BURST_IN_ALL = 10, 200  # the same for all sources together, and for one client's key
# Seconds in which an editor may write a list of keys anew. On Windows nobody can read meanwhile, or during a backup.
EMPTY_FOR = 1.5 if os.name == "posix" else 10.0
SOURCES = 4096  # sources that a server remembers, 1 KB each
SOURCE_TRUSTED_FOR = 3600.0  # seconds after its last authorized link in which a source goes before others
RECORDS_IN_TURN = 128  # records of one link in a turn, some 10 µs each: 512 KiB may hold 23,000
SESSIONS_IN_TURN = 16  # new UDP sessions of one link in a turn, 100 µs each
DATAGRAMS_IN_TURN = 256  # datagrams of one record in a turn, 20 µs each: a record of 512 KiB may hold 87,000
BACKLOG = 1024  # connections that the system takes for a listener before they are accepted
JUST_NOW = 0.005  # seconds: the path of an idle link that was heard from so lately lives, and the system is not asked
TURNS = 0.005  # seconds of callbacks before the loop looks for new events, and for which their order does not matter
BATCH = 64  # datagrams or accepts that one event may take before others get their turn
STEPS_AT_ONCE = min(8, max(2, os.cpu_count() or 1))  # threads for public-key steps; a file system may hang one
LAST_WORDS = 256  # connections that are sent a last word at once
MOST_ADDRESSES = 64  # of a name: whoever has a zone of his own can give it 4,000
TRIES_AT_ONCE = 8  # of one connect, each with a descriptor: the oldest has had 2 s
STAGGER = 0.25  # seconds between two parallel tries to connect (RFC 8305, section 5)
GRACE = 1.0  # seconds that a reverse tunnel's listener outlives the last link of its client
REMEMBERED = 3600.0  # seconds for which the numbers of ended streams are kept
NUMBERS = 65536  # of all keys; the protocol's 4,096 of a key are full after 20 min of a bad path
DETACHED_OF_KEY = 1024  # streams of one key that wait for another link
DOUBTED_FOR = 2.0  # seconds after which a server takes the path of a doubted link for dead
ABANDONED, ABANDONED_FOR = 4096, 600.0  # streams that an opener has given up and remembers, and for how many seconds
CLOCK = getattr(time, "CLOCK_BOOTTIME", None)  # counts while the machine sleeps, as macOS's monotonic clock does
NO_SUCH_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


# The types of what goes wrong: whose fault it is, and what follows from it.

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
    """A limit of the server is reached: the same may work later."""

class PolicyError(RatrodError):
    """A target that this server does not open. The peer is told `REFUSED` alone; this text is for the own log."""

class LocalFailed(RatrodError):
    """The local socket of a stream broke. This is everyday life, and shown with -v alone."""

class ProtocolError(RatrodError):
    """The wire protocol was broken."""

class LocalProtocolError(ProtocolError):
    """The wire protocol was broken by a wrong call of ours."""

class RemoteProtocolError(ProtocolError):
    """The wire protocol was broken by what the peer sent."""

class LinkClosed(RemoteProtocolError):
    """A link's connection ended without a last word: the stream on it can go on over another link."""

class LinkSpoiled(LinkClosed):
    """What arrives on the connection cannot be believed any more: it was damaged or forged on the way."""

class LinkSilent(LinkClosed):
    """The path or the machine is dead: nothing was heard, or the system says so."""

class Speechless(RemoteProtocolError):
    """A connection that ended before it said anything, as health checks do: shown with -v alone."""

class Departed(RemoteProtocolError):
    """A peer that left in the middle of its handshake: no news where the same machine has links."""

class AuthenticationError(RemoteProtocolError):
    """A key or signature that is not accepted, ours or the peer's."""

    exit_code = 3

class PeerError(RemoteProtocolError):
    """The peer ended a stream or a link with an Error message."""

    def __init__(self, code: int, text: str):
        super().__init__(printable(text) or "the other side gives no reason")
        self.code, self.exit_code = code, 3 if code == INVALID_KEY else 1


INVALID_HOST, INVALID_KEY, REMOTE_FAILED, UNKNOWN = range(4)  # codes of Error
SAME_KEY = "server and client use the same key; give one of them another -k (it is `%s`)"
REFUSED = "not allowed by this server"  # one text for every refusal by policy: it teaches a prober nothing
NOT_LET_IN = "the server closed the connection before it let this client in; it may be overloaded"
ENDING = "ratrod is ending"


def printable(text: str, limit: int = 200) -> str:
    """What may be shown of a peer's text: no control or escape characters, `limit` characters at most."""
    if text.isprintable() and len(text) <= limit:
        return text
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit]) + "..." * (len(text) > limit)


def reason(error: BaseException) -> str:
    """An exception as a user reads it: `Connection refused`, not `[Errno 111] Connection refused`."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def system_error(code: int) -> OSError:
    """The error of a call that failed with this number. Windows' strerror() knows no numbers of sockets."""
    return OSError(code, getattr(socket, "errorTab", {}).get(code, "").rstrip(".") or os.strerror(code))


def quoted(path: str) -> str:
    """A path as a word of a command that a user is to type, into a POSIX shell or one of Windows."""
    return '"%s"' % path if re.search(r"[\s&()]", path) else path


def plural(n: int, one: str, many: str = "") -> str:
    return "%d %s" % (n, one if n == 1 else many or one + "s")


def show_time(seconds: float) -> str:
    """`0.3 ms`, `12.5 s`, `2 h 5 min`"""
    for size, unit, smaller, name in (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"):
        if seconds >= size:
            return "%d %s %d %s" % (seconds // size, unit, seconds % size // smaller, name)
    return "%.1f s" % seconds if seconds >= 1 else "%.*f ms" % (seconds < 0.01, seconds * 1000)


def show_size(n: float) -> str:
    """`950 B`, `1.2 kB`, `34 MB`"""
    units = ["B", "kB", "MB", "GB", "TB"]
    while n >= 999.5 and units[1:]:
        n /= 1000
        del units[0]
    return "%.*f %s" % (n < 9.95 and units[0] != "B", n, units[0])

# ======================================================================================================================
# 2. Messages: one tuple a message, one encoder and decoder for both wires
# ======================================================================================================================
# bincode 2, standard() but big-endian (PROTOCOL.md, part 1). A layout has one letter a field: b bytes, s str, ? bool,
# v varint; raw fields of ratrod2: 1 u8, 4 u32, 8 u64, S a stream's 16 bytes, P a u64 that may be missing (-1).

# The messages of the original's wire, and behind them those of ratrod2, which has Error in common with it.
ClientPreamble = NamedTuple("ClientPreamble", [("exchange_public_key", bytes), ("remote", str), ("challenge", bytes),
                                               ("should_encrypt", bool), ("is_udp", bool)])
ServerPreamble = NamedTuple("ServerPreamble", [("identity_public_key", str), ("exchange_public_key", bytes),
                                               ("signature", bytes), ("challenge", bytes)])
ClientAuthentication = NamedTuple("ClientAuthentication", [("identity_public_key", str), ("signature", bytes)])
HandshakeCompletion = NamedTuple("HandshakeCompletion", [])
Data = NamedTuple("Data", [("data", bytes)])
UdpData = NamedTuple("UdpData", [("data", bytes)])
Error = NamedTuple("Error", [("code", int), ("text", str)])
Shutdown = NamedTuple("Shutdown", [])


class Open(NamedTuple):
    """`stream` (16 bytes), `attempt`, `at` and `taken` belong to kind TCP, `instance` (8 bytes) to kind LISTEN."""

    kind: int
    target: str
    stream: bytes = bytes(16)
    attempt: int = 0
    at: int = 0
    taken: int = 0
    instance: bytes = b""


class Opened(NamedTuple):
    address: str
    taken: int = -1  # -1: it was not said, which is right for all kinds but TCP


class Session(NamedTuple):
    number: int
    target: str
    outer: int = 0


SessionOver = NamedTuple("SessionOver", [("number", int), ("code", int), ("text", str)])
SessionAddress = NamedTuple("SessionAddress", [("number", int), ("address", str)])

LEGACY_MESSAGES: tuple[tuple[type[Any], str], ...] = (  # the position is the variant
    (ClientPreamble, "bsb??"), (ServerPreamble, "sbbb"), (ClientAuthentication, "sb"), (HandshakeCompletion, ""),
    (Data, "b"), (UdpData, "b"), (Error, "vs"), (Shutdown, ""))
_VARIANTS = {kind: (variant, layout) for variant, (kind, layout) in enumerate(LEGACY_MESSAGES)}
DATA_VARIANT, UDP_DATA_VARIANT = _VARIANTS[Data][0], _VARIANTS[UdpData][0]

# ratrod2's record types. The legacy messages are mapped to them, so that a link need not know its wire.
COMPLETED, ERROR, OPEN, OPENED, DATA, END, OVER, ACK, ABANDON = 0x00, 0x01, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16
DATAGRAMS, SESSION, SESSION_OVER, SESSION_ADDRESS, KEEPALIVE, CLOSE = 0x20, 0x21, 0x22, 0x23, 0x30, 0x3f
UDP_DATA = 0x120  # legacy only: one bare datagram
TCP, UDP, LISTEN = 1, 2, 3  # kinds of Open
_RECORDS: dict[int, tuple[type[Any] | None, str]] = {  # the content of each type; None: its only field, or nothing
    COMPLETED: (None, "s"), ERROR: (Error, "vs"), OPENED: (Opened, "sP"), END: (None, ""), OVER: (None, ""),
    ACK: (None, "8"), ABANDON: (None, "S"), SESSION: (Session, "4s4"), SESSION_OVER: (SessionOver, "4vs"),
    SESSION_ADDRESS: (SessionAddress, "4s"), KEEPALIVE: (None, ""), CLOSE: (None, "")}
_STREAM = struct.Struct(">16sIQQ")  # of an Open of kind TCP, behind the target
_WIDE = {251: 2, 252: 4, 253: 8}  # marker -> bytes of the integer that follows


def encode_varint(n: int) -> bytes:
    """An unsigned integer: 0-250 in one byte, else a marker and 2, 4 or 8 bytes."""
    if n < 251:
        return bytes((n,))
    marker = 251 if n < 1 << 16 else 252 if n < 1 << 32 else 253
    return bytes((marker,)) + n.to_bytes(_WIDE[marker], "big")


class Decoder:
    """Reads the fields of one whole message; RemoteProtocolError for what does not fit."""

    def __init__(self, data: bytes | memoryview):
        self._data, self.left = data, len(data)

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise RemoteProtocolError("a message ends %d bytes too early" % (n - self.left))
        self.left -= n
        at = len(self._data) - self.left
        return bytes(self._data[at - n:at])

    def varint(self) -> int:
        first = self.take(1)[0]
        if first < 251:
            return first
        if first not in _WIDE:
            raise RemoteProtocolError("an integer with the unknown marker %d" % first)
        n = self.number(_WIDE[first])
        if encode_varint(n)[0] != first:  # bincode never does this: there is one encoding for each value
            raise RemoteProtocolError("an integer in a longer form than it needs")
        return n

    def bytes(self) -> bytes:
        return self.take(self.varint())

    def str(self) -> str:
        try:
            return self.bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("a text that is not UTF-8") from None

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def bool(self) -> bool:
        value = self.take(1)[0]
        if value > 1:
            raise RemoteProtocolError("a truth value of %d" % value)
        return bool(value)


_READ: dict[str, Callable[[Decoder], Any]] = {
    "b": Decoder.bytes, "s": Decoder.str, "?": Decoder.bool, "v": Decoder.varint,
    "P": lambda decoder: decoder.number(8) if decoder.left else -1, "S": functools.partial(Decoder.take, n=16),
    **{width: functools.partial(Decoder.number, width=int(width)) for width in "148"}}
_WRITE: dict[str, Callable[[Any], bytes]] = {
    "b": lambda data: encode_varint(len(data)) + data, "s": lambda text: _WRITE["b"](text.encode("utf-8")),
    "?": lambda value: bytes((value,)), "v": encode_varint, "S": bytes,
    "1": lambda n: n.to_bytes(1, "big"), "4": lambda n: n.to_bytes(4, "big"), "8": lambda n: n.to_bytes(8, "big"),
    "P": lambda n: n.to_bytes(8, "big") if n >= 0 else b""}


def _encode(layout: str, fields: Iterable[Any]) -> bytes:
    return b"".join(_WRITE[letter](field) for letter, field in zip(layout, fields))


def _decode(make: Any, layout: str, content: bytes | memoryview) -> Any:
    decoder = Decoder(content)
    fields = [_READ[letter](decoder) for letter in layout]
    if decoder.left:
        raise RemoteProtocolError("%d bytes left over after a message" % decoder.left)
    return make(*fields) if make else fields[0] if fields else None


# What is cached costs 3 µs otherwise. Nearly all records are the same few, as the Open of one target.
_encode_head = functools.lru_cache(maxsize=256)(lambda *fields: _encode("1s", fields))
_decode_head = functools.lru_cache(maxsize=256)(lambda content: _decode(lambda *fields: fields, "1s", content))


@functools.lru_cache(maxsize=256)
def encode_content(kind: int, *fields: Any) -> bytes:
    """The content of a record of any type but Open, Data and Datagrams."""
    return _encode(_RECORDS[kind][1], fields)


@functools.lru_cache(maxsize=256)
def decode_content(kind: int, content: bytes) -> Any:
    """The message in it; RemoteProtocolError for an unknown type, or for content that is not exactly one."""
    if kind not in _RECORDS:
        raise RemoteProtocolError("a record of the unknown type 0x%02x" % kind)
    return _decode(*_RECORDS[kind], content)


def encode_open(message: Open) -> bytes:
    head = _encode_head(message.kind, message.target)
    if message.kind == TCP:
        return head + _STREAM.pack(message.stream, message.attempt, message.at, message.taken)
    return head + message.instance


def decode_open(content: bytes) -> Open:
    """The message in the content of an Open record; RemoteProtocolError for what cannot be."""
    size = len(content) - {TCP: _STREAM.size, LISTEN: 8}.get(content[0] if content else 0, 0)
    if size <= 0:
        raise RemoteProtocolError("an Open of %d bytes" % len(content))
    kind, target = _decode_head(content[:size])
    if kind == TCP:
        return Open(kind, target, *_STREAM.unpack(content[size:]))
    if kind not in (UDP, LISTEN) or kind == UDP and target:
        raise RemoteProtocolError("an Open that cannot be (kind %d)" % kind)
    return Open(kind, target, instance=content[size:])


def encode_message(message: Any) -> bytes:
    """A legacy message."""
    variant, layout = _VARIANTS[type(message)]
    return encode_varint(variant) + _encode(layout, message)


def decode_message(data: bytes | memoryview) -> Any:
    """One of LEGACY_MESSAGES from its whole encoding; RemoteProtocolError for anything else."""
    variant = Decoder(data).varint()
    if variant >= len(LEGACY_MESSAGES):
        raise RemoteProtocolError("a message of the unknown kind %d" % variant)
    return _decode(*LEGACY_MESSAGES[variant], data[1:])  # every known variant takes one byte

# ======================================================================================================================
# 3. Keys and lists
# ======================================================================================================================

_PKCS8_HEAD = bytes.fromhex("3051020101300506032b657004220420")  # RFC 8410, as the original writes it; then the seed,
_PKCS8_MIDDLE = bytes.fromhex("812100")  # then this, then the public key


@functools.lru_cache(maxsize=None)
def sodium() -> Any:
    """nacl.bindings, imported on first use: help and usage errors need no PyNaCl. ConfigError where it is missing."""
    try:
        import nacl.bindings
    except ImportError as error:
        raise ConfigError("PyNaCl is missing (%s): install it with `pip install pynacl`, on Debian with `apt install"
                          " python3-nacl`" % printable(str(error))) from None
    return nacl.bindings


def encode_key(raw: bytes) -> str:
    """Unpadded base64url."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def decode_key(text: str, size: int = 32) -> bytes:
    """`size` raw bytes from unpadded base64url. ValueError unless they encode to exactly `text`: a key has one text."""
    length = (size * 4 + 2) // 3
    if len(text) == 2 * length:  # `cat key.pub >> authorized_keys`, twice: key.pub has no newline
        raise ValueError("it looks like two keys in one line; each needs a line of its own")
    if len(text) != length:
        raise ValueError("its key, the first word, has %d characters instead of %d" % (len(text), length))
    # Python's decoder skips other characters (and from 3.15 on warns of some), and ignores spare bits.
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if re.fullmatch("[A-Za-z0-9_-]*", text) else b""
    if encode_key(raw) != text:
        raise ValueError("its key is not unpadded base64url")
    return raw


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is the Ed25519 signature of `message` under `public` (32 bytes)."""
    import nacl.exceptions

    if len(public) != 32 or len(signature) != 64:
        return False
    with contextlib.suppress(nacl.exceptions.BadSignatureError, ValueError):
        sodium().crypto_sign_open(signature + message, public)
        return True
    return False


class KeyPair(NamedTuple):
    """An Ed25519 identity: the seed, and the public key that follows from it, 32 bytes each."""

    seed: bytes
    public: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        return cls(seed, sodium().crypto_sign_seed_keypair(seed)[0])

    @classmethod
    def decode(cls, text: str) -> KeyPair:
        """The pair in a `key` file's text: base64url of 83 bytes, PKCS#8 version 2. ValueError says what is wrong."""
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

    @functools.lru_cache(maxsize=4)  # noqa: B019 - of an identity, which lives as long: 30 µs of each handshake
    def exchange_key(self) -> bytes:
        """The private X25519 form of this identity."""
        return sodium().crypto_sign_ed25519_sk_to_curve25519(self.seed + self.public)

    def __repr__(self) -> str:  # never the seed: a repr ends in logs
        return "KeyPair(%s)" % encode_key(self.public)


# ---- files that people write, on any system

def read_text(path: str, most: int = -1) -> str:
    """The text of a file. UTF-16 keeps its zero characters, by which find_foreign() knows it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may have no end
        raise OSError(errno.EINVAL, "it is no plain file")
    with open(path, "rb") as file:
        return file.read(most).decode("utf-8", "replace")


def find_foreign(text: str) -> str:
    """What another program left in a text, and what helps; "" where it is plain."""
    if text.count("\0") > len(text) // 3:
        return ("it is UTF-16 text, as > and >> of Windows PowerShell write it; write it again as UTF-8, with an editor"
                " or with `Add-Content -Encoding ascii`")
    return "it stands in quotes, as cmd.exe leaves them; remove the quotes" if re.match(QUOTE, text) else ""


def describe_file(text: str) -> str:
    """What a file is that somebody took for a private key of ratrod's."""
    pem = re.match("-+ ?BEGIN ([A-Z0-9 ]*[A-Z0-9])", text)
    if pem:
        return "a PEM file (%s)" % pem.group(1)
    if re.match("PuTTY|(ssh|ecdsa|sk)-", text):
        return "a key of OpenSSH's or PuTTY's"
    if re.search(r"^\ufeff?\s*[A-Za-z0-9_-]{43}(\s|$)", text, re.MULTILINE):
        return "a list of public keys" if text.split()[1:] else "a public key"
    return "another file" if text.strip() else "an empty file (`ratrod keygen` makes a key where that is removed)"


def find_writers(path: str, status: os.stat_result, is_strict: bool = False) -> list[str]:
    """Who else can change a file or a folder, and what helps: one line, or none. With `is_strict`,
    PermissionError where its mode lets others change it, as with sshd's StrictModes."""
    if os.name != "posix":
        return []
    is_open, mode = bool(status.st_mode & 0o022), status.st_mode
    if stat.S_ISDIR(mode):
        is_open &= not mode & stat.S_ISVTX  # in a sticky folder, as /tmp, nobody replaces another's file
    elif is_open:
        # With umask 002 a group can write what an editor makes. In a folder of mode 0700 the group does not reach it.
        folder = os.stat(os.path.dirname(os.path.realpath(path)))
        is_open = stat.S_ISREG(mode) and bool(folder.st_mode & 0o011)
    if is_open:
        text = ("`%s` can be changed by others (mode %04o), who could let themselves in; make it yours alone: chmod"
                " go-w %s" % (path, stat.S_IMODE(mode), quoted(path)))
        if is_strict:
            raise PermissionError(errno.EPERM, text)
        return [text]
    return [] if status.st_uid in (0, os.getuid()) else [
        "`%s` belongs to another user (uid %d), who could let himself in; make it yours: chown %d %s"
        % (path, status.st_uid, os.getuid(), quoted(path))]


# By key: each line's number, and what KeyLines' `parse` made of the words behind the key.
Lines = Dict[bytes, Tuple[Tuple[int, Any], ...]]
QUOTE = "['\"`\u2018\u201c\u201e]"
LINE_END = re.compile("\r\0?\n\0?|[\r\n]\0?")  # with the zero characters of UTF-16


class KeyLines:
    """The lines `KEY [word]...` of authorized_keys or known_hosts, read again when the file has changed.

    `parse(words)` makes something of the words behind a key, or says in a ValueError what is wrong with them.
    """

    USELESS = "authorizes nobody"
    is_strict = True  # counts as empty while others can write it

    def __init__(self, path: str, parse: Callable[[list[str]], Any]):
        self.path, self._parse_words = path, parse
        self.broken: list[tuple[int, str, str]] = []  # lines that cannot be understood: number, text, reason
        self.problems: list[str] = []  # all that is wrong, for people
        self.is_unusable = False  # the whole file counts as empty
        self._cache: tuple[Any, Lines] = (None, {})  # the file's signature and its lines
        self._is_stale, self._gone_since = False, NEVER

    @property
    def lines(self) -> Lines:
        """The lines of each key, as the last read() has found them."""
        return self._cache[1]

    def read(self) -> Lines:
        """Looks at the file; the same object as before where nothing is new. A line that cannot be understood, or a
        file that cannot be read, lists nobody."""
        self._cache = self._read()
        return self.lines

    def forget(self) -> None:
        """Makes the next read() look into the file, whatever the file's times say."""
        self._is_stale = True

    def find_broken(self, key: bytes) -> tuple[int, str] | None:
        """The number of a line that has this key and cannot be understood, and why it cannot."""
        text = encode_key(key)
        return next(((number, why) for number, line, why in self.broken if text in line), None)

    def _read(self) -> tuple[Any, Lines]:
        signature: Any = None
        lines: Lines = {}
        broken: list[tuple[int, str, str]] = []
        now = time.time()
        # Now, for both may change while the file is read.
        is_stale, gone_since, self._is_stale, self._gone_since = self._is_stale, self._gone_since, False, NEVER
        try:
            status = os.stat(self.path)
            signature = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            # Within a tick of its clock (FAT: 2 s) a file may change twice. Far in the future: the clock was set back.
            is_settled = abs(now - max(status.st_mtime, status.st_ctime)) > 2
            if signature == self._cache[0] and is_settled and not is_stale:
                return self._cache
            problems = find_writers(self.path, status, self.is_strict)
            text = read_text(self.path)
            is_gone, (lines, broken) = not text, self._parse(text)
        except OSError as error:
            # A lack of descriptors throws nobody out while the file is the one that was read.
            if error.errno in NO_SUCH_DESCRIPTORS and signature == self._cache[0]:
                self._is_stale |= is_stale
                return self._cache
            gone = (FileNotFoundError, PermissionError) if os.name == "nt" else FileNotFoundError
            signature, is_gone = None, isinstance(error, gone)  # None: the next read() looks again
            problems = ["`%s` cannot be read, which counts as empty: %s" % (self.path, reason(error))]
        # Editors empty a file, or rename it away (vim, emacs), before they write it anew. An empty list would throw
        # everybody out, and clients for good. One that is to be empty still is so a moment later.
        self._gone_since = min(gone_since, now) if is_gone else NEVER
        if is_gone and self.lines and not is_stale and now - self._gone_since < EMPTY_FOR:
            return self._cache
        self.broken, self.is_unusable = broken, signature is None
        self.problems = problems + [
            "line %d of `%s` %s: %s" % (number, self.path, self.USELESS, why) for number, _, why in broken]
        return signature, self._cache[1] if lines == self._cache[1] else lines

    @functools.lru_cache(maxsize=2)  # noqa: B019 - 20 ms for 1,000 lines: for 2 s after a change each look reads them
    def _parse(self, text: str) -> tuple[Lines, list[tuple[int, str, str]]]:
        keys: Lines = {}
        broken = []
        for number, line in enumerate(LINE_END.split(text), 1):
            words = line.lstrip("\ufeff").split()  # a byte order mark
            if not line.strip("\0") or not words or words[0].startswith("#"):
                continue
            try:
                key = decode_key(words[0])
                keys[key] = (*keys.get(key, ()), (number, self._parse_words(words[1:])))
            except ValueError as error:
                broken.append((number, line.replace("\0", ""), find_foreign(" ".join(words)) or str(error)))
        return keys, broken


class UnknownHost(AuthenticationError):
    """The server's key is not in known_hosts. `hint` names a line that has the key, and why the line does not count."""

    def __init__(self, key: bytes, address: str, path: str, hint: str = ""):
        super().__init__("Server's public key `%s` is not in the known hosts file.%s If it is the right one (`ratrod"
                         " serve` shows it, and the server's key.pub), add this line to `%s`: %s %s"
                         % (encode_key(key), hint, path, encode_key(key), address))
        self.key, self.address, self.hint = key, address, hint


def parse_known_host(words: list[str]) -> str | None:
    """The `host:port`, or the `host` with any port, that a line of known_hosts is bound to; None for a bare key."""
    host = re.sub(r"\[([^:]+)\]", r"\1", words[0].lower()) if words else None  # sshd's form: [host]:port
    if host and not re.fullmatch(r"([\w.-]+|\[[0-9a-f:.]+(%[\w.-]+)?\])(:[1-9][0-9]{0,4})?", host):
        raise ValueError("`%s` is no `host:port` and no `host`; each server needs a line of its own" % printable(host))
    return host


class KnownHosts(KeyLines):
    """The key of each server. Lines with its `host:port` or `host`, in any case, count alone; then a bare KEY does."""

    USELESS = "is not understood"
    is_strict = False

    def __init__(self, path: str):
        super().__init__(path, parse_known_host)

    def check(self, key: bytes, address: str) -> None:
        """UnknownHost where no line is about this server, AuthenticationError where one has another key for it."""
        server, shown = address.lower(), encode_key(key)
        host, _, port = server.rpartition(":")
        lines = [(listed, *line) for listed, all_lines in self.read().items() for line in all_lines]
        bound = {listed: "line %d of `%s`" % (number, self.path) for listed, number, name in lines
                 if name in (server, host)}
        about = re.compile(r"(?<![\w.-])%s(\]?:%s(?!\d)|(?!\]?:\d|[\w.-]))" % (re.escape(host.strip("[]")), port))
        damaged = [(number, why) for number, text, why in self.broken if about.search(text.lower())]
        if key in bound:
            return
        if bound:
            listed, place = next(iter(bound.items()))
            raise AuthenticationError(
                "THE KEY OF THE SERVER `%s` HAS CHANGED: it shows `%s`, and %s says `%s`. Somebody may stand in between"
                " and pretend to be it.%s Only if you know why it has another key now, replace that line by: %s %s"
                % (address, shown, place, encode_key(listed), self._explain(key), shown, address))
        if damaged:
            raise AuthenticationError(
                "line %d of `%s` is about the server `%s` and cannot be understood (%s), so that no key counts for it."
                " If `%s` is the right key, replace that line by: %s %s"
                % (damaged[0][0], self.path, address, damaged[0][1], shown, shown, address))
        if (key, None) not in [(listed, name) for listed, _, name in lines]:
            raise UnknownHost(key, address, self.path, self._explain(key))

    def _explain(self, key: bytes) -> str:
        """A sentence about a line that has this key, and why that line does not count; "" where none has it."""
        broken = self.find_broken(key)
        for number, host in self.lines.get(key, ()):
            return " Line %d has this key, but %s." % (
                number, "for `%s` alone" % host if host else "for servers without a line of their own")
        return " Line %d has this key, but cannot be understood: %s." % broken if broken else ""

    def add(self, key: bytes, address: str) -> str:
        """Writes a line for a server. "", or the reason why there is none."""
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                line = b"\n" * (file.read(1) not in (b"", b"\n")) + ("%s %s\n" % (encode_key(key), address)).encode()
                if file.write(line) < len(line):  # a full disk; a part of it may count for other servers
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, "there is no room for a whole line")
            self.check(key, address)
        except OSError as error:
            return "cannot write to `%s`: %s" % (self.path, reason(error))
        except AuthenticationError:  # /dev/null takes everything
            return "has written a line to `%s` that is not in it now" % self.path
        return ""


class KeyFolder:
    """The four security files, in a folder or beside a key file. `parse_grant` is for authorized_keys."""

    def __init__(self, key_path: str | None = None, parse_grant: Callable[[list[str]], Any] = tuple):
        named = os.fspath(key_path or os.path.join("~", ".ratrod"))
        if "\0" in named:
            raise ConfigError("the path of the security files has a zero character in it, which no path has")
        path = os.path.expanduser(named)
        if named.startswith("~") and not (os.path.isabs(path) and os.environ.get("HOME", path)):
            raise ConfigError("there is no home folder for `%s` (HOME is not set, and the system knows none): name the"
                              " folder of the security files with -k" % named)
        is_file = os.path.isfile(path) or os.path.basename(path) == "key" and not os.path.isdir(path)
        self.key_file = path if is_file else os.path.join(path, "key")
        self.path = os.path.dirname(self.key_file) or "."
        self.authorized_keys = KeyLines(os.path.join(self.path, "authorized_keys"), parse_grant)
        self.known_hosts = KnownHosts(os.path.join(self.path, "known_hosts"))
        self.warnings: list[str] = []  # what a user should be told once

    def exists(self) -> bool:
        """Whether there may be a key file. One that cannot be looked at is not replaced, and load() says why."""
        try:
            return bool(os.lstat(self.key_file))
        except OSError as error:
            return not isinstance(error, FileNotFoundError)

    def load(self) -> KeyPair:
        """The identity in the key file. ConfigError names the file, what is wrong with it and what to do."""
        path = self.key_file
        try:
            status, text = os.stat(path), read_text(path, 4096).lstrip("\ufeff").strip()
            pair = KeyPair.decode(text)
            find_writers(path, status, is_strict=True)
            self.warnings += find_writers(self.path, os.stat(self.path))
        except OSError as error:
            raise ConfigError("cannot use the key file `%s`: %s" % (path, reason(error))) from None
        except ValueError as error:
            raise ConfigError(self._explain(text, error)) from None
        # Only the owner can mend it. A Kubernetes secret belongs to root, and is read through its group.
        if os.name == "posix" and status.st_mode & 0o077 and status.st_uid == os.getuid():
            self.warnings.append("The private key `%s` can be read by others (mode %04o); make it yours alone:"
                                 " chmod 600 %s" % (path, stat.S_IMODE(status.st_mode), quoted(path)))
        try:
            shown = read_text(path + ".pub", 4096).lstrip("\ufeff").strip()
            why = "" if decode_key(shown) == pair.public else "it belongs to another key"
        except (OSError, ValueError) as error:
            why = reason(error)
        if why:  # only people read key.pub; ratrod derives the public key from the private one
            self.warnings.append("`%s.pub` does not show this key (%s); the right line is: %s"
                                 % (path, why, encode_key(pair.public)))
        return pair

    def _explain(self, text: str, error: ValueError) -> str:
        """What is wrong with the text of a key file. Somebody who reads "damaged" throws the file away."""
        plain = re.sub("^(%s|\ufffd)+" % QUOTE, "", text.replace("\0", ""))
        if not plain or not encode_key(_PKCS8_HEAD)[:21].startswith(plain[:21]):
            return ("`%s` is no private key of ratrod's but %s. -k takes the folder of the security files, or the file"
                    " `key` in it" % (self.key_file, describe_file(plain)))
        return "cannot use the key file `%s`: %s" % (self.key_file, find_foreign(text) or (
            "it is damaged: %s. Move it away and make another with `ratrod keygen`" % error))

    def generate(self) -> KeyPair:
        """Writes a new identity and empty lists into the folder, never over a file. ConfigError says what failed."""
        pair = KeyPair.from_seed(os.urandom(32))
        # key.pub last: without its key it would stand in the way of the next try, and load() tells what belongs in it.
        texts = {"authorized_keys": "", "known_hosts": "", "key": pair.encode(), "key.pub": encode_key(pair.public)}
        try:
            here = [name for name in texts if os.path.lexists(os.path.join(self.path, name))]
            if "key" in here or "key.pub" in here:
                raise FileExistsError(errno.EEXIST, "there is a `key` already" if "key" in here else
                                      "there is a `key.pub` without its `key`; put that back, or move key.pub away")
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            for name in texts:
                if name not in here:
                    write_new(os.path.join(self.path, name), texts[name])
        except OSError as error:
            raise ConfigError("cannot write the security files to `%s`: %s" % (self.path, reason(error))) from None
        return pair


def write_new(path: str, text: str) -> None:
    """Writes a file that others see whole or not at all. OSError where there is one: one of two keygens wins."""
    temporary = "%s.%s.tmp" % (path, os.urandom(8).hex())
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        try:
            os.link(temporary, path)
        except OSError:
            if os.path.lexists(path):
                raise
            os.rename(temporary, path)  # a file system without links
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


class NoKeys(KeyFolder):
    """In place of a key folder where ssh does what keys are for. The pair in it can do nothing."""

    def __init__(self) -> None:
        super().__init__(os.curdir)  # the home folder may be unknown

    def exists(self) -> bool:
        return True

    def load(self) -> KeyPair:
        return KeyPair(b"", b"")

# ======================================================================================================================
# 4. Addresses and policy
# ======================================================================================================================


class Address(NamedTuple):
    """A host (a name, an IPv4 or an IPv6 address without brackets) and a port; or a Unix socket's path and port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return "unix:" + self.host if self.is_unix else show_host_port(*self)

    @property
    def is_unix(self) -> bool:
        return self.host.startswith("/")


def show_host_port(host: str, port: int) -> str:
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


NOWHERE = Address("", 0)


def is_address(host: str) -> bool:
    """Whether a host that parse_host() has accepted is an address, not a name."""
    return ":" in host or host.rsplit(".", 1)[-1].isdigit()


def show_address(address: Any) -> str:
    """The text of a socket address. The address of a Unix socket's other end says nothing."""
    return str(Address(*address[:2])) if isinstance(address, tuple) else "unix"


@contextlib.contextmanager
def explaining(what: str, advice: str = "") -> Iterator[None]:
    """Makes a ConfigError of a ValueError: what the trouble is about, the reason, and what would help."""
    try:
        yield
    except ValueError as error:
        raise ConfigError("%s: %s%s" % (what, printable(str(error), 400), advice)) from None


def parse_ip(text: str | bytes) -> Any:
    """The ipaddress object of an address, without its zone, or of its bytes; mapped IPv4 is unmapped. Or ValueError."""
    import ipaddress

    address = ipaddress.ip_address(text.split("%")[0] if isinstance(text, str) else text)
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(maxsize=None)
def parse_networks(text: str) -> tuple[Any, ...]:
    """The ipaddress networks in `10.0.0.7,10.1.0.0/16,::1`; ConfigError names the word that is none."""
    import ipaddress

    with explaining("--proxy-protocol takes addresses and networks, as 10.0.0.7,10.1.0.0/16"):
        if "%" in text:
            raise ValueError("a zone says nothing there")
        return tuple(ipaddress.ip_network(word.strip()) for word in text.split(",")) if text else ()


# ---- host:port in all its forms; a ValueError says what is wrong

# A Unix socket's path, an IPv6 address in brackets, or a text without a colon. At each place only one of them fits.
_PIECE = r"(?:(unix:/[^:]*)|\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[^\[\]]*)?)\]|((?!unix:/)[^:\[\]]*))"


def split_host_port(text: str) -> list[str]:
    """The pieces of `a:b:c`: `[::1]:80` is ::1 and 80, `unix:/path` is one piece."""
    if not re.fullmatch("%s(?::%s)*" % (_PIECE, _PIECE), text):
        raise ValueError("its brackets do not fit; an IPv6 address is written [::1]")
    return ["".join(piece) for piece in re.findall("(?:^|:)" + _PIECE, text)]


def join_host_port(pieces: list[str], host: Callable[[str], str], port: Callable[[str], int],
                   default: str | None = None) -> Address:
    """The Address that one path, or one host and one port make. With a `default` host, one port alone does too."""
    if len(pieces) == 1 and pieces[0].startswith("unix:/"):
        return Address(parse_path(pieces[0][5:]), 0)
    if len(pieces) == 1 and default is not None:
        return Address(default, port(pieces[0]))
    if len(pieces) != 2:
        raise ValueError("`%s` is not %s" % (printable(":".join(pieces)), "[host:]port" if default else "host:port"))
    return Address(host(pieces[0]), port(pieces[1]))


def parse_port(text: str, lowest: int = 1) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,4}", text, re.ASCII) or not lowest <= int(text) <= 65535:
        raise ValueError("`%s` is not a port (%d-65535)" % (printable(text), lowest))
    return int(text)


_parse_port_or_zero = functools.partial(parse_port, lowest=0)


def parse_host(text: str) -> str:
    """A strict host in canonical form: a name in lower case and punycode, a dotted quad, or an IPv6 address, unmapped.

    Some resolvers take more for an address (127.1, 0x7f000001, 017700000001, full-width digits). It is refused here,
    for it would reach loopback past a rule that compares text. An empty host, loopback for connect(), is refused too.
    """
    host = text
    # Digits of another alphabet disguise an address. Of a long text Python's codec takes long.
    if not text.isascii() and len(text) <= 253 and not re.search(r"[^\D0-9]", text):
        with contextlib.suppress(UnicodeError):
            host = text.encode("idna").decode("ascii")
    name = re.fullmatch(r"([\w-]+(?:\.[\w-]+)*)\.?", host, re.ASCII)
    if ":" not in text and not (name and len(host) <= 253):
        raise ValueError("`%s` is not a host name or address" % printable(text))
    host = name.group(1).lower() if name else text
    if name and not re.search(r"(?:^|\.)(?:[0-9]+|0x[^.]*)\Z", host):
        return host
    with contextlib.suppress(ValueError):
        address = str(parse_ip(host))
        # Python 3.8 takes 010.0.0.1 for 10.0.0.1
        if "%" not in text and text.isascii() and (not name or address == host):
            return address
    raise ValueError("`%s` is not an address (as 127.0.0.1 or ::1, without a zone)" % printable(text))


def parse_near_host(text: str) -> str:
    """parse_host() of a host that this side itself connects to: a link-local address keeps its zone, fe80::1%eth0."""
    plain, percent, zone = text.partition("%")
    host = parse_host(plain)
    if percent and not (":" in host and parse_ip(host).is_link_local and re.fullmatch(r"[\w.-]+", zone, re.ASCII)):
        raise ValueError("`%s` is no link-local address with a zone (as fe80::1%%eth0)" % printable(text))
    return host + percent + zone


def parse_own_host(text: str) -> str:
    """A host of this side's own command line, where this system's resolver decides what it means."""
    if not text or not text.isprintable() or text.startswith(("/", "unix:/")):
        raise ValueError("its host is %s" % ("no name or address" if text else "empty"))
    return text


def parse_path(text: str) -> str:
    """The path of a Unix socket, in the only form that a rule can be compared with."""
    if not re.fullmatch("/[^/:][^:]*", text) or posixpath.normpath(text) != text or not text.isprintable():
        raise ValueError("`%s` is not the plain absolute path of a Unix socket, without a colon" % printable(text))
    if len(os.fsencode(text)) > 100:
        raise ValueError("the path of a Unix socket has at most 100 bytes")
    return text


def parse_target(text: str) -> Address:
    """A strict Address from `host:port`, `[v6]:port` or `unix:/path`."""
    return join_host_port(split_host_port(text), parse_host, parse_port)


def parse_far_host(text: str) -> str:
    """The host that a client asks a server to listen on: an address, `localhost` or `*`, for both sides the same."""
    host = "*" if text == "*" else parse_host(text)
    if not is_address(host) and host not in ("localhost", "*"):
        raise ValueError("`%s` is a name, and the server listens on an address, on localhost or on *" % printable(text))
    return host


def parse_bind(text: str) -> Address:
    """The address that a client asks a server to listen on, `[address:]port`. A bare port is on loopback."""
    address = join_host_port(split_host_port(text), parse_far_host, _parse_port_or_zero, "localhost")
    if address.is_unix:
        raise ValueError("the server listens on no Unix socket")
    return address


def parse_endpoint(text: str, what: str, lowest: int = 1) -> Address:
    """`host:port` of this side's own command line, the port `lowest` or more. ConfigError says what the text is for."""
    with explaining("cannot understand the %s `%s`" % (what, printable(text)),
                    ". It is written host:port, as 10.0.0.7:19000 or [::1]:19000"):
        pieces = split_host_port(text)
        if len(pieces) != 2:
            raise ValueError("it is not host:port")
        return join_host_port(pieces, parse_own_host, functools.partial(parse_port, lowest=lowest))


def is_shared(one: Address, other: Address) -> bool:
    """Whether visitors of one of two addresses to listen on could come to the other: `localhost` is tried in both
    families, and some systems let a single address be had beside all of them."""
    hosts = {one.host, other.host}
    return one.port == other.port and (
        len(hosts) == 1 or hosts <= {"localhost", "127.0.0.1", "::1"} or bool(hosts & {"*", "::", "0.0.0.0"}))


# ---- what a command line names: tunnels, servers, a proxy

FORWARD, SOCKS, STDIO, REVERSE = "forward", "socks", "stdio", "reverse"  # kinds of tunnels


class TunnelSpec(NamedTuple):
    """One tunnel: listen on `local` (port 0: a free one), for `remote` as the server sees it. REVERSE: the server
    listens, on its loopback where `local` has no host, for `remote` as the client sees it."""

    local: Address
    remote: Address
    kind: str = FORWARD
    protocols: tuple[str, ...] = ("TCP",)  # what is listened for


def parse_tunnels(text: str) -> list[TunnelSpec]:
    """The tunnels of one TUNNEL word, one for each port of a range. ConfigError says what is wrong with the word."""
    only, rest = (text[:3].upper(), text[4:]) if text.startswith(("tcp:", "udp:")) else ("", text)
    with explaining(
            "cannot understand the tunnel `%s`" % printable(text),
            ". The forms are [local_host:[local_port:[remote_host:]]]remote_port, as 2000:db:5432, with tcp: or udp: in"
            " front for one of the two alone; [host:]port:socks; stdio:host:port; unix:/path in place of host:port; and"
            " R:[host:]port:host:port"):
        if text.startswith("stdio:"):
            return [TunnelSpec(NOWHERE, _parse_stdio(text[6:]), STDIO)]
        tunnels = [_parse_tunnel(pieces) for pieces in _spread_ranges(split_host_port(rest))]
        if only and (only not in tunnels[0].protocols or tunnels[0].kind == SOCKS):
            raise ValueError("tcp: and udp: go with the first two forms alone; Unix sockets and R: have no UDP")
        return [tunnel._replace(protocols=(only,)) if only else tunnel for tunnel in tunnels]


def _spread_ranges(pieces: list[str]) -> list[list[str]]:
    """The pieces of each tunnel of a range of ports; without a range, the pieces as they are."""
    first = int(pieces[0] == "R")
    places = [first + n for n in {1: (0,), 2: (0, 1), 3: (0, 2), 4: (1, 3)}.get(len(pieces) - first, ())]
    spans = [re.fullmatch("([1-9][0-9]{0,4})-([1-9][0-9]{0,4})", pieces[place], re.ASCII) for place in places]
    if not any(spans):
        return [pieces]
    ranges = [range(int(span.group(1)), int(span.group(2)) + 1) for span in spans if span]
    sizes = {len(ports) for ports in ranges}
    if not all(spans) or len(sizes) > 1 or not 1 <= max(sizes) <= 1000 or max(map(max, ranges)) > 65535:
        raise ValueError("its ranges of ports must be equally long, upwards, and of at most 1000 ports,"
                         " as 8000-8010:host:9000-9010")
    changes = [dict(zip(places, map(str, ports))) for ports in zip(*ranges)]
    return [[change.get(n, piece) for n, piece in enumerate(pieces)] for change in changes]


def _parse_stdio(text: str) -> Address:
    """`unix:/path` or `host:port`, where ssh's %h may be an IPv6 address and %h in brackets may be a name."""
    if text.startswith("unix:/"):
        return parse_target(text)
    host, _, port = text.rpartition(":")
    return Address(parse_host(host[1:-1] if re.fullmatch(r"\[.*\]", host) else host), parse_port(port))


def _parse_tunnel(pieces: list[str]) -> TunnelSpec:
    """One tunnel that listens, in any of its forms; ValueError says what is wrong with it."""
    kind, here, own_host, host = ((REVERSE, "", parse_far_host, parse_near_host) if pieces[0] == "R" else
                                  (FORWARD, "127.0.0.1", parse_own_host, parse_host))
    pieces = pieces[kind == REVERSE:] or [""]
    both = ("TCP", "UDP") if kind == FORWARD else ("TCP",)
    if len(pieces) == 1:
        port = parse_port(pieces[0])
        return TunnelSpec(Address(here, port), Address("127.0.0.1", port), kind, both)
    # A path takes the place of two pieces, and no remote after a local path is a port alone.
    starts_with_path, ends_with_path = (piece.startswith("unix:/") for piece in (pieces[0], pieces[-1]))
    is_socks = kind == FORWARD and pieces[-1] == "socks"
    size = 1 if is_socks or ends_with_path or len(pieces) + starts_with_path < 3 else 2
    local = join_host_port(pieces[:-size], own_host, _parse_port_or_zero, here)
    if kind == REVERSE and local.is_unix:
        raise ValueError("the server listens on no Unix socket")
    if is_socks:
        return TunnelSpec(local, NOWHERE, SOCKS)
    remote = join_host_port(pieces[-size:], host, parse_port, "127.0.0.1")
    return TunnelSpec(local, remote, kind, ("TCP",) if local.is_unix or remote.is_unix else both)


class SshHost(NamedTuple):
    """A machine as the system's ssh knows it. User "" and port 0 are left to the configuration of ssh."""

    user: str
    host: str
    port: int

    def __str__(self) -> str:
        shown = str(Address(self.host, self.port))
        return "ssh://%s%s" % (self.user and self.user + "@", shown if self.port else shown[:-2])


Place = Union[Address, SshHost]


def parse_servers(text: str) -> list[Place]:
    """The servers in `a:1,b:2` or `ssh://a,ssh://b`; ConfigError says what is wrong."""
    words = [word.strip() for word in text.split(",")]
    over_ssh = [word.startswith("ssh://") for word in words]
    if len(set(over_ssh)) > 1 or words[1:] and "" in words:
        raise ConfigError("the servers `%s` are of two kinds, or one is empty: take host:port for all, or ssh://"
                          % printable(text))
    return list(dict.fromkeys(parse_ssh(word) if over_ssh[0] else parse_endpoint(word, "server") for word in words))


def parse_ssh(text: str) -> SshHost:
    """`ssh://[user@]host[:port]`; ConfigError for anything that ssh or a shell could take for more than a name."""
    match = re.fullmatch(r"ssh://(?:([\w.+][\w.+-]*)@)?(?:([\w.][\w.-]*)|\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\])"
                         r"(?::([^/]*))?/?", text, re.ASCII)
    with explaining("cannot understand the server `%s`" % printable(text)):
        if not match:
            raise ValueError("it is not ssh://[user@]host[:port], letters, digits and ._- that do not begin with -")
        user, name, v6, port = match.groups()
        return SshHost(user or "", name or v6, parse_port(port) if port is not None else 0)


class Proxy(NamedTuple):
    """A proxy on the way to the server; shown without its password."""

    scheme: str
    address: Address
    user: bytes | None
    password: bytes

    def __repr__(self) -> str:  # for str() too
        return "%s://%s" % (self.scheme, self.address)


def parse_proxy(url: str | None, servers: Iterable[Place]) -> Proxy | None:
    """`http://[user:password@]host[:port]` or `socks5://...` for `servers`; ConfigError says what is wrong."""
    if url is None:
        return None
    from urllib.parse import unquote_to_bytes

    match = re.fullmatch(r"(http(?=:)|socks5)h?://(?:([^:]*)(?::(.*))?@)?([^@/]+?)/?", url, re.DOTALL)
    with explaining("cannot understand the --proxy", ". It is written http://user:password@proxy:3128 or"
                    " socks5://[::1]:1080, in user and password %40 for @ and the like"):
        if not match:
            raise ValueError("it is not http://[user:password@]host[:port] or socks5://[user:password@]host[:port]")
        user, password = (None if part is None else unquote_to_bytes(part) for part in match.group(2, 3))
        if user is not None and match.group(1) == "http" and b":" in user:
            raise ValueError("HTTP has no user with a colon")
        if max(len(user or b""), len(password or b"")) > 255:
            raise ValueError("a user or password of more than 255 bytes")
        pieces = split_host_port(match.group(4))
        address = join_host_port(pieces if len(pieces) > 1 else [*pieces, "1080"], parse_own_host, parse_port)
    for server in servers:
        with explaining("no proxy can be asked for server `%s`" % printable(str(server))):
            parse_host(server.host)
    return Proxy(match.group(1), address, user, password or b"")


# ---- grants, the options of a line of authorized_keys; and the server's own rule


def matches(pattern: Address, target: Address) -> bool:
    """Whether a pattern is for a target. Its port 0 is any port; its host `*` is any host, `*.x` any name below x."""
    if target.is_unix or pattern.is_unix:
        return pattern.host == target.host
    host = pattern.host
    is_below = host.startswith("*.") and not is_address(target.host) and target.host.endswith(host[1:])
    return pattern.port in (0, target.port) and (is_below or host in ("*", target.host))


def parse_pattern(text: str, default: str | None = None) -> Address:
    """What matches() takes, of `host:port`, `unix:/path`, or with a `default` host of `port`; or a ValueError."""
    def host(text: str) -> str:
        if text == "unix":  # `unix:*` must not pass for any port of a host that is called so
            raise ValueError("the path of a Unix socket begins with /")
        star = "*." if text.startswith("*.") else ""
        return text if text == "*" else star + parse_host(text[len(star):])
    return join_host_port(split_host_port(text), host, lambda port: 0 if port == "*" else parse_port(port), default)


class Grant(NamedTuple):
    """What one line of authorized_keys permits. `expires` is in seconds since 1970 (UTC); no pattern permits all."""

    permitopen: tuple[Address, ...] = ()
    permitlisten: tuple[Address, ...] = ()
    no_udp: bool = False
    no_legacy: bool = False
    expires: float = NEVER
    comment: str = ""

    def opens(self, target: Address) -> bool:
        return not self.permitopen or any(matches(pattern, target) for pattern in self.permitopen)

    def listens(self, address: Address) -> bool:
        # The same address by its other name. A pattern for 127.0.0.1 permits a bare port, which is localhost.
        others = {"localhost": "127.0.0.1", "127.0.0.1": "localhost", "::1": "localhost", "*": "::"}
        asked = [address._replace(host=host) for host in (address.host, others.get(address.host, address.host))]
        return not self.permitlisten or any(matches(pattern, one) for pattern in self.permitlisten for one in asked)


def parse_grant(words: list[str]) -> Grant:
    """The Grant of `[option ...] [comment]`, the words behind a key. Capitals, `-` and `_` make no difference to an
    option. ValueError for a word that may have been meant as one: it must not pass for a comment."""
    fields: dict[str, Any] = {"permitopen": (), "permitlisten": (), "expires": NEVER}
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        name = re.sub("[-_]", "", option.lower())
        quoted = re.fullmatch(r'"([^"]*)"', value)
        if name in ("permitopen", "permitlisten") and quoted:
            fields[name] += (parse_pattern(quoted.group(1), "localhost" if name == "permitlisten" else None),)
        elif name == "expires" and quoted:
            fields[name] = min(fields[name], parse_date(quoted.group(1)))
        elif name in ("noudp", "nolegacy") and not equals:
            fields["no_" + name[2:]] = True
        else:
            for later in words[number:]:
                refuse_option(later)
            return Grant(**fields, comment=printable(" ".join(words[number:]), 60))
    return Grant(**fields)


OPTIONS = ("permitopen", "permitlisten", "expires", "noudp", "nolegacy", "restrict")
SSHD_OPTIONS = tuple("restrict pty userrc portforwarding agentforwarding x11forwarding certauthority verifyrequired"
                     " touchrequired".split())  # those without a value and `no-`


def refuse_option(word: str) -> None:
    """ValueError for a word of a comment that may have been meant as an option, or is one that was mistyped."""
    import difflib

    for part in re.split("[,;]", word):
        name = re.sub(r"[\W_]", "", part.lower())
        if re.sub("^no", "", name) in SSHD_OPTIONS:
            raise ValueError("`%s` is an option of sshd's, which ratrod does not have" % printable(part))
        # Comparing letters costs 5 µs a word, difflib 100 µs: lists have thousands of comments. `legacy` may be one.
        close = [option for option in OPTIONS if len(set(option) ^ set(name)) < 4 and name != "legacy"]
        is_like = re.match("permit|no[-_]|expire", part.lower()) or close and (
            difflib.get_close_matches(name, close, 1, 0.8) or sorted(name) in map(sorted, close))
        if "=" in word or is_like and "@" not in word:
            raise ValueError("`%s` is no option (values take quotes), or stands behind the comment" % printable(word))


def parse_date(text: str) -> float:
    """The first second of a day written 2027-01-31, in seconds since 1970 (UTC); ValueError if there is no such day."""
    import datetime

    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
        raise ValueError("`%s` is not a date (as 2027-01-31)" % printable(text))
    return datetime.datetime.strptime(text + " +0000", "%Y-%m-%d %z").timestamp()


# This machine, link-local, and where clouds answer questions about a machine, its passwords among them.
GUARDED = ("0.0.0.0/8,127.0.0.0/8,::1,169.254.0.0/16,fe80::/10,100.100.100.200,168.63.129.16,192.0.0.0/24,"
           "fd00:ec2::/32,fd20:ce::/32,fd00:c1::/32,fd00:42::/32")


def _forms_of(address: Any) -> Iterator[Any]:
    """An address, and the IPv4 addresses that a router may make of it."""
    yield address
    if address.version == 6:
        raw = address.packed
        is_nat64 = raw[:4] == b"\0\x64\xff\x9b"
        if is_nat64 and not any(raw[11:]):  # 64:ff9b:1:aabb:cc:dd00::
            yield parse_ip(raw[6:8] + raw[9:11])
        # 64:ff9b::a.b.c.d, ::a.b.c.d, ::ffff:0:a.b.c.d, and what an ISATAP router has in any network
        elif is_nat64 or raw[:12] in (bytes(12), bytes(8) + b"\xff\xff\0\0") or raw[9:12] == b"\0\x5e\xfe":
            yield parse_ip(raw[12:])
        yield from filter(None, (address.sixtofour, *(address.teredo or ())))


def is_guarded(target: Address, host: str) -> bool:
    """Whether the address `host`, which target.host resolved to, is open only where it is allowed by itself: somebody
    else may rule over the name. An address means itself, and `localhost` loopback."""
    address = parse_ip(host)
    return target.host not in ("localhost", str(address)) and any(
        form in network for form in _forms_of(address) for network in parse_networks(GUARDED))


class Policy:
    """The targets that a server opens: those that match one of its regexes and that the client's grants permit.

    A regex matches the whole host (of IPv6 in brackets) or the whole `host:port`. One that begins with `unix:` is for
    the paths of Unix sockets, and no other one is: `.*db.*` means machines, and no docker.sock.
    """

    def __init__(self, regexes: str | Sequence[str] = ".*"):
        import warnings

        self.regexes = [regexes] if isinstance(regexes, str) else list(regexes)
        self._rules: dict[bool, list[re.Pattern[str]]] = {True: [], False: []}  # for paths, and for hosts
        for regex in self.regexes:
            is_unix = regex.startswith("unix:")
            try:
                with warnings.catch_warnings():
                    # `[[:alpha:]]` compiles with a FutureWarning, means something else, and would let strangers in.
                    warnings.simplefilter("error")
                    self._rules[is_unix].append(re.compile(regex, 0 if is_unix else re.IGNORECASE))
            except (re.error, Warning, RuntimeError, OverflowError) as error:  # 3.8: "invalid SRE code" for `(?(2))|`
                raise ConfigError("cannot use the remote regex `%s`: %s" % (regex, error)) from None

    def _find_objection(self, target: Address, grants: tuple[Grant, ...]) -> str:
        """Why the target may not be opened; "" where it may."""
        text, is_unix = str(target), target.is_unix
        forms = (text,) if is_unix else (text, text.rpartition(":")[0])
        is_free = is_unix and self.regexes == [".*"]  # without a -r, a permitopen has to name a Unix socket
        if not is_free and not any(rule.fullmatch(form) for rule in self._rules[is_unix] for form in forms):
            return "does not match the remote regex" + ", of which the part for paths begins with unix:" * is_unix
        if not any(grant.opens(target) and (grant.permitopen or not is_free) for grant in grants):
            return "is not what authorized_keys permits this key to open"
        return ""

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a policy lives as long as its server; saves 10 µs a connection
    def check(self, text: str, grants: tuple[Grant, ...] = (Grant(),)) -> Address:
        """The target that a client named, before anything is looked up. PolicyError where it may not be opened."""
        try:
            if not text.isascii() and not text.startswith("unix:"):
                raise ValueError("`%s` is not punycode" % printable(text))
            target = parse_target(text)
        except ValueError as error:
            raise PolicyError("not a target: %s" % printable(str(error))) from None
        objection = self._find_objection(target, grants)
        if objection:
            raise PolicyError("`%s` %s" % (target, objection))
        return target

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - as above
    def check_addresses(self, target: Address, found: tuple[str, ...],
                        grants: tuple[Grant, ...] = (Grant(),)) -> tuple[str, ...]:
        """Those of the addresses `found` for target.host that may be connected to. PolicyError where there is none."""
        allowed = []
        for host in found:
            address = parse_ip(host)
            if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
                continue
            if not is_guarded(target, host) or not self._find_objection(Address(str(address), target.port), grants):
                allowed.append(host)
        if not allowed:
            raise PolicyError("`%s` resolves to addresses that may not be opened" % str(target))
        return tuple(allowed)

# ======================================================================================================================
# 5. Ciphers and framing: bytes of a link to records and back
# ======================================================================================================================

Plain = Union[bytes, memoryview]  # to read from
Room = Union[bytearray, memoryview]  # to write to
FORGED = "a record failed its authentication: it was damaged or forged on the way"


class Aead:
    """One cipher of libsodium, without copies and allocations.

    `nacl._sodium` is a private name of PyNaCl: 0.8 µs for 1,400 bytes against 6 µs of its public functions, which copy
    but always work. Both are closures: a record of a few bytes costs more calls than cipher.

    seal(plain, into, nonce, key, aad) writes the ciphertext of `plain` and the tag to `into`, which may begin at
    `plain`. open(view, nonce, key, aad) decrypts `view`, which ends with the tag, in place; LinkSpoiled where `view`
    was not sealed with these.
    """

    __slots__ = ("name", "tag", "fast", "seal", "open")

    def __init__(self, name: str, tag: int, fast: bool = True):
        self.name, self.tag = name, tag
        pair = self._private() if fast else None
        self.fast = pair is not None
        self.seal, self.open = pair or self._public()

    def _public(self) -> tuple[Callable[..., None], Callable[..., None]]:
        encrypt, decrypt = (getattr(sodium(), "crypto_aead_%s_%scrypt" % (self.name, way)) for way in ("en", "de"))
        tag = self.tag
        import nacl.exceptions

        def seal(plain: Plain, into: Room, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            into[:] = encrypt(bytes(plain), aad, nonce, key)

        def open_(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            try:
                view[:-tag] = decrypt(bytes(view), aad, nonce, key)
            except (nacl.exceptions.CryptoError, ValueError):
                raise LinkSpoiled(FORGED) from None
        return seal, open_

    def _private(self) -> tuple[Callable[..., None], Callable[..., None]] | None:
        sodium()  # sodium_init(): without it libsodium uses its slow portable code
        try:
            from nacl._sodium import ffi, lib
            encrypt, decrypt = (getattr(lib, "crypto_aead_%s_%scrypt" % (self.name, way)) for way in ("en", "de"))
        except (ImportError, AttributeError):
            return None
        null, tag, from_buffer = ffi.NULL, self.tag, ffi.from_buffer

        def seal(plain: Plain, into: Room, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            if len(into) != len(plain) + tag:  # libsodium does not know how long `into` is
                raise LocalProtocolError("%d bytes for %d and a tag" % (len(into), len(plain)))
            encrypt(from_buffer(into), null, from_buffer(plain), len(plain), aad, len(aad), null, nonce, key)

        def open_(view: memoryview, nonce: bytes, key: bytes, aad: bytes = b"") -> None:
            at = from_buffer(view)
            # Our own check of the length: libsodium's says nothing of where a shorter plaintext would be written.
            wrong = len(view) < tag or decrypt(at, null, null, at, len(view), aad, len(aad), nonce, key)
            del at  # in a traceback it would make CPython's collector crash (found by fuzzing)
            if wrong:
                raise LinkSpoiled(FORGED)
        return seal, open_


class Suite(NamedTuple):
    """A cipher suite of ratrod2."""

    id: int
    name: str
    key_size: int  # in bytes
    aead: Any  # an Aead, or NoAead
    nonce: Callable[[int], bytes]  # of a record's number; it fails at 2^63, where a link has to end


@functools.lru_cache(maxsize=None)
def chacha20_poly1305() -> Suite:
    return Suite(2, "ChaCha20-Poly1305", 32, Aead("chacha20poly1305_ietf", 16), struct.Struct("<4xq").pack)


class NoAead:
    """In place of an Aead in a pipe that ssh has sealed. Link lets no other connection have it."""

    tag = 0

    @staticmethod
    def seal(plain: Plain, into: Room, _nonce: bytes, _key: bytes, _aad: bytes = b"") -> None:
        into[:] = plain

    @staticmethod
    def open(view: memoryview, _nonce: bytes, _key: bytes, _aad: bytes = b"") -> None:
        pass


NO_SUITE = Suite(0, "none", 0, NoAead, lambda _number: b"")


class CipherState:
    """One direction of a link: a key, and the numbers of its records (the Noise specification's k and n)."""

    __slots__ = ("_seal", "_open", "_key", "_next_nonce", "tag")

    def __init__(self, suite: Suite, key: bytes):
        if len(key) != suite.key_size:
            raise LocalProtocolError("a key of %d bytes for %s" % (len(key), suite.name))
        self._seal, self._open, self.tag = suite.aead.seal, suite.aead.open, suite.aead.tag
        self._key, self._next_nonce = key, map(suite.nonce, itertools.count()).__next__

    def encrypt_with_ad(self, ad: bytes, plaintext: bytes) -> bytes:
        sealed = bytearray(len(plaintext) + self.tag)
        self._seal(plaintext, sealed, self._next_nonce(), self._key, ad)
        return bytes(sealed)

    def decrypt_with_ad(self, ad: bytes, ciphertext: bytes) -> bytes:
        view = memoryview(bytearray(ciphertext))
        self._open(view, self._next_nonce(), self._key, ad)
        return bytes(view[:-self.tag])


# hashlib and hmac are imported where they are used: their half of OpenSSL takes as long to load as all else of --help.

def sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    import hmac

    return hmac.new(key, data, "sha256").digest()


# ---------------------------------------------------------------------------------------------------- framing
# A reader takes records out of a buffer of the link's; a writer gives bytes to send. A record means the same on both.

_HEADER_CLEAR, _HEADER_SEALED = struct.Struct(">BQ"), struct.Struct(">B12sQ")
Record = Tuple[int, Any, int]


class LegacyReader:
    """Frames of the legacy wire. With a `key` encryption is on, and a frame in the clear ends the link; but
    HandshakeCompletion, or Error in its place, is in the clear. It is `awaited` until it has come."""

    __slots__ = ("_key", "_awaited", "wanted")

    def __init__(self, key: bytes | None = None, awaited: bool = False):
        self._key, self._awaited, self.wanted = key, awaited, 0

    def next(self, view: memoryview, start: int, end: int) -> Record | None:
        """The record that begins at view[start]: (type, content, where it ends). The content of Data is a piece of
        `view`. None where the record is not whole: then `wanted` is how many bytes it has, as far as is known.
        RemoteProtocolError as soon as the bytes cannot become a legal frame."""
        sealed = view[start]
        if sealed > 1:
            raise RemoteProtocolError("a frame with the flag %d" % sealed)
        if bool(sealed) != (self._key is not None and not self._awaited):
            raise RemoteProtocolError("a frame %s where it must not be" % ("encrypted" if sealed else "in the clear"))
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
            chacha20_poly1305().aead.open(content, bytes(view[start + 1:start + 13]), self._key)
            content = content[:-chacha20_poly1305().aead.tag]
        kind, what = self._decode(content)
        return kind, what, body + size

    def _decode(self, content: memoryview) -> tuple[int, Any]:
        # Data first and by hand: nearly every frame is one, and its bytes need no copy.
        if content and content[0] in (DATA_VARIANT, UDP_DATA_VARIANT) and not self._awaited:
            decoder = Decoder(content[1:])
            if decoder.varint() != decoder.left:
                raise RemoteProtocolError("a Data whose length does not fit its frame")
            data = content[len(content) - decoder.left:]
            if data or content[0] == UDP_DATA_VARIANT:
                return DATA if content[0] == DATA_VARIANT else UDP_DATA, data
            content = data  # an empty Data means Shutdown
        message = decode_message(content) if content else Shutdown()
        if isinstance(message, Error):
            return ERROR, message
        if isinstance(message, HandshakeCompletion) and self._awaited:
            self._awaited = False
            return OPENED, Opened("", 0)
        # Frames of an encrypted link can be replayed, and Rust sends no Shutdown on purpose: there only FIN is an end.
        if isinstance(message, Shutdown) and not self._awaited and self._key is None:
            return END, None
        raise RemoteProtocolError("a %s where none belongs" % type(message).__name__)


class LegacyWriter:
    """Frames of the legacy wire. With a `key` all frames are sealed but those that `clear_message` makes."""

    __slots__ = ("_key",)
    max_data = LEGACY_MAX_FRAME - 64  # variant, length and tag must fit into the same frame

    def __init__(self, key: bytes | None = None):
        self._key = key

    @staticmethod
    def clear_message(message: Any) -> bytes:
        """A whole frame in the clear, as the handshake uses."""
        body = encode_message(message)
        return _HEADER_CLEAR.pack(0, len(body)) + body

    def record(self, kind: int, *fields: Any) -> bytes:
        """Opened, or an Error in its place, where alone a Rust client shows one. This wire has no other records."""
        if kind == ERROR:
            return self.clear_message(Error(*fields))
        return self.clear_message(HandshakeCompletion()) if kind == OPENED else b""

    def data(self, scratch: memoryview, n: int, kind: int = DATA) -> memoryview:
        """The frame around the n bytes at scratch[HEADROOM:], made in place."""
        head = bytes((DATA_VARIANT if kind == DATA else UDP_DATA_VARIANT,)) + encode_varint(n)
        start, end = HEADROOM - len(head), HEADROOM + n
        scratch[start:HEADROOM] = head
        if self._key is None:
            header = _HEADER_CLEAR.pack(0, end - start)
        else:
            cipher, nonce = chacha20_poly1305().aead, os.urandom(12)
            cipher.seal(scratch[start:end], scratch[start:end + cipher.tag], nonce, self._key)
            end += cipher.tag
            header = _HEADER_SEALED.pack(1, nonce, end - start)
        scratch[start - len(header):start] = header
        return scratch[start - len(header):end]

    def datagrams(self, scratch: memoryview, end: int) -> bytes:
        """A frame for each datagram of the run (session u32, length u16, bytes) at scratch[HEADROOM:end]."""
        return b"".join(
            self.data(memoryview(bytearray(HEADROOM) + data + bytes(TAILROOM)), len(data), UDP_DATA)
            for _, data in split_datagrams(scratch[HEADROOM:end]))


DATAGRAM_HEADER = struct.Struct(">IH")
_LENGTH = struct.Struct(">I")


def split_datagrams(run: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(session, bytes) of each datagram in a Datagrams record; RemoteProtocolError where a length passes its end."""
    at, size, header = 0, len(run), DATAGRAM_HEADER.size
    while at < size:
        number, length = DATAGRAM_HEADER.unpack_from(run, at) if size - at >= header else (0, size)
        at += header + length
        if at > size:
            raise RemoteProtocolError("a datagram passes the end of its record")
        yield number, run[at - length:at]


class RecordReader(CipherState):
    """Records of ratrod2."""

    __slots__ = ("wanted",)
    wanted: int

    def next(self, view: memoryview, start: int, end: int) -> Record | None:
        """As LegacyReader's: (type, content, where it ends), or None and `wanted`."""
        body = start + 4
        if end < body:
            self.wanted = 4
            return None
        tag, length = self.tag, bytes(view[start:body])
        size = int.from_bytes(length, "big")
        # The type, and so its own limit, is known only after the tag has been verified.
        if not tag < size <= tag + 1 + MAX_CONTENT:
            raise LinkSpoiled("a record of %d bytes" % size)
        after = body + size
        if end < after:
            self.wanted = 4 + size
            return None
        self._open(view[body:after], self._next_nonce(), self._key, length)
        kind, content = view[body], view[body + 1:after - tag]
        if kind == DATA and content or kind == DATAGRAMS:
            return kind, content, after
        if kind == DATA or len(content) > MAX_SMALL_CONTENT:
            raise RemoteProtocolError("a record with %d bytes of content" % len(content))
        small = bytes(content)
        return kind, decode_open(small) if kind == OPEN else decode_content(kind, small), after


class RecordWriter(CipherState):
    """Records of ratrod2."""

    __slots__ = ()
    max_data = MAX_CONTENT

    def record(self, kind: int, *fields: Any) -> bytes:
        """A whole record of any type but Data and Datagrams; an Open has the message Open in place of fields."""
        content = encode_open(*fields) if kind == OPEN else encode_content(kind, *fields)
        sealed = bytearray(1 + len(content) + self.tag)
        length = _LENGTH.pack(len(sealed))
        self._seal(b"%c%b" % (kind, content), sealed, self._next_nonce(), self._key, length)
        return length + sealed

    def data(self, scratch: memoryview, n: int, kind: int = DATA) -> memoryview:
        """The record around the n bytes at scratch[HEADROOM:], made in place."""
        scratch[HEADROOM - 1] = kind
        return self.seal(scratch[HEADROOM - 1:HEADROOM + n], scratch)

    def seal(self, plain: memoryview, scratch: memoryview) -> memoryview:
        """The record of `plain`, which begins with the type's byte, made in `scratch`."""
        size = len(plain) + self.tag
        end, length = HEADROOM - 1 + size, _LENGTH.pack(size)
        scratch[HEADROOM - 5:HEADROOM - 1] = length
        self._seal(plain, scratch[HEADROOM - 1:end], self._next_nonce(), self._key, length)
        return scratch[HEADROOM - 5:end]

    def datagrams(self, scratch: memoryview, end: int) -> memoryview:
        """One record of the run at scratch[HEADROOM:end]."""
        return self.data(scratch, end - HEADROOM, DATAGRAMS)

# ======================================================================================================================
# 6. Handshakes: bytes in, bytes out
# ======================================================================================================================


def diffie_hellman(private: bytes, public: bytes) -> bytes:
    """X25519 of two times 32 bytes; RemoteProtocolError where the peer's key is no point that leads to a secret."""
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


def read_until(ends: tuple[bytes, ...], read: bytearray, most: int, too_long: str) -> Generator[int, bytes, bytearray]:
    """`read`, with what comes up to and with one of `ends`; RemoteProtocolError(too_long) where `most` have none."""
    while not read.endswith(ends):
        if len(read) >= most:
            raise RemoteProtocolError(too_long)
        # As many bytes as are certainly missing: what comes behind the end is for others to read.
        missing = min(next(n for n in range(1, len(end) + 1) if read.endswith(end[:len(end) - n])) for end in ends)
        read += yield min(missing, most - len(read))
    return read


class Handshake:
    """One side of a handshake, without a socket: give what arrives to receive_data(), and send what data_to_send()
    gives. Any error is final; data_to_send() may hold a last word then. The arguments are those of `_run`.

    `wanted` is how many more bytes it can use now; read no more than that, for what follows is not its own. The last
    handshake on a connection has `peer_key`, `reader`, `writer`, `suite` and `instance`.
    """

    bare = False  # whether its records go in the clear, for a pipe that ssh has sealed
    is_heavy = False  # whether the next step takes public-key work, some 0.3 ms, which belongs on a thread
    has_started = is_done = False
    steps = 0  # messages of the other side that were answered
    successor: Handshake | None = None  # the handshake that follows on the same connection
    peer_key = instance = b""
    suite = "none, in the clear"
    reader: LegacyReader | RecordReader
    writer: LegacyWriter | RecordWriter
    # The error where the connection ends too early; {} says how.
    end: tuple[type[RatrodError], str] = RemoteProtocolError, "{} during the handshake"
    who = "the other side"

    def __init__(self, *asked: Any, **named: Any):
        self._received, self._to_send, self._needed = bytearray(), bytearray(), 0
        self._script = self._run(*asked, **named)

    def _run(self, *asked: Any, **named: Any) -> Script:
        """Yields the number of bytes that it needs next, and gets exactly those."""
        raise NotImplementedError

    def start(self) -> None:
        """The first step, which may have something to send."""
        self.has_started = True
        self._step(None)

    def _step(self, chunk: Any) -> None:
        self.is_heavy, self._needed = False, 0
        try:
            self._needed = self._script.send(chunk)
            self.steps += bool(chunk and self._to_send)
        except StopIteration:
            self.is_done = True

    @property
    def wanted(self) -> int:
        return self._needed - len(self._received)

    def data_to_send(self) -> bytes:
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def receive_data(self, data: bytes) -> None:
        """Takes the peer's next bytes, no more than `wanted`. RemoteProtocolError where they are wrong."""
        if len(data) > self.wanted:
            raise LocalProtocolError("%d bytes for a handshake that wants %d" % (len(data), self.wanted))
        self._received += data
        if data and not self.wanted:
            chunk = bytes(self._received)
            self._received.clear()
            self._step(chunk)

    def receive_eof(self, why: str = "") -> NoReturn:
        """There is no more: `why` says how the connection ended."""
        error, text = self.end
        raise error(text.format(why or self.who + " closed the connection"))


class KeyHandshake(Handshake):
    """What the handshakes of both wires share: this side proves its key, and judges the peer's.

    `check_key(key)` raises AuthenticationError where the peer is not known, at a server also Overloaded.
    """

    _keys: KeyPair
    _check_key: Callable[[bytes], None]

    def _take_peer(self, key: bytes) -> None:
        """The peer has proved that this key is its own."""
        self.peer_key = key
        # A legacy server signs anything for anybody: its own key proves nothing, wherever it is listed.
        if key == self._keys.public:
            raise AuthenticationError(SAME_KEY % encode_key(key))
        self._check_key(key)


# ---------------------------------------------------------------------------------------------------- legacy


class LegacyHandshake(KeyHandshake):
    """The parts of the legacy handshake that both sides share."""

    def _begin(self, keys: KeyPair, check_key: Callable[[bytes], None], ephemeral: bytes | None = None,
               challenge: bytes | None = None) -> None:
        self._keys, self._check_key = keys, check_key
        self._ephemeral, self._challenge = ephemeral or os.urandom(32), challenge or os.urandom(32)

    def _send(self, message: Any) -> None:
        self._to_send += LegacyWriter.clear_message(message)

    def _receive(self, expected: type[Any]) -> Generator[int, bytes, Any]:
        """One message in the clear; RemoteProtocolError unless it is an `expected` one, PeerError for an Error."""
        if (yield 1) != b"\0":
            raise RemoteProtocolError("the other side does not speak ratrod's legacy protocol")
        size = int.from_bytes((yield 8), "big")
        if not 0 < size <= MAX_HANDSHAKE_FRAME:
            raise RemoteProtocolError("a handshake message of %d bytes" % size)
        self.is_heavy = True
        message = decode_message((yield size))
        if isinstance(message, Error):
            raise PeerError(message.code, message.text)
        if not isinstance(message, expected):
            raise RemoteProtocolError("a %s in place of %s" % (type(message).__name__, expected.__name__))
        for name in ("challenge", "exchange_public_key"):
            if len(getattr(message, name, bytes(32))) != 32:
                raise RemoteProtocolError("a preamble with a %s of %d bytes" % (name, len(getattr(message, name))))
        return message

    def _authenticate(self, identity: str, signature: bytes, whose: str) -> None:
        """Takes the peer's identity where the peer signed our challenge."""
        try:
            key = decode_key(identity)
        except ValueError:
            raise RemoteProtocolError("the %s's public key is not a key" % whose) from None
        if not verify(key, self._challenge, signature):
            raise AuthenticationError("the %s's signature is wrong: it does not own the key `%s`" % (whose, identity))
        self._take_peer(key)

    def _shared_key(self, preamble: Any, salt: bytes) -> bytes:
        """The key of both directions, by RFC 5869's HKDF of one block. Its salt and info are the two challenges."""
        secret = diffie_hellman(self._ephemeral, preamble.exchange_public_key)
        return hmac_sha256(hmac_sha256(salt, secret), salt + b"\x01")


class LegacyClientHandshake(LegacyHandshake):
    """The client's side up to ClientAuthentication. HandshakeCompletion is the link's: data may follow at once."""

    is_heavy = True

    def _run(self, keys: KeyPair, open_: Open, *, should_encrypt: bool = False, check_key: Callable[[bytes], None],
             **fixed: bytes) -> Script:
        self._begin(keys, check_key, **fixed)
        ephemeral = sodium().crypto_scalarmult_base(self._ephemeral)
        self._send(ClientPreamble(ephemeral, open_.target, self._challenge, should_encrypt, open_.kind == UDP))
        server = yield from self._receive(ServerPreamble)
        self._authenticate(server.identity_public_key, server.signature, "server")
        # Before the server lets it in, and connects to the remote: the server's exchange key may be none.
        key = self._shared_key(server, server.challenge + self._challenge) if should_encrypt else None
        self._send(ClientAuthentication(encode_key(keys.public), keys.sign(server.challenge)))
        self.reader, self.writer = LegacyReader(key, awaited=True), LegacyWriter(key)


class LegacyServerHandshake(LegacyHandshake):
    """The server's side up to ClientAuthentication. HandshakeCompletion, or Error in its place, is the link's."""

    remote, is_udp = "", False  # what the client asks for, known at the end

    def _run(self, keys: KeyPair, check_key: Callable[[bytes], None], **fixed: bytes) -> Script:
        self._begin(keys, check_key, **fixed)
        client = yield from self._receive(ClientPreamble)
        ephemeral, signature = sodium().crypto_scalarmult_base(self._ephemeral), keys.sign(client.challenge)
        self._send(ServerPreamble(encode_key(keys.public), ephemeral, signature, self._challenge))
        answer = yield from self._receive(ClientAuthentication)
        # Before the client is let in: its exchange key may be none.
        key = self._shared_key(client, self._challenge + client.challenge) if client.should_encrypt else None
        try:
            self._authenticate(answer.identity_public_key, answer.signature, "client")
        except (AuthenticationError, Overloaded) as error:
            self._send(refusal(error))
            raise
        self.remote, self.is_udp = client.remote, client.is_udp
        self.reader, self.writer = LegacyReader(key), LegacyWriter(key)


# ---------------------------------------------------------------------------------------------------- ratrod2: Noise XX

OPENING = b"ratrod2\n"  # the first bytes of a link, and the prologue
NOISE_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"  # revision 34 of the specification, whose names these classes use
NAME_LEGACY = "this may be an original ratrod, or one that serves its wire: if you trust it, connect with --legacy"
OVERLOADED = b"\0\0"  # a handshake message of length 0: the server turns a stranger away for want of room


@functools.lru_cache(maxsize=4)  # of the same identity in each handshake: 40 µs
def public_half(s: bytes) -> bytes:
    return sodium().crypto_scalarmult_base(s)


class HandshakeState:
    """The XX pattern, with its SymmetricState: sections 5.2 and 5.3 of the Noise specification. `s` and `e` are private
    X25519 keys, `remote` has the peer's public ones; `h` is the handshake hash."""

    _PATTERN = (("e",), ("e", "ee", "s", "es"), ("s", "se"))

    def __init__(self, initiator: bool, prologue: bytes, s: bytes, e: bytes):
        self._initiator, self._keys = initiator, {"s": s, "e": e}
        self.remote: dict[str, bytes] = {}
        self._messages = iter(self._PATTERN)
        self.h = self._ck = NOISE_NAME  # exactly 32 bytes: no hash needed
        self._cipher: CipherState | None = None
        self._mix_hash(prologue)

    def write_message(self, payload: bytes) -> bytes:
        buffer = b""
        for token in next(self._messages):
            if token in self._keys:  # there is no cipher yet where e is sent, so that it goes in the clear
                half = public_half if token == "s" else sodium().crypto_scalarmult_base
                buffer += self._encrypt_and_hash(half(self._keys[token]))
            else:
                self._mix_key(token)
        return buffer + self._encrypt_and_hash(payload)

    def read_message(self, message: bytes) -> bytes:
        """The payload of `message`. RemoteProtocolError where it was not made for this handshake."""
        decoder = Decoder(message)
        for token in next(self._messages):
            if token in self._keys:
                self.remote[token] = self._decrypt_and_hash(decoder.take(48 if self._cipher else 32))
            else:
                self._mix_key(token)
        return self._decrypt_and_hash(decoder.take(decoder.left))

    def _mix_key(self, token: str) -> None:
        """DH of two keys: the first letter names the initiator's, the second the responder's."""
        mine, theirs = (token[0], token[1]) if self._initiator else (token[1], token[0])
        self._ck, k = self._hkdf(diffie_hellman(self._keys[mine], self.remote[theirs]))
        self._cipher = CipherState(chacha20_poly1305(), k)

    def _mix_hash(self, data: bytes) -> None:
        self.h = sha256(self.h + data)

    def _encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = self._cipher.encrypt_with_ad(self.h, plaintext) if self._cipher else plaintext
        self._mix_hash(ciphertext)
        return ciphertext

    def _decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = self._cipher.decrypt_with_ad(self.h, ciphertext) if self._cipher else ciphertext
        self._mix_hash(ciphertext)
        return plaintext

    def _hkdf(self, input_key_material: bytes) -> tuple[bytes, bytes]:
        temporary = hmac_sha256(self._ck, input_key_material)
        first = hmac_sha256(temporary, b"\x01")
        return first, hmac_sha256(temporary, first + b"\x02")

    def split(self) -> tuple[bytes, bytes, bytes]:
        """k1, of the initiator's records, k2, of the responder's, and the handshake hash."""
        return (*self._hkdf(b""), self.h)


def record_key(suite: Suite, k: bytes, h: bytes) -> bytes:
    """The key of one direction's records, from one of Split()'s keys and the handshake hash."""
    label = b"ratrod2 " + bytes((suite.id,)) + h + b"\x01"
    return hmac_sha256(k, label)[:suite.key_size]


class NoiseHandshake(KeyHandshake):
    """The parts of ratrod2's handshake that both sides share. They offer some `suites`, best first."""

    STRANGERS = {b"SS": "sshd (with ssh://host, ratrod goes through it)", b"HT": "a web server",
                 b"\x15\x03": "a TLS server", b"22": "a mail or FTP server"}  # by the first two bytes of what they say
    _is_initiator = False

    def _begin(self, keys: KeyPair, check_key: Callable[[bytes], None], ephemeral: bytes | None) -> None:
        self._keys, self._check_key = keys, check_key
        self._noise = HandshakeState(self._is_initiator, OPENING, keys.exchange_key(), ephemeral or os.urandom(32))

    def _send(self, payload: bytes) -> None:
        message = self._noise.write_message(payload)
        self._to_send += len(message).to_bytes(2, "big") + message

    def _receive(self, shortest: int) -> Generator[int, bytes, bytes]:
        """The payload of the next message, `shortest` bytes or more."""
        head = yield 2
        if head == OVERLOADED and self._is_initiator:  # the server closes then; a legacy frame begins so and goes on
            self.end = Overloaded, "the server is overloaded: more clients come in than it can take; try again later"
            yield 1
            raise RemoteProtocolError("the server does not answer in ratrod2; " + NAME_LEGACY)
        size = int.from_bytes(head, "big")
        if not 0 < size <= MAX_NOISE_MESSAGE:
            who = self.STRANGERS.get(head)
            raise RemoteProtocolError("the other side does not speak ratrod2; what it says begins with %s%s" % (
                ascii(head)[1:], ", as from " + who if who else ""))
        self.is_heavy, self.end = True, (self.end[0], Handshake.end[1])
        payload = self._noise.read_message((yield size))
        if len(payload) < shortest:
            raise RemoteProtocolError("a handshake message with %d bytes of payload" % len(payload))
        return payload

    def _identify(self, identity: bytes) -> None:
        """Takes the peer's Ed25519 identity where its X25519 form is the key that this handshake has authenticated."""
        try:
            converted = sodium().crypto_sign_ed25519_pk_to_curve25519(identity)
        except Exception:  # not a point; the type that PyNaCl raises is no promise
            converted = b""
        if converted != self._noise.remote["s"]:  # both are public
            raise AuthenticationError("the other side's key does not belong to its handshake")
        self._take_peer(identity)

    def _finish(self, suite: Suite) -> None:
        k1, k2, h = self._noise.split()
        mine, theirs = (k1, k2) if self._is_initiator else (k2, k1)
        self.suite = suite.name + (" through nacl._sodium" if suite.aead.fast else " through nacl.bindings")
        self.reader = RecordReader(suite, record_key(suite, theirs, h))
        self.writer = RecordWriter(suite, record_key(suite, mine, h))


class NoiseClientHandshake(NoiseHandshake):
    """The client's side up to ClientAuthentication; records may follow at once. `is_known`: the client was let in
    before, so that --legacy is no advice where a server is silent now."""

    is_heavy = _is_initiator = True
    who = "the server"

    def _run(self, keys: KeyPair, suites: Sequence[Suite], *, check_key: Callable[[bytes], None],
             is_known: bool = False, ephemeral: bytes | None = None) -> Script:
        self._begin(keys, check_key, ephemeral)
        if not is_known:
            self.end = RemoteProtocolError, "{} before it said anything; " + NAME_LEGACY
        self._to_send += OPENING
        self._send(bytes((len(suites), *(suite.id for suite in suites))))
        payload = yield from self._receive(41)
        suite = next((suite for suite in suites if suite.id == payload[32]), None)
        if suite is None:
            raise RemoteProtocolError("the server chose the cipher suite %d, which was not offered" % payload[32])
        self.instance = payload[33:41]
        self._identify(payload[:32])
        self._send(keys.public)
        self._finish(suite)


class NoiseServerHandshake(NoiseHandshake):
    """The server's side, up to and with HandshakeCompletion, or an Error in its place."""

    end = Departed, "{} during the handshake"

    def _run(self, keys: KeyPair, suites: Sequence[Suite], *, check_key: Callable[[bytes], None], instance: bytes,
             ephemeral: bytes | None = None) -> Script:
        self._begin(keys, check_key, ephemeral)
        self.instance = instance
        if (yield len(OPENING)) != OPENING:
            raise RemoteProtocolError("it does not speak ratrod2")
        decoder = Decoder((yield from self._receive(1)))
        theirs = decoder.take(decoder.number(1))
        if chacha20_poly1305().id not in theirs:
            raise RemoteProtocolError("a client that does not offer ChaCha20-Poly1305")
        suite = next(suite for number in theirs for suite in suites if suite.id == number)
        self._send(keys.public + bytes((suite.id,)) + instance)
        self.end = Departed, "{} during the handshake; it may not know this server's key"
        payload = yield from self._receive(32)
        self._finish(suite)
        try:
            self._identify(payload[:32])
        except (AuthenticationError, Overloaded) as error:
            if self.peer_key:
                self._to_send += self.writer.record(ERROR, *refusal(error))
            raise
        self._to_send += self.writer.record(COMPLETED, __version__)


class FirstByte(Handshake):
    """At a server: the first byte tells the wire. `choose(is_legacy)` gives its handshake, None if it is not served."""

    end = Speechless, "{} without a word"

    def _run(self, choose: Callable[[bool], Handshake | None]) -> Script:
        first = yield 1
        is_legacy = first in b"\0\1"
        if not is_legacy and first != OPENING[:1]:
            raise RemoteProtocolError("it does not speak ratrod")
        self.successor = choose(is_legacy)
        if self.successor is None:
            self._to_send += LegacyWriter.clear_message(Error(
                UNKNOWN, "this server speaks ratrod2; start it with --legacy, or take a client that speaks ratrod2"))
            raise RemoteProtocolError("a client of the original's wire: serve it with --legacy, if you know its price")
        self.successor.start()
        self.successor.receive_data(first)


class PipeHandshake(Handshake):
    """Over a pipe that ssh has authenticated and sealed. The client sends `program`, the far side, which has none,
    answers with `marker`, which nobody can guess, and both go on with bare records. `seen`: what came until then."""

    bare, suite = True, "ssh's own"
    MAX_CHATTER = 64 * 1024

    def __init__(self, program: bytes = b"", marker: bytes = b""):
        super().__init__(program, marker)
        self.seen = bytearray()
        self.reader, self.writer = RecordReader(NO_SUITE, b""), RecordWriter(NO_SUITE, b"")

    def _run(self, program: bytes, marker: bytes) -> Script:
        self._to_send += program
        too_long = "its login shell prints more than %d bytes" % self.MAX_CHATTER
        yield from read_until((marker,), self.seen, self.MAX_CHATTER, too_long)


# ---------------------------------------------------------------------------------------------------- SOCKS

SOCKS_SIZES = {1: 4, 4: 16}  # bytes of an address by its type; type 3 is a name behind its length


def read_short() -> Generator[int, bytes, bytes]:
    """Bytes behind their number, which is one byte."""
    size = (yield 1)[0]
    return (yield size) if size else b""


def read_socks_address() -> Generator[int, bytes, str]:
    """`host:port` of an address as SOCKS5 writes it; "" where its type is unknown or its name is empty."""
    kind = (yield 1)[0]
    host = (yield from read_short()) if kind == 3 else (yield SOCKS_SIZES[kind]) if kind in SOCKS_SIZES else b""
    return socks_target(kind, host, (yield 2)) if host else ""


def socks_target(kind: int, host: bytes, port: bytes) -> str:
    """`host:port` of the parts of a SOCKS5 address. Whether the host is one is for others to judge."""
    shown = host.decode("utf-8", "replace") if kind == 3 else str(parse_ip(host))
    # Not an Address: a name that looks like a path must stay a name, not become a Unix socket.
    return show_host_port(shown, int.from_bytes(port, "big"))


def socks_address(target: Address) -> bytes:
    """An address as SOCKS5 writes it."""
    host = parse_ip(target.host).packed if is_address(target.host) else target.host.encode("ascii")
    head = {4: b"\1", 16: b"\4"}[len(host)] if is_address(target.host) else bytes((3, len(host)))
    return head + host + target.port.to_bytes(2, "big")


def socks_reply(version: int, code: int, bound: Address = Address("0.0.0.0", 0)) -> bytes:  # noqa: B008 - a constant
    """The answer to a request. `code` is version 5's; version 4 knows 90, granted, and 91, failed."""
    return bytes((0, 91 if code else 90)) + bytes(6) if version == 4 else bytes((5, code, 0)) + socks_address(bound)


def measure_socks_head(data: memoryview) -> int:
    """Where the payload of a SOCKS5 client's datagram begins; ValueError where it is none, or a fragment."""
    kind = data[3] if len(data) > 4 else 0
    size = 1 + data[4] if kind == 3 else SOCKS_SIZES.get(kind, 0)
    if size < 2 or len(data) < size + 6 or data[2]:
        raise ValueError("not a whole SOCKS5 datagram")
    return size + 6


def split_socks_datagram(data: memoryview) -> tuple[str, int]:
    """(target, where the payload begins) of a SOCKS5 client's datagram."""
    end = measure_socks_head(data)
    start = 5 if data[3] == 3 else 4
    return socks_target(data[3], bytes(data[start:end - 2]), bytes(data[end - 2:end])), end


class SocksHandshake(Handshake):
    """The server's side of SOCKS, up to the request: `version`, `command` and `target`. The caller answers it.

    Version 5 is RFC 1928, and RFC 1929 where `user`, `name:password`, is asked for. Versions 4 and 4a have no password.
    """

    CONNECT, ASSOCIATE = 1, 3
    end = Departed, "{}"
    version, command, target = -1, 0, ""  # -1: nothing was heard

    def _run(self, user: str | None = None) -> Script:
        self._user = (user or "").encode("utf-8", "surrogateescape")
        self.version = (yield 1)[0]
        yield from {5: self._run_5, 4: self._run_4}.get(self.version, self._refuse_stranger)()

    def _refuse(self, answer: bytes, why: str) -> NoReturn:
        self._to_send += answer
        raise RemoteProtocolError(why)

    def _run_5(self) -> Script:
        methods, wanted = (yield from read_short()), 2 if self._user else 0
        if wanted not in methods:
            self._refuse(b"\5\xff", "it gives no user and password, which --socks-user asks for" if wanted else
                         "it does not offer to go without a password")
        self._to_send += bytes((5, wanted))
        if wanted:
            yield from self._authenticate()
        version, self.command, _ = yield 3
        self.target = yield from read_socks_address()
        if version != 5 or not self.target:
            self._refuse(socks_reply(5, 8 if version == 5 else 1), "its SOCKS5 request cannot be understood")

    def _authenticate(self) -> Script:
        import hmac

        version = (yield 1)[0]
        name, password = (yield from read_short()), (yield from read_short())
        is_good = version == 1 and hmac.compare_digest(name + b":" + password, self._user)
        self._to_send += bytes((1, not is_good))
        if not is_good:
            raise AuthenticationError("it gives another user or password than --socks-user")

    def _run_4(self) -> Script:
        failed = socks_reply(4, 1)
        if self._user:
            self._refuse(failed, "it speaks SOCKS4, which has no password, and --socks-user asks for one: use SOCKS5")
        head = yield 7
        too_long = "its SOCKS4 request has no end"
        yield from read_until((b"\0",), bytearray(), 256, too_long)  # a user, which proves nothing
        self.command, kind, host = head[0], 1, head[3:]
        if host[:3] == bytes(3) and host[3]:  # version 4a
            kind, host = 3, bytes((yield from read_until((b"\0",), bytearray(), 256, too_long))[:-1])
        self.target = socks_target(kind, host, head[1:3])
        if self.command != self.CONNECT:
            self._refuse(failed, "it asks for more than CONNECT, and SOCKS4 has nothing else here")

    def _refuse_stranger(self) -> Script:
        head = bytes((self.version,))
        while re.fullmatch(b"[A-Z][A-Z-]{0,19}", head):
            head += yield 1
        if re.fullmatch(b"[A-Z-]+ ", head):
            text = ("This port is a SOCKS5 proxy. It is no HTTP proxy and no web server. Name it as"
                    " socks5h://host:port, as in ALL_PROXY or curl --proxy.\n")
            self._refuse(http_answer("400 Bad Request", text),
                         "it speaks HTTP to a SOCKS proxy: name that as socks5h://host:port there, not as http://")
        raise RemoteProtocolError("it does not speak SOCKS" + ", but TLS: name the proxy as socks5h://host:port there"
                                  * (head == b"\x16"))


# -------------------------------------------------------------------------------- proxies, PROXY header, HTTP


class ProxyHandshake(Handshake):
    """A proxy is asked to connect to `server` before that can be talked to. Nothing behind its answer is read."""

    who, end = "it", (RemoteProtocolError, "{} before it had answered")
    MAX_ANSWER = 16 * 1024  # of HTTP
    FAILURES = ("", "it failed, and does not say why", "its rules do not allow that", "the network is unreachable",
                "the host is unreachable", "the connection was refused", "the time to live has expired",
                "it cannot connect at all", "it cannot take such an address")  # of SOCKS5

    def _run(self, proxy: Proxy, server: Address) -> Script:
        ask = {"http": self._ask_http, "socks5": self._ask_socks5}[proxy.scheme]
        return ask(proxy, server._replace(host=parse_host(server.host)))

    def _ask_http(self, proxy: Proxy, target: Address) -> Script:
        """HTTP's CONNECT (RFC 9110, 9.3.6), with Basic authentication (RFC 7617)."""
        self._to_send += "CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n".format(target).encode("ascii")
        if proxy.user is not None:
            login = base64.b64encode(proxy.user + b":" + proxy.password)
            self._to_send += b"Proxy-Authorization: Basic " + login + b"\r\n"
        self._to_send += b"\r\n"
        answer = bytearray((yield 5))
        if answer != b"HTTP/":
            raise RemoteProtocolError("it does not speak HTTP")
        too_long = "its answer has more than %d bytes" % self.MAX_ANSWER
        yield from read_until((b"\n\r\n", b"\n\n"), answer, self.MAX_ANSWER, too_long)
        text = answer.decode("latin-1")
        status = text.split("\n")[0].strip()
        said = "it answered `%s`" % printable(status)
        code = (re.findall(r"^HTTP/[0-9.]+ ([0-9]{3})\b", status, re.ASCII) or [""])[0]
        if code in ("401", "407"):
            schemes = self._schemes(text)
            if schemes and "basic" not in map(str.lower, schemes):
                self._refuse_method("%s; it takes only %s" % (said, printable(" and ".join(schemes))))
            self._refuse_user(proxy, said + "; ")
        if not code.startswith("2"):
            raise RemoteProtocolError(said)

    @staticmethod
    def _schemes(text: str) -> list[str]:
        """The ways to authenticate that an answer offers (RFC 9110, 11.6.1): `NTLM`, `Digest`, ..."""
        # Without what stands in quotation marks, where a comma separates nothing, and without the ends of folded lines.
        text = re.sub(r'"(?:\\.|[^"\\\n])*"?|\r?\n(?=[ \t])', "", text)
        challenges = re.findall(r"^(?:proxy|www)-authenticate[ \t]*:(.*)$", text, re.IGNORECASE | re.MULTILINE)
        # A word that "=" follows is a parameter of the scheme before it.
        scheme = r"(?:^|,)\s*([\w!#$%&'*+.^`|~-]+)(?!\s*=)(?=[\s,]|$)"
        return list(dict.fromkeys(re.findall(scheme, ",".join(challenges))))

    def _ask_socks5(self, proxy: Proxy, target: Address) -> Script:
        """SOCKS5 (RFC 1928, and RFC 1929 where there is a user). Names are looked up at the proxy."""
        methods = b"\0" if proxy.user is None else b"\0\2"
        self._to_send += bytes((5, len(methods))) + methods
        version, method = yield 2
        if version != 5:
            hint = ", but HTTP: write http:// for socks5://" if version == ord("H") else ""
            raise RemoteProtocolError("it does not speak SOCKS5" + hint)
        if method not in methods:
            if proxy.user is None:
                self._refuse_user(proxy)
            self._refuse_method("it takes neither a user with a password nor a client without; perhaps only GSSAPI")
        if method == 2:
            parts = proxy.user or b"", proxy.password
            self._to_send += b"\1" + b"".join(bytes((len(part),)) + part for part in parts)
            if (yield 2)[1]:
                self._refuse_user(proxy)
        self._to_send += b"\5\1\0" + socks_address(target)
        version, code, _ = yield 3
        if version != 5 or code:
            is_known = version == 5 and code < len(self.FAILURES)
            raise RemoteProtocolError(self.FAILURES[code] if is_known else "it answered %d" % code)
        if not (yield from read_socks_address()):
            raise RemoteProtocolError("it answered with an address that cannot be")

    @staticmethod
    def _refuse_user(proxy: Proxy, said: str = "") -> NoReturn:
        raise AuthenticationError(said + (
            "it wants a user and a password: %s://user:password@..." % proxy.scheme if proxy.user is None else
            "it takes another user and password"))

    @staticmethod
    def _refuse_method(said: str) -> NoReturn:
        """No password is wrong: ratrod lacks the proxy's way of checking one."""
        raise RemoteProtocolError(said + ", which ratrod does not speak: run a local proxy that does, as px or cntlm,"
                                  " and name that one with --proxy")


# HAProxy's proxy-protocol.txt: the header in front of a connection that says where the connection came from.
PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_V2 = struct.Struct(">BBH")  # version and command, family and transport, bytes that follow


def proxy_header(visitor: str, own: Address) -> bytes:
    """The header, version 2, of a connection from `visitor`, `host:port`, to `own`; nobody's where it is no address."""
    try:
        host, port = split_host_port(visitor)
        source, source_port = parse_ip(host).packed, parse_port(port, lowest=0)
    except ValueError:
        return PROXY_SIGNATURE + PROXY_V2.pack(0x21, 0, 0)
    # The header has room for one family: where `own` is a name, or [::] that takes IPv4 too, its address is left open.
    here = parse_ip(own.host).packed if is_address(own.host) else b""
    body = source + here.rjust(len(source), b"\0")[:len(source)] + struct.pack(">HH", source_port, own.port)
    return PROXY_SIGNATURE + PROXY_V2.pack(0x21, 0x11 if len(source) == 4 else 0x21, len(body)) + body


class ProxyHeader(Handshake):
    """The header of a load balancer, version 1 or 2. `source`: the (address, port) that the connection came from, None
    where the header does not say. `is_local`: the balancer's own connection, as a health check."""

    source: tuple[str, int] | None = None
    is_local = False
    end: tuple[type[RatrodError], str] = Speechless, "{} without a word"

    def _run(self) -> Script:
        head = bytearray((yield 1))
        self.end = RemoteProtocolError, "{} in its PROXY header"
        head += yield len(PROXY_SIGNATURE) - 1  # the shortest header of version 1 is longer
        try:
            if head == PROXY_SIGNATURE:
                yield from self._version_2()
            elif head.startswith(b"PROXY "):
                yield from read_until((b"\r\n",), head, 107, "a PROXY header without an end")
                self._version_1(head[:-2].decode("latin-1"))
            else:
                raise RemoteProtocolError("no PROXY header, which --proxy-protocol asks for from there")
        except ValueError:
            raise RemoteProtocolError("a PROXY header that cannot be") from None

    def _version_2(self) -> Script:
        command, family, length = PROXY_V2.unpack((yield PROXY_V2.size))
        self.is_local = command == 0x20  # then nothing that follows means anything
        size = 0 if self.is_local else {0x11: 4, 0x21: 16}.get(family, 0)  # of an address: TCP over IPv4, over IPv6
        is_wrong = not self.is_local and (command != 0x21 or family & 15 > 2 or family >> 4 > 3)
        if is_wrong or not 2 * size + 4 * bool(size) <= length <= 2048:
            raise ValueError
        body = (yield length) if length else b""
        if size:
            self.source = str(parse_ip(body[:size])), int.from_bytes(body[2 * size:2 * size + 2], "big")

    def _version_1(self, line: str) -> None:
        words = line.split(" ")
        if words[1] == "UNKNOWN":
            return
        _, protocol, source, destination, port, _port = words
        families = {"TCP6" if ":" in word else "TCP4" for word in (source, destination) if parse_ip(word)}
        if "%" in line or families != {protocol}:  # a zone may be any text
            raise ValueError
        self.source = str(parse_ip(source)), parse_port(port, lowest=0)


class HttpRequest(Handshake):
    """The head of one HTTP request, for answer(method, path). Both are empty for any other text, and beyond 8 KiB."""

    def _run(self, answer: Callable[[bytes, bytes], bytes]) -> Script:
        found = None
        with contextlib.suppress(RemoteProtocolError):
            head = yield from read_until((b"\n\r\n", b"\n\n"), bytearray(), 8192, "")
            found = re.match(rb"([A-Z]+) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n", head)
        self._to_send += answer(*(found.groups() if found else (b"", b"")))


def http_answer(status: str, text: str, kind: str = "text/plain") -> bytes:
    """A whole answer of HTTP; the connection ends behind it."""
    return ("HTTP/1.1 %s\r\nContent-Type: %s; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        status, kind, len(text), text)).encode("ascii")

# ======================================================================================================================
# 7. Event loop
# ======================================================================================================================

Done = Callable[[Any, Union[Exception, None]], None]  # (the result, None) or (None, the error)
RunStep = Callable[[Callable[[], None], Done], None]
log = logging.getLogger("ratrod")
log.addHandler(logging.NullHandler())  # as a library ratrod is silent unless its user wants to hear
HAS_EPOLL = hasattr(selectors, "EpollSelector")
READ, WRITE = 1, 4 if HAS_EPOLL else 2  # as epoll has them, or `selectors`
NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)  # of a new socket, where the system can


def boot_time() -> float:
    """Seconds on a clock that counts sleep, where there is one: a machine that slept has not been listening."""
    return time.clock_gettime(CLOCK) if CLOCK is not None else time.monotonic()


class Poller(selectors.DefaultSelector):
    """The calls of epoll, on what this system has in its place."""

    def poll(self, timeout: float | None = None, _most: int = -1) -> list[tuple[int, int]]:
        return [(key.fd, mask) for key, mask in self.select(timeout)]


def new_scratch(size: int = SCRATCH_IN) -> memoryview:
    """Bytes on pages of their own, which the system gets back: malloc would keep 70 MB after a burst of 128 links."""
    import mmap

    # By default a forked process shares them.
    private: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return memoryview(mmap.mmap(-1, size, **private))


class TokenBucket:
    """`rate` a second, and up to `burst` at once."""

    __slots__ = ("_gap", "_burst", "_full_at")

    def __init__(self, rate: float, burst: float, now: float):
        self._gap, self._full_at = 1 / max(rate, 1e-9), now
        self._burst = burst * self._gap + 1e-6  # seconds to fill it; sums of floats are not exact

    def is_full(self, now: float) -> bool:
        return self._full_at <= now

    def take(self, now: float) -> bool:
        full_at = max(self._full_at, now) + self._gap
        if full_at - now > self._burst:
            return False
        self._full_at = full_at
        return True


class Complaints:
    """Log lines that a peer can cause, bounded so that nobody fills the disk with them: of each cause LOG_BURST at once
    and then LOG_RATE a second, and of all causes no more than LOG_RATE_IN_ALL allows. The failures of an authenticated
    client (`is_known`) have LOG_RATE_IN_ALL for themselves. The rest is counted, and said when a line is due again.
    Beyond SOURCES causes the further ones are one. With -v no line is left out."""

    def __init__(self) -> None:
        self._in_all = TokenBucket(LOG_RATE_IN_ALL, LOG_BURST_IN_ALL, time.monotonic())
        # By level and cause, a text with a %d which counts the rest.
        self._lines: dict[tuple[int, str], list[TokenBucket]] = {}
        self._muted: collections.Counter[tuple[int, str]] = collections.Counter()

    def complain(self, cause: str, line: str, is_known: bool = False, level: int = logging.ERROR) -> bool:
        """Logs `line`, or counts one more for `cause`, a text with a %d: whether the line was logged."""
        now = time.monotonic()
        kind = level, cause
        if kind not in self._lines:
            kind = kind if len(self._lines) < SOURCES else (
                logging.ERROR, "❌ %d more failures of other " + ("clients" if is_known else "causes"))
            self._lines.setdefault(kind, [TokenBucket(LOG_RATE_IN_ALL, LOG_BURST_IN_ALL, now)] if is_known else
                                   [TokenBucket(LOG_RATE, LOG_BURST, now), self._in_all])
        # Once a line was left out, all wait until sweep() has said how many: else it might never have its turn.
        is_due = log.isEnabledFor(logging.DEBUG) or kind not in self._muted and self._is_due(kind, now)
        if is_due:
            with contextlib.suppress(Exception):  # of a handler: no fault of who is complained of
                log.log(level, "%s", line)
        else:
            self._muted[kind] += 1
        return is_due

    def _is_due(self, kind: tuple[int, str], now: float) -> bool:
        return all(bucket.take(now) for bucket in self._lines[kind])

    def sweep(self) -> None:
        """Called every second or so: says what was left out."""
        now = time.monotonic()
        for kind in list(self._muted):
            if self._is_due(kind, now):
                log.log(kind[0], "%s", kind[1] % self._muted.pop(kind))
        for kind, lines in list(self._lines.items()):
            if kind not in self._muted and lines[0].is_full(now):
                del self._lines[kind]


class Turns:
    """Callbacks that wait for the loop, by key: the key that has used least of the loop's time goes first, within a key
    the callback that has waited longest. A key with thousands of busy links holds up another for a few ms at most."""

    def __init__(self) -> None:
        self.waiting: dict[bytes, collections.OrderedDict[Callable[[int], Any], int]] = {}  # callbacks, their masks
        self._order: list[tuple[float, bytes]] = []  # a heap: the keys that wait, and the seconds that each has used
        self._used: dict[bytes, float] = {}
        self._now = 0.0  # what the key that was served last had used; one that comes back begins there

    def add(self, key: bytes, callback: Callable[[int], Any], mask: int = 0) -> None:
        calls = self.waiting.get(key)
        if calls is None:
            calls = self.waiting[key] = collections.OrderedDict()
            heapq.heappush(self._order, (max(self._now, self._used.get(key, 0.0)), key))
        calls[callback] = calls.get(callback, 0) | mask

    def take(self, ready: list[tuple[Callable[[int], Any], int]]) -> Iterator[tuple[Callable[[int], Any], int]]:
        """What waits and what is ready, one by one for TURNS seconds. What is left then, or was added meanwhile, waits
        for the next round.

        Where nothing waits, the callbacks that are ready come in any order: to sort them by key each time cost an
        eighth of all the work on 16 new connections at once.
        """
        began = time.monotonic()
        until = began + TURNS
        while ready and not self.waiting and began <= until:
            yield ready.pop()
            began = time.monotonic()
        for callback, mask in ready:
            self.add(getattr(getattr(callback, "__self__", None), "peer_key", b""), callback, mask)
        left = sum(map(len, self.waiting.values()))
        while left and began <= until:
            used, key = heapq.heappop(self._order)
            self._now, calls = used, self.waiting[key]
            most = self._order[0][0] if self._order else NEVER
            while calls and left and used <= most and began <= until:  # until another key has used less
                yield calls.popitem(last=False)
                left -= 1
                ended = time.monotonic()
                used, began = used + ended - began, ended
            self._used[key] = used
            if calls:
                heapq.heappush(self._order, (used, key))
            else:
                del self.waiting[key]
        if not self._order:
            self._used.clear()
            self._now = 0.0


class EventLoop:
    """The one thread that owns every socket. Only call_soon_threadsafe() may be called from another thread."""

    def __init__(self) -> None:
        # epoll costs 0.6 µs less for an event than `selectors`, and 2 µs less for a socket: 8% of a short connection.
        try:
            self._poller: Any = select.epoll() if HAS_EPOLL else Poller()
            ours, self.waker = socket.socketpair()  # signals too write to the waker: that wakes the loop everywhere
        except OSError as error:
            raise RatrodError("cannot begin: %s (ulimit -n allows more descriptors)" % reason(error)) from None
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self.sockets: set[Any] = set()  # those of every Transport
        self.deadlines: list[tuple[float, int, Deadline]] = []  # a heap, of those that Deadline enters
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._turns = Turns()
        self.take_turn = self._turns.add  # take_turn(key, callback): callback(0) when this key has its turn
        # call_later(seconds, call); after 0 s in the next round, so that the others have their turn
        self.call_later = functools.partial(Deadline, self)
        self._is_stopped = self._is_woken = False
        self.most = descriptor_limit()
        self.spare = min(64, self.most // 8)  # descriptors for those that are in: accepting leaves them alone
        self.lock = threading.RLock()  # held for a round's callbacks: fork() waits for the end of the round
        self.now, self.awake = time.monotonic(), boot_time()  # of this round: exact enough for what counts in seconds
        self.complaints = Complaints()
        self.complain = self.complaints.complain
        self.last_words: dict[LastWord, None] = {}  # the oldest first
        # Shared: a callback sends or copies what is here before it returns. Buffers for each connection cost 256 KB.
        self.scratch_out = memoryview(bytearray(HEADROOM + MAX_CONTENT + TAILROOM))
        self.payload = self.scratch_out[HEADROOM:HEADROOM + MAX_CONTENT]
        self.scratch_in = new_scratch()
        self.portion, self._hurry_until = MAX_CONTENT, self.now  # bytes that one callback takes at most
        self._spare: list[memoryview] = []
        self._lent = 0
        self.waker.setblocking(False)
        self._wake_receiver = Transport(self, ours, self._on_wake)
        self._wake_receiver.want(READ)
        _loops.add(self)  # last: one that could not be made has nothing to forget in a forked process

    # ---- shared buffers

    def hurry(self) -> None:
        """Somebody waits for short answers: for a moment bulk takes short turns. Otherwise each of its callbacks, 0.4
        ms for 512 KiB, delays a round trip four times, and the p99 of 64 bytes is 25 times what it is alone."""
        self.portion, self._hurry_until = SHORT_TURN, self.now + HURRY

    def lend_scratch(self) -> memoryview | None:
        """scratch_in, which the caller keeps until give_back(): another takes its place. None: too many are lent."""
        if self._lent >= LENT_AT_ONCE:
            return None
        try:
            fresh = self._spare.pop() if self._spare else new_scratch()
        except OSError:  # no memory
            return None
        self._lent += 1
        lent, self.scratch_in = self.scratch_in, fresh
        return lent

    def give_back(self, lent: memoryview) -> None:
        self._lent -= 1
        self._spare.append(lent)

    def trim(self) -> None:
        """Gives memory back that a burst of bulk has left."""
        del self._spare[SPARE_BUFFERS:]

    # ---- sockets

    def watch(self, fd: int, before: int, events: int, callback: Callable[[int], Any]) -> None:
        """From now on callback(mask) whenever one of `events` is ready at the descriptor `fd`; 0 is none. `before`:
        what was watched until now."""
        if not events:
            del self._callbacks[fd]
            self._poller.unregister(fd)
        else:
            (self._poller.modify if before else self._poller.register)(fd, events)
            self._callbacks[fd] = callback

    def has_room(self, sock: socket.socket, spare: int = 0) -> bool:
        """Whether this new socket, and `spare` more, can be watched."""
        return (sock.fileno() if ARE_NUMBERED else len(self.sockets)) < self.most - spare

    def make_socket(self, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new socket that does not block; OSError where there is no descriptor left for it."""
        sock = socket.socket(family, kind | NONBLOCK)
        if not self.has_room(sock):
            sock.close()
            raise system_error(errno.EMFILE)
        if not NONBLOCK:
            sock.setblocking(False)
        return sock

    # ---- rounds

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        """call() in the loop's next round, if there is one."""
        self._calls.append(call)
        if not self._is_woken:  # first the call and then this, while the loop does it the other way round
            self._is_woken = True
            with contextlib.suppress(OSError):  # closed: this thread has outlived the loop
                self.waker.send(b"\0")

    def _on_wake(self, _mask: int) -> None:
        self._wake_receiver.recv_into(self.scratch_in)
        self._is_woken = False

    def run(self) -> None:
        """Until stop(). An exception of a callback is a bug: it ends what the callback belongs to, never the loop."""
        while not self._is_stopped:
            events = self._poller.poll(self._time_to_next_call(), 4096)
            # Now, for a callback may close a socket, and the next one get its number. Other bits are an error or a
            # hang-up: reading tells which.
            ready: Any = [(self._callbacks[fd], mask if mask < 8 else READ | WRITE) for fd, mask in events]
            with self.lock:
                self.now, self.awake = time.monotonic(), boot_time()
                if self.now > self._hurry_until:
                    self.portion = MAX_CONTENT
                if len(ready) > 1 or self._turns.waiting:
                    ready = self._turns.take(ready)
                for callback, mask in ready:
                    try:  # here, not in a function: 0.2 µs an event
                        callback(mask)
                    except Exception as error:
                        self.on_bug(callback, error)
                if self._calls or self.deadlines and self.deadlines[0][0] <= self.now:
                    for call in self._take_calls():
                        try:
                            call()
                        except Exception as error:
                            self.on_bug(call, error)

    def _take_calls(self) -> Iterator[Callable[[], None]]:
        """What is due in this round; calls that these make are left for the next one."""
        due, calls = [], len(self._calls)
        while self.deadlines and self.deadlines[0][0] <= self.now:
            due.append(heapq.heappop(self.deadlines))
        for when, _, deadline in due:
            call = deadline.take(when)
            if call:
                yield call
        for _ in range(calls):
            yield self._calls.popleft()

    def stop(self) -> None:
        self._is_stopped = True

    def close(self) -> None:
        _loops.discard(self)
        for sock in [*self.sockets, self.waker]:  # last words and tries to connect among them, which nothing ends now
            sock.close()
        self._poller.close()

    def forget(self) -> None:
        """In a forked child: closes its copies of this loop's descriptors, and nothing else: unregistering one would
        change the parent's epoll, and closing a socket may remove its file."""
        self._is_stopped = True
        self._calls.clear()
        with contextlib.suppress(OSError):  # a kqueue is not inherited
            self._poller.close()
        for sock in [*self.sockets, self.waker]:
            with contextlib.suppress(OSError):
                os.close(sock.detach())

    def _time_to_next_call(self) -> float | None:
        if self._calls or self._turns.waiting:
            return 0
        if not self.deadlines:
            return None
        left = self.deadlines[0][0] - time.monotonic()
        return left if left > 0 else 0  # max() costs a short connection 1%

    def on_bug(self, call: Callable[..., None], error: Exception) -> None:
        """An internal error in `call`, or in what was done for its owner: ends the owner."""
        *_, line = (line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_globals is globals())
        text = "❌ internal error in line %d, please report it: %r" % (line, error)
        self.complain("❌ %d more internal errors", text)
        try:
            getattr(getattr(call, "__self__", None), "abort", lambda _error: None)(error)
        except Exception as another:  # the bug left it in a state that cannot be ended either
            self.complain("❌ %d more internal errors", "❌ internal error, please report it: %r" % another)


# ---- fork(): the loops and their descriptors are the parent's

_loops: set[EventLoop] = set()


def _before_fork() -> None:
    for loop in list(_loops):
        loop.lock.acquire(timeout=1)  # no longer: a log handler may wait for a lock that this thread has


def _after_fork_in_parent() -> None:
    for loop in list(_loops):
        with contextlib.suppress(RuntimeError):  # it was not acquired
            loop.lock.release()


def _after_fork_in_child() -> None:
    while _loops:
        _loops.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent,
                        after_in_child=_after_fork_in_child)


class Deadline:
    """A call that is due at a time which may change often. Its entry stays on the loop's heap, and the time is looked
    at when the entry is due: 1,000 streams a second on a link would otherwise leave 1,000 cancelled entries."""

    __slots__ = ("when", "_loop", "_call", "_entry")
    _numbers = itertools.count()  # entries of one time are compared by these

    def __init__(self, loop: EventLoop, seconds: float = NEVER, call: Callable[[], None] | None = None):
        self._loop, self._entry, self.when = loop, NEVER, NEVER
        self._call: Callable[[], None] | None = None
        if call:
            self.set(seconds, call)

    def set(self, seconds: float, call: Callable[[], None]) -> None:
        """call() after so many seconds, in place of what was due before."""
        self.when, self._call = time.monotonic() + seconds, call
        if self.when < self._entry:
            self._add_entry()

    def clear(self) -> None:
        """Nothing is due. The heap keeps this alone, and nothing of its owner's."""
        self.when, self._call = NEVER, None

    def _add_entry(self) -> None:
        self._entry = self.when
        heapq.heappush(self._loop.deadlines, (self.when, next(self._numbers), self))

    def take(self, when: float) -> Callable[[], None] | None:
        """The entry of this time is due: the call, where it is due too."""
        if when != self._entry:  # a nearer one has taken its place
            return None
        self._entry, call = NEVER, self._call
        if self._loop.now < self.when < NEVER:
            self._add_entry()
            return None
        self.clear()
        return call


# ---------------------------------------------------------------------------------------------------- threads


class Threads:
    """At most `size` daemon threads, made as they are needed. A ThreadPoolExecutor would join its threads at exit, and
    a look-up that hangs would hold the process up."""

    def __init__(self, loop: EventLoop, size: int):
        self._loop, self._size = loop, size
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Done] | None] = queue.SimpleQueue()  # None: end
        self._lock = threading.Lock()
        self._threads = self._unfinished = 0

    def submit(self, task: Callable[[], Any], done: Done) -> None:
        """task() on a thread, then done() on the loop."""
        with self._lock:
            self._tasks.put((task, done))
            self._unfinished += 1
            if self._threads >= min(self._unfinished, self._size):
                return
            try:
                threading.Thread(target=self._work, daemon=True, name="ratrod worker").start()
                self._threads += 1
            except RuntimeError as error:  # ulimit -u, pids.max: the threads that are there do it, or the task fails
                if not self._threads:
                    self._tasks.get_nowait()
                    self._unfinished -= 1
                    failure = ConnectError("this system lets it start no thread for now (%s)" % error)
                    self._loop.call_soon_threadsafe(functools.partial(done, None, failure))

    def close(self) -> None:
        """Ends the idle threads now; those that are at work end when they are done."""
        with self._lock:
            for _ in range(self._threads):
                self._tasks.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the threads, so long at most: one that is in libsodium when the interpreter ends crashes it."""
        until = time.monotonic() + seconds
        while self._threads and time.monotonic() < until:
            time.sleep(0.005)

    def _work(self) -> None:
        for task, done in iter(self._tasks.get, None):
            result, error = None, None
            try:
                result = task()
            except Exception as raised:
                error = raised
            except BaseException as raised:  # sys.exit() or CancelledError in authorize(): the thread serves others too
                error = RatrodError("%s on a thread" % type(raised).__name__)
            with self._lock:
                self._unfinished -= 1
            self._loop.call_soon_threadsafe(functools.partial(done, result, error))
            del task, done, result, error  # an idle thread must not keep a socket alive
        with self._lock:
            self._threads -= 1


class KeyCounts:
    """A number for each key, and the sum of them; a key whose number is 0 is not in `by_key`."""

    def __init__(self) -> None:
        self.by_key: dict[Any, int] = {}
        self.total = 0

    def of(self, key: Any) -> int:
        return self.by_key.get(key, 0)

    def change(self, key: Any, n: int) -> None:
        self.total += n
        self.by_key[key] = left = self.by_key.get(key, 0) + n
        if not left:
            del self.by_key[key]


class FairQueue:
    """Begins at most `most` things at a time, and at most `most_of_key` of one key; the others wait for their turn.
    Things of a lower rank go first; within a rank the keys take turns. `newest_first`: a new key has the next turn, and
    of its things the newest, so that of more than can be served some are served in time, and not all too late."""

    def __init__(self, most: int = sys.maxsize, most_of_key: int = sys.maxsize, newest_first: bool = False):
        self._most, self._most_of_key, self._newest_first = most, most_of_key, newest_first
        self._running = KeyCounts()
        self._waiting: list[collections.OrderedDict[Any, collections.deque[Callable[[], None]]]] = [
            collections.OrderedDict() for _ in range(7)]  # for each rank the keys in their order
        self._is_beginning = False

    def begin(self, key: Any, call: Callable[[], None], rank: int = 0) -> None:
        """call() now or later; what it begins says done(key) once."""
        if not any(self._waiting) and self._running.total < self._most and self._may_begin(key):
            self._running.change(key, 1)  # as mostly: by the queue a short connection costs its server 4% more
            return call()
        waiting = self._waiting[rank]
        if key not in waiting:
            waiting[key] = collections.deque()
            waiting.move_to_end(key, last=not self._newest_first)
        waiting[key].append(call)
        return self._begin_waiting()

    def cancel(self, key: Any, call: Callable[[], None]) -> None:
        """Nobody waits for call() any more."""
        for waiting in self._waiting:
            if call in waiting.get(key, ()):
                waiting[key].remove(call)
                if not waiting[key]:
                    del waiting[key]

    def done(self, key: Any) -> None:
        self._running.change(key, -1)
        if any(self._waiting):
            self._begin_waiting()

    def _may_begin(self, key: Any) -> bool:
        return self._running.of(key) < self._most_of_key

    def _begin_waiting(self) -> None:
        if self._is_beginning:  # a thing that is done as soon as it is begun: the loop below goes on with the next one
            return
        self._is_beginning = True
        try:
            while self._running.total < self._most:
                may_begin = ((waiting, key) for waiting in self._waiting for key in waiting if self._may_begin(key))
                waiting, key = next(may_begin, (None, None))
                if waiting is None:
                    return
                call = waiting[key].pop() if self._newest_first else waiting[key].popleft()
                if waiting[key]:
                    waiting.move_to_end(key)
                else:
                    del waiting[key]
                self._running.change(key, 1)
                call()
        finally:
            self._is_beginning = False


class LookUp:
    """A name look-up, or another task that may hang; `waiting` are those that it is for. No name: it is authorize()."""

    __slots__ = ("key", "name", "task", "waiting", "deadline", "began", "start")

    def __init__(self, key: bytes, name: str, task: Callable[[], Any], done: Done, deadline: Deadline):
        self.key, self.name, self.task, self.deadline, self.began = key, name, task, deadline, NEVER
        self.waiting = [done]
        self.start: Callable[[], None]  # what waits in the queue


class LookUps(FairQueue):
    """Name look-ups on threads of their own: a name server that hangs holds up no handshake, and one client's look-ups
    hold up no other's. The more keys there are, the smaller is a key's share of the threads. Beyond the shares there
    are threads for keys that hold none, and for what takes the place of a look-up that nobody waits for any more. The
    system alone ends such a look-up; meanwhile it counts for its key."""

    MOST_WAITING = 4096  # answers that one key waits for, also for those that have left meanwhile: 13 MB

    def __init__(self, loop: EventLoop, limits: Limits):
        super().__init__(4 * limits.lookup_threads, limits.lookup_threads)
        self._loop, self._timeout = loop, limits.connect_timeout
        self._threads = Threads(loop, self._most)
        self._awaited = KeyCounts()  # of those that run
        self._asked = Quota(4 * self.MOST_WAITING, self.MOST_WAITING, "looks up as many targets")
        self._by_name: dict[tuple[bytes, str], LookUp] = {}

    def close(self) -> None:
        self._threads.close()

    def look_up(self, key: bytes, address: Address, done: Done) -> None:
        """done() gets (family, socket address) of each address of a host, within connect_timeout. All that ask for one
        name with one key meanwhile share a look-up."""
        def on_found(found: Any, error: Exception | None) -> None:
            done(found and [(family, (sockaddr[0], address.port, *sockaddr[2:])) for family, sockaddr in found], error)
        self.submit(key, functools.partial(look_up, Address(address.host, 0)), on_found, address.host.lower())

    def submit(self, key: bytes, task: Callable[[], Any], done: Done, name: str = "") -> None:
        """task() on a thread, then done(), within connect_timeout; one task for all that wait for the same name."""
        try:
            self._asked.take(key)
        except Overloaded as error:
            return done(None, error)
        if (key, name) in self._by_name:
            return self._by_name[key, name].waiting.append(done)
        made = LookUp(key, name, task, done, Deadline(self._loop))
        made.deadline.set(self._timeout, functools.partial(self._on_timeout, made))
        if name:
            self._by_name[key, name] = made
        made.start = functools.partial(self._start, made)
        return self.begin(key, made.start, 1 if name else 0)

    def _may_begin(self, key: bytes) -> bool:
        running, awaited = self._running, self._awaited
        if not running.of(key):
            return True
        share = max(1, (self._most_of_key - 1) // len(set(running.by_key).union(*self._waiting)))
        return (running.total < self._most - 1 and running.of(key) < self._most_of_key
                and awaited.total < self._most_of_key and awaited.of(key) < share)

    def _start(self, made: LookUp) -> None:
        made.began = self._loop.now
        self._awaited.change(made.key, 1)
        self._threads.submit(made.task, functools.partial(self._on_done, made))

    def _on_done(self, made: LookUp, result: Any, error: Exception | None) -> None:
        self._tell(made, result, error)
        self.done(made.key)

    def _on_timeout(self, made: LookUp) -> None:
        self._tell(made, None, ConnectError("%s took too long" % ("the name look-up" if made.name else "authorize()")))
        if made.began == NEVER:
            self.cancel(made.key, made.start)
        self._begin_waiting()

    def _tell(self, made: LookUp, result: Any, error: Exception | None) -> None:
        """Tells all that wait, once, each in a turn of its key: thousands may wait for one name."""
        if made.waiting:
            made.deadline.clear()
            self._by_name.pop((made.key, made.name), None)
            self._asked.change(made.key, -len(made.waiting))
            if made.began < NEVER:
                self._awaited.change(made.key, -1)
        for done in made.waiting:
            self._loop.take_turn(made.key, functools.partial(lambda done, _mask: done(result, error), done))
        made.waiting = []


@functools.lru_cache(maxsize=None)
def aegis_128l() -> Suite | None:
    """AEGIS-128L, or None where this libsodium lacks it, has another tag, or takes software for it (25 MB/s), as it may
    where nobody can be asked."""
    if getattr(sodium(), "crypto_aead_aegis128l_ABYTES", None) != 32:
        return None
    with contextlib.suppress(ImportError, AttributeError):
        from nacl._sodium import lib
        if lib.crypto_aead_aes256gcm_is_available():
            return Suite(1, "AEGIS-128L", 16, Aead("aegis128l", 32), struct.Struct("<q8x").pack)
    return None


def offered_suites() -> list[Suite]:
    """Best first; ChaCha20-Poly1305 always."""
    return [suite for suite in (aegis_128l(), chacha20_poly1305()) if suite]


# ---------------------------------------------------------------------------------------------------- sockets


def keep_alive(idle: float, interval: float, count: int) -> list[tuple[int, int, int]]:
    """Options that have the kernel ask whether the other machine lives, as far as the system can: the first time after
    `idle` seconds, then each `interval` seconds, `count` times."""
    # 0x10 is macOS's TCP_KEEPALIVE, which Python names from 3.10 on.
    numbers = [0x10 if sys.platform == "darwin" else getattr(socket, "TCP_KEEPIDLE", -1),
               getattr(socket, "TCP_KEEPINTVL", -1), getattr(socket, "TCP_KEEPCNT", -1)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *(
        (socket.IPPROTO_TCP, number, max(1, round(figure)))
        for number, figure in zip(numbers, (idle, interval, count)))]


TCP_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # a record is complete; Nagle only adds delay
    (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),  # an urgent byte is lost otherwise
]
# A peer or a target that has lost power is found out after 2 min, by the system alone after 2 h.
ASK_FOR_LIFE = keep_alive(60, 10, 6)


def tune(sock: socket.socket, options: Iterable[tuple[int, int, int]] = TCP_OPTIONS) -> None:
    """Sets these options, or those of every TCP socket that connects or listens; accepted sockets inherit them."""
    for option in options:
        try:  # contextlib.suppress() is three calls
            sock.setsockopt(*option)
        except OSError:  # not on this system; or already reset, which the first read tells
            pass


# Options of a Transport, each (level, number); -1: not on this system.
IS_LINUX = sys.platform.startswith("linux")
# The kernel takes so many bytes of unsent data at most: what would leave late can still be dropped here.
UNSENT = socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25 if IS_LINUX else -1)  # named in newer Pythons
# Not readable before so many bytes are there, or the end: being woken for each piece of a long record costs bulk a
# tenth. Linux lowers the number to what the socket's buffer can hold.
WAKE_AT = socket.SOL_SOCKET, socket.SO_RCVLOWAT if IS_LINUX else -1
# Linux 6.15 (linux/tcp.h): the longest pause in ms before unacknowledged data is sent again. By default the pauses
# double: after an outage of 30 s the next try is 20 s away. With it the system gives up after 6 s and 11 such pauses.
RETRY_WITHIN = socket.IPPROTO_TCP, 44 if IS_LINUX else -1
LINGER = socket.SOL_SOCKET, socket.SO_LINGER
RECEIVE_BUFFER = socket.SOL_SOCKET, socket.SO_RCVBUF
_LINGER = [struct.pack("HH" if os.name == "nt" else "ii", on, 0) for on in (0, 1)]
_TCP_INFO = struct.Struct("=2xBB20xI24xII8xI")


class TcpInfo(NamedTuple):
    """Some of Linux' struct tcp_info (linux/tcp.h)."""

    retransmits: int  # of what is sent again and again now
    probes: int  # of a shut window, that nobody has answered
    unacked: int  # segments on their way
    last_data_recv: int  # ms since data came
    last_ack_recv: int  # ms since the other side's TCP said anything
    rtt: int  # µs, smoothed

    @property
    def is_stuck(self) -> bool:
        """The next try is 1.6 s away or more (after 0.2, 0.4 and 0.8): a new connection is faster."""
        return self.retransmits > 2

    @property
    def unanswered(self) -> float:
        """Seconds without an answer of the other machine, which was asked. Two probes of a shut window may get lost."""
        return self.last_ack_recv / 1000 if self.unacked or self.probes > 2 else 0.0


def address_towards(peer: Any) -> str:
    """The address from which this machine would connect to a peer; "" where no way leads there."""
    with contextlib.suppress(OSError), socket.socket(family_of(peer[0]), socket.SOCK_DGRAM) as sock:
        sock.connect(peer)
        return str(sock.getsockname()[0])
    return ""


class Transport:
    """A socket on the loop: a link, a handshake, the local end of a stream and a listener all run on one."""

    __slots__ = ("sock", "events", "_loop", "_callback")

    def __init__(self, loop: EventLoop, sock: socket.socket, callback: Callable[[int], Any]):
        if sock.gettimeout() != 0:  # a system call less for a socket that does not block already
            sock.setblocking(False)
        self.sock, self._loop, self._callback = sock, loop, callback
        # What is waited for. A callback compares its mask with these: an earlier one of the same round may have closed
        # this, and epoll reports errors as everything.
        self.events = 0
        loop.sockets.add(sock)

    def want(self, events: int) -> None:
        """From now on callback(mask) for these events; the only place that changes them."""
        if events != self.events:
            self._loop.watch(self.sock.fileno(), self.events, events, self._callback)
            self.events = events

    def recv_into(self, view: memoryview, most: int = 0) -> int | None:
        """Bytes read, at most so many, or all that `view` takes; 0 is the end, None where nothing is there yet. OSError
        where the connection is broken."""
        try:
            return self.sock.recv_into(view, most)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Bytes taken, possibly none. OSError where the connection is broken."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def set_option(self, option: tuple[int, int], value: Any) -> None:
        """Sets one of the options above, where the system can."""
        tune(self.sock, [(*option, value)])

    def guard(self, on: bool) -> None:
        """Whether closing is a reset, also when this process is killed: what was cut must not look like an end."""
        try:  # each stream calls this twice: set_option() is another call
            self.sock.setsockopt(*LINGER, _LINGER[on])
        except OSError:
            pass

    def tcp_info(self) -> TcpInfo:
        """What Linux knows of the path; nothing on other systems and other sockets."""
        try:
            return TcpInfo(*_TCP_INFO.unpack(self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)))
        except (OSError, AttributeError, struct.error):
            return TcpInfo(0, 0, 0, 0, 0, 0)

    def half_close(self) -> None:
        """No more bytes from this side; OSError where the connection is broken."""
        self.sock.shutdown(socket.SHUT_WR)

    def release(self) -> socket.socket:
        """The socket, for another owner."""
        self.want(0)
        self._loop.sockets.discard(self.sock)
        # Its owner and it point to each other: let go at once, not by the collector.
        self._callback = None  # type: ignore[assignment]
        return self.sock

    def close(self) -> None:
        self.release().close()

    def abort(self) -> None:
        """Closes with a reset, so that the other side cannot take it for an end."""
        self.guard(True)
        self.close()


class LastWord:
    """Sends a few bytes and FIN, then discards what comes until the other side's FIN, for two seconds at most:
    closing on unread bytes would be a reset, which destroys the last word. Beyond LAST_WORDS the oldest closes."""

    def __init__(self, loop: EventLoop, sock: socket.socket, data: bytes):
        self._loop, self._data = loop, bytearray(data)
        while len(loop.last_words) >= LAST_WORDS:
            next(iter(loop.last_words)).close()
        loop.last_words[self] = None
        self._deadline = Deadline(loop, 2.0, self.close)
        self._transport = Transport(loop, sock, self._on_event)
        self._on_event(WRITE)

    def _on_event(self, mask: int) -> None:
        try:
            if mask & WRITE:
                del self._data[:self._transport.send(self._data)]
                if not self._data:
                    self._transport.half_close()
            if mask & READ and self._transport.recv_into(self._loop.scratch_in) == 0:
                return self.close()
            self._transport.want(READ | WRITE if self._data else READ)
        except OSError:
            self.close()

    def close(self, _error: Exception | None = None) -> None:
        if self in self._loop.last_words:
            del self._loop.last_words[self]
            self._deadline.clear()
            self._transport.close()

    abort = close


class Negotiation:
    """Drives a handshake, and those that follow it, over a socket: on_close(self, None) when the last is done, or
    on_close(self, error), after which the handshake's last word is sent and the socket closed. `is_stepping`: a thread
    has the handshake, and nothing is read."""

    __slots__ = ("sock", "address", "handshake", "born", "is_stepping", "_loop", "_on_close", "_run_step",
                 "_transport", "_deadline", "_out", "_timeout", "_is_closed")

    def __init__(self, loop: EventLoop, sock: socket.socket, address: Any, handshake: Handshake, timeout: float,
                 on_close: Callable[[Negotiation, Exception | None], None]):
        self.sock, self.address, self.handshake, self.born = sock, address, handshake, loop.now
        self.is_stepping = self._is_closed = False
        self._loop, self._on_close, self._timeout = loop, on_close, timeout
        self._run_step: RunStep | None = None
        self._out = bytearray()
        self._transport = Transport(loop, sock, self._on_event)
        self._deadline = Deadline(loop, timeout, self._on_timeout)

    def start(self, run_step: RunStep | None = None) -> None:
        """Begins, once its owner knows it: it may end at once. `run_step(step, done)` takes steps to a thread."""
        self._run_step = run_step
        if self.handshake.has_started:
            self._go_on()
        else:
            self._step(self.handshake.start)

    def _step(self, step: Callable[[], None]) -> None:
        if self.handshake.is_heavy and self._run_step:
            self.is_stepping = True
            return self._run_step(step, self._on_step)
        try:
            step()
        except RatrodError as error:
            return self._on_step(None, error)
        return self._on_step(None, None)

    def _on_step(self, _result: Any, error: Exception | None) -> None:
        self.is_stepping = False
        if error:
            self._fail(error)
        elif not self._is_closed:
            self._go_on()

    def _go_on(self) -> None:
        """Sends what is to be sent; then, unless a thread has the handshake, goes on with it or with the next one."""
        if not self.is_stepping:
            self._out += self.handshake.data_to_send()
        try:
            if self._out:
                del self._out[:self._transport.send(self._out)]
        except OSError as error:
            self._out.clear()
            self._read()  # what the other side said before it closed may say why
            if not self._is_closed and not self.is_stepping:
                self._on_end("the connection broke (%s)" % reason(error))
            return None
        more = WRITE if self._out else 0
        if self.is_stepping:
            return self._transport.want(more)
        if not self.handshake.is_done:
            return self._transport.want(READ | more)
        if self.handshake.successor:
            self.handshake = self.handshake.successor
            return self.start(self._run_step)
        if more:  # what comes first from the link must not overtake the handshake's last message
            return self._transport.want(more)
        return self.close()

    def _on_event(self, mask: int) -> None:
        mask &= self._transport.events  # 0: closed in this very round, to make room
        if mask & WRITE or mask and self.is_stepping:  # then reading stops only now: most say nothing meanwhile
            self._go_on()
        if mask & READ:
            self._read()

    def _read(self) -> None:
        # No more than is wanted: what follows the handshake is the link's. In turns: 8 KiB of HTTP would take 16 ms.
        for _ in range(BATCH):
            if self._is_closed or self.is_stepping or not self.handshake.wanted:
                return
            try:
                data = self.sock.recv(self.handshake.wanted)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                return self._on_end("the connection broke (%s)" % reason(error))
            if not data:
                return self._on_end()
            if self.handshake.is_heavy and len(data) < self.handshake.wanted:
                self.handshake.receive_data(data)  # a part of a message is no work
            else:
                self._step(functools.partial(self.handshake.receive_data, data))

    def _on_end(self, *why: str) -> None:
        try:
            self.handshake.receive_eof(*why)
        except RatrodError as error:
            self._fail(error)

    def _on_timeout(self) -> None:
        self._fail(RemoteProtocolError("it said nothing: timed out" if isinstance(self.handshake, FirstByte) else
                                       "the handshake was not done within %g s" % self._timeout))

    def _fail(self, error: Exception) -> None:
        self.close(error, bytes(self._out) + (b"" if self.is_stepping else self.handshake.data_to_send()))

    def close(self, error: Exception | None = None, last_word: bytes = b"") -> None:
        """Ends the negotiation, and after an error the connection, which hears `last_word` first."""
        if self._is_closed:
            return
        self._is_closed = True
        self._run_step = None  # which knows this negotiation: let go at once, not by the collector
        self._deadline.clear()
        self._transport.release()
        if last_word:
            LastWord(self._loop, self.sock, last_word)
        elif error:
            self.sock.close()
        self._on_close(self, error)

    abort = close


def look_up(address: Address, kind: int = socket.SOCK_STREAM, flags: int = 0) -> list[tuple[int, Any]]:
    """(family, socket address) of each address of a host, blocking; ConnectError says why there is none."""
    try:
        found = socket.getaddrinfo(address.host, address.port, 0, kind, 0, flags)
    except (OSError, UnicodeError) as error:
        raise ConnectError("cannot resolve `%s`: %s" % (printable(address.host), reason(error))) from None
    return list(dict.fromkeys(
        literal(Address(str(parse_ip(str(sockaddr[0]))), address.port)) if str(sockaddr[0]).startswith("::ffff:")
        else (int(family), sockaddr) for family, _, _, _, sockaddr in found))[:MOST_ADDRESSES]


@functools.lru_cache(maxsize=1024)
def is_literal(host: str) -> bool:
    """Whether `host` is an address that needs no look-up: neither a name, nor mistyped, nor with a zone."""
    with contextlib.suppress(OSError, ValueError):
        return bool(socket.inet_pton(family_of(host), host))
    return False


def family_of(host: str) -> int:
    """The family of an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@functools.lru_cache(maxsize=1024)
def literal(address: Address) -> tuple[int, Any]:
    """What look_up() would find for an address."""
    return family_of(address.host), tuple(address)


def is_joined_to_itself(sock: socket.socket, port: int) -> bool:
    """Where nobody listens at the port, the system may give it to the very socket: that would hear its own words."""
    try:
        own = sock.getsockname()
        return bool(own[1] == port and own == sock.getpeername())
    except OSError:  # it was reset already
        return False


class Connector:
    """Connects to the first address of `target` that answers: a look-up, then parallel tries, each STAGGER after the
    one before or as soon as that has failed, IPv6 and IPv4 in turn (RFC 8305). on_close(socket, None) or on_close(None,
    error), `timeout` seconds later at most. start(find): `find(target, done)` looks the host up."""

    def __init__(self, loop: EventLoop, target: Address, timeout: float, on_close: Done):
        self._loop, self._target, self._on_close = loop, target, on_close
        self._until, self._deadline = time.monotonic() + timeout, Deadline(loop)
        self._addresses: list[tuple[int, Any]] = []
        self._tries: dict[socket.socket, Transport] = {}
        self._error: Exception = ConnectError("it has no address")
        self.is_closed = False

    def start(self, find: Callable[[Address, Done], None]) -> None:
        target = self._target
        if target.is_unix and not hasattr(socket, "AF_UNIX"):
            self._on_found(None, OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets here"))
        elif target.is_unix:
            self._on_found([(socket.AF_UNIX, target.host)], None)
        elif is_literal(target.host):  # an address needs no thread
            self._on_found([literal(target)], None)
        else:
            self._wait()
            find(target, self._on_found)

    def _wait(self) -> None:
        """Until the next try is due, or all of them had their time."""
        left = self._until - time.monotonic()
        self._deadline.set(min(STAGGER, left) if self._addresses else left, self._on_due)

    def _on_due(self) -> None:
        if time.monotonic() < self._until:
            self._try_next()
        else:
            self.abort(socket.timeout("timed out"))

    def _on_found(self, found: list[tuple[int, Any]] | None, error: Exception | None) -> None:
        if found and not self.is_closed:
            if len(found) > 1:  # mostly one: an address needs no look-up
                first = [pair for pair in found if pair[0] == found[0][0]]
                others = [pair for pair in found if pair[0] != found[0][0]]
                found = [pair for pairs in itertools.zip_longest(first, others) for pair in pairs if pair]
            self._addresses = list(found)
            self._try_next()
        elif not found:
            self.abort(error or self._error)

    def _try_next(self) -> None:
        """Begins the next try; where it fails at once, the one after it."""
        while self._addresses:
            family, sockaddr = self._addresses.pop(0)
            sock = None
            try:
                sock = self._loop.make_socket(family)
                if not self._target.is_unix:
                    tune(sock)
                code = sock.connect_ex(sockaddr)
                if code == errno.EINPROGRESS:  # a near machine has answered by now: asking saves a round of the loop
                    code = sock.connect_ex(sockaddr)
            except OSError as error:  # no descriptor
                code = error.errno or errno.EINVAL
            if sock and code in (0, errno.EISCONN):
                return self._finish(sock, None)
            if sock and code in (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK):
                if self._target.is_unix:  # its queue is full, and no event tells when there is room: it is asked again
                    sock.close()
                    self._addresses.append((family, sockaddr))
                else:
                    if len(self._tries) >= TRIES_AT_ONCE:
                        self._tries.pop(next(iter(self._tries))).close()
                    self._tries[sock] = Transport(self._loop, sock, functools.partial(self._on_event, sock))
                    self._tries[sock].want(WRITE)
                break
            if sock:
                sock.close()
            self._error = system_error(code)
        if self._tries or self._addresses:
            return self._wait()
        return self._finish(None, self._error)

    def _on_event(self, sock: socket.socket, _mask: int) -> None:
        if sock not in self._tries:
            return None
        self._tries.pop(sock).release()
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return self._finish(sock, None)
        sock.close()
        self._error = system_error(code)
        return self._try_next()

    def _finish(self, sock: socket.socket | None, error: Exception | None) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._deadline.clear()
            while self._tries:
                self._tries.popitem()[1].close()
            if sock and not self._target.is_unix and is_joined_to_itself(sock, self._target.port):
                sock.close()
                sock, error = None, system_error(errno.ECONNREFUSED)
            self._on_close(sock, error)

    def abort(self, error: Exception) -> None:
        self._finish(None, error)


# ---------------------------------------------------------------------------------------------------- listening


# select() alone takes descriptors under 1,024, and on Windows 512 sockets; all other selectors take any number.
SELECT_TAKES = None if selectors.DefaultSelector is not selectors.SelectSelector else 512 if os.name == "nt" else 1024
ARE_NUMBERED = os.name == "posix"  # a new descriptor has the lowest free number; on Windows any
MOST_DESCRIPTORS = SELECT_TAKES or 1 << 20


def descriptor_limit() -> int:
    """How many descriptors this process may have open, and the loop can watch."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return min(soft, MOST_DESCRIPTORS) if soft >= 0 else MOST_DESCRIPTORS  # -1: infinity
    return MOST_DESCRIPTORS


def raise_descriptor_limit() -> None:
    """Takes as many descriptors as this user may have: each tunnelled connection needs two. Before the first socket is
    made. macOS refuses a soft limit over kern.maxfilesperproc whatever the hard limit is: fewer, step by step."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_DESCRIPTORS if hard < 0 else min(hard, MOST_DESCRIPTORS)
        while most > 64 and (SELECT_TAKES or most > soft >= 0):
            try:
                return resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            except (ValueError, OSError):
                most -= most // 8
    return None


KIND_OF = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
# The addresses behind a host that stands for several: not every hosts file gives localhost both its addresses.
SEVERAL = {"localhost": ("127.0.0.1", "::1"), "*": ("0.0.0.0", "::"), "::": ("0.0.0.0", "::")}


def bind_socket(family: int, kind: int, sockaddr: Any, share: bool) -> socket.socket:
    """A bound socket, listening where it is TCP; `share`: the processes of this user may bind the port once more."""
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM and os.name == "posix":  # elsewhere it would take over a port in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # 0.0.0.0 has a socket of its own
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        if kind == socket.SOCK_STREAM:
            tune(sock, TCP_OPTIONS + ASK_FOR_LIFE)
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def bind_all(address: Address, kinds: Sequence[int], share: bool = False) -> list[socket.socket]:
    """One socket for each of `kinds` on every address of the host, all on its port, for 0 on the first one's."""
    port = address.port
    failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
    sockets: list[socket.socket] = []
    try:
        for kind, host in itertools.product(kinds, SEVERAL.get(address.host, (address.host,))):
            for family, sockaddr in look_up(address._replace(host=host), kind, socket.AI_PASSIVE):
                try:
                    sockets.append(bind_socket(family, kind, (sockaddr[0], port, *sockaddr[2:]), share))
                    port = sockets[-1].getsockname()[1]
                except OSError as error:
                    # Either family may be switched off.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or address.host not in SEVERAL:
                        raise
                    failure = error
        if not sockets:
            raise failure
        return sockets
    except BaseException:
        close_all(sockets)
        raise


def listen(address: Address, kinds: Sequence[int] = (socket.SOCK_STREAM,), share: bool = False) -> list[socket.socket]:
    """Sockets on every address of the host, for each of `kinds`, all with one port: the one asked for, or for 0 any
    that is free in all. `share`: others that share the port too may listen there (SO_REUSEPORT)."""
    tries = 20 if address.port == 0 else 1  # a port that is free for TCP may be taken for UDP, or in the other family
    while True:
        tries -= 1
        try:
            return bind_all(address, kinds, share)
        except (OSError, ConnectError) as error:
            is_busy, is_denied = (getattr(error, "errno", 0) == code for code in (errno.EADDRINUSE, errno.EACCES))
            if is_busy and tries:
                continue
            udp = " Where it is taken for UDP alone, tcp: in front of the tunnel leaves UDP out" * (len(kinds) > 1)
            hint = (". Is another program, or another ratrod, on that port?" + udp if is_busy else
                    ". Ports below 1024 take root or CAP_NET_BIND_SERVICE" if is_denied else "")
            raise RatrodError("cannot listen on `%s`: %s%s" % (address, reason(error), hint)) from None


def listen_for(workers: int, address: Address, kinds: Sequence[int] = (socket.SOCK_STREAM,),
               share: bool = False) -> list[list[socket.socket]]:
    """listen() for each of several processes that are still to be forked, on one port: each has sockets of its own
    (SO_REUSEPORT), among which the kernel spreads the connections; where there is none, the same sockets."""
    if share and not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("--reuse-port needs a system where processes can share a port (SO_REUSEPORT), and this one"
                          " cannot; leave it out")
    sockets = listen(address, kinds, share)
    if workers == 1 or not hasattr(socket, "SO_REUSEPORT"):
        return [sockets] * workers
    # Bound without sharing first: a port that another program has, though willing to share it, is a port that is taken.
    address = address._replace(port=sockets[0].getsockname()[1])
    close_all(sockets)
    return [listen(address, kinds, share=True) for _ in range(workers)]


def close_all(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


class Listener:
    """A listening TCP socket: on_accept(socket, address) for each connection. It pauses before descriptors run out:
    each connection that is in needs one more. New ones wait in the system's queue meanwhile."""

    starved_at = -1e9  # of all listeners: one line for all

    def __init__(self, loop: EventLoop, sock: socket.socket, on_accept: Callable[[socket.socket, Any], None],
                 pause: float, peer_key: bytes = b"", needs: Callable[[], int] = lambda: 0):
        """`needs`: how many descriptors the connections that are in will take yet."""
        self._loop, self.sock, self._on_accept, self._pause, self.peer_key = loop, sock, on_accept, pause, peer_key
        self.address = sock.getsockname()
        self._kind = int(sock.family), int(sock.type), sock.proto
        self._reserve: Callable[[], int] = lambda: loop.spare + needs()
        self._transport = Transport(loop, sock, self._on_event)
        self._rest = Deadline(loop)

    def start(self) -> None:
        self._transport.want(READ)

    def _on_rested(self) -> None:
        with contextlib.suppress(OSError), self.sock.dup() as probe:
            if self._loop.has_room(probe, self._reserve()):
                return self.start()
        return self._rest.set(self._pause, self._on_rested)

    def _on_event(self, _mask: int) -> None:
        if self._transport.events:  # an earlier callback of this round may have closed it
            self._accept()

    def _accept(self) -> bool:
        """Whether there may be more."""
        for n in range(BATCH):
            try:
                # accept() of Python is ten calls more, 5 µs: it asks for the family and the type of the listener.
                fd, address = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001
                sock = socket.socket(*self._kind, fileno=fd)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno not in NO_SUCH_DESCRIPTORS and n < BATCH - 1:
                    continue  # this connection was gone before it was accepted; or the listener is broken for good
                self._starve(reason(error))
                return False
            # Where half of all is free nobody has to count.
            has_room = self._loop.has_room(sock, self._loop.most // 2) or self._loop.has_room(sock, self._reserve())
            if has_room or self._loop.has_room(sock):
                self._on_accept(sock, address)
            else:
                sock.close()
            if not has_room:
                self._starve("nearly all of the %d descriptors are taken (%s)" % (
                    self._loop.most, "select() takes no more" if self._loop.most == SELECT_TAKES else "ulimit -n"))
                return False
        return True

    def _starve(self, why: str) -> None:
        """Pauses, and says so once a minute."""
        if self._loop.now - Listener.starved_at > 60:
            log.warning("cannot accept connections for now: %s", why)
            Listener.starved_at = self._loop.now
        self._transport.want(0)
        self._rest.set(self._pause, self._on_rested)

    def drain(self) -> None:
        """Takes the connections that wait in the system's queue, which closing would reset, and closes."""
        self._reserve = lambda: 0  # none come after them
        for _ in range(BACKLOG // BATCH + 1):  # not for as long as others come: a flood must not hold up the end
            if not self._transport.events and self._rest.when == NEVER or not self._accept():
                break
        self.close()

    def close(self) -> None:
        self._rest.clear()
        self._transport.close()


def listen_for_tunnel(workers: int, spec: TunnelSpec) -> list[list[socket.socket]]:
    """The sockets of a tunnel that listens here, for each of several processes; none for other tunnels."""
    if spec.kind in (STDIO, REVERSE):
        return [[]] * workers
    if spec.local.is_unix:
        return [[listen_unix(spec.local.host)]] * workers
    return listen_for(workers, spec.local, [KIND_OF[protocol] for protocol in spec.protocols])


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path` that its owner alone can connect to, in place of one that nobody listens on."""
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

    _file: tuple[str, os.stat_result] | None = None

    def bind_privately(self, path: str) -> None:
        """Binds a file that its owner alone can use; PermissionError where another file took its place meanwhile."""
        with contextlib.suppress(OSError):  # Linux: the file has this mode from its first moment on
            os.fchmod(self.fileno(), 0o600)
        self.bind(path)
        with contextlib.suppress(NotImplementedError):  # Linux says so of a link that somebody put there
            os.chmod(path, 0o600, follow_symlinks=False)
        status = os.lstat(path)
        if not stat.S_ISSOCK(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o177:
            raise PermissionError(errno.EPERM, "others can use its folder, and have changed the file")
        self._file = path, status

    def close(self) -> None:
        if self._file and self.fileno() >= 0:
            path, status = self._file
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), status):
                    os.unlink(path)
        super().close()


def _clear_path(path: str) -> None:
    """Removes a Unix socket whose listener is gone; FileExistsError where something else is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is there")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(BlockingIOError):  # its queue is full
            probe.setblocking(False)
            probe.connect(path)
        raise FileExistsError(errno.EADDRINUSE, "another program listens there")
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        os.unlink(path)


# ---------------------------------------------------------------------------------------------------- limits


class Quota(KeyCounts):
    """How many of something there are, in all and of each key."""

    def __init__(self, most: int, most_of_key: int, words: str, whose: tuple[str, str] = ("in all", "of this client")):
        super().__init__()
        self.most, self.most_of_key, self._words, self._whose = most, most_of_key, words, whose

    def check(self, key: Any, more: int = 0) -> None:
        """Overloaded where the client of this key has as many as it may, and so many more, or all together have."""
        is_full = self.total >= self.most
        if is_full or self.of(key) - more >= self.most_of_key:
            whose, most = self._whose[not is_full], self.most if is_full else self.most_of_key
            raise Overloaded("the server %s %s as it takes (%d); try again later" % (self._words, whose, most))

    def take(self, key: Any, more: int = 0) -> None:
        self.check(key, more)
        self.change(key, 1)

    def give_back(self, key: Any) -> None:
        self.change(key, -1)


class Memory(KeyCounts):
    """The bytes that are kept until they are acknowledged, of half records, of datagrams that wait, and those that
    local sockets do not take (`untaken`): at most `most` in all and half of that for one key, beside POOR_WINDOW for
    each stream. Beyond it no window grows, a new stream keeps at most POOR_WINDOW, the greediest key's local sockets
    are not read, and of its links that hold half a record only the longest waiting is read on; none where an eighth of
    the key's part is `untaken`."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.untaken = most, KeyCounts()
        self.is_tight = False  # whether anybody may be short of memory: one look where nobody is
        # By key the links with half a record, the longest waiting first.
        self._halves: dict[bytes, dict[Any, None]] = {}

    def change(self, key: bytes, n: int) -> None:
        super().change(key, n)
        self.is_tight = self.total + LARGEST_WINDOW > self.most // 2

    def is_short(self, key: bytes, more: int = WINDOW) -> bool:
        """Whether so many bytes more would be too much for this key."""
        return self.is_tight and (self.total + more > self.most or self.of(key) + more > self.most // 2)

    def is_out(self, key: bytes) -> bool:
        """Whether nothing more may be read for this key."""
        mine = self.of(key)
        return self.is_tight and (mine > self.most // 2 or (
            self.total > self.most and mine >= max(self.by_key.values(), default=0)))

    def hold(self, link: Any) -> None:
        """This link holds half a record."""
        self._halves.setdefault(link.peer_key, {}).setdefault(link)

    def let_go(self, link: Any) -> Any:
        """This link holds none any more: the link that may be read on in its place, or None."""
        halves = self._halves.get(link.peer_key)
        if not halves or link not in halves:
            return None
        del halves[link]
        if not halves:
            del self._halves[link.peer_key]
        return next(iter(halves), None)

    def may_read_on(self, link: Any) -> bool:
        key = link.peer_key
        halves = self._halves.get(key)
        return not halves or link not in halves or not self.is_out(key) or (
            next(iter(halves)) is link and self.untaken.of(key) < self.most // 16)

# ======================================================================================================================
# 8. Links
# ======================================================================================================================

IDLE, CONNECTING, ASKED, BUSY, UDP_ASKED, UDP_OPEN, LISTEN_ASKED, BYE, CLOSED = (
    "Idle", "Connecting", "Asked", "Busy", "UdpAsked", "UdpOpen", "ListenAsked", "Bye", "Closed")
ASKING = {TCP: ASKED, UDP: UDP_ASKED, LISTEN: LISTEN_ASKED}  # the state after an Open of each kind
CARRYING = ASKED, BUSY  # a stream may send
OPENER, ACCEPTOR = "opener", "acceptor"
# The records that each state allows, besides Keepalive (PROTOCOL.md, "A stream on a link"). Any other record ends the
# link like an Error. Over and Close while busy are legal once both Ends have passed, which the stream judges. In Bye
# everything is skipped but the opener's Ack. Opened on a Listen link changes the roles: the server is its opener then.
LEGAL: dict[tuple[str, str], frozenset[int]] = {(state, role): frozenset(kinds) for state, role, kinds in (
    (IDLE, OPENER, (CLOSE, ERROR)), (IDLE, ACCEPTOR, (OPEN, ACK, ABANDON, ERROR)), (CONNECTING, ACCEPTOR, ()),
    (ASKED, OPENER, (OPENED, OVER, CLOSE, ERROR)),
    (BUSY, OPENER, (DATA, END, ACK, OVER, CLOSE, ERROR)), (BUSY, ACCEPTOR, (DATA, END, ACK, ERROR)),
    (UDP_ASKED, OPENER, (OPENED, CLOSE, ERROR)), (LISTEN_ASKED, OPENER, (OPENED, CLOSE, ERROR)),
    (UDP_OPEN, OPENER, (DATAGRAMS, UDP_DATA, SESSION_OVER, SESSION_ADDRESS, CLOSE, ERROR)),
    (UDP_OPEN, ACCEPTOR, (DATAGRAMS, UDP_DATA, SESSION, SESSION_OVER, ERROR)), (BYE, ACCEPTOR, (ACK,)))}


class LinkUser:
    """What a link carries: a Stream, the UDP sessions, or the question for a Listen link. Its link calls these."""

    __slots__ = ()

    def on_record(self, link: Link, kind: int, content: Any) -> None:
        """A legal record other than Data came."""

    def take_early(self) -> memoryview | bytes:
        """The records that leave together with Open."""
        return b""

    def on_data(self, data: memoryview) -> None:
        """Data came; the view is valid during this call only."""

    def on_read(self) -> None:
        """The records of one read have been processed."""

    def on_update(self) -> None:
        """The link's state changed, or all that waited in it was sent."""

    def on_sweep(self) -> None:
        """Called every second or so."""

    def on_close(self, link: Link, error: Exception) -> None:
        """The link has ended, and carries this user no more. LinkClosed means that the path broke, not the peer."""


NOBODY = LinkUser()


class Unread:
    """What has come on a link and could not be processed yet, view[start:end]: the beginning of a record, with room for
    its rest; or what waits while the user holds."""

    __slots__ = ("view", "start", "end", "size", "_link", "_lent", "_trickle")

    def __init__(self, link: Channel):
        self._link = link
        self.view: memoryview | None = None  # None: nothing
        self.start = self.end = self._trickle = 0
        self.size = 0  # bytes that count as memory; 0: nothing is kept
        self._lent: memoryview | None = None  # the loop's buffer, where `view` is a piece of one

    def keep(self, view: memoryview, start: int, end: int) -> None:
        """Keeps view[start:end] in a buffer of its own, with room for the rest of the record."""
        link, have = self._link, end - start
        memory = link.owner.memory
        wanted = have if link.is_held or link.is_paused else link.reader.wanted
        if view is link.loop.scratch_in or not link.is_paused and (start or len(view) < wanted):
            view, start, end = self._room_for(view, start, end, wanted), 0, have
        self._count(end - start if self._lent is not None else len(view))
        self.view, self.start, self.end = view, start, end
        if self._lent is not None:
            link.transport.set_option(WAKE_AT, wanted - have)
        elif wanted > have:
            memory.hold(link)
            if memory.is_out(link.peer_key):
                link.update()

    def _count(self, n: int) -> None:
        if n != self.size:
            self._link.owner.memory.change(self._link.peer_key, n - self.size)
            self.size = n

    def _room_for(self, view: memoryview, start: int, end: int, wanted: int) -> memoryview:
        """A buffer of `wanted` bytes that begins with view[start:end].

        For a long record the buffer is the loop's: memory that is new each time costs a page fault for every 4 KiB,
        half of all the CPU time of bulk; and mostly the bytes are in their place already. Where those are out, or for
        bytes that wait their turn, the buffer is the link's own, and grows with what arrives, not with what a header
        promises: twofold at most.
        """
        link, have = self._link, end - start
        is_long = wanted > max(have, 64 * 1024) and have >= 4096
        if is_long and self._lent is None and not link.owner.memory.is_short(link.peer_key):
            self._lent = link.loop.lend_scratch()
            if self._lent is not None:
                if start or view is not self._lent:
                    self._lent[:have] = view[start:end]
                return self._lent[:wanted]
        fresh = memoryview(bytearray(min(wanted, max(2 * have, 4096))))
        fresh[:have] = view[start:end]
        return fresh

    def forget(self) -> None:
        self.view = None
        if not self.size:
            return
        link = self._link
        self._count(0)
        if self._lent is not None:
            link.loop.give_back(self._lent)
            self._lent = None
            link.transport.set_option(WAKE_AT, 1)
        following = link.owner.memory.let_go(link)
        if following is not None:
            following.update()

    def may_read_on(self) -> bool:
        return self._lent is not None or self._link.owner.memory.may_read_on(self._link)

    def is_life(self, end: int, n: int) -> bool:
        """Whether the n bytes that came behind `end` others say that the other side lives. Bytes inside a record do so
        only in an amount: where a length was falsified on the way, or bytes are missing, all Keepalives that follow are
        taken for the rest of that record."""
        is_inside = end and self.view is not None and self.end - self.start == end + n
        self._trickle = self._trickle + n if is_inside else 0
        if is_inside and self._trickle < TRICKLE:
            return False
        self._trickle = 0
        return True


class Channel:
    """Sealed records over a transport, in both directions. What they mean is Link's.

    Memory stays bounded from both sides: while bytes wait in `out`, the local socket is not read; while the user holds
    (`is_held`), as while bytes wait for its local socket, no record is processed and the transport is not read.
    """

    __slots__ = ("owner", "loop", "transport", "reader", "writer", "peer_key", "role", "state", "user", "is_held",
                 "is_paused", "sent_at", "heard_at", "out", "unread", "_fin", "_eof")

    def __init__(self, owner: Endpoint, sock: socket.socket | None, handshake: Handshake, role: str):
        # No socket: over standard input and output. Records in the clear never get onto a network.
        if handshake.bare and sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            raise LocalProtocolError("bare records are for ssh's pipes alone")
        self.owner, self.loop, self.role, self.state = owner, owner.loop, role, IDLE
        self.transport = Transport(owner.loop, sock, self._on_event) if sock else StdioTransport(
            owner.loop, self._on_event)
        self.reader, self.writer, self.peer_key = handshake.reader, handshake.writer, handshake.peer_key
        self.user: LinkUser = NOBODY
        self.is_held = False
        self.is_paused = False  # in the middle of `unread`, for the others' turn
        self.sent_at, self.heard_at = owner.loop.now, owner.loop.awake
        self.out = bytearray()
        self.unread = Unread(self)
        self._fin = self._eof = False  # we end after `out`; the peer has ended

    def _on_record(self, kind: int, content: Any) -> None:
        raise NotImplementedError

    def _on_eof(self) -> None:
        raise NotImplementedError

    def lose(self, error: Exception) -> None:
        """The connection is no more, or says nothing that can be believed."""
        raise NotImplementedError

    def abort(self, error: Exception) -> None:
        """The peer has broken the rules, or an internal error has."""
        raise NotImplementedError

    # ---- in

    def _on_event(self, mask: int) -> None:
        if mask & self.transport.events & WRITE:
            self._flush()
        if mask & self.transport.events & READ:
            self._read()

    def _read(self) -> int | None:
        """How many bytes came."""
        if self.is_paused:
            return 0
        # An incomplete record has its own buffer. Only its rest is read next, so that a read begins at a record again.
        unread = self.unread
        view, end = (self.loop.scratch_in, 0) if unread.view is None else (unread.view, unread.end)
        # Where this key's memory is used up a little shows whether a whole record is there, as an Ack.
        memory = self.owner.memory
        portion = SHORT_READ if memory.is_tight and memory.is_out(self.peer_key) else self.loop.portion
        most = portion + HEADROOM + TAILROOM
        try:
            n = self.transport.recv_into(view[end:end + most]) if end else self.transport.recv_into(view, most)
        except OSError as error:
            self.lose(broken(error))
            return 0
        if n:
            unread.view = None
            if self.state != BYE or self.role == ACCEPTOR:
                self._process(view, 0, end + n)
            if not end or unread.is_life(end, n):
                self.heard_at = self.loop.awake
        elif n == 0:
            self._on_eof()
        return n

    def _process(self, view: memoryview, start: int, end: int) -> None:
        has_data = False
        try:
            for _ in range(RECORDS_IN_TURN):
                if start == end or self.is_held or self.is_paused:
                    break
                record = self.reader.next(view, start, end)
                if record is None:
                    break
                kind, content, start = record
                if kind == DATA and self.state == BUSY:
                    has_data = True
                    self.user.on_data(content)
                else:
                    self._on_record(kind, content)
                if self.state == CLOSED:
                    return None
            else:
                self.pause()
        except LinkClosed as error:  # the path broke the record
            return self.lose(error)
        except RemoteProtocolError as error:  # the peer broke the rules
            return self.abort(error)
        if start < end:
            self.unread.keep(view, start, end)
        elif self.unread.size and self.unread.view is None:  # or release() has gone on meanwhile
            self.unread.forget()
        if has_data:
            self.user.on_read()
        if self.is_held or self.is_paused:
            self.update()
        return None

    def release(self) -> None:
        """The user takes records again: goes on with what waits here, then with reading."""
        self.is_held = False
        self.heard_at = self.loop.awake  # the other side's silence counts from now
        if not self.is_paused:
            self._go_on()  # nothing is there where the very record that is being processed asked for it
        self.update()

    def _go_on(self) -> None:
        unread = self.unread
        view, unread.view = unread.view, None
        if view is not None:
            self._process(view, unread.start, unread.end)

    def pause(self) -> None:
        """The others have their turn before the next record is processed."""
        self.is_paused = True
        self.loop.take_turn(self.peer_key, self._resume)

    def _resume(self, _mask: int) -> None:
        self.is_paused = False
        self.heard_at = self.loop.awake  # what came meanwhile was not looked at
        if not self.is_held:
            self._go_on()
        self.update()

    def hears(self, seconds: float) -> bool:
        """Whether bytes came within so many seconds. The link may not have been woken for those that are there: the
        beginning of a long record on a slow path."""
        before = self.heard_at
        self._read()
        if self.heard_at != before and self.state != CLOSED:  # the bytes may have lain there since before the path died
            self.heard_at = max(before, self.loop.awake - self.transport.tcp_info().last_data_recv / 1000)
        return self.state == CLOSED or self.loop.awake - self.heard_at < seconds

    # ---- out

    def send(self, data: bytes | memoryview) -> None:
        """Sends now what the connection takes and keeps the rest."""
        if self.state == CLOSED:
            return None
        self.sent_at = self.loop.now
        if self.out:
            self.out += data
            return None
        try:
            sent = self.transport.send(data)
        except OSError as error:
            return self.lose(broken(error))
        if sent < len(data):
            self.out += data[sent:]
            self.update()
        return None

    def send_record(self, kind: int, *fields: Any) -> None:
        self.send(self.writer.record(kind, *fields))

    def _flush(self) -> None:
        try:
            del self.out[:self.transport.send(self.out)]
        except OSError as error:
            return self.lose(broken(error))
        if not self.out:
            if self._fin:
                self.finish_sending()
            self.update()
        return None

    def finish_sending(self) -> None:
        """FIN, after all that waits."""
        self._fin = True
        if not self.out:
            try:
                self.transport.half_close()
            except OSError as error:
                self.lose(broken(error))

    def update(self) -> None:
        """The one place that works out what to wait for."""
        if self.state != CLOSED:
            unread = self.unread
            reads = not (self.is_held or self.is_paused or self._eof) and (unread.view is None or unread.may_read_on())
            self.transport.want((WRITE if self.out else 0) | (READ if reads else 0))
            self.user.on_update()


class Link(Channel):
    """One authenticated ratrod2 connection between client and server: what its records mean, and what it carries."""

    __slots__ = ("instance", "last", "idle_since", "due", "name", "is_completed", "is_resumable", "born",
                 "is_extra", "doubted_at", "path", "tunnel", "source")
    is_legacy = False

    def __init__(self, owner: Endpoint, sock: socket.socket | None, handshake: Handshake, role: str, name: str = ""):
        super().__init__(owner, sock, handshake, role)
        self.name = name
        self.instance = handshake.instance  # of the peer; on a Listen link that of the stream's opener
        self.last: Any = None  # the Stream before, whose last bytes are not acknowledged yet
        # Whether its stream can go on over another link; ssh's pipes break together.
        self.is_resumable = not (handshake.bare or self.is_legacy)
        self.is_extra = False  # one more than its key may have: for an attach alone
        self.doubted_at = 0.0  # when a sign of life was last asked for, as heard_at by the clock that counts sleep
        self.path: tuple[str, Any] | None = None  # at a client: the addresses that it comes from and leads to
        self.tunnel: Any = None  # of a Listen link: the ReverseTunnel, or at the server the ReverseListener
        self.source: Source | None = None  # at a server
        self.is_completed = role == ACCEPTOR  # HandshakeCompletion has come, or is none to wait for
        self.born = self.idle_since = owner.loop.now
        # When the other side must have answered. The sweep looks, once a second: a timer costs each stream 3 µs.
        self.due = NEVER
        self._set_up()
        owner.links.add(self)

    def _set_up(self) -> None:
        # A ninth, so that the kernel gives up after we do.
        self.transport.set_option(RETRY_WITHIN, round(1000 * max(1.0, self.owner.limits.silence / 9)))

    # ---- records

    def _on_record(self, kind: int, content: Any) -> None:
        if not self.is_completed:
            return self._on_first(kind, content)
        if kind not in LEGAL.get((self.state, self.role), ()):
            if kind == KEEPALIVE or self.state == BYE:
                return None
            raise RemoteProtocolError("a record that does not belong there (type 0x%02x while %s)" % (kind, self.state))
        if self.user is NOBODY:
            return self._on_idle_record(kind, content)
        if kind == ERROR:
            return self.abort(PeerError(content.code, content.text))
        return self.user.on_record(self, kind, content)

    def _on_first(self, kind: int, content: Any) -> None:
        """HandshakeCompletion, or Error in its place: the first record that comes from a server, once."""
        if kind == ERROR:
            return self.abort(PeerError(content.code, content.text))
        if kind != COMPLETED:
            raise RemoteProtocolError("HandshakeCompletion is not the first record")
        self.is_completed = True
        if self.state == IDLE:  # otherwise it is Opened that is due
            self.due = NEVER
        return self.owner.on_completed(self)

    def _on_idle_record(self, kind: int, content: Any) -> None:
        """Nothing is carried: a new stream, or the end of the last one."""
        if kind == OPEN:
            last, self.last = self.last, None
            if last is not None:
                last.on_acknowledged()
            self.state = CONNECTING
            self.is_held = True
            return self.owner.on_open(self, content)
        if kind == ACK:
            if self.last is not None:
                self.last.on_late_ack(content)
            elif self.state != BYE:
                raise RemoteProtocolError("an Ack of no stream")
            return None
        if kind == ABANDON:
            return self.owner.on_abandon(self, content)
        # Close, or an Error: no more streams here.
        if self.last is not None and self.role == OPENER:
            self.last.acknowledge_last(self)
        return self.leave(b"") if kind == CLOSE else self.close()

    def _on_eof(self) -> None:
        self._eof = True
        if self.unread.view is not None:
            self.lose(LinkClosed("the connection ended inside a record"))
        elif self.state in (BYE, IDLE):
            self.close()
        else:
            self.lose(LinkClosed("the other side closed the connection"))

    # ---- is its path alive

    def doubt(self) -> None:
        """Its path may be dead: asks for a sign of life, unless one is being waited for."""
        if not self.is_stuck:
            self.doubted_at = self.loop.awake
            if not self.out:
                self.send_record(KEEPALIVE)

    @property
    def is_stuck(self) -> bool:
        """Whether nothing has come since its path was doubted. The other machine's TCP acknowledges the question at
        once. So may a proxy in between: for a link that has been silent for long only bytes count."""
        if self.heard_at > self.doubted_at or self.state == CLOSED:
            return False
        if not self.is_held and self.loop.awake - self.heard_at >= self.owner.limits.doubt:
            return True
        info = self.transport.tcp_info()
        if info.rtt:
            return self.loop.awake - info.last_ack_recv / 1000 <= self.doubted_at
        return self.path is not None  # not on Linux: a client can try another way, while a server waits for bytes

    def poll(self) -> None:
        """Processes what has come meanwhile, and sees the FIN that may stand behind it. Not in the loop's buffer: the
        records of another link, which asks for this one, may stand there."""
        shared = self.loop.lend_scratch()
        if shared is None:  # too many are lent: it is not looked at
            return
        try:
            for _ in range(BATCH):
                if self.state != IDLE or not self._read():
                    return
        finally:
            self.loop.give_back(self.loop.scratch_in)
            self.loop.scratch_in = shared

    # ---- life

    def ask(self, user: LinkUser, open_: Open) -> None:
        """Opener: sends Open, and what `user` says in the same packet. Opened has to come in time."""
        self.last = None  # Open acknowledges it
        self.user, self.state, self.due = user, ASKING[open_.kind], self.loop.now + self.owner.patience
        self.send(self.writer.record(OPEN, open_) + user.take_early())

    def accept(self, user: LinkUser, state: str, taken: int = -1, holds: bool = False) -> None:
        """Acceptor: `user` is carried from now on; it `holds` where it takes no records yet."""
        self.user, self.state, self.due = user, state, NEVER
        self.send_record(OPENED, "", taken)
        if self.user is user and not holds:
            self.release()
        else:
            self.update()

    def on_due(self) -> None:
        """The other side had its time."""
        self.due = NEVER
        if self.state == BYE:
            self.abort(RemoteProtocolError("it did not close its side"))
        elif self.state == IDLE:  # not a LinkClosed: it was never there
            self.abort(ConnectError("the server did not complete the handshake"))
        else:
            self.lose(LinkSilent("the other side did not answer in time"))

    def turn(self, role: str) -> None:
        """A Listen link, idle from here on: from now on the server is its opener."""
        self.user, self.role, self.state, self.due = NOBODY, role, IDLE, NEVER

    def become_idle(self, record: bytes = b"") -> None:
        """The stream on it is over on both sides. Acceptor: `record` leaves together with Over."""
        self.user, self.state, self.idle_since, self.due = NOBODY, IDLE, self.loop.now, NEVER
        self.owner.on_idle(self, record)
        if self.is_held:
            self.release()

    def fail(self, error: Exception) -> None:
        """The user's side broke: Error tells the other side, as our last record."""
        self.refuse(Error(REMOTE_FAILED, reason(error)))

    def refuse(self, error: Error) -> None:
        """Says why, and ends without destroying the answer on its way: FIN, then discard until the peer has seen it."""
        self.leave(self.writer.record(ERROR, *error), self.owner.limits.drain_timeout)

    def leave(self, last_word: bytes, drain: float = NEVER) -> None:
        """Sends `last_word` and FIN, then discards until the peer's FIN, for at most `drain` seconds; an opener, whose
        peer has said its last word, for as long as after an Error."""
        if self.state == CLOSED:
            return
        drain = self.owner.limits.drain_timeout if self.role == OPENER else drain
        self.user, self.state, self.is_held, self.due = NOBODY, BYE, False, self.loop.now + drain
        self.unread.forget()
        self.send(last_word)
        if self.state == BYE:
            if self._eof:
                return self.close()
            self.finish_sending()
            self.update()

    def lose(self, error: Exception) -> None:
        """The connection is no more, or says nothing that can be believed: ends it with a reset."""
        self._stop(self.transport.abort, error)

    def abort(self, error: Exception) -> None:
        """Ends the link and what it carries, visibly: resets on both sides. May be called twice."""
        # After the other side's Error it only waits for our FIN.
        self._stop(self.transport.close if isinstance(error, PeerError) else self.transport.abort, error)

    def close(self) -> None:
        """Ends the link where nothing is left to be said."""
        self._stop(self.transport.close, None)

    def _stop(self, how: Callable[[], None], error: Exception | None) -> None:
        if self.state == CLOSED:
            return
        was_bye, self.state, self.due = self.state == BYE, CLOSED, NEVER
        self.unread.forget()
        how()
        user, self.user = self.user, NOBODY
        if user is NOBODY and error is not None and not was_bye:
            self.owner.complain_of(self, "idle link with `%s`" % self.name, error)
        elif user is not NOBODY:
            user.on_close(self, error or LinkClosed("the other side closed the connection"))
        last, self.last = self.last, None
        if last is not None:
            # Nobody has shown that the last word was heard; not even by FIN, which may be a proxy's.
            last.keeper.on_unheard(last)
        self.owner.on_link_closed(self, error)


class LegacyLink(Link):
    """A link of the original's wire: it carries one stream, or one UDP session. FIN is its End, a reset the only sign
    of a failure, and the system's own questions are its Keepalive."""

    __slots__ = ()
    is_legacy = True

    def __init__(self, owner: Endpoint, sock: socket.socket, handshake: Handshake, role: str, name: str, state: str):
        super().__init__(owner, sock, handshake, role, name)
        self.state = state
        self.is_held = state == CONNECTING  # an acceptor reads nothing more before its remote is connected

    def _set_up(self) -> None:
        silence = self.owner.limits.silence
        tune(self.transport.sock, keep_alive(silence / 3, silence / 9, 6))

    def ask(self, user: LinkUser, open_: Open) -> None:
        """The handshake has named the target already: nothing is sent."""
        self.user, self.state, self.due = user, ASKING[open_.kind], self.loop.now + self.owner.patience
        self.update()

    def _on_record(self, kind: int, content: Any) -> None:
        if self.state == BYE:
            return
        if kind == ERROR:
            return self.abort(PeerError(content.code, content.text))
        if kind not in LEGAL.get((self.state, self.role), ()):
            raise RemoteProtocolError("a message that does not belong there (while %s)" % self.state)
        if not self.is_completed:  # Opened goes before anything else
            self.is_completed = True
            self.owner.on_completed(self)
        self.user.on_record(self, kind, content)

    def _on_eof(self) -> None:
        if self.state != BUSY or self.unread.view is not None:
            return super()._on_eof()
        self._eof = True
        self._on_record(END, None)
        return self.update()

    def become_idle(self, record: bytes = b"") -> None:
        """Both directions have ended: the link goes once all is sent."""
        self.user, self.state = NOBODY, BYE
        if not self.out:
            self.close()

    def _flush(self) -> None:
        super()._flush()
        if self.state == BYE and not self.out and self._eof:
            self.close()

    def fail(self, error: Exception) -> None:
        self.abort(error)


def broken(error: OSError) -> LinkClosed:
    """What a connection's error means: silence where machine, path or address is gone (Windows aborts its sockets)."""
    is_silence = error.errno in (
        errno.ETIMEDOUT, errno.ECONNABORTED, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
    kind = LinkSilent if is_silence else LinkClosed
    return kind("the connection between client and server broke: %s" % reason(error))

# ======================================================================================================================
# 9. Streams
# ======================================================================================================================


_random = bytearray()  # bytes of the system that nobody has had yet: asking for each 16 costs 10 µs
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.clear)


def random_bytes(n: int) -> bytes:
    if len(_random) < n:
        _random.extend(os.urandom(4096))
    taken = bytes(_random[-n:])
    del _random[-n:]
    return taken


def show_label(number: str, origin: str, target: str) -> str:
    """The name of a connection in the log."""
    return "[%s] `%s` -> `%s`" % (number, origin, printable(target))


def new_label(origin: str, target: str) -> str:
    return show_label(random_bytes(3).hex(), origin, target)


class Counters:
    """What an endpoint carries, and has carried since it began: for metrics, status table and status line alike.

    No byte costs anything here: each stream and session counts its own, which are added up at its end, and of those
    that live when somebody asks. By peer key, SOURCES of them at most.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self.began_at = time.time()
        self.streams: set[Stream] = set()
        self.sessions: set[UdpSession] = set()
        self.results = dict.fromkeys(("closed", "reset", "refused", "failed"), 0)  # of streams that are over
        self.links = self.handshakes_failed = self.reconnects = self.resumed = self.dropped = 0
        self.detached: set[Stream] = set()  # streams that have lost their link, and do not go on yet
        # Streams that did not go on, by reason.
        self.given_up = dict.fromkeys(("time", "run", "limit", "ended", "refused"), 0)
        self._lost_at, self._went_on, self._has_said_lost = 0.0, 0, False
        self._bytes: dict[bytes, tuple[int, int]] = {}  # of what is over: peer key -> sent, received; the latest last

    def _count_bytes(self, key: bytes, sent: int, received: int) -> None:
        """authorize() may let in any number of keys: what the others have carried counts for none, b""."""
        before = self._bytes.pop(key, (0, 0))
        self._bytes[key] = before[0] + sent, before[1] + received
        if len(self._bytes) > SOURCES:
            self._count_bytes(b"", *self._bytes.pop(next(iter(self._bytes))))

    def count(self, error: Exception | None) -> None:
        """A stream is over, or was refused before it was one."""
        if error is None:
            self.results["closed"] += 1
            return
        is_refused = isinstance(error, (PolicyError, Overloaded)) or (
            isinstance(error, PeerError) and error.code == INVALID_HOST)
        self.results["refused" if is_refused else "reset" if isinstance(error, LocalFailed) else "failed"] += 1

    def on_lost(self, stream: Stream) -> None:
        """A stream waits for another link. One line for all that do in this moment, and one when the last goes on."""
        if not self.detached:
            self._lost_at, self._went_on, self._has_said_lost = self._loop.now, 0, False
            self._loop.call_later(0, self._say_lost)
        self.detached.add(stream)

    def _say_lost(self) -> None:
        if self.detached:
            line = "🔌 The link of %s was lost: another one is awaited" % plural(len(self.detached), "connection")
            self._has_said_lost = self._loop.complain("🔌 Links were lost %d more times", line, level=logging.WARNING)

    def on_resumed(self, stream: Stream) -> None:
        if stream not in self.detached:
            return
        self.detached.discard(stream)
        self.resumed += 1
        self._went_on += 1
        log.debug("%s: goes on over another link", stream.label)
        if not self.detached and self._has_said_lost:
            log.info("✅ Over another link, after %s: %s", show_time(self._loop.now - self._lost_at),
                     plural(self._went_on, "connection"))

    def on_end(self, carried: Any, error: Exception | None = None) -> None:
        """The line that every stream and UDP session ends with: shown with -v, or always where somebody should know."""
        if carried in self.detached:
            self.detached.discard(carried)
            kinds = {ConnectError: "time", LinkClosed: "run", Overloaded: "limit", LocalFailed: "ended"}
            self.given_up[next((why for kind, why in kinds.items() if isinstance(error, kind)), "refused")] += 1
        self.streams.discard(carried)
        self.sessions.discard(carried)
        self._count_bytes(carried.peer_key, carried.sent, carried.received)
        has_failed = isinstance(error, RatrodError) and not isinstance(error, LocalFailed)
        if has_failed:
            refused = "refused: " if isinstance(error, PolicyError) else ""
            self.fail(carried.peer_key, "❌ %s: %s%s" % (carried.label, refused, error))
        if log.isEnabledFor(logging.DEBUG):
            how = "" if has_failed else " closed" if error is None else " reset (%s)" % reason(error)
            log.debug("%s%s%s: %d bytes sent to the link, %d received, lived %.1f s", "" if has_failed else "✅ ",
                      carried.label, how, carried.sent, carried.received, time.monotonic() - carried.started)

    def fail(self, key: bytes, line: str, level: int = logging.ERROR) -> None:
        """A line about what the other side of this key has caused, mostly a failure."""
        whose = " with the key `%s`" % encode_key(key) if key else ""
        what = "❌ %%d more failures%s" if level == logging.ERROR else "%%d more events%s"
        self._loop.complain(what % whose, line, bool(key), level)

    def tally(self, links: Iterable[Link]) -> dict[bytes, collections.Counter[str]]:
        """By peer key: links (idle, busy, closing), streams, sessions, payload bytes (sent to the link, received)."""
        keys: dict[bytes, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for key, (sent, received) in self._bytes.items():
            keys[key].update(sent=sent, received=received)
        for link in links:
            keys[link.peer_key].update(("links", {IDLE: "idle", BYE: "closing"}.get(link.state, "busy")))
        alive: Iterable[Any]
        for name, alive in (("streams", self.streams), ("sessions", self.sessions)):
            for carried in alive:
                keys[carried.peer_key].update({name: 1, "sent": carried.sent, "received": carried.received})
        return keys


class Outgoing:
    """A stream's direction from its local socket to its links.

    Positions are bytes of Data so far, and one more for End. `position` is that of the next byte on this link, and
    `began` that of the first; `sent` is the furthest that was sent on any link, `acked` what the other side has taken.
    The bytes [start, end) are kept, for they may be needed again: at most `most`, the window.

    They are kept in a bytearray while they are few. Once reads are large they are in a ring, into which they are read
    and from which they are sealed: copying 512 KiB costs a tenth of all the work on them. The byte of position p stands
    there at 1 + p % size; the byte at 0 is room for a record's type.
    """

    __slots__ = ("start", "end", "most", "position", "began", "sent", "acked", "has_eof", "keeps", "_loop", "_memory",
                 "_key", "_few", "_ring", "_size", "_full_end", "_full_at")

    def __init__(self, loop: EventLoop, memory: Memory, key: bytes):
        self._loop, self._memory, self._key = loop, memory, key
        self.start = self.end = self.position = self.began = self.sent = self.acked = self._size = self._full_end = 0
        self.most = WINDOW
        self.has_eof = False  # the local socket's end was read
        self.keeps = True  # another link can carry on from here
        self._few = bytearray()
        self._ring: memoryview | None = None

    # ---- links

    def attach(self, link: Link, position: int) -> None:
        self.position = self.began = position
        self.keeps = link.is_resumable
        if link.peer_key != self._key:
            if self._size:
                self._memory.change(self._key, -self._size)
                self._memory.change(link.peer_key, self._size)
            self._key = link.peer_key

    def room(self, link: Link, is_stalled: bool) -> int:
        """How many bytes may be read now. `is_stalled`: this side processes no records, so no Ack will ever come."""
        most = self._loop.portion
        if link.state != BUSY:
            most = min(most, EARLY_DATA - self.position + self.began)
        if not self.keeps:
            return min(most, link.writer.max_data)
        if is_stalled:
            return min(most, BULK_READ)
        if self._memory.is_tight:
            return 0 if self._memory.is_out(self._key) else min(most, self._most_kept - self.end + self.start)
        room = self.most - self.end + self.start
        if room >= most:
            return most
        if room <= 0 and link.state == BUSY and not link.out and not self._full_end:  # it alone holds the sender back
            self._full_end, self._full_at = self.end, self._loop.now
        return room

    @property
    def _most_kept(self) -> int:
        return self.most if self._size or not self._memory.is_short(self._key) else POOR_WINDOW

    def read(self, local: Transport, room: int, link: Link, is_stalled: bool) -> memoryview | bytes:
        """The record of what the local socket has, at most `room` bytes; b"" where there is none, for now or for ever
        (`has_eof`). OSError where it is broken."""
        if self._ring is not None and self.keeps and not is_stalled:
            at = 1 + self.end % self._size
            n = local.recv_into(self._ring[at:at + room])  # to the ring's end at most
            if n:
                self.end += n
                return self.next_record(link)
        else:
            n = local.recv_into(self._loop.payload, BULK_READ if self.keeps and room > BULK_READ else room)
            if n:
                if self.keeps:
                    if is_stalled:
                        self.drop(self.end + n - self._most_kept)  # the newest are kept
                    self.append(self._loop.payload[:n])
                    if n == BULK_READ and not is_stalled and not self._memory.is_short(self._key, self.most):
                        self._move_to_ring()
                else:
                    self.start = self.end = self.end + n
                self.advance(n)
                if n < SHORT_READ:
                    self._loop.hurry()
                return link.writer.data(self._loop.scratch_out, n)
        self.has_eof = n == 0
        return b""

    def next_record(self, link: Link) -> memoryview:
        """The next record of bytes that are kept, sealed from where they stand."""
        assert isinstance(link.writer, RecordWriter)
        most = MAX_CONTENT if link.state == BUSY else EARLY_DATA - (self.position - self.began)
        scratch, at = self._loop.scratch_out, self._at(self.position)
        n = min(most, self.end - self.position)
        ring = self._ring
        if ring is None:
            scratch[HEADROOM:HEADROOM + n] = self._few[at:at + n]
            record = link.writer.data(scratch, n)
        else:
            n = min(n, self._size - at)
            before, ring[at] = ring[at], DATA  # in the place of the byte before, which may still be needed
            record = link.writer.seal(ring[at:at + 1 + n], scratch)
            ring[at] = before
        self.advance(n)
        if self.acked > self.start:
            self.drop(min(self.acked, self.position))
        return record

    def advance(self, n: int) -> None:
        """n bytes more, or End, go on this link."""
        self.position += n
        if self.position > self.sent:
            self.sent = self.position

    # ---- what is kept

    def check_taken(self, taken: int) -> None:
        if taken > self.sent or taken < self.acked:
            raise RemoteProtocolError("the other side says that it has taken %d bytes, after %d of %d" % (
                taken, self.acked, self.sent))

    def on_taken(self, taken: int) -> None:
        """The other side has taken the bytes before this position; they are kept as long as this link has still to be
        given them. A window that held the sender back, and was taken soon, is too small for the path."""
        self.check_taken(taken)
        self.acked = taken
        if taken > self.start:
            self.drop(min(taken, self.position))
        if 0 < self._full_end <= taken:
            is_slow = GROWS_AFTER < self._loop.now - self._full_at < GROWS_WITHIN
            if is_slow and self.most < LARGEST_WINDOW and not self._memory.is_short(self._key, self.most):
                self.most *= 2
                self._move_to_ring()
            self._full_end = 0

    def append(self, data: memoryview) -> None:
        if self._ring is None:
            self._few += data
            self.end += len(data)
            if len(self._few) > POOR_WINDOW:  # so many each stream may have besides the memory that is bounded in sum
                self._move_to_ring()
            return
        while data:
            at = self._at(self.end)
            n = min(len(data), self._size - at)
            self._ring[1 + at:1 + at + n] = data[:n]
            self.end += n
            data = data[n:]

    def _at(self, position: int) -> int:
        return position % self._size if self._size else position - self.start

    def _move_to_ring(self) -> None:
        """A ring of the window's size from now on, which counts as memory."""
        if self._size >= self.most:
            return
        size, ring, position = self.most, new_scratch(1 + self.most), self.start
        old = memoryview(self._few) if self._ring is None else self._ring[1:]
        while position < self.end:
            at, to = self._at(position), position % size
            n = min(self.end - position, len(old) - at, size - to)
            ring[1 + to:1 + to + n] = old[at:at + n]
            position += n
        old.release()
        self._few = bytearray()
        self._memory.change(self._key, size - self._size)
        self._ring, self._size = ring, size

    def drop(self, position: int) -> None:
        """The bytes before `position` are not needed any more."""
        position = min(position, self.end)
        if position > self.start:
            if self._ring is None:
                del self._few[:position - self.start]
            self.start = position

    def trim(self) -> None:
        """Gives the memory back where nothing is kept."""
        if self._size and self.start == self.end:
            self._memory.change(self._key, -self._size)
            self._ring, self._size = None, 0

    def close(self) -> None:
        self.start = self.end
        self._few.clear()
        self.trim()


class Keeper:
    """The owner of streams: an Opener or an Acceptor. One of on_ended() and on_detached() follows when a link ends."""

    def __init__(self, owner: Endpoint):
        self.owner, self.loop, self.limits = owner, owner.loop, owner.limits

    def on_detached(self, stream: Any, link: Any, error: Exception) -> None:
        """The stream's link was lost: the stream waits for another one."""
        # Links that break before they answer do not make it wait longer.
        stream.give_up_at = min(stream.give_up_at, self.loop.now + resume_time(self.limits, error)
                                if stream.was_opened else stream.since + self.limits.connect_timeout)
        log.debug("%s: %s; waiting for another link", stream.label, error)

    def on_ended(self, stream: Any, error: Exception | None) -> None:
        """The stream is over on this side."""

    def on_acknowledged(self, stream: Any, has_seen_over: bool) -> None:
        """Acceptor: the other side has taken everything."""

    def on_unheard(self, stream: Any) -> None:
        """It is not known whether the last word has arrived."""


class Stream(LinkUser):
    """One local socket joined to one link after another.

    A stream is two one-way directions. `out` is the one to the link. Of the other one, `received` is the position up to
    which bytes have come, and `taken` the position up to which the local socket has them (and one more once it was shut
    down); `_link_in` is the position of the next byte on this link, which may be one that was received before and is
    skipped; `_told` is what this link was told to be taken.
    """

    __slots__ = ("owner", "loop", "keeper", "origin", "shown", "target", "id", "attempt", "peer_key",
                 "link", "local", "out", "is_over", "was_opened", "error", "give_up_at",
                 "since", "started", "received", "taken", "_link_in", "_told", "_has_end", "_pending", "_heard_at",
                 "_asks_for_life", "_broken")
    role = ""
    since: float  # once it waits for a link (first or another one), or its remote is being connected to: since when
    _heard_at: float  # once something came

    def __init__(self, keeper: Keeper, origin: Any, shown: str, *, target: str | None = None, peer_key: bytes = b"",
                 stream_id: bytes = b""):
        owner = keeper.owner
        self.owner, self.loop, self.keeper = owner, owner.loop, keeper
        self.origin, self.shown, self.target = origin, shown, shown if target is None else target
        self.id, self.attempt, self.peer_key = stream_id or random_bytes(16), 0, peer_key
        self.link: Link | None = None
        self.local: Transport | None = None  # until the local socket is there, and when it is closed
        self.out = Outgoing(owner.loop, owner.memory, peer_key)
        self.is_over = self.was_opened = self._has_end = False
        self.error: Exception | None = None  # how it ended
        self.give_up_at = NEVER
        self.received = self.taken = self._link_in = self._told = 0
        self._pending: memoryview | None = None  # what the local socket did not take yet
        self._broken: OSError | None = None  # what the local socket said before there was a link to tell it on
        self.started = self.loop.now
        owner.counters.streams.add(self)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("⛽ %s", self.label)

    @property
    def label(self) -> str:
        """Its name in the log, the same one on both sides of the link."""
        is_shown = self.origin and isinstance(self.origin, str)  # or a socket's address
        return show_label(self.id[:3].hex(), self.origin if is_shown else show_address(self.origin), self.shown)

    def join(self, sock: Any) -> None:
        """The local socket is there."""
        self.local = Transport(self.loop, sock, self._on_event)
        self.local.guard(True)
        self._asks_for_life = self.role == OPENER  # inherited from the listener

    @property
    def sent(self) -> int:
        """Bytes of payload to the link."""
        return self.out.end

    # ---- out: from the local socket to the link

    def _on_event(self, mask: int) -> None:
        local = self.local
        if local is not None and mask & local.events & WRITE:
            self._flush()
            local = self.local
        if local is not None and mask & local.events & READ:
            self._read(local)

    def _read(self, local: Transport) -> None:
        link, out, is_stalled = self.link, self.out, self._pending is not None
        assert link is not None
        room = out.room(link, is_stalled)
        if room <= 0:  # a read of nothing would look like the end
            return self.on_update()
        try:
            record = out.read(local, room, link, is_stalled)
        except OSError as error:
            return self._on_local_failed(error)
        if record:
            link.send(record)
        if out.has_eof or len(record) > SHORT_READ:  # a short read leaves room
            self.on_update()
        return None

    def on_update(self) -> None:
        """Sends what this link does not have yet, bytes that are kept and End; then works out what to wait for."""
        if self.taken - self._told >= ACK_AFTER:
            self.on_read()  # the Ack that a backlog has held up
        link, out = self.link, self.out
        while out.position < out.end + out.has_eof:
            if not link or link is not self.link or link.out or link.state not in CARRYING:
                break
            if out.position == out.end:
                self._send_end(link)
            elif link.state == ASKED and out.position - out.began >= EARLY_DATA:
                break
            else:
                link.send(out.next_record(link))
        link, local = self.link, self.local
        if link and local is not None:
            is_stalled = self._pending is not None
            reads = (not out.has_eof and not link.out and link.state in CARRYING and out.position == out.end
                     and out.room(link, is_stalled) > 0)
            local.want((WRITE if is_stalled else 0) | (READ if reads else 0))

    def _send_end(self, link: Link) -> None:
        self.out.advance(1)
        if link.is_legacy:  # FIN is its End
            link.finish_sending()
            self._finish_if_over(link)
        elif self.role == ACCEPTOR and self._has_end:
            self._finish_if_over(link, link.writer.record(END))
        else:
            link.send_record(END)

    # ---- in: from the link to the local socket

    def on_data(self, data: memoryview) -> None:
        at = self._link_in
        self._link_in = at + len(data)
        self._heard_at = self.loop.now
        if at < self.received:
            data = data[self.received - at:]
            if not data:
                return
        if self._has_end:
            raise RemoteProtocolError("Data after End")
        self.received += len(data)
        try:
            sent = self.local.send(data)  # type: ignore[union-attr]
        except OSError as error:
            return self._on_local_failed(error)
        self.taken += sent
        if sent < len(data) and self.link:
            self._pending = memoryview(bytes(data[sent:]))
            self._count_pending(1)
            self.link.is_held = True

    def _count_pending(self, sign: int) -> None:
        n = sign * len(self._pending.obj)  # type: ignore[union-attr, arg-type] # all of it until the last byte is taken
        self.owner.memory.change(self.peer_key, n)
        self.owner.memory.untaken.change(self.peer_key, n)

    def _flush(self) -> None:
        assert self._pending is not None and self.local is not None
        try:
            sent = self.local.send(self._pending)
        except OSError as error:
            return self._on_local_failed(error)
        self.taken += sent
        self._pending = self._pending[sent:]
        if not self._pending:
            self._drop_pending()
            self.on_read()
            if self.link:
                self.link.release()
            elif self.local is not None:  # that Ack may have found the link broken, and ended the stream
                self.local.want(0)
        return None

    def _drop_pending(self) -> None:
        self._count_pending(-1)
        self._pending = None

    def _on_end(self, link: Link) -> None:
        if self._has_end and self._link_in > self.received:
            if link.is_legacy:  # FIN after a Shutdown
                return None
            raise RemoteProtocolError("a second End")
        if self._link_in != self.received:
            raise RemoteProtocolError("End before bytes that came earlier")
        self._link_in += 1
        self._heard_at = self.loop.now
        if not self._has_end:
            self._has_end = True
            # Everything before End has been written, for no record is processed while bytes wait. Where the local
            # socket's own end was read, closing says the same in one call less (15 µs): no unread byte is left.
            if self.out.has_eof:
                self._close_local()
            else:
                try:
                    self.local.half_close()  # type: ignore[union-attr]
                except OSError as error:
                    return self._on_local_failed(error)
            self.taken += 1
        if link.is_legacy or self.role == ACCEPTOR:
            self._finish_if_over(link)
        return None

    def on_read(self) -> None:
        link = self.link
        if self.taken - self._told >= ACK_AFTER and self.out.keeps and link and link.state == BUSY and not link.out:
            self._acknowledge(link)

    def _acknowledge(self, link: Link) -> None:
        self._told = self.taken
        link.send_record(ACK, self.taken)

    # ---- records

    def on_record(self, link: Link, kind: int, content: Any) -> None:
        if kind == END:
            self._on_end(link)
        elif kind == ACK:
            self.out.on_taken(content)
            self.on_update()
        else:
            self._on_answer(link, kind, content)

    def _on_answer(self, link: Link, kind: int, content: Any) -> None:
        """Opener: Opened, Over or Close."""

    def _have_both_ends_passed(self) -> bool:
        """On this link."""
        return self._has_end and self._link_in > self.received and self.out.position > self.out.end

    def _finish_if_over(self, link: Link, end: bytes = b"") -> None:
        """Acceptor, and legacy: says Over after both Ends and all bytes, in one packet with `end` (10 µs a side)."""
        if link is not self.link:
            return None
        if self._pending is not None or not self._have_both_ends_passed():
            return link.send(end) if end else None
        self._finish(None)
        if self.out.keeps:
            link.last = self
            if self.out.acked == self.out.sent:
                self.keeper.on_acknowledged(self, False)
        return link.become_idle(end)

    # ---- ends

    def on_sweep(self) -> None:
        self.out.trim()
        local = self.local
        if local is not None and local.sock is not None:
            if not self._asks_for_life:  # a stream that ends soon does not pay for these four calls
                self._asks_for_life = True
                tune(local.sock, ASK_FOR_LIFE)
            # After its end of file, or while the other side takes nothing, nobody reads the local socket: a reset that
            # follows would wait for the next write, perhaps for ever.
            code = 0 if local.events & READ else local.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                return self._on_local_failed(system_error(code))
        link = self.link
        if (link and self.out.keeps and link.state == BUSY and not link.out
                and self._told != self.taken and self.loop.now - self._heard_at >= 1):
            self._acknowledge(link)
        return None

    def _on_local_failed(self, error: OSError) -> None:
        whose = "originator" if self.role == OPENER else "remote"  # the other side shows this text too
        self.fail(LocalFailed("the connection to the %s broke: %s" % (whose, reason(error))))

    def fail(self, error: Exception, answer: Error | None = None) -> None:
        """This side of the stream broke, or no link was found for it in time: a reset here, and Error tells the other
        side, or without a link Abandon does."""
        link, self.link = self.link, None
        was_over = self.is_over
        self._finish(error)
        if link is None:
            return None if was_over else self.keeper.on_unheard(self)
        link.last = self if self.role == OPENER and self.out.keeps else None
        if answer:
            link.refuse(answer)
        else:
            link.fail(error)

    def on_close(self, link: Link, error: Exception) -> None:
        if link is not self.link:
            return
        self._let_go()
        if isinstance(error, PeerError) or not self.out.keeps:
            return self._finish(error)
        if not isinstance(error, LinkClosed) or self.was_opened and not self.owner.limits.resume:
            return self.fail(error)  # the other side has seen the link break, and may wait for another one
        if self.was_opened and self.give_up_at == NEVER:
            self.since = self.loop.now
        if self.was_opened and not self.is_over:
            self.owner.counters.on_lost(self)
        return self.keeper.on_detached(self, link, error)

    def _let_go(self) -> None:
        """Without a link nothing is read from the local socket."""
        self.link = None
        if self.local is not None:
            self.local.want(WRITE if self._pending is not None else 0)

    def _finish(self, error: Exception | None) -> None:
        if self.is_over:
            return
        self.is_over, self.link, self.error = True, None, error
        if self._pending is not None:
            self._drop_pending()
        counters = self.owner.counters
        counters.count(error)
        counters.on_end(self, error)
        self._close_local(error)
        if error is not None or self.role == OPENER:  # an acceptor's last bytes may be asked for again
            self.out.close()
        self.keeper.on_ended(self, error)

    def _close_local(self, error: Exception | None = None) -> None:
        """The end of the local socket: a reset where there is an error."""
        local, self.local = self.local, None
        if local is not None:
            local.guard(error is not None)
            local.close()

    def abort(self, error: Exception) -> None:
        """After an internal error."""
        if self.link:
            self.link.abort(error)
        else:
            self.fail(error)


class OpenerStream(Stream):
    """A stream at the side that opens it."""

    __slots__ = ("asked",)
    role = OPENER
    keeper: Opener
    asked: bytes  # once it was opened: the instance that saw its last Open

    def open(self, link: Link) -> None:
        """Asks the other side, over `link`, to connect to the target, or to go on where the last link was lost."""
        out = self.out
        self.link, self.peer_key = link, link.peer_key
        if self.attempt and self.asked != link.instance and self.is_untouched:
            if link.is_resumable:
                self.keeper.leave_behind(self.id, self.asked)  # that one may have connected already
            self.set_free()
        self.asked = link.instance
        self.attempt += 1
        out.attach(link, out.acked if out.acked > out.end else out.start)  # what the other side is not known to have
        self._link_in = self._told = self.taken
        fields = (self.id, self.attempt, out.position, self.taken) if self.out.keeps else ()
        link.ask(self, Open(TCP, self.target, *fields))
        if self._broken and self.link:
            self._on_local_failed(self._broken)
        else:
            self.on_update()

    def take_early(self) -> memoryview | bytes:
        """The Data record that leaves with Open: what another link had before, or else what has come meanwhile. One
        packet in place of two for an originator that speaks first."""
        link, out = self.link, self.out
        assert link is not None
        if out.position < out.end:
            return out.next_record(link)
        room = 0 if out.has_eof or self.local is None else out.room(link, False)
        try:
            return out.read(self.local, room, link, False) if self.local is not None and room > 0 else b""
        except OSError as error:  # said once: the next read would find a clean end
            self._broken = error
            return b""

    def set_free(self) -> None:
        """No Open of this stream was looked at, or none by this run of the server: a new stream, of the same label."""
        self.id, self.attempt, self.out.sent = self.id[:3] + random_bytes(13), 0, 0

    @property
    def is_untouched(self) -> bool:
        """Whether another run of the server may have it: nothing of it was ever sent, or answered."""
        return not self.was_opened and not self.out.sent

    @property
    def instance(self) -> bytes:
        """That of the peer whose links alone will do, b"" where any will: another one must not have a part of it."""
        return b"" if self.is_untouched else self.asked

    def _on_answer(self, link: Link, kind: int, content: Any) -> None:
        if kind == OPENED:
            self._on_opened(link, content)
        elif kind == OVER:
            self._on_over(link)
        elif link.state == ASKED:
            self._let_go()
            link.leave(b"")
            self.keeper.on_closed_to(self, link)
        elif self._have_both_ends_passed():
            self._finish(None)
            link.leave(link.writer.record(ACK, self.taken) if self.out.keeps else b"")
        else:
            raise RemoteProtocolError("a Close in the middle of a stream")

    def _on_opened(self, link: Link, opened: Opened) -> None:
        if opened.taken < 0 and self.out.keeps:
            raise RemoteProtocolError("an Opened without a position")
        link.state, link.due = BUSY, NEVER
        if self.out.keeps:
            self.out.on_taken(opened.taken)
        if self._pending is not None:  # of an earlier link
            link.is_held = True
        if self.was_opened:
            self.owner.counters.on_resumed(self)
        self.was_opened, self.give_up_at = True, NEVER
        self.on_update()

    def _on_over(self, link: Link) -> None:
        if link.state == ASKED:
            if not (self._has_end and self.out.has_eof):
                raise RemoteProtocolError("the stream is over at the other side, and its last bytes are gone there")
        elif not self._have_both_ends_passed():
            raise RemoteProtocolError("Over before both Ends")
        self.out.acked = self.out.sent
        self._finish(None)
        link.last = self if self.out.keeps else None
        link.become_idle()

    def acknowledge_last(self, link: Link) -> None:
        """After Over: the Ack of the last position, unless the next Open was quicker."""
        if self._told != self.taken and self.out.keeps:
            self._acknowledge(link)


class AcceptorStream(Stream):
    """A stream at the side that connects to the remote."""

    __slots__ = ()
    role = ACCEPTOR

    def accept(self, link: Link, open_: Open) -> None:
        """The remote is connected, or the stream goes on over this link: RemoteProtocolError where the opener says what
        cannot be, ConnectError where it cannot go on."""
        out = self.out
        if open_.attempt > 1:
            out.check_taken(open_.taken)
            if open_.at > self.taken or open_.taken < out.start:
                raise ConnectError("the stream cannot go on: bytes are missing")
            self.owner.counters.on_resumed(self)
        self.link, self.attempt, self.was_opened, self.give_up_at = link, open_.attempt, True, NEVER
        out.attach(link, open_.taken)
        out.on_taken(open_.taken)
        self._link_in, self._told = open_.at, self.taken
        link.accept(self, BUSY, self.taken, self._pending is not None)

    def move_from(self) -> None:
        """The link that carries it ends without touching it: another one is there."""
        link = self.link
        self._let_go()
        if link:
            link.lose(LinkClosed("its stream goes on over another link"))

    def _finish(self, error: Exception | None) -> None:
        if not self.is_over:
            return super()._finish(error)
        self.link = None  # its last bytes have gone once more; after an error nobody asks for them any more
        return self.keeper.on_acknowledged(self, False) if error is not None else None

    def on_late_ack(self, taken: int) -> None:
        """After Over."""
        if self.link is not None or taken < self.out.acked:  # its last bytes were asked for over another link
            return
        self.out.on_taken(taken)
        if taken == self.out.sent:
            self.keeper.on_acknowledged(self, False)

    def on_acknowledged(self) -> None:
        """The next Open on the same link shows that its opener knows that this stream is over."""
        if self.link is not None:
            return
        self.out.acked = self.out.sent
        self.keeper.on_acknowledged(self, True)


class SocksStream(OpenerStream):
    """A stream that a SOCKS client asked for: the client learns how that went. The reply is no part of positions."""

    __slots__ = ("version",)
    version: int  # of SOCKS

    def _on_opened(self, link: Link, opened: Opened) -> None:
        is_first = not self.was_opened
        super()._on_opened(link, opened)  # where the server breaks the rules here, the client hears of no success
        if is_first and self.local is not None:
            try:
                self.local.send(socks_reply(self.version, 0))
            except OSError as error:  # said once: the next read would find a clean end
                self._on_local_failed(error)

    def _close_local(self, error: Exception | None = None) -> None:
        local = self.local
        if error is None or self.was_opened or local is None:
            return super()._close_local(error)
        self.local = None
        local.guard(False)
        LastWord(self.loop, local.release(), socks_reply(self.version, self._code(error)))
        return None

    @staticmethod
    def _code(error: Exception) -> int:
        code = error.code if isinstance(error, PeerError) else UNKNOWN
        if code == REMOTE_FAILED:
            return 4 if "cannot resolve" in str(error) else 5  # unreachable, refused
        return 2 if code == INVALID_HOST else 1  # not allowed; it failed


class StdioTransport(Transport):
    """Standard input and output as a socket. epoll refuses regular files and /dev/null: those are always ready."""

    __slots__ = ("_blocking", "_ready", "_scheduled")

    _ENDS = (READ, 0), (WRITE, 1)

    def __init__(self, loop: EventLoop, callback: Callable[[int], None]):
        self.sock: Any = None
        self._loop, self._callback, self.events = loop, callback, 0
        self._ready = self._scheduled = 0
        self._blocking: dict[int, bool] = {}
        for _, number in self._ENDS:
            # A terminal gets small writes: if this were killed, the shell would find its terminal non-blocking.
            if not os.isatty(number):
                self._blocking[number] = os.get_blocking(number)
                os.set_blocking(number, False)

    def want(self, events: int) -> None:
        for event, number in self._ENDS:
            before, after = self.events & event, events & event
            if before != after and not self._ready & event:
                try:
                    self._loop.watch(number, before, after, self._callback)
                except PermissionError:
                    self._ready |= event
        self.events = events
        if events & self._ready and not self._scheduled:
            self._scheduled = 1
            self._loop.call_soon_threadsafe(self._on_always_ready)

    def _on_always_ready(self) -> None:
        self._scheduled = 0
        events = self.events & self._ready
        if events:
            self._callback(events)
            self.want(self.events)

    def recv_into(self, view: memoryview, most: int = 0) -> int | None:
        try:
            if 0 not in self._blocking and not select.select([0], [], [], 0)[0]:
                return None  # a terminal where nothing has been typed
            return os.readv(0, [view[:most] if most else view])
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return os.write(1, data if 1 in self._blocking else data[:4096])
        except (BlockingIOError, InterruptedError):
            return 0

    def set_option(self, option: tuple[int, int], value: Any) -> None:
        """Pipes have none."""

    def guard(self, on: bool) -> None:
        """Pipes know no reset."""

    def half_close(self) -> None:
        self.want(self.events & READ)
        self._restore(1)
        if stat.S_ISSOCK(os.fstat(1).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(1)) as sock:
                sock.shutdown(socket.SHUT_WR)
        os.dup2(0, 1)  # nothing is written any more; /dev/null would take a descriptor, and may not be there

    def _restore(self, number: int) -> None:
        blocking = self._blocking.pop(number, None)
        if blocking is not None:
            with contextlib.suppress(OSError):
                os.set_blocking(number, blocking)

    def close(self) -> None:
        self.want(0)
        self._callback = None  # type: ignore[assignment]
        self.half_close()
        self._restore(0)


class StdioStream(OpenerStream):
    """The one stream of a `stdio:` tunnel; `finished(error)` once it is over."""

    __slots__ = ("_finished",)

    def __init__(self, keeper: Keeper, target: str, finished: Callable[[Exception | None], None]):
        self._finished = finished
        super().__init__(keeper, "stdio", target)
        self.local = StdioTransport(self.loop, self._on_event)

    def _on_local_failed(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:  # a reader that went away knows by itself
            log.error("❌ %s: standard input or output: %s", self.label, reason(error))
        super()._on_local_failed(error)

    def _finish(self, error: Exception | None) -> None:
        was_over = self.is_over
        super()._finish(error)
        if not was_over:  # soon: its link has not said yet why
            self.loop.call_later(0, functools.partial(self._finished, error))

# ======================================================================================================================
# 10. UDP
# ======================================================================================================================
# A port receives what waits at its socket as one run of datagrams, and `UdpLink` sends the run as one record. At the
# other side `UdpLink` gives each datagram to the port of its session. In ratrod2 all sessions of a client share one
# link, under numbers that rise; on the original's wire each has a link of its own.

IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8 if IS_LINUX else None)  # named in newer Pythons
UDP_BUFFER = 1 << 20  # bytes that the system is asked to keep of a burst for each UDP socket; Linux gives 416 KiB
KEPT = 64  # what a datagram that is kept for its target counts beside its bytes: an empty one is no way to fill memory


class UdpSession:
    """The datagrams between an originator and a target. `port` is this side's socket, whose other end is `key`;
    `address` is who answers, where that is known.

    Client: what the originator sends is dropped until `rests_until`.
    Server: until the first answer datagrams are `kept`, for a socket, or for the next of the `addresses`.
    """

    __slots__ = ("udp", "number", "label", "target", "outer", "port", "key", "peers", "is_over", "last_used", "started",
                 "sent", "received", "rests_until", "has_failed", "address", "head", "addresses", "attempt", "kept")

    def __init__(self, udp: UdpLink, number: int, label: str, target: str, outer: int = 0):
        self.udp, self.number, self.label, self.target, self.outer = udp, number, label, target, outer
        self.port: UdpPort | None = None
        self.key: Any = None
        self.peers: collections.OrderedDict[UdpSession, None]  # those of the same key, in the order of their last use
        self.last_used = self.started = udp.loop.now
        self.sent = self.received = self.attempt = 0
        self.rests_until, self.is_over, self.has_failed = 0.0, False, False
        self.address, self.head = "", b""  # `head`: what SOCKS5 has in front of an answer
        self.addresses: list[tuple[int, Any]] = []
        self.kept: list[bytes] = []

    @property
    def peer_key(self) -> bytes:
        return self.udp.peer_key

    # ---- server

    def keep(self, data: memoryview) -> None:
        memory, size = self.udp.owner.memory, sum(map(len, self.kept)) + len(data)
        if len(self.kept) < BATCH and size <= MAX_DATAGRAM and not memory.is_short(self.peer_key):
            memory.change(self.peer_key, len(data) + KEPT)
            self.kept.append(bytes(data))

    def take_kept(self) -> list[bytes]:
        kept, self.kept = self.kept, []
        if kept:
            self.udp.owner.memory.change(self.peer_key, -sum(len(data) + KEPT for data in kept))
        return kept

    def connect(self) -> None:
        """Sends what is kept to the next address that a socket can be had for; OSError where there is none."""
        loop = self.udp.loop
        while True:
            family, address = self.addresses[self.attempt % len(self.addresses)]
            try:
                sock = open_udp(loop, family, address)
                break
            except OSError:
                self.addresses.remove((family, address))
                if not self.addresses:
                    raise
        if self.outer:  # an unconnected socket hears no ICMP
            self.addresses, self.attempt, self.key = [(family, address)], 0, sock.getpeername()[:2]
            sock.close()
            shared, number = self.udp.shared, (self.outer, family)
            if number not in shared:
                shared[number] = RemotePort(loop, open_udp(loop, family), self.peer_key, is_shared=True)
            self.port = shared[number]
        else:
            self.port = RemotePort(loop, sock, self.peer_key, is_shared=False)
        self.port.join(self)
        for data in self.take_kept():
            if self.is_over:  # an earlier one was refused at once, and there is no other address
                break
            with contextlib.suppress(OSError):
                self.port.send(self, memoryview(data))  # where it is refused at once, the port is another one then

    def on_refused(self) -> bool:
        """An ICMP refusal: before any answer the next address is tried, after the last one the first again. What is
        kept goes to each address once. False where the session stays where it is."""
        if self.address or len(self.addresses) < 2 or self.port is None:
            return False
        self.attempt += 1
        self.port.leave(self)
        try:
            self.connect()
        except OSError as error:
            self.udp.owner.on_session_failed(self, error)
        return True

    def on_first_answer(self) -> None:
        """The target is found. A client that knows only its name is told the address."""
        found = _, (host, port, *_) = self.addresses[self.attempt % len(self.addresses)]
        self.address, self.addresses = str(Address(host.split("%")[0], port)), [found]
        self.take_kept()
        if not is_address(parse_target(self.target).host) and self.udp.link:
            self.udp.link.send_record(SESSION_ADDRESS, self.number, self.address)


class UdpSessions:
    """The UDP sessions of an endpoint, by key, the least recently used first. Where a link has too many it loses its
    first one; where there are more than `most` in all, the key that has most does."""

    PER_LINK, IN_ALL = "--max-udp-sessions-per-link", "--max-udp-sessions"

    def __init__(self, owner: Endpoint, most: int, flag: str, timeout: float):
        self._owner, self._most, self._flag, self._timeout = owner, most, flag, timeout
        self._of_key: dict[bytes, collections.OrderedDict[UdpSession, None]] = {}

    def add(self, session: UdpSession) -> None:
        """The session that makes room may be this one."""
        udp, all_sessions, most = session.udp, self._owner.counters.sessions, self._owner.limits.udp_sessions
        udp.sessions[session.number] = session
        all_sessions.add(session)
        session.peers = self._of_key.setdefault(udp.owner_key, collections.OrderedDict())
        session.peers[session] = None
        if len(all_sessions) > self._most:
            greediest = max(self._of_key.values(), key=len)
            self._evict(next(iter(greediest)), self._most, self._flag)
        if len(udp.sessions) > most:
            self._evict(next(iter(udp.sessions.values())), most, self.PER_LINK)

    def _evict(self, session: UdpSession, most: int, flag: str) -> None:
        """Ends a session that may be alive, for another."""
        self._owner.loop.complain("❌ UDP: %d more sessions ended to make room for others", "❌ %s: ended to make room: "
                                  "there are more than %d UDP sessions (%s)" % (session.label, most, flag))
        session.udp.end(session)

    def sweep(self) -> None:
        """Ends the sessions that have been idle too long."""
        since = self._owner.loop.now - self._timeout
        for key, sessions in list(self._of_key.items()):
            idle = itertools.takewhile(lambda session: session.last_used <= since, sessions)
            for session in list(itertools.islice(idle, 512)):  # a second: 5,000 at once took 0.3 s
                session.udp.end(session)
            if not sessions:
                del self._of_key[key]


class UdpLink(LinkUser):
    """The UDP sessions of a link by their numbers, the least recently used first, and the datagrams that wait for the
    link, bounded in bytes and in time. A client's sessions survive their link, and are announced again on the next one,
    for which this waits at the pool (`since`, `instance`)."""

    JOINED = 0.01  # seconds: datagrams that began to wait within so little are one piece of the queue

    def __init__(self, owner: Any, peer_key: bytes = b""):
        self.owner, self.loop, self.limits = owner, owner.loop, owner.limits
        self.owner_key = self.peer_key = peer_key  # whose sessions it has: all of a client's are its own
        self.link: Link | None = None
        self.sessions: collections.OrderedDict[int, UdpSession] = collections.OrderedDict()
        self.since = self.rests_until = self.opened_at = 0.0
        self.instance = b""
        self.failures = 0  # links in a row that were lost soon
        self.shared: dict[tuple[int, int], RemotePort] = {}  # by `outer` and family
        self._queue: collections.deque[tuple[float, bytearray]] = collections.deque()
        self._rest = b""  # datagrams that came, for the next turns
        self.next_number, self._new, self._counted = 1, 0, 0

    # ---- sessions

    def new_session(self, port: UdpPort, key: Any, label: str, target: str) -> UdpSession:
        """Client: a session under the next number, which the server is told of."""
        session = UdpSession(self, self.next_number, label, target, port.outer)
        self.next_number += 1
        session.port, session.key = port, key
        port.join(session)
        self.owner.sessions.add(session)
        self._announce(session)
        return session

    def renew(self, session: UdpSession) -> None:
        """Client: asks for a session again that has failed, under a new number."""
        del self.sessions[session.number]
        session.number, session.rests_until, self.next_number = self.next_number, 0.0, self.next_number + 1
        self.sessions[session.number] = session
        self._announce(session)

    def _announce(self, session: UdpSession) -> None:
        if self.link and not self.link.is_legacy and not session.is_over:
            self.link.send_record(SESSION, session.number, session.target, session.outer)

    def touch(self, session: UdpSession) -> None:
        session.last_used = self.loop.now
        self.sessions.move_to_end(session.number)
        session.peers.move_to_end(session)

    def end(self, session: UdpSession, error: Exception | None = None,
            tell: Error | None = Error(UNKNOWN, "")) -> None:  # noqa: B008 - a constant
        """Forgets the session, and tells the other side why unless that was what told us. May be called twice."""
        if session.is_over:  # the link has found out that it is broken, which ended all of its sessions
            return
        session.is_over = True
        del self.sessions[session.number], session.peers[session]
        session.take_kept()
        if not self.sessions:
            self._forget()
        if session.port:
            session.port.leave(session)
        if self.link and self.link.is_legacy:
            self.drop_link()
        elif self.link and tell:
            self.link.send_record(SESSION_OVER, session.number, *tell)
        self.owner.counters.on_end(session, error)

    # ---- out

    def send_run(self, end: int) -> None:
        """Sends the run of datagrams at scratch_out[HEADROOM:end], or keeps it for a link without a backlog."""
        link, queue = self.link, self._queue
        if link is not None and not link.out and not queue:
            return link.send(link.writer.datagrams(self.loop.scratch_out, end))
        now, run = self.loop.now, self.loop.scratch_out[HEADROOM:end]
        if link is None and (not self.sessions or now < self.rests_until):
            return None
        if queue and now - queue[-1][0] < self.JOINED and len(queue[-1][1]) + len(run) <= DATAGRAMS_AT_ONCE:
            queue[-1][1].extend(run)
        else:
            queue.append((now, bytearray(run)))
        # What waits for a client that does not read is no longer kept where its key has no memory left.
        most = 0 if self.owner.memory.is_out(self.owner_key) else self.limits.udp_backlog
        while sum(len(run) for _, run in queue) > most:
            oldest = queue[0][1]
            del oldest[:DATAGRAM_HEADER.size + DATAGRAM_HEADER.unpack_from(oldest)[1]]
            self.owner.counters.dropped += 1
            if not oldest:
                queue.popleft()
        self._count()
        return self.on_update() if link else self.ask_for_link()

    def _count(self) -> None:
        n = sum(len(run) for _, run in self._queue) + len(self._rest)
        self.owner.memory.change(self.owner_key, n - self._counted)
        self._counted = n

    def _forget(self) -> None:
        """Drops the datagrams that wait, in either direction."""
        self._queue.clear()
        self._rest = b""
        self._count()

    def on_update(self) -> None:
        link, queue = self.link, self._queue
        # While the link was open the datagrams waited for nothing but the link; what waited too long is stale.
        now, limits = self.loop.now, self.limits
        is_open = link and link.state == UDP_OPEN and self.opened_at < now - limits.udp_lag
        while queue and queue[0][0] < now - (limits.udp_lag if is_open else limits.connect_timeout):
            self.owner.counters.dropped += sum(1 for _ in split_datagrams(memoryview(queue.popleft()[1])))
        while queue and link and link.state != CLOSED and not link.out:
            _, run = queue.popleft()
            self.loop.payload[:len(run)] = run
            link.send(link.writer.datagrams(self.loop.scratch_out, HEADROOM + len(run)))
        if self._counted:
            self._count()
        if link and link.is_held and not self._rest and not link.out and link.state == UDP_OPEN:
            link.release()

    # ---- links

    def ask_for_link(self) -> None:
        """Client: waits for a link, if it does not yet."""
        if self not in self.owner.pool.waiting:
            self.owner.pool.take(self)

    def open(self, link: Link) -> None:
        """Client: `link` carries the sessions from now on. They are announced again, in the order of their numbers."""
        if not self.sessions:  # they ended meanwhile
            link.close() if link.is_legacy else self.owner.on_idle(link, b"")
            return
        self.opened_at, self.peer_key = self.loop.now, link.peer_key
        link.transport.set_option(UNSENT, UNSENT_DATAGRAMS)
        link.ask(self, Open(UDP, ""))
        if link.state == CLOSED:
            return
        self.link = link  # only now: a datagram must not pass the Open and the Session that it belongs to
        for number in sorted(self.sessions):
            self._announce(self.sessions[number])
        self.loop.call_later(0, link.update)  # not now: a datagram that was just received may be in the scratch buffer

    def fail(self, error: Exception) -> None:
        """Client: there is no link. What waited has waited long enough."""
        self.opened_at = self.loop.now
        self._forget()
        self.owner.on_udp_lost(self, None, error)

    def accept(self, link: Link) -> None:
        self.link, self.next_number = link, 0
        link.transport.set_option(UNSENT, UNSENT_DATAGRAMS)
        link.accept(self, UDP_OPEN)

    def on_close(self, link: Link, error: Exception) -> None:
        self.drop_link()
        self.owner.on_udp_lost(self, link, error)

    def drop_link(self) -> None:
        """Ends the link without a fault."""
        link, self.link, self._rest = self.link, None, b""
        self._count()
        if link:
            link.user = NOBODY
            link.close()

    def close(self) -> None:
        self.drop_link()
        for session in list(self.sessions.values()):
            self.end(session, tell=None)
        self.next_number = 1

    # ---- in

    def on_record(self, link: Link, kind: int, content: Any) -> None:
        session = self.sessions.get(content.number) if kind in (SESSION_ADDRESS, SESSION_OVER) else None
        if kind == OPENED:
            link.state, link.due = UDP_OPEN, NEVER
            link.update()
        elif kind == DATAGRAMS:
            self._deliver(link, content)
        elif kind == UDP_DATA:
            self._on_datagram(next(iter(self.sessions.values())), content)  # its only one
        elif kind == SESSION:
            self._on_session(link, content)
        elif kind == SESSION_ADDRESS and session:
            session.address, session.head = content.address, b""
        elif kind == SESSION_OVER and session:
            if content.code == UNKNOWN or link.role == ACCEPTOR:
                self.end(session, tell=None)  # the other side has forgotten it: the next datagram makes a new session
            else:
                self.owner.on_session_failed(session, PeerError(content.code, content.text))
        elif kind == CLOSE:
            raise LinkClosed("the server takes no more streams on this connection")

    def _on_datagram(self, session: UdpSession, data: memoryview) -> None:
        self.touch(session)
        session.received += len(data)
        if session.port is None:
            return session.keep(data)
        try:  # contextlib.suppress() is three calls
            session.port.send(session, data)
        except (OSError, ValueError):  # the socket does not take it, or the server names an address that is none
            pass
        return None

    def _deliver(self, link: Link, run: memoryview) -> None:
        """Delivers as many datagrams as one turn takes. The link holds until the rest has had its turns."""
        at = 0
        for number, data in itertools.islice(split_datagrams(run), DATAGRAMS_IN_TURN):
            at += DATAGRAM_HEADER.size + len(data)
            session = self.sessions.get(number)
            if session:  # otherwise this side has forgotten it
                self._on_datagram(session, data)
        if self.link is link and (self._rest or at < len(run)):
            self._rest = bytes(run[at:])
            self._count()
            if self._rest:
                link.is_held = True
                self.loop.take_turn(self.owner_key, self._go_on)

    def _go_on(self, _mask: int = 0) -> None:
        """After the others had their turn."""
        link = self.link
        if link:
            try:
                self._deliver(link, memoryview(self._rest))
            except RemoteProtocolError as error:
                link.abort(error)
            link.update()  # where there is no rest, also because the last session has ended, on_update() lets go

    def _on_session(self, link: Link, message: Session) -> None:
        """Server: a new session, under a number that is higher than all before."""
        if message.number < self.next_number:
            raise RemoteProtocolError("a UDP session with the number %d, which is not a new one" % message.number)
        self.next_number = message.number + 1
        label = new_label(link.name, "udp " + message.target)
        session = UdpSession(self, message.number, label, message.target, message.outer)
        self.owner.sessions.add(session)
        if not session.is_over:
            self.owner.on_session(session, lambda error: error and self.owner.on_session_failed(session, error))
        self._new += 1
        if self.link and self._new % SESSIONS_IN_TURN == 0:
            link.pause()
        if self.link and len(link.out) > self.limits.udp_backlog:
            link.is_held = True  # nothing more is done for a client that does not read what it is told


# ---- sockets


def open_udp(loop: EventLoop, family: int, address: Any = None) -> socket.socket:
    """A UDP socket that is connected to `address`; without one it is bound to any port, and hears everybody."""
    sock = loop.make_socket(family, socket.SOCK_DGRAM)
    try:
        if address is None:
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        else:
            sock.connect(address)
        return sock
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise OSError(error.errno, "it is a broadcast address, or a firewall forbids it") from None
        raise


def is_refusal(error: OSError) -> bool:
    """Whether it is the ICMP answer to an earlier datagram."""
    return isinstance(error, ConnectionError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)


class UdpPort:
    """A UDP socket, and the sessions of those at its other end."""

    outer = 0

    def __init__(self, loop: EventLoop, sock: socket.socket):
        self.loop, self.sock = loop, sock
        self.sessions: dict[Any, UdpSession] = {}
        self._transport = Transport(loop, sock, self._on_event)
        self._transport.set_option(RECEIVE_BUFFER, UDP_BUFFER)

    def start(self) -> None:
        try:
            self._transport.want(READ)
        except OSError:  # epoll has no room for it
            self._transport.close()
            raise

    def join(self, session: UdpSession) -> None:
        self.sessions[session.key] = session

    def leave(self, session: UdpSession) -> None:
        if self.sessions.get(session.key) is session:
            del self.sessions[session.key]

    def _on_event(self, _mask: int) -> None:
        """Makes as few runs as possible of the datagrams that are there, in the loop's scratch buffer: each datagram is
        received right where it is sealed."""
        scratch, at, header = self.loop.scratch_out, HEADROOM, DATAGRAM_HEADER.size
        udp: UdpLink | None = None  # whose run it is
        for _ in range(BATCH):
            if not self._transport.events:  # what came before has ended it
                break
            room = scratch[at + header:at + header + MAX_DATAGRAM + 1]
            try:
                session, start, end = self._receive(room)
            except OSError:  # nothing more is there, or an ICMP answer to an earlier datagram
                break
            n = end - start
            if session is None or session.is_over or n > MAX_DATAGRAM:  # IPv6 allows a little more; room has cut it off
                continue
            data, is_in_place = room[start:end], not start
            session.udp.touch(session)
            session.sent += n
            if session.udp is not udp or at + header + n > HEADROOM + DATAGRAMS_AT_ONCE:
                if udp is not None:
                    data, is_in_place = memoryview(bytes(data)), False  # sealing writes a tag over what follows the run
                    udp.send_run(at)
                udp, at = session.udp, HEADROOM
            DATAGRAM_HEADER.pack_into(scratch, at, session.number, n)
            at += header + n
            if not is_in_place:
                scratch[at - n:at] = data
        if udp is not None:
            udp.send_run(at)

    def _receive(self, room: memoryview) -> tuple[UdpSession | None, int, int]:
        """The session of the next datagram, and where in `room` its payload begins and ends. OSError: none is there."""
        raise NotImplementedError

    def send(self, session: UdpSession, data: memoryview) -> None:
        """OSError where the socket does not take it."""
        raise NotImplementedError

    def close(self) -> None:
        self._transport.close()


class RemotePort(UdpPort):
    """The server's socket towards the target of a session, connected: the system drops what others send, and tells of
    refusals. The sessions of one `outer` share a socket that is not, so that their targets see one port: it takes
    datagrams from the addresses that were sent to alone."""

    def __init__(self, loop: EventLoop, sock: socket.socket, peer_key: bytes, *, is_shared: bool):
        super().__init__(loop, sock)
        self.peer_key, self._is_shared, self._users = peer_key, is_shared, 0  # its turns are those of its client's key
        self.start()

    def join(self, session: UdpSession) -> None:
        self._users += 1
        self.sessions.setdefault(session.key, session)

    def leave(self, session: UdpSession) -> None:
        super().leave(session)
        self._users -= 1
        session.port = None
        if not self._users:
            session.udp.shared.pop((session.outer, self.sock.family), None)
            self.close()

    def _receive(self, room: memoryview) -> tuple[UdpSession | None, int, int]:
        if self._is_shared:
            n, source = self.sock.recvfrom_into(room)
            session = self.sessions.get(source[:2])
        else:
            session = self.sessions[None]
            try:
                n = self.sock.recv_into(room)
            except OSError as error:
                if is_refusal(error):
                    session.on_refused()
                raise
        if session and not session.address:
            session.on_first_answer()
        return session, 0, n

    def send(self, session: UdpSession, data: memoryview) -> None:
        if self._is_shared:
            self.sessions[session.key] = session  # of two sessions with one address the last sender's gets the answer
            self.sock.sendto(data, session.key)
            return
        if session.attempt + 1 < len(session.addresses):
            session.keep(data)
        try:
            self.sock.send(data)
        except OSError as error:
            if is_refusal(error) and not session.on_refused():
                self.sock.send(data)  # the refusal of an earlier datagram ends nothing


class TunnelPort(UdpPort):
    """The client's socket that a tunnel listens on.

    On a wildcard address it answers from the address that was asked. Otherwise the kernel picks one, and the originator
    does not know the answer for its own.
    """

    def __init__(self, client: Client, sock: socket.socket, target: str):
        super().__init__(client.loop, sock)
        self._client, self._target = client, target
        is_v6, is_wildcard = sock.family == socket.AF_INET6, sock.getsockname()[0] in ("0.0.0.0", "::")
        option = getattr(socket, "IPV6_RECVPKTINFO", None) if is_v6 else IP_PKTINFO
        self._hears_destinations = is_wildcard and option is not None and hasattr(sock, "recvmsg_into")
        if self._hears_destinations:
            sock.setsockopt(socket.IPPROTO_IPV6 if is_v6 else socket.IPPROTO_IP, option, 1)  # type: ignore[arg-type]

    drain = UdpPort.close  # what waits is not taken: UDP may lose

    def _receive(self, room: memoryview) -> tuple[UdpSession | None, int, int]:
        """The other end is an address, and the control message that makes an answer leave from where it was asked."""
        answer_from: Any = None
        if self._hears_destinations:
            n, control, _flags, address = self.sock.recvmsg_into([room], 256)
            for level, kind, data in control:  # of IPv4 the interface is left open
                answer_from = level, kind, data if level == socket.IPPROTO_IPV6 else bytes(4) + data[4:8] + bytes(4)
        else:
            n, address = self.sock.recvfrom_into(room)
        key = address, answer_from
        session = self.sessions.get(key)
        if session is None or session.rests_until:
            session = self._client.find_session(self, key, self._target, address)
        return session, 0, n

    def send(self, session: UdpSession, data: memoryview) -> None:
        address, control = session.key
        if control:
            self.sock.sendmsg([data], [control], 0, address)
        else:
            self.sock.sendto(data, address)


class SocksPort(UdpPort):
    """The client's end of a UDP ASSOCIATE of SOCKS5, which lives as long as the TCP connection that asked for it. Each
    datagram names its target. One sender is heard: the one that ASSOCIATE names, or that of the first datagram, on the
    machine of the TCP connection. Others on that machine have not given the password of --socks-user."""

    def __init__(self, client: Client, sock: socket.socket, peer: str, asked: str, outer: int):
        self._host, self.outer, self._client = peer, outer, client
        host, _, port = asked.rpartition(":")
        with contextlib.suppress(ValueError):  # a name is no machine: PySocks names `0`
            named = parse_ip(host.strip("[]"))
            if not named.is_unspecified and named != parse_ip(self._host):
                raise OSError("its datagrams would come from another machine than its connection")
        self._sender_port = int(port)
        self._sender: Any = None
        super().__init__(client.loop, client.loop.make_socket(sock.family, socket.SOCK_DGRAM))
        self._connection = Transport(client.loop, sock, self._on_connection)
        try:
            host, _, *scope = sock.getsockname()
            self.sock.bind((host, 0, *scope))
            self._transport.want(READ)
            self._connection.want(READ)
            self._connection.send(socks_reply(5, 0, Address(*self.sock.getsockname()[:2])))
        except OSError:
            self._transport.close()
            self._connection.release()
            raise

    def _receive(self, room: memoryview) -> tuple[UdpSession | None, int, int]:
        n, source = self.sock.recvfrom_into(room)
        try:
            if source != self._sender and (
                    self._sender or source[0] != self._host or self._sender_port not in (0, source[1])):
                raise ValueError("it comes from another program than this association is for")
            size = measure_socks_head(room[:n])
            key = bytes(room[3:size])
            session = self.sessions.get(key)
            if session is None or session.rests_until:
                target = parse_target(split_socks_datagram(room[:n])[0])
                session = self._client.find_session(self, key, str(target), source)
        except ValueError as error:
            self.loop.complain("❌ %d more SOCKS datagrams that go nowhere",
                               "❌ SOCKS client `%s`, a datagram: %s" % (show_address(source), error))
            return None, 0, n
        self._sender = source
        return session, size, n

    def send(self, session: UdpSession, data: memoryview) -> None:
        if not session.head:
            # An original server does not say who answers, and programs do not understand a name there.
            known = parse_target(session.address or session.target)
            known = known if is_address(known.host) else Address("0.0.0.0", known.port)
            session.head = b"\0\0\0" + socks_address(known)
        self.sock.sendto(b"".join((session.head, data)), self._sender)

    def _on_connection(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            if self._connection.recv_into(memoryview(bytearray(4096))) != 0:
                return
        self.close()

    def close(self) -> None:
        self._connection.close()
        super().close()
        for session in list(self.sessions.values()):
            session.udp.end(session)
        self._client.associations.discard(self)

# ======================================================================================================================
# 11. ssh
# ======================================================================================================================

LINKS_OF_A_CONNECTION = 8  # sshd takes 10 sessions on one connection by default (MaxSessions)
# Nothing of the user's own configuration may get in the way. ControlPersist: seconds that a shared connection waits for
# another link, even where its client was killed.
SSH_OPTIONS = ("ControlPersist=60 LogLevel=ERROR RemoteCommand=none ClearAllForwardings=yes PermitLocalCommand=no"
               " ServerAliveInterval=15 ServerAliveCountMax=3")
BOOTSTRAP = b"""\
import os,sys
v=sys.version_info[:2]
if v<(3,8):sys.exit("ratrod needs Python 3.8 or later there, and this is %d.%d: --remote-python names another"%v)
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
    """The text of this very module, out of a file or a .pyz; ConfigError where there is neither."""
    with contextlib.suppress(KeyError, AttributeError, ImportError, OSError):
        source = globals()["__loader__"].get_source(__name__)
        if source:
            return str(source)
    raise ConfigError("ssh:// sends ratrod's own source to the far side, and cannot read it: run ratrod.py, or"
                      " ratrod.pyz")


class SshLink:
    """The ssh process of one link: `sock` is our end of its standard input and output, `errors` its standard error, and
    `said` the end of that, once the process has ended. `is_first`: its shared connection at `path` was made for it."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, errors: Any, path: str, is_first: bool):
        self.process, self.sock, self.errors, self.path, self.is_first = process, sock, errors, path, is_first
        self.said, self.closed_at = "", 0.0


class SshLinks:
    """Links to one machine through the system's ssh, where only Python is installed: each is an ssh process that starts
    Python there and sends it this source. A link takes three steps: start() on a thread; handshake() on the loop, over
    link.sock within `patience` seconds; if that failed, explain() on a thread, once link.sock is closed.

    Eight links share a connection (ssh's ControlMaster), which is authenticated once. Where that is gone, or sshd takes
    fewer sessions on it, the ssh of a link makes a connection by itself. Where this client is killed all of that ends:
    the far sides when their standard input does, the shared connections after a minute.
    """

    LINGER = 5.0  # seconds that a link's process may take to end
    REST = 600.0  # seconds without a further connection, after one that needed a password

    def __init__(self, command: Sequence[str], python: str, server: SshHost, limits: Limits):
        import shlex
        import shutil
        import zlib

        self._server, self._command, self._python = server, command, python
        if not hasattr(os, "fork"):
            raise ConfigError("ssh:// needs a POSIX system, whose ssh shares connections")
        if not shutil.which(command[0]):
            raise ConfigError("ssh:// needs `%s`, which is not installed here: install OpenSSH's client, or name it"
                              " with --ssh-command" % printable(" ".join(self._command)))
        self._options = "%s ConnectTimeout=%d" % (SSH_OPTIONS, max(1, limits.connect_timeout))
        self.patience = limits.connect_timeout + limits.handshake_timeout
        marker = b"\nratrod %s\n" % os.urandom(16).hex().encode("ascii")
        program = zlib.compress(b"%s\ninf = NEVER\nserve_pipe(%r, %r)\n" % (
            own_source().encode("utf-8"), marker, limits._asdict()))
        self.handshake = functools.partial(PipeHandshake, program, marker)
        # The login shell there expands a ~ in front of the path, and takes nothing in the path apart.
        python = re.sub("^'(~[^/]*/)", r"\1'", shlex.quote(self._python))
        self._boot = '%s -IS -c "exec(bytes.fromhex(\'%s\'))" %d' % (python, BOOTSTRAP.hex(), len(program))
        self._starting = threading.Lock()  # held while a link starts, or the connection for it is made: one at a time
        self._lock = threading.Lock()  # guards the attributes below
        self._links: list[SshLink] = []  # those whose process runs
        self._folder = ""  # of the sockets by which ssh finds the shared connections
        self._maker: subprocess.Popen[bytes] | None = None  # makes the newest of them, then ends
        self._failed: tuple[float, Exception] = (-NEVER, ConnectError("unknown reason"))
        self._most, self._most_until = 0, -NEVER  # links, where no further connection is let in; until when
        self._is_closed = False

    # ---- the steps of a link

    def start(self, may_ask: bool) -> SshLink:
        """A link whose ssh process has started. On a thread; `may_ask`: ssh may ask questions at the terminal.

        ConnectError or AuthenticationError says what ssh says; Overloaded: the links that are there are all.
        """
        import tempfile

        began = time.monotonic()
        try:
            with self._starting, contextlib.ExitStack() as stack:
                shared = self._find_connection(began)
                path = shared or self._connect(began, may_ask)
                ours, theirs = map(stack.enter_context, socket.socketpair())
                errors = stack.enter_context(tempfile.TemporaryFile("a+b"))  # noqa: SIM115 - reap() closes it
                process = self._run(["-oControlMaster=auto", "-oBatchMode=yes"], path, self._boot, stdin=theirs,
                                    stdout=theirs, stderr=errors, start_new_session=True)
                stack.pop_all()
                theirs.close()
                link = SshLink(process, ours, errors, path, not shared)
                with self._lock:
                    self._links.append(link)
                    if self._is_closed:
                        wait_for(process, 0)
                return link
        except OSError as error:
            raise ConnectError("cannot run `%s`: %s" % (self._command[0], reason(error))) from None

    def explain(self, link: SshLink, handshake: PipeHandshake, error: Exception) -> RatrodError | None:
        """Why the handshake failed: what to give up with, None for another try. On a thread; link.sock is closed."""
        code = wait_for(link.process, 2)
        self.reap()
        log.debug("ssh to `%s` failed (%s, exit code %d): %s", self._server, error, code, printable(link.said))
        failure = self._error(code, link.said or "%s\n%s" % (handshake.seen.decode("utf-8", "replace"), error), "")
        if link.is_first or not isinstance(failure, ConnectError):
            return failure
        # The shared connection does not answer any more: no other link finds it. Or a Ctrl-C has reached an ssh that
        # was just starting, before it had a session of its own.
        if code != -signal.SIGINT:
            with contextlib.suppress(OSError):
                os.rename(link.path, link.path + ".old")
        return None

    def _run(self, options: list[str], path: str, *command: str, **named: Any) -> subprocess.Popen[bytes]:
        """An ssh process that uses the shared connection at `path`. A stream that is not named leads nowhere."""
        import subprocess

        server, nowhere = self._server, subprocess.DEVNULL
        return subprocess.Popen(
            [*self._command, *options, "-T", "-a", "-x", "-oControlPath=" + path,
             *("-o" + option for option in self._options.split()), *(["-l", server.user] if server.user else []),
             *(["-p", str(server.port)] if server.port else []), "--", server.host, *command],
            **{"stdin": nowhere, "stdout": nowhere, "stderr": nowhere, **named})

    def _error(self, code: int, said: str, why: str, asked: bool = True) -> RatrodError:
        """The error for an ssh process that failed: its last lines, or `why` where it said nothing."""
        lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()]
        text = printable("; ".join(lines[-3:]) or why, 400)
        missing = "{0}.*(not found|No such file)|Unknown command.*{0}".format(re.escape(os.path.basename(self._python)))
        if code in (126, 127) or code != 255 and re.search(missing, said, re.IGNORECASE):  # 255: ssh itself failed
            text = ("there is no `%s` (%s); it needs Python 3.8 or later there, and nothing else: --remote-python names"
                    " one that is not on the PATH" % (self._python, text))
        refusals = "Permission denied|Host key verification failed|Too many authentication failures"
        message = "ssh to `%s`: %s" % (self._server, text)
        if code != 255 or not re.search(refusals, said):
            return ConnectError(message)
        if self._links:  # the links that are there had what this one lacks, as an answer to a question
            self._most, self._most_until = len(self._links), time.monotonic() + self.REST
            return Overloaded(message)
        return AuthenticationError(message + ("; see that `ssh` lets you in there" if asked else
                                              "; nothing can be asked here: see that `ssh` to there needs no answer"))

    # ---- the connections that links share

    def _names(self) -> list[str]:
        """Of the sockets in the folder; none where the folder is gone, as after a cleaning of /tmp."""
        with contextlib.suppress(OSError):
            return os.listdir(self._folder)
        return []

    def _find_connection(self, began: float) -> str:
        """The path of a shared connection that takes one more link, "" where there is none."""
        while True:
            self.reap()
            with self._lock:
                users = collections.Counter(link.path for link in self._links)
                is_one_ending = any(link.sock.fileno() < 0 for link in self._links)
            is_full = sum(users.values()) >= self._most and time.monotonic() < self._most_until
            for name in [] if is_full else self._names():
                path = os.path.join(self._folder, name)
                if users[path] < LINKS_OF_A_CONNECTION and "." not in name:  # ssh makes `m12ef` of `m12ef.JgTz4`
                    return path
            if not is_one_ending or time.monotonic() - began > 1:
                if is_full:
                    raise Overloaded("ssh to `%s`: no further connection for now" % str(self._server))
                return ""
            time.sleep(0.02)

    def _connect(self, began: float, may_ask: bool) -> str:
        """Makes a shared connection: its path. ssh may ask at the terminal, and once authenticated goes behind (-f)."""
        import tempfile

        if self._failed[0] > began:  # for another thread, while this one waited for it
            raise self._failed[1]
        with tempfile.TemporaryFile("a+b") as errors:
            with self._lock:
                if self._is_closed:
                    raise ConnectError(ENDING)
                if not os.path.isdir(self._folder):
                    # Its path is to be short enough for a Unix socket's address, and plain enough for ssh.
                    is_plain = re.fullmatch(r"[\w./-]{1,50}", tempfile.gettempdir(), re.ASCII)
                    self._folder = tempfile.mkdtemp(prefix="ratrod-", dir=None if is_plain else "/tmp")
                path = os.path.join(self._folder, "m" + os.urandom(4).hex())
                options = ["-f", "-N", "-oControlMaster=yes", *([] if may_ask else ["-oBatchMode=yes"])]
                self._maker = self._run(options, path, stderr=errors, start_new_session=not may_ask)
            code = wait_for(self._maker, None if may_ask else self.patience)
            if code == 0 and not self._is_closed:
                return path
            why = "no connection within %g s" % self.patience if code == -signal.SIGKILL else "it ended without a word"
            error = self._error(code, last_lines(errors), why, may_ask)
            self._failed = time.monotonic(), error
            raise error

    def reap(self) -> None:
        """Takes note of the processes that have ended; kills one that does not end."""
        now = time.monotonic()
        with self._lock:
            for link in list(self._links):
                if link.process.poll() is not None:
                    self._links.remove(link)
                    link.said = last_lines(link.errors)
                    link.errors.close()
                elif link.sock.fileno() < 0:
                    link.closed_at = link.closed_at or now
                    if now - link.closed_at > self.LINGER:
                        link.process.kill()
                elif os.fstat(link.errors.fileno()).st_size > 1 << 20:  # the far side's log is not to fill this disk
                    link.errors.truncate(0)

    def close(self) -> None:
        import shutil

        with self._lock:
            self._is_closed = True
            if self._maker:
                # Not killed at once: a terminal that asks for a password shows nothing until ssh has undone that.
                self._maker.terminate()
                wait_for(self._maker, 2)
            for name in self._names():
                with contextlib.suppress(OSError):
                    wait_for(self._run(["-O", "exit"], os.path.join(self._folder, name)), 2)
            for link in self._links:
                wait_for(link.process, 0)
        self.reap()
        shutil.rmtree(self._folder, ignore_errors=True)


def wait_for(process: subprocess.Popen[bytes], seconds: float | None) -> int:
    """The exit code of a process, which is killed after so many seconds."""
    import subprocess

    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def last_lines(file: Any) -> str:
    """The end of what an ssh process wrote to its standard error."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return str(file.read().decode("utf-8", "replace"))

# ======================================================================================================================
# 12. Openers and acceptors
# ======================================================================================================================
# A waiter needs a link: a Stream, a UdpLink, or the question for a Listen link. An Opener calls its open(link), or
# fail(error). `since`: when it began to wait; `instance`: that of the peer whose links alone will do, b"" where any
# will.


Report = Callable[..., None]  # takes a line for the log, as log.info() does


def is_final(error: Exception) -> bool:
    """Whether it is about keys: another try would end the same."""
    return getattr(error, "exit_code", 1) == AuthenticationError.exit_code


def resume_time(limits: Limits, error: Exception) -> float:
    """Seconds that a stream waits for another link: fewer where the peer's system ended the link, for its process has
    died or is back in a moment, than where the path is silent."""
    return min(limits.resume, NEVER if isinstance(error, (LinkSilent, LinkSpoiled)) else limits.resume_after_close)


class Opener(Keeper):
    """Idle links, and the streams that wait for one: a client's pool of links, and each reverse address of a server.

    Detached streams go before new ones. A link goes to those alone that its instance allows. What was given up is said
    on the next idle link of its instance (Abandon).
    """

    def __init__(self, owner: Endpoint):
        super().__init__(owner)
        self.idle: list[Link] = []  # the last used one is the first taken
        self.waiting: collections.deque[Any] = collections.deque()
        self.detached: dict[OpenerStream, Link] = {}  # each with its last link
        # Stream -> instance, until.
        self._abandoned: collections.OrderedDict[bytes, tuple[bytes, float]] = collections.OrderedDict()
        self.is_closed = False

    # ---- what differs

    def want_links(self) -> None:
        """More links are needed than are idle."""

    def replace(self, link: Link) -> None:
        """This link is of no use any more: another one may be needed."""

    def keeps(self, link: Link) -> bool:
        """Whether this link is to wait for the next stream."""
        return not self.is_closed and not self.owner.draining

    # ---- links for those that wait

    def take(self, waiter: Any) -> None:
        """waiter.open(link) with an idle link, now or later; waiter.fail(error) where none comes."""
        waiter.since = self.loop.now
        # An idle link is of no use to the streams that are detached.
        link = None if self.waiting else self._pop(waiter.instance)
        if link:
            waiter.open(link)
        else:
            self.waiting.append(waiter)
        self.want_links()

    def _pop(self, instance: bytes, key: bytes = b"") -> Link | None:
        """The idle link used last of those let in: one that may still be refused takes along what was sent on it."""
        while True:
            link = None
            for other in reversed(self.idle):
                if instance in (b"", other.instance) and key in (b"", other.peer_key) and (
                        link is None or other.is_completed):
                    link = other
                    if link.is_completed:
                        break
            if link is None:
                return None
            self.idle.remove(link)
            if self._is_usable(link):
                return link
            if link.state != CLOSED:
                self.drop(link)

    def _is_usable(self, link: Link) -> bool:
        """Whether it was heard from lately, and nothing on it is sent again and again: its next try may be seconds
        away, although the path is there again."""
        if link.heard_at < self.loop.awake:  # not in this round
            link.poll()  # what is pending on it: a Close, a FIN, or the sign of life that makes it trusted
        silent = self.loop.awake - link.heard_at
        return (link.state == IDLE and self.loop.now - link.born < self.limits.link_age
                and (silent < JUST_NOW or silent < self.limits.trusted
                     and not link.transport.tcp_info().retransmits and not link.is_stuck))

    def put(self, link: Link) -> None:
        # The server may have ended while the handshake's last step was on its thread.
        if not link.is_completed and link.state == IDLE:
            link.poll()
        if self._abandoned:
            self._say_abandoned(link)
        if link.state != IDLE:
            return
        waiter = self._next_waiter(link) if self.detached or self.waiting else None
        if waiter:
            waiter.open(link)
        elif self.keeps(link):
            self.idle.append(link)
        else:
            self.drop(link)

    def _next_waiter(self, link: Link) -> Any:
        for stream in self.detached:
            if stream.instance in (b"", link.instance) and (not stream.instance or stream.peer_key == link.peer_key):
                del self.detached[stream]
                return stream
        for waiter in self.waiting:
            if waiter.instance in (b"", link.instance):
                self.waiting.remove(waiter)
                return waiter
        return None

    def drop(self, link: Link) -> None:
        """Ends an idle link, which says nothing of the peer."""
        if link.state == IDLE and link.last:
            link.last.acknowledge_last(link)
        link.close()

    def on_link_closed(self, link: Link) -> None:
        if link in self.idle:
            self.idle.remove(link)

    def clear(self) -> None:
        while self.idle:
            self.drop(self.idle.pop())

    # ---- streams that lost their links

    def on_detached(self, stream: OpenerStream, link: Link, error: Exception) -> None:
        if self.is_closed or self.owner.draining:
            return stream.fail(error)
        self.distrust(link)
        super().on_detached(stream, link, error)
        if stream.was_opened and self.loop.now >= stream.give_up_at:
            return self._give_up(stream)
        return self._wait(stream, link)  # on_link_closed() follows

    def _give_up(self, stream: OpenerStream) -> None:
        error = ConnectError("no link to the other side within %g s" % (self.loop.now - stream.since))
        stream.fail(error if stream.was_opened else self.why_no_link(self.limits.connect_timeout))

    def _wait(self, stream: OpenerStream, last: Link) -> None:
        """The stream goes on over an idle link, or over the next one. `last` carried it."""
        another = self._pop(stream.instance, stream.peer_key if stream.instance else b"")
        if another:
            stream.open(another)
        else:
            self.detached[stream] = last

    def distrust(self, link: Link) -> None:
        """A link has died. Its cause, a NAT that forgot or a server that was started anew, has taken the idle links
        too, but for those that were heard from after this link was doubted."""
        for other in [other for other in self.idle if not 0 < link.doubted_at < other.heard_at]:
            self.idle.remove(other)
            self.drop(other)

    def on_closed_to(self, stream: OpenerStream, link: Link) -> None:
        """The link takes no more streams, and has not looked at this one."""
        if not stream.was_opened:
            stream.give_up_at = stream.since + self.limits.connect_timeout
            if stream.attempt == 1:  # an earlier Open, whose answer was lost, may have been looked at
                stream.set_free()
        if self.is_closed:
            return stream.fail(LinkClosed("the server takes no more streams on this connection"))
        self._wait(stream, link)
        return self.replace(link)

    def on_ended(self, stream: OpenerStream, error: Exception | None) -> None:
        self.detached.pop(stream, None)
        if stream in self.waiting:
            self.waiting.remove(stream)

    def on_unheard(self, stream: OpenerStream) -> None:
        if stream.error is not None and stream.attempt:
            self.leave_behind(stream.id, stream.asked)

    def leave_behind(self, stream_id: bytes, instance: bytes) -> None:
        """This instance of the other side is to forget the stream."""
        while len(self._abandoned) >= ABANDONED:
            self._abandoned.popitem(last=False)
        self._abandoned[stream_id] = instance, self.loop.now + ABANDONED_FOR
        for link in [link for link in self.idle if link.instance == instance][-1:]:
            self._say_abandoned(link)

    def _say_abandoned(self, link: Link) -> None:
        for stream_id, (instance, until) in list(self._abandoned.items()):
            if instance == link.instance and link.state == IDLE:
                del self._abandoned[stream_id]
                if self.loop.now < until:
                    link.send_record(ABANDON, stream_id)

    # ---- time

    def sweep(self) -> None:
        now = self.loop.now
        for stream in [stream for stream in self.detached if now >= stream.give_up_at]:
            del self.detached[stream]
            self._give_up(stream)
        while self.waiting and now - self.waiting[0].since > self.waits_for():
            self.waiting.popleft().fail(self.why_no_link(self.waits_for()))
        for stream in list(self.detached):
            stream.on_sweep()
        for link in list(self.idle):
            if link.last and now - link.idle_since >= 1:
                link.last.acknowledge_last(link)
        while self._abandoned and next(iter(self._abandoned.values()))[1] <= now:
            self._abandoned.popitem(last=False)
        if self.waiting or self.detached:
            self.want_links()

    def waits_for(self) -> float:
        """Seconds that a waiter waits for a link."""
        return self.limits.connect_timeout

    def why_no_link(self, seconds: float) -> Exception:
        return ConnectError("no link within %g s" % seconds)

    def close(self, error: Exception) -> None:
        """Those that wait get no link."""
        self.is_closed = True
        self.reset_waiting(error)
        self.reset_detached(error)

    def reset_waiting(self, error: Exception) -> None:
        while self.waiting:
            self.waiting.popleft().fail(error)

    def reset_detached(self, error: Exception, server: str = "") -> None:
        """`server`: only those that one of its links carried last."""
        for stream in [stream for stream, last in self.detached.items() if server in ("", last.name)]:
            if self.detached.pop(stream, None):
                stream.fail(error)


class Retry:
    """Something of a client that is tried again and again: try_again() after a pause.

    The pauses double from 0.25 s to Limits.retry_interval, each drawn from its upper half, so that all the clients of a
    server that was started anew do not come at the same moment. `most` failed tries in a row end the client, None:
    never.
    """

    # Seconds: the first pause; the longest while somebody waits; after which all was well.
    FIRST, HURRY, STEADY = 0.25, 1.0, 10.0

    def __init__(self, client: Client, most: int | None, try_again: Callable[[], None]):
        self._client, self._loop, self._most, self._try_again = client, client.loop, most, try_again
        self.error: Exception | None = None  # the last one; None: all is well
        self._tries = self._begun = self._level = 0
        self._said = 0  # of this loss: 1 that the thing is lost, 2 that a key is refused
        self._since = self._tried_at = self._well_at = self._loop.now
        self._next = Deadline(self._loop)

    @property
    def is_pausing(self) -> bool:
        return self._next.when < NEVER

    def fail(self, error: Exception, lost: str, tried: bool = False, is_first: bool = False) -> None:
        """One more failure; ten that fail in one moment are one try. The first failure counts as a try only where it
        was a try to come back (`tried`). `lost`, where it is not empty, is logged once: when the next try has
        failed too, for a server that was started anew is no news; or at once, where this is the first connection of
        all (`is_first`)."""
        again = is_first or self.error is not None
        if self.error is None:
            self._since, self._tries, self._begun, self._said = self._loop.now, int(tried), int(tried), 0
            if self._loop.now - self._well_at > self.STEADY:
                self._level = 0
        else:
            self._tries = min(self._tries + 1, self._begun)
        self.error = error.with_traceback(None)  # whose frames would keep a link and its buffers
        self._client.notice()
        if self._most is not None and self._tries >= self._most:
            return self._client.give_up(RatrodError("Giving up after %s in %.1f s: %s" % (
                plural(self._tries, "retry", "retries"), self._loop.now - self._since, reason(error))))
        # A refusal of a key is said at once, also where the log said that the server is away: the next try is far.
        news = 2 if is_final(error) else int(bool(lost) and again)
        says = news > self._said
        log.log(logging.ERROR if says else logging.DEBUG, "%s%s: %s; trying again", "❌ " * says,
                lost or "no new link", reason(error))
        self._said = max(self._said, news)
        if not self.is_pausing:
            level, longest = 30 if is_final(error) else min(self._level, 30), self._client.limits.retry_interval
            pause = min(longest, self.FIRST * 2 ** level) * (0.5 + os.urandom(1)[0] / 510)
            self._next.set(pause, self._on_due)
            self._level += 1
        return None

    def succeed(self, found: str) -> None:
        if self.error is not None and self._said:
            tries = plural(self._tries + 1, "try", "tries")
            log.info("✅ %s after %s in %.1f s", found, tries, self._loop.now - self._since)
        self.error = None
        self._client.notice()
        self._well_at = self._loop.now
        self.stop()

    def hurry(self) -> None:
        """Somebody waits: the next try is not far, and is due at once where the one before is long over."""
        when = self._tried_at + min(self.HURRY, self._client.limits.retry_interval)
        if self.error and self._next.when > when and not (is_final(self.error) and self.is_pausing):
            self._next.set(when - self._loop.now, self._on_due)

    def try_now(self) -> None:
        """The next try is not to wait."""
        if self.is_pausing:
            self._next.set(0, self._on_due)

    def _on_due(self) -> None:
        self._begun += 1
        self._tried_at = self._loop.now
        self._try_again()

    def stop(self) -> None:
        self._next.clear()


class Reach(Retry):
    """The one that dials, and knows when: links to the first of some servers that answers."""

    HANGING = 10  # tries at once while the server is away: a path that drops packets holds each up for 10 s

    def __init__(self, client: Client, most: int | None):
        super().__init__(client, most, client.try_again)
        self.current = 0  # the server that answered last is tried first
        self.refusals: dict[str, Exception] = {}  # by server, since one let this client in or all had been asked
        self._refused: set[str] = set()  # those of whom the log says so
        self.dials: set[Dial] = set()  # the tries that are under way

    def dial(self, open_: Open | None, done: Done, report: Report = log.debug, server: str = "") -> None:
        """done(link, None) or done(None, error). `open_`: what a legacy handshake names. `server`: the one to ask."""
        def finish(link: Link | None, error: Exception | None) -> None:
            self.dials.discard(dial)
            self._client.counters.links += link is not None
            self._client.counters.handshakes_failed += link is None
            done(link, error)
        dial = Dial(self._client, self, open_, finish, report, server)
        self.dials.add(dial)
        dial.try_next()

    @property
    def fresh(self) -> int:
        """How many tries began just now. Others may hang: once the path is back, their next packet is seconds away."""
        return sum(self._loop.now - dial.born < self.HURRY for dial in self.dials)

    def close(self) -> None:
        self.stop()
        while self.dials:
            self.dials.pop().close()

    def pass_by(self, server: str, error: Exception) -> Exception | None:
        """A server does not take this client: None where another one is left to be asked, or the error of them all."""
        names = [str(server) for server in self._client.servers]
        self.refusals[server] = error
        if names[self.current] == server:
            self.current = (self.current + 1) % len(names)
        if len(self.refusals) == len(set(names)):
            return self.sum_up({})
        if is_final(error) and server not in self._refused:  # an attack, or a mistake, that must not go unseen
            self._refused.add(server)
            log.error("❌ The server `%s` is passed by: %s", server, reason(error))
        return None

    def sum_up(self, failures: Mapping[str, Exception]) -> Exception:
        """Why none of the servers could be used. All are asked the next time."""
        failures = {**self.refusals, **failures}
        self.refusals.clear()
        errors = list(failures.values())
        if len(errors) == 1:
            return errors[0]
        kind = (AuthenticationError if all(map(is_final, errors)) else
                Overloaded if any(isinstance(error, Overloaded) for error in errors) else ConnectError)
        what = "lets this client in" if any(map(is_final, errors)) else "has room" if kind is Overloaded else "answers"
        return kind("none of the servers %s: %s" % (
            what, "; ".join("`%s`: %s" % (server, reason(error)) for server, error in failures.items())))

    def let_in(self, server: str, found: str) -> None:
        self.refusals.clear()
        self._refused.discard(server)
        self.succeed(found)


class Dial:
    """One try to make a link, to the first server that answers. One that refuses or may be the wrong one ends it."""

    LEAST_HANDSHAKE = 3.0  # seconds of one of many servers

    def __init__(self, client: Client, reach: Reach, open_: Open | None, done: Done, report: Report, server: str):
        self._client, self._reach, self._open, self._done, self._report = client, reach, open_, done, report
        self._keys = client.keys
        in_turn = client.servers[reach.current:] + client.servers[:reach.current]
        self._left = [
            place for place in in_turn if (str(place) == server if server else str(place) not in reach.refusals)]
        self._is_one = bool(server)
        self._failures: dict[str, Exception] = {}
        self.born = client.loop.now
        self._until = time.monotonic() + client.limits.connect_timeout
        self._server: Place = in_turn[0]
        self._step: Connector | Negotiation | None = None
        self._is_closed = False

    def close(self) -> None:
        """Gives up without a word."""
        self._is_closed = True
        if self._step:
            self._step.abort(LocalFailed(ENDING))

    def try_next(self) -> None:
        if self._is_closed:
            return None
        if not self._left:
            return self._done(None, self._reach.sum_up(self._failures))
        # Each server gets its share of the time, as each of its addresses does.
        left, whole = self._until - time.monotonic(), self._client.limits.connect_timeout
        share = max(left / len(self._left), whole / len(self._client.servers))
        self._server = self._left.pop(0)
        if isinstance(self._server, SshHost):
            return self._start_ssh()
        where = self._client.options.proxy.address if self._client.options.proxy else self._server
        self._step = Connector(self._client.loop, where, share, self._on_connected)
        self._step.start(self._client.look_up)
        return None

    def _on_connected(self, sock: socket.socket | None, error: Exception | None) -> None:
        client, proxy, server = self._client, self._client.options.proxy, self._server
        if self._is_closed:
            return sock.close() if sock else None
        if sock is None:
            name, hint = ("proxy `%s`" % str(proxy), "is it running there?") if proxy else (
                "server `%s`" % str(server), "is `ratrod serve` running there, and the port open?")
            text = reason(error or ConnectError("unknown reason"))
            return self._fail(ConnectError("there is no %s: %s" % (name, text) if "cannot resolve" in text else
                                           "cannot connect to the %s: %s (%s)" % (name, text, hint)))
        handshake = self._make_handshake()
        if proxy:
            asked: Handshake = ProxyHandshake(proxy, server)
            asked.successor, handshake = handshake, asked
        else:
            self._report("✅ Connected to server `%s` ...", server)
        # A server that takes connections and says nothing must leave time for the other servers.
        whole = client.limits.handshake_timeout
        patience = max(whole / len(client.servers), min(whole, self.LEAST_HANDSHAKE))
        self._step = Negotiation(client.loop, sock, server, handshake, patience, self._on_negotiated)
        self._step.start(client.threads.submit)
        return None

    def _make_handshake(self) -> Handshake:
        client = self._client
        if client.options.legacy:
            return LegacyClientHandshake(client.keys, self._open or Open(TCP, ""),
                                         should_encrypt=client.options.encrypt, check_key=self._check_server)
        return NoiseClientHandshake(client.keys, offered_suites(), check_key=self._check_server,
                                    is_known=client.started)

    def _check_server(self, key: bytes) -> None:
        """The server has answered, and has proved that this key is its own. On a thread."""
        if self._client.options.proxy:
            self._report("✅ Connected to server `%s` through `%s` ...", self._server, self._client.options.proxy)
        self._report("✅ Sent preamble to server ...")
        self._report("✅ Server's signature validated with public key `%s` ...", encode_key(key))
        self._client.host_keys.check(self._server, key)
        self._report("🚧 Signing server challenge ...")
        self._report("⏳ Awaiting challenge validation ...")

    def _on_negotiated(self, negotiation: Negotiation, error: Exception | None) -> None:
        client, handshake = self._client, negotiation.handshake
        if self._is_closed:
            return negotiation.sock.close()
        if error and isinstance(handshake, ProxyHandshake):
            # After a start that was good it is worth another try: the proxy's list of users may be away for a moment.
            is_refusal = isinstance(error, AuthenticationError) and not client.started
            error = (AuthenticationError if is_refusal else ConnectError)(
                "the proxy `%s` does not connect to the server `%s`: %s" % (client.options.proxy, self._server, error))
        if error:
            return self._fail(error)
        if self._keys != client.keys:  # another one was read meanwhile: a new link comes as who this is now
            negotiation.sock.close()
            self._keys = client.keys
            self._left.insert(0, self._server)
            return self.try_next()
        if isinstance(self._server, SshHost):
            self._report("✅ Connected to server `%s` ...", self._server)
        self._reach.current = client.servers.index(self._server)
        log.debug("link to `%s`, cipher: %s", self._server, handshake.suite)
        return self._done(self._make_link(negotiation.sock, handshake), None)

    def _make_link(self, sock: socket.socket, handshake: Handshake) -> Link:
        client = self._client
        if client.options.legacy:
            state = ASKING[self._open.kind] if self._open else ASKED
            return LegacyLink(client, sock, handshake, OPENER, str(self._server), state)
        link = Link(client, sock, handshake, OPENER, str(self._server))
        if link.is_resumable:
            with contextlib.suppress(OSError):  # it is closed already: its first read tells
                link.path = sock.getsockname()[0], sock.getpeername()
        link.due = client.loop.now + client.limits.handshake_timeout
        link.update()
        return link

    def _fail(self, error: Exception) -> None:
        # A server that nobody knows is for the user to decide about; a legacy server refuses a remote, not this client.
        if self._is_one or isinstance(error, UnknownHost) or isinstance(error, PeerError) and not is_final(error):
            return self._done(None, error)
        if is_final(error):
            failure = self._reach.pass_by(str(self._server), error)
            return self._done(None, failure) if failure else self.try_next()
        self._failures[str(self._server)] = error
        return self.try_next()

    # ---- ssh://

    def _start_ssh(self) -> None:
        ssh = self._client.ssh[self._server]
        may_ask = self._client.options.ask_host is not None and not self._client.started
        self._client.threads.submit(functools.partial(ssh.start, may_ask), self._on_ssh_started)

    def _on_ssh_started(self, link: SshLink | None, error: Exception | None) -> None:
        if link is None:
            return self._fail(error or ConnectError("unknown reason"))
        if self._is_closed:
            return link.sock.close()
        ssh = self._client.ssh[self._server]
        self._step = Negotiation(self._client.loop, link.sock, self._server, ssh.handshake(), ssh.patience,
                                 functools.partial(self._on_ssh_negotiated, link))
        self._step.start()
        return None

    def _on_ssh_negotiated(self, link: SshLink, negotiation: Negotiation, error: Exception | None) -> None:
        if error is None or self._is_closed:
            return self._on_negotiated(negotiation, error)
        assert isinstance(negotiation.handshake, PipeHandshake)
        explain = functools.partial(self._client.ssh[self._server].explain, link, negotiation.handshake, error)
        return self._client.threads.submit(
            explain, lambda why, failure: self._fail(failure or why) if failure or why else self._start_ssh())


class EndedNumbers:
    """The numbers of streams that are over, by key: a late Open of one of them connects for nobody. They are kept for
    an hour, NUMBERS at most; of more the oldest goes of the key that has most."""

    def __init__(self, loop: EventLoop):
        self._loop = loop
        self._of: dict[bytes, collections.OrderedDict[bytes, tuple[bool, float]]] = {}  # was it reset, when
        self._count = 0
        self._incomplete_until: dict[bytes, float] = {}

    def get(self, number: tuple[bytes, bytes]) -> bool | None:
        """Whether the stream of this key and number was reset; None where it is not known."""
        key, stream = number
        return self._of[key][stream][0] if stream in self._of.get(key, ()) else None

    def are_all(self, key: bytes) -> bool:
        """Whether none of this key's was dropped for want of room."""
        return key not in self._incomplete_until

    def add(self, number: tuple[bytes, bytes], was_reset: bool) -> None:
        key, stream = number
        self.discard(number)
        self._of.setdefault(key, collections.OrderedDict())[stream] = was_reset, self._loop.now
        self._count += 1
        if self._count > NUMBERS:
            most = max(self._of, key=lambda key: len(self._of[key]))
            self._incomplete_until[most] = self._loop.now + REMEMBERED
            self.discard((most, next(iter(self._of[most]))))

    def discard(self, number: tuple[bytes, bytes]) -> None:
        key, stream = number
        if stream in self._of.get(key, ()):
            del self._of[key][stream]
            self._count -= 1
            if not self._of[key]:
                del self._of[key]

    def sweep(self) -> None:
        now = self._loop.now
        for key, numbers in list(self._of.items()):
            while numbers and now - next(iter(numbers.values()))[1] > REMEMBERED:
                self.discard((key, next(iter(numbers))))
        self._incomplete_until = {key: until for key, until in self._incomplete_until.items() if now < until}


class Acceptor(Keeper):
    """What an Open meets: the streams of this side, those that wait for another link, and the numbers of those that are
    over.

    `connect(stream, link, done)` connects to the remote of a new stream: done(socket, None) or done(None, error).
    `permit(stream, link)` raises PolicyError where the stream's target is not allowed any more. `answer(target, error)`
    is what the log says, and the Error for the other side. `name(link, open)` is how the log calls a stream: its origin
    and its target. `quota` bounds the streams. A stream belongs to the key of its link's peer.
    """

    def __init__(self, owner: Endpoint, quota: Quota, connect: Callable[..., None],
                 permit: Callable[[AcceptorStream, Link], Any],
                 answer: Callable[[str, Exception], tuple[Exception, Error]],
                 name: Callable[[Link, Open], tuple[str, str]]):
        super().__init__(owner)
        self._quota, self._connect, self._permit, self._answer, self._name = quota, connect, permit, answer, name
        self._streams: dict[tuple[bytes, bytes], AcceptorStream] = {}  # by key and number
        self._opens: dict[AcceptorStream, Open] = {}  # of those whose remote is being connected to
        # The longest detached first.
        self._detached: collections.OrderedDict[AcceptorStream, None] = collections.OrderedDict()
        self._detached_of = KeyCounts()
        self._ended = EndedNumbers(self.loop)

    # ---- Open

    def is_known(self, link: Link, open_: Open) -> bool:
        """Whether this Open begins no new stream, whatever attempt it says it is."""
        number = link.peer_key, open_.stream
        return open_.kind == TCP and (number in self._streams or self._ended.get(number) is not None)

    def open(self, link: Link, open_: Open) -> None:
        if not link.is_resumable:
            return self._begin(link, open_, (link.peer_key, random_bytes(16)))
        number = link.peer_key, open_.stream
        stream = self._streams.get(number)
        if stream is not None:
            return self._attach(link, open_, stream)
        was_reset = self._ended.get(number)
        if was_reset is False and open_.attempt > 1:
            # It is over, and everything was acknowledged; the link ends, for what came with this Open must be skipped.
            return link.leave(link.writer.record(OVER) + link.writer.record(CLOSE))
        is_new = open_.at == open_.taken == 0 and (
            open_.attempt == 1 or open_.attempt > 1 and self._ended.are_all(link.peer_key))
        if was_reset is not None or not is_new:
            why = "the stream is not known here any more" if was_reset is None else "the stream was reset"
            return link.refuse(Error(UNKNOWN, why))
        return self._begin(link, open_, number)

    def _begin(self, link: Link, open_: Open, number: tuple[bytes, bytes]) -> None:
        origin, shown = self._name(link, open_)
        try:
            self._take(link.peer_key)
        except Overloaded as error:
            return self.refuse(link, shown, error)
        stream = AcceptorStream(self, origin, shown, target=open_.target, peer_key=link.peer_key, stream_id=number[1])
        stream.attempt, stream.out.keeps = open_.attempt, link.is_resumable
        self._streams[number] = stream
        self._await_remote(stream, link, open_)
        self._connect(stream, link, functools.partial(self._on_connected, stream))
        return None

    def _await_remote(self, stream: AcceptorStream, link: Link, open_: Open) -> None:
        self._opens[stream] = open_
        stream.link, stream.since, link.user = link, self.loop.now, stream

    def refuse(self, link: Link, target: str, error: Exception) -> None:
        """No stream: the Open, or the handshake that named a target, is refused."""
        if link.state == CLOSED:
            return
        counters = self.owner.counters
        counters.count(error)
        shown, answer = self._answer(target, error)
        refused = "refused: " if isinstance(shown, PolicyError) else ""
        counters.fail(link.peer_key, "❌ %s: %s%s" % (new_label(link.name, target), refused, reason(shown)))
        link.refuse(answer)

    def _on_connected(self, stream: AcceptorStream, sock: socket.socket | None, error: Exception | None) -> None:
        open_ = self._opens.pop(stream, None)
        if stream.is_over or open_ is None:
            if sock:
                sock.close()
            return
        if sock is None:
            return stream.fail(*self._answer(stream.shown, error or ConnectError("unknown reason")))
        stream.join(sock)
        if stream.link:
            self._accept(stream, stream.link, open_)

    def _accept(self, stream: AcceptorStream, link: Link, open_: Open) -> None:
        try:
            stream.accept(link, open_)
        except (ConnectError, RemoteProtocolError) as error:
            stream.link = link
            stream.fail(error, Error(UNKNOWN, str(error)) if isinstance(error, ConnectError) else None)

    def _attach(self, link: Link, open_: Open, stream: AcceptorStream) -> None:
        try:
            self._permit(stream, link)
        except PolicyError as error:
            return self._reset(stream, link, *self._answer(stream.shown, error))
        if open_.target != stream.target:
            broken_by = RemoteProtocolError("an Open of the same stream with another target")
            return self._reset(stream, link, broken_by, Error(UNKNOWN, str(broken_by)))
        if open_.attempt <= stream.attempt:
            return link.lose(LinkClosed("an Open that another one has overtaken"))
        self._forget_detached(stream)
        stream.move_from()
        if stream.is_over and open_.taken == stream.out.sent and open_.at == stream.taken:  # nothing is left to be sent
            stream.attempt = open_.attempt
            self.on_acknowledged(stream, False)
            return link.become_idle()
        if stream in self._opens:  # its connect is under way: Opened goes to the new link
            stream.attempt = open_.attempt
            return self._await_remote(stream, link, open_)
        return self._accept(stream, link, open_)

    def _reset(self, stream: AcceptorStream, link: Link, error: Exception, answer: Error) -> None:
        """The stream and this link end."""
        stream.move_from()
        stream.fail(error)
        link.refuse(answer)

    def abandon(self, link: Link, stream_id: bytes) -> None:
        """The opener has given this stream up."""
        number = link.peer_key, stream_id
        stream = self._streams.get(number)
        if stream:
            stream.move_from()
            stream.fail(LocalFailed("the other side gave it up"))
        self._ended.add(number, True)

    # ---- ends

    def on_detached(self, stream: AcceptorStream, link: Link | None, error: Exception) -> None:
        super().on_detached(stream, link, error)
        self._detached[stream] = None
        self._detached_of.change(stream.peer_key, 1)
        if self._detached_of.of(stream.peer_key) > DETACHED_OF_KEY:
            self._reset_longest(stream.peer_key)
        elif len(self._detached) > max(1, self._quota.most // 2):
            self._reset_longest(self._greediest())

    def _take(self, key: bytes) -> None:
        """One stream more, in place of a detached one where there is no room; Overloaded where nothing makes room."""
        while True:
            try:
                return self._quota.take(key)
            except Overloaded:
                is_own = self._quota.of(key) >= self._quota.most_of_key
                if not self._reset_longest(key if is_own else self._greediest()):
                    raise

    def _greediest(self) -> bytes:
        return max(self._detached_of.by_key, key=self._detached_of.of, default=b"")

    def _reset_longest(self, key: bytes) -> bool:
        """Gives up the longest detached stream of this key."""
        victim = next((stream for stream in self._detached if stream.peer_key == key), None)
        if victim:
            victim.fail(Overloaded("too many streams wait for another link"))
        return victim is not None

    def _forget_detached(self, stream: AcceptorStream) -> None:
        if stream in self._detached:
            del self._detached[stream]
            self._detached_of.change(stream.peer_key, -1)

    def has_detached(self, key: bytes) -> bool:
        return self._detached_of.of(key) > 0

    def on_ended(self, stream: AcceptorStream, error: Exception | None) -> None:
        """The only place where a stream's part of the quota is given back."""
        self._quota.give_back(stream.peer_key)
        self._opens.pop(stream, None)
        self._forget_detached(stream)
        keeps = stream.out.keeps
        if error is not None or not keeps:
            number = stream.peer_key, stream.id
            if self._streams.pop(number, None) is not None and keeps:
                self._ended.add(number, True)

    def on_acknowledged(self, stream: AcceptorStream, has_seen_over: bool) -> None:
        stream.out.close()
        number = stream.peer_key, stream.id
        if self._streams.pop(number, None) is not None or has_seen_over:
            self._forget_detached(stream)
            if has_seen_over and stream.attempt == 1:
                self._ended.discard(number)
            else:
                self._ended.add(number, False)

    def on_unheard(self, stream: AcceptorStream) -> None:
        """The link went before the last bytes were acknowledged: the opener may ask for them over another link."""
        if (stream.error is None and stream.link is None and stream not in self._detached
                and (stream.peer_key, stream.id) in self._streams):
            self.on_detached(stream, None, LinkSilent("its last bytes were not acknowledged"))

    def sweep(self) -> None:
        now = self.loop.now
        for stream in [stream for stream in self._opens if now - stream.since >= self.limits.connect_timeout]:
            self._on_connected(stream, None, socket.timeout("timed out"))
        for stream in [stream for stream in self._detached if now >= stream.give_up_at]:
            stream.fail(ConnectError("no other link within %g s" % (now - stream.since)))
        self._ended.sweep()
        for stream in list(self._detached):
            stream.on_sweep()

    def reset_detached(self, error: Exception, key: bytes = b"") -> None:
        """`key`: only those of one that may not come in any more."""
        for stream in [stream for stream in self._detached if key in (b"", stream.peer_key)]:
            stream.fail(error)

# ======================================================================================================================
# 13. Server and client
# ======================================================================================================================

Authorizer = Callable[[str, str], bool]


class Callbacks(NamedTuple):
    """What an endpoint tells the program around it, on the loop's thread."""

    started: Callable[[], None] = lambda: None  # everything listens and takes connections
    finished: Callable[[Any], None] = lambda _error: None  # None: all is done; or why not. The first call counts


class ServerOptions(NamedTuple):
    """What a Server is to do; its Limits come beside it."""

    bind: Address
    policy: Policy
    legacy: bool = False  # speak the original's wire as well
    allow_listen: bool = False  # clients may have reverse tunnels
    authorize: Authorizer | None = None  # decides in place of authorized_keys
    proxies: tuple[Any, ...] = ()  # networks of load balancers, which send a PROXY header
    instance: bytes = b""  # of one of several workers
    report: Report = log.info  # takes the lines about the start: of several workers one is enough


class ClientOptions(NamedTuple):
    """What a Client is to do; its Limits come beside it."""

    servers: Sequence[Place]  # the first that answers is used
    tunnels: Sequence[TunnelSpec] = ()
    legacy: bool = False  # speak the original's wire
    encrypt: bool = False  # with legacy; otherwise everything is encrypted
    accept_all_hosts: bool = False  # any key of a server is accepted
    accept_new: bool = False  # a key of an unknown server is accepted, and written to known_hosts
    ask_host: Callable[[UnknownHost], bool] | None = None  # trusts an unknown key; None: nobody can be asked
    socks_user: str | None = None  # name:password for SOCKS clients
    send_proxy: bool = False  # targets of reverse tunnels get a PROXY header
    proxy: Proxy | None = None
    ssh: tuple[Sequence[str], str] | None = None  # to ssh:// servers: the words that run ssh here, and Python there
    retries: int | None = None  # failed retries in a row before the client gives up; None: 0 at the start, then no end
    only_test: bool = False  # finished() after the test connection
    report: Report = log.info  # takes the lines about the start: of several workers one is enough


class Endpoint:
    """What server and client share: the loop, the identity, the limits, the links, what ages and the threads."""

    def __init__(self, loop: EventLoop, folder: KeyFolder, limits: Limits, callbacks: Callbacks, *, is_legacy: bool,
                 memory: int):
        self.loop, self.folder, self.limits, self._callbacks = loop, folder, limits, callbacks
        self.is_legacy, self.keys = is_legacy, folder.load()
        # How long the acceptor of a link may take to say Opened: a look-up, a connect, the rest of the handshake.
        self.patience = limits.connect_timeout + limits.handshake_timeout
        for warning in folder.warnings:
            log.warning(warning)
        self.instance = os.urandom(6) + b"\1\0"
        self.counters = Counters(loop)
        self.sessions: UdpSessions
        self.memory = Memory(limits.memory or memory)
        self.links: set[Link] = set()
        self.listeners: list[Any] = []
        self.metrics_at: list[tuple[str, int]] = []  # of all workers: no client may have them as targets
        self.threads, self.files = Threads(loop, STEPS_AT_ONCE), Threads(loop, 1)  # public-key steps; lists and keys
        self.lookups = LookUps(loop, limits)
        self.draining = self._has_slept = False
        self._swept_at = boot_time()
        self._sweeper = loop.call_later(limits.sweep_interval, self._on_sweep)

    def start(self) -> None:
        raise NotImplementedError

    # ---- what a link tells its owner

    def on_open(self, link: Link, open_: Open) -> None:
        """Acceptor: the other side wants a stream, or the UDP sessions, on this link."""

    def on_abandon(self, link: Link, stream_id: bytes) -> None:
        """Acceptor: the other side gives up a stream that has no link."""

    def on_idle(self, link: Link, record: bytes) -> None:
        """The stream on it is over on both sides; acceptor: `record` is to leave before the Over or Close."""

    def on_completed(self, link: Link) -> None:
        """Opener: HandshakeCompletion came."""

    def on_link_closed(self, link: Link, error: Exception | None) -> None:
        self.links.discard(link)

    def complain_of(self, link: Link, what: str, error: Exception) -> None:
        """The end of a link that no stream reports: everyday life, unless the other side broke the protocol."""
        # That a key was revoked is said once for all of its links.
        everyday = LinkClosed, PeerError, AuthenticationError
        is_everyday = isinstance(error, everyday) and not isinstance(error, LinkSpoiled)
        if isinstance(error, RemoteProtocolError) and not is_everyday:
            self.counters.fail(link.peer_key, "%s ended: %s" % (what, reason(error)))
        else:
            log.debug("%s ended: %s", what, reason(error))

    # ---- time, and whether the paths of the links live

    def _on_sweep(self) -> None:
        self._sweeper = self.loop.call_later(self.limits.sweep_interval, self._on_sweep)
        now = self.loop.awake
        # A machine that slept, or a process that was stopped, has not been listening: the others get time to be heard.
        self._has_slept = now - self._swept_at - self.limits.sweep_interval > 10
        self._swept_at = now
        # 9,000 idle links: what needs nothing is passed by without a call, 3 ms each second in place of 20.
        quiet, silent = self.loop.now - self.limits.keepalive, now - self.limits.silence
        for link in list(self.links):
            try:
                if link.user is not NOBODY or link.unread.size:
                    link.user.on_sweep()
                    link.update()  # memory that was short may be there again
                if (link.sent_at <= quiet or link.heard_at <= silent or self._has_slept) and link.state != CLOSED:
                    self._keep_alive(link, now)
            except Exception as error:  # or each sweep would end here, and nothing that waits would ever time out
                self.loop.on_bug(link.abort, error)
        self.sweep()
        # Last: a stream whose link ends here has until the next sweep to find another one.
        for link in [link for link in self.links if link.due <= self.loop.now]:
            link.on_due()
        self.loop.complaints.sweep()
        self.loop.trim()

    def _keep_alive(self, link: Link, now: float) -> None:
        """Says that this side lives, where it has been quiet; ends a link whose other side has been silent."""
        limit, is_judged_by_acks = self.limits.silence, link.is_held or link.is_legacy
        if not link.is_legacy:  # the original never says that it lives
            if self._has_slept and link.state != IDLE:
                link.heard_at = max(link.heard_at, now - limit + 15)
            if (self._has_slept or self.loop.now - link.sent_at >= self.limits.keepalive
                    ) and not link.out and link.state != BYE:
                link.send_record(KEEPALIVE)
            if now - link.heard_at < limit or link.state == CLOSED:
                return
        # A side that holds back does not hear: what has been sent, Keepalives among it, and was not acknowledged tells.
        if link.transport.tcp_info().unanswered >= limit if is_judged_by_acks else not link.hears(limit):
            link.lose(LinkSilent("nothing was heard from the other side for %g s: the path or the machine is dead"
                                 % limit))

    def doubt_paths(self) -> None:
        """A client's: asks for a sign of life on each link whose path may be dead, if something waits for it
        (PROTOCOL.md, "Streams outlive their links", 12). The server moves what it has opened."""
        routes: dict[Any, str] = {}
        for link in list(self.links):
            # An idle link carries nothing, unless it waits for a reverse tunnel.
            if link.path and link.state not in (BYE, CLOSED) and (link.user is NOBODY) == (link.role == ACCEPTOR):
                here, there = link.path
                if there not in routes:
                    routes[there] = address_towards(there) or here
                has_moved, link.path = routes[there] != here, (routes[there], there)  # one doubt for one change
                if has_moved or self._has_slept or link.transport.tcp_info().is_stuck or not link.is_held and (
                        self.loop.awake - link.heard_at >= self.limits.doubt and not link.hears(self.limits.doubt)):
                    link.doubt()

    def leave_dead_paths(self, since: float) -> bool:
        """Ends the links on which nothing has come since a doubt before `since`: other links show that their peer can
        be reached. Whether others are stuck."""
        stuck = [link for link in self.links if link.doubted_at and link.state != BYE and link.is_stuck]
        for link in stuck:
            if link.doubted_at < since:
                link.lose(LinkSilent("nothing passes on it, and others pass"))
        return any(link.doubted_at >= since for link in stuck)

    def sweep(self) -> None:
        """Whatever else ages."""

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

    def reload(self, done: Callable[[], None]) -> None:
        """Reads everything again, on the one thread for files: of two reloads the later one counts. Where the own key
        cannot be read, the one before stays."""
        self.folder.authorized_keys.forget()
        self.folder.known_hosts.forget()
        self.folder.warnings.clear()

        def on_read(keys: KeyPair | None, error: Exception | None) -> None:
            before, self.keys = self.keys, keys or self.keys
            if error:
                log.error("❌ %s; the key that was read before stays in use", error)
            for warning in self.folder.warnings:
                log.warning(warning)
            self.on_reloaded(self.keys != before)
            log.info("🔄 Read again: `%s`, key `%s`", self.folder.path, encode_key(self.keys.public))
            done()
        self.files.submit(self.read_files, on_read)

    def read_files(self) -> KeyPair:
        """On a thread."""
        return self.folder.load()

    def on_reloaded(self, is_new_key: bool) -> None:
        """What follows from that."""

    # ---- the end

    def drain(self, seconds: float, drained: Callable[[], None]) -> None:
        """Takes nothing new; drained() when all that is open has ended, or after so many seconds."""
        self.draining = True
        for listener in self.listeners:  # they stay known: with --reuse-port a new server has the same addresses
            listener.drain()
        self.end_waiting()
        now = time.monotonic()
        # Links that were told Close get a moment to see it; those that never look do not hold anybody up.
        until, told = now + seconds, now + min(1.0, seconds)
        left = sum(link.state not in (BYE, IDLE) for link in self.links)
        if left and seconds:
            log.info("🛑 Ending: %s may go on for %g s; a second signal ends at once", plural(left, "connection"),
                     seconds)
        self._wait(until, lambda: not self.is_busy() and (time.monotonic() >= told or not self.links),
                   functools.partial(self._say_goodbye, drained))

    def _wait(self, until: float, is_over: Callable[[], bool], then: Callable[[], None]) -> None:
        """then() once is_over(), at `until` at the latest."""
        if time.monotonic() >= until or is_over():
            return then()
        self.loop.call_later(0.02, functools.partial(self._wait, until, is_over, then))
        return None

    def _say_goodbye(self, drained: Callable[[], None]) -> None:
        """The streams get a moment to say that they end."""
        self._end_streams()
        self._wait(time.monotonic() + 1, lambda: not any(link.state == BYE and link.due < NEVER for link in self.links),
                   drained)

    def _end_streams(self) -> None:
        """What is open ends with an Error, so that the other side does not wait for it."""
        for link in list(self.links):
            if isinstance(link.user, Stream) and not link.is_legacy:
                link.user.fail(LocalFailed(ENDING), Error(REMOTE_FAILED, "the other side has ended"))

    def is_busy(self) -> bool:
        """Whether anything is open that an end would cut."""
        return any(link.state != BYE for link in self.links)

    def end_waiting(self) -> None:
        """What waits for something new ends: it will not come."""

    def close(self) -> None:
        self.threads.close()
        self.files.close()
        self.lookups.close()
        self._sweeper.clear()
        for listener in self.listeners:
            listener.close()
        self._end_streams()
        for link in list(self.links):
            if link.state == BYE:  # a reset would destroy the last word
                link.close()
            else:
                link.abort(LocalFailed(ENDING))


# ---- a server's strangers


class Source:
    """One address (IPv6: one /64) that connections come from."""

    __slots__ = ("strangers", "links", "authorized_at", "tries", "is_new")

    def __init__(self, now: float, rate: float):
        self.strangers: collections.OrderedDict[Negotiation, None] = collections.OrderedDict()  # the oldest first
        self.links = 0
        self.authorized_at = -1e9
        self.is_new = True  # none of its messages was answered yet
        self.tries = TokenBucket(rate, 2 * rate, now)

    def is_trusted(self, now: float) -> bool:
        return self.links > 0 or now - self.authorized_at < SOURCE_TRUSTED_FOR

    @staticmethod
    def name(host: str) -> str:
        if ":" not in host:
            return host  # of each stranger, so it has to be quick
        import ipaddress

        address = parse_ip(host)
        return str(address) if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))

    @staticmethod
    def network(name: str) -> str:
        """What one owner may have many sources in: an IPv4 /24, an IPv6 /48."""
        return name.rpartition(".")[0] or ":".join(name.split(":")[:3])


class Admission:
    """The connections at a server that are not authenticated yet: they cost a socket each, and a thread for a
    public-key step alone. At a limit the oldest makes room; of a source that has its share, the oldest of its own.

    Steps are served in three classes: sources with an authorized link now or in the last hour, sources that make few
    new handshakes, the rest. Within a class those go first whose first message was answered, then new sources, and the
    networks of the sources take turns, the newest first. So a newcomer comes in at once beside thousands of sources
    that begin again and again: 1,500 a second are more than one processor can answer.
    """

    def __init__(self, server: Server):
        self._server, self._loop, self._limits = server, server.loop, server.limits
        self.most = self._limits.handshakes or max(16, min(4096, descriptor_limit() // 8))
        self._most_of_source = self._limits.handshakes_per_source or max(16, self.most // 4)
        # The oldest first, each with its source and its network.
        self._strangers: collections.OrderedDict[Negotiation, tuple[Source, str]] = collections.OrderedDict()
        self._waiting: dict[Negotiation, Callable[[], None]] = {}  # those whose step waits for a thread
        self._sources: dict[str, Source] = {}
        self._most_sources = SOURCES
        # Four for each thread: one that is done need not wait for the loop, which may be in a round of 5 ms.
        self._steps = FairQueue(4 * STEPS_AT_ONCE, newest_first=True)

    def __len__(self) -> int:
        return len(self._strangers)

    def source(self, name: str) -> Source:
        if name not in self._sources:
            if len(self._sources) >= self._most_sources:
                self.sweep()
                # So many new ones pay for looking through them.
                self._most_sources = max(SOURCES, 2 * len(self._sources))
            self._sources[name] = Source(self._loop.now, self._limits.handshake_rate)
        return self._sources[name]

    def sweep(self) -> None:
        now = self._loop.now
        for name, source in list(self._sources.items()):
            if not source.strangers and not source.is_trusted(now) and source.tries.is_full(now):
                del self._sources[name]

    def accept(self, sock: socket.socket, address: Any) -> None:
        """A load balancer says first whose connection it is."""
        if any(parse_ip(address[0]) in network for network in self._server.options.proxies):
            self._add("", sock, address, ProxyHeader(), self._on_introduced)
        else:
            self._begin(sock, address)

    def _begin(self, sock: socket.socket, address: Any) -> None:
        """Its first byte tells the wire."""
        self._add(Source.name(address[0]), sock, address, FirstByte(self._choose), self._on_negotiated)

    def _add(self, name: str, sock: socket.socket, address: Any, handshake: Handshake,
             on_close: Callable[[Negotiation, Exception | None], None]) -> None:
        """`name`: the source, or empty for what a load balancer has not introduced yet, which is many sources."""
        source = self.source(name)
        crowd: Any = source.strangers if name and len(source.strangers) >= self._most_of_source else self._strangers
        if crowd is not self._strangers or len(crowd) >= self.most:
            self._turn_away(next(iter(crowd)))
        is_slow = source.tries.take(self._loop.now)
        is_trusted = source.is_trusted(self._loop.now)
        network = Source.network(name)

        def run_step(step: Callable[[], None], done: Callable[[Any, Exception | None], None]) -> None:
            def finish(result: Any, error: Exception | None) -> None:
                self._steps.done(network)
                source.is_new = False
                if negotiation not in self._strangers:  # it ended meanwhile
                    self._server.give_place_back(negotiation.handshake)
                done(result, error)

            def begin() -> None:
                del self._waiting[negotiation]
                self._server.threads.submit(step, finish)
            rank = 1 if negotiation.handshake.steps else 2 if source.is_new else 3
            self._waiting[negotiation] = begin
            self._steps.begin(network, begin, 0 if is_trusted else rank if is_slow else 3 + rank)
        negotiation = Negotiation(self._loop, sock, address, handshake, self._limits.handshake_timeout, on_close)
        self._strangers[negotiation] = source, network
        source.strangers[negotiation] = None
        return negotiation.start(run_step)

    def _choose(self, is_legacy: bool) -> Handshake | None:
        server = self._server
        check_key = functools.partial(server.admit, is_legacy)
        if not is_legacy:
            return NoiseServerHandshake(server.keys, offered_suites(), check_key=check_key, instance=server.instance)
        return LegacyServerHandshake(server.keys, check_key) if server.is_legacy else None

    def _turn_away(self, victim: Negotiation) -> None:
        handshake = victim.handshake
        hears = handshake.steps == 0 and not isinstance(handshake, LegacyServerHandshake)
        error = RemoteProtocolError("it had not authenticated itself when others needed its place")
        victim.abort(error, OVERLOADED if hears else b"")

    def _remove(self, negotiation: Negotiation) -> None:
        source, network = self._strangers.pop(negotiation)
        del source.strangers[negotiation]
        if negotiation in self._waiting:
            self._steps.cancel(network, self._waiting.pop(negotiation))

    def _on_introduced(self, negotiation: Negotiation, error: Exception | None) -> None:
        self._remove(negotiation)
        header = negotiation.handshake
        assert isinstance(header, ProxyHeader)
        if header.is_local and not error:
            LastWord(self._loop, negotiation.sock, b"")
            error = Speechless("the load balancer's own connection")
        if error:
            return self._server.complain_of_stranger(negotiation.address, error)
        return self._begin(negotiation.sock, header.source or negotiation.address)

    def _on_negotiated(self, negotiation: Negotiation, error: Exception | None) -> None:
        self._remove(negotiation)
        self._server.on_negotiated(negotiation, negotiation.handshake, error)

    def is_busy(self) -> bool:
        """Whether somebody may be in the middle of a handshake. A connection older than 2 s holds up nobody."""
        return any(self._loop.now - stranger.born < 2 for stranger in self._strangers)

    def close(self) -> None:
        for stranger in list(self._strangers):
            stranger.abort(Speechless(ENDING))


# ---------------------------------------------------------------------------------------------------- who may do what


class Rules:
    """Who may come in at a server, and what a key may do there, by authorized_keys and -r, or by authorize()."""

    def __init__(self, server: Server):
        self._server, self._loop, self._options = server, server.loop, server.options
        self._list, self._lock = server.folder.authorized_keys, threading.Lock()
        # The lines that the links were last held against, what was wrong with them, and when one of them expires.
        self._lines: Any = None
        self._problems: list[str] = []
        self._expiry = NEVER

    def look(self) -> None:
        """Looks whether the list has changed. On a thread, once it serves: a file system may hang. Then one thread
        waits for it, and the others, after a second each, take what was there before."""
        if self._lock.acquire(timeout=1):
            try:
                self._list.read()
            finally:
                self._lock.release()

    def grants(self, key: bytes) -> tuple[Grant, ...]:
        """What a key may do; none where it may not come in."""
        if self._options.authorize:  # it is asked when the client comes in, and then for each target
            return (Grant(),)
        return tuple([grant for _, grant in self._list.lines.get(key, ()) if time.time() < grant.expires])

    def _allows(self, key: bytes, target: str) -> bool:
        """What the caller of serve(authorize=...) says to it. On a thread."""
        try:
            return self._options.authorize is None or bool(self._options.authorize(encode_key(key), target))
        except BaseException as error:  # sys.exit() and CancelledError too
            line = "❌ authorize() raised for `%s`: %r" % (printable(target), error)
            self._loop.call_soon_threadsafe(functools.partial(self._server.counters.fail, key, line))
            return False

    def let_in(self, key: bytes, is_legacy: bool) -> None:
        """AuthenticationError for a client that may not come in. On a thread."""
        self.look()
        if not self._allows(key, ""):
            raise AuthenticationError("authorize() does not permit the key `%s`" % encode_key(key))
        self.admit(key, is_legacy)

    def admit(self, key: bytes, is_legacy: bool = False) -> tuple[Grant, ...]:
        """What a key may do over this wire; AuthenticationError for one that may not come in."""
        grants = self.grants(key)
        if not grants:
            raise self._why_not(key)
        if is_legacy:
            grants = tuple(grant for grant in grants if not grant.no_legacy)
        if not grants:
            raise AuthenticationError("the key `%s` may not come in over the original's protocol (no-legacy);"
                                      " connect without --legacy" % encode_key(key))
        return grants

    def _why_not(self, key: bytes) -> AuthenticationError:
        """Why a key may not come in, and what would help."""
        shown = encode_key(key)
        lines, broken = self._list.lines.get(key), self._list.find_broken(key)
        if broken:
            return AuthenticationError("line %d of the server's authorized_keys has this client's key but cannot be"
                                       " understood: %s" % (broken[0], shown))
        if lines:
            return AuthenticationError("line %d of the server's authorized_keys is this client's, and has expired: %s"
                                       % (lines[-1][0], shown))
        return AuthenticationError("the server does not know this client's key%s: %s" % (
            " (its log says why)" if self._list.is_unusable else
            ". Add this line to authorized_keys on the server", shown))

    def why_revoked(self, key: bytes) -> str:
        broken = self._list.find_broken(key)
        if broken:
            return "stands in line %d of authorized_keys, which cannot be understood" % broken[0]
        return "has expired" if key in (self._lines or ()) else "is not in authorized_keys any more"

    def have_changed(self) -> bool:
        """Whether it has to be checked again what each client has: the list was changed, or a line has expired. Logs
        what is wrong with a list that was changed."""
        lines, problems, counts = self._list.lines, self._list.problems, not self._options.authorize
        if counts and problems != self._problems:
            for problem in problems:
                log.warning("%s", problem)
        self._problems = problems
        if lines is self._lines and time.time() < self._expiry:
            return False
        if counts and not lines and not problems:
            log.warning("`%s` lists nobody, so nobody can connect: it takes a line with the public key of each client",
                        self._list.path)
        self._lines = lines
        self._expiry = min((grant.expires for of_key in lines.values() for _, grant in of_key
                            if grant.expires > time.time()), default=NEVER)
        return True

    # ---- targets

    def check(self, link: Link, remote: str, is_udp: bool = False) -> tuple[Address, tuple[Grant, ...], Any]:
        """The target that a client names, what it was granted, and what look_up() would find, where the target is an
        address; PolicyError where the client may not have the target."""
        try:
            grants = self.admit(link.peer_key, link.is_legacy)
        except AuthenticationError as error:
            raise PolicyError(str(error)) from None
        if is_udp:
            grants = tuple(grant for grant in grants if not grant.no_udp)
        if not grants:
            raise PolicyError("no-udp: authorized_keys permits this key no UDP")
        target = self._options.policy.check(remote, grants)
        if is_udp and target.is_unix:
            raise PolicyError("a Unix socket takes no datagrams here")
        is_known = is_literal(target.host)
        return target, grants, self.check_addresses(grants, target, [literal(target)], is_udp) if is_known else None

    def check_addresses(self, grants: tuple[Grant, ...], target: Address, found: Sequence[tuple[int, Any]],
                        is_udp: bool) -> list[tuple[int, Any]]:
        """Those of the addresses of a target that may be connected to; PolicyError where there is none."""
        allowed = self._options.policy.check_addresses(target, tuple(sockaddr[0] for _, sockaddr in found), grants)
        others = [(family, sockaddr) for family, sockaddr in found
                  if sockaddr[0] in allowed and (is_udp or not self._is_own(family, sockaddr))]
        if not others:
            raise PolicyError("`%s` is an address that this server itself listens on" % str(target))
        return others

    def _is_own(self, family: int, sockaddr: Any) -> bool:
        """Whether this server listens there for itself: its metrics tell of all keys, and at its own port somebody
        could say with a PROXY header that he is another."""
        listening = [*self._server.metrics_at, *[listener.address for listener in self._server.listeners]]
        bound = [address[0].split("%")[0] for address in listening if address[1] == sockaddr[1]]
        if not bound:
            return False
        address, every = parse_ip(sockaddr[0]), "::" if family == socket.AF_INET6 else "0.0.0.0"
        # A system connects to an address of its own from the address itself.
        return str(address) in bound or every in bound and bool(
            address.is_loopback or parse_ip(address_towards(sockaddr) or every) == address)

    def find(self, link: Link, remote: str, then: Callable[..., None], is_udp: bool = False) -> None:
        """then(target, its addresses, None), or then(None, None, the reason why not)."""
        try:
            target, grants, found = self.check(link, remote, is_udp)
        except PolicyError as error:
            return then(None, None, error)

        def on_answer(error: Exception | None) -> None:
            if error or found or target.is_unix:
                return then(target, None if error else found, error)
            return self._look_up(link.peer_key, grants, target, functools.partial(then, target), is_udp)
        return self.ask(link.peer_key, "udp " * is_udp, target, on_answer)

    def ask(self, key: bytes, kind: str, target: Address, then: Callable[[Exception | None], None]) -> None:
        """then(None), or then(the reason why not); on a thread meanwhile: authorize() may take its time."""
        if not self._options.authorize:
            return then(None)
        return self._server.lookups.submit(
            key, functools.partial(self._allows, key, kind + str(target)),
            lambda allows, error: then(None if allows else error or PolicyError("authorize() does not permit it")))

    def _look_up(self, key: bytes, grants: tuple[Grant, ...], target: Address, done: Done, is_udp: bool) -> None:
        """done() gets those addresses of a name that may be connected to, or why there is none. An authorizer that has
        permitted the name is asked about its guarded addresses too."""
        def show(sockaddr: Any) -> str:
            return "udp " * is_udp + str(Address(str(parse_ip(sockaddr[0])), target.port))

        def on_found(found: Any, error: Exception | None) -> None:
            try:
                found = found and self.check_addresses(grants, target, found, is_udp)
            except PolicyError as refused:
                found, error = None, refused
            guarded = [sockaddr for _, sockaddr in found or ()
                       if self._options.authorize and is_guarded(target, sockaddr[0])]
            if not guarded:
                return done(found, error)
            refusal = PolicyError("`%s` resolves to `%s`, which authorize() does not permit"
                                  % (target, show(guarded[0])))
            return self._server.lookups.submit(
                key, lambda: [pair for pair in found if pair[1] not in guarded or self._allows(key, show(pair[1]))],
                lambda allowed, error: done(allowed, None if allowed else error or refusal))
        self._server.lookups.look_up(key, target, on_found)


class NoRules(Rules):
    """Behind ssh: a client may open everything that its user could open on that machine without ratrod."""

    def grants(self, key: bytes) -> tuple[Grant, ...]:
        return (Grant(),)

    def have_changed(self) -> bool:
        return False


# ---------------------------------------------------------------------------------------------------- reverse tunnels


class ReverseListener(Opener):
    """What a client's `R:` tunnel listens on at the server: its sockets, and its links, of which each new connection
    takes one. It lives as long as any of its links, waiting or busy, and any stream that waits for another link."""

    def __init__(self, server: Server, key: bytes, instance: bytes, asked: str, sockets: list[socket.socket]):
        super().__init__(server)
        self._server, self.key, self.instance, self.asked = server, key, instance, asked
        self.address = parse_bind(asked)._replace(port=sockets[0].getsockname()[1])
        self._shown = "back through %s" % str(self.address)  # what its streams are called in the log
        self._retired: collections.deque[bytes] = collections.deque(maxlen=64)  # of earlier runs
        self.links: set[Link] = set()
        self._lost_at = NEVER
        most = max(16, server.streams.most_of_key // 4)
        self._visitors_of = Quota(most, max(16, most // 4), "carries as many connections",
                                  ("of one reverse tunnel", "of one visitor to it"))
        self._listeners = [Listener(server.loop, sock, self._on_accept, server.limits.accept_pause, key)
                           for sock in sockets]
        for listener in self._listeners:
            listener.start()

    def __str__(self) -> str:
        return "reverse tunnel on `%s`" % str(self.address)

    def join(self, link: Link, instance: bytes) -> None:
        """One more link; those of an older run of the same client wait no more."""
        self.links.add(link)
        self._lost_at = NEVER
        link.tunnel, link.instance = self, instance
        for other in list(self.links):  # the client may make a new one because their path is dead
            if other is not link and self.loop.awake - other.heard_at > 1:
                other.doubt()
        if instance != self.instance:
            log.debug("%s: taken over by a new run of its client", self)
            self._retired.append(self.instance)
            self.instance = instance
            self.clear()
            self.reset_detached(LinkClosed("a new run of the client listens here"))
        link.turn(OPENER)
        link.send_record(OPENED, str(self.address), -1)
        link.release()
        self.put(link)

    def put(self, link: Link) -> None:
        if link.instance == self.instance:
            super().put(link)
        elif link.state == IDLE:  # of an older run
            self.drop(link)

    def keeps(self, link: Link) -> bool:
        return super().keeps(link) and len(self.idle) < self.limits.waiting_links

    def on_detached(self, stream: OpenerStream, link: Link, error: Exception) -> None:
        if stream.was_opened and stream.instance != self.instance:  # a newer run listens here
            stream.fail(error)
        else:
            super().on_detached(stream, link, error)

    def is_retired(self, instance: bytes) -> bool:
        """Whether a later run listens here: two that live must not take the address from each other for ever."""
        return instance != self.instance and instance in self._retired and any(
            link.instance == self.instance for link in self.links)

    @property
    def is_abandoned(self) -> bool:
        """Only its grace keeps it."""
        return not self.links and not self.detached

    def _on_accept(self, sock: socket.socket, address: Any) -> None:
        source = Source.name(address[0])
        stream = OpenerStream(self, address, self._shown, target=show_address(address), peer_key=self.key)
        stream.join(sock)
        try:
            self._visitors_of.check(source)
            self._server.streams.take(self.key)
        except Overloaded as error:
            stream.peer_key = b""  # it has no place, and the line in the log is a stranger's
            return stream.fail(error)
        self._visitors_of.take(source)
        if len(self.waiting) >= self.limits.reverse_queue:
            return stream.fail(ConnectError("too many connections wait for a link of the client"))
        return self.take(stream)

    def on_ended(self, stream: OpenerStream, error: Exception | None) -> None:
        super().on_ended(stream, error)
        if stream.peer_key:
            self._visitors_of.give_back(Source.name(stream.origin[0]))
            self._server.streams.give_back(self.key)

    def why_no_link(self, seconds: float) -> Exception:
        return ConnectError("the client has no link for it")

    def on_link_closed(self, link: Link) -> None:
        super().on_link_closed(link)
        self.links.discard(link)
        if not self.links:
            self._lost_at = self.loop.now

    def sweep(self) -> None:
        super().sweep()
        # Wait a moment: a refused connection ends its link, and the client's next link may already be connecting.
        if self.is_abandoned and self.loop.now - self._lost_at >= GRACE:
            self.close(LinkClosed("the reverse tunnel has ended"))

    def drain(self) -> None:
        """Its connections go on; nothing new comes."""
        for listener in self._listeners:
            listener.drain()
        self.clear()

    def close(self, error: Exception) -> None:
        if self.is_closed:
            return
        super().close(error)
        self._server.reverse.forget(self)
        for listener in self._listeners:
            listener.close()
        for link in list(self.links):
            if isinstance(link.user, Stream):
                link.user.fail(LinkClosed("the reverse tunnel has ended"),
                               Error(REMOTE_FAILED, "the reverse tunnel has ended"))
            else:
                link.close()


class ReverseListeners:
    """What the `R:` tunnels of all clients listen on at a server. The visitors of an address come to the key that has
    it, and to no other one."""

    def __init__(self, server: Server):
        self._server, self._most_of_key = server, server.limits.listeners_per_key
        self._all: set[ReverseListener] = set()

    def __iter__(self) -> Iterator[ReverseListener]:
        return iter(list(self._all))

    def open(self, link: Link, open_: Open) -> None:
        refuse = functools.partial(self._server.acceptor.refuse, link, "listen " + open_.target)
        try:
            address = self._check(link.peer_key, open_.target)
        except PolicyError as error:
            return refuse(error)

        def on_permitted(error: Exception | None) -> None:
            if error or link.state != CONNECTING:
                return refuse(error or ConnectError("the client is gone"))
            try:
                listener = self._find(link.peer_key, address, open_) or self._add(link.peer_key, address, open_)
            except RatrodError as failure:
                return refuse(failure)
            return listener.join(link, open_.instance)
        return self._server.rules.ask(link.peer_key, "listen ", address, on_permitted)

    def _check(self, key: bytes, asked: str) -> Address:
        """The address that a client may have listened on; PolicyError where it may not."""
        if not self._server.options.allow_listen:
            raise PolicyError("this server does not listen for clients; serve --allow-listen lets it")
        try:
            address = parse_bind(asked)
            grants = self._server.rules.admit(key)
        except (ValueError, AuthenticationError) as error:
            raise PolicyError(printable(str(error))) from None
        if not any(grant.listens(address) for grant in grants):
            raise PolicyError("`%s` is not what authorized_keys permits this key to listen on" % str(address))
        return address

    def _find(self, key: bytes, address: Address, open_: Open) -> ReverseListener | None:
        """The key's own one that is there; RatrodError where a later run of its client has it."""
        there = next((listener for listener in self if listener.address == address and listener.key == key), None)
        if there and there.is_retired(open_.instance):
            raise RatrodError("cannot listen on `%s`: a later run of this client does" % str(address))
        return there

    def _add(self, key: bytes, address: Address, open_: Open) -> ReverseListener:
        """A new one; RatrodError where it cannot be."""
        self._check_free(key, address)
        for listener in self:
            if listener.key == key and listener.is_abandoned:
                listener.close(LinkClosed("the reverse tunnel has ended"))
        if sum(listener.key == key for listener in self) >= self._most_of_key:
            raise RatrodError("this client listens on as many addresses as one may have (%d); serve"
                              " --max-listeners-per-key allows more" % self._most_of_key)
        sockets = listen(address)
        try:
            self._check_free(key, address._replace(port=sockets[0].getsockname()[1]))
        except RatrodError:
            close_all(sockets)
            raise
        listener = ReverseListener(self._server, key, open_.instance, open_.target, sockets)
        self._all.add(listener)
        self._server.counters.fail(key, "📻 [TCP] Listening on `%s` for the client with key %s" % (
            str(listener.address), self._server.show_key(key)), logging.INFO)
        return listener

    def _check_free(self, key: bytes, address: Address) -> None:
        """RatrodError where visitors of somebody else's address could come to this one."""
        if any(is_shared(address, listener.address) for listener in self if listener.key != key):
            raise RatrodError("cannot listen on `%s`: it is in use by another client" % str(address))
        if any(is_shared(address, Address(*listener.address[:2])) for listener in self._server.listeners):
            raise RatrodError("cannot listen on `%s`: this server itself is on that port" % str(address))

    def check(self) -> None:
        for listener in self:
            try:
                self._check(listener.key, listener.asked)
            except PolicyError as error:
                log.error("❌ %s: %s", listener, error)
                listener.close(error)

    def forget(self, listener: ReverseListener) -> None:
        self._all.remove(listener)
        self._server.counters.fail(listener.key, "%s closed" % listener, logging.INFO)


# ---------------------------------------------------------------------------------------------------- server


class Server(Endpoint):
    """Listens for clients and connects them to the remotes that they name, as far as its rules allow."""

    def __init__(self, loop: EventLoop, folder: KeyFolder, limits: Limits, options: ServerOptions, callbacks: Callbacks,
                 sockets: list[socket.socket] | None = None):
        super().__init__(loop, folder, limits, callbacks, is_legacy=options.legacy, memory=256 << 20)
        self.options, self.instance = options, options.instance or self.instance
        descriptors = descriptor_limit()
        most_sessions = min(limits.udp_sessions_in_all, descriptors // 4)
        # More patient than the client, which then is the one to say SessionOver.
        self.sessions = UdpSessions(self, most_sessions, UdpSessions.IN_ALL, 1.25 * limits.udp_timeout)
        self.admission = Admission(self)
        # Each stream needs a descriptor for its link and one for its remote, each UDP session one.
        left = descriptors - 64 - most_sessions - self.admission.most
        most = limits.links or max(min(16, descriptors // 8), left // 2)
        self._links_of = Quota(most, limits.links_per_key or max(min(most, 16), most // 2), "has as many connections")
        most = limits.streams or most
        self.streams = Quota(most, limits.streams_per_key or max(min(most, 16), most // 2), "carries as many streams")
        self._admitting = threading.Lock()
        self.rules, self.reverse, self._is_looking = Rules(self), ReverseListeners(self), False
        self.acceptor = Acceptor(self, self.streams, self._connect,
                                 lambda stream, link: self.rules.check(link, stream.target), self._answer,
                                 lambda link, open_: (link.name, open_.target))
        self._connecting = FairQueue(most_of_key=limits.connects_per_key)
        self.address = options.bind
        for sock in listen(options.bind) if sockets is None else sockets:
            self.listeners.append(Listener(loop, sock, self.admission.accept, limits.accept_pause))
            self.address = options.bind._replace(port=sock.getsockname()[1])

    def start(self) -> None:
        self.rules.look()
        self._check_rules()
        for listener in self.listeners:
            listener.start()
        self.options.report("🔑 The server's key, which clients are asked about: `%s`", encode_key(self.keys.public))
        self.options.report("🚀 Starting server on `%s` ...", self.address)
        self._callbacks.started()

    @property
    def handshakes(self) -> int:
        return len(self.admission)

    def describe(self) -> Iterator[str]:
        yield "Server on `%s`" % str(self.address)
        for listener in self.reverse:
            yield "%s for the client with key %s" % (listener, self.show_key(listener.key))

    def show_key(self, key: bytes) -> str:
        """A key with the comments of its lines."""
        comments = {grant.comment for grant in self.rules.grants(key) if grant.comment}
        return super().show_key(key) + (" (%s)" % ", ".join(sorted(comments)) if comments else "")

    def read_files(self) -> KeyPair:
        self.rules.look()
        return super().read_files()

    def on_reloaded(self, is_new_key: bool) -> None:
        self._check_rules()

    def sweep(self) -> None:
        self._check_rules()  # a line may expire
        self._look()
        self.sessions.sweep()
        self.acceptor.sweep()
        self.leave_dead_paths(self.loop.awake - DOUBTED_FOR)
        for listener in self.reverse:
            listener.sweep()

    def _look(self) -> None:
        def on_looked(_result: Any, _error: Exception | None) -> None:
            self._is_looking = False
            self._check_rules()
        if not self._is_looking:
            self._is_looking = True
            self.files.submit(self.rules.look, on_looked)

    def _check_rules(self) -> None:
        """Ends what the rules do not allow any more."""
        if self.rules.have_changed():
            linked = {link.peer_key for link in self.links if link.state != BYE}
            for key in linked | {stream.peer_key for stream in self.counters.streams}:
                if not self.rules.grants(key):
                    self._end_key(key)
            for session in list(self.counters.sessions):
                try:
                    if session.udp.link:
                        target, grants, _ = self.rules.check(session.udp.link, session.target, is_udp=True)
                        for found in session.addresses:  # a name is not enough for a guarded one
                            self.rules.check_addresses(grants, target, [found], is_udp=True)
                except PolicyError as error:
                    session.udp.end(session, error, Error(INVALID_HOST, REFUSED))
            self.reverse.check()

    def _end_key(self, key: bytes) -> None:
        """Ends what a key has that may not come in any more. All its links are told, and take nothing more, before what
        they carry is put away: 5,000 UDP sessions take half a second."""
        links = [link for link in self.links if link.peer_key == key and link.state != BYE]
        shown, fate = encode_key(key), self.rules.why_revoked(key)
        log.warning("The client's key `%s` %s: %s of it ended", shown, fate, plural(len(links), "link"))
        error = AuthenticationError("the client's key `%s` %s" % (shown, fate))
        users = [link.user for link in links]
        for link in links:
            link.user = NOBODY
            if link.is_legacy:
                link.abort(error)
            else:
                link.leave(link.writer.record(ERROR, INVALID_KEY, str(error)), 0.5)  # until the next sweep
        for link, user in zip(links, users):
            user.on_close(link, error)
        self.acceptor.reset_detached(error, key)

    # ---- strangers

    def admit(self, is_legacy: bool, key: bytes) -> None:
        """On a thread. AuthenticationError for a client that is not known, Overloaded for one too many."""
        self.rules.let_in(key, is_legacy)
        with self._admitting:  # two at once must not both take the last place
            self._links_of.take(key, int(not is_legacy and self.acceptor.has_detached(key)))

    def on_negotiated(self, negotiation: Negotiation, handshake: Handshake, error: Exception | None) -> None:
        """A stranger has authenticated himself, or not."""
        if error is None and not self.rules.grants(handshake.peer_key):
            error = AuthenticationError("its key was removed from authorized_keys")
            negotiation.sock.close()
        if error is None:
            return self._welcome(negotiation, handshake)
        if not negotiation.is_stepping:  # otherwise at the step's end
            self.give_place_back(handshake)
        return self.complain_of_stranger(negotiation.address, error)

    def complain_of_stranger(self, address: Any, error: Exception) -> None:
        name = Source.name(address[0])
        is_known = self.admission.source(name).is_trusted(self.loop.now)
        if isinstance(error, Speechless) or isinstance(error, Departed) and is_known:
            return log.debug("health check of `%s`, or the like: %s", show_address(address), error)
        self.counters.handshakes_failed += 1
        self.loop.complain("❌ Refused %%d more connections from `%s`" % name,
                           "❌ Refused `%s`: %s" % (show_address(address), error))
        return None

    def _welcome(self, negotiation: Negotiation, handshake: Handshake) -> None:
        shown = show_address(negotiation.address)
        log.debug("✅ Accepted `%s` with key %s, cipher: %s", shown, self.show_key(handshake.peer_key), handshake.suite)
        source = self.admission.source(Source.name(negotiation.address[0]))
        source.links += 1
        self.counters.links += 1
        if isinstance(handshake, LegacyServerHandshake):
            legacy = LegacyLink(self, negotiation.sock, handshake, ACCEPTOR, shown, CONNECTING)
            legacy.source = source
            return self._open_legacy(legacy, handshake.remote, handshake.is_udp)
        link = Link(self, negotiation.sock, handshake, ACCEPTOR, shown)
        link.source = source
        link.is_extra = self._links_of.of(link.peer_key) > self._links_of.most_of_key
        if self.draining:  # it came through the system's queue, and its client tries another server
            return link.leave(link.writer.record(CLOSE))
        return link.update()

    def give_place_back(self, handshake: Handshake) -> None:
        """Of a stranger that admit() has let in, and that gets no link."""
        if handshake.peer_key and handshake.is_done:
            self._count_out(handshake.peer_key)

    def _count_out(self, key: bytes) -> None:
        with self._admitting:
            if self._links_of.of(key):
                self._links_of.give_back(key)

    # ---- links

    def on_link_closed(self, link: Link, error: Exception | None) -> None:
        super().on_link_closed(link, error)
        self._count_out(link.peer_key)
        if link.source:
            link.source.links -= 1
            link.source.authorized_at = self.loop.now
        if link.tunnel:
            link.tunnel.on_link_closed(link)

    def on_idle(self, link: Link, record: bytes) -> None:
        if link.tunnel:
            return link.tunnel.put(link)
        if self.draining:
            return link.leave(record + link.writer.record(CLOSE))
        return link.send(record + link.writer.record(OVER))

    def on_open(self, link: Link, open_: Open) -> None:
        is_old = self.loop.now - link.born > self.limits.link_age
        if (is_old or link.is_extra) and not self.acceptor.is_known(link, open_):
            if is_old:
                return link.leave(link.writer.record(CLOSE))
            try:
                self._links_of.check(link.peer_key, 1)
            except Overloaded as overloaded:
                return self.acceptor.refuse(link, open_.target, overloaded)
        if open_.kind == UDP:
            return UdpLink(self, link.peer_key).accept(link)
        return self.reverse.open(link, open_) if open_.kind == LISTEN else self.acceptor.open(link, open_)

    def on_abandon(self, link: Link, stream_id: bytes) -> None:
        self.acceptor.abandon(link, stream_id)

    def _open_legacy(self, link: LegacyLink, remote: str, is_udp: bool) -> None:
        if not remote:  # the client only wanted to know whether it may come in
            return link.leave(link.writer.record(OPENED), self.limits.drain_timeout)
        if not is_udp:
            self.acceptor.open(link, Open(TCP, remote))
            return link.update()
        if self.draining:  # a client of UDP makes another link, elsewhere
            return link.leave(b"")
        udp = UdpLink(self, link.peer_key)
        session = UdpSession(udp, 0, new_label(link.name, remote), remote)
        link.user, udp.link = udp, link
        self.sessions.add(session)
        if session.is_over:  # there was no room
            return None

        def on_connected(error: Exception | None) -> None:
            if error:
                udp.link = None  # it gets an answer
                udp.end(session)
                return self.acceptor.refuse(link, remote, error)
            return udp.accept(link)
        self.on_session(session, on_connected)
        return link.update()

    # ---- opening a remote: policy, look-up, policy for the addresses, connect

    def _connect(self, stream: Stream, link: Link, done: Done) -> None:
        """The acceptor's: connects to the remote of a stream, one of at most connects_per_key of its key at a time. A
        look-up counts for nothing there: names that a name server is silent about must not hold up all others."""
        key, until = link.peer_key, time.monotonic() + self.limits.connect_timeout

        def on_found(target: Address, found: Any, error: Exception | None) -> None:
            if error:
                done(None, error)
            else:
                self._connecting.begin(key, functools.partial(begin, target, found))

        def begin(target: Address, found: Any) -> None:
            if stream.is_over:  # it waited too long, or left
                return on_connected(None, ConnectError("the client is gone"))
            connector = Connector(self.loop, target, max(0.01, until - time.monotonic()), on_connected)
            return connector.start(lambda _target, on_found: on_found(found, None))

        def on_connected(sock: socket.socket | None, error: Exception | None) -> None:
            self._connecting.done(key)
            done(sock, error)
        self.rules.find(link, stream.target, on_found)

    @staticmethod
    def _answer(target: str, error: Exception) -> tuple[Exception, Error]:
        """What the log says, and what the client is told: of a refusal by policy nothing but that it is one."""
        if isinstance(error, PolicyError):
            return error, Error(INVALID_HOST, REFUSED)
        if isinstance(error, RatrodError) and not isinstance(error, ConnectError):
            return error, Error(REMOTE_FAILED, str(error))
        text = "cannot connect to the remote `%s`: %s" % (printable(target), reason(error))
        return ConnectError(text), Error(REMOTE_FAILED, text)

    # ---- UDP

    def on_udp_lost(self, udp: UdpLink, link: Link, error: Exception) -> None:
        udp.close()
        self.complain_of(link, "UDP link of `%s`" % link.name, error)

    def on_session_failed(self, session: UdpSession, error: Exception) -> None:
        session.udp.end(session, *self._answer("udp " + session.target, error))

    def on_session(self, session: UdpSession, done: Callable[[Exception | None], None]) -> None:
        """Connects a session to its target: done(None), or done(the reason why not). No call where it ends before."""
        link = session.udp.link
        assert link is not None

        def on_found(_target: Address, found: Any, error: Exception | None) -> None:
            if session.is_over or not found:
                return None if session.is_over else done(error)
            try:
                session.addresses = list(found)
                session.connect()
            except OSError as failure:
                return done(failure)
            return done(None)
        self.rules.find(link, session.target, on_found, is_udp=True)

    # ---- the end

    def end_waiting(self) -> None:
        for listener in self.reverse:
            listener.drain()
        for link in list(self.links):
            if isinstance(link.user, UdpLink):  # its client makes another, elsewhere
                link.user.on_close(link, LinkClosed(ENDING))
                link.leave(b"")
            elif link.state == IDLE and link.role == ACCEPTOR:
                link.leave(link.writer.record(CLOSE))

    def is_busy(self) -> bool:
        return super().is_busy() or self.admission.is_busy()

    def close(self) -> None:
        self.acceptor.reset_detached(LocalFailed(ENDING))
        for listener in self.reverse:
            listener.close(LocalFailed(ENDING))
        self.admission.close()
        super().close()


class PipeServer(Server):
    """The far side of one ssh:// link. It listens to nobody, has no keys, and ends with its link."""

    def __init__(self, loop: EventLoop, limits: Limits):
        options = ServerOptions(Address("", 0), Policy([".*", "unix:.*"]))
        super().__init__(loop, NoKeys(), limits, options, Callbacks(), [])
        self.rules, self._is_looking = NoRules(self), True  # for good: there is no list to look at

    def start(self) -> None:
        link = Link(self, None, PipeHandshake(), ACCEPTOR, "ssh")
        link.send_record(COMPLETED, __version__)
        link.update()

    def on_link_closed(self, link: Link, error: Exception | None) -> None:
        super().on_link_closed(link, error)
        self.loop.stop()


# ---------------------------------------------------------------------------------------------------- client


class Pool(Opener):
    """A client's links: made ahead by Reach, closed when nobody needs them. On the legacy wire, where a link carries
    one stream, each waiter has a link made for it."""

    READY = 2  # idle links at any time: the next connection needs no handshake, and a burst of two neither
    # Links in a row to other runs of the server, after which a stream of an earlier run is given up; and links for each
    # worker of a run, after which the search for the right one slows down.
    OTHER_RUNS = 8
    SEARCH = 10  # links a second
    MIXED = b""  # in place of a run: two of them were alive at once

    def __init__(self, client: Client, reach: Reach, ready: int):
        super().__init__(client)
        self._client, self._reach, self._ready = client, reach, min(ready, client.limits.idle_links)
        self.links: set[Link] = set()
        self._begun: set[Any] = set()  # legacy: waiters whose links are being made
        self._peaks = [0, 0]  # most links wanted at once, in this minute and in the one before
        self._minute = self.loop.now
        self._others: dict[bytes, int] = {}  # run -> links in a row that showed other runs
        self._runs: dict[str, bytes] = {}  # server -> the run that it showed last, or MIXED
        self._sought_since, self._sought_at, self._sought, self._sought_for = 0.0, 0.0, 0, 0

    @property
    def needed(self) -> int:
        """How many links are waited for."""
        return len(self.waiting) + len(self.detached)

    def take(self, waiter: Any) -> None:
        self._peaks[0] = max(self._peaks[0], len(self.links) - len(self.idle) + len(self.waiting) + 1)
        super().take(waiter)

    def keeps(self, link: Link) -> bool:
        return super().keeps(link) and len(self.idle) < max(self.limits.idle_links, self._ready + max(self._peaks))

    def waits_for(self) -> float:
        if self._reach.error:
            return self.limits.connect_timeout
        return self.limits.ssh_patience if self._queues else self._client.patience

    @property
    def _queues(self) -> bool:
        return bool(self._client.ssh and self.links)

    def why_no_link(self, seconds: float) -> Exception:
        if self._reach.error:
            return self._reach.error
        busy = "; all %d links over ssh are busy" % len(self.links) if self._queues else ""
        return ConnectError("no link to the server within %g s%s" % (seconds, busy))

    # ---- making links

    def want_links(self) -> None:
        if self.is_closed:
            return
        if self._reach.error is not None:
            if self.waiting:
                self._reach.hurry()
        elif self._client.is_legacy:
            for waiter in [waiter for waiter in self.waiting if waiter not in self._begun]:
                self._make(waiter)
        else:
            # Where nothing has been carried yet, one is enough to see whether the server is there.
            ready = 0 if self._client.draining else self._ready if any(self._peaks) else min(1, self._ready)
            wanted = self.needed + ready - len(self.idle)
            if wanted > 0:
                # After the last one was lost, one to see whether the server is there.
                most = min(self.limits.links_at_once, self._client.most_links - len(self.links)) if self.links else 1
                for _ in range(min(wanted - self._reach.fresh, most - len(self._reach.dials))):
                    self._make(None)

    def replace(self, link: Link) -> None:
        if self.loop.now - link.born > 0.5:  # one that ends at once would loop, 700 times a second: the sweep asks
            self.want_links()

    def try_again(self) -> None:
        """While the server is away: one link at a time."""
        if len(self._reach.dials) < self._reach.HANGING and (self.waiting or not self._client.is_legacy):
            self._make(self.waiting[0] if self._client.is_legacy else None)

    def seek(self, stuck: bool) -> None:
        """Each second, while streams wait for a link that a lost one carried, or links are `stuck`: one more try to
        reach the server, beside those that hang, for a minute, and then every 5 s. Where links can be made, but are to
        other workers or runs, the search for the right one takes more of them."""
        now = self.loop.now
        if not self.detached and not stuck or self.is_closed or self._client.draining:
            self._sought = 0
            return
        if not self._sought:
            self._sought_since = now
        elif len(self.detached) < self._sought_for:  # found for some: the search begins anew for the others
            self._sought = 1
        self._sought_for = len(self.detached)
        others = {(link.name, link.instance) for link in self.links if link.is_completed and not link.is_stuck}
        elsewhere = [stream.instance for stream, last in self.detached.items() if stream.instance and any(
            name == last.name and instance != stream.instance for name, instance in others)]
        is_quick = self._sought < self.OTHER_RUNS * max((instance[6] for instance in elsewhere), default=0)
        if is_quick or now - self._sought_at >= (0 if not elsewhere and now - self._sought_since < 60 else 5):
            self._sought_at = now
            servers = list(dict.fromkeys(link.name for link in self.detached.values())) or [""]
            for _ in range(min(self.SEARCH if is_quick else 1, self._reach.HANGING - len(self._reach.dials))):
                self._sought += 1
                self._make(None, servers[self._sought % len(servers)])

    def _make(self, waiter: Any, server: str = "") -> None:
        open_ = None
        if waiter:
            self._begun.add(waiter)
            if isinstance(waiter, UdpLink):
                open_ = Open(UDP, next((session.target for session in waiter.sessions.values()), ""))
            else:
                open_ = Open(TCP, waiter.target)
        self._reach.dial(open_, functools.partial(self._on_dialed, waiter), server=server)

    def _on_dialed(self, waiter: Any, link: Link | None, error: Exception | None) -> None:
        self._begun.discard(waiter)
        if link is None:
            return self._on_dial_failed(waiter, error or ConnectError("unknown reason"))
        if waiter is None:
            return self.adopt(link)
        if waiter in self.waiting:  # or it has given up
            self.waiting.remove(waiter)
            return waiter.open(link)
        # A legacy target has been connected already: a clean end would tell it that somebody had nothing to say.
        return link.abort(LinkClosed("nobody waits for it any more"))

    def _on_dial_failed(self, waiter: Any, error: Exception) -> None:
        if waiter and isinstance(error, PeerError) and not is_final(error):
            # Legacy: the server is there, and does not open this remote.
            if waiter in self.waiting:
                self.waiting.remove(waiter)
                waiter.fail(error)
            return None
        if self.links and (isinstance(error, Overloaded) or self._sought and not is_final(error)):  # others are there
            return log.debug("no new link: %s", error)
        return self.on_failed(error)

    def adopt(self, link: Link) -> None:
        """A new link, on which nothing has been asked yet."""
        self.links.add(link)
        self._judge(link)
        self.put(link)

    def _judge(self, link: Link) -> None:
        """A stream of another run of this server cannot go on where that run is no more. One link to another run tells,
        unless there may be several servers behind the name: where it has come to another address, through a proxy, or
        where two runs were seen alive at once."""
        shown = link.instance[:6]
        known = self._runs.setdefault(link.name, shown)
        if not self.detached and known in (shown, self.MIXED):
            return  # the usual case: to look at all links for each new one would be quadratic
        alive = {other.instance[:6] for other in self.links
                 if other.name == link.name and other.state != CLOSED and not other.is_stuck}
        self._runs[link.name] = self.MIXED if len(alive) > 1 or known == self.MIXED else shown
        is_plain = self._runs[link.name] != self.MIXED and not self._client.options.proxy and link.path is not None
        waiting = [(stream, last) for stream, last in self.detached.items()
                   if stream.instance and last.name == link.name]
        for run in {stream.instance[:6] for stream, _ in waiting}:
            self._others[run] = 0 if run in alive else self._others.get(run, 0) + 1
        for stream, last in waiting:
            is_one = is_plain and link.path and last.path and link.path[1] == last.path[1]
            if self._others[stream.instance[:6]] >= (1 if is_one else self.OTHER_RUNS):
                del self.detached[stream]
                stream.fail(LinkClosed("the server has been started anew and does not know it, or another one answers"))

    # ---- what becomes of them

    def on_completed(self, link: Link) -> None:
        self._reach.let_in(link.name, "Connected to server `%s` again," % link.name)
        if self.needed:
            self.want_links()

    def on_failed(self, error: Exception) -> None:
        if self._client.draining and not self.needed:
            return None  # it was to be a spare one
        if is_final(error) and not self._client.is_stubborn:
            self.close(error)
            return self._client.give_up(error)
        lost = "" if self.links else "Lost the server `%s`" % self._client.server_names
        # A legacy client notices by a try that there was a loss.
        self._reach.fail(error, lost, tried=not self._client.is_legacy)
        if is_final(error):  # the next try is far
            self.reset_waiting(error)
        elif self.needed:
            self.want_links()

    def on_closed_to(self, stream: OpenerStream, link: Link) -> None:
        self.clear()  # a server that ends says Close on all its links
        super().on_closed_to(stream, link)

    def on_link_closed(self, link: Link) -> None:
        super().on_link_closed(link)
        self.links.discard(link)

    def on_link_lost(self, link: Link, error: Exception | None) -> None:
        if link in self.links:  # it was not dropped
            self.on_link_closed(link)
            if link.is_completed:
                self.replace(link)
            else:
                self.on_failed(error or LinkClosed(NOT_LET_IN))

    def drop(self, link: Link) -> None:
        self.links.discard(link)
        super().drop(link)

    def sweep(self) -> None:
        now = self.loop.now
        if now - self._minute >= 60:
            self._minute, self._peaks = now, [len(self.links) - len(self.idle), self._peaks[0]]
        # The least recently used stand first.
        while len(self.idle) > self._ready and now - self.idle[0].idle_since > self.limits.idle_time:
            self.drop(self.idle.pop(0))
        super().sweep()
        if not self.detached:
            self._others.clear()
        if self._client.started and (self.waiting or not self._client.is_legacy):
            self.want_links()


class ReverseTunnel(LinkUser):
    """The client's end of one `R:` tunnel: keeps links waiting at the server, and connects what comes on them to its
    own remote. It is what waits at the pool for each of these links, and their user until the server listens."""

    READY = 2  # links that wait; more while connections are busy, for a burst asks for one link after the other
    instance = b""  # the server listens in any run

    def __init__(self, client: Client, spec: TunnelSpec, number: int):
        self._client, self.spec, self.number, self._loop = client, spec, number, client.loop
        self.address: Address | None = None  # what the server listens on, once it has said so
        self.asked = str(spec.local) if spec.local.host else str(spec.local.port)
        self._asking, self.since = 0, 0.0  # how many links it waits for, and since when for the last of them
        self.waiting: set[Link] = set()
        self.busy: set[Link] = set()
        self.retry = Retry(client, client.options.retries, self.ask_more)
        any_number = Quota(sys.maxsize, sys.maxsize, "")
        self.acceptor = Acceptor(client, any_number, self._connect, lambda *_: None, self._answer, self._name)

    # ---- links that wait at the server

    def ask_more(self) -> None:
        """Asks for as many waiting links as it takes. The first goes alone: it says which port 0 is for the others."""
        client = self._client
        if not client.started or client.draining or self.retry.is_pausing:
            return
        wanted = 1
        if self.address and not self.retry.error:
            wanted = min(client.limits.waiting_links, self.READY + len(self.busy))
        while len(self.waiting) + self._asking < wanted and client.may_ask_for(self._asking + 1):
            self._asking += 1
            client.pool.take(self)

    def open(self, link: Link) -> None:
        link.ask(self, Open(LISTEN, self.asked, instance=self._client.listen_instance))

    def on_record(self, link: Link, kind: int, content: Any) -> None:
        if kind == OPENED:
            return self._on_listening(link, content.address)
        link.leave(b"")
        self._client.pool.clear()  # a server that ends says Close on all its links: the next try is to take a new one
        return self.fail(LinkClosed("the server takes no more streams on this connection"))

    def on_close(self, link: Link, error: Exception) -> None:
        self.fail(error)

    def _on_listening(self, link: Link, bound: str) -> None:
        try:
            address = parse_bind(bound)
        except ValueError:
            raise RemoteProtocolError("the server says that it listens on `%s`, which is no address"
                                      % printable(bound)) from None
        client = self._client
        self._asking -= 1
        self.retry.succeed("reverse tunnel on `%s` again," % str(address))
        is_first, self.address = self.address is None, address
        link.turn(ACCEPTOR)
        link.tunnel, link.instance = self, client.listen_instance
        self.waiting.add(link)
        client.pool.links.discard(link)
        if is_first:
            asked = parse_bind(self.asked)  # the port alone is for a server to say, where any will do
            self.asked = str(asked._replace(port=asked.port or address.port))
            client.on_bound(self)
        self.ask_more()
        return link.update()

    def fail(self, error: Exception) -> None:
        """A link could not be made, or was refused: asking again at once would not help."""
        client = self._client
        self._asking -= 1
        if client.draining:
            return None
        is_forbidden = isinstance(error, PeerError) and error.code == INVALID_HOST
        if self.address is None and (is_forbidden or not client.options.retries):
            log.error("❌ reverse tunnel `R:%s` to `%s`: %s", self.asked, self.spec.remote, reason(error))
            return client.finish(PolicyError(str(error)) if is_forbidden else error)
        if is_final(error) and not client.is_stubborn:
            return client.give_up(error)
        if self.waiting and isinstance(error, PeerError):  # a server that answers, and finds that there are enough
            return None
        return self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.retry.fail(error, "" if self.waiting else "reverse tunnel on `%s`" % self.asked)

    def put(self, link: Link, record: bytes) -> None:
        self.busy.discard(link)
        if len(self.waiting) + self._asking >= self._client.limits.waiting_links or self._client.draining:
            return link.leave(record + link.writer.record(CLOSE))
        self.waiting.add(link)
        return link.send(record + link.writer.record(OVER))

    def on_link_closed(self, link: Link, error: Exception | None) -> None:
        was_waiting = link in self.waiting
        self.busy.discard(link)
        self.waiting.discard(link)
        if self._client.draining:
            return
        if was_waiting and not self.waiting and not self._asking and not self.retry.error and not link.doubted_at:
            self._fail(error or LinkClosed("the server closed the connection"))
        elif not was_waiting or self._loop.now - link.born > 0.5:  # one that ends at once would loop: the sweep asks
            self.ask_more()

    def sweep(self) -> None:
        for link in [link for link in self.waiting if self._loop.now - link.born > self._client.limits.link_age]:
            self.waiting.discard(link)
            link.leave(link.writer.record(CLOSE))
        self.ask_more()
        self.acceptor.sweep()

    # ---- connections that come back

    def on_open(self, link: Link, open_: Open) -> None:
        """A connection came in at the server. Its Open names the visitor, for the log; the tunnel names the remote."""
        if open_.kind != TCP:
            raise RemoteProtocolError("an Open of kind %d on a Listen link" % open_.kind)
        self.waiting.discard(link)
        is_old = self._loop.now - link.born > self._client.limits.link_age
        if open_.attempt < 2 and (is_old or self._client.draining):
            return link.leave(link.writer.record(CLOSE))
        self.busy.add(link)
        self.ask_more()
        return self.acceptor.open(link, open_)

    def _name(self, _link: Link, open_: Open) -> tuple[str, str]:
        return "%s back from %s" % (printable(open_.target), self.address), str(self.spec.remote)

    def _connect(self, stream: Stream, _link: Link, done: Done) -> None:
        def on_connected(sock: socket.socket | None, error: Exception | None) -> None:
            if sock and self._client.options.send_proxy:
                try:  # the buffer of a new connection has room for it
                    sock.send(proxy_header(stream.target, self.address or NOWHERE))
                except OSError as broken:
                    sock.close()
                    sock, error = None, broken
            done(sock, error)
        timeout = self._client.limits.connect_timeout
        Connector(self._loop, self.spec.remote, timeout, on_connected).start(self._client.look_up)

    def _answer(self, _target: str, error: Exception) -> tuple[Exception, Error]:
        return (ConnectError("cannot connect to `%s`: %s" % (self.spec.remote, reason(error))),
                Error(REMOTE_FAILED, "the client cannot connect to its remote"))


class HostKeys:
    """Which keys of servers a client accepts: those of known_hosts, and what -a, --accept-new or the user add."""

    def __init__(self, options: ClientOptions, known: KnownHosts):
        self._options, self._known, self._lock = options, known, threading.Lock()

    def check(self, server: Place, key: bytes) -> None:
        """UnknownHost or AuthenticationError where this key is not accepted. On a thread."""
        if self._options.accept_all_hosts:
            return
        with self._lock:  # two links at once must not both add a line
            try:
                self._known.check(key, str(server))
            except UnknownHost as error:
                if not self._options.accept_new:
                    raise
                self.add(error)

    def add(self, host: UnknownHost) -> None:
        """Trusts this key from now on. AuthenticationError where it cannot be written: a key that is written nowhere
        would be a new one at each start, as with -a."""
        failure = self._known.add(host.key, host.address)
        if failure:
            raise AuthenticationError("ratrod %s. %s" % (failure, host)) from None
        log.warning("Server's public key `%s` is trusted for `%s` from now on, and stands in `%s`",
                    encode_key(host.key), host.address, self._known.path)


class FirstConnection:
    """The connection that tests whether the server lets this client in, before any tunnel takes connections. On the
    original's wire it asks for a remote without a name."""

    def __init__(self, client: Client):
        self._client, self._options = client, client.options

    def start(self, remote: str = "") -> None:
        open_ = Open(TCP, remote) if self._client.is_legacy else None
        self._client.reach.dial(open_, functools.partial(self._on_dialed, remote), self._options.report)

    def _on_dialed(self, remote: str, link: Link | None, error: Exception | None) -> None:
        if link:
            # Client.on_completed() or on_link_closed() will tell.
            return link.ask(NOBODY, Open(TCP, "")) if self._client.is_legacy else None
        # A Rust server with a regex refuses the empty remote that asks for nothing, and may allow a tunnel's.
        remotes = [str(spec.remote) for spec in self._client.tunnels if spec.kind in (FORWARD, STDIO)]
        if isinstance(error, PeerError) and error.code == INVALID_HOST and not remote and remotes:
            return self.start(remotes[0])
        # Its connection is closed: an answer takes as long as it takes.
        if isinstance(error, UnknownHost) and self._options.ask_host and self._options.ask_host(error):
            try:
                self._client.host_keys.add(error)
            except AuthenticationError as failure:
                return self.fail(failure)
            return self.start(remote)
        return self.fail(error or ConnectError("unknown reason"))

    def fail(self, error: Exception) -> None:
        client = self._client
        if self._options.retries and not is_final(error) and not client.draining:
            return client.reach.fail(error, "Test connection failed", is_first=True)
        if not client.draining:  # Ctrl-C while ssh asks: no news
            log.error("❌ Test connection failed: %s", reason(error))
        return client.finish(error)


class SocksEntrance:
    """What the SOCKS tunnels of a client take in, until it is a stream or a UDP association."""

    def __init__(self, client: Client):
        self._client, self._loop = client, client.loop
        self.negotiations: set[Negotiation] = set()
        self._outers = itertools.count(1)  # a number for each association

    def on_accept(self, sock: socket.socket, address: Any) -> None:
        handshake = SocksHandshake(self._client.options.socks_user)
        negotiation = Negotiation(self._loop, sock, address, handshake, self._client.limits.handshake_timeout,
                                  self._on_asked)
        self.negotiations.add(negotiation)
        negotiation.start()

    def _on_asked(self, negotiation: Negotiation, failure: Exception | None) -> None:
        self.negotiations.discard(negotiation)
        address, request = negotiation.address, negotiation.handshake
        assert isinstance(request, SocksHandshake)
        if failure:
            return self._complain(address, failure, request.version >= 0)
        try:
            self._answer(negotiation.sock, address, request)
        except (ValueError, OSError, RemoteProtocolError) as error:
            self._complain(address, error)
            code = 7 if isinstance(error, RemoteProtocolError) else 1
            LastWord(self._loop, negotiation.sock, socks_reply(request.version, code))
        return None

    def _answer(self, sock: socket.socket, address: Any, request: SocksHandshake) -> None:
        client = self._client
        if request.command == request.CONNECT:
            target = str(parse_target(request.target))  # a name in another alphabet becomes punycode here
            stream = SocksStream(client.pool, address, target)
            stream.version = request.version
            stream.join(sock)
            client.pool.take(stream)
        elif request.command == request.ASSOCIATE and isinstance(address, tuple):  # a Unix socket has no address
            client.associations.add(SocksPort(client, sock, address[0], request.target, next(self._outers)))
        else:
            raise RemoteProtocolError("it asks for command %d, and here are only CONNECT and, but for Unix sockets, UDP"
                                      " ASSOCIATE" % request.command)

    def _complain(self, address: Any, error: Exception, was_heard: bool = True) -> None:
        """SOCKS has hardly any words for a reason, so the log says it. The cause is without names: they may be many."""
        line = "SOCKS client `%s`: %s" % (show_address(address), reason(error))
        if not was_heard or isinstance(error, (Departed, LocalFailed, ConnectionError)):  # one that left
            return log.debug("%s", line)
        cause = "what they name cannot be" if isinstance(error, ValueError) else reason(error)
        self._loop.complain("❌ %%d more SOCKS clients: %s" % cause, "❌ " + line)
        return None


class Client(Endpoint):
    """Tunnels through the first of some servers that lets this client in. When that server goes away, another one may
    take its place. callbacks.finished(error) tells its end: with None where the client has done all it had to do."""

    REST = 5.0  # seconds for which a UDP target that could not be reached is not tried again

    def __init__(self, loop: EventLoop, folder: KeyFolder, limits: Limits, options: ClientOptions, callbacks: Callbacks,
                 sockets: list[list[socket.socket]] | None = None):
        super().__init__(loop, folder, limits, callbacks, is_legacy=options.legacy, memory=128 << 20)
        self.options, self.servers, self.finish = options, list(options.servers), callbacks.finished
        self.server_names = ",".join(map(str, self.servers))
        self.ssh: dict[Place, SshLinks] = {server: SshLinks(*options.ssh, server, limits) for server in self.servers
                                           if isinstance(server, SshHost) and options.ssh}
        self.most_links = limits.ssh_links if self.ssh else sys.maxsize
        if self.ssh:
            self.threads = Threads(loop, limits.links_at_once)  # ssh may take its time
        self.look_up = functools.partial(self.lookups.look_up, b"")  # of servers, proxies, remotes of reverse tunnels
        self.listen_instance = os.urandom(8)
        self.host_keys, self.reach = HostKeys(options, folder.known_hosts), Reach(self, options.retries)
        listens = not options.only_test and any(spec.kind in (FORWARD, SOCKS) for spec in options.tunnels)
        self.pool = Pool(self, self.reach, Pool.READY if listens and not options.legacy else 0)
        self.reverse: list[ReverseTunnel] = []
        self._first, self._socks = FirstConnection(self), SocksEntrance(self)
        self.associations: set[SocksPort] = set()
        self.started = self._was_connected = self._has_given_up = False
        self.since = loop.now  # when it was connected, or lost the server
        self._reached_at = 0.0  # when the newest link that the server has let in was made, as Link.doubted_at
        # On the original's wire each session has a link of its own.
        most_sessions = min(limits.udp_sessions, descriptor_limit() // 4 if options.legacy else sys.maxsize)
        self.sessions = UdpSessions(self, most_sessions, UdpSessions.PER_LINK, limits.udp_timeout)
        self._udp = UdpLink(self)
        self.tunnels: list[TunnelSpec] = []
        try:
            for number, spec in enumerate(options.tunnels):
                self._listen(spec, sockets[number] if sockets else listen_for_tunnel(1, spec)[0])
        except BaseException:
            self.close()  # what listens already
            raise

    def _listen(self, spec: TunnelSpec, sockets: list[socket.socket]) -> None:
        if sockets and not spec.local.is_unix:
            spec = spec._replace(local=spec.local._replace(port=sockets[0].getsockname()[1]))
        self.tunnels.append(spec)
        if spec.kind == REVERSE:
            self.reverse.append(ReverseTunnel(self, spec, len(self.tunnels) - 1))
        remote = str(spec.remote)
        on_accept = self._socks.on_accept if spec.kind == SOCKS else functools.partial(self._on_accept, remote)
        for sock in sockets:
            if sock.type == socket.SOCK_STREAM:
                pause = self.limits.accept_pause
                self.listeners.append(Listener(self.loop, sock, on_accept, pause, needs=self._needs_links))
            else:
                self.listeners.append(TunnelPort(self, sock, remote))

    def _needs_links(self) -> int:
        """How many links the connections that are in will need: new connections must leave a descriptor for each."""
        waiting = self.pool.needed + len(self._socks.negotiations)
        return max(0, min(waiting, self.most_links - len(self.pool.links)) - len(self.reach.dials))

    @property
    def is_stubborn(self) -> bool:
        """Whether it goes on trying, whatever it hears of keys: it was let in once, and its tries are not limited."""
        return self.started and self.options.retries is None

    # ---- start

    def start(self) -> None:
        """Tests the connection. The tunnels take connections after that, which wait in the system's queue meanwhile."""
        report = self.options.report
        report("⏳ Testing server connection ...")
        for spec in [] if self.options.only_test else self.tunnels:
            if spec.kind == SOCKS:
                report("📻 [SOCKS] Listening on `%s`, and routing through `%s` ...", spec.local, self.server_names)
            elif spec.kind == FORWARD:
                for protocol in ("UNIX",) if spec.local.is_unix else spec.protocols:
                    report("📻 [%s] Listening on `%s`, and routing through `%s` to `%s` ...", protocol, spec.local,
                           self.server_names, spec.remote)
        known = self.folder.known_hosts
        if self.options.accept_all_hosts:
            log.warning("Any server's key is accepted (-a): whoever stands in between can pretend to be `%s`",
                        self.server_names)
        elif not self.ssh and os.path.lexists(known.path):
            known.read()
            for problem in known.problems:
                log.warning("%s", problem)
        if self.is_legacy and not self.options.encrypt:
            log.warning("The traffic between client and server is in the clear: -e encrypts it, and so does ratrod2,"
                        " without --legacy")
        self._first.start()

    def try_again(self) -> None:
        if self.started:
            self.pool.try_again()
        else:
            self._first.start()

    def give_up(self, error: Exception) -> None:
        """Nothing that it does would help."""
        self.reach.stop()
        if not self._has_given_up:
            self._has_given_up = True
            log.error("❌ %s", reason(error))
            self.finish(error)

    def _begin(self) -> None:
        """The server has let it in: the tunnels take connections from now on."""
        self.since, self.started, self._was_connected = self.loop.now, True, True
        if self.options.only_test:
            return self.finish(None)
        for listener in [] if self.draining else self.listeners:
            listener.start()
        for spec in self.tunnels:
            if spec.kind == STDIO:
                # At its end the other side gets a moment to read why.
                self.pool.take(StdioStream(self.pool, str(spec.remote),
                                           lambda error: self._say_goodbye(lambda: self.finish(error))))
        for tunnel in self.reverse:
            tunnel.ask_more()
        if not self.reverse:
            self._callbacks.started()
        return None if self.tunnels else self.finish(None)

    def on_bound(self, tunnel: ReverseTunnel) -> None:
        """The server listens for it."""
        assert tunnel.address is not None
        self.options.report("📻 [TCP] `%s` listens on `%s`, and routing back to `%s` ...", self.server_names,
                            tunnel.address, tunnel.spec.remote)
        self.tunnels[tunnel.number] = tunnel.spec._replace(local=tunnel.address)
        if all(other.address for other in self.reverse):
            self._callbacks.started()

    def may_ask_for(self, more: int) -> bool:
        """Whether so many more links for reverse tunnels are allowed. Each needs a descriptor for itself and one for
        its remote: a server that opens them all must leave the other tunnels theirs. More connections wait there."""
        links = sum(len(tunnel.waiting) + len(tunnel.busy) for tunnel in self.reverse)
        return 2 * (links + more) <= descriptor_limit() // 2

    # ---- links

    def on_completed(self, link: Link) -> None:
        self._reached_at = self.loop.awake - (self.loop.now - link.born)
        if not self.started:
            self.options.report("✅ Challenge accepted!")
            self.options.report("✅ Test connection successful!")
            self.reach.let_in(link.name, "Connected")
            if not self.is_legacy:
                link.pause()  # the pool reads an idle link before it gives it away, and this one is being read
                self.pool.adopt(link)
            self._begin()
            if self.is_legacy:  # the link has done what it was for
                link.close()
        return self.pool.on_completed(link)

    def on_link_closed(self, link: Link, error: Exception | None) -> None:
        super().on_link_closed(link, error)
        self.counters.handshakes_failed += not link.is_completed and not self.is_legacy
        if link.tunnel:
            link.tunnel.on_link_closed(link, error)
        elif isinstance(error, PeerError) and not link.is_completed:
            self._on_refused(link, error)
        elif self.started:
            self.pool.on_link_lost(link, error)
        else:
            self._first.fail(error or LinkClosed(NOT_LET_IN))

    def _on_refused(self, link: Link, error: PeerError) -> None:
        """The server does not let this client in (any more), or refuses a stream's remote (on the original's wire)."""
        self.pool.on_link_closed(link)
        if is_final(error):
            self.pool.reset_detached(error, link.name)
        elif link.is_legacy and self.started:
            return self.pool.on_completed(link)
        failure = self.reach.pass_by(link.name, error)
        if failure:
            return self.pool.on_failed(failure) if self.started else self._first.fail(failure)
        return self.pool.want_links() if self.started and not self.reach.error else self.try_again()

    def on_idle(self, link: Link, record: bytes) -> None:
        if link.tunnel:
            link.tunnel.put(link, record)
        else:
            self.pool.put(link)

    def on_open(self, link: Link, open_: Open) -> None:
        link.tunnel.on_open(link, open_)

    def on_abandon(self, link: Link, stream_id: bytes) -> None:
        link.tunnel.acceptor.abandon(link, stream_id)

    # ---- what the tunnels carry

    def _on_accept(self, remote: str, sock: socket.socket, address: Any) -> None:
        stream = OpenerStream(self.pool, address, remote)
        stream.join(sock)
        self.pool.take(stream)

    def find_session(self, port: UdpPort, key: Any, target: str, origin: Any) -> UdpSession | None:
        """The session of a datagram, for which the port has none or one that rests; None where it is to be dropped."""
        session, link = port.sessions.get(key), self._udp.link
        if link and len(link.out) > self.limits.udp_backlog:  # nothing more is asked of a server that does not read
            return None
        if session is None:
            udp = UdpLink(self) if self.is_legacy else self._udp
            session = udp.new_session(port, key, new_label(show_address(origin), "udp " + target), target)
        elif self.loop.now < session.rests_until:
            session.udp.touch(session)
            return None
        else:
            session.udp.renew(session)
        return None if session.is_over else session

    def on_session_failed(self, session: UdpSession, error: Exception) -> None:
        """A target that cannot be had: said once, not for every datagram. An originator that goes on asking, as
        WireGuard does, is heard again after a moment; after a refusal by policy it has to be quiet first."""
        line = "❌ %s: %s" % (session.label, reason(error))
        if session.has_failed:
            log.debug("%s", line)
        else:
            self.loop.complain("❌ %%d more UDP sessions to `%s` failed" % session.target, line)
        session.has_failed = True
        session.rests_until = self.loop.now + (
            1 if not isinstance(error, PeerError) else self.REST if error.code != INVALID_HOST else NEVER)

    def on_udp_lost(self, udp: UdpLink, link: Link | None, error: Exception) -> None:
        """The sessions go on over another link: at once, or a moment later after three that were lost in a second."""
        if self.is_legacy:  # the end of the link is the end of its session, unless the server refused the target
            if isinstance(error, LinkClosed):
                return udp.close()
            return self.on_session_failed(next(iter(udp.sessions.values())), error) if udp.sessions else None
        if link and isinstance(error, LinkClosed):
            self.pool.distrust(link)
        udp.failures = 0 if self.loop.now - udp.opened_at > 1 else udp.failures + 1
        if self.draining or not udp.sessions:
            return None
        if udp.failures < 3:
            return udp.ask_for_link()
        udp.rests_until = self.loop.now + 1
        if not self.reach.error:
            self.loop.complain("❌ %d more failures of UDP links",
                               "❌ UDP through `%s`: %s" % (self.server_names, reason(error)))
        return None

    def sweep(self) -> None:
        self.sessions.sweep()
        self.pool.sweep()
        for tunnel in self.reverse:
            tunnel.sweep()
        for ssh in self.ssh.values():
            ssh.reap()
        # A link of UDP sessions that is too old, or carries nothing. The sessions go on over another one.
        udp = self._udp
        link = udp.link
        if link and link.is_completed and (not udp.sessions or self.loop.now - link.born > self.limits.link_age):
            udp.drop_link()
            if udp.next_number >> 31:  # numbers are u32, and new on each link
                udp.close()
            elif udp.sessions:
                udp.ask_for_link()
        self.doubt_paths()
        self.pool.seek(self.leave_dead_paths(self._reached_at))

    # ---- what it tells, and is told

    @property
    def connected(self) -> bool:
        """Whether the server is there, as far as is known: a client that has reverse tunnels alone knows it by them."""
        is_lost = bool(self.reverse) and all(tunnel.retry.error for tunnel in self.reverse) and not self.pool.links
        return self.started and self.reach.error is None and not is_lost

    def notice(self) -> None:
        """The server may have gone away or come back."""
        if self.connected != self._was_connected:
            self.since, self._was_connected = self.loop.now, self.connected
            self.counters.reconnects += self.connected

    @property
    def handshakes(self) -> int:
        return len(self.reach.dials)

    def state(self) -> str:
        how = "connected" if self.connected else "away" if self.started else "connecting"
        return "%s for %s" % (how, show_time(self.loop.now - self.since))

    def round_trip(self) -> float:
        """Seconds to the server and back, as the system measures them on the link that was heard from last, or 0."""
        link = max(self.links, key=lambda link: link.heard_at, default=None)
        return link.transport.tcp_info().rtt / 1e6 if link else 0.0

    @property
    def server(self) -> Place:
        """The one that answered last."""
        return self.servers[self.reach.current]

    def describe(self) -> Iterator[str]:
        error, round_trip = self.reach.error, self.round_trip()
        yield "Client of `%s`, %s%s%s; %d waiting for a link" % (
            self.server if self.started else self.server_names, self.state(), " (%s)" % reason(error) if error else "",
            ", round trip " + show_time(round_trip) if round_trip else "", self.pool.needed)
        for spec in self.tunnels:
            to = " -> `%s`" % str(spec.remote) if spec.kind != SOCKS else ""
            yield "tunnel (%s) `%s`%s" % (spec.kind, spec.local, to)
        for tunnel in self.reverse:
            yield "reverse tunnel on `%s`: %d links wait, %d are busy" % (
                tunnel.asked, len(tunnel.waiting), len(tunnel.busy))

    def on_reloaded(self, is_new_key: bool) -> None:
        if is_new_key:  # a new link comes as who this is now
            self.pool.clear()
        if not self.draining:
            self.reach.try_now()
            for tunnel in self.reverse:
                tunnel.retry.try_now()

    # ---- the end

    def end_waiting(self) -> None:
        for udp in {self._udp, *(session.udp for session in self.counters.sessions)}:
            udp.close()
        for association in list(self.associations):
            association.close()
        for negotiation in list(self._socks.negotiations):
            negotiation.abort(LocalFailed(ENDING))
        self.pool.clear()
        self.pool.waiting = collections.deque(waiter for waiter in self.pool.waiting if isinstance(waiter, Stream))
        for link in list(self.links):
            if link.state == IDLE or isinstance(link.user, ReverseTunnel):  # waits for a connection, or asks to
                link.user = NOBODY
                link.close()

    def is_busy(self) -> bool:
        return super().is_busy() or bool(self.pool.waiting)

    def close(self) -> None:
        self.draining = True
        self.reach.close()
        self.pool.close(LocalFailed(ENDING))
        for tunnel in self.reverse:
            tunnel.acceptor.reset_detached(LocalFailed(ENDING))
        self.end_waiting()
        super().close()
        for ssh in self.ssh.values():
            ssh.close()

# ======================================================================================================================
# 14. Reports: one snapshot of an endpoint, and the status table, metrics and status line made of it; systemd's status
# ======================================================================================================================

LISTED = 50  # things of each kind that a status table names
MAX_REQUESTS = 16  # for the metrics at once; the oldest makes room
REQUEST_TIMEOUT = 10.0  # seconds until a request for the metrics is complete


class Snapshot:
    """What an endpoint carries at one moment: Counters.tally() by peer key and in all. All else is read from the
    endpoint before the loop goes on: showing all takes 50 ms for 10,000 streams."""

    def __init__(self, endpoint: Any):
        self.endpoint, self.now = endpoint, endpoint.loop.now
        self.keys: dict[bytes, collections.Counter[str]] = endpoint.counters.tally(endpoint.links)
        self.total: collections.Counter[str] = sum(self.keys.values(), collections.Counter())


def show_tally(tally: collections.Counter[str]) -> str:
    return "%s (%d idle, %d busy, %d closing), %s, %s, %d bytes sent to links, %d received" % (
        plural(tally["links"], "link"), tally["idle"], tally["busy"], tally["closing"],
        plural(tally["streams"], "stream"), plural(tally["sessions"], "UDP session"), tally["sent"], tally["received"])


# ---- the status table, in the log after SIGUSR1


def show_table(endpoint: Endpoint) -> Iterator[str]:
    """The lines of a status table: few, also where an endpoint carries 10,000 streams."""
    shot, counters = Snapshot(endpoint), endpoint.counters
    title, *details = endpoint.describe()
    yield "%s; up %s; %s; handshakes: %d under way, %d failed" % (
        title, show_time(time.time() - counters.began_at), show_tally(shot.total), endpoint.handshakes,
        counters.handshakes_failed)
    given_up = ["%d (%s)" % (n, why) for why, n in counters.given_up.items() if n]
    if counters.detached or counters.resumed or given_up:
        yield "%s detached, %d resumed, given up: %s" % (
            plural(len(counters.detached), "stream"), counters.resumed, ", ".join(given_up) or "none")
    yield from first_of(details, str)
    keys = [key for key in shot.keys if key]
    yield from first_of(keys, lambda key: "key %s: %s" % (endpoint.show_key(key), show_tally(shot.keys[key])))
    for carried in (counters.streams, counters.sessions):
        oldest_first = sorted(carried, key=lambda one: one.started)
        yield from first_of(oldest_first, lambda one: "%s: %d bytes sent to the link, %d received, for %s" % (
            one.label, one.sent, one.received, show_time(shot.now - one.started)))


def first_of(things: Sequence[Any], show: Callable[[Any], str]) -> Iterator[str]:
    yield from map(show, things[:LISTED])
    if len(things) > LISTED:
        yield "... and %d more" % (len(things) - LISTED)


# ---- metrics for Prometheus


def show_metrics(endpoint: Endpoint) -> str:
    """Prometheus' text format 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    lines: list[str] = []
    for name, what, samples in _families(Snapshot(endpoint)):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += ["# HELP %s %s" % (name, what), "# TYPE %s %s" % (name, kind)]
        lines += ["%s%s %r" % (name, "{%s}" % labels if labels else "", value) for labels, value in samples.items()]
    return "\n".join(lines) + "\n"


def _label(name: str, counts: Mapping[str, int], values: Iterable[str]) -> dict[str, float]:
    # No label needs escaping: keys are base64url.
    return {'%s="%s"' % (name, value): counts[value] for value in values}


def _families(shot: Snapshot) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(name, help, {labels: value}) of each metric."""
    endpoint, counters, total = shot.endpoint, shot.endpoint.counters, shot.total
    yield "ratrod_info", "The version that runs.", {'version="%s"' % __version__: 1}
    yield ("ratrod_links", "Links: authenticated connections between client and server.",
           _label("state", total, ("idle", "busy", "closing")))
    yield "ratrod_links_total", "Links that were made.", {"": counters.links}
    yield "ratrod_streams", "TCP connections through the tunnels.", {"": total["streams"]}
    yield ("ratrod_streams_total", "TCP connections that ended, and how; refused: by the server's policy or limits.",
           _label("result", counters.results, counters.results))
    yield "ratrod_streams_detached", "TCP connections that wait for another link.", {"": len(counters.detached)}
    yield "ratrod_streams_resumed_total", "How often one went on over another link.", {"": counters.resumed}
    yield ("ratrod_streams_given_up_total", "TCP connections that did not go on over another link, by reason.",
           _label("reason", counters.given_up, counters.given_up))
    yield "ratrod_udp_sessions", "UDP sessions.", {"": total["sessions"]}
    yield ("ratrod_datagrams_dropped_total", "Datagrams that waited too long for a link, or had no room.",
           {"": counters.dropped})
    yield ("ratrod_bytes_total", "Payload, sent to links and received from them.",
           _label("direction", total, ("sent", "received")))
    yield "ratrod_handshakes_under_way", "Connections that are being authenticated.", {"": endpoint.handshakes}
    yield ("ratrod_handshakes_failed_total", "Connections that were refused, or could not be made.",
           {"": counters.handshakes_failed})
    if isinstance(endpoint, Client):
        yield "ratrod_connected", "Whether the server is there.", {"": int(endpoint.connected)}
        yield "ratrod_reconnects_total", "How often the server was found again.", {"": counters.reconnects}
    tallies = {'key="%s"' % encode_key(key): tally for key, tally in shot.keys.items() if key}
    for what, text in (("links", "Links of each key of the other side."), ("streams", "TCP connections of each key.")):
        yield "ratrod_key_" + what, text, {key: tally[what] for key, tally in tallies.items()}
    yield "ratrod_key_bytes_total", "Payload of each key.", {
        "%s,%s" % (key, direction): n for key, tally in tallies.items()
        for direction, n in _label("direction", tally, ("sent", "received")).items()}
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has these; wine has the files
        yield "process_open_fds", "Open descriptors.", {"": len(os.listdir("/proc/self/fd")) - 1}
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        yield "process_resident_memory_bytes", "Memory.", {"": pages * os.sysconf("SC_PAGE_SIZE")}
    yield "process_start_time_seconds", "When it began, in seconds since the epoch.", {"": counters.began_at}


def serve_metrics(endpoint: Endpoint, address: Address, sockets: list[socket.socket]) -> None:
    """Answers requests for the metrics that come to `sockets`, which listen at `address`, until the endpoint ends."""
    loop = endpoint.loop
    requests: dict[Negotiation, None] = {}  # those that are not answered yet, the oldest first

    def on_accept(sock: socket.socket, _address: Any) -> None:
        if len(requests) >= MAX_REQUESTS:
            next(iter(requests)).abort(Overloaded("others need its place"))
        request = HttpRequest(functools.partial(answer_request, endpoint))
        negotiation = Negotiation(loop, sock, None, request, REQUEST_TIMEOUT, on_answered)
        requests[negotiation] = None
        negotiation.start()

    def on_answered(negotiation: Negotiation, error: Exception | None) -> None:
        del requests[negotiation]
        if not error:
            LastWord(loop, negotiation.sock, b"")

    for sock in sockets:
        endpoint.listeners.append(Listener(loop, sock, on_accept, endpoint.limits.accept_pause))
        endpoint.listeners[-1].start()
    log.info("📈 Metrics on `http://%s/metrics`", address._replace(port=sock.getsockname()[1]))


def answer_request(endpoint: Endpoint, method: bytes, path: bytes) -> bytes:
    if not method:
        return http_answer("400 Bad Request", "this speaks HTTP/1.1, with headers of 8 KiB at most\n")
    if method != b"GET":
        return http_answer("405 Method Not Allowed\r\nAllow: GET", "only GET\n")
    if path == b"/metrics":
        return http_answer("200 OK", show_metrics(endpoint), "text/plain; version=0.0.4")
    return http_answer("404 Not Found", "see /metrics\n")


# ---- the status line of a client at a terminal


def show_line(shot: Snapshot, before: Snapshot) -> str:
    """The client's rates since `before`, what it carries, and how its server is; "" before the client has started."""
    client, total, elapsed = shot.endpoint, shot.total, max(shot.now - before.now, 0.001)
    if not client.started:  # a question may be asked
        return ""
    parts = ["%s/s %s" % (show_size((total[name] - before.total[name]) / elapsed), way)
             for name, way in (("sent", "up"), ("received", "down"))]
    parts += [plural(total["streams"], "stream"), plural(total["sessions"], "UDP session")]
    if not client.connected:
        parts.insert(0, "server " + client.state())
    elif client.round_trip():
        parts.append("round trip " + show_time(client.round_trip()))
    return "ratrod: " + ", ".join(parts)


# ---- systemd


def notify_systemd(*lines: str) -> None:
    """Sends state changes to systemd, if it started this process and waits for them (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@") or not hasattr(socket, "AF_UNIX"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0 if lines[0].startswith("STATUS=") else 1)  # the next status comes soon
            sock.sendto("\n".join(lines).encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        log.debug("systemd was not told %s: %s", lines[0], reason(error))

# ======================================================================================================================
# 15. As a library: an endpoint on a thread of its own
# ======================================================================================================================


class Background:
    """What tunnel() and serve() return. It runs until close(), the end of its with-block, or that of the interpreter.

    It sets no signal handlers, and logs to the logger "ratrod" alone. `error` is what ended it meanwhile, or None.
    """

    def __init__(self, make: Callable[[EventLoop, Callbacks], Endpoint], timeout: float):
        self.error: RatrodError | None = None
        self._ready, self._loop = threading.Event(), EventLoop()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="ratrod")
        try:
            self._thread.start()
        except RuntimeError as failure:
            self._loop.close()
            raise RatrodError("this system lets it start no thread for now (%s)" % failure) from None
        atexit.register(self.close)
        try:
            if not self._ready.wait(timeout) or self.error:
                raise self.error or ConnectError("not ready within %g s" % timeout)
        except BaseException:
            self.close()
            raise

    def _run(self, make: Callable[[EventLoop, Callbacks], Endpoint]) -> None:
        with contextlib.closing(self._loop):
            try:
                with self._loop.lock:
                    self._endpoint = make(self._loop, Callbacks(self._ready.set, self._on_finished))
                with contextlib.closing(self._endpoint):
                    self._endpoint.start()
                    self._loop.run()
            except Exception as error:
                self._on_finished(error)

    def _on_finished(self, error: Exception | None) -> None:
        if isinstance(error, PeerError) and error.code == INVALID_KEY:
            error = AuthenticationError(str(error))
        if error and not self.error:
            self.error = error if isinstance(error, RatrodError) else RatrodError(reason(error))
            self._loop.stop()
        self._ready.set()

    def close(self) -> None:
        """Ends it with everything that it carries. Any thread may call this, more than once."""
        atexit.unregister(self.close)
        if self._thread.is_alive():  # not in a forked process
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread is not threading.current_thread():  # that is a handler of the log
                self._thread.join(2)  # an authorize() that hangs must not hang the caller too

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
        """(host, port) where each tunnel listens, in order: R: at the server. That of a Unix socket is (path, 0)."""
        return [(spec.local.host, spec.local.port) for spec in self._endpoint.tunnels]

    @property
    def address(self) -> tuple[str, int]:
        """The first of `addresses`, as socket.create_connection() takes it."""
        return self.addresses[0]


class Service(Background):
    """A server that takes clients."""

    _endpoint: Server

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) where it listens."""
        return self._endpoint.address.host, self._endpoint.address.port


# ---- what the command line and a call of tunnel() have to satisfy alike


def check(*rules: tuple[Any, str]) -> None:
    """ConfigError for the first rule that is broken: (whether it is, what to say)."""
    for is_broken, why in rules:
        if is_broken:
            raise ConfigError(why)


def check_tunnels(texts: Iterable[str], *, legacy: bool, workers: int = 1, socks_user: str | None = None,
                  send_proxy: bool = False) -> list[TunnelSpec]:
    """The tunnels that `texts` describe; ConfigError says what is wrong with them, or does not go together."""
    tunnels = [spec for text in texts for spec in parse_tunnels(text)]
    kinds = [spec.kind for spec in tunnels]
    at_server = [spec.local._replace(host=spec.local.host or "localhost") for spec in tunnels
                 if spec.kind == REVERSE and spec.local.port]
    check(
        (len(set(at_server)) < len(at_server),
         "two R: tunnels would listen on one address of the server, whose visitors would come to either remote"),
        (socks_user is not None and not re.fullmatch(
            b"(?s)[^:]{1,255}:.{1,255}", socks_user.encode("utf-8", "surrogateescape")),
         "--socks-user takes name:password, with 255 bytes of each at most"),
        (socks_user is not None and SOCKS not in kinds, "--socks-user is for socks tunnels, as 1080:socks"),
        (send_proxy and REVERSE not in kinds,
         "--send-proxy is for reverse tunnels (R:), whose targets it tells the visitors' addresses"),
        (legacy and REVERSE in kinds, "the original's protocol (--legacy) has no reverse tunnels (R:)"),
        (kinds.count(STDIO) > 1, "standard input and output can be one tunnel's only (stdio:)"),
        (STDIO in kinds and not hasattr(os, "readv"), "stdio: needs a POSIX system"),
        (STDIO in kinds and not (sys.stdin and sys.stdout),
         "stdio: needs standard input and output, and whatever started this has closed one of them"),
        (workers > 1 and {STDIO, REVERSE} & set(kinds),
         "--workers does not go together with stdio: and R: tunnels, which are one process's"))
    return tunnels


def check_ssh(asked: Any, servers: Sequence[Place], tunnels: Sequence[TunnelSpec]) -> tuple[list[str], str] | None:
    """ClientOptions.ssh, None for other servers; ConfigError says what does not go together."""
    command, python = asked.ssh_command, asked.remote_python
    if not isinstance(servers[0], SshHost):
        check((command is not None, "--ssh-command is for servers that are written ssh://host"),
              (python is not None, "--remote-python is for servers that are written ssh://host"))
        return None
    import shlex

    others = {"-k": asked.key_path, "-a": asked.accept_all_hosts, "--accept-new": asked.accept_new,
              "--legacy": asked.legacy, "--proxy": asked.proxy, "--workers": asked.workers > 1}
    wrong = ", ".join(name for name, value in others.items() if value)
    check((wrong, wrong + " does not go together with ssh://, where ssh brings the keys and the way: see"
           " ~/.ssh/config"),
          (any(spec.kind == REVERSE for spec in tunnels), "ssh:// has no reverse tunnels (R:); `ssh -R` makes them"),
          (python is not None and not (python.strip() and python.isprintable()),
           "--remote-python takes the path of a Python there, as /opt/python3.12/bin/python3"))
    try:
        words = shlex.split("ssh" if command is None else command)
        if not words:
            raise ValueError("there is no command in it")
        return words, python or "python3"
    except ValueError as error:
        raise ConfigError("cannot understand the --ssh-command `%s`: %s" % (printable(str(command)), error)) from None


def plan_client(asked: Any) -> tuple[KeyFolder, ClientOptions]:
    """What a client is to do, from the fields of the command line's Options; ConfigError says what is wrong."""
    servers = parse_servers(asked.server)
    proxy = parse_proxy(asked.proxy, servers)
    tunnels = check_tunnels(asked.tunnels, legacy=asked.legacy, workers=asked.workers, socks_user=asked.socks_user,
                            send_proxy=asked.send_proxy)
    ssh = check_ssh(asked, servers, tunnels)
    return NoKeys() if ssh else KeyFolder(asked.key_path, parse_grant), ClientOptions(
        servers, tunnels, legacy=asked.legacy, encrypt=asked.encrypt, accept_all_hosts=asked.accept_all_hosts,
        accept_new=asked.accept_new, socks_user=asked.socks_user, send_proxy=asked.send_proxy, proxy=proxy, ssh=ssh,
        retries=asked.retries)


SLOW = 0.02  # seconds of processor time for one name: an everyday pattern takes 0.0002 at most
PROBED = 1.0  # such seconds that the tries may take, however long the pattern is
PROBE_LENGTH = 253  # of the longest name


def make_policy(regexes: str | Sequence[str]) -> Policy:
    """The Policy of -r. ConfigError for a pattern that takes ages for some name: a client could stop the server."""
    policy = Policy(regexes)
    for regex in policy.regexes:
        name = find_slow_name(regex)
        check((name, "cannot use the remote regex `%s`: it takes %g s and more for a name as `%s`, and a client could"
               " stop the server with a longer one. Where a part of it repeats, let one way of matching alone fit:"
               " [a-z0-9-]+ in place of ([a-z0-9]+-?)+" % (regex, SLOW, printable(name, 60))))
    return policy


def find_slow_name(regex: str) -> str:
    """A text that takes the pattern, or one of its parts, longer than SLOW; "" where there seems to be none.

    The texts grow letter by letter, for the time may double with each: none is tried that takes much longer than SLOW.
    """
    until = time.process_time() + PROBED
    words = list(dict.fromkeys(re.findall("[a-z0-9]{2,}", regex.lower())))
    letters = sorted(set(re.findall("[a-z0-9_]", regex.lower())) | set("a0"))
    for part in _parts_of(regex):
        for unit in [*letters, ".", "-", ":", "/", "a.", "a-", "0.", "/a", *words[:20]]:
            for n in range(1, PROBE_LENGTH):
                text = (unit * n)[:n] + "\n"  # no pattern has a use for the last character
                if _is_slow(part, text):
                    return text[:-1]
            if time.process_time() > until:
                return ""
    return ""


def _is_slow(part: re.Pattern[str], text: str) -> bool:
    """By the clock, and then twice by processor time: a busy machine is no slow pattern."""
    processor_time = getattr(time, "thread_time", time.process_time)
    for clock in (time.perf_counter, processor_time, processor_time):
        started = clock()
        part.fullmatch(text)
        if clock() - started <= SLOW:
            return False
    return True


def _parts_of(regex: str) -> Iterator[re.Pattern[str]]:
    """The pattern, and its parts that begin with a group or a repeated piece: a name can fit all that stands before."""
    yield re.compile(regex, re.IGNORECASE)
    tokens = re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", regex, re.DOTALL)
    starts = (token.start() for token in tokens if token.group() == "(" or regex[token.end():][:1] in ("*", "+", "{"))
    ends = [end.end() for end in re.finditer(r"\)(?:[*+?]|\{[0-9,]+\})?", regex)]
    for start in itertools.islice(starts, 20):
        for end in [len(regex), *(end for end in ends if end > start)]:  # to the end, or to that of a group
            with contextlib.suppress(re.error, RuntimeError, OverflowError):
                yield re.compile(regex[start:end], re.IGNORECASE)
                break


def require_keys(folder: KeyFolder) -> None:
    check((not folder.exists(), "no security files in `%s`: run `ratrod -k %s keygen` first"
           % (folder.path, quoted(folder.path))))


# ---- the functions that programs call


def tunnel(server: str, *tunnels: str, key_path: str | None = None, accept_new: bool = False,
           accept_all_hosts: bool = False, legacy: bool = False, encrypt: bool = False, socks_user: str | None = None,
           send_proxy: bool = False, proxy: str | None = None, ssh_command: str | None = None,
           remote_python: str | None = None, retries: int | None = None, limits: Limits = DEFAULT_LIMITS,
           timeout: float = 30.0) -> Tunnel:
    """Connects to a server (`host:port`, or several as `a:1,b:2`) and opens tunnels, each as on the command line:
    `with tunnel("server:19000", "0:db:5432") as t`. `retries` is --max-retry-count; `send_proxy`, `proxy`,
    `ssh_command` and `remote_python` are the options of these names. ssh must not need a password.

    Returns when all tunnels take connections. The keys are those of `key_path` (default: ~/.ratrod); nothing is asked
    and nothing generated. ConfigError: a key file or an argument is wrong. ConnectError: the server is not there, or
    not ready within `timeout` seconds. AuthenticationError: one of the two does not know the other. PolicyError: the
    server refuses a reverse tunnel. RatrodError: anything else, as a port that is in use.
    """
    folder, options = plan_client(types.SimpleNamespace(workers=1, **locals()))
    check((any(spec.kind == STDIO for spec in options.tunnels),
           "stdio: is for the command line; connect to a tunnel's address instead"))
    require_keys(folder)
    return Tunnel(lambda loop, callbacks: Client(loop, folder, limits, options, callbacks), timeout)


def serve(bind: str = "127.0.0.1:0", *, key_path: str | None = None, remote_regex: str | Sequence[str] = ".*",
          authorize: Authorizer | None = None, allow_listen: bool = False, legacy: bool = False,
          limits: Limits = DEFAULT_LIMITS) -> Service:
    """Takes clients on `bind`: `with serve("0.0.0.0:19000") as s`.

    `authorize(key, target)` decides in place of authorized_keys: with target "", whether a client with this public key
    may come in; then, for each target, whether the client may have it: `db:5432`, `udp db:53`, `listen localhost:9000`,
    and a loopback, link-local or metadata address that a name has. It is called on threads of the server, must not
    block for long, and refuses if it raises.
    ConfigError: a key file or an argument is wrong. RatrodError: the address is in use.
    """
    options = ServerOptions(parse_endpoint(bind, "address to bind", lowest=0), make_policy(remote_regex), legacy=legacy,
                            allow_listen=allow_listen, authorize=authorize)
    folder = KeyFolder(key_path, parse_grant)
    require_keys(folder)
    return Service(lambda loop, callbacks: Server(loop, folder, limits, options, callbacks), timeout=30.0)

# ======================================================================================================================
# 16. Command line
# ======================================================================================================================


class Options(types.SimpleNamespace):
    """A command line that was understood: a field for each option and argument of the usage text. One that was not
    given has its value in Limits or DEFAULTS, or None, or False if it is a switch. All limits stand in `limits` too."""


DEFAULTS: dict[str, Any] = {
    "topic": None, "bind": "", "server": "", "tunnels": (), "remote_regex": (".*",), "proxy_protocol": "", "workers": 1,
    "log_format": "text", "limits": DEFAULT_LIMITS, "environment": {}}  # {option: value} of those that come from there
# Any other option has the name of its field, with or without "max-" in front.
FIELDS = {"TUNNEL": "tunnels", "COMMAND": "topic", "--max-retry-count": "retries",
          "--max-udp-sessions": "udp_sessions_in_all", "--max-udp-sessions-per-link": "udp_sessions"}
MAY_BE_ZERO = ("--drain", "--max-retry-count", "--resume")
FOR_SSH = {"--ssh-command", "--remote-python"}
NOT_FOR_SSH = {"--key-path", "--accept-all-hosts", "--accept-new"}
MAX_ARGUMENTS = 1 << 20  # characters of a file of arguments

USAGE, COMMAND_LIST = (__doc__.split(title + ":\n")[1].split("\n\n")[0] + "\n" for title in ("Usage", "Commands"))
COMMANDS = dict(re.findall(r"^  (\w+)  +(\S.*)$", COMMAND_LIST, re.M))


class UsageReader:
    """Reads a command line by the usage text alone: if docopt is missing, and to say what is wrong with a line."""

    def __init__(self) -> None:
        options = re.findall(r"^  (?:-(\w), )?--([\w-]+)(?: ([A-Z_]+))?  ", __doc__, re.M)
        self.value_of = {"--" + long: value for _, long, value in options}  # what its value is called; "" if none
        self._long_of = {"-" + short: "--" + long for short, long, _ in options if short}
        self._short = "".join(short + ":" * bool(value) for short, _, value in options if short)
        self._long = [long + "=" * bool(value) for _, long, value in options]
        # Of each command: its part of the text, its long options, its arguments ("[" if optional, name, "..." if many).
        self.text_of = {command: text for text, command in re.findall(
            r"^(  ratrod (?:\[[^\]]*\] )*([a-z]+).*\n(?:   .*\n)*)", USAGE, re.M)}
        self.options_of = {
            command: {self._long_of.get(name, name) for name in re.findall(r"\[(-[-\w]+)[ \]]", text)} - {"--"}
            for command, text in self.text_of.items()}
        self.arguments_of = {command: re.findall(r"(\[)?(?<![-\w] )(?<![\w-])([A-Z]+)\]?(\.\.\.)?", text)
                             for command, text in self.text_of.items()}

    def read(self, argv: list[str]) -> dict[str, Any]:
        """What docopt would give: {"serve": True, "--key-path": [...], "BIND": ...}. UsageError says what is wrong."""
        import getopt

        end = argv.index("--") if "--" in argv else len(argv)
        given: dict[str, Any] = {}
        words: list[str] = []
        rest = argv[:end]
        try:
            while rest:  # not gnu_getopt(), which POSIXLY_CORRECT in the environment changes
                pairs, rest = getopt.getopt(rest, self._short, self._long)
                for name, value in pairs:
                    given.setdefault(self._long_of.get(name, name), []).append(value)
                words, rest = words + rest[:1], rest[1:]
        except getopt.GetoptError as error:
            raise UsageError(printable(str(error))) from None
        words += argv[end + 1:]
        if not words:
            raise UsageError("no command")
        command, *arguments = words
        if command == "connect" and arguments[1:2] == ["--"]:  # its second one
            del arguments[1]
        if command not in COMMANDS:
            raise UsageError("there is no command `%s`" % printable(command))
        for option in given:
            if option not in self.options_of[command]:
                raise UsageError("`%s` does not belong to `%s`" % (option, command))
        given[command] = True
        for optional, name, repeated in self.arguments_of[command]:
            if not arguments and not optional:
                raise UsageError("`%s` needs %s" % (command, name))
            given[name] = arguments if repeated else arguments[0] if arguments else None
            arguments = [] if repeated else arguments[1:]
        if arguments:
            raise UsageError("`%s` takes no further argument: `%s`" % (command, printable(arguments[0])))
        return given


# ---- words from files of arguments


def expand_arguments(words: Iterable[str], depth: int = 0) -> Iterator[str]:
    """Each `@file` replaced by the words of that file, and `@@x` by `@x`. `depth`: how many files are around these
    words. UsageError names the file, and the line if it can."""
    for word in words:
        if not word.startswith("@") or word.startswith("@@"):
            yield word[word.startswith("@"):]
        elif depth < 10:
            yield from expand_arguments(_read_arguments(os.path.expanduser(word[1:])), depth + 1)
        else:
            raise UsageError("`%s` is the eleventh file of arguments inside each other: does one of them name itself?"
                             % printable(word[1:]))


def _read_arguments(path: str) -> list[str]:
    import shlex

    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            text, nul, _ = file.read(MAX_ARGUMENTS + 1).partition("\0")
    except OSError as error:
        raise UsageError("cannot read the arguments in `%s`: %s" % (printable(path), reason(error))) from None
    line, wrong = 1 + text.count("\n"), "a NUL character"
    if len(text) > MAX_ARGUMENTS:
        line, wrong = 1, "more than a file of arguments may be"
    elif not nul:
        lexer = shlex.shlex(re.sub(r"(?<=\S)#", "\0", text), posix=True)  # inside a word # begins no comment
        lexer.escape = "\\" * (os.sep == "/")  # of a path of Windows it is a part
        lexer.whitespace_split = True  # as shlex.split() has it, which would not say where it failed
        try:
            return [word.replace("\0", "#") for word in lexer]
        except ValueError as error:  # at the end of the file: what it took for a word began where the fault is
            line, wrong = lexer.lineno - lexer.token.count("\n"), str(error).lower()
    raise UsageError("line %d of the arguments in `%s`: %s" % (line, printable(path), wrong))


# ---- from words to Options


def parse_command_line(argv: list[str], environ: Mapping[str, str] = types.MappingProxyType({})) -> Options:
    """The Options in `argv`, which is without the program's name; what it leaves open may be in `environ`, as
    RATROD_MAX_LINKS. An empty variable says nothing. UsageError says in one line what is wrong."""
    reader = UsageReader()
    fields: dict[str, Any] = {_field_of(name): None if kind else False for name, kind in reader.value_of.items()}
    fields.update(DEFAULT_LIMITS._asdict(), **DEFAULTS)
    flags = argv[:argv.index("--")] if "--" in argv else argv
    for command, forms in (("help", "-[aev]*h[aevhV]*|--he(lp?)?"), ("version", "-[aev]*V[aevhV]*|--vers(i(on?)?)?")):
        if any(re.fullmatch(forms, word) for word in flags):
            topic = next((word for word in flags if word in COMMANDS), None)
            return Options(**{**fields, "command": command, "topic": topic})
    given = {name: value for name, value in _docopt(reader, argv).items()
             if name != "--" and value not in (None, [], False, 0)}
    command = next(command for command in COMMANDS if given.pop(command, False))
    # On a command line these are a mistake where they mean nothing; in the environment they are not.
    useless = NOT_FOR_SSH if given.get("SERVER", "").strip().startswith("ssh://") else FOR_SSH
    variables = {name: environ[variable_of(name)] for name in sorted(reader.options_of[command] - useless - set(given))
                 if environ.get(variable_of(name))}
    for name, value in given.items():
        fields[_field_of(name)] = _convert(name, value, reader.value_of.get(name, name))
    for name, word in variables.items():
        try:
            fields[_field_of(name)] = _convert(name, word, reader.value_of[name])
        except UsageError as error:
            raise UsageError("%s in the environment: %s" % (variable_of(name), error)) from None
    limits = Limits(**{field: fields[field] for field in Limits._fields})
    fields.update(command=command, limits=limits, environment={
        name: word if reader.value_of[name] and not word.isdigit() else "" for name, word in variables.items()})
    return Options(**fields)


def _field_of(name: str) -> str:
    """The field of Options for an option or argument of the usage text."""
    return FIELDS.get(name) or re.sub("^(--)?(max-)?", "", name).replace("-", "_").lower()


def _docopt(reader: UsageReader, argv: list[str]) -> dict[str, Any]:
    try:
        from docopt import DocoptExit, docopt
    except ImportError:
        return reader.read(argv)
    # Every option may be repeated. People need not see that at each option.
    text = __doc__.replace(USAGE, re.sub(r"(\[-(?!-\])[^\]]*\])", r"\1...", USAGE))
    try:
        # By position: docopt-ng and docopt 0.6.2 name these differently. False: ratrod itself prints help and version.
        return docopt(text, argv, False, None, False)
    except DocoptExit:
        reader.read(argv)  # says better what is wrong
        raise UsageError("these words do not go together") from None


def _convert(name: str, value: Any, kind: str) -> Any:
    """The value of an option or argument, from its words or that of its variable. `kind`: what the usage text calls it,
    as SECS."""
    if name in ("--remote-regex", "TUNNEL"):  # of any other one the last word counts
        return (value,) if isinstance(value, str) else tuple(value)
    if not kind:
        meanings = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if isinstance(value, str) and value.lower() not in meanings:
            raise UsageError("it is 1 or 0, true or false, yes or no, not `%s`" % printable(value))
        return not isinstance(value, str) or meanings[value.lower()]
    word = value[-1] if isinstance(value, list) else value
    if kind == "FORMAT" and word not in ("text", "json"):
        raise UsageError("`%s` takes text or json, not `%s`" % (name, printable(word)))
    if kind not in ("SECS", "N", "BYTES"):
        return word
    convert, what, form = (float, "seconds, a number", r"[0-9]{1,6}(?:\.[0-9]+)?") if kind == "SECS" else (
        int, "a whole number", "[0-9]{1,9}")
    lowest = "from 0 on" if name in MAY_BE_ZERO else "above 0"
    if not re.fullmatch(form, word, re.ASCII) or float(word) <= 0 and name not in MAY_BE_ZERO:
        raise UsageError("`%s` takes %s %s, not `%s`" % (name, what, lowest, printable(word)))
    return convert(word)


def variable_of(option: str) -> str:
    return "RATROD_" + option[2:].upper().replace("-", "_")


# ---- help


def usage_hint(argv: Sequence[str]) -> str:
    """What follows an error in `argv`: no more than a terminal shows together with the error."""
    command = next((word for word in argv if word in COMMANDS and word != "help"), None)
    if command:
        return "Usage:\n%s\n`ratrod help %s` says more." % (UsageReader().text_of[command], command)
    return "Usage: ratrod COMMAND ...\n\nCommands:\n%s\n`ratrod help` says more." % COMMAND_LIST


def help_text(topic: str | None = None) -> str:
    """The whole help, or that of one command: its usage, arguments and options."""
    if topic is None:
        return __doc__
    if topic not in COMMANDS:
        raise UsageError("there is no command `%s` to explain" % printable(topic))
    reader = UsageReader()
    text = "%s.\n\nUsage:\n%s" % (COMMANDS[topic][0].upper() + COMMANDS[topic][1:], reader.text_of[topic])
    named = {name for _, name, _ in reader.arguments_of[topic]}
    for title, wanted in (("Arguments", named), ("Options", reader.options_of[topic] | {"--help"})):
        block = __doc__.split(title + ":\n")[1].split("\n\n")[0]
        entries = [entry for entry in re.findall(r"^  \S.*(?:\n    .*)*", block, re.M)
                   if wanted & set(re.findall(r"--[\w-]+|[A-Z]+\b", re.split("   *", entry[2:])[0]))]
        if entries:
            text += "\n%s:\n%s\n" % (title, "\n".join(entries))
    return text


# ---- logging


class LogFormatter(logging.Formatter):
    """`2025-03-12T22:56:13.939034Z  INFO text`, as the original; or {"time": ..., "level": ..., "message": ...}."""

    _COLOURS = {"ERROR": 31, "WARN": 33, "INFO": 32, "DEBUG": 34}

    def __init__(self, as_json: bool = False, colour: bool = False):
        super().__init__()
        self._as_json, self._colour = as_json, colour

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + ".%06dZ" % (record.created % 1 * 1e6)
        level, message = record.levelname.replace("WARNING", "WARN"), record.getMessage()
        if self._as_json:
            import json

            return json.dumps({"time": moment, "level": level, "message": message}, ensure_ascii=False)
        form = "\x1b[2m%%s\x1b[0m \x1b[%dm%%5s\x1b[0m %%s" % self._COLOURS[level] if self._colour else "%s %5s %s"
        return form % (moment, level, message)


class LogWriter(logging.Handler):
    """Writes the log on a thread of its own, and at a terminal a status line below the log. Where nobody reads a pipe,
    or Ctrl-S holds a terminal, that thread alone waits. Lines that cannot be written are counted, and the log says so
    as soon as it can.

    The cursor stays at the beginning of the status line: what follows on the screen is that line and nothing else, also
    where a terminal that became narrower has broken the line in two.
    """

    WAITING = 4096  # lines that may wait to be written
    PATIENCE = 1.0  # seconds that the end waits for the last lines: --drain and the end together take less than 10 s

    def __init__(self, stream: Any):
        super().__init__()
        self._stream, buffer = stream, getattr(stream, "buffer", None)
        self._raw = getattr(buffer, "raw", buffer)  # a buffer has a lock, which would be held while a write waits
        self._lost = self._told = 0  # lines that were not written, and how many of them the log has told of
        self._shown = ""
        self._restart()

    def _restart(self) -> None:
        """What is said from now on has another thread."""
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._status = ""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._calls.qsize() < self.WAITING:
            self._put(lambda: self._write(line, 1))
        else:
            self._lost += 1

    def show(self, status: str) -> None:
        """Shows `status` in place of the status line so far; "" removes it."""
        self._status = status
        if self._calls.empty():  # otherwise the next line of the log brings it
            self._put(lambda: self._write("", 0))

    def flush(self) -> None:
        """Removes the status line, and waits until all is written and the thread has ended, PATIENCE at most."""
        if self._status:
            self.show("")
        self.acquire()
        thread, calls = self._thread, self._calls
        self._restart()
        self.release()
        if thread:
            calls.put(None)
            thread.join(self.PATIENCE)

    def _put(self, call: Callable[[], object]) -> None:
        def run(calls: queue.SimpleQueue[Callable[[], object] | None] = self._calls) -> None:
            for call in iter(calls.get, None):
                call()
        try:
            if not self._thread:
                thread = threading.Thread(target=run, daemon=True, name="ratrod log")
                thread.start()
                self._thread = thread
            self._calls.put(call)
        except RuntimeError:  # the system lets it start no thread for now
            call()

    def _write(self, line: str, count: int) -> None:
        """Writes a line that stands for `count` lines of the log, and the status line below it."""
        try:
            status = self._fit(self._status) if self._status or self._shown else ""
            if line or status != self._shown:
                erase, end = "\r\x1b[J" if self._shown else "", "\r" if status else ""
                self._write_all(erase + line + status + end)
                self._shown = status
        except (OSError, ValueError):  # the disk is full, the terminal is gone, or the stream is closed
            self._told -= count
            return
        lost = self._lost - self._told
        if lost and self._calls.empty():
            self._told += lost
            text = "%s of this log could not be written: nobody read it, or the disk was full" % plural(lost, "line")
            record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
            self._write(self.format(record) + "\n", lost)

    def _fit(self, status: str) -> str:
        """The status line as wide as the terminal is; "" in the background, where it would disturb another program."""
        with contextlib.suppress(OSError, ValueError):
            if os.tcgetpgrp(self._stream.fileno()) == os.getpgrp():
                return status[:(os.get_terminal_size(self._stream.fileno()).columns or 80) - 1]
        self._shown = ""
        return ""

    def _write_all(self, text: str) -> None:
        if self._raw is None:  # a stream of a program that calls main()
            self._stream.write(text)
            self._stream.flush()
            return
        # "replace": an ASCII locale must not lose a line for its emoji.
        data = text.encode(self._stream.encoding or "utf-8", "replace")
        while data:
            written = self._raw.write(data)
            if written is None:  # a program that shares the descriptor has made it non-blocking
                time.sleep(0.05)
            data = data[written or 0:]


def shows_colours() -> bool:
    """Whether standard error is a terminal with colours. A console of Windows has them where it is asked for them."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        return False
    if os.name != "nt":
        return True
    import ctypes

    kernel, mode = getattr(ctypes, "windll").kernel32, ctypes.c_uint()  # noqa: B009 - mypy knows it on Windows alone
    console = kernel.GetStdHandle(-12)  # ENABLE_VIRTUAL_TERMINAL_PROCESSING is 4
    return bool(kernel.GetConsoleMode(console, ctypes.byref(mode)) and kernel.SetConsoleMode(console, mode.value | 4))


def set_up_logging(level: int, as_json: bool = False) -> None:
    handler: logging.Handler = logging.NullHandler()
    if sys.stderr:  # None if it was closed before the start
        handler = LogWriter(sys.stderr)
        handler.setFormatter(LogFormatter(as_json, colour=shows_colours()))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)


def flush_log() -> None:
    for handler in log.handlers:
        handler.flush()


def draw_status(client: Client, before: Snapshot | None = None) -> None:
    """Draws the status line now and each second, where the log has a place for it."""
    shot = Snapshot(client)
    for writer in log.handlers:
        if isinstance(writer, LogWriter):
            writer.show(show_line(shot, before or shot))
    client.loop.call_later(1.0, lambda: draw_status(client, shot))


# ---- what belongs to the whole process, and to the program that called main()


@contextlib.contextmanager
def handling(handlers: Mapping[str, Any], wake_up: int = -1) -> Iterator[None]:
    """These handlers of signals, by name, and this descriptor for set_wakeup_fd(), in place of those that were there.
    Only the main thread can take signals, and a handler that was set in C, which Python cannot put back, stays."""
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
            taken = [number for number in numbers if signal.getsignal(number) is not None]
            for number in taken:
                stack.callback(signal.signal, number, signal.signal(number, numbers[number]))
            if wake_up >= 0:
                stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False))
            if hasattr(signal, "pthread_sigmask"):
                mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)
                stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        yield


@contextlib.contextmanager
def putting_back() -> Iterator[None]:
    """Puts back what main() changes of the process around it: logging, the limit of descriptors, garbage collection."""
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import resource

            descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, descriptors)
        if not gc.get_freeze_count():
            stack.callback(gc.unfreeze)
        stack.callback(gc.set_threshold, *gc.get_threshold())
        try:
            yield
        finally:
            for handler in set(log.handlers) - set(handlers):
                handler.flush()
                handler.close()
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)


# ---- questions to the user

QUESTION = ("Would you like to have the security files (public / private key pair, known hosts, and authorized keys)"
            " generated (y/n)? ")
ANSWER_TIMEOUT = 2.0  # seconds for an answer on a pipe: a service manager's may be open and silent for ever


def ensure_keys(folder: KeyFolder, may_ask: bool = True) -> None:
    """Asks on the first run, as the original does. ConfigError if the answer is no, or nobody can answer."""
    if may_ask and not folder.exists():
        sodium()  # nothing can be generated without it, so an error comes before the question
        log.info("No security files present in `%s` ...", folder.path)
        flush_log()
        print(QUESTION, end="", flush=True)
        answer = read_answer()
        print(end="" if answer.endswith("\n") else "\n", flush=True)
        if answer.strip().lower() in ("y", "yes"):
            generate_keys(folder)
    require_keys(folder)


def read_answer() -> str:
    """A line of standard input. A pipe has to hold the answer already: nobody types one there."""
    if not sys.stdin or sys.stdin.isatty():
        return read_line() if sys.stdin else ""
    # Without a buffer: one whose lock a thread holds for ever ends the interpreter with a fatal error.
    source: Any = getattr(getattr(sys.stdin, "buffer", None), "raw", sys.stdin)
    answer: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            while not answer or answer[-1] not in ("", "\n"):
                char = source.read(1) or ""  # None: nothing is there, and the pipe does not block
                answer.append(char if isinstance(char, str) else char.decode("latin-1"))
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(ANSWER_TIMEOUT)
    return "".join(answer)


def read_line() -> str:
    """A line that was typed, "" at the end: also where the terminal is gone, or what was typed is no text."""
    try:
        return sys.stdin.readline()
    except (OSError, ValueError):
        return ""


def generate_keys(folder: KeyFolder) -> KeyPair:
    sodium()  # its error stands alone
    log.info("Generating security files ...")
    keys = folder.generate()
    log.info("📦 Security files written to `%s`", folder.key_file)
    flush_log()
    return keys


def ask_host(error: UnknownHost) -> bool:
    """Asks at the terminal whether to trust a server's unknown key, as ssh does."""
    key = encode_key(error.key)
    fingerprint = "SHA256:" + base64.b64encode(sha256(error.key)).decode("ascii").rstrip("=")
    question = ("The key of the server `%s` is not known yet.%s\nIt is %s, fingerprint %s.\nAre you sure you want to"
                " continue connecting (yes/no/[fingerprint])? " % (error.address, error.hint, key, fingerprint))
    flush_log()
    # A signal must end the question, and not wait behind it.
    with handling({"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}):
        while True:
            print(question, end="", file=sys.stderr, flush=True)
            answer = read_line()
            if not answer or answer.strip().lower() in ("no", "n"):
                return False
            if answer.strip().lower() == "yes" or answer.strip() in (key, fingerprint):
                return True
            question = "Please type 'yes', 'no' or the fingerprint: "


# ---- one endpoint as the process

STATUS_INTERVAL = 5.0  # seconds between two updates of what `systemctl status` shows
Notify = Callable[..., Any]


def is_terminal(descriptor: int) -> bool:
    """Whether it is the terminal of this process: not where that is closed, or its shell has ended."""
    with contextlib.suppress(OSError):
        return os.tcgetpgrp(descriptor) >= 0
    return False


class EndpointRun:
    """An endpoint, or the Workers in its place, as the whole process: its signals, and what systemd hears of it.

    A first SIGINT or SIGTERM drains the endpoint: the process ends when everything open has ended, or after `drain`
    seconds. A second one ends it at once. On another thread than the main one there are no signals.
    """

    def __init__(self, make: Callable[[EventLoop, Callbacks], Endpoint | Workers], drain: float, notify: Notify):
        self._loop, self._make, self._drain, self._notify = EventLoop(), make, drain, notify
        self._outcome: list[int | Exception | None] = []  # the first one counts
        self._signals = 0
        self._impatient: threading.Timer | None = None
        self._is_ready = False
        # A process that was started with nohup outlives its terminal, and Windows has no such signal.
        hang_up = getattr(signal, "SIGHUP", None)
        outlives = hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN
        self._terminal = None if outlives else next(filter(is_terminal, range(3)), None)

    def run(self) -> int:
        """Runs the endpoint until it has finished, or a signal ends it: the exit code."""
        handlers = {"SIGINT": self._on_end, "SIGTERM": self._on_end, "SIGHUP": self._on_hang_up,
                    "SIGUSR1": lambda *_: self._loop.call_soon_threadsafe(self._report)}
        with contextlib.closing(self._loop), handling(handlers, self._loop.waker.fileno()):
            self._endpoint = self._make(self._loop, Callbacks(self._on_started, self._on_finished))
            try:
                self._endpoint.start()
                if os.environ.get("NOTIFY_SOCKET"):  # what it tells takes a client a look at each of its links
                    self._loop.call_later(STATUS_INTERVAL, self._tell_state)
                self._loop.call_later(1.0, give_back_heap)
                gc.collect()
                gc.freeze()  # what exists now stays, so later collections need not look at it
                gc.set_threshold(20_000, 50, 20)  # few cycles here: 8% more connections a second, with 64 at once 40%
                self._loop.run()
            finally:  # Ctrl-C at a question too
                self._endpoint.close()
                if isinstance(self._endpoint, Endpoint):
                    for threads in self._endpoint.threads, self._endpoint.files:
                        threads.join(0.5)
        if self._impatient:
            self._impatient.cancel()
        result = self._outcome[0]
        return getattr(result, "exit_code", 1) if isinstance(result, Exception) else result or 0

    def _on_started(self) -> None:
        self._is_ready = True
        self._notify("READY=1", "STATUS=" + next(self._endpoint.describe()))

    def _on_finished(self, outcome: int | Exception | None) -> None:
        self._outcome.append(outcome)
        self._loop.stop()

    def _tell_state(self) -> None:
        self._notify("STATUS=" + next(self._endpoint.describe()))
        self._loop.call_later(STATUS_INTERVAL, self._tell_state)

    # ---- signals

    def _on_end(self, number: int, _frame: Any) -> None:
        self._signals += 1
        if not self._outcome:
            self._outcome.append(130 if number == signal.SIGINT else 0)
            return self._loop.call_soon_threadsafe(self._end)
        # It is ending already: now at once, with resets, and from outside if the loop is stuck.
        if self._signals > 1:
            self._outcome[0] = 128 + number
        if not self._impatient:
            self._impatient = threading.Timer(1, os._exit, (128 + number,))
            self._impatient.daemon = True
            with contextlib.suppress(RuntimeError):  # the system lets it start no thread for now
                self._impatient.start()
        return self._loop.call_soon_threadsafe(self._loop.stop)

    def _end(self) -> None:
        self._notify("STOPPING=1")
        self._endpoint.drain(self._drain, self._loop.stop)

    def _is_closed(self) -> bool:
        return self._terminal is not None and not is_terminal(self._terminal)

    def _on_hang_up(self, number: int, frame: Any) -> None:
        if self._is_closed():
            return self._on_end(number, frame)
        return self._loop.call_soon_threadsafe(self._reload)

    def _reload(self) -> None:
        if self._is_ready:
            self._notify("RELOADING=1", "MONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        self._endpoint.reload(lambda: self._notify("READY=1") if self._is_ready else None)
        # Where the shell was killed, the signal comes just before the terminal goes.
        self._loop.call_later(1.0, lambda: self._on_end(signal.SIGHUP, None) if self._is_closed() else None)

    def _report(self) -> None:
        if isinstance(self._endpoint, Endpoint):
            for line in show_table(self._endpoint):
                log.info("📊 %s", line)
        else:
            self._endpoint.tell(signal.SIGUSR1)


def serve_pipe(marker: bytes, limits: dict[str, Any]) -> None:
    """The far side of one ssh:// link: the last call of the program that a client sends over ssh."""
    raise_descriptor_limit()
    set_up_logging(logging.WARNING)
    os.write(1, marker)
    loop = EventLoop()
    server = PipeServer(loop, Limits(**limits))
    server.start()
    loop.call_later(1.0, give_back_heap)
    loop.run()
    server.close()


def give_back_heap() -> None:
    """Compiling this source leaves 20 MB unused in glibc's heap. They go back in 5 ms, when nobody waits."""
    with contextlib.suppress(Exception):  # no such library, or no such call: other systems need none
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


# ---- several processes


class Workers:
    """The processes among which the work is shared, in the place of an endpoint in their parent: what a signal asks of
    the parent, it asks of them. The end of one process ends all.

    A pair of sockets joins the parent to each process. A byte says that the process is ready (again); the end of the
    stream says that the other side has ended.
    """

    PATIENCE = 10.0  # seconds after its drain for which a worker that was told to end may live on

    def __init__(self, loop: EventLoop, callbacks: Callbacks, processes: dict[socket.socket, int], drain: float):
        self._loop, self._callbacks, self._processes = loop, callbacks, processes  # {socket: process id}
        self._until_killed, self._is_ending = drain + self.PATIENCE, False
        self._unready = set(processes)
        self._code = 0  # of the first process that failed

    def start(self) -> None:
        for sock in self._processes:
            self._loop.watch(sock.fileno(), 0, READ, functools.partial(self._on_word, sock))

    def _on_word(self, sock: socket.socket, _mask: int) -> None:
        if sock.recv(1):
            self._unready.discard(sock)
            if not self._unready:
                self._callbacks.started()
            return
        self._loop.watch(sock.fileno(), READ, 0, lambda _mask: None)
        code = self._wait(sock)
        self._code = self._code or code
        if self._processes:
            self.drain()
        else:
            self._callbacks.finished(self._code)

    def _wait(self, sock: socket.socket) -> int:
        """The exit code of the process at the other end, which has ended or is about to."""
        sock.close()
        pid = self._processes.pop(sock)
        with contextlib.suppress(ChildProcessError):  # the program around main() waits for its children itself
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):  # a worker that exits says why itself
                log.error("❌ the worker with process id %d was killed by signal %d (9: a lack of memory, or it was"
                          " stuck): the others end too", pid, os.WTERMSIG(status))
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
        return 1

    def tell(self, number: int) -> None:
        for pid in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def reload(self, _done: Any) -> None:
        """They say by themselves that they are ready."""
        self._unready.update(self._processes)
        self.tell(signal.SIGHUP)

    def drain(self, *_how: Any) -> None:
        if not self._is_ending:  # a second signal would end them at once
            self._is_ending = True
            self.tell(signal.SIGTERM)
            self._loop.call_later(self._until_killed, functools.partial(self.tell, signal.SIGKILL))

    def close(self) -> None:
        """Ends at once what has not ended yet: a second signal."""
        self.tell(signal.SIGTERM)
        self.tell(signal.SIGCONT)  # a worker that was stopped would keep its port
        for sock in list(self._processes):
            self._wait(sock)

    def describe(self) -> Iterator[str]:
        yield plural(len(self._processes), "worker")


def run_workers(options: Options, sockets: list[list[socket.socket]], drain: float,
                make: Callable[[int, EventLoop, Callbacks], Endpoint]) -> int:
    """Runs make(number, loop, callbacks) in a process for each group of listening sockets, or here for a single group:
    the exit code. systemd hears the parent alone: "ready" once all are ready (again)."""
    asked = check_workers(options)
    metrics = [listen(address, share=options.reuse_port) if address else [] for address in asked]
    metrics_at = [sock.getsockname()[:2] for group in metrics for sock in group]
    groups = [own + its for own, its in zip(sockets, metrics)]

    def run(number: int, notify: Notify) -> int:
        def make_with_metrics(loop: EventLoop, callbacks: Callbacks) -> Endpoint:
            endpoint, address = make(number, loop, callbacks), asked[number]
            endpoint.metrics_at = metrics_at
            if address:
                serve_metrics(endpoint, address, metrics[number])
            return endpoint
        return EndpointRun(make_with_metrics, drain, notify).run()
    if len(sockets) == 1:
        return run(0, notify_systemd)
    flush_log()
    processes: dict[socket.socket, int] = {}
    # A signal that comes before a worker takes signals waits until then.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    try:
        for number, own in enumerate(groups):
            try:
                ours, theirs = socket.socketpair()
                pid = os.fork()
            except OSError as error:
                raise RatrodError("cannot start worker %d of %d: %s; give fewer --workers, or allow more processes"
                                  " and descriptors (ulimit -u, ulimit -n)"
                                  % (number + 1, len(groups), reason(error))) from None
            if pid == 0:
                close_all([ours, *processes, *(sock for others in groups for sock in others if sock not in own)])
                _run_worker(functools.partial(run, number), theirs)
            theirs.close()
            processes[ours] = pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # An open socket would take connections of a worker that is gone. close() would remove the file of a Unix socket.
    for sock in {sock for group in groups for sock in group}:
        os.close(sock.detach())
    return EndpointRun(lambda loop, callbacks: Workers(loop, callbacks, processes, drain), drain, notify_systemd).run()


def _run_worker(run: Callable[[Notify], int], parent: socket.socket) -> NoReturn:
    def tell_parent(*lines: str) -> None:
        if lines[0] == "READY=1":
            with contextlib.suppress(OSError):  # the parent has ended
                parent.send(b".")

    def end_with_parent() -> None:
        with contextlib.suppress(OSError):
            parent.recv(1)  # the parent never sends, so this returns when the parent has ended
        while True:  # signals that come together count as one, and nobody else is left who could send another
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    code = 1
    try:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` must not stop a background group that logs
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on: a second one means "at once"
        threading.Thread(target=end_with_parent, daemon=True).start()
        code = exit_code_of(lambda: run(tell_parent))
        flush_log()
    finally:
        os._exit(code)


# ---- commands


def check_workers(options: Options) -> list[Address | None]:
    """The address of each worker's metrics: consecutive ports, or any for port 0. ConfigError: too many workers."""
    workers = options.workers
    check((workers > 255, "--workers takes at most 255, not %d; as many as there are processors serve best" % workers),
          (workers > 1 and not hasattr(os, "fork"),
           "--workers needs a system that can fork processes, and this one cannot; leave it out"))
    if not options.metrics:
        return [None] * workers
    first = parse_endpoint(options.metrics, "address for metrics", lowest=0)
    check((first.port + workers - 1 > 65535,
           "--metrics: there are no ports from %d on for %d workers" % (first.port, workers)))
    return [first._replace(port=first.port and first.port + number) for number in range(workers)]


DRAIN = 8.0  # seconds by default: `docker stop` kills what has not ended after 10


def serve_command(options: Options) -> int:
    bind = parse_endpoint(options.bind, "address to bind", lowest=0)
    what = ServerOptions(
        bind, make_policy(options.remote_regex), legacy=options.legacy, allow_listen=options.allow_listen,
        proxies=parse_networks(options.proxy_protocol))
    check_workers(options)
    folder = KeyFolder(options.key_path, parse_grant)
    check((options.allow_listen and options.workers > 1,
           "--allow-listen and --workers do not go together: a reverse tunnel is one process's"))
    ensure_keys(folder)
    raise_descriptor_limit()
    sockets = listen_for(options.workers, bind, share=options.reuse_port)
    run = os.urandom(6)

    def make(number: int, loop: EventLoop, callbacks: Callbacks) -> Server:
        own = what._replace(report=log.debug if number else log.info, instance=run + bytes((options.workers, number)))
        return Server(loop, folder, options.limits, own, callbacks, sockets[number])
    return run_workers(options, sockets, DRAIN if options.drain is None else options.drain, make)


def connect_command(options: Options) -> int:
    raise_descriptor_limit()
    folder, what = plan_client(options)
    check_workers(options)
    ensure_keys(folder, may_ask=not is_quiet(options))
    may_ask = (bool(sys.stdin and sys.stderr and sys.stdin.isatty() and sys.stderr.isatty())
               and not is_quiet(options) and options.workers == 1)
    what = what._replace(ask_host=ask_host if may_ask else None)
    return (check_connection if options.check else run_client)(options, folder, what)


def run_client(options: Options, folder: KeyFolder, what: ClientOptions) -> int:
    sockets: list[list[list[socket.socket]]] = []  # of each tunnel, for each worker
    with contextlib.ExitStack() as stack:  # closes them however this ends: the file of a Unix socket goes with it
        for spec in what.tunnels:
            sockets.append(listen_for_tunnel(options.workers, spec))
            stack.callback(close_all, [sock for group in sockets[-1] for sock in group])
        groups = [[tunnel[number] for tunnel in sockets] for number in range(options.workers)]

        def make(number: int, loop: EventLoop, callbacks: Callbacks) -> Client:
            own = what._replace(report=log.debug if number else log.info)
            client = Client(loop, folder, options.limits, own, callbacks, groups[number])
            if shows_status(options):
                draw_status(client)
            return client
        return run_workers(options, [sum(group, []) for group in groups], options.drain or 0.0, make)


def check_connection(options: Options, folder: KeyFolder, what: ClientOptions) -> int:
    """connect --check: the test connection alone. systemd is told nothing: it waits for the service, not for this."""
    made: list[Client] = []

    def make(loop: EventLoop, callbacks: Callbacks) -> Client:
        own = what._replace(report=log.debug, only_test=True)
        made.append(Client(loop, folder, options.limits, own, callbacks, [[] for _ in what.tunnels]))
        return made[0]
    code = EndpointRun(make, drain=0.0, notify=lambda *_lines: None).run()
    if not code and not made[0].started:
        return 128 + signal.SIGTERM  # the end of a service, and no answer to this question
    if not code:
        said = "The server `%s` lets this client in." % str(made[0].server)
        record = log.makeRecord(log.name, logging.INFO, "", 0, said, (), None)
        flush_log()
        print(LogFormatter(as_json=True).format(record) if options.log_format == "json" else said)
    return code


def keygen_command(options: Options) -> None:
    folder = KeyFolder(options.key_path, parse_grant)
    if folder.exists():
        raise ConfigError("there is a key in `%s` already, and it stays: whoever knows it would no longer let you in."
                          " Its public half: %s" % (folder.path, encode_key(folder.load().public)))
    print(encode_key(generate_keys(folder).public))


# ---- demo

DEMO_MB = 256
DEMO_FAILED = "the bytes that came are not those that were sent; please report this"


def demo_payload() -> Iterator[bytes]:
    """DEMO_MB blocks of 1 MiB that all differ."""
    block = bytes(range(256)) * 4096
    for number in range(DEMO_MB):
        yield number.to_bytes(8, "big") + block[8:]


def serve_demo_payload(service: socket.socket) -> None:
    with contextlib.suppress(OSError), service.accept()[0] as connection:
        for block in demo_payload():
            connection.sendall(block)


def demo_run(folders: Sequence[KeyFolder], signals: list[int]) -> None:
    """A tunnel to a TCP service and one to a UDP echo; every byte is compared. It ends soon when a signal has come."""
    try:
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            echo, sock = (stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(2))
            echo.bind(("127.0.0.1", 0))
            for end in (service, echo, sock):
                end.settimeout(60)
            server = stack.enter_context(serve(key_path=folders[0].path))
            targets = ["0:127.0.0.1:%d" % end.getsockname()[1] for end in (service, echo)]
            made = stack.enter_context(tunnel(str(Address(*server.address)), *targets, key_path=folders[1].path))
            print("A tunnel from %s through %s to a service on %s, encrypted:"
                  % (Address(*made.address), Address(*server.address), targets[0][2:]), flush=True)
            started = time.monotonic()
            threading.Thread(target=serve_demo_payload, args=(service,), daemon=True).start()
            with socket.create_connection(made.address, 60) as connection, connection.makefile("rb") as received:
                for number, block in enumerate(demo_payload(), 1):
                    if received.read(len(block)) != block:
                        raise RatrodError(DEMO_FAILED)
                    if signals:
                        return
                    if number % (DEMO_MB // 4) == 0:
                        print("  %3d%%  %d of %d MB" % (number * 100 // DEMO_MB, number, DEMO_MB), flush=True)
            seconds = time.monotonic() - started
            sock.sendto(b"ratrod", made.addresses[1])
            echo.sendto(*echo.recvfrom(100))
            if sock.recv(100) != b"ratrod":
                raise RatrodError(DEMO_FAILED)
    except OSError as failure:
        raise RatrodError("the demo failed: %s" % reason(failure)) from None
    print("Every byte arrived: %d MB in %.1f s, %.2f GB/s, and a UDP datagram there and back.\n"
          % (DEMO_MB, seconds, (DEMO_MB << 20) / seconds / 1e9))
    print("For real, on the machine that reaches your database:\n\n    ratrod serve 0.0.0.0:19000\n\n"
          "and at home, once each side has the other's public key (`ratrod keygen`, then authorized_keys there,"
          " known_hosts here):\n\n    ratrod connect server:19000 2000:db:5432\n")


def demo_command(_options: Options) -> int:
    """A target, a server and a client in this process, with keys that are thrown away. A signal is only noted: as an
    exception it could come where Python can only print it."""
    import tempfile

    signals: list[int] = []

    def on_end(number: int, _frame: Any) -> None:
        signals.append(number)
        log.setLevel(logging.CRITICAL)  # the connections that this cuts are no news

    with handling({"SIGINT": on_end, "SIGTERM": on_end}), tempfile.TemporaryDirectory(prefix="ratrod-demo-") as path:
        folders = [KeyFolder(os.path.join(path, name), parse_grant) for name in ("server", "client")]
        keys = [encode_key(folder.generate().public) for folder in folders]
        for folder, name, key in zip(folders, ("authorized_keys", "known_hosts"), reversed(keys)):
            with open(os.path.join(folder.path, name), "w") as file:
                file.write(key + "\n")
        demo_run(folders, signals)
    return 128 + signals[0] if signals else 0


# ---- the program


def main(argv: list[str] | None = None) -> int:
    """The program: its exit code (0 done, 1 failed, 2 usage or configuration, 3 authentication, 130 interrupted). A
    program may call it on any thread; signals end it on the main thread alone."""
    words = sys.argv[1:] if argv is None else argv
    try:
        with putting_back():
            set_up_logging(logging.INFO)  # until the options are known
            return exit_code_of(lambda: _run_command(words), words)
    except KeyboardInterrupt:
        return 130


def program() -> NoReturn:
    """The command `ratrod`: main(), as a process of its own."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see the top of this file
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end of the interpreter would show where Ctrl-C interrupts it
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # main() has reported it; the interpreter would do so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _run_command(argv: list[str]) -> int:
    options = parse_command_line(list(expand_arguments(argv)), os.environ)
    set_up_logging(logging.DEBUG if options.verbose else logging.WARNING if is_quiet(options) else logging.INFO,
                   options.log_format == "json")
    commands: dict[str, Callable[[Options], int | None]] = {
        "serve": serve_command, "connect": connect_command, "keygen": keygen_command, "demo": demo_command,
        "help": lambda options: print(help_text(options.topic), end=""),
        "version": lambda _options: print("ratrod %s" % __version__)}
    try:
        code = commands[options.command](options) or 0
    except ConfigError as error:
        about = [variable_of(option) for option, value in options.environment.items()
                 if re.search(r"%s(?![\w-])|`%s(?![\w.:-])" % (option, re.escape(value or option)), str(error))]
        if not about:
            raise
        raise ConfigError("%s (see %s in the environment)" % (error, ", ".join(about))) from None  # nobody typed it
    if sys.stdout:
        sys.stdout.flush()  # a failure of this is still reported
    return code


def is_quiet(options: Options) -> bool:
    """Whether the user wants to hear of failures alone: with --check, and with stdio:, where ratrod runs inside ssh."""
    return options.check or any(tunnel.startswith("stdio:") for tunnel in options.tunnels)


def shows_status(options: Options) -> bool:
    """Whether there is a place for a status line: one process's log, on a terminal that can move its cursor."""
    if options.verbose or options.no_status or options.log_format != "text" or options.workers > 1 or is_quiet(options):
        return False
    return (bool(options.tunnels) and hasattr(os, "tcgetpgrp") and os.environ.get("TERM", "dumb") not in ("", "dumb")
            and bool(sys.stderr) and sys.stderr.isatty())


def exit_code_of(run: Callable[[], int], argv: Sequence[str] = ()) -> int:
    """What run() returns, or the exit code of its failure, which is shown in a line, never as a traceback."""
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
    except BrokenPipeError:  # a reader that went away, as in `ratrod help | head`, needs no word
        pass
    except OSError as error:  # no descriptors left, a full disk
        log.error("❌ %s", reason(error))
    except Exception as error:  # a bug; a traceback would tell a user less
        log.error("❌ internal error, please report it: %r", error)
    return 1


if __name__ == "__main__":
    # CPython keeps the syntax tree of a script, 20 MB, until the script's last line has run. The hook runs after that.
    sys.excepthook = lambda *_: program()
    raise SystemError("over to the hook")
