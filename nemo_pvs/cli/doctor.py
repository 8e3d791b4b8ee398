"""The verb about this machine: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_pvs.system.progress import console


def doctor(
    deep: Annotated[
        bool,
        typer.Option(help="also import NeMo, sum a tensor over all GPUs, and train, save and resume a tiny model"),
    ] = False,
    build: Annotated[
        bool, typer.Option(help="for a Dockerfile: check and import what an image needs, without looking for GPUs")
    ] = False,
) -> None:
    """Say whether this machine can train, and how to fix what is wrong; exit code 2 if it cannot."""
    from nemo_pvs.doctor.examine import examine
    from nemo_pvs.doctor.finding import Finding, failed, verdict
    from nemo_pvs.doctor.node import Node
    from nemo_pvs.errors import UserError

    if deep and build:
        raise UserError("--deep trains on this machine, and --build is for one without GPUs; give only one of them.")
    node = Node.here()
    findings: list[Finding] = []

    def show(found: Finding) -> None:
        findings.append(found)
        console.print(found.line(), soft_wrap=True)

    for finding in examine(build=build, node=node):
        show(finding)
    if build and not failed(findings):
        from nemo_pvs.doctor.deep import import_all

        show(import_all())
    if deep and not failed(findings):
        from nemo_pvs.doctor.deep import try_everything

        for finding in try_everything(node.torch_gpus):
            show(finding)
    last = verdict(findings, gpus=node.torch_gpus, build=build)
    if failed(findings):
        raise UserError(last)
    console.print(last, soft_wrap=True)
