"""Section 3 of ratrod.py: keys and key files, addresses and policy, against PROTOCOL.md."""

import errno
import functools
import itertools
import os
import re
import stat
import time
import types
from unittest import mock

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, strategies as st

import ratrod
from ratrod import Address, ConfigError, KeyPair, KnownHosts, PolicyError
from support.keys import base64url, make_keys
from support.rows import assert_each_raises, row
from test_core import flipped, unlimited

SEEDS = [bytes(32), b"\xff" * 32, bytes(range(32))]
SEED = SEEDS[2]

# ---------------------------------------------------------------------------------------------------- keys


def texts_of(folder):
    return (folder.path / "key").read_text(), (folder.path / "key.pub").read_text()


@pytest.mark.parametrize("seed", SEEDS, ids=bytes.hex)
def test_a_key_pair_is_that_of_the_cryptography_package(tmp_path, seed):
    made = make_keys(tmp_path / "keys", seed)
    key_text, public_text = texts_of(made)
    pair = KeyPair.decode(key_text)
    assert (pair.seed, ratrod.encode_key(pair.public)) == (seed, public_text)
    assert pair == KeyPair.from_seed(seed) == ratrod.KeyFolder(str(made.path)).load()
    assert pair.encode() == key_text
    assert (len(key_text), len(public_text)) == (111, 43)
    assert pair.sign(b"message") == Ed25519PrivateKey.from_private_bytes(seed).sign(b"message")


def test_what_is_generated_is_read_by_the_cryptography_package(tmp_path):
    folder = ratrod.KeyFolder(str(tmp_path / "new" / "keys"))
    pair = folder.generate()
    assert make_keys(tmp_path / "twin", pair.seed).public == ratrod.encode_key(pair.public)
    for name in ("key", "key.pub", "known_hosts", "authorized_keys"):
        assert (tmp_path / "new" / "keys" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()
    assert folder.load() == pair and not folder.warnings
    if os.name == "posix":
        modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (folder.path, folder.key_file)]
        assert modes == [0o700, 0o600]
    # Whoever knows this key would no longer let its owner in.
    before = texts_of(make_keys(tmp_path / "other"))
    pytest.raises(ConfigError, ratrod.KeyFolder(str(tmp_path / "other")).generate)
    assert before == ((tmp_path / "other" / "key").read_text(), (tmp_path / "other" / "key.pub").read_text())


def test_no_repr_shows_the_seed():
    # A repr ends in logs.
    pair = KeyPair.from_seed(SEED)
    for shown in (repr(pair), str(pair), "%s %r" % (pair, pair), "{} {!r}".format(pair, pair), repr([pair]), repr({"keys": pair})):
        assert ratrod.encode_key(pair.public) in shown
        for secret in (repr(SEED)[2:-1], SEED.hex(), base64url(SEED), pair.encode()):
            assert secret not in shown


@unlimited
@given(st.binary(min_size=1, max_size=90))
def test_decode_key_takes_what_encode_key_gives(raw):
    assert ratrod.encode_key(raw) == base64url(raw)
    assert ratrod.decode_key(base64url(raw), len(raw)) == raw
    pytest.raises(ValueError, ratrod.decode_key, base64url(raw), len(raw) + 1)


