"""The command `hybridattn eval`: run lm-eval with this package's tasks and checks; report scores by length and depth.

Importing this module requires lm-eval.
"""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from hybridattn.evals.lm_eval import heatmap, positions, scores
from hybridattn.evals.lm_eval.harness import UnsoundError, truncated
from hybridattn.evals.lm_eval.tasks import TASKS, filler
from hybridattn.evals.lm_eval.tasks.grid import counter
from hybridattn.measure.output_folder import RESULTS, check_output, written_aside
from hybridattn.measure.provenance import commit, installed_version, json_sha256, provenance
from lm_eval._cli import HarnessCLI
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import setup_logging


def evaluate(
    model: str,
    flags: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    out: Path = Path("reports/eval"),
    allow_truncation: bool = False,
    trained_length: int | None = None,
) -> bool:
    """Score a checkpoint with lm-eval; write ``results.json``, ``report.md``, a heat map per task and lm-eval's files.

    Answers are cached next to ``out`` until the run is complete, so that the same command resumes an interrupted run.

    Args:
        model: folder of any Hugging Face checkpoint of a causal language model, or its name on the Hub.
        flags: flags of ``lm_eval run``, including ``--tasks``.
        lengths: lengths of prompt and answer in tokens; by default `grid.LENGTHS`, up to the model's maximum input.
        out: the folder to write, atomically; it replaces an earlier report.
        allow_truncation: whether prompts may be longer than the model's maximum input.
        trained_length: sequence length of the model's training, in tokens. If given, bits per token by position are
            measured at this length and up to 16 times it.

    Returns:
        Whether the model was scored; if not, the reason was printed.

    Raises:
        ValueError: a bad argument; the message has its name, the expected and the given value.
    """
    check_output(out)
    setup_logging()
    args = parse(flags)
    if not (args.tasks or args.config):
        raise ValueError("tasks: expected names of tasks or groups such as recall_offline, got none")
    args.model_args = {"pretrained": model, "allow_truncation": allow_truncation, **(args.model_args or {})}
    if "max_length" not in args.model_args:
        args.model_args["max_length"] = max(longest_input(args.model_args), *(lengths or [0]))
    if args.model_args["max_length"] < 1:
        raise ValueError(
            "lengths: expected --lengths, or max_length in --model_args, since configuration and tokenizer have no "
            f"maximum length, got neither for {model}"
        )
    if trained_length is not None and trained_length < 1:
        raise ValueError(f"trained_length: expected a positive number of tokens, got {trained_length}")
    if lengths:
        args.metadata = {"max_seq_lengths": list(lengths), **(args.metadata or {})}
    args.include_path = [TASKS, *([args.include_path] if args.include_path else [])]
    args.log_samples = True
    cached = Path(f"{os.path.abspath(out)}.answers_{fingerprint(args.model_args)}")
    args.use_cache = f"{args.use_cache}_{cached.name.rpartition('_')[2]}" if args.use_cache else str(cached / "answers")
    try:
        with written_aside(out) as folder:
            args.output_path = str(folder / "lm_eval")
            args.func(args)
            report(folder, args, trained_length)
    except UnsoundError as error:
        print(f"hybridattn: {error}", file=sys.stderr)
        return False
    shutil.rmtree(cached, ignore_errors=True)
    print(f"\n{(out / 'report.md').read_text(encoding='utf-8')}\nIn {out}: {', '.join(sorted(os.listdir(out)))}")
    return True


def parse(flags: Sequence[str]) -> Namespace:
    """Parse flags with lm-eval's own command line, which reads them only from ``sys.argv``."""
    before, sys.argv = sys.argv, ["lm_eval", "run", "--model", "hybridattn", *flags]
    try:
        return HarnessCLI().parse_args()
    finally:
        sys.argv = before


def longest_input(model_args: dict[str, Any]) -> int:
    """Return the maximum input length in a checkpoint's configuration or tokenizer, in tokens; 0 if neither has one.

    lm-eval would assume 2048 tokens instead of 0.
    """
    trust = {"trust_remote_code": bool(model_args.get("trust_remote_code"))}
    config = AutoConfig.from_pretrained(model_args["pretrained"], **trust)
    tokenizer = AutoTokenizer.from_pretrained(model_args.get("tokenizer", model_args["pretrained"]), **trust)
    return resolve_max_length(config, tokenizer, default=0)


def fingerprint(model_args: dict[str, Any]) -> str:
    """Return a key for a model's cached answers: a hash of its arguments, files, code and package versions."""
    folder = Path(model_args["pretrained"])
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = {name: installed_version(name) for name in ("hybridattn", "torch", "transformers")}
    return json_sha256([model_args, stats, versions, commit(Path(__file__))])[:16]


def report(folder: Path, args: Namespace, trained_length: int | None = None) -> None:
    """Write ``results.json``, ``report.md`` and heat maps from lm-eval's files in ``folder / "lm_eval"``."""
    (written,) = (folder / "lm_eval").rglob("results_*.json")
    aggregated = json.loads(written.read_text(encoding="utf-8"))
    samples = dict(scores.read_samples(folder / "lm_eval"))
    tasks = {task: scores.summary(rows) for task, rows in samples.items() if "contains" in rows[0]}
    config = {
        name: getattr(args, name, None)
        for name in ("model_args", "metadata", "tasks", "limit", "num_fewshot", "batch_size", "gen_kwargs", "seed")
    }
    config["trained_length"] = trained_length
    config["lm_eval"] = installed_version("lm-eval")
    config["filler_sha256"] = filler.sha256() if any("cells" in found for found in tasks.values()) else None
    results = {
        "provenance": provenance(config),
        "model": args.model_args["pretrained"],
        "device": aggregated["config"]["device_name"],
        "parity": aggregated["config"]["parity"],
        "truncated": count_truncated(samples, args.model_args),
        "tasks": tasks,
        "positions": None if trained_length is None else positions_of(args.model_args, trained_length),
        "metrics": aggregated["results"],
    }
    for task, found in tasks.items():
        if panels := scores.panels(found):
            heatmap.draw(panels, folder / f"{task}.png", title=f"{task}: {found['contains']:.3f}")
    (folder / "report.md").write_text(scores.report(results), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def positions_of(model_args: dict[str, Any], trained_length: int) -> dict[str, Any]:
    """Measure bits per token by position for the model in ``model_args``."""
    options = {name: model_args[name] for name in ("trust_remote_code", "dtype") if name in model_args}
    return positions.extrapolation_of(model_args["pretrained"], trained_length, **options)


def count_truncated(samples: dict[str, list[dict[str, Any]]], model_args: dict[str, Any]) -> int:
    """Count the prompts that were truncated, including prompts whose answers come from an interrupted run's cache."""
    if not model_args["allow_truncation"]:
        return 0  # `CheckedLM` raises for a truncated prompt
    count = counter(
        model_args.get("tokenizer", model_args["pretrained"]),
        bool(model_args.get("trust_remote_code")),
        model_args.get("add_bos_token"),
    )
    requests = [list(each.values()) for rows in samples.values() for row in rows for each in row["arguments"].values()]
    return truncated([request for request in requests if len(request) == 2], count, model_args["max_length"])
