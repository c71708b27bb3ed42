"""The independent ratrod2 server on a port, which does as a test says."""

import contextlib
import queue
import socket
import threading

from support import ratrod2_peer as peer
from support.keys import identity_of, seed_of
from support.programs import PATIENCE


class Scripted:
    """Each link goes to behave(link, number) after its handshake. `problems`: what clients did against the protocol."""

    def __init__(self, keys, target, behave, clients=None):
        self._seed, self._behave = seed_of(keys.server), behave
        self._clients = [identity_of(client) for client in clients or [keys.client]]
        self._numbers, self.problems = iter(range(10_000)), []
        self.port = target(self._handle).port

    def _handle(self, connection):
        connection.settimeout(2 * PATIENCE)
        link = peer.Server(connection, self._seed, authorized=self._clients)
        try:
            with contextlib.suppress(peer.LinkEnded, peer.PeerError):
                self._behave(link.handshake(), next(self._numbers))
                # To close while an Ack is unread would be a reset.
                if link.sock.fileno() >= 0:
                    link.finish()
        except peer.ProtocolError as error:
            self.problems.append(error)

    def check(self):
        assert not self.problems, "the client broke the protocol: %r" % self.problems


class Waiting:
    """A server that leaves the first stream of each link (where a `kind` is given, of that kind) to the test, in `arrived`. While `open` is not set
    no link is taken. `streams` are those of all links, which may be attached again."""

    def __init__(self, keys, target, kind=None):
        self._keys, self._kind, self._over = keys, kind, threading.Event()
        self.open = threading.Event()
        self.open.set()
        self.streams, self.links, self.problems, self.arrived, self._connections = {}, [], [], queue.Queue(), []
        self.target = target(self._handle)
        self.port = self.target.port

    def _handle(self, connection):
        connection.settimeout(4 * PATIENCE)
        self._connections.append(connection)
        assert self.open.wait(PATIENCE)
        made = peer.Server(connection, seed_of(self._keys.server), [identity_of(self._keys.client)], streams=self.streams)
        # An Error is none: the client may reset a stream, for its originator may be gone.
        with contextlib.suppress(peer.LinkEnded, peer.PeerError):
            try:
                self.links.append(made.handshake())
                stream = made.accept()
                if stream and self._kind in (None, stream.kind):
                    self.arrived.put(stream)
                    self._over.wait(4 * PATIENCE)
                elif stream:
                    peer.serve(stream)
            except peer.ProtocolError as error:
                self.problems.append(error)

    def stream(self, kind=peer.TCP):
        stream = self.arrived.get(timeout=PATIENCE)
        assert stream.kind == kind
        return stream

    def again(self, stream):
        """The attach of a stream, answered."""
        assert self.stream() is stream
        stream.opened()
        stream.resend()

    def grant(self, address="127.0.0.1:40123"):
        """The next link on which the client asks to listen, granted; and what it asked."""
        stream = self.stream(peer.LISTEN)
        stream.link.grant_listen(address)
        return stream.link, stream

    def cut_all(self):
        for connection in self._connections[:]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._over.set()
        assert not self.problems, "the client broke the protocol: %r" % self.problems
