"""The paper's experiments on a small scale: systems, ablations, tasks, figures, report."""
