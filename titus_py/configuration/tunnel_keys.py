"""That a key signs as a server or as a client, not as both, and is not taken for the other end's.

Run by the supervisor (root) and by commands, when the certificates have been read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping

from titus_py.configuration.loading import Loaded
from titus_py.configuration.mistake import Mistake
from titus_py.configuration.tables import Credential, VirtualHost

__all__ = ["keys_for_both", "own_pins"]


def keys_for_both(
    loaded: Loaded,
    keys: Mapping[Credential, bytes],
    keys_of: Callable[[VirtualHost], set[bytes]],
    lent: Collection[bytes],
) -> Iterator[Mistake]:
    """Mistakes of tunnels whose key is a virtual host's, too, or another host's.

    ``keys`` are the keys' ids, ``lent`` those of keys that are lent.
    """
    configuration, source = loaded.configuration, loaded.source
    tunnels = configuration.tunnel if configuration is not None else ()
    for number, tunnel in enumerate(tunnels):
        key = keys.get(tunnel.credential) if tunnel.credential is not None else None
        if key in lent:
            yield source.mistake(
                f"tunnel[{number}].certificate",
                f"{tunnel.certificate} is for a key that is lent to other hosts, to sign as a "
                "server. Make a key for the tunnel alone",
            )
        for other, vhost in enumerate(configuration.vhost if configuration is not None else ()):
            if key is not None and key in keys_of(vhost):
                yield source.mistake(
                    f"tunnel[{number}].certificate",
                    f"{tunnel.certificate} is for a key that signs as a server, too, for "
                    f"{source.reference(f'vhost[{other}]')}: whoever takes a worker of one over "
                    "could pass for the other. Make a key for the tunnel alone",
                )
                break


def own_pins(loaded: Loaded, keys: Mapping[Credential, bytes]) -> Iterator[Mistake]:
    """Warnings of tunnels that take a server for the one that has their own key."""
    tunnels = loaded.configuration.tunnel if loaded.configuration is not None else ()
    for number, tunnel in enumerate(tunnels):
        key = keys.get(tunnel.credential) if tunnel.credential is not None else None
        if key is not None and key.hex() in (tunnel.pins or ()):
            yield loaded.source.mistake(
                f"tunnel[{number}].pins",
                f"one is of {tunnel.certificate}, which this tunnel shows itself. A pin here is of "
                "a server's key; its own is for the server's client_allow",
            )
