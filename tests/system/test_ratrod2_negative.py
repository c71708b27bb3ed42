"""The negative tests of PROTOCOL.md that concern ratrod2, by their numbers there, over real sockets: the real `serve` or `connect` against the
independent peer.

The missing number, 3, is legacy's.
"""

import contextlib
import errno
import json
import os
import pathlib
import queue
import re
import select
import selectors
import socket
import struct
import sys
import threading
import time

import pytest

from support import ratrod2_peer as peer
from support.keys import base64url, identity_of, make_keys, seed_of
from support.pressure import LONG, memory_before, peak_growth
from support.programs import AUTHENTICATION_FAILED, PATIENCE, READY
from support.ratrod2_peer import (
    ABANDON,
    ACK,
    AEGIS,
    BULK_LIMIT,
    CHACHA,
    CLOSE,
    DATA,
    DATAGRAMS,
    END,
    ERROR,
    HANDSHAKE_COMPLETION,
    KEEPALIVE,
    LISTEN,
    OPEN,
    OPENED,
    OPENING,
    OVER,
    SESSION,
    SESSION_ADDRESS,
    SESSION_OVER,
    TCP,
    UDP,
    Client,
    Identity,
    PeerError,
    ProtocolError,
    Recorder,
    Server,
    encode_open,
    encode_session,
    receive_to_end,
)
from support.rows import row
from support.sockets import eventually, is_ready, receive_all, receive_exactly

SHORT_HANDSHAKE = ("--handshake-timeout", "1")
RESETS = ("--resume", "0")  # where a link is lost the stream on it is reset
HANDSHAKE_LENGTHS = 0, 1025, 65535  # that cannot be
MESSAGE_2 = 137
STOLEN = b"\x5a" * 32
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
# They last two minutes by their nature.
long = pytest.mark.skipif(not LONG, reason="takes 120 s: RATROD_LONG is not set")
hostile_text = "marker-before\x1b]0;evil\x07\x1b[2J\r\n\x00\x9b\u202e marker-after " + "A" * 800


def flip(data, at, bits=1):
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1:]


def framed(message):
    return struct.pack(">H", len(message)) + message


def how_it_ended(connection):
    """Waits until both directions are over; the error that a reset has left, or 0."""
    poller = select.poll()
    poller.register(connection, 0)
    events = poller.poll(PATIENCE * 1000)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events and events[0][1] & select.POLLERR else 0


def is_reset(error, after_end=False):
    """True for a reset and nothing but a reset. Linux leaves EPIPE where a FIN came before it: only after an End may it have."""
    return error == errno.ECONNRESET or bool(error) and (after_end or not sys.platform.startswith("linux"))


def was_reset(connection, after_end=False):
    return is_reset(how_it_ended(connection), after_end)


# ---------------------------------------------------------------------------------------------------- the programs under test


def check_output(program):
    assert "Traceback" not in program.output
    odd = [line for line in program.lines if not line.replace("\t", " ").isprintable()]
    assert not odd, "control characters in the output: %r" % odd


def still_serves(end):
    """The program under test (a Served or a Connected) still does its work, on a new connection, and has shown no traceback."""
    end.work()
    assert end.program.process.poll() is None
    check_output(end.program)


@pytest.fixture(autouse=True)
def every_output(start):
    """The whole output of every program is checked once it has ended, whatever was done to it."""
    yield
    for program in start.programs:
        program.stop()
        check_output(program)


class Served:
    """A real server, and a target that echoes; `host` is the target's name."""

    def __init__(self, program, port, keys, target, host):
        self.program = program
        self.port = port
        self.keys = keys
        self.target = target
        self.host = host
        self.stack = contextlib.ExitStack()

    def client(self, seed=None, **options):
        """A connected peer that has sent nothing yet."""
        return self.stack.enter_context(Client.connect(self.port, seed or seed_of(self.keys.client), **options))

    def link(self, seed=None, **options):
        return self.client(seed, server=identity_of(self.keys.server), **options).handshake()

    def socket(self):
        return self.stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))

    @property
    def address(self):
        return "%s:%d" % (self.host, self.target.port)

    def work(self):
        with self.link() as link:
            assert link.exchange(self.address, b"still here") == b"still here"


@pytest.fixture
def served(serve, keys, tcp_echo):
    """served(flags...) -> Served."""
    with contextlib.ExitStack() as stack:
        def launch(*flags, host="127.0.0.1", **options):
            made = Served(*serve(*flags, **options), keys, tcp_echo, host)
            stack.callback(made.stack.close)
            # A source with an authorized link is not slowed down: a test may make many bad connections.
            made.anchor = made.link()
            return made
        yield launch


class Watched:
    """A target that reads nothing and tells of each of its connections how it ended."""

    def __init__(self, target):
        self._ends = queue.Queue()
        self._target = target(lambda connection: self._ends.put(how_it_ended(connection)))
        self.address = "127.0.0.1:%d" % self._target.port

    @property
    def accepted(self):
        return self._target.accepted

    def assert_reset(self, after_end=False):
        error = self._ends.get(timeout=2 * PATIENCE)
        assert is_reset(error, after_end), "the target's connection was not reset, or ended cleanly before: %s" % errno.errorcode.get(error)


@pytest.fixture
def watched(target):
    return Watched(target)


class Connected:
    """A real client whose server is the peer, with a tunnel to `good:1`, which echoes, and one to `evil:1`."""

    def __init__(self, program):
        self.program = program
        self.good, self.evil = (int(program.wait_for(r"\[TCP\] Listening on `.*?:(\d+)`.* to `%s:1`" % name).group(1)) for name in ("good", "evil"))
        self.stack = contextlib.ExitStack()

    def originate(self, first=b"hello"):
        """A new connection to the evil tunnel, which has sent `first`."""
        connection = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.evil), timeout=PATIENCE))
        connection.sendall(first)
        return connection

    def work(self):
        with socket.create_connection(("127.0.0.1", self.good), timeout=PATIENCE) as connection:
            connection.sendall(b"still here")
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"still here"


WELL = object()


