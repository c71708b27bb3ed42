"""Listen links: each of ours against the independent peer, which sees how they use them. Whole reverse tunnels are in test_reverse.py."""

import contextlib
import queue
import selectors
import shutil
import socket
import threading
import time

import pytest

from support import ratrod2_peer as peer
from support.keys import identity_of, seed_of
from support.programs import PATIENCE, RATROD, bound, descriptors
from support.ratrod2_peer import CLOSE, DATA, LISTEN, OPEN, REMOTE_FAILED, TCP, UDP, LinkEnded, PeerError, encode_open
from support.scripted import Scripted
from support.sockets import dial, eventually, port_of, receive_all, receive_exactly, refused, reset
from support.targets import says

pytestmark = pytest.mark.usefixtures("no_traceback")

WAITING_LINKS = 8


# ---------------------------------------------------------------------------------------------------- our server, the independent client


@pytest.fixture
def link(serve, keys):
    """link(who=Keys, flags...) -> a link of the independent client to our server with --allow-listen, which is `link.port`."""
    with contextlib.ExitStack() as stack:
        def make(who=None, *flags):
            if not hasattr(make, "port"):
                make.server, make.port = serve("-v", "--allow-listen", *flags)
            made = peer.Client.connect(make.port, seed_of(who or keys.client), server=identity_of(keys.server))
            return stack.enter_context(made).handshake()
        yield make


def port_in(address):
    return int(address.rpartition(":")[2])


def serve_one(link, originator):
    """The next stream of a Listen link, which must be the one of `originator`: echoed to the end."""
    originator.sendall(b"hello")
    originator.shutdown(socket.SHUT_WR)
    stream = link.accept()
    assert (stream.kind, stream.target) == (TCP, "127.0.0.1:%d" % port_of(originator))
    peer.echo(stream)
    assert receive_all(originator) == b"hello"
    stream.over()


def assert_fin(link):
    """The server has no more streams for it, and nothing against it."""
    assert link.accept() is None


def test_waiting_links_form_a_pool(link):
    """Each takes a connection; one more than there are links waits for the first that is free again."""
    first = link()
    address = first.listen("127.0.0.1:0", b"instance")
    links = [first, link(), link()]
    for made in links[1:]:
        assert made.listen(address, b"instance") == address
    with contextlib.ExitStack() as stack:
        originators = {}
        for _ in range(4):
            originator = stack.enter_context(dial(port_in(address)))
            originators["127.0.0.1:%d" % port_of(originator)] = originator
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


def test_a_listener_lives_while_its_links_are_busy(link):
    """No link waits, and who connects is served once one does."""
    listening = link()
    address = listening.listen("127.0.0.1:0", b"instance")
    with dial(port_in(address)) as first, dial(port_in(address)) as second:
        stream = listening.accept()
        stream.opened()
        first.sendall(b"?")
        assert stream.receive() == b"?"
        another = link()
        assert another.listen(address, b"instance") == address
        serve_one(another, second)
        another.finish()
        with dial(port_in(address)) as third:
            first.shutdown(socket.SHUT_WR)
            stream.finish()
            serve_one(listening, third)
    listening.finish()
    eventually(lambda: refused(port_in(address)), "the listener is gone")


def test_a_waiting_link_that_left_is_not_used(link):
    first = link()
    address = first.listen("127.0.0.1:0", b"instance")
    others = [link() for _ in range(3)]
    for made in others:
        made.listen(address, b"instance")
    others[0].finish()
    peer.reset(others[1].sock)
    others[2].send_record(CLOSE)
    others[2].finish()
    for _ in range(4):
        with dial(port_in(address)) as originator:
            serve_one(first, originator)


@pytest.mark.parametrize("busy", [False, True], ids=["waiting", "busy"])
def test_the_next_instance_takes_over(link, busy):
    """The old one's waiting links get FIN; what it carries goes on, and its link is let go after that."""
    old = link()
    address = old.listen("127.0.0.1:0", b"instance")
    with contextlib.ExitStack() as stack:
        if busy:
            originator = stack.enter_context(dial(port_in(address)))
            stream = old.accept()
            stream.opened()
        waiting = link()
        waiting.listen(address, b"instance")
        new = link()
        assert new.listen(address, b"instanc2") == address
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
            with dial(port_in(address)) as originator:
                serve_one(new, originator)


def test_64_earlier_instances_are_remembered(link):
    """Those that live must not take the address from each other for ever; nor may their number grow without end."""
    instances = [b"run %4d" % n for n in range(66)]
    address = "127.0.0.1:0"
    for instance in instances:
        address = link().listen(address, instance)
    with pytest.raises(PeerError):
        link().listen(address, instances[1])
    assert link().listen(address, instances[0]) == address


