"""ratrod as one file, on machines that have PyNaCl and nothing else: ratrod.pyz as `python setup.py pyz` builds it, and ratrod.py alone.
Every Python here runs with -I, in an empty folder: nothing that is installed for the tests can stand in for what is missing."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import zipfile

import docopt
import nacl
import pytest
import setuptools

from support.programs import CACHE, LISTENING, PATIENCE, ROOT, STARTED, install, kept, missing
from support.sockets import ping

NAMES = ["LICENSE", "LICENSE.docopt-ng", "__main__.py", "docopt/__init__.py", "docopt/_version.py", "ratrod.py"]
SOURCES = ("setup.py", "ratrod.py", "README.md", "LICENSE")
DEBIAN = "/usr/bin/python3"


def run(*command, cwd, **environment):
    """(exit code, stdout, stderr) of a program that ends by itself; no traceback shows in them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], capture_output=True, stdin=subprocess.DEVNULL, cwd=str(cwd), timeout=4 * PATIENCE,
                          env={**env, "HOME": str(cwd), **{name: str(value) for name, value in environment.items()}})
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in out + err, out + err
    return done.returncode, out, err


def build(*words, cwd, python=sys.executable, folder=ROOT, **environment):
    return run(python, folder / "setup.py", "pyz", *words, cwd=cwd, **environment)


@pytest.fixture(scope="session")
def pyz(tmp_path_factory):
    """ratrod.pyz, built from this checkout."""
    folder = tmp_path_factory.mktemp("pyz")
    code, out, err = build(cwd=folder)
    assert code == 0 and [path.name for path in folder.iterdir()] == ["ratrod.pyz"], out + err
    return folder / "ratrod.pyz"


IN_VENV = pathlib.Path("Scripts" if os.name == "nt" else "bin", "python")


def make_venv(place):
    """The Python of a new environment without anything in it, not even pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    return place / IN_VENV


@pytest.fixture(scope="session")
def bare():
    """A Python without a package."""
    with tempfile.TemporaryDirectory() as scratch:
        yield make_venv(pathlib.Path(scratch, "venv"))


@pytest.fixture(scope="session")
def pynacl_alone():
    """A Python with PyNaCl, in the version that the tests themselves run on, and nothing more; installed once and kept."""
    def make(folder):
        _, site_packages, _ = run(make_venv(folder), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=CACHE)
        install(site_packages.strip(), "pynacl==" + nacl.__version__, "--only-binary", ":all:")
    name = "venv-pynacl-%s-%s" % (nacl.__version__, sys.implementation.cache_tag)
    if (CACHE / name).exists() and not (CACHE / name / IN_VENV).exists():  # it points to a Python that is gone
        shutil.rmtree(str(CACHE / name), ignore_errors=True)  # another run may be at it
    python = kept(name, make) / IN_VENV
    for module, code in (("nacl.bindings", 0), ("docopt", 1), ("ratrod", 1)):
        assert subprocess.run([str(python), "-I", "-c", "import " + module], stderr=subprocess.DEVNULL, cwd=str(CACHE)).returncode == code, module
    return python


@pytest.fixture(scope="session")
def debian():
    """Debian's own Python with its own PyNaCl."""
    program = "import importlib.util as util; print(getattr(util.find_spec('nacl'), 'origin', None))"
    found = run(DEBIAN, "-I", "-c", program, cwd="/")[1] if os.path.exists(DEBIAN) else ""
    if "/usr/lib/python3/dist-packages/" not in found:
        missing("PyNaCl of Debian's own Python (apt-get install python3-nacl)")
    return DEBIAN


