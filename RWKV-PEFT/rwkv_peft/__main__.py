"""`python -m rwkv_peft COMMAND …`; see commands.py."""

from .cli.commands import run

if __name__ == "__main__":
    run()
