"""Where words come from besides the command line: files of arguments (@file), and RATROD_* in the environment."""

import os
import re
import subprocess
import threading

import pytest

import ratrod
from support.programs import PATIENCE, RATROD, READY, tcp_port
from support.sockets import ask

pytestmark = pytest.mark.usefixtures("no_traceback")


@pytest.fixture
def run(tmp_path):
    """run(words..., NAME=value...) -> CompletedProcess, in tmp_path, as text."""
    def launch(*words, **environment):
        env = {**os.environ, "HOME": str(tmp_path), **{name: str(value) for name, value in environment.items()}}
        done = subprocess.run([*RATROD, *words], capture_output=True, timeout=PATIENCE, cwd=tmp_path, stdin=subprocess.DEVNULL, env=env)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
        return done
    return launch


@pytest.fixture
def file(tmp_path):
    """file(name, text or bytes) -> its path"""
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def first_line(done):
    assert (done.returncode, done.stdout) == (2, ""), done
    return done.stderr.splitlines()[0]


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(words..., NAME=value...) -> ratrod.Options, or why not; in this process, for tables."""
    monkeypatch.chdir(tmp_path)

    def launch(*words, **environment):
        try:
            return ratrod.parse_command_line(list(ratrod.expand_arguments(words)), environment)
        except ratrod.UsageError as error:
            return str(error)
    return launch


# ---------------------------------------------------------------------------------------------------- @file


def test_a_tunnel_whose_words_stand_in_files(start, serve, keys, tcp_echo, file, tmp_path):
    """Comments, quotes and line ends as a shell has them; a file in a file; the rest on the command line."""
    _, port = serve()
    spaced = tmp_path / "a folder"
    keys.client.path.rename(spaced)
    file("common", "\ufeff# who we are\n-k '%s' --udp-timeout=5   # and so on\r\n\r\n" % spaced)
    file("home.conf", "@common connect\n127.0.0.1:%d\n" % port)
    client = start(*RATROD, "@home.conf", "0:%d" % tcp_echo.port, cwd=tmp_path)
    client.wait_for(READY)
    ask(tcp_port(client))


def test_a_pipe_is_a_file(start, serve, keys, tmp_path):
    """As `ratrod @<(generate)`: it has no size, and cannot be read twice."""
    _, port = serve()
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=("-k %s connect 127.0.0.1:%d" % (keys.client.path, port),), daemon=True).start()
    assert start(*RATROD, "@%s" % path).wait() == 0


def test_at_signs_that_are_meant(parse, file):
    assert parse("serve", "@@there").bind == "@there"
    # Everywhere, as argparse has it: also after --, and where an option's value stands.
    file("there", "'@@@x'")
    assert parse("serve", "--", "@there").bind == "@@x"
    assert parse("serve", "x@there").bind == "x@there"
    file("count", "3")
    assert parse("serve", "--max-links", "@count", "S:1").limits.links == 3
    # With "=" it is one word, and does not begin with it.
    assert parse("serve", "--remote-regex=@count", "S:1").remote_regex == "@count"


def test_what_a_file_may_hold(parse, file):
    for content, tunnels in (("\n# nothing\n", ()), ("", ()), ("a b\tc\r\nd", tuple("abcd")), ("'a b' \"c d\" e\\ f", ("a b", "c d", "e f")),
                             ("a#b c\nd", ("a", "d")), ("'a#b' 'two\nlines' ''", ("a#b", "two\nlines", "")), ("\ufeffa ü 📻", ("a", "ü", "📻"))):
        file("words", content)
        assert parse("connect", "S:1", "@words").tunnels == tunnels, content
    file("bytes", b"a\xff")
    assert parse("connect", "S:1", "@bytes").tunnels == ("a\udcff",)  # as the system gives such words of a command line
    file("words", "serve -h")
    assert (parse("@words").command, parse("@words").topic) == ("help", "serve")


@pytest.mark.parametrize("content, said", [
    (b"a\n# it's fine\n\nb 'c\nd\n", "line 4 of the arguments in `F`: no closing quotation"),
    (b"a b\n\\", "line 2 of the arguments in `F`: no escaped character"),
    (b'"', "line 1 of the arguments in `F`: no closing quotation"),
    (b"a\nb\0c", "line 2 of the arguments in `F`: a NUL character"),
    (b"x" * (1 << 20) + b"x", "line 1 of the arguments in `F`: more than a file of arguments may be"),
    (b"serve @nowhere", "cannot read the arguments in `nowhere`: No such file or directory"),
    (b"serve @.", "cannot read the arguments in `.`: Is a directory"),
    (b"serve @", "cannot read the arguments in ``: No such file or directory"),
    (b"serve @./F", "the arguments in `./F` name that file again"),
], ids=["quote", "escape", "first line", "NUL", "too long", "missing", "folder", "no name", "loop"])
def test_files_that_cannot_be_used(parse, file, content, said):
    file("F", content)
    assert parse("@F") == said


def test_such_a_file_in_the_real_program(run, file):
    file("F", "serve \n'")
    assert first_line(run("@F")) == "ratrod: line 2 of the arguments in `F`: no closing quotation"


def test_files_inside_each_other(parse, file):
    file("0", "help")
    for n in range(1, 11):
        file(str(n), "@%d" % (n - 1))
    assert parse("@9") == parse("help")
    assert parse("@10") == "`0` is the eleventh file of arguments inside each other"
    # A loop through another file, and the same file twice, which is none.
    file("a", "@b")
    file("b", "@a")
    assert parse("@a") == "the arguments in `a` name that file again"
    file("twice", "-k keys")
    assert parse("@twice", "@twice", "connect", "x") == parse("-k", "keys", "connect", "x")


# ---------------------------------------------------------------------------------------------------- RATROD_*


@pytest.mark.parametrize(("variable", "value", "words"), [
    ("PROXY", "proxy:3128", ["connect", "S:1"]), ("METRICS", "nowhere", ["serve", "127.0.0.1:0"]), ("REMOTE_REGEX", "(((", ["serve", "127.0.0.1:0"]),
    ("PROXY_PROTOCOL", "10.0.0.0/33", ["serve", "127.0.0.1:0"]), ("SOCKS_USER", "me", ["connect", "S:1", "1:socks"]),
    ("SSH_COMMAND", "ssh '", ["connect", "ssh://S", "1:x:2"]), ("WORKERS", "2", ["connect", "ssh://S", "1:x:2"]),
    ("LEGACY", "1", ["connect", "ssh://S", "1:x:2"]), ("WORKERS", "2", ["connect", "S:1", "stdio:x:2"])])
def test_an_error_names_the_variable_that_it_is_about(run, keys, variable, value, words):
    done = run("-k", str(keys.client.path), *words, **{"RATROD_" + variable: value}) if "ssh://S" not in words else run(
        *words, **{"RATROD_" + variable: value})
    assert done.returncode == 2 and done.stderr.strip().endswith("(see RATROD_%s in the environment)" % variable), done.stderr


def test_usual_options_that_mean_nothing_here_are_no_error():
    servers = ratrod.parse_servers("ssh://far"), ratrod.parse_servers("near:1")
    given = {"RATROD_KEY_PATH": "k", "RATROD_ACCEPT_NEW": "1", "RATROD_ACCEPT_ALL_HOSTS": "1", "RATROD_SSH_COMMAND": "ssh -v",
             "RATROD_PROXY": "http://p"}
    options = ratrod.parse_command_line(["connect", "S:1"], given)
    through, straight = (ratrod.forget_useless(options, server) for server in servers)
    assert (through.key_path, through.accept_new, through.accept_all_hosts, through.ssh_command, through.proxy) == (
        None, False, False, "ssh -v", "http://p")
    assert (straight.key_path, straight.accept_new, straight.accept_all_hosts, straight.ssh_command) == ("k", True, True, None)
    typed = ratrod.parse_command_line(["-k", "typed", "connect", "--ssh-command", "typed", "S:1"], given)
    assert [ratrod.forget_useless(typed, server).key_path for server in servers] == ["typed"] * 2
    assert [ratrod.forget_useless(typed, server).ssh_command for server in servers] == ["typed"] * 2


def test_the_environment_gives_what_the_command_line_leaves_open(run, serve, keys, tmp_path):
    _, port = serve()
    server = "127.0.0.1:%d" % port
    assert run("connect", "--check", server, RATROD_KEY_PATH=keys.client.path).returncode == 0
    # The command line wins, in whichever form.
    for words in (["-k", str(keys.client.path)], ["--key-path=%s" % keys.client.path]):
        assert run(*words, "connect", "--check", server, RATROD_KEY_PATH=tmp_path / "nowhere").returncode == 0
    assert re.search("nowhere.*RATROD_KEY_PATH", run("connect", "--check", server, RATROD_KEY_PATH=tmp_path / "nowhere").stderr)
    done = run("connect", server, RATROD_KEY_PATH=keys.client.path, RATROD_CHECK="Yes", RATROD_VERBOSE="1")
    assert done.returncode == 0 and "lets this client in" in done.stdout and "DEBUG" in done.stderr


@pytest.mark.parametrize("value, legacy", [("1", True), ("true", True), ("YES", True), ("0", False), ("false", False), ("No", False), ("", False)])
def test_a_flag(parse, value, legacy):
    assert parse("connect", "S:1", RATROD_LEGACY=value).legacy is legacy
    assert parse("connect", "--legacy", "S:1", RATROD_LEGACY=value).legacy


def test_values(parse):
    options = parse("serve", "S:1", RATROD_MAX_LINKS="10", RATROD_DRAIN="0", RATROD_HANDSHAKE_RATE="5", RATROD_REMOTE_REGEX="@a b",
                    RATROD_KEY_PATH="", RATROD_LOG_FORMAT="json", RATROD_METRICS="127.0.0.1:1", RATROD_WORKERS="2")
    assert (options.limits.links, options.drain, options.limits.handshake_burst, options.remote_regex, options.key_path, options.log_format,
            options.metrics, options.workers) == (10, 0.0, 10, "@a b", None, "json", "127.0.0.1:1", 2)
    assert parse("serve", "--max-links=3", "-r", "x", "S:1", RATROD_MAX_LINKS="nonsense", RATROD_REMOTE_REGEX="y").limits.links == 3


@pytest.mark.parametrize("name, value, said", [
    ("RATROD_MAX_LINKS", "many", "`--max-links` takes a whole number above 0, not `many`"),
    ("RATROD_MAX_LINKS", "0", "`--max-links` takes a whole number above 0, not `0`"),
    ("RATROD_DRAIN", "-1", "`--drain` takes seconds, a number from 0 on, not `-1`"),
    ("RATROD_HANDSHAKE_TIMEOUT", "1e3", "`--handshake-timeout` takes seconds"),
    ("RATROD_LEGACY", "maybe", "it is 1 or 0, true or false, yes or no, not `maybe`"),
    ("RATROD_LOG_FORMAT", "xml", "`--log-format` takes text or json, not `xml`"),
    ("RATROD_LEGACY", "\x1b[31m", "not `\ufffd[31m`"),
])
def test_a_wrong_value_names_its_variable(parse, name, value, said):
    error = parse("serve", "S:1", **{name: value})
    assert error.startswith("%s in the environment: " % name) and said in error
    # An explanation is never kept from anybody.
    assert parse("serve", "-h", **{name: value}) == parse("-h", "serve")
    assert parse("--version", **{name: value}).command == "version" and parse("help", **{name: value}).command == "help"


def test_a_wrong_value_in_the_real_program(run):
    assert first_line(run("serve", "S:1", RATROD_MAX_LINKS="x")).startswith("ratrod: RATROD_MAX_LINKS in the environment: `--max-links` takes ")
    assert run("serve", "-h", RATROD_MAX_LINKS="x").returncode == 0


def test_only_the_options_of_the_command_count(parse):
    words = "-k", "keys", "connect", "S:1"
    other = {"RATROD_MAX_LINKS": "many", "RATROD_ALLOW_LISTEN": "maybe", "RATROD_BOGUS": "1", "RATROD_": "1", "RATROD_SERVER": "x",
             "RATROD_MAX_RETRY_INTERVAL": "", "RATROD_HELP": "1", "RATROD_VERSION": "1", "RATROD_K": "x"}
    assert parse(*words, **other) == parse(*words)
