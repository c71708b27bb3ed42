"""Descriptors: as many as there may be, what happens when they run out, and that none is ever left behind (of 100,000 connections: RATROD_LONG=1)."""

import collections
import concurrent.futures
import contextlib
import functools
import pathlib
import random
import re
import selectors
import signal
import socket
import sys
import time

import pytest

from support import ratrod2_peer as peer, sockets
from support.kernel import cpu_seconds
from support.keys import seed_of
from support.pressure import LONG, figure, from_address, megabytes, memory, scaled
from support.programs import PATIENCE, READY, STARTED, descriptors, need, tcp_port, udp_port
from support.relays import Door
from support.rows import row
from support.sockets import assert_refused, assert_reset, dial, eventually, is_ready, ping, receive_all, receive_exactly, reset, say, settled, works
from support.socks5 import ASSOCIATE, ask_socks, encode_address, request, socks_port
from support.targets import echo

pytestmark = [pytest.mark.usefixtures("no_traceback"), pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]
FEW = 64
PAUSE = 0.2  # before a program without descriptors accepts again; a second by default


@pytest.fixture
def limited(start, keys):
    """limited(soft, hard, folder, words...) -> the program, started with these limits of descriptors."""
    need("prlimit")
    program = scaled(accept_pause=PAUSE)
    return lambda soft, hard, folder, *words: start("prlimit", "--nofile=%d:%d" % (soft, hard), *program, "-k", folder.path, *words)


def started(server):
    return int(server.wait_for(STARTED).group(1))


def test_the_soft_limit_is_raised(limited, keys):
    """Most systems start programs with 1024, which is 500 connections; and before the tunnels listen, here on 300 sockets."""
    server = limited(256, 4096, keys.server, "serve", "127.0.0.1:0")
    client = limited(256, 4096, keys.client, "connect", "127.0.0.1:%d" % started(server), *["0:127.0.0.1:9"] * 150).ready()
    for program in (server, client):
        limits = pathlib.Path("/proc/%d/limits" % program.process.pid).read_text()
        assert re.search(r"^Max open files +4096 +4096 ", limits, re.M), limits


def complaints(program):
    return [line for line in program.lines if "cannot accept connections for now" in line]


def assert_it_rests(program, sock):
    """A spin can only be seen over time: it takes all that the machine gives it. What is open goes on meanwhile."""
    used = cpu_seconds(program.process.pid)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        ping(sock)
        time.sleep(0.2)
    used = cpu_seconds(program.process.pid) - used
    figure("CPU time in 1.5 s without descriptors, %s" % ("connect" if "connect" in program.process.args else "serve"), "%.2f s" % used)
    assert used < 0.3


