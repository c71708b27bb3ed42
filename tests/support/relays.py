"""Relays between a client and its server that a test opens, shuts and cuts."""

import contextlib
import selectors
import socket
import threading
import time

from support.programs import PATIENCE
from support.sockets import reset


def pump(one, other, pause=0):
    """Carries what each side says to the other, so long after it came, and their ends."""
    def copy(source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                time.sleep(pause)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=copy, args=(other, one), daemon=True)
    thread.start()
    copy(one, other)
    thread.join(PATIENCE)


class Door:
    """The address that a client knows as its server's, which passes on to the port `to`, `header` first; shut (None), it resets. `tries`: when."""

    def __init__(self, target, to=None, header=b""):
        self.to, self.tries, self.header = to, [], header
        self.next = []  # ports to take in turn in place of `to`, as a balancer does; one where nobody listens is passed by
        self._passing, self._silent = set(), set()  # the near ends of what is passed on, and of what is swallowed
        self.port = target(self._handle).port

    def _handle(self, near):
        self.tries.append(time.monotonic())
        if self.to is None:
            return reset(near)
        self._passing.add(near)
        with self._far_end() as far, selectors.DefaultSelector() as selector:
            far.sendall(self.header)
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            try:
                while selector.get_map():
                    for key, _ in selector.select():
                        self._pass(selector, key, near)
            except OSError:
                for sock in (near, far):
                    reset(sock)
            finally:
                self._passing.discard(near)

    def _far_end(self):
        for port in self.next[:]:
            self.next.append(self.next.pop(0))
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", port))
        return socket.create_connection(("127.0.0.1", self.to))

    def _pass(self, selector, key, near):
        data = key.fileobj.recv(1 << 16)
        if near not in self._passing:  # it was cut
            raise ConnectionResetError
        if data:
            return None if near in self._silent else key.data.sendall(data)
        selector.unregister(key.fileobj)
        return key.data.shutdown(socket.SHUT_WR)

    @property
    def passing(self):
        """How many connections are passed on now."""
        return len(self._passing)

    def forget_all(self):
        """As a NAT that lost its table: nobody hears of it before the next byte, which is answered with a reset."""
        self._passing.clear()

    def swallow_all(self):
        """What is passed on now falls silent, and nobody ever hears of it."""
        self._silent.update(self._passing)

    def cut_all(self):
        """Resets what is passed on now, at both ends."""
        for near in list(self._passing):
            self._passing.discard(near)
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RD)  # wakes the thread that waits for it
