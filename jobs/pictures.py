"""Make the pictures of the documentation from the demo: docs/demo.jpg and docs/report.jpg.

    python jobs/pictures.py

Runs `samray demo` in a temporary folder. The first picture is the demo's own; the second is the report in Chromium, and
is left out with a message if there is none. Both show photographs that scikit-image brings, see README.md for credits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.cli.main import main as samray_main

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, HEIGHT, SCALE = 1440, 1120, 0.8
"""Size of the window with the report, and the scale of its picture."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the pictures (default: docs/)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "samray-demo"
        code = samray_main(["demo", str(demo), "--no-open"])
        if code:
            return code
        shutil.copyfile(demo / "photographs.jpg", args.docs / "demo.jpg")
        if not screenshot(demo / "labels" / "_samray" / "report.html", args.docs / "report.jpg"):
            print("no Chromium here: report.jpg stays as it is", file=sys.stderr)
    return 0


def screenshot(page: Path, picture: Path) -> bool:
    """Take a picture of a report's masks; False without Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        return False
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root Chromium has none to offer
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        window = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        window.goto(page.as_uri())
        # The figures above are about this machine's speed, and its paths.
        window.evaluate("document.querySelector('#gallery').scrollIntoView()")
        window.wait_for_selector('.gallery[aria-busy="false"]')
        window.screenshot(path=picture, type="jpeg", quality=80)
        browser.close()
    return True


if __name__ == "__main__":
    sys.exit(main())
