"""What an endpoint says of itself: the table of SIGUSR1, and the status line of a client at a terminal."""

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from unittest import mock

import pytest

import ratrod
from support.programs import PYTHON, RATROD2, READY, ROOT, tcp_port, udp_originator
from support.sockets import ask, ask_udp, dial, eventually, free_port, ping, port_of, receive_exactly
from support.targets import echo

pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture
def table():
    """table(program) -> the lines of its next status table, without time and level; another signal's end says that it is whole."""
    if not hasattr(signal, "SIGUSR1"):
        pytest.skip("this system has no SIGUSR1")
    def ask_for(program):
        before = len(program.lines)
        def lines():
            return program.lines[before:]
        program.process.send_signal(signal.SIGUSR1)
        eventually(lambda: any(" INFO 📊 " in line for line in lines()), lines)  # of two signals at once the one of the lower number is first
        program.process.send_signal(signal.SIGHUP)
        eventually(lambda: any("Read again" in line for line in lines()), lines)
        return [re.sub("^.*Z  INFO 📊 ", "", line) for line in lines() if " INFO 📊 " in line]
    return ask_for


def test_the_table(forward, keys, target, udp_echo, table, stack):
    """Of a busy pair; of one that has more streams than a table shows; and of a client whose server is away."""
    keys.server.write("authorized_keys", "%s alice\n" % keys.client.public)
    echoing = target(echo)
    server, client = forward(RATROD2, "0:%d" % echoing.port, "0:%d" % udp_echo.port, "R:0:127.0.0.1:%d" % echoing.port, "0:socks",
                             serve_flags=("--allow-listen",))
    client.wait_for("` listens on")
    connection, originator = stack.enter_context(dial(tcp_port(client))), stack.enter_context(udp_originator(client, 2))
    ping(connection, word=b"x" * 1000)
    ask_udp(originator, b"y" * 10)
    (head, tunnel_1, tunnel_2, _, socks, reverse, key, stream, session) = table(client)
    assert re.match(r"Client of `127.0.0.1:\d+`, connected for [\d.]+ m?s, round trip [\d.]+ m?s; 0 waiting for a link; up [\d.]+ m?s; "
                    r"\d+ links \(\d+ idle, \d+ busy, 0 closing\), 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received; "
                    r"handshakes: \d under way, 0 failed$", head)
    assert re.match(r"tunnel \(forward\) `127.0.0.1:%d` -> `127.0.0.1:\d+`$" % tcp_port(client), tunnel_1) and "tunnel (forward)" in tunnel_2
    assert "tunnel (socks)" in socks and re.search(r"reverse tunnel on `localhost:\d+`: \d links wait, 0 are busy", reverse)
    assert re.match(r"key `%s`: \d+ links .*, 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received$" % keys.server.public, key)
    origin = "127.0.0.1:%d" % port_of(connection)
    assert re.match(r"\[[0-9a-f]{6}\] `%s` -> `127.0.0.1:\d+`: 1000 bytes sent to the link, 1000 received, for [\d.]+ m?s$" % origin, stream)
    assert re.match(r"\[[0-9a-f]{6}\] `127.0.0.1:\d+` -> `udp 127.0.0.1:%d`: 10 bytes sent to the link, 10 received" % udp_echo.port, session)
    (head, reverse, key, stream, session) = table(server)
    assert re.match(r"Server on `127.0.0.1:\d+`; up .*; \d+ links .*, 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received; ", head)
    assert re.search(r"reverse tunnel on `localhost:\d+` for the client with key `%s`" % keys.client.public, reverse)
    assert key.startswith("key `%s` (alice): " % keys.client.public)
    assert "1000 bytes sent" in stream and "10 bytes sent" in session
    for _ in range(59):
        ping(stack.enter_context(dial(tcp_port(client))), word=b"x")
    for program in (client, server):
        lines = table(program)
        assert len([line for line in lines if line.startswith("[")]) == 50 + 1  # the session is the last line
        assert lines[-2] == "... and 10 more" and "60 streams" in lines[0]
    server.kill()
    away = r"Client of `127.0.0.1:\d+`, away for [\d.]+ m?s \(.*\); \d+ waiting"
    eventually(lambda: re.search(away, table(client)[0]), lambda: client.output)


