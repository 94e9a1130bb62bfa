"""Every change that Reprise makes to torch while it compiles, in one place.

Written against torch 2.11.0. A patch is in force only inside `applied`, so that
a host that is itself a Python program keeps its own `torch.compile` as it is.
What is mended: programs that would be wrong, what would disturb the host program,
whose threads keep computing in this very process, and what makes compiling or the
compiled program slower than it need be.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
import torch._functorch.aot_autograd
import torch._inductor.compile_fx
from torch._inductor import (
    codecache,
    config,
    cpp_builder,
    cpu_vec_isa,
    decomposition,
    dependencies,
    index_propagation,
    ir,
    lowering,
    pattern_matcher,
    scheduler,
)
from torch._export.serde import schema, serialize
from torch._inductor.codegen import common, cpp, cpp_wrapper_cpu
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.exc import CppCompileError
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _traceback
from torch.utils._ordered_set import OrderedSet

from . import loop_invariants, mutations, vec_isa
from .toolchain import MODEL_DECLARATION, Toolchain


_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@contextlib.contextmanager
def applied(toolchain: Toolchain | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.callback(_children.clear)
        with in_force(_patches(toolchain)):
            yield


@contextlib.contextmanager
def in_force(patches: Iterator[tuple[Any, str, Any]]) -> Iterator[None]:
    """Each patch: an object or a dict, a name in it, and what is there meanwhile."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            if isinstance(owner, dict):
                stack.callback(owner.__setitem__, name, owner[name])
                owner[name] = replacement
            else:
                stack.callback(setattr, owner, name, owner.__dict__[name])
                setattr(owner, name, replacement)
        yield


def claim_weights(module: torch.nn.Module, device: torch.device) -> None:
    from . import gpu

    gpu.claim_weights(module, device)


@contextlib.contextmanager
def on_gpu(target: str | None) -> Iterator[None]:
    """Compiles for the GPU `target`, or for the machine's own, without running on it."""
    from . import gpu

    gpu.forget_devices()
    try:
        with in_force(gpu.patches(target)):
            yield
    finally:
        gpu.forget_devices()


def _patches(toolchain: Toolchain | None) -> Iterator[tuple[Any, str, Any]]:
    yield from _host_patches()
    yield cpu_vec_isa.VecISA, "check_build", vec_isa.check_build
    yield pattern_matcher._TargetArgsExpr, "_match", _match_scales_too
    yield scheduler.SchedulerNode, "recompute_size_and_body", _recompute_size_and_body
    yield scheduler.Scheduler, "fusable_weak_dep", _fusable_weak_dep
    yield joint_graph.UniformValueConstantFolder, "_deduce_value", _deduce_value
    yield index_propagation.SymPyOps, "to_dtype", staticmethod(_to_dtype)
    yield lowering.lowerings, torch.ops.prims.rev.default, _rev
    yield lowering.lowerings, _pad, _constant_pad_nd
    yield lowering, "to_dtype_bitcast", _to_dtype_bitcast
    yield lowering.lowerings, _cat, _cat_of_copies
    if _TORCH < (2, 15):
        yield serialize.GraphModuleSerializer, "serialize_inputs", _serialize_inputs
    else:
        yield decomposition.decompositions, _lerp, _lerp_scalar
    yield common.KernelArgs, "cpp_argdefs", _cpp_argdefs
    yield cpp.CppKernel, "decide_parallel_depth", _decide_parallel_depth
    yield cpp.LoopNest, "max_parallel_depth", _max_parallel_depth
    yield from _eager_kernels()
    yield from _bias_joins_pointwise_users()
    yield ir.StorageBox, "should_realize_on_reuse", _should_realize_on_reuse
    yield from loop_invariants.patches()
    yield (
        cpp_wrapper_cpu.CppWrapperCpu,
        "generate_input_output_runtime_checks",
        _generate_no_runtime_checks,
    )
    yield cpp.CppScheduling, "fuse", _fuse
    yield cpp.CppVecOverrides, "masked", staticmethod(_masked)
    yield cpp, "sympy", _SympyThatOnlyExpands()
    yield cpp_builder, "run_compile_cmd", _run_compile_cmd
    # Each node would note where in the Python code it comes from: in ours.
    yield _traceback.CapturedTraceback, "summary", lambda self: traceback.StackSummary()
    # A singleton whose constructor sets up its 200 rules again at every use.
    yield (
        common,
        "DtypePropagationOpsHandler",
        functools.cache(common.DtypePropagationOpsHandler),
    )
    if toolchain is not None and toolchain.enabled:
        yield from _toolchain_patches(toolchain)


