"""TUNNEL words: those of special forms, which there are not, and what does not go together. The plain ones are in test_core_keys.py."""

import ntpath
import os

import pytest

import ratrod
from support.rows import assert_each_raises, assert_raises, row

NO_TUNNELS = [
    # Plain ones.
    "", " 80", "80\n", "0", "x", "-1", "70000", "65536:80", "1:0", "x:80", "80:", ":80", "::80", "1::80", "1:db:", "1:db:0", "1:db:bad", "db:80",
    "db:1:2", ":1:db:2", "a:x:db:1", "a:1:b:2:c", "1:2:3:4:5", "a:b:c:d:e", "::1:80:db:80", "[::1:5", "1:127.1:80", "1:0x7f000001:80", "1:a b:80",
    "1:db:80\n", "1:db\n:80", "1:db:080", "1:db:8_0", "1:db:+80", "1:db:\uff18\uff10", "\uff11:80", "1:[fe80::1%eth0]:80", "1:2001:db8::7:80",
    "R", "stdio",
    # Unix sockets.
    "unix:", "unix:/", "unix:/a", "unix:relative:db:80", "unix:./a:db:80", "unix:/a/../b:db:80", "unix:/a/./b:db:80", "unix://a:db:80",
    "unix:/a//b:db:80", "unix:/a/..:db:80", "unix:/a/:db:80",
    "unix:/%s:db:80" % ("a" * 100), "unix:/%s:db:80" % ("ä" * 50), "unix:/a\nb:db:80", "unix:/a\x7fb:db:80",
    "unix:/a:db:0", "unix:/a:db:http", "unix:/a:db:70000", "unix:/a::80", "unix:/a:db:80:90", "unix:/a:::", "unix:/a:unix:", "unix:/a:unix:b",
    "unix:/a:unix:/b:c", "unix:/a:unix:/b/../c",
    "0:unix:", "0:unix:/", "0:unix:relative", "0:unix:/a/../b", "0:unix://a", "0:unix:/%s" % ("a" * 100), "0:unix:/a\x1bb", "0:unix:/a:80",
    "70000:unix:/a", "x:unix:/a", ":0:unix:/a", "-1:unix:/a",
    # SOCKS proxies.
    "socks", "70000:socks", "x:socks", ":socks", "-1:socks", "[::1]:socks", "h:x:socks", ":0:socks", "1:2:3:socks", "0:socks:", "R:0:socks",
    "unix::socks", "unix:x:socks", "unix:/a/../b:socks",
    # Standard input and output.
    "stdio:", "stdio:80", "stdio:db", "stdio:db:0", "stdio:db:70000", "stdio:db:http", "stdio::80", "stdio:db:80:90", "stdio:socks", "stdio:unix:",
    "stdio:unix:a", "stdio:unix:/a/../b", "stdio:unix:/a:80", "stdio:db:80-82",
    # Reverse tunnels.
    "R:", "R:0", "R:0:127.0.0.1", "R:x:127.0.0.1:1", "R:65536:127.0.0.1:1", "R:0:127.0.0.1:0", "R:0:127.1:1", "R:0:unix:relative",
    "R:stdio:127.0.0.1:1", "R:unix:/tmp/a:127.0.0.1:1", "R:1-3:127.0.0.1:1-2", "R:3-1:127.0.0.1:3-1",
    "R:name:9:db:80", "R:127.1:9:db:80", "R:[fe80::1%lo]:9:db:80", "R:\udcff:9:db:80",
    "stdio:[]:22", "stdio:[db:22", "stdio:db]:22", "stdio:[[::1]]:22", "stdio:2001:db8::7", "stdio:2001:db8:7:22", "stdio:[::1]22",
    # One of TCP and UDP alone: of what has both, and listens on a port of its own.
    "tcp:", "udp:", "tcp:udp:80", "tcp:tcp:80", "TCP:80", "sctp:80", "udp:R:80:db:80", "udp:unix:/a:db:80", "udp:0:unix:/a", "udp:0:socks",
    "tcp:0:socks", "tcp:stdio:db:80", "udp:stdio:db:80", "tcp:db:80", "2000:tcp:db:80",
    # Zones: of link-local addresses, at this side alone.
    "2000:[fe80::1%eth0]:80", "R:2000:[::1%lo]:80", "R:2000:[2001:db8::7%eth0]:80", "R:2000:[fe80::1%]:80", "R:2000:[fe80::1%a b]:80",
    "R:2000:[::ffff:169.254.1.1%eth0]:80", "stdio:fe80::1%eth0:22",
    # Ranges of ports: what was typed is named, not one of the tunnels that it would have been.
    "8000-8001:db:8000-8002", "8000-8002:db:8000-8001", "8000-8002:db:80", "8000:db:80-82", "0:db:80-82", "80-82:90", "80:90-92",
    "8002-8000:db:9002-9000", "8000-8002:db:9002-9000", "8002-8000:db:9000-9002", "8002-8000", "8002-8000:9002-9000", "8000-9000:db:8000-9000",
    "1-65535", "1000-2000", "0-2:db:80-82", "0-2", "8000-8002:db:0-2", "65534-65536:db:80-82", "80-82:db:65534-65536", "65534-65536", "65536-65538",
    "8000-:db:8000-", "8000-", "8000-8002-8004:db:8000-8002-8004", "8000--8002", "8000-8002-", "a-c:db:a-c", "a-c", "8000-8002:db:a-c", "8000-800x",
    "08000-08002", "8000-+8002", "8000- 8002", "8000 -8002", "8000_1-8000_3", "8000–8002", "٨٠-٨٢", "8000:8002:db:80-82:1", "80-82:db:",
    "80-82::90-92", "80-82:db:90-92:1", ":80-82:db:90-92", "8000-8002:socks", "8000-8002:unix:/a", "unix:/a:db:80-82",
]


