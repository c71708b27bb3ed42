"""Odd spellings of hosts, and texts that would do harm on a terminal: what unit/test_spellings.py checks all of, and peers/test_names.py a sample."""

# Never a target, whatever the rules: refused before anything is looked up.
NUMBERS = (
    "2130706433", "2130706434", "017700000001", "0x7f000001", "0X7F000001", "0x7F.1", "127.1", "127.0.1", "0177.1", "0177.0.0.1", "00177.0.0.1",
    "0x7f.0.0.1", "0x7f.0x0.0x0.0x1", "127.0.0.0x1", "127.0x0.0.1", "127.000.000.001", "127.0.0.01", "0000127.0.0.1", "127.0.0.1..", ".127.0.0.1",
    "127..0.1", "127.0.0", "127.0.0.1.0", "127.0.0.257", "383.0.0.1", "0", "00", "0x0", "0.", "0.0", "000.000.000.000", "4294967295", "6425673729",
    "18446744071545323521", "0x1000000007f000001", "0x" + "0" * 200 + "7f000001", "0" * 200 + "17700000001", "1." * 126 + "1", "0x", "127.0x",
    "a.0x7f000001", "x.127", "127.0.0.1.127", "7f000001h.1",
)
UNICODE = (
    "\uff11\uff12\uff17.0.0.1", "127\uff0e0\uff0e0\uff0e1", "127\u30020\u30020\u30021", "127\uff610\uff610\uff611", "127\u20240\u20240\u20241",
    "\u0661\u0662\u0667.\u0660.\u0660.\u0661", "\u0967\u0968\u096d.\u0966.\u0966.\u0967", "\u2460\u2461\u2466.0.0.1", "\u00b9\u00b2\u2077.0.0.1",
    "\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1", "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3",
    "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", "local\u00adhost", "local\u200bhost", "loca\u217cho\u017ft", "\u202elocalhost",
    "127.0.0.1\u00a0", "127.0.0.1\u2028", "\ufeff127.0.0.1", "0\u00d77f000001", "[::\uff11]", "[::ffff:\uff11\uff12\uff17.0.0.1]",
    "[\uff1a\uff1a1]", "\uff3b::1\uff3d", "fa\u00df.example",
)
WRAPPED = (
    "", " ", ".", "..", "127.0.0.1\0", "127.0.0.1\0.ok.example", "ok.example\x00127.0.0.1", "\x00", "127.0.0.1\n", "\n127.0.0.1", "127.0.0.1\r",
    "\t127.0.0.1", "127.0.0.1 ", " 127.0.0.1", "127.0.0.1 ok.example", "ok.example 127.0.0.1", "ok.example\n127.0.0.1", "127.0.0.1\x1b",
    "localhost..", ".localhost", "localhost\0", "%31%32%37.0.0.1", "127%2e0%2e0%2e1", "127.0.0.1%00", "127.0.0.1%lo", "localhost%lo",
    "%6c%6f%63%61%6c%68%6f%73%74", "user@127.0.0.1", "127.0.0.1/", "127.0.0.1/8", "127.0.0.1#", "127.0.0.1?", "127.0.0.1;", "127.0.0.1,ok.example",
    "//127.0.0.1", "\\\\127.0.0.1", "http://127.0.0.1", "[127.0.0.1]", "[localhost]", "127.0.0.1]", "[127.0.0.1", "'127.0.0.1'",
    "$(echo localhost)", "*", "*.ok.example", "a" * 254, ("a" * 63 + ".") * 4 + "a", "127.0.0.1" + "." * 245, "127.0.0.1" + "\0" * 800,
)
SIX = (
    "::1", "[::1", "::1]", "[[::1]]", "[::1].", "[::1]]", "[]", "[::1]:[::1]", "[::1%lo]", "[::1%1]", "[::1%25lo]", "[::1%]", "[::1/128]", "[::1 ]",
    "[ ::1]", "[::1\0]", "[::1\n]", "[1]", "[0:0:0:0:0:0:1]", "[0:0:0:0:0:0:0:0:1]", "[::00001]", "[::0x1]", "[:::1]", "[::1::]", "[::ffff:127.1]",
    "[::ffff:0x7f.0.0.1]", "[::ffff:0177.0.0.1]", "[::ffff:127.0.0.01]", "[::ffff:2130706433]", "[::ffff:127.0.0.1%lo]", "[fe80::1%lo]",
    "[::ffff:127.0.0.1.]", "[127.0.0.1::]", "[localhost::1]", "[g::1]", "[v1.::1]", "[::ffff:127.0.0.256]",
)
NEVER = NUMBERS + UNICODE + WRAPPED + SIX