# What makes the compiled program right.


_stock_recompute_size_and_body = scheduler.SchedulerNode.recompute_size_and_body


def _recompute_size_and_body(self, *args, **kwargs):
    """Keeps what a loop must wait for when it is given another loop's ranges.

    The C++ backend does so to fuse the two (codegen/cpp.py, `CppScheduling.fuse`), and
    the dependencies computed anew lack those that no index shows: an update in place
    forgets the readers of the old value, and may run before them (torch 2.11.0, stock
    torch.compile as well: `y = z - x.t() * 2; x.addcmul_(k.expand(3, 4), x)`).
    """
    kept = OrderedSet(
        dep
        for dep in self.read_writes.reads
        if isinstance(dep, dependencies.WeakDep | dependencies.StarDep)
    )
    _stock_recompute_size_and_body(self, *args, **kwargs)
    computed = self.read_writes.with_read(kept)
    self.set_read_writes(computed.rename(self.mutation_renames))


_stock_fuse = cpp.CppScheduling.fuse


class LoopsDiffer(Exception):
    """Two loops of other ranges could not be made one, though that had been decided."""


def _fuse(self, node1, node2):
    """Says so where the stock code asserts: that the two loops, split anew, have the same
    ranges in the same order, and that no index in them is a constant (torch 2.11.0,
    codegen/cpp.py).
    """
    try:
        return _stock_fuse(self, node1, node2)
    except AssertionError as error:
        raise LoopsDiffer(str(error)) from error


def without_splitting_loops() -> contextlib.AbstractContextManager[None]:
    """Within it, loops are fused only where they have the same ranges as they are."""
    compatible = (cpp.CppScheduling, "_can_fuse_nodes_with_compatible_ranges")
    return in_force(iter([(*compatible, lambda self, node1, node2: False)]))


def without_constants() -> contextlib.AbstractContextManager[None]:
    """Within it, no op is computed for good whose tensors are known. A package's weights are not
    what they were when it was made: an optimizer's counter, which torch 2.15.0 takes for the
    number that it holds where the host needs that number.
    """
    return in_force(iter([(FakeTensorMode, "may_turn_const", lambda self, tensor: False)]))


_stock_masked = cpp.CppVecOverrides.masked


def _masked(mask, body, other):
    """Leaves a number that the body returns the number that it is. The stock code says that
    it is a vector, and what uses it afterwards is wrong C++ (torch 2.11.0).
    """
    returned = []

    def noted():
        result = body()
        returned.append((result, result.is_vec))
        return result

    value = _stock_masked(mask, noted, other)
    for result, is_vec in returned:
        result.is_vec = is_vec
    return value


_stock_fusable_weak_dep = scheduler.Scheduler.fusable_weak_dep


def _fusable_weak_dep(self, weak_dep, node1, node2):
    """Fuses a read with the write that follows it only where each element is read at the
    place where it is written, also after an earlier write to the same buffer. The stock
    check looks for reads by the buffer's own name, but what has been written already is
    read under the name of that write.
    """
    if not _stock_fusable_weak_dep(self, weak_dep, node1, node2):
        return False
    buffer_of = self.mutation_real_name
    buffer = buffer_of[weak_dep.mutating_buf]
    (write,) = (w for w in node2.read_writes.writes if w.name == weak_dep.mutating_buf)
    return all(
        isinstance(read, dependencies.MemoryDep)
        and read.index == write.index
        and read.size == write.size
        for read in node1.read_writes.reads
        if buffer_of.get(read.name) == buffer
    )


_stock_deduce_value = joint_graph.UniformValueConstantFolder._deduce_value


def _deduce_value(self, node):
    """Takes no weight of one element for the number that it holds: it can be replaced, and
    a training step counts in it.
    """
    return self.unknown_value if node.op == "get_attr" else _stock_deduce_value(self, node)


