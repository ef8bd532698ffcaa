"""The calculated parts of docs/performance.md: every line follows from sizes and data-sheet rates (model.py) and says so."""

from __future__ import annotations

from ..core.floor import layer_floor
from ..judge import lora_linear as one
from ..judge import multi_lora_linear as several
from . import model
from .markdown import table

CALCULATION = "*A calculation from sizes and data-sheet rates, not a measurement.*"
LIMITS = "*Limits, and calculations from sizes and data-sheet rates; not measurements.*"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def rates() -> str:
    """The assumed rates."""
    rows = [[c.name, f"{c.bandwidth / 1e12:.2f} TB/s", f"{c.peak / 1e12:.0f} TFLOP/s",
             f"{c.product / 1e12:.0f} TFLOP/s"] for c in (model.A100, *model.CHIPS)]  # fmt: skip
    head = ["GPU", "memory, data sheet", "dense bf16, data sheet", "a vendor's product, assumed"]
    return "\n".join([CALCULATION, "", *table(head, rows)])


def _columns() -> list[tuple[tuple[int, int, int], model.Chip]]:
    return [(shape, chip) for shape in model.SHAPES for chip in model.CHIPS]


def _part_rows(make) -> list[list[str]]:
    rows = []
    for i, part in enumerate(make(*model.SHAPES[0])):
        cells = []
        for shape, chip in _columns():
            own = make(*shape)[i]
            cells.append(f"({_us(own.alone(chip))})" if own.beside else _us(own.seconds(chip)))
        where = f", {'in' if part.beside == 'L2' else 'beside'} {part.beside}" if part.beside else ""
        rows.append([part.name + where, part.formula, *cells])
    return rows


def _both(*shape) -> list[model.Part]:
    return [*model.forward(*shape), *model.backward(*shape)]


def _paid(*shape) -> list[model.Part]:
    # Nothing beside anything, nothing in a cache.
    return [model.Part(part.name, part.formula, part.flops, part.bytes) for part in _both(*shape)]


def _over_base(parts, products: int) -> list[float]:
    """Sums over ``products`` base products, for each column."""
    return [model.total(parts(*s), c) / (products * model.forward(*s)[0].seconds(c)) for s, c in _columns()]


def _over_peft() -> list[float]:
    found = []
    for shape, chip in _columns():
        theirs = 2 * model.forward(*shape)[0].seconds(chip) + model.eager_bytes(*shape) / chip.bandwidth
        found.append(theirs / model.total(_both(*shape), chip))
    return found


def _named(values: list[float], form: str) -> list[str]:
    return [form.format(value) for value in values]


def linear() -> str:
    """lora_linear, M = 8192: parts in microseconds, sums, and ratios to the two base products."""
    where = [f"{K}x{N}, {chip.name}" for (_, K, N), chip in _columns()]
    head = ["M = 8192, R = 16, fp32 adapters, microseconds", "cost", *where]
    lines = [CALCULATION, "", *table(head, _part_rows(model.forward) + _part_rows(model.backward))]
    rows = [
        ["forward", *_named(_over_base(model.forward, 1), "{:.3f}")],
        ["forward + backward", *_named(_over_base(_both, 2), "{:.3f}")],
        ["forward + backward, were all that stands in brackets paid for", *_named(_over_base(_paid, 2), "{:.3f}")],
        ["HF PEFT over this, its operations by their bytes: 56 M N + 48 M K", *_named(_over_peft(), "{:.2f}")],
    ]
    return "\n".join([*lines, *table(["over the frozen linear", *where], rows)])


def floors() -> str:
    """Both floors of lora_linear in milliseconds."""
    rows = []
    for which, words in (("fwd", "forward"), ("fwd_bwd", "forward + backward")):
        for shape in model.SHAPES:
            f = layer_floor(model.case(*shape), which)
            flops, moved = f.base_flops + f.branch_flops, f.base_bytes + f.branch_bytes
            rows.append([
                words, "x".join(map(str, shape)), f"{flops / 1e12:.3f}", f"{f.branch_flops / f.base_flops:.2%}",
                f"{moved / 1e6:.0f}", f"{f.branch_bytes / f.base_bytes:.1%}", f"{flops / model.PRODUCT * 1e3:.3f}",
                *(f"{moved / c.bandwidth * 1e3:.3f}" for c in model.CHIPS),
            ])  # fmt: skip
    head = ["pass", "M x K x N", "TFLOP", "branch of base", "MB", "branch of base", "FLOPs, ms",
            *(f"bytes, ms, {c.name}" for c in model.CHIPS)]  # fmt: skip
    return "\n".join([CALCULATION, "", *table(head, rows)])


