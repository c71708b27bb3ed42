"""known_hosts: what a client does with a server's key that it does not know, or that has changed; alone, and in front of somebody at a terminal."""

import base64
import contextlib
import hashlib
import os
import re
import selectors
import shlex
import signal
import socket
import stat
import subprocess
import threading
import time

import pytest

from support.keys import make_keys
from support.programs import AUTHENTICATION_FAILED, LEGACY, LEGACY_E, PATIENCE, RATROD, RATROD2, READY, STARTED, missing, need, tcp_port
from support.sockets import ask, dial, eventually, receive_all, receive_exactly

pytestmark = pytest.mark.usefixtures("no_traceback")

INTERRUPTED = 130
UNKNOWN = "is not in the known hosts file"
CHANGED = "HAS CHANGED"
both_wires = pytest.mark.parametrize("mode", [RATROD2, LEGACY], ids=lambda mode: mode.name)
QUESTION = r"\(yes/no/\[fingerprint\]\)\?"
AGAIN = "Please type 'yes', 'no' or the fingerprint: "


@pytest.fixture
def known(keys):
    """The client's known_hosts: a path, empty so far."""
    path = keys.client.path / "known_hosts"
    path.write_text("")
    return path


@pytest.fixture
def strange(tmp_path):
    """The key folder of somebody else."""
    return make_keys(tmp_path / "strange")


@pytest.fixture
def dialling(ratrod, keys):
    """dialling(server, TUNNEL words..., flags=()) -> Program: our client with nobody at its terminal, not yet awaited."""
    def launch(server, *tunnels, flags=(), **options):
        server = "127.0.0.1:%d" % server if isinstance(server, int) else server
        return ratrod("-k", keys.client.path, "connect", *flags, server, *tunnels, **options)
    return launch


@pytest.fixture
def impostor(ratrod, keys, strange, tcp_echo):
    """impostor(client, mode, port, text) -> Program: somebody else's server takes the port, and the client says `text`, having told it nothing."""
    def launch(client, mode, port, text):
        strange.trust(keys.client, "authorized_keys")
        program = ratrod("-v", "-k", strange.path, "serve", *mode.serve, "127.0.0.1:%d" % port)
        program.wait_for(STARTED)
        accepted = tcp_echo.accepted

        def noticed():
            if client.process.poll() is None:
                with contextlib.suppress(OSError), dial(tcp_port(client)) as connection:
                    connection.sendall(b"a secret")
                    connection.shutdown(socket.SHUT_WR)
                    assert receive_all(connection) == b""
            return text in client.output
        eventually(noticed, lambda: client.output)
        assert "Accepted" not in program.output and tcp_echo.accepted == accepted
        return program
    return launch


def fingerprint(public):
    """As `ssh-keygen -l` shows one: of the 32 raw bytes of the key."""
    raw = base64.urlsafe_b64decode(public + "=")
    assert len(raw) == 32
    return "SHA256:" + base64.b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()


def warnings(program):
    """The lines of level WARN, but for the one about legacy's clear text."""
    return [line for line in program.output.splitlines() if re.search(r"Z +WARN ", line) and "in the clear" not in line]


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ---------------------------------------------------------------------------------------------------- nobody there to ask


