"""State and results of other implementations; nothing in mmvq depends on this package."""
