"""keyd has no room for a channel, or for an answer, and goes on.

That handshake fails at once, and why is said.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from OpenSSL import SSL

from keyd.protocol import Refusal, Status

from .conftest import Certificates, Serve
from .instance import PATIENCE, Event, Instance, eventually
from .peers import Listener, TlsClient
from .service import serves, talk
from .test_own_keyd import OwnKeyd

#: No worker ends by its own timeout while a test waits for it.
_WORKER = {"handshake_timeout": f"{10 * PATIENCE:g}s"}
#: Three are open all the time: keyd has no number left for a fourth one.
_NO_DESCRIPTOR = 3


def assert_fails_at_once(instance: Instance, attempted: str | None) -> None:
    """``attempted``: what the parent is told."""
    since = len(instance.events())
    with TlsClient(instance.port) as client, pytest.raises(SSL.Error, match="alert internal error"):
        client.handshake()
    if attempted is not None:
        refused = instance.wait_for_event("keyd_refused", since=since, client=client.name)
        assert (refused["status"], refused["attempted"]) == (Status.FAILED.name.lower(), attempted)
        # Nobody's fault.
        assert refused["level"] == "error"
    failed = instance.wait_for_event("handshake_failed", since=since, client=client.name)
    # It may have asked before keyd closed the channel: then that is answered.
    assert failed["detail"].startswith(("keyd is gone", "refused: failed"))


def test_without_a_descriptor(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker=_WORKER)
    instance.expected_alarms.add("keyd_refused")
    instance.keyd().limit_descriptors(_NO_DESCRIPTOR)
    for _ in range(2):
        assert_fails_at_once(instance, "no channel: Too many open files")
    instance.keyd().limit_descriptors()
    assert serves(instance)


def test_many_clients_that_fail_for_one_reason_have_a_line_a_second(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker=_WORKER)
    instance.keyd().limit_descriptors(_NO_DESCRIPTOR)
    begun, clients = time.monotonic(), 40
    for _ in range(clients):
        with TlsClient(instance.port) as client, pytest.raises(SSL.Error, match="internal error"):
            client.handshake()

    def told() -> list[Event]:
        lines = instance.events_named("keyd_refused")
        return lines if sum(line.get("count", 1) for line in lines) == clients else []

    lines = eventually(told, "all are told of")
    assert len(lines) <= time.monotonic() - begun + 2
    assert len(instance.wait_for_events(clients, "handshake_failed")) == clients


#: As events that are waited for: of a channel and of a parent.
_CHANNEL, _PARENT = "daemon._READABLE_ONCE", "select.EPOLLIN | select.EPOLLONESHOT"


@pytest.fixture(params=[_CHANNEL])
def keyd(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path: Path
) -> Iterator[OwnKeyd]:
    """A unit of its own. For its first channel, or its first parent, epoll(7) has no room."""
    program = tmp_path / "keyd"
    program.write_text(
        f"#!{sys.executable} -I\n"
        "import errno, os, select, sys\n"
        "from keyd import daemon\n"
        "class Epoll:\n"
        "    def __init__(self, made):\n"
        "        self.made, self.full, self.serves = made, True, False\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.made, name)\n"
        "    def register(self, descriptor, events):\n"
        f"        if self.full and self.serves and events == {request.param}:\n"
        "            self.full = False\n"
        "            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "        self.made.register(descriptor, events)\n"
        "class Keyd(daemon.Keyd):\n"
        "    def __init__(self, *given, **named):\n"
        "        super().__init__(*given, **named)\n"
        "        self.epoll = Epoll(self.epoll)\n"
        "    def serve(self, *given, **named):\n"
        "        self.epoll.serves = True\n"
        "        super().serve(*given, **named)\n"
        "daemon.Keyd = Keyd\n"
        "from keyd.__main__ import main\n"
        "sys.exit(main())\n"
    )
    program.chmod(0o755)
    options = [f"--key={certificates().key}", "--user=nobody", f"--chroot={tmp_path / 'root'}"]
    started = OwnKeyd(tmp_path, options, program)
    started.start()
    yield started
    started.close()


def test_without_a_watch(
    serve: Serve, echoing: Listener, certificates: Certificates, keyd: OwnKeyd
) -> None:
    site = {"certificates": [{"certificate": certificates().certificate}]}
    instance = serve(echoing.address, vhost=[site], keyd={"socket": keyd.socket}, worker=_WORKER)
    instance.expected_alarms.add("keyd_refused")
    assert_fails_at_once(instance, "no channel: No space left on device")
    assert serves(instance)


@pytest.mark.parametrize("keyd", [_PARENT], indirect=True)
def test_a_parent_that_cannot_be_watched_connects_again(
    serve: Serve, echoing: Listener, certificates: Certificates, keyd: OwnKeyd
) -> None:
    """The first one was the test's, which looked whether keyd listens."""
    site = {"certificates": [{"certificate": certificates().certificate}]}
    assert serves(serve(echoing.address, vhost=[site], keyd={"socket": keyd.socket}))
    room = "no room for another connection: No space left on device: raise fs.epoll"
    assert keyd.log().count(room) == 1


_REASON = "sign: the answer cannot be sent: No buffer space available"
#: What it says first has these lengths: an answer with a signature of RSA-2048, and one with none;
#: and what it says of that to the parent.
_SIGNED, _REFUSED = 2 + 256, 2
_TOLD = len(Refusal(0, Status.FAILED, _REASON).encode())


@pytest.mark.parametrize(
    "lengths",
    [[_SIGNED], [_SIGNED, _REFUSED], [_SIGNED, _REFUSED, _TOLD]],
    ids=["one", "any", "nor tell the parent"],
)
def test_without_room_for_an_answer(
    serve: Serve,
    echoing: Listener,
    certificates: Certificates,
    tmp_path: Path,
    lengths: list[int],
) -> None:
    """As where the kernel's memory is short: what has these lengths cannot be sent."""
    program = tmp_path / "keyd"
    program.write_text(
        f"#!{sys.executable} -I\n"
        "import errno, sys\n"
        "import pyseccomp as seccomp\n"
        "from keyd.__main__ import main\n"
        "program = seccomp.SyscallFilter(seccomp.ALLOW)\n"
        f"for length in {lengths}:\n"
        "    of_it = seccomp.Arg(2, seccomp.EQ, length)\n"
        "    program.add_rule(seccomp.ERRNO(errno.ENOBUFS), 'sendto', of_it)\n"
        "program.load()\n"
        "sys.exit(main())\n"
    )
    program.chmod(0o755)
    issued = certificates("RSA-2048"), certificates("P-256", "www.example.org")
    options = [*(f"--key={one.key}" for one in issued), "--user=nobody"]
    keyd = OwnKeyd(tmp_path, [*options, f"--chroot={tmp_path / 'root'}"], program)
    keyd.start()
    try:
        sites = [
            {"sni": [name], "certificates": [{"certificate": one.certificate}]}
            for name, one in zip(("localhost", "www.example.org"), issued, strict=True)
        ]
        instance = serve(echoing.address, vhost=sites, keyd={"socket": keyd.socket}, worker=_WORKER)
        instance.expected_alarms.add("keyd_refused")
        assert_fails_at_once(instance, _REASON if _TOLD not in lengths else None)
        with TlsClient(instance.port, "www.example.org") as client:
            assert talk(client.handshake())
    finally:
        keyd.close()
