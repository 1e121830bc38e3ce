"""Features on an accelerator against those on the CPU, by the same code on another device."""

import numpy as np
import pytest

import igpt_lab as lab
from igpt_lab.core.devices import best_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(best_device().type == "cpu", reason="there is no accelerator here"),
]


def test_float32_features_are_those_of_the_cpu_but_for_rounding(tiny, train, tmp_path):
    there, here = (
        lab.extract(tiny, train, store=tmp_path / name, device=device, dtype="float32", progress=False)
        for name, device in (("there", best_device()), ("here", "cpu"))
    )
    for layer in here.layers["ln_1"]:
        expected = here.layer("ln_1", layer, "train")
        np.testing.assert_allclose(there.layer("ln_1", layer, "train"), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 1e-2
