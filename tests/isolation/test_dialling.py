"""A worker that was taken over asks for a backend again, where it has got none."""

from pathlib import Path

from integration.instance import free_port

from titus_py.between.messages import Dial

from .harness import infected, make_certificate, take_over


def test_a_worker_may_ask_once_also_where_every_backend_is_down(tmp_path: Path) -> None:
    """Each time would be an event in the log, and begin the connection's lifetime anew."""
    nobody = f"127.0.0.1:{free_port()}"
    vhost = {"health": {"every": 1, "fall": 1}}
    certificate = make_certificate(tmp_path)
    with infected(tmp_path, certificate, nobody, vhost=[vhost]) as instance:
        instance.wait_for_event("backend_down", backend=nobody)
        dial = Dial(0, None).encode().hex()
        result = take_over(instance, "h", "burst", "parent", dial, dial)
        assert [event["event"] for event in result.alarms] == ["unexpected_message"]
        number = result.end["connection"]
        told = instance.events_named("backend_unavailable", connection=number)
        assert [event["reason"].partition(":")[0] for event in told] == ["every backend is down"]
