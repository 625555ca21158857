"""Benchmarks: ratios of two sides measured in one run. Not installed with the package."""
