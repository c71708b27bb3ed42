"""--metrics: what a Prometheus server reads, judged by the parser of its own client library; and what else may come to that port."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.many_lines import run_lines
from support.programs import LEGACY, LISTENING, PATIENCE, RATROD2, need, tcp_port, udp_originator
from support.relays import Door
from support.sockets import ask, ask_udp, dial, eventually, free_port, ping, port_of, receive_all, receive_exactly, reset

pytestmark = pytest.mark.usefixtures("no_traceback")

ANSWERS = r"Metrics on `http://(\S+):(\d+)/metrics`"


def metrics_port(program, n=1):
    return int(program.wait_for(ANSWERS, n).group(2))


def get(port, path="/metrics", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def scrape(port):
    """{(name, label values...): value}; each sample once, each family with its help and type."""
    status, headers, text = get(port)
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter"), family
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample
            place = (sample.name, *sample.labels.values())
            assert place not in found and sample.value >= 0, sample
            found[place] = sample.value
    return found


def becomes(program, expected):
    """What is scraped has these values soon, and is returned then."""
    port, seen = metrics_port(program), {}
    def looks():
        seen.update(scrape(port))
        return {place: seen.get(place) for place in expected} == expected
    eventually(looks, lambda: (expected, {place: seen.get(place) for place in expected}))
    return seen


METRICS = "--metrics", "127.0.0.1:0"


def test_a_life_in_numbers(forward, keys, target, udp_echo):
    """TCP and UDP, while it lives and when it is over, closed, reset and refused, seen from both ends."""
    def serve_one(connection):
        connection.sendall(b"x" * 100_000)
        with contextlib.suppress(OSError):
            receive_all(connection)
    server, client = forward(RATROD2, "0:%d" % target(serve_one).port, "0:%d" % udp_echo.port, "0:127.0.0.2:9", connect_flags=METRICS,
                             serve_flags=(*METRICS, "-r", r"127\.0\.0\.1"))
    version = {place for place in becomes(client, {("ratrod_connected",): 1}) if place[0] == "ratrod_info"}
    assert len(version) == 1 and re.fullmatch(r"[\d.]+", version.pop()[1])
    began = scrape(metrics_port(server))
    for program, peer in ((server, keys.client), (client, keys.server)):
        becomes(program, {("ratrod_streams",): 0, ("ratrod_udp_sessions",): 0, ("ratrod_bytes_total", "sent"): 0, ("ratrod_links", "busy"): 0,
                          ("ratrod_streams_total", "closed"): 0, ("ratrod_streams_total", "failed"): 0, ("ratrod_handshakes_under_way",): 0})
        assert scrape(metrics_port(program))["ratrod_key_links", peer.public] >= 1
    first, second = dial(tcp_port(client)), dial(tcp_port(client))
    for connection in (first, second):
        connection.sendall(b"y" * 1000)
        assert receive_exactly(connection, 100_000)
    # Alive: counted all the same.
    for program, sent, received, peer in ((client, 2000, 200_000, keys.server), (server, 200_000, 2000, keys.client)):
        becomes(program, {("ratrod_streams",): 2, ("ratrod_links", "busy"): 2, ("ratrod_bytes_total", "sent"): sent,
                          ("ratrod_bytes_total", "received"): received, ("ratrod_key_streams", peer.public): 2,
                          ("ratrod_key_bytes_total", peer.public, "sent"): sent, ("ratrod_key_bytes_total", peer.public, "received"): received})
    first.close()
    reset(second)
    with udp_originator(client, 2) as originator:
        originator.send(b"z" * 500)
        assert len(originator.recv(1000)) == 500
        with pytest.raises(ConnectionResetError):
            dial(tcp_port(client, 3)).recv(1)
        for program, sent, received, peer, results in ((client, 2500, 200_500, keys.server, {"closed": 1, "reset": 1, "refused": 1, "failed": 0}),
                                                       (server, 200_500, 2500, keys.client, {"closed": 1, "refused": 1})):
            done = {("ratrod_streams_total", name): count for name, count in results.items()}
            seen = becomes(program, {("ratrod_streams",): 0, ("ratrod_udp_sessions",): 1, ("ratrod_links", "busy"): 1, **done,
                                     ("ratrod_bytes_total", "sent"): sent, ("ratrod_bytes_total", "received"): received,
                                     ("ratrod_key_bytes_total", peer.public, "sent"): sent, ("ratrod_key_streams", peer.public): 0})
            assert seen["ratrod_links_total",] >= 2 and seen["ratrod_handshakes_failed_total",] == 0
    if os.path.isdir("/proc/self/fd"):
        process = server.process.pid
        now = scrape(metrics_port(server))
        assert 0 < now["process_open_fds",] < 50 and 5e6 < now["process_resident_memory_bytes",] < 5e8
        assert abs(len(os.listdir("/proc/%d/fd" % process)) - now["process_open_fds",]) <= 2
    assert now["process_start_time_seconds",] == began["process_start_time_seconds",]
    assert 0 <= time.time() - now["process_start_time_seconds",] < 600


def test_streams_that_lose_their_links(serve, ratrod, keys, target, tcp_echo):
    """Those that wait, those that went on, and those that did not, with the reason: in the metrics, and in the status table."""
    server, port = serve(*METRICS)
    door = Door(target, port)
    client = ratrod("-k", keys.client.path, "connect", *METRICS, "--resume", "1", "127.0.0.1:%d" % door.port, "0:%d" % tcp_echo.port)
    detached, resumed, by_time = ("ratrod_streams_detached",), ("ratrod_streams_resumed_total",), ("ratrod_streams_given_up_total", "time")
    with dial(tcp_port(client)) as connection:
        ping(connection)
        becomes(client, {detached: 0, resumed: 0, by_time: 0})
        door.cut_all()
        ping(connection)
        for program in (client, server):
            becomes(program, {detached: 0, resumed: 1, by_time: 0})
        door.to = None
        door.cut_all()
        becomes(server, {detached: 1, resumed: 1, by_time: 0})
        becomes(client, {detached: 0, resumed: 1, by_time: 1})
    for program, words in ((client, "0 streams detached, 1 resumed, given up: 1 (time)"), (server, "1 stream detached, 1 resumed, given up: none")):
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for(re.escape("📊 " + words))


def test_sessions_that_are_over_stay_counted(forward, udp_echo):
    server, client = forward(RATROD2, "0:%d" % udp_echo.port, serve_flags=METRICS, connect_flags=(*METRICS, "--udp-timeout", "0.5"))
    with udp_originator(client) as originator:
        ask_udp(originator, b"abc")
    for program in (client, server):
        becomes(program, {("ratrod_udp_sessions",): 0, ("ratrod_bytes_total", "sent"): 3, ("ratrod_bytes_total", "received"): 3})


def test_legacy_is_counted_too(forward, keys, tcp_echo):
    server, client = forward(LEGACY, "0:%d" % tcp_echo.port, serve_flags=METRICS, connect_flags=METRICS)
    ask(tcp_port(client), b"12345")
    for program, peer in ((client, keys.server), (server, keys.client)):
        becomes(program, {("ratrod_streams",): 0, ("ratrod_streams_total", "closed"): 1, ("ratrod_key_bytes_total", peer.public, "sent"): 5,
                          ("ratrod_key_bytes_total", peer.public, "received"): 5})


def test_a_server_that_goes_away_and_strangers(forward, serve, keys, second, ratrod, tcp_echo):
    server, client = forward(RATROD2, "0:%d" % tcp_echo.port, serve_flags=METRICS, connect_flags=(*METRICS, "--max-retry-interval", "0.1"))
    port = int(server.wait_for(r"Starting server on `.*:(\d+)`").group(1))
    keys.server.write("authorized_keys", keys.client.public + "\n")
    assert ratrod("-k", second.path, "connect", "127.0.0.1:%d" % port).wait() == 3
    with dial(port) as stranger:
        becomes(server, {("ratrod_handshakes_failed_total",): 1, ("ratrod_handshakes_under_way",): 1})
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        becomes(server, {("ratrod_handshakes_failed_total",): 2, ("ratrod_handshakes_under_way",): 0})
    server.kill()
    seen = becomes(client, {("ratrod_connected",): 0, ("ratrod_reconnects_total",): 0})
    assert seen["ratrod_handshakes_failed_total",] >= 1
    serve(bind="127.0.0.1:%d" % port)
    becomes(client, {("ratrod_connected",): 1, ("ratrod_reconnects_total",): 1})


def test_reverse_tunnels_and_one_that_waits_for_its_server(serve, client, tcp_echo):
    """It answers from the first moment on: a client that is not there yet is what an alarm is about."""
    port = free_port()
    client = client(port, "R:0:127.0.0.1:%d" % tcp_echo.port, flags=(*METRICS, "--max-retry-count", "1000", "--max-retry-interval", "0.2"))
    becomes(client, {("ratrod_connected",): 0})
    server, _ = serve("--allow-listen", *METRICS, bind="127.0.0.1:%d" % port)
    ask(int(server.wait_for(LISTENING).group(1)), b"1234567")
    for program in (client, server):
        becomes(program, {("ratrod_streams_total", "closed"): 1, ("ratrod_bytes_total", "sent"): 7, ("ratrod_bytes_total", "received"): 7})
    becomes(client, {("ratrod_connected",): 1})


def test_other_requests(serve):
    server, _ = serve(*METRICS)
    port = metrics_port(server)
    done = subprocess.run([need("curl"), "-sS", "-i", "--max-time", "20", "http://127.0.0.1:%d/metrics?x=1" % port], capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"HTTP/1.1 200 OK\r\n") and b"ratrod_info{" in done.stdout
    assert [get(port, path)[0] for path in ("/", "/metric", "/metrics/", "/../metrics", "/Metrics")] == [404] * 5
    for method in ("POST", "HEAD", "DELETE", "OPTIONS"):
        status, headers, _ = get(port, method=method)
        assert (status, headers["Allow"], headers["Connection"]) == (405, "GET", "close")
    for request, code in ((b"nonsense\r\n\r\n", 400), (b"GET /metrics\r\n\r\n", 400), (b"GET http://x/metrics HTTP/1.1\r\n\r\n", 400),
                          (b"\r\n\r\n", 400), (b"GET /metrics HTTP/2.0\r\n\r\n", 400), (b"\x16\x03\x01\x02\n\n", 400),
                          (b"GET /metrics HTTP/1.0\n\n", 200), (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 8000 + b"\r\n\r\n", 200),
                          (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000, 400)):
        with dial(port) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            answer = receive_all(connection)
            assert answer.startswith(b"HTTP/1.1 %d " % code) and b"\r\nConnection: close\r\n" in answer, (request[:50], answer[:100])
    # In pieces, as a slow network has it.
    with dial(port) as connection:
        for byte in b"GET / HTTP/1.1\r\nHost: x\r\n\r\n":
            connection.sendall(bytes([byte]))
        assert receive_all(connection).startswith(b"HTTP/1.1 404 ")
    assert server.process.poll() is None


def test_those_who_say_nothing_make_room(serve):
    """16 at once; the oldest goes, and a scrape is answered all the same. None holds up the end."""
    server, _ = serve(*METRICS)
    port = metrics_port(server)
    silent = [dial(port) for _ in range(20)]
    assert scrape(port)
    for connection in silent[:4]:
        assert connection.recv(1) == b""
    silent[-1].setblocking(False)
    pytest.raises(BlockingIOError, silent[-1].recv, 1)
    assert server.stop() == 0
    for connection in silent:
        connection.close()


def test_workers_have_ports_one_after_the_other(ratrod, keys, client):
    """No client reaches one of them, through whichever worker."""
    port = free_port(2)
    server = ratrod("-k", keys.server.path, "serve", "--workers", "2", "--metrics", "127.0.0.1:%d" % port, "127.0.0.1:0")
    assert sorted(metrics_port(server, n) for n in (1, 2)) == [port, port + 1]
    assert scrape(port) and scrape(port + 1)
    assert server.stop() == 0
    server = ratrod("-k", keys.server.path, "serve", "--workers", "2", *METRICS, "127.0.0.1:0")
    assert len({metrics_port(server, n) for n in (1, 2)}) == 2
    ports = [metrics_port(server, n) for n in (1, 2)]
    assert scrape(ports[0]) and scrape(ports[1])
    bound = int(server.wait_for(r"Starting server on `127.0.0.1:(\d+)").group(1))
    program = client(bound, *("0:127.0.0.1:%d" % port for port in ports)).ready()
    for n in range(8):
        pytest.raises(OSError, scrape, tcp_port(program, n % 2 + 1))


def test_a_new_server_beside_one_that_drains(serve, connect, tcp_echo):
    """--reuse-port shares the port of the metrics as well, or the new one could not begin; and who drains leaves it to the new one."""
    port = free_port()
    words = "--reuse-port", "--drain", "60", "--metrics", "127.0.0.1:%d" % port
    old, server_port = serve(*words)
    client = connect(server_port, "0:%d" % tcp_echo.port).ready()
    with dial(tcp_port(client)) as connection:
        ping(connection, word=b"1")
        serve(*words, bind="127.0.0.1:%d" % server_port)
        old.process.terminate()
        old.wait_for("Ending")
        for _ in range(8):
            assert scrape(port)["ratrod_streams",] == 0
    assert old.wait() == 0


def test_where_it_cannot_listen(keys, serve):
    _, port = serve()
    commands = (["-k", keys.client.path, "connect", "127.0.0.1:%d" % port, "0:127.0.0.1:9"], ["-k", keys.server.path, "serve", "127.0.0.1:0"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [([*command, "--metrics", where], code, said) for command in commands for where, code, said in (
            ("127.0.0.1:%d" % port_of(taken), 1, "cannot listen on `127.0.0.1:%d`: Address already in use" % port_of(taken)),
            ("9100", 2, "cannot understand the address for metrics `9100`"), (":1", 2, "its host is empty"), ("127.0.0.1:65536", 2, "is not a port"))]
        cases += [([*command, "--workers", "2", "--metrics", "127.0.0.1:65535"], 2, "--metrics") for command in commands]
        for (words, code, said), outcome in zip(cases, run_lines([words for words, _, _ in cases])):
            assert outcome.code == code and said in outcome.err, (words, outcome)
