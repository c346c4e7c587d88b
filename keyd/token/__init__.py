"""Keys in tokens (PKCS #11): their URIs, keyd's side, and the process with the vendor's module."""
