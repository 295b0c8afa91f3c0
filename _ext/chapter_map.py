"""Draw the map of the chapters: ``{chapter-map}``.

An arrow leads from a chapter to one that needs it, as the paragraph *You need* of the
latter says; what a needed chapter needs in turn is not drawn again. Only the places
are set by hand.
"""

import html
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)

PLACES = {  # column and row: neighbours touch, and no arrow runs below a box
    "06": (0, 0), "05": (1, 0), "07": (2, 0), "10": (3, 0),
    "04": (0, 1), "00": (1, 1), "03": (2, 1), "08": (3, 1),
    "01": (0, 2), "13": (1, 2), "14": (2, 2), "09": (3, 2),
    "02": (0, 3), "12": (1, 3), "15": (2, 3), "17": (3, 3),
    "11": (0, 4), "18": (2, 4), "16": (3, 4),
}  # fmt: skip
PARTS = {  # the last chapter of each part, and the part's name
    "03": "I. The coupling layer",
    "06": "II. Gaussianization",
    "10": "III. Depth",
    "15": "IV. What depth can represent",
    "18": "V. Beyond coupling",
}
PITCH, BOX = (93, 80), (80, 50)
LEGEND, SIZE = 412, (386, 472)


@dataclass(frozen=True)
class Chapter:
    """A chapter as its file tells of it."""

    docname: str
    label: str
    title: str
    you_need: frozenset[str]  # labels

    @property
    def number(self) -> str:
        return self.docname[5:7]

    @property
    def name(self) -> str:
        words = self.docname[8:].replace("_", " ").replace("rbig", "RBIG")
        return words[0].upper() + words[1:]


def read(path: Path) -> Chapter:
    """A chapter's label, title and needs, out of its source."""
    text = path.read_text(encoding="utf-8")
    label = re.search(r"^\((.+)\)=\n# (.+)$", text, re.M)
    need = re.search(r"^\*\*You need\*\*.*$", text, re.M)
    if label is None or need is None:
        raise ValueError(f"{path.name}: expected a label, a title and 'You need'")
    asked = re.findall(r"\{ref\}`(?:[^`<]*<)?([^`<>]+)>?`", need[0])
    return Chapter(f"book/{path.stem}", label[1], label[2], frozenset(asked))


def needs(chapters: list[Chapter]) -> dict[str, set[str]]:
    """For each chapter, by number, those it needs at once."""
    by_label = {chapter.label: chapter.number for chapter in chapters}
    asked = {
        c.number: {by_label[label] for label in c.you_need & by_label.keys()}
        for c in chapters
    }

    @cache
    def before(number: str) -> frozenset[str]:
        return frozenset(asked[number]).union(*map(before, asked[number]))

    return {n: asked[n] - set().union(*map(before, asked[n])) for n in sorted(asked)}


def corner(number: str) -> tuple[float, float]:
    column, row = PLACES[number]
    return 4 + PITCH[0] * column, 4 + PITCH[1] * row


def arrow(start: str, end: str) -> str:
    """The path of an arrow between two boxes, from side to side."""
    (x, y), (u, v), (width, height) = corner(start), corner(end), BOX
    if y == v:  # beside each other
        x, u = (x + width, u - 2) if u > x else (x, u + width + 2)
        return f"M{x} {y + height / 2}H{u}"
    if x == u and abs(v - y) > PITCH[1]:  # around what lies between
        x, y, v = x + width, y + height * 0.7, v + height * 0.3
        return f"M{x} {y}C{x + 10} {y + 20} {x + 10} {v - 20} {x + 2} {v}"
    x, u = x + width / 2, u + width / 2
    y, v = (y + height, v - 2) if v > y else (y, v + height + 2)
    bend = (v - y) * 0.75
    return f"M{x} {y}C{x} {y + bend} {u} {v - bend} {u} {v}"


def part(number: str) -> int:
    return 1 + sum(number > last for last in PARTS)


