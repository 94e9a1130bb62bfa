"""Programs for a GPU, compiled on a machine that may have none.

Inductor (torch 2.11.0) writes Triton kernels and then runs each of them, to choose
among configurations and to have its machine code made. Here they are made and not
run: for the GPU at hand as for one that is only named, so that a package is the same
wherever it is compiled, and the host program's GPU computes nothing, and gives no
memory, but for the host program.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._dynamo import device_interface
from torch._inductor import graph as inductor_graph
from torch._inductor import utils as inductor_utils
from torch._inductor.codecache import CudaKernelParamCache
from torch._inductor.codegen.cpp_wrapper_gpu import DeferredTritonCallWrapper
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints
from torch._inductor.runtime.triton_heuristics import (
    CachingAutotuner,
    NoTritonConfigsError,
)
from torch.utils import _triton


class TargetError(ValueError):
    """No program can be compiled for the device that was named."""


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU, by the names of `torch.cuda.get_device_properties`.

    Sizes in bytes. From NVIDIA's architecture white papers, and table "Technical
    Specifications per Compute Capability" of the CUDA C++ programming guide.
    """

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block_optin: int
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    max_threads_per_block: int = 1024
    warp_size: int = 32
    shared_memory_per_block: int = 48 << 10

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        return self.shared_memory_per_block_optin + (1 << 10)

    @property
    def architecture(self) -> str:
        return f"sm_{self.major}{self.minor}"


def _gpu(name: str, capability: tuple[int, int], processors: int, gib: int, l2_mib: int,
         shared_kib: int, **others: int) -> Gpu:  # fmt: skip
    return Gpu(name, *capability, processors, gib << 30, l2_mib << 20, shared_kib << 10, **others)


# The first one of an architecture stands for it where nothing more is said.
GPUS = (
    _gpu("A100", (8, 0), 108, 80, 40, 163),
    _gpu("RTX 4090", (8, 9), 128, 24, 72, 99, max_threads_per_multi_processor=1536),
    _gpu("L4", (8, 9), 58, 24, 48, 99, max_threads_per_multi_processor=1536),
    _gpu("H100", (9, 0), 132, 80, 50, 227),
    _gpu("H200", (9, 0), 132, 141, 50, 227),
    _gpu("B200", (10, 0), 148, 180, 126, 227),
)


def find_gpu(target: str) -> Gpu:
    """By name ("H200") or architecture ("sm_90")."""
    for gpu in GPUS:
        if target in (gpu.name, gpu.architecture):
            return gpu
    known = ", ".join(dict.fromkeys(n for g in GPUS for n in (g.architecture, g.name)))
    raise TargetError(f"no program can be compiled for {target!r}; known are {known}")


def patches(target: str | None) -> Iterator[tuple[Any, str, Any]]:
    """What has kernels compiled for the GPU `target`, or for the machine's own."""
    # Needs Triton, which a torch without CUDA does not bring.
    from triton.backends.compiler import GPUTarget

    gpu = torch.cuda.get_device_properties(0) if target is None else find_gpu(target)
    yield PythonWrapperCodegen, "generate_and_run_autotune_block", _compile_kernels
    yield CachingAutotuner, "_precompile_worker", _precompile_first
    yield DeferredTritonCallWrapper, "generate", _generate_call
    yield joint_graph.UniformValueConstantFolder, "_deduce_value", _deduce_value_on_cpu
    yield from _driver_patches(GPUTarget("cuda", gpu.major * 10 + gpu.minor, gpu.warp_size), gpu)
    if target is not None:
        yield from _device_patches(gpu)


def _compile_kernels(self: PythonWrapperCodegen) -> None:
    """Stands in for `PythonWrapperCodegen.generate_and_run_autotune_block`: records each
    kernel's machine code.
    """
    scope: dict[str, Any] = {}
    exec(self.kernel_autotune_defs.getvalue() + "\nasync_compile.wait(globals())\n", scope)
    for kernel in [k for k in scope.values() if isinstance(k, CachingAutotuner)]:
        kernel.precompile()
        kernel.save_gpu_kernel(0, kernel.launchers[0])


_stock_precompile_worker = CachingAutotuner._precompile_worker


def _precompile_first(self: CachingAutotuner) -> None:
    """Compiles the first configuration that the GPU has room for."""
    configs = self.configs or [None]
    for config in configs:
        self.configs = config and [config]
        try:
            return _stock_precompile_worker(self)
        except NoTritonConfigsError:
            if config is configs[-1]:
                raise


_stock_generate_call = DeferredTritonCallWrapper.generate


