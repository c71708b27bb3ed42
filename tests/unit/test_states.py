"""Links and streams of PROTOCOL.md as a stateful test: two joined ends in one process, and all that can happen around them.

A World holds real Links and Streams with a real Opener and a real Acceptor, on one event loop that the test turns round by round, on a clock of
its own. A stream outlives its links: links are cut, and whatever happens, no byte is lost, doubled or out of order, no stream is connected twice,
and neither side believes that the other has taken more than it has.
"""

import os

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ratrod
from support import joined
from support.joined import ALL, BOTH_WAYS, END, FLIP, LARGE, RESET, SIDES, SILENCE, SMALL_WINDOW, TO_ACCEPTOR, TO_OPENER, World, other_side, outcomes

LONG = bool(os.environ.get("RATROD_LONG"))


@pytest.fixture
def window():
    """Of the world; a test that wants another one has it as a parameter."""
    return ratrod.WINDOW


@pytest.fixture
def world(window):
    with World(window=window) as made:
        yield made


@pytest.fixture
def connection(world):
    return join(world)


every_side = pytest.mark.parametrize("side", SIDES)
goes_on_or_has_ended = pytest.mark.parametrize("ends", [False, True], ids=["goes on", "has ended"])


def join(world):
    """A new connection, joined to its remote."""
    connection = world.originate()
    world.settle()
    return connection


def apps_of(connection, side):
    """The program on this side, and the other one."""
    return connection.app_of(side), connection.app_of(other_side(side))


def converse(connection, n=100):
    """Each side says n bytes and ends."""
    for app in connection.apps:
        app.write(n)
        app.end()


def end_whole(world, connection, links=None):
    """Both sides say something more, and everything arrives."""
    for _ in range(2):
        converse(connection)
        world.settle()
    end(world, connection)
    assert links is None or len(world.pairs) == links


def end(world, connection):
    """It is over, with all that was said on both sides."""
    assert outcomes(connection) == [END, END]
    world.finish()


def test_streams_follow_each_other_on_one_link_byte_by_byte(world):
    for _ in range(2):
        connection = world.originate()
        world.turn()
        converse(connection)
        for n in range(600):
            for pipe in world.pairs[0].pipes.values():
                pipe.pump(1)
            world.server.connect_all()
            if n == 300:
                converse(connection)
            world.turn()
            connection.app.read()
        world.settle()
        assert outcomes(connection) == [END, END]
        assert world.idle == [world.pairs[0].opener]
    assert len(world.pairs) == 1
    world.finish()


def test_the_first_byte_waits_for_no_answer(world):
    """Open and Data leave behind the client's last message of the handshake: neither HandshakeCompletion nor Opened has come back yet."""
    connection = world.originate(first=1)
    for _ in range(5):
        world.turn()
        for pair in world.pairs:
            pair.pipes[TO_ACCEPTOR].pump()
        world.server.connect_all()
    connection.remote.read()
    assert (connection.remote.received, world.pairs[0].pipes[TO_OPENER].moved) == (1, 0)
    end_whole(world, connection, links=1)


@pytest.mark.parametrize("is_last", [False, True])
def test_a_link_that_the_server_has_let_in_is_taken_first(world, is_last):
    """One that is made ahead may be refused yet, as by a server that is full: what is sent on it would be lost with it."""
    if not is_last:
        world.client.opener.put(world.add_pair().opener)  # whose HandshakeCompletion is still on its way
    known = world.add_pair()
    known.pipes[TO_OPENER].pump()
    world.client.opener.put(known.opener)
    if is_last:
        world.client.opener.put(world.add_pair().opener)
    world.turn()
    connection = world.originate(first=1)
    world.turn()
    assert connection.stream.link is known.opener
    end_whole(world, connection)


def test_to_look_at_one_link_leaves_the_records_of_another_alone(world):
    """They may stand in the loop's buffer: an Open with first bytes asks for one more link to wait."""
    pair, shared = world.add_pair(), world.loop.scratch_in
    for _ in range(100):
        pair.acceptor.send_record(ratrod.KEEPALIVE)
    pair.pipes[TO_OPENER].pump()
    shared[:4096] = b"x" * 4096
    pair.opener.poll()
    assert pair.opener.is_completed and world.loop.scratch_in is shared and bytes(shared[:4096]) == b"x" * 4096


