"""Answers in the forms of the HTTP APIs: one body, or a stream of server-sent events.

Both are renderings of the same `Output`s. Knows no sockets, no scheduler and no time.
"""

from mellmpi.frontend.dialects.dialect import NEW, Dialect
from mellmpi.frontend.dialects.messages import COUNT_TOKENS, MESSAGES, MessagesDialect
from mellmpi.frontend.dialects.openai import OpenAIDialect
from mellmpi.frontend.dialects.responses import RESPONSES, ResponsesDialect
from mellmpi.frontend.dialects.sse import COMMENT
from mellmpi.frontend.openai import CHAT, COMPLETIONS

__all__ = [
    "CHAT",
    "COMMENT",
    "COMPLETIONS",
    "COUNT_TOKENS",
    "MESSAGES",
    "NEW",
    "RESPONSES",
    "Dialect",
    "dialect_of",
]


def dialect_of(url: str) -> type[Dialect]:
    """Return the dialect that is spoken at this path, and below it."""
    if url.startswith(MESSAGES):
        return MessagesDialect
    return ResponsesDialect if url.startswith(RESPONSES) else OpenAIDialect
