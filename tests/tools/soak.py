#!/usr/bin/env python3
"""A soak: streams of every kind through a real server and real clients whose links pass a hostile relay; each is whole, or visibly reset.

    python tests/tools/soak.py --seconds 3600               the whole run; test_soak.py has 10 s of it
    python tests/tools/soak.py --seconds 60 --seed 7        the same plans and the same deeds of the relay again; their timing is the machine's
    python tests/tools/soak.py --seconds 9 --bare           with nothing between the streams' ends but the relay: what the soak then finds

Linux only. It takes half a core.

Streams have 0 bytes to some MB each way, pauses, slow readers, half-closes of either side first, and resets by either side. Every byte is
compared with the one that the seed has for its place. Each stream must end in one of these ways:

- whole: both sides have every byte and a clean end;
- reset: a side that has not had its clean end and sent its own sees an error. (One that had both cannot learn any more what became of
  its last bytes, with or without a tunnel.) Only the other side's reset does that, and on the legacy wire the relay.

A failure is a clean end with missing or wrong bytes, a stream that stands still for longer than the protocol allows, and a reset of a
stream that nobody disturbed: the relay has calm times, in which it only delays and cuts into pieces. Datagrams may be lost, but never be
wrong or come twice. (An answer that comes late may find that the system has given the port of its question to another session, as it may
behind any NAT. Such answers are counted, if the target has heard both sessions from that port.) What the relay does to the links of a legacy
client leaves out the clean FIN, which nobody can tell from an end there, and ends with a reset what it has spoiled: that protocol has no
sign of life. Unix sockets know no reset: they are only at the target's side here, where an early end counts as one. Keepalive and silence are
scaled (--scale) to fit.
"""

import argparse
import collections
import contextlib
import heapq
import itertools
import math
import os
import pathlib
import random
import re
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support.keys import make_keys
from support.pressure import figure, memory, scaled
from support.programs import LISTENING, READY, STARTED, Program, descriptors
from support.sockets import dial, port_of, reset

# Addresses of this run's own: whatever else runs on the machine and connects to a port that was somebody else's before does not come here.
NETWORK = "127.%d" % (random.SystemRandom().randrange(128, 250))
HOST = NETWORK + ".0.1"
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
AT_ONCE = 24  # streams under way
LARGEST = 4 << 20  # bytes of one direction
BACKLOG = 256 * 1024  # bytes of one direction that the relay holds
WARM_UP = 60  # seconds after which everything has been used once
SETTLE = 2.0  # after the relay's last deed, a stream that begins counts as undisturbed
CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, TRIES = 10, 5, 3  # the endpoints'; of an Open
RETRY_INTERVAL = 3  # seconds, of a reverse tunnel that is lost
IDLE_TIME = 2.0  # surplus links are let go after it ...
LINK_AGE = 20  # ... and old ones take no more streams
LEGACY_HANDSHAKE = 600  # bytes of a direction, at most, which the legacy wire does not authenticate


def up_to(chance, n):
    """From 1 to n, each order of magnitude as likely as any other."""
    return int(math.exp(chance.uniform(0, math.log(n))))


# ---------------------------------------------------------------------------------------------------- the hostile relay


