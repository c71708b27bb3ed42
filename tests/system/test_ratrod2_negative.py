"""PROTOCOL.md's negative tests of ratrod2, by their numbers: a sample of what the real `serve` and `connect` do against the independent peer.

The tables are walked in unit (test_core*.py, test_states.py: 14, 31), and other files have what belongs there: legacy's 3, test_host_keys.py 10,
test_reverse.py 20-22, peers/test_names.py 24 and 34, test_limits.py and test_harm.py 27, test_descriptors.py 33.
"""

import contextlib
import errno
import queue
import select
import selectors
import signal
import socket
import struct
import sys
import threading

import pytest

from support import ratrod2_peer as peer
from support.keys import base64url, identity_of, seed_of
from support.many_lines import run_each
from support.pressure import memory_before, peak_growth
from support.programs import PATIENCE
from support.ratrod2_peer import DATA, DATAGRAMS, END, ERROR, KEEPALIVE, OPEN, OPENED, OPENING, SESSION, TCP, UDP, PeerError, encode_session
from support.rows import row
from support.scripted import Scripted
from support.sockets import ask, ask_udp, dial, dial_udp, eventually, is_ready, receive_all

SHORT_HANDSHAKE = ("--handshake-timeout", "1")
RESETS = ("--resume", "0")  # where a link is lost the stream on it is reset
MESSAGE_2 = 137
STOLEN = b"\x5a" * 32


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


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


def still_serves(end):
    """The program under test (a Served or a Connected) still does its work, on a new connection."""
    end.work()
    assert end.program.process.poll() is None


@pytest.fixture(autouse=True)
def every_output(start, no_traceback):
    """The whole output of every program is checked once it has ended, whatever was done to it."""
    yield
    for program in start.programs:
        program.stop()
        odd = [line for line in program.lines if not line.replace("\t", " ").isprintable()]
        assert not odd, "control characters in the output: %r" % odd


class Served:
    """A real server, and a target that echoes; `host` is the target's name."""

    def __init__(self, program, port, keys, target, host, stack):
        self.program, self.port, self.keys, self.target, self.stack = program, port, keys, target, stack
        self.address = "%s:%d" % (host, target.port)

    def client(self, seed=None, **options):
        """A connected peer that has sent nothing yet."""
        return self.stack.enter_context(peer.Client.connect(self.port, seed or seed_of(self.keys.client), **options))

    def link(self, seed=None, **options):
        return self.client(seed, server=identity_of(self.keys.server), **options).handshake()

    def answer(self, data):
        """What comes on a connection that says only this."""
        with dial(self.port) as sock:
            sock.sendall(data)
            return peer.receive_to_end(sock)

    def work(self):
        with self.link() as link:
            assert link.exchange(self.address, b"still here") == b"still here"


@pytest.fixture
def served(serve, keys, tcp_echo, stack):
    """served(flags...) -> Served."""
    def launch(*flags, host="127.0.0.1", **options):
        made = Served(*serve(*flags, **options), keys, tcp_echo, host, stack)
        made.link()  # a source with an authorized link is not slowed down: a test may make many bad connections
        return made
    return launch


class Watched:
    """A target that reads nothing and tells of each of its connections how it ended."""

    def __init__(self, target):
        self._ends = queue.Queue()
        self.target = target(lambda connection: self._ends.put(how_it_ended(connection)))
        self.address = "127.0.0.1:%d" % self.target.port

    def assert_reset(self, after_end=False):
        error = self._ends.get(timeout=2 * PATIENCE)
        assert is_reset(error, after_end), "the target's connection was not reset, or ended cleanly before: %s" % errno.errorcode.get(error)


@pytest.fixture
def watched(target):
    return Watched(target)


