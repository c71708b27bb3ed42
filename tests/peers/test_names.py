"""Hostile names: name servers that change their mind, and control characters in all that a peer can make us show.
The servers under test stand in a network namespace, whose only name server is the test's own. Odd spellings are in unit/test_spellings.py."""

import concurrent.futures
import contextlib
import ipaddress
import itertools
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import threading

import pytest

from support import legacy_peer, ratrod2_peer as peer
from support.keys import make_keys, seed_of
from support.many_lines import run_lines
from support.pressure import BlackHole
from support.programs import AUTHENTICATION_FAILED, PATIENCE, RATROD, STARTED
from support.sockets import dial, free_port, receive_all, say
from support.socks5 import socks_port
from support.spellings import HOSTILE, LONG, SHORT
from support.targets import Target, UdpEcho, says

A, CNAME, AAAA, ANY = 1, 5, 28, 255
REFUSED = "not allowed by this server"
NXDOMAIN, SERVFAIL = 3, 2


def encode_name(name):
    return b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split(".")) + b"\0"


def decode_name(data, at):
    """(the name at data[at:], where it ends); questions are not compressed."""
    labels = []
    while data[at]:
        labels.append(data[at + 1:at + 1 + data[at]].decode("latin-1"))
        at += 1 + data[at]
    return ".".join(labels).lower(), at + 1


class Answer:
    """What a name server says: addresses, in their order, of the name at the end of a chain of CNAMEs; or an error, or nothing, or other bytes."""

    def __init__(self, *addresses, aliases=(), code=0, hangs=False, raw=None):
        self.addresses = [ipaddress.ip_address(address) for address in addresses]
        self.aliases, self.code, self.hangs, self.raw = aliases, code, hangs, raw

    def encode(self, number, question, name, kind):
        records, owner = [], name
        for alias in self.aliases:
            records.append(encode_name(owner) + struct.pack(">HHIH", CNAME, 1, 0, len(encode_name(alias))) + encode_name(alias))
            owner = alias
        for address in self.addresses:
            if kind == (A if address.version == 4 else AAAA):
                records.append(encode_name(owner) + struct.pack(">HHIH", kind, 1, 0, len(address.packed)) + address.packed)
        return struct.pack(">HHHHHH", number, 0x8180 | self.code, 1, len(records), 0, 0) + question + b"".join(records)


