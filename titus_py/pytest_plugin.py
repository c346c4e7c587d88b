"""A pytest plugin: start titus-py in front of your backend, and check that it keeps its promises.

pytest loads this in every project that has titus-py installed, so it imports nothing until a
test asks for it. Tests that use it run as root, because titus-py is started as root.

The fixture ``titus_instance`` and the functions ``audit`` and ``assert_key_isolated`` are
public. ``docs/pytest-plugin.md`` has a complete example.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from titus_py.audit.finding import Finding
    from titus_py.audit.throwaway import TitusInstance

__all__ = ["StartTitus", "assert_key_isolated", "audit", "titus_instance"]


class StartTitus(Protocol):
    """The type of the fixture ``titus_instance``."""

    def __call__(
        self, backend: str, key_type: str = "P-256", names: Sequence[str] = ("localhost",)
    ) -> "TitusInstance":
        """Start titus-py in front of ``backend``; returns when it listens.

        ``backend`` is ``"127.0.0.1:8080"``, ``"[::1]:8080"`` or ``"unix:/run/app.sock"``.
        ``key_type`` is ``"P-256"``, ``"P-384"``, ``"P-521"``, ``"RSA-2048"``, ``"RSA-4096"``
        or ``"Ed25519"``. The certificate is for ``names``, and for 127.0.0.1.
        """
        ...


@pytest.fixture
def titus_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartTitus]:
    """Starts instances on free ports, with throwaway certificates; they end with the test.

    ``instance = titus_instance(backend="127.0.0.1:8080")`` has ``port``, ``address``,
    ``ca_file``, ``certificate_file``, ``key_file``, ``pid``, ``events()``,
    ``wait_for_event()`` and ``stop()``. Without root, the test fails: a check that was
    skipped unnoticed would be worse than none.
    """
    if os.geteuid() != 0:
        pytest.fail("titus_instance starts titus-py, and that is started as root", pytrace=False)
    from titus_py.audit.throwaway import TitusInstance

    instances: list[TitusInstance] = []

    def start(
        backend: str, key_type: str = "P-256", names: Sequence[str] = ("localhost",)
    ) -> TitusInstance:
        directory = tmp_path_factory.mktemp("titus-py")
        instance = TitusInstance(directory, backend, key_type, names)
        instances.append(instance)
        instance.wait_until_listening()
        return instance

    yield start
    for instance in instances:
        instance.stop()


def audit(instance: "TitusInstance | int") -> "tuple[Finding, ...]":
    """Hold a running instance against all its promises, as ``titus-py audit`` does.

    ``instance`` comes from ``titus_instance``, or is the pid of any other instance's supervisor.
    Returns the findings; raises AssertionError with a list of the promises that do not hold. The
    audit opens a connection, and asks keyd for what keyd must refuse. The instance's log has
    that as ``audit_refused``.
    """
    __tracebackhide__ = True
    from titus_py.audit.finding import Verdict
    from titus_py.audit.run import audit as make_audit
    from titus_py.audit.target import find_target

    made = make_audit(find_target(_pid(instance)))
    _raise_for(made.having(Verdict.BROKEN))
    return made.findings


def assert_key_isolated(instance: "TitusInstance | int") -> None:
    """Assert that the private key is in keyd's memory, and in no other process of the instance.

    ``instance`` is as for ``audit``. Raises AssertionError that says in which process and
    which mapping the key was found. A worker ends with its connection: to have one searched,
    keep a connection open.
    """
    __tracebackhide__ = True
    from titus_py.audit.finding import Verdict
    from titus_py.audit.memory import look_for_keys
    from titus_py.audit.target import find_target

    target = find_target(_pid(instance))
    findings = look_for_keys(target, target.processes(), {})
    _raise_for([one for one in findings if one.check == "key" and one.verdict is not Verdict.HOLDS])


def _pid(instance: "TitusInstance | int") -> int:
    return instance if isinstance(instance, int) else instance.pid


def _raise_for(broken: "Sequence[Finding]") -> None:
    __tracebackhide__ = True
    if broken:
        lines = "\n".join(f"  {finding}" for finding in broken)
        raise AssertionError(f"titus-py does not keep its promises:\n{lines}")
