"""The system's Chromium, driven by Playwright."""

import os
import shutil
import sys


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


def launch(playwright):
    return playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


def settle(page) -> None:
    """Wait until a page has set its mathematics."""
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_timeout(300)
