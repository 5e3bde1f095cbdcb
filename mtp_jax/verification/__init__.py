"""Proofs that drafting changes nothing: greedy texts and sampled distributions."""
