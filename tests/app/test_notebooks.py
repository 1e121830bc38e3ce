"""The notebooks' rules, and all of them run on a tiny model by the command that users run."""

import ast
import json
import re

import nbformat
import pandas as pd
import pytest

from igpt_lab.app import cli
from igpt_lab.app import notebooks as workbench
from igpt_lab.core.display import MODEL

FOLDER = workbench.notebooks()
PATHS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = (
    "tour_layer_curve",
    "layer_curve", "companions", "selectivity", "few_label_curve", "samples", "completions", "temperatures",
    "neighbours", "surprise", "contact_sheet", "protocol", "geometry", "cka", "cka_random", "training_dynamics",
    "fine_tuning", "bits", "lens", "strip", "offsets", "attention", "looks", "left_out", "heads", "windows",
    "positions", "prefixes", "attentive",
)  # fmt: skip


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_the_pipeline_is_all_the_notebooks():
    assert tuple(path.stem for path in PATHS) == workbench.NOTEBOOKS


def code_of(cell) -> str:
    """A cell without IPython's magics."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_rules(path):
    cells = code_cells(path)
    assert [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])] == [0]
    for cell in cells:
        assert not any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda) for node in ast.walk(ast.parse(code_of(cell)))
        )
        assert len([line for line in code_of(cell).splitlines() if line]) <= 7, cell.source
    figures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert path.stat().st_size < max(500_000, 110_000 * figures)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_opens_with_its_question_and_ends_with_what_to_try(path):
    first, *_, last = nbformat.read(path, as_version=4).cells
    assert first.cell_type == last.cell_type == "markdown"
    title, question, paper, *_ = first.source.split("\n\n")
    assert title.startswith(f"# {path.stem[1]} · ") and question.startswith("**Question.** ") and "?" in question
    assert paper.startswith("**The paper.** ") and "\n**Next.** " in f"\n{last.source}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_executed(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "injected-parameters" not in path.read_text()
    for cell in cells:
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(cell.outputs))


def test_every_quick_value_is_a_parameter():
    named = {
        target.id for path in PATHS for node in ast.parse(code_cells(path)[0].source).body for target in node.targets
    }
    assert named >= {"model", "images", "out", *workbench.QUICK}


@pytest.mark.slow
@pytest.mark.slow
def test_reproduce_on_a_tiny_model(tiny_folder, tiny_images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_folder), "--images", str(tiny_images), "--out", str(out), "--quick"]
    assert cli.main(["reproduce", *arguments, "--all"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        "model", "images", "n_layers", "chosen_layer", "chosen_accuracy", "chosen_interval", "first_accuracy",
        "last_accuracy", "p_value", "test_rows", "seconds", "quick", "reference",
    }  # fmt: skip
    assert list(summary["seconds"]) == list(workbench.NOTEBOOKS) and min(summary["seconds"].values()) > 0
    table = pd.read_csv(out / "layer_curve.csv", keep_default_na=False)
    assert set(table.control) == {MODEL, "raw pixels", "random network", "permuted labels"}
    ours = table[table.control == MODEL].set_index("layer")
    assert summary["n_layers"] == 3 and len(ours) == 4 and summary["test_rows"] == 40
    assert ours.validation_accuracy[summary["chosen_layer"]] == pytest.approx(ours.validation_accuracy.max())
    assert ours.test_accuracy[summary["chosen_layer"]] == summary["chosen_accuracy"] > 0.8  # dark against light
    few = pd.read_csv(out / "few_label_curve.csv", keep_default_na=False)
    assert sorted(few.k.unique()) == [4, 25] and sorted(few.draw.unique()) == [0, 1]
    for name in FIGURES:
        assert all((out / f"{name}.{kind}").stat().st_size for kind in ("png", "pdf", "svg", "csv", "json"))
    assert len(list((out / "notebooks").glob("*.ipynb"))) == len(PATHS)
    printed = capsys.readouterr().out
    assert f"chosen layer {summary['chosen_layer']} of 0..3" in printed and str(out) in printed
    assert summary["quick"] and "few images is not compared" in summary["reference"] and summary["reference"] in printed
    assert (out / "summary.txt").read_text() in printed and not (out / "reference.csv").exists()


def test_reproduce_only_some(tiny_folder, tiny_images, tmp_path, capsys):
    arguments = ["--model", str(tiny_folder), "--images", str(tiny_images), "--out", str(tmp_path), "--quick"]
    assert cli.main(["reproduce", *arguments, "--only", "01_features"]) == 0
    assert [path.name for path in (tmp_path / "notebooks").iterdir()] == ["01_features.ipynb"]
    assert str(tmp_path) in capsys.readouterr().out and not (tmp_path / "summary.json").exists()
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--only", "1_features"])