def changed(text):
    """`text` with every character replaced by every other of the alphabet, and by some of no alphabet."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for at, character in itertools.product(range(len(text)), alphabet + "+/=. \n\t\0\u00e9\uff21\u0665"):
        if character != text[at]:
            yield text[:at] + character + text[at + 1:]


def test_every_changed_character_of_a_public_key_is_another_key_or_none():
    # One text for each key, or "the same key" would mean two things.
    text = base64url(SEED)
    taken = {}
    for wrong in changed(text):
        try:
            taken[wrong] = ratrod.decode_key(wrong)
        except ValueError:
            continue
    assert SEED not in taken.values()
    assert len(set(taken.values())) == len(taken) == 42 * 63 + 15  # the last character has four bits, of 16 values
    assert all(base64url(raw) == wrong for wrong, raw in taken.items())


def test_texts_that_are_no_key():
    no_keys = ["", "A", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 42 + "D", "A" * 42 + "_", "/" * 42 + "8", "+" * 42 + "8", "=" * 43, "\u00e9" * 43,
               # Padding and white space, also where they make up for a character that is missing.
               *(change.format(rest) for rest in (base64url(SEED), base64url(SEED)[1:], base64url(SEED)[:-1])
                 for change in ("{}=", "{}==", "{}\n", "\n{}", " {}", "{} ", "\ufeff{}", "{}\0"))]
    assert_each_raises(ValueError, None, ratrod.decode_key, no_keys)


def test_a_private_key_with_any_other_character_or_bit_is_refused():
    # The public half must belong to the private one, so a key file with a slip of the pen is no key at all.
    text = KeyPair.from_seed(SEED).encode()
    for wrong in itertools.chain(changed(text), (base64url(wrong) for _, wrong in flipped(ratrod.decode_key(text, 83)))):
        pytest.raises(ValueError, KeyPair.decode, wrong)


def test_signatures():
    pair = KeyPair.from_seed(SEED)
    signature = pair.sign(b"challenge")
    assert ratrod.verify(pair.public, b"challenge", signature)
    for _, wrong in flipped(signature):
        assert not ratrod.verify(pair.public, b"challenge", wrong)
    for _, wrong in flipped(pair.public):
        assert not ratrod.verify(wrong, b"challenge", signature)
    assert not ratrod.verify(pair.public, b"another", signature)
    for size in (0, 1, 31, 33, 63, 65):
        assert not ratrod.verify(pair.public.ljust(size, b"\0")[:size], b"challenge", signature)
        assert not ratrod.verify(pair.public, b"challenge", signature.ljust(size, b"\0")[:size])


# ---------------------------------------------------------------------------------------------------- lists of keys

A, B, C = (bytes((n,)) * 32 for n in (1, 2, 3))
LONG_AGO = 10 ** 9 * 10 ** 9  # ns: a time that a cache may trust


def put(path, *lines, when=None):
    path.write_text("".join("%s\n" % line for line in lines))
    if when:
        os.utime(path, ns=(when, when))


@pytest.fixture
def listed(tmp_path):
    """(a KnownHosts, put(lines...), its path)."""
    path = tmp_path / "list"
    return KnownHosts(str(path)), lambda *lines, **options: put(path, *lines, **options), path


@pytest.mark.parametrize("when", [None, LONG_AGO], ids=["just now", "long ago"])
def test_a_list_is_read_again_whenever_it_changed(listed, when):
    # Within the same mtime too: an editor or rsync may keep it, and a clock has ticks. Both texts have one size.
    lines, write, _ = listed
    for key in (A, B, C, A):
        write(base64url(key), when=when)
        assert list(lines.read()) == [key]
        assert lines.read() is lines.read()  # whoever looks for changes sees none


def test_a_list_that_has_just_changed_is_parsed_once(tmp_path):
    """For a moment its times tell nothing, and each client that comes looks into it: 20 ms for 1,000 lines."""
    parsed = []
    lines = ratrod.KeyLines(str(tmp_path / "list"), parsed.append)
    put(tmp_path / "list", base64url(A))
    lines.read()
    lines.read()
    assert len(parsed) == 1


def test_a_list_from_the_future_is_read_once(listed, monkeypatch):
    """The clock was set back: to parse the list at each look would be most of what a server does."""
    lines, write, _ = listed
    write(base64url(A), when=4 * LONG_AGO)
    before = lines.read()
    monkeypatch.delattr(ratrod, "read_text")
    assert lines.read() is before


def test_a_list_that_is_replaced_is_read_again(listed):
    # One that says the same again is the same object: the server compares by identity every second, and only a change makes it go through its links.
    lines, write, path = listed
    write(base64url(A), when=LONG_AGO)
    before = lines.read()
    assert list(before) == [A]
    for key in (A, B):
        put(path.with_name("new"), base64url(key), when=LONG_AGO)
        os.replace(path.with_name("new"), path)
        assert list(lines.read()) == [key] and (lines.read() is before) == (key == A)
    write(base64url(B))
    before = lines.read()
    write(base64url(B), when=LONG_AGO)
    assert lines.read() is before


@pytest.mark.parametrize("allowed, is_reload, is_kept", [(60, False, True), (0, False, False), (60, True, False)])
def test_a_list_that_is_being_written_is_not_empty(listed, monkeypatch, allowed, is_reload, is_kept):
    """An editor empties it or renames it away (vim, emacs), and then writes: for a moment what it said before holds, but not at a SIGHUP."""
    lines, write, path = listed
    monkeypatch.setattr(ratrod, "EMPTY_FOR", allowed)
    for take_away in (write, path.unlink, lambda: (path.unlink(), write())):
        write(base64url(A), when=LONG_AGO)
        before = lines.read()
        take_away()
        if is_reload:
            lines.forget()
        assert list(before) == [A] and (lines.read() is before if is_kept else not lines.read())
        write(base64url(B))
        assert list(lines.read()) == [B]


def test_a_list_that_another_program_holds_on_windows(listed, monkeypatch):
    """What it said before holds for a while; elsewhere nobody reads what may not be read."""
    lines, write, _ = listed
    write(base64url(A), when=LONG_AGO)
    before = lines.read()
    write(base64url(B))
    with monkeypatch.context() as patch:
        patch.setattr(ratrod, "read_text", mock.Mock(side_effect=PermissionError(errno.EACCES, "it is being used by another process")))
        patch.setattr(ratrod.os, "name", "nt")
        assert list(lines.read()) == [A] and lines.read() is before
        patch.setattr(ratrod, "EMPTY_FOR", 0)
        assert not lines.read()
        patch.setattr(ratrod, "EMPTY_FOR", 60)
        patch.setattr(ratrod.os, "name", "posix")
        assert not lines.read()
    assert list(lines.read()) == [B]


def test_a_list_that_was_gone_for_a_moment_and_is_gone_again_hours_later(listed, monkeypatch):
    """A link or a mount that comes back brings the very file that was read: each time it may be gone for a moment."""
    lines, _, path = listed
    real, clock = path.with_name("real"), types.SimpleNamespace(now=time.time() + 100)  # the file's times can be trusted then
    monkeypatch.setattr(ratrod, "time", types.SimpleNamespace(time=lambda: clock.now))
    put(real, base64url(A), when=LONG_AGO)
    for _ in range(2):
        path.symlink_to(real)
        before = lines.read()
        assert list(before) == [A]
        path.unlink()
        assert lines.read() is before
        clock.now += 60


def test_a_reload_while_the_list_is_read_looks_once_more(listed, monkeypatch):
    lines, write, path = listed
    write(base64url(A), when=LONG_AGO)
    read = ratrod.read_text
    def read_slowly(path, *most):
        text = read(path, *most)
        lines.forget()
        return text
    with monkeypatch.context() as patch:
        patch.setattr(ratrod, "read_text", read_slowly)
        lines.read()
    path.unlink()
    assert not lines.read(), "a reload takes an empty list at its word"


@pytest.mark.parametrize("becomes", ["nothing", "a folder", "a pipe", "a loop", "dangling"])
def test_a_list_that_cannot_be_read_lists_nobody(listed, monkeypatch, becomes):
    lines, write, path = listed
    monkeypatch.setattr(ratrod, "EMPTY_FOR", 0)
    write(base64url(A), when=LONG_AGO)
    assert lines.read()
    path.unlink()
    if becomes in ("a folder", "a pipe"):  # which nobody writes: who opens it waits for ever
        (os.mkdir if becomes == "a folder" else os.mkfifo)(path)
    elif becomes != "nothing":
        path.symlink_to(path if becomes == "a loop" else path.with_name("nowhere"))
    assert lines.read() == {}
    pytest.raises(ratrod.AuthenticationError, lines.check, A, "a:1")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("event", ["nothing", "reload", "edit"])
def test_a_list_that_cannot_be_opened(listed, monkeypatch, number, event):
    """A server without descriptors throws nobody out, at a reload neither: the file is the one that was read. One that has changed meanwhile
    may have lost a key, and counts as empty, but only until it can be read again, whatever its times say."""
    lines, write, _ = listed
    def unable(*_args, **_options):
        raise OSError(number, os.strerror(number))
    write(base64url(A), when=LONG_AGO)
    assert list(lines.read()) == [A]
    if event == "reload":
        lines.forget()
    elif event == "edit":
        write(base64url(A), base64url(B), when=LONG_AGO)
    with monkeypatch.context() as patch:
        patch.setattr(ratrod, "open", unable, raising=False)
        for _ in range(2):
            assert list(lines.read()) == ([A] if number == errno.EMFILE and event != "edit" else [])
    assert list(lines.read()) == ([A, B] if event == "edit" else [A])
    assert not lines.problems


def test_lines_that_are_none_harm_no_other(listed):
    lines, _, path = listed
    a, b, c = (base64url(key).encode() for key in (A, B, C))
    path.write_bytes(b"\n".join([
        b"# a comment", b"", b"   ", a + b" \xff\xfe", b"\xff" * 43, b + b"=", b"\t" + c + b"\tx y\r", b"ssh-ed25519 " + b, c]))
    assert lines.read() == {C: ((7, "x"), (9, None))}
    assert [int(re.search(r"line (\d+) of", problem).group(1)) for problem in lines.problems] == [4, 5, 6, 8]
    assert [lines.find_broken(key) and lines.find_broken(key)[0] for key in (A, B, C)] == [4, 6, None]


@pytest.mark.parametrize("encoding, end", [("utf-16", "\r\n"), ("utf-16-le", "\n"), ("utf-16-be", "\r\n"), ("utf-8", "\r\n")])
def test_lines_that_another_system_has_added(listed, encoding, end):
    """PowerShell's >> appends UTF-16 to whatever is there. The lines before it count; each other one is named, by its own number."""
    lines, _, path = listed
    a, b, c = (base64url(key) for key in (A, B, C))
    path.write_bytes(("%s a:1\n" % a).encode() * (encoding != "utf-16") + end.join(["%s b:1" % b, "# no key", '"%s"' % c, ""]).encode(encoding))
    first = 1 if encoding == "utf-16" else 2
    assert lines.read() == {**({A: ((1, "a:1"),)} if first == 2 else {}), **({B: ((2, "b:1"),)} if encoding == "utf-8" else {})}
    assert [lines.find_broken(key) and lines.find_broken(key)[0] for key in (B, C)] == [None if encoding == "utf-8" else first, first + 2]
    said = "it stands in quotes, as cmd.exe leaves them" if encoding == "utf-8" else "it is UTF-16 text, as > and >> of Windows PowerShell write it"
    assert all(said in problem for problem in lines.problems) and lines.problems


