"""Launch profiles: what is submitted, said before anything is, and refused before anything is."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_pvs.cluster.experiment import check_submission, launch, scripts, stages
from nemo_pvs.cluster.profile import LocalProfile, SlurmProfile, load_profile, packaged_profiles
from nemo_pvs.errors import UserError
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.system.gpu_environment import GPU_ENVIRONMENT
from nemo_pvs.training.preemption import USER_ERROR_FILE
from tests.documents import DOCUMENTS

SITE = {"SLURM_ACCOUNT": "physics", "SLURM_PARTITION": "h100", "PVS_IMAGE": "/images/pvs.sqsh", "PVS_SHARED": "/"}


def _scripts(recipe: str, profile: str, folder: Path, site: dict[str, str] | None = None) -> dict[str, str]:
    known, wanted = load_recipe(recipe), load_profile(profile, site or SITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's file copying passes it on; pytest's cannot be read
        return scripts(stages(known, recipe, folder, wanted), known.name, folder, wanted)


def _options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def test_every_profile_reads_and_renders(tmp_path):
    assert {"local_cpu", "local_gpu", "slurm_h100"} <= set(packaged_profiles())
    for name in packaged_profiles():
        rendered = _scripts("smollm2_135m/demo", name, tmp_path)
        assert list(rendered) == [
            "prepare",
            *(f"train-{target}-{start}" for target in ("width", "depth") for start in ("pruned", "random")),
            "report",
        ]
    assert not list(tmp_path.iterdir()), "a dry run left something behind"


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> dict[str, str]:
    """The paper's width runs on Slurm: 128 ranks each."""
    return _scripts("llama31_8b/minitron_width", "slurm_h100", tmp_path_factory.mktemp("run") / "grid")


@pytest.mark.slow
def test_batch_scripts_are_bash_and_ask_for_what_the_layout_needs(grid, tmp_path):
    assert len(grid) == 42
    for name, script in grid.items():
        (tmp_path / "script.sh").write_text(script)
        subprocess.run(["bash", "-n", str(tmp_path / "script.sh")], check=True)
        options = _options(script)
        nodes, tasks = ("16", "8") if name.startswith("train") else ("1", "1")
        assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (nodes, tasks, "8")
        assert (options["account"], options["partition"]) == ("physics", "h100")
        assert options["signal"] == "USR1@300"
        assert options["job-name"] == f"llama31_8b_minitron_width-{name}"
        assert {"requeue", "exclusive", "time", "output", "job-name"} <= options.keys()
        assert "export TORCHX_MAX_RETRIES=100" in script
        assert 'scontrol requeue "$SLURM_JOB_ID"' in script


@pytest.mark.slow
def test_ranks_get_their_address_and_start_where_the_user_is(grid):
    script = grid["train-4b-width-pruned-50B"]
    (command,) = re.findall(r"^srun .*launch.*$", script, re.MULTILINE)
    job = re.search(r"-m nemo_pvs\.megatron\.launch --slurm (\S+)$", command)[1]
    assert job.endswith("/grid/train/4b-width-pruned-50B/job.json")
    assert "--container-image /images/pvs.sqsh" in command
    # By default Pyxis lets the image's variables win.
    exported = re.search(r"--container-env (\S+)", command)[1].split(",")
    assert {*GPU_ENVIRONMENT, "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"} == set(exported)
    assert all(f"\nexport {name}=" in script for name in exported)
    assert command.rindex("--kill-on-bad-exit=0") > command.rindex("--kill-on-bad-exit=1"), "the last one counts"
    assert "--prepare-only" in grid["prepare"]
    assert "--prepare-only" not in grid["report"]