def test_more_waiting_links_than_a_listener_may_have(link):
    first = link()
    address = first.listen("127.0.0.1:0", b"instance")
    others = [link() for _ in range(WAITING_LINKS - 1)]
    for made in others:
        assert made.listen(address, b"instance") == address
    surplus = link()
    with contextlib.suppress(PeerError, LinkEnded):  # refused, or granted and then let go
        surplus.listen(address, b"instance")
        assert_fin(surplus)
    with contextlib.ExitStack() as stack:
        originators = [stack.enter_context(dial(port_in(address))) for _ in range(WAITING_LINKS)]
        targets = {made.accept().target for made in (first, *others)}
        assert targets == {"127.0.0.1:%d" % port_of(originator) for originator in originators}


def test_an_error_in_place_of_opened_resets_the_originator(link):
    listening = link()
    address = listening.listen("127.0.0.1:0", b"instance")
    another = link()
    another.listen(address, b"instance")
    with dial(port_in(address)) as originator:
        with selectors.DefaultSelector() as selector:
            for made in (listening, another):
                selector.register(made.sock, selectors.EVENT_READ, made)
            (chosen, _), = selector.select(PATIENCE)
        chosen.data.accept().refuse(REMOTE_FAILED, "Connection refused")
        with pytest.raises(ConnectionResetError):
            originator.recv(1)
    rest = another if chosen.data is listening else listening
    with dial(port_in(address)) as originator:
        serve_one(rest, originator)


@pytest.mark.parametrize("how", ["FIN", "RST", "Error"])
def test_a_link_lost_during_a_stream_resets_the_originator(link, how):
    """Where the server does not wait for another one. How it goes on over another link is in test_outlive.py."""
    listening = link(None, *(() if how == "Error" else ("--resume", "0")))
    address = listening.listen("127.0.0.1:0", b"instance")
    with dial(port_in(address)) as originator:
        stream = listening.accept()
        stream.opened()
        stream.send(b"so far")
        assert receive_exactly(originator, 6) == b"so far"
        if how == "Error":
            stream.fail(REMOTE_FAILED, "Broken pipe")
        elif how == "FIN":
            listening.finish()
        else:
            peer.reset(listening.sock)
        with pytest.raises(ConnectionResetError):
            originator.recv(1)


def test_a_reset_of_the_originator_is_an_error_on_the_link(link):
    listening = link()
    address = listening.listen("127.0.0.1:0", b"instance")
    originator = dial(port_in(address))
    stream = listening.accept()
    stream.opened()
    stream.send(b"!")
    receive_exactly(originator, 1)
    reset(originator)
    with pytest.raises(PeerError):
        stream.receive()
    assert listening.read_to_end() == []


@pytest.mark.parametrize("record", [(DATA, b"x"), (OPEN, encode_open(TCP, "127.0.0.1:1")), (OPEN, encode_open(UDP)),
                                    (OPEN, encode_open(LISTEN, "127.0.0.1:0", b"instance"))], ids=["Data", "Open", "Open UDP", "Open Listen"])
def test_a_client_opens_nothing_on_a_listen_link(link, record):
    listening, good = link(), link()
    listening.listen("127.0.0.1:0", b"instance")
    address = good.listen("127.0.0.1:0", b"instance")
    listening.send_record(*record)
    assert {record.type for record in listening.read_to_end()} <= {peer.ERROR, peer.KEEPALIVE}
    with dial(port_in(address)) as originator:
        serve_one(good, originator)


# ---------------------------------------------------------------------------------------------------- our client, the independent server


class Grants:
    """The independent server. `asked` gets each link on which the client asks to listen, as (link, stream); the test answers. Its other links
    are served as everywhere."""

    def __init__(self, keys, target):
        self._over = threading.Event()
        self.asked = queue.Queue()
        self._server = Scripted(keys, target, self._behave)
        self.port = self._server.port

    def _behave(self, link, _number):
        stream = link.accept()
        if stream and stream.kind == LISTEN:
            self.asked.put((link, stream))
            self._over.wait(4 * PATIENCE)
        elif stream:
            peer.serve(stream)

    def next(self):
        return self.asked.get(timeout=PATIENCE)

    def grant(self, address="127.0.0.1:40123"):
        """The next link that asks, granted."""
        made, stream = self.next()
        made.grant_listen(address)
        return made, stream

    def close(self):
        self._over.set()
        self._server.check()


@pytest.fixture
def grants(keys, target):
    made = Grants(keys, target)
    yield made
    made.close()


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


def test_each_run_of_a_client_is_an_instance(grants, client):
    instances = set()
    for _ in range(2):
        program = client(grants.port, "R:40123:127.0.0.1:1")
        instances.add(grants.grant()[1].instance)
        bound(program)
        program.stop()
        while not grants.asked.empty():
            grants.asked.get()
    assert len(instances) == 2


