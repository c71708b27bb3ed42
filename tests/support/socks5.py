"""SOCKS5 by hand, from RFC 1928 and RFC 1929: requests, replies, and a client that a test drives byte by byte."""

import ipaddress
import struct

from support.sockets import dial, receive_exactly

SOCKS_LISTENING = r"\[SOCKS\] Listening on `.*?:(\d+)`"
CONNECT, BIND, ASSOCIATE = 1, 2, 3
GREETING, CHOSEN = b"\5\1\0", b"\5\0"


def encode_address(host, port):
    """Type, address and port as both requests and datagrams have them. Bytes are a name as it stands."""
    try:
        packed = ipaddress.ip_address(host if isinstance(host, str) else "").packed
        return (b"\1" if len(packed) == 4 else b"\4") + packed + struct.pack(">H", port)
    except ValueError:
        name = host if isinstance(host, bytes) else host.encode()
        return bytes([3, len(name)]) + name + struct.pack(">H", port)


def request(host, port, command=CONNECT):
    return bytes([5, command, 0]) + encode_address(host, port)


def read_reply(connection):
    """(code, (host, port))"""
    version, code, reserved, kind = receive_exactly(connection, 4)
    assert (version, reserved) == (5, 0) and kind in (1, 3, 4)
    size = {1: 4, 3: None, 4: 16}[kind] or receive_exactly(connection, 1)[0]
    host = receive_exactly(connection, size)
    port, = struct.unpack(">H", receive_exactly(connection, 2))
    return code, (host.decode() if kind == 3 else str(ipaddress.ip_address(host)), port)


def greet(connection):
    """Takes a connection past the choice of a method."""
    connection.sendall(GREETING)
    assert receive_exactly(connection, 2) == CHOSEN
    return connection


def ask_socks(proxy, asked, host="127.0.0.1"):
    """(connection, code of the reply, address in it) after this request to the proxy at port `proxy`."""
    connection = greet(dial(proxy, host))
    connection.sendall(asked)
    return (connection, *read_reply(connection))


def socks_port(client, n=1):
    """The port of the client's n-th SOCKS listener."""
    return int(client.wait_for(SOCKS_LISTENING, n).group(1))
