"""Unix sockets at either end of a tunnel, with a real Redis behind them. Without it: system/test_unix_ends.py."""

import os
import socket
import subprocess

import pytest

from support.programs import PATIENCE, RATROD2, every_mode, need, tcp_port

pytestmark = [pytest.mark.usefixtures("no_traceback"), pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")]

UNIX_LISTENING = r"\[UNIX\] Listening on `unix:(.+?)`"


@pytest.fixture
def redis(on_free_port, short):
    """(the path of its Unix socket, its port) of a real redis-server."""
    path, program = short / "redis.sock", need("redis-server")
    return path, on_free_port(lambda port: (program, "--port", port, "--bind", "127.0.0.1", "--unixsocket", path, "--save", "", "--appendonly", "no",
                                            "--dir", short), "(?i)ready to accept connections")


def redis_cli(*words, typed=None):
    done = subprocess.run([need("redis-cli"), "--raw", *[str(word) for word in words]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=PATIENCE, **{"stdin": subprocess.DEVNULL} if typed is None else {"input": typed})
    return done.stdout


@every_mode
def test_redis(mode, forward, redis):
    path, port = redis
    folder = path.parent
    _, client = forward(mode, "0:unix:%s" % path, "unix:%s/a.sock:127.0.0.1:%d" % (folder, port), "unix:%s/b.sock:unix:%s" % (folder, path),
                        serve_flags=("-r", "unix:%s" % path, "-r", r"127\.0\.0\.1"))
    assert [client.wait_for(UNIX_LISTENING, n).group(1) for n in (1, 2)] == ["%s/a.sock" % folder, "%s/b.sock" % folder]
    local = tcp_port(client)
    assert redis_cli("-p", local, "ping") == b"PONG\n"
    value = os.urandom((1 << 20) - 3).hex().encode()
    assert redis_cli("-p", local, "-x", "set", "big", typed=value) == b"OK\n"
    assert redis_cli("-p", local, "get", "big") == value + b"\n"
    # What came out at the other side is the real one, not something in between.
    assert redis_cli("-s", path, "strlen", "big") == b"%d\n" % len(value)
    assert redis_cli("-s", folder / "a.sock", "incr", "n") == b"1\n"
    assert redis_cli("-p", port, "incr", "n") == b"2\n"
    assert redis_cli("-s", folder / "b.sock", "echo", "hello") == b"hello\n"
    if mode is RATROD2:
        # 50 connections, with commands in flight on each of them.
        done = subprocess.run([need("redis-benchmark"), "-s", str(folder / "b.sock"), "-c", "50", "-n", "3000", "-P", "4", "-d", "1000",
                               "-t", "set,get", "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE * 2)
        assert done.returncode == 0 and b"requests per second" in done.stdout and b"Error" not in done.stdout, done.stdout.decode()
        assert redis_cli("-s", folder / "b.sock", "ping") == b"PONG\n"
