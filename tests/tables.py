"""Small tables by hand that figures are drawn from."""

import itertools

import pandas as pd

from igpt_lab.core.display import MODEL
from igpt_lab.core.provenance import RunRecord

RECORD = RunRecord("test", {"a": 1}, seed=0, commit="c", versions={})


def layer_table() -> pd.DataFrame:
    rows = [(MODEL, layer, a, layer == 1, layer != 2) for layer, a in enumerate((0.5, 0.8, 0.7))]
    rows += [("random network", layer, 0.45, layer == 0, True) for layer in range(3)]
    rows += [("raw pixels", 0, 0.6, True, True), ("permuted labels", 1, 0.05, True, True)]
    table = pd.DataFrame(rows, columns=["control", "layer", "test_accuracy", "chosen", "converged"])
    return table.assign(low=table.test_accuracy - 0.01, high=table.test_accuracy + 0.01, n_test=100)


def drawn_table(base: float = 0.0) -> pd.DataFrame:
    """`layer_table` with two random networks and three permutations of four classes; `base` raises the others."""
    table = layer_table().query("control in ('model', 'raw pixels')")
    table[["test_accuracy", "low", "high"]] += base
    rows = [("random network", layer, draw, 0.5 + base + draw / 10) for layer in range(3) for draw in range(2)]
    rows += [("permuted labels", layer, draw, 0.2 + draw / 50) for layer in range(3) for draw in range(3)]
    drawn = pd.DataFrame(rows, columns=["control", "layer", "draw", "test_accuracy"])
    drawn = drawn.assign(low=drawn.test_accuracy - 0.05, high=drawn.test_accuracy + 0.05, converged=True, n_test=100)
    drawn = drawn.assign(chosen=drawn.layer == 1, n_classes=drawn.control.map({"permuted labels": 4}))
    return pd.concat([table, drawn], ignore_index=True)


def selectivity_table() -> pd.DataFrame:
    table = layer_table().query("control == 'model'")[["layer", "test_accuracy", "low", "high", "chosen", "n_test"]]
    for name, value in (("control_accuracy", 0.3), ("selectivity", table.test_accuracy - 0.3)):
        ends = name.removesuffix("_accuracy")
        table = table.assign(**{name: value, f"{ends}_low": value - 0.02, f"{ends}_high": value + 0.03})
    return table


def lens_table() -> pd.DataFrame:
    """Two lenses over three layers."""
    rows = [(layer, kind, 5 - layer - by) for kind, by in (("logit", 0.0), ("tuned", 1.0)) for layer in range(3)]
    table = pd.DataFrame(rows, columns=["layer", "kind", "nats"])
    return table.assign(low=table.nats - 0.2, high=table.nats + 0.2, n=400)


def strip_table() -> pd.DataFrame:
    """An image of 2 x 3 pixels through eight layers, whose pixels settle at layers 0 to 5."""
    rows = [
        (layer, "logit lens", y, x, 8.0 - layer, 3 * y + x) for layer in range(8) for y in range(2) for x in range(3)
    ]
    table = pd.DataFrame(rows, columns=["layer", "kind", "row", "column", "nats", "settled"])
    colours = {"red": 30 * table.layer, "green": 50 * table.column, "blue": 0}
    return table.assign(**colours, true_red=255, true_green=100 * table.row, true_blue=9)


def cka_table() -> pd.DataFrame:
    pairs = [(a, b, 1 - 0.1 * abs(a - b) - 0.01 * (a > b)) for a in (0, 3, 6) for b in (0, 6)]
    return pd.DataFrame(pairs, columns=["layer", "other_layer", "cka"]).assign(n=1000, batches=4)


def geometry_table() -> pd.DataFrame:
    rows = [(MODEL, layer, 5 + layer, 20 + layer, 0.5 + layer / 10) for layer in range(3)]
    rows += [("random network", layer, 9, 30, 0.3) for layer in range(3)] + [("raw pixels", 0, 12, 160, 0.75)]
    names = ["intrinsic_dimension", "effective_rank", "label_overlap"]
    table = pd.DataFrame(rows, columns=["control", "layer", *names]).assign(n=1000)
    intervals = {f"{name}_{end}": table[name] + by for name in names[::2] for end, by in (("low", -0.1), ("high", 0.1))}
    return table.assign(**intervals)


