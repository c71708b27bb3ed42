"""Section 3 of ratrod.py: what the lines of authorized_keys let a key do, by their text alone.

What a server makes of them, and of files that change, is in system/test_permissions.py.
"""

import datetime
import hashlib
import time

import pytest

import ratrod
from support.keys import base64url

TODAY = datetime.datetime.now(datetime.timezone.utc).date()


def day(n):
    return (TODAY + datetime.timedelta(days=n)).isoformat()


def grants_of(*options):
    """What several lines of one key grant, in the order of the lines."""
    return tuple(ratrod.parse_grant(option.split()) for option in options)


def opens(text, grants, regex=".*"):
    try:
        return bool(ratrod.Policy(regex).check(text, grants))
    except ratrod.PolicyError:
        return False


# Two targets on 127.0.0.1; the first by UDP as well.
P, Q, UDP = "127.0.0.1:1001", "127.0.0.1:2002", "udp 127.0.0.1:1001"
ALL = {P, Q, UDP}


def may(grants):
    """Which of the three targets the grants open together: each line's own limits apply to what that line opens."""
    found = {target for target in (P, Q) if opens(target, grants)}
    return found | ({UDP} if opens(P, tuple(grant for grant in grants if not grant.no_udp)) else set())


GOOD = {
    **dict.fromkeys(("KEY", "KEY alice@laptop", " \tKEY \t alice  and more  words ", "KEY # no comment", "KEY 'alice'", "KEY no-legacy",
                     "KEY \u00e9l\u00e8ve@\u6771\u4eac"), ALL),
    "KEY no-udp\r": {P, Q},
    # Words that only look like options from afar are a comment's.
    **dict.fromkeys(("KEY nobody permissive expensive laptop-no-udp",
                     "KEY legacy udp box of no one@example.com no-reply@example.com from home"), ALL),
    'KEY permitopen="127.0.0.1:1001"': {P, UDP}, 'KEY permitopen="127.0.0.1:2002" alice@laptop': {Q}, 'KEY permitopen="127.0.0.1:*"': ALL,
    'KEY permitopen="*:1001"': {P, UDP}, 'KEY permitopen="*:*"': ALL, 'KEY permitopen="[::ffff:127.0.0.1]:1001"': {P, UDP},
    **dict.fromkeys(('KEY permitopen="[::1]:1001"', 'KEY permitopen="[::1]:*" permitopen="127.0.0.2:*"', 'KEY permitopen="localhost:1001"',
                     'KEY permitopen="*.example.com:*"', 'KEY permitopen="unix:/run/some.sock"'), set()),
    'KEY permitopen="DB.example.com:1" permitopen="127.0.0.1:1001" bob': {P, UDP}, 'KEY permitopen="127.0.0.1:2002" permitopen="127.0.0.1:1001"': ALL,
    'KEY permitopen="127.0.0.1:1001" no-udp': {P}, 'KEY no-udp permitopen="127.0.0.1:2002"': {Q}, "KEY no-udp": {P, Q},
    "KEY no-udp no-legacy alice@laptop": {P, Q},
    # What is meant counts: a word that narrows must not be lost.
    **dict.fromkeys(("KEY NO-UDP", "KEY no_udp", "KEY noudp", "KEY No-Udp alice", "\ufeffKEY no-udp", "KEY no-udp legacy box"), {P, Q}),
    **dict.fromkeys(('KEY PERMITOPEN="127.0.0.1:1001"', 'KEY permit-open="127.0.0.1:1001"', 'KEY Permit_Open="127.0.0.1:1001" bob'), {P, UDP}),
    'KEY permitlisten="8080"': ALL, 'KEY permitlisten="127.0.0.1:*" permitlisten="localhost:80" permitlisten="*:9000" permitlisten="[::1]:80"': ALL,
    'KEY expires="%s"' % day(2): ALL, 'KEY expires="2999-12-31" no-legacy permitopen="127.0.0.1:1001" no-udp permitlisten="1" alice@laptop': {P},
}
# An expired line is no mistake.
EXPIRED = ['KEY expires="%s"' % day(0), 'KEY expires="%s" alice' % day(-1), 'KEY no-udp expires="1970-01-01"', 'KEY expires="0001-01-01"',
           'KEY expires="2999-12-31" expires="2000-01-01"']
