"""Targets, weights, cross entropy and the losses of the heads."""