def _run(script: str, folder: Path, programs: dict[str, str], **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a batch script with programs in the place of Slurm's, given as bash code by name."""
    places = folder / "bin"
    places.mkdir(exist_ok=True)
    for name, body in programs.items():
        (places / name).write_text(f"#!/bin/bash\n{body}\n")
        (places / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    environment = {"PATH": f"{places}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "head"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["bash", str(folder / "job.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_tasks_in_a_container_start_where_the_user_is(tmp_path, monkeypatch):
    """Pyxis refuses a second --container-workdir (spank_option_workdir in its args.c), and NeMo-Run gives one."""
    here, folder = tmp_path / "a place", tmp_path / "run"
    here.mkdir()
    (folder / "slurm").mkdir(parents=True)
    monkeypatch.chdir(here)
    for stage, module in (("prepare", "nemo_pvs.cli"), ("train-width-pruned", "nemo_pvs.megatron.launch")):
        script = _scripts("smollm2_135m/demo", "slurm_h100", folder)[stage]
        given = tmp_path / stage
        programs = {"srun": f'printf "%s\\n" "$@" > {given}', "scontrol": "echo head"}
        done = _run(script, tmp_path, programs)
        assert done.returncode == 0, done.stderr
        words = given.read_text().splitlines()
        (place,) = (number for number, word in enumerate(words) if word.startswith("--container-workdir"))
        assert words[place : place + 2] == ["--container-workdir", str(here)]
        assert words[words.index("-m") + 1] == module


@pytest.mark.slow
def test_ranks_meet_at_the_first_node_however_many_addresses_it_has(tmp_path):
    (tmp_path / "slurm").mkdir()
    script = _scripts("smollm2_135m/demo", "slurm_h100", tmp_path)["train-width-pruned"]
    addresses = "fe80::1%eth0 10.0.0.1 127.0.1.1"
    seen = tmp_path / "seen"
    programs = {
        "srun": f'case "$*" in *launch*) echo "$MASTER_ADDR" > {seen};; *) echo {addresses};; esac',
        "scontrol": "echo node7; echo node8",
    }
    assert _run(script, tmp_path, programs).returncode == 0
    assert seen.read_text() == "node7\n"


@pytest.mark.slow
def test_only_what_has_saved_is_queued_again_without_end(tmp_path):
    """The script itself: srun ends with the code that it is told."""
    folder = tmp_path / "run"
    (folder / "slurm").mkdir(parents=True)
    script = _scripts("smollm2_135m/demo", "slurm_h100", folder)["train-width-pruned"]
    programs = {
        "srun": 'case "$*" in *launch*) $ONE_RANK; exit $CODE;; *) echo head;; esac',
        "scontrol": 'if [ "$1" = requeue ]; then touch $REQUEUED; else echo head; fi',
    }

    def requeued(code: int, job: int, rank: str = "") -> bool:
        flag = tmp_path / "requeued"
        flag.unlink(missing_ok=True)
        done = _run(script, tmp_path, programs, CODE=code, SLURM_JOB_ID=job, REQUEUED=flag, ONE_RANK=rank)
        assert done.returncode == code, done.stderr
        return flag.exists()

    assert [requeued(75, 1) for _ in range(4)] == [True] * 4
    time_is_up = 128 + signal.SIGUSR1  # of a stage that does not train, and so does not save
    assert [requeued(time_is_up, 1) for _ in range(4)] == [True] * 4
    assert [requeued(128 + signal.SIGTERM, 1) for _ in range(4)] == [True] * 4, "preempted before there was a handler"
    assert [requeued(1, 2), requeued(75, 2), requeued(137, 2), requeued(1, 2)] == [True, True, True, False]
    assert not requeued(2, 3), "a user's mistake is one again"
    assert not requeued(0, 4)
    mistaken = f"{sys.executable} -m nemo_pvs.megatron.launch --slurm job.json"
    assert not requeued(137, 5, mistaken), "a user's mistake on one rank; the others wait for it until they are killed"
    assert requeued(137, 5), "what an earlier attempt of the same job found is over"


def test_the_batch_script_for_sites_without_nemo_run_queues_again_what_is_not_done(tmp_path):
    script = (Path(__file__).parents[2] / "launch" / "slurm.sbatch").read_text()
    programs = {"srun": "exit $CODE", "scontrol": 'if [ "$1" = requeue ]; then touch $REQUEUED; else echo head; fi'}

    def requeued(code: int, restarts: int = 99) -> bool:
        flag = tmp_path / f"{code}-{restarts}"
        variables = {
            "CODE": code,
            "JOB": "job.json",
            "VENV": "/venv",
            "REQUEUED": flag,
            "SLURM_RESTART_COUNT": restarts,
        }
        assert _run(script, tmp_path, programs, **variables).returncode == code
        return flag.exists()

    assert [requeued(code) for code in (75, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)] == [True] * 3
    assert [requeued(code) for code in (0, 1, 2, 137)] == [False] * 4
    assert not requeued(75, restarts=100), "a time limit that is too short for any progress"


def test_what_jobs_would_refuse_is_refused_before_the_queue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ACCOUNT", "physics")
    profile = load_profile("slurm_h100")
    with pytest.raises(
        UserError, match="runs/llama31_8b_p200/models/p200-random-200B does not exist yet; submit this"
    ):
        check_submission(load_recipe("llama31_8b/minitron_width"), tmp_path / "run", profile)
    check_submission(load_recipe("llama31_8b/p200"), tmp_path / "run", profile)
    elsewhere = profile.model_copy(update={"host": "login"})
    check_submission(load_recipe("llama31_8b/minitron_width"), tmp_path / "run", elsewhere)
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2\.5-1\.5B --local-dir hf/Qwen2\.5-1\.5B, and give"):
        check_submission(load_recipe("qwen25_1p5b/compare"), tmp_path / "run", profile)
    (tmp_path / "fetched" / "parent").mkdir(parents=True)
    check_submission(load_recipe("qwen25_1p5b/compare"), tmp_path / "fetched", profile)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))  # it is in the cache
    check_submission(load_recipe("qwen25_1p5b/compare"), tmp_path / "run", profile)
    recipe = load_recipe("qwen25_1p5b/compare")
    too_long = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sequence_length": 1 << 20})})
    with pytest.raises(UserError, match="sequence_length"):
        check_submission(too_long, tmp_path / "run", profile)


@pytest.mark.slow
def test_variables_reach_the_batch_script_as_they_are(tmp_path):
    path = tmp_path / "mine.yaml"
    values = {"WANDB_NAME": "my run", "XLA_FLAGS": '--a --b="c"; `d`', "HOME_OF": "$PWD/x"}
    settings = {"kind": "slurm", "account": "physics", "python": "/venv/bin/python", "environment": values}
    path.write_text(yaml.safe_dump(settings))
    (tmp_path / "slurm").mkdir()
    script = _scripts("smollm2_135m/demo", str(path), tmp_path)["train-width-pruned"]
    seen = tmp_path / "seen"
    programs = {"srun": f'case "$*" in *launch*) env > {seen};; *) echo head;; esac', "scontrol": "echo head"}
    assert _run(script, tmp_path, programs).returncode == 0
    lines = seen.read_text().splitlines()
    assert {f"WANDB_NAME={values['WANDB_NAME']}", f"XLA_FLAGS={values['XLA_FLAGS']}"} <= {*lines}
    assert f"HOME_OF={Path.cwd()}/x" in lines


def test_a_number_where_yaml_took_away_the_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: slurm\naccount: physics\ntime: 24:00:00\n")
    with pytest.raises(UserError, match="is the number 86400 in YAML; write it in quotes"):
        load_profile(str(path))


def test_without_a_container_an_environment_is_used(tmp_path):
    site = {"SLURM_ACCOUNT": "a", "PVS_PYTHON": "/shared/venv/bin/python"}
    script = _scripts("smollm2_135m/demo", "slurm_h100", tmp_path, site)["train-width-pruned"]
    assert "--container" not in script
    assert f"--chdir={Path.cwd()} /shared/venv/bin/python -m nemo_pvs.megatron.launch --slurm" in script
    assert _options(script)["ntasks-per-node"] == "2"


def test_every_process_gets_the_same_environment_and_the_user_has_the_last_word(tmp_path):
    """Commands and ranks of ours set it themselves; what NeMo's own command starts has only the executor's."""
    slurm, local = (load_profile(name, SITE) for name in ("slurm_h100", "local_gpu"))
    for profile in (slurm, local):
        for executor in (profile.executor(None, tmp_path), profile.function_executor(tmp_path)):
            assert GPU_ENVIRONMENT.items() <= executor.env_vars.items()
        assert "torch_extensions-" in profile.function_executor(tmp_path).env_vars["TORCH_EXTENSIONS_DIR"]
        mine = profile.model_copy(update={"environment": {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}})
        assert mine.executor(None, tmp_path).env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


@pytest.mark.parametrize("start", ["nemo_pvs.megatron.launch", "nemo_pvs.cli.main"])
def test_commands_and_ranks_set_the_environment_themselves(start, monkeypatch, capsys):
    main = importlib.import_module(start).main
    for name in GPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "mine")
    monkeypatch.setattr(sys, "argv", ["pvs", "--version"])
    with contextlib.suppress(SystemExit):
        main(*[[]] * (start == "nemo_pvs.megatron.launch"))
    expected = {**GPU_ENVIRONMENT, "PYTORCH_CUDA_ALLOC_CONF": "mine"}
    assert {name: os.environ[name] for name in GPU_ENVIRONMENT} == expected


