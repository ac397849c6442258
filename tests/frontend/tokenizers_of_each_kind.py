"""Small tokenizers of the common kinds, each with an independent decoder for comparison."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mellmpi.frontend import Tokenizer as Ours

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "née naïve café über straße",
    "日本語 テキスト です",
    "👍🏽 😀 ok 👩\u200d👩\u200d👧",
    "x = [1, 2, 3]\n\tif x: pass",
    "  two  spaces ",
    "Привет мир",
    "a\u0301 e\u0301",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer."""

    name: str
    backend: Tokenizer
    exact: Callable[[Sequence[int]], str] | None = None  # the decoder of sentencepiece

    @property
    def ours(self) -> Ours:
        return Ours(self.backend, None, {"eos_token": "</s>"})

    @property
    def theirs(self) -> PreTrainedTokenizerFast:
        """The same tokenizer in transformers."""
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, clean_up_tokenization_spaces=False
        )


def byte_level() -> Kind:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<tool call>", normalized=False)])
    return Kind("byte level", backend)


def trained(model_type: str, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Return a SentencePiece model trained on TEXT, with byte fallback."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=written,
        model_type=model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["<|im_end|>"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def byte_fallback() -> Kind:
    """As in Llama 2: SentencePiece BPE, decoded in steps."""
    theirs = trained("bpe", 400)
    vocab = {theirs.id_to_piece(i): i for i in range(theirs.vocab_size())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIAL)
    return Kind("byte fallback", backend, theirs.decode)


def unigram() -> Kind:
    """As in T5: SentencePiece unigram, decoded by Metaspace."""
    theirs = trained("unigram", 400)
    pieces = [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(theirs.vocab_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Metaspace(),
            decoders.Fuse(),
        ]
    )
    backend.add_special_tokens(SPECIAL)
    return Kind("unigram", backend)


def word_piece() -> Kind:
    """As in BERT: WordPiece."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return Kind("word piece", backend)


def kinds() -> list[Kind]:
    return [byte_level(), byte_fallback(), unigram(), word_piece()]
