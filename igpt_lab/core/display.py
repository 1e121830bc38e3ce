"""What a notebook shows: an object as a small HTML card, and an error as one line of advice before its traceback."""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MODEL = "model"  # in the column `control` of a table: the row is of the model itself
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


def percent(value: float, low: float, high: float, *, sign: str = "") -> str:
    """Fractions as `85.5 [84.4, 86.6]`, in percent; with sign="+" a difference shows its own."""
    return f"{100 * value:{sign}.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def p_number(p: float, equals: str = "") -> str:
    """A p value in the one form that figures, cards, reports and commands have: `0.012`, `4e-14` or `< 1e-300`.

    `equals` stands before a number, as in "= 0.012".
    """
    if p < 1e-300:
        return "< 1e-300"
    return equals + (f"{p:.1g}".replace("e-0", "e-") if p < 0.001 else f"{p:.3f}")


@dataclass(frozen=True, eq=False)
class Summary:
    """The main numbers of a result with their 95% intervals, in words: `table` is what a cell shows of it."""

    table: pd.DataFrame

    def __repr__(self) -> str:
        return self.table.to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, border=0)

    def to_latex(self) -> str:
        """A `tabular` with the rules of the package booktabs; letters that mean something to LaTeX are escaped."""
        return self.table.to_latex(index=False, escape=True)


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


@cache
def say_once(text: str) -> None:
    """One line on stderr, the first time that there is this to say."""
    print(" ".join(text.split()), file=sys.stderr)


def brief(name: object, room: int = 16) -> str:
    """A name beside a progress bar, whose middle is left out where it has more letters than `room`."""
    text = str(name)
    return text if len(text) <= room else f"{text[: room - room // 3 - 1]}…{text[-(room // 3) :]}"


def control_names(column: pd.Series) -> pd.Series:
    """The column `control` of a table with MODEL for the model itself; older tables had an empty string there."""
    return column.astype(object).fillna(MODEL).replace("", MODEL)


def shown_control(control: str) -> str:
    """A control's name where a card or a progress bar shows it: nothing for the model itself."""
    return "" if control == MODEL else control


def span(layers: Iterable[int | str]) -> str:
    """0, 1, 2, 3, 7 as 0..3, 7; names as they come, of many the first two and the last."""
    layers = list(layers)
    if any(isinstance(layer, str) for layer in layers):
        names = [str(layer) for layer in layers]
        return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
    runs: list[list[int]] = []
    for layer in sorted(map(int, layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


OURS = (Exception,)  # its identity says that the handler is ours
MEMORY = "out of memory; give a smaller batch_size, or fewer images with limit"


def explain_errors(shell: Any) -> None:
    """Put a line of advice before the traceback of an error that comes out of this package, in an IPython shell.

    Errors from elsewhere are shown as ever. Where somebody else has set a handler of exceptions, it stays.
    """
    if not shell.custom_exceptions:
        shell.set_custom_exc(OURS, _show)


def leave_errors(shell: Any) -> None:
    """Take back what `explain_errors` did; a handler that somebody else has set stays."""
    if shell.custom_exceptions is OURS:
        shell.set_custom_exc((), None)


def advice(error: BaseException) -> str | None:
    """One line for an error whose traceback passes through this package, None for any other."""
    inside, innermost = _inside(error.__traceback__)
    if inside is None:
        return None
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"igpt-lab: {MEMORY}"
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    line = " ".join(message.split("\n")[0].split()) or "no message"
    plain = innermost and isinstance(error, ValueError | OSError | TypeError | KeyError | AttributeError)
    return f"igpt-lab: {line}" if plain else f"igpt-lab: {type(error).__name__} in {inside}: {line}"


def _inside(trace: TracebackType | None) -> tuple[str | None, bool]:
    """The last function of this package that a traceback passes through, and whether it ends there."""
    function, innermost = None, False
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        innermost = module.split(".")[0] == "igpt_lab"
        if innermost:
            function = f"{module}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return function, innermost


def _show(
    shell: Any, kind: type, error: BaseException, trace: TracebackType | None, tb_offset: int | None = None
) -> None:
    line = advice(error)
    if line is None:
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset, running_compiled_code=True)
    else:
        lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
        shell._showtraceback(kind, error, [f"\x1b[1m{line}\x1b[0m\n", *lines])
