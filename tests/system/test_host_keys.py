"""known_hosts: what a client does with a server's key that it does not know, or that has changed; alone, and in front of somebody at a terminal.
What the lines of the file say, and which answers count, is in unit/test_key_folder.py."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time

import pytest

from support.keys import fingerprint
from support.many_lines import run_lines
from support.programs import AUTHENTICATION_FAILED, LEGACY, RATROD, RATROD2, READY, STARTED, Program, either_wire, missing, tcp_port
from support.relays import Door
from support.sockets import ask, dial, eventually, receive_all, receive_exactly, say

pytestmark = pytest.mark.usefixtures("no_traceback")

UNKNOWN = "is not in the known hosts file"
CHANGED = "HAS CHANGED"
QUESTION = r"\(yes/no/\[fingerprint\]\)\?"
AGAIN = "Please type 'yes', 'no' or the fingerprint: "


@pytest.fixture
def known(keys):
    """The client's known_hosts: a path, empty so far."""
    path = keys.client.path / "known_hosts"
    path.write_text("")
    return path


@pytest.fixture
def clients(keys, tmp_path):
    """clients((text of known_hosts, words...)...) -> [(path of its known_hosts, Outcome)]: that end by themselves, nobody at their terminals."""
    def launch(*rows):
        paths, lines = [], []
        for text, *words in rows:
            folder = tmp_path / ("client-%d" % len(list(tmp_path.iterdir())))
            shutil.copytree(str(keys.client.path), str(folder))
            paths.append(folder / "known_hosts")
            paths[-1].write_text(text)
            lines.append(["-k", folder, "connect", *words])
        outcomes = run_lines(lines)
        assert not any(re.search(QUESTION, outcome.err) or outcome.out for outcome in outcomes), outcomes
        return list(zip(paths, outcomes))
    return launch


@pytest.fixture
def impostor(ratrod, keys, stranger, tcp_echo):
    """impostor(client, mode, port, text) -> Program: somebody else's server takes the port, and the client says `text`, having told it nothing."""
    def launch(client, mode, port, text):
        stranger.trust(keys.client, "authorized_keys")
        program = ratrod("-v", "-k", stranger.path, "serve", *mode.serve, "127.0.0.1:%d" % port)
        program.wait_for(STARTED)
        accepted = tcp_echo.accepted
        def noticed():
            if client.process.poll() is None:
                with contextlib.suppress(OSError), dial(tcp_port(client)) as connection:
                    say(connection, b"a secret")
                    assert receive_all(connection) == b""
                # The log comes a moment later, and a second connection would wait in vain.
                with contextlib.suppress(AssertionError):
                    client.wait_for(re.escape(text), patience=1)
            return text in client.output
        eventually(noticed, lambda: client.output)
        assert "Accepted" not in program.output and tcp_echo.accepted == accepted
        return program
    return launch


def warnings(output):
    """The lines of level WARN, but for the one about legacy's clear text."""
    return [line for line in output.splitlines() if re.search(r"Z +WARN ", line) and "in the clear" not in line]


def line_of(keys, port):
    return "%s 127.0.0.1:%d\n" % (keys.server.public, port)


def test_the_line_to_add_is_the_one_that_works(serve, keys, clients):
    """The next step is in the message: taken as it stands, it makes the same command work."""
    server, port = serve("-v")
    legacy, legacy_port = serve("-v", "--legacy")
    try:
        six, six_port = serve("-v", bind="[::1]:0")
    except AssertionError:
        missing("IPv6 on this machine")
    forms = [("127.0.0.1:%d" % port,), ("127.0.0.1:%d" % legacy_port, "--legacy"), ("localhost:%d" % legacy_port, "--legacy", "-e"),
             ("LocalHost:%d" % port,), ("[::1]:%d" % six_port,), ("[0:0:0:0:0:0:0:1]:%d" % six_port,)]
    lines = []
    for words, (path, done) in zip(forms, clients(*(("", *words) for words in forms))):
        assert done.code == AUTHENTICATION_FAILED and path.read_text() == "", done
        message = re.search(r"Z +ERROR .*(%s.*)" % re.escape(UNKNOWN), done.err).group()
        assert keys.server.public in message and str(path) in message
        found = re.findall(r"%s [^\s`]+:%s(?=$|[\s`])" % (re.escape(keys.server.public), words[0].rpartition(":")[2]), message)
        assert len(found) == 1, message
        lines += found
    for program in (server, legacy, six):  # a server that is not known learns nothing of who asked: there is no message 3
        assert "Accepted" not in program.output and keys.client.public not in program.output
    for _, done in clients(*((line + "\n", *words) for line, words in zip(lines, forms))):
        assert (done.code, warnings(done.err)) == (0, []), done


