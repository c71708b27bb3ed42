"""Who gets how much: counts by key, queues with turns, memory that is bounded in sum, a stream's window, how long it waits for another link."""

import random

import pytest

import ratrod
from test_core import CHACHA, in_room, record_ends

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def test_a_key_whose_number_is_0_is_not_kept():
    """Keys that `authorize()` takes come without end."""
    counts = ratrod.KeyCounts()
    for key, n in ((A, 2), (B, 1), (A, -1), (B, -1)):
        counts.change(key, n)
    assert (counts.total, counts.by_key, counts.of(A), counts.of(B)) == (1, {A: 1}, 1, 0)


@pytest.mark.parametrize("taken, key, whose", [([A, A], A, "of this client"), ([A, A], B, None), ([A, B, C], C, "in all")])
def test_a_quota_is_one_of_all_and_one_of_each_key(taken, key, whose):
    quota = ratrod.Quota(3, 2, "has as many")
    for one in taken:
        quota.take(one)
    if whose:
        with pytest.raises(ratrod.Overloaded, match=whose):
            quota.take(key)
        quota.give_back(taken[0])
    quota.take(key if whose != "of this client" else taken[0])


def begun(queue, *asked):
    """What of (key, rank) a queue begins, each named by its number, in the order in which that happens."""
    order = []
    for number, (key, rank) in enumerate(asked):
        queue.begin(key, lambda number=number: order.append(number), rank)
    return order


@pytest.mark.parametrize("options, asked, at_once", [
    ({"most": 2}, [A, A, A], 2),
    ({"most": 4, "most_of_key": 1}, [A, A, B, C], 3),
    # One key has all places but one, two have half each, and a place is left for one that holds none.
    ({"most": 4, "shares": True}, [A] * 5, 3),
    ({"most": 5, "shares": True}, [A] * 9 + [B] * 9, 5),
], ids=["in all", "of a key", "one place is left", "shares"])
def test_what_a_queue_begins_at_once(options, asked, at_once):
    assert len(begun(ratrod.FairQueue(**options), *((key, 0) for key in asked))) == at_once


def test_a_queue_gives_a_key_less_the_more_wait():
    queue = ratrod.FairQueue(9, shares=True)
    order = begun(queue, *[(A, 0)] * 20, *[(B, 0)] * 20, *[(C, 0)] * 20)
    assert [sum(number // 20 == n for number in order) for n in range(3)] == [8, 1, 0]
    for _ in range(7):
        queue.done(A)
    assert [sum(number // 20 == n for number in order) - before for n, before in enumerate((7, 0, 0))] == [2, 2, 2]


def test_keys_of_a_queue_take_turns_and_lower_ranks_go_first():
    queue = ratrod.FairQueue(1)
    order = begun(queue, (A, 1), (A, 1), (A, 1), (B, 1), (B, 1), (C, 2), (C, 0))
    for key in (A, C, A, B, A, B):
        queue.done(key)
    assert order == [0, 6, 1, 3, 2, 4, 5]


W, SMALL = ratrod.WINDOW, ratrod.POOR_WINDOW


@pytest.mark.parametrize("kept, key, short, out", [
    ({}, A, False, False),
    ({A: 3 * W}, A, False, False),
    ({A: 4 * W}, A, True, False),  # one window more would be over the half that a key may have
    ({A: 4 * W + 1}, A, True, True),
    ({A: 4 * W + 1}, B, False, False),
    ({A: 4 * W, B: 4 * W}, C, True, False),  # all of it is used, and somebody else has more
    ({A: 4 * W, B: 3 * W, C: W + 1}, A, True, True),
    ({A: 4 * W, B: 3 * W, C: W + 1}, B, True, False),
], ids=str)
def test_memory_is_bounded_in_all_and_for_each_key(kept, key, short, out):
    memory = ratrod.Memory(8 * W)
    for one, n in kept.items():
        memory.change(one, n)
    assert (memory.is_short(key), memory.is_out(key)) == (short, out)
    for one, n in kept.items():
        memory.change(one, -n)
    assert not memory.total and not memory.by_key and not memory.is_short(key)


class HalfRead:
    """A link of which half a record has come."""

    def __init__(self, key):
        self.peer_key = key


def test_of_the_links_that_hold_half_a_record_the_longest_waiting_is_read_on():
    memory = ratrod.Memory(8 * W)
    first, second, other = HalfRead(A), HalfRead(A), HalfRead(B)
    for link in (first, second, other):
        memory.hold(link)
    assert all(memory.may_read_on(link) for link in (first, second, other))
    memory.change(A, 5 * W)
    assert [memory.may_read_on(link) for link in (first, second, other, HalfRead(A))] == [True, False, True, True]
    assert memory.let_go(first) is second and memory.may_read_on(second)
    assert memory.let_go(second) is None and memory.let_go(other) is None and not memory._halves


def test_a_window_keeps_what_it_is_given():
    """A ring that grows, wraps around and is sealed from, the same bytes more than once."""
    rng, memory = random.Random(1), ratrod.Memory(8 * W)
    window, kept, scratch = ratrod.Window(memory, A), b"", memoryview(bytearray(2 * W))
    writer, reader = record_ends(CHACHA)
    for step in range(400):
        if step == 200:
            window.expect_bulk()
            assert window.is_bulk and memory.by_key == {A: W}
        data = rng.randbytes(rng.randrange(1, 3000)) if hasattr(rng, "randbytes") else bytes(rng.randrange(256) for _ in range(500))
        if len(kept) + len(data) < SMALL:
            window.append(memoryview(data))
            kept += data
        position = window.start + rng.randrange(len(kept))
        for _ in range(2):
            n, record = window.seal(position, rng.randrange(1, 2000), writer, scratch)
            kind, content, _ = reader.next(memoryview(bytearray(record)), 0, len(record))
            assert (kind, bytes(content)) == (ratrod.DATA, kept[position - window.start:][:n]) and n
        dropped = rng.randrange(len(kept))
        window.drop(window.start + dropped)
        kept = kept[dropped:]
        assert window.end - window.start == len(kept)
    window.drop(window.end)
    window.trim()
    assert not memory.total and not window._size


def test_a_window_grows_no_further_where_memory_is_short():
    memory = ratrod.Memory(8 * W)
    memory.change(A, 4 * W)
    for key, grows in ((A, False), (B, True)):
        window = ratrod.Window(memory, key)
        window.append(in_room(b"x"))
        window.expect_bulk()
        assert window.is_bulk == grows
    window.belong_to(C)
    assert memory.by_key == {A: 4 * W, C: W}


@pytest.mark.parametrize("error, seconds", [
    (ratrod.LinkSilent("nothing was heard"), 600), (ratrod.LinkSpoiled("it does not verify"), 600),
    (ratrod.LinkClosed("the path broke"), ratrod.DEFAULT_LIMITS.resume_after_close), (OSError("reset"), ratrod.DEFAULT_LIMITS.resume_after_close)])
def test_how_long_a_stream_waits_for_another_link(error, seconds):
    assert ratrod.resume_time(ratrod.DEFAULT_LIMITS, error) == seconds
    for resume in (0, 5):
        assert ratrod.resume_time(ratrod.DEFAULT_LIMITS._replace(resume=resume), error) == resume
