"""The SOCKS that a client of ratrod's serves, in memory: RFC 1928, RFC 1929, versions 4 and 4a, and the header of datagrams of version 5."""

import pytest

import ratrod
from ratrod import RemoteProtocolError, parse_target
from support.rows import assert_each_raises, assert_raises, row
from support.socks5 import ASSOCIATE, BIND, CONNECT, GREETING, encode_address, request

# The corners of RFC 1929: the longest password that there can be, with a colon in it, both words beyond ASCII.
USER, PASSWORD = "ä" * 10, ":" + "ß" * 127
LOGIN = "%s:%s" % (USER, PASSWORD)


def password(user, word, version=1):
    return bytes([version, len(user)]) + user + bytes([len(word)]) + word


GOOD = password(USER.encode(), PASSWORD.encode())
HELLO = GREETING + request("localhost", 80)


class Served:
    """A SocksHandshake that was fed `data`, at most `most` bytes at a time, until it was done or refused it: `error`, or None."""

    def __init__(self, data, user=None, most=1 << 20):
        self.handshake, self.took, self.answers, self.error = ratrod.SocksHandshake(user), 0, b"", None
        self.handshake.start()
        while self.error is None and self.handshake.wanted and self.took < len(data):
            piece = data[self.took:self.took + min(self.handshake.wanted, most)]
            self.took += len(piece)
            try:
                self.handshake.receive_data(piece)
            except RemoteProtocolError as error:
                self.error = error
            self.answers += self.handshake.data_to_send()


@pytest.mark.parametrize("most", [1, 1 << 20], ids=["byte by byte", "at once"])
def test_every_request_that_must_be_taken(most):
    """Not a byte before its end, and nothing of what follows it is read: that is the target's."""
    # What a client says: (the target, the answers before the reply, the command).
    taken = [
        (None, HELLO, b"\5\0", "localhost:80", CONNECT), (None, GREETING + request("127.0.0.1", 65535), b"\5\0", "127.0.0.1:65535", CONNECT),
        (None, GREETING + request("2001:db8::7", 1), b"\5\0", "[2001:db8::7]:1", CONNECT),
        (None, GREETING + request(b"x" * 255, 80), b"\5\0", "x" * 255 + ":80", CONNECT),
        (None, GREETING + request("0.0.0.0", 0, ASSOCIATE), b"\5\0", "0.0.0.0:0", ASSOCIATE),
        (None, GREETING + request("db", 80, BIND), b"\5\0", "db:80", BIND), (None, GREETING + request("db", 80, 9), b"\5\0", "db:80", 9),
        (LOGIN, b"\5\1\2" + GOOD + request("db", 80), b"\5\2\1\0", "db:80", CONNECT),
        (LOGIN, b"\5\2\0\2" + GOOD + request("db", 80), b"\5\2\1\0", "db:80", CONNECT),
        # The method is found among many.
        *((None, bytes([5, len(methods)]) + methods + request("db", 80), b"\5\0", "db:80", CONNECT) for methods in (
            b"\0\1\2", b"\2\1\0", bytes(range(255)), bytes(reversed(range(255))), b"\0" * 255)),
        # SOCKS4: whatever user it names. 4a: the name stands behind it, where the address is 0.0.0.x.
        *((None, b"\4\1\0\x50\x7f\0\0\1" + user + b"\0", b"", "127.0.0.1:80", CONNECT) for user in (b"", b"user", b"u" * 255)),
        *((None, b"\4\1\1\xbb\0\0\0" + last + b"user\0" + name + b"\0", b"", name.decode() + ":443", CONNECT)
          for last, name in ((b"\1", b"localhost"), (b"\xff", b"x" * 255), (b"\1", "bücher.example".encode()))),
        (None, b"\4\1\0\x50\0\0\0\0user\0", b"", "0.0.0.0:80", CONNECT),
    ]
    for user, data, answers, target, command in taken:
        with row(data):
            served = Served(data + b"what follows", user, most)
            assert (served.error, served.handshake.wanted, served.took, served.answers) == (None, 0, len(data), answers)
            assert (served.handshake.target, served.handshake.command) == (target, command)


