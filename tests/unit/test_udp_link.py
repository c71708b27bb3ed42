"""How long a datagram waits for the link of its session."""

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
