"""The methods that this package serves. ``registry`` says what an entry is; ``linear`` and ``tuner`` are what entries share."""

from . import linear, lora
from .registry import METHODS, Branch, Method, Plan, loaded, method_of, register

__all__ = ["METHODS", "Branch", "Method", "Plan", "linear", "loaded", "lora", "method_of", "register"]
