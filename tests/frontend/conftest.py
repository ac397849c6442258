"""A tokenizer with one token per byte: text and tokens are easy to compare by eye."""

import pytest

from mellmpi.frontend import ServedModel, Tokenizer
from mellmpi.models.random_model import write_byte_tokenizer


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(512, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(byte_directory):
    return Tokenizer.load(byte_directory)


@pytest.fixture(scope="session")
def model():
    return ServedModel(name="tiny", max_model_len=100, vocab_size=512, eos_ids=(2,))