def test_to_look_at_a_link_that_sends_a_record_without_end_leaves_the_loop_its_buffers(world):
    """An idle link has no such record to send: what was lent for it must not be too short for the next one who borrows."""
    pair, shared, lent = world.add_pair(), world.loop.scratch_in, world.loop._lent
    world.settle()
    pair.pipes[TO_OPENER].sink.send((500_000).to_bytes(4, "big") + bytes(20_000))
    pair.opener.poll()
    assert pair.opener.unread.end == 20_004 and world.loop.scratch_in is shared
    pair.opener.lose(ratrod.LinkClosed("it is of no use"))
    assert world.loop._lent == lent and {len(buffer) for buffer in world.loop._spare} == {len(shared)}


def test_an_old_link_takes_no_new_stream():
    """What is open on it goes on. That UDP moves to another is in system/test_fuzz.py."""
    with World(limits=ratrod.DEFAULT_LIMITS._replace(link_age=100.0, idle_time=1000.0)) as world:
        lasting, ended = join(world), join(world)
        converse(ended)
        world.settle()
        for seconds, is_old in ((50, False), (70, True)):
            world.pass_time(seconds)
            another = world.originate(first=1)
            world.settle()
            assert (another.stream.link in [pair.opener for pair in world.pairs[:2]]) != is_old
            converse(another)
            world.settle()
        end_whole(world, lasting)


@pytest.mark.parametrize("how", [END, RESET])
@pytest.mark.parametrize("first", [0, 1, LARGE])
@goes_on_or_has_ended
@pytest.mark.parametrize("when", ["before the Open arrives", "while it connects", "before Opened arrives"])
def test_an_open_whose_link_is_lost_goes_on_over_another(world, how, first, ends, when):
    """The remote is connected to once, and hears everything once."""
    world.server.hesitates = when == "while it connects"
    connection = world.originate(first=first)
    world.turn()
    if ends:
        connection.app.end()
    world.turn()
    if when != "before the Open arrives":
        world.pairs[0].pipes[TO_ACCEPTOR].pump()
        world.turn()
        world.server.hesitates or world.server.connect_all()
        world.turn()
    world.pairs[0].cut(how)
    world.rounds(5)
    world.server.hesitates = False
    world.settle()
    end_whole(world, connection, links=2)


def test_a_refused_stream_that_no_other_link_could_carry_leaves_no_number(world):
    world.server.hesitates = True
    world.originate()
    world.turn()
    world.pairs[0].acceptor.is_resumable = False  # as one of the original's wire
    world.settle()
    world.server.refuse(world.server.asked[0])
    assert not world.server.acceptor._ended._count


def test_bytes_that_follow_open_bind_a_stream_to_its_instance(world):
    """Another worker would open it a second time."""
    connection = world.originate(first=0)
    world.turn()
    link = world.pairs[0].opener
    before = link.user.instance
    connection.app.write(1)
    world.turn()
    assert (before, link.user.instance) == (b"", link.instance)


@pytest.mark.parametrize("first", [0, 1, LARGE])
@pytest.mark.parametrize("later", [0, 1, LARGE])
@goes_on_or_has_ended
def test_close_moves_open_and_kept_data_and_end(world, first, later, ends):
    world.server.leaves = True
    connection = world.originate(first=first)
    connection.app.write(later)
    if ends:
        connection.app.end()
    world.turn(10)
    world.settle()
    end_whole(world, connection, links=2)


def test_close_in_answer_to_an_attach_opens_no_second_stream(world, connection):
    """The acceptor closed an idle link when the Open was on its way, and knows the stream."""
    other = world.add_pair()
    world.idle.append(other.opener)
    world.server._leave(other.acceptor)  # the Close is on its way
    connection.app.write(100)
    world.turn()
    world.clock.now += 12  # longer than a new stream may wait
    connection.stream.link.lose(ratrod.LinkSilent("the path is gone"))
    world.settle()
    end_whole(world, connection)


