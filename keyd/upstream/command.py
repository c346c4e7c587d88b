"""The command ``keyd connect``: the process that connects to upstreams, as keyd starts it."""

import argparse
import json
import socket
from typing import Any, NoReturn

from keyd.linux.sealed import read_all
from keyd.linux.title import set_title

__all__ = ["add"]


def add(commands: Any) -> None:
    """``keyd connect``, which is keyd's own: on inherited descriptors."""
    connect = commands.add_parser("connect")
    connect.add_argument("--settings-fd", type=int, required=True)
    connect.add_argument("--keyd-fd", type=int, required=True)
    connect.set_defaults(run=_connect)


def _connect(arguments: argparse.Namespace) -> NoReturn:
    # Imported here: keyd has no use for it.
    from keyd.upstream.connector import connect

    set_title("keyd-connect", "keyd: connecting to upstreams")
    settings = json.loads(read_all(arguments.settings_fd))
    keyd = socket.socket(fileno=arguments.keyd_fd)
    keyd.set_inheritable(False)
    connect(settings, keyd)
