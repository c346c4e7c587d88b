"""Why a connection is over: what failed on either side, as the end that is recorded.

Used by the worker.
"""

import errno
import os

from OpenSSL import SSL

from titus_py.between.report import End

__all__ = ["Ended", "backend_failure", "client_failure", "describe", "reason"]

#: Errors that say nothing beyond the name of the end.
_RESETS = errno.ECONNRESET, errno.EPIPE


class Ended(Exception):
    """The connection is over, and its end was not clean."""

    def __init__(self, end: End, detail: str = "") -> None:
        super().__init__(end, detail)
        self.end = end
        self.detail = detail


def client_failure(error: SSL.Error) -> Ended:
    if isinstance(error, SSL.SysCallError):
        return Ended(End.CLIENT_RESET, reason(error.args[0]))
    return Ended(End.CLIENT_PROTOCOL_ERROR, describe(error))


def backend_failure(error: OSError) -> Ended:
    return Ended(End.BACKEND_RESET, reason(error.errno or 0))


def reason(number: int) -> str:
    """The error in words (that a peer does not answer, perhaps); empty if it is a mere reset."""
    return "" if number <= 0 or number in _RESETS else os.strerror(number)


def describe(error: SSL.Error) -> str:
    """OpenSSL's reasons, in its own words."""
    reasons = [reason for _, _, reason in error.args[0]] if error.args else []
    return "; ".join(dict.fromkeys(reasons)) or "unknown TLS error"
