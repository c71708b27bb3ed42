"""Section 6 of ratrod.py, the Noise handshake of ratrod2, against PROTOCOL.md, the vectors and `noiseprotocol`; and what it has in common with
the legacy one. All of it on older PyNaCl too."""

import contextlib
import functools
import itertools
import json
import pathlib
import typing

import pytest

import ratrod
import test_core as core
import test_core_legacy as legacy
from ratrod import AuthenticationError, LocalProtocolError, RatrodError, RemoteProtocolError
from support import ratrod2_peer as peer
from support.ratrod2_peer import OPENING, SMALL_ORDER_POINTS, Identity, negative, odd_keypair
from support.rows import assert_raises, row
from test_core import AEGIS, CHACHA, CLIENT, SERVER, STREAM, accept, both_suites, feed, flipped, read_records, shake, started, write_data

NOISE, RATROD2 = (json.loads((pathlib.Path(__file__).resolve().parents[1] / "support" / "vectors" / name).read_text())
                  for name in ("noise_xx_25519_chachapoly_sha256.json", "ratrod2.json"))

# ---------------------------------------------------------------------------------------------------- 6. Noise, and the vectors


def unhex(vector, *names):
    return [bytes.fromhex(vector[name]) for name in names]


def suite_of(vector):
    found = [suite for suite in core.SUITES if suite.id == vector["suite"]]
    return found[0] if found else pytest.skip("this PyNaCl has no AEGIS-128L")


every_vector = pytest.mark.parametrize("vector", RATROD2, ids=lambda vector: "suite %d" % vector["suite"])
# The client of the vectors offers both suites; what it offers is a number, whatever its own libsodium can do.
OFFER = [AEGIS, CHACHA]


@pytest.mark.parametrize("vector", NOISE, ids=lambda vector: vector["protocol_name"])
def test_noise_vector(vector):
    assert vector["protocol_name"].encode() == ratrod.NOISE_NAME
    initiator = ratrod.HandshakeState(True, *unhex(vector, "init_prologue", "init_static", "init_ephemeral"))
    responder = ratrod.HandshakeState(False, *unhex(vector, "resp_prologue", "resp_static", "resp_ephemeral"))
    ends = itertools.cycle([(initiator, responder), (responder, initiator)])
    messages = [unhex(message, "payload", "ciphertext") for message in vector["messages"]]
    for (payload, ciphertext), (sender, receiver) in zip(messages[:3], ends):
        assert sender.write_message(payload) == ciphertext
        assert receiver.read_message(ciphertext) == payload
    k1, k2, h = initiator.split()
    assert (k1, k2, h) == responder.split()
    assert h.hex() == vector["handshake_hash"]
    # Transport messages go on in turns, so the next is the responder's.
    states = {key: [ratrod.CipherState(CHACHA, key) for _ in range(2)] for key in (k1, k2)}
    for (payload, ciphertext), key in zip(messages[3:], itertools.cycle([k2, k1])):
        assert states[key][0].encrypt_with_ad(b"", payload) == ciphertext
        assert states[key][1].decrypt_with_ad(b"", ciphertext) == payload


def framed(message):
    return len(message).to_bytes(2, "big") + message


@every_vector
def test_ratrod2_vector_handshake(vector):
    c_seed, c_e, s_seed, s_e = unhex(vector, "client_seed", "client_ephemeral", "server_seed", "server_ephemeral")
    client = client_end(ratrod.KeyPair.from_seed(c_seed), ephemeral=c_e, suites=OFFER)
    instance = bytes.fromhex(vector["payloads"][1])[33:]
    server = server_end(ratrod.KeyPair.from_seed(s_seed), ephemeral=s_e, suites=[suite_of(vector)], instance=instance)
    first, second, third = unhex({str(n): message for n, message in enumerate(vector["messages"])}, "0", "1", "2")
    assert ratrod.OPENING.hex() == vector["prologue"]
    sent = client.data_to_send()
    assert sent.hex() == vector["first_bytes_of_client"]
    assert sent == ratrod.OPENING + framed(first)
    assert feed(server, [sent]) == b""
    assert server.data_to_send() == framed(second)
    assert feed(client, [framed(second)]) == b""
    assert client.data_to_send() == framed(third)
    assert feed(server, [framed(third)]) == b""
    assert client.is_done and server.is_done
    assert (server.peer_key, client.peer_key) == tuple(unhex(vector, "client_identity", "server_identity"))
    assert client.instance == server.instance == b"instan\1\0"
    keys = unhex(vector, "client_to_server_key", "server_to_client_key")
    assert [[cipher._key for cipher in (end.writer, end.reader)] for end in (client, server)] == [keys, keys[::-1]]
    assert read_records(client.reader, [server.data_to_send()]) == ([(ratrod.COMPLETED, ratrod.__version__)], 0)


