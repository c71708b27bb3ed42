"""Every limit of PROTOCOL.md's table: its flag, its default, and what happens at it. And strangers: 500, or with RATROD_LONG=1 all 4,000."""

import contextlib
import itertools
import math
import re
import selectors
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import ratrod as module
from support import pressure, programs, ratrod2_peer as peer
from support.joined import CLIENT_KEYS, TO_ACCEPTOR
from support.kernel import cpu_seconds, waiting_bytes
from support.keys import seed_of
from support.pressure import LONG, BlackHole, figure, is_closed, megabytes, memory_before, peak_growth, scaled
from support.programs import LEGACY, PATIENCE, RATROD, RATROD2, READY, STARTED, descriptors, either_wire, linux, tcp_port, udp_originator, udp_port
from support.relays import pump
from support.rows import assert_raises, row
from support.sockets import ask, ask_over, dial, eventually, is_ready, outcome_of, ping, receive_all
from support.whole_ends import Ends

pytestmark = pytest.mark.usefixtures("no_traceback")


def link(sock, who):
    """An authorized link of the key folder `who` over `sock`: the independent peer's."""
    return peer.Client(sock, seed_of(who)).handshake()


# ---------------------------------------------------------------------------------------------------- flags and defaults
BOTH, SERVE, CONNECT = ("serve", "connect"), ("serve",), ("connect",)
FLAGS = [  # flag, of which commands, the field of Limits, PROTOCOL.md's default (0: it depends on the descriptors)
    ("--handshake-timeout", BOTH, "handshake_timeout", 10.0),
    ("--max-handshakes", SERVE, "handshakes", 0),
    ("--max-handshakes-per-source", SERVE, "handshakes_per_source", 0),
    ("--handshake-rate", SERVE, "handshake_rate", 20.0),
    ("--max-links", SERVE, "links", 0),
    ("--max-links-per-key", SERVE, "links_per_key", 0),
    ("--max-streams", SERVE, "streams", 0),
    ("--max-streams-per-key", SERVE, "streams_per_key", 0),
    ("--idle-links", CONNECT, "idle_links", 8),
    ("--link-age", BOTH, "link_age", 3600.0),
    ("--max-connects-per-key", SERVE, "connects_per_key", 32),
    ("--max-listeners-per-key", SERVE, "listeners_per_key", 64),
    ("--connect-timeout", BOTH, "connect_timeout", 10.0),
    ("--max-udp-sessions-per-link", BOTH, "udp_sessions", 4096),
    ("--max-udp-sessions", SERVE, "udp_sessions_in_all", 16384),
    ("--udp-timeout", BOTH, "udp_timeout", 120.0),
    ("--udp-backlog", BOTH, "udp_backlog", 262144),
    ("--max-memory", BOTH, "memory", 0),
]
TIMES = ("--handshake-timeout", "--link-age", "--connect-timeout", "--udp-timeout")
EACH_FLAG = [(flag, command, field, default) for flag, commands, field, default in FLAGS for command in commands]


def parse(*words):
    return module.parse_command_line(list(words)).limits


def test_a_flag_of_each_limit():
    for flag, command, field, default in EACH_FLAG:
        value = 2.5 if flag in TIMES else 7
        limits = parse(command, flag, str(value), "127.0.0.1:1")
        assert getattr(limits, field) == value, (command, flag)
        assert limits._replace(**{field: default}) == module.Limits(), (command, flag)


def test_the_default_of_each_limit():
    """In the code and in the help."""
    help_texts = {command: module.help_text(command) for command in BOTH}
    assert parse("serve", "127.0.0.1:1") == parse("connect", "127.0.0.1:1") == module.Limits()
    for flag, command, field, default in EACH_FLAG:
        assert getattr(module.Limits(), field) == default, field
        if default:
            help_of_it = re.search(r"^  %s [\s\S]*?(?=\n  \S|\n\n|\Z)" % flag, help_texts[command], re.M).group()
            assert re.search(r"(?<![\d.])%g(?![\d.])" % default if default < 1e5 else str(default), help_of_it), help_of_it
    limits = module.Limits()  # those that have no flag
    assert (limits.idle_time, limits.listeners_per_key, limits.waiting_links, limits.udp_lag) == (60, 64, 8, 0.2)
    assert (limits.keepalive, limits.silence, limits.trusted) == (20, 45, 30)


def test_a_wrong_value_of_each_limit():
    """All that is no number, for a time and for a count; and of each flag which numbers it does not take."""
    no_numbers = ["-1", "", "1e3", "+1", "0x10", "1_0", "\uff11", "nan", "inf", "1 ", "9" * 20]
    rows = [(flag, "serve", value) for flag in ("--handshake-timeout", "--max-links") for value in no_numbers]
    rows += [(flag, commands[-1], "x") for flag, commands, *_ in FLAGS]
    rows += [(flag, commands[0], "1.5") for flag, commands, *_ in FLAGS if flag not in TIMES]
    rows += [(flag, commands[0], "0") for flag, commands, *_ in FLAGS if flag != "--idle-links"]
    for flag, command, value in rows:
        with pytest.raises(module.UsageError) as refused:
            parse(command, "%s=%s" % (flag, value), "127.0.0.1:1")
            pytest.fail("%s %s=%s is taken" % (command, flag, value))
        assert flag in str(refused.value) and "\n" not in str(refused.value), (command, flag, value)


# ---------------------------------------------------------------------------------------------------- strangers: who makes room
@pytest.fixture
def strangers(serve, stack):
    """strangers(flags...) -> (server, port, dial(source) -> a connection that says nothing), with a deadline that comes after the test."""
    def launch(*flags, deadline=60, **options):
        server, port = serve("--handshake-timeout", str(deadline), *flags, **options)
        return server, port, lambda source, host="127.0.0.1": stack.enter_context(dial(port, host, source))
    return launch


