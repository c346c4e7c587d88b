"""``keyd listen`` and ``keyd control``: a keyd of its own, with the keys that it is told of.

Run by systemd or an administrator, as root or as keyd's own user. It reads the keys, starts
listening and confines itself before it hears anybody. ``listen`` serves whoever may connect to its
socket, ``control`` the parents of titus-py, on the terms that each states.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from keyd import key_reader
from keyd.accounts import user_of
from keyd.clients import Clients
from keyd.confinement import Confinement, confine, confine_unprivileged, lock_before_keys
from keyd.daemon import Keyd
from keyd.key_files import KeySources
from keyd.key_renewal import Renewal
from keyd.key_ring import KeyRing
from keyd.linux import seccomp
from keyd.linux.side_channels import guard
from keyd.linux.systemd import Notifier
from keyd.linux.unix_socket import Peer, refuse_descriptors
from keyd.listeners import listeners, owner_of, paths_of
from keyd.powers import ALL_POWERS
from keyd.protocol import Keys, Power, Refusal
from keyd.refusal_log import RefusalLog
from keyd.serve import THREADS, leave
from keyd.standard_error import StandardError
from keyd.status_page import StatusPage
from keyd.system_calls import SERVING
from keyd.token import options as token_options
from keyd.token.keys import States, hear_first

__all__ = ["control", "listen"]

#: How long handshakes that have begun may still take when keyd is told to stop. New clients wait
#: for the next keyd meanwhile.
_LEAVE_SECONDS = 3.0


def control(arguments: argparse.Namespace, notify: Notifier) -> None:
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

        def accepted(descriptor: int, _: bool) -> None:
            parent = socket.socket(fileno=descriptor)
            parent.setblocking(False)
            with suppress(OSError):
                parent.send(Keys.of(ring.keys).encode())
            try:
                keyd.hear_parent(parent, gone=lambda: None)
            except OSError as error:
                # ENOMEM, ENOSPC: it connects again.
                keyd.shortage.say(error.errno)
                parent.close()

        # Parents connect again, and are told which keys there are now.
        renewal.on_hangup(keyd, keyd.part)
        for listener in doors:
            keyd.hear_listener(listener, accepted)
        _serve(keyd, program, notify)


def listen(arguments: argparse.Namespace, notify: Notifier) -> None:
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
        user = user_of(arguments.user)
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
