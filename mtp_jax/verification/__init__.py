"""Verification: proofs that drafting changes neither texts nor distributions."""