# ---------------------------------------------------------------------------------------------------- addresses


def test_split_host_port():
    bad_brackets = ["[::1", "::1]", "[]:80", "[a]:80", "[::1]80", "x[::1]:80", "[::1]x:80", "[[::1]]:80", "[::1]:[80", "[1:2]:3]", "[::1]]:80", "]:["]
    pieces = {
        "": [""], "80": ["80"], "a:80": ["a", "80"], "[::1]:80": ["::1", "80"], ":80": ["", "80"], "a:": ["a", ""], "a:1:b:2": ["a", "1", "b", "2"],
        "[::1]:2000:[2001:db8::7]:80": ["::1", "2000", "2001:db8::7", "80"], "::1": ["", "", "1"], "[::]:0:x": ["::", "0", "x"],
        "a:[b:c]": ["a", "b:c"],
    }
    assert {text: ratrod.split_host_port(text) for text in pieces} == pieces
    for kind, parse in ((ValueError, ratrod.split_host_port), (ValueError, ratrod.parse_target), (ConfigError, ratrod.parse_tunnels)):
        assert_each_raises(kind, None, parse, bad_brackets)


@unlimited
@given(st.lists(st.text(st.characters(blacklist_characters=":[]"), max_size=5)
                | st.text("0123456789abcdef:", max_size=8).map(lambda text: text + ":"), min_size=1, max_size=5))
