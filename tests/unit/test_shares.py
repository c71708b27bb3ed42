"""Who gets how much: counts by key, queues with turns, memory that is bounded in sum, a stream's window, how long it waits for another link."""

import random
import types

import pytest

import ratrod
from test_core import CHACHA, record_ends

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def test_a_key_whose_number_is_0_is_not_kept():
    """Keys that `authorize()` takes come without end."""
    counts = ratrod.KeyCounts()
    for key, n in ((A, 2), (B, 1), (A, -1), (B, -1)):
        counts.change(key, n)
    assert (counts.total, counts.by_key, counts.of(A), counts.of(B)) == (1, {A: 1}, 1, 0)


class Waits:
    """A link of which half a record has come; or a stream that waits for a link."""

    def __init__(self, peer_key=A, instance=b""):
        self.peer_key, self.instance, self.link = peer_key, instance, None

    def open(self, link):
        self.link = link


def begun(queue, *asked):
    """What of (key, rank) a queue begins, each named by its number, in the order in which that happens."""
    order = []
    for number, (key, rank) in enumerate(asked):
        queue.begin(key, lambda number=number: order.append(number), rank)
    return order


def test_keys_of_a_queue_take_turns_and_lower_ranks_go_first():
    queue = ratrod.FairQueue(1)
    order = begun(queue, (A, 1), (A, 1), (A, 1), (B, 1), (B, 1), (C, 2), (C, 0))
    for key in (A, C, A, B, A, B):
        queue.done(key)
    assert order == [0, 6, 1, 3, 2, 4, 5]
    for options, keys, at_once in (({"most": 2}, [A, A, A], 2), ({"most": 4, "most_of_key": 1}, [A, A, B, C], 3)):
        assert len(begun(ratrod.FairQueue(**options), *((key, 0) for key in keys))) == at_once


def test_numbers_of_ended_streams_make_room_where_a_key_has_most(monkeypatch):
    """Others' late Opens must connect for nobody whatever one key does; of that key nobody can tell any more for an hour."""
    monkeypatch.setattr(ratrod, "NUMBERS", 3)
    ended = ratrod.EndedNumbers(types.SimpleNamespace(now=0.0))
    for stream, (key, was_reset) in enumerate([(B, True), (A, False), (A, True), (A, True)]):
        ended.add((key, stream), was_reset)
    assert [ended.get((A, 1)), ended.get((A, 2)), ended.get((B, 0)), ended.get((C, 0))] == [None, True, True, None]
    assert (ended.are_all(A), ended.are_all(B)) == (False, True)
    ended._loop.now = ratrod.REMEMBERED + 1
    ended.sweep()
    assert (ended.get((B, 0)), ended.are_all(A), ended._of, ended._count) == (None, True, {}, 0)


W, SMALL = ratrod.WINDOW, ratrod.POOR_WINDOW


@pytest.mark.parametrize("kept, key, short, out", [
    ({}, A, False, False), ({A: 3 * W}, A, False, False),
    ({A: 4 * W}, A, True, False),  # one window more would be over the half that a key may have
    ({A: 4 * W + 1}, A, True, True), ({A: 4 * W + 1}, B, False, False),
    ({A: 4 * W, B: 4 * W}, C, True, False),  # all of it is used, and somebody else has more
    ({A: 4 * W, B: 3 * W, C: W + 1}, A, True, True), ({A: 4 * W, B: 3 * W, C: W + 1}, B, True, False),
], ids=str)
def test_memory_is_bounded_in_all_and_for_each_key(kept, key, short, out):
    memory = ratrod.Memory(8 * W)
    for one, n in kept.items():
        memory.change(one, n)
    assert (memory.is_short(key), memory.is_out(key)) == (short, out)
    for one, n in kept.items():
        memory.change(one, -n)
    assert not memory.total and not memory.by_key and not memory.is_short(key)


def test_of_the_links_that_hold_half_a_record_the_longest_waiting_is_read_on():
    memory = ratrod.Memory(8 * W)
    first, second, other, late = map(Waits, (A, A, B, A))
    for link in (first, second, other):
        memory.hold(link)
    assert all(memory.may_read_on(link) for link in (first, second, other))
    memory.change(A, 5 * W)
    assert [memory.may_read_on(link) for link in (first, second, other, late)] == [True, False, True, True]
    assert memory.let_go(first) is second and memory.may_read_on(second)
    assert memory.let_go(second) is None and memory.let_go(other) is None and not memory._halves


def outgoing(memory, key=A):
    loop = types.SimpleNamespace(now=0.0, portion=ratrod.MAX_CONTENT, scratch_out=memoryview(bytearray(3 * W)), hurry=lambda: None)
    loop.payload = loop.scratch_out[ratrod.HEADROOM:ratrod.HEADROOM + ratrod.MAX_CONTENT]
    return ratrod.Outgoing(loop, memory, key)


class Carrier:
    """A link of `key` whose records nobody reads."""

    def __init__(self, key=A):
        self.peer_key, self.is_resumable, self.state, self.out = key, True, ratrod.BUSY, b""
        self.writer, self.reader = record_ends(CHACHA)


class Source:
    """A local socket that has this to say."""

    def __init__(self, data):
        self.data = data

    def recv_into(self, view, most=0):
        n = min(most or len(view), len(self.data))
        view[:n] = self.data[:n]
        self.data = self.data[n:]
        return n


