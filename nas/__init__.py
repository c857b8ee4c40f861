"""Neural architecture search and transfer, in pure PyTorch.

The library knows no tracking server and no run; ``pipeline`` adds those.
"""