def test_split_host_port_puts_nothing_in_another_place(pieces):
    assert ratrod.split_host_port(":".join("[%s]" % piece if ":" in piece else piece for piece in pieces)) == pieces


def test_ports():
    bad_ports = ["", "00", "01", "080", "65536", "70000", "99999", "100000", "-1", "+1", " 1", "1 ", "1\n", "\n1", "1_0", "0x1", "1.0", "1e1",
                 "\uff18\uff10", "\u0665", "\u00b2", "http", "1" * 5000]
    assert [ratrod.parse_port(text) for text in ("1", "80", "65535")] == [1, 80, 65535] and ratrod.parse_port("0", lowest=0) == 0
    pytest.raises(ValueError, ratrod.parse_port, "0")
    for lowest in (1, 0):
        assert_each_raises(ValueError, None, functools.partial(ratrod.parse_port, lowest=lowest), bad_ports)


def test_hosts_in_canonical_form():
    hosts = {
        "db": "db", "DB.Example.ORG": "db.example.org", "db.": "db", "localhost.": "localhost", "_srv.a-b.c": "_srv.a-b.c", "unix": "unix",
        "1.2.3.4": "1.2.3.4", "0.0.0.0": "0.0.0.0", "255.255.255.255": "255.255.255.255", "127.0.0.1.": "127.0.0.1", "3com": "3com",
        "1.2.3.4a": "1.2.3.4a", "0x7f.example": "0x7f.example", "a" * 253: "a" * 253, "::1": "::1", "0:0:0:0:0:0:0:1": "::1", "::": "::",
        "2001:DB8::7": "2001:db8::7", "::ffff:127.0.0.1": "127.0.0.1", "::FFFF:7f00:1": "127.0.0.1", "0:0:0:0:0:ffff:10.0.0.1": "10.0.0.1",
        "fe80::1": "fe80::1",
    }
    for text, host in hosts.items():
        with row(text[:40]):
            assert ratrod.parse_host(text) == ratrod.parse_host(host) == host
            target = Address(host, 80)
            assert ratrod.parse_target("[%s]:80" % text if ":" in text else text + ":80") == ratrod.parse_target(str(target)) == target


