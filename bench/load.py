"""The load generator (load.c, which says what it does), and what it reported."""

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.processes import Failed

__all__ = ["Group", "Load", "Outcome", "quantile"]

#: Beyond the seconds that it was told to run: its clients' patience, and some.
_SPARE_SECONDS = 60.0


class Group(NamedTuple):
    """What became of some clients; times in microseconds from when each was due."""

    done: int
    late: int  #: done after the time was over: in no rate
    unclean: int  #: the whole answer came, but TLS was not ended in order
    failures: dict[str, int]
    first_us: list[int]
    end_us: list[int]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class Outcome(NamedTuple):
    """One run of the load."""

    clients: Group
    newcomers: Group
    tickets: int
    seconds: float
    cpu: float


class Load:
    """The program, and the processors that it may use."""

    def __init__(self, program: Path, cpus: set[int] | None = None) -> None:
        self.program = program
        self._cpus = cpus

    def on(self, cpus: set[int]) -> "Load":
        return Load(self.program, cpus)

    def run(self, mode: str, port: int, **options: str | float) -> Outcome:
        """Raises Failed."""
        patience = float(options.get("seconds", 0)) + float(options.get("timeout", 10))
        try:
            result = subprocess.run(
                self._command(mode, port, options),
                check=True,
                capture_output=True,
                text=True,
                timeout=patience + _SPARE_SECONDS,
                preexec_fn=self._prepare(),
            )
        except subprocess.TimeoutExpired as error:
            raise Failed("the load did not come to its end") from error
        except subprocess.CalledProcessError as error:
            raise Failed(f"the load ended with {error.returncode}: {error.stderr}") from error
        found = json.loads(result.stdout)
        clients, newcomers = Group(**found.pop("clients")), Group(**found.pop("newcomers"))
        return Outcome(clients, newcomers, **found)

    @contextmanager
    def holding(self, port: int) -> Iterator[Callable[[int], None]]:
        """Idle connections, as many as the function is called with; raises Failed."""
        with subprocess.Popen(
            self._command("hold", port, {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=self._prepare(),
        ) as process:

            def hold(count: int) -> None:
                assert process.stdin is not None
                assert process.stdout is not None
                try:
                    process.stdin.write(f"{count}\n")
                    process.stdin.flush()
                except BrokenPipeError as error:
                    raise Failed("the load has ended") from error
                answer = json.loads(process.stdout.readline() or "{}")
                if answer.get("held") != count:
                    raise Failed(f"of {count} idle connections: {answer}")

            try:
                yield hold
            finally:
                process.kill()

    def _command(self, mode: str, port: int, options: Mapping[str, object]) -> Sequence[str]:
        words = [str(self.program), mode, str(port)]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        return words

    def _prepare(self) -> Callable[[], None] | None:
        cpus = self._cpus
        return (lambda: os.sched_setaffinity(0, cpus)) if cpus else None


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