class Pipe:
    """One direction of a Wire."""

    def __init__(self, wire, name, source, sink):
        self.wire, self.name, self.source, self.sink = wire, name, source, sink
        self.queue, self.queued = collections.deque(), 0  # (when due, bytes); None in place of bytes is the end
        self.seen = self.dropped = 0
        self.trap = None  # (at which byte, which deed)
        self.ended = self.dropping = self.fin_sent = False
        self.delay = self.resume_at = 0.0
        self.single = 0  # so many bytes leave one by one

    def put(self, data):
        if data or data is None:
            self.queue.append((time.monotonic() + self.delay, data))
            self.queued += len(data or b"")

    def read(self):
        try:
            data = self.source.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            return self.wire.broken(self.source)
        if not data:
            self.ended = True
            data = None
        if self.dropping:
            self.dropped += len(data or b"")
        elif data and self.trap and self.seen + len(data) > self.trap[0]:
            (at, deed), self.trap = self.trap, None
            kept = data[:at - self.seen]
            self.seen += len(data)
            self.put(kept)
            self.put(deed(self, data[len(kept):]))
        else:
            self.seen += len(data or b"")
            self.put(data)

    def lose(self):
        """Nobody is there any more for what waits, which must not keep the relay from reading: it would not see its other side go either."""
        self.dropping, self.queued = True, 0
        self.queue.clear()

    def due(self, now):
        return bool(self.queue) and self.queue[0][0] <= now

    def write(self, now):
        while self.due(now) and self.sink not in self.wire.dead:
            when, data = self.queue.popleft()
            try:
                if data is None:
                    self.fin_sent = True
                    self.sink.shutdown(socket.SHUT_WR)
                    continue
                sent = self.sink.send(data[:1] if self.single > 0 else data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self.wire.broken(self.sink)
            self.queued -= sent
            self.single -= sent
            if sent < len(data):
                self.queue.appendleft((when, data[sent:]))
                return


class Wire:
    """One connection through the relay, and what is done to it."""

    def __init__(self, relay, number, near, far, legacy):
        self.relay, self.number, self.legacy = relay, number, legacy
        self.sockets = (near, far)
        self.up, self.down = Pipe(self, "to the server", near, far), Pipe(self, "to the client", far, near)
        self.pipes = (self.up, self.down)
        self.dead = set()
        self.masks = {near: 0, far: 0}
        self.tampered = self.flipped = self.over = False
        self.stopped_until = 0.0
        self.must_end_by = self.reset_at = math.inf

    def broken(self, sock):
        """This side has reset its connection. The other one learns of it, unless what comes from this side is dropped."""
        pipe = self.up if sock is self.up.source else self.down
        other = self.down if pipe is self.up else self.up
        if not pipe.dropping:
            return self.reset()
        self._bury(sock)
        other.lose()

    def _bury(self, sock):
        self._want(sock, 0)
        self.dead.add(sock)
        reset(sock)

    def reset(self):
        for sock in self.sockets:
            if sock not in self.dead:
                self._bury(sock)

    def tick(self, now):
        if self.over:
            return
        if now >= self.reset_at:
            self.reset()
        for pipe in self.pipes:
            if pipe.resume_at and now >= pipe.resume_at:
                pipe.resume_at, pipe.dropping = 0.0, False
                if pipe.dropped:
                    self.must_end_by = now + self.relay.give_up
                if pipe.ended:
                    pipe.put(None)
        if now >= self.stopped_until:
            for pipe in self.pipes:
                pipe.write(now)
        self.update(now)

    def on_event(self, sock, mask):
        now = time.monotonic()
        for pipe in self.pipes:
            if mask & READ and pipe.source is sock and not pipe.ended and sock not in self.dead:
                pipe.read()
            if now >= self.stopped_until:
                pipe.write(now)
        self.update(now)

    def update(self, now):
        for sock, reads, writes in ((self.sockets[0], self.up, self.down), (self.sockets[1], self.down, self.up)):
            if sock not in self.dead and now >= self.stopped_until:
                self._want(sock, READ * (not reads.ended and reads.queued < BACKLOG) | WRITE * writes.due(now))
            elif sock not in self.dead:
                self._want(sock, 0)
        # A side has ended when it reset its connection, or sent its FIN and what the other one said is out.
        self.over = all(pipe.source in self.dead or pipe.ended and (pipe.dropping or pipe.fin_sent or pipe.sink in self.dead)
                        for pipe in self.pipes)
        if self.over:
            for pipe in self.pipes:
                if pipe.sink not in self.dead:
                    self._want(pipe.sink, 0)
                    # A FIN that was dropped must not be made up for by that of closing.
                    (socket.socket.close if pipe.fin_sent else reset)(pipe.sink)

    def _want(self, sock, mask):
        if mask != self.masks[sock]:
            if not self.masks[sock]:
                self.relay.selector.register(sock, mask, self)
            elif mask:
                self.relay.selector.modify(sock, mask, self)
            else:
                self.relay.selector.unregister(sock)
            self.masks[sock] = mask


class Relay(threading.Thread):
    """Everything that can happen on a path: one thread, one selector. `port` of each flavour leads to the server."""

    # How often each: a deed takes the pipe and the bytes that it was waiting for, and gives those that are passed on.
    HOSTILE = {"fin": 4, "half a fin": 2, "rst": 4, "half a rst": 2, "silence": 2, "drop": 2, "drop and go on": 2, "flip": 4, "replay": 4,
               "refuse": 1}
    LEGACY = {"rst": 4, "silence": 2, "drop": 2, "flip": 4, "refuse": 1}
    ROUGH = {"delay": 2, "split": 2, "short silence": 1}  # what a path may do in calm times too

    def __init__(self, chance, server_port, silence, deeds=()):
        super().__init__(daemon=True)
        self._hostile, self._hostile_to_legacy = ({name: n for name, n in table.items() if name in deeds or not deeds}
                                                  for table in (self.HOSTILE, self.LEGACY))
        self._chance, self._server_port, self._silence = chance, server_port, silence
        self.give_up = 2 * silence + 10
        self.selector = selectors.DefaultSelector()
        self.wires = set()
        self.hostile = self.stopping = False
        self.disturbed_at = 0.0
        self.notes = collections.deque(maxlen=3000)
        self.deeds = collections.Counter()
        self.failures = []
        self._numbers = itertools.count(1)
        self._next_hostile = self.next_rough = 0.0
        self._listeners, self.ports, self._closed = {}, {}, {}
        for flavour in ("ratrod2", "legacy"):
            self._listen(flavour)

    def _listen(self, flavour):
        listener = socket.create_server((HOST, self.ports.get(flavour, 0)), backlog=200)
        listener.setblocking(False)
        self.ports[flavour] = port_of(listener)
        self._listeners[flavour] = listener
        self.selector.register(listener, READ, flavour)

    def note(self, who, text, *args):
        self.notes.append((time.monotonic(), "link %s: %s" % (who, text % args)))

    # ---- the loop

    def run(self):
        while not self.stopping:
            for key, mask in self.selector.select(0.01):
                if isinstance(key.data, str):
                    self._accept(key.fileobj, key.data)
                elif key.fileobj not in key.data.dead and not key.data.over:
                    key.data.on_event(key.fileobj, mask)
            self._tick(time.monotonic())
        for wire in self.wires:
            wire.reset()
        for listener in self._listeners.values():
            listener.close()
        self.selector.close()

    def _tick(self, now):
        for flavour, until in list(self._closed.items()):
            if now >= until:
                with contextlib.suppress(OSError):  # somebody has the port for a moment
                    self._listen(flavour)
                    del self._closed[flavour]
        for wire in list(self.wires):
            wire.tick(now)
            if not wire.over and now >= wire.must_end_by:
                mine = [text for _, text in self.notes if text.startswith("link %s:" % wire.number)]
                self.failures.append("a link was not given up within %g s after it was spoiled: %s" % (self.give_up, mine))
                wire.reset()
                wire.update(now)
            if wire.over:
                self.wires.discard(wire)
        if self.hostile or self._closed or any(wire.tampered for wire in self.wires):
            self.disturbed_at = now
        if self.hostile and now >= self._next_hostile:
            self._next_hostile = now + self._chance.expovariate(12)
            self._choose(self._hostile, self._hostile_to_legacy)
        if now >= self.next_rough:
            self.next_rough = now + self._chance.expovariate(8)
            self._choose(self.ROUGH, self.ROUGH)

    def calm(self, patient):
        """From another thread: no more deeds, and none left over but what the ends must notice by themselves; without patience only
        flipped bytes."""
        self.hostile = False
        for wire in list(self.wires):
            for pipe in wire.pipes:
                pipe.trap = None
            if wire.tampered and not wire.flipped and not (patient and wire.must_end_by < math.inf):
                wire.reset_at = 0.0

    def _accept(self, listener, flavour):
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = dial(self._server_port, HOST)
        except OSError:
            return reset(near)
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wires.add(Wire(self, next(self._numbers), near, far, flavour == "legacy"))

    # ---- the deeds

    def _choose(self, table, legacy):
        wires = sorted((wire for wire in self.wires if not wire.tampered), key=lambda wire: wire.number)
        if not wires:
            return None
        wire = self._chance.choice(wires)
        if wire.legacy:
            table = legacy
        if not table:
            return None
        name = self._chance.choices(list(table), list(table.values()))[0]
        if name == "refuse":
            return self.refuse("legacy" if wire.legacy else "ratrod2")
        pipe = self._chance.choice(wire.pipes)
        deed = getattr(self, "do_" + name.replace(" ", "_"))
        now = self._chance.random() < 0.5 and name not in ("flip", "replay")
        at = pipe.seen + (0 if now else up_to(self._chance, 100000) - 1)
        if wire.legacy and name == "flip":
            at = max(at, LEGACY_HANDSHAKE)
        if now:
            pipe.put(deed(pipe, b""))
        elif not pipe.trap or table is not self.ROUGH:
            pipe.trap = at, deed
        return None

    def _spoil(self, pipe, name, must_end=False):
        self.disturbed_at = time.monotonic()
        pipe.wire.tampered = True
        self.deeds[name] += 1
        self.note(pipe.wire.number, "%s, at byte %d %s", name, pipe.seen, pipe.name)
        if must_end:
            pipe.wire.must_end_by = time.monotonic() + self.give_up

    def do_fin(self, pipe, _rest):
        self._spoil(pipe, "fin", must_end=True)
        for each in pipe.wire.pipes:
            self._end(each)
        return b""

    def do_half_a_fin(self, pipe, _rest):
        self._spoil(pipe, "half a fin", must_end=True)
        self._end(pipe)
        return b""

    @staticmethod
    def _end(pipe):
        pipe.put(None)
        pipe.dropping = True

    def do_rst(self, pipe, _rest):
        self._spoil(pipe, "rst")
        if self._chance.random() < 0.5:
            pipe.write(time.monotonic())
        pipe.wire.reset()
        return b""

    def do_half_a_rst(self, pipe, _rest):
        """One side is reset, the other hears nothing more."""
        self._spoil(pipe, "half a rst", must_end=True)
        for each in pipe.wire.pipes:
            each.dropping = True
        pipe.lose()
        pipe.wire._bury(pipe.sink)
        return b""

    def do_silence(self, pipe, rest):
        self._spoil(pipe, "silence")
        pipe.wire.stopped_until = time.monotonic() + self._chance.uniform(0.1, 1.5 * self._silence)
        return rest

    def do_short_silence(self, pipe, rest):
        pipe.wire.stopped_until = time.monotonic() + self._chance.uniform(0, 0.2 * self._silence)
        return rest

    def do_drop(self, pipe, rest):
        self._spoil(pipe, "drop", must_end=not pipe.wire.legacy)
        pipe.dropping, pipe.dropped = True, len(rest)
        if pipe.wire.legacy:
            pipe.wire.reset_at = time.monotonic() + self._chance.uniform(0, 3)
        return b""

    def do_drop_and_go_on(self, pipe, rest):
        self._spoil(pipe, "drop and go on")
        pipe.dropping, pipe.dropped = True, len(rest)
        pipe.resume_at = time.monotonic() + self._chance.uniform(0.01, 1)
        return b""

    def do_flip(self, pipe, rest):
        mask = self._chance.randrange(1, 256)
        pipe.wire.flipped = True
        self._spoil(pipe, "flip", must_end=not pipe.wire.legacy)
        if pipe.wire.legacy:
            pipe.wire.reset_at = time.monotonic() + 3
        return bytes((rest[0] ^ mask,)) + rest[1:]

    def do_replay(self, pipe, rest):
        """The same bytes twice, whole records among them."""
        self._spoil(pipe, "replay", must_end=True)
        return rest + rest

    def do_delay(self, pipe, rest):
        pipe.delay = self._chance.choice((0, 0.01, 0.05, 0.2))
        return rest

    def do_split(self, pipe, rest):
        pipe.single = up_to(self._chance, 2000)
        return rest

    def refuse(self, flavour):
        if flavour in self._closed:
            return
        self.disturbed_at = time.monotonic()
        self.deeds["refuse"] += 1
        seconds = self._chance.uniform(0.1, 1.5)
        self.note("-", "no new ones of %s for %.1f s", flavour, seconds)
        listener = self._listeners.pop(flavour)
        self.selector.unregister(listener)
        listener.close()
        self._closed[flavour] = time.monotonic() + seconds


# ---------------------------------------------------------------------------------------------------- streams


class Plan:
    """What one side of a stream does: how much it sends and how, which side ends first, and whether it breaks off."""

    def __init__(self, chance, size, incoming):
        self.size, self.incoming = size, incoming
        self.chunk = up_to(chance, 65536)
        # Small pieces of megabytes would only cost time.
        self.chunk, self.bite = max(self.chunk, size // 500), max(self.chunk, incoming // 500)  # of one send, of one recv
        self.pauses = {kind: sorted((chance.randrange(n + 1), chance.choice((0.01, 0.1, 0.5, 2))) for _ in range(chance.choice((0, 0, 1, 3))))
                       for kind, n in (("sent", size), ("received", incoming))}
        self.buffer = chance.choice((0, 0, 0, 4096 if incoming < 20000 else 65536))  # SO_RCVBUF: a small one takes 40 kB/s
        self.wait_for = 0  # so many bytes of the other side before it speaks
        self.ends_last = False  # its FIN follows the other side's
        self.abort = None  # ("sent" or "received", after how many bytes)

    def __str__(self):
        return "sends %d by %d, expects %d, waits for %d, pauses %s%s%s%s" % (
            self.size, self.chunk, self.incoming, self.wait_for, self.pauses, ", ends last" * self.ends_last,
            ", resets when %s %d" % self.abort if self.abort else "", ", small buffer" * bool(self.buffer))


KINDS = {"forward": 4, "socks": 3, "reverse": 2, "unix": 1, "legacy": 2, "legacy socks": 1}
HEADER = struct.Struct(">Q")  # which stream it is, where the target cannot know it by its port


class Stream:
    """One connection from an originator to a target. `content` holds what either direction carries, from its own offset on."""

    def __init__(self, seed, number, content_size, kinds):
        chance = random.Random("%d stream %d" % (seed, number))
        self.number = number
        self.kind = chance.choices(list(kinds), list(kinds.values()))[0]
        self.offsets = chance.randrange(content_size), chance.randrange(content_size)
        up, down = self._size(chance), self._size(chance)
        self.header = b"" if "socks" in self.kind else HEADER.pack(number)
        self.plans = Plan(chance, up + len(self.header), down), Plan(chance, down, up + len(self.header))
        last = chance.choice((None, 0, 1))
        if last is not None:
            self.plans[last].ends_last = True
        waits = chance.choice((None, None, 0, 1))
        if waits is not None:
            plan = self.plans[waits]
            # The target cannot wait before it knows which stream it is; who waits for nothing of the other is waited for.
            plan.wait_for = chance.randrange(plan.incoming + 1)
            if waits == 0:
                plan.wait_for *= not self.header
        breaks = chance.choices((None, 0, 1), (85, 8, 7))[0]
        if breaks is not None and not (breaks and self.kind == "unix"):
            plan = self.plans[breaks]
            what = chance.choice(("sent", "received"))
            plan.abort = what, chance.randrange((plan.size if what == "sent" else plan.incoming) + 1)
        self.originator = None
        self.targets = []
        self.listener = None
        self.port = 0  # the originator's
        self.begun = self.moved = 0.0
        self.judged = False

    @staticmethod
    def _size(chance):
        kind = chance.random()
        return 0 if kind < 0.15 else up_to(chance, 200) if kind < 0.4 else up_to(chance, 300000) if kind < 0.94 else chance.randrange(LARGEST)

    def __str__(self):
        lines = ["stream %d (%s)" % (self.number, self.kind)]
        lines += ["  %s: %s" % (who, plan) for who, plan in zip(("originator", "target"), self.plans)]
        return "\n".join(lines + ["  %s" % end for end in [self.originator] + self.targets if end])


class End:
    """One side's socket of a stream. `outcome`: clean, reset, aborted (by itself, as planned), refused, or failed."""

    def __init__(self, soak, sock, who, stream=None, greeting=b""):
        self.soak, self.sock, self.who, self.stream = soak, sock, who, stream
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            # The kernel takes a reset only if its number is the one expected, else it asks again, twice a second at most: one that follows a
            # closed window is lost now and then, and nobody repeats it. A probe finds out.
            for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 1)):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sent = self.received = 0
        self.fin_sent = self.eof = False
        self.outcome = None
        self.error = ""
        self.mask = 0
        self.until = {"sent": 0.0, "received": 0.0}  # pauses
        self.born = self.moved = time.monotonic()
        self._header = b""
        self.greeting, self.reply = greeting, b""  # SOCKS: what is still to be said before the stream, and what came
        self.plan = None
        if stream:
            self.join(stream)

    def __str__(self):
        return "%s: %s%s after sending %d and receiving %d%s%s, %.1f s after its begin" % (
            self.who, self.outcome or "open", " (%s)" % self.error * bool(self.error), self.sent, self.received, ", FIN sent" * self.fin_sent,
            ", end seen" * self.eof, time.monotonic() - self.born)

    def join(self, stream):
        self.stream = stream
        side = self.who == "target"
        self.plan, (self.outgoing, self.incoming) = stream.plans[side], stream.offsets[::-1] if side else stream.offsets
        self.pauses = {kind: collections.deque(pauses) for kind, pauses in self.plan.pauses.items()}
        if self.plan.buffer and self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.plan.buffer)
        if side:
            stream.targets.append(self)
            self.received, self._header = len(self._header), b""
        self._move()

    # ---- what it waits for

    def wants(self, now):
        if self.outcome:
            return 0
        if self.greeting or not self.plan:
            return WRITE if self.greeting else READ
        if self.who == "originator" and len(self.reply) < self.soak.reply_size(self.stream):
            return READ
        reads = not self.eof and now >= self.until["received"]
        writes = not self.fin_sent and now >= self.until["sent"] and (
            self.received >= self.plan.wait_for if self.sent < self.plan.size else self.eof or not self.plan.ends_last)
        return READ * reads | WRITE * writes

    def update(self, now):
        mask = self.wants(now)
        if mask != self.mask:
            self.soak.watch(self, self.mask, mask)
            self.mask = mask

    def _move(self):
        self.moved = time.monotonic()
        if self.stream:
            self.stream.moved = max(self.stream.moved, self.moved)

    def _count(self, kind, n):
        """n more bytes sent or received: perhaps time for a pause, or to break off."""
        self._move()
        total = getattr(self, kind) + n
        setattr(self, kind, total)
        pauses = self.pauses[kind]
        while pauses and pauses[0][0] <= total:
            self.until[kind] = self.moved + pauses.popleft()[1]
            self.stream.moved = max(self.stream.moved, self.until[kind])

    def _breaks_off(self):
        if self.plan and self.plan.abort and not self.outcome and getattr(self, self.plan.abort[0]) >= self.plan.abort[1]:
            self.finish("aborted")
        return bool(self.outcome)

    # ---- events

    def on_event(self, mask):
        try:
            if mask & READ and self.mask & READ:
                self._read()
            if mask & WRITE and self.mask & WRITE and not self.outcome:
                self._write()
        except BlockingIOError:
            pass
        except OSError as error:
            # Refused: SOCKS said so, or nobody listens; nothing has passed.
            self.finish("refused" if isinstance(error, ConnectionRefusedError) else "reset", error.strerror or str(error))
        if not self.outcome and self.eof and self.fin_sent:
            self.finish("clean")
        self.update(time.monotonic())

    def _write(self):
        if self.greeting:
            self.greeting = self.greeting[self.sock.send(self.greeting):]
            return self._move()
        if self._breaks_off():
            return None
        if self.sent >= self.plan.size:
            self.sock.shutdown(socket.SHUT_WR)
            self.fin_sent = True
            return self._move()
        limit = min([self.plan.size, self.sent + self.plan.chunk] + [at for at, _ in itertools.islice(self.pauses["sent"], 1) if at > self.sent])
        header = self.stream.header if self.who == "originator" else b""
        data = header[self.sent:] if self.sent < len(header) else self.soak.content(self.outgoing, self.sent, min(limit - self.sent, 262144))
        self._count("sent", self.sock.send(data))
        return self._breaks_off()

    def _read(self):
        if not self.plan:
            return self._read_header()
        missing = self.soak.reply_size(self.stream) - len(self.reply) if self.who == "originator" else 0
        if missing:
            return self._read_reply(missing)
        if self._breaks_off():
            return None
        room = self.plan.incoming - self.received
        data = self.sock.recv(min(room + 1, 65536, self.plan.bite))
        if not data:
            return self._on_eof(room)
        if self.who == "originator" or self.received >= len(self.stream.header):
            expected = self.soak.content(self.incoming, self.received, len(data))
        else:
            expected = data[:0]
        if len(data) > room or data != expected:
            wrong = next((n for n, (a, b) in enumerate(zip(data, expected)) if a != b), len(expected))
            return self.fail("wrong bytes, or too many, from byte %d on: %r" % (self.received + wrong, data[wrong:wrong + 40]))
        self.soak.bytes += len(data)
        self._count("received", len(data))
        return self._breaks_off()

    def _on_eof(self, missing):
        self._move()
        self.eof = True
        if missing and self.sock.family == socket.AF_UNIX:
            self.finish("reset", "an early end of a Unix socket")
        elif missing:
            self.fail("A CLEAN END, %d bytes too early" % missing)

    def _read_header(self):
        data = self.sock.recv(HEADER.size - len(self._header))
        self._header += data
        self._move()
        if not data and self.sock.family == socket.AF_UNIX:
            return self.finish("reset", "an early end of a Unix socket")
        if not data:
            return self.fail("a clean end after %d bytes of the header" % len(self._header))
        if len(self._header) == HEADER.size:
            stream = self.soak.streams.get(HEADER.unpack(self._header)[0])
            if not stream or stream.targets:
                return self.fail("its header names %s: %r" % ("a stream that is here already" if stream else "no stream", self._header))
            self.join(stream)
        return None

    def _read_reply(self, missing):
        data = self.sock.recv(missing)
        self.reply += data
        self._move()
        if len(self.reply) > 3 and self.reply[3]:
            self.finish("refused", "SOCKS reply %d" % self.reply[3])
        elif not data:
            # Before the SOCKS server has answered, no stream is there that could end.
            self.finish("refused", "a SOCKS connection that ended unanswered")

    # ---- its end

    def finish(self, outcome, error=""):
        self.outcome, self.error = outcome, error
        self.update(time.monotonic())
        if outcome == "clean":
            self.sock.close()
        else:
            reset(self.sock)
        self._move()
        self.soak.ended(self)

    def fail(self, text):
        self.finish("failed", text)
        self.soak.failed(text, self.stream, self)


