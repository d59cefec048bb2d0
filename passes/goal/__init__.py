"""A goal instead of ratios: widths, bits and kernels chosen together by what they cost and what they lose."""
