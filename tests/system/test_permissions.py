"""What authorized_keys lets each key do: options, files that change, `unix:` targets.

Real servers. The clients are real where it is about what they show, and the independent peer where it is about many lines or many targets.
"""

import contextlib
import datetime
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from support import ratrod2_peer as peer
from support.keys import base64url, make_keys, seed_of
from support.programs import AUTHENTICATION_FAILED, LEGACY, LEGACY_E, PATIENCE, RATROD, READY, ROOT, STARTED, missing, need, tcp_port, udp_originator
from support.sockets import ask, assert_refused, dial, eventually, receive_exactly
from support.targets import UnixTarget, echo

pytestmark = pytest.mark.usefixtures("no_traceback")

# What comes of asking for a target. A refusal by policy has one text, whatever its reason: anything else would tell a client what the policy is.
NOT_ALLOWED = "not allowed by this server"
OPENED, FAILED, UNKNOWN_KEY = "opened", "allowed, but cannot be reached", "unknown key"
TODAY = datetime.datetime.now(datetime.timezone.utc).date()


def day(n):
    return (TODAY + datetime.timedelta(days=n)).isoformat()


def seed_number(n):
    return hashlib.sha256(b"a key for the tests, %d" % n).digest()


def public_of(seed):
    return base64url(peer.Identity.from_seed(seed).public)


class Asker:
    """One key that asks a server for targets: each over a link of its own, since a refusal takes its link with it."""

    def __init__(self, port, seed):
        self.port, self.seed = port, seed

    @contextlib.contextmanager
    def link(self):
        with peer.Client.connect(self.port, self.seed) as link:
            yield link.handshake()

    def comes_in(self):
        return self._outcome(lambda link: OPENED)

    def tcp(self, target):
        return self._outcome(lambda link: link.open(target).wait_opened() is not None and OPENED)

    def udp(self, target):
        def ask(link):
            link.open_udp()
            link.session(1, target)
            link.datagrams((1, b"?"))
            kind, value = link.read_udp()
            if kind == peer.SESSION_OVER:
                raise peer.PeerError(*value[1:])
            assert (kind, value) == (peer.DATAGRAMS, [(1, b"?")])
            return OPENED
        return self._outcome(ask)

    def exchange(self, target, question=b"anybody there?"):
        with self.link() as link:
            return link.exchange(target, question)

    def _outcome(self, ask):
        try:
            with self.link() as link:
                return ask(link)
        except peer.PeerError as error:
            return {peer.REMOTE_FAILED: FAILED, peer.INVALID_KEY: UNKNOWN_KEY}.get(error.code, error.text)


@pytest.fixture
def authorized(keys):
    """authorized(lines...): what the server's authorized_keys says from now on; KEY in a line is the client's key."""
    def write(*lines):
        text = "".join("%s\n" % line.replace("KEY", keys.client.public) for line in lines)
        keys.server.write("authorized_keys", text, encoding="utf-8")
    return write


@pytest.fixture
def asking(serve, keys, authorized):
    """asking(lines..., flags=()) -> (Asker as the client's key, server): a server with these authorized_keys."""
    def launch(*lines, flags=()):
        authorized(*lines)
        server, port = serve(*flags)
        return Asker(port, seed_of(keys.client)), server
    return launch


@pytest.fixture
def connect(ratrod, keys):
    """connect(server_port, TUNNEL words..., flags=()) -> Program: our client, not yet awaited."""
    def launch(server_port, *tunnels, flags=()):
        return ratrod("-k", keys.client.path, "connect", *flags, "127.0.0.1:%d" % server_port, *tunnels)
    return launch


def ask_by_udp(originator, question=b"anybody there?"):
    originator.send(question)
    assert originator.recv(100) == question


@pytest.fixture
def second_echo(target):
    return target(echo)


