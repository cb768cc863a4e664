"""Checks that peft's own Bone (0.14 to 0.18) gives the golden logits stored in adapter folders.

    python own_bone.py BASE_FOLDER ADAPTER_FOLDER…

Each adapter folder has a golden.npz with ids and adapted. rwkv_peft.hf is imported and must leave peft as it is.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

import rwkv_peft.hf  # noqa: F401

base, *folders = sys.argv[1:]
for folder in folders:
    golden = np.load(Path(folder) / "golden.npz")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    assert type(model.peft_config["default"]).__module__ == "peft.tuners.bone.config"
    assert any(type(module).__module__ == "peft.tuners.bone.layer" for module in model.modules())
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(golden["ids"])).logits
    torch.testing.assert_close(logits, torch.tensor(golden["adapted"]), atol=1e-4, rtol=1e-4)
