"""The model card of what is published: figures and facts in, text out; reads no file.

Every fact comes from `psoft_export.json` or, for a PSOFT adapter, from its summary. A base or
adapter that was a local folder is called by the folder's name and gets no link.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from psoft_export.checkpoint.hub import is_hub_id
from psoft_export.manifest import basis_source

if TYPE_CHECKING:
    from psoft_export.inspection import AdapterSummary

PAPER = "https://arxiv.org/abs/2505.11235"
_HUB = "https://huggingface.co"
_OURS = re.compile(r"\n<!-- psoft-export card ([0-9a-f]{64}) -->\n\Z")
_TEMPLATE = ("# Model Card for Model ID", "[More Information Needed]")
_PATH = re.compile(r"(?<![\w:/.~])(?:~|\.\.?)?/[^\s;,()'\"`]+")
_TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_LEVELS = ("weights", "outputs")


def merged_card(
    manifest: Mapping[str, Any], files: Iterable[str], repo_id: str, base: str | None
) -> str:
    """The card of a merged checkpoint.

    Args:
        manifest: its `psoft_export.json`.
        files: the names of its files.
        repo_id: the repository that it goes to.
        base: Hub id of the base, to link it; None where it has none.
    """
    files = set(files)
    # With a head of its own a model is no longer the sentence encoder that the base's files say.
    pipeline = "modules.json" in files and str(manifest["model_class"]).endswith("Model")
    modules = manifest["modules"]
    deltas = [module["relative_delta"] for module in modules]
    angles = [m["largest_angle"] for m in modules if m["largest_angle"] is not None]
    angle = f"; largest rotation angle {max(angles):.1f}°" if angles else ""
    rounding = max(module["relative_rounding"] for module in modules)
    facts = {
        **_origin(manifest, base),
        "changed": f"{len(modules)} weights; ‖ΔW‖ / ‖W‖ from {min(deltas):.3g} to "
        f"{max(deltas):.3g}{angle}",
        "dtype": manifest["options"].get("dtype") or "each tensor as the base stores it",
        "rounding": f"‖merged − (W + ΔW)‖ / ‖ΔW‖ is {rounding:.1e} at most",
        **_basis(manifest),
        "made with": _tools(manifest),
    }
    use = _sentence_transformer(repo_id) if pipeline else _transformers(manifest, files, repo_id)
    sections = {
        "": f"{_first(manifest, base)} merged into its weights by psoft-export.\n\n{_table(facts)}",
        "Use": _python(use),
        "Equivalence": _verdict(manifest.get("verification") or {}),
        **_shared_end(manifest["warnings"], files, _named(manifest)),
    }
    library = "sentence-transformers" if pipeline else "transformers"
    tags = (_named(manifest)[0].lower(),)
    return _card(repo_id, sections, base, "finetune", library, tags)


def lora_card(
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Iterable[str],
    repo_id: str,
    base: str | None,
) -> str:
    """The card of a LoRA adapter; `config` is its `adapter_config.json`, the rest as above."""
    modules = manifest["modules"]
    error = max(module["relative_error"] for module in modules)
    change = "the same change of the weights"
    if manifest["options"].get("approximate") is not None:
        change = f"of rank {config['r']}, the nearest to its change of the weights"
    facts = {
        **_origin(manifest, base),
        "LoRA": f"rank {config['r']}, alpha {config['lora_alpha']}, {len(modules)} modules, "
        f"{manifest['options']['dtype']}",
        "error": f"‖lora_B lora_A · scaling − ΔW‖ / ‖ΔW‖ is {error:.1e} at most",
        **_basis(manifest),
        "made with": _tools(manifest),
    }
    sections = {
        "": f"{_first(manifest, base)} written as a LoRA adapter by psoft-export: {change}."
        f"\n\n{_table(facts)}",
        "Use": _python(_peft(_class(manifest["model_class"]), repo_id, base, _commit(manifest))),
        "Equivalence": "The error above is of the files written, against the adapter's ΔW "
        "in float64. Outputs were not compared.",
        **_shared_end(manifest["warnings"], files, _named(manifest)),
    }
    tags = (_named(manifest)[0].lower(), "lora")
    return _card(repo_id, sections, base, "adapter", "peft", tags)


def adapter_card(
    summary: "AdapterSummary", config: Mapping[str, Any], repo_id: str, base: str | None
) -> str:
    """The card of a PSOFT adapter; `config` is its `adapter_config.json`, the rest as above."""
    options = ", ".join(f"`{name}` {value}" for name, value in summary.options.items())
    angles = [layer.angles[0] for layer in summary.layers if layer.angles]
    angle = f"; largest rotation angle {max(angles):.1f}°" if angles else ""
    revision = _revision(config.get("revision"))
    facts = {
        "base": _link(base, revision) if base else "not known here",
        "method": f"[PSOFT]({PAPER}): {summary.method}",
        "options": options,
        "size": f"{summary.parameters:,} numbers in {len(summary.layers)} modules{angle}",
        "basis record": f"inside: {_plain(summary.record)}" if summary.record else "none",
    }
    base_class = (config.get("auto_mapping") or {}).get("base_model_class")
    known = base_class or _TASK_CLASSES.get(str(config.get("task_type")), "AutoModel")
    loaded = "folder" if summary.record else repo_id
    use = _peft(_class(known), loaded, base, revision, literal=not summary.record)
    warnings = []
    if summary.record:
        imports = ["import psoft_export", "from huggingface_hub import snapshot_download", *use[:2]]
        fetch = f'folder = snapshot_download("{repo_id}")'
        use = [*imports, "", fetch, *use[3:], "psoft_export.restore_basis(model, folder)"]
    else:
        warnings = [
            "No basis record is inside, so the adapter does not say which signs its singular "
            "vectors had in training. A machine whose SVD gives others computes another model, "
            "without a sign of it. Check the task loss."
        ]
    merge = f"psoft-export merge --base {_reference(base, revision)} --adapter {repo_id}"
    sections = {
        "": f"A PSOFT adapter of {_link(base, None) if base else 'a base that it does not name'}, "
        f"in PEFT's format.\n\n{_table(facts)}",
        "Use": f"{_python(use)}\n\nOr as a checkpoint of its own:\n\n"
        f"```sh\n{merge} --output merged\n```",
        **_shared_end(warnings, (), ("PSOFT", PAPER)),
    }
    return _card(repo_id, sections, base, "adapter", "peft", ("psoft",))


def is_handwritten(text: str) -> bool:
    """Whether a card holds anyone's words: not PEFT's empty form, nor our card as we wrote it."""
    if all(mark in text for mark in _TEMPLATE):
        return False
    signed = _OURS.search(text)
    return not signed or _digest(text[: signed.start()]) != signed[1]


def _card(
    repo_id: str,
    sections: Mapping[str, str],
    base: str | None,
    relation: str,
    library: str,
    tags: Sequence[str],
) -> str:
    # What merges of several models have is the relation 'merge'; of one and its adapter,
    # 'finetune' (Hub documentation, "Specifying a base model").
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        tags=[tags[0], "psoft-export", *tags[1:]],
    )
    parts = [f"# {repo_id.rpartition('/')[2]}"]
    parts += [f"## {name}\n\n{text}" if name else text for name, text in sections.items()]
    body = "\n\n".join(parts)
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))
    return f"{text}\n<!-- psoft-export card {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first(manifest: Mapping[str, Any], base: str | None) -> str:
    adapter = manifest["adapter"]
    name = _link(adapter["name"], None) if adapter["kind"] == "hub" else _code(adapter["name"])
    on = _link(base, None) if base else _code(manifest["base"]["name"])
    return f"{on} with the {_plain(_named(manifest)[0])} adapter {name}"


def _named(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The method's name and the address of its paper."""
    adapter = manifest["adapter"]
    return str(adapter.get("method_name", "PSOFT")), str(adapter.get("paper", PAPER))


