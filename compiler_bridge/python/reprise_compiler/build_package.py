"""Trace in, AOTInductor package out."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor
import torch._inductor.config
from torch._inductor.exc import InductorError
from torch._inductor.fx_passes import joint_graph, post_grad, pre_grad
from torch._inductor.package import package_aoti
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from . import torch_patches
from .fills import round_fills, split_complex_numbers
from .mutations import copy_old_values_first, copy_returned_inputs
from .symbols import Symbols
from .toolchain import Toolchain
from .trace_to_fx import TraceProgram, read_trace


# Elements of a loop from which on starting a thread team pays.
_ELEMENTS_FOR_A_TEAM = 16384


def _before_lowering(graph: Graph) -> None:
    """A `post_grad_custom_post_pass`."""
    copy_old_values_first(graph)
    copy_returned_inputs(graph)
    split_complex_numbers(graph)


def inductor_options() -> dict[str, Any]:
    threads = min(max(os.cpu_count() or 2, 2), 16)
    return {
        # One process, no workers: they would be children that outlive a compile
        # and contend with the model for its cores.
        "compile_threads": 1,
        "autotune_in_subproc": False,
        "max_autotune": False,
        "max_autotune_gemm": False,
        # Reprise's artifact store is the cache.
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
        "autotune_remote_cache": False,
        "bundle_triton_into_fx_graph_cache": False,
        # Weights are inputs and change between calls.
        "freezing": False,
        "joint_custom_pre_pass": round_fills,
        "post_grad_custom_post_pass": _before_lowering,
        # Who runs the program compares geometries.
        "size_asserts": False,
        "alignment_asserts": False,
        # The thread count in force at the call counts, not that of the compile.
        # `threads` decides only which loops are worth a team at all.
        "cpp.dynamic_threads": True,
        "cpp.threads": threads,
        "cpp.min_chunk_size": _ELEMENTS_FOR_A_TEAM // threads,
        "cpp.enable_kernel_profile": False,
        # As eager rounds: no reassociation, no contraction into fma.
        "cpp.enable_unsafe_math_opt_flag": False,
        "cpp.enable_floating_point_contract_flag": "off",
        "aot_inductor.package": True,
        "aot_inductor.compile_wrapper_opt_level": "O1",
        "aot_inductor.dump_aoti_minifier": False,
    }


def options_for(program: TraceProgram) -> dict[str, Any]:
    """Channels-last convolutions pay in inference (0.54 of eager's time against
    0.59) and cost in training (0.89 against 0.75), where batch norm's and the
    weights' gradients go back and forth between layouts.
    """
    weights = export_options(program.export) if program.export is not None else {}
    if program.device.type != "cpu":
        return {
            "triton.autotune_at_compile_time": True,
            # Decides by running both on the GPU.
            "shape_padding": False,
            **weights,
        }
    backward = torch.ops.aten.convolution_backward.default
    trains = any(node.target is backward for node in program.module.graph.nodes)
    return {"layout_optimization": not trains, **weights}


def save_exported_program(program: TraceProgram, path: str) -> None:
    """The program of a trace that is exported, as `torch.export.save` writes it."""

    def dimension(size: int | str) -> Any:
        symbol = re.fullmatch(r"s(\d+)", size) if isinstance(size, str) else None
        if symbol is None:
            return torch.export.Dim.AUTO if isinstance(size, str) else None
        least, most = program.export["ranges"][int(symbol[1])]
        return torch.export.Dim.AUTO(
            min=least if least > 1 else None, max=most if most < sys.maxsize else None
        )

    exported = torch.export.export(
        program.module,
        program.make_inputs(program.hints),
        dynamic_shapes=tuple(tuple(dimension(s) for s in spec["sizes"]) for spec in program.inputs),
    )
    torch.export.save(exported, path)


def export_options(export: dict[str, Any]) -> dict[str, Any]:
    return {
        "aot_inductor.metadata": export["metadata"],
        "aot_inductor.package_constants_in_so": export["in_program"],
        # Small ones would become literals: they can be replaced when the package has been
        # loaded, are written by a training step, and those for another device are not there.
        "always_keep_tensor_constants": True,
    }


def _for_device(program: TraceProgram) -> contextlib.AbstractContextManager[None]:
    on_cpu = program.device.type == "cpu"
    return contextlib.nullcontext() if on_cpu else torch_patches.on_gpu(program.target)


def fake_inputs(
    program: TraceProgram, symbols: Symbols | None = None
) -> tuple[torch.Tensor, ...]:
    """The example inputs as AOTAutograd wants them.

    `torch.export` would trace the graph once more than it is traced anyway, a
    quarter of the time that a large graph takes; what it adds, a checked and
    serialisable program, is not used. The shape environment is needed for
    dynamic scalars, which are symbols in it. Weights of a package that is exported stay
    what they are, but for one whose target is not there: these are claimed to be on it.
    """
    weights = any(True for _ in program.module.buffers())
    shape_env = symbols.shape_env if symbols is not None else ShapeEnv()
    with FakeTensorMode(
        shape_env=shape_env, static_shapes=symbols is None, allow_non_fake_inputs=weights
    ):
        if program.target is not None:
            torch_patches.claim_weights(program.module, program.device)
        return program.make_inputs(symbols.values if symbols is not None else [])


def _set_call_spec(program: TraceProgram) -> None:
    """How Python's `aoti_load_package` passes arguments: one by one, and gets a
    tuple. C++ callers need none of it.
    """
    program.module._in_spec = pytree.tree_structure(((0,) * (len(program.inputs) + program.numbers), {}))
    program.module._out_spec = pytree.tree_structure((0,) * program.output_count)


def _lower(program: TraceProgram, folder: Path) -> tuple[Any, Symbols | None]:
    """The package's files, in `folder`, and the symbols with the guards that were met."""
    _set_call_spec(program)
    symbols = Symbols(program.hints) if program.hints else None
    weights = contextlib.nullcontext() if program.export is None else torch_patches.without_constants()
    with _for_device(program), weights:
        files = torch._inductor.aot_compile(
            program.module,
            fake_inputs(program, symbols),
            options={
                **inductor_options(),
                **options_for(program),
                "aot_inductor.output_path": str(folder),
            },
        )
    return files, symbols