class EvilServer:
    """What the peer does for each link of a real client: all well, but for streams to `evil:1`, and for UDP where evil_udp is given.

    After evil(stream) nothing more is sent, and `ends` gets the records that the client still sends up to its end of the link; but where it returns
    WELL, the link goes on. `problems` gets what the client did against the protocol.
    """

    def __init__(self, keys, evil, evil_udp, suites):
        self._keys = keys
        self._evil = evil
        self._evil_udp = evil_udp
        self._suites = suites
        self.ends = queue.Queue()
        self.problems = []

    def handle(self, connection):
        connection.settimeout(4 * PATIENCE)
        server = Server(connection, seed_of(self._keys.server), authorized=[identity_of(self._keys.client)], suites=self._suites)
        try:
            server.handshake().serve_streams(self._dispatch)
        except PeerError:
            # A client may fail a stream: its originator may be gone.
            pass
        except ProtocolError as error:
            self.problems.append(error)
        finally:
            # The test's process still has the socket in its Target: without this a thread that still sends would keep the link open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _dispatch(self, stream):
        evil = self._evil_udp if stream.kind == UDP else self._evil if stream.target == "evil:1" else None
        if not evil:
            return peer.serve(stream)
        try:
            if evil(stream) is WELL:
                return None
            self.ends.put(stream.link.read_to_end())
        except Exception as error:
            self.ends.put(error)
            raise
        raise peer.LinkEnded("after the evil step")

    def end(self):
        """What the client still sent on the link of an evil stream, once it has ended it."""
        end = self.ends.get(timeout=2 * PATIENCE)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def connected(ratrod, keys, target):
    """connected(evil, flags..., evil_udp=None) -> (Connected, EvilServer)."""
    with contextlib.ExitStack() as stack:
        def launch(evil, *flags, evil_udp=None, suites=None):
            evil_server = EvilServer(keys, evil, evil_udp, suites)
            port = target(evil_server.handle).port
            program = ratrod("-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % port, "0:good:1", "0:evil:1")
            program.wait_for(READY)
            made = Connected(program)
            stack.callback(made.stack.close)
            stack.callback(lambda: check_problems(evil_server))
            return made, evil_server
        yield launch


def check_problems(evil_server):
    assert not evil_server.problems, "the client broke the protocol: %r" % evil_server.problems


class Impostor:
    """A port where behave(server) answers each connection; `said` gets what the client sends after that, up to its end."""

    def __init__(self, keys, target, behave, **options):
        self._keys = keys
        self._behave = behave
        self._options = options
        self.said = queue.Queue()
        self.port = target(self._handle).port

    def _handle(self, connection):
        connection.settimeout(PATIENCE)
        try:
            self._behave(Server(connection, seed_of(self._keys.server), **self._options))
        except Exception as error:
            self.said.put(error)
            raise
        self.said.put(receive_to_end(connection))

    def assert_client_said_nothing_more(self):
        """Of every connection that was made; there is at least one."""
        said = [self.said.get(timeout=PATIENCE)]
        while not self.said.empty():
            said.append(self.said.get())
        assert said == [b""] * len(said)


@pytest.fixture
def impostor(keys, target):
    def launch(behave, **options):
        return Impostor(keys, target, behave, **options)
    return launch


def assert_client_gives_up(program, code=None):
    """It ends by itself, with an exit code that says so and a line that can be read."""
    ended = program.wait()
    assert ended == code if code is not None else ended not in (0, None)
    assert program.lines
    check_output(program)


def assert_refused(client):
    """Error in place of HandshakeCompletion, which names the client's own key; then the end."""
    with pytest.raises(PeerError) as caught:
        client.read_completion()
    assert caught.value.code == peer.INVALID_KEY
    assert base64url(client.claimed) in caught.value.text
    assert client.read_to_end() == []


def assert_ended(link, allowed=(ERROR, KEEPALIVE, ACK)):
    """The server ends the link; of what it still said nothing is an answer to the evil step."""
    assert {record.type for record in link.read_to_end()} <= set(allowed)


def assert_no_answer(client):
    assert receive_to_end(client.sock) == b""


def read_error(link):
    """The Error that must come next (Keepalive apart), as the link's last record."""
    with pytest.raises(PeerError) as caught:
        link.read_record()
    assert link.read_to_end() == []
    return caught.value


# ---------------------------------------------------------------------------------------------------- name look-ups of a real server


# Runs in the program's process before the program. Names that resolve as a test wants them cannot be had from a real resolver without being root:
# this alone is replaced.
SITECUSTOMIZE = '''
import json, os, socket, sys
folder = os.environ["TEST_RESOLVER"]
names = json.load(open(os.path.join(folder, "names")))
real = socket.getaddrinfo

def note(host):
    host = host.decode("utf-8", "replace") if isinstance(host, (bytes, bytearray)) else host
    with open(os.path.join(folder, "lookups"), "a") as lookups:
        lookups.write(json.dumps(host) + "\\n")
    return host

def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    name = note(host)
    if name == "hang.example":
        open(os.path.join(folder, "release")).read()
    if name in names:
        found = []
        for address in names[name]:
            try:
                found += real(address, port, family, type, proto, flags)
            except socket.gaierror:
                pass
        if found:
            return found
    if name in names or isinstance(name, str) and name.endswith((".example", ".test")):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return real(host, port, family, type, proto, flags)

socket.getaddrinfo = getaddrinfo
sys.addaudithook(lambda event, args: note(args[0]) if event in ("socket.gethostbyname", "socket.gethostbyaddr") else None)
'''


class Resolver:
    """What the server under test looks up: `lookups`, and the addresses of the names given. A look-up of `hang.example` lasts until release()."""

    def __init__(self, folder, names):
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (folder / "names").write_text(json.dumps(names))
        (folder / "lookups").touch()
        os.mkfifo(folder / "release")
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "TEST_RESOLVER": str(folder)}

    @property
    def lookups(self):
        return [json.loads(line) for line in (self._folder / "lookups").read_text().splitlines()]

    def release(self):
        # Without a reader this open() fails: then nothing hangs.
        with contextlib.suppress(OSError):
            os.close(os.open(self._folder / "release", os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def resolver(tmp_path):
    made = []
    def launch(**names):
        made.append(Resolver(tmp_path / ("resolver%d" % len(made)), {name.replace("_", "."): addresses for name, addresses in names.items()}))
        return made[-1]
    yield launch
    for resolver in made:
        resolver.release()


# ---------------------------------------------------------------------------------------------------- 1-2: who speaks at all


def test_01_the_servers_own_key_is_no_client(served):
    end = served()
    end.keys.server.trust(end.keys.server, "authorized_keys")
    assert_refused(end.client(seed_of(end.keys.server)).begin_handshake())
    still_serves(end)


def test_01_a_client_that_meets_its_own_key_says_so(connect, keys, target):
    def behave(server):
        # handshake() refuses the server's own key, as a real server does: for a client that leaves it to the server.
        with contextlib.suppress(PeerError, ConnectionError):
            server.handshake()
    keys.client.trust(keys.client, "known_hosts")
    program = connect(Impostor(keys._replace(server=keys.client), target, behave).port)
    assert_client_gives_up(program)
    assert "same key" in program.output


def legacy_error(text):
    message = peer.varint(6) + peer.encode_error(peer.UNKNOWN, text)
    return b"\x00" + struct.pack(">Q", len(message)) + message


LEGACY_ANSWERS = {
    "closes": b"",
    "resets": None,
    "Error": legacy_error("what is this"),
    "long Error": legacy_error("x" * 2000),
    "ServerPreamble": b"\x00" + struct.pack(">Q", 500) + b"\x01" * 500,
}


@pytest.mark.parametrize("how", LEGACY_ANSWERS)
def test_02_a_legacy_server_is_named_and_there_is_no_fallback(connect, target, how):
    openings = queue.Queue()

    def handle(connection):
        # As Rust's: it takes a flag and a size from the opening bytes, and understands nothing.
        openings.put(receive_exactly(connection, 9))
        if LEGACY_ANSWERS[how] is None:
            peer.reset(connection)
        else:
            connection.sendall(LEGACY_ANSWERS[how])
    program = connect(target(handle).port)
    assert_client_gives_up(program)
    assert "--legacy" in program.output
    seen = [openings.get(timeout=PATIENCE)]
    while not openings.empty():
        seen.append(openings.get())
    assert all(opening.startswith(OPENING) for opening in seen)


def test_02_first_bytes_of_strangers(served):
    """A legacy client is told; anything else is closed without an answer."""
    end = served()
    preamble = b"\x00" + b"\x20" + b"e" * 32 + b"\x04a:80" + b"\x20" + b"c" * 32 + b"\x00\x00"
    for first in (b"\x00" + struct.pack(">Q", 80) + preamble, b"\x01" + bytes(12) + struct.pack(">Q", 80)):
        with row(first):
            sock = end.socket()
            sock.sendall(first)
            answer = receive_to_end(sock)
            assert answer[:1] == b"\x00"
            assert int.from_bytes(answer[1:9], "big") == len(answer) - 9
            decoder = peer.Decoder(answer[9:])
            assert (decoder.varint(), decoder.varint()) == (6, peer.UNKNOWN)
            assert "--legacy" in decoder.str()
            decoder.end()
    for first in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\x02" * 8, b"ratrod3\n", b"\xff" * 100):
        with row(first):
            sock = end.socket()
            sock.sendall(first)
            assert receive_to_end(sock) == b""
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 4-9, 11: the handshake
# Every byte of every message, every length and every odd key is in unit/test_core_handshake.py. Here: what the programs then do.


def say_1(client, change=lambda message: message, **wrong):
    """The client's first message, changed."""
    client.send(OPENING)
    client.send_message(change(client.client_preamble()), **wrong)


def say_3(client, change=lambda message: message, **wrong):
    """The client's second message, changed, after all that goes before it."""
    say_1(client)
    client.read_server_preamble()
    client.send_message(change(client.client_authentication()), **wrong)


def flipped_1(client, at):
    """Noise cannot refuse most of these at once: nobody must be able to go on from the answer."""
    say_1(client, lambda message: flip(message, at))
    with contextlib.suppress(ProtocolError, peer.LinkEnded):
        client.read_server_preamble()
        raise AssertionError("it takes message 1 with byte %d flipped" % at)
    client.send_message(b"\x00" * 96)  # what this client would have said next, made with a wrong transcript


def opening_flipped(client, at):
    client.send(flip(OPENING, at) + framed(client.client_preamble()))


def top_bit_set(identity):
    """The identity's key pair, its public key in the other form that X25519 takes for the same."""
    return peer.odd_keypair(identity.static_public[:31] + bytes([identity.static_public[31] | 0x80]), identity.static_private)


def test_handshakes_of_clients_that_are_not_answered(served):
    """4: flipped bytes. 6: a list without suite 2. 7: keys of small order; the attacker computes all keys, so that a record of a server that went
    on would be read. 8: what is no identity, or not the one of the static key. 11: lengths that cannot be."""
    end = served()
    own = Identity.from_seed(seed_of(end.keys.client))
    points = peer.SMALL_ORDER_POINTS

    def offer(payload):
        return lambda client: (client.send(OPENING), client.send_message(client.client_preamble(payload)))
    rows = [
        *(("4: opening %d" % at, {}, lambda client, at=at: opening_flipped(client, at)) for at in range(len(OPENING))),
        *(("4: message 1, %d" % at, {"suites": (1, 2)}, lambda client, at=at: flipped_1(client, at)) for at in (0, 31, 32, 34)),
        *(("4: message 3, %d" % at, {}, lambda client, at=at: say_3(client, lambda message: flip(message, at))) for at in (0, 47, 48, 95)),
        *(("6: %s" % payload.hex(), {}, offer(payload)) for payload in (
            b"\x01\x01", b"\x01\x03", b"\x00", b"", b"\x02\x01", b"\x03\x01\x02", b"\x02\x01\x03\x02", b"\xff\x02")),
        *(("7: e %s" % point.hex(), {"ephemeral": peer.odd_keypair(point), "attacker": True}, say_1) for point in points[::3]),
        *(("7: s %s" % point.hex(), {"static": peer.odd_keypair(point), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}, say_3)
          for point in points[::3]),
        ("8: another key's", {"static": STOLEN}, say_3), ("8: top bit", {"static": top_bit_set(own)}, say_3),
        *(("8: %r" % claimed, {"claimed": claimed}, say_3) for claimed in (b"\xff" * 32, peer.SMALL_ORDER_IDENTITY, b"", bytes(31))),
        *(("11: message 1, %d" % n, {}, lambda client, n=n: say_1(client, length=n)) for n in HANDSHAKE_LENGTHS),
        *(("11: message 3, %d" % n, {}, lambda client, n=n: say_3(client, length=n)) for n in HANDSHAKE_LENGTHS),
    ]
    for name, options, say in rows:
        with row(name):
            client = end.client(**options)
            say(client)
            assert_no_answer(client)
    still_serves(end)


def test_handshakes_of_clients_that_are_unusual(served):
    """So that the refusals above are not of everything unusual: unknown suites are passed over, what follows a payload is ignored, up to 1,024
    bytes of it."""
    end = served()
    later = b"what a later version adds"
    for offer, more in ((b"\x01\x02", later), (b"\x02\x02\x02", later), (b"\x04\x09\x02\xff\x01", later), (b"\x01\x02" + later, b""),
                        (b"\x01\x02" + bytes(1024 - 34), bytes(1024 - 96))):
        with row(offer[:9]):
            client = end.client(suites=tuple(offer[1:1 + offer[0]]))
            client.send(OPENING)
            client.send_message(client.client_preamble(offer))
            assert client.read_server_preamble().suite == CHACHA.id
            client.send_message(client.client_authentication(client.identity.public + more))
            client.read_completion()
            assert client.exchange(end.address, b"hello") == b"hello"
    still_serves(end)


def up_to_server_preamble(server, change=lambda message: message, **wrong):
    server.read_opening()
    server.read_client_preamble()
    server.send_message(change(server.server_preamble()), **wrong)


def flipped_on_its_way(server, at, bits):
    """The impostor goes on whatever the payload of message 1 now says."""
    server.read_opening()
    message = server.read_message()
    server.handshaker.read_message(flip(message, at % len(message), bits))
    server.suite = CHACHA
    server.send_message(server.server_preamble())


def stripped_on_its_way(server):
    """AEGIS taken out of the offer; or put in, where this client has none to be stripped of."""
    server.read_opening()
    message = server.read_message()
    server.read_client_preamble(message[:32] + (b"\x02\x01\x02" if message[32:] == b"\x01\x02" else b"\x01\x02"))
    server.suite = CHACHA
    server.send_message(server.server_preamble())


def says_suite(suite_id):
    def behave(server):
        server.read_opening()
        server.read_client_preamble()
        server.send_message(server.server_preamble(server.identity.public + bytes([suite_id]) + server.instance))
    return behave


# Each: (the server's keys) -> options of the impostor, what it does, flags of the client, its exit code where it must be that one. With -a what
# stops the client is the key, not known_hosts.
BAD_SERVERS = {
    **{"4: message 1 flipped at %d" % at: lambda keys, at=at, bits=bits: (
        {}, lambda server: flipped_on_its_way(server, at, bits), (), None) for at, bits in ((0, 1), (31, 0x80), (32, 1), (-1, 1))},
    "4: a suite stripped": lambda keys: ({}, stripped_on_its_way, (), None),
    **{"4: message 2 flipped at %d" % at: lambda keys, at=at: (
        {}, lambda server: up_to_server_preamble(server, lambda message: flip(message, at)), (), None) for at in (0, 31, 32, 79, 80, 136)},
    **{"5: suite %d" % suite: lambda keys, suite=suite: ({}, says_suite(suite), (), None) for suite in (0, 3, 255)},
    **{"7: e %s" % point.hex()[:8]: lambda keys, point=point: (
        {"ephemeral": peer.odd_keypair(point), "attacker": True}, up_to_server_preamble, ("-a",), None) for point in peer.SMALL_ORDER_POINTS[::3]},
    **{"7: s %s" % point.hex()[:8]: lambda keys, point=point: (
        {"static": peer.odd_keypair(point), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}, up_to_server_preamble, ("-a",), None)
       for point in peer.SMALL_ORDER_POINTS[::3]},
    **{"8: %s %s" % (wrong, flags): lambda keys, wrong=wrong, flags=flags: (
        {"static": STOLEN if wrong == "another key's" else top_bit_set(Identity.from_seed(seed_of(keys)))}, up_to_server_preamble, flags, None)
       for wrong in ("another key's", "top bit") for flags in ((), ("-a",))},
    **{"8: %s" % name: lambda keys, claimed=claimed: ({"claimed": claimed}, up_to_server_preamble, ("-a",), None) for name, claimed in (
        ("not a point", b"\xff" * 32), ("neutral element", peer.SMALL_ORDER_IDENTITY), ("20 bytes", bytes(20)))},
    "9: the negative of a known server": lambda keys: (
        {"claimed": peer.negative(identity_of(keys))}, up_to_server_preamble, (), AUTHENTICATION_FAILED),
    **{"11: length %d" % n: lambda keys, n=n: ({}, lambda server: up_to_server_preamble(server, length=n), (), None) for n in HANDSHAKE_LENGTHS},
}


@pytest.mark.parametrize("how", BAD_SERVERS)
def test_handshakes_of_servers_that_get_no_message_3(connect, impostor, keys, how):
    options, behave, flags, code = BAD_SERVERS[how](keys.server)
    fake = impostor(behave, **options)
    assert_client_gives_up(connect(fake.port, *flags), code)
    fake.assert_client_said_nothing_more()


def test_09_the_negative_of_a_listed_client(served):
    """-P has P's X25519 form, and P's owner can compute with it; but it is not what the list names."""
    end = served()
    assert_refused(end.client(claimed=peer.negative(identity_of(end.keys.client))).begin_handshake())
    still_serves(end)


@pytest.mark.parametrize("lines, known", [
    ("{server} elsewhere.example:19000\n", False),
    ("{server} 127.0.0.1:1\n", False),
    ("{other} 127.0.0.1:{port}\n{server}\n", False),
    ("{server}\n{other} 127.0.0.1:{port}\n", False),
    ("{server} 127.0.0.1:{port}\n", True),
    ("{other} elsewhere.example:19000\n{server}\n", True),
], ids=["another host", "another port", "bound to another key, first", "bound to another key, last", "bound", "bare"])
def test_10_server_key_bound_to_another_address(connect, impostor, keys, tmp_path, lines, known):
    fake = impostor(lambda server: server.handshake() if known else up_to_server_preamble(server))
    other = make_keys(tmp_path / "other")
    keys.client.write("known_hosts", lines.format(server=keys.server.public, other=other.public, port=fake.port))
    program = connect(fake.port)
    if known:
        assert program.wait() == 0
    else:
        assert_client_gives_up(program, AUTHENTICATION_FAILED)
    fake.assert_client_said_nothing_more()


# ---------------------------------------------------------------------------------------------------- 12-14: time, order of the handshake


def dribble(sock, data):
    """Sends a byte now and then until the other end answers or ends; how many went out. A pause is far below the deadline, all of them far above."""
    for count in range(len(data)):
        try:
            sock.sendall(data[count:count + 1])
        except ConnectionError:
            return count
        if is_ready(sock, selectors.EVENT_READ, 0.2):
            return count + 1
    return len(data)


def test_12_clients_that_take_their_time(served):
    """A byte at a time of message 1, or of message 3; and nothing at all, or nothing more after message 2."""
    end = served(*SHORT_HANDSHAKE)
    silent, half, slow, slower = (end.client() for _ in range(4))
    for client in (half, slower):
        say_1(client)
        client.read_server_preamble()
    for client, data in ((slow, OPENING + framed(slow.client_preamble())), (slower, framed(slower.client_authentication()))):
        assert dribble(client.sock, data) < len(data)
        assert_no_answer(client)
    assert_no_answer(silent)
    assert_no_answer(half)
    still_serves(end)


def test_12_a_byte_at_a_time_from_a_server(connect, impostor):
    counts = queue.Queue()

    def behave(server):
        server.read_opening()
        server.read_client_preamble()
        counts.put(dribble(server.sock, framed(server.server_preamble())))
    fake = impostor(behave)
    assert_client_gives_up(connect(fake.port, *SHORT_HANDSHAKE, "80"))
    assert counts.get(timeout=PATIENCE) < 2 + MESSAGE_2
    fake.assert_client_said_nothing_more()


def test_12_a_server_that_never_completes(connect, impostor):
    """The client's deadline covers everything up to HandshakeCompletion."""
    fake = impostor(lambda server: server.begin_handshake())
    assert_client_gives_up(connect(fake.port, *SHORT_HANDSHAKE, "80"))


def test_13_an_unauthorized_key_that_pipelines_open(served, watched, resolver):
    names = resolver(pipelined_example=["127.0.0.1"], resolved_example=["127.0.0.1"])
    end = served(env=names.environment, host="resolved.example")
    still_serves(end)
    assert "resolved.example" in names.lookups, "this test would not see a look-up"
    for target in (watched.address, "pipelined.example:%s" % watched.address.rpartition(":")[2]):
        client = end.client(STOLEN).begin_handshake()
        client.send_open(TCP, target)
        client.send_record(DATA, b"hello")
        client.send_record(END)
        assert_refused(client)
    udp = end.client(STOLEN).begin_handshake()
    udp.send_open(UDP)
    udp.send_record(SESSION, encode_session(1, "pipelined.example:53"))
    assert_refused(udp)
    # A stream of somebody authorized passes through all the same steps: what the server did not do before it, it will not do.
    still_serves(end)
    assert watched.accepted == 0
    assert "pipelined.example" not in names.lookups


def test_14_a_whole_session_replayed_to_a_server(served):
    end = served()
    recorded = end.link(wrap=Recorder)
    assert recorded.exchange(end.address, b"hello") == b"hello"
    recorded.finish()
    accepted = end.target.accepted
    sock = end.socket()
    sock.sendall(recorded.sock.sent)
    # A fresh ServerPreamble, and the end.
    assert len(receive_to_end(sock)) in (0, 2 + MESSAGE_2)
    still_serves(end)
    assert end.target.accepted == accepted + 1


def test_14_a_whole_session_replayed_to_a_client(connect, impostor):
    recorders = queue.Queue()

    def honest(server):
        server.sock = Recorder(server.sock)
        server.handshake()
        recorders.put(server.sock)
    assert connect(impostor(honest).port).wait() == 0
    recorded = bytes(recorders.get(timeout=PATIENCE).sent)

    def replay(server):
        server.read_opening()
        server.read_message()
        server.send(recorded)
    fake = impostor(replay)
    assert_client_gives_up(connect(fake.port))
    fake.assert_client_said_nothing_more()


# ---------------------------------------------------------------------------------------------------- 15-16: records


FILLER = bytes(BULK_LIMIT + 1024)


def seal(link, *record, **wrong):
    return link.writer.seal(*record, **wrong)


def seal_with_the_others_key(link):
    to_server, to_client = link.handshaker.record_keys(link.suite)
    return peer.RecordWriter(link.suite, to_client if link.initiator else to_server).seal(DATA, b"x", number=link.writer.number)


def flip_length(link, bit):
    """The filler completes the record that a greater length promises, so that what ends the link is the tag and not a FIN."""
    return flip(seal(link, DATA, b"x" * 100), 3 - bit // 8, 1 << bit % 8) + FILLER


# Each: (the link, its first Data as it went out, a record of the other end as it came) -> what is sent next.
TAMPERED = {
    "replayed": lambda link, ours, theirs: ours,
    "reordered": lambda link, ours, theirs: seal(link, DATA, b"b", number=link.writer.number + 1) + seal(link, DATA, b"a", number=link.writer.number),
    "one left out": lambda link, ours, theirs: seal(link, DATA, b"b", number=link.writer.number + 1),
    "reflected": lambda link, ours, theirs: theirs,
    "reflected with our number": lambda link, ours, theirs: seal_with_the_others_key(link),
    "first byte of the text": lambda link, ours, theirs: flip(seal(link, DATA, b"x" * 100), 4),
    "last byte of the text": lambda link, ours, theirs: flip(seal(link, DATA, b"x" * 100), 4 + 100),
    "last byte of the tag": lambda link, ours, theirs: flip(seal(link, DATA, b"x" * 100), 4 + 100 + link.suite.tag_length),
    "all zeros": lambda link, ours, theirs: struct.pack(">I", 100) + bytes(100),
    **{"length bit %d" % bit: lambda link, ours, theirs, bit=bit: flip_length(link, bit) for bit in (0, 1, 6, 7, 8, 15, 16, 18)},
}
# Each: (the suite) -> the first four bytes of a record that cannot be.
IMPOSSIBLE_LENGTHS = {
    "0": lambda suite: 0,
    "1": lambda suite: 1,
    "one short of a tag": lambda suite: suite.tag_length - 1,
    "a tag without a type": lambda suite: suite.tag_length,
    "one over the limit": lambda suite: 1 + BULK_LIMIT + suite.tag_length + 1,
    "16 MiB": lambda suite: 1 << 24,
    "2^31": lambda suite: 1 << 31,
    "2^32 - 1": lambda suite: (1 << 32) - 1,
}


# Both suites, where this box has both; a program that does not offer AEGIS ends up with ChaCha.
OFFERS = [(AEGIS.id, CHACHA.id), (CHACHA.id,)] if peer.HAS_AEGIS else [(CHACHA.id,)]
every_suite = pytest.mark.parametrize("suites", OFFERS, ids=lambda suites: "suite %d" % suites[0])


def tampered(link, ours, theirs, how):
    with contextlib.suppress(ConnectionError):
        link.send(TAMPERED[how](link, ours, theirs))


def send_length(link, how):
    with contextlib.suppress(ConnectionError):
        link.send(struct.pack(">I", IMPOSSIBLE_LENGTHS[how](link.suite)) + bytes(64))


def first_data(stream):
    """The client's first Data, read before Opened (which an acceptor does not do): with it the Open is no case for another try."""
    record = stream.link.read_any_record()
    while record.type == KEEPALIVE:
        record = stream.link.read_any_record()
    assert record.type == DATA
    return record


def opened_with_data(stream):
    """As an acceptor: opens, takes the first Data, sends some; both records as they went over the wire."""
    theirs = first_data(stream)
    stream.opened()
    return stream.link.send_record(DATA, b"hello"), theirs.wire


@every_suite
def test_15_16_records_to_the_server_that_spoil_the_link(served, watched, suites):
    """Neither end resumes here: the stream is reset. How it goes on over another link is in test_outlive.py."""
    end = served(*RESETS)
    for how in (*TAMPERED, *IMPOSSIBLE_LENGTHS):
        with row(how):
            link = end.link(suites=suites)
            link.open(watched.address)
            theirs = link.read_record()
            assert theirs.type == OPENED
            ours = link.send_record(DATA, b"hello")
            tampered(link, ours, theirs.wire, how) if how in TAMPERED else send_length(link, how)
            assert_ended(link)
            watched.assert_reset()
    for how in IMPOSSIBLE_LENGTHS:
        with row("idle, %s" % how):
            idle = end.link(suites=suites)
            send_length(idle, how)
            assert_ended(idle)
    still_serves(end)


@every_suite
def test_15_16_records_to_the_client_that_spoil_the_link(connected, suites):
    def misbehave(stream):
        sent = opened_with_data(stream)
        tampered(stream.link, *sent, how) if how in TAMPERED else send_length(stream.link, how)
    end, evil = connected(misbehave, *RESETS, suites=suites)
    for how in (*TAMPERED, *IMPOSSIBLE_LENGTHS):
        with row(how):
            assert was_reset(end.originate())
            evil.end()
    still_serves(end)


@pytest.mark.parametrize("how", ["0", "one short of a tag", "2^32 - 1"])
def test_16_instead_of_the_completion(connect, impostor, how):
    """Even the very first record of a server."""
    def behave(server):
        server.begin_handshake()
        send_length(server, how)
    assert_client_gives_up(connect(impostor(behave).port))


# Well sealed, but what they hold is too much, or too little: the other end is broken. All are sent on a stream, but the Opens.
BAD_CONTENTS = {
    "empty Data": (DATA, b""),
    "End with content": (END, b"x"),
    "Ack without a position": (ACK, bytes(7)),
    "Ack with bytes left over": (ACK, bytes(9)),
    "Keepalive with content": (KEEPALIVE, b"x"),
    "Keepalive of 2 KiB": (KEEPALIVE, bytes(2048)),
    "Error with bytes left over": (ERROR, peer.encode_error(peer.UNKNOWN, "x") + b"x"),
    "Error cut short": (ERROR, b"\x03\x05abc"),
    "Error of no known code": (ERROR, peer.encode_error(77, "x")),
    "Error of 2 KiB": (ERROR, peer.encode_error(peer.UNKNOWN, "x" * 2048)),
    "Error with text that is not UTF-8": (ERROR, b"\x03\x02\xff\xfe"),
}
# Each: (a target that could be reached) -> an Open's content.
BAD_OPENS = {
    "empty": lambda target: b"",
    "kind 0": lambda target: encode_open(0, target),
    "kind 4": lambda target: encode_open(4, target),
    "no target": lambda target: b"\x01",
    "target cut short": lambda target: b"\x01" + peer.encode_str(target)[:-1],
    "target not UTF-8": lambda target: b"\x01\x02\xff\xfe" + bytes(36),
    "no stream": lambda target: b"\x01" + peer.encode_str(target),
    "stream cut short": lambda target: encode_open(TCP, target)[:-1],
    "bytes left over": lambda target: encode_open(TCP, target) + b"x",
    "2 KiB": lambda target: encode_open(TCP, "a" * 2048),
    "an endless varint": lambda target: b"\x01\xfd" + b"\xff" * 8,
    "a varint mark that is none": lambda target: b"\x01\xff",
    "UDP with bytes left over": lambda target: encode_open(UDP, "") + b"x",
    "Listen with a short instance": lambda target: encode_open(LISTEN, "127.0.0.1:0", b"7 bytes"),
    "Abandon cut short": None,
}


def test_16_contents_to_the_server_that_cannot_be(served, watched):
    end = served()
    for how, record in BAD_CONTENTS.items():
        with row(how):
            link = end.link()
            link.open(watched.address).wait_opened()
            with contextlib.suppress(ConnectionError):
                link.send_record(*record)
            assert_ended(link)
            watched.assert_reset()
    accepted = watched.accepted
    for how, content in BAD_OPENS.items():
        with row(how):
            link = end.link()
            link.send_record(*((OPEN, content(watched.address)) if content else (ABANDON, bytes(15))))
            assert_ended(link)
    still_serves(end)
    assert watched.accepted == accepted


def test_16_contents_to_the_client_that_cannot_be(connected):
    def misbehave(stream):
        opened_with_data(stream)
        with contextlib.suppress(ConnectionError):
            stream.link.send_record(*BAD_CONTENTS[how])
    end, evil = connected(misbehave)
    for how in BAD_CONTENTS:
        with row(how):
            assert was_reset(end.originate())
            evil.end()
    still_serves(end)


def test_16_the_largest_data_is_taken(served):
    end = served()
    link = end.link()
    stream = link.open(end.address)
    stream.wait_opened()
    data = bytes(range(256)) * (BULK_LIMIT // 256)
    sender = threading.Thread(target=lambda: (link.send_record(DATA, data), stream.end()), daemon=True)
    sender.start()
    assert stream.receive_all() == data
    stream.over()
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 17-19: the state table


def fin(link):
    link.sock.shutdown(socket.SHUT_WR)


# What breaks a link in the middle of a stream.
BREAKS = {
    "FIN": fin,
    "FIN inside a record": lambda link: (link.send(seal(link, DATA, b"x" * 100)[:50]), fin(link)),
    "FIN inside a length": lambda link: (link.send(seal(link, DATA, b"x" * 100)[:2]), fin(link)),
    "reset": lambda link: peer.reset(link.sock),
    "FIN after our End": lambda link: (link.send_record(END), fin(link)),
}


def test_17_links_of_a_client_that_break_during_a_stream(served, watched):
    """Before Opened too: the acceptor reads no more before it is connected, and what it then finds is no clean end all the same."""
    end = served(*RESETS)
    for how, cut in BREAKS.items():
        with row(how):
            link = end.link()
            link.open(watched.address).wait_opened()
            link.send_record(DATA, b"hello")
            cut(link)
            watched.assert_reset(after_end=how == "FIN after our End")
    link = end.link()
    link.send_open(TCP, watched.address)
    link.send_record(DATA, b"hello")
    fin(link)
    watched.assert_reset()
    still_serves(end)


def test_17_links_of_a_server_that_break_during_a_stream(connected):
    def misbehave(stream):
        opened_with_data(stream)
        BREAKS[how](stream.link)
        if how == "reset":
            raise peer.LinkEnded("there is nothing more to read")
    end, evil = connected(misbehave, *RESETS)
    for how in BREAKS:
        with row(how):
            assert was_reset(end.originate(), after_end=how == "FIN after our End")
            with contextlib.suppress(peer.LinkEnded):
                evil.end()
    still_serves(end)


@pytest.mark.parametrize("first, opened", [(b"", False), (b"hello", False), (b"hello", True)], ids=["bare", "with Data", "Opened"])
def test_17_a_server_that_breaks_every_link(connected, first, opened):
    """The client tries for `--connect-timeout` in all, or after Opened until `--resume` has passed, and not as fast as it can. Where Data has passed
    it is the same stream each time, so that no server can take it twice."""
    opens = []

    def misbehave(stream):
        opens.append(stream)
        if first:
            assert first_data(stream).content == first
        if opened:
            stream.opened()
        fin(stream.link)
    end, _ = connected(misbehave, "--connect-timeout", "2", "--resume", "2")
    connection = end.originate(first)
    if opened:
        eventually(lambda: len(opens) > 4, "it goes on trying")
    else:
        assert was_reset(connection)
    still_serves(end)
    assert 2 <= len(opens) < 30
    if first:
        assert len({stream.number for stream in opens}) == 1
        assert [stream.attempt for stream in opens] == list(range(1, len(opens) + 1))


ANOTHER_OPEN = OPEN, encode_open(TCP, "127.0.0.1:1")
SOME_DATA = DATA, b"x"
AN_END = END, b""
AN_OVER = OVER, b""
AN_OPENED = OPENED, peer.encode_opened()
AN_ACK = ACK, peer.encode_ack(0)
AN_ABANDON = ABANDON, bytes(16)
A_COMPLETION = HANDSHAKE_COMPLETION, b"\x01v"
A_SESSION = SESSION, encode_session(1, "127.0.0.1:1")
SOME_DATAGRAMS = DATAGRAMS, peer.encode_datagrams([(1, b"x")])
A_SESSION_OVER = SESSION_OVER, peer.encode_session_over(1)
A_SESSION_ADDRESS = SESSION_ADDRESS, peer.encode_session_address(1, "127.0.0.1:1")
A_CLOSE = CLOSE, b""
UNKNOWN_TYPE = 0x7f, b""

# What belongs on no stream, and on no link that carries none.
NOWHERE = {"HandshakeCompletion": A_COMPLETION, "Session": A_SESSION, "Datagrams": SOME_DATAGRAMS, "SessionOver": A_SESSION_OVER,
           "SessionAddress": A_SESSION_ADDRESS, "an unknown type": UNKNOWN_TYPE}
# Name -> what the client sends on a stream after Opened and Data; the last is the first that is wrong.
WRONG_FROM_OPENER = {
    **{name: [record] for name, record in NOWHERE.items()},
    "Open": [ANOTHER_OPEN],
    "Open after End": [AN_END, ANOTHER_OPEN],
    "Data after End": [AN_END, SOME_DATA],
    "End after End": [AN_END, AN_END],
    "Over": [AN_OVER],
    "Over after End": [AN_END, AN_OVER],
    "Opened": [AN_OPENED],
    "Abandon": [AN_ABANDON],
    "Close": [A_CLOSE],
}
WRONG_WHEN_IDLE = {**NOWHERE, "Data": SOME_DATA, "End": AN_END, "Over": AN_OVER, "Opened": AN_OPENED}


def test_18_19_what_an_opener_may_not_send(served, watched):
    """The stream ends with the link, although it could go on over another one: who sends this is broken."""
    end = served()
    for how, records in WRONG_FROM_OPENER.items():
        with row(how):
            link = end.link()
            link.open(watched.address).wait_opened()
            link.send_record(*SOME_DATA)
            with contextlib.suppress(ConnectionError):
                for record in records:
                    link.send_record(*record)
            assert_ended(link)
            watched.assert_reset(after_end=AN_END in records)
    accepted = watched.accepted
    link = end.link()
    link.send_open(TCP, watched.address)
    link.send_open(TCP, watched.address)
    assert_ended(link, (OPENED, ERROR, KEEPALIVE))
    watched.assert_reset()
    still_serves(end)
    assert watched.accepted == accepted + 1


def test_19_what_a_client_may_not_send_on_an_idle_link(served):
    end = served()
    for used in (False, True):
        for how, record in {**WRONG_WHEN_IDLE, "Close": A_CLOSE, "Ack": (ACK, peer.encode_ack(1000))}.items():
            with row("%s, %s" % (how, used)):
                link = end.link()
                if used:
                    assert link.exchange(end.address, b"hello") == b"hello"
                link.send_record(*record)
                assert_ended(link)
    still_serves(end)


def test_18_19_what_does_not_belong_on_a_udp_link(served, udp_echo):
    end = served()
    for record in (SOME_DATA, AN_END, AN_OVER, AN_OPENED, AN_ACK, AN_ABANDON, A_COMPLETION, A_SESSION_ADDRESS, A_CLOSE, ANOTHER_OPEN, UNKNOWN_TYPE):
        with row(record):
            link = end.link().open_udp()
            link.session(1, "127.0.0.1:%d" % udp_echo.port)
            link.datagrams((1, b"hello"))
            assert link.read_udp() == (DATAGRAMS, [(1, b"hello")])
            link.send_record(*record)
            assert_ended(link)
    still_serves(end)


# Name -> (what the server sends in answer to Open and Data; the last is the first that is wrong).
WRONG_FROM_ACCEPTOR = {
    **{name: [AN_OPENED, record] for name, record in NOWHERE.items()},
    "Data before Opened": [SOME_DATA],
    "End before Opened": [AN_END],
    "Ack before Opened": [AN_ACK],
    "Over before Opened": [AN_OVER],
    "HandshakeCompletion again": [A_COMPLETION],
    "Opened twice": [AN_OPENED, AN_OPENED],
    "Over before any End": [AN_OPENED, SOME_DATA, AN_OVER],
    "Over after its own End only": [AN_OPENED, AN_END, AN_OVER],
    "Data after End": [AN_OPENED, AN_END, SOME_DATA],
    "End after End": [AN_OPENED, AN_END, AN_END],
    "Close during the stream": [AN_OPENED, A_CLOSE],
    "Open": [AN_OPENED, ANOTHER_OPEN],
    "Abandon": [AN_OPENED, AN_ABANDON],
    "Opened with bytes left over": [(OPENED, peer.encode_opened() + b"x")],
    "Opened without taken": [(OPENED, peer.encode_opened("", None))],
    "Opened without its address": [(OPENED, b"")],
}


def test_18_19_what_an_acceptor_may_not_send(connected):
    def misbehave(stream):
        first_data(stream)
        with contextlib.suppress(ConnectionError):
            for record in WRONG_FROM_ACCEPTOR[how]:
                stream.link.send_record(*record)
    end, evil = connected(misbehave)
    for how, records in WRONG_FROM_ACCEPTOR.items():
        with row(how):
            assert was_reset(end.originate(), after_end=AN_END in records[:-1])
            evil.end()
    still_serves(end)


def test_18_19_what_a_server_may_not_send_on_an_idle_link(connected):
    def misbehave(stream):
        peer.echo(stream)
        stream.over()
        stream.link.send_record(*record)
    opens = {"Open of kind %d" % kind: (OPEN, encode_open(kind, "127.0.0.1:1", instance)) for kind, instance in (
        (TCP, b""), (UDP, b""), (LISTEN, b"instance"))}
    end, evil = connected(misbehave)
    for how, record in {**WRONG_WHEN_IDLE, **opens, "Ack": AN_ACK, "Abandon": AN_ABANDON}.items():
        with row(how):
            connection = end.originate()
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"hello"
            assert {record.type for record in evil.end()} <= {KEEPALIVE, ACK, ERROR}
    still_serves(end)


@pytest.mark.parametrize("record", [SOME_DATA, AN_OPENED, A_CLOSE, (KEEPALIVE,)], ids=["Data", "Opened", "Close", "Keepalive"])
def test_19_a_first_record_that_is_not_the_completion(connect, impostor, record):
    def behave(server):
        server.begin_handshake()
        server.send_record(*record)
    assert_client_gives_up(connect(impostor(behave).port))


# ---------------------------------------------------------------------------------------------------- 20-21: Listen links


class Reversed:
    """A real client with a reverse tunnel to the echo, whose server is the peer. `links` gets its Listen links, granted; `problems` what it did
    against the protocol."""

    def __init__(self, keys, target):
        self._keys = keys
        self._over = threading.Event()
        self.links = queue.Queue()
        self.problems = []
        self.port = target(self._handle).port

    def _handle(self, connection):
        connection.settimeout(PATIENCE)
        server = Server(connection, seed_of(self._keys.server), authorized=[identity_of(self._keys.client)])
        try:
            stream = server.handshake().accept()
            if stream and stream.kind == LISTEN:
                server.grant_listen("127.0.0.1:40123")
                self.links.put(server)
                self._over.wait(4 * PATIENCE)
        except ProtocolError as error:
            self.problems.append(error)

    def link(self):
        return self.links.get(timeout=PATIENCE)

    def work(self):
        assert self.link().exchange("203.0.113.9:5000", b"still here") == b"still here"

    def close(self):
        self._over.set()


@pytest.fixture
def reversed_client(keys, target, tcp_echo, ratrod):
    """reversed_client(options...) -> Reversed"""
    with contextlib.ExitStack() as stack:
        def launch(**options):
            made = Reversed(keys, target)
            stack.callback(made.close)
            made.program = ratrod("-k", keys.client.path, "-v", "connect", "127.0.0.1:%d" % made.port, "R:0:127.0.0.1:%d" % tcp_echo.port, **options)
            return made
        yield launch


def test_20_the_servers_open_names_a_target(reversed_client, watched, tcp_echo, resolver):
    """It is the originator's address, as information: the client dials its own target alone, and looks nothing up."""
    names = resolver(evil_example=["127.0.0.1"])
    end = reversed_client(env=names.environment)
    port = int(watched.address.rpartition(":")[2])
    link = end.link()
    lookups = set(names.lookups)
    targets = watched.address, "localhost:%d" % port, "evil.example:%d" % port, "[::ffff:127.0.0.1]:%d" % port, "unix:/dev/log", "203.0.113.9:5000"
    for target in targets:
        assert link.exchange(target, target.encode()) == target.encode()
    assert set(names.lookups) <= lookups | {"127.0.0.1"}
    assert watched.accepted == 0
    assert tcp_echo.accepted == len(targets)
    still_serves(end)
    assert not end.problems


@pytest.mark.parametrize("name", ["", hostile_text, "\x00", b"\xff\xfe"], ids=["empty", "hostile", "NUL", "no UTF-8"])
def test_20_the_servers_open_names_nonsense(reversed_client, name):
    """Taken as the information that it is, or for a broken server: nothing else comes of it."""
    end = reversed_client()
    link = end.link()
    stream = link.open(name)
    with contextlib.suppress(PeerError, peer.LinkEnded):
        stream.wait_opened()
        stream.send(b"hello")
        assert stream.receive() == b"hello"
    still_serves(end)
    assert not end.problems


@pytest.fixture
def stranger(keys, tmp_path):
    """Another client that the server knows."""
    made = make_keys(tmp_path / "stranger")
    keys.server.trust(made, "authorized_keys")
    return made


def originator(stack, address):
    return stack.enter_context(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=PATIENCE))


def answer(link, connection):
    """The next stream of a Listen link is this connection's, and works."""
    connection.sendall(b"hello")
    connection.shutdown(socket.SHUT_WR)
    stream = link.accept()
    assert stream.target == "127.0.0.1:%d" % connection.getsockname()[1]
    peer.echo(stream)
    assert receive_all(connection) == b"hello"
    stream.over()


def test_21_a_listen_link_serves_no_other_client(served, stranger):
    """Neither where the other has no link that waits, nor where it has none at all any more."""
    end = served("--allow-listen", "--connect-timeout", "2")
    mine, theirs = end.link(), end.link(seed_of(stranger))
    addresses = mine.listen("127.0.0.1:0", b"instance"), theirs.listen("127.0.0.1:0", b"instance")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            answer(mine, originator(stack, addresses[0]))
            answer(theirs, originator(stack, addresses[1]))
        # One link, two connections: the second waits, though another's link is idle.
        busy, waiting = originator(stack, addresses[0]), originator(stack, addresses[0])
        stream = mine.accept()
        assert stream.target == "127.0.0.1:%d" % busy.getsockname()[1]
        stream.opened()
        answer(theirs, originator(stack, addresses[1]))
        busy.shutdown(socket.SHUT_WR)
        stream.finish()
        answer(mine, waiting)
        # The whole client goes, and its last connection with it.
        last = originator(stack, addresses[0])
        assert mine.accept().target == "127.0.0.1:%d" % last.getsockname()[1]
        mine.finish()
        assert was_reset(last)
        answer(theirs, originator(stack, addresses[1]))
    still_serves(end)


@pytest.mark.parametrize("instance", [b"instance", b"another!"])
def test_21_a_listen_link_of_another_key_joins_no_pool(served, stranger, instance):
    """Not even with the right address and instance."""
    end = served("--allow-listen")
    mine = end.link()
    address = mine.listen("127.0.0.1:0", b"instance")
    theirs = end.link(seed_of(stranger))
    theirs.send_open(LISTEN, address, instance)
    assert read_error(theirs).text
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            answer(mine, originator(stack, address))
    still_serves(end)


def test_21_a_pool_has_one_address(served):
    """Two listeners of one client and one instance: each connection takes a link of its own listener."""
    end = served("--allow-listen")
    links = end.link(), end.link()
    addresses = [link.listen("127.0.0.1:0", b"instance") for link in links]
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            for link, address in zip(links, addresses):
                answer(link, originator(stack, address))
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 22-26: policy


@pytest.mark.parametrize("options", ["", 'permitlisten="127.0.0.1:*"'])
def test_22_listen_without_permission(served, options):
    """A key's own permission does not make up for the server's."""
    end = served()
    end.keys.server.write("authorized_keys", "%s %s\n" % (end.keys.client.public, options))
    for address in ("127.0.0.1:0", "0", "0.0.0.0:0"):
        link = end.link()
        link.send_open(LISTEN, address, b"instance")
        assert read_error(link).text
    still_serves(end)


def test_22_listen_with_permission(served):
    end = served("--allow-listen")
    with contextlib.ExitStack() as stack:
        for address in ("127.0.0.1:0", "0"):
            link = end.link()
            bound = link.listen(address, b"instance")
            assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", bound)
            answer(link, originator(stack, bound))
    still_serves(end)


def test_22_listen_with_permission_for_something_else(served):
    """The refusal says what every refusal says."""
    end = served("--allow-listen")
    end.keys.server.write("authorized_keys", '%s permitlisten="127.0.0.1:*" permitlisten="127.0.0.2:9"\n' % end.keys.client.public)
    common = refusal_of(end, TCP, "224.0.0.1:80")
    for address in ("0.0.0.0:0", "127.0.0.2:0", "127.0.0.2:8", "[::]:0", "[::1]:0"):
        assert refusal_of(end, LISTEN, address, b"instance") == common
    with contextlib.ExitStack() as stack:
        link = end.link()
        answer(link, originator(stack, link.listen("127.0.0.1:0", b"instance")))
    still_serves(end)


def refusal_of(end, kind, target, instance=b""):
    link = end.link()
    link.send_open(kind, target, instance)
    error = read_error(link)
    return error.code, error.text


MALFORMED_TARGETS = [
    # what surrounds
    "a:80\n", "127.0.0.1:{port}\n", "\n127.0.0.1:{port}", "127.0.0.1:{port} ", " 127.0.0.1:{port}", "127.0.0.1 :{port}", "127.0.0.1:{port}\x00",
    "127.0.0.1\x00:{port}",
    # numbers that inet_aton() takes for an address
    "127.1:{port}", "127.0.1:{port}", "2130706433:{port}", "0x7f000001:{port}", "0x7f.0.0.1:{port}", "0177.0.0.1:{port}", "127.0.0.01:{port}",
    "127.0.0.256:{port}", "a.0x7f:{port}",
    # digits and letters that are not ASCII
    "\uff11\uff12\uff17.0.0.1:{port}", "\u0661\u0662\u0667.0.0.1:{port}", "127\u30020.0.1:{port}", "loc\u24d0lhost:{port}",
    "ex\u00e4mple.example:{port}", "127.0.0.1:\uff18\uff10", "127.0.0.1:\u0668\u0660", "127.0.0.1:8\u0660",
    # ports
    "127.0.0.1:0{port}", "127.0.0.1:+{port}", "127.0.0.1:-1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:99999999999999999999", "127.0.0.1:",
    "127.0.0.1", "127.0.0.1:http", "127.0.0.1:0x50", "127.0.0.1:1_0", "127.0.0.1:{port}:1",
    # no host, and brackets
    "", ":", ":{port}", "[]:{port}", "*:{port}", "::1:{port}", "[::1]{port}", "[::1:{port}", "::1]:{port}", "[127.0.0.1]:{port}",
    "[localhost]:{port}", "[fe80::1%lo]:{port}", "[::1%1]:{port}", "[::1]]:{port}", "[[::1]]:{port}", "[::ffff:127.1]:{port}",
    # characters and lengths
    "a b:{port}", "a/b:{port}", "user@127.0.0.1:{port}", "a,b:{port}", "a" * 254 + ":{port}",
    # what nobody has permitted
    "unix:/nowhere", "unix:", "unix:relative", "unix:/nowhere:{port}",
]


def test_23_targets_that_are_malformed(served, watched, resolver):
    names = resolver(resolved_example=["127.0.0.1"])
    end = served(env=names.environment, host="resolved.example")
    still_serves(end)
    assert "resolved.example" in names.lookups, "this test would not see a look-up"
    port = int(watched.address.rpartition(":")[2])
    for pattern in MALFORMED_TARGETS:
        target = pattern.format(port=port)
        link = end.link()
        lookups = names.lookups
        link.send_open(TCP, target)
        error = read_error(link)
        assert error.text, "no text for %r" % target
        assert names.lookups == lookups, "%r was looked up" % target
    still_serves(end)
    assert watched.accepted == 0


def test_23_malformed_targets_of_udp_sessions(served, udp_echo, resolver):
    """One bad session never ends the link: the next one works."""
    names = resolver()
    end = served(env=names.environment)
    link = end.link().open_udp()
    lookups = names.lookups
    for number, pattern in enumerate(MALFORMED_TARGETS, 1):
        link.session(number, pattern.format(port=udp_echo.port))
        link.datagrams((number, b"lost"))
        kind, (over, _, text) = link.read_udp()
        assert (kind, over) == (SESSION_OVER, number) and text
    assert names.lookups == lookups
    link.session(1000, "127.0.0.1:%d" % udp_echo.port)
    link.datagrams((1000, b"hello"))
    assert link.read_udp() == (DATAGRAMS, [(1000, b"hello")])
    still_serves(end)
    assert udp_echo.seen == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "224.0.0.1", "[ff02::1]", "unspecified.example", "multicast.example"])
def test_23_unspecified_and_multicast_addresses(served, watched, resolver, host):
    """Connecting to the unspecified address reaches loopback."""
    names = resolver(unspecified_example=["0.0.0.0"], multicast_example=["224.0.0.1"])
    end = served(env=names.environment)
    link = end.link()
    link.send_open(TCP, "%s:%s" % (host, watched.address.rpartition(":")[2]))
    read_error(link)
    still_serves(end)
    assert watched.accepted == 0


def refusal(end, target):
    link = end.link()
    link.send_open(TCP, target)
    return read_error(link)


def test_24_an_allowed_name_that_resolves_to_loopback_or_link_local(served, watched, resolver):
    names = resolver(
        loopback_example=["127.0.0.1"], other_loopback_example=["127.8.8.8"], six_example=["::1"], mapped_example=["::ffff:127.0.0.1"],
        local_example=["169.254.169.254"], localsix_example=["fe80::1"], mappedlocal_example=["::ffff:169.254.169.254"], localhost=["127.0.0.1"])
    end = served("-r", r"[a-z.]*\.example|localhost", env=names.environment, host="localhost")
    port = watched.address.rpartition(":")[2]
    common = refusal(end, "forbidden.test:%s" % port)
    assert "forbidden.test" not in names.lookups
    for name in ("loopback", "other.loopback", "six", "mapped", "local", "localsix", "mappedlocal"):
        error = refusal(end, "%s.example:%s" % (name, port))
        assert (error.code, error.text) == (common.code, common.text), name
        assert "%s.example" % name in names.lookups
    # The regex never goes to a client.
    assert "[a-z" not in common.text
    # A literal address is no way round either; and localhost, by its own name, is allowed.
    assert refusal(end, watched.address).text == common.text
    still_serves(end)
    assert watched.accepted == 0


def test_24_the_address_may_be_allowed_too(served, resolver):
    names = resolver(loopback_example=["127.0.0.1"])
    still_serves(served("-r", r"loopback\.example|127\.0\.0\.1", env=names.environment, host="loopback.example"))


def test_24_a_regex_must_match_the_whole(served, watched):
    end = served("-r", r"localhost", host="localhost")
    common = refusal(end, watched.address)
    for host in ("xlocalhost", "localhost.test", "localhost.localhost"):
        assert refusal(end, "%s:%s" % (host, watched.address.rpartition(":")[2])).text == common.text
    still_serves(end)
    assert watched.accepted == 0


def authorize(keys, *clients):
    keys.server.write("authorized_keys", "".join(client.public + "\n" for client in clients))


def test_25_a_key_removed_during_a_stream(served, watched, tmp_path, target):
    end = served()
    other = make_keys(tmp_path / "other")
    authorize(end.keys, end.keys.client, other)
    removed, staying = end.link(seed_of(other)), end.link()
    idle, udp = end.link(seed_of(other)), end.link(seed_of(other)).open_udp()
    removed.open(watched.address).wait_opened()
    stream = staying.open(end.address)
    stream.wait_opened()
    authorize(end.keys, end.keys.client)
    for link in (removed, idle, udp):
        assert {record.type for record in link.read_to_end()} <= {ERROR, KEEPALIVE, CLOSE, OPENED}
    watched.assert_reset()
    # One line for all of its links, in place of one each.
    end.program.wait_for("WARN The client's key `%s` is not in authorized_keys any more: 3 links of it ended" % other.public)
    assert not [line for line in end.program.lines if "idle link" in line and "ERROR" in line]
    refused = end.client(seed_of(other)).begin_handshake()
    assert_refused(refused)
    # Another key's stream was not touched.
    stream.send(b"hello")
    assert stream.receive() == b"hello"
    stream.finish()
    still_serves(end)


def test_25_a_key_whose_line_expires_during_a_stream(served, watched, tmp_path):
    """It is said to be that, at both ends: adding the line again would not help."""
    end = served()
    other = make_keys(tmp_path / "other")
    authorize(end.keys, end.keys.client, other)
    end.link(seed_of(other)).open(watched.address).wait_opened()
    end.keys.server.write("authorized_keys", '%s\n%s expires="2020-01-01"\n' % (end.keys.client.public, other.public))
    watched.assert_reset()
    end.program.wait_for("WARN The client's key `%s` has expired: 1 link of it ended" % other.public)
    with pytest.raises(peer.PeerError, match="line 2 of the server's authorized_keys is this client's, and has expired"):
        end.client(seed_of(other)).handshake()



@pytest.mark.parametrize("how", ["gone", "a folder", "a loop"])
def test_26_authorized_keys_unreadable(served, watched, how):
    end = served()
    path = end.keys.server.path / "authorized_keys"
    text = path.read_text()
    link = end.link()
    link.open(watched.address).wait_opened()
    path.unlink()
    # Taking the permission away would not stop a test that runs as root.
    if how == "a folder":
        path.mkdir()
    elif how == "a loop":
        path.symlink_to(path)
    assert_refused(end.client().begin_handshake())
    assert {record.type for record in link.read_to_end()} <= {ERROR, KEEPALIVE}
    watched.assert_reset()
    assert end.program.process.poll() is None
    if how == "a folder":
        path.rmdir()
    elif how == "a loop":
        path.unlink()
    path.write_text(text)
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 27-29: UDP


SESSIONS = 100_000
SESSIONS_OF_A_LINK = 256


def udp_round(link, number, data):
    link.datagrams((number, data))
    assert link.read_udp() == (DATAGRAMS, [(number, data)])


def flood_sessions(link, target):
    for start in range(1, SESSIONS + 1, 1000):
        link.send(b"".join(seal(link, SESSION, encode_session(number, target)) for number in range(start, start + 1000)))
    link.send_record(DATAGRAMS, peer.encode_datagrams([(SESSIONS, b"last")]))


@pytest.mark.timeout(300)
def test_27_100000_new_udp_sessions(served, udp_echo, tmp_path):
    end = served("--max-udp-sessions-per-link", str(SESSIONS_OF_A_LINK))
    other = make_keys(tmp_path / "other")
    end.keys.server.trust(other, "authorized_keys")
    target = "127.0.0.1:%d" % udp_echo.port
    quiet, loud = end.link(seed_of(other)).open_udp(), end.link().open_udp()
    quiet.session(1, target)
    udp_round(quiet, 1, b"before")
    loud.sock.settimeout(4 * PATIENCE)
    threading.Thread(target=flood_sessions, args=(loud, target), daemon=True).start()
    over = 0
    while True:
        kind, value = loud.read_udp()
        if kind == DATAGRAMS:
            break
        over += 1
        if over % 10_000 == 0:
            # The session from before, by its number: it was not evicted.
            udp_round(quiet, 1, b"during %d" % over)
    # The last session lives, so at most the cap's others do; each of the rest was said to be over.
    assert value == [(SESSIONS, b"last")]
    assert SESSIONS - SESSIONS_OF_A_LINK <= over < SESSIONS
    if sys.platform.startswith("linux"):
        assert len(os.listdir("/proc/%d/fd" % end.program.process.pid)) < 2 * SESSIONS_OF_A_LINK
    udp_round(quiet, 1, b"after")
    still_serves(end)


def udp_originator(end):
    sock = end.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", end.evil))
    return sock


def ask(sock, data):
    sock.send(data)
    return sock.recv(65536)


def read_first_datagram(link):
    """The session's number and the bytes of the client's first datagram."""
    kind, (number, _, _) = link.read_udp()
    assert kind == SESSION
    kind, ((same, data),) = link.read_udp()
    assert (kind, same) == (DATAGRAMS, number)
    return number, data


def test_28_datagram_of_an_unknown_session_to_the_client(connected):
    def misbehave(stream):
        link = stream.link
        link.send_record(OPENED, b"\x00")
        number, data = read_first_datagram(link)
        link.send_record(SESSION_OVER, peer.encode_session_over(number + 1000))
        # The stray ones stand before the true one: had they been delivered, they would have come first.
        link.datagrams((number + 1000, b"stray"), (0, b"stray"), (2**32 - 1, b"stray"), (number, data))
        assert link.read_udp() == (DATAGRAMS, [(number, b"two")])
        link.datagrams((number + 1, b"stray"), (number, b"two"))
    end, _ = connected(None, evil_udp=misbehave)
    sock = udp_originator(end)
    assert ask(sock, b"one") == b"one"
    assert ask(sock, b"two") == b"two"
    still_serves(end)


def test_28_datagram_of_an_unknown_session_to_the_server(served, udp_echo):
    end = served()
    link = end.link().open_udp()
    link.datagrams((7, b"stray"))
    link.session_over(8)
    link.session(1, "127.0.0.1:%d" % udp_echo.port)
    link.datagrams((7, b"stray"), (1, b"hello"), (0, b""))
    assert link.read_udp() == (DATAGRAMS, [(1, b"hello")])
    link.session_over(1)
    link.datagrams((1, b"stray"))
    link.session(2, "127.0.0.1:%d" % udp_echo.port)
    udp_round(link, 2, b"again")
    still_serves(end)
    assert udp_echo.seen == 2


BAD_DATAGRAMS = {
    "length past the record": struct.pack(">IH", 1, 10) + b"short",
    "one byte past the record": struct.pack(">IH", 1, 6) + b"short",
    "the second past the record": peer.encode_datagrams([(1, b"first")]) + struct.pack(">IH", 1, 65535),
    "header cut short": struct.pack(">IH", 1, 10)[:5],
    "a byte after the last": peer.encode_datagrams([(1, b"first")]) + b"\x00",
}


@pytest.mark.parametrize("how", BAD_DATAGRAMS)
def test_29_a_datagram_past_its_record_to_the_server(served, udp_echo, how):
    end = served()
    link = end.link().open_udp()
    link.session(1, "127.0.0.1:%d" % udp_echo.port)
    udp_round(link, 1, b"hello")
    link.send_record(DATAGRAMS, BAD_DATAGRAMS[how])
    # A first datagram that was good may have been carried before the second was looked at.
    assert_ended(link, (ERROR, KEEPALIVE, DATAGRAMS))
    still_serves(end)


@pytest.mark.parametrize("how", BAD_DATAGRAMS)
def test_29_a_datagram_past_its_record_to_the_client(connected, how):
    links = []

    def misbehave(stream):
        links.append(stream.link)
        if len(links) > 1:
            return peer.serve_udp(stream)
        stream.link.send_record(OPENED, b"\x00")
        read_first_datagram(stream.link)
        # Number 9 is never the client's, so that a good first datagram goes nowhere.
        stream.link.send_record(DATAGRAMS, BAD_DATAGRAMS[how].replace(struct.pack(">I", 1), struct.pack(">I", 9)))
    end, evil = connected(None, evil_udp=misbehave)
    sock = udp_originator(end)
    sock.send(b"one")
    evil.end()
    # The link is gone and the socket of the originator is not: its next datagram makes a new session on a new link.
    assert ask(sock, b"two") == b"two"
    assert len(links) == 2
    still_serves(end)


@pytest.mark.parametrize("content", [
    b"", b"\x00\x00", encode_session(5, "a:1")[:4], encode_session(5, "a:1")[:-1], encode_session(5, "a:1") + b"x", encode_session(5, b"\xff\xfe"),
], ids=bytes.hex)
def test_29_a_session_that_cannot_be(served, content):
    end = served()
    link = end.link().open_udp()
    link.send_record(SESSION, content)
    assert_ended(link, (OPENED, ERROR, KEEPALIVE))
    still_serves(end)


def test_29_a_session_number_used_twice(served, udp_echo):
    """The client never uses a number twice on a link; a server that took it would leak the first socket, or answer the wrong one."""
    end = served()
    link = end.link().open_udp()
    link.session(1, "127.0.0.1:%d" % udp_echo.port)
    udp_round(link, 1, b"hello")
    link.session(1, "127.0.0.1:%d" % udp_echo.port)
    assert_ended(link)
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 30-33: resources


class Flood:
    """Far more than every buffer on the way: Data, and Keepalive between. run(stream) blocks until all of it went out."""

    CHUNKS, KEEPALIVES = 512, 100

    def __init__(self):
        self.progress = 0
        self.done = threading.Event()

    @property
    def size(self):
        return self.CHUNKS * peer.CHUNK

    def run(self, stream):
        data = bytes(peer.CHUNK)
        with contextlib.suppress(OSError):
            for _ in range(self.CHUNKS):
                stream.send(data)
                stream.link.send(b"".join(seal(stream.link, KEEPALIVE) for _ in range(self.KEEPALIVES)))
                self.progress += 1
            stream.end()
        self.done.set()

    def start(self, stream):
        threading.Thread(target=self.run, args=(stream,), daemon=True).start()

    def until_stuck(self, end):
        """Until nothing more leaves while `end` does other work again and again; or, where nothing holds it back, until all has left."""
        rounds = 0
        while rounds < 10 and not self.done.is_set():
            before = self.progress
            still_serves(end)
            rounds = rounds + 1 if self.progress == before else 0


def stalled(ready, sizes):
    """A target that reads nothing until `ready`, then everything."""
    def handle(connection):
        assert ready.wait(10 * PATIENCE)
        sizes.put(len(receive_all(connection)))
    return handle


MEMORY = 16 << 20


def slow_stream(end, target, ready, sizes):
    link = end.link()
    link.sock.settimeout(10 * PATIENCE)
    stream = link.open("127.0.0.1:%d" % target(stalled(ready, sizes)).port)
    stream.wait_opened()
    return stream


def read_at_last(end, stream, ready, sizes, flood):
    """The target of slow_stream reads, and has all that the flood sent."""
    ready.set()
    assert sizes.get(timeout=4 * PATIENCE) == flood.size
    assert stream.receive_all() == b""
    stream.over()
    still_serves(end)


@linux
def test_30_keepalive_flood_while_the_server_does_not_read(served, target):
    end = served()
    ready, sizes, flood = threading.Event(), queue.Queue(), Flood()
    stream = slow_stream(end, target, ready, sizes)
    before = memory_before(end.program)
    flood.start(stream)
    flood.until_stuck(end)
    assert peak_growth(end.program, before) < MEMORY
    read_at_last(end, stream, ready, sizes, flood)


@linux
def test_30_keepalive_flood_while_the_client_does_not_read(connected):
    flood = Flood()

    def misbehave(stream):
        opened_with_data(stream)
        flood.run(stream)
        stream.finish()
        return WELL
    end, _ = connected(misbehave)
    connection = end.originate()
    assert receive_exactly(connection, 5) == b"hello"
    before = memory_before(end.program)
    flood.until_stuck(end)
    assert peak_growth(end.program, before) < MEMORY
    connection.settimeout(4 * PATIENCE)
    connection.shutdown(socket.SHUT_WR)
    assert len(receive_all(connection)) == flood.size
    still_serves(end)


@linux
def test_30_keepalive_flood_from_a_client_that_does_not_read(served):
    """Nothing answers Keepalive: there is nothing that could pile up."""
    end = served()
    link = end.link()
    before = memory_before(end.program)
    for _ in range(200):
        link.send(b"".join(seal(link, KEEPALIVE) for _ in range(1000)))
    assert link.exchange(end.address, b"hello") == b"hello"
    assert peak_growth(end.program, before) < MEMORY
    still_serves(end)


def count_keepalives(link, n):
    """Reads n Keepalives: one comes every 20 s."""
    for _ in range(n):
        assert link.read_any_record().type == KEEPALIVE


@long
@pytest.mark.timeout(600)
def test_31_a_target_stalled_for_120_s(served, target):
    end = served()
    ready, sizes, flood = threading.Event(), queue.Queue(), Flood()
    stream = slow_stream(end, target, ready, sizes)
    flood.start(stream)
    flood.until_stuck(end)
    assert not flood.done.is_set()
    count_keepalives(stream.link, 6)
    read_at_last(end, stream, ready, sizes, flood)


@long
@pytest.mark.timeout(600)
def test_31_an_originator_stalled_for_120_s(connected):
    flood, patient = Flood(), threading.Event()

    def misbehave(stream):
        stream.link.sock.settimeout(10 * PATIENCE)
        opened_with_data(stream)
        flood.start(stream)
        count_keepalives(stream.link, 6)
        patient.set()
        flood.done.wait(4 * PATIENCE)
        stream.finish()
        return WELL
    end, _ = connected(misbehave)
    connection = end.originate()
    assert patient.wait(10 * PATIENCE)
    assert not flood.done.is_set()
    connection.settimeout(4 * PATIENCE)
    connection.shutdown(socket.SHUT_WR)
    assert len(receive_all(connection)) == len(b"hello") + flood.size
    still_serves(end)


def test_32_a_look_up_that_hangs(served, resolver, tmp_path):
    names = resolver(resolved_example=["127.0.0.1"])
    end = served(env=names.environment)
    other = make_keys(tmp_path / "other")
    end.keys.server.trust(other, "authorized_keys")
    moving = end.link().open(end.address)
    moving.wait_opened()
    # As many as one key's look-ups may be under way at once, and some more; the tenth of a UDP session.
    hanging = [end.link() for _ in range(9)]
    for link in hanging:
        link.send_open(TCP, "hang.example:80")
    udp = end.link().open_udp()
    udp.session(1, "hang.example:80")
    # An open stream, a new one to an address, and another key's name.
    for _ in range(10):
        moving.send(b"hello")
        assert moving.receive() == b"hello"
        still_serves(end)
        with end.link(seed_of(other)) as link:
            assert link.exchange("resolved.example:%d" % end.target.port, b"hello") == b"hello"
    assert "hang.example" in names.lookups
    # The time for look-up and connect is over at last.
    for link in hanging:
        read_error(link)
    moving.finish()
    still_serves(end)


def lowest_free_descriptor(pid):
    used = {int(name) for name in os.listdir("/proc/%d/fd" % pid)}
    return next(number for number in range(len(used) + 1) if number not in used)


def cpu_seconds(pid):
    fields = pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@linux
def test_33_descriptors_exhausted(served):
    import resource
    end = served()
    pid = end.program.process.pid
    stream = end.link().open(end.address)
    stream.wait_opened()
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # From here on the process cannot open anything, and what it has open works.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid), limits[1]))
    waiting = [end.client() for _ in range(3)]
    waiting[0].send(OPENING)
    stream.send(b"hello")
    assert stream.receive() == b"hello"
    # A spin can only be seen over time. It takes what the machine gives it; a pause takes nothing.
    start, used = time.monotonic(), cpu_seconds(pid)
    time.sleep(1)
    assert cpu_seconds(pid) - used < (time.monotonic() - start) / 10
    stream.send(b"hello")
    assert stream.receive() == b"hello"
    assert len([line for line in end.program.lines if re.search("descriptor|too many open files", line, re.I)]) <= 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    # Who waited in the meantime is served as well.
    waiting[0].send_message(waiting[0].client_preamble())
    waiting[0].read_server_preamble()
    for client in waiting[1:]:
        assert client.handshake().exchange(end.address, b"waited") == b"waited"
    stream.finish()
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 34: text


def assert_harmless(program):
    check_output(program)
    assert not re.search("A{201}", program.output)


@pytest.mark.parametrize("code, exit_code", [(peer.INVALID_KEY, AUTHENTICATION_FAILED), (peer.UNKNOWN, None)])
def test_34_escape_codes_in_a_refusal(connect, impostor, code, exit_code):
    fake = impostor(lambda server: server.begin_handshake().fail(code, hostile_text))
    program = connect(fake.port)
    assert_client_gives_up(program, exit_code)
    assert "marker-before" in program.output
    assert_harmless(program)


def test_34_escape_codes_in_a_version(connect, impostor):
    fake = impostor(lambda server: (server.begin_handshake(), server.send_completion(hostile_text)))
    program = connect(fake.port, "-v")
    program.wait()
    assert_harmless(program)


def test_34_escape_codes_in_the_error_of_a_stream(connected):
    def misbehave(stream):
        first_data(stream)
        stream.link.send_error(peer.REMOTE_FAILED, hostile_text)
        fin(stream.link)
    end, _ = connected(misbehave, "-v")
    assert was_reset(end.originate())
    end.program.wait_for("marker-before")
    assert_harmless(end.program)
    still_serves(end)


def test_34_escape_codes_in_opened(connected):
    end, _ = connected(lambda stream: (stream.opened(hostile_text), stream.finish(), WELL)[-1], "-v")
    connection = end.originate()
    connection.shutdown(socket.SHUT_WR)
    assert receive_all(connection) == b""
    assert_harmless(end.program)
    still_serves(end)


def test_34_escape_codes_in_session_over(connected):
    def misbehave(stream):
        stream.link.send_record(OPENED, b"\x00")
        number, _ = read_first_datagram(stream.link)
        stream.link.session_over(number, peer.REMOTE_FAILED, hostile_text)
    end, _ = connected(None, "-v", evil_udp=misbehave)
    udp_originator(end).send(b"one")
    end.program.wait_for("marker-before")
    assert_harmless(end.program)
    still_serves(end)


def test_34_escape_codes_from_a_client(served, watched):
    end = served("-v")
    link = end.link()
    link.open(watched.address).wait_opened()
    link.send_error(peer.REMOTE_FAILED, hostile_text)
    fin(link)
    assert_ended(link)
    watched.assert_reset()
    end.program.wait_for("marker-before")
    for target in (hostile_text + ":80", "a:" + hostile_text, "unix:/" + hostile_text):
        link = end.link()
        link.send_open(TCP, target)
        read_error(link)
    udp = end.link().open_udp()
    udp.session(1, hostile_text + ":80")
    assert udp.read_udp()[0] == SESSION_OVER
    udp.session_over(9, peer.UNKNOWN, hostile_text)
    listen = end.link()
    listen.send_open(LISTEN, hostile_text, b"instance")
    read_error(listen)
    assert_harmless(end.program)
    still_serves(end)