def protocol_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    levels = [("sos", "raw"), ("ln_1", "resid_pre"), ("standardised", "unscaled"), ("converged", "100 iterations")]
    settings = [("", *combination) for combination in itertools.product(*levels)]
    settings.append(("transformers", "raw", "hidden states", "unscaled", "1000 iterations"))
    names = "recipe alignment point scaling solver layer test_accuracy chosen converged".split()
    rows = [
        (*setting, layer, 0.5 + i / 100 + layer / 10, layer == 1, setting[-1] == "converged" or layer == 0)
        for i, setting in enumerate(settings)
        for layer in range(3)
    ]
    table = pd.DataFrame(rows, columns=names)
    table = table.assign(low=table.test_accuracy - 0.03, high=table.test_accuracy + 0.02, n_test=100)
    places = ("chosen layer", "last layer", "drop")
    rows = [("alignment", "sos", "raw", "average", at, i / 100) for i, at in enumerate(places)]
    rows += [("alignment", "sos", "raw", "ln_1", "last layer", difference) for difference in (0.0, 0.02)]
    rows += [("recipe", "ours", "transformers", "", at, -0.01) for at in places]
    rows += [("interaction", "point", "scaling", "", at, 0.005) for at in places]
    effects = pd.DataFrame(rows, columns=["factor", "a", "b", "others", "at", "difference"])
    return table, effects.assign(low=effects.difference - 0.02, high=effects.difference + 0.01)


def stopped_table() -> pd.DataFrame:
    """Two fits that a stopped solver repeats badly, one more than the other."""
    rows = [("sos", "ln_1", "standardised", "chosen layer", 1, 0.8, 0.79, 0.8)]
    rows.append(("sos", "resid_pre", "unscaled", "last layer", 2, 0.75, 0.6, 0.7))
    return pd.DataFrame(rows, columns="alignment point scaling at layer converged min max".split())


def seed_table() -> pd.DataFrame:
    """Two families of runs with 3 layers: "a" of seeds 0, 1, 2, whose chosen layers are 1, 1 and 2, and "b" of one."""
    curves = {
        ("a", 0): (0.30, 0.50, 0.44),
        ("a", 1): (0.32, 0.56, 0.46),
        ("a", 2): (0.28, 0.40, 0.47),
        ("b", 0): (0.2, 0.6, 0.5),
    }
    rows = [
        (family, seed, MODEL, layer, a, a == max(curve), a > 0.45, max(curve) - curve[-1])
        for (family, seed), curve in curves.items()
        for layer, a in enumerate(curve)
    ]
    names = "family seed_of_pretraining control layer test_accuracy chosen in_peak_set drop".split()
    table = pd.DataFrame(rows, columns=names).assign(drop_p=0.01, loss=2.0, n_test=100)
    table = table.assign(low=table.test_accuracy - 0.03, high=table.test_accuracy + 0.04)
    table = table.assign(drop_low=table["drop"] - 0.02, drop_high=table["drop"] + 0.01, model="m")
    pixels = table[table.layer == 0].assign(control="raw pixels", test_accuracy=0.9, chosen=True)
    return pd.concat([table, pixels], ignore_index=True)


def shift_table() -> pd.DataFrame:
    """Two points, two corruptions of three levels: family "a" of three seeds falls deeper than "b" of one."""
    levels = [("contrast", 1.0), ("contrast", 0.4), ("contrast", 0.2), ("blur", 0.0), ("blur", 1.0), ("blur", 2.5)]
    rows = [
        (family, point, *level, seeds, 0.5 / seeds + i / 20)
        for point in ("ln_1", "mlp_act")
        for i, level in enumerate(levels)
        for family, seeds in (("a", 3), ("b", 1))
    ]
    table = pd.DataFrame(rows, columns="family point corruption level n_seeds drop_mean".split())
    for place, measure in enumerate(("drop", "height", "drop_best", "drop_change", "best_depth")):
        mean, known = table.drop_mean + place / 10, table.n_seeds > 1
        ends = {"mean": mean, "low": (mean - 0.02).where(known), "high": (mean + 0.03).where(known)}
        ends |= {"images_low": mean - 0.04, "images_high": mean + 0.05}
        table = table.assign(**{f"{measure}_{end}": values for end, values in ends.items()})
    return table


def leave_out_table(*, accuracy: bool = True) -> pd.DataFrame:
    """Three layers of two heads: the first block costs most, the last one gains a little."""
    places = [(part, layer, None) for part in ("block", "attention", "mlp") for layer in range(3)]
    places += [("head", layer, head) for layer in range(3) for head in range(2)]
    table = pd.DataFrame(places, columns=["part", "layer", "head"]).astype({"head": "Int64"})
    nats = table.layer.map({0: 2.5, 1: 0.02, 2: -0.003}) / (1 + table["head"].fillna(0).astype(int))
    table = table.assign(kind="skip", nats=nats + 3, nats_change=nats, low=nats - 0.01, high=nats + 0.01)
    if accuracy:
        lost = table.layer.map({0: -0.3, 1: -0.02, 2: 0.0})
        table = table.assign(probe_layer=2, accuracy=0.5 + lost, accuracy_change=lost)
        table = table.assign(accuracy_low=lost - 0.02, accuracy_high=lost + 0.02, p_value=0.5)
    return table.assign(n=100)