def _write_guards(symbols: Symbols, output_path: str) -> None:
    """Before the package is there, so that none is without."""
    with tempfile.NamedTemporaryFile(
        "w", dir=Path(output_path).parent, prefix=".partial-", delete=False
    ) as file:
        file.writelines(guard + "\n" for guard in symbols.guards())
    os.replace(file.name, output_path + ".guards")


class PackageBuilder:
    """Compiles traces; one per process, used by one thread at a time."""

    def __init__(self, cache_dir: str | None = None, toolchain_dir: str | None = None) -> None:
        self._root = Path(cache_dir or tempfile.mkdtemp(prefix="reprise-compiler-"))
        self._remove_abandoned_work()
        self._toolchain = Toolchain(
            self._root / "toolchain", Path(toolchain_dir) if toolchain_dir else None
        )

    def warm_up(self) -> None:
        """Does what the first compile would have to do before all others, most
        of it Inductor's pattern tables, while the toolchain is being built.
        """
        cpu = torch.device("cpu")
        with self._compiling():
            self._toolchain.start(cpu.type)
            pre_grad.lazy_init()
            joint_graph.lazy_init(cpu)
            post_grad.lazy_init()

    def build_toolchain(self) -> None:
        with self._compiling():
            self._toolchain.start("cpu")
            self._toolchain.finish()

    def compile(self, trace_json: str, output_path: str) -> dict[str, Any]:
        """Writes the package whole or not at all; returns seconds a phase. Beside the
        package of a trace with symbols lie its guards, a line each.
        """
        report: dict[str, Any] = {}
        clock = _Clock(report)
        program = read_trace(trace_json)
        clock.lap("read_s")
        if program.export is not None and program.export["format"] == "torch.export":
            with _quiet_logs(), warnings.catch_warnings(), torch_patches.exporting():
                warnings.simplefilter("ignore")
                save_exported_program(program, output_path)
            clock.lap("export_s")
            return report
        with self._compiling(), self._scratch() as scratch:
            try:
                files, symbols = _lower(program, scratch)
            except InductorError as error:
                if not isinstance(error.inner_exception, torch_patches.LoopsDiffer):
                    raise
                with torch_patches.without_splitting_loops():
                    files, symbols = _lower(read_trace(trace_json), scratch)
            clock.lap("inductor_s")
            if symbols is not None:
                _write_guards(symbols, output_path)
            self._package(files, output_path)
            clock.lap("package_s")
        return report

    def _package(self, files: Any, output_path: str) -> None:
        target = Path(output_path)
        # On the same file system, and under the same name: it becomes the name
        # of the archive's root folder.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            package_aoti(str(partial), files)
            os.replace(partial, target)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        work = self._root / "work"
        work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=work, prefix=f"{os.getpid()}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_abandoned_work(self) -> None:
        """What processes have left that ended in the middle of a compile."""
        for folder in (self._root / "work").glob("*-*"):
            pid = folder.name.split("-")[0]
            if not os.path.exists(f"/proc/{pid}") or pid == str(os.getpid()):
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            _quiet_logs(),
            torch_patches.applied(self._toolchain),
            torch._inductor.config.patch(inductor_options()),
        ):
            warnings.simplefilter("ignore")
            yield


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keeps torch's log lines off the host's stderr: what matters in them comes
    back as the error, and the host logs that once.
    """
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("torch") and getattr(logger, "handlers", None)
    ]
    stock = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.NullHandler()]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, stock):
            logger.handlers = handlers


class _Clock:
    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._report[name] = round(now - self._last, 4)
        self._last = now
