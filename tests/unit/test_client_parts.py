"""Parts of a client, each by itself."""

import contextlib
import types

import pytest

import ratrod


@pytest.mark.parametrize("handshake, backlog, waits, sent", [
    (5, b"", 0.0, True),  # the link came open, as it may on the original's wire: the handshake is no age
    (5, b"full", 0.1, True),
    (5, b"full", 0.3, False),  # behind a backlog it is stale after 0.2 s
    (11, b"", 0.0, False),  # over ssh a link may be a minute away
])
def test_a_datagram_that_waited_for_its_link(handshake, backlog, waits, sent):
    early = ratrod.DATAGRAM_HEADER.pack(1, 5) + b"early"
    with contextlib.closing(ratrod.EventLoop()) as loop:
        loop.now = 100.0
        owner = types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS._replace(udp_backlog=23 * len(early)), memory=ratrod.Memory(1 << 20),
                                      pool=types.SimpleNamespace(waiting=(), take=lambda _udp: None), counters=types.SimpleNamespace(dropped=0))
        udp, came = ratrod.UdpLink(owner), []
        udp.sessions[1] = types.SimpleNamespace(is_over=False)
        loop.payload[:11] = early
        for n in range(25):  # with room for 23
            assert owner.counters.dropped == max(0, n - 23)
            udp.send_run(ratrod.HEADROOM + len(early))
        link = types.SimpleNamespace(
            state=ratrod.UDP_OPEN, out=backlog, is_legacy=True, is_held=False, peer_key=b"",
            transport=types.SimpleNamespace(set_option=lambda *_: None),
            ask=lambda *_: None, writer=types.SimpleNamespace(datagrams=lambda scratch, end: bytes(scratch[ratrod.HEADROOM:end])), send=came.append,
            update=lambda: udp.on_update())
        loop.now += handshake
        udp.open(link)
        loop.now += waits
        link.out = b""
        link.update()
        assert came == [early * 23] * sent and owner.counters.dropped == (2 if sent else 25)


def test_links_of_a_reverse_tunnel_that_fail_in_one_moment_are_one_try():
    """With eight, the pause would be at its longest after one outage."""
    with contextlib.closing(ratrod.EventLoop()) as loop:
        client = types.SimpleNamespace(
            loop=loop, limits=ratrod.DEFAULT_LIMITS, draining=False, started=True, is_stubborn=True, options=types.SimpleNamespace(retries=2),
            notice=lambda: None, may_ask_for=lambda _more: True, pool=types.SimpleNamespace(take=lambda _tunnel: None), give_up=print)
        tunnel = ratrod.ReverseTunnel(client, ratrod.parse_tunnels("R:9:localhost:5")[0], 0)
        tunnel.address = ratrod.Address("localhost", 9)
        for tries in 0, 1:
            for _ in range(8):
                tunnel.fail(ratrod.LinkClosed("the path was cut"))
            assert tunnel.retry._tries == tries
            tunnel.retry._on_due()  # where somebody hurries the next pause has begun before this try fails


def test_a_folder_of_sshs_sockets_that_was_cleaned_away(tmp_path):
    links = ratrod.SshLinks(["sh"], "python3", ratrod.SshHost("", "far", 0), ratrod.DEFAULT_LIMITS)
    links._folder = str(tmp_path / "gone")
    assert links._find_connection(0.0) == ""
    links.close()


def test_a_udp_link_that_held_for_datagrams_of_sessions_that_have_ended():
    """They ended between two turns: nothing is left to wait for, and what comes next on the link is read."""
    with contextlib.closing(ratrod.EventLoop()) as loop:
        udp = ratrod.UdpLink(types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, memory=ratrod.Memory(1 << 20),
                                                   counters=ratrod.Counters(loop)))
        udp.link = types.SimpleNamespace(state=ratrod.UDP_OPEN, out=b"", is_held=True, release=lambda: setattr(udp.link, "is_held", False),
                                         update=lambda: udp.on_update())
        udp._go_on()
        assert not udp.link.is_held
        udp.link.out = b"what the other side does not read"
        ratrod.DATAGRAM_HEADER.pack_into(loop.scratch_out, ratrod.HEADROOM, 1, 1)
        for _ in range(100):
            loop.now += 0.02
            udp.send_run(ratrod.HEADROOM + ratrod.DATAGRAM_HEADER.size + 1)
        assert len(udp._queue) <= 11, "what is too old goes: 256 KiB of single bytes had been 30 times as much memory"


