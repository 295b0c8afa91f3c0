"""What the trials found, as the tables of the page on trust.

    make trust

Makes ``results/trust.md`` anew from the other files of ``results``; each of them is
written by the trial that its table names.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LEFT, RIGHT = ":--", "--:"

Line = tuple[str, str, str]
"""What a trial is, how much of it was tried, and how it came out."""


def main() -> None:
    """Write the page's tables."""
    (RESULTS / "trust.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """All that the page includes, as MyST: of each trial that has a result."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    parts = {"overview": overview(found)}
    makers = {
        "cases": ("fuzz", cases),
        "bugs": ("bugs_fuzz", mended),
        "large": ("long_and_large", large),
        "same": ("same_numbers", same),
        "mutants": ("mutation", faults),
    }
    for name, (trial, make) in makers.items():
        if trial in found:
            parts[name] = make(found[trial])
    return "\n\n".join(f"<!-- {name} -->\n\n{of}" for name, of in parts.items()) + "\n"


def table(
    name: str, caption: str, head: dict[str, str], rows: Iterable[Iterable[Any]]
) -> str:
    """A table with a name and a caption; ``head`` says how columns are set."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    lines = [[*head], [*head.values()], *cells]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f":::{{table}} {caption}\n:name: {name}\n\n{body}\n:::"


def number(value: float) -> str:
    """With commas where it is whole, else with three digits."""
    whole = f"{value:,.0f}"
    return whole if value == round(value) or value >= 1000 else f"{value:.3g}"


def share(value: float) -> str:
    """In per cent."""
    return f"{100 * value:.1f} %"


def overview(found: dict[str, Any]) -> str:
    """A line for each trial, with when and at which commit it ran."""
    rows = (
        (*line(found[trial]), found[trial]["date"], f"`{found[trial]['commit']}`")
        for trial, line in LINES.items()
        if trial in found
    )
    return table(
        "tab-trust",
        "What was tried, and how it came out.",
        dict.fromkeys(("trial", "tried", "outcome", "on", "commit"), LEFT),
        rows,
    )


def fuzz_line(of: dict[str, Any]) -> Line:
    """Of random cases."""
    tried = f"{number(of['cases'])} cases of {len(of['kinds'])} kinds"
    undocumented = number(of["outcomes"]["undocumented"])
    return "random cases", tried, f"{undocumented} undocumented outcomes"


def fit_line(of: dict[str, Any]) -> Line:
    """Of kills of training."""
    same, ends = of["ends_with_the_same_bits"], of["ends"]
    outcome = f"{same} of {ends} runs end in the same bits"
    return "training killed", f"{of['kills']} kills", outcome


def book_line(of: dict[str, Any]) -> Line:
    """Of kills of a build."""
    outcome = (
        f"{of['differing']} next builds differ, {of['half_built_taken_for_whole']} "
        "half-built sites taken for whole"
    )
    return "building killed", f"{of['kills']} kills", outcome


def long_line(of: dict[str, Any]) -> Line:
    """Of memory over many steps."""
    steps = of["parts"]["steps"]
    grown = steps["held_at_the_end_mb"] - steps["held_after_a_tenth_mb"]
    tried = (
        f"{number(steps['steps'])} steps, {number(steps['checkpoints'])} checkpoints"
    )
    outcome = f"{number(grown)} MB more held at the end than after a tenth"
    return "long training", tried, outcome


def same_line(of: dict[str, Any]) -> Line:
    """Of flows trained twice."""
    early = max(row["early"] for row in of["rows"])
    outcome = (
        f"{of['same_bits']} end in the same bits; rounded differently, the first "
        f"{of['early_steps']} losses are within {number(early)} ε"
    )
    return "the same numbers", f"{of['flows']} flows, each twice", outcome


def mutation_line(of: dict[str, Any]) -> Line:
    """Of mutants."""
    outcome = (
        f"{of['killed'] + of['too long']} found, {of['survived']} not, "
        f"{of['equivalent']} compute the same: {share(of['score'])}, 95 % interval "
        f"{share(of['low'])} to {share(of['high'])}"
    )
    return "faults in the code", f"{of['tried']} mutants", outcome


def coverage_line(of: dict[str, Any]) -> Line:
    """Of lines and branches that tests reach."""
    tried = f"{number(of['lines'])} lines, {number(of['branches'])} branches"
    outcome = (
        f"{share(of['lines_covered'] / of['lines'])} of the lines, "
        f"{share(of['branches_covered'] / of['branches'])} of the branches"
    )
    return "coverage by tests", tried, outcome


LINES: dict[str, Callable[[dict[str, Any]], Line]] = {
    "fuzz": fuzz_line,
    "kills_of_fit": fit_line,
    "kills_of_book": book_line,
    "long_and_large": long_line,
    "same_numbers": same_line,
    "mutation": mutation_line,
    "coverage": coverage_line,
}


def cases(fuzz: dict[str, Any]) -> str:
    """The random cases by what was tried, their kinds together."""
    kinds = fuzz["kinds"]
    parents = {name.split(": ")[0] for name in kinds if ": " in name}
    groups: dict[str, list[list[int]]] = {}
    for name, of in kinds.items():
        # where a kind has the name of a group, its cases are arguments of constructors
        bare = f"arguments of {name}" if name in parents else name
        group = name.split(": ")[0] if ": " in name else bare
        groups.setdefault(group, []).append([*of.values()])
    rows = (
        (group, len(of), *(number(sum(column)) for column in zip(*of, strict=True)))
        for group, of in sorted(groups.items())
    )
    head = dict.fromkeys(("kinds", "right", "documented", "neither"), RIGHT)
    return table(
        "tab-trust-cases",
        "Random cases: how many gave a right answer, how many the error or the limit "
        "that the documentation states, and how many neither.",
        {"of": LEFT} | head,
        rows,
    )


def large(result: dict[str, Any]) -> str:
    """Memory and time of the large runs."""
    parts = result["parts"]
    rows = [
        (
            f"{number(part['rows'])} rows of 64, {where}",
            number(part["peak_mb"]),
            number(part["run_seconds"]),
            "same bits" if same_bits(parts) else "OTHER bits",
        )
        for where, part in (
            ("in a file", parts["rows on disk"]),
            ("in memory", parts["rows in memory"]),
        )
    ]
    rows += [
        (
            f'{number(part["blocks"])} blocks, `memory="{part["memory"]}"`',
            number(part["peak_mb"]),
            f"{number(part['seconds_a_step'])} a step",
            f"round trip off by {part['round_trip_error']:.1e}",
        )
        for part in parts.values()
        if "blocks" in part
    ]
    file = number(parts["rows on disk"]["file_mb"])
    return table(
        "tab-trust-large",
        f"Large runs. Memory is the most that the process held of its own beyond what "
        f"it held after the first steps; the file has {file} MB.",
        {"run": LEFT, "memory, MB": RIGHT, "seconds": RIGHT, "outcome": LEFT},
        rows,
    )


def same_bits(parts: dict[str, Any]) -> bool:
    """Whether the rows gave the same flow from the file and from memory."""
    one, other = parts["rows on disk"], parts["rows in memory"]
    return one["fingerprint"] == other["fingerprint"]


def same(result: dict[str, Any]) -> str:
    """How far trainings drift from each other that began as one."""
    rows = (
        (
            f"{row['flow']}, {row['dtype']}",
            row["other"],
            row["runs"],
            number(row["early"]),
            number(row["all"]),
        )
        for row in result["rows"]
    )
    early, steps = (number(result[name]) for name in ("early_steps", "steps"))
    return table(
        "tab-trust-same",
        "Losses of two trainings of one flow: the largest distance, in units of the "
        f"dtype's ε, over the first {early} steps and over all {steps}.",
        {"flow": LEFT, "the other one": LEFT, "runs": RIGHT}
        | dict.fromkeys((f"first {early}", f"all {steps}"), RIGHT),
        rows,
    )


def faults(mutation: dict[str, Any]) -> str:
    """The mutants that no test found."""
    rows = (
        (
            f"{row['module']}: `{row['code']}`",
            f"{row['what'].replace(' -> ', ' → ')}: {row.get('reason', 'not found')}",
        )
        for row in mutation["survivors"]
    )
    return table(
        "tab-trust-mutants",
        "The faults that the run did not find; some of them change nothing.",
        {"module and line": LEFT, "fault, and what became of it": LEFT},
        rows,
    )


def mended(bugs: list[dict[str, str]]) -> str:
    """The bugs that came to light."""
    return table(
        "tab-trust-bugs",
        f"The {len(bugs)} bugs and unstated limits that these trials, the writing of "
        "them and reading brought to light. All are mended, or stated; a bug is a "
        "plain test now.",
        {"what was wrong": LEFT, "how it was mended": LEFT},
        ((bug["what"], bug["fixed"]) for bug in bugs),
    )


if __name__ == "__main__":
    main()
