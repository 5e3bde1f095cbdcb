"""Characters of UTF-8 that are not complete yet."""

import codecs

MOST_BYTES = 4  # of a character in UTF-8


def pending_bytes(data: bytes) -> int:
    """The number of bytes at the end of UTF-8 that wait for the rest of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])
