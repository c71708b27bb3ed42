"""Which server a detached stream belongs to (PROTOCOL.md, "Streams outlive their links", 7): real ends, and doors between them that cut links."""

import os
import sys

import pytest

from support.programs import tcp_port
from support.relays import Door
from support.sockets import ask, assert_reset, dial, eventually, ping, works

pytestmark = pytest.mark.usefixtures("no_traceback")
forks = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no workers that share a port here")


@pytest.fixture
def reach(ratrod, keys, target, tcp_echo):
    """reach(ports of servers) -> (client, doors): each server stands behind a door of its own."""
    def make(*ports):
        doors = [Door(target, port) for port in ports]
        servers = ",".join("127.0.0.1:%d" % door.port for door in doors)
        client = ratrod("-v", "-k", keys.client.path, "connect", "--max-retry-interval", "1", servers, "0:127.0.0.1:%d" % tcp_echo.port).ready()
        return client, doors
    return make


@pytest.fixture
def originate(stack):
    """originate(client, n) -> n connections that have said something."""
    def make(client, n=1):
        made = [stack.enter_context(dial(tcp_port(client))) for _ in range(n)]
        for connection in made:
            ping(connection)
        return made
    return make


@forks
def test_a_stream_finds_its_worker(serve, reach, originate):
    client, (door,) = reach(serve("--workers", "4")[1])
    connections = originate(client, 8)
    for _ in range(3):
        door.cut_all()
        for connection in connections:
            ping(connection)


def test_a_stream_finds_its_server_among_several(serve, reach, originate):
    """The other server takes what is new meanwhile; the stream waits for its own."""
    client, (one, two) = reach(serve()[1], serve()[1])
    [connection] = originate(client)
    to, one.to = one.to, None
    one.cut_all()
    client.wait_for("🔌 The link of 1 connection was lost")
    eventually(lambda: two.passing, "the other server is used")
    ask(tcp_port(client))
    one.to = to
    ping(connection)
    client.wait_for("✅ Over another link, after .*: 1 connection")


def test_a_stream_of_a_server_that_was_killed_is_reset_by_the_first_link_to_the_next(serve, reach, originate):
    """Each time: a restart is no second server behind one address."""
    server, port = serve()
    client, _ = reach(port)
    for _ in range(3):
        connections = originate(client, 3)
        server.kill()
        server, _ = serve(bind="127.0.0.1:%d" % port)
        assert_reset(*connections)
        eventually(lambda: works(tcp_port(client)), "the new one is used")
    assert "has been started anew" in client.output


def test_a_stream_of_one_of_two_servers_behind_one_address(serve, reach, originate):
    """A balancer shows both runs in turn: what can be found is found, and what has gone is reset after eight links to the other run."""
    servers = [serve() for _ in range(2)]
    client, (door,) = reach(servers[0][1])
    door.next = [port for _, port in servers]
    connections = originate(client, 6)
    door.cut_all()
    for connection in connections:
        ping(connection)
    servers[0][0].kill()
    eventually(lambda: "or another one answers" in client.output, "its streams are reset")
    ask(tcp_port(client))
