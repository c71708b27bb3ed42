"""A key folder: what is written into a new one, what is wrong with one, known_hosts, and the two questions that are asked of a user."""

import concurrent.futures
import contextlib
import io
import logging
import os
import re
import signal
import stat
import threading
import types

import pytest

import ratrod
from ratrod import AuthenticationError, ConfigError, KeyFolder, KnownHosts
from support.keys import base64url, fingerprint, make_keys
from support.rows import assert_raises

posix = pytest.mark.skipif(os.name != "posix", reason="other systems have other permissions")


def snapshot(folder):
    """Every path under `folder` with its contents: what must be the same afterwards."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_keys_are_in_the_home_folder_or_where_k_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    pair = KeyFolder().generate()
    # The folder, or the key file itself.
    for path in (None, "~/.ratrod", str(tmp_path / ".ratrod"), str(tmp_path / ".ratrod" / "key")):
        assert KeyFolder(path).load() == pair and KeyFolder(path).path == str(tmp_path / ".ratrod"), path
    assert KeyFolder(str(tmp_path / "deep" / "new")).generate() != pair, "two runs made the same key"


@posix
@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_folder_none_is_made_up(tmp_path, monkeypatch, home):
    """As in a container with a user who is in no passwd file: a folder that is called `~` would appear where it was started."""
    import pwd
    monkeypatch.chdir(tmp_path)
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        monkeypatch.setenv("HOME", home)
    for path in (None, "~/keys"):
        assert_raises(ConfigError, "no home folder .*-k", KeyFolder, path)
    ratrod.NoKeys().load()  # ssh:// needs no folder
    assert KeyFolder(str(tmp_path)).generate() and not (tmp_path / "~").exists()


def test_what_is_there_already_is_kept(tmp_path):
    """The lists of somebody who prepared them first, and other files. Whoever lost `key` may want to know from key.pub which one it was."""
    for name in ("authorized_keys", "notes"):
        (tmp_path / name).write_text("prepared")
    KeyFolder(str(tmp_path)).generate()
    assert [(tmp_path / name).read_text() for name in ("authorized_keys", "notes")] == ["prepared"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub", "known_hosts", "authorized_keys", "notes"}
    (tmp_path / "key").unlink()
    before = snapshot(tmp_path)
    for path in (str(tmp_path), str(tmp_path / "key")):  # which is the file, though it is not there yet
        assert_raises(ConfigError, "key.pub", KeyFolder(path).generate)
    assert snapshot(tmp_path) == before
    for path in (str(tmp_path / "notes" / "sub"), "/proc/no-such-folder"):
        assert_raises(ConfigError, path, KeyFolder(path).generate)
    assert_raises(ConfigError, "zero character", KeyFolder, "a\0b")


def test_a_disk_that_is_full_leaves_no_half_of_a_key(tmp_path, monkeypatch):
    write_new = ratrod.write_new
    def fill(path, text):
        if path.endswith("key"):
            raise OSError(28, "No space left on device")
        write_new(path, text)
    with monkeypatch.context() as patch:
        patch.setattr(ratrod, "write_new", fill)
        assert_raises(ConfigError, "No space left", KeyFolder(str(tmp_path)).generate)
    assert KeyFolder(str(tmp_path)).generate()


SEED = bytes(range(32))
PAIR = ratrod.KeyPair.from_seed(SEED)  # test_core_keys.py holds it against another implementation
GOOD, PUBLIC = PAIR.encode(), ratrod.encode_key(PAIR.public)
BAD_KEY_FILES = {
    "empty": b"", "short": GOOD[:-1].encode(), "long": GOOD.encode() + b"A", "not base64url": GOOD[:50].encode() + b"!" + GOOD[51:].encode(),
    # Python's decoder skips what it does not know.
    "a line end inside": GOOD[:50].encode() + b"\n" + GOOD[50:].encode(), "not text": b"\xff\xfe" + GOOD[2:].encode(),
    "a null byte": GOOD.encode() + b"\0",
    "another kind of key": base64url(ratrod.decode_key(GOOD, 83).replace(b"\x2b\x65\x70", b"\x2b\x65\x6e")).encode(),
    "no public half": base64url(bytes.fromhex("302e020100300506032b657004220420") + SEED).encode(),
}
UTF16, IN_QUOTES = "UTF-16 text, as > and >> of Windows PowerShell write it; write it again as UTF-8", "stands in quotes, as cmd.exe leaves them"


@pytest.mark.parametrize("name", BAD_KEY_FILES)
def test_a_bad_key_file(tmp_path, name):
    (tmp_path / "key").write_bytes(BAD_KEY_FILES[name])
    folder = KeyFolder(str(tmp_path))
    # It is not taken for a missing one, which would be overwritten.
    assert folder.exists()
    pytest.raises(ConfigError, folder.generate)
    raised = pytest.raises(ConfigError, folder.load)
    assert str(tmp_path / "key") in str(raised.value)
    assert GOOD[22:60] not in str(raised.value), "a part of a private key was shown"
    assert snapshot(tmp_path) == {"key": BAD_KEY_FILES[name]}
    assert ("damaged" in str(raised.value)) == BAD_KEY_FILES[name].startswith(GOOD[:21].encode()), raised.value


@pytest.mark.parametrize("place", ["key", "another name"])
def test_another_file_in_the_place_of_a_key(tmp_path, place):
    # What stands in the place of a key by mistake, often the wrong file behind -k. Who reads that it is damaged moves it away.
    other_files = {
        "a PEM file (OPENSSH PRIVATE KEY)": ["-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"],
        "a PEM file (CERTIFICATE)": ["-----BEGIN CERTIFICATE-----\nMIIB\n"], "a PEM file (SSH2 PUBLIC KEY)": ["---- BEGIN SSH2 PUBLIC KEY ----\n"],
        "a key of OpenSSH's or PuTTY's": [
            "PuTTY-User-Key-File-3: ssh-ed25519\n", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@laptop\n", "ecdsa-sha2-nistp256 AAAA\n"],
        "a public key": [PUBLIC],
        "a list of public keys": [PUBLIC + " me@laptop\n", "# the clients\n\n%s no-udp\n%s\n" % (PUBLIC, PUBLIC), "\ufeff%s server:1\r\n" % PUBLIC],
        "an empty file": ["", "\n"], "another file": ["#!/bin/sh\n", "\x7fELF\x02\x01\0\0\0\0\0\0", "A" * 5000],
    }
    path = tmp_path / place
    for what, text in ((what, text) for what, texts in other_files.items() for text in texts):
        path.write_bytes(text.encode())
        raised = pytest.raises(ConfigError, KeyFolder(str(tmp_path if place == "key" else path)).load)
        said = str(raised.value)
        assert said.startswith("`%s` is no private key of ratrod's but %s" % (path, what)) and "-k takes the folder" in said, said
        assert "damaged" not in said and PUBLIC not in said


def test_what_other_systems_do_to_a_key_file(tmp_path):
    """It is told, and how to make it right: the key is good."""
    foreign = [('"%s"', IN_QUOTES, "utf-8"), ("'%s'\r\n", IN_QUOTES, "utf-8"), ("\u201c%s\u201d", IN_QUOTES, "utf-8"),
               ("%s\r\n", UTF16, "utf-16"), ("\ufeff%s", UTF16, "utf-16-be"), ("%s\r\n", UTF16, "utf-16-le")]
    for around, said, encoding in foreign:
        (tmp_path / "key").write_bytes((around % GOOD).encode(encoding))
        assert_raises(ConfigError, said, KeyFolder(str(tmp_path)).load)


def test_a_good_key_file_and_white_space_around_it(tmp_path):
    """White space and a mark at the beginning are an editor's; the original's reader strips them too."""
    keys = make_keys(tmp_path / "keys", SEED)
    for around in ("%s", "%s\n", "%s\r\n", " %s\t\n\n", "\ufeff%s\r\n"):
        for file, text in (("key", GOOD), ("key.pub", keys.public)):
            (keys.path / file).write_bytes((around % text).encode())
        folder = KeyFolder(str(keys.path))
        assert folder.load().seed == SEED and not folder.warnings, around


def test_a_key_pub_that_does_not_belong(tmp_path):
    """The identity is always derived from the seed. A wrong key.pub misleads only the person who copies it, so that person is told."""
    keys = make_keys(tmp_path / "keys", SEED)
    for public in (make_keys(tmp_path / "other").public, "garbage\n", "", None):
        (keys.path / "key.pub").unlink()
        if public is not None:
            (keys.path / "key.pub").write_text(public)
        before = snapshot(keys.path)
        folder = KeyFolder(str(keys.path))
        assert folder.load() == PAIR
        assert len(folder.warnings) == 1 and "key.pub" in folder.warnings[0] and folder.warnings[0].endswith(keys.public), public
        assert snapshot(keys.path) == before
        (keys.path / "key.pub").touch()


@posix
@pytest.mark.parametrize("modes, warned", [
    *(({name: mode}, None) for name, mode in (
        ("key", 0o600), ("authorized_keys", 0o644), ("", 0o755),
        ("", 0o1777))),  # in a folder as /tmp nobody replaces what is another's; a sticky file is no such folder
    # Only warned: the original itself writes 0644, and its keys must keep working.
    ({"key": 0o644}, "key"), ({"key": 0o640}, "key"),
    # Whoever can change the lists lets himself in, or sends clients to another server.
    ({"authorized_keys": 0o620}, "authorized_keys"), ({"known_hosts": 0o602}, "known_hosts"), ({"known_hosts": 0o1666}, "known_hosts"),
    ({"": 0o720}, ""),
    # With umask 002, which some systems have, what an editor makes can be written by a group. Others cannot reach it here.
    ({"": 0o700, "key": 0o664, "authorized_keys": 0o664, "known_hosts": 0o666}, "key"),
    # A private key and authorized_keys that others can write are refused, as sshd does.
    ({"key": 0o606}, "key"),
], ids=lambda value: ",".join("%s %o" % item for item in value.items()) if isinstance(value, dict) else "-")
def test_what_others_can_read_or_change(tmp_path, modes, warned):
    keys = make_keys(tmp_path / "my keys")
    keys.trust(keys, "authorized_keys")
    modes = {"": 0o755, **modes}
    for name, mode in modes.items():
        (keys.path / name).chmod(mode)
    folder, said = KeyFolder(str(keys.path)), []
    is_refused = modes.get("key") == 0o606
    try:
        folder.load()
    except ConfigError as error:
        said.append(str(error))
        assert is_refused
    # A client is told of known_hosts when it starts, a server of authorized_keys whenever it has changed.
    assert bool(folder.authorized_keys.read()) == (warned != "authorized_keys")
    folder.known_hosts.read()
    said += folder.warnings + folder.authorized_keys.problems + folder.known_hosts.problems
    if warned is None:
        assert said == []
    else:
        path, is_read = keys.path / warned, warned == "key" and not is_refused
        text, = said
        assert "`%s` can be %s by others (mode %04o)" % (path, "read" if is_read else "changed", modes[warned]) in text, text
        assert text.endswith('chmod %s "%s"' % ("600" if is_read else "go-w", path)), text
    assert all(stat.S_IMODE((keys.path / name).stat().st_mode) == mode for name, mode in modes.items())


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["", "authorized_keys", "known_hosts"])
def test_what_belongs_to_another_user(tmp_path, name):
    """Warned of where root runs it: he can change what he owns. The lists still count, for `sudo ratrod -k /home/me/.ratrod` is common."""
    keys = make_keys(tmp_path / "my keys")
    for list_name in ("authorized_keys", "known_hosts"):
        keys.trust(keys, list_name)
    os.chown(str(keys.path / name), 12345, -1)
    folder = KeyFolder(str(keys.path))
    folder.load()
    assert folder.authorized_keys.read() and folder.known_hosts.read()
    said, = folder.warnings + folder.authorized_keys.problems + folder.known_hosts.problems
    path = str(keys.path / name).rstrip("/")
    assert said == '`%s` belongs to another user (uid 12345), who could let himself in; make it yours: chown 0 "%s"' % (path, path)


@posix
def test_a_list_that_others_could_write_counts_again_when_it_is_mended(tmp_path):
    """The mode of the folder is not in the file's times."""
    keys = make_keys(tmp_path / "keys")
    keys.trust(keys, "authorized_keys")
    keys.path.chmod(0o755)
    (keys.path / "authorized_keys").chmod(0o666)
    listed = KeyFolder(str(keys.path)).authorized_keys
    assert not listed.read() and listed.is_unusable
    keys.path.chmod(0o700)
    assert listed.read() and not listed.is_unusable and not listed.problems


