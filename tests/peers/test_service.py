"""serve and connect as services: what systemd is told, what the log looks like to a collector, reloading, and the health probe."""

import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from unittest import mock

import pytest

import ratrod as ratrod_module
from support.keys import make_keys
from support.many_lines import run_lines
from support.programs import AUTHENTICATION_FAILED, LEGACY, LISTENING, PATIENCE, READY, ROOT, STARTED, bound, missing, readme, tcp_port
from support.sockets import ask, dial, eventually, free_port, ping, port_of, works

pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture
def manager(tmp_path):
    """manager(abstract=False) -> (NOTIFY_SOCKET, receive() -> the next message's lines as a dict); STATUS alone is for receive(status=True)."""
    sockets = []
    def make(abstract=False):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sockets.append(made)
        name = "ratrod-test-%d-%d" % (os.getpid(), len(sockets)) if abstract else str(tmp_path / ("notify%d" % len(sockets)))
        made.bind("\0" + name if abstract else name)
        def receive(timeout=PATIENCE, status=False):
            made.settimeout(timeout)
            while True:
                message = dict(line.split("=", 1) for line in made.recv(4096).decode().splitlines())
                if (list(message) == ["STATUS"]) is status:
                    return message
        return ("@" if abstract else "") + name, receive
    yield make
    for made in sockets:
        made.close()


# Says how it is far more often than every 5 s.
TALKATIVE = sys.executable, "-c", "import sys, ratrod; ratrod.STATUS_INTERVAL = 0.2; sys.exit(ratrod.main())"


def notifying(path):
    return {"env": {**os.environ, "NOTIFY_SOCKET": path}}


def test_systemd_hears_how_it_goes(manager, ratrod, keys, tcp_echo):
    """READY only when it is: the very next thing is a connection. The server has a path, and the client, where there are such, an abstract one."""
    path, heard = manager()
    server = ratrod("-k", keys.server.path, "serve", "127.0.0.1:0", **notifying(path))
    message = heard()
    assert message["READY"] == "1" and message["STATUS"].startswith("Server on `127.0.0.1:")
    port = int(re.search(r":(\d+)`", message["STATUS"]).group(1))
    path, heard_of_client = manager(abstract=sys.platform.startswith("linux"))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:%d" % tcp_echo.port, **notifying(path))
    message = heard_of_client()
    assert message["READY"] == "1" and "connected" in message["STATUS"] and "127.0.0.1:%d" % port in message["STATUS"]
    ask(tcp_port(client))
    for program, listen in ((server, heard), (client, heard_of_client)):
        program.process.send_signal(signal.SIGHUP)
        message = listen()
        assert message["RELOADING"] == "1" and int(message["MONOTONIC_USEC"]) > 0
        assert listen() == {"READY": "1"}
    ask(tcp_port(client))
    for program, listen in ((client, heard_of_client), (server, heard)):
        assert program.stop() == 0
        assert listen() == {"STOPPING": "1"}


def test_a_client_is_ready_when_all_its_tunnels_are(manager, start, keys, tcp_echo, serve):
    """Reverse tunnels listen elsewhere, and later; while the server is not there it is not ready, and says so to nobody."""
    port = free_port()
    path, heard = manager()
    client = start(*TALKATIVE, "-v", "-k", keys.client.path, "connect", "--max-retry-count", "1000", "--max-retry-interval", "0.2",
                   "127.0.0.1:%d" % port, "R:0:127.0.0.1:%d" % tcp_echo.port, cwd=str(ROOT), **notifying(path))
    client.wait_for("Test connection failed")
    client.process.send_signal(signal.SIGHUP)
    client.wait_for("Read again")
    away = "Client of `127.0.0.1:%d`, connecting for .* refused" % port
    eventually(lambda: re.match(away, heard(status=True)["STATUS"]), away)
    server, _ = serve("--allow-listen", bind="127.0.0.1:%d" % port)
    assert heard()["READY"] == "1"
    eventually(lambda: ", connected for " in heard(status=True)["STATUS"], "it says that it is connected")
    ask(int(server.wait_for(LISTENING).group(1)))


def test_of_several_workers_the_parent_speaks(manager, ratrod, keys, tcp_echo):
    """systemd believes the main process alone (NotifyAccess=main)."""
    path, heard = manager()
    server = ratrod("-k", keys.server.path, "serve", "--workers", "2", "127.0.0.1:0", **notifying(path))
    assert heard() == {"READY": "1", "STATUS": "2 workers"}
    port = int(server.wait_for(STARTED).group(1))
    server.process.send_signal(signal.SIGHUP)
    assert heard()["RELOADING"] == "1"
    assert heard()["READY"] == "1"
    server.wait_for("Read again", 2)
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:%d" % tcp_echo.port).ready()
    ask(tcp_port(client))
    server.process.send_signal(signal.SIGUSR1)
    server.wait_for("📊 Server on", 2)
    server.process.terminate()
    assert heard() == {"STOPPING": "1"}
    assert server.wait() == 0


