"""Reads a program's arguments: of ``titus-py`` or ``keyd``, with the privilege of who starts it."""

import argparse
from typing import Any

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Of a program or a command of it: what is wrong is told with the command's own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A command's parser would leave it to its program's, whose usage has no option of it.
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown
