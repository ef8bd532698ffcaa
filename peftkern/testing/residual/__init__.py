"""Methods of the residual stream as libraries have them: modules that tests compare with and benchmarks time beside.

``EXAMPLES`` has the forms of each entry of the registry.
"""

from __future__ import annotations

from . import bottleneck, reft
from .example import Example, randomised

EXAMPLES: dict[str, dict[str, Example]] = {**bottleneck.EXAMPLES, **reft.EXAMPLES}

__all__ = ["EXAMPLES", "Example", "randomised"]
