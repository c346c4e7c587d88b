#: The address of the function to give to SSL_CTX_set_msg_callback(3).
CALLBACK: int

def tell(descriptor: int, /) -> None:
    """The handshake that comes next is for keyd to hear of, at this descriptor; -1: for nobody."""
