"""Streams that outlive their links: PROTOCOL.md's rules 1-13 and negative tests 15, 17 and 35-40, of the real `serve`, and further below of the real
`connect`, against the independent peer; last of both, with doors between them that cut links. More of both together is in unit/test_states.py."""

import contextlib
import itertools
import os
import selectors
import signal
import socket
import sys

import pytest
from test_ratrod2_negative import BREAKS, assert_ended, fin, send_tampered, was_reset

import ratrod as module
from support import ratrod2_peer as peer, sockets
from support.keys import permit
from support.programs import PATIENCE, PYTHON, RATROD2, ROOT, STARTED, tcp_port
from support.ratrod2_peer import ACK, CLOSE, DATA, END, ERROR, KEEPALIVE, OVER, TCP, UNKNOWN, PeerError
from support.relays import Door
from support.rows import assert_raises, row
from support.scripted import Waiting
from support.sockets import accept, assert_reset, dial, eventually, is_ready, ping, port_of, receive_all, receive_exactly, works

pytestmark = pytest.mark.usefixtures("no_traceback")

NUMBER = bytes(range(16))
sigterm = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM here that a program could act on")
LOSSES = "FIN", "RST", "half a record", "last byte of the tag", "length 2^32 - 1"


def lose(stream, how, local):
    """Both ends send a good record; then the link is lost."""
    local.sendall(b"theirs")
    assert take(stream, 6) == b"theirs"
    stream.link.send_record(DATA, b"ours")
    assert receive_exactly(local, 4) == b"ours"
    if how in BREAKS:
        BREAKS[how](stream.link)
    else:
        send_tampered(stream.link, how)
        assert_ended(stream.link)


def take(stream, n):
    """So many bytes of what comes to the peer."""
    data = b""
    while len(data) < n:
        chunk = stream.receive()
        assert chunk, "End after %d of %d bytes" % (len(data), n)
        data += chunk
    return data


def talk(stream, local):
    """A few bytes each way: the stream lives. `local` is the end beyond the program."""
    stream.send(b"ping")
    assert receive_exactly(local, 4) == b"ping"
    local.sendall(b"pong")
    assert take(stream, 4) == b"pong"


def end(stream, local):
    """Both directions come to their ends; only Over is missing."""
    stream.end()
    assert receive_all(local) == b""
    local.shutdown(socket.SHUT_WR)
    assert stream.receive_all() == b""


def live_and_end(stream, local):
    talk(stream, local)
    end(stream, local)
    stream.over()


def attach(stream, link, **wrong):
    """As its opener, to the end of Opened."""
    stream.attach(link, **wrong).wait_opened()
    stream.resend()


@pytest.fixture
def hold(link, listener, stack):
    """hold(is_detached=False, on=None, options of link) -> (stream, the target's end of it), on this link or one of its own; both have said
    something. Where it is detached, the link has been lost since."""
    def make(is_detached=False, on=None, **options):
        stream = (on or link(**options)).connect_to("127.0.0.1:%d" % port_of(listener))
        local = stack.enter_context(accept(listener))
        talk(stream, local)
        if is_detached:
            peer.reset(stream.link.sock)
        return stream, local
    return make


def ask(link, stream, **wrong):
    """An attach that changes nothing at this end. What its Open says is right but for `wrong`."""
    fields = {"target": stream.target, "stream": stream.number, "attempt": stream.attempt + 1, "at": stream.acknowledged, "taken": stream.taken}
    link.send_open(TCP, **{**fields, **wrong})


def stranger(listener, number=NUMBER):
    """A stream that nobody has opened."""
    return peer.Stream(peer.Open(TCP, "127.0.0.1:%d" % port_of(listener), stream=number))


def refusal(stream):
    """The Error that answers an attach, as the link's last record."""
    error = pytest.raises(PeerError, stream.wait_opened).value
    assert stream.link.read_to_end() == []
    return error


def assert_no_connect(listener):
    assert not is_ready(listener, selectors.EVENT_READ, 0.2)


def test_rule_01_another_identity_reaches_no_stream(link, hold, second, listener):
    """35: for the server its Open names an unknown stream: a new one where that can be, else Error."""
    stream, local = hold()
    theirs = stranger(listener, stream.number)
    assert refusal(theirs.attach(link(second), attempt=2, at=1)).code == UNKNOWN
    attach(theirs, link(second), attempt=3, at=0)
    with accept(listener) as their_local:
        live_and_end(theirs, their_local)
    live_and_end(stream, local)


