"""``titus-py rekey``: a new key for each certificate, and the request to have it certified.

Run by the administrator, as root. The keys are made in a confined process (``key_maker``). No old
key is read here, and no file is overwritten: what is made is beside the old key, as
``NAME.new.key`` and ``NAME.new.csr``. An interrupted run is completed by the next one.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from keyd.printable import printable
from titus_py.commands import whole_files
from titus_py.commands.alone import alone
from titus_py.commands.check import report
from titus_py.commands.key_maker import KeyMaker, NotMade
from titus_py.commands.progress import tracked
from titus_py.commands.rekey_install import install, say
from titus_py.commands.rekey_targets import (
    Target,
    find_targets,
    is_directory,
    place_of,
    selected,
)
from titus_py.configuration import Loaded, load
from titus_py.configuration.helper import Unanswered
from titus_py.configuration.mistake import os_reason
from titus_py.configuration.tables import Keyd, Worker

__all__ = ["rekey"]

_DEFAULT_CONFIGURATION = Path("/etc/titus-py/titus.toml")


def rekey(
    asked: Sequence[str],
    config: Path | None,
    kind: str | None,
    installs: bool,
    dry_run: bool,
    pid: int | None,
) -> int:
    """Make keys and requests, or put the answers in place.

    Returns the exit code: 0 done, 1 if something failed, 2 if there are mistakes: then nothing
    was done.
    """
    if os.geteuid() != 0:
        say("must be run as root: keys are root's")
        return 2
    loaded = None
    needed = config is not None or not all(map(is_directory, asked))
    if needed or _DEFAULT_CONFIGURATION.exists():
        loaded = load(config or _DEFAULT_CONFIGURATION)
        if loaded.configuration is None and needed:
            report(loaded)
            return 2
    try:
        with alone(say):
            mistakes: list[str] = []
            chosen = selected(asked, loaded, mistakes)
            if installs and not dry_run:
                for credential in chosen:
                    place_of(credential).settle()
            targets = find_targets(chosen, loaded, mistakes)
            if installs:
                return install(targets, mistakes, dry_run, pid)
            return _make_all(targets, mistakes, loaded, kind, dry_run)
    except Unanswered as error:
        say(f"keys and certificates could not be checked by 'keyd check': {error}")
    except KeyboardInterrupt:
        say("interrupted: the same command again finishes what was begun")
    except OSError as error:
        say(f"{error.filename}: {os_reason(error)}" if error.filename else os_reason(error))
    return 1


def _make_all(
    targets: Sequence[Target],
    mistakes: list[str],
    loaded: Loaded | None,
    kind: str | None,
    dry_run: bool,
) -> int:
    for target in targets:
        if target.request.exists() and not target.new_key.exists():
            mistakes.append(f"{target.request} is there, and its key is not: remove it")
    for mistake in mistakes:
        say(mistake)
    if mistakes or not targets:
        return 2
    for target in targets:
        if target.request.exists():
            print(printable(f"{target.name}: waits to be certified: {target.request}"))
    missing = [target for target in targets if not target.request.exists()]
    if dry_run:
        for target in missing:
            made = f"{target.new_key} ({kind or 'of the same kind'}) and {target.request}"
            print(printable(f"{target.name}: would make {made}"))
        return 0
    for target in targets:
        for path in (target.new_key, target.request):
            whole_files.forget(path)
    return _make_missing(missing, loaded, kind) if missing else 0


def _make_missing(targets: Sequence[Target], loaded: Loaded | None, kind: str | None) -> int:
    """Make what is missing; one that fails keeps no other from being made."""
    configuration = loaded.configuration if loaded is not None else None
    keyd = configuration.keyd if configuration is not None else Keyd()
    worker = configuration.worker if configuration is not None else Worker()
    maker = KeyMaker(keyd.user, worker.chroot, keyd.lock_memory == "required")
    code = 0
    try:
        for target in tracked(targets, "Making keys"):
            try:
                _make(maker, target, kind)
            except NotMade as error:
                say(f"{target.new_key}: {error}")
                code = 1
                if error.ended:
                    break
            else:
                print(printable(f"{target.name}: have this certified: {target.request}"))
    finally:
        maker.close()
    return code


def _make(maker: KeyMaker, target: Target, kind: str | None) -> None:
    """Have a key and its request made; raises OSError and NotMade.

    The request appears after its key: whoever has a request to send has its key as well.
    """
    like = target.key.stat()
    chain = target.facts.chain
    with ExitStack() as opened:
        passphrase = None
        if target.passphrase_file is not None:
            passphrase = opened.enter_context(open(target.passphrase_file, "rb")).fileno()
        request = opened.enter_context(whole_files.new_file(target.request, 0o644, like))
        if target.new_key.exists():
            key = opened.enter_context(open(target.new_key, "rb")).fileno()
            maker.make(kind, chain, key, True, request, passphrase)
        else:
            key = opened.enter_context(whole_files.new_file(target.new_key, 0o600, like))
            maker.make(kind, chain, key, False, request, passphrase)
