"""What a report looks like: readable on paper, on a phone, in light and in dark."""

from html import escape

__all__ = ["document"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing from outside, and no script."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --faint: #5b6675; --line: #d5dae1; --back: #fff; --raised: #f4f6f8;
  --c0: #0067b0; --c1: #c44e00; --c2: #00805c; --c3: #96438c; --c4: #7a6200; --c5: #4b5563; --c6: #b3123e;
  --c7: #3f51b5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --faint: #9ba6b5; --line: #39424f; --back: #14181e;
  --raised: #1d232b; --c0: #5ab4f2; --c1: #ff9a52; --c2: #3fcf9f; --c3: #dc9ad3; --c4: #e3c54a; --c5: #b6c0cd;
  --c6: #ff7d99; --c7: #a3b1ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 2.5vw, 2.5rem) 3rem; max-width: 88rem; color: var(--ink);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
p { max-width: 46rem; margin: .4rem 0; color: var(--faint) }
.scroll { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .3rem; text-align: right; white-space: pre; border-bottom: 1px solid var(--line) }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--back); font-weight: 500 }
thead th { vertical-align: bottom; color: var(--faint); font-weight: 500 }
.narrow { font-size: .78rem } .narrow tr > :first-child { white-space: normal; min-width: 7rem; max-width: 11.5rem }
.narrow thead th:not(:first-child) span { writing-mode: vertical-rl; transform: rotate(180deg) }
tbody th[colspan] { padding-top: .8rem; color: var(--faint); font-weight: 600 }
.first td, .first th { background: var(--raised) !important } .first th { font-weight: 600 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 }
figcaption { font-weight: 600 }
.charts svg { display: block; width: 100%; height: auto; font-size: 12px }
svg text { fill: var(--faint) } svg .mid { text-anchor: middle } svg .end { text-anchor: end }
svg .grid { stroke: var(--line) } svg .axis { stroke: var(--faint); fill: none }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-dasharray: var(--d); stroke-linejoin: round }
circle { fill: var(--c) }
.key { display: flex; flex-wrap: wrap; gap: 0 1.1rem; padding: 0; margin: 0; list-style: none; font-size: .8125rem }
.key svg, .key i { display: inline-block; width: 26px; height: 10px; margin-right: .35rem; vertical-align: baseline }
.key i { width: 14px; height: 12px; border: 1px solid var(--line); vertical-align: -1px }
.s0 { --c: var(--c0) } .s1 { --c: var(--c1); --d: 7 3 } .s2 { --c: var(--c2); --d: 2 2 }
.s3 { --c: var(--c3); --d: 10 3 2 3 } .s4 { --c: var(--c4); --d: 5 2 } .s5 { --c: var(--c5); --d: 1 3 }
.s6 { --c: var(--c6); --d: 12 4 } .s7 { --c: var(--c7); --d: 4 2 1 2 }
.pictures { width: 100% }
.pictures :is(td, th) { padding: 2px; border: 0; text-align: center; position: static; min-width: 0 }
.pictures img { display: block; width: 100%; min-width: 8.5rem; height: auto }
dl { columns: 22rem; column-gap: 2.5rem; margin: .6rem 0; font-size: .8125rem }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .15rem 0; break-inside: avoid }
dt { color: var(--faint) } dd { margin: 0; text-align: right; overflow-wrap: anywhere }
@media (max-width: 40rem) { tr > :first-child { white-space: normal; min-width: 7rem } }
@media print { body { max-width: none } .scroll { overflow: visible } }
"""


def document(title: str, body: str) -> str:
    """The whole file around a body."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
