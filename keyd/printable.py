"""What others have written, for a terminal: the text of a file, a name, a report, a peer's words.

Run by the command-line tools, and by whoever says what is wrong with a configuration.
"""

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text as one line that is safe for any terminal, whatever a file or its name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
