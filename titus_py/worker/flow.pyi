STOOD_STILL: int
INTERRUPTED: int
CLIENT_ENDED: int
CLIENT_TRUNCATED: int
BACKEND_ENDED: int
CLIENT_SPOKE: int
ALL_TO_BACKEND: int
ALL_TO_CLIENT: int
CLIENT_FAILED: int
NOT_DECRYPTED: int
NOT_ENCRYPTED: int
NOT_FROM_CLIENT: int
NOT_TO_CLIENT: int
NOT_FROM_BACKEND: int
NOT_TO_BACKEND: int

OPEN: int
HELD_UP: int
ENDING: int
OVER: int

def use(read: int, write: int, get_error: int, bio_read: int, bio_write: int) -> None: ...
def run(
    #: An SSL, and its two BIOs: what goes in, and what comes out.
    tls: tuple[int, int, int],
    client: int,
    backend: int,
    patience: int,
    #: A buffer, the part that is still to be passed on, a count, what becomes of the direction.
    to_backend: tuple[memoryview, memoryview, memoryview, int],
    to_client: tuple[memoryview, memoryview, memoryview, int],
    encrypted: tuple[memoryview, memoryview, memoryview],
    allowance: int,
) -> tuple[int, bool, int, int, memoryview, memoryview, memoryview, int]:
    """Returns what happened, whether a side was ready before, a result of OpenSSL's and an errno
    if a call has failed, what is still to be passed on, and how much may still be received from the
    backend. Raises ValueError."""
