"""What authorized_keys lets each key do: options, files that change, keys that expire, `unix:` targets, at real servers.
What each line says is in unit/test_core_grants.py, names that resolve to what is not allowed in peers/test_names.py."""

import contextlib
import datetime
import re
import signal

import pytest

from support import ratrod2_peer as peer
from support.keys import base64url, seed_of
from support.programs import AUTHENTICATION_FAILED, LEGACY, LEGACY_E, PYTHON, RATROD2, ROOT, STARTED, either_wire, tcp_port, udp_originator
from support.rows import assert_raises
from support.sockets import ask, ask_udp, assert_refused, dial, ping
from support.targets import UdpEcho, echo

pytestmark = pytest.mark.usefixtures("no_traceback")

# What comes of asking for a target. A refusal by policy has one text, whatever its reason: anything else would tell a client what the policy is.
NOT_ALLOWED = "not allowed by this server"
OPENED, FAILED, UNKNOWN_KEY = "opened", "allowed, but cannot be reached", "unknown key"


def day(n):
    return (datetime.datetime.now(datetime.timezone.utc).date() + datetime.timedelta(days=n)).isoformat()


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

    def listen(self, address):
        return self._outcome(lambda link: link.listen(address, b"instance") and OPENED)

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


def reread(server):
    """Awaits that the server has looked at its lists once more: by itself it does so once a second, and nothing announces that."""
    count = server.output.count("Read again")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("Read again", count + 1)


@pytest.fixture
def not_let_in(client):
    """not_let_in(port, what the client's log says, flags=()): it ends with the code of that."""
    def launch(port, said, flags=()):
        refused = client(port, "0:127.0.0.1:9", flags=flags)
        assert refused.wait() == AUTHENTICATION_FAILED
        refused.wait_for(said)
    return launch


@pytest.fixture
def tcp_echo(target, stack):
    """With a UDP echo on the same port."""
    while True:
        made = target(echo)
        with contextlib.suppress(OSError):  # for UDP it may be another program's
            stack.enter_context(contextlib.closing(UdpEcho(port=made.port)))
            return made


def test_a_bad_line_is_named_with_its_number_again_when_the_file_changed(serve, authorized, keys):
    complaint = r"WARN +line %d of `%s` authorizes nobody: .*" % (3, re.escape(str(keys.server.path / "authorized_keys")))
    authorized("# a file", "", "KEY no-shell alice")
    server, port = serve()
    asker = Asker(port, seed_of(keys.client))
    assert "no-shell" in server.wait_for(complaint).group()
    assert asker.comes_in() == UNKNOWN_KEY
    authorized("# a file", "KEY no-udp alice", "KEY expires=\"soon\" \x1b[2J\x1b]0;owned\x07 alice")
    assert asker.comes_in() == OPENED
    server.wait_for(complaint, 2)
    authorized("# a file", "KEY no-udp alice", "KEY permitlisten=\"nowhere\"")
    server.wait_for(complaint, 3)
    # A folder in place of the file has no lines. It is not complained of over and over, and nor is what the file said before.
    (keys.server.path / "authorized_keys").unlink()
    (keys.server.path / "authorized_keys").mkdir()
    assert asker.comes_in() == UNKNOWN_KEY
    for _ in range(3):
        reread(server)
    assert (server.output.count("authorizes nobody"), server.output.count("cannot be read, which counts as empty")) == (3, 1)
    # Whoever may write a line there still does not write on the operator's terminal.
    assert "\x1b" not in server.output and "\x07" not in server.output


