"""`connect ssh://`: a far side with sshd and Python and nothing else, against a real sshd on a free port."""

import contextlib
import glob
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zlib

import pytest

import ratrod as ratrod_module
from support import sockets
from support.pressure import scaled
from support.programs import PATIENCE, READY, ROOT, SCRIPT, need, tcp_port, udp_originator
from support.rows import row
from support.sockets import ask, ask_over, assert_refused, check_half_close, dial, eventually, ping, port_of, receive_all, receive_exactly, reset
from support.sshd import processes
from support.targets import UnixTarget, echo

pytestmark = pytest.mark.usefixtures("no_traceback")
# No site-packages: a machine without PyNaCl and docopt, at this end too. Imported, for a script is compiled at each start, which costs 0.3 s; and
# not compiled(), whose source the far side could not have.
BARE = sys.executable, "-S", "-c", "import sys; sys.path.insert(0, %r); import ratrod; sys.exit(ratrod.main())" % str(ROOT)


class Ground:
    """Where a client's temporary files go: short enough for sockets, and part of the command line of every ssh that it starts."""

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="rt", dir="/tmp")
        self.environment = {**os.environ, "TMPDIR": self.path, "HOME": self.path}

    def folders(self):
        return os.listdir(self.path)

    def ssh(self):
        return [line for _, line in processes().values() if self.path in line and not line.startswith(sys.executable)]


@pytest.fixture
def ground():
    made = Ground()
    yield made
    # Masters of clients that were killed.
    for pid, (_, line) in processes().items():
        if made.path in line:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.path, ignore_errors=True)  # one of them may make a file yet


@pytest.fixture
def over_ssh(start, ground):
    """over_ssh(sshd, words...) -> Program: a client that has neither keys nor PyNaCl, not yet awaited."""
    def launch(far, *words, server="ssh://far", command=None, program=BARE, **options):
        return start(*program, "connect", "--ssh-command", command or far.command, server, *words, **{"env": ground.environment, **options})
    return launch


@pytest.fixture
def bin_with(tmp_path):
    """bin_with(name=script...) -> a folder for PATH, with these and what every shell needs."""
    def make(**scripts):
        folder = tmp_path / ("bin%d" % len(list(tmp_path.glob("bin*"))))
        folder.mkdir()
        for name in ("sh", "bash", "cat", "echo", "true"):
            (folder / name).symlink_to(need(name))
        for name, script in scripts.items():
            (folder / name).write_text("#!/bin/sh\n" + script)
            (folder / name).chmod(0o755)
        return folder
    return make


def test_tcp(sshd, over_ssh, bin_with, tcp_echo, listener, ground):
    """The far side's python3 is 3.8, where there is one, with the standard library alone, and not on the PATH; this side has no site-packages, and
    nobody a key."""
    far = sshd(programs=bin_with())
    away = far.path / "it's $HOME" / "python 3"
    away.parent.mkdir()
    found = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.8.*/bin/python3"))) or glob.glob("/usr/bin/python3.8") or [sys.executable]
    away.write_text("#!/bin/sh\nexec %s \"$@\"" % found[0])
    away.chmod(0o755)
    client = over_ssh(far, "--remote-python", away, "0:127.0.0.1:%d" % port_of(listener), "0:127.0.0.1:%d" % tcp_echo.port,
                      program=(sys.executable, "-S", SCRIPT[1]))
    client.wait_for(READY)
    for _ in range(3):
        ask(tcp_port(client, 2))
    for ends in (check_half_close, lambda near, other: check_half_close(other, near),
                 lambda near, other: sockets.check_bulk_each_way((near, other), 8)):
        with dial(tcp_port(client)) as near, sockets.accept(listener) as other:
            ends(near, other)
    for which in (0, 1):  # a reset is a reset, from either side
        pair = [dial(tcp_port(client)), sockets.accept(listener)]
        sockets.talk(*pair)
        reset(pair.pop(which))
        with pair[0], pytest.raises(ConnectionResetError):
            receive_all(pair[0])
    assert not os.path.exists(os.path.join(ground.path, ".ratrod"))


TALKS = "ForceCommand printf 'Welcome!\\nratrod 00\\n\\nratrod %05000d' 7; echo over there >&2; exec sh -c \"$SSH_ORIGINAL_COMMAND\""


