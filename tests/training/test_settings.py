"""Each setting has one help, from which docstring and command line are made; old names warn and give the same class."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields

import numpy as np
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
    with pytest.raises(TypeError, match="PretrainConfig has no option 'learning_rte'; did you mean 'learning_rate'?"):
        lab.PretrainConfig(steps=300, learning_rte=0.1)
    with pytest.raises(TypeError, match="FinetuneConfig has no option 'step'; did you mean 'steps'?"):
        lab.FinetuneConfig(step=3)
    assert copy.copy(lab.FinetuneConfig(steps=3)) == pickle.loads(pickle.dumps(lab.FinetuneConfig(steps=3)))
    with pytest.raises(FrozenInstanceError):
        lab.FinetuneConfig().steps = 3


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("value", [math.nan, -math.inf, -1, "x", [[]], {}, b"1", 10**400, np.float32(np.nan)], ids=repr)
def test_every_setting_refuses_what_is_not_of_its_kind_in_one_line(config, value):
    for name in (field.name for field in fields(config)):
        may_be_so = value == "x" and name in ("optimizer", "dtype", "augment", "class_weights")
        may_be_so = may_be_so or (type(value) is int and value > 0 and described_kind(config, name)[:3] == "int")
        if not may_be_so:
            with pytest.raises(ValueError, match=f"{name}=") as refused:
                config(**({"steps": 300} | {name: value}))
            assert "\n" not in str(refused.value)


def described_kind(config, name):
    return next(setting.type for setting in described(config) if setting.name == name)


@pytest.mark.parametrize("changes", [{"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"clip": 0}, {"spike": 0}, {"flip": 1}])
def test_settings_that_no_run_can_have_are_refused(changes):
    for config in CONFIGS:
        with pytest.raises(ValueError, match=next(iter(changes))):
            config(**({"steps": 300} | changes))


@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_of_numpy_and_lists_are_the_same_settings(config):
    plain = config(steps=300, learning_rate=0.5, betas=(0.25, 0.5), flip=True, clip=1.0, seed=3)
    theirs = {"steps": np.int64(300), "learning_rate": np.float32(0.5), "betas": [0.25, 0.5]}
    theirs |= {"flip": np.True_, "clip": 1, "seed": np.uint8(3)}
    assert config(**theirs) == plain and repr(config(**theirs)) == repr(plain)
    weights = lab.FinetuneConfig(class_weights=np.array([1, 2.5])).class_weights
    assert weights == (1.0, 2.5) and json.dumps(weights) == "[1.0, 2.5]"


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
