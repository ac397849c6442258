"""OpenAI's Responses: https://platform.openai.com/docs/api-reference/responses"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mellmpi.frontend.answers import tool_call_id, usage
from mellmpi.frontend.dialects.blocks import Block, BlockDialect, BlockWriter, Events
from mellmpi.frontend.dialects.responses_body import chat_body
from mellmpi.frontend.dialects.translation import renamed
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.items import PLAIN, Reasoning, Text
from mellmpi.frontend.openai import CHAT, Call, parse
from mellmpi.frontend.outputs import Output
from mellmpi.frontend.served import ServedModels
from mellmpi.frontend.strict_json import json_object
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import OpenCall

RESPONSES = "/v1/responses"
RENAMED = {  # fields of a chat
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
ECHOED: dict[str, Any] = {  # fields of the body in the answer, with their defaults
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "user": None,
}
TOOL = {"type": "function", "description": None, "parameters": None, "strict": False}
Json = dict[str, Any]


class ResponsesDialect(BlockDialect):
    """A `Dialect`."""

    def __init__(self, call: Call, tokenizer: Tokenizer, opened: OpenCall):
        super().__init__(call, opened)

    @staticmethod
    def parse(url: str, body: Json, served: ServedModels, identity: str) -> Call:
        """Check a body. Raises BadRequest."""
        try:
            call = parse(CHAT, chat_body(body), served, identity)
        except BadRequest as error:
            raise renamed(error, RENAMED) from error
        return replace(call, url=url, markup=call.markup or PLAIN)

    @staticmethod
    def error_body(error: BadRequest) -> Json:
        """Return the body of a response with an error."""
        return {"error": error.error}

    def writer(self) -> "ResponseWriter":
        """Return a new writer."""
        return ResponseWriter(self._call, self._opened)

    def body(self, outputs: Sequence[Output]) -> Json:
        """Return the whole answer."""
        writer = self.writer()
        writer.write(outputs[0])
        return writer.response(outputs[0])


class ResponseWriter(BlockWriter):
    """Writes the events of one response."""

    def __init__(self, call: Call, opened: OpenCall):
        super().__init__(call, opened)
        self._body = json_object(opened.body)

    def response(self, output: Output | None, error: BadRequest | None = None) -> Json:
        """Return the response; its answer is there once it is finished."""
        given = {name: self._body.get(name) for name in ECHOED}
        echoed = {k: ECHOED[k] if value is None else value for k, value in given.items()}
        echoed["tools"] = [TOOL | tool for tool in echoed["tools"]]
        status, details, counts, failure = "in_progress", None, None, None
        if error is not None:
            status, failure = "failed", {"code": "server_error", "message": error.message}
        elif output is not None:
            status = "completed"
            counts = self._usage(output)
            if output.finish_reason == "length":
                status, details = "incomplete", {"reason": "max_output_tokens"}
        return {
            "id": f"resp_{self.opened.call_id}",
            "object": "response",
            "created_at": self.opened.created,
            "completed_at": None,  # the answer has no clock
            "status": status,
            "background": False,
            "error": failure,
            "incomplete_details": details,
            "max_tool_calls": None,
            "model": self.call.model,
            "output": [self._item(block) for block in self.blocks] if status != "failed" else [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": counts,
            **echoed,
        }

    def _usage(self, output: Output) -> Json:
        counts = usage(self.call, (output,))
        assert output.log is not None
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": output.log.num_reasoning_tokens},
            "total_tokens": counts["total_tokens"],
        }

    # --- items -----------------------------------------------------------------------------------

    def _item(self, block: Block) -> Json:
        """Return the item of a block that has ended."""
        item = self._begun(block, "completed" if block.complete else "incomplete")
        if block.kind is Text or block.kind is Reasoning:
            return item | {"content": [self._part(block, block.text)]}
        return item | {"arguments": block.text}

    def _begun(self, block: Block, status: str) -> Json:
        """Return the item of a block without its content."""
        if block.kind is Text:
            item = {"type": "message", "role": "assistant", "content": []}
        elif block.kind is Reasoning:
            item = {"type": "reasoning", "summary": [], "content": []}
        else:
            short = self.call.markup is not None and self.call.markup.short_ids
            call_id = tool_call_id(self.opened.call_id, block.number, "call_", short)
            item = {"type": "function_call", "call_id": call_id, "name": block.name}
            item["arguments"] = ""
        return {"id": self._item_id(block), "status": status, **item}

    def _item_id(self, block: Block) -> str:
        kind = "msg" if block.kind is Text else "rs" if block.kind is Reasoning else "fc"
        digest = hashlib.sha256(f"{self.opened.call_id}/{block.index}".encode()).hexdigest()
        return f"{kind}_{digest[:32]}"

    def _part(self, block: Block, text: str) -> Json:
        if block.kind is Text:
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}

    # --- events ----------------------------------------------------------------------------------

    def begun(self) -> Events:
        """Yield the first events of a stream."""
        yield {"type": "response.created", "response": self.response(None)}
        yield {"type": "response.in_progress", "response": self.response(None)}

    def block_begun(self, block: Block) -> Events:
        """Yield the events at the beginning of a block."""
        item = self._begun(block, "in_progress")
        yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
        if block.kind is Text or block.kind is Reasoning:
            part = self._part(block, "")
            yield {"type": "response.content_part.added", **self._place(block), "part": part}

    def block_grown(self, block: Block, text: str) -> Events:
        """Yield the event for more text, or more arguments, of a block."""
        more: Json = {"logprobs": []} if block.kind is Text else {}
        yield {
            "type": f"response.{_stem(block)}.delta",
            **self._place(block),
            "delta": text,
            **more,
        }

    def block_ended(self, block: Block) -> Events:
        """Yield the events at the end of a block."""
        kind, place = f"response.{_stem(block)}.done", self._place(block)
        if block.kind is Text or block.kind is Reasoning:
            more: Json = {"logprobs": []} if block.kind is Text else {}
            yield {"type": kind, **place, "text": block.text, **more}
            part = self._part(block, block.text)
            yield {"type": "response.content_part.done", **place, "part": part}
        else:
            yield {"type": kind, **place, "name": block.name, "arguments": block.text}
        item = self._item(block)
        yield {"type": "response.output_item.done", "output_index": block.index, "item": item}

    def _place(self, block: Block) -> Json:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        has_content = block.kind is Text or block.kind is Reasoning
        return place | {"content_index": 0} if has_content else place

    def ended(self, output: Output) -> Events:
        """Yield the last event of a stream."""
        response = self.response(output)
        yield {"type": f"response.{response['status']}", "response": response}

    def failed(self, error: BadRequest) -> Events:
        """Yield the last event of a stream that fails."""
        yield {"type": "response.failed", "response": self.response(None, error)}

    def numbered(self, event: Json, number: int) -> Json:
        """Return an event with its number in the stream, counted from 0."""
        return {**event, "sequence_number": number}


def _stem(block: Block) -> str:
    if block.kind is Text:
        return "output_text"
    return "reasoning_text" if block.kind is Reasoning else "function_call_arguments"