@every_vector
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "public"])
@pytest.mark.parametrize(("k", "key", "records"), [
    ("k1", "client_to_server_key", "client_records"), ("k2", "server_to_client_key", "server_records")], ids=["client", "server"])
def test_ratrod2_vector_records(vector, fast, k, key, records):
    suite = core.make_suite(suite_of(vector), fast)
    made = ratrod.record_key(suite, *unhex(vector, k, "handshake_hash"))
    assert made == bytes.fromhex(vector[key])
    writer, reader = ratrod.RecordWriter(suite, made), ratrod.RecordReader(suite, made)
    for record in vector[records]:
        kind, (content, wire) = record["type"], unhex(record, "content", "wire")
        message = content if kind == ratrod.DATA else ratrod.decode_open(content) if kind == ratrod.OPEN else ratrod.decode_content(kind, content)
        assert core.write(writer, kind, message) == wire
        assert read_records(reader, [wire]) == ([(kind, message)], 0)


INSTANCE = b"instance"


def client_end(keys=CLIENT, **options):
    fixed = {"check_key": accept, "ephemeral": core.E_CLIENT, "suites": ratrod.offered_suites()}
    return started(ratrod.NoiseClientHandshake(keys, **{**fixed, **options}))


def server_end(keys=SERVER, **options):
    fixed = {"check_key": accept, "ephemeral": core.E_SERVER, "suites": ratrod.offered_suites(), "instance": INSTANCE}
    return started(ratrod.NoiseServerHandshake(keys, **{**fixed, **options}))


# ---------------------------------------------------------------------------------------------------- 6. the handshakes of both wires


class Wire(typing.NamedTuple):
    client_end: typing.Callable
    server_end: typing.Callable
    pieces: list  # of each message, as they are read: the last has the size that the one before it says
    early: tuple  # a record that may follow the client's last message at once
    uncovered: typing.Callable  # where in a message nobody notices another byte
    attests: bool  # whether each message vouches for all that came before it; and who refuses one says nothing more


def legacy_wire(should_encrypt):
    return Wire(functools.partial(legacy.client_end, should_encrypt=should_encrypt), legacy.server_end, [(1, 8, 77), (1, 8, 176), (1, 8, 110)],
                (ratrod.DATA, b"early"), legacy.uncovered, False)


WIRES = {"ratrod2": Wire(functools.partial(client_end, suites=OFFER), server_end, [(8, 2, 35), (2, 137), (2, 96)],
                         (ratrod.OPEN, ratrod.Open(ratrod.TCP, "db:5432", b"s" * 16, 1)), lambda message: (), True),
         "legacy": legacy_wire(False), "legacy, encrypted": legacy_wire(True)}
every_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)


def sent_by(wire):
    """The three messages of a handshake."""
    client, server = wire.client_end(), wire.server_end()
    sent = []
    for sender, receiver in core.turns(client, server):
        sent.append(sender.data_to_send())
        feed(receiver, sent[-1:])
    return sent


@every_wire
def test_records_may_follow_the_handshake_at_once(wire):
    # The first of them leaves together with message 3: the handshake takes its own bytes and leaves the rest where it is.
    client, server = wire.client_end(), wire.server_end()
    feed(server, [client.data_to_send()])
    feed(client, [server.data_to_send()])
    early = core.write(client.writer, *wire.early)
    assert feed(server, [client.data_to_send() + early]) == early
    assert read_records(server.reader, [early]) == ([wire.early], 0)


