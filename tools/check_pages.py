"""Open every built page in headless Chromium and look for what a reader would notice.

Each page is opened on a wide light, a wide dark and a phone screen. It must ask no
other host for anything, log no error, load all it names, render its mathematics, give
each picture an alternative text, and fit the screen. Links within the site must lead
somewhere. `--shots FOLDER` keeps a picture of each.
"""

import argparse
import os
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from serve import SITE, serve

SCREENS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
LOOK = """() => {
  const main = document.querySelector("main") ?? document.body;
  const images = [...main.querySelectorAll("img")];
  const raw = [...main.querySelectorAll(".math")].filter(
    e => !e.querySelector("mjx-container"));
  const end = image => image.src.slice(-60);
  const errors = [...main.querySelectorAll("mjx-merror")];
  return {
    noAlt: images.filter(i => !i.alt.trim()).map(end),
    broken: images.filter(i => i.complete && !i.naturalWidth).map(end),
    raw: raw.map(e => e.textContent.slice(0, 60)),
    merror: errors.map(e => e.textContent.slice(0, 80)),
    overflow: document.documentElement.scrollWidth
      - document.documentElement.clientWidth,
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...main.querySelectorAll("a[href]")].map(a => a.getAttribute("href")),
  };
}"""


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, names)), ""
    )
    if not found:
        sys.exit(
            "check-pages needs Chromium. On Debian, as root: apt-get install chromium; "
            "elsewhere, name it: CHROMIUM=/path/to/it make check-pages"
        )
    return found


def visit(context, base: str, name: str, shot: Path | None) -> tuple[list[str], dict]:
    """What is wrong with one page on one screen, and its ids and links."""
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
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_timeout(300)
    seen = page.evaluate(LOOK)
    faults += [f"picture without alternative text: {i}" for i in seen["noAlt"]]
    faults += [f"picture that does not load: {i}" for i in seen["broken"]]
    faults += [f"mathematics not rendered: {m}" for m in seen["raw"]]
    faults += [f"mathematics with an error: {m}" for m in seen["merror"]]
    if seen["overflow"] > 0:
        faults.append(f"wider than the screen by {seen['overflow']} px")
    if shot:
        page.screenshot(path=shot, full_page=True)
    page.close()
    return faults, seen


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


def main() -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the pages")
    shots = parser.parse_args().shots
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
    browser_path = chromium()
    names = sorted(str(p.relative_to(SITE)) for p in (SITE / "book").glob("*.html"))
    if not names:
        sys.exit("there is no book yet: make book")
    server = serve(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    faults, pages = [], {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox"]
        )
        for screen, options in SCREENS.items():
            context = browser.new_context(**options)
            for name in names:
                shot = shots and shots / f"{Path(name).stem}-{screen}.png"
                found, seen = visit(context, base, name, shot)
                faults += [f"{name} ({screen}): {fault}" for fault in found]
                pages[name] = seen
            context.close()
        browser.close()
    faults += dead_links(pages)
    for fault in dict.fromkeys(faults):
        print(fault)
    print(
        f"pages: {len(pages)} looked at on {len(SCREENS)} screens, {len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
