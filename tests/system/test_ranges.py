"""Ranges of ports: one TUNNEL word for many tunnels, all of them or none."""

import contextlib
import re
import selectors
import socket
import threading

import pytest

from support.many_lines import assert_no_tunnels
from support.programs import MODES, PATIENCE, descriptors, every_mode
from support.sockets import free_port, receive_all

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = MODES[0]
LINE = r"\[%s\] Listening on `(.+?)`, and routing through `.+?` to `(.+?)` \.\.\."


def bind(kind, port, host="127.0.0.1"):
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        if kind == socket.SOCK_STREAM:
            made.listen(100)
        made.settimeout(PATIENCE)
        return made
    except OSError:
        made.close()
        raise


@contextlib.contextmanager
def held(ports, kinds=(socket.SOCK_STREAM, socket.SOCK_DGRAM), hosts=("127.0.0.1", "::1")):
    """All of these ports, bound by the test: {(kind, port): socket}, the last host's."""
    with contextlib.ExitStack() as stack:
        yield {(kind, port): stack.enter_context(bind(kind, port, host)) for host in reversed(hosts) for kind in kinds for port in ports}


class Services:
    """A TCP and a UDP service on each of these ports, which tell their own number to whoever asks."""

    def __init__(self, stack, ports):
        self._selector = selectors.DefaultSelector()
        sockets = stack.enter_context(held(ports, hosts=("127.0.0.1",)))
        for (kind, port), sock in sockets.items():
            self._selector.register(sock, selectors.EVENT_READ, (kind, b"%d" % port))
        ours, self._end = socket.socketpair()
        stack.callback(self._stop)
        self._selector.register(ours, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    key.fileobj.close()
                    return
                kind, number = key.data
                if kind == socket.SOCK_STREAM:
                    with key.fileobj.accept()[0] as connection:
                        connection.sendall(number)
                else:
                    key.fileobj.sendto(number, key.fileobj.recvfrom(100)[1])

    def _stop(self):
        self._end.close()
        self._thread.join(PATIENCE)
        self._selector.close()


@pytest.fixture
def services():
    """services(n) -> the first of n ports in a row, each with its Services."""
    with contextlib.ExitStack() as stack:
        def launch(n):
            first = free_port(n)
            Services(stack, range(first, first + n))
            return first
        yield launch


@pytest.fixture
def connect(serve, ratrod, keys):
    """connect(TUNNEL...) -> our client, not yet awaited, its server running."""
    def launch(*tunnels):
        return ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % serve()[1], *tunnels)
    return launch


