"""Servers and clients that go away and come back: what is lost shows, what is new works, and nothing is left behind.
With 100 kills of each side, 5 minutes: RATROD_LONG=1 with -s and --timeout=1200."""

import collections
import contextlib
import os
import re
import socket
import threading
import time

import pytest

import ratrod as module
from support import programs, ratrod2_peer as peer, sockets
from support.keys import identity_of, seed_of
from support.pressure import LONG, figure, scaled
from support.programs import AUTHENTICATION_FAILED, LEGACY, PATIENCE, RATROD, RATROD2, READY, STARTED, descriptors, either_wire, tcp_port
from support.relays import Door
from support.scripted import Scripted
from support.sockets import ask, ask_udp, ask_until_answered, dial, eventually, outcome_of, ping, port_of, receive_all, receive_exactly, works
from support.socks5 import ask_socks, request, socks_port
from support.targets import says
from support.traffic import RESET, Traffic

pytestmark = pytest.mark.usefixtures("no_traceback")

KILLS = 100 if LONG else 5
OFTEN = "--max-retry-interval", "0.3"  # tries come soon
AT_ONCE = "--resume", "0"  # a lost link resets its stream
COUNTED = "--max-retry-count", "1000"  # a client whose tries are counted ends where its key is refused
# What is promised within 2 s gets five times that on a busy machine.
SOON = 10
FAILED, WRONG = 1, 2
LOST = r"❌ Lost the server"
AGAIN = r"✅ Connected to server `([^`]*)` again, after (\d+) (?:try|tries) in [\d.]+ s"
GAVE_UP = r"❌ Giving up after (\d+) (?:retry|retries) in [\d.]+ s: "


def count(pattern, program):
    return sum(bool(re.search(pattern, line)) for line in program.lines)


@pytest.fixture
def door(target):
    return Door(target)


@pytest.fixture
def connect_to(ratrod, keys):
    """connect_to(ports, mode, words...) -> the client of one or several servers on 127.0.0.1, not yet awaited."""
    def launch(ports, mode, *words, **options):
        return ratrod("-k", keys.client.path, "connect", *mode.connect, ",".join("127.0.0.1:%d" % port for port in ports), *words, **options)
    return launch


def many_at_once(client, n):
    """So many connections to an echo, each to its end: so many links are idle after it."""
    connections = [dial(tcp_port(client)) for _ in range(n)]
    for use in (ping, sockets.ask_over):
        for connection in connections:
            use(connection)


def pauses(times):
    return [after - before for before, after in zip(times, times[1:])]