class NameServer:
    """On port 53 of the namespace. `names[name]`: the Answer of each look-up, the last one for all that follow; others have `default`."""

    def __init__(self, namespace):
        self.names, self.default = {}, Answer(code=NXDOMAIN)
        self.asked = {}
        self._socket = namespace.make(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            data, origin = self._socket.recvfrom(4096)
            if not data:
                return
            name, end = decode_name(data, 12)
            kind, = struct.unpack_from(">H", data, end)
            count = self.asked[name, kind] = self.asked.get((name, kind), 0) + 1
            answers = self.names.get(name, (self.default,))
            answer = answers[min(count, len(answers)) - 1]
            if not answer.hangs:
                number, = struct.unpack_from(">H", data)
                whole = answer.encode(number, data[12:end + 4], name, kind)
                self._socket.sendto(whole if answer.raw is None else answer.raw(whole), origin)

    def look_ups(self, name):
        """How often a name was looked up: the questions for both kinds of addresses are one."""
        return max(self.asked.get((name, kind), 0) for kind in (A, AAAA))

    def close(self):
        self._socket.sendto(b"", self._socket.getsockname())


class Witness:
    """Listens on all addresses of where it is made, by TCP and UDP, on one port. Connections and datagrams are `seen`, and told a word."""

    def __init__(self, make, word, port, host="::"):
        self.tcp, self.udp = make(Target, says(word), host, port), make(UdpEcho, host, port, word)

    @property
    def seen(self):
        return self.tcp.accepted + self.udp.seen

    def close(self):
        self.tcp.close()
        self.udp.close()


class Place:
    """A machine for servers under test. `inside` sees whatever reaches it; `outside`, on the same port of another machine, is what they may reach."""

    def __init__(self, namespace, names, start, keys):
        self.namespace, self.names, self._start, self.keys = namespace, names, start, keys
        self.address, self.outer = namespace.address, str(ipaddress.ip_address(namespace.address) - 1)
        self.port = free_port()
        self.outside = Witness(lambda function, *args: function(*args), b"outside", self.port, self.outer)
        self.inside = Witness(namespace.make, b"inside", self.port)
        self.server = self.server_port = None

    def close(self):
        for thing in (self.outside, self.inside, self.names):
            thing.close()

    def serve(self, *flags, options=""):
        """Starts a server there, whose client may do what `options` of its line say."""
        text = "%s %s\n" % (self.keys.client.public, options)
        self.keys.server.write("authorized_keys", text.replace("OUTER", self.outer).replace("PORT", str(self.port)))
        self.server = self._start(*self.namespace.command, *RATROD, "-v", "-k", self.keys.server.path, "serve", *flags, self.address + ":0")
        self.server_port = int(self.server.wait_for(STARTED).group(1))

    @contextlib.contextmanager
    def link(self):
        with peer.Client.connect(self.server_port, seed_of(self.keys.client), host=self.address) as link:
            yield link.handshake()

    def tcp(self, host):
        """What an Open of `host` leads to: who answers, or the text of the refusal."""
        with self.link() as link:
            try:
                return link.connect_to(self.target(host)).receive_all()
            except peer.PeerError as error:
                return error.text

    def udp(self, hosts):
        """The same of a session for each of several hosts, on one link."""
        answers = {}
        with self.link() as link:
            link.open_udp()
            for number, host in enumerate(hosts, 1):
                link.session(number, self.target(host))
                link.datagrams((number, b"?"))
                # One after the other, or the next one's answer may come first.
                kind, value = link.read_udp()
                if kind == peer.SESSION_ADDRESS:  # of a name
                    kind, value = link.read_udp()
                answers[host] = value[2] if kind == peer.SESSION_OVER else value[0][1]
        return answers

    def target(self, host):
        return "%s:%d" % (host, self.port)


@pytest.fixture
def place(namespace, start, keys):
    folder = pathlib.Path("/etc/netns") / namespace.name
    folder.mkdir(parents=True)
    try:
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\nsearch search.example\noptions timeout:1 attempts:1\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
        (folder / "nsswitch.conf").write_text("hosts: files dns\n")
        made = Place(namespace, NameServer(namespace), start, keys)
        yield made
        # While the namespace is there: what is in it holds it.
        for program in start.programs:
            program.stop()
            assert_harmless(program)
        made.close()
    finally:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


RESTRICTED = ("-r", r"(?:.*\.)?ok\.example|198\.18\..*")
LEADS_INSIDE = {
    "loopback": Answer("127.0.0.1"),
    "mapped": Answer("::ffff:127.0.0.1"),
    "unspecified": Answer("0.0.0.0"),
    "link-local": Answer("169.254.169.254"),
    "mapped link-local": Answer("::ffff:169.254.169.254"),
    "multicast": Answer("224.0.0.1", "ff02::1"),
    "an alias of localhost": Answer("127.0.0.1", "::1", aliases=("localhost",)),
    "many": Answer(*("127.0.0.%d" % n for n in range(1, 13))),
}


def test_no_answer_leads_inside(place):
    place.serve(options='permitopen="*.ok.example:*" permitopen="OUTER:*"')
    hosts = {"n%d.ok.example" % n: (what, answer) for n, (what, answer) in enumerate(LEADS_INSIDE.items())}
    place.names.names = {host: (answer,) for host, (_, answer) in hosts.items()}
    for host, (what, _) in hosts.items():
        assert place.tcp(host) == REFUSED, what
        assert place.names.look_ups(host) == 1, what
    assert place.udp(hosts) == dict.fromkeys(hosts, REFUSED)
    assert not place.inside.seen
    # Of several addresses only what is allowed is connected to, whatever their order.
    good, bad = place.outer, ("127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.1.1", "0.0.0.0", "::")
    place.names.names = {"several%d.ok.example" % n: (Answer(*order),) for n, order in enumerate(
        [(good,), (good, *bad), (*bad, good), (*bad[:3], good, *bad[3:]), ("::1", good), (good, "::1"), ("::ffff:127.0.0.1", "::ffff:" + good)])}
    for host in place.names.names:
        assert place.tcp(host) == b"outside", host
    assert set(place.udp(place.names.names).values()) == {b"outside"}
    assert not place.inside.seen


def test_an_answer_that_changes(place):
    """Rebinding: what was checked is what is connected to, and the next stream is checked anew, however short the answer was to live."""
    place.serve(*RESTRICTED)
    good, bad = Answer(place.outer), Answer("127.0.0.1", "::1")
    turns = (good, bad, good, bad, bad, good)
    for n, ask in enumerate((place.tcp, lambda host: place.udp([host])[host])):
        host = "rebound%d.ok.example" % n
        place.names.names[host] = turns
        for turn, answer in enumerate(turns, 1):
            assert ask(host) == (b"outside" if answer is good else REFUSED), turn
            assert place.names.look_ups(host) == turn, "not exactly one look-up for each"
    # A and AAAA are questions of their own: one is answered with what is allowed, the other with loopback.
    place.names.names = {"a.ok.example": (Answer(place.outer, "::1"),), "b.ok.example": (Answer("::ffff:" + place.outer, "127.0.0.1"),)}
    for host in place.names.names:
        assert place.tcp(host) == b"outside"
        assert {place.names.asked[host, kind] for kind in (A, AAAA)} == {1}
    # The name of a UDP session is looked up once for it, whatever it would lead to by the time of the next datagram.
    place.names.names["session.ok.example"] = Answer(place.outer), Answer("127.0.0.1")
    with place.link() as link:
        link.open_udp()
        link.session(1, place.target("session.ok.example"))
        for n in range(5):
            link.datagrams((1, b"?"))
            if n == 0:  # the client is told who answers, before the first answer
                assert link.read_udp() == (peer.SESSION_ADDRESS, (1, "%s:%d" % (place.outer, place.port)))
            assert link.read_udp() == (peer.DATAGRAMS, [(1, b"outside")])
        link.session(2, place.target("session.ok.example"))
        assert link.read_udp() == (peer.SESSION_OVER, (2, peer.INVALID_HOST, REFUSED))
    assert place.names.look_ups("session.ok.example") == 2
    assert not place.inside.seen


def cut(answer):
    return answer[:2] + bytes([answer[2] | 2]) + answer[3:20]


MISBEHAVES = {
    "no such name": Answer(code=NXDOMAIN),
    "its own failure": Answer(code=SERVFAIL),
    "an alias of itself": Answer(aliases=("n2.ok.example",)),
    "aliases without an end": Answer(aliases=tuple("a%d.example" % (n % 3) for n in range(50))),
    "an alias that is no name": Answer(aliases=("\x1b[2J", "a b", "localhost\n")),
    "half an answer": Answer("127.0.0.1", raw=cut),
    "another name's answer": Answer("127.0.0.1", raw=lambda answer: answer[:13] + b"X" + answer[14:]),
    "nonsense": Answer(raw=lambda answer: b"\xff" * 40),
    "silence": Answer(hangs=True),
    # On the cable, where nobody answers; the next address in the list would.
    "an address that is silent": Answer("198.18.255.254", "127.0.0.1"),
}


def test_name_servers_that_misbehave(place):
    """Each is an Error that names the target, while others are served; all look-ups go on at once. What does not answer, or refuses, is not
    replaced by what is forbidden."""
    place.serve("--connect-timeout", "3", *RESTRICTED)
    subprocess.run(["ip", "-n", place.namespace.name, "route", "add", "198.18.255.254", "dev", "eth0"], check=True)
    assert place.tcp(place.outer) == b"outside"  # from here on this machine is no stranger there, and may knock often
    hosts = {"n%d.ok.example" % n: what for n, what in enumerate(MISBEHAVES)}
    place.names.names = {host: (MISBEHAVES[what],) for host, what in hosts.items()}
    place.names.names["fine.ok.example"] = (Answer(place.outer),)
    with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
        asked = {host: pool.submit(place.tcp, host) for host in hosts}
        assert place.tcp(place.outer) == b"outside"
        for host, what in hosts.items():
            text = asked[host].result(PATIENCE)
            assert "cannot connect to the remote `%s:%d`" % (host, place.port) in text, (what, text)
    assert place.tcp("fine.ok.example") == b"outside"
    place.outside.tcp.close()
    place.names.names["closed.ok.example"] = (Answer(place.outer, "127.0.0.1", "::1"),)
    assert "cannot connect to the remote `closed.ok.example:%d`" % place.port in place.tcp("closed.ok.example")
    assert not place.inside.seen


def assert_fit(lines):
    """Lines that were shown are fit for a terminal, and short."""
    for line in lines:
        line = re.sub(r"\x1b\[[0-9;]*m", "", line)  # the colours are ours
        assert not line.startswith("marker"), "a line of somebody else's: %r" % line
        odd = [character for character in line if not character.isprintable()]
        assert not odd, "%r in the line %r" % (odd, line)
        assert len(line) < 1500 and "A" * 201 not in line, line


def assert_harmless(program):
    assert_fit(program.lines)
    assert not re.search("Traceback|internal error", program.output), program.output


@pytest.fixture
def shown(start):
    """Whatever a test does to a program: its output is harmless at the end. shown(program) also: it says what the marker stands for."""
    yield lambda program: program.wait_for("marker-before")
    for program in start.programs:
        program.stop()
        assert_harmless(program)


def connect_each(keys, lines):
    """[Outcome] of `connect -v` with each of these words, whose output is harmless."""
    outcomes = run_lines([["-k", keys.client.path, "connect", "-v", *words] for words in lines])
    for outcome in outcomes:
        assert outcome.out == ""
        assert_fit(outcome.err.split("\n"))
    return outcomes


@pytest.fixture
def hostile_server(target, keys):
    """hostile_server(play) -> `host:port` where play(link) does what it will on each link, from the client's first byte on."""
    def launch(play):
        def handle(connection):
            connection.settimeout(PATIENCE)
            with contextlib.suppress(peer.LinkEnded, peer.ProtocolError, peer.PeerError):
                play(peer.Server(connection, seed_of(keys.server)))
            peer.receive_to_end(connection)
        return "127.0.0.1:%d" % target(handle).port
    return launch


def test_what_a_server_says(connect, keys, hostile_server, shown):
    """An Error in place of completion; of a listener its refusal, the address it claims, and whom it claims a connection to come from."""
    def answering(answer):
        def play(link):
            stream = link.handshake().accept()
            if stream:  # the first link is only a test
                answer(link, stream)
        return hostile_server(play), "R:0:127.0.0.1:1"
    cases = [(code, HOSTILE) for code in range(5)] + [(0, LONG)]
    lines = [[hostile_server(lambda link, case=case: link.begin_handshake().fail(*case))] for case in cases]
    lines += answering(lambda link, stream: stream.fail(peer.INVALID_HOST, HOSTILE)), answering(lambda link, stream: stream.opened(HOSTILE))
    outcomes = connect_each(keys, lines)
    assert all("marker-before" in outcome.err for outcome in outcomes)
    assert [outcome.code for outcome in outcomes] == [AUTHENTICATION_FAILED if code == peer.INVALID_KEY else 1 for code, _ in cases] + [1, 1]
    def originate(link, _stream):
        link.grant_listen("127.0.0.1:9000")
        link.send_open(peer.TCP, HOSTILE)
        link.read_to_end()
        asked.set()
    asked = threading.Event()
    where, tunnel = answering(originate)
    connecting = connect(int(where.rpartition(":")[2]), "-v", tunnel)
    assert asked.wait(PATIENCE)
    shown(connecting)


BANNERS = {
    "ssh": b"SSH-2.0-marker\x1b[2J\x07\x9b31m\r\n" + b"A" * 500,
    "http": b"HTTP/1.1 400 Bad\x1b]0;evil\x07\r\n\r\n" + b"A" * 500,
    "escapes": b"\x1b[2J" * 100,
    "legacy Error": legacy_peer.frame(legacy_peer.encode(legacy_peer.Error(0, HOSTILE))),
    "legacy preamble": legacy_peer.frame(legacy_peer.encode(legacy_peer.ServerPreamble(SHORT, b"e" * 32, b"s" * 64, b"c" * 32))),
    "not UTF-8": legacy_peer.frame(legacy_peer.encode(legacy_peer.Error(0, b"\x1b\xff\x9b\x80"))), "nothing": b"",
}


def test_what_is_no_server(keys, target):
    cases = []
    for name, banner in BANNERS.items():
        def answer(connection, banner=banner):
            say(connection, banner)
            receive_all(connection)
        cases += [(name, flags, "127.0.0.1:%d" % target(answer).port) for flags in ((), ("--legacy",), ("--legacy", "-e"))]
    outcomes = connect_each(keys, [[*flags, where, "0:127.0.0.1:1"] for _, flags, where in cases])
    for (name, flags, _), outcome in zip(cases, outcomes):
        assert outcome.code not in (0, -14), (name, flags, outcome)
        assert "marker-before" in outcome.err or not (name == "legacy Error" and flags), (name, flags, outcome)


def test_what_a_local_program_asks_a_proxy_for(serve, ratrod, keys, shown):
    """Names, addresses with zones, and what is no SOCKS at all; the server shows the names too."""
    server, port = serve("-v")
    client = ratrod("-v", "-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:socks", "--socks-user", "marker\x1b[2J:wine").ready()
    proxy = socks_port(client)
    login = b"\5\1\2\1" + bytes([len("marker\x1b[2J")]) + b"marker\x1b[2J\4wine"
    texts = SHORT, LONG, HOSTILE, "[%s]" % SHORT, "a:" + SHORT, "::%" + SHORT, "::" + "A" * 240, "::\x1b[2J" * 20
    names = [text.encode("utf-8")[:255] for text in texts]
    for said in (*(login + bytes([5, command, 0, 3, len(name)]) + name + b"\0\x50" for name, command in itertools.product(names, (1, 3))),
                 SHORT.encode(), b"\5\1\2\1\7" + b"\x1b[2J\x07\r\n\4wine", b"\4\1\0\x50\x1b\x1b\x1b\x1b\x1b[2J\0",
                 b"GET \x1b[2J HTTP/1.1\r\n\r\n"):
        with dial(proxy) as connection, contextlib.suppress(ConnectionError):
            say(connection, said)
            receive_all(connection)
    shown(client)


def link_to(port, keys):
    return peer.Client.connect(port, seed_of(keys.client))


def test_what_a_client_asks_a_server_for(serve, keys, tcp_echo, shown):
    """Targets of every kind, in both protocols; its Errors; what it says of sessions. And what strangers say."""
    server, port = serve("-v", "--legacy", "--allow-listen")
    for text in (HOSTILE, LONG, SHORT):
        targets = [form % text for form in ("%s:80", "a:%s", "%s", "unix:/%s", "unix:%s", "[%s]:80", "[::1%%%s]:80", "[::%s]:80", "127.0.0.1:%s")]
        for target in targets:
            for opening in ((peer.TCP, target), (peer.LISTEN, target, b"instance")):
                with link_to(port, keys) as link:
                    link.handshake().send_open(*opening)
                    assert [record.type for record in link.read_to_end()] == [peer.ERROR]
            with legacy_peer.Client(dial(port), legacy_peer.Identity.load(keys.client.path), target) as client:
                pytest.raises(legacy_peer.Refused, client.handshake)
        with link_to(port, keys) as link:
            link.handshake().open_udp()
            for number, target in enumerate(targets, 1):
                link.session(number, target)
                assert link.read_udp()[0] == peer.SESSION_OVER
            link.session(100, "127.0.0.1:%d" % tcp_echo.port)
            link.session_over(100, peer.REMOTE_FAILED, text)
            link.send_record(peer.ERROR, peer.encode_error(peer.REMOTE_FAILED, text))
        with link_to(port, keys) as link:
            link.handshake().open("127.0.0.1:%d" % tcp_echo.port).wait_opened()
            link.fail(peer.REMOTE_FAILED, text)
        for number in (0, 7, 1 << 40):
            with link_to(port, keys) as link:
                link.handshake().send_record(peer.ERROR, peer.varint(number) + peer.encode_str(text))
                link.read_to_end()
    strangers_speak(server, port)
    shown(server)


def test_a_hostile_target_waits_for_nothing(link, stack, shown):
    """It is refused though the only place to connect is held by a remote that says nothing."""
    hole = "127.0.0.1:%d" % stack.enter_context(contextlib.closing(BlackHole())).port
    for target in (hole, hole, HOSTILE):
        opened = link(flags=("--max-connects-per-key", "1", "--drain", "0"))
        opened.send_open(peer.TCP, target)
    answer, = opened.read_to_end()
    assert answer.type == peer.ERROR
    link.server.wait_for("marker-before.*: refused: ")


def strangers_speak(server, port):
    """In place of a handshake; each from an address of its own, so that none is only counted."""
    for n, data in enumerate((*BANNERS.values(), SHORT.encode(), b"ratrod2\n" + SHORT.encode(), b"\0" + bytes(7) + b"\x20" + SHORT.encode()), 2):
        with dial(port, source="127.0.0.%d" % n) as connection, contextlib.suppress(OSError):  # the server may have closed it already
            say(connection, data)
            receive_all(connection)
    server.wait_for("Refused `127.0.0.2:")


def test_comments_and_bad_lines_of_authorized_keys(serve, keys, stranger, shown):
    """Whoever asks for access sends the line that an administrator pastes. And what strangers say where there is no legacy protocol."""
    text = SHORT.replace("\r", "").replace("\n", "").replace("\u2028", "")
    keys.server.write("authorized_keys", "".join(line + "\n" for line in (
        "%s %s" % (keys.client.public, text), "%s %s" % (keys.client.public, LONG), "%s marker-before permitopen=\x1b[2J" % stranger.public,
        '%s permitopen="\x1b[2J:80"' % stranger.public, '%s permitopen="[::1%%\x1b[2J\x07]:80"' % stranger.public,
        '%s permitopen="[\x1b[2J:]:80"' % stranger.public,
        '%s permitopen="unix:/\x9b"' % stranger.public, '%s permitopen="a:\x1b"' % stranger.public, '%s expires="\u202e"' % stranger.public,
        "\x1b[2J", "\u202e" * 43, "%s\u202e" % stranger.public, "A" * 5000)), encoding="utf-8")
    server, port = serve("-v")
    with link_to(port, keys) as link:
        link.handshake()
        server.wait_for("Accepted `.*marker-before")
    strangers_speak(server, port)
    shown(server)


def test_lines_of_known_hosts_and_key_files(serve, keys):
    _, port = serve()
    keys.client.write("known_hosts", "\x1b[2J marker\n%s \x1b[2J\u202e\n\u202e\n" % keys.server.public, encoding="utf-8")
    folders = [keys.client.path]
    for name, data in itertools.product(("key", "key.pub"), (b"\x1b[2J" * 10, b"\xff\x9b" * 50, "\u202e".encode() * 111, b"A" * 5000)):
        folders.append(make_keys(keys.client.path / ("%s%d" % (name, len(data)))).path)
        (folders[-1] / name).write_bytes(data)
    outcomes = run_lines([["-k", folder, "connect", "-v", "127.0.0.1:%d" % port] for folder in folders])
    assert outcomes[0].code == AUTHENTICATION_FAILED
    for outcome in outcomes:
        assert outcome.code in (2, AUTHENTICATION_FAILED)
        assert_fit(outcome.err.split("\n"))
