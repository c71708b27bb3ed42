"""The command line as a user meets it: help, errors, exit codes, keys, log lines, signals; and what parses it.

Nearly all of it runs the real program as a subprocess, because what is promised is what arrives on a terminal: text, stream and exit code.
"""

import base64
import contextlib
import datetime
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.keys import base64url, make_keys
from support.programs import LEGACY, LISTENING, PATIENCE, RATROD, READY, ROOT, SCRIPT, STARTED, every_mode, missing, need
from support.sockets import receive_all, receive_exactly

# A log line: UTC with microseconds, the level, the text.
LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})Z +(DEBUG|INFO|WARN|ERROR) +(\S.*)$")
QUESTION = "Would you like to have the security files (public / private key pair, known hosts, and authorized keys) generated (y/n)?"
FILES = {"key", "key.pub", "known_hosts", "authorized_keys"}
# Nothing listens on the discard port of a test machine, and nobody may bind it but root.
NOBODY = "127.0.0.1:9"
# What shows a bug or a library's own voice. It must never reach a user, whatever the user typed.
LEAKS = ("Traceback", "found unmatched", "Exception ignored", "docopt", "FutureWarning", "ResourceWarning")


@pytest.fixture
def environment(tmp_path):
    """environment(NAME=value...) -> dict: this process's, with a home of its own and nothing that changes how a program prints."""
    home = tmp_path / "home"
    home.mkdir()

    def make(**changes):
        made = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR") and not name.startswith("PYTHON")}
        made.update({"HOME": str(home), "USERPROFILE": str(home), "TERM": "xterm-256color"})
        made.update({name: str(value) for name, value in changes.items()})
        return made
    return make


@pytest.fixture
def run(environment):
    """run(words...) -> CompletedProcess of a program that ends by itself; its two streams apart, as text; no bug shows in them."""
    def launch(*words, typed=None, program=RATROD, env=None, **options):
        done = subprocess.run([*program, *words], capture_output=True, timeout=PATIENCE * 2, env=environment(**(env or {})),
                              **{"input": typed.encode()} if typed is not None else {"stdin": subprocess.DEVNULL}, **options)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        for leak in LEAKS:
            assert leak not in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.returncode >= 0, "killed by signal %d\n%s" % (-done.returncode, done.stderr)
        return done
    return launch


def snapshot(folder):
    """Every path under `folder` with its contents: what must be the same afterwards."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_key_files(folder):
    """The four files byte by byte as the original has them, read by another library; returns the public key's 43 characters."""
    assert {path.name for path in folder.iterdir()} == FILES
    text = (folder / "key").read_text()
    raw = base64.urlsafe_b64decode(text + "=")
    assert len(text) == 111 and base64url(raw) == text
    assert raw[:16].hex() == "3051020101300506032b657004220420" and raw[48:51].hex() == "812100" and len(raw) == 83
    public = Ed25519PrivateKey.from_private_bytes(raw[16:48]).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert raw[51:] == public
    assert (folder / "key.pub").read_text() == base64url(public)
    assert (folder / "known_hosts").read_bytes() == (folder / "authorized_keys").read_bytes() == b""
    if os.name == "posix":
        assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    return base64url(public)


# ---------------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize("line, promised", [
    ("-h", "serve connect keygen demo help --key-path --verbose --version"),
    ("--help", "serve connect keygen demo help --key-path --verbose --version"),
    ("help", "serve connect keygen demo help --key-path --verbose --version"),
    ("help serve", "BIND -r --remote-regex --handshake-timeout"),
    ("serve -h", "BIND -r --remote-regex --handshake-timeout"),
    ("serve --help", "BIND -r --remote-regex --handshake-timeout"),
    ("-h serve", "BIND -r --remote-regex"),
    ("-v serve -h", "BIND -r --remote-regex"),
    ("serve 127.0.0.1:0 -h", "BIND -r --remote-regex"),
    ("help connect", "SERVER TUNNEL -a --accept-all-hosts -e --encrypt --legacy --udp-timeout"),
    ("connect -h", "SERVER TUNNEL -a --accept-all-hosts -e --encrypt --legacy --udp-timeout"),
    ("connect --help", "SERVER TUNNEL -a --accept-all-hosts -e --encrypt --legacy --udp-timeout"),
    ("help keygen", "keygen"),
    ("keygen -h", "keygen"),
    ("help demo", "demo"),
    ("demo --help", "demo"),
    ("help help", "help"),
])
def test_help_goes_to_stdout_and_succeeds(run, line, promised):
    done = run(*line.split())
    assert (done.returncode, done.stderr) == (0, "")
    for word in promised.split():
        assert re.search(r"(?<![\w-])%s(?![\w-])" % re.escape(word), done.stdout), (word, done.stdout)
    assert "usage:" in done.stdout.lower()
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(run, flag):
    version = re.search(r'^__version__ = "(.+?)"$', (ROOT / "ratrod.py").read_text(encoding="utf-8"), re.M).group(1)
    done = run(flag)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ratrod %s\n" % version, "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["help", "connect"]], ids=" ".join)
def test_help_and_version_load_no_cryptography(run, environment, words):
    # They must work where PyNaCl is missing or broken, and quickly.
    done = subprocess.run([sys.executable, "-X", "importtime", SCRIPT[1], *words], capture_output=True, timeout=PATIENCE, env=environment())
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines() if line.startswith("import time:")}
    assert "socket" in imported or "re" in imported, "the import log could not be read"
    assert not {name for name in imported if name.split(".")[0] in ("nacl", "cffi", "_cffi_backend")}


@pytest.mark.parametrize("program", [(sys.executable, "ratrod.py"), (sys.executable, "-m", "ratrod")], ids=["file", "module"])
def test_the_ways_to_start_it(run, program):
    assert run("--version", program=program, cwd=str(ROOT)).stdout.startswith("ratrod ")
    # A wrong command line must give the name ratrod, not the interpreter's or a path, whichever way it was started.
    done = run("bogus", program=program, cwd=str(ROOT))
    assert done.returncode == 2 and str(ROOT) not in done.stderr


# ---------------------------------------------------------------------------------------------------- wrong command lines

