import re
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1] / "book"
SETTLED = {
    path.name: re.findall(r"""["']?id["']?[:=]\s*["'](\d\d\.\d+)""", path.read_text())
    for path in sorted(BOOK.glob("[0-9][0-9]_*.md"))
}


def test_every_chapter_settles_a_claim():
    assert [name for name, claims in SETTLED.items() if not claims] == []


def test_a_claim_carries_the_number_of_its_chapter_and_stands_once():
    for name, claims in SETTLED.items():
        assert all(claim.startswith(name[:2]) for claim in claims)
        assert len(claims) == len(set(claims))
