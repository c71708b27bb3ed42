"""ratrod as a library: tunnel() and serve(), over real sockets. What concerns a whole process (its output, end, children) runs in one of its own."""

import concurrent.futures
import contextlib
import functools
import gc
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from unittest import mock

import pytest

import ratrod
from support import ratrod2_peer as peer
from support.keys import make_keys, seed_of
from support.programs import CACHE, PATIENCE, ROOT, linux, missing
from support.rows import assert_raises
from support.sockets import ask_over, dial_udp, eventually, free_port, ping, receive_all, receive_exactly, say
from support.targets import echo

# A wait for any of these times is a test that hangs: longer than a test's patience.
ENDLESS = ratrod.Limits(handshake_timeout=4 * PATIENCE, connect_timeout=4 * PATIENCE, drain_timeout=4 * PATIENCE)
# A client whose server is away is not to be waited for.
HASTY = ratrod.Limits(connect_timeout=0.5, retry_interval=0.1)
REFUSED = "not allowed by this server"


def dial(address):
    return socket.create_connection(address, timeout=PATIENCE)


def ask(address, question=b"anybody there?"):
    """A whole connection to an echo."""
    ask_over(dial(address), question)


def ask_by_udp(address, question=b"?"):
    with dial_udp(address[1], address[0]) as made:
        made.send(question)
        return made.recv(100) == question


def assert_reset(address):
    """The connection is taken and then reset: what a refused target looks like."""
    with pytest.raises((ConnectionResetError, BrokenPipeError)), dial(address) as connection:
        connection.sendall(b"hello")
        assert connection.recv(1) == b"", "data out of nowhere"
        pytest.fail("a clean end")


def is_free(address):
    """Whether nobody listens there."""
    try:
        dial(address).close()
    except ConnectionRefusedError:
        return True
    return False


def local(port):
    return "0:127.0.0.1:%d" % port


class Ends:
    """serve() and tunnel() with the keys of the test, closed at its end."""

    def __init__(self, keys, stack):
        self.keys, self._stack = keys, stack

    def serve(self, bind="127.0.0.1:0", **options):
        return self._stack.enter_context(ratrod.serve(bind, **{"key_path": str(self.keys.server.path), **options}))

    def tunnel(self, server, *tunnels, **options):
        """`server`: what serve() gave, or a text."""
        where = server if isinstance(server, str) else "%s:%d" % server.address
        return self._stack.enter_context(ratrod.tunnel(where, *tunnels, **{"key_path": str(self.keys.client.path), **options}))

    def fails(self, kind, text, server, *tunnels, **options):
        """tunnel() raises `kind`, an error of ratrod's, that says `text`."""
        return assert_error(kind, text, lambda: self.tunnel(server, *(tunnels or (local(1),)), **options))


def assert_error(kind, text, make):
    assert issubclass(kind, ratrod.RatrodError)
    error = assert_raises(kind, text, make)
    assert str(error).isprintable()
    return error


@pytest.fixture
def ends(keys, stack):
    return Ends(keys, stack)


@pytest.fixture
def server(ends):
    return ends.serve()


@pytest.fixture
def run_silently(keys, tcp_echo):
    """run_silently(program text, exit code=0, timeout=PATIENCE): a Python that knows SERVER, CLIENT (key folders) and PORT (an echo's) ends with this
    code, and nothing was written by anybody."""
    def launch(text, code=0, timeout=PATIENCE):
        head = textwrap.dedent("""\
            import contextlib, gc, io, logging, os, signal, socket, sys, threading, time
            import ratrod
            SERVER, CLIENT, PORT = %r, %r, %d
            # A wait for any of these times is a test that hangs.
            ENDLESS = ratrod.Limits(handshake_timeout=100, connect_timeout=100, drain_timeout=100)

            def ask(address, question=b"anybody there?"):
                with socket.create_connection(address, 20) as connection:
                    connection.sendall(question)
                    connection.shutdown(socket.SHUT_WR)
                    answer = b"".join(iter(lambda: connection.recv(65536), b""))
                assert answer == question, answer

            def wakeup_fd():
                found = signal.set_wakeup_fd(-1)
                signal.set_wakeup_fd(found)
                return found

            def both():
                server = ratrod.serve("127.0.0.1:0", key_path=SERVER, limits=ENDLESS)
                return server, ratrod.tunnel("%%s:%%d" %% server.address, "0:127.0.0.1:%%d" %% PORT, key_path=CLIENT, limits=ENDLESS)
            """) % (str(keys.server.path), str(keys.client.path), tcp_echo.port)
        done = subprocess.run([sys.executable, "-c", head + textwrap.dedent(text)], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b""), done.stderr.decode()
    return launch


# ---------------------------------------------------------------------------------------------------- what it is for
def test_a_tunnel(keys, tcp_echo, udp_echo):
    """TCP and UDP on one address, as on the command line."""
    with ratrod.serve("127.0.0.1:0", key_path=str(keys.server.path)) as server:
        host, port = server.address
        assert (host, type(port)) == ("127.0.0.1", int) and port
        assert server.error is None
        with ratrod.tunnel("127.0.0.1:%d" % port, local(tcp_echo.port), key_path=str(keys.client.path)) as tunnel:
            assert tunnel.address[0] == "127.0.0.1" and tunnel.address[1] not in (0, port, tcp_echo.port)
            assert list(tunnel.addresses) == [tunnel.address]
            assert tunnel.error is None
            for question in (b"?", b"", os.urandom(3_000_000)):
                ask(tunnel.address, question)
        assert is_free(tunnel.address)
        with ratrod.tunnel("127.0.0.1:%d" % port, local(udp_echo.port), key_path=str(keys.client.path)) as tunnel:
            assert ask_by_udp(tunnel.address)
    assert is_free(server.address)


