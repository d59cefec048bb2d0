"""Exact fusion of several operators into one."""
