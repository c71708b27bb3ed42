"""Two joined ends in one process, on a loop and a clock of the test's own. Between the two links of a Pair stands a relay that the test pumps and
breaks; at the outer ends stand Apps. A World has an opener and an acceptor, all pairs between them and the connections that they carry."""

import contextlib
import errno
import functools
import logging
import os
import random
import socket
import struct
import time
import types
from unittest import mock

import ratrod

CLIENT_KEYS, SERVER_KEYS = (ratrod.KeyPair.from_seed(seed * 32) for seed in (b"c", b"s"))
ALL = 1 << 20
SMALL, LARGE = 4096, 212_992
TO_ACCEPTOR, TO_OPENER = "to the acceptor", "to the opener"
BOTH_WAYS = TO_ACCEPTOR, TO_OPENER
END, RESET, GONE = "end", "reset", "gone"  # how an App's connection ended: it saw an end, it saw a reset, it went away with a reset
FLIP, SILENCE = "flip", "silence"  # a byte changes on its way; nothing arrives any more, and nobody is told
ORIGINATOR, REMOTE = "originator", "remote"
SIDES = (ORIGINATOR, REMOTE)
SMALL_WINDOW = 96 * 1024  # of some worlds: larger than what a stream keeps where memory is short
# What one end may hold of each direction beside its window: a record of the largest size and what came with it, and once more for what its
# local socket did not take.
OUT_BOUND = ratrod.MAX_CONTENT + 64 * 1024
IN_BOUND = ratrod.SCRATCH_IN + ratrod.MAX_CONTENT


class Clock:
    """Stands in for the module `time` in ratrod: deadlines pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self, _clock=None):
        return self.now

    clock_gettime = monotonic

    def __getattr__(self, name):
        return getattr(time, name)


class Loop(ratrod.EventLoop):
    """Turned one round at a time; what a callback raises reaches the test, where the real one would log it as an internal error."""

    def turn(self):
        self._is_stopped = False
        self.call_later(0, self.stop)
        self.run()

    @staticmethod
    def on_bug(call, error):
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
            with contextlib.suppress(OSError):
                while lose and self.recv(ALL):
                    pass
            self.broken = True


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


class Talker:
    """A program at an end of a connection: it speaks the text of its own tag and hears that of the other's, byte by byte."""

    def __init__(self, tag, sock):
        self.tag, self.socket = tag, sock
        self.sent = self.received = 0
        self.ended = False
        self.outcome = self.other = None

    @property
    def dead(self):
        return self.outcome in (RESET, GONE)

    def write(self, n):
        """As much of n bytes more as its socket takes."""
        if n and not self.ended and not self.dead:
            with contextlib.suppress(BlockingIOError):
                self.sent += self.socket.send(piece(self.tag, self.sent, n))

    def end(self):
        if not self.ended and not self.dead:
            self.ended = True
            with contextlib.suppress(OSError):  # a reset may have come
                self.socket.shutdown(socket.SHUT_WR)

    def hear(self, data):
        """What came, or without any the clean end."""
        if not data:
            self.outcome = END
            assert self.other and self.other.ended, "a clean end that nobody made"
            assert self.received == self.other.sent, "a clean end after %d of %d bytes" % (self.received, self.other.sent)
        else:
            assert self.other, "bytes from nowhere"
            assert self.received + len(data) <= self.other.sent, "more than was sent"
            assert data == piece(self.other.tag, self.received, len(data)), "other bytes than were sent"
            self.received += len(data)


