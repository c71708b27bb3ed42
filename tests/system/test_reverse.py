"""Reverse tunnels (`R:`): the server listens, and the client connects to what its own command line names. Further below their Listen links: each of
ours against the independent peer, which sees how they use them. What permitlisten permits is in unit/test_core_grants.py."""

import concurrent.futures
import contextlib
import ipaddress
import queue
import re
import shutil
import signal
import socket
import struct
import threading
import time
import types

import pytest

from support import ratrod2_peer as peer, sockets
from support.keys import permit, seed_of
from support.many_lines import run_lines
from support.programs import AUTHENTICATION_FAILED, PATIENCE, RATROD, assert_start_fails, bound, descriptors, handshakes, tcp_port
from support.proxy_headers import SIGNATURE
from support.ratrod2_peer import CLOSE, DATA, LISTEN, OPEN, REMOTE_FAILED, TCP, LinkEnded, PeerError, encode_open
from support.rows import assert_raises, row
from support.scripted import Waiting
from support.sockets import accept, ask, dial, eventually, free_port, ping, port_of, receive_all, receive_exactly, refused, reset, say, talk, works
from support.targets import Target, UnixTarget, echo, says

pytestmark = pytest.mark.usefixtures("no_traceback")

REFUSED = "not allowed by this server"  # the same for every reason: it teaches a prober nothing


def greeting(port, host="127.0.0.1"):
    with dial(port, host) as connection:
        return receive_all(connection)


@pytest.fixture
def reverse(serve, client):
    """reverse(target port, flags of the client...) -> a server, a client with one reverse tunnel, and the `port` where the server listens for it"""
    def launch(target_port, *flags):
        server, server_port = serve("-v", "--allow-listen")
        program = client(server_port, "R:0:127.0.0.1:%d" % target_port, flags=("-v", *flags))
        return types.SimpleNamespace(server=server, client=program, server_port=server_port, port=bound(program))
    return launch


@pytest.fixture
def stage(target):
    """A target that does what play() puts on, one connection each; `heard` is for what these say."""
    plays = queue.Queue()
    made = target(lambda connection: plays.get(timeout=PATIENCE)(connection))
    made.plays, made.play, made.heard = plays, plays.put, queue.Queue()
    return made


def test_streams_and_how_they_end(reverse, stage):
    """Whoever speaks or ends first, the other side learns it as without a tunnel."""
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
        assert stage.heard.get(timeout=PATIENCE) == b"wait, there is more"


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


def test_the_server_and_the_key_permit_it(serve, client, keys, tcp_echo):
    """One's permission does not make up for the other's."""
    port, remote = free_port(), "127.0.0.1:%d" % tcp_echo.port
    for permission, flags, why in (("*:*", (), "--allow-listen"), ("127.0.0.1:1", ("--allow-listen",), "")):
        permit(keys, 'permitlisten="%s"' % permission)
        server, server_port = serve(*flags)
        assert_start_fails(client(server_port, "R:%d:%s" % (port, remote)), REFUSED, "%d" % port)
        server.wait_for("❌.* refused: .*" + why)
        assert refused(port)
        ask(tcp_port(client(server_port, "0:" + remote)))
    # A service that was asked for and is not there must not look like one that is: one refusal ends the client with all its tunnels.
    assert_start_fails(client(server_port, "0:" + remote, "R:0:" + remote), REFUSED)
    permit(keys, 'permitlisten="127.0.0.1:1" permitlisten="%d"' % port)
    ask(bound(client(server_port, "R:%d:%s" % (port, remote))))


