"""Users and groups by name, as the command line of a keyd of its own and a configuration have them.

Run before any key is read, and as root if it was started so.
"""

import grp
import pwd

__all__ = ["gid_of", "user_of"]


def user_of(name: str) -> pwd.struct_passwd:
    """Raises LookupError, saying what to do."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        make = f"useradd --system --no-create-home --shell /usr/sbin/nologin {name}"
        raise LookupError(f"no user is named \"{name}\": create it with '{make}'") from None


def gid_of(name: str) -> int:
    """Raises LookupError, saying what to do."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        make = f"groupadd --system {name}"
        raise LookupError(f"no group is named \"{name}\": create it with '{make}'") from None
