#!/usr/bin/env python3
"""Side by side on one machine in one run: ratrod.py and the real peers that are installed here.

    python tests/tools/bench.py                        everything, about ten minutes
    python tests/tools/bench.py --quick --targets      a first look in less than two
    python tests/tools/bench.py --only ratrod,ssh --measure bulk,roundtrip
    python tests/tools/bench.py --beside OLD/ratrod.py --only ratrod,beside    this version against another one

Two hops on the loopback for every peer: source -> client -> server -> target. Only ratios within one run mean something.
Debian: apt install openssh-server openssh-client stunnel4 spiped socat haproxy gcc. The Rust original: see the README's "Tests";
where cargo is there too, a mended copy of it is built once (two minutes) into the tests' cache folder.

Source and target are bench_load.c, compiled into a temporary folder at each run (Linux and `cc`). Without a compiler bench_load.py takes
its place: all measures run, but the fast peers' numbers are then its limit and not theirs. CPU and memory are read from /proc.
"""

import argparse
import array
import contextlib
import datetime
import functools
import getpass
import glob
import heapq
import html
import itertools
import json
import mmap
import os
import pathlib
import platform
import re
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support.keys import make_keys
from support.programs import CACHE, ROOT, RUST, SCRIPT
from support.sockets import free_port

HERE = pathlib.Path(__file__).resolve().parent
HOST = "127.0.0.1"
PATIENCE = 15.0  # for a peer to start, and for its first stream to open
SETUP = 60.0  # for all streams of a measure to open
ROUND_TRIP, PATH = 0.1, 125e6  # of the delayed path: seconds, and bytes a second of each direction (1 Gbit/s)
MENDED = CACHE / "rust-mended"


class Failed(Exception):
    """What a peer, or a measure of it, did not bear: the text is the reason."""


def which(program):
    # A daemon's folder is in root's PATH only.
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]))


def output_of(*command, **options):
    """What a short command prints, both streams; "" where it cannot be run."""
    try:
        return subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60, **options).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """A line of the process table."""

    parent: int
    started: int
    cpu: float  # seconds, with those of children that have ended


def process_table():
    """{id: Process} of the whole machine; empty where there is no /proc."""
    table, tick = {}, 1.0 / os.sysconf("SC_CLK_TCK") if os.path.exists("/proc/self/stat") else 0
    for path in glob.iglob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                # The name in parentheses may hold anything; the numbers stand behind the last one.
                numbers = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        table[int(path.split("/")[2])] = Process(int(numbers[1]), int(numbers[19]), sum(map(int, numbers[11:15])) * tick)
    return table


def family(pid, table):
    """The process and all that descend from it."""
    children = {}
    for child, process in table.items():
        children.setdefault(process.parent, []).append(child)
    found = [pid]
    for each in found:
        found.extend(children.get(each, ()))
    return found


def cpu_seconds(pids):
    """Of these processes and all that they have forked."""
    table = process_table()
    return sum(table[each].cpu for pid in pids for each in family(pid, table) if each in table)


