"""A whole Client and a whole Server in one process, on the loop and the clock of joined.py, and between them links that a test pumps and cuts.
Only what would take threads is replaced: the client's links are made here. At the outer ends are plain sockets, of which every byte is known."""

import collections
import contextlib
import errno
import logging
import pathlib
import socket
import tempfile
from unittest import mock

import ratrod
from support.joined import CLIENT_KEYS, LARGE, OUT_BOUND, RESET, SERVER_KEYS, Clock, Loop, Pair, Talker
from support.keys import make_keys
from support.sockets import reset


class Dial:
    """In place of ratrod.Dial: asks `ends` for a link."""

    ends = None

    def __init__(self, client, reach, open_, done, report, server):
        self._done, self._is_closed, self.born = done, False, client.loop.now

    def try_next(self):
        self.ends.make_link(self.on_done)

    def on_done(self, link, error):
        if not self._is_closed:
            self._done(link, error)
        elif link:
            link.close()

    def close(self):
        self._is_closed = True


class Ends:
    """Client, Server and the pairs of links between them. `reachable`: whether a new link can be made."""

    def __init__(self, *tunnels, limits=ratrod.DEFAULT_LIMITS):
        self.stack = contextlib.ExitStack()
        self.clock, self.size, self.pairs, self.reachable = Clock(), LARGE, [], True
        self.stack.enter_context(mock.patch.object(ratrod, "time", self.clock))
        self.stack.callback(ratrod.log.setLevel, logging.NOTSET)
        ratrod.log.setLevel(logging.CRITICAL)
        self.loop = Loop()
        self.stack.callback(self.loop.close)
        folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        client, server = make_keys(folder / "client", CLIENT_KEYS.seed), make_keys(folder / "server", SERVER_KEYS.seed)
        server.trust(client, "authorized_keys")
        nowhere = ratrod.Address("127.0.0.1", 0)
        self.server = ratrod.Server(self.loop, ratrod.KeyFolder(str(server.path), ratrod.parse_grant), limits,
                                    ratrod.ServerOptions(nowhere, ratrod.Policy(), allow_listen=True), ratrod.Callbacks())
        self.stack.callback(self.server.close)
        self.server.rules.look()
        self.ready, self.ended = [], []
        self.stack.enter_context(mock.patch.object(ratrod, "Dial", Dial))
        Dial.ends = self
        specs = [spec for tunnel in tunnels for spec in ratrod.parse_tunnels(tunnel)]
        self.client = ratrod.Client(self.loop, ratrod.KeyFolder(str(client.path)), limits, ratrod.ClientOptions([nowhere], specs),
                                    ratrod.Callbacks(lambda: self.ready.append(True), self.ended.append))
        self.stack.callback(self.client.close)
        self.client.start()
        self.rounds(20)
        assert self.ready and not self.ended

    def close(self):
        self.stack.close()
        for pair in self.pairs:
            pair.close()

    def make_link(self, done):
        def made():
            if not self.reachable:
                return done(None, ratrod.ConnectError("Connection refused"))
            pair = Pair(self.client, self.server, self.size)
            self.pairs.append(pair)
            return done(pair.opener, None)
        self.loop.call_later(0, made)

    @property
    def live(self):
        return [pair for pair in self.pairs if not pair.is_closed]

    def rounds(self, n=1, pump=True):
        for _ in range(n):
            self.pairs = self.live
            for pair in self.pairs if pump else ():
                for pipe in pair.pipes.values():
                    pipe.pump()
            self.loop.turn()

    def pass_time(self, seconds):
        step = 5 if seconds > 5 else 1  # 10 s at once would be a machine that slept
        for _ in range(0, seconds, step):
            self.clock.now += step
            self.rounds(3)
        self.rounds(5)

    def check_memory(self):
        for pair in self.live:
            for link in pair.links:
                assert len(link.out) <= OUT_BOUND


class Originator:
    """A program that asks by UDP: which of its datagrams were sent, and which were answered."""

    def __init__(self, number, port):
        self.number, self.sent, self.answered = number, 0, collections.Counter()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.connect(("127.0.0.1", port))

    def send(self, size):
        self.socket.send(b"%d %d " % (self.number, self.sent) + b"x" * size)
        self.sent += 1

    def hear(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                said, number, count, rest = self.socket.recv(65536).split(b" ", 3)
                assert (said, int(number)) == (b"answer", self.number), "another originator's answer"
                assert int(count) < self.sent and rest == b"x" * len(rest)
                self.answered[int(count)] += 1
                assert self.answered[int(count)] == 1, "an answer that came twice"


class Oracle:
    """What the originators ask. It answers when the test says so, at most once."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.heard, self._questions = collections.Counter(), collections.deque()

    def hear(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                data, origin = self.socket.recvfrom(65536)
                number, count, _ = data.split(b" ", 2)
                self.heard[int(number), int(count)] += 1
                assert self.heard[int(number), int(count)] == 1, "a question that came twice"
                self._questions.append((data, origin))

    def answer(self, n):
        for _ in range(min(n, len(self._questions))):
            data, origin = self._questions.popleft()
            self.socket.sendto(b"answer " + data, origin)


class App(Talker):
    """One whose end is a plain socket."""

    def write(self, n):
        try:
            super().write(n)
        except OSError:
            self.outcome = RESET

    def reset(self):
        self.outcome = RESET
        if self.socket.fileno() >= 0:
            reset(self.socket)

    def read(self):
        if not self.outcome:
            try:
                self.hear(self.socket.recv(1 << 20))
            except BlockingIOError:
                pass
            except OSError as error:
                assert error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED), error
                self.outcome = RESET


class Back:
    """What comes back through a reverse tunnel. Which of the target's connections is whose shows by the number that goes before everything else."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.originators, self._unknown = [], []

    def originate(self, port):
        sock = socket.socket()
        sock.connect(("127.0.0.1", port))  # into the listener's queue: it does not wait for the loop
        sock.setblocking(False)
        app = App(len(self.originators), sock)
        sock.send(b"%08d" % app.tag)
        self.originators.append(app)

    @property
    def apps(self):
        return [app for originator in self.originators for app in (originator, originator.other) if app]

    def accept(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listener.accept()
                sock.setblocking(False)
                self._unknown.append(sock)
        for sock in list(self._unknown):
            try:
                name = sock.recv(8)
            except BlockingIOError:
                continue
            except OSError:
                name = b""
            self._unknown.remove(sock)
            if len(name) == 8:
                originator = self.originators[int(name)]
                assert originator.other is None, "one connection reached the target twice"
                originator.other = App(("target", originator.tag), sock)
                originator.other.other = originator
            else:  # it ended before it said who it was; one byte at a time does not happen on loopback
                assert not name
                sock.close()

    def read(self):
        self.accept()
        for app in self.apps:
            app.read()

    def close(self):
        self.listener.close()
        for sock in (*self._unknown, *(app.socket for app in self.apps)):
            sock.close()