# No entries at all.
NOTHING = ["", "   ", "# KEY", "#KEY", "\t # KEY no-udp", "#"]
BAD_TARGETS = [
    "", "127.0.0.1", ":", ":80", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:080", "127.0.0.1:+80", "127.0.0.1:80:",
    "::1:80", "127.0.0.1:\uff18\uff10", "127.0.0.1:http", "127.0.0.1:1-2", "127.0.0.1:80*", "127.1:80", "0x7f000001:80", "2130706433:80",
    "[::1]", "[127.0.0.1]:80", "[::1%lo]:80", "[::1:80", "a..b:80", "*.:80", "**:80", "*example.com:80", "db*:80", "a.*.com:80", "*.*.com:80",
    "*.*:80",
    # A part of an address is no domain: `*.0.0.1` must not become a rule for 127.0.0.1.
    "*.0.0.1:80", "*.1:80", "127.0.0.*:80", "127.*:80", "127.0.0.0/8:80",
    "a/b:80", "a,b:80", "tcp://db:80", "unix:", "unix:relative", "unix:/a/../b", "unix:/a//b", "unix:/a/", "unix:/a/.", "unix:/a:b",
    "unix:/*:*", "unix:/" + "a" * 200, "unix:\0abstract", "unix:/a\0b", "unix:/a\x07b",
]
BAD_OPTIONS = [
    *['permitopen="%s"' % text for text in BAD_TARGETS],
    # Half of an option, or one that another program has.
    "permitopen", "permitopen=", 'permitopen="127.0.0.1:80', 'permitopen=127.0.0.1:80"', 'permitopen="127.0.0.1:80"x', "permitopen='127.0.0.1:80'",
    'permitopen ="127.0.0.1:80"', 'permitopen= "127.0.0.1:80"', 'permitopen="127.0.0.1:80"permitopen="db:1"', 'permitopen="127.0.0.1:80","db:1"',
    'permitopen="127.0.0.1:80 db:1"', 'permitopen="127.0.0.1:80",no-udp', "permitopen=\u201c127.0.0.1:80\u201d", 'permitopen=""127.0.0.1:80""',
    "permit", "permitopen:127.0.0.1:80", "permit-open", "permitremoteopen", 'permitopens="127.0.0.1:80"', "permitlisten", 'permitlisten=""',
    'permitlisten="0x50"', 'permitlisten="65536"', 'permitlisten="127.0.0.1"', 'permitlisten="127.0.0.1:"', 'permitlisten="127.1:80"',
    'permitlisten="80', 'permitlisten="8000-8010"', "no-", "no-tcp", "no-pty", "no-udp,no-legacy", "no-udp=1", 'no-udp="yes"', "no-udp;", "no-udpx",
    "no-port-forwarding", "expires", "expire", "expires=", 'expires=""', 'expires="tomorrow"', 'expires="2999-02-30"', 'expires="2999-13-01"',
    'expires="2999-1-31"', 'expires="29990131"', 'expires="2999-01-31T00:00"', 'expires="2999-01-31', 'expires=2999-01-31"', 'expires=" 2999-01-31"',
    'expires="2999-01-31 "', 'expires="31.01.2999"', 'expires="2999-W01-1"', 'expires="0000-01-01"', 'expires="-999-01-01"',
    'expires="\u0662\u0669\u0669\u0669-01-31"', 'expire="2999-01-31"', 'expires-at="2999-01-31"', 'expiry-time="29990131"', 'from="127.0.0.1"',
    'command="x"', "restrict=", "a=b", "=", "=x", "restrict,permitopen=x",
    # Behind the comment: whoever wrote it there believes in it.
    "alice@laptop no-udp", 'alice@laptop permitopen="127.0.0.1:80"', 'alice expires="2999-01-31"', "alice a=b", "no-udp alice no-legacy",
    "NO-PTY", "restrict", "RESTRICT", "Restricted", "pty", "user_rc", "port-forwarding", "X11-forwarding", "agent-forwarding", "cert-authority",
    "verify-required", "no-touch-required", "restrict,pty", "noudp,nolegacy", "alice restrict", "alice no_udp", "bob NO_LEGACY,", "alice (no-udp)",
    "noupd", "nudp", "on-udp", "no\u2011udp", "nolegcy", "no.udp", "permtopen", "permitopne", "expirs", "exprise", "'no-udp'", "[no-udp]",
    "alice no-shell", "alice permit-open=\"127.0.0.1:80\"", "alice expire=\"2000-01-01\"", "# no-udp",
]
BAD_LINES = [
    *["KEY " + option for option in BAD_OPTIONS],
    # One bad option spoils what stands beside it.
    'KEY permitopen="127.0.0.1:80" permitopen="127.0.0.1"', "KEY no-udp no-tcp", 'KEY no-shell expires="2999-01-31"', "no-udp KEY",
    'permitopen="127.0.0.1:80" KEY', "ssh-ed25519 KEY", "KEY= alice", "KEY, alice", '"KEY"', "KEYA", "alice", "KEY\0", "=KEY",
]


