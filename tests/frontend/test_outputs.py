"""An Output collects the emits of one request until the answer ends."""

from dataclasses import replace

import pytest

from mellmpi.frontend.outputs import Output
from mellmpi.protocol import GREEDY, Emit

SAMPLING = replace(GREEDY, max_tokens=9, stop_token_ids=(2,))


@pytest.fixture
def output(tokenizer):
    return lambda *stops: Output(tokenizer, SAMPLING, stops)


def emit(tokenizer, first, text, finish_reason=None, tokens=()):
    return Emit(1, first, (*tokenizer.encode(text), *tokens), (), finish_reason, ())


def test_text_grows_with_the_tokens(output, tokenizer):
    out = output()
    assert out.take(emit(tokenizer, 0, "ab")) == "ab" and out.finish_reason is None
    assert out.take(emit(tokenizer, 2, "c", "length")) == "c"
    assert (out.text, out.finish_reason, len(out.tokens)) == ("abc", "length", 3)


def test_the_token_that_ends_an_answer_counts_but_has_no_text(output, tokenizer):
    visible = tokenizer.encode("!")[0]
    for end in (2, visible):
        sampling = replace(SAMPLING, stop_token_ids=(2, visible))
        out = Output(tokenizer, sampling, ())
        out.take(emit(tokenizer, 0, "ab", "stop", tokens=(end,)))
        assert (out.text, out.finish_reason, len(out.tokens)) == ("ab", "stop", 3)


def test_stop_strings_do_not_count_before_the_minimum_length(tokenizer):
    out = Output(tokenizer, replace(SAMPLING, min_tokens=4), ("x",))
    assert out.take(emit(tokenizer, 0, "axb")) == "axb"
    assert out.take(emit(tokenizer, 3, "xc")) == "" and out.finish_reason == "stop"
    assert (out.text, len(out.tokens)) == ("axb", 4)


def test_tokens_after_a_stop_string_are_dropped_with_their_logprobs(output, tokenizer):
    out = output("END")
    tokens = tuple(tokenizer.encode("one END two"))
    rows = tuple((-float(n), (), ()) for n in range(len(tokens)))
    assert out.take(Emit(1, 0, tokens, rows, None, ())) == "one "
    assert (out.text, out.finish_reason) == ("one ", "stop")
    assert len(out.tokens) == len(out.logprobs) == len("one END")
    assert out.take(emit(tokenizer, 99, "late", "length")) == ""
    assert (out.text, out.finish_reason) == ("one ", "stop")


def test_a_stop_string_may_span_several_emits(output, tokenizer):
    out = output("\n\n")
    assert out.take(emit(tokenizer, 0, "a\n")) == "a"
    assert out.take(emit(tokenizer, 2, "\nb")) == ""
    assert (out.text, out.finish_reason) == ("a", "stop")


def test_an_incomplete_stop_string_belongs_to_the_text(output, tokenizer):
    out = output("\n\nQ")
    out.take(emit(tokenizer, 0, "a\n\n", "length"))
    assert (out.text, out.finish_reason) == ("a\n\n", "length")


def test_an_incomplete_character_at_the_end_becomes_a_replacement_mark(output, tokenizer):
    out = output("never")
    tokens = tuple(tokenizer.encode("ok é"))
    out.take(Emit(1, 0, tokens[:-1], (), "length", ()))
    assert out.text == "ok �"


def test_a_gap_in_the_tokens_is_a_bug_and_raises(output, tokenizer):
    with pytest.raises(AssertionError, match="out of order"):
        output().take(emit(tokenizer, 1, "b"))
