"""Text from a model: how a token is chosen (sampling), and one after the other (tokens)."""