@either_wire
def test_a_target_that_is_not_listed(forward, authorized, target, tcp_echo, udp_echo, mode):
    """As both operators see it: the client learns that it may not, the server's log says why, and what is allowed goes on working."""
    second_echo = target(echo)
    authorized('KEY permitopen="127.0.0.1:%d" permitopen="secret-name.example:1" alice@laptop' % tcp_echo.port)
    server, client = forward(mode, "0:%d" % tcp_echo.port, "0:%d" % second_echo.port, "0:%d" % udp_echo.port)
    ask(tcp_port(client))
    with dial(tcp_port(client)) as running:
        ping(running)
        assert_refused(tcp_port(client, 2))
        client.wait_for(r"127\.0\.0\.1:%d.*%s" % (second_echo.port, NOT_ALLOWED))
        reason = server.wait_for(r"\u274c.*127\.0\.0\.1:%d.*refused: (.*)" % second_echo.port).group(1)
        assert reason and NOT_ALLOWED not in reason
        with udp_originator(client, 3) as refused, udp_originator(client) as allowed:
            refused.send(b"?")
            client.wait_for(r"127\.0\.0\.1:%d.*%s" % (udp_echo.port, NOT_ALLOWED))
            server.wait_for(r"\u274c.*127\.0\.0\.1:%d.*refused: ." % udp_echo.port)
            ask_udp(allowed)
        ping(running)
    ask(tcp_port(client))
    assert (second_echo.accepted, udp_echo.seen) == (0, 0)
    authorized("KEY")
    reread(server)
    ask(tcp_port(client, 2))
    # Nothing of the policy shows at the client.
    for secret in ("secret-name", "permit", "alice"):
        assert secret not in client.output


def test_all_refusals_share_one_text(serve, keys):
    """The operator is told more."""
    options = {"unlisted": 'permitopen="db:1"', "no-udp": "no-udp", "nothing": "", "no listening": 'permitlisten="1"'}
    seeds = {name: bytes([n]) * 32 for n, name in enumerate(options)}
    keys.server.write("authorized_keys", "".join(
        "%s %s alice@laptop\n" % (base64url(peer.Identity.from_seed(seeds[name]).public), options[name]) for name in options))
    for flags, cases in (
            ((), [("unlisted", "tcp", "127.0.0.1:9"), ("no-udp", "udp", "127.0.0.1:9"), ("nothing", "listen", "127.0.0.1:0"),
                  *(("nothing", kind, nonsense) for kind in ("tcp", "udp") for nonsense in (";;", "unix:/tmp/x"))]),
            (("-r", "db", "--allow-listen"), [("nothing", "tcp", "127.0.0.1:9"), ("no listening", "listen", "127.0.0.1:0")])):
        server, port = serve(*flags)
        for n, (name, kind, target) in enumerate(cases, 1):
            assert getattr(Asker(port, seeds[name]), kind)(target) == NOT_ALLOWED, (name, kind, target)
            assert server.wait_for(r"\u274c.*refused: (.*)", n).group(1) not in ("", NOT_ALLOWED), (name, kind, target)


def test_keys_do_not_share_what_they_may(serve, keys, second, authorized, tcp_echo, target):
    """Alternately, for the same targets: an answer that is remembered for one key must not be another's."""
    one, another = ("127.0.0.1:%d" % made.port for made in (tcp_echo, target(echo)))
    authorized('KEY permitopen="%s"' % one, '%s permitopen="%s"' % (second.public, another))
    server, port = serve()
    askers = [Asker(port, seed_of(who)) for who in (keys.client, second)]
    for _ in range(2):
        assert [asker.tcp(where) for where in (one, another) for asker in askers] == [OPENED, NOT_ALLOWED, NOT_ALLOWED, OPENED]
    authorized('KEY permitopen="%s"' % another, second.public)
    for _ in range(2):
        assert [asker.tcp(where) for where in (one, another) for asker in askers] == [NOT_ALLOWED, OPENED, OPENED, OPENED]
    # Not only at the next handshake: links live for an hour.
    with askers[0].link() as link:
        assert link.exchange(another, b"?") == b"?"
        authorized('KEY permitopen="%s"' % one)
        reread(server)
        assert_raises(peer.PeerError, NOT_ALLOWED, link.open(another).wait_opened)
    assert askers[0].tcp(one) == OPENED


@either_wire
def test_no_udp(forward, authorized, tcp_echo, mode, stack):
    """From the start; and added while sessions live, which ends them, but no stream."""
    authorized("KEY no-udp alice@laptop")
    server, client = forward(mode, "0:%d" % tcp_echo.port)
    with dial(tcp_port(client)) as running:
        ping(running)
        with udp_originator(client) as originator:
            originator.send(b"?")
            client.wait_for(NOT_ALLOWED)
            server.wait_for(r"\u274c.*refused: .*no-udp")
        ask(tcp_port(client))
        # Once the line allows it, it works without another client, from another originator.
        authorized("KEY alice@laptop")
        reread(server)
        with udp_originator(client) as originator:
            ask_udp(originator)
            authorized("KEY no-udp alice")
            reread(server)
            another = stack.enter_context(udp_originator(client))
            if mode is LEGACY:  # only sessions that begin are refused there
                another.send(b"?")
            client.wait_for(NOT_ALLOWED, 2)
        ping(running)
    ask(tcp_port(client))