@pytest.fixture(params=["ratrod.pyz", "ratrod.py"])
def single(request, tmp_path):
    """Each of the two files, alone in an empty folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return pathlib.Path(shutil.copy2(str(request.getfixturevalue("pyz") if request.param == "ratrod.pyz" else ROOT / request.param), str(folder)))


def test_two_builds_are_the_same_bytes(pyz, tmp_path):
    """So that whoever distrusts a ratrod.pyz can make it again and compare."""
    folder = tmp_path / "another" / "place"
    folder.mkdir(parents=True)
    for name in SOURCES:
        shutil.copy(str(ROOT / name), str(folder))
        os.chmod(str(folder / name), 0o600)
        os.utime(str(folder / name), (1, 1))
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh"] if os.name == "posix" else []
    code, out, err = run(*command, sys.executable, folder / "setup.py", "pyz", "--output", "other.pyz", cwd=folder, PYTHONHASHSEED=1, TZ="Asia/Tokyo",
                         LC_ALL="C", SOURCE_DATE_EPOCH=1000000000)
    assert code == 0 and (folder / "other.pyz").read_bytes() == pyz.read_bytes(), out + err
    # And a build in place of an earlier one, from elsewhere. It says what it made, as `sha256sum` and `ls` show it.
    code, out, err = build("-o", folder / "other.pyz", cwd=tmp_path, PYTHONHASHSEED=2)
    data = pyz.read_bytes()
    assert code == 0 and (folder / "other.pyz").read_bytes() == data, out + err
    assert str(folder / "other.pyz") in out and "sha256 " + hashlib.sha256(data).hexdigest() in out and "%d bytes" % len(data) in out, out
    if os.name == "posix":
        assert stat.S_IMODE((folder / "other.pyz").stat().st_mode) == stat.S_IMODE(pyz.stat().st_mode) == 0o755


def test_what_is_in_it(pyz):
    # No bytecode, which one Python alone could use; nothing compressed, which two zlibs do differently; the licences, which both of them ask for.
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")
    with zipfile.ZipFile(str(pyz)) as archive:
        assert archive.namelist() == NAMES and archive.testzip() is None
        for entry in archive.infolist():
            assert (entry.date_time, entry.compress_type, entry.create_system) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED, 3)
            assert (entry.external_attr >> 16, entry.extra, entry.comment) == (0o100644, b"", b"")
        for name, path in (("ratrod.py", ROOT / "ratrod.py"), ("LICENSE", ROOT / "LICENSE"), ("docopt/__init__.py", docopt.__file__)):
            assert archive.read(name) == pathlib.Path(path).read_bytes(), name
        assert b"Vladimir Keleshev" in archive.read("LICENSE.docopt-ng")


def only_line(done):
    """The one line that a failed build says, after what setuptools says of each command."""
    code, out, err = done
    assert code == 1 and out in ("", "running pyz\n") and len(err.splitlines()) == 1, done
    return err


def test_a_build_without_what_it_needs(bare, tmp_path):
    assert "-m pip install setuptools" in only_line(build(cwd=tmp_path, python=bare))
    # setuptools alone, from the tests' own Python.
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):
        original = pathlib.Path(setuptools.__file__).parent.parent / name
        if original.exists():
            shutil.copytree(str(original), str(borrowed / name))
    assert "-m pip install -U docopt-ng" in only_line(build(cwd=tmp_path, python=bare, PYTHONPATH=borrowed, PYTHONWARNINGS="ignore"))
    assert [path.name for path in tmp_path.iterdir()] == ["borrowed"]


@pytest.mark.parametrize("output", [".", "no/such/folder/ratrod.pyz"])
def test_a_build_to_where_nothing_can_be_written(tmp_path, output):
    line = only_line(build("--output", output, cwd=tmp_path))
    assert str((tmp_path / output).absolute()) in line and "directory" in line


def test_on_a_machine_with_pynacl_alone(pynacl_alone, single):
    command, folder = (pynacl_alone, "-I", single.name), single.parent
    code, out, err = run(*command, "--help", cwd=folder)
    assert (code, err) == (0, "") and "Usage:" in out
    code, out, err = run(*command, "-k", "new", "keygen", cwd=folder)
    assert code == 0 and re.fullmatch(r"[\w-]{43}\n", out) and (folder / "new" / "key.pub").read_text() == out.strip(), err
    code, out, err = run(*command, "connect", "--bogus", cwd=folder)
    assert (code, out) == (2, "") and "--bogus" in err.splitlines()[0] and "Usage:" in err
    if single.name == "ratrod.pyz":  # as it is, with its 256 MB
        code, out, err = run(*command, "demo", cwd=folder)
        assert code == 0 and "Every byte arrived: 256 MB" in out, out + err
    # Neither leaves anything beside itself, bytecode for instance.
    assert {path.name for path in folder.iterdir()} == {single.name, "new"}


def test_a_tunnel_between_two_of_them(start, no_traceback, pynacl_alone, single, keys, tcp_echo):
    command, options = (pynacl_alone, "-I", single.name), {"cwd": str(single.parent)}
    server = start(*command, "-k", keys.server.path, "serve", "127.0.0.1:0", **options)
    address = "127.0.0.1:" + server.wait_for(STARTED).group(1)
    client = start(*command, "-k", keys.client.path, "connect", address, "0:127.0.0.1:%d" % tcp_echo.port, **options).ready()
    with socket.create_connection(("127.0.0.1", int(client.wait_for(LISTENING).group(1))), timeout=PATIENCE) as connection:
        ping(connection, word=b"there and back" * 10000)
    assert (client.stop(), server.stop()) == (0, 0)


def test_its_own_docopt_reads_the_command_line(pynacl_alone, pyz):
    # Not ratrod's own reader, which would do without; nor a docopt that the machine has.
    program = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ratrod
ratrod.parse_command_line(["demo"])
print(json.dumps([ratrod.__file__, sys.modules["docopt"].__file__, sys.modules["docopt"].__version__]))
"""
    code, out, err = run(pynacl_alone, "-I", "-c", program, pyz, cwd=pyz.parent)
    assert code == 0 and json.loads(out) == [str(pyz / "ratrod.py"), str(pyz / "docopt" / "__init__.py"), docopt.__version__], err


