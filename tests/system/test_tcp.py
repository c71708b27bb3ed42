"""TCP from end to end: an originator, a real `connect`, a real `serve`, a target."""

import concurrent.futures
import contextlib
import functools
import hashlib
import http.server
import itertools
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest

from support import legacy_peer
from support.pressure import memory_before, peak_growth
from support.programs import LEGACY, MODES, PATIENCE, RATROD, READY, STARTED, Tunnel, descriptors, every_mode, missing, need, tcp_port
from support.sockets import ask, assert_refused, check_half_close, dial, eventually, free_port, is_ready, port_of, receive_all, receive_exactly, reset
from support.targets import echo

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire (listeners, policy, key files): one mode is enough.
ANY = MODES[0]
# Random, and of a length that divides nothing: a lost, doubled or misplaced piece changes every hash of a run of these.
BLOCK = os.urandom((1 << 20) - 3)
WHOLE = pytest.mark.skipif(not os.environ.get("RATROD_TEST_WHOLE"), reason="a minute of bulk: set RATROD_TEST_WHOLE=1")
either_first = pytest.mark.parametrize("first", ["originator", "target"])


class Joined(NamedTuple):
    """Both outer ends of one connection through a tunnel, in the hands of the test."""

    tunnel: Tunnel
    originator: socket.socket
    target: socket.socket

    def ordered(self, first):
        """(the end named `first`, the other)"""
        return (self.originator, self.target) if first == "originator" else (self.target, self.originator)


@pytest.fixture
def join(listener):
    """join(tunnel) -> Joined: a new connection through a tunnel that ends at `listener`, and what came out there."""
    with contextlib.ExitStack() as stack:
        def launch(tunnel):
            originator = stack.enter_context(tunnel.connect())
            target = stack.enter_context(listener.accept()[0])
            target.settimeout(PATIENCE)
            return Joined(tunnel, originator, target)
        yield launch


@pytest.fixture
def joined(tunnel, listener, join):
    """joined(mode, serve_flags=(), connect_flags=()) -> Joined: a new tunnel and a connection through it."""
    def launch(mode, **flags):
        return join(tunnel(port_of(listener), mode, **flags))
    return launch


@pytest.fixture
def closed():
    """A port of 127.0.0.1 that is taken, and where nobody listens until the test says so."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", 0))
        yield made


def talk(one, other):
    """A byte each way, so that the whole path is known to stand."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"!")
        assert receive_exactly(receiver, 1) == b"!"


def assert_ended(connection):
    """The other side is gone. Whether that shows as an end or as a reset depends on the wire."""
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def send_until_cut(connection):
    """Sends until the connection breaks, which it must."""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            connection.sendall(BLOCK)


def says(program, *parts):
    """Waits for a line of the program's that has all these patterns, in any order."""
    return program.wait_for("(?i)^" + "".join("(?=.*(?:%s))" % part for part in parts)).string


# ---------------------------------------------------------------------------------------------------- bytes and ends


@every_mode
def test_echo(mode, tunnel, tcp_echo):
    made = tunnel(tcp_echo.port, mode)
    ask(made.port)
    with made.connect() as connection:
        for size in (1, 2, 100, 1000, 10000, 100000):
            connection.sendall(BLOCK[:size])
            assert receive_exactly(connection, size) == BLOCK[:size]


@every_mode
def test_target_speaks_first(mode, joined):
    ends = joined(mode)
    ends.target.sendall(b"220 ready\r\n")
    assert receive_exactly(ends.originator, 11) == b"220 ready\r\n"


@every_mode
@either_first
def test_half_close(mode, first, joined):
    check_half_close(*joined(mode).ordered(first))


@every_mode
@either_first
def test_end_without_a_byte(mode, first, joined):
    ended, other = joined(mode).ordered(first)
    ended.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b""
    other.shutdown(socket.SHUT_WR)
    assert ended.recv(1) == b""


@every_mode
@either_first
def test_everything_before_a_close_arrives(mode, first, joined):
    """The closing side waits for nothing: what it sent is under way in five buffers, and all of it counts."""
    closing, other = joined(mode).ordered(first)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive_all, other)
        closing.sendall(BLOCK * 8)
        closing.close()
        assert received.result() == BLOCK * 8


