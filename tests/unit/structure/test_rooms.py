"""The rooms of the house: an import goes down, or stays on its floor."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
#: From the top down. Each may import those below it.
FLOORS = (
    "titus_py.__main__",
    "titus_py.pytest_plugin",
    "titus_py.commands",
    "titus_py.audit",
    "titus_py.supervisor",
    "titus_py.configuration",
    "titus_py.parent",
    "titus_py.resolver",
    "titus_py.metrics",
    "titus_py.fork_server",
    "titus_py.worker",
    "titus_py.between",
    "titus_py",
    "keyd",
)
#: What a worker may hold of our own code, beside its own room.
FOR_WORKERS = {
    "keyd",
    "keyd.linux",
    "keyd.linux.calls",
    "keyd.linux.credentials",
    "keyd.linux.descriptors",
    "keyd.linux.landlock",
    "keyd.linux.limits",
    "keyd.linux.memory",
    "keyd.linux.namespaces",
    "keyd.linux.prctl",
    "keyd.linux.process",
    "keyd.linux.sealed",
    "keyd.linux.seccomp",
    "keyd.linux.title",
    "keyd.provider",
    "keyd.without_mail",
    "titus_py",
    "titus_py.between",
    "titus_py.between.hand_over",
    "titus_py.between.messages",
    "titus_py.between.plan",
    "titus_py.between.report",
    "titus_py.between.virtual_host",
    "titus_py.native",
    "titus_py.fork_server",
    "titus_py.fork_server.confinement",
    "titus_py.fork_server.forking",
    "titus_py.fork_server.gathering",
    "titus_py.fork_server.files",
    "titus_py.fork_server.heap",
    "titus_py.fork_server.huge_code",
    "titus_py.fork_server.huge_pages",
    "titus_py.fork_server.immortal",
    "titus_py.fork_server.immortality",
    "titus_py.fork_server.life",
    "titus_py.fork_server.out_of_memory",
    "titus_py.fork_server.rehearsal",
    "titus_py.worker",
    "titus_py.worker.client_hello",
    "titus_py.worker.ends",
    "titus_py.worker.farewell",
    "titus_py.worker.flow",
    "titus_py.worker.life",
    "titus_py.worker.pump",
    "titus_py.worker.tls",
    "titus_py.worker.transcript",
}
#: What a parent, or a worker, loads only where the configuration uses it.
ON_REQUEST = {
    "titus_py.between.certificate_index",
    "titus_py.between.tunnel_terms",
    "titus_py.between.known_client",
    "titus_py.parent.health",
    "titus_py.parent.introduction",
    "titus_py.parent.known_clients",
    "titus_py.parent.networks",
    "titus_py.parent.proxy_header",
    "titus_py.between.postgresql",
    "titus_py.parent.starttls",
    "titus_py.parent.tunnels",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("titus_py", "keyd"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def floor(name: str) -> int | None:
    """Which floor something is on; None if it is not ours."""
    within = [place for place in FLOORS if name == place or name.startswith(f"{place}.")]
    return FLOORS.index(max(within, key=len)) if within else None


def upward(name: str, path: Path) -> list[str]:
    """What a module imports from a floor above its own."""
    own = floor(name)
    assert own is not None
    return [
        imported
        for imported in imports(path)
        if (theirs := floor(imported)) is not None and theirs < own
    ]


def test_imports_go_down() -> None:
    assert {name: found for name, path in modules() if (found := upward(name, path))} == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("titus_py.worker.pump", "from titus_py.parent.dialer import Dialer\n"),
        ("titus_py.between.plan", "def f():\n    import titus_py.fork_server.life\n"),
        ("keyd.daemon", "from titus_py import between\n"),
        ("titus_py.supervisor.log", "from titus_py.commands import status\n"),
    ],
)
def test_one_that_is_turned_round_is_seen(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert upward(name, path)


def test_what_a_worker_holds() -> None:
    """Each module is pages that every fork copies: none comes unnoticed."""
    program = "import sys, titus_py.fork_server.life; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    ours = {name for name in loaded if name.partition(".")[0] in ("titus_py", "keyd")}
    assert ours == FOR_WORKERS
    # Libraries, with others that they bring: 31 mappings, which every fork would copy.
    assert not {"_ctypes", "mmap", "resource", "_prctl"} & set(loaded)
    # A megabyte, for a decorator of pyOpenSSL's, by way of typing_extensions before Python 3.13.
    assert "inspect" not in loaded


def test_what_a_parent_does_not_hold_unasked() -> None:
    """A parent without the setting has no pages of what serves it."""
    program = "import sys, titus_py.parent.life; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {name for name in loaded if name in ON_REQUEST}


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        ("titus_py.commands.reload", {"pydantic", "titus_py.configuration"}),
        ("titus_py.commands.status", {"pydantic", "titus_py.configuration"}),
        ("keyd.__main__", {"cryptography.x509", "keyd.daemon", "keyd.key_reader"}),
    ],
)
def test_what_a_command_does_not_load(module: str, left_out: set[str]) -> None:
    """What others take, and takes longer to load than the command takes to run."""
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not left_out & set(loaded)


def test_no_file_and_no_class_has_grown_too_large_to_be_read() -> None:
    large = []
    for name, path in modules():
        text = path.read_text()
        if text.count("\n") > 500:
            large.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                if len(methods) > 25:
                    large.append(f"{name}.{node.name}")
    assert not large


def test_no_two_files_of_unit_tests_have_one_name() -> None:
    """They are in no packages: pytest cannot tell one from the other, and runs nothing at all."""
    names = [path.name for path in (REPOSITORY / "tests" / "unit").rglob("test_*.py")]
    assert sorted(names) == sorted({*names})
