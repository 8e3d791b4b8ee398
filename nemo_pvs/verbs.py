"""What ``pvs`` can do: one plain function a verb, used by the command line, by ``nemo pvs`` and from Python.

Arguments are primitives, so that NeMo-Run can carry them to a cluster. Heavy modules are imported inside the
functions: ``pvs --help`` starts in about a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.errors import UserError
from nemo_pvs.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

Source = Annotated[str, typer.Argument(help="Hugging Face folder or NeMo checkpoint; detected")]
Destination = Annotated[str, typer.Argument(help="folder to write; must not exist")]
Overwrite = Annotated[bool, typer.Option(help="replace the target if it exists")]
Samples = Annotated[int, typer.Option(help="number of sequences")]
SequenceLength = Annotated[int, typer.Option(help="tokens per sequence")]
Seed = Annotated[int, typer.Option(help="which windows of the text; -1 for consecutive ones")]
Text = Annotated[str, typer.Option(help=".txt, .jsonl[.gz|.zst], .parquet, a folder of them, or wikipedia-sample")]


def convert(
    source: Source,
    target: Destination,
    to: Annotated[Optional[str], typer.Option(help="hf or nemo; the other one of the source by default")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="bf16, fp16 or fp32; as stored by default")] = None,
    verify: Annotated[str, typer.Option(help="checksum (read everything back) or none")] = "checksum",
    overwrite: Overwrite = False,
) -> None:
    """Convert between Hugging Face and NeMo, as a stream."""
    from nemo_pvs.checkpoints.stream import convert as convert_stream
    from nemo_pvs.checkpoints.stream import describe

    found = describe(source)["format"]
    wanted = _one_of("--to", to or ("hf" if found == "nemo" else "nemo"), ("hf", "nemo"))
    check = _one_of("--verify", verify, ("checksum", "none"))
    with progress(f"convert to {wanted}", "parameters") as show:
        convert_stream(
            source, target, to=wanted, dtype=_dtype(dtype), verify=check, overwrite=overwrite, progress=show
        )
    console.print(f"{target}: {_sentence(describe(target))}", soft_wrap=True)


def inspect(
    path: Source,
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = False,
) -> None:
    """Show what a checkpoint is, without reading its weights."""
    from rich.table import Table

    from nemo_pvs.checkpoints.stream import describe

    about = describe(path, tensors=tensors)
    table = Table(show_header=False, box=None)
    rows = {
        "format": f"{about['format']}, family {about['family']}",
        **{
            name.replace("_", " "): f"{value:,}" if name != "tied" else str(value)
            for name, value in about["shape"].items()
        },
        "parameters": f"{about['parameters']:,} ({about['body_parameters']:,} without embedding and head)",
        "FLOPs per token": f"{about['flops_per_token'] / 1e9:,.3f} G in training, attention scores not counted",
        "stored": ", ".join(f"{count:,} as {dtype}" for dtype, count in about["dtypes"].items())
        + f", {about['bytes'] / 1e9:,.2f} GB",
        "other tensors": f"{about['extra_tensors']:,} (optimizer state, buffers)",
        "other files": ", ".join(about["assets"]) or "none",
        "manifest": about["manifest"],
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    if tensors:
        listing = Table("tensor", "dtype", "size", "in Megatron")
        for tensor in about["tensors"]:
            listing.add_row(tensor["name"], tensor["dtype"], " x ".join(map(str, tensor["size"])), tensor["megatron"])
        console.print(listing)


def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="text files or folders, or wikipedia-sample")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder whose tokenizer to use")],
    out: Annotated[str, typer.Option(help="folder for <split>.bin and <split>.idx")],
    split: Annotated[
        str, typer.Option(help="shares of the text by document; none may be left out of 1")
    ] = "train=0.9,validation=0.1",
    text_key: Annotated[str, typer.Option(help="key or column that holds the text")] = "text",
    seed: Annotated[int, typer.Option(help="another seed, another split")] = 0,
) -> None:
    """Turn text into Megatron token files, split by document."""
    from nemo_pvs.data.corpus import read_documents
    from nemo_pvs.data.split import split_documents
    from nemo_pvs.data.tokenize import tokenize as write_tokens

    parts = split_documents(read_documents(inputs, text_key=text_key), _shares(split), seed=seed)
    for name, documents in parts.items():
        with progress(f"tokenise {name}", "documents") as show:
            made = write_tokens(documents, Path(tokenizer), Path(out) / name, progress=show)
        console.print(f"{Path(out) / name}.bin: {made['documents']:,} documents, {made['tokens']:,} tokens")


def calibrate(
    source: Source,
    out: Annotated[str, typer.Option(help="folder for the scores")],
    data: Text = "wikipedia-sample",
    samples: Samples = 128,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure importance once, for every width target."""
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.files import refuse_existing

    refuse_existing(Path(out), overwrite=overwrite)
    model = open_source(source)
    tokens = _tokens(source, data, samples, sequence_length, seed)
    with progress("calibrate", "layers") as show:
        scores = measure(model, tokens, progress=show)
    scores.save(Path(out), overwrite=overwrite)
    console.print(f"{out}: scores of {tokens.ids.numel():,} tokens, {scores.content_hash[:12]}")