def send_blocks(connection, count):
    digest = hashlib.sha256()
    for _ in range(count):
        connection.sendall(BLOCK)
        digest.update(BLOCK)
    connection.shutdown(socket.SHUT_WR)
    return count * len(BLOCK), digest.hexdigest()


def receive_blocks(connection):
    digest, size, buffer = hashlib.sha256(), 0, bytearray(1 << 20)
    while True:
        n = connection.recv_into(buffer)
        if not n:
            return size, digest.hexdigest()
        digest.update(memoryview(buffer)[:n])
        size += n


def transfer(originator, target, up, down):
    """So many blocks each way at the same time, checked."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sent = pool.submit(send_blocks, originator, up), pool.submit(send_blocks, target, down)
        received = pool.submit(receive_blocks, target), pool.submit(receive_blocks, originator)
        assert [result.result() for result in received] == [result.result() for result in sent]


@every_mode
@pytest.mark.parametrize("up, down", [(64, 0), (0, 64), (64, 64), pytest.param(1024, 1024, marks=WHOLE)])
def test_bulk(mode, up, down, joined):
    ends = joined(mode)
    transfer(ends.originator, ends.target, up, down)


# ---------------------------------------------------------------------------------------------------- slow readers


def push_until_stuck(connection):
    """Sends to a reader that does not read until no more is taken. What was taken, as its size and hash."""
    connection.setblocking(False)
    digest, sent = hashlib.sha256(), 0
    # Nothing announces that no room will come any more. A second without is taken for it; where that is too short, the test is weaker, not wrong.
    while is_ready(connection, selectors.EVENT_WRITE, 1.0):
        piece = memoryview(BLOCK)[sent % len(BLOCK):]
        n = connection.send(piece)
        digest.update(piece[:n])
        sent += n
        assert sent < 256 << 20, "a reader that reads nothing never held up its sender"
    connection.settimeout(PATIENCE)
    return sent, digest.hexdigest()


@every_mode
@either_first
def test_slow_reader_costs_no_memory_and_holds_up_nobody_else(mode, first, forward, listener, join, tcp_echo):
    """What nobody takes waits in the sockets' own buffers, and then the sender waits. `first` is the slow reader."""
    server, client = forward(mode, "0:%d" % port_of(listener), "0:%d" % tcp_echo.port)
    stalling = Tunnel(server, client, 0, tcp_port(client))
    # At full speed once, so that the buffers that are kept for good are there before anything is measured.
    warm = join(stalling)
    transfer(warm.originator, warm.target, 32, 32)
    before = memory_before(server), memory_before(client)
    reader, sender = join(stalling).ordered(first)
    sent, digest = push_until_stuck(sender)
    for _ in range(20):
        ask(tcp_port(client, 2), BLOCK[:100000])
    grown = peak_growth(server, before[0]), peak_growth(client, before[1])
    assert max(grown) < 4 << 20, "%d bytes sent, memory grown by %d (server) and %d (client)" % ((sent,) + grown)
    sender.shutdown(socket.SHUT_WR)
    assert receive_blocks(reader) == (sent, digest)


# ---------------------------------------------------------------------------------------------------- resets and deaths


@every_mode
@either_first
def test_reset_is_seen_as_reset(mode, first, joined):
    """`first` resets. A clean end at the other side would pass for a complete transfer."""
    leaving, staying = joined(mode).ordered(first)
    talk(leaving, staying)
    reset(leaving)
    with pytest.raises(ConnectionResetError):
        staying.recv(1)


@every_mode
@either_first
def test_reset_in_the_middle_of_bulk(mode, first, joined):
    """`first` is sending when it resets: the other side may get less than was sent, but never a clean end."""
    leaving, staying = joined(mode).ordered(first)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive_all, staying)
        for _ in range(16):
            leaving.sendall(BLOCK)
        reset(leaving)
        with pytest.raises(ConnectionResetError):
            received.result()


