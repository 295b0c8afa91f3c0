"""Offer the book as a PDF, where `make pdf` has made one before the site was built.

Whether there is one is a setting of the site, so that Sphinx writes all pages anew
when that changes.
"""

import shutil
from pathlib import Path

NAME = "gauss-flows.pdf"


def made(srcdir: str | Path) -> Path:
    return Path(srcdir, "_build", NAME)


def look(app, config) -> None:
    config.book_pdf = made(app.srcdir).exists()


def add_button(app, pagename, templatename, context, doctree) -> None:
    """Put the PDF into the menu of downloads."""
    for group in context.get("header_buttons", []):
        if app.config.book_pdf and group.get("label") == "download-buttons":
            group["buttons"].append(
                {
                    "type": "link",
                    "url": context["pathto"](NAME, 1),
                    "text": "whole book, .pdf",
                    "icon": "fas fa-book",
                    "tooltip": "Download the whole book as a PDF",
                    "label": "download-book-button",
                }
            )


def copy(app, exception) -> None:
    if app.builder.format == "html" and app.config.book_pdf and not exception:
        shutil.copy(made(app.srcdir), app.outdir)


def setup(app) -> dict:
    app.add_config_value("book_pdf", False, "html")
    app.connect("config-inited", look)
    app.connect("html-page-context", add_button, priority=900)
    app.connect("build-finished", copy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
