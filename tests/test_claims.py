import re
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1] / "book"
UNTESTED = re.findall(
    r"^\* - (\d\d\.\d+)$", (BOOK / "claims.md").read_text("utf-8"), re.M
)
SETTLED = {
    claim: path.name
    for path in sorted(BOOK.glob("[0-9][0-9]_*.md"))
    for claim in re.findall(r"""["']?id["']?[:=]\s*["'](\d\d\.\d+)""", path.read_text())
}


def test_untested_claims_are_numbered_once_and_in_order():
    keys = [tuple(map(int, claim.split("."))) for claim in UNTESTED]
    assert keys
    assert keys == sorted(set(keys))


def test_a_claim_leaves_the_list_when_a_chapter_settles_it():
    assert not set(UNTESTED) & set(SETTLED)


def test_a_written_chapter_leaves_none_of_its_claims_untested():
    written = {path.name[:2] for path in BOOK.glob("[0-9][0-9]_*.md")}
    assert not {claim for claim in UNTESTED if claim[:2] in written}


def test_a_claim_carries_the_number_of_its_chapter():
    assert all(name.startswith(claim[:2]) for claim, name in SETTLED.items())
