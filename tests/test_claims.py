import re
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1] / "book"


def test_a_claim_carries_the_number_of_its_chapter_and_stands_once():
    for path in sorted(BOOK.glob("[0-9][0-9]_*.md")):
        text = path.read_text(encoding="utf-8")
        claims = re.findall(r"""["']?id["']?[:=]\s*["'](\d\d\.\d+)""", text)
        assert all(claim.startswith(path.name[:2]) for claim in claims)
        assert len(claims) == len(set(claims))