@pytest.mark.parametrize("most", [1, 1 << 20], ids=["byte by byte", "at once"])
def test_everything_that_must_be_refused(most):
    failed_4, bad_login = b"\0\x5b" + bytes(6), b"\5\2\1\1"
    is_socks = ("This port is a SOCKS5 proxy. It is no HTTP proxy and no web server. "
                "Name it as socks5h://host:port, as in ALL_PROXY or curl --proxy.\n")
    refused = [
        # TLS, noise, words without an end: without an answer.
        *((None, data, b"") for data in (b"\x16\3\1\2\0\1\0\1\xfc\3\3", b"\0" * 5000, b"\xff" * 5000, b"\r\n", b"\1" * 5000, b" / HTTP/1.1",
                                         b"GET\r\n", b"A" * 5000, b"get / HTTP/1.1\r\n")),
        # HTTP, of a proxy's user, a browser, another version: what this port is.
        *((user, data + b"Host: localhost\r\n\r\n", ratrod.http_answer("400 Bad Request", is_socks)) for user in (None, LOGIN) for data in (
            b"GET / HTTP/1.1\r\n", b"CONNECT localhost:443 HTTP/1.1\r\n", b"POST http://a/ HTTP/1.0\r\n", b"PRI * HTTP/2.0\r\n",
            b"M-SEARCH * HTTP/1.1\r\n")),
        # SOCKS4: BIND, a password that it has not, and strings without an end.
        (None, b"\4\2\0\x50\x7f\0\0\1user\0", failed_4), (None, b"\4\3\0\x50\0\0\0\1\0name\0", failed_4),
        (LOGIN, b"\4\1\0\x50\x7f\0\0\1" + USER.encode() + b"\0", failed_4),
        *((None, b"\4\1\0\x50\0\0\0\1" + start + b"x" * 5000, b"") for start in (b"", b"\0")), (None, b"\5\0", b"\5\xff"),
        # RFC 1928: X'FF' where there is no method to choose from.
        *((None, bytes([5, len(methods)]) + methods, b"\5\xff") for methods in (
            b"\1", b"\2", b"\xff", b"\1\2", b"\x80\x81\x82", bytes(range(1, 256)))),
        # The method without a password is not to be had where one is asked for, nor by a request that follows at once.
        (LOGIN, HELLO, b"\5\xff"),
        # An address type that there is not, and an empty name: code 8.
        *((None, GREETING + bytes([5, 1, 0, kind]) + b"\x7f\0\0\1\0\x50", b"\5\0\5\x08\0\1\0\0\0\0\0\0") for kind in (0, 2, 5, 255)),
        (None, GREETING + request(b"", 80), b"\5\0\5\x08\0\1\0\0\0\0\0\0"),
        # A version that is another's, after a greeting that was right.
        *((None, GREETING + bytes([version]) + request("127.0.0.1", 80)[1:], b"\5\0\5\1\0\1\0\0\0\0\0\0") for version in (0, 4, 6, 255)),
        *((LOGIN, b"\5\1\2" + password(*words), bad_login) for good in [(USER.encode(), PASSWORD.encode())] for words in (
            (b"", b""), (good[0], b""), (b"", good[1]), (good[0], good[1][:-1]), (good[0][:-1], good[1]), (good[1], good[0]), (good[0], b"x" * 255),
            (b"\xff" * 255, b"\xff" * 255), (good[0] + b"\0", good[1]), (b"a" + good[0][1:], good[1]), (*good, 5), (*good, 0))),
    ]
    for user, data, answers in refused:
        with row(data[:100]):
            served = Served(data, user, most)
            assert served.error and served.answers == answers
            assert not served.handshake.is_done and str(served.error).isprintable()


