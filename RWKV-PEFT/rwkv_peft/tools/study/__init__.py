"""`rwkv-peft study`: a model asks and answers questions about a document, and learns to answer without it."""