def test_a_list_on_a_file_system_that_hangs(ends, tcp_echo, monkeypatch):
    """One thread waits for the file system, also where SIGHUP asks for it again and again. What the list said before holds, for links that are
    there and for new ones."""
    monkeypatch.setattr(ratrod, "STEPS_AT_ONCE", 2)
    server, hangs, over = ends.serve(), threading.Event(), threading.Event()
    tunnel = ends.tunnel(server, local(tcp_echo.port))
    ask(tunnel.address, b"before")
    def hang(path, stat=os.stat):
        if str(path).startswith(str(ends.keys.server.path)):
            hangs.set()
            assert over.wait(PATIENCE)
        return stat(path)
    with monkeypatch.context() as patch:
        patch.setattr(ratrod.os, "stat", hang)
        try:
            assert hangs.wait(PATIENCE)
            ask(tunnel.address, b"meanwhile")
            done = threading.Semaphore(0)
            for _ in range(2):
                server._loop.call_soon_threadsafe(functools.partial(server._endpoint.reload, done.release))
            with peer.Client.connect(server.address[1], seed_of(ends.keys.client)) as link:
                assert link.handshake().exchange("127.0.0.1:%d" % tcp_echo.port, b"?") == b"?"
        finally:
            over.set()
        assert done.acquire(timeout=PATIENCE) and done.acquire(timeout=PATIENCE)


def test_without_with(keys, tcp_echo):
    """A path object is a path. When close() has returned, what was bound is free."""
    server = ratrod.serve("127.0.0.1:0", key_path=pathlib.Path(keys.server.path))
    for _ in range(5):
        server.close()
        assert is_free(server.address)
        server = ratrod.serve("127.0.0.1:%d" % server.address[1], key_path=keys.server.path)
    tunnel = ratrod.tunnel("%s:%d" % server.address, local(tcp_echo.port), key_path=pathlib.Path(keys.client.path))
    ask(tunnel.address)
    tunnel.close()
    assert is_free(tunnel.address)
    server.close()


def test_several_tunnels_of_one_client(ends, target):
    """Their addresses come in order."""
    server = ends.serve(allow_listen=True)
    ports = [target(lambda connection, n=n: connection.sendall(b"%d" % n)).port for n in range(4)]
    tunnel = ends.tunnel(server, local(ports[0]), "R:" + local(ports[1]), local(ports[2]), "R:127.0.0.1:" + local(ports[3]))
    assert tunnel.address == tunnel.addresses[0]
    assert len(set(tunnel.addresses)) == 4
    for number, address in enumerate(tunnel.addresses):
        assert address[0] == ("localhost" if number == 1 else "127.0.0.1")
        with dial(address) as connection:
            assert receive_all(connection) == b"%d" % number


def test_addresses_over_every_wire(ends, tcp_echo):
    """A given port is the address."""
    server = ends.serve(legacy=True)
    for options in ({"legacy": True}, {"legacy": True, "encrypt": True}, {}):
        port = free_port()
        tunnel = ends.tunnel(server, "%d:127.0.0.1:%d" % (port, tcp_echo.port), **options)
        assert tunnel.address == ("127.0.0.1", port)
        ask(tunnel.address)


def test_many_at_once_in_one_process(ends, target):
    """Each server and each tunnel has a loop of its own; what goes wrong with one leaves the others alone."""
    pairs = []
    for number in range(4):
        server = ends.serve()
        made = target(lambda connection, n=number: connection.sendall(receive_all(connection) + b"%d" % n))
        pairs += [(number, server, ends.tunnel(server, local(made.port), limits=HASTY)) for _ in range(2)]
    def use(pair):
        number, _, tunnel = pair
        for _ in range(10):
            with dial(tunnel.address) as connection:
                say(connection, b"x" * 10_000)
                assert receive_all(connection) == b"x" * 10_000 + b"%d" % number
    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(use, pairs, timeout=PATIENCE))
    pairs[0][1].close()
    assert_reset(pairs[0][2].address)
    with dial(pairs[-1][2].address) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b"3"


# ---------------------------------------------------------------------------------------------------- its end
def test_closing_ends_what_is_carried(ends, server, target):
    made = target(lambda connection: (connection.sendall(b"!"), connection.recv(1)))
    for end in (0, 1):
        tunnel = ends.tunnel(server, local(made.port))
        with dial(tunnel.address) as connection:
            receive_exactly(connection, 1)
            (tunnel, server)[end].close()
            pytest.raises(ConnectionResetError, connection.recv, 1)