# ---------------------------------------------------------------------------------------------------- datagrams


DATAGRAM = struct.Struct(">4sIIII")  # question or answer, session, number, offset, size


class Originator:
    """A UDP socket that asks at random moments; answers may be lost, but are its own, right, and come once."""

    def __init__(self, soak, name, port, chance, session, socks=None):
        self.soak, self.name, self.port, self.session = soak, name, port, session
        self._chance = chance
        self._prefix = b"\0\0\0\1" + socket.inet_aton(HOST) + struct.pack(">H", soak.target_port) if socks else b""
        self.control = socks  # the TCP connection of the association, from whose address alone it takes datagrams
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((socks.getsockname()[0] if socks else HOST, 0))
        self.sock.connect((HOST, port))
        self.sock.setblocking(False)
        self.asked = 0
        self._open = set()
        self.next_at = time.monotonic()
        soak.watch(self, 0, READ)

    def tick(self, now):
        if now >= self.next_at:
            self.next_at = now + self._chance.expovariate(8)
            data = b"" if self._chance.random() < 0.02 else self.soak.datagram(self._chance, b"ask:", self.session, self.asked, len(self._prefix))
            with contextlib.suppress(OSError):
                self.sock.send(self._prefix + data)
                self.soak.counts["datagrams sent"] += bool(data)
            self._open.add(self.asked)
            self.asked += 1

    def on_event(self, _mask):
        try:
            data = self.sock.recv(65536)
        except OSError:
            return
        if not data.startswith(self._prefix):
            return self.soak.failed("a SOCKS datagram with a wrong head: %r" % data[:20])
        parts = self.soak.check_datagram(data[len(self._prefix):], b"ans:")
        if parts is None or parts[0] != self.session or parts[1] not in self._open:
            text = "answer over UDP (%s): %r" % (self.name, data[:40])
            if parts and parts[0] != self.session:
                return self.soak.answerer.on_stray(parts, self.session, "another originator's " + text)
            return self.soak.failed("a %s %s" % ("repeated" if parts else "wrong", text))
        self._open.discard(parts[1])
        self.soak.counts["datagrams answered"] += 1
        self.soak.counts["datagrams answered, " + self.name] += 1

    def close(self):
        self.soak.watch(self, READ, 0)
        self.sock.close()
        if self.control:
            self.control.close()


