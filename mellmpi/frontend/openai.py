"""Checks bodies of /v1/completions and /v1/chat/completions, and makes requests of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.prompt_options import (
    MAX_LOGPROBS,
    PromptOptions,
    max_tokens,
    num_scored,
    prompt_options,
)
from mellmpi.frontend.tokenizer import Message, Tokenizer
from mellmpi.protocol import Request, Sampling

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_ANSWERS = 2048  # per call: prompts times n
RESERVED = {"messages", "tools", "documents", "self"}  # template variables that users cannot set
MAX_STOPS, MAX_CHOICES = 4, 128


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The properties of a model that request checks need."""

    name: str
    max_model_len: int  # prompt and output tokens together
    vocab_size: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class ServedModels:
    """Models and their tokenizers by name. The first model is the default."""

    models: dict[str, ServedModel]
    tokenizers: dict[str, Tokenizer]

    @staticmethod
    def of(*pairs: tuple[ServedModel, Tokenizer]) -> "ServedModels":
        """Pair models with tokenizers, and add each tokenizer's end tokens to its model."""
        models = {m.name: _with_end_ids(m, t) for m, t in pairs}
        return ServedModels(models, {m.name: t for m, t in pairs})

    def named(self, name: str | None) -> ServedModel:
        """Return the model of this name, or the default. Raises BadRequest with the valid names."""
        name = name or next(iter(self.models))
        if name not in self.models:
            raise BadRequest(
                f"the model {name!r} does not exist here; this server has "
                + ", ".join(map(repr, self.models)),
                param="model",
                code="model_not_found",
                status=404,
            )
        return self.models[name]


def _with_end_ids(model: ServedModel, tokenizer: Tokenizer) -> ServedModel:
    ids = dict.fromkeys((*model.eos_ids, *tokenizer.end_ids))
    return replace(model, eos_ids=tuple(i for i in ids if i < model.vocab_size))


