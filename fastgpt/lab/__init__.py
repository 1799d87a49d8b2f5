"""Kernel development with no GPU: compile for any chip, read the resources, compare the numbers."""
