"""Progress bars: `tqdm`, that of `tqdm.auto`, but text in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import auto, std

if TYPE_CHECKING:
    from tqdm.std import tqdm

MARK = {"progress": True}  # the metadata of a cell's output that is a bar


class _InCell(std.tqdm):
    """A bar that is text in the cell's output.

    That of `tqdm.auto` is a widget there: a notebook that is opened again has "model not found" in its place.
    """

    _output: Any = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"ncols": 80, "gui": True} | options)  # with gui it writes nothing by itself
        if not self.disable and not self.delay:
            self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the text in place of the one before."""
        from IPython.display import display  # slow to import, and only needed in a kernel

        text = {"text/plain": str(self) if msg is None else msg}
        if self._output is None:
            self._output = display(text, raw=True, metadata=MARK, display_id=True)
        else:
            self._output.update(text, raw=True, metadata=MARK)
        return True

    def clear(self, *_: Any, **__: Any) -> None:
        """Nothing: what is written beside a bar does not touch it."""

    def close(self) -> None:
        """Leave the last state, or nothing where `leave` is False."""
        if self.disable:
            return
        super().close()
        if self._output is not None:
            self.display("" if self.leave is False else None)


if not TYPE_CHECKING:
    tqdm = _InCell if auto.notebook_tqdm.__module__ == "tqdm.notebook" else auto.tqdm
