"""What a container may lack: named at once, with what it is for; and what is enough."""

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import alone_with

from titus_py.supervisor.privileges import REQUIRED_CAPABILITIES

from .conftest import Certificates, Serve
from .instance import TITUS_PY, free_port
from .peers import Listener, TlsClient
from .service import problems, reload, serves, talk
from .test_stopping import write_configuration

#: In a user namespace of its own (user_namespaces(7)), with as many ids as engines give, and root's
#: groups. Who maps them must be outside: a child that has been forked before.
IN_A_USER_NAMESPACE = """\
import ctypes, os, sys
unshared, mapped = os.pipe(), os.pipe()
if not os.fork():
    os.read(unshared[0], 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{os.getppid()}/{kind}_map", "w") as file:
            file.write("0 0 65536")
    os.write(mapped[1], b"x")
    os._exit(0)
if ctypes.CDLL(None).unshare(0x10000000):
    sys.exit("no user namespace can be made")
os.write(unshared[1], b"x")
os.read(mapped[0], 1)
os.wait()
os.execv(sys.argv[1], sys.argv[1:])
"""
#: What docs/containers.md has for such a container.
SETTINGS = {
    "worker": {"uids": "20000-39999"},
    "keyd": {"user": "19999", "lock_memory": "try"},
}


def started(*command: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def configuration(certificates: Certificates, tmp_path: Path) -> Path:
    return write_configuration(certificates, tmp_path, free_port())


BOTH = pytest.mark.parametrize("command", ["serve", "check"])


@BOTH
@pytest.mark.parametrize("name", ["KILL", "SYS_ADMIN", "SETUID", "SETGID", "SYS_CHROOT", "SETPCAP"])
def test_a_missing_capability_is_named(configuration: Path, command: str, name: str) -> None:
    dropped = f"--bounding-set=-{name.lower()}"
    ended = started("setpriv", dropped, TITUS_PY, command, "--config", configuration)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"titus-py: CAP_{name} is missing, which is for: ")


def test_the_capability_for_sockets_of_others_is_named(configuration: Path, tmp_path: Path) -> None:
    """Number 0, as prctl's CAP_EFFECTIVE is, which is no capability."""
    tunnel = (
        f'[[tunnel]]\nlisten = "unix:{tmp_path}/db.sock"\nsocket_user = "nobody"\n'
        f'connect = "127.0.0.1:1"\npins = ["sha256:{"0a" * 32}"]\n'
    )
    configuration.write_text(f"{configuration.read_text()}\n{tunnel}")
    command = "setpriv", "--bounding-set=-chown", TITUS_PY, "check", "--config", configuration
    lines = started(*command).stderr.splitlines()
    assert "titus-py: CAP_CHOWN is missing, which is for: " in "\n".join(lines)


def test_each_that_is_missing_is_named(configuration: Path) -> None:
    """With all that a container of Docker's has, unless told otherwise."""
    docker = "chown,dac_override,fsetid,fowner,mknod,net_raw,setgid,setuid,setfcap,setpcap"
    kept = ",".join(f"+{name}" for name in f"{docker},net_bind_service,sys_chroot,kill".split(","))
    command = "setpriv", f"--bounding-set=-all,{kept}", TITUS_PY, "serve", "--config"
    ended = started(*command, configuration)
    assert ended.returncode == 2
    assert [line.split()[1] for line in ended.stderr.splitlines()] == ["CAP_SYS_ADMIN"]
    everything = "setpriv", "--bounding-set=-all", TITUS_PY, "serve", "--config"
    lines = started(*everything, configuration).stderr.splitlines()
    assert len(lines) == len(REQUIRED_CAPABILITIES)


@BOTH
def test_no_proc_is_named(configuration: Path, command: str) -> None:
    script = 'umount --lazy /proc && exec "$@"'
    words = TITUS_PY, command, "--config", configuration
    ended = started("unshare", "--mount", "sh", "-c", script, "sh", *words)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("titus-py: /proc is not mounted: ")


