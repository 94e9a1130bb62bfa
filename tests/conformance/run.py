"""Runs PyTorch's own OpInfo samples through the lazy device, and compares with the CPU.

    python tests/conformance/run.py --library build/release/lib/libreprise.so

Every op of `op_db`, for every dtype that the CPU supports: forward, in place where
there is such a variant, with `out=` where it is taken, backward for float32 and
float64, and the samples that must be errors. Each call is made on copies of the same
arguments on both devices. Values, geometry, what shares memory, changed arguments,
gradients, errors and the state of the random number generator must be the same.

Calls run in worker processes. One that crashes, or takes too long, is a difference.
The last line is `N ops, M samples, F differences, E listed exceptions`, and the exit
status is 1 where F is not zero.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from exceptions import ListedException, read_exceptions  # noqa: E402
from opinfo import COMPILED_DTYPES, FORWARD, KINDS, Group, groups_of, select_ops  # noqa: E402
import values  # noqa: E402
from ways import COMPILED, INTERPRETED, RECORDED, WAYS, Difference  # noqa: E402

UNITS_OF_A_WORKER = 400  # what it has allocated and registered goes with it

# Where the first samples to be compiled are sought. Many an op's first ones do nothing:
# a dropout with p=0, say.
SCOUTED_SAMPLES = 12

# What options of the library the three ways need.
ENVIRONMENT = {
    "REPRISE_FIND_STEPS": "0",
    "REPRISE_DEMOTE": "0",
    "REPRISE_COMPILE": "0",
    "REPRISE_COMPILE_AFTER": "1",
    "REPRISE_COMPILE_NICE": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

Unit = list[Any]


class Worker:
    """A process that works on units, and where it is."""

    # The first sign of life comes after imports of many seconds.
    START_LIMIT = 120.0

    def __init__(self, options: argparse.Namespace, request: dict[str, Any],
                 environment: Mapping[str, str]) -> None:
        self.unit = -1
        self.sample = -1
        self.way = ""
        self.death = ""
        self.limit: float = request["limit"]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), options.library],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, **environment})
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.close()
        self._output = self.process.stdout.fileno()
        self._text = b""

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that it says, until it ends or a unit has taken too long."""
        deadline = time.monotonic() + self.START_LIMIT
        while True:
            try:
                message = self._message(deadline)
            except TimeoutError:
                self.process.kill()
                self.death = f"took more than {self.limit:g} seconds"
                self.process.wait()
                return
            if message is None:
                status = self.process.wait()
                self.death = (f"died of {signal.Signals(-status).name}" if status < 0
                              else f"ended with status {status}")
                return
            if "unit" in message:
                self.unit, self.sample, self.way = message["unit"], -1, ""
                deadline = time.monotonic() + self.limit
            elif "sample" in message:
                self.sample = message["sample"]
            elif "way" in message:
                self.way = message["way"]
            elif "done" in message:
                self.unit = message["done"] + 1
                yield message

    def _message(self, deadline: float) -> dict[str, Any] | None:
        while b"\n" not in self._text:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self._output], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(self._output, 1 << 16)
            if not chunk:
                return None
            self._text += chunk
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)


