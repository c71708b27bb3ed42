"""What an endpoint says of itself: the table of SIGUSR1, and the status line of a client at a terminal."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess

import pytest

from support.programs import PYTHON, RATROD2, READY, ROOT, tcp_port, udp_originator
from support.sockets import ask, dial, eventually, receive_exactly
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


def test_the_table_of_a_busy_pair(forward, keys, target, udp_echo, table):
    keys.server.write("authorized_keys", "%s alice\n" % keys.client.public)
    server, client = forward(RATROD2, "0:%d" % target(echo).port, "0:%d" % udp_echo.port)
    with dial(tcp_port(client)) as connection, udp_originator(client, 2) as originator:
        connection.sendall(b"x" * 1000)
        receive_exactly(connection, 1000)
        originator.send(b"y" * 10)
        originator.recv(100)
        (head, tunnel_1, tunnel_2, key, stream, session) = table(client)
        assert re.match(r"Client of `127.0.0.1:\d+`, connected for [\d.]+ m?s, round trip [\d.]+ m?s; 0 waiting for a link; up [\d.]+ m?s; "
                        r"\d links \(\d+ idle, 2 busy, 0 closing\), 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received; "
                        r"handshakes: \d under way, 0 failed$", head)
        assert re.match(r"tunnel \(forward\) `127.0.0.1:%d` -> `127.0.0.1:\d+`$" % tcp_port(client), tunnel_1) and "tunnel (forward)" in tunnel_2
        assert re.match(r"key `%s`: \d links .*, 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received$" % keys.server.public, key)
        origin = "127.0.0.1:%d" % connection.getsockname()[1]
        assert re.match(r"\[[0-9a-f]{6}\] `%s` -> `127.0.0.1:\d+`: 1000 bytes sent to the link, 1000 received, for [\d.]+ m?s$" % origin, stream)
        assert re.match(r"\[[0-9a-f]{6}\] `127.0.0.1:\d+` -> `udp 127.0.0.1:%d`: 10 bytes sent to the link, 10 received" % udp_echo.port, session)
        (head, key, stream, session) = table(server)
        assert re.match(r"Server on `127.0.0.1:\d+`; up .*; \d links .*, 1 stream, 1 UDP session, 1010 bytes sent to links, 1010 received; ", head)
        assert key.startswith("key `%s` (alice): " % keys.client.public)
        assert "1000 bytes sent" in stream and "10 bytes sent" in session


def test_a_table_stays_short(forward, listener, table, stack):
    server, client = forward(RATROD2, "0:%d" % listener.getsockname()[1])
    for _ in range(60):
        stack.enter_context(dial(tcp_port(client)))
        stack.enter_context(listener.accept()[0])
    for program in (client, server):
        lines = table(program)
        assert len([line for line in lines if line.startswith("[")]) == 50 and lines[-1] == "... and 10 more" and "60 streams" in lines[0]


def test_a_table_while_the_server_is_away(serve, ratrod, keys, tcp_echo, table):
    server, port = serve("--allow-listen")
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:%d" % tcp_echo.port, "R:0:127.0.0.1:%d" % tcp_echo.port, "0:socks")
    client.wait_for("` listens on")
    (head, *tunnels) = [line for line in table(client) if "tunnel" in line or "Client" in line]
    assert len(tunnels) == 4 and "tunnel (socks)" in tunnels[2]
    assert re.search(r"reverse tunnel on `localhost:\d+`: \d links wait, 0 are busy", tunnels[3])
    assert re.search(r"reverse tunnel on `localhost:\d+` for the client with key `%s`" % keys.client.public, "\n".join(table(server)))
    server.kill()
    away = r"Client of `127.0.0.1:%d`, away for [\d.]+ m?s \(.*\); \d+ waiting" % port
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
LINE = r"^ratrod: [\d.]+ k?M?B/s up, [\d.]+ k?M?B/s down, \d+ streams?, \d+ UDP sessions?(, round trip [\d.]+ ms)?"
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
    """at_terminal(words of connect..., width, env, before) -> Terminal in which it runs, and shows its exit code; they share a server."""
    servers, terminals = [], []
    (tmp_path / "quick_ratrod.py").write_text(QUICK)
    def launch(*words, width=240, env="", before=(), shell=False):
        servers[:] = servers or [serve()]
        server, port = servers[0]
        terminal = Terminal(tmux, "=t%d:" % len(terminals), tmp_path / ("raw%d" % len(terminals)), server, port)
        # Its id: a terminal that goes away does not end one that is stopped.
        remember = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(tmp_path / ("pid%d" % len(terminals)))]
        program = [PYTHON, str(tmp_path / "quick_ratrod.py"), *before, "-k", str(keys.client.path)]
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
    """It ends what was started in it, as with ssh, also while it asks; `kill -HUP` from elsewhere does not."""
    words = "%d:%d" % (port, tcp_echo.port)
    terminals = [at_terminal(words), at_terminal("--workers", "2", words.replace(str(port), "0"))]
    terminals[0].shows(EMPTY)
    terminals[1].shows("Listening")
    pids = [int((tmp_path / ("pid%d" % n)).read_text()) for n in range(2)]
    for pid, terminal in zip(pids, terminals):
        os.kill(pid, signal.SIGHUP)
        terminal.shows("Read again")
    ask(port)
    keys.client.write("known_hosts", "")
    terminals.append(at_terminal("0:127.0.0.1:9"))
    terminals[2].shows(r"\(yes/no/\[fingerprint\]\)\?")
    pids.append(int((tmp_path / "pid2").read_text()))
    for terminal in terminals:
        terminal.run("kill-session")
    eventually(lambda: not any(map(lives, pids)), "they end")
    assert (keys.client.path / "known_hosts").read_text() == ""


@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_a_shell_that_is_killed(at_terminal, tmp_path, flags):
    """The hang-up comes before the terminal goes, or where the terminal stays without its shell."""
    terminal = at_terminal(*flags, "0:127.0.0.1:9", shell=True)
    terminal.shows("Test connection successful")
    pid = int((tmp_path / "pid0").read_text())
    os.kill(int(terminal.run("display-message", "-p", "#{pane_pid}")), signal.SIGKILL)
    eventually(lambda: not lives(pid), "it ends")


@pytest.fixture
def port():
    """A port that a tunnel may listen on: on the screen of a terminal it may be cut."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]


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


