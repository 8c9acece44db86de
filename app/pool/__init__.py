"""The heart: who is live, who is leased, who must go.

``limits``, ``slot``, ``eviction`` and ``table`` decide, in plain calls without
waiting. ``live``, ``lease`` and ``manager`` are the shell that does what was decided.
"""
