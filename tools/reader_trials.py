"""Use the built pages as a reader does: wait, copy, slide, unfold, search, hover.

`check_pages.py` runs this. The first paint is timed on a processor slowed down to that
of a cheap phone: as many times as this machine is faster, busy as it is just then.
"""

import json

from browser import launch, settle
from serve import SITE

LATEST = 1500  # milliseconds until the first paint
PHONE = 100  # milliseconds of WORK on the phone: four times those of a fast desktop
WORK = """() => {
  const begin = performance.now();
  const words = Array.from({length: 40000}, (_, i) => (i * 7919 % 65537).toString(36));
  const seen = new Map(words.sort().map((word, i) => [word, i]));
  words.forEach(word => seen.delete(word));
  return performance.now() - begin;
}"""
SEARCHES = {  # what is asked, and where the answer must be among the first five
    "coupling_flow": "book/api.html#gauss_flows.stack.coupling_flow",
    "banach_inverse": "book/api.html#gauss_flows.residual.banach_inverse",
    "fit_many": "book/api.html#gauss_flows.train.fit_many",
    "Householder reflection": "book/glossary.html",
    "condition number": "book/glossary.html",
    "Four factors": "book/12_linear_maps.html",
    "universal three couplings": "book/13_three_couplings.html",
    "depth sweep held-out spiral": "book/07_depth_sweep.html",
    "Banach iteration inverse": "book/16_banach_residual.html",
    "held-out loss fixed mask alternating masks": "book/03_masks.html",
}
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def first_paint(browser, url: str) -> float:
    """Milliseconds until a page that is opened for the first time shows something."""
    context = browser.new_context()
    page = context.new_page()
    session = context.new_cdp_session(page)
    slower = PHONE / min(page.evaluate(WORK) for _ in range(5))
    session.send("Emulation.setCPUThrottlingRate", {"rate": max(slower, 1)})
    page.goto(url, wait_until="commit")
    found = page.wait_for_function(PAINT).json_value()
    context.close()
    return found


def code_of(name: str) -> list[str]:
    """The code cells that ran for a page, in order."""
    path = SITE / "notebooks" / name.replace(".html", ".ipynb")
    if not path.exists():
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]).strip() for c in cells if c["cell_type"] == "code"]


def copy(page, name: str) -> list[str]:
    """The button of a page's first cell must give its code, as it ran, and no more."""
    if not (sources := code_of(name)):
        return []
    cell = page.locator("div.highlight-ipython3:visible").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    return [] if copied.strip() in sources else [f"copies what is no cell: {copied!r}"]


def bring(page, name: str) -> list[str]:
    """The second button must give two whole cells or more, in their order."""
    button = page.locator("button.copy-needs:visible").last
    if not button.count():
        return []
    button.click()
    rest = page.evaluate("() => navigator.clipboard.readText()").strip()
    given = 0
    for source in code_of(name):
        if source and rest.startswith(source):
            rest, given = rest.removeprefix(source).strip(), given + 1
    return [] if given > 1 and not rest else [f"brings along what is no cell: {rest!r}"]


def slide(page) -> list[str]:
    """Each slider must change what stands around it."""
    faults = []
    for slider in page.locator("input[type=range]").all():
        around = slider.locator("xpath=ancestor::*[@role='group'][1]")
        before = around.evaluate("e => e.outerHTML")
        slider.focus()
        slider.press("End")
        page.wait_for_timeout(200)
        if around.evaluate("e => e.outerHTML") == before:
            label = slider.get_attribute("aria-label")
            faults.append(f"a slider moves nothing: {label}")
    return faults


def unfold(page) -> list[str]:
    """Proofs and solutions must be folded, and open when clicked."""
    boxes = page.locator(".admonition.dropdown")
    if boxes.count() > page.locator(".admonition.dropdown.toggle-hidden").count():
        return ["a proof or solution is not folded"]
    for box in boxes.all():
        box.locator(".admonition-title").first.click()
        if "toggle-hidden" in (box.get_attribute("class") or ""):
            return [f"does not open: {box.get_attribute('id')}"]
    return []


def search(page, base: str) -> list[str]:
    """Each search must find its page."""
    faults = []
    for words, wanted in SEARCHES.items():
        page.goto(f"{base}search.html?q={words}")
        page.wait_for_selector("#search-results li a")
        page.wait_for_timeout(500)
        found = page.locator("#search-results > ul > li > a").evaluate_all(
            "links => links.slice(0, 5).map(a => a.getAttribute('href'))"
        )
        if not any(link.split("?")[0].startswith(wanted) for link in found):
            faults.append(f"search for {words!r} gives not {wanted} but {found}")
    return faults


def preview(page, base: str) -> list[str]:
    """A link to a term must tell its meaning, and stop when asked."""
    page.goto(f"{base}book/intro.html")
    page.locator("article a[href='glossary.html#term-Jacobian']").first.hover()
    box = page.locator("#preview:not([hidden])")
    box.wait_for(timeout=5000)
    text = box.inner_text()
    page.keyboard.press("Escape")
    if "first derivatives" in text and not box.count():
        return []
    return [f"book/intro.html: the preview of a term says {text!r}, or stays"]


def attempt(trial, *args) -> list[str]:
    """What a trial finds; one that breaks off, at a missing button say, is a fault."""
    from playwright.sync_api import Error

    try:
        return trial(*args)
    except Error as error:
        return [f"{trial.__name__}: {str(error).splitlines()[0]}"]


def run(base: str, names: list[str]) -> tuple[list[str], dict[str, float]]:
    """What goes wrong in a reader's hands, and each page's first paint."""
    from playwright.sync_api import sync_playwright

    faults, paints = [], {}
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for name in names:
            paints[name] = first_paint(browser, base + name)
            for _ in range(2):  # another program may have been in the way
                if paints[name] > LATEST:
                    again = first_paint(browser, base + name)
                    paints[name] = min(paints[name], again)
            if paints[name] > LATEST:
                faults.append(f"{name}: first paint after {paints[name]:.0f} ms")
        page = browser.new_context(
            permissions=["clipboard-read", "clipboard-write"]
        ).new_page()
        for name in names:
            page.goto(base + name, wait_until="load")
            settle(page)
            found = attempt(copy, page, name) + attempt(bring, page, name)
            found += attempt(slide, page) + attempt(unfold, page)
            faults += [f"{name}: {fault}" for fault in found]
        faults += attempt(search, page, base) + attempt(preview, page, base)
        browser.close()
    return faults, paints
