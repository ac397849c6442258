"""Server-sent events: bytes as they arrive to the data of whole events.

Source: HTML Living Standard, section 9.2.6, "Interpreting an event stream".
"""

LONGEST_LINE = 1 << 24  # bytes
MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8


class EventStream:
    """An incremental parser. Lines end with LF, CRLF or CR; pieces may be split anywhere.

    Comments and all fields but `data` are ignored: OpenAI servers use `data` alone.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line
        self._data: list[bytes] = []  # of an event
        self._is_begun = False

    def feed(self, piece: bytes) -> list[str]:
        """Return the data of the events that `piece` completes.

        Raises ValueError if a line has more than LONGEST_LINE bytes.
        """
        text, held = self._rest + piece, b""
        if not self._is_begun:
            if len(text) < len(MARK) and MARK.startswith(text):
                self._rest = text
                return []
            text, self._is_begun = text.removeprefix(MARK), True
        if b"\r" in text:
            if text.endswith(b"\r"):  # perhaps the first half of CRLF
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        if len(rest) > LONGEST_LINE:
            raise ValueError(f"a line of over {LONGEST_LINE:,} bytes")
        self._rest = rest + held
        return self._events(lines)

    def finish(self) -> list[str]:
        """Return the data of an event that the end of the stream cuts before its blank line.

        The standard drops such an event. Some servers end with `data: [DONE]` alone.
        """
        return self.feed(b"\n\n")

    def _events(self, lines: list[bytes]) -> list[str]:
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                found.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data = []
        return found