def test_every_line_by_itself(tmp_path):
    """Each with a key of its own, all in one file: what each key may do, and which lines are complained of."""
    rows = [*NOTHING, *EXPIRED, *BAD_LINES, *GOOD]
    keys = [hashlib.sha256(b"a key for the tests, %d" % n).digest() for n in range(len(rows))]
    text = "".join(line.replace("KEY", base64url(key)) + "\n" for line, key in zip(["# the first line", *rows], [b"", *keys]))
    (tmp_path / "authorized_keys").write_bytes(text.encode("utf-8"))
    lines = ratrod.KeyLines(str(tmp_path / "authorized_keys"), ratrod.parse_grant)
    found = {line: tuple(grant for _, grant in lines.read().get(key, ())) for line, key in zip(rows, keys)}
    assert {line: may(grants) for line, grants in found.items() if line in GOOD} == GOOD
    assert all(grant.expires > time.time() for line in GOOD for grant in found[line])
    assert all(found[line] and found[line][0].expires <= time.time() for line in EXPIRED)
    assert [line for line in [*NOTHING, *BAD_LINES] if found[line]] == []
    numbers = [int(problem.split()[1]) for problem in lines.problems]
    assert numbers == [n for n, line in enumerate(rows, 2) if line in BAD_LINES]
    complaints = dict(zip(numbers, lines.problems))
    for n, complaint in complaints.items():
        assert complaint.startswith("line %d of `%s` authorizes nobody: " % (n, lines.path)), complaint
        assert complaint.isprintable()


@pytest.mark.parametrize("options, allowed", [
    # What any line of a key allows is allowed, a line's own limits apply to what that line allows.
    (['permitopen="127.0.0.1:1001"', 'permitopen="127.0.0.1:2002"'], ALL), (['permitopen="127.0.0.1:1001"', ""], ALL),
    (['permitopen="127.0.0.1:1001"', "no-udp"], ALL), (['permitopen="127.0.0.1:2002"', "no-udp"], {P, Q}),
    (['permitopen="127.0.0.1:1001" no-udp', 'permitopen="127.0.0.1:2002"'], {P, Q}), (["no-udp", "no-udp"], {P, Q}),
])
def test_several_lines_of_one_key(options, allowed):
    assert may(grants_of(*options)) == allowed


@pytest.mark.parametrize("text, comment", [
    ("alice@laptop", "alice@laptop"), ("no-udp  bob's   other machine", "bob's other machine"), ("no-udp", ""), ("", ""),
    ('permitopen="*:*" \u6771\u4eac', "\u6771\u4eac"), ("eve\x1b[2J\x07", "eve\ufffd[2J\ufffd"), ("a" * 100, "a" * 60 + "..."),
])
def test_the_comment_is_what_is_no_option(text, comment):
    assert grants_of(text)[0].comment == comment


