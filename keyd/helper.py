"""Helpers: processes that keyd starts beside itself, for what it does not do itself.

``start`` is run by keyd before it reads a key and before it gives anything up, and by ``keyd
check``. The helper has its own memory (execve(2)), and of keyd's descriptors one end of a socket
pair. ``add_command`` is how it begins. It trusts keyd, and confines itself.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from keyd.linux.process import signals_held_back
from keyd.linux.sealed import read_all, sealed_file
from keyd.linux.title import set_title
from keyd.linux.unix_socket import refuse_descriptors

__all__ = ["add_command", "start"]

#: With what keyd has told it, and its end of the socket.
_Life = Callable[[dict[str, Any], socket.socket], NoReturn]


def start(
    command: str,
    told: Mapping[str, Any],
    environment: Mapping[str, str] = {},
    *,
    may_speak: bool = False,
    gives: bool = False,
) -> socket.socket:
    """Start ``keyd COMMAND``; returns keyd's end of the socket to it. Raises OSError.

    ``may_speak``: its standard error is the caller's. ``gives``: it sends descriptors.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not gives:
        refuse_descriptors(ours)
    settings = sealed_file(f"{command}-settings", json.dumps(told).encode())
    options = [f"--settings-fd={settings}", f"--keyd-fd={theirs.fileno()}"]
    try:
        with theirs, signals_held_back():
            # Not waited for: it ends with keyd. It has a session of its own, so that a terminal's
            # signals are not for it.
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "keyd", command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if may_speak else subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=(settings, theirs.fileno()),
                start_new_session=True,
            )
    finally:
        os.close(settings)
    # Nobody waits for it, and Popen is not to say so.
    process.returncode = 0
    return ours


def add_command(
    commands: Any,
    command: str,
    title: str,
    live: Callable[[dict[str, Any], socket.socket], NoReturn],
) -> None:
    """``keyd COMMAND``, which is keyd's own: on inherited descriptors."""

    def begin(arguments: argparse.Namespace) -> NoReturn:
        set_title(f"keyd-{command}", title)
        told = json.loads(read_all(arguments.settings_fd))
        keyd = socket.socket(fileno=arguments.keyd_fd)
        keyd.set_inheritable(False)
        live(told, keyd)

    parser = commands.add_parser(command)
    parser.add_argument("--settings-fd", type=int, required=True)
    parser.add_argument("--keyd-fd", type=int, required=True)
    parser.set_defaults(run=begin)