_stock_to_dtype = index_propagation.SymPyOps.to_dtype


def _to_dtype(value, dtype, *args, **kwargs):
    """Converts an index where the other dtype can hold it. Stock code takes an index for
    the same number in every dtype: `arange(5).logical_not()` was true everywhere.
    """
    narrow = dtype.itemsize < 4 and not dtype.is_floating_point
    if narrow and not value.is_constant():
        return NotImplemented
    return _stock_to_dtype(value, dtype, *args, **kwargs)


_stock_rev = lowering.lowerings[torch.ops.prims.rev.default]


def _rev(x, dims):
    """A number is its own reverse; the stock lowering looks for its dimension."""
    return _stock_rev(x, dims if x.get_size() else [])


_cat = torch.ops.aten.cat.default
_stock_cat = lowering.lowerings[_cat]


def _cat_of_copies(inputs, dim=0):
    """Copies what is written elsewhere. The stock lowering has the inputs computed in the
    memory of the result, where a scatter into one of either changes the other (torch
    2.11.0: `y = x * 2; z = torch.cat([x, y]); y.index_add_(...)`).
    """
    node = V.graph.current_node
    all_written = mutations.is_written(node)
    inputs = [
        lowering.clone(value) if all_written or mutations.is_written(given) else value
        for value, given in zip(inputs, node.args[0], strict=True)
    ]
    return _stock_cat(inputs, dim)


_stock_to_dtype_bitcast = lowering.to_dtype_bitcast


def _to_dtype_bitcast(x, dtype, **kwargs):
    """Leaves the bytes of booleans to eager; the stock lowering asks for their bits."""
    if torch.bool in (x.get_dtype(), dtype) and x.get_dtype() != dtype:
        return lowering.fallback_handler(torch.ops.aten.view.dtype)(x, dtype)
    return _stock_to_dtype_bitcast(x, dtype, **kwargs)


_pad = torch.ops.aten.constant_pad_nd.default
_stock_constant_pad_nd = lowering.lowerings[_pad]


def _constant_pad_nd(x, padding, fill_value=0):
    """Pads with a number that is not known yet; the stock lowering asks for its value."""
    if not isinstance(fill_value, sympy.Expr) or fill_value.is_number:
        return _stock_constant_pad_nd(x, padding, fill_value)
    ones = lowering.full_like(x, 1, dtype=torch.bool)
    inside = _stock_constant_pad_nd(ones, padding, 0)
    padded = _stock_constant_pad_nd(x, padding, 0)
    fill = lowering.full_like(padded, fill_value)
    return lowering.lowerings[torch.ops.aten.where.self](inside, padded, fill)


_lerp = torch.ops.aten.lerp.Scalar
_stock_lerp_scalar = decomposition.decompositions.get(_lerp)


def _lerp_scalar(start, end, weight):
    """Of a weight that is not known yet; torch 2.15's decomposition asks for its value."""
    if not isinstance(weight, torch.SymFloat):
        return _stock_lerp_scalar(start, end, weight)
    number = torch.full((), weight, dtype=start.dtype, device=start.device)
    return decomposition.decompositions[torch.ops.aten.lerp.Tensor](start, end, number)


_stock_match = pattern_matcher._TargetArgsExpr._match


def _match_scales_too(self, node, ctx):
    """A pattern that says nothing of `alpha` or `beta` means 1.

    Inductor's matcher passes over keyword arguments that a pattern lacks
    (pattern_matcher.py, `_TargetArgsExpr._match`), so that `weight.add_(a @ b,
    alpha=-lr)`, a step of SGD, became `addmm(weight, a, b)`: the wrong update.
    """
    if isinstance(node, torch.fx.Node):
        for name in ("alpha", "beta"):
            if node.kwargs.get(name, 1) != 1 and name not in self.kwargs:
                return pattern_matcher.FailedMatch("a factor that the pattern lacks")
    return _stock_match(self, node, ctx)


_stock_serialize_inputs = serialize.GraphModuleSerializer.serialize_inputs

