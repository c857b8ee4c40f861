"""Ways to move knowledge from one data set to another."""

from nas.transfer.cell import parse_macs, restack
from nas.transfer.supernet import WarmStart, WarmStartOptions

__all__ = ["WarmStart", "WarmStartOptions", "parse_macs", "restack"]
