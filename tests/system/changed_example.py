"""An upgrade to a package whose example configuration is another one: dpkg asks which to keep."""

from .administrator import Administrator

_FILE = "/etc/titus-py/titus.toml"
_INSTALLS = (
    "DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --allow-downgrades"
    " -o DPkg::Options::=--force-"
)


def is_asked_about(admin: Administrator, configuration: str) -> None:
    """With either answer, what serves goes on, and the administrator's file is there."""
    # The package's would not be served as it is.
    admin.types(
        "cd /root && dpkg-deb --raw-extract titus-py-2.deb new"
        " && sed -i 's/^Version: .*/&.1/' new/DEBIAN/control"
        f" && sed -i 's/^backend/# &/' new{_FILE} && dpkg-deb -Znone --build new titus-py-3.deb"
    )
    admin.writes(_FILE, configuration)
    admin.types("systemctl start titus-py")
    before = admin.property("titus-py", "MainPID")
    for answer, kept in (("confold", _FILE), ("confnew", f"{_FILE}.dpkg-old")):
        seen = admin.types(f"{_INSTALLS}{answer} /root/titus-py-3.deb 2>&1")
        assert ("goes on serving as before" in seen) == (answer == "confnew")
        admin.requests()
        assert admin.types(f"cat {kept}").strip() == configuration.strip()
        admin.types(f"test {kept} = {_FILE} || mv {kept} {_FILE}")
        admin.types(f"{_INSTALLS}confold /root/titus-py-2.deb")
        admin.requests()
    assert admin.property("titus-py", "MainPID") == before
    admin.types(f"rm -rf {_FILE}.dpkg-* /root/new /root/titus-py-3.deb; systemctl stop titus-py")