USAGE_ERRORS = [
    ("", "command"),
    ("bogus", "bogus"),
    ("--bogus", "--bogus"),
    ("-x serve 127.0.0.1:0", "-x"),
    ("serve --bogus 127.0.0.1:0", "--bogus"),
    ("serve 127.0.0.1:0 -vx", "-x"),
    ("serve", "BIND"),
    ("serve -v", "BIND"),
    ("serve --", "BIND"),
    ("connect", "SERVER"),
    ("-k keys connect -a", "SERVER"),
    ("-k", "-k|--key-path"),
    ("serve 127.0.0.1:0 -k", "-k|--key-path"),
    ("serve 127.0.0.1:0 -r", "-r|--remote-regex"),
    ("serve 127.0.0.1:0 --remote-regex", "--remote-regex"),
    ("serve --verbose=yes 127.0.0.1:0", "--verbose"),
    ("serve 127.0.0.1:0 more", "more"),
    ("keygen more", "more"),
    ("demo more", "more"),
    ("help bogus", "bogus"),
    ("help serve more", "more"),
    # Another command's option is as wrong as an unknown one.
    ("serve -a 127.0.0.1:0", "-a|--accept-all-hosts"),
    ("serve -e 127.0.0.1:0", "-e|--encrypt"),
    ("connect -r .* 127.0.0.1:9", "-r|--remote-regex"),
    ("keygen -e", "-e|--encrypt"),
    # A value that is no time, or one that would break a timer.
    ("connect --udp-timeout soon 127.0.0.1:9", "soon|--udp-timeout"),
    ("connect --udp-timeout=-1 127.0.0.1:9", "-1|--udp-timeout"),
    ("connect --udp-timeout 0 127.0.0.1:9", "--udp-timeout"),
    ("connect --udp-timeout= 127.0.0.1:9", "--udp-timeout"),
    ("connect --udp-timeout nan 127.0.0.1:9", "nan|--udp-timeout"),
    ("connect --handshake-timeout inf 127.0.0.1:9", "inf|--handshake-timeout"),
    ("serve --handshake-timeout=0 127.0.0.1:0", "--handshake-timeout"),
]


@pytest.mark.parametrize("line, named", USAGE_ERRORS)
def test_a_wrong_command_line_is_named_in_one_line_above_the_usage(run, line, named):
    done = run(*line.split())
    assert (done.returncode, done.stdout) == (2, ""), done
    first, _, rest = done.stderr.partition("\n")
    assert re.search(r"(?<![\w-])(?:%s)(?!\w)" % named, first), done.stderr
    assert "usage:" not in first.lower()
    assert re.match(r"usage:", rest.strip().lower()), done.stderr


# These command lines are well formed; what stands in them is not. `named` is what the one line must contain.
CONFIGURATION_ERRORS = [
    # -r
    ("serve -r ( 127.0.0.1:0", r"\("),
    ("serve -r a{2,1} 127.0.0.1:0", r"a\{2,1\}"),
    # Python reads a POSIX class as an ordinary set of characters, and only warns (FutureWarning): it would match something else than was meant.
    ("serve -r [[:alpha:]]+ 127.0.0.1:0", r"\[\[:alpha:\]\]\+"),
    # BIND
    ("serve x", "x"),
    ("serve 127.0.0.1", "127.0.0.1"),
    ("serve 127.0.0.1:", "127.0.0.1:"),
    ("serve 127.0.0.1:70000", "70000"),
    ("serve 127.0.0.1:-1", "-1"),
    ("serve 127.0.0.1:+1", "1"),
    ("serve 127.0.0.1:x", "x"),
    ("serve [::1:5", r"\[::1:5"),
    ("serve [::1]", r"\[::1\]"),
    ("serve -- -h", "-h"),
    # SERVER
    ("connect x", "x"),
    ("connect 127.0.0.1", "127.0.0.1"),
    ("connect 127.0.0.1:0", "127.0.0.1:0"),
    ("connect 127.0.0.1:70000", "70000"),
    ("connect :9", ":9"),
    ("connect [::1:9", r"\[::1:9"),
    # TUNNEL, noticed before anything is connected
    ("connect 127.0.0.1:9 a:b:c:d:e", "a:b:c:d:e"),
    ("connect 127.0.0.1:9 1:2:3:4:5", "1:2:3:4:5"),
    ("connect 127.0.0.1:9 70000", "70000"),
    ("connect 127.0.0.1:9 65536:80", "65536"),
    ("connect 127.0.0.1:9 0", "0"),
    ("connect 127.0.0.1:9 2000:host:0", "2000:host:0"),
    ("connect 127.0.0.1:9 x", "x"),
    ("connect 127.0.0.1:9 x:80", "x:80"),
    ("connect 127.0.0.1:9 [::1:5", r"\[::1:5"),
    ("connect 127.0.0.1:9 ::1:2000:host:80", "::1:2000:host:80"),
    ("connect 127.0.0.1:9 2000:host:080", "2000:host:080"),
    ("connect 127.0.0.1:9 2000:host:8_0", "8_0"),
    ("connect 127.0.0.1:9 2000:host:+80", r"\+80"),
    ("connect 127.0.0.1:9 2000:host:\uff18\uff10", "2000:host:"),
    ("connect 127.0.0.1:9 2000::80", "2000::80"),
    ("connect 127.0.0.1:9 2000:host:", "2000:host:"),
    ("connect 127.0.0.1:9 0:host:80 2000:host:bad", "2000:host:bad"),
    ("connect 127.0.0.1:9 2000:127.1:80", "127.1"),
]


@pytest.mark.parametrize("line, named", CONFIGURATION_ERRORS)
def test_what_cannot_be_meant_is_refused_at_the_start(run, keys, line, named):
    done = run("-k", str(keys.server.path), *line.split())
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.search(named, "\n".join(line for line in done.stderr.splitlines() if "📻" not in line)), done.stderr


@pytest.mark.parametrize("words", [["serve", ""], ["connect", ""], ["connect", NOBODY, ""], ["connect", NOBODY, " 80"], ["connect", NOBODY, "80\n"],
                                   ["connect", NOBODY, "2000:a host:80"], ["connect", NOBODY, "2000:host\n:80"]], ids=repr)
def test_empty_words_and_white_space_are_refused(run, keys, words):
    done = run("-k", str(keys.client.path), *words)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.strip(), done


def test_words_that_are_not_text(run, keys):
    # A file name may hold any bytes; printing them back must not raise, whatever the terminal's encoding is.
    for env in ({}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}):
        for words in ([b"\xff"], [b"serve", b"\xff"], [b"connect", NOBODY.encode(), b"\xe9:80"], [b"serve", b"-r", b"\xff(", b"127.0.0.1:0"]):
            assert run(b"-k", os.fsencode(keys.client.path), *words, program=[os.fsencode(word) for word in RATROD], env=env).returncode == 2


# ---------------------------------------------------------------------------------------------------- failures at run time


@contextlib.contextmanager
def held(kind, port=0):
    """A port of 127.0.0.1 that somebody else holds."""
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", port))
        if kind == socket.SOCK_STREAM:
            holder.listen(1)
        yield holder.getsockname()[1]


def test_a_busy_port_of_the_server(run, keys):
    with held(socket.SOCK_STREAM) as port:
        done = run("-k", str(keys.server.path), "serve", "127.0.0.1:%d" % port)
    assert done.returncode == 1 and re.search(r"ERROR.*127\.0\.0\.1:%d\b.*in use" % port, done.stderr), done.stderr


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_busy_port_of_a_tunnel(serve, connect, kind):
    server, server_port = serve(*LEGACY.serve)
    with held(kind) as port:
        client = connect(server_port, *LEGACY.connect, "%d:127.0.0.1:9" % port)
        assert client.wait() == 1, client.output
    client.wait_for(r"ERROR.*127\.0\.0\.1:%d\b.*in use" % port)
    assert server.process.poll() is None


