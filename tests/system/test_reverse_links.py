"""Listen links: each of ours against the independent peer, which sees how they use them. Whole reverse tunnels are in test_reverse.py."""

import contextlib
import shutil
import socket
import time

import pytest

from support import ratrod2_peer as peer
from support.keys import seed_of
from support.programs import PATIENCE, RATROD, bound, descriptors
from support.ratrod2_peer import CLOSE, DATA, LISTEN, OPEN, REMOTE_FAILED, TCP, LinkEnded, PeerError, encode_open
from support.scripted import Waiting
from support.sockets import dial, eventually, port_of, receive_all, receive_exactly, refused, reset, say
from support.targets import says

pytestmark = pytest.mark.usefixtures("no_traceback")

WAITING_LINKS = 8


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
    """originate(address) -> a connection to it"""
    return lambda address: stack.enter_context(dial(int(address.rpartition(":")[2])))


def serve_one(link, originator):
    """The next stream of a Listen link, which must be the one of `originator`: echoed to the end."""
    say(originator, b"hello")
    stream = link.accept()
    assert (stream.kind, stream.target) == (TCP, "127.0.0.1:%d" % port_of(originator))
    peer.echo(stream)
    assert receive_all(originator) == b"hello"
    stream.over()


def assert_fin(link):
    """The server has no more streams for it, and nothing against it."""
    assert link.accept() is None


def assert_ended(link, what=None):
    assert {record.type for record in link.read_to_end()} <= {peer.ERROR, peer.KEEPALIVE}, what


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
    stream = listening.accept()
    stream.opened()
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
    others = [listen(address)[0] for _ in range(3)]
    others[0].finish()
    peer.reset(others[1].sock)
    others[2].send_record(CLOSE)
    others[2].finish()
    for _ in range(4):
        serve_one(first, originate(address))


def test_the_next_instance_takes_over(listen, originate):
    """The old one's waiting links get FIN; what it carries goes on, and its link is let go after that."""
    for busy in False, True:
        old, address = listen()
        if busy:
            originator = originate(address)
            stream = old.accept()
            stream.opened()
        waiting, _ = listen(address)
        new, _ = listen(address, b"instanc2")
        assert_fin(waiting)
        if busy:
            originator.sendall(b"still here?")
            assert stream.receive() == b"still here?"
            stream.send(b"yes")
            assert receive_exactly(originator, 3) == b"yes"
            originator.shutdown(socket.SHUT_WR)
            stream.finish()
            assert receive_all(originator) == b""
        assert_fin(old)
        for _ in range(2):
            serve_one(new, originate(address))


def test_64_earlier_instances_are_remembered(listen):
    """Those that live must not take the address from each other for ever; nor may their number grow without end."""
    instances = [b"run %4d" % n for n in range(66)]
    address = None
    for instance in instances:
        _, address = listen(address, instance)
    with pytest.raises(PeerError):
        listen(address, instances[1])
    listen(address, instances[0])


def test_more_waiting_links_than_a_listener_may_have(listen, link, originate):
    first, address = listen()
    others = [listen(address)[0] for _ in range(WAITING_LINKS - 1)]
    surplus = link()
    with contextlib.suppress(PeerError, LinkEnded):  # refused, or granted and then let go
        surplus.listen(address, b"instance")
        assert_fin(surplus)
    originators = [originate(address) for _ in range(WAITING_LINKS)]
    assert {made.accept().target for made in (first, *others)} == {"127.0.0.1:%d" % port_of(originator) for originator in originators}


def test_a_reset_of_either_side_reaches_the_other(listen, originate):
    """What a lost link does to a stream is in test_ratrod2_negative.py and test_outlive.py."""
    for is_ours in (True, False):
        listening, address = listen()
        originator = originate(address)
        stream = listening.accept()
        stream.opened()
        stream.send(b"!")
        receive_exactly(originator, 1)
        if is_ours:
            stream.fail(REMOTE_FAILED, "Broken pipe")
            with pytest.raises(ConnectionResetError):
                originator.recv(1)
        else:
            reset(originator)
            with pytest.raises(PeerError):
                stream.receive()
            assert listening.read_to_end() == []


def test_a_client_opens_nothing_on_a_listen_link(listen, originate):
    for record in (DATA, b"x"), (OPEN, encode_open(TCP, "127.0.0.1:1")):
        (listening, _), (good, address) = listen(), listen()
        listening.send_record(*record)
        assert_ended(listening)
        serve_one(good, originate(address))


def test_21_a_listen_link_serves_no_other_client(listen, originate, second):
    """Neither where the other has no link that waits, nor where it has none at all any more."""
    (mine, address), (theirs, other) = listen(flags=("--connect-timeout", "2")), listen(who=second)
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
    with pytest.raises(ConnectionResetError):
        last.recv(1)
    serve_one(theirs, originate(other))


def test_21_a_listen_link_of_another_key_joins_no_pool(listen, originate, second):
    """Not even with the right address and instance."""
    mine, address = listen()
    for instance in (b"instance", b"another!"):
        with pytest.raises(PeerError, match="."):
            listen(address, instance, second)
    for _ in range(3):
        serve_one(mine, originate(address))


@pytest.fixture
def grants(keys, target):
    """The independent server, which leaves links on which the client asks to listen to the test."""
    with contextlib.closing(Waiting(keys, target, LISTEN)) as made:
        yield made


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
    stream = listening.open("203.0.113.9:6000")
    stream.wait_opened()
    another, again = grants.grant()
    assert (again.target, again.instance) == ("127.0.0.1:40123", asked.instance)
    assert another.exchange("203.0.113.9:6001", b"hello") == b"hello"
    stream.send(b"!")
    assert stream.receive() == b"!"
    stream.finish()
    program.stop()
    while not grants.arrived.empty():
        grants.stream(LISTEN)
    client(grants.port, "R:40123:127.0.0.1:1")
    assert grants.grant()[1].instance != asked.instance, "each run is an instance"


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


NOT_ON_A_WAITING_LINK = {"Open Listen": (OPEN, encode_open(LISTEN, "127.0.0.1:0", b"instance")), "Data": (DATA, b"x")}


def test_a_client_asks_again(grants, client, tcp_echo):
    """For the port that it had, however its link was lost; also after what a server may not send on a link that waits."""
    program = client(grants.port, "R:0:127.0.0.1:%d" % tcp_echo.port, flags=("--max-retry-interval", "0.1"))
    listening, first = grants.grant()
    bound(program)
    for how in ("FIN", "RST", "Close", "Error", *NOT_ON_A_WAITING_LINK):
        if how == "RST":
            peer.reset(listening.sock)
        elif how in NOT_ON_A_WAITING_LINK:
            listening.send_record(*NOT_ON_A_WAITING_LINK[how])
            assert_ended(listening, how)
        else:
            if how == "Close":  # an acceptor's alone: from the server it is as any other wrong record
                listening.send_record(CLOSE)
            if how == "Error":
                listening.send_record(peer.ERROR, peer.encode_error(peer.UNKNOWN, "going down"))
            listening.finish()
        # It keeps two links waiting; the test answers one of them, and the other again and again.
        listening, asked = grants.grant()
        assert (asked.target, asked.instance) == ("127.0.0.1:40123", first.instance), how
        assert listening.exchange("203.0.113.9:5000", b"hello") == b"hello", how
    assert program.process.poll() is None


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
    for address in ("", "nonsense", "127.0.0.1:99999", "127.0.0.1:\x1b[2J", "A" * 1000):
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
