"""Checking whether vLLM and SGLang would serve an adaptation on a base, and answer as it was tuned to.

The rules are those of `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, `vllm/lora/utils.py`,
`vllm/config/lora.py` and `vllm/plugins/lora_resolvers/filesystem_resolver.py`, and of
`sglang/srt/lora/{lora_config,lora_manager,lora,utils}.py`, as of 2026.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from regraft.adaptation.adaptation import Adaptation
from regraft.adaptation.load import load_adaptation
from regraft.adaptation.lora import A_SUFFIX, B_SUFFIX, PEFT_PREFIX, is_initialised_from_base
from regraft.adaptation.merge import UNMERGEABLE_SETTINGS
from regraft.adaptation.servable_tokens import tokenizer_problems
from regraft.base import Base
from regraft.checkpoint import shape_of
from regraft.errors import MAX_LISTED, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Server = Literal["vLLM", "SGLang"]
Severity = Literal["refused", "wrong", "setting"]
SERVERS: tuple[Server, ...] = ("vLLM", "SGLang")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank` (`MaxLoRARanks` in `vllm/config/lora.py`)."""
VLLM_DEFAULT_RANK = 16
"""The value of `--max-lora-rank` if it is left out."""
FACTOR_SUFFIXES = (A_SUFFIX, B_SUFFIX, ".lora_embedding_A", ".lora_embedding_B")
"""The endings of the only tensors that vLLM accepts (`parse_fine_tuned_lora_name` in `vllm/lora/utils.py`)."""
IGNORED_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""The endings of the tensors that vLLM skips (`is_base_embedding_weights` in `vllm/lora/utils.py`)."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""The embeddings and output layers that the servers can adapt, by their names in `embedding_modules` of vLLM's models
and in SGLang's `EMBEDDING_NAMES`."""
LINEAR_CLASSES = ("Linear", "Conv1D")
"""The classes of transformers whose layers are a `LinearBase` in vLLM, which adapts them all
(`get_supported_lora_modules` in `vllm/lora/utils.py`)."""
SGLANG_MODULES = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "qkvr",
        "o_proj",
        "out_proj",
        "wo_ud",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
        "in_proj",
        "in_proj_qkv",
        "in_proj_q",
        "in_proj_k",
        "in_proj_v",
        "in_proj_z",
        "in_proj_qkvz",
        "fc1_latent_proj",
        "fc2_latent_proj",
        "q_a_proj",
        "kv_a_proj_with_mqa",
        "fused_qkv_a_proj_with_mqa",
        "q_b_proj",
        "kv_b_proj",
        "embed_tokens",
        "lm_head",
    }
)
"""The names of modules that SGLang can adapt (`_KNOWN_LORA_TARGET_MODULES` and the names that
`get_normalized_target_modules` maps to them, in `sglang/srt/lora/utils.py`)."""
CONVERT = "convert it to full (regraft adaptation convert --to full), and serve that as a model of its own"


@dataclasses.dataclass(frozen=True)
class ServingProblem:
    """A reason why a server would not serve an adaptation as it was tuned, or a setting that it needs.

    Args:
        server: `vLLM` or `SGLang`.
        severity: `refused` if the server does not load it, `wrong` if it loads it and computes something else, and
            `setting` if it serves it with the setting that `remedy` names.
        problem: What the server does, and why.
        remedy: The server's setting, or how to get an adaptation that it serves.
    """

    server: Server
    severity: Severity
    problem: str
    remedy: str

    @property
    def blocks(self) -> bool:
        """Whether the server cannot serve the adaptation as it is."""
        return self.severity != "setting"


