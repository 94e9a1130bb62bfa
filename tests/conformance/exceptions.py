"""The file of listed exceptions: `op_name[.variant] [kind] [dtype] [way]  # reason`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opinfo import KINDS
from ways import WAYS, Difference


@dataclass(frozen=True)
class ListedException:
    """A line of the file. What it does not name, it means all of."""

    op: str
    kind: str | None
    dtype: str | None
    way: str | None
    line: str

    def covers(self, found: Difference) -> bool:
        return (
            self.op == found.op
            and self.kind in (None, found.kind)
            and self.dtype in (None, found.dtype)
            and self.way in (None, found.way)
        )


def read_exceptions(path: Path) -> list[ListedException]:
    exceptions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words, _, reason = line.partition("#")
        if not words.strip():
            continue
        if not reason.strip():
            raise ValueError(f"{path}:{number}: an exception without a reason")
        op, *rest = words.split()
        kind = next((word for word in rest if word in KINDS), None)
        way = next((word for word in rest if word in WAYS), None)
        dtypes = [word for word in rest if word not in KINDS and word not in WAYS]
        if len(dtypes) > 1:
            raise ValueError(f"{path}:{number}: what is {dtypes[1]}?")
        dtype = dtypes[0] if dtypes else None
        exceptions.append(ListedException(op, kind, dtype, way, line.strip()))
    return exceptions
