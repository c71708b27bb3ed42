"""More than one machine: the PROXY protocol, servers that share a key folder behind a real HAProxy, and what the README says of both.
Longer with RATROD_LONG=1 and -rP, which shows the figures. Every form of a header is in unit/test_proxy_header.py."""

import contextlib
import copy
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest

import ratrod as module
from support import legacy_peer, ratrod2_peer as peer
from support.checked_load import Load
from support.kernel import owner
from support.keys import seed_of
from support.pressure import LONG, figure, is_closed, memory
from support.programs import LEGACY_E, PATIENCE, RATROD, RATROD2, STARTED, bound, descriptors, missing, need, readme, tcp_port, udp_originator
from support.proxy_headers import UNSPEC, addresses, introducing, tlv, v2
from support.rows import assert_each_raises, row
from support.sockets import accept, ask, ask_until_answered, dial, eventually, ping, port_of, receive_all, reset, talk, works

pytestmark = pytest.mark.usefixtures("no_traceback")

LOAD = 300 if LONG else 100  # whole connections before and after each event
FOREVER = "600"  # longer than any test waits: what ends before it has not waited for it
BALANCER, UNLISTED = "127.0.9.1", "127.0.9.2"
LISTED = BALANCER + ",127.0.10.0/24,::1"


# What must be taken, from where, and the client's address in the log; None: that of the proxy itself, for the header names none.
TAKEN = [
    (BALANCER, v2(addresses("198.51.100.9") + tlv(0x02, b"example.com") + tlv(0x04, bytes(40)) + tlv(0x20, bytes(60))), "198.51.100.9:4711"),
    (BALANCER, introducing(BALANCER), BALANCER + ":4711"),
    ("127.0.10.1", v2(bytes(20), UNSPEC), None),
    ("127.0.10.255", b"PROXY TCP6 2001:db8::11 ::2 4711 19000\r\n", "[2001:db8::11]:4711"),
    (BALANCER, b"PROXY UNKNOWN\r\n", None),
    # The log shows the address in it, and nothing else that it holds.
    (BALANCER, b"PROXY UNKNOWN \x1b[2J\r\n", None),
    (BALANCER, b"PROXY TCP6 ::ffff:127.0.0.1 ::1 1 2\r\n", "127.0.0.1:1"),
    (BALANCER, v2(addresses("127.0.0.2", 1) + tlv(0x04, b"\x1b")), "127.0.0.2:1"),
    ("::1", introducing("198.51.100.77"), "198.51.100.77:4711"),
    (UNLISTED, b"", None),
]
NAMED, UNBELIEVED = introducing("198.51.100.7"), introducing("198.51.100.99")
REFUSED = [
    *((BALANCER, header) for header in (
        b"", b"\0" * 9, v2(addresses("198.51.100.7") + bytes(65535 - 12)), NAMED * 2, NAMED + b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN\r\n" * 2,
        b"PROXY UNKNOWN " + b"x" * 200, b"PROXY TCP4 \x1b[31mred 10.0.0.2 4711 19000\r\n", b"PROXY TCP6 fe80::1%\x1b[2J\x07 ::1 1 2\r\n",
        b"PROXY TCP6 fe80::1%\nmarker ::1 1 2\r\n", b"PROXY " + b"\x1b" * 101)),
    ("127.0.9.3", UNBELIEVED), ("127.0.11.1", v2(family=UNSPEC)), (UNLISTED, b"PROXY TCP4 198.51.100.99 10.0.0.2 4711 19000\r\n"),
]


def introduced(port, header, source=BALANCER):
    """A connection from the proxy, on which it has said whose it is."""
    sock = dial(port, "::1" if source == "::1" else "127.0.0.1", source)
    sock.sendall(header)
    return sock


def enter(sock, keys):
    """A whole handshake: the link."""
    return peer.Client(sock, seed_of(keys.client)).handshake()


def still_open(socks):
    """Those that the other side has not ended; all that it may say is that it is overloaded."""
    return [sock for sock in socks if not is_closed(sock)]


@pytest.fixture
def proxied(serve):
    """proxied(flags...) -> (server, port): it takes PROXY headers from the listed sources."""
    return lambda *flags: serve("-v", "--proxy-protocol", LISTED, *flags)


