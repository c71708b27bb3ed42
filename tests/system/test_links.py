"""Links: how many a client makes and may have, and of how many processes. What they carry is in test_streams.py."""

import contextlib
import socket
import threading

from support import ratrod2_peer as peer
from support.programs import LISTENING
from support.scripted import Scripted
from support.sockets import dial, eventually, receive_exactly


def test_udp_tries_no_second_link_of_a_server_that_ended(ratrod, keys, target):
    """As many idle links as there are tries, and each says Close: after the first the others are not trusted either."""
    ended, asked = threading.Event(), []
    def handle(stream, is_old):
        if stream.kind == peer.TCP:
            return peer.echo(stream)
        asked.append(is_old)
        ended.set()
        if not is_old:
            return peer.serve_udp(stream)
        stream.link.send_record(peer.CLOSE)
        return stream.link.read_to_end()
    def serve_link(link, _number):
        is_old = not ended.is_set()
        with contextlib.suppress(peer.LinkEnded):
            link.serve_streams(lambda stream: handle(stream, is_old))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % Scripted(keys, target, serve_link).port, "0:good:1").ready()
    with contextlib.ExitStack() as stack:  # so many idle links
        locals_ = [stack.enter_context(dial(int(client.wait_for(LISTENING).group(1)))) for _ in range(6)]
        for local in locals_:
            local.sendall(b"?")
        for local in locals_:
            assert receive_exactly(local, 1) == b"?"
            local.shutdown(socket.SHUT_WR)
            assert local.recv(1) == b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", int(client.wait_for(r"\[UDP\] Listening on `.*?:(\d+)`").group(1))))
        def is_answered():
            sock.send(b"hello")
            with contextlib.suppress(socket.timeout):
                return sock.recv(100) == b"hello"
        eventually(is_answered, lambda: "%s, %s" % (asked, client.output))
    assert len(asked) < 6 and asked[-1] is False, asked  # those that were in their handshakes meanwhile may be tried
    assert "❌" not in client.output


def test_a_busy_port_stays_an_error_with_workers(ratrod, keys, serve):
    _, port = serve()
    again = ratrod("-k", keys.server.path, "serve", "--workers", "2", "127.0.0.1:%d" % port)
    assert again.wait() == 1
    assert "in use" in again.output