def test_datagrams_that_are_broken_beyond_their_first_turn_end_the_link():
    """What comes in one record is delivered in several turns: that its end is wrong is seen in the last of them."""
    with contextlib.closing(ratrod.EventLoop()) as loop:
        udp = ratrod.UdpLink(types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, memory=ratrod.Memory(1 << 20)))
        ended = []
        udp.link = types.SimpleNamespace(state=ratrod.UDP_OPEN, out=b"", is_held=False, abort=ended.append, update=lambda: None)
        run = ratrod.DATAGRAM_HEADER.pack(7, 0) * ratrod.DATAGRAMS_IN_TURN + ratrod.DATAGRAM_HEADER.pack(7, 1)
        udp._deliver(udp.link, memoryview(run))
        assert udp.link.is_held and not ended
        udp._go_on()
        assert [type(error) for error in ended] == [ratrod.RemoteProtocolError]


def test_a_udp_link_that_is_found_broken_while_its_idle_sessions_end():
    """The first SessionOver finds that its client has gone, which ends all of its sessions."""
    with contextlib.closing(ratrod.EventLoop()) as loop:
        owner = types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, memory=ratrod.Memory(1 << 20), counters=ratrod.Counters(loop),
                                      on_udp_lost=lambda udp, _link, _error: udp.close())
        sessions, udp = ratrod.UdpSessions(owner, 9, "", -1.0), ratrod.UdpLink(owner, b"key")
        def break_(*_record):
            udp.on_close(udp.link, ratrod.LinkClosed("reset"))
        udp.link = types.SimpleNamespace(is_legacy=False, send_record=break_, close=lambda: None)
        for number in range(3):
            sessions.add(ratrod.UdpSession(udp, number, "", ""))
        sessions.sweep()
        assert not udp.sessions and not owner.counters.sessions and not sessions._of_key


def test_a_socks_client_that_reset_its_connection_before_the_reply(monkeypatch):
    """The system says it once: a read after that would find a clean end, and a cut upload would look whole. After a wrong Opened none is sent."""
    failed = []
    class Stream(ratrod.SocksStream):
        def _on_local_failed(self, error):
            failed.append(error)
    def send(_data):
        raise ConnectionResetError
    stream = object.__new__(Stream)
    stream.was_opened, stream.version, stream.local = False, 5, types.SimpleNamespace(send=send)
    stream.out = types.SimpleNamespace(keeps=True)
    pytest.raises(ratrod.RemoteProtocolError, stream._on_opened, None, ratrod.Opened(""))
    assert not failed
    monkeypatch.setattr(ratrod.OpenerStream, "_on_opened", lambda *_: None)
    stream._on_opened(None, ratrod.Opened("", 0))
    assert len(failed) == 1


def test_a_run_that_took_its_reverse_address_back_is_no_earlier_run():
    listener = object.__new__(ratrod.ReverseListener)
    listener.instance, listener._retired, listener.links = b"A", [b"A", b"B"], [types.SimpleNamespace(instance=b"A")]
    assert not listener.is_retired(b"A") and listener.is_retired(b"B") and not listener.is_retired(b"C")


def test_an_open_on_a_listen_link_that_is_too_old_is_no_loss_of_a_link():
    """Its end would count as a failed try of the tunnel."""
    left = []
    client = types.SimpleNamespace(loop=types.SimpleNamespace(now=1e6), limits=ratrod.DEFAULT_LIMITS, draining=False, options=None)
    tunnel = object.__new__(ratrod.ReverseTunnel)
    tunnel._client, tunnel._loop = client, client.loop
    class Old:
        born, leave, writer = 0.0, left.append, types.SimpleNamespace(record=lambda kind: kind)
    link = Old()
    tunnel.waiting = {link}
    tunnel.on_open(link, ratrod.Open(ratrod.TCP, "visitor"))
    assert left == [ratrod.CLOSE] and not tunnel.waiting


def test_of_thousands_of_addresses_of_a_name_a_few_are_tried(monkeypatch):
    found = [(ratrod.socket.AF_INET, 1, 6, "", ("10.0.%d.%d" % divmod(n, 256), 5)) for n in range(4000)]
    monkeypatch.setattr(ratrod.socket, "getaddrinfo", lambda *_args, **_options: found)
    assert ratrod.look_up(ratrod.Address("many.example", 5)) == [(2, address) for *_, address in found[:64]]


def test_a_mistake_in_the_sweep_of_one_link_ends_that_link_alone():
    """A sweep that ended there would end so each second, and nothing that waits would ever time out."""
    ended = []
    class Broken:
        user, due = None, ratrod.NEVER
        def abort(self, error):
            ended.append(str(error))
    with contextlib.closing(ratrod.EventLoop()) as loop:
        end = ratrod.Endpoint(loop, ratrod.NoKeys(), ratrod.DEFAULT_LIMITS, ratrod.Callbacks(), is_legacy=False, memory=1)
        end.links |= {Broken(), Broken()}
        end._on_sweep()
    assert ended == ["'NoneType' object has no attribute 'on_sweep'"] * 2
