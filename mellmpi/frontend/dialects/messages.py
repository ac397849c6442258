"""Anthropic's Messages: https://docs.anthropic.com/en/api/messages"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mellmpi.frontend.answers import tool_call_id, usage
from mellmpi.frontend.dialects.blocks import Block, BlockDialect, BlockWriter, Events
from mellmpi.frontend.dialects.messages_body import chat_body
from mellmpi.frontend.dialects.translation import renamed
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.items import PLAIN, Reasoning, Text
from mellmpi.frontend.openai import CHAT, Call, parse
from mellmpi.frontend.outputs import Output
from mellmpi.frontend.served import ServedModels
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import OpenCall

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
RENAMED = {"response_format": "output_config.format", "stop": "stop_sequences"}  # of a chat
Json = dict[str, Any]


class MessagesDialect(BlockDialect):
    """A `Dialect`."""

    def __init__(self, call: Call, tokenizer: Tokenizer, opened: OpenCall):
        super().__init__(call, opened)

    @staticmethod
    def parse(url: str, body: Json, served: ServedModels, identity: str) -> Call:
        """Check a body. Raises BadRequest."""
        try:
            call = parse(CHAT, chat_body(body, served), served, identity)
        except BadRequest as error:
            raise renamed(error, RENAMED) from error
        return replace(call, url=url, markup=call.markup or PLAIN)

    @staticmethod
    def error_body(error: BadRequest) -> Json:
        """Return the body of a response with an error."""
        kind = ERRORS.get(error.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}

    def writer(self) -> "MessageWriter":
        """Return a new writer."""
        return MessageWriter(self._call, self._opened)

    def body(self, outputs: Sequence[Output]) -> Json:
        """Return the whole answer."""
        (output,) = outputs
        writer = self.writer()
        writer.write(output)
        message = writer.message(usage(self._call, outputs)["completion_tokens"])
        message["content"] = [writer.content(block) for block in writer.blocks]
        return message | _stop(output)


class MessageWriter(BlockWriter):
    """Writes the events of one message."""

    def message(self, output_tokens: int) -> Json:
        """Return the message without its content."""
        return {
            "id": f"msg_{self.opened.call_id}",
            "type": "message",
            "role": "assistant",
            "model": self.call.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": {
                "input_tokens": usage(self.call, ())["prompt_tokens"],
                "cache_creation": None,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "inference_geo": None,
                "output_tokens": output_tokens,
                "output_tokens_details": None,
                "server_tool_use": None,
                "service_tier": "standard",
            },
        }

    def content(self, block: Block) -> Json:
        """Return a finished content block. Arguments that are no JSON object are left out."""
        if block.kind is Text:
            return {"type": "text", "text": block.text, "citations": None}
        if block.kind is Reasoning:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        value = json.loads(block.text) if block.complete else {}
        return {**self._tool_use(block), "input": value}

    def _tool_use(self, block: Block) -> Json:
        short = self.call.markup is not None and self.call.markup.short_ids
        call_id = tool_call_id(self.opened.call_id, block.number, "toolu_", short)
        use = {"type": "tool_use", "id": call_id, "name": block.name, "input": {}}
        return use | {"caller": {"type": "direct"}}

    def begun(self) -> Events:
        """Yield the first events of a stream."""
        yield {"type": "message_start", "message": self.message(0)}
        yield {"type": "ping"}

    def block_begun(self, block: Block) -> Events:
        """Yield the event at the beginning of a block."""
        if block.kind is Text:
            content: Json = {"type": "text", "text": "", "citations": None}
        elif block.kind is Reasoning:
            content = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            content = self._tool_use(block)
        yield {"type": "content_block_start", "index": block.index, "content_block": content}

    def block_grown(self, block: Block, text: str) -> Events:
        """Yield the event for more text, or more arguments, of a block."""
        if block.kind is Text:
            delta = {"type": "text_delta", "text": text}
        elif block.kind is Reasoning:
            delta = {"type": "thinking_delta", "thinking": text}
        else:
            delta = {"type": "input_json_delta", "partial_json": text}
        yield {"type": "content_block_delta", "index": block.index, "delta": delta}

    def block_ended(self, block: Block) -> Events:
        """Yield the event at the end of a block."""
        yield {"type": "content_block_stop", "index": block.index}

    def ended(self, output: Output) -> Events:
        """Yield the last events of a stream."""
        counts = {"output_tokens": usage(self.call, (output,))["completion_tokens"]}
        yield {"type": "message_delta", "delta": _stop(output), "usage": counts}
        yield {"type": "message_stop"}

    def failed(self, error: BadRequest) -> Events:
        """Yield the event of an error."""
        yield MessagesDialect.error_body(error)

    def numbered(self, event: Json, number: int) -> Json:
        """Return the event: its number is its id alone."""
        return event


def _stop(output: Output) -> Json:
    if output.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if output.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop}
    called = output.log is not None and output.log.has_calls
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}