@pytest.mark.parametrize("mode, form", [
    (RATROD2, "127.0.0.1:PORT"), (LEGACY, "127.0.0.1:PORT"), (LEGACY_E, "localhost:PORT"), (RATROD2, "LocalHost:PORT"), (RATROD2, "[::1]:PORT"),
    (RATROD2, "[0:0:0:0:0:0:0:1]:PORT")], ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_line_to_add_is_the_one_that_works(mode, form, ratrod, serve, keys, known, dialling):
    """The next step is in the message: taken as it stands, it makes the same command work."""
    bind = "[::1]:0" if "[" in form else "127.0.0.1:0"
    try:
        server, port = serve(*mode.serve, bind=bind)
    except AssertionError:
        missing("IPv6 on this machine") if "[" in form else None
        raise
    address = form.replace("PORT", str(port))
    client = dialling(address, flags=mode.connect)
    assert client.wait() == AUTHENTICATION_FAILED
    message = client.wait_for(r"Z +ERROR .*(%s.*)" % re.escape(UNKNOWN)).group()
    assert keys.server.public in message and str(known) in message
    lines = re.findall(r"%s [^\s`]+:%d(?=$|[\s`])" % (re.escape(keys.server.public), port), message)
    assert len(lines) == 1, message
    assert known.read_text() == ""
    known.write_text(lines[0] + "\n")
    client = dialling(address, flags=mode.connect)
    assert client.wait() == 0, client.output
    assert warnings(client) == []
    # Bound to this server: another port's is not known by it.
    assert server.process.poll() is None


UNKNOWN_BY = ["", "{other}", "{other} {address}0", "{server} elsewhere:1", "{server} {address}0", "# {server} {address}", "{server}x {address}",
              "{address} {server}", "{other}\n{server} elsewhere:1"]
KNOWN_BY = ["{server} {address}", "{server}", "  {server}\t{address}\r", "{server}\n{other} elsewhere:1", "{other}\n{server}",
            "{other} {address}\n{server} {address}"]
# A bare key counts only where no line is bound to the address.
CHANGED_BY = ["{other} {address}", "{server}\n{other} {address}", "{other} {address}\n{server}", "{server} elsewhere:1\n{other} {address}"]


def test_what_a_file_says_of_a_server(serve, keys, known, strange, dialling):
    """With nobody there to ask; and the file is only read."""
    server, port = serve("-v")
    outcomes, expected = {}, dict.fromkeys(UNKNOWN_BY, (AUTHENTICATION_FAILED, UNKNOWN))
    expected.update(dict.fromkeys(CHANGED_BY, (AUTHENTICATION_FAILED, CHANGED)))
    expected.update(dict.fromkeys(KNOWN_BY, (0, READY)))
    for lines in expected:
        text = lines.format(server=keys.server.public, other=strange.public, address="127.0.0.1:%d" % port) + "\n"
        known.write_bytes(text.encode())
        # A server that is not known learns nothing of who asked: there is no message 3.
        said = len(server.lines)
        client = dialling(port)
        outcomes[lines] = client.wait(), " ".join(word for word in (UNKNOWN, CHANGED, READY) if re.search(re.escape(word), client.output))
        assert not re.search(QUESTION, client.output) and known.read_bytes() == text.encode()
        if outcomes[lines][0]:
            assert not any("Accepted" in line or keys.client.public in line for line in server.lines[said:])
    assert outcomes == expected


# ---------------------------------------------------------------------------------------------------- a changed key


@pytest.mark.parametrize("flags", [(), ("--accept-new",)], ids=["plain", "accept-new"])
@both_wires
def test_a_changed_key_is_an_error_whatever_was_asked_for(mode, flags, serve, keys, known, strange, dialling):
    """The one case that known_hosts is for: it names where the old key stands, and changes nothing."""
    server, port = serve("-v", *mode.serve)
    known.write_text("# my servers\n\n%s\n%s 127.0.0.1:%d\n%s elsewhere:1\n" % (keys.server.public, strange.public, port, keys.server.public))
    before, when = known.read_bytes(), os.stat(known).st_mtime_ns
    client = dialling(port, "0:127.0.0.1:9", flags=(*mode.connect, *flags))
    assert client.wait() == AUTHENTICATION_FAILED
    message = client.wait_for("Z +ERROR .*%s.*" % CHANGED).group()
    assert re.search(r"line 4\b", message) and str(known) in message, message
    # Both keys, so that they can be compared with what the server's operator says.
    assert keys.server.public in message and strange.public in message
    assert UNKNOWN not in client.output
    assert (known.read_bytes(), os.stat(known).st_mtime_ns) == (before, when)
    assert "Accepted" not in server.output


def test_of_several_changed_lines_one_is_named(serve, keys, known, strange, tmp_path, dialling):
    _, port = serve()
    third = make_keys(tmp_path / "third")
    known.write_text("%s 127.0.0.1:%d\n# both\n%s 127.0.0.1:%d\n" % (strange.public, port, third.public, port))
    client = dialling(port, flags=("--accept-new",))
    assert client.wait() == AUTHENTICATION_FAILED
    message = client.wait_for("%s.*" % CHANGED).group()
    named = re.search(r"line ([13])\b", message).group(1)
    assert (strange.public if named == "1" else third.public) in message


@both_wires
def test_a_key_that_changes_while_the_client_runs(mode, known, dialling, impostor, tcp_echo, serve):
    """At the next link: --accept-new takes the first key, and no second one."""
    server, port = serve(*mode.serve)
    client = dialling(port, "0:%d" % tcp_echo.port, flags=(*mode.connect, "--accept-new"))
    client.wait_for(READY)
    ask(tcp_port(client))
    before = known.read_bytes()
    assert server.stop() == 0
    impostor(client, mode, port, CHANGED)
    assert known.read_bytes() == before


# ---------------------------------------------------------------------------------------------------- --accept-new, -a


@both_wires
def test_accept_new_writes_one_bound_line_and_then_is_silent(mode, serve, keys, known, dialling, tcp_echo):
    known.unlink()
    server, port = serve("-v", *mode.serve)
    client = dialling(port, "0:%d" % tcp_echo.port, "0:%d" % tcp_echo.port, flags=(*mode.connect, "--accept-new"))
    client.wait_for(READY)
    for n in (1, 2, 1, 2):
        ask(tcp_port(client, n))
    line = "%s 127.0.0.1:%d\n" % (keys.server.public, port)
    assert known.read_text() == line
    assert mode_of(known) == 0o600
    assert len(warnings(client)) == 1 and keys.server.public in warnings(client)[0], client.output
    assert client.stop() == 0
    # Known now, with the flag and without it.
    for flags in (("--accept-new",), ()):
        client = dialling(port, "0:%d" % tcp_echo.port, flags=(*mode.connect, *flags))
        client.wait_for(READY)
        ask(tcp_port(client))
        assert warnings(client) == []
        assert client.stop() == 0
    assert known.read_text() == line
    assert not re.search(QUESTION, client.output)


def test_what_was_accepted_may_be_taken_back(serve, keys, known, strange, dialling, tcp_echo):
    """In legacy every connection is a handshake of its own: what known_hosts says now counts, not what was accepted an hour ago."""
    _, port = serve(*LEGACY.serve)
    client = dialling(port, "0:%d" % tcp_echo.port, flags=(*LEGACY.connect, "--accept-new"))
    client.wait_for(READY)
    ask(tcp_port(client))
    known.write_text("%s 127.0.0.1:%d\n" % (strange.public, port))
    with pytest.raises(ConnectionResetError):
        ask(tcp_port(client))
    client.wait_for("%s.*line 1\\b" % CHANGED)


def test_accept_new_adds_nothing_where_a_bare_key_knows_the_server(serve, keys, known, strange, dialling):
    _, port = serve()
    before = "%s\n%s\n%s elsewhere:1\n" % (strange.public, keys.server.public, strange.public)
    known.write_text(before)
    client = dialling(port, flags=("--accept-new",))
    assert client.wait() == 0, client.output
    assert warnings(client) == [] and known.read_text() == before


def test_what_is_in_the_file_stays(serve, keys, known, strange, dialling):
    """A file without a last newline too: its last line must not grow, nor the new one be lost in it."""
    _, port = serve()
    line = b"%s 127.0.0.1:%d\n" % (keys.server.public.encode(), port)
    for text in (b"", b"\n", b"# my servers", b"OTHER elsewhere:1", b"OTHER elsewhere:1\n", b"OTHER elsewhere:1\r\n", b"OTHER",
                 b"\xff\xfe not text \x00", b"OTHER elsewhere:1\n\n# end", b"x" * 100_000):
        before = text.replace(b"OTHER", strange.public.encode())
        known.write_bytes(before)
        os.chmod(known, 0o644)
        client = dialling(port, flags=("--accept-new",))
        assert client.wait() == 0, client.output
        assert known.read_bytes() == before + (b"\n" if before and not before.endswith(b"\n") else b"") + line
        assert mode_of(known) == 0o644
    # And it is found again, behind a very long one.
    assert dialling(port).wait() == 0


def test_a_link_in_its_place_stays_one(serve, keys, known, dialling, tmp_path):
    """Whoever keeps the file elsewhere, as in a repository of their settings, finds the new line there."""
    known.unlink()
    (tmp_path / "elsewhere").write_text("")
    known.symlink_to(tmp_path / "elsewhere")
    _, port = serve()
    assert dialling(port, flags=("--accept-new",)).wait() == 0
    assert known.is_symlink() and (tmp_path / "elsewhere").read_text() == "%s 127.0.0.1:%d\n" % (keys.server.public, port)


def test_several_clients_at_once(serve, keys, known, dialling, tmp_path, ratrod):
    """Different servers, one file: no line is lost or mixed with another."""
    servers = [make_keys(tmp_path / str(n)) for n in range(3)]
    ports = []
    for server in servers:
        server.trust(keys.client, "authorized_keys")
        ports.append(int(ratrod("-k", server.path, "serve", "127.0.0.1:0").wait_for(STARTED).group(1)))
    known.write_text("# no newline")
    clients = [dialling(port, flags=("--accept-new",)) for port in ports]
    assert [client.wait() for client in clients] == [0] * 3
    lines = known.read_text().splitlines()
    assert sorted(lines[1:]) == sorted("%s 127.0.0.1:%d" % pair for pair in zip((server.public for server in servers), ports))
    assert lines[0] == "# no newline"


@pytest.mark.parametrize("mode, before", [(RATROD2, ""), (RATROD2, "OTHER 127.0.0.1:PORT\n"), (RATROD2, "KEY 127.0.0.1:PORT\n"),
                                          (LEGACY, "OTHER 127.0.0.1:PORT\n")], ids=["unknown", "changed", "known", "legacy, changed"])
def test_accept_all_hosts_accepts_and_warns(mode, before, serve, keys, known, strange, dialling, tcp_echo):
    _, port = serve(*mode.serve)
    before = before.replace("OTHER", strange.public).replace("KEY", keys.server.public).replace("PORT", str(port))
    known.write_text(before)
    client = dialling(port, "0:%d" % tcp_echo.port, flags=(*mode.connect, "-a"))
    client.wait_for(READY)
    ask(tcp_port(client))
    assert known.read_text() == before
    assert len(warnings(client)) == 1, client.output
    assert not re.search(QUESTION, client.output)


def make_folder(path):
    """As root, which tests often run as, no file is unwritable; a folder is."""
    path.unlink()
    path.mkdir()


def make_dangling(path):
    path.unlink()
    path.symlink_to(path.with_name("no") / "folder")


@pytest.mark.parametrize("mode, spoil", [(RATROD2, make_folder), (RATROD2, make_dangling), (LEGACY, make_folder)],
                         ids=["folder", "dangling link", "legacy, folder"])
def test_a_file_that_cannot_be_written(mode, spoil, serve, ratrod, keys, known, strange, dialling, impostor, tcp_echo):
    """It goes on for this run, with that key alone: also the file that cannot be written must not become -a."""
    spoil(known)
    server, port = serve(*mode.serve)
    client = dialling(port, "0:%d" % tcp_echo.port, flags=(*mode.connect, "--accept-new"))
    client.wait_for(READY)
    for _ in range(3):
        ask(tcp_port(client))
    assert [line for line in warnings(client) if str(known) in line], client.output
    assert len(warnings(client)) <= 2, client.output
    # The same server again: known.
    assert server.stop() == 0
    server = ratrod("-k", keys.server.path, "serve", *mode.serve, "127.0.0.1:%d" % port)
    server.wait_for(STARTED)

    def works():
        with contextlib.suppress(AssertionError, OSError):
            ask(tcp_port(client))
            return True
    eventually(works, lambda: client.output)
    # Another one in its place: not known.
    assert server.stop() == 0
    program = impostor(client, mode, port, strange.public)
    # It holds for this run only.
    assert client.wait() == 3
    program.stop()
    serve(*mode.serve, bind="127.0.0.1:%d" % port)
    assert dialling(port, flags=mode.connect).wait() == AUTHENTICATION_FAILED


def test_a_file_on_a_read_only_disk(start, serve, keys, known, strange):
    """As in a container whose settings are mounted: what it says counts, and what is new is for this run."""
    unshare = need("unshare")
    prefix = unshare, "-m", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"', known
    known.write_text("%s elsewhere:1\n" % strange.public)
    before = known.read_bytes()
    try:
        subprocess.run([str(word) for word in (*prefix, "sh", "-c", '! echo x >> "$0"', known)], check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        missing("permission to mount")
    _, port = serve()
    client = start(*prefix, *RATROD, "-k", keys.client.path, "connect", "--accept-new", "127.0.0.1:%d" % port)
    assert client.wait() == 0, client.output
    assert [line for line in warnings(client) if str(known) in line], client.output
    assert known.read_bytes() == before


# ---------------------------------------------------------------------------------------------------- somebody at the terminal


class Terminal:
    """A program whose terminal is in the hands of the test: stdin and stderr, and its keys for interrupts. stdout is a pipe, where `stdout`
    gathers what comes; `other` replaces streams."""

    def __init__(self, command, env=None, **other):
        import fcntl
        import pty
        import termios

        self._ours, theirs = pty.openpty()
        self.shown, self.stdout = "", b""
        self._changed = threading.Condition()
        self._ended = False

        def own_terminal():
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        streams = {"stdin": theirs, "stderr": theirs, "stdout": subprocess.PIPE, **other}
        self.process = subprocess.Popen([str(word) for word in command], preexec_fn=own_terminal, env=env, pass_fds=(theirs,), **streams)
        os.close(theirs)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read_terminal, self._read_stdout)]
        for thread in self._threads:
            thread.start()

    def _read_terminal(self):
        data = b""
        # On Linux the end of a terminal is an error, elsewhere an end of file.
        with contextlib.suppress(OSError):
            for chunk in iter(lambda: os.read(self._ours, 4096), b""):
                data += chunk
                with self._changed:
                    self.shown = re.sub(r"\x1b\[[0-9;]*m", "", data.decode("utf-8", "replace")).replace("\r\n", "\n")
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_stdout(self):
        if self.process.stdout:
            self.stdout = self.process.stdout.read()

    @property
    def output(self):
        return self.shown

    def wait_for(self, pattern, count=1):
        """The count-th match of `pattern` in what is shown."""
        def found():
            matches = list(re.finditer(pattern, self.shown))
            return matches[count - 1] if len(matches) >= count else None
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, PATIENCE)
            match = found()
        assert match, "no %r%s in:\n%s" % (pattern, "" if count == 1 else " (%d times)" % count, self.shown)
        return match

    def type(self, text):
        os.write(self._ours, text.encode() if isinstance(text, str) else text)

    def wait(self):
        code = self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not re.search("Traceback|internal error", self.shown), self.shown
        return code

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def close(self):
        try:
            self.stop()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self._ours)


@pytest.fixture
def at_terminal(keys):
    """at_terminal(port, TUNNEL words..., flags=()) -> Terminal: our client, somebody in front of it."""
    pytest.importorskip("pty")
    with contextlib.ExitStack() as stack:
        def launch(port, *tunnels, flags=(), **other):
            made = Terminal((*RATROD, "-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % port, *tunnels), **other)
            stack.callback(made.close)
            return made
        yield launch


def line_of(keys, port):
    return "%s 127.0.0.1:%d\n" % (keys.server.public, port)


@pytest.mark.parametrize("mode, answer", [(RATROD2, "yes"), (RATROD2, "fingerprint"), (RATROD2, "key"), (LEGACY, "yes")],
                         ids=["yes", "fingerprint", "key", "legacy, yes"])
def test_the_question_and_what_accepts(mode, answer, serve, keys, known, at_terminal, tcp_echo):
    """Everything that is needed to judge is in the question; accepted, it goes on as if the key had always been known."""
    known.unlink()
    _, port = serve(*mode.serve)
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(QUESTION)
    asked = terminal.shown
    assert keys.server.public in asked and fingerprint(keys.server.public) + "=" not in asked
    assert re.search(re.escape(fingerprint(keys.server.public)) + r"(?![A-Za-z0-9+/=])", asked), asked
    assert "127.0.0.1:%d" % port in asked
    assert not known.exists() and READY not in asked
    terminal.type({"yes": "yes", "fingerprint": fingerprint(keys.server.public), "key": keys.server.public}[answer] + "\n")
    terminal.wait_for(READY)
    for _ in range(3):
        ask(tcp_port(terminal))
    assert known.read_text() == line_of(keys, port)
    assert mode_of(known) == 0o600
    assert terminal.stop() == 0
    assert len(re.findall(QUESTION, terminal.shown)) == 1 and AGAIN not in terminal.shown
    # stdout belongs to those who pipe it somewhere.
    assert terminal.stdout == b""
    # Now it is known: nothing is asked or said.
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(READY)
    ask(tcp_port(terminal))
    assert terminal.stop() == 0
    assert not re.search(QUESTION, terminal.shown) and warnings(terminal) == [] and terminal.stdout == b""
    assert known.read_text() == line_of(keys, port)


@pytest.mark.parametrize("mode, typed", [(RATROD2, "no\n"), (RATROD2, "\x04"), (RATROD2, "maybe\nno\n"), (LEGACY, "maybe\n\x04")],
                         ids=["no", "end of file", "garbage, no", "legacy, garbage, end of file"])
def test_what_declines(mode, typed, serve, keys, known, strange, at_terminal):
    before = "# mine\n%s elsewhere:1" % strange.public
    known.write_text(before)
    server, port = serve("-v", *mode.serve)
    terminal = at_terminal(port, "0:127.0.0.1:9", flags=mode.connect)
    terminal.wait_for(QUESTION)
    for piece in re.findall("[^\n]*\n|\x04", typed):
        terminal.type(piece)
        if piece == "maybe\n":
            terminal.wait_for(re.escape(AGAIN))
    assert terminal.wait() == AUTHENTICATION_FAILED
    assert known.read_text() == before
    assert terminal.stdout == b"" and READY not in terminal.shown
    # Whoever declines, or was not at the keyboard, is told what there is to do.
    assert UNKNOWN in terminal.shown and str(known) in terminal.shown
    assert "Accepted" not in server.output


def test_anything_else_is_asked_again(serve, keys, known, strange, at_terminal):
    """Above all a fingerprint that somebody pasted and that is another one's: it must not be taken for a yes, nor end it."""
    right, wrong = fingerprint(keys.server.public), fingerprint(strange.public)
    _, port = serve()
    terminal = at_terminal(port)
    terminal.wait_for(QUESTION)
    for n, garbage in enumerate(["", "y", "perhaps", "yes please", "no!", "SHA256:", right.partition(":")[0], wrong, right[:-1], right + "x",
                                 right.lower(), strange.public, keys.server.public[:-1], "\u00fc\u6771", "\x00", "\x1b[A", "y" * 2000], 1):
        terminal.type(garbage + "\n")
        terminal.wait_for(re.escape(AGAIN), n)
        assert known.read_text() == ""
    terminal.type("yes\n")
    assert terminal.wait() == 0, terminal.shown
    assert known.read_text() == line_of(keys, port)
    assert len(re.findall(QUESTION, terminal.shown)) == 1 and terminal.stdout == b""


@pytest.mark.parametrize("answers", ["yes \n", " yes\n", "\tyes\n"], ids=repr)
def test_white_space_around_an_answer_is_a_slip(answers, serve, keys, known, at_terminal):
    _, port = serve()
    terminal = at_terminal(port)
    terminal.wait_for(QUESTION)
    terminal.type(answers)
    assert terminal.wait() == 0, terminal.shown
    assert known.read_text() == line_of(keys, port)


@pytest.mark.parametrize("before", ["", "perhaps\n", "ye"], ids=["at once", "asked again", "in the middle of an answer"])
def test_interrupted_at_the_question(before, serve, known, at_terminal):
    """By the key of a real terminal."""
    _, port = serve()
    terminal = at_terminal(port, "0:127.0.0.1:9")
    terminal.wait_for(QUESTION)
    terminal.type(before)
    if before.endswith("\n"):
        terminal.wait_for(re.escape(AGAIN))
    terminal.type("\x03")
    assert terminal.wait() == INTERRUPTED
    assert known.read_text() == "" and terminal.stdout == b""


def test_ended_at_the_question(serve, known, at_terminal):
    """By a service manager: it must not hang there."""
    _, port = serve()
    terminal = at_terminal(port, "0:127.0.0.1:9")
    terminal.wait_for(QUESTION)
    terminal.process.send_signal(signal.SIGTERM)
    terminal.wait()
    assert known.read_text() == "" and terminal.stdout == b""


class Relay:
    """Passes bytes between clients and a server; `opened` and `ended` count the clients' connections."""

    def __init__(self, port, target):
        self._to, self.opened, self.ended, self.said = port, 0, 0, []
        self.port = target(self._handle).port

    def _handle(self, client):
        self.opened += 1
        said = bytearray()
        self.said.append(said)
        with contextlib.suppress(OSError), dial(self._to) as server, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while selector.get_map():
                for key, _ in selector.select(PATIENCE):
                    data = key.fileobj.recv(65536)
                    if key.fileobj is client:
                        said += data
                    if data:
                        key.data.sendall(data)
                    else:
                        key.data.shutdown(socket.SHUT_WR)
                        selector.unregister(key.fileobj)
        self.ended += 1


@both_wires
def test_nothing_is_open_while_it_asks(mode, serve, keys, known, at_terminal, target, tcp_echo):
    """A server that is not known yet keeps no connection, however long somebody reads the fingerprint; what follows is a new one."""
    _, port = serve("-v", *mode.serve)
    relay = Relay(port, target)
    # An answer takes longer than any handshake may.
    terminal = at_terminal(relay.port, "0:%d" % tcp_echo.port, flags=(*mode.connect, "--handshake-timeout", "0.5"))
    terminal.wait_for(QUESTION)
    eventually(lambda: relay.ended == relay.opened, "the connection was closed")
    assert relay.opened == 1
    before = relay.said[0]
    # There is no event for nothing to happen: longer than the deadline of a handshake.
    time.sleep(1)
    assert relay.opened == relay.ended == 1 and terminal.process.poll() is None
    terminal.type("perhaps\n")
    terminal.wait_for(re.escape(AGAIN))
    assert relay.opened == 1
    terminal.type("yes\n")
    terminal.wait_for(READY)
    assert relay.opened > 1 and relay.said[1] != before
    ask(tcp_port(terminal))
    assert known.read_text() == line_of(keys, relay.port)
    assert terminal.stop() == 0


@both_wires
def test_only_the_first_link_asks(mode, serve, keys, known, at_terminal, tcp_echo):
    """Connections that come to its ports meanwhile wait for the one answer."""
    server, port = serve("-v", *mode.serve)
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(QUESTION)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(dial(tcp_port(terminal, n))) for n in (1, 2) for _ in range(5)]
        for connection in waiting:
            connection.sendall(b"waiting")
        terminal.type("yes\n")
        for connection in waiting:
            assert receive_exactly(connection, 7) == b"waiting"
    assert len(re.findall(QUESTION, terminal.shown)) == 1
    assert known.read_text() == line_of(keys, port)
    assert terminal.stop() == 0 and terminal.stdout == b""


@pytest.mark.parametrize("mode, written", [(RATROD2, "known"), (RATROD2, "unwritable"), (LEGACY, "known")],
                         ids=["written", "unwritable", "legacy, written"])
def test_a_later_link_does_not_ask(mode, written, serve, ratrod, keys, known, strange, at_terminal, tcp_echo):
    """Hours later nobody sits there: another key in the server's place is an error, not a question."""
    if written == "unwritable":
        make_folder(known)
    server, port = serve(*mode.serve)
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(QUESTION)
    terminal.type("yes\n")
    terminal.wait_for(READY)
    ask(tcp_port(terminal))
    assert server.stop() == 0
    strange.trust(keys.client, "authorized_keys")
    impostor = ratrod("-v", "-k", strange.path, "serve", *mode.serve, "127.0.0.1:%d" % port)
    impostor.wait_for(STARTED)

    def noticed():
        if terminal.process.poll() is None:
            with contextlib.suppress(OSError), dial(tcp_port(terminal)) as connection:
                connection.recv(1)
        return strange.public in terminal.shown
    eventually(noticed, lambda: terminal.shown)
    assert len(re.findall(QUESTION, terminal.shown)) == 1
    assert "Accepted" not in impostor.output


@pytest.mark.parametrize("flags", [("--accept-new",), ()], ids=["accept-new", "plain"])
def test_a_changed_key_is_no_question(flags, serve, keys, known, strange, at_terminal):
    _, port = serve()
    before = "# mine\n%s 127.0.0.1:%d" % (strange.public, port)
    known.write_text(before)
    terminal = at_terminal(port, "0:127.0.0.1:9", flags=flags)
    assert terminal.wait() == AUTHENTICATION_FAILED
    assert re.search(r"%s.*line 2\b" % CHANGED, terminal.shown) and not re.search(QUESTION, terminal.shown)
    assert known.read_text() == before and terminal.stdout == b""


@pytest.mark.parametrize("flags, code", [(("--accept-new",), 0), (("-a",), 0)], ids=["accept-new", "accept-all-hosts"])
def test_flags_that_answer_beforehand(flags, code, serve, keys, known, at_terminal):
    _, port = serve()
    terminal = at_terminal(port, flags=flags)
    assert terminal.wait() == code
    assert not re.search(QUESTION, terminal.shown) and "WARN" in terminal.shown
    assert known.read_text() == (line_of(keys, port) if "--accept-new" in flags else "")


@pytest.mark.parametrize("stream", ["stdin", "stderr"])
def test_half_a_terminal_is_none(stream, serve, keys, known, at_terminal):
    """A question that nobody sees, or that nobody can answer, is not asked."""
    _, port = serve()
    replaced = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}[stream]
    terminal = at_terminal(port, "0:127.0.0.1:9", **{stream: replaced})
    said = terminal.process.stderr.read().decode() if stream == "stderr" else ""
    assert terminal.wait() == AUTHENTICATION_FAILED
    said += terminal.shown
    assert not re.search(QUESTION, said) and UNKNOWN in said and line_of(keys, port).strip() in said
    assert known.read_text() == "" and terminal.stdout == b""


