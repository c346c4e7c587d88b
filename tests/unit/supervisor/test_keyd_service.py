"""A keyd that does not answer is asked again, ever more seldom, and the log says it once."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from integration.peers import lingering, nobody_waits_for
from integration.watches import without_watches

from keyd.protocol import Keys
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
    keyd = KeydService(loop, event, service, *[nothing] * 5)
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


def test_one_that_cannot_be_watched_is_connected_to_again(tmp_path: Path) -> None:
    path = tmp_path / "keyd.sock"
    short_lived = ShortLived(path)
    (generation, _) = short_lived.generations
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        loop = short_lived.loop
        without_watches(lambda: short_lived.service.connect(generation), loop._epoll)
        assert listener.accept()[0].recv(1) == b""
        assert generation.keyd_missed == "No space left on device"
        ((seconds, again),) = loop.later
        assert seconds == 0.2
        again()
        peer, _ = listener.accept()
        with peer:
            peer.send(Keys(()).encode())
            loop.run_once()
    assert not generation.without_keyd


class ShortLived:
    """A keyd that says its keys and hangs up, and a supervisor's side of it."""

    def __init__(self, path: Path) -> None:
        self.now = 1000.0
        self.loop = Clockless()
        self.children: Any = SimpleNamespace(order=lambda *order: None)
        nothing: Any = None
        service: Any = SimpleNamespace(stops=0, tell_status=lambda: None)
        takeover: Any = SimpleNamespace(awaits=lambda generation: False)
        generations: Any = SimpleNamespace(serving=None)
        self.service = KeydService(
            self.loop,
            lambda name, generation=0, **fields: None,
            service,
            generations,
            self.children,
            takeover,
            nothing,
            nothing,
            clock=lambda: self.now,
        )
        self._path = path
        self.generations = [self.generation(), self.generation()]

    def generation(self) -> Generation:
        return cast(
            Generation,
            SimpleNamespace(
                configuration=SimpleNamespace(keyd=SimpleNamespace(socket=self._path)),
                number=1,
                retired=False,
                parent=object(),
                keyds_keys=None,
                key_ids=set(),
                ready=False,
                without_keyd=True,
                waits_for_keyd=True,
                keyd_missed="",
            ),
        )

    def live(self, listener: socket.socket, seconds: float) -> list[float]:
        """Be connected to each, and die after so long; returns after what pauses they ask again."""
        for generation in self.generations:
            self.service.connect(generation)
            peer, _ = listener.accept()
            with peer:
                peer.send(Keys(()).encode())
                self.loop.run_once()
            assert not generation.without_keyd
        self.now += seconds
        self.loop.later.clear()
        for generation in self.generations:
            self.service.lost(generation)
            assert generation.without_keyd
        pauses = [pause for pause, _ in self.loop.later]
        self.now += max(pauses)
        return pauses


def test_a_parent_that_says_again_and_again_that_it_is_lost_is_given_one(tmp_path: Path) -> None:
    """Each connection takes a descriptor of the supervisor's, and is one more for keyd to hear."""
    keyd = ShortLived(tmp_path / "keyd.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "keyd.sock"))
        listener.listen()
        keyd.live(listener, 60)
        for _ in range(100):
            for generation in keyd.generations:
                keyd.service.lost(generation)
        assert len(keyd.loop.later) == len(keyd.generations)


def test_one_that_says_its_keys_and_dies_is_asked_ever_more_seldom(tmp_path: Path) -> None:
    keyd = ShortLived(tmp_path / "keyd.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "keyd.sock"))
        listener.listen()
        pauses = [keyd.live(listener, 1) for _ in range(10)]
        assert pauses == [
            [pause] * 2 for pause in (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30)
        ]
        assert keyd.live(listener, 60) == [0, 0], "it has lived for a while"
        assert keyd.live(listener, 1) == [0.2, 0.2]
        # A new generation does not make it more reliable.
        keyd.generations = [keyd.generation()]
        assert keyd.live(listener, 1) == [0.4]


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "too late"])
def test_it_cannot_have_the_supervisor_wait_in_closing_its_socket(
    tmp_path: Path, heard: bool
) -> None:
    """A socket that lingers, which somebody has handed it."""
    keyd = ShortLived(tmp_path / "keyd.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "keyd.sock"))
        listener.listen()
        keyd.service.connect(keyd.generations[0])
        ((_, lose_patience),) = keyd.loop.later
        with listener.accept()[0] as speaking:
            side, peer = lingering()
            with peer, nobody_waits_for(peer):
                with side:
                    socket.send_fds(speaking, [Keys(()).encode()], [side.fileno()])
                if heard:
                    keyd.loop.run_once()
                else:
                    lose_patience()
