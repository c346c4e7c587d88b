"""Other people's servers, as Debian packages them, with their keys in keyd."""
