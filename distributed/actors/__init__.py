"""The Ray actors: thin shells around plain classes, which know nothing of Ray."""
