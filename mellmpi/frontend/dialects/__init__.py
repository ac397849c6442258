"""Answers in the forms of the HTTP APIs: one body, or a stream of server-sent events.

Both are renderings of the same `Output`s. Knows no sockets, no scheduler and no time.
"""

from mellmpi.frontend.dialects.openai import OpenAIDialect
from mellmpi.frontend.dialects.sse import COMMENT, DONE, event

__all__ = ["COMMENT", "DONE", "OpenAIDialect", "event"]
