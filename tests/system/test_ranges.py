"""Ranges of ports: one TUNNEL word for many tunnels, all of them or none. How they are written is in tests/unit/test_usage.py."""

import contextlib
import itertools
import re
import socket

import pytest

from support.many_lines import run_lines
from support.programs import LEGACY, PATIENCE, RATROD2, descriptors
from support.sockets import free_port, receive_all
from support.targets import Target, UdpEcho, says

pytestmark = pytest.mark.usefixtures("no_traceback")

LINE = r"\[%s\] Listening on `(.+?)`, and routing through `.+?` to `(.+?)` \.\.\."
KINDS = socket.SOCK_STREAM, socket.SOCK_DGRAM


def bind(stack, kind, port, host="127.0.0.1"):
    made = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
    if kind == socket.SOCK_STREAM:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
    if kind == socket.SOCK_STREAM:
        made.listen(100)


@pytest.fixture
def services(stack):
    """services(n, which) -> the first of n ports in a row: those at `which` have a TCP and a UDP service that tell their own number."""
    def launch(n, which):
        first = free_port(n)
        for port in (first + each for each in which):
            for made in (Target(says(b"%d" % port), port=port), UdpEcho(port=port, says=b"%d" % port)):
                stack.enter_context(contextlib.closing(made))
        return first
    return launch


def answer(kind, port, host="127.0.0.1"):
    with socket.socket(socket.AF_INET, kind) as asking:
        asking.settimeout(PATIENCE)
        asking.connect((host, port))
        if kind == socket.SOCK_STREAM:
            return receive_all(asking)
        asking.send(b"?")
        return asking.recv(100)


@pytest.mark.parametrize("mode, flags", [(RATROD2, ("--workers", "2")), (LEGACY, ())], ids=["two workers", "legacy"])
def test_every_port_reaches_its_own(mode, flags, forward, services):
    """TCP and UDP, the first, the last and those in between; each tunnel has its own line, and a single port stands beside them."""
    remote, local = services(5, range(5)), free_port(5)
    _, client = forward(mode, "%d-%d:127.0.0.1:%d-%d" % (local, local + 4, remote, remote + 4), "0:db:81", connect_flags=flags)
    for kind in ("TCP", "UDP"):
        client.wait_for(LINE % kind, 6)
        lines = [re.search(LINE % kind, line).groups() for line in client.lines if "[%s]" % kind in line]
        assert lines[:5] == [("127.0.0.1:%d" % (local + n), "127.0.0.1:%d" % (remote + n)) for n in range(5)] and lines[5][1] == "db:81"
    for _ in range(3 if flags else 1):  # whichever worker takes it
        for n in range(5):
            for kind in KINDS:
                assert answer(kind, local + n) == b"%d" % (remote + n)


def test_a_thousand_ports(serve, client, services):
    """As many as a range may have."""
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 8192:
        pytest.skip("too few descriptors are allowed here")
    asked = (0, 1, 500, 998, 999)
    first = services(1000, asked)
    client = client(serve()[1], "127.0.0.2:%d-%d:127.0.0.1:%d-%d" % (first, first + 999, first, first + 999)).ready()
    assert client.output.count("[UDP] Listening") == 1000
    assert descriptors(client) >= 2000
    for n in asked:
        for kind in KINDS:
            assert answer(kind, first + n, "127.0.0.2") == b"%d" % (first + n)
    assert client.stop() == 0


def test_one_busy_port(keys, stack):
    """Half a range would be found out much later, by whoever uses the other half."""
    first = free_port(33)
    rows = [(kind, which, first + 5 * n) for n, (kind, which) in enumerate(itertools.product(KINDS, (0, 2, 4)))]
    for kind, which, port in rows:
        bind(stack, kind, port + which)
    lines = [["%d-%d:db:9000-9004" % (port, port + 4)] for _, _, port in rows]
    # Two ranges that overlap are each other's.
    lines.append(["%d-%d:db:9000-9001" % (first + 30, first + 31), "%d-%d:db:9001-9002" % (first + 31, first + 32)])
    outcomes = run_lines([["-k", keys.client.path, "connect", "127.0.0.1:9", *line] for line in lines])
    for line, done, busy in zip(lines, outcomes, [port + which for _, which, port in rows] + [first + 31]):
        assert done.code == 1 and re.search("ERROR.*(?i:in use)", done.err), (line, done)
        assert re.findall(r"127\.0\.0\.1:(?!9\b)(\d+)", done.err.splitlines()[-1]) == [str(busy)], (line, done)
    for _, which, port in rows:
        for n, kind, host in itertools.product(set(range(5)) - {which}, KINDS, ("127.0.0.1", "::1")):
            bind(stack, kind, port + n, host)
