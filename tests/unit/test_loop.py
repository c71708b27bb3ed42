"""The loop's own parts: what it polls with, timers, and the buffers that links borrow."""

import collections
import functools
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import closing
from unittest import mock

import pytest

import ratrod
from ratrod import READ, WRITE
from support.joined import Clock, Loop
from support.pressure import BlackHole
from support.programs import PATIENCE, PYTHON, RATROD, linux

POLLERS = [(ratrod.Poller, selectors.EVENT_WRITE)] + [(getattr(select, "epoll", None), WRITE)] * hasattr(select, "epoll")
every_poller = pytest.mark.parametrize("make, write", POLLERS, ids=lambda value: getattr(value, "__name__", ""))


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    ratrod.close_all(ends)


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(ratrod, "time", made)
    return made


def run_again(loop):
    """Until something stops it."""
    loop._is_stopped = False
    loop.run()


def check_options(sock, *options):
    assert [bool(sock.getsockopt(*option)) if value == 1 else sock.getsockopt(*option) for *option, value in options] == [
        value for *_, value in options]


def test_a_connection_to_itself_is_none(loop, monkeypatch):
    """Where nobody listens, the system may give a connection that very port. An echo is no remote, and would keep the port from one."""
    made, sock = [], socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    monkeypatch.setattr(loop, "make_socket", lambda _family: sock)
    ratrod.Connector(loop, ratrod.Address(*sock.getsockname()), PATIENCE, lambda *end: made.extend(end)).start(print)
    assert made[0] is None and isinstance(made[1], ConnectionRefusedError) and sock.fileno() == -1


def test_what_windows_lacks_of_sockets(loop, monkeypatch):
    """A Unix socket that a client asks for is refused in words. strerror() says "Unknown error" of what socket.errorTab has words for."""
    made = []
    with monkeypatch.context() as patch:
        patch.delattr(socket, "AF_UNIX", raising=False)
        ratrod.Connector(loop, ratrod.Address("/run/some.sock", 0), PATIENCE, lambda *end: made.extend(end)).start(print)
    assert made[0] is None and ratrod.reason(made[1]) == "this system has no Unix sockets here"
    monkeypatch.setattr(socket, "errorTab", {10061: "Connection refused."}, raising=False)
    monkeypatch.setattr(os, "strerror", {10061: "Unknown error", 2: "No such file"}.get)
    assert [ratrod.reason(ratrod.system_error(code)) for code in (10061, 2)] == ["Connection refused", "No such file"]


def test_a_machine_that_lost_power_is_found_out(loop):
    """An idle other side is asked after 60 s, where the system's own 2 h would keep the stream: by sockets that are accepted, and by the
    remote of a stream that is there at a sweep. An urgent byte stays in line."""
    asks = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *(
        (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in (
            ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)) if hasattr(socket, name))]
    at_once = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    listening, = ratrod.listen(ratrod.Address("127.0.0.1", 0))
    made = []
    ratrod.Connector(loop, ratrod.Address(*listening.getsockname()), PATIENCE, lambda sock, _error: made.append(sock)).start(print)
    made.append(listening.accept()[0])
    check_options(made[0], *at_once)
    check_options(made[1], *at_once, *asks)
    owner = types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, memory=ratrod.Memory(1 << 20), counters=ratrod.Counters(loop))
    stream = ratrod.AcceptorStream(ratrod.Keeper(owner), "", "")
    stream.join(made[0])
    stream.on_sweep()
    check_options(made[0], *asks)
    stream.fail(ratrod.LocalFailed("the test is over"))
    ratrod.close_all([listening, *made])


@every_poller
def test_the_bits_of_events(make, write, pair):
    """READ and WRITE are those of the poller that the loop has on this system: epoll or a selector."""
    assert POLLERS[-1][1] == WRITE
    near, far = pair
    fd = near.fileno()
    poller = make()
    poller.register(fd, READ)
    assert poller.poll(0) == []
    far.send(b"x")
    assert poller.poll(PATIENCE) == [(fd, READ)]
    poller.modify(fd, write)
    assert poller.poll(PATIENCE) == [(fd, write)]
    poller.modify(fd, READ | write)
    assert poller.poll(PATIENCE) == [(fd, READ | write)]
    poller.unregister(fd)
    assert poller.poll(0) == []
    poller.register(fd, READ)
    far.close()
    (_, mask), = poller.poll(PATIENCE)
    assert mask & READ, "a hang-up is something to read"
    poller.close()


