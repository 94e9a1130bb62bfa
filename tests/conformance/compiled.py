"""The compiled way: many calls in one segment, so that one compile serves them all."""

from __future__ import annotations

import re
from typing import Any

import torch
import values
from calls import Call, Outcome, difference, error_text
from opinfo import Group
from ways import COMPILED, Difference, differs, mark_step, run_marked, since, statistics


def stays_in_a_segment(call: Call) -> bool:
    """Whether all that the call does on the lazy device is steps of one segment."""
    torch.ops.reprise.forget_traces()
    try:
        eager = call.run(values.EAGER)
        execute = call.prepare("lazy")
    except Exception:  # which the recorded way reports
        return False
    if eager.error is not None:
        return False
    mark_step()
    before = statistics()
    outcome = execute()
    ended_early = since(before)["segments_recorded"] > 0
    mark_step()
    did = since(before)
    if outcome.error is not None or ended_early or did["segments_recorded"] != 1:
        return False
    return run_marked(call)[1]["ops_verified"] == did["ops_recorded"]


def calls_of(named: list[list[Any]]) -> list[Call]:
    """Calls by op index, kind, dtype and sample."""
    calls = []
    for op_index, kind, dtype, wanted in named:
        group = Group(op_index, kind, dtype)
        for index, sample in enumerate(group.samples(wanted + 1)):
            if index == wanted:
                calls.append(Call(group, index, sample))
    return calls


class Batch:
    """Runs calls as one segment until a program has run them, and compares."""

    def __init__(self) -> None:
        self.differences: list[Difference] = []
        self.not_compiled: list[dict[str, str]] = []

    def check(self, calls: list[Call]) -> None:
        expected = [call.run(values.EAGER) for call in calls]
        torch.ops.reprise.forget_traces()
        try:
            self._run(calls)  # recorded
            self._run(calls)  # interpreted; a program is asked for
            torch.ops.reprise.wait_for_compiles()
            self._run(calls)  # the program beside the interpreter
            before = statistics()
            outcomes = self._run(calls)
            did = since(before)
        except Exception as error:
            return self._split(calls, f"raises {error_text(error)}", fault=True)
        if did["ops_recorded"] > 0:
            return self._split(calls, f"{did['ops_recorded']} ops recorded again", fault=True)
        if did["segments_replayed"] == 0 or did["segments_interpreted"] > 0:
            return self._split(calls, _reason(), fault=False)
        for call, actual, wanted in zip(calls, outcomes, expected):
            found = difference(call, actual, wanted, exact=False)
            if found is not None:
                self.differences.append(differs(call, COMPILED, found))

    @staticmethod
    def _run(calls: list[Call]) -> list[Outcome]:
        prepared = [call.prepare("lazy") for call in calls]
        mark_step()
        outcomes = [execute() for execute in prepared]
        mark_step()
        return outcomes

    def _split(self, calls: list[Call], problem: str, fault: bool) -> None:
        """Halves a batch until the calls to blame are found."""
        if len(calls) > 1:
            self.check(calls[: len(calls) // 2])
            self.check(calls[len(calls) // 2 :])
        elif fault:
            self.differences.append(differs(calls[0], COMPILED, problem))
        else:
            self.not_compiled.append({"call": calls[0].name, "reason": problem})


def _reason() -> str:
    """Why there is no program: the line of a traceback that names the error."""
    _, _, problem = torch.ops.reprise.explain().rpartition("failed: ")
    errors = re.findall(r"^\s*([\w.]+(?:Error|Exception|Unsupported)\b.*)$", problem, re.MULTILINE)
    return errors[-1] if errors else (problem.strip().splitlines() or ["no program was made"])[0]
