"""Connections that survive what networks do: another address, a path that drops everything, a machine that stands still.

The client and the programs that use it are in a namespace, the server and its targets outside: ssh, curl, redis-cli, and plain sockets. Nothing
may be lost or doubled. With the longest outages, and the pauses that the programs saw:

    RATROD_LONG=1 pytest -n0 -rP --timeout=900 tests/peers/test_survival.py
"""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest

from support.namespaces import drop_all
from support.pressure import LONG, figure
from support.programs import PATIENCE, RATROD, READY, STARTED, UDP_LISTENING, need, tcp_port
from support.relays import Door
from support.sockets import dial, eventually, free_port, ping, port_of, say

pytestmark = pytest.mark.usefixtures("no_traceback")

BETWEEN = 0.05  # seconds from one word of a talk to the next
DOWNLOAD = os.urandom(1 << 20) * 24


class Talk:
    """Words that come back in turn: question(n) sends the n-th and gives what came. `pause` is the longest time between two answers."""

    def __init__(self, name, question):
        self.name, self._question = name, question
        self.said, self.pause, self.error, self.over = 0, 0.0, None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        last = time.monotonic()
        try:
            while not self.over.wait(BETWEEN):
                self._question(self.said)
                self.said, now = self.said + 1, time.monotonic()
                self.pause, last = max(self.pause, now - last), now
        except (OSError, AssertionError) as error:
            self.error = error

    def goes_on(self, more=3):
        """Waits until it has had some answers more."""
        said = self.said
        eventually(lambda: self.error or self.said >= said + more, lambda: "%s goes on after %d words" % (self.name, said))
        assert not self.error, (self.name, self.error)

    def end(self):
        self.over.set()
        self._thread.join(PATIENCE)
        assert not self.error and not self._thread.is_alive(), (self.name, self.error)


def over_socket(sock):
    def question(n):
        word = b"word %9d" % n
        ping(sock, word=word)
    return question


def over_udp(sock):
    """A datagram may be lost: it is sent again."""
    def question(n):
        word = b"datagram %9d" % n
        sock.settimeout(0.2)
        for _ in range(300):
            sock.send(word)
            with contextlib.suppress(socket.timeout):
                while True:
                    if sock.recv(100) == word:
                        return
        raise AssertionError("no answer to a datagram")
    return question


def over_pipe(process, line, answer):
    """A program's standard input and output, a line each."""
    def question(n):
        process.stdin.write(line % n if b"%" in line else line)
        process.stdin.flush()
        came = process.stdout.readline()
        assert came == answer(n), came
    return question


