"""The frame of every report: one HTML page with its style and its script inside, and nothing fetched from anywhere."""

from __future__ import annotations

from html import escape
from typing import Protocol

STYLE = """
:root {
  color-scheme: light dark;
  --page: #faf9f7; --card: #ffffff; --ink: #1c1d21; --soft: #62646d; --rule: #e4e2dd; --accent: #3458c4;
  --right: #1a7f4b; --right-bg: #e5f4ec; --wrong: #b3362b; --wrong-bg: #fbeae7; --track: #ecebe7;
  --line-0: #3458c4; --line-1: #d0682b; --line-2: #1a7f4b; --line-3: #8e4ec6; --line-4: #b3362b; --line-5: #5b6472;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1c1e22; --ink: #e9e8e4; --soft: #9fa2ab; --rule: #30333a; --accent: #8ea8ff;
    --right: #62d097; --right-bg: #17301f; --wrong: #ff8f82; --wrong-bg: #3a1d1a; --track: #2b2e34;
    --line-0: #8ea8ff; --line-1: #f2a06c; --line-2: #62d097; --line-3: #c79af0; --line-4: #ff8f82; --line-5: #a3abb8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
header { margin-bottom: 2rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0; }
.soft, .note, footer { color: var(--soft); }
.note { font-size: .9rem; }
.empty { color: var(--soft); font-style: italic; }
.num { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.5rem 0; }
.stat, .panel, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.stat { padding: .85rem 1rem; }
.stat b { display: block; font-size: 1.65rem; line-height: 1.2; letter-spacing: -.02em; font-weight: 650; }
.stat span { font-size: .85rem; color: var(--soft); display: block; overflow-wrap: anywhere; }
.stat.good b { color: var(--right); } .stat.bad b { color: var(--wrong); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: .5rem .9rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th { font-size: .78rem; letter-spacing: .04em; text-transform: uppercase; color: var(--soft); font-weight: 600; }
th.num { text-align: right; }
.noted td { border-bottom: 0; padding-bottom: .1rem; }
.why { color: var(--soft); font-size: .82rem; line-height: 1.45; padding-top: 0; }
.bar { position: relative; height: 10px; min-width: 110px; background: var(--track); border-radius: 5px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 5px; opacity: .85; }
.bar u { position: absolute; top: -3px; bottom: -3px; border: 1.5px solid var(--ink); border-width: 0 1.5px; }
.bar u::before {
  content: ""; position: absolute; left: 0; right: 0; top: 50%; border-top: 1.5px solid var(--ink); margin-top: -.75px;
}
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 1rem; }
.panel { padding: 1rem 1.1rem; margin: 0; }
.panel img { width: 100%; height: auto; border-radius: 6px; display: block; }
.panel figcaption { font-size: .9rem; color: var(--soft); margin-top: .5rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 13px; font-family: inherit; }
svg .grid { stroke: var(--rule); } svg .mark { stroke: var(--soft); stroke-dasharray: 4 4; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .85rem; color: var(--soft); margin-top: .4rem; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: .45em; vertical-align: middle; }
.legend .key { display: inline-block; width: 14px; height: 14px; margin-right: .35em; vertical-align: -2px; }
.filters { display: flex; flex-wrap: wrap; gap: .5rem; margin: .2rem 0 1rem; align-items: center; }
.filters button, .filters select {
  font: inherit; font-size: .88rem; color: var(--ink); background: var(--card); border: 1px solid var(--rule);
  border-radius: 99px; padding: .28rem .9rem; cursor: pointer; max-width: 100%;
}
.filters button[aria-pressed="true"] { background: var(--ink); color: var(--page); border-color: var(--ink); }
.filters button:focus-visible, .filters select:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 245px), 1fr)); gap: 1rem; }
.card { overflow: hidden; display: flex; flex-direction: column; }
.card .picture { background: var(--track); aspect-ratio: 4 / 3; display: grid; place-items: center; min-height: 0; }
.card .picture img { width: 100%; height: 100%; object-fit: contain; min-height: 0; min-width: 0; display: block; }
.card .picture img.tiny, .hit img.tiny, .asked img.tiny { image-rendering: pixelated; }
.card .picture span { color: var(--soft); font-size: .85rem; padding: 1rem; text-align: center; }
.card .body { padding: .75rem .9rem .85rem; display: flex; flex-direction: column; gap: .35rem; flex: 1; }
.card .prompt { color: var(--soft); font-size: .88rem; }
.card .said { font-weight: 600; } .card .said.none { color: var(--soft); font-style: italic; font-weight: 400; }
.card .gold { font-size: .88rem; color: var(--soft); } .card .gold bdi { color: var(--ink); }
.card .prompt, .card .said, .card .gold { overflow-wrap: anywhere; white-space: pre-wrap; }
.card .answer { display: flex; justify-content: space-between; gap: .8rem; font-size: .88rem; line-height: 1.4; }
.card .answer .by { color: var(--soft); white-space: nowrap; } .card .answer .none { color: var(--soft); }
.card .answer span:last-child { text-align: right; overflow-wrap: anywhere; }
.card .answer .yes { color: var(--right); } .card .answer .no { color: var(--wrong); }
.card .foot {
  display: flex; justify-content: space-between; gap: .5rem; margin-top: auto; padding-top: .35rem; font-size: .78rem;
  color: var(--soft);
}
.card .foot code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: .95em; }
.badge { border-radius: 99px; padding: .05rem .6rem; font-weight: 600; white-space: nowrap; }
.badge.right { color: var(--right); background: var(--right-bg); }
.badge.wrong { color: var(--wrong); background: var(--wrong-bg); }
.badge.score { background: var(--track); }
.found { margin-top: 2.2rem; }
.about { display: flex; gap: 1rem; align-items: center; margin-bottom: .9rem; }
.about h2 { margin: 0; overflow-wrap: anywhere; } .about .note { margin: .1rem 0 0; }
.asked { flex: none; width: 72px; height: 72px; border-radius: 8px; overflow: hidden; background: var(--track); }
.asked img { width: 100%; height: 100%; object-fit: contain; display: block; } .asked span { font-size: .65rem; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 172px), 1fr)); gap: .9rem; }
.hit {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; min-width: 0;
  display: flex; flex-direction: column; position: relative;
}
.hit .picture { background: var(--track); aspect-ratio: 1; display: grid; place-items: center; min-height: 0; }
.hit .picture img { width: 100%; height: 100%; object-fit: contain; min-width: 0; min-height: 0; display: block; }
.hit .picture span { color: var(--soft); font-size: .82rem; padding: .8rem; text-align: center; }
.hit .body { padding: .5rem .7rem .6rem; display: flex; flex-direction: column; flex: 1; min-width: 0; }
.hit .line { display: flex; justify-content: space-between; align-items: baseline; font-variant-numeric: tabular-nums; }
.hit .rank { color: var(--soft); font-size: .8rem; } .hit .score { font-size: .95rem; font-weight: 650; }
.hit .text {
  margin: .15rem 0 .3rem; font-size: .9rem; line-height: 1.4; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6;
}
.hit code { font-size: .8rem; line-height: 1.4; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.hit .folder { color: var(--soft); font-size: .72rem; }
[hidden] { display: none !important; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: .85rem; }
footer p { max-width: none; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 1.6rem .9rem 3rem; }
  .stats { grid-template-columns: 1fr 1fr; } .stat b { font-size: 1.35rem; }
  th, td { padding: .45rem .5rem; } td { font-size: .88rem; } .graph { display: none; }
  svg text { font-size: 16px; }
  .gallery.small, .hits { grid-template-columns: 1fr 1fr; gap: .7rem; }
}
@media print { .filters { display: none; } .card, .stat, .panel, .hit { break-inside: avoid; } }
"""

