"""What one key, an outsider or a stranger does to the others, with real programs. As many as the README's figures are of: RATROD_LONG=1 with -s."""

import contextlib
import os
import pathlib
import re
import socket
import statistics
import sys
import time

import pytest

from support import attacker
from support.pressure import LONG, figure, megabytes, memory_before, peak_growth
from support.programs import RATROD, RATROD2, READY, STARTED, bound, descriptors, tcp_port
from support.rows import row
from support.sockets import dial, eventually, outcome_of, ping

pytestmark = [pytest.mark.usefixtures("no_traceback"),
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="epoll, all of 127.0.0.0/8, /proc")]
MANY = ("--max-links", "12000", "--max-links-per-key", "6000", "--handshake-timeout", "60")
LINKS = 2000 if LONG else 30


@pytest.fixture
def attack(start, second):
    """attack(port, kind, links, argument) -> Program: the second key's, once its links are there."""
    def launch(port, kind, links=LINKS, argument=""):
        program = start(sys.executable, attacker.__file__, port, second.path, kind, links, argument)
        program.wait_for("all links", patience=600)
        return program
    return launch


@contextlib.contextmanager
def group_of(limit):
    """The words that start a program in a control group with so much memory; none where this machine has no such groups."""
    folder = pathlib.Path("/sys/fs/cgroup/memory/ratrod-%d" % os.getpid())
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield ()
        return
    try:
        yield "sh", "-c", 'echo $$ > %s/cgroup.procs && exec "$@"' % folder, "sh"
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text(), "the program has ended")
        folder.rmdir()


def round_trips(sock, n):
    """Seconds that each took."""
    took = []
    for _ in range(n):
        began = time.monotonic()
        ping(sock)
        took.append(time.monotonic() - began)
        time.sleep(0.01)  # between them, so that each begins at some moment of the server's round
    return took


@pytest.mark.timeout(1800 if LONG else 120)
def test_another_key_beside_one_that_does_all_it_can(serve, client, keys, tcp_echo, attack, stack):
    """Turns go by key: thousands of links of one key are one key. Before, 2,000 that made UDP sessions cost another key 30 s a round trip."""
    _, port = serve(*MANY)
    remote = "127.0.0.1:%d" % tcp_echo.port
    honest = client(port, "0:" + remote).ready()
    for kind in ("sessions", "unknown", "tiny", *["opens", "acks", "keepalives", "abandons", "attaches", "bulk"] * LONG):
        with row(kind):
            sock = stack.enter_context(dial(tcp_port(honest)))
            program = attack(port, kind, argument="" if kind in ("sessions", "unknown") else remote)
            took = round_trips(sock, 300 if LONG else 10)
            figure("%d links of another key, %s: a round trip, median and longest" % (LINKS, kind),
                   "%.0f and %.0f ms" % (1000 * statistics.median(took), 1000 * max(took)))
            if LONG:
                client(port).wait_for(READY)
                assert statistics.median(took) < 0.05
            program.stop()