# A client that draws its line five times a second in place of once.
QUICK = """
import sys
sys.path.insert(0, %r)
import ratrod
later = ratrod.Deadline.set
ratrod.Deadline.set = lambda self, delay, call: later(self, 0.2 if delay == 1.0 else delay, call)
sys.exit(ratrod.main())
""" % str(ROOT)
EMPTY = r"^ratrod: 0 B/s up, 0 B/s down, 0 streams, 0 UDP sessions"


class Terminal:
    """The client in a window of a real terminal emulator."""

    def __init__(self, run, name, raw, server, server_port):
        self._run, self._name, self.raw, self.server, self.server_port = run, name, raw, server, server_port

    def run(self, command, *words):
        return self._run(command, "-t", self._name, *words)

    def send(self, key):
        self.run("send-keys", key)

    def type(self, text):
        self.run("send-keys", "-l", text)
        self.send("Enter")

    def screen(self):
        return self.run("capture-pane", "-p").strip("\n")

    def lines(self):
        return self.screen().splitlines()

    def shows(self, pattern):
        eventually(lambda: re.search(pattern, self.screen(), re.M), self.screen)


@pytest.fixture
def at_terminal(tmux, tmp_path, keys, serve):
    """at_terminal(words of connect..., width, env, shell) -> Terminal in which it runs, and shows its exit code; they share a server."""
    servers, terminals = [], []
    (tmp_path / "quick_ratrod.py").write_text(QUICK)
    def launch(*words, width=240, env="", shell=False):
        servers[:] = servers or [serve()]
        server, port = servers[0]
        terminal = Terminal(tmux, "=t%d:" % len(terminals), tmp_path / ("raw%d" % len(terminals)), server, port)
        # Its id: a terminal that goes away does not end one that is stopped.
        remember = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(tmp_path / ("pid%d" % len(terminals)))]
        program = [PYTHON, str(tmp_path / "quick_ratrod.py"), "-k", str(keys.client.path)]
        command = " ".join(map(shlex.quote, [*remember, *program, "connect", "127.0.0.1:%d" % port, *words]))
        # `read`: not before all that it shows is recorded.
        first = "PS1='$ ' exec bash --norc -i" if shell else "read line; %s %s; echo exit code $?; read line" % (env, command)
        tmux("new-session", "-d", "-s", "t%d" % len(terminals), "-x", str(width), "-y", "50", first)
        terminal.run("pipe-pane", "cat > %s" % shlex.quote(str(terminal.raw)))
        terminals.append(terminal)
        terminal.type(command if shell else "")
        return terminal
    yield launch
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    for sign in (signal.SIGCONT, signal.SIGTERM):
        for pid in filter(lives, pids):
            os.kill(pid, sign)
    eventually(lambda: not any(map(lives, pids)), "an end of %s" % pids)


def lives(pid):
    """Whether it is still a ratrod."""
    return "quick_ratrod.py" in subprocess.run(["ps", "-o", "args=", "-p", str(pid)], stdout=subprocess.PIPE).stdout.decode()


