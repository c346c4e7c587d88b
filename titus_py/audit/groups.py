"""Findings in the order in which people read them. Used by the table and the page.

Workers are alike: one entry stands for several, unless it is about something broken.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from titus_py.audit.finding import Finding, Verdict
from titus_py.audit.instance import Role
from titus_py.audit.observation import Stage

__all__ = ["Group", "Row", "grouped"]


class Row(NamedTuple):
    """A finding, and how many processes it is the same for."""

    finding: Finding
    processes: int = 1


class Group(NamedTuple):
    """What was found about one process, or about several of a kind."""

    title: str
    rows: tuple[Row, ...]

    @property
    def broken(self) -> bool:
        return any(row.finding.verdict is Verdict.BROKEN for row in self.rows)


_IN_ORDER = (
    Role.SUPERVISOR,
    Role.PARENT,
    Role.FORK_SERVER,
    Role.KEYD,
    Role.MODULE,
    Role.CONNECTOR,
    Role.RESOLVER,
    Role.METRICS,
    Role.WORKER,
)
_MANY = (Stage.SPARE, Stage.HANDSHAKE, Stage.ESTABLISHED)


def grouped(findings: Sequence[Finding], by_stage: bool) -> list[Group]:
    """Groups of findings by process: broken ones first, then the most privileged ones.

    All workers are one group. With ``by_stage``, there is one group for each stage, and one for
    each time that the audit's own worker was looked at.
    """
    titles: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=_rank):
        titles.setdefault(_title(finding, by_stage), []).append(finding)
    groups = [Group(title, tuple(_rows(found))) for title, found in titles.items()]
    return sorted(groups, key=lambda group: not group.broken)


def _rank(finding: Finding) -> tuple[int, bool]:
    role, stage = finding.subject.role, finding.subject.stage
    rank = _IN_ORDER.index(Role(role)) if role in _IN_ORDER else len(_IN_ORDER)
    # The probe's worker comes after all other workers.
    return rank, bool(stage) and stage not in _MANY


def _title(finding: Finding, by_stage: bool) -> str:
    subject = finding.subject
    if subject.role != Role.WORKER:
        return f"{subject.role} {subject.pid}"
    if not by_stage:
        return "workers: those that were there, and that of the audit's own connection"
    if subject.stage in _MANY:
        return f"workers, {subject.stage}"
    return f"worker {subject.pid} of the audit's own connection, {subject.stage}"


def _rows(findings: Sequence[Finding]) -> list[Row]:
    same: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        alike: tuple[str, ...] = (
            finding.check,
            finding.promised,
            finding.verdict,
            _kind(finding.seen),
        )
        if finding.verdict is Verdict.BROKEN or finding.subject.role != Role.WORKER:
            alike += (str(finding.subject), finding.seen)
        same.setdefault(alike, []).append(finding)
    rows = [Row(found[0], len({one.subject.pid for one in found})) for found in same.values()]
    order = {verdict: number for number, verdict in enumerate(_WORST_FIRST)}
    names = list(dict.fromkeys(finding.check for finding in findings))
    return sorted(
        rows, key=lambda row: (order[row.finding.verdict], names.index(row.finding.check))
    )


def _kind(seen: str) -> str:
    """What was seen, with every number replaced by 0."""
    return re.sub(r"[0-9]+", "0", seen)


_WORST_FIRST = (Verdict.BROKEN, Verdict.NOT_AVAILABLE, Verdict.HOLDS)
