"""`connect --proxy`: tinyproxy and microsocks as real proxies in the way, and proxies that misbehave in every way a client could trip over."""

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

import ratrod as ratrod_module
from support.programs import PATIENCE, RATROD2, READY, ROOT, every_mode, need, tcp_port, udp_originator
from support.sockets import ask, check_bulk_each_way, dial, free_port, port_of, receive_all, receive_exactly

pytestmark = pytest.mark.usefixtures("no_traceback")
USER, PASSWORD = "us@er", "p@ss:w/ö rd"
ESCAPED = "us%40er:p%40ss%3Aw%2F%C3%B6%20rd"


class RealProxy:
    """A proxy as a child process; `port` once it takes connections, which the test ends."""

    def __init__(self, start, make_command, host="127.0.0.1"):
        for _ in range(5):  # the port may have been taken meanwhile
            self.port = free_port()
            self.program = start(*make_command(self.port))
            if self._listens(host):
                return
        pytest.fail(self.program.output)

    def _listens(self, host):
        while self.program.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection((host, self.port), timeout=PATIENCE).close()
                return True
        return False


@pytest.fixture
def tinyproxy(start, tmp_path):
    """tinyproxy(user=, password=) -> RealProxy"""
    program = need("tinyproxy")

    def launch(*auth, host="127.0.0.1"):
        def command(port):
            config = tmp_path / ("tinyproxy-%d.conf" % port)
            config.write_text("Port %d\nListen %s\nTimeout 600\nMaxClients 100\nLogLevel Info\nAllow 127.0.0.1\nAllow ::1\n%s" % (
                port, host, "BasicAuth %s %s\n" % auth if auth else ""))
            return program, "-d", "-c", config
        return RealProxy(start, command, host)
    return launch


@pytest.fixture
def microsocks(start):
    """microsocks(user=, password=) -> RealProxy"""
    program = need("microsocks")

    def launch(*auth, host="127.0.0.1"):
        return RealProxy(start, lambda port: (program, "-i", host, "-p", port, *(("-u", auth[0], "-P", auth[1]) if auth else ())), host)
    return launch


# ---------------------------------------------------------------------------------------------------- through real ones


@every_mode
@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_tunnel_through_a_proxy(tinyproxy, microsocks, forward, tcp_echo, udp_echo, mode, scheme):
    proxy = tinyproxy() if scheme == "http" else microsocks()
    _, client = forward(mode, "0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % udp_echo.port,
                        connect_flags=("--proxy", "%s://127.0.0.1:%d" % (scheme, proxy.port)))
    assert "through `%s://127.0.0.1:%d`" % (scheme, proxy.port) in client.output
    for _ in range(5):
        if mode is RATROD2:
            ask(tcp_port(client))
        else:  # both proxies close both directions at the first end: the legacy wire, where that is a stream's end, has no half-close there
            with dial(tcp_port(client)) as connection:
                connection.sendall(b"question")
                assert receive_exactly(connection, 8) == b"question"
    with udp_originator(client, 2) as originator:
        originator.send(b"a datagram")
        assert originator.recv(100) == b"a datagram"
    # Every link went through it.
    proxy.program.stop()
    if scheme == "http":
        assert len([line for line in proxy.program.lines if "CONNECT 127.0.0.1:" in line]) >= 2, proxy.program.output


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_bulk_through_a_proxy(tinyproxy, microsocks, forward, listener, scheme):
    proxy = tinyproxy() if scheme == "http" else microsocks()
    _, client = forward(RATROD2, "0:127.0.0.1:%d" % port_of(listener),
                        connect_flags=("--proxy", "%s://127.0.0.1:%d" % (scheme, proxy.port)))
    with dial(tcp_port(client)) as near:
        far, _ = listener.accept()
        with far:
            check_bulk_each_way((near, far))


# tinyproxy's configuration knows letters and digits, microsocks takes whatever its command line can hold.
@pytest.mark.parametrize(("scheme", "user", "password", "typed"), [
    ("http", "user", "pass", "user:pass"), ("http", "user", "pass", "us%65r:%70ass"), ("socks5", "user", "p@ss", "user:p@ss"),
    ("socks5", "user", "pass", "user:pass"), ("socks5", USER, PASSWORD, ESCAPED), ("socks5h", "user", "pass", "user:pass")])
