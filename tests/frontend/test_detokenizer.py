"""Incremental decoding gives the same text as transformers and sentencepiece."""

import random
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models

from mellmpi.frontend.detokenizer import TextStream, TokenBytes
from tests.frontend.tokenizers_of_each_kind import kinds

KINDS = kinds()
HISTORIES = 300


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


def histories(kind, count=HISTORIES):
    """Yield random token ids, half of them from real text."""
    rng, size = random.Random(kind.name), kind.backend.get_vocab_size()
    real = [i for text in ("née 日本 👍🏽", "the x = \n ok") for i in kind.backend.encode(text).ids]
    for _ in range(count):
        length = rng.randint(0, 24)
        yield rng, [rng.choice([rng.randrange(size), rng.choice(real)]) for _ in range(length)]


def streamed(kind, tokens, prompt=()):
    stream = TextStream(kind.ours.token_bytes, prompt)
    return [*map(stream.push, tokens), stream.finish()]


def marked(text):
    """Replace runs of replacement marks by one mark."""
    return re.sub("\ufffd+", "\ufffd", text)


def has_no_byte_tokens(kind, tokens):
    """Transformers replaces a whole run of byte tokens if one byte of it is invalid."""
    names = [kind.backend.id_to_token(token) or "" for token in tokens]
    return not any(name.startswith("<0x") for name in names)


def test_the_text_of_random_ids_is_that_of_transformers(kind):
    theirs = kind.theirs
    for _, tokens in histories(kind):
        expected = theirs.decode(tokens, skip_special_tokens=True)
        if has_no_byte_tokens(kind, tokens):
            assert "".join(streamed(kind, tokens)) == expected
    assert any(has_no_byte_tokens(kind, tokens) for _, tokens in histories(kind))


def test_bytes_that_are_a_character_are_text_as_in_transformers():
    fallback = next(kind for kind in KINDS if kind.name == "byte fallback")
    for text in ("é", "日本", "a👍z", " x"):
        tokens = [fallback.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        expected = fallback.theirs.decode(tokens)
        assert "".join(streamed(fallback, tokens)) == expected == text.removeprefix(" ")


def test_the_text_of_random_ids_is_that_of_sentencepiece():
    fallback = next(kind for kind in KINDS if kind.exact)
    hidden = ("<unk>", "<s>", "</s>", "<|im_end|>")
    for _, tokens in histories(fallback):
        visible = [i for i in tokens if fallback.backend.id_to_token(i) not in hidden]
        if visible and fallback.backend.id_to_token(visible[0]) == "<0x20>":
            continue  # transformers takes this space away, sentencepiece does not
        assert "".join(streamed(fallback, visible)) == fallback.exact(visible)


def test_prompt_and_answer_together_are_the_text_of_all_ids(kind):
    for rng, tokens in histories(kind):
        cut = rng.randint(0, len(tokens))
        prompt, answer = tokens[:cut], tokens[cut:]
        both = "".join(streamed(kind, prompt)) + "".join(streamed(kind, answer, prompt))
        assert marked(both) == marked("".join(streamed(kind, tokens))) or splits(kind, prompt)


def splits(kind, prompt):
    """Return whether the prompt ends within a character, so that texts cannot be joined there."""
    return "".join(streamed(kind, prompt)).endswith("\ufffd")


def test_an_answer_completes_a_character_that_its_prompt_began():
    kind = KINDS[0]
    tokens = kind.backend.encode("x 👍").ids
    for cut in range(2, len(tokens)):
        assert "".join(streamed(kind, tokens[cut:], tokens[:cut])).endswith("👍")
    other = kind.backend.encode("ok").ids
    assert "".join(streamed(kind, other, tokens[:-1])) == "ok"


def test_a_stream_returns_complete_characters_only(kind):
    for _, tokens in histories(kind, 50):
        for delta in streamed(kind, tokens)[:-1]:
            assert delta == delta.encode().decode()
    kind_of_bytes = KINDS[0]
    deltas = streamed(kind_of_bytes, kind_of_bytes.backend.encode("a日").ids)
    assert [delta for delta in deltas if delta] == ["a", "日"]


def test_the_first_word_keeps_its_space_after_a_prompt_and_only_then():
    for kind in KINDS[1:3]:
        word = kind.backend.token_to_id("▁x")
        special = kind.backend.token_to_id("<s>")
        assert "".join(streamed(kind, [word])) == "x"
        assert "".join(streamed(kind, [word], [special])) == "x"
        assert "".join(streamed(kind, [word, word], [special, word])) == " x x"


def test_unknown_ids_have_no_text(kind):
    assert "".join(streamed(kind, [10**6, -1, 2**63])) == ""


def test_special_tokens_have_no_text_but_a_label(kind):
    token = kind.backend.token_to_id("<|im_end|>")
    assert streamed(kind, [token]) == ["", ""]
    assert kind.ours.token_bytes.label(token) == "<|im_end|>"


REPLACED = [decoders.Replace("▁", " ")]
VOCABULARY = ["a", "b</w>", "▁c", "##d", " ", "<0x41>", "▁", "e</w>"]


def decoded(decoder, names):
    """Return (our text, the library's text) of tokens with these names."""
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(VOCABULARY)}, "a"))
    if decoder is not None:
        backend.decoder = decoder
    tokens = [VOCABULARY.index(name) for name in names]
    stream = TextStream(TokenBytes(backend))
    return "".join([*map(stream.push, tokens), stream.finish()]), backend.decode(tokens)


@pytest.mark.parametrize(
    ("decoder", "names"),
    [
        (None, ["a", "##d", "a"]),
        (decoders.WordPiece(cleanup=False), ["##d", "a", "##d", "a"]),
        (decoders.BPEDecoder(), ["a", "b</w>", "a", "a"]),
        (decoders.Metaspace(), ["▁c", "a", "▁c"]),
        (decoders.Metaspace(), [" ", "▁c"]),
        (decoders.Metaspace(prepend_scheme="never"), ["▁c", "▁c"]),
        (decoders.Replace(Regex("[ac]"), "x"), ["a", "▁c"]),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
            ["▁c", "▁c", "a"],
        ),
        (
            decoders.Sequence([*REPLACED, decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
            ["▁", "▁c", "a"],
        ),
    ],
)
def test_decoders_of_every_kind_give_the_text_of_the_library(decoder, names):
    ours, theirs = decoded(decoder, names)
    assert ours == theirs


def test_a_decoder_that_panics_in_the_library_gives_text_here():
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(VOCABULARY)}, "a"))
    backend.decoder = decoders.Sequence(steps)
    stream = TextStream(TokenBytes(backend))
    assert stream.push(VOCABULARY.index("▁")) + stream.finish() == ""


def test_a_decoder_that_is_not_supported_is_refused_by_name():
    with pytest.raises(ValueError, match="the decoder 'CTC' of this tokenizer is not supported"):
        decoded(decoders.CTC(), ["a"])
