"""README's numbers are those of the shipped runs, and its table of differences is that of the tests."""

import ast
import json
import re
from pathlib import Path

import pandas as pd

import igpt_lab as lab
from igpt_lab.core.display import MODEL
from igpt_lab.core.significance import compare
from igpt_lab.features.planning import flops

ROOT = Path(__file__).resolve().parents[1]
FASHION = ROOT / "results/fashion-xs-fashion-mini"
CIFAR10 = ROOT / "results/cifar10-xs-cifar10"
INTEL, AMD = (ROOT / "results/benchmarks" / name for name in ("intel-xeon", "amd-epyc"))
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_layer_numbers():
    summary = json.loads((FASHION / "summary.json").read_text())
    table = pd.read_csv(FASHION / "layer_curve.csv", keep_default_na=False)
    ours = table[table.control == MODEL].set_index("layer")
    for layer in (summary["best_layer"], 0, summary["n_layers"]):
        row = ours.loc[layer]
        assert f"{100 * row.test_accuracy:.1f}%" in TEXT
        assert f"[{100 * row.low:.1f}, {100 * row.high:.1f}]" in TEXT
    assert f"| {summary['best_layer']} of 0..{summary['n_layers']} |" in TEXT
    assert f"p = {summary['p_value']:.0e}".replace("e-0", "e-") in TEXT and summary["p_value"] < 0.001
    comparison = json.loads((FASHION / "layer_curve.json").read_text())["config"]["comparison"]
    difference, low, high = (100 * comparison[name] for name in ("difference", "low", "high"))
    assert f"+{difference:.1f} points [{low:.1f}, {high:.1f}]" in TEXT
    for control in ("random network", "permuted labels"):
        values = 100 * table[table.control == control].test_accuracy
        assert f"{values.min():.1f} to {values.max():.1f}%" in TEXT
        assert (values < 100 * ours.test_accuracy[summary["best_layer"]]).all()
    pixels = 100 * table[table.control == "raw pixels"].iloc[0][["test_accuracy", "low", "high"]].astype(float)
    assert "| {:.1f}% [{:.1f}, {:.1f}] |".format(*pixels) in TEXT
    assert (100 * ours.test_accuracy.loc[7:18] > pixels.iloc[0]).all() and "layers 7 to 18 all pass" in TEXT
    peak = ours.index[ours.in_peak_set.astype(str) == "True"]
    assert peak.tolist() == [9, *range(11, 18)] and "is 9 or one of 11 to 17" in TEXT
    assert table.converged.all()


def test_numbers_of_the_colour_model():
    said, folder = " ".join(TEXT.split()), CIFAR10
    table = pd.read_csv(folder / "layer_curve.csv", keep_default_na=False)
    comparison = json.loads((folder / "layer_curve.json").read_text())["config"]["comparison"]
    ours = table[table.control == MODEL].set_index("layer")
    best, low, high = 100 * ours.loc[comparison["best_layer"], ["test_accuracy", "low", "high"]].astype(float)
    assert f"from {100 * ours.test_accuracy[0]:.1f}% at layer 0 to {best:.1f}% [{low:.1f}, {high:.1f}] at layer" in said
    assert f"at layer {comparison['best_layer']} of 0..{ours.index.max()}" in said
    peak = ours.index[ours.in_peak_set.astype(str) == "True"]
    assert peak.tolist() == list(range(peak[0], peak[-1] + 1)) and f"layers {peak[0]} to {peak[-1]} may be" in said
    difference, low, high = (100 * comparison[name] for name in ("difference", "low", "high"))
    assert f"falls to {100 * comparison['last_accuracy']:.1f}% at the last" in said
    assert f"+{difference:.1f} points [{low:.1f}, {high:.1f}]" in said and f"p = {comparison['p_value']:.0e}" in said
    pixels, random = (
        100 * table[table.control == name].test_accuracy.max() for name in ("raw pixels", "random network")
    )
    assert f"Raw pixels reach {pixels:.1f}%, the random network at most {random:.1f}%" in said
    companions = pd.read_csv(folder / "companions.csv", keep_default_na=False)
    joined = 100 * companions[companions.control == "five layers joined"].test_accuracy.item()
    assert f"joined, {joined:.1f}%" in said


