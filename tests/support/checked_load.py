"""Connections to an echo, one after another from several threads, each checked to its last byte."""

import os
import random
import threading
import time
from typing import NamedTuple

from support.programs import PATIENCE
from support.sockets import dial, eventually, receive_all, say

# Mostly what a browser asks; now and then more than a link takes before it is open.
SIZES = (0, 1, 200, 700, 3000, 3000, 9000, 20000, 90000)


class CutShort(Exception):
    """The worst: an answer that ends cleanly and is not whole."""


class Failure(NamedTuple):
    at: float
    took: float
    what: str
    is_cut: bool


def exchange(port, question, host="127.0.0.1"):
    """A whole connection to an echo; OSError or CutShort where it is not."""
    with dial(port, host) as connection:
        say(connection, question)
        answer = receive_all(connection)
    if answer != question:
        raise CutShort("%d of %d bytes, and a clean end" % (len(answer), len(question)))


class Load:
    """While the block runs, `threads` make one connection after the other to `ports`; `whole` counts those that were, `failures` has the others."""

    def __init__(self, *ports, threads=6):
        self.failures = []
        self.started = self.ended = self.slowest = 0.0
        self._whole = [0] * threads  # of each thread: += of one number by several is not safe
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(ports[n % len(ports)], n), daemon=True) for n in range(threads)]

    def __enter__(self):
        self.started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
            assert not thread.is_alive(), "a connection hangs"
        self.ended = time.monotonic()

    def _run(self, port, number):
        rng = random.Random(number)
        noise = os.urandom(max(SIZES) + 1000)
        while not self._done.is_set():
            start = rng.randrange(1000)
            begun = time.monotonic()
            try:
                exchange(port, noise[start:start + rng.choice(SIZES)])
                self._whole[number] += 1
            except (OSError, CutShort) as error:
                self.failures.append(Failure(begun, time.monotonic() - begun, "%s: %s" % (type(error).__name__, error), isinstance(error, CutShort)))
            self.slowest = max(self.slowest, time.monotonic() - begun)

    @property
    def whole(self):
        return sum(self._whole)

    @property
    def rate(self):
        return self.whole / ((self.ended or time.monotonic()) - self.started)

    @property
    def cut(self):
        return [failure for failure in self.failures if failure.is_cut]

    def failures_since(self, moment):
        """Of connections that were begun after it."""
        return [failure for failure in self.failures if failure.at > moment]

    def go_on(self, n):
        """Waits until so many more were whole."""
        enough = self.whole + n
        eventually(lambda: self.whole >= enough, lambda: "%d more whole connections; %d were, and %s" % (n, self.whole, self.failures[-3:]))

    def __str__(self):
        return "%d tunnel connections at %.0f/s, %d failed, %d of these without showing it, the slowest took %.2f s" % (
            self.whole + len(self.failures), self.rate, len(self.failures), len(self.cut), self.slowest)
