"""Bottleneck and invertible adapters of whole models: outputs and every gradient, what is declined and why, dropout, dtypes."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import adapters
import pytest
import torch
from adapters.methods import modeling
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import settings
from peftkern.autograd.residual import bottleneck_adapter as function
from peftkern.dispatch.least import BOTTLENECK
from peftkern.integrations.adapter_hub import kind

from .models import BATCH, HIDDEN, LAYERS, LENGTH, adapted, batch, outcome, same

F64 = torch.float64
COVERED = (modeling.Adapter, modeling.NICECouplingBlock)
# Config string -> modules of each layer of BERT, and of the model.
CONFIGS = {
    "seq_bn": (1, 0), "double_seq_bn": (2, 0), "par_bn": (1, 0), "scaled_par_bn": (1, 0),
    "seq_bn_inv": (1, 1), "double_seq_bn_inv": (2, 1),
    "compacter[reduction_factor=4]": (2, 0), "compacter++[reduction_factor=4]": (1, 0),
}  # fmt: skip
PLUS = adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0)
FLAGS = {
    "ln before": "seq_bn[ln_before=True]",
    "ln after": "seq_bn[ln_after=True,adapter_residual_before_ln=True]",
    "original ln first": "double_seq_bn[original_ln_before=True,original_ln_after=False]",
    "residual behind the ln": "seq_bn[residual_before_ln=False]",
    "residual of the sum": adapters.SeqBnConfig(residual_before_ln="post_add"),
    "learned": adapters.SeqBnConfig(scaling="learned"),
    "channel": adapters.SeqBnConfig(scaling="channel"),
    "plus": PLUS,
    "gate": "seq_bn[use_gating=True,reduction_factor=4]",
    "parallel gate": "par_bn[use_gating=True]",
    "phm, nothing shared": "compacter[reduction_factor=4,shared_phm_rule=False,factorized_phm_W=False]",
    "phm, all shared": "compacter++[reduction_factor=4,shared_W_phm=True,factorized_phm_rule=True]",
    **{f: f"double_seq_bn[non_linearity='{f}',reduction_factor=4]"
       for f in ("gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "leakyrelu", "leaky_relu", "linear")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def names(model):
    return [name for name, m in model.named_modules() if isinstance(m, COVERED)]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_whole_models(kind, config):
    model, inputs = adapted(kind, config), batch()
    report = same(model, inputs)
    each, alone = CONFIGS[config]
    assert report.accelerated == names(model) and len(report.accelerated) == each * LAYERS + alone
    assert not report.skipped and set(report.libraries.values()) == {"AdapterHub"}
    status = peftkern.status(model)
    assert (status.fused, status.stock) == (len(report.accelerated), 0)


@pytest.mark.parametrize("config", FLAGS.values(), ids=FLAGS)
def test_flags(config):
    model = adapted("bert", config)
    same(model, batch())
    assert peftkern.status(model).stock == 0 < peftkern.status(model).fused


@pytest.mark.parametrize(
    "config", ["seq_bn[dropout=0.4]", "par_bn[dropout=0.4]", "compacter[dropout=0.4,reduction_factor=4]"]
)
def test_dropout_by_a_shared_mask(config, shared_mask, monkeypatch):
    monkeypatch.setattr(function, "seed_tensor", lambda seed, device: torch.tensor(shared_mask))
    model = adapted("bert", config)
    same(model, batch())
    assert peftkern.status(model).stock == 0
    model.eval()
    same(model, batch())


def test_the_law_of_dropout():
    """Of what the adapter adds, columns are dropped with probability p and the others divided by 1 - p; seeds repeat it."""
    module = modeling.Adapter("a", HIDDEN, 4, adapters.SeqBnConfig(dropout=0.3))
    nn.init.normal_(module.adapter_up.weight)
    nn.init.ones_(module.adapter_up.bias)
    x = torch.randn(40, 50, HIDDEN)
    module.eval()
    added = module(x, x)[0] - x
    peftkern.accelerate(module.train())
    torch.manual_seed(3)
    first = module(x, x)[0]
    ratio = ((first - x) / added).detach()
    kept = ratio.abs() > 1e-6
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7), rtol=1e-6, atol=0)
    n = kept.numel()
    assert abs(kept.sum().item() - 0.7 * n) < 5 * (0.21 * n) ** 0.5
    assert not torch.equal(first, module(x, x)[0])
    torch.manual_seed(3)
    assert torch.equal(first, module(x, x)[0]) and peftkern.status(module).stock == 0


@pytest.fixture
def drop_path(monkeypatch):
    """torchvision's StochasticDepth by rows, as its documentation states it."""

    class StochasticDepth(nn.Module):
        def __init__(self, p, mode):
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, x):
            if not self.training:
                return x
            keep = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=x.dtype).bernoulli_(1 - self.p)
            return x * keep.div_(1 - self.p)

    package = ModuleType("torchvision.ops.stochastic_depth")
    package.StochasticDepth = StochasticDepth
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(modeling, "is_torchvision_available", lambda: True)


