"""Reverse tunnels (`R:`): the server listens, and the client connects to what its own command line names.

Whole programs. What passes on their links is in test_reverse_links.py.
"""

import collections
import contextlib
import hashlib
import os
import queue
import re
import signal
import socket
import struct
import tempfile
import threading
import time
from typing import NamedTuple

import pytest

from support import ratrod2_peer as peer
from support.keys import seed_of
from support.pressure import memory_before, peak_growth
from support.programs import AUTHENTICATION_FAILED, PATIENCE, READY, descriptors, tcp_port
from support.sockets import ask, dial, eventually, free_port, port_of, receive_all, receive_exactly, reset

pytestmark = pytest.mark.usefixtures("no_traceback")

REFUSED = "not allowed by this server"  # the same for every reason: it teaches a prober nothing
BULK = 20 << 20


def works(port):
    """Whether a whole connection to an echo succeeds, for eventually()."""
    try:
        ask(port)
    except (OSError, AssertionError):
        return False
    return True


def refused(port):
    """Whether nobody listens there."""
    try:
        dial(port).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def greeting(port):
    with dial(port) as connection:
        return receive_all(connection)


def says(word):
    """A target that waits for nothing."""
    return lambda connection: connection.sendall(word)


def converse(connection, words):
    """Says `words` and ends, while it hears the other to the end: what that said."""
    def say():
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    heard = receive_all(connection)
    speaker.join(PATIENCE)
    return heard


def digest(data):
    return hashlib.sha256(data).hexdigest()


def bound(client, remote="", host=r"127\.0\.0\.1"):
    """The port at which the server listens for the R: tunnel to `remote`."""
    return int(client.wait_for(r"\[TCP\] `.*?` listens on `%s:(\d+)`, and routing back to `.*?%s` \.\.\." % (host, re.escape(remote))).group(1))


def handshakes(server):
    """How many handshakes `serve -v` has completed."""
    return sum("Accepted" in line for line in server.lines)


def identity_of(keys):
    return peer.Identity.from_seed(seed_of(keys)).public


def permit(keys, options):
    """Makes the client's key the only line of authorized_keys, with these options."""
    keys.server.write("authorized_keys", "%s %s\n" % (keys.client.public, options))


@pytest.fixture
def client(ratrod, keys):
    """client(server_port, TUNNEL words..., who=Keys, flags=()) -> Program, not yet awaited."""
    def launch(server_port, *tunnels, who=None, flags=()):
        return ratrod("-k", (who or keys.client).path, "connect", *flags, "127.0.0.1:%d" % server_port, *tunnels)
    return launch


class Reverse(NamedTuple):
    """A server, a client with one reverse tunnel, and the `port` where the server listens for it."""

    server: object
    client: object
    server_port: int
    port: int

    def dial(self):
        return dial(self.port)


@pytest.fixture
def reverse(serve, client):
    """reverse(target port) -> Reverse"""
    def launch(target_port, listen="0"):
        server, server_port = serve("-v", "--allow-listen")
        program = client(server_port, "R:%s:127.0.0.1:%d" % (listen, target_port), flags=("-v",))
        return Reverse(server, program, server_port, bound(program))
    return launch


# ---------------------------------------------------------------------------------------------------- streams


def test_an_echo(reverse, tcp_echo):
    made = reverse(tcp_echo.port)
    assert made.port not in (0, tcp_echo.port, made.server_port)
    for question in (b"?", b"", b"x" * 100_000):
        ask(made.port, question)


def test_the_server_side_listens_on_loopback_alone(reverse, tcp_echo):
    """A bare port is loopback: what another address of this machine gives is no listener of ours."""
    made = reverse(tcp_echo.port)
    with pytest.raises(OSError):
        dial(made.port, "127.0.0.2").close()


