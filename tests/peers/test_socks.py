"""A SOCKS5 proxy at the client: curl and PySocks as real users of it, a real DNS server behind it, and bytes by hand for the rest."""

import concurrent.futures
import contextlib
import functools
import http.server
import ipaddress
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from typing import NamedTuple

import pytest

from support.many_lines import assert_no_tunnels, run_each
from support.programs import LEGACY, LEGACY_E, MODES, PATIENCE, RATROD, RATROD2, READY, STARTED, Program, descriptors, every_mode, missing, need
from support.sockets import check_bulk_each_way, check_half_close, eventually, free_port, port_of, receive_all, receive_exactly, reset
from support.targets import UdpEcho, echo

try:
    import socks as pysocks
except ImportError:
    pysocks = None

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = MODES[0]
SOCKS_LISTENING = r"\[SOCKS\] Listening on `.*?:(\d+)`"
BLOCK = os.urandom((1 << 20) - 3)
CONNECT, BIND, ASSOCIATE = 1, 2, 3
GREETING = b"\5\1\0"
CURL_PROXY_FAILED = 97


# Whose turn it is, without all modes for each: the ends meet the wire in the tests of plain tunnels.
each_end = pytest.mark.parametrize("mode, first", [(RATROD2, "originator"), (RATROD2, "target"), (LEGACY, "originator"), (LEGACY_E, "target")],
                                   ids=lambda value: getattr(value, "name", value))


class Proxy(NamedTuple):
    """A running server and client of ours; `port` is where the client speaks SOCKS."""

    server: Program
    client: Program
    port: int

    def dial(self):
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def greeted(self):
        """A connection that is past the choice of a method."""
        made = self.dial()
        made.sendall(GREETING)
        assert receive_exactly(made, 2) == b"\5\0"
        return made

    def ask(self, request):
        """(connection, code of the reply) after this request."""
        made = self.greeted()
        made.sendall(request)
        return made, read_reply(made)[0]

    def open(self, port, host="127.0.0.1"):
        """A connection to a target, through all of it."""
        made, code = self.ask(request(host, port))
        assert code == 0
        return made

    def try_echo(self, port, host="127.0.0.1", question=b"anybody there?"):
        with self.open(port, host) as connection:
            connection.sendall(question)
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == question


@pytest.fixture
def proxy(forward):
    """proxy(mode, tunnel="0:socks", serve_flags=(), connect_flags=()) -> Proxy"""
    def launch(mode, tunnel="0:socks", **flags):
        server, client = forward(mode, tunnel, **flags)
        return Proxy(server, client, int(client.wait_for(SOCKS_LISTENING).group(1)))
    return launch


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


def assert_ended(connection):
    """Nothing more comes. Whether that shows as an end or as a reset depends on what was unread."""
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b""


@pytest.fixture
def join(proxy, listener):
    """join(mode) -> (originator, target): both outer ends of one connection through a proxy."""
    with contextlib.ExitStack() as stack:
        def launch(mode):
            originator = stack.enter_context(proxy(mode).open(port_of(listener)))
            target = stack.enter_context(listener.accept()[0])
            target.settimeout(PATIENCE)
            return originator, target
        yield launch


# ---------------------------------------------------------------------------------------------------- curl


class WebServer(http.server.ThreadingHTTPServer):
    request_queue_size = 1000


class WebServer6(WebServer):
    address_family = socket.AF_INET6