@pytest.mark.parametrize("text, spec", [
    # What ssh fills in for %h:%p, and for [%h]:%p.
    *((text, (("", 0), (host, 22), ratrod.STDIO)) for text, host in (
        ("stdio:db:22", "db"), ("stdio:[db]:22", "db"), ("stdio:192.0.2.7:22", "192.0.2.7"), ("stdio:[192.0.2.7]:22", "192.0.2.7"),
        ("stdio:2001:db8::7:22", "2001:db8::7"), ("stdio:[2001:db8::7]:22", "2001:db8::7"), ("stdio:::1:22", "::1"))),
    ("stdio:unix:/run/sshd", (("", 0), ("/run/sshd", 0), ratrod.STDIO)),
    # Every address of both families.
    ("*:1080:socks", (("*", 1080), ("", 0), ratrod.SOCKS)), ("R:*:9000:localhost:80", (("*", 9000), ("localhost", 80), ratrod.REVERSE)),
    # One protocol alone, where there is but one: said, it is no mistake.
    ("tcp:R:9000:db:80", (("", 9000), ("db", 80), ratrod.REVERSE)), ("tcp:unix:/a:db:80", (("/a", 0), ("db", 80), ratrod.FORWARD)),
    ("tcp:2000:unix:/a", (("127.0.0.1", 2000), ("/a", 0), ratrod.FORWARD)),
    # A host that is called so.
    ("2000:tcp:80", (("127.0.0.1", 2000), ("tcp", 80), ratrod.FORWARD, ("TCP", "UDP"))),
    ("udp:2000:udp:80", (("127.0.0.1", 2000), ("udp", 80), ratrod.FORWARD, ("UDP",))),
    # The zone of what this side itself connects to.
    ("R:9000:[fe80::1%eth0.1]:80", (("", 9000), ("fe80::1%eth0.1", 80), ratrod.REVERSE)),
])
def test_tunnels_of_special_forms(text, spec):
    assert ratrod.parse_tunnels(text) == [ratrod.TunnelSpec(*spec)]


def test_tunnels_that_are_none():
    """What was typed is named, so that a terminal can show it, with the forms that there are."""
    for text in NO_TUNNELS:
        with row(text):
            error = pytest.raises(ratrod.ConfigError, ratrod.parse_tunnels, text)
            said = str(error.value)
            assert "`%s`" % ratrod.printable(text) in said and said.isprintable()
            without = said.replace("`%s`" % ratrod.printable(text), "")
            assert all(form in without for form in ("[host:]port:socks", "stdio:host:port", "unix:/path")) or "ranges of ports" in without


def test_tunnels_that_do_not_go_together():
    """Standard input and output are one tunnel's only, and one process's."""
    for texts, workers in ((["stdio:db:80", "stdio:db:81"], 1), (["stdio:db:80"] * 2, 1), (["0:db:80", "stdio:db:80", "stdio:unix:/a"], 1),
                           (["stdio:db:80"], 2)):
        with row(texts), pytest.raises(ratrod.ConfigError, match="stdio:"):
            ratrod.check_tunnels(texts, legacy=False, workers=workers)
    assert_each_raises(ratrod.ConfigError, "two R: tunnels", lambda texts: ratrod.check_tunnels(texts, legacy=False), [
        ["R:5000:a:1", "R:5000:b:2"], ["R:5000:a:1", "R:localhost:5000:b:2"], ["R:1-3:a:1-3", "R:3-4:b:3-4"]])
    assert len(ratrod.check_tunnels(["R:0:a:1", "R:0:b:2", "R:5000:a:1", "R:*:5000:b:2"], legacy=False)) == 4


def test_windows_names_what_a_posix_system_has_at_the_other_side(monkeypatch):
    """A client of Windows, whose own paths have backslashes, may ask a server for a Unix socket. Of stdio: it lacks the calls."""
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.delattr(os, "readv", raising=False)
    for text in "6379:unix:/run/redis.sock", "R:9000:unix:/run/redis.sock":
        assert str(ratrod.parse_tunnels(text)[0].remote) == "unix:/run/redis.sock"
    assert_raises(ratrod.ConfigError, "stdio: needs a POSIX system", ratrod.check_tunnels, ["stdio:db:80"], legacy=False)
