"""A bar for what takes a while, on standard error if that is a terminal. Run by commands."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["tracked"]

_Item = TypeVar("_Item")


def tracked(items: Sequence[_Item], description: str) -> Iterable[_Item]:
    """The items, one after the other, with a bar that shows how many are done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        disable=not sys.stderr.isatty(),
        # Where standard output goes elsewhere, its lines must not go to the terminal.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        yield from progress.track(items, description=description)
