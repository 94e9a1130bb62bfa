"""Records the op streams of small programs that mark no step.

    python record.py FOLDER [NAME...]

writes FOLDER/NAME.ops for each loop NAME, or for all of them in less than a
minute. tests/step_finder_test.cpp replays them. Needs torch; runs
on the CPU and stands for what the Lazy key sees, that is, ops below autograd.
Copies from the host and host reads are no ops there, and so none here.

A stream is text, one event a line:

    reprise-op-stream 1
    i                       an iteration of the program begins (a hint for the
                            reader of a table; the step finder does not get it)
    h STORAGE               a storage came from the host
    r STORAGE               the host reads a value of a storage
    o OP SKELETON GRAD LIVE  N (STORAGE FLAGS)*N  M (STORAGE)*M
                            an op: its id, the id of its skeleton (op, geometry
                            of the arguments, constants but for floats), grad
                            mode, the storages alive before it, its N tensor
                            arguments (flags: 1 written in place, 2 leaf that
                            requires grad), the M storages that it created
"""

import gc
import pathlib
import sys
import time
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Write arguments that their schema does not tell of.
HIDDEN_WRITES = {"aten.native_batch_norm.default": (3, 4)}  # running statistics, when training
TRAINING_ARGUMENT = 5


class Recorder(TorchDispatchMode):
    """Writes down every op on the device, except inside `host`."""

    def __init__(self):
        super().__init__()
        self.lines = ["reprise-op-stream 1"]
        self.ops = 0
        self._live = 0
        self._storages = {}  # address -> (id, weak reference)
        self._last = 0
        self._ids = {}
        self._operators = {}
        self._on_host = False

    # -- what loops say about themselves

    def iteration(self):
        self.lines.append("i")

    def host(self, make, *args, **kwargs):
        """Calls `make` on the host; what it returns is copied to the device."""
        self._on_host = True
        result = make(*args, **kwargs)
        self._on_host = False
        tensors = [*result.parameters(), *result.buffers()] if isinstance(result, nn.Module) else [result]
        for tensor in tensors:
            storage, new = self._storage(tensor)
            if new:
                self.lines.append(f"h {storage}")
        return result

    # -- bookkeeping

    def _storage(self, tensor):
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return self._storages[address][0], False
        self._last += 1
        self._live += 1
        # The Python object of a storage lives as long as the storage itself.
        self._storages[address] = self._last, weakref.ref(storage, lambda _: self._died(address))
        return self._last, True

    def _died(self, address):
        del self._storages[address]
        self._live -= 1

    def _id(self, key):
        return self._ids.setdefault(key, len(self._ids))

    def _operator(self, func):
        """Name, id, and the indices of the arguments that it writes."""
        if func not in self._operators:
            name = str(func)
            arguments = func._schema.arguments
            written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
            names = [a.name for a in arguments]
            self._operators[func] = name, self._id(name), [(i, names[i]) for i in written]
        return self._operators[func]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._on_host:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.lines.append(f"r {self._storage(args[0])[0]}")
            return func(*args, **kwargs)
        name, operator, write_arguments = self._operator(func)
        written = set()
        for index, keyword in write_arguments:
            self._add_storages(args[index] if index < len(args) else kwargs.get(keyword), written)
        if name in HIDDEN_WRITES and args[TRAINING_ARGUMENT]:
            for index in HIDDEN_WRITES[name]:
                self._add_storages(args[index], written)
        arguments, skeleton = [], [name]
        for value in leaves([*args, *kwargs.values()]):
            if isinstance(value, torch.Tensor):
                storage, _ = self._storage(value)
                leaf = value.requires_grad and value.is_leaf
                arguments.append(f"{storage} {(storage in written) + 2 * leaf}")
                skeleton.append((value.shape, value.stride(), value.storage_offset(), value.dtype))
            else:
                skeleton.append("float" if isinstance(value, float) else str(value))
        live, grad = self._live, int(torch.is_grad_enabled())
        out = func(*args, **kwargs)
        created = []
        for tensor in leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage, new = self._storage(tensor)
                if new:
                    created.append(str(storage))
        self.ops += 1
        self.lines.append(
            f"o {operator} {self._id(tuple(skeleton))} {grad} {live} "
            + " ".join([str(len(arguments)), *arguments, str(len(created)), *created])
        )
        return out

    def _add_storages(self, value, storages):
        storages.update(self._storage(tensor)[0] for tensor in leaves(value) if isinstance(tensor, torch.Tensor))


def leaves(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def main():
    sys.dont_write_bytecode = True  # keep the source folder clean
    import inference_loops  # noqa: F401
    import training_loops  # noqa: F401
    from loops import LOOPS

    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in sys.argv[2:] or LOOPS:
        start = time.time()
        torch.manual_seed(0)
        gc.disable()  # the life of a storage must not depend on when garbage is collected
        recorder = Recorder()
        with recorder:
            LOOPS[name](recorder)
        gc.enable()
        path = folder / f"{name}.ops"
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join(recorder.lines) + "\n")
        partial.rename(path)
        print(f"{name}: {recorder.ops} ops, {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