def test_few_label_numbers():
    table = pd.read_csv(FASHION / "few_label_curve.csv", keep_default_na=False)
    chosen = table[(table.control == MODEL) & (table.layer_rule == "chosen")]
    for k, values in chosen.groupby("k").test_accuracy:
        assert f"| {k} labels a class" in TEXT and f"{100 * values.mean():.1f}% ({100 * values.std():.1f})" in TEXT


def test_geometry_numbers():
    said = " ".join(TEXT.split())
    table = pd.read_csv(FASHION / "geometry.csv", keep_default_na=False)
    by_control = {control: rows.set_index("layer") for control, rows in table.groupby("control")}
    ours, random, pixels = (by_control[name] for name in (MODEL, "random network", "raw pixels"))
    overlap, last = 100 * ours.filter(like="label_overlap"), ours.index.max()
    best = overlap.label_overlap.idxmax()
    ends = {layer: f"[{row.label_overlap_low:.1f}, {row.label_overlap_high:.1f}]" for layer, row in overlap.iterrows()}
    share = {layer: f"{value:.1f}%" for layer, value in overlap.label_overlap.items()}
    near = overlap.index[overlap.label_overlap_high >= overlap.label_overlap_low[best]]
    assert near.tolist() == list(range(near[0], near[-1] + 1))
    assert (
        f"at layer {best} ({share[best]} {ends[best]}), though the intervals of layers {near[0]} to {near[-1]}" in said
    )
    assert f"at layer 0 {share[0]} do" in said
    assert f"at the last {share[last]} {ends[last]}, in raw pixels {100 * pixels.label_overlap[0]:.1f}%" in said
    assert "random network {:.1f} to {:.1f}%".format(*(100 * random.label_overlap.agg(["min", "max"]))) in said
    dimension, rank = ours.intrinsic_dimension, ours.effective_rank
    top = dimension.idxmax()
    assert f"from {dimension[0]:.1f} to {dimension[top]:.1f} at layer {top} and ends at {dimension[last]:.1f}" in said
    high = rank.idxmax()
    assert f"from {rank[0]:.1f} to {rank[high]:.1f} of {ours.n_features[0]} at layer {high} and ends at" in said
    assert f"ends at {rank[last]:.1f}. All layers" in said
    similar, against = (pd.read_csv(FASHION / f"{name}.csv") for name in ("cka", "cka_random"))
    least = similar.loc[similar.cka.idxmin()]
    assert f"at least {least.cka:.3f} between any two (layers {min(least.layer, least.other_layer):.0f}" in said
    assert f"between {against.cka.min():.3f} and {against.cka.max():.3f} with a layer of the random network" in said