@pytest.mark.parametrize("how", [END, RESET, "Close", "Keepalive and end"])
def test_an_idle_link_that_has_ended_takes_no_stream(world, how):
    converse(join(world))
    world.settle()
    pair = world.pairs[0]
    assert world.idle == [pair.opener]
    world.clock.now += 1  # what was heard a moment ago is taken without a look
    world.turn()
    if how == "Close":
        world.server._leave(pair.acceptor)
        pair.pipes[TO_OPENER].pump()
    elif how == "Keepalive and end":
        pair.acceptor.send(pair.acceptor.writer.record(ratrod.KEEPALIVE))
        pair.pipes[TO_OPENER].pump()
        pair.cut(END)
    else:
        pair.cut(how)
    connection = world.originate(first=100)
    world.settle()
    assert connection.stream.attempt == 1
    end_whole(world, connection, links=2)


@every_side
def test_half_close_over_another_link(world, connection, side):
    one, other = apps_of(connection, side)
    one.write(10)
    one.end()
    world.settle()
    assert (one.outcome, other.outcome, other.received) == (None, END, 10)
    world.pairs[0].cut(RESET)
    world.settle()
    other.write(LARGE)
    world.settle()
    assert (one.outcome, one.received) == (None, other.sent)
    other.end()
    world.settle()
    end(world, connection)


def test_what_is_taken_is_acknowledged(world, connection):
    """At once where it is much, a second later where it is little, and End with it; and then nothing is kept."""
    for app, stream in zip(connection.apps, connection.streams):
        app.write(ratrod.ACK_AFTER)
        world.settle()
        assert stream.out.acked == ratrod.ACK_AFTER
        app.write(1)
        world.settle()
        assert stream.out.acked == stream.out.start == ratrod.ACK_AFTER
        world.pass_time(2)
        assert stream.out.acked == ratrod.ACK_AFTER + 1
    connection.app.end()
    world.settle()
    world.pass_time(2)
    assert connection.stream.out.acked == ratrod.ACK_AFTER + 2
    world.pass_time(2)
    assert (world.client.memory.total, world.server.memory.total) == (0, 0)
    end_whole(world, connection, links=1)


@every_side
def test_the_tail_is_kept_until_it_is_acknowledged(world, connection, side):
    """Over is lost, or the opener's last Ack: the other side asks for what it lacks."""
    converse(connection)
    pair, carried = world.pairs[0], TO_ACCEPTOR if side == joined.ORIGINATOR else TO_OPENER
    for _ in range(8):
        pair.pipes[carried].pump()
        world.turn()
    pair.cut(RESET)
    world.settle()
    end(world, connection)


@every_side
def test_a_reset_after_its_own_end_is_noticed(world, connection, side):
    """Its socket is not read any more, and nobody writes to it."""
    app, other = apps_of(connection, side)
    app.end()
    world.settle()
    assert other.outcome == END
    connection.is_disturbed = True
    app.reset(lose=False)
    world.pass_time(5)
    assert other.local.aborted
    world.finish()


@every_side
def test_a_local_failure_while_no_link_is_there_reaches_the_other_side(world, connection, side):
    """By Abandon on the next idle link, or by Error at the next attempt."""
    for app in connection.apps:
        app.write(100)
    world.settle()
    world.client.opener.is_reachable = False
    world.pairs[0].cut(RESET)
    world.settle()
    connection.is_disturbed = True
    app, other = apps_of(connection, side)
    app.reset(lose=False)
    world.pass_time(5)
    assert connection.stream_of(side).is_over and other.outcome is None
    world.client.opener.is_reachable = True
    following = join(world)  # what a client abandoned is said on the next idle link
    assert other.local.aborted
    converse(following)
    world.finish()


@pytest.mark.parametrize("error", [ratrod.LinkSilent("--resume 0"), RuntimeError("a bug")], ids=str)
def test_a_client_that_resumes_nothing_says_so_to_a_server_that_would_wait(world, connection, error):
    connection.app.write(1)
    world.settle()
    world.client.limits = world.client.limits._replace(resume=0)
    world.pairs[0].opener.abort(error)
    connection.is_disturbed = True
    world.settle()
    following = join(world)
    assert connection.app.dead and connection.remote.outcome == RESET
    end_whole(world, following)


