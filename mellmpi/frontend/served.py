"""The models of a server, as checks of requests need them."""

from dataclasses import dataclass, replace

from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.grammar import GrammarTrials
from mellmpi.frontend.tokenizer import Tokenizer


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
    grammars: dict[str, GrammarTrials]

    @staticmethod
    def of(*pairs: tuple[ServedModel, Tokenizer]) -> "ServedModels":
        """Pair models with tokenizers, and add each tokenizer's end tokens to its model."""
        models = {m.name: _with_end_ids(m, t) for m, t in pairs}
        grammars = {m.name: GrammarTrials(t, m.vocab_size) for m, t in pairs}
        return ServedModels(models, {m.name: t for m, t in pairs}, grammars)

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
