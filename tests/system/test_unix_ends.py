"""Unix sockets at either end of a tunnel: bytes and ends, who may reach them, and the local one's life as a file.
The tables are in unit (test_core_grants, test_unix_listener, test_special_tunnels); a real Redis is in peers/test_unix.py."""

import contextlib
import re
import signal
import socket
import threading

import pytest

from support import sockets
from support.programs import PATIENCE, RATROD2, every_mode, tcp_port
from support.rows import row
from support.sockets import accept, ask, ask_over, assert_refused, dial, dial_unix, receive_exactly
from support.targets import UnixTarget, echo

pytestmark = [pytest.mark.usefixtures("no_traceback"), pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")]

UNIX_LISTENING = r"\[UNIX\] Listening on `unix:(.+?)`"


@every_mode
def test_streams(mode, forward, short, stack):
    """From a Unix socket to a Unix socket."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(short / "target.sock"))
    listener.listen(100)
    listener.settimeout(PATIENCE)
    _, client = forward(mode, "unix:%s/local.sock:unix:%s/target.sock" % (short, short), serve_flags=("-r", "unix:%s/.*" % short))
    client.wait_for(UNIX_LISTENING)
    def joined():
        return stack.enter_context(dial_unix(short / "local.sock")), stack.enter_context(accept(listener))
    for order in (1, -1):
        sockets.check_half_close(*joined()[::order])
    sockets.check_bulk_each_way(joined(), 8)
    if mode is RATROD2:
        # Leaving with bytes unread is a Unix socket's only kind of reset. A clean end at the other side would pass for an exchange that is complete.
        originator, target = joined()
        originator.sendall(b"read this")
        assert receive_exactly(target, 1) == b"r"
        target.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            assert originator.recv(1) == b""
            while True:
                originator.sendall(bytes(1 << 20))


def test_two_workers_share_a_unix_socket(forward, unix_echo, short):
    """SO_REUSEPORT is for ports only: the workers have to share the one socket."""
    server, client = forward(RATROD2, "unix:%s/local.sock:unix:%s" % (short, unix_echo.path), serve_flags=("-r", "unix:.*", "--workers", "2"),
                             connect_flags=("--workers", "2"))
    client.wait_for(UNIX_LISTENING)
    for n in range(20):
        ask_over(dial_unix(short / "local.sock"), b"%d" % n)
    assert client.stop() == 0 and not (short / "local.sock").exists()


def test_paths_that_a_rule_or_a_key_names(keys, forward, unix_echo, tcp_echo, short):
    """A rule of paths opens no host. Host names have no case, which is why a rule has none; files have."""
    upper = UnixTarget(echo, short / "ECHO.sock")
    tunnels = "0:unix:%s" % unix_echo.path, "0:unix:%s" % upper.path, "0:127.0.0.1:%d" % tcp_echo.port
    with contextlib.closing(upper):
        server, client = forward(RATROD2, *tunnels, serve_flags=("-r", "unix:%s/echo.sock" % short))
        ask(tcp_port(client))
        for n in (2, 3):
            assert_refused(tcp_port(client, n))
        # A stream only: there is no UDP to a path.
        line = client.wait_for(r"\[TCP\] Listening on").string
        assert "to `unix:%s`" % unix_echo.path in line
        assert client.output.count("[UDP] Listening") == 1
        for program in (client, server):
            program.stop()
        keys.server.write("authorized_keys", '%s permitopen="127.0.0.1:*" permitopen="unix:%s" alice@laptop\n' % (keys.client.public, unix_echo.path))
        _, client = forward(RATROD2, *tunnels)
        ask(tcp_port(client))
        assert_refused(tcp_port(client, 2))
        ask(tcp_port(client, 3))
    assert (unix_echo.accepted, upper.accepted, tcp_echo.accepted) == (2, 0, 1)


def test_targets_that_are_no_sockets(forward, unix_echo, short):
    (short / "file").write_text("not a socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(short / "stale.sock"))
    names = "missing.sock", "file", "stale.sock", "no/such/folder.sock"
    tunnels = ["0:unix:%s/%s" % (short, name) for name in (*names, "echo.sock")]
    server, client = forward(RATROD2, *tunnels, serve_flags=("-r", "unix:.*"))
    for n, name in enumerate(names, 1):
        with row(name):
            assert_refused(tcp_port(client, n))
            for program in (server, client):
                program.wait_for("ERROR.*%s/%s" % (re.escape(str(short)), name))
    ask(tcp_port(client, len(names) + 1))
    # One that comes up later is found.
    with contextlib.closing(UnixTarget(echo, short / "missing.sock")):
        ask(tcp_port(client))


def test_target_whose_queue_is_full(forward, short, unix_echo, stack):
    """A Unix socket answers "try again" where a TCP one would wait: it is asked again, and nobody is refused for it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short / "busy.sock"))
        listener.listen(1)
        listener.settimeout(PATIENCE)
        server, client = forward(RATROD2, "0:unix:%s/busy.sock" % short, "0:unix:%s" % unix_echo.path, serve_flags=("-r", "unix:.*"))
        waiting = [stack.enter_context(dial(tcp_port(client))) for _ in range(8)]
        ask(tcp_port(client, 2))
        def serve_one(connection):
            with connection, contextlib.suppress(OSError):
                echo(connection)
        def serve_all():  # each on its own: the order in which they come through is nobody's promise
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve_one, args=(accept(listener),), daemon=True).start()
        threading.Thread(target=serve_all, daemon=True).start()
        for connection in waiting:
            ask_over(connection)
        ask(tcp_port(client))
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def test_its_life(serve, client, tcp_echo, short):
    """A line says so, others cannot have it while it is in use, and it is removed at the end, or replaced where its client was killed."""
    path, tunnels = short / "local.sock", ["unix:%s/%s.sock:127.0.0.1:%d" % (short, name, tcp_echo.port) for name in ("local", "second")]
    _, port = serve()
    for sign, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with row(sign):
            program = client(port, *tunnels).ready()
            assert program.wait_for(r"📻 \[UNIX\] Listening on `unix:%s/local\.sock`, and routing through `127\.0\.0\.1:%d` to `127.0.0.1:%d` \.\.\.$"
                                    % (re.escape(str(short)), port, tcp_echo.port))
            ask_over(dial_unix(path))
            assert path.stat().st_mode & 0o777 == 0o600
            assert sorted(file.name for file in short.iterdir()) == ["local.sock", "second.sock"]
            assert program.stop(sign) == code
            assert list(short.iterdir()) == [] or sign == signal.SIGKILL
            assert "[UDP]" not in program.output  # a stream only


def test_starts_that_fail(serve, ratrod, keys, closed, short):
    """Half of what was asked for is nothing that can be left running. Nothing of it may stay, or the next start of something else would find it."""
    (short / "file").write_text("of value")
    _, port = serve()
    good = "unix:%s/good.sock:db:5432" % short
    for server, tunnels, named in ((port, [good, "unix:%s/file:db:5432" % short], short / "file"), (port, [good, good], short / "good.sock"),
                                   (port, [good, "unix:%s/no/such.sock:db:5432" % short], short / "no/such.sock"), (closed, [good], "")):
        with row(tunnels):
            client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % server, *tunnels)
            assert client.wait() == 1, client.output
            client.wait_for("ERROR.*%s" % re.escape(str(named)))
            assert [path.name for path in short.iterdir()] == ["file"]
