"""Finding what to audit: the running instances, and the configuration of one.

Run by ``titus-py audit``, as root. A supervisor that runs as root is trusted to say where
its configuration is: only root can start such a process, and root can read files anyway. A
process of another user that looks like a supervisor is passed over.
"""

import argparse
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import prctl

from titus_py.audit.instance import (
    Process,
    Role,
    all_processes,
    descriptors,
    instance_processes,
    is_parent,
    namespaces,
)
from titus_py.audit.sockets import unix_sockets
from titus_py.configuration import Configuration, Loaded, from_options, load
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.certificate_dir import pairs

__all__ = ["CannotAudit", "LivesElsewhere", "Target", "find_supervisors", "find_target"]

_DEFAULT_CONFIGURATION = Path("/etc/titus-py/titus.toml")
#: An instance without one of these cannot be audited.
_NEEDED = (Role.PARENT, Role.FORK_SERVER, Role.KEYD)


class CannotAudit(Exception):
    """There is nothing to audit, or no way to; the text says why."""


class LivesElsewhere(CannotAudit):
    """The instance is in a container of its own: its addresses or files are not the ones here."""

    def __init__(self, supervisor: int) -> None:
        super().__init__(
            f"process {supervisor} lives in a container of its own: audit it from inside, as with "
            f"'nsenter --target {supervisor} --all titus-py audit'"
        )


class Target(NamedTuple):
    """An instance to audit: its supervisor, and what it was started with."""

    supervisor: Process
    configuration: Configuration
    #: Where the configuration came from: a file, or the command line.
    source: str

    def processes(self) -> list[Process]:
        """The instance's processes now, the supervisor first; raises CannotAudit if it is gone."""
        found = instance_processes(self.supervisor.pid)
        if not found or found[0].started != self.supervisor.started:
            raise CannotAudit("the instance ended while it was looked at")
        if self.configuration.keyd.socket is not None:
            found += _keyds_elsewhere([one for one in found if one.role is Role.PARENT])
        return found

    def key_files(self, at_most: int | None = None) -> list[tuple[Path, Path | None]]:
        """The private keys, each with the file of its passphrase if it may need one.

        Of a directory, ``at_most`` so many, chosen at random.
        """
        found = {
            (one.key, one.passphrase_file)
            for vhost in self.configuration.vhost
            for one in vhost.credentials.values()
            if one.key is not None
        }
        found |= {
            (one.key, one.passphrase_file)
            for tunnel in self.configuration.tunnel
            for one in (tunnel.credential,)
            if one is not None and one.key is not None
        }
        for directory in self._directories():
            keys = [(pair.key, None) for pair in pairs(directory)]
            found |= set(keys if at_most is None else random.sample(keys, min(len(keys), at_most)))
        if self.configuration.keyd.socket is not None:
            for process in self.processes():
                if process.role is Role.KEYD:
                    found |= set(_key_options(process.pid))
        return sorted(found, key=str)

    @property
    def listening(self) -> frozenset[int | str]:
        """Where its clients connect: ports, and paths of unix sockets."""
        return frozenset(
            address.path if isinstance(address, UnixAddress) else address.port
            for address in self.configuration.listening
        )

    def _directories(self) -> list[Path]:
        """Those of certificates, if titus-py's keyd has their keys."""
        if self.configuration.keyd.socket is not None:
            return []
        found = {vhost.certificate_dir for vhost in self.configuration.vhost}
        return sorted(one for one in found if one is not None)

    def started(self, process: Process) -> bool:
        """Whether a process is a child of the supervisor, and not a service of its own."""
        return process.ppid == self.supervisor.pid