@every_wire
def test_wanted_is_what_the_next_step_needs(wire):
    # And so nothing is read ahead of authentication but the message that must come. To give it more is our mistake.
    client, server = wire.client_end(), wire.server_end()
    for (sender, receiver), pieces in zip(core.turns(client, server), wire.pieces):
        data = sender.data_to_send()
        for n in pieces:
            pytest.raises(LocalProtocolError, receiver.receive_data, data[:n + 1].ljust(n + 1))
            for have in range(n):
                assert receiver.wanted == n - have
                receiver.receive_data(data[:1])
                data = data[1:]
    for end in (client, server):
        assert end.wanted == 0
        pytest.raises(LocalProtocolError, end.receive_data, b"x")
        end.receive_data(b"")


@every_wire
def test_an_end_inside_a_handshake_is_an_error(wire):
    for sent, make in zip(sent_by(wire), (wire.server_end, wire.client_end)):
        for at in range(len(sent)):
            end = make()
            end.data_to_send()
            feed(end, [sent[:at]])
            assert not end.is_done and end.data_to_send() == b""
            pytest.raises(RemoteProtocolError, end.receive_eof)


@every_wire
def test_every_flipped_byte_of_a_handshake(wire):
    # Of legacy messages, those that are signed.
    for which, message in enumerate(sent_by(wire)):
        uncovered = wire.uncovered(message)
        for at, wrong in flipped(message):
            if at not in uncovered:
                with row((which, at, wrong[at])):
                    check_noticed(wire, which, at, wrong)


def check_noticed(wire, which, at, wrong):
    """`wrong` in place of the `which`-th message, with another byte at `at`, ends a handshake: it is refused or, where it is taken, a later one."""
    asked = []
    client, server = wire.client_end(), wire.server_end(check_key=asked.append)
    try:
        for number, (sender, receiver) in enumerate(core.turns(client, server)):
            sent = sender.data_to_send()
            feed(receiver, [wrong if number == which else sent])
    except RemoteProtocolError:
        pass
    else:
        # A length became longer: who reads it waits for more.
        *before, length, _ = wire.pieces[which]
        assert sum(before) <= at < sum(before) + length
        pytest.raises(RemoteProtocolError, (client if which == 1 else server).receive_eof)
    assert not receiver.is_done and not server.is_done and client.data_to_send() == b"" and not asked
    if wire.attests:  # then no client goes on to message 3
        assert client.is_done == (which == 2) and server.data_to_send() == b""


# ---------------------------------------------------------------------------------------------------- 6. the handshake of ratrod2


@both_suites
@core.every_cut
def test_joined_in_memory(suite, cut):
    client, server = client_end(suites=OFFER), server_end(suites=[suite])
    core.check_joined(client, server, shake(client, server, cut), (ratrod.COMPLETED, ratrod.__version__), STREAM[1:], cut)
    assert client.suite == server.suite and suite.name in client.suite


@both_suites
def test_reflected_records_are_refused(suite):
    # Each direction has its own key, and each link its own ephemeral keys.
    assert len({client_end(ephemeral=None).data_to_send() for _ in range(5)}) == 5
    client, server = client_end(suites=OFFER), server_end(suites=[suite])
    last = shake(client, server)
    assert read_records(client.reader, [last])[1] == 0
    for end in (client, server):
        pytest.raises(RemoteProtocolError, core.read_one, end.reader, write_data(end.writer, b"hello"))


def test_an_error_is_final():
    # Whatever is fed afterwards, a handshake that failed is never done.
    for end in (client_end(), server_end()):
        feed(end, [OPENING] if end.wanted == 8 else [])
        pytest.raises(RemoteProtocolError, feed, end, [b"\xff\xff"])
        with contextlib.suppress(RatrodError):
            for _ in range(3):
                end.receive_data(bytes(min(end.wanted, 2)))
        assert not end.is_done


def test_a_replayed_or_reflected_session_is_refused():
    # The same client bytes again meet another ephemeral key.
    sent = sent_by(WIRES["ratrod2"])
    again, reflected = server_end(ephemeral=b"\x33" * 32), client_end()
    feed(again, sent[:1])
    again.data_to_send()
    for end, data in ((again, sent[2]), (reflected, reflected.data_to_send()[len(OPENING):].ljust(200, b"\0"))):
        pytest.raises(RatrodError, feed, end, [data])
        assert end.data_to_send() == b""