def test_a_handler_of_the_log_that_closes_or_fails(ends, server):
    """It runs on the loops' threads: one that closes its own tunnel has it closed, and none that fails ends the server."""
    tunnel = ends.tunnel(server, local(1))
    handler = logging.Handler()
    handler.emit = lambda record: 1 / (record.thread == tunnel._thread.ident and tunnel.close() or 0)
    with mock.patch.object(ratrod.log, "handlers", [handler]):
        assert_reset(tunnel.address)
        eventually(lambda: is_free(tunnel.address), "it is closed")
    ends.tunnel(server)


def test_close_twice_and_by_other_threads(ends, server, tcp_echo):
    """By several at once too: each returns, and none before all is closed."""
    tunnel = ends.tunnel(server, local(tcp_echo.port))
    ask(tunnel.address)
    for end in (tunnel, server):
        def close(_, end=end):
            end.close()
            assert is_free(end.address)
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            list(pool.map(close, range(5), timeout=PATIENCE))
        end.close()
        assert end.error is None, "closing is no error"
        with end:
            pass  # closed already: leaving closes it once more


def test_closing_ends_those_who_are_not_in_yet(keys, stack):
    """Connections that have not authenticated themselves, and those whose turn has not come: none hangs on a server that is gone."""
    server = ratrod.serve("127.0.0.1:0", key_path=str(keys.server.path), limits=ENDLESS)
    strangers = [stack.enter_context(dial(server.address)) for _ in range(6)]
    for stranger in strangers[::2]:
        stranger.sendall(b"ratrod2\n")
    server.close()
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


@linux
def test_nothing_is_left_behind(keys, tcp_echo, udp_echo):
    """Threads and descriptors are what they were, after 20 rounds with traffic and 7 that failed to start."""
    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))
    def round_trip(fails):
        with contextlib.ExitStack() as stack:
            ends = Ends(keys, stack)
            server = ends.serve()
            tunnel = ends.tunnel(server, local(tcp_echo.port), local(udp_echo.port))
            ask(tunnel.addresses[0])
            assert ask_by_udp(tunnel.addresses[1])
        if fails:
            ends.fails(ratrod.RatrodError, ".", server)
    round_trip(True)
    gc.collect()
    before = held()
    gc.disable()  # what is closed only by the garbage collector is closed too late: until then its other end waits for an answer
    try:
        for number in range(20):
            round_trip(number % 3 == 0)
        # The test's own echoes may not have closed the last connection yet.
        eventually(lambda: all(now <= then for now, then in zip(held(), before)), lambda: "%s, now %s" % (before, held()))
    finally:
        gc.enable()


def test_the_interpreter_ends_without_closing(run_silently):
    """At once, with a connection open, quietly, and with the program's own exit code."""
    run_silently("""
        server, tunnel = both()
        ask(tunnel.address)
        held = socket.create_connection(tunnel.address)
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        sys.exit(7)
        """, 7)


def test_the_interpreter_ends_while_authorize_hangs(run_silently):
    """It must not block for long; where it does, here for a link, for a target and for a listener, the process still ends."""
    run_silently("""
        hanging = set()
        def allow(key, target):
            if target or is_full:
                hanging.add(target)
                time.sleep(60)
            return True
        server = ratrod.serve("127.0.0.1:0", key_path=SERVER, authorize=allow, allow_listen=True, limits=ENDLESS)
        def connect(tunnel):
            with contextlib.suppress(ratrod.RatrodError, OSError):  # at the end of the interpreter
                with ratrod.tunnel("%s:%d" % server.address, tunnel, key_path=CLIENT, limits=ENDLESS) as made:
                    socket.create_connection(made.address).recv(1)
        for tunnel, asked, is_full in (("0:127.0.0.1:1", "127.0.0.1:1", False), ("R:0:127.0.0.1:1", "listen localhost:0", False),
                                       ("0:a:1", "", True)):
            threading.Thread(target=connect, args=(tunnel,), daemon=True).start()
            until = time.monotonic() + 20
            while asked not in hanging:
                assert time.monotonic() < until, asked
                time.sleep(0.01)
        """)


# ---------------------------------------------------------------------------------------------------- errors
def test_missing_and_damaged_keys(ends, tmp_path):
    """Nothing is asked, made or written."""
    folder = tmp_path / "nothing"
    for _ in range(2):
        ends.fails(ratrod.ConfigError, re.escape(str(folder)), "127.0.0.1:1", key_path=str(folder))
        assert_error(ratrod.ConfigError, re.escape(str(folder)), lambda: ends.serve(key_path=str(folder)))
        folder.mkdir(exist_ok=True)
    assert not list(folder.iterdir())
    (ends.keys.client.path / "key").write_text("nonsense")
    ends.fails(ratrod.ConfigError, "key", "127.0.0.1:1")


def test_who_is_not_known(ends, server, keys, tmp_path, tcp_echo):
    """It says which line to add; nobody is asked."""
    where = "%s:%d" % server.address
    known = keys.client.path / "known_hosts"
    keys.client.write("known_hosts", "")
    ends.fails(ratrod.AuthenticationError, "is not in the known hosts file.*%s %s" % (keys.server.public, where), server)
    ask(ends.tunnel(server, local(tcp_echo.port), accept_all_hosts=True).address)
    assert not known.read_text()
    ask(ends.tunnel(server, local(tcp_echo.port), accept_new=True).address)
    assert known.read_text() == "%s %s\n" % (keys.server.public, where)
    ask(ends.tunnel(server, local(tcp_echo.port)).address)
    keys.client.write("known_hosts", "%s %s\n" % (make_keys(tmp_path / "other").public, where))
    ends.fails(ratrod.AuthenticationError, "HAS CHANGED", server, accept_new=True)
    # The other way round: a client that is not authorized.
    keys.server.write("authorized_keys", "# nobody\n")
    ends.fails(ratrod.AuthenticationError, "authorized_keys", server, accept_all_hosts=True)


