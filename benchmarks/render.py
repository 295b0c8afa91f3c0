"""The table and the figure of a benchmark, from its numbers.

    .venv/bin/python benchmarks/render.py benchmarks/results/cpu.json

Nothing in them is written by hand: the text beside the tables is made here too, and
holds what the page of the book says of machine, versions, date and outcome.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from _style import PALETTE, SIZES, style_ax

OURS, STEP, CHAIN = "gauss_flows fit", "gauss_flows step", "flowjax Chain"
TORCH = ("zuko", "nflows", "normflows")
LOOK = {
    OURS: {"color": PALETTE["model"], "marker": "o", "lw": 2.4},
    STEP: {"color": PALETTE["model"], "marker": "o", "ls": ":", "mfc": "white"},
    "flowjax Scan": {"color": PALETTE["data"], "marker": "s", "ls": "--"},
    CHAIN: {"color": PALETTE["data"], "marker": "s"},
    "zuko": {"color": PALETTE["base"], "marker": "^"},
    "nflows": {"color": PALETTE["spline"], "marker": "v"},
    "normflows": {"color": PALETTE["affine"], "marker": "D"},
}
WAYS = {"step": "training step", "density": "density", "sample": "sampling"}

Rows = list[dict[str, Any]]


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write numbers, table and figure into ``folder``; returns the file of numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    device = result["machine"]["device"].lower().replace(" ", "-")
    on_cpu = result["machine"]["kind"] == "cpu"
    path = folder / f"{'cpu' if on_cpu else f'gpu-{device}'}.json"
    path.write_text(as_json(result))
    from_file(path)
    return path


def from_file(path: Path) -> None:
    """Make the table and the figure beside a file of numbers anew."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(result))
    draw(result, path.with_suffix(".svg"))


def as_json(result: dict[str, Any]) -> str:
    """The numbers with four digits, one line a cell."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    parts = []
    for key, value in short(result).items():
        if key in ("cells", "seeds"):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f'"{key}": [\n{rows}\n]')
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def pick(result: dict[str, Any], **wanted: Any) -> Rows:
    """The cells with these settings, in the order of ``LOOK``, then of depth."""
    found = [c for c in result["cells"] if all(c[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda c: ([*LOOK].index(c["library"]), c["depth"]))


def median(cell: dict[str, Any], way: str) -> float:
    """Median seconds, or NaN where there are none."""
    times = cell.get(way)
    return float(np.median(times)) if times and not isinstance(times, str) else np.nan


def table(result: dict[str, Any]) -> str:
    """Everything that the page includes, as MyST."""
    parts = (origin, headline, ratios, seeds, everything)
    return "\n\n".join(part(result) for part in parts) + "\n"


def origin(result: dict[str, Any]) -> str:
    """Machine, versions and date."""
    about, versions = result["machine"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    device = "" if about["kind"] == "cpu" else f"{about['device']}; "
    return (
        f"Measured on {result['date']} in {result['seconds'] / 60:.0f} minutes, at "
        f"commit `{result['commit']}`, on: {device}{about['processor']}, "
        f"{about['cores']} cores, "
        f"{about['memory_bytes'] / 2**30:.0f} GiB of memory, {about['system']}.\n"
        f"Versions: {named}."
    )


def headline(result: dict[str, Any]) -> str:
    """The setting of the chapters, in both dtypes, and its ratios."""
    parts = []
    for dtype in ("float32", "float64"):
        rows = pick(result, depth=8, dim=2, batch=512, dtype=dtype)
        if not rows:
            continue
        base = median(rows[0], "step")
        head = (
            ":::{table} " + f"Eight blocks in the plane, 512 rows, {dtype}. Times are "
            "medians, with quartiles for a step; the last column is the step's time "
            "over that of `fit`.\n"
            f":name: tab-benchmark-{result['machine']['kind']}-{dtype}\n\n"
            "| library | parameters | step, ms | density, ms | sampling, ms | "
            "compile, s | peak, MB | XLA's, MB | ratio |\n"
            "|:--|--:|--:|--:|--:|--:|--:|--:|--:|\n"
        )
        parts.append(sentence(rows, dtype))
        parts.append(head + "\n".join(_row(row, base) for row in rows) + "\n:::")
    return "\n\n".join(parts)


def sentence(rows: Rows, dtype: str) -> str:
    """What the headline's medians say, whoever wins."""
    time = {row["library"]: median(row, "step") for row in rows}
    torch = {name: time[name] for name in TORCH if name in time}
    if any(np.isnan([time[OURS], time[STEP], time[CHAIN], *torch.values()])):
        return f"In {dtype} not every library could be measured."
    best = min(torch, key=lambda name: torch[name])
    said = (
        f"In {dtype} a step of `fit` takes {1e3 * time[OURS]:.2f} ms. flowjax's "
        f"`Chain`, stepped from a loop, takes {time[CHAIN] / time[OURS]:.1f} times as "
        f"long, and {best}, the fastest of the three in PyTorch, "
        f"{torch[best] / time[OURS]:.1f} times. From a loop as well, our step takes "
        f"{1e3 * time[STEP]:.2f} ms, and `Chain` {time[CHAIN] / time[STEP]:.1f} times "
        "as long."
    )
    won = []
    for way, name in WAYS.items():
        times = _times(rows, way)
        first = min(times, key=lambda library: times[library])
        if not first.startswith("gauss_flows"):
            won.append(f"{name} ({first})")
    if won:
        return f"{said} A peer is the fastest at: {', '.join(won)}."
    return f"{said} No peer is faster at a step, a density or a sample here."