@pytest.fixture
def udp_twin(tcp_echo):
    """A UDP echo on the same port as the TCP one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", tcp_echo.port))

        def run():
            while True:
                data, address = made.recvfrom(65536)
                if data == b"end":
                    return
                made.sendto(data, address)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        made.sendto(b"end", made.getsockname())
        thread.join(PATIENCE)


# ---------------------------------------------------------------------------------------------------- every line by itself

# P and Q are the ports of two targets on 127.0.0.1; on P there is UDP as well.
P, Q, UDP = "tcp P", "tcp Q", "udp P"
ALL = {P, Q, UDP}
GOOD = {
    "KEY": ALL,
    "KEY alice@laptop": ALL,
    " \tKEY \t alice  and more  words ": ALL,
    "KEY no-udp\r": {P, Q},
    # Words that only look like options from afar are a comment's.
    "KEY nobody permissive expensive laptop-no-udp": ALL,
    "KEY # no comment": ALL,
    "KEY 'alice'": ALL,
    "KEY \u00e9l\u00e8ve@\u6771\u4eac": ALL,
    'KEY permitopen="127.0.0.1:PORT"': {P, UDP},
    'KEY permitopen="127.0.0.1:OTHER" alice@laptop': {Q},
    'KEY permitopen="127.0.0.1:*"': ALL,
    'KEY permitopen="*:PORT"': {P, UDP},
    'KEY permitopen="*:*"': ALL,
    'KEY permitopen="[::ffff:127.0.0.1]:PORT"': {P, UDP},
    'KEY permitopen="[::1]:PORT"': set(),
    'KEY permitopen="[::1]:*" permitopen="127.0.0.2:*"': set(),
    'KEY permitopen="localhost:PORT"': set(),
    'KEY permitopen="*.example.com:*"': set(),
    'KEY permitopen="DB.example.com:1" permitopen="127.0.0.1:PORT" bob': {P, UDP},
    'KEY permitopen="127.0.0.1:OTHER" permitopen="127.0.0.1:PORT"': ALL,
    'KEY permitopen="unix:/run/some.sock"': set(),
    'KEY permitopen="127.0.0.1:PORT" no-udp': {P},
    'KEY no-udp permitopen="127.0.0.1:OTHER"': {Q},
    "KEY no-udp": {P, Q},
    "KEY no-legacy": ALL,
    "KEY no-udp no-legacy alice@laptop": {P, Q},
    'KEY permitlisten="8080"': ALL,
    'KEY permitlisten="127.0.0.1:*" permitlisten="localhost:80" permitlisten="*:9000" permitlisten="[::1]:80"': ALL,
    'KEY expires="%s"' % day(2): ALL,
    'KEY expires="2999-12-31" no-legacy permitopen="127.0.0.1:PORT" no-udp permitlisten="1" alice@laptop': {P},
}
# Not listed any more, which is no mistake.
EXPIRED = ['KEY expires="%s"' % day(0), 'KEY expires="%s" alice' % day(-1), 'KEY no-udp expires="1970-01-01"', 'KEY expires="0001-01-01"']
# No entries at all.
NOTHING = ["", "   ", "# KEY", "#KEY", "\t # KEY no-udp", "#"]
BAD_TARGETS = [
    "", "127.0.0.1", ":", ":PORT", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:0PORT", "127.0.0.1:+PORT", "127.0.0.1:PORT:",
    "::1:PORT", "127.0.0.1:\uff18\uff10", "127.0.0.1:http", "127.0.0.1:1-2", "127.0.0.1:PORT*", "127.1:PORT", "0x7f000001:PORT", "2130706433:PORT",
    "[::1]", "[127.0.0.1]:PORT", "[::1%lo]:PORT", "[::1:PORT", "a..b:80", "*.:80", "**:80", "*example.com:80", "db*:80", "a.*.com:80", "*.*.com:80",
    "*.*:80",
    # A part of an address is no domain: `*.0.0.1` must not become a rule for 127.0.0.1.
    "*.0.0.1:PORT", "*.1:PORT", "127.0.0.*:PORT", "127.*:PORT", "127.0.0.0/8:PORT",
    "a/b:80", "a,b:80", "tcp://db:80", "unix:", "unix:relative", "unix:/a/../b", "unix:/a//b", "unix:/a/", "unix:/a/.", "unix:/a:b",
    "unix:/*:*", "unix:/" + "a" * 200, "unix:\0abstract", "unix:/a\0b", "unix:/a\x07b",
]
BAD_OPTIONS = [
    *['permitopen="%s"' % text for text in BAD_TARGETS],
    # Half of an option, or one that another program has.
    "permitopen", "permitopen=", 'permitopen="127.0.0.1:PORT', 'permitopen=127.0.0.1:PORT"', 'permitopen="127.0.0.1:PORT"x',
    "permitopen='127.0.0.1:PORT'", 'permitopen ="127.0.0.1:PORT"', 'permitopen= "127.0.0.1:PORT"', 'permitopen="127.0.0.1:PORT"permitopen="db:1"',
    'permitopen="127.0.0.1:PORT","db:1"', 'permitopen="127.0.0.1:PORT db:1"', 'permitopen="127.0.0.1:PORT",no-udp',
    "permitopen=\u201c127.0.0.1:PORT\u201d", 'permitopen=""127.0.0.1:PORT""', "permit", "permitopen:127.0.0.1:PORT", "permit-open",
    "permitremoteopen", 'PERMITOPEN="127.0.0.1:PORT"', 'permitopens="127.0.0.1:PORT"', "permitlisten", 'permitlisten=""', 'permitlisten="0x50"',
    'permitlisten="65536"', 'permitlisten="127.0.0.1"', 'permitlisten="127.0.0.1:"', 'permitlisten="127.1:80"', 'permitlisten="80',
    'permitlisten="8000-8010"', "no-", "no-tcp", "no-pty", "no-udp,no-legacy", "no-udp=1", 'no-udp="yes"', "no-udp;", "no-udpx", "no-port-forwarding",
    "expires", "expire", "expires=", 'expires=""', 'expires="tomorrow"', 'expires="2999-02-30"', 'expires="2999-13-01"', 'expires="2999-1-31"',
    'expires="29990131"', 'expires="2999-01-31T00:00"', 'expires="2999-01-31', 'expires=2999-01-31"', 'expires=" 2999-01-31"',
    'expires="2999-01-31 "', 'expires="31.01.2999"', 'expires="2999-W01-1"', 'expires="0000-01-01"', 'expires="-999-01-01"',
    'expires="\u0662\u0669\u0669\u0669-01-31"', 'expire="2999-01-31"', 'expires-at="2999-01-31"', 'expiry-time="29990131"', 'from="127.0.0.1"',
    'command="x"', "restrict=", "a=b", "=", "=x", "restrict,permitopen=x",
    # Behind the comment: whoever wrote it there believes in it.
    "alice@laptop no-udp", 'alice@laptop permitopen="127.0.0.1:PORT"', 'alice expires="2999-01-31"', "alice a=b", "no-udp alice no-legacy",
    "alice no-shell", "alice permit-open=\"127.0.0.1:PORT\"", "alice expire=\"2000-01-01\"", "# no-udp",
]
BAD_LINES = [
    *["KEY " + option for option in BAD_OPTIONS],
    # One bad option spoils what stands beside it.
    'KEY permitopen="127.0.0.1:PORT" permitopen="127.0.0.1"', "KEY no-udp no-tcp", 'KEY no-shell expires="2999-01-31"',
    "no-udp KEY", 'permitopen="127.0.0.1:PORT" KEY', "ssh-ed25519 KEY", "KEY= alice", "KEY, alice", '"KEY"', "KEYA", "\ufeff KEY", "alice",
    "KEY\0", "=KEY",
]


def test_every_line_by_itself(serve, keys, tcp_echo, second_echo, udp_twin):
    """Each with a key of its own, all in one file: what each key may do, and which lines the server complains of."""
    targets = {"PORT": str(tcp_echo.port), "OTHER": str(second_echo.port)}
    rows = [*[(line, UNKNOWN_KEY) for line in NOTHING + EXPIRED + BAD_LINES], *GOOD.items()]
    seeds = [seed_number(n) for n in range(len(rows))]
    lines = [line.replace("KEY", public_of(seed)) for (line, _), seed in zip(rows, seeds)]
    for word, port in targets.items():
        lines = [line.replace(word, port) for line in lines]
    (keys.server.path / "authorized_keys").write_bytes("".join(
        "%s\n" % line for line in ["# the first line", *lines, keys.client.public]).encode("utf-8"))
    server, port = serve()

    def may(asker):
        came_in = asker.comes_in()
        if came_in != OPENED:
            return came_in
        outcomes = {P: asker.tcp("127.0.0.1:%d" % tcp_echo.port), Q: asker.tcp("127.0.0.1:%d" % second_echo.port),
                    UDP: asker.udp("127.0.0.1:%d" % tcp_echo.port)}
        assert set(outcomes.values()) <= {OPENED, NOT_ALLOWED}, outcomes
        return {what for what, outcome in outcomes.items() if outcome == OPENED}
    # A link of the last line's: the other lines of a file still count; and it makes this source one that is not limited as a stranger's.
    with Asker(port, seed_of(keys.client)).link():
        wrong = {line: outcome for (line, expected), seed in zip(rows, seeds) for outcome in [may(Asker(port, seed))] if outcome != expected}
    complaint = r"WARN +line (\d+) of `%s` authorizes nobody: \S" % re.escape(str(keys.server.path / "authorized_keys"))
    named = [int(match.group(1)) for match in (re.search(complaint, line) for line in server.lines) if match]
    expected = [n for n, (line, _) in enumerate(rows, 2) if line in BAD_LINES]
    numbers = dict(enumerate(lines, 2))
    assert (wrong, {n: numbers.get(n) for n in set(named) ^ set(expected)}) == ({}, {})
    # Once: not at every handshake.
    assert len(named) == len(set(named))
    assert "\x07" not in server.output


@pytest.mark.parametrize("lines, may", [
    # What any line of a key allows is allowed, a line's own limits apply to what that line allows.
    (['KEY permitopen="127.0.0.1:PORT"', 'KEY permitopen="127.0.0.1:OTHER"'], ALL),
    (['KEY permitopen="127.0.0.1:PORT"', "KEY"], ALL),
    (['KEY permitopen="127.0.0.1:PORT"', "KEY no-udp"], ALL),
    (['KEY permitopen="127.0.0.1:OTHER"', "KEY no-udp"], {P, Q}),
    (['KEY permitopen="127.0.0.1:PORT" no-udp', 'KEY permitopen="127.0.0.1:OTHER"'], {P, Q}),
    (["KEY no-udp", "KEY no-udp"], {P, Q}),
    (["KEY no-tcp", 'KEY permitopen="127.0.0.1:PORT"'], {P, UDP}),
    (["KEY no-udp", "KEY no-tcp", "KEY =x"], {P, Q}),
    (['KEY expires="2000-01-01"', 'KEY permitopen="127.0.0.1:OTHER" expires="2999-12-31"'], {Q}),
    (['KEY expires="2999-12-31"', 'KEY expires="2000-01-01"'], ALL),
    (['KEY expires="2000-01-01"', 'KEY expires="2000-01-02"'], UNKNOWN_KEY),
    (["KEY no-tcp", "KEY expires"], UNKNOWN_KEY),
], ids=lambda value: "; ".join(value) if isinstance(value, list) else "")
def test_several_lines_of_one_key(lines, may, asking, tcp_echo, second_echo, udp_twin):
    asker, _ = asking(*[line.replace("PORT", str(tcp_echo.port)).replace("OTHER", str(second_echo.port)) for line in lines])
    if may == UNKNOWN_KEY:
        assert asker.comes_in() == UNKNOWN_KEY
        return
    outcomes = {P: asker.tcp("127.0.0.1:%d" % tcp_echo.port), Q: asker.tcp("127.0.0.1:%d" % second_echo.port),
                UDP: asker.udp("127.0.0.1:%d" % tcp_echo.port)}
    assert outcomes == {what: OPENED if what in may else NOT_ALLOWED for what in ALL}


def test_a_bad_line_is_named_with_its_number_again_when_the_file_changed(asking, authorized, keys):
    complaint = r"WARN +line %d of `%s` authorizes nobody: .*" % (3, re.escape(str(keys.server.path / "authorized_keys")))
    asker, server = asking("# a file", "", "KEY no-shell alice")
    assert "no-shell" in server.wait_for(complaint).group()
    assert asker.comes_in() == UNKNOWN_KEY
    authorized("# a file", "KEY no-udp alice", "KEY expires=\"soon\" \x1b[2J\x1b]0;owned\x07 alice")
    assert asker.comes_in() == OPENED
    server.wait_for(complaint, 2)
    authorized("# a file", "KEY no-udp alice", "KEY permitlisten=\"nowhere\"")
    server.wait_for(complaint, 3)
    authorized("KEY")
    assert asker.comes_in() == OPENED
    for _ in range(3):
        assert asker.comes_in() == OPENED
    assert server.output.count("authorizes nobody") == 3
    # Whoever may write a line there still does not write on the operator's terminal.
    assert "\x1b" not in server.output and "\x07" not in server.output


def test_a_file_that_cannot_be_read_is_not_complained_of_every_second(asking, keys):
    """Its bad lines were named when they were there; a folder in its place has none."""
    asker, server = asking("KEY no-udp", "KEY no-shell")
    assert asker.comes_in() == OPENED
    (keys.server.path / "authorized_keys").unlink()
    (keys.server.path / "authorized_keys").mkdir()
    assert asker.comes_in() == UNKNOWN_KEY
    # There is no event for nothing to happen: a few rounds of the server's looking at its lists.
    time.sleep(3)
    assert server.output.count("authorizes nobody") == 1


# ---------------------------------------------------------------------------------------------------- permitopen


def own_address():
    """An IPv4 address of this machine that is not loopback: nothing is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.connect(("192.0.2.1", 9))
        address = made.getsockname()[0]
        if not address.startswith("127."):
            return address
    return missing("an address beside loopback")


