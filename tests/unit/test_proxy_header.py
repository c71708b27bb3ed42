"""The PROXY headers of HAProxy's proxy-protocol.txt, versions 1 and 2, in memory: which are taken, with what address, and which are refused."""

import pytest

import ratrod
from support.proxy_headers import SIGNATURE, TCP6, UNIX, UNSPEC, addresses, introducing, tlv, v2
from test_core import every_cut, feed, started, whole

ADDRESSES = addresses("198.51.100.7")
WHAT_FOLLOWS = b"ratrod2\n" + b"\0\x23" + bytes(135)


def read(data, cut=whole):
    """(the header, how many bytes of `data` it took)"""
    header = started(ratrod.ProxyHeader())
    return header, len(data) - len(feed(header, cut(data)))


@every_cut
def test_every_header_that_must_be_taken(cut):
    """Nothing of what follows is read: it is the client's."""
    # What must be taken, and the client's address; None: the header names none.
    taken = {
        "v2 TCP4": (introducing("198.51.100.7"), ("198.51.100.7", 4711)), "v2 TCP6": (introducing("2001:db8::7"), ("2001:db8::7", 4711)),
        "v2 mapped IPv4": (introducing("::ffff:198.51.100.8"), ("198.51.100.8", 4711)),
        "v2 TLVs": (v2(addresses("198.51.100.9") + tlv(0x02, b"example.com") + tlv(0x04, bytes(40)) + tlv(0x20, bytes(60))), ("198.51.100.9", 4711)),
        "v2 TCP6 and TLVs": (v2(addresses("2001:db8::9") + tlv(0x05, b"id"), TCP6), ("2001:db8::9", 4711)),
        "v2 port 0": (introducing("198.51.100.10", 0), ("198.51.100.10", 0)), "v2 loopback": (introducing("127.0.0.1"), ("127.0.0.1", 4711)),
        "v2 a listed source": (introducing("127.0.9.1"), ("127.0.9.1", 4711)), "v2 no address at all": (introducing("0.0.0.0"), ("0.0.0.0", 4711)),
        "v2 UNSPEC": (v2(family=UNSPEC), None), "v2 UNSPEC with a body": (v2(bytes(20), UNSPEC), None),
        "v2 UNIX": (v2(b"/client".ljust(108, b"\0") + b"/server".ljust(108, b"\0"), UNIX), None),
        "v1 TCP4": (b"PROXY TCP4 198.51.100.11 10.0.0.2 4711 19000\r\n", ("198.51.100.11", 4711)),
        "v1 TCP6": (b"PROXY TCP6 2001:db8::11 ::2 4711 19000\r\n", ("2001:db8::11", 4711)), "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
        "v1 UNKNOWN and more": (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
        "v1 the longest": (b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
                           ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)),
    }
    for name, (data, source) in taken.items():
        header, took = read(data + WHAT_FOLLOWS, cut)
        assert (header.wanted, took, header.source, header.is_local) == (0, len(data), source, False), name


