"""What we add to Sphinx for readers: map, previews, links of names, sitemap."""

import ast
import re
from pathlib import Path

import build_twice
import chapter_map
import code_links
import notebooks
import previews
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = notebooks.ROOT
SITE = ROOT / "_build" / "html"
NUMBERED = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))

built = pytest.mark.skipif(
    not (SITE / "sitemap.xml").exists(), reason="the site has not been built: make book"
)


def soup(text: str) -> BeautifulSoup:
    return BeautifulSoup(text, "html.parser")


# the map


def test_each_chapter_has_its_own_place():
    numbers = {path.stem[:2] for path in NUMBERED}
    assert set(chapter_map.PLACES) == numbers
    assert len(set(chapter_map.PLACES.values())) == len(numbers)
    assert max(numbers) == list(chapter_map.PARTS)[-1]


def test_the_parts_are_those_of_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [notebooks.pages(part) for part in toc["parts"]]
    last = [pages[-1][5:7] for pages in parts if re.match(r"book/\d\d_", pages[-1])]
    assert list(chapter_map.PARTS) == last


def chapter(number: str, *you_need: str) -> chapter_map.Chapter:
    return chapter_map.Chapter(f"book/{number}_x", number, "?", frozenset(you_need))


def test_what_a_needed_chapter_needs_is_not_drawn_again():
    chapters = [chapter("00"), chapter("01", "00"), chapter("02", "00", "01", "fig-1")]
    assert chapter_map.needs(chapters) == {"00": set(), "01": {"00"}, "02": {"01"}}


def test_a_chapter_tells_its_needs(tmp_path):
    path = tmp_path / "01_a_name.md"
    text = (
        "(here)=\n# Why?\n\n**You need** {ref}`this <one>` and {ref}`two`.\n\n{ref}`x`"
    )
    path.write_text(text, encoding="utf-8")
    found = chapter_map.read(path)
    assert (found.name, found.title) == ("A name", "Why?")
    assert found.you_need == {"one", "two"}
    path.write_text("(here)=\n# Why?\n", encoding="utf-8")
    with pytest.raises(ValueError, match="You need"):
        chapter_map.read(path)


def test_the_map_says_in_words_what_it_draws():
    chapters = [chapter_map.read(path) for path in NUMBERED]
    page = soup(chapter_map.draw(chapters, lambda docname: f"{docname}.html"))
    links = page.select("svg a")
    assert [link["href"] for link in links] == [f"book/{p.stem}.html" for p in NUMBERED]
    for link, found in zip(links, chapters, strict=True):
        assert found.title in link["aria-label"]
    assert len(page.select(".arrows path")) == sum(
        len(needed) for needed in chapter_map.needs(chapters).values()
    )


# previews


def preview(markup: str, name: str) -> str:
    page = soup(markup)
    return previews.plain(previews.shown(page.find(id=name)))


def test_previews_show_what_a_link_leads_to():
    section = '<section id="s"><span id="label"></span><h2>T</h2><p>a</p><p>b</p>'
    for name in ("s", "label"):
        assert preview(section, name) == '<p class="preview-title">T</p><p>a</p>'
    term = (
        '<dl><dt id="t">term<a class="headerlink">¶</a></dt><dd><p>a</p><p>b</p></dd>'
    )
    assert preview(term, "t") == "<dt>term</dt><p>a</p>"
    theorem = '<div class="proof admonition" id="thm"><p>a</p></div>'
    assert preview(theorem, "thm") == '<div class="proof admonition"><p>a</p></div>'
    film = (
        '<figure id="f"><div class="film"><img src="1"/><img src="2"/></div></figure>'
    )
    assert preview(film, "f") == '<figure><img src="1"/></figure>'
    assert preview('<div id="other">x</div>', "other") == ""


# names


def test_names_are_followed_to_where_they_are_defined():
    tree = ast.parse("import gauss_flows as gf\nfrom gauss_flows.theory import x as y")
    names = code_links.imported(tree)
    assert names == {"gf": "gauss_flows", "y": "gauss_flows.theory.x"}
    assert code_links.full_name("gf.fit", names) == "gauss_flows.fit"
    assert code_links.full_name("np.exp", names) == ""
    assert code_links.own_name("gauss_flows.fit") == "gauss_flows.train.fit"
    constant = "gauss_flows.mixture.NORMAL"
    assert code_links.own_name(constant) == constant


# the site


@built
def test_names_and_chapters_are_linked_both_ways():
    api = soup((SITE / "book" / "api.html").read_text(encoding="utf-8"))
    used = api.find(id="gauss_flows.train.fit_many").find_next_sibling("dd")
    chapters = {link["href"].split("#")[0] for link in used.select(".used-in a")}
    assert "07_depth_sweep.html" in chapters
    page = soup((SITE / "book" / "07_depth_sweep.html").read_text(encoding="utf-8"))
    assert page.select("pre a.code-link[href='api.html#gauss_flows.train.fit_many']")


@built
def test_the_sitemap_and_the_descriptions_are_whole():
    sitemap = (SITE / "sitemap.xml").read_text(encoding="utf-8")
    for path in (SITE / "book").glob("*.html"):
        assert f"/book/{path.name}</loc>" in sitemap
        head = soup(path.read_text(encoding="utf-8")).head
        assert len(head.title.string) > 20
        described = head.find("meta", attrs={"name": "description"})
        assert len(described["content"]) > 50, path.name
        card = head.find("meta", property="og:image")["content"]
        assert (SITE / "_images/social_previews" / Path(card).name).exists()


def test_folders_are_compared_by_name_and_content(tmp_path):
    for folder, text in (("a", "1"), ("b", "2")):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in" / "same").write_text("x")
        (tmp_path / folder / "other").write_text(text)
        (tmp_path / folder / folder).write_text("x")
    found = build_twice.differing(tmp_path / "a", tmp_path / "b")
    assert found == [Path("a"), Path("b"), Path("other")]
