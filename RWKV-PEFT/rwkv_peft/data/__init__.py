"""Turns text files into exact, resumable batches: tokenizer, binidx files, samples, batches."""