@every_mode
@either_first
def test_reset_after_its_own_end_stops_the_sender(mode, first, joined):
    """After its end `first` is not read any more, so that only writing to it can tell that it is gone."""
    leaving, staying = joined(mode).ordered(first)
    leaving.shutdown(socket.SHUT_WR)
    assert staying.recv(1) == b""
    reset(leaving)
    send_until_cut(staying)


@every_mode
@either_first
def test_slow_reader_that_vanishes_frees_its_sender(mode, first, joined):
    reader, sender = joined(mode).ordered(first)
    push_until_stuck(sender)
    reset(reader)
    send_until_cut(sender)


@every_mode
@either_first
def test_sender_that_vanishes_behind_a_slow_reader(mode, first, joined):
    """While nobody reads, the sender is not read either: its reset must not turn into a clean end once reading resumes."""
    sender, reader = joined(mode).ordered(first)
    push_until_stuck(sender)
    reset(sender)
    with pytest.raises(ConnectionResetError):
        receive_all(reader)


STUBBORN_TARGET = """
import socket, time
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.sendall(b"!")
while True: time.sleep(1000)
"""


@every_mode
@pytest.mark.parametrize("unread", [b"", b"never read"], ids=["all-read", "unread"])
def test_killed_target(mode, unread, start, tunnel):
    """The kernel closes for a killed process: with a reset where bytes were unread, else with an end."""
    program = start(sys.executable, "-c", STUBBORN_TARGET)
    made = tunnel(int(program.wait_for(r"port (\d+)").group(1)), mode)
    with made.connect() as originator:
        assert receive_exactly(originator, 1) == b"!"
        originator.sendall(unread)
        if unread:
            eventually(functools.partial(has_unread_bytes, program), "the bytes arrived at the target")
        program.stop(signal.SIGKILL)
        if unread:
            with pytest.raises(ConnectionResetError):
                originator.recv(1)
        else:
            assert originator.recv(1) == b""
            send_until_cut(originator)


def has_unread_bytes(program):
    """Whether a TCP connection of the program has bytes that it has not read (/proc/net/tcp: tx_queue:rx_queue, inode)."""
    if not os.path.exists("/proc/net/tcp"):
        pytest.skip("no /proc on this system")
    folder = "/proc/%d/fd" % program.process.pid
    held = {os.readlink(os.path.join(folder, name)) for name in os.listdir(folder)}
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    # State 01 is an established connection: a listener's queue counts connections.
    return any("socket:[%s]" % row[9] in held and row[3] == "01" and int(row[4].partition(":")[2], 16) for row in rows)


@every_mode
def test_killed_client_is_seen_by_the_target(mode, joined):
    ends = joined(mode)
    talk(ends.originator, ends.target)
    before = descriptors(ends.tunnel.server)
    ends.tunnel.client.stop(signal.SIGKILL)
    assert_ended(ends.target)
    send_until_cut(ends.target)
    eventually(lambda: descriptors(ends.tunnel.server) < before, "the server let go of the connection")


@every_mode
def test_killed_server_is_seen_by_the_originator_and_may_come_back(mode, joined, join, serve):
    """A client is started once and left alone for months: its server's restart must not end it."""
    ends = joined(mode, connect_flags=("--connect-timeout", "1"))  # seconds that each connection waits for a server
    talk(ends.originator, ends.target)
    ends.tunnel.server.stop(signal.SIGKILL)
    assert_ended(ends.originator)
    send_until_cut(ends.originator)
    for _ in range(3):
        assert_refused(ends.tunnel.port)
    says(ends.tunnel.client, "127.0.0.1:%d" % ends.tunnel.server_port, "refused")
    serve(*mode.serve, bind="127.0.0.1:%d" % ends.tunnel.server_port)
    again = join(ends.tunnel)
    talk(again.originator, again.target)


# ---------------------------------------------------------------------------------------------------- remotes that fail