def test_stdio_never_asks(serve, keys, known, at_terminal, tcp_echo):
    """Its stdin is the stream's: an answer would have to be taken from the data."""
    _, port = serve()
    terminal = at_terminal(port, "stdio:127.0.0.1:%d" % tcp_echo.port)
    assert terminal.wait() == AUTHENTICATION_FAILED
    assert not re.search(QUESTION, terminal.shown) and UNKNOWN in terminal.shown and line_of(keys, port).strip() in terminal.shown
    assert known.read_text() == "" and terminal.stdout == b""


def test_several_workers_do_not_ask(serve, keys, known, at_terminal, tcp_echo):
    """One terminal: two processes that read it would each take half of an answer. --accept-new is for them."""
    _, port = serve()
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=("--workers", "2"))
    assert terminal.wait() == AUTHENTICATION_FAILED
    assert not re.search(QUESTION, terminal.shown) and UNKNOWN in terminal.shown and line_of(keys, port).strip() in terminal.shown
    assert known.read_text() == ""
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=("--workers", "2", "--accept-new"))
    terminal.wait_for(READY)
    for _ in range(4):
        ask(tcp_port(terminal))
    assert set(known.read_text().splitlines()) == {line_of(keys, port).strip()}


def test_the_file_cannot_be_written_after_a_yes(serve, keys, known, at_terminal, tcp_echo):
    make_folder(known)
    _, port = serve()
    terminal = at_terminal(port, "0:%d" % tcp_echo.port)
    terminal.wait_for(QUESTION)
    terminal.type("yes\n")
    terminal.wait_for(READY)
    assert re.search("WARN .*" + re.escape(str(known)), terminal.shown)
    for _ in range(3):
        ask(tcp_port(terminal))
    assert len(re.findall(QUESTION, terminal.shown)) == 1