@pytest.mark.parametrize("line, named", [
    ("serve 192.0.2.1:5", "192.0.2.1:5"),  # a documentation address: no machine has it
    ("serve no-such-host.invalid:5", "no-such-host.invalid"),
    ("connect no-such-host.invalid:5", "no-such-host.invalid"),
    ("connect no-such-host.invalid:5 0:host:80", "no-such-host.invalid"),
    ("connect " + NOBODY, NOBODY),
    ("connect %s 0:host:80" % NOBODY, NOBODY),
])
def test_what_fails_at_run_time_exits_1(run, keys, line, named):
    done = run("-k", str(keys.client.path), *line.split())
    assert (done.returncode, done.stdout) == (1, ""), done
    assert [text for text in done.stderr.splitlines() if "ERROR" in text and named in text], done.stderr


def test_a_server_that_says_nothing(run, keys):
    with held(socket.SOCK_STREAM) as port:
        done = run("-k", str(keys.client.path), "connect", *LEGACY.connect, "--handshake-timeout", "0.2", "127.0.0.1:%d" % port)
    assert done.returncode == 1 and re.search(r"ERROR.*❌ Test connection failed", done.stderr), done.stderr


def test_failed_authentication_exits_3(serve, connect, ratrod, keys, tmp_path):
    server, port = serve(*LEGACY.serve)
    address = "127.0.0.1:%d" % port

    keys.client.write("known_hosts", "")
    client = connect(port, *LEGACY.connect, "0:127.0.0.1:9")
    assert client.wait() == 3
    client.wait_for(r"ERROR +❌ Test connection failed: Server's public key `%s` is not in the known hosts file" % keys.server.public)

    # With -a the server's key is taken as it comes, and only that: the client must still be known to the server.
    keys.server.write("authorized_keys", "")
    client = ratrod("-k", keys.client.path, "connect", *LEGACY.connect, "-a", address)
    assert client.wait() == 3
    # The next step is in the message: the very line to add.
    client.wait_for(r"ERROR.*authorized_keys.*" + keys.client.public)

    keys.server.trust(keys.client, "authorized_keys")
    client = ratrod("-k", keys.client.path, "connect", *LEGACY.connect, "-a", address)
    assert client.wait() == 0, client.output

    # What a newcomer runs into who tries both ends on one machine with the default keys.
    keys.server.trust(keys.server, "authorized_keys")
    keys.server.trust(keys.server, "known_hosts")
    client = ratrod("-k", keys.server.path, "connect", *LEGACY.connect, address)
    assert client.wait() == 3
    client.wait_for("server and client use the same key; give one of them another -k")
    assert server.process.poll() is None


# ---------------------------------------------------------------------------------------------------- first run and key files


@pytest.mark.parametrize("words", [["serve", "127.0.0.1:0"], ["connect", NOBODY]], ids=lambda words: words[0])
@pytest.mark.parametrize("typed", ["n\n", "", "\n", "perhaps\n"], ids=["n", "end of input", "empty line", "neither"])
def test_first_run_declined(run, tmp_path, words, typed):
    done = run("-k", str(tmp_path / "new"), *words, typed=typed)
    assert done.returncode == 2
    assert QUESTION in done.stdout + done.stderr
    assert re.search(r"INFO +No security files present in `%s` \.\.\." % re.escape(str(tmp_path / "new")), done.stderr), done.stderr
    # What to do instead is part of a clear error.
    assert "keygen" in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "new").exists()


def test_first_run_accepted_on_a_pipe(start, environment, tmp_path):
    server = start(*RATROD, "-k", tmp_path / "new", "serve", "127.0.0.1:0", env=environment(), stdin=subprocess.PIPE)
    server.process.stdin.write(b"y\n")
    server.process.stdin.close()
    server.wait_for(STARTED)
    public = check_key_files(tmp_path / "new")
    texts = [line.partition("`")[0] for line in server.lines]
    assert QUESTION in server.output
    for text in ("No security files present in ", "Generating security files ...", "📦 Security files written to "):
        server.wait_for(re.escape(text))
    assert [text for text in texts if "Security files written" in text or "Starting server" in text][0].endswith("📦 Security files written to ")
    server.wait_for("written to `%s`" % re.escape(str(tmp_path / "new" / "key")))
    assert server.stop() == 0
    # The second run finds them and asks nothing, with the folder or with the key file itself.
    for path in (tmp_path / "new", tmp_path / "new" / "key"):
        server = start(*RATROD, "-k", path, "serve", "127.0.0.1:0", env=environment())
        server.wait_for(STARTED)
        assert QUESTION not in server.output and public == check_key_files(tmp_path / "new")
        assert server.stop() == 0


def test_without_k_the_keys_are_in_the_home_folder(run, start, environment):
    home = environment()["HOME"]
    done = run("connect", NOBODY, typed="y\n")
    assert done.returncode == 1, done.stderr
    check_key_files(ROOT.__class__(home) / ".ratrod")
    server = start(*RATROD, "serve", "127.0.0.1:0", env=environment())
    server.wait_for(STARTED)
    assert QUESTION not in server.output


def test_interrupted_at_the_question(environment, tmp_path):
    process = subprocess.Popen([*RATROD, "-k", str(tmp_path / "new"), "serve", "127.0.0.1:0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=environment())
    with process:
        seen = b""
        while b"(y/n)?" not in seen:
            chunk = os.read(process.stdout.fileno(), 4096)
            assert chunk, seen
            seen += chunk
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(PATIENCE) == 130 and b"Traceback" not in rest
    assert not (tmp_path / "new").exists()


def test_keygen(run, tmp_path):
    folder = tmp_path / "deep" / "new"
    done = run("-k", str(folder), "keygen")
    assert done.returncode == 0 and QUESTION not in done.stdout + done.stderr
    # The public key alone on stdout: `ratrod keygen >> authorized_keys` is what it is for.
    assert done.stdout == check_key_files(folder) + "\n"
    before = snapshot(folder)
    done = run("-k", str(folder), "keygen")
    assert done.returncode == 2 and str(folder) in done.stderr and snapshot(folder) == before
    # Two runs never make the same key.
    assert run("keygen").stdout not in ("", (folder / "key.pub").read_text() + "\n")


@pytest.mark.parametrize("words, typed", [(["keygen"], None), (["connect", NOBODY], "y\n")], ids=["keygen", "first run"])
def test_lists_that_are_already_there_are_kept(run, tmp_path, words, typed):
    # Somebody who prepared the lists first must not lose them, and the folder's other files are none of its business.
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "authorized_keys").write_text("# prepared\n")
    (folder / "notes").write_text("mine\n")
    run("-k", str(folder), *words, typed=typed)
    assert (folder / "authorized_keys").read_text() == "# prepared\n" and (folder / "notes").read_text() == "mine\n"
    assert {path.name for path in folder.iterdir()} == FILES | {"notes"}


def test_a_public_key_without_its_key_is_not_overwritten(run, tmp_path):
    # Whoever lost `key` may still want to know which one it was.
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "key.pub").write_text("x" * 43)
    before = snapshot(folder)
    done = run("-k", str(folder), "keygen")
    assert done.returncode == 2 and "key.pub" in done.stderr and snapshot(folder) == before


