"""Question sets, asking them of any OpenAI endpoint, scoring the replies, and saying whether a difference is real."""
