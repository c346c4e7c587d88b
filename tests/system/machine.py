"""A machine of its own for a test: systemd as process 1, over an overlay of this one's root."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

_BOOT_SECONDS = 180.0
#: What systemd would run each time that its units are read again, for nothing: they make units of
#: disks, of the kernel's command line, of terminals. The one for old init scripts is not here.
_GENERATORS = (
    *("cryptsetup", "debug", "fstab", "getty", "gpt-auto", "hibernate-resume", "integritysetup"),
    *("rc-local", "run", "system-update", "veritysetup"),
)


class Machine:
    """Boots when it is made; its network is a loopback interface that nobody else has.

    What it writes is in memory, and gone when it is closed.
    """

    def __init__(self) -> None:
        self._name = f"titus-py-{secrets.token_hex(4)}"
        self._directory = Path("/var/tmp", self._name)
        self._directory.mkdir(mode=0o700)
        self.root = self._directory / "root"
        upper, work = self._directory / "upper", self._directory / "work"
        self._cgroups = _own_cgroups(self._name)
        self._nspawn: subprocess.Popen[bytes] | None = None
        try:
            # On a disk, dpkg waits for it again and again. Where files were removed just before, as
            # in an upgrade, ext4 also looks through all of those for each one that is made.
            memory = ["mount", "-t", "tmpfs", "-o", "mode=700,size=2g", self._name]
            subprocess.run([*memory, self._directory], check=True)
            for path in (self.root, upper, work):
                path.mkdir()
            # What people keep there is theirs, and may take minutes to look through.
            for name in ("root", "srv"):
                upper.joinpath(name).mkdir(mode=0o700)
                os.setxattr(upper / name, "trusted.overlay.opaque", b"y")
            options = f"lowerdir=/,upperdir={upper},workdir={work}"
            subprocess.run(
                ["mount", "-t", "overlay", "-o", options, "overlay", self.root], check=True
            )
            self._prepare()
            self._nspawn, self._leader = self._boot()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Leave this machine's identity behind, its journal, and what is enabled on it."""
        (self.root / "etc/machine-id").write_text("")
        # Nothing is fetched, and apt would read all of Debian's packages each time.
        for file in (self.root / "var/lib/apt/lists").glob("*_*"):
            file.unlink()
        # Where it says that packages are not to start services.
        (self.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
        for directory in ("etc/systemd/system", "var/log/journal"):
            shutil.rmtree(self.root / directory, ignore_errors=True)
        generators = self.root / "etc/systemd/system-generators"
        generators.mkdir(exist_ok=True)
        for name in _GENERATORS:
            # Masked (systemd.generator(7)).
            generators.joinpath(f"systemd-{name}-generator").symlink_to("/dev/null")
        # After each installation, all manuals would be read for an index that nobody looks into.
        (self.root / "var/lib/man-db/auto-update").unlink(missing_ok=True)
        # Small images have dpkg leave manuals out.
        for file in (self.root / "etc/dpkg/dpkg.cfg.d").glob("*"):
            if "path-exclude" in file.read_text():
                file.unlink()

    def _boot(self) -> tuple["subprocess.Popen[bytes]", int]:
        command = [
            # It is not to outlive the test, however that ends.
            *("setpriv", "--pdeathsig=TERM", "systemd-nspawn"),
            *("--boot", "--quiet", "--register=no", "--keep-unit", "--private-network"),
            *("--console=pipe", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
            # What a machine has, and nspawn would keep from it.
            "--capability=CAP_IPC_LOCK",
            "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self"
            " seccomp",
            f"--directory={self.root}",
            f"--machine={self._name}",
            "systemd.unit=multi-user.target",
        ]

        def join() -> None:
            for cgroup in self._cgroups:
                (cgroup / "cgroup.procs").write_text("0")

        with open(self._directory / "console", "wb") as log:
            nspawn = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=join,
            )
        self._nspawn = nspawn
        deadline = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < deadline:
            assert nspawn.poll() is None, self.console
            self._leader = _first_process(nspawn.pid)
            if self._leader:
                state = self.run("systemctl is-system-running", check=False).strip()
                if state in ("running", "degraded"):
                    # For what the host passes in (systemd-nspawn(1), --bind=): no machine has it,
                    # and keyd audit says of what is mounted that it has not looked there.
                    self.run("umount /run/host/incoming", check=False)
                    return nspawn, self._leader
            time.sleep(0.2)
        raise AssertionError("the machine did not boot:\n" + self.console)

    @property
    def console(self) -> str:
        return (self._directory / "console").read_text(errors="replace")

    def run(self, command: str, check: bool = True, timeout: float = 120.0) -> str:
        """Run a shell's command line there, as root; returns what it writes, errors included."""
        done = subprocess.run(
            ["nsenter", f"--target={self._leader}", "--all", "--wdns=/", "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"},
        )
        assert not check or not done.returncode, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def reboot(self) -> None:
        """As from its own command line; returns when it has booted."""
        assert self._nspawn is not None
        # The connection to systemd may end before the answer comes.
        self.run("systemctl reboot", check=False)
        self._nspawn.wait(_BOOT_SECONDS)
        self._nspawn, self._leader = self._boot()

    def close(self) -> None:
        if self._nspawn is not None:
            # nspawn ends all of it when it is told to, and its process namespace ends the rest.
            self._nspawn.terminate()
            try:
                self._nspawn.wait(3)
            except subprocess.TimeoutExpired:
                leader = _first_process(self._nspawn.pid)
                if leader:
                    os.kill(leader, signal.SIGKILL)
                self._nspawn.kill()
                self._nspawn.wait()
        for path in (self.root, self._directory):
            subprocess.run(["umount", "--lazy", path], check=False)
        self._directory.rmdir()
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_process(nspawn: int) -> int:
    """nspawn's child that is process 1 of the machine; 0 if there is none yet, or no longer.

    It has another child before, which sets the machine up and ends.
    """
    with suppress(FileNotFoundError):
        for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split():
            with suppress(FileNotFoundError):
                status = Path(f"/proc/{child}/status").read_text()
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                    return int(child)
    return 0


def _own_cgroups(name: str) -> list[Path]:
    """Control groups for one machine: what its systemd makes stays below them."""
    found = []
    for mount in ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        if Path(mount, "cgroup.procs").exists():
            cgroup = Path(mount, name)
            cgroup.mkdir()
            found.append(cgroup)
    return found


def _remove_cgroup(cgroup: Path) -> None:
    for directory, _, _ in os.walk(cgroup, topdown=False):
        _remove_when_empty(Path(directory).rmdir)


def _remove_when_empty(remove: Callable[[], None]) -> None:
    """A control group is busy until its last process has been reaped."""
    for _ in range(50):
        try:
            remove()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
