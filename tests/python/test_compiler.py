"""The compiler on its own: traces recorded in Python, compiled, loaded, and
compared with what the recorded function does eagerly.

    PYTHONPATH=compiler_bridge/python:tests/python python -m unittest test_compiler

All tests share one process and one toolchain (REPRISE_TEST_CACHE names a folder
that keeps it), since a compile is seconds and an import more.
"""

from __future__ import annotations

import json
import os
import tempfile
import unittest
import unittest.mock
import zipfile

import reprise_compiler
import torch
import torch._inductor
from reprise_compiler import build_package, device_scalars, symbols, torch_patches
from reprise_compiler.trace_to_fx import TraceError, read_trace
from trace_recorder import record

aten = torch.ops.aten


def setUpModule() -> None:
    reprise_compiler.initialize(os.environ.get("REPRISE_TEST_CACHE"))


class CompilerTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.package_path = os.path.join(self.folder, "program.pt2")

    def load(self, trace_json: str):
        reprise_compiler.compile(trace_json, self.package_path)
        return torch._inductor.aoti_load_package(self.package_path)

    def check(self, function, inputs, scalars=(), other_scalars=(), tolerance=None):
        """Compares outputs and mutated inputs with eager, on fresh values.

        `function` takes tensors, then scalars. It is recorded with `scalars` and
        must hold for `other_scalars` as well.
        """
        exact = {"rtol": 0, "atol": 0} if tolerance == 0 else {}
        exact["equal_nan"] = True
        recording = record(lambda *t: function(*t, *scalars), _copies(inputs), scalars)
        program = self.load(recording.json)
        self.assertEqual(len(recording.inputs), len(inputs) + len(scalars))
        for numbers in {tuple(scalars), tuple(other_scalars or scalars)}:
            expected_inputs, actual_inputs = _copies(inputs), _copies(inputs)
            expected = function(*expected_inputs, *numbers)
            if isinstance(expected, torch.Tensor):
                expected = [expected]
            actual = program(*actual_inputs, *(torch.tensor(n, dtype=torch.float64) for n in numbers))
            actual = [actual] if isinstance(actual, torch.Tensor) else list(actual or ())
            self.assertEqual(len(actual), len(expected or ()))
            for a, e in zip(actual, expected or ()):
                self.assertEqual(a.dtype, e.dtype)
                torch.testing.assert_close(a, e, **exact)
            for a, e in zip(actual_inputs, expected_inputs):
                torch.testing.assert_close(a, e, **exact)
            # Each output owns its storage.
            storages = [t.untyped_storage().data_ptr() for t in [*actual, *actual_inputs] if t.numel()]
            self.assertEqual(len(set(storages)), len(storages))
        return recording


def _copies(tensors):
    """Same values, strides and offsets, storages of their own."""
    copies = []
    for t in tensors:
        storage = torch.empty(t.storage_offset() + t.untyped_storage().nbytes() // t.element_size(),
                              dtype=t.dtype)
        copy = storage.as_strided(t.shape, t.stride(), t.storage_offset())
        whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        storage[: whole.numel()].copy_(whole)
        copies.append(copy)
    return copies


