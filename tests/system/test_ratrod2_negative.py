"""The negative tests of PROTOCOL.md that concern ratrod2, by their numbers there, over real sockets: the real `serve` or `connect` against the
independent peer. Here is what the programs then do, by a sample; the whole tables are walked in unit (test_core.py, test_core_handshake.py,
test_core_keys.py, test_core_grants.py). The missing numbers: 3 is legacy's, 24 and 34 are in peers/test_names.py,
31 in unit/test_states.py, 33 in test_descriptors.py.
"""

import contextlib
import errno
import os
import queue
import select
import selectors
import socket
import struct
import sys
import threading

import pytest

from support import ratrod2_peer as peer
from support.keys import base64url, identity_of, make_keys, seed_of
from support.pressure import LONG, memory_before, peak_growth
from support.programs import AUTHENTICATION_FAILED, PATIENCE, READY
from support.ratrod2_peer import DATA, DATAGRAMS, ERROR, KEEPALIVE, OPEN, OPENED, OPENING, SESSION, TCP, PeerError, encode_session, receive_to_end
from support.rows import row
from support.scripted import Scripted
from support.sockets import eventually, is_ready, receive_all, receive_exactly

SHORT_HANDSHAKE = ("--handshake-timeout", "1")
RESETS = ("--resume", "0")  # where a link is lost the stream on it is reset

MESSAGE_2 = 137
STOLEN = b"\x5a" * 32
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

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
        return self.stack.enter_context(peer.Client.connect(self.port, seed or seed_of(self.keys.client), **options))

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

    def __init__(self, keys, evil, evil_udp):
        self._keys = keys
        self._evil = evil
        self._evil_udp = evil_udp
        self.ends = queue.Queue()
        self.problems = []

    def handle(self, connection):
        connection.settimeout(4 * PATIENCE)
        server = peer.Server(connection, seed_of(self._keys.server), authorized=[identity_of(self._keys.client)])
        try:
            server.handshake().serve_streams(self._dispatch)
        except PeerError:
            # A client may fail a stream: its originator may be gone.
            pass
        except peer.ProtocolError as error:
            self.problems.append(error)
        finally:
            # The test's process still has the socket in its Target: without this a thread that still sends would keep the link open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _dispatch(self, stream):
        evil = self._evil_udp if stream.kind == peer.UDP else self._evil if stream.target == "evil:1" else None
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
        def launch(evil, *flags, evil_udp=None):
            evil_server = EvilServer(keys, evil, evil_udp)
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
            self._behave(peer.Server(connection, seed_of(self._keys.server), **self._options))
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


def assert_ended(link, allowed=(ERROR, KEEPALIVE, peer.ACK)):
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
    assert len(seen) == 1 and seen[0].startswith(OPENING), "it tried again"


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
    with contextlib.suppress(peer.ProtocolError, peer.LinkEnded):
        client.read_server_preamble()
        raise AssertionError("it takes message 1 with byte %d flipped" % at)
    client.send_message(b"\x00" * 96)  # what this client would have said next, made with a wrong transcript


