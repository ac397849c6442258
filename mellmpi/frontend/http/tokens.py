"""Tokens and tokenizers over HTTP, with the routes and names of vLLM and Anthropic."""

from typing import Any

from fastapi import FastAPI, Request

from mellmpi.frontend.dialects import COUNT_TOKENS, MESSAGES, dialect_of
from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.http.body import read_body
from mellmpi.frontend.http.link import Link
from mellmpi.frontend.openai import CHAT, COMPLETIONS, parse
from mellmpi.frontend.served import ServedModels
from mellmpi.frontend.strict_json import json_object


def tokenized(data: bytes, served: ServedModels) -> dict[str, Any]:
    """Return the token ids of a prompt, or of the messages of a chat. Raises BadRequest."""
    body = json_object(data)
    url = CHAT if "messages" in body else COMPLETIONS
    call = parse(url, {**body, "max_tokens": 1}, served, "tokenize")
    tokens = list(call.prompts[0])
    limit = served.models[call.model].max_model_len
    return {"count": len(tokens), "max_model_len": limit, "tokens": tokens}


def counted(data: bytes, served: ServedModels) -> dict[str, int]:
    """Return the number of tokens of a prompt of Messages. Raises BadRequest."""
    body = json_object(data) | {"max_tokens": 1}
    call = dialect_of(MESSAGES).parse(MESSAGES, body, served, "count")
    return {"input_tokens": len(call.prompts[0])}


def detokenized(data: bytes, served: ServedModels) -> dict[str, str]:
    """Return the text of token ids. Raises BadRequest."""
    body = json_object(data)
    tokens = body.get("tokens")
    model = served.named(Fields(body, chat=False).get("model", str))
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < model.vocab_size for token in tokens
    ):
        raise BadRequest("tokens must be a list of token ids of the model", "tokens")
    return {"prompt": served.tokenizers[model.name].decode(tokens)}


def add_token_routes(app: FastAPI, link: Link) -> None:
    """Add the routes. Bodies are read in threads: megabytes of them take seconds."""

    @app.post("/tokenize", summary="Token ids of a text or a conversation")
    async def tokenize(request: Request) -> dict[str, Any]:
        data = await read_body(request)
        return await link.bounded(tokenized, data, await link.wait_started())

    @app.post(COUNT_TOKENS, summary="The number of tokens of a prompt of Messages")
    async def count_tokens(request: Request) -> dict[str, int]:
        data = await read_body(request)
        return await link.bounded(counted, data, await link.wait_started())

    @app.post("/detokenize", summary="Text of token ids")
    async def detokenize(request: Request) -> dict[str, str]:
        data = await read_body(request)
        return await link.bounded(detokenized, data, await link.wait_started())

    @app.get("/tokenizer_info", summary="The configuration of a tokenizer, with its template")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        served = await link.wait_started()
        tokenizer = served.tokenizers[served.named(model).name]
        return {**tokenizer.config, "chat_template": tokenizer.template}
