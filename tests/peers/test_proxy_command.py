"""stdio: as the ProxyCommand of a real ssh, to a real sshd."""

import hashlib
import os
import shlex
import subprocess

import pytest

from support.programs import LEGACY_E, PATIENCE, RATROD, RATROD2, every_mode
from support.rows import row

pytestmark = pytest.mark.usefixtures("no_traceback")

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
# ssh's own surprises, of which its configuration here has several.
PLAIN = "-T -x -o BatchMode=yes -o RemoteCommand=none -o ClearAllForwardings=yes -o ControlPath=none -o LogLevel=ERROR".split()


class Ssh:
    """ssh to an sshd through a ProxyCommand: our client, whose server runs."""

    def __init__(self, far, words, log):
        self._far, self._words, self._log = far, " ".join(shlex.quote(str(word)) for word in words), log

    def run(self, *words, hides=True, **options):
        """What our client says goes to a file, or else, as it is by itself, to ssh's own standard error, where login shells talk, too."""
        command = "%s 2>>%s" % (self._words, self._log) if hides else self._words
        return subprocess.Popen([*self._far.command.split(), *PLAIN, "-o", "ProxyCommand=" + command, "far", *words], stdout=PIPE, stderr=PIPE,
                                **{"stdin": DEVNULL, **options})

    def said(self):
        """By our client, but for what legacy says where it is not encrypted."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [line for line in lines if "The traffic between client and server is in the clear" not in line]


@pytest.fixture
def ssh(sshd, serve, keys, tmp_path):
    """ssh(mode) -> Ssh"""
    def launch(mode):
        _, port = serve(*mode.serve)
        return Ssh(sshd(), (*RATROD, "-k", keys.client.path, "connect", *mode.connect, "127.0.0.1:%d" % port, "stdio:%h:%p"), tmp_path / "said")
    return launch


@every_mode
def test_commands(mode, ssh, tmp_path):
    """Their exit codes come back. Bulk, up, down, and both ways at once, on either wire."""
    through, file, content = ssh(mode), tmp_path / "file", os.urandom((1 << 20) - 3) * 8
    file.write_bytes(content)
    bulk = ("sha256sum", file, 0, hashlib.sha256(content).hexdigest().encode() + b"  -\n"), ("cat %s" % file, os.devnull, 0, content), (
        "cat", file, 0, content)
    for command, source, code, shown in (("echo hello", os.devnull, 0, b"hello\n"), ("exit 7", os.devnull, 7, b""), *bulk[:3 * (mode != LEGACY_E)]):
        with row(command), open(str(source), "rb") as stdin, through.run(command, stdin=stdin) as process:
            out, err = process.communicate(timeout=PATIENCE * 2)
            assert process.returncode == code and out == shown, (len(out), err)
    assert through.said() == []


def test_it_shows_why_it_cannot_connect(ssh, keys):
    """ssh hands its stderr to the ProxyCommand: what that says, a user sees."""
    through = ssh(RATROD2)
    keys.client.write("known_hosts", "")
    with through.run("true", hides=False) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 255 and out == b"" and b"is not in the known hosts file" in err, err
