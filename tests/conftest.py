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
