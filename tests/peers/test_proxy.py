"""`connect --proxy` through real proxies: tinyproxy (HTTP) and microsocks (SOCKS5). Without them: system/test_outgoing_proxy.py."""

import signal

import pytest

from support.programs import LEGACY, LEGACY_E, RATROD2, READY, need, tcp_port, udp_originator
from support.rows import row
from support.sockets import ask, ask_udp, check_bulk_each_way, dial, eventually, free_port, ping, port_of, refused, works

pytestmark = pytest.mark.usefixtures("no_traceback")


class RealProxy:
    """A proxy as a child process that takes connections at `port`, which the test ends."""

    def __init__(self, start, make_command, host="127.0.0.1"):
        self.port = free_port()
        self.program = start(*make_command(self.port))
        eventually(lambda: not refused(self.port, host), lambda: self.program.output)


@pytest.fixture
def real_proxy(start, tmp_path):
    """real_proxy(scheme, user, password, host=) -> RealProxy: tinyproxy for http, microsocks for socks5."""
    tinyproxy, microsocks = need("tinyproxy"), need("microsocks")
    def launch(scheme, *auth, host="127.0.0.1"):
        def command(port):
            if scheme != "http":
                return microsocks, "-i", host, "-p", port, *(("-u", auth[0], "-P", auth[1]) if auth else ())
            config = tmp_path / ("tinyproxy-%d.conf" % port)
            config.write_text("Port %d\nListen %s\nTimeout 600\nMaxClients 100\nLogLevel Info\nAllow 127.0.0.1\nAllow ::1\n%s" % (
                port, host, "BasicAuth %s %s\n" % auth if auth else ""))
            return tinyproxy, "-d", "-c", config
        return RealProxy(start, command, host)
    return launch


@pytest.mark.parametrize("mode, scheme", [(RATROD2, "http"), (RATROD2, "socks5"), (LEGACY, "http"), (LEGACY_E, "socks5")],
                         ids=lambda value: getattr(value, "name", value))
def test_a_tunnel_through_a_proxy(real_proxy, forward, tcp_echo, udp_echo, listener, mode, scheme):
    proxy = real_proxy(scheme)
    _, client = forward(mode, "0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % udp_echo.port, "0:127.0.0.1:%d" % port_of(listener),
                        connect_flags=("--proxy", "%s://127.0.0.1:%d" % (scheme, proxy.port)))
    assert "through `%s://127.0.0.1:%d`" % (scheme, proxy.port) in client.output
    for _ in range(5):
        if mode is RATROD2:
            ask(tcp_port(client))
        else:  # both proxies close both directions at the first end: the legacy wire, where that is a stream's end, has no half-close there
            with dial(tcp_port(client)) as connection:
                ping(connection, word=b"question")
    with udp_originator(client, 2) as originator:
        ask_udp(originator, b"a datagram")
    if mode is RATROD2:
        with dial(tcp_port(client, 3)) as near, listener.accept()[0] as far:
            check_bulk_each_way((near, far), 8)
    # Every link went through it.
    proxy.program.stop()
    if scheme == "http":
        assert len([line for line in proxy.program.lines if "CONNECT 127.0.0.1:" in line]) >= 2, proxy.program.output


# tinyproxy's configuration knows letters and digits, microsocks takes whatever its command line can hold.
@pytest.mark.parametrize("scheme, user, password, typed, says", [
    ("http", "user", "password", "us%65r:%70assword", "407.*wants a user and a password"),
    ("socks5", "us@er", "p@ss:w/ö rd", "us%40er:p%40ss%3Aw%2F%C3%B6%20rd", "wants a user and a password: socks5://")], ids=["http", "socks5"])
def test_credentials(real_proxy, serve, connect, scheme, user, password, typed, says):
    proxy = real_proxy(scheme, user, password)
    _, port = serve()
    client = connect(port, "-v", "--proxy", "%s://%s@127.0.0.1:%d" % (scheme, typed, proxy.port), "0:127.0.0.1:1").ready()
    client.stop()
    for secret in (password, typed):
        assert secret not in client.output
    for wrong, why in (("", says), ("user:wrong@", "(401|407).*another user and password|401" if scheme == "http" else "another user and password")):
        with row(wrong):
            client = connect(port, "-v", "--proxy", "%s://%s127.0.0.1:%d" % (scheme, wrong, proxy.port), "0:127.0.0.1:1")
            client.wait_for("the proxy `%s://127.0.0.1:%d` does not connect to the server `127.0.0.1:%d`: .*(%s)" % (scheme, proxy.port, port, why))
            assert client.wait() == 3
            assert "wrong" not in client.output


def test_ipv6_addresses_and_a_server_that_is_not_there(real_proxy, serve, ratrod, keys, closed, tcp_echo):
    _, port = serve(bind="[::1]:0")
    for scheme in ("http", "socks5"):
        with row(scheme):
            words = "-k", keys.client.path, "connect", "--proxy", "%s://[::1]:%d/" % (scheme, real_proxy(scheme, host="::1").port)
            ask(tcp_port(ratrod(*words, "[::1]:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port).ready()))
            client = ratrod(*words, "127.0.0.1:%d" % closed, "0:127.0.0.1:1")
            client.wait_for("the proxy `.*` does not connect to the server `127.0.0.1:%d`: .*(5[0-9][0-9]|refused|failed)" % closed)
            assert client.wait() == 1


def test_the_server_is_known_by_its_own_address(real_proxy, serve, connect, keys):
    """known_hosts lines are for what was typed as SERVER: one for the proxy's address would vouch for every server behind it."""
    proxy = real_proxy("socks5h")
    _, port = serve()
    keys.client.write("known_hosts", "%s 127.0.0.1:%d\n" % (keys.server.public, proxy.port))
    words = "--proxy", "socks5h://127.0.0.1:%d" % proxy.port
    client = connect(port, *words, "0:127.0.0.1:1")
    assert client.wait() == 3
    assert "127.0.0.1:%d" % port in client.output
    connect(port, *words, "--accept-new", "0:127.0.0.1:1").wait_for(READY)
    assert "%s 127.0.0.1:%d" % (keys.server.public, port) in (keys.client.path / "known_hosts").read_text()


def test_several_servers_and_reconnect_through_a_proxy(real_proxy, ratrod, serve, keys, closed, tcp_echo):
    proxy = real_proxy("http")
    server, port = serve()
    _, other = serve()
    client = ratrod("-v", "-k", keys.client.path, "connect", "--proxy", "http://127.0.0.1:%d" % proxy.port,
                    "127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d" % (closed, port, other), "0:127.0.0.1:%d" % tcp_echo.port).ready()
    ask(tcp_port(client))
    server.stop(signal.SIGKILL)
    # The next link goes to the next server. Until the proxy has passed on that this one is gone, a connection that has said something is lost.
    eventually(lambda: works(tcp_port(client)), lambda: client.output)
    client.stop()
    assert "link to `127.0.0.1:%d`" % other in client.output
