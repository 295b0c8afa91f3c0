"""Let a proof be folded.

sphinx-proof gives ``{prf:proof}`` no title, and the script that folds ``:class:
dropdown`` boxes fails on a box without one, so that nothing after it folds either.
"""

from docutils import nodes
from sphinx_proof.nodes import proof_node


def add_titles(app, doctree: nodes.document) -> None:
    for proof in doctree.findall(proof_node):
        for box in proof.findall(nodes.admonition):
            if "dropdown" not in box["classes"]:
                continue
            first = next(iter(box.findall(nodes.Text)), None)
            if first is not None and first.startswith("Proof. "):
                first.parent.replace(first, nodes.Text(first.removeprefix("Proof. ")))
            box.insert(0, nodes.title("", "Proof"))


def setup(app) -> dict:
    app.connect("doctree-read", add_titles)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
