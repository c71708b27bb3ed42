"""Some seconds of the soak (tools/soak.py), what it found, and the script that makes the README's table "What it withstands"."""

import ast
import contextlib
import re
import subprocess
import sys
import threading

import withstand
from support import ratrod2_peer as peer
from support.keys import seed_of
from support.pressure import scaled
from support.programs import LEGACY_E, PATIENCE, ROOT, STARTED, linux, tcp_port
from support.relays import Door
from support.sockets import ask_over, dial, eventually


def soak(*words):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "tools" / "soak.py"), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=200)
    output = done.stdout.decode("utf-8", "replace")
    print(output)
    return done.returncode, output


@linux
def test_streams_are_whole_or_visibly_reset():
    code, output = soak("--seconds", "4")
    assert code == 0 and "FAILED" not in output, output
    figures = dict(withstand.figures_in(output))
    assert int(figures["soak streams whole"]) and int(figures["soak streams reset"]) and figures["soak streams wrong, cut short or hanging"] == "0"


@linux
def test_the_soak_finds_what_is_wrong():
    """With nothing between the ends that would notice, the same relay makes clean ends that are too early, wrong bytes, and streams that hang."""
    missed = {"fin": "A CLEAN END, .* bytes too early", "flip": "(wrong bytes|its header names)", "half a rst": "HANGS"}
    for seconds in (3, 6, 12, 24):  # a busy machine may need longer until the relay has done each
        if missed:
            code, output = soak("--bare", "--seconds", str(seconds), "--deeds", ",".join(missed))
            assert code == 1 or "FAILED" not in output, output
            missed = {deed: failure for deed, failure in missed.items() if not re.search("FAILED, seed .*: " + failure, output)}
    assert not missed


def test_signs_of_life_do_not_carry_a_record_that_never_ends(start, keys, target):
    """Found by the soak: where a length was made greater, Keepalives were taken for the rest of the record, and nothing ever ended that link."""
    server = start(*scaled(keepalive=0.5, silence=1.1, trusted=0.8, resume=0.0), "-k", keys.server.path, "serve", "127.0.0.1:0")
    ended = threading.Event()
    def wait_for_reset(connection):
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b"x" and not connection.recv(1)
        ended.set()
    remote = target(wait_for_reset)
    with peer.Client.connect(int(server.wait_for(STARTED).group(1)), seed_of(keys.client)).handshake() as client:
        client.open("127.0.0.1:%d" % remote.port)
        client.send_record(peer.DATA, b"x")
        whole = client.writer.seal(peer.DATA, bytes(300))
        # Bit 16 of the length: 64 KiB more, well within the limit.
        client.send(bytes((whole[0], whole[1] ^ 1)) + whole[2:])
        with contextlib.suppress(ConnectionError):  # the server may be the first to end the link
            for _ in range(150):
                if not ended.wait(0.2):
                    client.send_record(peer.KEEPALIVE)
        assert ended.wait(PATIENCE), "the server still waits for the rest of the record:\n" + server.output
        client.read_to_end()


class SlowDoor(Door):
    """One that holds connections up until `opened`."""

    opened, held = threading.Event(), 0

    def _handle(self, near):
        if self.to:
            self.held += not self.opened.is_set()
            self.opened.wait(PATIENCE)
        super()._handle(near)


def test_tries_that_were_held_up_are_no_empty_connections(serve, connect, target):
    """Found by the soak: a legacy try names its target. When a path that had held several up went on, the target saw a connection of each, and all
    but one ended cleanly without a byte, as of a sender who had nothing to say."""
    ends = []
    def read(connection):
        received = b""
        try:
            for data in iter(lambda: connection.recv(1000), b""):
                received += data
                connection.sendall(data)
            ends.append(received)
        except OSError:
            ends.append("reset")
    remote, door = target(read), SlowDoor(target)
    _, door.to = serve(*LEGACY_E.serve)
    door.opened.set()
    client = connect(door.port, *LEGACY_E.connect, "0:127.0.0.1:%d" % remote.port).ready()
    server_port, door.to = door.to, None
    with dial(tcp_port(client)) as originator:
        eventually(lambda: len(door.tries) > 1, "the client finds its server away")
        door.opened.clear()
        door.to = server_port
        eventually(lambda: door.held > 2, "three tries are held up")
        door.opened.set()
        ask_over(originator)
    eventually(lambda: remote.accepted == len(ends), "they end")
    assert set(ends) - {"reset"} == {b"anybody there?"}, ends


def test_figures_are_found_in_what_tests_and_scripts_print():
    output = ("seed 5\nfigure: soak streams whole = 86\n.figure: after the outage (a = b) = 1.5 s = fine\nnot a figure: x = 1\n"
              "..sfigure: three = 3 MB | 4 MB\n1 passed in 2 s\n")
    assert withstand.figures_in(output) == [("soak streams whole", "86"), ("after the outage (a", "b) = 1.5 s = fine"), ("three", "3 MB | 4 MB")]


def test_it_knows_only_tests_that_exist():
    for name, measure in withstand.MEASURES.items():
        tree = ast.parse((ROOT / "tests" / measure.file).read_text())
        if measure.short:
            flags = {word for word in measure.short + measure.whole if word.startswith("--")}
            known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert flags and flags <= known, (name, flags)
            continue
        tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        for word in measure.which.split(" or "):
            assert any(word in test for test in tests), "no test of %s has %r in its name" % (measure.file, word)
