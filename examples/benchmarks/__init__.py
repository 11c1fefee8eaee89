"""Every method on problems whose posterior is known: the tables and the picture of docs/benchmarks.md.

python -m examples.benchmarks --help
"""
