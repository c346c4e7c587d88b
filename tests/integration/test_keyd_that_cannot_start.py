"""keyd is lost, and another one cannot start: its parent goes on with what it has."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from .conftest import Certificates, Serve
from .installed import Installed
from .peers import TlsClient
from .service import install, serves, status, talk


@contextmanager
def away(path: Path) -> Iterator[None]:
    elsewhere = path.rename(path.with_name("elsewhere"))
    yield
    elsewhere.rename(path)


@pytest.mark.parametrize("missing", ["its key", "a library"])
def test_connections_go_on_until_keyd_can_start(
    serve: Serve, certificates: Certificates, patient: str, tmp_path: Path, missing: str
) -> None:
    installed = Installed(tmp_path / "installed")
    site = install(certificates("P-256", "www.test"), tmp_path)
    instance = serve(
        patient,
        program=installed.titus_py,
        vhost=[{"certificate": site.certificate, "key": site.key}],
    )
    # What it says of why it ends is no event.
    instance.expected_alarms |= {"keyd_died", "?"}
    cause: AbstractContextManager[None] = (
        away(site.key) if missing == "its key" else installed.without("prctl.py")
    )
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        with cause:
            instance.keyd().kill()
            # More than are the end of what has served.
            instance.wait_for_events(5, "keyd_died")
            assert talk(client)
            assert status(instance)["generations"][-1]["connections"] == 1
        assert serves(instance)
        assert talk(client)
    assert not instance.events_named("giving_up")
    assert len(instance.events_named("parent_started")) == 1
