"""PROXY headers, by HAProxy's proxy-protocol.txt: what a load balancer says before a connection."""

import ipaddress
import struct

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
TCP4, TCP6, UNIX, UNSPEC = 0x11, 0x21, 0x31, 0x00


def v2(body=b"", family=TCP4, command=1, version=2, length=None):
    return SIGNATURE + struct.pack(">BBH", version << 4 | command, family, len(body) if length is None else length) + body


def addresses(source, port=4711, destination=None):
    """The part of a version 2 header that names both ends, TCP over IPv4 or IPv6."""
    packed = [ipaddress.ip_address(text).packed for text in (source, destination or ("::2" if ":" in source else "10.0.0.2"))]
    return b"".join(packed) + struct.pack(">HH", port, 19000)


def introducing(source, port=4711):
    """The version 2 header of a connection that came from there."""
    return v2(addresses(source, port), TCP6 if ":" in source else TCP4)


def tlv(kind, value):
    return struct.pack(">BH", kind, len(value)) + value
