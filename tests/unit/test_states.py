"""The stream table of PROTOCOL.md as a stateful test: two joined ends in one process, and all that can happen around them.

A World holds real Links and Streams, made as Client and Server make them, on one event loop that the test turns round by round, on a clock of its
own. Between the two links of a Pair stands a relay that the test pumps; at the outer ends stand Apps, of which every byte is known.
"""

import contextlib
import errno
import functools
import logging
import os
import random
import socket
import struct
import time
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ratrod

CLIENT_KEYS, SERVER_KEYS = (ratrod.KeyPair.from_seed(seed * 32) for seed in (b"c", b"s"))
PATIENCE = 20.0  # what Client gives a server to say Opened
ALL = 1 << 20
SMALL, LARGE = 4096, 212_992
TO_ACCEPTOR, TO_OPENER = "to the acceptor", "to the opener"
BOTH_WAYS = TO_ACCEPTOR, TO_OPENER
ORIGINATOR, REMOTE = "originator", "remote"
SIDES = (ORIGINATOR, REMOTE)
END, RESET, GONE = "end", "reset", "gone"  # how an App's connection ended: it saw an end, it saw a reset, it went away with a reset
FLIP = "flip"  # a byte changes on its way
# What one end may hold of each direction: a record of the largest size and what came with it, once more for what its local socket did not take.
OUT_BOUND = ratrod.MAX_CONTENT + 64 * 1024
IN_BOUND = ratrod.SCRATCH_IN + ratrod.MAX_CONTENT


# ---------------------------------------------------------------------------------------------------- the ground they stand on


class Clock:
    """Stands in for the module `time` in ratrod: deadlines pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def clock_gettime(self, _clock):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


class Loop(ratrod.EventLoop):
    """Turned one round at a time; what a callback raises reaches the test, where the real one would log it as an internal error."""

    def turn(self):
        self._stopped = False
        self.call_later(0, self.stop)
        self.run()

    @staticmethod
    def _bug(call, error):
        raise error


class Wire(socket.socket):
    """One end of a socketpair that can be reset as TCP is, which a Unix socket by itself knows not."""

    def __init__(self, fileno):
        super().__init__(fileno=fileno)
        self.setblocking(False)
        self.resets = False  # closing is a reset
        self.aborted = False  # closed with one by its owner
        self.broken = False  # reset by the other side

    def setsockopt(self, level, option, *value):
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets = bool(struct.unpack("ii", *value)[0])
        return super().setsockopt(level, option, *value)

    def close(self):
        self.aborted |= self.resets and self.fileno() >= 0
        super().close()

    def recv_into(self, *args):
        n = super().recv_into(*args)
        if self.broken and not n:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return n

    def send(self, *args):
        if self.broken:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().send(*args)

    def getsockopt(self, level, option, *size):
        error = super().getsockopt(level, option, *size)
        return errno.ECONNRESET if self.broken and (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR) else error

    def shutdown(self, how):
        if self.broken:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return super().shutdown(how)

    def be_reset(self, lose):
        """The other side, which closes right after this, has reset the connection. `lose`: what waited here is lost too."""
        if self.fileno() >= 0:
            while lose and not self.drained():
                pass
            self.broken = True

    def drained(self):
        """Throws away a piece of what waits here; True where there is no more."""
        try:
            return not super().recv(ALL)
        except OSError:
            return True


def wires(size):
    """A connected pair, each with room for about `size` bytes on their way."""
    ends = tuple(Wire(end.detach()) for end in socket.socketpair())
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return ends


@functools.lru_cache(maxsize=None)
def block(tag):
    """Bytes that no other tag has, of a length that divides nothing."""
    return random.Random(repr(tag)).getrandbits(8 * 65_521).to_bytes(65_521, "big")


def piece(tag, start, n):
    """n bytes from `start` of the endless text of `tag`."""
    text = block(tag)
    start %= len(text)
    return (text * ((start + n) // len(text) + 1))[start:start + n]


class App:
    """A program at an outer end: it speaks the text of its own tag and hears that of the other's, byte by byte."""

    def __init__(self, tag, size):
        self.tag = tag
        self.socket, self.local = wires(size)
        self.sent = self.received = 0
        self.ended = False
        self.reads = True
        self.outcome = None
        self.other = None

    @property
    def dead(self):
        return self.outcome in (RESET, GONE)

    def write(self, n):
        if not n or self.ended or self.dead:
            return
        try:
            self.sent += self.socket.send(piece(self.tag, self.sent, n))
        except BlockingIOError:
            pass
        except BrokenPipeError:
            assert self.local.aborted, "closed in its face without a reset"

    def end(self):
        if not self.ended and not self.dead:
            self.ended = True
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self, lose):
        if not self.dead:
            self.outcome = GONE
            self.local.be_reset(lose)
            self.socket.close()

    def read(self, n=ALL):
        if self.outcome:
            return
        try:
            data = self.socket.recv(n)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
            self.local.aborted = True
        if not data:
            self.outcome = RESET if self.local.aborted else END
            return self.check_end()
        assert self.other, "bytes from nowhere"
        assert self.received + len(data) <= self.other.sent, "more than was sent"
        assert data == piece(self.other.tag, self.received, len(data)), "other bytes than were sent"
        self.received += len(data)

    def check_end(self):
        if self.outcome == END:
            assert self.other and self.other.ended, "a clean end that nobody made"
            assert self.received == self.other.sent, "a clean end after %d of %d bytes" % (self.received, self.other.sent)


