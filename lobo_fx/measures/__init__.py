"""Measures of programs and files: counts, fidelity, latency, memory, kernel costs."""