def test_arguments_that_are_wrong(ends, server):
    for text in ("", "x:db:5432", "0:db", "0:db:0", "65536:db:80", "0:127.1:80", "0:db:80\n", "1-3:db:1-2", "R:0:db", "0:unix:relative"):
        ends.fails(ratrod.ConfigError, ".", server, text)
    for text in ("", "host", "host:0", "host:x", ":80", "host:80:90"):
        ends.fails(ratrod.ConfigError, ".", text)
    # stdin and stdout are the program's own.
    ends.fails(ratrod.ConfigError, "stdio", server, "stdio:127.0.0.1:1")
    ends.fails(ratrod.ConfigError, "legacy", server, "R:0:127.0.0.1:1", legacy=True)
    ends.fails(ratrod.ConfigError, "--socks-user", server, "0:socks", socks_user="without a colon")
    for options in ({"bind": "nonsense"}, {"bind": "127.0.0.1:x"}, {"remote_regex": "("}, {"remote_regex": [".*", "(a+)+b"]}):
        assert_error(ratrod.ConfigError, ".", lambda options=options: ends.serve(**options))


def test_a_port_that_is_taken(ends, server):
    """Of a server, of a tunnel, and of the second of two tunnels: then the first is not left listening."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, other = taken.getsockname()[1], free_port()
        assert_error(ratrod.RatrodError, "127.0.0.1:%d" % port, lambda: ends.serve("127.0.0.1:%d" % port))
        for tunnels in (["%d:db:1" % port], ["%d:db:1" % other, "%d:db:1" % port]):
            ends.fails(ratrod.RatrodError, "127.0.0.1:%d" % port, server, *tunnels)
    assert is_free(("127.0.0.1", other))


def test_a_listen_that_is_refused(server, ends, keys):
    ends.fails(ratrod.PolicyError, REFUSED, server, "R:0:127.0.0.1:1")
    allowing = ends.serve(allow_listen=True)
    keys.server.write("authorized_keys", '%s permitlisten="1"\n' % keys.client.public)
    error = ends.fails(ratrod.PolicyError, REFUSED, allowing, local(1), "R:0:127.0.0.1:1")
    assert not isinstance(error, ratrod.AuthenticationError)


def test_a_server_that_says_nothing(ends, target):
    """`timeout` bounds the whole start."""
    silent = target(lambda connection: connection.recv(1000) and connection.recv(1000))
    started = time.monotonic()
    error = ends.fails(ratrod.RatrodError, ".", "127.0.0.1:%d" % silent.port, timeout=0.3, limits=ENDLESS)
    assert not isinstance(error, (ratrod.ConfigError, ratrod.AuthenticationError))
    assert time.monotonic() - started < PATIENCE


def test_the_death_of_authorization(ends, server, keys, target):
    """What ended a tunnel meanwhile is its `error`; its port is closed, and closing it is no error."""
    tunnel = ends.tunnel(server, local(target(echo).port), retries=9)  # otherwise it goes on trying
    with dial(tunnel.address) as connection:
        ping(connection)
        assert tunnel.error is None
        keys.server.write("authorized_keys", "# nobody\n")
        pytest.raises(ConnectionResetError, connection.recv, 1)
    eventually(lambda: is_free(tunnel.address) and tunnel.error, "the port is closed, and the error shows")
    assert server.error is None
    error = tunnel.error
    tunnel.close()
    assert tunnel.error is error and isinstance(error, ratrod.AuthenticationError) and "authorized_keys" in str(error), repr(error)


def test_a_listener_waits_for_its_own_client(ends, second, monkeypatch):
    """For a moment after its last link. That another key asks for some address does not end the wait; that its own key does makes room at once."""
    monkeypatch.setattr(ratrod, "GRACE", 1000.0)
    server = ends.serve(allow_listen=True)
    tunnel = ends.tunnel(server, "R:" + local(1))
    tunnel.close()
    ends.tunnel(server, "R:" + local(1), key_path=str(second.path))
    assert not is_free(tunnel.address)
    ends.tunnel(server, "R:" + local(1))
    eventually(lambda: is_free(tunnel.address), "its own key has made room")


def test_a_server_that_comes_back_is_no_error(ends, tcp_echo, keys):
    """The links of a tunnel may all die: it makes others."""
    server = ends.serve(allow_listen=True)
    tunnel = ends.tunnel(server, local(tcp_echo.port), "R:" + local(tcp_echo.port), limits=HASTY)
    for address in tunnel.addresses:
        ask(address)
    server.close()
    assert_reset(tunnel.addresses[0])
    assert is_free(tunnel.addresses[1])
    ends.serve("%s:%d" % server.address, allow_listen=True)
    ask(tunnel.addresses[0])
    eventually(lambda: not is_free(tunnel.addresses[1]), "the server listens again")
    ask(tunnel.addresses[1])
    assert tunnel.error is None


# ---------------------------------------------------------------------------------------------------- a good guest in its process
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to itself")
def test_ctrl_c_is_the_programs(run_silently):
    """Nobody else's: the main thread gets KeyboardInterrupt, and what it cleans up by works until then."""
    run_silently("""
        server, tunnel = both()
        with server, tunnel:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(20)
            except KeyboardInterrupt:
                ask(tunnel.address)
                sys.exit(9)
        """, 9)