class App(Talker):
    """One whose own end is a Wire: `local`."""

    def __init__(self, tag, size):
        sock, self.local = wires(size)
        super().__init__(tag, sock)
        self.reads = True

    def write(self, n):
        try:
            super().write(n)
        except BrokenPipeError:
            assert self.local.aborted, "closed in its face without a reset"

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
            data, self.local.aborted = b"", True
        if not data and self.local.aborted:
            self.outcome = RESET
        else:
            self.hear(data)


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
            (self.reset if self.giver.aborted else self.end)()

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
    """Two joined links of `client` and `server`, whose handshake is done; the server's HandshakeCompletion is still on its way."""

    def __init__(self, client, server, size):
        opener, near = wires(size)
        acceptor, far = wires(size)
        self.may_be_silent = False  # and so what is on it may be given up
        self.pipes = {TO_ACCEPTOR: Pipe(near, opener, far, acceptor), TO_OPENER: Pipe(far, acceptor, near, opener)}
        suites = ratrod.offered_suites()
        ours = ratrod.NoiseClientHandshake(CLIENT_KEYS, suites, check_key=lambda key: None)
        theirs = ratrod.NoiseServerHandshake(SERVER_KEYS, suites, check_key=lambda key: None, instance=server.instance)
        self.pipes[TO_OPENER].held = shake_hands(ours, theirs)
        self.opener = ratrod.Link(client, opener, ours, ratrod.OPENER, "the server")
        self.opener.due = client.loop.now + 10
        self.acceptor = ratrod.Link(server, acceptor, theirs, ratrod.ACCEPTOR, "127.0.0.1:9")
        self.links = self.opener, self.acceptor
        for link in self.links:
            link.update()

    @property
    def is_closed(self):
        return all(link.state == ratrod.CLOSED for link in self.links)

    def cut(self, how, whom=BOTH_WAYS):
        """The path breaks: `whom` are the directions whose takers are told, or where bytes are lost or changed."""
        # A flipped length may wait for ever; of a reset that one side alone hears the other one is not told.
        self.may_be_silent |= how in (SILENCE, FLIP) or how == RESET and len(whom) < 2
        for pipe in map(self.pipes.get, whom):
            if how == END:
                pipe.end()
            elif how == RESET:
                pipe.reset(lose=True)
            elif how == SILENCE:
                pipe.deaf = True
            else:
                pipe.flips = True

    def close(self):
        for pipe in self.pipes.values():
            for wire in (pipe.source, pipe.giver):
                wire.close()


def shake_hands(client, server):
    """Carries all messages; what the server says last is left for its own way."""
    client.start()
    server.start()
    last = b""
    while not (client.is_done and server.is_done):
        for giver, taker in ((client, server), (server, client)):
            last = giver.data_to_send()
            while last and taker.wanted:
                n = taker.wanted
                taker.receive_data(last[:n])
                last = last[n:]
    return last


def other_side(side):
    return REMOTE if side == ORIGINATOR else ORIGINATOR


class Connection:
    """An originator's connection, and what became of it. `is_disturbed`: something has happened that may end it."""

    def __init__(self, number, size, remote_size):
        self.number, self.remote_size = number, remote_size
        self.app = App((number, ORIGINATOR), size)
        self.remote = self.stream = self.accepted = None  # the other App; the two Streams
        self.connects, self.is_disturbed = 0, False
        self.has_skipped = False  # one side has sent more than a window, while its local socket took nothing

    @property
    def is_over(self):
        return self.app.dead or all(app.outcome == END and app.ended for app in self.apps)

    @property
    def apps(self):
        return [app for app in (self.app, self.remote) if app]

    @property
    def streams(self):
        return [stream for stream in (self.stream, self.accepted) if stream]

    def app_of(self, side):
        """The originator where there is no remote yet."""
        return self.remote if side == REMOTE and self.remote else self.app

    def stream_of(self, side):
        return self.accepted if side == REMOTE else self.stream

    def check_positions(self):
        """Of each direction: what was acknowledged has been taken, and what was taken has been sent."""
        for stream in self.streams:
            out = stream.out
            if not stream.is_over and out.start > out.acked:
                self.has_skipped = True
            assert out.end - out.start <= out.most <= ratrod.LARGEST_WINDOW
        if len(self.streams) == 2 and self.stream.id == self.accepted.id:
            for ours, theirs in ((self.stream, self.accepted), (self.accepted, self.stream)):
                if not ours.is_over and not theirs.is_over:
                    assert ours.out.acked <= theirs.taken <= theirs.received + 1 <= ours.out.sent + 1
                    assert theirs.taken <= ours.out.sent


class Owner(ratrod.Endpoint):
    """An Endpoint whose links are made by the test."""

    draining = False

    def __init__(self, world, keys):
        folder = types.SimpleNamespace(load=lambda: keys, warnings=[])
        super().__init__(world.loop, folder, world.limits, ratrod.Callbacks(), is_legacy=False, memory=1 << 28)
        self.world = world

    def on_link_closed(self, link, error):
        super().on_link_closed(link, error)
        # Both ends are honest: the protocol is broken by nobody. (5 s after an Error may pass before anything moves.)
        is_broken = isinstance(error, ratrod.RemoteProtocolError) and not isinstance(error, (ratrod.LinkClosed, ratrod.PeerError))
        assert not is_broken or str(error) == "it did not close its side", "between honest ends: %r" % error


