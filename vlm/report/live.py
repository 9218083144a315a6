"""The page that searches a collection while it is open: a box, the hits below it, and nothing from elsewhere.

It asks the server that it came from and knows no address but these: `api/search` (GET, or POST with a picture as the
body) and the addresses of pictures that an answer gives. Every text is put into the page as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence

from vlm.report.hits import Hit, card
from vlm.report.page import page, text

_STYLE = """
main { padding-top: 1.6rem; } header.top { margin-bottom: .8rem; }
.bar-top { position: sticky; top: 0; z-index: 2; background: var(--page); padding: .6rem 0 .7rem; margin: 0; }
.bar-top form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 0; }
.bar-top input[type=search] {
  flex: 1 1 16rem; min-width: 0; font: inherit; font-size: 1.05rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: .6rem .9rem;
}
.bar-top button, .bar-top .file, .bar-top select, .more, dialog button {
  font: inherit; font-size: .95rem; color: var(--ink); background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: .6rem .95rem; cursor: pointer; max-width: 100%;
}
.bar-top button[type=submit] { background: var(--accent); border-color: var(--accent); color: var(--page); }
.bar-top .file input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.bar-top .file { position: relative; }
.bar-top :focus-visible, .file:focus-within, .hit button:focus-visible, .more:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
.chips { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .5rem; } .chips:empty { display: none; }
.chip {
  display: flex; align-items: center; gap: .5rem; background: var(--track); border-radius: 8px; padding: .2rem .3rem;
  font-size: .85rem; max-width: 100%;
}
.chip img { height: 34px; width: 34px; object-fit: cover; border-radius: 5px; }
.chip span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.chip button { border: 0 !important; background: none !important; padding: .1rem .4rem !important; }
.status { min-height: 1.5rem; margin: .5rem 0 .8rem; max-width: none; } .status.wrong { color: var(--wrong); }
.busy .hits { opacity: .45; }
.dropping { outline: 3px dashed var(--accent); outline-offset: -10px; }
.hit .picture button { all: unset; cursor: zoom-in; display: block; width: 100%; height: 100%; min-height: 0; }
.hit .like {
  all: unset; cursor: pointer; color: var(--accent); font-size: .8rem; border-radius: 4px; margin-left: auto;
  padding: .05rem .3rem; margin-right: .4rem;
}
.more { display: block; margin: 1.4rem auto 0; }
dialog {
  max-width: min(94vw, 1000px); border: 1px solid var(--rule); border-radius: 12px; padding: 1rem;
  background: var(--card); color: var(--ink);
}
dialog::backdrop { background: rgb(0 0 0 / .6); }
dialog img { display: block; max-width: 100%; max-height: 74vh; min-width: min(60vw, 288px); object-fit: contain; }
dialog img { margin: 0 auto .7rem; image-rendering: auto; } dialog img.tiny { image-rendering: pixelated; }
dialog code { display: block; overflow-wrap: anywhere; margin-bottom: .7rem; font-size: .85rem; }
@media (max-width: 560px) {
  .bar-top button, .bar-top .file, .bar-top select { padding: .5rem .7rem; font-size: .9rem; }
  .bar-top input[type=search] { flex-basis: 100%; }
}
"""

_SCRIPT = """
const $ = id => document.getElementById(id);
const form = $('ask'), box = $('q'), file = $('file'), chips = $('chips'), status = $('status'), grid = $('grid');
const more = $('more'), viewer = $('viewer'), step = Number(form.dataset.step);
let picture = null, like = null, k = step, running = null;

