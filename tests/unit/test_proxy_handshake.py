"""`--proxy`, in memory: how a URL is read, what a proxy is asked over HTTP and SOCKS5, and answers of proxies that misbehave."""

import re

import pytest

import ratrod
from ratrod import AuthenticationError, RemoteProtocolError
from support.rows import assert_raises, row

SERVER = ratrod.Address("db.invalid", 19000)
REQUEST = b"\5\1\0\3\x0adb.invalid" + (19000).to_bytes(2, "big")
BOUND = b"\0\1\0\0\0\0\0\0"  # the rest of a SOCKS5 answer that names 0.0.0.0:0


def talk(url, answer, server=SERVER):
    """(all that the proxy at `url` is asked, how much of its `answer` was read): byte by byte, until it is done or has no more."""
    handshake = ratrod.ProxyHandshake(ratrod.parse_proxy(url, [server]), server)
    handshake.start()
    asked, taken = handshake.data_to_send(), 0
    while handshake.wanted and taken < len(answer):
        handshake.receive_data(answer[taken:taken + 1])
        taken += 1
        asked += handshake.data_to_send()
    if handshake.wanted:
        handshake.receive_eof()
    assert handshake.is_done
    return asked, taken


GOOD = [
    ("http://proxy", b"HTTP/1.1 200 Connection established\r\nVia: 1.1 x\r\n\r\n",
     b"CONNECT db.invalid:19000 HTTP/1.1\r\nHost: db.invalid:19000\r\n\r\n"),
    ("http://user:p@proxy", b"HTTP/1.0 299 Fine\n\n",
     b"CONNECT db.invalid:19000 HTTP/1.1\r\nHost: db.invalid:19000\r\nProxy-Authorization: Basic dXNlcjpw\r\n\r\n"),
    # SOCKS5. A name is looked up at the proxy: `db.invalid` is known to nobody here.
    ("socks5://proxy", b"\5\0\5\0" + BOUND, b"\5\1\0" + REQUEST), ("socks5://proxy", b"\5\0\5\0\0\3\7example\0\1", b"\5\1\0" + REQUEST),
    ("socks5h://proxy", b"\5\0\5\0\0\4" + bytes(18), b"\5\1\0" + REQUEST),
    # With a password, which the proxy may ask for or not.
    ("socks5://us%40er:p%40ss%3Aw%2F%C3%B6%20rd@proxy", b"\5\2\1\0\5\0" + BOUND,
     b"\5\2\0\2" + b"\1\5us@er\x0c" + "p@ss:w/ö rd".encode() + REQUEST),
    ("socks5://user:p@ss@proxy", b"\5\0\5\0" + BOUND, b"\5\2\0\2" + REQUEST),
]


def test_what_a_proxy_is_asked():
    """Nothing behind its answer is read: that is the server's, which may speak first."""
    for url, answer, asked in GOOD:
        with row((url, answer)):
            assert talk(url, answer + b"what the server says") == (asked, len(answer))
    for server, in_http, in_socks in (
            ("127.0.0.1", b"127.0.0.1:9", b"\1\x7f\0\0\1\0\x09"), ("::1", b"[::1]:9", b"\4" + bytes(15) + b"\1\0\x09"),
            ("hö", b"xn--h-1ga:9", b"\3\x09xn--h-1ga\0\x09")):
        assert talk("http://proxy", b"HTTP/1.1 200\n\r\n", ratrod.Address(server, 9))[0].startswith(b"CONNECT " + in_http + b" HTTP")
        assert talk("socks5://proxy", b"\5\0\5\0" + BOUND, ratrod.Address(server, 9))[0] == b"\5\1\0\5\1\0" + in_socks


