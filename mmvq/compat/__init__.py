"""Other implementations' state and numbers; nothing in mmvq depends on this package."""