def hold_up(world, connection, side):
    """Sends to `side`, which does not read, until its link processes nothing more; then both sides end. Returns the program there, and its link."""
    reader, writer = apps_of(connection, side)
    reader.reads = False
    while not connection.stream_of(side).link.is_held:
        writer.write(ALL)
        world.rounds(3)
    converse(connection)
    world.settle()
    return reader, connection.stream_of(side).link


@pytest.mark.parametrize("event", ["Over", "Close", "loss"])
@every_side
def test_what_waits_for_a_slow_program(world, connection, side, event):
    """Both Ends are on their way, and one local socket has not taken everything: no Over, or nothing done with the link, before it has. Where the
    link is lost, what waits is delivered, and what the window holds is sent again."""
    world.server.leaves = event == "Close"
    reader, _ = hold_up(world, connection, side)
    if event == "loss":
        for how in (RESET, END):
            world.open_pairs[0].cut(how)
            world.settle()
    else:
        world.pass_time(120)
        assert not world.idle
    assert reader.outcome is None
    reader.reads = True
    world.settle()
    assert world.idle == ([] if event == "Close" else [world.open_pairs[0].opener])
    end(world, connection)


@every_side
def test_a_program_that_goes_away_after_both_ends(world, connection, side):
    """Its bytes are not all in its socket yet: until they are, a failure is the stream's. An Error says so, however slow the path is."""
    app, link = hold_up(world, connection, side)
    connection.is_disturbed = True
    app.reset(lose=True)
    world.turn(10)
    assert link.state == ratrod.BYE
    world.settle()
    assert app.local.aborted
    assert world.pairs[0].is_closed
    if side == joined.REMOTE:
        error = connection.stream.error
        assert (type(error), error.code) == (ratrod.PeerError, ratrod.REMOTE_FAILED)
    world.finish()


