"""The command that runs everything on OpenAI's released weights, and holds it against what was published of them."""

from __future__ import annotations

from typing import Any

from igpt_lab.app import runs
from igpt_lab.app.commands.options import DEVICE, LIMIT, STEP, argument, command, in_lines
from igpt_lab.core.arguments import local
from igpt_lab.core.provenance import atomic_write

SIZE = argument("--size", required=True, choices=["s", "m", "l"], help="size of the checkpoint")


@command(
    SIZE,
    argument("--step", **STEP, help="step of pretraining; numbers were published of the last one"),
    argument("--bert", action="store_true", help="the BERT model, of which there is no loss to compare"),
    argument(
        "--images",
        help="bundled name, folder, Parquet file or Hub name of the images of the probes (default: the published "
        "tokens of CIFAR-10)",
    ),
    LIMIT,
    argument("--plan", action="store_true", help="only print what it will take"),
    argument(
        "--cache",
        metavar="FOLDER",
        help="where downloads are kept (default: igpt-lab/openai under ~/.cache or XDG_CACHE_HOME)",
    ),
    argument("--out", help=f"folder for everything else (default: {runs.MINE}/paper-SIZE)"),
    DEVICE,
    examples=("--size s --plan", "--size s --images uoft-cs/cifar10 --limit 2000"),
)
def paper(size: str, step: int, bert: bool, out: str | None, plan: bool, **options: Any) -> None:
    """OpenAI's released weights, from the download to a table of our numbers beside the published ones.

    Stages: download, convert, loss on the published ImageNet tokens, probes by the paper's protocol and by ours, few
    labels, explain. Each is a csv file in the folder, and a stage whose file is there is not run again. paper.csv has
    every number with the published one, its source and a verdict; paper.txt is what the command prints.

    A number agrees where its 95% interval, made wider by the published standard deviation and half a unit of the last
    digit printed, holds the published value; of a loss, by 0.001 nats per token. Accuracies of fewer images (--limit),
    and of images of which there are not as many as in the published set, are not compared.
    """
    from igpt_lab.app import paper_cost
    from igpt_lab.app.paper import Paper

    name = f"paper-{size}{'-bert' if bert else ''}{f'-{step}' if step != 1_000_000 else ''}"
    asked = Paper(size=size, step=step, bert=bert, out=local(out or f"{runs.MINE}/{name}"), **options)
    device = paper_cost.device_of(asked)
    estimated = paper_cost.estimate(asked, paper_cost.rates(device))
    print(in_lines(paper_cost.describe(estimated, device)), flush=True)
    if plan:
        return
    asked.begin()
    tables = asked.measured()
    files = asked.curves(tables)
    text, rows = asked.summary(tables)
    text = in_lines(text)
    files.append(atomic_write(asked.out / "paper.csv", rows.to_csv(index=False)))
    files.append(atomic_write(asked.out / "paper.txt", text + "\n"))
    print(text, *files, sep="\n")