def test_main_leaves_the_process_as_it_was(run_silently):
    """main() called by a program, twice on the main thread and once on another: each time everything is put back."""
    run_silently("""
        import resource
        mine, own = (lambda *_: None), logging.StreamHandler(io.StringIO())
        signal.signal(signal.SIGTERM, mine)
        waker = socket.socketpair()
        waker[0].setblocking(False)
        signal.set_wakeup_fd(waker[0].fileno())
        ratrod.log.handlers[:] = [own]
        ratrod.log.setLevel(logging.CRITICAL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        sys.stderr = io.StringIO()

        def state():
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            return ([signal.getsignal(number) for number in signal.valid_signals()], wakeup_fd(), mask, ratrod.log.handlers[:], ratrod.log.propagate,
                    ratrod.log.level, resource.getrlimit(resource.RLIMIT_NOFILE), gc.get_freeze_count(), sorted(os.listdir("/proc/self/fd")))

        def terminate_once_started():
            while "Starting server" not in sys.stderr.getvalue():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        interrupt_soon = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))  # what workers say does not come here

        before = state()
        for flags, ending, code in (((), threading.Thread(target=terminate_once_started), 0), (("--workers", "2"), interrupt_soon, 130)):
            ending.start()
            assert ratrod.main(["-k", SERVER, "serve", *flags, "127.0.0.1:0"]) == code
            assert state() == before, (state(), before)
        for words, code in ((["--help"], 0), (["bogus"], 2), (["-k", SERVER, "connect", "127.0.0.1:9"], 1),
                            (["-k", SERVER, "serve", "1.2.3.4:0"], 1)):
            sys.stdout, found = io.StringIO(), []
            thread = threading.Thread(target=lambda: found.append(ratrod.main(words)))
            thread.start()
            thread.join()
            sys.stdout = sys.__stdout__
            assert found == [code], (words, found)
        assert state() == before, (state(), before)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("Ctrl-C is not the program's any more")
        """, timeout=4 * PATIENCE)


def test_workers_of_a_thread(run_silently):
    """No signal can reach main() there: it ends as its workers do."""
    run_silently("""
        sys.stderr = io.StringIO()
        found = []
        thread = threading.Thread(target=lambda: found.append(ratrod.main(["-k", SERVER, "serve", "--workers", "2", "127.0.0.1:0"])))
        thread.start()
        path = "/proc/self/task/%d/children"
        def children():
            return [int(pid) for task in os.listdir("/proc/self/task") for pid in open(path.replace("%d", task)).read().split()]
        while len(children()) < 2:
            time.sleep(0.01)
        os.kill(children()[0], signal.SIGTERM)
        thread.join()
        assert found == [0] and not children(), found
        """)


def test_what_else_belongs_to_the_process(run_silently):
    """Signals, the limit of descriptors, the garbage collector, the locale, the environment, the working directory, the threads' exception hooks."""
    run_silently("""
        import concurrent.futures, locale, resource
        def state():
            return ([signal.getsignal(number) for number in signal.valid_signals()], wakeup_fd(), resource.getrlimit(resource.RLIMIT_NOFILE),
                    gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.callbacks[:],
                    locale.setlocale(locale.LC_ALL), dict(os.environ), os.getcwd(), sys.excepthook, threading.excepthook, sys.getswitchinterval(),
                    socket.getdefaulttimeout(), os.umask(0o022))
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        before = state()
        server, tunnel = both()
        ask(tunnel.address)
        assert state() == before, (state(), before)
        tunnel.close()
        server.close()
        assert state() == before, (state(), before)
        # A pool's thread makes them, where signal.signal() and set_wakeup_fd() would fail. Others use them, and they last longer than that thread.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            server, tunnel = pool.submit(both).result(20)
            pool.submit(ask, tunnel.address).result(20)
        ask(tunnel.address)
        tunnel.close()
        server.close()
        """)


def test_nothing_is_written_and_no_logging_is_set_up(run_silently):
    """Neither by what goes well nor by what fails, where a program has set up no logging."""
    run_silently("""
        server, tunnel = both()
        ask(tunnel.address)
        # A target that refuses, a server and a key that are wrong, and a stranger.
        there = "%s:%d" % server.address
        with ratrod.tunnel(there, "0:127.0.0.1:1", key_path=CLIENT) as failing:
            with contextlib.suppress(ConnectionResetError), socket.create_connection(failing.address) as connection:
                assert connection.recv(1) == b"", "data"

        def fails(error, where, path):
            try:
                ratrod.tunnel(where, "0:127.0.0.1:1", key_path=path).close()
            except error:
                return
            raise AssertionError("no error")
        for where, path in (("127.0.0.1:1", CLIENT), (there, SERVER), (there, CLIENT + "/none")):
            fails(ratrod.RatrodError, where, path)
        with contextlib.suppress(ConnectionResetError), socket.create_connection(server.address) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            stranger.recv(100)
        with open(SERVER + "/authorized_keys", "w") as file:
            file.write("# nobody\\n")
        fails(ratrod.AuthenticationError, there, CLIENT)
        assert not logging.getLogger().handlers
        own = logging.getLogger("ratrod")
        assert [type(handler) for handler in own.handlers] == [logging.NullHandler], own.handlers
        assert own.level == logging.NOTSET and own.propagate and logging.getLogger().level == logging.WARNING
        """)