def test_a_changed_key_is_an_error_whatever_was_asked_for(serve, keys, stranger, clients):
    """The one case that known_hosts is for: it names where the old key stands, and changes nothing."""
    rows = []
    for mode in (RATROD2, LEGACY):
        server, port = serve("-v", *mode.serve)
        text = "# my servers\n\n%s\n%s 127.0.0.1:%d\n%s elsewhere:1\n" % (keys.server.public, stranger.public, port, keys.server.public)
        rows += [(text, *mode.connect, *flags, "127.0.0.1:%d" % port, "0:127.0.0.1:9") for flags in ((), ("--accept-new",))]
    for (text, *words), (path, done) in zip(rows, clients(*rows)):
        assert done.code == AUTHENTICATION_FAILED and UNKNOWN not in done.err, (words, done)
        message = re.search("Z +ERROR .*%s.*" % CHANGED, done.err).group()
        assert re.search(r"line 4\b", message) and str(path) in message, message
        # Both keys, so that they can be compared with what the server's operator says.
        assert keys.server.public in message and stranger.public in message
        assert path.read_text() == text
    assert "Accepted" not in server.output


def test_flags_and_what_the_file_says(serve, keys, stranger, clients):
    """--accept-new adds a line where nothing in the file knows the server; -a accepts, warns once, and writes nothing."""
    _, port = serve()
    line, bare = line_of(keys, port), "%s\n%s\n%s elsewhere:1\n" % (stranger.public, keys.server.public, stranger.public)
    rows = [  # known_hosts before, flag, what is added, warnings
        ("# no newline", "--accept-new", "\n" + line, 1), (line, "--accept-new", "", 0), (bare, "--accept-new", "", 0),
        ("", "-a", "", 1), ("%s 127.0.0.1:%d\n" % (stranger.public, port), "-a", "", 1), (line, "-a", "", 1)]
    for (before, flag, added, warned), (path, done) in zip(rows, clients(*((before, flag, "127.0.0.1:%d" % port) for before, flag, _, _ in rows))):
        assert done.code == 0 and path.read_text() == before + added and len(warnings(done.err)) == warned, (before, flag, done)


@either_wire
def test_accept_new_writes_one_bound_line_and_takes_no_second_key(mode, serve, keys, known, stranger, client, impostor, tcp_echo):
    known.unlink()
    server, port = serve("-v", *mode.serve)
    tunnels, flags = ["0:%d" % tcp_echo.port] * 2, (*mode.connect, "--accept-new")
    dialled = client(port, *tunnels, flags=(*flags, "--max-retry-count", "1")).ready()
    for n in (1, 2, 1, 2):
        ask(tcp_port(dialled, n))
    line = line_of(keys, port)
    assert known.read_text() == line and stat.S_IMODE(os.stat(known).st_mode) == 0o600
    assert len(warnings(dialled.output)) == 1 and keys.server.public in warnings(dialled.output)[0], dialled.output
    if mode is LEGACY:
        # What was accepted may be taken back: what known_hosts says now counts, not what was accepted an hour ago.
        known.write_text("%s 127.0.0.1:%d\n" % (stranger.public, port))
        pytest.raises(ConnectionResetError, ask, tcp_port(dialled))
        assert dialled.wait() == AUTHENTICATION_FAILED
        dialled.wait_for("%s.*line 1\\b" % CHANGED)
        known.write_text(line)
    else:
        assert dialled.stop() == 0
    # Known now, it is silent. When the key changes while the client runs, the next link finds out.
    dialled = client(port, *tunnels, flags=flags).ready()
    ask(tcp_port(dialled))
    assert warnings(dialled.output) == [] and server.stop() == 0
    impostor(dialled, mode, port, CHANGED)
    assert known.read_text() == line


def make_folder(path):  # as root, which tests often run as, no file is unwritable; a folder is
    path.unlink()
    path.mkdir()


def test_accept_new_where_the_file_cannot_be_written(serve, keys, known, client):
    """Any key would be new at each start, as with -a. The server learns nothing of who asked. Other such files: unit/test_key_folder.py."""
    make_folder(known)
    server, port = serve("-v")
    dialled = client(port, "0:127.0.0.1:9", flags=["--accept-new"])
    assert dialled.wait() == AUTHENTICATION_FAILED
    dialled.wait_for("ERROR.*ratrod .*`%s`.*add this line to `%s`: %s" % (known, known, line_of(keys, port).strip()))
    assert "Accepted" not in server.output