def _generate_call(self: DeferredTritonCallWrapper, wrapper: Any) -> None:
    """Declares a kernel's parameters as what the kernel takes. The stock code makes every
    symbol an `int64_t`, and a dynamic scalar of 0.9 became 0.
    """
    first = len(wrapper.prefix._lines)
    _stock_generate_call(self, wrapper)
    signature = CudaKernelParamCache.get(self.kernel_name)["triton_meta"]["signature"]
    doubles = [f"int64_t {name}," for name, kind in signature.items() if kind in ("fp64", "fp32")]
    lines = wrapper.prefix._lines
    for k in range(first, len(lines)):
        if isinstance(lines[k], str) and lines[k].strip() in doubles:
            lines[k] = lines[k].replace("int64_t", "double", 1)


_stock_deduce_value = joint_graph.UniformValueConstantFolder._deduce_value


def _deduce_value_on_cpu(self: joint_graph.UniformValueConstantFolder, node: torch.fx.Node) -> Any:
    """Computes constants, single elements, on the CPU instead of the GPU."""
    if node.op == "get_attr":
        weight = _weights.get(str(node.target))
        if weight is not None:
            return weight if weight.numel() == 1 else self.unknown_value
    kwargs = node.kwargs
    if kwargs.get("device") is not None:
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
    try:
        return _stock_deduce_value(self, node)
    finally:
        node.kwargs = kwargs


def _driver_patches(target: Any, gpu: Any) -> Iterator[tuple[Any, str, Any]]:
    """A driver for Triton that knows the GPU and never speaks to it."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            no_statistics = (0, 0)  # registers and spilled ones
            self.utils = types.SimpleNamespace(
                load_binary=lambda name, kernel, shared, device: (
                    (1, 1, *no_statistics, gpu.max_threads_per_block)
                ),
                get_device_properties=lambda device: {
                    "max_shared_mem": gpu.shared_memory_per_block_optin,
                    "multiprocessor_count": gpu.multi_processor_count,
                },
            )
            self.launcher_cls = lambda source, metadata: None
            self.get_current_device = lambda: 0

        def get_current_target(self) -> Any:
            return target

    yield triton.runtime.driver, "_active", Driver()


class _ClaimedWeight(torch.Tensor):
    """A weight's values, on the CPU, that say they are on the target: code generation asks
    where a constant has to be, and then for its bytes.
    """

    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


# What weights hold that are only claimed to be on the target, by their names.
_weights: dict[str, torch.Tensor] = {}
_stock_weight = GraphLowering.get_original_value_of_constant


def claim_weights(module: torch.nn.Module, device: torch.device) -> None:
    """Says that a module's buffers are on the target, where there is no such device."""
    for name, weight in list(module.named_buffers()):
        _weights[name] = weight
        claim = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_buffer(leaf, claim)


def _weight(self: GraphLowering, name: str) -> torch.Tensor:
    claimed = _weights.get(self.allocated_constant_name[name])
    if claimed is None:
        return _stock_weight(self, name)
    return torch.Tensor._make_subclass(_ClaimedWeight, claimed)


def _device_patches(gpu: Gpu) -> Iterator[tuple[Any, str, Any]]:
    """A machine with the GPU in it, as far as code generation looks.

    Elsewhere `torch.cuda.is_available()` stays what it is: where that is false, fake
    tensors on the GPU need no context, and the pattern matcher builds its patterns on the CPU.
    """
    stock = GraphLowering.codegen_with_cpp_wrapper

    def codegen_with_cpp_wrapper(self: GraphLowering) -> Any:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            return stock(self)

    def properties(device: Any = None) -> Gpu:
        return gpu

    yield GraphLowering, "codegen_with_cpp_wrapper", codegen_with_cpp_wrapper
    yield GraphLowering, "get_original_value_of_constant", _weight
    # By address, which weights that are only claimed have not.
    yield inductor_graph, "is_same_tensor", lambda a, b: a is b
    yield torch.cuda, "device_count", lambda: 1
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "get_device_properties", properties
    cuda = device_interface.CudaInterface
    yield cuda, "is_available", staticmethod(lambda: True)
    yield cuda, "get_device_properties", staticmethod(properties)
    yield cuda, "exchange_device", staticmethod(lambda device: 0)
    yield cuda, "maybe_exchange_device", staticmethod(lambda device: 0)


def forget_devices() -> None:
    """Empties the caches in which torch keeps what it has learned of the machine."""
    _weights.clear()
    hints.DeviceProperties.create.cache_clear()
    for module in (_triton, inductor_utils):
        for function in list(vars(module).values()):
            if getattr(function, "__module__", None) == module.__name__:
                getattr(function, "cache_clear", lambda: None)()