class Links(ratrod.Opener):
    """Makes links as they are wanted, unless the server is out of reach."""

    is_reachable = True

    def want_links(self):
        if self.is_reachable and len(self.waiting) + len(self.detached) > self.owner.made:
            self.owner.made += 1
            self.loop.call_later(0, self._make)

    def _make(self):
        self.owner.made -= 1
        if self.is_reachable:
            self.put(self.owner.world.add_pair().opener)
        self.want_links()


class ClientEnd(Owner):
    def __init__(self, world):
        super().__init__(world, CLIENT_KEYS)
        self.made = 0  # links that are being made
        self.opener, self.patience = Links(self), self.limits.connect_timeout

    def on_idle(self, link, record):
        self.opener.put(link)

    def on_link_closed(self, link, error):
        super().on_link_closed(link, error)
        self.opener.on_link_closed(link)
        self.opener.want_links()

    def sweep(self):
        self.opener.sweep()


class ServerEnd(Owner):
    """Connects what it is asked for in the next round, or where it `hesitates` when told. `leaves`: Close answers the next Open or Over."""

    def __init__(self, world):
        super().__init__(world, SERVER_KEYS)
        self.quota = ratrod.Quota(1000, 1000, "carries as many connections")
        self.acceptor = ratrod.Acceptor(self, self.quota, self._connect, lambda _stream, _link: None, ratrod.Server._answer,
                                        lambda _link, open_: ("the client", open_.target))
        self.asked = []
        self.leaves = self.hesitates = False

    def on_open(self, link, open_):
        if self.leaves and open_.attempt == 1:
            return self._leave(link)
        return self.acceptor.open(link, open_)

    def on_abandon(self, link, stream_id):
        self.acceptor.abandon(link, stream_id)

    def on_idle(self, link, record):
        if self.leaves:
            return self._leave(link, record)
        return link.send(record + link.writer.record(ratrod.OVER))

    def _leave(self, link, record=b""):
        self.leaves = False
        link.leave(record + link.writer.record(ratrod.CLOSE))

    def _connect(self, stream, _link, done):
        connection = self.world.connections[int(stream.target)]
        connection.accepted = stream
        self.asked.append((connection, stream, done))

    def connect_all(self):
        while self.asked:
            self.connect(self.asked[0])

    def connect(self, question):
        self.asked.remove(question)
        connection, stream, done = question
        if stream.is_over:
            return done(None, ratrod.ConnectError("the client is gone"))
        connection.connects += 1
        assert connection.connects == 1, "a second connect for one stream"
        connection.remote = App((connection.number, REMOTE), connection.remote_size)
        connection.app.other, connection.remote.other = connection.remote, connection.app
        return done(connection.remote.local, None)

    def refuse(self, question):
        self.asked.remove(question)
        question[0].is_disturbed = True
        question[2](None, ratrod.ConnectError("Connection refused"))

    def sweep(self):
        self.acceptor.sweep()