def test_a_system_without_epoll():
    """The whole program on another selector, as on macOS and Windows."""
    words = ("import selectors, sys; selectors.DefaultSelector = selectors.SelectSelector; vars(selectors).pop('EpollSelector', None);"
             "import program as ratrod; assert isinstance(ratrod.EventLoop()._poller, selectors.SelectSelector); sys.exit(ratrod.main(['demo']))")
    subprocess.run([PYTHON, "-c", words], stdin=subprocess.DEVNULL, timeout=60, check=True, cwd=os.path.dirname(RATROD[1]))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of descriptors")
@pytest.mark.parametrize("soft, hard, allowed, reached", [
    (256, 4096, 1 << 30, 4096), (1024, 1 << 30, 1 << 30, 1 << 20),
    (256, -1, 61440, range(50000, 61441)),  # macOS: no limit, but more than kern.maxfilesperproc is refused
    (256, (1 << 63) - 1, 10240, range(8192, 10241)), (256, -1, 256, 256), (-1, -1, 1 << 30, -1), (4096, 4096, 1 << 30, 4096),
])
def test_the_soft_limit_is_raised_as_far_as_it_goes(monkeypatch, soft, hard, allowed, reached):
    import resource
    limits = [soft, hard]
    def setrlimit(_what, new):
        if new[0] > allowed:
            raise ValueError("current limit exceeds maximum limit")
        limits[:] = new
    monkeypatch.setattr(resource, "getrlimit", lambda _what: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    ratrod.raise_descriptor_limit()
    assert limits[0] in (reached if isinstance(reached, range) else [reached]) and limits[1] == hard
    assert 0 < ratrod.descriptor_limit() <= 1 << 20


class Busy:
    """A callback of `key` that takes a millisecond of the test's own clock, and then does `more`."""

    def __init__(self, clock, key, more=lambda: None):
        self.clock, self.peer_key, self.more, self.calls = clock, key, more, 0

    def on_event(self, _mask):
        self.calls += 1
        self.clock.now += 0.001
        self.more()


def test_a_key_with_many_callbacks_holds_up_no_other(clock, loop, pair):
    """200 sockets of one key are ready all the time. Another key's event comes after those of one round at most, and its next one after a
    single callback of the busy key, which each of its own callbacks served in turn."""
    ends = [socket.socketpair() for _ in range(200)]
    busy = [Busy(clock, b"busy") for _ in ends]
    near, far = pair
    quiet = Busy(clock, b"quiet", lambda: near.recv(1))
    for (sock, other), callback in zip(ends, busy):
        other.send(b"x")
        loop.watch(sock.fileno(), 0, READ, callback.on_event)
    loop.watch(near.fileno(), 0, READ, quiet.on_event)
    for n in range(1, 6):
        far.send(b"x")
        before = sum(callback.calls for callback in busy)
        while quiet.calls < n:
            loop.turn()
        assert sum(callback.calls for callback in busy) - before <= ratrod.TURNS / 0.001 + 1
    while sum(callback.calls for callback in busy) < 3 * len(busy):
        loop.turn()
    assert max(callback.calls for callback in busy) - min(callback.calls for callback in busy) <= 2, "within the key they take turns"
    for both in ends:
        ratrod.close_all(both)


def test_a_long_head_of_http_is_read_in_turns(loop, pair):
    near, far = pair
    far.send(b"GET /" + b"a" * 8000)
    negotiation = ratrod.Negotiation(loop, near, None, ratrod.HttpRequest(lambda *_: b""), 10, lambda *_: None)
    negotiation.start()
    loop.turn()
    assert len(near.recv(9000, socket.MSG_PEEK)) > 8005 - 4 * ratrod.BATCH * 2
    negotiation.close()


def test_keys_share_the_time_and_not_the_number_of_callbacks(clock):
    """A key whose one callback takes long has as much of the time as another one with many short ones."""
    turns = ratrod.Turns()
    long_one = types.SimpleNamespace(peer_key=b"long", seconds=0.01, used=0.0)
    short_ones = [types.SimpleNamespace(peer_key=b"short", seconds=0.001, used=0.0) for _ in range(50)]
    def run(self, _mask):
        clock.now += self.seconds
        self.used += self.seconds
    ready = [(types.MethodType(run, made), READ) for made in [long_one, *short_ones]]
    for _ in range(500):
        for callback, mask in turns.take(ready):
            callback(mask)
    assert 0.8 < long_one.used / sum(made.used for made in short_ones) < 1.25


def test_buffers_are_lent_to_so_many_and_come_back(loop):
    with mock.patch.object(ratrod, "new_scratch", side_effect=OSError("Cannot allocate memory")):
        assert not any(loop.lend_scratch() for _ in range(ratrod.LENT_AT_ONCE))
    lent = [loop.lend_scratch() for _ in range(ratrod.LENT_AT_ONCE)]
    assert loop.lend_scratch() is None  # whoever comes later takes memory of its own
    assert len({id(buffer.obj) for buffer in [*lent, loop.scratch_in]}) == ratrod.LENT_AT_ONCE + 1
    for buffer in lent:
        loop.give_back(buffer)
    again = [loop.lend_scratch() for _ in lent]
    assert {id(buffer.obj) for buffer in [*again, loop.scratch_in]} == {id(buffer.obj) for buffer in [*lent, again[0]]}


def test_a_deadline_that_moves_leaves_one_entry(loop):
    """A link's deadline is set and taken back with every stream: what is left on the heap must not grow with them."""
    deadline, came = ratrod.Deadline(loop), []
    for _ in range(1000):
        deadline.set(30, lambda: came.append("late"))
        deadline.clear()
    assert len(loop.deadlines) == 1
    deadline.set(0.01, loop.stop)  # a nearer one is not late for it
    loop.run()
    assert not came and deadline.when == ratrod.NEVER
    # The entry of a nearer one, which was taken back, does not end a later one too early.
    deadline.set(0.01, lambda: came.append("early"))
    deadline.clear()
    deadline.set(0.05, loop.stop)
    run_again(loop)
    assert not came


def test_a_call_that_calls_itself_leaves_the_others_their_turn(loop):
    said = []
    def again():
        said.append("again")
        loop.call_later(0, again)
    def others():
        said.append("others")
        if said.count("others") == 3:
            loop.stop()
        loop.call_soon_threadsafe(others)
    again()
    others()
    loop.run()
    assert said.count("again") <= said.count("others") + 1


def test_a_moment_without_threads(loop):
    """As with `ulimit -u`: what nobody can do fails and is told so; it is not kept for ever, and later ones are done."""
    pool, told = ratrod.Threads(loop, 2), []
    def done(result, error):
        told.append((result, error and str(error)))
        loop.stop()
    def outcome(call):
        pool.submit(call, done)
        run_again(loop)
        return told.pop()
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert outcome(int) == (None, "this system lets it start no thread for now (can't start new thread)")
    assert outcome(lambda: 2) == (2, None)
    # What ends a thread of others, as sys.exit() in authorize() would, does not end these.
    assert [outcome(sys.exit) for _ in range(3)] == [(None, "SystemExit on a thread")] * 3
    assert outcome(lambda: 3) == (3, None) and not told
    pool.close()
    pool.join(PATIENCE)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_peer_who_makes_causes_without_end_gets_no_more_lines(clock, monkeypatch, caplog, is_known):
    """Neither of causes that he has used up, nor by new ones, and no memory. The failures of other clients are said. What sums warnings up is one."""
    monkeypatch.setattr(ratrod, "SOURCES", 512)
    made = ratrod.Complaints()
    complain = functools.partial(made.complain, is_known=is_known, level=logging.WARNING)
    names = ["%%d more of %d" % n for n in range(2 * ratrod.SOURCES)]
    while complain(names[0], "the first"):
        pass
    for name in names:
        complain(name, "x")
    assert not complain(names[0], "the first")
    burst = ratrod.LOG_BURST_IN_ALL
    assert len(caplog.records) <= (2 * burst + ratrod.SOURCES if is_known else burst)
    assert len(made._lines) <= ratrod.SOURCES + 2 and sum(made._muted.values()) > ratrod.SOURCES // 2
    if not is_known:
        assert made.complain("%d more of a client", "a client's", True)
    for _ in range(3 * ratrod.SOURCES):
        clock.now += 1
        made.sweep()
    assert not made._lines and not made._muted, "nothing is kept of what was said"
    assert all(record.levelno == logging.WARNING or "client" in record.message or "other" in record.message for record in caplog.records)


class Names:
    """Look-ups on a loop, where names that begin with "silent" have no answer until the end. `asked`: what threads look up."""

    def __init__(self, loop, limits):
        self.loop, self.asked, self._end = loop, [], threading.Event()
        self.look_ups = ratrod.LookUps(loop, limits)

    def resolve(self, address, *_rest):
        self.asked.append(address.host)
        if address.host.startswith("silent"):
            self._end.wait(PATIENCE)
        return [(socket.AF_INET, ("127.0.0.1", address.port))]

    def find(self, key, host, port=80, timeout=None):
        """What has been answered: [] until then. No timeout: what is silent has 0.05 s, all others have their time."""
        answers = []
        self.look_ups._timeout = timeout or (0.05 if host.lower().startswith("silent") else PATIENCE)
        self.look_ups.look_up(key, ratrod.Address(host, port), lambda found, error: answers.append(found or str(error)))
        return answers

    def run_until(self, condition):
        until = time.monotonic() + PATIENCE
        def look():
            if condition() or time.monotonic() > until:
                return self.loop.stop()
            return self.loop.call_later(0.002, look)
        look()
        run_again(self.loop)
        assert condition()

    def answers(self, key, host):
        """Soon, with an address."""
        found = self.find(key, host)
        self.run_until(lambda: found)
        return isinstance(found[0], list)

    def close(self):
        self._end.set()
        self.look_ups.close()


@pytest.fixture
def names(loop, monkeypatch):
    made = []
    def make(**limits):
        made.append(Names(loop, ratrod.DEFAULT_LIMITS._replace(**limits)))
        monkeypatch.setattr(ratrod, "look_up", made[0].resolve)
        return made[0]
    yield make
    made[0].close()


def test_a_name_is_looked_up_once_for_all_of_a_key(names, monkeypatch):
    monkeypatch.setattr(ratrod.LookUps, "MOST_WAITING", 3)
    made = names()
    answers = [made.find(b"a", *address) for address in (("silent", 80), ("silent", 81), ("Silent", 80))]
    other = made.find(b"b", "silent")
    assert made.find(b"a", "silent too") == ["the server looks up as many targets of this client as it takes (3); try again later"]
    made.run_until(lambda: all([*answers, other]))
    assert answers == [["the name look-up took too long"]] * 3 and made.asked == ["silent", "silent"], "once for each key"
    good = [made.find(b"a", "good", port) for port in (80, 443)]
    made.run_until(lambda: all(good))
    assert [(answer, ) for answer, in good] == [([(socket.AF_INET, ("127.0.0.1", port))], ) for port in (80, 443)]
    assert made.asked.count("good") == 1


def test_a_look_up_that_was_given_up_before_its_turn_is_kept_no_longer(names):
    made = names(lookup_threads=1)
    answers = [made.find(b"a", "silent-%d" % n, timeout=PATIENCE if n == 0 else 0.05) for n in range(20)]
    made.run_until(lambda: all(answers[1:]))
    assert made.asked == ["silent-0"] and not any(made.look_ups._waiting)


def test_a_look_up_that_nobody_waits_for_takes_no_place(names):
    made = names(lookup_threads=4)
    for n in range(3):
        silent = [made.find(b"a", "silent%d-%d" % (n, m)) for m in range(4)]
        if not n:  # a key that is alone has three of the four; the others wait
            assert made.look_ups._running.of(b"a") == 3
        made.run_until(lambda: all(silent))  # noqa: B023
    assert made.look_ups._running.of(b"a") == 4, "those that hang are not more than four"
    late = made.find(b"a", "silent-late")
    made.run_until(lambda: bool(late))
    assert "silent-late" not in made.asked, "its key has no thread left"
    # Others have: up to sixteen in all, the last one for a key that holds none.
    for key in (b"b", b"c", b"d"):
        assert made.answers(key, "good")
        for n in range(4):
            silent = [made.find(key, "silent%d-%d" % (n, m)) for m in range(4)]
            made.run_until(lambda: all(silent))  # noqa: B023
    assert made.look_ups._running.total == 15
    assert made.answers(b"e", "good")


def test_a_look_up_whose_turn_never_came_is_not_refused(names):
    """It is the other names that are silent."""
    made = names(lookup_threads=4)
    silent = [made.find(b"a", "silent%d" % n, timeout=1) for n in range(3)]
    good = made.find(b"a", "good", timeout=1)
    made.run_until(lambda: all([*silent, good]))
    assert made.answers(b"a", "good")


def test_a_listener_that_is_no_more_neither_spins_nor_stays(loop):
    """accept() fails for good, as after `ss -K`: it is tried again after a pause, and the drain ends."""
    sock = socket.create_server(("127.0.0.1", 0))
    listener = ratrod.Listener(loop, sock, lambda *_: None, pause=60)
    listener.start()
    sock.shutdown(socket.SHUT_RDWR)
    listener._on_event(READ)
    assert listener._rest.when < ratrod.NEVER and not listener._transport.events
    listener.drain()
    assert sock.fileno() < 0


def test_a_refused_key_is_said_after_a_loss_too(loop, caplog):
    """A server that is started anew refuses connections first. Each is said once, the loss as its second failure."""
    reach = ratrod.Reach(types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, try_again=print, notice=print, give_up=print), 2)
    for error in [ratrod.ConnectError("refused")] * 2 + [ratrod.AuthenticationError("HAS CHANGED")] * 2 + [ratrod.ConnectError("refused")]:
        reach.fail(error, "Lost it")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "❌ Lost it: refused; trying again", "❌ Lost it: HAS CHANGED; trying again"]
    reach.stop()


