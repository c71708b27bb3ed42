"""The independent ratrod2 server on a port, which does as a test says."""

import contextlib

from support import ratrod2_peer as peer
from support.keys import identity_of, seed_of
from support.programs import PATIENCE


class Scripted:
    """Each link goes to behave(link, number) after its handshake. `problems`: what clients did against the protocol."""

    def __init__(self, keys, target, behave, clients=None):
        self._seed, self._behave = seed_of(keys.server), behave
        self._clients = [identity_of(client) for client in clients or [keys.client]]
        self._numbers = iter(range(10_000))
        self.problems = []
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