def test_many_small_records_take_turns(world, connection):
    """What has come at once is not processed at once: others get their turn after each so many records, and the order stays."""
    (app, remote), pipe = connection.apps, world.pairs[0].pipes[TO_ACCEPTOR]
    records, count = b"", 4 * ratrod.RECORDS_IN_TURN
    for _ in range(count):
        app.write(1)
        world.turn()
        records += pipe.source.recv(ALL)
    pipe.held = records
    pipe.pump()
    for _ in range(count // ratrod.RECORDS_IN_TURN + 1):
        before = remote.received
        world.turn()
        remote.read()
        assert remote.received - before <= 2 * ratrod.RECORDS_IN_TURN, "those of the read, and those of the round's other turn"
    assert remote.received == count
    end_whole(world, connection)


@pytest.mark.parametrize("window", [SMALL_WINDOW, ratrod.WINDOW])
def test_everything_full(world, connection):
    """Both programs write and neither reads: each end holds what it may hold and no more, for minutes, and then delivers it all. No Ack can come,
    and to wait for one would be for ever."""
    for app in connection.apps:
        app.reads = False
    before = None
    while before != world.picture():
        before = world.picture()
        for app in connection.apps:
            app.write(ALL)
        world.rounds(2)
    assert all(app.sent > LARGE for app in connection.apps)
    world.pass_time(300)
    assert outcomes(connection) == [None, None] and len(world.pairs) == 1
    connection.has_skipped = False  # its link is not lost: all of it must arrive
    world.finish()
    assert outcomes(connection) == [END, END]


@pytest.mark.parametrize("window", [SMALL_WINDOW])
@every_side
def test_a_reader_that_takes_nothing_stops_the_writer_at_the_window(world, connection, side):
    reader, writer = apps_of(connection, side)
    reader.reads = False
    for _ in range(50):
        writer.write(ALL)
        world.rounds(2)
    stream = connection.stream_of(other_side(side))
    assert stream.out.sent - stream.out.acked <= SMALL_WINDOW
    reader.reads = True
    end_whole(world, connection, links=1)


def whole_streams(world, direction, limits):
    """Short conversations at once, each on its own link; of `direction` only so many bytes are carried. Returns the connections and their pairs."""
    connections = [world.originate() for _ in limits]
    while len(world.pairs) < len(limits):
        world.turn()
    for n in range(40):
        for limit, pair in zip(limits, world.pairs):
            for way, pipe in pair.pipes.items():
                left = limit - pipe.moved if way == direction else ALL
                if left > 0:
                    pipe.pump(left)
        world.server.connect_all()
        for connection in connections if n in (0, 10) else ():
            converse(connection, 10)
        world.turn()
    return connections, world.pairs[:]


@pytest.mark.parametrize("direction", BOTH_WAYS)
@pytest.mark.parametrize("first, how", [(0, END), (1, RESET), (2, FLIP)])
def test_a_path_that_breaks_after_any_byte(direction, first, how):
    """finish() holds every end against what was sent: what is whole on both sides. In the short form each byte is one way's alone."""
    with World() as world:
        length = whole_streams(world, direction, [ALL])[1][0].pipes[direction].moved
    assert length > 70  # ChaCha20-Poly1305 alone has shorter records
    positions = list(range(0 if LONG else first, length + 1, 1 if LONG else 3))
    for some in (positions[at:at + 25] for at in range(0, len(positions), 25)):
        with World() as world:
            connections, pairs = whole_streams(world, direction, some)
            for pair in pairs:
                pair.cut(how, (direction,))
            if how == FLIP:
                # Where it has made a record longer, only the end of the path can show it.
                world.let_all_end()
                for pair in pairs:
                    pair.cut(END)
            world.finish()
            assert [outcomes(connection) for connection in connections] == [[END, END]] * len(some), some


class Streams(RuleBasedStateMachine):
    """A few streams at once and one after the other, on as many links as it takes."""

    numbers, rounds = st.integers(0, 5), st.integers(0, 4)
    sides, directions = st.sampled_from(SIDES), st.sampled_from(BOTH_WAYS)
    some_sides = st.sampled_from((SIDES, SIDES[:1], SIDES[1:]))
    some_directions = st.sampled_from((BOTH_WAYS, (TO_ACCEPTOR,), (TO_OPENER,)))
    sizes = st.sampled_from((joined.SMALL, LARGE))

    has_live = precondition(lambda self: self.world.live)
    has_pairs = precondition(lambda self: self.world.open_pairs)
    has_asked = precondition(lambda self: self.world.server.asked)
    may_do_damage = precondition(lambda self: self.damages <= len(self.world.connections) // 3)  # most streams are to get somewhere

    def __init__(self):
        super().__init__()
        self.world, self.damages = None, 0

    def teardown(self):
        if self.world:
            with self.world:
                self.world.finish()

    @initialize(size=sizes, records=st.sampled_from((1, 3, ratrod.RECORDS_IN_TURN)), window=st.sampled_from((SMALL_WINDOW, ratrod.WINDOW)))
    def begin(self, size, records, window):
        self.world = World(size, window=window)
        self.world.patch("RECORDS_IN_TURN", records)
        self.world.originate(size)

    @invariant()
    def check(self):
        self.world.check()

    @staticmethod
    def one_of(things, number):
        return things[number % len(things)]

    def app(self, number, side):
        return self.one_of(self.world.live, number).app_of(side)

    # ---- what programs do

    @precondition(lambda self: len(self.world.live) < 3)
    @rule(size=sizes, remote_size=sizes, first=st.sampled_from((0, 100, 70_000)), rounds=rounds)
    def originate(self, size, remote_size, first, rounds):
        self.world.originate(size, remote_size, first)
        self.world.rounds(rounds)

    @has_live
    @rule(number=numbers, side=sides, n=st.sampled_from((1, 100, 5_000, 70_000, 400_000)), times=st.sampled_from((1, 1, 4, 12)), rounds=rounds)
    def write(self, number, side, n, times, rounds):
        app = self.app(number, side)
        for _ in range(times):
            app.write(n)
            self.world.rounds()
        self.world.rounds(rounds)

    @has_live
    @rule(number=numbers, whom=some_sides, rounds=st.integers(0, 12))
    def end(self, number, whom, rounds):
        for side in whom:
            self.app(number, side).end()
        self.world.rounds(rounds)

    @may_do_damage
    @has_live
    @rule(number=numbers, side=sides, lose=st.booleans(), rounds=rounds)
    def reset(self, number, side, lose, rounds):
        self.damages += 1
        connection = self.one_of(self.world.live, number)
        connection.is_disturbed = True
        connection.app_of(side).reset(lose)
        self.world.rounds(rounds)

    @has_live
    @rule(number=numbers, side=sides, reads=st.booleans(), n=st.sampled_from((0, 1, 1000)))
    def read_a_little(self, number, side, reads, n):
        """From then on it reads all that comes, or nothing."""
        app = self.app(number, side)
        app.reads = reads
        if n:
            app.read(n)

    # ---- what the acceptor meets

    @rule(hesitates=st.booleans(), leaves=st.booleans())
    def change_its_mind(self, hesitates, leaves):
        self.world.server.hesitates = hesitates
        self.world.server.leaves |= leaves

    @has_asked
    @rule(number=numbers, rounds=rounds)
    def connect(self, number, rounds):
        self.world.server.connect(self.one_of(self.world.server.asked, number))
        self.world.rounds(rounds)

    @may_do_damage
    @has_asked
    @rule(number=numbers, rounds=rounds)
    def refuse(self, number, rounds):
        self.damages += 1
        self.world.server.refuse(self.one_of(self.world.server.asked, number))
        self.world.rounds(rounds)

    # ---- what the path does

    @rule(turns=st.integers(1, 3))
    def turn(self, turns):
        self.world.turn(turns)

    @rule(rounds=st.integers(1, 20))
    def everything_moves(self, rounds):
        self.world.rounds(rounds)

    @has_pairs
    @rule(number=numbers, direction=directions, n=st.sampled_from((1, 3, 50, ALL)))
    def pump(self, number, direction, n):
        self.one_of(self.world.open_pairs, number).pipes[direction].pump(n)

    @has_pairs
    @rule(number=numbers, n=st.integers(1, 150))
    def trickle(self, number, n):
        """A byte at a time in both directions."""
        pair = self.one_of(self.world.open_pairs, number)
        for _ in range(n):
            for pipe in pair.pipes.values():
                pipe.pump(1)
            self.world.turn()

    @has_pairs
    @rule(number=numbers, how=st.sampled_from((END, RESET, FLIP)), whom=some_directions, rounds=rounds)
    def cut(self, number, how, whom, rounds):
        """No damage: whatever is on the link goes on over another one."""
        self.one_of(self.world.open_pairs[::-1], number).cut(how, whom)
        self.world.rounds(rounds)

    @may_do_damage
    @has_pairs
    @rule(number=numbers, whom=some_directions, rounds=rounds)
    def fall_silent(self, number, whom, rounds):
        self.damages += 1
        self.one_of(self.world.open_pairs[::-1], number).cut(SILENCE, whom)
        self.world.rounds(rounds)

    @rule(whether=st.booleans(), rounds=rounds)
    def come_or_go(self, whether, rounds):
        """No link can be made for a while."""
        self.world.client.opener.is_reachable = whether
        self.world.client.opener.want_links()
        self.world.rounds(rounds)

    @rule(seconds=st.sampled_from((2, 5, 25, 60)))
    def pass_time(self, seconds):
        """Where no link or remote comes in time, streams may be given up."""
        self.world.rounds(12)  # a link that was cut a moment ago is noticed
        for connection in self.world.live:
            waits = any(stream.link is None for stream in connection.streams) or not connection.stream.was_opened
            if waits and (not self.world.client.opener.is_reachable or self.world.server.hesitates):
                connection.is_disturbed = True
        self.world.pass_time(seconds)


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=1000 if LONG else 40, stateful_step_count=40, deadline=None, database=None,
                                derandomize="CI" in os.environ, report_multiple_bugs=False,
                                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
