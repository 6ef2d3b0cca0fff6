"""The page's one script, which makes the run list sortable, and the policy that lets it run.

The policy names the script by its hash: a browser runs nothing else on the page, and loads nothing.
"""

import base64
import hashlib

SCRIPT = """
(() => {
  const table = document.querySelector("table.runs");
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const words = new Intl.Collator("en", {numeric: true});
  const read = (row, column) => {
    const text = row.cells[column].querySelector(".value").textContent.trim();
    if (heads[column].classList.contains("words")) return text === "–" ? "" : text;
    const number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? "" : number;
  };
  const sort = column => {
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    table.classList.remove("grouped");
    body.querySelectorAll(".group").forEach(row => row.remove());
    const order = (a, b) => typeof a === "number" ? a - b : words.compare(a, b);
    [...body.rows]
      .map(row => [read(row, column), row])
      .sort(([a], [b]) => (a === "") - (b === "") || (down ? order(b, a) : order(a, b)))
      .forEach(([, row]) => body.append(row));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column));
    head.append(button);
  });
})();
"""


def policy() -> str:
    """Returns the Content-Security-Policy under which SCRIPT runs, and no other."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src 'sha256-{digest}'"
    )
