"""The health of answers, and the answers of the old deployment and of each method side by side."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.report.page import AnswerBrowser, Block
from regraft.report.views import table_block
from regraft.task.types import task_types

if TYPE_CHECKING:
    from regraft.report.find import Run
    from regraft.report.summaries import Setting


def answer_blocks(setting: Setting) -> list[Block]:
    """Show the answers of a setting's runs, those of the first seed of each method.

    Args:
        setting: A setting, whose runs have answers if its task type writes any.

    Returns:
        The table of the answers' health, and a list of answers for each method beside the old deployment's.
    """
    runs: dict[str, Run] = {}
    for run in setting.runs:
        if run.answers.get(setting.split):
            runs.setdefault(run.record.method, run)
    if not runs:
        return []
    task_type = task_types()[setting.type]
    methods = [summary.method for summary in setting.summaries if summary.method in runs]
    answers = {method: runs[method].answers[setting.split] for method in methods}
    old_answers = {"old deployment": setting.old_answers} if setting.old_answers else {}
    health = task_type.answer_health({**old_answers, **answers})
    blocks: list[Block] = []
    if health:
        blocks.append(table_block(dataclasses.replace(health, title=f"{health.title}: {setting.description}")))
    for method in methods if setting.old_answers else ():
        pairs = task_type.answer_pairs(setting.old_answers, answers[method])
        if pairs and method != "scratch":
            blocks.append(AnswerBrowser(f"{method}: {pairs.title[:1].lower()}{pairs.title[1:]}", pairs.pairs))
    return blocks
