#!/usr/bin/env python3
"""Runs the benchmarks, prints one table of them, and writes a report.

    report.py --bin BUILD/bin FOLDER

FOLDER gets table.md, table.json and report.html, one page with bar charts and
nothing to load. Each benchmark runs in a process of its own; the peer, the lazy
tensor core's TorchScript backend, has to, since it claims the same device.
"""

import argparse
import dataclasses
import datetime
import html
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from typing import Optional


RELATIVE_TOLERANCE = 1e-5  # torch::allclose's default


class BenchmarkFailed(Exception):
    pass


def run_benchmark(program, environment):
    """Runs a Google Benchmark program; returns its context and its rows by name."""
    print(f"running {program.name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "result.json"
        command = [program, f"--benchmark_out={output}", "--benchmark_out_format=json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                row = line.split(maxsplit=1)
                if row and "/" in row[0] and not line.startswith("Running"):
                    print(f"  {row[0]}", file=sys.stderr, flush=True)
        if process.returncode != 0 or not output.exists():
            raise BenchmarkFailed(f"{program} exited with {process.returncode}")
        result = json.loads(output.read_text(encoding="utf-8"))
    return result["context"], {row["name"]: row for row in result["benchmarks"]}


@dataclasses.dataclass
class ModelRow:
    """A model in a mode, as bench_models measured it and, if it could, the peer."""

    model: str
    mode: str
    eager_ms: Optional[float] = None
    reprise_ms: Optional[float] = None
    speedup: Optional[float] = None
    max_rel_diff: Optional[float] = None
    disturbed_diff: Optional[float] = None
    programs: Optional[int] = None
    compiled: Optional[float] = None
    compared_compiled: Optional[float] = None
    first_compiled_step_s: Optional[float] = None
    ltc_speedup: Optional[float] = None
    error: Optional[str] = None
    ltc_error: Optional[str] = None

    @property
    def name(self):
        return f"{self.model}/{self.mode}"

    @property
    def is_right(self):
        """Whether Reprise's numbers are eager's within the tolerance of torch::allclose, or,
        where the model magnifies rounding (a ReLU's gate that flips), within twice what
        eager's own change when its inputs and parameters change in the last place."""
        return (
            self.max_rel_diff <= RELATIVE_TOLERANCE
            or self.max_rel_diff <= 2 * self.disturbed_diff
        )


@dataclasses.dataclass
class OverheadRow:
    """A way to run the chain of 100 tiny ops."""

    name: str
    us_per_op: Optional[float]
    vs_eager: Optional[float]


def model_rows(measured, peer):
    rows = []
    for name, result in measured.items():
        model, mode = name.split("/")
        row = ModelRow(model, mode, error=result.get("error_message"))
        for field in dataclasses.fields(row):
            if field.name in result:
                setattr(row, field.name, result[field.name])
        row.programs = None if row.programs is None else round(row.programs)
        row.ltc_speedup = peer.get(name, {}).get("speedup")
        row.ltc_error = peer.get(name, {}).get("error_message")
        rows.append(row)
    return rows


def overhead_rows(measured, peer):
    rows = [*measured.items(), *((n, r) for n, r in peer.items() if n.startswith("chain100/"))]
    return [OverheadRow(n, r.get("us_per_op"), r.get("vs_eager")) for n, r in rows]


def geometric_mean(values):
    values = [v for v in values if v]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def processor():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def number(value, digits=3):
    """Writes a number with some significant digits, or a dash for none."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def difference(value):
    return "–" if value is None else f"{value:.1e}"


def ratio(value):
    return "–" if value is None else f"{value:.2f}×"


MODEL_HEADER = [
    "model", "mode", "eager, ms", "Reprise, ms", "speedup", "difference",
    "eager disturbed", "programs", "first compiled step, s", "LTC speedup",
]  # fmt: skip


def model_cells(row):
    return [
        row.model,
        row.mode,
        number(row.eager_ms),
        number(row.reprise_ms) if row.error is None else "failed",
        ratio(row.speedup),
        difference(row.max_rel_diff),
        difference(row.disturbed_diff),
        "–" if row.programs is None else str(row.programs),
        number(row.first_compiled_step_s),
        ratio(row.ltc_speedup),
    ]


OVERHEAD_HEADER = ["chain of 100 ops", "µs an op", "against eager"]


def overhead_cells(row):
    return [row.name, number(row.us_per_op), ratio(row.vs_eager)]


def markdown_table(header, rows, text_columns):
    """Lays a table out so that it reads well unrendered too: numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        padded = (
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if i < text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def summary(report):
    mean = ratio(report["geometric_mean_speedup"])
    machine = report["machine"]
    return (
        f"Geometric mean of the speedups {mean}; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} thread(s) an op, backing device {machine['backing_device']}, "
        f"{machine['date']}."
    )


def markdown(models, overheads, report):
    return "\n\n".join(
        [
            markdown_table(MODEL_HEADER, list(map(model_cells, models)), text_columns=2),
            markdown_table(OVERHEAD_HEADER, list(map(overhead_cells, overheads)), text_columns=1),
            summary(report),
        ]
    )


def bar_chart(title, rows, series, written, reference=None):
    """Draws horizontal bars as SVG: `rows` are (label, a value or None for each of `series`).

    `written` turns a value into text; `reference` is where a dashed line goes.
    """
    label_width, plot_width, value_width, bar, gap, top = 170, 440, 90, 12, 10, 8
    values = [v for _, vs in rows for v in vs if v is not None and math.isfinite(v)]
    if not values:
        return ""
    scale = plot_width / max([*values, reference or 0])
    row_height = bar * len(series) + gap
    height = top + row_height * len(rows)
    parts = []
    for r, (label, row_values) in enumerate(rows):
        y = top + r * row_height
        middle = y + bar * len(series) / 2
        parts.append(
            f'<text x="{label_width - 8}" y="{middle:.1f}" class="label">{html.escape(label)}</text>'
        )
        for s, value in enumerate(row_values):
            if value is None or not math.isfinite(value):
                continue
            width = max(1.0, value * scale)
            bar_y = y + s * bar
            parts.append(
                f'<rect x="{label_width}" y="{bar_y}" width="{width:.1f}" height="{bar - 2}" '
                f'class="series{s}"/>'
                f'<text x="{label_width + width + 5:.1f}" y="{bar_y + bar / 2 - 1:.1f}" '
                f'class="value">{written(value)}</text>'
            )
    if reference is not None:
        x = label_width + reference * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" class="reference"/>')
    legend = "".join(
        f'<span class="key series{s}"></span>{html.escape(name)} ' for s, name in enumerate(series)
    )
    width = label_width + plot_width + value_width
    return (
        f"<h2>{html.escape(title)}</h2><p>{legend}</p>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #6b7685; --line: #d6dbe2;
        --first: #2f6fde; --second: #e08a2c; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --quiet: #93a0b1; --line: #333d4a; --paper: #14181e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--quiet); font-weight: 600; }
.text { text-align: left; }
.wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--ink); dominant-baseline: middle; }
svg .label { text-anchor: end; }
svg .value { fill: var(--quiet); font-size: 10px; }
.series0 { fill: var(--first); background: var(--first); }
.series1 { fill: var(--second); background: var(--second); }
.reference { stroke: var(--quiet); stroke-dasharray: 3 3; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 .8em; }
"""


def html_table(header, rows, text_columns):
    def line(cells, tag):
        return "<tr>" + "".join(
            f"<{tag}{' class=text' if i < text_columns else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(header, "th")}{body}</table></div>'


def html_page(models, overheads, report):
    charts = [
        bar_chart(
            "Speedup over eager (eager is the dashed line)",
            [(row.name, (row.speedup, row.ltc_speedup)) for row in models],
            ("Reprise", "lazy tensor core, TorchScript backend"),
            ratio,
            reference=1.0,
        ),
        bar_chart(
            "Cost of an op in proportion to eager's (dashed line): a chain of 100 tiny ops",
            [(row.name, (row.vs_eager,)) for row in overheads],
            ("time in proportion to eager's",),
            ratio,
            reference=1.0,
        ),
        bar_chart(
            "From the first step to the end of the first compiled one",
            [(row.name, (row.first_compiled_step_s,)) for row in models],
            ("seconds",),
            number,
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Reprise: benchmarks</title><style>{STYLE}</style></head><body>"
        f"<h1>Reprise: benchmarks</h1><p>{html.escape(summary(report))}</p>"
        + html_table(MODEL_HEADER, list(map(model_cells, models)), text_columns=2)
        + "".join(charts)
        + html_table(OVERHEAD_HEADER, list(map(overhead_cells, overheads)), text_columns=1)
        + "</body></html>\n"
    )


def finite(value):
    """Puts None where JSON has no word: for nan and the infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the report goes")
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="where the benchmarks are")
    parser.add_argument("--threads", type=int, default=1, help="threads that an op may use")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on timing a row")
    parser.add_argument(
        "--artifacts", type=pathlib.Path,
        help="a folder of compiled programs to begin with; without it every program is compiled")
    arguments = parser.parse_args()

    artifacts = arguments.artifacts
    if artifacts is None:
        artifacts = arguments.folder / "artifacts"
        shutil.rmtree(artifacts, ignore_errors=True)
    environment = dict(os.environ)
    environment["REPRISE_CACHE_DIR"] = str(artifacts.absolute())
    environment["REPRISE_BENCH_THREADS"] = str(arguments.threads)
    environment["REPRISE_BENCH_SECONDS"] = str(arguments.seconds)
    try:
        context, measured = run_benchmark(arguments.bin / "bench_models", environment)
        _, chain = run_benchmark(arguments.bin / "bench_overhead", environment)
    except (BenchmarkFailed, OSError) as failure:
        sys.exit(f"report: {failure}")
    try:
        _, peer = run_benchmark(arguments.bin / "bench_peer_ltc", environment)
    except (BenchmarkFailed, OSError) as failure:
        print(f"report: without the peer, since {failure}", file=sys.stderr)
        peer = {}

    models = model_rows(measured, peer)
    overheads = overhead_rows(chain, peer)
    report = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "backing_device": context.get("backing_device"),
            "date": datetime.date.today().isoformat(),
        },
        "geometric_mean_speedup": geometric_mean(row.speedup for row in models),
        "models": [dataclasses.asdict(row) for row in models],
        "overhead": [dataclasses.asdict(row) for row in overheads],
    }
    text = markdown(models, overheads, report)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (arguments.folder / "table.json").write_text(
        json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    (arguments.folder / "report.html").write_text(
        html_page(models, overheads, report), encoding="utf-8"
    )
    print(f"\n{text}\n\nwritten to {arguments.folder}: table.md, table.json, report.html")
    failed = [f"{row.name}: {row.error}" for row in models if row.error is not None]
    if failed:
        sys.exit("report: rows that failed:\n" + "\n".join(failed))
    wrong = [row.name for row in models if not row.is_right]
    if wrong:
        sys.exit("report: rows whose numbers are not eager's: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
