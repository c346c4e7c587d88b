"""docs/keyd.md, followed to the letter on a machine with systemd: nginx's key goes to keyd."""

import re
import shutil
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from .administrator import Administrator, package
from .machine import Machine

_REPOSITORY = Path(__file__).parents[2]
_GUIDE = (_REPOSITORY / "docs/keyd.md").read_text()
_TOKENS = (_REPOSITORY / "docs/tokens.md").read_text()
_UNIT = "keyd@nginx"
_URL = "https://www.example.org/"
_LOCAL_URL = "https://127.0.0.1/"


@pytest.fixture
def administrator() -> Iterator[Administrator]:
    with Machine() as machine:
        package(1, machine.root / "root/titus-py.deb")
        yield Administrator(machine)


def _blocks(heading: str, indent: int, guide: str = _GUIDE) -> list[str]:
    """What the guide has to be typed below this heading, block by block."""
    section = re.split(r"^## ", guide.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    without_files = re.sub(r"^ *```.*?^ *```$", "", section, flags=re.DOTALL | re.M)
    blocks = re.findall(rf"(?:^ {{{indent}}}.*\n)+", without_files, re.MULTILINE)
    return [textwrap.dedent(block).rstrip() for block in blocks]


def _file(language: str) -> str:
    found = re.search(rf"^ *```{language}\n(.*?)^ *```$", _GUIDE, re.DOTALL | re.MULTILINE)
    assert found
    return textwrap.dedent(found[1])


def _requests(admin: Administrator, retries: int = 20) -> str:
    """By a client that trusts what is nginx's certificate now; it may have to wait."""
    return admin.types(
        f"curl --silent --show-error --fail --max-time 20 --retry {retries} --retry-all-errors"
        " --retry-delay 1 --cacert /etc/nginx/www.crt"
        f" --resolve www.example.org:443:127.0.0.1 {_URL}"
    )


def _makes_a_certificate(admin: Administrator, stem: str) -> None:
    admin.types(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30"
        f" -subj '/O={Path(stem).name}/CN=www.example.org'"
        f" -addext subjectAltName=DNS:www.example.org"
        f" -keyout {stem}.key -out {stem}.crt 2>/dev/null"
    )


@pytest.mark.timeout(900)  # a minute, where nothing else runs
def test_the_guide_is_right(administrator: Administrator) -> None:
    admin = administrator
    admin.types("apt-get install --quiet --quiet --yes /root/titus-py.deb")
    assert not admin.types(
        f"systemd-analyze verify {_UNIT}.service {_UNIT}.socket {_UNIT}.timer"
    ).strip()
    # A machine within a container cannot always raise the limit for who is not root.
    admin.writes(
        "/etc/systemd/system/keyd@.service.d/lock.conf",
        "[Service]\nEnvironment=OPTIONS=--lock-memory=try\n",
    )
    admin.types("mkdir -p /var/www/html && echo It works. > /var/www/html/index.html")
    _makes_a_certificate(admin, "/etc/nginx/www")
    gives_key, says_who, writes_reference, looks = _blocks("nginx in five minutes", 8)
    for typed in (gives_key, says_who, writes_reference):
        admin.types(typed)
    # It stays right when the release's Python is another one.
    admin.types("grep 'module = /usr/lib/titus-py/keyd_provider.so$' /etc/nginx/openssl-keyd.cnf")
    admin.writes("/etc/nginx/sites-enabled/www", _file("nginx"))
    admin.types("systemctl restart nginx")
    curl, status, audit = looks.splitlines()
    assert "It works." in admin.types(curl)
    # keyd writes its page once a second.
    admin.types(f"until {status} | grep -E 'signed +[1-9]'; do sleep 0.2; done")
    seen = admin.types(status)
    for words in ("keyd@nginx.service: ", "key_www.key", "rw-rw----  root:www-data"):
        assert words in seen
    seen = admin.types(audit)
    assert "broken" not in seen
    for file in ("/etc/nginx/www.key", "/etc/titus-keyd/nginx/www.key"):
        assert f"in {file} (rw-------, uid 0, gid 0)" in seen
    admin.types("rm /etc/nginx/www.key")
    _goes_back(admin)
    for typed in (gives_key, says_who, writes_reference):
        admin.types(typed)
    admin.writes("/etc/nginx/sites-enabled/www", _file("nginx"))
    admin.types("rm /etc/nginx/www.key; systemctl restart nginx")
    _is_measured(admin)
    _is_restarted(admin)
    _cannot_start(admin)
    _is_asked_by_others(admin)
    _is_another_user_than_the_next_one(admin)
    _is_renewed(admin)
    _serves_stunnel_as_well(admin)
    _has_its_key_in_a_token(admin)
    _is_exposed_as_documented(admin)
    _is_removed(admin)


def _goes_back(admin: Administrator) -> None:
    """nginx is as it was before: nothing asks for keyd."""
    takes_key, leaves = _blocks("Back to a key in a file", 4)
    admin.types(takes_key)
    with_key = _file("nginx").replace("www.reference", "www.key")
    admin.writes("/etc/nginx/sites-enabled/www", with_key)
    admin.types(leaves)
    _requests(admin)
    assert not admin.types("ls -R /etc/nginx/modules-enabled | grep keyd || true").strip()
    assert not admin.property("nginx", "Environment")


def _is_measured(admin: Administrator) -> None:
    """By cron, which looks for programs in fewer directories than a shell does (crontab(5))."""
    (line,) = re.findall(r"^ {4}\* \* \* \* \* root (.*)$", _GUIDE, re.MULTILINE)
    admin.types("mkdir -p /var/lib/prometheus/node-exporter")
    admin.types(f"env -i PATH=/usr/bin:/bin sh -c '{line}'")
    assert "keyd_keys{" in admin.types("cat /var/lib/prometheus/node-exporter/keyd.prom")


def _is_restarted(admin: Administrator) -> None:
    """Either, without the other: a client has to wait, and no more."""
    for unit in (_UNIT, "nginx", f"{_UNIT}.socket"):
        admin.types(f"systemctl restart {unit}")
        _requests(admin)
    # The C library's upgrade removes what its loader has noted, and keyd may be started then.
    admin.types(f"mv /etc/ld.so.cache away && systemctl restart {_UNIT}")
    _requests(admin, retries=0)
    admin.types("mv away /etc/ld.so.cache")
    # As its package's upgrade has it done: the one that runs starts the next one.
    assert "failed" not in admin.types("/etc/init.d/nginx upgrade")
    _requests(admin, retries=0)
    # Killed, and started again by the next one who asks, whose handshake waits for it: also where
    # it came before keyd had ended.
    admin.types(f"systemctl kill --signal=KILL {_UNIT}")
    _requests(admin, retries=0)
    admin.types(f"systemctl kill --signal=KILL {_UNIT}")
    admin.types(f"until systemctl is-failed {_UNIT}; do sleep 0.1; done")
    _requests(admin, retries=0)
    assert admin.property(_UNIT, "ActiveState") == "active"


def _cannot_start(admin: Administrator) -> None:
    """It is tried a few times for a client that waits, and then at times: clients fail at once."""
    keys = "/etc/titus-keyd/nginx"
    drop_in = f"/etc/systemd/system/{_UNIT}.service.d/mistaken.conf"
    admin.types(f"mv {keys} away && mkdir {keys} && touch {keys}/none")
    admin.types(f"systemctl stop {_UNIT}.service 2>&1")
    _fails_visibly(admin, "not started: no private key in /run/credentials/keyd@nginx.service")
    # Whichever is stopped, nothing starts it again.
    for unit in ("service", "socket"):
        admin.types(f"systemctl stop {_UNIT}.{unit}")
        # Sooner than by itself.
        admin.sees_it_become(f"{_UNIT}.timer", "inactive", 10)
        admin.types(f"systemctl start {_UNIT}.socket")
        _fails_visibly(admin, "not started: no private key in /run/credentials/keyd@nginx.service")
    # It comes back by itself once there is a key.
    admin.types(f"rm -r {keys} && mv away {keys}")
    admin.types(f"until systemctl is-active {_UNIT}; do sleep 0.2; done")
    _requests(admin)

    # Mistaken options are as bad, and one command has it tried at once when they are mended.
    admin.writes(drop_in, "[Service]\nEnvironment=OPTIONS=--mistaken\n")
    admin.types(f"systemctl daemon-reload && systemctl restart {_UNIT}", fails=True)
    _fails_visibly(admin, "status=2/INVALIDARGUMENT")
    # The package leaves, and comes back: what waited to be tried again is tried again.
    admin.types("apt-get remove --quiet --quiet --yes titus-py")
    assert admin.property(f"{_UNIT}.timer", "ActiveState") == "inactive"
    admin.types("apt-get install --quiet --quiet --yes /root/titus-py.deb")
    _fails_visibly(admin, "status=2/INVALIDARGUMENT")
    admin.types(f"rm {drop_in} && systemctl daemon-reload && systemctl restart {_UNIT}")
    _requests(admin)


def _fails_visibly(admin: Administrator, reason: str) -> None:
    admin.types(f"curl --silent --insecure --max-time 60 {_LOCAL_URL}", fails=True)
    admin.types(f"until systemctl is-failed {_UNIT}.socket; do sleep 0.2; done")
    assert admin.property(f"{_UNIT}.socket", "Result") == "trigger-limit-hit"
    assert reason in admin.status(_UNIT, fails=True)
    admin.sees_it_become(f"{_UNIT}.timer", "active")


def _is_asked_by_others(admin: Administrator) -> None:
    """Who is not of the group cannot even connect; and keyd is nobody who could be another keyd."""
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        " s.connect('/run/titus-keyd/nginx.sock')"
    )
    for group, fails in (("www-data", False), ("nogroup", True)):
        who = f"setpriv --reuid=nobody --regid={group} --clear-groups"
        seen = admin.types(f'{who} python3 -c "{script}"', fails=fails)
        assert ("PermissionError" in seen) == fails
    pid = admin.property(_UNIT, "MainPID")
    status = admin.types(f"cat /proc/{pid}/status")
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    assert int(re.search(r"^Uid:\t(\d+)", status, re.MULTILINE)[1]) >= 61184  # type: ignore[index]


