"""Link the package's names in code cells to the API page, and each name there back.

sphinx-codeautolink does the former, but breaks off at the sections without a title
that sphinx-proof makes, and its tables of uses are longer than what they stand below.
"""

import ast
import importlib
import re
from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes

CELL = re.compile(r'<div class="highlight-ipython3.*?</pre>', re.S)
NAME = r'<span class="n">(\w+)</span>'
CHAIN = re.compile(rf'{NAME}(?:<span class="o">\.</span>{NAME})*')


def imported(tree: ast.AST) -> dict[str, str]:
    """What the names that come from the package stand for, by full name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {n.asname or n.name: n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {n.asname or n.name: f"{node.module}.{n.name}" for n in node.names}
    return {name: full for name, full in found.items() if is_ours(full)}


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "gauss_flows"


def chains(tree: ast.AST) -> Iterator[str]:
    """Names and attributes as they are written: `gf.data.spiral`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", text):
                yield text


def full_name(chain: str, names: dict[str, str]) -> str:
    """A chain with its first name spelled out, or nothing where it is not ours."""
    first, dot, rest = chain.partition(".")
    return f"{names[first]}{dot}{rest}" if first in names else ""


def own_name(dotted: str) -> str:
    """The name of an object where it is defined, as `dotted` may be a shorter one."""
    found = importlib.import_module("gauss_flows")
    for part in dotted.split(".")[1:]:
        found = getattr(found, part, None)
    name, module = (getattr(found, n, "") for n in ("__qualname__", "__module__"))
    return f"{module}.{name}" if name and is_ours(module) else dotted


def documented(env, dotted: str) -> str:
    """The longest beginning of a full name that the API page has, or nothing."""
    objects = env.domains["py"].objects
    while "." in dotted:
        if (name := own_name(dotted)) in objects:
            return name
        dotted = dotted.rpartition(".")[0]
    return ""


def note_uses(app, doctree: nodes.document) -> None:
    """Note which names a page's cells use, each with the section of its first use."""
    names, uses = {}, {}
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") != "ipython3":
            continue
        code = re.sub(r"^\s*[%!].*$", "", block.astext(), flags=re.M)
        tree = ast.parse(code)
        names |= imported(tree)
        section = block
        while not isinstance(section, nodes.section):
            section = section.parent
        for chain in chains(tree):
            uses.setdefault(full_name(chain, names), section["ids"][0])
    uses.pop("", None)
    app.env.metadata[app.env.docname].update(code_names=names, code_uses=uses)


def refresh(app, env) -> list[str]:
    """Write the API page again when a chapter uses other names than before."""
    uses = {page: env.metadata[page].get("code_uses") for page in env.found_docs}
    if getattr(env, "code_uses", None) == uses:
        return []
    env.code_uses = uses
    return sorted({entry.docname for entry in env.domains["py"].objects.values()})


def add_uses(app, doctree: nodes.document, docname: str) -> None:
    """Say below each documented name which chapters use it."""
    users: dict[str, dict[str, str]] = {}
    descriptions = list(doctree.findall(addnodes.desc))
    for page in sorted(app.env.found_docs) if descriptions else []:
        for dotted, section in app.env.metadata[page].get("code_uses", {}).items():
            name = documented(app.env, dotted)
            users.setdefault(name, {}).setdefault(page, section)
    for description in descriptions:
        signature = next(iter(description.findall(addnodes.desc_signature)))
        content = next(iter(description.findall(addnodes.desc_content)))
        pages = users.get(next(iter(signature["ids"]), ""), {})
        if pages:
            content += used_in(app, docname, pages)


def used_in(app, docname: str, pages: dict[str, str]) -> nodes.paragraph:
    paragraph = nodes.paragraph("", "Used in ", classes=["used-in"])
    for i, (page, section) in enumerate(pages.items()):
        number = re.match(r"book/(\d\d)_", page)
        uri = f"{app.builder.get_relative_uri(docname, page)}#{section}"
        text = number[1] if number else app.env.titles[page].astext()
        paragraph += [nodes.Text(", ")] if i else []
        paragraph += nodes.reference("", text, refuri=uri, internal=True)
    return paragraph


def link_cells(app, pagename: str, templatename, context: dict, doctree) -> None:
    """Make the package's names in a page's cells links."""
    names = app.env.metadata[pagename].get("code_names") if doctree else None
    if not names:
        return

    def link(match: re.Match) -> str:
        chain = ".".join(re.findall(NAME, match[0]))
        name = documented(app.env, full_name(chain, names))
        if not name:
            return match[0]
        entry = app.env.domains["py"].objects[name]
        uri = f"{app.builder.get_relative_uri(pagename, entry.docname)}#{entry.node_id}"
        return f'<a class="code-link" href="{uri}">{match[0]}</a>'

    context["body"] = CELL.sub(lambda cell: CHAIN.sub(link, cell[0]), context["body"])


def setup(app) -> dict:
    app.connect("doctree-read", note_uses)
    app.connect("env-updated", refresh)
    app.connect("doctree-resolved", add_uses)
    app.connect("html-page-context", link_cells)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