class PeerClient:
    """`noiseprotocol` as the client of a server of ours, every step of it open to being done wrongly."""

    def __init__(self, server, seed=CLIENT.seed, offer=b"\2\1\2", claimed=None, **noise):
        self.server, self.identity = server, Identity.from_seed(seed)
        self.claimed = self.identity.public if claimed is None else claimed
        self.noise = peer.Handshake(noise.pop("static", self.identity.static_private), True, **noise)
        self.first = OPENING + framed(self.noise.write_message(offer))

    def say_hello(self):
        """The payload of message 2."""
        assert feed(self.server, [self.first]) == b""
        return self.noise.read_message(self.server.data_to_send()[2:])

    def authenticate(self):
        """The suite of the records that follow message 3."""
        suite = peer.SUITES[self.say_hello()[32]]
        assert feed(self.server, [framed(self.noise.write_message(self.claimed))]) == b""
        return suite


class PeerServer:
    """... and as the server of a client of ours."""

    def __init__(self, client, seed=SERVER.seed, suite=2, claimed=None, **noise):
        self.client, identity = client, Identity.from_seed(seed)
        self.noise = peer.Handshake(noise.pop("static", identity.static_private), False, **noise)
        self.payload = (identity.public if claimed is None else claimed) + bytes((suite,)) + INSTANCE

    def answer(self):
        """The client's offer, after message 2 has been given to it."""
        sent = self.client.data_to_send()
        assert sent[:8] == OPENING
        offer = self.noise.read_message(sent[10:])
        assert feed(self.client, [framed(self.noise.write_message(self.payload))]) == b""
        return offer

    def authenticate(self):
        self.answer()
        return self.noise.read_message(self.client.data_to_send()[2:])


def exchange(ours, noise, suite):
    """Records both ways with the independent peer."""
    to_server, to_client = noise.record_keys(suite)
    key_of_writer, key_of_reader = (to_server, to_client) if noise.initiator else (to_client, to_server)
    writer, reader = peer.RecordWriter(suite, key_of_writer), peer.RecordReader(suite, key_of_reader)
    if noise.initiator:
        assert reader.open(ours.data_to_send())[:2] == (peer.HANDSHAKE_COMPLETION, peer.encode_str(ratrod.__version__))
    else:
        wire = writer.seal(peer.HANDSHAKE_COMPLETION, peer.encode_str("9.9"))
        assert read_records(ours.reader, [wire]) == ([(ratrod.COMPLETED, "9.9")], 0)
    for n in range(5):
        assert read_records(ours.reader, [writer.seal(peer.DATA, b"to us %d" % n)]) == ([(ratrod.DATA, b"to us %d" % n)], 0)
        assert reader.open(write_data(ours.writer, b"to them %d" % n))[:2] == (peer.DATA, b"to them %d" % n)


@both_suites
def test_noiseprotocol_at_the_other_end(suite):
    server = server_end(suites=[suite])
    client = PeerClient(server)
    their_suite = client.authenticate()
    assert their_suite.id == suite.id
    assert (server.is_done, server.peer_key) == (True, CLIENT.public)
    exchange(server, client.noise, their_suite)
    client = client_end(suites=OFFER)
    server = PeerServer(client, suite=suite.id)
    assert server.authenticate() == CLIENT.public
    assert (client.is_done, client.peer_key) == (True, SERVER.public)
    exchange(client, server.noise, peer.SUITES[suite.id])


def test_what_follows_a_known_payload_is_ignored():
    # So that a later version can add some.
    server = server_end()
    client = PeerClient(server, offer=b"\1\2" + b"later", claimed=CLIENT.public + b"later")
    exchange(server, client.noise, client.authenticate())
    client = client_end()
    server = PeerServer(client)
    server.payload += b"later"
    server.authenticate()
    exchange(client, server.noise, peer.CHACHA)