def test_no_legacy(serve, client, not_let_in, authorized, tcp_echo):
    authorized("KEY no-legacy alice@laptop")
    server, port = serve(*LEGACY.serve)
    not_let_in(port, "no-legacy", LEGACY.connect)
    server.wait_for("no-legacy")
    taken = client(port, "0:%d" % tcp_echo.port).ready()
    ask(tcp_port(taken))
    with udp_originator(taken) as originator:
        ask_udp(originator)
    # A second line that allows it counts.
    authorized("KEY no-legacy", 'KEY permitopen="127.0.0.1:%d"' % tcp_echo.port)
    ask(tcp_port(client(port, "0:%d" % tcp_echo.port, flags=LEGACY_E.connect).ready()))


def through(remote, originator):
    """From which socket of the server a question comes, and so whether it is the same session."""
    originator.send(b"?")
    data, address = remote.receive()
    assert data == b"?"
    remote.socket.sendto(b"answer", address)
    assert originator.recv(100) == b"answer"
    return address


def test_udp_sessions_that_are_not_allowed_any_more_end(serve, client, second, authorized, udp_echo, remote, resolver):
    """The others of the same link go on, and so do another key's. A name that is still allowed leads to an address that is not."""
    authorized("KEY", second.public)
    _, port = serve(env=resolver(named_example=["127.0.0.1"]).environment)
    client = client(port, "0:%d" % udp_echo.port, "0:%d" % remote.port, "0:named.example:%d" % udp_echo.port).ready()
    with udp_originator(client) as losing, udp_originator(client, 2) as keeping, Asker(port, seed_of(second)).link() as bystander, \
            udp_originator(client, 3) as by_name:
        bystander.open_udp()
        bystander.session(1, "127.0.0.1:%d" % udp_echo.port)
        bystander.datagrams((1, b"?"))
        assert bystander.read_udp() == (peer.DATAGRAMS, [(1, b"?")])
        ask_udp(losing)
        ask_udp(by_name)
        session = through(remote, keeping)
        seen = udp_echo.seen
        authorized('KEY permitopen="127.0.0.1:%d" permitopen="named.example:*"' % remote.port, second.public)
        # By itself, not when the next datagram comes.
        for host in ("127.0.0.1", "named.example"):
            client.wait_for("%s:%d.*%s" % (host, udp_echo.port, NOT_ALLOWED))
        losing.send(b"?")
        assert through(remote, keeping) == session
        bystander.datagrams((1, b"!"))
        assert bystander.read_udp() == (peer.DATAGRAMS, [(1, b"!")])
        assert udp_echo.seen == seen + 1
    assert not re.search(r"127\.0\.0\.1:%d.*%s" % (remote.port, NOT_ALLOWED), client.output)


def test_other_changes_end_nothing(forward, authorized, tcp_echo, remote):
    """A comment, an option that allows as much, a line more: streams and sessions are not disturbed."""
    authorized("KEY alice")
    server, client = forward(RATROD2, "0:%d" % tcp_echo.port, "0:%d" % remote.port)
    with dial(tcp_port(client)) as running, udp_originator(client, 2) as originator:
        session = through(remote, originator)
        for line in ("KEY bob", 'KEY permitopen="127.0.0.1:%d" bob' % remote.port, 'KEY no-legacy expires="%s"' % day(2), "KEY alice"):
            authorized(line, "KEY no-shell")
            reread(server)
            ping(running)
            assert through(remote, originator) == session


# A server whose clock is a day ahead from the moment at which a file is there.
SHIFTED = """
import os, sys, time
real = time.time
time.time = lambda: real() + 86400 * os.path.exists(sys.argv[1])
import ratrod
sys.exit(ratrod.main(sys.argv[2:]))
"""
HAS_EXPIRED = "line 1 of the server's authorized_keys is this client's, and has expired"
BROKEN = "line 1 of the server's authorized_keys has this client's key but cannot be understood"


