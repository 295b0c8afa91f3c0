"""The look of every figure of the book, and what its pages are made with.

Colours are those of Okabe and Ito, some darkened so that a thin line stands out
from white; `tests/test_style.py` holds the contrast and the distances as seen
with each kind of colour blindness. Figures are opaque white on every page, so
that they read the same on light pages, on dark ones and in print.
"""

import base64
import html
import io
import os
import re
import uuid

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.colors import to_hex
from PIL import Image

PALETTE = {
    "data": "#0072B2",
    "model": "#D55E00",
    "base": "#009E73",
    "affine": "#CC7A00",
    "spline": "#5E3C99",
    "additive": "#2B9C8F",
    "bound": "#000000",
    "bad": "#A50026",
    "faint": "#9AA0A6",
    "grid": "#8A8A8A",
    "text": "#222222",
}
CYCLE = [PALETTE[k] for k in ("data", "model", "base", "spline", "affine", "bad")]
CMAP = "viridis"  # sequential: order (depth, steps) and density
KIND_KW = {  # a coupling is told by its marker too, not by colour alone
    "affine": {"color": PALETTE["affine"], "marker": "s"},
    "spline": {"color": PALETTE["spline"], "marker": "o"},
    "additive": {"color": PALETTE["additive"], "marker": "^"},
}
_POINTS = {"s": 5, "linewidths": 0, "alpha": 0.6, "rasterized": True}
SCATTER_KW = {**_POINTS, "color": PALETTE["data"]}  # points of the data
GAUSS_KW = {**_POINTS, "color": PALETTE["base"]}  # points made Gaussian
SIZES = {  # inches; the page is about 7.4 wide
    "one": (5.6, 3.5),
    "square": (4.4, 4.2),
    "wide": (7.4, 3.2),
    "pair": (7.4, 3.7),
    "grid": (7.4, 6.2),
    "tall": (4.4, 6.4),  # two panels that a phone can still show
}
VERDICTS = {
    "confirmed": ("✓", "#00704F"),
    "confirmed with a condition": ("◐", "#8A5300"),
    "not seen": ("○", "#5A5F66"),
    "false as stated": ("✗", "#A50026"),
}

_VERDICT_HEAD = """<style>
.verdicts{overflow-x:auto;background:#fff;color:#222;padding:.5rem}
.verdicts table{border-collapse:collapse;width:100%;min-width:34rem;margin:0;
 color:#222;table-layout:auto}
.verdicts caption{text-align:left;font-weight:600;color:#222;caption-side:top}
.verdicts tr{background:#fff!important}
.verdicts :is(th,td){text-align:left!important;vertical-align:top;padding:.4rem;
 border-bottom:1px solid #c8ccd0;color:#222;white-space:normal;max-width:none}
@media(max-width:40rem){.verdicts table{min-width:0}.verdicts thead{display:none}
 .verdicts :is(tr,th,td){display:block}.verdicts :is(th,td){border:0;padding:.2rem 0}
 .verdicts tr{border-bottom:1px solid #c8ccd0}}
</style><div class="verdicts" role="region" tabindex="0" aria-label="Verdicts"><table>
<caption>What was claimed, what this run measured, and the verdict</caption><thead><tr>
<th scope="col">no.</th><th scope="col">claim</th><th scope="col">measured</th>
<th scope="col">verdict</th></tr></thead><tbody>"""
_FILM_STYLE = """<style>
.film{background:#fff;color:#222;padding:.5rem}.film figure{margin:0}
.film img{max-width:100%;display:block;margin:auto}.film figcaption{display:none}
.film p{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin:.4rem 0 0}
.film button{min-width:6rem;padding:.3rem .6rem;font:inherit;color:#222;
 background:#fff;border:1px solid #767676;border-radius:.3rem;cursor:pointer}
.film input{flex:1 1 9rem;accent-color:#0072B2}.film output{min-width:6rem}
@media print{.film p{display:none}.film figure.keep{display:inline-block!important;
 width:32%;vertical-align:top}.film figcaption{display:block;font-size:.8em}}
</style>"""
_FILM_SCRIPT = """<script>(root => {
const one = tag => root.querySelector(tag), frames = root.querySelectorAll("figure");
const button = one("button"), slider = one("input"), out = one("output");
let timer = 0;
const show = i => {
  frames.forEach((frame, j) => { frame.hidden = j != i; });
  slider.value = i; out.textContent = frames[i].lastChild.textContent;
  slider.setAttribute("aria-valuetext", out.textContent); };
const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶ Play";
  out.setAttribute("aria-live", "polite"); };
const next = () => +slider.value + 1 < frames.length ? show(+slider.value + 1) : stop();
button.onclick = () => { if (timer) return stop();
  if (+slider.value + 1 == frames.length) show(0);
  timer = setInterval(next, PAUSE); button.textContent = "❚❚ Pause";
  out.setAttribute("aria-live", "off"); };
slider.oninput = () => { stop(); show(+slider.value); };
show(0); })(document.getElementById("UID"))</script>"""

