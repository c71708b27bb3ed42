"""UDP from end to end: an originator, a real `connect`, a real `serve`, a target."""

import contextlib
import os
import signal
import socket
import time

import pytest

from support.kernel import waiting_bytes
from support.programs import PATIENCE, RATROD2, descriptors, either_wire, every_mode, tcp_port, udp_originator, udp_port
from support.rows import row
from support.sockets import ask_udp, eventually, free_port
from support.targets import UdpEcho, UdpRemote

pytestmark = pytest.mark.usefixtures("no_traceback")

NOISE = os.urandom(65507)


@pytest.fixture
def loose(stack):
    """loose(ipv6=False) -> a UDP socket that is not connected: it hears everybody."""
    def launch(ipv6=False):
        made = stack.enter_context(socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM))
        made.settimeout(PATIENCE)
        return made
    return launch


@pytest.fixture
def originator(stack):
    """originator(client, n=1) -> a socket of its own, connected to the client's n-th UDP listener: answers from elsewhere do not reach it."""
    return lambda client, n=1: stack.enter_context(udp_originator(client, n))


@every_mode
def test_datagrams_to_an_echo(mode, forward, udp_echo, originator):
    server, client = forward(mode, *["0:%d" % udp_echo.port] * 4)
    # The first datagram comes before there is a session, and before its tunnel has a link.
    for n, size in enumerate((0, 512, 65507), 1):
        with row("the first datagram, of %d bytes" % size):
            asking = originator(client, n)
            ask_udp(asking, NOISE[:size])
    # A datagram stays one datagram: the empty one counts too, and the largest that IPv4 has fits.
    before = udp_echo.seen
    for size in (14, 0, 1, 512, 0, 1200, 9000, 65507, 65506, 0):
        with row("%d bytes" % size):
            ask_udp(asking, NOISE[:size])
    assert udp_echo.seen == before + 10
    # A burst is answered whole and in order: 16 are under way at any time, so that datagrams wait together everywhere on the way.
    questions = [b"%03d " % n + NOISE[:n * 7] for n in range(200)]
    answers = []
    for n, question in enumerate(questions):
        asking.send(question)
        if n >= 15:
            answers.append(asking.recv(65536))
    answers += [asking.recv(65536) for _ in range(15)]
    assert answers == questions
    # Every originator gets its own answers.
    many = [originator(client) for _ in range(20)]
    for turn in range(5):
        for n, one in enumerate(many):
            one.send(b"%d of %d" % (turn, n))
        for n, one in enumerate(many):
            assert one.recv(65536) == b"%d of %d" % (turn, n)
    # Datagrams wait for a server that is slow to answer. The fourth tunnel has no link yet.
    asking = originator(client, 4)
    questions = [b"question %d" % n for n in range(10)]
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        for question in questions:
            asking.send(question)
        eventually(lambda: not waiting_bytes(udp_port(client, 4)), "the client read them")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert [asking.recv(65536) for _ in questions] == questions


@either_wire
def test_target_sees_one_address_for_an_originator(mode, tunnel, remote, originator, loose):
    """It is how a target tells its peers apart; and it may answer late, often, or not at all."""
    client = tunnel(remote.port, mode).client
    first, second = originator(client), originator(client)
    sources = []
    for asking in (first, second, first, second):
        asking.send(b"?")
        sources.append(remote.receive()[1])
    assert sources[0] == sources[2] != sources[1] == sources[3]
    # Whoever finds the server's port of a session is not its target.
    loose().sendto(b"forged", sources[0])
    for n in range(5):
        remote.socket.sendto(b"news %d" % n, sources[0])
    remote.socket.sendto(b"for the second", sources[1])
    assert [first.recv(65536) for _ in range(5)] == [b"news %d" % n for n in range(5)]
    assert second.recv(65536) == b"for the second"


@either_wire
def test_idle_sessions_are_forgotten_at_both_ends(mode, forward, remote, originator):
    server, client = forward(mode, "0:%d" % remote.port, serve_flags=("--udp-timeout", "1"), connect_flags=("--udp-timeout", "1"))
    before = descriptors(server), descriptors(client)
    # Idle means in both directions: a stream of news is not idle although nobody answers it. It began first, and would be forgotten first.
    reader = originator(client)
    reader.send(b"news, please")
    source, began = remote.receive()[1], time.monotonic()
    def hears_news():
        remote.socket.sendto(b"news", source)
        return reader.recv(65536) == b"news"
    asking, sources = [originator(client) for _ in range(20)], set()
    for n, one in enumerate(asking):
        one.send(b"%d" % n)
        data, address = remote.receive()
        sources.add(address)
        assert data == b"%d" % n and hears_news()
    assert len(sources) == 20, "each has a socket of its own"
    # Some descriptors may be links that are kept. By 3 s each end has looked at the ages of its sessions after they were too old.
    eventually(lambda: hears_news() and time.monotonic() > began + 3 and all(
        descriptors(program) < n + 10 for program, n in zip((server, client), before)), "the sessions' sockets were closed")
    reader.send(b"thank you")
    assert remote.receive() == (b"thank you", source)
    # And the originators need not know.
    for one in asking:
        one.send(b"again")
        data, address = remote.receive()
        remote.socket.sendto(data + b" here", address)
        assert one.recv(65536) == b"again here"