class Connected:
    """A real client whose server is the peer, with a tunnel to `good:1`, which echoes, and one to `evil:1`: on a stream to there, or where
    `is_udp` on the UDP link, the peer does evil(stream) and nothing more. `ends` gets the records that still came up to the link's end."""

    def __init__(self, ratrod, keys, target, stack, evil, flags, is_udp):
        self._stack, self._evil, self._is_udp = stack, evil, is_udp
        self._ends = queue.Queue()
        server = Scripted(keys, target, lambda link, _number: link.serve_streams(self._dispatch))
        stack.callback(server.check)
        self.program = ratrod("-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % server.port, "0:good:1", "0:evil:1").ready()
        self.good, self.evil = (int(self.program.wait_for(r"\[TCP\] Listening on `.*?:(\d+)`.* to `%s:1`" % name).group(1))
                                for name in ("good", "evil"))

    def _dispatch(self, stream):
        if not (stream.kind == UDP if self._is_udp else stream.target == "evil:1"):
            return peer.serve(stream)
        try:
            self._evil(stream)
            self._ends.put(stream.link.read_to_end())
        except Exception as error:
            self._ends.put(error)
            raise
        raise peer.LinkEnded("after the evil step")

    def end(self):
        """What the client still sent on the link of an evil stream, once it has ended it."""
        end = self._ends.get(timeout=2 * PATIENCE)
        if isinstance(end, Exception):
            raise end
        return end

    def originate(self, first=b"hello"):
        """A new connection to the evil tunnel, which has sent `first`."""
        connection = self._stack.enter_context(dial(self.evil))
        connection.sendall(first)
        return connection

    def work(self):
        ask(self.good)


@pytest.fixture
def connected(ratrod, keys, target, stack):
    """connected(evil, flags..., is_udp=False) -> Connected."""
    return lambda evil, *flags, is_udp=False: Connected(ratrod, keys, target, stack, evil, flags, is_udp)


def assert_refused(client):
    """Error in place of HandshakeCompletion, which names the client's own key; then the end."""
    caught = pytest.raises(PeerError, client.read_completion)
    assert caught.value.code == peer.INVALID_KEY and base64url(client.claimed) in caught.value.text
    assert client.read_to_end() == []


def assert_ended(link, allowed=(ERROR, KEEPALIVE, peer.ACK)):
    """The server ends the link; of what it still said nothing is an answer to the evil step."""
    assert {record.type for record in link.read_to_end()} <= set(allowed)


def assert_no_answer(client):
    assert peer.receive_to_end(client.sock) == b""


def read_error(link):
    """The Error that must come next (Keepalive apart), as the link's last record."""
    error = pytest.raises(PeerError, link.read_record).value
    assert link.read_to_end() == []
    return error


# ---------------------------------------------------------------------------------------------------- 2-12: who speaks, and the handshake
def say_1(client, change=lambda message: message, **wrong):
    """The client's first message, changed."""
    client.send(OPENING)
    client.send_message(change(client.client_preamble()), **wrong)


def say_3(client, change=lambda message: message, **wrong):
    """The client's second message, changed, after all that goes before it."""
    say_1(client)
    client.read_server_preamble()
    client.send_message(change(client.client_authentication()), **wrong)


SMALL_ORDER = peer.odd_keypair(peer.SMALL_ORDER_POINTS[0])
BAD_CLIENTS = {
    "4: opening": ({}, lambda client: client.send(flip(OPENING, 7) + framed(client.client_preamble()))),
    "4: message 3": ({}, lambda client: say_3(client, lambda message: flip(message, 95))),
    "7: e of small order": ({"ephemeral": SMALL_ORDER, "attacker": True}, say_1),  # whose attacker could read an answer
    "8: another key's": ({"static": STOLEN}, say_3),
    "11: message 3": ({}, lambda client: say_3(client, length=65535)),
}


def test_bad_beginnings_of_clients(served):
    """A legacy client is told; anything else is closed without an answer, and so is each of BAD_CLIENTS."""
    end = served()
    preamble = b"\x00" + b"\x20" + b"e" * 32 + b"\x04a:80" + b"\x20" + b"c" * 32 + b"\x00\x00"
    for first in (b"\x00" + struct.pack(">Q", 80) + preamble, b"\x01" + bytes(12) + struct.pack(">Q", 80)):
        with row(first):
            answer = end.answer(first)
            assert answer[:9] == struct.pack(">BQ", 0, len(answer) - 9)
            variant, code, text = peer.decode(answer[9:], "varint", "varint", "str")
            assert (variant, code) == (6, peer.UNKNOWN) and "--legacy" in text
    for first in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"ratrod3\n"):
        assert end.answer(first) == b"", first
    for name, (options, speak) in BAD_CLIENTS.items():
        with row(name):
            client = end.client(**options)
            speak(client)
            assert_no_answer(client)
    still_serves(end)


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
    for client in (slow, slower, silent, half):
        assert_no_answer(client)
    still_serves(end)


def legacy_server(server, says=None):
    """As Rust's: it takes a flag and a size from the opening bytes, and understands nothing."""
    server.read_opening()
    server.read_message()
    server.send(says) if says else peer.reset(server.sock)