def test_whose_header_is_believed(serve, keys, tcp_echo):
    """Networks, both families, and IPv4 as a listener on [::] sees it. Whoever is not listed needs no header, and is not believed one: it could be
    anybody, for the limits and for the log. Whoever is refused is so at once, and in silence: a stranger learns nothing from it."""
    server, port = serve("-v", "--legacy", "--proxy-protocol", LISTED, "--handshake-timeout", FOREVER, bind="[::]:0")
    for source, header in REFUSED:
        with row((source, header[:30])), introduced(port, header, source) as sock:
            with contextlib.suppress(ConnectionError):  # what comes behind the header is not looked at
                sock.sendall(b"ratrod2\n" + b"\0\x23" + bytes(135))
            assert peer.receive_to_end(sock) == b""
    for source in ("127.0.9.3", "127.0.11.1", UNLISTED):
        server.wait_for("❌ Refused `%s:" % re.escape(source))
    assert "Accepted" not in server.output and "198.51.100.99" not in server.output
    # The server lives, and takes what it must from the same sources.
    for source, header, shown in TAKEN:
        with row((source, header[:30])), introduced(port, header, source) as sock:
            assert enter(sock, keys).exchange("127.0.0.1:%d" % tcp_echo.port, b"!") == b"!"
            shown = re.escape(shown or "%s:%d" % sock.getsockname())
            server.wait_for("Accepted `%s`" % shown)
            server.wait_for("`%s` -> " % shown)
    # A header goes before any protocol: here before the original's.
    with introduced(port, introducing("198.51.100.8")) as sock:
        legacy_peer.Client(sock, legacy_peer.Identity.load(keys.client.path), "127.0.0.1:%d" % tcp_echo.port).handshake()
        server.wait_for(r"Accepted `198\.51\.100\.8:4711`")
    # Whoever is refused behind a header is named by it too.
    with introduced(port, introducing("198.51.100.9") + b"nonsense") as sock:
        assert peer.receive_to_end(sock) == b""
        server.wait_for(r"Refused `198\.51\.100\.9:4711`")
    assert all(line.isprintable() and not line.startswith("marker") for line in server.lines)


def test_cut_at_the_deadline(proxied, stack):
    """Whatever part of it has been said; and a byte now and then must not start the time anew."""
    _, port = proxied("--handshake-timeout", "0.5")
    drip, *silent = [stack.enter_context(introduced(port, said)) for said in (
        b"PROXY UNKNOWN ", b"", introducing("198.51.100.7")[:-1], b"PROXY TCP4 198.51", introducing("198.51.100.7"))]
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(90):
            drip.sendall(b"x")
            if is_closed(drip):
                raise ConnectionResetError
            threading.Event().wait(0.1)  # the drip
    assert [peer.receive_to_end(sock) for sock in silent] == [b""] * len(silent)


def test_limits_count_the_address_in_the_header(proxied, keys, stack):
    """Not the proxy's, or one of its clients could keep out all the others."""
    server, port = proxied("--handshake-timeout", FOREVER, "--max-handshakes-per-source", "3")
    def silent(sources):
        return [stack.enter_context(introduced(port, introducing(source))) for source in sources]
    def assert_served():
        with introduced(port, introducing("203.0.113.5")) as sock:
            enter(sock, keys)
    # 127.0.0.1, or the address of a listed source, brings no rights and asks for no second header, and its limits are its own.
    for source in ("127.0.0.1", BALANCER, "127.0.10.7", "::1"):
        with introduced(port, introducing(source)) as sock, pytest.raises(peer.PeerError):
            peer.Client(sock, bytes(range(32))).handshake()
        with introduced(port, introducing(source)) as sock:
            enter(sock, keys)
    for sources in (["198.51.100.7"] * 10, ["2001:db8:1:2::%x" % n for n in range(1, 11)], [BALANCER] * 50):  # an address, a /64, the proxy's own
        one = silent(sources)
        eventually(lambda one=one: len(still_open(one)) == 3, "three of one source are left")
        assert_served()
    others = silent(["198.51.100.%d" % n for n in range(100, 120)] + ["2001:db8:1:%x::1" % n for n in range(16, 26)])
    assert_served()
    assert len(still_open(others)) == 30 and server.process.poll() is None


MANY = 1000 if LONG else 300