def _origin(manifest: Mapping[str, Any], base: str | None) -> dict[str, str]:
    """Base, adapter and method."""
    adapter = manifest["adapter"]
    ranks = [m["rank"] for m in manifest["modules"] if m["rank"] is not None]
    name, paper = _named(manifest)
    rows = {side: _source(manifest[side]) for side in ("base", "adapter")}
    if base and manifest["base"]["kind"] != "hub":
        rows["base"] += f"; the adapter's config names {_link(base, None)} as its base"
    method = _plain(adapter.get("method") or "")
    rank = f", rank {max(ranks)}" if ranks else ""
    rows["method"] = f"[{_plain(name)}]({paper}){': ' + method if method else ''}{rank}"
    return rows


def _source(record: Mapping[str, Any]) -> str:
    if record["kind"] == "hub":
        return _link(record["name"], _revision(record["revision"]))
    return f"{_code(record['name'])}, a local folder (its SHA-256 are in `psoft_export.json`)"


def _link(repo_id: str, revision: str | None) -> str:
    if not is_hub_id(repo_id):
        return _code(repo_id)
    if revision is None:
        return f"[{repo_id}]({_HUB}/{repo_id})"
    return f"[{repo_id}]({_HUB}/{repo_id}/tree/{revision}) at `{revision}`"


def _commit(manifest: Mapping[str, Any]) -> str | None:
    base = manifest["base"]
    return _revision(base["revision"]) if base["kind"] == "hub" else None


