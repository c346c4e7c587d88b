"""A keyd that does not answer is asked again, ever more seldom, and the log says it once."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.keyd_service import KeydService


class Clockless(EventLoop):
    """An event loop that notes what is to be called later."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[tuple[float, Callable[[], None]]] = []

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.later.append((seconds, callback))
        return Timer(callback)


def test_it_is_asked_ever_more_seldom_and_that_is_said_once(tmp_path: Path) -> None:
    loop, said, path = Clockless(), list[dict[str, Any]](), tmp_path / "keyd.sock"
    nothing: Any = None

    def event(name: str, of_generation: int = 0, **fields: Any) -> None:
        said.append({"event": name, **fields})

    service: Any = SimpleNamespace(stops=0, tell_status=lambda: None)
    keyd = KeydService(loop, event, service, *[nothing] * 4)
    generation = cast(
        Generation,
        SimpleNamespace(
            configuration=SimpleNamespace(keyd=SimpleNamespace(socket=path)),
            retired=False,
            parent=object(),
            keyd_missed="",
        ),
    )
    keyd.connect(generation)
    pauses = []
    for _ in range(8):
        ((seconds, again),) = loop.later
        pauses.append(seconds)
        loop.later.clear()
        again()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0]
    assert generation.keyd_missed == "No such file or directory"

    # One that accepts and says nothing: the status names the reason that holds now.
    loop.later.clear()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen()
        keyd.connect(generation)
        ((seconds, lose_patience),) = loop.later
        assert seconds == 15
        lose_patience()
    assert generation.keyd_missed == "it has not said within 15 s which keys it has"
    assert [one["event"] for one in said] == ["keyd_unreachable"]
