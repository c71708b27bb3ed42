"""TCP from end to end: an originator, a real `connect`, a real `serve`, a target. RATROD_LONG=1 sends 1 GB each way in place of 24 MB."""

import concurrent.futures
import hashlib
import os
import re
import socket
import subprocess
import sys

import pytest

from support import sockets
from support.pressure import LONG, memory_before, peak_growth
from support.programs import PATIENCE, RATROD, RATROD2, READY, STARTED, bound, either_wire, every_mode, tcp_port, udp_originator
from support.rows import row
from support.sockets import BLOCK, accept, ask, ask_udp, assert_refused, dial, free_port, ping, port_of, receive_all, receive_exactly, reset, talk
from support.socks5 import ask_socks, request, socks_port
from support.targets import echo

pytestmark = pytest.mark.usefixtures("no_traceback")

SIDES = "originator", "target"
NOT_ALLOWED = "not allowed by this server"


@pytest.fixture
def join(listener, stack):
    """join(port, first) -> (the end named `first`, the other) of a new connection through a tunnel that leads from `port` to `listener`."""
    def launch(port, first="originator"):
        originator = stack.enter_context(dial(port))
        target = stack.enter_context(accept(listener))
        return (originator, target) if first == "originator" else (target, originator)
    return launch


@pytest.fixture
def closed():
    """A port of 127.0.0.1 that is taken, and where nobody listens until the test says so."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", 0))
        yield made


def send_until_cut(connection):
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            connection.sendall(BLOCK)


@every_mode
def test_bytes_ends_and_resets(mode, tunnel, listener, join):
    port = tunnel(port_of(listener), mode).port
    originator, target = join(port)
    target.sendall(b"220 ready\r\n")
    assert receive_exactly(originator, 11) == b"220 ready\r\n", "a target may speak first"
    for size in (1, 2, 100, 1000, 10000, 100000):
        talk(originator, target, BLOCK[:size])
    for first in SIDES:
        with row("the %s ends first" % first):
            sockets.check_half_close(*join(port, first))
        with row("the %s ends first, without a byte" % first):
            ended, other = join(port, first)
            for one, another in ((ended, other), (other, ended)):
                one.shutdown(socket.SHUT_WR)
                assert another.recv(1) == b""
        with row("everything before a close of the %s arrives" % first):
            # The closing side waits for nothing: what it sent is under way in five buffers, and all of it counts.
            closing, other = join(port, first)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                received = pool.submit(receive_all, other)
                closing.sendall(BLOCK * 8)
                closing.close()
                is_whole = received.result() == BLOCK * 8
                assert is_whole
        # Of the resets: a clean end at the other side would pass for a complete transfer.
        with row("the %s resets" % first):
            leaving, staying = join(port, first)
            talk(leaving, staying)
            reset(leaving)
            pytest.raises(ConnectionResetError, staying.recv, 1)
        with row("the %s resets in the middle of bulk" % first):
            # The other side may get less than was sent, but never a clean end.
            leaving, staying = join(port, first)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                received = pool.submit(receive_all, staying)
                for _ in range(16):
                    leaving.sendall(BLOCK)
                reset(leaving)
                pytest.raises(ConnectionResetError, received.result)
        with row("the %s resets after its own end" % first):
            # It is not read any more, so that only writing to it can tell that it is gone.
            leaving, staying = join(port, first)
            leaving.shutdown(socket.SHUT_WR)
            assert staying.recv(1) == b""
            reset(leaving)
            send_until_cut(staying)


def test_urgent_data_stays_in_line(forward, listener):
    """telnet and rlogin interrupt by it. TCP's urgent byte was lost, for a socket keeps it apart unless it is told otherwise."""
    remote = "127.0.0.1:%d" % port_of(listener)
    _, client = forward(RATROD2, "0:" + remote, "R:0:" + remote, "0:socks", serve_flags=["--allow-listen"])
    for way, connect in (("forward", lambda: dial(tcp_port(client))), ("reverse", lambda: dial(bound(client))),
                         ("socks", lambda: ask_socks(socks_port(client), request("127.0.0.1", port_of(listener)))[0])):
        with row(way), connect() as near, accept(listener) as far:
            for one, other in ((near, far), (far, near)):
                one.sendall(b"before ")
                one.send(b"!", socket.MSG_OOB)
                one.sendall(b" after")
                assert receive_exactly(other, 14) == b"before ! after"