# c10/core/ScalarType.h and c10/core/MemoryFormat.h, by torch.export's codes.
_C10_DTYPES = {schema.ScalarType[name]: code for code, name in enumerate(
    ["BYTE", "CHAR", "SHORT", "INT", "LONG", "HALF", "FLOAT", "DOUBLE", "COMPLEXHALF",
     "COMPLEXFLOAT", "COMPLEXDOUBLE", "BOOL"])} | {
    schema.ScalarType.BFLOAT16: 15, schema.ScalarType.FLOAT8E5M2: 23,
    schema.ScalarType.FLOAT8E4M3FN: 24, schema.ScalarType.FLOAT8E5M2FNUZ: 25,
    schema.ScalarType.FLOAT8E4M3FNUZ: 26, schema.ScalarType.UINT16: 27,
}  # fmt: skip
_C10_MEMORY_FORMATS = {
    schema.MemoryFormat.ContiguousFormat: 0, schema.MemoryFormat.PreserveFormat: 1,
    schema.MemoryFormat.ChannelsLast: 2, schema.MemoryFormat.ChannelsLast3d: 3,
}  # fmt: skip
_C10_LAYOUTS = {schema.Layout.Strided: 0}


def _serialize_inputs(self, target, args, kwargs=None):
    """Writes dtypes, memory formats and layouts by c10's codes: what runs packages
    (oss_proxy_executor.cpp, torch 2.11; mended in 2.15) takes them for these, while
    torch.export counts otherwise. `x.cdouble()` made booleans.

    Keyword arguments that have their default are written too: the generated code passes
    them (cpp_wrapper_cpu.py, torch 2.11), and one number too many is an error of the
    proxy executor's. `alpha` of a complex `sub` was one.
    """
    defaults = {
        parameter.name: parameter.default_value
        for parameter in getattr(getattr(target, "_schema", None), "arguments", ())
        if parameter.kwarg_only and parameter.default_value is not None
    }
    named = _stock_serialize_inputs(self, target, args, defaults | (kwargs or {}))
    for argument in named:
        kind = str(argument.arg.type)
        codes = {
            "as_scalar_type": _C10_DTYPES,
            "as_memory_format": _C10_MEMORY_FORMATS,
            "as_layout": _C10_LAYOUTS,
        }.get(kind)
        if codes is not None:
            code = codes[argument.arg.value]
            argument.arg = schema.Argument.create(**{kind: code})
    return named


# What would disturb the host program.


def _host_patches() -> Iterator[tuple[Any, str, Any]]:
    # Saves the default generators' states and puts them back seconds later: what
    # the host has drawn in between, it would draw again.
    stock = torch._dynamo.utils.preserve_rng_state
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("preserve_rng_state") is stock:
            yield module, "preserve_rng_state", contextlib.nullcontext
    # Anomaly mode holds for the whole process: while AOTAutograd traces, each op under
    # autograd that the host runs would wait for the GIL, for its Python stack.
    yield torch.autograd, "detect_anomaly", lambda **_: contextlib.nullcontext()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """For `torch.export`, which would also turn oneDNN, NNPACK and cuDNN off for the whole
    process while it traces.
    """
    from torch.export import _trace

    patches = [*_host_patches(), (_trace, "_ignore_backend_decomps", contextlib.nullcontext)]
    with torch.no_grad(), in_force(iter(patches)):
        yield


# What makes the compiled program better.


_stock_cpp_argdefs = common.KernelArgs.cpp_argdefs


def _cpp_argdefs(self, *args):
    """Passes a dynamic scalar to a kernel as the double that it is, not as a
    float: torch._inductor.codegen.common.KernelArgs.cpp_argdefs rounds it.
    """
    arg_defs, call_args, arg_types = _stock_cpp_argdefs(self, *args)
    return (
        [_as_double(d) for d in arg_defs],
        call_args,
        [_as_double(t) for t in arg_types],
    )


def _as_double(declaration: str) -> str:
    # Pointers to const float have a star.
    if declaration.startswith("const float") and "*" not in declaration:
        return declaration.replace("const float", "const double", 1)
    return declaration


_stock_decide_parallel_depth = cpp.CppKernel.decide_parallel_depth


def _decide_parallel_depth(self, max_parallel_depth, threads):
    """Leaves small loops serial. With `cpp.dynamic_threads` stock Inductor makes
    every loop parallel, and a loop over 64 elements pays for a thread team.
    """
    with config.patch({"cpp.dynamic_threads": False}):
        return _stock_decide_parallel_depth(self, max_parallel_depth, threads)