def protocol(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    config = json.loads((folder / "protocol.json").read_text())["config"]
    return pd.DataFrame(config["effects"]), pd.DataFrame(config["settings"])


def points(row: pd.Series) -> str:
    return f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"


def test_protocol_numbers():
    found = {folder: protocol(folder) for folder in (FASHION, CIFAR10)}
    for factor in ("alignment", "point", "scaling", "solver", "recipe"):
        cells = []
        for effects, _ in found.values():
            rows = effects[(effects.factor == factor) & effects.others.isin(["average", ""])].set_index("at")
            cells += [points(rows.loc[at]) for at in ("chosen layer", "last layer", "drop")]
            names = "ours, the port's recipe" if factor == "recipe" else f"`{rows.a.iloc[0]}`, `{rows.b.iloc[0]}`"
        assert f"| {names} | {' | '.join(cells)} |" in TEXT, f"| {names} | {' | '.join(cells)} |"


def test_protocol_words():
    said, ours = " ".join(TEXT.split()), ["sos", "ln_1", "standardised", "converged"]
    drops = []
    for folder in (FASHION, CIFAR10):
        settings = protocol(folder)[1].set_index(["alignment", "point", "scaling", "solver"])
        rows = settings[settings.recipe == "port"].iloc[0], settings.loc[tuple(ours)]
        drops += [f"{100 * r['drop']:.1f} points [{100 * r.drop_low:.1f}, {100 * r.drop_high:.1f}]" for r in rows]
        assert rows[0]["drop_low"] > rows[1]["drop"]
    assert (
        "Its drop is {} where ours is {} on `fashion-mini`, and {} where ours is {} on CIFAR-10".format(*drops) in said
    )
    effects = protocol(CIFAR10)[0].set_index(["factor", "others", "at"]).sort_index()
    worst, mild = (
        points(effects.loc["solver", others, "last layer"])
        for others in ("sos, resid_pre, unscaled", "sos, ln_1, standardised")
    )
    assert f"100 iterations cost {worst} points at the last layer there, {mild} with `ln_1` standardised" in said
    alone = effects.loc["solver"].xs("last layer", level="at").drop("average").difference
    assert set(alone.nlargest(2).index) == {"sos, resid_pre, unscaled", "raw, resid_pre, unscaled"}  # costs most there
    scaled = effects.loc["scaling"].xs("last layer", level="at").filter(like="converged", axis=0).difference
    assert (
        len(scaled) == 4 and f"{100 * scaled.min():+.1f} to {100 * scaled.max():+.1f} points at the last layer" in said
    )
    start, in_colour = (
        effects[(effects.factor == "alignment") & (effects.others == "average")].set_index("at")
        for effects in (protocol(FASHION)[0], effects.reset_index())
    )
    gains = points(start.loc["chosen layer"]).replace(" ", " points ", 1), points(start.loc["last layer"])
    assert "The start token gains {} at the chosen layer of `fashion-xs` and {} at its last".format(*gains) in said
    gain = points(in_colour.loc["last layer"])
    assert (
        f"CIFAR-10 it gains {gain} at the last" in said
        and in_colour.low["chosen layer"] < 0 < in_colour.low["last layer"]
    )


def test_speed_of_images_to_tokens():
    table = pd.read_csv(INTEL / "pixels.csv")
    cold, warm = table[table.case.str.startswith("ImageGPTImageProcessorPil, Pillow images")].itertuples()
    said = " ".join(TEXT.split())
    assert f"{cold.ratio:.1f} times as fast as with the port's Pillow class, {warm.ratio:.1f} times once" in said
    assert f"{cold.ours:,.0f} and {warm.ours:,.0f} images/s against {cold.peer:,.0f}" in said
    assert "cold, 10,000 of CIFAR-10" in cold.case and "warm" in warm.case and "10,000 CIFAR-10 images" in said


def test_speed_of_extraction():
    table = pd.read_csv(AMD / "extract.csv")
    said = " ".join(TEXT.split())

    def ours(case, metric="speed"):
        return table[(table.case == case) & (table.metric == metric)].iloc[0]

    record, extract = (ours(f"24 x 512, float32, {name}") for name in ("record", "extract"))
    assert f"{record.ours:.2f} images/s in `record`, {extract.ours:.2f} in `extract`, against {record.peer:.3f}" in said
    assert f"{record.ratio:.2f} and {extract.ratio:.2f} times (the aim was 2.5)" in said and extract.ratio > 2.5
    shares = table[table.metric.str.startswith("share") & (table.case == record.case)].ours
    assert "at {:.0%} of the machine's matrix-multiply rate ({:.0%} with".format(*shares) in said
    assert f"through oneDNN too, {ours('24 x 512, bfloat16, record').ratio:.2f} times" in said
    assert f"take {1 / ours('24 x 512, float32, layers 0..12 only', 'time').ratio:.2f} of the time" in said
    peaks = {
        count: ours(f"fashion-xs, N = {count}", "peak memory").ours / 1000 for count in ("1,000", "4,000", "16,000")
    }
    assert "at {:.2f} GB for 1,000 images, {:.2f} for 4,000 and {:.2f} for 16,000".format(*peaks.values()) in said
    small = [ours(f"fashion-xs at 4 x 4 pixels, N = {n}", "peak memory").ours / 1000 for n in ("16,000", "64,000")]
    assert "at 4 x 4 pixels {:.2f} GB for 16,000 and {:.2f} for 64,000".format(*small) in said


def test_time_of_two_workers():
    table = pd.read_csv(INTEL / "cluster.csv")
    seconds, share = table.ours
    said = " ".join(TEXT.split())
    assert f"one thread each take {share:.2f} of the time of one such worker, {seconds:.1f} s against" in said
    assert f"{table.peer[0]:.1f} s for 48 images" in said and "N = 48" in table.case[0] and share <= 0.6


def test_speed_of_drawing():
    table = pd.read_csv(AMD / "sample.csv")
    steps = table[(table.metric == "step")].set_index("case")
    for case, row in steps.iterrows():
        name = "size S" if "(S)" in case else "`fashion-xs`' shape"
        cells = [name + ", " + case.split()[-4], *(f"{value:.3g}" for value in (row.ours, row.peer, row.ratio))]
        assert [float(x) for x in cells[1:]] in [
            [float(x) for x in line[1:]] for line in drawing_rows() if line[0] == cells[0]
        ], cells
    share = (
        table[table.case.str.contains("8 at") & table.case.str.contains("(S)", regex=False)].set_index("metric").ours
    )
    said, last = " ".join(TEXT.split()), table[table.metric.str.startswith("step at")].ours
    assert f"it reads {share['share of the bandwidth']:.0%} of the 41.0 GB/s" in said
    assert f"and {share['share of the float32 matrix-multiply rate']:.0%} of its matrix-multiply rate" in said
    assert steps.loc["24 x 512 (S), 16 x 16 pixels, 8 at a time"].ratio >= 2.5  # the floor
    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f} ms at positions".format(*last) in said


