"""Writes constraints.txt: the versions, here, of everything that titus-py needs to run.

Run by ``make constraints``, in the environment in which the tests have passed. What is
installed is held to these versions, so that the TLS library is the one that was tested.
"""

from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(package: str) -> set[str]:
    """What this package needs, and what that needs."""
    found: set[str] = set()
    wanted = [package]
    while wanted:
        for requirement in map(Requirement, requires(wanted.pop()) or ()):
            name = canonicalize_name(requirement.name)
            marker = requirement.marker
            if name not in found and (marker is None or marker.evaluate({"extra": ""})):
                found.add(name)
                wanted.append(name)
    return found


print("# The versions that were tested together: written by `make constraints`.")
for name in sorted(closure("titus-py")):
    print(f"{name}=={version(name)}")
