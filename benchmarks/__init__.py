"""How fast it is: scripts that compare variants with each other in one run.

python -m benchmarks.NAME [--options]
"""