def test_names_of_a_manager_that_are_none(caplog):
    for path in ("", "@", "vsock:2:1234", "relative", "/" + "x" * 200):
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=path), caplog.at_level("DEBUG"):
            ratrod_module.notify_systemd("READY=1")
    assert {record.levelname for record in caplog.records} <= {"DEBUG"}


@pytest.mark.parametrize("name, command", [
    ("ratrod-serve.service", "-k /etc/ratrod serve"), ("ratrod-connect@x.service", "connect @/etc/ratrod/%i.conf")])
def test_the_unit_files_of_the_readme(name, command, tmp_path):
    text = readme("serve.service")
    if "connect" in name:
        (tmp_path / "ratrod-serve.service").write_text(text)
        subprocess.run(["sh", "-ec", readme("connect.service").replace("/etc/systemd/system", str(tmp_path))], check=True, timeout=PATIENCE)
        text = (tmp_path / "ratrod-connect@.service").read_text()
    for line in ("Type=notify", "Restart=on-failure", "ExecReload=/bin/kill -HUP $MAINPID", "KillMode=mixed"):
        assert re.search("^%s$" % re.escape(line), text, re.M), line
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze")
    program = tmp_path / "ratrod"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    command = re.search(r"^ExecStart=(\S+/ratrod) %s" % re.escape(command), text, re.M).group(1)
    def verify(text):
        path = tmp_path / name
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, timeout=PATIENCE)
        # Whatever it has to say of this machine's own units is not about these.
        return [line for line in done.stderr.decode().splitlines() if name.split(".")[0] in line]
    assert verify(text.replace(command, str(program))) == []
    # It does look.
    assert "is not executable" in str(verify(text.replace(command, str(tmp_path / "none"))))
    assert "Restrat" in str(verify(text.replace(command, str(program)).replace("Restart=", "Restrat=")))


def test_a_log_for_machines(serve, connect, tcp_echo):
    """A manager that is not there is no word of a warning in it."""
    server, port = serve("-v", "--log-format", "json", **notifying("/nowhere/at/all"))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("Read again")
    client = connect(port, "-v", "--log-format=json", "0:%d" % tcp_echo.port).ready()
    ask(tcp_port(client))
    client.wait_for("✅ .* closed: ")
    assert client.stop() == server.stop() == 0
    for program in (client, server):
        lines = [json.loads(line) for line in program.lines]
        assert len(lines) > 2 and {tuple(line) for line in lines} == {("time", "level", "message")}
        for line in lines:
            when = datetime.datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
            assert abs(when - datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)) < datetime.timedelta(minutes=5)
        assert "DEBUG" in {line["level"] for line in lines} <= {"DEBUG", "INFO"} and "\x1b" not in program.output, program.output


