"""The command ``keyd``: the daemon, on its own or started by titus-py, and its tools."""

import gc
import signal
import sys

from keyd.without_ssh import load_nothing_of_ssh

if __name__ == "__main__":
    load_nothing_of_ssh()
if sys.argv[1:2] in (["serve"], ["check"]):
    # titus-py waits for these. The imports make no garbage: looking for it takes a tenth of them.
    gc.disable()
elif sys.argv[1:2] in (["status"], ["audit"]):
    # Over before there is anything to look for, as a rule.
    gc.set_threshold(50_000)
elif sys.argv[1:2] in (["control"], ["listen"]):
    # Before anything else: by default these signals end the process. SIGHUP has a use later.
    for _of_no_meaning in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_of_no_meaning, signal.SIG_IGN)

import argparse
import json
import socket
from contextlib import suppress
from typing import Any, NoReturn

from keyd import helper
from keyd.command_line import Parser
from keyd.confinement import CannotLock
from keyd.inspection import commands as inspection
from keyd.keys import UnusableKey
from keyd.linux.credentials import forbid_core_dumps, hide_memory, lock_memory_meanwhile
from keyd.linux.process import leave, open_standard_streams, run_for_reader
from keyd.linux.sealed import read_all
from keyd.linux.systemd import Notifier, close_inherited
from keyd.linux.title import set_title
from keyd.protocol import Malformed
from keyd.without_mail import load_certificates_without_mail

__all__ = ["main"]

#: The commands with which titus-py and keyd start processes.
_NOT_TYPED = ("check", "make", "token", "connect", "serve")

_CANNOT_SERVE = (CannotLock, UnusableKey, Malformed, OSError, LookupError)


def main() -> NoReturn:
    """Run the command that ``sys.argv`` asks for, and end with its exit code."""
    open_standard_streams()
    # Before any key is read, whatever the command.
    forbid_core_dumps()
    hide_memory()
    # Those that serve insist on it (``lock_before_keys``).
    with suppress(OSError):
        lock_memory_meanwhile()
    leave(run_for_reader(_run))


