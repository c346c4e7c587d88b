"""The command ``keyd``: the daemon, on its own or started by titus-py, and its tools."""

import signal
import sys

if sys.argv[1:2] in (["control"], ["listen"]):
    # Before anything else: by default these signals end the process. SIGHUP has a use later.
    for _of_no_meaning in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_of_no_meaning, signal.SIG_IGN)

import argparse
import json
import os
import pwd
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from keyd import helper, key_reader
from keyd.clients import Clients
from keyd.confinement import (
    CannotLock,
    Confinement,
    confine,
    confine_unprivileged,
    lock_before_keys,
)
from keyd.daemon import Keyd
from keyd.inspection import audit as inspection_audit
from keyd.inspection import status as inspection_status
from keyd.key_files import KeySources
from keyd.key_renewal import Renewal
from keyd.key_ring import KeyRing
from keyd.keys import UnusableKey
from keyd.linux import seccomp
from keyd.linux.credentials import forbid_core_dumps, hide_memory, lock_memory_meanwhile
from keyd.linux.process import open_standard_streams, run_for_reader
from keyd.linux.sealed import read_all
from keyd.linux.side_channels import guard
from keyd.linux.systemd import Notifier, close_inherited
from keyd.linux.title import set_title
from keyd.linux.unix_socket import Peer, refuse_descriptors
from keyd.listeners import listeners, owner_of, paths_of
from keyd.powers import ALL_POWERS
from keyd.protocol import Keys, Malformed, Power, Refusal
from keyd.provider import lasting_path, openssl_configuration
from keyd.refusal_log import RefusalLog
from keyd.serve import THREADS, leave, serve
from keyd.standard_error import StandardError
from keyd.status_page import StatusPage
from keyd.system_calls import SERVING
from keyd.token import options as token_options
from keyd.token.keys import States, hear_first

__all__ = ["main"]

#: How long handshakes that have begun may still take when keyd is told to stop. New clients wait
#: for the next keyd meanwhile.
_LEAVE_SECONDS = 3.0
_CANNOT_SERVE = (CannotLock, UnusableKey, Malformed, OSError, LookupError)


def main() -> int:
    """Run the command that ``sys.argv`` asks for; returns its exit code."""
    open_standard_streams()
    # Before any key is read, whatever the command.
    forbid_core_dumps()
    hide_memory()
    # Those that serve insist on it (``lock_before_keys``).
    with suppress(OSError):
        lock_memory_meanwhile()
    return run_for_reader(_run)


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
    parser = argparse.ArgumentParser(
        prog="keyd", description="Hold private keys; sign and decrypt what a TLS server may."
    )
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
    configuration.add_argument("--socket", required=True, metavar="PATH")
    configuration.set_defaults(run=_openssl_conf)

    inspection_status.add_command(commands)
    inspection_audit.add_command(commands)

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
    own.set_defaults(run=serve)
    return parser


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
    token_options.add(parser)