def test_rule_04_the_tail_is_kept_until_it_is_acknowledged(link, hold, listener):
    """Over has passed, but no Ack: the whole answer comes once more."""
    stream, local = hold()
    end(stream, local)
    stream.over(ack=False)
    peer.reset(stream.link.sock)
    attach(stream, link(), taken=0)
    records = [stream.link.read_record()[:2] for _ in range(3)]
    assert records == [(DATA, b"pong"), (END, b""), (OVER, b"")]
    assert_no_connect(listener)


def test_rule_05_a_stream_goes_on_over_another_link(link, hold, listener):
    """15 and 17: what the link had lost comes again, and once."""
    for how in LOSSES:
        with row(how):
            stream, local = hold()
            lose(stream, how, local)
            local.sendall(b"meanwhile")
            stream.outgoing.keep(b"never sent")
            attach(stream, link())
            assert receive_exactly(local, 10) == b"never sent"
            assert take(stream, 9) == b"meanwhile"
            live_and_end(stream, local)
            assert_no_connect(listener)


def test_rule_05_both_sides_skip_what_they_have_taken(link, hold):
    """Parts of a record too. The opener says that it knows less than it does."""
    for at, taken in (0, 0), (2, 3):
        with row(at):
            stream, local = hold(is_detached=True)
            stream.attach(link(), at=at, taken=taken)
            stream.send(b"more")  # after what has to come again
            local.sendall(b"and more")
            assert receive_exactly(local, 4) == b"more"
            assert take(stream, 8) == b"and more"
            live_and_end(stream, local)


def test_rule_06_a_higher_attempt_closes_the_older_link(link, hold, listener):
    stream, local = hold()
    old = stream.link
    attach(stream, link(), attempt=7)  # Opens between them were lost
    assert_ended(old, (KEEPALIVE, ACK))
    live_and_end(stream, local)
    assert_no_connect(listener)


def test_36_what_ends_the_stream_or_its_link_alone(link, hold):
    """An attempt that is not higher is that of an old link. Another target, and `taken` beyond what was sent; `at` beyond what was taken is answered
    by Error; and an Ack beyond what was sent, or one that goes back."""
    stream, local = hold()
    for attempt in (0, 1):
        late = link()
        ask(late, stream, attempt=attempt)
        assert_ended(late, ())
    live_and_end(stream, local)
    for wrong, detached in itertools.product(({"target": "127.0.0.1:1"}, {"taken": 5}, {"at": 5}), (False, True)):
        with row((wrong, detached)):
            stream, local = hold(detached)
            bad = link()
            ask(bad, stream, **wrong)
            types = [record.type for record in bad.read_to_end()]
            assert types == [ERROR] or not types and "at" not in wrong
            assert was_reset(local)
            refusal(stream.attach(link(), attempt=9))
    stream, local = hold(True)
    stream.attach(link(), at=0).wait_opened()
    stream.link.send_record(END)  # before bytes that were said on the link before
    assert_ended(stream.link)
    assert was_reset(local)
    for acks in (5,), (3, 2), (2**64 - 1,):
        with row(acks):
            stream, local = hold()
            for ack in acks:
                stream.link.send_record(peer.ACK, peer.encode_ack(ack))
            assert_ended(stream.link)
            assert was_reset(local)
            refusal(stream.attach(link()))


def test_36_an_attach_to_a_stream_of_which_the_tail_alone_is_left(link, hold):
    """What asks for other bytes than are kept is answered, and the stream is known no more."""
    for wrong in {"taken": 9}, {"at": 9}:
        with row(wrong):
            stream, local = hold()
            end(stream, local)
            stream.over(ack=False)
            peer.reset(stream.link.sock)
            bad = link()
            ask(bad, stream, **{"taken": 0, **wrong})
            assert [record.type for record in bad.read_to_end()] == [ERROR]
            again = link()
            ask(again, stream, attempt=9, taken=0)
            assert [record.type for record in again.read_to_end()] == [OVER, CLOSE]


def test_37_open_again_of_a_stream_that_ended(link, hold, listener):
    """The opener says Error where it was reset. Else Over is the answer; where it was lost, and all has been taken, the link is free again."""
    for how in "over", "Over was lost", "reset":
        with row(how):
            stream, local = hold()
            if how == "reset":
                stream.fail(UNKNOWN, "my originator vanished")
                assert was_reset(local)
                refusal(stream.attach(link()))
            else:
                end(stream, local)
                if how == "over":
                    stream.over()
                else:
                    assert is_ready(stream.link.sock, selectors.EVENT_READ, PATIENCE)  # it is there
                    peer.reset(stream.link.sock)
                assert stream.attach(link(), at=0 if how == "over" else stream.outgoing.sent).wait_opened() is None and stream.is_over
            if how == "Over was lost":
                live_and_end(*hold(on=stream.link))
            assert_no_connect(listener)


