"""The loop's own parts: both selectors, timers, and the buffers that links borrow."""

import os
import socket
import subprocess
import sys
import types

import pytest

import ratrod
from ratrod import READ, WRITE
from support.programs import PATIENCE, ROOT

SELECTORS = [ratrod.Selector] + [ratrod.EpollSelector] * hasattr(ratrod.selectors, "EpollSelector")
every_selector = pytest.mark.parametrize("make", SELECTORS, ids=lambda make: make.__name__)


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@every_selector
def test_events_come_as_what_was_registered(make, pair):
    near, far = pair
    selector = make()
    seen = []
    selector.register(near, READ, seen.append)
    assert selector.select(0) == []
    far.send(b"x")
    (callback, mask), = selector.select(PATIENCE)
    assert (callback, mask) == (seen.append, READ)
    selector.modify(near, WRITE, seen.append)
    assert selector.select(PATIENCE) == [(seen.append, WRITE)]
    selector.modify(near, READ | WRITE, print)
    assert selector.select(PATIENCE) == [(print, READ | WRITE)]
    selector.unregister(near)
    assert selector.select(0) == []
    with pytest.raises(KeyError):
        selector.unregister(near)
    selector.close()


@every_selector
def test_a_hang_up_is_something_to_read(make, pair):
    near, far = pair
    selector = make()
    selector.register(near, READ, print)
    far.close()
    (_, mask), = selector.select(PATIENCE)
    assert mask & READ
    selector.close()


def test_a_system_without_epoll():
    """The whole program on another selector, as on macOS and Windows."""
    words = ("import selectors, sys; selectors.DefaultSelector = selectors.SelectSelector; vars(selectors).pop('EpollSelector', None); import ratrod;"
             "assert isinstance(ratrod.EventLoop()._selector, selectors.SelectSelector); sys.exit(ratrod.main(['demo']))")
    done = subprocess.run([sys.executable, "-c", words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")


def test_buffers_are_lent_to_so_many_and_come_back():
    loop = ratrod.EventLoop()
    lent = [loop.lend_scratch() for _ in range(ratrod.LENT_AT_ONCE)]
    assert loop.lend_scratch() is None  # whoever comes later takes memory of its own
    assert len({id(buffer.obj) for buffer in [*lent, loop.scratch_in]}) == ratrod.LENT_AT_ONCE + 1
    for buffer in lent:
        loop.give_back(buffer)
    again = [loop.lend_scratch() for _ in lent]
    assert {id(buffer.obj) for buffer in [*again, loop.scratch_in]} == {id(buffer.obj) for buffer in [*lent, again[0]]}
    loop.close()


def test_a_deadline_that_moves_leaves_one_timer():
    """A link's deadline is set and taken back with every stream: what is left on the heap must not grow with them."""
    loop = ratrod.EventLoop()
    deadline, came = ratrod.Deadline(loop), []
    for _ in range(1000):
        deadline.set(30, lambda: came.append("late"))
        deadline.clear()
    assert len(loop._timers) == 1
    deadline.set(0.01, loop.stop)  # a nearer one is not late for it
    loop.run()
    assert not came and len([timer for timer in loop._timers if timer.call]) == 0
    # The timer of a nearer one, which was taken back, does not end a later one too early.
    loop._is_stopped = False
    deadline.set(0.01, lambda: came.append("early"))
    deadline.clear()
    deadline.set(0.05, loop.stop)
    loop.run()
    assert not came
    deadline.set(30, loop.stop)
    deadline.close()
    assert len([timer for timer in loop._timers if timer.call]) == 0
    loop.close()


def test_a_moment_without_threads(monkeypatch):
    """As with `ulimit -u`: what nobody can do fails and is told so; it is not kept for ever, and later ones are done."""
    loop = ratrod.EventLoop()
    pool = ratrod.Threads(loop, 2)
    told = []

    def done(result, error):
        told.append((result, error and str(error)))
        loop.stop()

    def no_thread(_self):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(ratrod.threading.Thread, "start", no_thread)
        pool.submit(lambda: 1, done)
    loop.run()
    assert told == [(None, "this system lets it start no thread for now (can't start new thread)")]
    loop._is_stopped = False
    pool.submit(lambda: 2, done)
    loop.run()
    assert told[1:] == [(2, None)]
    pool.close()
    pool.join(PATIENCE)
    loop.close()


def test_a_listener_that_is_no_more_neither_spins_nor_stays():
    """accept() fails for good, as after `ss -K`: it is tried again after a pause, and the drain ends."""
    loop = ratrod.EventLoop()
    sock = socket.create_server(("127.0.0.1", 0))
    listener = ratrod.Listener(loop, sock, lambda *_: None, pause=60)
    listener.start()
    sock.shutdown(socket.SHUT_RDWR)
    listener._on_event(READ)
    assert listener._rests and not listener._is_watched
    listener.drain()
    assert sock.fileno() < 0
    loop.close()


@pytest.fixture
def reach():
    """A Reach whose client notes what it is told, for two tries in a row."""
    loop, again, given_up = ratrod.EventLoop(), [], []
    made = ratrod.Reach(types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, try_again=lambda: again.append(1), give_up=given_up.append), 2)
    yield made, again, given_up
    made.stop()
    loop.close()


def test_a_refused_key_is_said_after_a_loss_too(reach, caplog):
    """A server that is started anew refuses connections first. Each is said once, the loss as its second failure."""
    made, _, _ = reach
    for error in (ratrod.ConnectError("refused"), ratrod.ConnectError("refused"), ratrod.AuthenticationError("HAS CHANGED"),
                  ratrod.AuthenticationError("HAS CHANGED"), ratrod.ConnectError("refused")):
        made.fail(error, "Lost it")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "❌ Lost it: refused; trying again", "❌ Lost it: HAS CHANGED; trying again"]


def test_links_that_fail_together_are_one_try(reach):
    """A server that ends takes all links in one moment: --max-retry-count counts tries to come back."""
    reach, again, given_up = reach
    for _ in range(10):
        reach.fail(ratrod.ConnectError("it ended"), tried=True)
    assert not given_up
    reach._on_due()
    for _ in range(10):
        reach.fail(ratrod.ConnectError("still away"))
    assert len(again) == 1 and "after 2 tries" in str(given_up[0])
