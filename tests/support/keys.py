"""Key folders in the original's format, written by the `cryptography` package: not by the code under test."""

import base64
import hashlib
import os
import pathlib
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class Keys(NamedTuple):
    """A key folder: its path, and the public key as its 43 characters."""

    path: pathlib.Path
    public: str

    def trust(self, other, file):
        with open(self.path / file, "a") as lines:
            lines.write(other.public + "\n")

    def write(self, file, text, encoding=None):
        """What the file says from now on. By renaming: a program that runs sees it neither empty, half written nor unchanged."""
        new = self.path / "new"
        with open(new, "w", encoding=encoding, newline="") as lines:
            lines.write(text)
        os.replace(new, self.path / file)


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def fingerprint(public):
    """As `ssh-keygen -l` shows one: of the 32 raw bytes of the key."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(base64.urlsafe_b64decode(public + "=")).digest()).rstrip(b"=").decode()


def make_keys(path, seed=None):
    seed = seed or os.urandom(32)
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    path.mkdir(mode=0o700, parents=True)
    (path / "key").touch(mode=0o600)
    (path / "key").write_text(base64url(bytes.fromhex("3051020101300506032b657004220420") + seed + bytes.fromhex("812100") + public))
    (path / "key.pub").write_text(base64url(public))
    (path / "known_hosts").touch(mode=0o600)
    (path / "authorized_keys").touch(mode=0o600)
    return Keys(path, base64url(public))


def seed_of(keys):
    """The 32 private bytes in a key folder, from the known place in its file."""
    text = (keys.path / "key").read_text()
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[16:48]


class KeyPairs(NamedTuple):
    server: Keys
    client: Keys


def permit(keys, options):
    """Makes the client's key the only line of authorized_keys, with these options."""
    keys.server.write("authorized_keys", "%s %s\n" % (keys.client.public, options))


def identity_of(keys):
    """The 32 raw bytes of a key folder's public key."""
    return base64.urlsafe_b64decode(keys.public + "=")
