"""The page of results is what the template and the files in results/ give."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from igpt_lab.core.seeds import compare_families, summarise_runs, summarise_seeds
from tables import seed_table, shift_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def studies(maker, tmp_path, monkeypatch):
    """results/studies of a copy that has every file but those of the seeds and of the shift."""
    folder = tmp_path / "results/studies"
    folder.mkdir(parents=True)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for path in [*(ROOT / "results").glob("*-xs-*"), *(ROOT / "results/studies").iterdir()]:
        if not path.name.startswith((*maker.SEED_STUDIES, "shift")):
            (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    monkeypatch.setattr(maker, "ROOT", tmp_path)
    return folder


def save(table, folder, name):
    """The four tables of `igpt-lab dynamics --final`."""
    runs = summarise_runs(table)
    parts = {
        "": table.assign(C=1.0),
        "_runs": runs,
        "_summary": summarise_seeds(runs),
        "_differences": compare_families(runs),
    }
    for ending, rows in parts.items():
        rows.to_csv(folder / f"{name}{ending}.csv", index=False)


@pytest.mark.parametrize("name", ["results", "why_the_middle", "benchmarks"])
def test_every_number_on_the_page_is_one_of_a_file(maker, name):
    assert maker.PAGES[name].read_text(encoding="utf-8") == maker.rendered(name)
    readme = maker.README.read_text(encoding="utf-8")
    assert readme == maker.for_readme(readme, maker.rendered("results")) and "| chosen layer | " in readme


def test_check_names_a_page_that_is_not_what_the_files_give(maker, tmp_path, monkeypatch, capsys):
    assert maker.main(["--check"]) == 0
    stale = tmp_path / "README.md"
    stale.write_text(maker.README.read_text(encoding="utf-8").replace("| chosen layer | ", "| chosen layer | 1"))
    monkeypatch.setattr(maker, "README", stale)
    assert maker.main(["--check"]) == 1 and "README.md is not what results/ gives" in capsys.readouterr().out


def test_a_goal_is_reached_or_missed_by_a_share_and_says_what_was_tried(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "ROOT", tmp_path)
    files = {
        "docs/goals.csv": "what,file,case,metric,goal,tried\n2,a,x,speed,2,\n4,a,x,speed,4,much\n"
        "near,a,x,speed,3.001,\nrate,a,x,share of it,0.8,\nb,b,,time,1200,",
        "results/benchmarks/abacus/a.csv": "case,metric,ours,ratio\ny,speed,1,9\nx,speed,1,3\nx,share of it,0.6,3",
        "results/benchmarks/abacus/b.csv": "case,metric,ours,ratio\nz,time,1600,",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (rows,) = maker.goals().values()
    assert [row["value"] for row in rows] == ["3", "3", "3", "0.6", "1,600"]
    missed = ["missed by 25%; tried: much", "missed by less than 1%", "missed by 25%", "missed by 25%"]
    assert [row["verdict"] for row in rows] == ["reached", *missed]


def test_the_seeds_of_one_study_are_on_the_page_alone(maker, studies):
    table = seed_table().assign(n_train=1234)
    table.loc[table.control == "raw pixels", ["low", "high"]] = 0.89, 0.91
    save(table, studies, "fashion_seeds")
    page = maker.rendered("results").splitlines()
    assert {line for line in page if "seeds" in line and line[0] == "#"} == {
        "## Pretraining seeds",
        "### Other seeds of `fashion-xs`",
    }
    assert "A linear probe of raw pixels has 90.0% [89.0, 91.0]." in page
    # t of 2 degrees of freedom is 4.302653; depths 1/2, 1/2, 1, heights 50, 56, 47 and drops 6, 10, 0 by hand
    # layers that may be the best: 1, 1..2 and 2 of a, 1..2 of b
    a = "| `a` | 3 | 2.000 | 67 [-5, 138] | 67 to 83 | 51.0 [39.6, 62.4] | 48.0 to 55.0 |"
    a += " +5.3 [-7.2, +17.8] | +3.3 to +6.3 |"
    b = "| `b` | 1 | 2.000 | 50 | 50 to 100 | 60.0 | 57.0 to 64.0 | +10.0 | +8.0 to +11.0 |"
    run = "| `a` | 2 | 2.000 | 28.0% | 2 of 2 | 47.0% | 47.0% | 2 | +0.0 [-2.0, +1.0] | 0.040 | holds |"
    assert not {a, b, run} - set(page)
    assert not any(" less `" in line and "| depth |" in line for line in page)  # of one seed there is no difference


def test_differences_of_families_say_what_is_not_resolved(maker, studies):
    alike = seed_table().query("family == 'b'")
    higher = [alike.assign(seed_of_pretraining=s, test_accuracy=alike.test_accuracy + s / 1000) for s in (1, 2)]
    lossless = pd.concat([alike, *higher]).assign(loss=float("nan"))
    others = lossless.assign(family="c", loss=2.0, test_accuracy=lossless.test_accuracy - 0.1)
    save(pd.concat([lossless, others]).assign(n_train=1234), studies, "seeds")
    page = maker.rendered("results").splitlines()
    assert "1,234 training and" in " ".join(page) and "| `b` | 3 |  | 50 [50, 50] |" in "\n".join(page)
    rows = [line.split(" | ")[1:] for line in page if line.startswith("| `b` less `c` |")]
    # deviation 0.1 of each, so the difference has the error 0.1 sqrt(2 / 3), and t of 4 degrees of freedom is 2.776445
    assert rows[0] == ["depth", "+0.0", "", "", "not resolved |"]
    assert rows[1][:2] == ["height", "+10.0 [+9.8, +10.2]"] and rows[1][-1] == "holds |"
    assert (rows[2][0], rows[2][-1]) == ("drop", "not resolved |")


def test_without_their_tables_the_page_says_nothing_of_seeds(maker, studies):
    assert "## Pretraining seeds" not in maker.rendered("results")


def test_the_shift_is_on_its_page_where_its_table_is(maker, studies):
    assert "Objective and shift" not in maker.rendered("why_the_middle")
    shift_table().to_csv(studies / "shift.csv", index=False)
    page = maker.rendered("why_the_middle").splitlines()
    # 0.5 / 3 + 0.05 of family a at the first level but one; height 0.1 above it, best_depth 0.4 and drop_change 0.3
    row = "| `a` | contrast | 0.4 | 31.7 [29.7, 34.7] | 27.7 to 36.7 | +21.7 [+19.7, +24.7] | +17.7 to +26.7 |"
    row += " 62 [60, 65] | 58 to 67 | +51.7 [+49.7, +54.7] | +47.7 to +56.7 |"
    assert row in page and not any("mlp_act" in line and "blur" in line for line in page)
    # a family of one seed has no interval over seeds
    assert "| `b` | `mlp_act` | 60.0 | 56.0 to 65.0 | +50.0 | +46.0 to +55.0 | 90 | 86 to 95 |" in page