def test_where_a_server_cannot_listen(reverse, client, second, target):
    """Beside another key's address: a visitor of `localhost` tries both families, of every address any: what is asked for must not take them away.
    On the server's own port, on another program's, on an address from 192.0.2.0/24, which nobody has."""
    made = reverse(target(says(b"first")).port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hosts = "", "127.0.0.1:", "[::1]:", "localhost:", "0.0.0.0:", "[::]:", "*:"
        cases = [("%s%d" % (host, made.port), "in use by another client") for host in hosts]
        cases += [("%s%d" % (host, made.server_port), "in use|this server itself is on that port") for host in ("127.0.0.1:", "*:")]
        cases += [("%d" % port_of(taken), "%d.*in use" % port_of(taken)), ("192.0.2.1:0", r"192\.0\.2\.1")]
        outcomes = run_lines([["-k", second.path, "connect", "127.0.0.1:%d" % made.server_port, "R:%s:127.0.0.1:1" % where] for where, _ in cases])
    for (where, said), outcome in zip(cases, outcomes):
        assert outcome.code == 1 and re.search(said, outcome.err), (where, outcome)
    other = target(says(b"other")).port
    assert bound(client(made.server_port, "R:127.0.0.2:%d:127.0.0.1:%d" % (made.port, other), who=second), host=r"127\.0\.0\.2") == made.port
    assert [greeting(made.port, host) for host in ("127.0.0.1", "::1", "127.0.0.2")] == [b"first", b"first", b"other"]


def test_64_listeners_for_a_key(serve, client, second, target, tcp_echo):
    """For all its clients together; another key has 64 of its own, and a flag allows more. Streams have a bound here too."""
    _, server_port = serve("--allow-listen")
    first, remote = free_port(65), target(says(b"hello")).port
    many = "R:%d-%d:127.0.0.1:%d-%d"
    assert_start_fails(client(server_port, many % (first, first + 64, 1, 65)), "as many addresses as one may have")
    holder = client(server_port, many % (first, first + 62, 1, 63), "R:0:127.0.0.1:%d" % remote)
    assert greeting(bound(holder, ":%d" % remote)) == b"hello"
    assert_start_fails(client(server_port, "R:0:127.0.0.1:%d" % remote), "as many addresses as one may have")
    assert greeting(bound(client(server_port, "R:0:127.0.0.1:%d" % remote, who=second))) == b"hello"
    server, server_port = serve("--allow-listen", "--max-listeners-per-key", "2", "--max-streams-per-key", "2")
    assert_start_fails(client(server_port, *["R:0:127.0.0.1:1"] * 3), "one may have \\(2\\); serve --max-listeners-per-key allows more")
    # Those that wait for a link included: who reaches the listener must not use up the server's descriptors.
    reverse = bound(client(server_port, "R:0:127.0.0.1:%d" % tcp_echo.port))
    with dial(reverse) as one, dial(reverse) as another:
        ping(one, another)
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


@contextlib.contextmanager
def callers(port):
    """Within this block `port` is connected to over and over. Gives the list of what each connection said, or its error."""
    answers, done = [], threading.Event()
    def call():
        while not done.is_set():
            try:
                answers.append(greeting(port))
            except OSError as error:
                answers.append(error)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call)
        try:
            yield answers
        finally:
            done.set()


def test_a_second_client_of_the_key_takes_the_port_over(reverse, client, target):
    """Without a gap, while the first lives: nobody who connects meanwhile is turned away, and who was connected stays so."""
    heard = queue.Queue()
    made = reverse(target(lambda connection: (say(connection, b"old"), heard.put(receive_all(connection)))).port)
    with callers(made.port) as answers:
        with dial(made.port) as connection:
            assert receive_all(connection) == b"old"
            eventually(lambda: len(answers) > 3, "they are answered")
            newcomer = client(made.server_port, "R:%d:127.0.0.1:%d" % (made.port, target(says(b"new")).port))
            assert bound(newcomer) == made.port
            assert greeting(made.port) == b"new"
            eventually(lambda: answers[-3:] == [b"new"] * 3, lambda: "the new one answers: %r" % answers)
            say(connection, b"still here")
            eventually(lambda: heard.get(timeout=PATIENCE) == b"still here", "what was begun goes on")
        # The first one lives on, and asks for the port again and again, which SIGHUP hurries: it does not get it back.
        for n in range(1, 4):
            eventually(lambda n=n: made.client.process.send_signal(signal.SIGHUP) or made.client.output.count("; trying again") >= n,
                       lambda: "it asks again: %s" % made.client.output)
        so_far = len(answers)
        eventually(lambda: len(answers) > so_far + 10, "they are answered")
    assert set(answers) == {b"old", b"new"}, answers
    assert answers == sorted(answers, reverse=True), "the old one answered after the new one"


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
        pytest.raises(ConnectionResetError, connection.recv, 1)
    assert third.process.poll() is None and greeting(made.port) == b"third"


