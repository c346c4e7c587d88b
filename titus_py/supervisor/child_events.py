"""What children may say, and how it has to look: decodes their events as strictly as messages.

Run by the supervisor, which is root. keyd has no privilege, and hears workers; the parent hears
workers, too. An attacker who controls one of them must neither end the supervisor nor have it log
what is another process's to say. So each child has its own events; each event has its own fields,
with types and bounds; and everything else is refused. The parent may say several in one message.

A field that is new, or left out, is a change of the version in ``succession``: a supervisor hears
children of the program before. Where nobody needs to know, it is optional. That one has started is
heard also without the rest: the files may be another version's by then.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from keyd.tally import LATENCY_BOUNDS
from keyd.upstream.messages import MAX_BORROWERS, MAX_STRANGERS
from keyd.upstream.state import UpstreamState
from titus_py.between.client_identity import MAX_LINKS, MAX_NAMES_OCTETS
from titus_py.configuration.upstream_table import MOST_UPSTREAMS
from titus_py.parent.outbox import MAX_EVENTS, TEXT_CHARACTERS
from titus_py.supervisor.events import LEVELS

__all__ = ["EVENTS", "Said", "Unintelligible", "decode", "fields_of"]

#: An unsigned number of 63 bits: also a signed one for whoever reads the log.
_MOST = (1 << 63) - 1
#: Durations are below three thousand years.
_MOST_SECONDS = 1e11
_MOST_REFUSALS = 32
_MOST_TOKENS = 64
#: Of a certificate: DNS names, URIs, common names.
_KINDS_OF_NAMES = 3


class Unintelligible(ValueError):
    """Not an event of this child's; the text says what is wrong with it."""


class _Field(NamedTuple):
    fits: Callable[[object], bool]
    #: Whether it may be left out, or null.
    optional: bool = False


def _is_count(value: object) -> bool:
    # Not a bool, which is an int as well.
    return type(value) is int and 0 <= value <= _MOST


def _is_seconds(value: object) -> bool:
    # Neither NaN nor infinity is. An integer may be too large for a float, but not to be compared.
    return (type(value) is int or type(value) is float) and 0 <= value <= _MOST_SECONDS


def _is_counts_by_word(value: object) -> bool:
    """For keyd's refusals, by status."""
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_REFUSALS
        and all(re.fullmatch("[a-z_]{1,40}", key) for key in value)
        and all(map(_is_count, value.values()))
    )


def _is_counts(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(LATENCY_BOUNDS) + 1
        and all(map(_is_count, value))
    )


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_claims(value: object) -> bool:
    """Connections, each with its virtual host and what its client has shown (``Identity``)."""
    return isinstance(value, list) and all(
        isinstance(claim, list)
        and len(claim) == 3
        and _is_count(claim[0])
        and _is_count(claim[1])
        and (claim[2] is None or _is_identity(claim[2]))
        for claim in value
    )


def _is_identity(value: object) -> bool:
    match value:
        case {"facts": [*names, str(spki)], "links": [*links], "complete": bool(), **others}:
            return (
                not others
                and len(names) == _KINDS_OF_NAMES
                and all(isinstance(some, list) for some in names)
                and all(isinstance(name, str) for some in names for name in some)
                # Each has more octets before it there than one, and has no fewer than characters.
                and sum(len(name) + 1 for some in names for name in some) <= MAX_NAMES_OCTETS
                and _is_fingerprint(spki)
                and len(links) <= MAX_LINKS
                and all(map(_is_link, links))
            )
    return False


def _is_link(value: object) -> bool:
    match value:
        case [str(issuer), str(serial), str(spki)]:
            hexadecimal = re.fullmatch("[0-9a-f]{1,40}", serial) is not None
            return _is_fingerprint(issuer) and hexadecimal and _is_fingerprint(spki)
    return False


def _is_tokens(value: object) -> bool:
    """Tokens, each with its name and its state."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_TOKENS
        and all(isinstance(one, list) and len(one) == 2 for one in value)
        and all(map(_is_text, itertools.chain.from_iterable(value)))
    )


def _is_upstreams(value: object) -> bool:
    """Each an ``UpstreamState``."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_UPSTREAMS
        and all(isinstance(one, list) and len(one) == len(UpstreamState._fields) for one in value)
        and all(_is_text(text) for one in value for text in one[:2])
        and all(_is_count(count) for one in value for count in one[2:])
    )