@dataclass(frozen=True, kw_only=True)
class Call:
    """One checked API call. Choice i is sample i % n of prompt i // n."""

    url: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]  # one per choice
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool  # at the end of a stream
    return_token_ids: bool
    about_prompts: PromptOptions

    @property
    def n(self) -> int:
        return len(self.samplings) // len(self.prompts)

    def requests(self, ids: Iterator[int]) -> list[Request]:
        """Return one request per choice, in the order of the choices."""
        return [
            Request(next(ids), self.model, self.prompts[index // self.n], sampling, None, 0, None)
            for index, sampling in enumerate(self.samplings)
        ]


def parse(url: str, body: dict[str, Any], served: ServedModels, identity: str) -> Call:
    """Check a body and tokenize its prompts. Raises BadRequest.

    identity  name of the call, unique within the run. The default seed is derived from it, so that
              a rerun of the same file gives the same answers
    """
    fields = Fields(body, chat=url == CHAT)
    fields.check_names()
    model = served.named(fields.get("model", str))
    tokenizer = served.tokenizers[model.name]
    n = fields.integer("n", 1, low=1, high=MAX_CHOICES)
    texts_or_ids = (
        _messages(fields, tokenizer, model) if fields.chat else _prompts(fields, tokenizer, model)
    )
    prompts = [_checked(tokens, model, fields.chat) for tokens in texts_or_ids]
    stops, stop_ids = _stops(fields, tokenizer)
    base = _sampling(fields, model, identity, stop_ids)
    limit = model.max_model_len
    counts = [max_tokens(fields, len(prompt), limit) for prompt in prompts for _ in range(n)]
    samplings = tuple(
        # Choices of one call differ in their seeds; the first one has the requested seed.
        replace(base, max_tokens=count, seed=(base.seed + index) % 2**64)
        for index, count in enumerate(counts)
    )
    options = fields.get("stream_options", dict) or {}
    return Call(
        url=url,
        model=model.name,
        prompts=tuple(prompts),
        samplings=samplings,
        stops=stops,
        stream=fields.boolean("stream"),
        include_usage=bool(options.get("include_usage")),
        return_token_ids=fields.boolean("return_token_ids"),
        about_prompts=prompt_options(fields),
    )


# --- prompts -------------------------------------------------------------------------------------


def _messages(fields: Fields, tokenizer: Tokenizer, model: ServedModel) -> list[list[int]]:
    messages = fields.get("messages", list)
    if not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    plain = [_message(message, index) for index, message in enumerate(messages)]
    variables = dict(fields.get("chat_template_kwargs", dict) or {})
    if reserved := RESERVED & variables.keys():
        name = min(reserved)
        raise BadRequest(f"chat_template_kwargs may not set {name}", "chat_template_kwargs")
    variables.setdefault("add_generation_prompt", fields.boolean("add_generation_prompt", True))
    try:
        return [tokenizer.encode_chat(plain, variables, model.max_model_len)]
    except ValueError as error:
        raise BadRequest(str(error), "messages") from error


def _message(message: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role", where)
    if message.get("tool_calls") or message.get("function_call"):
        raise BadRequest(f"{where}: tool calls are not supported", where)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content must be text", f"{where}.content")
    return {**message, "role": _clean(message["role"], where), "content": _clean(content, where)}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise BadRequest(f"{where}: only parts of type text are supported", f"{where}.content")


def _clean(text: str, where: str) -> str:
    """Refuse lone surrogates, which JSON can escape, but which are not characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{where} has a lone surrogate, which is not valid text", where) from error
    return text


def _prompts(fields: Fields, tokenizer: Tokenizer, model: ServedModel) -> list[list[int]]:
    """Return token ids of each prompt. `prompt` is text, token ids, or a list of either."""
    prompt = fields.get("prompt", (str, list))
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise BadRequest("prompt must be text, or token ids, or a list of either", "prompt")
    if len(prompt) * (fields.integer("n", 1) or 1) > MAX_ANSWERS:
        raise BadRequest(
            f"{len(prompt)} prompts with n choices each are more than {MAX_ANSWERS} "
            "answers; use several lines",
            "prompt",
        )
    return [_one_prompt(item, tokenizer, model.max_model_len) for item in prompt]


def _one_prompt(item: Any, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    if isinstance(item, str):
        try:
            return tokenizer.encode(_clean(item, "prompt"), max_tokens)
        except ValueError as error:
            raise BadRequest(str(error), "prompt") from error
    if isinstance(item, list) and all(type(token) is int for token in item):
        return item
    raise BadRequest("prompt must be text, or token ids, or a list of either", "prompt")


def _checked(tokens: list[int], model: ServedModel, chat: bool) -> tuple[int, ...]:
    param = "messages" if chat else "prompt"
    if not tokens:
        raise BadRequest(f"{param} must have at least one token", param)
    if wrong := [token for token in tokens if not 0 <= token < model.vocab_size]:
        raise BadRequest(
            f"token id {wrong[0]} is not in the vocabulary of {model.vocab_size}", param
        )
    return tuple(tokens)


# --- sampling ------------------------------------------------------------------------------------


def _sampling(
    fields: Fields, model: ServedModel, identity: str, stop_ids: tuple[int, ...]
) -> Sampling:
    """Return the sampling parameters without `max_tokens`, which depends on the prompt."""
    top_k = fields.integer("top_k", 0, low=-1)
    extra = fields.get("stop_token_ids", list) or []
    if not all(type(token) is int and 0 <= token < model.vocab_size for token in extra):
        raise BadRequest("stop_token_ids must be token ids of the model", "stop_token_ids")
    num_logprobs = _num_logprobs(fields)
    ends = () if fields.boolean("ignore_eos") else model.eos_ids
    return Sampling(
        max_tokens=0,
        temperature=fields.number("temperature", 1.0, low=0.0),
        top_k=top_k if 0 < top_k < model.vocab_size else 0,  # 0: no limit
        top_p=fields.number("top_p", 1.0, low=0.0, high=1.0, low_open=True),
        min_p=fields.number("min_p", 0.0, low=0.0, high=1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, low=0.0, low_open=True),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2.0, high=2.0),
        seed=_seed(fields, identity),
        stop_token_ids=tuple(dict.fromkeys((*ends, *extra, *stop_ids))),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_scored(fields, num_logprobs),
    )


def _seed(fields: Fields, identity: str) -> int:
    given = fields.integer("seed", None, low=-(2**63), high=2**64 - 1)
    if given is not None:
        return given
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _num_logprobs(fields: Fields) -> int | None:
    if not fields.chat:
        return fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS)
    top = fields.integer("top_logprobs", None, low=0, high=MAX_LOGPROBS)
    if fields.boolean("logprobs"):
        return top or 0
    if top:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _stops(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return (stop strings, ids of stop tokens). A stop string that spells a special token becomes
    its id, because answers do not contain the text of special tokens."""
    stop = fields.get("stop", (str, list))
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise BadRequest(f"stop must be one to {MAX_STOPS} strings that are not empty", "stop")
    ids = {text: tokenizer.special_id(_clean(text, "stop").strip()) for text in stops}
    for text in (text for text, token in ids.items() if token is None):
        if inside := tokenizer.special_inside(text):
            raise BadRequest(
                f"stop contains the special token {inside}, whose text no answer contains: "
                "give that token alone",
                "stop",
            )
    return (
        tuple(text for text in stops if ids[text] is None),
        tuple(token for token in ids.values() if token is not None),
    )