# Loopback itself: an address and what it is written as by whoever is precise. Refused by a rule against loopback, however it is written.
MORE_LOOPBACK = "127.0.0.2", "127.255.255.254", "[::ffff:127.255.255.254]"
LOOPBACK = (
    *MORE_LOOPBACK, "127.0.0.1", "127.0.0.1.", "[::1]", "[0:0:0:0:0:0:0:1]", "[0000:0000:0000:0000:0000:0000:0000:0001]", "[::0001]", "[0::1]",
    "[::0.0.0.1]", "[::ffff:127.0.0.1]", "[::FFFF:127.0.0.1]", "[::ffff:7f00:1]", "[::FfFf:7F00:0001]", "[0:0:0:0:0:ffff:127.0.0.1]",
    "[0:0:0:0:0:ffff:7f00:1]", "localhost", "LOCALHOST", "LocalHost.",
)
# Names that the machine's own files, or a name server that is against us, resolve to loopback.
NAMES = (
    "ip6-localhost", "ip6-loopback", "localhost.localdomain", "localhost.ok.example", "127.0.0.1.ok.example", "evil.ok.example", "EVIL.ok.example.",
    "evil.example", "a-_b.ok.example", "xn--nxasmq6b.ok.example", "xn--.ok.example", "xn--127-.ok.example", "a" * 63 + ".ok.example",
    ("a" * 60 + ".") * 4 + "aaaaa", "_.ok.example", "_", "a", "127.0.0.-1", "1e1", "0b1", "0o177", "127.0.0.1e", "127-0-0-1.ok.example",
    "ok.example",
)
# Addresses that only hold one of loopback, as some network would have it; and those that never are anybody's.
ELSEWHERE = (
    "[::127.0.0.1]", "[::7f00:1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
    "[2002:7f00:1::1]", "[2001:0:7f00:1::]", "[2001:0:c000:22d:0:ffff:80ff:fffe]", "[fe80::5efe:127.0.0.1]", "[fe80::1]", "[fec0::1]",
    "[::2]", "[1::]", "[100::1]",
)
UNRESOLVED = ("-", "-2130706433", "-.ok.example")  # names that glibc asks nobody about
NOWHERE = ("0.0.0.0", "0.0.0.0.", "[::]", "[0:0::0]", "[::0.0.0.0]", "[::ffff:0.0.0.0]", "[::ffff:0:0]", "224.0.0.1", "239.255.255.255",
           "[ff02::1]", "[ff01::1]",
           "[::ffff:224.0.0.1]", "255.255.255.255", "[::ffff:255.255.255.255]")
ODD = NEVER + LOOPBACK + NAMES + ELSEWHERE + UNRESOLVED + NOWHERE


FORBIDDEN = [chr(code) for code in (*range(0x20), 0x7f, *range(0x80, 0xa0), *range(0x202a, 0x202f), *range(0x2060, 0x2070))]
FORBIDDEN += "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\ufeff\U000e0041"
HOSTILE = "marker-before" + "".join(FORBIDDEN) + "\x1b]0;evil\x07\x1b[2J\x1b[1;31m" + "A" * 300
SHORT = "marker-before\x1b]0;evil\x07\x1b[2J\r\n\x9b31m\u202e\u2028"
LONG = "marker-before" + "A" * 600