def resident(pid):
    """Bytes. A page that several processes share counts in parts: peers that fork have most of theirs in common."""
    try:
        with open("/proc/%d/smaps_rollup" % pid) as file:
            return int(re.search(r"^Pss:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024
    except (OSError, AttributeError):
        pass
    try:
        with open("/proc/%d/statm" % pid) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def resident_bytes(pids):
    table = process_table()
    if not table:
        raise Failed("there is no /proc here")
    return sum(resident(each) for pid in pids for each in family(pid, table))


class Processes:
    """Every process that this script starts, so that each is ended, by its id, whatever happens."""

    def __init__(self):
        self._running = []

    def start(self, command, **options):
        process = subprocess.Popen([str(word) for word in command], **options)
        self._running.append(process)
        return process

    def end(self, *processes):
        """Ends them and what they have forked: that first, while there is a parent to collect it."""
        table = process_table()
        offspring = {pid: table[pid].started for process in processes for pid in family(process.pid, table)[1:]}
        self._end_offspring(offspring, signal.SIGTERM)
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 0.7
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
            if process in self._running:
                self._running.remove(process)
        self._end_offspring(offspring, signal.SIGKILL)

    @staticmethod
    def _end_offspring(offspring, sign):
        """{id: time of its start, which says that the id still means the same process}; waits a moment for their end."""
        deadline = time.monotonic() + 0.7
        alive = offspring
        while alive and time.monotonic() < deadline:
            table = process_table()
            alive = {pid: started for pid, started in alive.items() if pid in table and table[pid].started == started}
            for pid in alive if sign else ():
                with contextlib.suppress(OSError):
                    os.kill(pid, sign)
            sign = None
            time.sleep(0.02)

    def end_all(self):
        self.end(*self._running[:])


def last_words(path, start=0):
    """The last line with an error that a program wrote, without colours, time stamps and connections' ids."""
    text = path.read_bytes()[start:].decode("utf-8", "replace")
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
             if line.strip() and not re.search(r"\bINFO\b", line)]
    return re.sub(r"^\d{4}-\d\d-\d\dT\S+\s+|\b\w+\{id=\S+\}: ", "", lines[-1])[:160] if lines else ""


# ---------------------------------------------------------------------------------------------------- the load generator


class Generator(NamedTuple):
    command: Tuple[str, ...]
    name: str


def make_generator(folder, force_python):
    """The compiled one, or the one in Python with the reason in its name."""
    python = (sys.executable, str(HERE / "bench_load.py"))
    if force_python:
        return Generator(python, "bench_load.py, as asked for: the fast peers' numbers are its limit, not theirs")
    compiler, program = which("cc"), folder / "load"
    if compiler and sys.platform.startswith("linux"):
        output = output_of(compiler, "-O2", "-o", program, HERE / "bench_load.c")
        if program.exists():
            return Generator((str(program),), "bench_load.c")
        print(output, file=sys.stderr)
    return Generator(python, "bench_load.py, for want of a C compiler: the fast peers' numbers are its limit, not theirs")


class Load:
    """A running generator: its counters can be read at any moment, and it ends when its standard input does."""

    BYTES, READY, DONE = range(3)

    def __init__(self, bench, *words):
        self._bench = bench
        self._path = bench.new_path("load")
        self._path.write_bytes(bytes(64))
        with open(str(self._path), "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 64)
        self._errors = bench.new_path("load")
        with open(str(self._errors), "wb") as errors:
            self.process = bench.processes.start([*bench.generator.command, words[0], self._path, *words[1:]], stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, stderr=errors)

    def count(self, place):
        return struct.unpack_from("=Q", self._map, place * 8)[0]

    def check(self):
        if self.process.poll() is not None:
            raise Failed(last_words(self._errors) or "the load generator ended with code %d" % self.process.returncode)

    def sleep(self, seconds):
        """Failed where it ends meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check()
            time.sleep(max(0.0, min(0.05, end - time.monotonic())))
        self.check()

    def await_streams(self, count, patience=SETUP):
        deadline = time.monotonic() + patience
        while self.count(self.READY) < count:
            self.check()
            if time.monotonic() > deadline:
                raise Failed("%d of %d streams were open after %d s" % (self.count(self.READY), count, patience))
            time.sleep(0.01)

    def result(self, patience):
        """What it prints, once it has ended by itself."""
        try:
            output, _ = self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            raise Failed("no result after %d s" % patience)
        if self.process.returncode:
            self.check()
        return output

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self._bench.processes.end(self.process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------------------------------------------- peers


class Site(NamedTuple):
    """Where one tunnel is to stand."""

    folder: pathlib.Path  # its own, for its configuration
    secrets: pathlib.Path  # the run's keys, see make_secrets
    server: int  # the port on which the server listens
    via: int  # ... on which the client finds it: the same, or a delaying relay's
    client: int  # ... on which the client listens
    target: int
    serve_flags: Tuple[str, ...] = ()


def make_secrets(folder):
    """Throwaway keys for every peer."""
    server, client = make_keys(folder / "server"), make_keys(folder / "client")
    server.trust(client, "authorized_keys")
    client.trust(server, "known_hosts")
    (folder / "spiped").write_bytes(os.urandom(32))
    make_certificate(folder / "certificate.pem")
    if which("ssh-keygen"):
        for name in ("ssh-host", "ssh-user"):
            output_of(which("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
        (folder / "ssh-known-hosts").write_text("bench " + (folder / "ssh-host.pub").read_text())


def make_certificate(path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    today = datetime.datetime.now(datetime.timezone.utc)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(today - datetime.timedelta(1))
                   .not_valid_after(today + datetime.timedelta(30)).sign(key, hashes.SHA256()))
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
                     + certificate.public_bytes(serialization.Encoding.PEM))


# The suite is forced from outside: to both ends it looks as if this libsodium had no AEGIS.
CHACHA_ONLY = (sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import ratrod; ratrod.aegis_128l = lambda: None; "
               "sys.exit(ratrod.main(sys.argv[1:]))", str(ROOT))


def ratrods(program, serve=(), connect=()):
    """Commands of ratrod.py and of the original, whose command lines are the same."""
    def commands(site):
        tunnel = "%s:%d:%s:%d" % (HOST, site.client, HOST, site.target)
        return ((*program, "-k", site.secrets / "server", "serve", *serve, *site.serve_flags, "%s:%d" % (HOST, site.server)),
                (*program, "-k", site.secrets / "client", "connect", *connect, "%s:%d" % (HOST, site.via), tunnel))
    return commands


SSHD = """Port {site.server}
ListenAddress 127.0.0.1
HostKey {site.secrets}/ssh-host
AuthorizedKeysFile {site.secrets}/ssh-user.pub
PidFile none
UsePAM no
StrictModes no
UseDNS no
PermitRootLogin yes
PasswordAuthentication no
AllowTcpForwarding yes
MaxStartups 1000
MaxSessions 1000
LogLevel ERROR
"""


def ssh_commands(site):
    config = site.folder / "sshd"
    config.write_text(SSHD.format(site=site))
    options = ["BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none", "HostKeyAlias=bench", "ExitOnForwardFailure=yes",
               "UserKnownHostsFile=%s" % (site.secrets / "ssh-known-hosts"), "IdentityFile=%s" % (site.secrets / "ssh-user"), "LogLevel=ERROR"]
    return ((which("sshd"), "-D", "-e", "-f", config),
            (which("ssh"), "-F", "none", "-N", *("-o%s" % option for option in options),
             "-L", "%s:%d:%s:%d" % (HOST, site.client, HOST, site.target), "-p", site.via, "%s@%s" % (getpass.getuser(), HOST)))


STUNNEL = """foreground = yes
pid =
debug = err
sslVersion = TLSv1.3
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[tunnel]
accept = 127.0.0.1:{accept}
connect = 127.0.0.1:{connect}
{more}
"""


def stunnel_commands(site):
    certificate = site.secrets / "certificate.pem"
    ends = (("server", site.server, site.target, "cert = %s" % certificate),
            ("client", site.client, site.via, "client = yes\nverifyPeer = yes\nCAfile = %s" % certificate))
    for name, accept, connect, more in ends:
        (site.folder / name).write_text(STUNNEL.format(accept=accept, connect=connect, more=more))
    program = which("stunnel") or which("stunnel4")
    return (program, site.folder / "server"), (program, site.folder / "client")


def spiped_commands(site):
    def end(way, source, target):
        return (which("spiped"), way, "-F", "-n", 0, "-k", site.secrets / "spiped",
                "-s", "[%s]:%d" % (HOST, source), "-t", "[%s]:%d" % (HOST, target))
    return end("-d", site.server, site.target), end("-e", site.client, site.via)


def socat_commands(site):
    def end(source, target):
        return (which("socat"), "-b", 262144, "TCP-LISTEN:%d,bind=%s,reuseaddr,fork,backlog=1024,nodelay" % (source, HOST),
                "TCP:%s:%d,nodelay" % (HOST, target))
    return end(site.server, site.target), end(site.client, site.via)


HAPROXY = """global
  maxconn 4000
defaults
  mode tcp
  timeout connect 10s
  timeout client 10m
  timeout server 10m
listen tunnel
  bind 127.0.0.1:{source}
  server target 127.0.0.1:{target}
"""


def haproxy_commands(site):
    for name, source, target in (("server", site.server, site.target), ("client", site.client, site.via)):
        (site.folder / name).write_text(HAPROXY.format(source=source, target=target))
    return tuple((which("haproxy"), "-db", "-f", site.folder / name) for name in ("server", "client"))


def without(*programs):
    """A check that all of these are here, for the table of peers."""
    def check():
        absent = [program for program in programs if not any(which(name) for name in program.split("|"))]
        return "%s is not installed" % ", ".join(absent) if absent else None
    return check


def without_aegis():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import ratrod; print(ratrod.aegis_128l())"
    return "this libsodium or processor has no AEGIS-128L" if output_of(sys.executable, "-c", code, ROOT).strip() == "None" else None


def without_workers():
    return None if hasattr(os, "fork") and os.cpu_count() > 1 else "it takes fork() and two cores"


def without_rust():
    return None if RUST.exists() else "RUSTC_BOOTSTRAP=1 cargo install ratrod --version 0.6.3 --root %s" % RUST.parent.parent


@functools.lru_cache(maxsize=None)
def without_mended():
    """Builds it where it was not built yet: out of the registry's source, which cargo has brought here, without the network."""
    binary = MENDED / "target" / "release" / "ratrod"
    if binary.exists():
        return None
    sources = glob.glob(os.path.join(os.environ.get("CARGO_HOME") or os.path.expanduser("~/.cargo"), "registry", "src", "*", "ratrod-0.6.3"))
    if not which("cargo") or not sources:
        return "it is built by cargo out of the registry's source: %s" % (
            "RUSTC_BOOTSTRAP=1 cargo install ratrod --version 0.6.3 brings it" if which("cargo") else "cargo is not installed")
    print("Building the mended Rust ratrod, once: about two minutes ...", file=sys.stderr, flush=True)
    mend(pathlib.Path(sources[0]))
    environment = {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"}
    with open(str(MENDED / "build.log"), "wb") as log:
        try:
            subprocess.run([which("cargo"), "build", "--release", "--offline", "--bin", "ratrod"], cwd=str(MENDED), stdin=subprocess.DEVNULL,
                           stdout=log, stderr=log, timeout=1200, env=dict(environment, RUSTC_BOOTSTRAP="1"))
        except subprocess.TimeoutExpired:
            return "cargo build took more than 20 minutes"
    return None if binary.exists() else "cargo build failed: see build.log in %s" % MENDED


def mend(source):
    """A copy whose pump reads 64 bytes less at once, so that a full buffer and its message's head fit into one frame."""
    shutil.copytree(str(source), str(MENDED), dirs_exist_ok=True)
    code = MENDED / "src" / "utils.rs"
    text, count = re.subn(r"(let buf = &mut \[0u8; Constant::BUFFER_SIZE)\];", r"\1 - 64];", code.read_text())
    if count != 1:
        raise Failed("the line to mend occurs %d times in %s" % (count, code))
    code.write_text(text)
    # What `cargo install` did not bring (packages of its tests) or would choose otherwise (versions, compiler) than for the published one.
    manifest = MENDED / "Cargo.toml"
    manifest.write_text(re.sub(r"(?ms)^\[(\[bench\]|dev-dependencies\..*?)\]\n.*?(?=^\[|\Z)", "", manifest.read_text()))
    for name in ("Cargo.lock", "rust-toolchain.toml"):
        with contextlib.suppress(FileNotFoundError):
            (MENDED / name).unlink()


def version(pattern, *command):
    """What the program calls its version, for the line that describes the run."""
    def ask():
        found = re.search(pattern, output_of(which(command[0]) or command[0], *command[1:])) if command[0] else None
        return found.group(1) if found else ""
    return ask


class Peer(NamedTuple):
    name: str
    title: str
    commands: Optional[Callable[[Site], Tuple[Tuple[Any, ...], Tuple[Any, ...]]]]  # of the server and of the client
    missing: Callable[[], Optional[str]] = without()
    version: Callable[[], str] = lambda: ""
    udp: bool = False
    ours: bool = False
    idle: int = 1 << 20  # streams at most in the measure of memory
    measures: Tuple[str, ...] = ()  # only these, where not all


MENDED_MEASURES = ("bulk", "roundtrip", "streams", "fairness")  # the rest is the published one's
RATROD_VERSION = version(r"(\d\S+)", *SCRIPT, "--version")
RUST_VERSION = version(r"(\d\S+)", str(RUST), "--version")
MENDED_PROGRAM = (str(MENDED / "target" / "release" / "ratrod"),)
PEERS = [
    Peer("none", "no tunnel", None, udp=True),
    Peer("ratrod", "ratrod.py (AEGIS-128L)", ratrods(SCRIPT), without_aegis, RATROD_VERSION, udp=True, ours=True),
    Peer("ratrod-workers", "ratrod.py --workers 2", ratrods(SCRIPT, ("--workers", "2"), ("--workers", "2")), without_workers, ours=True,
         measures=("connections", "streams")),  # one stream, or one UDP socket, is one worker's
    Peer("ratrod-chacha", "ratrod.py (ChaCha20)", ratrods(CHACHA_ONLY), udp=True, ours=True),
    Peer("ratrod-legacy", "ratrod.py --legacy", ratrods(SCRIPT, ("--legacy",), ("--legacy",)), udp=True, ours=True),
    Peer("ratrod-legacy-e", "ratrod.py --legacy -e", ratrods(SCRIPT, ("--legacy",), ("--legacy", "-e")), udp=True, ours=True),
    Peer("rust", "Rust ratrod 0.6.3", ratrods((str(RUST),)), without_rust, RUST_VERSION, udp=True),
    Peer("rust-e", "Rust ratrod 0.6.3 -e", ratrods((str(RUST),), (), ("-e",)), without_rust, udp=True),
    Peer("mended", "Rust, read size mended", ratrods(MENDED_PROGRAM), without_mended, measures=MENDED_MEASURES),
    Peer("mended-e", "Rust -e, read size mended", ratrods(MENDED_PROGRAM, (), ("-e",)), without_mended, measures=MENDED_MEASURES),
    Peer("ssh", "ssh -L", ssh_commands, without("sshd", "ssh", "ssh-keygen"), version(r"(OpenSSH_[^ ,]+)", "ssh", "-V")),
    Peer("stunnel", "stunnel (TLS 1.3)", stunnel_commands, without("stunnel|stunnel4"), version(r"stunnel (\S+)", "stunnel", "-version")),
    Peer("spiped", "spiped", spiped_commands, without("spiped"), version(r"spiped (\S+)", "spiped", "-v")),
    Peer("socat", "socat -b 262144", socat_commands, without("socat"), version(r"socat version (\S+)", "socat", "-V"), idle=200),
    Peer("haproxy", "haproxy (tcp)", haproxy_commands, without("haproxy"), version(r"version (\S+)", "haproxy", "-v")),
]


# ---------------------------------------------------------------------------------------------------- tunnels


class Relay(threading.Thread):
    """A path of ROUND_TRIP seconds and PATH bytes a second to `port`: what it reads goes on half of that later.

    The kernel here completes a connection at once. What on the real path would wait for that round trip waits in the relay: the
    server sees the connection, and the client's first bytes, one and a half round trips after it was begun.
    """

    def __init__(self, port):
        super().__init__(daemon=True)
        self._upstream = port
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._due = []  # a heap of (when, order, action)
        self._order = itertools.count()
        self._begun = {}  # socket of the client's side -> when the other side knows of it
        self._other = {}
        self._free = {}  # socket -> when what came from it before has gone on
        self._closed = False
        self.start()

    def _later(self, when, action):
        heapq.heappush(self._due, (when, next(self._order), action))

    def run(self):
        while not self._closed:
            wait = self._due[0][0] - time.monotonic() if self._due else 0.2
            for key, _ in self._selector.select(max(0.0, min(wait, 0.2))):
                with contextlib.suppress(OSError):
                    self._accept() if key.fileobj is self._listener else self._read(key.fileobj)
            while self._due and self._due[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):
                    heapq.heappop(self._due)[2]()
        for sock in [*self._other, *self._other.values(), self._listener]:
            sock.close()

    def _accept(self):
        near, far = self._listener.accept()[0], socket.socket()
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._other[near], self._other[far] = far, near
        self._begun[near] = time.monotonic() + 1.5 * ROUND_TRIP
        self._later(self._begun[near], lambda: self._connect(far))
        self._selector.register(near, selectors.EVENT_READ)

    def _connect(self, far):
        far.connect((HOST, self._upstream))
        self._selector.register(far, selectors.EVENT_READ)

    def _read(self, sock):
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        when = max(time.monotonic() + ROUND_TRIP / 2, self._begun.get(sock, 0.0), self._free.get(sock, 0.0))
        self._free[sock] = when + len(data) / PATH
        other = self._other[sock]
        if data:
            self._later(when, lambda: other.sendall(data))
        else:
            self._selector.unregister(sock)
            self._later(when, lambda: other.shutdown(socket.SHUT_WR))

    def close(self):
        self._closed = True
        self.join(2)


class Tunnel:
    """A peer's two ends and its target, all running; `port` is where the source connects."""

    def __init__(self, bench, peer, delayed=False, serve_flags=()):
        self._bench, self.peer = bench, peer
        self.relay, self.ends, self._logs = None, [], []
        self.target = Load(bench, "target")
        try:
            self._launch(int(self.target.process.stdout.readline()), delayed, serve_flags)
        except ValueError:
            self.close()
            raise Failed("the target did not start")
        except BaseException:
            self.close()
            raise

    def _launch(self, target, delayed, serve_flags):
        server = free_port() if self.peer.commands else target
        via = server
        if delayed:
            self.relay = Relay(server)
            via = self.relay.port
        if not self.peer.commands:
            self.port = via
            return
        self.port = free_port()
        folder = self._bench.new_path("tunnel")
        folder.mkdir()
        commands = self.peer.commands(Site(folder, self._bench.secrets, server, via, self.port, target, serve_flags))
        self._start(folder / "server.log", commands[0])
        self._await(lambda: socket.create_connection((HOST, server), PATIENCE).close())
        self._start(folder / "client.log", commands[1])
        self._await(self._probe)
        # From here on what they say is about the measures; a server may have complained of the look whether it listens.
        self._logs = [(log, log.stat().st_size) for log, _ in self._logs]

    def _start(self, log, command):
        with open(str(log), "wb") as file:
            self.ends.append(self._bench.processes.start(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
        self._logs.append((log, 0))

    def _await(self, attempt):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return attempt()
            except OSError as error:
                if time.monotonic() > deadline or any(end.poll() is not None for end in self.ends):
                    raise Failed("it does not start: %s" % (self.last_words() or error))
            time.sleep(0.02)

    def _probe(self):
        with socket.create_connection((HOST, self.port), PATIENCE) as sock:
            sock.sendall(b"e")
            if sock.recv(1) != b"e":
                raise OSError("no echo")

    def last_words(self):
        """What server and client said last."""
        said = [(name, last_words(*log)) for name, log in zip(("server", "client"), self._logs)]
        return "; ".join("%s: %s" % (name, words) for name, words in said if words)

    @property
    def pids(self):
        return [end.pid for end in self.ends]

    def cpu(self):
        return cpu_seconds(self.pids)

    def settle(self, patience=3.0):
        """Waits until both ends have nothing left to do of what was before."""
        deadline, before = time.monotonic() + patience, self.cpu()
        while self.ends and time.monotonic() < deadline:
            time.sleep(0.05)
            after = self.cpu()
            if after - before < 0.01:
                return
            before = after

    def settled_memory(self, patience=10.0):
        """Bytes of both ends, once they have given back for 1.5 s nothing of what was before: that is done every second or so."""
        deadline, least, since = time.monotonic() + patience, float("inf"), time.monotonic()
        while time.monotonic() < min(deadline, since + 1.5):
            time.sleep(0.05)
            now = resident_bytes(self.pids)
            if now < least:
                least, since = now, time.monotonic()
        return least

    def load(self, mode, *words):
        return Load(self._bench, mode, self.port, *words)

    def close(self):
        self._bench.processes.end(*self.ends[::-1])
        if self.relay:
            self.relay.close()
        self.target.close()


# ---------------------------------------------------------------------------------------------------- measures


class Scale(NamedTuple):
    """How long and how many."""

    seconds: float = 0.4  # a sample
    warm_up: float = 0.15
    idle: int = 1000
    many_idle: int = 9000
    idle_seconds: float = 60.0  # three times the interval of keepalives
    streams: Tuple[int, int, int] = (1, 100, 1000)
    starts: int = 7


QUICK = Scale(seconds=0.15, warm_up=0.1, idle=100, many_idle=1000, idle_seconds=5.0, streams=(1, 10, 100), starts=3)


def percentile(ordered, percent):
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100.0))]


def sleep_until_more(load, seconds, counter, place, first):
    """A window of so many seconds; up to 3 s longer where nothing was counted in it, for nothing says little about a speed."""
    load.sleep(seconds)
    deadline = time.monotonic() + 3
    while counter.count(place) == first and time.monotonic() < deadline:
        load.sleep(0.05)


def bulk_window(tunnel, load, counter, scale):
    """(GB/s, CPU seconds for each GB) over a window in the middle of a transfer, counted where the bytes arrive."""
    load.sleep(scale.warm_up)
    began, first, cpu = time.perf_counter(), counter.count(Load.BYTES), tunnel.cpu()
    sleep_until_more(load, scale.seconds, counter, Load.BYTES, first)
    seconds, gigabytes, cpu = time.perf_counter() - began, (counter.count(Load.BYTES) - first) / 1e9, tunnel.cpu() - cpu
    if not gigabytes:
        raise Failed("not a byte arrived for %.1f s after %d bytes" % (seconds, first))
    return gigabytes / seconds, cpu / gigabytes


def measure_bulk(tunnel, scale, direction):
    with tunnel.load("bulk", direction, 1) as load:
        load.await_streams(1)
        speed, cpu = bulk_window(tunnel, load, tunnel.target if direction == "push" else load, scale)
    return {direction: speed, direction + "_cpu": cpu if tunnel.ends else None}


def measure_far(tunnel, scale):
    with tunnel.load("bulk", "push", 1) as load:
        load.await_streams(1)
        speed, _ = bulk_window(tunnel, load, tunnel.target, scale._replace(warm_up=scale.warm_up + 3, seconds=2 * scale.seconds))
    return {"far": speed}


def measure_streams(tunnel, scale, place):
    count = scale.streams[place]
    with tunnel.load("bulk", "push", count) as load:
        load.await_streams(count)
        # So many streams take time to fill their buffers, and some peers serve them in long turns.
        longer = 2 if place else 1
        speed, _ = bulk_window(tunnel, load, tunnel.target, scale._replace(seconds=longer * scale.seconds, warm_up=longer * scale.warm_up))
    return {"streams_%d" % place: speed}


def measure_connections(tunnel, scale, at_once):
    with tunnel.load("connect", at_once) as load:
        load.sleep(scale.warm_up)
        began, first = time.perf_counter(), load.count(Load.DONE)
        sleep_until_more(load, scale.seconds, load, Load.DONE, first)
        seconds = time.perf_counter() - began
        rate = (load.count(Load.DONE) - first) / seconds
    if not rate:
        raise Failed("not one connection in %.1f s" % seconds)
    return {"connections_%d" % at_once: rate}


def round_trips(tunnel, seconds):
    """Microseconds of each, in order of size; the first tenth, while things grow warm, is left out."""
    with tunnel.load("pingpong", 64, seconds) as load:
        times = array.array("I", load.result(seconds + PATIENCE))
    if not times:
        raise Failed("not one round trip in %.1f s" % seconds)
    return sorted(nanoseconds / 1000.0 for nanoseconds in times[len(times) // 10:])


def measure_round_trip(tunnel, scale):
    times = round_trips(tunnel, scale.seconds)
    return {"p50": percentile(times, 50), "p99": percentile(times, 99)}


def measure_udp(tunnel, scale, outstanding, size):
    with tunnel.load("udp", outstanding, size, scale.seconds) as load:
        sent, answered, lost, seconds = load.result(scale.seconds + PATIENCE).split()
    key = "udp_%d_%d" % (outstanding, size)
    if not int(answered):
        raise Failed("%d datagrams sent and none answered" % int(sent))
    return {key: int(answered) / float(seconds), key + "_lost": 100.0 * int(lost) / int(sent)}


def measure_idle(tunnel, scale):
    count = min(scale.idle, tunnel.peer.idle)
    before = tunnel.settled_memory()
    with tunnel.load("hold", count) as load:
        load.await_streams(count)
        after = tunnel.settled_memory()
        load.check()
    return {"idle": (after - before) / 1024.0 / count}


def measure_many_idle(tunnel, scale):
    before = tunnel.settled_memory()
    with tunnel.load("hold", scale.many_idle) as load:
        load.await_streams(scale.many_idle)
        after = tunnel.settled_memory()
        began, cpu = time.perf_counter(), tunnel.cpu()
        load.sleep(scale.idle_seconds)
        busy = (tunnel.cpu() - cpu) / (time.perf_counter() - began)
    return {"many_idle": (after - before) / 1024.0 / scale.many_idle, "many_idle_cpu": 100.0 * busy}


def measure_first_byte(tunnel, _scale):
    time.sleep(0.3)  # of the test connection nothing is under way any more
    began = time.perf_counter()
    with socket.create_connection((HOST, tunnel.port), PATIENCE) as sock:
        sock.sendall(b"e")
        if not sock.recv(1):
            raise Failed("a new connection was ended")
        return {"first_byte": 1000.0 * (time.perf_counter() - began)}


def measure_fairness(tunnel, scale):
    alone = percentile(round_trips(tunnel, scale.seconds), 99)
    with tunnel.load("bulk", "push", 1) as load:
        load.await_streams(1)
        load.sleep(scale.warm_up)
        beside = percentile(round_trips(tunnel, scale.seconds), 99)
        load.check()
    return {"fair_alone": alone, "fair_beside": beside, "fair_ratio": beside / alone}


# Measures that need no tunnel stand in rows of their own.


START_UPS = {
    "python-pass": (sys.executable, "-c", "pass"),
    "python-imports": (sys.executable, "-c", "import docopt, socket, selectors, logging"),
    "ratrod-help": (sys.executable, "-m", "ratrod", "--help"),  # as the installed command: its bytecode is cached
    "ratrod-script": (*SCRIPT, "--help"),  # Python compiles a script anew at each start
}


def run_start_up(command):
    began = time.perf_counter()
    # What runs this may have switched the caching off for its own sake.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=PATIENCE,
                          cwd=str(ROOT), env=environment)
    if done.returncode:
        raise Failed(done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
    return 1000.0 * (time.perf_counter() - began)


def measure_start_up(row, scale):
    command = START_UPS[row.name]
    run_start_up(command)  # leaves its bytecode in the cache, where it can be
    result = {"start_up": statistics.median(run_start_up(command) for _ in range(scale.starts))}
    if row.name == "ratrod-help":
        imported = output_of(sys.executable, "-X", "importtime", *command[1:], cwd=str(ROOT))
        result["start_up_nacl"] = len(re.findall(r"^import time:.*\|\s*nacl\b", imported, re.M))
    return result


RAW = """
import ctypes, sys, time
from nacl._sodium import ffi, lib
lib.sodium_init()
name, key, nonce, n = sys.argv[1], bytes(32), bytes(16), 512 * 1024
seal = getattr(lib, "crypto_aead_%s_encrypt" % name)
buffer, other = bytearray(n + 64), bytearray(n + 64)
view, place = memoryview(buffer), ffi.from_buffer(buffer)
end, count = time.perf_counter() + float(sys.argv[2]), 0
began = time.perf_counter()
while time.perf_counter() < end:
    view[:n] = memoryview(other)[:n]
    seal(place, ffi.NULL, place, n, ffi.NULL, 0, ffi.NULL, nonce, key)
    memoryview(other)[:n] = view[:n]
    count += 1
print(count * n / 1e9 / (time.perf_counter() - began))
"""
RAW_NAMES = {"raw-aegis": "aegis128l", "raw-chacha": "chacha20poly1305_ietf"}


def measure_raw(row, scale):
    """GB/s of one thread that seals 512 KiB and copies them twice: what Python and this libsodium can reach at the very most."""
    output = output_of(sys.executable, "-c", RAW, RAW_NAMES[row.name], scale.seconds).strip()
    try:
        return {"raw": float(output)}
    except ValueError:
        raise Failed(output.rpartition("\n")[2] or "no result")


class Row(NamedTuple):
    """What stands in a table where a measure is not of a tunnel."""

    name: str
    title: str
    ours: bool = False


START_UP_ROWS = (Row("python-pass", "python3 -c pass"), Row("python-imports", "python3 -c 'import docopt, socket, selectors, logging'"),
                 Row("ratrod-help", "python -m ratrod --help (bytecode cached)", ours=True),
                 Row("ratrod-script", "python ratrod.py --help", ours=True))
RAW_ROWS = (Row("raw-aegis", "AEGIS-128L"), Row("raw-chacha", "ChaCha20-Poly1305"))


class Field(NamedTuple):
    """One number of a measure, and how it is shown; Bench.label puts counts into the label."""

    key: str
    label: str
    unit: str
    digits: int
    more: bool = False  # is better
    chart: bool = False
    short: str = ""  # its column in the README's table, where it has one


class Step(NamedTuple):
    """A part of a measure that succeeds or fails as a whole."""

    measure: str
    run: Callable[..., Dict[str, Optional[float]]]
    fields: Tuple[Field, ...]
    rows: Tuple[Row, ...] = ()
    takes: Callable[[Peer], bool] = lambda peer: True
    tunnel: Optional[Dict[str, Any]] = None  # for each sample a fresh one, made with these; None: the round's
    rounds: int = 1 << 20


def bulk_step(direction, where):
    return Step("bulk", functools.partial(measure_bulk, direction=direction), (
        Field(direction, "bulk %s" % direction, "GB/s", 2, more=True, chart=True, short="%s GB/s" % direction),
        Field(direction + "_cpu", "%s: CPU of both ends for each GB" % direction, "s", 2, short="CPU s/GB" if where else "")))


def connections_step(at_once):
    return Step("connections", functools.partial(measure_connections, at_once=at_once), (
        Field("connections_%d" % at_once, "new connections, %d at once" % at_once, "/s", 0, more=True, chart=True,
              short="" if at_once == 1 else "new/s, %d at once" % at_once),))


def udp_step(outstanding, size):
    key = "udp_%d_%d" % (outstanding, size)
    return Step("udp", functools.partial(measure_udp, outstanding=outstanding, size=size), (
        Field(key, "UDP echo, %d outstanding of %d B" % (outstanding, size), "/s", 0, more=True, chart=True,
              short="" if (outstanding, size) == (1, 1200) else "UDP/s, %d x %d B" % (outstanding, size)),
        Field(key + "_lost", "lost", "%", 2)), takes=lambda peer: peer.udp)


def streams_step(place):
    return Step("streams", functools.partial(measure_streams, place=place), (
        Field("streams_%d" % place, "bulk over {%d:,} stream%s" % (place, "s" if place else ""), "GB/s", 2, more=True, chart=place > 0),),
        # Streams that are ended in full flow leave hundreds of MB on the way.
        tunnel={} if place else None)


STEPS = [
    bulk_step("push", True),
    bulk_step("pull", False),
    connections_step(1),
    connections_step(16),
    connections_step(64),
    Step("roundtrip", measure_round_trip, (
        Field("p50", "64-byte round trip p50", "µs", 0, chart=True, short="p50 µs"), Field("p99", "p99", "µs", 0, short="p99 µs"))),
    udp_step(1, 64),
    udp_step(1, 1200),
    udp_step(64, 64),
    udp_step(64, 1200),
    streams_step(0),
    streams_step(1),
    streams_step(2),
    Step("fairness", measure_fairness, (
        Field("fair_alone", "64-byte p99, alone", "µs", 0), Field("fair_beside", "beside a bulk stream", "µs", 0),
        Field("fair_ratio", "times", "", 1))),
    Step("firstbyte", measure_first_byte, (
        Field("first_byte", "a new connection's first byte, path of 100 ms", "ms", 0, chart=True, short="first byte ms"),), tunnel={"delayed": True}),
    Step("far", measure_far, (
        Field("far", "bulk, path of 100 ms and 1 Gbit/s", "GB/s", 3, more=True, short=""),), tunnel={"delayed": True}),
    Step("idle", measure_idle, (
        Field("idle", "memory of both ends for each of {idle:,} idle connections", "KB", 1, chart=True, short="KB idle"),),
         takes=lambda peer: peer.commands is not None, tunnel={}, rounds=2),  # it hardly varies
    # Once: it is a minute, and a mean over it.
    Step("many-idle", measure_many_idle, (
        Field("many_idle", "memory of both ends for each of {many:,}", "KB", 1),
        Field("many_idle_cpu", "CPU of both ends meanwhile", "% of a core", 2)),
         takes=lambda peer: peer.name == "ratrod", rounds=1, tunnel={"serve_flags": (
             "--max-links", "9500", "--max-links-per-key", "9500", "--max-streams-per-key", "9500", "--max-udp-sessions", "16")}),
    Step("startup", measure_start_up, (
        Field("start_up", "start-up", "ms", 1, chart=True), Field("start_up_nacl", "modules of PyNaCl imported", "", 0)), rows=START_UP_ROWS),
    Step("raw", measure_raw, (Field("raw", "one thread: seal, and two copies", "GB/s", 2, more=True),), rows=RAW_ROWS),
]
MEASURES = list(dict.fromkeys(step.measure for step in STEPS))


# ---------------------------------------------------------------------------------------------------- the run


class Outcome:
    """What the rounds gave for one field of one peer."""

    def __init__(self):
        self.values: List[float] = []
        self.failures: List[str] = []

    @property
    def failed(self):
        return len(self.failures) > len(self.values)

    @property
    def median(self):
        return statistics.median(self.values) if self.values and not self.failed else None


class Progress:
    """One line that is written over on a terminal, a line for each sample elsewhere."""

    def __init__(self, total):
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, text):
        self._done += 1
        line = "[%d/%d, %d s] %s" % (self._done, self._total, time.monotonic() - self._began, text)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self):
        if self._terminal:
            print(file=sys.stderr)


class Bench:
    """One run: what its parts share, the tunnels of the present round, and the results."""

    def __init__(self, folder, processes, generator, scale):
        self.folder, self.processes, self.generator, self.scale = folder, processes, generator, scale
        self.secrets = folder / "secrets"
        self.results: Dict[str, Dict[str, Outcome]] = {}  # a field's key -> a row's name -> Outcome
        self.rounds = 0
        self._names = itertools.count()
        self._tunnels: Dict[str, Tunnel] = {}
        self._broken: Dict[str, List[str]] = {}  # of each peer, why it did not start; a second reason ends the tries

    def new_path(self, kind):
        return self.folder / ("%s-%d" % (kind, next(self._names)))

    def label(self, text):
        """With this run's counts in place of {0}, {1}, {2}, {idle} and {many}."""
        return text.format(*self.scale.streams, idle=self.scale.idle, many=self.scale.many_idle)

    def run(self, steps, peers, rounds, patience):
        """Round by round, measure by measure, peer by peer: what slows the machine down for a while slows them all.

        No round is begun that, going by the last one, would not end within `patience` seconds.
        """
        plan = [[(step, row) for step in steps if number < step.rounds for row in step.rows or peers if wanted(step, row)]
                for number in range(rounds)]
        progress = Progress(sum(map(len, plan)))
        started = began = time.monotonic()
        try:
            for number, samples in enumerate(plan):
                now = time.monotonic()
                if number and now + (now - began) > started + patience:
                    print("\nNo time for more rounds: see --minutes.", file=sys.stderr)
                    break
                began, self.rounds = now, number + 1
                for step, row in samples:
                    progress("round %d of %d: %s, %s" % (number + 1, rounds, self.label(step.fields[0].label), row.title))
                    self._sample(step, row)
                self._close_tunnels()
        finally:
            self._close_tunnels()
            progress.end()

    def _sample(self, step, row):
        try:
            values, failure = self._measure(step, row), None
        except (Failed, OSError, subprocess.SubprocessError) as error:
            values, failure = {}, str(error) or type(error).__name__
        for field in step.fields:
            if failure:
                self._outcome(field, row).failures.append(failure)
            elif values.get(field.key) is not None:
                self._outcome(field, row).values.append(values[field.key])

    def _outcome(self, field, row):
        return self.results.setdefault(field.key, {}).setdefault(row.name, Outcome())

    def _measure(self, step, row):
        if step.rows:
            return step.run(row, self.scale)
        fresh = step.tunnel is not None
        tunnel = self._open(row, **step.tunnel) if fresh else self._tunnels.get(row.name) or self._tunnels.setdefault(row.name, self._open(row))
        failed = True
        try:
            result = step.run(tunnel, self.scale)
            failed = False
            return result
        except Failed as error:
            # The generator saw what happened; why, the peer may have said.
            said = tunnel.last_words()
            raise Failed("%s (%s)" % (error, said) if said else str(error))
        finally:
            if fresh:
                tunnel.close()
            elif failed:
                self._tunnels.pop(row.name).close()
            else:
                tunnel.settle()

    def _open(self, peer, **options):
        reasons = self._broken.setdefault(peer.name, [])
        if len(reasons) > 1:
            raise Failed(reasons[-1])
        try:
            return Tunnel(self, peer, **options)
        except (Failed, OSError) as error:
            reasons.append(str(error))
            raise

    def _close_tunnels(self):
        while self._tunnels:
            self._tunnels.popitem()[1].close()

    def median(self, name, key):
        outcome = self.results.get(key, {}).get(name)
        return outcome.median if outcome else None

    def highest(self, name, key):
        outcome = self.results.get(key, {}).get(name)
        return max(outcome.values) if outcome and not outcome.failed and outcome.values else None


def wanted(step, row):
    return bool(step.rows) or (step.takes(row) and (not row.measures or step.measure in row.measures))


# ---------------------------------------------------------------------------------------------------- reports


def number(value, digits):
    return "{:,.{}f}".format(value, digits)


def shown(outcome, field, spread=True):
    """A cell: the median, and from the lowest to the highest."""
    if outcome is None or not (outcome.values or outcome.failures):
        return "-"
    if outcome.failed:
        return "fails"
    text = number(outcome.median, field.digits)
    low, high = (number(bound(outcome.values), field.digits) for bound in (min, max))
    return "%s (%s-%s)" % (text, low, high) if spread and low != high else text


class Report:
    """The same results as tables, charts, Markdown, JSON and SVG."""

    def __init__(self, bench, steps, peers, machine):
        self._bench, self._steps, self._peers, self.machine = bench, steps, peers, machine
        self._notes: List[str] = []

    def _rows(self, step):
        """Those that have a result of this step."""
        names = {name for field in step.fields for name in self._bench.results.get(field.key, ())}
        return [row for row in step.rows or self._peers if row.name in names]

    def _outcome(self, field, row):
        return self._bench.results.get(field.key, {}).get(row.name)

    def _heading(self, field):
        return "%s%s" % (self._bench.label(field.label), ", " + field.unit if field.unit else "")

    def _cell(self, field, row):
        outcome = self._outcome(field, row)
        text = shown(outcome, field)
        for note in self._notes_on(field, row, outcome) if outcome else ():
            if note not in self._notes:
                self._notes.append(note)
            text += " [%d]" % (self._notes.index(note) + 1)
        return text

    def _notes_on(self, field, row, outcome):
        if outcome.failures:
            often = " in %d of %d rounds" % (len(outcome.failures), len(outcome.failures) + len(outcome.values)) if outcome.values else ""
            yield "%s fails%s: %s" % (row.title, often, outcome.failures[0])
        elif field.key == "idle" and row.idle < self._bench.scale.idle:
            yield "%s: of %d connections, a process at each end for each" % (row.title, row.idle)

    def tables(self):
        """One for each step: a heading line, and a line for each peer."""
        lines = []
        for step in self._steps:
            rows = self._rows(step)
            if rows:
                table = [[""] + [self._heading(field) for field in step.fields]]
                table += [[row.title] + [self._cell(field, row) for field in step.fields] for row in rows]
                widths = [max(map(len, column)) for column in zip(*table)]
                lines += ["  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                          for line in table] + [""]
        lines += ["[%d] %s" % (i + 1, note) for i, note in enumerate(self._notes)]
        return "\n".join(lines)

    def _charts(self):
        """(heading, [(row, Outcome, part of the longest bar)]) of every field that has a chart."""
        for step in self._steps:
            rows = self._rows(step)
            for field in step.fields:
                outcomes = [(row, self._outcome(field, row)) for row in rows]
                longest = max([outcome.median or 0.0 for _, outcome in outcomes if outcome] or [0.0])
                if field.chart and longest > 0:
                    heading = "%s (%s is better)" % (self._heading(field), "more" if field.more else "less")
                    yield field, heading, [(row, outcome, max(0.0, (outcome.median or 0.0) / longest)) for row, outcome in outcomes if outcome]

    def text_charts(self, width=50):
        lines = []
        for field, heading, bars in self._charts():
            lines.append(heading)
            margin = max(len(row.title) for row, _, _ in bars)
            for row, outcome, part in bars:
                lines.append("  %s %s %s" % (row.title.ljust(margin), "#" * int(round(width * part)), shown(outcome, field, spread=False)))
            lines.append("")
        return "\n".join(lines)

    def svg(self):
        """Bar charts below each other; ours stand out, a thin line is the spread."""
        parts, y, left, width = [], 30, 300, 420
        for field, heading, bars in self._charts():
            parts.append('<text x="10" y="%d" font-weight="bold">%s</text>' % (y, html.escape(heading)))
            for row, outcome, part in bars:
                y += 18
                parts.append('<text x="%d" y="%d" text-anchor="end">%s</text>' % (left - 8, y, html.escape(row.title)))
                parts.append('<rect x="%d" y="%d" width="%.1f" height="12" fill="%s"/>' % (
                    left, y - 10, width * part, "#c2410c" if row.ours else "#94a3b8"))
                end = left + width * part
                if outcome.median:
                    low, high = (left + width * part * bound(outcome.values) / outcome.median for bound in (min, max))
                    parts.append('<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#111"/>' % (low, high, y - 4, y - 4))
                    end = max(end, high)
                parts.append('<text x="%.1f" y="%d">%s</text>' % (end + 6, y, html.escape(shown(outcome, field, spread=False))))
            y += 36
        parts.append('<text x="10" y="%d" fill="#555">%s</text>' % (y, html.escape(self.machine["line"])))
        return ('<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="%d" font-family="sans-serif" font-size="12">\n'
                '<rect width="100%%" height="100%%" fill="white"/>\n%s\n</svg>\n' % (y + 20, "\n".join(parts)))

    def markdown(self):
        """One table for the README, of the fields that have a short name there."""
        fields = [field for step in self._steps if not step.rows for field in step.fields if field.short and field.key in self._bench.results]
        lines = ["| | %s |" % " | ".join(field.short for field in fields), "| --- |%s" % (" ---: |" * len(fields))]
        for peer in self._peers:
            cells = [shown(self._outcome(field, peer), field, spread=False) for field in fields]
            lines.append("| %s | %s |" % (peer.title, " | ".join("" if cell == "-" else cell for cell in cells)))
        return "\n".join(lines) + "\n\n" + self.machine["line"]

    def json(self):
        measures = {}
        for step in self._steps:
            for field in step.fields:
                measures[field.key] = {
                    "measure": step.measure, "label": self._bench.label(field.label), "unit": field.unit, "better": "more" if field.more else "less",
                    "results": {name: {"median": outcome.median, "min": min(outcome.values, default=None), "max": max(outcome.values, default=None),
                                       "values": outcome.values, "failures": outcome.failures}
                                for name, outcome in self._bench.results.get(field.key, {}).items()}}
        rows = [*self._peers, *(row for step in self._steps for row in step.rows)]
        return {"machine": self.machine, "scale": self._bench.scale._asdict(), "titles": {row.name: row.title for row in rows},
                "measures": measures, "targets": [target._asdict() for target in judged(self._bench)]}


# ---------------------------------------------------------------------------------------------------- what ratrod.py must reach


class Target(NamedTuple):
    """A line of the table in the project's plan."""

    name: str
    at_least: bool
    required: float
    value: Callable[[Bench], Optional[float]]


class Verdict(NamedTuple):
    name: str
    required: str
    reached: Optional[float]
    met: Optional[bool]  # None: something that it needs was not measured


def quotient(a, b):
    return None if a is None or not b else a / b


def beside(key, *others, ours="ratrod", best=max):
    """Ours as a multiple of the best of the others that have a result."""
    def value(bench):
        known = [median for median in (bench.median(other, key) for other in others) if median is not None]
        return quotient(bench.median(ours, key), best(known)) if known else None
    return value


def within(key, base):
    """One of ours as a multiple of another of ours."""
    return lambda bench: quotient(bench.median("ratrod", key), bench.median("ratrod", base))


def plain(name, key):
    return lambda bench: bench.median(name, key)


def lost_at_all(bench):
    shares = [bench.highest("ratrod", "udp_%d_%d_lost" % kind) for kind in UDP_KINDS]
    return None if None in shares else max(shares)


def chacha(direction):
    """1 is enough: as fast as ssh, or four fifths of the raw loop."""
    def value(bench):
        ours = bench.median("ratrod-chacha", direction)
        ssh, raw = quotient(ours, bench.median("ssh", direction)), quotient(ours, bench.median("raw-chacha", "raw"))
        known = [part for part in (ssh, raw and raw / 0.8) if part is not None]
        return max(known) if known else None
    return value


UDP_KINDS = ((1, 64), (1, 1200), (64, 64), (64, 1200))
DIRECTIONS = ("push", "pull")
TARGETS = [
    *(Target("bulk %s, times Rust -e (mended)" % way, True, 2.0, beside(way, "mended-e")) for way in DIRECTIONS),
    *(Target("bulk %s, times ssh -L" % way, True, 2.5, beside(way, "ssh")) for way in DIRECTIONS),
    *(Target("bulk %s, times socat in plain text" % way, True, 0.9, beside(way, "socat")) for way in DIRECTIONS),
    *(Target("new connections/s, %d at once, times Rust" % n, True, 3.0, beside("connections_%d" % n, "rust", "rust-e")) for n in (16, 64)),
    *(Target("new connections/s, %d at once, times ssh -L" % n, True, 1.0, beside("connections_%d" % n, "ssh")) for n in (16, 64)),
    Target("round trip p50, times the faster of ssh and Rust -e", False, 1.15, beside("p50", "ssh", "rust-e", best=min)),
    Target("idle memory, KB a connection", False, 6.0, plain("ratrod", "idle")),
    *(Target("UDP echo/s, %d outstanding of %d B, times Rust" % kind, True, required, beside("udp_%d_%d" % kind, "rust", "rust-e"))
      for kind, required in zip(UDP_KINDS, (1.1, 1.1, 4.0, 25.0))),
    Target("UDP lost at most, %", False, 0.0, lost_at_all),
    *(Target("bulk over {%d:,} streams, part of one stream's" % place, True, 0.8, within("streams_%d" % place, "streams_0")) for place in (1, 2)),
    Target("CPU of both ends, {many:,} idle connections, % of a core", False, 5.0, plain("ratrod", "many_idle_cpu")),
    *(Target("CPU seconds a GB, %s, times Rust -e (mended)" % way, False, 1.0, beside(way + "_cpu", "mended-e")) for way in DIRECTIONS),
    Target("python -m ratrod --help, times Python with four imports", False, 1.3, beside("start_up", "python-imports", ours="ratrod-help")),
    Target("modules of PyNaCl imported by --help", False, 0.0, plain("ratrod-help", "start_up_nacl")),
    *(Target("ChaCha20 bulk %s, times ssh's or 4/5 of the raw loop's" % way, True, 1.0, chacha(way)) for way in DIRECTIONS),
    Target("64-byte p99 beside a bulk stream, times alone", False, 10.0, plain("ratrod", "fair_ratio")),
]


def judged(bench):
    for target in TARGETS:
        reached = target.value(bench)
        met = None if reached is None else reached >= target.required if target.at_least else reached <= target.required
        yield Verdict(bench.label(target.name), "%s %g" % (">=" if target.at_least else "<=", target.required), reached, met)


def targets_table(bench):
    words = {True: "met", False: "NOT met", None: "not measured"}
    table = [("what ratrod.py (AEGIS) must reach", "required", "reached", "")]
    table += [(name, required, "-" if reached is None else "%.2f" % reached, words[met]) for name, required, reached, met in judged(bench)]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("%s  %s  %s  %s" % (line[0].ljust(widths[0]), line[1].ljust(widths[1]), line[2].rjust(widths[2]), line[3]) for line in table)


# ---------------------------------------------------------------------------------------------------- the command line


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"^model name\s*:\s*(.+)", file.read(), re.M).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def describe(bench, peers):
    """The machine, and what was compared on it."""
    packages = output_of(sys.executable, "-c", "import nacl; print(nacl.__version__)").strip()
    versions = {peer.name: peer.version() for peer in peers}
    machine = {
        "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "processor": processor(), "kernel": "%s %s" % (
            platform.system(), platform.release()), "python": "%s %s" % (platform.python_implementation(), platform.python_version()),
        "pynacl": packages, "generator": bench.generator.name, "versions": {name: found for name, found in versions.items() if found}}
    machine["line"] = "%s: %d cores of %s, %s, %s, PyNaCl %s; %s. Load: %s." % (
        machine["date"], machine["cores"], machine["processor"], machine["kernel"], machine["python"], packages,
        ", ".join("%s %s" % item for item in machine["versions"].items()), bench.generator.name)
    return machine


def some_of(known):
    """For argparse: names with commas between them, every one known."""
    def parse(text):
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError("%s: choose from %s" % (", ".join(unknown) or "nothing", ", ".join(known)))
        return names
    return parse


def parse_arguments(words):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--beside", metavar="FILE", help="another ratrod.py, which becomes the peer `beside`: the two in turn, round by round")
    other, words = first.parse_known_args(words)
    if other.beside:
        program = (sys.executable, other.beside)
        PEERS.insert(2, Peer("beside", "ratrod.py beside", ratrods(program), without_aegis, version(r"(\d\S+)", *program, "--version"), udp=True,
                             ours=True))
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first])
    parser.add_argument("--only", metavar="PEER,...", type=some_of(names), default=names, help=", ".join(names))
    parser.add_argument("--measure", metavar="NAME,...", type=some_of(MEASURES), default=MEASURES, help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="one round of short samples with fewer streams: a look, not a result")
    parser.add_argument("--repeat", metavar="N", type=int, help="rounds (default: 3, with --quick 1)")
    parser.add_argument("--seconds", metavar="S", type=float, help="of a sample (default: %g, with --quick %g)" % (Scale().seconds, QUICK.seconds))
    parser.add_argument("--minutes", metavar="M", type=float, default=12.0, help="begin no round that would not end by then (default: 12)")
    parser.add_argument("--json", metavar="FILE", help="write every value there")
    parser.add_argument("--svg", metavar="FILE", help="write the bar charts there")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README too")
    parser.add_argument("--targets", action="store_true", help="print what ratrod.py must reach beside what it reached")
    parser.add_argument("--python-load", action="store_true", help="generate the load in Python even where there is a compiler")
    return parser.parse_args(words)


