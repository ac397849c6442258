"""Server-sent events (WHATWG HTML, section 9.2)."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
COMMENT = b": %b\n\n"  # clients ignore comments; proxies see that the connection is alive


def event(data: dict[str, Any], name: str = "", id: str = "") -> bytes:
    """Return one event with a JSON object as its data."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = (f"id: {id}\n" if id else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {text}\n\n".encode("utf-8", "backslashreplace")
