#!/usr/bin/env python3
"""Hostile bytes for every parser of ratrod.py, and over real sockets for the whole server and client.

    python tests/tools/fuzz.py --inputs 1000000           everything: about a quarter of an hour
    python tests/tools/fuzz.py --inputs 200000 names tunnel
    python tests/tools/fuzz.py --list                     the targets, and what each holds against what it is given
    python tests/tools/fuzz.py --replay FILE              one input that was kept; its name begins with its target's

Inputs are mutations of real traffic. Where `atheris` is installed (pip install atheris), coverage of ratrod.py guides them; elsewhere a plain
loop of our own does, which keeps what led to a new answer. Each target runs in a process of its own, on loopback only.

Whatever an oracle does not allow (another exception than the documented one, something decoded that encodes to other bytes, seconds of CPU time,
memory that grows, an end that does not come, "internal error" in the log, an honest client that is not served) ends the target, and the input is
kept. The targets are in fuzz_parsers.py and fuzz_live.py.
"""

import argparse
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import fuzz_live
from fuzz_parsers import FUZZES, GUIDED, hash_of

CPU_SECONDS = 2.0  # of one input; the slowest honest one takes 10 ms. Twice that where other threads are at work too
GROWTH = 300  # MB that a process may gain over its whole run
KEPT = pathlib.Path(tempfile.gettempdir()) / "ratrod-fuzz"  # where the inputs of failures go


# ---------------------------------------------------------------------------------------------------- mutation

INTERESTING = (0, 1, 2, 0x0a, 0x10, 0x20, 0x2e, 0x3a, 0x3f, 0x7f, 0x80, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff)


class Mutator:
    """Endless inputs made of `seeds`, the same ones for the same `seed`. What a caller found worth it is mutated further."""

    def __init__(self, seeds, words, seed):
        self.corpus = list(seeds)
        self._words = tuple(words) or (b"\0",)
        self._random = random.Random(seed)
        self._fresh = list(reversed(self.corpus))  # each seed itself comes first

    def next(self):
        if self._fresh:
            return self._fresh.pop()
        data = bytearray(self._random.choice(self.corpus))
        for _ in range(self._random.choice((1, 1, 1, 2, 2, 3, 5, 8))):
            self._random.choice(self._STEPS)(self, data)
        return bytes(data[:1 << 16])

    def keep(self, data):
        if len(self.corpus) < 5000:
            self.corpus.append(data)

    def _at(self, data):
        return self._random.randrange(len(data) + 1)

    def _span(self, data):
        start = self._at(data)
        return start, start + self._random.choice((1, 1, 2, 3, 4, 8, 32))

    def _flip(self, data):
        if data:
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)

    def _set(self, data):
        if data:
            data[self._random.randrange(len(data))] = self._random.choice(INTERESTING)

    def _insert(self, data):
        at = self._at(data)
        data[at:at] = bytes(self._random.randrange(256) for _ in range(self._random.choice((1, 2, 4, 16))))

    def _insert_word(self, data):
        at = self._at(data)
        data[at:at] = self._random.choice(self._words)

    def _overwrite_by_word(self, data):
        at, word = self._at(data), self._random.choice(self._words)
        data[at:at + len(word)] = word

    def _delete(self, data):
        start, end = self._span(data)
        del data[start:end]

    def _cut(self, data):
        del data[self._at(data):]

    def _repeat(self, data):
        start, end = self._span(data)
        data[start:start] = data[start:end] * self._random.choice((1, 1, 2, 10, 100))

    def _number(self, data):
        size = self._random.choice((1, 2, 4, 8))
        value = self._random.choice((0, 1, 2, 1023, 1024, 1025, 1 << 16, 1 << 31, (1 << 64) - 1, len(data), self._random.randrange(1 << 16)))
        at = self._at(data)
        data[at:at + size] = (value % (1 << 8 * size)).to_bytes(size, "big")

    def _splice(self, data):
        other = self._random.choice(self.corpus)
        data[self._at(data):] = other[self._at(other):]

    def _insert_other(self, data):
        other = self._random.choice(self.corpus)
        start, end = self._span(other)
        at = self._at(data)
        data[at:at] = other[start:end]

    _STEPS = (_flip, _flip, _set, _insert, _insert_word, _insert_word, _overwrite_by_word, _delete, _delete, _cut, _repeat, _number, _splice,
              _insert_other)


# ---------------------------------------------------------------------------------------------------- running one target


class Failed(Exception):
    """An oracle did not hold; the report says which, and for what input."""


class Runner:
    """Gives inputs to a target, counts them, and keeps the one that failed."""

    def __init__(self, fuzz):
        self.fuzz = fuzz
        self.count = 0
        self.slowest = 0.0
        self._memory = None
        signal.signal(signal.SIGVTALRM, self._too_slow)

    def _too_slow(self, *_):
        raise Failed("it took more than %g s of CPU time" % CPU_SECONDS)

    def __call__(self, data):
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS * (2 if self.fuzz.live else 1))
        started = time.monotonic()
        try:
            answer = self.fuzz.check(data)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Failed(self._report(data, error)) from error
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.count += 1
        if self.count == 1000:
            self._memory = peak_memory()
        return answer

    def _report(self, data, error):
        KEPT.mkdir(exist_ok=True)
        path = KEPT / ("%s-%08x" % (self.fuzz.name, hash_of(data)))
        path.write_bytes(data)
        return "%s, input %d: %r\n%s\n%r\nkept: python tests/tools/fuzz.py --replay %s" % (
            self.fuzz.name, self.count + 1, error, "".join(traceback.format_exception(type(error), error, error.__traceback__)), data[:2000], path)

    def finish(self):
        """After the last input: what only shows then."""
        for rig in list(fuzz_live.RIGS.values()):
            rig.check()
        if self._memory is not None and peak_memory() - self._memory > GROWTH:
            raise Failed("%s: %d MB after %d inputs, %d MB after the first 1000" % (self.fuzz.name, peak_memory(), self.count, self._memory))


