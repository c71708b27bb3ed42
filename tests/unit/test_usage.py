"""What words mean: command lines under each of the three readers, files of arguments (@file), RATROD_* in the environment, help, ranges of ports.

The readers are compared on a sample of 2,000 command lines; RATROD_LONG=1 takes all of them (30 s).
"""

import importlib.util
import os
import random
import re
import sys
import threading
import warnings

import docopt
import pytest

import ratrod
from ratrod import Address, ConfigError, UsageError
from support.old_docopt import old_docopt
from support.rows import assert_each_raises, assert_raises, row

OPTIONS = {"command": None, "key_path": None, "verbose": False, "bind": "", "remote_regex": (".*",), "server": "", "tunnels": (),
           "accept_all_hosts": False, "encrypt": False, "legacy": False, "udp_timeout": 120, "handshake_timeout": 10, "topic": None}


def serving(bind="S:1", **others):
    return dict(OPTIONS, command="serve", bind=bind, **others)


def connecting(server="S:1", *tunnels, **others):
    return dict(OPTIONS, command="connect", server=server, tunnels=tunnels, **others)


# What lines of words mean, the same for docopt-ng, docopt 0.6.2 and the built-in fallback.
COMMAND_LINES = [
    (serving(), ["serve S:1", "serve -- S:1"]),
    (serving(key_path="keys"), [
        "-k keys serve S:1", "serve -k keys S:1", "serve S:1 -k keys", "serve S:1 -kkeys", "--key-path keys serve S:1", "--key-path=keys serve S:1",
        "serve S:1 --key-path=keys"]),
    (serving(verbose=True), ["-v serve S:1", "serve S:1 --verbose", "serve -v -- S:1", "-v -v serve S:1", "-vv serve S:1 -v"]),
    (serving(verbose=True, key_path="keys"), ["-vkkeys serve S:1", "-vk keys serve S:1"]),
    (serving(remote_regex=("x",)), ["-r x serve S:1", "serve -r x S:1", "serve --remote-regex=x S:1"]),
    (serving(legacy=True), ["serve --legacy S:1", "--legacy serve S:1"]), (connecting(), ["connect S:1", "connect S:1 --"]),
    (connecting("S:1", "80"), ["connect S:1 80", "connect -- S:1 80", "connect S:1 -- 80"]),
    (connecting("S:1", "80", "1:2", "0:h:3"), ["connect S:1 80 1:2 0:h:3"]),
    (connecting("S:1", "80", accept_all_hosts=True), ["connect -a S:1 80", "connect S:1 -a 80", "connect S:1 80 -a"]),
    (connecting("S:1", "80", "81", accept_all_hosts=True), ["connect S:1 80 --accept-all-hosts 81"]),
    (connecting(accept_all_hosts=True, encrypt=True), ["-a -e connect S:1", "connect -ae S:1"]),
    (connecting("S:1", "80", key_path="keys", verbose=True, accept_all_hosts=True, encrypt=True, legacy=True), [
        "-k keys -v connect -a -e --legacy S:1 80"]),
    *((serving(**meant), [line]) for line, meant in (
        ("--key-path=a=b serve S:1", {"key_path": "a=b"}), ("serve --remote-regex= S:1", {"remote_regex": ("",)}),
        ("serve -r -x S:1", {"remote_regex": ("-x",)}), ("serve --handshake-timeout 2.5 S:1", {"handshake_timeout": 2.5}),
        ("serve --udp-timeout=3 S:1", {"udp_timeout": 3}), ("serve -r a -r b S:1 -r c", {"remote_regex": ("a", "b", "c")}))),
    *((connecting(**meant), [line]) for line, meant in (
        ("connect -eav S:1", {"accept_all_hosts": True, "encrypt": True, "verbose": True}),
        ("connect -aek keys S:1", {"accept_all_hosts": True, "encrypt": True, "key_path": "keys"}),
        ("connect -a -a -e -e --legacy --legacy S:1", {"accept_all_hosts": True, "encrypt": True, "legacy": True}),
        ("connect --encrypt --legacy S:1", {"encrypt": True, "legacy": True}), ("connect S:1 --udp-timeout 5", {"udp_timeout": 5}),
        ("connect --udp-timeout=0.5 S:1 --handshake-timeout=10.0", {"udp_timeout": 0.5}),
        ("connect --udp-timeout 1 --udp-timeout 2 S:1", {"udp_timeout": 2}))),
    # "--" ends the options: what follows is taken as it stands. A word that is also a command's name is still just a word where a word belongs.
    *((serving(word), [line]) for line, word in (("serve -- -h", "-h"), ("serve -- -v", "-v"), ("serve connect", "connect"))),
    *((connecting(*words), ["connect " + " ".join(words)]) for words in (("serve", "help"), ("demo:1", "demo"))),
    (connecting("S:1", "-e", accept_all_hosts=True), ["connect -a S:1 -- -e"]),
    # Given twice: flags say it again, of values the last counts, as with ssh.
    (serving(key_path="b"), ["-k a -k b serve S:1", "-k a serve S:1 --key-path=b", "--key-path=a serve S:1 -k b"]),
    (dict(OPTIONS, command="keygen"), ["keygen"]), (dict(OPTIONS, command="keygen", key_path="keys"), ["keygen -k keys", "-k keys keygen"]),
    (dict(OPTIONS, command="demo"), ["demo"]),
    # Whoever asks for an explanation gets it, whatever else stands there. Which topics there are is not a matter of parsing.
    (dict(OPTIONS, command="help"), ["help", "-h", "--help"]),
    (dict(OPTIONS, command="help", topic="serve"), ["help serve", "serve -h", "-h serve", "-v serve -h", "serve 127.0.0.1:0 -h"]),
    *((dict(OPTIONS, command="help", topic=topic), [line]) for topic, line in (
        ("demo", "help demo"), ("connect", "connect --help"), ("bogus", "help bogus"))),
    (dict(OPTIONS, command="version"), ["-V", "--version"]),
]

