"""Reverse tunnels (`R:`): the server listens, and the client connects to what its own command line names.
What passes on their links is in test_reverse_links.py, what permitlisten permits in unit/test_core_grants.py."""

import contextlib
import ipaddress
import queue
import re
import signal
import socket
import struct
import threading
from typing import NamedTuple

import pytest

from support import ratrod2_peer as peer
from support import sockets
from support.keys import permit, seed_of
from support.many_lines import run_lines
from support.programs import AUTHENTICATION_FAILED, PATIENCE, assert_start_fails, bound, descriptors, handshakes, tcp_port
from support.proxy_headers import SIGNATURE
from support.rows import row
from support.sockets import accept, ask, dial, eventually, free_port, ping, port_of, receive_all, receive_exactly, refused, say, talk, works
from support.targets import UnixTarget, echo, says

pytestmark = pytest.mark.usefixtures("no_traceback")

REFUSED = "not allowed by this server"  # the same for every reason: it teaches a prober nothing


def greeting(port, host="127.0.0.1"):
    with dial(port, host) as connection:
        return receive_all(connection)


class Reverse(NamedTuple):
    """A server, a client with one reverse tunnel, and the `port` where the server listens for it."""

    server: object
    client: object
    server_port: int
    port: int


@pytest.fixture
def reverse(serve, client):
    """reverse(target port, flags of the client...) -> Reverse"""
    def launch(target_port, *flags):
        server, server_port = serve("-v", "--allow-listen")
        program = client(server_port, "R:0:127.0.0.1:%d" % target_port, flags=("-v", *flags))
        return Reverse(server, program, server_port, bound(program))
    return launch


class Stage:
    """A target that plays what the test puts on, one connection each."""

    def __init__(self, target):
        self.heard, self.plays = queue.Queue(), queue.Queue()
        self.port = target(lambda connection: self.plays.get(timeout=PATIENCE)(connection)).port

    def play(self, handle):
        self.plays.put(handle)

    def hears(self):
        return self.heard.get(timeout=PATIENCE)


@pytest.fixture
def stage(target):
    return Stage(target)


def test_streams_and_how_they_end(reverse, stage):
    """Whoever speaks or ends first, the other side learns it as without a tunnel; resets are in test_reverse_links.py."""
    made = reverse(stage.port)
    assert made.port not in (0, stage.port, made.server_port)
    # A bare port is loopback of both families: what another address of this machine gives is no listener of ours.
    with pytest.raises(OSError):
        dial(made.port, "127.0.0.2").close()
    for question, host in ((b"?", "::1"), (b"", "127.0.0.1"), (b"x" * 100_000, "127.0.0.1")):
        stage.play(echo)
        ask(made.port, question, host)
    stage.play(says(b"220 hello\r\n"))  # the target speaks first, and waits for nothing
    assert greeting(made.port) == b"220 hello\r\n"
    stage.play(lambda connection: (say(connection, b"bye"), stage.heard.put(receive_all(connection))))  # the target ends first
    with dial(made.port) as connection:
        assert receive_all(connection) == b"bye"
        say(connection, b"wait, there is more")
        assert stage.hears() == b"wait, there is more"


