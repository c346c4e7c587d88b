"""Connects to a keyd that is a service of its own. Run by the supervisor; never blocks it."""

import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from keyd.protocol import MAX_KEYS_OCTETS, SHORT_ID_OCTETS, Keys, Malformed
from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.lingering import hear_alarms, not_lingering
from titus_py.supervisor.record import Event
from titus_py.supervisor.service import Service
from titus_py.supervisor.takeover import Takeover

__all__ = ["KeydService"]

#: How many certificates whose key keyd lacks are named.
_SHOWN = 5
#: How soon to try again to connect to keyd; each time, the pause doubles.
_PAUSE_SECONDS = 0.2
_MAX_PAUSE_SECONDS = 2.0
#: The same after one that was connected and is gone: it may be about to go each time, and each time
#: with other keys, which asks for a reload. One that has been there for so long counts as reliable.
_MAX_LOST_PAUSE_SECONDS, _RELIABLE_SECONDS = 30.0, 10.0
_NOT_UNDERSTOOD = "it does not speak keyd's protocol"
#: How long keyd may take to say which keys it has.
_PATIENCE_SECONDS = 15.0


class _Reliability:
    """Of the keyd at one path: whichever generation connects to it, it is the same keyd."""

    def __init__(self) -> None:
        self._connected: float | None = None
        self._pause = 0.0

    def is_connected(self, now: float) -> None:
        if self._connected is None:
            self._connected = now

    def is_lost(self, now: float) -> float:
        """Returns after which pause to connect to it again."""
        if self._connected is not None:
            if now - self._connected >= _RELIABLE_SECONDS:
                self._pause = 0.0
            else:
                longer = max(2 * self._pause, _PAUSE_SECONDS)
                self._pause = min(longer, _MAX_LOST_PAUSE_SECONDS)
            # Several generations may lose the same one.
            self._connected = None
        return self._pause


