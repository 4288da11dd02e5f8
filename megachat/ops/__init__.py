"""Numerical operations with a memory or speed contract of their own, one module per family."""