class Terminal(Program):
    """A program whose terminal is in the hands of the test: stdin, and stderr, whose `lines` are what is shown. `stdout` is what came there."""

    def __init__(self, command, **options):
        import fcntl
        import pty
        import termios
        self._ours, theirs = pty.openpty()
        self._out = tempfile.TemporaryFile()
        def own_terminal():
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        own = {"stdin": theirs, "stdout": self._out, "stderr": theirs, "preexec_fn": own_terminal, "pass_fds": (theirs,)}
        super().__init__(command, **{**own, **options})
        os.close(theirs)

    @property
    def stdout(self):
        return os.pread(self._out.fileno(), 1 << 20, 0)

    def _read(self):
        data = b""
        # On Linux the end of a terminal is an error, elsewhere an end of file.
        with contextlib.suppress(OSError):
            for chunk in iter(lambda: os.read(self._ours, 4096), b""):
                data += chunk
                with self._changed:
                    self.lines = re.sub(r"\x1b\[[0-9;]*m", "", data.decode("utf-8", "replace")).replace("\r\n", "\n").split("\n")
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def type(self, text):
        os.write(self._ours, text.encode())

    def wait(self):
        code = super().wait()
        assert not re.search("Traceback|internal error", self.output), self.output
        return code

    def close(self):
        try:
            self.stop()
        finally:
            os.close(self._ours)
            self._out.close()


