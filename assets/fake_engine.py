"""Scripted replies instead of vLLM: a fork trains a few steps in seconds, without a GPU or a model that can write.

    import pop
    from assets.fake_engine import FakeEngine, write_tiny_policy
    pop.Engine = FakeEngine
    pop.main(pop.parse_args(["--preset", "tiny", "--model", write_tiny_policy("/tmp/tiny")]))

All of pop.py runs but its class Engine. FakeModel is the same for eval.py, whose files are here in small. The tests use
all of it.
"""
import json
import math
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pop
from pop import Completion, Criterion, Engine, Request

RUBRIC = [Criterion(name="facts", gold="It is red.", description="Says red.", weight=3),
          Criterion(name="tone", gold="It is calm.", description="Is calm.", weight=1)]
RUBRIC_ROWS = [criterion.model_dump() for criterion in RUBRIC]


class FakeEngine(Engine):
    """Of four answers one is cut off, one cannot be judged, two are good ("quality 1" or "quality 2", which is also
    their rating), in tags where the prompt asks for them.

    say(request, role) may set a reply: a text, a Completion, or None for the usual one.
    """
    last: "FakeEngine"

    def __init__(self, cfg: pop.Config, say: Any = None) -> None:
        self.cfg, self.on_gpu, self.weights = cfg, False, "base"
        self.say = say or self.say
        self.calls: list[Any] = []    # weights that were loaded, and (role, number of prompts)
        self.asked: list[tuple[str, Request]] = []
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
        tokens = self.tokenizer.all_special_tokens
        self.special = dict(zip(tokens, self.tokenizer.convert_tokens_to_ids(tokens), strict=True))
        FakeEngine.last = self

    def say(self, request: Request, role: str) -> str | Completion | None:
        return None

    def order(self) -> list[str]:
        """Roles that were asked and weights that were loaded."""
        return [call if isinstance(call, str) else call[0] for call in self.calls]

    def requests(self, role: str) -> list[Request]:
        """All to this role."""
        return [request for asked, request in self.asked if asked == role]

    def sample(self, requests: list[Request], role: str) -> list[Completion]:
        self.asked += [(role, request) for request in requests]
        if requests:
            self.calls.append((role, len(requests)))
        replies = []
        for i, request in enumerate(requests):
            reply = self.say(request, role)
            if isinstance(reply, str):
                reply = self.completion(reply, "stop", request)
            replies.append(reply or self.reply(i, request, role))
        return replies

    def reply(self, i: int, request: Request, role: str) -> Completion:
        """The usual one. `i` is the request's place in the call of this rank."""
        reason, logprobs = "stop", []
        if role == "proposer":
            text = json.dumps(dict(task=f"Explain thing {request.seed}.", reference="It is red and calm."))
        elif role == "rubric":
            text = pop.Rubric(criteria=RUBRIC).model_dump_json()
        elif role == "solver":
            text = f"quality {1 + request.seed % 2}"
            if "<answer>" in str(request.messages):
                text = f"Let me think.\n<answer>\n{text}\n</answer>"
            text = ["cut off", "nobody can judge this", text, text][i % 4]
            reason = "length" if i % 4 == 0 else "stop"
        else:
            turn = request.messages[-1]["content"]
            quality = re.search(r"quality (\d)", turn.rpartition("<answer>")[2])
            if request.next_words:    # Yes, No
                p = {"1": (0.48, 0.48), "2": (0.98, 0.01)}[quality[1]] if quality else (0.05, 0.04)
                text, logprobs = "", [math.log(x) for x in p]
            else:
                names = request.schema["properties"] if quality else ["nobody"]
                rating = int(quality[1]) if quality else 0
                text = json.dumps({name: dict(thoughts="t", rating=rating) for name in names})
        return self.completion(text, reason, request, logprobs)

    def completion(self, text: str, reason: str, request: Request, logprobs: list[float] | None = None) -> Completion:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        if request.logprobs:
            logprobs = [-5.5] * len(tokens)
        return Completion(tokens, prompt_ids=self.encode(request.messages), engine_logprobs=logprobs or [], text=text,
                          finish_reason=reason)

    def load_weights(self, model: torch.nn.Module, which: str) -> None:
        self.calls.append(which)
        self.weights = which

    def check_weights(self, model: torch.nn.Module) -> None:
        self.calls.append("check")

    def building(self) -> AbstractContextManager:
        return nullcontext()

    def close(self) -> None:
        self.calls.append("close")