def test_what_would_break_a_line_of_it(ratrod, tmp_path):
    """Quotes, backslashes and line ends, where the locale has no name for a character."""
    program = ratrod("-k", tmp_path / 'a "b" \\ \n c\x1b[31m ü', "connect", "--check", "--log-format", "json", "127.0.0.1:9",
                     env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert program.wait() == 2
    line = json.loads(program.output)
    assert line["level"] == "ERROR" and 'a "b" \\ \n c' in line["message"]


def test_hup_reads_the_own_key(serve, connect, keys, stranger, tcp_echo, tmp_path):
    """A client comes as who it is now; where its file is damaged it stays who it was, and says so. A drain goes on."""
    server, port = serve("-v")
    client = connect(port, "-v", "--drain", "60", "0:%d" % tcp_echo.port).ready()
    (keys.client.path / "key").rename(tmp_path / "old key")
    (keys.client.path / "key").write_text("nonsense")
    client.process.send_signal(signal.SIGHUP)
    client.wait_for("ERROR .*`.*key` is no private key of ratrod.*the key that was read before stays in use")
    ask(tcp_port(client))
    new = make_keys(tmp_path / "new")
    keys.server.trust(new, "authorized_keys")
    for name in ("key", "key.pub"):
        shutil.copy(new.path / name, keys.client.path / name)
    client.process.send_signal(signal.SIGHUP)
    client.wait_for("Read again: .*%s" % re.escape(new.public))
    ask(tcp_port(client))
    server.wait_for("Accepted .*%s" % re.escape(new.public))
    with dial(tcp_port(client)) as connection:
        ping(connection, word=b"1")
        client.process.terminate()
        client.wait_for("Ending")
        before = client.output.count("Read again")
        client.process.send_signal(signal.SIGHUP)
        client.wait_for("Read again", before + 1)
        ping(connection, word=b"2")
    assert client.wait() == 0
    # The server as well: whoever knows the old key alone is warned.
    shutil.copy(stranger.path / "key", keys.server.path / "key")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("WARN .*does not show this key")
    server.wait_for("Read again: .*%s" % re.escape(stranger.public))
    probe = connect(port, "--check")
    assert probe.wait() == AUTHENTICATION_FAILED and stranger.public in probe.output


def test_a_check_that_is_ended_has_found_out_nothing(connect, listener):
    probe = connect(port_of(listener), "--check")
    with listener.accept()[0]:
        assert probe.stop() == 128 + signal.SIGTERM
    assert "lets this client in" not in probe.output


def test_hup_ends_a_pause_between_tries(serve, client, tcp_echo):
    """With pauses of up to an hour a server that is there again would be found in an hour."""
    server, port = serve("--allow-listen")
    client = client(port, "0:%d" % tcp_echo.port, "R:0:127.0.0.1:%d" % tcp_echo.port, flags=("-v", "--max-retry-interval", "3600"))
    reverse = bound(client)
    server.kill()
    client.wait_for("Lost the server")
    # Each time at once, whatever the pause has grown to: the next would be of over an hour.
    for _ in range(15):
        before = client.output.count("; trying again")
        client.process.send_signal(signal.SIGHUP)
        eventually(lambda before=before: client.output.count("; trying again") > before, lambda: client.output)
    server, _ = serve("--allow-listen", bind="127.0.0.1:%d" % port)
    eventually(lambda: client.process.send_signal(signal.SIGHUP) or works(reverse), lambda: client.output)
    ask(tcp_port(client))


LETS_IN = "The server `127.0.0.1:%d` lets this client in."


def test_checks(serve, keys, stranger, closed, tcp_echo, manager, tmp_path):
    """A good one listens on nothing: the tunnels' ports may be in use, by the very client whose health it is about. And it is not that service.
    Each kind of failure has its exit code, and the line that connect has for it; nothing is asked, and nothing is written."""
    _, port = serve(*LEGACY.serve)
    path, heard = manager()
    server, own = "127.0.0.1:%d" % port, keys.client.path
    plain = [[server], [server, "%d:%d" % (tcp_echo.port, tcp_echo.port)], [server, "stdio:db:1"], [server, "1080:socks", "unix:/nowhere/x:db:1"],
             [*LEGACY.connect, server]]
    # Of several servers, the one that lets it in.
    others = [["--log-format", "json", "127.0.0.1:%d,%s" % (closed, server)], ["-v", server]]
    ignorant = make_keys(tmp_path / "ignorant")
    stranger.trust(keys.server, "known_hosts")
    bad = [(own, ["127.0.0.1:%d" % closed], 1, "Connection refused"), (own, [server, "nonsense"], 2, "cannot understand the tunnel"),
           (own, ["nonsense"], 2, "cannot understand the server"), (stranger.path, [server], 3, "does not know this client's key"),
           (ignorant.path, [server], 3, "is not in the known hosts file"), (tmp_path / "none", [server], 2, "no security files in")]
    lines = [(own, words) for words in plain + others] + [(folder, words) for folder, words, _, _ in bad]
    outcomes = run_lines([["-k", folder, "connect", "--check", *words] for folder, words in lines], env={**os.environ, "NOTIFY_SOCKET": path})
    said = [outcome.out + outcome.err for outcome in outcomes]
    good = len(plain) + len(others)
    assert [outcome.code for outcome in outcomes] == [0] * good + [code for _, _, code, _ in bad], outcomes
    for output in said[:len(plain)]:
        assert [line for line in output.splitlines() if "in the clear" not in line] == [LETS_IN % port]
    as_json, verbose = said[len(plain):good]
    line = json.loads(as_json.splitlines()[-1])
    assert (line["level"], line["message"]) == ("INFO", LETS_IN % port)
    assert READY in verbose and "Signing server challenge" in verbose
    for (_, words, _, text), output in zip(bad, said[good:]):
        assert len(output.splitlines()) == 1 and text in output, (words, output)
    pytest.raises(BlockingIOError, heard, 0)
    assert tcp_echo.accepted == 0
    assert (ignorant.path / "known_hosts").read_text() == "" and not (tmp_path / "none").exists()