@pytest.mark.slow
def test_fp32_is_fp32_where_a_container_chooses_tf32():
    """PyTorch reads the variable when it is imported, so what sets it must not import PyTorch."""
    code = """
import sys
import nemo_pvs.cli.main, nemo_pvs.megatron.launch
from nemo_pvs.system.gpu_environment import set_gpu_environment
assert "torch" not in sys.modules
set_gpu_environment()
import torch
print(torch.get_float32_matmul_precision())
"""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "highest\n"


def test_a_local_launch_starts_nothing_if_a_stage_has_more_ranks_than_gpus(tmp_path, monkeypatch):
    recipe, profile = load_recipe("llama31_8b/minitron_width"), load_profile("local_gpu")
    todo = stages(recipe, "llama31_8b/minitron_width", tmp_path / "run", profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match=r"needs 128 ranks, but this machine has 8 GPUs; .* --launch"):
        launch(todo, recipe.name, tmp_path / "run", profile)
    assert not list(tmp_path.glob("run/nemo_run"))


def test_trainings_wait_for_each_other_on_one_machine_only(tmp_path):
    recipe = load_recipe("smollm2_135m/demo")
    local = stages(recipe, "smollm2_135m/demo", tmp_path, load_profile("local_cpu"))
    assert [stage.after for stage in local[1:]] == [[stage.name] for stage in local[:-1]]
    slurm = stages(recipe, "smollm2_135m/demo", tmp_path, load_profile("slurm_h100", SITE))
    assert [stage.after for stage in slurm[1:5]] == [["prepare"]] * 4
    assert slurm[5].after == [stage.name for stage in slurm[1:5]]


