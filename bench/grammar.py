"""What do grammars cost a step, and a worker that takes a request over?

    python bench/grammar.py [--batch 32] [--tokens 128] [--threads 1] [--json FILE]

SmolLM2 decodes a batch without and a batch with a grammar in every row, a step of each in turn.
`share` is the median difference as a share of the step without. `masks_ms` is the part in which
masks are computed; applying them is the rest. `rebuild_ms` is the time to make the matcher of one
request again from all of its tokens, as after a move. Times are CPU times of the process: with one
thread they equal wall times on an idle machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from record import add_json_option, finish


def list_of(**properties: Any) -> dict[str, Any]:
    """A schema of lists of objects, so long that no answer ends."""
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "minItems": 1000, "items": item}


SCHEMAS = {
    "plain": list_of(
        name={"type": "string"},
        age={"type": "integer"},
        kind={"enum": ["person", "place", "thing"]},
        tags={"type": "array", "items": {"type": "string"}},
        of={"anyOf": [{"type": "null"}, {"type": "number"}, {"type": "boolean"}]},
    ),
    "bounded": list_of(
        name={"type": "string", "maxLength": 40},
        age={"type": "integer", "minimum": 0, "maximum": 150},
        tags={"type": "array", "items": {"type": "string", "pattern": "^[a-z ]{1,20}$"}},
    ),
}
PROMPT = 64
WARM_UP = 8  # steps that are not measured


@dataclass
class Live:
    """A sequence that decodes."""

    id: int
    prompt: tuple[int, ...]
    sampling: Any
    table: list[int]
    outputs: list[int] = field(default_factory=list)


class Batch:
    """A batch of sequences on an executor, which prefills with its first step."""

    def __init__(self, executor: Any, lives: list[Live], tokenizer_file: Path):
        self.executor, self.lives, self.tokenizer_file = executor, lives, tokenizer_file

    def grammars(self) -> Any:
        """Return the grammars of a worker that knows none of the requests."""
        from mellmpi.engine.grammar import Grammars

        return Grammars(self.tokenizer_file, self.executor.arch.vocab_size, 1)

    def plan(self) -> Any:
        from mellmpi.protocol import Chunk, StepPlan

        chunks = []
        for live in self.lives:
            tokens = [*live.prompt, *live.outputs]
            start = len(tokens) - 1 if live.outputs else 0
            history = (live.prompt, live.outputs)
            new = tuple(tokens[start:])
            chunks.append(Chunk(live.id, start, new, live.table, live.sampling, history))
        return StepPlan("m", tuple(chunks), ())

    def step(self) -> float:
        """Compute one token of each sequence. Returns seconds of CPU time."""
        plan = self.plan()
        began_s = time.process_time()
        result = self.executor.execute(plan)
        took_s = time.process_time() - began_s
        for live, token in zip(self.lives, result.tokens, strict=True):
            live.outputs.append(token)
        return took_s


def timed(call: Callable[[], Any], times: list[float]) -> Callable[..., Any]:
    """`call`, which appends its seconds to `times`."""

    def run(*args: Any) -> Any:
        began_s = time.process_time()
        result = call(*args)
        times.append(time.process_time() - began_s)
        return result

    return run


def milliseconds(times: list[float]) -> float:
    return round(statistics.median(times) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100, help="measured steps of each batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    add_json_option(parser)
    args = parser.parse_args()
    config = {name: value for name, value in vars(args).items() if name != "json"}
    results = {name: row(name, **config) for name in SCHEMAS}
    for name, measured in results.items():
        print(name, measured, file=sys.stderr)
    finish({**config, "schemas": SCHEMAS}, results, args.json)


def row(schema: str, batch: int, tokens: int, threads: int, dtype: str) -> dict[str, float]:
    """Measure one schema."""
    from mellmpi.engine.grammar import Grammars

    plain, masked = batches(schema, batch, tokens, threads, dtype)
    masks, masks_s = Grammars.masks, []
    Grammars.masks = timed(masks, masks_s)  # type: ignore[method-assign]
    times = [(plain.step(), masked.step()) for _ in range(WARM_UP + tokens)][WARM_UP:]
    Grammars.masks = masks  # type: ignore[method-assign]
    rebuild_s: list[float] = []
    for _ in range(20):
        timed(masked.grammars().masks, rebuild_s)(masked.plan().chunks[:1])
    plain_ms = milliseconds([a for a, _ in times])
    return {
        "plain_ms": plain_ms,
        "grammar_ms": milliseconds([b for _, b in times]),
        "share": round(milliseconds([b - a for a, b in times]) / plain_ms, 4),
        "masks_ms": milliseconds(masks_s[1::2][WARM_UP:]),  # the others are of the plain batch
        "rebuild_ms": milliseconds(rebuild_s),
        "rebuilt_tokens": len(masked.lives[0].outputs),
    }


def batches(schema: str, batch: int, tokens: int, threads: int, dtype: str) -> tuple[Batch, Batch]:
    """A batch without grammars and one with them, on one executor."""
    from llguidance import LLMatcher

    from mellmpi.config import CacheConfig, ModelConfig
    from mellmpi.engine import build_executor
    from mellmpi.models import resolve
    from mellmpi.protocol import GREEDY

    directory = resolve("smollm2", Path.home() / ".cache" / "mellmpi")
    cache = CacheConfig(kv_cache_memory_bytes=1 << 30)
    config = ModelConfig(model="smollm2", dtype=dtype)
    executor = build_executor(directory, config, cache, device="cpu", num_threads=threads)
    blocks = -(-(PROMPT + tokens + WARM_UP + 2) // executor.arena.block_size)
    text = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMAS[schema]))
    random = replace(GREEDY, max_tokens=9999, temperature=1.0, stop_token_ids=(2,))

    def live(index: int, grammar: str) -> Live:
        prompt = tuple((index * 97 + i * 31) % 40_000 + 100 for i in range(PROMPT))
        table = list(range(index * blocks, (index + 1) * blocks))
        return Live(index, prompt, replace(random, seed=index, grammar=grammar), table)

    def make(first: int, grammar: str) -> Batch:
        lives = [live(index, grammar) for index in range(first, first + batch)]
        return Batch(executor, lives, directory / "tokenizer.json")

    return make(0, ""), make(batch, text)


if __name__ == "__main__":
    main()