@pytest.fixture
def named(start, keys, tmp_path, authorized):
    """named(lines..., flags=(), ADDRESS=names...) -> (Asker, server): a server whose machine resolves names as a hosts file of the test's says."""
    unshare = need("unshare")
    prefix = unshare, "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', tmp_path / "hosts"

    def launch(*lines, hosts, flags=()):
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join("%s %s\n" % entry for entry in hosts))
        try:
            subprocess.run([str(word) for word in prefix + ("true",)], check=True, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            missing("permission to stand in for the hosts file")
        authorized(*lines)
        server = start(*prefix, *RATROD, "-k", keys.server.path, "serve", *flags, "127.0.0.1:0")
        return Asker(int(server.wait_for(STARTED).group(1)), seed_of(keys.client)), server
    return launch


def test_patterns_of_permitopen(named, target):
    """By names that all lead to a target on this machine's own address, so that what is allowed also works."""
    address = own_address()
    made, other = target(echo, host="0.0.0.0"), target(echo, host="0.0.0.0")
    names = ("db.example.com", "a.db.example.com", "example.com", "badexample.com", "db.example.com.evil.net", "db", "other.net", "any.org")
    asker, server = named('KEY permitopen="*.example.com:%d" permitopen="other.net:*" no-legacy alice@laptop' % made.port,
                          'KEY permitopen="*:%d"' % other.port, hosts=[(address, " ".join(names))])
    allowed = ["db.example.com:%d", "a.db.example.com:%d", "DB.EXAMPLE.COM:%d", "db.example.com.:%d", "other.net:%d", "Other.Net.:%d"]
    refused = ["example.com:%d", ".example.com:%d", "badexample.com:%d", "db.example.com.evil.net:%d", "db:%d", "any.org:%d", "*.example.com:%d",
               "x@db.example.com:%d", "db.example.com%%00:%d", "db.example.com\0:%d", "any.org/.example.com:%d", "*:%d",
               address + ":%d", "127.0.0.1:%d", "localhost:%d", "[::1]:%d"]
    outcomes = {form: asker.tcp(form % made.port) for form in allowed + refused}
    assert outcomes == {**dict.fromkeys(allowed, OPENED), **dict.fromkeys(refused, NOT_ALLOWED)}
    # Every host, by name or by address, at the port of the second line.
    assert {asker.tcp("%s:%d" % (host, other.port)) for host in (*names, address, "127.0.0.1", "localhost")} == {OPENED}
    # Every port of a host: 1 is nobody's.
    assert [asker.tcp("%s:1" % host) for host in ("other.net", "db.example.com")] == [FAILED, NOT_ALLOWED]
    # A name under a permitted domain that does not exist is tried.
    assert asker.tcp("no-such-host.example.com:%d" % made.port) == FAILED
    assert asker.exchange("db.example.com:%d" % made.port) == b"anybody there?"
    assert server.process.poll() is None


INSIDE, INSIDE6, LINK_LOCAL, BOTH, OUTSIDE = ("%s.example.com" % name for name in ("inside", "inside6", "linklocal", "both", "outside"))


@pytest.mark.parametrize("options, regex, outcomes", [
    ("", None, {INSIDE: b"loopback", "localhost": b"loopback"}),
    # Whoever rules over a name could point it at the server's own loopback: a rule for a name does not reach so far.
    ('permitopen="*.example.com:*"', None, {INSIDE: NOT_ALLOWED, INSIDE6: NOT_ALLOWED, LINK_LOCAL: NOT_ALLOWED, OUTSIDE: b"outside",
                                            "localhost": NOT_ALLOWED}),
    ('permitopen="inside.example.com:PORT"', None, {INSIDE: NOT_ALLOWED, OUTSIDE: NOT_ALLOWED}),
    ('permitopen="inside.example.com:PORT" permitopen="127.0.0.1:1"', None, {INSIDE: NOT_ALLOWED, "127.0.0.1": NOT_ALLOWED}),
    ('permitopen="inside.example.com:PORT" permitopen="127.0.0.1:PORT"', None, {INSIDE: b"loopback", "127.0.0.1": b"loopback"}),
    ('permitopen="inside.example.com:PORT" permitopen="127.0.0.1:*"', None, {INSIDE: b"loopback"}),
    ('permitopen="inside.example.com:PORT" permitopen="localhost:PORT"', None, {INSIDE: NOT_ALLOWED, "localhost": b"loopback"}),
    ('permitopen="*:PORT"', None, {INSIDE: b"loopback", OUTSIDE: b"outside", "127.0.0.1": b"loopback"}),
    # Of the addresses of a name only those that are allowed are tried.
    ('permitopen="*.example.com:PORT"', None, {BOTH: b"outside"}),
    # Both rules must allow the address, too.
    ('permitopen="inside.example.com:PORT" permitopen="127.0.0.1:PORT"', r"inside\.example\.com", {INSIDE: NOT_ALLOWED, "127.0.0.1": NOT_ALLOWED}),
    ('permitopen="inside.example.com:PORT"', r"inside\.example\.com|127\..*", {INSIDE: NOT_ALLOWED}),
    ('permitopen="inside.example.com:PORT" permitopen="127.0.0.1:PORT"', r"inside\.example\.com|127\..*", {INSIDE: b"loopback"}),
    ('permitopen="inside.example.com:PORT"', ".*", {INSIDE: NOT_ALLOWED}),
])
def test_a_name_that_resolves_to_loopback(options, regex, outcomes, named, target):
    address = own_address()
    made = target(lambda connection: connection.sendall(b"loopback"))
    with socket.create_server((address, made.port)) as outer:
        def serve_outside():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = outer.accept()
                    with connection:
                        connection.sendall(b"outside")
        threading.Thread(target=serve_outside, daemon=True).start()
        hosts = [("127.0.0.1", INSIDE), ("::1", INSIDE6), ("169.254.7.7", LINK_LOCAL), ("127.0.0.1", BOTH), (address, BOTH), (address, OUTSIDE)]
        asker, _ = named("KEY " + options.replace("PORT", str(made.port)), hosts=hosts, flags=("-r", regex) if regex else ())

        def said(host):
            try:
                with asker.link() as link:
                    stream = link.open("%s:%d" % (host, made.port))
                    stream.wait_opened()
                    return stream.receive()
            except peer.PeerError as error:
                return error.text
        # Twice: what a look-up gave for one question must not answer another.
        for _ in range(2):
            assert {host: said(host) for host in outcomes} == outcomes
        assert asker.udp("%s:%d" % (INSIDE, made.port)) == NOT_ALLOWED if outcomes.get(INSIDE) == NOT_ALLOWED else True
        outer.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("regex, options, expected", [
    (None, 'permitopen="127.0.0.1:PORT"', {P}),
    (".*", 'permitopen="127.0.0.1:PORT"', {P}),
    (r"127\.0\.0\.1:PORT", "", {P}),
    (r"127\.0\.0\.1", 'permitopen="127.0.0.1:PORT"', {P}),
    (r".*:OTHER", 'permitopen="127.0.0.1:PORT"', set()),
    (r"127\.0\.0\.1:PORT", 'permitopen="*:*"', {P}),
    (r"localhost", 'permitopen="127.0.0.1:*"', set()),
    (r".*:(PORT|OTHER)", 'permitopen="127.0.0.1:PORT" permitopen="127.0.0.1:OTHER"', {P, Q}),
])
def test_the_regex_and_permitopen_must_both_allow(regex, options, expected, asking, tcp_echo, second_echo, udp_twin):
    fill = lambda text: text.replace("PORT", str(tcp_echo.port)).replace("OTHER", str(second_echo.port))  # noqa: E731
    asker, server = asking("KEY " + fill(options), flags=("-r", fill(regex)) if regex else ())
    outcomes = {P: asker.tcp("127.0.0.1:%d" % tcp_echo.port), Q: asker.tcp("127.0.0.1:%d" % second_echo.port)}
    assert outcomes == {what: OPENED if what in expected else NOT_ALLOWED for what in outcomes}
    assert asker.udp("127.0.0.1:%d" % tcp_echo.port) == (OPENED if P in expected else NOT_ALLOWED)


def test_a_target_that_is_not_listed(serve, connect, authorized, tcp_echo, second_echo, udp_twin, udp_echo):
    """As both operators see it: the client learns that it may not, the server's log says why, and what is allowed goes on working."""
    authorized('KEY permitopen="127.0.0.1:%d" permitopen="secret-name.example:1" alice@laptop' % tcp_echo.port)
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port, "0:%d" % second_echo.port, "0:%d" % udp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))
    with dial(tcp_port(client)) as running:
        running.sendall(b"!")
        receive_exactly(running, 1)
        assert_refused(tcp_port(client, 2))
        client.wait_for(r"127\.0\.0\.1:%d.*%s" % (second_echo.port, NOT_ALLOWED))
        reason = server.wait_for(r"\u274c.*127\.0\.0\.1:%d.*refused: (.*)" % second_echo.port).group(1)
        assert reason and NOT_ALLOWED not in reason
        with udp_originator(client, 3) as refused, udp_originator(client) as allowed:
            refused.send(b"?")
            client.wait_for(r"127\.0\.0\.1:%d.*%s" % (udp_echo.port, NOT_ALLOWED))
            server.wait_for(r"\u274c.*127\.0\.0\.1:%d.*refused: ." % udp_echo.port)
            ask_by_udp(allowed)
        running.sendall(b"!")
        receive_exactly(running, 1)
    ask(tcp_port(client))
    assert (second_echo.accepted, udp_echo.seen) == (0, 0)
    # Nothing of the policy shows at the client.
    for secret in ("secret-name", "permit", "alice"):
        assert secret not in client.output


