"""Speed and memory of mmvq beside its peers: `python -m examples.benchmarks --help`."""
