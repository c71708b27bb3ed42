"""What tunnels lead to: TCP, Unix and UDP servers on free ports, each connection on a thread of its own."""

import contextlib
import socket
import threading

from support.programs import PATIENCE
from support.sockets import port_of


class Target:
    """A TCP server on a free port: handle(connection) runs on a thread for each connection, which is closed after it."""

    def __init__(self, handle, host="127.0.0.1", port=0):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._start(handle, socket.create_server((host, port), family=family, backlog=1000, dualstack_ipv6=host == "::"))
        self.port = port_of(self._listener)

    def _start(self, handle, listener):
        self._handle, self._listener = handle, listener
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            self._handle(connection)

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class UnixTarget(Target):
    """The same on a Unix socket."""

    def __init__(self, handle, path):
        self.path = str(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(100)
        self._start(handle, listener)


def says(word):
    """What a target that waits for nothing does with a connection."""
    return lambda connection: connection.sendall(word)


def echo(connection):
    """Sends back what comes until the peer's end of file; then ends too."""
    for data in iter(lambda: connection.recv(65536), b""):
        connection.sendall(data)


class UdpRemote:
    """A UDP target in the hands of the test, on a port of `host`, for 0 a free one."""

    def __init__(self, host="127.0.0.1", port=0):
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        if host == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.settimeout(PATIENCE)
        self.socket.bind((host, port))
        self.port = port_of(self.socket)

    def receive(self):
        return self.socket.recvfrom(65536)

    def close(self):
        self.socket.close()


class UdpEcho(UdpRemote):
    """A UDP echo, or one that always `says` the same; `seen` counts the datagrams."""

    def __init__(self, host="127.0.0.1", port=0, says=None):
        super().__init__(host, port)
        self.socket.settimeout(None)
        self.seen, self._says = 0, says
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                data, address = self.receive()
                if address[1] == self.port:
                    return
                self.seen += 1
                self.socket.sendto(self._says or data, address)

    def close(self):
        # A datagram to itself ends the thread: closing alone does not wake a blocked recvfrom.
        with contextlib.suppress(OSError):
            self.socket.sendto(b"", self.socket.getsockname())
        super().close()
