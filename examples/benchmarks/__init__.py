"""Speed and memory of mmvq and its alternatives: `python -m examples.benchmarks --help`."""
