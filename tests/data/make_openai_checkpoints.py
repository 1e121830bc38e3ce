"""Writes the tiny checkpoints beside this file with the real TensorFlow: `python make_openai_checkpoints.py`.

Made with TensorFlow 2.21. `openai-ar/`: autoregressive with a class head, three data files, Adam's slots and the step.
`openai-bert/`: no SOS, one data file, variables in other floating-point types, and one saved in slices.
`openai-*.npz`: the model's variables as they were given to TensorFlow. Random numbers, nobody's weights.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
COLOURS, POSITIONS, WIDTH, HEADS, BLOCKS, CLASSES = 6, 9, 8, 2, 2, 3


def variables(seed: int, bert: bool) -> dict[str, np.ndarray]:
    """float32 arrays by the names of the original's variables."""
    square, inner = (HEADS, WIDTH // HEADS, WIDTH), 4 * WIDTH
    shapes = {"wpe": (POSITIONS, WIDTH), "wte": (COLOURS, WIDTH), "wtet": (COLOURS, WIDTH), "ln_f/g": (WIDTH,)}
    for layer in range(BLOCKS):
        shapes |= {f"h{layer}/attn/{part}_proj": square for part in "qkvc"}
        shapes |= {f"h{layer}/ln_{i}/g": (WIDTH,) for i in (1, 2)}
        shapes |= {f"h{layer}/mlp/c_fc/w": (WIDTH, inner), f"h{layer}/mlp/c_proj/w": (inner, WIDTH)}
    shapes |= {} if bert else {"sos": (WIDTH,), "clf/wclf": (CLASSES, WIDTH)}
    generator = np.random.default_rng(seed)
    return {f"model/{name}": generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def save(folder: Path, step: int, shards: list[dict[str, tf.Tensor]]) -> None:
    """A checkpoint with a data file for each of `shards`; a name may end in ` SHAPE SLICE`, as SaveV2 spells them."""
    folder.mkdir(exist_ok=True)
    parts = [str(folder / f"part-{i}") for i in range(len(shards))]
    for part, shard in zip(parts, shards, strict=True):
        names, slices = zip(*((name.partition(" ")[0], name.partition(" ")[2]) for name in shard), strict=True)
        tf.raw_ops.SaveV2(
            prefix=part, tensor_names=list(names), shape_and_slices=list(slices), tensors=list(shard.values())
        )
    prefix = folder / f"model.ckpt-{step}"
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=False)
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "/elsewhere/{prefix.name}"\n')


def main() -> None:
    weights = variables(0, bert=False)
    np.savez_compressed(HERE / "openai-ar.npz", **weights)
    names = list(weights)
    rest = {"global_step": tf.constant(7, tf.int64), "model/beta1_power": tf.constant(0.5)}
    rest |= {f"{name}/Adam": tf.zeros_like(weights[name]) for name in ("model/wpe", "model/h1/mlp/c_fc/w")}
    shards = [{name: tf.constant(weights[name]) for name in names[i::2]} for i in range(2)]
    save(HERE / "openai-ar", 7, [rest, *shards])

    weights = variables(1, bert=True)
    np.savez_compressed(HERE / "openai-bert.npz", **weights)
    types = {"model/wpe": tf.float64, "model/wte": tf.bfloat16, "model/ln_f/g": tf.float16}
    shard = {name: tf.cast(value, types.get(name, tf.float32)) for name, value in weights.items()}
    shard |= {f"sliced 2 3 {i},1:-": tf.ones((1, 3)) for i in range(2)}
    shard |= {"words": tf.constant(["a", "bc"]), "empty": tf.zeros((0, 4))}
    save(HERE / "openai-bert", 131000, [shard])


if __name__ == "__main__":
    main()