@pytest.mark.parametrize("cause, options, flags, target", [
    ("unlisted", 'permitopen="db:1"', (), "tcp 127.0.0.1:9"),
    ("regex", "", ("-r", "db"), "tcp 127.0.0.1:9"),
    ("no-udp", "no-udp", (), "udp 127.0.0.1:9"),
    ("unix", "", (), "tcp unix:/tmp/x"),
    ("no target", "", (), "tcp ;;"),
    ("no target for UDP", "", (), "udp ;;"),
    ("listen", "", (), "listen 127.0.0.1:0"),
])
def test_all_refusals_share_one_text(cause, options, flags, target, asking):
    asker, server = asking("KEY %s alice@laptop" % options, flags=flags)
    kind, _, text = target.partition(" ")

    def listen(text):
        try:
            with asker.link() as link:
                return link.listen(text, b"instance")
        except peer.PeerError as error:
            return error.text
    outcome = {"tcp": asker.tcp, "udp": asker.udp, "listen": listen}[kind](text)
    assert outcome == NOT_ALLOWED, cause
    # The operator is told more.
    assert server.wait_for(r"\u274c.*refused: (.*)").group(1) not in ("", NOT_ALLOWED)


def test_keys_do_not_share_what_they_may(serve, keys, authorized, tcp_echo, second_echo, tmp_path):
    """Alternately, for the same targets: an answer that is remembered for one key must not be another's."""
    other = make_keys(tmp_path / "other")
    authorized('KEY permitopen="127.0.0.1:%d"' % tcp_echo.port, '%s permitopen="127.0.0.1:%d"' % (other.public, second_echo.port))
    _, port = serve()
    askers = [Asker(port, seed_of(who)) for who in (keys.client, other)]
    for _ in range(3):
        assert [asker.tcp("127.0.0.1:%d" % made.port) for made in (tcp_echo, second_echo) for asker in askers] == \
            [OPENED, NOT_ALLOWED, NOT_ALLOWED, OPENED]
    authorized('KEY permitopen="127.0.0.1:%d"' % second_echo.port, other.public)
    for _ in range(2):
        assert [asker.tcp("127.0.0.1:%d" % made.port) for made in (tcp_echo, second_echo) for asker in askers] == \
            [NOT_ALLOWED, OPENED, OPENED, OPENED]


