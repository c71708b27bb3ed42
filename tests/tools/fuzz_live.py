"""The fuzz targets of fuzz.py for the whole server and the whole client, over real sockets."""

import contextlib
import logging
import os
import pathlib
import queue
import re
import selectors
import socket
import struct
import sys
import tempfile
import time

from fuzz_parsers import (
    CLIENT,
    CONTENTS,
    GUIDED,
    LISTEN_ADDRESS,
    NAMES,
    PROXY_HEADERS,
    SERVER,
    SOCKS_HOSTS,
    TCP_TARGET,
    UDP_TARGET,
    VARINTS,
    encoded,
    harmless,
    joined,
    kind_of,
    peer_content,
    pieces,
    ratrod,
    socks_request,
    socks_seeds,
    split,
    tampered,
    target,
)
from support import legacy_peer, ratrod2_peer as peer
from support.keys import make_keys
from support.programs import PATIENCE, RATROD, READY, STARTED, Program
from support.sockets import is_ready, receive_exactly
from support.targets import Target, UdpEcho, echo

GROWTH = 300  # MB that a program may gain after its first inputs

RIGS = {}
# Seconds that anything may take to end once its other side has ended; most take a millisecond. A bound on a hang: a stream that waits for a link is
# tried for 10 s, and each handshake for 5, which eight tests at once on two cores have made more than 20 of.
FINAL = 60.0
SETTLED = 200  # after so many inputs an honest client is served
WAIT = 0.05  # seconds that a step waits for an answer that a mutation may have made impossible
MOST_SENT = 200_000  # bytes of one script: what fits into the buffers on the way, so that nobody waits for a reader that waits for him
SECRET = {"server": b"s" * 32, "client": b"c" * 32}
OWN = ratrod.Limits()._replace(handshake_timeout=5.0, resume=1.0)


def close_rigs():
    sys.setswitchinterval(0.005)
    while RIGS:
        RIGS.popitem()[1].close()


def rig(kind):
    """The one of this process."""
    if kind not in RIGS:
        sys.setswitchinterval(0.0005)  # where two of its threads talk to each other
        RIGS[kind] = kind()
    return RIGS[kind]