_INK = {"labelcolor": PALETTE["text"], "edgecolor": PALETTE["text"]}
mpl.rc("figure", figsize=SIZES["one"], dpi=120, facecolor="white")
mpl.rc("figure.constrained_layout", use=True)
mpl.rc("savefig", dpi=120, facecolor="white")
mpl.rc("font", size=11)
mpl.rc("axes", facecolor="white", titlesize=11, labelsize=11, **_INK)
mpl.rc("axes", prop_cycle=cycler(color=CYCLE))
mpl.rc("axes.formatter", useoffset=False)
mpl.rc("xtick", labelsize=10, color=PALETTE["text"])
mpl.rc("ytick", labelsize=10, color=PALETTE["text"])
mpl.rc("legend", fontsize=10, frameon=False)
mpl.rc("text", color=PALETTE["text"])
mpl.rc("lines", linewidth=1.6, markersize=5)
mpl.rc("image", cmap=CMAP)


def style_ax(ax, title="", *, xlabel="", ylabel="", **kwargs):
    """Label `ax`, give it the book's quiet frame, and hand it back.

    `kwargs` go to `ax.set`: `yscale="log"`, `xlim=(0, 1)`, `aspect="equal"`.
    """
    ax.set(**kwargs)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(True, color=PALETTE["grid"], alpha=0.25, linewidth=0.6)
    return ax


def shades(n):
    """Return `n` ordered colours, dark to light, none too pale for white paper."""
    return [to_hex(c) for c in mpl.colormaps[CMAP](np.linspace(0, 0.8, n))]


def band(ax, x, runs, *, color, label=None, **kwargs):
    """Draw every seed thin and the median bold; from six seeds on, quartiles too.

    Args:
        ax: axes.
        x: horizontal values, shape `(k,)`.
        runs: one row a seed, shape `(seeds, k)`. A value that is not finite is a
            gap; the median leaves out such runs, and where they are half of the
            seeds or more it is a gap too.
        color: of the band.
        label: for the legend; the median carries it.
        kwargs: for the median line, such as `marker="o"`.
    """
    x, runs = np.asarray(x), np.atleast_2d(np.asarray(runs, dtype=float))
    if runs.shape[1:] != x.shape:
        raise ValueError(f"expected runs of shape (seeds, {len(x)}), got {runs.shape}")
    runs = np.where(np.isfinite(runs), runs, np.nan)
    most = np.isfinite(runs).mean(axis=0) > 0.5
    low, median, high = np.full((3, len(x)), np.nan)
    low[most], median[most], high[most] = np.nanquantile(
        runs[:, most], [0.25, 0.5, 0.75], axis=0
    )
    ax.plot(x, runs.T, color=color, alpha=0.35, linewidth=0.8)
    if len(runs) >= 6:
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    return ax.plot(x, median, **{"color": color, "lw": 2.4, "label": label, **kwargs})


def density(ax, log_prob, extent, *, points=160, **kwargs):
    """Draw `exp(log_prob)` over `extent = (left, right, bottom, top)`.

    `log_prob` takes points of shape `(m, 2)` and gives `(m,)`.
    """
    left, right, bottom, top = extent
    xs, ys = np.linspace(left, right, points), np.linspace(bottom, top, points)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    values = np.exp(np.asarray(log_prob(grid), dtype=float)).reshape(points, points)
    kwargs = {"vmin": 0, "aspect": "equal", "interpolation": "bilinear", **kwargs}
    return ax.imshow(values, origin="lower", extent=extent, **kwargs)