def test_bulk_both_ways_at_once(reverse, target):
    up, down = os.urandom(BULK), os.urandom(BULK)
    heard = queue.Queue()
    made = reverse(target(lambda connection: heard.put(digest(converse(connection, down)))).port)
    with made.dial() as connection:
        assert digest(converse(connection, up)) == digest(down)
    assert heard.get(timeout=PATIENCE) == digest(up)


def test_the_originator_ends_first(reverse, target):
    made = reverse(target(lambda connection: connection.sendall(receive_all(connection)[::-1])).port)
    with made.dial() as connection:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b"olleh"


def test_the_target_ends_first(reverse, target):
    heard = queue.Queue()

    def handle(connection):
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        heard.put(receive_all(connection))
    made = reverse(target(handle).port)
    with made.dial() as connection:
        assert receive_all(connection) == b"bye"
        connection.sendall(b"wait, there is more")
        connection.shutdown(socket.SHUT_WR)
        assert heard.get(timeout=PATIENCE) == b"wait, there is more"


def test_a_reset_of_the_originator_reaches_the_target(reverse, target):
    ends = queue.Queue()

    def handle(connection):
        connection.sendall(b"!")
        try:
            ends.put(connection.recv(1))
        except OSError as error:
            ends.put(error)
    made = reverse(target(handle).port)
    connection = made.dial()
    receive_exactly(connection, 1)
    reset(connection)
    assert isinstance(ends.get(timeout=PATIENCE), ConnectionResetError)


def test_a_reset_of_the_target_reaches_the_originator(reverse, target):
    made = reverse(target(lambda connection: (receive_exactly(connection, 1), reset(connection))).port)
    with made.dial() as connection:
        connection.sendall(b"!")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_the_target_speaks_first(reverse, target):
    made = reverse(target(says(b"220 hello\r\n")).port)
    assert [greeting(made.port) for _ in range(3)] == [b"220 hello\r\n"] * 3


