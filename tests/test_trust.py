"""The page on trust shows the trials' results, and these say where they come from."""

import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "trials/results"
FOUND = {
    path.stem: json.loads(path.read_text())
    for path in sorted(RESULTS.glob("*.json"))
    if path.stem not in ("bugs_fuzz", "contract")
}


@pytest.fixture(scope="module")
def trust_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "trials"))
        import trust_page

        yield trust_page
    sys.modules.pop("trust_page")


def test_the_tables_are_those_of_the_results(trust_page):
    assert (RESULTS / "trust.md").read_text() == trust_page.page(RESULTS)


def test_the_page_takes_in_each_part_once():
    marks = re.findall(r"<!-- \w+ -->", (RESULTS / "trust.md").read_text())
    text = (ROOT / "book/trust.md").read_text()
    assert re.findall(r':start-after: "(.*)"', text) == marks
    assert re.findall(r':end-before: "(.*)"', text) == marks[1:]


@pytest.mark.parametrize("name", FOUND)
def test_a_result_says_when_and_of_what_it_is(name):
    result = FOUND[name]
    assert date.fromisoformat(result["date"]) <= date.today()
    assert re.fullmatch(r"[0-9a-f]{12}", result["commit"])
    assert result["versions"]
    assert result["machine"]["processor"]


def of(name):
    """A trial's result; trials take long, and not each has been run."""
    return pytest.mark.skipif(name not in FOUND, reason=f"no result of {name} yet")


@of("fuzz")
def test_no_random_case_was_neither_right_nor_documented():
    kinds = FOUND["fuzz"]["kinds"].values()
    assert sum(sum(kind.values()) for kind in kinds) == FOUND["fuzz"]["cases"]
    assert FOUND["fuzz"]["outcomes"]["undocumented"] == 0


@of("kills_of_fit")
def test_no_kill_of_training_changed_a_bit():
    result = FOUND["kills_of_fit"]
    assert 0 < result["ends"] == result["ends_with_the_same_bits"]


@of("kills_of_book")
def test_no_kill_of_a_build_changed_a_page():
    result = FOUND["kills_of_book"]
    assert 0 < result["kills"] == len(result["rows"])
    assert result["differing"] == result["half_built_taken_for_whole"] == 0


@of("long_and_large")
def test_rows_from_a_file_train_the_same_flow_in_less_memory(trust_page):
    parts = FOUND["long_and_large"]["parts"]
    assert trust_page.same_bits(parts)
    on_disk, in_memory = parts["rows on disk"], parts["rows in memory"]
    assert on_disk["peak_mb"] < on_disk["file_mb"] < in_memory["peak_mb"]


def test_a_result_that_is_there_has_its_line(trust_page):
    shown = trust_page.page(RESULTS)
    for name, result in FOUND.items():
        assert " | ".join(trust_page.LINES[name](result)) in shown
