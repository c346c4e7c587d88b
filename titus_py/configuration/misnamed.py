"""Whether certificates are for the names of their virtual hosts, and which is shown for which.

Run by the supervisor (root) and by commands, when the certificates have been read.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from titus_py.configuration.certificate_dir import chosen
from titus_py.configuration.loading import Loaded
from titus_py.configuration.mistake import Mistake
from titus_py.configuration.names import uncovered
from titus_py.configuration.tables import Credential, VirtualHost

if TYPE_CHECKING:
    from titus_py.configuration.checking import CertificateFacts

__all__ = ["misnamed", "misnamed_in_directories", "names_shown", "some"]

#: How many names, or virtual hosts, a message shows.
_SHOWN = 5


def misnamed(
    loaded: Loaded, certificates: "Mapping[Credential, CertificateFacts]"
) -> Iterator[Mistake]:
    """Warnings of virtual hosts with a certificate for other names than they have, or others."""
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    for number, vhost in enumerate(vhosts):
        shown = {
            place: (credential.certificate, certificates[credential].names)
            for place, credential in vhost.credentials.items()
            if credential in certificates
        }
        for place, (file, names) in shown.items():
            if not names:
                yield loaded.source.mistake(
                    f"vhost[{number}].{place}certificate",
                    f"{file} has no name in it (subjectAltName): no client will accept it",
                )
            elif missing := uncovered(vhost.sni or (), names):
                yield loaded.source.mistake(
                    f"vhost[{number}].sni",
                    f"{file} is not for {some(missing)}, and clients will refuse it: "
                    f"it is for {some(names)}",
                )
        for (one, names), (other, others) in itertools.pairwise(shown.values()):
            if set(names) != set(others):
                yield loaded.source.mistake(
                    f"vhost[{number}].certificates",
                    f"{one} is for {some(names)}, and {other} for {some(others)}: which of them "
                    "a client is shown depends on the kinds of keys that it knows",
                )


def misnamed_in_directories(
    loaded: Loaded, certificates: "Mapping[Credential, CertificateFacts]"
) -> Iterator[Mistake]:
    """Warnings of certificates in directories that are never shown, or not for all their names."""
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    for number, vhost in enumerate(vhosts):
        shown = names_shown(vhost, certificates)
        for credential, facts in certificates.items():
            if vhost.certificate_dir is None or credential.directory != vhost.certificate_dir:
                continue
            key = f"vhost[{number}].certificate_dir"
            others = [shown[name.lower()] for name in facts.names]
            if not facts.names:
                reason = "has no name in it (subjectAltName): no client is shown it"
                yield loaded.source.mistake(key, f"{credential.certificate} {reason}")
            elif other := next((one for one in others if one != credential), None):
                names = [
                    name for name, one in zip(facts.names, others, strict=True) if one != credential
                ]
                yield loaded.source.mistake(
                    key,
                    f"{credential.certificate} is not shown for {some(names)}: "
                    f"{other.certificate} is for the same, and valid for longer, or as long",
                )


def names_shown(
    vhost: VirtualHost, certificates: "Mapping[Credential, CertificateFacts]"
) -> dict[str, Credential]:
    """Which certificate of its directory a virtual host shows for which name."""
    return chosen(
        (credential, facts.names, facts.not_after)
        for credential, facts in certificates.items()
        if vhost.certificate_dir is not None and credential.directory == vhost.certificate_dir
    )


def some(names: Sequence[str]) -> str:
    """A few of many names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