def test_keys_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "sub", "/proc/no-such-folder"):
        done = run("-k", str(path), "keygen")
        assert done.returncode == 2 and done.stdout == "" and str(path) in done.stderr, done


def public_of(raw):
    return Ed25519PrivateKey.from_private_bytes(raw).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def der(seed, public, prefix="3051020101300506032b657004220420", middle="812100"):
    return base64url(bytes.fromhex(prefix) + seed + bytes.fromhex(middle) + public)


SEED = bytes(range(32))
GOOD = der(SEED, public_of(SEED))
BAD_KEY_FILES = {
    "empty": b"",
    "short": GOOD[:-1].encode(),
    "long": GOOD.encode() + b"A",
    "four characters more": GOOD.encode() + b"AAAA",
    "padded": GOOD.encode() + b"=",
    "not base64url": GOOD[:50].encode() + b"!" + GOOD[51:].encode(),
    "the other alphabet": GOOD[:50].encode() + b"+" + GOOD[51:].encode(),
    # Python's decoder skips what it does not know: the length alone would not show these.
    "a character to skip inside": GOOD[:50].encode() + b" " + GOOD[50:].encode(),
    "a line end inside": GOOD[:50].encode() + b"\n" + GOOD[50:].encode(),
    # 83 bytes leave two bits of the last character unused: it decodes to the same bytes, but is not the same text.
    "unused bits set": GOOD[:-1].encode() + bytes([GOOD[-1].encode()[0] + 1]),
    "not text": b"\xff\xfe" + GOOD[2:].encode(),
    "a null byte": GOOD.encode() + b"\0",
    "another kind of key": der(SEED, public_of(SEED), prefix="3051020101300506032b656e04220420").encode(),
    "no public half": base64url(bytes.fromhex("302e020100300506032b657004220420") + SEED).encode(),
    "another key's public half": der(SEED, public_of(SEED[::-1])).encode(),
    "the public key": base64url(public_of(SEED)).encode(),
    "an OpenSSH key": b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
}


@pytest.mark.parametrize("name", BAD_KEY_FILES)
def test_a_bad_key_file(run, tmp_path, name):
    keys = make_keys(tmp_path / "keys", SEED)
    (keys.path / "key").write_bytes(BAD_KEY_FILES[name])
    before = snapshot(keys.path)
    # Piped, so that a file that was taken for a missing one would be overwritten here.
    done = run("-k", str(keys.path), "serve", "127.0.0.1:0", typed="y\n")
    assert (done.returncode, done.stdout) == (2, ""), done
    assert str(keys.path / "key") in done.stderr and snapshot(keys.path) == before
    assert GOOD[22:60] not in done.stderr, "a part of a private key was printed"


@pytest.mark.parametrize("around", ["%s\n", "%s\r\n", " %s\t\n\n"], ids=repr)
def test_white_space_around_a_key_is_an_editors(ratrod, tmp_path, around):
    # The original's reader strips it too.
    keys = make_keys(tmp_path / "keys", SEED)
    for file in ("key", "key.pub"):
        (keys.path / file).write_bytes((around % (keys.path / file).read_text()).encode())
    ratrod("-k", keys.path, "serve", "127.0.0.1:0").wait_for(STARTED)


