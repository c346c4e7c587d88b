"""A short-lived child that answers one question, in JSON.

Started by the supervisor and by ``titus-py check``, for what neither may load or read itself.
Starting and asking are two steps, so that a helper loads its code while others work.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from keyd.linux.process import signals_held_back

__all__ = ["CLIENT_AUTHORITIES", "HANDSHAKE_CHECK", "KEYD_CHECK", "Helper", "Unanswered"]

#: -I (isolated): the working directory and the environment cannot change what reads the keys.
KEYD_CHECK = (sys.executable, "-I", "-m", "keyd", "check")
HANDSHAKE_CHECK = (sys.executable, "-I", "-m", "titus_py.fork_server.handshake_check")
CLIENT_AUTHORITIES = (sys.executable, "-I", "-m", "titus_py.fork_server.client_authorities")


class Unanswered(Exception):
    """A helper failed; the text says how."""


class Helper:
    """A program that reads standard input to its end, writes its answer, and exits."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start the helper. If that fails, ``ask`` says so."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        try:
            # It needs no signal: when we end, its standard streams (our pipes) close, and it ends.
            with signals_held_back():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={},  # Above all no OPENSSL_CONF, which could have it load anything.
                )
        except OSError as error:
            self._problem = f"{command[0]}: {error.strerror}"

    def ask(self, question: object, timeout: float) -> bytes:
        """Ask; returns what the helper writes to its standard output. Raises Unanswered."""
        process = self._process
        if process is None:
            raise Unanswered(self._problem)
        try:
            answer, said = process.communicate(json.dumps(question).encode(), timeout)
        except subprocess.TimeoutExpired:
            self.dismiss()
            raise Unanswered(f"no answer within {timeout:g} s") from None
        if code := process.returncode:
            last_words = said.decode(errors="replace").strip().rpartition("\n")[2]
            ending = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            raise Unanswered(f"{ending}: {last_words or 'no message'}")
        return answer

    def dismiss(self) -> None:
        """End the helper, with nothing more to ask."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()
