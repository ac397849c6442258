"""A disk cache of machine code, in numba's own cache directories.

Numba's cache compares only the source file of the function itself: it would go on using code made
from an older `gemm.py`. And two ranks that compile for different types at once may write their code
under one name. Here the name of an entry is a digest of all its sources, so an entry never changes.
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
    """A digest of the sources of all kernels and of the versions of their compilers."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class SourceCache(FunctionCache):
    """Numba's cache with one file for each signature, kind of CPU and state of the sources."""

    def __init__(self, py_func: Callable[..., Any]):
        super().__init__(py_func)  # type: ignore[no-untyped-call]
        self._stamp = source_stamp()

    def _use_file_of(self, sig: Any, codegen: Any) -> None:
        key = repr((str(sig), codegen.magic_tuple(), self._stamp))
        name = f"{self._impl.filename_base}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._cache_file = IndexDataCacheFile(  # type: ignore[no-untyped-call]
            self._cache_path, name, self._stamp
        )

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        self._use_file_of(sig, target_context.codegen())
        return super()._load_overload(sig, target_context)  # type: ignore[no-untyped-call]

    def _save_overload(self, sig: Any, data: Any) -> None:
        self._use_file_of(sig, data.codegen)
        super()._save_overload(sig, data)  # type: ignore[no-untyped-call]


def cached_on_disk(dispatcher: Any) -> Any:
    """The jitted function, with its code cached on disk where a cache directory is writable."""
    with suppress(RuntimeError):  # numba: no locator available, as in a read-only home
        dispatcher._cache = SourceCache(dispatcher.py_func)
    return dispatcher


@contextmanager
def compile_lock(dispatcher: Any, wait_s: float = 60.0) -> Iterator[None]:
    """Let one of several starting ranks compile a `cached_on_disk` function; the others load it.

    After `wait_s` seconds, or where no lock file can be made, go on without the lock.
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
    """An object file for this CPU from the LLVM assembly that `module` returns, cached on disk."""

    def compiled() -> bytes:
        _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=cpu, features=features, opt=3, jit=True
        )
        code: bytes = machine.emit_object(llvm.parse_assembly(module()))
        return code

    return _cached_file(module, f"{module.__name__}-{{}}.o", compiled)


def cached_number(name: str, measure: Callable[[], int]) -> int:
    """The result of `measure` for this kind of CPU and these kernels, cached on disk."""
    text = _cached_file(cached_number, f"{name}-{{}}.txt", lambda: str(measure()).encode())
    return int(text)


def _cached_file(owner: Callable[..., Any], form: str, make: Callable[[], bytes]) -> bytes:
    """The content that `make` returns, cached where numba caches the code of `owner`.

    form  the name of the file; {} stands for a digest of the sources and the kind of CPU
    """
    magic = cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(repr((source_stamp(), magic)).encode()).hexdigest()[:16]
    path = None
    with suppress(RuntimeError, OSError):
        locator = CompileResultCacheImpl(owner).locator  # type: ignore[no-untyped-call]
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
    """Make the symbols of an object file known to code that is linked later.

    The returned engine owns the machine code and must be held.
    """
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    for symbol in symbols:
        llvm.add_symbol(symbol, engine.get_function_address(symbol))
    return engine
