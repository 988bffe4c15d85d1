"""Stage I on several processes: two gloo processes are one process, sharded or not, and the launch files are sound."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import REPOSITORY, SHIPPED
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from training import mlm
from training.mlm import keep_float32
from training.recipe import MLMRecipe, RecipeError, load_recipe

RECIPES = REPOSITORY / "training" / "recipes"
OVERRIDES = [
    f"tokenizer={SHIPPED}", f"data_dir={REPOSITORY / 'tests' / 'data'}",
    "sources=[{name: facts, path: corpus.jsonl, heldout_share: 0.2}]", "heldout=[]", "heldout_sequences=16",
    "model={vocab_size: 30528, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24}",
    "model.hidden_dropout_prob=0.0", "max_length=32", "shuffle_buffer=50", "global_batch_size=16",
    "training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=4", "training.max_steps=4",
    "training.save_steps=2", "training.learning_rate=0.003", "training.logging_steps=1", "training.warmup_steps=1",
    "training.disable_tqdm=true", "training.use_cpu=true",
]  # fmt: skip


def torchrun(*arguments: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *launch, *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=280, env=environment,
    )  # fmt: skip


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_close_weights(folder, other, tolerance: float):
    expected, found = (load_file(Path(path) / "model.safetensors") for path in (folder, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def recipe(output, *overrides) -> MLMRecipe:
    return load_recipe(MLMRecipe, RECIPES / "tiny-mlm.yaml", [f"output_dir={output}", *OVERRIDES, *overrides])


def test_two_processes_are_one(tmp_path):
    """The same global batch: one process with two workers, or two processes, that accumulate half as often."""
    config = str(RECIPES / "tiny-mlm.yaml")
    process = torchrun("-m", "training.mlm", "--config", config, f"output_dir={tmp_path / 'two'}", *OVERRIDES)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("stage I finished") == 1
    one = mlm.train(recipe(tmp_path / "one", "training.dataloader_num_workers=2"))
    assert_close_weights(one, tmp_path / "two" / "final", 1e-6)
    entries, expected = log(tmp_path / "two"), log(tmp_path / "one")
    assert len(entries) == len(expected)
    for entry, wanted in zip(entries, expected, strict=True):
        assert entry.keys() == wanted.keys()
        for name in ("loss", "eval_loss", "eval_accuracy", "grad_norm"):
            assert entry.get(name, 0) == pytest.approx(wanted.get(name, 0), rel=1e-6), name
        for name in ("tokens", "padding_share", "data_tokens_kept", "eval_masked_tokens"):
            assert entry.get(name) == wanted.get(name), name
    written = json.loads((tmp_path / "two" / "checkpoint-2" / "complete.json").read_text())
    assert {"data-process0.json", "data-process1.json", "rng_state_0.pth", "rng_state_1.pth"} <= set(written)

    # One process with two workers goes on from the checkpoint of two processes.
    resumed = mlm.train(
        recipe(tmp_path / "resumed", "training.dataloader_num_workers=2"),
        resume=str(tmp_path / "two" / "checkpoint-2"),
    )
    assert_close_weights(one, resumed, 1e-6)
    with pytest.raises(RecipeError, match="read by 2 readers"):
        mlm.train(recipe(tmp_path / "other"), resume=str(tmp_path / "two" / "checkpoint-2"))


SHARDED = """
import sys
from types import SimpleNamespace
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from training.mlm import hold_parameters_once, save_plain

