"""pytest's way to titus-py: start it in front of your backend, and hold it to its promises.

Loaded by pytest, in every project that has titus-py installed: nothing is imported here
that a test does not ask for. Its tests run as root, as titus-py itself is started.

Public are the fixture ``titus_instance`` and the functions ``audit`` and
``assert_key_isolated``. ``docs/pytest-plugin.md`` has a complete example.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from titus_py.audit import Finding
    from titus_py.audit.throwaway import TitusInstance

__all__ = ["StartTitus", "assert_key_isolated", "audit", "titus_instance"]


class StartTitus(Protocol):
    """What the fixture ``titus_instance`` is."""

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

    ``instance`` is one of ``titus_instance``, or the pid of the supervisor of any other. Returns
    what was found; raises AssertionError with a list of what does not hold. It opens a
    connection, and asks keyd for what it must refuse: the instance's log has that as
    ``audit_refused``.
    """
    __tracebackhide__ = True
    from titus_py.audit import Verdict, find_target
    from titus_py.audit import audit as make_audit

    made = make_audit(find_target(_pid(instance)))
    _raise_for(made.having(Verdict.BROKEN))
    return made.findings


def assert_key_isolated(instance: "TitusInstance | int") -> None:
    """Find the private key in keyd's memory, and in that of no other process of the instance.

    ``instance`` is as for ``audit``. Raises AssertionError that says in which process and
    which mapping the key was found. Workers end with their connections: to have one among
    those that are searched, keep a connection open.
    """
    __tracebackhide__ = True
    from titus_py.audit import Verdict, find_target
    from titus_py.audit.memory import key_needles, look_for_keys

    target = find_target(_pid(instance))
    findings = look_for_keys(target, target.processes(), {}, key_needles(target))
    _raise_for([one for one in findings if one.check == "key" and one.verdict is not Verdict.HOLDS])


def _pid(instance: "TitusInstance | int") -> int:
    return instance if isinstance(instance, int) else instance.pid


def _raise_for(broken: "Sequence[Finding]") -> None:
    __tracebackhide__ = True
    if broken:
        lines = "\n".join(f"  {finding}" for finding in broken)
        raise AssertionError(f"titus-py does not keep its promises:\n{lines}")