class InPlaceOps(CompilerTest):
    def test_inputs_are_written_in_place(self):
        def f(x, y):
            x.mul_(y).add_(1.0)
            y.zero_()

        self.check(f, [torch.randn(3, 5), torch.randn(3, 5)])

    def test_writes_through_a_view_reach_the_base(self):
        def f(x):
            y = x * 2
            y[1].fill_(7.0)
            y.t()[2].add_(y[0, 0])
            y.view(-1)[3:6].mul_(-1)
            return y

        self.check(f, [torch.randn(4, 4)])

    def test_writes_through_a_view_of_an_input(self):
        def f(x):
            x.select(0, 1).copy_(x.select(0, 0))
            x.transpose(0, 1)[1:3].sub_(0.5)

        self.check(f, [torch.randn(4, 6)])

    def test_inputs_take_what_other_inputs_held(self):
        def swap(x, y):
            old = x.clone()
            x.copy_(y)
            y.copy_(old)

        def keep(x, y):
            y.copy_(x.view(-1))
            x.zero_()

        def rotate(x, y, z):
            old = x.clone()
            x.copy_(y)
            y.copy_(z)
            z.copy_(old)

        def later(x, y):
            x.add_(1)
            y.copy_(x.view(-1))
            x.zero_()

        self.check(swap, [torch.randn(5), torch.randn(5)], tolerance=0)
        self.check(swap, [torch.randn(64, 64), torch.randn(64, 64)], tolerance=0)
        self.check(keep, [torch.randn(3, 4), torch.randn(12)], tolerance=0)
        self.check(rotate, [torch.randn(7), torch.randn(7), torch.randn(7)], tolerance=0)
        self.check(later, [torch.randn(3, 4), torch.randn(12)], tolerance=0)

    def test_a_view_that_is_read_before_its_base_changes(self):
        def update(view):
            def f(x, z, k):
                y = z - view(x) * 0.25
                x.addcmul_(k.expand(3, 4), x, value=-1.25)
                return y

            return f

        views = (lambda x: x.t(), lambda x: x.view(4, 3), lambda x: x.view(-1)[:6])
        for view in views:
            for dtype in (torch.float32, torch.float64):
                x = torch.randn(3, 4)
                z = torch.randn(view(x).shape, dtype=dtype)
                self.check(update(view), [x, z, torch.arange(4)])

    def test_what_was_written_is_read_before_it_is_written_again(self):
        def f(x):
            x.as_strided((2, 2), (1, 1), 0).fill_(-2)
            torch.add(x.flip(0), 1, out=x.as_strided((6,), (1,), 0))

        self.check(f, [torch.randn(6)], tolerance=0)

    def test_a_list_with_a_tensor_twice_is_refused(self):
        def f(x):
            torch._foreach_mul_([x, x], 2.0)

        with self.assertRaisesRegex(TraceError, "share a storage"):
            self.check(f, [torch.randn(4)])

    def test_a_write_through_a_view_with_an_element_in_several_places_is_refused(self):
        def fill(x):
            x.expand(2, 4).fill_(0.25)

        def add(x):
            x.expand(2, 4)[0].add_(1)

        def window(x):
            x.unfold(0, 3, 1)[1].add_(1)

        def out(x):
            torch.neg(x, out=x.expand(2, 4)[0])

        def strided(x):
            x.as_strided([2, 2], [1, 1]).mul_(0.25)

        for f in (fill, add, window, out, strided):
            with self.assertRaisesRegex(TraceError, "may show an element twice"):
                self.check(f, [torch.randn(4)])

    def test_an_input_with_an_element_in_several_places_is_not_written(self):
        recording = record(lambda x: x.add_(1), [torch.randn(6)])
        trace = json.loads(recording.json)
        trace["inputs"][0].update(sizes=[2, 3], strides=[1, 1])
        with self.assertRaisesRegex(TraceError, "may show an element twice"):
            read_trace(json.dumps(trace))

    def test_a_strided_view_without_overlaps_is_written(self):
        def f(x):
            x.as_strided([2, 3], [1, 2]).add_(1)
            x.as_strided([3, 1, 2], [2, 1, 0])  # not written

        self.check(f, [torch.randn(6)])

    def test_an_output_has_the_final_contents_of_its_storage(self):
        def f(x):
            y = torch.relu(x)
            z = y + 1
            y.add_(z)
            y.mul_(z)
            return y, z

        self.check(f, [torch.randn(8)])

    def test_out_variants(self):
        def f(x, y):
            aten.add.out(x, y, alpha=2, out=y)

        self.check(f, [torch.randn(6), torch.randn(6)])


class Outputs(CompilerTest):
    def test_a_clone_of_an_input_does_not_alias_it(self):
        self.check(lambda x: x.clone(), [torch.randn(5)])

    def test_what_nothing_is_added_to_is_not_returned(self):
        def f(x, y):
            a = x + torch.zeros_like(x)
            b = y * torch.ones_like(y)
            y.add_(1)
            return a, b

        self.check(f, [torch.randn(5), torch.randn(2, 3)])

    def test_equal_outputs_do_not_alias_each_other(self):
        def f(x):
            a = x + 1
            b = x + 1
            return a, b, a.clone(), torch.zeros(3), torch.zeros(3)

        self.check(f, [torch.randn(5)])

    def test_no_output_and_no_input(self):
        self.check(lambda x: [], [torch.randn(2)])
        self.check(lambda: torch.arange(4).to(torch.float32), [])

    def test_zero_dimensional_and_empty(self):
        self.check(lambda x, y: (x.sum(), x.max() + y, x[:0].clone()), [torch.randn(5), torch.tensor(2.0)])

    def test_indices_in_narrow_dtypes(self):
        def f(x):
            n = torch.arange(400)
            return n.logical_not(), n.to(torch.uint8), n.bool() & (x > 0), n.to(torch.int16) * 100

        self.check(f, [torch.randn(400)], tolerance=0)

    def test_a_number_reversed(self):
        self.check(lambda x: x.flip(0) + 1, [torch.tensor(3.0)])

    def test_strides_are_those_of_eager(self):
        x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        recording = record(lambda x: torch.relu(x), [x])
        (out,) = self.load(recording.json)(x)
        self.assertEqual(out.stride(), torch.relu(x).stride())