def test_many_silent_ones_from_a_listed_source(proxied, keys):
    """A proxy that has gone mad, or that an attacker hides behind: bounded, and the next honest client is served."""
    server, port = proxied("--max-handshakes", "64")
    with introduced(port, introducing("203.0.113.5")) as sock:
        enter(sock, keys)
    files, size = descriptors(server), memory(server)
    for what, header in (("no header", lambda n: b""), ("half a header", lambda n: introducing("198.51.100.7")[:-1]),
                         ("an address each", lambda n: introducing("10.9.%d.%d" % divmod(n, 200)))):
        with contextlib.ExitStack() as stack:
            socks = []
            for n in range(MANY):
                socks.append(stack.enter_context(introduced(port, header(n))))
                if n % 150 == 149:  # within the listener's queue
                    with introduced(port, introducing("203.0.113.6")) as sock:
                        enter(sock, keys)
            left, more = len(still_open(socks)), (memory(server) - size) >> 20
            seen = "%d are kept, %d descriptors, %d MiB more" % (left, descriptors(server) - files, more)
            figure("%d silent connections from a listed source, %s" % (MANY, what), seen)
            # Those that were turned away are given 2 s to read why.
            assert left <= 64 and descriptors(server) - files <= 64 + module.LAST_WORDS + 20 and more < 50, (what, seen)
        eventually(lambda: descriptors(server) <= files + 2, lambda: "what they took is free again: %d" % (descriptors(server) - files))


def test_what_is_no_source():
    """A network that nobody meant would let its hosts pretend to be anybody."""
    assert_each_raises(module.ConfigError, "--proxy-protocol", module.parse_networks, [
        "127.0.0.1,", ",", "localhost", "10.0.0.0/33", "10.0.0.1/8", "127.1", "0x7f000001", "10.0.0.1-10.0.0.9", "::1/129", "fe80::1%lo",
        "*", "10.0.0.1:80"])


CONFIGURATION = """
global
    maxconn 4000
    nbthread 1
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
frontend front
    bind :19000
    default_backend ratrod
backend ratrod
    balance %s
    retries 3
    option redispatch 1
    default-server check inter 200ms fall 2 rise 1
%s"""


def configuration(ports, balance="roundrobin"):
    """For servers s0, s1 ... on ports of 127.0.0.1; each second one is introduced to by version 1."""
    return CONFIGURATION % (balance, "".join(
        "    server s%d 127.0.0.1:%d send-proxy%s\n" % (number, port, "" if number % 2 else "-v2") for number, port in enumerate(ports)))


class Balancer:
    """A running HAProxy. The test binds its ports and hands them over: HAProxy cannot be told to take free ones."""

    def __init__(self, start, folder, text):
        with socket.create_server(("127.0.0.1", 0), backlog=1000) as four, socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
            self.port, self.port_6 = port_of(four), port_of(six)
            file, binds = folder / "haproxy-here.cfg", ["    bind fd@%d\n" % made.fileno() for made in (four, six)]
            assert "    bind :19000\n" in text
            file.write_text(text.replace("    bind :19000\n", "".join(binds)))
            self.program = start("haproxy", "-db", "-f", file, pass_fds=(four.fileno(), six.fileno()))

    def saw(self, number, state, count=1):
        """Waits until its health check has found server sN UP or DOWN, for the count-th time."""
        self.program.wait_for("Server ratrod/s%d is %s" % (number, state), count)


class Machines:
    """Servers with one key folder, `balancer` before them."""

    def __init__(self, serve, balancer, n, flags, **options):
        self._serve = serve
        self._flags = ("-v", "--proxy-protocol", "127.0.0.1", "--drain", "30", *flags)
        started = [serve(*self._flags) for _ in range(n)]
        self.servers = [server for server, _ in started]
        self.ports = [port for _, port in started]
        self.balancer = balancer(configuration(self.ports, **options))
        self.port = self.balancer.port

    def restart(self, number):
        """Another server at the place of one that has ended."""
        self.servers[number], _ = self._serve(*self._flags, bind="127.0.0.1:%d" % self.ports[number])

    @property
    def links(self):
        """How many links each has accepted."""
        return [sum("Accepted" in line for line in server.lines) for server in self.servers]


@pytest.fixture
def balance(start, tmp_path):
    """balance(the text of its file) -> Balancer"""
    need("haproxy")
    return lambda text: Balancer(start, tmp_path, text)


