"""Files that another user can write, or replace on the way to them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from titus_py.configuration import load
from titus_py.configuration.exposure import open_directories
from titus_py.configuration.mistake import Mistake

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the files are to be root's")

SOMEBODY = 9999
LISTEN = '[[listen]]\naddress = "[::]:443"\n'
VHOST = '[[vhost]]\ncertificate = "site.crt"\nkey = "links/key"\nbackend = "127.0.0.1:80"\n'
OF_CLIENTS = (
    'client_certificates = "required"\nclient_ca = "ca"\nclient_crl = "crl"\nclient_allow = "all"\n'
)

Change = Callable[[Path], None]


def mode(name: str, bits: int) -> Change:
    return lambda directory: (directory / name).chmod(bits)


def owner(name: str) -> Change:
    return lambda directory: os.chown(directory / name, SOMEBODY, 0, follow_symlinks=False)


def both(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


def warnings(directory: Path, change: Change) -> list[Mistake]:
    """Of a configuration with links and included files, all of it root's but for this change."""
    for name in ("links", "away", "secrets", "conf.d"):
        (directory / name).mkdir(mode=0o755)
    (directory / "secrets" / "key").touch(mode=0o600)
    # links/key -> away/key -> secrets/key
    (directory / "links" / "key").symlink_to("../away/key")
    (directory / "away" / "key").symlink_to(directory / "secrets" / "key")
    for name in ("site.crt", "ca", "crl", "conf.d/empty.toml"):
        (directory / name).touch(mode=0o644)
    (directory / "conf.d" / "one.toml").write_text(VHOST + OF_CLIENTS)
    path = directory / "titus.toml"
    path.write_text(f'include = ["conf.d/*"]\n{LISTEN}')
    change(directory)
    loaded = load(path)
    assert not loaded.mistakes
    return loaded.warnings


@pytest.mark.parametrize(
    "change",
    [
        mode("titus.toml", 0o644),
        mode("links", 0o1777),
        mode("ca", 0o644),
        # In a directory that is not sticky a link is as safe as the directory.
        owner("away/key"),
    ],
)
def test_what_nobody_else_can_replace(tmp_path: Path, change: Change) -> None:
    assert warnings(tmp_path, change) == []


@pytest.mark.parametrize(
    ("change", "key", "reason"),
    [
        (
            mode("links", 0o775),
            "vhost[0].key",
            "{0}/links/key: others than root can put another file in its place, in {0}/links "
            "(uid 0's, mode 0775): chown root, chmod go-w",
        ),
        (
            owner("away"),
            "vhost[0].key",
            "{0}/links/key: others than root can put another file in its place, in {0}/away "
            "(uid 9999's, mode 0755): chown root, chmod go-w",
        ),
        (
            both(mode("away", 0o1777), owner("away/key")),
            "vhost[0].key",
            "{0}/links/key: others than root can put another file in its place, in {0}/away "
            "(uid 0's, mode 1777): chown root, chmod go-w",
        ),
        (
            owner("titus.toml"),
            "",
            "{0}/titus.toml: uid 9999 owns it, and can write it: chown root",
        ),
        (
            mode("conf.d", 0o777),
            "",
            "{0}/conf.d/empty.toml: others than root can put another file in its place, in "
            "{0}/conf.d (uid 0's, mode 0777): chown root, chmod go-w",
        ),
        (
            mode("conf.d/empty.toml", 0o646),
            "",
            "{0}/conf.d/empty.toml: others than its owner can write it (mode 0646): chmod go-w",
        ),
        (
            mode("ca", 0o664),
            "vhost[0].client_ca",
            "{0}/ca: others than its owner can write it (mode 0664): chmod go-w",
        ),
        (
            owner("crl"),
            "vhost[0].client_crl",
            "{0}/crl: uid 9999 owns it, and can write it: chown root",
        ),
    ],
)
def test_what_somebody_else_can_replace(
    tmp_path: Path, change: Change, key: str, reason: str
) -> None:
    (warning,) = warnings(tmp_path, change)
    assert (warning.key, warning.reason) == (key, reason.format(tmp_path))
    in_file = "conf.d/one.toml" if key else "titus.toml"
    assert warning.file == str(tmp_path / in_file)


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert list(open_directories(tmp_path / "one", set())) == []


def test_dots_lead_to_the_directory_above(tmp_path: Path) -> None:
    """Who can write to a directory cannot change what is above it."""
    for name in ("below", "beside"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    (reason,) = open_directories(tmp_path / "below" / ".." / "beside" / "file", set())
    assert f"in {tmp_path}/beside (" in reason