@pytest.mark.parametrize(("offer", "ours", "chosen"), [
    (b"\2\1\2", (1, 2), 1), (b"\2\2\1", (1, 2), 2), (b"\2\1\2", (2, 1), 1), (b"\2\1\2", (2,), 2), (b"\1\2", (1, 2), 2), (b"\4\7\2\1\x09", (1, 2), 2),
    (b"\3\2\2\2", (1, 2), 2), (b"\xff" + bytes(range(255)), (1, 2), 1)])
def test_the_server_takes_the_first_suite_that_it_offers_itself(offer, ours, chosen):
    # What AEGIS would do matters only after message 2.
    server = server_end(suites=[{1: AEGIS, 2: CHACHA}[number] for number in ours])
    assert PeerClient(server, offer=offer).say_hello() == SERVER.public + bytes((chosen,)) + INSTANCE


def check_refused(end, step, error=RemoteProtocolError, match=None):
    """In this step of the independent peer's our end says no more, and is not done."""
    assert_raises(error, match, step)
    assert end.data_to_send() == b"" and not end.is_done


def test_payloads_that_are_refused():
    # Offers without suite 2 or cut short, and an answer that names another.
    for offer in (b"", b"\0", b"\0\2", b"\1", b"\1\1", b"\2\1\7", b"\2\2", b"\3\1\2", b"\xff" + bytes(254), b"\1\0\2"):
        with row(offer):
            server = server_end()
            check_refused(server, PeerClient(server, offer=offer).say_hello)
    for offered, chosen in (((2,), 1), ((1, 2), 0), ((1, 2), 3), ((2,), 255)):
        with row((offered, chosen)):
            client = client_end(suites=[{1: AEGIS, 2: CHACHA}[number] for number in offered])
            check_refused(client, PeerServer(client, suite=chosen).answer)
    # Payloads that are too short.
    for size in (0, 1, 31):
        server = server_end()
        check_refused(server, PeerClient(server, claimed=CLIENT.public[:size]).authenticate)
    for payload in (b"", SERVER.public[:1], SERVER.public[:31], SERVER.public, SERVER.public + b"\2" + INSTANCE[:-1]):
        client = client_end()
        dishonest = PeerServer(client)
        dishonest.payload = payload
        check_refused(client, dishonest.answer)


def test_keys_of_another_size_or_of_small_order():
    # crypto_scalarmult() reads 32 bytes whatever it is given.
    for size in (0, 1, 31, 33, 64):
        pytest.raises(RemoteProtocolError, ratrod.diffie_hellman, core.E_SERVER, b"\x09" * size)
    for point, which in itertools.product(SMALL_ORDER_POINTS, ("ephemeral", "static")):
        with row((point.hex(), which)):
            odd = {which: odd_keypair(point), "attacker": True}
            server, client = server_end(), client_end()
            check_refused(server, PeerClient(server, **odd).authenticate)
            check_refused(client, PeerServer(client, **odd).answer)


OTHER = Identity.from_seed(b"o" * 32)
IMPOSTORS = {
    "somebody else's identity": {"claimed": OTHER.public}, "no point": {"claimed": b"\x02" + bytes(31)},
    "small order": {"claimed": peer.SMALL_ORDER_IDENTITY}, "zero": {"claimed": bytes(32)}, "another static key": {"static": OTHER.static_private},
    "top bit": {"static": None},
}


@pytest.mark.parametrize("options", IMPOSTORS.values(), ids=IMPOSTORS)
def test_an_identity_that_is_not_the_static_key(options):
    # Nobody's list is asked, and the impostor is not told a thing.
    asked = []
    server, client = server_end(check_key=asked.append), client_end(check_key=asked.append)
    for honest, make, seed in ((server, PeerClient, CLIENT.seed), (client, PeerServer, SERVER.seed)):
        # The honest static key with the bit set that X25519 ignores: the handshake holds, the identity must not.
        static = Identity.from_seed(seed)
        topped = odd_keypair(static.static_public[:31] + bytes((static.static_public[31] | 0x80,)), static.static_private)
        odd = {key: value or topped for key, value in options.items()}
        check_refused(honest, make(honest, seed=seed, **odd).authenticate, AuthenticationError)
    assert not asked