class Answerer:
    """The UDP target: each question is right and comes once; its answer is as long as it likes."""

    def __init__(self, soak, sock, chance):
        self.soak, self.sock, self._chance = soak, sock, chance
        sock.setblocking(False)
        self._seen = collections.OrderedDict()  # by session: the address that each question came from
        self.strays = {}  # by session and address: what is a failure unless that session asks from there
        soak.watch(self, 0, READ)

    def on_stray(self, parts, session, text):
        """`session` got the answer to another one's question."""
        address = self._seen.get(parts[0], {}).get(parts[1])
        if address in self._seen.get(session, {}).values():
            self.soak.counts["datagrams answered to a port's next user"] += 1
        else:
            self.strays[session, address] = text

    def on_event(self, _mask):
        try:
            data, origin = self.sock.recvfrom(65536)
        except OSError:
            return
        if not data:
            return
        parts = self.soak.check_datagram(data, b"ask:")
        if parts is None or parts[1] in self._seen.setdefault(parts[0], {}):
            return self.soak.failed("a wrong or repeated question over UDP: %r" % data[:40])
        self._seen[parts[0]][parts[1]] = origin
        self.soak.counts["datagrams answered to a port's next user"] += bool(self.strays.pop((parts[0], origin), None))
        while len(self._seen) > 1000:
            self._seen.popitem(last=False)
        with contextlib.suppress(OSError):
            self.sock.sendto(self.soak.datagram(self._chance, b"ans:", parts[0], parts[1], 10), origin)