def up_to_server_preamble(server, change=lambda message: message, **wrong):
    server.read_opening()
    server.read_client_preamble()
    server.send_message(change(server.server_preamble()), **wrong)


def slowly(server):
    server.read_opening()
    server.read_client_preamble()
    assert dribble(server.sock, framed(server.server_preamble())) < 2 + MESSAGE_2


# (what the Server of the peer has wrong, what it says, the client's flags, what the client says)
BAD_SERVERS = {
    "2: legacy, resets": ({}, legacy_server, (), "--legacy"),
    "2: legacy, ServerPreamble": (
        {}, lambda server: legacy_server(server, b"\x00" + struct.pack(">Q", 500) + b"\x01" * 500), (), "--legacy"),
    "4: message 2 flipped": ({}, lambda server: up_to_server_preamble(server, lambda message: flip(message, 80)), (), ""),
    "11: length 65535": ({}, lambda server: up_to_server_preamble(server, length=65535), (), ""),
    # With -a what stops the client is the key, not known_hosts.
    "7: s of small order": ({"static": SMALL_ORDER, "claimed": peer.SMALL_ORDER_IDENTITY, "attacker": True}, up_to_server_preamble, ("-a",), ""),
    # A byte at a time; and the client's deadline covers everything up to HandshakeCompletion.
    "12: slow": ({}, slowly, SHORT_HANDSHAKE, ""),
    "12: silent": ({}, lambda server: server.begin_handshake(), SHORT_HANDSHAKE, ""),
}


