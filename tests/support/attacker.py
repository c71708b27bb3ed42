"""One authorized key that does harm: `attacker.py PORT KEY_FOLDER KIND LINKS [ARGUMENT]` makes so many links, says that all are there, and goes on
with what KINDS says until its parent is gone. The handshakes are the module's own, for speed; everything after them is done by hand."""

import collections
import contextlib
import itertools
import os
import pathlib
import select
import socket
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ratrod as module  # noqa: E402

OUT = 64 * 1024  # bytes that a link has ready to be sent
AT_ONCE = 64  # records in one piece


class HostileLink:
    """A link past its handshake; what it does next is in `attack`, a generator of the bytes to send."""

    def __init__(self, port, keys, kind, argument):
        self.argument = argument
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        hand = module.NoiseClientHandshake(keys, module.offered_suites(), check_key=lambda _key: None)
        hand.start()
        while True:
            self.sock.sendall(hand.data_to_send())
            if hand.is_done:
                break
            data = self.sock.recv(hand.wanted)
            if not data:
                raise ConnectionError("refused")
            hand.receive_data(data)
        self.reader, self.writer = hand.reader, hand.writer
        self.scratch = memoryview(bytearray(module.HEADROOM + module.MAX_CONTENT + module.TAILROOM))
        self.received, self.out, self.events = bytearray(), bytearray(), 0
        self.answers = collections.Counter()  # records that came, by type
        self.attack = KINDS[kind](self)
        self.sock.setblocking(False)

    def record(self, kind, *fields):
        return self.writer.record(kind, *([module.Open(*fields)] if kind == module.OPEN else fields))

    def data(self, content, kind=module.DATA):
        self.scratch[module.HEADROOM:module.HEADROOM + len(content)] = content
        return bytes(self.writer.data(self.scratch, len(content), kind))

    def open(self):
        return self.record(module.OPEN, module.TCP, self.argument, os.urandom(16), 1, 0, 0)

    def on_event(self, mask):
        if mask & select.EPOLLIN:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("closed")
            self.received += data
            view, at = memoryview(bytes(self.received)), 0
            while at < len(view):
                record = self.reader.next(view, at, len(view))
                if record is None:
                    break
                at = record[2]
                self.answers[record[0]] += 1
            del self.received[:at]
        if mask & select.EPOLLOUT:
            self.pump()

    def pump(self):
        """Sends what there is; False where there is nothing for now."""
        while len(self.out) < OUT:
            more = next(self.attack, None)
            if not more:
                break
            self.out += more
        if self.out:
            with contextlib.suppress(BlockingIOError):
                del self.out[:self.sock.send(self.out)]
        return bool(self.out)


def half_record(link):
    """The beginning of a record of 512 KiB: ARGUMENT bytes of it, and no more."""
    yield (module.MAX_CONTENT + 1 + 32).to_bytes(4, "big") + bytes(int(link.argument or 65532))


def flood(record, beginning=b""):
    while True:
        yield beginning + b"".join(record() for _ in range(AT_ONCE))
        beginning = b""


def sessions(link):
    """UDP sessions, one after the other."""
    numbers = itertools.count(1)
    return flood(lambda: link.record(module.SESSION, next(numbers), "127.0.0.1:9", 0), link.record(module.OPEN, module.UDP, ""))


def unknown(link):
    """Datagrams of sessions that are none: empty ones, as many as a record takes."""
    yield link.record(module.OPEN, module.UDP, "")
    content = (b"\0\0\0\7\0\0" * (module.MAX_CONTENT // 6))[:int(link.argument or module.MAX_CONTENT) // 6 * 6]
    while True:
        yield link.data(content, module.DATAGRAMS)


def opens(link):
    """One short stream after the other."""
    while True:
        seen = link.answers[module.OVER]
        yield link.open() + link.record(module.END)
        while link.answers[module.OVER] == seen:
            yield b""


def attaches(link):
    """A stream that is unknown: the link ends, and another takes its place."""
    yield link.record(module.OPEN, module.TCP, link.argument, os.urandom(16), 2, 0, 0)


def listens(link):
    """A reverse tunnel that is closed as soon as it is there."""
    yield link.record(module.OPEN, module.LISTEN, "127.0.0.1:0", bytes(16), 0, 0, 0, os.urandom(8))
    while not link.answers[module.OPENED]:
        yield b""
    raise ConnectionError("done")


def bulk(link):
    """Whole records of 512 KiB."""
    yield link.open()
    content = bytes(module.MAX_CONTENT)
    while True:
        yield link.data(content)


KINDS = {
    **{made.__name__: made for made in (half_record, sessions, unknown, opens, attaches, listens, bulk)},
    "tiny": lambda link: flood(lambda: link.data(b"x"), link.open()),  # data of one byte
    "acks": lambda link: flood(lambda: link.record(module.ACK, 0), link.open()),
    "keepalives": lambda link: flood(lambda: link.record(module.KEEPALIVE)),
    "abandons": lambda link: flood(lambda: link.record(module.ABANDON, os.urandom(16))),  # of streams that never were
}


def main(port, folder, kind, count, argument=""):
    import resource
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keys = module.KeyFolder(folder).load()
    epoll, links, parent = select.epoll(), {}, os.getppid()
    def enter():
        link = HostileLink(int(port), keys, kind, argument)
        links[link.sock.fileno()] = link
        epoll.register(link.sock.fileno(), select.EPOLLIN)
        return link
    for _ in range(int(count)):
        enter()
    print("all links are there", flush=True)
    begun = False
    while os.getppid() == parent:
        for link in list(links.values()):
            wants = select.EPOLLIN | select.EPOLLOUT * (not begun or bool(link.out))
            if wants != link.events:
                epoll.modify(link.sock.fileno(), wants)
                link.events = wants
        begun = True
        for number, mask in epoll.poll(0.5):
            link = links.get(number)
            try:
                link.on_event(mask or select.EPOLLIN)
                link.pump()
            except OSError:
                del links[number]
                epoll.unregister(number)
                link.sock.close()
                with contextlib.suppress(OSError, module.RatrodError):
                    if kind in ("attaches", "listens"):
                        enter().pump()
        if not links and kind not in ("attaches", "listens"):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