torch.distributed.init_process_group("gloo")
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
config = JinaBertConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    hidden_dropout_prob=0.0, sparse_prediction=True,
)
model = JinaBertForMaskedLM(config).train()
if ranks > 1:
    hold_parameters_once(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["JinaBertLayer"],
        reshard_after_forward=True, state_dict_type="FULL_STATE_DICT", cpu_offload=False,
    )
    model = fsdp2_prepare_model(
        SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", torch_device_mesh=None,
            device=torch.device("cpu"), is_main_process=rank == 0,
        ),
        model,
    )
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
generator = torch.Generator().manual_seed(1)
for step in range(3):
    ids = torch.randint(5, 300, (4, 20), generator=generator)
    mask = (torch.arange(20) < torch.tensor([[20], [7], [13], [20]])).long()
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.3) & (mask == 1), ids, -100)
    count = (labels != -100).sum()
    own = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    loss = model(ids[own], mask[own], labels=labels[own], num_items_in_batch=count).loss * ranks
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = model.state_dict()
if ranks > 1:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    save_plain(JinaBertForMaskedLM, model.config, state, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_train_alike(tmp_path):
    """FSDP2 as accelerate wraps the model; accelerate itself refuses FSDP on the CPU, so its wrapping is called."""
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    for processes, name in ((2, "two"), (1, "one")):
        process = torchrun(str(program), str(tmp_path / name), processes=processes, PYTHONPATH=str(REPOSITORY))
        assert process.returncode == 0, process.stderr[-3000:]
    assert_close_weights(tmp_path / "one", tmp_path / "two", 1e-5)
    code = {path.name for path in (tmp_path / "two").glob("*.py")}
    assert "modeling_jina_bert.py" in code, "FSDP's own class would have been saved"
    assert (
        type(AutoModelForMaskedLM.from_pretrained(tmp_path / "two", trust_remote_code=True)).__name__
        == "JinaBertForMaskedLM"
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_launch_files_are_read_by_accelerate(name, monkeypatch):
    path = REPOSITORY / "training" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines, config.use_cpu) == (8, 1, False)
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[name]
    if name == "fsdp":
        arguments = launch_command_parser().parse_args(["--config_file", str(path), "x.py"])
        arguments.use_fsdp, arguments.mixed_precision, arguments.dynamo_backend = True, "no", "no"
        for key, value in {**vars(config), **config.fsdp_config}.items():
            setattr(arguments, key, value)
        for key, value in prepare_multi_gpu_env(arguments).items():
            if key.startswith("FSDP_"):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.transformer_cls_names_to_wrap) == (2, ["JinaBertLayer"])
        assert plugin.reshard_after_forward
        assert not plugin.activation_checkpointing  # it would draw other dropout masks in the recomputation
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def test_fsdp_adds_up_gradients_in_float32_and_does_not_round_the_loss():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    keep_float32(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert "keep_float32(self.accelerator.state.fsdp_plugin)" in inspect.getsource(mlm.MLMTrainer.__init__)


class FilledConfig(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """The configuration as the Trainer fills it; transformers derives it from accelerate's only beside deepspeed."""

    def __init__(self, path: Path):
        HfDeepSpeedConfig.__init__(self, str(path))
        self._dtype, self.mismatches = None, []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", ["small", "base", "large"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_recipe_fills_the_deepspeed_files(stage, size, precision, tmp_path, monkeypatch):
    """Without deepspeed installed: every "auto" becomes what the recipe says, and nothing contradicts it."""
    config = FilledConfig(REPOSITORY / "training" / "deepspeed" / f"zero{stage}.json")
    assert config.get_value("zero_optimization.stage") == stage
    monkeypatch.setenv("WORLD_SIZE", "8")  # what stage_arguments divides the global batch by
    of = load_recipe(MLMRecipe, RECIPES / f"{size}-mlm.yaml", [f"output_dir={tmp_path}", "training.bf16=false"])
    arguments = mlm.stage_arguments(of)
    setattr(arguments, precision, True)  # a CPU refuses fp16 before that
    config.trainer_config_process(SimpleNamespace(**{**vars(arguments), "world_size": 8}))
    config.trainer_config_finalize(arguments, SimpleNamespace(config=None), num_training_steps=arguments.max_steps)
    assert config.mismatches == []
    assert '"auto"' not in json.dumps(config.config)
    batch = of.training["per_device_train_batch_size"]
    assert config.config["train_micro_batch_size_per_gpu"] == batch
    assert config.config["gradient_accumulation_steps"] * batch * 8 == config.config["train_batch_size"] == 4096
    assert config.config["gradient_clipping"] == arguments.max_grad_norm
    assert (config.config["bf16"]["enabled"], config.config["fp16"]["enabled"]) == (
        precision == "bf16",
        precision == "fp16",
    )
    assert config.dtype() == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # The optimiser and the schedule are those of the recipe, made by the Trainer.
    assert not {"optimizer", "scheduler"} & config.config.keys()


def test_a_deepspeed_file_that_contradicts_the_recipe_would_be_seen(tmp_path):
    path = tmp_path / "zero.json"
    content = json.loads((REPOSITORY / "training" / "deepspeed" / "zero1.json").read_text())
    path.write_text(json.dumps({**content, "gradient_accumulation_steps": 3}))
    config = FilledConfig(path)
    arguments = mlm.stage_arguments(recipe(tmp_path))
    config.trainer_config_process(arguments)
    with pytest.raises(ValueError, match="ds gradient_accumulation_steps=3 vs hf gradient_accumulation_steps=4"):
        config.trainer_config_finalize(arguments, None, num_training_steps=4)