class KeydService:
    """``reload_for_keys`` asks for a reload because the keys have changed. ``not_understood`` is
    called when a keyd is there that this program does not understand: another program may.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        service: Service,
        generations: Generations,
        children: Children,
        takeover: Takeover,
        reload_for_keys: Callable[[], None],
        not_understood: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._event = event
        self._service = service
        self._generations = generations
        self._children = children
        self._takeover = takeover
        self._reload_for_keys = reload_for_keys
        self._not_understood = not_understood
        self._clock = clock
        hear_alarms()
        self._reliability: dict[Path | None, _Reliability] = defaultdict(_Reliability)

    def connect(self, generation: Generation, pause: float = _PAUSE_SECONDS) -> None:
        """Connect to keyd: again and again, until it answers or the generation needs it no more."""
        path = generation.configuration.keyd.socket
        if path is None or self._is_of_no_use(generation):
            return
        try:
            control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError:
            self._loop.after(pause, lambda: self.connect(generation, pause))
            return

        def stop_waiting() -> None:
            self._loop.unwatch(control.fileno())
            with not_lingering():
                control.close()
            reason = f"it has not said within {_PATIENCE_SECONDS:g} s which keys it has"
            self._again(generation, path, reason, pause)

        def hear() -> None:
            patience.cancel()
            self._loop.unwatch(control.fileno())
            # It may send descriptors, too. The kernel closes them.
            with not_lingering(), control:
                keys, reason = _hear_keys(control)
                if keys is not None and self._introduced(generation, control, keys):
                    return
            self._again(generation, path, reason, pause)

        try:
            control.connect(str(path))
            self._loop.watch(control.fileno(), hear)
        except OSError as error:
            control.close()
            self._again(generation, path, error.strerror or str(error), pause)
        else:
            patience = self._loop.after(_PATIENCE_SECONDS, stop_waiting)

    def lost(self, generation: Generation) -> None:
        """The parent has lost its keyd: connect again, later if it had not been there for long.

        It is not trusted to say so only once.
        """
        if generation.without_keyd:
            return
        generation.without_keyd = True
        path, parent = generation.configuration.keyd.socket, generation.parent
        pause = self._reliability[path].is_lost(self._clock())

        def again() -> None:
            # Another parent is connected when it is started.
            if generation.parent is parent:
                self.connect(generation)

        self._loop.after(pause, again)

    def use_after_all(self, generation: Generation) -> None:
        """Use a keyd that was held back: the reload brought no certificates for its new keys."""
        if generation.keyd_held:
            generation.keyd_held = False
            self.connect(generation)

    def waits_for(self) -> str:
        """The keyd that new clients wait for, and why it is not there; "" if they do not wait."""
        serving = self._generations.serving
        path = serving.configuration.keyd.socket
        if path is None or not serving.without_keyd:
            return ""
        return f"keyd at {path}" + (f": {serving.keyd_missed}" if serving.keyd_missed else "")

    def _introduced(self, generation: Generation, control: socket.socket, keys: set[str]) -> bool:
        """Act on which keys a keyd has said that it has, by short ids.

        Returns False to connect to it anew.
        """
        path, parent = generation.configuration.keyd.socket, generation.parent
        before, generation.keyds_keys = generation.keyds_keys, keys
        digits = 2 * SHORT_ID_OCTETS
        missing = {key for key in generation.key_ids if key[:digits] not in keys}
        awaited = self._takeover.awaited if self._takeover.awaits(generation) else None
        if missing and awaited is not None and not awaited.patient:
            self._takeover.abandon(generation, _lacks(generation, missing))
            return True
        if missing and before not in (None, keys):
            # There may be certificates for the new keys already. New clients wait until those
            # serve: no client must get a certificate whose key is gone.
            generation.keyd_held = True
            if generation is self._generations.serving:
                self._reload_for_keys()
            return True
        for one in missing:
            self._event(
                "keyd_lacks_key",
                level="error",
                socket=str(path),
                key=one,
                certificate=_certificates(generation, {one}),
            )
        if parent is None:
            return True
        try:
            self._children.order(parent, {"do": "use keyd"}, [control.fileno()])
        except OSError:
            return False
        self._event("keyd_connected", socket=str(path), generation=generation.number)
        self._reliability[path].is_connected(self._clock())
        generation.without_keyd = generation.waits_for_keyd = False
        generation.keyd_missed = ""
        if generation.ready:
            self._takeover.ready(generation)
        if before not in (None, keys) and generation is self._generations.serving:
            self._reload_for_keys()
        return True

    def _is_of_no_use(self, generation: Generation) -> bool:
        return bool(self._service.stops) or generation.retired or generation.parent is None

    def _again(self, generation: Generation, path: Path, reason: str, pause: float) -> None:
        before = generation.keyd_missed
        if reason != before and not (generation.retired or generation.parent is None):
            generation.keyd_missed = reason
            if not before:
                self._event("keyd_unreachable", level="error", socket=str(path), reason=reason)
            self._service.tell_status()
            if reason.startswith(_NOT_UNDERSTOOD):
                self._not_understood()
        longer = min(2 * pause, _MAX_PAUSE_SECONDS)
        self._loop.after(pause, lambda: self.connect(generation, longer))


def _lacks(generation: Generation, missing: set[str]) -> str:
    """Why a keyd that is a service cannot serve this generation, and what to do."""
    return (
        f"keyd.socket: the keyd at {generation.configuration.keyd.socket} does not have the key of "
        f"{_certificates(generation, missing)}: have it read its keys again (systemctl restart "
        "titus-keyd)"
    )


def _certificates(generation: Generation, keys: set[str]) -> str:
    """The files with the certificates for these keys: the first few."""
    files = [
        str(credential.certificate)
        for credential, facts in generation.certificates.items()
        if facts.key_id.hex() in keys
    ]
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return ", ".join(files[:_SHOWN]) + more


def _hear_keys(control: socket.socket) -> tuple[set[str] | None, str]:
    """The keys that keyd has, or None; and what to report if it cannot be used."""
    try:
        introduction = control.recv(MAX_KEYS_OCTETS)
        if not introduction:
            return None, "it closed the connection and said nothing"
        keys = Keys.decode(introduction).keys
        return {key.hex() for key in keys}, "its connection could not be passed on"
    except OSError as error:
        return None, error.strerror or str(error)
    except Malformed as error:
        return None, f"{_NOT_UNDERSTOOD}: {error}"