def test_forms(serve, client, target, second, short, stack):
    """Tunnels of both kinds, to a Unix socket, of IPv6 and in ranges, of one client or of two; and with nothing but a reverse tunnel it is ready."""
    _, server_port = serve("--allow-listen")
    ports = [target(says(b"%d" % number)).port for number in range(4)]
    six = target(says(b"six"), host="::1").port
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
    for n in range(3):
        stack.enter_context(contextlib.closing(Target(says(b"%d" % n), port=near + n)))
    program = client(server_port, "R:%d-%d:127.0.0.1:%d-%d" % (far, far + 2, near, near + 2), who=second).ready()
    for n in range(3):
        assert bound(program, ":%d" % (near + n)) == far + n
        assert greeting(far + n) == b"%d" % n
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
            assert stage.heard.get(timeout=PATIENCE) == SIGNATURE + b"\x21" + family + address + bytes(len(address)) + ports + b"hello"


def test_command_lines_that_are_wrong(keys):
    """What a reverse tunnel does not go with. What is none is in unit/test_special_tunnels.py."""
    cases = [(["connect", *flags, "127.0.0.1:1", "R:0:127.0.0.1:1"], "--legacy") for flags in (["--legacy"], ["--legacy", "-e"])]
    cases += [(["connect", "--send-proxy", "127.0.0.1:1", "2000:127.0.0.1:1"], "--send-proxy is for reverse tunnels")]
    # Each worker has connections of its own, and knows nothing of another's waiting links.
    cases += [(["serve", "--allow-listen", "--workers", "2", "127.0.0.1:0"], "--allow-listen.*--workers|--workers.*--allow-listen")]
    for (words, said), outcome in zip(cases, run_lines([["-k", keys.client.path, *words] for words, _ in cases])):
        assert outcome.code == 2 and re.search(said, outcome.err), (words, outcome)


# ---------------------------------------------------------------------------------------------------- Listen links
@pytest.fixture
def listen(link):
    """listen(address, instance, who=Keys, flags=()) -> a link of the independent client on which our server listens for it, and its address."""
    def make(address=None, instance=b"instance", who=None, flags=()):
        made = link(who, flags=("--allow-listen", *flags))
        found = made.listen(address or "127.0.0.1:0", instance)
        assert address in (None, found)
        return made, found
    return make


@pytest.fixture
def originate(stack):
    return lambda address: stack.enter_context(dial(int(address.rpartition(":")[2])))


def serve_one(link, originator):
    """The next stream of a Listen link, which must be the one of `originator`: echoed to the end."""
    say(originator, b"hello")
    stream = link.accept()
    assert (stream.kind, stream.target) == (TCP, "127.0.0.1:%d" % port_of(originator))
    peer.echo(stream)
    assert receive_all(originator) == b"hello"
    stream.over()


def assert_ended(link):
    assert {record.type for record in link.read_to_end()} <= {peer.ERROR, peer.KEEPALIVE}


def test_waiting_links_form_a_pool(listen, originate):
    """Each takes a connection; one more than there are links waits for the first that is free again."""
    first, address = listen()
    links = [first, *(listen(address)[0] for _ in range(2))]
    originators = {"127.0.0.1:%d" % port_of(made): made for made in (originate(address) for _ in range(4))}
    streams = [made.accept() for made in links]
    for stream in streams:
        originator = originators.pop(stream.target)
        stream.opened()
        originator.sendall(stream.target.encode())
        assert stream.receive() == stream.target.encode()
        originator.close()
    last, = originators.values()
    streams[1].finish()
    serve_one(links[1], last)