class Arguments(CompilerTest):
    def test_lists_of_tensors_in_and_out(self):
        def f(x, y):
            a, b = torch.cat([x, y, x]).split([3, 6])
            c = torch.stack(b.unbind(0)[:2])
            return a * 2, c

        self.check(f, [torch.randn(3, 4), torch.randn(3, 4)])

    def test_optional_tensors_in_lists(self):
        def f(x, i):
            y = x[:, i]
            x[:, i] = y * 2
            return y.clone()

        self.check(f, [torch.randn(3, 6), torch.tensor([0, 2, 5])])

    def test_dtype_device_layout_and_memory_format(self):
        def f(x):
            y = aten._to_copy(x, dtype=torch.float64, memory_format=torch.contiguous_format)
            z = torch.ones([2, 3], dtype=torch.int32, device="cpu", layout=torch.strided)
            return y, z, torch.full_like(x, 3, dtype=torch.bool), x.sum(dtype=torch.float64)

        self.check(f, [torch.randn(4, 3)])

    def test_floats_keep_every_bit_and_may_be_infinite(self):
        def f(x):
            return x * 0.1, torch.full((3,), float("inf")), x.masked_fill(x > 0, float("-inf")), x * float("nan")

        self.check(f, [torch.randn(6, dtype=torch.float64)])

    def test_strings(self):
        self.check(lambda x: aten.gelu(x, approximate="tanh"), [torch.randn(9)])

    def test_bool_and_integer_tensors(self):
        def f(x, i):
            m = x > 0
            return m & ~(x > 1), i // 2, i % 3, torch.where(m, i, -i), i.sum(), (i + x)

        self.check(f, [torch.randn(7), torch.arange(7)])

    def test_complex_ops_run_as_fallbacks(self):
        def f(x):
            y = torch.fft.rfft(x)
            return torch.view_as_real(y * (1 + 2j)).clone(), torch.fft.irfft(y)

        self.check(f, [torch.randn(4, 8)])

    def test_complex_numbers(self):
        def f(x):
            y = torch.zeros(2, 3, dtype=torch.complex64)
            z = torch.full((3,), 1 - 2j)
            w = torch.full_like(z, 0.5j) * x[0]
            u = x.double() * (2 + 1j)
            return y + x, z, torch.full((), 2j, dtype=torch.complex128), w, x - 1j, u, w == 0.5j

        self.check(f, [torch.randn(2, 3)])

    def test_loops_that_cannot_be_made_one(self):
        def f(x):
            y = x * 1.5
            return y.sin(), y.cos() + x, y.sum(0)

        fuse, fails = torch_patches._stock_fuse, iter([True])

        def fails_once(*args):
            if next(fails, False):
                raise AssertionError("ranges differ")
            return fuse(*args)

        lower = build_package._lower
        with (
            unittest.mock.patch.object(torch_patches, "_stock_fuse", fails_once),
            unittest.mock.patch.object(build_package, "_lower", wraps=lower) as attempts,
        ):
            self.check(f, [torch.randn(2, 3)])
        self.assertEqual(attempts.call_count, 2)

    def test_what_is_joined_is_written_later(self):
        def f(x, i):
            y = x.amax(0)
            z = torch.nn.functional.layer_norm(y, y.shape)
            joined = torch.cat([(y.mean() > 0).view(-1), z])
            z.index_add_(0, i, torch.ones_like(z[i]))
            return joined, joined > z.repeat(2)[:5]

        self.check(f, [torch.randn(3, 4), torch.tensor([0, 2, 0])])

    def test_a_masked_number_that_is_used_again(self):
        def f(k):
            tail = k[2:]
            tail.add_(1)
            tail.fill_(2)
            return k.flip(0), tail.repeat(2)

        self.check(f, [torch.arange(4)])

    def test_bytes_of_booleans(self):
        def f(x):
            m = x > 0
            return m.view(torch.int8) * 2, m.view(torch.int32) + 1, x.view(torch.int16) + 1

        self.check(f, [torch.randn(2, 8)])

    def test_factors_of_integer_products_are_integers(self):
        def f(x, v):
            return (
                torch.addmm(x, x, x, beta=-1.5, alpha=0.5),
                torch.addmv(v, x, v, beta=2.5, alpha=1.5),
                torch.baddbmm(x[None], x[None], x[None], beta=1.5, alpha=-2.5),
                aten.addmm_(x[:1, :1].clone(), x[:1], x[:, :1], beta=-1.5, alpha=1.5),
                torch.addcmul(v, v, v, value=-2.5),
                aten.addcmul_(v.clone(), v, v, value=1.5),
                torch.addcmul(v, v.float(), v, value=-2.5),
            )

        for dtype in (torch.int64, torch.int32, torch.float32):
            x = torch.arange(9).reshape(3, 3).to(dtype)
            self.check(f, [x, x[0].clone()])

    def test_integers_are_filled_with_integers(self):
        def f(x, flags):
            y = x.clone().fill_(-0.75)
            flags.fill_(0.5)
            x.t().fill_(2.75)
            return y, aten.fill(x, 1.5), flags & (x > 0)

        self.check(f, [torch.arange(4).reshape(2, 2), torch.zeros(2, 2, dtype=torch.bool)], tolerance=0)

    def test_integers_take_numbers_that_change(self):
        def f(x, flags, number):
            x.t().fill_(number)
            i = torch.zeros_like(x[0, :1])
            return (
                torch.addcmul(x, x, x, value=number),
                flags.clone().fill_(number) & flags,
                x.masked_fill(flags, number),
                flags.masked_fill(flags, number),
                aten.masked_fill_(x + 1, flags, number),
                x.index_fill(1, i, number),
                flags.index_fill(0, i, number),
                torch.scatter(x, 0, i[None], number),
                torch.scatter(flags, 0, i[None], number),
                aten.full([2], number, dtype=torch.int64),
                aten.full([2], number, dtype=torch.bool),
                aten.full_like(flags, number),
                aten.new_full(x, [3], number),
            )

        inputs = [torch.arange(4).reshape(2, 2), torch.ones(2, 2, dtype=torch.bool)]
        self.check(f, inputs, scalars=[2.75], other_scalars=[-1.5], tolerance=0)
        self.check(f, inputs, scalars=[2.75], other_scalars=[0.0], tolerance=0)

    def test_a_filled_tensor_is_rounded_to_its_dtype(self):
        def f(x):
            half = torch.zeros(4, dtype=torch.bfloat16).fill_(0.1)
            whole = aten.full([4], 16777217, dtype=torch.float32)
            return x - torch.full([4], 0.1), x - whole, x - half, x - x.float().new_full([4], 0.1)

        self.check(f, [torch.randn(4, dtype=torch.float64)], tolerance=0)

    def test_keyword_numbers_of_fallbacks(self):
        def f(x, y):
            z = x.cfloat()
            return z - y * 0.25, torch.add(z, z, alpha=2), torch.rsub(z, y, alpha=1)

        self.check(f, [torch.randn(3, 4), torch.randn(3, 4)])

    def test_dtypes_and_formats_of_fallbacks(self):
        def f(x):
            y = x.cfloat()
            swapped = y.transpose(0, 2)
            return (
                x.cdouble(),
                y.sum(1, dtype=torch.complex128),
                torch.ones_like(y, dtype=torch.complex128),
                swapped.clone(memory_format=torch.contiguous_format),
                swapped.clone(memory_format=torch.preserve_format),
                torch.zeros_like(swapped, layout=torch.strided),
            )

        self.check(f, [torch.randn(4, 3, 2)])