@every_mode
def test_bulk_and_slow_readers(mode, forward, listener, join, tcp_echo):
    server, client = forward(mode, "0:%d" % port_of(listener), "0:%d" % tcp_echo.port)
    port = tcp_port(client)
    # This also makes the buffers that are kept for good, before anything is measured.
    sockets.check_bulk_each_way(join(port), 1024 if LONG else 24)
    for first in SIDES:
        before = memory_before(server), memory_before(client)
        pairs = [join(port, first) for _ in range(3)]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            taken = list(pool.map(sockets.push_until_stuck, [sender for _, sender in pairs]))
        with row("the %s does not read: that costs no memory, and holds up nobody else" % first):
            # What nobody takes waits in the sockets' own buffers, and then the sender waits.
            for _ in range(20):
                ask(tcp_port(client, 2), BLOCK[:100000])
            grown = peak_growth(server, before[0]), peak_growth(client, before[1])
            assert max(grown) < 16 << 20, "%d bytes sent, memory grown by %d (server) and %d (client)" % ((taken[0][0],) + grown)
            reader, sender = pairs[0]
            sender.shutdown(socket.SHUT_WR)
            data = receive_all(reader)
            assert (len(data), hashlib.sha256(data).hexdigest()) == taken[0]
        with row("the %s does not read and vanishes: its sender is freed" % first):
            reader, sender = pairs[1]
            reset(reader)
            send_until_cut(sender)
        with row("a sender vanishes, which is not read because the %s does not read" % first):
            # Its reset must not turn into a clean end once reading resumes.
            reader, sender = pairs[2]
            reset(sender)
            pytest.raises(ConnectionResetError, receive_all, reader)


@either_wire
def test_remotes_that_fail(mode, forward, closed, target, tcp_echo):
    # On an address of its own: another test's client may still try a port of 127.0.0.1 that was its target's before.
    apart = "127.0.66.6" if sys.platform.startswith("linux") else "127.0.0.1"
    forbidden = target(receive_all, apart)
    refusing = "127.0.0.1:%d" % port_of(closed)
    # The second name fails inside Python's own encoding of host names, with a UnicodeError, before any look-up.
    names = "does-not-exist.invalid", "%s.invalid" % ("a" * 64)
    regex = r"an-internal-name\.example|.*\.invalid|127\.0\.0\.1:(%d|%d)" % (port_of(closed), tcp_echo.port)
    server, client = forward(mode, "0:%d" % tcp_echo.port, "0:%d" % port_of(closed), *["0:%s:80" % name for name in names],
                             "0:%s:%d" % (apart, forbidden.port), serve_flags=("-r", regex))
    for n, parts in enumerate([(re.escape(refusing), "refused"), *[(re.escape(name), "look.?up|resolv|not known") for name in names],
                               (re.escape("%s:%d" % (apart, forbidden.port)), NOT_ALLOWED + "|regex")], 2):
        with row(parts):
            assert_refused(tcp_port(client, n))
            for program in (server, client):
                program.wait_for("(?i)^(?=.*%s).*(%s)" % parts)
    # A client is told that it may not, and never the regex.
    client.wait_for(NOT_ALLOWED)
    assert "internal-name" not in client.output and forbidden.accepted == 0
    # Nothing of this holds up a remote that is there, and the next connection succeeds if its target does.
    ask(tcp_port(client))
    closed.listen()
    closed.settimeout(PATIENCE)
    with dial(tcp_port(client, 2)) as originator, accept(closed) as accepted:
        talk(originator, accepted)


def test_tunnels_of_every_form(forward, target, tcp_echo):
    inside = target(echo, host="::1")
    names = [target(lambda connection, name=name: connection.sendall(name)) for name in (b"first", b"second")]
    port = free_port(3)
    remote = r"127\.0\.0\.1:%d" % tcp_echo.port
    # What the user writes, what it listens on and leads to, and the hosts that can be asked.
    forms = [
        ("[::1]:0:[::1]:%d" % inside.port, r"\[::1\]:\d+", r"\[::1\]:%d" % inside.port, ["::1"]),
        ("localhost:0:127.0.0.1:%d" % tcp_echo.port, r"localhost:\d+", remote, ["127.0.0.1", "::1"]),
        ("0.0.0.0:%d:127.0.0.1:%d" % (port, tcp_echo.port), r"0\.0\.0\.0:%d" % port, remote, ["127.0.0.1", "127.0.0.2"]),
        ("%d:localhost:%d" % (port + 1, tcp_echo.port), r"127\.0\.0\.1:%d" % (port + 1), "localhost:%d" % tcp_echo.port, ["127.0.0.1"]),
        ("%d:%d" % (port + 2, tcp_echo.port), r"127\.0\.0\.1:%d" % (port + 2), remote, ["127.0.0.1"]),
        ("*:0:127.0.0.1:%d" % tcp_echo.port, r"\*:\d+", remote, ["127.0.0.1", "127.0.0.2", "::1"]),
        ("[::]:0:127.0.0.1:%d" % tcp_echo.port, r"\[::\]:\d+", remote, ["::1"])]
    _, client = forward(RATROD2, *(form[0] for form in forms), *("0:%d" % each.port for each in names), connect_flags=("-v",))
    for n, (tunnel, local, remote, hosts) in enumerate(forms, 1):
        with row(tunnel):
            client.wait_for(r"\[TCP\] Listening on `%s`, and routing through `127\.0\.0\.1:\d+` to `%s` \.\.\." % (local, remote))
            for host in hosts:
                ask(tcp_port(client, n), host=host)
    # Without a local host it is loopback that listens, and nothing else.
    pytest.raises(ConnectionRefusedError, dial, port + 1, "127.0.0.2")
    # The IPv6 wildcard takes IPv4 too, as * does, and shows it as such.
    with dial(tcp_port(client, len(forms))) as connection:
        ping(connection, word=b"still there?")
        client.wait_for(r"127\.0\.0\.1:%d\b" % port_of(connection))
    assert "::ffff:" not in client.output
    # Each of two tunnels leads to its own target.
    for n, name in ((1, b"second"), (0, b"first"), (1, b"second")):
        with dial(tcp_port(client, len(forms) + 1 + n)) as connection:
            assert receive_all(connection) == name