class World:
    """All of it. `size`: the room of each link."""

    def __init__(self, size=LARGE, limits=ratrod.DEFAULT_LIMITS, window=ratrod.WINDOW):
        self.size, self.limits, self.clock = size, limits, Clock()
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(ratrod, "time", self.clock))
        self.patch("WINDOW", window)
        logging.getLogger("ratrod").setLevel(logging.CRITICAL)  # thousands of connections are reset here
        self.loop = Loop()
        self.pairs, self.connections = [], []
        self.client, self.server = ClientEnd(self), ServerEnd(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._patches.close()
        logging.getLogger("ratrod").setLevel(logging.NOTSET)
        self.loop.close()
        for pair in self.pairs:
            pair.close()
        for app in self.apps:
            app.socket.close()
            app.local.close()

    def patch(self, name, value):
        self._patches.enter_context(mock.patch.object(ratrod, name, value))

    # ---- who is who

    def add_pair(self):
        self.pairs.append(Pair(self.client, self.server, self.size))
        return self.pairs[-1]

    @property
    def live(self):
        return [connection for connection in self.connections if not connection.is_over]

    @property
    def apps(self):
        return [app for connection in self.connections for app in connection.apps]

    @property
    def open_pairs(self):
        return [pair for pair in self.pairs if not pair.is_closed]

    @property
    def idle(self):
        return self.client.opener.idle

    # ---- what happens

    def originate(self, size=LARGE, remote_size=LARGE, first=0):
        """A new connection, whose originator has said `first` bytes already when it is accepted."""
        connection = Connection(len(self.connections), size, remote_size)
        self.connections.append(connection)
        connection.app.write(first)
        target = str(connection.number)
        connection.stream = ratrod.OpenerStream(self.client.opener, "originator", target)
        connection.stream.join(connection.app.local)
        self.client.opener.take(connection.stream)
        return connection

    def turn(self, n=1):
        for _ in range(n):
            self.loop.turn()
            self.check()

    def rounds(self, n=1):
        """Everything moves on by so many steps."""
        for _ in range(n):
            for app in self.apps:
                if app.reads:
                    app.read()
            for pair in self.open_pairs:
                for pipe in pair.pipes.values():
                    pipe.pump()
            if not self.server.hesitates:
                self.server.connect_all()
            self.turn()

    def settle(self):
        """Until nothing moves any more."""
        before, still = None, 0
        while still < 5:
            self.rounds()
            now = self.picture()
            still = still + 1 if now == before else 0
            before = now

    def picture(self):
        return ([(app.sent, app.received, app.outcome) for app in self.apps], len(self.pairs),
                [(pipe.moved, len(pipe.held), pipe.ended, pipe.deaf) for pair in self.open_pairs for pipe in pair.pipes.values()],
                # unread.end: a large record takes more turns to come than nothing else may move.
                [(link.state, len(link.out), link.is_held, link.unread.end) for pair in self.open_pairs for link in pair.links])

    def pass_time(self, seconds):
        """Deadlines pass, and Keepalive: a path that stands carries it. What is on its way arrives first."""
        self.rounds(12)
        for _ in range(0, seconds, 5):
            self.clock.now += min(5, seconds)
            self.rounds(2)

    # ---- what must be true

    def check(self):
        for connection in self.live:
            connection.check_positions()
            pair = next((pair for pair in self.pairs if connection.stream.link in pair.links), None)
            connection.is_disturbed |= bool(pair and pair.may_be_silent)
        for pair in self.open_pairs:
            for link in pair.links:
                waiting = len(link.unread.view) if link.unread.view is not None else 0
                pending = len(getattr(link.user, "_pending", None) or b"")
                assert len(link.out) <= OUT_BOUND
                assert waiting <= ratrod.SCRATCH_IN
                assert waiting + pending <= IN_BOUND

    def finish(self):
        """Lets everything come to its end, and checks how it ended."""
        self.client.opener.is_reachable = True
        self.client.opener.want_links()
        self.check_half_closes()
        self.let_all_end()
        for connection in self.connections:
            if not connection.is_disturbed and not connection.has_skipped:
                assert outcomes(connection) == [END, END], "ended by nothing that happened"
        # A side that nobody told of a broken path finds out by the other's silence; what nobody attaches is given up.
        self.pass_time(60)
        self.let_all_end()
        if not all(app.outcome for app in self.apps) or self.server.acceptor._streams:
            self.pass_time(700)
        # Whole with a clean end, or visibly reset; App.read() has held each end against what was sent.
        assert all(app.outcome for app in self.apps), "it never ended"
        assert all(app.local.fileno() < 0 for app in self.apps), "its local socket is still open"
        assert all(stream.is_over for connection in self.connections for stream in connection.streams)
        self.check_nothing_left()

    def check_half_closes(self):
        """One direction ends without the other."""
        self.server.hesitates = False
        for app in self.apps:
            app.reads = True
        self.settle()
        for connection in self.connections:
            for app in connection.apps if not connection.is_disturbed and not connection.has_skipped else ():
                assert app.outcome == (END if app.other.ended else None)

    def let_all_end(self):
        before = None
        while before != self.picture():
            before = self.picture()
            for app in self.apps:
                app.end()
            self.settle()

    def check_nothing_left(self):
        opener, acceptor = self.client.opener, self.server.acceptor
        for pair in self.open_pairs:
            assert {link.state for link in pair.links} <= {ratrod.IDLE, ratrod.CLOSED}
            assert all(link.user is ratrod.NOBODY for link in pair.links)
        assert not opener.waiting and not opener.detached
        assert not acceptor._detached and not acceptor._opens and not self.server.quota.total
        assert not acceptor._streams, "what was acknowledged is still kept"
        for memory in (self.client.memory, self.server.memory):
            assert (memory.by_key, memory.untaken.by_key) == ({}, {}), "not given back"


def outcomes(connection):
    return [app.outcome for app in connection.apps]
