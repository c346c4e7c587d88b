"""The real commands against real peers."""
