"""A pytest plugin for transformers' own tests: they run on our classes, and what came of each goes into a file.

`IGPT_LAB_CLASSES=theirs` leaves transformers' classes in their place. `IGPT_LAB_OUTCOMES` names the file.
"""

import json
import os
import random
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

import igpt_lab as lab
from igpt_lab.models.outputs import Generated, GeneratedBeams

NAMES = (
    "ImageGPTConfig",
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTImageProcessor",
    "ImageGPTImageProcessorPil",
    "ImageGPTModel",
    "ImageGPTPreTrainedModel",
)
FILES = ("configuration_imagegpt", "modeling_imagegpt", "image_processing_pil_imagegpt")
WORST_LAST = ("skipped", "passed", "failed")
outcomes: dict[str, str] = {}

package = import_module("transformers.models.imagegpt")
for place in (package, *(import_module(f"{package.__name__}.{file}") for file in FILES)):
    for name in NAMES if os.environ.get("IGPT_LAB_CLASSES") != "theirs" else ():
        if place is package or name in vars(place):
            setattr(place, name, getattr(lab, name))
if os.environ.get("IGPT_LAB_CLASSES") != "theirs":
    generation = import_module("transformers.generation")
    generation.GenerateDecoderOnlyOutput, generation.GenerateBeamDecoderOnlyOutput = Generated, GeneratedBeams


def pytest_runtest_setup():
    """Some methods draw images, of which a few tell resizes apart that a test takes for equal."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that they draw from
    torch.manual_seed(0)


def pytest_runtest_logreport(report):
    """A method is as good as the worst of its parts; it is skipped where all that ran of it was."""
    if report.when == "call" or report.outcome != "passed":
        name = report.nodeid.partition("::")[2].replace("::", ".")
        outcomes[name] = max(outcomes.get(name, "skipped"), report.outcome, key=WORST_LAST.index)


def pytest_sessionfinish():
    Path(os.environ["IGPT_LAB_OUTCOMES"]).write_text(json.dumps(outcomes))
