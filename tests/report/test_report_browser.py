"""What a reader sees and does in a browser, where Chromium is."""

import html as html_module
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from normlab.report import load
from normlab.report.page import html
from normlab.report.script import policy
from normlab.report.style import DARK, LIGHT, series

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.slow,
]

# The page in a frame of its own. What is asked of it runs outside, so that inside there is nothing
# but the page under its own policy: a button that is there was made by the page's script.
_FRAME = """<!doctype html><meta charset="utf-8"><iframe id="frame" style="border:0"></iframe>
<pre id="seen"></pre><script>
const frame = document.getElementById("frame");
frame.width = WIDTH; frame.height = 800;
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const style = element => view.getComputedStyle(element);
  const all = (selector, of = page) => [...of.querySelectorAll(selector)];
  const answer = () => { ASK };
  document.getElementById("seen").textContent = JSON.stringify(answer());
};
frame.srcdoc = PAGE;
</script>"""


def ask(page: str, folder: Path, question: str, width: int = 390, dark: bool = False) -> Any:
    """Returns the answer of a function's body in JavaScript to the page in a frame `width` px wide.

    It has `page` (the document), `style(element)` and `all(selector, of)`.
    """
    source = json.dumps(page).replace("</", "<\\/")
    text = _FRAME.replace("WIDTH", str(width)).replace("ASK", question).replace("PAGE", source)
    probe = folder / "probe.html"
    probe.write_text(text)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *("--virtual-time-budget=5000", "--dump-dom", probe.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert seen, done.stderr
    return json.loads(html_module.unescape(seen[1]))


SEEN = """
  const tables = all(".scroll");
  return {
    width: page.documentElement.scrollWidth,
    title: page.title,
    scripts: page.scripts.length,
    images: page.images.length,
    widest_table: Math.max(...tables.map(box => box.scrollWidth)),
    widest_box: Math.max(...tables.map(box => box.clientWidth)),
    figures: all("figure svg").map(svg => svg.clientWidth).filter(Boolean),
    background: style(page.body).backgroundColor,
    line: style(page.querySelector(".legend svg path[clip-path]")).stroke,
    cells: all(".headline tbody td").length,
  };
"""


@pytest.fixture
def timed(make_sweep, tmp_path):
    """A page whose curves can be drawn against all three axes."""
    given = {"step_seconds": 0.01, "manifest": {"steps_per_epoch": 22}}
    return html(load(make_sweep(tmp_path / "sweep", run=lambda *_: given)))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(timed, tmp_path, width, dark):
    seen = ask(timed, tmp_path, SEEN, width, dark)
    assert seen["title"] == "Normalizers on digits (cnn)"
    assert seen["cells"] == 18
    # Wide tables scroll in their own box; the page itself never does.
    assert seen["width"] <= width
    assert seen["widest_box"] <= width
    if width == 390:
        assert seen["widest_table"] > width
    assert len(seen["figures"]) == 3
    assert min(seen["figures"]) > 300
    background = [int(part) for part in re.findall(r"\d+", seen["background"])][:3]
    assert max(background) < 60 if dark else min(background) > 200
    colour = (DARK if dark else LIGHT)[series(0)]
    rgb = ", ".join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))
    assert seen["line"] == f"rgb({rgb})"


def test_a_browser_finds_no_script_in_names(attacked):
    seen = ask(html(load(attacked)), attacked, SEEN)
    assert (seen["scripts"], seen["images"]) == (1, 0)  # the one that sorts
    assert seen["width"] <= 390


TEXTS = """
  const background = element => {
    for (; element; element = element.parentElement) {
      const colour = style(element).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
  };
  const found = {};
  for (const element of all("body *")) {
    if (element.matches("script") || !element.getClientRects().length) continue;
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const colour = element.closest("svg") ? style(element).fill : style(element).color;
    found[colour + " on " + background(element)] = element.textContent.slice(0, 40);
  }
  return found;
"""


def contrast(pair: str) -> float:
    """WCAG 2.1, of `rgb(r, g, b) on rgb(r, g, b)`."""
    numbers = [int(number) / 255 for number in re.findall(r"\d+", pair)]
    assert len(numbers) == 6, pair
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in numbers]
    parts = [weight * x for weight, x in zip((0.2126, 0.7152, 0.0722) * 2, linear, strict=True)]
    low, high = sorted((sum(parts[:3]), sum(parts[3:])))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(make_sweep, tmp_path, dark):
    """WCAG 2.1 asks 4.5:1, of the figures' text too; with marks, caveats and every state."""
    states = ("done", "diverged", "failed")
    page = html(
        load(
            make_sweep(
                tmp_path / "sweep",
                norms=("none", "batch_norm"),
                run=lambda setting, norm, seed: {"state": states[seed], "step_seconds": 0.01},
            )
        )
    )
    found = ask(page, tmp_path, TEXTS, 1200, dark)
    assert len(found) >= 6
    faint = {pair: text for pair, text in found.items() if contrast(pair) < 4.5}
    assert not faint


# Sorting -----------------------------------------------------------------------------------------

