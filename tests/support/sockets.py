"""Sockets as tests use them: dialling, reading to the end, whole exchanges, free ports, waiting for a state."""

import concurrent.futures
import contextlib
import errno
import hashlib
import os
import random
import selectors
import socket
import struct
import time

import pytest

from support.programs import PATIENCE

# Random, and of a length that divides nothing: a lost, doubled or misplaced piece changes the hash.
BLOCK = os.urandom((1 << 20) - 3)


def receive_all(connection):
    """What comes until the end of file, as bytes."""
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def receive_exactly(connection, n):
    chunks = []
    while n:
        chunk = connection.recv(min(n, 1 << 20))
        assert chunk, "the connection ended %d bytes too early" % n
        chunks.append(chunk)
        n -= len(chunk)
    return b"".join(chunks)


def port_of(sock):
    return sock.getsockname()[1]


def free_port(n=1):
    """The first of `n` ports in a row that are free for TCP and UDP. Nobody takes one before its program does: they are none of those that the
    system gives out by itself, and each of pytest-xdist's eight processes has its own."""
    lowest = 10000 + 2750 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
    for _ in range(1000):
        first = random.SystemRandom().randrange(lowest, lowest + 2750 - n)  # hypothesis seeds the common one
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + n):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    made = stack.enter_context(socket.socket(socket.AF_INET, kind))
                    # Connections that are over hold it up for a minute (TIME_WAIT), but no listener.
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM and os.name == "posix")
                    made.bind(("", port))
            return first
    raise AssertionError("no %d free ports in a row" % n)


def dial(port, host="127.0.0.1", source=None):
    """`source`: the address that the connection comes from."""
    return socket.create_connection((host, port), PATIENCE, source and (source, 0))


def dial_udp(port, host="127.0.0.1"):
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(PATIENCE)
    made.connect((host, port))
    return made


def dial_unix(path):
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE)
    made.connect(str(path))
    return made


def say(connection, data):
    """All that this side has to say, and its end."""
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def ask_over(connection, question=b"anybody there?"):
    """A whole exchange with an echo: question, end, answer, end."""
    with connection:
        say(connection, question)
        assert receive_all(connection) == question


def ping(*connections, word=b"ping"):
    """A word to an echo over each, which answers at once: the connection lives."""
    for connection in connections:
        connection.sendall(word)
        assert receive_exactly(connection, len(word)) == word


def ask_udp(connected, question=b"anybody there?"):
    """A datagram to an echo."""
    connected.send(question)
    assert connected.recv(65536) == question


def ask(port, question=b"anybody there?", host="127.0.0.1"):
    """A whole connection to an echo."""
    ask_over(dial(port, host), question)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_refused(port):
    """A connection to `port` is taken and reset at once, nothing having been sent."""
    with pytest.raises(ConnectionResetError), dial(port) as connection:
        connection.recv(1)


def check_half_close(ended, other):
    """`ended` ends its direction. It still receives, for as long as the other side of the connection has something to say."""
    say(ended, b"that is all")
    assert receive_all(other) == b"that is all"
    for size in (1, 1000, 50000):
        block = os.urandom(size)
        other.sendall(block)
        assert receive_exactly(ended, size) == block
    other.close()
    assert ended.recv(1) == b""


def check_bulk_each_way(ends, blocks=24):
    """So many MB in each direction of a connection, at the same time; both arrive whole, and end."""
    def send(connection):
        for _ in range(blocks):
            connection.sendall(BLOCK)
        connection.shutdown(socket.SHUT_WR)
    def receive(connection):
        digest = hashlib.sha256()
        for chunk in iter(lambda: connection.recv(1 << 20), b""):
            digest.update(chunk)
        return digest.hexdigest()
    whole = hashlib.sha256()
    for _ in range(blocks):
        whole.update(BLOCK)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        senders, receivers = [pool.submit(send, end) for end in ends], [pool.submit(receive, end) for end in ends]
        assert {receiver.result() for receiver in receivers} == {whole.hexdigest()}
        for sender in senders:
            sender.result()


def is_ready(sock, event, timeout):
    """Whether `event` (selectors.EVENT_READ or EVENT_WRITE) comes on `sock` within so many seconds. select() takes descriptors up to 1023."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        return bool(selector.select(timeout))


def eventually(condition, what):
    """Polls for a state that announces itself by no event."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "never came true: %s" % (what() if callable(what) else what,)
        time.sleep(0.02)


def settled(value, seconds=1):
    """What value() is once it has not changed for so long."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.05)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


def works(port):
    """Whether a whole connection to an echo succeeds, for eventually()."""
    with contextlib.suppress(OSError, AssertionError):
        ask(port)
        return True
    return False


def refused(port, host="127.0.0.1"):
    """Whether nobody listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        return sock.connect_ex((host, port)) == errno.ECONNREFUSED


def outcome_of(port, question=b"anybody there?"):
    """What comes of a new connection to an echo, whenever: "answered", "end" (a clean one), "reset" or what else the kernel says."""
    try:
        with dial(port) as connection:
            connection.sendall(question)
            answer = connection.recv(len(question))
        return "answered" if answer == question else "end"
    except (ConnectionResetError, BrokenPipeError):
        return "reset"
    except OSError as error:
        return str(error)


def assert_reset(*connections):
    """Each ends with a reset, whatever came before it."""
    for connection in connections:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while connection.recv(65536):
                pass


def ask_until_answered(connected, question):
    """For where UDP may lose: sends again until an answer comes, then waits for the rest of the answers to pass."""
    def answered():
        connected.send(question)
        with contextlib.suppress(socket.timeout, ConnectionRefusedError):
            return connected.recv(65536) == question
    connected.settimeout(0.2)
    eventually(answered, "an answer to %r" % question)
    connected.settimeout(PATIENCE)


def push_until_stuck(end, write=None):
    """Sends to a reader that does not read until no more is taken. What was taken, as its size and hash. `end` may be a pipe, with its write()."""
    os.set_blocking(end.fileno(), False)
    digest, sent = hashlib.sha256(), 0
    # Nothing announces that no room will come any more. A second without is taken for it; where that is too short, the test is weaker, not wrong.
    while is_ready(end, selectors.EVENT_WRITE, 1.0):
        piece = memoryview(BLOCK)[sent % len(BLOCK):]
        n = (write or end.send)(piece)
        digest.update(piece[:n])
        sent += n
        assert sent < 256 << 20, "a reader that reads nothing never held up its sender"
    if not write:
        end.settimeout(PATIENCE)
    return sent, digest.hexdigest()


def talk(one, other, message=b"!"):
    """A message each way: the whole path stands."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(message)
        assert receive_exactly(receiver, len(message)) == message


def accept(listener):
    connection, _ = listener.accept()
    connection.settimeout(PATIENCE)
    return connection