def _leave_when_told(keyd: Keyd, leaving: Callable[[], None], left: Callable[[], None]) -> None:
    """At the first SIGTERM, finish what has begun, then end; at the second, end at once."""

    def end() -> None:
        left()
        leave()

    def finish(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        keyd.leave(_LEAVE_SECONDS, end)
        leaving()

    signal.signal(signal.SIGTERM, finish)


def _of_its_own(arguments: argparse.Namespace) -> NoReturn:
    """Serve, and tell the service manager why not if keyd cannot."""
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
    """Serve parents that connect, on the terms that each states."""
    guards = _protect(arguments)
    sources = _sources(arguments)
    must_lock = arguments.lock_memory == "required"
    reader = key_reader.start(sources, must_lock) if sources.any else None
    page = StatusPage("control")
    # What parents grant, they say themselves.
    ring = KeyRing(frozenset(), page.keys_changed)
    tokens = token_options.start(arguments, ring.take)
    renewal = Renewal(reader, ring.take, ring.drop)
    renewal.begin(sources, needed=not tokens)
    hear_first(tokens)
    # A client of this socket states the terms, so only root may connect.
    with ExitStack() as stack:
        doors = listeners(arguments, stack, lambda: (0, 0), mode=0o600)
        program = _withdraw(arguments, guards)
        states = States(tokens)
        keyd = Keyd(ring.keys, tick=lambda: _tick(notify, states, page))
        page.tell_of(ring.keys, renewal.paths, paths_of(doors), keyd.tally, states)
        for token in tokens:
            keyd.hear_process(token.socket, token.hear)

        def accepted(descriptor: int) -> None:
            parent = socket.socket(fileno=descriptor)
            parent.setblocking(False)
            with suppress(OSError):
                parent.send(Keys.of(ring.keys).encode())
            keyd.hear_parent(parent, gone=lambda: None)

        # Parents connect again, and are told which keys there are now.
        renewal.on_hangup(keyd, keyd.part)
        for listener in doors:
            keyd.hear_listener(listener, accepted)
        _serve(keyd, program, notify)


def _listen(arguments: argparse.Namespace, notify: Notifier) -> None:
    """Serve the clients of a socket of our own."""
    guards = _protect(arguments)
    # Which versions and groups its clients speak, they do not say.
    granted = ALL_POWERS if arguments.rsa_key_exchange else ALL_POWERS - {Power.DECRYPT}
    if arguments.as_client:
        granted = frozenset({Power.SIGN_TLS13_CLIENT})
    sources = _sources(arguments)
    must_lock = arguments.lock_memory == "required"
    reader = key_reader.start(sources, must_lock) if sources.any else None
    page = StatusPage("listen")
    ring = KeyRing(granted, page.keys_changed)
    tokens = token_options.start(arguments, ring.take)
    renewal = Renewal(reader, ring.take, ring.drop)
    renewal.begin(sources, needed=not tokens)
    hear_first(tokens)
    with ExitStack() as stack:
        doors = listeners(arguments, stack, lambda: owner_of(arguments), mode=0o660)
        for door in doors:
            refuse_descriptors(door)
        program = _withdraw(arguments, guards)
        states = States(tokens)

        def refused(report: Refusal, peer: Peer) -> None:
            page.refused(report, peer.pid)
            log.note(report, peer)

        def tick() -> None:
            _tick(notify, states, page)
            clients.tick()
            log.say_rest()

        log = RefusalLog()

        keyd = Keyd(ring.keys, tick)
        clients = Clients(keyd, ring.keys, ring.grants, refused)
        page.tell_of(ring.keys, renewal.paths, paths_of(doors), keyd.tally, states)
        for token in tokens:
            keyd.hear_process(token.socket, token.hear)
        renewal.on_hangup(keyd, lambda: None)
        for door in doors:
            keyd.hear_listener(door, clients.accepted)
        _serve(keyd, program, notify, clients.leave, log.say_rest)


def _serve(
    keyd: Keyd,
    program: bytes,
    notify: Notifier,
    leaving: Callable[[], None] = lambda: None,
    left: Callable[[], None] = lambda: None,
) -> None:
    """Serve until told to leave, and call ``leaving`` then, and ``left`` at the end.

    Whoever reads standard error is waited for no more.
    """
    standard_error = StandardError()

    def ready() -> None:
        standard_error.take_over()
        notify.ready()

    _leave_when_told(keyd, leaving, left)
    keyd.serve(THREADS, program, ready, beside=standard_error.write_all)


def _tick(notify: Notifier, tokens: States, page: StatusPage) -> None:
    notify(watchdog=1)
    tokens.news()
    page.write()


def _protect(arguments: argparse.Namespace) -> str:
    """Protect the memory that keys are about to be read into; raises CannotLock.

    Returns what guards it from other processes of the same core, in words.
    """
    lock_before_keys(arguments.lock_memory == "required")
    return ", ".join(guard()) or "none"


def _withdraw(arguments: argparse.Namespace, guards: str) -> bytes:
    """Confine this process, except for the filter, which is returned."""
    program = seccomp.build(SERVING)
    must_lock = arguments.lock_memory == "required"
    if os.geteuid() != 0:
        confine_unprivileged(must_lock)
    elif arguments.user is None:
        raise LookupError("started as root, and no --user to become")
    else:
        user = pwd.getpwnam(arguments.user)
        Path(arguments.chroot).mkdir(mode=0o555, parents=True, exist_ok=True)
        confine(Confinement(user.pw_uid, user.pw_gid, arguments.chroot, must_lock))
    print(f"keyd: guards against other processes of its core: {guards}", file=sys.stderr)
    return program


def _sources(arguments: argparse.Namespace) -> KeySources:
    """The files, by whole paths: once keyd is confined, it has another current directory."""
    files = [key for key in arguments.key if not key.startswith(token_options.SCHEME)]
    for key in files:
        if (key == "upstream" or key.startswith("unix:")) and not os.path.lexists(key):
            raise LookupError(
                f"--key {key}: other hosts' keys are for a keyd that titus-py starts ([keyd] "
                "upstream); this one has keys in files and in tokens"
            )
    directory, passphrase_file = arguments.key_directory, arguments.passphrase_file
    return KeySources(
        tuple(map(os.path.abspath, files)),
        directory and os.path.abspath(directory),
        passphrase_file and os.path.abspath(passphrase_file),
        token_options.pin_files(arguments),
    )


def _reference(arguments: argparse.Namespace) -> int:
    # Imported here: keyd itself has no use for certificates.
    from keyd.certificates import load_chain, refer_to

    _, reference = refer_to(load_chain(arguments.certificate)[0].certificate, arguments.certificate)
    sys.stdout.write(reference)
    return 0


def _openssl_conf(arguments: argparse.Namespace) -> int:
    channel = f"socket = {arguments.socket}"
    sys.stdout.write(openssl_configuration(channel, module=lasting_path()))
    return 0


def _make(arguments: argparse.Namespace) -> NoReturn:
    """Make keys as ordered, confined; see there."""
    # Imported here, as above.
    from keyd.making import confine, serve

    set_title("keyd-make", "keyd: making keys")
    settings = json.loads(read_all(arguments.settings_fd))
    orders = socket.socket(fileno=arguments.orders_fd)
    guard()
    confine(Confinement(*(settings[key] for key in ("uid", "gid", "chroot", "must_lock"))))
    serve(orders)
    leave()


def _mind(told: dict[str, Any], keyd: socket.socket) -> NoReturn:
    # Imported here, as above.
    from keyd.token.minder import mind

    mind(told, keyd)


def _connect(told: dict[str, Any], keyd: socket.socket) -> NoReturn:
    # Imported here, as above.
    from keyd.upstream.connector import connect

    connect(told, keyd)


def _check(arguments: argparse.Namespace) -> int:
    # Imported here, as above.
    from keyd.checking import answer

    del arguments
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