def drawing_rows():
    return [[cell.strip() for cell in row] for row in re.findall(r"^  \|(.+, \d+) \|(.+)\|(.+)\|(.+)\|$", TEXT, re.M)]


def test_speed_of_a_training_step():
    table = pd.read_csv(AMD / "train.csv")
    table = table[table.metric == "training"]
    for case, rows in table.groupby("case"):
        cells = [f"{row.ours:,.0f} | {row.peer:,.0f} | {row.ratio:.2f}" for row in rows.itertuples()]
        assert rows.peer_name.str.startswith(("transformers", "nanoGPT")).tolist() == [True, True]
        assert f"| {case} | {' | '.join(cells)} |" in TEXT


def test_speed_of_the_explorer():
    table = pd.read_csv(INTEL / "explorer.csv").set_index("metric")
    step, slowest = table.loc["step of the slider"], table.loc["slowest step"]
    assert f"layers takes {step.ours:.1f} ms, {slowest.ours:.0f} ms at most" in " ".join(TEXT.split())
    assert f"takes {step.peer:.1f} ms, without" in " ".join(TEXT.split()) and slowest.ours < 150


def test_likeness_of_samples():
    table = pd.read_csv(FASHION / "likeness.csv").set_index("measure")
    for measure, scale, digits in (("palette", 1, 3), ("patches", 1, 3), ("classifier", 100, 1)):
        row = scale * table.loc[measure]
        for value, low, high in ((row.value, row.low, row.high), (row.floor, row.floor_low, row.floor_high)):
            unit = "%" if scale == 100 else ""
            assert f"| {value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}] |" in TEXT
    assert table.samples.eq(400).all() and table.images.eq(3600).all()


def test_every_difference_is_shown_and_every_one_shown_is_named():
    tree = ast.parse((ROOT / "tests/models/test_differences.py").read_text(encoding="utf-8"))
    there = [it.name for it in tree.body if isinstance(it, ast.FunctionDef) and it.name.startswith("test_")]
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|([^|]+)\| (accident|choice) \| `(test_\w+)` \|$", TEXT, re.MULTILINE)
    assert sorted(row[-1] for row in rows) == sorted(there)


def test_every_folder_and_file_of_the_package_is_listed():
    package = ROOT / "igpt_lab"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT.partition("## The package")[2], re.MULTILINE)) == rooms
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = {
        f"{section.partition(':')[0]}/{name}"
        for section in page.split("\n### ")[1:]
        for name in re.findall(r"^\| `([\w/]+)` \|", section, re.MULTILINE)
    }
    files = {
        path.relative_to(package).with_suffix("").as_posix()
        for room in rooms
        for path in (package / room).rglob("*.py")
    }
    assert listed == {file for file in files if not file.endswith("__init__")}


def test_every_test_behind_a_promise_is_there():
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (?!promise|-)[^|]+\|([^|]+)\|$", page, re.MULTILINE)
    assert len(promises) > 30
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", promise)
        files = re.findall(r"\(\.\./(tests/[\w/]+\.py)\)", promise)
        assert named or files, promise
        for file, test in [*named, *((file, "test_") for file in files)]:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {test}" in source, f"{file} has no {test}"


