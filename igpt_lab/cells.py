"""Errors in a notebook's cell: what came, what was expected and what to do in one line, before the traceback."""

import sys
from types import TracebackType

MEMORY = "out of memory; give a smaller batch_size, or fewer images with limit"


def explain_errors() -> None:
    """In IPython, put a line of advice before the traceback of an error that comes out of this package.

    Errors from elsewhere are shown as ever. Where somebody else has set a handler of exceptions, it stays.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and not shell.custom_exceptions:
        shell.set_custom_exc((Exception,), _show)


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
    found, innermost = None, False
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        innermost = module.split(".")[0] == "igpt_lab"
        if innermost:
            found = f"{module}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found, innermost


def _show(shell, kind, error, trace, tb_offset=None) -> None:
    line = advice(error)
    if line is None:
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset, running_compiled_code=True)
    else:
        lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
        shell._showtraceback(kind, error, [f"\x1b[1m{line}\x1b[0m\n", *lines])