def test_a_target_that_refuses_is_a_reset(reverse):
    """Of the originator; the tunnel lives on, however often."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        made = reverse(port_of(closed))
        for _ in range(10):
            assert sockets.outcome_of(made.port, b"hello") == "reset"
        made.client.wait_for("127.0.0.1:%d.*Connection refused" % port_of(closed))
        closed.listen()
        with dial(made.port) as connection, accept(closed) as there:
            talk(connection, there)


def test_many_in_a_row_and_many_at_once(reverse, stage):
    """A link that comes back is used again, and does not come on top of the one that has replaced it; a burst gets more links than wait."""
    made = reverse(stage.port)
    def many(n):
        for _ in range(n):
            stage.play(echo)
            ask(made.port)
    many(20)
    before = [descriptors(program) for program in (made.server, made.client)]
    shaken = handshakes(made.server)
    many(150)
    eventually(lambda: all(descriptors(program) <= n + 4 for program, n in zip((made.server, made.client), before)),
               lambda: "back to about %s descriptors: %s" % (before, [descriptors(program) for program in (made.server, made.client)]))
    assert handshakes(made.server) - shaken <= 30
    # 100 at once, of which the target answers none before it has all.
    everybody, may_end = threading.Barrier(100), threading.Event()
    def answer_together(connection):
        data = receive_exactly(connection, 4)
        everybody.wait(PATIENCE)
        connection.sendall(data)
        may_end.wait(PATIENCE)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stage.play(answer_together)
        connections = [stack.enter_context(dial(made.port)) for _ in range(100)]
        for number, connection in enumerate(connections):
            connection.sendall(struct.pack(">I", number))
        for number, connection in enumerate(connections):
            assert receive_exactly(connection, 4) == struct.pack(">I", number)
        held = descriptors(made.client)
        may_end.set()
        for connection in connections:
            assert connection.recv(1) == b""
    # No more links are left than may wait for a listener, and what the client keeps for itself.
    eventually(lambda: descriptors(made.client) < held - 100, lambda: "%d at the peak, %d now" % (held, descriptors(made.client)))
    many(1)


def test_a_server_that_was_not_started_for_it(serve, client, keys, tcp_echo):
    """A key's own permission does not make up for the server's."""
    permit(keys, 'permitlisten="*:*"')
    server, server_port = serve()
    port = free_port()
    assert_start_fails(client(server_port, "R:%d:127.0.0.1:%d" % (port, tcp_echo.port)), REFUSED, "%d" % port)
    server.wait_for("❌.* refused: .*--allow-listen")
    assert refused(port)
    ask(tcp_port(client(server_port, "0:127.0.0.1:%d" % tcp_echo.port)))


def test_permitlisten(serve, client, keys, tcp_echo):
    port = free_port()
    permit(keys, 'permitlisten="127.0.0.1:1"')
    server, server_port = serve("--allow-listen")
    assert_start_fails(client(server_port, "R:%d:127.0.0.1:%d" % (port, tcp_echo.port)), REFUSED)
    server.wait_for("❌.* refused: ")
    assert refused(port)
    # A service that was asked for and is not there must not look like one that is: one refusal ends the client with all its tunnels.
    assert_start_fails(client(server_port, "0:127.0.0.1:%d" % tcp_echo.port, "R:0:127.0.0.1:%d" % tcp_echo.port), REFUSED)
    permit(keys, 'permitlisten="127.0.0.1:1" permitlisten="%d"' % port)
    ask(bound(client(server_port, "R:%d:127.0.0.1:%d" % (port, tcp_echo.port))))


def test_where_a_server_cannot_listen(reverse, client, second, target):
    """Beside another key's address: a visitor of `localhost` tries both families, of every address any: what is asked for must not take them away.
    On the server's own port, on another program's, on an address from 192.0.2.0/24, which nobody has."""
    made = reverse(target(says(b"first")).port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [("%s%d" % (host, port), said) for host in ("", "127.0.0.1:", "[::1]:", "localhost:", "0.0.0.0:", "[::]:", "*:") for port, said in (
            (made.port, "in use by another client"), (made.server_port, "in use|this server itself is on that port"))]
        cases += [("%d" % port_of(taken), "%d.*in use" % port_of(taken)), ("192.0.2.1:0", r"192\.0\.2\.1")]
        outcomes = run_lines([["-k", second.path, "connect", "127.0.0.1:%d" % made.server_port, "R:%s:127.0.0.1:1" % where] for where, _ in cases])
    for (where, said), outcome in zip(cases, outcomes):
        assert outcome.code == 1 and re.search(said, outcome.err), (where, outcome)
    other = target(says(b"other")).port
    assert bound(client(made.server_port, "R:127.0.0.2:%d:127.0.0.1:%d" % (made.port, other), who=second), host=r"127\.0\.0\.2") == made.port
    assert [greeting(made.port, host) for host in ("127.0.0.1", "::1", "127.0.0.2")] == [b"first", b"first", b"other"]


def test_64_listeners_for_a_key(serve, client, second, target):
    """For all its clients together; another key has 64 of its own, and a flag allows more."""
    _, server_port = serve("--allow-listen")
    first, remote = free_port(65), target(says(b"hello")).port
    many = "R:%d-%d:127.0.0.1:%d-%d"
    assert_start_fails(client(server_port, many % (first, first + 64, 1, 65)), "as many addresses as one may have")
    holder = client(server_port, many % (first, first + 62, 1, 63), "R:0:127.0.0.1:%d" % remote)
    assert greeting(bound(holder, ":%d" % remote)) == b"hello"
    assert_start_fails(client(server_port, "R:0:127.0.0.1:%d" % remote), "as many addresses as one may have")
    assert greeting(bound(client(server_port, "R:0:127.0.0.1:%d" % remote, who=second))) == b"hello"
    _, server_port = serve("--allow-listen", "--max-listeners-per-key", "2")
    assert_start_fails(client(server_port, *["R:0:127.0.0.1:1"] * 3), "one may have \\(2\\); serve --max-listeners-per-key allows more")


def test_streams_have_a_bound_here_too(serve, client, tcp_echo):
    """Those that wait for a link included: who reaches the listener must not use up the server's descriptors."""
    server, port = serve("--allow-listen", "--max-streams-per-key", "2")
    reverse = bound(client(port, "R:0:127.0.0.1:%d" % tcp_echo.port))
    with dial(reverse) as first, dial(reverse) as second:
        for connection in (first, second):
            ping(connection)
        sockets.assert_refused(reverse)
        server.wait_for("carries as many streams .* as it takes \\(2\\)")
    eventually(lambda: works(reverse), "there is room again")