def test_a_server_without_descriptors(limited, connect, keys, tcp_echo, stack):
    server = limited(FEW, FEW, keys.server, "serve", "--handshake-timeout", "60", "127.0.0.1:0")
    port = started(server)
    client = connect(port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    sock = stack.enter_context(dial(tcp_port(client)))
    ping(sock)
    free = FEW - descriptors(server)
    strangers = [stack.enter_context(dial(port, source=from_address(n))) for n in range(free + 20)]
    server.wait_for("cannot accept connections for now: ")
    ping(stack.enter_context(dial(tcp_port(client))))  # on the link that is there: accepting has left it a descriptor for its remote
    assert_it_rests(server, sock)
    # One place after the other becomes free, and is taken at once: it is still the same shortage.
    for stranger in strangers[:3]:
        stranger.close()
        time.sleep(1.5 * PAUSE)
    assert len(complaints(server)) == 1
    for stranger in strangers[3:]:
        stranger.close()
    def comes_in():
        with contextlib.suppress(peer.PeerError):  # the places of those who left may not be free yet
            link = peer.Client(stack.enter_context(dial(port)), seed_of(keys.client)).handshake()
            return link.exchange("127.0.0.1:%d" % tcp_echo.port, b"hello") == b"hello"
    eventually(comes_in, lambda: server.output)
    ping(sock)
    assert len(complaints(server)) == 1


def test_a_server_that_ends_takes_what_waited_for_descriptors(limited, keys, stack):
    """Few are left, so accepting rests; at the end they are for those that wait, which closing the listener would reset."""
    server = limited(FEW, FEW, keys.server, "serve", "--handshake-timeout", "60", "--drain", "30", "127.0.0.1:0")
    port = started(server)
    def enter(n):
        return stack.enter_context(dial(port, source=from_address(n)))
    spared = FEW // 8
    for n in range(FEW - descriptors(server) - spared + 1):
        enter(n)
    server.wait_for("cannot accept connections for now: nearly all of the %d descriptors are taken" % FEW)
    waiting = [peer.Client(enter(FEW + n), seed_of(keys.client)) for n in range(spared // 2)]
    for link in waiting:
        link.send_client_preamble()
    server.process.send_signal(signal.SIGTERM)
    for link in waiting:
        link.authenticate()
        link.read_completion()
        assert [record.type for record in link.read_to_end()] == [peer.CLOSE]
    assert server.wait() == 0


class Locals:
    """Many connections to a client at once, each with a word for the echo: what became of them."""

    def __init__(self, ports, n, stack):
        self.waiting, self.answered, self.refused = [], [], 0
        for i in range(n):
            try:  # one that is refused may be reset before it is returned, or before it has sent anything
                local = stack.enter_context(dial(ports[i % len(ports)]))
                local.sendall(b"ping")
                self.waiting.append(local)
            except ConnectionResetError:
                self.refused += 1

    def look(self):
        """Whether all have been answered or reset."""
        for local in [local for local in self.waiting if is_ready(local, selectors.EVENT_READ, 0)]:
            self.waiting.remove(local)
            try:
                assert local.recv(4) == b"ping"
                self.answered.append(local)
            except ConnectionResetError:
                self.refused += 1
        return not self.waiting


def test_a_client_without_descriptors(limited, serve, keys, tcp_echo, stack):
    """One line, however many tunnels listen. What is open goes on, others wait, none for a link that can have no descriptor, and each that ends
    makes room."""
    tunnels = 3
    _, port = serve()
    client = limited(FEW, FEW, keys.client, "connect", "127.0.0.1:%d" % port, *["0:127.0.0.1:%d" % tcp_echo.port] * tunnels).ready()
    ports = [tcp_port(client, n + 1) for n in range(tunnels)]
    sock = stack.enter_context(dial(ports[0]))
    ping(sock)
    many = Locals(ports, 2 * FEW, stack)
    client.wait_for("cannot accept connections for now: ")
    assert_it_rests(client, sock)
    many.look()
    at_once = len(many.answered)
    def all_had_their_turn():
        while many.answered:
            local = many.answered.pop()
            ping(local, word=b"still there")
            local.close()
        return many.look()
    eventually(all_had_their_turn, lambda: "%d refused, %d wait:\n%s" % (many.refused, len(many.waiting), client.output))
    name = "%d connections to %d tunnels of a client with %d descriptors, " % (2 * FEW, tunnels, FEW)
    figure(name + "served at once", at_once)
    figure(name + "served in the end", 2 * FEW - many.refused)
    assert at_once > FEW // 8
    assert not many.refused
    ping(stack.enter_context(dial(ports[-1])))
    ping(sock)
    assert len(complaints(client)) == 1
    assert "Lost the server" not in client.output


# A program that has select() alone, as on Windows: where its selectors are replaced, and, where argv[1] is "counted", with Windows' own rule.
SELECT_ALONE = """if True:
    import selectors, sys
    class Counted(selectors.SelectSelector):
        def _select(self, r, w, x, timeout=None):
            if max(len(r), len(w)) > 512:
                raise ValueError("too many file descriptors in select()")
            return super()._select(r, w, x, timeout)
    is_counted = sys.argv.pop(1) == "counted"
    selectors.DefaultSelector = selectors.SelectSelector
    del selectors.EpollSelector
    import ratrod
    if is_counted:
        ratrod.SELECT_TAKES = ratrod.MOST_DESCRIPTORS = 512
        ratrod.ARE_NUMBERED = False
        selectors.DefaultSelector = Counted
    sys.exit(ratrod.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("rule, most", [("numbered", 1024), ("counted", 512)])
def test_select_alone(rule, most, start, serve, keys, tcp_echo, stack):
    """It takes no 1,025th descriptor, and on Windows no 513th: that would end the loop."""
    _, port = serve()
    client = start(need("prlimit"), "--nofile=8192:8192", sys.executable, "-c", SELECT_ALONE, rule, "-k", keys.client.path, "connect",
                   "--connect-timeout", "2", "127.0.0.1:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    sock = stack.enter_context(dial(tcp_port(client)))
    ping(sock)
    many = Locals([tcp_port(client)], most, stack)
    client.wait_for(r"cannot accept connections for now: nearly all of the %d descriptors are taken \(select\(\) takes no more\)" % most)
    eventually(lambda: many.look() or len(many.answered) > most // 4, lambda: "%d refused, %d wait" % (many.refused, len(many.waiting)))
    ping(sock)
    for local in [*many.answered, *many.waiting]:
        local.close()
    eventually(lambda: works(tcp_port(client)), lambda: client.output)
    assert len(complaints(client)) == 1 and "internal error" not in client.output


CONNECTIONS = 100_000 if LONG else 900
FIRST = 1000 if LONG else 400  # after which everything has its size
AT_ONCE = 8
BATCH = 10  # streams that die together
WORD = b"a word "


def serve_as_told(connection):
    """The target: what it does is the originator's first byte."""
    connection.settimeout(PATIENCE)
    told = connection.recv(1)
    if told == b"R":
        reset(connection)
    elif told == b"H":
        say(connection, WORD)
        assert receive_all(connection) == WORD
    elif told == b"E":
        echo(connection)


def clean(port):
    with dial(port) as local:
        say(local, b"E" + WORD * 100)
        assert receive_all(local) == WORD * 100


def half_closed(port):
    """The target ends its direction first; the originator's goes on."""
    with dial(port) as local:
        local.sendall(b"H")
        assert receive_all(local) == WORD
        say(local, WORD)


def without_a_byte(port):
    dial(port).close()


def reset_by_the_originator(port):
    local = dial(port)
    local.sendall(b"E" + WORD * 100)
    assert local.recv(1)
    reset(local)


def reset_by_the_target(port):
    with dial(port) as local:
        local.sendall(b"R")
        assert_reset(local)


def udp(port):
    with sockets.dial_udp(port) as originator:
        sockets.ask_until_answered(originator, WORD)


def socks_connect(port, remote, answer):
    local, code, _ = ask_socks(port, request("127.0.0.1", remote))
    assert code == answer
    return local


def socks(port, remote):
    with socks_connect(port, remote, 0) as local:
        say(local, b"E" + WORD)
        assert receive_all(local) == WORD


def socks_refused(port, remote):
    with socks_connect(port, remote, 5) as local:
        receive_all(local)


def socks_udp(port, remote):
    local, code, relay = ask_socks(port, request("0.0.0.0", 0, ASSOCIATE))
    with local, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as originator:
        assert code == 0
        originator.connect(relay)
        sockets.ask_until_answered(originator, b"\0\0\0" + encode_address("127.0.0.1", remote) + WORD)


def socks_that_leaves(port):
    with dial(port) as local:
        local.sendall(b"\5\1\0" + b"\5\1")


class Ends:
    """A server and its clients, and a connection of each kind through them."""

    def __init__(self, start, keys, target, udp_echo, closed):
        self._start, self._keys = start, keys
        self._echo, self._udp = target(serve_as_told).port, udp_echo.port
        self._refused, self._forbidden = closed, 9
        allowed = r"127\.0\.0\.1:(?:%d|%d|%d)" % (self._echo, self._udp, self._refused)
        server = self._run(keys.server, "serve", "--legacy", "-r", allowed, "127.0.0.1:0")
        self._port = started(server)
        self._door = Door(target, self._port)
        client, legacy, self._cut = self._connect(self._port), self._connect(self._port, "--legacy", "-e"), self._connect(self._door.port)
        self.programs = {"server": server, "client": client, "legacy client": legacy, "client whose links die": self._cut}
        self.kinds = {**self._plain("", client), **self._plain("legacy ", legacy)}
        # What takes several seconds for a thousand is not every second one.
        self.weights = [1 if name.startswith("legacy") else 4 for name in self.kinds]

    def _run(self, folder, *words):
        """Surplus links and UDP sessions go within a second: else two minutes would have to pass before anything can be compared."""
        return self._start(*scaled(idle_time=0.5, sweep_interval=0.2, resume=0.0), "-k", folder.path, *words[:1], "--udp-timeout", "0.5", *words[1:])

    def _connect(self, port, *flags):
        return self._run(self._keys.client, "connect", *flags, "127.0.0.1:%d" % port, "0:socks",
                         *["0:127.0.0.1:%d" % remote for remote in (self._echo, self._refused, self._forbidden, self._udp)])

    def _plain(self, prefix, client):
        client.wait_for(READY)
        proxy = socks_port(client)
        to_echo, to_nobody, to_forbidden = (tcp_port(client, n) for n in (1, 2, 3))
        kinds = {function.__name__: functools.partial(function, to_echo)
                 for function in (clean, half_closed, without_a_byte, reset_by_the_originator, reset_by_the_target)}
        kinds.update({"refused": functools.partial(assert_refused, to_nobody), "forbidden": functools.partial(assert_refused, to_forbidden),
                      "udp": functools.partial(udp, udp_port(client, 4)), "socks": functools.partial(socks, proxy, self._echo),
                      "socks_refused": functools.partial(socks_refused, proxy, self._refused),
                      "socks_udp": functools.partial(socks_udp, proxy, self._udp), "socks_that_leaves": functools.partial(socks_that_leaves, proxy)})
        return {prefix + name: kind for name, kind in kinds.items()}

    def _a_batch(self, client, kill):
        """Streams in whose middle something dies: each of them must show that it was cut."""
        with contextlib.ExitStack() as stack:
            port = tcp_port(client)
            # The client may not have seen yet that its links died in the batch before: what was sent on one of them is lost with it.
            locals_ = []
            while len(locals_) < BATCH:
                with contextlib.suppress(ConnectionResetError):
                    local = stack.enter_context(dial(port))
                    local.sendall(b"E" + WORD)
                    assert receive_exactly(local, len(WORD)) == WORD
                    locals_.append(local)
            kill()
            for local in locals_:
                assert_reset(local)

    def links_cut(self):
        self._a_batch(self._cut, self._door.cut_all)

    def client_killed(self):
        client = self._connect(self._port).ready()
        self._a_batch(client, client.kill)


class Load:
    """Connections of random kinds, several at a time, and beside them batches that die."""

    def __init__(self, ends):
        self.counts, self.took = collections.Counter(), 0.0
        self._ends, self._rng = ends, random.Random(1)

    def run(self, connections):
        began = time.monotonic()
        plans = iter(self._rng.choices(list(self._ends.kinds), self._ends.weights, k=connections * 9 // 10))
        batches = connections // 10 // BATCH
        # A client costs more to start than all its streams; some are enough.
        kills = max(2, batches // 500)
        killed = {batches * (2 * n + 1) // (2 * kills) for n in range(kills)}
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE + 1) as pool:
            for done in [*(pool.submit(self._work, plans) for _ in range(AT_ONCE)), pool.submit(self._die, batches, killed)]:
                done.result()
        self.took += time.monotonic() - began

    def _work(self, plans):
        for name in plans:  # next() of a list's iterator is atomic
            with row(name):
                self._ends.kinds[name]()
            self.counts[name] += 1

    def _die(self, batches, killed):
        for n in range(batches):
            name = "client_killed" if n in killed else "links_cut"
            getattr(self._ends, name)()
            self.counts[name] += BATCH


@pytest.mark.timeout(3600)
def test_nothing_is_left_behind(start, keys, target, udp_echo, closed):
    ends = Ends(start, keys, target, udp_echo, closed)
    load = Load(ends)
    def used(measure):
        return {name: measure(program) for name, program in ends.programs.items()}
    load.run(FIRST)
    before = settled(lambda: used(descriptors), 2)  # nothing has changed for as long as surplus links and UDP sessions live
    memory_before = used(memory)
    load.run(CONNECTIONS - FIRST)
    eventually(lambda: used(descriptors) == before, lambda: "the same descriptors: %s, expected %s" % (used(descriptors), before))
    total = sum(load.counts.values())
    figure("connections through one server", "%d, %d a second: %s" % (
        total, total / load.took, ", ".join("%d %s" % (count, name.replace("_", " ")) for name, count in load.counts.most_common())))
    growth = {name: after - memory_before[name] for name, after in used(memory).items()}
    for name in ends.programs:
        figure("descriptors of the %s after %d and after %d connections" % (name, FIRST, total), before[name])
        figure("memory of the %s after %d, and what it grew by until the end" % (name, FIRST),
               "%s, %s" % (megabytes(memory_before[name]), megabytes(growth[name])))
    assert set(load.counts) == {*ends.kinds, "links_cut", "client_killed"}
    assert max(growth.values()) < 4 << 20
