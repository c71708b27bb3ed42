"""Streams on links that are reused, of real processes and a relay between them: few handshakes, round trips, links that die, keys that go."""

import collections
import contextlib
import os
import socket
import threading
import time
from typing import NamedTuple

import pytest

from support import ratrod2_peer as peer
from support.keys import identity_of
from support.pressure import scaled
from support.programs import PATIENCE, RATROD, tcp_port, udp_originator
from support.scripted import Scripted
from support.sockets import dial, dial_with, eventually, receive_all, receive_exactly, say
from support.targets import says

pytestmark = pytest.mark.usefixtures("no_traceback")

CLIENT, SERVER = "client", "server"
SERVER_PREAMBLE = 2 + 137
CLIENT_AUTHENTICATION = 2 + 96


class Passage:
    """One connection through a Relay. `flights` are its turns of direction: [whose, all their bytes]."""

    def __init__(self, relay, near, far):
        self.relay, self.sockets, self.flights = relay, {CLIENT: near, SERVER: far}, []
        self.forgotten = self.silent = self.is_cut = False
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self.carry, args=(whose,), daemon=True) for whose in self.sockets]
        for thread in self._threads:
            thread.start()

    def carry(self, whose):
        """All that `whose` side says, to the other; then its end."""
        source = self.sockets[whose]
        sink = self.sockets[SERVER if whose == CLIENT else CLIENT]
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                if self.forgotten:
                    return peer.reset(source)
                if self.silent:
                    continue
                self.relay.hold(self, whose)
                self.note(whose, data)
                sink.sendall(data)
            if not self.is_cut:
                sink.shutdown(socket.SHUT_WR)

    def wait(self):
        for thread in self._threads:
            thread.join()

    def note(self, whose, data):
        with self._lock:
            if not self.flights or self.flights[-1][0] != whose:
                self.flights.append([whose, b""])
            self.flights[-1][1] += data

    def said(self, whose):
        return b"".join(data for who, data in self.flights if who == whose)

    def turns(self, start=0):
        return [whose for whose, _ in self.flights[start:]]

    def cut(self, how):
        """Ends both connections by how(socket)."""
        self.is_cut = True
        # Nothing is sent by this: it ends the threads, and a socket in whose recv() there is a thread cannot be closed.
        for sock in self.sockets.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
        self.wait()
        for sock in self.sockets.values():
            how(sock)


class Relay:
    """What stands on the path between a client and the server at `to`. hold(passage, whose) may wait before it lets bytes pass."""

    def __init__(self, to, target):
        self.to, self.passages = to, []
        self.port = target(self.handle).port

    def hold(self, passage, whose):
        """Lets all pass."""

    def handle(self, near):
        with socket.create_connection(("127.0.0.1", self.to)) as far:
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            passage = Passage(self, near, far)
            self.passages.append(passage)
            passage.wait()


class Path(NamedTuple):
    """A server, a client, the relay between them, and the ports of the client's tunnels."""

    server: object
    client: object
    relay: Relay
    port: int


@pytest.fixture
def path(serve, start, target, keys):
    """path(target's port, program=RATROD, flags=()) -> Path: `serve -v`, a relay, and `connect -v` with a tunnel to the target."""
    def launch(remote, program=RATROD, flags=()):
        server, port = serve("-v")
        relay = Relay(port, target)
        client = start(*program, "-k", keys.client.path, "-v", "connect", *flags, "127.0.0.1:%d" % relay.port, "0:127.0.0.1:%d" % remote).ready()
        return Path(server, client, relay, tcp_port(client))
    return launch


class Gate:
    """A Relay.hold that stands for a long path: what the server says, but for `before` flights, passes once the target has seen the first byte."""

    def __init__(self, relay, before):
        self.seen, self._before = threading.Event(), before
        relay.hold = self.hold

    def hold(self, passage, whose):
        if whose == SERVER and len(passage.turns()) > self._before:
            self.seen.wait(PATIENCE)


@pytest.fixture
def gated(path, target):
    """(Path, the list for its Gate)"""
    gates = []

    def handle(connection):
        data = receive_exactly(connection, 1)
        gates[0].seen.set()
        connection.sendall(data)
    return path(target(handle).port), gates


def first_byte(made, look=lambda: None):
    """What look() says while the connection is still open: its end would be one turn more."""
    with dial_with(b"!", made.client, made.port) as connection:
        assert receive_exactly(connection, 1) == b"!"
        return look()


def test_a_ready_link_takes_one_round_trip(gated):
    made, gates = gated
    ready, = made.relay.passages
    eventually(lambda: ready.turns() == [CLIENT, SERVER] * 2, "the handshake is done")
    gates.append(Gate(made.relay, before=4))
    assert first_byte(made, lambda: ready.turns(4)) == [CLIENT, SERVER]


