"""Fuzzes the batch frontend with random lines and token streams.

`python -m tests.frontend.fuzz 100000` tries that many lines and prints their status codes. Every
line must get an answer or an error, and the valid lines between them must get the same answer.
"""

import copy
import json
import logging
import math
import random
import sys
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mellmpi.engine.sampler import rank, sample, token_logprob
from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModel, ServedModels, Tokenizer
from mellmpi.frontend.fields import CHAT_ONLY, COMPLETIONS_ONLY, SHARED
from mellmpi.frontend.openai import CHAT, COMPLETIONS
from mellmpi.protocol import Chunk, Emit, Rejected, Request, Submit, decode, encode
from tests.frontend.tokenizers_of_each_kind import Kind, kinds

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ mood }}",
    "{{ raise_exception('roles must alternate') if messages|length > 1 else messages[0].content }}",
    "{% if tools is not none %}{{ tools[0].name }}{% endif %}{{ messages[-1]['content'][0] }}",
    "{{ messages[0].content * 3 }}{{ 1 // (messages|length - 1) }}",
)
STRINGS = (
    "",
    "x",
    "Hello",
    "\x00",
    "\x1b[31m",
    "[red]",
    "[/]",
    "{{ 7 * 7 }}",
    "<|im_end|>",
    "</s>",
    "\ud800",
    "\udfff\ud800",
    "é" * 50,
    "👍🏽",
    "\u2028",
    "../../etc/passwd",
    "self",
    "a" * 5000,
    "null",
    "\ufffd",
    "-1",
    "1e400",
    " ",
    "\n\n",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    -(2**64),
    10**400,
    0.0,
    -0.0,
    1.0,
    0.5,
    1e-300,
    5e-324,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
)
OTHER_NAMES = (
    "tools",
    "user",
    "best_of",
    "self",
    "request",
)
NAMES = (*SHARED, *CHAT_ONLY, *COMPLETIONS_ONLY, *OTHER_NAMES, "")
KEYWORDS = ("type", "enum", "items", "properties", "minimum", "maxLength", "anyOf", "not", "$ref")
SENTINEL = "sentinel"