def test_stages_of_a_series_have_different_names(tmp_path):
    """Even if both the parent and the recipe sweep their learning rates."""
    sweep = {"sweep": [1.0e-3, 1.0e-2]}
    parent = {"extends": "paper_in_small/parent", "train": {"learning_rate": sweep}}
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    own = {"extends": "paper_in_small/quick", "parent": {"recipe": "parent.yaml"}, "train": {"learning_rate": sweep}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    recipe, run = load_recipe(tmp_path / "own.yaml"), tmp_path / "runs" / "own"
    names = [stage.name for stage in stages(recipe, "own.yaml", run, load_profile("slurm_h100", SITE))]
    assert len(names) == len(set(names))
    first, *_, last = [name for name in names if name.endswith("-prepare")]
    assert re.fullmatch(r"paper_in_small_parent-[0-9a-f]{10}-sweep-prepare", first)
    assert last == "sweep-prepare"


def test_masks_are_learned_before_anything_is_pruned(tmp_path):
    recipe = load_recipe("llama31_8b/sheared")
    made = stages(recipe, "llama31_8b/sheared", tmp_path, load_profile("slurm_h100", SITE))
    assert [(stage.name, stage.after) for stage in made[:4]] == [
        ("prepare-masks", []),
        ("masks-4b-shear", ["prepare-masks"]),
        ("prepare", ["masks-4b-shear"]),
        ("train-4b-shear-pruned-10B", ["prepare"]),
    ]
    assert made[1].layout.processes == 8
    assert str(tmp_path / "masks" / "4b-shear" / "run" / "job.json") in made[1].arguments
    assert made[-1].after == [stage.name for stage in made[3:-1]]


def test_masks_of_targets_that_differ_later_are_learned_once(tmp_path):
    recipe = load_recipe("smollm2_135m/methods")
    made = stages(recipe, "smollm2_135m/methods", tmp_path, load_profile("slurm_h100", SITE))
    learned = {stage.name for stage in made if stage.name.startswith("masks-")}
    assert learned == {f"masks-{method}_{size}" for method in ("sheared", "efficient") for size in ("quarter", "half")}


def test_what_is_trained_between_stages_is_prepared_stage_by_stage(tmp_path):
    recipe = load_recipe("adapt_pruner/llama31_8b")
    made = stages(recipe, "adapt_pruner/llama31_8b", tmp_path, load_profile("slurm_h100", SITE))
    by_name = {stage.name: stage for stage in made}
    assert made[0].name == "prepare-stage-1"
    for number in range(1, 10):  # of ten stages of one target and eight of the other, the last is the arm's training
        targets = ["4.5b-adapt", "4.5b-minitron"] if number < 8 else ["4.5b-adapt"]
        shares = [f"train-{target}-stage-{number}" for target in targets]
        assert [stage.name for stage in made if f"-stage-{number}" in stage.name][1:] == shares
        for share, target in zip(shares, targets, strict=True):
            assert by_name[share].after == [f"prepare-stage-{number}"]
            assert by_name[share].layout.processes == 128
            file = tmp_path / "train" / f"{target}-stages" / str(number) / "job.json"
            assert str(file) in by_name[share].arguments
        following = f"prepare-stage-{number + 1}" if number < 9 else "prepare"
        assert by_name[following].after == shares
    assert by_name["train-4.5b-adapt-pruned-10B"].after == ["prepare"]
    assert made[-1].name == "report"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "cloud"}, "kind"),
        ({"acount": "x"}, "unknown key acount; did you mean account?"),
        ({"sbatch": 3}, "sbatch: "),
        ({"account": "${PVS_NO_SUCH_VARIABLE}"}, "needs the variable PVS_NO_SUCH_VARIABLE; set it"),
        ({"gpus_per_node": 0}, "gpus_per_node: "),
    ],
)
def test_a_wrong_profile_gets_one_sentence(tmp_path, change, sentence):
    values = {"kind": "slurm", "account": "a", **change}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as raised:
        load_profile(str(tmp_path / "my.yaml"), {})
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_launch_page_describes_every_key():
    text = (Path(__file__).parents[2] / "launch" / "README.md").read_text()
    assert {
        key for block in (LocalProfile, SlurmProfile) for key in block.model_fields if f"`{key}`" not in text
    } == set()


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(UserError, match="slurm_h100"):
        load_profile("slrum")


