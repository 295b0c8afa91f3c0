"""Show what a link leads to when it is hovered or focused, without a network.

For each page `previews/<page>.js` holds what may be shown of it: figures, theorems,
equations, glossary entries, documented names, papers, and the beginnings of sections.
`book/_static/previews.js` loads such a file with the first link into its page, by a
script tag, so that previews work from files too.
"""

import json
from pathlib import Path

from bs4 import BeautifulSoup, Tag

HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
WHOLE = ("admonition", "math-wrapper", "math", "citation")  # shown as they are


def shown(element: Tag) -> list[Tag]:
    """What to show of the element that a link leads to."""
    classes = element.get("class") or []
    if element.name in ("figure", "table") or any(name in WHOLE for name in classes):
        return [element]
    if element.name == "dt":
        body = element.find_next_sibling("dd")
        return [element, *(body.find_all("p", limit=1) if body else [])]
    if element.name == "span":  # a further name of what follows it or holds it
        following = element.find_next_sibling()
        if following is not None and not following.get_text(strip=True):
            return shown(following)
        return shown(element.parent) if isinstance(element.parent, Tag) else []
    if element.name == "section":
        heading = element.find(HEADINGS, recursive=False)
        first = element.find("p", recursive=False, class_=lambda c: c != "run-line")
        return [part for part in (heading, first) if isinstance(part, Tag)]
    return []


def plain(parts: list[Tag]) -> str:
    """Their HTML, without anchors, films, and names that would be there twice."""
    soup = BeautifulSoup("".join(map(str, parts)), "html.parser")
    for link in soup.select(".headerlink, .viewcode-link, .backrefs, .eqno"):
        link.decompose()
    for film in soup.select(".film"):
        film.replace_with(film.find("img") or "")
    for heading in soup.find_all(HEADINGS):
        heading.name = "p"
        heading["class"] = "preview-title"
    for element in soup.find_all(id=True):
        del element["id"]
    return str(soup)


def write(app, pagename: str, templatename, context: dict, doctree) -> None:
    """Write the previews of a page as it is written."""
    if doctree is None or app.builder.format != "html":
        return
    body = BeautifulSoup(context["body"], "html.parser")
    found = {str(e["id"]): plain(shown(e)) for e in body.find_all(id=True)}
    found = {name: markup for name, markup in found.items() if markup}
    path = Path(app.outdir, "previews", f"{pagename}.js")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, ensure_ascii=False)
    path.write_text(f"previews({json.dumps(pagename)}, {text})\n", encoding="utf-8")


def setup(app) -> dict:
    app.connect("html-page-context", write)
    app.add_js_file("previews.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