@pytest.mark.parametrize("line, why, flags", [
    ('KEY expires="%s"' % day(0), HAS_EXPIRED, ("--max-retry-count", "1")),
    ("# nobody", "the server does not know this client's key", ("--legacy", "--max-retry-count", "1")),
    # A line that authorizes nobody authorizes nobody from the moment it is read.
    ("KEY no-shell alice", BROKEN, ("--max-retry-interval", "1")),
    # At 00:00 UTC, by the server's clock, with nothing written anywhere.
    (None, HAS_EXPIRED, ("--max-retry-interval", "1"))], ids=["expired", "gone, legacy", "bad", "midnight"])
def test_a_key_that_may_not_come_in_any_more(start, keys, client, authorized, tcp_echo, udp_echo, tmp_path, line, why, flags):
    """Its streams are reset. The client says why, and ends where the number of tries is limited; otherwise it comes back with its key."""
    authorized('KEY expires="%s" alice@laptop' % day(1))
    server = start(PYTHON, "-c", SHIFTED, tmp_path / "tomorrow", "-k", keys.server.path, "serve", "--legacy", "127.0.0.1:0", cwd=str(ROOT))
    client = client(int(server.wait_for(STARTED).group(1)), "0:%d" % tcp_echo.port, "0:%d" % udp_echo.port, flags=flags).ready()
    port = tcp_port(client)
    with dial(port) as running, udp_originator(client, 2) as originator:
        ping(running)
        ask_udp(originator)
        if line:
            authorized(line)
        else:
            (tmp_path / "tomorrow").touch()
        pytest.raises(ConnectionResetError, running.recv, 1)
    if "--max-retry-count" in flags:
        with contextlib.suppress(OSError):  # legacy has no link that waits: a connection makes it try
            dial(port).close()
        assert client.wait() == AUTHENTICATION_FAILED, client.output
        client.wait_for("ERROR.*" + why)
    else:
        client.wait_for(r"ERROR .*-> `127.0.0.1:%d`: the client's key `.*` (has expired|stands in line 1 of authorized_keys)" % tcp_echo.port)
        client.wait_for("ERROR.*%s.*; trying again" % why)
        assert client.output.count("trying again") == 1, client.output
        if line:
            authorized("KEY alice@laptop")
        else:
            (tmp_path / "tomorrow").unlink()
        client.wait_for("Connected to server .* again")
        ask(port)
    if "no-shell" in (line or ""):
        server.wait_for("WARN +line 1 of .* authorizes nobody: ")
        server.wait_for("stands in line 1 of authorized_keys, which cannot be understood: [0-9]+ links? of it ended")
    assert server.process.poll() is None


def test_a_line_that_lets_nobody_in(serve, client, not_let_in, authorized, keys, tcp_echo):
    """Both sides name it: "add this line" would give a key that was to be narrowed all rights."""
    server, port = serve("--legacy")
    for line, said, flags in (
            ('KEY expires="%s" alice@laptop' % day(0), "is this client's, and has expired: KEY", ()),
            ('KEY permitopne="db:1" alice', "has this client's key but cannot be understood: KEY", ()),
            ("# mine\nKEYKEY", "has this client's key but cannot be understood: KEY", LEGACY.connect),
            ('"KEY"', "has this client's key but cannot be understood: KEY", ())):
        authorized("# the laptop", line)
        said = "line %d of the server's authorized_keys %s" % (2 + line.count("\n"), said.replace("KEY", keys.client.public))
        not_let_in(port, "ERROR.*" + said + "$", flags)
        server.wait_for("Refused .*" + said)
    # A list that counts as empty is no list that this key is missing in.
    (keys.server.path / "authorized_keys").unlink()
    (keys.server.path / "authorized_keys").mkdir()
    not_let_in(port, r"the server does not know this client's key \(its log says why\): " + keys.client.public)
    (keys.server.path / "authorized_keys").rmdir()
    authorized('KEY expires="%s" alice@laptop' % day(2))
    ask(tcp_port(client(port, "0:%d" % tcp_echo.port).ready()))