def test_37_open_of_a_stream_that_was_never_seen(link, listener):
    """Where nothing has passed it is a new one, whatever its attempt: the Opens before may have been lost."""
    stream = stranger(listener)
    attach(stream, link(), attempt=3)
    with accept(listener) as local:
        live_and_end(stream, local)
    for passed in ({"at": 1}, {"taken": 1}, {"at": 1, "taken": 1, "attempt": 2}):
        assert refusal(stranger(listener, bytes(16)).attach(link(), **passed)).code == UNKNOWN
    assert_no_connect(listener)


@pytest.mark.parametrize("resume", ["0", "1"])
def test_rule_08_a_stream_is_given_up_after_resume(link, hold, resume):
    """17: it is reset, never a clean end."""
    stream, local = hold(flags=("--resume", resume))
    BREAKS["FIN"](stream.link)
    assert was_reset(local)
    refusal(stream.attach(link()))


@pytest.mark.parametrize("limit", ["--max-streams", "--max-streams-per-key"])
def test_rule_08_at_a_limit_a_detached_stream_makes_room(link, hold, limit):
    """The longest detached one of the key that has most of them."""
    first, second = hold(flags=(limit, "2")), hold()
    peer.reset(first[0].link.sock)
    talk(*second)  # the server knows then that the first one is lost
    peer.reset(second[0].link.sock)
    third = hold()
    assert was_reset(first[1])
    refusal(first[0].attach(link()))
    for stream, local in (second, third):
        if stream is second[0]:
            attach(stream, link())
        live_and_end(stream, local)


def test_rule_09_an_attach_passes_the_limits(link, hold):
    """The key has all the links and streams that it may have. While a stream of it waits, it may have one more link, on which only an attach is
    accepted, and no new stream that says it is one."""
    stream, local = hold(is_detached=True, flags=("--max-links-per-key", "2", "--max-streams-per-key", "1"))
    links = [link() for _ in range(2)]
    for attempt in (1, 2):
        extra = link()
        another = peer.Stream(peer.Open(TCP, stream.target, b"", b"some new number.", attempt - 1)).attach(extra)
        assert_raises(PeerError, "as many connections of this client", another.wait_opened)
        extra.finish()
    attach(stream, link())
    talk(stream, local)
    assert_raises(PeerError, "as many connections of this client", link)
    assert_raises(PeerError, "as many streams", links[0].open(stream.target).wait_opened)
    live_and_end(stream, local)
    live_and_end(*hold(on=links[1]))


@sigterm
@pytest.mark.parametrize("drain", ["0", "600"])
def test_rule_10_a_server_that_ends(link, hold, drain):
    """Without a drain its links hear Error. 9: a drain does not wait for a stream that has no link."""
    stream, local = hold(is_detached=drain != "0", flags=("--drain", drain))
    link.server.process.send_signal(signal.SIGTERM)
    if drain == "0":
        pytest.raises(PeerError, stream.receive)
    assert was_reset(local)
    assert link.server.wait() == 0


def test_rule_11_abandon_gives_a_stream_up(link, hold, listener):
    """It wins over an attached link. A number that was never seen is ended by it too."""
    for detached in False, True:
        stream, local = hold(detached)
        idle = link()
        idle.send_record(peer.ABANDON, stream.number)
        assert was_reset(local)
        if not detached:
            assert_ended(stream.link)
        refusal(stream.attach(idle))
        idle = link()
        idle.send_record(peer.ABANDON, NUMBER)
        refusal(stranger(listener).attach(idle))
        assert_no_connect(listener)


def test_rule_13_a_stream_of_a_listener_moves_to_a_link_of_its_pool(link):
    """Detached, it keeps the listener alive; a newer instance on the address ends it."""
    streams = {}
    first = link(flags=("--allow-listen",), streams=streams)
    address = first.listen("127.0.0.1:0", b"instance")
    with dial(int(address.rpartition(":")[2])) as originator:
        stream = first.accept().opened()
        talk(stream, originator)
        peer.reset(first.sock)
        originator.sendall(b"meanwhile")
        spare = link(streams=streams)
        assert spare.listen(address, b"instance") == address
        assert spare.accept() is stream and stream.attempt == 2
        stream.opened()
        stream.resend()
        assert take(stream, 9) == b"meanwhile"
        talk(stream, originator)
        peer.reset(spare.sock)
        assert link().listen(address, b"instanc2") == address
        assert was_reset(originator)


