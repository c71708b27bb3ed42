"""A SOCKS proxy at the client, spoken by hand over the real programs: replies, streams, associations.
What its parser takes and refuses is in unit/test_socks5.py, real users of it are in peers/test_socks.py."""

import concurrent.futures
import contextlib
import ipaddress
import os
import re
import signal
import socket
import struct
from typing import NamedTuple

import pytest

from support.kernel import sockets_of
from support.programs import PATIENCE, RATROD2, READY, Program, descriptors, either_wire, two_wires
from support.rows import row
from support.sockets import BLOCK, dial_udp, dial_unix, eventually, free_port, ping, port_of, receive_all, receive_exactly, reset, say
from support.socks5 import ASSOCIATE, BIND, CONNECT, GREETING, ask_socks, encode_address, greet, read_reply, request, socks_port
from support.targets import UdpEcho, UdpRemote, says

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = RATROD2
LOGIN = b"\5\1\2" + b"\1\5alice\6secret"
LOGGED_IN = b"\5\2" + b"\1\0"  # this method, and right
WITH_A_PASSWORD = "--socks-user", "alice:secret"


class Proxy(NamedTuple):
    """A running server and client of ours; `port` is where the client speaks SOCKS."""

    server: Program
    client: Program
    port: int

    def dial(self):
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def ask(self, asked):
        """(connection, code of the reply) after this request."""
        return ask_socks(self.port, asked)[:2]

    def open(self, port, host="127.0.0.1"):
        """A connection to a target, through all of it."""
        made, code = self.ask(request(host, port))
        assert code == 0
        return made

    def try_echo(self, port, host="127.0.0.1", question=b"anybody there?"):
        with self.open(port, host) as connection:
            say(connection, question)
            assert receive_all(connection) == question


@pytest.fixture
def proxy(forward):
    """proxy(mode, tunnel="0:socks", serve_flags=(), connect_flags=()) -> Proxy"""
    def launch(mode, tunnel="0:socks", **flags):
        server, client = forward(mode, tunnel, **flags)
        return Proxy(server, client, socks_port(client))
    return launch


def assert_ended(connection):
    """Nothing more comes. Whether that shows as an end or as a reset depends on what was unread."""
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b""


def test_several_proxies(forward, tcp_echo):
    """Each has a line that says so and a port of its own, beside a plain tunnel; the password counts for all of them."""
    _, client = forward(ANY, "0:127.0.0.1:%d" % tcp_echo.port, "[::1]:0:socks", "127.0.0.2:0:socks", connect_flags=WITH_A_PASSWORD)
    client.wait_for(r"📻 \[SOCKS\] Listening on `\[::1\]:\d+`, and routing through `127\.0\.0\.1:\d+` \.\.\.$")
    for n, host in ((1, "::1"), (2, "127.0.0.2")):
        for said, answer in ((GREETING, b"\5\xff"), (LOGIN, LOGGED_IN)):
            with row((host, said)), socket.create_connection((host, socks_port(client, n)), PATIENCE) as connection:
                connection.sendall(said + request("127.0.0.1", tcp_echo.port))
                assert receive_exactly(connection, len(answer)) == answer
                if said == LOGIN:
                    assert read_reply(connection)[0] == 0
    # UDP has its own sockets, one for each association: the plain tunnel's are the only ones that are announced.
    assert len(re.findall(r"\[(?:TCP|UDP)\] Listening", client.output)) == 2


def test_usable_from_the_first_moment(serve, connect, udp_echo, tcp_echo):
    """The line that says it listens is what a script waits for."""
    _, port = serve()
    client = connect(port, "0:socks")
    made = Proxy(None, client, socks_port(client))
    with associate(made) as asking:
        made.try_echo(tcp_echo.port)
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
    client.wait_for(READY)


def test_a_proxy_on_a_unix_socket(forward, tcp_echo, short):
    """Its user has no address that datagrams could come from: an association is refused, and connections go on."""
    _, client = forward(ANY, "unix:%s/socks:socks" % short)
    client.wait_for(r"\[SOCKS\] Listening on `unix:%s/socks`, and routing through `127\.0\.0\.1:\d+` \.\.\.$" % re.escape(str(short)))
    assert os.stat(short / "socks").st_mode & 0o777 == 0o600
    for command, codes in ((ASSOCIATE, (1, 7)), (CONNECT, (0,))):
        with dial_unix(short / "socks") as connection:
            connection.sendall(GREETING + request("127.0.0.1", tcp_echo.port, command))
            assert receive_exactly(connection, 2) == b"\5\0" and read_reply(connection)[0] in codes


