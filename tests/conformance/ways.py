"""The ways in which a call can run on the lazy device: recorded; verified and
interpreted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import values
from calls import Call, Outcome, difference, error_text

RECORDED, INTERPRETED, COMPILED = "recorded", "interpreted", "compiled"
WAYS = (RECORDED, INTERPRETED, COMPILED)


@dataclass
class Difference:
    op: str
    kind: str
    dtype: str
    sample: int
    way: str
    text: str

    def __str__(self) -> str:
        return (
            f"{self.op} {self.kind} {self.dtype} sample {self.sample}, {self.way}: {self.text}"
        )

    def as_dict(self) -> dict:
        return asdict(self)


def differs(call: Call, way: str, text: str) -> Difference:
    group = call.group
    return Difference(group.name, group.kind, group.dtype, call.index, way, text)


def statistics() -> Counter[str]:
    return Counter(torch.ops.reprise.statistics())


def since(before: Counter[str]) -> Counter[str]:
    now = statistics()
    now.subtract(before)
    return now


def mark_step() -> None:
    torch.ops.reprise.mark_step()


def run_marked(call: Call) -> tuple[Outcome, Counter[str]]:
    """The call as a step of its own, and what the counters say of it."""
    execute = call.prepare("lazy")
    mark_step()
    before = statistics()
    outcome = execute()
    mark_step()
    return outcome, since(before)


def repeats_itself(call: Call, expected: Outcome) -> bool:
    """Whether eager gives the same bits again. Some kernels of LAPACK do not: their
    order of summation depends on where their memory lies."""
    occupied = []
    sizes = random.Random(0)
    for _ in range(1000):
        occupied.append(torch.empty(sizes.randrange(1, 12_000), dtype=torch.uint8))
        if difference(call, call.run(values.EAGER), expected, exact=True) is not None:
            return False
    return True


def check(call: Call, ways: list[str], on_way: Callable[[str], None]) -> Difference | None:
    """The first difference between lazy and eager. The call is made once, which
    records it, and twice more, which must verify and interpret it. `on_way` is told what
    comes next."""
    try:
        expected = call.run(values.EAGER)
    except Exception as error:  # before the call proper
        return differs(call, RECORDED, f"the suite cannot make this call: {error_text(error)}")
    torch.ops.reprise.forget_traces()
    recorded_ops = 0
    for way in (RECORDED, INTERPRETED, INTERPRETED):
        if way == INTERPRETED and INTERPRETED not in ways:
            break
        on_way(way)
        try:
            actual, did = run_marked(call)
            found = difference(call, actual, expected, exact=True)
            if found is not None and not repeats_itself(call, expected):
                found = difference(call, actual, expected, exact=False)
        except Exception as error:  # where no call of the user's would raise it
            return differs(call, way, f"outside the call, lazy raises {error_text(error)}")
        if found is not None:
            return differs(call, way, found)
        if way == RECORDED:
            recorded_ops = did["ops_recorded"]
        elif did["ops_verified"] < recorded_ops:
            return differs(
                call,
                way,
                f"not verified: {recorded_ops} ops were recorded at first, then "
                f"{did['ops_verified']} verified and {did['ops_recorded']} recorded again",
            )
    return None
