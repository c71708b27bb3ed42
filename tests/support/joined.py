"""Two joined links in one process, on a loop and a clock of the test's own: the ground for test_states.py and whole_ends.py.

Between the two links of a Pair stands a relay that the test pumps and breaks; at the outer ends stand Apps, of which every byte is known.
"""

import errno
import functools
import os
import random
import socket
import struct
import time

import ratrod

CLIENT_KEYS, SERVER_KEYS = (ratrod.KeyPair.from_seed(seed * 32) for seed in (b"c", b"s"))
ALL = 1 << 20
SMALL, LARGE = 4096, 212_992
TO_ACCEPTOR, TO_OPENER = "to the acceptor", "to the opener"
BOTH_WAYS = TO_ACCEPTOR, TO_OPENER
END, RESET, GONE = "end", "reset", "gone"  # how an App's connection ended: it saw an end, it saw a reset, it went away with a reset
FLIP, SILENCE = "flip", "silence"  # a byte changes on its way; nothing arrives any more, and nobody is told


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
        self._is_stopped = False
        self.call_later(0, self.stop)
        self.run()

    @staticmethod
    def _on_bug(call, error):
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
    """Two joined links of `client` and `server`, whose handshake is done; the server's HandshakeCompletion is still on its way."""

    def __init__(self, client, server, size):
        opener, near = wires(size)
        acceptor, far = wires(size)
        self.may_be_silent = False  # and so what is on it may be given up
        self.pipes = {TO_ACCEPTOR: Pipe(near, opener, far, acceptor), TO_OPENER: Pipe(far, acceptor, near, opener)}
        suites = ratrod.offered_suites()
        ours = ratrod.NoiseClientHandshake(CLIENT_KEYS, suites, check_server=lambda key: None, report=lambda *words: None)
        theirs = ratrod.NoiseServerHandshake(SERVER_KEYS, suites, authorize=lambda key: None, instance=server.instance)
        self.pipes[TO_OPENER].held = shake_hands(ours, theirs)
        self.opener = ratrod.Link(client, opener, ours, ratrod.OPENER, "the server")
        self.opener.set_deadline(10.0, lambda: self.opener.abort(ratrod.ConnectError("the server did not complete the handshake")))
        self.acceptor = ratrod.Link(server, acceptor, theirs, ratrod.ACCEPTOR, "127.0.0.1:9")
        for link in self.links:
            link.update()

    @property
    def links(self):
        return self.opener, self.acceptor

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