_stock_max_parallel_depth = cpp.LoopNest.max_parallel_depth


def _max_parallel_depth(self):
    """Does not start a thread team in every turn of an outer loop, unless that
    has few turns. Stock code counts a loop shorter than a vector as no turns.
    """
    chosen = _stock_max_parallel_depth(self)
    if chosen.start_depth == 0:
        return chosen
    outer, inner = self.loops[: chosen.start_depth], self.loops[chosen.start_depth :]
    turns = sympy.prod(sympy.ceiling(loop.size / loop.steps) for loop in outer)
    if not (turns * 300 < inner[0].size / inner[0].steps) == sympy.true:
        return cpp.ParallelDepth(parallel_depth=chosen.start_depth, start_depth=0)
    return chosen


def _eager_kernels() -> Iterator[tuple[Any, str, Any]]:
    """Ops whose eager CPU kernel beats what Inductor writes for them."""
    # A gather over the window for each element, repeated in every consumer: a
    # conv net's training step spent 36% of its time there, eager 2%.
    op = torch.ops.aten.max_pool2d_with_indices_backward.default
    stock = lowering.lowerings[op]
    eager = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(grad_output: Any, *args: Any, **kwargs: Any) -> Any:
        on_cpu = grad_output.get_device().type == "cpu"
        return (eager if on_cpu else stock)(grad_output, *args, **kwargs)

    yield lowering.lowerings, op, lower


def _bias_joins_pointwise_users() -> Iterator[tuple[Any, str, Any]]:
    """Adds the bias of a matrix product where its result is read next, as Inductor does
    on a GPU. `addmm` would first copy it into every row of the output.

    Only a plain sum of floats: stock code multiplies integers by factors that `addmm`
    rounds first, and a bias of NaNs by a factor of 0 that tells `addmm` not to read it.
    """

    def plain_sum(match: pattern_matcher.Match) -> bool:
        return (
            match.kwargs["inp"].meta["val"].dtype.is_floating_point
            and match.kwargs["alpha"] == 1
            and match.kwargs["beta"] == 1
            and all(post_grad.is_pointwise_use(use) for use in match.output_node().users)
        )

    for entries in post_grad.pass_patterns[2].patterns.values():
        for entry in entries:
            if entry.extra_check is post_grad.should_prefer_unfused_addmm:
                yield entry, "extra_check", plain_sum


_stock_should_realize_on_reuse = ir.StorageBox.should_realize_on_reuse


def _should_realize_on_reuse(self, users, **kwargs):
    """Keeps the result of `tanh` for whoever reads it later, as stock code does with
    `exp` and `sigmoid`, whose derivatives are made of the result as well. Computing it
    again costs more than reading it, and keeps what it is made of alive: two matrix
    products for each time step of an LSTM, two thirds of its training step's memory.
    """
    if users > 1 and isinstance(self.data, ir.Pointwise | ir.Reduction):
        on_cpu = self.data.get_device().type == "cpu"
        if on_cpu and "tanh" in self.data.inner_fn_opcount().used_ops:
            return True
    return _stock_should_realize_on_reuse(self, users, **kwargs)


def _generate_no_runtime_checks(self) -> None:
    """Checks that only run with AOTI_RUNTIME_CHECK_INPUTS=1, and cost g++ a
    function an input always. The package runner compares geometries itself.
    """
    self.prefix.splice(
        "static inline void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}"
    )


# What makes compiling faster.


class _SympyThatOnlyExpands:
    """sympy for `codegen.cpp`, which calls `sympy.simplify` to learn a load's
    stride: nine tenths of the time that a convolutional net's training step
    takes to compile. Indices are sums of products, and for these expanding is
    enough; where it is not, a load is taken for a gather, which is still right.
    """

    simplify = staticmethod(functools.lru_cache(1 << 14)(sympy.expand))

    def __getattr__(self, name: str) -> Any:
        return getattr(sympy, name)


