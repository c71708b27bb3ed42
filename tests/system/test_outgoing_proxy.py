"""`connect --proxy` without a real proxy (peers/test_proxy.py): what only programs show; the tables are in unit/test_proxy_handshake.py."""

import contextlib
import re

import pytest

import ratrod as ratrod_module
from support.programs import PATIENCE
from support.relays import pump
from support.rows import row
from support.sockets import dial, receive_all, receive_exactly

pytestmark = pytest.mark.usefixtures("no_traceback")


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


def hold(connection):
    with contextlib.suppress(OSError):
        receive_all(connection)


def http_answer(answer):
    """A proxy that gives this answer, and then only holds the connection."""
    def handle(connection, read):
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += read(1)
        connection.sendall(answer)
        hold(connection)
    return handle


def test_names_are_looked_up_at_the_proxy(serve, ratrod, keys, fake):
    """`db.invalid` is known to nobody here; a proxy that takes the name connects to whom it likes, and answers with a name as its own address."""
    _, port = serve()
    def relay(connection, read):
        read(3)
        connection.sendall(b"\5\0")
        read(read(5)[4] + 2)
        with dial(port) as server:
            connection.sendall(b"\5\0\0\3\7example\0\1")
            pump(connection, server)
    proxy, seen = fake(relay)
    keys.client.write("known_hosts", "")
    words = "--accept-new", "--proxy", "socks5://127.0.0.1:%d" % proxy, "db.invalid:19000", "0:127.0.0.1:1"
    ratrod("-k", keys.client.path, "connect", *words).ready()
    assert b"\x05\x01\x00\x03\x0adb.invalid" + (19000).to_bytes(2, "big") in seen
    assert "db.invalid:19000" in (keys.client.path / "known_hosts").read_text()


def test_a_proxy_that_misbehaves(fake, keys):
    """Each says which proxy it was, for which server, and why."""
    quick, patient = ratrod_module.Limits(handshake_timeout=0.3), ratrod_module.Limits()
    for handle, scheme, limits, says in (
            (http_answer(b"HTTP/1.0 403 Forbidden\n\n"), "http", patient, "it answered `HTTP/1.0 403 Forbidden`"),
            (http_answer(b"HTTP/1.1 407 No\r\n\r\n"), "http", patient, "407 No`; it wants a user and a password"),
            (http_answer(b"HTTP/1.1 200 OK\r\n"), "http", quick, "not done within"),
            (lambda connection, _read: hold(connection), "socks5", quick, "not done within"),
            (lambda _connection, _read: None, "socks5", patient, "before it had answered")):
        with row((scheme, says)):
            port, _ = fake(handle)
            with pytest.raises((ratrod_module.ConnectError, ratrod_module.AuthenticationError)) as error:
                ratrod_module.tunnel("127.0.0.1:9", key_path=str(keys.client.path), proxy="%s://127.0.0.1:%d" % (scheme, port), limits=limits)
            text = str(error.value)
            assert re.search("the proxy `%s://127.0.0.1:%d` does not connect to the server `127.0.0.1:9`: .*%s" % (scheme, port, says), text), text
            assert isinstance(error.value, ratrod_module.AuthenticationError) == ("wants a user" in says)


def test_what_follows_the_answer_is_the_servers(fake, connect):
    """What stands right behind the blank line must reach the handshake: here it is a server's refusal, which shows as what it says."""
    for answer in (b"HTTP/1.1 200 Connection established\r\nVia: 1.1 x\r\n\r\n", b"HTTP/1.0 299 Fine\n\n"):
        with row(answer):
            port, seen = fake(http_answer(answer + b"\0" * 12 + b"garbage"))
            client = connect(9, "--proxy", "http://user:p@127.0.0.1:%d" % port, "0:127.0.0.1:1")
            client.wait_for("the server does not answer in ratrod2")
            assert client.wait() == 1
            assert seen.startswith(b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1:9\r\nProxy-Authorization: Basic dXNlcjpw\r\n\r\n")


def test_a_proxy_that_is_not_there(connect, closed):
    client = connect(9, "--proxy", "http://user:secret@127.0.0.1:%d" % closed, "0:127.0.0.1:1")
    client.wait_for("cannot connect to the proxy `http://127.0.0.1:%d`: Connection refused" % closed)
    assert client.wait() == 1 and "secret" not in client.output
