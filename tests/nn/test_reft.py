"""ReFT and the rotation and positions that it needs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peftkern import ReFT, reft, reft_positions
from peftkern.autograd.residual.reft import VARIANTS
from peftkern.nn.orthogonal import free_numbers, orthonormal
from peftkern.nn.reft import ORTHONORMAL

F64 = torch.float64
POSITIONS = torch.tensor([[0, 3], [1, -1]])


@pytest.mark.parametrize("shape", [(1, 7), (3, 7), (6, 7), (7, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("trivial", [False, True])
def test_the_rotation_is_that_of_torch(shape, trivial):
    linear = nn.Linear(*reversed(shape), bias=False, dtype=F64)
    nn.utils.parametrizations.orthogonal(linear, orthogonal_map="householder", use_trivialization=trivial)
    made = linear.parametrizations.weight
    X, base = made.original, made[0].base if trivial else None
    with torch.no_grad():
        X += torch.randn_like(X).triu(1) if shape[0] < shape[1] else torch.randn_like(X).tril(-1)
    found = []
    for Q in (linear.weight, orthonormal(X, base)):
        found.append((Q, torch.autograd.grad((Q * torch.arange(Q.numel()).view_as(Q).cos()).sum(), X)))
    torch.testing.assert_close(*found)


def test_orthonormal_gradient():
    X = torch.randn(3, 8, dtype=F64).triu(1) + torch.eye(3, 8, dtype=F64)
    X.requires_grad_()
    assert torch.autograd.gradcheck(lambda X: orthonormal(X.triu(1) + torch.eye(3, 8, dtype=F64)), X)
    Q = orthonormal(X)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=F64))


@pytest.mark.parametrize("k, n", [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_free_numbers(k, n):
    Q = nn.init.orthogonal_(torch.empty(k, n, dtype=F64))
    torch.testing.assert_close(orthonormal(free_numbers(Q)), Q)
    unit = torch.eye(k, n, dtype=F64)
    torch.testing.assert_close(orthonormal(free_numbers(unit)), unit)


def test_weight_decay_leaves_a_rotation():
    """torch's own parametrisation is zero after one such step."""
    m = ReFT(16, 3)
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        m(torch.randn(2, 5, 16), POSITIONS).square().sum().backward()
        optimizer.step()
    R = m.rotation()
    torch.testing.assert_close(R @ R.mT, torch.eye(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_module(variant):
    m = ReFT(8, 3, variant, dtype=F64)
    h = torch.randn(2, 5, 8, dtype=F64)
    R = m.rotation()
    torch.testing.assert_close(m(h, POSITIONS), reft(h, R, m.weight, m.bias, positions=POSITIONS, variant=variant))
    if variant in ORTHONORMAL:
        torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=F64))
    m(h, POSITIONS).square().sum().backward()
    assert all(p.grad.any() for p in m.parameters())
    Q = nn.init.orthogonal_(torch.empty(3, 8, dtype=F64))
    m.set_rotation(Q)
    torch.testing.assert_close(m.rotation(), Q)


def test_the_rotation_is_kept_until_its_numbers_change():
    m = ReFT(8, 3)
    with torch.inference_mode():
        first = m.rotation()
        assert m.rotation() is first and not first.is_inference()
    assert m.rotation().requires_grad and m.rotation() is not first
    m.rotate.requires_grad_(False)
    assert m.rotation() is first
    m.rotate.data.mul_(2.0)
    second = m.rotation()
    torch.testing.assert_close(second, orthonormal(m.rotate))
    assert not torch.allclose(first, second)
    m.load_state_dict(ReFT(8, 3).state_dict())
    torch.testing.assert_close(m.rotation(), orthonormal(m.rotate))
    m.double()
    assert m.rotation().dtype == F64
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.rotation(), m.rotation())


def test_autocast_does_not_round_the_rotation():
    m = ReFT(8, 3)
    h = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(h, POSITIONS)
    assert torch.equal(y, m(h, POSITIONS))


def test_dropout_acts_in_training_alone():
    m = ReFT(40, 3, dropout=0.5)
    h = torch.randn(2, 5, 40)
    y = m(h, POSITIONS)
    assert (y[0, 0] == 0).any() and not (y[0, 1] == 0).any()
    m.eval()
    assert not (m(h, POSITIONS) == 0).any()