# ---------------------------------------------------------------------------------------------------- the whole


class Vitals:
    """What a process holds, in MB and descriptors."""

    def __init__(self, program):
        self.now, self.peak = (memory(program, field) / (1 << 20) for field in ("VmRSS", "VmHWM"))
        self.descriptors = descriptors(program)

    def __str__(self):
        return "%.0f MB (at most %.0f), %d descriptors" % (self.now, self.peak, self.descriptors)


class Soak:
    def __init__(self, seconds, seed, scale, bare, deeds, logs, folder, workers=1):
        self.seconds, self.seed, self.bare, self.folder = seconds, seed, bare, pathlib.Path(folder)
        self.silence, self._deeds, self._logs = 45 * scale, deeds, logs
        self.scale, self.workers = scale, workers
        self.kinds = {kind: n for kind, n in ({"forward": 1} if bare else KINDS).items() if kind != "reverse" or workers == 1}
        # What the protocol allows an unlucky stream: each try of its Open, then a path that is dead; and the machine's own slowness.
        self.allowed = 3 if bare else TRIES * (CONNECT_TIMEOUT + HANDSHAKE_TIMEOUT) + self.silence + 10
        self.selector = selectors.DefaultSelector()
        self._content = memoryview(random.Random(seed).getrandbits(8 * (1 << 20)).to_bytes(1 << 20, "big") * 2)
        self.content_size = 1 << 20
        self.streams, self.ends, self._unjudged = {}, set(), set()
        self.originators, self.programs = {}, {}
        self.counts = collections.Counter()
        self.bytes, self.longest, self.failures = 0, 0.0, 0
        self._disturbed_at = 0.0
        self._old = []  # (when to forget it, number) of the streams that have been judged
        self._numbers, self._sessions = itertools.count(), itertools.count(1)
        self._chance = random.Random("%d soak" % seed)

    # ---- set-up

    def _launch(self, folder, *words):
        # The sweep, by which these are looked at, with them: a sign of life that is a second late counts for little in 30 s, but not in 3.
        times = {"keepalive": 20 * self.scale, "silence": self.silence, "doubt": 25 * self.scale, "trusted": 30 * self.scale,
                 "sweep_interval": self.scale, "idle_time": IDLE_TIME, "link_age": LINK_AGE}
        return Program([*scaled(**times), *("-v",) * bool(self._logs), "-k", folder, *words])

    def start(self, stack):
        self._listen_as_target(stack)
        if self.bare:
            self._start_relay(stack, self.target_port)
            self.ports = {"forward": self.relay.ports["ratrod2"]}
        else:
            self._start_programs(stack)

    def _start_relay(self, stack, port):
        self.relay = Relay(random.Random("%d relay" % self.seed), port, self.silence, self._deeds)
        self.relay.start()
        stack.callback(self._stop_relay)

    def _start_programs(self, stack):
        server, client = make_keys(self.folder / "server"), make_keys(self.folder / "client")
        server.trust(client, "authorized_keys")
        client.trust(server, "known_hosts")
        times = ("--udp-timeout", "3", "--handshake-timeout", str(HANDSHAKE_TIMEOUT))

        def launch(name, keys, *words):
            self.programs[name] = self._launch(keys.path, *words)
            stack.callback(self._stop, self.programs[name])
            return self.programs[name]
        listens = ["--allow-listen"] if self.workers == 1 else ["--workers", str(self.workers)]  # a reverse tunnel is one process's
        at = launch("server", server, "serve", "--legacy", *listens, "-r", re.escape(NETWORK) + r"\..*", "-r", "unix:.*", *times, HOST + ":0")
        self._start_relay(stack, int(at.wait_for(STARTED).group(1)))
        here, through = HOST + ":0:", HOST + ":%d"
        to, to_unix, socks = "%s%s:%d" % (here, HOST, self.target_port), "%sunix:%s" % (here, self.unix_path), here + "socks"
        times += "--max-retry-interval", str(RETRY_INTERVAL)  # for the reverse tunnel, which asks again that rarely
        new = launch("client", client, "connect", *times, through % self.relay.ports["ratrod2"], to, socks, to_unix,
                     *["R:" + to] * (self.workers == 1))
        old = launch("legacy client", client, "connect", "--legacy", "-e", *times, through % self.relay.ports["legacy"], to, socks)
        new.wait_for(READY)
        old.wait_for(READY)
        to_socks, to_unix, reverse = r"\[SOCKS\] Listening on `.*?:(\d+)`", r"\[\w+\] Listening on `.*?:(\d+)`.* `unix:", r" listens on `.*?:(\d+)`"
        self.ports = {kind: int(program.wait_for(pattern).group(1)) for kind, program, pattern in (
            ("forward", new, LISTENING), ("socks", new, to_socks), ("unix", new, to_unix), ("reverse", new, reverse),
            ("legacy", old, LISTENING), ("legacy socks", old, to_socks)) if kind in self.kinds}
        for n in range(8):
            self._ask_anew(n)

    def _listen_as_target(self, stack):
        while True:
            listener = socket.create_server((HOST, 0), backlog=500)
            self.target_port = port_of(listener)
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                udp.bind((HOST, self.target_port))
                break
            except OSError:  # the port is free for TCP alone
                udp.close()
                listener.close()
        self.unix_path = self.folder / "target"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(self.unix_path))
        unix.listen(100)
        self.answerer = Answerer(self, udp, random.Random("%d answers" % self.seed))
        for sock in (listener, unix):
            sock.setblocking(False)
            self.selector.register(sock, READ, None)
        for sock in (listener, unix, udp):
            stack.callback(sock.close)

    def _stop(self, program):
        program.stop()
        if self._logs:
            name = next(name for name, each in self.programs.items() if each is program)
            (self._logs / (name + ".log")).write_text(program.output)
        if re.search("Traceback|internal error", program.output):
            self.failed("an internal error:\n%s" % "\n".join(line for line in program.lines if re.search("Traceback|internal error", line)))

    def _stop_relay(self):
        self.relay.stopping = True
        self.relay.join()

    def _ask_anew(self, n):
        """The n-th UDP originator: through both clients, and two as SOCKS associations."""
        if n in self.originators:
            self.originators.pop(n).close()
        session = next(self._sessions)
        chance = random.Random("%d originator %d" % (self.seed, session))
        if n < 6:
            kind = "legacy" if n % 3 == 2 else "forward"
            self.originators[n] = Originator(self, kind, self.ports[kind], chance, session)
            return
        with contextlib.suppress(OSError):
            control = dial(self.ports["socks"], HOST)
            control.sendall(b"\5\1\0\5\3\0\1" + bytes(6))
            reply = b""
            while len(reply) < 12:
                more = control.recv(12 - len(reply))
                if not more:
                    return self.failed("a SOCKS association was refused")
                reply += more
            self.originators[n] = Originator(self, "socks", int.from_bytes(reply[-2:], "big"), chance, session, control)

    # ---- what ends and originators call

    def watch(self, who, before, after):
        if not before:
            self.selector.register(who.sock, after, who)
        elif after:
            self.selector.modify(who.sock, after, who)
        else:
            self.selector.unregister(who.sock)

    def content(self, offset, position, n):
        start = (offset + position) % self.content_size
        return self._content[start:start + n]

    def datagram(self, chance, magic, session, number, overhead):
        size = min(65507 - DATAGRAM.size - overhead, up_to(chance, 65507) - 1)
        offset = chance.randrange(self.content_size)
        return DATAGRAM.pack(magic, session, number, offset, size) + self.content(offset, 0, size)

    def check_datagram(self, data, magic):
        """(session, number), or None where it is not as it was made."""
        if len(data) < DATAGRAM.size:
            return None
        found, session, number, offset, size = DATAGRAM.unpack_from(data)
        whole = found == magic and offset < self.content_size and size < 65536 and data[DATAGRAM.size:] == self.content(offset, 0, size)
        return (session, number) if whole else None

    @staticmethod
    def reply_size(stream):
        return 12 if "socks" in stream.kind else 0

    def ended(self, end):
        self.ends.discard(end)
        if end.stream:
            self._unjudged.add(end.stream)

    def failed(self, text, stream=None, end=None):
        self.failures += 1
        if self.failures > 20:
            return
        print("FAILED, seed %d: %s" % (self.seed, text))
        if stream or end:
            print(stream or end)
            since = (stream.begun if stream else end.born) - self.silence
            deeds = ["  %6.1f s before: %s" % (time.monotonic() - when, what) for when, what in list(self.relay.notes) if when >= since]
            print("what the relay did meanwhile:\n%s" % ("\n".join(deeds) or "  nothing"))
            for name, program in self.programs.items():
                # With --logs each connection is there under its originator's address, which is the same in the client's log and in ours.
                for line in program.lines[-5000:]:
                    if stream and re.search(":%d[` ]" % stream.port, line):
                        print("  the %s: %s" % (name, line))
            sys.stdout.flush()

    # ---- streams

    def _begin(self):
        stream = Stream(self.seed, next(self._numbers), self.content_size, self.kinds)
        self.streams[stream.number] = stream
        greeting = b""
        if "socks" in stream.kind:
            # An address that no other stream had: an Open that was held up for long finds nobody there.
            address = "%s.%d.%d" % (NETWORK, stream.number // 250 % 250 + 1, stream.number % 250 + 1)
            stream.listener = socket.create_server((address, 0), backlog=10)
            stream.listener.setblocking(False)
            self.selector.register(stream.listener, READ, stream)
            greeting = b"\5\1\0\5\1\0\1" + socket.inet_aton(address) + struct.pack(">H", port_of(stream.listener))
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        stream.begun = time.monotonic()
        # On the loopback connect() is done, or refused, at once.
        try:
            sock.connect((HOST, self.ports[stream.kind]))
        except OSError as error:
            stream.originator = End(self, sock, "originator", stream)
            self.ends.add(stream.originator)
            return stream.originator.finish("refused", error.strerror)
        stream.port = port_of(sock)
        stream.originator = End(self, sock, "originator", stream, greeting)
        self.ends.add(stream.originator)
        return stream.originator.update(time.monotonic())

    def _accept(self, listener, stream):
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            end = End(self, sock, "target", stream)
            self.ends.add(end)
            end.update(time.monotonic())

    def _judge(self, stream, now):
        """Once all that belongs to it has ended: was it whole, or visibly reset?"""
        first, targets = stream.originator, stream.targets
        if not first.outcome or any(not target.outcome for target in targets):
            return
        # The target's end may not have come yet, and after a reset perhaps never will.
        if not targets and now - first.moved < (5 if first.outcome == "clean" else 1):
            return
        self._unjudged.discard(stream)
        if stream.judged:
            return
        stream.judged = True
        heapq.heappush(self._old, (now + 120, stream.number))
        if stream.listener:
            self.selector.unregister(stream.listener)
            stream.listener.close()
        outcomes = [end.outcome for end in [first, *targets]]
        self.counts["kind %s" % stream.kind] += 1
        if "failed" in outcomes:
            return
        disturbed = max(self.relay.disturbed_at, self._disturbed_at) > stream.begun - SETTLE
        # Where an Open was lost, the target may have seen a connection that carried nothing before the one that counts.
        last = max(targets, key=lambda end: (end.outcome == "clean", end.received, end.born), default=None)
        if any(end.received for end in targets if end is not last):
            return self.failed("two connections of one stream carried bytes", stream)
        self.counts["undisturbed"] += not disturbed
        if first.outcome == "clean" and last and last.outcome == "clean":
            self.counts["whole"] += 1
            return
        if first.outcome == "refused" and not (last and last.outcome == "clean"):
            # A reverse tunnel asks again after pauses, and until it listens again there is nothing to connect to.
            calm = stream.begun - max(self.relay.disturbed_at, self._disturbed_at) > 3 * RETRY_INTERVAL
            if not disturbed and (stream.kind != "reverse" or calm) and "aborted" not in outcomes:
                return self.failed("refused, though nobody disturbed it", stream)
            self.counts["refused"] += 1
            self.counts["refused, undisturbed"] += not disturbed
            return
        # Where the target's Unix socket shows an end, that may have been an abort which came after all bytes.
        strange = last and last.outcome == "clean" and not first.fin_sent and stream.kind != "unix"
        if first.outcome == "clean" and not (last and last.fin_sent) or strange:
            return self.failed("a clean end on one side, which the other side never made", stream)
        if "aborted" not in outcomes and (not disturbed or not stream.kind.startswith("legacy")):
            return self.failed("reset, though %s" % ("its links alone were disturbed" if disturbed else "nobody disturbed it"), stream)
        self.counts["reset"] += 1
        self.counts["reset by a side"] += "aborted" in outcomes
        self.counts["late"] += "clean" in outcomes
        return

    def _look_for_hangs(self, now):
        for end in list(self.ends):
            moved = end.stream.moved if end.stream else end.moved
            self.longest = max(self.longest, now - moved)
            if now - moved > self.allowed:
                end.fail("HANGS: nothing has moved for %d s" % self.allowed)

    # ---- the run

    def turn(self, timeout=0.02):
        for key, mask in self.selector.select(timeout):
            if isinstance(key.data, (End, Originator, Answerer)):
                key.data.on_event(mask)
            elif not (key.data and key.data.judged):
                self._accept(key.fileobj, key.data)
        now = time.monotonic()
        if now - self._turned_at > self.silence / 4:
            self.counts["machine stood still"] += 1
            self._disturbed_at = now
        self._turned_at = now
        for end in list(self.ends):
            end.update(now)
        for stream in list(self._unjudged):
            self._judge(stream, now)
        for failure in self.relay.failures[:]:
            self.relay.failures.remove(failure)
            self.failed(failure)
        for n, originator in list(self.originators.items()):
            originator.tick(now)
            if originator.asked > 100:
                self._ask_anew(n)
        if now >= self._look_at:
            self._look_at = now + 1
            if not self.relay.is_alive():
                raise SystemExit("FAILED: the relay ended by a mistake of its own")
            self._look_for_hangs(now)
            while self._old and self._old[0][0] < now:
                self.streams.pop(heapq.heappop(self._old)[1], None)
            for name, program in self.programs.items():
                if program.process.poll() is not None:
                    raise SystemExit("FAILED, seed %d: the %s ended:\n%s" % (self.seed, name, "\n".join(program.lines[-20:])))

    def _rest(self):
        """Until no stream is left, then until the endpoints have let go of what they do not need: what do they hold now?"""
        self.relay.calm(patient=self.bare)
        while self.ends or self._unjudged:
            self.turn()
        until = time.monotonic() + (IDLE_TIME + 2 if self.streams and not self.bare else 0)
        while time.monotonic() < until:
            self.turn()
        return {name: Vitals(program) for name, program in self.programs.items()}

    def run(self):
        self._turned_at = self._look_at = self._next = time.monotonic()
        before = None if self.seconds >= WARM_UP * 2 else self._rest()
        begun = time.monotonic()
        cycle = min(60.0, self.seconds)
        report_at = begun + 60
        # On a busy machine the calm part of a short run may be over before a stream has been left alone for as long as it takes.
        while time.monotonic() - begun < self.seconds or self._missing() and time.monotonic() - begun < self.seconds + 30:
            now = time.monotonic()
            hostile = (now - begun) % cycle < 0.6 * cycle and now - begun < self.seconds
            if hostile != self.relay.hostile:
                if hostile:
                    self.relay.hostile = True
                else:
                    self.relay.calm(patient=self.bare or cycle >= 60)
            active = sum(1 for end in self.ends if end.who == "originator")
            if active < AT_ONCE and now >= self._next:
                self._next = now + self._chance.expovariate(30)
                self._begin()
            self.turn(max(0.0, min(0.02, self._next - now)))
            if before is None and now - begun > WARM_UP:
                before = self._rest()
            if now >= report_at:
                report_at += 600
                print("after %d s: %s" % (now - begun, dict(sorted(self.counts.items()))), flush=True)
        after = self._rest()
        self._report(before, after)

    def _missing(self):
        """Without which a run shows nothing."""
        needed = ["undisturbed", "whole"]
        if not self.bare:
            needed += ["kind " + kind for kind in self.kinds] + ["datagrams answered, " + name for name in ("forward", "socks", "legacy")]
        return [name for name in needed if not self.counts[name]]

    def _report(self, before, after):
        counts, deeds = self.counts, self.relay.deeds
        for text in self.answerer.strays.values():
            self.failed(text)
        if self._missing():
            self.failed("this run shows nothing: it had none of %s" % ", ".join(self._missing()))
        # Idle links that wait for the next connection, and UDP sessions, are a few more or less; at the start of a short run there are none.
        more = 16 if self.seconds >= WARM_UP * 2 else 32
        for name in self.programs:
            if after[name].descriptors > before[name].descriptors + more or after[name].now > before[name].now + 16:
                self.failed("the %s holds more than before: %s, then %s" % (name, before[name], after[name]))
        for name in ("whole", "reset", "refused", "undisturbed"):
            figure("soak streams %s" % name, counts[name])
        figure("soak streams wrong, cut short or hanging", self.failures)
        figure("soak GB compared", "%.2f" % (self.bytes / 1e9))
        figure("soak longest standstill", "%.1f s" % self.longest)
        figure("soak datagrams answered", "%d of %d" % (counts["datagrams answered"], counts["datagrams sent"]))
        figure("soak links cut", "%d (%s)" % (sum(deeds.values()), ", ".join("%s %d" % deed for deed in sorted(deeds.items()))))
        for name in self.programs:
            figure("soak %s before, after" % name, "%s; %s" % (before[name], after[name]))
        figure("soak seed", self.seed)
        print(", ".join("%s %d" % pair for pair in sorted(counts.items())), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="how long streams are begun (10)")
    parser.add_argument("--seed", type=int, default=None, help="another one each time")
    parser.add_argument("--scale", type=float, default=0.1, help="of the keepalive and silence times (0.1)")
    parser.add_argument("--deeds", help="of the relay: only these, with commas (%s)" % ", ".join(Relay.HOSTILE))
    parser.add_argument("--logs", metavar="FOLDER", type=pathlib.Path, help="where the endpoints' logs of every connection go (default: none)")
    parser.add_argument("--workers", type=int, default=1, help="of the server; with more than one there are no reverse tunnels (1)")
    parser.add_argument("--bare", action="store_true", help="with no ratrod between: shows what the soak finds where streams are cut unseen")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3), "big")
    print("seed %d" % seed, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="ratrod-soak-") as folder, contextlib.ExitStack() as stack:
        soak = Soak(arguments.seconds, seed, arguments.scale, arguments.bare, arguments.deeds.split(",") if arguments.deeds else (),
                    arguments.logs, folder, arguments.workers)
        soak.start(stack)
        soak.run()
        stack.close()
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
