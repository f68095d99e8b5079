"""Ways to start the ranks of a plan, one file each."""