def test_two_workers(proxy, tcp_echo, udp_echo):
    """And every way to write an address."""
    made = proxy(ANY, connect_flags=("--workers", "2"))
    for host in ("127.0.0.1", "localhost", "LOCALHOST", b"127.0.0.1", "localhost.", "::ffff:127.0.0.1") * 2:
        with row(host):
            made.try_echo(tcp_echo.port, host)
        with associate(made) as asking:
            assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"


@either_wire
def test_replies(mode, proxy, tcp_echo, closed):
    """Each says what went wrong; then the connection ends, and the next one works."""
    made = proxy(mode, serve_flags=("-r", r"(?!10\.).*"))
    for asked, expected in (
        (request("10.1.2.3", 80), 2),
        (request("127.0.0.1", closed), 5),
        (request("localhost", closed), 5),
        (request("nobody.invalid", 80), 4),
        (request("%s.invalid" % ("a" * 63), 80), 4),
        (request("127.0.0.1", tcp_echo.port, BIND), 7),
        (request("127.0.0.1", tcp_echo.port, 9), 7),
        (request("127.0.0.1", tcp_echo.port), 0),
    ):
        with row(asked):
            connection, code = made.ask(asked)
            with connection:
                assert code == expected
                if code:
                    assert_ended(connection)
    # The one that got a 0. The target may hear of it later than its client.
    eventually(lambda: tcp_echo.accepted == 1, "one connection arrived")
    made.client.wait_for("it asks for command 2, and here are only CONNECT")
    made.server.wait_for(r"refused.*10\.1\.2\.3:80")
    made.client.wait_for("not allowed by this server")
    # The reply arrives where more was said than it answers, too: unread data must not turn it into a reset.
    for _ in range(10):
        with greet(made.dial()) as connection:
            connection.sendall(request("127.0.0.1", closed) + b"GET / HTTP/1.0\r\n\r\n")
            assert read_reply(connection)[0] == 5
    # SOCKS4, and 4a where it is a name.
    for data, code in ((b"\4\1%b\x7f\0\0\1me\0", 90), (b"\4\1%b\0\0\0\1me\0localhost\0", 90), (b"\4\1\0\x50\x0a\1\2\3\0", 91),
                       (b"\4\1\0\x50\0\0\0\1\0nobody.invalid\0", 91), (b"\4\1\0\x50\0\0\0\1\0a\nb\0", 91), (b"\4\2%b\x7f\0\0\1\0", 91)):
        with row(data), made.dial() as connection:
            connection.sendall(data.replace(b"%b", struct.pack(">H", tcp_echo.port)) + b"hello")
            assert receive_exactly(connection, 8) == bytes([0, code]) + bytes(6)
            if code == 90:
                assert receive_exactly(connection, 5) == b"hello"
            else:
                assert_ended(connection)
    # A user of the proxy who leaves while the server connects.
    os.kill(made.server.process.pid, signal.SIGSTOP)
    try:
        for leave in (socket.socket.close, reset):
            with greet(made.dial()) as connection:
                connection.sendall(request("127.0.0.1", tcp_echo.port))
                leave(connection)
    finally:
        os.kill(made.server.process.pid, signal.SIGCONT)
    made.try_echo(tcp_echo.port)


def test_what_cannot_be_is_said_without_v(proxy, tcp_echo):
    """SOCKS has no words for it, and most programs show none. What left, or never spoke, is no failure."""
    made = proxy(ANY, connect_flags=WITH_A_PASSWORD)
    for data, answer, told in (
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + BLOCK, b"HTTP/1.1 400 Bad Request\r\n", "it speaks HTTP .*: name that as socks5h"),
        (b"CONNECT localhost:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n", "it speaks HTTP to a SOCKS proxy"),
        (b"\x16", b"", "it does not speak SOCKS, but TLS"),
        (b"\4\1\0\x50\x7f\0\0\1\0", b"\0\x5b" + bytes(6), "it speaks SOCKS4, which has no password"),
        (GREETING, b"\5\xff", "it gives no user and password, which --socks-user asks for"),
        (LOGIN[:-1] + b"?", b"\5\2\1\1", "it gives another user or password than --socks-user"),
        (LOGIN + request("127.1", 80), LOGGED_IN + b"\5\1\0\1" + bytes(6), "`127.1` is not an address"),
        (LOGIN + request(b"a\nb", 80), LOGGED_IN + b"\5\1\0\1" + bytes(6), "`a.b` is not a host name or address"),
        (LOGIN + request("db", 80, BIND), LOGGED_IN + b"\5\7\0\1" + bytes(6), "it asks for command 2"),
        (LOGIN + b"\5\1\0\x09", LOGGED_IN + b"\5\x08\0\1" + bytes(6), "its SOCKS5 request cannot be understood"),
    ):
        with row(data[:50]), made.dial() as connection:
            say(connection, data)
            assert receive_all(connection).startswith(answer)
            made.client.wait_for("❌ SOCKS client `127.0.0.1:%d`: .*%s" % (connection.getsockname()[1], told))
    for data in (b"", b"\5", LOGIN):
        with made.dial() as connection:
            connection.sendall(data)
    with made.dial() as connection:
        connection.sendall(LOGIN + request("127.0.0.1", tcp_echo.port) + b"!")
        assert receive_exactly(connection, 15)[-1:] == b"!"
    assert sum("SOCKS client" in line for line in made.client.lines) == 10, made.client.output


