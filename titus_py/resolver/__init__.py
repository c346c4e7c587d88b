"""The resolver: a process without privilege that asks name servers for the supervisor."""

__all__: list[str] = []
