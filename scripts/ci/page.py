"""A page in headless Chromium, for the checks beside this file: a script that looks at it, and a screenshot.

Python's standard library and the command `chromium` are all it needs.
"""

import html
import json
import pathlib
import re
import subprocess
import sys
import tempfile

# Fetches anything but what is in the page itself.
FOREIGN = re.compile(r'(?:src|href)="(?!data:)')

# Runs once the page is whole; what `look()` returns is written into the page.
PROBE = """
<script>
function look() {
%s
}
window.addEventListener('load', () => {
  const pre = document.createElement('pre');
  pre.id = 'probe';
  pre.textContent = JSON.stringify(look());
  document.body.append(pre);
});
</script>
"""


def chromium(profile, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={profile}", "--window-size=1200,1600"]
    done = subprocess.run(["chromium", *flags, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"chromium failed: {done.stderr[-2000:]}")
    return done.stdout


def look(path, body, screenshot=None, dark=False):
    """The page's text, and what the JavaScript function body returns in a copy of the page that Chromium has laid out.
    Ends the program if the page does not load."""
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy = folder / path.name
        copy.write_text(page.replace("</body>", PROBE % body + "</body>"), encoding="utf-8")
        dom = chromium(folder / "profile", "--dump-dom", copy.as_uri())
        if screenshot:
            scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
            chromium(folder / "profile", *scheme, f"--screenshot={screenshot.resolve()}", path.resolve().as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    if not found:
        sys.exit(f"{path}: the page did not load")
    return page, json.loads(html.unescape(found.group(1)))


def finish(path, wrong, summary):
    """Says what is wrong and ends the program."""
    for line in wrong:
        print(f"{path}: {line}", file=sys.stderr)
    print(summary)
    sys.exit(bool(wrong))
