"""Tokens after tokens: `generate` with the arguments of transformers, and the loop that it and others run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_lab.models.fast import is_plain
from igpt_lab.models.generation_config import KEPT, all_asked
from igpt_lab.models.outputs import Generated, KeyValueCache


class Generates(nn.Module):
    """`generate` of a model with a head over colours."""

    transformer: Any  # these of the class that inherits
    lm_head: Any
    config: Any
    dtype: torch.dtype
    generation_config: Any

    def next_logits(
        self, fed: Tensor, cache: KeyValueCache | None, *, plain: bool = False, kept: dict[str, list] | None = None
    ) -> Tensor:
        """Logits (N, V) of the token after int64 (N, t), behind what `cache` holds.

        A `plain` model, see `is_plain`, makes them of the last position alone. `kept` gets what its names say, of this
        pass: "attentions", "hidden_states".
        """
        how: dict[str, Any] = {"use_cache": cache is not None, "return_dict": True}
        if plain and not kept:
            states = self.transformer(fed, cache, **how).last_hidden_state[:, -1]
            return self.lm_head(states)[:, : self.config.n_colours]
        asked = {f"output_{name}": True for name in kept or ()}
        out = self(fed, cache, **how, **asked)
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
        generator: torch.Generator | None = None,
        **asked,
    ) -> Tensor | Generated:
        """Continue int64 (N, t), the given tokens in front; arguments are transformers'.

        The most probable token each time, or one drawn with `do_sample`. By default nothing is left out, as in the
        paper. An image is SOS and T pixels: max_length = n_positions + 1.

        Args:
            input_ids: int64 (N, t).
            generation_config: An object or a dict of arguments that are not given here; the model's `generation_config`
                has the others.
            inputs: Another name of `input_ids`.
            attention_mask: Ones alone (N, t), as every pixel of an image counts.
            generator: Of the draws; by default torch's own.
            **asked: `max_length`, tokens in the end, or `max_new_tokens`, tokens that are added; `do_sample`;
                `temperature`, by which logits are divided; `top_k` largest logits and the most probable that together
                reach `top_p`, from which is drawn; `num_return_sequences` of each row; `eos_token_id`, at which a row
                ends, and `pad_token_id`, which fills it (by default the configuration's); `use_cache`. With
                `return_dict_in_generate` also `output_scores`, `output_logits`, `output_attentions` and
                `output_hidden_states`. Other arguments of transformers where their value changes nothing.

        Returns:
            int64 (N, max_length), or fewer columns where all rows reached their end. With `return_dict_in_generate`
            `sequences`, and a tuple over tokens of each output that is asked for.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs`, or of `max_length` and `max_new_tokens`; a length that
                adds nothing or is above n_positions + 1; a temperature, `top_k` or `top_p` out of range; a mask that
                hides tokens; several sequences without `do_sample`; a bidirectional model.
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
        how = all_asked(asked, generation_config, self.generation_config)
        length, copies = self._length(begun.shape[1], how), how["num_return_sequences"] or 1
        if copies > 1 and not how["do_sample"]:
            raise ValueError(f"num_return_sequences={copies} without do_sample; they would all be the same")
        # Made outside of inference mode, so that what is returned may be trained on.
        tokens = F.pad(begun.repeat_interleave(copies, 0), (0, length - begun.shape[1]), value=self.config.sos_token_id)
        kept: dict[str, list] = {name: [] for name in KEPT if how[f"output_{name}"] and how["return_dict_in_generate"]}
        pick = self._ending(_picker(how, generator, kept), how)
        tokens = self.continue_(tokens, begun.shape[1], pick, use_cache=how["use_cache"] is not False, kept=kept)
        found = {name: tuple(values) for name, values in kept.items()}
        return Generated({"sequences": tokens} | found) if how["return_dict_in_generate"] else tokens

    def _length(self, given: int, how: dict) -> int:
        """How many tokens there are in the end."""
        if (how["max_length"] is None) == (how["max_new_tokens"] is None):
            raise ValueError("expected either max_length or max_new_tokens; got both or none")
        length, longest = how["max_length"] or given + how["max_new_tokens"], self.config.n_positions + 1
        if not given < length <= longest:
            raise ValueError(f"{length} tokens from {given} given; expected more than those and at most {longest}")
        return length

    def _ending(self, pick: Callable, how: dict) -> Callable:
        """`pick` that ends rows at the tokens that end them, where there are any."""
        ends = self.config.eos_token_id if how["eos_token_id"] is None else how["eos_token_id"]
        ends = [ends] if isinstance(ends, int) else ends
        pad = self.config.pad_token_id if how["pad_token_id"] is None else how["pad_token_id"]
        return _until(pick, ends, ends[0] if pad is None else pad) if ends else pick

    @torch.inference_mode()
    def continue_(
        self, tokens: Tensor, given: int, pick: Callable[[Tensor, int], Tensor | None], progress=range, *,
        use_cache: bool = True, kept: dict[str, list] | None = None,
    ) -> Tensor:  # fmt: skip
        """Fill columns from `given` on, in place: one pass over what is given, then a token a step.

        Args:
            tokens: int64 (N, length), whose columns before `given` hold what is given.
            given: Number of those columns, 1 or more.
            pick: `pick(logits (N, V), column)` gives the column's tokens (N, 1), or None to end.
            progress: Wraps the range of columns, such as `tqdm.trange`.
            use_cache: Keep keys and values. Without, each step passes over all tokens again.
            kept: Lists "attentions" and "hidden_states", to which those of every pass are added.

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
            for column in progress(given, length):
                fed = tokens[:, (0 if cache is None else cache.filled) : column]
                picked = pick(self.next_logits(fed, cache, plain=plain, kept=of_passes), column)
                if picked is None:
                    return tokens[:, :column]
                tokens[:, column, None] = picked
        finally:
            self.train(was_training)
        return tokens


def _picker(how: dict, generator: torch.Generator | None, kept: dict[str, list]) -> Callable[[Tensor, int], Tensor]:
    """What picks tokens (N, 1) by logits (N, V), and puts these, and what it made of them, into `kept`."""

    def pick(logits: Tensor, _: int) -> Tensor:
        scores = cut(logits.float() / how["temperature"], how["top_k"], how["top_p"]) if how["do_sample"] else logits
        for name, values in (("logits", logits), ("scores", scores)):
            if name in kept:
                kept[name].append(values.clone())
        if not how["do_sample"]:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)

    return pick


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

    return ending


def cut(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (N, V) with minus infinity outside the `top_k` largest, then outside the nucleus of `top_p`.

    Ties with the k-th stay. The nucleus is the smallest set of the most probable tokens whose sum reaches `top_p`
    (Holtzman et al., 2020); the most probable one always stays.
    """
    if top_k:  # 0 leaves nothing out, as in transformers
        if top_k < 0:
            raise ValueError(f"top_k={top_k}; expected a whole number above 0, or None to leave nothing out")
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a fraction above 0 and at most 1, or None to leave nothing out")
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -math.inf)
    return logits