def write_tiny_policy(folder: str | Path) -> str:
    """The folder, now with a random 2-layer Qwen2 and a byte tokenizer whose pad token is its EOS."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                               "{% endfor %}<|im_start|>assistant\n")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        num_hidden_layers=2, tie_word_embeddings=True, initializer_range=0.2)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def untrained_model(kind: str, folder: Path, model: str, **fields: Any) -> Path:
    """The folder, now with a tiny random model of this class of config and the tokenizer of `model`."""
    sizes = dict(vocab_size=300, hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2)
    settings = dict(sizes, max_position_embeddings=2048, initializer_range=0.2) | fields
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(0)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("config.json", "generation_config.json"))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def copied(model: str, folder: Path, name: str = "config.json", template: str | None = None, **fields: Any) -> Path:
    """Copy of a model's folder with another chat template, or whose JSON file of this name has other fields."""
    shutil.copytree(model, folder)
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | fields))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def randomised(model: torch.nn.Module, std: float) -> torch.nn.Module:
    """LoRA's B starts at 0: the adapter does nothing, and no gradient reaches A. Not any more."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)
    return model


def whole_prompt(request: Request) -> str:
    return "\n".join(message["content"] for message in request.messages)


def answers_of(*texts: str | None) -> list[Completion]:
    """Finished plain answers; None is one that was cut off."""
    completions = []
    for i, text in enumerate(texts):
        reason = "length" if text is None else "stop"
        completions.append(Completion([1] * (10 + i), text=text or "cut", answer=text or "", finish_reason=reason))
    return completions


def documents(count: int = 12, words: int = 60) -> list[str]:
    """Texts that share no word; each is one word longer than the one before."""
    return [" ".join(f"d{d}w{w}" for w in range(words + d)) for d in range(count)]


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rollouts(run_dir: Path) -> list[Any]:
    """All lines of all rollout files."""
    return [row for file in sorted(run_dir.glob("rollouts/*")) for row in read_lines(file)]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """The file, now a corpus."""
    write_lines(path, [dict(text=text) for text in texts])
    return path


class SleepingEngine(FakeEngine):
    """pop.py's own Engine, if `start_vllm` stands for vLLM's class LLM on a GPU; its calls stand in `calls`, too."""
    load_weights, close = Engine.load_weights, Engine.close

    def __init__(self, cfg: pop.Config) -> None:
        self.calls, self.asked, FakeEngine.last = [], [], self
        Engine.__init__(self, cfg)

    @staticmethod
    def start_vllm(model: str, **settings: Any) -> SimpleNamespace:
        log = FakeEngine.last.calls.append
        log("engine")
        FakeEngine.last.settings = settings
        return SimpleNamespace(
            sleep=lambda level: log(f"sleep {level}"), wake_up=lambda tags: log(f"wake {tags}"),
            collective_rpc=lambda name, kwargs: log((name, dict(kwargs["weights_iterator"]))),
            apply_model=lambda function: None, reset_prefix_cache=lambda: log("reset") or True,
            llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: log("shutdown"))))


# ---- for eval.py ----
HEALTH_ROWS = [dict(criterion=name, points=points, tags=[])
               for name, points in (("says red", 5), ("says calm", 3), ("is rude", -4))]
BENCHMARK_ROWS = {    # of each benchmark, in its published format; {0} is the number of the row
    "healthbench": [dict(prompt_id="h{0}", example_tags=["theme:hedging"], rubrics=HEALTH_ROWS, prompt=[
        dict(role="user", content="Hello {0}"), dict(role="assistant", content="Yes?"),
        dict(role="user", content="Is it red? {0}")])],
    "creative_writing": [dict(category="epistolary", title="t{0}", writing_prompt="Letters {0}. <SEED> 10 words.",
                              seed_modifiers=["Be sad.", "Be glad."])],
    # with --references it does not matter whose published answers those would be
    "arena_hard": [dict(uid="u{0}", category="mine", subcategory="creative_writing", prompt="A poem {0}")],
    "arena_hard_v0.1": [dict(uid="u{0}", category="arena-hard-v0.1", cluster="c", prompt="A program {0}")],
    "ifeval": [dict(key="{0}", prompt="Say quality, no commas. {0}",
                    instruction_id_list=["punctuation:no_comma", "length_constraints:number_words"],
                    kwargs=[None, dict(relation="at least", num_words=3)])],    # null: case 21
    "writingbench": [dict(index="{0}", domain1="Law", domain2="x", query="A contract {0}", checklist=[
        {"name": name, "criteria_description": "d", "1-2": "bad", "9-10": "good"} for name in "abcde"])],
    "own": [dict(prompt=[dict(role="user", content="Hello"), dict(role="assistant", content="Yes?", name="x"),
                         dict(role="user", content="What is it? {0}")]),
            dict(prompt="Why is it? {0}", reference="It is red.", rubric=RUBRIC_ROWS)],
}
REFERENCES = [dict(uid=f"u{i}", model="m", messages=[
    dict(role="user", content="p"), dict(role="assistant", content=dict(answer="quality 1 here"))])
    for i in (0, 1, 2, "nobody")]


class FakeModel(FakeEngine):
    """Answers "quality 1", or 2 if it is called better; as a judge it likes quality 2 and has no word for nobody."""

    def reply(self, i: int, request: Request, role: str) -> Completion:
        from eval import FAULTS, QUALITIES    # here, so that a fork of pop.py can do without eval.py
        turn, name = request.messages[-1]["content"], self.cfg.model
        kind = list((request.schema or {}).get("properties", []))
        said = re.findall(r"quality (\d)", turn)
        good, reason = said[-1:] == ["2"], "stop"
        if role == "answer":
            text = "nobody can judge this" if "nobody" in turn else f"quality {1 + name.endswith('better')} here"
            reason = "length" if name.endswith("cut") else "stop"
        elif kind == ["explanation", "criteria_met"]:
            text = json.dumps(dict(explanation="e", criteria_met=good and "rude" not in turn))
        elif kind == ["analysis", "grades"]:
            grades = {name: 20 * (good == (name in QUALITIES)) for name in QUALITIES + FAULTS}
            text = json.dumps(dict(analysis="a", grades=grades))
        elif kind == ["reason", "score"]:
            text = json.dumps(dict(reason="r", score=9 if good else 3))
        elif kind == ["thoughts", "verdict"]:
            verdict = {("1", "2"): "B>>A", ("2", "1"): "A>>B"}.get(tuple(said), "A=B")
            text = json.dumps(dict(thoughts="t", verdict=verdict))
        else:
            return super().reply(i, request, role)
        text = "?" if role == "judge" and "nobody" in turn else text
        return Completion([1, 2], text=text, finish_reason=reason)


# Texts that would take over the page that people read rollouts on.
MARKUP = ["<script>document.title='taken'</script>", "</script><img src=x onerror=\"document.title='taken'\">"]


def write_run(run: Path, steps: list[list[tuple[str, list[Any], list[str]]]]) -> Path:
    """The folder, now of a run. Of each step the groups (task, rubric, answers), of which the first is trained on, the
    others are held out. An answer that ends with "(cut)" is unfinished.
    """
    (run / "rollouts").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dict(model=steps[0][0][0], domain="general", seed=0)))
    metrics = [dict(step=step, reward_mean=0.1 * step, engine_gap=math.nan) for step in range(len(steps))]
    write_lines(run / "metrics.jsonl", metrics)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": ')    # by a kill
    for step, groups in enumerate(steps):
        rows = []
        for i, (task, rubric, answers) in enumerate(groups):
            completions = [dict(text=text.removesuffix(" (cut)"), answer="" if text.endswith("(cut)") else text,
                                finish_reason="stop", score=0.25, ratings=[0.5], advantage=0.0, tokens=9)
                           for text in answers]
            rows.append(dict(document=task, step=pop.HELD_OUT if i else step, row=i, task=task, reference=task,
                             rubric=rubric, failures=[task], drop_reason=None, completions=completions))
        write_lines(run / "rollouts" / f"step_{step:06d}.jsonl", rows)
    return run
