"""UDP from end to end: an originator, a real `connect`, a real `serve`, a target."""

import contextlib
import os
import re
import signal
import socket
import time
from typing import NamedTuple

import pytest

from support.programs import MODES, PATIENCE, descriptors, every_mode, tcp_port, udp_port
from support.sockets import eventually, free_port
from support.targets import UdpEcho

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = MODES[0]
NOISE = os.urandom(65507)


@pytest.fixture
def originator():
    """originator(port, host="127.0.0.1") -> a socket of its own, connected: answers from elsewhere do not reach it."""
    with contextlib.ExitStack() as stack:
        def launch(port, host="127.0.0.1"):
            made = stack.enter_context(loose_socket(":" in host))
            made.connect((host, port))
            return made
        yield launch


def loose_socket(ipv6=False):
    made = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(PATIENCE)
    return made


def ask(connected, question=b"anybody there?"):
    connected.send(question)
    assert connected.recv(65536) == question


def ask_until_answered(connected, question):
    """For where UDP may lose: sends again until an answer comes, then waits for the rest of the answers to pass."""
    def answered():
        connected.send(question)
        with contextlib.suppress(socket.timeout, ConnectionRefusedError):
            return connected.recv(65536) == question
    connected.settimeout(0.2)
    eventually(answered, "an answer to %r" % question)
    connected.settimeout(PATIENCE)


class Remote(NamedTuple):
    """A target in the hands of the test."""

    socket: socket.socket

    @property
    def port(self):
        return self.socket.getsockname()[1]

    def receive(self):
        return self.socket.recvfrom(65536)


@pytest.fixture
def remote():
    with loose_socket() as made:
        made.bind(("127.0.0.1", 0))
        yield Remote(made)


# ---------------------------------------------------------------------------------------------------- datagrams


@every_mode
def test_every_size(mode, tunnel, udp_echo, originator):
    """A datagram stays one datagram: the empty one counts too, and the largest that IPv4 has fits."""
    asking = originator(udp_port(tunnel(udp_echo.port, mode).client))
    for size in (14, 0, 1, 512, 0, 1200, 9000, 65507, 65506, 0):
        ask(asking, NOISE[:size])
    assert udp_echo.seen == 10


@every_mode
@pytest.mark.parametrize("size", [0, 512, 65507])
def test_first_datagram_is_not_lost(mode, size, tunnel, udp_echo, originator):
    """It comes before there is a session, and in legacy before there is a link."""
    ask(originator(udp_port(tunnel(udp_echo.port, mode).client)), NOISE[:size])


def waiting_bytes(port):
    """What a UDP socket on this port of 127.0.0.1 has yet to read (/proc/net/udp: address, tx_queue:rx_queue)."""
    if not os.path.exists("/proc/net/udp"):
        pytest.skip("no /proc on this system")
    for _ in range(100):  # while other sockets come and go the table may leave one out
        with open("/proc/net/udp") as table:
            found = [row[4] for row in map(str.split, table) if row[1] == "0100007F:%04X" % port]
        if found:
            return int(found[0].partition(":")[2], 16)
    return pytest.fail("nobody listens on port %d" % port)


@every_mode
def test_datagrams_wait_for_a_server_that_is_slow_to_answer(mode, tunnel, udp_echo, originator):
    made = tunnel(udp_echo.port, mode)
    asking = originator(udp_port(made.client))
    questions = [b"question %d" % n for n in range(10)]
    os.kill(made.server.process.pid, signal.SIGSTOP)
    try:
        for question in questions:
            asking.send(question)
        eventually(lambda: not waiting_bytes(udp_port(made.client)), "the client read them")
    finally:
        os.kill(made.server.process.pid, signal.SIGCONT)
    assert [asking.recv(65536) for _ in questions] == questions


@every_mode
def test_a_burst_is_answered_whole_and_in_order(mode, tunnel, udp_echo, originator):
    """16 under way at any time, so that datagrams wait together everywhere on the way."""
    asking = originator(udp_port(tunnel(udp_echo.port, mode).client))
    questions = [b"%03d " % n + NOISE[:n * 7] for n in range(200)]
    answers = []
    for n, question in enumerate(questions):
        asking.send(question)
        if n >= 15:
            answers.append(asking.recv(65536))
    answers += [asking.recv(65536) for _ in range(15)]
    assert answers == questions


