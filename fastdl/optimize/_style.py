"""How a report's page looks, and what little it does: inline, so that a page is one file."""

CSS = """
.fastdl { --back:#fbfbfa; --card:#fff; --ink:#1d2126; --dim:#69727d; --line:#e1e4e8;
  --done:#16794c; --kept:#9a6a00; --undone:#c0362c; --torch:#a9b1bb; --soft:#f0f2f4;
  background:var(--back); color:var(--ink); font:14px/1.45 system-ui,sans-serif; }
@media (prefers-color-scheme:dark) { .fastdl { --back:#14171a; --card:#1b1f23; --ink:#e3e7eb;
  --dim:#929ca7; --line:#30363d; --done:#4cc38a; --kept:#d6a13a; --undone:#f0695e;
  --torch:#5d6873; --soft:#24292e; } }
.fastdl * { box-sizing:border-box }
.fastdl main { max-width:76rem; margin:0 auto; padding:1.5rem }
.fastdl h1 { font-size:1.5rem; margin:0 } .fastdl h1 span { color:var(--dim); font-weight:400 }
.fastdl h2 { font-size:1.05rem; margin:2rem 0 .5rem }
.fastdl p { margin:.3rem 0 } .fastdl .dim { color:var(--dim) }
.fastdl .cards { display:flex; flex-wrap:wrap; gap:.6rem; margin:1rem 0 }
.fastdl .card { background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:.5rem .9rem; min-width:7rem; font:inherit; color:inherit; text-align:left }
.fastdl .card b { display:block; font-size:1.5rem; line-height:1.2 }
.fastdl button.card { cursor:pointer; border-top:3px solid var(--is) }
.fastdl button.card[aria-pressed=true] { background:var(--soft); outline:2px solid var(--is) }
.fastdl .done { --is:var(--done) } .fastdl .kept { --is:var(--kept) }
.fastdl .undone { --is:var(--undone) }
.fastdl .mark,.fastdl .times.mark { color:var(--is) } .fastdl .mark { font-weight:600 }
.fastdl .box { background:var(--card); border:1px solid var(--line); border-radius:8px;
  overflow:hidden; overflow-x:auto }
.fastdl table { border-collapse:collapse; width:100% }
.fastdl th { text-align:left; font-weight:600; color:var(--dim) }
.fastdl th,.fastdl td { padding:.3rem .75rem; border-top:1px solid var(--line);
  vertical-align:top }
.fastdl tr:first-child>* { border-top:0 }
.fastdl .num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.fastdl code,.fastdl .name { font:13px ui-monospace,monospace; overflow-wrap:anywhere }
.fastdl .whole { white-space:nowrap }
.fastdl .bar { display:flex; gap:.6rem; margin:0 0 .5rem; flex-wrap:wrap; align-items:center }
.fastdl .bar input,.fastdl .bar button { font:inherit; color:inherit; background:var(--card);
  border:1px solid var(--line); border-radius:6px; padding:.3rem .6rem }
.fastdl .bar input { flex:1 1 16rem }
.fastdl .tree { container-type:inline-size }
.fastdl .row {
  grid-template:"name op errors count" / minmax(0,1fr) minmax(0,19rem) 16rem 4rem;
  display:grid; gap:0 .8rem; align-items:baseline; padding:.2rem .75rem; line-height:1.55;
  border-left:3px solid var(--is,transparent); list-style:none }
.fastdl .head { color:var(--dim); font-weight:600; border-bottom:1px solid var(--line) }
.fastdl .op { grid-area:op } .fastdl .count { grid-area:count }
.fastdl .row>:first-child { grid-area:name; line-height:1.65 }
.fastdl .row:not(.head):hover { background:var(--soft) }
.fastdl summary.row { cursor:pointer } .fastdl summary::-webkit-details-marker { display:none }
.fastdl .row:not(.head)>:first-child::before { content:""; display:inline-block; width:1.1em }
.fastdl summary.row:not(.head)>:first-child::before { content:"\\25B8"; color:var(--dim) }
.fastdl details[open]>summary.row:not(.head)>:first-child::before { content:"\\25BE" }
.fastdl .kids { margin-left:.95rem; border-left:1px solid var(--line) }
.fastdl .times { background:var(--soft); border-radius:9px; padding:0 .5em; color:var(--dim);
  font-size:12px; white-space:nowrap }
.fastdl .why { grid-column:1/-1; padding-left:1.1em; color:var(--is) }
.fastdl .errors { grid-area:errors; display:grid; grid-template-columns:8.2rem 1fr; gap:.5rem;
  align-items:center; white-space:nowrap; font-variant-numeric:tabular-nums }
.fastdl .row:not(.head)>.errors { color:var(--dim); font-size:12px }
.fastdl .scale { display:block; position:relative; height:10px; margin:4px 0;
  background:var(--soft); border-radius:2px; min-width:6rem }
.fastdl .scale i { position:absolute; left:0; height:4px; top:0; background:var(--torch);
  border-radius:2px }
.fastdl .scale i+i { top:6px; background:var(--is,var(--done)) }
.fastdl .scale u { position:absolute; top:-2px; height:14px; width:2px; background:var(--ink) }
.fastdl .tall { max-height:32rem; overflow-y:auto }
.fastdl .empty { margin:0; padding:.5rem 1rem }
.fastdl [hidden] { display:none !important }
@media (max-width:50rem) { .fastdl main { padding:.8rem } }
@container (max-width:62rem) {
  .fastdl .row { grid-template:"name name count" "op errors errors" / minmax(0,1fr) 11rem 3.5rem }
  .fastdl .row>.op { padding-left:1.1em } .fastdl .errors { grid-template-columns:8.2rem 6rem } }
@media print { .fastdl .bar { display:none } }
"""

