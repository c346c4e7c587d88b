"""How PostgreSQL's clients and servers agree to begin TLS, before anything else is said.

Octets only, no I/O. A client asks by eight octets, and its server answers by one ("SSLRequest" and
"GSSENCRequest" in PostgreSQL's documentation, "Message Formats"). Used by the parent where a
listener has ``starttls``, and by workers where a tunnel has.
"""

import struct

__all__ = ["ASKING", "NO", "REQUEST_OCTETS", "SSL_REQUEST", "YES"]

_REQUEST = struct.Struct("!II")
REQUEST_OCTETS = _REQUEST.size
SSL_REQUEST = _REQUEST.pack(REQUEST_OCTETS, 80877103)
_GSSENC_REQUEST = _REQUEST.pack(REQUEST_OCTETS, 80877104)
#: For TLS, and for Kerberos, which is not to be had here.
ASKING = (SSL_REQUEST, _GSSENC_REQUEST)
YES, NO = b"S", b"N"