def test_a_program_that_logs_gets_its_lines(ends, caplog, tcp_echo):
    """On the logger `ratrod`, through the root logger's handlers as any library's."""
    with caplog.at_level(logging.INFO):
        server = ends.serve()
        tunnel = ends.tunnel(server, local(tcp_echo.port), local(1))
        ask(tunnel.addresses[0])
        assert_reset(tunnel.addresses[1])
        eventually(lambda: "refused" in caplog.text, "the failure is in the log")
    assert {record.name for record in caplog.records if record.name.startswith("ratrod")} == {"ratrod"}
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_keeps_none_of_its_parents_descriptors(run_silently):
    """It would take connections that nobody serves, and keep ports and connections that its parent has closed. (A key file that a thread of the
    parent reads at the moment of the fork is open in the child, too, and does no harm there: only sockets and selectors are counted.)"""
    run_silently("""
        import multiprocessing, warnings
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")  # Python's own word on fork()

        def inodes():
            names = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
            return {os.readlink(path) for path in map("/proc/self/fd/%s".__mod__, names) if os.path.lexists(path)}
        before = inodes()
        server, tunnel = both()
        ask(tunnel.address)
        held = socket.create_connection(tunnel.address, 20)
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        for end in ("os._exit(3)", "sys.exit(3)", "tunnel.close(); server.close(); sys.exit(3)"):
            pid = os.fork()
            if pid == 0:
                exec(end)
            status = os.waitpid(pid, 0)[1]
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3, (end, status)
            ask(tunnel.address)
        child_done, done = os.pipe()
        lives, ends = os.pipe()
        mine = {os.readlink("/proc/self/fd/%d" % fd) for fd in (held.fileno(), child_done, done, lives, ends)} if before else set()
        if os.fork() == 0:
            code = 1
            try:
                held.close()
                assert not {name for name in inodes() - before - mine if name.startswith(("socket:", "anon_inode:"))}
                tunnel.close(), server.close()
                files = [open(os.devnull) for _ in range(50)]
                del tunnel, server
                gc.collect()
                assert [file.read() for file in files] == [""] * 50, "a descriptor of somebody else was closed"
                again = both()  # a child has its own
                ask(again[1].address)
                again[1].close(), again[0].close()
                os.write(done, b".")
                os.read(lives, 1)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        os.close(done)
        context = multiprocessing.get_context("fork")
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        assert os.read(child_done, 1) == b"."
        ask(tunnel.address)
        held.sendall(b"y")
        assert held.recv(1) == b"y"
        addresses = tunnel.address, server.address
        tunnel.close()
        server.close()
        with contextlib.suppress(ConnectionResetError):
            assert held.recv(1) == b""
        for address in addresses:
            socket.create_server(address).close()
            try:
                socket.create_connection(address, 20)
                raise AssertionError("somebody listens at %s:%d" % address)
            except ConnectionRefusedError:
                pass
        os.write(ends, b".")
        assert os.wait()[1] == 0
        worker.terminate()
        worker.join()
        """)


# ---------------------------------------------------------------------------------------------------- authorize
class Judge:
    """An authorize= that keeps what it was asked, and says what allow(key, target) does."""

    def __init__(self, allow=lambda key, target: True):
        self._allow, self.asked = allow, []

    def __call__(self, key, target):
        self.asked.append((key, target))
        return self._allow(key, target)

    def targets(self):
        return {target for _, target in self.asked}


def test_authorize_allows(ends, keys, tcp_echo, udp_echo):
    """In place of authorized_keys: here that lists nobody, and then is not there at all."""
    keys.server.write("authorized_keys", "# nobody\n")
    judge = Judge()
    server = ends.serve(authorize=judge, allow_listen=True)
    tunnel = ends.tunnel(server, local(tcp_echo.port), local(udp_echo.port), "R:" + local(tcp_echo.port))
    ask(tunnel.addresses[0])
    assert ask_by_udp(tunnel.addresses[1])
    ask(tunnel.addresses[2])
    assert judge.asked[0] == (keys.client.public, "")
    assert {key for key, _ in judge.asked} == {keys.client.public}
    # After port 0 the client asks for the port that it has.
    assert judge.targets() - {"listen localhost:%d" % tunnel.addresses[2][1]} == {
        "", "127.0.0.1:%d" % tcp_echo.port, "udp 127.0.0.1:%d" % udp_echo.port, "listen localhost:0"}
    (keys.server.path / "authorized_keys").unlink()
    ask(ends.tunnel(server, local(tcp_echo.port)).address)
    # The server's own key is no client's, whatever authorize() says.
    keys.server.trust(keys.server, "known_hosts")
    ends.fails(ratrod.RatrodError, ".", server, key_path=str(keys.server.path))