@two_wires
def test_all_at_once(mode, proxy, tcp_echo, target):
    """Greeting, password, request and data together, before any answer: none of it may be lost, or be taken for something else."""
    made, greeting = proxy(mode, connect_flags=WITH_A_PASSWORD), target(says(b"220 ready\r\n"))
    for size in (1, 1000, 70000, 3 << 20):
        data = (BLOCK * 4)[:size]
        with row(size), made.dial() as connection, concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(connection.sendall, LOGIN + request("localhost", tcp_echo.port) + data)
            assert receive_exactly(connection, 4) == LOGGED_IN and read_reply(connection)[0] == 0
            assert receive_exactly(connection, size) == data
            sent.result()
    # Where the target speaks first, its first bytes come right behind the reply, never before or inside it.
    for _ in range(10):
        with made.dial() as connection:
            connection.sendall(LOGIN + request("localhost", greeting.port))
            assert receive_exactly(connection, 4) == LOGGED_IN and read_reply(connection)[0] == 0
            assert receive_all(connection) == b"220 ready\r\n"


def test_users_of_the_proxy_that_vanish_in_the_handshake(proxy, tcp_echo):
    """At every byte, by an end and by a reset. Nothing is left of them, and nobody is disturbed. Nor do those that stay silent hold up anybody."""
    made = proxy(ANY, connect_flags=("-v", "--socks-user", "alice:secret"))
    whole = b"\5\2\0\2" + LOGIN[3:] + request("localhost", tcp_echo.port)
    def complete():
        """One byte at a time."""
        with made.dial() as connection:
            for byte in whole + b"!":
                connection.sendall(bytes([byte]))
            assert receive_exactly(connection, 4) == LOGGED_IN and read_reply(connection)[0] == 0
            assert receive_exactly(connection, 1) == b"!"
    complete()
    before = {program: descriptors(program) for program in (made.server, made.client)}
    for n in range(len(whole) + 1):
        for leave in (socket.socket.close, reset):
            connection = made.dial()
            connection.sendall(whole[:n])
            leave(connection)
    for _ in range(20):
        connection = made.dial()
        connection.sendall(LOGIN + request("127.0.0.1", 0, ASSOCIATE))
        reset(connection)
    # A few links may be kept; one descriptor in ten would be a leak.
    eventually(lambda: all(descriptors(program) <= count + 7 for program, count in before.items()), "the descriptors came back")
    with contextlib.ExitStack() as stack:
        for n in range(100):
            stack.enter_context(made.dial()).sendall(whole[:n % 4])
        complete()
    assert not re.search("secret|ERROR", made.client.output)


def test_times(proxy, tcp_echo, udp_echo):
    """Whoever says nothing more is closed at the handshake's time. What is through it may be silent; an association outlives its idle sessions."""
    made = proxy(ANY, serve_flags=("--udp-timeout", "0.3"), connect_flags=("--udp-timeout", "0.3", "--handshake-timeout", "2"))
    with made.open(tcp_echo.port) as through, associate(made) as asking, contextlib.ExitStack() as stack:
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
        assert udp_sockets(made.server) == 1
        waiting = {said: stack.enter_context(made.dial()) for said in (
            b"", b"\5", b"\5\2\0", GREETING, GREETING + b"\5\1\0", GREETING + request("localhost", 80)[:-1])}
        for said, connection in waiting.items():
            connection.sendall(said)
        for said, connection in waiting.items():
            assert receive_all(connection) == (b"\5\0" if said.startswith(GREETING) else b""), said
        # The time is for all of the handshake, not for each byte of it: this one trickles, and hears of the end meanwhile.
        trickling = stack.enter_context(greet(made.dial()))
        trickling.settimeout(0.05)
        slow = iter(request("x" * 255, 80))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for byte in slow:
                with contextlib.suppress(socket.timeout):
                    trickling.sendall(bytes([byte]))
                    if trickling.recv(1) == b"":
                        break
        assert len(list(slow)) > 150
        eventually(lambda: not udp_sockets(made.server), "the session was forgotten")
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello again") == b"hello again"
        ping(through, word=b"still here")


