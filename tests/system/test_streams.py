"""Links that die while nobody looks, a slow one, and the one link for all UDP. The first byte waits for no answer: unit/test_states.py."""

import collections
import os
import socket
import threading
import time

import pytest

from support import ratrod2_peer as peer
from support.keys import identity_of
from support.pressure import scaled
from support.programs import RATROD, tcp_port, udp_originator
from support.relays import Door
from support.scripted import Scripted
from support.sockets import ask_udp, ask_until_answered, dial, eventually, ping, receive_all, say, settled
from support.targets import says

pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture
def path(serve, start, target, keys):
    """path(program=RATROD, flags=()) -> (client, the Door between it and its server): `connect -v` to a target that says hello at once."""
    def launch(program=RATROD, flags=()):
        door = Door(target, serve()[1])
        return start(*program, "-k", keys.client.path, "-v", "connect", *flags, "127.0.0.1:%d" % door.port,
                     "0:127.0.0.1:%d" % target(says(b"hello")).port).ready(), door
    return launch


def all_idle(client, door, streams):
    """Waits until no link does anything: each handshake is done, and `streams` streams are over, as the client sees it."""
    eventually(lambda: client.output.count(" closed: ") == streams, "every stream is over")
    eventually(lambda: client.output.count("cipher: ") == len(door.tries), "every handshake is done")
    settled(lambda: len(door.tries))  # HandshakeCompletion, which nothing shows, has come


def assert_greeted(client, n=1):
    connections = [dial(tcp_port(client)) for _ in range(n)]
    for connection in connections:
        with connection:
            assert receive_all(connection) == b"hello"


@pytest.mark.parametrize("streams", [0, 8])
def test_links_that_the_path_forgot_are_replaced(path, streams):
    """The Open went out alone."""
    client, door = path()
    assert_greeted(client, streams)
    all_idle(client, door, streams)
    door.forget_all()
    assert_greeted(client)
    client.wait_for(" closed: ", streams + 1)
    assert "❌" not in client.output


def test_a_link_that_fell_silent_is_replaced(path):
    client, door = path(scaled(connect_timeout=1.0), ("--handshake-timeout", "2"))
    all_idle(client, door, 0)
    door.swallow_all()
    assert_greeted(client)


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


def test_udp_sessions_of_a_client_share_one_link(ratrod, keys, target, second, stack):
    """Those of all its tunnels; a second client has its own."""
    links = collections.Counter()

    def behave(link, _number):
        stream = link.accept()
        if stream:
            assert stream.kind == peer.UDP
            links[link.remote_identity] += 1
            peer.serve_udp(stream)
    server = Scripted(keys, target, behave, [keys.client, second])
    for who in (keys.client, second):
        client = ratrod("-k", who.path, "connect", "127.0.0.1:%d" % server.port, "0:good:1", "0:good:2").ready()
        for n in range(10):
            ask_udp(stack.enter_context(udp_originator(client, 1 + n % 2)), b"%d" % n)
    assert links == {identity_of(keys.client): 1, identity_of(second): 1}
    server.check()


def test_udp_tries_no_second_link_of_a_server_that_ended(ratrod, keys, target, stack):
    """As many idle links as there are tries, and each says Close: after the first the others are not trusted either."""
    ended, asked = threading.Event(), []

    def handle(stream, is_old):
        if stream.kind == peer.TCP:
            return peer.echo(stream)
        asked.append(is_old)
        ended.set()
        if not is_old:
            return peer.serve_udp(stream)
        stream.link.send_record(peer.CLOSE)
        return stream.link.read_to_end()

    def serve_link(link, _number):
        is_old = not ended.is_set()
        link.serve_streams(lambda stream: handle(stream, is_old))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % Scripted(keys, target, serve_link).port, "0:good:1").ready()
    locals_ = [stack.enter_context(dial(tcp_port(client))) for _ in range(6)]  # so many idle links
    for local in locals_:
        ping(local)
    for local in locals_:
        local.shutdown(socket.SHUT_WR)
        assert local.recv(1) == b""
    ask_until_answered(stack.enter_context(udp_originator(client)), b"hello")
    assert len(asked) < 6 and asked[-1] is False, asked  # those that were in their handshakes meanwhile may be tried
    assert "❌" not in client.output