class Inputs(CompilerTest):
    def test_strided_and_offset(self):
        base = torch.randn(40)
        self.check(lambda x: (x.t() @ x, x + 1), [base.as_strided((3, 4), (10, 2), 3)])

    def test_offset_inputs_are_written_in_place(self):
        def f(x):
            x.add_(1)
            x.as_strided((2,), (1,), 5).mul_(3)
            x[1].as_strided((3,), (2,), 10).zero_()
            x.unbind(0)[2].as_strided((1,), (1,), 15).fill_(9)

        self.check(f, [torch.randn(40).as_strided((3, 4), (4, 1), 4)])

    def test_views_that_leave_their_input_are_an_error(self):
        for x in (torch.randn(8)[4:], torch.randn(3, 8)[:, :4]):
            recording = record(lambda x: x.as_strided((2,), (1,), 2) + 1, [x])
            with self.assertRaisesRegex(TraceError, "make the whole storage the input"):
                self.load(recording.json)

    def test_unused_inputs_keep_their_place(self):
        self.check(lambda x, y, z: x - z, [torch.randn(3), torch.randn(2, 2), torch.randn(3)])

    def test_one_storage_through_several_views(self):
        def f(flat):
            w, b = flat[:12].view(3, 4), flat[12:].view(4)
            w.sub_(b)
            return w @ w.t()

        self.check(f, [torch.randn(16)])

    def test_factors_of_a_matrix_product(self):
        def f(bias, x, w):
            exact = torch.addmm(bias, x, w, beta=1, alpha=1).relu() + 1
            return exact, torch.addmm(bias, x, w, beta=-1.5, alpha=0.5).relu() + 1

        def no_bias(bias, x, w):
            return torch.addmm(bias, x, w, beta=0).relu() + 1

        numbers = [torch.randn(6), torch.randn(4, 5), torch.randn(5, 6)]
        self.check(f, numbers)
        self.check(f, [(8 * t).long() for t in numbers], tolerance=0)
        self.check(no_bias, [torch.full((6,), torch.nan), *numbers[1:]])

    def test_half_precision(self):
        def f(x, w):
            return torch.nn.functional.gelu(x @ w).sum(0)

        self.check(f, [torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8, 8, dtype=torch.bfloat16)])


