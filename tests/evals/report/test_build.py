"""The files of a report, and its HTML page in a browser."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from hybridattn.evals.report.build import build
from hybridattn.evals.report.compare import compare
from hybridattn.evals.report.plots import plots
from hybridattn.evals.report.rows import rows
from hybridattn.evals.report.store import Store, read

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LANGUAGE_MODEL = {
    "mixers": ["gla", "window"],
    "parameters": 9,
    "corpus": {"train_bytes": 1, "train_files": 2, "held_out_files": 3},
    "training": {"seconds": 4.0, "steps": 5, "tokens_per_second": 6.0, "threads": 7, "bf16": True},
    "bits_per_byte": {"model": 1.234, "order 0": 4.5},
    "scored_bytes": 8,
    "continuation": {"text": "def <f>():\x1b", "tokens_per_second": 10.0, "threads": 1},
}


@pytest.fixture
def built(report: Path) -> Path:
    Store(report).add("language_model", {"seed": 0}, LANGUAGE_MODEL, device="a machine")
    build(report, title="A <report> & more")
    return report


def test_every_file_is_written(built: Path):
    names = {path.name for path in built.iterdir() if path.is_file()}
    pictures = {"pareto.png", "scaling.png", "learnability.png"}
    assert names == {"report.html", "report.md", "results.json", "measurements.jsonl", *pictures}
    text = (built / "report.md").read_text()
    for told in (
        *("attention", "0.925 (0.900-0.950)", "T^b", "a machine", "<flash>", "1.234", "7 threads, bf16"),
        "def <f>():\N{REPLACEMENT CHARACTER}",
        "0.153 (0.103-0.205); 10.00x (10.00-10.00)",  # prefill of the window, ms, and ratios within rounds
        "a machine, 1 threads: A fixed matrix product, timed 36 times",
    ):
        assert told in text, told
    results = json.loads((built / "results.json").read_text())
    assert len(results["rows"]) == 3
    assert results["provenance"][0]["measurements"] == len(read(built))
    for name in pictures:
        ink = (imread(built / name)[..., :3].min(-1) < 0.7).mean()
        assert 0.005 < ink < 0.3, name


def test_problems_are_on_the_page(report: Path, add: Callable[..., None]):
    add("attention", "state", {"allocated": 9, "formula": 8}, tokens=256)
    assert build(report, title="x")["problems"]
    for name in ("report.html", "report.md"):
        assert "cache after 256 tokens: expected 8 bytes by its formula, got 9" in (report / name).read_text()


def test_a_report_of_speed_alone_has_no_fronts(tmp_path: Path, add: Callable[..., None]):
    add("one", "prefill", {"seconds": [1.0] * 10, "peak_bytes": None}, tokens=8, batch=1, round=0)
    build(tmp_path, title="x")
    text = (tmp_path / "report.md").read_text()
    assert "## Time against length" in text
    assert "Fronts" not in text
    assert "Learnability" not in text


def test_a_largest_batch_without_a_larger_attempt_is_shown(tmp_path: Path, add: Callable[..., None]):
    tried = [{"batch": 1, "bytes": 1_000_000}, {"batch": 2, "bytes": 2_000_000}]
    add("one", "largest_batch", {"batch": 2, "tried": tried}, tokens=8, budget=10**9)
    build(tmp_path, title="x")
    last = (tmp_path / "report.md").read_text().partition("## Largest batch")[2].partition("##")[0].strip().splitlines()
    assert [entry.strip() for entry in last[-1].strip("|").split("|")] == ["one", "1,000", "8", "2", "2.0", "none"]


def test_measurements_out_of_memory_are_left_out(tmp_path: Path, add: Callable[..., None]):
    add("one", "model", {"reason": "out of memory"})
    add("one", "largest_batch", {"reason": "out of memory"}, tokens=8, budget=9)
    build(tmp_path, title="x")
    assert "Largest batch" not in (tmp_path / "report.md").read_text()
    found = rows(read(tmp_path))
    assert compare(found, found)["compared"] == 0


def test_the_picture_of_points_says_only_what_they_share():
    point = {"name": "a", "pairs": 8, "recall": 0.5, "state_bytes": 9, "state_tokens": 16, "step": 1.0, "context": 32}
    points = [{**point, "batch": batch, "tokens_per_second": batch} for batch in (1, 512)]
    states, rates = plots([], points)["pareto"].axes
    assert states.get_xlabel().startswith("state after 16 tokens, bytes")
    assert rates.get_xlabel().startswith("decode, tokens/s at the largest batch after 32 tokens")


def test_dollars_in_a_name_are_not_math(tmp_path: Path, add: Callable[..., None]):
    for tokens in (8, 16):
        add(r"$\foo$", "prefill", {"seconds": [1.0] * 10, "peak_bytes": None}, tokens=tokens, batch=1, round=0)
    build(tmp_path, title="x")
    assert r"$\foo$: T^0.00</text>" in (tmp_path / "report.html").read_text()


class Links(HTMLParser):
    """Collect everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_page_is_self_contained(built: Path):
    page = (built / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert all(re.search(r" #\w+$", link) for link in links.found), links.found
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert page.count("<svg") == 3
    assert "A &lt;report&gt; &amp; more" in page
    assert "&lt;flash&gt;" in page
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == json.loads((built / "results.json").read_text())


def browse(page: Path, *flags: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Open a page, with a script appended, in a headless browser; the console is in stderr."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    shown = page.with_name("shown.html")
    shown.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    home = page.with_name("home")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={home}",
        *flags,
        shown.as_uri(),
    ]
    environment = {**os.environ, "HOME": str(page.parent)}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)


