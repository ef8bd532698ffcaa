"""The methods that this package serves. Each module beside ``registry`` and ``tuner`` holds one."""

from . import lora
from .registry import METHODS, Branch, Method, Plan, loaded, method_of, register

__all__ = ["METHODS", "Branch", "Method", "Plan", "loaded", "lora", "method_of", "register"]
