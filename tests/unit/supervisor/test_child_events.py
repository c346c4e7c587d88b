"""What children may say: their own events with their own fields, and nothing else ends well."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.tally import LATENCY_BOUNDS
from titus_py.supervisor.child_events import EVENTS, Unintelligible, decode, fields_of

#: An example of each kind of event, whole.
OPERATIONS = {
    "event": "operations",
    "signed": 3,
    "decrypted": 0,
    "refused": {"not_tls": 1},
    "seconds": [1] * (len(LATENCY_BOUNDS) + 1),
    "seconds_sum": 0.25,
}
OVER = {
    "event": "connection_over",
    "level": "info",
    "connection": 7,
    "client": "192.0.2.1:50000",
    "local": "192.0.2.2:443",
    "vhost": None,
    "seconds": 1.5,
    "worker_seconds": 2,
    "end": "",
    "uid": 2_100_000_000,
}
CLAIM = [
    7,
    0,
    {
        "facts": [["a.example"], [], ["A. Example"], "0f" * 32],
        "links": [["0a" * 32, "1f", "0b" * 32]],
        "complete": True,
    },
]
UP = {
    "event": "backend_up",
    "level": "warning",
    "backend": "192.0.2.9:80",
    "changes": None,
    "check": 0,
    "since": 1_800_000_000.5,
}
SAID = {
    "keyd": [
        {"event": "alive"},
        {"event": "ready", "keys": "0f" * 32, "all_memory_locked": True, "guards": "none"},
        {"event": "keyd_said", "text": "why it ends"},
        {"event": "token_operations", "tokens": {"web": [2, 1, 1]}},
        OPERATIONS,
    ],
    "parent": [
        {"event": "ready", "vhosts": 1, "huge_pages": 4, "huge_pages_of_code": 7},
        {"event": "retired"},
        {"event": "alive", "spares": 4},
        {"event": "limited", "level": "warning", "limit": "full", "count": 1, "last_client": "::1"},
        OVER,
        OVER | {"balancer": "192.0.2.3:40000", "alpn": "h2", "backend": "192.0.2.9:80"},
        {
            "event": "silent_clients",
            "level": "info",
            "end": "client_left",
            "count": 80,
            "last_client": "192.0.2.1",
            "seconds": 0.5,
        },
        UP,
        UP | {"event": "backend_down", "changes": 3, "reason": "connection refused"},
        {"event": "claims", "claims": [CLAIM, [8, 1, None]]},
        {"event": "claims_told", "count": 2},
    ],
}
VALID = [(child, said) for child, events in SAID.items() for said in events]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
CHILDREN = st.sampled_from(sorted(EVENTS))


def said_by(child: str, said: object, has_report: bool = False) -> dict[str, object] | None:
    """What is understood of a message with one event; None if nothing is."""
    octets = said if isinstance(said, bytes) else json.dumps(said).encode()
    try:
        events = decode(child, octets, [3] if has_report else [])
    except Unintelligible:
        return None
    if len(events) != 1:
        return None
    ((name, fields, report),) = events
    assert report == (3 if has_report else None)
    known = fields_of(child, name)
    assert known is not None
    assert fields.keys() <= known.keys()
    return {"event": name, **fields}


@pytest.mark.parametrize(("child", "said"), VALID)
def test_what_they_say_is_understood(child: str, said: dict[str, object]) -> None:
    assert said_by(child, said) == said


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("keyd", {"event": "x", "name": 1}),
        ("keyd", {"event": "connection_begun"}),
        ("keyd", {"event": "keyd_refused", "connection": 1, "of_generation": 2}),
        ("keyd", {"event": "fork_server_died", "level": "alarm", "how": "killed"}),
        ("keyd", {"event": "retired"}),
        ("keyd", {"event": "unintelligible", "level": "alarm"}),
        ("keyd", {"event": "alive", "level": "alarm"}),
        ("keyd", {"event": "keyd_said", "text": "x" * 1001}),
        ("keyd", {"event": "keyd_said", "level": "info", "text": ""}),
        ("keyd", {"event": ["alive"]}),
        ("keyd", {"event": None}),
        ("keyd", OPERATIONS | {"signed": True}),
        ("keyd", OPERATIONS | {"signed": -1}),
        ("keyd", OPERATIONS | {"signed": 2**63}),
        ("keyd", OPERATIONS | {"seconds_sum": float("nan")}),
        ("keyd", OPERATIONS | {"seconds_sum": float("inf")}),
        ("keyd", OPERATIONS | {"seconds_sum": 10**400}),
        ("keyd", OPERATIONS | {"seconds": []}),
        ("keyd", OPERATIONS | {"refused": {"A=1 B": 1}}),
        ("keyd", OPERATIONS | {"refused": {f"{'x' * n}": 1 for n in range(1, 40)}}),
        ("keyd", {"event": "ready", "keys": "0f", "all_memory_locked": True, "guards": ""}),
        ("keyd", {"event": "ready", "keys": None, "all_memory_locked": True, "guards": ""}),
        ("parent", OPERATIONS),
        ("parent", OVER | {"level": []}),
        ("parent", OVER | {"level": "emergency"}),
        ("parent", OVER | {"connection": []}),
        ("parent", OVER | {"connection": None}),
        ("parent", OVER | {"client": "x" * 1001}),
        ("parent", OVER | {"server_name": "forged.example"}),
        ("parent", {key: value for key, value in OVER.items() if key != "end"}),
        ("parent", UP | {"check": -1}),
        ("parent", UP | {"since": "now"}),
        ("parent", {"event": "claims", "claims": [CLAIM[:2]]}),
        ("parent", {"event": "claims", "claims": [[7, 0, CLAIM[2] | {"more": 1}]]}),
        # More than a worker can have told the parent.
        (
            "parent",
            {"event": "claims", "claims": [[7, 0, CLAIM[2] | {"links": CLAIM[2]["links"] * 9}]]},
        ),
        (
            "parent",
            {
                "event": "claims",
                "claims": [[7, 0, CLAIM[2] | {"facts": [[""] * 8193, [], [], "0f" * 32]}]],
            },
        ),
        (
            "parent",
            {"event": "claims", "claims": [[7, 0, CLAIM[2] | {"links": [["0a", "1", ""]]}]]},
        ),
        (
            "parent",
            {"event": "claims", "claims": [[7, 0, CLAIM[2] | {"facts": [[], [], [[]], ""]}]]},
        ),
        ("parent", b"[" * 60_000),
        ("parent", b'{"event": "alive", "spares": ' + b"9" * 5000 + b"}"),
        ("parent", json.dumps(OVER).encode()[:-1]),
        ("parent", b"\xff"),
        ("parent", b"[]"),
        ("parent", b"null"),
    ],
)
def test_what_is_not_theirs_to_say_is_not(child: str, said: object) -> None:
    assert said_by(child, said) is None


@pytest.mark.parametrize(
    "text",
    [b"a\\ud800b", b"a\\uDfFfb", b"a\xed\xa0\x80b", b"a\\ud83d\\ude00b\\udc00\\ud800"],
)
def test_what_is_said_can_be_written_down(text: bytes) -> None:
    """Halves of surrogate pairs are no characters. UTF-8 has none, and pydantic raises for them."""
    said = b'{"event": "keyd_said", "text": "%s"}' % text
    ((_, fields, _),) = decode("keyd", said, [])
    assert fields["text"].encode().startswith(b"a")
    assert "?" in fields["text"]
    assert ("\N{GRINNING FACE}" in fields["text"]) == (b"ude00" in text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_nothing_is_understood_in_another_encoding(encoding: str) -> None:
    """They have halves of surrogate pairs without an escape, and may be ASCII alone."""
    said = '{"event": "keyd_said", "text": "a\ud800b"}'.encode(encoding, "surrogatepass")
    with pytest.raises(Unintelligible, match="no JSON"):
        decode("keyd", said, [])


def test_a_descriptor_comes_with_a_report_alone() -> None:
    assert said_by("parent", OVER, has_report=True) == OVER
    assert said_by("parent", {"event": "retired"}, has_report=True) is None
    assert said_by("keyd", {"event": "alive"}, has_report=True) is None


def test_the_parent_may_say_several_events_at_once() -> None:
    """Each report is that of the next connection which had a worker; the last may be missing."""
    silent = {key: value for key, value in OVER.items() if key != "uid"}
    said = [{"event": "alive", "spares": 4}, OVER, silent, OVER | {"connection": 8}]
    for descriptors, expected in (
        ([], [None, None, None, None]),
        ([5], [None, 5, None, None]),
        ([5, 6], [None, 5, None, 6]),
    ):
        events = decode("parent", json.dumps(said).encode(), descriptors)
        assert [{"event": name, **fields} for name, fields, _ in events] == said
        assert [report for _, _, report in events] == expected


@pytest.mark.parametrize(
    ("child", "said", "descriptors"),
    [
        ("parent", [OVER], [5, 6]),
        ("parent", [{"event": "retired"}, OVER | {"uid": None}], [5]),
        ("parent", [OVER, OVER | {"level": "emergency"}], []),
        ("parent", [OVER, OPERATIONS], []),
        ("parent", [OVER, [OVER]], []),
        ("parent", [OVER, 1], []),
        ("parent", [{"event": "retired"}] * 101, []),
        ("keyd", [{"event": "alive"}], []),
        ("keyd", [{"event": "alive"}] * 2, []),
    ],
)
def test_nothing_is_understood_where_not_all_is(
    child: str, said: list[object], descriptors: list[int]
) -> None:
    with pytest.raises(Unintelligible):
        decode(child, json.dumps(said).encode(), descriptors)


@given(st.data(), st.lists(st.sampled_from(VALID), min_size=1, max_size=5), ANYTHING)
def test_one_event_that_is_changed_is_as_good_or_none_is_understood(
    data: st.DataObject, several: list[tuple[str, dict[str, object]]], value: object
) -> None:
    events = [said for child, said in several if child == "parent"]
    position = data.draw(st.integers(0, len(events)))
    said = [*events[:position], value, *events[position:]]
    with suppress(Unintelligible):
        decoded = decode("parent", json.dumps(said).encode(), [])
        # Compared as JSON: NaN is not equal to itself.
        heard = [{"event": name, **fields} for name, fields, _ in decoded]
        assert [json.dumps(one, sort_keys=True) for one in heard] == [
            json.dumps(one, sort_keys=True) for one in said
        ]


@given(CHILDREN, st.binary(max_size=300))
def test_any_octets_are_an_event_or_unintelligible(child: str, octets: bytes) -> None:
    said_by(child, octets)


@given(st.data(), CHILDREN)
def test_any_fields_are_an_event_or_unintelligible(data: st.DataObject, child: str) -> None:
    names = sorted({name for events in EVENTS.values() for name in events})
    name = data.draw(st.sampled_from(names) | ANYTHING)
    known = sorted(EVENTS[child].get(name, {}) if isinstance(name, str) else ())
    keys = st.text(max_size=8) | (st.sampled_from(known) if known else st.nothing())
    event = data.draw(st.dictionaries(keys, ANYTHING, max_size=12)) | {"event": name}
    said_by(child, event, data.draw(st.booleans()))


@given(st.data(), st.sampled_from(VALID), ANYTHING)
def test_one_field_that_is_changed_is_as_good_or_unintelligible(
    data: st.DataObject, valid: tuple[str, dict[str, object]], value: object
) -> None:
    child, said = valid
    key = data.draw(st.sampled_from(sorted(said)) | st.text(max_size=8))
    changed = said | {key: value}
    # Compared as JSON: NaN is not equal to itself.
    assert json.dumps(said_by(child, changed)) in ("null", json.dumps(changed))
