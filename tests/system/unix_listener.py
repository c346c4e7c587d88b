"""docs/proxy-protocol.md, "On the same machine", under the unit, with Debian's haproxy and nginx.

Both are as their packages have them, but for what the guide says. No port of titus-py's is open.
"""

import re
import textwrap
from pathlib import Path

from .administrator import Administrator

_GUIDE = (Path(__file__).parents[2] / "docs/proxy-protocol.md").read_text()
_CONFIGURATION = "/etc/titus-py/titus.toml"
_DROP_INS = "/etc/systemd/system/titus-py.service.d", "/etc/systemd/system/titus-py.socket.d"
#: In the guide; and where Debian's haproxy, which has another root directory, can get at it.
_SOCKET, _HAPROXYS = "/run/titus-py/https.sock", "/var/lib/haproxy/titus.sock"


def is_behind_a_balancer(admin: Administrator, configuration: str) -> None:
    """titus-py is stopped at first, and at the end, and has its configuration again."""
    section = _GUIDE.partition("### On the same machine")[2]
    listen, *_ = re.findall(r"^```toml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    indented = "".join(
        re.findall(r"^(?:    .*)?\n", section.partition("nginx with")[2], re.MULTILINE)
    )
    haproxys, nginxs, *_ = textwrap.dedent(indented).strip().split("\n\n")
    table = '[[listen]]\naddress = "[::]:443"\n'
    assert table in configuration
    _haproxy(admin, configuration.replace(table, listen), haproxys)
    _nginx(admin, configuration.replace(table, listen), nginxs)
    admin.writes(_CONFIGURATION, configuration)
    admin.types(f"rm -r {' '.join(_DROP_INS)} && systemctl daemon-reload")


def _haproxy(admin: Administrator, configuration: str, section: str) -> None:
    """titus-py makes the socket, once its unit lets it."""
    admin.writes(_CONFIGURATION, configuration.replace(_SOCKET, _HAPROXYS))
    admin.starts_in_vain("name its directory in the unit (ReadWritePaths=)")
    (line,) = set(re.findall(r"`(ReadWritePaths=/var/lib/haproxy)`", _GUIDE))
    admin.writes(f"{_DROP_INS[0]}/haproxy.conf", f"[Service]\n{line}\n")
    file = admin.machine.root / "etc/haproxy/haproxy.cfg"
    section = section.replace(_SOCKET, "/titus.sock")
    admin.writes("/etc/haproxy/haproxy.cfg", f"{file.read_text()}\n{section}\n")
    admin.types("systemctl daemon-reload && systemctl restart titus-py haproxy")
    admin.requests()
    haproxys = admin.types("id --user haproxy").strip()
    # The worker has ended a moment after its client has.
    seen = admin.types(
        "until journalctl --unit titus-py --output cat --boot | grep 'connection_ended.*balancer=';"
        " do sleep 0.1; done"
    )
    assert f'balancer="unix:uid={haproxys},pid=' in seen
    assert "client=127.0.0.1:" in seen
    admin.types("titus-py audit --quiet")
    # Another socket is there after a restart, and after a crash.
    admin.types("systemctl restart titus-py")
    admin.requests()
    killed = admin.property("titus-py", "MainPID")
    admin.types(f"systemctl kill --signal=KILL titus-py; test -S {_HAPROXYS}")
    admin.sees_it_start_anew(killed)
    admin.requests()
    admin.types("systemctl stop haproxy titus-py")
    admin.types(f"test -e {_HAPROXYS}", fails=True)


def _nginx(admin: Administrator, configuration: str, block: str) -> None:
    """systemd makes the socket, and keeps it."""
    admin.writes(_CONFIGURATION, configuration.replace('socket_group = "haproxy"\n', ""))
    admin.writes(
        f"{_DROP_INS[1]}/listener.conf",
        f"[Socket]\nListenStream=\nListenStream={_SOCKET}\nSocketMode=0660\nSocketGroup=www-data\n",
    )
    admin.types("rm --force /etc/nginx/sites-enabled/*")
    admin.writes("/etc/nginx/modules-enabled/99-titus.conf", block)
    admin.types("systemctl daemon-reload && systemctl start titus-py.socket nginx")
    admin.requests()
    admin.types("systemctl restart titus-py")
    admin.requests()
    curl = (
        f"curl --silent --insecure --max-time 100 --unix-socket {_SOCKET} https://www.example.org/"
    )
    admin.types(f"setpriv --reuid=nobody --regid=nogroup --clear-groups {curl}", fails=True)
    admin.types("systemctl stop nginx titus-py.socket titus-py")
    admin.types(f"rm {_SOCKET} /etc/nginx/modules-enabled/99-titus.conf")