# A digit in what is typed also finds the line that stands for many alike, whose path has a *.
JS = """
const root = document.querySelector('.fastdl'), box = root.querySelector('input');
const all = selector => [...root.querySelectorAll(selector)];
const rows = all('[data-path]'), folds = all('details'), cards = all('button.card');
const opened = new Map(folds.map(fold => [fold, fold.open]));
const literal = text =>
  text.replace(/[.*+?^${}()|[\\]\\\\]/g, '\\\\$&').replace(/\\d+/g, '(?:$&|\\\\*)');
function filter() {
  const only = cards.find(card => card.getAttribute('aria-pressed') === 'true')?.dataset.is;
  const wanted = new RegExp(literal(box.value.trim()), 'i'), active = only || box.value.trim();
  const line = row => row.parentElement.tagName === 'DETAILS' ? row.parentElement : row;
  for (const row of rows) line(row).hidden = Boolean(active);
  for (const fold of folds) fold.open = active ? false : opened.get(fold);
  let found = 0;
  for (const row of rows) {
    if (!active || only && !row.classList.contains(only)) continue;
    if (!wanted.test(row.dataset.path) && !wanted.test(row.textContent)) continue;
    found += 1;
    line(row).hidden = false;
    for (let up = line(row).parentElement; up !== root; up = up.parentElement)
      if (up.tagName === 'DETAILS') { up.hidden = false; up.open = true; }
  }
  root.querySelector('.empty').hidden = !active || found > 0;
}
box.addEventListener('input', filter);
for (const card of cards) card.addEventListener('click', () => {
  const pressed = card.getAttribute('aria-pressed') === 'true';
  for (const other of cards) other.setAttribute('aria-pressed', 'false');
  card.setAttribute('aria-pressed', String(!pressed));
  filter();
});
for (const button of all('[data-open]')) button.addEventListener('click', () => {
  for (const fold of folds) fold.open = button.dataset.open === 'all' || fold === folds[0];
});
"""