def test_every_header_that_cannot_be():
    refused = {
        "no header": b"", "legacy without a header": b"\0" * 9, "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        **{"v2 version %d" % version: v2(ADDRESSES, version=version) for version in (0, 1, 3)},
        **{"v2 command %d" % command: v2(ADDRESSES, command=command) for command in (2, 15)},
        **{"v2 family and transport %#x" % family: v2(ADDRESSES, family) for family in (0x41, 0xF1, 0x13)},
        "v2 TCP4 of length 0": v2(), "v2 TCP4, a byte short": v2(ADDRESSES[:-1]), "v2 TCP6 with IPv4's length": v2(ADDRESSES, TCP6),
        "v2 TCP6, a byte short": v2(addresses("2001:db8::7")[:-1], TCP6), "v2 length 65535": v2(ADDRESSES, length=65535),
        "v2 length 65535, whole": v2(ADDRESSES + bytes(65535 - 12)),
        "v2 signature, last byte": SIGNATURE[:-1] + b"\r" + introducing("198.51.100.7")[12:],
        "v1 without an end": b"PROXY UNKNOWN " + b"x" * 200, "v1 one byte too long": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
        "v1 a bare LF": b"PROXY TCP4 198.51.100.7 10.0.0.2 4711 19000\n",
        **{"v1 %s" % text: ("%s\r\n" % text).encode("latin-1" if "\xff" in text else "utf-8") for text in (
            "PROXY       ", *("PROXY %s 198.51.100.7 10.0.0.2 4711 19000" % protocol for protocol in ("TCP5", "UDP4", "TCP6", "", "TCP4 ", "tcp4")),
            "proxy TCP4 198.51.100.7 10.0.0.2 4711 19000", "PROXY TCP4 2001:db8::7 ::2 4711 19000",
            *("PROXY TCP4 %s 10.0.0.2 4711 19000" % address for address in ("127.1", "198.051.100.007", "\xff\xfe\x80", "\x1b[31mred")),
            *("PROXY TCP4 198.51.100.7 10.0.0.2 " + ports for ports in ("4711", "4711 19000 1", "65536 19000", "04711 19000", "-1 19000",
                                                               "٤٧١١ 19000")))},
    }
    for name, data in refused.items():
        with pytest.raises(ratrod.RemoteProtocolError):
            header, took = read(data + WHAT_FOLLOWS)
            pytest.fail("%s: it took %d bytes, wants %d more, and names %s" % (name, took, header.wanted, header.source))


def test_local_is_the_proxys_own():
    """A health check names nobody, whatever its addresses say."""
    for data in (v2(family=UNSPEC, command=0), v2(addresses("198.51.100.7"), command=0), v2(bytes(300), 0x33, command=0)):
        header, took = read(data + WHAT_FOLLOWS)
        assert (header.wanted, took, header.source, header.is_local) == (0, len(data), None, True), data


def test_the_header_of_a_reverse_tunnels_visitor():
    """Written by --send-proxy, from the text of an Open. The address that the server listens on is of the visitor's family, or left open."""
    to_localhost = "10.0.0.2", "::2", "localhost"
    for visitor, own, header in (
        ("198.51.100.7:4711", to_localhost[0], v2(addresses("198.51.100.7"))),
        ("[2001:db8::7]:4711", to_localhost[1], v2(addresses("2001:db8::7"), TCP6)),
        ("[::ffff:198.51.100.7]:4711", to_localhost[0], v2(addresses("198.51.100.7"))),
        ("[fe80::1%eth0]:0", to_localhost[1], v2(addresses("fe80::1", 0), TCP6)),
        ("198.51.100.7:4711", "localhost", v2(addresses("198.51.100.7", destination="0.0.0.0"))),
        ("198.51.100.7:4711", "::", v2(addresses("198.51.100.7", destination="0.0.0.0"))),
        ("[2001:db8::7]:4711", "localhost", v2(addresses("2001:db8::7", destination="::"), TCP6)),
        *((nobody, "::1", v2(family=UNSPEC)) for nobody in ("unix", "", "db:80", "1.2.3.4:65536", "1.2.3.4", "1.2.3.4:5:6", "[::1", "unix:/a")),
    ):
        made = ratrod.proxy_header(visitor, ratrod.Address(own, 19000))
        assert made == header, (visitor, own)
        assert read(made + WHAT_FOLLOWS)[1] == len(made)


@pytest.mark.parametrize("data", [b"P", b"PROXY TCP4 19", b"PROXY TCP4 198.51.100.7", ratrod.PROXY_SIGNATURE, v2(addresses("198.51.100.7"))[:-1]])
def test_a_header_that_stops_is_a_failure_and_no_health_check(data):
    header, _ = read(data)
    caught = pytest.raises(ratrod.RemoteProtocolError, header.receive_eof)
    assert not isinstance(caught.value, ratrod.Speechless)
    pytest.raises(ratrod.Speechless, read(b"")[0].receive_eof)