def test_names_that_are_none():
    """They must not reach a resolver that makes something of them, and are no way to a Unix socket: a user of the proxy has been given the server's
    network, not its files. All names that are none are in test_core_keys.py."""
    for name in (b"a\0b", b"\xff\xfe", b"\x1b[2J", b"x" * 255, b"127.1", b"user@host", b"[::1]", b"localhost:1", b"::1%lo", b":",
                 "\uff11\uff12\uff17.0.0.1".encode(), b"unix:/run/s", b"/run/s", b"unix:/run/s#", b"x:unix:/run/s", b"UNIX:/run/s"):
        with row(name):
            datagram = memoryview(b"\0\0\0" + encode_address(name, 80) + b"data")
            for target in (Served(GREETING + request(name, 80)).handshake.target, ratrod.split_socks_datagram(datagram)[0]):
                pytest.raises(ValueError, parse_target, target)


def test_every_way_to_write_an_address():
    for host, port, target in (("localhost", 80, "localhost:80"), ("LOCALHOST", 80, "localhost:80"), (b"127.0.0.1", 80, "127.0.0.1:80"),
                               ("localhost.", 80, "localhost:80"), ("::ffff:127.0.0.1", 80, "127.0.0.1:80"), (b"::1", 80, "[::1]:80"),
                               ("::1", 80, "[::1]:80"), ("b\u00fccher.example".encode(), 80, "xn--bcher-kva.example:80")):
        with row(host):
            parsed = parse_target(Served(GREETING + request(host, port)).handshake.target)
            assert str(parsed) == target


def test_datagrams():
    datagrams_that_are_none = [
        b"", b"\0", b"\0\0\0", b"\0\0\0\1", b"\0\0\0\1\x7f\0\0", b"\0\0\0\1\x7f\0\0\1\0", b"\0\0\0\4" + bytes(15), b"\0\0\0\3",
        b"\0\0\0\3\0\0\x50data", b"\0\0\0\3\xffabc", b"\0\0\0\3\1a\0", b"\0\0\0\2\x7f\0\0\1\0\x50data", b"\0\0\0\xff",
        b"\0\0\0\1\x7f\0\0\1\0\0port zero", b"\xff" * 1000,
        b"\0\0\0\3\4\xff\xfe\n\0\0\x50data", b"\0\0\0\3\5a b\0c\0\x50data", b"\0\0\0\3\x0funix:/tmp/x.sock\0\x50data", b"\0\0\0\7" + bytes(65503),
        # RFC 1928: fragments may be dropped where reassembly is not implemented; a piece must not pass for the whole.
        *(b"\0\0" + bytes([frag]) + encode_address("127.0.0.1", 80) + b"a piece" for frag in (1, 2, 127, 128, 0x81, 255)),
    ]
    assert_each_raises(ValueError, None, lambda datagram: parse_target(ratrod.split_socks_datagram(memoryview(datagram))[0]), datagrams_that_are_none)
    for host, target in (("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("localhost", "localhost:80"), (b"a" * 255, "a" * 255 + ":80")):
        for data in (b"", b"x", b"x" * 65000):
            named, start = ratrod.split_socks_datagram(memoryview(b"\0\0\0" + encode_address(host, 80) + data))
            assert (named, start) == (target, 3 + len(encode_address(host, 80))), host
        if host[0] != 97:  # and written again it is the same
            assert ratrod.socks_address(parse_target(target)) == encode_address(host, 80)


def test_users_that_are_none():
    """RFC 1929 has no room for them (its lengths are 1 to 255): no client could ever give them."""
    assert_each_raises(ratrod.ConfigError, "--socks-user", lambda user: ratrod.check_tunnels(["0:socks"], legacy=False, socks_user=user), [
        "alice", "", ":", ":secret", "alice:", "a" * 256 + ":b", "a:" + "b" * 256, "ä" * 128 + ":b"])
    for user in ("a:b", "a" * 255 + ":" + "b" * 255, "a::", LOGIN):
        assert len(ratrod.check_tunnels(["0:socks"], legacy=False, socks_user=user)) == 1
    # And the option is the client's alone, and that of socks tunnels.
    assert_raises(ratrod.ConfigError, "--socks-user is for socks tunnels", ratrod.check_tunnels, ["2000:db:80"], legacy=False, socks_user="a:b")
    words = ["serve", "--socks-user", "a:b", "127.0.0.1:0"]
    assert_raises(ratrod.UsageError, "`--socks-user` does not belong to `serve`", ratrod.parse_command_line, words)
