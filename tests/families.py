"""The generations that compute in ways of their own, on which the laws of steps, objectives and files hold. RWKV-7a is
an RWKV-7 but for its feed-forward: its own tests, and those of every generation in tests/models, have it."""

from rwkv_peft.models import FAMILIES

DISTINCT = FAMILIES[:2]
