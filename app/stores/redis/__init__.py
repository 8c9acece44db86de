"""The Redis store: many processes, one primary. Only this package says redis, and only when it is used."""
