"""Fuse what sites learned from images they may not share."""

__version__ = "0.1.0"
