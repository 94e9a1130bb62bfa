"""Reprise's compiler: recorded traces (docs/trace_format.md) into AOTInductor
packages. `initialize` first, once; then `compile`, always on the same thread.
"""

from __future__ import annotations

from typing import Any

_builder: Any = None
_compile_seconds = 0.0


def initialize(
    cache_dir: str | None = None,
    toolchain_dir: str | None = None,
    interpreter_is_ours: bool = False,
    compile_seconds: float | str = 0.0,
) -> None:
    """Imports all that a compile needs and begins to build the toolchain.

    `toolchain_dir` is what prebuild.py has made, if anything.
    `interpreter_is_ours` is said by the host library when it has started this
    interpreter for nothing but compiling. A compile that takes longer than
    `compile_seconds` is given up; 0: none is.
    """
    global _builder, _compile_seconds
    _compile_seconds = float(compile_seconds or 0)
    if interpreter_is_ours:
        from .guest import settle_in

        settle_in(cache_dir)
    from .build_package import PackageBuilder

    _builder = PackageBuilder(cache_dir or None, toolchain_dir or None)
    _builder.warm_up()
    if interpreter_is_ours:
        from .guest import keep_what_is_loaded

        keep_what_is_loaded()


def compile(trace_json: str, output_path: str) -> dict[str, Any]:
    """Compiles a trace into a package at `output_path` (absolute, `.pt2`), and
    returns the seconds spent in each phase.
    """
    if _builder is None:
        initialize()
    from .deadline import deadline

    with deadline(_compile_seconds):
        return _builder.compile(trace_json, output_path)