def note(name, value):
    """Keep `value` for the prose, which shows it by ``{glue:text}`name` ``.

    Text is shown as it is (`"0.500"` stays 0.500, `"-1.4"` gets a true minus); a
    number may be given its format where it is used: ``{glue:text}`name:.2f` ``. A
    script has no prose, and prints it.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        value = re.sub(r"(?<![\w-])-(?=[\d.])", "−", value)
    prefix = "application/papermill.record/"
    _show(
        {f"{prefix}text/plain": repr(value)},
        {"scrapbook": {"name": name, "mime_prefix": prefix}},
        script=f"{name}: {value}",
    )


def _show(bundle, metadata, *, script):
    """Show by MIME type where there is a notebook; elsewhere print `script`."""
    if get_ipython() is None:
        print(script)
    else:
        display(bundle, raw=True, metadata=metadata)


def verdicts(rows):
    """Show the verdicts of a chapter, and leave them for the claims page.

    Args:
        rows: dicts of text with the keys id ("07.1"), claim, source, measured,
            verdict (one of `VERDICTS`) and, if need be, correction; lane is the
            lane of this run unless given.

    Raises:
        ValueError: a key, an id or a verdict is not one of those.
    """
    need, lane = ("id", "claim", "source", "measured", "verdict"), "quick"
    rows = [
        {"correction": "", "lane": os.environ.get("GAUSS_FLOWS_LANE") or lane, **row}
        for row in rows
    ]
    for row in rows:
        if set(row) != {*need, "correction", "lane"}:
            raise ValueError(f"expected the keys {need}, got {tuple(row)}")
        if not all(isinstance(text, str) for text in row.values()):
            raise ValueError(f"expected text under every key, got {row}")
        if not re.fullmatch(r"\d\d\.\d+", row["id"]):
            raise ValueError(f"expected an id such as '07.1', got {row['id']!r}")
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"expected one of {[*VERDICTS]}, got {row['verdict']!r}")
    ids = [row["id"] for row in rows]
    if len(set(ids)) != len(ids):
        raise ValueError(f"expected each id once, got {ids}")
    plain = "\n".join(
        f"{r['id']} {r['claim']} ({r['source']}): {r['verdict']}. {r['measured']} "
        f"[{r['lane']} lane] {r['correction']}".strip()
        for r in rows
    )
    page = f"{_VERDICT_HEAD}{''.join(map(_verdict_row, rows))}</tbody></table></div>"
    bundle = {"text/html": page, "text/plain": plain}
    _show(bundle, {"verdicts": rows}, script=plain)


def _verdict_row(row):
    sign, colour = VERDICTS[row["verdict"]]
    row = {k: html.escape(v) for k, v in row.items()}
    more = f"<br>{row['correction']}" if row["correction"] else ""
    return (
        f'<tr><th scope="row">{row["id"]}</th><td>{row["claim"]}<br><small>'
        f"{row['source']}</small></td><td>{row['measured']}<br><small>"
        f'{row["lane"]} lane</small></td><td><strong style="color:{colour}">'
        f'<span aria-hidden="true">{sign}</span> {row["verdict"]}</strong>{more}</td>'
        "</tr>"
    )


def film(figures, labels, *, alt, name="step", dpi=96, seconds=0.7):
    """Show figures one at a time: play, pause, or a slider; no kernel, no network.

    Args:
        figures: figures of one size; they are closed.
        labels: one for each figure, such as the number of blocks.
        alt: what the film shows, for those who cannot see it.
        name: what the labels count.
        dpi: of the frames; lower it where the film grows beyond 600 kB.
        seconds: between two frames.

    Raises:
        ValueError: there are no figures, not as many labels, or they are too large.
    """
    figures, labels = list(figures), [str(label) for label in labels]
    if not figures or len(figures) != len(labels):
        raise ValueError(f"expected a label a figure, got {len(labels)}/{len(figures)}")
    frames = [_png(figure, dpi) for figure in figures]
    if (size := sum(map(len, frames))) > 600_000:
        raise ValueError(f"expected at most 600 kB in a film, got {size / 1e3:.0f} kB")
    printed = {0, len(frames) // 2, len(frames) - 1}
    pictures = "".join(
        f'<figure class="{"keep" if i in printed else ""}" {"hidden" if i else ""}>'
        f'<img alt="{html.escape(f"{alt} {name} {label}")}" src="data:image/png;base64,'
        f'{frame}"><figcaption>{html.escape(f"{name} {label}")}</figcaption></figure>'
        for i, (frame, label) in enumerate(zip(frames, labels, strict=True))
    )
    uid = "film-" + uuid.uuid5(uuid.NAMESPACE_URL, alt + pictures).hex[:10]
    script = _FILM_SCRIPT.replace("UID", uid).replace("PAUSE", f"{1000 * seconds:.0f}")
    return HTML(
        f'{_FILM_STYLE}<div class="film" id="{uid}" role="group" '
        f'aria-label="Film: {html.escape(alt)}">{pictures}<p><button type="button">'
        f'▶ Play</button><input type="range" min="0" max="{len(frames) - 1}" value="0" '
        f'aria-label="{html.escape(name)}"><output aria-live="polite">'
        f"{html.escape(f'{name} {labels[0]}')}</output></p></div>{script}"
    )


def _png(figure, dpi):
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
