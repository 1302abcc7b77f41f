"""How a report looks, in light and in dark, on wide screens and on narrow ones."""

from __future__ import annotations

METHOD_COLOURS = tuple(f"var(--method-{number})" for number in range(8))
"""For the methods that stand out, the best first."""

PLAIN_COLOURS = {"unpruned": "var(--ink)", "random": "var(--random)", "uniform": "var(--uniform)"}
OTHER_COLOUR = "var(--other)"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2933; --dim: #616e7c; --line: #e4e7eb; --axis: #7b8794;
  --well: #f5f7fa; --right: #2b8a3e; --wrong: #c92a2a; --lost: 224 49 49; --gained: 47 158 68;
  --random: #6b7280; --uniform: #9aa5b1; --other: #c3c9d0;
  --method-0: #0b6e99; --method-1: #d9480f; --method-2: #2b8a3e; --method-3: #9c36b5; --method-4: #c92a2a;
  --method-5: #5f3dc4; --method-6: #b08900; --method-7: #087f5b;
  --encoder: #3b7dd8; --taps: #8fb8ee; --selection: #e8590c; --projector: #12a594; --prefill: #8e4ec6;
  --decode: #f2b134; --rest: #aab2bd }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --dim: #9aa6b2; --line: #2e363f;
  --axis: #76828e; --well: #1d232a; --right: #69db7c; --wrong: #ff8787;
  --random: #a3adb8; --uniform: #76828e; --other: #454e58;
  --method-0: #4dabf7; --method-1: #ff922b; --method-2: #69db7c; --method-3: #da77f2; --method-4: #ff8787;
  --method-5: #9775fa; --method-6: #ffd43b; --method-7: #38d9a9;
  --encoder: #5b9bf0; --taps: #2f5f9e; --selection: #ff8a3d; --projector: #2bc4b2; --prefill: #a974e0;
  --decode: #f2c14e; --rest: #66717d } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1128px; padding: 24px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 20px; margin: 40px 0 8px; border-top: 1px solid var(--line); padding-top: 20px }
h3 { font-size: 16px; margin: 28px 0 8px } h2, h3, summary, figcaption, p { overflow-wrap: anywhere }
p { margin: 6px 0; max-width: 80ch } .dim { color: var(--dim) } .right { color: var(--right) }
.wrong { color: var(--wrong) } summary { cursor: pointer } details { margin: 8px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap } th { color: var(--dim); font-weight: 600 }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  max-width: 280px; white-space: normal; overflow-wrap: anywhere; min-width: 150px }
tr.first td { border-top: 1px solid var(--line) } th.group { text-align: center }
.heat td { min-width: 46px }
pre { background: var(--well); padding: 10px 12px; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); gap: 14px }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim) }
svg .grid { stroke: var(--line) } svg .axis { stroke: var(--axis) }
.curve { stroke: var(--hue); fill: none } .curve .dot { fill: var(--hue); stroke: none }
.curve .margin { stroke-opacity: 0.3 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 8px 0 }
.legend i { display: inline-block; width: 16px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: 3px }
.legend .block { height: 11px; vertical-align: -1px }
.bars { display: grid; grid-template-columns: minmax(90px, max-content) 1fr max-content; gap: 5px 12px;
  align-items: center; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0 }
.bars .who { max-width: 300px; overflow-wrap: anywhere } .bars .sum { text-align: right; color: var(--dim) }
.track { display: flex; height: 15px } .track i { min-width: 0 }
.panels { display: grid; gap: 14px; margin: 6px 0 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(165px, 46%), 1fr)) }
figure { margin: 0; font-size: 13px; line-height: 1.35 } figure img { width: 100%; display: block }
figcaption { margin-top: 4px }
dl { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr); gap: 2px 16px; font-size: 13px }
dt { color: var(--dim); overflow-wrap: anywhere } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 640px) { body { padding: 14px } h1 { font-size: 22px }
  .bars { grid-template-columns: 1fr max-content; row-gap: 1px } .bars .who { grid-column: 1 / -1; max-width: none;
  margin-top: 6px }
  .long { grid-template-columns: minmax(0, 1fr) } .long dd { margin-bottom: 6px } th, td { padding: 3px 7px }
  th:first-child, td:first-child { min-width: 120px; max-width: 120px } }
"""
