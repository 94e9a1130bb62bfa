"""Makes an interpreter of Reprise's own a quiet guest in the host's process."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any


def settle_in(cache_dir: str | None) -> None:
    """Called before torch is imported."""
    # setenv moves the environment while the host's other threads may read it
    # (getenv(3), MT-Safety); Inductor sets variables for itself alone.
    os.putenv = os.unsetenv = lambda *_: None
    # Signals are the host's.
    signal.signal = lambda *_: signal.SIG_DFL
    if cache_dir:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache_dir, "inductor")
    # It says on import that there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _refuse_another_libtorch()
    sys.meta_path.insert(0, _KeepTheHostsEngine())


class _KeepTheHostsEngine:
    """Leaves the host's backward passes to libtorch's own engine: see host_engine.h. Python
    itself asks for its engine by name.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch._C":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            stock = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                stock(module)
                _use_libtorchs_engine(spec.origin)

            spec.loader.exec_module = exec_module
        return spec


def _use_libtorchs_engine(torch_c: str | None) -> None:
    import ctypes  # not every Python has it

    library = ctypes.CDLL(str(Path(torch_c or "").parent / "lib" / "libtorch_cpu.so"))
    try:
        use = library["_ZN5torch8autograd23set_default_engine_stubEPFRNS0_6EngineEvE"]
        engine = library["_ZN5torch8autograd6Engine15get_base_engineEv"]
    except AttributeError:
        return  # another torch: its engine stays
    use.argtypes, use.restype = [ctypes.c_void_p], None
    use(ctypes.cast(engine, ctypes.c_void_p))


def keep_what_is_loaded() -> None:
    """Spares the collector the half million objects that stay for good: a tenth
    of a compile's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _refuse_another_libtorch() -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the compiler's Python has no torch; install the same version as the "
            "libtorch of this program, or name another Python"
        )
    theirs = (Path(spec.submodule_search_locations[0]) / "lib" / "libtorch_cpu.so").resolve()
    with open("/proc/self/maps") as maps:
        ours = {line.split(maxsplit=5)[-1].strip() for line in maps if "libtorch_cpu.so" in line}
    others = {path for path in ours if Path(path).resolve() != theirs}
    if others:
        raise ImportError(
            f"this program runs on {others.pop()}, the compiler's Python has {theirs}: two "
            "libtorch in one process; build against the Python's, or name that Python"
        )
