"""Streams on links that are reused: thousands of them with random ends, few handshakes, round trips, and a man in the middle.

Through the real program at both ends, with a relay of the test's own between them where the path matters.
"""

import base64
import collections
import contextlib
import hashlib
import os
import random
import re
import socket
import struct
import threading

import pytest

from support import ratrod2_peer as peer
from support.programs import LISTENING, PATIENCE, READY, STARTED
from support.sockets import dial, dial_with, eventually, receive_exactly

LONG = bool(os.environ.get("RATROD_LONG"))
STREAMS = 20000 if LONG else 500
CONNECTIONS = 5000 if LONG else 1000
RESET = struct.pack("ii", 1, 0)
CLIENT, SERVER = "client", "server"


class Relayed:
    """One connection through a Relay: `flights` are the turns of direction, each (who, all its bytes); what arrives is delayed, changed
    or held back as the relay says."""

    def __init__(self, relay, near, far):
        self._relay, self._near, self._far = relay, near, far
        self._lock = threading.Lock()
        self._cut = False
        self.flights = []
        for who, source, sink in ((CLIENT, near, far), (SERVER, far, near)):
            threading.Thread(target=self._pump, args=(who, source, sink), daemon=True).start()

    def _pump(self, who, source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(1 << 20)
                if self._cut:
                    return None
                if not data:
                    return sink.shutdown(socket.SHUT_WR)
                data = self._relay.change(self, who, data)
                threading.Event().wait(self._relay.delay)  # the path's own delay, not a wait for something
                with self._lock:
                    if self.flights and self.flights[-1][0] == who:
                        self.flights[-1][1].extend(data)
                    else:
                        self.flights.append((who, bytearray(data)))
                sink.sendall(data)

    def cut(self, reset):
        self._cut = True
        for sock in (self._near, self._far):
            with contextlib.suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                # Wakes the thread that reads it: until then closing would only count down.
                sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
                sock.close()


class Relay:
    """A TCP relay to a port of 127.0.0.1, `delay` seconds each way; change(connection, who, data) may be replaced."""

    def __init__(self, to, delay=0.0):
        self.delay = delay
        self.connections = []
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def change(self, connection, who, data):
        return data

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections.append(Relayed(self, near, socket.create_connection(("127.0.0.1", self._to))))

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.cut(reset=False)


@pytest.fixture
def relayed(ratrod, keys):
    """relayed(remotes..., delay=0, change=None) -> (server, client, relay, local ports): client and server with a relay between them."""
    with contextlib.ExitStack() as stack:
        def launch(*remotes, delay=0.0, change=None, serve=(), wait=True):
            server = ratrod("-k", keys.server.path, "-v", "serve", *serve, "127.0.0.1:0")
            relay = Relay(int(server.wait_for(STARTED).group(1)), delay)
            stack.callback(relay.close)
            if change:
                relay.change = change
            client = ratrod("-k", keys.client.path, "-v", "connect", "127.0.0.1:%d" % relay.port, *["0:127.0.0.1:%d" % remote for remote in remotes])
            if wait:
                client.wait_for(READY)
            return server, client, relay, [int(client.wait_for(LISTENING, n + 1).group(1)) for n in range(len(remotes) if wait else 0)]
        # The relay knows the server under its own port; the client trusts the bare key for any address.
        yield launch


def handshakes(server):
    return sum("Accepted" in line for line in server.lines)


# ---------------------------------------------------------------------------------------------------- few handshakes


def test_handshakes_do_not_grow_with_the_connections(relayed, target):
    """What a link is for: short connections, four at a time, on the links that four need."""
    server, _, _, (port,) = relayed(target(lambda connection: connection.sendall(connection.recv(1))).port)

    def many():
        for _ in range(CONNECTIONS // 4):
            with dial(port) as local:
                local.sendall(b"x")
                assert local.recv(2) == b"x"
                assert local.recv(1) == b""
            done.append(1)
    done = []
    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    assert len(done) == CONNECTIONS
    assert handshakes(server) <= 20


# ---------------------------------------------------------------------------------------------------- random ends


class Plan:
    """What happens on one stream, by its number: the bytes each way, who is slow, and who breaks it where."""

    def __init__(self, number):
        rng = random.Random(number)
        self.number = number
        self.up, self.down = (self._bytes(way, rng.choice([0, 1, 100, 5000, 70000, 200000])) for way in b"ud")
        self.target_first = rng.random() < 0.5
        self.slow = rng.random() < 0.1
        self.break_by = rng.choice([None] * 6 + ["originator", "target", "refused"])
        self.break_after = rng.random()

    def _bytes(self, way, n):
        """Nobody else's bytes: what crosses from one stream to another shows."""
        block = hashlib.sha256(b"%d %d" % (self.number, way)).digest()
        return (block * (n // len(block) + 1))[:n]


def read_to_the_end(sock, slow):
    """(what came, "end" or "reset")."""
    received = bytearray()
    try:
        while True:
            data = sock.recv(1000 if slow and len(received) < 20000 else 1 << 16)
            if not data:
                return bytes(received), "end"
            received += data
    except ConnectionResetError:
        return bytes(received), "reset"


def break_off(sock, data, share):
    """Sends a part of `data`, then resets."""
    sock.sendall(data[:int(len(data) * share)])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def send_and_end(sock, data):
    """Whether the connection was found reset: the kernel says so once, to whoever comes first, and shows an end to the next."""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return False
    except OSError:
        return True


class Ends:
    """The target's half of every plan, and what it saw."""

    def __init__(self):
        self.seen = {}

    def handle(self, connection):
        connection.settimeout(PATIENCE)
        plan = Plan(int.from_bytes(receive_exactly(connection, 4), "big"))
        if plan.break_by == "target":
            return break_off(connection, plan.down, plan.break_after)
        broken = plan.target_first and send_and_end(connection, plan.down)
        data, how = read_to_the_end(connection, plan.slow)
        self.seen[plan.number] = data, "reset" if broken else how
        if not plan.target_first:
            send_and_end(connection, plan.down)


def originate(plan, port, refusing_port):
    """The originator's half: what it saw."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError), dial(refusing_port if plan.break_by == "refused" else port) as local:
        header = plan.number.to_bytes(4, "big")
        if plan.break_by == "originator":
            break_off(local, header + plan.up, plan.break_after)
            return b"", "left"
        broken = send_and_end(local, header + plan.up)
        data, how = read_to_the_end(local, plan.slow)
        return data, "reset" if broken else how
    return b"", "reset"


def check(plan, originator, target):
    received, how = originator
    assert plan.down.startswith(received), plan.number
    if how == "end":
        assert received == plan.down, "stream %d was cut off and shows a clean end" % plan.number
    if plan.break_by in ("target", "refused"):
        assert how == "reset", plan.number
    if plan.break_by is None:
        assert how == "end", plan.number
        assert target == (plan.up, "end"), plan.number
    if target is not None:
        data, how = target
        assert plan.up.startswith(data), plan.number
        # An originator that broke it off sent no End: whatever the target saw of it, it was no clean end.
        assert how == ("reset" if plan.break_by == "originator" else "end"), plan.number


@pytest.mark.timeout(1800)
def test_random_ends(relayed, target, closed):
    ends, outcomes = Ends(), {}
    server, _, _, (port, refusing_port) = relayed(target(ends.handle).port, closed)
    numbers = iter(range(STREAMS))

    def work():
        for number in numbers:  # next() of a range iterator is atomic
            outcomes[number] = originate(Plan(number), port, refusing_port)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20 * PATIENCE)
    assert len(outcomes) == STREAMS
    plans = [Plan(number) for number in range(STREAMS)]
    # The target's own reading may end a moment after the originator's.
    eventually(lambda: all(plan.number in ends.seen for plan in plans if plan.break_by is None), "every unbroken stream at the target")
    for plan in plans:
        check(plan, outcomes[plan.number], ends.seen.get(plan.number))
    assert collections.Counter(how for _, how in outcomes.values())["reset"] > STREAMS // 10  # else nothing was tested


# ---------------------------------------------------------------------------------------------------- round trips


def test_a_ready_link_takes_one_round_trip(relayed, tcp_echo):
    _, client, relay, (port,) = relayed(tcp_echo.port, delay=0.05)
    eventually(lambda: any(len(connection.flights) == 4 for connection in relay.connections), "a link with its handshake done")
    with dial_with(b"x", client, port) as local:
        assert local.recv(1) == b"x"
        used = max(relay.connections, key=lambda connection: len(connection.flights))
        # The handshake's four flights, then one there (Open and the byte) and one back (Opened and its echo).
        assert [who for who, _ in used.flights] == [CLIENT, SERVER] * 3


def test_a_fresh_link_takes_two_round_trips(relayed, tcp_echo):
    """The client must not wait for HandshakeCompletion: Open and its byte stand in the same flight as ClientAuthentication."""
    _, _, relay, (port,) = relayed(tcp_echo.port, delay=0.05)
    with contextlib.ExitStack() as stack:
        locals_ = [stack.enter_context(dial(port)) for _ in range(12)]  # more than there are links ready
        for local in locals_:
            local.sendall(b"x")
        for local in locals_:
            assert local.recv(1) == b"x"
        authentication = 2 + 48 + 32 + 16
        fresh = [connection for connection in relay.connections
                 if len(connection.flights) == 4 and len(connection.flights[2][1]) > authentication]
        assert fresh


# ---------------------------------------------------------------------------------------------------- links that die


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_idle_links_that_died_are_replaced(relayed, target, reset):
    """Nothing but Open is sent here, the target speaks first: the user must not notice that the links were gone."""
    _, client, relay, (port,) = relayed(target(lambda connection: connection.sendall(b"x")).port)
    for n in range(5):
        for connection in list(relay.connections):
            connection.cut(reset)
        with dial(port) as local:
            assert local.recv(1) == b"x"
        client.wait_for(r"\] `.*closed: ", n + 1)  # the stream is over: what is cut next is idle
    assert "❌ [" not in client.output  # that two handshakes were cut too may be said


def peer_server(keys, target, serve_link):
    """The port of an independent ratrod2 server: serve_link(link, number) for each connection, after its handshake."""
    numbers = iter(range(1000))

    def handle(connection):
        connection.settimeout(PATIENCE)
        seed = base64.urlsafe_b64decode((keys.server.path / "key").read_text() + "=")[16:48]
        serve_link(peer.Server(connection, seed).handshake(), next(numbers))
    return target(handle).port


def test_close_moves_open_and_its_data_to_another_link(ratrod, keys, target):
    """Close as the first answer means that nothing was looked at: the user notices nothing."""
    moved = []

    def serve_link(link, _number):
        stream = link.accept()
        if stream is None:  # an idle link, when the client ends
            return None
        if not moved:
            moved.append(link.read_any_record().content)
            link.send_record(peer.CLOSE)
            return link.read_to_end()
        stream.opened()
        data = stream.receive()
        stream.send(data)
        return stream.finish()
    port = peer_server(keys, target, serve_link)
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:good:1")
    client.wait_for(READY)
    with dial(int(client.wait_for(LISTENING).group(1))) as local:
        local.sendall(b"kept")
        assert local.recv(10) == b"kept"
    assert moved == [b"kept"]


def test_all_udp_sessions_of_a_client_share_one_link(ratrod, keys, target):
    udp_links = []

    def serve_link(link, number):
        stream = link.accept()
        if stream:  # no idle link, when the client ends
            assert stream.kind == peer.UDP
            udp_links.append(number)
            with contextlib.suppress(peer.LinkEnded):
                peer.serve_udp(stream)
    port = peer_server(keys, target, serve_link)
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:good:1", "0:good:2")
    client.wait_for(READY)
    with contextlib.ExitStack() as stack:
        for n in (1, 2):
            local_port = int(client.wait_for(r"\[UDP\] Listening on `.*?:(\d+)`", n).group(1))
            for _ in range(5):
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.settimeout(PATIENCE)
                sock.sendto(b"hello", ("127.0.0.1", local_port))
                assert sock.recv(100) == b"hello"
    assert len(udp_links) == 1


def test_udp_tries_no_second_link_of_a_server_that_ended(ratrod, keys, target):
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
        with contextlib.suppress(peer.LinkEnded):
            link.serve_streams(lambda stream: handle(stream, is_old))
    client = ratrod("-k", keys.client.path, "connect", "127.0.0.1:%d" % peer_server(keys, target, serve_link), "0:good:1")
    client.wait_for(READY)
    with contextlib.ExitStack() as stack:  # so many idle links
        locals_ = [stack.enter_context(dial(int(client.wait_for(LISTENING).group(1)))) for _ in range(6)]
        for local in locals_:
            local.sendall(b"?")
        for local in locals_:
            assert receive_exactly(local, 1) == b"?"
            local.shutdown(socket.SHUT_WR)
            assert local.recv(1) == b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", int(client.wait_for(r"\[UDP\] Listening on `.*?:(\d+)`").group(1))))

        def is_answered():
            sock.send(b"hello")
            with contextlib.suppress(socket.timeout):
                return sock.recv(100) == b"hello"
        eventually(is_answered, lambda: "%s, %s" % (asked, client.output))
    assert asked in ([True, False], [True, True, False]), "one that was in its handshake may be tried"  # of three tries
    assert "❌" not in client.output


# ---------------------------------------------------------------------------------------------------- a man in the middle


def once(who, at, change):
    """A Relay.change that puts change(data) in place of the first bytes of `who` in each connection that are longer than `at`."""
    changed = set()

    def apply(connection, whose, data):
        if whose != who or id(connection) in changed or len(data) <= at:
            return data
        changed.add(id(connection))
        return change(data)
    return apply


def own_ephemeral(at):
    """A key of the attacker's in place of the one at data[at:]."""
    return lambda data: data[:at] + peer.keypair(os.urandom(32)).public_bytes + data[at + 32:]


def without_aegis(data):
    """The offer `02 01 02` becomes `01 02`, its length with it."""
    opening = len(peer.OPENING)
    length = int.from_bytes(data[opening:opening + 2], "big")
    return data[:opening] + (length - 1).to_bytes(2, "big") + data[opening + 2:opening + 34] + b"\x01\x02"


LEGACY_ERROR = b"\0" + struct.pack(">Q", 8) + b"\x06\x03\x05hello"
ATTACKS = {
    "the client's ephemeral key": (once(CLIENT, 42, own_ephemeral(len(peer.OPENING) + 2)), "❌"),
    "the server's ephemeral key": (once(SERVER, 34, own_ephemeral(2)), "❌"),
    "the suites": (once(CLIENT, 42, without_aegis), "❌"),
    "legacy": (once(SERVER, 0, lambda data: LEGACY_ERROR), "--legacy"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_man_in_the_middle_gets_no_connection(relayed, tcp_echo, attack):
    change, says = ATTACKS[attack]
    server, client, relay, _ = relayed(tcp_echo.port, change=change, wait=False)
    assert client.wait() != 0
    assert says in client.output
    assert "Challenge accepted" not in client.output
    assert handshakes(server) == 0
    assert tcp_echo.accepted == 0


def test_a_recorded_session_played_again(relayed, tcp_echo):
    server, client, relay, (port,) = relayed(tcp_echo.port)
    with dial(port) as local:
        local.sendall(b"x")
        assert local.recv(1) == b"x"
    client.stop()
    before, accepted = handshakes(server), tcp_echo.accepted
    recorded = [b"".join(data for who, data in connection.flights if who == CLIENT) for connection in relay.connections]
    for said in recorded:
        with dial(int(server.wait_for(STARTED).group(1))) as again:
            with contextlib.suppress(OSError):
                again.sendall(said)
            assert read_to_the_end_or_reset(again)
    assert (handshakes(server), tcp_echo.accepted) == (before, accepted)


def read_to_the_end_or_reset(sock):
    """True once the other side is gone; what it says until then is its half of a handshake."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(4096):
            pass
    return True


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_share_a_port_and_end_together(ratrod, keys, tcp_echo):
    server = ratrod("-k", keys.server.path, "-v", "serve", "--workers", "2", "127.0.0.1:0")
    server_port = int(server.wait_for(STARTED).group(1))
    client = ratrod("-k", keys.client.path, "connect", "--workers=2", "127.0.0.1:%d" % server_port, "0:127.0.0.1:%d" % tcp_echo.port)
    client.wait_for(READY)
    port = int(client.wait_for(LISTENING).group(1))
    with contextlib.ExitStack() as stack:
        for n in range(50):
            local = stack.enter_context(dial(port))
            local.sendall(b"%d" % n)
            assert local.recv(10) == b"%d" % n
    assert len(re.findall("Starting server", server.output)) == 2  # -v shows each worker's
    assert client.stop() == 0
    assert server.stop() == 0
    # Nobody is left behind who holds the port.
    with socket.create_server(("127.0.0.1", server_port)):
        pass


def test_a_busy_port_stays_an_error_with_workers(ratrod, keys, serve):
    _, port = serve()
    again = ratrod("-k", keys.server.path, "serve", "--workers", "2", "127.0.0.1:%d" % port)
    assert again.wait() == 1
    assert "in use" in again.output


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("flag, whose", [("--max-links", "in all"), ("--max-links-per-key", "of this client")])
def test_one_link_too_many_is_refused_clearly(serve, connect, tcp_echo, flag, whose):
    """A client that is known learns why, and is not told that its key is wrong; the one that is in stays."""
    server, port = serve(flag, "1")
    first = connect(port, "0:127.0.0.1:%d" % tcp_echo.port)
    first.wait_for(READY)
    second = connect(port)
    assert second.wait() == 1
    assert "the server has as many connections %s as it takes (1)" % whose in second.output
    server.wait_for("as many connections %s" % whose)
    with dial(int(first.wait_for(LISTENING).group(1))) as local:
        local.sendall(b"x")
        assert local.recv(1) == b"x"


def test_a_udp_session_too_many_pushes_out_the_least_recently_used(serve, connect, udp_echo):
    _, port = serve("--max-udp-sessions", "2")
    client = connect(port, "0:127.0.0.1:%d" % udp_echo.port)
    client.wait_for(READY)
    local_port = int(client.wait_for(r"\[UDP\] Listening on `.*?:(\d+)`").group(1))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(4)]
        # Twice, so that those that were pushed out come back as new sessions.
        for sock in sockets * 2:
            sock.settimeout(PATIENCE)
            sock.sendto(b"hello", ("127.0.0.1", local_port))
            assert sock.recv(100) == b"hello"
