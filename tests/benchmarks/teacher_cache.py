"""Distillation from a teacher cache: the time of a step, the bytes of a token, and what k tokens lose.

    python -m tests.benchmarks.teacher_cache [--steps 12] [--rounds 2] [--layers 30] [--sequences 8]

Steps are those of a student of half SmolLM2-135M's width with random weights, in fp32 on one process; the teacher has
the shape of SmolLM2-135M. CPU seconds are those of the process, which other processes on the machine hardly change.
What k loses is measured on SmolLM2-135M itself and a student that is pruned from it without training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nemo_pvs.data.teacher_cache import CacheContent
from nemo_pvs.megatron.distillation.losses import vocabulary_parallel_kl
from nemo_pvs.megatron.distillation.top_k import top_k_answers, top_k_kl
from nemo_pvs.recipe.distillation import Cache, Distillation
from nemo_pvs.system.progress import console
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.teaching_job import TeachingJob, content_for
from tests.benchmarks.step_costs import make_run
from tests.megatron.ranks import run_ranks

K = 32
WARM_UP = 1
VOCAB = 49_152
TEACHER = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
STUDENT = {"hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 9, "num_key_value_heads": 3}
KINDS = ("plain training", "a teacher online", f"... its {K} likeliest tokens", f"{K} from a cache")
KEPT = (8, 32, 128, VOCAB)


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--sequences", type=int, default=8, help="of 256 tokens, to measure what k loses")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), given.layers, given.steps)
        rounds = [steps_of(job) for _ in range(given.rounds)]
        content = teaching(job).content
    table = Table("a step of ...", "s", "ratio", "CPU s", "ratio")
    medians = {
        kind: tuple(statistics.median(found[kind][index] for found in rounds) for index in range(2)) for kind in KINDS
    }
    for kind, (wall, cpu) in medians.items():
        plain = medians[KINDS[0]]
        table.add_row(kind, f"{wall:.2f}", f"{wall / plain[0]:.2f}", f"{cpu:.2f}", f"{cpu / plain[1]:.2f}")
    console.print(table)
    console.print(f"bytes per token: {content.bytes_per_token:.0f}, and {4 * content.vocab:,} of fp32 logits")
    console.print(losses_table(*logits_of_smollm2(given.sequences)))


def make_job(folder: Path, layers: int, steps: int, **sizes: Any) -> TrainingJob:
    """Return a run of steps of 512 tokens, with its teacher."""
    shared = {"num_hidden_layers": layers, "head_dim": 64, "vocab_size": VOCAB, "tie_word_embeddings": True, **sizes}
    return make_run(folder, TEACHER | shared, STUDENT | shared, steps, samples=4)


def teaching(job: TrainingJob) -> TeachingJob:
    """Return the job that writes the cache of a run."""
    identity = {"teacher": "t", "tokenizer": "k", "data": "d", "vocab": VOCAB, "top_k": K}
    return TeachingJob(
        name="teacher",
        folder=job.folder / "cache",
        teacher=job.teacher or Path(),
        text=str(job.data["train"]),
        index=job.index,
        content=content_for(job.training, 0, int(job.training.tokens), **identity),
        layout=job.layout,
        micro_batch_size=2,
        precision="fp32",
    )


def steps_of(job: TrainingJob) -> dict[str, tuple[float, float]]:
    """Return the median seconds and CPU seconds of a step of each kind."""
    teacher = teaching(job)
    if not teacher.is_finished:
        teacher.save()
        run_ranks(1, _run_job, teacher)
    found = {}
    for kind, distill in zip(KINDS, (None, {}, {"top_k": K}, {"cache": Cache(top_k=K)}), strict=True):
        with tempfile.TemporaryDirectory(dir=job.folder) as folder:
            how = None if distill is None else Distillation(teacher="elsewhere", **distill)
            run = replace(
                job,
                folder=Path(folder),
                training=job.training.model_copy(update={"distill": how}),
                teacher=job.teacher if how else None,
                cache=teacher.folder if how and how.cache else None,
            )
            run.save()
            (seconds,) = run_ranks(1, _timed_steps, run)
        found[kind] = tuple(statistics.median(part[WARM_UP:]) for part in zip(*seconds, strict=True))
    return found


def _run_job(job: Any) -> None:
    import os

    from nemo_pvs.megatron.rank import train_on_cpu

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train_on_cpu(job)


def _timed_steps(job: TrainingJob) -> list[tuple[float, float]]:
    """Run a rank; return the seconds and CPU seconds of each step."""
    import time

    import lightning.pytorch as pl

    from nemo_pvs.megatron import rank

    times: list[tuple[float, float]] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            times.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    recipe_of = rank.pretrain_recipe

    def clocked(job: TrainingJob) -> Any:
        recipe = recipe_of(job)
        recipe.trainer.callbacks.insert(0, Clock())
        return recipe

    rank.pretrain_recipe = clocked
    _run_job(job)
    return times


def logits_of_smollm2(sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [tokens, V] of a student and of SmolLM2-135M on the built-in text.

    The student lacks three of the teacher's 30 layers, in the middle, and is as far from it as after some training.
    """
    from nemo_pvs.checkpoints.fetch import prepare_parent
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.data.corpus import read_documents
    from nemo_pvs.data.tokenize import load_tokenizer
    from tests.state_source import as_transformers

    with tempfile.TemporaryDirectory() as folder:
        path = prepare_parent("smollm2-135m", Path(folder, "parent"))
        tokenizer, model = load_tokenizer(path), as_transformers(open_source(path))
        text = next(iter(read_documents("wikipedia-sample"))).text
        ids = torch.tensor(tokenizer.encode(text)[: sequences * 256]).view(-1, 256)
        with torch.no_grad():
            teacher = model(ids).logits.flatten(0, 1)
            del model.model.layers[12:15]
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = index
            model.config.num_hidden_layers = len(model.model.layers)
            student = model(ids, use_cache=False).logits.flatten(0, 1)
    return student, teacher