def test_nothing_is_drawn_while_nothing_changes(at_terminal, target, port):
    """A terminal that is looked at through a slow line, or recorded."""
    terminal = at_terminal("%d:%d" % (port, target(echo).port))
    terminal.shows(EMPTY)
    with dial(port):
        terminal.shows("^ratrod: .* 1 stream, ")
        # Once more when the rates have become 0; the round trip is measured only as something is sent, every 20 s.
        sizes = []
        def quiet():
            sizes.append(terminal.raw.stat().st_size)
            return len(sizes) > 50 and sizes[-1] == sizes[-50]
        eventually(quiet, lambda: terminal.raw.read_bytes()[-500:])


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
    terminal = at_terminal("%d:%d" % (port, listener.getsockname()[1]), shell=True)
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
        terminal.shows(LINE)
        terminal.send("C-c")
        eventually(lambda: "ratrod: " not in terminal.screen(), terminal.screen)


def test_where_it_is_not_wanted(at_terminal):
    """Nothing of it is there: no line, and no code that erases one. The last one, which has it, says that seconds have passed."""
    terminals = [at_terminal(*words, "0:127.0.0.1:9", env="NO_COLOR=1 " + env, before=before) for words, env, before in (
        (["--no-status"], "", []), ([], "", ["-v"]), (["--log-format", "json"], "", []), ([], "TERM=dumb", []), ([], "TERM=", []),
        (["--workers", "2"], "", []), ([], "RATROD_NO_STATUS=1", []), ([], "", []))]
    for terminal in terminals:
        terminal.shows(READY)
    terminals[-1].shows(EMPTY)
    assert terminals[-1].server.stop() == 0
    for terminal in terminals:
        terminal.shows("Lost the server")
    terminals[-1].shows("^ratrod: server away for ")
    for terminal in terminals:
        terminal.send("C-c")
        terminal.shows("exit code 130")
        assert ("ratrod: " in terminal.raw.read_text(), "\x1b[J" in terminal.raw.read_text()) == (terminal is terminals[-1],) * 2


def test_the_question_for_a_key_stays_alone(at_terminal, keys, port):
    keys.client.write("known_hosts", "")
    terminal = at_terminal("%d:127.0.0.1:9" % port)
    terminal.shows(r"\(yes/no/\[fingerprint\]\)\?")
    terminal.type("what?")
    terminal.shows("Please type")
    assert "ratrod: " not in terminal.screen() and b"\x1b[J" not in terminal.raw.read_bytes()
    terminal.type("yes")
    terminal.shows(EMPTY)
