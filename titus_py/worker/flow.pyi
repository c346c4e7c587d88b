STOOD_STILL: int
UNUSUAL: int
CLIENT_ENDED: int
BACKEND_ENDED: int
NOT_READ: int
NOT_WRITTEN: int
NOT_SENT: int
NOT_RECEIVED: int

#: A buffer, the part of it that is still to be passed on, the count, whether more may come.
_Way = tuple[memoryview, memoryview, memoryview, bool]

def use(read: int, write: int, get_error: int, pending: int) -> None: ...
def run(
    ssl: int,
    client: int,
    backend: int,
    patience: int,
    to_backend: _Way,
    to_client: _Way,
) -> tuple[int, bool, int, int, memoryview, memoryview]:
    """Returns what happened, whether a side was ready before, a result of OpenSSL's and an errno
    if a call has failed, and what is still to be passed on. Raises ValueError."""