def test_a_target_that_refuses_is_a_reset(reverse):
    """Of the originator; the tunnel lives on, however often."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        made = reverse(port_of(closed))
        for _ in range(20):
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                with made.dial() as connection:
                    connection.sendall(b"hello")
                    assert connection.recv(1) == b"", "data out of nowhere"
                    pytest.fail("a clean end")
        made.client.wait_for("127.0.0.1:%d.*Connection refused" % port_of(closed))
        closed.listen()
        with made.dial() as connection:
            connection.sendall(b"hello")
            there, _ = closed.accept()
            with there:
                assert receive_exactly(there, 5) == b"hello"


def come_to_rest(count):
    """Waits until count() has not changed for half a second: that nothing moves announces itself by nothing else."""
    seen = [count(), time.monotonic()]

    def rests():
        if count() != seen[0]:
            seen[:] = count(), time.monotonic()
        return time.monotonic() - seen[1] > 0.5
    eventually(rests, "it comes to rest")


def test_a_slow_reader_holds_up_its_own_stream_alone(reverse, target):
    """What it does not read stays with the target: neither program keeps it."""
    block, blocks = os.urandom(1 << 20), 100
    sent = []

    def handle(connection):
        if receive_exactly(connection, 1) == b"q":
            return connection.sendall(b"q")
        for _ in range(blocks):
            connection.sendall(block)
            sent.append(1)
    made = reverse(target(handle).port)
    with made.dial() as slow:
        before = [(program, memory_before(program)) for program in (made.server, made.client)]
        slow.sendall(b"s")
        come_to_rest(lambda: len(sent))
        assert len(sent) < blocks, "somebody holds %d MB" % blocks
        with made.dial() as quick:
            quick.sendall(b"q")
            assert receive_all(quick) == b"q"
        assert all(peak_growth(*each) < 16 << 20 for each in before)
        for _ in range(blocks):
            assert digest(receive_exactly(slow, len(block))) == digest(block)
        assert slow.recv(1) == b""


def test_100_connections_at_once(reverse, target):
    """The target answers none before it has all: many more than there are waiting links."""
    everybody = threading.Barrier(100)

    def handle(connection):
        data = receive_exactly(connection, 4)
        everybody.wait(PATIENCE)
        connection.sendall(data)
    made = reverse(target(handle).port)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(made.dial()) for _ in range(100)]
        for number, connection in enumerate(connections):
            connection.sendall(struct.pack(">I", number))
        for number, connection in enumerate(connections):
            assert receive_all(connection) == struct.pack(">I", number)


def test_many_in_a_row_share_a_few_links(reverse, tcp_echo):
    """A link that comes back is used again, and does not come on top of the one that has replaced it: neither handshakes nor descriptors grow."""
    made = reverse(tcp_echo.port)
    for _ in range(20):
        ask(made.port)
    before = [descriptors(program) for program in (made.server, made.client)]
    shaken = handshakes(made.server)
    for _ in range(300):
        ask(made.port)
    eventually(lambda: all(descriptors(program) <= n + 4 for program, n in zip((made.server, made.client), before)),
               lambda: "back to about %s descriptors: %s" % (before, [descriptors(program) for program in (made.server, made.client)]))
    assert handshakes(made.server) - shaken <= 30


def test_a_burst_leaves_no_links_behind(reverse, tcp_echo):
    """No more than the waiting links that a listener may have, and what the client keeps for itself."""
    made = reverse(tcp_echo.port)
    ask(made.port)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(made.dial()) for _ in range(50)]
        for connection in connections:
            connection.sendall(b"?")
            receive_exactly(connection, 1)
        held = descriptors(made.client)
    eventually(lambda: descriptors(made.client) < held - 50, lambda: "%d at the peak, %d now" % (held, descriptors(made.client)))
    ask(made.port)


# ---------------------------------------------------------------------------------------------------- permission


def assert_start_fails(program, *patterns):
    """It ends with code 1, and one line of its output has all of these."""
    assert program.wait() == 1, program.output
    assert any(all(re.search(pattern, line) for pattern in patterns) for line in program.lines), program.output


def test_a_server_that_was_not_started_for_it(serve, client, tcp_echo):
    server, server_port = serve()
    port = free_port()
    assert_start_fails(client(server_port, "R:%d:127.0.0.1:%d" % (port, tcp_echo.port)), REFUSED, "%d" % port)
    server.wait_for("❌.* refused: .*--allow-listen")
    assert refused(port)
    ordinary = client(server_port, "0:127.0.0.1:%d" % tcp_echo.port)
    ask(tcp_port(ordinary))


def test_one_refusal_ends_the_client_with_all_its_tunnels(serve, client, keys, tcp_echo):
    """A service that was asked for and is not there must not look like one that is."""
    permit(keys, 'permitlisten="127.0.0.1:1"')
    _, server_port = serve("--allow-listen")
    assert_start_fails(client(server_port, "0:127.0.0.1:%d" % tcp_echo.port, "R:0:127.0.0.1:%d" % tcp_echo.port), REFUSED)


@pytest.mark.parametrize("option, allowed", [('permitlisten="127.0.0.1:1" permitlisten="{port}"', True), ('permitlisten="127.0.0.1:1"', False)])
def test_permitlisten(serve, client, keys, tcp_echo, option, allowed):
    port = free_port()
    permit(keys, option.format(port=port))
    server, server_port = serve("--allow-listen")
    program = client(server_port, "R:%d:127.0.0.1:%d" % (port, tcp_echo.port))
    if allowed:
        ask(bound(program))
    else:
        assert_start_fails(program, REFUSED)
        server.wait_for("❌.* refused: ")
        assert refused(port)


def test_four_listeners_for_a_key(serve, client, tcp_echo, target):
    """For all its clients together; another key has four of its own."""
    _, server_port = serve("--allow-listen")
    ports = [target(says(b"%d" % number)).port for number in range(5)]
    tunnels = ["R:0:127.0.0.1:%d" % port for port in ports]
    assert_start_fails(client(server_port, *tunnels), ".")
    four = client(server_port, *tunnels[:4])
    bounds = [bound(four, ":%d" % port) for port in ports[:4]]
    assert_start_fails(client(server_port, tunnels[4]), ".")
    assert [greeting(port) for port in bounds] == [b"0", b"1", b"2", b"3"]


def test_four_listeners_of_each_key(serve, client, second, keys, target):
    _, server_port = serve("--allow-listen")
    ports = [target(says(b"%d" % number)).port for number in range(4)]
    programs = [client(server_port, *["R:0:127.0.0.1:%d" % port for port in ports], who=who) for who in (keys.client, second)]
    bounds = [bound(program, ":%d" % port) for program in programs for port in ports]
    assert len(set(bounds)) == 8
    assert [greeting(port) for port in bounds] == [b"0", b"1", b"2", b"3"] * 2


@pytest.mark.parametrize("flag", ["--max-streams", "--max-streams-per-key"])
def test_streams_have_a_bound_here_too(serve, client, tcp_echo, flag):
    """Those that wait for a link included: who reaches the listener must not use up the server's descriptors."""
    server, port = serve("--allow-listen", flag, "2")
    reverse = bound(client(port, "R:0:127.0.0.1:%d" % tcp_echo.port))
    with dial(reverse) as first, dial(reverse) as second:
        for connection in (first, second):
            connection.sendall(b"ping")
            assert connection.recv(4) == b"ping"
        with dial(reverse) as third, pytest.raises(ConnectionResetError):
            third.recv(1)
        server.wait_for("carries as many streams .* as it takes \\(2\\)")

    def passes():
        with dial(reverse) as again, contextlib.suppress(ConnectionResetError):
            again.sendall(b"ping")
            return again.recv(4) == b"ping"
    eventually(passes, "there is room again")