# What the error names, one of these → wrong words.
USAGE_ERRORS = [
    ("command", [""]), ("bogus", ["bogus"]), ("--bogus", ["--bogus", "serve --bogus S:1"]), ("-x", ["-x serve S:1", "serve S:1 -vx"]),
    ("BIND", ["serve", "serve -v", "serve --"]), ("SERVER", ["connect", "-k keys connect -a"]), ("-k|--key-path", ["-k", "serve S:1 -k"]),
    ("-r|--remote-regex", ["serve S:1 -r", "serve S:1 --remote-regex"]), ("--verbose", ["serve --verbose=yes S:1"]),
    ("more", ["serve S:1 more", "keygen more", "demo more", "help serve more"]),
    # Another command's option is as wrong as an unknown one.
    ("-a|--accept-all-hosts", ["serve -a S:1"]), ("-e|--encrypt", ["serve -e S:1", "keygen -e"]), ("-r|--remote-regex", ["connect -r .* S:1"]),
    # A value that is no number, or one that would break a timer.
    *((option, ["%s %s=%s S:1" % (command, option, word) for word in words]) for command, option, words in (
        ("connect", "--udp-timeout", ["soon", "-1", "0", "", "nan"]), ("connect", "--handshake-timeout", ["inf"]),
        ("serve", "--handshake-timeout", ["0"]), ("connect", "--max-retry-count", ["-1", "1.5", "", "٣", "9999999999"]),
        ("connect", "--max-retry-interval", ["-1", "0", "x"]), ("serve", "--drain", ["-1", "x", "nan", "1e400", ""]))),
    ("soon|--udp-timeout", ["connect --udp-timeout soon S:1"]),
]

READERS = ("docopt-ng", "docopt 0.6.2", "fallback")


def prepare_once(patch, kind):
    """docopt prepares the same usage text anew for each line, which is nearly all of its time."""
    prepare, prepared = kind.fix, {}
    def fix(self):
        text = repr(self)
        if text not in prepared:
            prepared[text] = prepare(self).children
        self.children = prepared[text]
        return self
    patch.setattr(kind, "fix", fix)


