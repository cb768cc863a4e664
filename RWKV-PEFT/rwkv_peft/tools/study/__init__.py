"""`rwkv-peft study`: train a model to answer questions about a document without reading it."""
