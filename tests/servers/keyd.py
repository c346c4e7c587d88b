"""A ``keyd listen`` whose sockets somebody else holds, as systemd does: it can be started again."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from integration.instance import TITUS_PY, eventually

KEYD = TITUS_PY.with_name("keyd")
PATIENCE = 60.0
_CONNECTED = "03"
#: What systemd does between fork and exec (sd_listen_fds(3)): descriptors from 3 on, and their
#: variables.
_LAUNCH = """
import fcntl, os, sys
count = int(sys.argv[1])
sockets = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in sys.argv[2:2 + count]]
for place, one in enumerate(sockets):
    os.dup2(one, 3 + place)
    os.close(one)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count)}
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


class ListeningKeyd:
    """Its keys are the files in ``keys``. The group may ask, at each of ``paths``."""

    def __init__(
        self, directory: Path, group: str, paths: Sequence[Path], options: Sequence[str] = ()
    ) -> None:
        self.keys = directory / "keys"
        self.keys.mkdir(mode=0o700)
        self.paths = paths
        self._options = options
        self._root = directory / "keyds-root"
        self._log = directory / "keyd-log"
        self._process: subprocess.Popen[bytes] | None = None
        self._listeners = []
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(str(path))
            shutil.chown(path, "root", group)
            path.chmod(0o660)
            listener.listen(4096)
            self._listeners.append(listener)

    def start(self) -> None:
        """Returns once it serves: what systemd learns by READY=1."""
        descriptors = [listener.fileno() for listener in self._listeners]
        seen = len(self.log())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", _LAUNCH, str(len(descriptors))),
                    *map(str, descriptors),
                    *(str(KEYD), "listen", f"--key-directory={self.keys}", "--user=daemon"),
                    *(f"--chroot={self._root}", *self._options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )

        def serves() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log()
            return "guards" in self.log()[seen:]

        eventually(serves, "keyd is confined", PATIENCE)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(PATIENCE)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def connections(self) -> int:
        """How many clients it has accepted that are there (proc_net(5))."""
        listed = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        ours = [words for words in listed if words[-1] in map(str, self.paths)]
        # One that waits to be accepted has no inode yet.
        return sum(words[5] == _CONNECTED and words[6] != "0" for words in ours)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)
        for listener in self._listeners:
            listener.close()