@pytest.fixture(scope="module")
def readers():
    """The module `docopt` of each reader, by its name; None where ratrod reads by itself."""
    spec = importlib.util.spec_from_file_location("docopt", str(old_docopt() / "docopt.py"))
    old = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has escapes in its source that the newest Pythons complain about
        spec.loader.exec_module(old)
    assert old.__version__ == "0.6.2" and docopt.__version__ != "0.6.2"
    with pytest.MonkeyPatch.context() as patch:
        for module in (docopt, old):
            prepare_once(patch, module.Required)
        yield dict(zip(READERS, (docopt, old, None)))


def read(words):
    """What parse_command_line() makes of these words: the OPTIONS, or the error as a text."""
    try:
        options = ratrod.parse_command_line(words)
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)
    return {name: getattr(options, name) if hasattr(options, name) else getattr(options.limits, name) for name in OPTIONS}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_understands_the_same(name, readers, monkeypatch):
    monkeypatch.setitem(sys.modules, "docopt", readers[name])
    for expected, lines in COMMAND_LINES:
        assert [(line, read(line.split())) for line in lines] == [(line, expected) for line in lines]
    for named, lines in USAGE_ERRORS:
        for line in lines:
            error = read(line.split())
            assert isinstance(error, str) and re.search(r"(?<![\w-])(?:%s)(?!\w)" % named, error), (line, error)
    # Where ours finds nothing wrong, docopt's judgement counts: its usage text has no "--" there.
    assert read(["keygen", "--"]) == ("these words do not go together" if readers[name] else dict(OPTIONS, command="keygen"))


def test_the_readers_agree_on_lines_that_nobody_would_have_thought_of(readers, monkeypatch):
    """Ours is measured by docopt's own judgement."""
    words = ("serve connect help keygen demo -k --key-path --key-path=p -kp -k=p -v -vv -vk -h --help -V --version -r --remote-regex=x -a -e -ae -ea "
             "--legacy --udp-timeout --udp-timeout=7 --handshake-timeout=x -- - -x --bogus --bogus=1 -v=1 --verbose --verb --key S:1 80 2 "
             "--hel --versi --help=1 --version=x -hv -hk").split()
    dice = random.Random(20250312)
    lines = [[dice.choice(words) for _ in range(dice.randrange(6))] for _ in range(1000)]
    # Lines that begin well: of the blind ones nearly all are wrong.
    lines += [[dice.choice(("serve", "connect", "connect", "help"))] + [dice.choice(words) for _ in range(dice.randrange(5))] for _ in range(1000)]
    if not os.environ.get("RATROD_LONG"):
        lines = dice.sample(lines, 50)
    def judge(name, line):
        monkeypatch.setitem(sys.modules, "docopt", readers[name])
        outcome = read(line)
        return "error" if isinstance(outcome, str) else outcome
    understood = 0
    for line in lines:
        ng, old, ours = (judge(name, line) for name in READERS)
        assert ng == old, line
        # docopt knows "--" only where the usage text has it, there also twice. The fallback takes the first one, anywhere: that does no harm.
        if not (line.count("--") > 1 or "--" in line and (ng == "error" or ng["command"] not in ("serve", "connect"))):
            assert ours == ng, line
        understood += ng != "error"
    assert understood > len(lines) // 20, "these lines test next to nothing"


