"""Text from a model.

sampling     from logits to a token
tokens       one token after the other: generate and stream, of tensors
completion   texts: several of each prompt, of any lengths, with stops and log-probabilities
beam         the likeliest texts
stops        text of tokens as they come
"""