class Suite:
    """The run: which units there are, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ops = select_ops(options.ops, options.shard, options.share)
        self.samples = 0
        self.differences: list[Difference] = []
        self.not_compiled: list[dict[str, str]] = []
        self.not_traced: list[str] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        exact = [way for way in (RECORDED, INTERPRETED) if way in self.options.ways]
        if exact:
            self.timed("recorded and interpreted", lambda: self.exact(exact))
        if COMPILED in self.options.ways:
            self.timed("compiled", self.compiled)

    def timed(self, name: str, part: Callable[[], None]) -> None:
        begun = time.monotonic()
        part()
        self.seconds[name] = time.monotonic() - begun

    def drive(self, mode: str, units: list[Unit], on_done: Callable[[Unit, dict], None],
              on_death: Callable[[Unit, Worker], list[Unit]], *, ways: Sequence[str] = (),
              samples: int = 0, limit: float = 0,
              environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Has workers do the units. Where one dies, `on_death` gives what is to be done
        instead of the unit in which it died."""
        while units:
            batch, rest = units[:UNITS_OF_A_WORKER], units[UNITS_OF_A_WORKER:]
            request = {"mode": mode, "units": batch, "ways": list(ways), "samples": samples,
                       "wanted": self.options.compiled_samples,
                       "limit": limit or self.options.limit}
            worker = Worker(self.options, request, environment)
            for message in worker.messages():
                on_done(batch[message["done"]], message)
            if worker.unit < 0:
                sys.exit(f"a worker {worker.death} before it began; --verbose shows what it says")
            if worker.unit < len(batch):
                again = on_death(batch[worker.unit], worker)
                rest = again + batch[worker.unit + 1 :] + rest
            units = rest

    # The recorded and the interpreted way.

    def exact(self, ways: list[str]) -> None:
        groups = [group for op in self.ops
                  for group in groups_of(op, self.options.kinds, self.options.dtypes)]

        def on_done(unit: Unit, message: dict[str, Any]) -> None:
            if message["unsampled"]:
                self.notes.append(f"{Group(*unit)}: no samples: {message['unsampled']}")
            self.take(message)

        def on_death(unit: Unit, worker: Worker) -> list[Unit]:
            self.take_death(Group(*unit), worker.sample, worker.way or ways[0], worker)
            return []

        self.drive("exact", [as_unit(group) for group in groups], on_done, on_death,
                   ways=ways, samples=self.options.samples)

    # The compiled way.

    def compiled(self) -> None:
        chosen = [dtype for dtype in COMPILED_DTYPES
                  if not self.options.dtypes or dtype in self.options.dtypes]
        groups = [group for op in self.ops for group in groups_of(op, [FORWARD], chosen)
                  if chosen]
        traced: list[Unit] = []

        def on_scouted(unit: Unit, message: dict[str, Any]) -> None:
            traced.extend([*unit, sample] for sample in message["traced"])
            if not message["traced"]:
                self.not_traced.append(str(Group(*unit)))

        # What dies there has died, and was reported, in the recorded way.
        self.drive("scout", [as_unit(group) for group in groups], on_scouted,
                   lambda unit, worker: [], samples=SCOUTED_SAMPLES)

        size = self.options.batch
        batches = [traced[k : k + size] for k in range(0, len(traced), size)]

        def on_death(batch: Unit, worker: Worker) -> list[Unit]:
            if len(batch) > 1:
                return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            self.take_death(Group(*batch[0][:3]), batch[0][3], COMPILED, worker)
            return []

        self.drive("compiled", batches, lambda unit, message: self.take(message), on_death,
                   limit=self.options.compile_limit,
                   environment={"REPRISE_COMPILE": "1", "REPRISE_CACHE_DIR": self.options.cache})

    # What was found.

    def take(self, message: dict[str, Any]) -> None:
        self.samples += message["samples"]
        found = [Difference(**each) for each in message["differences"]]
        self.differences += found
        for each in message.get("not_compiled", []):
            self.not_compiled.append(each)
            print(f"not compiled: {each['call']}: {each['reason']}", flush=True)
        faults = [each for each in found if not self.exceptions_for(each)]
        shown = faults if self.options.every else faults[:2]
        for each in shown:
            print(each, flush=True)
        if len(shown) < len(faults):
            print(f"    and {len(faults) - len(shown)} more samples of it", flush=True)

    def take_death(self, group: Group, sample: int, way: str, worker: Worker) -> None:
        found = Difference(group.name, group.kind, group.dtype, sample, way,
                           f"the process {worker.death}")
        self.take({"samples": 1, "differences": [found.as_dict()]})

    def exceptions_for(self, found: Difference) -> list[ListedException]:
        return [each for each in self.options.listed if each.covers(found)]

    def finish(self) -> int:
        """The closing lines and the report; the exit status."""
        faults = [each for each in self.differences if not self.exceptions_for(each)]
        listed = {listed for each in self.differences for listed in self.exceptions_for(each)}
        for note in self.notes:
            print(f"note: {note}")
        if self.options.report:
            self.options.report.write_text(json.dumps({
                "ops": len(self.ops), "samples": self.samples,
                "differences": [each.as_dict() for each in faults],
                "listed_exceptions": [each.line for each in listed],
                "not_compiled": self.not_compiled, "not_traced": self.not_traced,
                "notes": self.notes, "seconds": self.seconds}, indent=1))
        if COMPILED in self.options.ways:
            names = {each["call"].split()[0] for each in self.not_compiled}
            print(f"{len(names)} ops not compiled")
        print(f"{len(self.ops)} ops, {self.samples} samples, {len(faults)} differences, "
              f"{len(listed)} listed exceptions")
        return 1 if faults else 0