class DynamicScalars(CompilerTest):
    def test_scalar_arguments_follow_the_input(self):
        def f(p, m, v, s, e):
            d = v.sqrt().div_(e).add_(1e-8)
            p.addcdiv_(m, d, value=s)
            p.mul_(s).sub_(m, alpha=e)
            return p * e, p.add(m, alpha=s)

        tensors = [torch.rand(8) + 0.5 for _ in range(3)]
        self.check(f, tensors, scalars=(-0.01234, 0.3), other_scalars=(0.71, 1.7))

    def test_they_keep_double_precision(self):
        def f(x, s):
            return x * s + s

        x = torch.rand(64, dtype=torch.float64)
        self.check(f, [x], scalars=(0.1,), other_scalars=(1.0 / 3.0,), tolerance=0)

    def test_no_value_is_special(self):
        def f(x, s):
            y = torch.nn.functional.leaky_relu(x - 0.5, s)
            results = x.clamp(min=s), y, x.lerp(y, s), x > s
            x.fill_(s)
            return results

        self.check(f, [torch.rand(16)], scalars=(0.25,), other_scalars=(0.0,))

    def test_bounds_promote_and_fuse_as_numbers_do(self):
        def f(x, n, s):
            y = torch.softmax(x.clamp(-1, s), 0)
            return y, n.clamp(-1, s), n.clamp_min(s), x.clone().clamp_max_(s)

        inputs = [torch.randn(3, 4), torch.arange(-3, 5)]
        self.check(f, inputs, scalars=(0.25,), other_scalars=(1.75,))

    def test_padding_is_filled_with_them(self):
        def f(x, fill):
            return aten.constant_pad_nd(x, [1, 2, 0, 1], fill) + 1

        for dtype in (torch.float32, torch.float64, torch.int64):
            x = torch.arange(12).view(3, 4).to(dtype)
            self.check(f, [x], scalars=(0.25,), other_scalars=(-3.0,), tolerance=0)

    def test_a_number_that_cannot_vary_is_an_error(self):
        x, w = torch.rand(3, 4), torch.rand(4)
        recording = record(lambda x, w: aten.native_layer_norm(x, [4], w, w, 0.25), [x, w], (0.25,))
        with self.assertRaisesRegex(TraceError, "`eps` is a float and cannot be an input"):
            self.load(recording.json)


class MultipleResults(CompilerTest):
    def test_layer_norm_and_max_along_a_dimension(self):
        def f(x, w, b):
            y, mean, rstd = aten.native_layer_norm(x, [6], w, b, 1e-5)
            values, indices = y.max(1)
            return y, mean, rstd, values, indices

        self.check(f, [torch.randn(5, 6), torch.randn(6), torch.randn(6)])

    def test_batch_norm_updates_its_running_statistics(self):
        def f(x, w, b, mean, var):
            y, save_mean, save_rstd = aten.native_batch_norm(x, w, b, mean, var, True, 0.1, 1e-5)
            return y, save_mean, save_rstd

        c = torch.rand(4) + 0.5
        self.check(f, [torch.randn(8, 4, 5, 5), c, c, c.clone(), c.clone()])


class Training(CompilerTest):
    def check_training(self, model, *inputs, loss):
        parameters = list(model.parameters())
        state = [torch.zeros_like(p) for p in parameters]

        def step(*tensors, lr):
            value = loss(model(tensors[0]), *tensors[1:])
            grads = torch.autograd.grad(value, parameters)
            with torch.no_grad():
                for p, g, m in zip(parameters, grads, state):
                    m.mul_(0.9).add_(g)
                    p.add_(m, alpha=lr)
            return value.detach()

        recording = record(lambda *t: step(*t, lr=-0.01), list(inputs), scalars=(-0.01,))
        program = self.load(recording.json)
        tensors = [t.detach() for t in recording.inputs]
        for rate in (-0.01, -0.003):
            saved = [t.clone() for t in tensors]
            tensors[len(inputs)].fill_(rate)
            (actual,) = program(*tensors)
            after = [t.clone() for t in tensors]
            for t, s in zip(tensors, saved):
                t.copy_(s)
            expected = step(*inputs, lr=rate)
            tensors[len(inputs)].fill_(rate)
            torch.testing.assert_close(actual, expected)
            for a, t in zip(after, tensors):
                torch.testing.assert_close(a, t)

    def test_transformer_block(self):
        torch.manual_seed(0)

        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(11, 16)
                self.norm = torch.nn.LayerNorm(16)
                self.qkv = torch.nn.Linear(16, 48)
                self.out = torch.nn.Linear(16, 11)

            def forward(self, tokens):
                x = self.embed(tokens)
                q, k, v = self.qkv(self.norm(x)).view(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
                a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return self.out(torch.nn.functional.gelu(x + a.transpose(1, 2).reshape(2, 6, 16)))

        self.check_training(
            Block(), torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6)),
            loss=lambda y, t: torch.nn.functional.cross_entropy(y.flatten(0, 1), t.flatten()),
        )

    def test_convolutional_net(self):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.Flatten(),
            torch.nn.Linear(72, 5),
        )  # fmt: skip
        self.check_training(
            model, torch.randn(4, 3, 10, 10), torch.randn(4, 5),
            loss=lambda y, t: torch.nn.functional.mse_loss(y, t),
        )


class Threads(CompilerTest):
    def test_the_thread_count_of_the_call_is_used(self):
        def f(x):
            return (x * 2).relu(), x.sum(), x.softmax(-1)

        x = torch.rand(64, 4096)
        before = torch.get_num_threads()
        try:
            for compiled_with, run_with in ((1, 3), (2, 1)):
                torch.set_num_threads(compiled_with)
                program = self.load(record(f, [x]).json)
                torch.set_num_threads(run_with)
                for a, e in zip(program(x), f(x)):
                    torch.testing.assert_close(a, e)
        finally:
            torch.set_num_threads(before)


    def test_short_loops_around_a_reduction(self):
        def f(x):
            d = x.unsqueeze(0) - x.unsqueeze(1)
            return (d * d.square().sum(-1, keepdim=True)).sum(0), d.square().sum()

        self.check(f, [torch.rand(40, 3)])