def test_ranks_that_do_not_fill_nodes_are_refused(tmp_path):
    profile = load_profile("slurm_h100", SITE).model_copy(update={"gpus_per_node": 3})
    recipe = load_recipe("llama31_8b/minitron_width")
    with pytest.raises(UserError, match="128 ranks do not fill whole nodes of 3 GPUs"):
        scripts(stages(recipe, "llama31_8b/minitron_width", tmp_path, profile), "x", tmp_path, profile)


def test_a_container_must_see_the_run_folder(tmp_path):
    with pytest.raises(UserError, match="container_mounts"):
        _scripts("smollm2_135m/demo", "slurm_h100", tmp_path, {**SITE, "PVS_SHARED": "/lustre"})


@pytest.mark.parametrize("place", ["recipe", "data", "link"])
def test_a_container_must_see_what_the_recipe_names(tmp_path, monkeypatch, place):
    """In the job it would be a mistake of the user, after hours in the queue."""
    shared, home = tmp_path / "shared", tmp_path / "home"
    for folder in (shared, home):
        (folder / "data").mkdir(parents=True)
    (shared / "link").symlink_to(home / "data")
    monkeypatch.chdir(shared)
    profile = load_profile("slurm_h100", {**SITE, "PVS_SHARED": str(shared)})

    def submit(file: Path, data: str) -> None:
        recipe = {"extends": "smollm2_135m/demo", "data": {"source": data}}
        file.write_text(yaml.safe_dump(recipe))
        stages(load_recipe(file), str(file), shared / "run", profile)

    submit(shared / "mine.yaml", "data")
    wrong = {
        "recipe": (home / "mine.yaml", "data"),
        "data": (shared / "mine.yaml", str(home / "data")),
        "link": (shared / "mine.yaml", "link"),
    }
    with pytest.raises(UserError, match=rf"^{home}\S* is in none of the profile's container_mounts"):
        submit(*wrong[place])


