"""Checks bodies of /v1/completions and /v1/chat/completions, and makes requests of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mellmpi.frontend.conversation import conversation
from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.grammar import GrammarTrials
from mellmpi.frontend.items import Markup
from mellmpi.frontend.prompt_options import (
    MAX_LOGPROBS,
    PromptOptions,
    max_tokens,
    num_scored,
    prompt_options,
)
from mellmpi.frontend.served import ServedModel, ServedModels
from mellmpi.frontend.token_choice import (
    allowed_token_ids,
    clean,
    logit_bias,
    stop_token_ids,
    stops_of,
)
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.tool_formats import markup_of, tool_format
from mellmpi.frontend.tool_grammar import answer_grammar
from mellmpi.frontend.tools import Tools, tools_of
from mellmpi.protocol import Request, Sampling

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_ANSWERS = 2048  # per call: prompts times n
RESERVED = {"messages", "tools", "documents", "self"}  # template variables that users cannot set
MAX_CHOICES = 128
LIMIT = 2**31  # of a priority


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
    markup: Markup | None  # of the items of each answer; None: its text is all there is
    priority: int  # the lowest goes first
    deadline_s: float | None  # seconds from now in which the answer is complete, or given up

    @property
    def n(self) -> int:
        return len(self.samplings) // len(self.prompts)

    def requests(self, ids: Iterator[int]) -> list[Request]:
        """Return one request per choice, in the order of the choices."""
        return [
            Request(
                next(ids),
                self.model,
                self.prompts[index // self.n],
                sampling,
                None,
                self.priority,
                self.deadline_s,
            )
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
    tools = tools_of(fields) if fields.chat else None
    if fields.chat:
        given = [_chat(fields, tokenizer, model, tools)]
    else:
        given = _prompts(fields, tokenizer, model)
    prompts = [_checked(tokens, model, fields.chat) for tokens in given]
    markup = markup_of(tokenizer, tools, given[0]) if fields.chat else None
    grammar, why, markup = answer_grammar(fields, tokenizer, tools, markup)
    stops, stop_ids = stops_of(fields, tokenizer)
    base = _sampling(fields, model, identity, stop_ids)
    base = _with_grammar(base, grammar, why, served.grammars[model.name])
    options = fields.get("stream_options", dict) or {}
    return Call(
        url=url,
        model=model.name,
        prompts=tuple(prompts),
        samplings=_samplings(fields, base, prompts, model),
        stops=stops,
        stream=fields.boolean("stream"),
        include_usage=Fields(options, chat=fields.chat).boolean("include_usage"),
        return_token_ids=fields.boolean("return_token_ids"),
        about_prompts=prompt_options(fields),
        markup=markup,
        priority=fields.integer("priority", 0, low=-LIMIT, high=LIMIT),
        deadline_s=_deadline_s(fields),
    )


def _deadline_s(fields: Fields) -> float | None:
    seconds = fields.number("deadline_s", 0.0, low=0.0)
    return seconds or None


# --- prompts -------------------------------------------------------------------------------------


def _chat(
    fields: Fields, tokenizer: Tokenizer, model: ServedModel, tools: Tools | None
) -> list[int]:
    """Return the token ids of a conversation."""
    messages = conversation(fields, tools, tokenizer.template)
    variables = dict(fields.get("chat_template_kwargs", dict) or {})
    if reserved := RESERVED & variables.keys():
        name = min(reserved)
        raise BadRequest(f"chat_template_kwargs may not set {name}", "chat_template_kwargs")
    variables.setdefault("add_generation_prompt", fields.boolean("add_generation_prompt", True))
    if tools is not None and tool_format(tokenizer.template).in_template:
        variables["tools"] = [function.definition for function in tools.functions]
    try:
        return tokenizer.encode_chat(messages, variables, model.max_model_len)
    except ValueError as error:
        raise BadRequest(str(error), "messages") from error


def _prompts(fields: Fields, tokenizer: Tokenizer, model: ServedModel) -> list[list[int]]:
    """Return token ids of each prompt. `prompt` is text, token ids, or a list of either."""
    prompt = fields.get("prompt", (str, list))
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise BadRequest("prompt must be text, or token ids, or a list of either", "prompt")
    if len(prompt) * _num_choices(fields) > MAX_ANSWERS:
        raise BadRequest(
            f"{len(prompt)} prompts with n choices each are more than {MAX_ANSWERS} "
            "answers; use several lines",
            "prompt",
        )
    return [_one_prompt(item, tokenizer, model.max_model_len) for item in prompt]


def _one_prompt(item: Any, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    if isinstance(item, str):
        try:
            return tokenizer.encode(clean(item, "prompt"), max_tokens)
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


def _num_choices(fields: Fields) -> int:
    return fields.integer("n", 1, low=1, high=MAX_CHOICES)


def _samplings(
    fields: Fields, base: Sampling, prompts: list[tuple[int, ...]], model: ServedModel
) -> tuple[Sampling, ...]:
    """Return the sampling parameters of all choices."""
    n, limit = _num_choices(fields), model.max_model_len
    counts = [max_tokens(fields, len(prompt), limit) for prompt in prompts for _ in range(n)]
    if base.min_tokens > min(counts):
        message = f"min_tokens {base.min_tokens} is more than max_tokens, here {min(counts)}"
        raise BadRequest(message, "min_tokens")
    return tuple(
        # Choices of one call differ in their seeds; the first one has the requested seed.
        replace(base, max_tokens=count, seed=(base.seed + index) % 2**64)
        for index, count in enumerate(counts)
    )


def _sampling(
    fields: Fields, model: ServedModel, identity: str, stop_ids: tuple[int, ...]
) -> Sampling:
    """Return the sampling parameters without `max_tokens`, which depends on the prompt."""
    top_k = fields.integer("top_k", 0, low=-1)
    extra = stop_token_ids(fields, model.vocab_size)
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
        min_tokens=fields.integer("min_tokens", 0, low=0),
        logit_bias=logit_bias(fields, model.vocab_size),
        allowed_token_ids=allowed_token_ids(fields, model.vocab_size),
        grammar="",
    )


def _with_grammar(sampling: Sampling, grammar: str, name: str, trials: GrammarTrials) -> Sampling:
    """Add the grammar that this field of the body asks for, after a trial."""
    if not grammar:
        return sampling
    if sampling.allowed_token_ids:
        raise BadRequest(f"allowed_token_ids cannot be used with {name}", "allowed_token_ids")
    if not sampling.stop_token_ids:
        raise BadRequest(f"{name} needs a token that ends the answer; leave ignore_eos out", name)
    trials.check(grammar, name)
    return replace(sampling, grammar=grammar)


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
