"""Network namespaces: as good as another machine."""

import concurrent.futures
import contextlib
import ctypes
import subprocess
from typing import NamedTuple

from support.programs import missing, need


class Namespace(NamedTuple):
    """A network namespace behind a pair of virtual cables: as good as another machine. `address` is its own on that cable."""

    name: str
    address: str

    @property
    def command(self):
        """What to put before a command so that it runs inside."""
        return "ip", "netns", "exec", self.name

    def make(self, function, *args):
        """The result of function(*args), called inside: a socket made there stays there."""
        def inside():
            with open("/run/netns/" + self.name) as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "setns")
            return function(*args)
        # On a thread of its own, which ends: setns moves one thread for good.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result()


@contextlib.contextmanager
def drop_all(namespace):
    """Within this block nothing arrives that passes the namespace's cable, either way, and nobody is told."""
    nft = need("nft")
    ends = [((), namespace.name + "v"), (namespace.command, "eth0")]
    table = "inet outage_" + namespace.name
    with contextlib.ExitStack() as stack:
        for command, device in ends:
            rules = "add table %s\nadd chain %s arriving { type filter hook prerouting priority -300; }\nadd rule %s arriving iifname %s drop\n" % (
                table, table, table, device)
            made = subprocess.run([*command, nft, "-f", "-"], input=rules.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if made.returncode:
                missing("nftables in this kernel (%s)" % made.stdout.decode().splitlines()[0])
            stack.callback(subprocess.run, [*command, nft, "delete", "table", *table.split()], check=True)
        yield