@pytest.mark.parametrize("gated", [False, True])
def test_rows_are_dropped_as_the_library_drops_them(drop_path, gated):
    model = adapted("bert", adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.5, use_gating=gated))
    inputs = batch()
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(outcome(model, inputs))
        assert not peftkern.accelerate(model).skipped
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert peftkern.status(model).fused == LAYERS
    same(model.eval(), inputs)


def test_an_invertible_block_and_its_inverse():
    block = modeling.NICECouplingBlock([[HIDDEN + 1]], non_linearity="gelu", reduction_factor=2)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, leaves, results = torch.randn(2, 5, HIDDEN + 1, requires_grad=True), [], []
    for _ in range(2):
        y = block(x)
        back = block(y, rev=True)
        leaves = [x, *block.parameters()]
        sums = (y.square().sum() + (back * y.detach()).sum(),)
        results.append((y, back, block(x, [], True), *torch.autograd.grad(sums, leaves)))
        peftkern.accelerate(block)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[1][1], x, rtol=1e-10, atol=1e-10)
    assert (peftkern.status(block).fused, peftkern.status(block).stock) == (3, 0)


DECLINED = {
    "its own norm, the residual behind it": ("seq_bn[ln_after=True]", None, "behind a norm of its own"),
    "a norm beside the model": ("par_bn[ln_after=True]", None, "goes through a norm"),
    "quick gelu": ("seq_bn[non_linearity='quick_gelu']", None, "its activation QuickGELUActivation is not covered"),
    "a hook on the adapter": ("seq_bn", lambda a: a.register_forward_hook(lambda m, i, o: None), "the adapter carries a hook"),
    "a hook inside": ("seq_bn", lambda a: a.adapter_up.register_forward_hook(lambda m, i, o: None), "up carries a hook"),
    "a forward of its own": ("seq_bn", lambda a: setattr(a.dropout, "forward", lambda x: x), "dropout was replaced on"),
    "everything dropped": ("seq_bn", lambda a: setattr(a.dropout, "p", 1.0), "its dropout drops everything"),
    "another layer inside": ("seq_bn", lambda a: setattr(a, "adapter_up", nn.Sequential(a.adapter_up)), "up is a torch"),
}  # fmt: skip


@pytest.mark.parametrize("config, change, reason", DECLINED.values(), ids=DECLINED)
def test_declined(config, change, reason):
    model, inputs = adapted("bert", config), batch()
    for module in model.modules():
        if change is not None and isinstance(module, modeling.Adapter):
            change(module)
    expected, report = outcome(model, inputs), peftkern.accelerate(model)
    assert not report.accelerated and len(report.skipped) == LAYERS
    assert all(reason in found for found in report.skipped.values())
    torch.testing.assert_close(outcome(model, inputs), expected, rtol=0, atol=0)
    assert peftkern.status(model).fused == 0


