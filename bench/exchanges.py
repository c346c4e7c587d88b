"""Two programs that talk to a server of their own: Erlang nodes (calls.erl), and echo.c.

They know nothing of TLS, and measure the same: one exchange after the other on one connection, a
new connection for each, exchanges by their size, and one long one.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.processes import Failed

__all__ = ["LONG_OCTETS", "SIZES", "Echo", "Erlang", "Program", "Times"]

SIZES = (8, 1024, 16_384, 65_536, 262_144, 1_048_576)
LONG_OCTETS = 64 << 20
#: Beyond the time that it was told to take: for a node to start, and for the slowest tunnel.
_PATIENCE_SECONDS = 60.0
_SERVER_NODE = "server@localhost"
_CLIENT_NODE = "client@localhost"


class Times(NamedTuple):
    """How long each exchange took, in nanoseconds; ``echoes`` are in the order of SIZES."""

    calls: list[int]
    connections: list[int]
    echoes: list[list[int]]
    long: list[int]


class Program:
    """One kind. ``options`` are further words for Erlang, at both ends."""

    name: str
    environment: Mapping[str, str] | None = None

    def serve(self, port: int, options: Sequence[str] = ()) -> list[str]:
        """The command that runs the server, at a port of 127.0.0.1."""
        raise NotImplementedError

    def _load(self, port: int, options: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def run(self, port: int, seconds: float, options: Sequence[str] = ()) -> Times:
        """Have it talk to its server through a port of 127.0.0.1. Raises Failed."""
        amount = [str(int(1000 * seconds)), str(LONG_OCTETS), *map(str, SIZES)]
        try:
            done = subprocess.run(
                [*self._load(port, options), *amount],
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=5 * seconds + _PATIENCE_SECONDS,
                env=self.environment,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{self.name} did not come to its end") from error
        except subprocess.CalledProcessError as error:
            said = (error.stdout + error.stderr).strip().splitlines()
            raise Failed(f"{self.name} ended with {error.returncode}: {said[-1:]}") from error
        return Times(**json.loads(done.stdout))


class Echo(Program):
    """The program of echo.c."""

    name = "echo"

    def __init__(self, program: Path) -> None:
        self._program = str(program)

    def serve(self, port: int, options: Sequence[str] = ()) -> list[str]:
        del options
        return [self._program, "serve", str(port)]

    def _load(self, port: int, options: Sequence[str]) -> list[str]:
        del options
        return [self._program, "load", str(port)]


class Erlang(Program):
    """Nodes without epmd; raises Failed if there is no Erlang.

    The client does not listen: the port that a node is told to use is its peer's.
    """

    name = "Erlang"

    def __init__(self, directory: Path) -> None:
        if shutil.which("erl") is None:
            raise Failed("erl is not installed")
        source = Path(__file__).with_name("calls.erl")
        self._compiled = str(directory)
        self.environment = os.environ | {"HOME": self._compiled, "ERL_CRASH_DUMP_SECONDS": "0"}
        command = ["erlc", "-o", self._compiled, str(source)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=self.environment
        )
        if done.returncode:
            raise Failed(f"calls.erl: {done.stdout}{done.stderr}")

    @property
    def has_tls(self) -> bool:
        found = "halt(case code:lib_dir(ssl) of {error, _} -> 1; _ -> 0 end)."
        command = ["erl", "-noinput", "-boot", "start_clean", "-eval", found]
        done = subprocess.run(command, check=False, capture_output=True, env=self.environment)
        return done.returncode == 0

    def serve(self, port: int, options: Sequence[str] = ()) -> list[str]:
        here = ["-kernel", "inet_dist_use_interface", "{127,0,0,1}"]
        return [*self._node(_SERVER_NODE, port, options), *here]

    def _load(self, port: int, options: Sequence[str]) -> list[str]:
        node = self._node(_CLIENT_NODE, port, options)
        load = ["-run", "calls", "main", _SERVER_NODE]
        return [*node, "-dist_listen", "false", "-pa", self._compiled, *load]

    def _node(self, name: str, port: int, options: Sequence[str]) -> list[str]:
        command = ["erl", "-noinput", "-sname", name, "-setcookie", "bench"]
        return [*command, "-start_epmd", "false", "-erl_epmd_port", str(port), *options]