class Site:
    """The client inside, its server and all targets outside."""

    def __init__(self, namespace, start, keys, stack):
        self.namespace, self._start, self._keys, self._stack = namespace, start, keys, stack
        network, _, last = namespace.address.rpartition(".")
        self.outside = "%s.%d" % (network, int(last) - 1)
        self.cable = namespace.name + "v"
        self.talks = []

    def begin(self, *tunnels, serve_flags=(), connect_flags=()):
        self.server = self._start(*RATROD, "-k", self._keys.server.path, "serve", "--drain", "0", *serve_flags, self.outside + ":0")
        self.server_port = int(self.server.wait_for(STARTED).group(1))
        self.client = self._start(*self.namespace.command, *RATROD, "-k", self._keys.client.path, "connect", *connect_flags,
                                  "%s:%d" % (self.outside, self.server_port), *tunnels)
        self.client.wait_for(READY)

    def dial(self, n=1):
        sock = self.namespace.make(socket.create_connection, ("127.0.0.1", tcp_port(self.client, n)), 90)
        return self._stack.enter_context(sock)

    def dial_udp(self, n):
        def make():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(("127.0.0.1", int(self.client.wait_for(UDP_LISTENING, n).group(1))))
            return sock
        return self._stack.enter_context(self.namespace.make(make))

    def run(self, *command):
        """A program inside, with pipes."""
        made = subprocess.Popen([*self.namespace.command, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL)
        self._stack.callback(made.wait)
        self._stack.callback(made.kill)
        return made

    def talk(self, name, question):
        self.talks.append(Talk(name, question))
        self.talks[-1].goes_on(1)

    def end(self, what):
        for talk in self.talks:
            talk.goes_on()
        for talk in self.talks:
            talk.end()
        slowest = max(self.talks, key=lambda talk: talk.pause)
        figure(what, "longest pause of %d talks: %.1f s (%s)" % (len(self.talks), slowest.pause, slowest.name))

    def change_address(self):
        """As a laptop that goes from one network to another: the old address is gone."""
        def ip(*words):
            subprocess.run(["ip", *words], check=True)
        old, inside = self.namespace.address, ("-n", self.namespace.name)
        ours, theirs = (address.replace("198.18.", "198.19.", 1) for address in (self.outside, old))
        ip("addr", "add", ours + "/30", "dev", self.cable)
        ip(*inside, "addr", "add", theirs + "/30", "dev", "eth0")
        ip(*inside, "addr", "del", old + "/30", "dev", "eth0")
        ip(*inside, "route", "add", self.outside, "via", ours)


@pytest.fixture
def site(namespace, start, keys, stack):
    return Site(namespace, start, keys, stack)


@contextlib.contextmanager
def half_closed(site, listener, n):
    """A connection whose originator has ended its direction: the answer is still to come."""
    with site.dial(n) as originator, listener.accept()[0] as target:
        say(originator, b"question")
        assert target.recv(100, socket.MSG_WAITALL) == b"question"
        yield originator
        target.sendall(b"answer")
        target.close()
        assert originator.recv(100, socket.MSG_WAITALL) == b"answer"


def test_another_address(site, sshd, start, target, tcp_echo, udp_echo, listener, tmp_path):
    """20 connections of every kind go on, and a new one works at once."""
    far = sshd()
    redis_port = free_port()
    start(need("redis-server"), "--port", redis_port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no").wait_for("Ready to accept")
    (tmp_path / "file").write_bytes(DOWNLOAD)
    web = start("python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", tmp_path, "0")
    web_port = int(web.wait_for(r"port (\d+)").group(1))
    site.begin(*("0:127.0.0.1:%d" % port for port in (tcp_echo.port, far.port, redis_port, web_port, port_of(listener), udp_echo.port)))
    for n in range(14):
        site.talk("socket %d" % n, over_socket(site.dial()))
    site.talk("UDP", over_udp(site.dial_udp(6)))
    ssh = site.run("ssh", "-F", far.config, "-o", "HostKeyAlias=far", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                   "-o", "RemoteCommand=none", "-o", "RequestTTY=no", "-o", "ClearAllForwardings=yes", "-p", tcp_port(site.client, 2), "far", "cat")
    site.talk("ssh", over_pipe(ssh, b"line %d\n", lambda n: b"line %d\n" % n))
    redis = site.run("redis-cli", "-p", tcp_port(site.client, 3))
    site.talk("redis", over_pipe(redis, b"INCR counter\n", lambda n: b"%d\n" % (n + 1)))
    curl = site.run("curl", "-s", "--limit-rate", "4M", "http://127.0.0.1:%d/file" % tcp_port(site.client, 4))
    came = [curl.stdout.read(1 << 20)]
    reader = threading.Thread(target=lambda: came.append(curl.stdout.read()))
    reader.start()
    idle = site.dial()
    with half_closed(site, listener, 5):
        site.change_address()
        new = over_socket(site.dial())
        new(0)
        for talk in site.talks:
            talk.goes_on()
    over_socket(idle)(1)
    reader.join(PATIENCE)
    assert hashlib.sha256(b"".join(came)).digest() == hashlib.sha256(DOWNLOAD).digest()
    site.end("another address")
    assert re.search(r"🔌 .* was lost", site.client.output) and "✅ Over another link" in site.client.output


def test_a_path_that_drops_everything_and_a_client_that_stands_still(site, tcp_echo, udp_echo):
    """The second as a laptop that sleeps."""
    site.begin("0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % udp_echo.port)
    for n in range(5):
        site.talk("socket %d" % n, over_socket(site.dial()))
    site.talk("UDP", over_udp(site.dial_udp(2)))
    idle = site.dial()
    for seconds in [5, 20, 50] if LONG else [5]:
        with drop_all(site.namespace):
            time.sleep(seconds)  # the outage
        back = time.monotonic()
        for talk in site.talks:
            talk.goes_on(1)
        figure("%d s of silence" % seconds, "all go on %.1f s after its end" % (time.monotonic() - back))
        over_socket(idle)(1)
    pids = subprocess.run(["ip", "netns", "pids", site.namespace.name], stdout=subprocess.PIPE, check=True).stdout.split()
    for sign, wait in ((signal.SIGSTOP, 40 if LONG else 12), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(int(pid), sign)
        time.sleep(wait)  # it stands still
    site.end("silence, and standing still")


def test_every_link_is_reset_again_and_again(serve, connect, target, tcp_echo, stack):
    """By something in between, under load, every 2 s."""
    server, port = serve()
    door = Door(target, port)
    client = connect(door.port, "0:127.0.0.1:%d" % tcp_echo.port)
    talks = [Talk("socket %d" % n, over_socket(stack.enter_context(dial(tcp_port(client))))) for n in range(8)]
    for talk in talks:
        talk.goes_on(1)
    for _ in range(30 if LONG else 4):
        door.cut_all()
        for talk in talks:
            talk.goes_on()
        threading.Event().wait(2 if LONG else 0)  # until the next
    for talk in talks:
        talk.end()
    figure("links reset every 2 s", "longest pause: %.1f s" % max(talk.pause for talk in talks))