def _times(rows: Rows, way: str) -> dict[str, float]:
    times = {row["library"]: median(row, way) for row in rows}
    return {name: t for name, t in times.items() if not np.isnan(t)}


def _row(row: dict[str, Any], base: float) -> str:
    step = median(row, "step")
    if np.isnan(step):
        return f"| {row['library']} | | {_reason(row)} | | | | | | |"
    low, high = (_ms(np.quantile(row["step"], q)) for q in (0.25, 0.75))
    compiled = "none" if row["library"] in TORCH else f"{row['compile_seconds']:.1f}"
    temp = f"{row['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in row else ""
    return (
        f"| {row['library']} | {row['parameters']:,} | {_ms(step)}\N{NO-BREAK SPACE}"
        f"({low}\N{EN DASH}{high}) | {_shown(row, 'density')} | "
        f"{_shown(row, 'sample')} | {compiled} | {row['peak_bytes'] / 1e6:.0f} | "
        f"{temp} | {step / base:.2f} |"
    )


def _shown(row: dict[str, Any], way: str) -> str:
    """Milliseconds, or why there are none."""
    time = median(row, way)
    return _reason(row, way) if np.isnan(time) else _ms(time)


def _ms(seconds: float) -> str:
    """Milliseconds, without an exponent."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.9995 else f"{1e3 * seconds:.3g}"


def _reason(row: dict[str, Any], way: str = "step") -> str:
    return row[way] if isinstance(row.get(way), str) else ""


def ratios(result: dict[str, Any], depth: int = 8) -> str:
    """A step of each peer over one of ``fit``, in all settings."""
    peers = [name for name in LOOK if name not in (OURS, STEP)]
    lines = []
    for dim, batch, dtype in settings(result):
        cells = pick(result, depth=depth, dim=dim, batch=batch, dtype=dtype)
        rows = {row["library"]: row for row in cells}
        if OURS not in rows:
            continue
        ours = median(rows[OURS], "step")
        over = [_over(rows[name], ours) if name in rows else "" for name in peers]
        shown = [str(dim), f"{batch:,}", dtype, _shown(rows[OURS], "step"), *over]
        lines.append(f"| {' | '.join(shown)} |")
    return (
        f":::{{table}} Times of a training step over that of `fit`, {depth} blocks. "
        "Below 1 the peer is faster; where `fit` has no time, the peer's own is in "
        "parentheses.\n"
        f":name: tab-ratios-{result['machine']['kind']}\n\n"
        f"| dimensions | rows | dtype | `fit`, ms | {' | '.join(peers)} |\n"
        f"|--:|--:|:--|--:|{'--:|' * len(peers)}\n"
    ) + "\n".join([*lines, ":::"])


def settings(result: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Dimension, batch and dtype of all cells, each once and in order."""
    return sorted({(c["dim"], c["batch"], c["dtype"]) for c in result["cells"]})


def _over(row: dict[str, Any], ours: float) -> str:
    time = median(row, "step")
    if np.isnan(time):
        return _reason(row)
    return (
        f"({_ms(time)}\N{NO-BREAK SPACE}ms)" if np.isnan(ours) else f"{time / ours:.2f}"
    )


