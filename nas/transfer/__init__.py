"""Ways to move knowledge from one data set to another."""

from nas.transfer.cell import parse_macs, restack

__all__ = ["parse_macs", "restack"]
