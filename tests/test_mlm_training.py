"""Stage I as a run: what it computes, what it says, when it stops, and that it goes on where it was killed."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, tiny_config
from mlm_runs import (  # noqa: F401  pytest finds the fixture by name
    RECIPES,
    WORKERS,
    assert_same_weights,
    log,
    recipe,
    undisturbed_run,
)
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, TrainerControl, TrainerState, TrainingArguments

from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM
from training import mlm
from training.masking import WholeWordMaskingCollator
from training.monitor import Monitor, device_peak, training_flops
from training.packing import Progress, Reader, Report, Tally
from training.recipe import MLMRecipe, RecipeError, Source, accumulation_steps, command_line, load_recipe, save_recipe
from training.run import (
    TrainingDiverged,
    check_data,
    checkpoints,
    exit_on_recipe_error,
    files_read,
    is_whole,
    leave_behind,
    mark_whole,
    resume_checkpoint,
)
from training.sources import open_tokenizer


def test_the_log_says_what_was_trained_on(run):
    entries = log(run)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for previous, entry in zip([{"tokens": 0}, *steps], steps, strict=False):
        # three batches of at most 4 x 32 tokens; the next sequence would not have fitted
        assert 3 * 96 < entry["tokens"] - previous["tokens"] <= 3 * 128
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["mfu"] < 10
        assert 0 <= entry["padding_share"] < 0.5
        assert entry["lost_share"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"] + 0.5
    end = next(entry for entry in entries if "train_loss" in entry)
    assert end["data_tokens_kept"] == end["data_tokens_read"] == steps[-1]["tokens"] - 2 * end["data_sequences"]
    assert end["data_tokens_lost"] == 0
    state = json.loads((run / "checkpoint-6" / "data-process0.json").read_text())
    assert state["total"]["tokens"] == steps[-1]["tokens"]
    assert [batches for batches, _ in state["own"].values()] == [9, 9]
    assert entries[-1]["eval_masked_tokens"] > 10


def test_mfu_is_the_models_work_over_the_peak(run):
    entries = [entry for entry in log(run) if "mfu" in entry]
    config = JinaBertConfig(**recipe(run).model)
    # All rows are nearly full: 32 tokens, 30 % of them predicted. The measured window has its own lengths.
    tokens = entries[1]["tokens"] - entries[0]["tokens"]
    estimate = training_flops(config, Tally(tokens // 32, tokens, tokens, tokens * 32, int(0.28 * tokens), 0))
    rate = entries[1]["tokens_per_second"] / tokens * estimate
    assert entries[1]["mfu"] == pytest.approx(rate / 1e9, rel=0.3)


@pytest.mark.parametrize(
    ("name", "half", "peak"),
    [("NVIDIA H100 80GB HBM3", True, 989), ("NVIDIA H100 PCIe", True, 756), ("NVIDIA L40S", True, 362),
     ("NVIDIA H100 80GB HBM3", False, None), ("Another GPU", True, None)],
)  # fmt: skip
def test_the_peak_of_a_known_gpu_needs_no_recipe(monkeypatch, name, half, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(SimpleNamespace(device=torch.device("cuda"), bf16=half, fp16=False)) == peak
    assert device_peak(SimpleNamespace(device=torch.device("cpu"), bf16=half, fp16=False)) is None


@pytest.mark.parametrize("architecture", ["jina_bert", "bert"])
def test_flops_are_those_of_torchs_counter(architecture):
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    if architecture == "bert":
        from training.control import SparseBertForMaskedLM

        model = SparseBertForMaskedLM(BertConfig(vocab_size=700, attn_implementation="eager", **shape))
    else:
        model = JinaBertForMaskedLM(tiny_config(vocab_size=700, sparse_prediction=True, **shape))
        model.set_attn_implementation("eager")
    ids = torch.randint(1, 700, (3, 20))
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    masked = int((labels != -100).sum())
    # Forward in evaluation mode: nothing is computed twice there. The backward pass of a product are two products.
    # With gradients, or the products are oneDNN's, which the counter does not know.
    with FlopCounterMode(display=False) as counter:
        model.eval()(**inputs)
    tally = Tally(sequences=3, tokens=60, positions=60, pairs=3 * 400, masked=masked)
    assert 3 * counter.get_total_flops() == pytest.approx(training_flops(model.config, tally), rel=0.01)


def test_a_sequence_in_a_packed_batch_trains_as_it_does_alone(tokenizer):
    """Loss and gradients: nothing attends across rows, and padding takes no part."""
    torch.manual_seed(0)
    model = JinaBertForMaskedLM(tiny_config(vocab_size=30528, sparse_prediction=True)).train()
    lines = (REPOSITORY / "tests" / "data" / "corpus.jsonl").read_text().splitlines()[:5]
    texts = [json.loads(line)["text"][:length] for line, length in zip(lines, (40, 900, 200, 7, 300), strict=True)]
    batch = WholeWordMaskingCollator(tokenizer)([{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]])
    count = int((batch["labels"] != -100).sum())

    def loss_and_gradients(rows: list[dict]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        losses = [model(**inputs, num_items_in_batch=count).loss for inputs in rows]
        sum(losses).backward()
        return sum(losses).item(), [parameter.grad.clone() for parameter in model.parameters()]

    alone = []
    for row in range(len(texts)):
        length = int(batch["attention_mask"][row].sum())
        alone.append({name: tensor[row : row + 1, :length] for name, tensor in batch.items()})
    expected, gradients = loss_and_gradients(alone)
    found, together = loss_and_gradients([batch])
    assert found == pytest.approx(expected, rel=1e-6)
    for a, b in zip(gradients, together, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_without_the_datas_position_reads_them_again(run, tmp_path, caplog):
    """As the checkpoints of versions before it was kept."""
    old = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", old)
    for name in ("data-process0.json", "complete.json"):
        (old / name).unlink()
    with caplog.at_level("WARNING"):
        final = mlm.train(recipe(tmp_path / "run", *WORKERS), resume=str(old))
    assert "reading those of 4 steps again" in caplog.text
    assert_same_weights(run / "final", final)


def test_resuming_a_finished_run_trains_no_further(run, tmp_path):
    final = mlm.train(recipe(tmp_path, *WORKERS), resume=str(run / "checkpoint-6"))
    assert_same_weights(run / "final", final)
    assert not any("loss" in entry for entry in log(tmp_path))
    assert log(tmp_path)[-1]["eval_accuracy"] == log(run)[-1]["eval_accuracy"]


def test_whole_checkpoints(tmp_path):
    def checkpoint(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        for name in ("trainer_state.json", "deep/weights.bin"):
            (folder / name).write_text("x" * step)
        return folder

    for step in (9, 10, 100):
        mark_whole(checkpoint(step))
    assert resume_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100" / "deep" / "weights.bin").write_text("short")  # a file that was cut off
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()  # deleting it had begun
    assert resume_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "complete.json").write_text('{"trainer')
    assert resume_checkpoint(str(tmp_path), True) is None  # killed before the first was whole: it begins
    with pytest.raises(RecipeError, match=r"checkpoint-100 is not whole"):
        resume_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-100"))
    with pytest.raises(RecipeError, match="there is no checkpoint in"):
        resume_checkpoint(str(tmp_path / "elsewhere"), True)
    old = checkpoint(50)
    (old / "recipe.yaml").touch()  # versions without the list wrote the recipe last
    assert resume_checkpoint(str(tmp_path), True) == str(old)


def test_a_run_that_went_back_goes_on_with_what_it_trained_then(run, tmp_path, caplog):
    """From step 4 once more, killed there: `--resume` takes its step 4 up, not step 6 of the run that was left."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("final"))
    left = (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes()
    once_more = [*WORKERS, "training.learning_rate=5e-3"]
    mlm.train(recipe(tmp_path, *once_more, "training.max_steps=5"), resume=str(tmp_path / "checkpoint-4"))
    assert "now left-checkpoint-6" in caplog.text
    assert (tmp_path / "left-checkpoint-6" / "model.safetensors").read_bytes() == left
    assert resume_checkpoint(str(tmp_path), True) in map(str, tmp_path.glob("checkpoint-[45]"))
    leave_behind(str(tmp_path), 2)
    assert not list(tmp_path.glob("checkpoint-[456]"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shuffle_buffer=9", "shuffle_buffer=50, the recipe has 9"),
        ("training.seed=7", "training.seed=[0-9]+, the recipe has 7"),
        ("max_length=40", "max_length=[0-9]+, the recipe has 40"),
    ],
)
def test_a_place_in_other_data_is_refused(run, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        mlm.train(recipe(tmp_path, *WORKERS, change), resume=str(run / "checkpoint-4"))


def test_a_place_in_other_files_is_refused(tmp_path):
    """`datasets` knows a place by the number of the file."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "c"):
        (tmp_path / "texts" / f"{name}.jsonl").write_text(json.dumps({"text": f"some words of {name}"}))
    mine = recipe(tmp_path, f"data_dir={tmp_path}")
    mine.sources = [Source(name="mine", path="texts/*.jsonl", weight=2.0), Source(name="more", path="texts/a.jsonl")]
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    save_recipe(mine, checkpoint)
    (checkpoint / "data-files.json").write_text(json.dumps(files_read(mine)))
    check_data(str(checkpoint), mine)
    (tmp_path / "texts").rename(tmp_path / "moved")
    mine.sources[0].path, mine.sources[1].path = "moved/*.jsonl", "moved/a.jsonl"
    check_data(str(checkpoint), mine)
    mine.sources[0].weight = 1.0  # the shuffle buffer would be filled by other draws
    with pytest.raises(RecipeError, match=r"sources\.mine\.weight=2\.0, the recipe has 1\.0"):
        check_data(str(checkpoint), mine)
    mine.sources[0].weight = 2.0
    (tmp_path / "moved" / "b.jsonl").write_text(json.dumps({"text": "new"}))
    with pytest.raises(RecipeError, match=r"source mine was read from 2 files and has 3 now \(other ones: b\.jsonl\)"):
        check_data(str(checkpoint), mine)


@pytest.mark.parametrize("field", ["data_seed=1", "dataloader_drop_last=true", "auto_find_batch_size=true"])
def test_fields_that_would_do_nothing_are_refused(tmp_path, field):
    with pytest.raises(RecipeError, match=f"training.{field.split('=')[0]} has no effect in stage I"):
        mlm.stage_arguments(recipe(tmp_path, f"training.{field}"))


def test_changed_steps_are_those_of_the_recipe(run, tmp_path):
    """The Trainer alone would go on with the steps of the checkpoint."""
    mlm.train(recipe(tmp_path, *WORKERS, "training.logging_steps=2"), resume=str(run / "checkpoint-2"))
    assert [entry["step"] for entry in log(tmp_path) if "loss" in entry] == [4, 6]


def test_all_held_out_parts_are_evaluated(tmp_path):
    """`heldout` alone would fill what is asked for; a source that ends is not begun again."""
    for name in ("a", "b", "c"):
        rows = [json.dumps({"text": f"{name} {number} word"}) for number in range(3 if name == "a" else 200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    mine = recipe(tmp_path, f"data_dir={tmp_path}", "heldout_sequences=40")
    mine.heldout = [Source(name=name, path=f"{name}.jsonl", weight=weight) for name, weight in (("a", 9), ("b", 1))]
    mine.sources = [Source(name="c", path="c.jsonl", heldout_share=0.5)]
    tokenizer = open_tokenizer(mine.tokenizer)
    found = mlm.heldout_sequences(mine, tokenizer, mlm.stage_arguments(mine))
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in found]
    assert len(texts) == len(set(texts)) == 40
    assert [text[0] for text in texts].count("c") == 20
    assert [text[0] for text in texts].count("a") == 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """A learning rate that overflows the weights in step 2 (in step 1 it is 0): that step is not saved."""
    broken = recipe(tmp_path, "training.learning_rate=1e38", "training.save_steps=1", "training.max_grad_norm=0")
    with pytest.raises(TrainingDiverged) as stopped:
        mlm.train(broken)
    message = str(stopped.value)
    for part in (
        "step 2, process 0: the weights are not finite",
        "step 1: loss 10.",
        "rate 1e+38",
        "facts (",
        "--resume",
    ):
        assert part in message, message
    assert not (tmp_path / "final").exists()
    last = checkpoints(str(tmp_path))[0]
    assert (last.name, is_whole(last)) == ("checkpoint-1", True)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "model.safetensors").values())
    assert "stopped" in log(tmp_path)[-1]


class Arguments:
    device = torch.device("cpu")
    fp16 = False


def monitor_with(losses: list[float], **changes) -> Monitor:
    monitor = Monitor(
        tiny_config(),
        recipe=MLMRecipe(**changes),
        reader=Reader(),
        progress=Progress.after(0, Reader()),
        total=Tally(),
    )
    state = TrainerState(max_steps=1000)
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        monitor.add_report(Report(0, step, {}, Tally(1, 8, 8, 64, 2, 0), {"books": 1}))
        monitor.add_loss(torch.tensor(loss))
        monitor.on_step_end(Arguments(), state, TrainerControl())
    return monitor


def test_a_rising_loss_stops_the_run():
    falling = [8 * 0.98**step + 2 for step in range(300)]
    monitor_with(falling + [4.0] * 5)  # a few odd batches are no divergence
    with pytest.raises(TrainingDiverged, match=r"running mean of the loss rose from 2\.\d+ to [34]\.\d+"):
        monitor_with(falling + [4.0] * 200)
    monitor_with(falling + [4.0] * 200, max_loss_rise=None)
    monitor_with(falling + [2.9] * 200)


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_at_once():
    for losses in ([10.0, float("nan")], [10.0, float("inf")]):
        with pytest.raises(
            TrainingDiverged, match=r"step 2, process 0: the loss is (nan|inf). This process's own batches"
        ):
            monitor_with([*losses, 10.0])
    monitor = monitor_with([10.0])
    monitor.grad_norm = float("inf")
    state = TrainerState(max_steps=1000, global_step=2)
    with pytest.raises(TrainingDiverged, match="the gradient norm is inf"):
        monitor.on_step_end(Arguments(), state, TrainerControl())
    half = Arguments()
    half.fp16 = True  # the loss scale is being found: that step was skipped
    monitor.on_step_end(half, state, TrainerControl())


@pytest.mark.parametrize(
    ("words", "resume", "overrides"),
    [
        (["a=1"], None, ["a=1"]),
        (["--resume", "a=1", "b=2"], True, ["a=1", "b=2"]),
        (["--resume", "runs/checkpoint-5", "a=1"], "runs/checkpoint-5", ["a=1"]),
        (["a=1", "--resume"], True, ["a=1"]),
    ],
)
def test_an_override_after_resume_is_no_checkpoint(monkeypatch, words, resume, overrides):
    monkeypatch.setattr(sys, "argv", ["mlm", "--config", "x.yaml", *words])
    arguments = command_line("")
    assert (arguments.resume, arguments.overrides) == (resume, overrides)


def test_the_exit_status_says_what_happened(capsys):
    def raises(error):
        def main():
            raise error

        return main

    from_a_worker = RecipeError("Caught it in worker 0.\nOriginal Traceback\ntraining.recipe.RecipeError: wrong\n")
    for error, status, message in (
        (RecipeError("wrong"), 2, "error: wrong\n"),
        (from_a_worker, 2, "error: wrong\n"),
        (TrainingDiverged("nan"), 1, "\nstopped: nan\n"),
    ):
        with pytest.raises(SystemExit) as left:
            exit_on_recipe_error(raises(error))
        assert left.value.code == status
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.save_total_limit=1"], "save_total_limit=1"),
        (["training.torch_compile=true"], "set compile: true"),
        (["global_batch_size=6"], r"global_batch_size=6 is not a multiple of 4: .*=4 on 1 processes"),
        (["training.ignore_data_skip=true"], "ignore_data_skip is decided by this stage"),
        (["shuffle_buffer=0"], "shuffle_buffer=0 is below 1"),
        (["max_length=2"], "max_length=2 leaves no room"),
        (["heldout_sequences=0"], "heldout: no sequences"),
        (["training.report_to=nothing"], "report_to: nothing is none of .*tensorboard"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        mlm.train(recipe(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("field", "package"),
    [
        ("report_to=tensorboard", "tensorboard"),
        ("report_to=wandb", "wandb"),
        ("report_to=[tensorboard,wandb]", "wandb"),
        ("deepspeed=training/deepspeed/zero1.json", "deepspeed"),
    ],
)
def test_optional_packages_are_named(tmp_path, monkeypatch, field, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith(package) else find(name, *rest)
    )
    with pytest.raises(RecipeError, match=rf"{package} is not installed; pip install -e") as error:
        mlm.train(recipe(tmp_path, f"training.{field}"))
    assert "\n" not in str(error.value)


def test_tensorboard_gets_the_log(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    mlm.train(recipe(tmp_path / "run", "training.report_to=tensorboard", "training.max_steps=2"))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    for tag in ("train/loss", "train/grad_norm", "train/tokens", "eval/accuracy"):
        name = tag.removeprefix("train/").replace("/", "_")
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx({e["step"]: e[name] for e in log(tmp_path / "run") if name in e}, rel=1e-6), name


def test_the_global_batch():
    def steps(processes: int, **changes) -> int:
        return accumulation_steps(MLMRecipe(**changes), processes)

    assert steps(8, global_batch_size=4096, training={"per_device_train_batch_size": 128}) == 4
    assert steps(1, global_batch_size=4096, training={"per_device_train_batch_size": 32}) == 128
    assert steps(8, training={"per_device_train_batch_size": 128}) == 1
    assert steps(8, global_batch_size=4096, training={"gradient_accumulation_steps": 3}) == 3
    with pytest.raises(RecipeError, match=r"not a multiple of 896: training.per_device_train_batch_size=128 on 7"):
        steps(7, global_batch_size=4096, training={"per_device_train_batch_size": 128})


@pytest.mark.parametrize(("size", "learning_rate"), [("small", 1e-3), ("base", 6e-4), ("large", 4e-4)])
def test_the_recipes_are_the_papers(size, learning_rate):
    paper = load_recipe(MLMRecipe, RECIPES / f"{size}-mlm.yaml")
    assert (paper.max_length, paper.long_documents, paper.mlm_probability) == (512, "cut", 0.3)
    assert accumulation_steps(paper, 8) * 8 * paper.training["per_device_train_batch_size"] == 4096
    assert [(source.hub, source.hub_config, source.split) for source in [*paper.sources, *paper.heldout]] == [
        ("allenai/c4", "en", "train"),
        ("allenai/c4", "en", "validation"),
    ]
    arguments = TrainingArguments(output_dir="x", **{**paper.training, "use_cpu": True, "bf16": False})
    assert (arguments.max_steps, arguments.warmup_steps, arguments.lr_scheduler_type) == (100_000, 10_000, "linear")
    assert (arguments.learning_rate, arguments.weight_decay) == (learning_rate, 0.01)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.98, 1e-6)
    config = JinaBertConfig(**paper.model)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.initializer_range) == (
        0.1,
        0,
        0.02,
    )


@pytest.mark.slow
def test_the_attention_of_a_recipe(tmp_path, tokenizer):
    assert mlm.build_model(recipe(tmp_path), tokenizer).config._attn_implementation == "sdpa"
    for name in ("eager", "flex_attention"):
        model = mlm.build_model(recipe(tmp_path, f"attn_implementation={name}"), tokenizer)
        assert model.bert.config._attn_implementation == name
    with pytest.raises(RecipeError, match="attn_implementation='nothing'"):
        mlm.build_model(recipe(tmp_path, "attn_implementation=nothing"), tokenizer)


def test_compiled_layers_train_alike(run, tmp_path, monkeypatch):
    compiled = []
    compile_module = torch.nn.Module.compile

    def compile_without_a_compiler(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    mlm.train(recipe(tmp_path, "compile=true", "training.max_steps=2", *WORKERS))
    assert compiled == ["JinaBertEncoder"]
    losses = [[entry["loss"] for entry in log(folder) if "loss" in entry][:1] for folder in (tmp_path, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.compiler.reset()
