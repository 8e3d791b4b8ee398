"""The table that ``pvs evaluate`` prints."""

from __future__ import annotations

from rich.console import Console

from nemo_pvs.evaluation.summary import summary_table


def test_long_paths_never_cut_a_number():
    perplexity = {"value": 24.113, "stderr": 0.22, "tokens": 8192, "windows": "windows of 64 every 50"}
    share = {"value": 0.3125, "stderr": 0.011, "documents": 2376}
    measured = {
        "/corpora/" + "letters[b]/" * 12 + "text.jsonl/token_perplexity": perplexity,
        "arc_easy/acc,none": share,
    }
    folder = "/runs/" + "pruned[a]/" * 12 + "hf"
    models = [{"checkpoint": name, "parameters": 91_000_000, "measured": measured} for name in (folder, "smollm2")]
    console = Console(width=80, force_terminal=False)
    with console.capture() as printed:
        console.print(summary_table(models))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("24.113 ± 0.220") for line in lines) == 2
    assert sum(line.count("31.25 ± 1.10") for line in lines) == 2
    squeezed = "".join(line.split("│")[1].strip() for line in lines if "│" in line)
    assert folder in "".join(line.split("┃")[3].strip() for line in lines if line.count("┃") > 3)
    assert next(iter(measured)) in squeezed, "a name is cut over lines, and whole"
