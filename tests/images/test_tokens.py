"""Tokens of image sets, and token sets, which have nothing else."""

import hashlib

import numpy as np
import pytest

from igpt_lab.images.image_sets import TokenSet
from igpt_lab.images.tokens import tokenize


def test_tokenize(train, tiny, capsys):
    tokens = tokenize(train, tiny.processor, batch_size=7, progress=False)
    assert tokens.dtype == np.uint16 and capsys.readouterr().err == ""
    pixels = np.stack([np.asarray(image) for image in train.images()])
    np.testing.assert_array_equal(tokens, tiny.processor.encode(pixels))
    tokenize(train, tiny.processor)
    assert "60/60" in capsys.readouterr().err


@pytest.fixture
def token_set() -> TokenSet:
    tokens = np.arange(24, dtype=np.uint8).reshape(6, 4)
    return TokenSet("counted", "train", np.arange(6), np.array([0, 0, 1, 1, 1, 1]), ("a", "b"), tokens)


def test_a_selection_of_a_token_set_has_its_tokens(token_set):
    some = token_set.select([4, 1])
    assert type(some) is TokenSet and len(some) == 2
    assert some.index.tolist() == [4, 1] and some.require_labels().tolist() == [1, 0]
    assert tokenize(some, None).tolist() == [[16, 17, 18, 19], [4, 5, 6, 7]]
    assert tokenize(some, None).dtype == np.uint16
    assert repr(some) == "<TokenSet counted train: 2 images, 2 classes>"


def test_the_fingerprint_of_a_token_set_by_hand(token_set):
    content = b"tokens 4" + np.arange(24, dtype="<i8").tobytes()
    content += np.array([0, 0, 1, 1, 1, 1], "<i8").tobytes() + np.arange(6, dtype="<i8").tobytes()
    assert token_set.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_token_set_has_no_pixels(token_set):
    for use in (token_set.images, lambda: token_set.batches(2), lambda: token_set[0]):
        with pytest.raises(ValueError, match="counted train holds tokens, and this needs the images"):
            use()