class Association(NamedTuple):
    """A UDP ASSOCIATE by hand: its TCP connection, where its datagrams go, and the socket they come from."""

    connection: socket.socket
    relay: tuple
    socket: socket.socket

    def send(self, host, port, data, frag=0):
        self.socket.send(b"\0\0" + bytes([frag]) + encode_address(host, port) + data)

    def receive(self):
        """(data, (host, port) of its source)"""
        datagram = self.socket.recv(65536)
        assert datagram[:3] == b"\0\0\0" and datagram[3] in (1, 3, 4), datagram[:20]
        start = {1: 4, 3: 5, 4: 4}[datagram[3]]
        end = start + {1: 4, 3: datagram[4], 4: 16}[datagram[3]]
        host = datagram[start:end].decode() if datagram[3] == 3 else str(ipaddress.ip_address(datagram[start:end]))
        return datagram[end + 2:], (host, struct.unpack(">H", datagram[end:end + 2])[0])

    def ask(self, host, port, question):
        self.send(host, port, question)
        answer, source = self.receive()
        assert source[1] == port
        return answer

    def is_over(self):
        """Nobody is there any more: the system refuses."""
        self.socket.settimeout(0.05)
        with pytest.raises((ConnectionRefusedError, socket.timeout)) as caught:
            self.socket.send(b"?")
            self.socket.recv(1)
        return caught.type is ConnectionRefusedError


@contextlib.contextmanager
def associate(made, host="127.0.0.1", claimed=("0.0.0.0", 0)):
    connection, code, (bound, port) = ask_socks(made.port, request(*claimed, ASSOCIATE), host)
    assert code == 0 and port
    # What is bound to every address is reached where the proxy is.
    relay = host if bound in ("0.0.0.0", "::") else bound, port
    with connection, dial_udp(port, relay[0]) as sock:  # what comes from elsewhere than where it was sent to does not count
        yield Association(connection, relay, sock)


@two_wires
def test_datagrams(mode, proxy, udp_echo, remote):
    """A datagram stays one, of every size (65497 is the largest under SOCKS' header) and to every kind of address; each answer says whose it is."""
    made = proxy(mode)
    with contextlib.closing(UdpEcho("::1")) as over_ipv6, associate(made) as asking:
        for size in (5, 0, 1, 512, 1200, 9000, 65497, 65496, 0):
            with row(size):
                asking.send("127.0.0.1", udp_echo.port, BLOCK[:size])
                assert asking.receive() == (BLOCK[:size], ("127.0.0.1", udp_echo.port))
        assert udp_echo.seen == 9
        for host, port in (("127.0.0.1", udp_echo.port), ("::1", over_ipv6.port), ("localhost", udp_echo.port)) * 2:
            with row((host, port)):
                asking.send(host, port, b"for %s" % host.encode())
                answer, source = asking.receive()
                assert answer == b"for %s" % host.encode()
                # An address, never the name that was asked; of a name the original's wire does not tell it.
                named = "127.0.0.1" if mode is RATROD2 else "0.0.0.0"
                assert source == (named if host == "localhost" else host, port)
        asking.send("127.0.0.1", remote.port, b"and another target, that answers three times")
        data, source = remote.receive()
        assert data == b"and another target, that answers three times"
        for n in range(3):
            remote.socket.sendto(b"%d" % n, source)
            assert asking.receive() == (b"%d" % n, ("127.0.0.1", remote.port))
        # The largest datagram of all has no room for the header of its answer: it is lost, and nothing else.
        for size in (65507, 65498, 65497, 3):
            remote.socket.sendto(BLOCK[:size], source)
        assert [asking.receive()[0] for _ in range(2)] == [BLOCK[:65497], BLOCK[:3]]


