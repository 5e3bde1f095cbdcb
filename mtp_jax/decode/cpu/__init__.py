"""Everything that only decoding on a CPU needs."""