def test_a_listener_lives_while_its_links_are_busy(listen, originate):
    """No link waits, and who connects is served once one does."""
    listening, address = listen()
    first, second = originate(address), originate(address)
    stream = listening.accept().opened()
    first.sendall(b"?")
    assert stream.receive() == b"?"
    another, _ = listen(address)
    serve_one(another, second)
    another.finish()
    third = originate(address)
    first.shutdown(socket.SHUT_WR)
    stream.finish()
    serve_one(listening, third)
    listening.finish()
    eventually(lambda: refused(int(address.rpartition(":")[2])), "the listener is gone")


def test_a_waiting_link_that_left_is_not_used(listen, originate):
    first, address = listen()
    ended, broken, closed = (listen(address)[0] for _ in range(3))
    ended.finish()
    peer.reset(broken.sock)
    closed.send_record(CLOSE)
    closed.finish()
    for _ in range(4):
        serve_one(first, originate(address))


def test_the_next_instance_takes_over(listen, originate):
    """The old one's waiting links get FIN; what it carries goes on, and its link is let go after that."""
    for busy in False, True:
        old, address = listen()
        if busy:
            originator = originate(address)
            stream = old.accept().opened()
        waiting, _ = listen(address)
        new, _ = listen(address, b"instanc2")
        assert waiting.accept() is None
        if busy:
            originator.sendall(b"still here?")
            assert stream.receive() == b"still here?"
            stream.send(b"yes")
            assert receive_exactly(originator, 3) == b"yes"
            originator.shutdown(socket.SHUT_WR)
            stream.finish()
            assert receive_all(originator) == b""
        assert old.accept() is None
        for _ in range(2):
            serve_one(new, originate(address))


def test_64_earlier_instances_are_remembered(listen):
    """Those that live must not take the address from each other for ever; nor may their number grow without end."""
    instances = [b"run %4d" % n for n in range(66)]
    address = None
    for instance in instances:
        _, address = listen(address, instance)
    pytest.raises(PeerError, listen, address, instances[1])
    listen(address, instances[0])


def test_more_waiting_links_than_a_listener_may_have(listen, link, originate):
    first, address = listen()
    others = [listen(address)[0] for _ in range(7)]
    surplus = link()
    with contextlib.suppress(PeerError, LinkEnded):  # refused, or granted and then let go
        surplus.listen(address, b"instance")
        assert surplus.accept() is None
    originators = [originate(address) for _ in range(8)]
    assert {made.accept().target for made in (first, *others)} == {"127.0.0.1:%d" % port_of(originator) for originator in originators}


def test_a_reset_of_either_side_reaches_the_other(listen, originate):
    """What a lost link does to a stream is in test_ratrod2_negative.py and test_outlive.py."""
    for is_ours in (True, False):
        listening, address = listen()
        originator = originate(address)
        stream = listening.accept().opened()
        stream.send(b"!")
        receive_exactly(originator, 1)
        if is_ours:
            stream.fail(REMOTE_FAILED, "Broken pipe")
            pytest.raises(ConnectionResetError, originator.recv, 1)
        else:
            reset(originator)
            pytest.raises(PeerError, stream.receive)
            assert listening.read_to_end() == []


def test_a_client_opens_nothing_on_a_listen_link(listen, originate):
    for record in (DATA, b"x"), (OPEN, encode_open(TCP, "127.0.0.1:1")):
        (listening, _), (good, address) = listen(), listen()
        listening.send_record(*record)
        assert_ended(listening)
        serve_one(good, originate(address))


