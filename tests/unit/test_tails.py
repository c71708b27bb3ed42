"""The last bytes of a stream that is over at its acceptor, which are sent again over a second link."""

import pytest

import ratrod
from support import joined
from support.joined import ALL, RESET, SILENCE, TO_ACCEPTOR, TO_OPENER, World


@pytest.fixture
def tail(monkeypatch):
    """(world, connection, first link, second link): nothing passes to the opener on the second one before world.frozen is False."""
    monkeypatch.setattr(joined.Owner, "on_link_closed", ratrod.Endpoint.on_link_closed)  # ends break here, and nobody is dishonest
    with World() as world:
        connection = world.originate(first=1000)
        world.settle()
        first, remote = world.pairs[-1], connection.remote
        connection.app.end()
        world.settle()
        first.cut(SILENCE, [TO_OPENER])
        for _ in range(40):
            remote.write(min(100_000, 800_000 - remote.sent)) if remote.sent < 800_000 else remote.end()
            world.rounds()
        world.frozen, add_pair = True, world.add_pair
        def add_frozen_pair():
            made = add_pair()
            pipe = made.pipes[TO_OPENER]
            pump, pipe.pump = pipe.pump, lambda n=ALL: None if world.frozen else pump(n)
            return made
        world.add_pair = add_frozen_pair
        first.cut(RESET, [TO_OPENER])
        first.pipes[TO_ACCEPTOR].pump = lambda n=ALL: None  # the acceptor does not notice
        world.client.opener.want_links()
        while not connection.accepted.link:
            world.rounds()
        assert connection.accepted.is_over and first.acceptor.last is connection.accepted
        yield world, connection, first, world.pairs[-1]


def kept(world):
    acceptor, counters = world.server.acceptor, world.server.counters
    return len(acceptor._streams), len(acceptor._detached), acceptor._detached_of.total, len(counters.detached), world.server.memory.total


def test_nothing_is_kept_where_its_opener_fails_meanwhile(tail):
    world, connection, _, _ = tail
    connection.app.reset(lose=True)
    world.clock.now += 2
    world.rounds(8)
    world.frozen = False
    for _ in range(100):
        world.clock.now += 45
        world.rounds(1)
    assert kept(world) == (0, 0, 0, 0, 0)


def test_the_first_link_acts_no_more_on_what_the_second_one_carries(tail):
    world, connection, first, second = tail
    first.acceptor.lose(ratrod.LinkSilent("nothing was heard for long"))
    assert connection.accepted.link is second.acceptor and kept(world)[1:4] == (0, 0, 0)
    second.cut(RESET)
    world.turn(3)
    assert kept(world)[:4] == (1, 1, 1, 0)
    world.frozen = False
    world.client.opener.want_links()
    world.rounds(60)
    world.clock.now += 5
    world.settle()
    assert kept(world) == (0, 0, 0, 0, 0) and connection.app.outcome == joined.END