@BOTH
def test_memory_that_cannot_be_locked_is_named(configuration: Path, command: str) -> None:
    limited = "prlimit", "--memlock=65536:65536"
    dropped = "setpriv", "--bounding-set=-ipc_lock,-sys_resource"
    ended = started(*limited, *dropped, TITUS_PY, command, "--config", configuration)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("titus-py: keyd cannot lock its memory")
    assert "RLIMIT_MEMLOCK is 65536 octets" in line
    assert "CAP_IPC_LOCK is missing" in line


def test_keyd_itself_holds_to_the_policy(certificates: Certificates, tmp_path: Path) -> None:
    """Whoever starts it; it ends with what no service manager starts again."""
    site = certificates()
    limited = (
        "prlimit",
        "--memlock=65536:65536",
        "setpriv",
        "--bounding-set=-ipc_lock,-sys_resource",
    )
    keyd = *limited, TITUS_PY.with_name("keyd"), "control", "--user=daemon"
    where = f"--socket={tmp_path}/keyd", f"--chroot={tmp_path}/empty"
    ended = started(*keyd, *where, f"--key={site.key}")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("keyd: memory cannot be locked (")


@pytest.mark.parametrize(
    ("dropped", "limit"), [("-ipc_lock,-sys_resource", "65536"), ("-sys_resource", "0")]
)
def test_without_locked_memory_where_it_may(
    serve: Serve, echoing: Listener, tmp_path: Path, dropped: str, limit: str
) -> None:
    before = f"prlimit --memlock={limit}:{limit} setpriv --bounding-set={dropped}"
    program = script(tmp_path, f'#!/bin/sh\nexec {before} {TITUS_PY} "$@"\n')
    instance = serve(
        echoing.address, program=program, keyd={"user": "daemon", "lock_memory": "try"}
    )
    assert instance.events_named("keyd_started")[0]["all_memory_locked"] is False
    assert serves(instance)
    instance.expected_alarms.add("?")  # keyd says what it lacks.
    assert ("keyd: memory cannot be locked" in instance.log()) == ("ipc_lock" in dropped)


def script(directory: Path, text: str) -> Path:
    path = directory / "program"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def in_a_user_namespace(tmp_path: Path) -> Iterator[Path]:
    """Its uids are also this machine's, and the same for each test that has one."""
    (tmp_path / "unshare.py").write_text(IN_A_USER_NAMESPACE)
    command = f"{sys.executable} {tmp_path}/unshare.py {TITUS_PY}"
    with alone_with("uids-of-a-user-namespace"):
        yield script(tmp_path, f'#!/bin/sh\nexec prlimit --memlock=65536:65536 {command} "$@"\n')


def test_what_a_user_namespace_lacks_is_named(
    configuration: Path, in_a_user_namespace: Path
) -> None:
    """Ids first of all: by default, it has none of ours."""
    text = configuration.read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("uids = ", "user = "))]
    configuration.write_text("\n".join(lines))
    for command in ("serve", "check"):
        ended = started(in_a_user_namespace, command, "--config", configuration)
        assert ended.returncode == 2
        said = ended.stderr
        assert "worker.uids: this user namespace has no uid 2100000000 (it has 0 to 65535)" in said
        assert "keyd.user: this user namespace has no uid 2099999999 (it has 0 to 65535)" in said
        assert "Traceback" not in said
    text = re.sub("^uids = .*", f'uids = "{SETTINGS["worker"]["uids"]}"', text, flags=re.MULTILINE)
    text = re.sub("^user = .*", f"user = {SETTINGS['keyd']['user']}", text, flags=re.MULTILINE)
    configuration.write_text(text)
    ended = started(in_a_user_namespace, "serve", "--config", configuration)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("titus-py: keyd cannot lock its memory")


def test_with_these_settings_a_user_namespace_is_enough(
    serve: Serve, echoing: Listener, in_a_user_namespace: Path
) -> None:
    instance = serve(echoing.address, program=in_a_user_namespace, **SETTINGS)
    instance.expected_alarms.add("?")  # keyd says what it lacks.
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        workers = instance.confined_workers(4)
        assert {worker.uid for worker in workers} <= set(range(20_000, 40_000))
        assert instance.keyd().uid == 19_999
        assert reload(instance)["reloaded"], problems(instance)
        assert talk(client)
    assert serves(instance)
    assert instance.terminate() == 0
