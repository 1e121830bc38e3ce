"""What an object shows of itself in a notebook: a small HTML card in the page's own colours, light or dark."""

import base64
import html
from collections.abc import Mapping, Sequence

CELL = 'style="text-align:left;padding:0 1em 0 0;border:0;background:none"'


def card(title: str, facts: Mapping[str, object], *, below: str = "") -> str:
    """HTML of a title and facts, name by name, escaped; `below` is HTML. Empty facts are left out."""
    rows = "".join(
        f"<tr style='background:none'><td {CELL}><span style='opacity:.65'>{html.escape(name)}</span></td>"
        f"<td {CELL}>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    table = f"<table style='margin:.3em 0;border:0'>{rows}</table>" if rows else ""
    frame = "display:inline-block;border-left:3px solid #888;padding:.1em 0 .1em .8em"
    return f"<div style='{frame}'><b>{html.escape(title)}</b>{table}{below}</div>"


def line(title: str, facts: Mapping[str, object]) -> str:
    """The same as `card` in a line of text."""
    return f"<{title}: {'; '.join(f'{name} {fact}' for name, fact in facts.items() if fact)}>"


def spark(values: Sequence[float], marked: int, *, words: str) -> str:
    """Numbers as a small svg curve in the page's colour, one ringed; `words` for those who do not see it."""
    low, high = min(values), max(values)
    step, span = 190 / max(len(values) - 1, 1), high - low or 1
    places = [(5 + i * step, 35 - 30 * (value - low) / span) for i, value in enumerate(values)]
    line, (x, y) = " ".join(f"{a:.1f},{b:.1f}" for a, b in places), places[marked]
    return (
        f'<svg role="img" aria-label="{html.escape(words)}" viewBox="0 0 200 40" style="width:16em;height:3.2em">'
        f'<g fill="none" stroke="currentColor"><polyline points="{line}" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke-width="1.5"/></g></svg>'
    )


def picture(png: bytes, *, words: str) -> str:
    """A png as HTML, its pixels left square; `words` for those who do not see it."""
    data = base64.b64encode(png).decode()
    look = "height:56px;image-rendering:pixelated"
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}" style="{look}"/>'


def span(layers: Sequence[int]) -> str:
    """0, 1, 2, 3, 7 as 0..3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
