"""One server for all tests that do not harm it, and HTTP clients."""

import httpx2 as httpx
import pytest

from mellmpi.frontend import Tokenizer
from tests.api_server.serving_cell import ServingCell


@pytest.fixture(scope="session")
def byte_tokenizer(byte_directory):
    return Tokenizer.load(byte_directory)


@pytest.fixture(scope="session")
def cell(byte_directory):
    with ServingCell(byte_directory, token_s=0.0005) as cell:
        yield cell


@pytest.fixture(scope="session")
def http(cell):
    with httpx.Client(base_url=cell.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def tool_cell(byte_directory, model_directories):
    with ServingCell(byte_directory, token_s=0.0005, other_models=model_directories) as cell:
        yield cell


@pytest.fixture
def script(tool_cell, model_directories):
    """Make a model answer with a text; returns the seed that asks for it."""

    def add(model, text):
        seed = len(tool_cell.scripts) + 1_000_000
        tool_cell.scripts[seed] = Tokenizer.load(model_directories[model]).encode(text)
        return seed

    return add