def _is_another_user_than_the_next_one(admin: Administrator) -> None:
    admin.types("cp -r /etc/titus-keyd/nginx /etc/titus-keyd/other; systemctl start keyd@other")
    uids = {
        admin.types(f"stat --format %u /proc/{admin.property(unit, 'MainPID')}")
        for unit in (_UNIT, "keyd@other")
    }
    assert len(uids) == 2
    admin.types("systemctl stop keyd@other.socket keyd@other && rm -r /etc/titus-keyd/other")


def _is_renewed(admin: Administrator) -> None:
    _makes_a_certificate(admin, "new")
    first, last = _blocks("A renewed certificate", 4)[:2]
    admin.types(first)
    _requests(admin)
    admin.types(last)
    _requests(admin)
    # A file that is no key does not take the others out of service.
    admin.types("cp new.crt /etc/titus-keyd/nginx/")
    admin.types(f"systemctl restart {_UNIT}")
    _requests(admin)
    assert "left out: " in admin.journal(f"--unit {_UNIT}")
    admin.types("rm /etc/titus-keyd/nginx/new.crt new.crt new.key")


def _serves_stunnel_as_well(admin: Administrator) -> None:
    """On a port that takes a privilege, which it has after a reload as well."""
    (drop_in,) = re.findall(r"^### stunnel\n(?s:.*?)((?:^ {4}.*\n)+)", _GUIDE, re.MULTILINE)
    admin.types("systemctl stop nginx; cp -r /etc/titus-keyd/nginx /etc/titus-keyd/stunnel")
    admin.types("cp /etc/nginx/www.crt /etc/nginx/www.reference /etc/stunnel/")
    socket = "/run/titus-keyd/stunnel.sock"
    admin.types(f"keyd openssl-conf --socket {socket} > /etc/stunnel/openssl-keyd.cnf")
    drop_ins = "/etc/systemd/system"
    admin.writes(f"{drop_ins}/keyd@stunnel.socket.d/x.conf", "[Socket]\nSocketGroup=stunnel4\n")
    admin.writes(f"{drop_ins}/stunnel@www.service.d/x.conf", textwrap.dedent(drop_in))
    admin.writes("/etc/stunnel/www.conf", _file("ini"))
    admin.types("systemctl daemon-reload && systemctl start keyd@stunnel.socket")
    admin.types("systemctl start stunnel@www")
    admin.has_a_backend()
    _requests(admin)
    admin.types("systemctl reload stunnel@www")
    _requests(admin)
    admin.types(
        "systemctl stop stunnel@www keyd@stunnel.socket keyd@stunnel; systemctl start nginx"
    )