def peak_memory():
    """MB that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << (20 if sys.platform == "darwin" else 10))


def run_plain(fuzz, inputs, seed):
    """`inputs` mutations, kept as seeds where the answer is one that none before had."""
    runner, mutator, answers = Runner(fuzz), Mutator(fuzz.seeds(), fuzz.words, "%s %s" % (seed, fuzz.name)), set()
    while runner.count < inputs:
        data = mutator.next()
        answer = runner(data)
        if answer not in answers:
            answers.add(answer)
            mutator.keep(data)
    runner.finish()
    return runner


def run_guided(fuzz, inputs, seed):
    """The same by libFuzzer, guided by the coverage of ratrod.py. Never returns: libFuzzer would end the process by itself."""
    import atheris

    runner, folder = Runner(fuzz), pathlib.Path(tempfile.mkdtemp(prefix="ratrod-fuzz-"))

    def leave(code, text):
        print(text, flush=True)
        shutil.rmtree(folder)
        fuzz_live.close_rigs()
        os._exit(code)

    def one(data):
        try:
            runner(data)
            if runner.count == inputs:
                runner.finish()
                leave(0, told(runner))
        except Failed as error:
            leave(1, str(error))

    seeds, corpus = fuzz.seeds(), folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / ("seed%d" % number)).write_bytes(data)
    (folder / "words").write_text("".join('"%s"\n' % "".join("\\x%02x" % byte for byte in word) for word in fuzz.words))
    longest = max(512, 100 + max(map(len, seeds)))
    words = ["-dict=%s" % (folder / "words")] if fuzz.words else []
    atheris.Setup([sys.argv[0], "-seed=%d" % (seed + 1), "-max_len=%d" % longest, "-verbosity=0", "-rss_limit_mb=2000", *words, str(corpus)], one)
    atheris.Fuzz()


def told(runner):
    return "ran %s %d slowest %.3f" % (runner.fuzz.name, runner.count, runner.slowest)


# ---------------------------------------------------------------------------------------------------- main


def child(options):
    """One target, in this process."""
    fuzz = FUZZES[options.targets[0]]
    if GUIDED:
        run_guided(fuzz, options.inputs, options.seed)
    try:
        print(told(run_plain(fuzz, options.inputs, options.seed)), flush=True)
    except Failed as error:
        print(error, flush=True)
        return 1
    finally:
        fuzz_live.close_rigs()
    return 0


def replay(file):
    """One input, with the traceback of what fails."""
    name = max((name for name in FUZZES if file.name.startswith(name + "-")), key=len, default=None)
    if name is None:
        sys.exit("%s: its name begins with no target's" % file)
    try:
        print("%s: %r" % (name, FUZZES[name].check(file.read_bytes())))
    finally:
        fuzz_live.close_rigs()
    return 0


def run(name, inputs, seed, guided):
    """One target in a process of its own: (inputs done, whether all was well)."""
    command = [sys.executable, __file__, "--child", "--inputs", str(inputs), "--seed", str(seed), *(["--guided"] if guided else []), name]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    output = done.stdout.decode("utf-8", "replace")
    found = re.search(r"^ran %s (\d+) slowest ([\d.]+)$" % name, output, re.M)
    if done.returncode or not found:
        print("%s: FAILED (exit code %d)\n%s" % (name, done.returncode, output), flush=True)
        return 0, False
    print("%-18s %8s inputs %s in %6.1f s, the slowest %s s" % (
        name, found.group(1), "guided by coverage" if guided else "by plain mutation", time.monotonic() - started, found.group(2)), flush=True)
    return int(found.group(1)), True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all (default: 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="another one makes other inputs (default: 1)")
    parser.add_argument("--plain", action="store_true", help="without atheris, even where it is installed")
    parser.add_argument("--list", action="store_true", help="show the targets")
    parser.add_argument("--replay", type=pathlib.Path, metavar="FILE", help="one input, whose file's name begins with its target's")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = set(options.targets) - set(FUZZES)
    if unknown:
        parser.error("there is no target %s; --list shows them" % ", ".join(sorted(unknown)))
    if options.replay:
        return replay(options.replay)
    if options.child:
        return child(options)
    chosen = [FUZZES[name] for name in options.targets or FUZZES]
    if options.list:
        for fuzz in chosen:
            print("%s: %s" % (fuzz.name, fuzz.claim))
        return 0
    guided = not options.plain and subprocess.run([sys.executable, "-c", "import atheris"], stderr=subprocess.DEVNULL).returncode == 0
    share, done, well = sum(fuzz.share for fuzz in chosen), {}, True
    for fuzz in chosen:
        inputs, done[fuzz.name] = -(-options.inputs * fuzz.share // share), 0  # up, so that the sum is no less than what was asked for
        # Whole programs twice: in this process, where coverage is seen, and as what users start.
        ways = ((True, -(-inputs // 2)), (False, -(-inputs // 2))) if guided and fuzz.live is True else ((guided and not fuzz.live, inputs),)
        for how, part in ways:
            some, good = run(fuzz.name, part, options.seed, how)
            done[fuzz.name] += some
            well = well and good
    for name, inputs in done.items():
        print("figure: fuzz inputs %s = %d" % (name, inputs))
    print("figure: fuzz inputs in all = %d" % sum(done.values()))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
