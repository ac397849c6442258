"""Machine code kept on disk between starts.

Numba's own cache looks only at the file of the function itself: it would go on using code made from
an older `tile.py`. And when two ranks compile for different types at once, both may write their
code under one name. Here the name of an entry says what it was made from, so that it never changes.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile


def source_stamp() -> str:
    """Changes when any of the kernels does, or what compiles them."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class SourceCache(FunctionCache):
    """An entry a signature, kind of CPU and state of the sources; where numba would keep it."""

    def __init__(self, py_func: Callable[..., Any]):
        super().__init__(py_func)
        self._stamp = source_stamp()

    def _use_file_of(self, sig: Any, codegen: Any) -> None:
        key = repr((str(sig), codegen.magic_tuple(), self._stamp))
        name = f"{self._impl.filename_base}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, self._stamp)

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        self._use_file_of(sig, target_context.codegen())
        return super()._load_overload(sig, target_context)

    def _save_overload(self, sig: Any, data: Any) -> None:
        self._use_file_of(sig, data.codegen)
        super()._save_overload(sig, data)


def kept(dispatcher: Any) -> Any:
    """The jitted function, its code kept on disk where there is a place that can be written to."""
    with suppress(RuntimeError):  # numba: no locator available, as in a read-only home
        dispatcher._cache = SourceCache(dispatcher.py_func)
    return dispatcher