def test_authorize_refuses_a_key(ends, keys, second, tcp_echo):
    """Whatever authorized_keys says: nothing of the client's is asked after that. A function that forgets its return does not open the door."""
    for refusal in (False, None, 0, ""):
        judge = Judge(lambda key, target, refusal=refusal: key == keys.client.public or refusal)
        server = ends.serve(authorize=judge)
        ask(ends.tunnel(server, local(tcp_echo.port)).address)
        ends.fails(ratrod.AuthenticationError, second.public, server, key_path=str(second.path))
        assert {target for key, target in judge.asked if key == second.public} == {""}


@pytest.mark.parametrize("raises", [False, True], ids=["says no", "raises"])
def test_authorize_refuses_a_target(ends, keys, target, udp_echo, caplog, raises):
    """As any refusal by policy: a reset at the originator, a reason in the server's log; also where it raises, of which the client learns nothing."""
    watched, good, broken = target(echo), target(echo), set()
    def allow(_key, asked):
        if asked in broken and raises:
            raise ZeroDivisionError("of the test")
        return asked not in broken
    server = ends.serve(authorize=allow, allow_listen=True)
    tunnel = ends.tunnel(server, local(watched.port), local(udp_echo.port), local(good.port))
    broken |= {"127.0.0.1:%d" % watched.port, "udp 127.0.0.1:%d" % udp_echo.port, "listen localhost:0"}
    with caplog.at_level(logging.INFO, "ratrod"):
        def is_logged(asked):
            eventually(lambda: asked in caplog.text and ("of the test" if raises else "refused") in caplog.text.lower(), "it is logged")
            caplog.clear()
        assert_reset(tunnel.addresses[0])
        is_logged("127.0.0.1:%d" % watched.port)
        with dial_udp(tunnel.addresses[1][1]) as made:
            made.send(b"?")
            is_logged("udp 127.0.0.1:%d" % udp_echo.port)
        ask(tunnel.addresses[2])
        ends.fails(ratrod.PolicyError, REFUSED, server, "R:0:127.0.0.1:1")
        is_logged("listen")
        broken.add("")
        ends.fails(ratrod.AuthenticationError, "^((?!of the test).)*$", server)
        is_logged(keys.client.public)
    broken.clear()
    ask(ends.tunnel(server, local(good.port)).address)
    assert (watched.accepted, udp_echo.seen, server.error) == (0, 0, None)


def test_authorize_comes_on_top_of_the_regex(ends, tcp_echo, target):
    good = target(echo)
    tunnel = ends.tunnel(ends.serve(authorize=Judge(), remote_regex=r"127\.0\.0\.1:%d" % good.port), local(good.port), local(tcp_echo.port))
    ask(tunnel.addresses[0])
    assert_reset(tunnel.addresses[1])
    assert tcp_echo.accepted == 0


def test_authorize_is_asked_about_the_address_inside_that_a_name_has(ends, tcp_echo, udp_echo, monkeypatch, caplog):
    """It has said yes to a name, over which somebody else may rule. About an address elsewhere it is not asked."""
    def found(address, kind=socket.SOCK_STREAM, flags=0):
        hosts = {"inside.example": ["127.0.0.1"], "both.example": ["198.18.0.1", "127.0.0.1"]}.get(address.host, [address.host])
        return [(socket.AF_INET, (host, address.port)) for host in hosts]
    monkeypatch.setattr(ratrod, "look_up", found)
    inside, by_udp = "127.0.0.1:%d" % tcp_echo.port, "udp 127.0.0.1:%d" % udp_echo.port
    allowed = {inside, by_udp}
    judge = Judge(lambda key, target: not target.startswith(("127.", "udp 127.")) or target in allowed)
    tunnel = ends.tunnel(ends.serve(authorize=judge), *("0:%s:%d" % each for each in (
        ("inside.example", tcp_echo.port), ("both.example", tcp_echo.port), ("inside.example", udp_echo.port))))
    ask(tunnel.addresses[0])
    assert ask_by_udp(tunnel.addresses[2])
    allowed.clear()
    with caplog.at_level(logging.INFO, "ratrod"):
        assert_reset(tunnel.addresses[0])
        eventually(lambda: "`inside.example:%d` resolves to `%s`, which authorize() does not permit" % (tcp_echo.port, inside) in caplog.text, "why")
    assert {inside, by_udp, "inside.example:%d" % tcp_echo.port} <= judge.targets()
    dial(tunnel.addresses[1]).close()
    eventually(lambda: "both.example:%d" % tcp_echo.port in judge.targets(), "it is asked about the name")
    assert not [target for target in judge.targets() if "198.18" in target]


def test_authorize_may_take_its_time(ends, tcp_echo, target):
    """What is carried goes on while it thinks."""
    slow = target(echo)
    thinking, think = threading.Event(), threading.Event()
    def allow(key, target):
        if target == "127.0.0.1:%d" % slow.port:
            thinking.set()
            think.wait(3 * PATIENCE)
        return True
    tunnel = ends.tunnel(ends.serve(authorize=allow), local(slow.port), local(tcp_echo.port))
    with dial(tunnel.addresses[1]) as running:
        ping(running)
        with dial(tunnel.addresses[0]) as waiting:
            waiting.sendall(b"?")
            assert thinking.wait(PATIENCE)
            try:
                ping(running)
            finally:
                think.set()
            assert receive_exactly(waiting, 1) == b"?"


