"""Property tests that try the same examples in every run; the demo model, converted once a run."""

import shutil

import pytest
from hypothesis import settings

# A failure can be run again.
settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Its directory: config.json, model.safetensors in float32, tokenizer."""
    from mellmpi.models import resolve

    cache = tmp_path_factory.mktemp("models")
    yield resolve("smollm2", cache)
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory):
    """A directory with a tokenizer of one token per byte."""
    from mellmpi.models.random_model import write_byte_tokenizer

    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(512, directory)
    return directory


@pytest.fixture(scope="session")
def model_directories(tmp_path_factory):
    """A directory for each kind of model that calls tools, by name."""
    from tests.frontend.models_with_tools import MODELS, write_model

    directories = {}
    for name, model in MODELS.items():
        directories[name] = tmp_path_factory.mktemp("model")
        write_model(model, directories[name])
    return directories
