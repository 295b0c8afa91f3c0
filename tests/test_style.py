import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_rgb

import _style
from _style import (
    CYCLE,
    GAUSS_KW,
    KIND_KW,
    PALETTE,
    SCATTER_KW,
    SIZES,
    band,
    density,
    film,
    note,
    shades,
    style_ax,
    verdicts,
)

# Machado, Oliveira and Fernandes (2009): severity 1, on linear RGB
SEEN_WITH = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
GROUPS = [
    ("data", "model", "base", "bound"),
    ("affine", "spline", "additive", "bad", "bound"),
]


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast_with_white(colour):
    return 1.05 / (linear(colour) @ TO_XYZ[1] + 0.05)


def lab(rgb):
    t = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture
def shown():
    """Call a function in a fresh IPython shell; give what it displayed."""
    InteractiveShell.instance()

    def call(function, *arguments, **options):
        with capture_output() as captured:
            function(*arguments, **options)
        return captured.outputs

    yield call
    InteractiveShell.clear_instance()


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def film_page(n, alt) -> str:
    return str(film(figures(n), range(n), alt=alt, name="blocks").data)


def figures(n):
    made = []
    for i in range(n):
        figure, ax = plt.subplots(figsize=SIZES["square"])
        ax.plot([0, i])
        made.append(figure)
    return made


@pytest.mark.parametrize("name", sorted(set(PALETTE) - {"faint"}))
def test_lines_stand_out_from_white(name):
    assert contrast_with_white(PALETTE[name]) >= 3.0


@pytest.mark.parametrize("eye", SEEN_WITH)
@pytest.mark.parametrize("group", GROUPS)
def test_colours_drawn_together_differ_for_every_eye(group, eye):
    for a, b in itertools.combinations(group, 2):
        seen = [lab(SEEN_WITH[eye] @ linear(PALETTE[k])) for k in (a, b)]
        assert np.linalg.norm(seen[0] - seen[1]) > 15, (a, b)


def test_shades_are_ordered_and_none_is_pale():
    lightness = [lab(linear(c))[0] for c in shades(7)]
    assert lightness == sorted(lightness)
    assert min(map(contrast_with_white, shades(7))) > 1.8


def test_kinds_differ_by_marker_too():
    assert len({kw["marker"] for kw in KIND_KW.values()}) == len(KIND_KW)
    assert set(CYCLE) <= set(PALETTE.values())


def test_style_ax_labels_and_hands_back(ax):
    out = style_ax(ax, "t", xlabel="blocks", ylabel="nats", yscale="log", xlim=(0, 3))
    assert out is ax
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("t", "blocks", "nats")
    assert ax.get_yscale() == "log"
    assert ax.get_xlim() == (0, 3)
    assert not ax.spines["top"].get_visible()


def test_scatter_options_are_taken_by_scatter(ax):
    ax.scatter([0], [0], **GAUSS_KW)
    ax.scatter([0], [0], **SCATTER_KW)


def test_figures_are_opaque_white(ax):
    assert ax.figure.get_facecolor() == (1, 1, 1, 1)
    assert ax.get_facecolor() == (1, 1, 1, 1)


def test_band_draws_every_seed_and_the_median(ax):
    runs = np.array([[0.0, 1.0], [2.0, 5.0], [1.0, 3.0]])
    (median,) = band(ax, [1, 2], runs, color="k", label="m")
    assert len(ax.lines) == 4
    np.testing.assert_array_equal(median.get_ydata(), [1.0, 3.0])
    assert not ax.collections
    band(ax, [1, 2], np.tile(runs, (2, 1)), color="k")
    assert len(ax.collections) == 1


def test_band_leaves_gaps_where_most_seeds_failed(ax):
    runs = np.array([[0.0, np.nan], [2.0, -np.inf], [np.nan, 3.0]])
    (median,) = band(ax, [1, 2], runs, color="k")
    np.testing.assert_array_equal(median.get_ydata(), [1.0, np.nan])