def test_21_a_listen_link_serves_no_other_client(listen, originate, second):
    """It joins no pool of another key, even with the right address and instance, nor is it used where the other has no link that waits, or none
    at all any more."""
    (mine, address), (theirs, other) = listen(flags=("--connect-timeout", "2")), listen(who=second)
    for instance in (b"instance", b"another!"):
        assert_raises(PeerError, ".", listen, address, instance, second)
    for _ in range(3):
        serve_one(mine, originate(address))
        serve_one(theirs, originate(other))
    busy, waiting = originate(address), originate(address)  # one link, two connections: the second waits, though another's link is idle
    stream = mine.accept()
    assert stream.target == "127.0.0.1:%d" % port_of(busy)
    stream.opened()
    serve_one(theirs, originate(other))
    busy.shutdown(socket.SHUT_WR)
    stream.finish()
    serve_one(mine, waiting)
    last = originate(address)
    assert mine.accept().target == "127.0.0.1:%d" % port_of(last)
    mine.finish()  # the whole client goes, and its last connection with it
    pytest.raises(ConnectionResetError, last.recv, 1)
    serve_one(theirs, originate(other))


@pytest.fixture
def grants(keys, target, stack):
    """The independent server, which leaves links on which the client asks to listen to the test."""
    return stack.enter_context(contextlib.closing(Waiting(keys, target, LISTEN)))


def test_a_client_asks_and_is_granted(grants, client, tcp_echo):
    """With one instance on all its links; after port 0 it asks for the port that was bound."""
    program = client(grants.port, "R:0:127.0.0.1:%d" % tcp_echo.port)
    listening, asked = grants.grant()
    assert asked.target in ("0", "127.0.0.1:0")  # a bare port is loopback
    assert bound(program, ":%d" % tcp_echo.port) == 40123
    # It takes several streams one after the other, and says Over after each.
    for n in range(3):
        assert listening.exchange("203.0.113.9:%d" % (5000 + n), b"hello") == b"hello"
    # While it is busy there is another that waits.
    stream = listening.connect_to("203.0.113.9:6000")
    another, again = grants.grant()
    assert (again.target, again.instance) == ("localhost:40123", asked.instance)
    assert another.exchange("203.0.113.9:6001", b"hello") == b"hello"
    stream.send(b"!")
    assert stream.receive() == b"!"
    stream.finish()
    program.stop()
    while not grants.arrived.empty():
        grants.stream(LISTEN)
    client(grants.port, "R:127.0.0.2:40123:127.0.0.1:1")
    assert grants.grant("0.0.0.0:22")[1].instance != asked.instance, "each run is an instance"
    assert grants.grant()[1].target == "127.0.0.2:40123", "a server does not say what others are asked for"


def test_20_the_servers_open_names_a_target(grants, ratrod, keys, target, tcp_echo, resolver):
    """It is the originator's address, as information: the client dials its own target alone, and looks nothing up, also where it is nonsense."""
    names, watched = resolver(evil_example=["127.0.0.1"]), target(says(b"!"))
    ratrod("-k", keys.client.path, "-v", "connect", "127.0.0.1:%d" % grants.port, "R:0:127.0.0.1:%d" % tcp_echo.port, env=names.environment)
    link, _ = grants.grant()
    lookups = set(names.lookups)
    targets = [each % watched.port for each in ("127.0.0.1:%d", "localhost:%d", "evil.example:%d", "[::ffff:127.0.0.1]:%d")] + ["unix:/dev/log"]
    for name in targets:
        assert link.exchange(name, name.encode()) == name.encode()
    assert set(names.lookups) <= lookups | {"127.0.0.1"}
    assert (watched.accepted, tcp_echo.accepted) == (0, len(targets))
    for nonsense in ("marker\x1b]0;evil\x07\r\n\x00\u202e" + "A" * 800, b"\xff\xfe"):
        stream = link.open(nonsense)
        with contextlib.suppress(PeerError, LinkEnded):  # taken as the information that it is, or for a broken server
            stream.wait_opened()
            stream.send(b"hello")
            assert stream.receive() == b"hello"
        link, _ = grants.grant()
        assert link.exchange("203.0.113.9:5000", b"still here") == b"still here"