def test_fine_tuning_numbers():
    said = " ".join(TEXT.split())
    config = json.loads((FASHION / "fine_tuned.json").read_text())["config"]
    images = pd.read_csv(FASHION / "fine_tuned.csv")
    right = (images.label == images.predicted).to_numpy()
    assert f"**{100 * right.mean():.1f}%** [{100 * config['low']:.1f}, {100 * config['high']:.1f}] on its 4,000" in said
    for column, against in (("probe_correct", "the best layer's probe"), ("pixels_correct", "raw pixels")):
        found = compare(right, images[column].to_numpy())
        p = f"{found.p_value:.0e}" if found.p_value < 0.001 else f"{found.p_value:.3f}"
        points = f"{100 * found.difference:+.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        assert re.search(rf"{re.escape(points)} against {against}[^()]*\(p = {re.escape(p)}\)", said), (points, p)
    table = pd.read_csv(FASHION / "fine_tuning.csv", dtype={"labels": str})
    for method, rows in table.groupby("method"):
        row, few = rows[rows.labels == "all"].iloc[0], rows[rows.labels == "25"].test_accuracy
        last = f"{100 * few.mean():.1f}% ({100 * few.std():.1f})" if len(few) else ""
        cell = f"| {100 * row.test_accuracy:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}] | {last}"
        assert f"| {method} {cell.strip()} |" in said
    curves = pd.DataFrame(json.loads((FASHION / "fine_tuning.json").read_text())["config"]["curves"])
    curves = 100 * curves.pivot(index="layer", columns="control", values="test_accuracy")
    for layer, words in ((12, "layer 12 goes from {:.1f} to {:.1f}% (L_gen + L_clf) and {:.1f}% (L_clf alone)"),
                         (20, "the last from {:.1f} to {:.1f} and {:.1f}%")):  # fmt: skip
        values = curves.loc[layer, [MODEL, "after L_gen + L_clf", "after L_clf alone"]]
        assert words.format(*values) in said


