"""The models that answer: who offers them, how they are reached, and what counts as an answer."""
