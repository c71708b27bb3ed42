"""Unix sockets at either end of a tunnel: real Redis behind them, who may reach them, and the files that they are."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import tempfile
import threading

import pytest

from support.keys import seed_of
from support.many_lines import assert_no_tunnels
from support.programs import MODES, PATIENCE, RATROD, READY, descriptors, every_mode, need, tcp_port
from support.ratrod2_peer import DATAGRAMS, INVALID_HOST, SESSION_OVER, Client, PeerError
from support.sockets import ask, ask_over, check_bulk_each_way, check_half_close, dial, eventually, free_port, receive_all, receive_exactly
from support.targets import UnixTarget, echo

pytestmark = [pytest.mark.usefixtures("no_traceback"), pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")]

# For what happens beside the wire: one mode is enough.
ANY = MODES[0]
UNIX_LISTENING = r"\[UNIX\] Listening on `unix:(.+?)`"
BLOCK = os.urandom((1 << 20) - 3)
NOT_ALLOWED = "not allowed by this server"


@pytest.fixture
def short():
    """A folder whose path is short: a socket's may have 100 bytes, which pytest's own folders nearly use up."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:
        yield pathlib.Path(folder)


@pytest.fixture
def unix_echo(short):
    made = UnixTarget(echo, short / "echo.sock")
    yield made
    made.close()


@pytest.fixture
def unix_listener(short):
    """A bare target: connections to it wait for the test to accept them."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(short / "target.sock"))
        made.listen(100)
        made.settimeout(PATIENCE)
        yield made


@pytest.fixture
def redis(start, short):
    """The path of a real redis-server's Unix socket."""
    path = short / "redis.sock"
    server = start(need("redis-server"), "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", short)
    server.wait_for("(?i)ready to accept connections")
    return path


def redis_cli(*words, typed=None):
    done = subprocess.run([need("redis-cli"), "--raw", *[str(word) for word in words]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=PATIENCE, **{"stdin": subprocess.DEVNULL} if typed is None else {"input": typed})
    return done.stdout


def dial_unix(path):
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE)
    made.connect(str(path))
    return made


def assert_refused(connection):
    """Nothing comes, and it ends: TCP shows a reset, a Unix socket has none that a peer could count on."""
    with connection:
        # An echo that was reached after all says so at once.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        if connection.family == socket.AF_UNIX:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                connection.recv(1)


# ---------------------------------------------------------------------------------------------------- real Redis


@every_mode
def test_redis_on_the_servers_unix_socket(mode, forward, redis):
    _, client = forward(mode, "0:unix:%s" % redis, serve_flags=("-r", "unix:%s" % redis))
    port = tcp_port(client)
    assert redis_cli("-p", port, "ping") == b"PONG\n"
    value = BLOCK.hex().encode()
    assert redis_cli("-p", port, "-x", "set", "big", typed=value) == b"OK\n"
    assert redis_cli("-p", port, "get", "big") == value + b"\n"
    # What came out at the other side is the real one, not something in between.
    assert redis_cli("-s", redis, "strlen", "big") == b"%d\n" % len(value)


@every_mode
def test_redis_through_a_local_unix_socket(mode, start, forward, short):
    port = free_port()
    start(need("redis-server"), "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", short).wait_for("(?i)ready to accept connections")
    _, client = forward(mode, "unix:%s/local.sock:127.0.0.1:%d" % (short, port))
    assert client.wait_for(UNIX_LISTENING).group(1) == "%s/local.sock" % short
    assert redis_cli("-s", short / "local.sock", "incr", "n") == b"1\n"
    assert redis_cli("-p", port, "incr", "n") == b"2\n"


@every_mode
def test_redis_from_unix_socket_to_unix_socket(mode, forward, redis, short):
    forward(mode, "unix:%s/local.sock:unix:%s" % (short, redis), serve_flags=("-r", "unix:.*"))[1].wait_for(UNIX_LISTENING)
    assert redis_cli("-s", short / "local.sock", "echo", "hello") == b"hello\n"