def test_38_a_key_that_lost_its_permission(link, hold, keys):
    stream, local = hold(is_detached=True)
    permit(keys, 'permitopen="nowhere.example:1"')
    pytest.raises(PeerError, link().open(stream.target).wait_opened)  # the server looks at authorized_keys for each link that comes
    assert refusal(stream.attach(link())).code == peer.INVALID_HOST
    assert was_reset(local)


def test_39_many_detached_streams_of_one_key(start, keys, link, hold, second):
    """At most 1,024 of them, here 30. The longest detached one goes first, and other keys are served."""
    assert module.DETACHED_OF_KEY == 1024
    link.server = start(PYTHON, "-c", "import ratrod, sys; ratrod.DETACHED_OF_KEY = 30; sys.exit(ratrod.main())", "-k", keys.server.path,
                        "serve", "127.0.0.1:0", cwd=str(ROOT))
    link.port = int(link.server.wait_for(STARTED).group(1))
    held = [hold(is_detached=True) for _ in range(40)]
    assert was_reset(held[0][1])
    hold(who=second)
    for stream, local in (held[20], held[-1]):
        attach(stream, link())
        live_and_end(stream, local)


# ---------------------------------------------------------------------------------------------------- the real `connect`
@pytest.fixture
def home(keys, target, stack):
    return stack.enter_context(contextlib.closing(Waiting(keys, target)))


@pytest.fixture
def originate(home, connect, stack):
    """originate(flags...) -> (stream, the originator's end): opened, of a real client (`originate.client`), which the first call starts."""
    def make(*flags):
        if not hasattr(make, "client"):
            make.client = connect(home.port, "-v", *flags, "0:good:1").ready()
        originator = stack.enter_context(dial(tcp_port(make.client)))
        stream = home.stream().opened()
        talk(stream, originator)
        return stream, originator
    return make


def test_rule_05_a_clients_stream_goes_on_over_another_link(home, originate):
    """15 and 17."""
    for how in LOSSES:
        with row(how):
            stream, originator = originate()
            for attempt in (2, 3):
                lose(stream, how, originator)
                originator.sendall(b"meanwhile")
                stream.outgoing.keep(b"never sent")
                home.again(stream)
                assert stream.attempt == attempt
                assert take(stream, 9) == b"meanwhile"
                assert receive_exactly(originator, 10) == b"never sent"
            live_and_end(stream, originator)
            stream.link.finish()


def test_rule_03_the_opener_acknowledges_the_end(originate):
    """Its Ack of the last position answers Over, or Close after both Ends, which counts as Over."""
    stream, originator = originate()
    end(stream, originator)
    stream.over()
    stream.wait_acknowledged()
    stream.link.finish()  # the test has only the first stream of each link
    stream, originator = originate()
    end(stream, originator)
    stream.link.send_record(CLOSE)
    acks = [record.content for record in stream.link.read_to_end() if record.type == ACK]
    assert peer.decode_ack(acks[-1]) == stream.outgoing.sent


def test_36_what_ends_the_stream_of_a_client(home, originate):
    """An Ack beyond what was sent, one that goes back, and Opened with a `taken` beyond what was sent."""
    for acks in (100,), (3, 2):
        with row(acks):
            stream, originator = originate()
            for ack in acks:
                stream.link.send_record(peer.ACK, peer.encode_ack(ack))
            assert_ended(stream.link)
            assert was_reset(originator)
    stream, originator = originate()
    fin(stream.link)
    assert home.stream() is stream
    stream.opened(taken=100)
    assert was_reset(originator)


@pytest.mark.parametrize("resume", ["0", "1"])
def test_rule_08_a_client_gives_up_after_resume(home, originate, resume):
    """17: a reset, never a clean end."""
    stream, originator = originate("--resume", resume)
    if resume != "0":
        home.target.close()
    home.cut_all()
    assert was_reset(originator)
    if resume == "0":
        assert stream.attempt == 1


