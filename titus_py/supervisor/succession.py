"""Replaces the supervisor's program: what the old one leaves, and how the new one is started.

Run by the supervisor, as root. ``titus-py reload --program`` makes it execute the installed program
in its own process (execve(2)). So its children stay its children, and the service manager still
knows its pid. It writes its state into a sealed file (``Legacy``); its descriptors stay open.

The new program may be newer or older. So it is tried first: started beside this one, it reads the
configuration and the state that it would get. It is executed only if it has understood both.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from keyd.linux.sealed import read_all, sealed_file
from keyd.linux.unix_socket import File
from keyd.upstream.state import UpstreamState
from titus_py.between.plan import Check, State
from titus_py.configuration import Configuration, Credential, Valid
from titus_py.configuration.address import Bindable
from titus_py.configuration.checking import CertificateFacts, Checked
from titus_py.configuration.client_certificates import ClientAuthorities
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.file_watch import FileWatch
from titus_py.configuration.lending import LentFacts
from titus_py.configuration.tables import LentKey
from titus_py.supervisor.child import Child
from titus_py.supervisor.control import Answer
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.installed import cannot_be_loaded, installed
from titus_py.supervisor.lending_socket import Left as LendingSocketLeft
from titus_py.supervisor.listeners import Listeners
from titus_py.supervisor.reaping import reaped_elsewhere

__all__ = [
    "CannotStart",
    "CannotTakeOver",
    "Legacy",
    "Trial",
    "execute",
    "inherit",
    "inherit_listeners",
    "inherited",
    "leave",
    "leave_listeners",
    "rehearse",
    "try_out",
    "who_waits",
]

#: The environment variables with the descriptor of the legacy: for the next program, and for one
#: that is only tried out.
_VARIABLE = "TITUS_PY_LEGACY"
_REHEARSAL = "TITUS_PY_REHEARSAL"
_WARNING = "warning: "
_RESTART = "only a restart of titus-py, which ends all connections, can change the program"


class CannotTakeOver(Exception):
    """This program does not understand the legacy; the text says which part of it."""


class CannotStart(Exception):
    """This program is not complete; the text says what fails."""


class _Left(BaseModel):
    # Not built when it is first used (``defer_build``): the program may be gone from the disk then.
    model_config = ConfigDict(extra="forbid", ser_json_bytes="hex", val_json_bytes="hex")


class LeftChild(_Left):
    """A parent or keyd that runs on, and is not told of the new program."""

    pid: int
    socket: int
    starting: bool


class LeftGeneration(_Left):
    """What the next program cannot find out about a ``Generation`` otherwise."""

    number: int
    #: As in a configuration file: each program reads it by its own rules.
    configuration: dict[str, Any]
    certificates: list[tuple[Credential, CertificateFacts]]
    authorities: list[tuple[ClientFiles, ClientAuthorities]] = []
    lent: list[tuple[LentKey, LentFacts]] = []
    keyd: LeftChild | None
    parent: LeftChild | None
    keyd_versions: tuple[int, int] = (0, 0)
    waits_for_keyd: bool
    without_keyd: bool
    keyds_keys: set[str] | None
    lacks_keys: bool = False
    #: What keyd has told, and tells again only once it has changed.
    tokens: list[tuple[str, str]] = []
    upstreams: list[UpstreamState] = []
    lending: list[list[Any]] = []
    retired: bool
    retiring: bool
    crippled: bool
    announced: bool
    connections: dict[int, dict[str, Any]]
    ended: list[dict[str, Any]]
    spares: int
    huge_pages: int | None = None
    huge_pages_of_code: int | None = None
    started: datetime
    begun: float
    uids: tuple[int, int]


class Listener(_Left):
    """A listening socket; ``passed`` by the service manager, or bound by us."""

    address: Bindable
    descriptor: int
    passed: bool
    listening: bool
    #: Of a unix socket that was made here.
    file: File | None = None


class Legacy(_Left):
    """All that one supervisor leaves to the next. Sockets are descriptors."""

    #: The version of this, and of the messages to and from parents and keyds: those that run on
    #: are of the old program. It changes if a supervisor of the version before would not
    #: understand them.
    version: Literal[4] = 4
    generations: list[LeftGeneration]
    listeners: list[Listener]
    #: The file that keeps other instances from this one's uids; -1 if there is none.
    held_uids: int
    used_uids: list[tuple[int, int]]
    #: Each backend with its addresses, as they are sent to the parent.
    addresses: list[tuple[str, list[list[Any]]]]
    #: What is known of the backends that are checked.
    states: list[tuple[Check, State]]
    control: int | None
    #: The clients that wait for the outcome of this reload, and of the next one.
    answers: list[int]
    later_answers: list[int]
    asked_again: bool
    program_asked: bool
    #: A process is lost, and the next program is to start it: whatever the configuration says now.
    urgent: bool = False
    metrics: int | None
    metrics_address: Bindable | None
    #: Where keys are lent to other hosts.
    lending: list[LendingSocketLeft] = []
    #: The pids of children that were given up, and are to be reaped once they have ended.
    late: list[int] = []
    counts: dict[str, Any]
    log_format: str
    log_level: str
    log_lines_lost: int
    started: datetime
    begun: float

    @property
    def descriptors(self) -> list[int]:
        children = [
            child
            for generation in self.generations
            for child in (generation.keyd, generation.parent)
            if child is not None
        ]
        return [
            *(listener.descriptor for listener in self.listeners),
            *(child.socket for child in children),
            *self.answers,
            *self.later_answers,
            *(one for one in (self.control, self.metrics) if one is not None),
            *(left.descriptor for left in self.lending),
            *([self.held_uids] if self.held_uids >= 0 else []),
        ]


# --- the old program --------------------------------------------------------------


def leave(generation: Generation) -> LeftGeneration:
    """What the next supervisor has to know of a generation."""

    def left(child: Child | None) -> LeftChild | None:
        if child is None or child.socket.fileno() < 0:
            return None
        starting = child in generation.starting
        return LeftChild(pid=child.pid, socket=child.socket.fileno(), starting=starting)

    return LeftGeneration(
        number=generation.number,
        configuration=generation.configuration.model_dump(
            mode="json", exclude_defaults=True, warnings="none"
        ),
        certificates=list(generation.certificates.items()),
        authorities=list(generation.checked.authorities.items()),
        lent=list(generation.checked.lent.items()),
        keyd=left(generation.keyd),
        parent=left(generation.parent),
        keyd_versions=generation.keyd_versions,
        waits_for_keyd=generation.waits_for_keyd,
        without_keyd=generation.without_keyd,
        keyds_keys=generation.keyds_keys,
        lacks_keys=generation.lacks_keys,
        tokens=generation.tokens,
        upstreams=generation.upstreams,
        lending=generation.lent,
        retired=generation.retired,
        retiring=generation.retiring,
        crippled=generation.crippled,
        announced=generation.announced,
        connections=generation.connections,
        ended=list(generation.ended),
        spares=generation.spares,
        huge_pages=generation.huge_pages,
        huge_pages_of_code=generation.huge_pages_of_code,
        started=generation.started,
        begun=generation.begun,
        uids=(generation.uids.start, generation.uids.stop),
    )


def leave_listeners(listeners: Listeners) -> list[Listener]:
    """What the next supervisor has to know of the listening sockets."""
    return [
        Listener(
            address=address,
            descriptor=listener.fileno(),
            passed=address in listeners.passed,
            listening=address in listeners.open,
            file=listeners.files.get(address),
        )
        for address, listener in (listeners.passed | listeners.open).items()
    ]


def who_waits(answers: Iterable[Answer]) -> list[int]:
    """The descriptors of clients that wait for an answer: some may have hung up."""
    descriptors = (answer.client.fileno() for answer in answers)
    return [descriptor for descriptor in descriptors if descriptor >= 0]


class Trial(NamedTuple):
    """The reasons why the installed program cannot take over, and whether it ``starts`` at all."""

    problems: list[str]
    starts: bool = True


def try_out(legacy: Legacy, environment: Mapping[str, str], seconds: float) -> Trial:
    """Start the installed program beside this one."""
    try:
        before = installed()
        trial = _try_out(legacy, environment, seconds)
        if installed() == before:
            return trial
    except OSError as error:
        return Trial([f"the new program: {error.filename}: {error.strerror}"], starts=False)
    return Trial(["the new program was replaced while it was tried out"], starts=False)


def _try_out(legacy: Legacy, environment: Mapping[str, str], seconds: float) -> Trial:
    """Raises OSError."""
    descriptor = sealed_file("legacy", legacy.model_dump_json().encode())
    try:
        with reaped_elsewhere():
            done = subprocess.run(
                _command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**environment, _REHEARSAL: str(descriptor)},
                pass_fds=(descriptor,),
                # If it dies, the processes that it leaves are known by its session.
                start_new_session=True,
                timeout=seconds,
                check=False,
            )
    except subprocess.TimeoutExpired:
        problem = f"the new program did not read its configuration within {seconds:g} s"
        return Trial([problem], starts=False)
    except OSError as error:
        return Trial([f"the new program: {sys.executable}: {error.strerror}"], starts=False)
    finally:
        os.close(descriptor)
    if not done.returncode:
        return Trial([])
    lines = done.stderr.decode(errors="replace").splitlines()
    problems = [line for line in lines if line and not line.startswith(_WARNING)]
    if done.returncode != 2 or not problems:
        # It failed before it could name a problem. The last line of a traceback says most.
        reason = (problems or ["it gave no reason"])[-1]
        return Trial([f"the new program failed: {reason}"], starts=False)
    return Trial(problems)


def execute(
    legacy: Legacy, environment: Mapping[str, str], signals: Iterable[signal.Signals]
) -> NoReturn:
    """Become the installed program. Raises OSError; then nothing has changed.

    The signals are blocked until that program hears them.
    """
    descriptor = sealed_file("legacy", legacy.model_dump_json().encode())
    kept = [descriptor, *legacy.descriptors]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        for one in kept:
            os.set_inheritable(one, True)
        environment = {**environment, _VARIABLE: str(descriptor)}
        os.execve(sys.executable, _command(), environment)  # noqa: S606 -- no shell is right
    except OSError:
        # First of all: without these, nothing could stop this program any more.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(descriptor)
        for one in legacy.descriptors:
            with suppress(OSError):
                os.set_inheritable(one, False)
        raise


def _command() -> list[str]:
    """The command that this program was started with."""
    return [sys.executable, *sys.orig_argv[1:]]


# --- the new program ---------------------------------------------------------------


def inherited() -> Legacy | None:
    """What the previous program left, if it executed this one. Can be called once."""
    legacy = _legacy(_VARIABLE)
    if legacy is not None:
        for descriptor in legacy.descriptors:
            os.set_inheritable(descriptor, False)
    return legacy


def rehearse() -> Legacy | None:
    """The legacy, which this program has understood, if it is only tried out.

    Raises CannotTakeOver; CannotStart, if a process could not be started that this one needs.
    """
    legacy = _legacy(_REHEARSAL)
    if legacy is not None:
        for left in legacy.generations:
            inherit(left, {}, tried_out=True)
        if reasons := cannot_be_loaded():
            raise CannotStart("; ".join(reasons))
    return legacy


def _legacy(variable: str) -> Legacy | None:
    descriptor = os.environ.pop(variable, "")
    if not descriptor.isdecimal():
        return None
    try:
        return Legacy.model_validate_json(read_all(int(descriptor)))
    except ValidationError as error:
        raise CannotTakeOver(
            f"it does not understand what the one that runs would leave to it, {_first(error)}: "
            f"{_RESTART}"
        ) from None


def inherit_listeners(legacy: Legacy) -> Listeners:
    """The listening sockets as they were."""
    passed, wanted, files = {}, {}, {}
    for left in legacy.listeners:
        listener = socket.socket(fileno=left.descriptor)
        if left.passed:
            passed[left.address] = listener
        if left.listening:
            wanted[left.address] = listener
        if left.file is not None:
            files[left.address] = left.file
    return Listeners(passed, wanted, files)


def inherit(
    left: LeftGeneration, filters: Mapping[str, str], tried_out: bool = False
) -> Generation:
    """The generation as it was; if ``tried_out``, without processes. Raises CannotTakeOver."""
    try:
        configuration = Configuration.model_validate(left.configuration, context=Valid())
    except ValidationError as error:
        raise CannotTakeOver(
            f"it does not understand {_first(error)} of the configuration that is served: "
            f"{_RESTART}"
        ) from None
    certificates = dict(left.certificates)
    authorities = dict(left.authorities)
    lent = dict(left.lent)
    others = [path for one in authorities for path in one.paths]
    others += [path for key in lent for path in key.secrets]
    files = FileWatch.of(certificates, others)
    checked = Checked(
        configuration, [], [], certificates, files, authorities=authorities, lent=lent
    )
    generation = Generation(left.number, checked, filters)
    generation.keyd_versions = left.keyd_versions
    generation.waits_for_keyd = left.waits_for_keyd
    generation.without_keyd = left.without_keyd
    generation.keyds_keys = left.keyds_keys
    generation.lacks_keys = left.lacks_keys
    generation.tokens, generation.upstreams = left.tokens, left.upstreams
    generation.lent = left.lending
    generation.retired = left.retired
    generation.retiring = left.retiring
    generation.crippled = left.crippled
    generation.announced = left.announced
    generation.connections = left.connections
    generation.ended.extend(left.ended)
    generation.spares = left.spares
    generation.huge_pages = left.huge_pages
    generation.huge_pages_of_code = left.huge_pages_of_code
    generation.started = left.started
    generation.begun = left.begun
    generation.uids = range(*left.uids)
    if not tried_out:
        for name, child in (("keyd", left.keyd), ("parent", left.parent)):
            if child is not None:
                generation.adopt(name, child.pid, child.socket, child.starting)
    return generation


def _first(error: ValidationError) -> str:
    """The first thing that was not understood, and why."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc']))} ({problem['msg']})"