def test_handshakes_of_clients_that_are_not_answered(served):
    """4: flipped bytes. 6: a list without suite 2. 7: keys of small order; the attacker computes all keys, so that a record of a server that went
    on would be read. 8: what is no identity, or not the one of the static key. 11: lengths that cannot be."""
    end = served()
    point = peer.SMALL_ORDER_POINTS[0]
    rows = [
        ("4: opening", {}, lambda client: client.send(flip(OPENING, 7) + framed(client.client_preamble()))),
        *(("4: message 1, %d" % at, {"suites": (1, 2)}, lambda client, at=at: flipped_1(client, at)) for at in (0, 34)),
        ("4: message 3", {}, lambda client: say_3(client, lambda message: flip(message, 95))),
        ("6", {}, lambda client: (client.send(OPENING), client.send_message(client.client_preamble(b"\x01\x01")))),
        ("7: e", {"ephemeral": peer.odd_keypair(point), "attacker": True}, say_1),
        ("7: s", {"static": peer.odd_keypair(point), "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}, say_3),
        ("8: another key's", {"static": STOLEN}, say_3),
        *(("8: %r" % claimed, {"claimed": claimed}, say_3) for claimed in (b"\xff" * 32, b"")),
        ("11: message 1", {}, lambda client: say_1(client, length=0)),
        ("11: message 3", {}, lambda client: say_3(client, length=65535)),
    ]
    for name, options, say in rows:
        with row(name):
            client = end.client(**options)
            say(client)
            assert_no_answer(client)
    # 9: -P has P's X25519 form, and P's owner can compute with it; but it is not what the list names.
    assert_refused(end.client(claimed=peer.negative(identity_of(end.keys.client))).begin_handshake())
    still_serves(end)


def up_to_server_preamble(server, change=lambda message: message, **wrong):
    server.read_opening()
    server.read_client_preamble()
    server.send_message(change(server.server_preamble()), **wrong)


def says_suite(suite_id):
    def behave(server):
        server.read_opening()
        server.read_client_preamble()
        server.send_message(server.server_preamble(server.identity.public + bytes([suite_id]) + server.instance))
    return behave


# Each: (the server's keys) -> options of the impostor, what it does, flags of the client, its exit code where it must be that one. With -a what
# stops the client is the key, not known_hosts.
BAD_SERVERS = {
    "4: message 2 flipped": lambda keys: ({}, lambda server: up_to_server_preamble(server, lambda message: flip(message, 80)), (), None),
    "5: a suite that was not offered": lambda keys: ({}, says_suite(3), (), None),
    "7: s of small order": lambda keys: ({"static": peer.odd_keypair(peer.SMALL_ORDER_POINTS[0]), "claimed": peer.SMALL_ORDER_IDENTITY,
                                          "attacker": True}, up_to_server_preamble, ("-a",), None),
    "8: another key's": lambda keys: ({"static": STOLEN}, up_to_server_preamble, ("-a",), None),
    "9: the negative of a known server": lambda keys: (
        {"claimed": peer.negative(identity_of(keys))}, up_to_server_preamble, (), AUTHENTICATION_FAILED),
    "11: length 65535": lambda keys: ({}, lambda server: up_to_server_preamble(server, length=65535), (), None),
}


@pytest.mark.parametrize("how", BAD_SERVERS)
def test_handshakes_of_servers_that_get_no_message_3(connect, impostor, keys, how):
    options, behave, flags, code = BAD_SERVERS[how](keys.server)
    fake = impostor(behave, **options)
    assert_client_gives_up(connect(fake.port, *flags), code)
    fake.assert_client_said_nothing_more()


@pytest.mark.parametrize("lines, known", [
    ("{server}\n{other} 127.0.0.1:{port}\n", False), ("{server} 127.0.0.1:{port}\n", True),
], ids=["bound to another key", "bound"])
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
        client.send_record(peer.END)
        assert_refused(client)
    udp = end.client(STOLEN).begin_handshake()
    udp.send_open(peer.UDP)
    udp.send_record(SESSION, encode_session(1, "pipelined.example:53"))
    assert_refused(udp)
    # A stream of somebody authorized passes through all the same steps: what the server did not do before it, it will not do.
    still_serves(end)
    assert watched.accepted == 0
    assert "pipelined.example" not in names.lookups


def test_14_a_whole_session_replayed_to_a_server(served):
    end = served()
    recorded = end.link(wrap=peer.Recorder)
    assert recorded.exchange(end.address, b"hello") == b"hello"
    recorded.finish()
    accepted = end.target.accepted
    sock = end.socket()
    sock.sendall(recorded.sock.sent)
    # A fresh ServerPreamble, and the end.
    assert len(receive_to_end(sock)) in (0, 2 + MESSAGE_2)
    still_serves(end)
    assert end.target.accepted == accepted + 1


# ---------------------------------------------------------------------------------------------------- 15-16: records


def seal(link, *record, **wrong):
    return link.writer.seal(*record, **wrong)


# Each: (the link, its first Data as it went out, a record of the other end as it came) -> what is sent next. The last ones are well sealed, but
# hold too much or too little.
TAMPERED = {
    "replayed": lambda link, ours, theirs: ours,
    "one left out": lambda link, ours, theirs: seal(link, DATA, b"b", number=link.writer.number + 1),
    "reflected": lambda link, ours, theirs: theirs,
    "last byte of the tag": lambda link, ours, theirs: flip(seal(link, DATA, b"x" * 100), 4 + 100 + link.suite.tag_length),
    "length 0": lambda link, ours, theirs: bytes(68),
    "length 2^32 - 1": lambda link, ours, theirs: b"\xff" * 68,
    "empty Data": lambda link, ours, theirs: seal(link, DATA),
    "Ack with bytes left over": lambda link, ours, theirs: seal(link, peer.ACK, bytes(9)),
    "Keepalive of 2 KiB": lambda link, ours, theirs: seal(link, KEEPALIVE, bytes(2048)),
    "Error cut short": lambda link, ours, theirs: seal(link, ERROR, b"\x03\x05abc"),
}


def send_tampered(link, ours, theirs, how):
    with contextlib.suppress(ConnectionError):
        link.send(TAMPERED[how](link, ours, theirs))


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


def test_15_16_records_to_the_server_that_spoil_the_link(served, watched):
    """Neither end resumes here: the stream is reset. How it goes on over another link is in test_outlive.py."""
    end = served(*RESETS)
    for how in TAMPERED:
        with row(how):
            link = end.link()
            link.open(watched.address)
            theirs = link.read_record()
            assert theirs.type == OPENED
            send_tampered(link, link.send_record(DATA, b"hello"), theirs.wire, how)
            assert_ended(link)
            watched.assert_reset()
    still_serves(end)


def test_15_16_records_to_the_client_that_spoil_the_link(connected):
    end, evil = connected(lambda stream: send_tampered(stream.link, *opened_with_data(stream), how), *RESETS)
    for how in TAMPERED:
        with row(how):
            assert was_reset(end.originate())
            evil.end()
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
    "FIN after our End": lambda link: (link.send_record(peer.END), fin(link)),
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


ANOTHER_OPEN = OPEN, peer.encode_open(TCP, "127.0.0.1:1")
SOME_DATA = DATA, b"x"
AN_END = peer.END, b""
AN_OVER = peer.OVER, b""
AN_OPENED = OPENED, peer.encode_opened()
AN_ACK = peer.ACK, peer.encode_ack(0)
AN_ABANDON = peer.ABANDON, bytes(16)
A_COMPLETION = peer.HANDSHAKE_COMPLETION, b"\x01v"
A_SESSION = SESSION, encode_session(1, "127.0.0.1:1")
SOME_DATAGRAMS = DATAGRAMS, peer.encode_datagrams([(1, b"x")])
A_SESSION_OVER = peer.SESSION_OVER, peer.encode_session_over(1)
A_SESSION_ADDRESS = peer.SESSION_ADDRESS, peer.encode_session_address(1, "127.0.0.1:1")
A_CLOSE = peer.CLOSE, b""
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
BAD_OPENS = {"empty Open": (OPEN, b""), "Open of kind 4": (OPEN, peer.encode_open(4)), "Open cut short": (OPEN, peer.encode_open(TCP, "a:1")[:-1]),
             "Abandon cut short": (peer.ABANDON, bytes(15))}
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
        for how, record in {**WRONG_WHEN_IDLE, **BAD_OPENS, "Close": A_CLOSE, "Ack": (peer.ACK, peer.encode_ack(1000))}.items():
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
    opens = {"Open of kind %d" % kind: (OPEN, peer.encode_open(kind, "127.0.0.1:1", instance)) for kind, instance in (
        (TCP, b""), (peer.UDP, b""), (peer.LISTEN, b"instance"))}
    end, evil = connected(misbehave)
    for how, record in {**WRONG_WHEN_IDLE, **opens, "Ack": AN_ACK, "Abandon": AN_ABANDON}.items():
        with row(how):
            connection = end.originate()
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"hello"
            assert {record.type for record in evil.end()} <= {KEEPALIVE, peer.ACK, ERROR}
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 20-21: Listen links


class Reversed:
    """A real client with a reverse tunnel to the echo, whose server is the peer. `links` gets its Listen links, granted."""

    def __init__(self, keys, target):
        self._over = threading.Event()
        self.links = queue.Queue()
        self._server = Scripted(keys, target, self._behave)
        self.port, self.check = self._server.port, self._server.check

    def _behave(self, link, _number):
        stream = link.accept()
        if stream and stream.kind == peer.LISTEN:
            link.grant_listen("127.0.0.1:40123")
            self.links.put(link)
            self._over.wait(4 * PATIENCE)

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
    end.check()


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
    end.check()


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


def test_21_a_listen_link_serves_no_other_client(served, second):
    """Neither where the other has no link that waits, nor where it has none at all any more."""
    end = served("--allow-listen", "--connect-timeout", "2")
    mine, theirs = end.link(), end.link(seed_of(second))
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
def test_21_a_listen_link_of_another_key_joins_no_pool(served, second, instance):
    """Not even with the right address and instance."""
    end = served("--allow-listen")
    mine = end.link()
    address = mine.listen("127.0.0.1:0", b"instance")
    theirs = end.link(seed_of(second))
    theirs.send_open(peer.LISTEN, address, instance)
    assert read_error(theirs).text
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            answer(mine, originator(stack, address))
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 22-26: policy


@pytest.mark.parametrize("options", ["", 'permitlisten="127.0.0.1:*"'])
def test_22_listen_without_permission(served, options):
    """A key's own permission does not make up for the server's."""
    end = served()
    end.keys.server.write("authorized_keys", "%s %s\n" % (end.keys.client.public, options))
    assert refusal_of(end, peer.LISTEN, "127.0.0.1:0", b"instance")[1]
    still_serves(end)


def refusal_of(end, kind, target, instance=b""):
    link = end.link()
    link.send_open(kind, target, instance)
    error = read_error(link)
    return error.code, error.text


MALFORMED_TARGETS = ["127.0.0.1:{port}\n", "127.1:{port}", "2130706433:{port}", "127\u30020.0.1:{port}", "127.0.0.1:0{port}", ":{port}", "::1:{port}",
                     "[::1%1]:{port}", "user@127.0.0.1:{port}", "unix:/nowhere", "0.0.0.0:{port}", "[::ffff:0.0.0.0]:{port}", "224.0.0.1:{port}"]


def test_23_targets_that_are_malformed(served, watched, resolver):
    names = resolver(resolved_example=["127.0.0.1"])
    end = served(env=names.environment, host="resolved.example")
    still_serves(end)
    assert "resolved.example" in names.lookups, "this test would not see a look-up"
    port = int(watched.address.rpartition(":")[2])
    for pattern in MALFORMED_TARGETS:
        target = pattern.format(port=port)
        lookups = names.lookups
        assert refusal_of(end, TCP, target)[1], "no text for %r" % target
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
        assert (kind, over) == (peer.SESSION_OVER, number) and text
    assert names.lookups == lookups
    link.session(1000, "127.0.0.1:%d" % udp_echo.port)
    link.datagrams((1000, b"hello"))
    assert link.read_udp() == (DATAGRAMS, [(1000, b"hello")])
    still_serves(end)
    assert udp_echo.seen == 1


def test_25_a_key_removed_during_a_stream(served, watched, second):
    end, other = served(), second
    removed, staying = end.link(seed_of(other)), end.link()
    idle, udp = end.link(seed_of(other)), end.link(seed_of(other)).open_udp()
    removed.open(watched.address).wait_opened()
    stream = staying.open(end.address)
    stream.wait_opened()
    end.keys.server.write("authorized_keys", end.keys.client.public + "\n")
    for link in (removed, idle, udp):
        assert {record.type for record in link.read_to_end()} <= {ERROR, KEEPALIVE, peer.CLOSE, OPENED}
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


SESSIONS = 100_000 if LONG else 10_000
SESSIONS_OF_A_LINK = 256


def udp_round(link, number, data):
    link.datagrams((number, data))
    assert link.read_udp() == (DATAGRAMS, [(number, data)])


def flood_sessions(link, target):
    for start in range(1, SESSIONS + 1, 1000):
        link.send(b"".join(seal(link, SESSION, encode_session(number, target)) for number in range(start, start + 1000)))
    link.send_record(DATAGRAMS, peer.encode_datagrams([(SESSIONS, b"last")]))


@pytest.mark.timeout(900)
def test_27_many_new_udp_sessions(served, udp_echo, second):
    end = served("--max-udp-sessions-per-link", str(SESSIONS_OF_A_LINK))
    target = "127.0.0.1:%d" % udp_echo.port
    quiet, loud = end.link(seed_of(second)).open_udp(), end.link().open_udp()
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
        if over % (SESSIONS // 10) == 0:
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
        link.send_record(peer.SESSION_OVER, peer.encode_session_over(number + 1000))
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
    "the second past the record": peer.encode_datagrams([(1, b"first")]) + struct.pack(">IH", 1, 65535),
    "a byte after the last": peer.encode_datagrams([(1, b"first")]) + b"\x00",
}


def test_29_what_ends_a_udp_link_of_the_server(served, udp_echo):
    """Datagrams that do not fit their record, a Session that cannot be, and a number used twice: a server that took that would leak the first socket,
    or answer the wrong one."""
    end = served()
    address = "127.0.0.1:%d" % udp_echo.port
    rows = [*((DATAGRAMS, content) for content in BAD_DATAGRAMS.values()), (SESSION, b"\x00\x00"), (SESSION, encode_session(5, "a:1") + b"x"),
            (SESSION, encode_session(1, address))]
    for record in rows:
        with row(record):
            link = end.link().open_udp()
            link.session(1, address)
            udp_round(link, 1, b"hello")
            link.send_record(*record)
            # A first datagram that was good may have been carried before the second was looked at.
            assert_ended(link, (ERROR, KEEPALIVE, DATAGRAMS))
    still_serves(end)


def test_29_a_datagram_past_its_record_to_the_client(connected):
    links = []

    def misbehave(stream):
        links.append(stream.link)
        if len(links) > 1:
            return peer.serve_udp(stream)
        stream.link.send_record(OPENED, b"\x00")
        read_first_datagram(stream.link)
        stream.link.send_record(DATAGRAMS, BAD_DATAGRAMS["length past the record"])
    end, evil = connected(None, evil_udp=misbehave)
    sock = udp_originator(end)
    sock.send(b"one")
    evil.end()
    # The link is gone and the socket of the originator is not: its next datagram makes a new session on a new link.
    assert ask(sock, b"two") == b"two"
    assert len(links) == 2
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


def test_32_a_look_up_that_hangs(served, resolver, second):
    names = resolver(resolved_example=["127.0.0.1"])
    end = served(env=names.environment)
    moving = end.link().open(end.address)
    moving.wait_opened()
    # More than the 32 connects that one key may have under way, and the look-up of a UDP session.
    hanging = [end.link() for _ in range(40)]
    for link in hanging:
        link.send_open(TCP, "hang.example:80")
    udp = end.link().open_udp()
    udp.session(1, "hang.example:80")
    # An open stream, a new one to an address, and a name, of this key and of another.
    for key in (seed_of(end.keys.client), seed_of(second)) * 5:
        moving.send(b"hello")
        assert moving.receive() == b"hello"
        still_serves(end)
        with end.link(key) as link:
            assert link.exchange("resolved.example:%d" % end.target.port, b"hello") == b"hello"
    assert names.lookups.count("hang.example") == 1
    # The time for look-up and connect is over at last.
    for link in hanging:
        read_error(link)
    moving.finish()
    still_serves(end)
