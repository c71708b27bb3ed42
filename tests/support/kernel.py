"""What the kernel says of sockets and programs, and no tool gives: /proc of Linux."""

import os
import pathlib
from typing import NamedTuple

import pytest

ESTABLISHED, LISTEN = "01", "0A"


class Row(NamedTuple):
    """A TCP socket over IPv4."""

    state: str
    local: int
    remote: int
    waiting: int  # bytes to read; of a listener: connections to accept
    inode: str


def rows(pid="self"):
    """The TCP sockets over IPv4 of a process' network namespace."""
    for line in pathlib.Path("/proc/%s/net/tcp" % pid).read_text().splitlines()[1:]:
        words = line.split()
        local, remote = (int(word.rpartition(":")[2], 16) for word in words[1:3])
        yield Row(words[3], local, remote, int(words[4].partition(":")[2], 16), words[9])


def queued(port):
    """How many connections wait to be accepted at a port of this machine."""
    return sum(row.waiting for row in rows() if row.state == LISTEN and row.local == port)


def sockets_of(program):
    """The inodes of a program's sockets."""
    folder = "/proc/%d/fd" % program.process.pid
    found = set()
    for name in os.listdir(folder):
        try:
            found.add(os.readlink(os.path.join(folder, name)))
        except FileNotFoundError:  # closed meanwhile
            pass
    return {name[len("socket:["):-1] for name in found if name.startswith("socket:[")}


def owner(programs, local, remote):
    """Which of the programs has the TCP connection from port `local` to port `remote`."""
    inodes = {row.inode for row in rows() if (row.local, row.remote) == (local, remote)}
    return next(program for program in programs if inodes & sockets_of(program))


def waiting_bytes(port):
    """What a UDP socket on this port of 127.0.0.1 has yet to read (/proc/net/udp: address, tx_queue:rx_queue)."""
    if not os.path.exists("/proc/net/udp"):
        pytest.skip("no /proc on this system")
    for _ in range(100):  # while other sockets come and go the table may leave one out
        with open("/proc/net/udp") as table:
            found = [row[4] for row in map(str.split, table) if row[1] == "0100007F:%04X" % port]
        if found:
            return int(found[0].partition(":")[2], 16)
    return pytest.fail("nobody listens on port %d" % port)


def cpu_seconds(pid):
    """The processor time that a process has used."""
    fields = pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