def sources(first, n):
    return ["127.0.0.%d" % (first + i) for i in range(n)]


@linux
@pytest.mark.parametrize("flag, most, has_link, come, gone, served", [
    # In all, whatever the sources: those that came last are served.
    ("--max-handshakes", 4, False, sources(2, 7), 3, range(3, 7)),
    # The server knows the source that has a link longest; its new connection is one of the newest, and must not go for that.
    ("--max-handshakes", 16, True, [*sources(3, 15), "127.0.0.2", "127.0.0.99"], 1, [15]),
    # A client begins with three links at once; strangers with an address for each connection must not be served before it.
    ("--max-handshakes", 16, False, [*sources(3, 13), *["127.0.0.2"] * 3, *sources(100, 5)], 5, range(13, 16)),
    # One source has its own bound, which is no other's.
    ("--max-handshakes-per-source", 2, False, [*["127.0.0.2"] * 2, *["127.0.0.3"] * 2, "127.0.0.2"], 1, range(1, 5))],
    ids=["in all", "a source that came late", "several of one source", "of one source"])
def test_the_oldest_stranger_makes_room(strangers, keys, flag, most, has_link, come, gone, served):
    """Of those that `come`, and say nothing, the first ones are gone; the others are there, and some of them are served."""
    _, _, enter = strangers(flag, str(most))
    if has_link:
        link(enter("127.0.0.2"), keys.client)
    silent = [enter(source) for source in come]
    eventually(lambda: all(map(is_closed, silent[:gone])), "the oldest have made room")
    assert not any(map(is_closed, silent[gone:]))
    for number in served:
        link(silent[number], keys.client)


@linux
def test_a_burst_of_one_source_waits_for_its_turn(strangers, keys):
    """A client that a restart has thrown out makes 16 links at once, and the new server does not know its address: none of them goes for another."""
    _, _, enter = strangers()
    burst = [peer.Client(enter("127.0.0.2"), seed_of(keys.client)) for _ in range(16)]
    for step in (peer.Client.send_client_preamble, peer.Client.authenticate, peer.Client.read_completion):
        for client in burst:
            step(client)


def half_way(sock, seed):
    """A client whose first message was answered, and who has not said his second."""
    client = peer.Client(sock, seed)
    client.send_client_preamble()
    client.read_server_preamble()
    return client


@linux
def test_who_is_refused_gives_up_his_place(strangers, keys, second, stack):
    """Strangers whose keys nobody knows have come as far as one can come; that they stay must not push out who is in the middle."""
    _, _, enter = strangers("--max-handshakes", "4")
    honest = half_way(enter("127.0.0.2"), seed_of(keys.client))
    for n in range(8):
        assert_raises(peer.PeerError, "does not know", peer.Client(enter("127.0.0.%d" % (n + 3)), bytes([n]) * 32).handshake)  # which stay
    honest.send_message(honest.client_authentication())
    honest.read_completion()


@linux
def test_who_stops_in_the_middle_makes_room_for_newcomers(strangers, keys):
    """Those that were answered once and then say no more have no right to stay before one that has just come; nor do others push that one out."""
    _, _, enter = strangers("--max-handshakes", "8")
    for number, rest in enumerate((b"", b"\0", b"\0\x70", b"\0\x70x")):
        with row(rest):
            for n in range(8):
                half_way(enter("127.1.%d.%d" % (number, n + 3)), seed_of(keys.client)).sock.sendall(rest)
            honest = [enter("127.1.%d.2" % number) for _ in range(2)]
            for sock in honest:
                link(sock, keys.client)


class Held:
    """Passes on so many messages of a client as 127.0.0.9, and the answers; then the server turns it away, for another one comes from there."""

    def __init__(self, target, port, passed):
        self._port, self._passed = port, passed
        self.port = target(self._serve).port

    def _serve(self, near):
        near.settimeout(PATIENCE)
        with dial(self._port, source="127.0.0.9") as far:
            for _ in range(self._passed):
                far.sendall(near.recv(4096))
                near.sendall(far.recv(4096))
            near.recv(4096)
            with dial(self._port, source="127.0.0.9"):
                near.sendall(receive_all(far))


@linux
def test_who_is_turned_away_hears_that_the_server_is_overloaded(serve, connect, target):
    """Before its first message was answered; after that nothing can be said, but it is no reason for --legacy either."""
    _, port = serve("--max-handshakes-per-source", "1")
    for passed, says in ((0, "the server is overloaded: .* try again later"), (1, "the server closed the connection before .*overloaded")):
        client = connect(Held(target, port, passed).port, "--accept-all-hosts")
        assert client.wait() == 1
        client.wait_for(says)
        assert "--legacy" not in client.output