def test_a_key_file_that_others_can_read_is_warned_about(ratrod, tmp_path):
    # Only warned: the original itself writes 0644, and its keys must keep working.
    keys = make_keys(tmp_path / "keys")
    keys.trust(make_keys(tmp_path / "client"), "authorized_keys")
    server = ratrod("-k", keys.path, "serve", "127.0.0.1:0")
    server.wait_for(STARTED)
    assert "WARN" not in "\n".join(line for line in server.lines if "key" in line and "legacy" not in line)
    (keys.path / "key").chmod(0o644)
    server = ratrod("-k", keys.path, "serve", "127.0.0.1:0")
    server.wait_for(STARTED)
    server.wait_for(r"WARN.*%s.*chmod" % re.escape(str(keys.path / "key")))
    assert stat.S_IMODE((keys.path / "key").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix", reason="other systems have other permissions")
@pytest.mark.parametrize("name, mode, warned", [
    ("authorized_keys", 0o620, True), ("known_hosts", 0o602, True), ("", 0o720, True), ("authorized_keys", 0o644, False), ("", 0o755, False),
    ("", 0o1777, False), ("known_hosts", 0o1666, True)],
    ids=["by a group", "by all", "the folder", "read by all", "a folder read by all", "as /tmp", "a sticky file"])
def test_lists_that_others_can_change_are_warned_about(ratrod, tmp_path, name, mode, warned):
    """Who can do that lets himself in, or sends clients to another server. In a folder as /tmp nobody replaces what is another's."""
    keys = make_keys(tmp_path / "keys")
    keys.path.chmod(0o755)
    path = keys.path / name
    path.chmod(mode)
    server = ratrod("-k", keys.path, "serve", "127.0.0.1:0")
    server.wait_for(STARTED)
    assert any("WARN `%s` can be changed by others (mode %04o)" % (path, mode) in line and line.endswith("chmod go-w %s" % path)
               for line in server.lines) == warned


def test_what_others_cannot_reach_is_no_reason_to_warn(ratrod, tmp_path):
    """With umask 002, which some systems have, what an editor makes can be written by a group."""
    keys = make_keys(tmp_path / "keys")
    (keys.path / "authorized_keys").chmod(0o664)
    server = ratrod("-k", keys.path, "serve", "127.0.0.1:0")
    server.wait_for(STARTED)
    assert "can be changed by others" not in server.output


def test_a_server_shows_its_key_and_that_it_knows_nobody(serve, keys):
    """What a client's user compares, and why nobody comes in."""
    nobody = r"WARN +`%s` lists nobody" % re.escape(str(keys.server.path / "authorized_keys"))
    server, _ = serve()
    server.wait_for("INFO +🔑 The server's key, which clients are asked about: `%s`" % keys.server.public)
    assert not re.search(nobody, server.output)
    keys.server.write("authorized_keys", "# nobody\n")
    server.wait_for(nobody)
    server, _ = serve()
    server.wait_for(nobody)


def test_a_client_says_which_lines_of_known_hosts_mean_nothing(serve, connect, keys, tcp_echo):
    _, port = serve()
    with open(keys.client.path / "known_hosts", "a") as lines:
        lines.write("# a comment\nserver:19000 %s\n" % keys.server.public)
    client = connect(port, "0:%d" % tcp_echo.port)
    client.wait_for(READY)
    client.wait_for("WARN +line 3 of `%s` is not understood" % re.escape(str(keys.client.path / "known_hosts")))


@pytest.mark.parametrize("public, warned", [(None, False), ("another", True), ("garbage\n", True), ("", True)],
                         ids=["missing", "another", "garbage", "empty"])
def test_a_key_pub_that_does_not_belong(serve, run, keys, tmp_path, public, warned):
    # The identity is always derived from the seed: a wrong key.pub misleads only the person who copies it, so that person is told.
    server, port = serve(*LEGACY.serve)
    file = keys.client.path / "key.pub"
    file.unlink()
    if public is not None:
        file.write_text(make_keys(tmp_path / "other").public if public == "another" else public)
    before = snapshot(keys.client.path)
    done = run("-k", str(keys.client.path), "connect", *LEGACY.connect, "127.0.0.1:%d" % port)
    assert done.returncode == 0, done.stderr
    if warned:
        assert [line for line in done.stderr.splitlines() if "WARN" in line and "key.pub" in line and keys.client.public in line], done.stderr
    assert snapshot(keys.client.path) == before


def test_keys_that_cannot_be_read(run, tmp_path):
    # Unreadable is not missing: a question whether to generate would end in an overwritten key.
    keys = make_keys(tmp_path / "keys")
    (tmp_path / "folder" / "key").mkdir(parents=True)
    (tmp_path / "file").write_text("not a key folder")
    (tmp_path / "loop").symlink_to("loop")
    cases = [tmp_path / "folder", tmp_path / "file", tmp_path / "file" / "sub", tmp_path / "loop"]
    program = list(RATROD)
    if os.name == "posix":
        if os.geteuid() == 0:
            # Root reads everything, unless it gives that up.
            program = [need("setpriv"), "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search", *RATROD]
        (keys.path / "key").chmod(0)
        closed = make_keys(tmp_path / "closed")
        closed.path.chmod(0)
        cases += [keys.path, closed.path]
    try:
        for path in cases:
            for words in (["serve", "127.0.0.1:0"], ["keygen"]):
                done = run("-k", str(path), *words, typed="y\n", program=program)
                assert (done.returncode, done.stdout) == (2, "") and str(path) in done.stderr, (path, done)
                assert QUESTION not in done.stderr, (path, done)
    finally:
        if os.name == "posix":
            closed.path.chmod(0o700)
    assert (tmp_path / "file").read_text() == "not a key folder"
    assert {path.name for path in closed.path.iterdir()} == FILES


# ---------------------------------------------------------------------------------------------------- log lines


def ordered(lines, texts):
    """Asserts that each text is in a line of its own, in this order."""
    rest = iter(lines)
    for text in texts:
        assert any(text in line for line in rest), "%r is missing or too early in:\n%s" % (text, "\n".join(lines))


@every_mode
def test_the_originals_lines_of_a_successful_connection(serve, connect, keys, mode):
    server, port = serve(*mode.serve)
    assert server.wait_for(r"INFO +🚀 Starting server on `127\.0\.0\.1:\d+` \.\.\.$")
    client = connect(port, *mode.connect, "0:localhost:80")
    client.wait_for(READY)
    where = "127.0.0.1:%d" % port
    ordered(client.lines, [
        "INFO ⏳ Testing server connection ...",
        "INFO ✅ Connected to server `%s` ..." % where,
        "INFO ✅ Sent preamble to server ...",
        "INFO ✅ Server's signature validated with public key `%s` ..." % keys.server.public,
        "INFO 🚧 Signing server challenge ...",
        "INFO ⏳ Awaiting challenge validation ...",
        "INFO ✅ Challenge accepted!",
        "INFO ✅ Test connection successful!",
    ])
    # In the original the two listeners run beside the test: theirs is the one place where the order is free.
    for kind in ("TCP", "UDP"):
        tested = client.lines.index(client.wait_for("⏳ Testing server connection").string)
        line = client.wait_for(r"INFO +📻 \[%s\] Listening on `127\.0\.0\.1:\d+`, and routing through `%s` to `localhost:80` \.\.\.$" % (kind, where))
        assert client.lines.index(line.string) > tested
    for line in server.lines + client.lines:
        assert LOG_LINE.match(line), line


def test_connect_without_a_tunnel_only_tests(serve, run, keys):
    server, port = serve(*LEGACY.serve)
    done = run("-k", str(keys.client.path), "connect", *LEGACY.connect, "127.0.0.1:%d" % port)
    assert (done.returncode, done.stdout) == (0, "")
    ordered(done.stderr.splitlines(), ["⏳ Testing server connection ...", "✅ Challenge accepted!", "✅ Test connection successful!"])
    assert "📻" not in done.stderr
    assert server.process.poll() is None


def test_time_stamps_are_utc_and_lines_go_to_stderr(run, keys):
    # In a zone that is never UTC, so that local time cannot pass for it.
    before = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    done = run("-k", str(keys.client.path), "connect", NOBODY, env={"TZ": "XXX-9"})
    after = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) >= 2
    for line in lines:
        stamp = datetime.datetime.strptime(LOG_LINE.match(line).group(1), "%Y-%m-%dT%H:%M:%S.%f")
        assert before <= stamp <= after
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("env, coloured", [({}, True), ({"NO_COLOR": "1"}, False)], ids=["terminal", "NO_COLOR"])
def test_colour_only_on_a_terminal(environment, keys, env, coloured):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*RATROD, "-k", str(keys.client.path), "connect", NOBODY], stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment(**env))
    os.close(theirs)
    seen = b""
    # On Linux the end of a terminal is an error, elsewhere an end of file.
    with contextlib.suppress(OSError):
        chunk = os.read(ours, 4096)
        while chunk:
            seen += chunk
            chunk = os.read(ours, 4096)
    os.close(ours)
    assert process.wait(PATIENCE) == 1 and b"Test connection failed" in seen
    assert (b"\x1b[" in seen) == coloured, seen


