"""A real sshd on a port of loopback, with a home folder and keys of its own: nothing of the machine's users, or of their shells, gets in."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

from support.programs import need
from support.sockets import free_port


def processes():
    """{pid: (parent's pid, command line)} of all that run."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = pathlib.Path("/proc", pid, "stat").read_text().rpartition(") ")[2].split()
            if status[0] != "Z":
                found[int(pid)] = int(status[1]), pathlib.Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return found


def descendants(pid, table=None):
    table = table or processes()
    children = [child for child, (parent, _) in table.items() if parent == pid]
    return children + [grandchild for child in children for grandchild in descendants(child, table)]


class Sshd:
    """A real sshd of this test's own, and the configuration of an ssh client that goes there as `far`."""

    PROGRAM = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")

    def __init__(self, start, path, *options, programs=os.defpath):
        self._start, self.path = start, path
        path.mkdir()
        for name in ("host", "user"):
            subprocess.run([need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", path / name], check=True)
        self.authorized, self.known, self.config = path / "authorized", path / "known_hosts", path / "client"
        self.authorized.write_bytes((path / "user.pub").read_bytes())
        # No start-up file of the user's own: those may print, as pyenv's does.
        self._options = "SetEnv HOME=%s PATH=%s" % (path, programs), *options
        self.port = free_port()  # sshd takes no port 0
        self.start()
        self.known.write_text("[127.0.0.1]:%d %s" % (self.port, (path / "host.pub").read_text()))
        self.config.write_text("\n".join((
            "Host far", "HostName 127.0.0.1", "Port %d" % self.port, "Host *", "IdentityFile %s" % (path / "user"), "IdentitiesOnly yes",
            "UserKnownHostsFile %s" % self.known, "GlobalKnownHostsFile /dev/null", "StrictHostKeyChecking yes",
            # What a user's own configuration may say, and what must not get in the way.
            "RequestTTY force", "RemoteCommand /bin/false", "ForwardX11 yes", "LocalForward 1 localhost:1", "ControlPath /nowhere")))

    def start(self):
        (self.path / "config").write_text("\n".join((
            "Port %d" % self.port, "ListenAddress 127.0.0.1", "HostKey %s" % (self.path / "host"), "PidFile none", "UsePAM no", "StrictModes no",
            "UseDNS no", "AuthorizedKeysFile %s" % self.authorized, "PermitRootLogin yes", "LogLevel VERBOSE", "MaxStartups 100",
            "AllowTcpForwarding no", "AllowStreamLocalForwarding no",  # commands are all that it needs
            *self._options)))
        # What Debian makes when its own sshd starts, and without which none starts as root. It stays: another test may need it just now.
        os.makedirs("/run/sshd", exist_ok=True)
        self.program = self._start(self.PROGRAM, "-D", "-e", "-f", self.path / "config")
        self.program.wait_for("Server listening")

    @property
    def command(self):
        return "ssh -F %s" % self.config

    def far_processes(self):
        """What runs at the far side: sessions and what they started."""
        return descendants(self.program.process.pid)

    def kill(self):
        for pid in [self.program.process.pid, *self.far_processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.program.wait()