# ---------------------------------------------------------------------------------------------------- two links and what is between them


class Pipe:
    """One direction of a relay: from `source` (whose far end is `giver`) to `sink` (whose far end is `taker`)."""

    def __init__(self, source, giver, sink, taker):
        self.source, self.giver, self.sink, self.taker = source, giver, sink, taker
        self.held = b""
        self.ended = self.deaf = self.flips = False
        self.moved = 0

    def pump(self, n=ALL):
        """Carries up to n bytes on, and an end or a reset after the last of them."""
        if self.source.fileno() < 0:
            return
        if not self.held and not self.ended:
            self.read(n)
        if self.held:
            self.write()
        elif self.ended and not self.deaf:
            self.pass_end_on()

    def read(self, n):
        try:
            self.held = self.source.recv(n)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.giver.aborted = True
        if self.giver.aborted:
            # A reset destroys what was still on its way.
            self.held = b""
        self.ended = not self.held
        if self.flips and self.held:
            self.held = bytes([self.held[0] ^ 1]) + self.held[1:]
            self.flips = False

    def write(self):
        try:
            sent = len(self.held) if self.deaf and self.sink.fileno() >= 0 else self.sink.send(self.held)
        except BlockingIOError:
            return
        except OSError:
            # What comes for a socket that is closed is answered with a reset.
            self.giver.be_reset(lose=False)
            self.source.close()
            return
        self.held = self.held[sent:]
        self.moved += sent

    def pass_end_on(self):
        if self.giver.aborted:
            self.reset()
        else:
            self.end()

    def end(self):
        """FIN for the taker; what else comes from the giver goes nowhere."""
        self.deaf = True
        self.held = b""
        if self.sink.fileno() >= 0:
            self.sink.shutdown(socket.SHUT_WR)

    def reset(self, lose=False):
        self.deaf = True
        self.taker.be_reset(lose)
        self.sink.close()


class Pair:
    """Two joined links, whose handshake is done, with the server's HandshakeCompletion still on its way."""

    def __init__(self, world, size):
        opener, near = wires(size)
        acceptor, far = wires(size)
        self.disturbed = False
        self.connection = self.attempt = None  # what the opener and what the acceptor carries, or has carried last
        self.pipes = {TO_ACCEPTOR: Pipe(near, opener, far, acceptor), TO_OPENER: Pipe(far, acceptor, near, opener)}
        client = ratrod.NoiseClientHandshake(CLIENT_KEYS, check_server=lambda key: None, report=lambda *words: None)
        server = ratrod.NoiseServerHandshake(SERVER_KEYS, authorize=lambda key: None)
        self.pipes[TO_OPENER].held = shake_hands(client, server)
        self.opener = ratrod.Link(world.client, opener, client, ratrod.OPENER, ratrod.IDLE, "the server")
        self.opener.set_deadline(10.0, lambda: self.opener.die(ratrod.LinkClosed("the server did not complete the handshake")))
        self.acceptor = ratrod.Link(world.server, acceptor, server, ratrod.ACCEPTOR, ratrod.IDLE, "the client")
        for link in self.links:
            link.update()

    @property
    def links(self):
        return self.opener, self.acceptor

    @property
    def may_end(self):
        return self.disturbed or self.connection and self.connection.disturbed

    def cut(self, how, whom):
        """The path breaks: `how` is END, RESET or FLIP, `whom` the directions whose takers are told."""
        self.disturbed = True
        for direction in whom:
            if how == END:
                self.pipes[direction].end()
            elif how == RESET:
                self.pipes[direction].reset(lose=True)
            else:
                self.pipes[direction].flips = True

    def close(self):
        for pipe in self.pipes.values():
            for wire in (pipe.source, pipe.giver):
                wire.close()