@every_mode
def test_verbose_shows_each_connection_and_no_secret(serve, connect, keys, target, mode):
    payload, answer = b"up-payload-" * 1111, b"down-payload-" * 2222

    def reply(connection):
        assert receive_all(connection) == payload
        connection.sendall(answer)
    made = target(reply)
    server, server_port = serve(*mode.serve, "-v")
    client = connect(server_port, *mode.connect, "-v", "0:127.0.0.1:%d" % made.port)
    client.wait_for(READY)
    with socket.create_connection(("127.0.0.1", int(client.wait_for(LISTENING).group(1))), PATIENCE) as connection:
        originator = "127.0.0.1:%d" % connection.getsockname()[1]
        connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == answer
    up, down = len(payload), len(answer)
    for program in (client, server):
        # One line tells the whole of a connection when it is over: bytes each way, and how long it lived.
        over = program.wait_for(r"\b%d\b.*\b%d\b.*\d s\b|\b%d\b.*\b%d\b.*\d s\b" % (up, down, down, up)).string
        # An id ties a connection's lines together.
        assert re.search(r"[#\[]\w+", over), over
        program.wait_for(r"\b127\.0\.0\.1:%d\b" % made.port)
        for line in program.lines:
            assert LOG_LINE.match(line), line
    client.wait_for(re.escape(originator))
    for program, folder in ((server, keys.server.path), (client, keys.client.path)):
        text = (folder / "key").read_text()
        seed = base64.urlsafe_b64decode(text + "=")[16:48]
        assert program.stop() == 0
        for secret in (text, text[22:64], seed.hex(), base64url(seed), repr(seed)[2:-1], "payload-"):
            assert secret not in program.output


def test_a_reader_that_goes_away(environment):
    # `ratrod --help | head -1` is no bug of ours, and a full disk neither.
    ours, gone = os.pipe()
    os.close(ours)
    outputs = [gone]
    with contextlib.suppress(FileNotFoundError):
        outputs.append(os.open("/dev/full", os.O_WRONLY))
    try:
        for output in outputs:
            for words in (["--help"], ["help", "serve"], ["--version"]):
                done = subprocess.run([*RATROD, *words], stdout=output, stderr=subprocess.PIPE, timeout=PATIENCE, env=environment())
                assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr.decode()
                assert done.returncode == 1
    finally:
        for output in outputs:
            os.close(output)


def test_a_terminal_that_cannot_show_every_character(run, keys):
    for encoding in ("ascii:strict", "latin-1:strict"):
        env = {"PYTHONIOENCODING": encoding}
        assert run("--help", env=env).returncode == 0
        assert "Test connection failed" in run("-k", str(keys.client.path), "connect", NOBODY, env=env).stderr


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the streams")
@pytest.mark.parametrize("closed, words, code", [
    ("<&-", ["serve", "127.0.0.1:0"], 2),
    ("2>&-", ["serve", "127.0.0.1:0"], 2),
    ("<&- >&- 2>&-", ["serve", "127.0.0.1:0"], 2),
    ("<&- >&- 2>&-", ["keygen"], 0),
    (">&-", ["--version"], 0),
    ("2>&-", ["bogus"], 2),
], ids=lambda value: value if isinstance(value, str) else None)
def test_closed_streams(run, tmp_path, closed, words, code):
    # As daemons and some supervisors start programs.
    there = ["-k", str(tmp_path / "new")] if words[0] in ("serve", "keygen") else []
    done = run(*there, *words, program=("/bin/sh", "-c", 'exec "$@" ' + closed, "sh", *RATROD))
    # What was meant for a stream that is closed must not come out of another one.
    assert done.returncode == code and "ratrod:" not in done.stdout, done
    assert (tmp_path / "new").exists() == (words == ["keygen"])


def test_too_few_descriptors_to_start(run, keys):
    # Whatever the system refuses, a user gets a line and an exit code. All is imported before the limit falls, where Python itself would fail.
    pytest.importorskip("resource")
    program = """
import gc, ipaddress, os, resource, sys, encodings.idna, docopt, nacl.bindings, nacl.exceptions, ratrod
free = os.open(os.devnull, os.O_RDONLY)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + int(sys.argv[1]),) * 2)
sys.exit(ratrod.main(sys.argv[2:]))
"""
    for more in range(8):
        done = run("-k", str(keys.client.path), "connect", NOBODY, "0:host:80", env={"PYTHONPATH": ROOT},
                   program=(sys.executable, "-c", program, str(more)))
        assert done.returncode in (1, 2) and "ERROR" in done.stderr, (more, done)


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_both_sides_cleanly(tcp_echo, tunnel, sign, code):
    made = tunnel(tcp_echo.port, LEGACY)
    for program in (made.client, made.server):
        assert program.stop(sign) == code, program.output
        assert "Traceback" not in program.output
    # Everything is closed: the ports are free for the next one at once.
    for port in (made.port, made.server_port):
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_interrupted_while_connecting(ratrod, keys):
    with held(socket.SOCK_STREAM) as port:
        client = ratrod("-k", keys.client.path, "connect", *LEGACY.connect, "127.0.0.1:%d" % port)
        client.wait_for("Testing server connection")
        assert client.stop(signal.SIGINT) == 130
    assert "Traceback" not in client.output


@pytest.mark.parametrize("side", ["client", "server"])
def test_signals_end_it_with_connections_open(tcp_echo, tunnel, side):
    made = tunnel(tcp_echo.port, LEGACY)
    program, other = (made.client, made.server) if side == "client" else (made.server, made.client)
    with made.connect() as connection:
        connection.sendall(b"before")
        assert receive_exactly(connection, 6) == b"before"
        program.process.send_signal(signal.SIGINT)
        # The first may let them go on for a while; whoever sends a second one does not want to wait. A signal that is lost, because both came
        # before the first was looked at, is sent again.
        while True:
            try:
                assert program.process.wait(0.2) == 130, program.output
                break
            except subprocess.TimeoutExpired:
                program.process.send_signal(signal.SIGINT)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
    assert "Traceback" not in program.output and other.process.poll() is None


# ---------------------------------------------------------------------------------------------------- what parses it

OPTIONS = {"command": None, "key_path": None, "verbose": False, "bind": "", "remote_regex": ".*", "server": "", "tunnels": [],
           "accept_all_hosts": False, "encrypt": False, "legacy": False, "udp_timeout": 120, "handshake_timeout": 10, "topic": None}


def serving(bind="S:1", **others):
    return dict(OPTIONS, command="serve", bind=bind, **others)


def connecting(server="S:1", *tunnels, **others):
    return dict(OPTIONS, command="connect", server=server, tunnels=list(tunnels), **others)