def window_table() -> pd.DataFrame:
    rows = [
        (radius, *blocks, 2.0 / (1 + radius) ** 2 / (1 + blocks[0]))
        for radius in (0, 1, 3)
        for blocks in ((0, 1), (2, 2))
    ]
    table = pd.DataFrame(rows, columns=["radius", "first", "last", "nats_change"])
    table = table.assign(low=table.nats_change - 0.02, high=table.nats_change + 0.02, probe_layer=2, n=100)
    lost = -0.1 * table.nats_change
    return table.assign(accuracy_change=lost, accuracy_low=lost - 0.01, accuracy_high=lost + 0.01)


def position_table() -> pd.DataFrame:
    """Three layers, positions 0 and 7: the first knows nothing, of the second layer 1 is chosen."""
    rows = [(layer, 0, 0.1, layer == 2) for layer in range(3)]
    rows += [(layer, 7, a, layer == 1) for layer, a in enumerate((0.3, 0.5, 0.4))]
    table = pd.DataFrame(rows, columns=["layer", "position", "test_accuracy", "chosen"])
    return table.assign(low=table.test_accuracy - 0.02, high=table.test_accuracy + 0.03, n_test=100)


def prefix_table() -> pd.DataFrame:
    return position_table().assign(share=[0.5] * 3 + [1.0] * 3).drop(columns="position")


def attentive_table() -> pd.DataFrame:
    """Layers 0 and 4, both probes, seeds 0 and 1 of the attentive one 0.02 apart."""
    rows = [(layer, "attentive", seed, 0.6 + 0.02 * seed + layer / 20) for layer in (0, 4) for seed in (0, 1)]
    rows += [(layer, "mean", seed, 0.5 + layer / 40) for layer in (0, 4) for seed in (0, 1)]
    table = pd.DataFrame(rows, columns=["layer", "probe", "seed", "test_accuracy"])
    return table.assign(low=table.test_accuracy - 0.02, high=table.test_accuracy + 0.02, n_test=100)


def target_table() -> pd.DataFrame:
    """Three layers and ten targets, of which the first is below any axis at layer 0; and raw pixels."""
    rows = [
        (MODEL, layer, f"t{i}", layer / 4 + i / 20 - 3 * (layer == i == 0)) for layer in range(3) for i in range(10)
    ]
    rows += [("raw pixels", 0, f"t{i}", 0.5) for i in range(10)]
    table = pd.DataFrame(rows, columns=["control", "layer", "target", "test_r2"])
    table = table.assign(low=table.test_r2 - 0.05, high=table.test_r2 + 0.04, n_test=100)
    return table.assign(chosen=(table.layer == 2) | (table.control != MODEL))


def attention_tables(side: int = 4, layers: int = 3, heads: int = 2) -> dict[str, pd.DataFrame]:
    """Made-up tables of `attention_maps` and `attention_from` (of pixel (1, 2)), by the figure that shows them."""
    index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"]).to_frame(index=False)
    depth = index.assign(distance=2 + index.layer / 5, entropy=1.5 + index["head"] / 10, n=20, weighting="weights")
    for name in ("distance", "entropy"):
        ends = {f"{name}_low": depth[name] - 0.1, f"{name}_high": depth[name] + 0.1, f"{name}_uniform": 3.0}
        depth = depth.assign(**ends)
    pairs = [(-up, dx) for up in range(side) for dx in range(1 - side, side) if up or dx < 0]
    offsets = index.merge(pd.DataFrame(pairs, columns=["dy", "dx"]), how="cross")
    offsets = offsets.assign(share=0.4 / (offsets.dx**2 + 9 * offsets.dy**2), n=20, weighting="values")
    cells = pd.DataFrame([(row, column) for row in range(side) for column in range(side)], columns=["row", "column"])
    one = index.merge(cells, how="cross")
    seen = one.row * side + one.column < side + 2
    one = one.assign(weight=(0.9 / (side + 2) * (1 + one["head"] / 9)).where(seen), sos=0.05, weighting="weights")
    return {"attention_depth": depth, "offset_maps": offsets, "attention_from": one}


def bits_table() -> pd.DataFrame:
    """Three layers and seven targets; one fit did not converge."""
    targets = {"current pixel": 4.0, "next pixel": 4.0, "row": 3.6, "column": 3.6, "mean colour": 3.0}
    targets |= {"class": 3.3, "class (mean state)": 3.3}
    rows = [
        (layer, name, h * (1 + layer + i) / 10, h) for layer in range(3) for i, (name, h) in enumerate(targets.items())
    ]
    table = pd.DataFrame(rows, columns=["layer", "target", "bits", "entropy"])
    table = table.assign(low=table.bits - 0.1, high=table.bits + 0.1, log_loss=table.entropy - table.bits, C=0.01)
    return table.assign(converged=table.index != 4, n_images=100, n_states=400)