def shake_hands(client, server):
    """Carries all messages; what the server says last is left for its own way."""
    last = b""
    while not (client.done and server.done):
        for giver, taker in ((client, server), (server, client)):
            last = giver.data_to_send()
            while last and taker.wanted:
                n = taker.wanted
                taker.receive_data(last[:n])
                last = last[n:]
    return last


# ---------------------------------------------------------------------------------------------------- what the links carry, and their owners


def other_side(side):
    return REMOTE if side == ORIGINATOR else ORIGINATOR


class Attempt:
    """A remote that the acceptor was asked for; once it is connected, a Stream and an App."""

    def __init__(self, pair, connection):
        self.pair, self.connection = pair, connection
        self.tag = connection.number, REMOTE, len(connection.attempts)
        self.app = self.stream = None


class Connection:
    """An originator's connection, and what became of it. `disturbed`: something has happened that may end it."""

    def __init__(self, number, size, remote_size):
        self.number, self.remote_size = number, remote_size
        self.app = App((number, ORIGINATOR), size)
        self.stream = None
        self.pairs = []
        self.attempts = []
        self._disturbed = False

    def disturb(self):
        self._disturbed = True

    @property
    def disturbed(self):
        # An Open that was moved from link to link for too long is given up.
        return self._disturbed or any(pair.disturbed for pair in self.pairs) or len(self.pairs) >= ratrod.TRIES

    @property
    def over(self):
        return self.app.dead or self.app.ended and self.app.outcome == END

    @property
    def apps(self):
        return [self.app, *(attempt.app for attempt in self.attempts if attempt.app)]

    def app_of(self, side):
        """The originator, or the remote once it is connected."""
        return self.app if side == ORIGINATOR else self.attempts[-1].app if self.attempts else None

    @property
    def waits(self):
        """For a link, or for its remote."""
        return self.stream.link is None or self.stream.link.state in (ratrod.ASKED, ratrod.ASKED_END)

    def check_delivered(self, attempt, side):
        """Both Ends have passed as `side` sees it, and its local socket took everything."""
        ends = {ORIGINATOR: (self.app, self.stream), REMOTE: (attempt.app, attempt.stream)}
        assert all(app.ended and app.sent == stream.sent for app, stream in ends.values())
        other = ends[other_side(side)]
        assert ends[side][1].received == other[0].sent
        assert not ends[side][1]._pending


class Owner:
    """What an Endpoint is to its links."""

    limits = ratrod.DEFAULT_LIMITS

    def __init__(self, world):
        self.world, self.loop = world, world.loop
        self.links = set()
        self.counters = ratrod.Counters()
        self.errors = []

    def link_ended(self, link, error):
        self.links.discard(link)
        self.errors.append(error)
        # Both ends are honest: the protocol is broken by nobody but a path that breaks.
        broken = isinstance(error, ratrod.RemoteProtocolError) and not isinstance(error, (ratrod.LinkClosed, ratrod.PeerError))
        assert not broken or self.world.pair_of(link).may_end, "a link between honest ends ended: %r" % error
        assert "does not belong" not in str(error)

    def keep_alive(self):
        """What an Endpoint does from time to time."""
        for link in list(self.links):
            link.user.check()
            ratrod.Endpoint._keep_alive(self, link, self.world.clock.now, late=False)


class ClientEnd(Owner):
    """Carries streams over idle links, or over new ones; where it is `thrifty` they wait for those that are there."""

    def __init__(self, world):
        super().__init__(world)
        self.idle = []
        self.completed = []
        self.waiting = []
        self.thrifty = False

    def carry(self, stream):
        pair = self.world.pair_of(self.pop())
        if pair or not self.thrifty or not self.links:
            self.begin(stream, pair or self.world.add_pair())
        else:
            self.waiting.append(stream)

    def begin(self, stream, pair):
        pair.connection = self.world.connection_of(stream)
        pair.connection.pairs.append(pair)
        stream.begin(pair.opener, PATIENCE)

    def go_on(self):
        """Those that wait: where there is no link to wait for, or no wish to."""
        while self.waiting and not (self.thrifty and self.links):
            self.carry(self.waiting.pop(0))

    def pop(self):
        while self.idle:
            link = self.idle.pop()
            link.poll()
            if link.state == ratrod.IDLE:
                return link
            link.close()
        return None

    def link_completed(self, link):
        assert link not in self.completed
        self.completed.append(link)

    def link_idle(self, link, end=b""):
        pair = self.world.pair_of(link)
        assert pair.attempt is pair.connection.attempts[-1]
        for side in SIDES:
            pair.connection.check_delivered(pair.attempt, side)
        assert pair.acceptor.state in (ratrod.IDLE, ratrod.BYE, ratrod.CLOSED)
        assert pair.acceptor.user is ratrod.NOBODY
        if self.waiting:
            self.begin(self.waiting.pop(0), pair)
        else:
            self.idle.append(link)

    def link_ended(self, link, error):
        super().link_ended(link, error)
        if link in self.idle:
            self.idle.remove(link)

    def client_refused(self, error):
        raise AssertionError("nobody refused this client: %r" % error)


