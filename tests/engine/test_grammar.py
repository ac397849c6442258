"""Answers under a grammar: always in its language, and the same after an interruption."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from mellmpi.engine import grammar as engine_grammar
from mellmpi.engine.grammar import Grammars
from mellmpi.engine.sampler import sample
from mellmpi.models.random_model import write_byte_tokenizer
from mellmpi.protocol import GREEDY, Chunk, Sampling
from tests.engine.answers import fits
from tests.frontend.tokenizers_of_each_kind import byte_fallback, byte_level

VOCAB, END = 523, 2  # more logits than the tokenizer's 259 tokens, and no multiple of 8
STOPS = (END, 0)
LONGEST = 400


def of_schema(schema) -> str:
    options = {"whitespace_pattern": r"[ \n]{1,2}"}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def of_regex(regex: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(VOCAB, directory)
    return directory / "tokenizer.json"


@pytest.fixture(scope="session")
def text_of(tokenizer_file):
    """Tokens -> text, by an independent decoder."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_file)).decode


def logits_of(seed: int, position: int, vocab: int = VOCAB) -> torch.Tensor:
    """Logits that depend on request and position alone, and prefer what closes a JSON value."""
    rng = np.random.default_rng((seed, position))
    logits = rng.standard_normal(vocab).astype(np.float32) * 3
    return torch.from_numpy(logits)


def next_chunk(request_id: int, sampling: Sampling, outputs: list[int], prompt=(70, 71)) -> Chunk:
    position = len(prompt) + len(outputs) - 1
    return Chunk(request_id, position, (0,), [0], sampling, (prompt, outputs))


def decode(grammars, sampling, request_id=1, until=LONGEST, outputs=None, vocab=VOCAB):
    """Outputs up to a stop token or `until` of them, continued from `outputs`."""
    outputs = [] if outputs is None else outputs
    while len(outputs) < until and not (outputs and outputs[-1] in sampling.stop_token_ids):
        chunk = next_chunk(request_id, sampling, outputs)
        logits = logits_of(sampling.seed, len(outputs), vocab)[None]
        outputs += sample(logits, [chunk], grammars.masks([chunk])).tokens
    return outputs


def sampling_of(grammar: str, seed: int = 0, **changes) -> Sampling:
    base = replace(GREEDY, max_tokens=LONGEST, temperature=1.0, stop_token_ids=STOPS, seed=seed)
    return replace(base, grammar=grammar, **changes)


# --- schemas -------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "key", "ä", 'q"'])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.sampled_from(["", "x", 'a"b', "é\n"])
)


@st.composite
def ranges(draw):
    low = draw(st.integers(-1000, 1000))
    high = low + draw(st.integers(0, 500))
    names = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "maximum")]))
    return {"type": "integer", names[0]: low - (names[0] != "minimum"), names[1]: high}


STRINGS = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 4),
        st.integers(0, 6),
    ),
    st.sampled_from(["^[a-c]{2,4}$", "^x(yz)*$", "^[0-9]{3}-[A-Z]$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
)
LEAVES = st.one_of(
    ranges(),
    STRINGS,
    st.just({"type": ["boolean", "null"]}),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
)


@st.composite
def objects(draw, inner):
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


@st.composite
def arrays(draw, inner):
    low = draw(st.integers(0, 2))
    return {
        "type": "array",
        "items": draw(inner),
        "minItems": low,
        "maxItems": low + draw(st.integers(0, 2)),
    }


def any_of(parts):
    return {"anyOf": parts}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(any_of)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_complete_answer_is_valid_under_its_schema(tokenizer_file, text_of, schema, seed):
    grammars = Grammars(tokenizer_file, VOCAB, 1)
    outputs = decode(grammars, sampling_of(of_schema(schema), seed))
    assert outputs[-1] in STOPS, "bounded schemas end"
    text = text_of(outputs[:-1])
    assert fits(json.loads(text), schema), text


RECURSIVE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": 0, "maximum": 9},
                "of": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
            },
            "required": ["n", "of"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/tree",
}
FIXED = [
    RECURSIVE,
    {"type": "array", "prefixItems": [{"const": 1}, {"enum": ["x"]}], "items": False},
    {"oneOf": [{"const": "a"}, {"type": "integer", "minimum": 1, "maximum": 3}]},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 90},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
]