def test_two_keys_want_one_port(reverse, client, second, tcp_echo):
    made = reverse(tcp_echo.port)
    assert_start_fails(client(made.server_port, "R:%d:127.0.0.1:1" % made.port, who=second), "in use", "%d" % made.port)
    ask(made.port)


def test_a_port_that_another_program_has(serve, client):
    _, server_port = serve("--allow-listen")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_start_fails(client(server_port, "R:%d:127.0.0.1:1" % port_of(taken)), "in use", "%d" % port_of(taken))


def test_an_address_that_the_server_does_not_have(serve, client):
    server, server_port = serve("--allow-listen")
    # From 192.0.2.0/24, which nobody has.
    assert_start_fails(client(server_port, "R:192.0.2.1:0:127.0.0.1:1"), "192.0.2.1")
    assert server.process.poll() is None


def test_a_key_that_is_removed(reverse, keys, target):
    """Its listener goes, and what is on it; the client is told why."""
    made = reverse(target(lambda connection: (connection.sendall(b"!"), connection.recv(1))).port)
    with made.dial() as connection:
        receive_exactly(connection, 1)
        keys.server.write("authorized_keys", "# nobody\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    eventually(lambda: refused(made.port), "the listener is gone")
    assert made.client.wait() == AUTHENTICATION_FAILED
    made.client.wait_for("authorized_keys")


def test_permission_to_listen_that_is_withdrawn(reverse, keys, tcp_echo):
    """The key stays, and may still open."""
    made = reverse(tcp_echo.port)
    ask(made.port)
    permit(keys, 'permitlisten="127.0.0.1:1"')
    eventually(lambda: refused(made.port), "the listener is gone")
    with peer.Client.connect(made.server_port, seed_of(keys.client)) as link:
        assert link.handshake().exchange("127.0.0.1:%d" % tcp_echo.port, b"still here") == b"still here"


# ---------------------------------------------------------------------------------------------------- who has the port


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_listener_ends_with_its_client(reverse, tcp_echo, sign):
    made = reverse(tcp_echo.port)
    ask(made.port)
    made.client.stop(sign)
    eventually(lambda: refused(made.port), "the listener is gone")
    assert made.server.process.poll() is None


class Callers:
    """Connects to a port over and over, until it is left: `heard` has what each connection said, or its error."""

    def __init__(self, port):
        self._port = port
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.heard = []

    def _run(self):
        while not self._done.is_set():
            try:
                self.heard.append(greeting(self._port))
            except OSError as error:
                self.heard.append(error)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join(PATIENCE)


def test_a_second_client_of_the_key_takes_the_port_over(reverse, client, target):
    """Without a gap, while the first lives: nobody who connects meanwhile is turned away, and who was connected stays so."""
    heard = queue.Queue()

    def old(connection):
        connection.sendall(b"old")
        connection.shutdown(socket.SHUT_WR)
        heard.put(receive_all(connection))
    made = reverse(target(old).port)
    with made.dial() as connection, Callers(made.port) as callers:
        assert receive_all(connection) == b"old"
        eventually(lambda: len(callers.heard) > 3, "they are answered")
        newcomer = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(b"new")).port))
        assert bound(newcomer) == made.port
        assert greeting(made.port) == b"new"
        eventually(lambda: callers.heard[-3:] == [b"new"] * 3, lambda: "the new one answers: %r" % callers.heard)
        connection.sendall(b"still here")
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: heard.get(timeout=PATIENCE) == b"still here", "what was begun goes on")
    assert set(callers.heard) == {b"old", b"new"}, callers.heard
    assert callers.heard == sorted(callers.heard, reverse=True), "the old one answered after the new one"