class ServerEnd(Owner):
    """Connects what it is asked for in the next round; where it `hesitates`, when the test says so. `leaving`: Close answers the next Open, or stands
    in place of the next Over."""

    def __init__(self, world):
        super().__init__(world)
        self.asked = []
        self.leaving = self.hesitates = False

    def open_asked(self, link, message):
        assert (message.kind, link.state) == (ratrod.TCP, ratrod.CONNECTING)
        if self.leaving:
            return self.leave(link)
        pair, connection = self.world.pair_of(link), self.world.connections[int(message.target)]
        pair.attempt = Attempt(pair, connection)
        connection.attempts.append(pair.attempt)
        self.asked.append(pair.attempt)

    def leave(self, link, end=b""):
        self.leaving = False
        link.leave(end + link.writer.record(ratrod.CLOSE))

    def connect_all(self):
        for attempt in list(self.asked):
            self.connect(attempt)

    def connect(self, attempt):
        self.asked.remove(attempt)
        link, connection = attempt.pair.acceptor, attempt.connection
        if link.state == ratrod.CLOSED:
            return
        attempt.app = App(attempt.tag, connection.remote_size)
        attempt.app.other = connection.app
        attempt.stream = ratrod.Stream(self, attempt.app.local, ratrod.new_label("the client", str(connection.number)))
        attempt.stream.link = link
        if attempt is connection.attempts[-1]:
            assert not connection.app.received, "it was tried again after an answer"
            connection.app.other = attempt.app
        link.accept(attempt.stream)

    def refuse(self, attempt):
        self.asked.remove(attempt)
        attempt.connection.disturb()
        if attempt.pair.acceptor.state != ratrod.CLOSED:
            attempt.pair.acceptor.refuse(ratrod.Error(ratrod.REMOTE_FAILED, "Connection refused"))

    def link_idle(self, link, end=b""):
        pair = self.world.pair_of(link)
        pair.attempt.connection.check_delivered(pair.attempt, REMOTE)
        assert pair.opener.state in (ratrod.ASKED_END, ratrod.SENT, ratrod.DONE, ratrod.BYE, ratrod.CLOSED)
        if self.leaving:
            self.leave(link, end)
        else:
            link.send(end + link.writer.record(ratrod.OVER))


