"""The names that `import rwkv_peft as rp` offers a program: models to run and train, adapters to save and merge."""
