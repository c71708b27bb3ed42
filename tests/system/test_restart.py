"""The end of a server or a client that loses nothing: SIGTERM drains, and with --reuse-port the next server takes over meanwhile.
Twenty restarts, and more load: RATROD_LONG=1 with -rP, which shows the figures."""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest

from support import legacy_peer, ratrod2_peer as peer, sockets
from support.checked_load import Load, exchange
from support.kernel import queued
from support.keys import seed_of
from support.pressure import LONG, figure
from support.programs import LEGACY_E, PATIENCE, RATROD2, Program, bound, linux, tcp_port, two_wires, udp_originator
from support.sockets import accept, ask_until_answered, assert_reset, dial, eventually, receive_all, receive_exactly, refused, say, talk, works

pytestmark = [pytest.mark.usefixtures("no_traceback"),
              pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM here that a program could act on")]

# Longer than any test waits: what ends before it has not waited for it.
FOREVER = "600"
ENDING = r"🛑 Ending: (\d+) connections? may go on for %s s; a second signal ends at once"
BULK = 10 << 20  # more than the buffers on the way take
TERM, INT = signal.SIGTERM, signal.SIGINT
CODE = {TERM: 0, INT: 130}  # the exit code after an orderly end
either_side = pytest.mark.parametrize("side", ["server", "client"])
needs_reuse_port = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no SO_REUSEPORT here")


class Joined(NamedTuple):
    """A tunnel with one connection through it, whose both outer ends the test has; `ending` is the program that is to be ended."""

    ending: Program
    server_port: int
    port: int
    originator: socket.socket
    target: socket.socket

    def drain(self, sign=TERM):
        """Signals, and waits until it is about to end."""
        self.ending.process.send_signal(sign)
        assert self.ending.wait_for(ENDING % FOREVER).group(1) == "1"

    def end(self):
        """Brings the connection to its regular end."""
        self.originator.shutdown(socket.SHUT_WR)
        assert receive_all(self.target) == b""
        self.target.shutdown(socket.SHUT_WR)
        assert receive_all(self.originator) == b""


@pytest.fixture
def joined(tunnel, listener, stack):
    """joined(side, drain, mode) -> Joined: a connection through a tunnel, whose server or client has --drain."""
    def launch(side, drain=FOREVER, mode=RATROD2):
        made = tunnel(sockets.port_of(listener), mode, **flags_of(side, *(() if drain is None else ("--drain", drain))))
        near, far = stack.enter_context(made.connect()), stack.enter_context(accept(listener))
        talk(near, far)
        return Joined(getattr(made, side), made.server_port, made.port, near, far)
    return launch


def flags_of(side, *flags):
    return {"%s_flags" % {"server": "serve", "client": "connect"}[side]: flags}


@pytest.mark.parametrize("sign, strangers", [(TERM, 5), (INT, 0)])
def test_nothing_is_open(serve, sign, strangers):
    """Strangers do not count: a silent one would keep the server for as long as a handshake may take, again and again."""
    server, port = serve("--drain", FOREVER, "--handshake-timeout", FOREVER)
    with contextlib.ExitStack() as stack:
        for silent in [stack.enter_context(dial(port)) for _ in range(strangers)][:1]:
            silent.sendall(b"ratrod2\n")
        eventually(lambda: not queued(port), "all are accepted")
        assert server.stop(sign) == CODE[sign]
    assert "may go on" not in server.output


def test_idle_links_alone_do_not_hold_it(tcp_echo, tunnel):
    made = tunnel(tcp_echo.port, RATROD2, serve_flags=("--drain", FOREVER))
    exchange(made.port, b"before")
    assert made.server.stop() == 0
    assert made.client.process.poll() is None, made.client.output


def test_an_idle_link_beside_a_busy_one(link, tcp_echo):
    """The idle one hears Close and FIN, never a reset: a client that sends an Open then reads that. The busy one hears Close in place of Over."""
    idle, busy = (link(flags=("--drain", FOREVER)) for _ in range(2))
    stream = busy.connect_to("127.0.0.1:%d" % tcp_echo.port)
    link.server.process.send_signal(TERM)
    assert idle.read_any_record().type == peer.CLOSE
    end = pytest.raises(peer.LinkEnded, idle.read_any_record)
    assert not isinstance(end.value, peer.LinkBroken)
    stream.send(b"still there?")
    assert stream.receive() == b"still there?"
    stream.end()
    assert stream.receive() == b""
    assert [record.type for record in busy.read_to_end()] == [peer.CLOSE]
    assert link.server.wait() == 0


@pytest.mark.parametrize("mode, side, sign", [
    (RATROD2, "server", TERM), (RATROD2, "client", INT), (LEGACY_E, "server", INT), (LEGACY_E, "client", TERM)],
    ids=lambda value: getattr(value, "name", value))
def test_what_is_open_goes_on_and_nothing_new_begins(joined, serve, mode, side, sign):
    made = joined(side, mode=mode)
    made.drain(sign)
    talk(made.originator, made.target)
    # The listener is gone: that of the client for local connections, that of the server for links.
    eventually(lambda: refused(made.port if side == "client" else made.server_port), "nobody listens any more")
    talk(made.originator, made.target)
    assert made.ending.process.poll() is None
    if side == "server":  # What runs one after the other need not wait for the drain: without --reuse-port too the port is free.
        serve(*mode.serve, bind="127.0.0.1:%d" % made.server_port)
        talk(made.originator, made.target)
    made.end()
    assert made.ending.wait() == CODE[sign], made.ending.output


@two_wires
@either_side
def test_what_takes_too_long_is_reset(joined, side, mode):
    """At once it would be a connection lost, at a clean end one cut short."""
    made = joined(side, drain="0.3", mode=mode)
    made.ending.process.send_signal(TERM)
    made.ending.wait_for(ENDING % r"0\.3")
    assert made.ending.wait() == 0, made.ending.output
    # On the original's wire a reset has no sign: what left is whole or the link's own end.
    assert_reset(*((made.originator, made.target) if mode is RATROD2 else (made.target,) if side == "server" else (made.originator,)))


@pytest.mark.parametrize("side, drain, sign", [("server", "0", TERM), ("client", None, INT), ("server", FOREVER, TERM), ("client", FOREVER, INT)])
def test_no_time_at_all(joined, side, drain, sign):
    """A client has none by default: whoever presses Ctrl-C on it means it. A second signal means it too."""
    made = joined(side, drain=drain)
    is_second = drain == FOREVER
    if is_second:
        made.drain()
        talk(made.originator, made.target)
    assert made.ending.stop(sign) == (128 + sign if is_second else CODE[sign])
    assert_reset(made.originator, made.target)
    assert ("may go on" in made.ending.output) == is_second


def test_a_server_waits_by_default(joined):
    """For 8 s (docker kills after 10), of which this connection needs none."""
    made = joined("server", drain=None)
    made.ending.process.send_signal(TERM)
    made.ending.wait_for(ENDING % 8)
    made.end()
    assert made.ending.wait() == 0


@either_side
def test_what_ends_meanwhile_is_whole(tunnel, target, side):
    """Bulk both ways that was on its way as the signal came: its last byte counts, and the target's half goes on after the originator's end."""
    up, down, seen = os.urandom(BULK), os.urandom(BULK), []
    halfway, go_on = threading.Event(), threading.Event()
    def half_duplex(connection):
        heard = receive_exactly(connection, BULK // 2)
        halfway.set()
        assert go_on.wait(PATIENCE)
        seen.append(heard + receive_all(connection) == up)
        connection.sendall(down)
    made = tunnel(target(half_duplex).port, RATROD2, **flags_of(side, "--drain", FOREVER))
    ending = getattr(made, side)
    with made.connect() as connection:
        speaker = threading.Thread(target=say, args=(connection, up), daemon=True)
        speaker.start()
        assert halfway.wait(PATIENCE)
        ending.process.send_signal(TERM)
        ending.wait_for(ENDING % FOREVER)
        go_on.set()
        seen.append(receive_all(connection) == down)
        speaker.join(PATIENCE)
    assert seen == [True, True]
    assert ending.wait() == 0


def test_an_open_that_crosses_the_close(link, tcp_echo):
    """It is answered by the Close that was on its way, as if never looked at: nothing of it may reach the target."""
    links = [link(flags=("--drain", FOREVER)) for _ in range(4)]
    # Frozen, so that all the Opens are there before it looks at anything: the signal is the first that it sees as it goes on.
    link.server.process.send_signal(signal.SIGSTOP)
    for made in links:
        made.send_open(peer.TCP, "127.0.0.1:%d" % tcp_echo.port)
    link.server.process.send_signal(TERM)
    link.server.process.send_signal(signal.SIGCONT)
    for made in links:
        record = made.read_any_record()
        if record.type == peer.OPENED:  # the socket was read before the signal was: then it is a stream like any other
            made.send_record(peer.END)
        records = [record, *made.read_to_end()]
        assert records[-1].type == peer.CLOSE, records
    assert link.server.wait() == 0


class Servers:
    """Servers that follow each other on one port: `current`, and its `port`."""

    def __init__(self, serve, *flags):
        self._serve, self._flags = serve, (*flags, "--reuse-port")
        self.current, self.port = serve(*self._flags)

    def add(self):
        """The next one beside the current one, which is returned."""
        old, (self.current, _) = self.current, self._serve(*self._flags, bind="127.0.0.1:%d" % self.port)
        return old


@needs_reuse_port
def test_sharing_takes_two(ratrod, keys, serve):
    """Two servers on one port without a word about it, where one is a mistake, would each get half of the connections. The kernel asks both."""
    _, alone = serve()
    shared = Servers(serve)
    for port, flags in ((alone, ()), (alone, ("--reuse-port",)), (alone, ("--workers", "2")), (shared.port, ())):
        other = ratrod("-k", keys.server.path, "serve", *flags, "127.0.0.1:%d" % port)
        assert other.wait() == 1, (port == alone, flags)
        other.wait_for("cannot listen on `127.0.0.1:%d`.*in use" % port)
    assert shared.current.process.poll() is None


RESTARTS = 20 if LONG else 2
CONNECTIONS = 1000 if LONG else 100  # whole ones between two restarts


@needs_reuse_port
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode, flags, at_once", [(RATROD2, (), 1), (RATROD2, ("--workers", "2"), 1), (LEGACY_E, (), 1), (RATROD2, (), 2)],
                         ids=["ratrod2", "workers", "legacy-e", "two at once"])
def test_restarts_under_load_lose_nothing(serve, connect, tcp_echo, mode, flags, at_once):
    """What --reuse-port is for. Every connection is new, and whole or a failure. Of three servers that share a port for long, of which two end at
    once, an unlucky client meets an ending one twice in a row."""
    chain = Servers(serve, *mode.serve, *flags, "--drain", "30")
    client = connect(chain.port, *mode.connect, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    with Load(tcp_port(client)) as load:
        load.go_on(CONNECTIONS)
        for _ in range(RESTARTS):
            olds = [chain.add() for _ in range(at_once)]
            if at_once > 1:
                load.go_on(CONNECTIONS // 2)
            for old in olds:
                old.process.send_signal(TERM)
            assert [old.wait() for old in olds] == [0] * at_once, [old.output for old in olds]
            load.go_on(CONNECTIONS)
    figure("%d restarts under load, %d at once, %s" % (RESTARTS, at_once, " ".join((mode.name, *flags))), load)
    assert not load.failures, (load.failures[:10], client.output)
    assert "❌" not in client.output


@needs_reuse_port
@linux
def test_what_the_kernel_has_taken_is_served(serve, keys, tcp_echo):
    """50 connections that wait in the accept queue as the listener is closed, which the kernel would reset: each hears an orderly end instead."""
    server, port = serve("--drain", FOREVER)
    outcomes = collections.Counter()
    with contextlib.ExitStack() as stack:
        # A server that has nothing else to wait for gives handshakes 2 s, and on a busy machine 50 of them take longer: a stream holds it.
        stack.enter_context(peer.Client.connect(port, seed_of(keys.client)).handshake()).connect_to("127.0.0.1:%d" % tcp_echo.port)
        server.process.send_signal(signal.SIGSTOP)
        links = []
        for n in range(50):
            # Each from an address of its own: none of the limits on one source is what is looked at here.
            sock = stack.enter_context(dial(port, source="127.0.77.%d" % (n + 1)))
            links.append(peer.Client(sock, seed_of(keys.client)))
            links[-1].send_client_preamble()
        eventually(lambda: queued(port) == 50, lambda: "50 wait, not %d" % queued(port))
        server.process.send_signal(TERM)
        server.process.send_signal(signal.SIGCONT)
        for link in links:
            try:
                link.authenticate()
                link.read_completion()
                outcomes["Close" if [record.type for record in link.read_to_end()] == [peer.CLOSE] else "no Close"] += 1
            except OSError as error:
                outcomes[repr(error)] += 1
        assert server.process.poll() is None
    figure("50 links in the accept queue of a server that ends", dict(outcomes))
    assert outcomes == {"Close": 50}, (outcomes, server.output)
    assert server.wait() == 0


@pytest.fixture
def slow(target):
    """A target that says "first", and once `go_on` is set "last"."""
    go_on = threading.Event()
    def handle(connection):
        connection.sendall(b"first")
        assert go_on.wait(PATIENCE)
        connection.sendall(b"last")
    made = target(handle)
    made.go_on = go_on
    return made


@needs_reuse_port
@two_wires
def test_all_that_is_new_goes_to_the_next_server(serve, ratrod, keys, tcp_echo, udp_echo, slow, stack, mode):
    """Long streams, also those of reverse tunnels, keep the old server alive and end whole; these listen at the next one; UDP finds its way."""
    has_reverse = mode is RATROD2
    chain = Servers(serve, *mode.serve, *["--allow-listen"] * has_reverse, "--drain", FOREVER)
    client = ratrod("-k", keys.client.path, "connect", *mode.connect, "127.0.0.1:%d" % chain.port, "0:127.0.0.1:%d" % slow.port,
                    "0:127.0.0.1:%d" % udp_echo.port, *["R:0:127.0.0.1:%d" % made.port for made in (tcp_echo, slow)] * has_reverse).ready()
    originators = [stack.enter_context(udp_originator(client, 2)) for _ in range(3)]
    for n, originator in enumerate(originators):
        ask_until_answered(originator, b"%d" % n)
    port, *reverse_ports = [tcp_port(client), *(bound(client, ":%d" % made.port) for made in (tcp_echo, slow) if has_reverse)]
    connections = [stack.enter_context(dial(where)) for where in (port, port, port, *reverse_ports[1:])]
    for connection in connections:
        assert receive_exactly(connection, 5) == b"first"
    old = chain.add()
    old.process.send_signal(TERM)
    assert old.wait_for(ENDING % FOREVER).group(1) == str(len(connections))
    connections.append(stack.enter_context(dial(port)))
    assert receive_exactly(connections[-1], 5) == b"first"
    for n, originator in enumerate(originators):
        ask_until_answered(originator, b"%d again" % n)
    for reverse_port in reverse_ports[:1]:
        eventually(lambda: works(reverse_port), "it listens at the next server")  # noqa: B023 - called at once
        exchange(reverse_port, b"after")
    assert old.process.poll() is None
    slow.go_on.set()
    for connection in connections:
        with connection:
            assert receive_all(connection) == b"last"
    assert old.wait() == 0
    assert chain.current.process.poll() is None and client.process.poll() is None
    assert "❌" not in client.output


def test_udp_sessions_of_the_original_that_are_about_to_open_hold_up_no_end(serve, keys, resolver):
    names, identity = resolver(), legacy_peer.Identity.load(keys.client.path)
    server, port = serve("--legacy", "--drain", FOREVER, "--connect-timeout", FOREVER, env=names.environment)
    asking, coming = (legacy_peer.Client(dial(port), identity, target, udp=True) for target in ("hang.example:9", "127.0.0.1:9"))
    with asking, coming:
        for client in (asking, coming):
            client.send_preamble()
            client.receive_preamble()
        asking.send_authentication()
        eventually(lambda: "hang.example" in names.lookups, "a target is looked up")
        server.process.send_signal(TERM)
        eventually(lambda: refused(port), "the end has begun")
        coming.send_authentication()
        assert server.wait() == 0


def test_a_reverse_connection_goes_on_while_its_client_ends(serve, connect, slow):
    _, server_port = serve("--allow-listen")
    client = connect(server_port, "--drain", FOREVER, "R:0:127.0.0.1:%d" % slow.port)
    with dial(bound(client)) as connection:
        assert receive_exactly(connection, 5) == b"first"
        client.process.send_signal(TERM)
        assert client.wait_for(ENDING % FOREVER).group(1) == "1"
        slow.go_on.set()
        assert receive_all(connection) == b"last"
    assert client.wait() == 0


@pytest.mark.parametrize("second", [False, True], ids=["drain", "second signal"])
def test_workers_end_with_their_parent(serve, connect, slow, stack, second):
    """The parent passes the signals on and waits for the last of them."""
    server, server_port = serve("--workers", "2", "--drain", FOREVER)
    client = connect(server_port, "0:127.0.0.1:%d" % slow.port).ready()
    connections = [stack.enter_context(dial(tcp_port(client))) for _ in range(8)]
    for connection in connections:
        assert receive_exactly(connection, 5) == b"first"
    server.process.send_signal(TERM)
    server.wait_for(r"🛑 Ending")
    if second:
        # Each worker takes the two signals by itself. One may still be at the first: two that wait are one to the kernel, so it is sent again.
        while True:
            server.process.send_signal(TERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert server.process.wait(0.2) in (0, 143, -TERM)  # one more may come when main() has put the handlers back
                break
        assert_reset(*connections)
        slow.go_on.set()
    else:
        eventually(lambda: refused(server_port), "nobody listens any more")
        slow.go_on.set()
        assert [receive_all(connection) for connection in connections] == [b"last"] * 8
        stack.close()
        assert server.wait() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_worker_that_is_killed_is_named(serve):
    """All end with it, and the log says why."""
    server, _ = serve("--workers", "2")
    worker = int(subprocess.check_output(["pgrep", "-P", str(server.process.pid)]).split()[0])
    os.kill(worker, signal.SIGKILL)
    server.wait_for("❌ the worker with process id %d was killed by signal 9" % worker)
    assert server.wait() == 1
