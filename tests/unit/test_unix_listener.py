"""The Unix socket that a client listens on, as a file: whose it is, what it replaces and what it leaves alone; and which paths there are."""

import contextlib
import os
import socket
import stat

import pytest

import ratrod
from ratrod import Address
from support.rows import row

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


def reaches(path, listener):
    """Whether a connection to `path` comes out at `listener`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"!")
        listener.settimeout(10)
        for _ in range(3):  # before it there may be one that only looked whether anybody listens
            with listener.accept()[0] as accepted:
                if accepted.recv(1) == b"!":
                    return True
    return False


@contextlib.contextmanager
def listening(path):
    with contextlib.closing(ratrod.listen_unix(str(path))) as made:
        yield made


def assert_left_alone(path):
    error = pytest.raises(ratrod.RatrodError, ratrod.listen_unix, str(path))
    assert str(error.value).startswith("cannot listen on `unix:%s`: " % path)
    return str(error.value)


def test_only_its_owner_may_use_it(short):
    """Whoever connects to it uses the owner's key. The umask is the user's business; what it makes of this is not."""
    for umask in (0, 0o22, 0o777):
        before = os.umask(umask)
        try:
            with row(oct(umask)), listening(short / "local.sock") as made:
                mode = (short / "local.sock").lstat().st_mode
                assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
                assert reaches(short / "local.sock", made)
        finally:
            os.umask(before)
        assert list(short.iterdir()) == []


def test_a_link_that_somebody_puts_in_its_place_is_not_followed(short):
    """Between two steps of ours, in a folder that others can write: the file that it names would change its mode."""
    (short / "victim").write_text("")
    (short / "victim").chmod(0o644)

    class Raced(ratrod.UnixListener):
        def bind(self, path):
            super().bind(path)
            os.unlink(path)
            os.symlink(str(short / "victim"), path)
    with Raced(socket.AF_UNIX) as raced, pytest.raises(PermissionError):
        raced.bind_privately(str(short / "local.sock"))
    assert stat.S_IMODE((short / "victim").stat().st_mode) == 0o644 and (short / "local.sock").is_symlink()


def test_one_whose_queue_is_full_is_left_alone(short):
    """It answers "try again". What a client does with a stale one, and one that is in use, is in system/test_unix_ends.py."""
    path = short / "local.sock"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind(str(path))
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10):
                full = stack.enter_context(socket.socket(socket.AF_UNIX))
                full.setblocking(False)
                full.connect(str(path))
        assert "another program listens there" in assert_left_alone(path)
        assert path.exists() and busy.accept()


def test_what_is_no_socket_is_left_alone(short):
    path = short / "precious"
    (short / "elsewhere").write_text("of somebody")
    def identity():
        status = path.lstat()
        return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns
    for kind, make in (("file", lambda: path.write_text("of value")), ("fifo", lambda: os.mkfifo(str(path))), ("folder", path.mkdir),
                       ("link to a file", lambda: path.symlink_to("elsewhere")), ("link to nothing", lambda: path.symlink_to("nowhere"))):
        with row(kind):
            make()
            before = identity()
            assert_left_alone(path)
            assert identity() == before and (short / "elsewhere").read_text() == "of somebody" and len(list(short.iterdir())) == 2
            path.rmdir() if kind == "folder" else path.unlink()
    assert_left_alone(short / "no/such/local.sock")


def test_a_socket_that_is_somebody_elses_by_now_is_not_removed(short):
    """An administrator moved ours out of the way and started something else there."""
    path = short / "local.sock"
    made = ratrod.listen_unix(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        made.close()
        assert reaches(path, other)


def test_paths(short):
    """100 bytes are the most; any letters will do."""
    for path in (str(short / "a").ljust(100, "a"), "%s/my socket.ä" % short, "%s/ünser täger 漢" % short):
        with row(path), listening(path) as made:
            assert ratrod.parse_tunnels("unix:%s:db:80" % path)[0].local == Address(path, 0)
            assert ratrod.parse_tunnels("0:unix:%s" % path)[0].remote == Address(path, 0)
            assert reaches(path, made)