def losses_table(student: torch.Tensor, teacher: torch.Tensor) -> Table:
    """Compare the loss of k tokens, and its gradient with respect to the logits, with those of all tokens."""
    vocab = teacher.shape[-1]
    content = CacheContent("t", "k", "d", 1, 256, 0, 1, vocab, 1)
    table = Table("k", "rest", "type", "bytes per token", "left out (%)", "loss", "gradient error (%)", "cosine")
    full, gradient = _loss_and_gradient(student, lambda s: vocabulary_parallel_kl(s, teacher))
    table.add_row("all", "", "online", "", "0", f"{full:.4f}", "0", "1")
    for k in sorted({min(kept, vocab) for kept in KEPT}):
        ids, logprobs, rest = top_k_answers(teacher, k, vocab=vocab)
        left_out = f"{100 * float(rest.exp().mean()):.2f}"
        for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
            stored = logprobs.to(kind), rest.to(kind)
            for how in ("renormalise", "class"):
                loss, found = _loss_and_gradient(
                    student, lambda s, a=ids, p=stored, c=how: top_k_kl(s, a, p[0], p[1] if c == "class" else None)
                )
                error = float((found - gradient).norm() / gradient.norm())
                cosine = float((found * gradient).sum() / (found.norm() * gradient.norm()))
                size = replace(content, top_k=k, precision="fp32" if name == "fp32" else "fp16").bytes_per_token
                cells = [f"{k:,}", how, name, f"{size:,.0f}", left_out, f"{loss:.4f}"]
                table.add_row(*cells, f"{100 * error:.3g}", f"{cosine:.5f}")
    return table


def _loss_and_gradient(student: torch.Tensor, loss_of: Any) -> tuple[float, torch.Tensor]:
    """Return the mean loss of the tokens, and its gradient with respect to the student's logits."""
    logits = student.clone().requires_grad_()
    loss = loss_of(logits).mean()
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad


if __name__ == "__main__":
    main()