# Without scripts every card is simply shown.
SCRIPT = """
for (const block of document.querySelectorAll('[data-gallery]')) {
  const cards = [...block.querySelectorAll('.card')];
  const buttons = [...block.querySelectorAll('button[data-show]')];
  const select = block.querySelector('select');
  let show = 'all';
  const apply = () => {
    const kind = select ? select.value : '';
    for (const card of cards) {
      card.hidden = (show !== 'all' && card.dataset.mark !== show) || (kind !== '' && card.dataset.kind !== kind);
    }
    for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.show === show);
  };
  for (const button of buttons) button.addEventListener('click', () => { show = button.dataset.show; apply(); });
  if (select) select.addEventListener('change', apply);
  apply();
}
"""

# The page may load nothing: a report that was mailed or archived shows the same, and tells nobody that it was opened.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def text(value: object) -> str:
    """Any text as safe HTML: escaped, and without what UTF-8 or HTML cannot hold (lone surrogates, control codes)."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    visible = "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "\N{REPLACEMENT CHARACTER}" for c in plain
    )
    return escape(visible)


def page(title: str, body: str, *, style: str = "", script: str = SCRIPT, policy: str = _POLICY) -> str:
    """The whole document around `body`, which must be HTML already.

    Args:
        style: rules beside the shared ones. script: what runs instead of the galleries' filters.
        policy: what the page may load and run (Content-Security-Policy).
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


class Section(Protocol):
    """Part of a page. `html` returns safe HTML: whatever came from outside is escaped."""

    def html(self) -> str: ...


def heading(title: str, note: str = "") -> str:
    """A heading, none if the title is empty, and a line of small print below it."""
    return (f"<h2>{text(title)}</h2>" if title else "") + (f'<p class="note">{text(note)}</p>' if note else "")