def test_a_direction_keeps_what_it_is_given():
    """Few bytes, then a ring that wraps around, sealed from at any position, and the same bytes more than once."""
    rng, memory = random.Random(1), ratrod.Memory(8 * W)
    out, kept, link = outgoing(memory), b"", Carrier()
    for step in range(400):
        if step == 200:
            bulk = rng.getrandbits(8 * ratrod.BULK_READ).to_bytes(ratrod.BULK_READ, "big")
            out.read(Source(bulk), ratrod.MAX_CONTENT, link, False)
            kept += bulk
            link.writer, link.reader = record_ends(CHACHA)  # that record is read by nobody
            assert memory.by_key == {A: W}
        n = rng.randrange(1, 3000)
        data = rng.getrandbits(8 * n).to_bytes(n, "big")
        if len(kept) + n < SMALL + ratrod.BULK_READ * (step >= 200):
            out.append(memoryview(data))
            kept += data
        for position in [out.start + rng.randrange(len(kept))] * 2:
            out.position = position
            record = bytearray(out.next_record(link))
            kind, content, _ = link.reader.next(memoryview(record), 0, len(record))
            assert kind == ratrod.DATA and content and kept[position - out.start:].startswith(bytes(content))
        dropped = rng.randrange(len(kept))
        out.drop(out.start + dropped)
        kept = kept[dropped:]
        assert out.end - out.start == len(kept)
    assert memory.by_key == {A: W}
    out.close()
    assert not memory.total


def test_a_direction_takes_no_ring_where_memory_is_short():
    memory = ratrod.Memory(8 * W)
    memory.change(A, 4 * W)
    for key, grows in ((A, 0), (B, W)):
        out = outgoing(memory, key)
        out.read(Source(bytes(ratrod.BULK_READ)), ratrod.MAX_CONTENT, Carrier(key), False)
        assert memory.of(key) == (4 * W if key == A else 0) + grows
    out.attach(Carrier(C), 0)
    assert memory.by_key == {A: 4 * W, C: W}


@pytest.mark.parametrize("error, seconds", [
    (ratrod.LinkSilent("nothing was heard"), 600), (ratrod.LinkSpoiled("it does not verify"), 600),
    (ratrod.LinkClosed("the path broke"), ratrod.DEFAULT_LIMITS.resume_after_close), (OSError("reset"), ratrod.DEFAULT_LIMITS.resume_after_close)])
def test_how_long_a_stream_waits_for_another_link(error, seconds):
    assert ratrod.resume_time(ratrod.DEFAULT_LIMITS, error) == seconds
    for resume in (0, 5):
        assert ratrod.resume_time(ratrod.DEFAULT_LIMITS._replace(resume=resume), error) == resume


class IdleLink:
    state, is_completed, is_legacy, peer_key = ratrod.IDLE, True, False, A

    def __init__(self, instance):
        self.instance, self.said = instance, []

    def send_record(self, *record):
        self.said.append(record)


def test_what_was_left_behind_is_abandoned_on_the_next_idle_link_of_its_instance():
    """Another instance has the stream now, under another number; the first one may have connected already."""
    opener = ratrod.Opener(types.SimpleNamespace(loop=types.SimpleNamespace(now=0.0), limits=None, draining=False))
    opener.leave_behind(b"n" * 16, b"a")
    links = [IdleLink(instance) for instance in (b"b", b"a", b"a")]
    for link in links:
        opener.put(link)
    assert [link.said for link in links] == [[], [(ratrod.ABANDON, b"n" * 16)], []]


def test_an_opener_gives_a_link_to_those_that_its_instance_allows():
    """Detached streams first. One of which nothing was sent or answered goes to any server: its own may be gone."""
    opener = ratrod.Opener(types.SimpleNamespace(loop=None, limits=None, draining=False))
    of_a, of_b, new = (Waits(instance=instance) for instance in (b"a", b"b", b""))
    untouched = Waits(peer_key=B)
    opener.detached.update({of_a: None, of_b: None, untouched: None})
    opener.waiting.append(new)
    links = [IdleLink(instance) for instance in (b"b", b"b", b"b", b"c", b"a")]
    for link in links:
        opener.put(link)
    assert [waiter.link for waiter in (of_b, untouched, new, of_a)] == [*links[:3], links[4]]
    assert opener.idle == [links[3]] and not opener.detached and not opener.waiting


@pytest.mark.parametrize("after, memory, most", [
    (0.001, 64, W),  # a near path needs no more
    (0.1, 64, 2 * W), (2.0, 64, W),  # it was taken too slowly
    (0.1, 3, W)], ids=["near", "far", "slow", "memory is short"])
def test_a_window_that_alone_held_its_sender_back_grows(after, memory, most):
    link = Carrier()
    out = outgoing(ratrod.Memory(memory * W))
    out.attach(link, 0)
    def fill():
        out.end = out.position = out.sent = out.start + out.most
        assert out.room(link, False) == 0
    def take(position, now):
        out._loop.now = now
        out.on_taken(position)
    out.read(Source(bytes(ratrod.BULK_READ)), ratrod.MAX_CONTENT, link, False)
    for now in (10.0, 20.0):  # once for each time that it was full
        out._loop.now = now
        fill()
        before, end = out.most, out.end
        out.start += 10
        fill()  # some of it was taken: it is full again, long before the rest comes
        take(end - 1, now + after)
        assert out.most == before
        take(end, now + after)
        take(out.end, now + after)
        assert out.most == (most if now == 10 else before * most // W)
    for now in range(30, 40):
        out._loop.now = now
        fill()
        take(out.end, now + after)
    assert out.most <= ratrod.LARGEST_WINDOW
