"""Streams whose both ends a test holds: whether every byte arrives in its place, and how and when each end is over.
One thread drives them all: the kernel tells of a reset once, to whoever comes first."""

import contextlib
import os
import select
import socket
import threading
import time

from support.programs import PATIENCE
from support.sockets import eventually, settled

# Whatever is sent at position p of a stream: bytes that are lost, doubled or from elsewhere show. A prime length, so that no block fits twice.
NOISE = os.urandom(1_000_003)
AHEAD = 1 << 18
TWICE = NOISE + NOISE[:AHEAD]
ALL = 1 << 62
ROUND = 0.02  # between two looks at what can be done: 256 KiB each is 13 MB/s, which fills buffers and leaves the processor alone
END, RESET, WRONG = "end", "reset", "wrong bytes"


def noise(position, n):
    """At most n of the bytes from `position` on."""
    start = position % len(NOISE)
    return memoryview(TWICE)[start:start + min(n, AHEAD)]


class End:
    """One end of a stream: how many bytes it `may_send` and `may_read`, whether it then ends its direction, and how its life is `over`."""

    def __init__(self, sock, name):
        sock.setblocking(False)
        self.sock, self.name = sock, name
        self.may_send = self.may_read = self.sent = self.received = 0
        self.finishes = self.finished = False
        self.over, self.when = None, None
        self.gone = False  # nothing more will happen on this socket

    def events(self):
        waits_for_end = 0 if self.over else select.POLLRDHUP
        reads = select.POLLIN if self.received < self.may_read else 0
        sends = select.POLLOUT if self.sent < self.may_send or self.finishes and not self.finished else 0
        return waits_for_end | reads | sends

    def act(self, mask):
        try:
            if mask & select.POLLERR:
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
            if mask & select.POLLOUT:
                self._send()
            if self.received < self.may_read and mask & (select.POLLIN | select.POLLRDHUP | select.POLLHUP):
                self._read()
            elif mask & (select.POLLRDHUP | select.POLLHUP):
                self._is_over(END)
                self.gone = bool(mask & select.POLLHUP)
        except BlockingIOError:
            pass
        except OSError as error:
            self._is_over(RESET if isinstance(error, ConnectionResetError) else os.strerror(error.errno))
            self.gone = True

    def _send(self):
        if self.sent < self.may_send:
            self.sent += self.sock.send(noise(self.sent, self.may_send - self.sent))
        if self.finishes and not self.finished and self.sent >= self.may_send:
            self.sock.shutdown(socket.SHUT_WR)
            self.finished = True

    def _read(self):
        while self.received < self.may_read:
            data = self.sock.recv(min(AHEAD, self.may_read - self.received))
            if not data:
                self.gone = self.finished
                self.may_read = self.received
                return self._is_over(END)
            if data != noise(self.received, len(data)):
                self._is_over(WRONG)
            self.received += len(data)

    def _is_over(self, how):
        if not self.over:
            self.when = time.monotonic()
            self.over = how

    def __repr__(self):
        return "%s (%s; %d sent, %d received)" % (self.name, self.over or "lives", self.sent, self.received)


class Stream:
    """Both ends of one tunnel connection: the originator's and the target's."""

    def __init__(self, originator, target):
        self.originator, self.target = originator, target
        self.ends = originator, target

    def flow(self, n=ALL):
        """Each end may send n more bytes, and reads all."""
        for end in self.ends:
            end.may_send = min(ALL, end.sent + n)
            end.may_read = ALL

    def finish(self):
        """Each end sends what it may, and ends its direction."""
        for end in self.ends:
            if end.may_send == ALL:  # no more than it has sent: the thread may be a step further meanwhile
                end.may_send = end.sent
            end.may_read, end.finishes = ALL, True

    @property
    def is_whole(self):
        """Everything that was sent has arrived, with a clean end each way."""
        one, other = self.ends
        return [end.over for end in self.ends] == [END, END] and (one.sent, other.sent) == (other.received, one.received)

    @property
    def all_arrived(self):
        one, other = self.ends
        return one.sent >= one.may_send and other.sent >= other.may_send and (one.sent, other.sent) == (other.received, one.received)

    def __repr__(self):
        return " <-> ".join(map(repr, self.ends))


class Traffic:
    """All streams of a test, and the thread that drives them; a context manager."""

    def __init__(self):
        self.streams, self._stopped = [], False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stream(self, dial, listener, name=""):
        """A new Stream from the socket dial() to what `listener` takes. One at a time: they are matched by their order."""
        originator = dial()
        listener.settimeout(PATIENCE)
        target, _ = listener.accept()
        # Small ones are full soon, and it is ratrod's own holding back that is tested.
        for sock in (originator, target):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        made = Stream(End(originator, name + " originator"), End(target, name + " target"))
        self.streams.append(made)
        return made

    def wait_until(self, condition, what):
        eventually(condition, lambda: "%s:\n%s" % (what, "\n".join(map(repr, self.streams))))

    def settle(self, ends):
        """Waits until the buffers are full: these ends have sent nothing for a second."""
        settled(lambda: [end.sent for end in ends])

    def _run(self):
        while not self._stopped:
            poll, ends = select.poll(), {}
            for stream in self.streams[:]:
                for end in stream.ends:
                    if not end.gone:
                        ends[end.sock.fileno()] = end
                        poll.register(end.sock, end.events())
            for descriptor, mask in poll.poll(ROUND * 1000) if ends else ():
                ends[descriptor].act(mask)
            time.sleep(ROUND)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._stopped = True
        self._thread.join()
        for stream in self.streams:
            for end in stream.ends:
                with contextlib.suppress(OSError):
                    end.sock.close()