@every_mode
def test_refusing_remote(mode, closed, tunnel):
    made = tunnel(port_of(closed), mode)
    assert_refused(made.port)
    for program in (made.server, made.client):
        says(program, "127.0.0.1:%d" % port_of(closed), "refused")
    # The next connection succeeds if its target does.
    closed.listen()
    closed.settimeout(PATIENCE)
    with made.connect() as originator:
        target = closed.accept()[0]
        with target:
            target.settimeout(PATIENCE)
            talk(originator, target)


@every_mode
def test_unresolvable_remotes(mode, forward, tcp_echo):
    """The second fails inside Python's own encoding of host names, with a UnicodeError, before any look-up."""
    names = "does-not-exist.invalid", "%s.invalid" % ("a" * 64)
    server, client = forward(mode, *["0:%s:80" % name for name in names], "0:%d" % tcp_echo.port)
    for n, name in enumerate(names, 1):
        assert_refused(tcp_port(client, n))
        for program in (server, client):
            says(program, re.escape(name), "look.?up|resolv|not known")
    ask(tcp_port(client, len(names) + 1))


@pytest.fixture
def mute_resolver(tmp_path):
    """(what to put before a command so that its look-ups ask a name server that never answers, that name server's socket)"""
    unshare = need("unshare")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.77\noptions timeout:30 attempts:5\n")
    prefix = unshare, "-m", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', tmp_path / "resolv.conf"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind(("127.0.0.77", 53))
            subprocess.run([str(word) for word in prefix + ("true",)], check=True, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            missing("permission to stand in for the name server")
        server.settimeout(PATIENCE)
        yield prefix, server


def test_lookups_that_hang_hold_up_no_address(mute_resolver, start, ratrod, keys, tcp_echo):
    """A name server that does not answer occupies what looks names up; a target that is an address needs none of that."""
    prefix, resolver = mute_resolver
    server = start(*prefix, *RATROD, "-k", keys.server.path, "serve", *ANY.serve, "127.0.0.1:0")
    client = ratrod("-k", keys.client.path, "connect", *ANY.connect, "127.0.0.1:%s" % server.wait_for(STARTED).group(1),
                    "0:nobody-answers.example:80", "0:127.0.0.1:%d" % tcp_echo.port)
    client.wait_for(READY)
    with contextlib.ExitStack() as stack:
        # More than there are threads for look-ups, fewer than the 32 connects that one client may have under way.
        for _ in range(24):
            stack.enter_context(dial(tcp_port(client)))
        # The first questions show that the look-ups have begun.
        for _ in range(4):
            resolver.recv(512)
        ask(tcp_port(client, 2))


# ---------------------------------------------------------------------------------------------------- many connections


@pytest.fixture
def web(tmp_path):
    """(port, files by name): a real HTTP server and what it serves."""
    folder = tmp_path / "www"
    folder.mkdir()
    files = {"file%d" % n: os.urandom(n * 997) for n in range(1, 101)}
    for name, content in files.items():
        (folder / name).write_bytes(content)

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1000

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], files
        server.shutdown()


@every_mode
def test_100_parallel_curl_requests(mode, tunnel, web, tmp_path):
    port, files = web
    curl = need("curl")
    made = tunnel(port, mode)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    done = subprocess.run([curl, "-sS", "--fail", "--noproxy", "*", "--parallel", "--parallel-immediate", "--parallel-max", "100",
                           "-o", str(fetched / "file#1"), "http://127.0.0.1:%d/file[1-100]" % made.port],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout.decode()
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == files


@every_mode
def test_200_connections_at_once(mode, tunnel, tcp_echo):
    made = tunnel(tcp_echo.port, mode)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(made.connect()) for _ in range(200)]
        for n, connection in enumerate(connections):
            connection.sendall(b"number %03d" % n)
        for n, connection in enumerate(connections):
            assert receive_exactly(connection, 10) == b"number %03d" % n
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)
        for connection in connections:
            assert connection.recv(1) == b""


def leave_without_a_word(port):
    dial(port).close()


def leave_with_a_reset(port):
    connection = dial(port)
    connection.sendall(b"?")
    reset(connection)