@pytest.fixture
def at_terminal(keys, stack):
    """at_terminal(port, TUNNEL words..., flags=()) -> Terminal: our client, somebody in front of it."""
    pytest.importorskip("pty")
    def launch(port, *tunnels, flags=(), **other):
        made = Terminal((*RATROD, "-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % port, *tunnels), **other)
        stack.callback(made.close)
        return made
    return launch


@pytest.mark.parametrize("mode, answer", [(RATROD2, "fingerprint"), (LEGACY, "yes")], ids=["ratrod2, fingerprint", "legacy, yes"])
def test_the_question_and_what_accepts(mode, answer, serve, keys, known, at_terminal, tcp_echo):
    """Everything that is needed to judge is in the question; accepted, it goes on as if the key had always been known."""
    known.unlink()
    _, port = serve(*mode.serve)
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(QUESTION)
    asked = terminal.output
    assert re.search(re.escape(fingerprint(keys.server.public)) + r"(?![A-Za-z0-9+/=])", asked), asked
    assert keys.server.public in asked and "127.0.0.1:%d" % port in asked and READY not in asked and not known.exists()
    terminal.type((answer if answer == "yes" else fingerprint(keys.server.public)) + "\n")
    terminal.wait_for(READY)
    for _ in range(3):
        ask(tcp_port(terminal))
    assert known.read_text() == line_of(keys, port) and stat.S_IMODE(os.stat(known).st_mode) == 0o600
    assert terminal.stop() == 0
    assert len(re.findall(QUESTION, terminal.output)) == 1 and AGAIN not in terminal.output
    # stdout belongs to those who pipe it somewhere.
    assert terminal.stdout == b""
    # Now it is known: nothing is asked or said.
    terminal = at_terminal(port, flags=mode.connect)
    assert terminal.wait() == 0 and READY in terminal.output
    assert not re.search(QUESTION, terminal.output) and warnings(terminal.output) == [] and terminal.stdout == b""
    assert known.read_text() == line_of(keys, port)


def test_what_declines(serve, known, stranger, at_terminal):
    """Besides an answer: the key of a real terminal, in the middle of one; and a service manager, for which it must not hang there."""
    before = "# mine\n%s elsewhere:1" % stranger.public
    known.write_text(before)
    server, port = serve("-v")
    declined, interrupted, ended = terminals = [at_terminal(port, "0:127.0.0.1:9") for _ in range(3)]
    for terminal in terminals:
        terminal.wait_for(QUESTION)
    for terminal, last in ((declined, "no\n"), (interrupted, "ye\x03")):
        terminal.type("maybe\n")
        terminal.wait_for(re.escape(AGAIN))
        terminal.type(last)
    ended.process.send_signal(signal.SIGTERM)
    assert (declined.wait(), interrupted.wait()) == (AUTHENTICATION_FAILED, 130)
    ended.wait()
    # Whoever declines, or was not at the keyboard, is told what there is to do.
    assert UNKNOWN in declined.output and str(known) in declined.output
    assert known.read_text() == before and "Accepted" not in server.output
    assert not any(terminal.stdout or READY in terminal.output for terminal in terminals)


def test_while_it_asks_nothing_is_open_and_connections_wait(serve, keys, known, at_terminal, target, tcp_echo):
    """A server that is not known yet keeps no connection, however long somebody reads; connections to the tunnels wait for the one answer."""
    made = []
    for mode in (RATROD2, LEGACY):
        door = Door(target, serve("-v", *mode.serve)[1])
        # An answer takes longer than any handshake may.
        terminal = at_terminal(door.port, *["0:%d" % tcp_echo.port] * 2, flags=(*mode.connect, "--handshake-timeout", "1"))
        terminal.wait_for(QUESTION)
        made.append((terminal, door))
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(dial(tcp_port(terminal, n))) for terminal, _ in made for n in (1, 2) for _ in range(5)]
        for connection in waiting:
            connection.sendall(b"waiting")
        for _, door in made:
            eventually(lambda door=door: not door.passing, "the connection was closed")
        # There is no event for nothing to happen: longer than the deadline of a handshake.
        time.sleep(1.2)
        for terminal, door in made:
            assert len(door.tries) == 1 and not door.passing and terminal.process.poll() is None
            terminal.type("perhaps\n")
            terminal.wait_for(re.escape(AGAIN))
            assert len(door.tries) == 1
            terminal.type("yes\n")
            terminal.wait_for(READY)
            assert len(door.tries) > 1
        for connection in waiting:
            assert receive_exactly(connection, 7) == b"waiting"
    for terminal, _ in made:
        assert terminal.stop() == 0 and terminal.stdout == b"" and len(re.findall(QUESTION, terminal.output)) == 1
    assert sorted(known.read_text().splitlines(True)) == sorted(line_of(keys, door.port) for _, door in made)


@pytest.mark.parametrize("mode", [RATROD2, LEGACY], ids=["", "legacy"])
def test_a_later_link_does_not_ask(mode, serve, known, stranger, at_terminal, impostor, tcp_echo):
    """Hours later nobody sits there: another key in the server's place is an error, not a question."""
    server, port = serve(*mode.serve)
    terminal = at_terminal(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    terminal.wait_for(QUESTION)
    terminal.type("yes\n")
    terminal.wait_for(READY)
    for _ in range(3):
        ask(tcp_port(terminal))
    assert server.stop() == 0
    impostor(terminal, mode, port, stranger.public)
    assert len(re.findall(QUESTION, terminal.output)) == 1


def test_a_key_that_cannot_be_written_is_not_accepted(serve, known, at_terminal):
    make_folder(known)
    terminal = at_terminal(serve()[1])
    terminal.wait_for(QUESTION)
    terminal.type("yes\n")
    assert terminal.wait() == AUTHENTICATION_FAILED
    terminal.wait_for("cannot write to `%s`.*add this line" % re.escape(str(known)))


def test_when_nobody_is_asked(serve, keys, known, stranger, at_terminal, tcp_echo):
    _, port = serve()
    line, echo = line_of(keys, port), "0:%d" % tcp_echo.port
    changed = "# mine\n%s 127.0.0.1:%d" % (stranger.public, port)
    for before, flags, tunnels, streams, code, shown, after in (
        # A changed key is no question.
        (changed, (), (echo,), {}, AUTHENTICATION_FAILED, r"%s.*line 2\b" % CHANGED, changed),
        (changed, ("--accept-new",), (echo,), {}, AUTHENTICATION_FAILED, r"%s.*line 2\b" % CHANGED, changed),
        # Flags that answer beforehand.
        ("", ("--accept-new",), (), {}, 0, "WARN", line),
        ("", ("-a",), (), {}, 0, "WARN", ""),
        # Half a terminal is none: a question that nobody sees, or that nobody can answer, is not asked.
        ("", (), (echo,), {"stdin": subprocess.DEVNULL}, AUTHENTICATION_FAILED, UNKNOWN, ""),
        ("", (), (echo,), {"stderr": subprocess.PIPE}, AUTHENTICATION_FAILED, UNKNOWN, ""),
        # The stdin of stdio: is the stream's, an answer would have to be taken from the data.
        ("", (), ("stdio:127.0.0.1:%d" % tcp_echo.port,), {}, AUTHENTICATION_FAILED, UNKNOWN, ""),
        # One terminal: two processes that read it would each take half of an answer. --accept-new is for them.
        ("", ("--workers", "2"), (echo,), {}, AUTHENTICATION_FAILED, UNKNOWN, "")):
        known.write_text(before)
        terminal = at_terminal(port, *tunnels, flags=flags, **streams)
        said = terminal.process.stderr.read().decode() if "stderr" in streams else ""
        row = flags, tunnels, streams
        assert terminal.wait() == code, (row, terminal.output)
        said += terminal.output
        assert not re.search(QUESTION, said) and re.search(shown, said) and (shown != UNKNOWN or line.strip() in said), (row, said)
        assert known.read_text() == after and terminal.stdout == b"", row
    terminal = at_terminal(port, echo, flags=("--workers", "2", "--accept-new"))
    terminal.wait_for(READY)
    for _ in range(4):
        ask(tcp_port(terminal))
    assert set(known.read_text().splitlines(True)) == {line}
