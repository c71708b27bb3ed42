"""The command line as a user meets it: text, stream and exit code. Lines that end by themselves share a process (run_lines).
What words mean, and what is wrong with a key folder, is in tests/unit (test_usage, test_key_folder)."""

import base64
import contextlib
import datetime
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.keys import base64url, make_keys
from support.many_lines import run_lines
from support.old_docopt import old_docopt
from support.programs import LEGACY, LISTENING, PATIENCE, PYTHON, RATROD, ROOT, STARTED, every_mode, need
from support.sockets import port_of, receive_all, say

# A log line: UTC with microseconds, the level, the text.
LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})Z +(DEBUG|INFO|WARN|ERROR) +(\S.*)$")
QUESTION = "Would you like to have the security files (public / private key pair, known hosts, and authorized keys) generated (y/n)?"
FILES = {"key", "key.pub", "known_hosts", "authorized_keys"}
# Nothing listens on the discard port of a test machine, and nobody may bind it but root.
NOBODY = "127.0.0.1:9"
# What shows a bug or a library's own voice. It must never reach a user, whatever the user typed.
LEAKS = ("Traceback", "internal error", "found unmatched", "Exception ignored", "docopt", "FutureWarning", "ResourceWarning")


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


def check_no_leak(done, *texts):
    for text in texts:
        assert not any(leak in text for leak in LEAKS), text
    assert done >= 0, "killed by signal %d\n%s" % (-done, texts)


@pytest.fixture
def run(environment):
    """run(words...) -> CompletedProcess of a program that ends by itself; its two streams apart, as text; no bug shows in them."""
    def launch(*words, program=RATROD, env=None, **options):
        done = subprocess.run([*program, *words], capture_output=True, timeout=PATIENCE * 2, env=environment(**(env or {})),
                              stdin=subprocess.DEVNULL, **options)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        check_no_leak(done.returncode, done.stdout, done.stderr)
        return done
    return launch


@pytest.fixture
def run_all(environment):
    """run_all(lines) -> [(line, Outcome)]: run_lines() with such an environment; a line is a text, or a list of words. No bug shows in any."""
    def launch(lines, env=None, **options):
        words = [line.split() if isinstance(line, str) else line for line in lines]
        outcomes = run_lines(words, env=environment(**(env or {})), **options)
        for outcome in outcomes:
            check_no_leak(*outcome)
        return list(zip(lines, outcomes))
    return launch


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


HELP = {"-h": None, "--help": None, "help": None, "help serve": "BIND", "serve -h": "BIND", "serve --help": "BIND", "-v serve -h": "BIND",
        "help connect": "TUNNEL", "connect --help": "TUNNEL", "keygen -h": "KEY_PATH", "demo --help": "demo", "help help": "COMMAND"}


def test_help_goes_to_stdout_and_succeeds(run_all):
    outcomes = run_all(HELP)
    for line, done in outcomes:
        assert (done.code, done.err) == (0, "") and "usage:" in done.out.lower(), (line, done)
        assert done.out == outcomes[0][1].out if HELP[line] is None else HELP[line] in done.out and "Commands:" not in done.out, (line, done.out)


def test_version_and_help_load_no_cryptography(environment):
    """They must work where PyNaCl is missing or broken, and quickly."""
    version = re.search(r'^__version__ = "(.+?)"$', (ROOT / "ratrod.py").read_text(encoding="utf-8"), re.M).group(1)
    program = """
import sys, ratrod
assert [ratrod.main(words.split()) for words in ("--help", "help connect", "-V", "--version")] == [0] * 4
print(*sys.modules)
"""
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, timeout=PATIENCE, env=environment(PYTHONPATH=ROOT))
    *_, first, second, imported = done.stdout.decode().splitlines()
    assert (done.returncode, first, second) == (0, *("ratrod " + version,) * 2), done
    assert "socket" in imported.split() and not re.search(r"(?<!\S)(nacl|cffi|_cffi_backend)\b", imported)