def test_many_redis_clients_at_once(forward, redis, short):
    """50 connections, with commands in flight on each of them."""
    _, client = forward(ANY, "unix:%s/local.sock:unix:%s" % (short, redis), serve_flags=("-r", "unix:.*"))
    client.wait_for(UNIX_LISTENING)
    done = subprocess.run([need("redis-benchmark"), "-s", str(short / "local.sock"), "-c", "50", "-n", "3000", "-P", "4", "-d", "1000",
                           "-t", "set,get", "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE * 2)
    assert done.returncode == 0 and b"requests per second" in done.stdout and b"Error" not in done.stdout, done.stdout.decode()
    assert redis_cli("-s", short / "local.sock", "ping") == b"PONG\n"


# ---------------------------------------------------------------------------------------------------- bytes and ends


@pytest.fixture
def join(forward, short, unix_listener):
    """join(mode) -> (originator, target): a connection from a Unix socket to a Unix socket, both ends in the hands of the test."""
    with contextlib.ExitStack() as stack:
        def launch(mode):
            _, client = forward(mode, "unix:%s/local.sock:unix:%s/target.sock" % (short, short), serve_flags=("-r", "unix:%s/.*" % short))
            client.wait_for(UNIX_LISTENING)
            originator = stack.enter_context(dial_unix(short / "local.sock"))
            target = stack.enter_context(unix_listener.accept()[0])
            target.settimeout(PATIENCE)
            return originator, target
        yield launch


@every_mode
@pytest.mark.parametrize("first", ["originator", "target"])
def test_half_close(mode, first, join):
    check_half_close(*(join(mode) if first == "originator" else reversed(join(mode))))


@every_mode
def test_bulk_each_way(mode, join):
    check_bulk_each_way(join(mode))


def test_target_that_leaves_with_bytes_unread(join):
    """A Unix socket's only kind of reset. A clean end at the other side would pass for an exchange that is complete."""
    originator, target = join(ANY)
    originator.sendall(b"read this")
    assert receive_exactly(target, 1) == b"r"
    target.close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        assert originator.recv(1) == b""
        while True:
            originator.sendall(BLOCK)


def test_nothing_is_left_behind(forward, unix_echo, short):
    server, client = forward(ANY, "unix:%s/local.sock:unix:%s" % (short, unix_echo.path), serve_flags=("-r", "unix:.*"))
    client.wait_for(UNIX_LISTENING)
    ask_over(dial_unix(short / "local.sock"))
    before = {program: descriptors(program) for program in (server, client)}
    for n in range(200):
        ask_over(dial_unix(short / "local.sock"), b"%d" % n)
    for program in (server, client):
        # A few links may be kept; one descriptor in twenty would be a leak.
        eventually(lambda program=program: descriptors(program) <= before[program] + 10, "the descriptors came back")


def test_two_workers_share_a_unix_socket(forward, unix_echo, short):
    """SO_REUSEPORT is for ports only: the workers have to share the one socket."""
    server, client = forward(ANY, "unix:%s/local.sock:unix:%s" % (short, unix_echo.path), serve_flags=("-r", "unix:.*", "--workers", "2"),
                             connect_flags=("--workers", "2"))
    client.wait_for(UNIX_LISTENING)
    for n in range(20):
        ask_over(dial_unix(short / "local.sock"), b"%d" % n)
    assert client.stop() == 0 and not (short / "local.sock").exists()


# ---------------------------------------------------------------------------------------------------- what the server allows


@pytest.mark.parametrize("mode, regex", [(mode, None) for mode in MODES] + [(ANY, r".*:.*"), (ANY, "/.*"), (ANY, "unix:%s/other.sock")],
                         ids=lambda value: getattr(value, "name", value))
def test_paths_are_closed_unless_named(mode, regex, serve, connect, unix_echo, short):
    """Whatever a rule for hosts and ports lets through: a path is allowed only where a rule speaks of paths."""
    server, port = serve(*mode.serve, *([] if regex is None else ["-r", regex % short if "%" in regex else regex]))
    client = connect(port, *mode.connect, "0:unix:%s" % unix_echo.path)
    client.wait_for(READY)
    assert_refused(dial(tcp_port(client)))
    client.wait_for(NOT_ALLOWED)
    server.wait_for("refused.*%s|%s.*refused" % ((re.escape(unix_echo.path),) * 2))
    assert unix_echo.accepted == 0


@pytest.mark.parametrize("regex", ["unix:.*", "unix:%s/echo.sock", r"unix:%s/[a-z]+\.sock|10\.0\.0\.1:80", r"(?:unix:)?.*"])
def test_paths_that_a_rule_names(regex, forward, unix_echo, short):
    _, client = forward(ANY, "0:unix:%s" % unix_echo.path, serve_flags=("-r", regex % short if "%" in regex else regex))
    ask(tcp_port(client))


def test_a_rule_of_paths_opens_no_host(forward, tcp_echo, unix_echo):
    _, client = forward(ANY, "0:127.0.0.1:%d" % tcp_echo.port, "0:unix:%s" % unix_echo.path, serve_flags=("-r", "unix:.*"))
    assert_refused(dial(tcp_port(client)))
    ask(tcp_port(client, 2))
    assert tcp_echo.accepted == 0


def test_a_path_in_other_letters_is_another_path(forward, unix_echo, short):
    """Host names have no case, which is why a rule has none; files have."""
    os.rename(unix_echo.path, str(short / "ECHO.sock"))
    _, client = forward(ANY, "0:unix:%s/ECHO.sock" % short, serve_flags=("-r", "unix:%s/echo.sock" % short))
    assert_refused(dial(tcp_port(client)))
    assert unix_echo.accepted == 0


CROOKED = [
    "unix:{0}/app/../secret.sock", "unix:{0}/app/./../secret.sock", "unix:{0}//app/../secret.sock", "unix:/{0}/secret.sock", "unix:{0}/secret.sock/",
    "unix:{0}/app/../../{1}/secret.sock", "unix:.{0}/secret.sock", "unix:", "unix:/", "unix:app/x", "unix:{0}/app/x\0/../../secret.sock",
    "unix:{0}/secret.sock\0", "unix:{0}/secret.sock\n", "unix:{0}/app/" + "x" * 100, "unix:{0}/app:80", "unix:{0}/secret.sock:80",
    "UNIX:{0}/secret.sock",
]


def test_the_server_takes_no_crooked_path(serve, keys, short):
    """From a client that is not ours, which would not send it. The rule is one that an owner may write, and `..` would lead out of it."""
    secret = UnixTarget(echo, short / "secret.sock")
    (short / "app").mkdir()
    try:
        server, port = serve("-r", "unix:%s/app/.*|unix:/?%s/secret.sock.+" % (short, short))
        for crooked in CROOKED:
            with Client.connect(port, seed_of(keys.client)) as link:
                with pytest.raises(PeerError) as refusal:
                    link.handshake().open(crooked.format(short, short.name)).wait_opened()
                assert (refusal.value.code, refusal.value.text) == (INVALID_HOST, NOT_ALLOWED), crooked
    finally:
        secret.close()
    assert secret.accepted == 0
    assert all(line.isprintable() for line in server.lines), server.lines


def test_there_is_no_udp_to_a_path(serve, keys, udp_echo, unix_echo):
    """From a client that is not ours, on a link that also has a session that is right."""
    server, port = serve("-r", ".*:.*|unix:.*")
    with Client.connect(port, seed_of(keys.client)) as link:
        link.handshake().open_udp()
        link.session(1, "unix:%s" % unix_echo.path)
        link.session(2, "127.0.0.1:%d" % udp_echo.port)
        link.datagrams((1, b"to the path"), (2, b"to the echo"))
        seen = {}
        while len(seen) < 2:
            record, content = link.read_udp()
            for number, *what in content if record == DATAGRAMS else [content]:
                seen[number] = record, what
        assert seen[1][0] == SESSION_OVER and seen[2] == (DATAGRAMS, [b"to the echo"])
    assert unix_echo.accepted == 0 and server.process.poll() is None


@pytest.mark.parametrize("options, regex, allowed", [
    ('permitopen="unix:{0}/echo.sock"', "unix:.*", True),
    ('permitopen="unix:{0}/echo.sock"', "unix:{0}/other.sock", False),
    ('permitopen="unix:{0}/other.sock"', "unix:.*", False),
    ('permitopen="*:*"', None, False),
    ('permitopen="127.0.0.1:*" permitopen="unix:{0}/echo.sock" alice@laptop', None, True),
])
def test_paths_that_a_key_may_open(options, regex, allowed, keys, forward, unix_echo, short):
    keys.server.write("authorized_keys", "%s %s\n" % (keys.client.public, options.format(short)))
    _, client = forward(ANY, "0:unix:%s" % unix_echo.path, serve_flags=("-r", regex.format(short)) if regex else ())
    connection = dial(tcp_port(client))
    ask_over(connection) if allowed else assert_refused(connection)
    assert unix_echo.accepted == allowed


# ---------------------------------------------------------------------------------------------------- targets that fail


def test_targets_that_are_no_sockets(forward, unix_echo, short):
    (short / "file").write_text("not a socket")
    stale(short / "stale.sock")
    names = "missing.sock", "file", "stale.sock", "no/such/folder.sock"
    server, client = forward(ANY, *["0:unix:%s/%s" % (short, name) for name in names], "0:unix:%s" % unix_echo.path, serve_flags=("-r", "unix:.*"))
    for n, name in enumerate(names, 1):
        assert_refused(dial(tcp_port(client, n)))
        for program in (server, client):
            program.wait_for("ERROR.*%s/%s" % (re.escape(str(short)), name))
    ask(tcp_port(client, len(names) + 1))


def test_target_that_comes_up_later(forward, short):
    _, client = forward(ANY, "0:unix:%s/late.sock" % short, serve_flags=("-r", "unix:.*"))
    assert_refused(dial(tcp_port(client)))
    late = UnixTarget(echo, short / "late.sock")
    try:
        ask(tcp_port(client))
    finally:
        late.close()


def test_target_whose_queue_is_full(forward, short, unix_echo):
    """A Unix socket answers "try again" where a TCP one would wait: some are refused or wait; nothing may hang or fail for good."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short / "busy.sock"))
        listener.listen(1)
        listener.settimeout(PATIENCE)
        server, client = forward(ANY, "0:unix:%s/busy.sock" % short, "0:unix:%s" % unix_echo.path, serve_flags=("-r", "unix:.*"))
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(dial(tcp_port(client))) for _ in range(8)]
            ask(tcp_port(client, 2))
            threading.Thread(target=serve_all, args=(listener,), daemon=True).start()
            answered = sum(is_answered(connection) for connection in waiting)
        assert answered >= 1
        ask(tcp_port(client))
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def serve_all(listener):
    with contextlib.suppress(OSError):
        while True:
            # Each on its own: the order in which they come through is nobody's promise.
            threading.Thread(target=serve_one, args=(listener.accept()[0],), daemon=True).start()


def serve_one(connection):
    with connection, contextlib.suppress(OSError):
        connection.settimeout(PATIENCE)
        echo(connection)


def is_answered(connection):
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"?")
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection) == b"?"
    return False


# ---------------------------------------------------------------------------------------------------- the local socket as a file


def stale(path):
    """A socket file as a program that was killed leaves it: nobody listens."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("umask", ["000", "022", "777"])
def test_only_its_owner_may_use_it(umask, serve, start, keys, tcp_echo, short):
    """Whoever connects to it uses the owner's key. The umask is the user's business; what it makes of this is not."""
    _, port = serve()
    client = start("sh", "-c", 'umask %s; exec "$@"' % umask, "sh", *RATROD, "-k", keys.client.path, "connect", "127.0.0.1:%d" % port,
                   "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port))
    client.wait_for(UNIX_LISTENING)
    mode = (short / "local.sock").lstat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    ask_over(dial_unix(short / "local.sock"))


def test_the_line_that_says_so(serve, connect, short):
    _, port = serve()
    client = connect(port, "unix:%s/local.sock:db:5432" % short)
    assert client.wait_for(r"📻 \[UNIX\] Listening on `unix:%s/local\.sock`, and routing through `127\.0\.0\.1:%d` to `db:5432` \.\.\.$"
                           % (re.escape(str(short)), port))
    # A stream only: there is no such thing as UDP here.
    assert "[UDP]" not in client.output


def test_no_udp_for_a_unix_socket_at_the_server(forward, unix_echo):
    _, client = forward(ANY, "0:unix:%s" % unix_echo.path, serve_flags=("-r", "unix:.*"))
    line = client.wait_for(r"\[TCP\] Listening on").string
    assert "to `unix:%s`" % unix_echo.path in line
    ask(tcp_port(client))
    assert "[UDP]" not in client.output


@pytest.mark.parametrize("sign, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_it_is_removed_at_the_end(sign, code, forward, tcp_echo, short):
    _, client = forward(ANY, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port), "unix:%s/second.sock:127.0.0.1:%d" % (short, tcp_echo.port))
    client.wait_for(UNIX_LISTENING, 2)
    assert sorted(path.name for path in short.iterdir()) == ["local.sock", "second.sock"]
    assert client.stop(sign) == code
    assert list(short.iterdir()) == []


def test_it_is_removed_where_the_start_fails(run_client, short):
    """No server: nothing of it may stay, or the next start of something else at this path would find it."""
    client = run_client("127.0.0.1:9", "unix:%s/local.sock:db:5432" % short)
    assert client.wait() == 1, client.output
    assert list(short.iterdir()) == []


@pytest.fixture
def run_client(ratrod, keys):
    def launch(*words):
        return ratrod("-k", keys.client.path, "connect", *words)
    return launch


def test_a_stale_socket_is_replaced(serve, connect, tcp_echo, short):
    stale(short / "local.sock")
    _, port = serve()
    client = connect(port, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port))
    client.wait_for(UNIX_LISTENING)
    ask_over(dial_unix(short / "local.sock"))
    # And so one client after another, however each of them ends.
    client.stop(signal.SIGKILL)
    assert (short / "local.sock").exists()
    connect(port, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port)).wait_for(UNIX_LISTENING)
    ask_over(dial_unix(short / "local.sock"))
    assert stat.S_IMODE((short / "local.sock").lstat().st_mode) == 0o600


def assert_fails_naming(client, path):
    assert client.wait() == 1, client.output
    client.wait_for("ERROR.*%s" % re.escape(str(path)))


def test_a_live_socket_is_left_alone(serve, connect, tcp_echo, unix_echo, short):
    """Neither another program's nor our own other client's."""
    _, port = serve()
    assert_fails_naming(connect(port, "unix:%s:127.0.0.1:%d" % (unix_echo.path, tcp_echo.port)), unix_echo.path)
    ask_over(dial_unix(unix_echo.path))
    connect(port, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port)).wait_for(UNIX_LISTENING)
    assert_fails_naming(connect(port, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port)), short / "local.sock")
    ask_over(dial_unix(short / "local.sock"))


