"""From text files to exact, resumable batches: tokenizer, binidx files, samples, batches."""