@pytest.fixture
def machines(serve, balance):
    """machines(n, serve flags..., options of configuration()) -> Machines"""
    return lambda n, *flags, **options: Machines(serve, balance, n, flags, **options)


def test_tunnels_through_a_balancer(machines, client, keys, tcp_echo, udp_echo, stack):
    """Each server sees the client's own address, and that alone; UDP goes over one of them."""
    made = machines(3)
    through = client(made.port, "0:127.0.0.1:%d" % tcp_echo.port, "0:127.0.0.1:%d" % udp_echo.port).ready()
    port = tcp_port(through)
    for _ in range(9):  # held, so that each needs a link of its own
        ping(stack.enter_context(dial(port)), word=b"!")
    ask(port, b"?" * 300000)
    with udp_originator(through, 2) as originator:
        ask_until_answered(originator, b"who is there?")
    assert all(made.links), made.links
    # HAProxy comes from 127.0.0.1, where it is listed. Without the header the log would show that.
    for host, port, source, shown in (("127.0.0.1", made.port, "127.0.0.99", "127.0.0.99:%d"), ("::1", made.balancer.port_6, "::1", "[::1]:%d")):
        for _ in made.servers:
            sock = stack.enter_context(dial(port, host, source))
            enter(sock, keys)
            line = "Accepted `%s`" % shown % sock.getsockname()[1]
            eventually(lambda line=line: any(line in server.output for server in made.servers), line)


def test_probes_leave_nothing_in_the_log(serve, balance):
    """The health checks of both versions, and a probe of whoever is not listed: connect, and leave, as Kubernetes and balancers without the PROXY
    protocol do, every few seconds, for ever. Two servers see the same; the one with -v tells when there have been enough checks."""
    loud, loud_port = serve("-v", "--proxy-protocol", "127.0.0.1")
    quiet, quiet_port = serve("--proxy-protocol", "127.0.0.1")
    made = balance(configuration([loud_port, loud_port, quiet_port, quiet_port]))
    for _ in range(3):  # fewer than the places that one source has
        dial(quiet_port, source=UNLISTED).close()
        reset(dial(quiet_port, source=UNLISTED))
    with dial(quiet_port, source="127.0.0.77") as sock:  # whoever does say something is in the log: then the others have been looked at
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert peer.receive_to_end(sock) == b""
    quiet.wait_for(r"❌ Refused `127\.0\.0\.77:")
    loud.wait_for("DEBUG", 8)
    assert made.program.process.poll() is None and "DOWN" not in made.program.output
    assert quiet.stop() == 0
    assert [line for line in quiet.lines if not re.search(r"Starting server|The server's key|Refused `127\.0\.0\.77:", line)] == []


