"""Benchmarks: scripts that compare the speed of variants in one run.

python -m benchmarks.NAME [--options]
"""
