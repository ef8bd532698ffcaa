"""``reft`` and ``ReFT`` against the interventions of pyreft, in fp64: outputs, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkern import ReFT, reft
from peftkern.nn.orthogonal import parametrised

F64, H, R = torch.float64, 16, 3
VARIANTS = {
    "loreft": ("LoreftIntervention", {"act_fn": "gelu"}),
    "noreft": ("NoreftIntervention", {"act_fn": "relu", "add_bias": False}),
    "direft": ("DireftIntervention", {"act_fn": "silu"}),
    "nodireft": ("NodireftIntervention", {"add_bias": False}),
    "consreft": ("ConsreftIntervention", {}),
    "lobireft": ("LobireftIntervention", {}),
}


def intervention(module, variant, **options):
    name, more = VARIANTS[variant]
    made = getattr(module, name)(embed_dim=H, low_rank_dimension=R, dtype=F64, **more, **options).double().train()
    for p in made.parameters():
        if p.shape != (H, R):
            nn.init.normal_(p, std=0.4)
        else:  # the free numbers of a rotation: the diagonal is signs
            made.rotate_layer.weight = nn.init.orthogonal_(torch.empty_like(p))
            p.data += torch.randn_like(p).tril(-1)
    return made


def parts(made):
    """R, W, b and the activation's name."""
    source = made.learned_source
    rotate = parametrised(made.rotate_layer).mT if hasattr(made, "rotate_layer") else made.proj_layer.weight
    weight, bias = (source.weight, source.bias) if isinstance(source, nn.Linear) else (None, source)
    return rotate, weight, bias


@pytest.mark.parametrize("variant", VARIANTS)
def test_function(interventions, variant, shared_mask):
    p = 0.0 if variant == "consreft" else 0.3  # which has none
    made = intervention(interventions, variant, dropout=p)
    h = torch.randn(2, 6, H, dtype=F64, requires_grad=True)
    positions = torch.tensor([[4, 1, 0], [2, 5, 3]])
    at = positions[:, :, None].expand(-1, -1, H)
    theirs = h.scatter(1, at, made(h.gather(1, at)))
    rotate, weight, bias = parts(made)
    ours = reft(
        h, rotate, weight, bias, positions=positions, variant=variant,
        activation=VARIANTS[variant][1].get("act_fn", "identity"), dropout_p=p, training=True, seed=shared_mask,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    leaves, dy = [h, *made.parameters()], torch.randn_like(h)
    expected, found = (torch.autograd.grad(y, leaves, dy) for y in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert all(g.any() for g in expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("add_bias", [False, True])
def test_module(interventions, variant, add_bias):
    made = intervention(interventions, variant, dropout=0.2)
    if add_bias and variant in ("noreft", "nodireft"):
        name, _ = VARIANTS[variant]
        made = getattr(interventions, name)(embed_dim=H, low_rank_dimension=R, dtype=F64, add_bias=True)
        nn.init.normal_(made.proj_layer.bias)
    ours = ReFT.from_pyreft(made)
    assert (ours.variant, ours.training) == (variant, made.training)
    assert ours.dropout == (made.dropout.p if variant != "consreft" else 0.0)
    h = torch.randn(2, 5, H, dtype=F64)
    torch.testing.assert_close(ours.eval()(h, torch.arange(5).expand(2, 5)), made.eval()(h))


def test_what_no_variant_has(interventions):
    biased = interventions.NoreftIntervention(
        embed_dim=H, low_rank_dimension=R, dtype=F64, add_bias=True, act_fn="relu"
    )
    other = interventions.LoreftIntervention(embed_dim=H, low_rank_dimension=R, act_fn="mish")
    for bad, match in (
        (biased, "a bias beside the activation ReLU"), (other, "activation MishActivation"), (nn.Linear(2, 2), "is a Linear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ReFT.from_pyreft(bad)


def test_a_half_precision_source_is_a_rounding_away(interventions):
    """pyreft's default: a bf16 source beside a rotation in fp32. What is rounded twice there is rounded once here."""
    made = interventions.LoreftIntervention(embed_dim=H, low_rank_dimension=R)
    h = torch.randn(2, 5, H).bfloat16()
    source = made.learned_source
    assert source.weight.dtype == torch.bfloat16 and made.rotate_layer.weight.dtype == torch.float32
    rotate = parametrised(made.rotate_layer).mT
    ours = reft(h, rotate, source.weight, source.bias, positions=torch.arange(5).expand(2, 5))
    exact = reft(
        h.double(),
        rotate.double(),
        source.weight.double(),
        source.bias.double(),
        positions=torch.arange(5).expand(2, 5),
    )
    worst = [(y.double() - exact).abs().max() for y in (ours, made(h))]
    assert worst[0] <= 1.5 * worst[1]