def test_one_outer_port_for_all_targets(proxy, remote, stack):
    """As a NAT has it, which STUN, consoles and P2P need. Only the targets are heard at it, each as itself."""
    made = proxy(ANY)
    others = [stack.enter_context(contextlib.closing(UdpRemote(host))) for host in ("127.0.0.1", "127.0.0.2", "::1", "::1")]
    stranger = stack.enter_context(contextlib.closing(UdpRemote()))
    asking, elsewhere = (stack.enter_context(associate(made)) for _ in range(2))
    targets = [(remote, "127.0.0.1"), (remote, "localhost"), *zip(others, ("127.0.0.1", "127.0.0.2", "::1", "::1"))]
    def sources(association):
        for n, (target, host) in enumerate(targets):
            association.send(host, target.port, b"%d" % n)
            data, source = target.receive()
            assert data == b"%d" % n
            yield source
    seen = list(sources(asking))
    assert len({source[:2] for source in seen}) == 2, "one port of each family"
    assert not {source[:2] for source in seen} & {source[:2] for source in sources(elsewhere)}
    stranger.socket.sendto(b"forged", seen[0])
    for (target, host), source in reversed(list(zip(targets, seen))):
        target.socket.sendto(b"news", source)
        # Two of the targets are one address.
        assert asking.receive() == (b"news", ("127.0.0.1" if host == "localhost" else host, target.port))
    if os.path.exists("/proc/net/udp"):
        assert udp_sockets(made.server) == 2, "a socket for each association"
        asking.connection.close()
        eventually(lambda: udp_sockets(made.server) == 1, "it is closed with its last session")


def test_broadcast_and_multicast_targets(proxy, namespace):
    targets = "224.0.0.251", "255.255.255.255", "ff02::fb", "0.0.0.0", re.sub(r"\d+$", lambda last: str(int(last.group()) | 3), namespace.address)
    made = proxy(ANY)
    with associate(made) as asking:
        for host in targets:
            asking.send(host, 5353, b"?")
            made.client.wait_for(r"udp \[?%s\]?:5353`: .*(not allowed by this server|it is a broadcast address)" % re.escape(host))


@either_wire
def test_targets_that_fail_disturb_no_other(mode, proxy, udp_echo, remote):
    """Not allowed, without an address, nobody there: UDP has no way to say so, but the log has."""
    nobody = free_port()
    made = proxy(mode, serve_flags=("-r", r"(?!.*:%d$).*:.*" % remote.port))
    with associate(made) as asking:
        for turn in range(3):
            for host, port in (("127.0.0.1", remote.port), ("nobody.invalid", 53), ("127.0.0.1", nobody)):
                asking.send(host, port, b"?")
                assert asking.ask("127.0.0.1", udp_echo.port, b"%d" % turn) == b"%d" % turn
    made.server.wait_for("refused.*127.0.0.1:%d" % remote.port)
    made.client.wait_for("not allowed by this server")
    remote.socket.setblocking(False)
    pytest.raises(BlockingIOError, remote.receive)


def test_datagrams_that_must_not_pass(proxy, udp_echo, remote):
    made = proxy(ANY, connect_flags=("-v",))  # no line is left out
    with associate(made) as asking, associate(made) as noisy, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        # A piece of a datagram must not pass for the whole. The table of all that is no datagram is in unit/test_socks5.py.
        for frag in (1, 128, 255):
            asking.send("127.0.0.1", remote.port, b"a piece", frag)
        for datagram in (b"", b"\0\0\0\3\xffabc", b"\xff" * 1000, b"\0\0\0\3\x0funix:/tmp/x.sock\0\x50data", b"\0\0\0\1\x7f\0\0\1\0\0port zero"):
            asking.socket.send(datagram)
        made.client.wait_for(r"SOCKS client `127.0.0.1:\d+`, a datagram: not a whole SOCKS5 datagram")
        asking.send("127.0.0.1", remote.port, b"the whole")
        assert remote.receive()[0] == b"the whole"
        # Those from another address: else everybody who reaches the port would use the tunnel; with a password even more so.
        stranger.bind(("127.0.0.2", 0))
        stranger.setblocking(False)
        for data in (b"before", b"after"):
            stranger.sendto(b"\0\0\0" + encode_address("127.0.0.1", remote.port) + b"forged", asking.relay)
            asking.send("127.0.0.1", remote.port, data)
            received, source = remote.receive()
            assert received == data
            remote.socket.sendto(data, source)
            assert asking.receive()[0] == data
        pytest.raises(BlockingIOError, stranger.recv, 100)
        # And from another program of its own machine, which has not given the password.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbour:
            neighbour.sendto(b"\0\0\0" + encode_address("127.0.0.1", remote.port) + b"forged", asking.relay)
            asking.send("127.0.0.1", remote.port, b"the only one")
            assert remote.receive()[0] == b"the only one"
        made.client.wait_for("SOCKS client `127.0.0.2:.*`, a datagram: it comes from another program")
        # What is sent on the connection of an association is not for anybody; it may end the association, and must do no more than that.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            noisy.connection.sendall(BLOCK)
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"