SILENT = "it closed the connection before it had answered"
HTTP = {
    "garbage": (b"\x00\xff garbage", "does not speak HTTP"), "ssh": (b"SSH-2.0-OpenSSH_9.2p1\r\n", "does not speak HTTP"),
    "endless": (b"HTTP/1.1 200 OK\r\n" + b"X-Filler: and so on\r\n" * 1000, "more than 16384 bytes"),
    "endless line": (b"HTTP/1.1 200 OK" + b" " * 20000, "more than 16384 bytes"), "closes at once": (b"", SILENT),
    "closes in the header": (b"HTTP/1.1 200 OK\r\nVia: me\r\n", SILENT), "no code": (b"HTTP/1.1 hello\r\n\r\n", "answered `HTTP/1.1 hello`"),
    "odd code": (b"HTTP/1.1 2000 hello\r\n\r\n", "answered `HTTP/1.1 2000 hello`"),
    "100": (b"HTTP/1.1 100 Continue\r\n\r\n", "answered `HTTP/1.1 100 Continue`"),
    "302": (b"HTTP/1.1 302 Log in first\r\nLocation: http://x/\r\n\r\n", "302 Log in first"),
    "403": (b"HTTP/1.0 403 Forbidden\n\n", "answered `HTTP/1.0 403 Forbidden`"),
    "escapes": (b"HTTP/1.1 500 \x1b[31mred\x07\x9b\r\n\r\n", "500 \N{REPLACEMENT CHARACTER}\\[31mred\N{REPLACEMENT CHARACTER}"),
    "long": (b"HTTP/1.1 500 " + b"x" * 5000 + b"\r\n\r\n", "500 x{50,200}\\.\\.\\."),
}
SOCKS = {
    "http": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak SOCKS5, but HTTP: write http://"), "socks4": (b"\0\x5b", "does not speak SOCKS5"),
    "closes at once": (b"", SILENT), "closes before its answer": (b"\5\0\5\0", SILENT), "odd version": (b"\5\0\4\0" + BOUND, "it answered 0"),
    "odd address": (b"\5\0\5\0\0\x09" + BOUND, "an address that cannot be"), "empty name": (b"\5\0\5\0\0\3\0\0\1", "an address that cannot be"),
    **{"code %d" % code: (b"\5\0" + bytes((5, code)) + BOUND, says) for code, says in (
        (1, "it failed"), (2, "rules do not allow"), (3, "network is unreachable"), (4, "host is unreachable"), (5, "refused"),
        (6, "time to live"), (7, "cannot connect at all"), (8, "such an address"), (9, "it answered 9"), (255, "it answered 255"))},
}


@pytest.mark.parametrize("url, answers", [("http://proxy", HTTP), ("socks5://proxy", SOCKS)], ids=["http", "socks5"])
def test_a_proxy_that_misbehaves(url, answers):
    for name, (answer, says) in answers.items():
        with row(name):
            error = pytest.raises(RemoteProtocolError, talk, url, answer)
            assert not isinstance(error.value, AuthenticationError)
            assert re.search(says, str(error.value)) and str(error.value).isprintable(), error.value


def offering(*values, name=b"Proxy-Authenticate"):
    return b"HTTP/1.1 407 No\r\n" + b"".join(name + b": " + value + b"\r\n" for value in values) + b"\r\n"


def test_a_proxy_that_wants_what_is_not_spoken():
    """No password is wrong: it is named what the proxy wants, and what to do. Where Basic is among it, a user may help."""
    other_ways = (
        ((b"NTLM",), "NTLM"), ((b"Negotiate",), "Negotiate"), ((b"Negotiate", b"NTLM"), "Negotiate and NTLM"), ((b"NTLM TlRMTVNTUAAC=",), "NTLM"),
        ((b'Digest realm="a, Basic b", qop="auth", nonce="\\", Basic", stale=false',), "Digest"),
        ((b"Negotiate, NTLM,Kerberos",), "Negotiate and NTLM and Kerberos"),
        ((b'Digest realm = "Basic",\r\n Bearer realm="x"',), "Digest and Bearer"), ((b"\x1b[31m, NTLM",), "NTLM"))
    for user in ("", "user:p@"):
        for values, named in other_ways:
            for answer in (offering(*values), offering(*values, name=b"pRoXy-AuThEnTiCaTe").replace(b": ", b":").replace(b"407", b"407"),
                           offering(*values, name=b"WWW-Authenticate").replace(b"407", b"401")):
                with row((user, answer)):
                    error = pytest.raises(RemoteProtocolError, talk, "http://%sproxy" % user, answer)
                    assert not isinstance(error.value, AuthenticationError)
                    assert "it takes only %s, which ratrod does not speak: run a local proxy that does" % named in str(error.value)
        for values in ((b"NTLM", b'Basic realm="x"'), (b"Negotiate, basic",), (b'Digest realm="x", BASIC realm="y"',), (b"",), (b'"NTLM"',)):
            with row((user, values)), pytest.raises(AuthenticationError, match="it (wants|takes)"):
                talk("http://%sproxy" % user, offering(*values))
    error = assert_raises(RemoteProtocolError, "perhaps only GSSAPI, which ratrod does not speak", talk, "socks5://user:p@proxy", b"\5\xff")
    assert not isinstance(error, AuthenticationError)


