"""An audit for people: a table on a terminal. Run by ``titus-py audit``."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from titus_py.audit.finding import Verdict
from titus_py.audit.groups import Group, Row, grouped
from titus_py.audit.run import UNSEEN, Audit

__all__ = ["show", "show_broken"]

#: A narrower table leaves out how it was looked at; the other forms have that.
_WIDE = 120

_MARKS = {
    Verdict.HOLDS: Text("holds", "green"),
    Verdict.BROKEN: Text("BROKEN", "bold white on red"),
    Verdict.NOT_AVAILABLE: Text("n/a", "yellow"),
}


def show(audit: Audit, console: Console) -> None:
    """Show an audit, with the summary last: a terminal shows the end."""
    console.print(f"[bold]titus-py audit[/] of supervisor {audit.supervisor}")
    console.print(
        Text(f"configuration {audit.source}; listening on {', '.join(audit.listening)}", "dim")
    )
    groups = grouped(audit.findings, by_stage=False)
    for group in groups:
        console.print()
        console.print(_table(group, how=console.width >= _WIDE))
    console.print()
    console.print(
        Text("Not to be seen from outside, and tried by the attack suite instead:", "dim")
    )
    for thing in UNSEEN:
        console.print(Text(f"  {thing}", "dim"))
    console.print(
        Text("What keyd refused to this audit is in the instance's log as audit_refused.", "dim")
    )
    console.print()
    _list_broken(audit, console)
    console.print(_summary(audit))


def show_broken(audit: Audit, console: Console) -> None:
    """Show what does not hold, and for which instance; nothing if all holds."""
    if not audit.holds:
        console.print(f"[bold]titus-py audit[/] of supervisor {audit.supervisor}, {audit.source}")
        _list_broken(audit, console)
        console.print(_summary(audit))


def _list_broken(audit: Audit, console: Console) -> None:
    for finding in audit.having(Verdict.BROKEN):
        console.print(Text.assemble(_MARKS[Verdict.BROKEN], f" {finding}"))


def _table(group: Group, how: bool) -> Table:
    table = Table(
        title=Text(group.title, "bold red" if group.broken else "bold"),
        title_justify="left",
        box=box.HORIZONTALS,
        pad_edge=False,
        expand=True,
        show_lines=False,
    )
    table.add_column("", no_wrap=True, min_width=6)
    table.add_column("Promised", ratio=4, overflow="fold")
    table.add_column("Seen", ratio=4, overflow="fold")
    if how:
        table.add_column("How", ratio=3, style="dim", overflow="fold")
    for row in group.rows:
        words = [row.finding.promised, _seen(row), *([row.finding.how] if how else [])]
        table.add_row(_MARKS[row.finding.verdict], *map(Text, words))
    return table


def _seen(row: Row) -> str:
    if row.processes > 1:
        return f"{row.finding.seen} ({row.processes} workers alike)"
    if row.finding.verdict is not Verdict.HOLDS and row.finding.subject.stage:
        # The group has several processes: say which one this is about.
        return f"{row.finding.subject}: {row.finding.seen}"
    return row.finding.seen


def _summary(audit: Audit) -> Text:
    counts = {verdict: len(audit.having(verdict)) for verdict in Verdict}
    broken = counts[Verdict.BROKEN]
    words = "All promises hold." if audit.holds else f"{broken} findings do not hold."
    if broken == 1:
        words = "1 finding does not hold."
    return Text.assemble(
        (words, "bold green" if audit.holds else "bold red"),
        f" {counts[Verdict.HOLDS]} hold, {broken} broken, "
        f"{counts[Verdict.NOT_AVAILABLE]} not available here; {audit.seconds:.1f} s.",
    )
