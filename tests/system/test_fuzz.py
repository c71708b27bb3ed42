"""A few thousand inputs of each target of fuzz.py, the same ones in every run, and every input that ever failed."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import fuzz
import fuzz_live
import ratrod
from fuzz_parsers import FUZZES, hash_of
from support.joined import BOTH_WAYS, END, RESET
from support.programs import ROOT
from support.whole_ends import Back, Ends, Oracle, Originator

CRASHERS = sorted((ROOT / "tests" / "tools" / "crashers").iterdir())
PARSED, PLAYED = 500, 80  # inputs of a parser, and of whole programs
DEAR = {"noise-server": 500, "noise-client": 500, "noise-payloads": 500, "legacy-server": 500, "legacy-client": 500, "command-line": 100,
        "client-start": 60, "client-peer": 60, "server-proxy": 60, "server-stranger": 80}


@pytest.fixture(autouse=True)
def no_rigs_are_left():
    yield
    fuzz_live.close_rigs()


@pytest.mark.parametrize("name", FUZZES)
def test_target(name, record_property):
    target = FUZZES[name]
    done = fuzz.run_plain(target, DEAR.get(name) or (PLAYED if target.live else PARSED), seed=1)
    record_property("inputs", done.count)


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: path.name)
def test_what_once_failed(path):
    fuzz.replay(path)


@pytest.mark.parametrize("mistake", ["another exception", "a lax decoder", "a loop"])
def test_a_mistake_is_found_and_its_input_kept(monkeypatch, tmp_path, mistake):
    right = ratrod.decode_message
    def wrong(data):
        if b"\xfb\x01" in data and mistake == "another exception":
            raise IndexError("index out of range")
        if data[-1:] == b"\0" and mistake == "a lax decoder":
            return right(data[:-1])
        while b"\xfb\x01" in data and mistake == "a loop":
            pass
        return right(data)
    monkeypatch.setattr(ratrod, "decode_message", wrong)
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.5)
    failed = pytest.raises(fuzz.Failed, fuzz.run_plain, FUZZES["message"], 20_000, seed=1)
    kept = pathlib.Path(re.search(r"--replay (\S+)", str(failed.value)).group(1))
    assert kept.name == "message-%08x" % hash_of(kept.read_bytes())
    if mistake != "a loop":
        pytest.raises((IndexError, AssertionError), fuzz.replay, kept)
    monkeypatch.undo()
    fuzz.replay(kept)


@pytest.mark.parametrize("engine", ["plain", "guided"])
def test_the_script(engine):
    if engine == "guided":
        pytest.importorskip("atheris", reason="no atheris here (pip install atheris): the plain loop stands in for it")
    output = subprocess.check_output([sys.executable, str(ROOT / "tests" / "tools" / "fuzz.py"), "--inputs", "1000", "message", "datagrams",
                                      *["--plain"] * (engine == "plain")], stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=600).decode()
    figures = {name: int(n) for name, n in re.findall(r"^figure: fuzz inputs (.*) = (\d+)$", output, re.M)}
    assert set(figures) == {"message", "datagrams", "in all"}
    assert figures["message"] + figures["datagrams"] == figures["in all"] >= 1000
    assert ("guided by coverage" if engine == "guided" else "by plain mutation") in output


def test_a_reverse_tunnel_that_nobody_has_used_for_an_hour():
    """Its waiting links are all too old for a new stream, and more of them than an Open may be tried: the next connection must come through."""
    back = Back()
    ends = Ends("R:0:127.0.0.1:%d" % back.port)
    try:
        def move():
            for _ in range(30):
                ends.rounds()
                back.read()
        for n in 5, 1:
            for _ in range(n):
                back.originate(ends.client.tunnels[0].local.port)
            move()
            for app in back.originators[-n:]:
                assert app.other, "it did not reach the target"
                app.end()
                app.other.end()
            move()
            assert [app.outcome for app in back.originators[-n:]] == [END] * n
            ends.pass_time(int(ends.client.limits.link_age) + 10)
    finally:
        ends.close()
        back.close()


def test_a_visitor_of_a_reverse_tunnel_takes_no_link_from_another_one():
    """Its link doubts the others' paths. A Unix socket tells nothing of its path, as any socket of another system than Linux."""
    machine = Reverse()
    for _ in range(2):
        machine.originate(rounds=30)
        machine.pass_time(seconds=5)
    assert [stream.attempt for stream in machine.ends.server.counters.streams] == [1, 1]
    machine.teardown()


