"""A SOCKS5 proxy at the client, and real users of it: curl, PySocks, and a real DNS server behind it. Bytes by hand: system/test_socks_bytes.py."""

import contextlib
import http.server
import os
import re
import socket
import struct
import subprocess
import threading

import pytest

from support.programs import LEGACY_E, PATIENCE, RATROD, RATROD2, STARTED, every_mode, missing, need
from support.rows import row
from support.socks5 import socks_port

try:
    import socks as pysocks
except ImportError:
    pysocks = None

pytestmark = pytest.mark.usefixtures("no_traceback")

# For what happens beside the wire: one mode is enough.
ANY = RATROD2
CURL_PROXY_FAILED = 97


@pytest.fixture
def proxy(forward):
    """proxy(mode, serve_flags=(), connect_flags=()) -> (server, the port where the client speaks SOCKS)"""
    def launch(mode, **flags):
        server, client = forward(mode, "0:socks", **flags)
        return server, socks_port(client)
    return launch


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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
def test_curl(mode, proxy, web, tmp_path):
    """The server's rule is about names: it tells apart who has resolved. A name travels to the server with --socks5-hostname only."""
    server, port = proxy(mode, serve_flags=("-r", "localhost:%d" % web))
    where = "127.0.0.1:%d" % port
    assert curl("--socks5-hostname", where, "http://localhost:%d/page" % web) == fetched("localhost")
    code, body, said = curl("--socks5", where, "http://localhost:%d/page" % web)
    assert (code, body) == (CURL_PROXY_FAILED, b"") and said
    server.wait_for(r"refused.*127\.0\.0\.1:%d" % web)
    assert curl("--socks5-hostname", where, "http://name-that-only-the-server-sees.example:80/")[0] == CURL_PROXY_FAILED
    server.wait_for(r"refused.*name-that-only-the-server-sees\.example:80")
    # Fifty at once.
    code, _, said = curl("--parallel", "--parallel-immediate", "--parallel-max", "50", "--socks5-hostname", where,
                         "-o", str(tmp_path / "page#1"), "http://localhost:%d/page[1-50]" % web)
    assert code == 0, said
    for n in range(1, 51):
        assert (tmp_path / ("page%d" % n)).read_bytes() == fetched("localhost", "/page%d" % n)[1]


def test_curl_with_addresses_and_passwords(forward, connect, web, short):
    server, client = forward(ANY, "0:socks", "unix:%s/socks:socks" % short)
    where = "127.0.0.1:%d" % socks_port(client)
    for option in ("--socks5-hostname", "--socks5"):
        assert curl(option, where, "http://127.0.0.1:%d/page" % web) == fetched("127.0.0.1")
    for option in ("--socks5-hostname", "--socks5", "--socks4", "--socks4a"):
        assert curl(option, where, "http://localhost:%d/page" % web) == fetched("localhost")
    # As an HTTP proxy: an answer that says what is wrong, to a browser and to curl.
    assert curl("--proxy", "http://" + where, "http://localhost/")[0] == 22
    assert "400" in curl("--proxy", "http://" + where, "https://localhost/")[2]
    with running_web(WebServer6, "::1") as port_6:
        assert curl("--socks5-hostname", where, "http://[::1]:%d/page" % port_6) == fetched("[::1]")
    # With a password that nobody asks for, curl offers both methods, and gets the one that needs none.
    words = "http://localhost:%d/page" % web, "--socks5-hostname"
    assert curl("--proxy-user", "alice:secret", *words, where) == fetched("localhost")
    asking = connect(int(server.wait_for(STARTED).group(1)), "--socks-user", "alice:open sesame", "0:socks")
    words += "127.0.0.1:%d" % socks_port(asking),
    for wrong in (["--proxy-user", "alice:open sesame!"], ["--proxy-user", "Alice:open sesame"], []):
        code, body, said = curl(*wrong, *words)
        assert (code, body) == (CURL_PROXY_FAILED, b"") and said, wrong
    assert curl("--proxy-user", "alice:open sesame", *words) == fetched("localhost")
    version = re.match(r"curl (\d+)\.(\d+)", curl("--version")[1].decode())
    if tuple(map(int, version.groups())) < (7, 84):
        missing("curl 7.84, which knows proxies on Unix sockets")
    assert curl("--proxy", "socks5h://localhost%s/socks" % short, "http://localhost:%d/page" % web) == fetched("localhost")


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
    where = "127.0.0.1:%d" % socks_port(client)
    assert curl("--socks5-hostname", where, "http://only-there.example:%d/page" % web) == fetched("only-there.example")
    # 6: curl could not resolve it here.
    assert curl("--socks5", where, "http://only-there.example:%d/page" % web)[0] in (6, CURL_PROXY_FAILED)


@pytest.fixture
def dns(on_free_port):
    """The port of a real DNS server on loopback that knows test.example (192.0.2.7) and long.example (700 bytes of text)."""
    program = need("dnsmasq")
    return on_free_port(lambda port: (
        program, "--no-daemon", "--conf-file=/dev/null", "--port=%d" % port, "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv",
        "--no-hosts", "--address=/test.example/192.0.2.7", "--txt-record=long.example," + ",".join(["x" * 250] * 3)), "started, version")


def dns_question(name, number, kind=1):
    """With EDNS: 4096 bytes may come back."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 1) + labels + struct.pack(">xHH", kind, 1) + struct.pack(">xHHIH", 41, 4096, 0, 0)


def check_dns(answer, number, content):
    got, flags, _, answers = struct.unpack(">HHHH", answer[:8])
    assert (got, flags & 0x800f, answers) == (number, 0x8000, 1) and content in answer, answer


@pytest.fixture
def through(stack):
    """through(proxy's port, kind, user, password) -> a socket that PySocks takes through it."""
    if not pysocks:
        missing("PySocks (pip install PySocks)")
    def launch(port, kind=socket.SOCK_DGRAM, user=None, password=None):
        made = stack.enter_context(contextlib.closing(pysocks.socksocket(socket.AF_INET, kind)))
        made.set_proxy(pysocks.SOCKS5, "127.0.0.1", port, username=user, password=password)
        made.settimeout(PATIENCE)
        return made
    return launch


@pytest.mark.parametrize("mode", [RATROD2, LEGACY_E], ids=lambda mode: mode.name)
def test_dns_by_pysocks(mode, proxy, dns, through):
    _, port = proxy(mode)
    asking = through(port)
    for number, host in enumerate(("127.0.0.1", "localhost", "127.0.0.1")):
        with row((number, host)):
            asking.sendto(dns_question("test.example", number), (host, dns))
            answer, source = asking.recvfrom(4096)
            check_dns(answer, number, b"\xc0\0\2\7")
            assert source[1] == dns
            asking.sendto(dns_question("long.example", 100 + number, 16), (host, dns))
            answer, _ = asking.recvfrom(4096)
            assert len(answer) > 750
            check_dns(answer, 100 + number, b"x" * 250)
    # Ten resolvers at once.
    several = [through(port) for _ in range(10)]
    for turn in range(3):
        for n, one in enumerate(several):
            one.sendto(dns_question("test.example", turn * 100 + n), ("127.0.0.1", dns))
        for n, one in enumerate(several):
            check_dns(one.recvfrom(4096)[0], turn * 100 + n, b"\xc0\0\2\7")