class Page(http.server.BaseHTTPRequestHandler):
    """Says what it was asked for and by which name, with 100 kB behind it."""

    def do_GET(self):
        body = ("%s %s " % (self.headers["Host"].rpartition(":")[0], self.path)).encode() + b"x" * 100000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_web(kind, host):
    with kind((host, 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def web():
    """The port of a real HTTP server on 127.0.0.1."""
    with running_web(WebServer, "127.0.0.1") as port:
        yield port


def curl(*words):
    """(exit code, body, what it says)"""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run([need("curl"), "-q", "-sS", "--fail", "--max-time", "30", *words], stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=PATIENCE * 2, env=env)
    return done.returncode, done.stdout, done.stderr.decode()


def fetched(host, path="/page"):
    return 0, ("%s %s " % (host, path)).encode() + b"x" * 100000, ""


@every_mode
def test_curl(mode, proxy, web):
    made = proxy(mode)
    for option in ("--socks5-hostname", "--socks5"):
        assert curl(option, "127.0.0.1:%d" % made.port, "http://127.0.0.1:%d/page" % web) == fetched("127.0.0.1")
        assert curl(option, "127.0.0.1:%d" % made.port, "http://localhost:%d/page" % web) == fetched("localhost")


@every_mode
def test_curl_50_at_once(mode, proxy, web, tmp_path):
    made = proxy(mode)
    code, _, said = curl("--parallel", "--parallel-immediate", "--parallel-max", "50", "--socks5-hostname", "127.0.0.1:%d" % made.port,
                         "-o", str(tmp_path / "page#1"), "http://localhost:%d/page[1-50]" % web)
    assert code == 0, said
    for n in range(1, 51):
        assert (tmp_path / ("page%d" % n)).read_bytes() == fetched("localhost", "/page%d" % n)[1]


def test_curl_to_an_ipv6_target(proxy):
    with running_web(WebServer6, "::1") as port:
        made = proxy(ANY)
        assert curl("--socks5-hostname", "127.0.0.1:%d" % made.port, "http://[::1]:%d/page" % port) == fetched("[::1]")


@every_mode
def test_the_name_travels_to_the_server(mode, proxy, web):
    """The server's rule is about names: it tells apart who has resolved."""
    made = proxy(mode, serve_flags=("-r", "localhost:%d" % web))
    where = "127.0.0.1:%d" % made.port
    assert curl("--socks5-hostname", where, "http://localhost:%d/page" % web) == fetched("localhost")
    code, body, said = curl("--socks5", where, "http://localhost:%d/page" % web)
    assert (code, body) == (CURL_PROXY_FAILED, b"") and said
    made.server.wait_for(r"refused.*127\.0\.0\.1:%d" % web)
    assert curl("--socks5-hostname", where, "http://name-that-only-the-server-sees.example:80/")[0] == CURL_PROXY_FAILED
    made.server.wait_for(r"refused.*name-that-only-the-server-sees\.example:80")


@pytest.fixture
def other_names(tmp_path):
    """What to put before a command so that it has an /etc/hosts of its own, in which only-there.example is 127.0.0.1."""
    (tmp_path / "hosts").write_text("127.0.0.1 only-there.example\n")
    words = need("unshare"), "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(tmp_path / "hosts")
    if subprocess.run([*words, "true"], stderr=subprocess.DEVNULL).returncode:
        missing("permission to mount in a namespace")
    return words


def test_a_name_that_only_the_servers_machine_knows(other_names, start, ratrod, keys, web):
    server = start(*other_names, *RATROD, "-k", keys.server.path, "serve", "127.0.0.1:0")
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%s" % server.wait_for(STARTED).group(1), "0:socks")
    where = "127.0.0.1:%s" % client.wait_for(SOCKS_LISTENING).group(1)
    assert curl("--socks5-hostname", where, "http://only-there.example:%d/page" % web) == fetched("only-there.example")
    # 6: curl could not resolve it here.
    assert curl("--socks5", where, "http://only-there.example:%d/page" % web)[0] in (6, CURL_PROXY_FAILED)


def test_curl_with_a_password(proxy, web):
    made = proxy(ANY, connect_flags=("--socks-user", "alice:open sesame"))
    words = "--socks5-hostname", "127.0.0.1:%d" % made.port, "http://localhost:%d/page" % web
    assert curl("--proxy-user", "alice:open sesame", *words) == fetched("localhost")
    for wrong in (["--proxy-user", "alice:open"], ["--proxy-user", "alice:open sesame!"], ["--proxy-user", "bob:open sesame"],
                  ["--proxy-user", "Alice:open sesame"], []):
        code, body, said = curl(*wrong, *words)
        assert (code, body) == (CURL_PROXY_FAILED, b"") and said, wrong
    assert curl("--proxy-user", "alice:open sesame", *words) == fetched("localhost")


def test_curl_with_a_password_that_nobody_asks_for(proxy, web):
    """It offers both methods, and gets the one that needs none."""
    made = proxy(ANY)
    words = "--socks5-hostname", "127.0.0.1:%d" % made.port, "http://localhost:%d/page" % web
    assert curl("--proxy-user", "alice:secret", *words) == fetched("localhost")


def test_curl_through_a_proxy_on_a_unix_socket(forward, web):
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:
        _, client = forward(ANY, "unix:%s/socks:socks" % folder)
        client.wait_for(r"\[SOCKS\] Listening on `unix:%s/socks`, and routing through `127\.0\.0\.1:\d+` \.\.\.$" % re.escape(folder))
        assert pathlib.Path(folder, "socks").stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(folder + "/socks")
            connection.sendall(GREETING + request("localhost", web) + b"GET /page HTTP/1.0\r\nHost: localhost:80\r\n\r\n")
            assert receive_exactly(connection, 2) == b"\5\0" and read_reply(connection)[0] == 0
            assert receive_all(connection).endswith(fetched("localhost")[1])
        version = re.match(r"curl (\d+)\.(\d+)", curl("--version")[1].decode())
        if tuple(map(int, version.groups())) >= (7, 84):
            assert curl("--proxy", "socks5h://localhost%s/socks" % folder, "http://localhost:%d/page" % web) == fetched("localhost")


# ---------------------------------------------------------------------------------------------------- what is said at the start


def test_the_line_that_says_so(serve, connect):
    _, port = serve()
    client = connect(port, "[::1]:0:socks")
    client.wait_for(r"📻 \[SOCKS\] Listening on `\[::1\]:\d+`, and routing through `127\.0\.0\.1:%d` \.\.\.$" % port)
    # UDP has its own sockets, one for each association.
    assert "[UDP]" not in client.output and "[TCP]" not in client.output


def test_udp_through_a_proxy_on_a_unix_socket(forward, tcp_echo):
    """Its client has no address that datagrams could come from: it is told so, and connections go on."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:
        _, client = forward(ANY, "unix:%s/socks:socks" % folder)
        client.wait_for(r"\[SOCKS\] Listening on `unix:")
        for command, code in ((ASSOCIATE, (1, 7)), (CONNECT, (0,))):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(folder + "/socks")
                connection.sendall(GREETING + request("127.0.0.1", tcp_echo.port, command))
                assert receive_exactly(connection, 2) == b"\5\0" and read_reply(connection)[0] in code


def test_beside_other_tunnels(forward, tcp_echo):
    _, client = forward(ANY, "0:127.0.0.1:%d" % tcp_echo.port, "0:socks", "127.0.0.2:0:socks")
    for n, host in ((1, "127.0.0.1"), (2, "127.0.0.2")):
        port = int(client.wait_for(SOCKS_LISTENING, n).group(1))
        with socket.create_connection((host, port), PATIENCE) as connection:
            connection.sendall(GREETING + request("127.0.0.1", tcp_echo.port))
            assert receive_exactly(connection, 2) == b"\5\0" and read_reply(connection)[0] == 0


def test_tunnels_that_are_none(keys):
    assert_no_tunnels(keys, ["socks", "70000:socks", "x:socks", ":socks", "-1:socks", "[::1]:socks", "h:x:socks", ":0:socks", "1:2:3:socks",
                             "0:socks:", "R:0:socks", "unix::socks", "unix:x:socks", "unix:/a/../b:socks"], "[host:]port:socks")


def test_users_that_are_none(keys):
    """What RFC 1929 has no room for (its lengths are 1 to 255) could never be given by a client."""
    users = "alice", "", ":", ":secret", "a" * 256 + ":b", "a:" + "b" * 256, "ä" * 128 + ":b"
    outcomes = run_each(["-k", keys.client.path, "connect", "127.0.0.1:9", "0:socks", "--socks-user", user] for user in users)
    wrong = [(user, outcome) for user, outcome in zip(users, outcomes) if outcome[0] != 2 or "--socks-user" not in outcome[1].splitlines()[0]]
    assert not wrong, wrong
    # And it is the client's alone.
    assert [code for code, _ in run_each([["serve", "--socks-user", "a:b", "127.0.0.1:0"]])] == [2]


# ---------------------------------------------------------------------------------------------------- replies


@every_mode
def test_replies(mode, proxy, tcp_echo, closed):
    """Each says what went wrong; then the connection ends, and the next one works."""
    made = proxy(mode, serve_flags=("-r", r"(?!10\.).*"))
    for asked, expected in (
        (request("10.1.2.3", 80), 2),
        (request("127.0.0.1", closed), 5),
        (request("localhost", closed), 5),
        (request("nobody.invalid", 80), 4),
        (request("%s.invalid" % ("a" * 63), 80), 4),
        (request("127.0.0.1", tcp_echo.port, BIND), 7),
        (request("127.0.0.1", tcp_echo.port, 9), 7),
        (request("127.0.0.1", tcp_echo.port), 0),
    ):
        connection, code = made.ask(asked)
        with connection:
            assert code == expected, asked
            if code:
                assert_ended(connection)
    # The one that got a 0. The target may hear of it later than its client.
    eventually(lambda: tcp_echo.accepted == 1, "one connection arrived")
    made.server.wait_for(r"refused.*10\.1\.2\.3:80")
    made.client.wait_for("not allowed by this server")


def refused(made, asked):
    """A request that is none: a reply that is no success, or none, and then the end."""
    connection = made.greeted()
    with connection:
        connection.sendall(asked)
        with contextlib.suppress(ConnectionResetError):
            answer = receive_all(connection)
            assert not answer or answer[0] == 5 and answer[1], answer


NAMES_THAT_ARE_NONE = (b"", b".", b"a b", b"a\nb", b"a\0b", b"\xff\xfe", b"\x1b[2J", b"x" * 255, b"a..b", b"127.1", b"0x7f.1", b"a/b", b"user@host",
                       b"*", b"[::1]", b"localhost:1", b"::1%lo", b":")


def test_names_that_are_none(proxy, tcp_echo):
    """They must not reach a resolver that makes something of them, nor a log as they stand."""
    made = proxy(ANY, connect_flags=("-v",), serve_flags=("-v",))
    for name in NAMES_THAT_ARE_NONE:
        refused(made, request(name, tcp_echo.port))
    refused(made, request("localhost", 0))
    made.try_echo(tcp_echo.port)
    assert tcp_echo.accepted == 1
    for program in (made.server, made.client):
        assert all(line.isprintable() for line in program.lines), program.lines


def test_a_name_is_no_way_to_a_unix_socket(proxy):
    """Whoever may use the proxy for hosts has not been given the server's files, although the server's rule has a place for both."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as secret:
        secret.bind(folder + "/s")
        secret.listen(1)
        secret.setblocking(False)
        made = proxy(ANY, serve_flags=("-r", "(?:unix:)?.*"))
        for name in ("unix:%s/s", "%s/s", "unix:%s/s#", "x:unix:%s/s", "UNIX:%s/s"):
            with made.greeted() as connection:
                connection.sendall(request(name % folder, 80))
                with contextlib.suppress(AssertionError, ConnectionResetError):
                    assert read_reply(connection)[0], name
                with pytest.raises(BlockingIOError):
                    secret.accept()


def test_address_types_that_are_none(proxy, tcp_echo):
    made = proxy(ANY)
    for kind in (0, 2, 5, 255):
        refused(made, bytes([5, 1, 0, kind]) + b"\x7f\0\0\1" + struct.pack(">H", tcp_echo.port))
    # A version that is another's, after a greeting that was right.
    for version in (0, 4, 6, 255):
        refused(made, bytes([version]) + request("127.0.0.1", tcp_echo.port)[1:])
    assert tcp_echo.accepted == 0


def test_every_way_to_write_an_address(proxy, tcp_echo, target):
    made, over_ipv6 = proxy(ANY), target(echo, host="::1")
    for host in ("127.0.0.1", "localhost", "LOCALHOST", b"127.0.0.1", "localhost.", "::ffff:127.0.0.1"):
        made.try_echo(tcp_echo.port, host)
    for host in ("::1", b"::1"):
        made.try_echo(over_ipv6.port, host)


@every_mode
def test_server_that_is_gone_and_comes_back(mode, proxy, serve, tcp_echo):
    made = proxy(mode, connect_flags=("--connect-timeout", "1"))
    made.try_echo(tcp_echo.port)
    where = re.search(r"routing through `(.+?)`", made.client.output).group(1)
    made.server.stop(signal.SIGKILL)
    for _ in range(3):
        connection, code = made.ask(request("127.0.0.1", tcp_echo.port))
        with connection:
            assert code == 1
            assert_ended(connection)
    serve(*mode.serve, bind=where)
    made.try_echo(tcp_echo.port)


# ---------------------------------------------------------------------------------------------------- what is no SOCKS5


GARBAGE = (
    b"\4\1\0\x50\x7f\0\0\1user\0", b"\4\1\0\x50\0\0\0\1user\0localhost\0", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\3\1\2\0\1\0\1\xfc\3\3", b"CONNECT localhost:80 HTTP/1.1\r\n\r\n", b"\0" * 5000, b"\xff" * 5000, b"\r\n", b"\1" + BLOCK, b"\5\0",
)


def test_garbage_is_closed(proxy, tcp_echo):
    """SOCKS4, HTTP, TLS, noise: without an answer, but for SOCKS5 with no method to choose from."""
    made = proxy(ANY)
    for garbage in GARBAGE:
        with made.dial() as connection:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                assert receive_all(connection) in ([b"", b"\5\xff"] if garbage[:1] == b"\5" else [b""])
    made.try_echo(tcp_echo.port)


def test_methods_that_are_not_served(proxy):
    """RFC 1928: X'FF', and the client must close. One that does not is closed."""
    made = proxy(ANY)
    for methods in (b"\1", b"\2", b"\xff", b"\1\2", b"\x80\x81\x82", bytes(range(1, 256))):
        with made.dial() as connection:
            connection.sendall(bytes([5, len(methods)]) + methods)
            assert receive_exactly(connection, 2) == b"\5\xff"
            assert_ended(connection)


def test_the_method_is_found_among_many(proxy, tcp_echo):
    made = proxy(ANY)
    for methods in (b"\0\1\2", b"\2\1\0", bytes(range(255)), bytes(reversed(range(255))), b"\0" * 255):
        with made.dial() as connection:
            connection.sendall(bytes([5, len(methods)]) + methods)
            assert receive_exactly(connection, 2) == b"\5\0"
            connection.sendall(request("127.0.0.1", tcp_echo.port))
            assert read_reply(connection)[0] == 0


def test_one_byte_at_a_time(proxy, tcp_echo):
    made = proxy(ANY, connect_flags=("--socks-user", "alice:secret"))
    with made.dial() as connection:
        for message, answer in ((b"\5\2\0\2", b"\5\2"), (b"\1\5alice\6secret", b"\1\0")):
            for n in range(len(message)):
                connection.sendall(message[n:n + 1])
            assert receive_exactly(connection, 2) == answer
        for byte in request("localhost", tcp_echo.port):
            connection.sendall(bytes([byte]))
        assert read_reply(connection)[0] == 0
        connection.sendall(b"hello")
        assert receive_exactly(connection, 5) == b"hello"


@every_mode
def test_all_at_once(mode, proxy, tcp_echo):
    """Greeting, password, request and data together, before any answer: none of it may be lost, or be taken for something else."""
    made = proxy(mode, connect_flags=("--socks-user", "alice:secret"))
    for size in (1, 1000, 70000, 3 << 20):
        data = (BLOCK * 4)[:size]
        with made.dial() as connection, concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(connection.sendall, b"\5\1\2" + b"\1\5alice\6secret" + request("localhost", tcp_echo.port) + data)
            assert receive_exactly(connection, 4) == b"\5\2\1\0" and read_reply(connection)[0] == 0
            assert receive_exactly(connection, size) == data
            sent.result()


def test_data_before_a_refusal(proxy, closed):
    """The reply arrives all the same: unread data must not turn it into a reset."""
    made = proxy(ANY)
    for _ in range(20):
        with made.greeted() as connection:
            connection.sendall(request("127.0.0.1", closed) + b"GET / HTTP/1.0\r\n\r\n")
            assert read_reply(connection)[0] == 5


WHOLE = b"\5\2\0\2" + b"\1\5alice\6secret" + request("localhost", 80)


def test_clients_that_vanish_in_the_handshake(proxy, tcp_echo):
    """At every byte, by an end and by a reset. Nothing is left of them, and nobody is disturbed."""
    made = proxy(ANY, connect_flags=("--socks-user", "alice:secret"))
    whole = WHOLE[:-2] + struct.pack(">H", tcp_echo.port)

    def complete():
        with made.dial() as connection:
            connection.sendall(whole + b"!")
            assert receive_exactly(connection, 4) == b"\5\2\1\0" and read_reply(connection)[0] == 0
            assert receive_exactly(connection, 1) == b"!"
    complete()
    before = {program: descriptors(program) for program in (made.server, made.client)}
    for n in range(len(whole) + 1):
        for leave in (socket.socket.close, reset):
            connection = made.dial()
            connection.sendall(whole[:n])
            leave(connection)
    for program, count in before.items():
        # A few links may be kept; one descriptor in ten would be a leak.
        eventually(functools.partial(lambda program, count: descriptors(program) <= count + 7, program, count), "the descriptors came back")
    complete()


@every_mode
def test_client_that_goes_while_the_server_connects(mode, proxy, serve, tcp_echo):
    made = proxy(mode)
    os.kill(made.server.process.pid, signal.SIGSTOP)
    try:
        for leave in (socket.socket.close, reset):
            with made.greeted() as connection:
                connection.sendall(request("127.0.0.1", tcp_echo.port))
                leave(connection)
    finally:
        os.kill(made.server.process.pid, signal.SIGCONT)
    made.try_echo(tcp_echo.port)


def test_clients_that_say_nothing_more(proxy, tcp_echo):
    """They are closed when the handshake's time is over; who has come through the handshake may be silent for as long as he likes."""
    made = proxy(ANY, connect_flags=("--handshake-timeout", "1"))
    with made.open(tcp_echo.port) as through, contextlib.ExitStack() as stack:
        started, waiting = time.monotonic(), []
        for said in (b"", b"\5", b"\5\2\0", GREETING, GREETING + b"\5\1\0", GREETING + request("localhost", 80)[:-1]):
            waiting.append((said, stack.enter_context(made.dial())))
            waiting[-1][1].sendall(said)
        for said, connection in waiting:
            assert receive_all(connection) == (b"\5\0" if said.startswith(GREETING) else b"")
            assert time.monotonic() - started > 0.5
        through.sendall(b"still here")
        assert receive_exactly(through, 10) == b"still here"


def test_a_client_that_trickles(proxy):
    """The time is for all of the handshake, not for each byte of it."""
    made = proxy(ANY, connect_flags=("--handshake-timeout", "1"))
    with made.greeted() as connection:
        connection.settimeout(0.1)
        slow = iter(request("x" * 255, 80))
        ended = False
        while not ended:
            # The pace of this client, in which it also hears of the end.
            with contextlib.suppress(socket.timeout):
                try:
                    connection.sendall(bytes([next(slow)]))
                    ended = connection.recv(1) == b""
                except (ConnectionResetError, BrokenPipeError):
                    ended = True
        assert len(list(slow)) > 150


def test_silent_clients_hold_up_nobody(proxy, tcp_echo):
    made = proxy(ANY)
    with contextlib.ExitStack() as stack:
        for n in range(100):
            stack.enter_context(made.dial()).sendall(WHOLE[:n % 4])
        made.try_echo(tcp_echo.port)


# ---------------------------------------------------------------------------------------------------- streams


@each_end
def test_half_close(mode, first, join):
    check_half_close(*(join(mode) if first == "originator" else reversed(join(mode))))


@each_end
def test_reset_is_seen_as_reset(mode, first, join):
    leaving, staying = join(mode) if first == "originator" else reversed(join(mode))
    leaving.sendall(b"half of")
    assert receive_exactly(staying, 7) == b"half of"
    reset(leaving)
    with pytest.raises(ConnectionResetError):
        staying.recv(1)


def test_target_speaks_first(proxy, target):
    """Its first bytes come right behind the reply, never before or inside it."""
    made = proxy(ANY)
    greeting = target(lambda connection: connection.sendall(b"220 ready\r\n"))
    for _ in range(10):
        with made.open(greeting.port) as connection:
            assert receive_all(connection) == b"220 ready\r\n"


def test_bulk(join):
    check_bulk_each_way(join(ANY))


@every_mode
def test_50_at_once(mode, proxy, tcp_echo):
    """All in the same step of the handshake at the same time."""
    made = proxy(mode)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(made.dial()) for _ in range(50)]
        for connection in connections:
            connection.sendall(GREETING)
        for connection in connections:
            assert receive_exactly(connection, 2) == b"\5\0"
            connection.sendall(request("localhost", tcp_echo.port))
        for n, connection in enumerate(connections):
            assert read_reply(connection)[0] == 0
            connection.sendall(b"number %02d" % n)
        for n, connection in enumerate(connections):
            assert receive_exactly(connection, 9) == b"number %02d" % n


def test_nothing_is_left_behind(proxy, tcp_echo, closed):
    made = proxy(ANY)
    made.try_echo(tcp_echo.port)
    before = {program: descriptors(program) for program in (made.server, made.client)}
    for n in range(100):
        made.try_echo(tcp_echo.port, "localhost", b"%d" % n)
        if n % 5 == 0:
            connection, code = made.ask(request("127.0.0.1", closed))
            connection.close()
            assert code == 5
    for program, count in before.items():
        eventually(functools.partial(lambda program, count: descriptors(program) <= count + 7, program, count), "the descriptors came back")


def test_two_workers(proxy, tcp_echo, udp_echo):
    made = proxy(ANY, connect_flags=("--workers", "2"))
    for _ in range(10):
        made.try_echo(tcp_echo.port)
        with associate(made) as asking:
            assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"


# ---------------------------------------------------------------------------------------------------- passwords


def test_password_by_hand(proxy, tcp_echo):
    """RFC 1929, its corners included: the longest that there can be, with a colon and beyond ASCII."""
    user, password = "ä" * 10, ":" + "ß" * 127
    made = proxy(ANY, connect_flags=("-v", "--socks-user", "%s:%s" % (user, password)))

    def attempt(user, password, method=b"\2"):
        with made.dial() as connection:
            connection.sendall(b"\5\1" + method)
            chosen = receive_exactly(connection, 2)
            if chosen != b"\5\2":
                assert chosen == b"\5\xff"
                return assert_ended(connection)
            connection.sendall(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
            version, status = receive_exactly(connection, 2)
            assert version == 1
            if status:
                return assert_ended(connection)
            connection.sendall(request("127.0.0.1", tcp_echo.port))
            return read_reply(connection)[0]
    good = user.encode(), password.encode()
    assert attempt(*good) == 0
    for wrong in ((b"", b""), (good[0], b""), (b"", good[1]), (good[0], good[1][:-1]), (good[0][:-1], good[1]), (good[1], good[0]),
                  (good[0], b"x" * 255), (b"\xff" * 255, b"\xff" * 255), (good[0] + b"\0", good[1]), (b"a" + good[0][1:], good[1])):
        assert attempt(*wrong) is None
    # The method without a password is not to be had, nor by a request that follows at once.
    assert attempt(*good, method=b"\0") is None
    with made.dial() as connection:
        connection.sendall(b"\5\1\0" + request("127.0.0.1", tcp_echo.port))
        assert receive_exactly(connection, 2) == b"\5\xff"
        assert_ended(connection)
    with made.dial() as connection:
        # Another version of the password's own protocol.
        connection.sendall(b"\5\1\2")
        assert receive_exactly(connection, 2) == b"\5\2"
        connection.sendall(b"\5\1a\1b")
        with contextlib.suppress(ConnectionResetError):
            assert receive_all(connection) in (b"", b"\1\1", b"\1\xff")
    assert attempt(*good) == 0
    eventually(lambda: tcp_echo.accepted == 2, "two connections arrived")
    assert password not in made.client.output and "ßßß" not in made.client.output


def test_password_counts_for_every_proxy(forward, tcp_echo):
    _, client = forward(ANY, "0:socks", "127.0.0.2:0:socks", connect_flags=("--socks-user", "a:b"))
    for n, host in ((1, "127.0.0.1"), (2, "127.0.0.2")):
        port = int(client.wait_for(SOCKS_LISTENING, n).group(1))
        with socket.create_connection((host, port), PATIENCE) as connection:
            connection.sendall(GREETING)
            assert receive_exactly(connection, 2) == b"\5\xff"
        with socket.create_connection((host, port), PATIENCE) as connection:
            connection.sendall(b"\5\1\2\1\1a\1b" + request("127.0.0.1", tcp_echo.port))
            assert receive_exactly(connection, 4) == b"\5\2\1\0" and read_reply(connection)[0] == 0


# ---------------------------------------------------------------------------------------------------- UDP: a real resolver


@pytest.fixture
def dns(start):
    """The port of a real DNS server on loopback that knows test.example (192.0.2.7) and long.example (700 bytes of text)."""
    # It takes no port 0, and one that was free a moment ago may be another test's by now.
    for _ in range(10):
        port = free_port()
        server = start(need("dnsmasq"), "--no-daemon", "--conf-file=/dev/null", "--port=%d" % port, "--listen-address=127.0.0.1",
                       "--bind-interfaces", "--no-resolv", "--no-hosts", "--address=/test.example/192.0.2.7",
                       "--txt-record=long.example," + ",".join(["x" * 250] * 3))
        try:
            server.wait_for("started, version")
            return port
        except AssertionError:
            assert "already in use" in server.output, server.output
    raise AssertionError("no free port in ten tries")


def dns_question(name, number, kind=1):
    """With EDNS: 4096 bytes may come back."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 1) + labels + struct.pack(">xHH", kind, 1) + struct.pack(">xHHIH", 41, 4096, 0, 0)


def check_dns(answer, number, content):
    got, flags, _, answers = struct.unpack(">HHHH", answer[:8])
    assert (got, flags & 0x800f, answers) == (number, 0x8000, 1) and content in answer, answer


@pytest.fixture
def pysocks_udp():
    """pysocks_udp(proxy's port, user, password) -> a datagram socket that PySocks takes through it."""
    if not pysocks:
        missing("PySocks (pip install PySocks)")
    with contextlib.ExitStack() as stack:
        def launch(port, user=None, password=None):
            made = stack.enter_context(contextlib.closing(pysocks.socksocket(socket.AF_INET, socket.SOCK_DGRAM)))
            made.set_proxy(pysocks.SOCKS5, "127.0.0.1", port, username=user, password=password)
            made.settimeout(PATIENCE)
            return made
        yield launch


@every_mode
def test_dns_by_pysocks(mode, proxy, dns, pysocks_udp):
    made = proxy(mode)
    asking = pysocks_udp(made.port)
    for number, host in enumerate(("127.0.0.1", "localhost", "127.0.0.1")):
        asking.sendto(dns_question("test.example", number), (host, dns))
        answer, source = asking.recvfrom(4096)
        check_dns(answer, number, b"\xc0\0\2\7")
        assert source[1] == dns
        asking.sendto(dns_question("long.example", 100 + number, 16), (host, dns))
        answer, _ = asking.recvfrom(4096)
        assert len(answer) > 750
        check_dns(answer, 100 + number, b"x" * 250)


def test_ten_resolvers_at_once(proxy, dns, pysocks_udp):
    made = proxy(ANY)
    asking = [pysocks_udp(made.port) for _ in range(10)]
    for turn in range(3):
        for n, one in enumerate(asking):
            one.sendto(dns_question("test.example", turn * 100 + n), ("127.0.0.1", dns))
        for n, one in enumerate(asking):
            check_dns(one.recvfrom(4096)[0], turn * 100 + n, b"\xc0\0\2\7")


def test_dns_over_tcp_by_pysocks(proxy, dns):
    if not pysocks:
        missing("PySocks (pip install PySocks)")
    made = proxy(ANY, connect_flags=("--socks-user", "alice:secret"))
    with contextlib.closing(pysocks.socksocket()) as asking:
        asking.set_proxy(pysocks.SOCKS5, "127.0.0.1", made.port, username="alice", password="secret")
        asking.settimeout(PATIENCE)
        asking.connect(("localhost", dns))
        question = dns_question("test.example", 7)
        asking.sendall(struct.pack(">H", len(question)) + question)
        size, = struct.unpack(">H", receive_exactly(asking, 2))
        check_dns(receive_exactly(asking, size), 7, b"\xc0\0\2\7")


def test_dns_with_a_password(proxy, dns, pysocks_udp):
    made = proxy(ANY, connect_flags=("--socks-user", "alice:secret"))
    asking = pysocks_udp(made.port, "alice", "secret")
    asking.sendto(dns_question("test.example", 1), ("127.0.0.1", dns))
    check_dns(asking.recvfrom(4096)[0], 1, b"\xc0\0\2\7")
    for user, password in (("alice", "wrong"), (None, None)):
        with pytest.raises(pysocks.ProxyError):
            pysocks_udp(made.port, user, password).sendto(b"?", ("127.0.0.1", dns))


# ---------------------------------------------------------------------------------------------------- UDP: by hand


class Association:
    """A UDP ASSOCIATE by hand: its TCP connection, where its datagrams go, and the socket they come from."""

    def __init__(self, connection, relay):
        self.connection, self.relay = connection, relay
        self.socket = socket.socket(socket.AF_INET6 if ":" in relay[0] else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        # Connected: what comes from elsewhere than where it was sent to does not count.
        self.socket.connect(relay)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()
        self.socket.close()

    def send(self, host, port, data, frag=0):
        self.socket.send(b"\0\0" + bytes([frag]) + encode_address(host, port) + data)

    def receive(self):
        """(data, (host, port) of its source)"""
        datagram = self.socket.recv(65536)
        assert datagram[:3] == b"\0\0\0" and datagram[3] in (1, 3, 4), datagram[:20]
        start = {1: 4, 3: 5, 4: 4}[datagram[3]]
        end = start + {1: 4, 3: datagram[4], 4: 16}[datagram[3]]
        host = datagram[start:end].decode() if datagram[3] == 3 else str(ipaddress.ip_address(datagram[start:end]))
        return datagram[end + 2:], (host, struct.unpack(">H", datagram[end:end + 2])[0])

    def ask(self, host, port, question):
        self.send(host, port, question)
        answer, source = self.receive()
        assert source[1] == port
        return answer

    def is_over(self):
        """Nobody is there any more: the system refuses."""
        try:
            self.socket.send(b"?")
            self.socket.settimeout(0.05)
            self.socket.recv(1)
        except ConnectionRefusedError:
            return True
        except socket.timeout:
            pass
        return False


def associate(made, host="127.0.0.1", claimed=("0.0.0.0", 0)):
    connection = socket.create_connection((host, made.port), timeout=PATIENCE)
    connection.sendall(GREETING)
    assert receive_exactly(connection, 2) == b"\5\0"
    connection.sendall(request(*claimed, ASSOCIATE))
    code, (bound, port) = read_reply(connection)
    assert code == 0 and port
    # What is bound to every address is reached where the proxy is.
    return Association(connection, (host if bound in ("0.0.0.0", "::") else bound, port))


class Remote:
    """A UDP target in the hands of the test."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(("127.0.0.1", 0))
        self.port = port_of(self.socket)

    def receive(self):
        return self.socket.recvfrom(65536)

    def is_silent(self):
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return not self.receive()
        return True


@pytest.fixture
def remote():
    made = Remote()
    yield made
    made.socket.close()


@every_mode
def test_datagrams_of_every_size(mode, proxy, udp_echo):
    """A datagram stays one datagram; 65497 is what SOCKS' own header leaves of the largest one."""
    with associate(proxy(mode)) as asking:
        for size in (5, 0, 1, 512, 1200, 9000, 65497, 65496, 0):
            asking.send("127.0.0.1", udp_echo.port, BLOCK[:size])
            answer, source = asking.receive()
            assert answer == BLOCK[:size] and source == ("127.0.0.1", udp_echo.port)
    assert udp_echo.seen == 9


@every_mode
def test_every_kind_of_address_in_one_association(mode, proxy, udp_echo, remote):
    """Each answer says whose it is."""
    with contextlib.closing(UdpEcho("::1")) as over_ipv6, associate(proxy(mode)) as asking:
        for turn in range(3):
            for host, port in (("127.0.0.1", udp_echo.port), ("::1", over_ipv6.port), ("localhost", udp_echo.port)):
                question = b"%d for %s" % (turn, host.encode())
                asking.send(host, port, question)
                answer, source = asking.receive()
                assert answer == question
                assert source in ([("localhost", port), ("127.0.0.1", port)] if host == "localhost" else [(host, port)])
            asking.send("127.0.0.1", remote.port, b"and a second target")
            data, source = remote.receive()
            assert data == b"and a second target"
            for n in range(3):
                remote.socket.sendto(b"%d" % n, source)
                assert asking.receive() == (b"%d" % n, ("127.0.0.1", remote.port))


def test_fragments_are_dropped(proxy, remote):
    """RFC 1928 allows it, where reassembly is not implemented; a piece must not pass for the whole."""
    with associate(proxy(ANY)) as asking:
        for frag in (1, 2, 127, 128, 0x81, 255):
            asking.send("127.0.0.1", remote.port, b"a piece", frag)
        asking.send("127.0.0.1", remote.port, b"the whole")
        assert remote.receive()[0] == b"the whole"
        asking.send("127.0.0.1", remote.port, b"a piece", 1)
        asking.send("127.0.0.1", remote.port, b"another whole")
        assert remote.receive()[0] == b"another whole"


def test_datagrams_from_another_address_are_dropped(proxy, remote):
    """Else everybody who reaches the port would use the tunnel; with a password even more so."""
    with associate(proxy(ANY)) as asking, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.2", 0))
        stranger.setblocking(False)
        for data in (b"before", b"after"):
            stranger.sendto(b"\0\0\0" + encode_address("127.0.0.1", remote.port) + b"forged", asking.relay)
            asking.send("127.0.0.1", remote.port, data)
            received, source = remote.receive()
            assert received == data
            remote.socket.sendto(data, source)
            assert asking.receive()[0] == data
        with pytest.raises(BlockingIOError):
            stranger.recv(100)


DATAGRAMS_THAT_ARE_NONE = [
    b"", b"\0", b"\0\0\0", b"\0\0\0\1", b"\0\0\0\1\x7f\0\0", b"\0\0\0\1\x7f\0\0\1\0", b"\0\0\0\4" + bytes(15), b"\0\0\0\3", b"\0\0\0\3\0\0\x50data",
    b"\0\0\0\3\xffabc", b"\0\0\0\3\1a\0", b"\0\0\0\2\x7f\0\0\1\0\x50data", b"\0\0\0\xff", b"\0\0\0\1\x7f\0\0\1\0\0port zero", b"\xff" * 1000,
    b"\0\0\0\3\4\xff\xfe\n\0\0\x50data", b"\0\0\0\3\5a b\0c\0\x50data", b"\0\0\0\3\x0funix:/tmp/x.sock\0\x50data", BLOCK[:65507],
]


def test_datagrams_that_are_none(proxy, udp_echo):
    with associate(proxy(ANY)) as asking:
        for datagram in DATAGRAMS_THAT_ARE_NONE:
            # Bytes of the test's own noise that begin as a fragment or a right header would are not what is meant.
            asking.socket.send(b"\0\0\0\7" + datagram[4:] if len(datagram) == 65507 else datagram)
        assert asking.ask("127.0.0.1", udp_echo.port, b"still there?") == b"still there?"


@every_mode
def test_targets_that_fail_disturb_no_other(mode, proxy, udp_echo, remote):
    """Not allowed, without an address, nobody there: UDP has no way to say so, but the log has."""
    nobody = free_port()
    made = proxy(mode, serve_flags=("-r", r"(?!.*:%d$).*:.*" % remote.port))
    with associate(made) as asking:
        for turn in range(3):
            for host, port in (("127.0.0.1", remote.port), ("nobody.invalid", 53), ("127.0.0.1", nobody)):
                asking.send(host, port, b"?")
                assert asking.ask("127.0.0.1", udp_echo.port, b"%d" % turn) == b"%d" % turn
    made.server.wait_for("refused.*127.0.0.1:%d" % remote.port)
    made.client.wait_for("not allowed by this server")
    assert remote.is_silent()


def test_answer_that_is_too_long_for_the_header(proxy, remote):
    """The largest datagram of all has no room for it: it is lost, and nothing else."""
    with associate(proxy(ANY)) as asking:
        asking.send("127.0.0.1", remote.port, b"?")
        source = remote.receive()[1]
        for size in (65507, 65498, 65497, 3):
            remote.socket.sendto(BLOCK[:size], source)
        assert asking.receive()[0] == BLOCK[:65497]
        assert asking.receive()[0] == BLOCK[:3]


@pytest.mark.parametrize("mode, leave", [(RATROD2, socket.socket.close), (RATROD2, reset), (LEGACY, socket.socket.close), (LEGACY_E, reset)],
                         ids=lambda value: getattr(value, "name", getattr(value, "__name__", None)))
def test_association_ends_with_its_connection(mode, leave, proxy, udp_echo, remote):
    made = proxy(mode)
    with associate(made) as first:
        assert first.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
        before = {program: descriptors(program) for program in (made.server, made.client)}
        with associate(made) as asking:
            assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
            asking.send("127.0.0.1", remote.port, b"hello")
            source = remote.receive()[1]
            leave(asking.connection)
            eventually(asking.is_over, "the association ended")
            # Nor has it left anything at either end. In legacy each session has a link of its own, of which a few may be kept.
            for program, count in before.items():
                eventually(functools.partial(lambda program, count: descriptors(program) <= count + 3, program, count), "its sockets are closed")
            # What is still under way to it goes nowhere, in particular not to another one.
            remote.socket.sendto(b"late", source)
        assert first.ask("127.0.0.1", udp_echo.port, b"still here") == b"still here"


def udp_sockets(program):
    """How many UDP sockets over IPv4 the program has."""
    if not os.path.exists("/proc/net/udp"):
        pytest.skip("no /proc on this system")
    folder = "/proc/%d/fd" % program.process.pid
    held = set()
    for name in os.listdir(folder):
        # It may be closed in between.
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(os.path.join(folder, name)))
    with open("/proc/net/udp") as table:
        return sum("socket:[%s]" % line.split()[9] in held for line in table)


def test_association_lives_as_long_as_its_connection(proxy, udp_echo):
    """Neither the handshake's time nor that of its idle sessions ends it."""
    made = proxy(ANY, serve_flags=("--udp-timeout", "1"), connect_flags=("--udp-timeout", "1", "--handshake-timeout", "1"))
    with associate(made) as asking:
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
        assert udp_sockets(made.server) == 1
        eventually(lambda: not udp_sockets(made.server), "the session was forgotten")
        with made.dial() as silent:
            assert_ended(silent)
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello again") == b"hello again"


@every_mode
def test_association_outlives_the_server(mode, proxy, serve, udp_echo):
    made = proxy(mode)
    where = re.search(r"routing through `(.+?)`", made.client.output).group(1)
    with associate(made) as asking:
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
        made.server.stop(signal.SIGKILL)
        asking.send("127.0.0.1", udp_echo.port, b"into the void")
        serve(*mode.serve, bind=where)
        asking.socket.settimeout(0.2)

        def answered():
            with contextlib.suppress(socket.timeout):
                return asking.ask("127.0.0.1", udp_echo.port, b"are you back?") == b"are you back?"
        eventually(answered, "an answer")


@every_mode
def test_20_associations_at_once(mode, proxy, udp_echo):
    made = proxy(mode)
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(associate(made)) for _ in range(20)]
        for turn in range(3):
            for n, one in enumerate(asking):
                one.send("127.0.0.1", udp_echo.port, b"%d of %d" % (turn, n))
            for n, one in enumerate(asking):
                assert one.receive()[0] == b"%d of %d" % (turn, n)


@pytest.mark.parametrize("tunnel, host", [("[::1]:0:socks", "::1"), ("127.0.0.3:0:socks", "127.0.0.3"), ("0.0.0.0:0:socks", "127.0.0.1"),
                                          ("0.0.0.0:0:socks", "127.0.0.3"), ("[::]:0:socks", "::1"), ("[::]:0:socks", "127.0.0.1")])
def test_datagrams_go_where_the_connection_went(tunnel, host, forward, udp_echo):
    """Answers come from there, too. The connection is the only hint to which of the machine's addresses the user can reach."""
    _, client = forward(ANY, tunnel)
    made = Proxy(None, client, int(client.wait_for(SOCKS_LISTENING).group(1)))
    with associate(made, host) as asking:
        assert asking.relay[0] == host
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"


def test_address_that_is_announced(proxy, udp_echo):
    """RFC 1928: the client may say where its datagrams will come from."""
    made = proxy(ANY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.bind(("127.0.0.1", 0))
        ours.settimeout(PATIENCE)
        with associate(made, claimed=ours.getsockname()) as association:
            ours.sendto(b"\0\0\0" + encode_address("127.0.0.1", udp_echo.port) + b"hello", association.relay)
            assert ours.recv(100).endswith(b"hello")


def test_connection_of_an_association_carries_nothing(proxy, udp_echo):
    """What is sent on it is not for anybody; it may end the association, and must do no more than that."""
    made = proxy(ANY)
    with associate(made) as noisy, associate(made) as other:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            noisy.connection.sendall(BLOCK)
        assert other.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"


def test_usable_from_the_first_moment(serve, connect, udp_echo, tcp_echo):
    """The line that says it listens is what a script waits for."""
    _, port = serve()
    client = connect(port, "0:socks")
    made = Proxy(None, client, int(client.wait_for(SOCKS_LISTENING).group(1)))
    with associate(made) as asking:
        made.try_echo(tcp_echo.port)
        assert asking.ask("127.0.0.1", udp_echo.port, b"hello") == b"hello"
    client.wait_for(READY)
