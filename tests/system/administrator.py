"""Who installs the package on a machine of its own and types commands there, shown as they go.

``pytest -s tests/system`` prints what was typed and what was seen.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import alone_with

from .machine import Machine

_REPOSITORY = Path(__file__).parents[2]
REQUEST = (
    "curl --silent --show-error --max-time 60 --resolve www.example.org:443:127.0.0.1"
    " --cacert /etc/titus-py/www.crt https://www.example.org/"
)


def package(revision: int, file: Path) -> None:
    """Make the Debian package, in this file; each revision has the same content."""
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    with alone_with("build"):
        subprocess.run(
            ["make", "--no-print-directory", "deb", f"REVISION={revision}"],
            cwd=_REPOSITORY,
            env=environment,
            stdout=sys.stderr,
            check=True,
        )
        _tells_nothing_of_its_build(_REPOSITORY / "build/stage")
        _is_hardened(_REPOSITORY / "build/stage")
        # The next one's build removes it.
        (built,) = (_REPOSITORY / "build").glob("titus-py_*.deb")
        assert f"-{revision}_" in built.name
        shutil.copyfile(built, file)


def _tells_nothing_of_its_build(stage: Path) -> None:
    """It is the same wherever it is built: pip's directories for a build have random names."""
    for file in stage.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert not re.search(rb"/pip-[a-z]+-\w{8}/", file.read_bytes()), file
    # The build ID of what is linked here (NT_GNU_BUILD_ID, 20 octets) is a hash of such names, too.
    here = "_prctl.*.so", "keyd/*/*.so", "titus_py/*.so", "titus_py/*/*.so"
    for library in (file for pattern in here for file in stage.rglob(pattern)):
        _, _, build_id = library.read_bytes().partition(b"\x14\0\0\0\x03\0\0\0GNU\0")
        assert build_id[:20] == bytes(20), library


def _is_hardened(stage: Path) -> None:
    """What relocation has written to is read-only from then on, also once it was stripped."""
    for library in stage.rglob("*.so"):
        if not library.is_symlink():
            headers = ["readelf", "--wide", "--program-headers", library]
            shown = subprocess.run(headers, check=True, capture_output=True, text=True).stdout
            assert "GNU_RELRO" in shown, library


class Administrator:
    """Types commands on the machine, and shows them with what came of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.etc = machine.root / "etc/titus-py"

    def types(self, command: str, fails: bool = False) -> str:
        print(f"\n# {command}", flush=True)
        seen = self.machine.run(f"{command}\ncode=$?\necho\necho code=$code")
        seen, _, code = seen.rpartition("\ncode=")
        # Not the progress that dpkg shows.
        seen = re.sub(r".*\r", "", seen)
        print(seen.rstrip(), flush=True)
        if (code.strip() != "0") != fails:
            # Often all that it says is where to look.
            seen += self.machine.run("journalctl --sync; journalctl --quiet --lines=50")
            raise AssertionError(f"{command}: exit code {code.strip()}\n{seen}")
        return seen

    def writes(self, path: str, text: str) -> None:
        print(f"\n# editor {path}\n{text.rstrip()}", flush=True)
        file = self.machine.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def gets_a_certificate(self, name: str) -> None:
        """One that says who issued it, with its key; a client is to trust it alone."""
        self.types(
            "umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
            f" -days 30 -subj '/O={name}/CN=www.example.org'"
            " -addext subjectAltName=DNS:www.example.org"
            " -keyout /etc/titus-py/www.key -out /etc/titus-py/www.crt 2>/dev/null"
        )

    def has_a_backend(self) -> None:
        """On port 8080, until the machine is started anew."""
        self.types("mkdir -p /srv/www && echo It works. > /srv/www/index.html")
        self.types(
            "systemd-run --unit=backend -p WorkingDirectory=/srv/www python3 -m http.server 8080"
        )
        self.types("until ss --listening --numeric --tcp | grep :8080; do sleep 0.1; done")

    def requests(self) -> None:
        """A request, by a client that trusts the certificate that is there now."""
        assert self.types(REQUEST).strip() == "It works."

    def journal(self, options: str) -> str:
        """What the journal has, with all that was said before: it is written a moment later."""
        return self.types(f"journalctl --sync && journalctl --quiet {options}")

    def status(self, unit: str, fails: bool = False) -> str:
        """With the unit's last lines in the journal. It fails for a unit that is not active."""
        return self.types(f"journalctl --sync; systemctl status {unit}", fails)

    def starts_in_vain(self, reason: str) -> None:
        """titus-py does not start; its status says why, from one attempt until the next."""
        self.types("systemctl start titus-py", fails=True)
        self.types(
            f"until systemctl status titus-py | grep --fixed-strings '{reason}'; do sleep 0.1; done"
        )

    def sees_it_start_anew(self, before: str) -> None:
        """The main process's number tells: for a moment, systemd calls a dead one active."""
        self.types(
            f"until test {before} != $(systemctl show --property=MainPID --value titus-py)"
            " && systemctl --quiet is-active titus-py; do sleep 0.1; done"
        )

    def sees_it_become(self, unit: str, state: str, seconds: int = 60) -> None:
        """As the job that is under way makes it: nobody waits for a job of another unit's."""
        shown = f"systemctl show --property=ActiveState --value {unit}"
        self.types(f"timeout {seconds} sh -c 'until test $({shown}) = {state}; do sleep 0.1; done'")

    def property(self, unit: str, name: str) -> str:
        return self.machine.run(f"systemctl show --property={name} --value {unit}").strip()

    def processes(self) -> str:
        """Those that are titus-py's, by the program and by whom they run as."""
        seen = self.machine.run("ps -eo uid,pid,args --no-headers")
        return "\n".join(
            line
            for line in seen.splitlines()
            if re.search("titus|keyd", line)
            or int(line.split()[0]) in range(2_110_000_000, 2_110_065_536)
        )