def test_a_key_that_is_removed(reverse, keys, target):
    """Its listener goes, and what is on it; the client is told why."""
    made = reverse(target(lambda connection: (connection.sendall(b"!"), connection.recv(1))).port, "--max-retry-count", "9")
    with dial(made.port) as connection:
        receive_exactly(connection, 1)
        keys.server.write("authorized_keys", "# nobody\n")
        sockets.assert_reset(connection)
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


def test_the_listener_ends_with_its_client(serve, client, tcp_echo):
    server, server_port = serve("--allow-listen")
    clients = {sign: client(server_port, "R:0:127.0.0.1:%d" % tcp_echo.port) for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)}
    ports = {sign: bound(program) for sign, program in clients.items()}
    for sign, program in clients.items():
        ask(ports[sign])
        program.stop(sign)
    eventually(lambda: all(map(refused, ports.values())), lambda: "the listeners are gone: %s" % {sign: refused(ports[sign]) for sign in ports})
    assert server.process.poll() is None


class Callers:
    """Connects to a port over and over, until it is left: `heard` has what each connection said, or its error."""

    def __init__(self, port):
        self.heard, self._done = [], threading.Event()
        self._thread = threading.Thread(target=self._run, args=(port,), daemon=True)

    def _run(self, port):
        while not self._done.is_set():
            try:
                self.heard.append(greeting(port))
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
    made = reverse(target(lambda connection: (say(connection, b"old"), heard.put(receive_all(connection)))).port)
    with Callers(made.port) as callers:
        with dial(made.port) as connection:
            assert receive_all(connection) == b"old"
            eventually(lambda: len(callers.heard) > 3, "they are answered")
            newcomer = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(b"new")).port))
            assert bound(newcomer) == made.port
            assert greeting(made.port) == b"new"
            eventually(lambda: callers.heard[-3:] == [b"new"] * 3, lambda: "the new one answers: %r" % callers.heard)
            say(connection, b"still here")
            eventually(lambda: heard.get(timeout=PATIENCE) == b"still here", "what was begun goes on")
        # The first one lives on, and asks for the port again and again, which SIGHUP hurries: it does not get it back.
        for n in range(1, 4):
            eventually(lambda n=n: made.client.process.send_signal(signal.SIGHUP) or made.client.output.count("; trying again") >= n,
                       lambda: "it asks again: %s" % made.client.output)
        so_far = len(callers.heard)
        eventually(lambda: len(callers.heard) > so_far + 10, "they are answered")
    assert set(callers.heard) == {b"old", b"new"}, callers.heard
    assert callers.heard == sorted(callers.heard, reverse=True), "the old one answered after the new one"


def test_a_client_that_comes_back_has_its_port_at_once(reverse, client, stage, target):
    """Cut off with its machine, which the server does not hear: for it the old sockets are alive, as those of a stopped one; and after a crash."""
    made = reverse(stage.port)
    def comes_back(word):
        again = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(word)).port))
        assert bound(again) == made.port
        assert [greeting(made.port) for _ in range(5)] == [word] * 5
        return again
    stage.play(lambda connection: (connection.sendall(b"!"), connection.recv(1)))
    with dial(made.port) as connection:
        receive_exactly(connection, 1)
        made.client.process.send_signal(signal.SIGSTOP)
        try:
            second = comes_back(b"second")
        finally:
            made.client.process.send_signal(signal.SIGCONT)
        second.process.kill()
        third = comes_back(b"third")
        # What a client carried that crashed is reset.
        made.client.process.kill()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert third.process.poll() is None and greeting(made.port) == b"third"


