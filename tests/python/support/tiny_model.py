"""Builds small random models without downloads, whose output depends on the whole prompt.

The default initialisation of transformers makes such a model repeat one token whatever the prompt. A larger
initializer_range makes every output depend on the whole context, so a wrong or missing KV block shows up as other
text. The folder loads with transformers 4 (vLLM 0.15) and 5 (vLLM 0.32). The same seed gives the same weights, but
another torch may round differently: compare outputs only within one environment.

    python tiny_model.py float32        prints the folder of the model, which it builds first if it is not there
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys

from support.places import MODELS, log_path

SAMPLE = "hello world the quick brown fox jumps over the lazy dog"
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 64
VOCABULARY_WANTED = 512
CONTEXT_TOKENS = 8192
SEED = 0
# Chosen by trial: below about 0.1 every prompt ends in the same token.
INITIALIZER_RANGE = 0.25


def tiny_model(dtype="float32"):
    """The folder of the model with weights of this type; built once, by whichever process comes first."""
    folder = MODELS / f"tiny-{dtype}"
    MODELS.mkdir(parents=True, exist_ok=True)
    with open(MODELS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            # In a process of its own: importing torch here would slow every test down.
            with open(log_path(f"model-{dtype}"), "w") as log:
                environment = {**os.environ, "PYTHONPATH": str(MODELS.parents[1] / "tests/python")}
                command = [sys.executable, __file__, "--build", dtype]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return folder


def vocabulary_size(folder):
    """How many token ids the model knows."""
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def token_bytes(dtype="float32"):
    """What keys and values of one token take in all layers."""
    return LAYERS * 2 * KV_HEADS * HEAD_DIM * {"float32": 4, "bfloat16": 2}[dtype]


def build(dtype):
    """Builds beside the final place and renames, so that a killed build leaves nothing half done."""
    folder = MODELS / f"tiny-{dtype}"
    partial = MODELS / f".tiny-{dtype}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    _save_model(partial, _save_tokenizer(partial), dtype)
    _make_portable(partial)
    _check_outputs_depend_on_the_prompt(partial, dtype)
    partial.rename(folder)


def _save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_WANTED,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SAMPLE] * 10, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _save_model(folder, vocabulary, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=2 * HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=INITIALIZER_RANGE,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def _make_portable(folder):
    """transformers 5 writes a tokenizer class and rope and dtype fields that version 4 does not read."""
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _check_outputs_depend_on_the_prompt(folder, dtype):
    """Greedy output of prompts that differ at the end, at the start and everywhere must differ."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, dtype))
    filler = "the quick brown fox " * 50
    outputs = {}
    for prompt in (filler + "one", filler + "two", "hello " + filler + "one", "lazy dog " * 80):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        outputs[prompt] = tuple(generated[0, ids.shape[1] :].tolist())
        print(f"{ids.shape[1]:5d} tokens ...{prompt[-14:]!r:18} -> {outputs[prompt]}")
    if len(set(outputs.values())) != len(outputs):
        raise SystemExit("different prompts gave the same output: the model would hide a wrong KV block")


if __name__ == "__main__":
    if sys.argv[1] == "--build":
        with contextlib.suppress(BrokenPipeError):
            build(sys.argv[2])
    else:
        print(tiny_model(sys.argv[1]))