def test_dynamics_numbers():
    said = " ".join(TEXT.split())
    table = pd.read_csv(CIFAR10 / "training_dynamics.csv").set_index("step")
    chosen, last = table[table.chosen], table[table.layer == table.layer.max()]
    first, final = chosen.loc[1000], chosen.loc[7000]
    assert f"falls from {first.loss:.3f} to {final.loss:.3f} nats per token" in said
    words = (f"{100 * row.test_accuracy:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in (first, final))
    assert "layer rises from {} to {};".format(*words) in said
    assert "{:.1f}% and {:.1f}%, so that".format(*(100 * last.test_accuracy[[1000, 7000]])) in said
    drops = (f"{100 * row['drop']:.1f} points [{100 * row.drop_low:.1f}, " for row in (first, final))
    assert f"grows from {next(drops)}{100 * first.drop_high:.1f}] to" in said
    assert f"to {next(drops).replace(' points', '')}{100 * final.drop_high:.1f}]. Before" in said
    assert f"Before training the chosen layer has {100 * chosen.test_accuracy[0]:.1f}%" in said
    cooled, seventh = chosen.loc[9200], 100 * table[table.layer == 7].test_accuracy
    assert "layer 7, for one, has {:.1f}% and {:.1f}%".format(*seventh[[7000, 9200]]) in said
    accuracy = f"{100 * cooled.test_accuracy:.1f}% [{100 * cooled.low:.1f}, {100 * cooled.high:.1f}]"
    assert f"loss of {cooled.loss:.3f}, and a chosen layer, {cooled.layer:.0f}, of {accuracy}" in said
    assert (
        f"a drop of {100 * cooled['drop']:.1f} points [{100 * cooled.drop_low:.1f}, {100 * cooled.drop_high:.1f}]"
        in said
    )
    small = pd.read_csv(FASHION / "training_dynamics.csv")
    small = small[small.chosen & (small.step > 0)]
    assert small.step.tolist() == [1000, 3200, 6400]
    assert f"from {small.loss.iloc[0]:.3f} at step 1,000 to {small.loss.iloc[-1]:.3f} at the end" in said
    for row in small.itertuples():
        assert f"{100 * row.test_accuracy:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]" in said
        assert f"{100 * row.drop:.1f} points [{100 * row.drop_low:.1f}, {100 * row.drop_high:.1f}]" in said


def test_fine_tuning_numbers_of_the_colour_model():
    said, folder = " ".join(TEXT.split()), CIFAR10
    table = pd.read_csv(folder / "fine_tuning.csv")
    rows = table[table.labels == "all"].set_index("method")
    for method in ("L_gen + L_clf", "L_clf alone", "from scratch", "probe, best layer"):
        row = rows.loc[method]
        assert f"{100 * row.test_accuracy:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]" in said
    curves = pd.DataFrame(json.loads((folder / "fine_tuning.json").read_text())["config"]["curves"])
    curves = 100 * curves.pivot(index="layer", columns="control", values="test_accuracy")
    before, alone, joint = (curves[name] for name in (MODEL, "after L_clf alone", "after L_gen + L_clf"))
    assert f"from {before[20]:.1f} to {joint[20]:.1f}% (L_gen + L_clf) and {alone[20]:.1f}% (L_clf alone)" in said
    assert f"before, 7, goes from {before[7]:.1f} to {joint[7]:.1f} and {alone[7]:.1f}%" in said


def test_few_label_numbers_of_the_colour_model():
    table = pd.read_csv(CIFAR10 / "few_label_curve.csv", keep_default_na=False)
    chosen = table[table.layer_rule == "chosen"].groupby(["control", "k"]).test_accuracy
    mean, spread = 100 * chosen.mean(), 100 * chosen.std()
    cases = [(control, k) for k in (25, 400) for control in (MODEL, "raw pixels")]
    words = [f"{mean[case]:.1f}% ({spread[case]:.1f})" for case in cases]
    assert "inside them has {}, raw pixels {}; with 400, {} and {}.".format(*words) in " ".join(TEXT.split())
    like = pd.read_csv(CIFAR10 / "likeness.csv").set_index("measure")
    like = 100 * like.loc["classifier"]
    assert f"at {like.value:.1f}% [{like.low:.1f}, {like.high:.1f}], where" in " ".join(TEXT.split())
    assert f"{like.floor:.1f}% [{like.floor_low:.1f}, {like.floor_high:.1f}]" in " ".join(TEXT.split())


def test_study_numbers():
    said, folder = " ".join(TEXT.split()), ROOT / "results/studies"

    def words(table, model, step):
        row = table[(table.model == model) & (table.step == step) & table.chosen].iloc[0]
        return f"{100 * row.test_accuracy:.1f}% [{100 * row.low:.1f}, {100 * row.high:.1f}]", row.loss

    size, objective = (pd.read_csv(folder / f"{name}.csv") for name in ("size", "objective"))
    ends = [words(size, f"width-{width}", 1500) for width in (16, 32, 64)]
    assert "{}, {} and {}, and, as in the paper".format(*(each for each, _ in ends)) in said
    for (narrow, loss), (model, step) in zip(ends, (("width-32", 1000), ("width-64", 1250)), strict=False):
        wide, other = words(size, model, step)
        assert f"{narrow} and {wide} for" in said and abs(loss - other) < 0.01
        assert f"at {loss:.2f} (" in said or f"at {loss:.2f} nats" in said
    last = size[(size.step == 1500) & size.chosen]
    assert (last.layer > 0).all() and (last.layer < 12).all() and (last.drop_p < 1e-5).all()
    bert, _ = words(objective, "bert-32", 1500)
    assert f"Its chosen layer has {bert}, the next-pixel model's {ends[1][0]}" in said


def test_numbers_of_the_search_for_a_regime():
    table = pd.read_csv(ROOT / "results/studies/regime.csv")
    runs = re.findall(r"^(?:done <<< \")?(\w+) (\d+) (\d+) (\d+) (\d+) \d (\d+)\"?$", TEXT, re.M)
    assert [name for name, *_ in runs] == list(dict.fromkeys(table.model))
    costs = []
    for name, *shape, steps in runs:
        side, colours, layers, width = map(int, shape)
        config = lab.ImageGPTConfig(vocab_size=colours + 1, n_positions=side**2, n_layer=layers, n_embd=width, n_head=1)
        costs.append(int(steps) * flops(config, head=True))
        own = table[(table.model == name) & (table.control == MODEL)]
        best, pixels = own[own.chosen].iloc[0], table[(table.model == name) & table.control.eq("raw pixels")].iloc[0]
        accuracy = f"{100 * best.test_accuracy:.1f}% [{100 * best.low:.1f}, {100 * best.high:.1f}]"
        value = f"{best.drop_p:.3f}" if best.drop_p >= 0.001 else f"{best.drop_p:.0e}".replace("e-0", "e-")
        cells = [f"`{name}`", f"{layers} x {width}, {side} x {side}, {colours}", f"{64 * int(steps):,}"]
        cells += [f"{best.loss:.3f}", f"{best.layer} of {layers}", accuracy, f"{100 * best['drop']:+.1f}, p = {value}"]
        assert " | ".join([*cells, f"{100 * pixels.test_accuracy:.1f}%"]) in TEXT
    assert max(costs) < 1.02 * min(costs)