def box(chapter: Chapter, needed: set[str], uri: str) -> str:
    """A chapter as a link."""
    x, y = corner(chapter.number)
    middle = x + BOX[0] / 2
    lines = textwrap.wrap(chapter.name, 12)
    words = "".join(
        f'<text x="{middle}" y="{y + 31 + 13 * i}">{line}</text>'
        for i, line in enumerate(lines)
    )
    asked = f"Needs {', '.join(sorted(needed))}." if needed else "A place to start."
    about = html.escape(f"{chapter.number}. {chapter.title} {asked}")
    kind = f"part-{part(chapter.number)}{'' if needed else ' start'}"
    return (
        f'<a href="{uri}" class="{kind}" id="map-{chapter.number}" '
        f'aria-label="{about}"><title>{about}</title>'
        f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="7"/>'
        f'<text class="number" x="{middle}" y="{y + 17}">{chapter.number}</text>'
        f"{words}</a>"
    )


def legend() -> str:
    """The names of the parts beside their colours, in two columns."""
    rows = []
    for i, name in enumerate(PARTS.values()):
        x, y = 4 + 180 * (i // 3), LEGEND + 20 * (i % 3)
        rows.append(
            f'<g class="part-{i + 1}"><rect x="{x}" y="{y}" width="14" height="14" '
            f'rx="3"/><text x="{x + 21}" y="{y + 11}">{name}</text></g>'
        )
    return "".join(rows)


def draw(chapters: list[Chapter], uri) -> str:
    """The map as SVG; `uri` gives the address of a page."""
    needed = needs(chapters)
    arrows, lit = [], []
    for chapter in chapters:
        number = chapter.number
        lit.append(
            f".chapter-map:has(#map-{number}:is(:hover, :focus-visible)) .to-{number}"
        )
        for start in sorted(needed[number]):
            arrows.append(
                f'<path class="to-{start} to-{number}" d="{arrow(start, number)}"/>'
            )
    boxes = [box(c, needed[c.number], uri(c.docname)) for c in chapters]
    return (
        f'<figure class="chapter-map"><svg viewBox="0 0 {SIZE[0]} {SIZE[1]}" '
        'role="group" aria-label="Map of the chapters. Each is a link, which also says '
        'what the chapter needs."><style>'
        f"{', '.join(lit)} {{ stroke-width: 2.5; opacity: 1; }}</style>"
        '<defs><marker id="map-tip" viewBox="0 0 6 6" refX="4.5" refY="3" '
        'markerWidth="6" markerHeight="6" markerUnits="userSpaceOnUse" orient="auto">'
        '<path d="M0 0L6 3L0 6z"/></marker></defs>'
        f'<g class="arrows" marker-end="url(#map-tip)">{"".join(arrows)}</g>'
        f"{legend()}{''.join(boxes)}</svg></figure>\n"
    )


class chapter_map(nodes.Invisible, nodes.Element):
    """The map; invisible to all but the HTML writer."""


class ChapterMap(SphinxDirective):
    """Put the map here."""

    def run(self) -> list[nodes.Node]:
        paths = sorted(Path(self.env.srcdir, "book").glob("[0-9][0-9]_*.md"))
        for path in paths:
            self.env.note_dependency(str(path))
        chapters = [read(p) for p in paths if f"book/{p.stem}" in self.env.found_docs]
        for chapter in chapters:
            if chapter.number not in PLACES:
                text = f"chapter {chapter.number} has no place on the map"
                logger.warning(text, location=self.get_location(), type="map")
        placed = [chapter for chapter in chapters if chapter.number in PLACES]
        return [chapter_map("", chapters=placed)]


def visit(self, node: chapter_map) -> None:
    docname = self.builder.current_docname
    self.body.append(
        draw(node["chapters"], lambda to: self.builder.get_relative_uri(docname, to))
    )
    raise nodes.SkipNode


def skip(self, node: chapter_map) -> None:
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_node(chapter_map, html=(visit, None), latex=(skip, None))
    app.add_directive("chapter-map", ChapterMap)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