@pytest.mark.parametrize("ours, theirs", [("0", "600"), ("600", "0")])
def test_rule_08_ends_that_do_not_wait_equally_long(forward, tcp_echo, ours, theirs):
    """Either end acknowledges what it takes, whether it would wait for another link or not."""
    _, client = forward(RATROD2, "0:%d" % tcp_echo.port, serve_flags=("--resume", theirs), connect_flags=("--resume", ours))
    sockets.ask(tcp_port(client), bytes(range(256)) * (1 << 14))  # four windows


@sigterm
def test_rule_10_a_client_that_ends_says_error(originate):
    stream, _ = originate()
    originate.client.process.send_signal(signal.SIGTERM)
    pytest.raises(PeerError, stream.receive)


def test_rule_11_a_client_abandons_what_failed_while_it_was_detached(home, originate):
    stream, originator = originate()
    links = home.target.accepted
    home.open.clear()
    home.cut_all()
    eventually(lambda: home.target.accepted > links, "the client has noticed, and makes another link")
    peer.reset(originator)
    originate.client.wait_for("reset .the connection to the originator broke")
    home.open.set()
    eventually(lambda: any(stream.number in made.abandoned for made in home.links), "Abandon")
    assert stream.attempt == 1


def test_rule_13_a_stream_on_a_listen_link_of_a_client(home, connect, listener):
    """The server is the opener; the client has a new Listen link of the same instance for it, and connects once."""
    client = connect(home.port, "R:0:127.0.0.1:%d" % port_of(listener))
    link, asked = home.grant()
    stream = link.connect_to("203.0.113.9:5000")
    with accept(listener) as local:
        talk(stream, local)
        fin(stream.link)
        local.sendall(b"meanwhile")
        link, again = home.grant()
        assert again.instance == asked.instance
        attach(stream, link)
        assert take(stream, 9) == b"meanwhile"
        live_and_end(stream, local)
    assert_no_connect(listener)
    assert client.process.poll() is None


# ---------------------------------------------------------------------------------------------------- rule 7: which server a stream belongs to
@pytest.fixture
def reach(ratrod, keys, target, tcp_echo):
    """reach(ports of servers) -> (client, doors): each server stands behind a door of its own."""
    def make(*ports):
        doors = [Door(target, port) for port in ports]
        servers = ",".join("127.0.0.1:%d" % door.port for door in doors)
        client = ratrod("-v", "-k", keys.client.path, "connect", "--max-retry-interval", "1", servers, "0:127.0.0.1:%d" % tcp_echo.port).ready()
        return client, doors
    return make


@pytest.fixture
def converse(stack):
    """converse(client, n) -> n connections that have said something."""
    def make(client, n=1):
        made = [stack.enter_context(dial(tcp_port(client))) for _ in range(n)]
        ping(*made)
        return made
    return make


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no workers that share a port here")
def test_a_stream_finds_its_worker(serve, reach, converse):
    client, (door,) = reach(serve("--workers", "4")[1])
    connections = converse(client, 8)
    for _ in range(3):
        door.cut_all()
        ping(*connections)


def test_a_stream_finds_its_server_among_several(serve, reach, converse):
    """The other server takes what is new meanwhile; the stream waits for its own."""
    client, (one, two) = reach(serve()[1], serve()[1])
    [connection] = converse(client)
    to, one.to = one.to, None
    one.cut_all()
    client.wait_for("🔌 The link of 1 connection was lost")
    eventually(lambda: two.passing, "the other server is used")
    sockets.ask(tcp_port(client))
    one.to = to
    ping(connection)
    client.wait_for("✅ Over another link, after .*: 1 connection")


def test_a_stream_of_a_server_that_was_killed_is_reset_by_the_first_link_to_the_next(serve, reach, converse):
    """Each time: a restart is no second server behind one address."""
    server, port = serve()
    client, _ = reach(port)
    for _ in range(3):
        connections = converse(client, 3)
        server.kill()
        server, _ = serve(bind="127.0.0.1:%d" % port)
        assert_reset(*connections)
        eventually(lambda: works(tcp_port(client)), "the new one is used")
    assert "has been started anew" in client.output


def test_a_stream_of_one_of_two_servers_behind_one_address(serve, reach, converse):
    """A balancer shows both runs in turn: what can be found is found, and what has gone is reset after eight links to the other run."""
    servers = [serve() for _ in range(2)]
    client, (door,) = reach(servers[0][1])
    door.next = [port for _, port in servers]
    connections = converse(client, 6)
    door.cut_all()
    ping(*connections)
    servers[0][0].kill()
    eventually(lambda: "or another one answers" in client.output, "its streams are reset")
    sockets.ask(tcp_port(client))