class World:
    """All of it. `size`: the room of each link."""

    def __init__(self, size=LARGE):
        self.size = size
        self.clock = Clock()
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(ratrod, "time", self.clock))
        logging.getLogger("ratrod").setLevel(logging.CRITICAL)  # thousands of connections are reset here
        self.loop = Loop()
        self.client, self.server = ClientEnd(self), ServerEnd(self)
        self.pairs = []
        self.connections = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._patches.close()
        logging.getLogger("ratrod").setLevel(logging.NOTSET)
        self.loop.close()
        for pair in self.pairs:
            pair.close()
        for connection in self.connections:
            for app in connection.apps:
                app.socket.close()
                app.local.close()

    def records_in_turn(self, n):
        self._patches.enter_context(mock.patch.object(ratrod, "RECORDS_IN_TURN", n))

    # ---- who is who

    def add_pair(self):
        self.pairs.append(Pair(self, self.size))
        return self.pairs[-1]

    def pair_of(self, link):
        return next((pair for pair in self.pairs if link in pair.links), None)

    def connection_of(self, stream):
        return next(connection for connection in self.connections if connection.stream is stream)

    @property
    def live(self):
        return [connection for connection in self.connections if not connection.over]

    @property
    def busy_pairs(self):
        return [pair for pair in self.pairs if any(link.state != ratrod.CLOSED for link in pair.links)]

    @property
    def idle_acceptors(self):
        return [pair.acceptor for pair in self.pairs if pair.acceptor.state == ratrod.IDLE]

    # ---- what happens

    def originate(self, size=LARGE, remote_size=LARGE, first=0):
        """A new connection, whose originator has said `first` bytes already when it is accepted."""
        connection = Connection(len(self.connections), size, remote_size)
        self.connections.append(connection)
        connection.app.write(first)
        label = ratrod.new_label("originator", str(connection.number))
        connection.stream = ratrod.Stream(self.client, connection.app.local, label, self.client.carry)
        self.client.carry(connection.stream)
        return connection

    def turn(self):
        self.loop.turn()
        self.check_memory()

    def round(self):
        """Everything moves on by one step."""
        for connection in self.connections:
            for app in connection.apps:
                if app.reads:
                    app.read()
        for pair in self.pairs:
            for pipe in pair.pipes.values():
                pipe.pump()
        if not self.server.hesitates:
            self.server.connect_all()
        self.client.go_on()
        self.turn()

    def rounds(self, n):
        for _ in range(n):
            self.round()

    def settle(self):
        """Until nothing moves any more."""
        before, still = None, 0
        while still < 5:
            self.round()
            now = self.picture()
            still = still + 1 if now == before else 0
            before = now

    def picture(self):
        return ([(app.sent, app.received, app.outcome) for connection in self.connections for app in connection.apps],
                [(pipe.moved, len(pipe.held), pipe.ended, pipe.deaf) for pair in self.pairs for pipe in pair.pipes.values()],
                # _in_end: a large record takes more turns to come than nothing else may move.
                [(link.state, link.backlog, link.held, link._in_end) for pair in self.pairs for link in pair.links])

    def pass_time(self, seconds):
        """Deadlines pass, and Keepalive: a path that stands carries it, a remote that is not connected by then may be given up."""
        for connection in self.live:
            if connection.waits:
                connection.disturb()
        for _ in range(0, seconds, 5):
            self.clock.now += 5
            for owner in (self.client, self.server):
                owner.keep_alive()
            self.rounds(2)

    # ---- what must be true

    def check_memory(self):
        for pair in self.busy_pairs:
            for link in pair.links:
                waiting = len(link._in) if link._in is not None else 0
                pending = len(getattr(link.user, "_pending", b""))
                assert link.backlog <= OUT_BOUND
                assert waiting <= ratrod.SCRATCH_IN
                assert waiting + pending <= IN_BOUND
        for connection in self.live:
            assert len(connection.stream._kept or b"") <= ratrod.KEPT_DATA

    def finish(self):
        """Lets everything come to its end, and checks how it ended."""
        self.check_half_closes()
        self.let_all_end()
        for connection in self.connections:
            if not connection.disturbed:
                assert [app.outcome for app in connection.apps] == [END, END], "ended by nothing that happened"
        # A side that nobody told of a broken path finds out by the other's silence.
        self.pass_time(60)
        self.let_all_end()
        for pair in self.pairs:
            assert {link.state for link in pair.links} <= {ratrod.IDLE, ratrod.CLOSED}
            assert all(link.user is ratrod.NOBODY for link in pair.links)
        for connection in self.connections:
            self.check_outcome(connection)

    def check_half_closes(self):
        """One direction ends without the other."""
        self.client.thrifty = self.server.hesitates = False
        for connection in self.connections:
            for app in connection.apps:
                app.reads = True
        self.settle()
        for connection in self.connections:
            for app in connection.apps if not connection.disturbed else ():
                assert app.outcome == (END if app.other.ended else None)

    def let_all_end(self):
        before = None
        while before != self.picture():
            before = self.picture()
            for connection in self.connections:
                for app in connection.apps:
                    app.reads = True
                    app.end()
            self.settle()

    @staticmethod
    def check_outcome(connection):
        """Whole with a clean end, or visibly reset; App.read() has held each end against what was sent."""
        assert all(app.outcome for app in connection.apps), "it never ended"
        assert all(app.local.fileno() < 0 for app in connection.apps), "its local socket is still open"
        assert sum(app.received > 0 for app in connection.apps[1:]) <= 1, "two remotes got its bytes"


# ---------------------------------------------------------------------------------------------------- one thing after the other


@pytest.fixture
def world():
    with World() as made:
        yield made


def join(world):
    """A new connection, joined to its remote."""
    connection = world.originate()
    world.settle()
    return connection


def outcomes(connection):
    return [app.outcome for app in connection.apps]


def converse(connection, n=100):
    """Each side says n bytes and ends."""
    for app in connection.apps:
        app.write(n)
        app.end()


def test_streams_follow_each_other_on_one_link_byte_by_byte(world):
    for _ in range(3):
        connection = world.originate()
        converse(connection)
        for n in range(600):
            for pipe in world.pairs[0].pipes.values():
                pipe.pump(1)
            world.server.connect_all()
            if n == 300:
                converse(connection)
            world.turn()
            connection.app.read()
        world.settle()
        assert outcomes(connection) == [END, END]
        assert world.client.idle == [world.pairs[0].opener]
    assert len(world.pairs) == 1
    world.finish()


@pytest.mark.parametrize("how", [END, RESET])
@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "has ended"])
def test_a_bare_open_moves_to_another_link(world, how, ends):
    connection = world.originate()
    if ends:
        connection.app.end()
        world.turn()
    world.pairs[0].cut(how, BOTH_WAYS)
    world.settle()
    converse(connection)
    world.settle()
    assert outcomes(connection) == [END, END]
    assert len(world.pairs) == 2


