"""What the cryptography library loads to judge addresses of mail is not loaded.

Called by programs of ours that start often, or whose memory many processes inherit: what checks
keys and handshakes, the fork server. Names are put into no certificate there, so that nobody calls
what judges them, and reading a certificate does not. A tenth of what these programs would load.
"""

import sys
from types import ModuleType

__all__ = ["load_certificates_without_mail"]

_MAIL = "email.utils"


def load_certificates_without_mail() -> None:
    """Before anything else of cryptography's certificates is imported.

    Afterwards, who imports ``email.utils`` gets it.
    """
    if _MAIL in sys.modules:
        return
    nothing = ModuleType(_MAIL)
    vars(nothing)["parseaddr"] = None
    sys.modules[_MAIL] = nothing
    try:
        import cryptography.x509  # noqa: F401
    finally:
        del sys.modules[_MAIL]