def test_a_proxy_that_wants_a_user():
    """Another exit code: it is about secrets, and another try would end the same."""
    nobody, another = "it wants a user and a password: %s://user:password@...", "it takes another user and password"
    for url, answer, says in (
        ("http://proxy", b"HTTP/1.1 407 Proxy Auth Required\r\n\r\n", "it answered `HTTP/1.1 407 Proxy Auth Required`; " + nobody % "http"),
        ("http://proxy", b"HTTP/1.1 401 Unauthorized\r\n\r\n", "it answered `HTTP/1.1 401 Unauthorized`; " + nobody % "http"),
        ("http://user:wrong@proxy", b"HTTP/1.1 407 No\r\n\r\n", "it answered `HTTP/1.1 407 No`; " + another),
        ("socks5://proxy", b"\5\xff", nobody % "socks5"),
        # Methods that were not offered.
        ("socks5://proxy", b"\5\1", nobody % "socks5"), ("socks5://proxy", b"\5\2", nobody % "socks5"),
        ("socks5://user:wrong@proxy", b"\5\2\1\1", another),
    ):
        with row((url, answer)):
            error = pytest.raises(AuthenticationError, talk, url, answer)
            assert str(error.value) == says


def test_the_port_that_goes_without_saying():
    for url, shown, user, password in (("http://proxy", "http://proxy:1080", None, b""), ("socks5h://a@[::1]", "socks5://[::1]:1080", b"a", b""),
                                       ("http://a:b@c:80/", "http://c:80", b"a", b"b"), ("socks5://%ff:@c", "socks5://c:1080", b"\xff", b""),
                                       ("http://us%65r:%70ass@c", "http://c:1080", b"user", b"pass")):
        proxy = ratrod.parse_proxy(url, [])
        assert (str(proxy), proxy.user, proxy.password) == (shown, user, password)
        assert "b'b'" not in repr(proxy)


def test_urls_that_cannot_be():
    """A secret in them is not shown."""
    for url in ("", "proxy:3128", "https://proxy", "ftp://proxy", "http://", "http://:80", "http://secret@", "httph://proxy", "http://proxy:0",
                "http://proxy:65536", "http://proxy:x", "http://::1:80", "http://[::1:80", "socks4://proxy", "http://se%3Acret:x@proxy",
                "socks5://" + "s" * 256 + ":x@proxy", "socks5://u:" + "s" * 256 + "@proxy", "http://proxy:80/path",
                "http://secret:secret@a b\nc:80:90"):
        with row(url):
            error = assert_raises(ratrod.ConfigError, "cannot understand the --proxy: ", ratrod.parse_proxy, url, [])
            assert "secret" not in str(error) and "sss" not in str(error)


def test_servers_that_no_proxy_can_be_asked_for():
    for server in ("a b:9", "127.1:9", "[fe80::1%eth0]:9", "hö\u0661:9"):
        with row(server), pytest.raises(ratrod.ConfigError, match="no proxy can be asked for server "):
            ratrod.parse_proxy("http://127.0.0.1:9", ratrod.parse_servers(server))