def check_servable(
    adaptation: Adaptation | str | Path, base: Base | str | Path, served_base: str | None = None
) -> list[ServingProblem]:
    """Check whether vLLM and SGLang would serve an adaptation on a base, without starting them.

    Args:
        adaptation: The adaptation, or its folder.
        base: The base that the server loads.
        served_base: The path or hub id that `vllm serve` gets as the model; None if it is not known.

    Returns:
        The problems, in the order of `SERVERS`; a server without one that blocks serves it.

    Raises:
        CheckpointError: A file is missing, truncated or malformed.
    """
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    base = base if isinstance(base, Base) else Base.open(base)
    problems = _kind_problems(adaptation)
    if not problems:
        shared = [*_shared_problems(adaptation, base), *tokenizer_problems(adaptation, base)]
        problems = [
            *_vllm_problems(adaptation, base, served_base),
            *_sglang_problems(adaptation),
            *(
                ServingProblem(server, severity, text, remedy)
                for server in SERVERS
                for severity, text, remedy in shared
            ),
        ]
    return [problem for server in SERVERS for problem in problems if problem.server == server]


def servers_named(names: Sequence[str]) -> tuple[Server, ...]:
    """Return the servers of some names, in any case; all servers for no names.

    Args:
        names: Names of servers.

    Raises:
        RecipeError: A name is not that of a server in `SERVERS`.
    """
    known = {server.lower(): server for server in SERVERS}
    if unknown := [name for name in names if name.lower() not in known]:
        raise RecipeError(f"a server must be {' or '.join(known)}, found {unknown[0]!r}.")
    return tuple(known[name.lower()] for name in names) or SERVERS


def _kind_problems(adaptation: Adaptation) -> list[ServingProblem]:
    """Return the problems of anything that is not a LoRA, for which no other rule is looked at.

    Source: SGLang's `LoRAAdapter` and vLLM's resolver compare `peft_type` with LORA; vLLM's `PEFTHelper` needs `r` and
    `lora_alpha`.
    """
    if adaptation.kind == "full":
        commands: dict[Server, str] = {"vLLM": "vllm serve", "SGLang": "python -m sglang.launch_server --model-path"}
        return [
            ServingProblem(
                server, "setting", "it is a whole model, not an adapter", f"serve it alone: {command} {adaptation.path}"
            )
            for server, command in commands.items()
        ]
    if adaptation.config.get("peft_type") == "LORA":
        return []
    remedy = "tune a LoRA (regraft tune --kind lora)" if adaptation.num_virtual_tokens else CONVERT
    problem = f"it is of kind {adaptation.kind}, and only LoRAs are loaded"
    return [ServingProblem(server, "refused", problem, remedy) for server in SERVERS]


def _shared_problems(adaptation: Adaptation, base: Base) -> Iterator[tuple[Severity, str, str]]:
    """Yield severity, problem and remedy of what neither server supports."""
    config, names = adaptation.config, list(adaptation.checkpoint.tensors)
    if config.get("use_dora"):  # vLLM: PEFTHelper._validate_features; SGLang: LoRAManager.validate_new_adapter
        yield "refused", "it is a DoRA", f"{CONVERT}, or tune a LoRA"
    # neither server's config has these settings: both add scaling·B·A to the base's own weights
    if is_initialised_from_base(init := config.get("init_lora_weights", True)):
        remedy = "recycle or convert it with regraft, which writes the equivalent plain LoRA"
        yield "wrong", f"it was initialised by {init!r}, which changed the base's weights", remedy
    if special := [key for key in UNMERGEABLE_SETTINGS if config.get(key)]:
        yield "wrong", f"its settings {', '.join(special)} are ignored", "tune a LoRA without them"
    absent = sorted(module for module in _modules(names) if module not in _base_modules(base))
    if absent and not config.get("target_parameters"):
        listed = _list(absent)
        remedy = "recycle it onto this base"
        yield "wrong", f"{len(absent)} of its modules are not in the base ({listed}), and are ignored", remedy
    changed = [name for name in names if name.endswith(IGNORED_EMBEDDINGS) and not _equals_base(adaptation, name, base)]
    if changed:  # PEFT stores embeddings to which a LoRA is applied; servers use the base's
        yield "wrong", f"{_list(changed)} differ from the base's, and are ignored", CONVERT
    # vLLM: LoRAModel.from_lora_tensors; SGLang allocates the base's number of rows
    token_rows = {
        name: shape_of(adaptation.checkpoint, name)[1 if name.endswith("A") else 0]
        for name in names
        if name.endswith((".lora_embedding_A", f".lm_head{B_SUFFIX}"))
    }
    if differing := [name for name, rows in token_rows.items() if rows != base.embedding_rows]:
        problem = f"{differing[0]} has {token_rows[differing[0]]:,} tokens, the base {base.embedding_rows:,}"
        yield "refused", problem, CONVERT


