"""Datasets: the prompts of a run with the lengths of their answers, and arrivals of a trace."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mellmpi.files import visible
from mellmpi.loadgen.made_up import MadeUp, Vocabulary
from mellmpi.loadgen.options import DEFAULT_PROMPTS, BenchOptions
from mellmpi.workload import load, open_filled

CUSTOM_OUTPUT = 256  # tokens
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048  # tokens of a ShareGPT conversation, as in vLLM


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to be sent."""

    prompt: str | list[int]  # text or token ids
    prompt_tokens: int  # 0 if unknown
    output_tokens: int  # most tokens of the answer


@dataclass(frozen=True, slots=True)
class Dataset:
    """The requests of a run."""

    prompts: list[Prompt]
    arrival_s: np.ndarray | None = None  # float64 [prompts] of a trace
    source: str = ""  # one line about a trace


def read_dataset(options: BenchOptions, vocabulary: Vocabulary | None) -> Dataset:
    """Return the requests that the options describe. ValueError says what is wrong with a file."""
    if options.dataset_name == "trace":
        return _trace(options, vocabulary)
    wanted = options.num_prompts or DEFAULT_PROMPTS
    if options.dataset_name == "random":
        return Dataset(_random(options, vocabulary, wanted))
    if options.dataset_name == "sharegpt":
        found = list(_conversations(options, vocabulary))
    else:
        found = list(_custom(options, vocabulary))
    if not found:
        raise ValueError(f"{_path(options)} has no usable prompt")
    return Dataset(_drawn(found, wanted, options))


def _random(options: BenchOptions, vocabulary: Vocabulary | None, wanted: int) -> list[Prompt]:
    made_up = MadeUp(vocabulary, options.prompt_form == "ids", options.seed)
    rng = np.random.default_rng(options.seed)
    inputs = _lengths(rng, options.random_input_len, options.random_range_ratio, wanted)
    outputs = _lengths(rng, options.random_output_len, options.random_range_ratio, wanted)
    prefix = made_up.tokens(options.random_prefix_len)
    pairs = zip(inputs, outputs, strict=True)
    return [Prompt(*made_up.prompt(prefix, int(n)), int(output)) for n, output in pairs]


def _lengths(rng: np.random.Generator, mean: int, ratio: float, wanted: int) -> np.ndarray:
    """Return lengths between mean·(1 − ratio) and mean·(1 + ratio), at least 1."""
    low, high = max(1, int(mean * (1 - ratio))), max(1, int(mean * (1 + ratio)))
    return rng.integers(low, high + 1, wanted)


def _trace(options: BenchOptions, vocabulary: Vocabulary | None) -> Dataset:
    assert options.dataset_path is not None
    workload = load(options.dataset_path)
    workload = workload.first(options.num_prompts or len(workload))
    workload = workload.faster(options.rate_scale or 1.0).longer(options.length_scale or 1.0)
    made_up = MadeUp(vocabulary, options.prompt_form == "ids", options.seed)
    nothing = made_up.tokens(0)
    rows = zip(workload.prompt_tokens, workload.output_tokens, strict=True)
    prompts = [Prompt(*made_up.prompt(nothing, int(n)), int(output)) for n, output in rows]
    return Dataset(prompts, workload.arrival_s, workload.source)


# --- files ---------------------------------------------------------------------------------------


def _conversations(options: BenchOptions, vocabulary: Vocabulary | None) -> Iterator[Prompt]:
    """Yield the first two turns of each conversation: prompt, and length of the answer."""
    if vocabulary is None and options.sharegpt_output_len is None:
        raise ValueError(
            "--dataset-name sharegpt needs --tokenizer DIR, which counts the tokens of its "
            "answers, or --sharegpt-output-len N"
        )
    for entry in _json_list(options):
        turns = entry.get("conversations") or entry.get("conversation")
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        prompt, answer = (_value(turn) for turn in turns[:2])
        if not prompt or not answer:
            continue
        prompt_tokens = vocabulary.count(prompt) if vocabulary else 0
        output = options.sharegpt_output_len or (vocabulary.count(answer) if vocabulary else 0)
        if vocabulary is None or _is_usual(prompt_tokens, output, options):
            yield Prompt(prompt, prompt_tokens, output)


def _is_usual(prompt: int, output: int, options: BenchOptions) -> bool:
    shortest_output = 1 if options.sharegpt_output_len else SHORTEST
    is_long_enough = prompt >= SHORTEST and output >= shortest_output
    return is_long_enough and prompt <= LONGEST_PROMPT and prompt + output <= LONGEST


def _json_list(options: BenchOptions) -> list[dict[str, Any]]:
    try:
        entries = json.loads(_read(options))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_path(options)} is not JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{_path(options)} must be a JSON list of conversations")
    return entries


def _value(turn: Any) -> str:
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    return text if isinstance(text, str) else ""


def _custom(options: BenchOptions, vocabulary: Vocabulary | None) -> Iterator[Prompt]:
    for number, line in enumerate(_read(options).splitlines(), 1):
        if line.strip():
            try:
                yield _custom_prompt(json.loads(line), options, vocabulary)
            except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{_path(options)}, line {number}: "
                    '{"prompt": "…", "output_tokens": 100} is expected, output_tokens is optional'
                ) from error


def _custom_prompt(
    entry: dict[str, Any], options: BenchOptions, vocabulary: Vocabulary | None
) -> Prompt:
    prompt = entry["prompt"]
    output = options.custom_output_len or entry.get("output_tokens", CUSTOM_OUTPUT)
    if not isinstance(prompt, str) or type(output) is not int or output < 1:
        raise ValueError
    return Prompt(prompt, vocabulary.count(prompt) if vocabulary else 0, output)


def _drawn(found: list[Prompt], wanted: int, options: BenchOptions) -> list[Prompt]:
    """Return `wanted` prompts: shuffled, and some of them again if there are too few."""
    rng = random.Random(options.seed)
    if not options.disable_shuffle:
        rng.shuffle(found)
    if len(found) < wanted and not options.no_oversample:
        found += rng.choices(found, k=wanted - len(found))
    return found[:wanted]


def _read(options: BenchOptions) -> str:
    try:
        with open_filled(Path(options.dataset_path or "")) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{_path(options)} cannot be read: {why}") from error


def _path(options: BenchOptions) -> str:
    return f"--dataset-path {visible(options.dataset_path or '')}"
