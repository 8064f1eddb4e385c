"""The report as files, and its page in a real browser."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hybridattn.evals.report import cells, document
from hybridattn.evals.report.build import build
from hybridattn.evals.report.compare import compare
from hybridattn.evals.report.figures import figures as draw_figures
from hybridattn.evals.report.rows import rows
from hybridattn.evals.speed.calm import READS
from hybridattn.evals.speed.drift import READ

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KERNEL = {
    "work": "gated step",
    "contestant": "hybridattn",
    "shape": [1, 2, 3, 4, 5],
    "device": "a machine",
    "copy_bytes_per_second": 1e10,
    "matmul_flop_per_second": 1e12,
}


@pytest.fixture
def built(report: Path) -> Path:
    figures = {"flop_per_second": 1e11, "bytes_per_second": 5e9, "share_of_copy": 0.5, "share_of_matmul": 0.1}
    fast = {**KERNEL, **figures, "forward_seconds": {"median": 1e-3}}
    broken = {**KERNEL, "contestant": "other", "reason": "error 1e-1"}
    (report / cells.KERNELS).write_text(f"{json.dumps(fast)}\n{json.dumps(broken)}\n")
    build(report, title="A <report> & more")
    return report


def test_every_file_is_written(built: Path):
    names = {path.name for path in built.iterdir() if path.is_file()}
    pictures = {"pareto.png", "scaling.png", "learnability.png", "roofline.png"}
    assert names == {"report.html", "report.md", "results.json", "kernels.jsonl", *pictures}
    text = (built / "report.md").read_text()
    for told in ("attention", "0.925 (0.900-0.950)", "T^b", "roofline.png", "error 1e-1", "a machine", "<flash>"):
        assert told in text, told
    results = json.loads((built / "results.json").read_text())
    assert len(results["rows"]) == 3
    assert results["provenance"][0]["cells"] == len(cells.read(built))
    for name in pictures:
        ink = (imread(built / name)[..., :3].min(-1) < 0.7).mean()
        assert 0.005 < ink < 0.3, name


def test_contradictions_are_on_the_page(report: Path, write_cell: Callable[..., None]):
    write_cell("attention", "state", {"allocated": 9, "formula": 8}, tokens=256)
    assert build(report, title="x")["problems"]
    for name in ("report.html", "report.md"):
        assert "the cache after 256 tokens has 9 bytes, by its formula 8" in (report / name).read_text()


def test_it_says_by_how_much_slow_memory_changed_times(tmp_path: Path, write_cell: Callable[..., None]):
    for turn in range(20):
        slow = 1 + turn % 2
        figures = {"seconds": [0.1 * slow**0.5] * 3, "memory": [slow * READ * READS / 1.2] * 3}
        write_cell("one", "decode", figures, tokens=8, batch=1, graph=False, round=turn)
        write_cell(
            "one", "prefill", {"seconds": [0.1], "memory": [slow * READ * READS / 1.2]}, tokens=8, batch=1, round=turn
        )
    assert build(tmp_path, title="x")["problems"] == []
    assert "changes medians by -9.3% to +0.0%" in (tmp_path / "report.md").read_text()  # 1.2^0.5 over (1 + 2^0.5) / 2


def test_a_report_of_speed_alone_has_no_fronts(tmp_path: Path, write_cell: Callable[..., None]):
    write_cell("one", "prefill", {"seconds": [1.0] * 10, "peak_bytes": None}, tokens=8, batch=1, round=0)
    build(tmp_path, title="x")
    text = (tmp_path / "report.md").read_text()
    assert "## Time against length" in text
    assert "Fronts" not in text
    assert "Learnability" not in text


def test_a_batch_beyond_which_nothing_was_tried_is_told(tmp_path: Path, write_cell: Callable[..., None]):
    tried = [{"batch": 1, "bytes": 1_000_000}, {"batch": 2, "bytes": 2_000_000}]
    write_cell("one", "largest_batch", {"batch": 2, "tried": tried}, tokens=8, budget=10**9)
    build(tmp_path, title="x")
    last = (tmp_path / "report.md").read_text().partition("## Largest batch")[2].partition("##")[0].strip().splitlines()
    assert [entry.strip() for entry in last[-1].strip("|").split("|")] == ["one", "1,000", "8", "2", "2.0", "none"]


def test_operators_of_two_devices_have_their_own_ceilings(report: Path):
    figures = {"flop_per_second": 1e11, "bytes_per_second": 5e9, "share_of_copy": 0.5, "share_of_matmul": 0.1}
    slow = {**KERNEL, **figures, "forward_seconds": {"median": 1e-3}}
    fast = {**slow, "device": "a GPU", "copy_bytes_per_second": 2e12, "matmul_flop_per_second": 5e14}
    lines = [slow, fast]
    (section,) = [part for part in document.sections([], [], lines, []) if part.title.startswith("Operators")]
    assert [text.split(" GB/s")[0] for text in section.texts[:2]] == [
        "On a machine a copy moves 10.0",
        "On a GPU a copy moves 2,000.0",
    ]
    assert [row[1].text for row in section.tables[0].rows] == ["a machine", "a GPU"]
    (axes,) = draw_figures([], [], lines)["roofline"].axes
    assert sorted(max(line.get_ydata()) for line in axes.lines if len(line.get_xdata())) == [1e12, 5e14]


def test_what_ran_out_of_memory_is_left_out(tmp_path: Path, write_cell: Callable[..., None]):
    write_cell("one", "model", {"reason": "out of memory"})
    write_cell("one", "largest_batch", {"reason": "out of memory"}, tokens=8, budget=9)
    build(tmp_path, title="x")
    assert "Largest batch" not in (tmp_path / "report.md").read_text()
    found = rows(cells.read(tmp_path))
    assert compare(found, found)["compared"] == 0


def test_the_picture_of_points_says_only_what_they_share():
    point = {"name": "a", "pairs": 8, "recall": 0.5, "state_bytes": 9, "state_tokens": 16, "step": 1.0, "context": 32}
    points = [{**point, "batch": batch, "tokens_per_second": batch} for batch in (1, 512)]
    states, rates = draw_figures([], points, [])["pareto"].axes
    assert states.get_xlabel().startswith("state after 16 tokens, bytes")
    assert rates.get_xlabel().startswith("decode, tokens/s at the largest batch after 32 tokens")


def test_a_name_is_no_formula(tmp_path: Path, write_cell: Callable[..., None]):
    for tokens in (8, 16):
        write_cell(r"$\foo$", "prefill", {"seconds": [1.0] * 10, "peak_bytes": None}, tokens=tokens, batch=1, round=0)
    build(tmp_path, title="x")
    assert r"$\foo$: T^0.00</text>" in (tmp_path / "report.html").read_text()


class Links(HTMLParser):
    """Everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_page_needs_nothing_else(built: Path):
    page = (built / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert all(re.search(r" #\w+$", link) for link in links.found), links.found
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert page.count("<svg") == 4
    assert "A &lt;report&gt; &amp; more" in page
    assert "&lt;flash&gt;" in page
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == json.loads((built / "results.json").read_text())


def browse(page: Path, *flags: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Open a page, with a script at its end, in a browser without a window; its console is in stderr."""
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


# What is sorted by each column of the first table, up and down; then text and background of everything that is text.
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
const elements = "h1, h2, p, td, th button, figcaption, #theme, svg text";
for (const node of document.querySelectorAll(elements)) {
  const style = getComputedStyle(node), is_svg = node.tagName.toLowerCase() === "text";
  const [a, b] = [luminance(is_svg ? style.fill : style.color), luminance(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const kind = is_svg ? "svg text" : node.tagName.toLowerCase();
  told.contrasts[kind] = Math.min(told.contrasts[kind] ?? 99, ratio);
}
told.paper = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
told.other = getComputedStyle(document.body).backgroundColor;
const out = document.createElement("pre");
out.id = "told"; out.textContent = JSON.stringify(told);
document.body.append(out);
"""


@pytest.mark.parametrize(("theme", "number"), [("light", 1), ("dark", 0)])
def test_in_a_browser_tables_sort_and_text_is_legible(built: Path, theme: str, number: int):
    scheme = f"--blink-settings=preferredColorScheme={number}"
    done = browse(built / "report.html", scheme, "--dump-dom", script=SCRIPT)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    told = json.loads(found[1])
    orders = dict(zip(told["heads"], zip(told["orders"][::2], told["orders"][1::2], strict=True), strict=True))
    assert orders["model"] == (["attention", "other", "window"], ["window", "other", "attention"])
    assert orders["recall, 8 pairs"] == (["window", "attention", "other"], ["attention", "window", "other"])
    assert orders["prefill of 1,024, tokens/s"] == (["other", "attention", "window"], ["window", "attention", "other"])
    assert set(told["contrasts"]) == {"h1", "h2", "p", "td", "button", "figcaption", "svg text"}
    assert min(told["contrasts"].values()) >= 4.5, told["contrasts"]  # WCAG 2.1, level AA
    papers = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}
    assert told["paper"] == papers[theme]
    assert told["other"] == papers["dark" if theme == "light" else "light"]


@pytest.mark.parametrize(("theme", "number"), [("light", 1), ("dark", 0)])
def test_a_screenshot_shows_ink_on_paper(built: Path, theme: str, number: int):
    file = built / f"{theme}.png"
    scheme = f"--blink-settings=preferredColorScheme={number}"
    browse(built / "report.html", scheme, "--window-size=1300,2500", f"--screenshot={file}")
    pixels = imread(file)[..., :3].mean(-1)
    assert pixels.shape == (2500, 1300)
    paper = np.median(pixels)
    assert paper > 0.95 if theme == "light" else paper < 0.12
    ink = abs(pixels - paper) > 0.4
    assert 0.01 < ink.mean() < 0.2
    assert ink[:100].any()  # the title
    assert ink[1200:].any()


def test_an_error_in_the_page_would_be_seen(built: Path):
    done = browse(built / "report.html", "--dump-dom", script="nothing.here();")
    assert "CONSOLE" in done.stderr
