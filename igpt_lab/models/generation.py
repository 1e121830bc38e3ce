"""Tokens after tokens: `generate` with the arguments of transformers, and the loop that it and others run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_lab.models.beams import Beams
from igpt_lab.models.fast import is_plain
from igpt_lab.models.generation_config import KEPT, all_asked
from igpt_lab.models.outputs import Generated, GeneratedBeams, KeyValueCache
from igpt_lab.models.scores import shaped


class Generates(nn.Module):
    """`generate` of a model with a head over colours."""

    transformer: Any  # these of the class that inherits
    lm_head: Any
    config: Any
    dtype: torch.dtype
    generation_config: Any

    def next_logits(
        self, fed: Tensor, cache: KeyValueCache | None, *, plain: bool = False, kept: dict[str, list] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (N, V) of the token after int64 (N, t).

        Args:
            fed: int64 (N, t), behind what `cache` holds.
            cache: Of the tokens before; it is changed in place.
            plain: The model is so, see `is_plain`, and makes logits of the last position alone.
            kept: Gets what its names say, of this pass: "attentions", "hidden_states".
            token_type_ids: int64 (N, t), as of a forward pass.

        Returns:
            (N, V).

        Raises:
            ValueError: As of a forward pass.

        Example:
            >>> model.next_logits(ids, None).shape
            torch.Size([2, 8])
        """
        options: dict[str, Any] = {"use_cache": cache is not None, "return_dict": True}
        options |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if plain and not kept:
            states = self.transformer(fed, cache, **options).last_hidden_state[:, -1]
            return self.lm_head(states)[:, : self.config.n_colours]
        asked = {f"output_{name}": True for name in kept or ()}
        out = self(fed, cache, **options, **asked)
        for name, values in (kept or {}).items():
            values.append(out[name])
        return out.logits[:, -1, : self.config.n_colours]

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values=None, **named) -> dict:
        """Arguments of a forward pass over what a cache has not seen, for code around transformers' `generate`."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        kept = {name: named[name] for name in ("use_cache", "attention_mask") if name in named}
        return {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, **kept}

    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        *,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        **asked,
    ) -> Tensor | Generated | GeneratedBeams:
        """Continue int64 (N, t), the given tokens in front; arguments are transformers'.

        The most probable token each time, or one drawn with `do_sample`. By default nothing is left out, as in the
        paper. An image is SOS and T pixels: max_length = n_positions + 1.

        Args:
            input_ids: int64 (N, t).
            generation_config: An object or a dict of arguments that are not given here; the model's `generation_config`
                has the others.
            inputs: Another name of `input_ids`.
            attention_mask: Ones alone (N, t), as every pixel of an image counts.
            token_type_ids: int64 (N, t), as of a forward pass; tokens that are added have the last one.
            generator: Of the draws; by default torch's own.
            **asked: `max_length`, tokens in the end, or `max_new_tokens`, tokens that are added; `do_sample`;
                `temperature`, by which logits are divided; `top_k` largest logits and the most probable that together
                reach `top_p`, from which is drawn; `num_return_sequences` of each row; `eos_token_id`, at which a row
                ends, and `pad_token_id`, which fills it (by default the configuration's); `use_cache`.
                `repetition_penalty` by which scores of tokens that are there are divided, `bad_words_ids` that do not
                come, `remove_invalid_values`. `num_beams` that are kept of each row, see `Beams`, and `length_penalty`
                of their scores. With `return_dict_in_generate` also `output_scores`, `output_logits`,
                `output_attentions` and `output_hidden_states`. Other arguments of transformers where their value
                changes nothing.

        Returns:
            int64 (N, max_length), or fewer columns where all rows reached their end. With `return_dict_in_generate`
            `sequences`, a tuple over tokens of each output that is asked for, and of beams `sequences_scores`, mean log
            probabilities, and `beam_indices`.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs`, or of `max_length` and `max_new_tokens`; a length that
                adds nothing or is above n_positions + 1; a temperature, a penalty, `top_k` or `top_p` out of range; a
                mask that hides tokens; several sequences without `do_sample` or beams, or more than beams; beams with
                `eos_token_id`; words that are no tokens; a bidirectional model.
            TypeError: An argument that transformers has not, or a value that would change something.

        Example:
            >>> begun = torch.full_like(ids[:, :1], model.config.sos_token_id)
            >>> drawn = model.generate(begun, max_length=17, do_sample=True)
            >>> drawn.shape, drawn[:, 0].tolist()
            (torch.Size([2, 17]), [8, 8])
        """
        begun = inputs if input_ids is None else input_ids
        if begun is None or (input_ids is not None and inputs is not None):
            raise ValueError("expected either input_ids or inputs; got both or none")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask hides given tokens; expected ones, as every pixel of an image counts")
        settings = all_asked(asked, generation_config, self.generation_config)
        ends, pad = self._ends(settings)
        length = self._length(begun.shape[1], settings)
        times = max(settings["num_beams"], settings["num_return_sequences"])
        more = length - begun.shape[1]
        # Made outside of inference mode, so that what is returned may be trained on.
        tokens = F.pad(begun.repeat_interleave(times, 0), (0, more), value=self.config.sos_token_id)
        types = token_type_ids
        if types is not None:
            types = torch.cat([types, types[:, -1:].expand(-1, more)], dim=1).repeat_interleave(times, 0)
        kept: dict[str, list] = {
            name: [] for name in KEPT if settings[f"output_{name}"] and settings["return_dict_in_generate"]
        }
        score, draw = _scorer(settings, tokens, kept), _drawer(settings, generator)
        search = Beams(tokens.view(len(begun), -1, length), score, draw) if settings["num_beams"] > 1 else None
        pick = search or _until(lambda logits, column: draw(score(logits, column), 1), ends, pad)
        cached = settings["use_cache"] is not False
        tokens = self.continue_(tokens, begun.shape[1], pick, use_cache=cached, kept=kept, token_type_ids=types)
        return _returned(tokens, kept, search, settings)

    def _length(self, known: int, settings: dict) -> int:
        """How many tokens there are in the end."""
        if (settings["max_length"] is None) == (settings["max_new_tokens"] is None):
            raise ValueError("expected either max_length or max_new_tokens; got both or none")
        length, longest = settings["max_length"] or known + settings["max_new_tokens"], self.config.n_positions + 1
        if not known < length <= longest:
            raise ValueError(f"{length} tokens from {known} given; expected more than those and at most {longest}")
        return length

    def _ends(self, settings: dict) -> tuple[list[int], int]:
        """The tokens that end a row, which are no forbidden words, and the one that fills it then."""
        ends = self.config.eos_token_id if settings["eos_token_id"] is None else settings["eos_token_id"]
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        if ends and settings["num_beams"] > 1:
            raise ValueError(f"eos_token_id={ends} with num_beams; expected none, as beams end at one length here")
        settings["bad_words_ids"] = [
            word for word in settings["bad_words_ids"] or () if word not in [[end] for end in ends]
        ]
        pad = self.config.pad_token_id if settings["pad_token_id"] is None else settings["pad_token_id"]
        return ends, ends[0] if ends and pad is None else pad

    @torch.inference_mode()
    def continue_(
        self, tokens: Tensor, known: int, pick: Callable[[Tensor, int], Any], progress=range, *,
        use_cache: bool = True, kept: dict[str, list] | None = None, token_type_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Fill columns from `known` on, in place: one pass over those before it, then a token a step.

        Args:
            tokens: int64 (N, length), whose columns before `known` are given.
            known: Number of those columns, 1 or more.
            pick: `pick(logits (N, V), column)` gives the column's tokens (N, 1), or None to end, or the tokens and the
                rows (N,) of `tokens` that they continue.
            progress: Wraps the range of columns, such as `tqdm.trange`.
            use_cache: Keep keys and values. Without, each step passes over all tokens again.
            kept: Lists "attentions" and "hidden_states", to which those of every pass are added.
            token_type_ids: int64 (N, length), as of a forward pass.

        Returns:
            `tokens`; where `pick` gave None, the columns before that.

        Raises:
            ValueError: A bidirectional model, or more tokens than positions.

        Example:
            >>> begun = torch.full_like(ids[:, :4], model.config.sos_token_id)
            >>> model.continue_(begun, 1, lambda logits, column: torch.full_like(begun[:, :1], column)).tolist()
            [[8, 1, 2, 3], [8, 1, 2, 3]]
        """
        if self.config.bidirectional:
            raise ValueError("a bidirectional model predicts masked pixels, and continues no image")
        count, length = tokens.shape
        plain = is_plain(self)
        of_passes = {name: values for name, values in (kept or {}).items() if name in ("attentions", "hidden_states")}
        was_training = self.training
        cache: KeyValueCache | None = None
        if use_cache:
            cache = KeyValueCache.of(self.config, count, length - 1, device=tokens.device, dtype=self.dtype)
        self.eval()
        try:
            for column in progress(known, length):
                new = slice(0 if cache is None else cache.filled, column)
                types = None if token_type_ids is None else token_type_ids[:, new]
                logits = self.next_logits(tokens[:, new], cache, plain=plain, kept=of_passes, token_type_ids=types)
                picked = pick(logits, column)
                if picked is None:
                    return tokens[:, :column]
                if isinstance(picked, tuple):
                    picked, continued = picked
                    tokens[:, :column] = tokens[continued, :column]
                    if cache is not None:
                        cache.reorder_cache(continued)
                tokens[:, column, None] = picked
        finally:
            self.train(was_training)
        return tokens


def _scorer(settings: dict, tokens: Tensor, kept: dict[str, list]) -> Callable[[Tensor, int], Tensor]:
    """What makes scores of logits (N, V) by the `tokens` before their column, and puts both into `kept`."""

    def score(logits: Tensor, column: int) -> Tensor:
        scores = logits.float().log_softmax(-1) if settings["num_beams"] > 1 else logits
        scores = shaped(scores, tokens[:, :column], settings)
        for name, values in (("logits", logits), ("scores", scores)):
            if name in kept:
                kept[name].append(values.clone())
        return scores

    return score


def _drawer(settings: dict, generator: torch.Generator | None) -> Callable[[Tensor, int], Tensor]:
    """What takes `count` columns of each row of scores (N, M), the largest ones or drawn ones: int64 (N, count)."""

    def draw(scores: Tensor, count: int) -> Tensor:
        if settings["do_sample"]:
            return torch.multinomial(scores.softmax(-1), count, generator=generator)
        return scores.argmax(-1, keepdim=True) if count == 1 else scores.topk(count).indices

    return draw


def _until(pick: Callable[[Tensor, int], Tensor], ends: list[int], pad: int) -> Callable[[Tensor, int], Tensor | None]:
    """`pick` that gives `pad` in the rows that had one of `ends`, and None when all have."""
    over = None

    def ending(logits: Tensor, column: int) -> Tensor | None:
        nonlocal over
        if over is not None and over.all():
            return None
        picked = pick(logits, column)
        over = torch.zeros_like(picked, dtype=torch.bool) if over is None else over
        picked = picked.masked_fill(over, pad)
        over |= torch.isin(picked, torch.tensor(ends, device=picked.device))
        return picked

    return ending if ends else pick


def _returned(
    tokens: Tensor, kept: dict[str, list], search: Beams | None, settings: dict
) -> Tensor | Generated | GeneratedBeams:
    """What `generate` gives, of the tokens and of what was kept on the way."""
    kind = Generated if search is None else GeneratedBeams
    outputs: dict[str, Any] = {"sequences": tokens} | {name: tuple(values) for name, values in kept.items()}
    outputs |= {} if search is None else search.best(tokens, settings)
    in_order = kind({name: outputs[name] for name in kind.fields if name in outputs})
    return in_order if settings["return_dict_in_generate"] else in_order.sequences
