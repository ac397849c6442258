"""Escapes control characters in text of users, to print it safely on a terminal."""

import re

# Control characters (C0 and C1), direction marks, the line ends U+2028 and U+2029, and lone
# surrogates, which no encoding can write.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return `text` as one line, with an escape such as \\x1b for each unsafe character."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def visible_lines(text: str) -> str:
    """Like `visible`, but keep line ends, and replace tabs by spaces."""
    return "\n".join(visible(line.expandtabs(4)) for line in text.split("\n"))