SERVER, OTHER = (base64url(bytes((n,)) * 32) for n in (1, 2))
UNKNOWN, CHANGED, DAMAGED = "is not in the known hosts file", "HAS CHANGED", "and cannot be understood"
VERDICTS = {
    UNKNOWN: ["", "{other}", "{other} {address}0", "{server} elsewhere:1", "{server} {address}0", "# {server} {address}",
              "{other}\n{server} elsewhere:1", "{server} 127.0.0.2", "{server} elsewhere:1,elsewhere:2", "{server}x", "{server}x elsewhere:1",
              "{server} elsewhere:0", "{server} *", "{server} me@laptop"],
    # A line that is about this server and damaged: neither a bare key nor a new one takes its place.
    DAMAGED: ["{server}x {address}", "{server}\n{server}x {address}", "{server}\n{address} {server}", "{server}\n{server} {address},elsewhere:1",
              "{server}\n{server} elsewhere:1,{address}", "{server}\n'{server} {address}'", "{server}\nx {address}", "{server}\n{server}x 127.0.0.1",
              "{other} elsewhere:1\n{server} {address}/"],
    # A bare key counts only where no line is bound to the address.
    CHANGED: ["{other} {address}", "{server}\n{other} {address}", "{other} {address}\n{server}", "{other} 127.0.0.1", "{server}\n{other} 127.0.0.1",
              "{other} {address}\n{server}x {address}"],
    "": ["{server} {address}", "{server}", "  {server}\t{address}\r", "{server}\n{other} elsewhere:1", "{other}\n{server}",
         "{other} {address}\n{server} {address}", "{server} 127.0.0.1", "{server} [127.0.0.1]:1", "{other}\n{server} 127.0.0.1",
         "{other} {address}\n{server} 127.0.0.1",
         "{server} {address} a comment", "\ufeff{server} {address}", "{server}x {address}\n{server} {address}", "{server}\n{server}x elsewhere:1"],
}


