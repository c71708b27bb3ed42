"""bench_load.c in Python, for machines without a C compiler: the same modes, counters and output, but slower than what it measures.

Numbers that it yields are a lower bound: of bulk, of connections a second and of datagrams a second; round trips are longer by its own time.
"""

import array
import mmap
import selectors
import socket
import struct
import sys
import threading
import time

BYTES, READY, DONE = range(3)
CHUNK = bytes(256 * 1024)
SETUP_AT_ONCE = 8
SEND_BUFFERS = 32 << 20  # see bench_load.c
LATE = 0.5
DATAGRAM = struct.Struct("=QQ")
HOST = "127.0.0.1"


class Stats:
    """The eight counters that bench.py reads meanwhile."""

    def __init__(self, path):
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 64)

    def add(self, place, n):
        old, = struct.unpack_from("=Q", self._map, place * 8)
        struct.pack_into("=Q", self._map, place * 8, old + n)


class Poller:
    """A selector that ends the program when standard input does."""

    def __init__(self, stats):
        self.stats = stats
        self._selector = selectors.DefaultSelector()
        # A pipe of its own: a selector cannot watch standard input everywhere.
        ended, self._stdin = socket.socketpair()
        threading.Thread(target=self._await_end, daemon=True).start()
        self.watch(ended, selectors.EVENT_READ, lambda *_: sys.exit(0))

    def _await_end(self):
        sys.stdin.read()
        self._stdin.close()

    def watch(self, sock, events, callback):
        try:
            self._selector.modify(sock, events, callback)
        except KeyError:
            self._selector.register(sock, events, callback)

    def close(self, sock):
        self._selector.unregister(sock)
        sock.close()

    def run_once(self):
        for key, events in self._selector.select():
            key.data(key.fileobj, events)

    def run(self):
        while True:
            self.run_once()


def no_delay(sock):
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# ---------------------------------------------------------------------------------------------------- the target


def target_sockets():
    for _ in range(100):
        tcp, udp = socket.create_server((HOST, 0), backlog=1024), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
        else:
            tcp.setblocking(False)
            udp.setblocking(False)
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            return tcp, udp
    sys.exit("target: no port is free for both TCP and UDP")


def target(poller):
    kinds = {}
    scratch = bytearray(len(CHUNK))

    def accept(listener, _events):
        sock, _ = listener.accept()
        no_delay(sock)
        poller.watch(sock, selectors.EVENT_READ, serve)

    def goes_on(sock, events):
        if events & selectors.EVENT_WRITE:
            sock.send(CHUNK)
        if not events & selectors.EVENT_READ:
            return True
        kind = kinds.get(sock)
        n = sock.recv_into(scratch, 0 if kind else 1)
        if not n:
            return False
        if kind is None:
            kinds[sock] = bytes(scratch[:1])
        elif kind == b"s":
            poller.stats.add(BYTES, n)
            return True
        elif kind == b"p":
            poller.watch(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, serve)
            return True
        return sock.send(scratch[:n]) == n

    def serve(sock, events):
        try:
            if goes_on(sock, events):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        kinds.pop(sock, None)
        poller.close(sock)

    def echo(udp, _events):
        for _ in range(64):
            try:
                data, address = udp.recvfrom(65536)
                udp.sendto(data, address)
            except OSError:
                return

    tcp, udp = target_sockets()
    poller.watch(tcp, selectors.EVENT_READ, accept)
    poller.watch(udp, selectors.EVENT_READ, echo)
    print(tcp.getsockname()[1], flush=True)
    poller.run()


# ---------------------------------------------------------------------------------------------------- streams


def open_stream(poller, port, kind, opened):
    """Calls opened(socket) when the connection is open from end to end."""
    def readable(sock, _events):
        if sock.recv(1) != kind:
            sys.exit("first byte: the connection was ended")
        opened(sock)

    def writable(sock, _events):
        sock.send(kind)
        poller.watch(sock, selectors.EVENT_READ, readable)

    sock = socket.socket()
    no_delay(sock)
    sock.connect_ex((HOST, port))
    poller.watch(sock, selectors.EVENT_WRITE, writable)