def test_who_came_last_keeps_the_port(reverse, client, target):
    """The first one lives on, and does not take it back. That nothing happens announces itself by nothing: 4 s are longer than its first pauses."""
    made = reverse(target(says(b"old")).port)
    assert greeting(made.port) == b"old"
    newcomer = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(b"new")).port))
    assert bound(newcomer) == made.port
    until = time.monotonic() + 4
    heard = collections.Counter()
    while time.monotonic() < until:
        heard[greeting(made.port)] += 1
        time.sleep(0.02)
    assert set(heard) == {b"new"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_comes_back_has_its_port_at_once(reverse, client, target, sign):
    """After a crash; and cut off with its machine, which the server does not hear: for it the old sockets are alive, as those of a stopped one."""
    made = reverse(target(says(b"old")).port)
    with made.dial() as connection:
        receive_exactly(connection, 3)
        made.client.process.send_signal(sign)
        try:
            again = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(b"new")).port))
            assert bound(again) == made.port
            assert [greeting(made.port) for _ in range(5)] == [b"new"] * 5
        finally:
            made.client.process.send_signal(signal.SIGCONT)


def test_a_client_that_crashed_resets_what_it_carried(reverse, target):
    made = reverse(target(lambda connection: (connection.sendall(b"!"), connection.recv(1))).port)
    with made.dial() as connection:
        receive_exactly(connection, 1)
        made.client.process.kill()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_was_started_anew(reverse, serve, tcp_echo, sign):
    """The client asks again by itself, for the port that it had."""
    made = reverse(tcp_echo.port)
    ask(made.port)
    made.server.stop(sign)
    eventually(lambda: refused(made.port), "the listener is gone")
    server, _ = serve("-v", "--allow-listen", bind="127.0.0.1:%d" % made.server_port)
    eventually(lambda: works(made.port), "it listens again")
    ask(made.port)
    assert made.client.process.poll() is None


# ---------------------------------------------------------------------------------------------------- forms


def test_ready_comes_before_or_with_the_listener(serve, client, tcp_echo):
    """Both lines come, and the program goes on, with nothing but a reverse tunnel."""
    _, server_port = serve("--allow-listen")
    program = client(server_port, "R:0:127.0.0.1:%d" % tcp_echo.port)
    program.wait_for(READY)
    ask(bound(program))
    assert program.process.poll() is None