def answer(kind, port, host="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as asking:
        asking.settimeout(PATIENCE)
        asking.connect((host, port))
        if kind == socket.SOCK_STREAM:
            return receive_all(asking)
        asking.send(b"?")
        return asking.recv(100)


# ---------------------------------------------------------------------------------------------------- they work


@every_mode
def test_every_port_reaches_its_own(mode, forward, services):
    """TCP and UDP, the first, the last and those in between."""
    remote, local = services(5), free_port(5)
    _, client = forward(mode, "%d-%d:127.0.0.1:%d-%d" % (local, local + 4, remote, remote + 4))
    client.wait_for(LINE % "TCP", 5)
    for n in range(5):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert answer(kind, local + n) == b"%d" % (remote + n)


@pytest.mark.parametrize("form, local, remote", [
    ("{L}-{L2}:db:9000-9002", "127.0.0.1:%d", "db:%d"),
    ("{L}-{L2}:9000-9002", "127.0.0.1:%d", "127.0.0.1:%d"),
    ("127.0.0.2:{L}-{L2}:db:9000-9002", "127.0.0.2:%d", "db:%d"),
    ("[::1]:{L}-{L2}:[2001:db8::1]:9000-9002", "[::1]:%d", "[2001:db8::1]:%d"),
])
def test_forms(form, local, remote, connect):
    """As without ranges; each tunnel has its own line."""
    first = free_port(3)
    client = connect(form.format(L=first, L2=first + 2))
    expected = [(local % (first + n), remote % (9000 + n)) for n in range(3)]
    for kind in ("TCP", "UDP"):
        client.wait_for(LINE % kind, 3)
        assert [re.search(LINE % kind, line).groups() for line in client.lines if "[%s]" % kind in line] == expected


def test_the_shortest_form_has_the_same_ports_at_both_ends(connect):
    first = free_port(3)
    client = connect("%d-%d" % (first, first + 2))
    client.wait_for(LINE % "TCP", 3)
    assert [re.search(LINE % "TCP", line).groups() for line in client.lines if "[TCP]" in line] == \
        [("127.0.0.1:%d" % (first + n),) * 2 for n in range(3)]


def test_a_range_of_one_and_a_single_port_beside_it(connect):
    first = free_port(1)
    client = connect("%d-%d:db:80-80" % (first, first), "0:db:81")
    client.wait_for(LINE % "TCP", 2)
    assert [re.search(LINE % "TCP", line).group(2) for line in client.lines if "[TCP]" in line] == ["db:80", "db:81"]


def test_a_thousand_ports(connect, services):
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 8192:
        pytest.skip("too few descriptors are allowed here")
    remote, local = services(1000), free_port(1000)
    client = connect("%d-%d:127.0.0.1:%d-%d" % (local, local + 999, remote, remote + 999))
    client.wait_for(LINE % "UDP", 1000)
    assert descriptors(client) >= 2000
    for n in (0, 1, 500, 998, 999):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert answer(kind, local + n) == b"%d" % (remote + n)
    assert client.stop() == 0


def test_two_workers(forward, services):
    remote, local = services(3), free_port(3)
    _, client = forward(ANY, "%d-%d:127.0.0.1:%d-%d" % (local, local + 2, remote, remote + 2), connect_flags=("--workers", "2"))
    client.wait_for(LINE % "TCP", 3)
    for _ in range(5):
        for n in range(3):
            assert answer(socket.SOCK_STREAM, local + n) == b"%d" % (remote + n)


# ---------------------------------------------------------------------------------------------------- or fail as a whole


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("which", [0, 2, 4])
def test_one_busy_port(kind, which, connect):
    """Half a range would be found out much later, by whoever uses the other half."""
    first = free_port(5)
    with bind(kind, first + which):
        client = connect("%d-%d:db:9000-9004" % (first, first + 4))
        assert client.wait() == 1, client.output
        line = client.wait_for("ERROR.*(?i:in use)").string
        assert [n for n in range(first, first + 5) if "127.0.0.1:%d" % n in line] == [first + which], line
        with held([first + n for n in range(5) if n != which]):
            pass


def test_ranges_that_overlap(connect):
    first = free_port(4)
    client = connect("%d-%d:db:9000-9002" % (first, first + 2), "%d-%d:db:9002-9003" % (first + 2, first + 3))
    assert client.wait() == 1, client.output
    client.wait_for(r"ERROR.*127\.0\.0\.1:%d\b" % (first + 2))


NONE = [
    "8000-8001:db:8000-8002", "8000-8002:db:8000-8001", "8000-8002:db:80", "8000:db:80-82", "0:db:80-82", "80-82:90", "80:90-92",
    "8002-8000:db:9002-9000", "8000-8002:db:9002-9000", "8002-8000:db:9000-9002", "8002-8000", "8002-8000:9002-9000",
    "8000-9000:db:8000-9000", "1-65535", "1000-2000",
    "0-2:db:80-82", "0-2", "8000-8002:db:0-2", "65534-65536:db:80-82", "80-82:db:65534-65536", "65534-65536", "65536-65538",
    "8000-:db:8000-", "8000-", "8000-8002-8004:db:8000-8002-8004", "8000--8002", "8000-8002-", "a-c:db:a-c", "a-c", "8000-8002:db:a-c", "8000-800x",
    "08000-08002", "8000-+8002", "8000- 8002", "8000 -8002", "8000_1-8000_3", "8000–8002", "٨٠-٨٢", "8000:8002:db:80-82:1",
    "80-82:db:", "80-82::90-92", "80-82:db:90-92:1", ":80-82:db:90-92",
    "8000-8002:socks", "8000-8002:unix:/a", "unix:/a:db:80-82", "stdio:db:80-82",
]


def test_ranges_that_are_none(keys):
    assert_no_tunnels(keys, NONE, ":")
