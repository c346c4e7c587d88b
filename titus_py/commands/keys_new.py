"""``titus-py keys new``: a key that another host knows by its pin, and a certificate for it.

Run by the administrator, as root. The key is made in a confined process (``key_maker``), which
writes it into its file: no key's octets come here.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from keyd.printable import printable
from titus_py.commands import whole_files
from titus_py.commands.alone import alone
from titus_py.commands.check import report
from titus_py.commands.key_maker import KeyMaker, NotMade
from titus_py.commands.pins import Unread, read_pins
from titus_py.configuration import load
from titus_py.configuration.address import host_name
from titus_py.configuration.exposure import open_directories
from titus_py.configuration.mistake import os_reason
from titus_py.configuration.tables import Keyd, Worker

__all__ = ["DIRECTORY", "new"]

DIRECTORY = Path("/etc/titus-py/keys")
_DEFAULT_CONFIGURATION = Path("/etc/titus-py/titus.toml")
#: RFC 5280, appendix A.1: ub-common-name.
_MOST_CHARACTERS = 64
_READ_SECONDS = 30.0

_ADVICE = """\
made {key} and {certificate}
This host's titus.toml names these two files, as certificate and key: in a [[vhost]], or in a
[[tunnel]], not in both. The other host's titus.toml names the pin. If this host is its client:

    [[vhost]]
    client_certificates = "required"

    [[vhost.client]]
    name = "{name}"
    spki = ["{pin}"]

If this host is its server:

    [[tunnel]]
    pins = ["{pin}"]
"""


def new(name: str, directory: Path, kind: str, force: bool, config: Path | None) -> int:
    """Make NAME.key and NAME.crt in this directory, and print the pin.

    ``config`` says how keyd is confined, if not the usual file. Standard output has the pin and
    nothing else. Returns the exit code: 0 done, 1 if something failed, 2 if there are mistakes:
    then nothing was done.
    """
    if os.geteuid() != 0:
        _say("must be run as root: keys are root's")
        return 2
    try:
        name = host_name(name).removesuffix(".")
    except ValueError as error:
        _say(str(error))
        return 2
    if len(name) > _MOST_CHARACTERS:
        _say(f"{name} has {len(name)} characters: a certificate's name has {_MOST_CHARACTERS}")
        return 2
    keyd, worker = Keyd(), Worker()
    if config is not None or _DEFAULT_CONFIGURATION.exists():
        loaded = load(config or _DEFAULT_CONFIGURATION)
        if loaded.configuration is not None:
            keyd, worker = loaded.configuration.keyd, loaded.configuration.worker
        elif config is not None:
            report(loaded)
            return 2
    key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
    try:
        if directory == DIRECTORY:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with alone(_say):
            mistakes = [*_mistakes(key, certificate, force)]
            for mistake in mistakes:
                _say(mistake)
            if mistakes:
                return 2
            maker = KeyMaker(keyd.user, worker.chroot, keyd.lock_memory == "required")
            try:
                _make(maker, name, kind, key, certificate, force)
            finally:
                maker.close()
        with open(certificate, "rb") as file:
            pin = read_pins(file.fileno(), None, _READ_SECONDS).keys[0].pin
    except (NotMade, Unread) as error:
        _say(f"{key}: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: the same command again makes the files, with --force if one is there")
        return 1
    except OSError as error:
        _say(f"{error.filename}: {os_reason(error)}" if error.filename else os_reason(error))
        return 1
    print(pin)
    _say(_ADVICE.format(name=name, key=key, certificate=certificate, pin=pin))
    return 0


def _mistakes(key: Path, certificate: Path, force: bool) -> list[str]:
    if not key.parent.is_dir():
        return [f"{key.parent}: is no directory: make it first, or name another (--directory)"]
    mistakes = [
        f"{path} is there already: choose another name, or have it replaced with --force: then the "
        "hosts that know its pin have to learn the new one"
        for path in (key, certificate)
        if os.path.lexists(path) and not force
    ]
    # Root makes a file there: another user could have it put anywhere.
    return mistakes + list(open_directories(key, set()))


def _make(maker: KeyMaker, name: str, kind: str, key: Path, certificate: Path, force: bool) -> None:
    """Raises OSError and NotMade. The certificate appears after its key."""
    like = key.parent.stat()
    for path in (key, certificate):
        whole_files.forget(path)
    with ExitStack() as opened:
        written = opened.enter_context(whole_files.new_file(certificate, 0o644, like, force))
        secret = opened.enter_context(whole_files.new_file(key, 0o600, like, force))
        maker.make_known(kind, name, secret, written)


def _say(text: str) -> None:
    for line in f"titus-py keys new: {text}".splitlines():
        print(printable(line), file=sys.stderr)