def open_streams(poller, port, kind, count):
    streams, begun = [], 0

    def opened(sock):
        streams.append(sock)
        poller.watch(sock, selectors.EVENT_READ, lambda *_: sys.exit("the connection was ended"))
        poller.stats.add(READY, 1)

    while len(streams) < count:
        while begun < count and begun - len(streams) < SETUP_AT_ONCE:
            open_stream(poller, port, kind, opened)
            begun += 1
        poller.run_once()
    return streams


def bulk(poller, port, direction, count):
    scratch = bytearray(len(CHUNK))

    def push(sock, events):
        if events & selectors.EVENT_READ:
            sys.exit("push: %s" % (sock.recv(1) or "the connection was ended"))
        poller.stats.add(BYTES, sock.send(CHUNK))

    def pull(sock, _events):
        n = sock.recv_into(scratch)
        if not n:
            sys.exit("pull: the connection was ended")
        poller.stats.add(BYTES, n)

    pushes, count = direction == "push", int(count)
    for sock in open_streams(poller, int(port), b"s" if pushes else b"p", count):
        if count > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFERS // count)
        if not pushes:
            sock.send(b"g")
        poller.watch(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if pushes else 0), push if pushes else pull)
    poller.run()


def hold(poller, port, count):
    # Kept in a name: a socket that nobody holds is closed.
    streams = open_streams(poller, int(port), b"e", int(count))
    poller.run()
    del streams


def connect(poller, port, at_once):
    def opened(sock):
        poller.close(sock)
        poller.stats.add(DONE, 1)
        open_stream(poller, int(port), b"e", opened)

    for _ in range(int(at_once)):
        open_stream(poller, int(port), b"e", opened)
    poller.run()


# ---------------------------------------------------------------------------------------------------- round trips


def pingpong(_poller, port, size, seconds):
    times, payload = array.array("I"), b"e" * int(size)
    with socket.create_connection((HOST, int(port)), 5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.perf_counter() + float(seconds)
        while True:
            start = time.perf_counter()
            if start >= end:
                break
            sock.sendall(payload)
            missing = len(payload)
            while missing:
                data = sock.recv(missing)
                if not data:
                    sys.exit("round trip: the connection was ended")
                missing -= len(data)
            times.append(int((time.perf_counter() - start) * 1e9))
    sys.stdout.buffer.write(times.tobytes())


def first_answer(sock, size):
    """The first datagram makes the session, and may be lost on a path that is not there yet: tried again, and not counted."""
    sock.settimeout(0.25)
    for _ in range(20):
        sock.send(bytes(size))
        try:
            return sock.recv(65536)
        except socket.timeout:
            pass
    sys.exit("udp: no answer")


def udp(_poller, port, outstanding, size, seconds):
    outstanding, size, seconds = int(outstanding), int(size), float(seconds)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.connect((HOST, int(port)))
    first_answer(sock, size)
    sock.settimeout(0.01)
    waiting, number, answered, lost = {}, 0, 0, 0
    now = time.perf_counter()
    end = now + seconds
    while now < end or waiting:
        while now < end and len(waiting) < outstanding:
            number += 1
            waiting[number] = now
            sock.send(DATAGRAM.pack(0, number) + bytes(size - DATAGRAM.size))
        try:
            data = sock.recv(65536)
        except socket.timeout:
            data = b""
        now = time.perf_counter()
        if len(data) == size and waiting.pop(DATAGRAM.unpack_from(data)[1], None) is not None:
            answered += now < end
        # In the order of sending: the oldest stands first.
        while waiting and now - next(iter(waiting.values())) > LATE:
            del waiting[next(iter(waiting))]
            lost += 1
    print(number, answered, lost, "%f" % seconds)


MODES = {mode.__name__: mode for mode in (target, bulk, hold, connect, pingpong, udp)}

if __name__ == "__main__":
    try:
        MODES[sys.argv[1]](Poller(Stats(sys.argv[2])), *sys.argv[3:])
    except OSError as error:
        sys.exit("%s: %s" % (sys.argv[1], error))