HURRY = "--max-retry-interval", "0.1"
NOT_ON_A_WAITING_LINK = {
    "Open UDP": (OPEN, encode_open(UDP)), "Open Listen": (OPEN, encode_open(LISTEN, "127.0.0.1:0", b"instance")), "Data": (DATA, b"x"),
    "Over": (peer.OVER,), "Opened": (peer.OPENED, peer.encode_opened()), "Session": (peer.SESSION, peer.encode_session(1, "127.0.0.1:1"))}


def test_a_client_asks_again(grants, client, tcp_echo):
    """For the port that it had, however its link was lost; also after what a server may not send on a link that waits."""
    program = client(grants.port, "R:0:127.0.0.1:%d" % tcp_echo.port, flags=HURRY)
    listening, first = grants.grant()
    bound(program)
    for how in ("FIN", "RST", "Close", "Error", *NOT_ON_A_WAITING_LINK):
        if how == "RST":
            peer.reset(listening.sock)
        elif how in NOT_ON_A_WAITING_LINK:
            listening.send_record(*NOT_ON_A_WAITING_LINK[how])
            assert {record.type for record in listening.read_to_end()} <= {peer.ERROR, peer.KEEPALIVE}, how
        else:
            if how == "Close":  # an acceptor's alone: from the server it is as any other wrong record
                listening.send_record(CLOSE)
            if how == "Error":
                listening.send_error(peer.UNKNOWN, "going down")
            listening.finish()
        # It keeps two links waiting; the test answers one of them, and the other again and again.
        listening, asked = grants.grant()
        assert (asked.target, asked.instance) == ("127.0.0.1:40123", first.instance), how
        assert listening.exchange("203.0.113.9:5000", b"hello") == b"hello", how
    assert program.process.poll() is None


def test_a_server_that_opens_before_it_has_granted(grants, client, target):
    """It must not get through to the target by that."""
    watched = target(says(b"!"))
    program = client(grants.port, "R:0:127.0.0.1:%d" % watched.port)
    made, _ = grants.next()
    made.send_open(TCP, "203.0.113.9:5000")
    assert {record.type for record in made.read_to_end()} <= {peer.ERROR, peer.KEEPALIVE}
    assert watched.accepted == 0
    program.stop()


def test_a_server_that_bound_nonsense(grants, client):
    """The client shows what it is told, harmlessly, or takes it for a broken server. A traceback would be shown by no_traceback."""
    for address in ("", "nonsense", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:\x1b[2J", "A" * 1000):
        program = client(grants.port, "R:0:127.0.0.1:1", flags=("-v",))
        made, _ = grants.next()
        made.send_record(peer.OPENED, peer.encode_opened(address, None))
        program.wait_for("listens on|❌")
        program.stop()
        assert all(line.replace("\t", " ").isprintable() for line in program.lines), program.lines


def test_links_that_the_server_ends_at_once_do_not_spin(keys, ratrod, target):
    """One waits; every further one is ended as soon as it waits too. The client asks again, but not as fast as it can."""
    asked = []

    def handle(connection):
        connection.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError), peer.Server(connection, seed_of(keys.server)) as link:
            stream = link.handshake().accept()
            if stream is None:  # the test connection
                return
            asked.append(stream)
            link.grant_listen("127.0.0.1:9")
            if len(asked) == 1:
                link.accept()
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % target(handle).port, "R:0:127.0.0.1:1")
    bound(client)
    eventually(lambda: len(asked) > 2, "it asks again")
    before = len(asked)
    time.sleep(1)  # nothing is awaited: it is counted what comes
    assert len(asked) - before < 15


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit of util-linux sets the limit")
def test_a_server_that_opens_all_links_leaves_some_descriptors(keys, start, target, tcp_echo):
    """They are as many as the server says; the client's other tunnels need some of its 128 too."""
    opened = []

    def handle(connection):
        connection.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError), peer.Server(connection, seed_of(keys.server)) as link:
            if link.handshake().accept():
                link.grant_listen("127.0.0.1:9")
                link.open("nobody").wait_opened()
                opened.append(link)
                link.read_to_end()
    client = start("prlimit", "--nofile=128:128", *RATROD, "-k", keys.client.path, "connect", "127.0.0.1:%d" % target(handle).port,
                   "R:0:127.0.0.1:%d" % tcp_echo.port)
    bound(client, host=".*")
    eventually(lambda: len(opened) >= 32, lambda: "%d opened" % len(opened))
    time.sleep(0.5)  # nothing is awaited: it is counted what comes
    assert len(opened) <= 32 and descriptors(client) < 90
