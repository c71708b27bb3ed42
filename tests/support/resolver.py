"""The names that a real server under test looks up: Python's look-up alone is replaced, in the program's own process."""

import contextlib
import json
import os

# Runs in the program's process before the program: names that resolve as a test wants cannot be had from a real resolver without being root.
SITECUSTOMIZE = '''
import json, os, socket, sys
folder = os.environ["TEST_RESOLVER"]
real = socket.getaddrinfo

def note(host):
    host = host.decode("utf-8", "replace") if isinstance(host, (bytes, bytearray)) else host
    with open(os.path.join(folder, "lookups"), "a") as lookups:
        lookups.write(json.dumps(host) + "\\n")
    return host

def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    name, names = note(host), json.load(open(os.path.join(folder, "names")))
    if name == "hang.example":
        open(os.path.join(folder, "release")).read()
    if name in names:
        found = []
        for address in names[name]:
            try:
                found += real(address, port, family, type, proto, flags)
            except socket.gaierror:
                pass
        if found:
            return found
    if name in names or isinstance(name, str) and name.endswith((".example", ".test")):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return real(host, port, family, type, proto, flags)

socket.getaddrinfo = getaddrinfo
sys.addaudithook(lambda event, args: note(args[0]) if event in ("socket.gethostbyname", "socket.gethostbyaddr") else None)
'''


class Resolver:
    """What the server under test looks up: `lookups`, and the addresses of the names given. A look-up of `hang.example` lasts until release()."""

    def __init__(self, folder, names):
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.answer(names)
        (folder / "lookups").touch()
        os.mkfifo(folder / "release")
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "TEST_RESOLVER": str(folder)}

    def answer(self, names):
        """{name: addresses}, from now on."""
        (self._folder / "new").write_text(json.dumps(names))
        os.replace(self._folder / "new", self._folder / "names")

    @property
    def lookups(self):
        return [json.loads(line) for line in (self._folder / "lookups").read_text().splitlines()]

    def release(self):
        # Without a reader this open() fails: then nothing hangs.
        with contextlib.suppress(OSError):
            os.close(os.open(self._folder / "release", os.O_WRONLY | os.O_NONBLOCK))
