"""SshLinks with a program in place of ssh: which failures allow another try, and that nothing stays counted."""

import errno
import gc
import os
import threading

import pytest

import ratrod
from support.sockets import eventually

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ssh shares connections on POSIX systems only")
# A shared connection is a file at ControlPath; a link ends at once, with the words in $SAYS.
FAKE = """#!/bin/sh
for word; do case $word in -oControlPath=*) path=${word#*=};; -oControlMaster=yes) master=1;; esac; done
if [ "$master" ]; then : > "$path"; exit; fi
cat "$SAYS" >&2
exit 255
"""


class Fake:
    def __init__(self, path, monkeypatch):
        self.program, self._says = path / "ssh", path / "says"
        monkeypatch.setenv("SAYS", str(self._says))
        self.become(FAKE)
        self.links = ratrod.SshLinks(ratrod.SshWay([str(self.program)]), ratrod.SshHost("", "far", 0), ratrod.Limits())

    def become(self, script):
        self.program.write_text(script)
        self.program.chmod(0o755)

    def fail(self, says, tries_left):
        """(a link whose ssh ended with these words, what explain() makes of it)"""
        self._says.write_text(says)
        link = self.links.start(False)
        link.sock.close()
        return link, self.links.explain(link, self.links.handshake(), ratrod.RemoteProtocolError("why"), tries_left)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = Fake(tmp_path, monkeypatch)
    yield made
    made.links.close()


def test_what_allows_another_try(fake):
    link, error = fake.fail("ssh: no way.\n", 2)  # nothing older than this link could be the cause
    assert (link.fresh, type(error), str(error)) == (True, ratrod.ConnectError, "ssh to `ssh://far`: ssh: no way")
    link, error = fake.fail("", 2)  # its shared connection may be gone: the next link has another
    assert (link.fresh, error) == (False, None)
    link, error = fake.fail("kex_exchange_identification: Connection closed\n", 1)  # a new one may not be ready yet
    assert (link.fresh, error) == (True, None)
    link, error = fake.fail("Permission denied (publickey).\n", 0)
    assert (link.fresh, type(error)) == (False, ratrod.AuthenticationError)
    assert link.master.links == 0 and link.errors.closed


def test_sshd_that_takes_few_sessions(fake):
    link, _ = fake.fail("", 0)
    link.master.links = 3
    for tries_left, expected in ((1, type(None)), (0, ratrod.Overloaded)):
        link.master.room = 8
        link, error = fake.fail("mux_client_request_session: session request failed: Session open refused by peer\n", tries_left)
        assert (type(error), link.master.room) == (expected, 3)


def test_a_start_that_raises_is_not_counted(fake, monkeypatch):
    link, _ = fake.fail("", 0)
    gc.collect()  # what other tests left to the collector
    before = len(os.listdir("/dev/fd"))
    for failure, expected in ((OSError(errno.EMFILE, "Too many open files"), ratrod.ConnectError), (KeyError("a bug"), KeyError)):
        def unable(*_args, failure=failure, **_named):
            raise failure
        with monkeypatch.context() as patch, pytest.raises(expected, match="cannot run `.*ssh`: Too many open files|a bug"):
            patch.setattr(fake.links, "_run", unable)
            fake.links.start(False)
        assert link.master.links == 0 and len(os.listdir("/dev/fd")) <= before  # threads of other tests may still close theirs


def test_the_end_while_a_connection_is_being_made(fake):
    fake.become("#!/bin/sh\nexec sleep 600\n")
    heard = []

    def start():
        with pytest.raises(ratrod.ConnectError) as caught:
            fake.links.start(True)
        heard.append(caught.value)
    thread = threading.Thread(target=start)
    thread.start()
    eventually(lambda: fake.links._masters, "ssh runs")
    fake.links.close()
    thread.join(10)
    assert heard and not os.path.exists(fake.links._folder)
