"""How a page looks: from the width of a phone on, light or dark, and on paper."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --faint: #57606a; --line: #d5dae0; --box: #f6f8fa;
  --link: #0b57c2; --int8: #2f6db5; --float: #b3541e; --shade: rgb(0 0 0 / 18%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #d5dae0; --faint: #9aa7b4; --line: #323a44; --box: #1d232a;
    --link: #7db0e8; --int8: #7db0e8; --float: #f0a05f; --shade: rgb(255 255 255 / 18%);
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
a { color: var(--link); }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 0.7rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line);
  font-size: 1.15rem; }
p { margin: 0.4rem 0; overflow-wrap: anywhere; }
.conclusion { margin: 0.8rem 0 1.2rem; font-size: 1.2rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.1rem 1rem;
  margin: 0; }
dt, figcaption, .legend, .words { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin-top: 1.2rem; }
figure { margin: 0; }
figure img { display: block; }
figcaption, .legend { font-size: 0.87rem; }
figcaption { margin-top: 0.4rem; }
/* what is wider than the page moves in a box of its own; a shadow says where it goes on */
.scroll { overflow: auto; background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 0.8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 0.8rem 100% no-repeat scroll; }
.panels { display: flex; flex-wrap: wrap; gap: 0.8rem 1rem; }
.panels img { max-width: 100%; height: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.82rem; }
th, td { padding: 0.22rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
.long { overflow-wrap: anywhere; } .wide .long { min-width: 14rem; }
th { border-bottom: 1px solid var(--faint); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.number { white-space: normal; }
pre { margin: 0; padding: 0.8rem 1rem; background: var(--box); font-size: 0.82rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.bars { margin: 0.5rem 0 0; padding: 0; list-style: none; font-size: 0.87rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 19rem) 6.5rem minmax(0, 1fr);
  gap: 0 0.8rem; align-items: center; padding: 0.1rem 0; }
.bars b { font-weight: normal; overflow-wrap: anywhere; }
.value { text-align: right; font-variant-numeric: tabular-nums; }
.track { display: block; height: 0.75rem; margin: 0.1rem 0; }
.track i { display: block; height: 100%; }
i.kind0 { background: var(--int8); } i.kind1 { background: var(--float); }
.kind0, .int8 { color: var(--int8); } .kind1, .float { color: var(--float); }
.sizes { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin: 0.4rem 0; font-size: 0.87rem; }
.tall { max-height: 75vh; border: 1px solid var(--line); }
.tall th { position: sticky; top: 0; background: var(--paper); }
.flow svg { display: block; width: calc(var(--width) * var(--size)); height: auto;
  --size: 1; font: 12px ui-monospace, "DejaVu Sans Mono", "Liberation Mono", Menlo, monospace;
  fill: none; stroke: none; }
.flow:has([value="50"]:checked) svg { --size: 0.5; }
.flow:has([value="75"]:checked) svg { --size: 0.75; }
.flow:has([value="150"]:checked) svg { --size: 1.5; }
.flow:has([value="200"]:checked) svg { --size: 2; }
.flow path { stroke-width: 2.5; }
.flow path.int8 { stroke: var(--int8); } .flow path.float { stroke: var(--float); }
.flow .row.int8 { fill: var(--int8); } .flow .row.float { fill: var(--float); }
.flow .row text { fill: var(--ink); white-space: pre; }
.flow .row .words { fill: var(--faint); }
.flow .passthrough { fill: var(--paper); stroke: var(--int8); stroke-width: 2; }
.flow .mark rect { fill: var(--paper); stroke: var(--ink); stroke-width: 1.2; }
.flow .mark text { fill: var(--ink); font-size: 11px; text-anchor: middle; }
@media (max-width: 40rem) {
  .terms { display: block; } .terms dd { margin: 0 0 0.5rem 1rem; }
  table.wide { min-width: 58rem; }
  main { padding: 1.2rem 1rem 3rem; }
  .bars li { grid-template-columns: minmax(0, 1fr) max-content; padding: 0.25rem 0; }
  .bars li > :last-child { grid-column: 1 / -1; }
}
@media print {
  :root { color-scheme: light; }
  main { max-width: none; padding: 0; }
  body { font-size: 10pt; }
  nav, .sizes { display: none; }
  .tall { max-height: none; border: 0; }
  .scroll { overflow: visible; }
  figure img, .flow svg { max-width: 100%; height: auto; }
  figure, tr, .bars li { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
}
"""
