"""Readers of rendered files, a file each: what they ask for against what the plan says."""
