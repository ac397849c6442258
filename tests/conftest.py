"""The demo model, converted once for all tests of a run."""

import shutil

import pytest


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Its directory: config.json, model.safetensors in float32, tokenizer."""
    from mellmpi.engine.checkpoint import resolve

    cache = tmp_path_factory.mktemp("models")
    yield resolve("smollm2", cache)
    shutil.rmtree(cache)  # half a gigabyte
