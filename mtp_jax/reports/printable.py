"""Text that may come from anyone, made safe to show."""


def printable(text: str) -> str:
    """Escapes control characters: a text must not steer what shows it."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )
