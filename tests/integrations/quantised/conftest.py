"""Tests against libraries that quantise weights: bitsandbytes, torchao, optimum-quanto, hqq and gguf.

They are collected in ``.venv-quantised`` alone (``make quantised-env``): tests/integrations/test_environments.py runs them there.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("bitsandbytes") else ["test_*.py"]
