"""README's numbers are those in results/."""

import json
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_layer_numbers():
    summary = json.loads((ROOT / "results/summary.json").read_text())
    table = pd.read_csv(ROOT / "results/layer_curve.csv", keep_default_na=False)
    ours = table[table.control == ""].set_index("layer")
    for layer in (summary["best_layer"], 0, summary["n_layers"]):
        row = ours.loc[layer]
        assert f"{100 * row.test_accuracy:.1f}%" in TEXT
        assert f"[{100 * row.low:.1f}, {100 * row.high:.1f}]" in TEXT
    assert (
        f"| {summary['best_layer']} of 0..{summary['n_layers']} |" in TEXT and f"p = {summary['p_value']:.4f}" in TEXT
    )
    for control in ("random network", "permuted labels"):
        values = 100 * table[table.control == control].test_accuracy
        assert f"{values.min():.1f} to {values.max():.1f}%" in TEXT
    assert table.converged.all()


def test_few_label_numbers():
    table = pd.read_csv(ROOT / "results/few_label_curve.csv", keep_default_na=False)
    chosen = table[(table.control == "") & (table.layer_rule == "chosen")]
    for k, values in chosen.groupby("k").test_accuracy:
        assert f"| {k} labels a class" in TEXT and f"{100 * values.mean():.1f}% ({100 * values.std():.1f})" in TEXT
