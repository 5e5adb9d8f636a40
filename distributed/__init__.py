"""The Ray runtime: thin actors around worldloom's classes, and the coordinator that drives them."""