@pytest.mark.timeout(1200)
def test_a_server_that_is_killed_again_and_again(serve, connect_to, tcp_echo, listener):
    """Each time the open streams are visibly reset, new ones work soon after it is back, the log says it twice, and nothing leaks."""
    server, port = serve()
    # A connection that waits for the server waits as long as a busy machine takes to start one.
    client = connect_to([port], RATROD2, *OFTEN, *AT_ONCE, "--idle-links", "1", "--connect-timeout", "%d" % PATIENCE,
                        "0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % port_of(listener)).ready()
    ports = [tcp_port(client, n) for n in (1, 2)]
    ask(ports[0])
    at_start, after, waited = descriptors(client), [], []
    for number in range(KILLS):
        with Traffic() as traffic:
            quiet, sends, receives = (traffic.stream(lambda: dial(ports[1]), listener, name) for name in ("quiet", "sends", "receives"))
            for stream in traffic.streams:
                stream.flow(1000)
            traffic.wait_until(lambda: all(stream.all_arrived for stream in traffic.streams), "bytes both ways")  # noqa: B023 - called at once
            sends.flow()
            sends.target.may_send = 0
            receives.flow()
            receives.originator.may_send = 0
            traffic.wait_until(lambda: min(sends.target.received, receives.originator.received) > 1 << 20, "bulk")  # noqa: B023
            server.kill()
            traffic.wait_until(lambda: all(stream.originator.over for stream in traffic.streams), "each stream has ended")  # noqa: B023
            assert [stream.originator.over for stream in traffic.streams] == [RESET] * 3, traffic.streams
        with dial(ports[0]) as early:  # it waits for the server
            early.sendall(b"early")
            client.wait_for(LOST, number + 1)
            server, _ = serve(bind="127.0.0.1:%d" % port)
            there = time.monotonic()
            ask(ports[0])
            after.append(time.monotonic() - there)
            assert receive_exactly(early, 5) == b"early"
            waited.append(time.monotonic() - there)
        client.wait_for(AGAIN, number + 1)
    figure("server killed %d times" % KILLS, "worst new connection after it is back %.2f s, worst one that waited for it %.2f s" % (
        max(after), max(waited)))
    assert max(after + waited) < SOON
    assert (count(LOST, client), count(AGAIN, client)) == (KILLS, KILLS)
    # Some idle links are kept; a leak of one for each kill would be more.
    eventually(lambda: descriptors(client) <= at_start + 4, lambda: "%d descriptors after %d at the start" % (descriptors(client), at_start))
    figure("descriptors of the client after %d kills" % KILLS, "%d, %d at the start" % (descriptors(client), at_start))


@pytest.mark.timeout(1200)
def test_a_client_that_is_killed_again_and_again(serve, connect_to, udp_echo, listener):
    """The server lets go of its links, streams, remotes, UDP sessions and listeners at once."""
    server, port = serve("--allow-listen", *AT_ONCE)
    at_start, worst = None, 0.0
    remote = "127.0.0.1:%d" % port_of(listener)
    for number in range(KILLS if LONG else 2):
        client = connect_to([port], RATROD2, "0:" + remote, "0:127.0.0.1:%d" % udp_echo.port, "R:0:" + remote).ready()
        reverse_port = int(client.wait_for(r"listens on `[^`]*:(\d+)`").group(1))
        with Traffic() as traffic, contextlib.closing(programs.udp_originator(client, 2)) as originator:
            streams = [traffic.stream(lambda: dial(tcp_port(client)), listener, name) for name in ("quiet", "busy")]  # noqa: B023
            back = traffic.stream(lambda: dial(reverse_port), listener, "reverse")  # noqa: B023 - called at once
            for stream in traffic.streams:
                stream.flow(1000)
            ask_udp(originator, b"datagram")
            traffic.wait_until(lambda: all(stream.all_arrived for stream in traffic.streams), "bytes both ways")  # noqa: B023
            streams[1].flow()
            traffic.wait_until(lambda: streams[1].target.received > 1 << 20, "bulk")  # noqa: B023
            client.kill()
            since = time.monotonic()
            # What the server itself ends is a reset. Of the sockets of a killed process the kernel says what it likes.
            ended_here = [stream.target for stream in streams] + [back.originator]
            traffic.wait_until(lambda: all(end.over for end in ended_here), "each stream has ended")  # noqa: B023
            assert [end.over for end in ended_here] == [RESET] * 3, traffic.streams
        eventually(lambda: sockets.refused(reverse_port), "the reverse listener is gone")  # noqa: B023
        if number == 0:  # what is loaded on first use is counted in
            at_start = sockets.settled(lambda: descriptors(server))
        eventually(lambda: descriptors(server) <= at_start, lambda: "%d descriptors after %d" % (descriptors(server), at_start))  # noqa: B023
        worst = max(worst, time.monotonic() - since if number else 0)
    figure("client killed", "server has let go of everything after %.2f s at worst; %d descriptors" % (worst, descriptors(server)))
    assert worst < SOON
    assert at_start < 16  # nothing but the program's own


@either_wire
def test_the_first_failure_ends_it_at_once(connect_to, closed, door, mode):
    """Whoever mistyped the address wants to know now. Each of several servers is tried, and named, and tried once where it is named several times."""
    client = connect_to([closed, door.port, door.port], mode, "0:127.0.0.1:1")
    assert client.wait() == FAILED
    assert count("Test connection failed", client) == 1, client.output
    assert all("127.0.0.1:%d" % port in client.wait_for("Test connection failed: .*").group() for port in (closed, door.port))
    assert len(door.tries) == 1


@either_wire
def test_a_server_that_comes_late(serve, connect, tcp_echo, door, mode):
    """With a count the first connection may take its time too."""
    client = connect(door.port, *mode.connect, "--max-retry-count", "1000", *OFTEN, "0:127.0.0.1:%d" % tcp_echo.port)
    eventually(lambda: len(door.tries) > 2, "three tries")
    door.to = serve(*mode.serve)[1]
    client.wait_for(READY)
    ask(tcp_port(client))
    assert count("❌", client) == 1, client.output


@either_wire
@pytest.mark.parametrize("tries", [0, 3])
def test_so_many_tries(serve, connect, tcp_echo, door, mode, tries):
    """At the start, and after a loss; that many idle links died at once is one loss."""
    words = *mode.connect, "--max-retry-count", "%d" % tries, *OFTEN, "0:127.0.0.1:%d" % tcp_echo.port
    client = connect(door.port, *words)
    assert client.wait() == FAILED
    assert len(door.tries) == 1 + tries
    failures = [line for line in client.lines if "❌" in line]
    if tries:
        assert len(failures) == 2 and "trying again" in failures[0], client.output
        assert re.search(GAVE_UP, failures[1]).group(1) == "3"
    server, door.to = serve(*mode.serve)
    client = connect(door.port, *words).ready()
    many_at_once(client, 6)
    before, door.to = sockets.settled(lambda: len(door.tries)), None
    server.kill()
    if mode is LEGACY:  # it has no link that could tell
        assert outcome_of(tcp_port(client)) == "reset" or not tries
    assert client.wait() == FAILED
    if tries:
        assert client.wait_for(GAVE_UP).group(1) == "3"
        # The loss itself may be noticed by a try or two, for the links that are to be ready.
        assert 3 <= len(door.tries) - before <= 5
        assert count("trying again", client) == count(GAVE_UP, client) == 1, client.output
    else:
        assert count("❌", client) == 1, client.output


def test_tries_for_ever_with_growing_pauses(serve, connect, tcp_echo, door):
    """The pauses double, and are drawn from their upper half: what the clients of a restarted server need most. And the log has two lines."""
    longest, tries = 0.5, 6
    server, door.to = serve()
    client = connect(door.port, "--max-retry-interval", "%g" % longest, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    ask(tcp_port(client))
    # A handshake that is under way when the server dies would be one more failed try.
    lines, before, door.to = len(client.lines), sockets.settled(lambda: len(door.tries)), None
    server.kill()
    client.wait_for(LOST)
    eventually(lambda: len(door.tries) >= before + tries + 2, "it goes on trying")
    times = door.tries[before:]
    while times[1] - times[0] < 0.06:  # tries at once, by which the loss was noticed
        del times[0]
    taken = pauses(times)[:tries]
    whole = [min(longest, 0.25 * 2 ** n) for n in range(tries)]
    assert all(0.5 * most - 0.02 < pause < most + 1 for pause, most in zip(taken, whole)), taken
    shares = [pause / most for pause, most in zip(taken, whole)]
    assert max(shares) - min(shares) > 0.05, "no jitter: %r" % taken
    noticed = len(door.tries[before:]) - len(times)
    _, door.to = serve()
    found = client.wait_for(AGAIN)
    assert found.group(1) == "127.0.0.1:%d" % door.port
    # As many as came to the door after the loss was noticed, but for the links that follow the first good one. Of the tries that notice it
    # at the same moment one counts, or on a busy machine each.
    came = len(door.tries) - before
    assert came - noticed - 4 <= int(found.group(2)) <= came
    ask(tcp_port(client))
    assert len(client.lines) == lines + 2, client.output


@either_wire
def test_who_waits_is_served(serve, keys, tcp_echo, door, monkeypatch, caplog, stack, mode):
    """However long the pauses have grown, they are short while somebody waits: here 0.3 s in place of 5 and more."""
    monkeypatch.setattr(module.Reach, "FIRST", 10.0)
    monkeypatch.setattr(module.Reach, "HURRY", 0.3)
    server, door.to = serve(*mode.serve)
    with module.tunnel("127.0.0.1:%d" % door.port, "0:127.0.0.1:%d" % tcp_echo.port, key_path=str(keys.client.path),
                       legacy=mode is LEGACY) as tunnel:
        ask(tunnel.address[1])
        door.to = None
        server.kill()
        if mode is RATROD2:  # what is sent on a link that nobody knows to be dead is lost with it
            eventually(lambda: "Lost the server" in caplog.text, "the loss")
        waiting = [stack.enter_context(dial(tunnel.address[1])) for _ in range(3)]
        for n, connection in enumerate(waiting):
            connection.sendall(b"%d" % n)
        began, tried = time.monotonic(), len(door.tries)
        more = 8 if mode is LEGACY else 3  # legacy tries for each of them at first
        eventually(lambda: len(door.tries) >= tried + more, "more tries")
        gaps = pauses([began, *door.tries[tried:tried + more]])
        assert max(gaps) < 4, "it does not hurry: %r" % gaps
        assert sum(gaps) > 0.2, "it does not pause: %r" % gaps
        _, door.to = serve(*mode.serve)
        for n, connection in enumerate(waiting):
            assert connection.recv(10) == b"%d" % n


@either_wire
def test_who_waits_too_long_is_reset_and_told_why(serve, connect_to, tcp_echo, mode):
    server, port = serve(*mode.serve)
    client = connect_to([port], mode, "0:127.0.0.1:%d" % tcp_echo.port, "0:socks", "--connect-timeout", "0.5").ready()
    server.kill()
    since = time.monotonic()
    with dial(tcp_port(client)) as connection:
        connection.sendall(b"x")
        pytest.raises(ConnectionResetError, connection.recv, 1)
        address = "127.0.0.1:%d" % port_of(connection)
    assert time.monotonic() - since > 0.4
    line = client.wait_for(r"❌ \[\w+\] `%s` -> .*" % re.escape(address)).group()
    assert "127.0.0.1:%d" % port in line and "Connection refused" in line, line
    assert ask_socks(socks_port(client), request("127.0.0.1", tcp_echo.port))[1] == 1  # general failure


def wake(client, mode):
    """Legacy has no link that waits: a local connection makes it try."""
    if mode is LEGACY:
        with contextlib.suppress(ConnectionResetError), dial(tcp_port(client)) as connection:
            connection.recv(1)


@pytest.mark.parametrize("mode, bound", [(RATROD2, False), (LEGACY, True)], ids=["bare line", "legacy, bound line"])
def test_a_key_that_was_removed_meanwhile_and_another_host_key(serve, ratrod, connect, keys, stranger, tcp_echo, mode, bound):
    """A client that was let in once says why, and goes on trying: a list may lack its key for a moment. One whose tries are counted ends."""
    server, port = serve(*mode.serve)
    if bound:
        keys.client.write("known_hosts", "%s 127.0.0.1:%d\n" % (keys.server.public, port))
    def start(*words):
        return connect(port, *mode.connect, *OFTEN, *words, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    def assert_told(text):
        for one in (client, counted):
            wake(one, mode)
            one.wait_for(text)
        assert counted.wait() == AUTHENTICATION_FAILED
    client, counted = start(), start(*COUNTED)
    server.kill()
    keys.server.write("authorized_keys", "")
    server, _ = serve(*mode.serve, bind="127.0.0.1:%d" % port)
    assert_told("does not know this client's key.*" + re.escape(keys.client.public))
    assert "again, after" not in client.output, "it was not let in"
    keys.server.write("authorized_keys", keys.client.public + "\n")
    eventually(lambda: works(tcp_port(client)), "it is let in again")
    counted, away = start(*COUNTED), "ERROR .*Lost the server .*Connection refused"
    before = count(away, client)
    server.kill()
    if mode is RATROD2:  # what it says of a server that is away does not keep it from saying more
        client.wait_for(away, before + 1)
    stranger.trust(keys.client, "authorized_keys")
    wrong = ratrod("-k", stranger.path, "serve", *mode.serve, "127.0.0.1:%d" % port)
    wrong.wait_for(STARTED)
    assert_told(("HAS CHANGED.*" if bound else "") + re.escape(stranger.public))
    assert ("HAS CHANGED" in client.output) == bound
    # The client never trusts what it should not, and goes on when the right server is back.
    assert not works(tcp_port(client))
    wrong.kill()
    serve(*mode.serve, bind="127.0.0.1:%d" % port)
    eventually(lambda: works(tcp_port(client)), "it is let in again")


def test_names_are_resolved_for_each_try(serve, ratrod, keys, resolver, tcp_echo):
    """A server that moves keeps its name."""
    names = resolver(moves_example=["127.0.0.1"])
    server, port = serve()
    client = ratrod("-k", keys.client.path, "connect", "moves.example:%d" % port, "0:127.0.0.1:%d" % tcp_echo.port, env=names.environment).ready()
    ask(tcp_port(client))
    server.kill()
    client.wait_for(LOST)
    serve(bind="127.0.0.2:%d" % port)
    names.answer({"moves.example": ["127.0.0.2"]})
    ask(tcp_port(client))


@either_wire
def test_fail_over_with_every_kind_of_tunnel(serve, connect_to, tcp_echo, udp_echo, closed, mode):
    """Through the one that answers: the first is dead from the start, the second is killed, and back; none for a while; the log names it."""
    flags = [*mode.serve, *(["--allow-listen"] if mode is RATROD2 else [])]
    servers, ports = map(list, zip(*(serve(*flags) for _ in range(2))))
    reverse = ["R:0:127.0.0.1:%d" % tcp_echo.port] if mode is RATROD2 else []
    client = connect_to([closed, *ports], mode, "0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % udp_echo.port, "0:socks", *reverse).ready()
    assert "❌" not in client.output
    reverse_port = int(client.wait_for(r"listens on `[^`]*:(\d+)`").group(1)) if reverse else None
    with contextlib.closing(programs.udp_originator(client, 2)) as originator:
        def works():
            ask(tcp_port(client))
            ask_until_answered(originator, b"datagram")
            connection, code, _ = ask_socks(socks_port(client), request("127.0.0.1", tcp_echo.port))
            with connection:
                assert code == 0
                ping(connection, word=b"through SOCKS")
            if reverse_port:
                # Whoever listens there asks again in its own time.
                eventually(lambda: not sockets.refused(reverse_port), "the reverse tunnel is there")
                ask(reverse_port)
        works()
        servers[0].kill()  # fail-over
        works()
        servers[0], _ = serve(*flags, bind="127.0.0.1:%d" % ports[0])
        servers[1].kill()  # and back
        works()
        servers[0].kill()  # nobody
        if mode is RATROD2:
            line = client.wait_for(LOST + ".*", count(LOST, client) + (count(LOST, client) == count(AGAIN, client))).group()
            assert all("127.0.0.1:%d" % port in line for port in ports)
        servers[1], _ = serve(*flags, bind="127.0.0.1:%d" % ports[1])
        works()
    if mode is RATROD2:
        assert client.wait_for(AGAIN, count(LOST, client)).group(1) == "127.0.0.1:%d" % ports[1]


def test_the_one_that_worked_last_stays_in_use(serve, connect_to, tcp_echo, target):
    """The first one coming back is no reason to leave the second."""
    server, port = serve()
    first, second = Door(target), Door(target, port)
    client = connect_to([first.port, second.port], RATROD2, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    tried = len(first.tries)
    assert tried == 1
    first.to = port
    many_at_once(client, 10)  # more than there are idle links
    assert len(first.tries) == tried
    assert len(second.tries) >= 10


@pytest.mark.parametrize("first, mode", [("wrong", LEGACY), ("dead", RATROD2), ("killed", RATROD2), ("killed", LEGACY)],
                         ids=["wrong-legacy", "dead-ratrod2", "killed-ratrod2", "killed-legacy"])
def test_one_of_them_has_a_wrong_key(serve, ratrod, connect_to, keys, stranger, tcp_echo, closed, first, mode):
    """It is not passed over in silence: where it is asked first, where the good one never was there, and where the good one is no longer there."""
    stranger.trust(keys.client, "authorized_keys")
    server, good = serve(*mode.serve)
    bad = int(ratrod("-k", stranger.path, "serve", *mode.serve, "127.0.0.1:0").wait_for(STARTED).group(1))
    ports = {"wrong": [bad, good], "dead": [closed, bad], "killed": [good, bad]}[first]
    client = connect_to(ports, mode, *COUNTED, "0:127.0.0.1:%d" % tcp_echo.port)
    if first == "killed":
        client.wait_for(READY)
        server.kill()
        wake(client, mode)
    assert client.wait() == AUTHENTICATION_FAILED
    assert stranger.public in client.output


@pytest.mark.parametrize("mode, why", [(RATROD2, "refused"), (RATROD2, "changed"), (LEGACY, "refused")],
                         ids=["refused-ratrod2", "changed-ratrod2", "refused-legacy"])
def test_one_that_turns_the_client_away_is_passed_by(serve, ratrod, connect_to, keys, stranger, tcp_echo, mode, why):
    """It does not know the client's key, or shows another key than the listed one: that is said, and the next one is asked, at the start and
    when the next one comes back. Where all turn it away its exit code is 3."""
    stranger.trust(keys.client if why == "changed" else stranger, "authorized_keys")
    bad = int(ratrod("-k", stranger.path, "serve", *mode.serve, "127.0.0.1:0").wait_for(STARTED).group(1))
    server, good = serve(*mode.serve)
    listed = keys.server if why == "changed" else stranger
    keys.client.write("known_hosts", "%s 127.0.0.1:%d\n%s 127.0.0.1:%d\n" % (listed.public, bad, keys.server.public, good))
    passed = "server `127.0.0.1:%d` is passed by: .*%s" % (bad, stranger.public if why == "changed" else keys.client.public)
    client = connect_to([bad, good], mode, *OFTEN, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    assert count(passed, client) == 1
    ask(tcp_port(client))
    server.kill()
    wake(client, mode)
    serve(*mode.serve, bind="127.0.0.1:%d" % good)
    eventually(lambda: works(tcp_port(client)), "it is with the good one again")
    keys.server.write("authorized_keys", stranger.public + "\n")  # an empty one, as editors leave it for a moment, would not count yet
    client = connect_to([bad, good], mode)
    assert client.wait() == AUTHENTICATION_FAILED
    assert all("127.0.0.1:%d" % port in client.wait_for("Test connection failed: none of .*").group() for port in (bad, good))


def test_a_link_that_the_server_ends_each_time_does_not_spin(connect, keys, target):
    """A server that takes the client in and closes the link at once: every try counts as one, with its pause."""
    seen = []
    def handle(connection):
        connection.settimeout(PATIENCE)
        seen.append(time.monotonic())
        peer.Server(connection, seed_of(keys.server)).handshake()
        if len(seen) == 1:
            time.sleep(0.6)  # long enough to be worth another
    connect(target(handle).port, "0:127.0.0.1:1").ready()
    eventually(lambda: len(seen) >= 3, "it tries again")
    began = len(seen)
    time.sleep(1.5)  # nothing is awaited: it is counted what comes
    assert len(seen) - began < 15  # about 7, where each is a try with its pause; 40 without


def test_what_a_frozen_server_used_up_is_not_the_next_ones(serve, keys, tcp_echo, target, monkeypatch):
    """It takes the connection and says nothing. On loopback a millisecond is enough to connect; on a real path the next one needs its share."""
    silent = target(lambda connection: connection.recv(1 << 16) and connection.recv(1))
    _, port = serve()
    shares = []
    connector = module.Connector
    monkeypatch.setattr(module, "Connector", lambda loop, where, timeout, done: shares.append(timeout) or connector(loop, where, timeout, done))
    limits = module.Limits(handshake_timeout=2.0, connect_timeout=2.0)
    with module.tunnel("127.0.0.1:%d,127.0.0.1:%d" % (silent.port, port), "0:127.0.0.1:%d" % tcp_echo.port, key_path=str(keys.client.path),
                       limits=limits) as tunnel:
        ask(tunnel.address[1])
    assert len(shares) > 1 and min(shares[:2]) >= 0.9, shares


def test_a_full_server_is_passed_by(serve, connect_to, keys, tcp_echo, stack):
    """At the start, and for new links; where all are full that is said."""
    ports = [serve("--max-links", "1")[1] for _ in range(2)]
    for port in ports:
        stack.enter_context(peer.Client.connect(port, seed_of(keys.client))).handshake()
    client = connect_to(ports, RATROD2)
    assert client.wait() == 1
    client.wait_for("as many connections in all as it takes")
    client = connect_to([*ports, serve()[1]], RATROD2, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    ask(tcp_port(client))


def test_who_has_only_reverse_tunnels_knows_that_the_server_is_away(serve, keys, tcp_echo):
    server, port = serve("--allow-listen")
    with module.tunnel("127.0.0.1:%d" % port, "R:0:127.0.0.1:%d" % tcp_echo.port, key_path=str(keys.client.path)) as tunnel:
        client = tunnel._endpoint
        assert client.connected
        server.kill()
        eventually(lambda: not client.connected, "it knows that it is away")
        serve("--allow-listen", bind="127.0.0.1:%d" % port)
        eventually(lambda: client.connected, "it knows that it is back")
        assert client.counters.reconnects == 1


def test_udp_to_a_remote_that_could_not_be_reached_is_tried_again(keys, udp_echo, monkeypatch):
    """Its originator never falls silent, as WireGuard does not; its session is not to stay deaf for that."""
    asked = []
    def look_up(address, *rest):
        asked.append(address.host)
        if len(asked) == 1:
            raise module.ConnectError("cannot resolve `later.example`")
        return [(socket.AF_INET, ("127.0.0.1", address.port))]
    real = module.look_up
    monkeypatch.setattr(module, "look_up", lambda address, *rest: (look_up if address.host == "later.example" else real)(address, *rest))
    monkeypatch.setattr(module.Client, "REST", 0.2)
    with module.serve(key_path=str(keys.server.path)) as server, module.tunnel(
            "127.0.0.1:%d" % server.address[1], "0:later.example:%d" % udp_echo.port, key_path=str(keys.client.path)) as tunnel:
        with sockets.dial_udp(tunnel.address[1]) as originator:
            ask_until_answered(originator, b"anybody there?")
    assert len(asked) == 2


# ------------------------------------------------------------ links that die while nobody looks, a slow one, and the one link for all UDP
@pytest.fixture
def path(serve, start, target, keys):
    """path(program=RATROD, flags=()) -> (client, the Door between it and its server): `connect -v` to a target that says hello at once."""
    def launch(program=RATROD, flags=()):
        door = Door(target, serve()[1])
        return start(*program, "-k", keys.client.path, "-v", "connect", *flags, "127.0.0.1:%d" % door.port,
                     "0:127.0.0.1:%d" % target(says(b"hello")).port).ready(), door
    return launch


def all_idle(client, door, streams):
    """Waits until no link does anything: each handshake is done, and `streams` streams are over, as the client sees it."""
    eventually(lambda: client.output.count(" closed: ") == streams, "every stream is over")
    eventually(lambda: client.output.count("cipher: ") == len(door.tries), "every handshake is done")
    sockets.settled(lambda: len(door.tries))  # HandshakeCompletion, which nothing shows, has come


def assert_greeted(client, n=1):
    connections = [dial(tcp_port(client)) for _ in range(n)]
    for connection in connections:
        with connection:
            assert receive_all(connection) == b"hello"


@pytest.mark.parametrize("streams", [0, 8])
def test_links_that_the_path_forgot_are_replaced(path, streams):
    """The Open went out alone."""
    client, door = path()
    assert_greeted(client, streams)
    all_idle(client, door, streams)
    door.forget_all()
    assert_greeted(client)
    client.wait_for(" closed: ", streams + 1)
    assert "❌" not in client.output


def test_a_link_that_fell_silent_is_replaced(path):
    client, door = path(scaled(connect_timeout=1.0), ("--handshake-timeout", "2"))
    all_idle(client, door, 0)
    door.swallow_all()
    assert_greeted(client)


def test_a_long_record_on_a_slow_path_is_not_silence(start, keys, target):
    """The client is not woken for each piece of a long record, but what trickles in is a sign of life: here for three times `silence`."""
    text = os.urandom(400_000)
    def behave(link, number):
        stream = link.accept()
        if stream:
            stream.opened()
            stream.outgoing.count(peer.DATA, text)
            wire = link.writer.seal(peer.DATA, text)
            for at in range(0, 200_000, 5_000):
                link.sock.sendall(wire[at:at + 5_000])
                time.sleep(0.075)
            link.sock.sendall(wire[200_000:])
            stream.finish()
            link.accept()  # as long as the client is there: its Keepalives unread, closing would be a reset
    server = Scripted(keys, target, behave)
    client = start(*scaled(keepalive=0.4, silence=1.0, sweep_interval=0.1), "-k", keys.client.path, "-v", "connect",
                   "127.0.0.1:%d" % server.port, "0:good:1").ready()
    with dial(tcp_port(client)) as connection:
        sockets.say(connection, b"!")
        assert receive_all(connection) == text
    server.check()


def test_udp_sessions_of_a_client_share_one_link(ratrod, keys, target, second, stack):
    """Those of all its tunnels; a second client has its own."""
    links = collections.Counter()
    def behave(link, _number):
        stream = link.accept()
        if stream:
            assert stream.kind == peer.UDP
            links[link.remote_identity] += 1
            peer.serve_udp(stream)
    server = Scripted(keys, target, behave, [keys.client, second])
    for who in (keys.client, second):
        client = ratrod("-k", who.path, "connect", "127.0.0.1:%d" % server.port, "0:good:1", "0:good:2").ready()
        for n in range(10):
            ask_udp(stack.enter_context(programs.udp_originator(client, 1 + n % 2)), b"%d" % n)
    assert links == {identity_of(keys.client): 1, identity_of(second): 1}
    server.check()


def test_udp_tries_no_second_link_of_a_server_that_ended(ratrod, keys, target, stack):
    """As many idle links as there are tries, and each says Close: after the first the others are not trusted either."""
    ended, asked = threading.Event(), []
    def handle(stream, is_old):
        if stream.kind == peer.TCP:
            return peer.echo(stream)
        asked.append(is_old)
        ended.set()
        if not is_old:
            return peer.serve_udp(stream)
        stream.link.send_record(peer.CLOSE)
        return stream.link.read_to_end()
    def serve_link(link, _number):
        is_old = not ended.is_set()
        link.serve_streams(lambda stream: handle(stream, is_old))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % Scripted(keys, target, serve_link).port, "0:good:1").ready()
    many_at_once(client, 6)
    ask_until_answered(stack.enter_context(programs.udp_originator(client)), b"hello")
    assert len(asked) < 6 and asked[-1] is False, asked  # those that were in their handshakes meanwhile may be tried
    assert "❌" not in client.output or len(asked) > 3