def prune(
    source: Source,
    target_folder: Destination,
    method: Annotated[str, typer.Option(help="minitron-width or minitron-depth")],
    target: Annotated[str, typer.Option(help="sizes to reach, e.g. hidden=288,ffn=768 or layers=14")],
    scores: Annotated[Optional[str], typer.Option(help="folder that pvs calibrate wrote; else calibrates now")] = None,
    data: Text = "wikipedia-sample",
    samples: Samples = 32,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    format: Annotated[Optional[str], typer.Option(help="hf or nemo; as the source by default")] = None,  # noqa: A002
    tensor_parallel: Annotated[int, typer.Option(help="refuse a shape that cannot be split over so many ranks")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="refuse a shape that has no such pipeline stages")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Prune a model to a smaller architecture."""
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.huggingface import write_huggingface
    from nemo_pvs.checkpoints.megatron import write_nemo
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.checkpoints.stream import describe
    from nemo_pvs.files import refuse_existing
    from nemo_pvs.pruning.apply import PrunedSource
    from nemo_pvs.pruning.depth import layers_to_remove, plan_depth, scan_windows
    from nemo_pvs.pruning.target import parse_target
    from nemo_pvs.pruning.width import plan_width

    _one_of("--method", method, ("minitron-width", "minitron-depth"))
    wanted = format or {"huggingface": "hf"}.get(describe(source)["format"], "nemo")
    _one_of("--format", wanted, ("hf", "nemo"))
    refuse_existing(Path(target_folder), overwrite=overwrite)
    model = open_source(source)
    shape = parse_target(target, shape_of(model))
    shape.check_parallel(tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    known = Scores.load(Path(scores), model) if scores else None
    tokens = known.tokens if known else _tokens(source, data, samples, sequence_length, seed)
    if method == "minitron-width":
        if known is None:
            with progress("calibrate", "layers") as show:
                known = measure(model, tokens, progress=show)
        plan = plan_width(known, shape)
    else:
        with progress("scan windows", "layer passes") as show:
            scan = scan_windows(model, tokens, layers_to_remove(shape_of(model), shape), progress=show)
        plan = plan_depth(scan)
        console.print(
            f"without layers {scan.start} to {scan.start + scan.removed - 1} the loss is {min(scan.losses):.3f} "
            f"instead of {scan.dense_loss:.3f} nats per token",
            soft_wrap=True,
        )
    pruned = PrunedSource(model, plan)
    with progress(f"write {wanted}", "parameters") as show:
        if wanted == "hf":
            write_huggingface(pruned, Path(target_folder), overwrite=overwrite, progress=show)
        else:
            write_nemo(pruned, Path(target_folder), overwrite=overwrite, progress=show)
    plan.save(Path(target_folder) / "pvs_plan.json")
    console.print(f"{target_folder}: {shape}", soft_wrap=True)


def train(
    initial: Annotated[str, typer.Argument(help="checkpoint with the initial weights, Hugging Face or NeMo")],
    out: Annotated[str, typer.Argument(help="run folder; an interrupted run in it is resumed")],
    data: Annotated[str, typer.Option(help="folder with train.bin and validation.bin from pvs tokenize")],
    tokens: Annotated[float, typer.Option(help="training tokens, e.g. 50e9")],
    sequence_length: SequenceLength = 8192,
    global_batch_size: Annotated[int, typer.Option(help="sequences per optimizer step")] = 512,
    micro_batch_size: Annotated[int, typer.Option(help="sequences per forward pass of a rank")] = 1,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 3e-4,
    validation_samples: Annotated[int, typer.Option(help="sequences, a multiple of the global batch size")] = 512,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share every layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="stages that share the layers out")] = 1,
    data_parallel: Annotated[int, typer.Option(help="replicas that share the batch out")] = 1,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32")] = "auto",
    random_init: Annotated[bool, typer.Option(help="keep the architecture, draw the weights: the baseline")] = False,
    seed: Annotated[int, typer.Option(help="order of the data and random weights")] = 1234,
) -> None:
    """Train on NeMo and Megatron, from pruned or random weights."""
    from nemo_pvs.recipe import parse_layout, parse_training
    from nemo_pvs.training.prepare import prepare_job
    from nemo_pvs.training.run import Trainer

    layout = parse_layout(
        {
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "data_parallel": data_parallel,
        }
    )
    training = parse_training(
        {
            "tokens": tokens,
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "learning_rate": learning_rate,
            "validation_samples": validation_samples,
            "precision": precision,
            "seed": seed,
        }
    )
    job = prepare_job(initial, Path(out), Path(data), layout, training, random_init=random_init)
    with Trainer(Path(out) / "launcher.log") as trainer:
        checkpoint = trainer.train(job)
    console.print(f"trained checkpoint: {checkpoint}", soft_wrap=True)


def evaluate(
    paths: Annotated[list[str], typer.Argument(help="Hugging Face folders or NeMo checkpoints")],
    data: Text = "wikipedia-sample",
    samples: Samples = 64,
    sequence_length: SequenceLength = 512,
    seed: Seed = -1,
) -> None:
    """Measure perplexity of checkpoints on the same text."""
    from rich.table import Table

    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.evaluation.perplexity import perplexity

    models = {path: open_source(path) for path in paths}
    table = Table("model", "parameters (M)", "loss (nats/token)", "perplexity", "tokens")
    for path, model in models.items():
        tokens = _tokens(path, data, samples, sequence_length, seed)
        with progress(f"evaluate {path}", "layers") as show:
            measured = perplexity(model, tokens, progress=show)
        table.add_row(
            path,
            f"{shape_of(model).parameters / 1e6:,.1f}",
            f"{measured['loss']:.4f}",
            f"{measured['perplexity']:,.2f}",
            f"{measured['tokens']:,}",
        )
    console.print(table)


def run(
    recipe: Annotated[str, typer.Argument(help="path of a recipe, or the name of one of ours: smollm2_135m/demo")],
    out: Annotated[Optional[str], typer.Option(help="run folder; runs/<recipe name> by default")] = None,
    force: Annotated[
        Optional[list[str]], typer.Option(help="do this stage again: calibrate, prune/width, train, ...")
    ] = None,
    prepare_only: Annotated[bool, typer.Option(help="stop before training, for ranks that Slurm starts")] = False,
) -> None:
    """Run a recipe: calibrate, prune, train every arm, evaluate, report."""
    from nemo_pvs.recipe import load_recipe

    checked = load_recipe(recipe)  # before the heavy imports: a typo is answered at once
    from nemo_pvs.pipeline import Pipeline
    from nemo_pvs.reporting.assemble import assemble
    from nemo_pvs.reporting.html import write_report

    folder = Path(out or f"runs/{checked.name}")
    pipeline = Pipeline(checked, folder, tuple(force or ()))
    if prepare_only:
        for job in pipeline.prepare_only():
            console.print(f"ready to train: {job}", soft_wrap=True)
        return
    pipeline.run()
    results = assemble(pipeline)
    write_report(results, folder)
    _show(results, folder)


def report(
    folder: Annotated[str, typer.Argument(help="run folder with results.json")],
) -> None:
    """Write a finished run's report again and show its table."""
    from nemo_pvs.reporting.html import write_report
    from nemo_pvs.reporting.results import Results

    results = Results.load(Path(folder) / "results.json")
    write_report(results, Path(folder))
    _show(results, Path(folder))


VERBS = (convert, inspect, tokenize, calibrate, prune, train, evaluate, run, report)


def _show(results: Any, folder: Path) -> None:
    from nemo_pvs.reporting.table import results_table

    console.print()
    console.print(results_table(results))
    console.print(f"\nReport: {(folder / 'report.html').resolve()}", soft_wrap=True)


def _tokens(source: str, data: str, samples: int, sequence_length: int, seed: int) -> Any:
    """Return windows of a text (tokenised with the model's tokenizer) or of a Megatron token file."""
    from nemo_pvs.calibration.tokens import TokenSet
    from nemo_pvs.checkpoints.assets import tokenizer_folder
    from nemo_pvs.data.corpus import read_documents
    from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash

    settings: dict[str, Any] = {
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": None if seed < 0 else seed,
    }
    if data.endswith(".bin"):
        return TokenSet.from_token_file(Path(data.removesuffix(".bin")), **settings)
    folder = tokenizer_folder(Path(source))
    tokenizer = load_tokenizer(folder)
    return TokenSet.from_documents(
        (document.text for document in read_documents(data)),
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        data_set=data,
        tokenizer_sha256=tokenizer_hash(folder),
        **settings,
    )


def _dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    _one_of("--dtype", name, ("bf16", "fp16", "fp32"))
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"{option} is {value!r}; choose {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return value


def _shares(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(share) for name, share in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise UserError(f"--split is {text!r}; write it as train=0.9,validation=0.1.") from None


def _sentence(about: dict[str, Any]) -> str:
    from nemo_pvs.shape import Shape

    return f"{about['format']}, {Shape.from_dict(about['shape'])}, {about['bytes'] / 1e9:,.2f} GB"
