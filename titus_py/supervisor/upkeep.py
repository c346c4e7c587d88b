"""Acts on what children report, and on their ends. Run by the supervisor."""

import time
from collections.abc import Callable
from typing import Any

from keyd.protocol import fingerprint
from keyd.token import messages
from keyd.upstream.state import CONNECTING, ORPHANED, READY, UpstreamState
from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import State
from titus_py.supervisor.announced_audits import AnnouncedAudits
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.child import Child
from titus_py.supervisor.child_events import Unintelligible
from titus_py.supervisor.cut import CLAIMS, Cut
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.keyd_service import KeydService
from titus_py.supervisor.lending_events import complete_refusal, since
from titus_py.supervisor.record import Event
from titus_py.supervisor.repeated_events import RepeatedEvents
from titus_py.supervisor.service import Service
from titus_py.supervisor.starting import Starting
from titus_py.supervisor.takeover import Takeover

__all__ = ["Upkeep"]

#: How soon to start keyd again. Its end may mean that its parent has ended.
_RETRY_SECONDS = 0.05
_STATES = frozenset({"backend_down", "backend_up"})
_ENDS = frozenset({"connection_ended", "handshake_failed", "tunnel_failed"})


class Upkeep:
    """``reload_for_keys`` asks for a reload because keyd's keys have changed. ``lost`` has a lost
    process started again, by what it is given or by another program. ``renew`` replaces a
    generation whose fork server has ended. ``worker_ended`` is told how each worker ended that had
    a client, in the generation that serves; and ``keyd_crippled`` if its keyd has lost a process
    that it cannot start again.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        repeated: RepeatedEvents,
        service: Service,
        generations: Generations,
        takeover: Takeover,
        starting: Starting,
        keyd_service: KeydService,
        audits: AnnouncedAudits,
        backends: Backends,
        cut: Cut,
        reload_for_keys: Callable[[], None],
        lost: Callable[[str, Callable[[], None]], None],
        renew: Callable[[Generation], None],
        worker_ended: Callable[[str, int], None],
        keyd_crippled: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._event = event
        self._repeated = repeated
        self._service = service
        self._generations = generations
        self._takeover = takeover
        self._starting = starting
        self._keyd_service = keyd_service
        self._audits = audits
        self._backends = backends
        self._cut = cut
        self._reload_for_keys = reload_for_keys
        self._lost = lost
        self._renew = renew
        self._worker_ended = worker_ended
        self._keyd_crippled = keyd_crippled

    def heard(self, generation: Generation, child: Child, name: str, event: dict[str, Any]) -> None:
        """Record a child's event, act on it, and keep track of the live connections.

        Raises Unintelligible for one that is about what this generation does not have.
        """
        if event.get("tunnel") is not None:
            event["tunnel"] = _tunnel_name(generation, event["tunnel"])
        named = event.get("client_name")
        is_known = named is None or named in generation.client_names
        if child is generation.parent and not is_known:
            # Counts by name are kept for as long as this process runs, and shown.
            raise Unintelligible("a client that the configuration does not name")
        if name == "ready":
            self._started(generation, child, event)
            return
        if name in CLAIMS:
            self._cut.heard(generation, name, event)
            return
        if name == "alive":
            generation.spares = event.get("spares", generation.spares)
            generation.stay = event.get("stay", generation.stay) or 0
        elif name == "retired":
            generation.retiring = False
            self._takeover.check_handed_over()
        elif name == "connection_begun":
            generation.connections[event["connection"]] = event
            if len(generation.connections) > generation.uids_needed:
                # More than there can be: the ends of the first ones were lost.
                del generation.connections[next(iter(generation.connections))]
        elif name == "client_known":
            if (begun := generation.connections.get(event["connection"])) is not None:
                begun["client_name"] = event["client_name"]
            return
        elif name in _ENDS and event.get("uid") is not None:
            generation.ended.append(generation.connections.pop(event["connection"], {}))
            if generation is self._generations.serving:
                self._worker_ended(event.get("how") or event["end"], generation.number)
        elif name == "keyd_refused" and self._audits.expect(event.get("connection")):
            name, event["level"] = "audit_refused", "info"
        elif name == "keyd_refused":
            _complete_refusal(generation, event)
            self._repeated.refused(name, generation.number, event)
            return
        elif name == "keyd_lost" and generation.configuration.keyd.socket is not None:
            self._keyd_service.lost(generation)
        elif name == "keyd_said":
            if not self._repeated.keyd_may_say_more(generation.number):
                return
            event["level"] = "error"
        elif name == "tokens":
            self._tell_tokens(generation, event["tokens"])
            return
        elif name == "upstreams":
            self._tell_upstreams(generation, event["upstreams"])
            return
        elif name == "lent":
            before, generation.lent = generation.lent, event["clients"]
            event = since(before, generation.lent, generation.configuration)
        elif name == "lending_refused":
            if not self._repeated.keyd_may_say_more(generation.number):
                return
            complete_refusal(event)
        elif name in _STATES:
            if event["check"] >= len(generation.checks):
                raise Unintelligible(f"{name} of an unknown check")
            state = State(name == "backend_up", event.pop("since"), event.get("reason") or "")
            check = generation.checks[event.pop("check")]
            if not generation.retired:
                # The parent of one that is retired checks no more, and may tell late what it found.
                self._backends.checked(check, state)
        if event.get("tunnel") is not None:
            self._repeated.of_tunnel(name, generation.number, event)
            return
        self._event(name, generation.number, **event)
        if name == "keyd_incomprehensible" and generation.keyd is not None:
            generation.keyd.kill()
        if name == "fork_server_died" and not generation.crippled:
            generation.crippled = True
            # Not now: this may end everything, and the child is still being heard.
            self._loop.after(0, lambda: self._fork_server_died(generation))

    def _tell_tokens(self, generation: Generation, tokens: list[list[str]]) -> None:
        """Log which tokens have another state than before, and keep it for the status."""
        before, generation.tokens = generation.tokens, [(name, state) for name, state in tokens]
        if any(state == messages.ORPHANED for _, state in generation.tokens):
            self._crippled(generation)
        for token, state in generation.tokens:
            if (token, state) in before or not self._repeated.keyd_may_say_more(generation.number):
                continue
            if state == "ready":
                self._event("token_ready", generation.number, token=token)
            else:
                self._event(
                    "token_unusable", generation.number, level="error", token=token, reason=state
                )

    def _tell_upstreams(self, generation: Generation, said: list[list[Any]]) -> None:
        """The same of upstreams, but for one that has only just been lost."""
        before = {one.upstream: one.state for one in generation.upstreams}
        generation.upstreams = [UpstreamState(*one) for one in said]
        if any(one.state == ORPHANED for one in generation.upstreams):
            self._crippled(generation)
        for upstream, state, *_ in generation.upstreams:
            if state == before.get(upstream) or not self._repeated.keyd_may_say_more(
                generation.number
            ):
                continue
            if state == READY:
                self._event("upstream_ready", generation.number, upstream=upstream)
            elif state != CONNECTING:
                self._event(
                    "upstream_unusable",
                    generation.number,
                    level="error",
                    upstream=upstream,
                    reason=state,
                )

    def _crippled(self, generation: Generation) -> None:
        """Its keyd has lost a process that it cannot start again."""
        if generation is self._generations.serving:
            self._keyd_crippled(generation.number)

    def _started(self, generation: Generation, child: Child, event: dict[str, Any]) -> None:
        if child.patience is not None:
            child.patience.cancel()
        child.ready = time.monotonic()
        if child is generation.keyd:
            generation.lent = []
        else:
            generation.huge_pages = event.get("huge_pages")
            generation.huge_pages_of_code = event.get("huge_pages_of_code")
        keys = event.pop("keys", None)
        self._event(
            f"{child.name}_started",
            generation.number,
            pid=child.pid,
            generation=generation.number,
            **event,
        )
        if keys is not None:
            expected = fingerprint(map(bytes.fromhex, generation.key_ids))
            generation.lacks_keys = keys != expected
            if generation.lacks_keys and self._takeover.awaits_same_keys(generation):
                # Nobody has asked for others. The generation before still has its own.
                reason = "the key files have changed since the last reload: run titus-py reload"
                self._loop.after(0, lambda: self._takeover.abandon_awaited(generation, reason))
                return
            if generation.lacks_keys:
                self._reload_for_keys()
        generation.starting.discard(child)
        if generation.ready:
            self._takeover.ready(generation)

    def ended(self, generation: Generation, child: Child) -> None:
        """Act on a child's end, whether or not it was told to end."""
        how = self._takeover.let_go(generation, child)
        if generation.parent is None:
            self._cut.gone(generation)
        stops = self._service.stops
        # keyd exits when its parent has ended. The parent's end is about to be heard.
        hung_up = child.name == "keyd" and how == "exited with 0"
        if not (stops or generation.retired or hung_up) or how != "exited with 0":
            self._event(
                f"{child.name}_died",
                level="alarm",
                pid=child.pid,
                generation=generation.number,
                how=how,
            )
        if stops:
            if not self._generations.parents:
                self._service.end(0)
        elif generation.retired:
            if generation.parent is None:
                self._takeover.end(generation)
                self._takeover.check_handed_over()
        elif self._takeover.awaits(generation):
            self._takeover.abandon(generation)
        elif hung_up:
            self._loop.after(_RETRY_SECONDS, lambda: self._start_keyd_again(generation))
        else:
            self._restart(generation, child, how)

    def _restart(self, generation: Generation, child: Child, how: str) -> None:
        if child.name == "keyd":
            pause = self._starting.pause_before_keyd(generation, child)
            if pause is not None:
                self._loop.after(pause, lambda: self._start_keyd_again(generation))
                return
        self._starting.fail(f"{child.name} {how}", child.served)
        if self._service.exit_code is not None:
            return
        if child.name == "keyd":
            self._start_keyd_again(generation)
            return
        # A new parent starts with a new keyd.
        for keyd in generation.children:
            keyd.kill()
            self._takeover.let_go(generation, keyd)
        self._lost("parent", lambda: self._starting.start(generation))

    def _start_keyd_again(self, generation: Generation) -> None:
        if generation.parent is None:
            return
        if generation.understands_keyd:
            self._lost("keyd", lambda: self._starting.start_keyd_again(generation))
        else:
            # Its parent is of a program before. As without a fork server: what it has goes on, and
            # another generation follows.
            generation.crippled = True
            self._renew(generation)

    def _fork_server_died(self, generation: Generation) -> None:
        if generation.crippled and not generation.retired and not self._service.stops:
            parent = generation.parent
            self._starting.fail("the fork server died", 0.0 if parent is None else parent.served)
            if self._service.exit_code is None:
                self._renew(generation)


def _tunnel_name(generation: Generation, number: int) -> str:
    """A tunnel is known by where it listens. Raises Unintelligible."""
    tunnels = generation.configuration.tunnel
    if number >= len(tunnels):
        raise Unintelligible("an unknown tunnel")
    return str(tunnels[number].listen)


def _complete_refusal(generation: Generation, event: dict[str, Any]) -> None:
    """Add whose request it was, even if the worker ended before keyd answered."""
    connection = event["connection"]
    for begun in (generation.connections.get(connection, {}), *reversed(generation.ended)):
        if begun.get("connection") == connection:
            # A supervisor of the program before may have left one without a uid.
            event |= {"client": begun["client"], "uid": begun.get("uid")}
            return
