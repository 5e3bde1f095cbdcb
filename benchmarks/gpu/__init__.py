"""Figures of one GPU, a part a module, for `benchmarks/gpu.sh`."""
