"""`ImageGPTConfig`: a dataclass whose constructor knows the aliases of Hugging Face's."""

import copy
import dataclasses
import json
import pickle

import pytest

from igpt_lab.models.config import SIZES, ImageGPTConfig
from igpt_lab.models.config_files import ALIASES

SMALL = {"vocab_size": 9, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 4}


def test_aliases_are_arguments_and_attributes():
    by_alias = {"vocab_size": 9, "max_position_embeddings": 16, "hidden_size": 12, "num_hidden_layers": 3}
    config = ImageGPTConfig(**by_alias, num_attention_heads=4)
    assert config == ImageGPTConfig(**SMALL)
    assert {alias: getattr(config, alias) for alias in ALIASES} == {
        "hidden_size": 12, "max_position_embeddings": 16, "num_attention_heads": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    config.hidden_size, config.num_hidden_layers = 8, 2
    assert (config.n_embd, config.n_layer) == (8, 2)


@pytest.mark.parametrize(
    ("wrong", "right"), [("n_hed", "n_head"), ("hiden_size", "hidden_size"), ("nlayer", "n_layer")]
)
def test_a_misspelt_field_gets_the_closest_name(wrong, right):
    with pytest.raises(TypeError, match=f"ImageGPTConfig has no field '{wrong}'; did you mean '{right}'?"):
        ImageGPTConfig(**{wrong: 4})
    with pytest.raises(TypeError, match=wrong):
        dataclasses.replace(ImageGPTConfig(), **{wrong: 4})


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    names = {str(k): f"class {k}" for k in range(12)}
    as_on_the_hub = dict(sorted(names.items()))
    assert list(as_on_the_hub)[:4] == ["0", "1", "10", "11"]
    (tmp_path / "config.json").write_text(json.dumps({"id2label": as_on_the_hub}))
    for config in (ImageGPTConfig(id2label=as_on_the_hub), ImageGPTConfig.from_pretrained(tmp_path)):
        assert list(config.id2label.values()) == [f"class {k}" for k in range(12)]
        assert list(config.label2id) == list(names.values())
    backwards = ImageGPTConfig(label2id={"b": 1, "a": 0})
    assert list(backwards.id2label.items()) == [(0, "a"), (1, "b")]


def test_a_number_that_comes_twice_in_the_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "1": "c"}}')
    with pytest.raises(ValueError, match=r"config\.json is not JSON: the name '1' appears twice"):
        ImageGPTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label has 2 classes, and the number 2 does not fit; expected 0 to 1"),
        ({"id2label": {"1": "a", "2": "b"}}, "and the number 1 does not fit"),
        ({"id2label": {"0": "a", "00": "b"}}, "and the number 0 does not fit"),
        ({"id2label": {"1": "a", " 1": "b", "0": "c"}}, "and the number 1 does not fit"),
        ({"id2label": {"-1": "a", "0": "b"}}, "and the number -1 does not fit"),
        ({"id2label": {"cat": "0"}}, "id2label has the keys 'cat'; expected 0, 1, 2"),
        ({"id2label": {"0": "a"}, "num_labels": 2}, "num_labels is 2, but id2label names 1 classes"),
        ({"label2id": {"a": 0, "b": 0}}, "label2id gives 2 classes 1 different numbers"),
        ({"label2id": {"a": 0, "b": 2}}, "and the number 2 does not fit"),
    ],
)
def test_numbers_of_classes_that_are_refused(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ImageGPTConfig(**fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        ImageGPTConfig.from_pretrained(tmp_path)


def test_a_field_that_is_set_is_checked_and_nothing_else_changes():
    config = ImageGPTConfig(**SMALL, id2label={0: "cat", 1: "dog", 2: "hen"})
    before = config.to_dict()
    wrong = {"n_layer": 0, "resid_pdrop": 2, "activation_function": "cube", "id2label": {1: "a"}, "problem_type": "x",
             "label2id": {"a": 0, "b": 0}}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
        assert config.to_dict() == before
    with pytest.raises(TypeError, match="no field 'n_layrs'; did you mean 'n_layer'"):
        config.n_layrs = 3
    with pytest.raises(TypeError, match="no field 'n_colours'"):
        config.n_colours = 3
    config.num_labels = 2
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    config.label2id = {"no": 0, "yes": 1, "never": 2}
    assert (config.num_labels, config.id2label) == (3, {0: "no", 1: "yes", 2: "never"})


def test_a_key_of_a_file_takes_the_place_of_no_method(tmp_path):
    """A stranger's file: its keys become attributes, but for those that the class has."""
    strange = {"to_dict": 1, "n_colours": 3, "__class__": "x", "_check": 2, "model_type": "imagegpt", "n_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(SMALL | strange | {"note": "kept"}))
    config = ImageGPTConfig.from_pretrained(tmp_path)
    assert config == ImageGPTConfig(**SMALL)
    assert {"note": "kept", "n_layers": 4}.items() <= config.to_dict().items()
    assert not {"to_dict", "n_colours", "__class__", "_check"} & set(vars(config))


def test_published_sizes_are_copies():
    SIZES["S"].n_layer = 2
    assert SIZES["S"].n_layer == 24 and SIZES["S"] == ImageGPTConfig()


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
