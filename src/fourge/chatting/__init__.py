"""A chat in the terminal: the conversation, who answers, and the loop between them."""
