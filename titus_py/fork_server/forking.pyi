#: In calls, these stand for what an order says: the uid, and the descriptors of the report and of
#: the worker's socket.
ORDERED: tuple[int, int, int]

def fork_as_ordered(
    parent: int,
    first_uid: int,
    last_uid: int,
    flags: int,
    before: bytes,
    calls: bytes,
    after: bytes,
    title_address: int,
    title: bytes,
) -> tuple[int, int] | None:
    """Fork for each order on the socket ``parent``; returns None when it has hung up.

    ``flags`` are clone(2)'s. ``before`` and ``after`` are calls (encoded) that the fork server
    makes around each fork; each worker makes ``calls`` and stops at the first that fails. A worker
    puts ``title`` where its command line is. It returns the index of the call that failed, and its
    errno, or -1 and 0. Raises ValueError for an order with a uid beyond these two, and for what is
    no order; OSError.
    """
