"""Arguments that several verbs share, and the panels that --help groups options in."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

TEXT, TRAINING, OUTPUT = "Calibration text", "Training", "Output"
PARALLEL, RESOURCES = "Parallelism", "Resources"
"""Panels of --help that several verbs have."""

Source = Annotated[
    str, typer.Argument(help="checkpoint folder of any format, .gguf file, smollm2-135m or hf://owner/name")
]
Destination = Annotated[str, typer.Argument(help="folder to write; must not exist")]
Overwrite = Annotated[bool, typer.Option(help="replace the target if it exists", rich_help_panel=OUTPUT)]
Samples = Annotated[int, typer.Option(help="number of sequences", rich_help_panel=TEXT)]
SequenceLength = Annotated[int, typer.Option(help="tokens per sequence", rich_help_panel=TEXT)]
Seed = Annotated[
    int, typer.Option(help="seed for the windows of the text; -1 for consecutive ones", rich_help_panel=TEXT)
]
Loader = Annotated[
    Optional[str],
    typer.Option(
        help="read --data as a reference does: c4_random_docs, wikitext2_random, wikitext103_seq, ...",
        rich_help_panel=TEXT,
    ),
]
Windows = Annotated[
    str,
    typer.Option(
        help="packed: cut from all documents joined; documents: each from one that is long enough",
        rich_help_panel=TEXT,
    ),
]
IgnoreManifest = Annotated[
    bool,
    typer.Option(
        help="read weights that differ from the manifest, because another program changed them on purpose",
        rich_help_panel=RESOURCES,
    ),
]
Device = Annotated[
    Optional[str],
    typer.Option(
        help="cpu or cuda; by default the GPU if there is one (bf16 there, fp32 on a CPU)", rich_help_panel=RESOURCES
    ),
]
ActivationMemory = Annotated[
    str,
    typer.Option(
        help="memory for hidden states, e.g. 8GB, or auto: 8 GB on a CPU, and with a GPU what fits there and in "
        "page-locked memory; more text takes several sweeps over the layers",
        rich_help_panel=RESOURCES,
    ),
]
ParentTokens = Annotated[
    Optional[float],
    typer.Option(
        help="tokens that the weights were pretrained on, e.g. 15e12, if no ledger says so", rich_help_panel=OUTPUT
    ),
]
Text = Annotated[
    str,
    typer.Option(
        help=".txt, .jsonl[.gz|.zst], .parquet, a folder of them, a token file (.bin), or wikipedia-sample",
        rich_help_panel=TEXT,
    ),
]
