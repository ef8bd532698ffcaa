"""Argument checks shared by the ops: every failure is a TypeError or ValueError that names the argument."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of sums, of ``u`` and of the gradients of vectors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value, *, dtypes: tuple[torch.dtype, ...] | None = FLOATING) -> None:
    """A plain strided tensor of one of ``dtypes``, None for any."""
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind.__name__}")
        if kind.__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor; pass its local tensor (to_local) with the right grad_placements")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}, expected {expected}")


def check_fits(
    name: str,
    value,
    shape: tuple[int, ...],
    meaning: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """A tensor of this shape, device and one of these dtypes. ``meaning`` names the shape's letters in the message."""
    check_tensor(name, value, dtypes=dtypes)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {meaning} = {tuple(shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}")


def check_adapters(lora_A, lora_B, like: torch.Tensor, N: int | None, K: int) -> int:
    """R, if lora_A (R, K) and lora_B (N, R) fit an activation or weight ``like``; None: any N."""
    for name, value, shape in (("lora_A", lora_A, "(R, K)"), ("lora_B", lora_B, "(N, R)")):
        check_tensor(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    dtypes, R = (like.dtype, torch.float32), lora_A.shape[0]
    check_fits("lora_A", lora_A, (R, K), "(R, K)", like.device, dtypes)
    check_fits("lora_B", lora_B, (lora_B.shape[0] if N is None else N, R), "(N, R)", like.device, dtypes)
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B has dtype {lora_B.dtype}, expected {lora_A.dtype} like lora_A")
    return R


def check_parts(weight, bias, **parts: tuple) -> None:
    """What a functional form takes beside x: weight (N, K), bias (N) or None, and by name its tensors, each with its shape.

    A shape is written like ``"R K"``: a letter stands for one size everywhere, N and K for the weight's; ``K+`` is at least K,
    ``K/b`` a part of it, a number itself; ``R 1|R`` is one or the other. Whole numbers have limits behind their shape, a tuple
    with one for all or one for each row of them: checked on the CPU alone, elsewhere the host would have to wait.
    """
    if torch._C._get_tracing_state() is not None:
        return  # the sizes of a trace are tensors
    if hasattr(weight, "kind"):
        raise TypeError(f"weight is a base of kind {weight.kind}, but this method reads its elements: pass a tensor")
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")
    check_beside(weight, bias, parts)


def check_beside(weight, bias, parts: dict[str, tuple]) -> None:
    """The same of all but the weight, which may be a base in codes: that has a shape and a device, but no dtype."""
    sizes = dict(zip("NK", weight.shape))
    floating = FLOATING if getattr(weight, "dtype", torch.float64) == torch.float64 else FLOATING[:3]
    if bias is not None:
        parts["bias"] = bias, "N"
    for name, (value, shape, *limits) in parts.items():
        check_tensor(name, value, dtypes=(torch.int64, torch.int32) if limits else floating)
        forms = [form.split() for form in shape.split("|")]
        letters = next((form for form in forms if len(form) == value.dim()), None)
        # Parts of a size last: by then it is known which.
        pairs = sorted(zip(value.shape, letters or ()), key=lambda pair: "/" in pair[1])
        if letters is None or not all(_is(n, letter, sizes) for n, letter in pairs):
            expected = " or ".join(f"({', '.join(form)})" for form in forms)
            known = ", ".join(f"{letter} = {n}" for letter, n in sizes.items() if letter in shape)
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected} with {known}")
        if value.device != weight.device:
            raise ValueError(f"{name} is on {value.device}, expected {weight.device}")
        if limits and not value.is_cuda and not torch.compiler.is_compiling():
            _check_below(name, value, *limits)


def _is(n: int, letter: str, sizes: dict[str, int]) -> bool:
    if "/" in letter:
        whole, part = (sizes[each] for each in letter.split("/"))
        return part > 0 and n * part == whole
    if letter.endswith("+"):
        return n >= sizes[letter[:-1]]
    return n == (int(letter) if letter.isdigit() else sizes.setdefault(letter, n))


def _check_below(name: str, value: torch.Tensor, limits: tuple[int, ...]) -> None:
    for numbers, limit in zip([value] if len(limits) == 1 else value, limits):
        if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < limit:
            raise ValueError(f"{name} has numbers from {numbers.min()} to {numbers.max()}, expected 0 to {limit - 1}")


def check_rows(name: str, value, columns: int | None = None, letter: str = "columns") -> tuple[int, int]:
    """(M, columns) of a matrix."""
    check_tensor(name, value)
    if value.dim() != 2 or columns not in (None, value.shape[1]):
        expected = f"(M, {letter})" + ("" if columns is None else f" with {letter} = {columns}")
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    return tuple(value.shape)


def check_number(name: str, value) -> None:
    """A real Python number (not a bool) that a float can hold: infinite and NaN ones are such."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name} is an int of {value.bit_length()} bits, which no float can hold") from None


def check_whole(name: str, value, least: int, most: int | None = None) -> None:
    """An int (not a bool) from ``least`` on, up to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}, expected {f'at least {least}' if most is None else f'{least} to {most}'}")


def check_factor(name: str, value: torch.Tensor, device: torch.device, like: str) -> None:
    """A floating point tensor of one element, on the device of the argument called ``like``."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float or a floating point tensor, got dtype {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} like {like}")


def check_scaling(scaling, weight: torch.Tensor) -> None:
    """A number, or a tensor of one element on the weight's device."""
    if isinstance(scaling, torch.Tensor):
        check_factor("scaling", scaling, weight.device, "weight")
    else:
        check_number("scaling", scaling)
