"""The interface to clients: OpenAI bodies, tokenizers, batch files, traces, stop strings.

Reads requests and writes answers. Knows no worker: it yields requests and takes their tokens.
"""

from mellmpi.frontend.batch import Answered, BatchJob, Counts
from mellmpi.frontend.replay import ReplayJob
from mellmpi.frontend.served import ServedModel, ServedModels
from mellmpi.frontend.tokenizer import Tokenizer

__all__ = [
    "Answered",
    "BatchJob",
    "Counts",
    "ReplayJob",
    "ServedModel",
    "ServedModels",
    "Tokenizer",
]