@contextlib.contextmanager
def short_of_memory(start, client, keys, tcp_echo, most, *flags):
    """(server, its port, what it takes now, an honest client's connection): a server that keeps at most so many bytes."""
    with group_of(1 << 30) as words, contextlib.ExitStack() as stack:
        server = start(*words, *RATROD, "-k", keys.server.path, "serve", *MANY, *flags, "--max-memory", most, "--drain", "0", "127.0.0.1:0")
        stack.callback(server.stop)
        port = int(server.wait_for(STARTED).group(1))
        honest = client(port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
        sock = stack.enter_context(dial(tcp_port(honest)))
        ping(sock)
        yield server, port, memory_before(server), sock


@pytest.mark.timeout(600 if LONG else 60)
@pytest.mark.parametrize("half", [64 << 10, 5] if LONG else [64 << 10])
def test_half_records_without_end(start, client, keys, tcp_echo, attack, half):
    """Memory has a bound: one key's halves of records take half of it at most, besides what a link needs for the beginning of one."""
    most, links = ((128 << 20), 5000) if LONG else ((4 << 20), 200)
    with short_of_memory(start, client, keys, tcp_echo, most) as (server, port, before, sock):
        attack(port, "half_record", links, half - 4)
        took = round_trips(sock, 300 if LONG else 50)
        grown = peak_growth(server, before)
        figure("%d links that hold %d bytes of a record: the server grew by" % (links, half), megabytes(grown))
        figure("%d links that hold %d bytes of a record: another key's round trip, longest" % (links, half), "%.0f ms" % (1000 * max(took)))
        # Half of the bound, and for each link itself and the beginning of its record 16 KiB.
        assert grown < most // 2 + links * (16 << 10)
        assert not LONG or max(took) < 0.1


def test_records_that_no_target_takes(start, client, keys, tcp_echo, attack, short):
    """What targets leave unread is a part of the same bound: before, it was up to 512 KiB for each stream beside it."""
    most, links, path = *((32 << 20, 1000) if LONG else (4 << 20, 200)), str(short / "silent.sock")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as silent, short_of_memory(
            start, client, keys, tcp_echo, most, "-r", "unix:.*", "-r", ".*") as (server, port, before, sock):
        silent.bind(path)
        silent.listen(4096)  # its queue takes 200 kB of each
        attack(port, "bulk", links, "unix:" + path)
        grown = -1
        while grown < peak_growth(server, before):
            grown = peak_growth(server, before)
            round_trips(sock, 100)
        figure("%d links with records that no target takes: the server grew by" % links, megabytes(grown))
        assert grown < most // 2 + links * (64 << 10)


def test_a_key_that_is_taken_out_while_it_keeps_the_server_busy(serve, keys, second, attack):
    """Its end comes before its own events. 1,500 links took 28.8 s."""
    server, port = serve(*MANY)
    links = 1500 if LONG else 40
    attack(port, "sessions", links)
    eventually(lambda: descriptors(server) > 2 * links, "each link has sessions")
    keys.server.write("authorized_keys", keys.client.public + "\n")
    began = time.monotonic()
    server.wait_for("`%s` is not in authorized_keys any more: [0-9]+ links of it ended" % re.escape(second.public))  # the last one may not be in yet
    eventually(lambda: descriptors(server) < links, "all have ended")
    took = time.monotonic() - began
    figure("a busy key of %d links that is taken out: the last one was gone after" % links, "%.1f s" % took)
    assert not LONG or took < 2


def test_idle_visitors_of_a_reverse_tunnel_take_a_part_of_one_keys_streams(serve, client, second, tcp_echo, stack):
    """One listener has a quarter of its key's share, one visitor a quarter of that: others, its own key among them, go on."""
    server, port = serve("--allow-listen", "--max-streams-per-key", "256")
    owner = client(port, "R:127.0.0.1:0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    reverse = bound(owner)
    def visits(source, n):
        """How many of n connections are carried."""
        carried = 0
        for _ in range(n):
            with contextlib.suppress(OSError):
                ping(stack.enter_context(dial(reverse, source=source)))
                carried += 1
        return carried
    assert [visits("127.0.9.%d" % n, 17 if n == 1 else 16) for n in range(1, 6)] == [16, 16, 16, 16, 0]
    server.wait_for("carries as many connections of one visitor to it as it takes \\(16\\)")
    server.wait_for("carries as many connections of one reverse tunnel as it takes \\(64\\)")
    assert outcome_of(tcp_port(owner)) == "answered"
    stack.close()
    eventually(lambda: outcome_of(reverse) == "answered", "the places of those that left")


def lines_within(server, began):
    """Whether the log has no more lines than a key may cause."""
    return len(server.lines) <= 250 + 10 * (time.monotonic() - began)


def test_a_key_that_listens_and_leaves_in_a_loop_fills_no_log(serve, attack):
    began = time.monotonic()
    server, port = serve("--allow-listen")
    attack(port, "listens", 1)
    server.wait_for(r"\d+ more events with the key")
    assert lines_within(server, began), server.output


def test_outsiders_at_a_reverse_port_whose_target_is_down_fill_no_log(forward, closed):
    began = time.monotonic()
    server, owner = forward(RATROD2, "R:127.0.0.1:0:127.0.0.1:%d" % closed, serve_flags=("--allow-listen",))
    reverse = bound(owner)
    def more():
        for _ in range(20):
            outcome_of(reverse)
        return all(re.search(r"\d+ more failures", program.output) for program in (server, owner))
    eventually(more, "both have counted what they did not say")
    for program in (server, owner):
        assert lines_within(program, began), program.output
