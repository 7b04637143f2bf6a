"""Which words point at which patches: interactions beside methods of first order, on captions of two objects."""
