"""Other engines that a plan can be rendered for, one file each."""
