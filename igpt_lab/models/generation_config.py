"""What `generate` may be asked for, by transformers' names, and the files that keep it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from igpt_lab.core.hub import CheckpointError, read_json
from igpt_lab.core.values import check, did_you_mean

GENERATION = "generation_config.json"


@dataclass
class GenerationConfig:
    """What `generate` may be asked for beforehand, by transformers' names; None is its default. Set as attributes."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool | None = None
    num_return_sequences: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    repetition_penalty: float | None = None
    bad_words_ids: list[list[int]] | None = None
    remove_invalid_values: bool | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None

    def to_dict(self) -> dict:
        """All attributes, those that somebody added too."""
        return dict(vars(self))

    @classmethod
    def of_file(cls, file: Path) -> GenerationConfig:
        """From a `generation_config.json`; CheckpointError, which names it, for a value of the wrong kind."""
        config, values = cls(), read_json(file)
        try:
            for f in fields(cls):
                check(f.name, values.get(f.name), str(f.type))
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
        vars(config).update(values)
        return config


LENGTHS = "max_length", "max_new_tokens"
KEPT = "scores", "logits", "attentions", "hidden_states"
ASKED = {f.name for f in fields(GenerationConfig)}
# Arguments of transformers' `generate` with the values, besides None, that change nothing here.
NEUTRAL: dict[str, tuple] = {
    "num_beam_groups": (1,), "diversity_penalty": (0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "min_length": (0,),
    "min_new_tokens": (0,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "min_p": (0,),
    "penalty_alpha": (), "guidance_scale": (1,), "renormalize_logits": (False,), "synced_gpus": (False,),
    "force_words_ids": (), "constraints": (), "suppress_tokens": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "begin_suppress_tokens": (), "sequence_bias": (), "prefix_allowed_tokens_fn": (),
    "logits_processor": ([],), "stopping_criteria": ([],), "max_time": (), "stop_strings": (), "streamer": (),
    "assistant_model": (), "cache_implementation": (), "prompt_lookup_num_tokens": (), "watermarking_config": (),
    "exponential_decay_length_penalty": (), "low_memory": (False,), "token_healing": (False,), "dola_layers": (),
    "negative_prompt_ids": (), "negative_prompt_attention_mask": (), "tokenizer": (), "return_legacy_cache": (False,),
    "trust_remote_code": (False,), "top_h": (), "custom_generate": (),
}  # fmt: skip
# And those that change nothing here whatever they are: `early_stopping`, as all beams end at one length.
ANYTHING = {
    "bos_token_id", "decoder_start_token_id", "transformers_version", "compile_config", "disable_compile",
    "early_stopping",
}  # fmt: skip
# What is meant by None.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1,
}  # fmt: skip


def all_asked(asked: dict, *before: Any) -> dict:
    """What `generate` is asked for, by the names of `GenerationConfig`: given ones, then those of `before` in turn."""
    settings: dict[str, Any] = dict.fromkeys(ASKED)
    for one in (asked, *before):
        values = {} if one is None else one if isinstance(one, dict) else one.to_dict()
        lengths = [settings["max_length"], settings["max_new_tokens"]]
        for name, value in values.items():
            _refuse(name, value, strict=one is asked)
            known = name in ASKED and settings[name] is None
            if known and not (name in LENGTHS and any(lengths)):  # a length that is given rules out one from before
                settings[name] = value
    settings |= {name: value for name, value in DEFAULTS.items() if settings[name] is None}
    _check(settings)
    return settings


def _check(asked: dict) -> None:
    """ValueError for a value out of range, or of the wrong kind."""
    for name in ("temperature", "repetition_penalty"):
        if not asked[name] > 0:
            raise ValueError(f"{name}={asked[name]}; expected a number above 0")
    for name in ("num_beams", "num_return_sequences"):
        check(name, asked[name], "int", 1, words="a whole number above 0")
    words = asked["bad_words_ids"]
    check("bad_words_ids", words, "list[list[int]] | None", 0, words="lists of tokens")
    if words is not None and not (words and all(words)):
        raise ValueError(f"bad_words_ids={words}; expected one word or more, each of one token or more")
    copies, beams = asked["num_return_sequences"], asked["num_beams"]
    if beams > 1 and copies > beams:
        raise ValueError(f"num_return_sequences={copies} of num_beams={beams}; expected at most as many")
    if beams == 1 and copies > 1 and not asked["do_sample"]:
        raise ValueError(f"num_return_sequences={copies} without do_sample or beams; they would all be the same")


def _refuse(name: str, value: Any, strict: bool) -> None:
    """TypeError for an argument that would change something, or where `strict` for one that transformers has not."""
    if strict and name not in {*ASKED, *NEUTRAL, *ANYTHING}:
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}; {did_you_mean(name, ASKED)}")
    if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
        raise TypeError(f"generate() has no {name}={value!r}; only a value that changes nothing is taken")