def test_a_name_in_another_alphabet_is_punycode_from_where_it_is_typed_on():
    """A server takes no other spelling from a client: a rule would be held against something else than is looked up."""
    foreign = {"b\u00fccher.example": "xn--bcher-kva.example", "B\u00dcCHER.Example.": "xn--bcher-kva.example",
               "\u6771\u4eac\u3002jp": "xn--1lqs71d.jp",
               "\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444": "xn--e1afmkfd.xn--p1ai", "\u00e9.org": "xn--9ca.org", "\uff44\uff42": "db"}
    for text, host in foreign.items():
        with row(text):
            assert ratrod.parse_host(text) == host
            for tunnel in ("2000:%s:80", "stdio:%s:80", "R:2000:%s:80"):
                assert ratrod.parse_tunnels(tunnel % text)[0].remote == Address(host, 80)
            pytest.raises(PolicyError, ratrod.Policy().check, text + ":80")


def test_texts_that_are_no_host_or_no_target():
    bad_targets = ["", "a", "80", "a:", ":80", "a:80:", "a:80:80", "::1", "[::1]", "::1:80", "a:80\n", "a:\uff18\uff10", "a:0", "a:65536",
                   "unix:path", "unix:", "unix:/", "unix:/a/../b", "a:080", "a: 80", "a:+80"]
    bad_hosts = [
        "", ".", "..", "a..b", "a..", "127.0.0.1..",  # empty labels, and an empty host, which connect() takes for loopback
        # What only some resolvers take for an address:
        "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7f.1", "127.0.0.0x1", "1.2.3.4.5", "0177.0.0.1",
        "127.0.0.01", "127.0.0.256", "999.1.1.1", "00.0.0.0", "1.0x", "127.1.", "a.0", "a.0x1", "example.127",
        # What IDNA would make an address of, or does not take:
        "\uff11\uff12\uff17.0.0.1", "\uff11", "127\u30020\u30020\u30021", "127.0.0.\u0661", "\u00e9..org", "\u00e9" * 60 + ".org", "a\ufffd",
        "::\uff11", "\u00e9 a", "\u202elocalhost",
        "a b", " a", "a ", "a\n", "\na", "a\0", "a\t", "a/b", "a@b", "a%b", "a*", "a,b", "'a'", "\x1b[2J", "a" * 254, "/run/socket",
        "fe80::1%eth0", "::1%1", "::1%", "1::2::3", ":::", "::g", "::1\n", " ::1", "::1 ", "::\uff11", "1:2:3:4:5:6:7:8:9", "::1/128",
        "::ffff:127.1", "::ffff:0x7f.0.0.1", "12345::", "::ffff:127.0.0.1.", ":",
    ]
    assert_each_raises(ValueError, None, ratrod.parse_host, bad_hosts)
    no_targets = [*bad_targets, *(form % text for text in bad_hosts for form in ("%s:80", "[%s]:80"))]
    assert_each_raises(ValueError, None, ratrod.parse_target, no_targets)
    assert_each_raises(PolicyError, None, ratrod.Policy().check, no_targets)