# ---------------------------------------------------------------------------------------------------- the public surface
def test_all_is_what_a_star_imports():
    scope = {}
    exec("from ratrod import *", scope)
    assert set(scope) - {"__builtins__"} == set(ratrod.__all__)
    assert len(set(ratrod.__all__)) == len(ratrod.__all__)
    errors = {name for name in scope if name.endswith("Error")}
    assert errors and all(issubclass(scope[name], ratrod.RatrodError) for name in errors)
    assert not issubclass(ratrod.RatrodError, (OSError, SystemExit))


def test_all_is_what_the_readme_documents():
    """Every public name stands in it, and every `ratrod.name` that stands in it is public."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in ratrod.__all__ if not re.search(r"\b%s\b" % re.escape(name), text)] == []
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S)) + "\n".join(re.findall(r"`(ratrod\.[^`\n]+)`", text))
    named = set(re.findall(r"(?<![\w/.-])ratrod\.([A-Za-z_]\w*)", code)) - {"py", "pyz"}
    assert named, "the README shows no use as a library"
    assert named <= set(ratrod.__all__)


def members(cls):
    """The methods and properties that a user sees, as (name, function)."""
    for base in cls.__mro__:
        for name, member in vars(base).items() if base.__module__ == "ratrod" else ():
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member) and not name.startswith("_"):
                yield name, member


def test_all_of_it_is_documented_and_annotated():
    """Functions, classes, and what their objects show."""
    undocumented, bare, public = [], [], [getattr(ratrod, name) for name in ratrod.__all__]
    def look_at(name, function):
        if not inspect.getdoc(function):
            undocumented.append(name)
        signature = inspect.signature(function)
        wanted = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
        if any(parameter.annotation is inspect.Parameter.empty for parameter in wanted) or signature.return_annotation is inspect.Signature.empty:
            bare.append(name)
    for cls in (ratrod.Service, ratrod.Tunnel, *filter(inspect.isclass, public)):
        if not (cls.__doc__ or "").strip():
            undocumented.append(cls.__name__)
        for name, member in members(cls):
            look_at("%s.%s" % (cls.__name__, name), member)
    for function in filter(inspect.isfunction, public):
        look_at(function.__name__, function)
    assert (undocumented, bare) == ([], [])


def test_the_signatures():
    """Every option is by name alone: another may come between them one day."""
    expected = {
        ratrod.tunnel: {"key_path": None, "accept_new": False, "accept_all_hosts": False, "legacy": False, "encrypt": False, "socks_user": None,
                        "send_proxy": False, "proxy": None, "ssh_command": None, "remote_python": None, "retries": None, "timeout": 30.0},
        ratrod.serve: {"key_path": None, "remote_regex": ".*", "authorize": None, "allow_listen": False, "legacy": False}}
    for function, options in expected.items():
        parameters = inspect.signature(function).parameters.values()
        found = {parameter.name: parameter.default for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
        assert found.pop("limits", ratrod.Limits()) == ratrod.Limits()
        assert found == options


TYPED = """\
from __future__ import annotations

import socket

import ratrod


def allow(key: str, target: str) -> bool:
    return bool(key) and not target.startswith("udp ")


def main() -> tuple[str, int]:
    with ratrod.serve("127.0.0.1:0", key_path="/k", remote_regex=".*", authorize=allow, allow_listen=True, legacy=False) as s:
        host, port = s.address
        try:
            with ratrod.tunnel("%s:%d" % (host, port), "0:db:5432", "0:socks", key_path=None, accept_new=True, socks_user="a:b", timeout=5) as t:
                where: tuple[str, int] = t.address
                socket.create_connection(t.address).close()
                print(host.upper(), port + 1, t.addresses[-1])
                error: ratrod.RatrodError | None = t.error
                print(error)
                return where
        except ratrod.AuthenticationError as wrong:
            print(str(wrong))
            raise
        finally:
            s.close()
"""
WRONG = """\
import ratrod

ratrod.tunnel(1, "0:db:80")
ratrod.tunnel("host:1", 80)
ratrod.tunnel("host:1", "0:db:80", tiemout=1)
ratrod.serve("host:1", authorize=lambda key: True)
t = ratrod.tunnel("host:1", "0:db:80")
t.adress
t.address.foo
"""


def test_mypy_knows_the_types(tmp_path):
    """A caller that is right passes the strictest check, and one that is wrong does not: so the annotations say something."""
    if not importlib.util.find_spec("mypy"):
        missing("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(WRONG)
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "--config-file=",
                           "--cache-dir=%s" % (CACHE / "mypy"), "typed.py", "wrong.py"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, timeout=300, check=False)
    found = re.findall(r"^(\w+)\.py:(\d+): error", done.stdout.decode(), re.M)
    assert set(found) == {("wrong", str(line)) for line in (3, 4, 5, 6, 8, 9)}, done.stdout.decode()