@pytest.mark.parametrize("schema", FIXED, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_answers_under_other_keywords_are_valid(tokenizer_file, text_of, schema, seed):
    outputs = decode(Grammars(tokenizer_file, VOCAB, 1), sampling_of(of_schema(schema), seed))
    assert outputs[-1] in STOPS and fits(json.loads(text_of(outputs[:-1])), schema)


@pytest.mark.parametrize("settings_", [dict(temperature=0.0), dict(top_k=3), dict(min_p=0.3)])
def test_truncation_and_penalties_leave_the_grammar_as_it_is(tokenizer_file, text_of, settings_):
    regex = r"(yes|no)(, (yes|no)){2,4}\."
    for changes in (settings_, dict(settings_, frequency_penalty=2.0, repetition_penalty=3.0)):
        sampling = sampling_of(of_regex(regex), **changes)
        outputs = decode(Grammars(tokenizer_file, VOCAB, 1), sampling)
        assert outputs[-1] in STOPS and re.fullmatch(regex, text_of(outputs[:-1]))


@pytest.mark.parametrize("kind", [byte_level(), byte_fallback()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("regex", ["[a-z ]{5,9}!", "(née|日本語|👍🏽)+x", r"(?s:.{3,5})"])
def test_tokens_of_several_bytes_and_of_parts_of_characters(tmp_path, kind, regex):
    file = tmp_path / "tokenizer.json"
    kind.backend.save(str(file))
    ours, vocab = kind.ours.token_bytes, kind.backend.get_vocab_size() + 5
    for seed in range(20):
        outputs = decode(Grammars(file, vocab, 1), sampling_of(of_regex(regex), seed), vocab=vocab)
        data = b"".join(ours[token] for token in outputs[:-1])
        assert outputs[-1] in STOPS and re.fullmatch(regex, data.decode()), data


# --- interruptions -------------------------------------------------------------------------------

MOVED = sampling_of(of_schema({"type": "array", "items": {"enum": ["ab", 12, None]}}), 5)


def test_an_interruption_at_any_position_changes_no_token(tokenizer_file):
    whole = decode(Grammars(tokenizer_file, VOCAB, 1), MOVED, until=60)
    assert len(whole) > 8
    for at in range(len(whole)):
        fresh = Grammars(tokenizer_file, VOCAB, 1)
        assert decode(fresh, MOVED, until=60, outputs=whole[:at]) == whole


@settings(max_examples=60)
@given(data=st.data())
def test_workers_that_hand_a_request_to_and_fro_agree_with_one(tokenizer_file, data):
    """Also when tokens that a worker has computed were lost, and others came instead."""
    whole = decode(Grammars(tokenizer_file, VOCAB, 1), MOVED, until=40)
    workers = [Grammars(tokenizer_file, VOCAB, 1) for _ in range(2)]
    outputs: list[int] = []
    while len(outputs) < len(whole):
        worker = workers[data.draw(st.integers(0, 1))]
        if data.draw(st.booleans()):  # these tokens are lost
            other = replace(MOVED, seed=data.draw(st.integers(10, 12)))
            decode(worker, other, until=len(outputs) + 3, outputs=list(outputs))
        until = min(len(whole), len(outputs) + data.draw(st.integers(1, 9)))
        outputs = decode(worker, MOVED, until=until, outputs=list(outputs))
    assert outputs == whole


def test_a_row_does_not_depend_on_the_batch(tokenizer_file):
    samplings = [
        MOVED,
        sampling_of(""),
        sampling_of(of_regex("[ab]{30}"), 3),
        sampling_of(of_schema({"type": "string"}), 4),
    ]
    alone = [decode(Grammars(tokenizer_file, VOCAB, 1), s, until=20) for s in samplings]
    grammars, lists = Grammars(tokenizer_file, VOCAB, 2), [[] for _ in samplings]
    for step in range(20):
        rows = [i for i, outputs in enumerate(lists) if len(outputs) == step]
        rows = [i for i in rows if not lists[i] or lists[i][-1] not in STOPS]
        chunks = [next_chunk(i, samplings[i], lists[i]) for i in rows]
        logits = torch.stack([logits_of(samplings[i].seed, step) for i in rows])
        for i, token in zip(
            rows, sample(logits, chunks, grammars.masks(chunks)).tokens, strict=True
        ):
            lists[i].append(token)
    assert lists == alone


def test_decoding_consumes_each_token_once(tokenizer_file, monkeypatch):
    grammars, rebuilt = Grammars(tokenizer_file, VOCAB, 1), []
    original = Grammars._rebuilt
    monkeypatch.setattr(
        Grammars, "_rebuilt", lambda self, c: rebuilt.append(c) or original(self, c)
    )
    decode(grammars, MOVED, until=30)
    assert len(rebuilt) == 1


def test_matchers_of_requests_that_are_gone_are_dropped(tokenizer_file, monkeypatch):
    monkeypatch.setattr(engine_grammar, "KEPT", 3)
    grammars = Grammars(tokenizer_file, VOCAB, 1)
    for request_id in range(20):
        decode(grammars, MOVED, request_id, until=2)
    assert list(grammars._states) == [16, 17, 18, 19]


# --- ends ----------------------------------------------------------------------------------------


def allowed(grammars, sampling, outputs=()) -> set[int]:
    chunk = next_chunk(1, sampling, list(outputs))
    mask = grammars.masks([chunk])[0]
    assert len(mask) == -(-VOCAB // 8)
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def ids_of(tokenizer_file, text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_file)).encode(text).ids


def test_stop_tokens_come_where_the_grammar_is_complete_and_nowhere_else(tokenizer_file):
    a, b = ids_of(tokenizer_file, "ab")
    grammars = Grammars(tokenizer_file, VOCAB, 1)
    sampling = sampling_of(of_regex("a|ab"))
    assert allowed(grammars, sampling) == {a}
    assert allowed(grammars, sampling, [a]) == {b, *STOPS}
    assert allowed(grammars, sampling, [a, b]) == set(STOPS)


def test_a_stop_token_that_is_text_ends_only_what_is_complete(tokenizer_file):
    a, b = ids_of(tokenizer_file, "ab")
    grammars = Grammars(tokenizer_file, VOCAB, 1)
    sampling = sampling_of(of_regex("a(b|a)*"), stop_token_ids=(END, b))
    assert allowed(grammars, sampling) == {a}
    assert allowed(grammars, sampling, [a]) == {a, b, END}
    sampling = replace(sampling, grammar=of_regex("a[abd]c"))
    assert allowed(Grammars(tokenizer_file, VOCAB, 1), sampling, [a]) == {a, b + 2}


def test_special_tokens_and_ids_beyond_the_tokenizer_never_come(tokenizer_file):
    grammars = Grammars(tokenizer_file, VOCAB, 1)
    sampling = sampling_of(of_regex("(?s:.*)"), stop_token_ids=(END,))
    ids = allowed(grammars, sampling)
    assert END in ids and not ids & {0, 1} and max(ids) < 259


def test_more_tokens_than_logits(tokenizer_file):
    sampling = replace(MOVED, grammar=of_regex("[a-z]{3}"))
    outputs = decode(Grammars(tokenizer_file, 100, 1), sampling, vocab=100)
    assert len(outputs) == 4 and outputs[-1] in STOPS


def test_a_grammar_whose_tokens_the_model_lacks_ends_at_once(tokenizer_file):
    (token,) = ids_of(tokenizer_file, "}")  # the first that is missing, in the mask's last byte
    for regex in ("é", "}"):
        sampling = sampling_of(of_regex(regex))
        assert decode(Grammars(tokenizer_file, token, 1), sampling, vocab=token) == [END]


@pytest.mark.parametrize(
    "grammar", ["", "no grammar", of_regex("("), of_schema({"not": {}}), of_schema({"$ref": "#"})]
)
def test_a_grammar_that_fails_ends_the_answer(tokenizer_file, grammar, caplog):
    """The front refuses all of these."""
    sampling = sampling_of(grammar or "start: nothing")
    assert decode(Grammars(tokenizer_file, VOCAB, 1), sampling) == [END]
    assert "request 1 ends because its grammar fails" in caplog.text


def test_outputs_outside_the_grammar_end_the_answer(tokenizer_file):
    outputs = [*ids_of(tokenizer_file, "x")]
    assert decode(Grammars(tokenizer_file, VOCAB, 1), MOVED, outputs=outputs)[1:] == [END]


def test_a_limit_that_only_a_long_lived_matcher_reaches_changes_nothing(
    tokenizer_file, monkeypatch
):
    """Its states are counted from its first mask on; a new one counts again."""
    (c,) = ids_of(tokenizer_file, "c")
    sampling = sampling_of(of_regex("(a|b)*a(a|b){12}c"), 1, logit_bias=((c, -100.0),))
    expected = decode(Grammars(tokenizer_file, VOCAB, 1), sampling, until=100)
    limits = {**engine_grammar.GRAMMAR_LIMITS, "max_lexer_states": 150}
    monkeypatch.setattr(engine_grammar, "GRAMMAR_LIMITS", limits)
    failed = []
    original = Grammars._rebuilt
    monkeypatch.setattr(Grammars, "_rebuilt", lambda g, c: failed.append(c) or original(g, c))
    assert decode(Grammars(tokenizer_file, VOCAB, 1), sampling, until=100) == expected
    assert len(expected) == 100 and 1 < len(failed) < 10


def test_whatever_mask_comes_with_a_failure_only_the_end_is_allowed(tokenizer_file):
    class Failing:
        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "at a limit"

    bits, chunk = np.full(-(-VOCAB // 8) + 3, 0xFF, np.uint8), next_chunk(1, MOVED, [])
    mask = Grammars(tokenizer_file, VOCAB, 1)._with_stops(bits, chunk, Failing())
    assert np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist() == [END]