@either_wire
def test_refusal_of_one_session_ends_no_other(mode, forward, remote, udp_echo, originator, loose):
    port = free_port()  # nobody is there: what is sent comes back as an ICMP refusal
    _, client = forward(mode, "0:%d" % port, "0:%d" % udp_echo.port, "0:%d" % remote.port,
                        serve_flags=("-r", r"127\.0\.0\.1:(%d|%d)" % (port, remote.port)))
    refused, forbidden, other = (originator(client, n) for n in (1, 2, 3))
    other.send(b"before")
    source = remote.receive()[1]
    forbidden.send(b"let me in")
    client.wait_for("not allowed by this server")
    for _ in range(20):
        refused.send(b"anybody?")
        other.send(b"meanwhile")
        assert remote.receive() == (b"meanwhile", source)
    remote.socket.sendto(b"still here", source)
    assert other.recv(65536) == b"still here"
    assert udp_echo.seen == 0, "the policy does not allow it"
    # Nor does a refusal end the tunnel: a service that was down for a moment is reached again.
    late = loose()
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


def test_answer_comes_from_the_address_that_was_asked(forward, udp_echo, originator, loose):
    """Resolvers drop an answer from elsewhere, and the kernel prefers its own choice of source."""
    listeners = {"0.0.0.0": ["127.0.0.1", "127.0.0.2", "127.9.9.9"], "[::]": ["127.0.0.1", "127.0.0.2", "::1"], "[::1]": ["::1"],
                 "127.0.0.3": ["127.0.0.3"], "localhost": ["127.0.0.1", "::1"]}
    with contextlib.closing(UdpEcho("::1")) as ipv6_echo:
        _, client = forward(RATROD2, *["%s:0:127.0.0.1:%d" % (local, udp_echo.port) for local in listeners], "0:[::1]:%d" % ipv6_echo.port)
        for n, (local, hosts) in enumerate(listeners.items(), 1):
            with row(local):
                # One service on both, as DNS is: also where port 0 chose the number.
                port = udp_port(client, n)
                assert tcp_port(client, n) == port
                for host in hosts:
                    asking = loose(":" in host)
                    for turn in range(3):
                        asking.sendto(b"%d" % turn, (host, port))
                        answer, source = asking.recvfrom(65536)
                        assert (answer, source[:2]) == (b"%d" % turn, (host, port))
        # One originator asks two addresses: these are two sessions.
        asking = loose()
        for host in ("127.0.0.2", "127.0.0.3", "127.0.0.2"):
            asking.sendto(host.encode(), (host, udp_port(client)))
            assert asking.recvfrom(65536) == (host.encode(), (host, udp_port(client)))
        # A target may be an IPv6 one.
        for size in (1, 1200, 65507):
            ask_udp(originator(client, len(listeners) + 1), NOISE[:size])


@either_wire
def test_a_target_with_several_addresses(mode, serve, client, resolver, originator):
    """An ICMP refusal before any answer moves on to the next one, with the datagrams that were sent; after an answer a refusal ends nothing."""
    names = resolver(second_example=["::1", "127.0.0.1"], third_example=["::1", "127.0.0.2", "127.0.0.1"], late_example=["::1", "127.0.0.1"])
    with contextlib.closing(UdpRemote()) as remote:
        _, port = serve(*mode.serve, env=names.environment)
        program = client(port, *("0:%s:%d" % (name, remote.port) for name in ("second.example", "third.example", "late.example")), flags=mode.connect)
        asking = [originator(program, n) for n in (1, 2, 3)]
        for one in asking[:2]:
            for n in range(5):
                one.send(b"%d" % n)
            came = [remote.receive() for _ in range(5)]
            assert [data for data, _ in came] == [b"0", b"1", b"2", b"3", b"4"] and len({source for _, source in came}) == 1
            remote.socket.sendto(b"answer", came[0][1])
            assert one.recv(100) == b"answer"
    for one in asking[:2]:
        one.send(b"anybody?")
    asking[2].send(b"nobody has either address")
    with contextlib.closing(UdpRemote(port=remote.port)) as again:
        # One that has refused them all is asked anew.
        eventually(lambda: answered_by(again.socket, asking[2]), "an answer to who came before its target")
        for one in asking[:2]:
            one.send(b"the same")
            while again.receive()[0] != b"the same":  # an answer of before
                pass


@either_wire
def test_remote_on_another_machine(mode, namespace, tunnel, originator):
    """The original reaches the UDP of its own loopback only. Over a real cable the largest datagram travels in 45 fragments, too."""
    with contextlib.closing(namespace.make(UdpEcho, namespace.address)) as echo:
        made = tunnel(echo.port, mode, host=namespace.address)
        asking = originator(made.client)
        for size in (0, 60, 512, 1472, 1473, 65507):
            ask_udp(asking, NOISE[:size])
        assert echo.seen == 6