def test_bad_beginnings_of_servers(target, keys):
    """The client gives up by itself, with an exit code and a line that say so. It says nothing more, and does not try again."""
    said = queue.Queue()
    def launch(options, speak):
        def handle(connection):
            connection.settimeout(PATIENCE)
            try:
                server = peer.Server(connection, seed_of(keys.server), **options)
                speak(server)
                said.put(b"" if connection.fileno() < 0 else peer.receive_to_end(connection))
            except Exception as error:
                said.put(error)
        return target(handle).port
    lines = [["-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % launch(options, speak)]
             for options, speak, flags, _ in BAD_SERVERS.values()]
    for (name, (_, _, _, says)), (code, text) in zip(BAD_SERVERS.items(), run_each(lines)):
        with row(name):
            assert code > 0 and text and says in text, text
            assert text.replace("\t", " ").replace("\n", " ").isprintable(), ascii(text)
    assert [said.get(timeout=PATIENCE) for _ in BAD_SERVERS] == [b""] * len(BAD_SERVERS) and said.empty()


# ---------------------------------------------------------------------------------------------------- 15-19: records, and the state table
# What spoils a link: the path, and what is well sealed but holds too little.
TAMPERED = {
    "last byte of the tag": lambda link: flip(link.writer.seal(DATA, b"x" * 100), 4 + 100 + link.suite.tag_length),
    "length 2^32 - 1": lambda link: b"\xff" * 68,
    "empty Data": lambda link: link.writer.seal(DATA),
    "Error cut short": lambda link: link.writer.seal(ERROR, b"\x03\x05abc"),
}


def send_tampered(link, how):
    with contextlib.suppress(ConnectionError):
        link.send(TAMPERED[how](link))


def first_data(stream):
    """The client's first Data, read before Opened (which an acceptor does not do): with it the Open is no case for another try."""
    record = stream.link.read_any_record()
    while record.type == KEEPALIVE:
        record = stream.link.read_any_record()
    assert record.type == DATA
    return record


def begun(end, watched):
    """A link on which the target has had something."""
    link = end.link()
    link.open(watched.address).wait_opened()
    link.send_record(DATA, b"hello")
    return link


def test_15_16_records_to_the_client_that_spoil_the_link(connected):
    def misbehave(stream):
        first_data(stream)
        stream.opened()
        send_tampered(stream.link, how)
    end = connected(misbehave, *RESETS)
    for how in TAMPERED:
        with row(how):
            assert was_reset(end.originate())
            end.end()
    still_serves(end)


def fin(link):
    link.sock.shutdown(socket.SHUT_WR)


# What breaks a link in the middle of a stream.
BREAKS = {
    "FIN": fin,
    "half a record": lambda link: (link.send(link.writer.seal(DATA, b"x" * 100)[:50]), fin(link)),
    "RST": lambda link: peer.reset(link.sock),
    "FIN after our End": lambda link: (link.send_record(END), fin(link)),
}


def test_15_16_17_what_ends_a_link_of_the_server(served, watched):
    """Neither end resumes here: the stream is reset. How it goes on over another link is in test_outlive.py."""
    end = served(*RESETS)
    for how in (*TAMPERED, *BREAKS):
        with row(how):
            link = begun(end, watched)
            if how in BREAKS:
                BREAKS[how](link)
            else:
                send_tampered(link, how)
                assert_ended(link)
            watched.assert_reset(after_end=how == "FIN after our End")
    # Before Opened the acceptor reads no more before it is connected, and what it then finds is no clean end all the same.
    link = end.link()
    link.send_open(TCP, watched.address)
    link.send_record(DATA, b"hello")
    fin(link)
    watched.assert_reset()
    still_serves(end)


def test_17_a_server_that_breaks_every_link(connected):
    """The client tries for `--connect-timeout`, or after Opened for `--resume`, with pauses; where Data has passed it is one stream for all."""
    opens = []
    def misbehave(stream):
        opens.append(stream)
        if first:
            assert first_data(stream).content == first
        if opened:
            stream.opened()
        fin(stream.link)
    first, opened = b"", False
    end = connected(misbehave, "--connect-timeout", "2", "--resume", "2")
    for first, opened in ((b"", False), (b"hello", False), (b"hello", True)):
        with row((first, opened)):
            del opens[:]
            connection = end.originate(first)
            if opened:
                eventually(lambda: len(opens) > 4, "it goes on trying")
            else:
                assert was_reset(connection)
            still_serves(end)
            tries = opens[:]
            assert 2 <= len(tries) < 30
            if first:
                assert len({stream.number for stream in tries}) == 1
                assert [stream.attempt for stream in tries] == list(range(1, len(tries) + 1))


ANOTHER_OPEN = OPEN, peer.encode_open(TCP, "127.0.0.1:1")
SOME_DATA, AN_END, AN_OVER, A_CLOSE = (DATA, b"x"), (END, b""), (peer.OVER, b""), (peer.CLOSE, b"")
AN_OPENED, AN_ACK, AN_ABANDON = (OPENED, peer.encode_opened()), (peer.ACK, peer.encode_ack(0)), (peer.ABANDON, bytes(16))
A_SESSION, UNKNOWN_TYPE = (SESSION, encode_session(1, "127.0.0.1:1")), (0x7f, b"")
COMPLETED_AGAIN = peer.HANDSHAKE_COMPLETION, peer.encode_str("again")
# What a client sends on a stream after Opened and Data, and what a server answers to Open and Data: the last record is the first that is wrong.
# Which types belong nowhere in a state is a table in unit/test_core.py; most of these are about what came before.
WRONG_FROM_OPENER = [
    [COMPLETED_AGAIN], [UNKNOWN_TYPE], [A_SESSION], [AN_END, ANOTHER_OPEN], [AN_END, SOME_DATA], [AN_END, AN_END], [AN_OVER], [AN_END, AN_OVER]]
WRONG_FROM_ACCEPTOR = [
    [COMPLETED_AGAIN], [SOME_DATA], [AN_OVER], [AN_OPENED, UNKNOWN_TYPE], [AN_OPENED, AN_OPENED], [AN_OPENED, SOME_DATA, AN_OVER],
    [AN_OPENED, AN_END, AN_OVER], [AN_OPENED, AN_END, SOME_DATA], [AN_OPENED, AN_END, AN_END], [AN_OPENED, A_CLOSE], [AN_OPENED, ANOTHER_OPEN],
    [(OPENED, peer.encode_opened("", None))]]


def test_18_19_what_a_client_may_not_send(served, watched):
    """The stream ends with the link, although it could go on over another one: who sends this is broken."""
    end = served()
    for records in WRONG_FROM_OPENER:
        with row(records):
            link = begun(end, watched)
            with contextlib.suppress(ConnectionError):
                for record in records:
                    link.send_record(*record)
            assert_ended(link)
            watched.assert_reset(after_end=AN_END in records)
    accepted = watched.target.accepted
    link = end.link()
    for _ in range(2):
        link.send_open(TCP, watched.address)
    assert_ended(link, (OPENED, ERROR, KEEPALIVE))
    watched.assert_reset()
    assert watched.target.accepted == accepted + 1
    # And on an idle link.
    for used in (False, True):
        for record in (UNKNOWN_TYPE, SOME_DATA, AN_OVER, A_CLOSE, (OPEN, peer.encode_open(4)), (peer.ACK, peer.encode_ack(1000))):
            with row((record, used)):
                link = end.link()
                if used:
                    assert link.exchange(end.address, b"hello") == b"hello"
                link.send_record(*record)
                assert_ended(link)
    still_serves(end)


def test_18_19_28_29_udp_links_of_the_server(served, udp_echo):
    """What ends one: also datagrams that do not fit their record, and a number used twice, which would leak a socket or answer the wrong one."""
    end = served()
    address = "127.0.0.1:%d" % udp_echo.port
    link = end.link().open_udp()
    # What is of an unknown session goes nowhere, and ends nothing.
    link.datagrams((7, b"stray"))
    link.session_over(8)
    link.session(1, address)
    link.datagrams((7, b"stray"), (1, b"hello"), (0, b""))
    assert link.read_udp() == (DATAGRAMS, [(1, b"hello")])
    link.session_over(1)
    link.datagrams((1, b"stray"))
    link.session(2, address)
    udp_round(link, 2, b"again")
    assert udp_echo.seen == 2
    first = peer.encode_datagrams([(1, b"first")])
    for record in (SOME_DATA, AN_ABANDON, (peer.SESSION_ADDRESS, peer.encode_session_address(1, address)), ANOTHER_OPEN, UNKNOWN_TYPE,
                   (DATAGRAMS, first + struct.pack(">IH", 1, 65535)), (DATAGRAMS, first + b"\x00"), (SESSION, encode_session(1, address))):
        with row(record):
            link = end.link().open_udp()
            link.session(1, address)
            udp_round(link, 1, b"hello")
            link.send_record(*record)
            # A first datagram that was good may have been carried before the second was looked at.
            assert_ended(link, (ERROR, KEEPALIVE, DATAGRAMS))
    still_serves(end)


def test_18_19_what_a_server_may_not_send(connected):
    def misbehave(stream):
        if is_idle:
            peer.echo(stream)
            stream.over()
        else:
            first_data(stream)
        with contextlib.suppress(ConnectionError):
            for record in records:
                stream.link.send_record(*record)
    end, is_idle = connected(misbehave), False
    for records in WRONG_FROM_ACCEPTOR:
        with row(records):
            assert was_reset(end.originate(), after_end=AN_END in records[:-1])
            end.end()
    is_idle = True
    a_listen = OPEN, peer.encode_open(peer.LISTEN, "a:1", b"instance")
    for records in zip((UNKNOWN_TYPE, SOME_DATA, AN_OVER, AN_ACK, AN_ABANDON, ANOTHER_OPEN, a_listen)):
        with row(records):
            connection = end.originate()
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"hello"
            assert {record.type for record in end.end()} <= {KEEPALIVE, peer.ACK, ERROR}
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 13, 23-26: policy
def test_13_23_targets_of_the_unauthorized_and_malformed_ones(served, watched, udp_echo, resolver):
    """Not looked up and not connected to. One bad UDP session never ends the link: the next one works."""
    names = resolver(pipelined_example=["127.0.0.1"], resolved_example=["127.0.0.1"])
    end = served(env=names.environment, host="resolved.example")
    still_serves(end)
    assert "resolved.example" in names.lookups, "this test would not see a look-up"
    # A key that is not authorized sends Open together with message 3.
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
    assert "pipelined.example" not in names.lookups
    lookups, udp = names.lookups, end.link().open_udp()
    for number, pattern in enumerate(("2130706433:{}", "127\u30020.0.1:{}", "[::1%1]:{}", "unix:/nowhere", "[::ffff:0.0.0.0]:{}", "224.0.0.1:{}"), 1):
        with row(pattern):
            udp.session(number, pattern.format(udp_echo.port))
            udp.datagrams((number, b"lost"))
            record, (over, _, text) = udp.read_udp()
            assert (record, over) == (peer.SESSION_OVER, number) and text
            link = end.link()
            link.send_open(TCP, pattern.format(watched.target.port))
            assert read_error(link).text
            assert names.lookups == lookups
    udp.session(1000, "127.0.0.1:%d" % udp_echo.port)
    udp_round(udp, 1000, b"hello")
    still_serves(end)
    assert (watched.target.accepted, udp_echo.seen) == (0, 1)


def test_25_26_a_key_removed_during_a_stream_and_a_list_that_is_unreadable(served, watched, second):
    end = served()
    removed, staying = end.link(seed_of(second)), end.link()
    idle, udp = end.link(seed_of(second)), end.link(seed_of(second)).open_udp()
    removed.open(watched.address).wait_opened()
    stream = staying.connect_to(end.address)
    end.keys.server.write("authorized_keys", end.keys.client.public + "\n")
    for link in (removed, idle, udp):
        assert_ended(link, (ERROR, KEEPALIVE, peer.CLOSE, OPENED))
    watched.assert_reset()
    # One line for all of its links, in place of one each.
    end.program.wait_for("WARN The client's key `%s` is not in authorized_keys any more: 3 links of it ended" % second.public)
    assert not [line for line in end.program.lines if "idle link" in line and "ERROR" in line]
    assert_refused(end.client(seed_of(second)).begin_handshake())
    # What is left of it waits for the client's FIN: another change of the list ends nothing more.
    end.keys.server.write("authorized_keys", "# mine\n%s\n" % end.keys.client.public)
    still_serves(end)
    end.program.process.send_signal(signal.SIGHUP)
    end.program.wait_for("Read again")
    assert end.program.output.count("of it ended") == 1
    # Another key's stream was not touched.
    stream.send(b"hello")
    assert stream.receive() == b"hello"
    stream.finish()
    still_serves(end)
    # Taking the permission away would not stop a test that runs as root: a folder is in its place.
    path = end.keys.server.path / "authorized_keys"
    text = path.read_text()
    link = begun(end, watched)
    path.unlink()
    path.mkdir()
    assert_refused(end.client().begin_handshake())
    assert_ended(link)
    watched.assert_reset()
    assert end.program.process.poll() is None
    path.rmdir()
    path.write_text(text)
    still_serves(end)


# ---------------------------------------------------------------------------------------------------- 28-32: UDP, resources
def udp_round(link, number, data):
    link.datagrams((number, data))
    assert link.read_udp() == (DATAGRAMS, [(number, data)])


def test_28_datagram_of_an_unknown_session_to_the_client(connected, stack):
    def misbehave(stream):
        link = stream.link
        link.send_record(OPENED, b"\x00")
        number, data = link.read_udp()[1][0], link.read_udp()[1][0][1]
        link.send_record(peer.SESSION_OVER, peer.encode_session_over(number + 1000))
        # The stray ones stand before the true one: had they been delivered, they would have come first.
        link.datagrams((number + 1000, b"stray"), (0, b"stray"), (2**32 - 1, b"stray"), (number, data))
        assert link.read_udp() == (DATAGRAMS, [(number, b"two")])
        link.datagrams((number + 1, b"stray"), (number, b"two"))
    end = connected(misbehave, is_udp=True)
    sock = stack.enter_context(dial_udp(end.evil))
    for data in (b"one", b"two"):
        ask_udp(sock, data)
    still_serves(end)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_30_keepalive_flood_while_the_server_does_not_read(served, target):
    """Far more than every buffer on the way takes: the sender is held back, others are served, and at last all of it arrives."""
    end, may_read, sizes, done, chunks = served(), threading.Event(), queue.Queue(), threading.Event(), []
    stalled = target(lambda connection: may_read.wait(10 * PATIENCE) and sizes.put(len(receive_all(connection))))
    link = end.link()
    link.sock.settimeout(10 * PATIENCE)
    stream = link.connect_to("127.0.0.1:%d" % stalled.port)
    def flood():
        for _ in range(512):
            stream.send(bytes(peer.CHUNK))
            link.send(b"".join(link.writer.seal(KEEPALIVE) for _ in range(20)))
            chunks.append(1)
        stream.end()
        done.set()
    before, rounds, seen = memory_before(end.program), 0, None
    threading.Thread(target=flood, daemon=True).start()
    while rounds < 10 and not done.is_set():
        still_serves(end)
        rounds, seen = rounds + 1 if len(chunks) == seen else 0, len(chunks)
    assert peak_growth(end.program, before) < 16 << 20
    may_read.set()
    assert sizes.get(timeout=4 * PATIENCE) == 512 * peer.CHUNK
    assert stream.receive_all() == b""
    stream.over()
    still_serves(end)


def test_32_a_look_up_that_hangs(served, resolver, second):
    names = resolver(resolved_example=["127.0.0.1"])
    end = served("--connect-timeout", "3", env=names.environment)
    moving = end.link().connect_to(end.address)
    # More than the 32 connects that one key may have under way, and the look-up of a UDP session.
    hanging = [end.link() for _ in range(40)]
    for link in hanging:
        link.send_open(TCP, "hang.example:80")
    udp = end.link().open_udp()
    udp.session(1, "hang.example:80")
    # An open stream, a new one to an address, and a name, of this key and of another.
    for key in (seed_of(end.keys.client), seed_of(second)) * 2:
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