@every_mode
def test_many_short_connections_leave_nothing_behind(mode, forward, tcp_echo, closed):
    server, client = forward(mode, "0:%d" % tcp_echo.port, "0:%d" % port_of(closed))
    working, refusing = tcp_port(client), tcp_port(client, 2)
    ask(working)
    before = {program: descriptors(program) for program in (server, client)}
    for n in range(300):
        ask(working, b"%d" % n)
        if n % 10 == 0:
            leave_without_a_word(working)
            leave_with_a_reset(working)
            assert_refused(refusing)
    for program in (server, client):
        # A few links may be kept for the next connections; one descriptor in thirty would be a leak.
        eventually(lambda program=program: descriptors(program) <= before[program] + 10,
                   lambda program=program: "%d descriptors after %d" % (descriptors(program), before[program]))
    ask(working)


@pytest.mark.parametrize("limited", ["serve", "connect"])
def test_descriptors_run_out(limited, start, keys, tcp_echo):
    """40 are too few for 60 connections. Some fail; then all is as before, whichever of its calls the program was in."""
    def launch(command, *words):
        limit = "ulimit -n 40 && " if command == limited else ""
        return start("sh", "-c", limit + 'exec "$@"', "sh", *RATROD, "-k", getattr(keys, "server" if command == "serve" else "client").path,
                     command, *words)

    server = launch("serve", *ANY.serve, "127.0.0.1:0")
    client = launch("connect", *ANY.connect, "127.0.0.1:%s" % server.wait_for(STARTED).group(1), "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    port = tcp_port(client)
    ask(port)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(dial(port))
        {"serve": server, "connect": client}[limited].wait_for("cannot accept connections for now: ")
    eventually(lambda: is_answered(port), "an answer after the others left")
    for _ in range(100):
        ask(port)
    for program in (server, client):
        # A key list that could not be opened may authorize nobody, but must not send its owner to look for a missing line.
        assert not re.search("does not know this client|not in the known hosts", program.output), program.output


def is_answered(port):
    with contextlib.suppress(ConnectionResetError):
        ask(port)
        return True


@every_mode
def test_verbose_log_of_a_connection(mode, tunnel, target):
    """Its addresses, its bytes each way; never the bytes themselves."""
    def exchange(connection):
        receive_exactly(connection, 1234)
        connection.sendall(b"answer " * 811)
    made = tunnel(target(exchange).port, mode, serve_flags=("-v",), connect_flags=("-v",))
    with made.connect() as connection:
        connection.sendall((b"secret " * 200)[:1234])
        assert receive_all(connection) == b"answer " * 811
        originator = r"127\.0\.0\.1:%d\b" % port_of(connection)
    says(made.client, originator, r"\b1234\b", r"\b5677\b")
    says(made.server, r"\b1234\b", r"\b5677\b")
    for program in (made.client, made.server):
        assert "secret" not in program.output and "answer " not in program.output


# ---------------------------------------------------------------------------------------------------- tunnel forms and addresses


def test_ipv6_tunnel(forward, target):
    inside = target(echo, host="::1")
    _, client = forward(ANY, "[::1]:0:[::1]:%d" % inside.port)
    says(client, r"\[TCP\] Listening on `\[::1\]:%d`" % tcp_port(client), r"to `\[::1\]:%d`" % inside.port)
    ask(tcp_port(client), host="::1")


def test_ipv6_wildcard_takes_ipv4_too_and_shows_it_as_such(forward, tcp_echo):
    _, client = forward(ANY, "[::]:0:127.0.0.1:%d" % tcp_echo.port, connect_flags=("-v",))
    ask(tcp_port(client), host="::1")
    with dial(tcp_port(client)) as connection:
        talk_to_echo(connection)
        says(client, r"127\.0\.0\.1:%d\b" % port_of(connection))
    assert "::ffff:" not in client.output


def talk_to_echo(connection, message=b"still there?"):
    connection.sendall(message)
    assert receive_exactly(connection, len(message)) == message


def test_localhost_is_both_families(forward, tcp_echo):
    _, client = forward(ANY, "localhost:0:127.0.0.1:%d" % tcp_echo.port)
    for host in ("127.0.0.1", "::1"):
        ask(tcp_port(client), host=host)


def test_tunnel_form_with_four_parts(forward, tcp_echo):
    port = free_port()
    _, client = forward(ANY, "0.0.0.0:%d:127.0.0.1:%d" % (port, tcp_echo.port))
    client.wait_for(r"\[TCP\] Listening on `0\.0\.0\.0:%d`, and routing through `127\.0\.0\.1:\d+` to `127\.0\.0\.1:%d` \.\.\." %
                    (port, tcp_echo.port))
    ask(port)
    ask(port, host="127.0.0.2")


def test_tunnel_form_with_three_parts(forward, tcp_echo):
    """Without a local host it is loopback that listens, and nothing else."""
    port = free_port()
    _, client = forward(ANY, "%d:localhost:%d" % (port, tcp_echo.port))
    client.wait_for(r"\[TCP\] Listening on `127\.0\.0\.1:%d`, .* to `localhost:%d` \.\.\." % (port, tcp_echo.port))
    ask(port)
    with pytest.raises(ConnectionRefusedError):
        dial(port, "127.0.0.2")


def test_tunnel_form_with_two_parts(forward, tcp_echo):
    port = free_port()
    _, client = forward(ANY, "%d:%d" % (port, tcp_echo.port))
    client.wait_for(r"\[TCP\] Listening on `127\.0\.0\.1:%d`, .* to `127\.0\.0\.1:%d` \.\.\." % (port, tcp_echo.port))
    ask(port)


def test_tunnel_form_with_one_part(namespace, start, ratrod, keys, target):
    """The same port at both ends needs two machines."""
    inside = namespace.make(target, echo)
    server = start(*namespace.command, *RATROD, "-k", keys.server.path, "serve", *ANY.serve, "%s:0" % namespace.address)
    address = "%s:%s" % (namespace.address, server.wait_for(STARTED).group(1))
    client = ratrod("-k", keys.client.path, "connect", *ANY.connect, address, inside.port)
    client.wait_for(READY)
    client.wait_for(r"\[TCP\] Listening on `127\.0\.0\.1:%d`, and routing through `%s` to `127\.0\.0\.1:%d` \.\.\." %
                    (inside.port, re.escape(address), inside.port))
    ask(inside.port)


def test_two_tunnels_on_one_client(forward, target):
    first, second = (target(lambda connection, name=name: connection.sendall(name)) for name in (b"first", b"second"))
    _, client = forward(ANY, "0:%d" % first.port, "0:%d" % second.port)
    for n, name in ((2, b"second"), (1, b"first"), (2, b"second")):
        with dial(tcp_port(client, n)) as connection:
            assert receive_all(connection) == name


# ---------------------------------------------------------------------------------------------------- policy


NOT_ALLOWED = "not allowed by this server"


@pytest.mark.parametrize("regex, host, allowed", [
    (r"127\.0\.0\.1", "127.0.0.1", True),
    (r"127\.0\.0\.1:PORT", "127.0.0.1", True),
    (r".*:PORT", "127.0.0.1", True),
    (r"localhost", "localhost", True),
    (r"a|127\.0\.0\.1|b", "127.0.0.1", True),
    # The whole must match, not a part of it; an alternative too.
    (r"127\.0\.0", "127.0.0.1", False),
    (r"0\.0\.1:PORT", "127.0.0.1", False),
    (r"127|a", "127.0.0.1", False),
    (r"127\.0\.0\.1:PORT0", "127.0.0.1", False),
    (r"127\.0\.0\.1", "localhost", False),
    # An address is compared in its canonical form, however it is written.
    (r"127\.0\.0\.1:PORT", "[::ffff:127.0.0.1]", True),
    (r"127\.0\.0\.1:PORT", "[::ffff:7f00:1]", True),
    (r"::ffff:.*", "[::ffff:127.0.0.1]", False),
    (r"0:0:.*", "[0:0:0:0:0:ffff:7f00:1]", False),
])
def test_remote_regex(regex, host, allowed, forward, tcp_echo):
    regex = regex.replace("PORT", str(tcp_echo.port))
    _, client = forward(ANY, "0:%s:%d" % (host, tcp_echo.port), serve_flags=("-r", regex))
    if allowed:
        ask(tcp_port(client))
    else:
        assert_refused(tcp_port(client))
        client.wait_for(NOT_ALLOWED)
        assert tcp_echo.accepted == 0


@every_mode
def test_client_is_told_that_it_may_not_and_never_the_regex(mode, forward, tcp_echo, closed):
    server, client = forward(mode, "0:%d" % tcp_echo.port, "0:%d" % port_of(closed), serve_flags=(
        "-r", r"an-internal-name\.example|127\.0\.0\.1:%d" % tcp_echo.port))
    assert_refused(tcp_port(client, 2))
    says(client, NOT_ALLOWED, "127.0.0.1:%d" % port_of(closed))
    says(server, NOT_ALLOWED + "|regex", "127.0.0.1:%d" % port_of(closed))
    ask(tcp_port(client))
    assert "internal-name" not in client.output


def test_legacy_spellings_that_only_a_resolver_understands(serve, keys, tcp_echo):
    """Each of these would reach loopback, or something, if it came as far as connect(); a filter that reads them differently is no filter."""
    _, port = serve(*LEGACY.serve)
    identity = legacy_peer.Identity.load(keys.client.path)
    hosts = ["127.1", "127.0.1", "0x7f000001", "0x7f.1", "2130706433", "017700000001", "127.0.0.01", "0177.0.0.1", "a.0x7f", "a.1",
             "127.0.0.1..", "a..b", ".", "", "\uff11\uff12\uff17.0.0.1", "127\u30020.0.1", "local\uff48ost", " 127.0.0.1", "127.0.0.1 ",
             "[127.0.0.1]", "::1", "[::1%lo]", "[::1", "0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "224.0.0.1", "[ff02::1]",
             "127.0.0.1\0", "127.0.0.1\n", "a@127.0.0.1", "a" * 254, "127.0.0.1:80"]
    ports = ["0%d", "+%d", " %d", "%d ", "%d\n", "%d\0", "-%d", "%d0000", "%d.0", "0x%x"]
    remotes = ["%s:%d" % (host, tcp_echo.port) for host in hosts]
    remotes += ["127.0.0.1:" + form % tcp_echo.port for form in ports]
    remotes += ["127.0.0.1:" + "".join(chr(0xff10 + int(digit)) for digit in str(tcp_echo.port)), "127.0.0.1:0", "127.0.0.1:", "127.0.0.1",
                "unix:/tmp/nothing-here", "%d" % tcp_echo.port, ":"]
    answers = {remote: legacy_answer(port, identity, remote) for remote in remotes}
    assert {remote: answer for remote, answer in answers.items() if answer != NOT_ALLOWED} == {}
    assert tcp_echo.accepted == 0
    assert legacy_answer(port, identity, "127.0.0.1:%d" % tcp_echo.port) == "accepted"


def legacy_answer(port, identity, remote):
    """What a legacy client is told that asks for `remote`."""
    with legacy_peer.Client(dial(port), identity, remote) as client:
        try:
            client.handshake()
            return "accepted"
        except legacy_peer.Refused as refused:
            return refused.error.text
        except OSError as error:
            return repr(error)


def name_of_loopback():
    """A name other than localhost that this machine resolves to 127.0.0.1."""
    with contextlib.suppress(OSError), open("/etc/hosts") as lines:
        names = itertools.chain.from_iterable(line.partition("#")[0].split()[1:] for line in lines if line.startswith("127."))
        for name in names:
            with contextlib.suppress(OSError):
                if not name.startswith("localhost") and socket.gethostbyname(name) == "127.0.0.1":
                    return name
    return pytest.skip("no name but localhost is 127.0.0.1 here")


@pytest.mark.parametrize("regex, allowed", [
    (None, True), (r"NAME", False), (r"NAME:.*", False), (r"NAME|127\.0\.0\.1", True), (r"NAME|127\.0\.0\.1:PORT", True)])
def test_allowed_name_of_a_loopback_address(regex, allowed, forward, tcp_echo):
    """Whoever rules over a name could point it at the server's own loopback: under a regex that address must be allowed as well."""
    name = name_of_loopback()
    flags = ("-r", regex.replace("NAME", name).replace("PORT", str(tcp_echo.port))) if regex else ()
    _, client = forward(ANY, "0:%s:%d" % (name, tcp_echo.port), serve_flags=flags)
    if allowed:
        ask(tcp_port(client))
    else:
        assert_refused(tcp_port(client))
        client.wait_for(NOT_ALLOWED)
        assert tcp_echo.accepted == 0


# ---------------------------------------------------------------------------------------------------- key files that change


@every_mode
def test_authorized_keys_are_read_again(mode, keys, serve, connect, tcp_echo):
    keys.server.write("authorized_keys", "")
    server, port = serve(*mode.serve)
    stranger = connect(port, *mode.connect, "0:%d" % tcp_echo.port)
    assert stranger.wait() == 3
    keys.server.trust(keys.client, "authorized_keys")
    client = connect(port, *mode.connect, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))
    keys.server.write("authorized_keys", "")
    assert_shown_the_door(client)
    says(server, keys.client.public)
    keys.server.trust(keys.client, "authorized_keys")
    client = connect(port, *mode.connect, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))


