"""``keyd make``, which makes keys in a confined process: starts it, and gives it its orders.

Run by ``titus-py rekey`` and ``titus-py keys new``, as root. Each order goes with the descriptors
of the files to read and write. So the process needs no way to a file, and no key's octets come
here. Its answers are strictly decoded: it may say that something cannot be made, and why.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from keyd.linux.descriptors import send_descriptors
from keyd.linux.process import signals_held_back
from keyd.linux.sealed import sealed_file
from keyd.printable import printable
from titus_py.configuration import User

__all__ = ["KeyMaker", "NotMade"]

_COMMAND = (sys.executable, "-I", "-m", "keyd", "make")
_ANSWER_OCTETS = 4096
#: An RSA key of 8192 bits takes up to a minute on a slow machine.
_SECONDS = 600.0


class NotMade(Exception):
    """A key or a request was not made; the text says why. ``ended``: no other will be, either."""

    def __init__(self, reason: str, ended: bool = False) -> None:
        super().__init__(reason)
        self.ended = ended


class KeyMaker:
    """The process. ``user``, ``chroot`` and ``must_lock`` are as for keyd, which it is kin to."""

    def __init__(self, user: User, chroot: Path, must_lock: bool) -> None:
        """Start it; raises OSError."""
        chroot.mkdir(mode=0o555, parents=True, exist_ok=True)
        confinement = {
            "uid": user.uid, "gid": user.gid, "chroot": str(chroot), "must_lock": must_lock,
        }  # fmt: skip
        settings = sealed_file("settings", json.dumps(confinement).encode())
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(_SECONDS)
        with theirs, open(settings, "rb"), signals_held_back():
            self._process = subprocess.Popen(
                [*_COMMAND, f"--settings-fd={settings}", f"--orders-fd={theirs.fileno()}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(settings, theirs.fileno()),
                env={},  # Above all no OPENSSL_CONF, which could have it load anything.
            )

    def make(
        self,
        kind: str | None,
        certificate: str,
        key: int,
        has_key: bool,
        request: int | None = None,
        passphrase: int | None = None,
    ) -> None:
        """Have a key made and written, and a request for the certificate's names (PEM).

        With ``has_key``, the key is read instead. ``kind`` None: the certificate's. Raises
        NotMade.
        """
        order: Mapping[str, object] = {
            "kind": kind,
            "has_key": has_key,
            "has_request": request is not None,
            "encrypted": passphrase is not None,
        }
        with open(sealed_file("certificate", certificate.encode()), "rb") as file:
            given = [one for one in (file.fileno(), key, request, passphrase) if one is not None]
            self._carry_out(order, given)

    def make_known(self, kind: str, name: str, key: int, certificate: int) -> None:
        """Have a key made, and a certificate for this name that it signs itself; both written.

        Raises NotMade.
        """
        order = {"kind": kind, "known": name, "now": int(time.time())}
        self._carry_out(order, [key, certificate])

    def close(self) -> None:
        """End it."""
        self._orders.close()
        if self._process.returncode is None:
            self._process.communicate()

    def _carry_out(self, order: Mapping[str, object], given: Sequence[int]) -> None:
        try:
            send_descriptors(self._orders, json.dumps(order).encode(), given)
            answer = self._orders.recv(_ANSWER_OCTETS)
        except TimeoutError:
            self._process.kill()
            raise NotMade(f"no key within {_SECONDS:g} s", ended=True) from None
        except OSError:
            answer = b""
        if problem := self._problem(answer):
            raise NotMade(problem)

    def _problem(self, answer: bytes) -> str | None:
        try:
            match json.loads(answer):
                case {"problem": str() | None as problem}:
                    return problem
        except (ValueError, RecursionError):
            pass
        self._orders.close()
        self._process.kill()
        _, said = self._process.communicate()
        last_words = said.decode(errors="replace").strip().rpartition("\n")[2]
        reason = printable(last_words.removeprefix("keyd: ")) or "no message"
        raise NotMade(
            f"the process that makes keys has ended ({self._process.returncode}): {reason}",
            ended=True,
        )