@pytest.fixture
def unix_echo():
    """The path of a Unix socket that echoes. In a short folder: such paths have an end."""
    with tempfile.TemporaryDirectory(prefix="rt") as folder:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(folder, "echo"))
        listener.listen()

        def run():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(receive_all(connection))
        threading.Thread(target=run, daemon=True).start()
        yield os.path.join(folder, "echo")
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_back_to_a_unix_socket(serve, client, unix_echo):
    """It is the client's own: no permission of the server is needed."""
    _, server_port = serve("--allow-listen")
    program = client(server_port, "R:0:unix:%s" % unix_echo)
    ask(bound(program, "unix:%s" % unix_echo))


def test_several_tunnels_of_both_kinds(serve, client, target, udp_echo):
    server, server_port = serve("--allow-listen")
    ports = [target(says(b"%d" % number)).port for number in range(4)]
    program = client(server_port, "R:0:127.0.0.1:%d" % ports[0], "0:127.0.0.1:%d" % ports[1], "R:127.0.0.1:0:127.0.0.1:%d" % ports[2],
                     "0:127.0.0.1:%d" % ports[3])
    reached = [bound(program, ":%d" % ports[0]), tcp_port(program), bound(program, ":%d" % ports[2]), tcp_port(program, 2)]
    for _ in range(3):
        assert [greeting(port) for port in reached] == [b"0", b"1", b"2", b"3"]


def test_a_range(serve, client):
    _, server_port = serve("--allow-listen")
    with contextlib.ExitStack() as stack:
        near, far = free_port(3), free_port(3)
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", near + n))) for n in range(3)]
        program = client(server_port, "R:%d-%d:127.0.0.1:%d-%d" % (far, far + 2, near, near + 2))
        for n, listener in enumerate(listeners):
            assert bound(program, ":%d" % (near + n)) == far + n
            listener.settimeout(PATIENCE)
            with dial(far + n) as originator:
                originator.sendall(b"%d" % n)
                there, _ = listener.accept()
                with there:
                    assert receive_exactly(there, 1) == b"%d" % n


def test_ipv6(serve, client, target):
    try:
        made = target(says(b"six"), host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    _, server_port = serve("--allow-listen")
    program = client(server_port, "R:[::1]:0:[::1]:%d" % made.port)
    port = bound(program, host=r"\[::1\]")
    with dial(port, "::1") as connection:
        assert receive_all(connection) == b"six"


@pytest.mark.parametrize("flags", [("--legacy",), ("--legacy", "-e")])
def test_the_legacy_wire_has_nothing_for_it(client, flags):
    program = client(1, "R:0:127.0.0.1:1", flags=flags)
    assert program.wait() == 2
    program.wait_for("--legacy")


def test_workers_cannot_share_a_listener(ratrod, keys):
    """Each has connections of its own, and knows nothing of another's waiting links."""
    program = ratrod("-k", keys.server.path, "serve", "--allow-listen", "--workers", "2", "127.0.0.1:0")
    assert program.wait() == 2
    program.wait_for("--allow-listen.*--workers|--workers.*--allow-listen")


BAD_TUNNELS = ["R:", "R:0", "R:0:127.0.0.1", "R:x:127.0.0.1:1", "R:65536:127.0.0.1:1", "R:0:127.0.0.1:0", "R:0:127.1:1", "R:0:unix:relative",
               "R:0:socks", "R:stdio:127.0.0.1:1", "R:unix:/tmp/a:127.0.0.1:1", "R:1-3:127.0.0.1:1-2", "R:3-1:127.0.0.1:3-1"]


def test_what_is_no_reverse_tunnel(client):
    """The forms are shown: all of them, or that of ranges."""
    for text, program in [(text, client(1, text)) for text in BAD_TUNNELS]:
        assert program.wait() == 2, text
        assert re.search(r"R:\[host:\]port:|8000-8010:host:", program.output), text