def _is_token_operations(value: object) -> bool:
    """By a token's name: signatures, failures and logins."""
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_TOKENS
        and all(map(_is_text, value))
        and all(
            isinstance(counts, list) and len(counts) == 3 and all(map(_is_count, counts))
            for counts in value.values()
        )
    )


def _is_lent(value: object) -> bool:
    """Clients, each with its name, its streams, and what was done for it and refused."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_BORROWERS + MAX_STRANGERS + 1
        and all(isinstance(one, list) and len(one) == 4 for one in value)
        and all(
            _is_text(name)
            and _is_count(streams)
            and _is_count(done)
            and _is_counts_by_word(refused)
            for name, streams, done, refused in value
        )
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= TEXT_CHARACTERS


_COUNT, _SECONDS = _Field(_is_count), _Field(_is_seconds)
_TEXT = _Field(_is_text)
_FLAG = _Field(lambda value: isinstance(value, bool))
_LEVEL = _Field(lambda value: isinstance(value, str) and value in LEVELS)


_CLAIMS = _Field(_is_claims)


def _optional(field: _Field) -> _Field:
    return field._replace(optional=True)


#: What a worker attempted. It may have had no client yet.
_ATTEMPT = {
    "level": _LEVEL,
    "connection": _optional(_COUNT),
    "client": _optional(_TEXT),
    "uid": _COUNT,
    "attempted": _TEXT,
}

#: What a health check has found: of the plan's check of this number.
_CHECKED = {
    "level": _LEVEL,
    "backend": _TEXT,
    "changes": _optional(_COUNT),
    "check": _COUNT,
    "since": _SECONDS,
}

#: By child, the names of its events, and by name their fields.
EVENTS: Mapping[str, Mapping[str, Mapping[str, _Field]]] = {
    "keyd": {
        "ready": {
            "keys": _Field(_is_fingerprint),
            "all_memory_locked": _optional(_FLAG),
            "guards": _optional(_TEXT),
        },
        "alive": {},
        "keyd_said": {"text": _TEXT},
        "tokens": {"tokens": _Field(_is_tokens)},
        "upstreams": {"upstreams": _Field(_is_upstreams)},
        "token_operations": {"tokens": _Field(_is_token_operations)},
        "lent": {"clients": _Field(_is_lent)},
        "lending_refused": {
            "client_name": _TEXT,
            "status": _TEXT,
            "count": _COUNT,
            "attempted": _TEXT,
        },
        "operations": {
            "signed": _COUNT,
            "decrypted": _COUNT,
            "refused": _Field(_is_counts_by_word),
            "seconds": _Field(_is_counts),
            "seconds_sum": _SECONDS,
        },
    },
    "parent": {
        "ready": {
            "vhosts": _optional(_COUNT),
            "huge_pages": _optional(_COUNT),
            "huge_pages_of_code": _optional(_COUNT),
        },
        "alive": {"spares": _COUNT, "stay": _optional(_COUNT)},
        "retired": {},
        "not_available": {"level": _LEVEL, "feature": _TEXT},
        "events_lost": {"level": _LEVEL, "count": _COUNT},
        # Clients.
        "connection_begun": {
            "connection": _COUNT,
            "client": _TEXT,
            "local": _TEXT,
            "balancer": _optional(_TEXT),
            "tunnel": _optional(_COUNT),
            "uid": _COUNT,
        },
        "client_known": {"connection": _COUNT, "client_name": _TEXT},
        "connection_over": {
            "level": _LEVEL,
            "connection": _COUNT,
            "client": _TEXT,
            "local": _TEXT,
            "balancer": _optional(_TEXT),
            "vhost": _optional(_COUNT),
            "tunnel": _optional(_COUNT),
            "alpn": _optional(_TEXT),
            "backend": _optional(_TEXT),
            "source": _optional(_TEXT),
            "client_name": _optional(_TEXT),
            "seconds": _SECONDS,
            "worker_seconds": _optional(_SECONDS),
            "end": _TEXT,
            # Where it was to be killed for that, and ended otherwise before it was.
            "how": _optional(_TEXT),
            # Of one without a worker; others have it in their report.
            "detail": _optional(_TEXT),
            "unfinished": _optional(_FLAG),
            # Nobody's who had no worker.
            "uid": _optional(_COUNT),
        },
        "silent_clients": {
            "level": _LEVEL,
            "end": _TEXT,
            "count": _COUNT,
            "last_client": _TEXT,
            "seconds": _SECONDS,
        },
        "signed_unfinished": {"connection": _COUNT, "client": _TEXT, "local": _TEXT},
        "accept_failed": {"level": _LEVEL, "reason": _optional(_TEXT)},
        "backend_unavailable": {
            "level": _LEVEL,
            "connection": _COUNT,
            "backend": _TEXT,
            "reason": _TEXT,
        },
        "backend_up": _CHECKED,
        "backend_down": _CHECKED | {"reason": _TEXT},
        # An earlier program's parent does not say to which cut that is an answer.
        "claims": {"claims": _CLAIMS, "asked": _optional(_COUNT)},
        "claims_told": {"count": _COUNT, "asked": _optional(_COUNT)},
        "full": {"level": _LEVEL, "max": _COUNT},
        "not_full": {"level": _LEVEL, "max": _COUNT},
        "limited": {
            "level": _LEVEL,
            "limit": _TEXT,
            "client_name": _optional(_TEXT),
            "count": _COUNT,
            "last_client": _optional(_TEXT),
            "advice": _optional(_TEXT),
        },
        # Workers and their fork server.
        "malformed_message": _ATTEMPT,
        "unexpected_message": _ATTEMPT,
        "worker_failed": {"level": _LEVEL, "uid": _COUNT, "how": _TEXT, "why": _TEXT},
        "worker_stays": {
            "level": _LEVEL,
            "uid": _COUNT,
            "connection": _optional(_COUNT),
            "why": _TEXT,
        },
        "fork_failed": {"level": _LEVEL, "reason": _TEXT},
        "fork_works_again": {"level": _LEVEL},
        "fork_server_died": {"level": _LEVEL, "how": _TEXT},
        # keyd, as the parent hears it.
        "keyd_refused": _ATTEMPT
        | {"connection": _COUNT, "uid": _optional(_COUNT), "status": _TEXT},
        "keyd_lost": {"level": _LEVEL},
        "keyd_incomprehensible": {"level": _LEVEL, "reason": _TEXT},
    },
}
#: What comes with the descriptor of a worker's report, unless there was no worker (and so no uid);
#: nothing else comes with one.
_WITH_REPORT = "connection_over"
#: Who may say several events in one message.
_OFTEN = "parent"


class Said(NamedTuple):
    """An event: its name, its fields, and the descriptor of its report, if one has come."""

    name: str
    fields: dict[str, Any]
    report: int | None


def fields_of(child: str, event: str) -> Mapping[str, bool] | None:
    """The fields of an event, and whether each may be left out; None: it is not this child's."""
    fields = EVENTS[child].get(event)
    return None if fields is None else {name: field.optional for name, field in fields.items()}