def _run() -> int:
    arguments = _parser().parse_args()
    try:
        code: int = arguments.run(arguments)
    except CannotLock as error:
        # The exit code for mistaken options: another start would fail in the same way.
        print(f"keyd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except _CANNOT_SERVE as error:
        print(f"keyd: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    """Of titus-py's own commands and keyd's, which are started often, or of all others."""
    parser = Parser(
        prog="keyd", description="Hold private keys; sign and decrypt what a TLS server may."
    )
    if sys.argv[1:2] and sys.argv[1] in _NOT_TYPED:
        _add_those_not_typed(parser.add_subparsers())
    else:
        _add_those_typed(parser)
    return parser


def _add_those_typed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of keyd and of OpenSSL"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listen = commands.add_parser(
        "listen",
        help="serve keys on a unix socket, to any program that loads the provider",
        description="Whoever may connect to the socket may have TLS handshakes signed, by one "
        "connection for up to a minute: its mode and group decide who that is.",
    )
    _add_service_options(listen)
    listen.add_argument("--group", help="who may connect (default: the group of the user)")
    purpose = listen.add_mutually_exclusive_group()
    purpose.add_argument(
        "--rsa-key-exchange", action="store_true", help="also decrypt, for TLS 1.2 without ECDHE"
    )
    purpose.add_argument(
        "--as-client", action="store_true", help="sign what a TLS 1.3 client signs, and no server"
    )
    listen.set_defaults(run=_of_its_own, serve=_listen)

    control = commands.add_parser(
        "control",
        help="serve titus-py from a unit of its own",
        description="For a titus-py whose configuration names this socket: then it has no access "
        "to the keys at all.",
    )
    _add_service_options(control)
    control.set_defaults(run=_of_its_own, serve=_control)

    reference = commands.add_parser(
        "reference", help="write the reference file that stands for a certificate's key"
    )
    reference.add_argument("certificate", metavar="CERTIFICATE")
    reference.set_defaults(run=_reference)

    configuration = commands.add_parser(
        "openssl-conf", help="write an OpenSSL configuration that loads the provider"
    )
    configuration.add_argument("--socket", required=True, type=_absolute, metavar="PATH")
    configuration.set_defaults(run=_openssl_conf)

    inspection.add_commands(commands)


def _add_those_not_typed(commands: Any) -> None:
    check = commands.add_parser("check")  # titus-py's: JSON in, JSON out
    check.set_defaults(run=_check)

    make = commands.add_parser("make")  # titus-py's: on an inherited descriptor
    make.add_argument("--settings-fd", type=int, required=True)
    make.add_argument("--orders-fd", type=int, required=True)
    make.set_defaults(run=_make)

    helper.add_command(commands, "token", "keyd: a token's process", _mind)
    helper.add_command(commands, "connect", "keyd: connecting to upstreams", _connect)

    own = commands.add_parser("serve")  # titus-py's: on inherited descriptors
    own.add_argument("--settings-fd", type=int, required=True)
    own.add_argument("--parent-fd", type=int, required=True)
    own.add_argument("--supervisor-fd", type=int, required=True)
    own.add_argument("--predecessor-fd", type=int)
    own.set_defaults(run=_serve)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        from cryptography.hazmat.backends.openssl import backend

        print(f"keyd {version('titus-py')}")
        print(backend.openssl_version_text())
        parser.exit()


def _add_service_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen, unless systemd passes a socket"
    )
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="FILE",
        help="a PEM file, or the URI of a key in a token (pkcs11:)",
    )
    parser.add_argument(
        "--key-directory", metavar="DIRECTORY", help="where each file is a key, such as credentials"
    )
    parser.add_argument("--passphrase-file", metavar="FILE", help="of the keys that are encrypted")
    parser.add_argument("--user", help="the user to become, if root, once the keys are loaded")
    parser.add_argument(
        "--lock-memory",
        choices=("required", "try"),
        default="required",
        help="whether to serve if the memory cannot be locked",
    )
    parser.add_argument("--chroot", default="/run/titus-py/empty", metavar="DIRECTORY")
    parser.add_argument(
        "--token-user", metavar="USER", help="whom the processes of tokens run as, if root"
    )
    parser.add_argument(
        "--token-path",
        action="append",
        default=[],
        metavar="PATH",
        help="what a token's module may read and write: a directory, or a device",
    )
    parser.add_argument(
        "--token-environment",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable that a token's module reads",
    )
    parser.add_argument(
        "--token-network", action="store_true", help="let a token's module use the network"
    )


# What a command takes is imported when it is run: a keyd has nothing in its memory that only others
# need, and titus-py, which starts some of them, starts sooner.


def _of_its_own(arguments: argparse.Namespace) -> NoReturn:
    """Serve, and tell the service manager why not if keyd cannot."""
    from keyd.serve import leave

    set_title("keyd", "keyd", *sys.argv[1:])
    close_inherited()
    notify = Notifier()
    try:
        arguments.serve(arguments, notify)
    except _CANNOT_SERVE as error:
        notify(status=f"not started: {error}")
        raise
    leave()


def _control(arguments: argparse.Namespace, notify: Notifier) -> None:
    from keyd.of_its_own import control

    control(arguments, notify)


def _listen(arguments: argparse.Namespace, notify: Notifier) -> None:
    from keyd.of_its_own import listen

    listen(arguments, notify)


def _serve(arguments: argparse.Namespace) -> NoReturn:
    from keyd.serve import serve

    gc.enable()
    serve(arguments)


def _reference(arguments: argparse.Namespace) -> int:
    from keyd.certificates import load_chain, refer_to

    _, reference = refer_to(load_chain(arguments.certificate)[0].certificate, arguments.certificate)
    sys.stdout.write(reference)
    return 0


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise argparse.ArgumentTypeError(f"{path!r}: expected an absolute path")
    return path


def _openssl_conf(arguments: argparse.Namespace) -> int:
    from keyd.provider import lasting_path, openssl_configuration

    channel = f"socket = {arguments.socket}"
    sys.stdout.write(openssl_configuration(channel, module=lasting_path()))
    return 0


def _make(arguments: argparse.Namespace) -> NoReturn:
    """Make keys as ordered, confined; see there."""
    from keyd.confinement import Confinement
    from keyd.linux.side_channels import guard
    from keyd.making import confine, serve
    from keyd.serve import leave

    set_title("keyd-make", "keyd: making keys")
    settings = json.loads(read_all(arguments.settings_fd))
    orders = socket.socket(fileno=arguments.orders_fd)
    guard()
    confine(Confinement(*(settings[key] for key in ("uid", "gid", "chroot", "must_lock"))))
    serve(orders)
    leave()


def _mind(told: dict[str, Any], keyd: socket.socket) -> NoReturn:
    from keyd.token.minder import mind

    mind(told, keyd)


def _connect(told: dict[str, Any], keyd: socket.socket) -> NoReturn:
    from keyd.upstream.connector import connect

    connect(told, keyd)


def _check(arguments: argparse.Namespace) -> int:
    load_certificates_without_mail()
    from keyd.checking import answer

    gc.enable()
    del arguments
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
    return 0


if __name__ == "__main__":
    main()
