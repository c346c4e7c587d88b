"""What keyd says of the hosts that it lends keys to: counted by names that are configured."""

from types import SimpleNamespace
from typing import Any

import pytest

from titus_py.supervisor.exposition import exposition
from titus_py.supervisor.lending_events import complete_refusal, since
from titus_py.supervisor.metrics import Metrics

CONFIGURATION: Any = SimpleNamespace(
    keyd=SimpleNamespace(client=[SimpleNamespace(name="a"), SimpleNamespace(name="b")]),
    vhost=[SimpleNamespace(client=[SimpleNamespace(name="a"), SimpleNamespace(name="d")])],
)


def test_what_came_since_is_counted() -> None:
    first = [["a", 1, 5, {"not_lent": 1}], ["b", 0, 0, {}]]
    second = [["a", 1, 7, {"not_lent": 3, "exhausted": 2}], ["b", 0, 1, {}]]
    metrics = Metrics()
    metrics.record("lent", since([], first, CONFIGURATION))
    metrics.record("lent", since(first, second, CONFIGURATION))
    # Another keyd counts from zero.
    metrics.record("lent", since([], [["a", 0, 2, {}]], CONFIGURATION))
    counts = metrics.counts()
    assert counts["lent"] == {"a": 9, "b": 1}
    assert counts["lending_refused"] == {"a not_lent": 3, "a exhausted": 2}
    status = {"lending": [{"client": "a", "streams": 1}]}
    text = exposition(metrics, status).decode()
    for line in (
        'titus_lending_streams{client="a"} 1',
        'titus_lent_operations_total{client="a"} 9',
        'titus_lending_refusals_total{client="a",status="exhausted"} 2',
        # Prometheus sees no rise in a series that begins with its first count.
        'titus_lending_refusals_total{client="a",status="not_tls"} 0',
        'titus_lending_refusals_total{client="other",status="stranger"} 0',
    ):
        assert f"{line}\n" in text


def test_strangers_are_counted_by_the_names_that_virtual_hosts_know() -> None:
    now = [["d", 0, 0, {"stranger": 2}], ["", 0, 0, {"stranger": 1}]]
    assert since([], now, CONFIGURATION)["refused"] == {"d stranger": 2, "other stranger": 1}


def test_a_name_that_no_client_has_is_not_counted() -> None:
    """A keyd that was taken over could have any number of them."""
    assert since([], [["c", 1, 5, {"not_lent": 1}]], CONFIGURATION) == {"done": {}, "refused": {}}


@pytest.mark.parametrize(("status", "level"), [("not_lent", "error"), ("exhausted", "warning")])
def test_how_loud_a_refusal_is(status: str, level: str) -> None:
    event = {"client_name": "", "status": status, "count": 1, "attempted": "sign"}
    complete_refusal(event)
    assert event == {"level": level, "status": status, "count": 1, "attempted": "sign"}
