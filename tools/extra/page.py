"""The coordinator's page in a real browser against a live run: values change, curves grow, events come, both
themes, a phone's width, no outside requests, no console errors. Screenshots go to the directory given.

    python tools/extra/page.py target/release SCREENSHOTS
"""

import pathlib
import shutil
import subprocess
import sys

from live import launched, waited
from playwright.sync_api import expect, sync_playwright

binaries, pictures = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
pictures.mkdir(parents=True, exist_ok=True)


def look_at(page, name, scheme, width, height):
    """Nothing sticks out of the window, and the text stands out from the ground."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(300)
    too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert too_wide <= 0, f"{name}: {too_wide} px wider than the window"
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, ground = [sum(int(part) for part in c[c.index("(") + 1 : -1].split(",")[:3]) for c in colours]
    assert (text > ground) == (scheme == "dark") and abs(text - ground) > 300, f"{name}: {colours}"
    page.screenshot(path=pictures / f"{name}.png", full_page=True)


with launched(binaries, workers=3) as run:
    address = run.wait_for("run_started")["page"]
    run.wait_for("validated", 2)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        complaints, asked = [], []
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.locator("#run")).to_have_text("demo")
        expect(page.locator("#team tr")).to_have_count(3)
        expect(page.locator("#sample")).to_be_visible()
        assert page.locator("#sample").evaluate("image => image.complete && image.naturalWidth > 0")

        step = lambda: int(page.locator("#figures b").first.inner_text().replace(",", ""))
        points = lambda: page.locator("#loss path").get_attribute("d").count("L")
        before, drawn = step(), points()
        waited("change of the page's step", lambda: step() > before and points() > drawn, 30)

        subprocess.run(["kill", "-9", run.workers()[0]], check=True)
        expect(page.locator("#events")).to_contain_text("worker left", timeout=30_000)
        expect(page.locator("#trouble")).to_contain_text("last trouble", timeout=30_000)
        expect(page.locator("#events")).to_contain_text("world_size 3", timeout=60_000)
        expect(page.locator("#team tr")).to_have_count(3)
        page.wait_for_timeout(6000)

        for scheme in ("light", "dark"):
            look_at(page, f"page-{scheme}", scheme, 1200, 900)
            look_at(page, f"phone-{scheme}", scheme, 360, 740)

        run.process.terminate()
        expect(page.locator("#phase")).to_have_text("stopped", timeout=30_000)
        # When the server is gone, the browser says so itself; that is no fault of the page's.
        faults = [text for text in complaints if "ERR_CONNECTION_REFUSED" not in text and "ERR_INCOMPLETE" not in text]
        assert not faults, faults
        outside = [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))]
        assert not outside, outside
        browser.close()
print(f"page: ok; screenshots in {pictures}")
