#!/usr/bin/env python3
"""Runs the example programs as they are, on the lazy device and on eager's.

    unmarked.py --bin BUILD/bin FOLDER

No example marks its steps, and each reads its loss every fifty. For each of them the
table says how many programs it took, how many steps were replayed once they were
compiled, the peak of tensor memory beside eager's, the time of a step beside
eager's and beside the same program with its steps marked, and how steps fared while
a compile went on. FOLDER gets unmarked.md, unmarked.json and the programs' reports.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

EXAMPLES = {
    "train_digits": [],
    "train_digits resnet": ["--model", "resnet"],
    "train_gpt": [],
    "train_gpt fused": ["--attention", "fused"],
    "train_lstm": [],
    "train_gan": [],
    "simulate_argon": [],
    "price_options": [],
}


@dataclasses.dataclass
class Row:
    program: str
    programs: int  # compiled or loaded
    segments: int  # recorded
    replayed: float  # share of the verified segments of the warm run
    peak: float  # tensor bytes against eager
    against_eager: float  # median step, eager's divided by ours
    against_marked: float  # the same for the program with marked steps
    compiling_median: float  # median step of the cold run against eager's
    compiling_worst: float
    eager_worst: float  # of as many steps of eager's, with no compile beside them
    same: bool  # logged numbers equal eager's bit for bit, interpreted


def run(binary, arguments, report, environment):
    command = [binary, *arguments, "--report", report]
    extra = {"REPRISE_REPORT": str(report) + ".reprise", **environment}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **extra})
    result = json.loads(report.read_text(encoding="utf-8"))
    own = pathlib.Path(extra["REPRISE_REPORT"])
    result["reprise"] = json.loads(own.read_text(encoding="utf-8")) if own.exists() else None
    return result


def late_median(result):
    """Median step of the second half, when what is compiled has been."""
    steps = result["step_seconds"]
    return statistics.median(steps[len(steps) // 2 :])


def while_compiling(result):
    """The steps, but for the first two, that began before the last program was compiled."""
    seconds = result["reprise"]["seconds"]
    end, now, steps = seconds["import"] + seconds["compile"], 0.0, []
    for step in result["step_seconds"]:
        if now > end:
            break
        steps.append(step)
        now += step
    return steps[2:]


def measure(name, options, arguments, folder):
    binary = arguments.bin / name.split()[0]
    stem = folder / name.replace(" ", "_")
    store = pathlib.Path(f"{stem}.artifacts")
    shutil.rmtree(store, ignore_errors=True)
    common = ["--steps", str(arguments.steps), "--log-every", "50",
              "--threads", str(arguments.threads), *options]  # fmt: skip
    cache = {"REPRISE_CACHE_DIR": str(store.absolute())}

    def once(kind, device, extra=(), environment=None):
        print(f"  {name}: {kind}", file=sys.stderr, flush=True)
        report = pathlib.Path(f"{stem}.{kind}.json").absolute()
        report.unlink(missing_ok=True)
        return run(binary, [*common, "--device", device, *extra], report, environment or {})

    eager = once("eager", arguments.eager)
    interpreted = once("interpreted", "lazy", environment={"REPRISE_COMPILE": "0"})
    # The cold runs go on until their programs are there, for the warm ones to load.
    long = ["--steps", str(arguments.cold_steps(eager))]
    cold = once("cold", "lazy", long, cache)
    eager_long = once("eager_long", arguments.eager, long)
    once("marked_cold", "lazy", ["--mark-steps", *long], cache)
    # In turns: what slows the machine for a while slows all three.
    rounds = [
        (
            once("eager", arguments.eager),
            once("warm", "lazy", environment=cache),
            once("marked", "lazy", ["--mark-steps"], cache),
        )
        for _ in range(arguments.rounds)
    ]
    eager_step, warm_step, marked_step = (
        statistics.median(late_median(result) for result in kind) for kind in zip(*rounds)
    )
    eager, warm, _ = rounds[-1]

    counts = warm["reprise"]["statistics"]
    segments = counts["segments_replayed"] + counts["segments_interpreted"]
    peak = "peak_cpu_tensor_bytes" if arguments.eager == "cpu" else "peak_accelerator_tensor_bytes"
    return Row(
        program=name,
        programs=counts["programs_loaded"] + counts["programs_compiled"],
        segments=counts["segments_recorded"],
        replayed=counts["segments_replayed"] / segments if segments else 0.0,
        peak=warm[peak] / eager[peak],
        against_eager=eager_step / warm_step,
        against_marked=marked_step / warm_step,
        compiling_median=statistics.median(while_compiling(cold)) / eager_step,
        compiling_worst=max(cold["step_seconds"][2:]) / eager_step,
        eager_worst=max(eager_long["step_seconds"][2:]) / eager_step,
        same=interpreted["log"] == eager["log"],
    )


HEADER = ["program", "programs", "segments", "replayed", "peak memory", "against eager",
          "against marked", "median while compiling", "worst", "eager's worst", "same bits"]  # fmt: skip


def cells(row):
    return [
        row.program, str(row.programs), str(row.segments), f"{row.replayed:.0%}",
        f"{row.peak:.2f}×", f"{row.against_eager:.2f}×", f"{row.against_marked:.2f}×",
        f"{row.compiling_median:.2f}×", f"{row.compiling_worst:.1f}×",
        f"{row.eager_worst:.1f}×", "yes" if row.same else "no",
    ]  # fmt: skip


def table(rows):
    lines = [HEADER, ["-" * len(h) for h in HEADER], *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the report goes")
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="where the examples are")
    parser.add_argument("--eager", default="cpu", help="eager's device: cpu or cuda")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the timed runs")
    parser.add_argument("--only", default="", help="examples whose names contain this")
    parser.add_argument("--compile-seconds", type=float, default=60.0,
                        help="how long the first run lasts, for its programs to be compiled")
    arguments = parser.parse_args()
    arguments.cold_steps = lambda eager: max(
        arguments.steps, round(arguments.compile_seconds / late_median(eager)))

    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [
        measure(name, options, arguments, arguments.folder)
        for name, options in EXAMPLES.items()
        if arguments.only in name
    ]
    (arguments.folder / "unmarked.md").write_text(table(rows) + "\n", encoding="utf-8")
    (arguments.folder / "unmarked.json").write_text(
        json.dumps([dataclasses.asdict(row) for row in rows], indent=2), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