def test_help_explains_one_command_or_all():
    for topic, promised in (
        (None, "serve connect keygen demo help --key-path --verbose --version"), ("serve", "BIND -r --remote-regex --handshake-timeout"),
        ("connect", "SERVER TUNNEL -a --accept-all-hosts -e --encrypt --legacy --udp-timeout"),
        ("keygen", "keygen --key-path"), ("demo", "demo --verbose"), ("help", "help COMMAND"),
    ):
        text = ratrod.help_text(topic)
        for word in promised.split():
            assert re.search(r"(?<![\w-])%s(?![\w-])" % re.escape(word), text), (topic, word)
        assert "Usage:" in text and max(map(len, text.splitlines())) <= 120, topic
    assert "--remote-regex" not in ratrod.help_text("connect") and "TUNNEL" not in ratrod.help_text("serve")
    assert_raises(UsageError, "bogus", ratrod.help_text, "bogus")
    # An error comes with the usage of its command.
    assert ratrod.usage_hint(["-v", "serve"]).startswith("Usage:\n  ratrod [-k KEY_PATH]") and "BIND" in ratrod.usage_hint(["-v", "serve"])
    assert "SERVER" in ratrod.usage_hint(["connect"]) and "BIND" not in ratrod.usage_hint(["connect"])
    for words in ([], ["bogus"]):
        assert all("\n  %s " % command in ratrod.usage_hint(words) for command in ratrod.COMMANDS)


