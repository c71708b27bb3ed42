"""Links over ssh://, in memory: how servers are written, what a login shell may print first, and that bare records stay on pipes."""

import socket

import pytest

import ratrod
from support.rows import assert_raises, row
from test_core import every_cut, feed, started, whole

MARKER = b"\nratrod 00112233\n"


def test_servers():
    for text, expected in (("ssh://far", ("", "far", 0)), ("ssh://me@far:2222/", ("me", "far", 2222)),
                           ("ssh://a.b+c-d@[fe80::1%eth0]:22", ("a.b+c-d", "fe80::1%eth0", 22)), ("ssh://_x.Y-1", ("", "_x.Y-1", 0))):
        assert ratrod.parse_servers(text) == [expected]
        assert str(ratrod.parse_servers(text)[0]) == text.rstrip("/")


def shake(printed, cut=whole):
    """(the handshake, how much of what is printed was read)"""
    handshake = started(ratrod.PipeHandshake(b"program", MARKER))
    assert handshake.data_to_send() == b"program"
    return handshake, len(printed) - len(feed(handshake, cut(printed)))


@every_cut
def test_what_a_login_shell_prints(cut):
    """It is skipped, though it looks like the marker, and nothing behind the marker is read."""
    for chatter in (b"", b"Welcome!\n", MARKER[:-2], MARKER[:-2] * 3, b"\n" * 20, b"\nratrod \nratrod 0", b"x" * (60000 if cut is whole else 600)):
        with row(chatter[:50]):
            handshake, taken = shake(chatter + MARKER + b"a record", cut)
            assert (handshake.is_done, taken) == (True, len(chatter + MARKER))
            assert not shake(chatter + MARKER[:-1], cut)[0].is_done
    assert_raises(ratrod.RemoteProtocolError, "prints more than 65536 bytes", shake, b"x" * 100000)


def test_bare_records_get_on_no_network():
    """The one thing that must never be: a link over TCP that is not sealed."""
    loop = ratrod.EventLoop()
    server = ratrod.PipeServer(loop, ratrod.DEFAULT_LIMITS)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        with listener.accept()[0] as accepted:
            for made in (sock, accepted):
                with pytest.raises(ratrod.LocalProtocolError, match="^bare records are for ssh's pipes alone$"):
                    ratrod.Link(server, made, ratrod.PipeHandshake(), ratrod.ACCEPTOR)
    assert not server.links and not server.listeners
    server.close()
    loop.close()


def test_the_far_side_looks_for_no_list_of_keys():
    """It would have a thread for that, which wakes it once a second: one for each ssh:// link."""
    loop = ratrod.EventLoop()
    server = ratrod.PipeServer(loop, ratrod.DEFAULT_LIMITS)
    server.sweep()
    assert not server.files._threads
    server.close()
    loop.close()
