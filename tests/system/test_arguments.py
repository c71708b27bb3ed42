"""Files of arguments (@file), and RATROD_* in the environment, as the real program reads them; what they mean is in unit/test_usage.py."""

import re

import pytest

from support.many_lines import run_lines
from support.programs import RATROD, tcp_port
from support.sockets import ask

pytestmark = pytest.mark.usefixtures("no_traceback")


def run_rows(rows):
    """[(row, Outcome)] of rows that begin with a line (a text), and the environment that it has besides this process's."""
    environments = [{name: str(value) for name, value in row[1].items()} for row in rows]
    return list(zip(rows, run_lines([row[0].split() for row in rows], prepare="os.environ.update(%r[number])" % environments)))


def test_a_tunnel_whose_words_stand_in_files(start, serve, keys, tcp_echo, tmp_path):
    """Comments, quotes and line ends as a shell has them; a file in a file; the rest on the command line."""
    _, port = serve()
    spaced = tmp_path / "a folder"
    keys.client.path.rename(spaced)
    (tmp_path / "common").write_bytes(("\ufeff# who we are\n-k '%s' --udp-timeout=5   # and so on\r\n\r\n" % spaced).encode())
    (tmp_path / "home.conf").write_text("@common connect\n127.0.0.1:%d\n" % port)
    client = start(*RATROD, "@home.conf", "0:%d" % tcp_echo.port, cwd=tmp_path).ready()
    ask(tcp_port(client))


def test_an_error_names_the_file_or_the_variable_that_it_is_about(keys, tmp_path):
    (tmp_path / "F").write_text("serve \n'")
    ssh, key_path = "connect ssh://S 1:x:2", " -k %s" % keys.client.path
    for (line, variables, *wanted), done in run_rows([
        # One that is wrong by itself is a wrong command line; help does not mind it.
        ("@%s" % (tmp_path / "F"), {}, "line 2 of the arguments in `%s`: no closing quotation" % (tmp_path / "F")),
        ("serve S:1", {"RATROD_MAX_LINKS": "x"}, "RATROD_MAX_LINKS in the environment: `--max-links` takes "),
        ("serve -h", {"RATROD_MAX_LINKS": "x"}, ""),
        # One that does not go with the rest.
        ("connect S:1" + key_path, {"RATROD_PROXY": "proxy:3128"}),
        ("serve 127.0.0.1:0" + key_path, {"RATROD_METRICS": "1:nowhere", "RATROD_WORKERS": "1"}),  # the other one has nothing to do with it
        ("serve 127.0.0.1:0" + key_path, {"RATROD_REMOTE_REGEX": "((("}),
        ("serve 127.0.0.1:0" + key_path, {"RATROD_PROXY_PROTOCOL": "10.0.0.0/33"}),
        ("connect S:1 1:socks" + key_path, {"RATROD_SOCKS_USER": "me"}), (ssh, {"RATROD_SSH_COMMAND": "ssh '"}), (ssh, {"RATROD_WORKERS": "2"}),
        (ssh, {"RATROD_LEGACY": "1"}), ("connect S:1 stdio:x:2" + key_path, {"RATROD_WORKERS": "2"}),
    ]):
        if wanted:
            assert (done.code, done.err.partition("ratrod: ")[2].startswith(wanted[0])) == (2 if wanted[0] else 0, True), (line, variables, done)
        else:
            assert done.code == 2 and done.err.strip().endswith("(see %s in the environment)" % min(variables)), (line, variables, done)


def test_the_environment_gives_what_the_command_line_leaves_open(serve, keys, tmp_path):
    _, port = serve()
    server, client, nowhere = "connect 127.0.0.1:%d " % port, keys.client.path, {"RATROD_KEY_PATH": tmp_path / "nowhere"}
    for (line, variables, code, shown), done in run_rows([
        (server + "--check", {"RATROD_KEY_PATH": client}, 0, "lets this client in"),
        # The command line wins, in whichever form.
        (server + "--check -k %s" % client, nowhere, 0, "lets this client in"),
        (server + "--check --key-path=%s" % client, nowhere, 0, "lets this client in"),
        (server + "--check", nowhere, 2, "nowhere.*RATROD_KEY_PATH"),
        (server, {"RATROD_KEY_PATH": client, "RATROD_CHECK": "Yes", "RATROD_VERBOSE": "1"}, 0, "(?s)lets this client in.*DEBUG"),
    ]):
        assert done.code == code and re.search(shown, done.out + done.err), (line, variables, done)