def test_a_changed_file_counts_at_the_next_stream_of_a_link(asking, authorized, tcp_echo):
    """Not only at the next handshake: links live for an hour."""
    asker, _ = asking("KEY")
    with asker.link() as link:
        assert link.exchange("127.0.0.1:%d" % tcp_echo.port, b"?") == b"?"
        authorized('KEY permitopen="127.0.0.1:1"')
        with pytest.raises(peer.PeerError, match=NOT_ALLOWED):
            link.open("127.0.0.1:%d" % tcp_echo.port).wait_opened()
    authorized('KEY permitopen="127.0.0.1:%d"' % tcp_echo.port)
    assert asker.tcp("127.0.0.1:%d" % tcp_echo.port) == OPENED


# ---------------------------------------------------------------------------------------------------- no-udp, no-legacy, comments


def test_no_udp(serve, connect, authorized, tcp_echo, udp_twin):
    authorized("KEY no-udp alice@laptop")
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))
    with udp_originator(client) as originator:
        originator.send(b"?")
        client.wait_for(NOT_ALLOWED)
        server.wait_for(r"\u274c.*refused: .*no-udp")
    ask(tcp_port(client))
    # Once the line allows it, it works without another client, from another originator.
    authorized("KEY alice@laptop")
    with udp_originator(client) as originator:
        ask_by_udp(originator)


