"""What the book says about its own runs.

- every executed page ends with the lane, device, versions and date of its run, and a
  chapter says the most of it below its title too;
- ``{claims-ledger}`` is the table of all verdicts that the chapters' runs left;
- ``{execution-table}`` lists how each page was run;
- ``{run}`time` `` (or lane, device, date, python, jax) puts one of these into the text.

All are read from `_notebooks`, so that they come from the run that is rendered. Pages
are read again whenever their run, or a run they tell of, has changed.
"""

import re

from docutils import nodes
from executed import Run, digest_of_all, duration, runs, size
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)

VERDICTS = (
    "confirmed",
    "confirmed with a condition",
    "not seen",
    "false as stated",
    "open",
)
SIGNS = dict(zip(VERDICTS, "✓◐○✗…", strict=True))


def link(docname: str, text: str = "") -> addnodes.pending_xref:
    """A link to a page, by its title unless a text is given."""
    return addnodes.pending_xref(
        "",
        nodes.inline(text=text or docname),
        refdomain="std",
        reftype="doc",
        reftarget=f"/{docname}",
        refexplicit=bool(text),
        refwarn=True,
    )


def cell(*parts: nodes.Node | str, label: str) -> nodes.entry:
    """A table cell, one paragraph a part; `label` names its column on a phone."""
    paragraphs = [
        nodes.paragraph("", "", p if isinstance(p, nodes.Node) else nodes.Text(p))
        for p in parts
        if p
    ]
    return nodes.entry("", *paragraphs, classes=[f"column-{label}"])


def table(names: list[str], rows: list[list[nodes.entry]], kind: str) -> nodes.Node:
    """A table with one heading row."""
    head = nodes.row("", *(nodes.entry("", nodes.paragraph(text=n)) for n in names))
    group = nodes.tgroup(
        "",
        *(nodes.colspec(colwidth=1) for _ in names),
        nodes.thead("", head),
        nodes.tbody("", *(nodes.row("", *row) for row in rows)),
        cols=len(names),
    )
    return nodes.container(
        "", nodes.table("", group, classes=[kind]), classes=["wide-table"]
    )


def small(text: str) -> nodes.Node:
    return nodes.inline(text=text, classes=["small"])


def claim_row(row: dict, number: nodes.Node | str) -> list[nodes.entry]:
    """One claim with its verdict, as a row of a table."""
    verdict = row["verdict"]
    badge = nodes.strong(
        text=f"{SIGNS.get(verdict, '?')} {verdict}",
        classes=["verdict", f"verdict-{verdict.replace(' ', '-')}"],
    )
    return [
        cell(number, label="number"),
        cell(row["claim"], small(row["source"]), label="claim"),
        cell(row["measured"], small(f"{row['lane']} lane"), label="measured"),
        cell(badge, row.get("correction", ""), label="verdict"),
    ]


class ClaimsLedger(SphinxDirective):
    """All claims that the chapters settled, by number."""

    def run(self) -> list[nodes.Node]:
        self.env.metadata[self.env.docname]["runs"] = digest_of_all(self.env.srcdir)
        rows = [(row, r) for r in runs(self.env.srcdir) for row in r.verdicts]
        rows.sort(key=lambda pair: [int(n) for n in re.findall(r"\d+", pair[0]["id"])])
        seen: dict[str, str] = {}
        for row, run in rows:
            if row["id"] in seen:
                self.warn(f"claim {row['id']}: in {seen[row['id']]} and {run.docname}")
            seen[row["id"]] = run.docname
            if row["verdict"] not in VERDICTS:
                self.warn(f"claim {row['id']}: no such verdict: {row['verdict']!r}")
        if not rows:
            return [nodes.paragraph(text="No chapter has settled a claim yet.")]
        names = ["No.", "Claim", "Measured", "Verdict"]
        return [
            table(
                names,
                [claim_row(row, link(run.docname, row["id"])) for row, run in rows],
                "claims-ledger",
            )
        ]

    def warn(self, text: str) -> None:
        logger.warning(text, location=self.get_location(), type="claims")