def test_patterns_of_permitopen():
    grants = grants_of('permitopen="*.example.com:1001" permitopen="other.net:*" no-legacy alice@laptop', 'permitopen="*:2002"')
    allowed = ["db.example.com:1001", "a.db.example.com:1001", "DB.EXAMPLE.COM:1001", "db.example.com.:1001", "other.net:1001", "Other.Net.:1001",
               # Every port of a host.
               "other.net:1",
               # Every host, by name or by address, at the port of the second line.
               *("%s:2002" % host for host in ("db.example.com", "example.com", "db", "any.org", "192.0.2.7", "127.0.0.1", "localhost", "[::1]"))]
    refused = ["%s:1001" % host for host in (
        "example.com", ".example.com", "badexample.com", "db.example.com.evil.net", "db", "any.org", "*.example.com", "x@db.example.com",
        "db.example.com%00", "db.example.com\0", "any.org/.example.com", "*", "192.0.2.7", "127.0.0.1", "localhost", "[::1]")]
    refused.append("db.example.com:1")
    assert [text for text in allowed + refused if opens(text, grants)] == allowed


@pytest.mark.parametrize("regex, options, expected", [
    (".*", 'permitopen="127.0.0.1:1001"', {P, UDP}), (r"127\.0\.0\.1:1001", "", {P, UDP}), (r"127\.0\.0\.1", 'permitopen="127.0.0.1:1001"', {P, UDP}),
    (r".*:2002", 'permitopen="127.0.0.1:1001"', set()), (r"127\.0\.0\.1:1001", 'permitopen="*:*"', {P, UDP}),
    (r"localhost", 'permitopen="127.0.0.1:*"', set()), (r".*:(1001|2002)", 'permitopen="127.0.0.1:1001" permitopen="127.0.0.1:2002"', ALL),
])
def test_the_regex_and_permitopen_must_both_allow(regex, options, expected):
    grants = grants_of(options)
    assert {target for target in ALL if opens(target[-14:], grants, regex)} == expected


INSIDE, INSIDE6, LINK_LOCAL, BOTH, OUTSIDE = ("%s.example.com" % name for name in ("inside", "inside6", "linklocal", "both", "outside"))
LOOPBACK, ELSEWHERE = ("127.0.0.1",), ("192.0.2.7",)


@pytest.mark.parametrize("options, regex, outcomes", [
    ("", ".*", {INSIDE: LOOPBACK, "localhost": LOOPBACK}),
    # Whoever rules over a name could point it at the server's own loopback: a rule for a name does not reach so far.
    ('permitopen="*.example.com:*"', ".*", {INSIDE: None, INSIDE6: None, LINK_LOCAL: None, OUTSIDE: ELSEWHERE, "localhost": None}),
    ('permitopen="inside.example.com:80"', ".*", {INSIDE: None, OUTSIDE: None}),
    ('permitopen="inside.example.com:80" permitopen="127.0.0.1:1"', ".*", {INSIDE: None, "127.0.0.1": None}),
    ('permitopen="inside.example.com:80" permitopen="127.0.0.1:80"', ".*", {INSIDE: LOOPBACK, "127.0.0.1": LOOPBACK}),
    ('permitopen="inside.example.com:80" permitopen="127.0.0.1:*"', ".*", {INSIDE: LOOPBACK}),
    ('permitopen="inside.example.com:80" permitopen="localhost:80"', ".*", {INSIDE: None, "localhost": LOOPBACK}),
    ('permitopen="*:80"', ".*", {INSIDE: LOOPBACK, OUTSIDE: ELSEWHERE, "127.0.0.1": LOOPBACK}),
    # Of the addresses of a name only those that are allowed are tried.
    ('permitopen="*.example.com:80"', ".*", {BOTH: ELSEWHERE}),
    # Both rules must allow the address, too.
    ('permitopen="inside.example.com:80" permitopen="127.0.0.1:80"', r"inside\.example\.com", {INSIDE: None, "127.0.0.1": None}),
    ('permitopen="inside.example.com:80"', r"inside\.example\.com|127\..*", {INSIDE: None}),
    ('permitopen="inside.example.com:80" permitopen="127.0.0.1:80"', r"inside\.example\.com|127\..*", {INSIDE: LOOPBACK}),
    ('permitopen="inside.example.com:80"', ".+", {INSIDE: None}),
])
def test_a_name_that_resolves_to_loopback(options, regex, outcomes):
    resolves = {**dict.fromkeys((INSIDE, "localhost", "127.0.0.1"), LOOPBACK), INSIDE6: ("::1",), LINK_LOCAL: ("169.254.7.7",),
                BOTH: LOOPBACK + ELSEWHERE, OUTSIDE: ELSEWHERE}
    policy, grants = ratrod.Policy(regex), grants_of(options)
    def reached(host):
        try:
            return policy.check_addresses(policy.check(host + ":80", grants), resolves[host], grants)
        except ratrod.PolicyError:
            return None
    # Twice: what is remembered of one question must not answer another.
    for _ in range(2):
        assert {host: reached(host) for host in outcomes} == outcomes


