"""Tests against AdapterHub's ``adapters``, which needs another release of transformers than this project's environment has.

They are collected in ``.venv-adapters`` alone (``make adapters-env``): tests/integrations/test_adapters.py runs them there.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("adapters") else ["test_*.py"]
