"""Poolings against numbers found by hand, and against one another."""

import pytest
import torch

from conftest import TOKENS, recorded
from igpt_lab.features import poolings
from igpt_lab.features.hooks import POINTS
from igpt_lab.features.poolings import pooling


def test_a_misspelt_pooling_gets_the_closest_one_also_of_those_that_were_added(monkeypatch):
    with pytest.raises(ValueError, match=r"no pooling 'maen'; expected one of mean, last, .*; did you mean 'mean'\?"):
        pooling("maen")
    monkeypatch.setitem(
        poolings.POOLINGS, "std", ("std", lambda name: poolings.Pooling(name, 1, lambda x: x.std(dim=1)))
    )
    with pytest.raises(ValueError, match=r"did you mean 'std'\?"):
        pooling("sdt")


def test_poolings_by_hand():
    x = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 image, one channel
    assert pooling("mean")(x).item() == 7.5
    assert pooling("last")(x).item() == pooling("max")(x).item() == 15
    assert pooling("grid:2")(x).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert pooling("mean")(x.bfloat16()).dtype == torch.float32


def test_joined_poolings_lie_side_by_side_and_each_is_checked(tiny):
    joined = recorded(tiny, pool="prefix:2+max+at:3")
    parts = [recorded(tiny, pool=pool) for pool in ("prefix:2", "max", "at:3")]
    for point in joined:
        assert joined[point].equal(torch.cat([part[point] for part in parts], dim=2))
    assert pooling("mean+grid:2").width(8) == 40
    with pytest.raises(ValueError, match="at:16: no position 16"):
        recorded(tiny, pool="mean+at:16")
    for wrong in ("mean+", "+mean", "mean+maen", "mean + max"):
        with pytest.raises(ValueError, match="there is no pooling"):
            pooling(wrong)


@pytest.mark.parametrize("places", [[0], [15], [3, 0, 7], [5, 5]])
def test_chosen_positions_are_slices_one_behind_the_other(tiny, places):
    with torch.no_grad():
        states = tiny(TOKENS, output_hidden_states=True).hidden_states
    pooled = recorded(tiny, pool=f"at:{','.join(map(str, places))}")
    want = torch.cat([states[1][:, place] for place in places], dim=1)
    assert pooled["resid_pre"].shape == (5, 4, 8 * len(places))
    assert pooled["resid_pre"][:, 1].equal(want)
    assert pooling("at:2,0")(torch.arange(12.0).view(2, 3, 2)).tolist() == [[4, 5, 0, 1], [10, 11, 6, 7]]
    assert pooling("at:1")(torch.zeros(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_prefixes_are_means_of_what_comes_first_and_the_last_is_the_mean_bit_for_bit(tiny):
    x = torch.arange(6.0).view(1, 6, 1)
    assert pooling("prefix:4")(x).tolist() == [[0.5, 1, 2, 2.5]]  # of 2, 3, 5 and 6 positions
    pooled, mean = recorded(tiny, pool="prefix:5"), recorded(tiny)
    for point in POINTS:
        width = mean[point].shape[2]
        assert pooled[point][..., -width:].equal(mean[point])
    assert recorded(tiny, pool="prefix:16")["ln_1"][..., :8].equal(recorded(tiny, pool="at:0")["ln_1"])
    half = torch.randn(2, 7, 3).bfloat16()
    assert pooling("prefix:2")(half)[:, 3:].equal(pooling("mean")(half))
    with pytest.raises(ValueError, match="prefix:17: 17 prefixes of 16 positions; expected at most one a position"):
        recorded(tiny, pool="prefix:17")


@pytest.mark.parametrize(
    "name", ["mean", "last", "max", "grid:1", "grid:4", "prefix:1", "prefix:3", "at:0", "at:15,2,2"]
)
def test_a_pooling_knows_how_wide_it_is(name):
    pool = pooling(name)
    assert pool(torch.zeros(2, 16, 6)).shape == (2, pool.width(6))
    assert pool.name == name


@pytest.mark.parametrize(
    "name",
    [
        "median", "", "mean:", "mean:2", "grid", "grid:0", "grid:-1", "grid:g", "prefix", "prefix:0", "prefix:1,2",
        "at", "at:", "at:-1", "at:1,", "at:1;2",
    ],
)  # fmt: skip
def test_no_pooling(name):
    with pytest.raises(ValueError, match="expected one of mean, last, max, grid:g, prefix:g, at:p,..."):
        pooling(name)


def test_a_position_that_is_not_there(tiny):
    with pytest.raises(ValueError, match="at:3,16: no position 16; expected positions from 0 to 15"):
        recorded(tiny, pool="at:3,16")
    pooling("at:3,16").check(17)