def _vllm_problems(adaptation: Adaptation, base: Base, served_base: str | None) -> Iterator[ServingProblem]:
    config, names = adaptation.config, list(adaptation.checkpoint.tensors)

    def problem(severity: Severity, text: str, remedy: str) -> ServingProblem:
        return ServingProblem("vLLM", severity, text, remedy)

    if modules := config.get("modules_to_save"):  # PEFTHelper._validate_features
        yield problem("refused", f"it stores whole modules (modules_to_save: {_list(modules)})", CONVERT)
    # PEFTHelper.validate_legal; parse_fine_tuned_lora_name refuses the tensor of lora_bias
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield problem("refused", "it stores biases", CONVERT)
    elif not (modules or config.get("use_dora")):
        other = sorted(name for name in names if not name.endswith((*FACTOR_SUFFIXES, *IGNORED_EMBEDDINGS)))
        if config.get("trainable_token_indices"):
            yield problem("refused", "it stores rows of tokens (trainable_token_indices)", CONVERT)
        elif other:
            yield problem("refused", f"it stores tensors that are no factors of a LoRA ({_list(other)})", CONVERT)
    if patterns := _overrides(config):  # PEFTHelper has no such fields: from_dict drops them
        text = f"it ignores {' and '.join(patterns)}: all modules have the rank r and the scale of lora_alpha"
        yield problem("wrong", text, _uniform_remedy(adaptation))
    rank = max([_number(config.get("r")), *(_number(value) for value in (config.get("rank_pattern") or {}).values())])
    if rank > VLLM_RANKS[-1]:  # PEFTHelper.validate_legal
        remedy = f"regraft adaptation convert --to lora --rank {VLLM_RANKS[-1]}"
        yield problem("refused", f"its rank is {rank}; at most {VLLM_RANKS[-1]} is served", remedy)
    elif rank > VLLM_DEFAULT_RANK:
        flag = f"--max-lora-rank {next(value for value in VLLM_RANKS if value >= rank)}"
        yield problem("setting", f"its rank is {rank}, above the default of {VLLM_DEFAULT_RANK}", flag)
    # check_unexpected_modules in LoRAModel.from_local_checkpoint; get_supported_lora_modules
    modules_of_base = _base_modules(base)
    targets = {
        module.rpartition(".")[2]: modules_of_base[module] for module in _modules(names) & modules_of_base.keys()
    }
    unsupported = sorted(
        name for name, kind in targets.items() if name not in (*EMBEDDINGS, "experts") and kind not in LINEAR_CLASSES
    )
    if unsupported:
        yield problem("refused", f"it cannot adapt {_list(unsupported)}", CONVERT)
    if embeddings := sorted(targets.keys() & set(EMBEDDINGS)):
        text = f"{_list(embeddings)} can be adapted only in models whose class has `embedding_modules`, such as Llama's"
        yield problem("setting", text, f"look up the class of {base.config.model_type} in vLLM")
    if config.get("target_parameters"):
        yield problem("setting", "it adapts fused experts, which old versions cannot", "use a version of 2026")
    # FilesystemResolver: another string is silently no adapter
    recorded = config.get("base_model_name_or_path")
    rule = "the filesystem resolver loads it only if `vllm serve` got the recorded base"
    if served_base is None:
        yield problem("setting", f"{rule}, as a string", f"vllm serve {recorded}, or --lora-modules NAME=FOLDER")
    elif served_base != recorded:
        remedy = f"set base_model_name_or_path: regraft recycle --served-base {served_base}"
        yield problem(
            "refused", f"{rule}: {recorded!r}, not {served_base!r}", f"{remedy}; or --lora-modules NAME=FOLDER"
        )


