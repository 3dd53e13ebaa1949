"""How the page of a plan or a report looks beyond what all pages share, and what little it does."""

CSS = """
.fastdl button.card { cursor:pointer; border-top:3px solid var(--is) }
.fastdl button.card[aria-pressed=true] { background:var(--soft); outline:2px solid var(--is) }
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
.fastdl .times.mark { color:var(--is) }
.fastdl .why { grid-column:1/-1; padding-left:1.1em; color:var(--is) }
.fastdl .errors { grid-area:errors; display:grid; grid-template-columns:8.2rem 1fr; gap:.5rem;
  align-items:center; white-space:nowrap; font-variant-numeric:tabular-nums }
.fastdl .row:not(.head)>.errors { color:var(--dim); font-size:12px }
.fastdl .empty { margin:0; padding:.5rem 1rem }
.fastdl [hidden] { display:none !important }
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