PATH = "/run/echo.sock"
ONE_PATH = 'permitopen="unix:%s"' % PATH
# (whether the path is open, whether P is): (options, regex).
UNIX_RULES = {
    # Who lets clients reach every host has not thought of its Docker socket. The patterns that do not begin with unix: never match a path.
    (False, True): [("", ".*"), ("", ".*|x"), ("", ".*|unix:.*"), ("", [".*", "unix:/other"]), ('permitopen="*:*"', ".*")],
    (False, False): [
        ("", "(unix|tcp).*"), ("", ".{5}/.*"), ("", PATH), ("", "(?:unix:.*)"), ("", "unix:/run"), ("", "nix:%s|unix:" % PATH),
        ('permitopen="unix:%s.other"' % PATH, ".*"), ('permitopen="unix:/run"', ".*"),
        # With both given, both must allow.
        (ONE_PATH, r"127\.0\.0\.1"), (ONE_PATH, "unix:/other"), ('permitopen="unix:/other"', "unix:" + PATH), ('permitopen="*:*"', "unix:" + PATH)],
    (True, True): [("", [".*", "unix:" + PATH])],
    # A pattern that begins with unix: is for paths alone.
    (True, False): [
        ("", "unix:" + PATH), ("", "unix:.*"), ("", ["unix:/other", "unix:" + PATH.upper(), "unix:" + PATH, "db"]), ("", "unix:.*|127.*"),
        ("no-udp", "unix:" + PATH), (ONE_PATH, ".*"), ('permitopen="127.0.0.1:1" %s no-udp' % ONE_PATH, ".*"), (ONE_PATH, "unix:" + PATH)],
}


@pytest.mark.parametrize("expected", UNIX_RULES, ids=str)
def test_unix_sockets_are_closed_unless_they_are_named(expected):
    for options, regex in UNIX_RULES[expected]:
        grants = grants_of(options)
        assert (opens("unix:" + PATH, grants, regex), opens(P, grants, regex)) == expected, (options, regex)


def test_odd_spellings_of_unix_sockets():
    """All of them would reach a socket, if they came as far as connect(). A path has one spelling, or a rule for it means nothing."""
    paths = [
        "/run/a/../echo.sock", "/run//echo.sock", "//run/echo.sock", "/" + PATH, "/run/./echo.sock", "/./run/echo.sock", "/../run/echo.sock",
        PATH + "/", PATH + "/.", "/run/link:", "run/echo.sock", "echo.sock", "./echo.sock", "../run/echo.sock", "~/echo.sock", "", "/.", ".", "..",
        "/..", "/", "///", "//", "\0" + PATH, "@abstract", PATH + "\0", PATH + "\0x", "/\0", PATH + "\n", "\n" + PATH, PATH + "\t", PATH + "\x7f",
        PATH + "\x1b[2J", PATH + ":80", ":" + PATH, "/run/a/..", "/run/...//echo.sock",
        # 100 bytes are the most, whatever the alphabet.
        "/" + "a" * 100, "/" + "\u00e9" * 50, "/" + "a" * 1000,
    ]
    targets = ["unix:" + odd for odd in paths] + [
        "UNIX:" + PATH, "Unix:" + PATH, " unix:" + PATH, "unix: " + PATH, "unix :" + PATH, PATH, "[unix]:" + PATH, "unix:[%s]" % PATH,
        "unix://" + PATH, "unix:localhost" + PATH, "\ufb01:" + PATH, "unix\0:" + PATH, "\uff55nix:" + PATH, "tcp unix:" + PATH, "udp unix:" + PATH,
        "unix:unix:" + PATH,
    ]
    assert [target for target in targets if opens(target, grants_of(""), [r"(?s:.*)", "unix:.*"])] == []
    for longest in ("/" + "a" * 99, "/a" + "\u00e9" * 49):
        assert len(longest.encode()) == 100 and opens("unix:" + longest, grants_of(""), "unix:.*")


