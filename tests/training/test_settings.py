"""Each setting has one help, from which docstring and command line are made; old names warn and give the same class."""

from dataclasses import FrozenInstanceError, fields

import pytest

import igpt_lab as lab
from igpt_lab.training.settings import TrainConfig, described

CONFIGS = (lab.PretrainConfig, lab.FinetuneConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_described_in_order_and_in_the_docstring(config):
    settings = described(config)
    assert [setting.name for setting in settings] == [field.name for field in fields(config)]
    words = " ".join(config.__doc__.split())
    for setting in settings:
        assert f" {setting.name} ({setting.type}" in words and " ".join(setting.help.split()) in words


def test_what_both_share_has_one_help_whatever_its_default():
    pretraining, finetuning = ({setting.name: setting for setting in described(config)} for config in CONFIGS)
    for field in fields(TrainConfig):
        assert pretraining[field.name].help == finetuning[field.name].help
    assert (pretraining["flip"].default, finetuning["flip"].default) == (False, True)
    assert finetuning["steps"].default == lab.FinetuneConfig().steps == 2000
    assert pretraining["clip"].type == "float | None"


def test_a_misspelt_setting_fails_and_none_can_be_changed():
    with pytest.raises(TypeError, match="learning_rte"):
        lab.PretrainConfig(steps=300, learning_rte=0.1)
    with pytest.raises(FrozenInstanceError):
        lab.FinetuneConfig().steps = 3


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "save_every"])
def test_what_is_counted_in_steps_or_images_is_above_0(config, name):
    with pytest.raises(ValueError, match=f"{name}.* above 0; got"):
        config(**({"steps": 300} | {name: 0}))


def test_a_rate_that_is_still_open_says_so():
    with pytest.raises(ValueError, match="learning_rate is None.*expected a number"):
        lab.FinetuneConfig().rate(0)


@pytest.mark.parametrize("old, new", [("Recipe", lab.PretrainConfig), ("Tuning", lab.FinetuneConfig)])
def test_old_names_warn_and_give_the_same_class(old, new):
    with pytest.warns(DeprecationWarning, match=f"igpt_lab.{old} is now called {new.__name__}"):
        assert getattr(lab, old) is new
