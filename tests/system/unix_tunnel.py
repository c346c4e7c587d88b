"""docs/tunnels.md, on a unix socket, under the unit: what its sandbox lets titus-py make.

The server is the virtual host of the same instance.
"""

import re
from pathlib import Path

from .administrator import Administrator

_GUIDE = (Path(__file__).parents[2] / "docs/tunnels.md").read_text()
_CONFIGURATION = "/etc/titus-py/titus.toml"
_DIRECTORY = "/run/titus-py/db-1"
_SOCKET = f"{_DIRECTORY}/web.sock"
_DROP_INS = "/etc/systemd/system/titus-py.service.d", "/etc/systemd/system/titus-py.socket.d"
_TUNNEL = f"""
[[tunnel]]
listen = "unix:{_SOCKET}"
socket_group = "www-data"
connect = "127.0.0.1:443"
server_name = "www.example.org"
ca = "/etc/titus-py/www.crt"
"""


def is_made_and_kept(admin: Administrator, configuration: str) -> None:
    """titus-py is stopped at first, and at the end, and has its configuration again."""
    admin.writes(_CONFIGURATION, configuration + _TUNNEL)
    assert f"there is no directory {_DIRECTORY}" in admin.types("titus-py check")
    admin.starts_in_vain("name it in the unit (RuntimeDirectory=)")
    found = re.search(r"`(RuntimeDirectory=\S+)`", _GUIDE)
    assert found
    admin.writes(f"{_DROP_INS[0]}/directory.conf", f"[Service]\n{found[1]}\n")
    admin.types("systemctl daemon-reload && systemctl restart titus-py")
    assert "there is no directory" not in admin.types("titus-py check")
    _serves(admin)
    before = admin.types(f"stat --format %i {_SOCKET}")
    admin.types("systemctl reload titus-py")
    assert admin.types(f"stat --format %i {_SOCKET}") == before
    # What a crash has left is replaced.
    killed = admin.property("titus-py", "MainPID")
    admin.types(f"systemctl kill --signal=KILL titus-py; test -S {_SOCKET}")
    admin.sees_it_start_anew(killed)
    _serves(admin)
    _belongs_to_another_user(admin, configuration)
    _is_made_by_systemd(admin, configuration)
    admin.writes(_CONFIGURATION, configuration)
    admin.types(f"rm -r {' '.join(_DROP_INS)} {_DIRECTORY} && systemctl daemon-reload")


def _serves(admin: Administrator, path: str = _SOCKET) -> None:
    """Those of its group, and nobody else."""
    curl = f"curl --silent --show-error --max-time 100 --unix-socket {path} http://www.example.org/"
    user = "setpriv --reuid=nobody --clear-groups --regid="
    assert admin.types(f"{user}www-data {curl}").strip() == "It works."
    admin.types(f"{user}nogroup {curl}", fails=True)


def _belongs_to_another_user(admin: Administrator, configuration: str) -> None:
    """That takes a capability which the unit has not; and a reload does not pass over it."""
    tunnel = _TUNNEL.replace("socket_group", 'socket_user = "nobody"\nsocket_group')
    admin.writes(_CONFIGURATION, configuration + tunnel)
    admin.types("systemctl reload titus-py", fails=True)
    assert "socket_user takes CAP_CHOWN" in admin.status("titus-py")
    _serves(admin)
    admin.writes(f"{_DROP_INS[0]}/chown.conf", "[Service]\nCapabilityBoundingSet=CAP_CHOWN\n")
    admin.types("systemctl daemon-reload && systemctl restart titus-py")
    assert admin.types(f"stat --format %U:%G {_SOCKET}").strip() == "nobody:www-data"
    admin.types("systemctl stop titus-py")
    admin.types(f"test -e {_SOCKET}", fails=True)


def _is_made_by_systemd(admin: Administrator, configuration: str) -> None:
    path = "/run/titus-py/db.sock"
    admin.writes(
        f"{_DROP_INS[1]}/tunnel.conf",
        "[Socket]\nListenStream=\n"
        f"ListenStream=[::]:443\nListenStream={path}\nSocketMode=0660\nSocketGroup=www-data\n",
    )
    without = _TUNNEL.replace('socket_group = "www-data"\n', "").replace(_SOCKET, path)
    admin.writes(_CONFIGURATION, configuration + without)
    admin.types("systemctl daemon-reload && systemctl start titus-py.socket")
    _serves(admin, path)
    admin.types("systemctl restart titus-py")
    _serves(admin, path)
    admin.types(f"systemctl stop titus-py.socket titus-py && rm {path}")
