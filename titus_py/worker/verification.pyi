from collections.abc import Callable

#: The address of the function to give to SSL_CTX_set_verify(3).
CALLBACK: int

def ask(judge: Callable[[int, int], bool], /) -> None: ...
