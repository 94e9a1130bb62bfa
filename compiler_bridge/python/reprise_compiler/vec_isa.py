"""Which vector instructions compiled kernels may use, without building probes.

Stock Inductor (torch 2.11.0, _inductor/cpu_vec_isa.py) builds a shared library
for each candidate and loads it in a fresh Python process: 20 s on two cores.
Its callers have asked the processor first (`torch.cpu._is_avx2_supported()` and
so on, which are cpuid and xgetbv), so what is left to find out is whether the
C++ compiler knows the flags: one run over empty input, 15 ms each.
"""

from __future__ import annotations

import functools
import shlex
import subprocess


@functools.cache
def compiler_accepts(compiler: str, arch_flags: str) -> bool:
    if not arch_flags:
        return True
    command = [compiler, *shlex.split(arch_flags), "-fsyntax-only", "-x", "c++", "-"]
    try:
        return (
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
            .returncode
            == 0
        )
    except OSError:
        return False


def check_build(isa, code: str) -> bool:
    """Stands in for `VecISA.check_build`."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return compiler_accepts(get_cpp_compiler(), isa._arch_flags)