def _has_its_key_in_a_token(admin: Administrator) -> None:
    """docs/tokens.md for nginx, except that nothing can be fetched here."""
    (theirs,) = (admin.machine.root / "usr/lib/titus-py/lib").glob("python3.*/site-packages")
    for name in ("pkcs11", "asn1crypto"):
        shutil.copytree(Path(sysconfig.get_path("platlib"), name), theirs / name)
    blocks = _blocks("A whole example, with SoftHSM", 4, _TOKENS)
    admin.types("mv /etc/titus-keyd/nginx/new.key site.key")
    admin.types(blocks[0])
    (unit,) = [block for block in blocks if block.startswith("[Service]")]
    drop_in = f"/etc/systemd/system/{_UNIT}.service.d/token.conf"
    admin.writes(drop_in, unit.replace("OPTIONS=", "OPTIONS=--lock-memory=try ") + "\n")
    admin.types(f"systemctl daemon-reload && systemctl restart {_UNIT}")
    _requests(admin)
    admin.types("until keyd status | grep 'token    web  ready  (signed [1-9]'; do sleep 0.2; done")
    assert "left out: " not in admin.journal(f"_PID={admin.property(_UNIT, 'MainPID')}")
    admin.types(f"rm {drop_in} && mv site.key /etc/titus-keyd/nginx/new.key")
    admin.types(f"systemctl daemon-reload && systemctl restart {_UNIT}")


def _is_exposed_as_documented(admin: Administrator) -> None:
    documented = (_REPOSITORY / "docs/systemd.md").read_text()
    seen = admin.types(f"systemd-analyze security --no-pager {_UNIT}.service | tail -n 1")
    figure = re.search(r"level for \S+: ([\d.]+)", seen)
    assert figure
    assert f"| `{_UNIT}.service` | {figure[1]} |" in documented


def _is_removed(admin: Administrator) -> None:
    seen = admin.types("apt-get purge --quiet --quiet --yes titus-py")
    assert (
        f"titus-py: stopped: {_UNIT}. The servers whose keys are there serve no new client" in seen
    )
    assert not admin.processes()
    admin.types("systemctl daemon-reload")
    assert not admin.types("systemctl list-units --plain --no-legend 'keyd@*'").strip()
    # The key is the administrator's, and stays.
    admin.types("ls /etc/titus-keyd/nginx/new.key")
