"""What a site needs beside its pages' text: a sitemap, figures that open, plain roles.

sphinx-sitemap would list only the pages that a build wrote anew.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

FIGURE = re.compile(
    r'(<figure class="align-default"[^>]*>\s*)(<img [^>]*src="((?!data:)[^"]+)"[^>]*>)'
)


def share_address(app, config) -> None:
    """Let cards and descriptions name the one address of the site."""
    config.ogp_site_url = config.html_baseurl


def mend_roles(app, pagename: str, templatename, context: dict, doctree) -> None:
    """Call the papers of a list its items; what docutils calls them is deprecated."""
    if "body" in context:
        context["body"] = context["body"].replace(
            'role="doc-biblioentry"', 'role="listitem"'
        )


def open_figures(app, pagename: str, templatename, context: dict, doctree) -> None:
    """Let a figure lead to its picture, which a phone shows larger than here."""
    if "body" in context:
        link = r'\1<a class="whole-figure" href="\3">\2</a>'
        context["body"] = FIGURE.sub(link, context["body"])


def write_sitemap(app, exception) -> None:
    if exception or app.builder.format != "html":
        return
    base = app.config.html_baseurl
    pages = [base + app.builder.get_target_uri(p) for p in sorted(app.env.found_docs)]
    urls = "\n".join(f"<url><loc>{escape(page)}</loc></url>" for page in pages)
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}\n'
        "</urlset>\n",
        encoding="utf-8",
    )


def setup(app) -> dict:
    app.connect("config-inited", share_address)
    app.connect("html-page-context", mend_roles)
    app.connect("html-page-context", open_figures)
    app.connect("build-finished", write_sitemap)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