@pytest.mark.parametrize("options, allowed, refused", [
    ("", "8080", ""), ('permitopen="nowhere:1" no-udp', "8080", ""), ('permitlisten="127.0.0.1:8080"', "8080 127.0.0.1:8080", "0"),
    ('permitlisten="8080"', "8080 localhost:8080 127.0.0.1:8080 [::1]:8080", "*:8080 0.0.0.0:8080"),
    ('permitlisten="127.0.0.1:1" permitlisten="8080"', "8080", ""), ('permitlisten="[::]:8080"', "*:8080", ""),
    ('permitlisten="*:8080"', "8080 *:8080", ""), ('permitlisten="*:*"', "0.0.0.0:8080", ""), ('permitlisten="*"', "0", ""),
    ('permitlisten="127.0.0.1:*"', "8080 0", "0.0.0.0:8080 127.0.0.2:8080"), ('permitlisten="0.0.0.0:8080"', "", "*:8080"),
    ('permitlisten="127.0.0.1:1"', "", "8080 0"), ('permitlisten="127.0.0.2:8080"', "", "8080"), ('permitlisten="[::1]:*"', "", "8080"),
])
def test_permitlisten(options, allowed, refused):
    grant, = grants_of(options)
    for asked in (allowed + " " + refused).split():
        assert grant.listens(ratrod.parse_bind(asked)) == (asked in allowed.split()), asked


# Under `permitlisten="127.0.0.1:8080"`: whether an address that a client asks for is that one.
ASKED = {
    **dict.fromkeys(("127.0.0.1:8080", "[::ffff:127.0.0.1]:8080", "[::FFFF:7f00:1]:8080", "8080", "127.0.0.1.:8080", "localhost:8080"), True),
    **dict.fromkeys((
        "0.0.0.0:8080", "[::]:8080", "[::1]:8080", "[::ffff:0.0.0.0]:8080", "127.1:8080", "0:8080", "2130706433:8080", "0x7f000001:8080", "*:8080",
        ":8080", "[]:8080", "127.0.0.2:8080", "\uff11\uff12\uff17.0.0.1:8080", "127.0.0.1\0:8080", "127.0.0.1:8080\n", "127.0.0.1:08080",
        "localhost.ok.example:8080", "evil.example:8080", "unix:/tmp/8080", "/tmp/x:8080", "127.0.0.1:8080:1", "localhost\n:8080",
        "[localhost]:8080", "\x1b[2J:8080", "[::1%lo]:8080"), False)}


def test_spellings_of_an_address_to_listen_on():
    # Nothing that anybody may listen on.
    bad_addresses = ["", ":", ":0", "127.0.0.1", "127.0.0.1:", "127.1:0", "0x7f000001:0", "127.0.0.1:0\n", "127.0.0.1:00", "127.0.0.1:65536",
                     "127.0.0.1:-1", "127.0.0.1:\u0660", "[::1", "[fe80::1%lo]:0", "**:0", "*.x:0", "a b:0", "unix:/tmp/x", "no.such.name.invalid:0"]
    grant, = grants_of('permitlisten="127.0.0.1:8080"')
    def listens(asked):
        try:
            address = ratrod.parse_bind(asked)
            return not address.is_unix and grant.listens(address)
        except ValueError:
            return False
    assert {asked: listens(asked) for asked in ASKED} == ASKED
    for text in bad_addresses:
        with pytest.raises(ValueError):
            address = ratrod.parse_bind(text)
            pytest.fail("%r was taken for %s" % (text, address))
