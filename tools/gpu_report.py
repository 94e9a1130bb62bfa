"""What tools/gpu_check.sh has found, as one JSON file and one Markdown table.

    python tools/gpu_report.py OUT
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, str]:
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["gpu"] = "none"
    return found


def tests(out: Path) -> dict[str, Any]:
    counts = {"passed": 0, "skipped": 0, "failed": []}
    for log in out.glob("test-*.log"):
        text = log.read_text(errors="replace")
        counts["passed"] += len(re.findall(r"^\[       OK \]", text, re.M))
        counts["skipped"] += len(re.findall(r"^\[  SKIPPED \] \S+ \(", text, re.M))
        counts["failed"] += re.findall(r"^\[  FAILED  \] (\S+) \(\d+ ms\)", text, re.M)
        # A test that never ended: a crash, or the time limit.
        started = re.findall(r"^\[ RUN      \] (\S+)", text, re.M)
        if started and not re.search(rf"^\[ .*\] {re.escape(started[-1])} \(", text, re.M):
            counts["failed"].append(started[-1] + " (did not end)")
    return counts


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def rows(path: Path) -> dict[str, dict[str, float]]:
    try:
        return {row["name"]: row for row in json.loads(path.read_text())["benchmarks"]}
    except (OSError, json.JSONDecodeError, KeyError):
        return {}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(), "parts": {}}
    for status in sorted(out.glob("*.status")):
        code, seconds = status.read_text().split()
        found["parts"][status.stem] = {"status": int(code), "seconds": int(seconds)}
    found["tests"] = tests(out)
    for kind in ("fuzz", "conformance"):
        found[kind] = {log.stem: last_line(log) for log in sorted(out.glob(f"{kind}-*.log"))}
    if (out / "sanitize.log").exists():
        found["sanitize"] = last_line(out / "sanitize.log")
    found["bench"] = {name: rows(out / f"{name}.json")
                      for name in ("bench-models", "bench-models-without-graphs", "bench-functions")}
    try:
        found["peers"] = json.loads((out / "peers.json").read_text())["rows"]
    except (OSError, json.JSONDecodeError, KeyError):
        found["peers"] = {}
    return found


COLUMNS = ("eager ms", "reprise ms", "speedup", "without graphs", "host ms", "eager queued ms",
           "reprise queued ms", "function ms", "function host us", "torch.compile ms", "reduce-overhead ms")


def timings(found: dict[str, Any]) -> list[str]:
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    speedups, over_peer = [], []
    for name, row in found["bench"]["bench-models"].items():
        if "speedup" not in row:
            continue
        plain = found["bench"]["bench-models-without-graphs"].get(name, {})
        function = found["bench"]["bench-functions"].get("zoo/" + name, {})
        peer = found["peers"].get(name, {})
        us_per_call = function.get("us_per_call")
        numbers = (
            row["eager_ms"], row["reprise_ms"], row["speedup"], plain.get("speedup"), row.get("host_ms"),
            row.get("eager_queued_ms"), row.get("reprise_queued_ms"),
            None if us_per_call is None else us_per_call / 1e3, function.get("host_us"),
            peer.get("default_ms"), peer.get("reduce-overhead_ms"),
        )
        lines.append(f"| {name} |" + "".join(" – |" if n is None else f" {n:.3g} |" for n in numbers))
        speedups.append(row["speedup"])
        if "reduce-overhead_ms" in peer:
            over_peer.append(peer["reduce-overhead_ms"] / row["reprise_ms"])
    if speedups:
        lines += ["", f"Speedup over eager: geometric mean {statistics.geometric_mean(speedups):.2f}, "
                      f"lowest {min(speedups):.2f}."]
    if over_peer:
        lines.append(f"Over torch.compile's reduce-overhead: geometric mean {statistics.geometric_mean(over_peer):.2f} "
                     f"of {len(over_peer)} rows.")
    return lines


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Reprise on a GPU", "", " · ".join(f"{k}: {v}" for k, v in found["machine"].items()), ""]
    counts = found["tests"]
    lines += [f"Tests: {counts['passed']} passed, {counts['skipped']} skipped, "
              f"{len(counts['failed'])} failed." + "".join(f"\n- {name}" for name in counts["failed"]), ""]
    for kind in ("fuzz", "conformance"):
        lines += [f"- {name}: `{line}`" for name, line in found[kind].items()]
    if "sanitize" in found:
        lines.append(f"- compute-sanitizer: `{found['sanitize']}`")
    lines += ["", *timings(found)]
    lines += ["", "| part | status | seconds |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {p['status']} | {p['seconds']} |" for name, p in found["parts"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    out = Path(sys.argv[1])
    found = report(out)
    (out / "gpu_check.json").write_text(json.dumps(found, indent=1))
    (out / "gpu_check.md").write_text(markdown(found))
    print(markdown(found))
    clean = not found["tests"]["failed"] and all(p["status"] == 0 for p in found["parts"].values())
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
