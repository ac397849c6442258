"""Reading of model files, with errors that name the file and say what to do."""

import json
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def expanded(path: str) -> Path:
    """`path` with `~` and `~USER` replaced by the home directory; ValueError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home directory in {path!r} cannot be found: {error}") from error


def refuse_pointer(head: bytes, file: Path) -> None:
    """ValueError if `head`, the first bytes of `file`, are those of a Git LFS pointer."""
    if head.startswith(LFS_POINTER):
        raise ValueError(
            f"{file} is a Git LFS pointer, not the file itself: "
            f"run `git lfs pull` in {file.absolute().parent}"
        )


def refuse_broken_link(file: Path) -> None:
    """ValueError if `file` is a broken symbolic link, as in an incomplete copy of a cache."""
    if file.is_symlink() and not file.exists():
        raise ValueError(
            f"{file} is a symbolic link to {file.readlink()}, which does not exist: copy the model "
            "again, following links (cp -rL, rsync -aL)"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ValueError if the file holds anything else."""
    data = file.read_bytes()
    refuse_pointer(data, file)
    if not data.strip(b" \t\r\n\0"):
        raise ValueError(f"{file} is empty: copy or download it again")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(_fault(file, data, error)) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object {{…}}, not {short(value)}")
    return value


def check_json_ends(file: Path) -> None:
    """ValueError if the first and last bytes of `file` are not those of a JSON object.

    For large files; the bytes between are checked when the file is loaded.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(256)
        stream.seek(max(0, size - 256))
        tail = stream.read()
    refuse_pointer(head, file)
    if not head.strip(b" \t\r\n\0"):
        raise ValueError(f"{file} is empty: copy or download it again")
    if not head.lstrip(b" \t\r\n").startswith(b"{"):
        raise ValueError(f"{file} is not JSON: copy or download it again")
    if not tail.rstrip(b" \t\r\n").endswith(b"}"):
        raise ValueError(f"{file} is cut short at {size} bytes: copy or download it again")


def short(value: object) -> str:
    """`repr(value)` for an error message, on one line and cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _fault(file: Path, data: bytes, error: Exception) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        return f"{file} begins with a byte order mark: save it as UTF-8 without one"
    if b"\0" in data[:4]:
        return f"{file} is not UTF-8 text (UTF-16 or UTF-32?): save it as UTF-8"
    if isinstance(error, RecursionError):
        return f"{file} is nested too deeply to be a model's file: copy or download it again"
    return f"{file} is not JSON or is cut short ({error}): copy or download it again"


def on_one_line(text: str) -> str:
    """`text` with line ends and other characters that cannot be shown written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