@every_mode
def test_every_originator_gets_its_own_answers(mode, tunnel, udp_echo, originator):
    port = udp_port(tunnel(udp_echo.port, mode).client)
    asking = [originator(port) for _ in range(20)]
    for turn in range(5):
        for n, one in enumerate(asking):
            one.send(b"%d of %d" % (turn, n))
        for n, one in enumerate(asking):
            assert one.recv(65536) == b"%d of %d" % (turn, n)


@every_mode
def test_target_sees_one_address_for_an_originator(mode, tunnel, remote, originator):
    """It is how a target tells its peers apart; and it may answer late, often, or not at all."""
    port = udp_port(tunnel(remote.port, mode).client)
    first, second = originator(port), originator(port)
    sources = []
    for asking in (first, second, first, second):
        asking.send(b"?")
        sources.append(remote.receive()[1])
    assert sources[0] == sources[2] != sources[1] == sources[3]
    for n in range(5):
        remote.socket.sendto(b"news %d" % n, sources[0])
    remote.socket.sendto(b"for the second", sources[1])
    assert [first.recv(65536) for _ in range(5)] == [b"news %d" % n for n in range(5)]
    assert second.recv(65536) == b"for the second"


@every_mode
def test_stranger_gets_nothing_through(mode, tunnel, remote, originator):
    """Whoever finds the server's port of a session is not its target."""
    asking = originator(udp_port(tunnel(remote.port, mode).client))
    asking.send(b"?")
    source = remote.receive()[1]
    with loose_socket() as stranger:
        stranger.sendto(b"forged", source)
    remote.socket.sendto(b"genuine", source)
    assert asking.recv(65536) == b"genuine"


def test_udp_and_tcp_of_one_tunnel_share_a_number(forward):
    """One service on both, as DNS is: also where port 0 chose the number."""
    _, client = forward(ANY, "0:53", "[::1]:0:127.0.0.1:53", "0.0.0.0:0:127.0.0.1:53")
    for n in (1, 2, 3):
        assert tcp_port(client, n) == udp_port(client, n)


# ---------------------------------------------------------------------------------------------------- sessions that end


@every_mode
def test_idle_sessions_are_forgotten_at_both_ends(mode, forward, remote, originator):
    server, client = forward(mode, "0:%d" % remote.port, serve_flags=("--udp-timeout", "1"), connect_flags=("--udp-timeout", "1"))
    before = descriptors(server), descriptors(client)
    asking = [originator(udp_port(client)) for _ in range(20)]
    for n, one in enumerate(asking):
        one.send(b"%d" % n)
    assert sorted(int(remote.receive()[0]) for _ in asking) == list(range(20))
    assert descriptors(server) >= before[0] + 20
    # Some may be links that are kept.
    eventually(lambda: descriptors(server) < before[0] + 10 and descriptors(client) < before[1] + 10, "the sessions' sockets were closed")
    # And the originators need not know.
    for one in asking:
        one.send(b"again")
        data, source = remote.receive()
        remote.socket.sendto(data + b" here", source)
        assert one.recv(65536) == b"again here"


@every_mode
def test_session_lives_while_its_target_alone_speaks(mode, forward, remote, originator):
    """Idle means in both directions: a stream of news is not idle although nobody answers it."""
    _, client = forward(mode, "0:%d" % remote.port, serve_flags=("--udp-timeout", "2"), connect_flags=("--udp-timeout", "2"))
    asking = originator(udp_port(client))
    asking.send(b"news, please")
    source = remote.receive()[1]
    until = time.monotonic() + 5
    while time.monotonic() < until:
        remote.socket.sendto(b"news", source)
        assert asking.recv(65536) == b"news"
        # The pace of the target, not a wait for anything.
        time.sleep(0.1)
    asking.send(b"thank you")
    assert remote.receive() == (b"thank you", source)


@every_mode
def test_refusal_of_one_session_ends_no_other(mode, forward, remote, originator):
    port = free_port()  # nobody is there: what is sent comes back as an ICMP refusal
    _, client = forward(mode, "0:%d" % port, "0:%d" % remote.port)
    refused, other = originator(udp_port(client)), originator(udp_port(client, 2))
    other.send(b"before")
    source = remote.receive()[1]
    for _ in range(20):
        refused.send(b"anybody?")
        other.send(b"meanwhile")
        assert remote.receive() == (b"meanwhile", source)
    remote.socket.sendto(b"still here", source)
    assert other.recv(65536) == b"still here"
    # Nor does it end the tunnel: a service that was down for a moment is reached again.
    with loose_socket() as late:
        late.bind(("127.0.0.1", port))
        late.settimeout(0.2)
        eventually(lambda: answered_by(late, refused), "an answer from the remote that came up")