def present_peers(names):
    """Those that can be run; says which cannot, and why."""
    present = []
    for peer in PEERS:
        if peer.name in names:
            reason = peer.missing()
            if reason:
                print("Without %s: %s" % (peer.title, reason), file=sys.stderr)
            else:
                present.append(peer)
    return present


def raise_descriptor_limit():
    """For this process, and so for all that it starts: the same for every peer."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def sshd_folder():
    """What Debian makes when its own sshd starts, and without which none starts as root."""
    folder = pathlib.Path("/run/sshd")
    if not hasattr(os, "geteuid") or os.geteuid() or folder.exists() or not which("sshd"):
        yield
        return
    folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        folder.rmdir()


def main(words=None):
    options = parse_arguments(words)
    raise_descriptor_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    peers = present_peers(options.only)
    steps = [step for step in STEPS if step.measure in options.measure]
    scale = QUICK if options.quick else Scale()
    if options.seconds:
        scale = scale._replace(seconds=options.seconds)
    processes = Processes()
    with tempfile.TemporaryDirectory(prefix="ratrod-bench-") as folder, sshd_folder():
        bench = Bench(pathlib.Path(folder), processes, make_generator(pathlib.Path(folder), options.python_load), scale)
        make_secrets(bench.secrets)
        machine = describe(bench, peers)
        try:
            bench.run(steps, peers, options.repeat or (1 if options.quick else 3), 60 * options.minutes)
        except KeyboardInterrupt:
            print("Interrupted: this is what there is so far.", file=sys.stderr)
        finally:
            processes.end_all()
    machine["rounds"] = bench.rounds
    machine["line"] += " Median of %d round%s, samples of %g s." % (bench.rounds, "" if bench.rounds == 1 else "s", scale.seconds)
    publish(Report(bench, steps, peers, machine), bench, options)
    return 0


def publish(report, bench, options):
    parts = [report.tables(), report.text_charts(), report.machine["line"]]
    if options.markdown:
        parts.append(report.markdown())
    if options.targets:
        parts.append(targets_table(bench))
    print("\n\n".join(part.rstrip("\n") for part in parts))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report.json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.svg:
        pathlib.Path(options.svg).write_text(report.svg(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