class ExecutionTable(SphinxDirective):
    """How each executed page was run."""

    def run(self) -> list[nodes.Node]:
        self.env.metadata[self.env.docname]["runs"] = digest_of_all(self.env.srcdir)
        rows = [self.row(run) for run in runs(self.env.srcdir) if run.about]
        names = ["Page", "Time", "Memory", "Lane", "Device", "Versions", "Date"]
        return [table(names, rows, "execution-table")]

    def row(self, run: Run) -> list[nodes.entry]:
        about = run.about
        return [
            cell(link(run.docname), label="page"),
            cell(duration(float(about["seconds"])), label="time"),
            cell(size(float(about["memory"])), label="memory"),
            cell(about["lane"], label="lane"),
            cell(about["device"], label="device"),
            cell(versions(about), label="versions"),
            cell(about["date"], label="date"),
        ]


class RunRole(SphinxRole):
    """One fact about the run of the page it stands on."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        about = Run(self.env.srcdir, self.env.docname).about
        if self.text == "time" and about:
            return [nodes.Text(duration(float(about["seconds"])))], []
        if self.text not in about:
            text = f"run: nothing is known about {self.text!r} here"
            logger.warning(text, location=self.get_location(), type="run")
        return [nodes.Text(str(about.get(self.text, "?")))], []


def cost(about: dict[str, str]) -> str:
    """The time and the memory that a run took."""
    return f"{duration(float(about['seconds']))} and {size(float(about['memory']))}"


def summary(about: dict[str, str]) -> str:
    """What a reader may want to know first of a run."""
    lane = f"{about['lane']} lane"
    return f"{cost(about)} to run · {lane} · {about['device']} · {about['date']}"


def versions(about: dict[str, str]) -> str:
    names = ("jax", "flowjax", "equinox", "optax")
    return ", ".join(f"{n} {about[n]}" for n in names if n in about)


class run_line(nodes.Invisible, nodes.Element):
    """What a chapter's run took; invisible to all but the HTML writer."""


def visit_run_line(self, node: run_line) -> None:
    text = self.encode(node["text"])
    self.body.append(f'<p class="run-line"><a href="#how-it-was-run">{text}</a></p>\n')
    raise nodes.SkipNode


def skip(self, node: run_line) -> None:
    raise nodes.SkipNode


def add_run_note(app, doctree: nodes.document) -> None:
    """Close an executed page with a line on how it was run."""
    run = Run(app.srcdir, app.env.docname)
    if not run.bytes:
        return
    app.env.metadata[app.env.docname]["run"] = run.digest
    about = run.about
    section = next(iter(doctree.findall(nodes.section)), None)
    if section is None or not about:
        return
    text = (
        f"The numbers and figures of this page come from one run in the "
        f"{about['lane']} lane on {about['date']}: {about['device']}; "
        f"{cost(about)}; Python {about['python']}, {versions(about)}."
    )
    foot = nodes.container("", nodes.paragraph(text=text), classes=["run-note"])
    foot["ids"] = ["how-it-was-run"]
    section += foot
    if re.match(r"book/\d\d_", app.env.docname):
        title = next(iter(section.findall(nodes.title)))
        section.insert(section.index(title) + 1, run_line(text=summary(about)))


def outdated(app, env, added, changed, removed) -> list[str]:
    """The pages that tell of a run which is no longer the one they were made from."""
    everything = digest_of_all(env.srcdir)
    found = []
    for docname in env.all_docs:
        known = env.metadata[docname]
        stale = "runs" in known and known["runs"] != everything
        if stale or (
            "run" in known and known["run"] != Run(env.srcdir, docname).digest
        ):
            found.append(docname)
    return found


def setup(app) -> dict:
    app.add_node(run_line, html=(visit_run_line, None), latex=(skip, None))
    app.add_directive("claims-ledger", ClaimsLedger)
    app.add_directive("execution-table", ExecutionTable)
    app.add_role("run", RunRole())
    app.connect("doctree-read", add_run_note)
    app.connect("env-get-outdated", outdated)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
