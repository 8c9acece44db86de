"""The face for other nodes of the same store: they prove that they are such, ask, and forward requests."""