# Words → what they mean, or None where they are an error. The same for docopt-ng, docopt 0.6.2 and the built-in fallback.
COMMAND_LINES = [
    ("serve S:1", serving()),
    ("-k keys serve S:1", serving(key_path="keys")),
    ("serve -k keys S:1", serving(key_path="keys")),
    ("serve S:1 -k keys", serving(key_path="keys")),
    ("serve S:1 -kkeys", serving(key_path="keys")),
    ("--key-path keys serve S:1", serving(key_path="keys")),
    ("--key-path=keys serve S:1", serving(key_path="keys")),
    ("--key-path=a=b serve S:1", serving(key_path="a=b")),
    ("serve S:1 --key-path=keys", serving(key_path="keys")),
    ("-v serve S:1", serving(verbose=True)),
    ("serve S:1 --verbose", serving(verbose=True)),
    ("-vkkeys serve S:1", serving(verbose=True, key_path="keys")),
    ("-vk keys serve S:1", serving(verbose=True, key_path="keys")),
    ("-r x serve S:1", serving(remote_regex="x")),
    ("serve -r x S:1", serving(remote_regex="x")),
    ("serve --remote-regex=x S:1", serving(remote_regex="x")),
    ("serve --remote-regex= S:1", serving(remote_regex="")),
    ("serve -r -x S:1", serving(remote_regex="-x")),
    ("serve --legacy S:1", serving(legacy=True)),
    ("--legacy serve S:1", serving(legacy=True)),
    ("serve --handshake-timeout 2.5 S:1", serving(handshake_timeout=2.5)),
    ("serve --udp-timeout=3 S:1", serving(udp_timeout=3)),
    ("connect S:1", connecting()),
    ("connect S:1 80", connecting("S:1", "80")),
    ("connect S:1 80 1:2 0:h:3", connecting("S:1", "80", "1:2", "0:h:3")),
    ("connect -a S:1 80", connecting("S:1", "80", accept_all_hosts=True)),
    ("connect S:1 -a 80", connecting("S:1", "80", accept_all_hosts=True)),
    ("connect S:1 80 -a", connecting("S:1", "80", accept_all_hosts=True)),
    ("connect S:1 80 --accept-all-hosts 81", connecting("S:1", "80", "81", accept_all_hosts=True)),
    ("-a -e connect S:1", connecting(accept_all_hosts=True, encrypt=True)),
    ("connect -ae S:1", connecting(accept_all_hosts=True, encrypt=True)),
    ("connect -eav S:1", connecting(accept_all_hosts=True, encrypt=True, verbose=True)),
    ("connect -aek keys S:1", connecting(accept_all_hosts=True, encrypt=True, key_path="keys")),
    ("connect --encrypt --legacy S:1", connecting(encrypt=True, legacy=True)),
    ("connect S:1 --udp-timeout 5", connecting(udp_timeout=5)),
    ("connect --udp-timeout=0.5 S:1 --handshake-timeout=10.0", connecting(udp_timeout=0.5)),
    ("-k keys -v connect -a -e --legacy S:1 80", connecting("S:1", "80", key_path="keys", verbose=True, accept_all_hosts=True, encrypt=True,
                                                            legacy=True)),
    # "--" ends the options: what follows is taken as it stands.
    ("serve -- S:1", serving()),
    ("serve -v -- S:1", serving(verbose=True)),
    ("serve -- -h", serving("-h")),
    ("serve -- -v", serving("-v")),
    ("connect -- S:1 80", connecting("S:1", "80")),
    ("connect S:1 -- 80", connecting("S:1", "80")),
    ("connect -a S:1 -- -e", connecting("S:1", "-e", accept_all_hosts=True)),
    ("connect S:1 --", connecting()),
    # Given twice: flags say it again, of values the last counts, as with ssh.
    ("-v -v serve S:1", serving(verbose=True)),
    ("-vv serve S:1 -v", serving(verbose=True)),
    ("-k a -k b serve S:1", serving(key_path="b")),
    ("-k a serve S:1 --key-path=b", serving(key_path="b")),
    ("--key-path=b serve S:1 -k a", serving(key_path="a")),
    ("serve -r a -r b S:1 -r c", serving(remote_regex="c")),
    ("connect -a -a -e -e --legacy --legacy S:1", connecting(accept_all_hosts=True, encrypt=True, legacy=True)),
    ("connect --udp-timeout 1 --udp-timeout 2 S:1", connecting(udp_timeout=2)),
    ("keygen", dict(OPTIONS, command="keygen")),
    ("keygen -k keys", dict(OPTIONS, command="keygen", key_path="keys")),
    ("-k keys keygen", dict(OPTIONS, command="keygen", key_path="keys")),
    ("demo", dict(OPTIONS, command="demo")),
    ("help", dict(OPTIONS, command="help")),
    ("help serve", dict(OPTIONS, command="help", topic="serve")),
    ("help demo", dict(OPTIONS, command="help", topic="demo")),
    # A word that is also a command's name is still just a word where a word belongs.
    ("serve connect", serving("connect")),
    ("connect serve help", connecting("serve", "help")),
    ("connect demo:1 demo", connecting("demo:1", "demo")),
    # Which topics there are is not a matter of parsing.
    ("help bogus", dict(OPTIONS, command="help", topic="bogus")),
] + [(line, None) for line, _ in USAGE_ERRORS if line != "help bogus"]

# What each of the three is given: a module that stands in docopt's way, or none.
PARSERS = ("docopt-ng", "docopt 0.6.2", "fallback")

PARSE = """
import json, sys
import ratrod
outcomes = []
for words in json.load(sys.stdin):
    try:
        options = ratrod.parse_command_line(words)
        outcome = {name: getattr(options, name) if hasattr(options, name) else getattr(options.limits, name) for name in %r}
        outcome["tunnels"] = list(outcome["tunnels"])
    except ratrod.UsageError as error:
        assert isinstance(error, ratrod.ConfigError)
        outcome = "error: %%s" %% error
    except (Exception, SystemExit) as error:
        outcome = "crash: %%r" %% error
    outcomes.append(outcome)
docopt = sys.modules.get("docopt")
json.dump({"outcomes": outcomes, "docopt": getattr(docopt, "__version__", None)}, sys.stdout)
""" % (tuple(OPTIONS),)


@pytest.fixture(scope="session")
def old_docopt(tmp_path_factory):
    """A folder with docopt 0.6.2, the version in Debian's python3-docopt."""
    folder = tmp_path_factory.mktemp("docopt")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "docopt==0.6.2"],
                          stdin=subprocess.DEVNULL)
    if done.returncode or not (folder / "docopt.py").exists():
        missing("docopt 0.6.2 from PyPI")
    return folder


def hide(folder, *modules):
    """A folder that, first on PYTHONPATH, makes these modules unimportable, as where they are not installed."""
    folder.mkdir(exist_ok=True)
    for module in modules:
        (folder / (module + ".py")).write_text("raise ImportError(\"No module named '%s'\")\n" % module)
    return folder


@pytest.fixture
def parser(request, tmp_path):
    """parser(name) -> the folder to put on PYTHONPATH so that this one parses."""
    def choose(name):
        if name == "docopt 0.6.2":
            return request.getfixturevalue("old_docopt")
        return hide(tmp_path / "hidden", *["docopt"] if name == "fallback" else [])
    return choose


@pytest.fixture
def parse(parser, environment):
    """parse(name, lists of words) -> what ratrod.parse_command_line makes of each, in a process of its own."""
    def launch(name, lines):
        # Warnings off: docopt 0.6.2 has escapes in its source that the newest Pythons complain about.
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", PARSE], input=json.dumps(lines).encode(), capture_output=True,
                              timeout=PATIENCE * 4, env=environment(PYTHONPATH=os.pathsep.join([str(parser(name)), str(ROOT)])))
        assert done.returncode == 0, done.stderr.decode()
        answer = json.loads(done.stdout.decode())
        version = answer["docopt"]
        assert {"docopt-ng": version not in (None, "0.6.2"), "docopt 0.6.2": version == "0.6.2", "fallback": version is None}[name], version
        return answer["outcomes"]
    return launch