class Rig:
    """A real program, or where coverage is to guide the inputs (it is seen in one's own process only) the library, with what it needs around it.
    tick() after each input."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self.folder = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ratrod-fuzz-")))
        self.keys = {name: make_keys(self.folder / name, secret) for name, secret in SECRET.items()}
        self.keys["client"].trust(self.keys["server"], "known_hosts")
        self.echo, self.udp = self.closing(Target(echo)), self.closing(UdpEcho())
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.listen_port = free.getsockname()[1]
        with open(str(self.keys["server"].path / "authorized_keys"), "w") as lines:
            lines.write('%s permitlisten="127.0.0.1:%d"\n' % (self.keys["client"].public, self.listen_port))
        # What a mutation makes of a target is never tried: it might be another program's.
        self.regex = r"(?:127\.0\.0\.1|localhost|\[::1\]):(?:%d|%d)" % (self.echo.port, self.udp.port)
        self.program = None
        self._ticks, self._resources = 0, None
        self.start()

    def closing(self, thing):
        self._stack.callback(thing.close)
        return thing

    def run(self, *words):
        """The real program, which says what `words` lead to."""
        self.program = Program([*RATROD, "-v", "-k", self.keys[self.role].path, *words])
        self._stack.callback(self.program.stop)

    def listen_to_log(self):
        """The library: its lines, as a program would show them."""
        self._lines = []
        handler = logging.Handler()
        handler.emit = lambda record: self._lines.append(record.getMessage())
        ratrod.log.addHandler(handler)
        ratrod.log.setLevel(logging.DEBUG)
        self._stack.callback(ratrod.log.setLevel, logging.NOTSET)
        self._stack.callback(ratrod.log.removeHandler, handler)

    def fill(self, data):
        """The addresses of this run in place of those that stand for them in the seeds."""
        for mark, port in ((TCP_TARGET, self.echo.port), (UDP_TARGET, self.udp.port), (LISTEN_ADDRESS, self.listen_port)):
            data = data.replace(mark, b"127.0.0.1:%d" % port)
        return data

    def tick(self):
        self.check_lines()
        self._ticks += 1
        if self._ticks % SETTLED == 0:
            self.honest()
        if self._ticks == SETTLED:
            self._resources = self.resources()

    def check_lines(self):
        lines = self._lines if self.program is None else self.program.lines
        n = len(lines)
        for line in lines[:n]:
            harmless(line, 1200)
            assert not re.search("Traceback|internal error|please report", line), line
        del lines[:n]
        if self.program:
            assert self.program.process.poll() is None, "it ended, with %s" % self.program.process.returncode

    def resources(self):
        """Descriptors, and MB of memory at most."""
        pid = self.program.process.pid if self.program else os.getpid()
        if not os.path.isdir("/proc/self/fd"):
            return 0, 0
        memory = re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/%d/status" % pid).read_text())
        return len(os.listdir("/proc/%d/fd" % pid)), int(memory.group(1)) >> 10

    def check(self):
        """At the end: all is well, and nothing has been left behind."""
        self.honest()
        self.check_lines()
        if self._resources is None:
            return
        deadline = time.monotonic() + PATIENCE
        while self.resources()[0] > self._resources[0] + 10:
            assert time.monotonic() < deadline, "descriptors: %d, after the first inputs %d" % (self.resources()[0], self._resources[0])
            time.sleep(0.1)
        assert self.resources()[1] < self._resources[1] + GROWTH

    def close(self):
        self._stack.close()


def exchange(connect, request=b"an honest question"):
    """One through a tunnel or a proxy that is expected to work."""
    with connect() as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(request)
        assert receive_exactly(sock, len(request)) == request


def read_to_the_end(sock, most=1 << 22):
    """How many bytes come up to its end, and whether that is a reset. It has to come."""
    sock.settimeout(FINAL)
    got = b""
    try:
        while True:
            chunk = sock.recv(1 << 16)
            if not chunk:
                return got, False
            got += chunk
            assert len(got) <= most, "it sends without end"
    except socket.timeout:
        raise AssertionError("%g s after its other side ended it has not ended" % FINAL) from None
    except OSError:
        return got, True


def half_close(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


# ---- scripts: what one end of a link does, as bytes that mutations keep playable

RAW, DAMAGED, OLD, FIN, RESET, AWAIT, REPEATED = range(0x40, 0x47)  # steps beside records, whose steps are their types


class Script:
    """Writes down what an end of a link does, so that it can be played again: `steps`."""

    def __init__(self, *arguments, **options):
        self.steps = []
        super().__init__(*arguments, **options)

    def send_record(self, record_type, content=b"", number=None, length=None):
        self.steps.append(bytes([record_type]) + content)
        return super().send_record(record_type, content, number, length)

    def read_any_record(self):
        record = super().read_any_record()
        self.steps.append(bytes([AWAIT, record.type]))
        return record


class RecordingClient(Script, peer.Client):
    pass


class RecordingServer(Script, peer.Server):
    pass


class End(Exception):
    """The script has ended the link."""


def play(link, steps, fill):
    """Does what a script says, ends the link, and awaits the other side's end: the types of the records that came."""
    sent = waited = 0
    came = []
    try:
        for step in steps:
            sent += len(step)
            waited += step[:1] == bytes([AWAIT])
            if step and sent < MOST_SENT and waited <= 20:
                do(link, step[0], fill(step[1:]), came)
    except End:
        return ("reset",)
    except peer.LinkEnded:
        came.append("ended")
    except OSError:
        pass
    half_close(link.sock)
    link.sock.settimeout(FINAL)
    try:
        came += link.read_to_end()
    except socket.timeout:
        raise AssertionError("%g s after its other side ended the link has not ended" % FINAL) from None
    for record in came:
        if record != "ended":
            check_record(record)
    return tuple(record if record == "ended" else record.type for record in came[:6])


