"""SshLinks with a program in place of ssh: which failures allow another try, and that nothing stays counted."""

import errno
import gc
import os
import threading

import pytest

import ratrod
from support.rows import assert_raises
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
        self.links = ratrod.SshLinks([str(self.program)], "python3", ratrod.SshHost("", "far", 0), ratrod.Limits())

    def become(self, script):
        self.program.write_text(script)
        self.program.chmod(0o755)

    def fail(self, says):
        """(a link whose ssh ended with these words, what explain() makes of it)"""
        self._says.write_text(says)
        link = self.links.start(False)
        link.sock.close()
        return link, self.links.explain(link, self.links.handshake(), ratrod.RemoteProtocolError("why"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = Fake(tmp_path, monkeypatch)
    yield made
    made.links.close()


def test_what_allows_another_try(fake):
    link, error = fake.fail("ssh: no way.\n")  # nothing older than this link could be the cause
    assert (link.is_first, type(error), str(error)) == (True, ratrod.ConnectError, "ssh to `ssh://far`: ssh: no way")
    for says in ("", "Connection refused\n"):  # its shared connection may be gone: the next link has another
        link, error = fake.fail(says)
        assert (link.is_first, error) == (False, None)
        link, error = fake.fail(says)
        assert (link.is_first, type(error)) == (True, ratrod.ConnectError)
    fake.become(FAKE.replace("exit 255", "kill -INT $$"))  # a Ctrl-C that reaches a link which is just starting
    assert [fake.fail("")[1] for _ in range(2)] == [None, None], "its shared connection is as good as before"
    fake.become(FAKE)
    link, error = fake.fail("Permission denied (publickey).\n")
    assert (link.is_first, type(error)) == (False, ratrod.AuthenticationError)
    _, error = fake.fail("Warning: Identity file python3_key not accessible: No such file or directory.\nPermission denied (publickey).\n")
    assert "there is no" not in str(error), "a warning of ssh's own says nothing of the Python there"
    assert not fake.links._links and link.errors.closed


def test_no_further_connection_is_tried_after_one_that_was_not_let_in(fake):
    fake.become(FAKE.replace("cat", "read line; cat"))  # a link goes on until its standard input ends
    held = fake.links.start(False)
    link, error = fake.fail("session request failed: Session open refused by peer\nPermission denied (publickey).\n")
    assert (held.is_first, link.is_first, type(error)) == (True, False, ratrod.Overloaded)
    assert_raises(ratrod.Overloaded, "no further connection for now", fake.links.start, False)
    held.sock.close()  # one that ends makes room
    assert fake.links.start(False).path == held.path


def test_a_start_that_raises_is_not_counted(fake, monkeypatch):
    fake.fail("")
    gc.collect()  # what other tests left to the collector
    before = len(os.listdir("/dev/fd"))
    for failure, expected in ((OSError(errno.EMFILE, "Too many open files"), ratrod.ConnectError), (KeyError("a bug"), KeyError)):
        def unable(*_args, failure=failure, **_named):
            raise failure
        with monkeypatch.context() as patch, pytest.raises(expected, match="cannot run `.*ssh`: Too many open files|a bug"):
            patch.setattr(fake.links, "_run", unable)
            fake.links.start(False)
        assert not fake.links._links and len(os.listdir("/dev/fd")) <= before  # threads of other tests may still close theirs


def test_the_end_while_a_connection_is_being_made(fake):
    fake.become("#!/bin/sh\nexec sleep 600\n")
    heard = []
    def start():
        caught = pytest.raises(ratrod.ConnectError, fake.links.start, True)
        heard.append(caught.value)
    thread = threading.Thread(target=start)
    thread.start()
    eventually(lambda: fake.links._maker, "ssh runs")
    folder = fake.links._folder
    fake.links.close()
    thread.join(10)
    assert heard and folder and not os.path.exists(folder)
    fake.links._find_connection = lambda _began: str(fake.program)  # a link that starts meanwhile
    assert fake.links.start(False).process.returncode is not None