def as_unit(group: Group) -> Unit:
    return [group.op_index, group.kind, group.dtype]


def parse_shard(text: str) -> tuple[int, int]:
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError("I/N with 1 <= I <= N")
    return index, count


def parse_share(text: str) -> int:
    one, _, count = text.partition("/")
    if one != "1" or int(count) < 1:
        raise argparse.ArgumentTypeError("1/k, for every k-th op")
    return int(count)


def parse_names(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(allowed)}")
        return names

    return parse


def parse_dtypes(text: str) -> list[str]:
    return [] if text == "all" else text.split(",")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, metavar="PATH", help="libreprise.so")
    parser.add_argument("--ops", default="*", metavar="GLOB",
                        help="ops by full name, such as linalg.* or norm.nuc")
    parser.add_argument("--share", type=parse_share, default=1, metavar="1/k",
                        help="every k-th op only: a fixed part for a short run")
    parser.add_argument("--shard", type=parse_shard, default=(1, 1), metavar="I/N",
                        help="the I-th of N parts, for N processes")
    parser.add_argument("--dtypes", type=parse_dtypes, default=[], metavar="all|NAME,...",
                        help="of those that the op supports (default: all)")
    parser.add_argument("--kinds", type=parse_names(KINDS), default=list(KINDS),
                        metavar="NAME,...", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--ways", type=parse_names(WAYS), default=list(WAYS),
                        metavar="NAME,...", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--samples", type=int, default=0, metavar="N",
                        help="most for an op, dtype and kind (default: all)")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS",
                        help="for an op, dtype and kind (default: 120)")
    parser.add_argument("--compiled-samples", type=int, default=2, metavar="N",
                        help="to compile for an op and dtype: the first that are steps of one "
                        "segment (default: 2)")
    parser.add_argument("--batch", type=int, default=40, metavar="N",
                        help="calls in a compiled segment (default: 40)")
    parser.add_argument("--compile-limit", type=float, default=900, metavar="SECONDS",
                        help="for a compiled segment and the search for calls that cannot be "
                        "compiled (default: 900)")
    parser.add_argument("--cache", default="", metavar="FOLDER",
                        help="for compiled artifacts (default: the library's own)")
    parser.add_argument("--exceptions", type=Path, default=HERE / "exceptions.txt",
                        metavar="FILE", help="listed exceptions")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write all findings here")
    parser.add_argument("--every", action="store_true",
                        help="print every differing sample, not two of a kind")
    parser.add_argument("--verbose", action="store_true", help="let workers print")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="the backing device, with whose eager results ours are compared")
    options = parser.parse_args()
    options.library = os.path.abspath(options.library)
    values.EAGER = os.environ["REPRISE_BACKING"] = options.device  # the workers' too
    options.listed = read_exceptions(options.exceptions)
    return options


def main() -> int:
    suite = Suite(parse_arguments())
    suite.run()
    return suite.finish()


if __name__ == "__main__":
    sys.exit(main())