def assert_shown_the_door(client):
    """Its key is not accepted any more: nothing gets through, and as soon as it needs a new link it ends and says what to do."""
    port = tcp_port(client)

    def ended():
        with pytest.raises(ConnectionError):
            ask(port)
        return client.process.poll() is not None

    eventually(ended, "the client ended")
    assert client.wait() == 3
    says(client, "authorized_keys")


@every_mode
def test_removed_key_loses_its_streams(mode, keys, joined):
    """Who takes a key out of authorized_keys wants it out now, not when its last connection happens to end."""
    ends = joined(mode)
    talk(ends.originator, ends.target)
    keys.server.write("authorized_keys", "# nobody\n")
    for end in (ends.originator, ends.target):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


@every_mode
def test_authorized_keys_that_cannot_be_read_authorize_nobody(mode, keys, tunnel, connect, tcp_echo):
    """A folder in its place: to root, which tests often run as, no file is unreadable."""
    made = tunnel(tcp_echo.port, mode)
    ask(made.port)
    path = keys.server.path / "authorized_keys"
    path.rename(keys.server.path / "elsewhere")
    path.mkdir()
    assert_shown_the_door(made.client)
    path.rmdir()
    (keys.server.path / "elsewhere").rename(path)
    again = connect(made.server_port, *mode.connect, "0:%d" % tcp_echo.port)
    again.wait_for(READY)
    ask(tcp_port(again))


