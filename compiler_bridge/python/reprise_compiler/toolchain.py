"""The parts of every program that are the same in all of them, built once.

A wrapper as stock AOTInductor writes it takes g++ 4.2 s, however small the
model: nearly all of it goes into code that no model changes (the C interface,
the model container) and into one `std::regex`. Here that code becomes an object
file and the headers become precompiled headers, kept in the cache folder under
a key of compiler, flags, processor and torch version; 0.6 s remain.

Also kept: stubs of libtorch with the symbols that programs use, since linking
against the real ones (hundreds of megabytes) takes 0.35 s.

Building them takes g++ some 15 s of processor time. They are built with Reprise
(prebuild.py) and lie beside its library. Where those do not fit, on another
processor or with another compiler, they are built once per cache folder: that
begins with the imports, as child processes of the compiling thread, and the
first compile waits for what it needs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache, config, cpp_builder
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa

# Bump when what is built here changes.
_VERSION = 1

# What a program's wrapper includes in place of the C interface. The base class
# is instantiated in the interface object.
MODEL_DECLARATION = """
#include <iostream>
#include <sstream>
#include <vector>
extern template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;
"""

_INTERFACE_EPILOGUE = """
template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;
namespace torch::aot_inductor {
// Programs only see its declaration: it has to be emitted here.
[[gnu::used]] static auto* const keep_parse_device_str = &parse_device_str;
}
"""

_MODEL_BASE = "torch/csrc/inductor/aoti_runtime/model_base.h"


class ToolchainError(RuntimeError):
    """A shared part could not be built; programs can be built without."""


class _Build:
    """One file made by one command: present, under way, or still to start."""

    def __init__(self, target: Path, command: Callable[[Path], list[str]]) -> None:
        self.target = target
        self._scratch = target.with_name(f".{os.getpid()}.{target.name}")
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is None and not self.target.exists():
            self._process = subprocess.Popen(
                self._command(self._scratch),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def finish(self) -> str:
        self.start()
        if self._process is not None:
            errors = self._process.communicate()[1].decode(errors="replace")
            code, self._process = self._process.returncode, None
            if code != 0:
                self._scratch.unlink(missing_ok=True)
                raise ToolchainError(f"building {self.target.name} failed: {errors[-2000:]}")
            # Another process may have been as quick; both files are the same.
            os.replace(self._scratch, self.target)
        return str(self.target)


class Toolchain:
    """`root` is where parts are built that are not in `prebuilt`, a folder that
    is only read.
    """

    def __init__(self, root: Path, prebuilt: Path | None = None) -> None:
        self._root = root
        self._prebuilt = prebuilt
        self._builds: dict[str, _Build] = {}
        self.enabled = cpp_builder.is_gcc() and _model_base_overlay() is not None

    def start(self, device_type: str) -> None:
        """Begins to build what programs for this device need."""
        if not self.enabled:
            return
        command = {
            "aot_mode": True,
            "device_type": device_type,
            "use_mmap_weights": False,
            "use_mmap_weights_external": False,
            "use_relative_path": False,
            "vec_isa": pick_vec_isa(),
        }
        header = codecache._get_cpp_wrapper_header(device_type, aot_mode=True)
        self._program_header(header, command).start()
        if kernel_header := codecache._get_cpp_prefix_header(device_type):
            self._kernel_header(kernel_header, command).start()
        self._interface(header, command).start()

    def finish(self) -> None:
        """Builds all that was started, and the stubs."""
        for build in self._builds.values():
            build.finish()
        if self.enabled:
            self.libtorch_stubs()

    def precompile_header(self, header: str, _key: str, **command: Any) -> str:
        """Stands in for `codecache._precompile_header`, which preprocesses the
        header in every process to find out whether it has changed (1.7 s).
        """
        # Only the wrapper is compiled at `min_optimize`.
        is_wrapper = command.pop("min_optimize", False)
        build = (
            self._program_header(header, command)
            if is_wrapper
            else self._kernel_header(header, command)
        )
        return build.finish().removesuffix(build.target.suffix)

    def interface_object(self, device_type: str, command: dict[str, Any]) -> str:
        header = codecache._get_cpp_wrapper_header(device_type, aot_mode=True)
        return self._interface(header, command).finish()

    def libtorch_stubs(self) -> str:
        """A folder with a libtorch.so and a libtorch_cpu.so to link against."""
        folder = self._folder("stubs", [torch.__file__])
        stub = folder / "libtorch_cpu.so"
        if not stub.exists():
            _build_stub(folder / "libtorch.so", [])
            _build_stub(stub, _symbols_for_programs(stub.name))
        return str(folder)

    def gpu_stubs(self) -> str:
        """The same with a libtorch_cuda.so, and the driver's library, which a machine without
        a GPU lacks.
        """
        folder = self._folder("gpu-stubs", [torch.__file__])
        stub = folder / "libtorch_cuda.so"
        if not stub.exists():
            _build_stub(folder / "libcuda.so", _DRIVER_FUNCTIONS, soname="libcuda.so.1")
            _build_stub(stub, _symbols_for_programs(stub.name))
        return str(folder)

    def _program_header(self, header: str, command: dict[str, Any]) -> _Build:
        options = CppTorchDeviceOptions(**command, min_optimize=True, precompiling=True)
        overlay = _model_base_overlay()
        assert overlay is not None
        return self._build(
            "program.h", f"#include <{header}>\n", options, {_MODEL_BASE: overlay}
        )

    def _kernel_header(self, header: str, command: dict[str, Any]) -> _Build:
        options = CppTorchDeviceOptions(**command, precompiling=True)
        return self._build("kernel.h", f"#include <{header}>\n", options)

    def _interface(self, header: str, command: dict[str, Any]) -> _Build:
        options = CppTorchDeviceOptions(**command, min_optimize=True, compile_only=True)
        code = f"#include <{header}>\n{_stock_interface()}\n{_INTERFACE_EPILOGUE}"
        return self._build("interface.cpp", code, options)

    def _build(
        self,
        name: str,
        code: str,
        options: CppTorchDeviceOptions,
        overlay: dict[str, str] | None = None,
    ) -> _Build:
        probe = CppBuilder(name="o", sources="i", BuildOption=options)
        folder = self._folder(name, [code, probe.get_command_line(), repr(overlay)])
        if (key := str(folder)) not in self._builds:
            source = folder / name
            files = {source: code}
            files |= {folder / "include" / p: text for p, text in (overlay or {}).items()}
            for path, text in files.items():
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text)
            builder = CppBuilder(
                # g++ looks for header.h.gch beside header.h.
                name=str(source) if options.get_precompiling() else source.stem,
                sources=str(source),
                BuildOption=options,
                output_dir="" if options.get_precompiling() else str(folder),
            )
            target = builder.get_target_file_path()

            def command(scratch: Path) -> list[str]:
                words = shlex.split(builder.get_command_line())
                words[words.index(target)] = str(scratch)
                words[1:1] = [f"-I{folder / 'include'}"] if overlay else []
                return words

            self._builds[key] = _Build(Path(target), command)
        return self._builds[key]

    def _folder(self, name: str, key: list[str]) -> Path:
        digest = hashlib.sha256(
            repr([_VERSION, torch.__version__, _compiler_identity(), _processor(), *key]).encode()
        ).hexdigest()[:16]
        part = f"{Path(name).stem}-{digest}"
        if self._prebuilt is not None and (self._prebuilt / part).is_dir():
            return self._prebuilt / part
        folder = self._root / part
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@functools.cache
def _compiler_identity() -> tuple[object, ...]:
    compiler = cpp_builder.get_cpp_compiler()
    path = os.path.realpath(shutil.which(compiler) or compiler)
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            wanted = ("model name", "flags", "Features", "CPU part")
            return "".join(sorted({l for l in cpuinfo if l.startswith(wanted)}))
    except OSError:
        return platform.processor()


def _stock_interface() -> str:
    path = os.path.join(
        os.path.dirname(torch.__file__),
        "_inductor/codegen/aoti_runtime/interface.cpp",
    )
    with open(path) as file:
        return file.read()


@functools.cache
def _model_base_overlay() -> str | None:
    """model_base.h of torch 2.11.0 without the body of `parse_device_str`, whose
    `std::regex` costs every translation unit 1.3 s. None if it looks otherwise.
    """
    path = os.path.join(os.path.dirname(torch.__file__), "include", _MODEL_BASE)
    with open(path) as file:
        text = file.read()
    begin = text.find("inline void parse_device_str(")
    body = text.find("{", begin)
    end = text.find("\n}\n", body)
    if begin < 0 or text.count("#include <regex>\n") != 1 or "std::regex" not in text[body:end]:
        return None
    declaration = text[begin:body].removeprefix("inline ").rstrip() + ";"
    text = text[:begin] + declaration + text[end + 2 :]
    # <regex> brought in others that the rest of the header needs.
    return text.replace("#include <regex>\n", "#include <functional>\n#include <sstream>\n")


# What programs call of the driver (torch/csrc/inductor/aoti_runtime/utils_cuda.h and
# cpp_wrapper_gpu.py, torch 2.11.0).
_DRIVER_FUNCTIONS = [
    "cuFuncSetAttribute", "cuGetErrorString", "cuLaunchKernel", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoad", "cuModuleLoadData", "cuModuleUnload",
    "cuTensorMapEncodeTiled",
]  # fmt: skip


def _symbols_for_programs(library: str) -> list[str]:
    path = os.path.join(os.path.dirname(torch.__file__), "lib", library)
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    names = (line.rsplit(" ", 1)[-1] for line in listing.splitlines())
    return [n.split("@")[0] for n in names if n.startswith("aoti_torch_")]


def _build_stub(stub: Path, symbols: list[str], soname: str | None = None) -> None:
    scratch = stub.with_name(f".{os.getpid()}.{stub.name}")
    subprocess.run(
        [cpp_builder.get_cpp_compiler(), "-shared", "-nostdlib", "-x", "assembler", "-",
         f"-Wl,-soname,{soname or stub.name}", "-o", str(scratch)],
        input="".join(f".globl {s}\n.type {s},@function\n{s}:\n" for s in symbols)
        + '.section .note.GNU-stack,"",@progbits\n',
        text=True, capture_output=True, check=True,
    )
    os.replace(scratch, stub)
