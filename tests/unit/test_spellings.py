"""Odd spellings of hosts under every kind of rule, and texts made fit for a terminal, in memory. The programs are in peers/test_names.py."""

import pytest
from hypothesis import given, settings, strategies as st

import ratrod
from support.rows import assert_raises
from support.spellings import ELSEWHERE, FORBIDDEN, LOOPBACK, NAMES, NEVER, NOWHERE, ODD, UNRESOLVED

# The worst name server: it says loopback to every question.
RESOLVED = "127.0.0.1", "::1", "::ffff:127.0.0.1"
AGAINST_LOOPBACK = r"(?!127\.|localhost|\[?::1).*"
OUTER = "198.18.0.1"
# regex, options -> what is allowed by it.
RULES = {
    "all but loopback": (AGAINST_LOOPBACK, ""), "one domain": (r"(?:.*\.)?ok\.example|198\.18\..*", ""),
    "permitopen": (".*", 'permitopen="*.ok.example:*" permitopen="ok.example:80" permitopen="%s:*"' % OUTER),
    "both": (AGAINST_LOOPBACK, 'permitopen="*.ok.example:*" permitopen="%s:80"' % OUTER),
}


def reached(regex, options, host, found=RESOLVED):
    """The addresses that a stream to the host may be connected to, where every name leads to loopback; None: it is refused."""
    policy, grants = ratrod.Policy(regex), (ratrod.parse_grant(options.split()),)
    try:
        target = policy.check("%s:80" % host, grants)
        return policy.check_addresses(target, (target.host,) if ratrod.is_address(target.host) else found, grants)
    except ratrod.PolicyError:
        return None


def test_the_spellings_are_told_apart():
    """Each list holds what its comment says, by the text alone."""
    assert len(ODD) == len(set(ODD))
    for host in NEVER:
        assert_raises(ratrod.PolicyError, "not a target", ratrod.Policy().check, "%s:80" % host)
    for host in ODD[len(NEVER):]:
        found = ratrod.parse_target("%s:80" % host)
        assert ratrod.is_address(found.host) == (host not in NAMES + UNRESOLVED and "localhost" not in host.lower())


@pytest.mark.parametrize("rules", RULES)
def test_no_spelling_reaches_loopback_past_a_rule(rules):
    refused = NEVER + LOOPBACK + NAMES + NOWHERE
    assert {host: found for host in refused for found in [reached(*RULES[rules], host)] if found is not None} == {}
    assert not {address for host in ELSEWHERE for address in reached(*RULES[rules], host) or ()} & {"127.0.0.1", "::1"}
    assert reached(*RULES[rules], OUTER) == (OUTER,)
    assert reached(*RULES[rules], "fine.ok.example", (OUTER,)) == (OUTER,)


def test_without_a_rule_only_plain_spellings_lead_there():
    found = {host: reached(".*", "", host) for host in ODD}
    assert [host for host in ODD if found[host] is None] == [host for host in ODD if host in NEVER + NOWHERE]
    leads = [host for host in ODD if found[host] and all(ratrod.parse_ip(address).is_loopback for address in found[host])]
    assert leads == [host for host in ODD if host in LOOPBACK + NAMES + UNRESOLVED]


@settings(deadline=None)
@given(st.text())
def test_whatever_is_made_printable_is(text):
    shown = ratrod.printable(text)
    assert shown.isprintable() and len(shown) <= 203 and str(ratrod.PeerError(ratrod.UNKNOWN, text))
    assert not any(character in FORBIDDEN for character in shown)


def test_every_forbidden_character_is_replaced():
    for character in FORBIDDEN:
        assert ratrod.printable("a%sb" % character) == "a\N{REPLACEMENT CHARACTER}b", hex(ord(character))
    assert ratrod.printable("\ud800") != "\ud800"