def verdict(known, key=SERVER, address="127.0.0.1:1"):
    try:
        known.check(ratrod.decode_key(key), address)
    except AuthenticationError as error:
        assert key in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("expected", VERDICTS, ids=["unknown", "damaged", "changed", "known"])
def test_what_a_file_says_of_a_server(tmp_path, expected):
    path = tmp_path / "known_hosts"
    for lines in VERDICTS[expected]:
        path.write_bytes(lines.format(server=SERVER, other=OTHER, address="127.0.0.1:1").encode() + b"\n")
        said = verdict(KnownHosts(str(path)))
        assert expected in said and bool(said) == bool(expected), (lines, said)


def test_the_line_that_has_the_key_is_named(tmp_path):
    # Of the line that has the key, and does not count.
    hints = {
        "{server} elsewhere:1": "Line 1 has this key, but for `elsewhere:1` alone.",
        "# mine\n{server} {address}0": "Line 2 has this key, but for `127.0.0.1:10` alone.",
        "{server} a:1,b:1": "Line 1 has this key, but cannot be understood: `a:1,b:1` is no `host:port` and no `host`;",
        "{server}{other}": "Line 1 has this key, but cannot be understood: it looks like two keys in one line",
        "me {server}": "Line 1 has this key, but cannot be understood: its key, the first word, has 2 characters instead of 43.",
        "{server}\n{other} {address}": "Line 1 has this key, but for servers without a line of their own.", "{other}": None,
    }
    path = tmp_path / "known_hosts"
    for lines, hint in hints.items():
        path.write_text(lines.format(server=SERVER, other=OTHER, address="127.0.0.1:1"))
        said = verdict(KnownHosts(str(path)))
        assert hint in said if hint else said and "has this key" not in said, (lines, said)
    third = base64url(b"\3" * 32)
    path.write_text("%s 127.0.0.1:1\n# both\n%s 127.0.0.1:1\n" % (OTHER, third))
    said = verdict(KnownHosts(str(path)))
    assert "line 1 of `%s` says `%s`" % (path, OTHER) in said or "line 3 of `%s` says `%s`" % (path, third) in said, said


