"""The paper's experiments at a scale anyone can run: systems, ablations, tasks, figures, report."""