@pytest.mark.parametrize("how", [END, RESET])
def test_data_is_never_sent_a_second_time(world, how):
    """The remote may have had it."""
    connection = world.originate(first=1)
    world.pairs[0].cut(how, (TO_OPENER,))
    world.settle()
    assert connection.app.outcome == RESET
    assert len(world.pairs) == 1
    world.finish()


def test_a_link_that_breaks_under_the_first_data(world):
    """Both sockets are ready in one round: the link's end is found out by the send."""
    connection = world.originate()
    connection.app.write(1)
    world.pairs[0].cut(RESET, BOTH_WAYS)
    world.settle()
    assert connection.app.outcome == RESET
    world.finish()


@pytest.mark.parametrize("first", [0, 1, LARGE])
@pytest.mark.parametrize("later", [0, 1, LARGE])
@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "has ended"])
def test_close_moves_open_and_kept_data_and_end(world, first, later, ends):
    world.server.leaving = True
    connection = world.originate(first=first)
    connection.app.write(later)
    if ends:
        connection.app.end()
    for _ in range(10):
        world.turn()
    world.settle()
    converse(connection)
    world.settle()
    assert outcomes(connection) == [END, END]
    assert len(world.pairs) == 2
    world.finish()


@pytest.mark.parametrize("how", [END, RESET, "Close", "Keepalive and end"])
def test_an_idle_link_that_has_ended_takes_no_stream(world, how):
    """Data is ready and would leave with the Open: a second try could not follow."""
    converse(join(world))
    world.settle()
    pair = world.pairs[0]
    assert world.client.idle == [pair.opener]
    if how == "Close":
        world.server.leave(pair.acceptor)
        pair.pipes[TO_OPENER].pump()
    elif how == "Keepalive and end":
        pair.acceptor.send(pair.acceptor.writer.record(ratrod.KEEPALIVE))
        pair.pipes[TO_OPENER].pump()
        pair.cut(END, BOTH_WAYS)
    else:
        pair.cut(how, BOTH_WAYS)
    connection = world.originate(first=100)
    world.settle()
    converse(connection)
    world.settle()
    assert outcomes(connection) == [END, END]
    assert len(world.pairs) == 2
    world.finish()


@pytest.mark.parametrize("first", SIDES)
def test_half_close(world, first):
    connection = join(world)
    one, other = (connection.app_of(side) for side in (first, other_side(first)))
    one.write(10)
    one.end()
    world.settle()
    assert (one.outcome, other.outcome, other.received) == (None, END, 10)
    other.write(LARGE)
    world.settle()
    assert (one.outcome, one.received) == (None, other.sent)
    other.end()
    world.settle()
    assert outcomes(connection) == [END, END]


@pytest.mark.parametrize("side", SIDES)
def test_a_reset_after_its_own_end_is_noticed(world, side):
    """Its socket is not read any more, and nobody writes to it."""
    connection = join(world)
    app, other = (connection.app_of(which) for which in (side, other_side(side)))
    app.end()
    world.settle()
    assert other.outcome == END
    connection.disturb()
    app.reset(lose=False)
    world.pass_time(5)
    assert other.local.aborted
    world.finish()


def hold_up(world, connection, side):
    """Sends to `side`, which does not read, until its link processes nothing more; then both sides end. Returns the program there, and its link."""
    reader, writer = (connection.app_of(which) for which in (side, other_side(side)))
    reader.reads = False
    stream = connection.stream if side == ORIGINATOR else connection.attempts[-1].stream
    while not stream.link.held:
        writer.write(ALL)
        world.rounds(3)
    converse(connection)
    world.settle()
    return reader, stream.link


@pytest.mark.parametrize("leaves", [False, True], ids=["Over", "Close"])
@pytest.mark.parametrize("slow", SIDES)
def test_what_waits_for_a_slow_program_keeps_the_link_busy(world, slow, leaves):
    """Both Ends are on their way, and one local socket has not taken everything: no Over, or nothing done with it, before it has."""
    connection = join(world)
    world.server.leaving = leaves
    reader, _ = hold_up(world, connection, slow)
    world.pass_time(120)
    assert not world.client.idle
    assert reader.outcome is None
    reader.reads = True
    world.settle()
    assert outcomes(connection) == [END, END]
    assert world.client.idle == ([] if leaves else [world.pairs[0].opener])
    world.finish()