def test_slurm_ranks_know_their_place(monkeypatch):
    from nemo_pvs.megatron.launch import _take_rank_from_slurm

    of_slurm = {"PROCID": 11, "LOCALID": 3, "NODEID": 1, "NTASKS": 16, "JOB_ID": 7}
    ours = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    for name in ours:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in of_slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)  # only set for --ntasks-per-node
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4(x2)")  # of the allocation
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")
    _take_rank_from_slurm()
    assert [os.environ[name] for name in ours] == ["11", "3", "1", "16", "8", "7", "29500"]


@pytest.mark.parametrize(
    ("counts", "tasks"), [("8(x2)", 8), ("8", 8), ("8(x2),8", 8), ("8,4", None), ("2(x3),1", None), ("", None)]
)
def test_every_node_has_the_same_number_of_tasks(monkeypatch, counts, tasks):
    from nemo_pvs.megatron.launch import _tasks_of_each_node

    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", counts)
    monkeypatch.delenv("SLURM_TASKS_PER_NODE", raising=False)
    if tasks:
        assert _tasks_of_each_node() == tasks
        return
    with pytest.raises(UserError, match=f"Slurm's tasks per node are {re.escape(counts) or 'not set'}, .* --ntasks"):
        _tasks_of_each_node()


def test_a_task_that_srun_did_not_start_is_told_so(monkeypatch, capsys):
    from nemo_pvs.megatron.launch import main

    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setenv(USER_ERROR_FILE, str(Path("no", "such", "folder")))  # as on a full disk
    assert main(["--slurm", "job.json"]) == 2
    said = "pvs: --slurm is for a task that srun starts, but SLURM_PROCID is not set; leave --slurm out.\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_every_launch_command_of_the_documents_works_as_a_dry_run(tmp_path, monkeypatch, capsys):
    from nemo_pvs.cli.main import main

    text = "\n".join(document.read_text() for document in DOCUMENTS)
    commands = re.findall(r"^ *pvs (run .*--launch \S+)", text, re.MULTILINE)
    assert commands
    for command in dict.fromkeys(commands):
        monkeypatch.setattr(sys, "argv", ["pvs", *command.split(), "--out", str(tmp_path / "run"), "--dry-run"])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        for name, value in SITE.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), capsys.readouterr().err
    assert "#SBATCH --nodes=16" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a dry run left something behind"