def test_a_fresh_link_takes_two_round_trips(gated):
    """Open and the first byte leave behind ClientAuthentication: the client does not wait for HandshakeCompletion."""
    made, gates = gated
    cut_all(made, 0, socket.socket.close)
    gates.append(Gate(made.relay, before=2))
    first_byte(made)
    used, = (passage for passage in made.relay.passages[1:] if len(passage.said(CLIENT)) > 8 + 2 + 35 + CLIENT_AUTHENTICATION)
    assert used.turns()[:4] == [CLIENT, SERVER, CLIENT, SERVER]  # the fifth is the end of the stream, if that was as fast
    assert len(used.flights[1][1]) == SERVER_PREAMBLE


def all_idle(made, streams):
    """Waits until no link does anything: each handshake is done, and `streams` streams are over, as the client sees it."""
    eventually(lambda: made.client.output.count(" closed: ") == streams, "every stream is over")
    eventually(lambda: all(len(passage.turns()) >= 4 for passage in made.relay.passages if not passage.is_cut), "every handshake is done")


def cut_all(made, streams, how):
    """Ends every link by how(socket), once all are idle."""
    all_idle(made, streams)
    # Not those that are made meanwhile in place of the first ones: their handshake would be cut.
    for passage in [one for one in made.relay.passages if not one.is_cut and len(one.turns()) >= 4]:
        passage.cut(how)


def assert_greeted(port):
    with dial(port) as connection:
        assert receive_all(connection) == b"hello"


@pytest.mark.parametrize("streams", [0, 1, 8])
def test_links_that_the_path_forgot_are_replaced(path, target, streams):
    """As a NAT that lost its table: nobody hears of it before the next byte, which is answered with a reset. The Open went out alone."""
    made = path(target(says(b"hello")).port)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(dial(made.port)) for _ in range(streams)]
        for connection in connections:
            assert receive_all(connection) == b"hello"
    all_idle(made, streams)
    for passage in made.relay.passages:
        passage.forgotten = True
    assert_greeted(made.port)
    made.client.wait_for(" closed: ", streams + 1)
    assert "❌" not in made.client.output


def test_a_link_that_fell_silent_is_replaced(path, target):
    """Nobody ever hears of it: no answer comes."""
    made = path(target(says(b"hello")).port, program=scaled(connect_timeout=1.0), flags=("--handshake-timeout", "2"))
    all_idle(made, 0)
    for passage in made.relay.passages:
        passage.silent = True
    assert_greeted(made.port)


def test_a_long_record_on_a_slow_path_is_not_silence(start, keys, target):
    """The client is not woken for each piece of a long record, but what trickles in is a sign of life: here for three times `silence`."""
    text = os.urandom(400_000)
    def behave(link, number):
        stream = link.accept()
        if stream:
            stream.opened()
            stream.outgoing.count(peer.DATA, text)
            wire = link.writer.seal(peer.DATA, text)
            for at in range(0, 200_000, 5_000):
                link.sock.sendall(wire[at:at + 5_000])
                time.sleep(0.075)
            link.sock.sendall(wire[200_000:])
            stream.finish()
            link.accept()  # as long as the client is there: its Keepalives unread, closing would be a reset
    server = Scripted(keys, target, behave)
    client = start(*scaled(keepalive=0.4, silence=1.0, sweep_interval=0.1), "-k", keys.client.path, "-v", "connect",
                   "127.0.0.1:%d" % server.port, "0:good:1").ready()
    with dial(tcp_port(client)) as connection:
        say(connection, b"!")
        assert receive_all(connection) == text
    server.check()


def asks_by_udp(originator, question):
    originator.send(question)
    return originator.recv(100) == question


def test_udp_sessions_of_a_client_share_one_link(ratrod, keys, target, second):
    """Those of all its tunnels; a second client has its own."""
    links = collections.Counter()
    def behave(link, _number):
        stream = link.accept()
        if stream:
            assert stream.kind == peer.UDP
            links[link.remote_identity] += 1
            peer.serve_udp(stream)
    server = Scripted(keys, target, behave, [keys.client, second])
    with contextlib.ExitStack() as stack:
        for who in (keys.client, second):
            client = ratrod("-k", who.path, "connect", "127.0.0.1:%d" % server.port, "0:good:1", "0:good:2").ready()
            for n in range(10):
                assert asks_by_udp(stack.enter_context(udp_originator(client, 1 + n % 2)), b"%d" % n)
    assert links == {identity_of(keys.client): 1, identity_of(second): 1}
    server.check()