def many() -> str:
    """Decoding with many adapters, and what limits mean in microseconds."""
    rows = []
    for M, K, N, adapters in ((64, 4096, 4096, 64), (64, 4096, 14336, 64), (64, 4096, 4096, 8), (64, 4096, 4096, 1)):
        for adapter, kind in ((2, "bf16"), (4, "fp32")) if (adapters, N) == (64, 4096) else ((2, "bf16"),):
            base, *branch = model.decode(M, K, N, adapters, adapter=adapter)
            moved = sum(p.bytes for p in branch)
            rows.append([
                f"{M}x{K}x{N}", f"{adapters} {kind}", f"{base.bytes / 1e6:.1f}", f"{moved / 1e6:.2f}",
                *(_us(base.seconds(c)) for c in model.CHIPS), *(_us(moved / c.bandwidth) for c in model.CHIPS),
                *(_us(moved / c.bandwidth / several.BANDWIDTH) for c in model.CHIPS),
            ])  # fmt: skip
    names = [c.name for c in model.CHIPS]
    head = ["M x K x N", "adapters, R = 16", "base, MB", "branch, MB", *(f"base, us, {n}" for n in names),
            *(f"branch, us, {n}" for n in names), *(f"its limit, us, {n}" for n in names)]  # fmt: skip
    return "\n".join([CALCULATION, "", *table(head, rows)])


def norm() -> str:
    """The row norm."""
    rows = [[f"{N}x{K}", f"{model.row_norm(N, K)[0].bytes / 1e6:.1f}",
             *(_us(model.total(model.row_norm(N, K), c)) for c in model.CHIPS)]
            for N, K in ((4096, 4096), (14336, 4096))]  # fmt: skip
    head = ["N x K", "MB", *(f"us, {c.name}" for c in model.CHIPS)]
    return "\n".join([CALCULATION, "", *table(head, rows)])


def bottleneck() -> str:
    """bottleneck_adapter: parts in microseconds, sums, what h and dy once would cost, and AdapterHub's operations."""
    M, H, R = sizes = model.BOTTLENECK
    columns = [(adapter, chip) for adapter in (4, 2) for chip in (model.A100, model.CHIPS[-1])]
    where = [f"{'fp32' if adapter == 4 else 'bf16'} matrices, {chip.name}" for adapter, chip in columns]
    passes = (
        ("forward", model.bottleneck_forward, 4, model.EAGER_BOTTLENECK),
        ("backward", model.bottleneck_backward, 6, model.EAGER_BOTTLENECK_GRAD),
    )
    rows, sums = [], []
    for name, parts, floor, eager in passes:
        made = [parts(*sizes, adapter=adapter) for adapter, _ in columns]
        for i, part in enumerate(made[0]):
            times = [_us(each[i].seconds(chip)) for each, (_, chip) in zip(made, columns)]
            rows.append([f"{name}: {part.name}", part.formula, *times])
        totals = [model.total(each, chip) for each, (_, chip) in zip(made, columns)]
        floors = [floor * M * H / chip.bandwidth for _, chip in columns]
        theirs = [sum(eager.values()) * M * H / chip.bandwidth for _, chip in columns]
        sums += [
            [name, "the sum", *map(_us, totals)],
            [f"{name}, were every M x H read once", f"{floor} M H bytes", *map(_us, floors)],
            [f"{name}, AdapterHub's operations over the sum", f"{sum(eager.values())} M H bytes", *(
                f"{t / own:.2f}" if adapter == 2 else "" for t, own, (adapter, _) in zip(theirs, totals, columns)
            )],
        ]  # fmt: skip
    head = [f"M = {M}, H = {H}, R = {R}, bf16, microseconds", "cost", *where]
    return "\n".join([CALCULATION, "", *table(head, rows + sums)])


def limits() -> str:
    """What ``report --judge`` holds a GPU's result to, what is expected, and what our product may lose to the vendor's."""
    forward, both = _over_base(model.forward, 1), _over_base(_both, 2)
    times = [_us(sum(p.bytes for p in model.decode(64, 4096, 4096, 64)[1:]) / c.bandwidth) for c in model.CHIPS]
    copied = f"{', '.join(f'{t} us on {c.name}' for t, c in zip(times, model.CHIPS))} at the full rate"
    rows = [
        ["lora_linear, forward", "frozen linear", f"<= {one.FORWARD:g}", f"{one.AIMS['fwd']:g}",
         *_named(forward, "{:.3f}")],
        ["where our product may take, of the vendor's time", "", "", "",
         *_named([1 + one.FORWARD - value for value in forward], "{:.3f}")],
        ["lora_linear, forward + backward", "frozen linear", f"<= {one.BOTH:g}", f"{one.AIMS['fwd_bwd']:g}",
         *_named(both, "{:.3f}")],
        ["where our product may take, of the vendor's time", "", "", "",
         *_named([1 + one.BOTH - value for value in both], "{:.3f}")],
        ["lora_linear, forward + backward, speed-up", "HF PEFT, by bytes", f">= {one.FASTER:g}", "",
         *_named(_over_peft(), "{:.2f}")],
        ["lora_linear, every row", "`addmm_` function", f"<= {one.NOISE:g}", "", *[""] * 4],
        ["decoding, branch", "copying its bytes", f">= {several.BANDWIDTH:.0%}", f"{several.AIM:.0%}", copied, "", "", ""],
        ["decoding, launches", "beyond the frozen linear's", f"<= {several.LAUNCHES}", "", *[""] * 4],
    ]  # fmt: skip
    where = [f"expected, {K}x{N}, {chip.name}" for (_, K, N), chip in _columns()]
    return "\n".join([LIMITS, "", *table(["figure", "over", "limit", "aim", *where], rows)])


CALCULATED = {
    "rates": rates, "lora_linear": linear, "floors": floors, "multi_lora_linear": many, "row_norm": norm,
    "bottleneck_adapter": bottleneck, "limits": limits,
}  # fmt: skip
