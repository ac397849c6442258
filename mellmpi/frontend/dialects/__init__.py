"""Answers in the forms of the HTTP APIs: one body, or a stream of server-sent events.

Both are renderings of the same `Output`s. Knows no sockets, no scheduler and no time.
"""

from mellmpi.frontend.dialects import messages_body, responses_body
from mellmpi.frontend.dialects.dialect import NEW, Dialect, FieldNames
from mellmpi.frontend.dialects.messages import COUNT_TOKENS, MESSAGES, MessagesDialect
from mellmpi.frontend.dialects.openai import OpenAIDialect
from mellmpi.frontend.dialects.responses import RESPONSES, ResponsesDialect
from mellmpi.frontend.dialects.sse import COMMENT
from mellmpi.frontend.fields import CHAT_ONLY, COMPLETIONS_ONLY, IGNORED, SHARED, UNSUPPORTED
from mellmpi.frontend.openai import CHAT, COMPLETIONS

__all__ = [
    "CHAT",
    "COMMENT",
    "COMPLETIONS",
    "COUNT_TOKENS",
    "FIELDS",
    "MESSAGES",
    "NEW",
    "RESPONSES",
    "Dialect",
    "FieldNames",
    "dialect_of",
]

FIELDS = {  # path -> names of the fields of its bodies
    CHAT: FieldNames((*SHARED, *CHAT_ONLY), IGNORED, UNSUPPORTED),
    COMPLETIONS: FieldNames((*SHARED, *COMPLETIONS_ONLY), IGNORED, UNSUPPORTED),
    RESPONSES: FieldNames(responses_body.KNOWN, responses_body.IGNORED, responses_body.UNSUPPORTED),
    MESSAGES: FieldNames(messages_body.KNOWN, messages_body.IGNORED, messages_body.UNSUPPORTED),
}


def dialect_of(url: str) -> type[Dialect]:
    """Return the dialect that is spoken at this path, and below it."""
    if url.startswith(MESSAGES):
        return MessagesDialect
    return ResponsesDialect if url.startswith(RESPONSES) else OpenAIDialect