class Held:
    """A connection through the tunnel that stays open, and the server that carries it."""

    def __init__(self, port, listener, servers, stack):
        self.ends = [stack.enter_context(dial(port)), stack.enter_context(accept(listener))]
        talk(*self.ends)
        self.server = owner(servers, self.ends[1].getpeername()[1], port_of(listener))

    def how_it_ended(self):
        """(what the originator sees, what the target sees): "reset" or "end"."""
        return tuple(map(self._end, self.ends))

    @staticmethod
    def _end(sock):
        try:
            receive_all(sock)
            return "end"
        except ConnectionError:
            return "reset"


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="no /proc on this system")
@pytest.mark.parametrize("n", [2, 3] if LONG else [3])
def test_a_server_killed_under_load(machines, keys, connect, tcp_echo, listener, n):
    """What it carried is reset, no connection fails once the health check has seen it, and it is used again when it is back."""
    made = machines(n)
    client = connect(made.port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    holder = connect(made.port, "0:127.0.0.1:%d" % port_of(listener)).ready()
    with contextlib.ExitStack() as stack:
        held = [Held(tcp_port(holder), listener, made.servers, stack) for _ in range(4 * n)]
        by_server = [[one for one in held if one.server is server] for server in made.servers]
        assert all(by_server), [len(ones) for ones in by_server]
        with Load(tcp_port(client)) as load:
            load.go_on(LOAD)
            killed = time.monotonic()
            made.servers[0].process.kill()
            made.balancer.saw(0, "DOWN")
            seen = time.monotonic()
            load.go_on(2 * LOAD if not LONG else 10000)
            endings = [one.how_it_ended() for one in by_server[0]]
            for one in sum(by_server[1:], []):
                talk(*one.ends)
            made.restart(0)
            made.balancer.saw(0, "UP")
            with contextlib.ExitStack() as links:
                for _ in range(n):
                    enter(links.enter_context(dial(made.port)), keys)
                made.servers[0].wait_for("Accepted")
            load.go_on(LOAD)
            for one in sum(by_server[1:], []):
                talk(*one.ends)
    unseen = [failure for failure in load.failures if killed <= failure.at + failure.took and failure.at <= seen]
    figure("one of %d servers killed under load" % n, load)
    figure("... the health check saw it after", "%.2f s" % (seen - killed))
    figure("... connections that it carried", "%d, at the originator %s, at the target %s" % (
        len(endings), *({how: [pair[side] for pair in endings].count(how) for how in ("reset", "end")} for side in (0, 1))))
    figure("... connections that failed between the kill and that, and afterwards", (len(unseen), len(load.failures_since(seen))))
    assert not load.failures_since(seen), load.failures_since(seen)[:10]
    assert not load.cut and len(load.failures) == len(unseen)
    assert set(endings) == {("reset", "reset")}


@pytest.mark.parametrize("mode", [RATROD2, LEGACY_E], ids=lambda mode: mode.name)
def test_each_server_restarted_in_turn_under_load(machines, connect, tcp_echo, mode):
    """SIGTERM, and a new one on the same port: a rolling update. Nothing is lost at all."""
    made = machines(2, *mode.serve)
    client = connect(made.port, *mode.connect, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    with Load(tcp_port(client)) as load:
        for number in range(len(made.servers)) if not LONG else [0, 1] * 10:
            load.go_on(LOAD)
            before = made.balancer.program.output.count("ratrod/s%d is DOWN" % number)
            assert made.servers[number].stop() == 0
            made.balancer.saw(number, "DOWN", before + 1)
            load.go_on(LOAD)
            made.restart(number)
            made.balancer.saw(number, "UP", before + 1)
        load.go_on(LOAD)
    figure("%s: 2 servers behind HAProxy restarted in turn under load" % mode.name, load)
    assert not load.failures, load.failures[:10]


def test_reverse_tunnels_want_one_server(machines, connect, tcp_echo):
    """What the README says: with all links of a client's address at one server a reverse tunnel works, and moves when that server is gone."""
    made = machines(2, "--allow-listen", balance="source")
    client = connect(made.port, "R:0:127.0.0.1:%d" % tcp_echo.port).ready()
    port = bound(client)
    for _ in range(20):
        ask(port)
    assert 0 in made.links, made.links
    number = next(number for number, links in enumerate(made.links) if links)
    made.servers[number].process.kill()
    eventually(lambda: works(port), "it listens at the other server")
    for _ in range(20):
        ask(port)
    assert made.links[1 - number]


def test_the_readmes_haproxy_file(serve, balance, connect, tcp_echo, tmp_path):
    """It is valid as it is. It works with nothing changed but where it listens and where the servers are; one of them is stopped under load."""
    text = readme("haproxy")
    need("haproxy")
    (tmp_path / "haproxy.cfg").write_text(text)
    done = subprocess.run(["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    shown = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0 and not re.search("WARNING|ALERT", shown), shown
    names = re.findall(r"^    server (\S+) ", text, re.MULTILINE)
    started = [serve("--proxy-protocol", "127.0.0.1", "--drain", "30") for _ in names]
    ports = iter(port for _, port in started)
    made = balance(re.sub(r"^(    server \S+) \S+", lambda match: "%s 127.0.0.1:%d" % (match.group(1), next(ports)), text, flags=re.MULTILINE))
    assert len(names) >= 2 and not list(ports)
    client = connect(made.port, "0:127.0.0.1:%d" % tcp_echo.port).ready()
    with Load(tcp_port(client)) as load:
        load.go_on(LOAD)
        assert started[0][0].stop() == 0
        load.go_on(LOAD)  # until a health check has seen it, each costs another try
    assert not load.failures, load.failures[:10]
    made.program.wait_for("Server ratrod/%s is DOWN" % names[0])
    ask(tcp_port(client))


@pytest.fixture
def manifest():
    """The README's documents for Kubernetes by their kind."""
    text = readme("kubernetes")
    try:
        import yaml
    except ImportError:
        missing("PyYAML")
    documents = list(yaml.safe_load_all(text))
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents) and set(kinds) == {"Secret", "Deployment", "Service"}
    return kinds


def test_the_readmes_manifest_is_valid(manifest):
    """By the schemas of the oldest and the newest Kubernetes, where unknown fields are errors. It can refuse, or that would say nothing."""
    try:
        import kubernetes_validate
    except ImportError:
        missing("kubernetes-validate")
    for document in manifest.values():
        for version in ("1.25", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)
    for damage in (lambda spec: spec.update(replicas="three"), lambda spec: spec["template"]["spec"].update(terminationGracePeriod=45),
                   lambda spec: spec["template"]["spec"]["containers"][0].pop("name")):
        document = copy.deepcopy(manifest["Deployment"])
        damage(document["spec"])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_what_the_manifest_says_fits_together(manifest):
    """A schema does not see it."""
    deployment, service, secret = (manifest[kind] for kind in ("Deployment", "Service", "Secret"))
    template = deployment["spec"]["template"]
    pod = template["spec"]
    container, = pod["containers"]
    assert deployment["spec"]["replicas"] >= 2
    assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == service["spec"]["selector"]
    volume, = pod["volumes"]
    mount, = container["volumeMounts"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"] and mount["name"] == volume["name"] and mount["readOnly"]
    assert {"key", "authorized_keys"} <= set(secret["stringData"])
    # YAML 1.1 reads 0400 as octal. The kubelet adds the group's right to read because of fsGroup: the server runs as another user than root.
    assert volume["secret"]["defaultMode"] == 0o400 and pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
    command = [*container["command"], *container.get("args", ())]
    assert command[command.index("-k") + 1] == mount["mountPath"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + int(command[command.index("--drain") + 1])
    port, = container["ports"]
    assert command[-1].rpartition(":")[2] == str(port["containerPort"])
    assert {port["name"]} == {container[probe]["tcpSocket"]["port"] for probe in ("readinessProbe", "livenessProbe")}
    assert port["name"] == service["spec"]["ports"][0]["targetPort"]


class SecretVolume:
    """A folder as the kubelet makes it from a Secret: files behind two symbolic links, of which one is changed at an update, and of another owner."""

    def __init__(self, path, keys):
        self.path, self._version = path, 0
        path.mkdir()
        self.update(keys)
        for name in os.listdir(path / "..data"):
            (path / name).symlink_to(os.path.join("..data", name))

    def update(self, keys):
        self._version += 1
        folder = self.path / ("..%d" % self._version)
        shutil.copytree(keys.path, folder)
        for name in os.listdir(folder):
            os.chmod(folder / name, 0o440)
            os.chown(folder / name, 65531, 65531)
        (self.path / "..new").symlink_to(folder.name)
        os.replace(self.path / "..new", self.path / "..data")


READ_ONLY = ("unshare", "--mount", "sh", "-ec", 'mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"; exec "$@"')


def test_the_manifests_command_runs_as_in_a_pod(start, connect, manifest, keys, second, tcp_echo, tmp_path):
    """Its own words, but for program, folder and port; the folder is read-only, and its files are another user's: that they may be read by others is
    no warning then, as with ssh. A key that comes with an update of the Secret is taken, a key that goes loses its links."""
    need("unshare")
    if subprocess.run([*READ_ONLY, str(tmp_path), "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        missing("permission to mount")
    if os.geteuid():
        missing("the right to give files away (root)")
    volume = SecretVolume(tmp_path / "volume", keys.server)
    container = manifest["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    program, *words = [*container["command"], *container.get("args", ())]
    assert program == "ratrod"
    words[words.index("-k") + 1] = volume.path
    words[-1] = "127.0.0.1:0"
    server = start(*READ_ONLY, volume.path, *RATROD, *words)
    port = int(server.wait_for(STARTED).group(1))
    tunnel = "0:127.0.0.1:%d" % tcp_echo.port
    client = connect(port, "--max-retry-count", "1", tunnel).ready()
    ask(tcp_port(client))
    keys.server.write("authorized_keys", second.public + "\n")
    volume.update(keys.server)
    assert client.wait() == 3
    other = start(*RATROD, "-k", second.path, "connect", "127.0.0.1:%d" % port, tunnel).ready()
    ask(tcp_port(other))
    assert server.stop() == 0
    assert "can be read by others" not in server.output
