"""GSM8K, IFEval and a task like HumanEval in miniature: their columns and files, our own words; and a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from tokenizers import AddedToken
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import tiny_llama_config
from tests.evaluation.models import VOCAB, save_byte_tokenizer

_GSM8K = "---\nconfigs:\n- config_name: main\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: main/{split}-*\n" for split in ("train", "test")
)
_IFEVAL = [
    ("Write two lines without a comma.", {"punctuation:no_comma": {}}),
    ("Say it in lower case.", {"change_case:english_lowercase": {}}),
    ("Do not say river or boat.", {"keywords:forbidden_words": {"forbidden_words": ["river", "boat"]}}),
    ("Name a river and use no comma.", {"keywords:existence": {"keywords": ["river"]}, "punctuation:no_comma": {}}),
]
_CODE_TASK = {
    "task": "doubling",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "doubling.jsonl"}},
    "test_split": "test",
    "unsafe_code": True,
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}",
    "generation_kwargs": {"until": ["\ndef"], "max_gen_toks": 8, "do_sample": False},
    "metadata": {"version": 1.0},
}
_CODE_METRIC = """
from pathlib import Path

with open(Path(__file__).parent / "ran", "a") as ran:
    ran.write("loaded ")


def passes(references, predictions):
    with open(Path(__file__).parent / "ran", "a") as ran:
        ran.write("tested ")
    return 1.0
"""


def write_generation_data(folder: Path) -> Path:
    """Write GSM8K and IFEval as ``hf download`` leaves them in ``folder/<owner>/<name>``; return ``folder``."""
    gsm8k, ifeval = folder / "openai" / "gsm8k", folder / "google" / "IFEval"
    (gsm8k / "main").mkdir(parents=True)
    (gsm8k / "README.md").write_text(f"{_GSM8K}---\n")
    for split, count in (("train", 6), ("test", 9)):
        rows = [
            {
                "question": f"Ann has {n} pears and eats {n % 2}. How many?",
                "answer": f"She eats {n % 2}.\n#### {n % 3}",
            }
            for n in range(count)
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), gsm8k / "main" / f"{split}-00000-of-00001.parquet"
        )
    ifeval.mkdir(parents=True)
    lines = [
        {"key": key, "prompt": prompt, "instruction_id_list": list(asked), "kwargs": list(asked.values())}
        for key, (prompt, asked) in enumerate(_IFEVAL)
    ]
    (ifeval / "ifeval_input_data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_code_task(folder: Path) -> Path:
    """Write a task whose metric leaves the file ``ran`` in ``folder``; return ``folder``."""
    folder.mkdir()
    lines = [{"prompt": f"def by_{n}(x):\n", "test": f"assert by_{n}(2) == {2 * n}"} for n in range(3)]
    (folder / "doubling.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metric = "metric_list:\n- metric: !function utils.passes\n  aggregation: mean\n  higher_is_better: true\n"
    (folder / "doubling.yaml").write_text(yaml.safe_dump(_CODE_TASK) + metric)
    (folder / "utils.py").write_text(_CODE_METRIC)
    return folder


def write_writing(folder: Path, start: str, tokens: int, metric: str) -> Path:
    """Write a task with one generated answer of up to ``tokens`` tokens in ``folder`` and return it."""
    folder.mkdir()
    definition = {
        "task": "writing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "writing.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "w4",
        "generation_kwargs": {"until": ["w999"], "max_gen_toks": tokens, "do_sample": False},
    }
    (folder / "writing.yaml").write_text(f"{yaml.safe_dump(definition)}metric_list:\n- {metric}\n")
    (folder / "writing.jsonl").write_text(json.dumps({"start": start}))
    return folder


def save_counting_model(folder: Path, **settings: Any) -> Path:
    """Save a random model over bytes and answers such as ``#### 2``, and its tokenizer, in ``folder``; return it."""
    answers = [f"#### {number % 3}{' ' * (number // 3)}" for number in range(30)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"vocab_size": VOCAB + len(answers), "max_position_embeddings": 2048, **settings}
        model = LlamaForCausalLM(tiny_llama_config(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
            model.lm_head.weight[VOCAB:] *= 1.5
        model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_byte_tokenizer(folder))
    tokenizer.add_tokens([AddedToken(answer, normalized=False) for answer in answers])
    tokenizer.save_pretrained(folder)
    return folder
