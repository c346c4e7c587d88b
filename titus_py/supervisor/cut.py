"""Ends connections whose clients a reload no longer allows: ``titus-py reload --cut``.

Run by the supervisor, once the new configuration serves. The parents of earlier generations say
who their clients are, as workers have claimed. A thread judges them by the new configuration, and
a child looks into the lists of revoked certificates. What is not about who a client is, such as
a certificate that has expired since, ends no connection.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

from titus_py.between.client_allow import Facts, allows
from titus_py.between.client_identity import ClientTerms, Identity
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.known_client import KnownClient, which
from titus_py.configuration import VirtualHost
from titus_py.configuration.client_certificates import client_terms
from titus_py.configuration.helper import CLIENT_AUTHORITIES, Helper, Unanswered
from titus_py.supervisor.child_events import Unintelligible
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.record import Event
from titus_py.supervisor.tunnel_cut import stricter_tunnels

__all__ = ["CLAIMS", "Cut"]

#: The parents' events that are for this.
CLAIMS = frozenset({"claims", "claims_told"})
#: How long parents may take to say who their clients are.
_CLAIMS_SECONDS = 15.0
#: How long looking into the lists of revoked certificates may take.
_LISTS_SECONDS = 60.0
#: How many connections, virtual hosts or tunnels an order names: so there is room for it in a
#: socket's buffer, however small that is (net.core.wmem_default).
_ORDER_NUMBERS = 200


class _Rules(NamedTuple):
    """What the new configuration asks of a virtual host's clients."""

    terms: ClientTerms
    #: The public keys of the authorities, in hexadecimal.
    keys: frozenset[str]
    #: Where its clients' connections go, by the configuration before and by the new one; None where
    #: that is the same, or the new one knows no clients one by one.
    reach: "tuple[_Reach, _Reach] | None" = None


class _Reach(NamedTuple):
    """Which backends the clients of a virtual host may reach."""

    known: tuple[KnownClient, ...]
    others: frozenset[str]

    @classmethod
    def at(cls, vhost: VirtualHost) -> "_Reach":
        others = {*vhost.backend, *chain.from_iterable(vhost.backends.values())}
        known = tuple(client.plan for client in vhost.client)
        return cls(known, frozenset(map(str, others)))

    def of(self, facts: Facts) -> frozenset[str]:
        index = which(self.known, facts)
        own = () if index is None else self.known[index].backend
        return frozenset(own) or self.others


class _Claim(NamedTuple):
    generation: int
    connection: int
    rules: _Rules | None  #: None: there is no such virtual host any more
    identity: Identity | None


class _Aside(Protocol):
    def __call__(
        self,
        work: Callable[[], tuple[list[_Claim], str]],
        take: Callable[[tuple[list[_Claim], str]], None],
    ) -> None: ...