def test_a_name_is_the_same_in_capitals(tmp_path):
    """Or a key that has changed would count as one that is new."""
    path, third = tmp_path / "known_hosts", base64url(b"\3" * 32)
    path.write_text("%s Server:1\n%s [::1]:1\n%s" % (SERVER, third, OTHER))
    reading = KnownHosts(str(path))
    assert verdict(reading, address="sERVER:1") == ""
    assert re.search("HAS CHANGED: it shows .*replace that line by: .* SERVER:1", verdict(reading, OTHER, "SERVER:1"))
    for address, key in (("[::1]:1", third), ("xserver:1", OTHER)):
        assert [one for one in (SERVER, OTHER, third) if not verdict(reading, one, address)] == [key]


def test_what_is_in_the_file_stays(tmp_path):
    """In a file without a last newline too, the last line must not grow, nor the new one be lost in it. It is found again behind any of them."""
    path = tmp_path / "known_hosts"
    other, line = OTHER.encode(), b"%s 127.0.0.1:1\n" % SERVER.encode()
    for before in (None, b"", b"\n", b"# my servers", other + b" elsewhere:1", other + b" elsewhere:1\n", other + b" elsewhere:1\r\n", other,
                   b"\xff\xfe not text \x00", other + b" elsewhere:1\n\n# end", b"x" * 100_000):
        if before is not None:
            path.write_bytes(before)
            path.chmod(0o644)
        assert KnownHosts(str(path)).add(b"\1" * 32, "127.0.0.1:1") == ""
        assert path.read_bytes() == (before or b"") + (b"\n" if before and not before.endswith(b"\n") else b"") + line
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if before is None else 0o644)
        assert verdict(KnownHosts(str(path))) == "", before
    # A link in its place stays one: whoever keeps the file elsewhere finds the new line there.
    link = tmp_path / "link"
    link.symlink_to(path)
    path.write_text("")
    assert KnownHosts(str(link)).add(b"\1" * 32, "127.0.0.1:1") == ""
    assert link.is_symlink() and path.read_bytes() == line


