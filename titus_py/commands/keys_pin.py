"""``titus-py keys pin``: by which hash a public key is known.

Run by the administrator, as root or as anybody. What is read, of a file or of a server, is read by
a confined process (``pins``); this one opens the file, or connects.
"""

import os
import socket
import stat
import sys
import time
from contextlib import ExitStack

from keyd.printable import printable
from titus_py.commands.pins import Known, Shown, Unread, read_pins
from titus_py.configuration.address import IPAddress, NameAddress, host_name, parse_backend
from titus_py.configuration.mistake import os_reason

__all__ = ["pin"]

#: How long reading a file may take.
_FILE_SECONDS = 30.0


def pin(asked: str, server_name: str | None, seconds: float, starttls: str | None = None) -> int:
    """Print the pin of a file's first public key, or of the one that a server shows.

    ``starttls`` is the protocol by which the server is first asked for TLS. Standard output has the
    pin and nothing else; whose it is goes to standard error. Returns the exit code: 0, 1 if
    something failed, 2 for a mistake.
    """
    try:
        if "/" in asked or ":" not in asked:
            for option, value in (("--server-name", server_name), ("--starttls", starttls)):
                if value is not None:
                    _say(f"{option} is for a server, and {asked} is a file")
                    return 2
            return _of_file(asked)
        return _of_server(asked, server_name, seconds, starttls)
    except KeyboardInterrupt:
        _say("interrupted")
        return 1


def _of_file(path: str) -> int:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody who writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        as_server = "(a server is written with its port: HOST:PORT)"
        server = f" {as_server}" if "/" not in path or "://" in path else ""
        _say(f"{path}: {os_reason(error)}{server}")
        return 2
    with ExitStack() as opened:
        opened.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            _say(f"{path}: is no regular file")
            return 2
        try:
            shown = read_pins(descriptor, None, _FILE_SECONDS)
        except Unread as error:
            _say(f"{path}: {error}")
            return 2
        except OSError as error:
            _say(os_reason(error))
            return 1
    _print(shown, path)
    return 0


def _of_server(asked: str, server_name: str | None, seconds: float, starttls: str | None) -> int:
    try:
        address = parse_backend(asked)
        name = host_name(server_name).removesuffix(".") if server_name is not None else ""
    except ValueError as error:
        _say(f"{error} (a file is written with a slash: ./FILE)")
        return 2
    if not isinstance(address, IPAddress | NameAddress):
        _say(f"{asked}: is a unix socket: a server is written HOST:PORT")
        return 2
    host = address.host if isinstance(address, IPAddress) else address.name.removesuffix(".")
    if server_name is None and isinstance(address, NameAddress):
        name = host
    ends = time.monotonic() + seconds
    with ExitStack() as opened:
        try:
            connected = socket.create_connection((host, address.port), seconds)
            opened.enter_context(connected)
            connected.setblocking(True)
            left = max(ends - time.monotonic(), 0.1)
            shown = read_pins(connected.fileno(), name, left, starttls)
        except Unread as error:
            _say(f"{asked}: {error}")
            return 1
        except OSError as error:
            _say(f"{asked}: cannot be connected to: {_reason(error, seconds)}")
            return 1
    _print(shown, asked)
    _say(
        "nobody has verified who answers there: compare this pin by another way, such as with what "
        "'titus-py keys pin' says of the certificate's file on that host"
    )
    return 0


def _reason(error: OSError, seconds: float) -> str:
    return (
        f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else os_reason(error)
    )


def _print(shown: Shown, where: str) -> None:
    first, *others = shown.keys
    print(first.pin)
    _say(f"{where}: {_described(first)}")
    for other in others:
        _say(f"also there, and not the one to pin: {other.pin}, {_described(other)}")
    if shown.left_out:
        _say(f"and {shown.left_out} more")


def _described(key: Known) -> str:
    if not key.until:
        return "a public key"
    return f"the key of the certificate of {key.subject or 'nobody'}, valid until {key.until}"


def _say(text: str) -> None:
    print(printable(f"titus-py keys pin: {text}"), file=sys.stderr)