class Cut:
    def __init__(self, loop: EventLoop, event: Event, children: Children) -> None:
        self._loop = loop
        self._event = event
        self._children = children
        self._rules: dict[int, dict[int, _Rules | None]] = {}
        #: The generations whose parents have not said all yet.
        self._awaited: dict[int, Generation] = {}
        #: When it began: an answer to what was asked before is none to what is asked now.
        self._begun = 0
        #: How many orders each of them has not answered yet.
        self._unanswered: Counter[int] = Counter()
        #: What each has said of its connections, and how many it says that these are.
        self._claims: dict[int, list[_Claim]] = {}
        self._told: Counter[int] = Counter()
        self._asked: dict[int, Generation] = {}
        #: Why not all connections are judged.
        self._problems: list[str] = []
        #: How many connections of tunnels are ended.
        self._of_tunnels = 0
        self._patience: Timer | None = None
        self._aside: _Aside | None = None
        self._done: Callable[[dict[str, object]], None] | None = None

    def begin(
        self,
        generations: Sequence[Generation],
        aside: _Aside,
        done: Callable[[dict[str, object]], None],
    ) -> None:
        """Judge the clients of all generations but the last, which serves.

        ``aside`` calls a function in a thread (``Reload.aside``). ``done`` is called once, with
        what to add to the reload's outcome.
        """
        *earlier, serving = generations
        self._aside, self._done = aside, done
        self._begun = time.monotonic_ns()
        self._unanswered, self._told, self._problems = Counter(), Counter(), []
        self._rules = {one.number: _rules(one, serving) for one in earlier}
        self._asked = {
            one.number: one for one in earlier if one.parent is not None and self._rules[one.number]
        }
        self._of_tunnels = sum(self._cut_tunnels(one, serving) for one in earlier)
        self._awaited = self._asked.copy()
        self._claims = {number: [] for number in self._asked}
        self._patience = self._loop.after(_CLAIMS_SECONDS, self._give_up)
        for one in self._asked.values():
            vhosts = list(self._rules[one.number])
            self._unanswered[one.number] = self._order(
                one, {"do": "claims", "asked": self._begun}, "vhosts", vhosts
            )
        self._judge_if_all_is_told()

    def _cut_tunnels(self, generation: Generation, serving: Generation) -> int:
        """End the connections of tunnels that accept less now; returns how many there were."""
        numbers = stricter_tunnels(generation, serving)
        if not numbers or generation.parent is None:
            return 0
        self._order(generation, {"do": "cut tunnels"}, "tunnels", numbers)
        names = {str(generation.configuration.tunnel[number].listen) for number in numbers}
        return sum(begun.get("tunnel") in names for begun in generation.connections.values())

    def _order(
        self, generation: Generation, order: dict[str, object], what: str, numbers: list[int]
    ) -> int:
        """Give its parent this order for what has these numbers, in pieces; returns how many."""
        if generation.parent is None:
            return 0
        pieces = range(0, len(numbers), _ORDER_NUMBERS)
        for start in pieces:
            some = numbers[start : start + _ORDER_NUMBERS]
            self._children.order(generation.parent, {**order, what: some})
        return len(pieces)

    def heard(self, generation: Generation, name: str, event: dict[str, Any]) -> None:
        """Take what a parent says of its clients; raises Unintelligible."""
        number = generation.number
        late = event.get("asked", self._begun) != self._begun
        if late or number not in self._awaited:
            return
        rules, known = self._rules[number], self._claims[number]
        if name == "claims":
            claims = event["claims"]
            if any(vhost not in rules for _, vhost, _ in claims):
                raise Unintelligible("claims of a virtual host that was not asked about")
            if len(known) + len(claims) > generation.configuration.worker.max:
                # Also where it says so again and again: each is kept until all is told.
                raise Unintelligible("claims of more connections than it can have")
            known += [
                _Claim(number, connection, rules[vhost], claim and Identity.from_claim(claim))
                for connection, vhost, claim in claims
            ]
            return
        self._told[number] += event["count"]
        self._unanswered[number] -= 1
        if self._unanswered[number]:
            return
        if self._told[number] != len(known):
            # Events were lost. What it did say is judged.
            told = f"{self._told[number]} connections, and said who {len(known)} of them are"
            self._problems.append(f"the parent of generation {number} has counted {told}")
        self.gone(generation)

    def gone(self, generation: Generation) -> None:
        """No more is to be expected of this generation's parent."""
        if self._awaited.pop(generation.number, None) is not None:
            self._judge_if_all_is_told()

    def _give_up(self) -> None:
        """Judge those that are known: one parent that hangs is not to save the others' clients."""
        numbers = ", ".join(map(str, self._awaited))
        self._problems.append(
            f"the parents of generations {numbers} did not say which clients they serve"
        )
        self._awaited = {}
        self._judge_if_all_is_told()

    def _judge_if_all_is_told(self) -> None:
        if self._awaited or self._aside is None:
            return
        if self._patience is not None:
            self._patience.cancel()
        claims = list(chain.from_iterable(self._claims.values()))
        self._aside(lambda: _unwanted(claims), lambda found: self._end(*found))

    def _end(self, unwanted: list[_Claim], problem: str) -> None:
        for number, generation in self._asked.items():
            numbers = [claim.connection for claim in unwanted if claim.generation == number]
            self._order(generation, {"do": "cut"}, "connections", numbers)
        count = len(unwanted) + self._of_tunnels
        reason = "; ".join([*self._problems, *([problem] if problem else [])])
        self._asked, self._claims = {}, {}
        done, self._done, self._aside = self._done, None, None
        if done is None:
            return
        if reason:
            self._event("connections_not_cut", level="error", reason=reason, count=count)
            done({"not_cut": reason, "cut": count})
        else:
            self._event("connections_cut", count=count)
            done({"cut": count})


