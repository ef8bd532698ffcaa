"""Trainers that people use, with an accelerated model: HF Trainer, DDP, FSDP1 and FSDP2 on gloo; stock's losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftkern

WORKER = Path(__file__).with_name("distributed_worker.py")
STRATEGIES = (
    "ddp", "fsdp2", "fsdp2, accelerated before", "fsdp2, adapters apart", "fsdp2, adapters apart, checkpointed",
    "fsdp1", "fsdp1, accelerated before", "fsdp1, PEFT's policy", "fsdp1, PEFT's policy, flat",
    "fsdp1, PEFT's policy, checkpointed",
)  # fmt: skip


class Examples(torch.utils.data.Dataset):
    """Random token sequences; each is its own label."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainer_with_accumulation_and_checkpointing(zoo, fused, tmp_path, precision):
    losses, gradients = [], []
    for accelerated in (False, True):
        model = zoo.build("llama", lora_bias=True)
        if accelerated:
            assert len(peftkern.accelerate(model).accelerated) == 12
        seen = []

        class Recording(zoo.transformers.Trainer):
            def training_step(self, *args, seen=seen, **kwargs):
                loss = super().training_step(*args, **kwargs)
                seen.append(loss.item())
                return loss

        arguments = zoo.transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            gradient_checkpointing=True, learning_rate=1e-3, use_cpu=True, bf16=precision == "bf16",
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, optim="sgd", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Recording(model=model, args=arguments, train_dataset=Examples())
        trainer.train()
        losses.append(seen)
        gradients.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
        if accelerated:
            trainer.save_model(str(tmp_path / "out"))
            assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    # 12 layers, 6 micro-batches, and once more each in the recomputed forward.
    assert len(fused) == 12 * 6 * 2 and len(losses[0]) == 6 and len(gradients[0]) == 3
    if precision == "fp32":
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert gradients[1] == pytest.approx(gradients[0], rel=1e-4)
    else:
        # Stock's own rounding (it takes the adapters to bf16 under autocast) is of this size; that ours is no
        # larger, gradients included, is shown in test_models.py.
        assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes on gloo says about every strategy."""
    command = [sys.executable, str(WORKER), str(tmp_path_factory.mktemp("gloo") / "store")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    processes = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err[-3000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_on_gloo(ranks, strategy):
    calls = 2 * 6 * (2 if "checkpointed" in strategy else 1)
    for result in (rank[strategy] for rank in ranks):
        stock, ours = result["stock"], result["ours"]
        assert len(stock["losses"]) == 2 and stock["losses"][0] != stock["losses"][-1]
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert len(stock["weights"]) >= 12 and ours["weights"] == pytest.approx(stock["weights"], rel=1e-5)
        assert stock["weights"] != pytest.approx(result["before"], rel=1e-4)
        # What the report said is what ran.
        assert result["accelerated"] == 6 and not result["skipped"]
        assert (result["fused"], result["stock calls"], result["reasons"]) == (calls, 0, {})
        assert not result["warnings"]
    # The gradients were averaged: both ranks hold the same weights, though they saw other data.
    first, second = (rank[strategy] for rank in ranks)
    assert first["ours"]["weights"] == second["ours"]["weights"]
    assert first["stock"]["losses"] != second["stock"]["losses"]


@pytest.mark.parametrize("strategy", ["fsdp1, PEFT's policy, hooked", "fsdp2, adapters apart, hooked"])
def test_adapters_apart_in_a_layer_that_falls_back(ranks, strategy):
    # A hook on lora_dropout that came after the report: PEFT's own forward runs as if it were alone.
    for result in (rank[strategy] for rank in ranks):
        assert result["ours"] == result["stock"] and result["accelerated"] == 6
        assert (result["fused"], result["stock calls"], len(result["reasons"])) == (0, 2 * 6, 6)
        (text,) = result["warnings"]
        assert "was reported as accelerated, but runs PEFT's own code: lora_dropout carries a hook" in text
