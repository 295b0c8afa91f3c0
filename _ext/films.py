"""Films: on the page the first frame, and the others when the reader asks for them.

In a notebook a film is one piece of HTML that holds every frame (`film` in
`_style.py`). On a page that would weigh on every reader, so here the frames become
files beside it, and `film.js` plays them. On paper, and on a page without scripts, the
first, the middle and the last frame stand in the film's place.
"""

import hashlib
import html
import os
import re
import struct
from base64 import b64decode
from pathlib import Path
from urllib.parse import quote

from docutils import nodes
from sphinx.transforms import SphinxTransform

FRAME = re.compile(
    r'<figure class="(\w*)" \w*><img alt="([^"]*)" src="data:image/png;base64,'
    r'([^"]*)"><figcaption>(.*?)</figcaption></figure>'
)
ABOUT = re.compile(r'class="film" id="[^"]*" role="group" aria-label="Film: ([^"]*)"')
NAME = re.compile(r'<input type="range"[^>]* aria-label="([^"]*)"')
PAUSE = re.compile(r"setInterval\(next, (\d+)\)")


class film(nodes.General, nodes.Element):
    """A film: what it shows, what its slider counts, its pace, and an image a frame."""

    @property
    def frames(self) -> list[nodes.image]:
        return list(self.findall(nodes.image))


def read_film(page: str, keep_file) -> film | None:
    """The film in a piece of HTML, if it is one.

    Args:
        page: what `_style.film` made.
        keep_file: takes the bytes of a frame, gives the address of the file.
    """
    about, name, pause = (found.search(page) for found in (ABOUT, NAME, PAUSE))
    if not (about and name and pause):
        return None
    node = film(
        about=html.unescape(about[1]).rstrip(": "),
        name=html.unescape(name[1]),
        pause=int(pause[1]),
    )
    for kept, _, data, label in FRAME.findall(page):
        picture, label = b64decode(data), html.unescape(label)
        width, height = struct.unpack(">2I", picture[16:24])  # of the PNG's header
        node += nodes.image(
            uri=keep_file(picture),
            alt=f"{label}: {node['about']}",
            label=label,
            size=(width, height),
            keep=bool(kept),
        )
    return node


class FramesBesideThePage(SphinxTransform):
    """Put films in the place of their HTML; what they replace had every frame in it."""

    default_priority = 400  # before Sphinx collects the images of the page

    def apply(self, **kwargs) -> None:
        for raw in list(self.document.findall(nodes.raw)):
            if 'class="film"' not in raw.astext():
                continue
            node = read_film(raw.astext(), self.keep)
            if node is None or not node.frames:
                raise ValueError("a film has not the form that _style.film gives it")
            bundle = raw.parent.parent  # of all forms in which the notebook has it
            bundle.replace_self(node)

    def keep(self, picture: bytes) -> str:
        """Write a frame to where MyST-NB writes figures; its address for Sphinx."""
        folder = Path(self.env.mystnb_config.output_folder).resolve()  # type: ignore
        path = folder / f"{hashlib.sha256(picture).hexdigest()}.png"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
        return "/" + os.path.relpath(path, self.env.srcdir)


def visit_html(self, node: film) -> None:
    about, name = html.escape(node["about"]), html.escape(node["name"])
    first, last = node.frames[0]["label"], len(node.frames) - 1
    longest = max(len(image["label"]) for image in node.frames)  # steadies the slider
    frames = "".join(
        html_frame(image, address(self.builder, image), later=i > 0)
        for i, image in enumerate(node.frames)
    )
    self.body.append(
        f'<div class="film" role="group" aria-label="Film: {about}"'
        f' data-pause="{node["pause"]}">\n{frames}<p hidden>'
        '<button type="button">▶ Play</button><input type="range" min="0" '
        f'max="{last}" value="0" aria-label="{name}">'
        f'<output aria-live="off" style="min-width: min(100%, {longest}ch)">'
        f"{html.escape(first)}</output>"
        '<span role="status"></span></p></div>\n'
    )
    raise nodes.SkipNode


def html_frame(image: nodes.image, src: str, *, later: bool) -> str:
    width, height = image["size"]
    kind = "keep" if image["keep"] else ""
    hidden, wait = (" hidden", ' loading="lazy"') if later else ("", "")
    return (
        f'<figure class="{kind}"{hidden}>'
        f'<img alt="{html.escape(image["alt"])}" src="{src}" width="{width}" '
        f'height="{height}"{wait}><figcaption>{html.escape(image["label"])}'
        "</figcaption></figure>\n"
    )


def address(builder, image: nodes.image) -> str:
    """Where the builder puts a frame, as seen from the page."""
    return f"{builder.imgpath}/{quote(builder.images[image['uri']])}"


def visit_latex(self, node: film) -> None:
    """Three frames: upright ones side by side, wide ones one above the other."""
    width, height = node.frames[0]["size"]
    share, between = 0.31, r"\hfill"
    if width > 1.1 * height:
        share, between = min(0.72, 0.44 * width / height), r"\par\medskip"
    frames = [
        rf"\begin{{minipage}}{{{share:.2f}\linewidth}}\centering"
        rf"\includegraphics[width=\linewidth]{{{self.builder.images[image['uri']]}}}"
        rf"\par\small {self.encode(image['label'])}\end{{minipage}}"
        for image in node.frames
        if image["keep"]
    ]
    self.body.append(f"\n\\begin{{center}}{between.join(frames)}\\end{{center}}\n")
    raise nodes.SkipNode


def add_player(app, pagename, templatename, context, doctree) -> None:
    """Load the script and the style on pages that have a film, and on no other."""
    if doctree is not None and next(iter(doctree.findall(film)), None):
        app.add_css_file("film.css")
        app.add_js_file("film.js", loading_method="defer")


def setup(app) -> dict:
    app.add_node(film, html=(visit_html, None), latex=(visit_latex, None))
    app.add_transform(FramesBesideThePage)
    app.connect("html-page-context", add_player)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