@linux
def test_public_key_work_in_three_classes(keys, second, stack):
    """Sources that have a link, or had one lately, come first, then those that make few handshakes, then the rest; within a class their networks
    take turns, the newest first. For one more the oldest makes room, and hears why."""
    order, gate, opened = [], threading.Semaphore(0), []
    at_once = module.STEPS_AT_ONCE
    def authorize(key, _target):
        order.append(key)
        return not opened or gate.acquire(timeout=PATIENCE)
    def come(source, number):
        """A client of its own key that has only to say its last message."""
        seed = bytes([number]) * 32
        return half_way(stack.enter_context(dial(server.address[1], source=source)), seed), module.encode_key(module.KeyPair.from_seed(seed).public)
    limits = module.DEFAULT_LIMITS._replace(handshake_rate=1)
    with module.serve(key_path=keys.server.path, limits=limits, authorize=authorize) as server:
        admission = server._endpoint.admission
        admission._steps._most = at_once  # so that none waits for a thread that has had its turn
        link(stack.enter_context(dial(server.address[1], source="127.1.3.1")), keys.client)
        for source in ("127.3.3.1", "127.4.3.1"):
            for _ in range(2):  # as many as a source may make at once
                stack.enter_context(dial(server.address[1], source=source)).close()
        busy = [come("127.%d.3.1" % (100 + n), 100 + n) for n in range(at_once)]
        clients = [come("127.%s.3.1" % network, number) for number, network in enumerate("3334421", 1)]
        del order[:]
        opened.append(True)
        for client, _ in busy:
            client.send_message(client.client_authentication())
        eventually(lambda: len(order) == at_once, "all threads are at work")
        for n, (client, _) in enumerate(clients):
            client.send_message(client.client_authentication())
            eventually(lambda n=n: sum(len(of) for waiting in admission._steps._waiting for of in waiting.values()) == n + 1, "it waits for its turn")
        for n in range(len(clients)):
            gate.release()
            eventually(lambda n=n: len(order) == at_once + n + 1, "the next one's turn")
        for _ in range(at_once):
            gate.release()
        for client, _ in busy + clients:
            client.read_completion()
    assert order[at_once:] == [clients[n][1] for n in (6, 5, 4, 2, 3, 1, 0)]


@linux
def test_the_oldest_makes_room_also_while_it_waits_for_its_turn(keys):
    """A step that is queued is no claim to a place: otherwise those that come would be turned away for those that are never served."""
    gate = threading.Event()
    limits = module.DEFAULT_LIMITS._replace(handshakes=16)
    with contextlib.ExitStack() as stack, module.serve(key_path=keys.server.path, limits=limits, authorize=lambda *_: gate.wait(PATIENCE)) as server:
        admission, clients = server._endpoint.admission, []
        def come():
            clients.append(peer.Client(stack.enter_context(dial(server.address[1], source="127.%d.3.1" % (len(clients) + 1))), bytes(32)))
            clients[-1].send_client_preamble()
        for n in range(module.STEPS_AT_ONCE):
            come()
            clients[n].authenticate()
        while len(clients) < 16:
            come()
        eventually(lambda: [stranger.is_stepping for stranger in list(admission._strangers)] == [True] * 16, "each waits for its turn")
        for n in range(module.STEPS_AT_ONCE + 1):
            come()
            assert receive_all(clients[n].sock) == (b"" if n < module.STEPS_AT_ONCE else module.OVERLOADED)
        gate.set()


@linux
@pytest.mark.parametrize("flags", [("--max-handshakes", "4"), ("--max-handshakes-per-source", "64")], ids=" ".join)
def test_a_client_is_served_whatever_these_two_are(tunnel, tcp_echo, stack, flags):
    """A burst of one source waits before it takes everybody's last places; here there are no others, but it must not wait for ever."""
    made = tunnel(tcp_echo.port, RATROD2, serve_flags=flags)
    ping(*(stack.enter_context(made.connect()) for _ in range(20)))


def test_the_source_of_an_address():
    """IPv6: whoever has one address there has 2 ** 64 of them."""
    assert module.Source.name("192.0.2.7") == module.Source.name("::ffff:192.0.2.7") == "192.0.2.7"
    assert module.Source.name("2001:db8:1:2::7") == module.Source.name("2001:db8:1:2:ffff::1") != module.Source.name("2001:db8:1:3::7")
    assert module.Source.name("fe80::1%eth0") == module.Source.name("fe80::2%eth1")


@linux
def test_failures_of_one_source_are_logged_once_a_second(strangers, stack):
    """A stranger must not fill the disk: five lines at once, then one a second, and the rest as a number."""
    server, _, enter = strangers("--handshake-rate", "1000", "--max-handshakes-per-source", "60")
    began = time.monotonic()
    for _ in range(50):
        sock = enter("127.0.0.2")
        with contextlib.suppress(ConnectionResetError):
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            receive_all(sock)
    def counted():
        shown = len([line for line in server.lines if re.search(r"Refused `127\.0\.0\.2:", line)])
        return shown + sum(int(n) for n in re.findall(r"Refused (\d+) more connections from `127\.0\.0\.2`", server.output)) == 50
    eventually(counted, lambda: server.output)
    assert len([line for line in server.lines if "Refused" in line]) <= 5 + math.ceil(time.monotonic() - began) + 1