@either_wire
def test_an_association_ends_with_its_connection(mode, proxy, udp_echo, remote):
    made = proxy(mode)
    with associate(made) as first:
        assert first.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
        before = {program: descriptors(program) for program in (made.server, made.client)}
        for leave in (socket.socket.close, reset):
            with associate(made) as asking:
                assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
                asking.send("127.0.0.1", remote.port, b"hello")
                source = remote.receive()[1]
                leave(asking.connection)
                eventually(asking.is_over, "the association ended")
                # Nor has it left anything at either end. In legacy each session has a link of its own, of which a few may be kept.
                eventually(lambda: all(descriptors(program) <= count + 3 for program, count in before.items()), "its sockets are closed")
                # What is still under way to it goes nowhere, in particular not to another one.
                remote.socket.sendto(b"late", source)
            assert first.ask("127.0.0.1", udp_echo.port, b"still here") == b"still here"


def udp_sockets(program):
    """How many UDP sockets over IPv4 the program has."""
    if not os.path.exists("/proc/net/udp"):
        pytest.skip("no /proc on this system")
    held = sockets_of(program)
    with open("/proc/net/udp") as table:
        return sum(line.split()[9] in held for line in table)


@two_wires
def test_a_server_that_is_gone_and_comes_back(mode, proxy, serve, udp_echo, tcp_echo):
    """An association outlives it. How long a connection waits for it is in test_reconnect.py."""
    made = proxy(mode, connect_flags=("--connect-timeout", "0.3"))
    where = re.search(r"routing through `(.+?)`", made.client.output).group(1)
    with associate(made) as asking:
        asking.socket.settimeout(0.2)
        def answered():
            with contextlib.suppress(socket.timeout):
                return asking.ask("127.0.0.1", udp_echo.port, b"are you there?") == b"are you there?"
        eventually(answered, "an answer")  # on a busy machine a link may take longer than a datagram waits for it
        made.server.stop(signal.SIGKILL)
        asking.send("127.0.0.1", udp_echo.port, b"into the void")
        connection, code = made.ask(request("127.0.0.1", tcp_echo.port))
        with connection:
            assert code == 1
            assert_ended(connection)
        serve(*mode.serve, bind=where)
        eventually(answered, "an answer after the server's return")
    def works():
        connection, code = made.ask(request("127.0.0.1", tcp_echo.port))
        connection.close()
        return code == 0
    eventually(works, "a connection")


def test_datagrams_go_where_the_connection_went(forward, udp_echo):
    """Answers come from there, too. The connection is the only hint to which of the machine's addresses the user can reach."""
    tunnels = {"[::1]": ["::1"], "127.0.0.3": ["127.0.0.3"], "0.0.0.0": ["127.0.0.1", "127.0.0.3"], "[::]": ["::1", "127.0.0.1"]}
    _, client = forward(ANY, *("%s:0:socks" % bound for bound in tunnels))
    for n, (bound, hosts) in enumerate(tunnels.items(), 1):
        for host in hosts:
            with row((bound, host)), associate(Proxy(None, client, socks_port(client, n)), host) as asking:
                assert asking.relay[0] == host
                assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
    # RFC 1928: a user of the proxy may say where its datagrams will come from; then no others are heard, who may be first.
    made = Proxy(None, client, socks_port(client, 3))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.bind(("127.0.0.1", 0))
        ours.settimeout(PATIENCE)
        for claimed in (ours.getsockname(), ("0.0.0.0", port_of(ours)), ("::ffff:127.0.0.1", port_of(ours))):
            with row(claimed), associate(made, claimed=claimed) as association:
                for word in (b"hello", b"again"):
                    before = udp_echo.seen
                    association.send("127.0.0.1", udp_echo.port, b"not ours")
                    ours.sendto(b"\0\0\0" + encode_address("127.0.0.1", udp_echo.port) + word, association.relay)
                    assert ours.recv(100).endswith(word) and udp_echo.seen == before + 1
    with made.ask(request("192.0.2.1", 5000, ASSOCIATE))[0] as connection:
        assert_ended(connection)