def test_tunnels_of_every_form():
    tunnels = {
        **{text: ("127.0.0.1", local, remote, port) for text, local, remote, port in (
            ("80", 80, "127.0.0.1", 80), ("2000:80", 2000, "127.0.0.1", 80), ("0:80", 0, "127.0.0.1", 80), ("2000:db:5432", 2000, "db", 5432),
            ("2000:[2001:db8::7]:80", 2000, "2001:db8::7", 80))},
        **{"%s:2000:db:5432" % typed: (host, 2000, "db", 5432) for typed, host in (
            ("0.0.0.0", "0.0.0.0"), ("*", "*"), ("[fe80::1%eth0]", "fe80::1%eth0"))},
        "[::1]:2000:[2001:DB8::7]:80": ("::1", 2000, "2001:db8::7", 80), "[::]:0:DB:80": ("::", 0, "db", 80),
        "localhost:1:localhost:2": ("localhost", 1, "localhost", 2), "a:1:[::ffff:1.2.3.4]:2": ("a", 1, "1.2.3.4", 2),
    }
    for text, (local_host, local_port, remote_host, remote_port) in tunnels.items():
        with row(text):
            spec, = ratrod.parse_tunnels(text)
            assert spec == (Address(local_host, local_port), Address(remote_host, remote_port), ratrod.FORWARD, ("TCP", "UDP"))
            for word in ("tcp", "udp"):
                assert ratrod.parse_tunnels("%s:%s" % (word, text)) == [spec._replace(protocols=(word.upper(),))]


def test_addresses_are_shown_with_the_brackets_they_need():
    for text, address in (("0.0.0.0:19000", ("0.0.0.0", 19000)), ("[::]:1", ("::", 1)), ("Host:1", ("Host", 1))):
        assert ratrod.parse_endpoint(text, "server") == address
    for host, shown in (("db", "db:1"), ("1.2.3.4", "1.2.3.4:1"), ("::1", "[::1]:1")):
        assert str(Address(host, 1)) == shown and ratrod.parse_target(shown) == Address(host, 1)
        assert ratrod.is_address(host) == ratrod.is_literal(host) == (host != "db")
    for mistyped in ("192.168.1.256", "me@127.0.0.1", "1::2::3", "127.1", "fe80::1%lo"):  # the resolver says what it is
        assert not ratrod.is_literal(mistyped)


# ---------------------------------------------------------------------------------------------------- policy