def test_a_window_that_is_closed(at_terminal, keys, tmp_path, tcp_echo, port):
    """It ends what was started in it, as with ssh, also while it asks; `kill -HUP` from elsewhere does not. Where the shell alone is killed the
    hang-up comes before the terminal goes, or the terminal stays."""
    tunnel, workers = "0:127.0.0.1:9", ("--workers", "2")
    terminals = [at_terminal("%d:%d" % (port, tcp_echo.port)), at_terminal(*workers, tunnel), at_terminal(tunnel, shell=True),
                 at_terminal(*workers, tunnel, shell=True)]
    for terminal in terminals:
        terminal.shows(READY)
    terminals[0].shows(EMPTY)
    pids = [int((tmp_path / ("pid%d" % n)).read_text()) for n in range(4)]
    for pid, terminal in zip(pids[:2], terminals):
        os.kill(pid, signal.SIGHUP)
        terminal.shows("Read again")
    ask(port)
    keys.client.write("known_hosts", "")
    terminals.append(at_terminal(tunnel))
    terminals[-1].shows(r"\(yes/no/\[fingerprint\]\)\?")
    pids.append(int((tmp_path / "pid4").read_text()))
    for terminal in terminals:
        if terminal in terminals[2:4]:
            os.kill(int(terminal.run("display-message", "-p", "#{pane_pid}")), signal.SIGKILL)
        else:
            terminal.run("kill-session")
    eventually(lambda: not any(map(lives, pids)), lambda: "they end: %s" % list(map(lives, pids)))
    assert (keys.client.path / "known_hosts").read_text() == ""


@pytest.fixture
def port():
    """A port that a tunnel may listen on: on the screen of a terminal it may be cut."""
    return free_port()


def test_it_shows_what_goes_on_and_leaves_nothing(at_terminal, target, port, udp_echo):
    terminal = at_terminal("%d:%d" % (port, target(echo).port), "0:%d" % udp_echo.port)
    terminal.shows(EMPTY)
    assert terminal.lines()[-1].startswith("ratrod: ") and terminal.screen().count("ratrod: ") == 1
    with dial(port) as connection:
        terminal.shows("^ratrod: .* 1 stream, ")
        seen = set()
        def both_ways():
            # Until it is seen: what passed is shown only once.
            connection.sendall(b"x" * 100_000)
            receive_exactly(connection, 100_000)
            seen.update(re.findall(r" [1-9][\d.]* [kM]B/s (up|down)", terminal.lines()[-1]))
            return seen == {"up", "down"}
        eventually(both_ways, terminal.screen)
        terminal.shows(r"^ratrod: 0 B/s up, 0 B/s down, 1 stream, 0 UDP sessions")
        # Nothing is drawn while nothing changes: a terminal may be looked at through a slow line, or recorded. Once more when the rates have become
        # 0; the round trip is measured only as something is sent, every 20 s.
        sizes = []
        def quiet():
            sizes.append(terminal.raw.stat().st_size)
            return len(sizes) > 50 and sizes[-1] == sizes[-50]
        eventually(quiet, lambda: terminal.raw.read_bytes()[-500:])
    terminal.shows(EMPTY + r", round trip [\d.]+ ms$")
    # A line of the log stands above it, whole, and it is there but once.
    assert terminal.server.stop() == 0
    terminal.shows(r"^ratrod: server away for [\d.]+ s, ")
    assert re.search(r"^\S+Z ERROR ❌ Lost the server `[\d.:]+`: .*; trying again$", terminal.screen(), re.M)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z |ratrod: ", line) for line in terminal.lines()), terminal.screen()
    assert terminal.screen().count("ratrod: ") == 1
    terminal.send("C-c")
    terminal.shows("^exit code 130$")
    assert "ratrod: " not in terminal.screen() and terminal.lines()[-1] == "exit code 130"
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z |exit code", line) for line in terminal.lines()), terminal.screen()


def test_a_narrow_window_and_one_that_changes(at_terminal):
    terminal = at_terminal("0:127.0.0.1:9", width=30)
    def cut_to(width):
        """The line has one row of this window, and there is nothing else of it."""
        def fits():
            found = [line for line in terminal.lines() if "ratrod:" in line or "UDP session" in line or "B/s" in line]
            # Drawn anew, and not only narrow enough: a window that changes in the middle of that leaves some of it.
            is_anew = found and (width - 2 <= len(found[0]) < width or len(found[0]) < width and "UDP sessions" in found[0])
            return is_anew and found == terminal.lines()[-1:] and found[0].startswith("ratrod: 0 B/s up")
        eventually(fits, terminal.screen)
    cut_to(30)
    for width in (120, 40, 17, 100, 25):
        terminal.run("resize-window", "-x", str(width), "-y", "50")
        cut_to(width)
    # No line of the log was taken with it.
    terminal.run("resize-window", "-x", "200", "-y", "50")
    cut_to(200)
    text = terminal.run("capture-pane", "-p", "-J", "-S", "-200")  # what has scrolled out of it, too
    assert READY in text and "[TCP] Listening on" in text and "[UDP] Listening on" in text and "Testing server connection" in text


