"""The equation as data: rows that agree with each other, with the public function and with what the documents print."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peftkern import equation, lora_linear
from peftkern.dispatch.registry import OPS, Out, Size, schema_of
from peftkern.equation import COEFFICIENTS, NO_SCALES, PLACES, Needs, Scales, fold
from peftkern.ops.lora_linear import Backward

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def test_places_scales_and_needs_agree():
    symbols = tuple(at.symbol for at in PLACES)
    assert symbols == Scales._fields and ("x", "A", "B", "bias", *symbols) == Needs._fields
    assert {at.axis for at in PLACES} == {"R", "K", "N"} and {at.saves for at in PLACES} == {"u", "x", "h"}
    assert all(equation.place(symbol).symbol == symbol for symbol in symbols)
    assert NO_SCALES == (None,) * 5 and Needs(True, True, True, True)[4:] == (False,) * 5


def test_every_row_is_a_keyword_of_lora_linear():
    keywords = {
        name: p
        for name, p in inspect.signature(lora_linear).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    names = [c.name for c in COEFFICIENTS]
    assert len(set(names)) == len(names) and {c.symbol for c in COEFFICIENTS} == set(Scales._fields)
    assert [name for name in keywords if name.endswith("_scale")] == names
    assert all(keywords[name].default is None for name in names)


def test_a_place_saves_what_its_gradient_reads():
    """The backward op asks for x or h where a place says that its gradient needs it, and for nothing otherwise."""
    M, N, K, R = 3, 4, 5, 2
    full = dict(
        dy=torch.randn(M, N), x=torch.randn(M, K), u=torch.randn(M, R), h=torch.randn(M, N), base=[torch.randn(N, K)],
        kind="dense", lora_A=torch.randn(R, K), lora_B=torch.randn(N, R), scaling=1.0, dropout_p=0.0, seed=None,
        scales=list(NO_SCALES),
    )  # fmt: skip
    for at in PLACES:
        c = Backward(**full, needs=[name == at.symbol for name in Needs._fields])
        for name in ("x", "h"):
            without = c._replace(**{name: None})
            if at.saves == name:
                with pytest.raises(TypeError, match=f"{name} must be a tensor"):
                    OPS["lora_linear_bwd"].describe(without)
            else:
                OPS["lora_linear_bwd"].describe(without)


def test_names_and_fold(monkeypatch):
    assert equation.names("d") == "rank_scale"
    vector = torch.rand(3, dtype=torch.bfloat16)
    folded = fold({"rank_scale": vector, "base_in_scale": None}, vector)
    assert folded.d is vector and folded._replace(d=None) == NO_SCALES
    with pytest.raises(TypeError, match="rang_scale is no coefficient; there are rank_scale, base_in_scale"):
        fold({"rang_scale": vector}, vector)
    monkeypatch.setattr(equation, "COEFFICIENTS", (*COEFFICIENTS, equation.Coefficient("other", "d")))
    assert equation.names("d") == "rank_scale times other"
    folded = fold({"rank_scale": vector, "other": vector.float()}, vector)
    assert folded.d.dtype == torch.float32 and torch.equal(folded.d, vector.float() * vector.float())
    assert fold({"rank_scale": vector, "other": vector}, vector.double()).d.dtype == torch.float64
    for bad in (vector[:1], vector[None]):
        with pytest.raises(ValueError, match=r"other has shape .*, expected \(R,\) = \(3,\)"):
            fold({"rank_scale": vector, "other": bad}, vector)


def test_the_documents_print_the_table():
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in DESIGN.read_text().splitlines()]
    expected = [[f"`{name}`", *cells] for name, *cells in equation.table()]
    found = [row for row in rows if row[0].strip("`") in {c.name for c in COEFFICIENTS} and len(row) > 2]
    assert found == expected


class Arguments(NamedTuple):
    """One of each kind."""

    out: Out
    x: Tensor
    bias: Tensor | None
    base: list[Tensor]
    scales: list[Tensor | None]
    needs: list[bool]
    K: Size
    rank: int
    p: float
    flag: bool
    kind: str


def test_schema_of():
    assert schema_of(Arguments, "(Tensor, Tensor[])") == (
        "(Tensor(a!) out, Tensor x, Tensor? bias, Tensor[] base, Tensor?[] scales, bool[] needs, SymInt K, int rank, "
        "float p, bool flag, str kind) -> (Tensor, Tensor[])"
    )


@pytest.mark.parametrize("name", OPS)
def test_schemas_have_the_fields_of_the_arguments(name):
    schema = getattr(torch.ops.peftkern, name).default._schema
    assert tuple(a.name for a in schema.arguments) == OPS[name].arguments._fields