def test_a_regex_must_match_the_whole_host_or_the_whole_target():
    # regex -> targets it allows, and targets it does not.
    rules = {
        ".*": (["db:1", "127.0.0.1:1", "[::1]:65535", "a.b.c:80"], []), "db": (["db:1", "DB:2", "db.:3"], ["adb:1", "dbb:1", "x.db:1", "db.x:1"]),
        "db:80": (["db:80", "DB:80"], ["db:8", "db:8080", "db:81", "adb:80"]), "db|web:443": (["db:1", "web:443"], ["web:80", "xdb:1", "webb:443"]),
        "db:80|": (["db:80"], ["db:81"]), "^db$": (["db:1"], ["dbx:1"]),
        r"10\.0\.0\.\d+": (["10.0.0.7:1", "[::ffff:10.0.0.7]:1"], ["10.0.1.7:1", "10.0.0.7x:1"]),
        r"127\.0\.0\.1": (["127.0.0.1:1", "127.0.0.1.:1", "[::ffff:7f00:1]:1"], ["localhost:1", "[::1]:1"]),
        # IPv6 stands in brackets: the colons of an address are not the one in front of a port.
        r"\[::1\]": (["[::1]:1", "[0:0::1]:1"], ["[::2]:1"]), r"\[::1\]:80": (["[::1]:80"], ["[::1]:81"]), "::1": ([], ["[::1]:1"]),
        ".*:(80|443)": (["db:443", "[fd00::443]:80"], ["[fd00::443]:8080", "[::80]:1", "db:8080"]),
        "fd00::[0-9]+|fd00::.*:80": ([], ["[fd00::443]:8080", "[fd00::1]:80"]),
        "Example.ORG": (["example.org:1", "EXAMPLE.org:1"], ["example.com:1"]),
        "(?-i:DB)": ([], ["db:1", "DB:1"]),  # names are compared in lower case, whatever the pattern asks for
    }
    for regex, (allowed, forbidden) in rules.items():
        policy = ratrod.Policy(regex)
        for text in allowed:
            assert policy.check(text) == ratrod.parse_target(text), regex
        with row(regex):
            assert_each_raises(PolicyError, "does not match", policy.check, forbidden)


def test_patterns_that_are_wrong_or_mean_something_else_are_refused():
    # The first ones compile, with a FutureWarning, into something else than they say: a rule that is misread lets strangers in.
    bad_patterns = ["[[:alpha:]]+", "[a--b]", "[a&&b]", "[a||b]", "[a~~b]", "(", "*", "[", "a**", "(?P<a>.)(?P<a>.)", "\\", "(?z)", "(" * 3000,
                    "a{99999999999999999999}"]
    assert_each_raises(ConfigError, None, ratrod.Policy, bad_patterns * 2)  # re keeps what it has compiled


def test_a_slow_pattern_is_refused_and_an_everyday_one_taken(monkeypatch):
    # It is found before a try takes long: this test would run for years otherwise.
    slow = [
        "(a+)+", "(a|a)*b", "(.*)*x", "((ab)*)*c", "(a?){60}b", ".*.*.*.*.*x", r"(\w*\.?)*\.corp", "(?:[^:]+:?)+x", r"(?i:([A-Z]+)+)\.x",
        r"(?P<n>[a-z]+)+(?P=n)!",
        # Behind what the name has to begin with, inside of a group, in brackets, as a path.
        r"(?:db-([a-z]+)+|web)\.internal", r"\[([0-9a-f]+:?)+\]:80", r"unix:/run/([a-z]+)+\.sock", ".{60}(a+)+x",
    ]
    everyday = [
        "", ".*", r"10\.0\.0\.\d+", r"([a-z0-9-]+\.)*internal:443", r"(.*\.)?example\.com(:\d+)?", r"(?!127\.|localhost|::1|\[::1).*",
        r".*db.*prod.*web.*internal.*", "a{99}", r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d):\d+",
        r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,}:443", "|".join(r"10\.0\.%d\.\d+" % n for n in range(200)),
    ]
    assert_each_raises(ConfigError, "cannot use the remote regex `.*` *: it takes", lambda regex: ratrod.make_policy(["a", regex]), slow)
    monkeypatch.setattr(ratrod, "PROBED", 0.1)  # what takes long is the tries that find nothing
    for regex in everyday:
        with row(regex[:30]):
            assert ratrod.make_policy(regex)


def test_a_refusal_never_shows_the_regex():
    policy = ratrod.Policy("only-the-owner-knows-this")
    for check, *asked in ((policy.check, "db:1"), (policy.check, "127.1:1"), (policy.check, "x"), (reached, policy, Address("db", 1), "127.0.0.1")):
        caught = pytest.raises(PolicyError, check, *asked)
        assert "only-the-owner" not in str(caught.value)