def check_record(record):
    """What it sent can be read by anybody, and shown."""
    if record.type not in (ratrod.DATA, ratrod.DATAGRAMS):
        found = peer_content(record.type, record.content)
        for text in found if isinstance(found, tuple) else (found,):
            if isinstance(text, str) and record.type == ratrod.ERROR:
                assert len(text) <= 700


def do(link, kind, payload, came):
    if kind == RAW:
        link.send(payload)
    elif kind == DAMAGED:
        how, at, mask, record_type, content = split(payload, 1, 2, 1, 1)
        link.send(tampered(link.writer.seal(record_type, content), how, at, mask)[0])
    elif kind == OLD:
        number, record_type, content = split(payload, 1, 1)
        link.send_record(record_type, content, number=number)
    elif kind == FIN:
        link.sock.shutdown(socket.SHUT_WR)
    elif kind == RESET:
        peer.reset(link.sock)
        raise End
    elif kind == AWAIT:
        link.sock.settimeout(WAIT)
        try:
            # Not in the middle of a record, where a second try could not begin.
            link.sock.recv(1, socket.MSG_PEEK)
            link.sock.settimeout(FINAL)
            came.append(link.read_any_record())
        except socket.timeout:
            pass
        finally:
            link.sock.settimeout(FINAL)
    elif kind == REPEATED:
        times, record_type, content = split(payload, 1, 1)
        for _ in range(min(times, 1 + 20_000 // (len(content) + 50))):
            link.send_record(record_type, content)
    else:
        link.send_record(kind, payload)


def variations(steps):
    """A recorded script, and with one step of each other kind in its middle."""
    middle = len(steps) // 2
    record = next(step for step in steps if step[0] < RAW)
    odd = (bytes([RAW]) + b"\0\0\0\x31", bytes([DAMAGED, 1, 0, 9, 4]) + record, bytes([DAMAGED, 2, 0, 9, 4]) + record, bytes([OLD, 0]) + record,
           bytes([FIN]), bytes([RESET]), bytes([REPEATED, 9]) + record, bytes([REPEATED, 200, ratrod.KEEPALIVE]), bytes([ratrod.KEEPALIVE]),
           bytes([ratrod.CLOSE]), bytes([ratrod.ERROR]) + peer.encode_error(2, "\x1b[2J failed \u202e"))
    return [joined(*steps)] + [joined(*steps[:middle], step, *steps[middle:]) for step in odd]


RECORD_WORDS = (*(encoded(kind, fields) for kind, fields in CONTENTS), *VARINTS, *NAMES,
                TCP_TARGET, UDP_TARGET, LISTEN_ADDRESS, b"\0\1\x13", b"\0\1\x14", b"\0\1\x30", b"\0\1\x43", b"\0\1\x45")


# ---- the server


class ServerRig(Rig):
    """A server with everything on. One authorized link stays, so that this machine is not slowed down as strangers are."""

    role = "server"

    def start(self):
        if GUIDED:
            self.listen_to_log()
            self.port = self.closing(ratrod.serve(key_path=str(self.keys["server"].path), remote_regex=self.regex, allow_listen=True, legacy=True,
                                                  limits=OWN)).address[1]
        else:
            self.run("serve", "--legacy", "--allow-listen", "--handshake-timeout", "5", "--resume", "1", "-r", self.regex, "127.0.0.1:0")
            self.port = int(self.program.wait_for(STARTED).group(1))
        self.anchor = self.closing_link(self.link())
        self.identity = legacy_peer.Identity.load(self.keys["client"].path)

    def closing_link(self, link):
        self._stack.enter_context(link)
        return link

    def dial(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=FINAL)

    def link(self, kind=peer.Client):
        return kind.connect(self.port, SECRET["client"], server=SERVER.public).handshake()

    def honest(self):
        with self.link() as link:
            assert link.exchange("127.0.0.1:%d" % self.echo.port, b"still here") == b"still here"
        self.anchor.send_record(peer.KEEPALIVE)

    def recorded(self, act):
        """The steps of act(link) over a real link, with the addresses of the seeds."""
        with self.link(RecordingClient) as link:
            link.steps.clear()
            act(link)
            link.finish()
        steps = b"\n\n".join(link.steps)
        for mark, port in ((TCP_TARGET, self.echo.port), (UDP_TARGET, self.udp.port), (LISTEN_ADDRESS, self.listen_port)):
            steps = steps.replace(b"127.0.0.1:%d" % port, mark)
        return steps.split(b"\n\n")


def converse(link):
    for data in (b"hello", b"x" * 3000):
        assert link.exchange("127.0.0.1:%d" % rig(ServerRig).echo.port, data) == data


def speak_udp(link):
    link.open_udp()
    for number in (1, 2):
        link.session(number, "127.0.0.1:%d" % rig(ServerRig).udp.port)
        link.datagrams((number, b"hello"), (number, b""))
        link.read_udp()
    link.session_over(1)
    link.datagrams((2, b"x" * 1000), (1, b"late"))
    link.read_udp()


def listen(link):
    link.listen("127.0.0.1:%d" % rig(ServerRig).listen_port, b"instance")
    with socket.create_connection(("127.0.0.1", rig(ServerRig).listen_port)) as originator:
        originator.sendall(b"hello")
        half_close(originator)
        peer.echo(link.accept())


def be_refused(link):
    try:
        link.open("127.0.0.1:1").wait_opened()
    except peer.PeerError:
        return
    raise AssertionError("a target that no rule permits was opened")


def server_scripts():
    return [script for act in (converse, speak_udp, listen, be_refused) for script in variations(rig(ServerRig).recorded(act))]


@target(8, server_scripts, RECORD_WORDS, live=True)
def server_peer(data):
    """A whole server against an authenticated peer that sends anything: the link ends once the peer has ended it; what comes until then can be
    read."""
    with rig(ServerRig).link() as link:
        answer = play(link, pieces(data), rig(ServerRig).fill)
    rig(ServerRig).tick()
    return answer


class Recorder:
    """A socket whose traffic is kept, so that it can be replayed."""

    def __init__(self, sock):
        self._sock, self.sent, self.received = sock, bytearray(), bytearray()

    def sendall(self, data):
        self.sent += data
        self._sock.sendall(data)

    def recv(self, n):
        data = self._sock.recv(n)
        self.received += data
        return data

    def __getattr__(self, name):
        return getattr(self._sock, name)


def stranger_seeds():
    """Real sessions as they went over the wire, in both protocols, and what other programs say."""
    made, sessions = rig(ServerRig), []
    sock = Recorder(made.dial())
    with peer.Client(sock, SECRET["client"]) as link:
        link.handshake().exchange("127.0.0.1:%d" % made.echo.port, b"hello")
    sessions.append((bytes(sock.sent[:42 + 3]), bytes(sock.sent[45:])))
    for encrypt in (False, True):
        sock = Recording(made.dial())
        with legacy_peer.Client(sock, made.identity, "127.0.0.1:%d" % made.echo.port, encrypt) as client:
            client.handshake().send(legacy_peer.Data(b"hello"))
        sessions.append(tuple(sock.parts))
    others = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
              b"\r\n", b"ratrod3\n", *PROXY_HEADERS, b"\0", b"\1", b"\n")
    return [joined(*parts) for parts in sessions] + [joined(part) for part in others] + [joined(b"".join(parts)) for parts in sessions]


class Recording(Recorder):
    """... that also keeps the pieces in which it was sent."""

    def __init__(self, sock):
        super().__init__(sock)
        self.parts = []

    def sendall(self, data):
        self.parts.append(bytes(data))
        super().sendall(data)


@target(6, stranger_seeds, (ratrod.OPENING, b"\0\x23", b"\0\x50", b"\4\0", b"\4\1", *VARINTS, *NAMES, bytes(9), b"\xff" * 8), live=True)
def server_stranger(data):
    """A whole server against a stranger who knows no key and sends anything, recorded sessions too: it says no more than its own handshake and one
    refusal, and ends the connection once the stranger has."""
    made = rig(ServerRig)
    with made.dial() as sock:
        got, gone = b"", False
        for number, part in enumerate(pieces(data)):
            if number and number < 4:
                sock.settimeout(WAIT)
                try:
                    got += sock.recv(4096)
                except socket.timeout:
                    pass
                except OSError:
                    gone = True
            try:
                sock.sendall(made.fill(part))
            except OSError:
                gone = True
            if gone:
                break
        half_close(sock)
        rest, _ = read_to_the_end(sock)
        got += rest
    # ServerPreamble of either protocol, an Error, and a legacy server's HandshakeCompletion to whoever has a challenge signed: nobody here.
    assert len(got) <= 1000 and b"hello" not in got
    made.tick()
    return len(got)


LEGACY_STEPS = range(5)
MESSAGE, FLAGGED, SIZED, BARE, HURT = LEGACY_STEPS


def legacy_scripts():
    data, datagram = (ratrod.encode_message(kind(b"hello")) for kind in (ratrod.Data, ratrod.UdpData))
    error = ratrod.encode_message(ratrod.Error(2, "\x1b[2J"))
    steps = [[bytes([MESSAGE]) + data] * 2, [bytes([MESSAGE]) + datagram] * 2, [bytes([MESSAGE]) + error], [bytes([MESSAGE])],
             [bytes([FLAGGED, 0]) + data], [bytes([FLAGGED, 1]) + data], [bytes([FLAGGED, 2]) + data],
             [bytes([SIZED]) + struct.pack(">Q", 1 << 40) + data],
             [bytes([SIZED]) + struct.pack(">Q", ratrod.LEGACY_MAX_FRAME) + data], [bytes([BARE]) + b"\1" * 40], [bytes([HURT, 1, 0, 3, 1]) + data],
             [bytes([MESSAGE]) + data, bytes([HURT, 5, 0, 0, 1]) + data]]
    return [bytes([mode]) + joined(remote, *more) for mode, remote in ((0, TCP_TARGET), (1, TCP_TARGET), (2, UDP_TARGET), (3, UDP_TARGET), (0, b""))
            for more in ([], *steps)] + [bytes([mode]) + joined(name) for mode in range(4) for name in NAMES]


@target(6, legacy_scripts, VARINTS + (TCP_TARGET, UDP_TARGET, *NAMES), live=True)
def server_legacy(data):
    """A whole server against an authenticated legacy peer that sends anything: the link ends once the peer has ended it; on an encrypted one nothing
    comes in the clear."""
    made = rig(ServerRig)
    mode, rest = split(data, 1)
    encrypt, udp = bool(mode & 1), bool(mode & 2)
    remote, *steps = *pieces(rest), b""
    answers = []
    with contextlib.suppress(OSError), legacy_peer.Client(made.dial(), made.identity, made.fill(remote), encrypt, udp, timeout=FINAL) as client:
        client.handshake()
        with contextlib.suppress(OSError):
            for step in steps[:50]:
                do_legacy(client, step)
        half_close(client.socket)
        try:
            while True:
                received = client.receive_frame()
                answers.append(received)
                if received is None:
                    break
                assert bool(received[0]) == encrypt, "a frame in the clear on an encrypted link"
                legacy_peer.decode(received[1])
        except socket.timeout:
            raise AssertionError("%g s after its other side ended the link has not ended" % FINAL) from None
        except ConnectionError:
            answers.append("reset")
    made.tick()
    return len(answers), str(answers[-1:])[:20]


def do_legacy(client, step):
    kind, payload = split(step, 1)
    if kind == FLAGGED:
        client.send(payload[1:], flag=(payload[:1] or b"\0")[0])
    elif kind == SIZED:
        client.send(payload[8:], size=int.from_bytes(payload[:8], "big"))
    elif kind == BARE:
        client.send_raw(payload)
    elif kind == HURT:
        how, at, mask, message = split(payload, 1, 2, 1)
        client.send_raw(tampered(legacy_peer.frame(message, client.key), how, at, mask)[0])
    else:
        client.send(payload)


class ProxiedRig(ServerRig):
    """A server whose connections all come through proxies. What a client's address is, they say."""

    def start(self):
        self.run("serve", "--proxy-protocol", "127.0.0.0/8", "--handshake-timeout", "5", "-r", self.regex, "127.0.0.1:0")
        self.port = int(self.program.wait_for(STARTED).group(1))

    def honest(self):
        with self.dial() as sock:
            sock.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n")
            link = peer.Client(sock, SECRET["client"], server=SERVER.public).handshake()
            assert link.exchange("127.0.0.1:%d" % self.echo.port, b"still here") == b"still here"


@target(3, lambda: [header + last for header in PROXY_HEADERS for last in (b"\0", b"\1")],
        (b"\r\n", b" ", b"TCP6", b"%", b"]", b"\x1b[2J"), live="program")
def server_proxy(data):
    """A whole server behind a proxy that sends any header, and an honest client's session behind it: served, or ended once the client has."""
    made = rig(ProxiedRig)
    with made.dial() as sock:
        link, answer = peer.Client(sock, SECRET["client"], server=SERVER.public), "ended"
        with contextlib.suppress(OSError, peer.ProtocolError):  # LinkEnded is one of these
            sock.sendall(data[:-1])
            message = link.client_preamble()
            link.send(ratrod.OPENING + struct.pack(">H", len(message)) + message)
            if data[-1:] == b"\1" or not is_ready(sock, selectors.EVENT_READ, WAIT):  # a header that promises more than there is
                half_close(sock)
            link.read_server_preamble()
            link.send_message(link.client_authentication())
            link.read_completion()
            answer = link.exchange("127.0.0.1:%d" % made.echo.port, b"hello")
        half_close(sock)
        read_to_the_end(sock)
    made.tick()
    return answer


# ---- the client


class ClientRig(Rig):
    """A client with a tunnel to `good:1` and one to `evil:1`, and a proxy; its server is the independent peer, which plays what it is given for
    `evil`."""

    role = "client"

    def start(self):
        self.script = None
        self.answers = queue.Queue()
        self.server = self.closing(Target(self._serve))
        where, tunnels = "127.0.0.1:%d" % self.server.port, ("0:good:1", "0:evil:1", "0:socks")
        if GUIDED:
            self.listen_to_log()
            client = self.closing(ratrod.tunnel(where, *tunnels, key_path=str(self.keys["client"].path), limits=OWN))
            self.ports = [port for _, port in client.addresses]
        else:
            self.run("connect", "--handshake-timeout", "5", "--resume", "1", where, *tunnels)
            self.program.wait_for(READY)
            announced = r"TCP\].*?:(\d+)`, .*good:1", r"TCP\].*?:(\d+)`, .*evil:1", r"SOCKS\].*?:(\d+)`, "
            self.ports = [int(self.program.wait_for(line).group(1)) for line in announced]

    def _serve(self, connection):
        connection.settimeout(None)
        with contextlib.suppress(peer.PeerError):
            RecordingServer(connection, SECRET["server"], authorized=[CLIENT.public]).handshake().serve_streams(self._dispatch)

    def _dispatch(self, stream):
        if stream.target != "evil:1":
            return peer.serve(stream)
        if stream.attempt > 1:  # it goes on, as the script had lost the link: once is enough
            stream.link.send_record(ratrod.ERROR, peer.encode_error(ratrod.UNKNOWN, "not known here any more"))
            raise peer.LinkEnded("after the script")
        stream.link.steps.clear()
        try:
            self.answers.put(self._echo(stream) if self.script is None else play(stream.link, self.script, self.fill))
        except BaseException as error:
            self.answers.put(error)
            raise
        raise peer.LinkEnded("after the script")

    @staticmethod
    def _echo(stream):
        peer.echo(stream)
        stream.finish()
        return list(stream.link.steps)

    def dial(self, which):
        return socket.create_connection(("127.0.0.1", self.ports[which]), timeout=FINAL)

    def honest(self):
        exchange(lambda: self.dial(0))
        exchange(self.through_the_proxy)

    def through_the_proxy(self):
        sock = self.dial(2)
        sock.sendall(b"\5\1\0" + socks_request(b"good", 1))
        assert receive_exactly(sock, 12)[:4] == b"\5\0\5\0"
        return sock

    def evil(self, steps, ends):
        """What came of a connection to the evil tunnel: (what the peer saw, the bytes that came back, whether by a reset)."""
        self.script = steps
        got, was_reset = b"", True
        with contextlib.suppress(ConnectionError), self.dial(1) as sock:  # a reset may be there before it is connected, or has sent
            sock.sendall(b"hello")
            if ends:
                half_close(sock)
            got, was_reset = read_to_the_end(sock)
        # An Open that went without Data may have been tried again on another link.
        answers = [self.answers.get(timeout=FINAL)]
        while not self.answers.empty():
            answers.append(self.answers.get())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers[-1], got, was_reset


def client_scripts():
    scripts = variations(rig(ClientRig).evil(None, True)[0])
    return [bytes([ends]) + script for script in scripts for ends in (0, 1)]


@target(8, client_scripts, RECORD_WORDS, live=True)
def client_peer(data):
    """A whole client against a server that is the right one and sends anything on the link of a stream: the local connection ends, and cleanly only
    where the server has sent End."""
    mode, rest = split(data, 1)
    steps = list(pieces(rest))
    answer, got, was_reset = rig(ClientRig).evil(steps, bool(mode & 1))
    if not was_reset:
        # What is repeated, old or damaged may be the End that is due.
        assert {step[:1] for step in steps} & {bytes([kind]) for kind in (ratrod.END, REPEATED, OLD, DAMAGED)}, "a clean end out of nothing"
    rig(ClientRig).tick()
    return answer, len(got), was_reset


def socks_scripts():
    return [joined(data[1:]) for data in socks_seeds() if data[0] == 0] + [
        joined(b"\5\1\0", socks_request(b"good", 1), b"hello"), joined(b"\5\1\0" + socks_request(b"good", 1) + b"hello"),
        *(joined(b"\5\1\0" + socks_request("0.0.0.0", 0, 3), b"\0\0\0" + socks_request(host)[3:] + b"hello") for host in SOCKS_HOSTS)]


@target(5, socks_scripts, NAMES + (b"\5\1\0\1", b"\5\1\0\3", b"\5\3\0\1", b"\0\0\0\1"), live=True)
def client_socks(data):
    """A whole client's SOCKS5 proxy against local programs that send anything, in associations also by UDP: each connection ends once they have."""
    made = rig(ClientRig)
    parts = list(pieces(data))
    with made.dial(2) as sock:
        got = b""
        for part in parts[:10]:
            try:
                sock.sendall(part)
                sock.settimeout(WAIT / 10)
                got += sock.recv(4096)
            except socket.timeout:
                pass
            except OSError:
                break
            if got.startswith(b"\5\0\5\0\0\1\x7f\0\0\1") and len(got) == 12 and got[10:12] != b"\0\0":
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                    for part in parts[1:]:
                        datagrams.sendto(part[:60_000], ("127.0.0.1", int.from_bytes(got[10:12], "big")))
        half_close(sock)
        rest, was_reset = read_to_the_end(sock)
    made.tick()
    return (got + rest)[:4], was_reset


class StartRig(Rig):
    """A server that is the independent peer and plays what it is given from the first byte of a link on, to clients made anew for each input."""

    role = "client"

    def start(self):
        self.listen_to_log()
        self.plan = 0, b"", []
        self.server = self.closing(Target(self._serve))

    def _serve(self, connection):
        connection.settimeout(FINAL)
        mode, damage, steps = self.plan
        link = peer.Server(connection, SECRET["server"])
        with contextlib.suppress(peer.ProtocolError, peer.PeerError, peer.LinkEnded, OSError):
            link.read_opening()
            link.read_client_preamble()
            message = link.server_preamble()
            if mode & 4:
                how, at, mask, _ = split(damage, 1, 2, 1)
                connection.sendall(tampered(struct.pack(">H", len(message)) + message, how, at, mask)[0])
                half_close(connection)
                return peer.receive_to_end(connection)
            link.send_message(message)
            link.read_client_authentication()
            if not mode & 8:
                link.send_completion()
                link.accept()
            play(link, steps, self.fill)

    def connect(self, *tunnels):
        return ratrod.tunnel("127.0.0.1:%d" % self.server.port, *tunnels, key_path=str(self.keys["client"].path), limits=OWN, timeout=FINAL)

    def honest(self):
        self.plan = 0, b"", []
        with self.connect():
            pass


def start_scripts():
    opened, bound = bytes([ratrod.OPENED]) + peer.encode_str(""), bytes([ratrod.OPENED]) + peer.encode_str("127.0.0.1:9000")
    asked = bytes([ratrod.OPEN]) + peer.encode_open(ratrod.TCP, "192.0.2.1:1", stream=b"s" * 16)
    refused = bytes([ratrod.ERROR]) + peer.encode_error(1, "\x1b[2J not you \u202e")
    udp = [opened, bytes([AWAIT]), bytes([AWAIT]), bytes([ratrod.DATAGRAMS]) + peer.encode_datagrams([(1, b"hello")]),
           bytes([ratrod.SESSION_OVER]) + peer.encode_session_over(1, 2, "\x1b")]
    reverse = [bound, asked, bytes([AWAIT]), bytes([ratrod.DATA]) + b"hello", bytes([ratrod.END]), bytes([AWAIT])]
    completed = [bytes([ratrod.COMPLETED]) + peer.encode_str("0.8.0"), bytes([AWAIT]), refused]
    scripts = [b"\4" + joined(bytes([how, 0, at, 1])) for how in range(6) for at in (0, 1, 5, 40, 90, 114)]
    for mode, steps in ((1, udp), (2, reverse), (8, completed), (8, [refused]), (9, completed + udp), (10, completed + reverse)):
        scripts += [bytes([mode]) + joined(b"") + script for script in variations(steps)]
    return scripts


@target(4, start_scripts, RECORD_WORDS, live=True)
def client_start(data):
    """Clients of the library, each against a server that sends anything: from its part of the handshake on, in place of HandshakeCompletion, on the
    UDP link, on a Listen link. RatrodError or a tunnel, and close() ends it."""
    made = rig(StartRig)
    mode, rest = split(data, 1)
    damage, *steps = *pieces(rest), b""
    made.plan = mode, damage, steps
    tunnels = {1: ("0:evil:1",), 2: ("R:0:127.0.0.1:%d" % made.echo.port,)}.get(mode & 3, ())
    try:
        with made.connect(*tunnels) as client:
            if mode & 3 == 1:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as originator:
                    originator.connect(client.address)
                    originator.settimeout(WAIT)
                    originator.send(b"hello")
                    with contextlib.suppress(OSError):
                        originator.recv(100)
            answer = True
    except ratrod.RatrodError as error:
        answer = kind_of(error)
    made.tick()
    return answer