def test_glow_is_named():
    report = peftkern.accelerate(adapted("bert", "seq_bn_inv[inv_adapter='glow']"))  # whose own forward raises
    assert (
        list(report.skipped) == ["invertible_adapters.a"] and "no bottleneck" in report.skipped["invertible_adapters.a"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ["double_seq_bn_inv", "par_bn", "compacter[reduction_factor=4]"])
def test_dtypes(config, dtype):
    """No further off the library in fp64 than 1.5 times the library in this dtype."""
    model, inputs = adapted("bert", config, train=False), batch()
    with torch.no_grad(), settings.using(cpu_kind="panels"):  # wherever the vendor's product is fast
        exact, other = model(**inputs)[0], copy.deepcopy(model).to(dtype)
        worst = [(other(**inputs)[0].double() - exact).square().mean()]
        peftkern.accelerate(other)
        worst.append((other(**inputs)[0].double() - exact).square().mean())
    assert worst[1] <= 1.5**2 * worst[0] and peftkern.status(other).stock == 0


@pytest.mark.parametrize("config", ["seq_bn_inv", "par_bn"])
def test_half_precision_stays_where_the_vendors_product_is_fast(config, monkeypatch):
    model = adapted("bert", config, train=False).bfloat16()
    for fast in (True, False):
        monkeypatch.setattr(kind, "vendor_is_fast", lambda dtype, on, fast=fast: fast)
        report = peftkern.accelerate(model)
        mine = [n for n in names(model) if n in report.accelerated]
        assert mine == ([] if fast else names(model))
        if fast:
            assert {report.skipped[n] for n in names(model)} == {"nothing to gain: the vendor's product is faster"}


def test_autocast():
    """The dtype of every output is the library's; sums that autocast makes wider stay with it."""
    for config, fused in (("seq_bn", True), ("seq_bn_inv", True), ("seq_bn[scaling='learned']", False)):
        model, inputs = adapted("bert", config, train=False).float(), batch()
        dtypes, worst = [], []
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(**inputs)[0]
            for _ in range(2):
                dtypes.append([])
                hooks = [
                    layer.register_forward_hook(lambda m, i, o: dtypes[-1].append(o.dtype))  # noqa: B023
                    for layer in model.modules() if isinstance(layer, adapters.methods.bottleneck.BottleneckLayer)
                ]  # fmt: skip
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    worst.append((model(**inputs)[0].double() - exact).square().mean())
                for hook in hooks:
                    hook.remove()
                peftkern.accelerate(model)
        assert dtypes[0] == dtypes[1] and dtypes[0] and worst[1] <= 1.5**2 * worst[0]
        ran = [peftkern.status(m).fused > 0 for m in model.modules() if isinstance(m, modeling.Adapter)]
        assert ran == [fused] * LAYERS


def test_small_calls_stay_with_the_library():
    module = modeling.Adapter("a", HIDDEN, 4, adapters.SeqBnConfig())
    peftkern.accelerate(module)
    x = torch.randn(2, 3, HIDDEN)
    with settings.using(small_calls=False, least=((BOTTLENECK, 1 << 12),)):
        for _ in range(2):
            module(x, x)
        assert set(peftkern.status(module).reasons.values()) == {"too small to gain: the library's own code is faster"}
        big = torch.randn(1, (1 << 12) // HIDDEN, HIDDEN)
        module(big, big)
    assert (peftkern.status(module).fused, peftkern.status(module).stock) == (1, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_bits_again(reentrant):
    module = modeling.Adapter("a", HIDDEN, 4, adapters.SeqBnConfig(dropout=0.5))
    peftkern.accelerate(module)
    x, results = torch.randn(2, 3, HIDDEN, requires_grad=True), []
    for run in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        y = run(lambda h: module(h, h)[0])
        results.append((y, *torch.autograd.grad(y.square().sum(), [*module.parameters()])) if not reentrant else (y,))
        if reentrant:
            y.square().sum().backward()
            results[-1] += tuple(p.grad.clone() for p in module.parameters())
            module.zero_grad()
    torch.testing.assert_close(*results)


def kept_bytes(run):
    """Bytes that backward is given, each storage once, without parameters."""
    held = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return sum(held.values()), y


def test_what_backward_keeps():
    """x, which the layer before keeps as well, and t, 4 M k bytes; the library keeps more than twice as much."""
    M, H, k = 64, 256, 16
    torch.set_default_dtype(torch.float32)
    module = modeling.Adapter("a", H, k, adapters.SeqBnConfig(non_linearity="gelu", scaling=4.0, dropout=0.1))
    x = torch.randn(1, M, H, requires_grad=True)
    theirs, _ = kept_bytes(lambda: module(x, x)[0])
    peftkern.accelerate(module)
    ours, _ = kept_bytes(lambda: module(x, x)[0])
    assert peftkern.status(module).fused == 1
    assert ours <= 4 * M * H + 4 * M * k + 64 and theirs >= 4 * M * H + M * H + 3 * 4 * M * k


@pytest.mark.parametrize("call", ["short input", "2-D gate", "a residual that broadcasts", "integers"])
def test_odd_calls_are_the_librarys(call):
    config = adapters.SeqBnConfig(use_gating=call == "2-D gate", reduction_factor=4)
    module = modeling.Adapter("a", HIDDEN, 8, config)
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    residual = x
    if call == "short input":
        x = residual = x[..., :-1]
    elif call == "2-D gate":
        x = residual = x[0]
    elif call == "integers":
        x = residual = torch.ones(2, 3, HIDDEN, dtype=torch.int64)
    else:
        residual = x[:1]

    def outcome():
        try:
            return module(x, residual)[0]
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    peftkern.accelerate(module)
    found = outcome()
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert peftkern.status(module).fused == 0
