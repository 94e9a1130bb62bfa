"""Works on units of calls, as told on standard input, and says on standard output
where it is, so that whoever started it knows where it ended, however it ended.

Both are lines of JSON. In: {"mode": ..., "units": [...], "ways": [...], "samples": most
of a unit, "wanted": most that a scout is to find}. Out, for each unit: {"unit": n}, any
number of {"sample": index} and {"way": name}, and {"done": n, ...}. A unit is

- in mode `exact`: [op index, kind, dtype], to be compared in the recorded and the
  interpreted way;
- in mode `scout`: the same, to be asked which samples are steps of one segment;
- in mode `compiled`: a list of [op index, kind, dtype, sample], to be compiled at once.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from calls import Call
from compiled import Batch, calls_of, stays_in_a_segment
from opinfo import Group
from ways import check


class Reporter:
    """Writes to what was standard output, which goes to standard error from now on:
    ops under test may print."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def __call__(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")


class Worker:
    def __init__(self, report: Reporter, request: dict[str, Any]) -> None:
        self.report = report
        self.most_samples: int = request["samples"]
        self.ways: list[str] = request["ways"]
        self.wanted: int = request["wanted"]
        self.unsampled: str | None = None

    def calls(self, unit: list[Any]) -> Iterator[Call]:
        """The samples of a group; says which one is next."""
        self.unsampled = None
        group = Group(*unit)
        samples = enumerate(group.samples(self.most_samples))
        while True:
            try:
                index, sample = next(samples)
            except StopIteration:
                return
            except Exception as error:  # of OpInfo's own making, on the CPU
                self.unsampled = f"{type(error).__name__}: {error}"
                return
            self.report(sample=index)
            yield Call(group, index, sample)

    def exact(self, unit: list[Any]) -> dict[str, Any]:
        differences, count = [], 0
        for call in self.calls(unit):
            count += 1
            if (found := check(call, self.ways, self.begin_way)) is not None:
                differences.append(found.as_dict())
        return {"samples": count, "differences": differences, "unsampled": self.unsampled}

    def begin_way(self, way: str) -> None:
        self.report(way=way)

    def scout(self, unit: list[Any]) -> dict[str, Any]:
        fit = (call.index for call in self.calls(unit) if stays_in_a_segment(call))
        return {"traced": list(itertools.islice(fit, self.wanted))}

    def compiled(self, unit: list[list[Any]]) -> dict[str, Any]:
        batch = Batch()
        batch.check(calls_of(unit))
        return {
            "samples": len(unit),
            "differences": [found.as_dict() for found in batch.differences],
            "not_compiled": batch.not_compiled,
        }


def main() -> None:
    report = Reporter()
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    request = json.loads(sys.stdin.readline())
    worker = Worker(report, request)
    work = getattr(worker, request["mode"])
    for number, unit in enumerate(request["units"]):
        report(unit=number)
        report(done=number, **work(unit))


if __name__ == "__main__":
    main()
