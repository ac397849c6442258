"""A tokenizer with one token per byte: text and tokens are easy to compare by eye."""

import pytest

from mellmpi.frontend import ServedModel, ServedModels, Tokenizer


@pytest.fixture(scope="session")
def served(model_directories):
    """The kinds of models that call tools, with their tokenizers."""
    pairs = []
    for name, directory in model_directories.items():
        limits = ServedModel(name=name, max_model_len=5000, vocab_size=512, eos_ids=(2,))
        pairs.append((limits, Tokenizer.load(directory)))
    return ServedModels.of(*pairs)


@pytest.fixture(scope="session")
def tokenizer(byte_directory):
    return Tokenizer.load(byte_directory)


@pytest.fixture(scope="session")
def model():
    return ServedModel(name="tiny", max_model_len=100, vocab_size=512, eos_ids=(2,))
