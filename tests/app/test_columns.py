"""What commands print fits into a terminal of 80 columns, and says what is not known in words."""

import shutil

import pandas as pd
import pytest

from igpt_lab.app import cli
from igpt_lab.training.trainer import step_line


@pytest.fixture
def here(tiny_folder, tiny_images, tmp_path, monkeypatch):
    """A folder with the model `tiny` and the images `shades`, so that no path is long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(tiny_folder, "tiny")
    shutil.copytree(tiny_images, "shades")
    return tmp_path


def printed(words: str, capsys, code: int = 0) -> str:
    assert cli.main(words.split()) == code
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    return shown


def test_what_commands_print_fits(here, capsys):
    checks = printed("check tiny --images shades --device cpu", capsys)
    assert "left out  device against CPU: no accelerator" in checks and checks.count("\npass ") >= 10
    one = printed("probe tiny shades --untrained 1 --permutations 2 --device cpu", capsys)
    assert "nats per token" in printed("evaluate tiny shades --device cpu", capsys)
    printed("plan L imagenet --devices 8xH100", capsys)
    plan = printed("paper --size s --plan --device cpu", capsys)
    assert "stage" in plan and "hours" in plan and "--limit" in plan and "downloads" in plan
    printed("properties tiny shades --device cpu", capsys)
    printed("scores tiny shades --scored 40 --device cpu", capsys)
    pixels = pd.read_csv("results/mine/tiny-shades/probe.csv").query("control == 'raw pixels'").test_accuracy.item()
    assert f"raw pixels: {pixels:.1%} [" in one and "their chosen less last: " in one
    assert " to " not in one.partition("untrained networks")[2].partition(";")[0]  # one network has one number
    tuned = "finetune tiny shades --out tuned --steps 2 --batch-size 8 --log-every 1 --pad 0 --device cpu"
    assert "step 0: validation " in printed(tuned, capsys)


def test_an_unknown_command_gets_a_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["zzz"])
    assert capsys.readouterr().err == "igpt-lab: no command 'zzz'; igpt-lab --help lists them\n"


def test_a_step_says_only_what_is_known():
    nan = float("nan")
    assert step_line(0, nan, 2.30258, "nats", ("10.0% right",), 0) == "step 0: validation 2.3026 nats, 10.0% right"
    assert step_line(30, 2.5, 1.25, "nats", speed=3525) == (
        "step 30: train 2.5000, validation 1.2500 nats, 3,525 tokens/s"
    )
    assert step_line(0, nan, nan, "nats") == "step 0: begins"


def test_images_that_cannot_be_read_are_left_out_where_that_is_asked_for(here, capsys):
    (here / "shades/train/dark/000.png").write_bytes(b"no picture")
    assert cli.main(["probe", "tiny", "shades", "--device", "cpu"]) == 1
    assert "on_bad_image='skip' leaves such images out" in capsys.readouterr().err
    words = "probe tiny shades --untrained 0 --permutations 0 --device cpu --on-bad-image skip".split()
    assert cli.main(words) == 0
    assert "left out shades train row 0 (train/dark/000.png)" in capsys.readouterr().err
    assert set(pd.read_csv("results/mine/tiny-shades/probe.csv").n_train) == {59}


def test_scores_of_few_images_leave_out_the_one_that_needs_more(here, capsys):
    assert cli.main("scores tiny shades --scored 6 --device cpu".split()) == 0
    shown = capsys.readouterr()
    table = pd.read_csv("results/mine/tiny-shades/scores.csv")
    assert table.lidar.isna().all() and table.dime.notna().all()
    assert "lidar is left out" in shown.err and "at least 9" in shown.err and "lidar" not in shown.out
