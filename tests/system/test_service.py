"""titus-py as a service, from its package, on a machine with systemd: an administrator's day.

One test, in the order in which it is done; it prints what was typed and what was seen
(``pytest -s tests/system``).
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from . import changed_example, remote_keys, unix_listener, unix_tunnel, without_python
from .administrator import REQUEST, Administrator, package
from .clock import SteppedClock
from .machine import Machine

_REPOSITORY = Path(__file__).parents[2]
_CROWD = Path(__file__).with_name("crowd.py")
_URL = "https://www.example.org/"
#: Not the default ones: other tests' instances on this kernel may have those.
_UIDS = "2110000000-2110065535"
_CONFIGURATION = f"""\
[[listen]]
address = "[::]:443"

[[vhost]]
certificate = "/etc/titus-py/www.crt"
key = "/etc/titus-py/www.key"
backend = "127.0.0.1:8080"

[keyd]
user = "titus-keyd"

[worker]
uids = "{_UIDS}"
"""


@pytest.fixture
def administrator() -> Iterator[Administrator]:
    with Machine() as machine:
        for revision in (1, 2):
            package(revision, machine.root / f"root/titus-py-{revision}.deb")
        yield Administrator(machine)


@pytest.mark.timeout(900)  # a minute and a half, where nothing else runs
def test_an_administrators_day(administrator: Administrator) -> None:
    admin = administrator
    _installs(admin)
    _starts(admin)
    _reloads(admin)
    without_python.is_told(admin)
    _finds_its_address_in_use(admin)
    _is_killed(admin)
    _loses_a_process_and_the_journal(admin)
    _floods_the_journal(admin)
    _hangs(admin)
    _has_its_clock_stepped(admin)
    _upgrades(admin)
    _is_removed_and_comes_back(admin)
    changed_example.is_asked_about(admin, _CONFIGURATION)
    unix_tunnel.is_made_and_kept(admin, _CONFIGURATION)
    unix_listener.is_behind_a_balancer(admin, _CONFIGURATION)
    _activates_by_socket(admin)
    _encrypts_the_key(admin)
    _runs_keyd_as_a_unit(admin)
    _looks_at_exposure(admin)
    _is_told_what_a_unit_does_not_see(admin)
    _runs_two_instances(admin)
    admin.types("systemctl stop titus-py")
    remote_keys.are_there_after_a_restart(admin)
    _removes(admin)


def _installs(admin: Administrator) -> None:
    admin.types("apt-get install --quiet --quiet --yes /root/titus-py-1.deb")
    assert admin.property("titus-py", "ActiveState") == "inactive"
    assert "titus-keyd" in admin.types("getent passwd titus-keyd")
    units = (
        "titus-py.service titus-py@x.service titus-py.socket titus-keyd.service titus-keyd.socket"
        " titus-keyd.timer"
    )
    assert not admin.types(f"systemd-analyze verify {units}").strip()
    for words in ("titus-py --version", "keyd --version"):
        assert "OpenSSL" in admin.types(words)
    _has_one_openssl(admin)
    admin.types("promtool check rules /usr/share/titus-py/prometheus/titus-py.rules.yml")
    admin.types("ls /usr/share/titus-py/prometheus/titus-py.dashboard.json")
    documents = "/usr/share/doc/titus-py"
    assert "MIT" in admin.types(f"cat {documents}/copyright")
    admin.types(f"zcat {documents}/changelog.gz {documents}/changelog.Debian.gz")
    # What the site is built with is in what is read without it, too.
    assert "titus_alarms_total" in admin.types(f"cat {documents}/monitoring.md")
    assert "<!--" not in admin.types(f"cat {documents}/*.md")
    for page in ("titus-py.8", "keyd.8", "titus.toml.5"):
        admin.types(f"man {page} | head -n 4")
    # As shipped, it lacks the certificate and nothing else.
    seen = admin.types("titus-py check", fails=True)
    assert set(re.findall(r"titus\.toml:[0-9]+: vhost for any name: ([^:]+)", seen)) == {
        "certificate",
        "key",
    }
    # From now on it is as any container's whose kernel others use, too (docs/containers.md).
    there = "/etc/titus-py/titus.toml"
    admin.types(f"sed -i 's/^# uids = .*/uids = \"{_UIDS}\"/' {there} && grep '^uids' {there}")


def _has_one_openssl(admin: Administrator) -> None:
    """From Debian 13 on, it is Debian's, and the package has no copy; before, it is the wheel's."""
    debians = int(admin.types(". /etc/os-release; echo $VERSION_ID")) >= 13
    copies = admin.types("dpkg --listfiles titus-py | grep -E '_rust.abi3.so|libssl' || :").split()
    assert len(copies) == (0 if debians else 1)
    version = admin.types("openssl version").partition(" (")[0].strip()
    assert (version in admin.types("titus-py --version")) == debians


def _starts(admin: Administrator) -> None:
    admin.gets_a_certificate("the first one")
    admin.has_a_backend()
    admin.types("titus-py check")
    admin.types("systemctl enable --now titus-py")
    admin.requests()
    # The worker has ended a moment after its client has.
    admin.types("until systemctl status titus-py | grep connection_ended; do sleep 0.1; done")
    assert re.search(r'Status: "\d+ connections now', admin.types("systemctl status titus-py"))
    admin.types("titus-py status")
    admin.types("titus-py audit")


def _reloads(admin: Administrator) -> None:
    before = admin.property("titus-py", "MainPID")
    admin.gets_a_certificate("the second one")
    admin.types("systemctl reload titus-py")
    admin.requests()
    _has_a_backend_with_a_name(admin)

    admin.types("sed -i 's/^backend/backed/' /etc/titus-py/titus.toml")
    admin.types("systemctl reload titus-py", fails=True)
    assert "did you mean backend?" in admin.status("titus-py")
    admin.requests()
    admin.types("sed -i 's/^backed/backend/' /etc/titus-py/titus.toml")
    admin.types("systemctl reload titus-py")
    assert admin.property("titus-py", "MainPID") == before


def _has_a_backend_with_a_name(admin: Administrator) -> None:
    """It is looked up by a process that Landlock confines, as the unit has to allow."""
    for before, after in (("127.0.0.1", "localhost"), ("localhost", "127.0.0.1")):
        admin.types(f"sed -i 's/{before}:8080/{after}:8080/' /etc/titus-py/titus.toml")
        admin.types("systemctl reload titus-py")
        admin.requests()
        if after == "localhost":
            assert "titus-py: resolver" in admin.processes()
    # It ends once no generation has a name, and the one before may have a connection still.
    admin.types("while ps -eo args | grep '^titus-py: [r]esolver'; do sleep 0.1; done")


def _finds_its_address_in_use(admin: Administrator) -> None:
    """The reason is seen at once, and not covered by further attempts."""
    admin.types("systemctl stop titus-py")
    admin.types("systemd-run --unit=squatter python3 -m http.server 443")
    admin.types("until ss --listening --numeric --tcp | grep :443; do sleep 0.1; done")
    admin.starts_in_vain('Status: "not started: cannot listen on [::]:443: Address already in use')
    admin.types("systemctl stop squatter")
    admin.types("until systemctl --quiet is-active titus-py; do sleep 0.1; done")
    admin.requests()


def _is_killed(admin: Administrator) -> None:
    before = admin.property("titus-py", "MainPID")
    admin.types("systemctl kill --kill-whom=main --signal=KILL titus-py")
    admin.sees_it_start_anew(before)
    admin.requests()


def _loses_a_process_and_the_journal(admin: Administrator) -> None:
    admin.types("pkill --signal KILL --exact titus-parent")
    admin.requests()
    admin.types("systemctl restart systemd-journald")
    admin.requests()
    seen = admin.journal("--unit titus-py --output json TITUS_EVENT=parent_died")
    assert json.loads(seen.splitlines()[-1])["TITUS_HOW"] == "killed by SIGKILL"
    seen = admin.journal("--unit titus-py --output json TITUS_EVENT=connection_ended")
    connection = json.loads(seen.splitlines()[-1])["TITUS_CONNECTION"]
    seen = admin.journal(f"--output cat TITUS_CONNECTION={connection}")
    assert [line.split()[2] for line in seen.strip().splitlines()] == [
        "connection_begun",
        "connection_ended",
    ]


def _floods_the_journal(admin: Administrator) -> None:
    """What is too much is dropped, and with it no alarm: the journal counts them apart."""
    drop_in = "/etc/systemd/system/titus-py.service.d/flood.conf"
    admin.writes(drop_in, "[Service]\nLogRateLimitIntervalSec=60\nLogRateLimitBurst=5\n")
    admin.types("systemctl daemon-reload && systemctl restart titus-py")
    pid = admin.property("titus-py", "MainPID")
    admin.machine.run(
        "for number in $(seq 40); do curl --silent --output /dev/null --cacert"
        f" /etc/titus-py/www.crt --resolve www.example.org:443:127.0.0.1 {_URL}; done"
    )
    admin.types("pkill --signal KILL --exact titus-parent")
    admin.requests()
    ended = admin.journal(f"TITUS_EVENT=connection_ended _PID={pid} | wc -l")
    assert int(ended) < 40
    assert "alarm parent_died" in admin.journal(f"--priority=alert _PID={pid}")
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl restart titus-py")


def _hangs(admin: Administrator) -> None:
    """Its watchdog, of which the shipped unit is more patient, sees to it."""
    drop_in = "/etc/systemd/system/titus-py.service.d/watchdog.conf"
    admin.writes(drop_in, "[Service]\nWatchdogSec=5\n")
    admin.types("systemctl daemon-reload && systemctl restart titus-py")
    before = admin.property("titus-py", "MainPID")
    admin.types("systemctl kill --kill-whom=main --signal=STOP titus-py")
    admin.sees_it_start_anew(before)
    admin.requests()
    assert "watchdog" in admin.journal("--unit titus-py --lines 400").lower()
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl restart titus-py")


def _has_its_clock_stepped(admin: Administrator) -> None:
    """By a day, forward and back: nothing ends sooner for it, or later, or is restarted."""
    timeout, day = 8, 86_400
    clock = SteppedClock(admin.machine)
    drop_in = "/etc/systemd/system/titus-py.service.d/watchdog.conf"
    admin.writes(drop_in, "[Service]\nWatchdogSec=5\n")
    configuration = (admin.etc / "titus.toml").read_text()
    limits = f'handshake_timeout = "{timeout}s"\n[limits]\nidle_timeout = "{timeout}s"\n'
    admin.writes("/etc/titus-py/titus.toml", f"{_CONFIGURATION}\n{limits}")
    admin.types("systemctl daemon-reload && systemctl restart titus-py")
    pid = admin.property("titus-py", "MainPID")
    # Keyd, the parent and its workers are among them.
    pids = [process.split()[1] for process in admin.processes().splitlines()]
    assert pid in pids
    for one in pids:
        # One may have ended since: only that would be an excuse.
        there = f"readlink /proc/{one}/exe"
        admin.machine.run(f"grep --quiet clock.so /proc/{one}/maps || ! {there}")
    client = (_REPOSITORY / "tests/system/across_a_step.py").read_text()
    admin.writes("/root/across_a_step.py", client)
    for offset in (day, 0):
        admin.types(f"python3 /root/across_a_step.py {clock.offset_file} {offset} {timeout}")
        admin.requests()
        # The supervisor itself has the new time of day, and has not been up for a day.
        (seen,) = json.loads(admin.types("titus-py status --json"))
        expires = datetime.fromisoformat(seen["certificates"][0]["not_after"])
        expected = (expires - datetime.now(UTC)).days - offset // day
        assert seen["certificates"][0]["days_left"] == expected
        assert re.search(r"up \d+ (min|s)", admin.types("titus-py status"))
        admin.types("systemctl reload titus-py")
    assert admin.property("titus-py", "MainPID") == pid
    assert not admin.journal(f"--priority=alert _PID={pid}").strip()
    clock.remove()
    admin.writes("/etc/titus-py/titus.toml", configuration)
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl restart titus-py")


class Crowd:
    """Clients on the machine, for as long as something is done there."""

    def __init__(self, admin: Administrator) -> None:
        self._admin = admin
        (admin.machine.root / "root/crowd.py").write_bytes(_CROWD.read_bytes())
        # The certificate as it is now: another one is not what they came for.
        admin.types("cp /etc/titus-py/www.crt /root/crowd.crt; rm -f /root/crowd.over")
        admin.types(
            "systemd-run --unit=crowd --remain-after-exit"
            " -p StandardOutput=truncate:/root/crowd.out"
            " python3 /root/crowd.py /root/crowd.crt /root/crowd.over"
        )
        admin.types("until grep here /root/crowd.out; do sleep 0.1; done")

    def leaves(self) -> dict[str, Any]:
        self._admin.types("touch /root/crowd.over")
        self._admin.types(
            "while systemctl show --property=SubState crowd | grep running; do sleep 0.1; done"
        )
        seen = self._admin.types("tail -n 1 /root/crowd.out; systemctl stop crowd")
        found: dict[str, Any] = json.loads(seen)
        return found


@contextmanager
def _a_reload_that_takes_long(admin: Administrator) -> Iterator[None]:
    """For whatever else the administrator has done then. It fails, too."""
    drop_in = "/etc/systemd/system/titus-py.service.d/reload.conf"
    endless = "ExecReload=\nExecReload=sleep infinity\nTimeoutStartSec=infinity\n"
    admin.writes(drop_in, f"[Service]\n{endless}")
    admin.types("systemctl daemon-reload && systemctl reload --no-block titus-py")
    admin.sees_it_become("titus-py", "reloading")
    yield
    assert admin.property("titus-py", "ActiveState") == "reloading"
    admin.types("systemctl kill --kill-whom=control titus-py")
    admin.sees_it_become("titus-py", "active")
    admin.types(f"rm {drop_in} && systemctl daemon-reload")


def _upgrades(admin: Administrator) -> None:
    """Nobody is refused, and who is there stays; whatever was mistaken meanwhile."""
    before = admin.property("titus-py", "MainPID")
    crowd = Crowd(admin)
    admin.types("sed -i 's/^backend/backed/' /etc/titus-py/titus.toml")
    with _a_reload_that_takes_long(admin):
        seen = admin.types("apt-get install --quiet --quiet --yes /root/titus-py-2.deb")
    assert "did you mean backend?" in seen
    assert "titus-py.service goes on serving as before" in seen
    admin.types("sed -i 's/^backed/backend/' /etc/titus-py/titus.toml")
    admin.types("apt-get install --quiet --quiet --yes --reinstall /root/titus-py-2.deb")
    left = crowd.leaves()
    assert left["failures"] == []
    assert left["served"] >= 100
    assert left["stayed"]
    assert admin.property("titus-py", "MainPID") == before
    seen = admin.journal(f"_PID={before} TITUS_EVENT=program_changed")
    assert len(seen.strip().splitlines()) == 1
    # The files that it runs are those that are there.
    admin.types(f"grep deleted /proc/{before}/maps", fails=True)
    admin.types("titus-py audit --quiet")
    admin.requests()
    _loses_its_parent_while_it_is_upgraded(admin)
    admin.types("systemctl stop titus-py")
    assert not admin.processes()
    admin.types("apt-get install --quiet --quiet --yes --allow-downgrades /root/titus-py-1.deb")
    assert admin.property("titus-py", "ActiveState") == "inactive", "an upgrade starts nothing"


def _loses_its_parent_while_it_is_upgraded(admin: Administrator) -> None:
    """The files are the new ones, and nothing was restarted yet."""
    pid = admin.property("titus-py", "MainPID")
    admin.types("dpkg --unpack /root/titus-py-2.deb")
    admin.types("pkill --signal KILL --exact titus-parent")
    admin.requests()
    seen = admin.journal(f"_PID={pid} TITUS_EVENT=program_changed")
    assert len(seen.strip().splitlines()) == 2
    admin.types("dpkg --configure titus-py")
    admin.requests()
    assert admin.property("titus-py", "MainPID") == pid


def _is_removed_and_comes_back(admin: Administrator) -> None:
    """What was enabled, and running, runs again."""
    admin.types("systemctl start titus-py")
    admin.types("apt-get remove --quiet --quiet --yes titus-py")
    assert not admin.processes()
    admin.types("apt-get install --quiet --quiet --yes /root/titus-py-2.deb")
    admin.requests()
    # As on a machine that is set up by others: the configuration comes first.
    admin.types("cp -r /etc/titus-py /root/etc; apt-get purge --quiet --quiet --yes titus-py")
    admin.types("cp /root/etc/* /etc/titus-py/; rm -r /root/etc")
    admin.types(
        "DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes"
        " -o DPkg::Options::=--force-confold /root/titus-py-2.deb"
    )
    assert admin.property("titus-py", "UnitFileState") == "enabled"
    admin.requests()
    admin.types("systemctl stop titus-py")


def _activates_by_socket(admin: Administrator) -> None:
    admin.types("systemctl enable --now titus-py.socket")
    assert admin.property("titus-py", "ActiveState") == "inactive"
    admin.requests()
    admin.types("systemctl status titus-py.socket")
    admin.types("systemctl restart titus-py")
    admin.requests()
    admin.types("systemctl disable --now titus-py.socket titus-py")
    assert not admin.processes()


def _encrypts_the_key(admin: Administrator) -> None:
    admin.types(
        "systemd-creds encrypt --with-key=host --name=www.key"
        " /etc/titus-py/www.key /etc/titus-py/www.key.cred && rm /etc/titus-py/www.key"
    )
    admin.writes(
        "/etc/systemd/system/titus-py.service.d/key.conf",
        "[Service]\nLoadCredentialEncrypted=www.key:/etc/titus-py/www.key.cred\n",
    )
    admin.writes(
        "/etc/titus-py/titus.toml",
        _CONFIGURATION.replace("/etc/titus-py/www.key", "credential:www.key"),
    )
    admin.types("systemctl daemon-reload && systemctl start titus-py")
    admin.requests()
    admin.types("titus-py check", fails=True)
    admin.types("titus-py check --credentials /run/credentials/titus-py.service")
    admin.types("titus-py audit --quiet")


def _runs_keyd_as_a_unit(admin: Administrator) -> None:
    admin.types("rm /etc/systemd/system/titus-py.service.d/key.conf")
    admin.writes(
        "/etc/systemd/system/titus-keyd.service.d/key.conf",
        "[Service]\nLoadCredential=\nLoadCredentialEncrypted=www.key:/etc/titus-py/www.key.cred\n"
        # A machine within a container cannot always raise the limit for who is not root.
        'Environment="KEYS=--key %d/www.key --lock-memory=try"\n',
    )
    without_key = re.sub("key = .*\n", "", _CONFIGURATION)
    without_key = without_key.replace('user = "titus-keyd"', 'socket = "/run/titus-keyd/keyd.sock"')
    # A client that waits for the next keyd does so for as long as that takes to start.
    admin.writes("/etc/titus-py/titus.toml", f'{without_key}handshake_timeout = "60s"\n')
    admin.types("systemctl daemon-reload && systemctl enable --now titus-keyd.socket")
    admin.types("systemctl restart titus-py")
    admin.requests()
    admin.types("systemctl status titus-keyd")
    keyd = admin.property("titus-keyd", "MainPID")
    admin.types("systemctl restart titus-py")
    admin.requests()
    assert admin.property("titus-keyd", "MainPID") == keyd
    proxy = admin.property("titus-py", "MainPID")
    for interruption in ("restart", "kill --signal=KILL"):
        admin.types(f"systemctl {interruption} titus-keyd")
        # A client that comes before keyd has ended, or titus-py knows, is served as well.
        admin.requests()
        assert admin.property("titus-py", "MainPID") == proxy
    # So is one whose request the dying keyd has, and never answers.
    admin.types("systemctl kill --signal=STOP titus-keyd")
    begun = "titus-py status --json | grep -E '\"connections\": [1-9]'"
    killed = "systemctl kill --signal=KILL titus-keyd"
    seen = admin.types(f"{REQUEST} & until {begun}; do sleep 0.1; done; {killed}; wait $!")
    assert "It works." in seen
    _stops_a_keyd_that_cannot_start(admin)
    # It was titus-py who had it started, and not a restart after a pause.
    assert admin.property("titus-keyd", "NRestarts") == "0"
    admin.types("titus-py audit")
    assert not admin.journal(f"--priority=alert _PID={proxy}").strip()
    _loosens_keyds_unit(admin)


def _stops_a_keyd_that_cannot_start(admin: Administrator) -> None:
    """It is not tried again then."""
    drop_in = "/etc/systemd/system/titus-keyd.service.d/mistaken.conf"
    admin.writes(drop_in, '[Service]\nEnvironment="KEYS=--mistaken"\n')
    admin.types("systemctl daemon-reload && systemctl stop titus-keyd 2>&1")
    admin.types("until systemctl is-failed titus-keyd.socket; do sleep 0.2; done")
    admin.sees_it_become("titus-keyd.timer", "active")
    admin.types("systemctl stop titus-keyd")
    # Sooner than by itself.
    admin.sees_it_become("titus-keyd.timer", "inactive", 10)
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl start titus-keyd")
    admin.requests()


def _loosens_keyds_unit(admin: Administrator) -> None:
    """What the audit takes for right of a unit, it would not take from another one."""
    drop_in = "/etc/systemd/system/titus-keyd.service.d/loose.conf"
    admin.writes(
        drop_in,
        "[Service]\nSupplementaryGroups=adm\nPrivateIPC=no\nPrivateNetwork=no\n"
        "InaccessiblePaths=\nBindPaths=/srv\nBindReadOnlyPaths=/etc/passwd\n"
        "BindReadOnlyPaths=/etc:/usr/share/doc\n",
    )
    admin.types(
        "systemctl daemon-reload && systemctl restart titus-keyd && systemctl reload titus-py"
    )
    admin.requests()
    (made,) = json.loads(admin.types("titus-py audit --json", fails=True))
    found = {
        (one["process"]["role"], one["check"]): one["seen"]
        for one in made["findings"]
        if one["verdict"] == "broken"
    }
    assert set(found) == {("keyd", name) for name in ("groups", "namespaces", "network", "root")}
    for words in ("/srv", "/etc/passwd", "/usr/share/doc", "/dev/shm"):
        assert words in found["keyd", "root"]
    admin.writes(drop_in, "[Service]\nRootDirectory=\n")
    admin.types(
        "systemctl daemon-reload && systemctl restart titus-keyd && systemctl reload titus-py"
    )
    seen = admin.types("titus-py audit --quiet", fails=True)
    assert "its root is the machine's" in " ".join(seen.split())
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl restart titus-keyd")
    # Served once titus-py has connected again: it waits the longer, the oftener it has lost keyd.
    admin.requests()


def _looks_at_exposure(admin: Administrator) -> None:
    """What the documentation says of it is so."""
    documented = (_REPOSITORY / "docs/systemd.md").read_text()
    for unit in ("titus-py", "titus-keyd"):
        seen = admin.types(f"systemd-analyze security --no-pager {unit}.service | tail -n 1")
        figure = re.search(r"level for \S+: ([\d.]+)", seen)
        assert figure
        assert f"| `{unit}.service` | {figure[1]} |" in documented


def _is_told_what_a_unit_does_not_see(admin: Administrator) -> None:
    """A shell sees it, and so does ``titus-py check``."""
    admin.types("systemd-creds decrypt --name=www.key /etc/titus-py/www.key.cred /root/www.key")
    admin.types("chmod 600 /root/www.key")
    hidden = _CONFIGURATION.replace("/etc/titus-py/www.key", "/root/www.key")
    hidden = hidden.replace('"127.0.0.1:8080"', '"unix:/tmp/app.sock"').replace("21100", "21101")
    admin.writes("/etc/titus-py/hidden.toml", hidden.replace('"titus-keyd"', "2100099999"))
    seen = admin.types("titus-py check --config /etc/titus-py/hidden.toml")
    assert "key: /root/www.key is hidden from titus-py@hidden.service by ProtectHome=" in seen
    assert "backend: /tmp/app.sock is hidden from titus-py@hidden.service by PrivateTmp=" in seen
    assert "no socket is at /tmp/app.sock" in seen
    assert "hidden from" not in admin.types("titus-py check")
    admin.types("rm /root/www.key /etc/titus-py/hidden.toml")


def _runs_two_instances(admin: Administrator) -> None:
    """Beside the one, another on an address of its own, with uids of its own."""
    admin.types("openssl ecparam -name prime256v1 -genkey -noout -out /etc/titus-py/other.key")
    admin.types(
        "openssl req -x509 -key /etc/titus-py/other.key -subj /CN=other"
        " -out /etc/titus-py/other.crt"
    )
    admin.types("chmod 600 /etc/titus-py/other.key")
    other = _CONFIGURATION.replace("www.", "other.").replace("[::]:443", "127.0.0.1:8443")
    other = other.replace('"titus-keyd"', "2100099999")
    other = other.replace("21100", "21101")
    admin.writes("/etc/titus-py/other.toml", other)
    admin.types("systemctl start titus-py@other")
    admin.types("curl --silent --show-error --insecure https://127.0.0.1:8443/")
    audits = json.loads(admin.types("titus-py audit --json"))
    assert {made["result"] for made in audits} == {"holds"}
    assert [made["instance"]["listening"] for made in audits] == [["[::]:443"], ["127.0.0.1:8443"]]
    admin.types("systemctl stop titus-py@other")
    admin.requests()


def _removes(admin: Administrator) -> None:
    admin.types("systemctl start titus-py@other")
    admin.types("apt-get remove --quiet --quiet --yes titus-py")
    assert not admin.processes()
    assert (admin.etc / "titus.toml").exists()
    admin.types("systemctl daemon-reload; systemctl list-unit-files 'titus*'", fails=True)
    # What the administrator made is the administrator's to remove.
    admin.types("rm /etc/titus-py/www.* /etc/titus-py/other.*")
    admin.types("rm -r /etc/systemd/system/titus-*.d")
    admin.types("apt-get purge --quiet --quiet --yes titus-py")
    admin.types("getent passwd titus-keyd", fails=True)
    admin.types("getent group titus-keyd", fails=True)
    left = admin.types(
        "find /etc /usr /var/lib /var/cache /run -xdev ! -path '/var/cache/man/*'"
        " '(' -iname '*titus*' -o -name '*keyd*' ')' -cnewer /root/titus-py-2.deb"
    )
    assert not left.strip()