@pytest.mark.parametrize("side", SIDES)
def test_a_program_that_goes_away_after_both_ends(world, side):
    """Its bytes are not all in its socket yet: until they are, a failure is the stream's. An Error says so, however slow the path is."""
    connection = join(world)
    app, link = hold_up(world, connection, side)
    pair = connection.pairs[0]
    assert (pair.opener.state, pair.acceptor.state) == ((ratrod.DONE, ratrod.SENT) if side == REMOTE else (ratrod.SENT, ratrod.IDLE))
    connection.disturb()
    app.reset(lose=True)
    for _ in range(10):
        world.turn()
    assert link.state == ratrod.BYE
    world.settle()
    assert app.local.aborted
    assert all(link.state == ratrod.CLOSED for link in pair.links)
    if side == REMOTE:
        assert [(type(error), error.code) for error in world.client.errors] == [(ratrod.PeerError, ratrod.REMOTE_FAILED)]
    world.finish()


def test_many_small_records_take_turns(world):
    """What has come at once is not processed at once: others get their turn after each so many records, and the order stays."""
    connection = join(world)
    (app, remote), pipe = connection.apps, world.pairs[0].pipes[TO_ACCEPTOR]
    records = b""
    for _ in range(1000):
        app.write(1)
        world.turn()
        records += pipe.source.recv(ALL)
    pipe.held = records
    pipe.pump()
    for _ in range(1000 // ratrod.RECORDS_IN_TURN + 1):
        before = remote.received
        world.turn()
        remote.read()
        assert remote.received - before <= 2 * ratrod.RECORDS_IN_TURN, "those of the read, and those of the round's other turn"
    assert remote.received == 1000
    converse(connection)
    world.settle()
    assert outcomes(connection) == [END, END]
    world.finish()


def test_everything_full(world):
    """Both programs write and neither reads: each end holds what it may hold and no more, for minutes, and then delivers it all."""
    connection = join(world)
    for app in connection.apps:
        app.reads = False
    before = None
    while before != world.picture():
        before = world.picture()
        for app in connection.apps:
            app.write(ALL)
        world.rounds(2)
    assert all(app.sent > LARGE for app in connection.apps)
    world.pass_time(300)
    assert outcomes(connection) == [None, None]
    world.finish()
    assert outcomes(connection) == [END, END]


def whole_stream(world, direction=None, limit=None):
    """A short conversation; of `direction` only `limit` bytes are carried."""
    connection = world.originate()
    for n in range(40):
        for way, pipe in world.pairs[0].pipes.items():
            left = limit - pipe.moved if way == direction else ALL
            if left > 0:
                pipe.pump(left)
        world.server.connect_all()
        if n in (0, 10):
            converse(connection, 10)
        world.turn()
    return connection


@pytest.mark.parametrize("direction", BOTH_WAYS)
@pytest.mark.parametrize("how", [END, RESET, FLIP])
def test_a_path_that_breaks_after_any_byte(direction, how):
    """finish() holds every end against what was sent: only what is whole may look whole."""
    with World() as world:
        whole_stream(world)
        length = world.pairs[0].pipes[direction].moved
    assert length > 70  # ChaCha20-Poly1305 alone has shorter records
    for n in range(length + 1):
        with World() as world:
            whole_stream(world, direction, n)
            world.pairs[0].cut(how, (direction,))
            if how == FLIP:
                # Where it has made a record longer, only the end of the path can show it.
                world.let_all_end()
                world.pairs[0].cut(END, BOTH_WAYS)
            world.finish()


# ---------------------------------------------------------------------------------------------------- anything in any order


class Streams(RuleBasedStateMachine):
    """A few streams at once and one after the other, on as many links as it takes."""

    numbers = st.integers(0, 5)
    sides = st.sampled_from(SIDES)
    rounds = st.integers(0, 4)
    directions = st.sampled_from(BOTH_WAYS)
    some_directions = st.sampled_from((BOTH_WAYS, (TO_ACCEPTOR,), (TO_OPENER,)))
    sizes = st.sampled_from((SMALL, LARGE))

    def __init__(self):
        super().__init__()
        self.world = World()
        self.damages = 0

    def teardown(self):
        with self.world:
            self.world.finish()

    @initialize(size=sizes, records=st.sampled_from((1, 3, ratrod.RECORDS_IN_TURN)))
    def begin(self, size, records):
        self.world.records_in_turn(records)
        self.world.size = size
        self.world.originate(size)

    @invariant()
    def check(self):
        self.world.check_memory()

    @staticmethod
    def one_of(things, number):
        return things[number % len(things)]

    def app(self, number, side):
        """The originator where there is no remote yet."""
        connection = self.one_of(self.world.live, number)
        return connection.app_of(side) or connection.app

    def may_do_damage(self):
        """Most streams are to get somewhere."""
        return self.damages <= len(self.world.connections) // 3

    def may_damage_a_stream(self):
        return self.may_do_damage() and self.world.live

    # ---- what programs do

    @precondition(lambda self: len(self.world.live) < 3)
    @rule(size=sizes, remote_size=sizes, first=st.sampled_from((0, 100, 70_000)), rounds=rounds)
    def originate(self, size, remote_size, first, rounds):
        self.world.originate(size, remote_size, first)
        self.world.rounds(rounds)

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, side=sides, n=st.sampled_from((1, 100, 5_000, 70_000, 400_000)), rounds=rounds)
    def write(self, number, side, n, rounds):
        self.app(number, side).write(n)
        self.world.rounds(rounds)

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, side=sides, rounds=st.integers(3, 12), other_reads=st.booleans())
    def pour(self, number, side, rounds, other_reads):
        """As much as goes in, until everything on its way is full."""
        for app in self.one_of(self.world.live, number).apps:
            app.reads = other_reads
        for _ in range(rounds):
            self.app(number, side).write(400_000)
            self.world.round()
            if not self.world.live:
                break

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, side=sides, rounds=rounds)
    def end(self, number, side, rounds):
        self.app(number, side).end()
        self.world.rounds(rounds)

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, rounds=st.integers(0, 12))
    def end_both(self, number, rounds):
        for app in self.one_of(self.world.live, number).apps:
            app.end()
        self.world.rounds(rounds)

    @precondition(may_damage_a_stream)
    @rule(number=numbers, side=sides, lose=st.booleans(), rounds=rounds)
    def reset(self, number, side, lose, rounds):
        self.damages += 1
        app = self.app(number, side)
        self.one_of(self.world.live, number).disturb()
        app.reset(lose)
        self.world.rounds(rounds)

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, side=sides, reads=st.booleans())
    def stop_or_resume_reading(self, number, side, reads):
        self.app(number, side).reads = reads

    @precondition(lambda self: self.world.live)
    @rule(number=numbers, side=sides, n=st.sampled_from((1, 1000)))
    def read_a_little(self, number, side, n):
        self.app(number, side).read(n)

    # ---- what the acceptor meets

    @rule(whether=st.booleans())
    def hesitate(self, whether):
        self.world.server.hesitates = whether

    @rule(whether=st.booleans())
    def be_thrifty(self, whether):
        self.world.client.thrifty = whether

    @precondition(lambda self: self.world.server.asked)
    @rule(number=numbers, rounds=rounds)
    def connect(self, number, rounds):
        self.world.server.connect(self.one_of(self.world.server.asked, number))
        self.world.rounds(rounds)

    @precondition(lambda self: self.world.server.asked)
    @rule(number=numbers, rounds=rounds)
    def refuse(self, number, rounds):
        self.world.server.refuse(self.one_of(self.world.server.asked, number))
        self.world.rounds(rounds)

    @precondition(may_do_damage)
    @rule()
    def leave(self):
        self.damages += 1
        self.world.server.leaving = True

    @precondition(lambda self: self.world.idle_acceptors)
    @rule(number=numbers, rounds=rounds)
    def leave_while_idle(self, number, rounds):
        self.world.server.leave(self.one_of(self.world.idle_acceptors, number))
        self.world.rounds(rounds)

    # ---- what the path does

    @rule(turns=st.integers(1, 3))
    def turn(self, turns):
        for _ in range(turns):
            self.world.turn()

    @rule(rounds=st.integers(1, 20))
    def everything_moves(self, rounds):
        self.world.rounds(rounds)

    @rule(number=numbers, direction=directions, n=st.sampled_from((1, 3, 50, ALL)))
    def pump(self, number, direction, n):
        self.one_of(self.world.pairs, number).pipes[direction].pump(n)

    @rule(number=numbers, n=st.integers(1, 150))
    def trickle(self, number, n):
        """A byte at a time in both directions."""
        for _ in range(n):
            for pipe in self.one_of(self.world.pairs, number).pipes.values():
                pipe.pump(1)
            self.world.turn()

    @precondition(may_do_damage)
    @rule(number=numbers, how=st.sampled_from((END, RESET)), whom=some_directions, rounds=rounds)
    def cut(self, number, how, whom, rounds):
        self.damages += 1
        self.one_of(self.world.pairs[::-1], number).cut(how, whom)
        self.world.rounds(rounds)

    @rule(seconds=st.sampled_from((5, 25, 60)))
    def pass_time(self, seconds):
        self.world.pass_time(seconds)


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=2500 if os.environ.get("RATROD_LONG") else 100, stateful_step_count=50, deadline=None,
                                derandomize="CI" in os.environ, database=None,
                                report_multiple_bugs=False,
                                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
