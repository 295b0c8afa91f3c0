"""Let a proof be folded.

sphinx-proof gives ``{prf:proof}`` no title, and the script that folds ``:class:
dropdown`` boxes fails on a box without one, so that nothing after it folds either.
And all proofs of a page have one name, so that each click folds the first of them.
"""

from docutils import nodes
from sphinx_proof.nodes import proof_node

SAME = ("proof", "proof-content", "exercise-content", "solution-content")


def add_titles(app, doctree: nodes.document) -> None:
    for proof in doctree.findall(proof_node):
        for box in proof.findall(nodes.admonition):
            if "dropdown" not in box["classes"]:
                continue
            first = next(iter(box.findall(nodes.Text)), None)
            if first is not None and first.startswith("Proof. "):
                first.parent.replace(first, nodes.Text(first.removeprefix("Proof. ")))
            box.insert(0, nodes.title("", "Proof"))


def tell_apart(app, doctree: nodes.document) -> None:
    """Number the names that boxes of one kind share."""
    for name in SAME:
        boxes = [n for n in doctree.findall(nodes.Element) if name in n.get("ids", ())]
        for i, box in enumerate(boxes, start=1):
            box["ids"] = [f"{name}-{i}" if own == name else own for own in box["ids"]]


def setup(app) -> dict:
    app.connect("doctree-read", add_titles)
    app.connect("doctree-read", tell_apart)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