def seeds(result: dict[str, Any]) -> str:
    """Many seeds beside one."""
    rows = {row["seeds"]: float(np.median(row["step"])) for row in result["seeds"]}
    one = rows.pop(None)
    most = max(rows)
    text = (
        f"One seed by `fit` takes {1e3 * one:.2f} ms a step; {most} seeds by "
        f"`fit_many` take {rows[most] / one:.1f} times as long.\n\n"
        ":::{table} Many seeds at once: eight blocks in the plane, 512 rows a step "
        "and seed, float32.\n"
        f":name: tab-seeds-{result['machine']['kind']}\n\n"
        "| seeds | step, ms | over one by `fit` | a seed, over one by `fit` |\n"
        "|--:|--:|--:|--:|\n"
    )
    lines = (
        f"| {n} | {1e3 * t:.3g} | {t / one:.2f} | {t / one / n:.2f} |"
        for n, t in rows.items()
    )
    return text + "\n".join(lines) + "\n:::" + roofline(result)


def roofline(result: dict[str, Any]) -> str:
    """On a GPU: the share of its limits."""
    if "roofline" not in result:
        return ""
    about = result["roofline"]
    lines = (
        f"| {row['seeds'] or 'one by `fit`'} | {100 * row['share']:.2g} % |"
        for row in about["shares"]
    )
    head = (
        f"\n\nMeasured limits: {about['flops_per_second'] / 1e12:.1f} Tflop/s in a "
        f"product of float32 matrices, {about['bytes_per_second'] / 1e9:.0f} GB/s in a "
        "copy.\n\n:::{table} The share of the limits that a step reaches.\n"
        ":name: tab-roofline\n\n| seeds | share |\n|--:|--:|\n"
    )
    return head + "\n".join(lines) + "\n:::"


def everything(result: dict[str, Any]) -> str:
    """All cells: a table for each dimension, batch and dtype, folded."""
    parts = []
    for dim, batch, dtype in settings(result):
        rows = pick(result, dim=dim, batch=batch, dtype=dtype)
        lines = "\n".join(_long_row(row) for row in rows)
        parts.append(
            ":::{dropdown} " + f"{dim} dimensions, {batch:,} rows, {dtype}\n\n"
            "| library | blocks | parameters | step, ms | density, ms | sampling, ms | "
            "compile, s | peak, MB | XLA's, MB |\n"
            f"|:--|--:|--:|--:|--:|--:|--:|--:|--:|\n{lines}\n:::"
        )
    return "\n\n".join(parts)


def _long_row(row: dict[str, Any]) -> str:
    short = _row(row, 1.0).split(" | ")
    if np.isnan(median(row, "step")):
        return f"| {row['library']} | {row['depth']} | | {_reason(row)} | | | | | |"
    return " | ".join([short[0], str(row["depth"]), *short[1:-1]]) + " |"


def draw(result: dict[str, Any], path: Path) -> None:
    """Step, compilation, memory and sampling against depth."""
    plt.rc("svg", hashsalt=path.stem)  # the same bytes from the same numbers
    figure, axes = plt.subplots(2, 2, figsize=SIZES["grid"])
    panels = {
        "training step, ms": lambda c: 1e3 * median(c, "step"),
        "compilation of a step, s": _compile,
        "sampling 512 rows, ms": lambda c: 1e3 * median(c, "sample"),
        "peak memory over imports, MB": lambda c: c.get("peak_bytes", np.nan) / 1e6,
    }
    for ax, (label, value) in zip(axes.flat, panels.items(), strict=True):
        for library, look in LOOK.items():
            cells = pick(result, library=library, dim=2, batch=512, dtype="float32")
            points = np.array([[c["depth"], value(c)] for c in cells]).reshape(-1, 2)
            if np.isfinite(points[:, 1:]).any():
                ax.plot(*points.T, label=library, **look)
        scale = "linear" if "memory" in label else "log"
        style_ax(ax, label, xlabel="blocks", xscale="log", yscale=scale)
        ax.set_xticks([2, 4, 8, 16, 32, 64], [2, 4, 8, 16, 32, 64])
        ax.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _compile(cell: dict[str, Any]) -> float:
    return np.nan if cell["library"] in TORCH else cell.get("compile_seconds", np.nan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Table and figure of a benchmark.")
    parser.add_argument("file", type=Path, help="the numbers, such as cpu.json")
    from_file(parser.parse_args().file)
