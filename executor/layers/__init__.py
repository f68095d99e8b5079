"""Sharded layers, each written once against a `Mesh` of groups."""