def answered_by(remote_socket, asking):
    """Sends once more, and answers what arrives, if anything does: UDP may lose."""
    asking.settimeout(0.2)
    asking.send(b"now?")
    with contextlib.suppress(socket.timeout):
        remote_socket.sendto(b"now.", remote_socket.recvfrom(65536)[1])
        return asking.recv(65536) == b"now."


@every_mode
def test_server_that_comes_back(mode, tunnel, serve, udp_echo, originator):
    made = tunnel(udp_echo.port, mode)
    asking = originator(udp_port(made.client))
    ask(asking)
    made.server.stop(signal.SIGKILL)
    asking.send(b"into the void")
    serve(*mode.serve, bind="127.0.0.1:%d" % made.server_port)
    ask_until_answered(asking, b"are you back?")
    ask_until_answered(originator(udp_port(made.client)), b"for me too?")


@every_mode
def test_removed_key_loses_its_sessions(mode, keys, tunnel, remote, originator):
    made = tunnel(remote.port, mode)
    asking = originator(udp_port(made.client))
    before = descriptors(made.server)
    asking.send(b"?")
    remote.receive()
    keys.server.write("authorized_keys", "# nobody\n")
    eventually(lambda: descriptors(made.server) <= before, "the server closed the session")
    asking.send(b"not for you")
    says_who = made.server.wait_for(re.escape(keys.client.public))
    assert says_who and remote_is_silent(remote)


def remote_is_silent(remote):
    """Nothing has arrived there."""
    remote.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return not remote.receive()
    return True


# ---------------------------------------------------------------------------------------------------- policy


@every_mode
def test_remote_regex(mode, forward, remote, udp_echo, originator):
    _, client = forward(mode, "0:%d" % remote.port, "0:%d" % udp_echo.port, serve_flags=("-r", r"127\.0\.0\.1:%d" % udp_echo.port))
    originator(udp_port(client)).send(b"let me in")
    client.wait_for("not allowed by this server")
    ask(originator(udp_port(client, 2)))
    assert remote_is_silent(remote)


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("local, asked", [
    ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "127.9.9.9"]),
    ("[::]", ["127.0.0.1", "127.0.0.2", "::1"]),
    ("[::1]", ["::1"]),
    ("127.0.0.3", ["127.0.0.3"]),
    ("localhost", ["127.0.0.1", "::1"]),
])
def test_answer_comes_from_the_address_that_was_asked(local, asked, forward, udp_echo):
    """Resolvers drop an answer from elsewhere, and the kernel prefers its own choice of source."""
    _, client = forward(ANY, "%s:0:127.0.0.1:%d" % (local, udp_echo.port))
    for host in asked:
        with loose_socket(":" in host) as asking:
            for turn in range(3):
                asking.sendto(b"%d" % turn, (host, udp_port(client)))
                answer, source = asking.recvfrom(65536)
                assert (answer, source[:2]) == (b"%d" % turn, (host, udp_port(client)))


def test_one_originator_asks_two_addresses(forward, udp_echo):
    _, client = forward(ANY, "0.0.0.0:0:127.0.0.1:%d" % udp_echo.port)
    with loose_socket() as asking:
        for host in ("127.0.0.2", "127.0.0.3", "127.0.0.2"):
            asking.sendto(host.encode(), (host, udp_port(client)))
            assert asking.recvfrom(65536) == (host.encode(), (host, udp_port(client)))


def test_ipv6_target(forward, originator):
    with contextlib.closing(UdpEcho("::1")) as echo:
        _, client = forward(ANY, "0:[::1]:%d" % echo.port)
        for size in (1, 1200, 65507):
            ask(originator(udp_port(client)), NOISE[:size])


@every_mode
def test_remote_on_another_machine(mode, namespace, tunnel, originator):
    """The original reaches the UDP of its own loopback only. Over a real cable the largest datagram travels in 45 fragments, too."""
    with contextlib.closing(namespace.make(UdpEcho, namespace.address)) as echo:
        made = tunnel(echo.port, mode, host=namespace.address)
        asking = originator(udp_port(made.client))
        for size in (0, 60, 512, 1472, 1473, 65507):
            ask(asking, NOISE[:size])
        assert echo.seen == 6
