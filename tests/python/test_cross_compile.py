"""Programs for a GPU, compiled where there is none: every model of the zoo for sm_90.

    REPRISE_RECORD_ZOO=build/release/bin/record_zoo python -m unittest test_cross_compile

What the models do is recorded on the CPU. Prints what becomes of it: how many ops, how
many kernels of Triton's, and which ops of libtorch's are left.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import tempfile
import unittest
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

# What a library does better than a kernel of ours, and may stay a call of libtorch's.
LIBRARY_OPS = {
    "mm_out", "addmm_out", "bmm_out", "baddbmm_out", "convolution", "convolution_backward",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
}  # fmt: skip
# Ops that Inductor writes no kernel for.
OTHER_OPS = {"cumsum", "index_put_", "scatter_reduce_", "max_pool2d_with_indices_backward"}
EM_CUDA = 190
ANY_BATCH = "-any-batch"


@dataclass
class Compiled:
    ops: int
    kernels: int
    launches: int
    library: list[str]  # ops called, in order
    through_the_dispatcher: list[str]
    reads_numbers: bool  # the host waits for the GPU


def architecture_of(cubin: bytes) -> int:
    """`sm_90` as 90, from the flags of the ELF header."""
    machine = struct.unpack_from("<H", cubin, 18)[0]
    if cubin[:4] != b"\x7fELF" or machine != EM_CUDA:
        raise ValueError("no machine code for a GPU")
    flags = struct.unpack_from("<I", cubin, 48)[0]
    # The second byte since CUDA 13 (ELF ABI 8), the first before.
    return flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF


def look_into(package: Path, ops: int) -> tuple[Compiled, list[int]]:
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        cubins = [archive.read(n) for n in names if n.endswith(".cubin")]
        (wrapper,) = (archive.read(n).decode() for n in names if n.endswith(".wrapper.cpp"))
    body = wrapper[wrapper.index("void AOTInductorModel::run_impl(") :]
    calls = re.findall(r"aoti_torch_cuda_(\w+)\(", body)
    return (
        Compiled(
            ops, len(cubins), len(re.findall(r"\bcall_triton_\w+\(", body)), calls,
            re.findall(r"aoti_torch_proxy_executor_call_function\w*\([^\"]*\"([^\"]*)", body),
            "aoti_torch_item" in body,
        ),
        [architecture_of(cubin) for cubin in cubins],
    )  # fmt: skip


@unittest.skipUnless(torch.version.cuda, "torch was built without CUDA, and brings no Triton")
class CrossCompile(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        from reprise_compiler.build_package import PackageBuilder

        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cache = os.environ.get("REPRISE_TEST_CACHE")
        cls.builder = PackageBuilder(cache or str(cls.folder / "cache"))
        subprocess.run(
            [os.environ["REPRISE_RECORD_ZOO"], str(cls.folder)],
            check=True, stderr=subprocess.DEVNULL,
            env=os.environ | {"REPRISE_BACKING": "cpu", "REPRISE_CACHE_DIR": str(cls.folder / "none")},
        )  # fmt: skip

    def traces(self, model: str) -> list[dict]:
        return [json.loads(p.read_text()) for p in (self.folder / model).glob("*.json")]

    def compile(self, trace: dict, target: str) -> tuple[Compiled, list[int]]:
        package = self.folder / "program.pt2"
        self.builder.compile(json.dumps(trace | {"target": target}), str(package))
        return look_into(package, len(trace["steps"]))

    def recorded(self) -> dict[str, dict]:
        """The trace of each model's step."""
        steps = {}
        for folder in sorted(p for p in self.folder.iterdir() if p.is_dir() and "-" in p.name):
            if folder.name.endswith(ANY_BATCH):
                continue
            traces = self.traces(folder.name)
            self.assertTrue(traces, f"{folder.name} was not recorded")
            steps[folder.name] = max(traces, key=lambda t: len(t["steps"]))
        return steps

    def compile_all(self, traces: dict[str, dict]) -> None:
        rows = []
        for name, trace in traces.items():
            with self.subTest(name):
                compiled, architectures = self.compile(trace, "sm_90")
                rows.append((name, compiled))
                self.assertEqual(set(architectures), {90})
                # Ops are fused, and nothing falls back that should not.
                self.assertGreaterEqual(compiled.launches, compiled.kernels)
                self.assertLess(compiled.launches, compiled.ops)
                self.assertEqual(set(compiled.library) - LIBRARY_OPS - OTHER_OPS, set())
                self.assertEqual(compiled.through_the_dispatcher, [])
                self.assertFalse(compiled.reads_numbers)
        print(f"\n{'model':32} {'ops':>5} {'kernels':>8} {'launches':>9} {'library calls':>14}")
        for name, c in rows:
            print(f"{name:32} {c.ops:5} {c.kernels:8} {c.launches:9} {len(c.library):14}")

    def test_every_model_of_the_zoo(self) -> None:
        self.compile_all(self.recorded())

    def test_every_model_that_has_batches_for_all_sizes_of_them(self) -> None:
        traces = {}
        for name, trace in self.recorded().items():
            over_symbols = [
                json.loads(p.read_text()) for p in (self.folder / (name + ANY_BATCH)).glob("*-symbols.json")
            ]
            # Not of an optimizer's first step, which is another one.
            same_step = [t for t in over_symbols if len(t["steps"]) == len(trace["steps"])]
            if name.startswith(("argon", "option_pricer")):
                self.assertEqual(over_symbols, [])
            else:
                self.assertTrue(same_step, f"{name} was not recorded over symbols")
                traces[name + ANY_BATCH] = same_step[0]
        self.compile_all(traces)

    def test_weights_are_packed_and_go_to_the_gpu(self) -> None:
        weights = [torch.randn(8, 8), torch.randn(8, 8), torch.randn(8), torch.tensor(2.5)]
        torch.save(weights, self.folder / "weights.pt")

        def tensor(*sizes: int) -> dict:
            strides = list(torch.empty(sizes).stride())
            return {"kind": "tensor", "dtype": "float32", "sizes": list(sizes), "strides": strides, "offset": 0}

        def step(op: str, overload: str, args: list, result: int) -> dict:
            return {"op": op, "overload": overload, "args": args, "results": [{"value": result}]}

        trace = {
            "format": 1, "device": "cpu", "inputs": [tensor(4, 8), *(tensor(*w.shape) for w in weights)],
            "export": {"format": "package", "arguments": [0], "inputs": ["x"], "weights": str(self.folder / "weights.pt"),
                       "names": ["first.weight", "second.0.weight", "bias", "scale"], "in_program": True, "parameters": [True, True, True, False], "metadata": {}},
            "steps": [
                step("aten::mm", "", [{"value": 0}, {"value": 1}], 5),
                step("aten::mm", "", [{"value": 5}, {"value": 2}], 6),
                step("aten::add", "Tensor", [{"value": 6}, {"value": 3}, {"int": 1}], 7),
                step("aten::mul", "Tensor", [{"value": 7}, {"value": 4}], 8),
            ],
            "outputs": [8],
        }  # fmt: skip
        self.compile(trace, "sm_90")
        with zipfile.ZipFile(self.folder / "program.pt2") as archive:
            (wrapper,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp"))
            (library,) = (archive.read(n) for n in archive.namelist() if n.endswith(".so"))
        self.assertEqual(
            re.findall(r"constants_info_\[\d\].device_type = (\w+);", wrapper),
            ["cached_torch_device_type_cuda"] * len(weights),
        )
        for weight in weights:
            self.assertIn(weight.numpy().tobytes(), library)

    def test_the_named_gpu_is_the_one_compiled_for(self) -> None:
        (trace,) = self.traces("mlp-forward")
        for target, architecture in (("A100", 80), ("sm_89", 89), ("B200", 100)):
            with self.subTest(target):
                self.assertEqual(set(self.compile(trace, target)[1]), {architecture})

    def test_no_cuda_toolkit_is_needed(self) -> None:
        from torch.utils import cpp_extension

        (trace,) = self.traces("mlp-forward")
        with mock.patch.object(cpp_extension, "CUDA_HOME", None):
            self.assertEqual(self.compile(trace, "sm_90")[1], [90])

    def test_an_unknown_gpu_is_an_error_that_names_those_there_are(self) -> None:
        (trace,) = self.traces("mlp-forward")
        with self.assertRaisesRegex(ValueError, "'sm_12'; known are sm_80, A100"):
            self.compile(trace, "sm_12")


if __name__ == "__main__":
    unittest.main()
