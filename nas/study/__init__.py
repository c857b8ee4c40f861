"""Experiments that show what a transfer is worth: cells of a design, each a pure function."""
