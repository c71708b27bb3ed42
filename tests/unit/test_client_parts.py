"""Parts of a client, each by itself."""

import contextlib
import types

import pytest

import ratrod


@pytest.mark.parametrize("backlog, waits, sent", [
    (b"", 0.0, True),  # the link came open, as it may on the original's wire: the handshake is no age
    (b"full", 0.1, True),
    (b"full", 0.3, False),  # behind a backlog it is stale after 0.2 s
])
def test_a_datagram_that_waited_for_its_link(backlog, waits, sent):
    loop = ratrod.EventLoop()
    try:
        loop.now = 100.0
        owner = types.SimpleNamespace(loop=loop, limits=ratrod.DEFAULT_LIMITS, memory=ratrod.Memory(1 << 20), pool=types.SimpleNamespace(
            take=lambda _udp: None))
        udp, came = ratrod.UdpLink(owner), []
        udp.sessions[1] = types.SimpleNamespace(is_over=False)
        loop.payload[:5] = b"early"
        udp.send_run(ratrod.HEADROOM + 5)
        link = types.SimpleNamespace(
            state=ratrod.UDP_OPEN, out=backlog, is_legacy=True, is_held=False, peer_key=b"",
            transport=types.SimpleNamespace(set_option=lambda *_: None),
            ask=lambda *_: None, writer=types.SimpleNamespace(datagrams=lambda scratch, end: bytes(scratch[ratrod.HEADROOM:end])), send=came.append,
            update=lambda: udp.on_update())
        loop.now += 5  # seconds that the handshake took
        udp.open(link, 1.0)
        loop.now += waits
        link.out = b""
        link.update()
        assert came == [b"early"] * sent
    finally:
        loop.close()


def test_links_of_a_reverse_tunnel_that_fail_in_one_moment_are_one_try():
    """With eight, the pause would be at its longest after one outage."""
    loop = ratrod.EventLoop()
    try:
        client = types.SimpleNamespace(
            loop=loop, limits=ratrod.DEFAULT_LIMITS, draining=False, started=True, is_stubborn=True, options=types.SimpleNamespace(retries=2),
            noticing=contextlib.nullcontext, may_ask_for=lambda _more: True, pool=types.SimpleNamespace(take=lambda _tunnel: None), give_up=print)
        tunnel = ratrod.ReverseTunnel(client, ratrod.parse_tunnels("R:9:localhost:5")[0], 0)
        tunnel.address = ratrod.Address("localhost", 9)
        for tries in 1, 2:
            for _ in range(8):
                tunnel.give_up(ratrod.LinkClosed("the path was cut"))
            assert tunnel._tries == tries
            tunnel.try_now()
    finally:
        loop.close()


def test_a_folder_of_sshs_sockets_that_was_cleaned_away(tmp_path):
    links = ratrod.SshLinks(ratrod.SshWay(["sh"]), ratrod.SshHost("", "far", 0), ratrod.DEFAULT_LIMITS)
    links._folder = str(tmp_path / "gone")
    assert links._find_connection(0.0) == ""
    links.close()
