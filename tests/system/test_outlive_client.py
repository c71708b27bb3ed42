"""Streams of a real `connect` that outlive their links: its server is the independent peer. See test_outlive.py."""

import contextlib
import signal

import pytest
from test_outlive import WINDOW, assert_no_connect, attach, end, every_loss, live_and_end, lose, sigterm, take, talk
from test_ratrod2_negative import assert_ended, fin, was_reset

from support import ratrod2_peer as peer
from support.programs import tcp_port
from support.ratrod2_peer import ACK, CLOSE, OVER, PeerError
from support.scripted import Waiting
from support.sockets import accept, ask, dial, eventually, port_of, receive_exactly

pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture
def home(keys, target):
    with contextlib.closing(Waiting(keys, target)) as made:
        yield made


@pytest.fixture
def originate(home, connect, stack):
    """originate(flags...) -> (stream, the originator's end): opened, of a real client (`originate.client`)."""
    def make(*flags):
        make.client = connect(home.port, "-v", *flags, "0:good:1").ready()
        originator = stack.enter_context(dial(tcp_port(make.client)))
        stream = home.stream()
        stream.opened()
        talk(stream, originator)
        return stream, originator
    return make


@every_loss
def test_rule_05_a_clients_stream_goes_on_over_another_link(home, originate, how):
    """15 and 17."""
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


@pytest.mark.parametrize("last", [OVER, CLOSE], ids=["Over", "Close"])
def test_rule_03_the_opener_acknowledges_the_end(originate, last):
    """Its Ack of the last position answers Over, or Close after both Ends, which counts as Over."""
    stream, originator = originate()
    end(stream, originator)
    if last == CLOSE:
        stream.link.send_record(CLOSE)
        acks = [record.content for record in stream.link.read_to_end() if record.type == ACK]
        assert peer.decode_ack(acks[-1]) == stream.outgoing.sent
    else:
        stream.over()
        stream.wait_acknowledged()


@pytest.mark.parametrize("acks", [[100], [3, 2]], ids=["beyond", "back"])
def test_36_an_ack_that_ends_the_stream_of_a_client(originate, acks):
    stream, originator = originate()
    for ack in acks:
        stream.link.send_ack(ack)
    assert_ended(stream.link)
    assert was_reset(originator)


def test_36_opened_with_a_taken_beyond_what_was_sent(home, originate):
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
def test_rule_08_ends_that_do_not_wait_equally_long(serve, connect, tcp_echo, ours, theirs):
    """Either end acknowledges what it takes, whether it would wait for another link or not."""
    _, port = serve("--resume", theirs)
    client = connect(port, "--resume", ours, "0:%d" % tcp_echo.port).ready()
    ask(tcp_port(client), bytes(range(256)) * (4 * WINDOW // 256))


@sigterm
def test_rule_10_a_client_that_ends_says_error(originate):
    stream, _ = originate()
    originate.client.process.send_signal(signal.SIGTERM)
    with pytest.raises(PeerError):
        stream.receive()


def test_rule_11_a_client_abandons_what_failed_while_it_was_detached(home, originate):
    stream, originator = originate()
    links = home.target.accepted
    home.open.clear()
    home.cut_all()
    eventually(lambda: home.target.accepted > links, "the client has noticed, and makes another link")
    peer.reset(originator)
    originate.client.wait_for("reset .its local connection broke")
    home.open.set()
    eventually(lambda: any(stream.number in made.abandoned for made in home.links), "Abandon")
    assert stream.attempt == 1


def test_rule_13_a_stream_on_a_listen_link_of_a_client(home, connect, listener):
    """The server is the opener; the client has a new Listen link of the same instance for it, and connects once."""
    client = connect(home.port, "R:0:127.0.0.1:%d" % port_of(listener))
    link, asked = home.grant()
    stream = link.open("203.0.113.9:5000")
    stream.wait_opened()
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
