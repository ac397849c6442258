"""Ways to call `resolve`, and to check its refusals."""

import json
from pathlib import Path

import pytest

from mellmpi.models import resolve
from tests.models import model_directories as models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 25464248\n"
PROGRAM = """
import sys; from pathlib import Path; from mellmpi.models.checkpoint import resolve
try: print("found", resolve(sys.argv[1], Path(sys.argv[2])))
except ValueError as error: print("refused", error)
assert "torch" not in sys.modules
"""


def refusal(directory: Path | str) -> str:
    """The message, one line, with which `resolve` refuses a directory."""
    with pytest.raises(ValueError) as error:
        resolve(str(directory), Path(str(directory).removeprefix("random:")).parent / "cache")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def change_config(directory: Path, **changes) -> Path:
    """Set keys of config.json; `...` removes a key."""
    given = {**models.CONFIG, **changes}
    remaining = {key: value for key, value in given.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(remaining))
    return directory