@dataclass
class Fuzzer:
    """One run over one kind of tokenizer."""

    kind: Kind
    rng: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    written: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        template = self.rng.choice(TEMPLATES)
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = Tokenizer(self.kind.backend, template, special)
        tokenizer.json = self.kind.backend.to_str()
        self.vocab_size = self.kind.backend.get_vocab_size() + self.rng.choice((0, 0, 40, -40))
        model = ServedModel(
            name="tiny", max_model_len=120, vocab_size=self.vocab_size, eos_ids=(2,)
        )
        self.source: deque[bytes] = deque()
        reader = LineReader(lambda: self.source.popleft() if self.source else b"")
        self.job = BatchJob(
            reader, self.write, ServedModels.of((model, tokenizer)), now=lambda: 0.0
        )

    def write(self, data: bytes) -> None:
        assert data.endswith(b"\n") and data.count(b"\n") == 1
        self.written.append(json.loads(data))

    # --- lines ----------------------------------------------------------------------------------

    def value(self, depth: int = 0) -> Any:
        rng = self.rng
        kind = rng.randrange(8 if depth < 3 else 4)
        if kind < 2:
            return rng.choice(STRINGS)
        if kind == 2:
            return rng.choice(NUMBERS)
        if kind == 3:
            return rng.choice((None, True, False, [], {}))
        if kind < 6:
            return [self.value(depth + 1) for _ in range(rng.randrange(4))]
        return {
            rng.choice((*NAMES, *STRINGS)): self.value(depth + 1) for _ in range(rng.randrange(4))
        }

    def body(self, chat: bool) -> dict[str, Any]:
        """A valid body."""
        rng = self.rng
        body: dict[str, Any] = {"max_tokens": rng.randint(1, 30)}
        if chat:
            body["messages"] = [{"role": "user", "content": rng.choice(STRINGS)}]
        else:
            body["prompt"] = rng.choice((rng.choice(STRINGS), [5, 6, 7], ["a", "b"], [[5], [6]]))
        optional = {
            "logprobs": True if chat else rng.randint(0, 20),
            "n": rng.randint(1, 3),
            "stop": rng.choice(("x", ["<|im_end|>"], ["\n", "the"])),
            "top_k": rng.choice(NUMBERS),
            "temperature": rng.random(),
            "seed": rng.choice(NUMBERS),
            "top_p": rng.random(),
            "repetition_penalty": rng.choice(NUMBERS),
            "stop_token_ids": [5, 3],
            "return_token_ids": True,
            "presence_penalty": 1.0,
            "prompt_logprobs": rng.randint(0, 20),
            "min_tokens": rng.randint(0, 3),
            "logit_bias": {"5": rng.choice(NUMBERS), "7": -1},
            "allowed_token_ids": [5, rng.randint(0, 99)],
            "guided_regex": rng.choice((*STRINGS, "[a-z]+")),
            "guided_choice": [rng.choice(STRINGS)],
            "response_format": {"type": "json_object"},
            "guided_json": {rng.choice(KEYWORDS): self.value(1) for _ in range(rng.randrange(3))},
        }
        if not chat:
            optional |= {"echo": True, "max_tokens": rng.randint(0, 30)}
        return body | {
            name: optional[name] for name in rng.sample(list(optional), rng.randrange(5))
        }

    def line(self, number: int) -> bytes:
        """A line with up to three random changes."""
        rng = self.rng
        chat = rng.random() < 0.5
        entry: Any = {
            "custom_id": f"{number}",
            "method": "POST",
            "url": CHAT if chat else COMPLETIONS,
            "body": self.body(chat),
        }
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            where = rng.random()
            if where < 0.75:
                entry["body"][rng.choice(NAMES)] = self.value()
            elif where < 0.85 and chat and isinstance(entry["body"].get("messages"), list):
                entry["body"]["messages"].append(self.value())
            elif where < 0.95:
                entry[rng.choice(("custom_id", "method", "url", "extra"))] = self.value()
            else:
                entry["body"] = self.value()
                break
        data = json.dumps(entry).encode()
        if rng.random() < 0.1:
            at = rng.randrange(len(data))
            data = (
                data[:at]
                + rng.choice((b"", rng.randbytes(3), b"\xff", b"[" * 3000))
                + data[at + 1 :]
            )
        return data.replace(b"\n", b" ")

    # --- answers --------------------------------------------------------------------------------

    def answer(self, request: Request) -> None:
        """Answer with sampled and with random tokens, of random length."""
        rng = self.rng
        assert decode(encode(Submit(request))) == Submit(request), "not encodable"
        if rng.random() < 0.02:
            self.deliver(Rejected(request.id, rng.choice(STRINGS), 0.0))
            return
        first, length = 0, rng.randint(1, min(12, request.sampling.max_tokens))
        while first < length:
            count = rng.randint(1, length - first)
            rows = [self.token(request, first + i) for i in range(count)]
            ended = rng.choice(("stop", "length")) if first + count == length else None
            logprobs = tuple(row for _, row in rows) if rows[0][1] is not None else ()
            tokens, scored = tuple(t for t, _ in rows), () if first else self.scored(request)
            self.deliver(Emit(request.id, first, tokens, logprobs, ended, scored))
            first += count

    def deliver(self, event: Emit | Rejected) -> None:
        if isinstance(event, Emit):
            self.job.emit(event)
        else:
            self.job.rejected(event)

    def scored(self, request: Request) -> tuple[Any, ...]:
        num_top = request.sampling.num_prompt_logprobs
        if num_top is None:
            return ()
        return tuple(self.score(token, num_top) for token in request.prompt[1:])

    def score(self, token: int, num_top: int) -> Any:
        rng = self.rng
        logits = np.array([rng.gauss(0, 3) for _ in range(self.vocab_size)], np.float32)
        if rng.random() < 0.1:
            logits[rng.randrange(self.vocab_size)] = rng.choice((math.nan, math.inf, -math.inf))
        return token_logprob(logits, token, num_top), rank(logits, token)

    def token(self, request: Request, position: int) -> tuple[int, Any]:
        rng, size = self.rng, self.vocab_size
        logits = np.float32(rng.gauss(0, 3)) + np.zeros((1, size), np.float32)
        logits[0, rng.randrange(size)] = rng.choice((9.0, math.nan, math.inf, -math.inf))
        if rng.random() < 0.05:
            logits[:] = rng.choice((math.nan, math.inf, -math.inf))
        chunk = Chunk(
            request.id, position, (1,), [], request.sampling, (request.prompt[-8:], [1, 2])
        )
        result = sample(torch.from_numpy(logits), [chunk])
        token = result.tokens[0]
        assert 0 <= token < size
        # Sampled, or any id of the tokenizer and beyond.
        return (token if rng.random() < 0.3 else rng.randrange(size + 20)), result.logprobs[0]

    def run(self, num_lines: int) -> None:
        good = {
            "custom_id": SENTINEL,
            "method": "POST",
            "url": COMPLETIONS,
            "body": {"prompt": [9, 10], "max_tokens": 3},
        }
        for number in range(num_lines):
            self.source.append(self.line(number) + b"\n")
            entry = copy.deepcopy(good)
            entry["custom_id"] = f"{SENTINEL} {number}"
            self.source.append(json.dumps(entry).encode() + b"\n")
        tokens = tuple(self.kind.backend.encode("the x").ids[:3])
        for request in self.job.requests():
            if request.prompt == (9, 10) and request.sampling.max_tokens == 3:
                self.deliver(Emit(request.id, 0, tokens, (), "length", ()))
            else:
                self.answer(request)
        self.check(num_lines)

    def check(self, num_lines: int) -> None:
        assert self.job.done and len(self.written) == 2 * num_lines
        texts = set()
        for entry in self.written:
            response = entry["response"]
            status = response["status_code"]
            self.ends[f"{status}"] += 1
            assert (entry["error"] is None) == (status == 200) and status != 500, entry
            if str(entry["custom_id"]).startswith(SENTINEL):
                texts.add(response["body"]["choices"][0]["text"])
        assert len(texts) == 1, texts


def fuzz(num_lines: int, seed: int = 0) -> Counter[str]:
    """Fuzz all kinds of tokenizers. Returns the number of lines by status code."""
    warnings.simplefilter("ignore", RuntimeWarning)
    ends: Counter[str] = Counter()
    batch, every = 100, kinds()
    for number in range(math.ceil(num_lines / batch)):
        fuzzer = Fuzzer(every[number % len(every)], random.Random(f"{seed}/{number}"))
        fuzzer.run(batch)
        ends += fuzzer.ends
    return ends


if __name__ == "__main__":
    logging.basicConfig()
    print(dict(fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