def decode(child: str, message: bytes, descriptors: Sequence[int]) -> list[Said]:
    """The events of a message, in order; raises Unintelligible if one of them is not well-formed.

    ``descriptors`` came with it: one for each report, but for the last ones if this process had
    none left to receive them.
    """
    try:
        # In no other encoding, which json.loads would find out.
        said = json.loads(message.decode("utf-8", "surrogatepass"))
        if not message.isascii() or b"\\u" in message:
            # A half of a surrogate pair is no character. It could not be left to another program.
            whole = json.dumps(said, ensure_ascii=False).encode(errors="replace")
            said = json.loads(whole)
    except (ValueError, RecursionError):
        # Among others, a message that was too long, and was cut off.
        raise Unintelligible("no JSON") from None
    events = said if child == _OFTEN and isinstance(said, list) else [said]
    if not 0 < len(events) <= MAX_EVENTS:
        raise Unintelligible(f"{len(events)} events at once")
    reports = iter(descriptors)
    decoded = []
    for event in events:
        name = _checked(child, event)
        has_report = name == _WITH_REPORT and event.get("uid") is not None
        decoded.append(Said(name, event, next(reports, None) if has_report else None))
    if next(reports, None) is not None:
        raise Unintelligible(f"{decoded[-1].name} with a descriptor")
    return decoded


def _checked(child: str, event: Any) -> str:
    """Take an event's name off its fields, and return it. Raises Unintelligible."""
    if not isinstance(event, dict):
        raise Unintelligible("no object")
    name = event.pop("event", None)
    fields = EVENTS[child].get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or fields is None:
        raise Unintelligible("an event that is not its own")
    if unknown := event.keys() - fields.keys():
        raise Unintelligible(f"{name} with {len(unknown)} unknown fields")
    for key, field in fields.items():
        value = event.get(key)
        if not (field.optional if value is None else field.fits(value)):
            raise Unintelligible(f"{name} with a bad {key}")
    return name