def differences(*outcomes):
    """The outcomes, of those that are options only the fields that are not the same in all."""
    parsed = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    fields = [name for name in OPTIONS if any(outcome[name] != parsed[0][name] for outcome in parsed)] or ["command"]
    return [{name: outcome[name] for name in fields} if isinstance(outcome, dict) else outcome for outcome in outcomes]


@pytest.mark.parametrize("name", PARSERS)
def test_the_table_of_command_lines(parse, name):
    outcomes = parse(name, [line.split() for line, _ in COMMAND_LINES])
    wrong = [(line, expected, outcome) for (line, expected), outcome in zip(COMMAND_LINES, outcomes)
             if (outcome != expected if expected else not (isinstance(outcome, str) and re.match(r"error: .+\Z", outcome)))]
    assert not wrong, "\n".join("%r\n  expected %s\n  and got  %s" % (line, *differences(expected, outcome)) for line, expected, outcome in wrong)


def test_all_parsers_agree(parse):
    # Ours is measured by docopt's own judgement on thousands of lines that nobody would have thought of.
    words = ("serve connect help keygen demo -k --key-path --key-path=p -kp -k=p -v -vv -vk -h --help -V --version -r --remote-regex=x -a -e -ae -ea "
             "--legacy --udp-timeout --udp-timeout=7 --handshake-timeout=x -- - -x --bogus --bogus=1 -v=1 --verbose --verb --key S:1 80 2 "
             "--hel --versi --help=1 --version=x -hv -hk").split()
    dice = random.Random(20250312)
    lines = [[dice.choice(words) for _ in range(dice.randrange(6))] for _ in range(1000)]
    # Lines that begin well: of the blind ones nearly all are wrong.
    lines += [[dice.choice(("serve", "connect", "connect", "help"))] + [dice.choice(words) for _ in range(dice.randrange(5))] for _ in range(1000)]
    lines = [list(line) for line in sorted(set(map(tuple, lines)))]
    results = {name: parse(name, lines) for name in PARSERS}

    def kind(outcome):
        return "error" if isinstance(outcome, str) and outcome.startswith("error: ") else outcome

    def same(line, outcomes):
        # docopt knows "--" only where the usage text has it, there also twice; that the fallback takes the first one, anywhere, does no harm.
        if line.count("--") > 1 or "--" in line and (kind(outcomes[0]) == "error" or outcomes[0]["command"] not in ("serve", "connect")):
            outcomes = outcomes[:2]
        return all(kind(outcome) == kind(outcomes[0]) for outcome in outcomes)
    assert sum(kind(outcome) != "error" for outcome in results["docopt-ng"]) > 100, "these lines test next to nothing"
    cases = [(line, outcomes) for line, *outcomes in zip(lines, *results.values())]
    crashed = [case for case in cases if any(str(outcome).startswith("crash: ") for outcome in case[1])]
    assert not crashed, crashed[:10]
    wrong = [case for case in cases if not same(*case)]
    assert not wrong, "%d of %d, such as:\n" % (len(wrong), len(lines)) + "\n".join(
        "%r\n%s" % (" ".join(line), "\n".join("  %s: %s" % pair for pair in zip(PARSERS, differences(*outcomes)))) for line, outcomes in
        sorted(wrong, key=lambda case: len(case[0]))[:10])


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_in_the_real_program(run, parser, name):
    env = {"PYTHONPATH": parser(name), "PYTHONWARNINGS": "ignore"}
    assert run("--help", env=env).stdout == run("help").stdout
    assert run("serve", "-h", env=env).stdout == run("serve", "-h").stdout
    assert run("--version", env=env).stdout == run("-V").stdout
    for line, named in (("", "command"), ("bogus", "bogus"), ("serve", "BIND"), ("serve S:1 more", "more"), ("serve -r", "-r|--remote-regex"),
                        ("connect --bogus S:1", "--bogus"), ("serve -a S:1", "-a|--accept-all-hosts")):
        done = run(*line.split(), env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.search(named, done.stderr.splitlines()[0]) and "usage:" in done.stderr.lower(), done.stderr


# ---------------------------------------------------------------------------------------------------- without PyNaCl


def test_without_pynacl(run, keys, tmp_path):
    env = {"PYTHONPATH": hide(tmp_path / "hidden", "nacl")}
    there, none = ["-k", str(keys.client.path)], ["-k", str(tmp_path / "none")]
    for words in ([*there, "serve", "127.0.0.1:0"], [*there, "connect", NOBODY], [*there, "connect", NOBODY, "0:host:80"], ["demo"],
                  [*none, "keygen"]):
        done = run(*words, env=env)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert len(done.stderr.splitlines()) == 1 and re.search(r"PyNaCl.*pip3? install", done.stderr), done.stderr
    assert not (tmp_path / "none").exists()
    for words in (["--help"], ["help", "serve"], ["--version"]):
        assert run(*words, env=env).returncode == 0
    # A mistake in the command line is still what is reported first.
    assert "--bogus" in run("serve", "--bogus", env=env).stderr


def test_with_neither_library(run, tmp_path):
    env = {"PYTHONPATH": hide(tmp_path / "hidden", "nacl", "docopt")}
    assert run("--version", env=env).returncode == run("connect", "-h", env=env).returncode == 0
    assert run("bogus", env=env).returncode == 2


# ---------------------------------------------------------------------------------------------------- demo


def demo_environment(environment, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder, environment(TMPDIR=folder, TEMP=folder, TMP=folder)


def test_demo(start, environment, tmp_path):
    temporary, env = demo_environment(environment, tmp_path)
    demo = start(*RATROD, "demo", env=env)
    assert demo.process.wait(PATIENCE * 4) == 0, demo.output
    demo.wait()
    assert re.search(r"\d [MG]B/s", demo.output), demo.output
    # The two commands for doing it for real.
    demo.wait_for(r"ratrod.*\bserve\b")
    demo.wait_for(r"ratrod.*\bconnect\b")
    assert "Traceback" not in demo.output
    assert list(temporary.iterdir()) == [] and list(ROOT.__class__(env["HOME"]).iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_demo_interrupted(start, environment, tmp_path, sign):
    temporary, env = demo_environment(environment, tmp_path)
    demo = start(*RATROD, "demo", env=env)
    demo.wait_for("Listening on")
    demo.process.send_signal(sign)
    # 0: it may just have been over.
    assert demo.process.wait(PATIENCE) in {signal.SIGINT: (130, 0), signal.SIGTERM: (143, 0)}[sign], demo.output
    demo.wait()
    assert "Traceback" not in demo.output and list(temporary.iterdir()) == []
