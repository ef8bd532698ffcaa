"""Reads of a layer that write down what they saw, so that the next call can ask whether it is still so."""
