"""The beginning of a job on its first process, before MPI starts. Imports little."""

from collections.abc import Callable

from mellmpi.config import Options
from mellmpi.runtime.serving import Door, open_door
from mellmpi.runtime.standard_input import StandardInput

ReadOptions = Callable[[Callable[[], bool]], Options]


class Begun:
    """What the first process of a launch does before MPI starts: it reads the options, and opens
    the door of a server. Errors are kept until the ranks can be told."""

    def __init__(self, read_options: ReadOptions):
        self.door: Door | None = None
        self._options: Options | None = None
        self._error: BaseException | None = None
        try:
            self._options = read_options(StandardInput().is_piped)
            if self._options.command == "serve":
                self.door = open_door(self._options)
        except Exception as error:
            self._error = error

    @property
    def options(self) -> Options:
        """The options. Raises the error of reading them, or of opening the door."""
        if self._error is not None:
            raise self._error
        assert self._options is not None
        return self._options
