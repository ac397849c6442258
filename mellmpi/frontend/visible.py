"""Text of users, made safe for a terminal."""

import re

# Control characters (ESC, CR, C1 and all others), direction marks, line ends that are not \n, and
# lone surrogates, which no encoding can write.
ACTED_UPON = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` in one line, with escapes such as \\x1b for all that a terminal would act upon."""
    return ACTED_UPON.sub(lambda found: ascii(found[0])[1:-1], text)


def visible_lines(text: str) -> str:
    """As `visible`, but line ends stay, and tabs become spaces."""
    return "\n".join(visible(line.expandtabs(4)) for line in text.split("\n"))
