"""The interface to clients: OpenAI bodies, tokenizers, batch files, traces, stop strings.

Reads requests and writes answers. Knows no worker: it yields requests and takes their tokens.
"""

from mellmpi.frontend.batch import Answered, BatchJob, Counts
from mellmpi.frontend.destination import Destination, Unwritable, check_different
from mellmpi.frontend.formats import Reader, Source
from mellmpi.frontend.inputs import Requests, check_input, is_descriptor, open_input, requests_in
from mellmpi.frontend.lines import descriptor_reader
from mellmpi.frontend.openai import ServedModel, ServedModels
from mellmpi.frontend.replay import ReplayJob
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.visible import visible, visible_lines

__all__ = [
    "Answered",
    "BatchJob",
    "Counts",
    "Destination",
    "Reader",
    "ReplayJob",
    "Requests",
    "ServedModel",
    "ServedModels",
    "Source",
    "Tokenizer",
    "Unwritable",
    "check_different",
    "check_input",
    "descriptor_reader",
    "is_descriptor",
    "open_input",
    "requests_in",
    "visible",
    "visible_lines",
]