def test_a_live_socket_whose_queue_is_full_is_alive(serve, connect, short):
    """It answers "try again", which is not "nobody is there"."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(short / "busy.sock"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10):
                full = stack.enter_context(socket.socket(socket.AF_UNIX))
                full.setblocking(False)
                full.connect(str(short / "busy.sock"))
        _, port = serve()
        assert_fails_naming(connect(port, "unix:%s/busy.sock:db:5432" % short), short / "busy.sock")
        listener.settimeout(PATIENCE)
        assert os.stat(str(short / "busy.sock")) and listener.accept()


def test_the_same_path_twice(serve, run_client, tcp_echo, short):
    _, port = serve()
    tunnel = "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port)
    assert_fails_naming(run_client("127.0.0.1:%d" % port, tunnel, tunnel), short / "local.sock")
    assert list(short.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "link to a file", "link to nothing"])
def test_what_is_no_socket_is_left_alone(kind, serve, connect, short):
    path = short / "precious"
    (short / "elsewhere").write_text("of somebody")
    {"file": lambda: path.write_text("of value"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(str(path)),
     "link to a file": lambda: path.symlink_to("elsewhere"), "link to nothing": lambda: path.symlink_to("nowhere")}[kind]()
    before = path.lstat()
    _, port = serve()
    assert_fails_naming(connect(port, "unix:%s:db:5432" % path), path)
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_size, before.st_mtime_ns)
    assert sorted(other.name for other in short.iterdir()) == ["elsewhere", "precious"]
    assert (short / "elsewhere").read_text() == "of somebody"


def test_a_socket_that_is_somebody_elses_by_now_is_not_removed(forward, tcp_echo, short):
    """An administrator moved ours out of the way and started something else there."""
    _, client = forward(ANY, "unix:%s/local.sock:127.0.0.1:%d" % (short, tcp_echo.port))
    client.wait_for(UNIX_LISTENING)
    (short / "local.sock").unlink()
    other = UnixTarget(echo, short / "local.sock")
    try:
        assert client.stop() == 0
        ask_over(dial_unix(short / "local.sock"))
    finally:
        other.close()


def test_no_such_folder(serve, connect, short):
    _, port = serve()
    assert_fails_naming(connect(port, "unix:%s/no/such/local.sock:db:5432" % short), short / "no/such/local.sock")


def test_one_bad_listener_of_several_leaves_nothing(serve, run_client, short):
    """Half of what was asked for is nothing that can be left running."""
    (short / "file").write_text("of value")
    _, port = serve()
    assert_fails_naming(run_client("127.0.0.1:%d" % port, "unix:%s/good.sock:db:5432" % short, "unix:%s/file:db:5432" % short), short / "file")
    assert [path.name for path in short.iterdir()] == ["file"]


def test_the_longest_path(forward, short, unix_echo):
    """100 bytes work at both ends."""
    paths = [str(short / letter).ljust(100, letter) for letter in "ab"]
    os.rename(unix_echo.path, paths[1])
    forward(ANY, "unix:%s:unix:%s" % tuple(paths), serve_flags=("-r", "unix:.*"))[1].wait_for(UNIX_LISTENING)
    ask_over(dial_unix(paths[0]))


def test_a_path_with_other_letters(forward, short, unix_echo):
    paths = ["%s/%s" % (short, name) for name in ("my socket.ä", "ünser täger 漢")]
    os.rename(unix_echo.path, paths[1])
    forward(ANY, "unix:%s:unix:%s" % tuple(paths), serve_flags=("-r", "unix:%s" % paths[1]))[1].wait_for(UNIX_LISTENING)
    ask_over(dial_unix(paths[0]))


NONE = [
    "unix:", "unix:/", "unix:/a", "unix:relative:db:80", "unix:./a:db:80", "unix:/a/../b:db:80", "unix:/a/./b:db:80", "unix://a:db:80",
    "unix:/a//b:db:80", "unix:/a/..:db:80", "unix:/a/:db:80",
    "unix:/%s:db:80" % ("a" * 100), "unix:/%s:db:80" % ("ä" * 50), "unix:/a\nb:db:80", "unix:/a\x7fb:db:80",
    "unix:/a:db:0", "unix:/a:db:http", "unix:/a:db:70000", "unix:/a::80", "unix:/a:db:80:90", "unix:/a:::", "unix:/a:unix:", "unix:/a:unix:b",
    "unix:/a:unix:/b:c", "unix:/a:unix:/b/../c",
    "0:unix:", "0:unix:/", "0:unix:relative", "0:unix:/a/../b", "0:unix://a", "0:unix:/%s" % ("a" * 100), "0:unix:/a\x1bb", "0:unix:/a:80",
    "70000:unix:/a", "x:unix:/a", ":0:unix:/a", "-1:unix:/a",
]


def test_tunnels_that_are_none(keys):
    assert_no_tunnels(keys, NONE, "unix:/path")
