"""Open reports in a headless browser: all figures drawn, no console error, nothing of a network.

    python -m tools.check_report runs/demo/report.html [...]

A copy of the page is opened under a content security policy that allows images and styles inside
of the page alone, with a script that writes down what happened: images without pixels, errors,
console messages, what the policy blocked, resources that were asked for. Needs Chromium or Chrome
(Debian: apt-get install chromium); without one it says so and exits with status 2.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_MARK = "esr-check"
_WATCH = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>
const found = [];
addEventListener("error", e => found.push(e.message || "failed: " + e.target.tagName), true);
addEventListener("securitypolicyviolation", e => found.push("asked for " + e.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...all) => found.push(all.join(" "));
addEventListener("load", () => {
  const images = [...document.images];
  for (const image of images)
    if (!image.complete || !image.naturalWidth || !image.getBoundingClientRect().width)
      found.push("not drawn: " + image.alt);
  for (const entry of performance.getEntriesByType("resource"))
    if (!entry.name.startsWith("data:")) found.push("asked for " + entry.name);
  const mark = document.createElement("pre");
  mark.id = "esr-check";
  mark.textContent = encodeURIComponent(JSON.stringify({images: images.length, found}));
  document.body.append(mark);
});
</script>"""


class NoBrowserError(RuntimeError):
    """There is no Chromium on this machine."""


def browser() -> str:
    """Path of a Chromium.

    Raises:
        NoBrowserError: none is installed.
    """
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    raise NoBrowserError(f"no browser: none of {', '.join(BROWSERS)} is installed")


def problems(page: Path) -> tuple[int, list[str]]:
    """The number of images of a page, and what went wrong when it was opened.

    Raises:
        NoBrowserError: none is installed.
        RuntimeError: the browser did not show the page.
    """
    program = browser()
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        watched, count = re.subn("<head>", lambda m: m[0] + _WATCH, text, count=1)
        if not count:
            raise RuntimeError(f"{page}: no <head>")
        copy.write_text(watched, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=20000"]
        shown = subprocess.run(
            [program, *options, "--dump-dom", copy.as_uri()],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    mark = re.search(f'<pre id="{_MARK}">(.*?)</pre>', shown.stdout, re.DOTALL)
    if mark is None:
        raise RuntimeError(f"{page}: {program} did not show it: {shown.stderr[-500:]}")
    result = json.loads(unquote(mark[1]))
    return result["images"], result["found"]


def main(pages: list[str]) -> int:
    """Check each page and say what was found; the exit status."""
    if not pages:
        print(__doc__)
        return 2
    wrong = False
    for page in pages:
        try:
            images, found = problems(Path(page))
        except NoBrowserError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{page}: {images} images, {'; '.join(found) or 'no problem'}")
        wrong |= bool(found) or not images
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
