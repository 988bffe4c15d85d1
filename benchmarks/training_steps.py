"""Optimizer steps of stages I and II on this CPU, beside another checkout of the project and in half precision.

    git worktree add ../first 428c29b
    python -m benchmarks.training_steps --checkout first=../first --output benchmarks/results/training-steps-cpu

A step is forward, loss, backward, clipping and fused AdamW on the shape of tiny: stage I on 32 sequences of up to 128
tokens, 30 % of them predicted; stage II on 2 x 192 texts whose lengths are spread from 8 to 96 tokens, InfoNCE on
normalised means. Token ids are random, lengths and batches the same for all.

Laws: a system is a process of its own that imports the model of its checkout; the systems take turns in every round,
one computing at a time; a figure is the median of the rounds, a ratio the median of the ratios within a round.
COST: rounds x systems x (start of a process and `STEPS` + 1 steps): two minutes a round of three systems.
NOTE: what reads, masks and logs is not in a step; the logs of the runs have tokens a second with all of it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .machine import describe_machine, physical_cores
from .results import BenchmarkError, write_results

STEPS = 4
"""Timed steps of a process; before them one that is not timed."""
_HERE = Path(__file__).parent.parent

_WORKER = """
import json, sys, time
import torch
from modeling_jina_bert import JinaBertConfig, JinaBertForMaskedLM, JinaBertModel

half, steps = sys.argv[1] == "bfloat16", int(sys.argv[2])
try:
    from training.heap import keep_freed_memory  # what our training does first; other checkouts may not have it
    keep_freed_memory()
except ImportError:
    pass
torch.manual_seed(0)
shape = dict(vocab_size=30528, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
             hidden_dropout_prob=0.0, sparse_prediction=True)
rng = torch.Generator().manual_seed(1)


def batch(rows, lengths):
    lengths = torch.as_tensor(lengths)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return dict(input_ids=torch.randint(5, 30000, mask.shape, generator=rng) * mask, attention_mask=mask)


def masked_words(model, inputs):
    return model(**inputs).loss


def pairs(model, inputs):
    vectors = []
    for column in inputs:
        states, mask = model(**column).last_hidden_state, column["attention_mask"][:, :, None]
        mean = (states.float() * mask).sum(1) / mask.sum(1)
        vectors.append(torch.nn.functional.normalize(mean, dim=1))
    scores = vectors[0] @ vectors[1].T * 20
    target = torch.arange(len(scores))
    return sum(torch.nn.functional.cross_entropy(each, target) for each in (scores, scores.T)) / 2


first = batch(32, torch.randint(100, 129, (32,), generator=rng))
chosen = (torch.rand(first["input_ids"].shape, generator=rng) < 0.3) & (first["attention_mask"] == 1)
first["labels"] = torch.where(chosen, first["input_ids"], -100)
short, long = (torch.randint(low, high, (192,), generator=rng) for low, high in ((8, 24), (24, 97)))
second = [batch(192, short), batch(192, long)]
stages = {"I": (JinaBertForMaskedLM, masked_words, first, int(first["attention_mask"].sum())),
          "II": (JinaBertModel, pairs, second, sum(int(x["attention_mask"].sum()) for x in second))}
found = {}
for name, (cls, loss_of, inputs, tokens) in stages.items():
    model = cls(JinaBertConfig(**shape)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters()], lr=1e-4, fused=True)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    found[name] = {"seconds": seconds[1:], "tokens": tokens, "loss": loss.item()}
print(json.dumps(found))
"""


@dataclass
class System:
    """What takes its turn: a checkout and a precision."""

    name: str
    checkout: Path
    precision: str  # "float32" or "bfloat16"


def systems(checkouts: list[str]) -> list[System]:
    """This checkout in both precisions, then the others in float32, which is what they train in.

    Args:
        checkouts: NAME=FOLDER each.

    Raises:
        BenchmarkError: Not of that form, or no checkout of this project.
    """
    found = [System("ours", _HERE, "float32"), System("ours, bfloat16", _HERE, "bfloat16")]
    for text in checkouts:
        name, _, folder = text.partition("=")
        if not (name and folder) or not (Path(folder) / "modeling_jina_bert" / "modeling_jina_bert.py").is_file():
            raise BenchmarkError(f"--checkout {text}: not NAME=FOLDER with a modeling_jina_bert in the folder.")
        found.append(System(name, Path(folder).resolve(), "float32"))
    return found


def run(system: System, threads: int) -> dict:
    """The steps of one process: stage -> `seconds` (one a step), `tokens` of a step, last `loss`.

    Raises:
        BenchmarkError: The process failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(system.checkout), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        [sys.executable, "-c", _WORKER, system.precision, str(STEPS)],
        cwd=system.checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"]
        raise BenchmarkError(f"{system.name}: {said[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def table(records: list[dict], reference: str) -> str:
    """A row for each system and stage: tokens a second, and the ratio to the reference within the rounds."""
    rounds = {(r["system"], r["round"], r["stage"]): r["tokens"] / median(r["seconds"]) for r in records}
    names = list(dict.fromkeys(r["system"] for r in records))
    numbers = sorted({r["round"] for r in records})
    lines = [f"| system | stage I, tokens/s | of {reference} | stage II, tokens/s | of {reference} |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name in names:
        cells = []
        for stage in ("I", "II"):
            speeds = [rounds[name, number, stage] for number in numbers]
            ratios = [rounds[name, n, stage] / rounds[reference, n, stage] for n in numbers]
            cells += [f"{median(speeds):,.0f}", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="benchmarks.training_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", action="append", default=[], help="NAME=FOLDER of another one; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--output", type=Path, required=True, help="path without suffix; .json and .md are written")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.training_steps " + " ".join(sys.argv[1:])
    records: list[dict] = []
    document = {
        "command": command, "threads": arguments.threads, "machine": describe_machine(), "records": records,
    }  # fmt: skip
    markdown = ""
    try:
        taking_turns = systems(arguments.checkout)
        reference = taking_turns[-1].name if arguments.checkout else taking_turns[0].name
        for number in range(arguments.rounds):
            for system in taking_turns:
                for stage, found in run(system, arguments.threads).items():
                    records.append({"system": system.name, "round": number, "stage": stage, **found})
            write_results(_beside(arguments.output, ".json"), document)  # what is measured stays
            markdown = f"{(__doc__ or '').splitlines()[0]}\n\n{table(records, reference)}\n\n`{command}`\n"
            _beside(arguments.output, ".md").write_text(markdown, encoding="utf-8")
    except BenchmarkError as error:
        parser.exit(2, f"error: {error}\n")
    print(markdown)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


if __name__ == "__main__":
    main()