def test_a_client_asks_again(grants, client, tcp_echo):
    """For the port that it had, however its link was lost; also after what a server may not send on a link that waits."""
    program = client(grants.port, "R:0:127.0.0.1:%d" % tcp_echo.port, flags=("--max-retry-interval", "0.1"))
    listening, first = grants.grant()
    bound(program)
    for how, act in (
        ("FIN", lambda link: link.finish()), ("RST", lambda link: peer.reset(link.sock)),
        ("Close", lambda link: (link.send_record(CLOSE), link.finish())),  # an acceptor's alone: from the server it is as any other wrong record
        ("Error", lambda link: (link.send_record(peer.ERROR, peer.encode_error(peer.UNKNOWN, "going down")), link.finish())),
        ("Open Listen", lambda link: (link.send_record(OPEN, encode_open(LISTEN, "127.0.0.1:0", b"instance")), assert_ended(link))),
        ("Data", lambda link: (link.send_record(DATA, b"x"), assert_ended(link))),
    ):
        with row(how):
            act(listening)
            # It keeps two links waiting; the test answers one of them, and the other again and again.
            listening, asked = grants.grant()
            assert (asked.target, asked.instance) == ("localhost:40123", first.instance)
            assert listening.exchange("203.0.113.9:5000", b"hello") == b"hello"
    assert program.process.poll() is None


def test_a_server_that_names_no_address(grants, client):
    program = client(grants.port, "R:0:127.0.0.1:1")
    grants.grant("nonsense")
    assert program.wait() == 1
    assert len(re.findall("nonsense", program.output)) == 1, program.output


def test_a_server_that_opens_before_it_has_granted(grants, client, target):
    """It must not get through to the target by that."""
    watched = target(says(b"!"))
    client(grants.port, "R:0:127.0.0.1:%d" % watched.port)
    made = grants.stream(LISTEN).link
    made.send_open(TCP, "203.0.113.9:5000")
    assert_ended(made)
    assert watched.accepted == 0


def test_a_server_that_bound_nonsense(grants, client):
    """The client shows what it is told, harmlessly, or takes it for a broken server."""
    for address in ("", "127.0.0.1:99999", "127.0.0.1:\x1b[2J" + "A" * 1000):
        program = client(grants.port, "R:0:127.0.0.1:1", flags=("-v",))
        grants.stream(LISTEN).link.send_record(peer.OPENED, peer.encode_opened(address, None))
        program.wait_for("listens on|❌")
        program.stop()
        assert all(line.replace("\t", " ").isprintable() for line in program.lines), program.lines


@pytest.fixture
def greedy(keys, target):
    """greedy(granted) -> (port, the Listen links that were granted): a server that does granted(link, how many there were) with each, and ends it."""
    def launch(granted):
        links = []
        def handle(connection):
            connection.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionError), peer.Server(connection, seed_of(keys.server)) as link:
                if link.handshake().accept():  # not the test connection
                    link.grant_listen("127.0.0.1:9")
                    links.append(link)
                    granted(link, len(links))
        return target(handle).port, links
    return launch


def test_links_that_the_server_ends_at_once_do_not_spin(client, greedy):
    """One waits; every further one is ended as soon as it waits too. The client asks again, but not as fast as it can."""
    port, asked = greedy(lambda link, n: n == 1 and link.accept())
    bound(client(port, "R:0:127.0.0.1:1"))
    eventually(lambda: len(asked) > 2, "it asks again")
    before = len(asked)
    time.sleep(1)  # nothing is awaited: it is counted what comes
    assert len(asked) - before < 15


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit of util-linux sets the limit")
def test_a_server_that_opens_all_links_leaves_some_descriptors(keys, start, greedy, tcp_echo):
    """They are as many as the server says; the client's other tunnels need some of its 128 too."""
    port, opened = greedy(lambda link, _n: link.open("nobody").wait_opened() is not None and link.read_to_end())
    client = start("prlimit", "--nofile=128:128", *RATROD, "-k", keys.client.path, "connect", "127.0.0.1:%d" % port,
                   "R:0:127.0.0.1:%d" % tcp_echo.port)
    bound(client, host=".*")
    eventually(lambda: len(opened) >= 32, lambda: "%d opened" % len(opened))
    time.sleep(0.5)  # nothing is awaited: it is counted what comes
    assert len(opened) <= 33 and descriptors(client) < 90