@pytest.mark.parametrize("mode", [LEGACY, LEGACY_E], ids=lambda mode: mode.name)
def test_no_legacy(mode, serve, connect, authorized, tcp_echo, udp_twin):
    authorized("KEY no-legacy alice@laptop")
    server, port = serve(*mode.serve)
    refused = connect(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    assert refused.wait() == AUTHENTICATION_FAILED
    refused.wait_for("no-legacy")
    server.wait_for("no-legacy")
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))
    with udp_originator(client) as originator:
        ask_by_udp(originator)
    # A second line that allows it counts.
    authorized("KEY no-legacy", 'KEY permitopen="127.0.0.1:%d"' % tcp_echo.port)
    again = connect(port, "0:%d" % tcp_echo.port, flags=mode.connect)
    again.wait_for(READY)
    ask(tcp_port(again))


@pytest.mark.parametrize("mode", [LEGACY, LEGACY_E], ids=lambda mode: mode.name)
def test_options_hold_over_legacy_too(mode, forward, authorized, tcp_echo, second_echo, udp_twin, udp_echo):
    authorized('KEY permitopen="127.0.0.1:%d"' % tcp_echo.port)
    server, client = forward(mode, "0:%d" % tcp_echo.port, "0:%d" % second_echo.port, "0:%d" % udp_echo.port)
    ask(tcp_port(client))
    assert_refused(tcp_port(client, 2))
    client.wait_for(NOT_ALLOWED)
    server.wait_for(r"127\.0\.0\.1:%d.*refused: " % second_echo.port)
    with udp_originator(client) as allowed, udp_originator(client, 3) as refused:
        ask_by_udp(allowed)
        refused.send(b"?")
        client.wait_for(NOT_ALLOWED, 2)
    authorized("KEY no-udp")
    ask(tcp_port(client, 2))
    with udp_originator(client) as originator:
        originator.send(b"?")
        server.wait_for("refused: .*no-udp")
    ask(tcp_port(client))
    assert (second_echo.accepted, udp_echo.seen) == (1, 0)


@pytest.mark.parametrize("mode", [LEGACY, None], ids=["legacy", "ratrod2"])
def test_only_the_comment_shows_beside_the_key(mode, serve, connect, authorized, keys):
    server, port = serve("-v", *(mode.serve if mode else ()))
    for line, shown in [("KEY alice@laptop", " (alice@laptop)"), ("KEY no-udp  bob's   other machine", " (bob's other machine)"),
                        ("KEY no-udp", ""), ("KEY", ""), ('KEY permitopen="*:*" \u6771\u4eac', " (\u6771\u4eac)"), ("KEY eve\x1b[2J\x07", None)]:
        authorized(line)
        server.lines.clear()
        assert connect(port, flags=mode.connect if mode else ()).wait() == 0
        said = server.wait_for("Accepted.*key (.*?), cipher").group(1)
        assert shown is None or said == "`%s`%s" % (keys.client.public, shown)
        assert "\x1b" not in server.output and "\x07" not in server.output


def test_the_comment_shows_where_a_key_is_refused_by_it(asking, keys):
    """Who it was is what an operator wants to know of a refusal."""
    asker, server = asking('KEY permitopen="db:1" alice@laptop')
    assert asker.tcp("127.0.0.1:9") == NOT_ALLOWED
    server.wait_for(r"\u274c.*127\.0\.0\.1:9.*refused: .*")


# ---------------------------------------------------------------------------------------------------- files that change, keys that expire


class Remote:
    """A UDP target in the hands of the test: through() says from which socket of the server a question came, so whether it is the same session."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def through(self, originator, question=b"?"):
        originator.send(question)
        data, address = self.socket.recvfrom(100)
        assert data == question
        self.socket.sendto(b"answer", address)
        assert originator.recv(100) == b"answer"
        return address


@pytest.fixture
def remote():
    made = Remote()
    with made.socket:
        yield made


def test_udp_sessions_that_are_not_allowed_any_more_end(serve, connect, keys, authorized, tmp_path, udp_echo, remote):
    """The others of the same link go on, and so do another key's."""
    other = make_keys(tmp_path / "other")
    authorized("KEY", other.public)
    _, port = serve()
    client = connect(port, "0:%d" % udp_echo.port, "0:%d" % remote.port)
    client.wait_for(READY)
    with udp_originator(client) as losing, udp_originator(client, 2) as keeping, Asker(port, seed_of(other)).link() as bystander:
        bystander.open_udp()
        bystander.session(1, "127.0.0.1:%d" % udp_echo.port)
        bystander.datagrams((1, b"?"))
        assert bystander.read_udp() == (peer.DATAGRAMS, [(1, b"?")])
        ask_by_udp(losing)
        session = remote.through(keeping)
        seen = udp_echo.seen
        authorized('KEY permitopen="127.0.0.1:%d"' % remote.port, other.public)
        # By itself, not when the next datagram comes.
        client.wait_for("127.0.0.1:%d.*%s" % (udp_echo.port, NOT_ALLOWED))
        losing.send(b"?")
        assert remote.through(keeping) == session
        bystander.datagrams((1, b"!"))
        assert bystander.read_udp() == (peer.DATAGRAMS, [(1, b"!")])
        assert udp_echo.seen == seen + 1
    assert not re.search(r"127\.0\.0\.1:%d.*%s" % (remote.port, NOT_ALLOWED), client.output)


def test_no_udp_that_is_added_ends_the_sessions_and_no_stream(serve, connect, authorized, tcp_echo, udp_twin):
    authorized("KEY alice")
    _, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    with dial(tcp_port(client)) as running, udp_originator(client) as originator:
        running.sendall(b"!")
        receive_exactly(running, 1)
        ask_by_udp(originator)
        authorized("KEY no-udp alice")
        client.wait_for(NOT_ALLOWED)
        running.sendall(b"!")
        receive_exactly(running, 1)
    ask(tcp_port(client))


