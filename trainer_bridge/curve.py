"""CURVE keys of the bridge: both sides prove who they are, and nobody else can read along.

A folder of keys, made once by `everstep keys` and copied to both sides:

    engine.key         the engine's public key: every rank needs it
    engine.key_secret  the engine's secret key: stays with the engine
    trainer.key        the trainer's public key: the engine needs it
    trainer.key_secret the trainer's secret key: stays with the trainer

On this machine alone (loopback, ipc) none are needed; beyond it they are asked for.
"""

import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
import zmq.auth
from msgspec import Struct

from ..engine.errors import ConfigError


class Keys(Struct, frozen=True):
    """One side's pair, and the public key of the other; Z85, 40 characters each."""

    public: str
    secret: str
    peer: str

    def serve(self, socket: "zmq.Socket[bytes] | zmq.asyncio.Socket") -> None:
        """Before bind, on the engine's side. Who may come is the authenticator's to say."""
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        socket.curve_server = True

    def join(self, socket: "zmq.Socket[bytes]") -> None:
        """Before connect, on a rank's side."""
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        socket.curve_serverkey = self.peer.encode()


class Gate:
    """Lets in whoever has the other side's secret key; for `configure_curve_callback`."""

    def __init__(self, keys: Keys) -> None:
        self._public = keys.peer.encode()

    def callback(self, _domain: str, key: Any) -> bool:
        """Whether this public key may come in."""
        return bool(key == self._public)


def make_keys(folder: Path) -> list[Path]:
    """Write new pairs for both sides. Raises ConfigError where there are some already."""
    # ours alone, before a secret is in it
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = [path for path in folder.iterdir() if path.suffix in (".key", ".key_secret")]
    if there:
        raise ConfigError(
            f"{there[0]} is there already; keys are never replaced: name a new folder"
        )
    made = []
    for side in ("engine", "trainer"):
        public, secret = map(Path, zmq.auth.create_certificates(folder, side))
        secret.chmod(0o600)
        made += [public, secret]
    return made


def read_keys(folder: Path, side: str) -> Keys:
    """Those of one side, engine or trainer. Raises ConfigError naming the file that is missing."""
    other = "trainer" if side == "engine" else "engine"
    own, peer = folder / f"{side}.key_secret", folder / f"{other}.key"
    try:
        public, secret = zmq.auth.load_certificate(own)
        peer_public, _ = zmq.auth.load_certificate(peer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"keys: {error}; `everstep keys {folder}` makes them") from None
    if secret is None:
        raise ConfigError(f"keys: {own} has no secret key")
    return Keys(public.decode(), secret.decode(), peer_public.decode())


def check_endpoint(endpoint: str, keys: Keys | None, name: str) -> None:
    """Raises ConfigError for an address that is none, or that others reach and no key protects.

    name  of the setting, or of the flag
    """
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme in ("ipc", "inproc"):
        return
    if parts.scheme != "tcp" or not parts.hostname:
        raise ConfigError(f"{name}: {endpoint!r}; accepted: tcp://HOST:PORT or ipc:///PATH")
    if keys is None and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"{name}: {endpoint!r} can be reached from outside this machine: make keys "
            "(`everstep keys DIR`) and name their folder, or use 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