def _keyds_elsewhere(parents: Sequence[Process]) -> list[Process]:
    """Processes started as ``keyd control`` that hold the other end of a parent's socket."""
    unix = unix_sockets() or {}
    peers = {unix[inode].peer for parent in parents for inode in _inodes(parent.pid) & set(unix)}
    found = []
    for process in all_processes():
        words = _words(process.pid)
        if b"control" in words and any(word.rpartition(b"/")[2] == b"keyd" for word in words):
            try:
                held = _inodes(process.pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if held & peers:
                found.append(process._replace(role=Role.KEYD))
    return found


def _inodes(pid: int) -> set[int]:
    matches = (re.fullmatch(r"socket:\[(\d+)\]", what) for what in descriptors(pid).values())
    return {int(match[1]) for match in matches if match}


def _key_options(pid: int) -> list[tuple[Path, Path | None]]:
    """The keys that a ``keyd control`` was started with, as ``Target.key_files`` has them."""
    parser = _Parser()
    parser.add_argument("--key", action="append", type=Path)
    parser.add_argument("--passphrase-file", type=Path)
    words = [os.fsdecode(word) for word in _words(pid)]
    options, _ = parser.parse_known_args(words[words.index("control") + 1 :])
    found: list[tuple[Path, Path | None]] = []
    for path in options.key or ():
        try:
            encrypted = path.is_absolute() and b"ENCRYPTED" in path.read_bytes()
        except OSError as error:
            raise CannotAudit(f"keyd's key {path} cannot be read: {error.strerror}") from None
        if not path.is_absolute():
            # What the path was relative to is not known any more: keyd is in its empty root.
            raise CannotAudit(f"keyd's key {path} cannot be found: start keyd with absolute paths")
        found.append((path, options.passphrase_file if encrypted else None))
    return found


def _words(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def find_supervisors() -> list[Process]:
    """The supervisors of all visible instances: root's processes that have a parent as a child."""
    processes = {process.pid: process for process in all_processes()}
    parents = [process for process in processes.values() if is_parent(_words(process.pid))]
    # A child of a parent has the parent's command line until it has executed a program.
    pids = {process.pid for process in parents}
    supervisors = {process.ppid for process in parents if process.ppid not in pids}
    return [
        processes[pid]._replace(role=Role.SUPERVISOR)
        for pid in sorted(supervisors)
        # Anybody's process may have a parent's command line; a supervisor's is root's.
        if pid in processes and processes[pid].uid == 0 and b"serve" in _words(pid)
    ]


def find_target(supervisor: int) -> Target:
    """The instance with this supervisor. Raises CannotAudit."""
    _require_privilege()
    found = instance_processes(supervisor)
    if not found or found[0].uid != 0:
        raise CannotAudit(f"process {supervisor} is no supervisor of titus-py")
    _require_same_view(supervisor)
    loaded, source = _configuration(supervisor)
    if loaded.configuration is None:
        mistakes = "; ".join(str(mistake) for mistake in loaded.mistakes)
        raise CannotAudit(f"the configuration of process {supervisor} is not readable: {mistakes}")
    target = Target(found[0], loaded.configuration, source)
    roles = {process.role for process in target.processes()}
    if missing := [role for role in _NEEDED if role not in roles]:
        raise CannotAudit(
            f"process {supervisor} has no {' and no '.join(missing)} (yet, or any more)"
        )
    return target


def _require_privilege() -> None:
    if os.geteuid() != 0 or not prctl.cap_effective.sys_ptrace:
        raise CannotAudit("needs root with CAP_SYS_PTRACE, to look into other processes")


def _require_same_view(supervisor: int) -> None:
    """Raise LivesElsewhere if the instance has another network namespace than we have."""
    if namespaces("self")["net"] != namespaces(supervisor)["net"]:
        raise LivesElsewhere(supervisor)


def _require_same_file(supervisor: int, path: Path) -> None:
    """Raise LivesElsewhere if the supervisor has another file at this path, or none.

    A mount namespace of its own, such as systemd makes, does no harm otherwise.
    """
    try:
        if os.path.samefile(path, f"/proc/{supervisor}/root{path}"):
            return
    except FileNotFoundError:
        pass
    raise LivesElsewhere(supervisor)


def _configuration(supervisor: int) -> tuple[Loaded, str]:
    words = [os.fsdecode(word) for word in _words(supervisor)]
    cwd = Path(os.readlink(f"/proc/{supervisor}/cwd"))
    if "serve" not in words:
        raise CannotAudit(f"process {supervisor} was not started as 'titus-py serve'")
    parser = _Parser(allow_abbrev=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--listen", action="append")
    for option in ("--backend", "--cert", "--key"):
        parser.add_argument(option)
    options, _ = parser.parse_known_args(words[words.index("serve") + 1 :])
    credentials = _credentials(supervisor)
    if options.listen is None:
        path = cwd / (options.config or _DEFAULT_CONFIGURATION)
        _require_same_file(supervisor, path)
        return load(path, credentials), str(path)
    backend = options.backend
    if backend.startswith("unix:"):
        backend = f"unix:{cwd / backend.removeprefix('unix:')}"
    certificate, key = (
        path if path.startswith("credential:") else str(cwd / path)
        for path in (options.cert, options.key)
    )
    if certificate.startswith("/"):
        _require_same_file(supervisor, Path(certificate))
    loaded = from_options(options.listen, backend, certificate, key, credentials)
    return loaded, "the command line"


def _credentials(supervisor: int) -> Path | None:
    """The directory of the credentials that systemd gave the supervisor (systemd.exec(5))."""
    for word in Path(f"/proc/{supervisor}/environ").read_bytes().split(b"\0"):
        name, _, directory = word.partition(b"=")
        if name == b"CREDENTIALS_DIRECTORY":
            path = Path(os.fsdecode(directory))
            # It may be in the unit's own mount namespace.
            return path if path.is_dir() else Path(f"/proc/{supervisor}/root{path}")
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CannotAudit(f"the supervisor's command line cannot be read: {message}")
