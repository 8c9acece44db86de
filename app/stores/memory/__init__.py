"""Sessions in plain dictionaries, for tests and for embedding."""
