"""The parts of the cross-modal generalisation example, one purpose per file."""