def test_credentials(tinyproxy, microsocks, serve, connect, scheme, user, password, typed):
    proxy = (tinyproxy if scheme == "http" else microsocks)(user, password)
    _, port = serve()
    client = connect(port, "-v", "--proxy", "%s://%s@127.0.0.1:%d" % (scheme, typed, proxy.port), "0:127.0.0.1:1")
    client.wait_for(READY)
    client.stop()
    for secret in (password, typed):
        assert secret not in client.output


@pytest.mark.parametrize(("scheme", "typed", "says"), [
    ("http", "", "407.*wants a user and a password"), ("http", "user:wrong@", "(401|407).*another user and password|401"),
    ("socks5", "", "wants a user and a password: socks5://"), ("socks5", "user:wrong@", "another user and password")])
def test_wrong_credentials(tinyproxy, microsocks, serve, connect, scheme, typed, says):
    proxy = (tinyproxy if scheme == "http" else microsocks)("user", "password")
    _, port = serve()
    client = connect(port, "-v", "--proxy", "%s://%s127.0.0.1:%d" % (scheme, typed, proxy.port), "0:127.0.0.1:1")
    client.wait_for("the proxy `%s://127.0.0.1:%d` does not connect to the server `127.0.0.1:%d`: .*(%s)" % (scheme, proxy.port, port, says))
    assert client.wait() == 3
    assert "wrong" not in client.output


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_proxy_and_a_server_with_ipv6_addresses(tinyproxy, microsocks, serve, ratrod, keys, tcp_echo, scheme):
    proxy = (tinyproxy if scheme == "http" else microsocks)(host="::1")
    _, port = serve(bind="[::1]:0")
    client = ratrod("-k", keys.client.path, "connect", "--proxy", "%s://[::1]:%d/" % (scheme, proxy.port), "[::1]:%d" % port,
                    "0:127.0.0.1:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_server_that_is_not_there(tinyproxy, microsocks, connect, scheme):
    proxy = (tinyproxy if scheme == "http" else microsocks)()
    port = free_port()
    client = connect(port, "--proxy", "%s://127.0.0.1:%d" % (scheme, proxy.port), "0:127.0.0.1:1")
    client.wait_for("the proxy `.*` does not connect to the server `127.0.0.1:%d`: .*(5[0-9][0-9]|refused|failed)" % port)
    assert client.wait() == 1


def test_the_server_is_known_by_its_own_address(microsocks, serve, connect, keys):
    # known_hosts lines are for what was typed as SERVER: one for the proxy's address would vouch for every server behind it.
    proxy = microsocks()
    _, port = serve()
    line = keys.client.path / "known_hosts"
    line.write_text("%s 127.0.0.1:%d\n" % (keys.server.public, proxy.port))
    words = "--proxy", "socks5://127.0.0.1:%d" % proxy.port
    client = connect(port, *words, "0:127.0.0.1:1")
    assert client.wait() == 3
    assert "127.0.0.1:%d" % port in client.output
    connect(port, *words, "--accept-new", "0:127.0.0.1:1").wait_for(READY)
    assert "%s 127.0.0.1:%d" % (keys.server.public, port) in line.read_text()


def test_names_are_looked_up_at_the_proxy(serve, ratrod, keys, fake):
    # `db.invalid` is known to nobody here; a proxy that takes the name connects to whom it likes.
    _, port = serve()
    proxy, seen = fake(socks_relay(port))
    keys.client.write("known_hosts", "")
    client = ratrod("-k", keys.client.path, "connect", "--accept-new", "--proxy", "socks5://127.0.0.1:%d" % proxy,
                    "db.invalid:19000", "0:127.0.0.1:1")
    client.wait_for(READY)
    assert b"\x05\x01\x00\x03\x0adb.invalid" + struct.pack(">H", 19000) in seen
    assert "db.invalid:19000" in (keys.client.path / "known_hosts").read_text()


def test_several_servers_and_reconnect_through_a_proxy(tinyproxy, ratrod, serve, keys, tcp_echo):
    proxy = tinyproxy()
    server, port = serve()
    _, other = serve()
    gone = free_port()
    client = ratrod("-v", "-k", keys.client.path, "connect", "--proxy", "http://127.0.0.1:%d" % proxy.port,
                    "127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d" % (gone, port, other), "0:127.0.0.1:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))
    server.stop(signal.SIGKILL)
    # The proxy takes this connection for a server that is not there any more; the next link goes to the next server.
    ask(tcp_port(client))
    client.stop()
    assert "link to `127.0.0.1:%d`" % other in client.output


def test_the_proxy_goes_and_comes_back(start, tinyproxy, tmp_path, serve, connect, tcp_echo):
    proxy = tinyproxy()
    _, port = serve()
    client = connect(port, "--proxy", "http://127.0.0.1:%d" % proxy.port, "0:127.0.0.1:%d" % tcp_echo.port)
    client.wait_for(READY)
    proxy.program.process.kill()
    client.wait_for("Lost the server")
    start(need("tinyproxy"), "-d", "-c", tmp_path / ("tinyproxy-%d.conf" % proxy.port))
    client.wait_for("Connected to server .* again")
    ask(tcp_port(client))


def test_from_python(tinyproxy, serve, keys, tcp_echo):
    _, port = serve()
    program = """
import ratrod, socket, sys
proxy, server, target, keys = sys.argv[1:]
with ratrod.tunnel(server, "0:127.0.0.1:" + target, key_path=keys, proxy=proxy) as tunnel:
    sock = socket.create_connection(tunnel.address)
    sock.sendall(b"hello"); print(sock.recv(10).decode())
try:
    ratrod.tunnel(server, key_path=keys, proxy="ftp://user:secret@x")
except ratrod.ConfigError as error:
    print("ConfigError", "secret" in str(error))
try:
    ratrod.tunnel(server, key_path=keys, proxy=proxy.replace("pass", "secret"))
except ratrod.AuthenticationError as error:
    print("AuthenticationError", "secret" in str(error))
"""
    proxy = tinyproxy("user", "pass")
    result = subprocess.run([sys.executable, "-c", program, "http://user:pass@127.0.0.1:%d" % proxy.port, "127.0.0.1:%d" % port,
                             str(tcp_echo.port), str(keys.client.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert result.stdout.splitlines() == ["hello", "ConfigError False", "AuthenticationError False"]


# ---------------------------------------------------------------------------------------------------- hostile ones


@pytest.fixture
def fake(target):
    """fake(handle) -> (port, seen): handle(connection, read) for each connection; read(n) keeps what it reads in `seen`, a bytearray."""
    def launch(handle):
        seen = bytearray()

        def serve_one(connection):
            connection.settimeout(PATIENCE)

            def read(n):
                data = receive_exactly(connection, n)
                seen.extend(data)
                return data
            with contextlib.suppress(AssertionError):  # the client went
                handle(connection, read)
        return target(serve_one).port, seen
    return launch


def pump(one, other):
    def copy(source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=copy, args=(other, one), daemon=True)
    thread.start()
    copy(one, other)
    thread.join(PATIENCE)


def socks_relay(port):
    """A SOCKS5 proxy that connects everything to one port, and answers with a name as its own address."""
    def handle(connection, read):
        read(3)
        connection.sendall(b"\5\0")
        read(read(5)[4] + 2)
        with dial(port) as server:
            connection.sendall(b"\5\0\0\3\7example\0\1")
            pump(connection, server)
    return handle


def read_request(connection, read):
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += read(1)
    return data


def http_answer(answer, then=lambda connection: None):
    def handle(connection, read):
        read_request(connection, read)
        connection.sendall(answer)
        then(connection)
    return handle


def drip(connection):
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"X-Filler: and so on\r\n")


def hold(connection):
    with contextlib.suppress(OSError):
        receive_all(connection)


def socks_answers(*answers, hold_on=False):
    """One answer for each message: greeting, (password,) request."""
    def handle(connection, _read):
        for answer in answers:
            connection.recv(1000)
            connection.sendall(answer)
        if hold_on:
            hold(connection)
    return handle


def nothing(connection, _read):
    """Closes at once."""


def silence(connection, _read):
    hold(connection)


HTTP = {
    "garbage": (http_answer(b"\x00\xff garbage"), "does not speak HTTP"),
    "ssh": (http_answer(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "does not speak HTTP"),
    "endless": (http_answer(b"HTTP/1.1 200 OK\r\n", drip), "more than 16384 bytes"),
    "endless line": (http_answer(b"HTTP/1.1 200 OK" + b" " * 20000, hold), "more than 16384 bytes"),
    "closes at once": (nothing, "before it had answered"),
    "closes in the header": (http_answer(b"HTTP/1.1 200 OK\r\nVia: me\r\n"), "before it had answered"),
    "silent": (silence, "not done within"),
    "silent in the header": (http_answer(b"HTTP/1.1 200 OK\r\n", hold), "not done within"),
    "no code": (http_answer(b"HTTP/1.1 hello\r\n\r\n"), "answered `HTTP/1.1 hello`"),
    "odd code": (http_answer(b"HTTP/1.1 2000 hello\r\n\r\n"), "answered `HTTP/1.1 2000 hello`"),
    "100": (http_answer(b"HTTP/1.1 100 Continue\r\n\r\n"), "answered `HTTP/1.1 100 Continue`"),
    "302": (http_answer(b"HTTP/1.1 302 Log in first\r\nLocation: http://x/\r\n\r\n"), "302 Log in first"),
    "403": (http_answer(b"HTTP/1.0 403 Forbidden\n\n"), "answered `HTTP/1.0 403 Forbidden`"),
    "407": (http_answer(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"), "407 Proxy.*; it wants a user and a password"),
    "escapes": (http_answer(b"HTTP/1.1 500 \x1b[31mred\x07\x9b\r\n\r\n"), "500 \N{REPLACEMENT CHARACTER}\\[31mred\N{REPLACEMENT CHARACTER}"),
    "long": (http_answer(b"HTTP/1.1 500 " + b"x" * 5000 + b"\r\n\r\n"), "500 x{50,200}\\.\\.\\."),
}
BOUND = b"\x00\x01\x00\x00\x00\x00\x00\x00"
SOCKS = {
    "http": (socks_answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak SOCKS5, but HTTP: write http://"),
    "socks4": (socks_answers(b"\x00\x5b"), "does not speak SOCKS5"),
    "closes at once": (nothing, "before it had answered"),
    "silent": (silence, "not done within"),
    "no method": (socks_answers(b"\x05\xff"), "wants a user and a password"),
    "a method that was not offered": (socks_answers(b"\x05\x01"), "wants a user and a password"),
    "a password that was not offered": (socks_answers(b"\x05\x02"), "wants a user and a password"),
    "closes before its answer": (socks_answers(b"\x05\x00", b"\x05\x00"), "before it had answered"),
    "silent before its answer": (socks_answers(b"\x05\x00", b"\x05\x00\x00", hold_on=True), "not done within"),
    "odd version": (socks_answers(b"\x05\x00", b"\x04\x00" + BOUND), "it answered 0"),
    "odd address": (socks_answers(b"\x05\x00", b"\x05\x00\x00\x09" + BOUND), "an address that cannot be"),
    "empty name": (socks_answers(b"\x05\x00", b"\x05\x00\x00\x03\x00\x00\x01"), "an address that cannot be"),
    **{"code %d" % code: (socks_answers(b"\x05\x00", bytes((5, code)) + BOUND), says) for code, says in (
        (1, "it failed"), (2, "rules do not allow"), (3, "network is unreachable"), (4, "host is unreachable"), (5, "refused"),
        (6, "time to live"), (7, "cannot connect at all"), (8, "such an address"), (9, "it answered 9"), (255, "it answered 255"))},
}


@pytest.mark.parametrize(("scheme", "case"), [("http", case) for case in HTTP] + [("socks5", case) for case in SOCKS])
def test_a_proxy_that_misbehaves(fake, keys, scheme, case):
    handle, says = (HTTP if scheme == "http" else SOCKS)[case]
    port, _ = fake(handle)
    limits = ratrod_module.Limits(connect_timeout=0.5 if "silent" in case else PATIENCE)
    with pytest.raises((ratrod_module.ConnectError, ratrod_module.AuthenticationError)) as error:
        ratrod_module.tunnel("127.0.0.1:9", key_path=str(keys.client.path), proxy="%s://127.0.0.1:%d" % (scheme, port), limits=limits)
    text = str(error.value)
    assert re.search("the proxy `%s://127.0.0.1:%d` does not connect to the server `127.0.0.1:9`: .*%s" % (scheme, port, says), text), text
    assert text.isprintable()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 Connection established\r\nVia: 1.1 x\r\n\r\n", b"HTTP/1.0 299 Fine\n\n"])
def test_what_follows_the_answer_is_the_servers(fake, serve, connect, tcp_echo, answer):
    # A legacy server speaks only when asked; what stands right behind the blank line must reach the handshake all the same: here it is
    # a server's refusal, which shows as what it says.
    refusal = b"\0" * 12 + b"garbage"
    port, seen = fake(http_answer(answer + refusal, hold))
    client = connect(9, "--proxy", "http://user:p@127.0.0.1:%d" % port, "0:127.0.0.1:1")
    client.wait_for("the server does not answer in ratrod2")
    assert client.wait() == 1
    assert seen.startswith(b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1:9\r\nProxy-Authorization: Basic dXNlcjpw\r\n\r\n")


def test_a_proxy_that_is_not_there(connect):
    port = free_port()
    client = connect(9, "--proxy", "http://user:secret@127.0.0.1:%d" % port, "0:127.0.0.1:1")
    client.wait_for("cannot connect to the proxy `http://127.0.0.1:%d`: Connection refused" % port)
    assert client.wait() == 1 and "secret" not in client.output


@pytest.mark.parametrize("url", ["", "proxy:3128", "https://proxy", "ftp://proxy", "http://", "http://:80", "http://secret@", "httph://proxy",
                                 "http://proxy:0", "http://proxy:65536", "http://proxy:x", "http://::1:80", "http://[::1:80", "socks4://proxy",
                                 "http://se%3Acret:x@proxy", "socks5://" + "s" * 256 + ":x@proxy", "socks5://u:" + "s" * 256 + "@proxy",
                                 "http://proxy:80/path", "http://secret:secret@a b\nc:80:90"])
def test_urls_that_cannot_be(url):
    with pytest.raises(ratrod_module.ConfigError, match="cannot understand the --proxy: ") as error:
        ratrod_module.parse_proxy(url, [])
    assert "secret" not in str(error.value) and "sss" not in str(error.value)


@pytest.mark.parametrize("server", ["a b:9", "127.1:9", "ho\r\nst:9", "[fe80::1%eth0]:9", "hö:9"])
def test_servers_that_no_proxy_can_be_asked_for(server):
    with pytest.raises(ratrod_module.ConfigError, match="no proxy can be asked for the server "):
        ratrod_module.tunnel(server, proxy="http://127.0.0.1:9")


def test_a_proxy_that_cannot_be_on_the_command_line(connect):
    client = connect(9, "--proxy", "http://user:secret@", "0:127.0.0.1:1")
    assert client.wait() == 2
    client.wait_for("cannot understand the --proxy: ")
    assert "secret" not in client.output


def test_the_port_that_goes_without_saying():
    for url, shown, user, password in (("http://proxy", "http://proxy:1080", None, b""), ("socks5h://a@[::1]", "socks5://[::1]:1080", b"a", b""),
                                       ("http://a:b@c:80/", "http://c:80", b"a", b"b"), ("socks5://%ff:@c", "socks5://c:1080", b"\xff", b"")):
        proxy = ratrod_module.parse_proxy(url, [])
        assert (str(proxy), proxy.user, proxy.password) == (shown, user, password)
        assert "b'b'" not in repr(proxy)
