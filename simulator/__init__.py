"""Drives the real scheduler core on a virtual clock."""