def test_other_changes_end_nothing(serve, connect, authorized, tcp_echo, remote):
    """A comment, an option that allows as much, a line more: streams and sessions are not disturbed."""
    authorized("KEY alice")
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port, "0:%d" % remote.port)
    client.wait_for(READY)
    with dial(tcp_port(client)) as running, udp_originator(client, 2) as originator:
        session = remote.through(originator)
        lines = "KEY alice", "KEY bob", 'KEY permitopen="127.0.0.1:%d" bob' % remote.port, 'KEY no-legacy expires="%s"' % day(2), "KEY alice"
        for n, line in enumerate(lines):
            # The server has seen the file once it has complained of its second line.
            authorized(line, "KEY no-shell-%d" % n)
            server.wait_for("authorizes nobody.*no-shell-%d" % n)
            running.sendall(b"!")
            receive_exactly(running, 1)
            assert remote.through(originator) == session


def test_a_stream_ends_when_its_key_becomes_one_that_expired(serve, connect, authorized, tcp_echo, udp_echo):
    """As one that is removed: the stream is reset, and the client ends once it is told."""
    authorized('KEY expires="%s"' % day(2))
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port, "0:%d" % udp_echo.port)
    client.wait_for(READY)
    with dial(tcp_port(client)) as running, udp_originator(client, 2) as originator:
        running.sendall(b"!")
        receive_exactly(running, 1)
        ask_by_udp(originator)
        authorized('KEY expires="%s"' % day(0))
        with pytest.raises(ConnectionResetError):
            running.recv(1)
        assert_told(client, server, HAS_EXPIRED)


HAS_EXPIRED = "line 1 of the server's authorized_keys is this client's, and has expired"


def assert_told(client, server, why="the server does not know this client's key"):
    def ended():
        with contextlib.suppress(OSError):
            dial(tcp_port(client)).close()
        return client.process.poll() is not None
    eventually(ended, "the client ended")
    assert client.wait() == AUTHENTICATION_FAILED
    client.wait_for(why)
    assert server.process.poll() is None


def test_a_bad_option_that_is_added_to_a_line_ends_its_streams(serve, connect, authorized, tcp_echo):
    """A line that authorizes nobody authorizes nobody from the moment it is read."""
    authorized("KEY alice")
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    with dial(tcp_port(client)) as running:
        running.sendall(b"!")
        receive_exactly(running, 1)
        authorized("KEY no-shell alice")
        with pytest.raises(ConnectionResetError):
            running.recv(1)
    server.wait_for("WARN +line 1 of .* authorizes nobody: ")
    assert_told(client, server)


@pytest.mark.parametrize("expires", [day(0), day(-1), "2000-01-01"], ids=["today", "yesterday", "long ago"])
def test_a_key_that_expired(expires, serve, connect, authorized, keys, tcp_echo):
    authorized("# the laptop", 'KEY expires="%s" alice@laptop' % expires)
    server, port = serve()
    client = connect(port, "0:%d" % tcp_echo.port)
    assert client.wait() == AUTHENTICATION_FAILED
    for program in (server, client):
        program.wait_for("line 2 of the server's authorized_keys is this client's, and has expired: %s" % keys.client.public)
    authorized('KEY expires="%s" alice@laptop' % day(2))
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    ask(tcp_port(client))


# The server's clock, set so that midnight UTC is `seconds` away from its start.
SHIFTED = """
import sys, time
real = time.time
offset = 86400 - real() % 86400 - float(sys.argv[1])
time.time = lambda: real() + offset
import ratrod
sys.exit(ratrod.main(sys.argv[2:]))
"""


def test_a_key_that_expires_while_it_is_in_use(start, keys, connect, authorized, tcp_echo, udp_echo):
    """At 00:00 UTC, by the server's clock, with nothing written anywhere: stream, session and link end, and the client is told."""
    midnight = 4
    authorized('KEY expires="%s" alice@laptop' % day(1))
    server = start(sys.executable, "-c", SHIFTED, str(midnight), "-k", keys.server.path, "serve", "127.0.0.1:0", cwd=str(ROOT))
    client = connect(int(server.wait_for(STARTED).group(1)), "0:%d" % tcp_echo.port, "0:%d" % udp_echo.port)
    client.wait_for(READY)
    with dial(tcp_port(client)) as running, udp_originator(client, 2) as originator:
        running.sendall(b"!")
        receive_exactly(running, 1)
        ask_by_udp(originator)
        with pytest.raises(ConnectionResetError):
            running.recv(1)
    assert_told(client, server, HAS_EXPIRED)


# ---------------------------------------------------------------------------------------------------- unix: targets


@pytest.fixture
def folder():
    """A short path: a Unix socket's has at most 107 bytes."""
    made = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def unix_echo(folder):
    made = UnixTarget(echo, folder + "/echo.sock")
    yield made
    made.close()