def test_other_tunnels(sshd, over_ssh, tcp_echo, udp_echo, ground, closed, stack):
    """Of every kind, and to remotes that refuse; behind a login shell that talks."""
    target, local = stack.enter_context(contextlib.closing(UnixTarget(echo, ground.path + "/target"))), ground.path + "/local"
    client = over_ssh(sshd(TALKS), "0:127.0.0.1:%d" % closed, "0:nobody.invalid:80", "0:127.0.0.1:%d" % udp_echo.port, "0:socks",
                      "0:unix:" + target.path, "unix:%s:localhost:%d" % (local, tcp_echo.port)).ready()
    with udp_originator(client, 3) as originator:
        for datagram in (b"a datagram", b"", b"x" * 60000):
            sockets.ask_udp(originator, datagram)
    ask(int(client.wait_for(r"\[TCP\] Listening on `.*?:(\d+)`.*unix:").group(1)))
    ask_over(sockets.dial_unix(local))
    # `localhost` is looked up at the far side.
    with dial(int(client.wait_for(r"\[SOCKS\] Listening on `.*?:(\d+)`").group(1))) as connection:
        connection.sendall(b"\5\1\0\5\1\0\3\x09localhost" + tcp_echo.port.to_bytes(2, "big"))
        assert receive_exactly(connection, 12)[:4] == b"\5\0\5\0"
        ask_over(connection)
    for _ in range(3):  # each costs a link
        assert_refused(tcp_port(client))
    client.wait_for("cannot connect to the remote `127.0.0.1:%d`: Connection refused" % closed)
    assert_refused(tcp_port(client, 2))
    client.wait_for("cannot connect to the remote `nobody.invalid:80`: cannot resolve")
    def zombies():
        children = subprocess.run(["ps", "-o", "stat=,args=", "--ppid", str(client.process.pid)], stdout=subprocess.PIPE, text=True)
        return [line for line in children.stdout.splitlines() if line.startswith("Z")]
    eventually(lambda: not zombies(), zombies)


