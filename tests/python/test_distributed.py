"""Gloo's collectives on lazy tensors, between two processes on the loopback device.

    REPRISE_LIBRARY=build/release/lib/libreprise.so python -m unittest test_distributed

From Python, since the wheel has no headers of gloo's process group; the collectives are
the same ops that C++ calls.
"""

from __future__ import annotations

import os
import socket
import unittest

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collectives(rank: int, device: str) -> list[torch.Tensor]:
    """What every kind of collective leaves, in steps that repeat."""
    kept = []
    for step in range(4):
        x = (torch.arange(6.0) + 10 * rank + step).to(device)
        y = x * 2
        dist.all_reduce(y)
        dist.broadcast(x, 0)
        gathered = [torch.zeros(6, device=device) for _ in range(WORLD)]
        dist.all_gather(gathered, y + rank)
        into = torch.zeros(6 * WORLD, device=device)
        dist.all_gather_into_tensor(into, x - rank)
        part = torch.zeros(3, device=device)
        dist.scatter(part, [y[:3] + 1, y[3:] * 2] if rank == 0 else None, 0)
        work = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
        work.wait()
        message = gathered[1] + x
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            received = torch.zeros(6, device=device)
            dist.recv(received, 0)
            message = received * 3
            dist.send(message, 0)
        kept += [t.clone() for t in (x, y, *gathered, into, part, message)]
    return [t.cpu() for t in kept]


def _train(rank: int, device: str) -> list[torch.Tensor]:
    """Data parallel by hand: gradients are averaged between backward and step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    data = torch.Generator().manual_seed(rank)
    for _ in range(6):
        x = torch.randn(5, 4, generator=data).to(device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def _worker(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), REPRISE_COMPILE="0")
    torch.ops.load_library(os.environ["REPRISE_LIBRARY"])
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        wrong = []
        for function in (_collectives, _train):
            lazy, eager = function(rank, "lazy"), function(rank, "cpu")
            wrong += [
                f"{function.__name__}, tensor {k}: {a} where eager has {b}"
                for k, (a, b) in enumerate(zip(lazy, eager, strict=True))
                if not torch.equal(a, b)
            ]
        results.put(wrong)
        dist.barrier()
    except Exception as error:  # the other process must not wait for ever
        results.put([f"rank {rank}: {type(error).__name__}: {error}"])
        raise
    finally:
        dist.destroy_process_group()


class DistributedTest(unittest.TestCase):
    def test_collectives_give_what_eager_gives(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        results = context.Queue()
        port = _free_port()
        processes = [
            context.Process(target=_worker, args=(rank, port, results)) for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        try:
            for _ in processes:
                self.assertEqual(results.get(timeout=120), [])
        finally:
            for process in processes:
                process.join(timeout=30)
                process.kill()
        for process in processes:
            self.assertEqual(process.exitcode, 0)


if __name__ == "__main__":
    unittest.main()