def test_a_datagram_for_which_a_link_is_taken_while_others_wait():
    """Those that waited were sealed in the buffer in which it lay: the target got their ciphertext."""
    machine = Datagrams()
    machine.be_reachable(whether=False)
    machine.pass_time(seconds=150)
    machine.send(n=1, number=0, rounds=0, size=0)
    machine.pass_time(seconds=25)
    machine.teardown()


def test_a_reverse_tunnel_whose_last_links_go_while_it_tries_again():
    """Found by the soak: all waiting links were lost, a try failed as a connection gave its link back, which was lost too: it never came back."""
    machine = Reverse()
    machine.originate(rounds=8)
    busy, = (pair for pair in machine.ends.live if ratrod.BUSY in {link.state for link in pair.links})
    machine.be_reachable(whether=False)
    for pair in machine.ends.live:
        if pair is not busy:
            pair.cut(RESET)
    machine.pass_time(seconds=5)
    for number in (0, 1):
        machine.leave(number=number, how=END, rounds=10)
    assert ratrod.BUSY not in {link.state for link in busy.links}, "the link was not given back"
    machine.pass_time(seconds=5)
    busy.cut(RESET)
    machine.teardown()


# test_states.py has the machine for streams on links. Many more examples, some minutes:
# RATROD_LONG=1 pytest -n0 tests/system/test_fuzz.py -k "TestDatagrams or TestReverse"

