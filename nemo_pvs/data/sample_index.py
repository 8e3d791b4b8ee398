"""Megatron's index of a training text: which tokens each sample consists of, in the order that a seed gives.

It is built once, before any rank starts. For hundreds of billions of tokens this takes many minutes, for which ranks
would wait in a collective with a timeout of ten minutes while the first of them builds it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.system.progress import console, expected, short_time

_DOCUMENTS_A_SECOND = 1_500_000
"""Roughly how fast Megatron builds an index (5 million documents in 2.7 s on a busy CPU), for the estimate."""
_SECONDS_WORTH_SAYING = 30


class _Tokenizer:
    """What Megatron's dataset needs of NeMo's tokenizer: the name by which it recognises an index that is there.

    The end-of-document token would be used only by options that are off: masks and positions per document.
    """

    eod = 0

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """The same as of NeMo's ``AutoTokenizer``."""
        return OrderedDict({"class": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"})


def build_datasets(dataset: type, config: Any, samples: int) -> list[Any]:
    """Return Megatron's datasets for training, validation and test; their index is built unless it is there.

    Args:
        dataset: The class of the datasets.
        config: Megatron's ``GPTDatasetConfig``, with ``blend_per_split``.
        samples: Number of training samples that a run reads, with those that it skips.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    prefixes, _ = config.blend_per_split[0]
    # An index of the whole text serves every budget, as the order does not depend on the number of samples. Only how
    # several files are blended does.
    training = None if len(prefixes) == 1 else samples
    with nullcontext() if len(prefixes) == 1 else _process_group():
        built: list[Any] = BlendedMegatronDatasetBuilder(dataset, [training, None, 0], lambda: True, config).build()
    return built


@contextmanager
def _process_group() -> Iterator[None]:
    """Have a process group, of this process alone where there are no ranks: a blend asks it which rank this is."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        yield
        return
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def index_text(text: str | Sequence[str], folder: Path, *, sequence_length: int, seed: int, samples: int) -> None:
    """Build the index of a training text, unless it is there, and say how long that takes if it takes long.

    Call it before there are ranks: files of the folder that an earlier build could not finish are removed.

    Args:
        text: Prefix of the token files, or a list of them, or one of alternating weights and prefixes, as for NeMo.
        folder: Folder of the index.
        sequence_length: Tokens per sample.
        seed: Seed of the order.
        samples: As for ``build_datasets``.
    """
    _remove_unfinished(folder)
    training_samples(text, folder, sequence_length=sequence_length, seed=seed, samples=samples)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed process or a full disk has cut short: Megatron takes every file that exists for whole."""
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")  # reads the header and compares the size
        except (ValueError, EOFError, OSError):
            path.unlink()


def training_samples(text: str | Sequence[str], folder: Path, *, sequence_length: int, seed: int, samples: int) -> Any:
    """Return Megatron's dataset of the training samples in order; the arguments are those of ``index_text``."""
    import_megatron()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import get_blend_from_list

    blend = get_blend_from_list([text] if isinstance(text, str) else list(text))
    documents = sum(len(IndexedDataset(prefix).document_indices) - 1 for prefix in blend[0])
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=_Tokenizer(),
        path_to_cache=str(folder),
        reset_position_ids=False,
        create_attention_mask=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        blend_per_split=[blend, None, None],
    )
    seconds = documents / _DOCUMENTS_A_SECOND
    if seconds < _SECONDS_WORTH_SAYING or any(folder.glob("*-shuffle_index.npy")):
        return build_datasets(GPTDataset, config, samples)[0]
    console.print(f"indexing {documents:,} documents, about {short_time(seconds)} ...", soft_wrap=True)
    with expected("index", seconds):
        return build_datasets(GPTDataset, config, samples)[0]
