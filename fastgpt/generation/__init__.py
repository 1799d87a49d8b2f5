"""Text from a model.

sampling     from logits to a token
tokens       one token after the other: generate and stream, of tensors
completion   texts: several of each prompt, of any lengths, with stops and log-probabilities
beam         the likeliest texts
speculative  several tokens at a time, by a draft
stops        text of tokens as they come
chat         a conversation, as fastgpt train has messages
show         the distribution of the next token
cli          the commands generate, chat and next
"""
