"""Rehearsal: a run on processes of this machine, and the faults of a pod done to it."""
