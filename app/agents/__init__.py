"""Live agents: AutoGen's ``AssistantAgent`` behind the words of the domain."""
