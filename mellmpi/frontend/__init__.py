"""Requests in, answers out: OpenAI bodies, text and tokens, batch files, stop strings.

Knows no worker: a request is submitted, and its tokens come back.
"""

from mellmpi.frontend.batch import Answered, BatchJob, Counts
from mellmpi.frontend.destination import Destination, Unwritable, check_different
from mellmpi.frontend.formats import Read, Source
from mellmpi.frontend.inputs import Requests, check_input, is_descriptor, open_input, requests_in
from mellmpi.frontend.lines import descriptor_reader
from mellmpi.frontend.openai import Served, ServedModel
from mellmpi.frontend.replay import ReplayJob
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.visible import visible, visible_lines

__all__ = [
    "Answered",
    "BatchJob",
    "Counts",
    "Destination",
    "Read",
    "ReplayJob",
    "Requests",
    "Served",
    "ServedModel",
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
