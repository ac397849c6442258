"""Machine code kept on disk between starts, where numba would keep it: `__pycache__` or the home.

Numba's own cache looks only at the file of the function itself: it would go on using code made from
an older `tile.py`. And when two ranks compile for different types at once, both may write their
code under one name. Here the name of an entry says what it was made from, so that it never changes.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any
from uuid import uuid4

import llvmlite
import numba
from llvmlite import binding as llvm
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target


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


@contextmanager
def one_at_a_time(dispatcher: Any, wait_s: float = 60.0) -> Iterator[None]:
    """Let the first of several starting ranks compile a `kept` function, and the others load it.

    Who has waited too long, or has no file to wait at, goes ahead.
    """
    with ExitStack() as stack:
        with suppress(OSError, TypeError):  # TypeError: there is no path
            lock = stack.enter_context(open(Path(dispatcher._cache.cache_path) / "compiling", "w"))
            until = monotonic() + wait_s
            while not _locked(lock) and monotonic() < until:
                sleep(0.05)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def object_code(module: Callable[[], str]) -> bytes:
    """An object file for this CPU, of the LLVM assembly that `module` writes."""

    def compiled() -> bytes:
        _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=cpu, features=features, opt=3, jit=True
        )
        code: bytes = machine.emit_object(llvm.parse_assembly(module()))
        return code

    return _kept_file(module, f"{module.__name__}-{{}}.o", compiled)


def kept_number(name: str, measure: Callable[[], int]) -> int:
    """A number that was measured on this kind of CPU with these kernels, or is now."""
    text = _kept_file(kept_number, f"{name}-{{}}.txt", lambda: str(measure()).encode())
    return int(text)


def _kept_file(owner: Callable[..., Any], form: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, kept where numba would keep the code of `owner`.

    form  the name of the file; {} stands for the state of the sources and the kind of CPU
    """
    magic = cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(repr((source_stamp(), magic)).encode()).hexdigest()[:16]
    path = None
    with suppress(RuntimeError, OSError):
        locator = CompileResultCacheImpl(owner).locator
        locator.ensure_cache_path()
        path = Path(locator.get_cache_path()) / form.format(digest)
        return path.read_bytes()
    content = make()
    if path is not None:
        with suppress(OSError):
            part = path.with_suffix(f".{uuid4().hex[:12]}")
            part.write_bytes(content)
            part.replace(path)
    return content


def link(code: bytes, symbols: list[str]) -> llvm.ExecutionEngine:
    """Let all functions that are linked later find these; the engine owns the machine code."""
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    for symbol in symbols:
        llvm.add_symbol(symbol, engine.get_function_address(symbol))
    return engine
