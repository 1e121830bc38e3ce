"""The page of results is what the template and the files in results/ give."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_number_on_the_page_is_one_of_a_file():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.rendered()
    readme = maker.README.read_text(encoding="utf-8")
    assert readme == maker.with_results(readme) and "| chosen layer | " in readme
