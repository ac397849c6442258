"""One server for all tests that do not harm it, and HTTP clients."""

import httpx2 as httpx
import pytest

from mellmpi.frontend import Tokenizer
from mellmpi.models.random_model import write_byte_tokenizer
from tests.api_server.serving_cell import ServingCell


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(512, directory)
    return directory


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