def _revision(name: object) -> str | None:
    """A revision, if it is safe to print as code."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w./-]+", name) else None


def _basis(manifest: Mapping[str, Any]) -> dict[str, str]:
    basis = manifest["basis"]
    record, source = basis["record"], basis_source(basis)
    if source == "none":
        return {}
    if source == "stored":
        return {"basis": f"A and B as the adapter's {_code(basis['stored'])} holds them"}
    known = [module["basis_uncertainty"] for module in manifest["modules"]]
    if record is None:
        origin = "not recorded; see below"
    else:
        origin = f"recorded ({record['kind']}; {_plain(record['svd'])})"
    if None not in known:
        origin += f"; precision leaves {max(known):.1e} of ΔW open at most"
    return {"basis": origin}


def _tools(manifest: Mapping[str, Any]) -> str:
    names = {"psoft_export": "psoft-export"}
    tools = manifest["tool"].items()
    return ", ".join(f"{names.get(name, name)} {_plain(version)}" for name, version in tools)


def _transformers(manifest: Mapping[str, Any], files: set[str], repo_id: str) -> list[str]:
    name = _class(manifest["model_class"])
    tokenizer = "tokenizer_config.json" in files
    names = sorted([name, *(["AutoTokenizer"] if tokenizer else [])])
    lines = [f"from transformers import {', '.join(names)}", ""]
    lines.append(f'model = {name}.from_pretrained("{repo_id}")')
    if tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
    return lines


def _sentence_transformer(repo_id: str) -> list[str]:
    load = f'model = SentenceTransformer("{repo_id}")'
    return ["from sentence_transformers import SentenceTransformer", "", load]


def _peft(
    name: str, adapter: str, base: str | None, revision: str | None, *, literal: bool = True
) -> list[str]:
    """Lines that load base and adapter; `adapter` is a Hub id, or a variable's name."""
    pinned = f', revision="{revision}"' if base and revision else ""
    source = f'"{base}"' if base else '"BASE"'
    note = "" if base else "  # the base that the adapter was trained on"
    quoted = f'"{adapter}"' if literal else adapter
    return [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({source}{pinned}){note}",
        f"model = PeftModel.from_pretrained(base, {quoted})",
    ]


def _reference(base: str | None, revision: str | None) -> str:
    return (f"{base}@{revision}" if revision else base) if base else "BASE"


def _class(name: object) -> str:
    """A class name, safe to print as code."""
    return str(name) if str(name).isidentifier() else "AutoModel"


def _verdict(verification: Mapping[str, Any]) -> str:
    levels = [verification.get(level) for level in _LEVELS]
    if not any(levels):
        return (
            "Not checked: nothing compared this checkpoint with its base and adapter after it was "
            "written."
        )
    weights, outputs = levels
    lines = []
    if weights and weights.get("equivalent") is True:
        lines.append(
            f"Weights: **equivalent**. Against W + ΔW in float64, the {weights['merged_tensors']} "
            f"merged tensors are off by {weights['largest_error_ulp']:.3g} units in the last "
            f"place at most (0.5 is perfect); {weights['not_nearest']} entries are not the "
            f"nearest number; the relative error of a tensor is "
            f"{weights['largest_relative_error']:.1e} at most. {weights['copied_tensors']} "
            f"tensors are the base's, {weights['saved_tensors']} the adapter's own."
        )
    else:
        lines.append("Weights: not checked.")
    lines.append(_outputs(outputs) if outputs else "Outputs: not checked.")
    return "\n".join(f"- {line}" for line in lines)


def _outputs(outputs: Mapping[str, Any]) -> str:
    if outputs.get("skipped"):
        return f"Outputs: not compared ({_plain(outputs['skipped'])})."
    merged, unmerged = outputs["merged"], outputs["unmerged"]
    text = (
        f"Outputs: **equivalent**. {_plain(outputs['output'])} of {_plain(outputs['inputs'])}, "
        f"{outputs['positions']} positions, in {outputs['dtype']}: "
        f"{merged['rms']:.2e} root mean square from base and adapter run unmerged in "
        f"{outputs['truth']}; unmerged in {outputs['dtype']} they are {unmerged['rms']:.2e} away."
    )
    if merged.get("top1") is not None:
        text += f" The largest logit is the same at {merged['top1']:.2%} of the positions."
    if generation := outputs.get("generation"):
        text += (
            f" Greedy generation follows for {generation['merged']:.1%} of "
            f"{generation['tokens']} tokens."
        )
    if losses := outputs.get("losses"):
        said = ", ".join(f"{_plain(name)} {value:.4f}" for name, value in losses.items())
        text += f" Task loss in nats per token: {said}."
    return text


def _shared_end(
    warnings: Iterable[str], files: Iterable[str], method: tuple[str, str]
) -> dict[str, str]:
    """What to know of it, whose licence, and what to cite: the method's name and paper."""
    notes = [_plain(warning) for warning in warnings]
    notes = [note[:1].upper() + note[1:].rstrip(".") + "." for note in notes]
    legal = sorted(n for n in files if n.upper().startswith(("LICENSE", "LICENCE", "NOTICE")))
    if legal:
        notes.append(f"The base's licence is in {', '.join(map(_code, legal))}.")
    sections = {"What to know": "\n".join(f"- {note}" for note in notes)} if notes else {}
    name, paper = method
    arxiv = paper.rpartition("/")[2]
    return sections | {"Citation": f"The method is {_plain(name)}: arXiv {arxiv}, {paper}"}


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for name, value in rows.items():
        lines.append(f"| {name} | {value.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _python(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', '').split())}`"


def _plain(text: object) -> str:
    """A text on one line without markup or links; of local paths only the last part is left."""
    line = " ".join(str(text).split())
    line = _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], line)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line).replace("<", "&lt;").replace("://", "&#58;//")