@pytest.mark.parametrize("options, regex, expected", [
    # Who lets clients reach every host has not thought of its Docker socket.
    ("", None, NOT_ALLOWED),
    ("", ".*", NOT_ALLOWED),
    ("", ".*|x", NOT_ALLOWED),
    ("", "(unix|tcp).*", NOT_ALLOWED),
    ("", ".{5}/.*", NOT_ALLOWED),
    ("", "PATH", NOT_ALLOWED),
    ('permitopen="*:*"', None, NOT_ALLOWED),
    ('permitopen="*:*"', ".*", NOT_ALLOWED),
    ('permitopen="unix:PATH.other"', None, NOT_ALLOWED),
    ('permitopen="unix:FOLDER"', None, NOT_ALLOWED),
    ("", "unix:PATH", OPENED),
    ("", "unix:.*", OPENED),
    ("", ".*|unix:.*", OPENED),
    ("", "unix:FOLDER", NOT_ALLOWED),
    ("", "nix:PATH|unix:", NOT_ALLOWED),
    ("no-udp", "unix:PATH", OPENED),
    ('permitopen="unix:PATH"', None, OPENED),
    ('permitopen="unix:PATH"', ".*", OPENED),
    ('permitopen="127.0.0.1:1" permitopen="unix:PATH" no-udp', None, OPENED),
    # With both given, both must allow.
    ('permitopen="unix:PATH"', "unix:PATH", OPENED),
    ('permitopen="unix:PATH"', r"127\.0\.0\.1", NOT_ALLOWED),
    ('permitopen="unix:PATH"', "unix:/other", NOT_ALLOWED),
    ('permitopen="unix:/other"', "unix:PATH", NOT_ALLOWED),
    ('permitopen="*:*"', "unix:PATH", NOT_ALLOWED),
])
def test_unix_targets_are_closed_unless_they_are_named(options, regex, expected, asking, unix_echo, folder, tcp_echo):
    fill = lambda text: text.replace("PATH", unix_echo.path).replace("FOLDER", folder)  # noqa: E731
    asker, server = asking("KEY " + fill(options), flags=("-r", fill(regex)) if regex else ())
    target = "unix:" + unix_echo.path
    assert asker.tcp(target) == expected
    # Datagrams have no such target.
    assert asker.udp(target) == NOT_ALLOWED
    if expected == OPENED:
        assert asker.exchange(target) == b"anybody there?"
    else:
        assert unix_echo.accepted == 0
        server.wait_for(r"\u274c.*%s.*refused: " % re.escape(unix_echo.path))
    # A rule for a socket opens nothing else, and no socket's rule closes what -r leaves open.
    open_to_tcp = "127" not in options and ("*:*" in options or "unix:" not in options) and regex in (None, ".*", ".*|x", ".*|unix:.*")
    assert asker.tcp("127.0.0.1:%d" % tcp_echo.port) == (OPENED if open_to_tcp else NOT_ALLOWED)


EVERYTHING = ("-r", r"(?s:.*)|unix:.*")


def test_odd_spellings_of_unix_targets(asking, unix_echo, folder, tcp_echo):
    """All of them would reach the socket, if they came as far as connect(); one path has one spelling, or a rule for it means nothing."""
    os.mkdir(folder + "/a")
    os.symlink("echo.sock", folder + "/link:")
    name = os.path.basename(folder)
    path = unix_echo.path
    paths = [
        folder + "/a/../echo.sock", folder + "//echo.sock", "//" + folder[1:] + "/echo.sock", "/" + path, folder + "/./echo.sock",
        "/./tmp/%s/echo.sock" % name, "/tmp/../tmp/%s/echo.sock" % name, "/../tmp/%s/echo.sock" % name, path + "/", path + "/.", folder + "/link:",
        folder[1:] + "/echo.sock", "echo.sock", "./echo.sock", "../" + name + "/echo.sock", "~/echo.sock", "", "/.", ".", "..", "/..", "///", "//",
        "\0" + path, "@abstract", path + "\0", path + "\0x", "/\0", path + "\n", "\n" + path, path + "\t", path + "\x7f", path + "\x1b[2J",
        path + ":80", ":" + path, "/" + "a" * 200, "/" + "a" * 100, "/" + "\u00e9" * 50, "/" + "a" * 1000, folder + "/a/..",
        folder + "/...//echo.sock",
    ]
    targets = ["unix:" + odd for odd in paths] + [
        "UNIX:" + path, "Unix:" + path, " unix:" + path, "unix: " + path, "unix :" + path, path, "[unix]:" + path, "unix:[%s]" % path,
        "unix://" + path, "unix:localhost" + path, "\ufb01:" + path, "unix\0:" + path, "\uff55nix:" + path, "tcp unix:" + path, "udp unix:" + path,
        "unix:unix:" + path,
    ]
    asker, server = asking("KEY", flags=EVERYTHING)
    with asker.link():
        outcomes = {target: asker.tcp(target) for target in targets}
        assert {target: outcome for target, outcome in outcomes.items() if outcome != NOT_ALLOWED} == {}
        assert unix_echo.accepted == 0
        assert asker.exchange("unix:" + unix_echo.path) == b"anybody there?"
        assert asker.exchange("127.0.0.1:%d" % tcp_echo.port) == b"anybody there?"
    # Not one character of theirs on the operator's terminal.
    assert not re.search("[\0-\x08\x0b-\x1f\x7f]", server.output)


def test_a_path_that_is_as_long_as_may_be(asking, folder, tcp_echo):
    """100 bytes, whatever the alphabet."""
    for fill in ("a", "\u00e9"):
        path = folder + "/"
        path += fill * ((100 - len(path)) // len(fill.encode()))
        path += "a" * (100 - len(path.encode()))
        made = UnixTarget(echo, path)
        try:
            asker, _ = asking('KEY permitopen="unix:%s"' % path)
            assert asker.exchange("unix:" + path) == b"anybody there?"
            assert asker.tcp("unix:%sb" % path[:-1]) == NOT_ALLOWED
        finally:
            made.close()


def test_unix_targets_that_fail(asking, folder, unix_echo):
    """Allowed, and nobody there: told as any target's failure is, and the server goes on."""
    with open(folder + "/file", "w"), socket.socket(socket.AF_UNIX) as stale:
        stale.bind(folder + "/stale")
        asker, server = asking("KEY", flags=EVERYTHING)
        for name in ("nothing", "file", "stale", "", "no/folder"):
            path = (folder + "/" + name).rstrip("/")
            assert asker.tcp("unix:" + path) == FAILED, name
            server.wait_for(r"\u274c.*unix:%s" % re.escape(path))
        assert asker.exchange("unix:" + unix_echo.path) == b"anybody there?"


def test_a_unix_target_of_a_real_client(serve, connect, authorized, unix_echo, tcp_echo):
    """Open while the file names it, closed from the moment it does not."""
    authorized('KEY permitopen="unix:%s" permitopen="127.0.0.1:%d" alice@laptop' % (unix_echo.path, tcp_echo.port))
    server, port = serve()
    client = connect(port, "0:unix:" + unix_echo.path, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    first, second = tcp_port(client), tcp_port(client, 2)
    ask(first, os.urandom(300_000))
    ask(second)
    authorized('KEY permitopen="127.0.0.1:%d" alice@laptop' % tcp_echo.port)
    assert_refused(first)
    client.wait_for(NOT_ALLOWED)
    server.wait_for(r"\u274c.*unix:%s.*refused: " % re.escape(unix_echo.path))
    ask(second)