@pytest.mark.skipif(os.name != "posix", reason="the first line of a program is read by POSIX systems")
def test_it_starts_like_any_program(pynacl_alone, single):
    if not os.access(str(single), os.X_OK):
        single.chmod(0o755)  # ratrod.py in a checkout is a source like any other
    path = os.pathsep.join([str(pynacl_alone.parent), os.environ["PATH"]])
    code, out, err = run(single, "--version", cwd=single.parent, PATH=path)
    assert (code, err) == (0, "") and re.fullmatch(r"ratrod \d+\.\d+\.\d+\n", out)


def test_with_debian_s_own_pynacl(debian, pyz, tmp_path):
    assert run(debian, "-I", pyz, "--version", cwd=tmp_path)[0] == 0
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import nacl.bindings, ratrod
ratrod.DEMO_MB = 16
print(hasattr(nacl.bindings, "crypto_aead_aegis128l_encrypt"))
sys.exit(ratrod.main(["-v", "demo"]))
"""
    code, out, err = run(debian, "-I", "-c", program, pyz, cwd=tmp_path)
    assert code == 0 and "Every byte arrived" in out, out + err
    if out.startswith("False\n"):  # 1.5, in Debian 12 and 13
        assert "ChaCha20" in err and "AEGIS" not in err, err


def test_without_pynacl(bare, single):
    folder = single.parent
    code, out, err = run(bare, "-I", single.name, "-k", "new", "keygen", cwd=folder)
    assert (code, out) == (2, "") and re.fullmatch(r".*PyNaCl.*pip install pynacl.*apt install python3-nacl.*\n", err), err
    assert [path.name for path in folder.iterdir()] == [single.name]
    assert run(bare, "-I", single.name, "--help", cwd=folder)[0] == 0


def test_a_python_that_is_too_old(bare, pyz, tmp_path):
    # Some distributions that are still about have 3.6: it cannot even read ratrod.py.
    program = "import runpy, sys; sys.version_info = (3, 6, 15); runpy.run_path(sys.argv[1], run_name='__main__')"
    assert run(bare, "-I", "-c", program, pyz, cwd=tmp_path) == (2, "", "ratrod needs Python 3.8 or later, and this is 3.6\n")
