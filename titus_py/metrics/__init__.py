"""The metrics server: a process without privilege that answers whoever asks for the metrics."""

__all__: list[str] = []
