"""How the status page looks: one sheet, inline, no fonts, images or scripts."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #5b6b7a; --line: #dbe2e8;
  --paper: #f5f7f9; --card: #ffffff; --good: #12714a; --warn: #8a5a00; --bad: #b3261e;
  --warn-paper: #fff4dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9aa9b7; --line: #2d3a46;
  --paper: #11181f; --card: #19222b; --good: #5fcf9b; --warn: #f0b84a; --bad: #ff8a80;
  --warn-paper: #3a2d10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin-top: 1rem; padding: .9rem 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: .6rem 1rem; margin: 0; }
.facts div { min-width: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .75rem .35rem 0;
  text-align: left; vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-size: .8rem; font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
.good { color: var(--good); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.soft, footer { color: var(--soft); }
.stuck td { background: var(--warn-paper); }
meter { width: 100%; height: 1rem; margin-bottom: .6rem; }
p { margin: 0; }
footer { font-size: .8rem; margin-top: 1rem; }
@media (max-width: 40rem) { body { padding: .6rem; font-size: 14px; } }
"""