class LoopInvariants(CompilerTest):
    """What is moved out of loops, and what must not be."""

    def sources(self, function, inputs):
        """The C++ of a program's kernels."""
        self.check(function, inputs)
        with zipfile.ZipFile(self.package_path) as package:
            names = [n for n in package.namelist() if n.endswith((".kernel.cpp", ".wrapper.cpp"))]
            return "".join(package.read(name).decode() for name in names)

    def body_of(self, source):
        """What stands in its first loop over x0."""
        return source[source.index("for(int64_t x0") :].partition("\n    }\n")[0]

    def test_arithmetic_on_scalars_leaves_the_loop(self):
        def f(x, a, b):
            return x * (a / 3).sqrt() + (-b).exp()

        body = self.body_of(self.sources(f, [torch.rand(1000), torch.rand(()), torch.rand(())]))
        self.assertNotIn("sqrt", body)
        self.assertNotIn("exp", body)

    def test_in_loops_around_and_after_reductions(self):
        def f(x, a):
            rows = (x * a.sqrt()).sum(1, keepdim=True) / a
            return x - rows * a.exp(), (x * a).softmax(1), (x + a).t().contiguous()

        self.check(f, [torch.rand(37, 29), torch.rand(())])

    def test_a_scalar_that_is_made_and_used_in_one_program(self):
        def f(x, y):
            total = (x * 2).sum()
            return x / total, (y - total).relu(), total + 1

        self.check(f, [torch.rand(501), torch.rand(7, 11)])

    def test_a_scalar_that_is_written(self):
        def f(x, a):
            y = x * a
            a.add_(1)
            z = x * a
            a.mul_(x.sum())
            return y, z, x * a

        self.check(f, [torch.rand(100), torch.rand(())])

    def test_an_element_of_what_is_written(self):
        def f(x):
            x.sub_(x[3].clone())
            x.mul_(x[0] + x[1])
            return x[5] * x

        self.check(f, [torch.rand(64)])

    def test_branches_that_do_not_read(self):
        def f(x, y, a):
            return torch.cat([x * a[0], y * a[1], x[:1] * a[2]]), torch.nn.functional.pad(x * a[1], (3, 2))

        self.check(f, [torch.rand(20), torch.rand(11), torch.rand(3)])

    def test_other_types(self):
        def f(x, h, i, a):
            return x * a, h * a, i + i[2], (i > i[1]), (x > a).to(torch.float64) * a

        self.check(f, [torch.rand(33), torch.rand(35).bfloat16(), torch.arange(19), torch.rand(())])


