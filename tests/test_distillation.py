"""Distillation: its losses against their definitions, what is taken from a teacher, and a run that resumes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHIPPED
from contrastive_runs import PAIRS, losses, recipe, start_folder, weights  # noqa: F401  pytest finds the fixture by name
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from torch.nn.functional import normalize, softmax

from training import contrastive
from training.contrastive import load_model
from training.distillation import (
    DistillationRecipe,
    distillation,
    distillation_loss,
    fitted_axes,
    principal_axes,
    take_word_embeddings,
    vector_loss,
)
from training.recipe import RecipeError


def distilled(start, output, *changes, resume=None) -> Path:
    student = ("training.learning_rate=0.003", f"teacher={SHIPPED}", f"cache_dir={output.parent / 'teacher'}")
    config = recipe("distillation", start, output, *student, *changes, schema=DistillationRecipe)
    return contrastive.train(config, resume=resume, objective=distillation)


def test_distillation_moves_towards_the_teacher_and_resumes(start, tmp_path, caplog):
    steps = ("training.max_steps=20", "training.save_steps=10", "training.per_device_train_batch_size=16")
    caplog.set_level("INFO")
    whole = distilled(start, tmp_path / "whole", *steps)
    assert "140 of 140 query texts to embed" in caplog.text
    assert "140 of 140 document texts to embed" in caplog.text
    found = losses(tmp_path / "whole")
    assert sum(found[step] for step in range(16, 21)) < 0.85 * sum(found[step] for step in range(1, 6))
    caplog.clear()
    resumed = distilled(start, tmp_path / "half", *steps, resume=str(tmp_path / "whole" / "checkpoint-10"))
    assert " 0 of 140 query texts to embed" in caplog.text
    assert " 0 of 140 document texts to embed" in caplog.text
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0, msg=name)


def test_texts_longer_than_the_teacher_reads(start, tmp_path, caplog):
    """Their windows are embedded, and the vectors are learnt; a window that is a text of its own is not read twice."""
    caplog.set_level("INFO")
    changes = ("teacher_windows=true", "teacher_max_length=8", "vector_weight=5", "training.max_steps=20")
    distilled(start, tmp_path / "windows", *changes, "training.per_device_train_batch_size=16")
    windows = int(re.search(r"of (\d+) document texts to embed", caplog.text)[1])
    assert windows > 2 * 140
    found = losses(tmp_path / "windows")
    assert sum(found[step] for step in range(16, 21)) < 0.9 * sum(found[step] for step in range(1, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mini_batch_tokens=100"], "distillation has none"),
        (["temperature=0"], "temperature > 0"),
        (["vector_weight=-1"], "vector_weight >= 0"),
        (["teacher_max_length=2"], "teacher_max_length >= 3"),
        (["teacher_max_length=0"], "teacher_max_length >= 3"),
        (["word_embeddings=true", "lora={r: 4}"], "word_embeddings=true changes the base"),
    ],
)
def test_what_distillation_cannot_do_is_refused(start, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        distilled(start, tmp_path / "other", *changes)


def test_distillation_runs_in_one_process(start):
    """Each of several would embed all texts, and compare those of its own rows alone."""
    arguments = SimpleNamespace(world_size=2, per_device_eval_batch_size=4)
    config = recipe("distillation", start, start, f"teacher={SHIPPED}", schema=DistillationRecipe)
    with pytest.raises(RecipeError, match="distillation runs in one process, not in 2"):
        distillation(config, None, {}, arguments)


def test_the_vectors_of_a_teacher_are_learnt(start, tmp_path):
    """What no similarity tells: after it, a text's vector is near the teacher's in the student's width."""
    steps = ("training.max_steps=40", "training.save_steps=40", "training.per_device_train_batch_size=16")
    texts = [row["positive"] for row in PAIRS]
    teacher = torch.from_numpy(SentenceTransformer(str(SHIPPED), trust_remote_code=True).encode(texts))
    axes = principal_axes(teacher, 32)
    loss = {}
    for weight in (0.0, 5.0):
        folder = distilled(start, tmp_path / str(weight), *steps, f"vector_weight={weight}")
        model = SentenceTransformer(str(folder), trust_remote_code=True)
        loss[weight] = vector_loss([torch.from_numpy(model.encode(texts))], [teacher], axes).item()
    assert loss[5.0] < 0.8 * loss[0.0]


def test_the_axes_keep_inner_products_and_the_vector_loss_is_the_cosine():
    generator = torch.Generator().manual_seed(1)
    plane = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    vectors = plane @ torch.randn(3, 7, generator=generator, dtype=torch.float64) + 2.0  # four dimensions of seven
    axes = principal_axes(vectors, 4)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4, dtype=torch.float64))
    taken = vectors @ axes
    torch.testing.assert_close(taken @ taken.T, vectors @ vectors.T)
    assert (principal_axes(vectors, 3) == axes[:, :3]).all()
    student = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (30, 10)]
    expected = 1 - torch.nn.functional.cosine_similarity(torch.cat(student), taken).mean()
    assert vector_loss(student, vectors.split([30, 10]), axes).item() == pytest.approx(expected.item(), rel=1e-12)


