"""Where sessions live: implementations of ``app.ports.SessionStore``."""