class TheHostProgram(CompilerTest):
    def test_its_random_generator_and_backends_are_left_alone(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        seen = []
        stock_flags, stock_state = torch.backends.mkldnn.set_flags, torch.set_rng_state
        stock_anomaly = torch.set_anomaly_enabled
        torch.set_anomaly_enabled = lambda on, *a: seen.append("anomaly") if on else None
        torch.backends.mkldnn.set_flags = lambda *a: seen.append("mkldnn") or stock_flags(*a)
        torch.set_rng_state = torch.random.set_rng_state = lambda *a: seen.append("rng")
        try:
            self.check(lambda x: x + 1, [torch.ones(3)])
        finally:
            torch.backends.mkldnn.set_flags = stock_flags
            torch.set_rng_state = torch.random.set_rng_state = stock_state
            torch.set_anomaly_enabled = stock_anomaly
        self.assertEqual(seen, [])
        self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_torch_is_as_before_after_a_compile(self):
        from torch._dynamo.utils import preserve_rng_state
        from torch._inductor import config, cpu_vec_isa

        check_build = cpu_vec_isa.VecISA.check_build
        self.load(record(lambda x: x + 2, [torch.ones(3)]).json)
        self.assertIs(cpu_vec_isa.VecISA.check_build, check_build)
        self.assertIs(torch._functorch.aot_autograd.preserve_rng_state, preserve_rng_state)
        self.assertFalse(config.cpp.dynamic_threads)


class OverSymbols(CompilerTest):
    """Traces whose sizes are symbols."""

    def compiled(self, function, inputs, sizes, hints, numbers=(), scalars=()):
        """`sizes[k]` is input k's, with expressions; `numbers` replaces integers elsewhere."""
        trace = record(lambda *t: function(*t, *scalars), _copies(inputs), scalars).trace
        for spec, size in zip(trace["inputs"], sizes):
            spec["sizes"] = size
        text = json.dumps(trace)
        for number, expression in numbers:
            text = text.replace(f'{{"int": {number}}}', json.dumps({"expr": expression}))
        program = self.load(json.dumps({**json.loads(text), "symbols": hints}))
        with open(self.package_path + ".guards", encoding="utf-8") as file:
            return program, file.read().splitlines()

    def test_one_program_for_many_sizes_that_writes_its_input(self):
        def function(x, w):
            h = torch.relu(x @ w)
            w.add_(x.t() @ h, alpha=0.1)
            return h.sum(0), h * 2

        program, guards = self.compiled(
            function, [torch.randn(6, 8), torch.randn(8, 5)], [["s0", 8], [8, 5]], [6]
        )
        self.assertIn("(>= s0 2)", guards)
        for rows in (6, 2, 40):
            expected = [torch.randn(rows, 8), torch.randn(8, 5)]
            actual = _copies(expected)
            results = function(*expected)
            for a, e in zip([*program(*actual), actual[1]], [*results, expected[1]]):
                torch.testing.assert_close(a, e)

    def test_floats_that_change_stay_inputs(self):
        def function(x, s):
            return x * s, x + s

        program, _ = self.compiled(function, [torch.randn(6, 8)], [["s0", 8]], [6], scalars=(0.3,))
        for rows, s in ((6, 0.3), (4, -1.7)):
            x = torch.randn(rows, 8)
            results = program(x, torch.tensor(s, dtype=torch.float64))
            torch.testing.assert_close(tuple(results), function(x, s))

    def test_integers_are_expressions(self):
        program, _ = self.compiled(
            lambda x: x.exp().view(56)[:55] + 1, [torch.randn(7, 8)], [["s0", 8]], [7],
            [(56, "(* 8 s0)"), (55, "(- (* 8 s0) 1)")],
        )  # fmt: skip
        x = torch.randn(3, 8)
        torch.testing.assert_close(program(x)[0], x.exp().view(24)[:23] + 1)

    def test_what_is_taken_for_granted_is_a_guard(self):
        _, guards = self.compiled(lambda x: x.view(48) + 1, [torch.randn(6, 8)], [["s0", 8]], [6])
        self.assertTrue({"(>= s0 6)", "(<= s0 6)"} <= set(guards), guards)

    def test_a_view_whose_offset_is_a_number(self):
        def function(x, y):
            row = x.as_strided([4], [1], 12)
            return row * y, row.exp()

        trace = record(function, [torch.randn(8, 4), torch.randn(4)]).trace
        text = json.dumps(trace).replace('{"int": 12}', '{"expr": "(+ s0 -2)"}')
        program = self.load(json.dumps({**json.loads(text), "symbols": [14], "numbers": 1}))
        x, y = torch.randn(8, 4), torch.randn(4)
        for offset in (12, 0, 28):
            told = torch.empty_strided([offset + 2], [0], dtype=torch.uint8)
            row = x.flatten()[offset : offset + 4]
            for out, expected in zip(program(x, y, told), (row * y, row.exp()), strict=True):
                torch.testing.assert_close(out, expected)

    def test_where_an_input_lies_may_be_a_number(self):
        trace = record(lambda x: x * 2 + 1, [torch.randn(9, 8)[2:6, :3]]).trace
        (spec,) = trace["inputs"]
        spec["strides"], spec["offset"] = ["(+ s0 -2)", 1], "(+ s1 -2)"
        program = self.load(json.dumps({**trace, "symbols": [10, 18], "numbers": 2}))
        for columns, first in ((8, 2), (5, 0), (3, 4)):
            x = torch.randn(9, columns)[first : first + 4, :3]
            told = [torch.empty_strided([n + 2], [0], dtype=torch.uint8)
                    for n in (columns, x.storage_offset())]
            (out,) = program(x, *told)
            torch.testing.assert_close(out, x * 2 + 1)

        trace = record(lambda x: x.as_strided([2], [1], 16), [torch.randn(9, 8)[2:6]]).trace
        trace["inputs"][0]["offset"] = "(+ s0 -2)"
        with self.assertRaisesRegex(TraceError, "an input whose offset is a symbol"):
            self.load(json.dumps({**trace, "symbols": [18], "numbers": 1}))

    def test_numbers_are_told_by_the_sizes_of_further_inputs(self):
        recording = record(lambda x: x[:, 3:4] * 2, [torch.randn(2, 9)])
        text = recording.json.replace('{"int": 3}, {"int": 4}', json.dumps({"expr": "(+ s0 -2)"})
                                      + ", " + json.dumps({"expr": "(+ s0 -1)"}))  # fmt: skip
        self.assertIn("expr", text)
        program = self.load(json.dumps({**json.loads(text), "symbols": [5], "numbers": 1}))
        x = torch.randn(2, 9)
        for place in (3, 0, 1, 8):
            told = torch.empty(1, dtype=torch.uint8).expand(place + 2)
            torch.testing.assert_close(program(x, told)[0], x[:, place : place + 1] * 2)

    def test_expressions_are_read(self):
        values = [7, 3]
        for text, value in {
            "s0": 7, "-4": -4, "(* 2 s0 s1)": 42, "(// (- s1 s0) 3)": -2, "(% s0 s1)": 1,
            "(min s0 (+ s1 1))": 4, "(max s0 s1)": 7,
        }.items():  # fmt: skip
            self.assertEqual(symbols.evaluate(text, values.__getitem__), value, text)
        for text in ("", "(", "(+ s0", "(? s0 s1)", "s0 s1", "sx"):
            with self.assertRaises(symbols.ExpressionError, msg=text):
                symbols.evaluate(text, values.__getitem__)


class NumbersOnTheDevice(unittest.TestCase):
    """Ops with a number, as the functions that take a tensor in its place."""

    def check(self, op, x, *args, **keywords):
        """`args` and `keywords` as the op gets them; a float among them is the number."""
        function = device_scalars.function_of(op)
        self.assertIsNotNone(function)
        expected = op(x.clone(), *args, **keywords)
        other = next(a for a in reversed((x, *args)) if isinstance(a, torch.Tensor)) if function.last else x

        def given(value):
            if not isinstance(value, float):
                return value
            if function.casts:
                return torch.tensor(value, dtype=torch.float64)
            return device_scalars.number(torch.tensor(value, dtype=torch.float64), other)

        actual = function.target(
            x.clone(), *map(given, args), **{k: given(v) for k, v in keywords.items()}
        )
        self.assertEqual(actual.dtype, expected.dtype)
        torch.testing.assert_close(actual, expected)

    def test_are_eagers(self):
        mask = torch.tensor([True, False, True])
        for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
            x = torch.tensor([1, -2, 3], dtype=dtype)
            y = torch.tensor([2, 5, -4], dtype=dtype)
            with self.subTest(dtype):
                for op in (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar,
                           aten.rsub.Scalar, aten.eq.Scalar, aten.lt.Scalar, aten.clamp_min.default,
                           aten.clamp_max.default):  # fmt: skip
                    self.check(op, x, 1.5)
                self.check(aten.clamp.default, x, -0.5, 2.5)
                self.check(aten.masked_fill.Scalar, x, mask, 2.0)
                self.check(aten.where.ScalarOther, mask, x, 0.25)
                self.check(aten.fill_.Scalar, x, 3.0)
                self.check(aten.index_fill_.int_Scalar, x, 0, torch.tensor([2]), 4.0)
                self.check(aten.scatter.value, x, 0, torch.tensor([1, 0]), 5.0)
                self.check(aten.new_full.default, x, [2, 2], 6.0)
                self.check(aten.full_like.default, x, 1.0, dtype=torch.bool)
                if dtype.is_floating_point:
                    self.check(aten.add.Tensor, x, y, alpha=0.3)
                    self.check(aten.sub_.Tensor, x, y, alpha=0.3)
                    self.check(aten.mul_.Scalar, x, 0.9)
                    self.check(aten.addcmul_.default, x, y, y, value=0.1)
                    self.check(aten.addcdiv_.default, x, y, y, value=-0.1)
                    self.check(aten.lerp.Scalar, x, y, 0.7)
                    self.check(aten.leaky_relu.default, x, 0.2)

    def test_large_integers_are_exact(self):
        x = torch.tensor([1, -2, 3])
        self.check(aten.fill_.Scalar, x, 123456789.0)
        self.check(aten.masked_fill.Scalar, x, x > 0, 123456789.0)

    def test_without_dimensions_the_dtype_stays(self):
        x = torch.tensor(3.0, dtype=torch.float16)
        self.check(aten.mul.Scalar, x, 0.1)

    def test_what_rounds_has_none(self):
        self.assertIsNone(device_scalars.function_of(aten.div.Scalar_mode))
        self.assertIsNone(device_scalars.function_of(aten.pow.Tensor_Scalar))
        self.assertIsNone(device_scalars.function_of(aten.scatter.value_reduce))


class Failures(CompilerTest):
    def fails(self, trace, message):
        path = os.path.join(self.folder, "failed.pt2")
        with self.assertRaisesRegex(TraceError, message):
            reprise_compiler.compile(trace if isinstance(trace, str) else json.dumps(trace), path)
        self.assertEqual(os.listdir(self.folder), [])

    def trace(self, **changes):
        recording = record(lambda x: x + 1, [torch.ones(2)])
        return {**recording.trace, **changes}

    def test_no_json(self):
        self.fails("{", "not JSON")

    def test_another_format(self):
        self.fails(self.trace(format=99), "format 99")

    def test_an_unknown_op(self):
        step = {"op": "nowhere::nothing", "overload": "", "args": [], "results": []}
        self.fails(self.trace(steps=[step]), "step 0, nowhere::nothing: .* not registered")

    def test_a_value_before_it_is_made(self):
        self.fails(self.trace(outputs=[77]), "value 77 is used before")

    def test_the_wrong_number_of_arguments(self):
        step = {"op": "aten::relu", "overload": "", "args": [], "results": [{"value": 1}]}
        self.fails(self.trace(steps=[step]), "0 arguments for a schema of 1")

    def test_an_op_that_torch_refuses_says_why_and_leaves_no_file(self):
        trace = record(lambda x, y: x @ y, [torch.ones(2, 3), torch.ones(3, 2)]).trace
        trace["inputs"][1]["sizes"] = [5, 2]
        path = os.path.join(self.folder, "failed.pt2")
        with self.assertRaisesRegex(Exception, "same reduction dim"):
            reprise_compiler.compile(json.dumps(trace), path)
        self.assertEqual(os.listdir(self.folder), [])


if __name__ == "__main__":
    unittest.main()