def only(listed):
    def check(key):
        if key != listed:
            raise AuthenticationError("`%s` is not listed" % ratrod.encode_key(key))
    return check


def refused_with(server, **options):
    """What a client that was authenticated but not let in is told: (code, text)."""
    client = PeerClient(server, **options)
    pytest.raises(RatrodError, client.authenticate)
    assert not server.is_done
    suite = peer.SUITES[server.suite.startswith("AEGIS") or 2]
    record = peer.RecordReader(suite, client.noise.record_keys(suite)[1]).open(server.data_to_send())
    assert record.type == peer.ERROR
    return peer.decode_error(record.content)


def test_the_negative_of_a_listed_key_is_another_key():
    # P and -P share one X25519 form: lists are looked up by the exact bytes.
    wrong = negative(CLIENT.public)
    assert refused_with(server_end(check_key=only(CLIENT.public)), claimed=wrong) == (
        peer.INVALID_KEY, "`%s` is not listed" % ratrod.encode_key(wrong))
    client = client_end(check_key=only(SERVER.public))
    check_refused(client, PeerServer(client, claimed=negative(SERVER.public)).answer)


def test_a_client_that_is_not_authorized_is_told_so_under_seal():
    # One too many is told another code: InvalidKey would make its ratrod give up.
    def busy(_key):
        raise ratrod.Overloaded("try again later")
    assert refused_with(server_end(check_key=core.refuse)) == (peer.INVALID_KEY, "it is not listed")
    assert refused_with(server_end(check_key=busy)) == (peer.UNKNOWN, "try again later")


def test_the_server_s_own_key_is_never_a_client():
    # Wherever it is listed.
    code, text = refused_with(server_end(check_key=accept), seed=SERVER.seed)
    assert code == peer.INVALID_KEY and "same key" in text
    client = client_end(keys=SERVER)
    check_refused(client, PeerServer(client).answer, AuthenticationError, "same key")
    client = client_end(check_key=core.refuse)  # nor does a server that is not known get message 3
    check_refused(client, PeerServer(client).answer, AuthenticationError)


def test_handshake_lengths_that_cannot_be():
    for size in (0, 1025, 1030, 2000, 65535):
        client, server, late = client_end(), server_end(), server_end()
        feed(late, [client.data_to_send()])
        late.data_to_send()
        for end, before in ((client, b""), (server, OPENING), (late, b"")):
            with pytest.raises(RatrodError) as caught:
                feed(end, [before, size.to_bytes(2, "big")])
                assert end is client and not size  # a client waits for the rest: an overloaded server closes, a legacy one goes on
                end.receive_eof()
            assert isinstance(caught.value, ratrod.Overloaded if end is client and not size else RemoteProtocolError)
            assert end.data_to_send() == b"" and not end.is_done
            # None of these speaks for a legacy server, and nobody may be talked into --legacy.
            assert "--legacy" not in str(caught.value)


def test_handshake_messages_of_an_allowed_length_are_read_whole_and_then_refused():
    for size in (1, 2, 12, 22, 31, 32, 80, 1024):
        for end, before in ((client_end(), b""), (server_end(), OPENING)):
            feed(end, [before + size.to_bytes(2, "big")])
            assert end.wanted == size
            caught = pytest.raises(RemoteProtocolError, feed, end, [b"\x09" * size])
            assert "--legacy" not in str(caught.value)


def test_a_server_that_says_nothing_or_speaks_legacy_names_the_flag():
    # The original closes at `ratrod2\n`; one of ours that serves legacy only sends a legacy Error.
    # Not where the server has answered ratrod2 in this handshake or in an earlier one.
    silent, legacy, late, known = client_end(), client_end(), client_end(), client_end(is_known=True)
    assert_raises(RemoteProtocolError, "--legacy", silent.receive_eof)
    assert_raises(RemoteProtocolError, "--legacy", feed, legacy, [b"\0" + (30).to_bytes(8, "big") + bytes(30)])
    PeerServer(late).answer()
    begun = client_end()
    feed(begun, [b"\0\x89" + bytes(20)])
    for end in (late, known, begun):
        caught = pytest.raises(RemoteProtocolError, end.receive_eof)
        assert "--legacy" not in str(caught.value)