def test_one_protocol_alone(forward, tcp_echo, udp_echo):
    """Where the port is taken for the other one; two tunnels may share a number."""
    port = free_port(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))
        _, client = forward(RATROD2, *("%s:%d:127.0.0.1:%d" % words for words in (
            ("tcp", port, tcp_echo.port), ("tcp", port + 1, tcp_echo.port), ("udp", port + 1, udp_echo.port))))
        ask(port)
        ask(port + 1)
        with udp_originator(client) as originator:
            ask_udp(originator)
    assert [re.search(r"\[(\w+)\] Listening", line).group(1) for line in client.lines if "Listening" in line] == ["TCP", "TCP", "UDP"]


def test_every_address_of_both_families(ratrod, keys, tcp_echo):
    """BIND, --metrics, a SOCKS proxy; of a reverse tunnel in test_reverse.py."""
    server = ratrod("-k", keys.server.path, "serve", "--metrics", "*:0", "*:0")
    port = int(server.wait_for(r"Starting server on `\*:(\d+)`").group(1))
    metrics = int(server.wait_for(r"http://\*:(\d+)/metrics").group(1))
    for host in ("127.0.0.1", "[::1]"):
        client = ratrod("-k", keys.client.path, "connect", "-a", "%s:%d" % (host, port), "*:0:socks")
        socks = int(client.wait_for(r"\[SOCKS\] Listening on `\*:(\d+)`").group(1))
        client.wait_for(READY)
        for ask_at in (metrics, socks):
            dial(ask_at, host.strip("[]")).close()


def test_a_link_local_address_keeps_its_zone(namespace, start, ratrod, keys, target):
    """Without it no system knows on which of its networks the address is: as BIND, as SERVER, as a local address, and as the target of R:."""
    cable = "rt%dv" % os.getpid()
    addresses = {}
    def settled():
        for name, command in ((cable, ()), ("eth0", namespace.command)):
            words = "ip -6 -o addr show dev %s scope link" % name
            shown = subprocess.run([*command, *words.split()], stdout=subprocess.PIPE, check=True).stdout
            addresses[name] = re.search(rb"(fe80:\S+)/64(?!.*tentative)", shown)
        return all(addresses.values())
    sockets.eventually(settled, "both ends of the cable have an address")
    near, far = ("%s%%%s" % (found.group(1).decode(), name) for name, found in addresses.items())
    server = start(*namespace.command, *RATROD, "-k", keys.server.path, "serve", "--allow-listen", "[%s]:0" % far)
    port = server.wait_for(STARTED).group(1)
    inside, outside = namespace.make(target, echo), target(echo, host="::")
    client = ratrod("-k", keys.client.path, "connect", "-a", "[%s%%%s]:%s" % (far.split("%")[0], cable, port),
                    "[%s]:0:127.0.0.1:%d" % (near, inside.port), "R:0:[%s]:%d" % (near, outside.port)).ready()
    ask(tcp_port(client), host=near)
    namespace.make(ask, bound(client, host="localhost"))


def test_a_server_opens_none_of_its_own_addresses(serve, ratrod, keys):
    """Its metrics tell of all keys; behind --proxy-protocol its own port believes a header. Another address with such a port is another's."""
    server, port = serve("--metrics", "*:0")
    metrics = int(server.wait_for(r"/\*:(\d+)/metrics").group(1))
    try:
        other = socket.create_server(("127.0.0.2", port))
    except OSError:
        pytest.skip("127.0.0.2 is no address of this machine")
    own = ["127.0.0.1:%d" % port, "localhost:%d" % port, "[::ffff:127.0.0.1]:%d" % port, "127.0.0.1:%d" % metrics, "127.9.9.9:%d" % metrics,
           "[::1]:%d" % metrics, "localhost:%d" % metrics]
    with other:
        client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, *["0:" + each for each in own], "0:127.0.0.2:%d" % port).ready()
        for n, each in enumerate(own, 1):
            with row(each):
                assert_refused(tcp_port(client, n))
        server.wait_for("is an address that this server itself listens on", 1)
        with dial(tcp_port(client, len(own) + 1)):
            other.settimeout(PATIENCE)
            other.accept()[0].close()
