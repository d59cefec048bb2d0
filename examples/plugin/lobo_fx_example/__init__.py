"""A pass, a criterion and an operator for lobo-fx. Models that use the operator import `scaled_tanh` from here."""

from lobo_fx_example.operator import scaled_tanh

__all__ = ["scaled_tanh"]