def test_fitted_axes_are_those_that_a_student_has_learnt():
    """Exact for a student with the teacher's vectors on principal axes; of a noisy one no others are nearer."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    learnt = principal_axes(vectors, 4)
    torch.testing.assert_close(fitted_axes(vectors, 3 * vectors @ learnt), learnt)
    student = vectors @ learnt + torch.randn(60, 4, generator=generator, dtype=torch.float64)
    axes = fitted_axes(vectors, student)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4, dtype=torch.float64))
    found = ((vectors @ axes) * student).sum()
    nearby = torch.linalg.qr(axes + 0.1 * torch.randn(20, 8, 4, generator=generator, dtype=torch.float64)).Q
    for other in (learnt, *nearby):
        assert ((vectors @ other) * student).sum() < found


def test_a_distilled_student_goes_on_with_the_axes_that_it_has(start, tmp_path):
    """On other texts: fitted axes begin where the first run ended, the principal ones of those texts do not."""
    steps = ("training.per_device_train_batch_size=16", "vector_weight=5")
    first = distilled(start, tmp_path / "first", *steps, "training.max_steps=40")
    others = (f"data_dir={start}", "sources=[{name: b, path: pairs-1.jsonl}]", "training.max_steps=1")
    loss = {}
    for axes in ("fitted", "principal"):
        distilled(first, tmp_path / axes, *steps, *others, f"axes={axes}")
        loss[axes] = losses(tmp_path / axes)[1]
    assert loss["fitted"] < 0.95 * loss["principal"], loss


def test_word_embeddings_of_the_teacher(start):
    """Their similarities come over, on fewer axes; the student's own tokens, its scale and its padding stay."""
    teacher = SentenceTransformer(str(SHIPPED), trust_remote_code=True)
    student = load_model(recipe("pairs", start, start / "unused", "max_length=16"))
    mine, theirs = (model[0].auto_model.get_input_embeddings().weight for model in (student, teacher))
    before, known = mine.detach().clone(), len(teacher.tokenizer)
    take_word_embeddings(student, teacher)
    centred = (theirs[:known] - theirs[:known].mean(dim=0)).detach()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (u[:, : mine.shape[1]] * s[: mine.shape[1]])[1:]
    found = mine.detach()[1:known]
    scale = before.std() / expected.std()
    sample = torch.randperm(known - 1, generator=torch.Generator().manual_seed(0))[:200]
    torch.testing.assert_close(
        found[sample] @ found[sample].T, expected[sample] @ expected[sample].T * scale**2, rtol=1e-2, atol=1e-4
    )
    assert (mine[0] == 0).all()
    assert torch.equal(mine[known:], before[known:])


def test_a_teacher_that_cannot_give_its_words_or_vectors_is_refused(start):
    student = load_model(recipe("pairs", start, start / "unused", "max_length=16"))
    narrow = load_model(recipe("pairs", start, start / "unused", "max_length=16"))
    narrow[0].auto_model.set_input_embeddings(torch.nn.Embedding(30528, 8))
    with pytest.raises(RecipeError, match="8 dimensions, the model's 32"):
        take_word_embeddings(student, narrow)
    other = load_model(recipe("pairs", start, start / "unused", "max_length=16"))
    other.tokenizer.add_tokens(["jinabert-token-of-its-own"])
    with pytest.raises(RecipeError, match="vocabulary"):
        take_word_embeddings(student, other)


def test_the_distillation_loss_is_that_of_sentence_transformers():
    temperature, generator = 0.3, torch.Generator().manual_seed(1)
    student, teacher = (
        [torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2)] for width in (6, 9)
    )

    def scores(anchors, documents):
        return normalize(anchors, dim=1) @ normalize(documents, dim=1).T

    def expected(anchors, documents, wanted) -> torch.Tensor:
        # Candidate k of row i is document i + k.
        shifted = [documents.roll(-k, 0) for k in range(5)]
        labels = torch.stack([wanted.roll(-k, 1).diagonal() for k in range(5)], dim=1)
        loss = DistillKLDivLoss(
            SentenceTransformer(modules=[torch.nn.Identity()]),
            similarity_fct=lambda a, b: (normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1),
            temperature=temperature,
        )
        return loss.compute_loss_from_embeddings([anchors, *shifted], labels) / temperature**2

    wanted = scores(*teacher)
    both = expected(*student, wanted), expected(*student[::-1], wanted.T)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(sum(both).item() / 2, rel=1e-12)
    p, q = softmax(wanted / temperature, dim=1), softmax(scores(*student) / temperature, dim=1)
    assert both[0].item() == pytest.approx((p * (p / q).log()).sum().item() / 5, rel=1e-12)
    # Further documents count in the first direction alone; a teacher that agrees costs nothing.
    assert distillation_loss([*student, student[0]], [*teacher, teacher[1]], temperature) != pytest.approx(
        distillation_loss(student, teacher, temperature)
    )
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)
