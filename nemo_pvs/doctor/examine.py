"""The doctor's fast examination, and its lines in the log of a training."""

from __future__ import annotations

from nemo_pvs.doctor.finding import Finding
from nemo_pvs.doctor.node import Node, check_node
from nemo_pvs.doctor.packages import (
    check_dependencies,
    check_packages,
    check_python,
    check_transformer_engine,
    our_requirements,
)


def examine(*, build: bool = False, node: Node | None = None) -> list[Finding]:
    """Look at Python, packages, GPUs and limits, without importing NeMo; this takes seconds.

    Args:
        build: An image for GPUs is being built: Transformer Engine must be there, and GPUs are not looked for.
        node: The machine; by default this one.
    """
    node = node or Node.here()
    return [
        check_python(),
        *check_packages(our_requirements()),
        *check_dependencies(our_requirements()),
        *check_transformer_engine(gpu=node.torch_gpus > 0, build=build),
        *check_node(node, build=build),
    ]


def log_lines() -> list[str]:
    """Return the first lines of a training's log: the node and what it has, then a line for everything that is wrong.

    An examination that fails is one line and stops nothing: training itself will show whether it works.
    """
    try:
        node = Node.here()
        findings = examine(node=node)
    except Exception as error:
        return [f"pvs doctor: the examination of this node failed: {error!r}"]
    fine = "; ".join(f"{finding.subject} {finding.text}" for finding in findings if finding.level == "ok")
    wrong = [f"pvs doctor: {finding.line()}" for finding in findings if finding.level in ("warn", "FAIL")]
    return [f"pvs doctor on {node.host}: {fine}", *wrong]