# ---------------------------------------------------------------------------------------------------- a real terminal emulator


@pytest.mark.parametrize("answer", ["yes", "no", "fingerprint", "C-c", "C-d"])
def test_in_tmux(answer, tmux, serve, keys, known, tmp_path, tcp_echo):
    """As people meet it: a terminal emulator, a shell, keys that are pressed."""
    _, port = serve()
    words = [*RATROD, "-k", str(keys.client.path), "connect", "127.0.0.1:%d" % port, *(["0:%d" % tcp_echo.port] if answer == "C-c" else [])]
    tmux("new-session", "-d", "-x", "200", "-y", "50",
         "%s > %s; echo exit code $?; read line" % (" ".join(map(shlex.quote, words)), shlex.quote(str(tmp_path / "stdout"))))

    def screen():
        return tmux("capture-pane", "-p", "-J")

    def shows(pattern):
        eventually(lambda: re.search(pattern, screen()), screen)
    shows(QUESTION)
    assert keys.server.public in screen() and fingerprint(keys.server.public) in screen()
    if answer.startswith("C-"):
        tmux("send-keys", answer)
    else:
        tmux("send-keys", "-l", fingerprint(keys.server.public) if answer == "fingerprint" else answer)
        tmux("send-keys", "Enter")
    code = {"yes": 0, "fingerprint": 0, "no": AUTHENTICATION_FAILED, "C-d": AUTHENTICATION_FAILED, "C-c": INTERRUPTED}[answer]
    shows("exit code %d\\b" % code)
    assert known.read_text() == (line_of(keys, port) if code == 0 else "")
    assert (tmp_path / "stdout").read_bytes() == b""
    assert "Traceback" not in screen()
