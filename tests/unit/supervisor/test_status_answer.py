"""What the supervisor says of itself, for ``titus-py status`` and the metrics."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from titus_py.configuration import Credential
from titus_py.configuration.checking import CertificateFacts
from titus_py.supervisor.log import Log
from titus_py.supervisor.record import Record
from titus_py.supervisor.status import Status

VHOSTS = 200
FACTS = CertificateFacts("", b"", "", "CN=x", (), datetime(2030, 1, 1, tzinfo=UTC))


class CountingPath(type(Path())):  # type: ignore[misc]
    """A path that counts how often paths are compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        CountingPath.comparisons += 1
        return super().__eq__(other)

    __hash__ = type(Path()).__hash__


def vhost(number: int) -> SimpleNamespace:
    files = [CountingPath(f"{number}{end}") for end in (".pem", ".key")]
    return SimpleNamespace(
        sni=(f"{number}.example",),
        local_address=None,
        local_port=None,
        backend=(),
        balance=None,
        send_proxy=None,
        source_address=None,
        alpn=None,
        backends={},
        health=None,
        client=(),
        credentials={"": Credential(files[0], files[1], None)},
        certificate_dir=None,
    )


def test_each_virtual_host_finds_its_certificate_without_a_search() -> None:
    vhosts = [vhost(number) for number in range(VHOSTS)]
    certificates = {one: FACTS for of in reversed(vhosts) for one in of.credentials.values()}
    serving = SimpleNamespace(
        certificates=certificates,
        tokens=[],
        upstreams=[],
        configuration=SimpleNamespace(
            vhost=vhosts,
            tunnel=(),
            keyd=SimpleNamespace(client=()),
            worker=SimpleNamespace(max=1),
        ),
        checked=SimpleNamespace(authorities={}, kept=()),
    )

    class Generations(list[Any]):
        pass

    generations: Any = Generations()
    generations.serving = serving
    nothing: Any = SimpleNamespace(open=(), addresses={}, states={})
    log = Log("json")
    lost: Any = SimpleNamespace(names="", reason="")
    status = Status(Record(log), nothing, generations, nothing, nothing, nothing, (), lost)
    CountingPath.comparisons = 0
    said: Any = status.all()
    log.close()
    # A search would compare each certificate with all before it.
    assert CountingPath.comparisons <= 4 * VHOSTS
    for shown in said["vhosts"]:
        (place,) = shown["certificates"]
        name = shown["names"][0].removesuffix(".example")
        assert said["certificates"][place]["file"] == f"{name}.pem"
