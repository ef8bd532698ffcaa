"""The demo's text: deterministic, clean, with whole modules held out."""

from __future__ import annotations

import ast

import pytest

from peftkern.demo import corpus


@pytest.fixture(scope="module")
def texts():
    return corpus.collect(max_train=500, max_held_out=100)


def test_sizes_and_determinism(texts):
    assert len(texts.train) == 500 and len(texts.held_out) == 100
    assert corpus.collect(max_train=500, max_held_out=100) == texts


def test_no_module_is_on_both_sides(texts):
    train = {pair.name.partition(".")[0] for pair in texts.train}
    held_out = {pair.name.partition(".")[0] for pair in texts.held_out}
    assert not train & held_out
    assert len(held_out) >= 5


def test_pairs_are_public_distinct_and_readable(texts):
    pairs = texts.train + texts.held_out
    assert len({pair.text for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert not any(part.startswith("_") for part in pair.name.split("."))
        assert pair.text == " ".join(pair.text.split()) and 20 <= len(pair.text) <= 200


def test_members_takes_the_first_paragraph_of_public_names():
    source = '''
class Box:
    """A box that holds
    things.

    More about it."""
    def open(self): "Open the lid of the box."
    def _hidden(self): "Nobody should see this text."
    def short(self): "Short."
'''
    found = list(corpus.members("shop", ast.parse(source)))
    assert found == [
        corpus.Pair("shop.Box", "A box that holds things."),
        corpus.Pair("shop.Box.open", "Open the lid of the box."),
    ]