def test_stdio(sshd, ground, closed, tcp_echo):
    """Of two servers the first is not there. Nothing is left behind."""
    far = sshd()
    servers = "ssh://root@127.0.0.1:%d,ssh://root@127.0.0.1:%d" % (closed, far.port)
    result = subprocess.run([*BARE, "connect", "--ssh-command", far.command, servers, "stdio:127.0.0.1:%d" % tcp_echo.port],
                            input=b"question", stdout=subprocess.PIPE, env=ground.environment, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (0, b"question")
    assert not ground.folders() and not ground.ssh()


def test_more_connections_than_links(sshd, over_ssh, target, ground):
    """There are nine links, of sixteen by default; whoever comes then waits for one of them, and gets it."""
    assert ratrod_module.DEFAULT_LIMITS.ssh_links == 16
    far = sshd()
    held = target(echo)
    client = over_ssh(far, "0:127.0.0.1:%d" % held.port, program=scaled(ssh_links=9)).ready()
    connections = [dial(tcp_port(client)) for _ in range(12)]
    for n, connection in enumerate(connections):
        connection.sendall(b"%03d" % n)
    eventually(lambda: held.accepted == 9, lambda: "9 of 12 connected, %d are" % held.accepted)
    # Not all sessions on one connection: sshd takes ten.
    assert len([line for line in ground.ssh() if "ControlMaster=yes" in line]) == 2
    for n, connection in enumerate(connections):  # in the order they came
        assert receive_exactly(connection, 3) == b"%03d" % n
        connection.close()
        eventually(lambda n=n: held.accepted == min(12, 10 + n), lambda: "another one connected, %d are" % held.accepted)
    assert len(far.far_processes()) < 50


def test_two_clients_at_once(sshd, over_ssh, tcp_echo, ground):
    """The one ends, the other is killed."""
    far = sshd()
    clients = [over_ssh(far, "0:127.0.0.1:%d" % tcp_echo.port, command=far.command + " -o ControlPersist=1") for _ in range(2)]
    for client in clients:
        client.wait_for(READY)
    with dial(tcp_port(clients[1])) as connection:
        ping(connection, word=b"one")
        assert clients[0].stop() == 0
        ping(connection, word=b"two")
        folder, = ground.folders()
        assert stat.S_IMODE(os.stat(os.path.join(ground.path, folder)).st_mode) == 0o700
        assert ground.ssh() and far.far_processes()
        clients[1].kill()
    eventually(lambda: not ground.ssh(), lambda: ground.ssh())
    eventually(lambda: not far.far_processes(), "the far side has ended")


RECORD = """#!/bin/sh
# In place of ssh: its connection is there at once, and of a link it keeps the command line.
for last; do
    case "$last" in *ControlPath=*) path=${last#*ControlPath=};; *ControlMaster=yes) master=1;; -O) exit 0;; esac
done
if [ "$master" ]; then : > "$path"; else printf %%s "$last" > %s; exit 1; fi
"""


def test_login_shells(start, ground, tmp_path):
    """The command line is taken apart by whatever shell the user has there: it must mean the same in each."""
    ssh, recorded = tmp_path / "ssh", tmp_path / "recorded"
    ssh.write_text(RECORD % recorded)
    ssh.chmod(0o755)
    (tmp_path / "it's $HOME").symlink_to(sys.executable)
    words = "connect", "--ssh-command", ssh, "--remote-python", "~/it's $HOME", "ssh://far", "0:127.0.0.1:1"
    fails(start(*BARE, *words, env=ground.environment), "ssh to `ssh://far`")
    line, size = recorded.read_text().rsplit(" ", 1)
    assert int(size) > 10000
    # It takes so many bytes of its standard input for a program, compressed, and runs it.
    program = zlib.compress(b"import sys; print(__name__, sys.stdin.read(), flush=True)")
    for shell in "sh dash bash zsh csh tcsh fish".split():
        with row(shell):
            done = subprocess.run([need(shell), "-c", "%s %d" % (line, len(program))], input=program + b"and the rest", stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, env={**os.environ, "HOME": str(tmp_path)}, timeout=PATIENCE)
            assert (done.returncode, done.stdout) == (0, b"ratrod and the rest\n")


def test_installed_and_as_one_file(sshd, over_ssh, tmp_path):
    far = sshd()
    shutil.copy(SCRIPT[1], tmp_path / "ratrod.py")
    installed = sys.executable, "-c", "import sys; sys.path.insert(0, %r); import ratrod; sys.exit(ratrod.main())" % str(tmp_path)
    subprocess.run([sys.executable, "setup.py", "-q", "pyz", "-o", str(tmp_path / "ratrod.pyz")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for program in (installed, (sys.executable, "-S", str(tmp_path / "ratrod.pyz"))):
        over_ssh(far, "0:127.0.0.1:1", program=program).wait_for(READY)


def test_from_python(sshd, ground, tcp_echo):
    far = sshd()
    program = """
import logging, ratrod, socket, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.ERROR)
command, server, target = sys.argv[1:]
limits = ratrod.Limits(ssh_links=1, ssh_patience=0.5)
with ratrod.tunnel(server, "0:127.0.0.1:" + target, ssh_command=command, limits=limits) as tunnel:
    one, two = (socket.create_connection(tunnel.address) for _ in range(2))
    one.sendall(b"hello")
    print(one.recv(10).decode())
    try:  # there is one link, and it is busy: after half a second it says so
        print(two.recv(1))
    except ConnectionResetError:
        print("reset")
    one.close()
    with socket.create_connection(tunnel.address) as three:
        three.sendall(b"again")
        print(three.recv(10).decode())
for wrong in (dict(legacy=True), dict(proxy="http://x"), dict(key_path="x"), dict(ssh_command="no-such-ssh")):
    try:
        ratrod.tunnel(server, **{"ssh_command": command, **wrong})
    except ratrod.ConfigError as error:
        print("ConfigError")
"""
    result = subprocess.run([sys.executable, "-S", "-c", program, far.command, "ssh://far", str(tcp_echo.port)], cwd=ROOT, env=ground.environment,
                            capture_output=True, text=True, timeout=PATIENCE)
    lines = result.stdout.splitlines()
    said = [line for line in lines if "\N{CROSS MARK}" in line]
    assert len(said) == 1 and said[0].endswith("no link to the server within 0.5 s; all 1 links over ssh are busy")
    assert [line for line in lines if line not in said] == ["hello", "reset", "again"] + ["ConfigError"] * 4, result.stderr
    assert not ground.folders() and not ground.ssh()


def test_a_drain_lets_connections_go_on(sshd, over_ssh, tcp_echo, ground):
    # Ctrl-C reaches the whole group of processes at a terminal: the links' ssh must not take it for theirs.
    far = sshd()
    client = over_ssh(far, "-v", "--drain", "30", "0:127.0.0.1:%d" % tcp_echo.port, start_new_session=True).ready()
    with dial(tcp_port(client)) as connection:
        ping(connection, word=b"a")
        os.killpg(client.process.pid, signal.SIGINT)
        client.wait_for("may go on for 30 s")
        eventually(lambda: len(ground.ssh()) <= 2, lambda: client.output)  # a shared connection and this link's are left
        ask_over(connection)
    assert client.wait() == 130
    assert not ground.ssh() and not ground.folders()
    eventually(lambda: not far.far_processes(), "the far side has ended")


def test_few_sessions_on_a_connection(sshd, over_ssh, tcp_echo, stack):
    tunnel, far = "0:127.0.0.1:%d" % tcp_echo.port, sshd("MaxSessions 2")
    client = over_ssh(far, tunnel).ready()
    connections = [stack.enter_context(dial(tcp_port(client))) for _ in range(5)]
    for connection in connections:
        connection.sendall(b"all at once")
    for connection in connections:
        assert receive_exactly(connection, 11) == b"all at once"
    ask(tcp_port(client))
    # Links wait where no further connection is let in, as with a password, which only the first connection may ask for.
    client = over_ssh(far, "-v", tunnel).ready()
    far.authorized.write_text("")
    first, *others = [stack.enter_context(dial(tcp_port(client))) for _ in range(4)]
    for connection in (first, *others):
        connection.sendall(b"a")
    assert receive_exactly(first, 1) == b"a"
    far.program.wait_for("Connection closed by authenticating user")
    first.close()
    for connection in others:  # one after the other
        assert receive_exactly(connection, 1) == b"a"
        connection.close()
    client.stop()
    assert "trying again" not in client.output, client.output
    client = over_ssh(sshd("MaxSessions 0"), tunnel)
    client.wait_for("Test connection failed: ssh to `ssh://far`: .*refused")
    assert client.wait() == 1


def test_sshd_goes_under_load_and_comes_back(sshd, over_ssh, tcp_echo):
    far = sshd()
    client = over_ssh(far, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    with dial(tcp_port(client)) as connection:
        ping(connection, word=b"a")
        far.kill()
        pytest.raises(ConnectionResetError, receive_all, connection)  # cut is cut, never a clean end
    client.wait_for("Lost the server `ssh://far`: ssh to `ssh://far`: .*refused")
    far.start()
    client.wait_for("Connected to server `ssh://far` again")
    ask(tcp_port(client))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_shared_connection_that_is_gone_or_silent(sshd, over_ssh, tcp_echo, ground, how):
    """The next link has another one, and nothing of either is left."""
    client = over_ssh(sshd(), "-v", "--handshake-timeout", "10", "--connect-timeout", "10", "0:127.0.0.1:%d" % tcp_echo.port).ready()
    first, = [pid for pid, (_, line) in processes().items() if ground.path in line and "ControlMaster=yes" in line]
    with dial(tcp_port(client)) as connection:  # it has the only link
        ping(connection, word=b"a")
        os.kill(first, how)
        for _ in range(3):
            with contextlib.suppress(ConnectionResetError), dial(tcp_port(client)) as another:
                ping(another, word=b"b")
                break
        ask(tcp_port(client))
    if how == signal.SIGSTOP:
        os.kill(first, signal.SIGCONT)
    assert client.stop() == 0 and not ground.ssh() and not ground.folders(), client.output


def fails(client, says, code=1):
    client.wait_for("❌ .*" + says)
    assert client.wait() == code, client.output


def test_a_far_side_that_does_not_answer(sshd, over_ssh, bin_with, tmp_path):
    """What ssh or the far side says is shown, and no byte that a terminal would obey."""
    script = tmp_path / "force"
    far = sshd("ForceCommand exec sh %s" % script)
    old = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.[67].*/bin/python3")))
    old = "exec %s \"$@\"" % old[0] if old else "echo \"ratrod needs Python 3.8 or later there, and this is 3.6\" >&2; exit 1"
    shell = 'PATH=%s; export PATH; exec %s -c "$SSH_ORIGINAL_COMMAND"'
    for commands, says in (
        (shell % (bin_with(), "sh"), "no `python3`.*needs Python 3.8 or later there, and nothing else: --remote-python names one"),
        *((shell % (bin_with(), need(name)), "no `python3`") for name in ("csh", "fish")),
        (shell % (bin_with(python3=old), "sh"), "ratrod needs Python 3.8 or later there"),
        ("echo 'This account is currently not available.'; exit 1", "This account is currently not available"),
        ("printf '\\033[31mno\\a\\n' >&2; exit 3", "no"),
        # It may close before or after all of the program has been sent.
        ("exit 0", r"(the other side closed the connection|the connection broke \((Broken pipe|Connection reset by peer)\))"),
        ("while echo y; do :; done", "y; y; its login shell prints more than 65536 bytes"),
        ("exec sleep 600", "(not done|no connection) within 1 s"),  # one of them before the other, as busy as the machine is
    ):
        with row(commands):
            script.write_text(commands)
            limits = ("--handshake-timeout", "0.5", "--connect-timeout", "0.5") if "sleep" in commands else ()
            client = over_ssh(far, *limits, "0:127.0.0.1:1")
            fails(client, "ssh to `ssh://far`: .*" + says)
            assert "\x1b" not in client.output and "\a" not in client.output


def test_who_is_not_let_in(sshd, over_ssh, closed):
    far = sshd()
    fails(over_ssh(far, "0:127.0.0.1:1", server="ssh://127.0.0.1:%d" % closed), "ssh to `ssh://127.0.0.1:.*Connection refused")
    known = far.known.read_text()
    far.known.write_text("")
    fails(over_ssh(far, "0:127.0.0.1:1"), "ssh to `ssh://far`: .*Host key verification failed", 3)
    far.known.write_text(known)
    far.authorized.write_text("")
    fails(over_ssh(far, "0:127.0.0.1:1"), r"ssh to `ssh://far`: .*Permission denied \(.*publickey.*nothing can be asked", 3)


def test_the_first_connection_may_ask(sshd, ground, tcp_echo):
    # ssh's own question, on the terminal; its answer is kept by ssh.
    far = sshd()
    far.known.write_text("")
    far.config.write_text(far.config.read_text().replace("StrictHostKeyChecking yes", "StrictHostKeyChecking ask"))
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, [*BARE, "connect", "--ssh-command", far.command, "ssh://far", "0:127.0.0.1:%d" % tcp_echo.port], ground.environment)
    seen = b""
    try:
        for awaited, answer in ((b"(yes/no", b"yes\n"), (READY.encode(), b"")):
            while awaited not in seen:
                seen += os.read(terminal, 65536)
            os.write(terminal, answer)
        assert "[127.0.0.1]:%d" % far.port in far.known.read_text()
    finally:
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(OSError):
            while os.read(terminal, 65536):
                pass
        os.waitpid(pid, 0)
        os.close(terminal)
    assert not ground.folders() and not ground.ssh()


WRONG = [
    *((words + ["ssh://far", "0:127.0.0.1:1"], words[0] + " does not go together with ssh://") for words in (
        ["--legacy"], ["-a"], ["--accept-new"], ["-k", "x"], ["--proxy", "http://x"], ["--workers", "2"])),
    (["ssh://far", "R:9000:localhost:80"], "`ssh -R` makes them"),
    (["--ssh-command", "ssh", "far:22"], "--ssh-command is for"), (["--remote-python", "python3", "far:22"], "--remote-python is for"),
    (["--remote-python", "", "ssh://far"], "--remote-python takes the path of a Python there"),
    (["ssh://far,far:22"], "of two kinds"), (["ssh://far", "0:127.0.0.1:1"], "`ssh`, which is not installed here"),
    *((["--ssh-command", command, "ssh://far", "0:127.0.0.1:1"], says) for command, says in (
        ("no-such-ssh -v", "`no-such-ssh -v`, which is not installed here"), ("", "no command in it"), ("'", "cannot understand"))),
    *(([server], "cannot understand the server") for server in (
        "ssh://-oProxyCommand=x", "ssh://-l@far", "ssh://", "ssh://far:0", "ssh://far:x", "ssh://far/path", "ssh://a b", "ssh://a;b",
        "ssh://u$(x)@a", "ssh://%h", "ssh://a:b@c", "ssh://::1", "ssh://[::1", "ssh://h\u00f6")),
]


def test_what_cannot_be(ground):
    # One process for all, which finds no ssh: what is wrong shows before anything is started.
    program = "import json, ratrod, sys\nfor words in json.load(sys.stdin): print(ratrod.main(['connect', *words]), file=sys.stderr, flush=True)"
    result = subprocess.run([sys.executable, "-S", "-c", program], input=json.dumps([words for words, _ in WRONG]), cwd=ROOT,
                            env={**ground.environment, "PATH": "/nowhere"}, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    lines = result.stderr.splitlines()
    assert lines[1::2] == ["2"] * len(WRONG), lines
    for (words, says), line in zip(WRONG, lines[::2]):
        assert says in line, words
    assert not ground.folders()
