#: The address of the function to give to SSL_CTX_set_alpn_select_cb(3). Its last argument is the
#: server's list as in RFC 7301, with a name of no octets at the end.
CALLBACK: int