def test_forms(serve, client, target, second, short, stack):
    """Tunnels of both kinds, to a Unix socket, of IPv6 and in ranges, of one client or of two; and with nothing but a reverse tunnel it is ready."""
    _, server_port = serve("--allow-listen")
    ports = [target(says(b"%d" % number)).port for number in range(4)]
    try:
        six = target(says(b"six"), host="::1").port
    except OSError:
        pytest.skip("no IPv6 here")
    # It is the client's own: no permission of the server is needed.
    with contextlib.closing(UnixTarget(says(b"unix"), short / "it")) as unix:
        program = client(server_port, "R:0:127.0.0.1:%d" % ports[0], "0:127.0.0.1:%d" % ports[1], "R:127.0.0.1:0:127.0.0.1:%d" % ports[2],
                         "0:127.0.0.1:%d" % ports[3], "R:0:unix:%s" % unix.path, "R:[::1]:0:[::1]:%d" % six)
        reached = [bound(program, ":%d" % ports[0]), tcp_port(program), bound(program, ":%d" % ports[2]), tcp_port(program, 2),
                   bound(program, "unix:" + unix.path)]
        for _ in range(2):
            assert [greeting(port) for port in reached] == [b"0", b"1", b"2", b"3", b"unix"]
        assert greeting(bound(program, host=r"\[::1\]"), "::1") == b"six"
    near, far = free_port(3), free_port(3)
    listeners = [stack.enter_context(socket.create_server(("127.0.0.1", near + n))) for n in range(3)]
    program = client(server_port, "R:%d-%d:127.0.0.1:%d-%d" % (far, far + 2, near, near + 2), who=second).ready()
    for n, listener in enumerate(listeners):
        assert bound(program, ":%d" % (near + n)) == far + n
        listener.settimeout(PATIENCE)
        with dial(far + n) as originator, accept(listener) as there:
            talk(originator, there, b"%d" % n)
    assert program.process.poll() is None


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_target_learns_who_the_visitor_is(serve, client, stage, kind, short, stack):
    """With --send-proxy it stands in front of what the visitor says, once for each connection, also where the target speaks first."""
    _, server_port = serve("--allow-listen")
    unix = stack.enter_context(contextlib.closing(UnixTarget(lambda connection: stage.plays.get(timeout=PATIENCE)(connection), short / "it")))
    remote = "unix:" + unix.path if kind == "unix" else "127.0.0.1:%d" % stage.port
    program = client(server_port, "R:localhost:0:" + remote, flags=["--send-proxy"])
    port = bound(program, remote, "localhost")
    for host in ("127.0.0.1", "::1", "127.0.0.1"):
        stage.play(lambda connection: (connection.sendall(b"220 hello\r\n"), stage.heard.put(receive_all(connection))))
        with row(host), dial(port, host) as visitor:
            source = visitor.getsockname()[:2]
            assert receive_exactly(visitor, 11) == b"220 hello\r\n"
            say(visitor, b"hello")
            address = ipaddress.ip_address(source[0]).packed
            family = b"\x11\0\x0c" if len(address) == 4 else b"\x21\0\x24"
            ports = struct.pack(">HH", source[1], port)
            assert stage.hears() == SIGNATURE + b"\x21" + family + address + bytes(len(address)) + ports + b"hello"


def test_command_lines_that_are_wrong(keys):
    """What a reverse tunnel does not go with. What is none is in unit/test_special_tunnels.py."""
    cases = [(["connect", *flags, "127.0.0.1:1", "R:0:127.0.0.1:1"], "--legacy") for flags in (["--legacy"], ["--legacy", "-e"])]
    cases += [(["connect", "--send-proxy", "127.0.0.1:1", "2000:127.0.0.1:1"], "--send-proxy is for reverse tunnels")]
    # Each worker has connections of its own, and knows nothing of another's waiting links.
    cases += [(["serve", "--allow-listen", "--workers", "2", "127.0.0.1:0"], "--allow-listen.*--workers|--workers.*--allow-listen")]
    for (words, said), outcome in zip(cases, run_lines([["-k", keys.client.path, *words] for words, _ in cases])):
        assert outcome.code == 2 and re.search(said, outcome.err), (words, outcome)
