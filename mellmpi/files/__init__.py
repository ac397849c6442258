"""Files and pipes as people have them: read, resumed, proved writable; text made safe to show.

Knows lines of bytes and the answers that a file holds already, but neither requests nor models.
"""

from mellmpi.files.destination import Destination, Unwritable, check_different
from mellmpi.files.formats import Reader, Source
from mellmpi.files.inputs import Requests, check_input, is_descriptor, open_input, requests_in
from mellmpi.files.lines import Line, LineReader, descriptor_reader
from mellmpi.files.visible import visible, visible_lines

__all__ = [
    "Destination",
    "Line",
    "LineReader",
    "Reader",
    "Requests",
    "Source",
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