const asked = () => {
  const params = new URLSearchParams();
  if (box.value.trim()) params.append('q', box.value);
  if (like !== null) params.append('like', like);
  for (const one of form.querySelectorAll('select')) if (one.value) params.append('where', one.value);
  return params;
};
const chip = (label, url, drop) => {
  const made = document.createElement('span'), name = document.createElement('span');
  made.className = 'chip';
  if (url) { const img = document.createElement('img'); img.src = url; img.alt = ''; made.append(img); }
  name.textContent = label;
  const close = document.createElement('button');
  close.type = 'button'; close.textContent = '\\u00d7'; close.setAttribute('aria-label', 'without ' + label);
  close.addEventListener('click', () => { drop(); ask(); });
  made.append(name, close);
  return made;
};
const showChips = () => {
  chips.replaceChildren();
  if (picture) chips.append(chip(picture.name || 'picture', picture.url, () => choose(null)));
  if (like !== null) chips.append(chip('like ' + like, null, () => { like = null; }));
};
const choose = chosen => {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = chosen ? {data: chosen, name: chosen.name, url: URL.createObjectURL(chosen)} : null;
  file.value = '';
};
const fail = sentence => { status.textContent = sentence; status.classList.add('wrong'); };
const card = hit => {
  const made = $('hit').content.firstElementChild.cloneNode(true), find = name => made.querySelector(name);
  const cut = hit.id.lastIndexOf('/'), whole = cut < 0 || cut === hit.id.length - 1;
  made.dataset.id = hit.id;
  find('.rank').textContent = hit.rank;
  find('.score').textContent = hit.score === null ? '' : hit.score.toFixed(4);
  find('.name').title = hit.id;
  find('.name bdi').textContent = whole ? hit.id : hit.id.slice(cut + 1);
  find('.folder').title = find('.folder bdi').textContent = whole ? '' : hit.id.slice(0, cut);
  if (hit.text) find('.text bdi').textContent = hit.text; else find('.text').remove();
  find('.like').addEventListener('click', () => {
    like = hit.id; box.value = ''; choose(null); ask(); scrollTo(0, 0);
  });
  const image = find('img');
  if (!hit.picture) find('.picture').remove();
  else {
    image.alt = hit.text || hit.id;
    image.addEventListener('load', () => image.classList.toggle('tiny', image.naturalWidth <= 160));
    image.addEventListener('error', () => {
      const note = document.createElement('span');
      note.textContent = 'picture not readable';
      find('.picture').replaceChildren(note);
    });
    image.src = hit.picture;
    find('.picture button').addEventListener('click', () => open(hit));
  }
  return made;
};
const open = hit => {
  const image = viewer.querySelector('img');
  image.onload = () => image.classList.toggle('tiny', image.naturalWidth <= 160);
  image.src = hit.picture + '/large'; image.alt = hit.text || hit.id;
  viewer.querySelector('code').textContent = hit.id;
  viewer.showModal();
};
const ask = async (again = false, remember = true) => {
  if (!again) k = step;
  if (running) running.abort();
  const mine = running = new AbortController();
  const params = asked();
  if (remember && !again) history.pushState(null, '', params.size ? '?' + params : location.pathname);
  showChips();
  params.append('k', k);
  document.body.classList.add('busy');
  try {
    const how = {signal: mine.signal, ...(picture ? {method: 'POST', body: picture.data} : {})};
    const answer = await fetch('api/search?' + params, how), said = await answer.json();
    if (!answer.ok) { fail(said.error); return; }
    status.classList.remove('wrong');
    status.textContent = said.note;
    grid.replaceChildren(...said.results.map(card));
    more.hidden = !said.more;
  } catch (error) {
    if (error.name !== 'AbortError') fail('the server does not answer; is it still running?');
  } finally {
    if (running === mine) document.body.classList.remove('busy');
  }
};
const restore = () => {
  const given = new URLSearchParams(location.search);
  box.value = given.get('q') || '';
  like = given.get('like');
  const wanted = given.getAll('where');
  for (const one of form.querySelectorAll('select')) {
    one.value = [...one.options].map(option => option.value).find(value => value && wanted.includes(value)) || '';
  }
  ask(false, false);
};
form.addEventListener('submit', event => { event.preventDefault(); like = null; ask(); });
for (const one of form.querySelectorAll('select')) one.addEventListener('change', () => ask());
file.addEventListener('change', () => { if (file.files[0]) { choose(file.files[0]); like = null; ask(); } });
more.addEventListener('click', () => { k += step; ask(true); });
viewer.addEventListener('click', event => { if (event.target === viewer) viewer.close(); });
viewer.querySelector('button').addEventListener('click', () => viewer.close());
addEventListener('popstate', restore);
const taken = list => [...list].find(one => one.type.startsWith('image/'));
addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('dropping'); });
addEventListener('dragleave', event => { if (!event.relatedTarget) document.body.classList.remove('dropping'); });
addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  const one = taken(event.dataTransfer.files);
  if (one) { choose(one); like = null; ask(); } else fail('drop a picture file here');
});
addEventListener('paste', event => {
  const one = taken(event.clipboardData.files);
  if (one) { event.preventDefault(); choose(one); like = null; ask(); }
});
restore();
"""

_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src 'self' blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'self'"
)
"""What the page may load and run: its own script alone, and pictures of the server that it came from."""


def search_page(title: str, about: str, filters: Mapping[str, Sequence[str]], *, step: int) -> str:
    """The whole document.

    Args:
        about: a line below the title: which collection, which model.
        filters: key -> its values, each a menu.
        step: so many hits are shown first, and more on request.
    """
    menus = "".join(_menu(key, values) for key, values in filters.items())
    file = '<label class="file">Picture<input type="file" id="file" accept="image/*"></label>'
    like = '<button type="button" class="like">similar</button>'
    picture = '<button type="button" aria-label="larger"><img loading="lazy" alt=""></button>'
    blank = card(Hit(" ", 0.0, 0, text=" "), picture, like)
    words = "Say what you look for, or drop a picture"
    body = f"""
<header class="top"><h1>{text(title)}</h1><p class="soft">{text(about)}</p></header>
<div class="bar-top"><form id="ask" role="search" data-step="{step}">
<input type="search" id="q" name="q" placeholder="{words}" aria-label="{words}" autocomplete="off" autofocus>
<button type="submit">Search</button>{file}{menus}
</form><div class="chips" id="chips"></div></div>
<p class="note status" id="status" role="status" aria-live="polite"></p>
<noscript><p>This page asks its server with a script; please allow it.</p></noscript>
<div class="hits" id="grid"></div>
<button type="button" class="more" id="more" hidden>Show more</button>
<dialog id="viewer"><img alt=""><code></code><button type="button">Close</button></dialog>
<template id="hit">{blank}</template>"""
    return page(title, body, style=_STYLE, script=_SCRIPT, policy=POLICY)


def _menu(key: str, values: Sequence[str]) -> str:
    pairs = ((text(f"{key}={value}"), text(f"{key}: {value}")) for value in values)
    options = "".join(f'<option value="{given}">{shown}</option>' for given, shown in pairs)
    return f'<select aria-label="{text(key)}"><option value="">any {text(key)}</option>{options}</select>'
