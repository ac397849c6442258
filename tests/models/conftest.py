"""A tiny model directory, and one compute thread for torch."""

from pathlib import Path

import pytest
import torch

from tests.models import model_directories as models


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two compute threads on shared cores stall each other by 10x and more."""
    torch.set_num_threads(1)


@pytest.fixture
def model(tmp_path) -> Path:
    return models.write_model(tmp_path / "m")