@pytest.mark.parametrize("mode", [LEGACY], ids=["legacy"])
def test_legacy_known_hosts_are_read_again(mode, keys, tunnel, connect, tcp_echo):
    """In legacy, every connection is a handshake of its own; a server whose key is not the one that is known ends the client at once."""
    made = tunnel(tcp_echo.port, mode)
    ask(made.port)
    known = keys.client.path / "known_hosts"
    known.write_text("%s 127.0.0.1:%d\n" % (keys.server.public, made.server_port))
    ask(made.port)
    # A line for this address alone counts, once there is one.
    known.write_text("%s\n%s 127.0.0.1:%d\n" % (keys.server.public, keys.client.public, made.server_port))
    assert_refused(made.port)
    assert made.client.wait() == 3
    known.write_text("")
    again = connect(made.server_port, *mode.connect, "0:%d" % tcp_echo.port)
    assert again.wait() == 3
    says(again, keys.server.public, "known.hosts")


@every_mode
def test_known_hosts_line_for_another_address_does_not_count(mode, keys, serve, connect, tcp_echo):
    keys.client.write("known_hosts", "%s 127.0.0.1:1\n" % keys.server.public)
    _, port = serve(*mode.serve)
    client = connect(port, *mode.connect, "0:%d" % tcp_echo.port)
    assert client.wait() == 3
    says(client, keys.server.public, "known.hosts")