def test_what_cannot_be_meant_is_named():
    for parse, texts in (
            (lambda text: ratrod.parse_endpoint(text, "address to bind", lowest=0), [
                "", "x", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:-1", "127.0.0.1:+1", "127.0.0.1:x", "[::1:5", "[::1]", "-h", ":1",
                "a:1:2", "::1", "a:\uff11"]),
            (ratrod.parse_servers, ["", "x", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", ":9", "[::1:9", "a:1;a:2", "a\nb:1"])):
        for text in texts:
            with row(text), pytest.raises(ConfigError) as raised:
                parse(text)
            said, named = str(raised.value), "`%s`" % ratrod.printable(text)
            assert named in said and ":" in said.replace(named, "") and said.isprintable(), (text, said)
    assert_each_raises(ConfigError, "the server", ratrod.parse_servers, [
        "a:1,", ",a:1", "a:1,,a:2", ",", "ssh://a,", "a:1,x", "a:1,x:0", "a:1,:2", "a,a:2"])


def test_a_range_is_a_tunnel_for_each_port():
    for text, local, remote, kind in (
            ("8000-8002:db:9000-9002", "127.0.0.1:%d", "db:%d", ratrod.FORWARD),
            ("8000-8002:9000-9002", "127.0.0.1:%d", "127.0.0.1:%d", ratrod.FORWARD),
            ("127.0.0.2:8000-8002:db:9000-9002", "127.0.0.2:%d", "db:%d", ratrod.FORWARD),
            ("[::1]:8000-8002:[2001:db8::1]:9000-9002", "[::1]:%d", "[2001:db8::1]:%d", ratrod.FORWARD),
            ("R:8000-8002:db:9000-9002", ":%d", "db:%d", ratrod.REVERSE)):
        assert [(str(spec.local), str(spec.remote), spec.kind) for spec in ratrod.parse_tunnels(text)] == [
            (local % (8000 + n), remote % (9000 + n), kind) for n in range(3)]
    # The shortest form has the same ports at both ends.
    assert [spec[:3] for spec in ratrod.parse_tunnels("8000-8002")] == [
        (Address("127.0.0.1", port), Address("127.0.0.1", port), ratrod.FORWARD) for port in (8000, 8001, 8002)]
    assert {spec.protocols for spec in ratrod.parse_tunnels("udp:8000-8002:db:9000-9002")} == {("UDP",)}
    # A range of one, the highest port, and as many as there may be.
    assert ratrod.parse_tunnels("80-80:db:81-81") == ratrod.parse_tunnels("80:db:81")
    assert [spec.remote.port for spec in ratrod.parse_tunnels("1-2:db:65534-65535")] == [65534, 65535]
    assert len(ratrod.parse_tunnels("1000-1999")) == 1000


@pytest.fixture
def file(tmp_path):
    """file(name, text or bytes) -> its path"""
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(words..., NAME=value...) -> ratrod.Options, or why not; files of arguments are in tmp_path."""
    monkeypatch.chdir(tmp_path)
    def launch(*words, **environment):
        try:
            return ratrod.parse_command_line(list(ratrod.expand_arguments(words)), environment)
        except UsageError as error:
            return str(error)
    return launch


def test_at_signs_that_are_meant(parse, file):
    assert parse("serve", "@@there").bind == "@there"
    # Everywhere, as argparse has it: also after --, and where an option's value stands.
    file("there", "'@@@x'")
    assert parse("serve", "--", "@there").bind == "@@x"
    assert parse("serve", "x@there").bind == "x@there"
    file("count", "3")
    assert parse("serve", "--max-links", "@count", "S:1").limits.links == 3
    # With "=" it is one word, and does not begin with it.
    assert parse("serve", "--remote-regex=@count", "S:1").remote_regex == ("@count",)


def test_what_a_file_may_hold(parse, file, monkeypatch):
    for content, tunnels in (("\n# nothing\n", ()), ("", ()), ("a b\tc\r\nd", tuple("abcd")), ("'a b' \"c d\" e\\ f", ("a b", "c d", "e f")),
                             ("a#b c #'d", ("a#b", "c")), ("'a#b' 'two\nlines' ''", ("a#b", "two\nlines", "")), ("\ufeffa ü 📻", ("a", "ü", "📻"))):
        file("words", content)
        assert parse("connect", "S:1", "@words").tunnels == tunnels, content
    with monkeypatch.context() as patch:  # of a path of Windows a backslash is a part, as its shells have it
        patch.setattr(os, "sep", "\\")
        file("words", "-k C:\\keys\\home serve \"C:\\my keys\\\"")
        assert (parse("@words").key_path, parse("@words").bind) == ("C:\\keys\\home", "C:\\my keys\\")
    file("bytes", b"a\xff")
    assert parse("connect", "S:1", "@bytes").tunnels == ("a\udcff",)  # as the system gives such words of a command line
    file("words", "serve -h")
    assert (parse("@words").command, parse("@words").topic) == ("help", "serve")


def test_a_pipe_is_a_file(parse, tmp_path):
    """As `ratrod @<(generate)`: it has no size, and cannot be read twice."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=("-k keys connect S:1",), daemon=True).start()
    assert parse("@pipe") == parse("-k", "keys", "connect", "S:1")


@pytest.mark.parametrize("content, said", [
    (b"a\n# it's fine\n\nb 'c\nd\n", "line 4 of the arguments in `F`: no closing quotation"),
    (b"a b\n\\", "line 2 of the arguments in `F`: no escaped character"), (b'"', "line 1 of the arguments in `F`: no closing quotation"),
    (b"a\nb\0c", "line 2 of the arguments in `F`: a NUL character"),
    (b"x" * (1 << 20) + b"x", "line 1 of the arguments in `F`: more than a file of arguments may be"),
    (b"serve @nowhere", "cannot read the arguments in `nowhere`: No such file or directory"),
    (b"serve @.", "cannot read the arguments in `.`: Is a directory"), (b"serve @", "cannot read the arguments in ``: No such file or directory"),
    (b"serve @./F", "`./F` is the eleventh file of arguments inside each other: does one of them name itself?"),
], ids=["quote", "escape", "first line", "NUL", "too long", "missing", "folder", "no name", "loop"])
def test_files_that_cannot_be_used(parse, file, content, said):
    file("F", content)
    assert parse("@F") == said


def test_files_inside_each_other(parse, file):
    file("0", "help")
    for n in range(1, 11):
        file(str(n), "@%d" % (n - 1))
    assert parse("@9") == parse("help")
    assert parse("@10") == "`0` is the eleventh file of arguments inside each other: does one of them name itself?"
    # The same file twice is no loop.
    file("twice", "-k keys")
    assert parse("@twice", "@twice", "connect", "x") == parse("-k", "keys", "connect", "x")


def test_usual_options_that_mean_nothing_here_are_no_error(parse):
    given = {"RATROD_KEY_PATH": "k", "RATROD_ACCEPT_NEW": "1", "RATROD_ACCEPT_ALL_HOSTS": "1", "RATROD_SSH_COMMAND": "ssh -v",
             "RATROD_REMOTE_PYTHON": "/opt/python", "RATROD_PROXY": "http://p"}
    through, straight = (parse("connect", server, **given) for server in ("ssh://far", "near:1"))
    assert (through.key_path, through.accept_new, through.accept_all_hosts, through.ssh_command, through.proxy) == (
        None, False, False, "ssh -v", "http://p")
    assert (straight.key_path, straight.accept_new, straight.accept_all_hosts, straight.ssh_command) == ("k", True, True, None)
    assert (through.remote_python, straight.remote_python) == ("/opt/python", None)
    for server in ("ssh://far", "near:1"):
        typed = parse("-k", "typed", "connect", "--ssh-command", "typed", server, **given)
        assert (typed.key_path, typed.ssh_command) == ("typed", "typed")


def test_a_flag(parse):
    for value, legacy in (("1", True), ("true", True), ("YES", True), ("0", False), ("false", False), ("No", False), ("", False)):
        assert parse("connect", "S:1", RATROD_LEGACY=value).legacy is legacy, value
        assert parse("connect", "--legacy", "S:1", RATROD_LEGACY=value).legacy, value


def test_values(parse):
    options = parse("serve", "S:1", RATROD_MAX_LINKS="10", RATROD_DRAIN="0", RATROD_HANDSHAKE_RATE="5", RATROD_REMOTE_REGEX="@a b",
                    RATROD_KEY_PATH="", RATROD_LOG_FORMAT="json", RATROD_METRICS="127.0.0.1:1", RATROD_WORKERS="2")
    assert (options.limits.links, options.drain, options.limits.handshake_rate, options.remote_regex, options.key_path, options.log_format,
            options.metrics, options.workers) == (10, 0.0, 5.0, ("@a b",), None, "json", "127.0.0.1:1", 2)
    # The command line wins, in whichever form.
    for words in (["--max-links=3", "-r", "x"], ["--max-links", "3", "--remote-regex=x"]):
        options = parse("serve", *words, "S:1", RATROD_MAX_LINKS="nonsense", RATROD_REMOTE_REGEX="y")
        assert (options.limits.links, options.remote_regex) == (3, ("x",))


@pytest.mark.parametrize("name, value, said", [
    ("RATROD_MAX_LINKS", "many", "`--max-links` takes a whole number above 0, not `many`"),
    ("RATROD_MAX_LINKS", "0", "`--max-links` takes a whole number above 0, not `0`"),
    ("RATROD_DRAIN", "-1", "`--drain` takes seconds, a number from 0 on, not `-1`"),
    ("RATROD_HANDSHAKE_TIMEOUT", "1e3", "`--handshake-timeout` takes seconds"),
    ("RATROD_LEGACY", "maybe", "it is 1 or 0, true or false, yes or no, not `maybe`"),
    ("RATROD_LOG_FORMAT", "xml", "`--log-format` takes text or json, not `xml`"), ("RATROD_LEGACY", "\x1b[31m", "not `\ufffd[31m`"),
])
def test_a_wrong_value_names_its_variable(parse, name, value, said):
    error = parse("serve", "S:1", **{name: value})
    assert error.startswith("%s in the environment: " % name) and said in error
    # An explanation is never kept from anybody.
    assert parse("serve", "-h", **{name: value}) == parse("-h", "serve")
    assert parse("--version", **{name: value}).command == "version" and parse("help", **{name: value}).command == "help"


def test_only_the_options_of_the_command_count(parse):
    words = "-k", "keys", "connect", "S:1"
    other = {"RATROD_MAX_LINKS": "many", "RATROD_ALLOW_LISTEN": "maybe", "RATROD_BOGUS": "1", "RATROD_": "1", "RATROD_SERVER": "x",
             "RATROD_MAX_RETRY_INTERVAL": "", "RATROD_HELP": "1", "RATROD_VERSION": "1", "RATROD_K": "x"}
    assert parse(*words, **other) == parse(*words)
