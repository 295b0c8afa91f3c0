"""Open every built page in headless Chromium and look for what a reader would notice.

Each page is opened on a wide light, a wide dark and a phone screen. It must ask no
other host for anything, log no error, load all it names, render its mathematics, give
each picture an alternative text, fit the screen, weigh no more than 2 MB without its
films, and break none of axe-core's rules for WCAG 2.2 AA. Links within the site must
lead somewhere. Then `reader_trials.py` uses the pages. `--shots FOLDER` keeps
a picture of each; `--thorough` shows axe all of each page, code and mathematics too.
"""

import argparse
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import reader_trials
from browser import chromium, launch, settle
from serve import SITE, serve, stop_unless_whole

SCREENS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {
        "color_scheme": "light",
        "viewport": {"width": 390, "height": 844},
        "has_touch": True,
    },
}
HEAVY = 2_000_000  # bytes
LOOK = """() => {
  const main = document.querySelector("main") ?? document.body;
  const images = [...main.querySelectorAll("img")];
  const raw = [...main.querySelectorAll(".math")].filter(
    e => !e.querySelector("mjx-container"));
  const end = image => image.src.slice(-60);
  const errors = [...main.querySelectorAll("mjx-merror")];
  const films = [...main.querySelectorAll(".film")];
  return {
    noAlt: images.filter(i => !i.alt.trim()).map(end),
    broken: images.filter(i => i.complete && !i.naturalWidth).map(end),
    raw: raw.map(e => e.textContent.slice(0, 60)),
    merror: errors.map(e => e.textContent.slice(0, 80)),
    overflow: document.documentElement.scrollWidth
      - document.documentElement.clientWidth,
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...main.querySelectorAll("a[href]")].map(a => a.getAttribute("href")),
    pictures: images.filter(i => !i.closest(".film")).map(i => i.getAttribute("src")),
    unseen: [...main.querySelectorAll("button.copybtn, button.copy-needs")].filter(
      b => matchMedia("(hover: none)").matches && getComputedStyle(b).opacity < 1
    ).length,
    films: films.reduce((sum, film) => sum + film.outerHTML.length, 0),
  };
}"""
# the same on every page or many times on one, and slow to look at: seen on some pages
REPEATED = ["mjx-container", "nav", ".highlight", "dt.sig"]
SAMPLES = ("intro.html", "00_coupling_pattern.html")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
AXE = """([exclude, tags, contrast]) => axe.run({exclude}, {
  resultTypes: ["violations"], runOnly: tags,
  preload: false, // it looks for imported styles where they are not
  rules: {"color-contrast": {enabled: contrast}},
}).then(result => result.violations
  .flatMap(v => v.nodes.map(n => `${v.id}: ${n.target.join(" ")}`)))"""


def axe(page, screen: str, sample: bool) -> list[str]:
    """What axe-core finds; a phone's colours are those of the light screen."""
    from axe_playwright_python.base import AXE_SCRIPT

    page.evaluate(AXE_SCRIPT)
    excluded = [] if sample else [[selector] for selector in REPEATED]
    return page.evaluate(AXE, [excluded, RULES, screen != "phone"])


def visit(
    context, base: str, name: str, screen: str, shots: Path | None, thorough: bool
) -> tuple[list[str], dict]:
    """What is wrong with one page on one screen, and what it holds."""
    faults: list[str] = []
    page = context.new_page()

    def request(request) -> None:
        if not request.url.startswith((base, "data:", "blob:")):
            faults.append(f"asks another host: {request.url}")

    def console(message) -> None:
        if message.type in ("error", "warning"):
            faults.append(f"console {message.type}: {message.text[:200]}")

    page.on("request", request)
    page.on("console", console)
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on(
        "response",
        lambda r: r.status >= 400 and faults.append(f"{r.status} for {r.url}"),
    )
    page.goto(base + name, wait_until="load")
    settle(page)
    seen = page.evaluate(LOOK)
    faults += [f"picture without alternative text: {i}" for i in seen["noAlt"]]
    faults += [f"picture that does not load: {i}" for i in seen["broken"]]
    faults += [f"mathematics not rendered: {m}" for m in seen["raw"]]
    faults += [f"mathematics with an error: {m}" for m in seen["merror"]]
    twice = [name for name, n in Counter(seen["ids"]).items() if n > 1]
    faults += [f"two places of one name: {name}" for name in twice]
    if seen["unseen"]:
        faults.append(f"{seen['unseen']} copy buttons to be seen by pointing only")
    if seen["overflow"] > 0:
        faults.append(f"wider than the screen by {seen['overflow']} px")
    if shots:
        shot = shots / f"{Path(name).stem}-{screen}.png"
        page.screenshot(path=shot, full_page=True)
    sample = thorough or name.endswith(SAMPLES)
    faults += [f"not for everyone: {f}" for f in axe(page, screen, sample)]
    page.close()
    return [f"{name} ({screen}): {fault}" for fault in faults], seen


def look(
    base: str, names: list[str], screen: str, shots: Path | None, thorough: bool
) -> tuple[list[str], dict[str, dict]]:
    """Visit all pages on one screen."""
    from playwright.sync_api import sync_playwright

    faults, pages = [], {}
    with sync_playwright() as playwright:
        context = launch(playwright).new_context(**SCREENS[screen])
        for name in names:
            found, pages[name] = visit(context, base, name, screen, shots, thorough)
            faults += found
        context.close()
    return faults, pages


def dead_links(pages: dict[str, dict]) -> list[str]:
    """Links within the site that lead to no file or no place."""
    faults = []
    for name, seen in pages.items():
        for href in seen["links"]:
            url, anchor = urldefrag(urljoin(f"site:///{name}", href))
            if not url.startswith("site:///"):
                continue
            target = unquote(url.removeprefix("site:///"))
            if not (SITE / target).is_file():
                faults.append(f"{name}: leads to nothing: {href}")
            elif anchor and target in pages and anchor not in pages[target]["ids"]:
                faults.append(f"{name}: leads to no such place: {href}")
    return faults


def weight(name: str, seen: dict) -> int:
    """Bytes of a page and its pictures, without its films."""
    files = {urljoin(f"/{name}", source) for source in seen["pictures"]}
    local = [SITE / unquote(file[1:]) for file in files if file.startswith("/")]
    own = (SITE / name).stat().st_size - seen["films"]
    return own + sum(path.stat().st_size for path in local)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the pages")
    parser.add_argument("--thorough", action="store_true", help="show axe everything")
    options = parser.parse_args()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    chromium()
    stop_unless_whole()
    names = sorted(str(p.relative_to(SITE)) for p in (SITE / "book").glob("*.html"))
    server = serve(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    with ThreadPoolExecutor(2) as pool:  # halves, lest the third screen has one core
        looks = [
            pool.submit(look, base, half, screen, options.shots, options.thorough)
            for screen in SCREENS
            for half in (names[::2], names[1::2])
        ]
        found = [one.result() for one in looks]
    faults = [fault for part, _ in found for fault in part]
    pages = found[0][1] | found[1][1]
    faults += dead_links(pages)
    # alone, because they measure
    trial_faults, paints = reader_trials.run(base, names)
    faults += trial_faults
    for name in names:
        size = weight(name, pages[name])
        print(f"{name}: {size / 1e3:.0f} kB, first paint {paints[name]:.0f} ms")
        if size > HEAVY:
            faults.append(f"{name}: weighs {size / 1e6:.1f} MB")
    for fault in dict.fromkeys(faults):
        print(fault)
    print(
        f"pages: {len(pages)} looked at on {len(SCREENS)} screens, {len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
