"""What the trials found, as the tables of the page on trust.

    make trust

Makes ``results/trust.md`` anew from the other files of ``results``; each of them is
written by the trial that its table names.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LEFT, RIGHT = ":--", "--:"


def main() -> None:
    """Write the page's tables."""
    (RESULTS / "trust.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """All that the page includes, as MyST."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    bugs = found.pop("bugs_fuzz")
    parts = {
        "overview": overview(found),
        "cases": cases(found["fuzz"]),
        "bugs": mended(bugs),
        "large": large(found["long_and_large"]),
        "mutants": faults(found["mutation"]),
    }
    return "\n\n".join(f"<!-- {name} -->\n\n{of}" for name, of in parts.items()) + "\n"


def table(
    name: str, caption: str, head: dict[str, str], rows: Iterable[Iterable[Any]]
) -> str:
    """A table with a name and a caption; ``head`` says how columns are set."""
    lines = [[*head], [*head.values()], *rows]
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
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
    fuzz, fit, book = found["fuzz"], found["kills_of_fit"], found["kills_of_book"]
    mutation, covered = found["mutation"], found["coverage"]
    steps = found["long_and_large"]["parts"]["steps"]
    grown = steps["held_at_the_end_mb"] - steps["held_after_a_tenth_mb"]
    killed = mutation["killed"] + mutation["too long"]
    lines = [
        (
            "random cases",
            f"{number(fuzz['cases'])} cases of {len(fuzz['kinds'])} kinds",
            f"{number(fuzz['outcomes']['undocumented'])} undocumented outcomes",
            fuzz,
        ),
        (
            "training killed",
            f"{fit['kills']} kills",
            f"{fit['ends_with_the_same_bits']} of {fit['ends']} runs end in the same "
            "bits",
            fit,
        ),
        (
            "building killed",
            f"{book['kills']} kills",
            f"{book['differing']} next builds differ, "
            f"{book['half_built_taken_for_whole']} half-built sites taken for whole",
            book,
        ),
        (
            "long training",
            f"{number(steps['steps'])} steps, {number(steps['checkpoints'])} "
            "checkpoints",
            f"{number(grown)} MB more held at the end than after a tenth",
            found["long_and_large"],
        ),
        (
            "faults in the code",
            f"{mutation['tried']} mutants",
            f"{killed} found, {mutation['survived']} not, {mutation['equivalent']} "
            f"compute the same: {share(mutation['score'])}, 95 % interval "
            f"{share(mutation['low'])} to {share(mutation['high'])}",
            mutation,
        ),
        (
            "coverage by tests",
            f"{number(covered['lines'])} lines, {number(covered['branches'])} branches",
            f"{share(covered['lines_covered'] / covered['lines'])} of the lines, "
            f"{share(covered['branches_covered'] / covered['branches'])} of the "
            "branches",
            covered,
        ),
    ]
    return table(
        "tab-trust",
        "What was tried, and how it came out.",
        dict.fromkeys(("trial", "tried", "outcome", "on", "commit"), LEFT),
        (
            (what, tried, outcome, of["date"], f"`{of['commit']}`")
            for what, tried, outcome, of in lines
        ),
    )


def cases(fuzz: dict[str, Any]) -> str:
    """The random cases by kind."""
    return table(
        "tab-trust-cases",
        "Random cases by kind: how many gave a right answer, how many the error or the "
        "limit that the documentation states, and how many neither.",
        {"kind": LEFT, "right": RIGHT, "documented": RIGHT, "neither": RIGHT},
        ((kind, *map(number, of.values())) for kind, of in fuzz["kinds"].items()),
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
        f"it held when training began; the file has {file} MB.",
        {"run": LEFT, "memory, MB": RIGHT, "seconds": RIGHT, "outcome": LEFT},
        rows,
    )


def same_bits(parts: dict[str, Any]) -> bool:
    """Whether the rows gave the same flow from the file and from memory."""
    one, other = parts["rows on disk"], parts["rows in memory"]
    return one["fingerprint"] == other["fingerprint"]


def faults(mutation: dict[str, Any]) -> str:
    """The mutants that no test found."""
    rows = (
        (
            f"`{row['module']}`",
            f"`{row['code']}`",
            row["what"],
            row.get("reason", "not found"),
        )
        for row in mutation["survivors"]
    )
    return table(
        "tab-trust-mutants",
        "Faults that no test found, and those of them that change nothing.",
        {"module": LEFT, "code": LEFT, "fault": LEFT, "why": LEFT},
        rows,
    )


def mended(bugs: list[dict[str, str]]) -> str:
    """The bugs that came to light."""
    return table(
        "tab-trust-bugs",
        f"The {len(bugs)} bugs that these trials and the writing of them brought to "
        "light, all mended; each is a plain test now.",
        {"what was wrong": LEFT, "how it was mended": LEFT},
        ((bug["what"], bug["fixed"]) for bug in bugs),
    )


if __name__ == "__main__":
    main()