def test_several_clients_write_at_once(tmp_path):
    """Different servers, one file: no line is lost or mixed with another."""
    path = tmp_path / "known_hosts"
    path.write_text("# no newline")
    together = threading.Barrier(8)
    def add(n):
        known = KnownHosts(str(path))
        together.wait()
        for port in range(1, 21):
            known.add(bytes((n,)) * 32, "127.0.0.1:%d" % port)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    # Each of them that saw no newline at the end has begun with one.
    lines = [line for line in path.read_text().split("\n") if line]
    assert lines[0] == "# no newline"
    assert sorted(lines[1:]) == sorted("%s 127.0.0.1:%d" % (base64url(bytes((n,)) * 32), port) for n in range(8) for port in range(1, 21))


def test_a_file_that_cannot_be_written(tmp_path):
    """/dev/null takes every line and keeps none."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "no" / "folder")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("folder", "dangling", "null"):
        path = str(tmp_path / name)
        known = KnownHosts(path)
        failure = known.add(b"\1" * 32, "127.0.0.1:1")
        assert ("has written a line to `%s` that is not in it now" if name == "null" else "cannot write to `%s`: ") % path in failure
        assert UNKNOWN in verdict(known)


@posix
def test_a_full_disk_keeps_no_part_of_a_line(tmp_path):
    """With room for the key alone, a part of the line would have this key trusted for every other server."""
    import resource
    known, (soft, hard) = KnownHosts(str(tmp_path / "known_hosts")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (43, hard))
    try:
        assert "no room" in known.add(b"\1" * 32, "127.0.0.1:1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert UNKNOWN in verdict(known)


@pytest.fixture
def typing(monkeypatch):
    """typing(text): what comes from stdin from now on, and then its end."""
    return lambda text: monkeypatch.setattr("sys.stdin", None if text is None else io.StringIO(text))


def test_the_first_run(tmp_path, typing, capsys):
    for n, typed in enumerate(("y\n", "Y\r\n", " yes", "YES\n", "n\n", "", "\n", "perhaps\n", "y es\n", None)):
        typing(typed)
        folder = KeyFolder(str(tmp_path / str(n)))
        if n < 4:
            for _ in range(2):  # the second run finds them, and asks nothing
                ratrod.ensure_keys(folder)
                folder.load()
        else:
            assert_raises(ConfigError, "`%s`.*ratrod -k %s keygen" % ((folder.path,) * 2), ratrod.ensure_keys, folder)  # what to do instead
            assert not (tmp_path / str(n)).exists(), typed
        assert capsys.readouterr().out.count(ratrod.QUESTION) == 1


RIGHT, WRONG = fingerprint(SERVER), fingerprint(OTHER)


def test_a_silent_pipe_is_no_answer(tmp_path, monkeypatch):
    """A service manager's or a supervisor's may stay open for ever. An answer that is there is read, and not a byte behind it."""
    for typed, timeout, blocking in ((b"", 0.1, True), (b"", 60, False), (b"n\nmore", 60, True), (b"y\nmore", 60, True)):
        monkeypatch.setattr(ratrod, "ANSWER_TIMEOUT", timeout)
        reading, writing = os.pipe()
        os.set_blocking(reading, blocking)
        with open(reading) as pipe, open(writing, "wb", buffering=0) as other_end:
            monkeypatch.setattr("sys.stdin", pipe)
            other_end.write(typed)
            if typed.startswith(b"y"):
                ratrod.ensure_keys(KeyFolder(str(tmp_path / "new")))
            else:
                assert_raises(ConfigError, "ratrod -k .* keygen", ratrod.ensure_keys, KeyFolder(str(tmp_path / "new")))
            assert not typed or os.read(reading, 100) == b"more"


def test_the_question_about_an_unknown_server(typing, capsys):
    # Above all a fingerprint that somebody pasted and that is another one's: it must not be taken for a yes, nor end it.
    asked_again = ["", "y", "perhaps", "yes please", "no!", "SHA256:", RIGHT.partition(":")[0], WRONG, RIGHT[:-1], RIGHT + "x", RIGHT.lower(), OTHER,
                   SERVER[:-1], "\u00fc\u6771", "\x00", "\x1b[A", "y" * 2000]
    error = ratrod.UnknownHost(b"\1" * 32, "127.0.0.1:1", "known_hosts")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for answer, accepted in (("yes", True), ("YES", True), ("yes ", True), (" yes", True), ("\tyes", True), (RIGHT, True), (SERVER, True),
                             ("no", False), ("n", False), (" No", False)):
        for before in ([], asked_again):
            typing("".join(line + "\n" for line in [*before, answer]))
            assert ratrod.ask_host(error) is accepted, answer
            shown = capsys.readouterr().err
            assert shown.count("(yes/no/[fingerprint])? ") == 1
            assert shown.count("Please type 'yes', 'no' or the fingerprint: ") == len(before)
            assert "127.0.0.1:1" in shown and SERVER in shown and RIGHT + "." in shown
    # An end of file declines, also behind an answer that is none.
    for typed in ("", "maybe\n"):
        typing(typed)
        assert ratrod.ask_host(error) is False
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, no_color, term, coloured", [
    (Terminal, "", "xterm", True), (Terminal, "1", "xterm", False), (Terminal, "", "dumb", False), (io.StringIO, "", "xterm", False)])
def test_colour_only_on_a_terminal(monkeypatch, stream, no_color, term, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", stream())
    before = ratrod.log.handlers[:], ratrod.log.propagate, ratrod.log.level
    with contextlib.ExitStack() as stack:
        stack.callback(ratrod.log.setLevel, before[2])
        stack.callback(setattr, ratrod.log, "propagate", before[1])
        stack.callback(ratrod.log.handlers.__setitem__, slice(None), before[0])
        ratrod.set_up_logging(logging.INFO)
        ratrod.log.debug("not shown")
        ratrod.log.warning("shown")
        ratrod.flush_log()
        text = ratrod.sys.stderr.getvalue()
    assert ("\x1b[" in text) == coloured and "shown" in text and "not shown" not in text


@pytest.mark.parametrize("knows", [True, False])
def test_a_console_of_windows_is_asked_for_colours(monkeypatch, knows):
    """One that is not asked shows their codes, and an old one knows none."""
    asked = []
    kernel = types.SimpleNamespace(GetStdHandle=lambda which: which, GetConsoleMode=lambda console, mode: setattr(mode._obj, "value", 3) or 1,
                                   SetConsoleMode=lambda console, mode: asked.append((console, mode)) or int(knows))
    monkeypatch.setattr("ctypes.windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "")
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        assert ratrod.shows_colours() == knows
    assert asked == [(-12, 7)]