def _sglang_problems(adaptation: Adaptation) -> Iterator[ServingProblem]:
    config, names = adaptation.config, list(adaptation.checkpoint.tensors)

    def problem(severity: Severity, text: str, remedy: str) -> ServingProblem:
        return ServingProblem("SGLang", severity, text, remedy)

    # LoRAAdapter._process_weight takes over factors alone: it skips embeddings and heads that are no targets
    other = sorted(
        name for name in names if not name.endswith((*FACTOR_SUFFIXES, ".lora_magnitude_vector", *IGNORED_EMBEDDINGS))
    )
    if other or config.get("modules_to_save"):
        kinds = {
            "modules_to_save": config.get("modules_to_save"),
            "trainable_token_indices": config.get("trainable_token_indices"),
            "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        }
        named = " and ".join(name for name, value in kinds.items() if value) or _list(other)
        yield problem("wrong", f"it takes over the factors of the LoRA alone, without {named}", CONVERT)
    uniform = _uniform_remedy(adaptation)
    if patterns := _overrides(config):  # LoRAManager.validate_new_adapter; older versions ignore them
        yield problem("refused", f"it has {' and '.join(patterns)}", uniform)
    if config.get("use_rslora"):  # LoRAAdapter: scaling = lora_alpha / r
        yield problem("wrong", "it ignores use_rslora: the scale is lora_alpha / r", uniform)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):  # get_normalized_target_modules
        yield problem("refused", f"its target_modules are a regular expression ({targets!r:.60})", uniform)
    unsupported = sorted({module.rpartition(".")[2] for module in _modules(names)} - SGLANG_MODULES)
    if unsupported and not config.get("target_parameters"):  # get_default_hidden_dim
        yield problem("refused", f"it cannot adapt {_list(unsupported)}", CONVERT)


def _uniform_remedy(adaptation: Adaptation) -> str:
    """Return the command that writes a LoRA with one rank and one scale."""
    return f'python -c "from regraft.adaptation import write_uniform; write_uniform({str(adaptation.path)!r})"'


def _overrides(config: dict[str, Any]) -> list[str]:
    """Return the patterns that set another value than the adapter's, as SGLang's `_pattern_overrides` does."""
    defaults = {"rank_pattern": config.get("r"), "alpha_pattern": config.get("lora_alpha")}
    return [
        name
        for name, default in defaults.items()
        if any(value != default for value in (config.get(name) or {}).values())
    ]


def _modules(names: Sequence[str]) -> set[str]:
    """Return the modules that have factors, by their names in the model."""
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(suffix)
        for name in names
        for suffix in FACTOR_SUFFIXES
        if name.endswith(suffix)
    }


def _base_modules(base: Base) -> dict[str, str]:
    """Return the names of a base's modules in its causal language model, with the names of their classes."""
    model = base.model_with_head("AutoModelForCausalLM") if base.is_decoder else base.classifier
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _equals_base(adaptation: Adaptation, name: str, base: Base) -> bool:
    """Return whether a stored embedding or output layer is the base's, which may store one for both."""
    import torch

    plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    candidates = (plain, plain.removeprefix(f"{base.prefix}."), base.body[str(base.architecture.embeddings)])
    weight = base.checkpoint[next(candidate for candidate in candidates if candidate in base.checkpoint)]
    stored = adaptation.checkpoint[name]
    return torch.equal(stored, weight.to(stored.dtype))


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _list(names: Sequence[str]) -> str:
    return ", ".join([*list(names)[:MAX_LISTED], *(["…"] if len(names) > MAX_LISTED else [])])