def test_band_refuses_runs_of_another_length(ax):
    with pytest.raises(ValueError, match=r"expected runs of shape \(seeds, 2\)"):
        band(ax, [1, 2], np.zeros((3, 4)), color="k")


def test_density_puts_the_point_where_it_is(ax):
    image = density(
        ax, lambda x: -50 * ((x - [1.0, -2.0]) ** 2).sum(-1), (-3, 3, -3, 3), points=61
    )
    row, column = np.unravel_index(np.argmax(image.get_array()), (61, 61))
    assert (column, row) == (40, 10)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.500", "0.500"),
        ("it's −1.7", "it's −1.7"),
        ("-1.72 to -.5", "−1.72 to −.5"),
        ("3e-5, 2-4", "3e-5, 2-4"),
        (np.float64(1.5), "1.5"),
        (np.array(3), "3"),
        (2, "2"),
    ],
)
def test_note_shows_what_it_was_given(shown, value, expected):
    from myst_nb.core.variables import format_plain_text

    (output,) = shown(note, "n", value)
    (mime,) = output.data
    prefix = output.metadata["scrapbook"]["mime_prefix"]
    assert mime == prefix + "text/plain"
    assert output.metadata["scrapbook"]["name"] == "n"
    assert format_plain_text(output.data[mime], "") == expected


def test_a_script_prints_notes_and_verdicts(capsys):
    note("share", "-0.5")
    verdicts([ROW])
    assert capsys.readouterr().out == (
        "share: −0.5\n07.1 depth <helps> (s): not seen. m [quick lane]\n"
    )


ROW = {
    "id": "07.1",
    "claim": "depth <helps>",
    "source": "s",
    "measured": "m",
    "verdict": "not seen",
}


def test_verdicts_show_a_table_and_leave_their_rows(shown, monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "full")
    (output,) = shown(verdicts, [ROW, {**ROW, "id": "07.2", "correction": "c & d"}])
    page = output.data["text/html"]
    assert page.count('<th scope="row">') == 2
    assert "depth &lt;helps&gt;" in page
    assert "c &amp; d" in page
    assert "<caption>" in page
    assert (
        "07.2 depth <helps> (s): not seen. m [full lane] c & d"
        in (output.data["text/plain"])
    )
    rows = json.loads(json.dumps(output.metadata["verdicts"]))
    assert rows[0] == {**ROW, "correction": "", "lane": "full"}


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "verdict": "true"}],
        [{**ROW, "id": "7.1"}],
        [{**ROW, "measured": 3.0}],
        [{**ROW, "colour": "red"}],
        [{k: v for k, v in ROW.items() if k != "source"}],
        [ROW, ROW],
    ],
)
def test_verdicts_refuse_other_forms(rows):
    with pytest.raises(ValueError, match="expected"):
        verdicts(rows)


def test_film_is_one_piece_of_page_and_closes_its_figures():
    before = len(plt.get_fignums())
    page = film_page(4, 'A "line" rises:')
    assert len(plt.get_fignums()) == before
    assert page.count("<img ") == page.count("data:image/png;base64,") == 4
    assert page.count("hidden>") == 3
    assert page.count('class="keep"') == 3
    assert 'alt="A &quot;line&quot; rises: blocks 2"' in page
    assert '<button type="button">' in page
    assert 'type="range" min="0" max="3"' in page
    assert not re.search(r"https?://|@import|src=(?!\"data:)", page)


def test_films_of_one_page_do_not_share_a_name():
    names = [re.findall(r'id="(film-\w+)"', film_page(n, "a")) for n in (1, 2)]
    assert len(names[0]) == len(names[1]) == 1
    assert names[0] != names[1]


def test_film_refuses_what_it_cannot_show(monkeypatch):
    with pytest.raises(ValueError, match="a label a figure, got 1/0"):
        film([], ["1"], alt="a")
    monkeypatch.setattr(_style, "_png", lambda figure, dpi: "x" * 600_001)
    with pytest.raises(ValueError, match="at most 600 kB"):
        film([None], ["1"], alt="a")
