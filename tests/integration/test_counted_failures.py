"""What is counted and logged once a second is in the log whatever happens within that second."""

import threading

from titus_py.supervisor.control_client import ask

from .conftest import Serve
from .instance import PATIENCE, Instance, eventually, free_port
from .peers import refusing, resets


def _failing_tunnel(connect: str) -> tuple[dict[str, object], int]:
    port = free_port()
    verified = {"ca": "system", "server_name": "db.example.test"}
    return {"listen": f"127.0.0.1:{port}", "connect": connect, **verified}, port


def _logged(instance: Instance) -> int:
    return sum(event.get("count", 1) for event in instance.events_named("tunnel_failed"))


def _counted(instance: Instance) -> int:
    failures = ask(instance.pid, {"do": "status"}, PATIENCE)["counts"]["tunnel_failures"]
    return int(sum(failures.values()))


def test_when_it_is_stopped(serve: Serve) -> None:
    with refusing() as nobody:
        table, port = _failing_tunnel(nobody)
        instance = serve(listen=[], vhost=[], tunnel=[table])
        for _ in range(20):
            assert resets(port)
        assert instance.terminate() == 0
    assert _logged(instance) == 20


def test_when_another_program_takes_over(serve: Serve) -> None:
    with refusing() as nobody:
        table, port = _failing_tunnel(nobody)
        instance = serve(listen=[], vhost=[], tunnel=[table])
        done = threading.Event()

        def fail_again_and_again() -> None:
            while not done.is_set():
                resets(port)

        comer = threading.Thread(target=fail_again_and_again)
        comer.start()
        try:
            answer = ask(instance.pid, {"do": "reload program"}, PATIENCE)
        finally:
            done.set()
            comer.join()
        assert answer["reloaded"] is True
        eventually(lambda: _logged(instance) == _counted(instance), "a line for every failure")
    assert _logged(instance) > 20
