"""Operators that become one, exactly."""
