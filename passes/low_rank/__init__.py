"""Layers as two of a lower rank."""
