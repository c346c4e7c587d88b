"""titus-py: a TLS-terminating proxy with a confined process for each connection."""
