"""The tables and the figure of the numerical contract, from its numbers.

    PYTHONPATH=benchmarks .venv/bin/python trials/contract_page.py

Makes ``contract.md`` and ``contract.svg`` anew from ``contract.json``.
"""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from contract_promise import FAR, PROMISE, RADII, Promise
from render import as_json, origin

from _style import PALETTE, SIZES, style_ax

RESULTS = Path(__file__).resolve().parent / "results"
LOOK = {
    "float64": {"color": PALETTE["base"], "marker": "o"},
    "float32": {"color": PALETTE["data"], "marker": "s"},
    "bfloat16": {"color": PALETTE["model"], "marker": "^"},
}
KINDS = {"inverse": "inverse", "log_det": "log-determinant"}

Rows = list[dict[str, Any]]


def write(result: dict[str, Any], folder: Path) -> None:
    """Write numbers, tables and figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "contract.json"
    path.write_text(as_json(result))
    from_file(path)


def from_file(path: Path) -> None:
    """Make tables and figure beside a file of numbers anew."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(result))
    draw(result, path.with_suffix(".svg"))


def page(result: dict[str, Any]) -> str:
    """Everything that the page includes, as MyST."""
    parts = (origin, promises, refusals, radii, depths)
    return "\n\n".join(part(result) for part in parts) + "\n"


def pick(result: dict[str, Any], **wanted: Any) -> Rows:
    """The rows with these settings."""
    return [c for c in result["cells"] if all(c[k] == v for k, v in wanted.items())]


def promises(result: dict[str, Any]) -> str:
    """Each promise, and the worst that was measured within its reach."""
    lines = [
        _promise_row(layer, dtype, promise, pick(result, layer=layer, dtype=dtype))
        for layer, by_dtype in PROMISE.items()
        for dtype, promise in by_dtype.items()
    ]
    return (
        ":::{table} What is promised, and what was measured: "
        f"{result['draws']} draws of each layer, {result['points']} points of each "
        "size. Measured are median and largest, at the size within reach where they "
        f"are worst; of the factor the largest, up to {FAR:.0f}.\n"
        ":name: tab-contract\n\n"
        "| layer | dtype | reach | inverse | log-det | factor | inverse, measured | "
        "log-det, measured | factor, measured |\n"
        f"|:--|:--|{'--:|' * 7}\n" + "\n".join(lines) + "\n:::"
    )


def _promise_row(layer: str, dtype: str, promise: Promise, rows: Rows) -> str:
    near = [row for row in rows if row["radius"] <= promise.reach]
    pairs = [
        " · ".join(short(worst(near, f"{kind}_{what}")) for what in ("median", "max"))
        for kind in KINDS
    ]
    far = [row for row in rows if row["radius"] <= FAR and row["lost"] < 1]
    factor = short(worst(far, "factor_max"))
    shown = [layer, dtype, *map(short, promise), *pairs, factor]
    return f"| {' | '.join(shown)} |"


def worst(rows: Rows, name: str) -> float:
    """The largest number of a column; where there is none it is not finite."""
    found = [row[name] for row in rows]
    return max(math.inf if value is None else value for value in found)


def short(value: float | None) -> str:
    """A number with two digits at most; "∞" where it was not finite."""
    if value is None or math.isinf(value):
        return "∞"
    if value == 0 or 0.01 <= value < 1e4:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    digits, exponent = f"{value:.1e}".split("e")
    # a minus sign, at which no line is broken, where a hyphen would be
    return f"{digits.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def refusals(result: dict[str, Any]) -> str:
    """The layers that do not take a dtype, and what they say."""
    refused = [row for row in result["cells"] if "refused" in row]
    return "Not promised, because the layer does not take the dtype: " + (
        "; ".join(
            f"{row['layer']} in {row['dtype']} (`{row['refused']}`)" for row in refused
        )
        + "."
    )


def radii(result: dict[str, Any]) -> str:
    """The largest errors at each size of the points, a table a dtype."""
    return "\n\n".join(_radii(result, dtype) for dtype in LOOK)


def _radii(result: dict[str, Any], dtype: str) -> str:
    layers = {r["layer"]: None for r in result["cells"] if r["depth"] == 1}
    lines = []
    for layer in layers:
        rows = pick(result, layer=layer, dtype=dtype, depth=1)
        if [row["radius"] for row in rows] == [*RADII]:
            lines.append(f"| {layer} | {' | '.join(map(_pair, rows))} |")
    sizes = " | ".join(short(radius) for radius in RADII)
    table = (
        f":::{{table}} Largest errors of inverse · log-determinant in {dtype}, by the "
        "largest entry of $x$, and in parentheses the share of points that are lost. "
        "∞: a result was not a finite number.\n"
        f":name: tab-contract-{dtype}\n\n"
        f"| layer | {sizes} |\n|:--|{'--:|' * len(RADII)}\n"
        + "\n".join(lines)
        + "\n:::"
    )
    if dtype == "float32":
        return table
    return f"::::{{dropdown}} The same in {dtype}\n{table}\n::::"


def _pair(row: dict[str, Any]) -> str:
    if "raised" in row:
        return "raises"
    lost = f" ({100 * row['lost']:.2g} %)" if row["lost"] else ""
    return " · ".join(short(row[f"{kind}_max"]) for kind in KINDS) + lost


def depths(result: dict[str, Any]) -> str:
    """Errors against depth, of each flow and dtype."""
    flows = {row["layer"]: None for row in result["cells"] if row["depth"] > 1}
    lines = []
    for flow in flows:
        for depth in sorted({row["depth"] for row in pick(result, layer=flow)}):
            rows = [
                pick(result, layer=flow, dtype=dtype, depth=depth)[0] for dtype in LOOK
            ]
            shown = [
                f"{short(row[f'{kind}_median'])} · {short(row[f'{kind}_max'])}"
                for kind in KINDS
                for row in rows
            ]
            lines.append(f"| {flow} | {depth} | {' | '.join(shown)} |")
    head = [f"{name}, {dtype}" for name in KINDS.values() for dtype in LOOK]
    return (
        ":::{table} Medians and maxima of both errors after so many blocks, each a "
        "rotation and two couplings, as initialised, at points whose largest entry is "
        "3.\n:name: tab-contract-depth\n\n"
        f"| flow | blocks | {' | '.join(head)} |\n|:--|--:|{'--:|' * len(head)}\n"
        + "\n".join(lines)
        + "\n:::"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Both errors against depth: a row a flow, medians full and maxima dotted."""
    plt.rc("svg", hashsalt=path.stem)  # the same bytes from the same numbers
    flows = [*{row["layer"]: None for row in result["cells"] if row["depth"] > 1}]
    figure, axes = plt.subplots(2, 2, figsize=SIZES["grid"], sharex=True, sharey=True)
    for line, flow in zip(axes, flows, strict=True):
        for ax, (kind, name) in zip(line, KINDS.items(), strict=True):
            for dtype, look in LOOK.items():
                rows = pick(result, layer=flow, dtype=dtype)
                where = [row["depth"] for row in rows]
                for what, style in (("median", "-"), ("max", ":")):
                    values = [_or_nan(row[f"{kind}_{what}"]) for row in rows]
                    label = dtype if what == "median" else None
                    ax.plot(where, values, label=label, ls=style, **look)
            title = f"{name}, {flow.removeprefix('coupling_flow, ')}"
            style_ax(ax, title, xscale="log", yscale="log")
            ax.set_xticks(where, where)
            ax.minorticks_off()
    for ax in axes[-1]:
        ax.set_xlabel("blocks")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


if __name__ == "__main__":
    from_file(RESULTS / "contract.json")
