"""The table that ``pvs evaluate`` prints."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from nemo_pvs.evaluation.summary import summary_tables, with_earlier


def printed(models: list[dict[str, Any]], width: int = 80) -> list[str]:
    console = Console(width=width, force_terminal=False)
    with console.capture() as output:
        for table in summary_tables(models, width):
            console.print(table)
    return output.get().splitlines()


def test_long_paths_never_cut_a_number():
    perplexity = {"value": 24.113, "stderr": 0.22, "tokens": 8192, "windows": "windows of 64 every 50"}
    share = {"value": 0.3125, "stderr": 0.011, "documents": 2376}
    measured = {
        "/corpora/" + "letters[b]/" * 12 + "text.jsonl/token_perplexity": perplexity,
        "arc_easy/acc,none": share,
    }
    folder = "/runs/" + "pruned[a]/" * 12 + "hf"
    models = [{"checkpoint": name, "parameters": 91_000_000, "measured": measured} for name in (folder, "smollm2")]
    lines = printed(models)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("24.113 ± 0.220") for line in lines) == 2
    assert sum(line.count("31.25 ± 1.10") for line in lines) == 2
    squeezed = "".join(line.split("│")[1].strip() for line in lines if "│" in line)
    assert folder in "".join(line.split("┃")[3].strip() for line in lines if line.count("┃") > 3)
    assert next(iter(measured)) in squeezed, "a name is cut over lines, and whole"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_many_models_are_all_shown_on_any_terminal(width):
    """The columns of a table that is wider than the terminal would be cut, and a number with them."""
    loss = {"stderr": 0.0123, "tokens": 32_704, "windows": "chunks of 512"}
    models = [
        {"checkpoint": f"model-{index}", "parameters": 1e9, "measured": {"loss": {"value": 3 + index / 100, **loss}}}
        for index in range(7)
    ]
    lines = printed(models, width)
    assert max(map(len, lines)) <= width
    for index in range(7):
        assert sum(line.count(f"model-{index} ") for line in lines) == 1
        assert sum(line.count(f"{3 + index / 100:.4f} ± 0.0123 ") for line in lines) == 1


def test_a_model_of_which_nothing_could_be_measured_is_shown():
    assert any("model" in line for line in printed([{"checkpoint": "model", "parameters": 1e9, "measured": {}}]))


def test_results_of_another_tokenizer_are_those_of_another_model():
    """The same weights read other tokens; a corrected tokenizer must not keep the results of the broken one."""
    old = {"fingerprint": "f", "tokenizer_sha256": "broken", "backend": "transformers", "limit": None}
    new = {**old, "tokenizer_sha256": "correct"}
    measured = [{"a/acc": {"value": 0.1}}, {"b/acc": {"value": 0.9}}]
    joined = with_earlier([{**new, "measured": measured[1]}], [{**old, "measured": measured[0]}])
    assert [model["measured"] for model in joined] == measured[::-1]