# host, what it resolves to -> what may be connected to: without a regex, and under one that allows the host.
NEVER = ["0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "239.1.2.3", "255.255.255.255", "ff02::1", "ff02::1%eth0", "::ffff:224.0.0.1", "::ffff:0:0"]
INSIDE = ["127.0.0.1", "127.1.2.3", "::1", "169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
          # In the form that no resolver here gives, but another system's might.
          "::ffff:7f00:1", "0:0:0:0:0:ffff:127.0.0.1", "::ffff:a9fe:a9fe",
          # Where the clouds answer questions about a machine.
          "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42",
          # What a router makes 127.0.0.1 or 169.254.169.254 of: NAT64 of both prefixes, 6to4, Teredo, ISATAP, and older forms.
          "64:ff9b::7f00:1", "64:ff9b::169.254.169.254", "64:ff9b:1::7f00:1", "64:ff9b:1:a9fe:a9:fe00::", "2002:7f00:1::1", "2002:a9fe:a9fe::",
          "2001:0:7f00:1::", "2001:0:c000:22d:0:ffff:80ff:fffe", "2001:db8::5efe:127.0.0.1", "2001:db8::200:5efe:a9fe:a9fe", "::127.0.0.1",
          "::ffff:0:127.0.0.1", "64:ff9b::100.100.100.200", "64:ff9b::"]
OPEN, NARROW = ratrod.Policy(), ratrod.Policy(r"(db|localhost|10\..*|127\.0\.0\.1)(:\d+)?")
DB = Address("db", 5432)


def reached(policy, target, *found):
    """What may be connected to of the addresses that were found for the target."""
    return list(policy.check_addresses(target, found))


def test_unspecified_and_multicast_addresses_are_never_opened():
    for found, policy in itertools.product(NEVER, (OPEN, NARROW)):
        for host in ("db", "localhost", str(ratrod.parse_ip(found))):
            with row((found, host)):
                pytest.raises(PolicyError, reached, policy, Address(host, 80), found)


@pytest.mark.parametrize("found", INSIDE)
def test_a_name_that_resolves_inside_needs_that_address_to_be_allowed(found):
    # A name under somebody else's control can resolve to anything. What is connected to is the address as it was found, with its zone.
    address = str(ratrod.parse_ip(found))
    assert reached(OPEN, DB, found) == [found]
    assert reached(NARROW, Address("localhost", 80), found) == [found]
    if address == "127.0.0.1":
        assert reached(NARROW, DB, found) == [found]
    else:
        pytest.raises(PolicyError, reached, NARROW, DB, found)
    literal = re.escape("[%s]" % address if ":" in address else address)
    assert reached(ratrod.Policy(["db", literal]), DB, found) == reached(ratrod.Policy(literal), Address(address, 80), found) == [found]


def test_only_the_addresses_that_may_be_opened_are_left():
    outside = ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "100.100.100.201", "192.0.2.7", "2001:db8::7", "fd00::1", "fc00::7f00:1",
               "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::10.0.0.1", "2002:a00:1::1"]
    for address in outside:
        assert reached(OPEN, DB, address) == reached(NARROW, DB, address) == [address]
    found = ("127.0.0.1", "10.0.0.1", "0.0.0.0", "fe80::1%eth0", "2001:db8::7")
    for _ in range(2):  # what is remembered must not have lost what a caller took out of it
        assert reached(ratrod.Policy("db"), DB, *found) == ["10.0.0.1", "2001:db8::7"]
    pytest.raises(PolicyError, reached, OPEN, DB)


def test_what_a_regex_allows_by_itself_needs_no_second_permission():
    policy = ratrod.Policy(r"localhost|127\.0\.0\.1|\[::1\]")
    for text, found in (("localhost:80", "127.0.0.1"), ("localhost:80", "::1"), ("127.0.0.1:80", "127.0.0.1"), ("[::1]:80", "::1")):
        assert reached(policy, policy.check(text), found) == [found]
    # An address may be allowed with its port only.
    policy = ratrod.Policy(r"db|127\.0\.0\.1:80|\[::1\]:80")
    for found in ("127.0.0.1", "::1"):
        assert reached(policy, Address("db", 80), found) == [found]
        pytest.raises(PolicyError, reached, policy, Address("db", 81), found)
