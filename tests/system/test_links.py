"""Links: how many a client makes and may have, and of how many processes. What they carry is in test_streams.py."""

import socket
import threading

from support import ratrod2_peer as peer
from support.programs import tcp_port, udp_originator
from support.scripted import Scripted
from support.sockets import ask_until_answered, dial, ping


def test_udp_tries_no_second_link_of_a_server_that_ended(ratrod, keys, target, stack):
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
        link.serve_streams(lambda stream: handle(stream, is_old))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % Scripted(keys, target, serve_link).port, "0:good:1").ready()
    locals_ = [stack.enter_context(dial(tcp_port(client))) for _ in range(6)]  # so many idle links
    for local in locals_:
        ping(local)
    for local in locals_:
        local.shutdown(socket.SHUT_WR)
        assert local.recv(1) == b""
    ask_until_answered(stack.enter_context(udp_originator(client)), b"hello")
    assert len(asked) < 6 and asked[-1] is False, asked  # those that were in their handshakes meanwhile may be tried
    assert "❌" not in client.output


def test_a_busy_port_stays_an_error_with_workers(ratrod, keys, serve):
    _, port = serve()
    again = ratrod("-k", keys.server.path, "serve", "--workers", "2", "127.0.0.1:%d" % port)
    assert again.wait() == 1
    assert "in use" in again.output