@pytest.mark.parametrize("program", [(sys.executable, "ratrod.py"), (sys.executable, "-m", "ratrod")], ids=["file", "module"])
def test_the_ways_to_start_it(run, program):
    """A wrong command line gives the name ratrod, not the interpreter's or a path, whichever way it was started."""
    done = run("bogus", program=program, cwd=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("ratrod: ") and str(ROOT) not in done.stderr


WRONG_WORDS = {"": "command", "bogus": "bogus", "serve": "BIND", "serve -r": "-r|--remote-regex", "serve -a 127.0.0.1:0": "-a|--accept-all-hosts",
               "connect --udp-timeout soon " + NOBODY: "soon|--udp-timeout", "help bogus": "bogus"}


def test_a_wrong_command_line_is_named_in_one_line_above_the_usage(run_all):
    for line, done in run_all(WRONG_WORDS):
        assert (done.code, done.out) == (2, ""), (line, done)
        first, _, rest = done.err.partition("\n")
        assert re.search(r"(?<![\w-])(?:%s)(?!\w)" % WRONG_WORDS[line], first) and "usage:" not in first.lower(), done.err
        assert re.match(r"usage:", rest.strip().lower()), done.err


# These command lines are well formed; what stands in them is not. It is noticed before anything is listened on or connected.
WRONG_VALUES = {
    "serve -r ( 127.0.0.1:0": "(",
    "serve -r a{2,1} 127.0.0.1:0": "a{2,1}",
    # Python reads a POSIX class as an ordinary set of characters, and only warns (FutureWarning): it would match something else than was meant.
    "serve -r [[:alpha:]]+ 127.0.0.1:0": "[[:alpha:]]+",
    "serve 127.0.0.1:70000": "70000",
    "serve -- -h": "-h",
    "connect 127.0.0.1:0": "127.0.0.1:0",
    "connect %s 0:host:80 2000:host:bad" % NOBODY: "2000:host:bad",
    "connect %s 8000-8002:db:80" % NOBODY: "8000-8002:db:80",
    "serve -k KEYS --metrics x 127.0.0.1:0": "address for metrics",
}


def test_what_cannot_be_meant_is_refused_at_the_start(run_all, keys):
    lines = [*WRONG_VALUES, ["serve", ""], ["connect", ""], ["connect", NOBODY, ""], ["connect", NOBODY, "80\n"]]
    for line, done in run_all(lines, env={"RATROD_KEY_PATH": keys.server.path}):
        said = [text for text in done.err.splitlines() if text]
        assert (done.code, done.out, len(said)) == (2, "", 1) and "ERROR" in said[0], (line, done)
        assert WRONG_VALUES.get(line if isinstance(line, str) else "", "`") in said[0], (line, said)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1:strict"])
def test_a_terminal_that_cannot_show_every_character(run_all, keys, encoding):
    """A file name may hold any bytes, and ours has emojis: printing must not raise, whatever the terminal's encoding is."""
    lines = {"--help": 0, "connect " + NOBODY: 1, "\udcff": 2, "serve \udcff": 2, "connect %s \udce9:80" % NOBODY: 2,
             "serve -r \udcff( 127.0.0.1:0": 2}
    for line, done in run_all(lines, env={"PYTHONIOENCODING": encoding, "RATROD_KEY_PATH": keys.client.path}):
        assert done.code == lines[line] and (done.out or done.err), (line, done)
        assert done.code != 1 or "Test connection failed" in done.err


@pytest.mark.parametrize("reader", ["docopt 0.6.2", "none"])
def test_the_real_program_with_each_reader_of_words(run_all, tmp_path, reader):
    folder = old_docopt() if reader == "docopt 0.6.2" else hide(tmp_path / "hidden", "docopt")
    preload = "import docopt; assert docopt.__version__ == '0.6.2'" if reader == "docopt 0.6.2" else ""
    lines = ["--help", "serve -h", "--version", *WRONG_WORDS]
    assert run_all(lines, env={"PYTHONPATH": folder}, preload=preload) == run_all(lines)


def hide(folder, *modules):
    """A folder that, first on PYTHONPATH, makes these modules unimportable, as where they are not installed."""
    folder.mkdir(exist_ok=True)
    for module in modules:
        (folder / (module + ".py")).write_text("raise ImportError(\"No module named '%s'\")\n" % module)
    return folder


def test_without_pynacl(run_all, keys, tmp_path):
    there, none = ["-k", str(keys.client.path)], ["-k", str(tmp_path / "none")]
    refused = [[*there, "serve", "127.0.0.1:0"], [*there, "connect", NOBODY], [*there, "connect", NOBODY, "0:host:80"], ["demo"], [*none, "keygen"],
               [*none, "connect", NOBODY]]  # which asks nothing: it could not generate anything
    # A mistake in the command line is still what is reported first; help needs neither library.
    others = {"serve --bogus": 2, "--help": 0, "help serve": 0, "--version": 0, "connect -h": 0, "bogus": 2}
    for hidden in (["nacl"], ["nacl", "docopt"]):
        outcomes = run_all([*refused, *others], env={"PYTHONPATH": hide(tmp_path / "-".join(hidden), *hidden)})
        for line, done in outcomes[:len(refused)]:
            assert (done.code, done.out) == (2, "") and re.fullmatch(r".*PyNaCl.*pip3? install.*\n", done.err), (line, done)
        for line, done in outcomes[len(refused):]:
            assert done.code == others[line] and ("bogus" in done.err) == ("bogus" in line), (line, done)
    assert not (tmp_path / "none").exists()


@contextlib.contextmanager
def held(kind):
    """A port of 127.0.0.1 that somebody else holds."""
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            holder.listen(1)
        yield port_of(holder)


def test_what_fails_at_run_time_exits_1(run_all, keys):
    with held(socket.SOCK_STREAM) as tcp, held(socket.SOCK_DGRAM) as udp:
        lines = {
            "serve 127.0.0.1:%d" % tcp: r"127\.0\.0\.1:%d\b.*in use" % tcp,
            "connect %s %d:127.0.0.1:9" % (NOBODY, tcp): r"127\.0\.0\.1:%d\b.*in use" % tcp,
            "connect %s %d:127.0.0.1:9" % (NOBODY, udp): r"127\.0\.0\.1:%d\b.*in use" % udp,
            "serve 192.0.2.1:5": "192.0.2.1:5",  # a documentation address: no machine has it
            "serve no-such-host.invalid:5": "no-such-host.invalid",
            "connect no-such-host.invalid:5 0:host:80": "no-such-host.invalid",
            "connect " + NOBODY: "❌ Test connection failed.*" + NOBODY,
            "connect %s 0:host:80" % NOBODY: NOBODY,
            # A server that says nothing.
            "connect --legacy --handshake-timeout 0.2 127.0.0.1:%d" % tcp: "❌ Test connection failed",
        }
        # In a zone that is never UTC, so that local time cannot pass for it.
        before = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        outcomes = run_all(lines, env={"TZ": "XXX-9", "RATROD_KEY_PATH": keys.client.path})
        after = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    for line, done in outcomes:
        assert (done.code, done.out) == (1, "") and re.search("ERROR.*" + lines[line], done.err), (line, done)
        for said in done.err.splitlines():
            stamp = datetime.datetime.strptime(LOG_LINE.match(said).group(1), "%Y-%m-%dT%H:%M:%S.%f")
            assert before <= stamp <= after, (line, said)


def test_too_few_descriptors_to_start(run_all, keys):
    """Whatever the system refuses, a user gets a line and an exit code. All is imported before the limit falls, where Python itself would fail."""
    pytest.importorskip("resource")
    prepare = """
import resource, threading
ended = threading.Thread(target=int)  # CPython 3.8 loads a library where the first thread ends, and aborts where it cannot
ended.start()
ended.join()
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + number,) * 2)
"""
    for _, done in run_all(["connect %s 0:host:80" % NOBODY] * 8, env={"RATROD_KEY_PATH": keys.client.path}, prepare=prepare,
                           preload="import gc, ipaddress, mmap, encodings.idna, docopt, nacl.bindings, nacl.exceptions"):
        assert done.code in (1, 2) and "ERROR" in done.err, done


def test_first_run_declined(run_all, tmp_path):
    for line, done in run_all(["serve 127.0.0.1:0", "connect " + NOBODY], env={"RATROD_KEY_PATH": tmp_path / "new"}, typed="n\n"):
        assert done.code == 2 and QUESTION in done.out, (line, done)
        assert re.search(r"INFO +No security files present in `%s` \.\.\." % re.escape(str(tmp_path / "new")), done.err), done.err
        assert "keygen" in done.err.splitlines()[-1] and not (tmp_path / "new").exists(), done.err


def test_first_run_accepted_on_a_pipe(start, run, environment):
    server = start(*RATROD, "serve", "127.0.0.1:0", env=environment(), stdin=subprocess.PIPE)
    server.process.stdin.write(b"y\n")
    server.process.stdin.close()
    server.wait_for(STARTED)
    folder = pathlib.Path(environment()["HOME"]) / ".ratrod"
    public = check_key_files(folder)
    ordered(server.lines, ["No security files present in ", "Generating security files ...", "📦 Security files written to `%s`" % (folder / "key"),
                           "Starting server"])
    assert QUESTION in server.output
    assert server.stop() == 0
    # The second run finds them and asks nothing.
    done = run("connect", NOBODY)
    assert done.returncode == 1 and QUESTION not in done.stdout + done.stderr and public == check_key_files(folder)


def test_interrupted_at_the_question(environment, tmp_path):
    patient = "import sys; sys.path.insert(0, %r); import ratrod; ratrod.ANSWER_TIMEOUT = 60; sys.exit(ratrod.main())" % str(ROOT)
    process = subprocess.Popen([sys.executable, "-c", patient, "-k", str(tmp_path / "new"), "serve", "127.0.0.1:0"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
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


def test_keygen(run_all, tmp_path):
    folder = tmp_path / "deep" / "new"
    (_, made), (_, again), (_, nowhere) = run_all(["-k %s keygen" % path for path in (folder, folder, "/proc/no-such-folder")])
    # The public key alone on stdout: `ratrod keygen >> authorized_keys` is what it is for.
    assert made.code == 0 and made.out == check_key_files(folder) + "\n" and QUESTION not in made.err
    assert (again.code, again.out) == (2, "") and str(folder) in again.err
    assert (nowhere.code, nowhere.out) == (2, "") and "/proc/no-such-folder" in nowhere.err


def test_a_bad_key_file_and_warnings_are_shown(run_all, serve, keys, tmp_path):
    bad = make_keys(tmp_path / "bad")
    (bad.path / "key").write_text("nonsense")
    # Piped, so that a file that was taken for a missing one would be overwritten here.
    (_, done), = run_all(["-k %s serve 127.0.0.1:0" % bad.path], typed="y\n")
    assert (done.code, done.out) == (2, "") and str(bad.path / "key") in done.err and (bad.path / "key").read_text() == "nonsense"
    # What a user is told once. A server shows what a client's user compares, and why nobody comes in.
    nobody = r"WARN +`%s` lists nobody" % re.escape(str(keys.server.path / "authorized_keys"))
    server, _ = serve()
    server.wait_for("INFO +🔑 The server's key, which clients are asked about: `%s`" % keys.server.public)
    assert "WARN" not in server.output
    keys.server.write("authorized_keys", "# nobody\n")
    server.wait_for(nobody)
    (keys.server.path / "key").chmod(0o644)
    server, _ = serve()
    server.wait_for(nobody)
    server.wait_for(r"WARN.*%s.*chmod" % re.escape(str(keys.server.path / "key")))


def test_keys_that_cannot_be_read(run_all, tmp_path):
    """Unreadable is not missing: a question whether to generate would end in an overwritten key. Which other places are bad is in unit."""
    (tmp_path / "folder" / "key").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    cases, program, closed = [tmp_path / "folder", tmp_path / "loop"], [PYTHON], make_keys(tmp_path / "closed")
    if os.name == "posix":
        if os.geteuid() == 0:
            # Root reads everything, unless it gives that up.
            program = [need("setpriv"), "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search", PYTHON]
        closed.path.chmod(0)
        cases += [closed.path]
    try:
        lines = [["-k", path, *words.split()] for path in cases for words in ("serve 127.0.0.1:0", "keygen")]
        outcomes = run_all(lines, typed="y\n", program=program)
    finally:
        closed.path.chmod(0o700)
    for line, done in outcomes:
        assert (done.code, done.out) == (2, "") and str(line[1]) in done.err and QUESTION not in done.err, (line, done)
    assert {path.name for path in closed.path.iterdir()} == FILES


def ordered(lines, texts):
    """Asserts that each text is in a line of its own, in this order."""
    rest = iter(lines)
    for text in texts:
        assert any(text in line for line in rest), "%r is missing or too early in:\n%s" % (text, "\n".join(lines))


def test_connect_without_a_tunnel_only_tests(serve, run, keys):
    """And it tells what is wrong with the client's files: a line of known_hosts, and a key.pub that misleads whoever copies it."""
    server, port = serve(*LEGACY.serve)
    with open(keys.client.path / "known_hosts", "a") as lines:
        lines.write("# a comment\nserver:19000 %s\n" % keys.server.public)
    (keys.client.path / "key.pub").write_text("garbage\n")
    done = run("-k", str(keys.client.path), "connect", *LEGACY.connect, "127.0.0.1:%d" % port)
    assert (done.returncode, done.stdout) == (0, "")
    ordered(done.stderr.splitlines(), ["⏳ Testing server connection ...", "✅ Challenge accepted!", "✅ Test connection successful!"])
    assert re.search("WARN +line 3 of `%s` is not understood" % re.escape(str(keys.client.path / "known_hosts")), done.stderr), done.stderr
    assert re.search("WARN.*key.pub.*" + keys.client.public, done.stderr), done.stderr
    assert "📻" not in done.stderr and "DEBUG" not in done.stderr and "\x1b" not in done.stderr
    assert (keys.client.path / "key.pub").read_text() == "garbage\n" and server.process.poll() is None


@every_mode
def test_log_lines_are_the_originals_and_tell_no_secret(serve, connect, keys, target, mode):
    payload, answer = b"up-payload-" * 1111, b"down-payload-" * 2222
    def reply(connection):
        assert receive_all(connection) == payload
        connection.sendall(answer)
    made = target(reply)
    server, server_port = serve(*mode.serve, "-v")
    assert server.wait_for(r"INFO +🚀 Starting server on `127\.0\.0\.1:\d+` \.\.\.$")
    client = connect(server_port, *mode.connect, "-v", "0:localhost:%d" % made.port).ready()
    where = "127.0.0.1:%d" % server_port
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
        line = client.wait_for(r"INFO +📻 \[%s\] Listening on `127\.0\.0\.1:\d+`, and routing through `%s` to `localhost:%d` \.\.\.$" % (
            kind, where, made.port))
        assert client.lines.index(line.string) > tested
    with socket.create_connection(("127.0.0.1", int(client.wait_for(LISTENING).group(1))), PATIENCE) as connection:
        originator = "127.0.0.1:%d" % port_of(connection)
        say(connection, payload)
        assert receive_all(connection) == answer
    up, down = len(payload), len(answer)
    for program in (client, server):
        # One line tells the whole of a connection when it is over: bytes each way, and how long it lived.
        over = program.wait_for(r"\b%d\b.*\b%d\b.*\d s\b|\b%d\b.*\b%d\b.*\d s\b" % (up, down, down, up)).string
        # An id ties a connection's lines together.
        assert re.search(r"[#\[]\w+", over), over
        program.wait_for(r"\b(127\.0\.0\.1|localhost):%d\b" % made.port)
        for line in program.lines:
            assert LOG_LINE.match(line), line
    client.wait_for(re.escape(originator))
    for program, folder in ((client, keys.client.path), (server, keys.server.path)):
        text = (folder / "key").read_text()
        seed = base64.urlsafe_b64decode(text + "=")[16:48]
        # Each ends by the first signal when nothing is open.
        assert program.stop(*[signal.SIGINT] if mode is LEGACY else []) == (130 if mode is LEGACY else 0), program.output
        for secret in (text, text[22:64], seed.hex(), base64url(seed), repr(seed)[2:-1], "payload-", "Traceback"):
            assert secret not in program.output


def test_colour_on_a_terminal(environment, keys):
    """Whether and when is in tests/unit/test_key_folder.py."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*RATROD, "-k", str(keys.client.path), "connect", NOBODY], stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment())
    os.close(theirs)
    seen = b""
    # On Linux the end of a terminal is an error, elsewhere an end of file.
    with contextlib.suppress(OSError):
        for chunk in iter(lambda: os.read(ours, 4096), b""):
            seen += chunk
    os.close(ours)
    assert process.wait(PATIENCE) == 1 and b"Test connection failed" in seen and b"\x1b[" in seen


def test_a_reader_that_goes_away(environment, stack):
    """`ratrod --help | head -1` is no bug of ours, and a full disk neither."""
    ours, gone = os.pipe()
    os.close(ours)
    outputs = [(stack.enter_context(open(gone, "wb")), "--help")]
    with contextlib.suppress(FileNotFoundError):
        full = stack.enter_context(open("/dev/full", "wb"))
        outputs += [(full, "help serve"), (full, "--version")]
    for output, words in outputs:
        done = subprocess.run([*RATROD, *words.split()], stdout=output, stderr=subprocess.PIPE, timeout=PATIENCE, env=environment())
        assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr.decode()
        assert done.returncode == 1 and (b"ERROR" in done.stderr) == (words != "--help"), done.stderr.decode()


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
    """As daemons and some supervisors start programs."""
    there = ["-k", str(tmp_path / "new")] if words[0] in ("serve", "keygen") else []
    done = run(*there, *words, program=("/bin/sh", "-c", 'exec "$@" ' + closed, "sh", *RATROD))
    # What was meant for a stream that is closed must not come out of another one.
    assert done.returncode == code and "ratrod:" not in done.stdout, done
    assert (tmp_path / "new").exists() == (words == ["keygen"])


def test_interrupted_while_connecting(ratrod, keys):
    with held(socket.SOCK_STREAM) as port:
        client = ratrod("-k", keys.client.path, "connect", *LEGACY.connect, "127.0.0.1:%d" % port)
        client.wait_for("Testing server connection")
        assert client.stop(signal.SIGINT) == 130
    assert "Traceback" not in client.output


def demo_environment(environment, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder, environment(TMPDIR=folder, TEMP=folder, TMP=folder)


def test_demo(run_all, environment, tmp_path):
    """With less than its 256 MB, which test_pyz sends."""
    temporary, env = demo_environment(environment, tmp_path)
    (_, done), = run_all(["demo"], env={name: env[name] for name in ("TMPDIR", "TEMP", "TMP")}, prepare="ratrod.DEMO_MB = 16")
    assert done.code == 0 and re.search(r"\d [MG]B/s", done.out), done
    # The two commands for doing it for real.
    assert re.search(r"ratrod.*\bserve\b", done.out) and re.search(r"ratrod.*\bconnect\b", done.out)
    assert list(temporary.iterdir()) == [] and list(pathlib.Path(env["HOME"]).iterdir()) == []


def test_demo_interrupted(start, environment, tmp_path):
    """By either signal, in each of its moments: a line of the log or of the demo, and the moments behind it."""
    temporary, env = demo_environment(environment, tmp_path)
    lines = ["Testing server", "Starting server", "Listening on", "A tunnel from", "of 16 MB", "Every byte arrived", "ratrod connect"]
    small = "import sys; sys.path.insert(0, %r); import ratrod; ratrod.DEMO_MB = 16; ratrod.program()" % str(ROOT)
    for number, line in enumerate(lines):
        sign = (signal.SIGINT, signal.SIGTERM)[number % 2]
        demo = start(PYTHON, "-c", small, "-v", "demo", env=env)
        demo.wait_for(line)
        time.sleep(number * 0.003)
        demo.process.send_signal(sign)
        code = demo.wait()
        # 0: it was just over. What comes then ends the interpreter.
        assert code in (128 + sign, 0) or code == -sign and "ratrod connect" in demo.output, (line, demo.output)
        assert not any(leak in demo.output for leak in LEAKS) and list(temporary.iterdir()) == [], (line, demo.output)