def test_bad_arguments():
    for args, error, match in (
        ((8, 9), ValueError, "rank is 9, expected 1 to hidden = 8"),
        ((8, 0), ValueError, "rank is 0"),
        ((8, 2, "reft"), ValueError, "variant is 'reft'"),
        ((8, 2, "loreft", "glu"), ValueError, "activation is 'glu'"),
        ((8, 2, "loreft", "relu", 1.0), ValueError, "dropout must be in"),
    ):
        with pytest.raises(error, match=match):
            ReFT(*args)
    with pytest.raises(TypeError, match=r"dtype is torch\.bfloat16"):
        ReFT(8, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"R has shape \(8, 2\), expected \(r, H\)"):
        ReFT(8, 2).set_rotation(torch.randn(8, 2))


LENGTHS = torch.tensor([7, 4, 3, 1, 0])


def listed(positions):
    """The positions of each sequence, without what is none."""
    return [sorted(p for p in row if p >= 0) for row in positions.tolist()]


def pyreft_rule(n, f, last):
    f, last = min(n // 2, f), min(n // 2, last)
    return [*range(f), *range(n - last, n)]


@pytest.mark.parametrize(
    "spec, f, last", [("f3+l2", 3, 2), ("f3", 3, 0), ("l2", 0, 2), ("f0+l1", 0, 1), ("f5+l5", 5, 5)]
)
def test_positions_of_padded_batches(spec, f, last):
    right = reft_positions(spec, LENGTHS)
    assert right.shape == (5, f + last) and right.dtype == torch.int64
    assert listed(right) == [pyreft_rule(n, f, last) for n in LENGTHS.tolist()]
    left = reft_positions(spec, LENGTHS, padding="left", width=9)
    assert listed(left) == [[9 - n + p for p in pyreft_rule(n, f, last)] for n in LENGTHS.tolist()]
    whole = reft_positions(spec, LENGTHS, overlap="last")
    for n, row in zip(LENGTHS.tolist(), listed(whole)):
        assert row == sorted({*range(min(f, n)), *range(max(n - last, 0), n)})


def test_positions_for_two_sets_of_parameters():
    first, last = reft_positions("f3+l2", LENGTHS, overlap="last", split=True)
    assert first.tolist() == [[0, 1, 2], [0, 1, -1], [0, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert last.tolist() == [[5, 6], [2, 3], [1, 2], [-1, 0], [-1, -1]]


def test_decoding_edits_what_training_edited():
    """A call on the whole sequence, and one on each part of it with a cache, edit the same rows."""
    h, m = torch.randn(5, 9, 8, dtype=F64), ReFT(8, 2, dtype=F64)
    for padding in ("left", "right"):
        where = dict(padding=padding, width=9)
        whole = m(h, reft_positions("f3+l2", LENGTHS, **where))
        parts = []
        for past, columns in ((0, 4), (4, 1), (5, 4)):
            at = reft_positions("f3+l2", LENGTHS, **where, past=past, columns=columns)
            parts.append(m(h[:, past : past + columns], at))
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert (reft_positions("f3+l2", LENGTHS, padding="left", width=9, past=9, columns=1) == -1).all()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"spec": "3+2"}, ValueError, "spec is '3\\+2'"),
        ({"spec": "f3l2"}, ValueError, "spec is 'f3l2'"),
        ({"spec": "f3+"}, ValueError, "spec is"),
        ({"spec": ""}, ValueError, "spec is ''"),
        ({"spec": 3}, ValueError, "spec is 3"),
        ({"lengths": [3]}, TypeError, "lengths must be a tensor"),
        ({"lengths": LENGTHS.int()}, TypeError, "lengths has dtype"),
        ({"lengths": LENGTHS[None]}, ValueError, "lengths has shape"),
        ({"padding": "left"}, ValueError, "'left' with a width"),
        ({"overlap": "first"}, ValueError, "overlap is 'first'"),
    ],
)
def test_bad_positions(change, error, match):
    with pytest.raises(error, match=match):
        reft_positions(**({"spec": "f3", "lengths": LENGTHS} | change))


def test_compiled():
    m, h = ReFT(16, 3), torch.randn(2, 5, 16)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(h, POSITIONS).square().sum(), tuple(m.parameters())) for f in (m, compiled)]
    torch.testing.assert_close(*grads)
