"""The screenshots of docs/page.md: python dev/screenshots.py [FOLDER]

The page with runs in every state, as the tests make them; the finished one shows the report of
docs/example. Light and dark, desktop and phone, as small PNGs into docs/images.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("support", "server"))]

import app_fixtures as fixtures  # noqa: E402
from test_app_browser import CHROMIUM, FLAGS  # noqa: E402

from quantkit.run.folder import RunDir  # noqa: E402
from quantkit.server.web.visitor import COOKIE  # noqa: E402

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def show_the_example(run: Path) -> None:
    """Give a finished run the measured report, and its file the measured size."""
    example = ROOT / "docs" / "example" / "report.json"
    shutil.copy(example, run / "8-validate" / "report.json")
    n_bytes = json.loads(example.read_text("utf-8"))["outputs"][0]["n_bytes"]
    directory = RunDir(run)
    for record in directory.records().values():
        outputs = tuple(
            dataclasses.replace(output, n_bytes=n_bytes)
            if output.path.endswith(fixtures.GGUF)
            else output
            for output in record.outputs
        )
        directory.save_record(dataclasses.replace(record, outputs=outputs))


def save(page: Page, path: Path) -> None:
    """What is on the screen, in 64 colours: a quarter of the bytes, and no one sees it."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = image.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with (
        tempfile.TemporaryDirectory(prefix="quantkit-shots-") as scratch,
        sync_playwright() as playwright,
        fixtures.serving(Path(scratch, "runs"), schedule=False) as (url, store, visitors),
    ):
        key = visitors.new_key()
        owner = f"visitor:{visitors.check(key)}"
        jobs = fixtures.make_states(store.root, owner, worker.pid)
        show_the_example(store.root / jobs["finished"])
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        for scheme in ("light", "dark"):
            for device, (width, height) in SIZES.items():
                for state in ("empty", "running", "finished"):
                    context = browser.new_context(
                        viewport={"width": width, "height": height},
                        color_scheme=scheme,
                        reduced_motion="reduce",
                    )
                    if state != "empty":
                        context.add_cookies([{"name": COOKIE, "value": key, "url": url}])
                    page = context.new_page()
                    page.goto(url if state == "empty" else f"{url}?job={jobs[state]}")
                    there = "#start" if state == "empty" else "#job-head .qk-head"
                    page.locator(there).first.wait_for()
                    page.wait_for_timeout(900)
                    save(page, folder / f"{state}-{device}-{scheme}.png")
                    context.close()
        browser.close()
    worker.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
