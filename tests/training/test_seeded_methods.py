"""Methods whose file holds a seed in place of what it draws, through the commands that a user types: train, resume,
check, merge, unmerge, convert."""

import pytest
import torch

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from training.runs import rewound

METHODS = {
    "vera": ("vera", '{"r": 16, "d_initial": 0.2, "vera_seed": 7}', ()),
    "shira": ("shira", '{"entries": 8, "shira_seed": 7}', ("--lora_rank", "32")),
}


@pytest.mark.parametrize("peft, settings, lora", METHODS.values(), ids=METHODS)
def test_a_run_resumes_bitwise_and_what_it_trained_is_merged_and_taken_off(files, train, capsys, peft, settings, lora):
    def run(*words):
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    size = "rank 16" if peft == "vera" else "entries 8"
    flags = ("--peft", peft, "--peft_config", settings, "--lr_init", "0.03", "--lr_schedule", "constant")
    out, _ = train(f"whole-{peft}", *flags)
    assert f"training  {peft}, {size}: " in out
    parts = rewound(files / f"whole-{peft}", f"parts-{peft}")
    train(parts.name, *flags, "--resume")
    whole = files / f"whole-{peft}" / "adapter.safetensors"
    assert whole.read_bytes() == (parts / "adapter.safetensors").read_bytes()

    assert f"{peft}, {size}" in run("inspect", whole)
    base, merged, restored = (files / name for name in ("base.pth", f"{peft}-merged.pth", f"{peft}-restored.pth"))
    given = ("--bone_checkpoint", whole)
    run("merge", "--base_model", base, *given, "--output", merged, "--output_dtype", "fp32")
    out = run("check", "--base_model", base, *given, "--merged", merged)
    assert "each as base and adapter make it" in out
    run("merge", "--base_model", merged, *given, "--output", restored, "--unmerge")
    before, after, between = (torch.load(path) for path in (base, restored, merged))
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor.float(), rtol=0, atol=1e-6)
    assert sum(not torch.equal(between[key], tensor.float()) for key, tensor in before.items()) == 16
    out = run("convert", whole, files / f"{peft}-lora.safetensors", "--to", "lora", "--base_model", base, *lora)
    assert ("the same change, exactly" in out) == (peft == "vera")
    with pytest.raises(UserError, match=f"RWKV-PEFT has no {peft}"):
        main(["convert", str(whole), str(files / f"{peft}.pth")])
