#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# torch.compile traces the forward of an autograd.Function directly where no argument requires a gradient. Whether that forward
# takes a ctx it tells from the number of its parameters, of which *rest counts as one. So a call that passes as many arguments as
# the forward has parameters, ctx and *rest included, loses ctx: every argument lands one place too early. Nothing is raised
# where the shapes allow it.
#
# Expected: what the function gives without a compiler.
# Seen:     forward(ctx, x, y, *rest) = x - 2 y + sum(rest), called with (1, 10, 100, 1000): 810 for 1081. With one argument fewer or
#           more, or where an argument requires a gradient, it is right.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'CODE'
import torch


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, *rest):
        return x - 2 * y + sum(rest)

    @staticmethod
    def backward(ctx, d):
        return d, -2 * d, *[d] * (len(ctx.needs_input_grad) - 2)


def outcomes(count, trains):
    torch._dynamo.reset()
    given = [torch.tensor(10.0**i, requires_grad=trains) for i in range(count)]
    compiled = torch.compile(lambda *args: Mix.apply(*args), backend="eager", fullgraph=True)
    return Mix.apply(*given).item(), compiled(*given).item()


print("torch", torch.__version__)
for count in (3, 4, 5):
    for trains in (False, True):
        plain, compiled = outcomes(count, trains)
        print(count, "arguments", "that train:" if trains else "that do not:", plain, "compiled", compiled)
        assert (plain != compiled) == (count == 4 and not trains)
        assert compiled == (810.0 if count == 4 and not trains else plain)
CODE
echo "as described"