@linux
def test_ten_thousand_sources_fill_neither_memory_nor_disk(keys, monkeypatch, caplog):
    """Each with lines and a place of its own (an IPv6 host has 2 ** 64 neighbours): bounded in all, and every one of them is counted."""
    monkeypatch.setattr(module, "SOURCES", 40)
    monkeypatch.setattr(module, "LOG_BURST_IN_ALL", 30)
    caplog.set_level("ERROR", "ratrod")
    # The rest is said each sweep: the first one after all have come. What a source has used of its rate is forgotten with it: it lasts for a ms here.
    with module.serve(key_path=keys.server.path, limits=module.DEFAULT_LIMITS._replace(sweep_interval=1.5, handshake_rate=1000.0)) as server:
        began, most = time.monotonic(), 0
        for number in range(130):
            with dial(server.address[1], source="127.2.%d.%d" % (number // 100, number % 100 + 1)) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    receive_all(sock)
            most = max(most, len(server._endpoint.admission._sources))
        def counted():
            said = [record.getMessage() for record in list(caplog.records)]
            return sum(int(n or 1) for n in re.findall(r"(\d+) more |Refused `127", "\n".join(said))) == 130
        eventually(counted, lambda: caplog.text)
    assert most <= 40 + 1
    assert len(caplog.records) <= 30 + 10 * (time.monotonic() - began) + 1


# ---------------------------------------------------------------------------------------------------- links
@linux
@pytest.mark.parametrize("flag, whose", [("--max-links", "in all"), ("--max-links-per-key", "of this client")])
def test_a_link_too_many(serve, connect, keys, second, stack, flag, whose):
    """The client is told why; another key's is refused by the bound in all alone. One that was refused takes no place while its client reads why."""
    server, port = serve(flag, "2")
    links = [link(stack.enter_context(dial(port)), keys.client) for _ in range(2)]
    text = r"the server has as many connections %s as it takes \(2\)" % whose
    client = connect(port)
    assert client.wait() == 1
    client.wait_for(text + "; try again later")
    before = descriptors(server)
    for _ in range(3):
        refused = assert_raises(peer.PeerError, text, link, stack.enter_context(dial(port)), keys.client)
        assert refused.code != peer.INVALID_KEY  # which would end the client for good
    server.wait_for(text)
    with pytest.raises(peer.PeerError, match=text) if whose == "in all" else contextlib.nullcontext():
        link(stack.enter_context(dial(port)), second)
    held = before + 4
    links.pop().sock.close()
    eventually(lambda: descriptors(server) < held, "it has left")
    link(stack.enter_context(dial(port)), keys.client)


@pytest.mark.parametrize("flag", ["--max-links", "--max-links-per-key"])
def test_links_that_are_made_at_once_are_counted_too(serve, keys, stack, flag):
    """All are in the middle of their handshakes when the first one is in."""
    _, port = serve(flag, "2", "--max-handshakes-per-source", "32")
    links = [(made, made.client_authentication()) for made in (half_way(stack.enter_context(dial(port)), seed_of(keys.client)) for _ in range(24))]
    for made, message in links:
        made.send_message(message)
    entered = 0
    for made, _ in links:
        with contextlib.suppress(peer.PeerError):
            made.read_completion()
            entered += 1
    assert entered == 2


@linux
def test_links_by_the_descriptor_limit(start, keys, stack):
    """Half of what is left after 64, the strangers and the UDP sessions: each link may need a descriptor for its remote."""
    programs.need("prlimit")
    server = start("prlimit", "--nofile=200:200", *RATROD, "-k", keys.server.path, "serve", "--max-udp-sessions", "16",
                   "--max-links-per-key", "60", "127.0.0.1:0")
    port = int(server.wait_for(STARTED).group(1))
    for _ in range((200 - 64 - 25 - 16) // 2):
        link(stack.enter_context(dial(port)), keys.client)
    assert_raises(peer.PeerError, r"as many connections in all as it takes \(47\)", link, stack.enter_context(dial(port)), keys.client)


# ---------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("flag, in_all, mode", [("--max-streams", True, RATROD2), ("--max-streams-per-key", False, LEGACY)],
                         ids=["ratrod2 --max-streams", "legacy --max-streams-per-key"])
def test_a_stream_too_many(serve, connect, ratrod, tcp_echo, second, stack, flag, in_all, mode):
    """Its local connection is reset and the client says why; those that are open go on, and so does another key."""
    _, port = serve(*mode.serve, flag, "2")
    client = connect(port, *mode.connect, "0:127.0.0.1:%d" % tcp_echo.port)
    other = ratrod("-k", second.path, "connect", *mode.connect, "127.0.0.1:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port)
    for program in (client, other):
        program.wait_for(READY)
    open_ones = [stack.enter_context(dial(tcp_port(client))) for _ in range(2)]
    ping(*open_ones)
    assert outcome_of(tcp_port(client)) == "reset"
    client.wait_for(r"as many .*as it takes \(2\)")
    if in_all:
        assert outcome_of(tcp_port(other)) == "reset"
        other.wait_for(r"as many .*as it takes \(2\)")
    else:
        assert outcome_of(tcp_port(other)) == "answered"
    ping(*open_ones, word=b"still there")
    open_ones.pop().close()
    eventually(lambda: outcome_of(tcp_port(client)) == "answered", "the place of the one that left")


# ---------------------------------------------------------------------------------------------------- connect
@pytest.fixture
def black_hole(stack):
    return stack.enter_context(contextlib.closing(BlackHole()))


@linux
def test_time_to_connect(tunnel, connect, black_hole):
    """Of a server to a remote, and of a client to its server."""
    made = tunnel(black_hole.port, RATROD2, serve_flags=("--connect-timeout", "0.5"))
    began = time.monotonic()
    assert outcome_of(made.port) == "reset"
    assert time.monotonic() - began > 0.4
    made.client.wait_for("cannot connect to the remote `127.0.0.1:%d`: timed out" % black_hole.port)
    began = time.monotonic()
    client = connect(black_hole.port, "--connect-timeout", "0.5", "0:host:80")
    assert client.wait() == 1
    assert time.monotonic() - began > 0.4
    client.wait_for("cannot connect to the server `127.0.0.1:%d`: timed out" % black_hole.port)


@linux
def test_connects_of_one_key_under_way(serve, keys, second, tcp_echo, black_hole, stack):
    """Two at a time: a third of that key waits for one of them, and holds up nobody else's."""
    _, port = serve("--max-connects-per-key", "2", "--connect-timeout", "2.4")
    echo, nowhere = "127.0.0.1:%d" % tcp_echo.port, "127.0.0.1:%d" % black_hole.port
    def stream(who, target):
        return link(stack.enter_context(dial(port)), who).open(target)
    hanging = [stream(keys.client, nowhere) for _ in range(2)]
    # Half of their time later, so that there is time left for the third when they fail: it has the same 2.4 s from its own Open on.
    assert not is_ready(hanging[0].link.sock, selectors.EVENT_READ, 1.2)
    third = stream(keys.client, echo)
    stream(second, echo).wait_opened()
    assert not is_ready(third.link.sock, selectors.EVENT_READ, 0)
    for attempt in hanging:
        assert_raises(peer.PeerError, "timed out", attempt.wait_opened)
    third.wait_opened()


def test_what_one_key_has_refused_is_logged_within_bounds(serve, keys, stack):
    """An authorized client must not fill the disk either: 200 lines at once, then ten a second, and the rest as a number."""
    keys.server.write("authorized_keys", '%s permitopen="192.0.2.1:9"\n' % keys.client.public)
    server, port = serve()
    began, sessions, opens = time.monotonic(), 400, 40
    asking = link(stack.enter_context(dial(port)), keys.client)
    asking.open_udp()
    for number in range(sessions):
        asking.session(number, "127.0.0.1:%d" % (number + 1))
        assert asking.read_udp() == (peer.SESSION_OVER, (number, peer.INVALID_HOST, "not allowed by this server"))
    for number in range(opens):
        with link(dial(port), keys.client) as asking, pytest.raises(peer.PeerError, match="not allowed"):
            asking.open("127.0.0.1:%d" % (number + 1)).wait_opened()
    def counted():
        rest = re.findall(r"❌ (\d+) more failures with the key `%s`" % re.escape(keys.client.public), server.output)
        return len(re.findall("refused: ", server.output)) + sum(map(int, rest)) == sessions + opens
    eventually(counted, lambda: server.output)
    assert len([line for line in server.lines if "❌" in line]) <= 200 + 10 * (time.monotonic() - began) + 1


# ---------------------------------------------------------------------------------------------------- UDP
class Asking:
    """An originator; ask(remote) -> the port at which the remote sees it, which is its session's at the server."""

    def __init__(self, client, stack):
        self.client, self._sock = client, stack.enter_context(udp_originator(client))

    def ask(self, remote):
        self._sock.send(b"question")
        data, address = remote.receive()
        remote.socket.sendto(data, address)
        assert self._sock.recv(100) == b"question"
        return address[1]


@pytest.fixture
def asking(serve, ratrod, keys, remote, stack):
    """asking(n, serve flags, connect flags, who...) -> for each client n originators of UDP through a tunnel to `remote`."""
    def launch(n, serve_flags=(), connect_flags=(), who=(keys.client,)):
        launch.server, port = serve(*serve_flags)
        clients = [ratrod("-k", folder.path, "connect", *connect_flags, "127.0.0.1:%d" % port, "0:127.0.0.1:%d" % remote.port) for folder in who]
        return [[Asking(client, stack) for _ in range(n)] for client in clients if client.wait_for(READY)]
    return launch


@pytest.mark.parametrize("end, flag, mode", [
    ("serve", "--max-udp-sessions", RATROD2), ("serve", "--max-udp-sessions-per-link", RATROD2), ("connect", "--max-udp-sessions-per-link", RATROD2),
    ("serve", "--max-udp-sessions", LEGACY), ("connect", "--max-udp-sessions-per-link", LEGACY)])
def test_the_least_recently_used_udp_session_makes_room(asking, remote, end, flag, mode):
    flags = {"serve_flags": mode.serve, "connect_flags": mode.connect}
    flags[end + "_flags"] += flag, "2"
    (first, second, third), = asking(3, **flags)
    of_first, of_second = first.ask(remote), second.ask(remote)
    assert first.ask(remote) == of_first  # now the second one's is the one that was not used for longest
    of_third = third.ask(remote)
    assert first.ask(remote) == of_first
    assert third.ask(remote) == of_third
    # It has made room, and what it sends next makes it a new session, for which the first one's goes.
    assert second.ask(remote) not in (of_first, of_second, of_third)
    assert third.ask(remote) == of_third
    assert first.ask(remote) != of_first
    # Nobody else would know why.
    program = asking.server if end == "serve" else first.client
    program.wait_for(r"ended to make room: there are more than 2 UDP sessions \(%s\)" % flag, 3)


def test_the_key_with_most_udp_sessions_makes_room(asking, remote, keys, second):
    """One client's sessions cost another client none of his, however long those were idle."""
    quiet, loud = asking(4, serve_flags=("--max-udp-sessions", "3"), who=(second, keys.client))
    of_quiet = quiet[0].ask(remote)
    of_loud = [originator.ask(remote) for originator in loud]
    assert quiet[0].ask(remote) == of_quiet
    assert loud[3].ask(remote) == of_loud[3]
    assert loud[0].ask(remote) != of_loud[0]


def test_a_record_of_many_datagrams_holds_nobody_up(serve, keys, second, tcp_echo, remote, stack):
    """80,000 empty ones have room in one: others are served in between, and all of them before what follows it."""
    _, port = serve()
    flood, other = link(stack.enter_context(dial(port)), keys.client), link(stack.enter_context(dial(port)), second)
    stream = other.connect_to("127.0.0.1:%d" % tcp_echo.port)
    flood.open_udp()
    assert flood.read_record().type == peer.OPENED
    flood.session(1, "127.0.0.1:%d" % remote.port)
    flood.datagrams(*[(1, b"")] * 80000)
    flood.session(2, "no target")
    for _ in range(30):  # it comes in pieces, between which all are served anyway
        stream.send(b"ping")
        assert stream.receive() == b"ping"
    assert not is_ready(flood.sock, selectors.EVENT_READ, 0)
    assert flood.read_udp()[1][0] == 2


def late_server(keys, target):
    """(port, go(), datagrams): the independent server, which closes its first connection when it is idle, and makes the others wait for go()."""
    connections, may_go, datagrams = itertools.count(), threading.Event(), []
    def serve(connection):
        connection.settimeout(PATIENCE)
        server = peer.Server(connection, seed_of(keys.server))
        if not next(connections):
            return server.handshake().send_record(peer.CLOSE)
        may_go.wait(PATIENCE)
        with contextlib.suppress(peer.LinkEnded):
            return server.handshake().serve_streams(lambda stream: peer.serve_udp(stream, lambda _, data: datagrams.append(data)))
    return target(serve).port, may_go.set, datagrams


@either_wire
def test_senders_to_a_refused_target_do_not_fill_the_log(forward, stack, mode):
    _, client = forward(mode, "0:127.0.0.1:9", serve_flags=("-r", ".*:80"))
    for n in range(100):
        stack.enter_context(udp_originator(client)).send(b"%d" % n)
    client.wait_for("[0-9]+ more UDP sessions to `127.0.0.1:9` failed")
    assert len([line for line in client.lines if "not allowed" in line]) < 10


def wait_until_read(port):
    eventually(lambda: not waiting_bytes(port), "the client has read what came")


@linux
@pytest.mark.parametrize("together", [1, 32])
def test_udp_backlog_of_a_client(connect, keys, target, stack, together):
    """While there is no link the newest datagrams are kept, up to so many bytes: 8 of 1000 bytes with their heads, but not 9."""
    server_port, go, datagrams = late_server(keys, target)
    client = connect(server_port, "--udp-backlog", "8192", "0:127.0.0.1:9").ready()
    originator = stack.enter_context(udp_originator(client))
    for n in range(100 // together):
        for m in range(together):
            originator.send(b"%04d" % (n * together + m) + bytes(996))
        wait_until_read(udp_port(client))
    last = b"%04d" % (100 // together * together - 1)
    go()
    eventually(lambda: any(data.startswith(last) for data in datagrams), "the last one")
    assert len(datagrams) == 8 and datagrams == sorted(datagrams)


@linux
def test_empty_datagrams_count_in_a_backlog(connect, keys, target, stack):
    """150 bytes of memory for each, and none of them in the count, were 50 MB here."""
    client = connect(late_server(keys, target)[0], "0:127.0.0.1:9").ready()
    originators = [stack.enter_context(udp_originator(client)) for _ in range(10)]
    originators[0].send(b"")
    wait_until_read(udp_port(client))
    before = memory_before(client)
    for _ in range(3000):
        for originator in originators:
            for _ in range(10):
                originator.send(b"")
    wait_until_read(udp_port(client))
    assert peak_growth(client, before) < 2 << 20


@linux
def test_udp_backlog_of_a_server(serve, keys, remote, stack):
    """A client that does not read: what its remote sends on is dropped, the oldest first, and the server's memory stays what it was."""
    server, port = serve()
    udp = link(stack.enter_context(dial(port)), keys.client).open_udp()
    udp.session(1, "127.0.0.1:%d" % remote.port)
    udp.datagrams((1, b"begin"))
    _, session = remote.receive()
    before = memory_before(server)
    for number in range(20_000):  # 24 MB: far more than the kernel's buffers of a connection hold
        remote.socket.sendto(b"%06d" % number + bytes(1194), session)
        if not number % 1000:
            udp.send_record(peer.KEEPALIVE)
    growth = peak_growth(server, before)
    assert growth < 8 << 20
    came, has_come = [], threading.Event()
    def insist():  # what comes while the kernel's buffer is full, or waits for 0.2 s, is lost as well
        while not has_come.wait(0.02):
            remote.socket.sendto(b"the newest", session)
    insisting = threading.Thread(target=insist, daemon=True)
    insisting.start()
    while not came or came[-1] != b"the newest":
        kind, pairs = udp.read_udp()
        assert kind == peer.DATAGRAMS
        came += [data for _, data in pairs]
    has_come.set()
    insisting.join()
    assert came[:-1] == sorted(came[:-1])
    assert len(came) < 13_000


# ---------------------------------------------------------------------------------------------------- links of a client: their number and age
@pytest.mark.parametrize(("flag", "idle_time"), [(1, 0.2), (3, 0.2), (1, 60.0)])
def test_idle_links(serve, start, keys, tcp_echo, flag, idle_time):
    """One that is used and two that are ready are there in any case. A burst leaves as many as it needed; those that nobody needs are let go."""
    server, port = serve("-v")
    without = descriptors(server)
    client = start(*scaled(idle_time=idle_time, sweep_interval=0.2), "-k", keys.client.path, "connect", "--idle-links", str(flag),
                   "127.0.0.1:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    for _ in range(3):
        burst = [dial(tcp_port(client)) for _ in range(12)]
        ping(*burst)
        for sock in burst:
            ask_over(sock)
    if idle_time == 60:
        assert len(re.findall("Accepted", server.output)) < 24
    else:
        for _ in range(10):
            ask(tcp_port(client))
        eventually(lambda: descriptors(server) - without <= 3, lambda: "%d links that nobody needs" % (descriptors(server) - without))
    ask(tcp_port(client))


def test_an_old_link_is_closed_by_the_server(start, connect, keys, tcp_echo, stack):
    """Close says that the Open was not looked at: the client takes another link, and its user notices nothing."""
    server = start(*scaled(link_age=0.4), "-k", keys.server.path, "serve", "127.0.0.1:0")
    port = int(server.wait_for(STARTED).group(1))
    old = link(stack.enter_context(dial(port)), keys.client)
    client = connect(port, "-v", "0:127.0.0.1:%d" % tcp_echo.port).ready()
    ping(stack.enter_context(dial(tcp_port(client))))
    time.sleep(0.6)  # an age comes by no event
    old.open("127.0.0.1:%d" % tcp_echo.port)
    pytest.raises(peer.LinkClosed, old.read_record)
    for _ in range(3):
        ping(stack.enter_context(dial(tcp_port(client))))
    assert "❌" not in client.output


def test_the_udp_sessions_of_an_old_link_go_on_over_another(forward, udp_echo, stack):
    """What is under way on the old one in that moment may be lost, as any datagram: an originator asks again."""
    server, client = forward(RATROD2, "0:%d" % udp_echo.port, serve_flags=["-v"], connect_flags=["--link-age", "0.5"])
    asking = stack.enter_context(udp_originator(client))
    asking.setblocking(False)
    numbers, after = itertools.count(1), []  # of the questions that were asked when the second link had been left
    def hears():
        question = b"%d" % next(numbers)
        if len(re.findall("UDP link of .* ended", server.output)) > 1:
            after.append(question)
        asking.send(question)
        with contextlib.suppress(BlockingIOError):
            return asking.recv(10) in after
    eventually(hears, lambda: server.output)


# ---------------------------------------------------------------------------------------------------- strangers in great number
SILENT = DRIPPING = 2000 if LONG else 250
RATE = 500  # a second
SHORT_DEADLINE = () if LONG else ("--handshake-timeout", "2")


class Pinged:
    """A stream that is used all the time; `worst` is the longest that an answer took."""

    def __init__(self, sock):
        self.worst, self.count = 0.0, 0
        self._sock, self._ending, self._good = sock, threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while not self._ending.wait(0.02):
                self.worst, self.count = max(self.worst, timed(ping, self._sock)), self.count + 1
            self._good = True

    def stop(self):
        """Whether every answer came."""
        self._ending.set()
        self._thread.join(PATIENCE)
        return self._good


def timed(action, *args):
    """Seconds that it takes."""
    began = time.monotonic()
    action(*args)
    return time.monotonic() - began


@linux
@pytest.mark.timeout(300)
@pytest.mark.parametrize("again", [0, 200], ids=["who stay away", "who come back"])
def test_thousands_of_strangers(serve, connect, start, keys, tcp_echo, again):
    """They hold the places that strangers have, and nothing else. Those that come back take them from each other, the oldest first."""
    server, port = serve(*SHORT_DEADLINE)
    client = connect(port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    newcomers = itertools.count()
    def whole_connect():
        program = connect(port)
        if program.wait():
            raise ConnectionError(program.output)
    def newcomer():
        """From an address that the server has never seen: it has no more rights than the strangers."""
        number = next(newcomers)
        with dial(port, source="127.1.%d.%d" % (number // 250, number % 250 + 1)) as sock:
            link(sock, keys.client)
    def entering(action):
        """Seconds until it is in. On a machine that is so busy that its first word takes long it may be pushed out, and tries again."""
        nonlocal tries, pushed_out
        began = time.monotonic()
        while True:
            tries += 1
            try:
                action()
                return time.monotonic() - began
            except ConnectionError:
                assert time.monotonic() < began + PATIENCE
                pushed_out += 1
    tries = pushed_out = 0
    with dial(tcp_port(client)) as sock:
        ping(sock)
        quiet = entering(whole_connect), entering(newcomer)
        own, before, cpu, began = descriptors(server), memory_before(server), cpu_seconds(server.process.pid), time.monotonic()
        pinged = Pinged(sock)
        crowd = start(sys.executable, pressure.__file__, str(port), str(SILENT), str(DRIPPING), str(RATE), str(again))
        crowd.wait_for("first one is connected")
        times, handshakes = [entering(whole_connect)], []
        while not re.search("all connected", crowd.output):
            handshakes.append(entering(newcomer))
        for _ in range(4):
            times.append(entering(whole_connect))
            handshakes += [entering(newcomer) for _ in range(10)]
        used, took = cpu_seconds(server.process.pid) - cpu, time.monotonic() - began
        if again:
            crowd.stop()
        else:
            crowd.wait_for("all gone")
            assert crowd.wait() == 0
        eventually(lambda: descriptors(server) <= own, lambda: "%d descriptors, as before: %d" % (descriptors(server), own))
        assert pinged.stop() and pinged.count > 10
        name = "%d strangers%s" % (SILENT + DRIPPING, " who come back, %d a second" % again if again else "")
        figure(name + ", connected after", crowd.wait_for("all connected after (.*)").group(1))
        if not again:
            figure(name + ", gone after", crowd.wait_for("all gone after (.*)").group(1))
        figure(name + ", an honest connect, longest of %d" % len(times), "%.2f s (%.2f s without them)" % (max(times), quiet[0]))
        figure(name + ", a newcomer's handshake, longest of %d" % len(handshakes), "%.3f s (%.3f s without them)" % (max(handshakes), quiet[1]))
        figure(name + ", a round trip of an open stream, longest of %d" % pinged.count, "%.0f ms" % (1000 * pinged.worst))
        figure(name + ", the server's memory grew by at most", megabytes(peak_growth(server, before)))
        figure(name + ", the server's CPU time", "%.2f s of %.2f s" % (used, took))
        ping(sock)
        figure(name + ", tries that were pushed out", "%d of %d" % (pushed_out, tries))
    assert max(times + handshakes) < 5 + 5 * max(quiet)  # on a machine where the start of a program takes long by itself
    assert pushed_out <= 1 + tries // 20
    assert peak_growth(server, before) < 32 << 20
    assert "❌" not in client.output


# ---------------------------------------------------------------------------------------------------- an honest client among them
def slow_path(target, port, source):
    """The port of a path with a round trip of 300 ms to the server, which knows it as `source`."""
    def serve(near):
        with dial(port, source=source) as far:
            pump(near, far, 0.15)
    return target(serve).port


NETWORKS = ["127.80.%d.%d" % (n % 4, n // 4 + 1) for n in range(40)]
CROWDS = [  # silent, stopped after message 1, how many a second, from where, from where the honest client comes and how, seconds that it may take
    pytest.param(400, 0, 2000, ["127.0.0.77"], "127.0.0.77", False, 1, id="400 silent ones of its address"),
    pytest.param(0, 1500 if LONG else 150, 100, ["127.0.0.77"], "127.0.0.77", False, 1, id="100 a second of its address that stop"),
    pytest.param(0, 3000 if LONG else 700, 700, NETWORKS, "127.0.0.78", True, 2, id="700 a second of four networks that stop, and a slow path"),
]
if LONG:
    CROWDS.append(pytest.param(0, 30000, 1500, [pressure.from_address(n) for n in range(4000)], "127.0.0.79", True, 3,
                               id="1,500 a second of 4,000 addresses that stop, and a slow path"))


@linux
@pytest.mark.parametrize("silent, begun, rate, addresses, source, is_slow, within", CROWDS)
def test_an_honest_client_among_strangers(serve, connect, start, keys, tcp_echo, target, silent, begun, rate, addresses, source, is_slow, within):
    """It comes in, each time, as long as they come and while they stay; and a client that has links loses no connection."""
    server, port = serve()
    client = connect(port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    through = slow_path(target, port, source) if is_slow else port
    def enter():
        with dial(through, source=None if is_slow else source) as sock:
            link(sock, keys.client)
    with dial(tcp_port(client)) as sock:
        pinged = Pinged(sock)
        crowd = start(sys.executable, pressure.__file__, *map(str, (port, silent, 0, rate, 0, begun, *addresses)))
        crowd.wait_for("first one is connected")
        times = []
        while not re.search("all connected", crowd.output):
            times.append(timed(enter))
        times += [timed(enter) for _ in range(5)]
        ask(tcp_port(client))
        assert pinged.stop() and pinged.count
    figure("an honest client among %d strangers, %d a second: longest of %d" % (silent + begun, rate, len(times)), "%.2f s" % max(times))
    assert not LONG or max(times) < within
    assert "❌" not in client.output and not server.process.poll()


def test_half_a_record_of_udp_is_read_on_once_there_is_memory_again():
    """Nothing else wakes its link: what local sockets did not take was another link's."""
    with contextlib.closing(Ends("0:127.0.0.1:1")) as ends, contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.sendto(b"?", ends.client.listeners[-1].sock.getsockname())
        ends.rounds(20)
        link, = [link for link in ends.server.links if link.state == module.UDP_OPEN]
        memory, key = ends.server.memory, link.peer_key
        for counts in (memory, memory.untaken):
            counts.change(key, memory.most)
        link.reader.wanted = 5000
        link.unread.keep(memoryview(bytearray(100)), 0, 100)
        ends.pass_time(2)
        assert not link.transport.events & module.READ
        for counts in (memory, memory.untaken):
            counts.change(key, -memory.most)
        ends.pass_time(2)
        assert link.transport.events & module.READ


def test_a_key_that_is_removed_after_it_was_let_in_gives_its_place_back():
    with contextlib.closing(Ends("0:127.0.0.1:1")) as ends, contextlib.closing(socket.socket()) as sock:
        server, handshake = ends.server, SimpleNamespace(peer_key=CLIENT_KEYS.public, is_done=True)
        before = server._links_of.of(CLIENT_KEYS.public)
        server.admit(False, CLIENT_KEYS.public)  # on a thread; the list changes before the loop hears of it
        server.rules.grants = lambda key: ()
        server.on_negotiated(SimpleNamespace(address=("127.0.0.1", 1), sock=sock, is_stepping=False), handshake, None)
        assert sock.fileno() == -1
        assert server._links_of.of(CLIENT_KEYS.public) == before


def test_a_client_that_left_while_it_was_authorized_takes_no_place(keys):
    asked, answer = threading.Event(), threading.Event()
    def allow(_key, _target):
        asked.set()
        return answer.wait(PATIENCE)
    def comes_in():
        with dial(server.address[1]) as sock:
            try:
                link(sock, keys.client)
                return True
            except (peer.PeerError, OSError):
                return False
    limits = module.Limits(handshake_timeout=0.2, links=1, links_per_key=1)
    with module.serve(key_path=str(keys.server.path), authorize=allow, limits=limits) as server:
        while not asked.is_set():  # a busy machine may need more than those 0.2 s until it is asked
            assert not comes_in()
        answer.set()
        eventually(comes_in, "its place is free")


def test_a_link_that_dies_within_a_long_record_keeps_no_turn_to_read():
    with contextlib.closing(Ends("0:127.0.0.1:1")) as ends:
        pair = ends.live[0]
        link, wire, memory = pair.acceptor, pair.pipes[TO_ACCEPTOR].sink, ends.server.memory
        record = bytes(pair.opener.writer.data(ends.loop.scratch_out, 200000))
        for piece in record[:1448], record[1448:60000]:  # a buffer of its own, and then one that the loop lends
            wire.sendall(piece)
            ends.loop.turn()
        assert link.unread._lent is not None
        link.lose(module.LinkClosed("the path broke"))
        assert not memory._halves