class _Children:
    """Compilers at work, so that wrapper and kernels are built side by side."""

    def __init__(self) -> None:
        self._running: list[tuple[list[str], subprocess.Popen[bytes]]] = []

    def start(self, command: list[str], cwd: str) -> None:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._running.append((command, process))

    def finish(self) -> None:
        while self._running:
            command, process = self._running[0]
            output = process.communicate()[0]
            self._running.pop(0)
            if process.returncode != 0:
                raise CppCompileError(command, output.decode(errors="replace"))

    def clear(self) -> None:
        for _, process in self._running:
            process.kill()
            process.communicate()
        self._running.clear()


_children = _Children()


_stock_run_compile_cmd = cpp_builder.run_compile_cmd


def _run_compile_cmd(command_line: str, cwd: str) -> None:
    # g++'s remarks on torch's own headers, thousands of lines, are not read.
    command = [*shlex.split(command_line), "-w"]
    if "-c" in command and any(word.endswith((".wrapper.cpp", ".kernel.cpp")) for word in command):
        # The caller removes the folder that it has made for the command.
        _children.start(command, os.path.dirname(cwd))
        return
    if "-c" not in command:
        _children.finish()
    _stock_run_compile_cmd(command_line, cwd)


# Of what `get_cpp_torch_device_options` returns.
_LIBRARY_DIRS = 4


@contextlib.contextmanager
def cuda_home_of_the_wheels() -> Iterator[None]:
    """Where there is no CUDA toolkit, its headers lie in a wheel beside torch."""
    from torch.utils import cpp_extension

    wheels = Path(torch.__file__).parents[1] / "nvidia"
    homes = sorted(p.parents[1] for p in wheels.glob("*/include/cuda.h"))
    if cpp_extension.CUDA_HOME is not None or not homes:
        yield
        return
    with in_force(iter([(cpp_extension, "CUDA_HOME", str(homes[-1]))])):
        yield


def _toolchain_patches(toolchain: Toolchain) -> Iterator[tuple[Any, str, Any]]:
    stock_write_header = cpp_wrapper_cpu.CppWrapperCpu.write_header
    stock_torch_args = cpp_builder._get_torch_related_args
    stock_device_options = cpp_builder.get_cpp_torch_device_options

    def write_header(self) -> None:
        stock_write_header(self)
        if not V.graph.aot_mode or V.graph.is_const_graph:
            return
        text = self.header.getvalue()
        begin = text.find("// Definition of AOTI runtime interface functions")
        end_mark = '} // extern "C"'
        end = text.rfind(end_mark)
        if begin < 0 or end < begin:
            raise RuntimeError("the wrapper's C interface is not where torch 2.11.0 has it")
        self.header.clear()
        self.header.splice(text[:begin] + MODEL_DECLARATION + text[end + len(end_mark) :])

    def precompile_header(header: str, key: str, **command: Any) -> str:
        if command.get("min_optimize"):
            # Linked into the program as if it were one of its CUDA kernels.
            codecache.CUDACodeCache.aot_kernels_o.append(
                toolchain.interface_object(
                    command["device_type"],
                    {k: v for k, v in command.items() if k != "min_optimize"},
                )
            )
        return toolchain.precompile_header(header, key, **command)

    def get_torch_related_args(include_pytorch: bool, aot_mode: bool):
        include_dirs, library_dirs, libraries = stock_torch_args(include_pytorch, aot_mode)
        if aot_mode and libraries == ["torch", "torch_cpu"]:
            library_dirs = [toolchain.libtorch_stubs()]
        return include_dirs, library_dirs, libraries

    def get_device_options(device_type: str, aot_mode: bool = False, *args: Any, **kwargs: Any):
        if device_type != "cuda":
            return stock_device_options(device_type, aot_mode, *args, **kwargs)
        with cuda_home_of_the_wheels():
            options = list(stock_device_options(device_type, aot_mode, *args, **kwargs))
        if aot_mode:
            options[_LIBRARY_DIRS] = [toolchain.gpu_stubs(), *options[_LIBRARY_DIRS]]
        return tuple(options)

    yield cpp_builder, "get_cpp_torch_device_options", get_device_options
    yield cpp_wrapper_cpu.CppWrapperCpu, "write_header", write_header
    yield codecache, "_precompile_header", precompile_header
    yield cpp_builder, "_get_torch_related_args", get_torch_related_args
