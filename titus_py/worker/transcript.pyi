#: The address of the function to give to SSL_CTX_set_msg_callback(3).
CALLBACK: int
#: The address of the function that the provider takes the messages from.
TAKE: int

def begin() -> None:
    """The messages of the handshake that comes next are kept, for the provider."""