def _rules(earlier: Generation, serving: Generation) -> dict[int, _Rules | None]:
    """For the virtual hosts of an earlier generation whose clients are to be judged: by what.

    A virtual host is the same if it has the same names (or directory), local address and port.
    """
    hosts = {_match(vhost): vhost for vhost in reversed(serving.configuration.vhost)}
    rules: dict[int, _Rules | None] = {}
    for number, before in enumerate(earlier.configuration.vhost):
        now = hosts.get(_match(before))
        authorities = serving.checked.authorities
        terms = client_terms(now, authorities) if now is not None else None
        if now is not None and terms is not None:
            files = now.client_files
            keys = authorities[files].keys if files is not None else ()
            reach = _Reach.at(before), _Reach.at(now)
            changed = bool(now.client) and reach[0] != reach[1]
            rules[number] = _Rules(terms, frozenset(keys), reach if changed else None)
        elif now is None and before.client_certificates is not None:
            rules[number] = None
    return rules


def _match(vhost: VirtualHost) -> tuple[object, ...]:
    return vhost.sni, vhost.certificate_dir, vhost.local_address, vhost.local_port


def _unwanted(claims: Sequence[_Claim]) -> tuple[list[_Claim], str]:
    """The claims of those who are not let in any more, and why that is not all; in a thread."""
    unwanted: list[_Claim] = []
    by_lists: dict[str, list[_Claim]] = {}
    for claim in claims:
        if claim.rules is None or not _lets_in(claim, claim.rules):
            unwanted.append(claim)
        elif claim.rules.terms.revocations:
            by_lists.setdefault(claim.rules.terms.revocations, []).append(claim)
    try:
        for lists, of_them in by_lists.items():
            unwanted += _revoked(lists, of_them)
    except (Unanswered, ValueError) as error:
        return unwanted, f"the lists of revoked certificates could not be read: {error}"
    return unwanted, ""


def _lets_in(claim: _Claim, rules: _Rules) -> bool:
    """Whether the new configuration lets this client in, revoked certificates aside."""
    identity = claim.identity
    if identity is None:
        return not rules.terms.required
    known = not rules.terms.authorities or any(
        link.spki.hex() in rules.keys for link in identity.links
    )
    return (
        identity.complete
        and known
        and allows(rules.terms.allowed, identity.facts)
        and _reaches_as_before(rules, identity.facts)
    )


def _reaches_as_before(rules: _Rules, facts: Facts) -> bool:
    """Whether a client may still reach each backend that its connection can be with."""
    if rules.reach is None:
        return True
    before, now = rules.reach
    return before.of(facts) <= now.of(facts)


def _revoked(lists: str, claims: Sequence[_Claim]) -> list[_Claim]:
    """Those of which a certificate is on these lists. Raises Unanswered, ValueError."""
    certificates = dict.fromkeys(
        (link.issuer.hex(), f"{link.serial:x}")
        for claim in claims
        if claim.identity is not None
        for link in claim.identity.links
    )
    question = {"lists": lists, "certificates": list(certificates)}
    answer = Helper((*CLIENT_AUTHORITIES, "revoked")).ask(question, _LISTS_SECONDS)
    revoked = dict(zip(certificates, json.loads(answer), strict=True))
    return [
        claim
        for claim in claims
        if claim.identity is not None
        and any(revoked[link.issuer.hex(), f"{link.serial:x}"] for link in claim.identity.links)
    ]
