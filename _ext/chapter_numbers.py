"""Give each chapter the number of its file, and its figures and theorems too.

`book/07_depth_sweep.md` is chapter 07 and holds figures 07.1, 07.2 and so on, however
many of the other chapters are there. Sphinx itself would count the pages that exist.
"""

import re

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector


def assign_section_numbers(self, env) -> list[str]:
    """Number the pages by their file names; in the place of Sphinx's own method."""
    old, env.toc_secnumbers = env.toc_secnumbers, {}
    for docname, toc in env.tocs.items():
        chapter = re.match(r"book/(\d\d)_", docname)
        if not chapter:
            continue
        number = (chapter[1],)
        numbers = env.toc_secnumbers[docname] = {}
        for reference in toc.findall(nodes.reference):
            own = number if reference["anchorname"] == "" else None
            numbers[reference["anchorname"]] = reference["secnumber"] = own
        env.titles[docname]["secnumber"] = number
    changed = {**old, **env.toc_secnumbers}
    return [page for page in changed if old.get(page) != env.toc_secnumbers.get(page)]


def setup(app) -> dict:
    TocTreeCollector.assign_section_numbers = assign_section_numbers
    return {"parallel_read_safe": True, "parallel_write_safe": True}