MACHINE = settings(max_examples=1000 if os.environ.get("RATROD_LONG") else 15, stateful_step_count=30, deadline=None,
                   derandomize="CI" in os.environ, database=None, report_multiple_bugs=False,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
LIMITS = ratrod.DEFAULT_LIMITS._replace(udp_timeout=20.0, udp_sessions=3, udp_backlog=100_000, link_age=100.0, waiting_links=3)


class Joined(RuleBasedStateMachine):
    """What happens to the links of either. No preconditions: real sockets may differ by a moment, and hypothesis could not repeat the steps."""

    numbers = st.integers(0, 5)
    rounds = st.integers(0, 4)

    @staticmethod
    def one_of(things, number):
        """The one in a list, or none where there is none."""
        return things[number % len(things):][:1] if things else []

    @rule(n=st.integers(1, 12))
    def everything_moves(self, n):
        self.ends.rounds(n)

    @rule(n=st.integers(1, 3))
    def the_path_stands_still(self, n):
        self.ends.rounds(n, pump=False)

    @rule(seconds=st.sampled_from((1, 5, 25, 150)))
    def pass_time(self, seconds):
        self.ends.pass_time(seconds)

    @rule(whether=st.booleans())
    def be_reachable(self, whether):
        self.ends.reachable = whether

    @rule(number=numbers, how=st.sampled_from((END, RESET)), whom=st.sampled_from((BOTH_WAYS, BOTH_WAYS[:1], BOTH_WAYS[1:])), rounds=rounds)
    def cut(self, number, how, whom, rounds):
        for pair in self.one_of(self.ends.live[::-1], number):
            pair.cut(how, whom)
        self.ends.rounds(rounds)

    @invariant()
    def check(self):
        self.ends.check_memory()
        assert not self.ends.ended, "the client gave up: %s" % self.ends.ended


class Datagrams(Joined):
    """Originators and one that answers: a datagram may be lost, but comes never twice, nor to another; sessions end; who asks again is answered."""

    def __init__(self):
        super().__init__()
        self.oracle = Oracle()
        self.ends = Ends("0:127.0.0.1:%d" % self.oracle.port, limits=LIMITS)
        port = self.ends.client.tunnels[0].local.port
        self.originators = [Originator(number, port) for number in range(5)]

    def hear(self):
        for who in (self.oracle, *self.originators):
            who.hear()

    @rule(number=st.integers(0, 4), size=st.sampled_from((0, 1, 1000, 60_000)), n=st.integers(1, 5), rounds=st.integers(0, 4))
    def send(self, number, size, n, rounds):
        for _ in range(n):
            self.originators[number].send(size)
        self.ends.rounds(rounds)

    @rule(n=st.integers(1, 20), rounds=st.integers(0, 4))
    def answer(self, n, rounds):
        self.oracle.hear()
        self.oracle.answer(n)
        self.ends.rounds(rounds)

    @invariant()
    def nothing_is_out_of_bounds(self):
        self.hear()
        client, server = self.ends.client, self.ends.server
        for udp in {client._udp, *(session.udp for session in server.counters.sessions)}:
            assert len(udp.sessions) <= LIMITS.udp_sessions
            assert sum(len(run) for _, run in udp._queue) <= LIMITS.udp_backlog
            assert udp._counted == sum(len(run) for _, run in udp._queue) + len(udp._rest)

    def teardown(self):
        try:
            self.ends.reachable = True
            self.ends.pass_time(40)
            for originator in self.originators:
                before = len(originator.answered)
                for _ in range(10):
                    originator.send(10)
                    self.ends.rounds(8)
                    self.oracle.hear()
                    self.oracle.answer(100)
                    self.ends.rounds(8)
                    self.hear()
                    if len(originator.answered) > before:
                        break
                    self.ends.pass_time(1)
                else:
                    raise AssertionError("nobody answers any more")
            self.ends.pass_time(60)
            assert not self.ends.client._udp.sessions
            assert not self.ends.server.counters.sessions
        finally:
            self.ends.close()
            for who in (self.oracle, *self.originators):
                who.socket.close()


class Reverse(Joined):
    """Connections back through a reverse tunnel: each is whole or visibly reset, none is another's, and on a good path new ones come through."""

    def __init__(self):
        super().__init__()
        self.back = Back()
        self.ends = Ends("R:0:127.0.0.1:%d" % self.back.port, limits=LIMITS)
        self.port = self.ends.client.tunnels[0].local.port

    def move(self, rounds):
        for _ in range(rounds):
            self.ends.rounds()
            self.back.read()

    @rule(rounds=st.integers(0, 8))
    def originate(self, rounds):
        if len(self.back.originators) >= 6:
            return
        with contextlib.suppress(ConnectionError):  # where every link is gone the listener is too
            self.back.originate(self.port)
        self.move(rounds)

    @rule(number=st.integers(0, 11), n=st.sampled_from((1, 100, 5000, 400_000)), rounds=st.integers(0, 4))
    def write(self, number, n, rounds):
        for app in self.one_of(self.back.apps, number):
            app.write(n)
        self.move(rounds)

    @rule(number=st.integers(0, 11), how=st.sampled_from((END, RESET)), rounds=st.integers(0, 4))
    def leave(self, number, how, rounds):
        for app in self.one_of(self.back.apps, number):
            app.end() if how == END else app.reset()
        self.move(rounds)

    @invariant()
    def nothing_is_out_of_bounds(self):
        self.back.read()
        for tunnel in self.ends.client.reverse:
            assert len(tunnel.waiting) <= LIMITS.waiting_links
            assert not tunnel.waiting & tunnel.busy
        for listener in self.ends.server.reverse:
            assert len(listener.idle) <= LIMITS.waiting_links

    def teardown(self):
        try:
            self.ends.reachable = True
            for seconds, rounds in ((60, 100), *[(20, 50)] * 5):  # the shorter ones for what comes late
                for app in self.back.apps:
                    app.end()
                self.ends.pass_time(seconds)
                self.move(rounds)
                if all(app.outcome for app in self.back.originators):
                    break
            assert all(app.outcome for app in self.back.originators), "it never ended"
            self.back.originate(self.port)
            app = self.back.originators[-1]
            self.move(30)
            assert app.other, "the tunnel does not work any more"
            for end in (app, app.other):
                end.write(1000)
                end.end()
            self.move(30)
            assert (app.outcome, app.other.outcome) == (END, END)
        finally:
            self.ends.close()
            self.back.close()


TestDatagrams, TestReverse = Datagrams.TestCase, Reverse.TestCase
TestDatagrams.settings = TestReverse.settings = MACHINE
