"""Where words come from besides the command line: files of arguments (@file), and RATROD_* in the environment."""

import os
import subprocess
import threading

import pytest
from conftest import PATIENCE, RATROD, READY, ask, tcp_port

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


# ---------------------------------------------------------------------------------------------------- @file


def test_a_tunnel_whose_words_stand_in_files(ratrod, serve, keys, tcp_echo, file, tmp_path):
    """Comments, quotes and line ends as a shell has them; a file in a file; the rest on the command line."""
    _, port = serve()
    spaced = tmp_path / "a folder"
    keys.client.path.rename(spaced)
    file("common", "\ufeff# who we are\n-k '%s' --udp-timeout=5   # and so on\r\n\r\n" % spaced)
    file("home.conf", "@common connect\n127.0.0.1:%d\n" % port)
    client = ratrod("@home.conf", "0:%d" % tcp_echo.port, cwd=tmp_path)
    client.wait_for(READY)
    ask(tcp_port(client))


def test_a_pipe_is_a_file(ratrod, serve, keys, tmp_path):
    """As `ratrod @<(generate)`: it has no size, and cannot be read twice."""
    _, port = serve()
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=("-k %s connect 127.0.0.1:%d" % (keys.client.path, port),), daemon=True).start()
    assert ratrod("@%s" % path).wait() == 0


def test_at_signs_that_are_meant(run, file):
    assert "the address to bind `@there`" in run("serve", "@@there").stderr
    # Everywhere, as argparse has it: also after --, and where an option's value stands.
    file("there", "'@@@x'")
    assert "the address to bind `@@x`" in run("serve", "--", "@there").stderr
    assert "the address to bind `x@there`" in run("serve", "x@there").stderr
    file("count", "none")
    assert "`--max-links` takes a whole number above 0, not `none`" in first_line(run("serve", "--max-links", "@count", "S:1"))


def test_nothing_but_comments_is_no_word(run, file):
    file("empty", "\n# nothing\n")
    assert first_line(run("@empty")) == first_line(run())


def test_help_is_found_in_a_file(run, file):
    file("words", "serve -h")
    assert run("@words").stdout == run("serve", "-h").stdout != ""


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
    (b"serve \xff:1:2", "cannot understand the address to bind"),
], ids=["quote", "escape", "first line", "NUL", "too long", "missing", "folder", "no name", "loop", "not UTF-8"])
def test_files_that_cannot_be_used(run, file, content, said):
    file("F", content)
    done = run("@F")
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr.splitlines()[0], done.stderr


def test_files_inside_each_other(run, file):
    file("0", "help")
    for n in range(1, 11):
        file(str(n), "@%d" % (n - 1))
    assert run("@9").stdout == run("help").stdout
    assert first_line(run("@10")) == "ratrod: `0` is the eleventh file of arguments inside each other"
    # A loop through another file, and the same file twice, which is none.
    file("a", "@b")
    file("b", "@a")
    assert first_line(run("@a")) == "ratrod: the arguments in `a` name that file again"
    file("twice", "-v")
    assert run("@twice", "@twice", "help").stdout == run("help").stdout or "does not belong" in run("@twice", "help").stderr


# ---------------------------------------------------------------------------------------------------- RATROD_*


def test_the_environment_gives_what_the_command_line_leaves_open(run, serve, keys, tmp_path):
    _, port = serve()
    server = "127.0.0.1:%d" % port
    assert run("connect", "--check", server, RATROD_KEY_PATH=keys.client.path).returncode == 0
    # The command line wins, in whichever form.
    for words in (["-k", str(keys.client.path)], ["--key-path=%s" % keys.client.path]):
        assert run(*words, "connect", "--check", server, RATROD_KEY_PATH=tmp_path / "nowhere").returncode == 0
    assert "nowhere" in run("connect", "--check", server, RATROD_KEY_PATH=tmp_path / "nowhere").stderr
    done = run("connect", server, RATROD_KEY_PATH=keys.client.path, RATROD_CHECK="Yes", RATROD_VERBOSE="1")
    assert done.returncode == 0 and "lets this client in" in done.stdout and "DEBUG" in done.stderr


@pytest.mark.parametrize("value, legacy", [("1", True), ("true", True), ("YES", True), ("0", False), ("false", False), ("No", False), ("", False)])
def test_a_flag(run, keys, serve, value, legacy):
    _, port = serve()
    done = run("-k", str(keys.client.path), "connect", "127.0.0.1:%d" % port, RATROD_LEGACY=value)
    assert ("in the clear" in done.stderr, done.returncode == 0) == (legacy, not legacy), done.stderr


@pytest.mark.parametrize("name, value, said", [
    ("RATROD_MAX_LINKS", "many", "`--max-links` takes a whole number above 0, not `many`"),
    ("RATROD_MAX_LINKS", "0", "`--max-links` takes a whole number above 0, not `0`"),
    ("RATROD_DRAIN", "-1", "`--drain` takes seconds, a number from 0 on, not `-1`"),
    ("RATROD_HANDSHAKE_TIMEOUT", "1e3", "`--handshake-timeout` takes seconds"),
    ("RATROD_LEGACY", "maybe", "it is 1 or 0, true or false, yes or no, not `maybe`"),
    ("RATROD_LOG_FORMAT", "xml", "`--log-format` takes text or json, not `xml`"),
    ("RATROD_LEGACY", "\x1b[31m", "not `\ufffd[31m`"),
])
def test_a_wrong_value_names_its_variable(run, name, value, said):
    assert first_line(run("serve", "S:1", **{name: value})).startswith("ratrod: %s in the environment: " % name)
    assert said in first_line(run("serve", "S:1", **{name: value}))
    # An explanation is never kept from anybody, nor the command that it does not concern.
    assert run("serve", "-h", **{name: value}).stdout == run("help", "serve", **{name: value}).stdout != ""
    assert run("--version", **{name: value}).returncode == 0


def test_only_the_options_of_the_command_count(run, keys, serve):
    _, port = serve()
    words = "-k", str(keys.client.path), "connect", "--check", "127.0.0.1:%d" % port
    other = {"RATROD_MAX_LINKS": "many", "RATROD_ALLOW_LISTEN": "maybe", "RATROD_BOGUS": "1", "RATROD_": "1", "RATROD_SERVER": "x",
             "RATROD_MAX_RETRY_INTERVAL": "", "RATROD_HELP": "1", "RATROD_VERSION": "1", "RATROD_K": "x"}
    assert run(*words, **other).returncode == 0