def test_stopped_and_continued(at_terminal, listener, port):
    """Ctrl-Z, fg and bg in a shell: in the background nothing is drawn into what others do."""
    terminal = at_terminal("%d:%d" % (port, port_of(listener)), shell=True)
    terminal.shows(EMPTY)
    terminal.send("C-z")
    terminal.shows("Stopped")
    terminal.type("clear; echo 'in the' shell")
    terminal.shows("^in the shell$")
    assert "ratrod: " not in terminal.screen()
    terminal.type("clear; bg")
    terminal.shows(r"&$")
    with dial(port) as connection:
        # It works on in the background; what it has to say there are log lines alone.
        with listener.accept()[0] as remote:
            for _ in range(3):  # of what it would draw
                connection.sendall(b"x")
                assert receive_exactly(remote, 1) == b"x"
        listener.close()
        with contextlib.suppress(ConnectionError), dial(port) as refused:
            refused.recv(1)
        terminal.shows("Connection refused")
        assert "ratrod: " not in terminal.screen()
        terminal.type("clear; fg")
        terminal.shows(r"^ratrod: [\d.]+ k?M?B/s up, [\d.]+ k?M?B/s down, \d+ streams?, \d+ UDP sessions?(, round trip [\d.]+ ms)?")
        terminal.send("C-c")
        eventually(lambda: "ratrod: " not in terminal.screen(), terminal.screen)


def test_where_it_is_not_wanted(at_terminal, monkeypatch):
    """Nothing of it is there: no line, and no code that erases one. The other terminal, which has it, says that seconds have passed."""
    terminals = [at_terminal(*words, "0:127.0.0.1:9", env="NO_COLOR=1") for words in (["--no-status"], [])]
    for terminal in terminals:
        terminal.shows(READY)
    terminals[1].shows(EMPTY)
    assert terminals[1].server.stop() == 0
    for terminal in terminals:
        terminal.shows("Lost the server")
    terminals[1].shows("^ratrod: server away for ")
    for terminal in terminals:
        terminal.send("C-c")
        terminal.shows("exit code 130")
        assert ("ratrod: " in terminal.raw.read_text(), "\x1b[J" in terminal.raw.read_text()) == (terminal is terminals[1],) * 2
    # Who else has none, in this process, with a terminal for its standard error.
    ends = pty.openpty()
    with open(ends[0]), open(ends[1], "w") as standard_error, mock.patch.object(sys, "stderr", standard_error):
        for words, environment in (([], {}), (["-v"], {}), (["--log-format", "json"], {}), ([], {"TERM": "dumb"}), ([], {"TERM": ""}),
                                   (["--workers", "2"], {}), ([], {"RATROD_NO_STATUS": "1"})):
            monkeypatch.setenv("TERM", environment.get("TERM", "xterm"))
            options = ratrod.parse_command_line(["connect", *words, "far:1", "0:near:2"], environment)
            assert ratrod.shows_status(options) is not bool(words or environment), (words, environment)


def test_the_question_for_a_key_stays_alone(at_terminal, keys, port):
    keys.client.write("known_hosts", "")
    terminal = at_terminal("%d:127.0.0.1:9" % port)
    terminal.shows(r"\(yes/no/\[fingerprint\]\)\?")
    terminal.type("what?")
    terminal.shows("Please type")
    assert "ratrod: " not in terminal.screen() and b"\x1b[J" not in terminal.raw.read_bytes()
    terminal.type("yes")
    terminal.shows(EMPTY)