SORTED = """
  const table = page.querySelector("table.runs");
  const state = () => {
    const heads = all("thead th", table);
    const column = heads.findIndex(head => head.hasAttribute("aria-sort"));
    const cell = row => row.cells[column].querySelector(".value").textContent;
    return column < 0 ? null : {
      name: heads[column].textContent,
      marked: heads.filter(head => head.hasAttribute("aria-sort")).length,
      way: heads[column].getAttribute("aria-sort"),
      cells: [...table.tBodies[0].rows].map(cell),
      seeds: [...table.tBodies[0].rows].map(row => row.cells[2].textContent.trim()),
      settings: style(heads[1]).display !== "none",
    };
  };
  const press = name => {
    const button = all("thead button", table).find(found => found.textContent === name);
    button.focus();
    page.activeElement.click();
    return state();
  };
"""


@pytest.fixture
def runs(make_sweep, tmp_path):
    """A page of runs whose numbers sort in another way than their texts do."""
    accuracies = {0: 0.09, 1: 1.0, 2: None, 3: 0.5, 10: 0.5}

    def run(setting, norm, seed):
        return {"accuracy": accuracies[seed], "num_lines": 100 if seed == 1 else 1 + seed}

    settings = {"ghost 2": {}, "ghost 16": {}}
    sweep = make_sweep(
        tmp_path / "sweep", settings=settings, norms=("none",), seeds=tuple(accuracies), run=run
    )
    return html(load(sweep))


def test_a_click_sorts_by_number_and_another_one_reverses(runs, tmp_path):
    question = SORTED + (
        'return [state(), press("accuracy (%)"), press("accuracy (%)"), press("steps")];'
    )
    before, up, down, steps = ask(runs, tmp_path, question)
    assert before is None
    # As texts 100.00 would come before 50.00 and 9.00; what is missing is last either way.
    assert up["cells"] == ["9.00"] * 2 + ["50.00"] * 4 + ["100.00"] * 2 + ["–"] * 2
    assert down["cells"] == ["100.00"] * 2 + ["50.00"] * 4 + ["9.00"] * 2 + ["–"] * 2
    assert (up["way"], down["way"], steps["way"]) == ("ascending", "descending", "ascending")
    assert up["marked"] == down["marked"] == steps["marked"] == 1
    # 22 steps a line: 1, 3, 4, 11 and 100 lines.
    assert steps["cells"] == [x for x in ("22", "66", "88", "242", "2,200") for _ in range(2)]


def test_equal_rows_keep_their_order(runs, tmp_path):
    up = ask(runs, tmp_path, SORTED + 'return press("accuracy (%)");')
    assert up["seeds"][2:6] == ["3", "10", "3", "10"]


def test_names_sort_as_a_reader_counts(runs, tmp_path):
    """The setting is a heading until the rows are sorted; then it is a column."""
    first, settings = ask(
        runs, tmp_path, SORTED + 'const first = press("seed"); return [first, press("setting")];'
    )
    assert first["cells"] == ["0", "0", "1", "1", "2", "2", "3", "3", "10", "10"]
    assert first["settings"]
    assert settings["cells"] == ["ghost 2"] * 5 + ["ghost 16"] * 5


def test_without_the_script_the_list_is_as_it_was(runs, tmp_path):
    without = re.sub(r"<script>.*?</script>", "", runs, flags=re.DOTALL)
    question = """return [all(".runs button").length, all(".runs .group").length,
      all(".runs .heading").map(cell => style(cell).display)];"""
    buttons, groups, headings = ask(without, tmp_path, question)
    assert (buttons, groups, set(headings)) == (0, 2, {"none"})


def test_the_policy_lets_no_other_script_run(runs, tmp_path):
    """Nor an event handler, nor a picture from elsewhere, nor the sorting script with a change."""
    evil = '<script>document.title = "evil"</script><p onclick="document.title=`evil`">x</p></main>'
    question = """all("p[onclick]").forEach(found => found.click());
      return [page.title, all(".runs button").length];"""
    attacked = runs.replace("</main>", evil)
    assert ask(attacked, tmp_path, question) == ["Normalizers on digits (cnn)", 9]
    # Without a policy it would have.
    assert ask(attacked.replace(policy(), ""), tmp_path, question)[0] == "evil"
    changed = runs.replace("<script>", "<script>;")
    assert ask(changed, tmp_path, question) == ["Normalizers on digits (cnn)", 0]


# The axis of the curves --------------------------------------------------------------------------

CHOSEN = """
  const shown = () => [...new Set(all("figure div").filter(box => box.clientHeight)
    .map(box => box.className))];
  const choose = name => { page.querySelector(`label[for=axis-${name}]`).click(); return shown(); };
"""


def test_one_axis_is_shown_and_a_tap_shows_another(timed, tmp_path):
    question = (
        CHOSEN
        + """
      const heights = all(".choice label").map(label => label.getBoundingClientRect().height);
      return [shown(), choose("seconds"), choose("epochs"), choose("steps"), heights];"""
    )
    *shown, heights = ask(timed, tmp_path, question)
    assert shown == [["steps"], ["seconds"], ["epochs"], ["steps"]]
    assert min(heights) >= 44  # px, what a finger hits


def test_without_a_style_sheet_the_steps_are_shown(timed, tmp_path):
    plain = re.sub(r"<style>.*?</style>", "", timed, count=1, flags=re.DOTALL)
    assert ask(plain, tmp_path, CHOSEN + "return shown();") == ["steps"]