# What is sorted by each column of the first table, up and down; then the contrast of all text, in both themes.
SCRIPT = """
const table = document.querySelector("table");
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const told = {heads: [], orders: []};
table.querySelectorAll("th button").forEach((button) => {
  told.heads.push(button.textContent);
  button.click(); told.orders.push(names());
  button.click(); told.orders.push(names());
});
const luminance = (color) => {
  const channel = color.match(/[0-9.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * channel[0] + 0.7152 * channel[1] + 0.0722 * channel[2];
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)" && color !== "transparent") return color;
  }
  return "rgb(255, 255, 255)";
};
told.contrasts = {};
const elements = "h1, h2, p, pre, td, th button, figcaption, #theme, svg text";
const look = () => { for (const node of document.querySelectorAll(elements)) {
  const style = getComputedStyle(node), is_svg = node.tagName.toLowerCase() === "text";
  const [a, b] = [luminance(is_svg ? style.fill : style.color), luminance(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const kind = is_svg ? "svg text" : node.tagName.toLowerCase();
  told.contrasts[kind] = Math.min(told.contrasts[kind] ?? 99, ratio);
} };
look();
told.paper = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
look();
told.other = getComputedStyle(document.body).backgroundColor;
const out = document.createElement("pre");
out.id = "told"; out.textContent = JSON.stringify(told);
document.body.append(out);
"""


@pytest.mark.slow
def test_in_a_browser_tables_sort_and_text_is_legible(built: Path):
    done = browse(built / "report.html", "--blink-settings=preferredColorScheme=1", "--dump-dom", script=SCRIPT)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    told = json.loads(found[1])
    orders = dict(zip(told["heads"], zip(told["orders"][::2], told["orders"][1::2], strict=True), strict=True))
    assert orders["model"] == (["attention", "other", "window"], ["window", "other", "attention"])
    assert orders["recall, 8 pairs"] == (["window", "attention", "other"], ["attention", "window", "other"])
    assert orders["prefill of 1,024, tokens/s"] == (["other", "attention", "window"], ["window", "attention", "other"])
    assert set(told["contrasts"]) == {"h1", "h2", "p", "pre", "td", "button", "figcaption", "svg text"}
    assert min(told["contrasts"].values()) >= 4.5, told["contrasts"]  # WCAG 2.1, level AA
    assert (told["paper"], told["other"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
