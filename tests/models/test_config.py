"""`ImageGPTConfig`: a frozen dataclass whose constructor knows the aliases of Hugging Face's."""

import copy
import dataclasses
import pickle

import pytest

from igpt_lab.models.config import ALIASES, ImageGPTConfig

SMALL = {"vocab_size": 9, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 4}


def test_aliases_are_arguments_and_attributes():
    by_alias = {"vocab_size": 9, "max_position_embeddings": 16, "hidden_size": 12, "num_hidden_layers": 3}
    config = ImageGPTConfig(**by_alias, num_attention_heads=4)
    assert config == ImageGPTConfig(**SMALL)
    assert {alias: getattr(config, alias) for alias in ALIASES} == {
        "hidden_size": 12, "max_position_embeddings": 16, "num_attention_heads": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    with pytest.raises(AttributeError):
        config.hidden_size = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_embd = 8


@pytest.mark.parametrize(
    ("wrong", "right"), [("n_hed", "n_head"), ("hiden_size", "hidden_size"), ("nlayer", "n_layer")]
)
def test_a_misspelt_field_gets_the_closest_name(wrong, right):
    with pytest.raises(TypeError, match=f"ImageGPTConfig has no field '{wrong}'; did you mean '{right}'?"):
        ImageGPTConfig(**{wrong: 4})
    with pytest.raises(TypeError, match=wrong):
        dataclasses.replace(ImageGPTConfig(), **{wrong: 4})


def test_it_is_a_dataclass_as_any_other():
    config = ImageGPTConfig(**SMALL, id2label={0: "cat", 1: "dog", 2: "hen"}, eos_token_id=[1, 2])
    again = ImageGPTConfig(**dataclasses.asdict(config))
    for twin in (again, pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert twin == config
        assert hash(twin) == hash(config)
        assert repr(twin) == repr(config)
    wider = dataclasses.replace(config, hidden_size=24)
    assert wider != config
    assert (wider.n_embd, wider.num_labels, wider.label2id) == (24, 3, {"cat": 0, "dog": 1, "hen": 2})
    assert [field.name for field in dataclasses.fields(config)][:5] == list(SMALL)
    assert ImageGPTConfig() == ImageGPTConfig(**{f.name: f.default for f in dataclasses.fields(ImageGPTConfig)})