def test_byte_counts_of_any_number_of_keys_are_bounded(loop, monkeypatch):
    """With authorize() there is no list that bounds them. Nothing is lost of the sum."""
    monkeypatch.setattr(ratrod, "SOURCES", 256)
    counters, carried = ratrod.Counters(loop), collections.namedtuple("Carried", "peer_key sent received label started")
    for n in range(3 * ratrod.SOURCES):
        key = b"%d" % (n if n % 2 else 0)  # one of them comes again and again
        counters.on_end(carried(key, 1, 2, "", 0.0))
    tally = counters.tally([])
    assert len(tally) == ratrod.SOURCES
    assert tally[b"0"]["sent"] == 3 * ratrod.SOURCES // 2
    assert [sum(of_key[what] for of_key in tally.values()) for what in ("sent", "received")] == [3 * ratrod.SOURCES, 6 * ratrod.SOURCES]


def test_receive_buffers_of_udp_sockets(loop):
    """For bursts: 1 MiB, or what the system gives for that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for address in (None, asked.getsockname()):
            port = ratrod.RemotePort(loop, ratrod.open_udp(loop, socket.AF_INET, address or ("127.0.0.1", 9)), b"key", is_shared=not address)
            assert port.peer_key == b"key"  # whose turns its datagrams take: a burst for 1,000 sessions held every stranger up for 1 s
            assert port.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == asked.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            port.close()


def test_workers_are_ready_when_each_of_them_is(loop, pair):
    """A SIGHUP has those that are ready say so again."""
    started, (silent, other) = [], socket.socketpair()
    with silent, other:
        ratrod.Workers(loop, ratrod.Callbacks(lambda: started.append(True)), {pair[0]: 0, silent: 0}, 0.0).start()
        for _ in range(4):
            pair[1].send(b".")
            loop.turn()
    assert not started


def test_a_worker_that_is_stuck_does_not_hold_up_the_end_of_all(loop, pair, monkeypatch):
    monkeypatch.setattr(ratrod.Workers, "PATIENCE", 0)
    for end, code in ((lambda workers: workers.drain() or loop.turn(), -signal.SIGKILL), (ratrod.Workers.close, 0)):
        with subprocess.Popen(["sleep", "60"]) as stuck:
            stuck.send_signal(signal.SIGSTOP)
            os.waitpid(stuck.pid, os.WUNTRACED)  # a SIGTERM that comes before it stops goes before SIGSTOP
            end(ratrod.Workers(loop, ratrod.Callbacks(), {pair[0]: stuck.pid}, 0.0))  # close() waits for it by itself
            assert stuck.wait(PATIENCE) == code


def test_a_loop_that_is_closed_holds_no_socket(pair):
    loop = ratrod.EventLoop()
    ratrod.LastWord(loop, pair[0], b"the other side is to close first")
    loop.close()
    assert pair[0].fileno() == -1


def test_a_loop_that_cannot_be_made_leaves_nothing(caplog):
    """Nor does a start that fails: a second one in the same program would find the port taken by the first."""
    before = set(ratrod._loops)
    with mock.patch.object(socket, "socketpair", side_effect=OSError(24, "Too many open files")):
        pytest.raises(ratrod.RatrodError, ratrod.EventLoop)
    pytest.raises(ratrod.RatrodError, ratrod.EndpointRun(mock.Mock(side_effect=ratrod.RatrodError("it cannot be")), 0.0, print).run)
    asks = mock.Mock(**{"start.side_effect": KeyboardInterrupt})  # Ctrl-C at a question
    pytest.raises(KeyboardInterrupt, ratrod.EndpointRun(lambda *_: asks, 0.0, print).run)
    assert set(ratrod._loops) == before and asks.close.called


def test_a_bug_whose_owner_cannot_be_ended_either_ends_no_loop(caplog):
    class Owner:
        def callback(self, *_):
            raise ZeroDivisionError
        def abort(self, _error):
            raise IndexError
    with closing(ratrod.EventLoop()) as loop:
        loop.call_soon_threadsafe(Owner().callback)
        loop.call_later(0.01, loop.stop)
        loop.run()
    assert "ZeroDivisionError" in caplog.text and "IndexError" in caplog.text


def connect(loop, timeout, *found):
    """[(socket, error)] of a connect to these addresses of a name; [] where it does not end."""
    ended = []
    def on_close(*end):
        ended.append(end)
        loop.stop()
    addresses = [(socket.AF_INET, each) for each in found]
    ratrod.Connector(loop, ratrod.Address("name", 1), timeout, on_close).start(lambda _target, done: done(addresses, None))
    loop.call_later(PATIENCE / 3, loop.stop)
    loop.run()
    return ended


@linux
def test_an_address_that_says_nothing_does_not_hold_up_the_next_one(loop):
    """RFC 8305: it has 0.25 s for itself."""
    with closing(BlackHole()) as hole, socket.create_server(("127.0.0.1", 0)) as near:
        (sock, error), = connect(loop, PATIENCE / 4, ("127.0.0.1", hole.port), near.getsockname())
        assert error is None
        with sock:
            assert sock.getpeername() == near.getsockname()


@linux
@pytest.mark.parametrize("found", [1, 2], ids=["the last one", "one after a refusal"])
def test_an_address_that_fails_at_once_leaves_those_that_are_silent_their_deadline(loop, found):
    """A host without IPv6 and a remote that says nothing: it had lasted until the kernel gave up, after two minutes."""
    with closing(BlackHole()) as hole:
        (sock, error), = connect(loop, 2 * ratrod.STAGGER, ("127.0.0.1", hole.port), *[("255.255.255.255", 1)] * found)
    assert (sock, str(error)) == (None, "timed out")
