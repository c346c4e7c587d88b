"""What an audit says: checks and findings, as data. Run by ``titus-py audit``; trusts nobody."""

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from titus_py.audit.instance import Process, Role

if TYPE_CHECKING:
    from titus_py.audit.observation import Observation, Scene

__all__ = ["Check", "Finding", "Seen", "Subject", "Verdict", "broken", "holds", "not_available"]


class Verdict(StrEnum):
    """Whether a promise holds. ``NOT_AVAILABLE``: it cannot be kept, or not be checked, here."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_AVAILABLE = "not available"


class Seen(NamedTuple):
    """What a check saw, in words, and what that means."""

    verdict: Verdict
    text: str


def holds(text: str) -> Seen:
    return Seen(Verdict.HOLDS, text)


def broken(text: str) -> Seen:
    return Seen(Verdict.BROKEN, text)


def not_available(text: str) -> Seen:
    return Seen(Verdict.NOT_AVAILABLE, text)


class Subject(NamedTuple):
    """The process that a finding is about. ``stage`` says how far a worker has come."""

    role: str
    pid: int
    uid: int
    stage: str = ""

    @classmethod
    def of(cls, process: Process, stage: str = "") -> "Subject":
        return cls(process.role, process.pid, process.uid, stage)

    def __str__(self) -> str:
        stage = f", {self.stage}" if self.stage else ""
        return f"{self.role} {self.pid}{stage}"


class Finding(NamedTuple):
    """One check of one process."""

    check: str
    subject: Subject
    promised: str
    how: str
    seen: str
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.subject}: {self.check}: promised: {self.promised}; seen: {self.seen}"


class Check(NamedTuple):
    """A promise about a process, and how it is looked at."""

    name: str
    roles: frozenset[Role]
    promised: str
    how: str
    look: "Callable[[Observation, Scene], Seen]"

    def find(self, observation: "Observation", scene: "Scene") -> Finding:
        seen = self.look(observation, scene)
        return Finding(
            self.name,
            Subject.of(observation.process, observation.stage),
            self.promised,
            self.how,
            seen.text,
            seen.verdict,
        )
