"""Three steps of a LLaMA with Bone without DeepSpeed and under ZeRO-3; prints both traces of losses for every form.

Run by test_zero3.py in a process of its own: DeepSpeed changes torch for the whole process.
"""

import copy
import json

from zero3_process import join_job

join_job()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from rwkv_peft.hf import BoneConfig  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it takes a minute to compile

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def trace(model, ids, zero):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO_3)[0] if zero else model
    losses = []
    for _ in range(3):
        loss = engine(input_ids=ids, labels=ids).loss
        if zero:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    ids = torch.randint(0, 64, (2, 16))
    deepspeed.init_distributed("gloo")
    traces = {}
    for form in (True, "bat-in", "bat-out"):
        model = get_peft_model(base, BoneConfig(r=4, init_weights=form, target_modules="all-linear"))
        plain = trace(copy.deepcopy(model), ids, zero=False)
        traces[str(form)] = plain, trace(copy.deepcopy(model), ids, zero=True)
        base = model.unload()
    torch.distributed.destroy_process_group()
    print("TRACES " + json.dumps(traces))


if __name__ == "__main__":
    main()
